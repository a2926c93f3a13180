"""The interpreter that proves kernels computes what a GPU computes, and says so when it cannot."""

import operator

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from attnkd.testing import interpreter

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels run on a GPU here")
BF16 = torch.bfloat16
N = 64


@triton.jit
def _binary_kernel(A, B, OUT, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(A + i)
    b = tl.load(B + i)
    if OP == "add":
        out = a + b
    elif OP == "sub":
        out = a - b
    elif OP == "mul":
        out = a * b
    elif OP == "maximum":
        out = tl.maximum(a, b)
    elif OP == "minimum":
        out = tl.minimum(a, b)
    elif OP == "less":
        out = (a < b).to(tl.bfloat16)
    elif OP == "equal":
        out = (a == b).to(tl.bfloat16)
    elif OP == "where":
        out = tl.where(a > b, a, b)
    elif OP == "fma":
        out = tl.fma(a, b, a)
    else:
        out = a * 1.5 + 0.25
    tl.store(OUT + i, out)


BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "less": lambda a, b: (a < b).to(BF16),
    "equal": lambda a, b: (a == b).to(BF16),
    "where": torch.maximum,
    "fma": lambda a, b: (a.double() * b.double() + a.double()).to(BF16),
    "constants": lambda a, b: a * 1.5 + 0.25,
}


@pytest.mark.parametrize("op", BINARY)
def test_bfloat16_arithmetic_is_exact(op):
    a, b = torch.randn(N, dtype=BF16), torch.randn(N, dtype=BF16)
    a[:4] = b[:4]
    out = torch.empty(N, dtype=BF16)
    _binary_kernel[(1,)](a, b, out, OP=op, N=N)
    assert torch.equal(out, BINARY[op](a, b))


