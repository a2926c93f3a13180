"""The comparison that every other test relies on accepts honest rounding and nothing else."""

import pytest
import torch

from attnkd.testing.tolerance import CAP, assert_close, compare

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _key_gradient(dtype: torch.dtype, closeness: float, compute: torch.dtype, honest: bool = False) -> torch.Tensor:
    """d KL / d key of one attention row, for a teacher at the given distance from its student, computed in ``compute``.

    ``honest`` rounds once, at the end, like a kernel that accumulates in fp32.
    """
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 3, 1, 32, generator=g).to(dtype), torch.randn(4, 3, 97, 32, generator=g).to(dtype)
    teacher = (key.float() + closeness * torch.randn(key.shape, generator=g)).to(dtype)
    query, key, teacher = query.to(compute), key.to(compute), teacher.to(compute)
    p = (query @ key.mT * 32**-0.5).softmax(-1)
    q = (query @ teacher.mT * 32**-0.5).softmax(-1)
    gradient = 32**-0.5 * (p - q).mT @ query
    return gradient.to(dtype) if honest else gradient


def _case(dtype: torch.dtype, closeness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    compute = torch.float32 if dtype != torch.float32 else torch.float64
    return (
        _key_gradient(dtype, closeness, compute, honest=True),
        _key_gradient(dtype, closeness, torch.float64),
        _key_gradient(dtype, closeness, dtype),
    )


@pytest.mark.parametrize("closeness", [1.0, 0.03])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_an_honest_result_and_eager_itself(dtype, closeness):
    honest, oracle, eager = _case(dtype, closeness)
    assert assert_close("honest", honest, oracle, eager).ratio < 1
    if closeness == 1.0:
        assert compare("eager", eager, oracle, eager).ok


@pytest.mark.parametrize("closeness", [1.0, 0.03])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(torch.zeros_like, id="zeroed"),
        pytest.param(lambda x: -x, id="negated"),
        pytest.param(lambda x: x * 0.5, id="halved"),
        pytest.param(lambda x: x.roll(1, -2), id="permuted keys"),
        pytest.param(lambda x: x.roll(1, 1), id="permuted heads"),
        pytest.param(lambda x: x.index_fill(-2, torch.tensor([96]), 0.0), id="last key forgotten"),
    ],
)
def test_rejects_a_wrong_gradient(wrong, dtype, closeness):
    honest, oracle, eager = _case(dtype, closeness)
    result = compare("gradient", wrong(honest), oracle, eager)
    assert not result.ok
    with pytest.raises(AssertionError, match="gradient: WRONG"):
        assert_close("gradient", wrong(honest), oracle, eager)


@pytest.mark.parametrize("factor", [0.95, 1.05])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_a_wrong_factor(dtype, factor):
    honest, oracle, eager = _case(dtype)
    assert not compare("scaled", honest * factor, oracle, eager).ok


def test_a_gradient_smaller_than_the_error_of_eager_must_still_be_right():
    honest, oracle, eager = _case(torch.bfloat16, closeness=1e-3)
    assert 2 * (eager - oracle).norm() > oracle.norm()  # twice eager's error would let zeros pass
    assert not compare("zeroed", torch.zeros_like(honest), oracle, eager).ok
    assert compare("honest", honest, oracle, eager).ok
    assert compare("honest", honest, oracle, eager).allowed <= CAP + 0.01


@pytest.mark.parametrize("where", [slice(0, 1), slice(None)])
def test_nan_never_passes(where):
    honest, oracle, eager = _case(torch.float32)
    honest.flatten()[where] = torch.nan
    assert not compare("nan", honest, oracle, eager).ok
    everywhere = torch.full_like(eager, torch.nan)
    assert not compare("nan", honest, oracle, everywhere).ok


def test_an_oracle_with_nan_is_an_error():
    honest, oracle, eager = _case(torch.float32)
    oracle[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="oracle: expected numbers, got 1 NaN"):
        compare("broken", honest, oracle, eager)


def test_an_eager_that_overflowed_allows_nothing():
    honest, oracle, eager = _case(torch.float16)
    off = honest * 1.01
    assert not compare("off", off, oracle, torch.full_like(eager, torch.inf)).ok


def test_infinities_must_be_where_the_oracle_has_them():
    oracle = torch.tensor([1.0, torch.inf, 2.0], dtype=torch.float64)
    right = oracle.float()
    assert compare("right", right, oracle, right).ok
    assert not compare("finite", torch.tensor([1.0, 1e30, 2.0]), oracle, right).ok
    assert not compare("negative", torch.tensor([1.0, -torch.inf, 2.0]), oracle, right).ok
    assert not compare("elsewhere", torch.tensor([1.0, torch.inf, torch.inf]), oracle, right).ok


def test_shapes_and_dtypes_must_match():
    honest, oracle, eager = _case(torch.bfloat16)
    assert not compare("shape", honest[:1], oracle, eager).ok
    assert "float32" in compare("dtype", honest.float(), oracle, eager).why
    with pytest.raises(TypeError, match="oracle: expected float64, got torch.float32"):
        compare("oracle", honest, oracle.float(), eager)
    with pytest.raises(ValueError, match="eager: expected shape"):
        compare("eager", honest, oracle, eager[:1])


def test_a_loss_is_judged_by_the_numbers_it_is_a_difference_of():
    """A KL of 1e-6 in fp32 cannot be more exact than the logarithms of order one that it is made of."""
    oracle = torch.tensor([1e-6], dtype=torch.float64)
    lucky = oracle.float()
    off = lucky + 3e-7
    assert not compare("loss", off, oracle, lucky).ok
    assert compare("loss", off, oracle, lucky, scale=1.0).ok
    assert not compare("loss", lucky + 1e-6, oracle, lucky, scale=1.0).ok


def test_zero_by_right():
    zero = torch.zeros(8)
    assert compare("zero", zero, zero.double(), zero).ok
    assert compare("zero", zero + 1e-9, zero.double(), zero - 1e-9).ok
    assert not compare("zero", zero + 1e-3, zero.double(), zero - 1e-9).ok


def test_nothing_to_compare():
    empty = torch.zeros(0, 3)
    assert compare("empty", empty, empty.double(), empty).ok
    assert not compare("empty", torch.zeros(1, 3), empty.double(), empty).ok
