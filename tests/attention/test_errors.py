"""Bad input: a clear error each, naming the argument, what was expected and what came."""

import pytest
import torch

from attnkd import attention_divergence, attention_rows, merge_attention

B, H, M, N, D = 2, 3, 1, 9, 8


def good(device="cpu"):
    return {
        "student_query": torch.randn(B, H, M, D, device=device),
        "student_key": torch.randn(B, H, N, D, device=device),
        "teacher_query": torch.randn(B, H, M, D, device=device),
        "teacher_key": torch.randn(B, H, N, D, device=device),
    }


BOOL = torch.ones(1, 1, 1, N, dtype=torch.bool)
CASES = {
    "rank": (
        {"student_query": torch.randn(B, M, D)},
        ValueError,
        r"student_query: expected 4 dimensions \[B, H, M, D\]",
    ),
    "not a tensor": ({"student_key": [1.0]}, TypeError, "student_key: expected a tensor .* got list"),
    "integer dtype": (
        {"student_query": torch.ones(B, H, M, D, dtype=torch.int64)},
        TypeError,
        "student_query: expected a floating point dtype .* got torch.int64",
    ),
    "mixed dtype": (
        {"student_key": torch.randn(B, H, N, D).half()},
        TypeError,
        "student_key: expected dtype torch.float32",
    ),
    "batch": ({"student_key": torch.randn(B + 1, H, N, D)}, ValueError, "student_key: expected batch size B = 2"),
    "heads": ({"student_key": torch.randn(B, 1, N, D)}, ValueError, "student_key: expected number of heads H = 3"),
    "head dim": (
        {"student_key": torch.randn(B, H, N, D + 1)},
        ValueError,
        "student_key: expected head dim D = 8 .* got 9",
    ),
    "no keys": ({"student_key": torch.randn(B, H, 0, D)}, ValueError, "number of keys N of at least 1"),
    "teacher batch": (
        {"teacher_query": torch.randn(1, H, M, D), "teacher_key": torch.randn(1, H, N, D)},
        ValueError,
        "teacher_query: expected batch size B = 2 like student_query, got 1",
    ),
    "teacher rows": (
        {"teacher_query": torch.randn(B, H, 2, D)},
        ValueError,
        "teacher_query: expected number of query rows",
    ),
    "teacher keys": (
        {"teacher_key": torch.randn(B, H, N + 7, D)},
        ValueError,
        "teacher_key: expected N = 9 keys like student_key, got N = 16; .*resample_attention",
    ),
    "teacher heads": (
        {"teacher_query": torch.randn(B, 6, M, D), "teacher_key": torch.randn(B, 6, N, D)},
        ValueError,
        "teacher_query: expected H = 3 heads like student_query, got H = 6; .*merge",
    ),
    "half a teacher": ({"teacher_key": None}, ValueError, "teacher_query, teacher_key: expected both"),
    "teacher twice": ({"teacher_probs": torch.rand(B, H, M, N)}, ValueError, "teacher_probs: expected alone"),
    "sparse": (
        {"student_query": torch.zeros(B, H, M, D).to_sparse()},
        TypeError,
        "student_query: expected a dense tensor .* sparse",
    ),
    "nested": (
        {"teacher_key": torch.nested.nested_tensor([torch.zeros(H, N, D)] * B)},
        TypeError,
        "teacher_key: expected a dense tensor .* nested",
    ),
    "temperature of another type": ({"temperature": True}, TypeError, "temperature: expected a number, got bool True"),
    "merge": ({"merge": "sum"}, ValueError, "merge: expected one of None, 'logsum'.* got 'sum'"),
    "divergence": ({"divergence": "kl"}, ValueError, "divergence: expected one of 'forward_kl'"),
    "logit mse of a merge": (
        {"divergence": "logit_mse", "merge": "mean"},
        ValueError,
        "divergence: 'logit_mse' has no scores",
    ),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: expected one of"),
    "impl": ({"impl": "cuda"}, ValueError, "impl: expected one of 'auto', 'triton'"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
    "scale": ({"teacher_scale": float("nan")}, ValueError, "teacher_scale: expected a finite number"),
    "mask shape": (
        {"student_mask": torch.zeros(5)},
        ValueError,
        r"student_mask: expected a shape that broadcasts .* got \(5,\)",
    ),
    "mask dtype": (
        {"student_mask": torch.ones(N, dtype=torch.int32)},
        TypeError,
        "student_mask: expected bool .*torch.int32",
    ),
    "mask type": ({"student_mask": 1}, TypeError, "student_mask: expected a tensor"),
    "merge, one mask": (
        {"merge": "logsum", "student_mask": BOOL},
        ValueError,
        "teacher_mask: expected a boolean mask on both sides when heads are merged",
    ),
    "merge, a mask a head": (
        {"merge": "mean", "student_mask": torch.ones(B, H, M, N, dtype=torch.bool), "teacher_mask": BOOL},
        ValueError,
        "student_mask: expected one boolean mask for all heads",
    ),
    "row_weight shape": (
        {"row_weight": torch.ones(5)},
        ValueError,
        r"row_weight: expected a shape that broadcasts to \[B, H, M\]",
    ),
    "row_weight dtype": (
        {"row_weight": torch.ones(1, dtype=torch.int64)},
        TypeError,
        "row_weight: expected a floating point",
    ),
    "device": ({"teacher_key": torch.empty(B, H, N, D, device="meta")}, ValueError, "teacher_key: expected device cpu"),
    "mask device": (
        {"student_mask": torch.empty(N, device="meta")},
        ValueError,
        "student_mask: expected device cpu .* meta",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_divergence_refuses(name):
    """Also behind good calls: checks are made once for all calls of a kind, and no error is remembered."""
    change, error, message = CASES[name]
    for _ in range(2):
        attention_divergence(**good())
        with pytest.raises(error, match=message):
            attention_divergence(**(good() | change))


@pytest.mark.parametrize("impl", ["auto", "chunked", "triton"])
def test_gradients_by_torch_func_are_for_the_reference(impl):
    arguments = good()
    query = arguments.pop("student_query")

    def loss(query, impl):
        return attention_divergence(query, **arguments, reduction="sum", impl=impl)

    loss(query, impl)  # a good call of the same shapes before
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match=f"impl='{impl}': gradients by torch.func .* impl='reference'"):
            transform(loss)(query, impl)
    leaf = query.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, "chunked"), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(query, "reference"), grad)


