"""The specification of the relation row: plain PyTorch that forms both Gram matrices, in float64 or in a precision asked for.

Nothing here is fast and nothing fast imports it. It imports torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-12
"""A token (a channel, for ``normalize_dim=-2``) whose norm is not above this has no direction."""


def per_image(
    student: Tensor,
    teacher: Tensor,
    student_prefix: int,
    teacher_prefix: int,
    normalize_dim: int,
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """The loss of every image, [B]: both Gram matrices in ``precision``, their rows 0 subtracted."""
    rows = []
    for features, prefix in ((student, student_prefix), (teacher, teacher_prefix)):
        tokens = torch.cat([features[:, :1], features[:, prefix:]], 1).to(precision)
        # The clamp is F.normalize's; what it would blow up is made 0 here, in value and gradient.
        directed = ~(tokens.detach().norm(dim=normalize_dim, keepdim=True) <= EPS)  # NaN stays NaN
        normal = F.normalize(torch.where(directed, tokens, 0.0), dim=normalize_dim, eps=EPS) * directed
        rows.append((normal @ normal.mT)[:, 0, 1:])
    loss = (rows[0] - rows[1]).square().mean(-1)
    return loss if student.dtype == torch.float64 else loss.float()
