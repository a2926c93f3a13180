"""One captured attention call, and the views that a comparison takes of it: some heads, the class token's row, shared tokens.

The only place that cuts rows, heads and tokens out of a call: queries, keys, mask and normalisers always go together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnkd.attention.checks import integer

Heads = tuple[int, ...]
ROWS = ("all", "cls")


class AttentionCall(NamedTuple):
    """What one call of ``scaled_dot_product_attention`` put into its softmax: scale · query · keyᵀ + mask.

    An :class:`attnkd.AttentionTap` returns them. ``num_prefix_tokens``, ``has_cls`` and ``grid`` say which tokens the N keys of *this* call are: in a
    block that runs before the class token is added, there are no prefix tokens and no class token. None: unknown; then
    nothing is left out, and token 0 is taken for the class token where one is asked for.
    """

    query: Tensor
    """[B, H, M, D], with the autograd graph of the model."""
    key: Tensor
    """[B, H, N, D]."""
    mask: Tensor | None
    """Broadcasts to [B, H, M, N]; boolean (True = visible) or additive, such as a relative position bias."""
    scale: float
    num_prefix_tokens: int | None = None
    """Tokens before the first patch: class token, distillation token, registers. The other N − num_prefix_tokens are patches."""
    has_cls: bool | None = None
    """Whether token 0 is a class token."""
    grid: tuple[int, int] | None = None
    """(height, width) in patches, height · width of them in row-major order; None where they form no grid (patch dropout)."""
    lse: Tensor | None = None
    """[B, H, M] float32: log Σ_j exp(scale · query · key_j + mask_j), −inf where no key is visible, as the attention itself computed
    it; None: unknown. It saves a whole-map loss a sweep over the keys. To be left out where anything above is replaced."""
    first_row: tuple[Tensor, Tensor] | None = None
    """(query, its first row [B, H, 1, D]): a row that sends its gradient back alone, for as long as ``query`` is that very tensor."""
    value: Tensor | None = None
    """[B, H, N, Dv], where the tap was asked for it. Views of some heads or keys leave it out."""


def take_heads(call: AttentionCall, heads: Heads) -> AttentionCall:
    """The call of some heads: views where the heads follow each other, else copies of these heads."""
    if heads == tuple(range(call.query.shape[1])):
        return call
    neighbours = heads == tuple(range(heads[0], heads[0] + len(heads)))

    def take(tensor: Tensor, dim: int) -> Tensor:
        if neighbours:
            return tensor.narrow(dim, heads[0], len(heads))
        # Not tensor[:, [1, 4]]: the list would be copied to the GPU, and the host would wait for it.
        return torch.stack([tensor.select(dim, head) for head in heads], dim)

    mask = call.mask
    if mask is not None and mask.ndim >= 3 and mask.shape[-3] != 1:
        mask = take(mask, -3)
    lse = None if call.lse is None else take(call.lse, 1)
    return call._replace(query=take(call.query, 1), key=take(call.key, 1), mask=mask, lse=lse, value=None)


def class_row(call: AttentionCall, num_prefix_tokens: int | None = None) -> AttentionCall:
    """The class token's query [B, H, 1, D] with the keys [B, H, 1 + patches, D] that models share.

    Args:
        call: query row 0 and key 0 are the class token's.
        num_prefix_tokens: in place of the call's own; with None in both, all keys stay.

    Raises:
        ValueError: no class token, or fewer keys than prefix tokens.
    """
    prefix = call.num_prefix_tokens if num_prefix_tokens is None else num_prefix_tokens
    if call.has_cls is False:
        raise ValueError("has_cls: expected a class token at token 0, but this attention has no class token")
    if prefix is not None and not 1 <= prefix <= call.key.shape[2]:
        raise ValueError(
            f"num_prefix_tokens: expected 1 (the class token) to {call.key.shape[2]} (all keys), got {prefix}"
        )
    row = first_rows(call, 1)
    if call.first_row is not None and call.first_row[0] is call.query:  # else of no tap, or replaced by the caller
        row = row._replace(query=call.first_row[1])
    return row if prefix is None else _leave_out(row, prefix, True, rows=False)


def shared_tokens(call: AttentionCall, keep_cls: bool, num_prefix_tokens: int | None = None) -> AttentionCall:
    """The patches, and the class token with ``keep_cls``: what two models share. Keys, and rows where every token has one.

    Registers, distillation tokens and a class token of one model alone are left out before the softmax: what remains is
    the distribution conditional on the shared keys. Copies, except where nothing or the first tokens are left out.

    Args:
        call: its tokens are [class token?, other prefix tokens, patches].
        keep_cls: the class token is compared too; then token 0 must be one.
        num_prefix_tokens: in place of the call's own.
    """
    prefix = call.num_prefix_tokens if num_prefix_tokens is None else num_prefix_tokens
    if prefix is None or not int(keep_cls) <= prefix <= call.key.shape[2]:
        raise ValueError(f"num_prefix_tokens: expected {int(keep_cls)} to {call.key.shape[2]} (all keys), got {prefix}")
    return _leave_out(call, prefix, keep_cls, rows=call.query.shape[2] == call.key.shape[2])


def compared(rows: str | int, **calls: AttentionCall) -> list[AttentionCall]:
    """The rows and keys that a comparison is about, of each of one or two calls.

    Args:
        rows: 'cls', the class token's row; 'all', the rows of all tokens that every call has; or a number n, the first n of those.
        calls: as captured, under the names that a message gives them.

    Raises:
        ValueError: no class token where its row is asked for, more rows than there are, or two different patch grids.
    """
    count = integer(rows)
    if count is None and not (isinstance(rows, str) and rows in ROWS):
        raise ValueError(f"rows: expected 'all', 'cls' or a number of rows, got {rows!r}")
    grids = {name: call.grid for name, call in calls.items() if call.grid is not None}
    if len(set(grids.values())) > 1:
        (first, grid), (second, other) = grids.items()
        raise ValueError(
            f"{second}: expected the patch grid {_by(grid)} of the {first}, got {_by(other)}; the same position in both rows "
            f"would be another part of the image. Take the class-token rows with attention_rows({second}, rows='cls'), resize "
            "them with resample_attention and pass them as teacher_probs"
        )
    if rows == "cls":
        for name, call in calls.items():
            if call.has_cls is False:
                raise ValueError(
                    f"{name}: rows='cls' is the class token's row, but this attention has no class token; use rows='all'"
                )
        return [class_row(call) for call in calls.values()]
    found = list(calls.values())
    if all(call.num_prefix_tokens is not None and call.has_cls is not None for call in found):
        keep_cls = all(call.has_cls for call in found)
        found = [shared_tokens(call, keep_cls) for call in found]
    return found if count is None else [first_rows(call, count) for call in found]


def first_rows(call: AttentionCall, count: int) -> AttentionCall:
    """The queries [B, H, count, D] of the first tokens, with all keys.

    Raises:
        ValueError: the call has fewer rows, or none was asked for.
    """
    if not 1 <= count <= call.query.shape[2]:
        raise ValueError(
            f"rows: expected 'all', 'cls' or a number of rows from 1 to {call.query.shape[2]}, got {count}"
        )
    mask, lse = call.mask, call.lse
    if mask is not None and mask.ndim >= 2 and mask.shape[-2] != 1:
        mask = mask[..., :count, :]
    lse = None if lse is None else lse[:, :, :count]
    return call._replace(query=call.query[:, :, :count], mask=mask, lse=lse, first_row=None)


def _leave_out(call: AttentionCall, prefix: int, keep_cls: bool, rows: bool) -> AttentionCall:
    """Without the first ``prefix`` tokens, but for the class token: of the keys, and of the rows too."""
    kept = int(keep_cls)

    def cut(tensor: Tensor, dim: int) -> Tensor:
        patches = tensor.narrow(dim, prefix, tensor.shape[dim] - prefix)
        return torch.cat([tensor.narrow(dim, 0, 1), patches], dim) if kept else patches

    query, key, mask, lse = call.query, call.key, call.mask, call.lse
    if prefix != kept:
        call = call._replace(value=None)  # it and the normalisers are of another set of keys
        lse = None
        query, key = cut(query, 2) if rows else query, cut(key, 2)
        for dim in (-1, -2) if rows else (-1,):
            if mask is not None and mask.ndim >= -dim and mask.shape[dim] != 1:
                mask = cut(mask, dim)
    return call._replace(query=query, key=key, mask=mask, lse=lse, num_prefix_tokens=kept, has_cls=keep_cls)


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
