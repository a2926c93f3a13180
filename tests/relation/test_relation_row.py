"""The relation row: its kernels and plain implementation against the float64 definition, its errors, its bytes."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attnkd.relation import chunked, reference
from attnkd.relation.api import relation_row_loss
from attnkd.relation.fused import _relation_row_bwd, _relation_row_fwd
from attnkd.testing.guard import canaries, guarded
from attnkd.testing.tolerance import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def features(device, B=2, N=50, C=48, C_t=None, prefix=1, prefix_t=1, dtype=torch.float32):
    """Student [B, N, C] and a teacher with as many patches; patches lean towards the class token, as in a trained model."""
    made = []
    for channels, tokens in ((C, N), (C_t or C, N - prefix + prefix_t)):
        tokens = torch.randn(B, tokens, channels) + torch.randn(B, 1, channels)
        made.append(tokens.to(device, dtype))
    return made


def prove(impl, student, teacher, prefix=1, prefix_t=1, normalize_dim=-1):
    """Loss and gradient against float64; errors allowed as the definition's own in float32 and in the input's precision."""
    upstream = torch.randn(len(student), dtype=torch.float64).to(student.device)

    def define(inputs, precision):
        leaf = student.detach().to(inputs).requires_grad_()
        loss = reference.per_image(leaf, teacher.to(inputs), prefix, prefix_t, normalize_dim, precision)
        # float16 cannot hold gradients this small: scale them, as a loss scaler does
        return loss.detach(), torch.autograd.grad(loss, leaf, (upstream * scale).to(loss.dtype))[0]

    scale = 1.0
    scale = 2.0 ** -math.floor(math.log2(float(define(torch.float64, torch.float64)[1].abs().max())))
    oracle = define(torch.float64, torch.float64)
    eager = define(student.dtype, torch.float32)[0], define(student.dtype, student.dtype)[1]
    leaf = student.detach().requires_grad_()
    loss = relation_row_loss(
        leaf, teacher, student_prefix_tokens=prefix, teacher_prefix_tokens=prefix_t, normalize_dim=normalize_dim,
        reduction="none", impl=impl,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, leaf, (upstream * scale).to(loss.dtype))
    name = f"{impl} {tuple(student.shape)} {student.dtype}"
    assert_close(f"{name} loss", loss, oracle[0], eager[0].float(), scale=1.0)
    assert_close(f"{name} gradient", grad, oracle[1], eager[1])


def test_textbook(device):
    """Mean over patches of the squared difference of F.cosine_similarity; of F.normalize along tokens for the code's variant."""
    student, teacher = features(device, N=20, C_t=72)
    rows = [F.cosine_similarity(x[:, :1], x[:, 1:], dim=-1) for x in (student, teacher)]
    want = F.mse_loss(rows[0], rows[1])
    for impl in ("reference", "chunked", "triton"):
        torch.testing.assert_close(relation_row_loss(student, teacher, impl=impl), want)
    normal = [F.normalize(x, p=2, dim=1) for x in (student, teacher)]
    rows = [(x @ x.transpose(-2, -1))[:, 0, 1:] for x in normal]
    for impl in ("reference", "chunked"):
        torch.testing.assert_close(
            relation_row_loss(student, teacher, normalize_dim=-2, impl=impl), F.mse_loss(rows[0], rows[1])
        )
    per_image = (rows[0] - rows[1]).square().mean(1)
    for reduction, value in (("none", per_image), ("sum", per_image.sum())):
        torch.testing.assert_close(relation_row_loss(student, teacher, normalize_dim=-2, reduction=reduction), value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton(device, dtype):
    for C, C_t, N, prefix, prefix_t in ((192, 384, 50, 1, 1), (72, 200, 66, 2, 5), (384, 64, 140, 1, 2)):
        prove("triton", *features(device, 2, N, C, C_t, prefix, prefix_t, dtype), prefix, prefix_t)


@pytest.mark.parametrize("normalize_dim", [-1, -2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunked(device, dtype, normalize_dim, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 2 * 40 * 48)  # two images at a time, then one
    prove("chunked", *features(device, 3, 40, 48, 32, 2, 1, dtype), 2, 1, normalize_dim)


@pytest.mark.parametrize("normalize_dim", [-1, -2])
def test_chunked_in_float64(normalize_dim):
    student, teacher = (x.double() for x in features("cpu", C_t=20))
    runs = []
    for impl in ("chunked", "reference"):
        loss = relation_row_loss(
            student.requires_grad_(), teacher, normalize_dim=normalize_dim, reduction="none", impl=impl
        )
        runs.append((loss, *torch.autograd.grad(loss.sum(), student)))
    torch.testing.assert_close(*runs)  # float64 tolerances: 1e-7


def test_patches_split_over_programs(device, monkeypatch):
    """Few images and many patches: the class token's gradient is summed by a second launch."""
    from attnkd_kernels import launch

    monkeypatch.setattr(launch, "num_processors", lambda device: 8)
    prove("triton", *features(device, 1, 400, 64, prefix=3, prefix_t=1), 3, 1)


@pytest.mark.parametrize("N", [2, 3, 32, 33, 65])
def test_token_counts(device, N):
    prove("triton", *features(device, N=N, C=24))


def test_strides(device):
    """Views that a model or a user hands over: sliced tokens and channels, transposed, expanded, mixed dtypes."""
    student, teacher = features(device, 2, 40, 48, 64)
    packed = torch.randn(2, 40, 3, 48, device=device)
    layouts = {
        "guarded by NaN": guarded(student),
        "sliced from a packed projection": packed[:, :, 1],
        "channels first": torch.randn(2, 48, 40, device=device).mT,
        "batch second": torch.randn(40, 2, 48, device=device).transpose(0, 1),
        "every second channel": torch.randn(2, 40, 96, device=device)[..., ::2],
        "expanded batch": student[:1].expand(2, -1, -1),
    }
    for view in layouts.values():
        prove("triton", view, guarded(teacher))
        prove("chunked", view, guarded(teacher).bfloat16())
    prove("triton", student.bfloat16(), teacher)


@pytest.mark.parametrize("impl", ["triton", "chunked", "reference"])
def test_tokens_without_direction_are_worth_zero(device, impl):
    """Zero patches and zero class tokens: similarity 0, no gradient, and no harm to the other images."""
    student, teacher = features(device, 3, 20, 32)
    student[0, 3] = 0
    student[1, 0] = 0
    teacher[0, 5] = 0
    for normalize_dim in (-1, -2) if impl != "triton" else (-1,):
        student.requires_grad_()
        loss = relation_row_loss(student, teacher, normalize_dim=normalize_dim, reduction="none", impl=impl)
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all() and grad.isfinite().all()
        if normalize_dim == -1:
            rows = F.cosine_similarity(teacher[1, :1], teacher[1, 1:], dim=-1)
            torch.testing.assert_close(loss[1], rows.square().mean())
            assert not grad[0, 3].any() and not grad[1].any() and grad[0, 4].any() and grad[2].any()


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_nan_and_overflow_are_never_hidden(device, impl):
    for value in (torch.nan, torch.inf, 1e20):
        for which in (0, 1):
            pair = features(device, 2, 20, 32)
            pair[which][0, 7, 3] = value
            loss = relation_row_loss(*pair, reduction="none", impl=impl)
            assert loss[0].isnan() and loss[1].isfinite(), (value, which)


def test_every_output_element_is_written_and_nothing_else(device):
    student, teacher = features(device, 2, 70, 72, 40, 3, 1, torch.bfloat16)
    with canaries():
        loss, coef, b_0 = _relation_row_fwd(student, teacher, 3, 1, 1e-12, True)
        grad = _relation_row_bwd(torch.ones((), device=device).expand(2), coef, b_0, student, 3)
    assert all(x.isfinite().all() for x in (loss, coef, b_0, grad))
    assert not grad[:, 1:3].any()  # registers


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_deterministic(device, impl):
    student, teacher = features(device, 2, 100, 64, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        leaf = student.clone().requires_grad_()
        loss = relation_row_loss(leaf, teacher, impl=impl)
        runs.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted in the interpreter")
def test_features_are_read_once_and_the_gradient_written_once():
    """The floor, and beside it one token of re-read per program and 8 bytes of coefficients per patch."""
    from attnkd.testing.traffic import Meter

    B, N, C = 2, 1 + 4 * 32, 384  # enough for one split of the patches on the interpreter's one processor
    student, teacher = features("cpu", B, N, C, dtype=torch.bfloat16)
    student.requires_grad_()
    with Meter(student=student, teacher=teacher) as meter:
        loss = relation_row_loss(student, teacher, impl="triton")
    for name in ("student", "teacher"):
        assert meter.loaded(name).once == B * N * C * 2
        assert meter.loaded(name) == B * (N - 1 + 4) * C * 2
    with Meter(student=student) as meter:
        torch.autograd.grad(loss, student)
    assert meter.loaded("student") == B * N * C * 2 and meter.stored("DF.pointer") == B * N * C * 2
    assert meter.loaded("COEF") == B * (N - 1) * 8 * C // 128


def test_no_gradient_where_none_is_asked_for(device):
    student, teacher = features(device)
    teacher.requires_grad_()
    loss = relation_row_loss(student.requires_grad_(), teacher, impl="triton")
    loss.backward()
    assert teacher.grad is None
    with torch.no_grad():
        assert not relation_row_loss(student, teacher, impl="triton").requires_grad


def test_numbers_of_numpy_are_numbers(device):
    student, teacher = features(device)
    for impl in ("triton", "chunked", "reference"):
        found = relation_row_loss(
            student, teacher, student_prefix_tokens=np.int64(1), normalize_dim=np.int64(-1), impl=impl
        )
        torch.testing.assert_close(found, relation_row_loss(student, teacher, impl=impl), rtol=0, atol=0)


def test_empty_batch(device):
    for impl in ("triton", "chunked", "reference"):
        student, teacher = (x.requires_grad_() for x in features(device, B=0))
        loss = relation_row_loss(student, teacher, reduction="sum", impl=impl)
        assert loss == 0
        assert torch.autograd.grad(loss, student)[0].shape == student.shape
        with pytest.raises(ValueError, match="empty batch"):
            relation_row_loss(student, teacher, impl=impl)


def test_opcheck(device):
    student, teacher = features(device, C_t=64, prefix=2)
    coef, b_0 = torch.randn(2, 2, 48, device=device), torch.randn(2, 1, device=device)
    torch.library.opcheck(_relation_row_fwd, (student, teacher, 2, 1, 1e-12, True))
    torch.library.opcheck(_relation_row_fwd, (student, teacher.mT.contiguous().mT, 2, 1, 1e-12, False))
    torch.library.opcheck(_relation_row_bwd, (torch.randn(2, device=device), coef, b_0, student, 2))


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_compile_fullgraph(device, impl):
    def function(student, teacher):
        return relation_row_loss(student * 1.0, teacher, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (20, 70):
        student, teacher = features(device, N=N)
        student.requires_grad_()
        runs = [torch.autograd.grad(f(student, teacher), student)[0] for f in (compiled, function)]
        torch.testing.assert_close(*runs)


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_autocast_and_double_backward(device, impl):
    student, teacher = features(device, C=64, dtype=torch.float32)
    student.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):  # features come from the model; the row keeps float32
        loss = relation_row_loss(student, teacher, impl=impl)
    torch.testing.assert_close(loss, relation_row_loss(student, teacher, impl="reference"))
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_gradcheck_of_the_definition():
    student, teacher = (x.double() for x in features("cpu", 2, 6, 5))
    for normalize_dim in (-1, -2):
        assert torch.autograd.gradcheck(
            lambda s: relation_row_loss(s, teacher, normalize_dim=normalize_dim, reduction="none", impl="reference"),  # noqa: B023
            student.requires_grad_(),
        )


WRONG = {
    "not a tensor": (TypeError, "student_features: expected a tensor", lambda s, t: ((None, t), {})),
    "rank": (ValueError, "teacher_features: expected 3 dimensions", lambda s, t: ((s, t[0]), {})),
    "dtype": (TypeError, "student_features: expected a floating point", lambda s, t: ((s.long(), t), {})),
    "batch": (ValueError, "teacher_features: expected batch size B = 2", lambda s, t: ((s, t[:1]), {})),
    "patches": (ValueError, "teacher_features: expected 49 patch tokens.*different patch grids", lambda s, t: ((s, t[:, 1:]), {})),
    "no patches": (ValueError, "student_features: expected at least one patch", lambda s, t: ((s[:, :1], t), {})),
    "prefix": (ValueError, "teacher_prefix_tokens: expected an integer >= 1", lambda s, t: ((s, t), {"teacher_prefix_tokens": 0})),
    "normalize_dim": (ValueError, "normalize_dim: expected one of", lambda s, t: ((s, t), {"normalize_dim": 1})),
    "reduction": (ValueError, "reduction: expected one of", lambda s, t: ((s, t), {"reduction": "avg"})),
    "impl": (ValueError, "impl: expected one of", lambda s, t: ((s, t), {"impl": "cuda"})),
    "no kernel": (NotImplementedError, "normalize_dim=-2 has no fused kernel", lambda s, t: ((s, t), {"normalize_dim": -2, "impl": "triton"})),
    "float64": (NotImplementedError, "float64", lambda s, t: ((s, t.double()), {"impl": "triton"})),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case, device):
    error, message, change = WRONG[case]
    arguments, options = change(*features(device))
    with pytest.raises(error, match=message):
        relation_row_loss(*arguments, **options)
