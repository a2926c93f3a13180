"""Generated calls and training steps against the oracle and the textbook: a short fixed run, and proof that it finds faults.

`attnkd validate --minutes N` is the long run.
"""

import random
from collections import Counter

import pytest
import torch

from attnkd.attention import api
from attnkd.attention.chunked import divergence as chunked_divergence
from attnkd.commands.validate import PROOFS
from attnkd.methods import attention_probe, whole_map
from attnkd.testing import cases, generate, method_cases, proof
from attnkd.testing.method_cases import MethodCase, prove_method
from attnkd.testing.proof import prove

HAS_GPU = torch.cuda.is_available()
CPU = torch.device("cpu")


def wrong(case, impl, device=CPU):
    """What the oracle says against a case; empty when nothing."""
    results = PROOFS.get(case.operation, prove)(impl, seed=case.seed, **case.arguments(device))
    return [str(result) for result in results if not result.ok]


@pytest.mark.parametrize(("impl", "count"), [("triton", 8), ("chunked", 80), ("reference", 40)])
def test_generated_calls(impl, count, device):
    rng = random.Random(21)
    failures = {}
    for _ in range(count):
        case = generate.draw(rng, impl, small=True)
        if found := wrong(case, impl, device):
            failures[str(case)] = found
    assert not failures


@pytest.mark.parametrize("method", method_cases.METHODS)
def test_generated_training_steps(method):
    for impl, seed in (("chunked", 0), ("reference", 1), ("chunked", 2)):
        found = [str(result) for result in prove_method(MethodCase(method, seed), impl, CPU) if not result.ok]
        assert not found


def test_generated_training_steps_with_kernels(device):
    for method in method_cases.METHODS:
        found = [str(result) for result in prove_method(MethodCase(method, 3), "triton", device) if not result.ok]
        assert not found


@pytest.mark.parametrize("impl", generate.IMPLS)
def test_everything_is_drawn(impl):
    """No kind of mask, layout, weight, … is left out, for any operation that has it and any implementation that covers it."""
    rng = random.Random(0)
    drawn = [generate.draw(rng, impl, small=True) for _ in range(2500)]
    plain = {"merge", "resample"} if impl != "triton" else set()
    assert {c.operation for c in drawn} == {"row", "map", "rows", "relation"} | plain
    dtypes = set(cases.DTYPES) - ({"fp64"} if impl == "triton" else set())
    merges = set(cases.MERGES) - {None}
    for operation in ("row", "map"):
        here = [c for c in drawn if c.operation == operation]
        rows_only = impl == "triton" and operation == "map"
        assert {c.dtype for c in here} == dtypes == {c.teacher_dtype for c in here} - {None}
        assert {c.merge for c in here} - {None} == (merges - {"max", "min"} if rows_only else merges)
        assert {c.divergence for c in here} == set(cases.DIVERGENCES)
        assert {c.layout for c in here} == set(cases.LAYOUTS)
        assert {c.mask.partition("@")[0] for c in here} == set(cases.MASKS)
        assert {c.teacher_mask.partition("@")[0] for c in here} == {*cases.MASKS, *cases.RELATED}
        assert len({c.mask.partition("@")[2] for c in here}) == 16  # broadcast in every way
        assert {c.target for c in here} == ({"keys"} if rows_only else set(cases.TARGETS))
        assert {c.weight.partition("@")[0] for c in here} == set(cases.WEIGHTS)
        assert {c.reduction for c in here} == set(cases.REDUCTIONS)
        assert any(c.H != c.Ht for c in here) and any(c.N == 1 for c in here)
    sizes = Counter(c.M for c in drawn if c.operation in ("row", "map"))
    assert all(sizes[rows] > 20 for rows in (1, 16, 17))  # around the border of the row kernels
    assert any(c.D & (c.D - 1) for c in drawn)


# -- planted faults ---------------------------------------------------------------------------------------------------


def teacher_faults(fault):
    """api.make_problem with a fault in the teacher's side."""
    honest = api.make_problem

    def make_problem(*arguments, **named):
        problem = honest(*arguments, **named)
        return problem._replace(**fault(problem))

    return api, "make_problem", make_problem


def wrong_coefficient():
    honest = chunked_divergence._KINDS["js"]

    def js(s, t, need_ds):
        rows, ds, factor = honest(s, t, need_ds)
        return rows, ds, None if factor is None else factor * 1.02

    return chunked_divergence._KINDS, "js", js


def swapped_heads():
    def fault(problem):
        side = problem.teacher
        if problem.merge is not None or side.query is None:
            return {}
        return {"teacher": side._replace(query=side.query.flip(1), key=side.key.flip(1))}

    return teacher_faults(fault)


