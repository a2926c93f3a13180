"""One rule that decides whether a result is right.

The oracle computes in float64 on the same, already rounded, inputs. A result may then be wrong by what rounding alone
explains, and how much that is, plain PyTorch shows: ``eager`` is the same mathematics in the result's own precision, and
the allowed error is a multiple of eager's (4 times for float32, 2 times for float16 and bfloat16) plus a few ulp. Four
errors are held to it:

* **peak**, max |a − o|, relative to max |o|: no single element is off;
* **rms**, ‖a − o‖ / ‖o‖: nor are all of them, a little;
* **gain**, |⟨a, o⟩ / ⟨o, o⟩ − 1|: nor is there a wrong factor. Noise averages out here, so a factor shows even where
  rounding is large, as it is in bfloat16 gradients of a student close to its teacher;
* **slice**, the gain of every index of every dimension: no key, head or image was forgotten or taken for another.

Close to the teacher, eager's own error can exceed the gradient, and a multiple of it would let a gradient of zeros pass.
So no allowance exceeds :data:`CAP` of the oracle's size, whatever eager does. NaN never passes; shapes and dtypes must
match.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Result", "assert_close", "compare"]

ALLOWANCE = {
    torch.float64: (4.0, 4.0),
    torch.float32: (4.0, 4.0),
    torch.float16: (2.0, 1.0),
    torch.bfloat16: (2.0, 1.0),
}
"""By the result's dtype: how many times eager's error is allowed, and how many ulp on top."""

CAP = 0.25
"""No allowance exceeds this fraction of the oracle's own size."""


@dataclass(frozen=True)
class Result:
    """The verdict on one result: its worst error, what was allowed, and why.

    Attributes:
        name: what was compared.
        error: of the criterion that came closest to (or went furthest beyond) its allowance, relative to the oracle.
        allowed: that criterion's allowance.
        ratio: error / allowed; at most 1 passes.
        ok: whether everything passed.
        why: the criterion, or what made a comparison of numbers pointless.
    """

    name: str
    error: float
    allowed: float
    ratio: float
    ok: bool
    why: str

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        ratio = f"(ratio {self.ratio:.2f})"
        return f"{self.name}: {verdict}, {self.why} error {self.error:.3g}, allowed {self.allowed:.3g} {ratio}"


