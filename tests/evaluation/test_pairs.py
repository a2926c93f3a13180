"""Paired differences and their correction, against scipy and by hand."""

import math

import pytest
import scipy.stats

from attnkd.evaluation.pairs import difference, holm, spread


def test_difference_is_paired_and_its_interval_students_t() -> None:
    change = difference([1.0, 2, 3, 4, 5], [2.0, 3, 4, 5, 8])
    assert change["mean"] == pytest.approx(1.4) and change["std"] == pytest.approx(math.sqrt(0.8))
    reach = 2.776445 * math.sqrt(0.8 / 5)
    assert change["interval_95"] == pytest.approx([1.4 - reach, 1.4 + reach], rel=1e-5)
    assert change["p"] == pytest.approx(scipy.stats.ttest_rel([2.0, 3, 4, 5, 8], [1.0, 2, 3, 4, 5]).pvalue)
    assert difference([1.0, 2.0], [1.0, 2.0])["p"] == 1 and difference([1.0, 2.0], [2.0, 3.0])["p"] == 0
    assert difference([1.0], [2.0])["p"] is None and spread([3.0]) == {"mean": 3.0, "std": None, "values": [3.0]}


def test_holm_corrects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1, 1] and holm([0.02]) == [0.02]
