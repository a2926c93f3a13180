"""How useful an unlabelled image is to a teacher: where its class token looks, and how sure it is of a class.

Wang et al.: Attention Probe: Vision Transformer Distillation in the Wild, ICASSP 2022; docs/methods/attention_probe.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnkd.attention.api import attention_rows
from attnkd.attention.call import class_row, take_heads
from attnkd.attention.checks import check_choice, integer
from attnkd.capture.adapters import adapter_for
from attnkd.capture.blocks import Blocks, block_index, default_blocks
from attnkd.capture.models import num_classes
from attnkd.capture.tap import AttentionTap
from attnkd.capture.tokens import token_layout
from attnkd.methods.whole_map import num_heads


class ProbeScores(NamedTuple):
    """Scores of B images; lower is more useful."""

    attention: Tensor
    """[B, blocks]: V_a, cosine of the probe to the uniform distribution, in (0, 1]."""
    output: Tensor
    """[B]: V_n = −log of the largest class probability, in nats."""
    label: Tensor
    """[B] int64: that class."""

    def value(self, attn_weight: float = 0.05, output_weight: float = 0.9) -> Tensor:
        """[B]: V = attn_weight · Σ_blocks V_a + output_weight · V_n."""
        return attn_weight * self.attention.sum(1) + output_weight * self.output


class ProbeScorer(nn.Module):
    """Scores images by a teacher's attention probe and output.

    The probe of a block is the part of the class token's attention row that falls on patches.

    Args:
        teacher: a classifier with a class token; put into evaluation mode.
        blocks: whose probes count: index, sequence of indices or 'all'. None: those at a third and two thirds of the depth, 4
            and 8 (counted from 1) of 12.
        head: index of the head whose row is the probe (the authors' is 0), or 'mean' for the mean over heads.
        impl: of the attention row, see :mod:`attnkd.attention.dispatch`.

    Raises:
        TypeError, ValueError: no class token, no classifier, blocks or head out of range.
        NotImplementedError: attention that cannot be captured, see :class:`attnkd.AttentionTap`.

    Example::

        scorer = ProbeScorer(timm.create_model("deit_base_patch16_224", pretrained=True))
        scores = scorer(images)
        worth_keeping = scores.value().topk(100, largest=False).indices
    """

    def __init__(
        self, teacher: nn.Module, blocks: Blocks | None = None, head: int | str = 0, impl: str = "auto"
    ) -> None:
        super().__init__()
        layout = token_layout(teacher)
        if not layout.has_cls:
            raise ValueError(
                f"teacher: the probe is the class token's row, but {type(teacher).__name__} has no class token"
            )
        classes = num_classes(teacher)
        if classes is None or classes < 2:
            raise ValueError(
                f"teacher: expected a classifier, got {type(teacher).__name__} with num_classes = {classes}"
            )
        index = integer(head)
        if index is None:
            check_choice("head", head, ("mean",))
        self.prefix, self.head, self.impl = layout.num_prefix_tokens, "mean" if index is None else index, impl
        self.tap = AttentionTap(teacher, default_blocks(teacher, 2) if blocks is None else blocks)
        self.tap.eval()
        self.blocks = [block_index(teacher, path) for path in self.tap.paths]
        for path in self.tap.paths:
            heads = num_heads(teacher, path)
            if index is not None and not 0 <= index < heads:
                raise ValueError(f"head: expected 'mean' or an index from 0 to {heads - 1} ({path}), got {index}")

    @torch.no_grad()
    def forward(self, images: Tensor) -> ProbeScores:
        """images [B, C, H, W], normalised for the teacher → scores in float32."""
        teacher = self.tap.model
        logits, calls = self.tap.capture(adapter_for(teacher).forward, teacher, images)
        cosines = []
        for call in calls:
            row = class_row(call, self.prefix)
            if not isinstance(self.head, str):
                row = take_heads(row, (self.head,))
            rows = attention_rows(row, rows="cls", impl=self.impl)
            cosines.append(cosine_to_uniform(rows.mean(1)[:, 0, 1:]))
        worst, label = logits.float().log_softmax(1).max(1)
        return ProbeScores(torch.stack(cosines, 1), -worst, label)

    def train(self, mode: bool = True) -> ProbeScorer:
        """The teacher stays in evaluation mode."""
        return super().train(False)


def cosine_to_uniform(probe: Tensor) -> Tensor:
    """Cosine between non-negative probes [B, P] and the uniform distribution: Σ p / (√P ‖p‖₂), [B]."""
    return probe.sum(-1) / (probe.shape[-1] ** 0.5 * torch.linalg.vector_norm(probe, dim=-1))
