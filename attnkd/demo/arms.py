"""What the demo's students learn from, and which of them are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way to train a student.

    group: the rows of the table that it belongs to. words: what the student learns from. task: the method's name for `attnkd
    train`. options: of the method. heads: how the teachers' heads are chosen. images: how the images
    without labels are. labels: of 'some' or 'all' training images, or None.
    """

    group: str
    words: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    heads: str = "importance"
    images: str | None = None
    labels: str | None = None

    @property
    def taught(self) -> bool:
        """Whether anything of a teacher, which learned from the labels of all training images, is in the loss."""
        return self.options is not LABELS_ALONE

    @property
    def classifies(self) -> bool:
        """Whether the student has a classifier; if not, a linear probe shows its accuracy."""
        return self.task != "attn_distill"


LABELS_ALONE: Mapping[str, Any] = {"alpha": 1.0}
"""Of head-specific KD: the class loss and nothing else, with the same initial weights and images as the arms that it is compared with."""
OUTPUT_ALONE = {"relation_weight": 0.0}
ARMS = {
    "pa": Arm("AttnDistill", "class token (PA)", "attn_distill", {"attn_weight": 0.0}),
    "pa_ag": Arm("AttnDistill", "class token, its attention (PA + AG)", "attn_distill"),
    "labels": Arm("no attention", "labels", "head_kd", LABELS_ALONE, labels="some"),
    "labels_all": Arm("no attention", "labels of all images", "head_kd", LABELS_ALONE, labels="all"),
    "logits": Arm("no attention", "labels, output", "head_kd", {"alpha": 1.0, "kd_weight": 1.0}, labels="some"),
    "head_kd_random": Arm("Head-specific KD", "labels, maps of random heads", "head_kd", heads="random", labels="some"),
    "head_kd": Arm("Head-specific KD", "labels, maps of important heads", "head_kd", labels="some"),
    "ssta_alone": Arm("SSTA", "labels, maps without assistant", "ssta", {"lam": 0.0}, labels="some"),
    "ssta_random": Arm("SSTA", "labels, maps of random heads", "ssta", heads="random", labels="some"),
    "ssta_average": Arm("SSTA", "labels, mean maps of all heads", "ssta", heads="average", labels="some"),
    "ssta": Arm("SSTA", "labels, maps of important heads", "ssta", labels="some"),
    "random": Arm("Attention Probe", "output, random images", "attention_probe", OUTPUT_ALONE, images="random"),
    "va": Arm("Attention Probe", "output, images by V_a", "attention_probe", OUTPUT_ALONE, images="V_a"),
    "vn": Arm("Attention Probe", "output, images by V_n", "attention_probe", OUTPUT_ALONE, images="V_n"),
    "v": Arm("Attention Probe", "output, images by V", "attention_probe", OUTPUT_ALONE, images="V"),
    "probe": Arm("Attention Probe", "output, relation rows, images by V", "attention_probe", images="V"),
}

RULERS = {
    # group: arms whose attention loss, on test images, is measured in the arms of the group
    "AttnDistill": ("pa_ag",),
    "no attention": ("head_kd", "ssta"),
    "Head-specific KD": ("head_kd",),
    "SSTA": ("ssta",),
    "Attention Probe": ("probe",),
}
NATS, COSINES = "nats", "squared cosine difference"


@dataclass(frozen=True)
class Comparison:
    """Two arms that differ in one thing, compared by one score of the students of the same seed.

    question: what the difference shows. unit: of the score; of an accuracy more is better, of a distance less.
    """

    question: str
    against: str
    arm: str
    score: str = "top1"
    unit: str = "points"


GUIDANCE = (
    Comparison("AG added to PA: k-NN top-1", "pa", "pa_ag", "knn"),
    Comparison("AG added to PA: linear probe top-1", "pa", "pa_ag", "linear_probe"),
    Comparison("AG added to PA: distance to the attention", "pa", "pa_ag", "pa_ag_distance", NATS),
)
METHODS = (
    Comparison("AttnDistill: AG added to PA (linear probe)", "pa", "pa_ag", "linear_probe"),
    Comparison("a teacher's output added to labels", "labels", "logits"),
    Comparison("head-specific KD: maps added to labels", "labels", "head_kd"),
    Comparison("head-specific KD: maps in place of the output", "logits", "head_kd"),
    Comparison("head-specific KD: important in place of random heads", "head_kd_random", "head_kd"),
    Comparison("SSTA: maps added to labels", "labels", "ssta"),
    Comparison("SSTA: maps in place of the output", "logits", "ssta"),
    Comparison("SSTA: the assistant added", "ssta_alone", "ssta"),
    Comparison("SSTA: important in place of random heads", "ssta_random", "ssta"),
    Comparison("SSTA: important heads in place of all heads' mean", "ssta_average", "ssta"),
    Comparison("Attention Probe: images by V_a in place of random ones", "random", "va"),
    Comparison("Attention Probe: images by V_n in place of random ones", "random", "vn"),
    Comparison("Attention Probe: images by V in place of V_n", "vn", "v"),
    Comparison("Attention Probe: relation loss added", "v", "probe"),
    Comparison("AttnDistill: distance to the attention", "pa", "pa_ag", "pa_ag_distance", NATS),
    Comparison("head-specific KD: distance to the attention", "logits", "head_kd", "head_kd_distance", NATS),
    Comparison("SSTA: distance to the attention", "logits", "ssta", "ssta_distance", NATS),
    Comparison("Attention Probe: distance to the attention", "v", "probe", "probe_distance", COSINES),
)
