"""AttnDistill's projector alignment: from the student's tokens to the teacher's, and from the teacher's grid to the student's.

The same projector serves class token and patch tokens, token by token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def make_projector(dim: int, teacher_dim: int) -> nn.Sequential:
    """[..., D] → [..., Dt]: LayerNorm, linear layers D → 2D → D → 2D → Dt with GELU between them, LayerNorm."""
    widths = [dim, 2 * dim, dim, 2 * dim, teacher_dim]
    layers: list[nn.Module] = [nn.LayerNorm(dim, eps=1e-6)]
    for index in range(4):
        linear = nn.Linear(widths[index], widths[index + 1])
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1], nn.LayerNorm(teacher_dim, eps=1e-6))


def resize_tokens(tokens: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], mode: str) -> Tensor:
    """Patch tokens [B, H·W, D] of one grid (H, W), in row-major order, as those of another [B, H'·W', D].

    Every feature is resized as an image, in PyTorch's convention (align_corners=False, no antialias), as attention rows
    are. Tokens on the same grid come back as they are.
    """
    if grid == new_grid:
        return tokens
    corners: dict[str, Any] = {} if mode == "area" else {"align_corners": False}
    images = tokens.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(images, size=new_grid, mode=mode, **corners).flatten(2).transpose(1, 2)
