"""Makes Triton's interpreter (``TRITON_INTERPRET=1``: NumPy runs the kernels) trustworthy enough to prove kernels with.

As shipped, the interpreter keeps bfloat16 values as their raw 16 bits and does integer arithmetic on them, truncates
where the hardware rounds, ignores the precision a dot asks for and wraps 32-bit integers silently. :func:`install`
replaces those parts:

* **bfloat16** casts, arithmetic, comparisons, elementwise functions, dots, reductions and scans compute in fp32 and
  round once, to nearest even, as the hardware does. bfloat16 atomics raise.
* **dots** of fp32 operands drop the mantissa bits that TF32 drops unless the kernel asked for
  ``input_precision="ieee"``, and refuse ``K < 16``, as the compiler does.
* **int32 overflow** and a failed ``tl.device_assert`` raise.
* **speed**: a call of a device function (``tl.sum`` is one) no longer patches the whole language again, and NumPy's name of a
  type is looked up once.

All of this is private API of Triton 3.6 to 3.9, so :func:`install` checks the shape of what it replaces and fails loudly
when it has moved. Only this process's interpreter is touched, and compiled kernels not at all.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as interp

__all__ = ["install"]

#: What is replaced and the parameters it must have (a prefix of them, since later releases append).
_EXPECTED: list[tuple[Any, str, tuple[str, ...]]] = [
    (interp.InterpreterBuilder, "cast_impl", ("self", "src", "dst_type")),
    (interp.InterpreterBuilder, "create_fp_to_fp", ("self", "src", "dst_type")),
    (interp.InterpreterBuilder, "binary_op", ("self", "lhs", "rhs", "op")),
    (interp.InterpreterBuilder, "ternary_op", ("self", "lhs", "rhs", "other", "op")),
    (interp.InterpreterBuilder, "unary_op", ("self", "arg", "op")),
    (interp.InterpreterBuilder, "create_fma", ("self", "x", "y", "z")),
    (interp.InterpreterBuilder, "create_erf", ("self", "arg")),
    (interp.InterpreterBuilder, "create_rsqrt", ("self", "arg")),
    (interp.InterpreterBuilder, "create_dot", ("self", "a", "b", "d", "input_precision")),
    (interp.InterpreterBuilder, "create_atomic_rmw", ("self", "rmwOp", "ptr", "val")),
    (interp.InterpreterBuilder, "create_atomic_cas", ("self", "ptr", "cmp", "val")),
    (interp.ReduceOps, "sum", ("self", "input")),
    (interp.ReduceOps, "min_max", ("self", "input", "val_reduce_op", "idx_reduce_op")),
    (interp.ScanOps, "cumsum", ("self", "input")),
    (interp.ScanOps, "cumprod", ("self", "input")),
    (interp.GridExecutor, "__call__", ("self", "args_dev", "kwargs")),
    (interp.InterpretedFunction, "__call__", ("self", "args", "kwargs")),
    (interp.InterpretedFunction, "rewrite", ("self",)),
    (interp, "_patch_lang", ("fn",)),
    (interp, "_patch_lang_tensor", ("tensor", "scope")),
    (interp, "_get_np_dtype", ("tt_dtype",)),
    (TritonSemantic, "binary_op_sanitize_overflow_impl", ("self", "lhs", "rhs", "binary_op")),
]

_COMPARISONS = frozenset({np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal})
_MIN_DOT_K = 16  # what the compiler demands of 16-bit operands on every target

_installed = False


def install() -> None:
    """Replaces the untrustworthy parts of Triton's interpreter in this process. Calling it again does nothing.

    Raises:
        RuntimeError: if ``TRITON_INTERPRET`` is not set, or if this Triton's interpreter is not shaped like the ones this
            module was written against.
    """
    global _installed
    if _installed:
        return
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton or any kernel module is imported")
    _check_private_api()
    _install_bfloat16()
    _install_dot()
    _install_checks()
    _install_fast_calls()
    interp.bfloat16_is_exact = True  # the mark that attnkd.attention.dispatch looks for
    _installed = True


def _check_private_api() -> None:
    moved = []
    for owner, attribute, parameters in _EXPECTED:
        name = f"{owner.__name__}.{attribute}"
        function = inspect.getattr_static(owner, attribute, None)
        if not isinstance(function, types.FunctionType):
            moved.append(f"{name} is gone")
        elif (found := tuple(inspect.signature(function).parameters))[: len(parameters)] != parameters:
            moved.append(f"{name} takes {found}, expected {parameters}")
    builder = getattr(interp, "interpreter_builder", None)
    if not isinstance(getattr(builder, "options", None), interp.InterpreterOptions):
        moved.append("interpreter_builder.options is not an InterpreterOptions")
    if "min_dot_size" not in getattr(builder, "codegen_fns", {}):
        moved.append("interpreter_builder.codegen_fns has no min_dot_size")
    if moved:
        raise RuntimeError(
            f"Triton {triton.__version__} moved private parts of its interpreter that attnkd.testing.interpreter "
            f"replaces (written against 3.6 to 3.9): {'; '.join(moved)}"
        )


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> the fp32 values they stand for, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """fp32 values -> bfloat16 bits (uint16), rounded to nearest even (or toward zero); NaN becomes the quiet NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    bias = np.uint32(0) if toward_zero else ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return np.where(np.isnan(values), np.uint16(0x7FC0), ((bits + bias) >> 16).astype(np.uint16))


