"""Models of timm that work in stages: the grid of tokens shrinks on the way, and an attention may see a window of it.

An attention over all tokens of a grid is like that of any other model. Of windows, and of tokens in another order, ``window`` says which
they are, and maps are compared only where that is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.capture.adapters.base import Grid, TokenLayout
from attnkd.capture.adapters.timm_models import Timm


class _Staged(Timm):
    name: str
    """Of the class."""
    module: str
    """Of timm that it is in."""

    def takes(self, model: nn.Module) -> bool:
        return any(
            base.__name__ == self.name and base.__module__ == f"timm.models.{self.module}"
            for base in type(model).__mro__
        )

    def depths(self, model: Any) -> list[list[str]]:
        """The paths of the blocks of each stage."""
        raise NotImplementedError

    def stages(self, model: nn.Module) -> list[int]:
        return [len(stage) for stage in self.depths(model)]

    def blocks(self, model: nn.Module) -> list[str]:
        return [path for stage in self.depths(model) for path in stage]

    def layout(self, model: nn.Module) -> TokenLayout:
        width: Any = model.num_features
        return TokenLayout(0, False, width)

    def stage(self, model: nn.Module, path: str) -> int:
        """The number of the stage that a module path lies in, counted from the last: -1."""
        depths = self.depths(model)
        return next(i for i, stage in enumerate(depths) if any(f"{path}.".startswith(f"{b}.") for b in stage)) - len(
            depths
        )


class Swin(_Staged):
    """``timm.models.swin_transformer.SwinTransformer``. Windows lie in the batch: a call's B is images times windows."""

    family, name, module = "Swin of timm", "SwinTransformer", "swin_transformer"

    def depths(self, model: Any) -> list[list[str]]:
        return [[f"layers.{i}.blocks.{j}" for j in range(len(layer.blocks))] for i, layer in enumerate(model.layers)]

    def grid(self, model: nn.Module, size: Sequence[int]) -> Grid | None:
        """The last stage's, where its attention sees all of it in images of the size that the model was built for."""
        last: Any = model.get_submodule(self.blocks(model)[-1])
        return None if _in_windows(last) else self.grids(model, size)[-1]

    def grids(self, model: Any, size: Sequence[int]) -> list[Grid]:
        """Two by two tokens become one between two stages; what is odd is padded."""
        height, width = model.patch_embed.dynamic_feat_size(size)
        found = [(height, width)]
        for _ in model.layers[1:]:
            height, width = (height + 1) // 2, (width + 1) // 2
            found.append((height, width))
        return found

    def block_tokens(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output.flatten(1, 2)  # [B, H, W, D]

    def window(self, model: nn.Module, path: str) -> str | None:
        block: Any = model.get_submodule(path.rpartition(".")[0])
        if self.stage(model, path) == -1 and not _in_windows(block):
            return None
        sizes = (*block.input_resolution, *block.window_size, *block.shift_size)
        return "grid {}x{}, windows of {}x{}, shifted by {}x{}".format(*sizes)

    def tokens(self, model: Any, images: Tensor) -> Tensor:
        return model.forward_features(images).flatten(1, 2)  # [B, H, W, D]

    def run(self, model: Any, images: Tensor, train_head: bool) -> tuple[Tensor, Tensor | None]:
        features = model.forward_features(images)
        with torch.set_grad_enabled(train_head and torch.is_grad_enabled()):
            return features.flatten(1, 2), model.forward_head(features)


class PiT(_Staged):
    """``timm.models.pit.PoolingVisionTransformer``. Its class token goes through all stages."""

    family, name, module = "PiT of timm", "PoolingVisionTransformer", "pit"

    def depths(self, model: Any) -> list[list[str]]:
        return [
            [f"transformers.{i}.blocks.{j}" for j in range(len(stage.blocks))]
            for i, stage in enumerate(model.transformers)
        ]

    def layout(self, model: nn.Module) -> TokenLayout:
        prefix, width = model.num_tokens, model.num_features
        return TokenLayout(prefix, True, width)  # type: ignore[arg-type]

    def grid(self, model: nn.Module, size: Sequence[int]) -> Grid:
        return self.grids(model, size)[-1]

    def grids(self, model: Any, size: Sequence[int]) -> list[Grid]:
        """Between two stages is a convolution of stride 2 and kernel 3, padded by 1."""
        found = [tuple(model.patch_embed.grid_size)]
        for _ in model.transformers[1:]:
            height, width = found[-1]
            found.append(((height - 1) // 2 + 1, (width - 1) // 2 + 1))
        return found

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        return model.patch_embed.img_size  # type: ignore[union-attr, return-value]

    def tokens(self, model: Any, images: Tensor) -> Tensor:
        """``forward_features`` puts out the class token alone."""
        patches = model.pos_drop(model.patch_embed(images) + model.pos_embed)
        patches, prefix = model.transformers((patches, model.cls_token.expand(len(images), -1, -1)))
        return model.norm(torch.cat([prefix, patches.flatten(2).mT], 1))

    def head(self, model: Any, tokens: Tensor) -> Tensor:
        return model.forward_head(tokens[:, : model.num_tokens])


class Hiera(_Staged):
    """``timm.models.hiera.Hiera``. The first stages attend in windows (mask units), and the first block of a stage pools its queries.

    Its tokens are not in row-major order but before the last pooling, so maps of earlier stages are compared with those of the same order alone.
    """

    family, name, module = "Hiera of timm", "Hiera", "hiera"

    def depths(self, model: Any) -> list[list[str]]:
        ends = [end + 1 for end in model.stage_ends]
        return [[f"blocks.{j}" for j in range(a, b)] for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def stages(self, model: Any) -> list[int]:
        """A block that pools its queries is a stage of its own: no other has its rows."""
        return [len(self.depths(model)[0]), *(n for stage in self.depths(model)[1:] for n in (1, len(stage) - 1))]

    def grid(self, model: Any, size: Sequence[int]) -> Grid | None:
        """The last stage's, where its attention sees all of it and its order is row-major: every step of the unrolling was pooled."""
        last = model.blocks[-1].attn
        steps = len(model.stage_ends) - 1
        if last.use_mask_unit_attn or model.q_pool != steps:
            return None
        height, width = (a // b**steps for a, b in zip(model.tokens_spatial_shape, model.q_stride, strict=True))
        return height, width

    def order(self, model: Any, path: str) -> str | None:
        stage = self.stage(model, path)
        return None if stage == -1 and self.grid(model, ()) is not None else self._units(model, stage)

    def window(self, model: Any, path: str) -> str | None:
        attention, stage = model.get_submodule(path), self.stage(model, path)
        if attention.q_stride == 1 and self.order(model, path) is None:
            return None
        said = self._units(model, stage)
        if attention.use_mask_unit_attn:
            said += f", windows of {attention.window_size}"
        return said + (f", queries pooled by {attention.q_stride}" if attention.q_stride > 1 else "")

    def _units(self, model: Any, stage: int) -> str:
        grid, unit, stride = (
            "x".join(map(str, sizes)) for sizes in (model.tokens_spatial_shape, model.mask_unit_size, model.q_stride)
        )
        steps = len(model.stage_ends) - 1
        return f"grid {grid} in units of {unit}, stage {stage + steps + 2} of {steps + 1} with {model.q_pool} poolings by {stride}"

    def drops_patches(self, model: nn.Module) -> bool:
        return bool(model.patch_drop_rate) and model.training

    def image_size(self, model: Any) -> tuple[int, int]:
        height, width = (a * b for a, b in zip(model.tokens_spatial_shape, model.patch_stride, strict=True))
        return height, width

    def normalised(self, model: Any, tokens: Tensor) -> Tensor:
        """Its norm is in its head, behind the mean of the tokens; the same norm serves all of them."""
        return model.head.norm(tokens)

    def check_features(self, label: str, model: nn.Module) -> None:
        """Every Hiera has that norm."""


class MaxxVit(_Staged):
    """``timm.models.maxxvit.MaxxVit``: MaxViT, CoAtNet and their relatives. Every attention is a block: over windows, over grids (every s-th token
    in height and width), or over all tokens of its stage. Windows and grids lie in the batch. The first stages of a CoAtNet have none.
    """

    family, name, module = "MaxViT and CoAtNet of timm", "MaxxVit", "maxxvit"

    def depths(self, model: Any) -> list[list[str]]:
        found = []
        for i, stage in enumerate(model.stages):
            paths = [f"stages.{i}.{path}" for path, part in stage.named_modules() if hasattr(part, "fused_attn")]
            parts = [path.rpartition(".")[0] for path in paths]
            found.append([part if parts.count(part) == 1 else path for path, part in zip(paths, parts, strict=True)])
        return found

    def grid(self, model: Any, size: Sequence[int]) -> Grid | None:
        """The last stage's, where the last attention sees all of it in images of the size that the model was built for."""
        last = [path for path, part in model.named_modules() if hasattr(part, "fused_attn")][-1]
        return self.grids(model, size)[-1] if self.window(model, last) is None else None

    def grids(self, model: Any, size: Sequence[int]) -> list[Grid]:
        strides = [info["reduction"] for info in model.feature_info[-len(model.stages) :]]
        return [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]

    def window(self, model: Any, path: str) -> str | None:
        part, stage = model.get_submodule(path.rpartition(".")[0]), self.stage(model, path)
        grid = self.grids(model, model.img_size)[stage]
        size = tuple(getattr(part, "partition_size", grid))
        if size == grid:
            return None if stage == -1 else "all of a grid of {}x{}".format(*grid)
        side_by_side = getattr(part, "partition_block", path.endswith("attn_block"))
        kind = "windows of {}x{}" if side_by_side else "{}x{} tokens, spread over the whole"
        return "grid {}x{}, ".format(*grid) + kind.format(*size)

    def block_tokens(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        channels_first = type(block).__name__.endswith("2d")
        return output.flatten(2).mT if channels_first else output.flatten(1, 2)

    def tokens(self, model: Any, images: Tensor) -> Tensor:
        return model.forward_features(images).flatten(2).mT  # [B, D, H, W]

    def run(self, model: Any, images: Tensor, train_head: bool) -> tuple[Tensor, Tensor | None]:
        features = model.forward_features(images)
        with torch.set_grad_enabled(train_head and torch.is_grad_enabled()):
            return features.flatten(2).mT, model.forward_head(features)


def _in_windows(block: Any) -> bool:
    """Whether a block of a Swin attends over less than its whole grid."""
    return tuple(block.window_size) != tuple(block.input_resolution) or any(block.shift_size)
