"""What the package must know of a model, and how a model of another kind says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnkd.attention.checks import integer

Grid = tuple[int, int]
"""(height, width) in patches."""
_POSITION_OR_TOKEN = re.compile(r"pos(ition(al)?)?_embed|relative_position_bias|class_embedding$|_tokens?$")


@dataclass(frozen=True)
class TokenLayout:
    """The tokens that a model puts out: [class token?, other prefix tokens, patches in row-major order].

    num_prefix_tokens: class token, distillation token and registers together.
    has_cls: whether token 0 is a class token. Prefix tokens alone do not imply one: several models have only registers.
    feature_dim: width of the tokens.
    """

    num_prefix_tokens: int
    has_cls: bool
    feature_dim: int


class Adapter:
    """What one family of Vision Transformers is: where its blocks are, what its tokens are, how its features are made.

    Subclass it, override what differs, and hand it to :func:`attnkd.capture.adapters.register_adapter`: then
    ``AttentionTap(model, -1)`` and the four methods take the model. An adapter has no state: every method takes the
    model, so that copies of a model (EMA, deepcopy) need nothing of it.
    """

    family = "models of your own"

    def takes(self, model: nn.Module) -> bool:
        """Whether this adapter speaks for the model. Cheap, and True for no model of another family."""
        raise NotImplementedError

    def refuses(self, model: nn.Module) -> str | None:
        """Why a model of this family's library is not taken, for the message; None where there is nothing to say."""
        return None

    def blocks(self, model: nn.Module) -> list[str] | None:
        """The paths of the model's blocks in running order; None where they are its one list of modules with an attention each."""
        return None

    def stages(self, model: nn.Module) -> list[int] | None:
        """The numbers of blocks in the stages of a model whose grid shrinks on the way; None for one grid."""
        return None

    def window(self, model: nn.Module, path: str) -> str | None:
        """Over which tokens an attention runs, in words: two maps are compared only where these are equal. None: over all that the model
        puts out."""
        return None

    def order(self, model: nn.Module, path: str) -> str | None:
        """In what order the tokens of a block lie, in words: blocks are compared token by token only where these are equal. None: that of
        the patches on a grid of :meth:`grids`."""
        return None

    def block_tokens(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """What a block called with ``args`` put out, as tokens [B, N, D]."""
        listed = (
            isinstance(output, (tuple, list)) and output
        )  # Hugging Face: (tokens, attentions); DINOv3: a list of batches
        return output[0] if listed else output

    def vocabulary(self, model: nn.Module) -> int | None:
        """The number of words that a text encoder knows; None for a model that takes images."""
        return None

    def layout(self, model: nn.Module) -> TokenLayout:
        """What the final tokens are, see :class:`TokenLayout`."""
        raise NotImplementedError

    def grid(self, model: nn.Module, size: Sequence[int]) -> Grid | None:
        """(height, width) in patches into which images of ``size`` (height, width in pixels) are cut; None if unknown."""
        return None

    def grids(self, model: nn.Module, size: Sequence[int]) -> list[Grid]:
        """Those of a model's stages, where its tokens are in row-major order; the last is :meth:`grid`."""
        grid = self.grid(model, size)
        return [] if grid is None else [grid]

    def drops_patches(self, model: nn.Module) -> bool:
        """Whether a forward now leaves patches out, so that those left form no grid."""
        return False

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """images [B, C, H, W] → the model's output: class scores [B, K] of a classifier."""
        return model(images)

    def pooling(self, model: nn.Module) -> str | None:
        """The path of the attention that pools the final tokens with a query of its own; None where nothing does."""
        return None

    def class_token_pools(self, model: nn.Module) -> bool:
        """Whether the class token's final state is what the head, or a user of the features, takes."""
        return self.layout(model).has_cls

    def tokens(self, model: nn.Module, images: Tensor) -> Tensor:
        """images [B, C, H, W] → the final tokens [B, P + N, D] in the order of :meth:`layout`, as the head takes them."""
        raise NotImplementedError

    def normalised(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Final tokens [B, N, D] after the model's last norm, token by token: where :meth:`tokens` come without it."""
        return tokens

    def head(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """The output that :meth:`forward` has, from what :meth:`tokens` gives."""
        raise NotImplementedError

    def run(self, model: nn.Module, images: Tensor, train_head: bool) -> tuple[Tensor, Tensor | None]:
        """Final tokens and output of one forward.

        Args:
            train_head: whether a loss uses the output. Without one the output has no gradient, or is None where it cannot be had
                from the tokens.
        """
        tokens = self.tokens(model, images)
        with torch.set_grad_enabled(train_head and torch.is_grad_enabled()):
            return tokens, self.head(model, tokens)

    def separate_heads(self, model: nn.Module, apart: bool) -> bool | None:
        """Let a model with a distillation token (DeiT) return the scores of both heads in training mode, (class token's, distillation
        token's), or one output again, as it always does in evaluation.

        Returns:
            How it was before; None where no distillation token has a head of its own.

        Raises:
            NotImplementedError: it has two heads, and its library never returns them apart.
        """
        return None

    def check_features(self, label: str, model: nn.Module) -> None:
        """Refuse a model whose final tokens are not normalised, so that they cannot be compared.

        Raises:
            ValueError: names ``label``.
        """

    def num_classes(self, model: nn.Module) -> int | None:
        """The number of classes that the output scores; 0 without a classifier, None where unknown."""
        return integer(getattr(model, "num_classes", None))

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        """The one image size (height, width) that the model accepts, or None when it accepts several."""
        return None

    def input_stats(self, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation with which images were normalised in pretraining, where the model says: timm's models do, in
        ``pretrained_cfg``, and models of other libraries that were built by name. Those of colour images say nothing about a
        model that was built for others."""
        cfg: Any = getattr(model, "pretrained_cfg", None) or {}
        mean, std = cfg.get("mean"), cfg.get("std")
        if mean is None or std is None or len(mean) != (self.input_channels(model) or len(mean)):
            return None
        return tuple(mean), tuple(std)

    def input_channels(self, model: nn.Module) -> int | None:
        """The number of image channels the model takes, if it says."""
        embed = self.embedding(model)
        for module in embed.modules() if embed is not None else ():
            if isinstance(module, nn.Conv2d):
                return module.in_channels
        return None

    def no_weight_decay(self, model: nn.Module) -> set[str]:
        """Names of parameters that have no weight decay beside biases and norms: the model's own list, else its position embeddings,
        position biases and tokens (class, distillation, mask, registers), as in timm's models."""
        own: Any = getattr(model, "no_weight_decay", None)
        if own is not None:
            return set(own())
        return {name for name, _ in model.named_parameters() if _POSITION_OR_TOKEN.search(name)}

    def embedding(self, model: nn.Module) -> nn.Module | None:
        """The module that takes the images: the dtype of its parameters is the one in which the model wants them."""
        return None


def pair(size: Any) -> Grid | None:
    """(height, width) of a size that libraries give as one number or as two; None for anything else."""
    values = list(size) if isinstance(size, Sequence) else [size, size]
    height, width = map(integer, values) if len(values) == 2 else (None, None)
    return None if height is None or width is None else (height, width)


def cut(size: Sequence[int], patch: Any) -> Grid | None:
    """The grid into which patches of ``patch`` pixels (one number or two) cut images of ``size``; a rest is left out."""
    patches = pair(patch)
    return None if patches is None else (size[0] // patches[0], size[1] // patches[1])
