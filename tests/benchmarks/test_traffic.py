"""The meter counts what a kernel asks for, and with the guards finds every access that is not the kernel's to make."""

import json
import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from attnkd.testing.guard import LAYOUTS, canaries, guarded, lay_out, poisoned_empty
from attnkd.testing.traffic import Meter
from benchmarks.calls import Attention, Relation
from benchmarks.machine import ROOT
from benchmarks.traffic import measure

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels run on a GPU here")


@triton.jit
def _rows_kernel(Q, K, OUT, N, k_b, k_n, D: tl.constexpr, BN: tl.constexpr, PASSES: tl.constexpr, SLIP: tl.constexpr):
    """Scores of one query per batch entry; K is read PASSES times, and SLIP rows past its end."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    d = tl.arange(0, D)
    q = tl.load(Q + b * D + d).to(tl.float32)
    scores = tl.zeros([BN], tl.float32)
    for _ in range(PASSES):
        pointers = K + b * k_b + n[:, None] * k_n + d[None, :]
        k = tl.load(pointers, mask=(n < N + SLIP)[:, None], other=0.0)
        scores += tl.sum(k.to(tl.float32) * q[None, :], 1)
    tl.store(OUT + b * N + n, scores, mask=n < N)


B, N, D = 3, 13, 16


def _launch(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, passes: int = 1, slip: int = 0) -> None:
    _rows_kernel[(B,)](q, k, out, N, k.stride(0), k.stride(1), D=D, BN=16, PASSES=passes, SLIP=slip)


def _tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(B, D, dtype=dtype), torch.randn(B, N, D, dtype=dtype), torch.empty(B, N)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_counts_masked_loads_and_stores(dtype):
    q, k, out = _tensors(dtype)
    with Meter(query=q, key=k) as meter:
        _launch(q, k, out)
    size = dtype.itemsize
    assert meter.loaded("key") == meter.loaded("key").once == meter.loaded("key").sectors == B * N * D * size
    assert meter.loaded("query") == B * D * size
    assert meter.stored("OUT") == meter.stored("OUT").once == B * N * 4
    assert meter.loaded("OUT") == meter.stored("key") == 0
    assert meter.loaded() == (B * N * D + B * D) * size
    assert [(launch.kernel, launch.grid) for launch in meter.launches] == [("_rows_kernel", (B, 1, 1))]
    torch.testing.assert_close(out, (k.float() @ q.float()[..., None])[..., 0], rtol=1e-5, atol=1e-5)


@interpreted
def test_tells_a_reread_from_a_read():
    q, k, out = _tensors(torch.bfloat16)
    with Meter(key=k) as meter:
        _launch(q, k, out, passes=3)
        _launch(q, k, out)
    assert meter.loaded("key") == 4 * k.nbytes
    assert meter.loaded("key").once == k.nbytes
    assert [launch.loaded("K") for launch in meter.launches] == [3 * k.nbytes, k.nbytes]


@interpreted
def test_scattered_bytes_cost_whole_sectors():
    q, k, out = _tensors(torch.bfloat16)
    spread = torch.zeros(B, N, D, 32, dtype=k.dtype)[..., 0].copy_(k)  # 64 bytes between elements

    @triton.jit
    def gather_kernel(X, stride, SIZE: tl.constexpr):
        tl.load(X + tl.arange(0, SIZE) * stride)

    with Meter(x=spread) as meter:
        gather_kernel[(1,)](spread, spread.stride(2), SIZE=16)
    assert meter.loaded("x") == 16 * 2
    assert meter.loaded("x").sectors == 16 * 32


@interpreted
def test_finds_a_read_past_the_end():
    q, k, out = _tensors(torch.bfloat16)
    with pytest.raises(
        InterpreterError, match=r"_rows_kernel, program \(2, 0, 0\): K load of 16 of 224 elements outside"
    ):
        with Meter():
            _launch(q, k[:, :N], out, slip=1)


@interpreted
def test_finds_a_read_of_the_neighbour_in_a_packed_buffer():
    """Every address is valid memory, and even part of another argument: only the pointer's origin tells."""
    packed = torch.randn(B, 2, N, D)
    k, neighbour, out = packed[:, 0], packed[:, 1], torch.empty(B, N)
    _launch(neighbour[:, 0], k, out, slip=1)
    with pytest.raises(InterpreterError, match=r"program \(0, 0, 0\): K load"):
        with Meter(key=k, neighbour=neighbour):
            _launch(neighbour[:, 0].contiguous(), k, out, slip=1)