FAULTS = {
    "a coefficient off by 2 %": wrong_coefficient,
    "the teacher's mask dropped": lambda: teacher_faults(lambda p: {"teacher": p.teacher._replace(mask=None)}),
    "heads swapped": swapped_heads,
    "the temperature halved": lambda: teacher_faults(lambda p: {"temperature": p.temperature / 2}),
    "the teacher's scale taken for the student's": lambda: teacher_faults(
        lambda p: {"teacher": p.teacher._replace(scale=p.student.scale)}
    ),
    "the student's mask not divided by T": lambda: teacher_faults(
        lambda p: (
            {}
            if p.student.mask is None or p.student.mask.dtype == torch.bool
            else {"student": p.student._replace(mask=p.student.mask * p.temperature)}
        )
    ),
    "row weights ignored": lambda: (api, "check_weight", lambda weight, problem: None),
    "mean merging for max": lambda: teacher_faults(lambda p: {"merge": "mean"} if p.merge == "max" else {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_generated_calls_find_a_planted_fault(fault, monkeypatch):
    target, name, faulty = FAULTS[fault]()
    patch = monkeypatch.setitem if isinstance(target, dict) else monkeypatch.setattr
    patch(target, name, faulty)
    rng = random.Random(4)
    drawn = (generate.draw(rng, "chunked", small=True) for _ in range(300))
    case = next((c for c in drawn if c.operation in ("row", "map") and wrong(c, "chunked")), None)
    assert case is not None
    assert wrong(cases.parse(str(case)), "chunked")  # its line brings it back
    monkeypatch.undo()
    assert not wrong(case, "chunked")


def test_a_failing_case_shrinks_to_the_fault(monkeypatch):
    monkeypatch.setitem(*wrong_coefficient())
    rng = random.Random(4)
    drawn = (generate.draw(rng, "chunked", small=True) for _ in range(300))
    case = next(c for c in drawn if c.operation == "row" and wrong(c, "chunked"))
    found = generate.smallest(case, lambda c: generate.exists(c, "chunked") and bool(wrong(c, "chunked")))
    assert found.divergence == "js" and wrong(found, "chunked")
    assert (found.layout, found.mask, found.weight, found.reduction, found.merge) == (
        "contiguous",
        "none",
        "none",
        "none",
        None,
    )
    assert found.B == found.H == found.M == 1


def one_head_further(call, heads):
    honest = whole_map_take_heads
    return honest(call, tuple((head + 1) % call.query.shape[1] for head in heads))


whole_map_take_heads = whole_map.take_heads

METHOD_FAULTS = {
    "HeadKD": (whole_map, "take_heads", one_head_further),
    "SSTA": (whole_map, "take_heads", one_head_further),
    "AttentionProbe": (
        attention_probe,
        "kd_loss",
        lambda output, target, temperature: _kd_loss(output, target, temperature) / temperature,
    ),
    "AttnDistill": (
        "attnkd.methods.attn_distill.resample_attention",
        None,
        lambda rows, t, s, mode: _bilinear(rows, t, s),
    ),
}
_kd_loss = attention_probe.kd_loss


def _bilinear(rows, teacher_grid, student_grid):
    from attnkd import resample_attention

    return resample_attention(rows, teacher_grid, student_grid, "bilinear")


@pytest.mark.parametrize("method", METHOD_FAULTS)
def test_generated_training_steps_find_a_planted_fault(method, monkeypatch):
    target, name, faulty = METHOD_FAULTS[method]
    monkeypatch.setattr(*((target, faulty) if name is None else (target, name, faulty)))
    results = (prove_method(MethodCase(method, seed), "chunked", CPU) for seed in range(20))
    assert any(not result.ok for step in results for result in step)


def test_a_float64_gradient_that_passed_through_float32_fails(monkeypatch):
    honest = proof.attention_divergence

    def rounded(**arguments):
        query = arguments["student_query"] * 1.0
        if query.requires_grad:
            query.register_hook(lambda grad: grad.float().double())
        return honest(**arguments | {"student_query": query})

    arguments = cases.parse("dtype=fp64,divergence=js,N=13,M=3,D=24,Dt=24,std=3.0").arguments(CPU)
    assert all(result.ok for result in proof.prove("chunked", **arguments))
    monkeypatch.setattr(proof, "attention_divergence", rounded)
    assert [result.ok for result in proof.prove("chunked", **arguments)] == [True, False, True]


def test_a_gradient_below_the_rounding_of_float32_is_not_judged_by_it():
    """A saturated row: its gradient is 1e-7 of what it is the difference of. float64 resolves it."""
    text = "operation=rows,layout=expanded_batch,B=3,H=1,N=31,D=128,Ht=1,Dt=1,scale=0.125,temperature=0.5,std=3.0,seed=537446"
    for dtype, impl in (("fp32", "chunked"), ("bf16", "chunked"), ("fp64", "chunked"), ("fp64", "reference")):
        assert not wrong(cases.parse(f"{text},dtype={dtype}"), impl)


def test_a_gradient_of_zeros_fails_where_rounding_is_large(monkeypatch):
    """Saturated rows: the error that rounding explains exceeds the gradient."""
    honest = proof.attention_divergence

    def without_gradient(**arguments):
        return honest(**arguments).detach() + 0 * arguments["student_query"].float().sum()

    case = cases.parse(
        "operation=map,dtype=bf16,divergence=reverse_kl,B=1,M=22,N=13,D=72,scale=1.0,temperature=0.5,std=3.0"
    )
    arguments = case.arguments(torch.device("cpu"))
    assert all(result.ok for result in proof.prove("chunked", **arguments))
    monkeypatch.setattr(proof, "attention_divergence", without_gradient)
    assert [result.ok for result in proof.prove("chunked", **arguments)] == [True, False, False]
