"""The views of a captured call: what is left out of a comparison, and that queries, keys and mask leave together."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from attnkd import AttentionCall, attention_divergence, attention_rows
from attnkd.attention.call import class_row, compared, first_rows, shared_tokens, take_heads

MASKS = [(1, 3, 21, 21), (2, 1, 1, 21), (2, 1, 21, 1), (21, 21), (21,), (1,), None]
KEEP = [0, *range(5, 21)]


def call(mask_shape=None, N=21, M=None, **tokens):
    mask = None if mask_shape is None else torch.randn(mask_shape)
    return AttentionCall(torch.randn(2, 3, M or N, 8), torch.randn(2, 3, N, 8), mask, 0.5, **tokens)


def logits(call):
    return call.query @ call.key.mT * call.scale + (0.0 if call.mask is None else call.mask)


@pytest.mark.parametrize("mask_shape", MASKS)
def test_every_view_is_a_part_of_the_same_scores(mask_shape):
    whole = call(mask_shape, num_prefix_tokens=5, has_cls=True, grid=(4, 4))
    z = logits(whole)
    close = torch.testing.assert_close
    row = class_row(whole)
    close(logits(row), z[:, :, :1, KEEP])
    assert (row.num_prefix_tokens, row.has_cls, row.grid) == (1, True, (4, 4))
    close(logits(class_row(call()._replace(query=whole.query, key=whole.key, mask=whole.mask), 5)), z[:, :, :1, KEEP])
    close(logits(shared_tokens(whole, True)), z[:, :, KEEP][..., KEEP])
    patches = shared_tokens(whole, False)
    close(logits(patches), z[:, :, 5:, 5:])
    assert (patches.num_prefix_tokens, patches.has_cls) == (0, False)
    for heads in ((1,), (0, 2), (2, 0), (0, 1, 2)):
        close(
            logits(take_heads(whole, heads)), z[:, list(heads)] if mask_shape != (1,) else logits(whole)[:, list(heads)]
        )
    for again in (class_row(row), shared_tokens(row, True)):  # nothing is left out twice
        close(logits(again), logits(row))


def test_leaving_keys_out_is_the_conditional_distribution_and_costs_nothing_where_there_are_none():
    whole = call(num_prefix_tokens=5, has_cls=True)
    every = logits(whole).softmax(-1)[:, :, :1, KEEP]
    torch.testing.assert_close(logits(class_row(whole)).softmax(-1), every / every.sum(-1, keepdim=True))
    one = call((1, 3, 21, 21), num_prefix_tokens=1, has_cls=True)
    assert class_row(one).key is one.key and shared_tokens(one, True).query is one.query
    one_query = call(M=1, num_prefix_tokens=5, has_cls=True)  # class attention: only the class token asks
    assert shared_tokens(one_query, True).query is one_query.query


@pytest.mark.parametrize("prefix", [0, 22])
def test_prefix_tokens_that_cannot_be(prefix):
    with pytest.raises(ValueError, match=f"num_prefix_tokens: expected 1 .*to 21 .*got {prefix}"):
        class_row(call(), prefix)
    with pytest.raises(ValueError, match=f"num_prefix_tokens: expected 1 to 21 .*got {prefix}"):
        shared_tokens(call(num_prefix_tokens=prefix), True)
    with pytest.raises(ValueError, match="has no class token"):
        class_row(call(has_cls=False, num_prefix_tokens=4))


def test_two_calls_are_compared_over_what_both_have():
    a, b = (
        call(num_prefix_tokens=5, has_cls=True, grid=(4, 4)),
        call(N=17, num_prefix_tokens=1, has_cls=True, grid=(4, 4)),
    )
    no_cls = call(N=16, num_prefix_tokens=0, has_cls=False, grid=(4, 4))
    for other, tokens in ((b, 17), (no_cls, 16)):
        assert {x.key.shape[2] for x in compared("all", a=a, other=other)} == {tokens}
        assert {x.query.shape[2] for x in compared("all", a=a, other=other)} == {tokens}
    assert {x.key.shape[2] for x in compared("cls", a=a, b=b)} == {17}
    unknown = call()
    assert compared("all", unknown=unknown, a=a) == [unknown, a]  # nobody knows what could be left out
    assert compared("cls", unknown=unknown)[0].key.shape[2] == 21


def test_the_readmes_loop_on_a_teacher_with_a_position_bias(monkeypatch):
    """BEiT adds a learned bias to its scores. The loop compares the attention that the two models really have."""
    create = timm.create_model
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10}
    built = {
        "vit_tiny_patch16_224": lambda: create("vit_tiny_patch16_224", embed_dim=48, num_heads=3, **small),
        "vit_small_patch16_224": lambda: create("beit_base_patch16_224", embed_dim=96, num_heads=6, **small),
    }
    monkeypatch.setattr(timm, "create_model", lambda name, **_: built[name]())
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    example = next(part for part in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "AttentionTap" in part)
    names = {}

    class Loader:  # one batch, when the models are there
        def __iter__(self):
            bias = names["teacher"].blocks[-1].attn.relative_position_bias_table
            torch.nn.init.normal_(bias)
            yield torch.randn(2, 3, 32, 32), torch.tensor([1, 2])

    names["loader"] = Loader()
    exec(compile(example, "README.md", "exec"), names)

    def merged_row(model):  # the unfused attention, as it enters the model's own dropout
        seen = []
        attention = model.blocks[-1].attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            model(names["images"])
        return (seen[0][:, :, 0].log().sum(1) / 10).log_softmax(-1)

    student, teacher = merged_row(names["student"]), merged_row(names["teacher"])
    want = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    torch.testing.assert_close(names["attention"].detach(), want)
    without = names["t"]._replace(mask=None)
    wrong = attention_divergence(names["s"], without, rows="cls", merge="logsum", temperature=10, reduction="batchmean")
    assert not torch.allclose(wrong, want, rtol=1e-3), "the bias should matter, or nothing is tested"


def test_captured_calls_are_loose_tensors_with_everything_in_its_place():
    s = call((1, 3, 21, 21), num_prefix_tokens=5, has_cls=True)._replace(scale=0.7)
    t = call((2, 1, 17, 17), N=17, num_prefix_tokens=1, has_cls=True)._replace(scale=0.2)
    cuts = {
        "cls": class_row,
        "all": lambda x: shared_tokens(x, True),
        3: lambda x: first_rows(shared_tokens(x, True), 3),
    }
    for rows, cut in cuts.items():
        a, b = cut(s), cut(t)
        loose = {"student_scale": 0.7, "student_mask": a.mask}
        want = attention_divergence(a.query, a.key, b.query, b.key, **loose, teacher_scale=0.2, teacher_mask=b.mask)
        torch.testing.assert_close(attention_divergence(s, t, rows=rows), want, rtol=0, atol=0)
        probs = attention_rows(t, rows=rows)
        torch.testing.assert_close(probs, attention_rows(b.query, b.key, scale=0.2, mask=b.mask), rtol=0, atol=0)
        torch.testing.assert_close(attention_divergence(s, teacher_probs=probs, rows=rows), want)
    compiled = torch.compile(
        lambda s, t: attention_divergence(s, t, rows="cls", impl="chunked"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(s, t), attention_divergence(s, t, rows="cls", impl="chunked"))


REFUSED = {
    "two grids": (lambda s, t: ((s, t._replace(grid=(8, 2))), {}), "teacher: expected the patch grid 4x4 of the student, got 8x2.*resample_attention"),
    "two grids, class row": (lambda s, t: ((s, t._replace(grid=(8, 2))), {"rows": "cls"}), "teacher: expected the patch grid 4x4.*resample_attention"),
    "two counts": (lambda s, t: ((s, call(N=26, num_prefix_tokens=1, has_cls=True)), {}), "teacher_key: expected N = 17 keys.*resample_attention"),
    "no class token": (lambda s, t: ((s, t._replace(has_cls=False, num_prefix_tokens=0)), {"rows": "cls"}), "teacher: rows='cls' is the class token's row.*no class token"),
    "no class token in the student": (lambda s, t: ((s._replace(has_cls=False), t), {"rows": "cls"}), "student: rows='cls'.*no class token"),
    "rows": (lambda s, t: ((s, t), {"rows": 0}), "rows: expected 'all', 'cls' or a number of rows from 1 to 17, got 0"),
    "too many rows": (lambda s, t: ((s, t), {"rows": 18}), "rows: expected 'all', 'cls' or a number of rows from 1 to 17, got 18"),
    "rows by another name": (lambda s, t: ((s, t), {"rows": "class"}), "rows: expected 'all', 'cls' or a number of rows, got 'class'"),
    "rows of tensors": (lambda s, t: ((s.query, s.key, t.query, t.key), {"rows": "cls"}), r"rows: 'cls' is for captured calls.*query\[:, :, :1\]"),
    "no teacher": (lambda s, t: ((s,), {}), "teacher: expected an AttentionCall or teacher_probs, got neither"),
    "two teachers": (lambda s, t: ((s, t), {"teacher_probs": torch.rand(2, 3, 17, 17)}), "teacher: expected .* got both"),
    "a loose teacher": (lambda s, t: ((s, t.key), {}), "teacher: expected an AttentionCall beside the student's, got a tensor"),
    "a loose student": (lambda s, t: ((s.query, t), {}), r"student_key: expected a tensor \[B, H, N, D\], got AttentionCall"),
} | {
    name: (lambda s, t, name=name, value=value: ((s, t), {name: value}), rf"{name}: expected nothing beside a captured call.*call._replace\({hint}=")
    for name, value, hint in (
        ("student_scale", 0.5, "scale"), ("teacher_scale", 0.5, "scale"), ("student_mask", torch.zeros(17), "mask"),
        ("teacher_mask", torch.zeros(17), "mask"), ("teacher_query", torch.zeros(1), "query"), ("teacher_key", torch.zeros(1), "key"),
    )
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_do_not_belong_together(case):
    change, message = REFUSED[case]
    tokens = {"N": 17, "num_prefix_tokens": 1, "has_cls": True, "grid": (4, 4)}
    arguments, options = change(call(**tokens), call(**tokens))
    with pytest.raises((TypeError, ValueError), match=message):
        attention_divergence(*arguments, **options)


def test_rows_of_one_call_refuse_the_same():
    one = call(has_cls=False, num_prefix_tokens=0)
    with pytest.raises(ValueError, match="call: rows='cls' is the class token's row.*no class token"):
        attention_rows(one, rows="cls")
    with pytest.raises(ValueError, match="scale: expected nothing beside a captured call"):
        attention_rows(one, scale=0.5)
    with pytest.raises(ValueError, match="rows: 'cls' is for captured calls"):
        attention_rows(one.query, one.key, rows="cls")