def test_finished_rows_have_no_scale():
    q, k = torch.randn(B, H, M, D), torch.randn(B, H, N, D)
    with pytest.raises(ValueError, match="teacher_probs: expected alone, .* teacher_scale"):
        attention_divergence(q, k, teacher_probs=torch.rand(B, H, M, N), teacher_scale=0.5)


def test_target_rows_must_have_the_merged_shape():
    q, k = torch.randn(B, H, M, D), torch.randn(B, H, N, D)
    with pytest.raises(ValueError, match=r"teacher_probs: expected shape \(2, 3, 1, 9\)"):
        attention_divergence(q, k, teacher_probs=torch.rand(B, H, M, N + 1))
    with pytest.raises(ValueError, match="merge the teacher's heads first with merge_attention"):
        attention_divergence(q, k, teacher_probs=torch.rand(B, H, M, N), merge="logsum")
    with pytest.raises(ValueError, match="'logit_mse' compares scores before the softmax"):
        attention_divergence(q, k, teacher_probs=torch.rand(B, H, M, N), divergence="logit_mse")


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_no_mean_of_an_empty_batch(reduction, device):
    empty = {name: tensor[:0] for name, tensor in good(device).items()}
    with pytest.raises(ValueError, match=f"reduction: '{reduction}' of an empty batch is undefined"):
        attention_divergence(**empty, reduction=reduction)
    for impl in ("reference", "chunked", "triton"):
        assert attention_divergence(**empty, reduction="sum", impl=impl) == 0
        assert attention_divergence(**empty, reduction="none", impl=impl).shape == (0, H, M)


def test_an_explicit_impl_never_falls_back(device):
    double = {name: tensor.double() for name, tensor in good(device).items()}
    with pytest.raises(NotImplementedError, match="impl='triton': float64 is not supported"):
        attention_divergence(**double, impl="triton")
    with pytest.raises(NotImplementedError, match="impl='triton': float64 is not supported"):
        attention_rows(double["student_query"], double["student_key"], impl="triton")
    rows = torch.randn(B, H, 40, D, device=device)
    many = good(device) | {"student_query": rows, "teacher_query": rows}
    with pytest.raises(NotImplementedError, match="impl='triton': merge='max' of whole maps has no fused kernel"):
        attention_divergence(**many, merge="max", impl="triton")
    wide = {name: torch.randn(1, 20, tensor.shape[2], 128, device=device) for name, tensor in good(device).items()}
    with pytest.raises(NotImplementedError, match="impl='triton': a head of 2560 dims"):
        attention_divergence(**wide, merge="logsum", impl="triton")


def test_attention_rows_and_merge_attention_refuse():
    q, k = torch.randn(B, H, M, D), torch.randn(B, H, N, D)
    with pytest.raises(ValueError, match="key: expected head dim D = 8 like query, got 4"):
        attention_rows(q, k[..., :4])
    with pytest.raises(ValueError, match="merge: expected one of"):
        attention_rows(q, k, merge="sum")
    with pytest.raises(ValueError, match="merge: expected one of 'logsum', 'mean', 'max', 'min', got None"):
        merge_attention(torch.rand(B, H, M, N), None)
    with pytest.raises(ValueError, match="probs: expected 4 dimensions"):
        merge_attention(torch.rand(B, H, N), "mean")


def test_equal_options_of_other_types_are_not_the_same_call():
    arguments = good()
    for scale in (1.0, 1):
        attention_divergence(**arguments, temperature=1.0, student_scale=scale)
        attention_rows(arguments["student_query"], arguments["student_key"], scale=scale)
    for name, value in (
        ("temperature", True),
        ("student_scale", True),
        ("temperature", torch.tensor(1.0)),
        ("merge", 0),
    ):
        with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
            attention_divergence(**arguments, **{name: value})
    with pytest.raises(TypeError, match="scale: expected"):
        attention_rows(arguments["student_query"], arguments["student_key"], scale=True)


def test_what_a_transform_left_counts_as_its_value():
    """Outside of the transform nothing is transformed: the reference says the same."""
    arguments, left = good(), []
    query, key = arguments.pop("student_query"), arguments.pop("student_key").requires_grad_()
    torch.func.grad(lambda q: (left.append(q), q.sum())[1])(query)
    torch.func.jvp(lambda q: (left.append(q), q.sum())[1], (query,), (query,))
    for one in left:
        losses = [attention_divergence(one, key, **arguments, impl=impl) for impl in ("chunked", "reference")]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, key)[0] for loss in losses))
