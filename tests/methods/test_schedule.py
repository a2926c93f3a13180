"""Scheduled numbers: warm-up, stop, decay, by epoch and by step."""

import math

import pytest

from attnkd.methods.schedule import Schedule, Schedules


def test_ssta_early_stop():
    weight = Schedule(0.3, stop=100)
    assert [weight.at(t) for t in (0, 99, 99.99, 100, 250)] == [0.3, 0.3, 0.3, 0.0, 0.0]


def test_warmup_is_linear_and_decay_ends_at_stop():
    schedule = Schedule(2.0, warmup=4, start=1.0, stop=10, decay=5, end=0.5)
    assert [schedule.at(t) for t in (0, 1, 4, 5)] == [1.0, 1.25, 2.0, 2.0]
    assert schedule.at(7.5) == pytest.approx((2.0 + 0.5) / 2)
    assert schedule.at(10) == schedule.at(1000) == 0.5


def test_cosine_decay():
    schedule = Schedule(1.0, stop=8, decay=8, shape="cosine")
    for t in range(8):
        assert schedule.at(t) == pytest.approx(0.5 * (1 + math.cos(math.pi * t / 8)))


def test_epoch_and_step_run_apart():
    numbers = Schedules(
        alpha=0.5, beta=Schedule(1.0, stop=2), temperature=Schedule(10.0, warmup=10, start=1.0, unit="step")
    )
    numbers.set_epoch(0)
    numbers.set_step(5)
    assert numbers.values() == {"alpha": 0.5, "beta": 1.0, "temperature": 5.5}
    numbers.set_epoch(2)
    assert numbers.values() == {"alpha": 0.5, "beta": 0.0, "temperature": 5.5}


def test_forgetting_to_tell_the_time_is_an_error():
    numbers = Schedules(alpha=0.5, beta=Schedule(1.0, stop=2), gamma=Schedule(1.0, warmup=3, unit="step"))
    assert numbers["alpha"] == 0.5
    with pytest.raises(RuntimeError, match=r"beta: changes by epoch, but set_epoch\(\) was never called"):
        numbers["beta"]
    with pytest.raises(RuntimeError, match=r"gamma: .* set_step\(\)"):
        numbers["gamma"]


def test_state_is_restored():
    first = Schedules(beta=Schedule(1.0, stop=2))
    first.set_epoch(5)
    second = Schedules(beta=Schedule(1.0, stop=2))
    second.load_state_dict(first.state_dict())
    assert second["beta"] == 0.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"value": float("nan")}, ValueError, "value: expected a finite number"),
        ({"value": "1"}, TypeError, "value: expected a number, got str"),
        ({"value": 1.0, "warmup": -1}, ValueError, "warmup: expected a finite number >= 0"),
        ({"value": 1.0, "decay": 1}, ValueError, "decay: needs stop"),
        (
            {"value": 1.0, "warmup": 6, "decay": 5, "stop": 10},
            ValueError,
            "stop: expected at least warmup . decay = 11",
        ),
        ({"value": 1.0, "shape": "step"}, ValueError, "shape: expected one of 'linear', 'cosine'"),
        ({"value": 1.0, "unit": "batch"}, ValueError, "unit: expected one of 'epoch', 'step'"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        Schedule(**options)


def test_time_is_checked():
    with pytest.raises(ValueError, match="epoch: expected a finite number >= 0, got -1"):
        Schedules(beta=1.0).set_epoch(-1)
