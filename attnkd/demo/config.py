"""What a demo does: which arms, on how many images, for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from attnkd.demo.arms import ARMS, GUIDANCE, METHODS, Arm, Comparison
from attnkd.demo.runs import BATCH_SIZE


@dataclass(frozen=True)
class Config:
    """What the command line decides, and what `attnkd demo --all` does otherwise.

    Args:
        attn_weight: the paper's λ of AttnDistill.
        temperature: the number of the teachers' heads, so that 'logsum' takes the geometric mean of their heads (the paper's
            10 is made for 6 and 12 heads).
        resample_mode: not the paper's 'bicubic': on grids this small its negative weights take about a fifth of all entries
            to the floor, and a patch that is at the floor in one head is dark after merging, however bright it is in the others.
        seeds: each has its own teachers and one student in each arm.
        arms: names of :data:`attnkd.demo.arms.ARMS`.
        teacher_patch: pixels; whole maps and token similarities cannot be resized, and want the student's 4.
        labelled: training images whose labels the students of the supervised arms see.
        wild_digits, wild_photos: images of the folder that Attention Probe chooses ``wild_digits`` from.

    Raises:
        ValueError: a number out of range.
    """

    epochs: int = 15
    teacher_epochs: int = 10
    seeds: int = 3
    attn_weight: float = 0.1
    temperature: float = 4.0
    resample_mode: str = "area"
    train_size: int = 1197
    test_size: int = 600
    arms: tuple[str, ...] = ("pa", "pa_ag")
    teacher_patch: int = 2
    labelled: int = 0
    wild_digits: int = 0
    wild_photos: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "teacher_epochs", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        for name in ("attn_weight", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number > 0, got {getattr(self, name)}")

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        return GUIDANCE if len(self.arms) == 2 else METHODS

    @property
    def assisted(self) -> bool:
        """Whether an arm has SSTA's self-supervised model."""
        return any(ARMS[arm].task == "ssta" for arm in self.arms)

    def images(self, arm: Arm) -> int:
        """How many images the students of an arm learn from."""
        if arm.images is not None:
            return self.wild_digits
        return self.labelled if arm.labels == "some" else self.train_size

    def epochs_of(self, arm: Arm) -> int:
        """As many steps on the arm's images as ``epochs`` are on all training images."""
        return max(1, round(self.epochs * (self.train_size // BATCH_SIZE) / (self.images(arm) // BATCH_SIZE)))

    def all_epochs(self) -> int:
        """Of all runs together."""
        students = sum(self.epochs_of(ARMS[arm]) for arm in self.arms)
        return self.seeds * ((1 + self.assisted) * self.teacher_epochs + students)


QUICK: dict[str, Any] = {"epochs": 2, "teacher_epochs": 2, "seeds": 2, "train_size": 320, "test_size": 200}
ALL: dict[str, Any] = {
    "epochs": 26,
    "teacher_epochs": 26,
    "seeds": 5,
    "train_size": 597,
    "test_size": 900,
    "arms": tuple(ARMS),
    "teacher_patch": 4,
    "labelled": 200,
    "wild_digits": 300,
    "wild_photos": 700,
}
QUICK_ALL: dict[str, Any] = {**ALL, **QUICK, "labelled": 128, "wild_digits": 128, "wild_photos": 192}
