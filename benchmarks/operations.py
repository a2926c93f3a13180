"""Every operation that is measured, and against what. A new operation is one entry of :data:`OPERATIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import opponents
from benchmarks.calls import DIVERGENCES, Alone, Attention, Block, Call, Relation


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    function: takes the call's tensors by name, returns a tensor or a tuple of them.
    compiled: measured under torch.compile.
    all_queries: needs every query, because it computes whole maps even where one row is compared.
    ours: part of the package, and held to its precision; the others only have to be right.
    """

    name: str
    function: Callable[..., Any]
    compiled: bool = False
    all_queries: bool = False
    ours: bool = False


@dataclass(frozen=True)
class Operation:
    """A call without its sizes, and who computes it. The headline ones are measured by default."""

    name: str
    call: Call
    headline: bool = True

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        """Ours first; speed-ups are ours over each. (Attention alone is not ours: the others' times are read beside it.)"""
        call = self.call
        if isinstance(call, Alone):
            return (Implementation("sdpa", lambda **given: call.results(given)),)
        found = [Implementation("ours", lambda **given: call.results(given, "triton"), ours=True)]
        if not isinstance(call, Block):
            found.append(Implementation("chunked", lambda **given: call.results(given, "chunked"), ours=True))
        if isinstance(call, Relation):
            return (*found, *_pair("map", opponents.relation(True)), *_pair("row", opponents.relation(False)))
        assert isinstance(call, Attention)
        return (*found, *(_of_block(call) if isinstance(call, Block) else _of_attention(call)))


def _pair(what: str, function: Callable[..., Any], compiled: Callable[..., Any] | None = None, **more: bool) -> list:
    """The same mathematics in eager mode and under torch.compile, where another form of it may be the better one."""
    return [
        Implementation(f"eager_{what}", function, **more),
        Implementation(f"compile_{what}", compiled or function, compiled=True, **more),
    ]


def _of_block(call: Block) -> list[Implementation]:
    """Maps that serve output and loss; fused attention beside scores that are computed a second time."""
    rows = call.rows or None
    beside = opponents.attention_and_scores
    return [
        *_pair("map", opponents.attention_from_maps(rows)),
        Implementation("sdpa_eager", beside(opponents.matmul_scores, rows)),
        Implementation(
            "sdpa_compile", beside(opponents.row_scores if rows else opponents.matmul_scores, rows), compiled=True
        ),
    ]


def _of_attention(call: Attention) -> list[Implementation]:
    """Whole maps, the row only (by matrix product; multiplied and summed in fp32 where compiled), and fused attention."""
    setting = call.merge, call.divergence, call.temperature
    if call.probs:
        return _pair("row", *map(opponents.against_rows, (opponents.matmul_scores, opponents.row_scores)))
    if call.one_model:
        whole, matmul, products = (
            opponents.rows(scores, call.merge, call.temperature)
            for scores in (None, opponents.matmul_scores, opponents.row_scores)
        )
        return [Implementation("eager_map", whole, all_queries=True), *_pair("row", matmul, products)]
    found = []
    by_matmul = opponents.divergence(opponents.matmul_scores, *setting)
    if call.rows == 0:
        found += _pair("map", by_matmul)
    elif call.divergence != "logit_mse":  # scores of other rows would have no use
        found += _pair("map", opponents.divergence(None, *setting), all_queries=True)
    if call.rows == 1:
        found += _pair("row", by_matmul, opponents.divergence(opponents.row_scores, *setting))
    if call.merge is None and call.divergence == "forward_kl":
        found.append(Implementation("flex", opponents.flex_divergence, compiled=True))
    return found


_WIDE: dict[str, Any] = {"merge": "logsum", "temperature": 10.0}

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("cls_row", Attention()),
        Operation("cls_row_logsum", Attention(**_WIDE)),
        Operation("whole_map", Attention(rows=0)),
        Operation("attention_alone", Alone(rows=0)),
        Operation("attention_rows", Attention(one_model=True)),
        Operation("cls_row_given", Attention(probs=True)),
        Operation("relation_row", Relation()),
        Operation("attention_cls_row", Block(rows=1)),
        Operation("attention_whole_map", Block(rows=0)),
        Operation("cls_row_mean", Attention(merge="mean")),
        Operation("whole_map_logsum", Attention(rows=0, **_WIDE)),
        Operation("whole_map_mean", Attention(rows=0, merge="mean"), headline=False),
        Operation("cls_row_max", Attention(merge="max"), headline=False),
        Operation("cls_row_min", Attention(merge="min"), headline=False),
        Operation("attention_rows_logsum", Attention(one_model=True, **_WIDE), headline=False),
        *(
            Operation(f"{where}_{kind}", Attention(rows=rows, divergence=kind), headline=False)
            for where, rows in (("cls_row", 1), ("whole_map", 0))
            for kind in DIVERGENCES[1:]
        ),
    )
}
"""By name. The headline ones are measured by default; ``--operations all`` measures the rest too."""


def find_operations(names: list[str]) -> list[Operation]:
    """Operations by name; 'all' and 'headline' are names too.

    Raises:
        ValueError: no such operation; the message lists them.
    """
    found: dict[str, Operation] = {}
    for name in names:
        if name in ("all", "headline"):
            found |= {n: o for n, o in OPERATIONS.items() if name == "all" or o.headline}
        elif name in OPERATIONS:
            found[name] = OPERATIONS[name]
        else:
            raise ValueError(f"operation: expected one of all, headline, {', '.join(OPERATIONS)}, got {name!r}")
    return list(found.values())