def compare(name: str, actual: Tensor, oracle: Tensor, eager: Tensor, *, scale: float = 0.0) -> Result:
    """Judges ``actual`` against ``oracle`` by the error that ``eager`` makes.

    Args:
        name: what is compared, for messages.
        actual: the result to judge, any shape.
        oracle: float64, same shape: the truth for the same rounded inputs.
        eager: same shape and dtype as ``actual``: plain PyTorch in that precision (TF32 and autocast off). For a float32
            loss of bfloat16 inputs that is the float32 computation.
        scale: size, in the result's units, of the numbers that are subtracted to form it, if they are larger than the
            result. The ulp allowance is relative to it. A KL divergence is a difference of logarithms of order one
            (``scale=1``); for gradients leave it at 0, so that a small gradient must still be right.

    Raises:
        TypeError: if ``oracle`` is not float64, or ``eager``'s dtype differs from ``actual``'s.
        ValueError: if ``oracle`` has NaN, or ``eager``'s shape differs from ``oracle``'s.
    """
    if oracle.dtype != torch.float64:
        raise TypeError(f"{name}: oracle: expected float64, got {oracle.dtype}")
    if eager.shape != oracle.shape:
        raise ValueError(f"{name}: eager: expected shape {tuple(oracle.shape)} like oracle, got {tuple(eager.shape)}")
    if actual.shape != oracle.shape:
        return _hopeless(name, f"shape {tuple(actual.shape)} instead of {tuple(oracle.shape)}:")
    if actual.dtype != eager.dtype:
        return _hopeless(name, f"dtype {actual.dtype} instead of {eager.dtype}:")
    if actual.dtype not in ALLOWANCE:
        raise TypeError(f"{name}: actual: expected a floating point dtype, got {actual.dtype}")
    a, o, e = (x.detach().to(oracle.device, torch.float64) for x in (actual, oracle, eager))
    if o.isnan().any():
        raise ValueError(f"{name}: oracle: expected numbers, got {int(o.isnan().sum())} NaN")
    finite = o.isfinite()
    if a.isnan().any():
        return _hopeless(name, f"{int(a.isnan().sum())} of {a.numel()} are NaN:")
    if not torch.equal(a[~finite], o[~finite]) or not a[finite].isfinite().all():
        return _hopeless(name, "infinite elsewhere than the oracle:")
    a, o, e = (torch.where(finite, x, 0.0) for x in (a, o, e))
    if not finite.any():
        return Result(name, 0.0, 0.0, 0.0, True, "nothing to compare:")

    factor, ulps = ALLOWANCE[actual.dtype]
    ulp = ulps * torch.finfo(actual.dtype).eps
    peak, norm = float(o.abs().max()), float(o.norm())
    # An eager that overflowed allows nothing beyond the ulp.
    errors = {"peak": _peak(e, o), "rms": _norm(e, o), "gain": _gain(e, o)} if e.isfinite().all() else {}
    # What is left of eager's noise in a projection on n elements; its own gain error may be small by luck.
    noise = 3.0 * _ratio(errors.get("rms", 0.0), norm) / math.sqrt(o.numel()) if norm else 0.0
    verdicts = []
    for why, measure, size, unit, extra in (
        ("peak", _peak, peak, max(peak, scale), 0.0),
        ("rms", _norm, norm, max(norm, scale * math.sqrt(o.numel())), 0.0),
        ("gain", _gain, 1.0, max(1.0, _ratio(scale, peak)), noise),
    ):
        limit = CAP * size if peak else math.inf  # a result that is zero by right has no size to be a fraction of
        allowed = min(factor * (errors.get(why, 0.0) + extra), limit) + ulp * unit
        verdicts.append((measure(a, o), allowed, size, why))
    (_, allowed_peak, *_), (_, allowed_rms, *_), _ = verdicts
    verdicts += _slices(a, o, allowed_peak, allowed_rms / math.sqrt(o.numel()))
    error, allowed, size, why = max(verdicts, key=lambda v: _ratio(v[0], v[1]))
    ratio = _ratio(error, allowed)
    return Result(name, error / (size or 1.0), allowed / (size or 1.0), ratio, ratio <= 1.0, why)


def assert_close(name: str, actual: Tensor, oracle: Tensor, eager: Tensor, *, scale: float = 0.0) -> Result:
    """Like :func:`compare`, but raises where the result is wrong.

    Raises:
        AssertionError: if the result is wrong, saying by how much.
    """
    result = compare(name, actual, oracle, eager, scale=scale)
    if not result.ok:
        raise AssertionError(str(result))
    return result


def _hopeless(name: str, why: str) -> Result:
    return Result(name, math.inf, 0.0, math.inf, False, why)


def _peak(x: Tensor, oracle: Tensor) -> float:
    return float((x - oracle).abs().max())


def _norm(x: Tensor, oracle: Tensor) -> float:
    return float((x - oracle).norm())


def _gain(x: Tensor, oracle: Tensor) -> float:
    energy = float(oracle.square().sum())
    return abs(float((x * oracle).sum()) / energy - 1.0) if energy else 0.0


def _slices(x: Tensor, oracle: Tensor, peak: float, rms: float) -> list[tuple[float, float, float, str]]:
    """Each dimension's worst slice: its gain error, and what errors of ``peak`` at most and ``rms`` on average allow."""
    verdicts = []
    for dim in range(oracle.ndim):
        others = [d for d in range(oracle.ndim) if d != dim]
        energy = oracle.square().sum(others) if others else oracle.square()
        overlap = (x * oracle).sum(others) if others else x * oracle
        counts = energy > 0
        error = (overlap[counts] / energy[counts] - 1.0).abs()
        noise = max(rms, peak / math.sqrt(oracle.numel() / oracle.shape[dim]))  # of one element, seen from its slice
        allowed = CAP + 3.0 * noise / energy[counts].sqrt()
        if error.numel():
            worst = int((error / allowed).argmax())
            index = int(counts.nonzero()[worst])
            verdicts.append((float(error[worst]), float(allowed[worst]), 1.0, f"slice {index} of dimension {dim}"))
    return verdicts


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.inf if numerator else 0.0
