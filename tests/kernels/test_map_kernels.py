"""The whole-map kernels against the float64 oracle: outputs and every gradient.

In the interpreter, where every step of a tile costs the same however large it is, a tile is 64 queries × 32 keys, and a head wider
than 64 channels is multiplied 64 channels at a time and written 128 at a time. So the shapes here cross every boundary with few steps.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from attnkd import attention_divergence
from attnkd.attention import dispatch, reference
from attnkd.attention import fused_maps as ops_map
from attnkd.attention.problem import make_problem
from attnkd.testing.guard import canaries, guarded, lay_out, poisoned_empty
from attnkd.testing.proof import assert_proved, prove
from attnkd_kernels.map import tiles
from attnkd_kernels.map.tiles import pick_tile

DIVERGENCES = ("forward_kl", "reverse_kl", "js", "cross_entropy", "mse", "logit_mse")


@pytest.fixture(autouse=True, scope="module")
def _whole_maps_for_few_rows_too_in_few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MAX_ROWS", 0)
        patch.setattr(tiles, "_INTERPRETER", replace(tiles._INTERPRETER, chunk=64, out_columns=128))
        yield


def call(device, B=2, H=2, M=66, N=35, D=16, dtype=torch.float32, H_t=None, D_t=None, std=1.0, **extra):
    H_t, D_t = H_t or H, D_t or D
    shapes = {
        "student_query": (B, H, M, D), "student_key": (B, H, N, D),
        "teacher_query": (B, H_t, M, D_t), "teacher_key": (B, H_t, N, D_t),
    }  # fmt: skip
    return {n: (torch.randn(s) * std).to(device, dtype) for n, s in shapes.items()} | extra


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_per_head(device, divergence, dtype):
    size = {} if dtype == torch.float32 else {"B": 1, "M": 20}
    assert_proved("triton", **call(device, **size, D_t=24, dtype=dtype, divergence=divergence, temperature=1.7))


def test_heads_of_a_few_channels_more_than_64(device):
    """They are two tiles: 72 channels are 64 and half of 16, 80 are 64 and 16, 96 are 64 and 32."""
    for D, D_t, divergence in ((72, 96, "forward_kl"), (80, 64, "js")):
        assert_proved("triton", **call(device, B=1, M=20, D=D, D_t=D_t, divergence=divergence))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_wide_heads(device, divergence):
    """Log-sum merging: 3 heads of 48 make 144 channels, multiplied in chunks; the teacher's 4 of 16 fit one."""
    assert_proved(
        "triton", **call(device, B=1, H=3, H_t=4, D=48, D_t=16, divergence=divergence, merge="logsum", temperature=4.0)
    )
    bfloat16 = call(device, B=1, H=5, H_t=2, D=16, D_t=80, dtype=torch.bfloat16, divergence=divergence, merge="logsum")
    assert_proved("triton", **bfloat16)