@interpreted
def test_a_slice_counts_for_the_tensor_it_is_of():
    q, k, out = _tensors(torch.float32)
    longer = torch.randn(B, N + 4, D)
    with Meter(key=longer) as meter:
        _launch(q, longer[:, 2 : 2 + N], out)
    assert meter.loaded("key") == B * N * D * 4


@interpreted
def test_an_expanded_tensor_is_read_again():
    q, k, out = _tensors(torch.float32)
    with Meter(key=k) as meter:
        _launch(q, k[:1].expand(B, N, D), out)
    assert meter.loaded("key").once == N * D * 4
    assert meter.loaded("key") == B * N * D * 4


@triton.jit
def _descriptor_kernel(X, OUT, ROWS, D: tl.constexpr, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(X, [ROWS, D], [D, 1], [BLOCK, D])
    target = tl.make_tensor_descriptor(OUT, [ROWS, D], [D, 1], [BLOCK, D])
    row = tl.program_id(0) * BLOCK
    target.store([row, 0], source.load([row, 0]))


@interpreted
def test_counts_tensor_descriptors():
    x, out = torch.randn(N, D, dtype=torch.bfloat16), torch.empty(N, D, dtype=torch.bfloat16)
    with Meter(x=x) as meter:
        _descriptor_kernel[(2,)](x, out, N, D=D, BLOCK=8)
    assert torch.equal(out, x)
    assert meter.loaded("x") == x.nbytes
    assert meter.stored("OUT") == x.nbytes


class Operand(NamedTuple):
    X: torch.Tensor
    stride: int


class Side(NamedTuple):
    key: Operand
    out: Operand


@triton.jit
def _nested_kernel(side, SLIP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    n = tl.arange(0, BN)
    x = tl.load(side.key.X + n * side.key.stride, mask=n < N + SLIP, other=0.0)
    tl.store(side.out.X + n * side.out.stride, x, mask=n < N)


@interpreted
def test_counts_tensors_inside_named_tuples():
    x, out = torch.randn(N, 2), torch.empty(N)
    side = Side(Operand(x[:, 0], 2), Operand(out, 1))
    with Meter(x=x) as meter:
        _nested_kernel[(1,)](side, SLIP=0, N=N, BN=16)
    assert torch.equal(out, x[:, 0])
    assert meter.loaded("x") == meter.stored("side.out.X") == N * 4
    with pytest.raises(InterpreterError, match="side.key.X load of 1 of 14 elements outside"):
        with Meter(x=x):
            _nested_kernel[(1,)](side, SLIP=1, N=N, BN=16)


@triton.jit
def _atomic_kernel(X, FLAG, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(X + i // 2, 1.0, mask=tl.load(FLAG + i))


@interpreted
def test_counts_atomics_and_boolean_tensors():
    x, flag = torch.zeros(8), torch.arange(16) < 8
    with Meter(x=x, flag=flag) as meter:
        _atomic_kernel[(1,)](x, flag, N=16)
    assert x.sum() == 8
    assert meter.loaded("flag") == 16
    assert meter.loaded("x") == meter.stored("x") == 4 * 4


@interpreted
def test_leaves_triton_as_it_was():
    from triton.runtime import interpreter as triton_interpreter

    before = dict(vars(triton_interpreter.InterpreterBuilder)), triton_interpreter._implicit_cvt
    with Meter():
        pass
    assert (dict(vars(triton_interpreter.InterpreterBuilder)), triton_interpreter._implicit_cvt) == before


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="no launch had a tensor 'typo'"):
        Meter().loaded("typo")


# --- what the kernels promise -----------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("keys", [37, 577], ids=["whole rows", "split rows"])
@pytest.mark.parametrize("merge", [None, "logsum"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_move_little_more_than_they_must(keys, merge, dtype):
    call = Attention(1, keys, 3, 48, dtype, merge=merge, teacher_heads=3 if merge is None else 4, batch=2)
    forward, backward = measure(call)
    for side in ("student_key", "teacher_key"):
        assert forward["tensors"][side]["loaded"] == forward["tensors"][side]["loaded_once"]
        assert side not in backward["tensors"]
    assert forward["floor"] <= forward["moved"] < 1.2 * forward["floor"]
    assert backward["touched"] == backward["floor"]
    assert len(backward["launches"]) == 1


@interpreted
def test_rows_that_fit_a_tile_move_the_floor_and_nothing_else():
    forward, backward = measure(Attention(1, 197, 3, 64, "bfloat16", batch=2))
    assert forward["moved"] == forward["floor"]
    assert backward["moved"] < 1.02 * backward["floor"]


@interpreted
def test_a_row_beside_the_attention_adds_its_gradients_in_place(tmp_path):
    """One launch, which reads and writes the attention's own key gradient once and no key. In a process of its own: a gradient that anybody
    else may hold is not written, and other tests leave such holders behind."""
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "traffic",
        "--match",
        "beside",
        "--json",
        str(tmp_path / "traffic.json"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "traffic.json").read_text())["records"]
    assert len(records) == 4
    for record in records:
        most = (1.1 if "logsum" in record["call"] else 1.01) if record["pass"] == "forward" else 1.04
        assert record["floor"] <= record["moved"] < most * record["floor"], record
        if record["pass"] == "backward":
            assert record["launches"] == ["_row_kl_bwd_kernel"]
            assert not {"student_key", "teacher_key"} & set(record["tensors"])


@interpreted
def test_whole_maps_write_no_map():
    for record in measure(Attention(0, 150, 1, 32, "bfloat16", batch=1)):
        assert record["touched"] < 1.1 * record["floor"] < 150 * 150 * 4


@interpreted
def test_relation_rows_read_the_features_once_and_write_no_gram_matrix():
    forward, backward = measure(Relation(101, 96, 160, "bfloat16", batch=2))
    assert forward["touched"] < 1.01 * forward["floor"]
    assert backward["touched"] < 1.01 * backward["floor"]
    assert backward["tensors"]["student_features"]["loaded_once"] == 2 * 101 * 96 * 2
    assert "teacher_features" not in backward["tensors"]


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_keep_values_and_change_strides(layout, dtype):
    x = torch.randn(2, 3, 5, 24, dtype=dtype)
    y = lay_out(x, layout)
    first = {"expanded_batch": x[:1], "expanded_heads": x[:, :1]}.get(layout, x)
    assert torch.equal(y, first.expand_as(x))
    assert y.dtype == dtype
    strides = {
        "contiguous": (360, 120, 24, 1),
        "packed_qkv": (3 * 5 * 3 * 24, 24, 3 * 3 * 24, 1),
        "transposed": (360, 24, 72, 1),
        "expanded_batch": (0, 120, 24, 1),
        "expanded_heads": (120, 0, 24, 1),
    }
    assert y.stride() == strides.get(layout, y.stride())
    assert (layout == "contiguous") == y.is_contiguous()


def test_an_unknown_layout_is_an_error():
    with pytest.raises(ValueError, match="layout: expected one of contiguous"):
        lay_out(torch.zeros(1, 1, 1, 1), "typo")


def test_a_guarded_tensor_has_nan_for_neighbours():
    x = torch.randn(2, 3, 5, 8)
    y = guarded(x, band=2)
    assert torch.equal(x, y)
    everything = y.as_strided((y.untyped_storage().nbytes() // 4,), (1,), 0)
    assert int((~everything.isnan()).sum()) == x.numel()
    for step in (-1, 1, 8, -8):  # the elements beside a row, and those of a kernel that forgot the row stride
        offset = y.storage_offset() + step
        assert math.isnan(everything[offset]) or 0 < step < 8
    with pytest.raises(TypeError, match="has NaN, got torch.int64"):
        guarded(torch.zeros(3, dtype=torch.long))


def test_poisoned_memory_is_nan_and_the_mode_is_restored():
    assert not torch.are_deterministic_algorithms_enabled()
    with poisoned_empty():
        assert torch.empty(100).isnan().all()
        assert torch.empty(100, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda like: torch.empty(2, 3),
        lambda like: torch.empty_like(like),
        lambda like: like.new_empty((2, 3)),
        lambda like: torch.empty_strided((2, 3), (1, 2)),
    ],
)
@pytest.mark.parametrize("offset", [-1, 6])
def test_canaries_die_of_a_stray_write(allocate, offset):
    with canaries() as allocated:
        out = allocate(torch.zeros(2, 3))
        assert out.isnan().all()
        out.fill_(1.0)
    assert [tensor.data_ptr() for tensor in allocated] == [out.data_ptr()]
    side = "before" if offset < 0 else "after"
    with pytest.raises(AssertionError, match=rf"4 bytes {side} an output of shape \(2, 3\)"):
        with canaries():
            out = allocate(torch.zeros(2, 3))
            out.as_strided((1,), (1,), out.storage_offset() + offset).fill_(1.0)


def test_canaries_keep_strides_alignment_and_emptiness():
    like = torch.zeros(2, 3, 8, dtype=torch.bfloat16).transpose(0, 1)
    with canaries() as allocated:
        out = torch.empty_like(like)
        nothing = torch.empty(0)
    assert out.stride() == torch.empty_like(like).stride() and out.data_ptr() % 16 == 0
    assert nothing.numel() == 0 and len(allocated) == 1
