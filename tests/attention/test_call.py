"""The views of a captured call: what is left out of a comparison, and that queries, keys and mask leave together."""

import pytest
import torch

from attnkd import AttentionCall
from attnkd.attention.call import class_row, compared, shared_tokens, take_heads

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