def _value(handle: Any) -> np.ndarray:
    """A handle's values as an array that NumPy can compute with."""
    return _widen(handle.data) if _is_bf16(handle) else handle.data


def _bf16(values: np.ndarray) -> Any:
    return interp.TensorHandle(_round(values), tl.bfloat16)


def _install_bfloat16() -> None:
    builder = interp.InterpreterBuilder

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        dst = dst_type.scalar
        if _is_bf16(src) and dst != tl.bfloat16:
            return interp.TensorHandle(_value(src).astype(interp._get_np_dtype(dst)), dst)
        if dst == tl.bfloat16 and not _is_bf16(src):
            return _bf16(src.data.astype(np.float32))
        return original_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return original_fp_to_fp(self, src, dst_type, rounding_mode)
        if rounding_mode == interp._ir.ROUNDING_MODE.RTZ and dst_type.scalar == tl.bfloat16:
            return interp.TensorHandle(_round(src.data, toward_zero=True), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if not (_is_bf16(lhs) and _is_bf16(rhs)):
            return original_binary(self, lhs, rhs, op)
        result = op(_value(lhs), _value(rhs))
        return interp.TensorHandle(result, tl.int1) if op in _COMPARISONS else _bf16(result)

    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Callable[..., Any]) -> Any:
        if op is np.where or not _is_bf16(other):  # a selection moves bits and needs no arithmetic
            return original_ternary(self, lhs, rhs, other, op)
        return _bf16(op(_value(lhs), _value(rhs), _value(other)))

    def unary_op(self: Any, arg: Any, op: Callable[..., Any]) -> Any:
        return _bf16(op(_value(arg))) if _is_bf16(arg) else original_unary(self, arg, op)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return original_fma(self, x, y, z)
        return _bf16(_value(x).astype(np.float64) * _value(y) + _value(z))

    def in_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(self: Any, arg: Any) -> Any:
            if not _is_bf16(arg):
                return original(self, arg)
            return _bf16(original(self, interp.TensorHandle(_value(arg), tl.float32)).data)

        return function

    def not_for_bf16(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(self: Any, *args: Any) -> Any:
            if any(isinstance(arg, interp.TensorHandle) and arg.get_element_ty() == tl.bfloat16 for arg in args):
                raise NotImplementedError("bfloat16 atomics: the interpreter would add the bits as integers")
            return original(self, *args)

        return function

    original_cast, original_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    original_binary, original_ternary, original_unary = builder.binary_op, builder.ternary_op, builder.unary_op
    original_fma = builder.create_fma
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.binary_op, builder.ternary_op, builder.unary_op = binary_op, ternary_op, unary_op
    builder.create_fma = create_fma
    builder.create_erf, builder.create_rsqrt = in_fp32(builder.create_erf), in_fp32(builder.create_rsqrt)
    builder.create_atomic_rmw = not_for_bf16(builder.create_atomic_rmw)
    builder.create_atomic_cas = not_for_bf16(builder.create_atomic_cas)
    builder.get_bf16 = lambda self, value: _bf16(np.array([value], dtype=np.float32))

    # Hardware's min/max return the operand that is a number (Triton 3.6 propagated NaN here).
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)

    def reduction(original: Callable[..., Any]) -> Callable[..., Any]:
        """Runs a reduction or scan of a bfloat16 tensor in fp32 and rounds what is bfloat16 of its result."""

        def function(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            tensor = input[0] if isinstance(input, tuple) else input
            if tensor.dtype.scalar != tl.bfloat16:
                return original(self, input, *args, **kwargs)
            wide = self.to_tensor(_widen(tensor.handle.data), tl.float32)
            result = original(self, (wide, *input[1:]) if isinstance(input, tuple) else wide, *args, **kwargs)
            if isinstance(result, (tuple, list)):
                return type(result)(narrow(self, each) for each in result)
            return narrow(self, result)

        def narrow(self: Any, tensor: Any) -> Any:
            if tensor.dtype.scalar != tl.float32:  # the index of an argmax
                return tensor
            data = _round(tensor.handle.data)
            return self.to_tensor(data if tensor.type.is_block() else data[0], tl.bfloat16)

        return function

    for owner, name in [(interp.ReduceOps, "sum"), (interp.ReduceOps, "min_max"),
                        (interp.ScanOps, "cumsum"), (interp.ScanOps, "cumprod")]:  # fmt: skip
        setattr(owner, name, reduction(getattr(owner, name)))


# --- dots -------------------------------------------------------------------------------------------------------------


def _install_dot() -> None:
    builder = interp.InterpreterBuilder
    original = builder.create_dot
    tf32 = interp._ir.INPUT_PRECISION.TF32

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.float32 and input_precision == tf32:
            a, b = (interp.TensorHandle(_truncate_to_tf32(x.data), tl.float32) for x in (a, b))
        if not (_is_bf16(a) or _is_bf16(b) or _is_bf16(d)):
            return original(self, a, b, d, input_precision, *rest)
        accumulator = _value(d)
        result = np.matmul(_value(a), _value(b), dtype=accumulator.dtype) + accumulator
        return _bf16(result) if _is_bf16(d) else interp.TensorHandle(result, d.dtype.scalar)

    builder.create_dot = create_dot
    interp.interpreter_builder.codegen_fns["min_dot_size"] = lambda lhs, rhs: (1, 1, _MIN_DOT_K)


def _truncate_to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 values with the 13 mantissa bits cleared that a TF32 matrix unit does not read."""
    bits = np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.view(np.float32).reshape(values.shape)


# --- checks -----------------------------------------------------------------------------------------------------------


def _install_checks() -> None:
    interp.interpreter_builder.options = dataclasses.replace(interp.interpreter_builder.options, debug=True)
    wide_ops = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        exact = wide_ops[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        if exact.size and (exact.max() > kind.get_int_max_value() or exact.min() < kind.get_int_min_value()):
            worst = exact.flat[np.abs(exact).argmax()]
            raise OverflowError(f"{kind} overflow: {binary_op.__name__} gives {worst}; compute offsets in int64")

    # The class is the compiler's too, so what it was built for decides.
    original = TritonSemantic.binary_op_sanitize_overflow_impl

    def dispatch(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        interpreted = isinstance(self.builder, interp.InterpreterBuilder)
        (check_overflow if interpreted else original)(self, lhs, rhs, binary_op)

    TritonSemantic.binary_op_sanitize_overflow_impl = dispatch


# --- speed ------------------------------------------------------------------------------------------------------------


def _install_fast_calls() -> None:
    original_patch, original_tensor_patch = interp._patch_lang, interp._patch_lang_tensor
    original_launch, original_np_dtype = interp.GridExecutor.__call__, interp._get_np_dtype
    np_dtypes: dict[str, Any] = {}

    def np_dtype(tt_dtype: Any) -> Any:
        if type(tt_dtype) is not tl.dtype:  # of pointers and blocks
            return original_np_dtype(tt_dtype)
        if tt_dtype.name not in np_dtypes:
            np_dtypes[tt_dtype.name] = original_np_dtype(tt_dtype)
        return np_dtypes[tt_dtype.name]

    def patch_lang(fn: Any) -> Any:
        """Patches the language once a launch, for the kernel and for every device function it calls."""
        return original_patch(types.SimpleNamespace(__globals__={**fn.__globals__, "__tl": tl, "__core": tl.core}))

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original_tensor_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):  # exp2 of a stand-in for -inf underflows by design, as it does on a GPU
            original_launch(self, *args, **kwargs)

    interp._patch_lang, interp._patch_lang_tensor = patch_lang, patch_lang_tensor
    interp.InterpretedFunction.__call__ = call_device_function
    interp.GridExecutor.__call__, interp._get_np_dtype = launch, np_dtype