@pytest.mark.parametrize("divergence", DIVERGENCES[:-1])
def test_mean_of_heads(device, divergence):
    """One student head against the teacher's mean, and the mean of both."""
    common = {"B": 1, "divergence": divergence, "merge": "mean"}
    for H, D, M, N in ((1, 16, 66, 20), (2, 80, 20, 40)):  # queries cross a tile, keys do
        assert_proved("triton", **call(device, **common, H=H, H_t=3, D=D, M=M, N=N, temperature=1.7))
    assert_proved("triton", **call(device, **common, H=1, H_t=2, M=20, dtype=torch.bfloat16))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masks_and_dead_rows(device, divergence):
    """Different boolean masks on both sides, rows dead on one side or both, padded keys, a padded query row."""
    arguments = call(device, H=1, divergence=divergence)
    student = torch.rand(2, 1, 66, 35, device=device) > 0.3
    teacher = student & (torch.rand(2, 1, 66, 35, device=device) > 0.2)
    student[:, :, 3], teacher[:, :, 3] = False, False
    student[:, :, 5], teacher[:, :, 5] = False, True
    student[:, :, 7], teacher[:, :, 7] = True, False
    assert_proved("triton", **arguments, student_mask=student, teacher_mask=teacher)
    padded = torch.arange(35, device=device) < torch.tensor([20, 35], device=device).view(2, 1, 1, 1)
    rows = (torch.arange(66, device=device) != 9).view(66, 1)
    for merge in (None, "logsum", *([] if divergence == "logit_mse" else ["mean"])):
        if merge == "mean":  # every head takes part in every gradient: fewer rows
            arguments, rows = call(device, M=20, divergence=divergence), rows[:20]
        merged = arguments | {"student_mask": padded & rows, "teacher_mask": padded, "merge": merge}
        assert_proved("triton", **merged)
        merged |= {"student_mask": padded}
        loss = attention_divergence(**merged, reduction="none", impl="triton")
        arguments["student_key"][0, :, 20:] *= 3.0  # padding may hold anything
        arguments["teacher_key"][0, :, 20:] -= 5.0
        assert torch.equal(loss, attention_divergence(**merged, reduction="none", impl="triton"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_learnable_bias(device, divergence):
    """The bias gets its gradient, summed over what it was broadcast to, also where some of it hides keys."""
    hiding = torch.where(torch.rand(2, 1, 1, 35, device=device) > 0.2, 0.0, -torch.inf)
    shapes = [(1, 2, 66, 35), (2, 1, 1, 35)]
    if divergence == "logit_mse":  # a softmax does not feel what is added to a whole row: its gradient is rounding
        shapes = [(1, 2, 66, 35), (66, 1), (1, 1, 1, 1)]
    for shape in shapes:
        bias = torch.randn(shape, device=device)
        assert_proved(
            "triton", **call(device, divergence=divergence, temperature=2.0), student_mask=bias, teacher_mask=hiding
        )
    bias = torch.randn(1, 2, 66, 35, device=device)
    bias[:, 1, :, 4] = -torch.inf
    assert_proved("triton", **call(device, divergence=divergence, merge="logsum", H_t=3), student_mask=bias)
    if divergence != "logit_mse":
        bias = bias[:, :, :20]
        bias[:, 0, 7] = -torch.inf  # a row that one head cannot see at all
        other = torch.where(bias.isneginf(), bias, torch.randn(1, 2, 20, 35, device=device))
        averaged = call(device, M=20, divergence=divergence, merge="mean")
        assert_proved("triton", **averaged, student_mask=bias, teacher_mask=other)
        assert_proved("triton", **averaged, student_mask=bias[:, 1:, :1].nan_to_num(neginf=0.0))


@pytest.mark.parametrize("merge", ["logsum", "mean"])
def test_biases_of_models_with_different_heads(device, merge):
    M = 66 if merge == "logsum" else 20
    for H, H_t in ((1, 4), (3, 2)):
        biases = {"student_mask": torch.randn(H, M, 35), "teacher_mask": torch.randn(2, H_t, 1, 35)}
        biases = {name: bias.to(device) for name, bias in biases.items()}
        assert_proved("triton", **call(device, H=H, H_t=H_t, M=M), **biases, merge=merge, temperature=1.7)


def test_bias_gradient_has_the_size_of_the_bias(device, monkeypatch):
    """No [B, H, M, N] buffer: nothing as large is allocated inside the backward op."""
    sizes = []
    empty = torch.empty

    def spy(*size, **options):
        out = empty(*size, **options)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(ops_map, "num_processors", lambda device: 1)  # more take a share each, 4096 entries at most
    arguments = call(device, B=5, H=3, M=40, N=40)
    bias = torch.randn(1, 3, 40, 40, device=device, requires_grad=True)
    loss = attention_divergence(**arguments, student_mask=bias, impl="triton")
    monkeypatch.setattr(torch, "empty", spy)
    loss.backward()
    assert sizes and max(sizes) <= bias.numel() and bias.grad.shape == bias.shape


@pytest.mark.parametrize("merge", [None, "logsum", "mean"])
def test_layouts_and_bounds(device, merge):
    """Every layout without a copy; nothing read beyond the inputs, nothing written beyond the outputs, nothing left unwritten."""
    for student, teacher in (
        ("packed_qkv", "transposed"),
        ("padded_dim", "expanded_batch"),
        ("expanded_heads", "guarded"),
    ):
        arguments = call(device, D=24, D_t=16, M=33, N=37)
        for name in arguments:
            arguments[name] = lay_out(arguments[name], student if "student" in name else teacher)
        assert_proved("triton", **arguments, merge=merge)
    problem = make_problem(
        *(guarded(x) for x in call(device, D=24, M=33, N=37).values()), *[None] * 5, merge, "js", 1.0
    )
    problem.student.query.requires_grad_(), problem.student.key.requires_grad_()
    with canaries() as outputs, poisoned_empty():
        loss = ops_map.per_row(problem)
        grads = torch.autograd.grad(loss.sum(), (problem.student.query, problem.student.key))
    assert outputs and all(x.isfinite().all() for x in (loss, *grads))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extremes(device, divergence):
    """Logits of ±1e4, a teacher next to its student, one key, one row, no images."""
    arguments = call(device, H=1, B=1, divergence=divergence)
    arguments["student_query"] *= 1e4
    arguments["teacher_query"] *= 1e4
    loss = prove("triton", **arguments)[0]
    assert loss.ok, loss
    near = call(device, H=1, divergence=divergence)
    near["teacher_query"] = near["student_query"] + 1e-2 * torch.randn_like(near["student_query"])
    near["teacher_key"] = near["student_key"].clone()
    assert_proved("triton", **near)
    for shape in ({"N": 1}, {"M": 1}, {"M": 1, "N": 1}):
        assert_proved("triton", **call(device, **shape, divergence=divergence))
    none = call(device, B=0)
    none["student_query"].requires_grad_()
    loss = attention_divergence(**none, divergence=divergence, reduction="none", impl="triton")
    assert loss.shape == (0, 2, 66)
    assert torch.autograd.grad(loss.sum(), none["student_query"])[0].shape == none["student_query"].shape


@pytest.mark.parametrize("merge", [None, "logsum", "mean"])
def test_impossible_and_nan_are_never_hidden(device, merge):
    """+inf where the teacher attends to a key that the student may not see; NaN in, NaN out, in that image alone."""
    for divergence in DIVERGENCES if merge is None else ("forward_kl", "js"):
        arguments = call(device, H=1, merge=merge, divergence=divergence, reduction="none", impl="triton")
        student = torch.zeros(35, device=device)
        student[3] = -torch.inf
        hidden = attention_divergence(**arguments, student_mask=student)
        assert hidden.isinf().all() if divergence in ("forward_kl", "cross_entropy") else hidden.isfinite().all()
        for mask in (None, torch.ones(35, dtype=torch.bool, device=device)):
            for name in ("teacher_query", "student_key"):
                broken = arguments | {name: arguments[name].clone(), "student_mask": mask, "teacher_mask": mask}
                broken[name][0, 0, 0] = torch.nan
                loss = attention_divergence(**broken)
                assert loss[0, 0, 0].isnan() and loss[1].isfinite().all(), (divergence, name)


def test_negative_and_zero_scales(device):
    for student, teacher in ((-0.3, 0.25), (0.25, 0.0)):
        assert_proved("triton", **call(device), student_scale=student, teacher_scale=teacher)


def test_relations_of_values(device):
    """The same tensor as query and key, as in (q, q), (k, k), (v, v) relations: both gradients land on it."""
    x, y = torch.randn(2, 2, 40, 16, device=device), torch.randn(2, 2, 40, 24, device=device)
    grads = []
    for impl in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        loss = attention_divergence(leaf, leaf, y, y, impl=impl)
        grads.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


def test_offsets_beyond_32_bits(device):
    """A mask whose rows lie 2³¹ + 5 bytes apart, as in a map of more than 2³¹ entries."""
    step = 2**31 + 5
    mask = torch.empty(step + 35, dtype=torch.bool, device=device).as_strided((2, 35), (step, 1))
    mask.copy_(torch.rand(2, 35) > 0.5)
    arguments = call(device, B=1, M=2)
    near = mask.clone()
    for side in ("student_mask", "teacher_mask"):
        losses = [
            attention_divergence(**arguments, **{side: m}, divergence="js", reduction="none", impl="triton")
            for m in (mask, near)
        ]
        assert torch.equal(*losses)


def test_sixteen_thousand_keys(device, monkeypatch):
    monkeypatch.setattr(tiles, "_INTERPRETER", replace(tiles._INTERPRETER, streams=1024, narrow=1024))
    for divergence in ("forward_kl", "mse"):
        assert_proved("triton", **call(device, B=1, H=1, M=17, N=16384, divergence=divergence))


def test_pairing_heads_by_views(device):
    """Student head 0 against teacher head 3, head 1 against head 1: slices, no copies."""
    arguments = call(device, H=4)
    pick = {
        "student_query": slice(0, 2),
        "student_key": slice(0, 2),
        "teacher_query": slice(1, 4, 2),
        "teacher_key": slice(1, 4, 2),
    }
    assert_proved("triton", **{name: arguments[name][:, heads] for name, heads in pick.items()})


def test_row_weights_and_stride_0_upstream(device):
    """Weights are the upstream gradient; an expanded one is read where it lies."""
    arguments = call(device)
    problem = make_problem(*arguments.values(), *[None] * 5, None, "forward_kl", 1.0)
    leaves = problem.student.query.requires_grad_(), problem.student.key.requires_grad_()
    for upstream in (
        torch.rand(2, 1, 1, device=device).expand(2, 2, 66),
        torch.ones((), device=device).expand(2, 2, 66),
    ):
        got = torch.autograd.grad(ops_map.per_row(problem), leaves, upstream)
        want = torch.autograd.grad(reference.per_row(problem), leaves, upstream)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("merge", [None, "logsum", "mean"])
def test_deterministic(device, merge):
    """Bitwise equal twice, the bias gradient included: no atomics anywhere."""
    runs = []
    arguments = call(device, dtype=torch.bfloat16)
    bias = torch.randn(1, 1, 66, 35, device=device)
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (arguments["student_query"], arguments["student_key"], bias)]
        given = arguments | dict(zip(("student_query", "student_key", "student_mask"), leaves, strict=True))
        loss = attention_divergence(**given, merge=merge, impl="triton")
        runs.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_every_problem_has_a_tile():
    kernels = ("normaliser", "value", "unit", "dq", "dk", "bias")
    arches = ("cpu", "sm80", "sm90", "sm100", "sm120", "gfx942")
    dtypes, widths = (torch.float16, torch.bfloat16, torch.float32), (16, 64, 72, 128, 144, 1024)
    for mean in (False, True):
        unused = ("normaliser", "unit") if mean else ()  # each head has a normaliser of its own; no unit gradient
        every = itertools.product([k for k in kernels if k not in unused], arches, dtypes, widths, range(4))
        for kernel, arch, dtype, width, extras in every:
            if kernel == "bias" and extras < 2:
                continue  # its mask is an additive one
            tile = pick_tile(kernel, arch, dtype, width, extras, mean)
            asked = (kernel, arch, dtype, width, extras, mean)
            assert tile.stays * tile.streams * tile.narrow and tile.columns(width) >= 16, asked


def test_refusals_name_the_alternative(device):
    rows = torch.ones(2, 2, 66, 35, device=device)
    problem = make_problem(*call(device).values(), *[None] * 5, "max", "mse", 1.0)
    with pytest.raises(NotImplementedError, match="chunked"):
        ops_map.per_row(problem)
    arguments = call(device)
    given = make_problem(
        arguments["student_query"], arguments["student_key"], None, None, rows, *[None] * 4, None, "mse", 1.0
    )
    with pytest.raises(NotImplementedError, match="chunked"):
        ops_map.per_row(given)


def test_inside_pytorch(device):
    """opcheck; fullgraph compile; non-reentrant checkpointing; a second derivative raises."""
    arguments = call(device, M=20, N=20)
    inputs = (arguments["student_query"], arguments["student_key"], torch.randn(1, 2, 20, 20, device=device), 0.25)
    inputs += (arguments["teacher_query"], arguments["teacher_key"], None, 0.25)
    for options in ((None, "mse", 1.0), ("logsum", "js", 2.0)):
        loss, *saved = ops_map._fwd(*inputs, *options, None, None, True)
        torch.library.opcheck(ops_map._fwd, (*inputs, *options, None, None, True))
        torch.library.opcheck(ops_map._bwd, (loss, *inputs, *options, *saved, True, True, True))
        torch.library.opcheck(ops_map._bwd, (loss, *inputs, *options, *saved, False, True, False))

    bias = torch.randn(2, 20, 20, device=device)

    def function(q, k, bias):
        loss = attention_divergence(q * 1.0, k * 1.0, *list(arguments.values())[2:], student_mask=bias, impl="triton")
        return loss

    def run(f):
        leaves = [x.clone().requires_grad_() for x in (arguments["student_query"], arguments["student_key"], bias)]
        loss = f(*leaves)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    want = run(function)
    for f in (compiled, lambda *x: checkpoint(function, *x, use_reentrant=False)):
        for a, b in zip(run(f), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    q = arguments["student_query"].clone().requires_grad_()
    first = torch.autograd.grad(function(q, arguments["student_key"], bias), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    B=st.integers(1, 2), H=st.integers(1, 3), M=st.integers(1, 70), N=st.sampled_from([1, 2, 31, 32, 33, 61]),
    D=st.sampled_from([1, 7, 16, 40, 48, 72, 80, 88, 96, 104, 112]), H_t=st.integers(1, 3), D_t=st.sampled_from([5, 16, 64]),
    merge=st.sampled_from([None, "logsum", "mean"]), divergence=st.sampled_from(DIVERGENCES[:-1]),
    temperature=st.floats(0.3, 10), biases=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(device, B, H, M, N, D, H_t, D_t, merge, divergence, temperature, biases, seed):
    torch.manual_seed(seed)
    H_t = H if merge is None else H_t
    if merge == "mean":  # every head takes part in every gradient
        B, M = 1, min(M, 40)
    arguments = call(device, B, H, M, N, D, H_t=H_t, D_t=D_t)
    if biases:
        arguments |= {
            "student_mask": torch.randn(H, M, N).to(device),
            "teacher_mask": torch.randn(H_t, 1, N).to(device),
        }
    assert_proved("triton", **arguments, seed=seed, merge=merge, divergence=divergence, temperature=temperature)