@triton.jit
def _cast_kernel(X, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(OUT + i, tl.load(X + i).to(OUT.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_bfloat16_casts_round_to_nearest_even_both_ways(dtype):
    special = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, -(1 + 2**-8), 3.0, 255.0, 257.0, 259.0]
    if dtype.is_floating_point:
        special += [float("inf"), float("-inf"), float("nan"), 65504.0, 2.0**-24]
    x = torch.cat([torch.tensor(special), torch.randn(N - len(special)) * 100]).to(dtype)
    there = torch.empty(N, dtype=BF16)
    _cast_kernel[(1,)](x, there, N=N)
    torch.testing.assert_close(there, x.to(BF16), rtol=0, atol=0, equal_nan=True)
    finite = torch.where(x.to(BF16).isfinite(), x.to(BF16), 1.0)
    back = torch.empty(N, dtype=dtype)
    _cast_kernel[(1,)](finite, back, N=N)
    torch.testing.assert_close(back, finite.to(dtype), rtol=0, atol=0)


def test_every_nan_stays_nan_in_bfloat16():
    """Rounding must not carry a NaN with low mantissa bits into an infinity, or a large one into zero."""
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    x = bits.view(torch.float32).repeat(N // 4)
    assert x.isnan().all()
    out = torch.empty(N, dtype=BF16)
    _cast_kernel[(1,)](x, out, N=N)
    assert out.isnan().all()


@triton.jit
def _unary_kernel(X, OUT, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    if OP == "abs":
        y = tl.abs(x)
    elif OP == "neg":
        y = -x
    elif OP == "sum":
        y = tl.sum(tl.reshape(x, [N, 1]), 1)
    elif OP == "max":
        y = tl.max(tl.reshape(x, [N, 1]), 1).to(tl.bfloat16)
    else:
        y = tl.cumsum(tl.reshape(x, [N, 1]), 1).reshape([N]).to(tl.bfloat16)
    tl.store(OUT + i, y)


@pytest.mark.parametrize("op", ["abs", "neg", "sum", "max", "cumsum"])
def test_bfloat16_functions_of_one_element(op):
    x = torch.randn(N, dtype=BF16)
    out = torch.empty(N, dtype=BF16)
    _unary_kernel[(1,)](x, out, OP=op, N=N)
    assert torch.equal(out, {"abs": x.abs(), "neg": -x}.get(op, x))


@triton.jit
def _reduce_kernel(X, SUM, MAX, ARGMAX, CUMSUM, R: tl.constexpr, C: tl.constexpr):
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    x = tl.load(X + r[:, None] * C + c[None, :])
    tl.store(SUM + r, tl.sum(x, 1))
    tl.store(MAX + r, tl.max(x, 1))
    tl.store(ARGMAX + r, tl.argmax(x, 1))
    tl.store(CUMSUM + r[:, None] * C + c[None, :], tl.cumsum(x, 1))


def test_bfloat16_reductions_round_once():
    x = torch.randn(4, 16, dtype=BF16)
    total, top, where, running = (torch.empty(4, dtype=BF16), torch.empty(4, dtype=BF16),
                                  torch.empty(4, dtype=torch.int32), torch.empty(4, 16, dtype=BF16))  # fmt: skip
    _reduce_kernel[(1,)](x, total, top, where, running, R=4, C=16)
    torch.testing.assert_close(total, x.double().sum(1).to(BF16), rtol=2**-8, atol=0)
    assert torch.equal(top, x.amax(1))
    assert torch.equal(where.long(), x.argmax(1))
    torch.testing.assert_close(running, x.double().cumsum(1).to(BF16), rtol=2**-7, atol=2**-8)


@triton.jit
def _dot_kernel(A, B, OUT, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    k = tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    b = tl.load(B + m[:, None] * K + k[None, :])
    acc = tl.full([M, M], 1.0, tl.float32)
    acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    tl.store(OUT + m[:, None] * M + m[None, :], acc)


def _dot(a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
    out = torch.empty(a.shape[0], a.shape[0])
    _dot_kernel[(1,)](a, b, out, PRECISION=precision, M=a.shape[0], K=a.shape[1])
    return out


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_dots_of_half_types_are_exact_products_summed_in_fp32(dtype):
    a, b = torch.randn(16, 32, dtype=dtype), torch.randn(16, 32, dtype=dtype)
    torch.testing.assert_close(_dot(a, b, "tf32"), (a.double() @ b.double().T + 1).float(), rtol=1e-5, atol=1e-5)


def test_a_dot_of_fp32_is_only_exact_when_asked_to_be():
    a, b = torch.randn(16, 32), torch.randn(16, 32)
    oracle = a.double() @ b.double().T + 1
    assert (_dot(a, b, "ieee") - oracle).abs().max() < 1e-5
    assert 1e-4 < (_dot(a, b, "tf32") - oracle).abs().max() < 5e-2


def test_a_dot_the_compiler_rejects_is_rejected():
    with pytest.raises(InterpreterError, match="K >= 16"):
        _dot(torch.randn(16, 8, dtype=BF16), torch.randn(16, 8, dtype=BF16), "ieee")


@triton.jit
def _offset_kernel(X, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(X + row * stride * 0, 1.0)


def test_int32_overflow_is_detected():
    x = torch.zeros(1)
    _offset_kernel[(3,)](x, 2**30 - 1, WIDE=False)
    _offset_kernel[(3,)](x, 2**30, WIDE=True)
    with pytest.raises(InterpreterError, match="int32 overflow: mul gives 2147483648"):
        _offset_kernel[(3,)](x, 2**30, WIDE=False)


@triton.jit
def _assert_kernel(X, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.device_assert(tl.load(X + i) > 0, "not positive")


def test_device_asserts_are_on():
    _assert_kernel[(1,)](torch.ones(N), N=N)
    with pytest.raises(InterpreterError, match="not positive"):
        _assert_kernel[(1,)](torch.zeros(N), N=N)


@triton.jit
def _atomic_kernel(X, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(X + i, tl.full([N], 1.0, X.dtype.element_ty))


def test_bfloat16_atomics_raise_instead_of_adding_bits():
    x = torch.zeros(N)
    _atomic_kernel[(1,)](x, N=N)
    assert (x == 1).all()
    with pytest.raises(InterpreterError, match="bfloat16 atomics"):
        _atomic_kernel[(1,)](x.to(BF16), N=N)


def test_installing_again_changes_nothing():
    from triton.runtime import interpreter as triton_interpreter

    before = dict(vars(triton_interpreter.InterpreterBuilder))
    interpreter.install()
    assert dict(vars(triton_interpreter.InterpreterBuilder)) == before


def test_a_moved_private_api_is_an_error(monkeypatch):
    from triton.runtime import interpreter as triton_interpreter

    monkeypatch.delattr(triton_interpreter.InterpreterBuilder, "create_dot")
    monkeypatch.setattr(triton_interpreter.ReduceOps, "sum", lambda self, renamed: None)
    monkeypatch.setattr(interpreter, "_installed", False)
    with pytest.raises(RuntimeError, match=r"create_dot is gone.*ReduceOps.sum takes \('self', 'renamed'\)"):
        interpreter.install()
