"""Which heads of a Vision Transformer matter: the accuracy that is lost when a head's attention is set to zero.

Wu et al.: Self-supervised Models are Good Teaching Assistants for Vision Transformers (SSTA), ICML 2022. Used to choose the
teachers' heads for :class:`attnkd.methods.ssta.SSTA`; see docs/methods/ssta.md.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from attnkd import files
from attnkd.capture.adapters import adapter_or_plain
from attnkd.capture.blocks import Blocks, attention_paths, block_around, plain_class
from attnkd.capture.models import evaluating, num_classes
from attnkd.methods.silence import copies, silenced
from attnkd.methods.whole_map import num_heads

SELECTIONS = ("importance", "average", "random")


@dataclass
class HeadImportance:
    """How many held-out images a model gets right with every combination of one silenced head a block.

    paths: the attentions, in running order. heads: their numbers of heads. images: how many were seen. full: how many of
    them the whole model gets right. correct: how many with heads silenced: [H1][H2]… for combinations over blocks, a
    list [H] a block without combinations.
    """

    model: str
    paths: list[str]
    heads: list[int]
    combinations: bool
    images: int = 0
    full: int = 0
    correct: list = field(default_factory=list)
    batches: int = 0
    targets_crc: int = 0
    weights_crc: int = 0
    complete: bool = False

    @property
    def accuracy(self) -> float:
        """Of the whole model, 0 to 1."""
        return self.full / self.images

    def importance(self) -> list[Tensor]:
        """I = Acc(full) − Acc(head's attention set to zero), in shares of 1, float64.

        One tensor [H1, H2, …] with combinations (entry [i, j, …]: head i of the first block, j of the second, … silenced
        together), one tensor [H] a block without. Negative where the model is better without.
        """
        return [(self.full - count.double()) / self.images for count in self.counts()]

    def counts(self) -> list[Tensor]:
        """``correct`` as int64 tensors of the same shapes."""
        return [torch.tensor(count) for count in ([self.correct] if self.combinations else self.correct)]

    def set_counts(self, counts: Sequence[Tensor]) -> None:
        """Replace ``correct``."""
        self.correct = counts[0].tolist() if self.combinations else [count.tolist() for count in counts]

    def best(self) -> list[int]:
        """The head to choose in every block: the combination whose loss costs most, the first one of equals."""
        best = [torch.unravel_index(tensor.flatten().argmax(), tensor.shape) for tensor in self.importance()]
        return [int(head) for combination in best for head in combination]

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON in one step: a reader finds the old file or the new one, whole."""
        files.write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> HeadImportance:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not such a file.
        """
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: is not a saved HeadImportance ({error}); delete it to start again") from error


@torch.no_grad()
def head_importance(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    blocks: Blocks = (-3, -2, -1),
    *,
    combinations: bool = True,
    classifier: Callable[[Tensor], Tensor] | None = None,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    distributed: bool = False,
    path: str | os.PathLike | None = None,
    max_batch: int = 1024,
    progress: bool = True,
) -> HeadImportance:
    """Accuracy on a held-out loader with heads silenced, for every head or every combination of one head a block.

    The images of a batch run through the unaltered lower blocks once; at every block of ``blocks`` the batch is then
    multiplied by its heads; before the first block, if the model uses the outputs of several blocks. All combinations over the last three of 12 blocks with 6 heads (6³ = 216) so cost 9 + 6 + 36 + 216
    blocks an image instead of 216 · 12.

    Args:
        model: a model of images on the loader's device; put in evaluation mode, otherwise unchanged.
        loader: (images [B, C, H, W], class indices [B]) in an order that does not change from run to run. Of any length: it is
            read once, batch by batch.
        blocks: index, sequence of indices, 'all', or module paths of attentions.
        combinations: one head a block silenced at a time in all combinations; False silences one head alone.
        classifier: from the model's output to class scores [B, classes], for a model without classifier (a linear
            probe). None takes the output as scores.
        forward: (model, images [B, C, H, W]) → the output, in place of ``model(images)``: for a classifier that reads something
            else, such as the class tokens of four blocks (:func:`attnkd.evaluation.features.class_tokens`).
        distributed: every process of the default group calls this with its own share of the images, each of which must be in one
            share only (``DistributedSampler`` repeats some), and gets the sum over all. With ``path`` a process keeps its
            own share's counts in a file beside it, and the first one writes the sum.
        path: JSON file for the result. It is rewritten after every batch; an unfinished one is continued, a finished one
            of the same model and settings is returned.
        max_batch: most images, copies included, that run through a block at once.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: wrong blocks, a model without classifier and none given, labels that are no classes of it, a loader
            without images, a file of another model, settings or data.
        RuntimeError: an attention that does not call ``F.scaled_dot_product_attention``.
    """
    paths = attention_paths(model, blocks)
    owners = [block_around(model, path) for path in paths]
    running = [name for name, _ in model.named_modules() if name in owners]
    if owners != running:
        raise ValueError(f"blocks: expected at most one attention a block, in running order, got {paths}")
    heads = [num_heads(model, name) for name in paths]
    if not distributed:
        return _search(
            model,
            loader,
            _start(model, paths, heads, combinations, path),
            classifier,
            forward,
            path,
            max_batch,
            progress,
        )
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    total = _start(model, paths, heads, combinations, path)
    device = next(model.parameters()).device
    if _summed([int(total.complete)], device) == [size]:
        return total
    share = None if path is None else Path(f"{os.fspath(path)}.{rank}of{size}")
    own = _start(model, paths, heads, combinations, share)
    own = _search(model, loader, own, classifier, forward, share, max_batch, progress and rank == 0, may_be_empty=True)
    counts = own.counts()
    numbers = _summed([own.images, own.full, own.batches, *(int(x) for c in counts for x in c.flatten())], device)
    total.images, total.full, total.batches = numbers[:3]
    parts = torch.tensor(numbers[3:]).split([c.numel() for c in counts])
    total.set_counts([part.view(count.shape) for part, count in zip(parts, counts, strict=True)])
    total.complete = True
    if total.images == 0:
        raise ValueError("loader: expected images, got none on any process")
    if path is not None and rank == 0:
        total.save(path)
    return total


def _summed(numbers: list[int], device: torch.device) -> list[int]:
    """Every number's sum over all processes."""
    values = torch.tensor(numbers, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(values)
    return values.tolist()


def _search(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    result: HeadImportance,
    classifier: Callable[[Tensor], Tensor] | None,
    forward: Callable[[nn.Module, Tensor], Tensor] | None,
    path: str | os.PathLike | None,
    max_batch: int,
    progress: bool,
    may_be_empty: bool = False,
) -> HeadImportance:
    """Count on, from what ``result`` has, to the end of the loader."""
    if result.complete:
        return result
    counts = result.counts()
    searches = [result.paths] if result.combinations else [[name] for name in result.paths]
    device = next(model.parameters()).device
    count_right = _Counter(model, forward, classifier, max_batch)
    crc, bar = 0, _progress(progress, loader)
    with evaluating(model):
        for index, (images, targets) in enumerate(bar):
            crc = zlib.crc32(targets.cpu().numpy().tobytes(), crc)
            if index < result.batches:
                if index + 1 == result.batches and crc != result.targets_crc:
                    raise ValueError(
                        f"loader: other targets than in the unfinished search at {path}; it must give the same batches in "
                        "the same order (shuffle=False), or delete the file to start again"
                    )
                continue
            images, labels = images.to(device), targets.to(device)
            scores = count_right.scores(images)
            bare = classifier is None and forward is None and num_classes(model) == 0
            _check_scores(scores, targets, getattr(model, "num_features", None) if bare else None)
            result.full += int((scores.argmax(-1) == labels).sum())
            for search, count in zip(searches, counts, strict=True):
                size = max(1, max_batch // math.prod(count.shape[_first_spread(count.shape, max_batch) :]))
                for chunk, right in zip(images.split(size), labels.split(size), strict=True):
                    count += count_right(chunk, right, search, count.shape)
            result.images += len(images)
            result.batches, result.targets_crc = index + 1, crc
            result.set_counts(counts)
            if path is not None:
                result.save(path)
    if result.images == 0 and not may_be_empty:
        raise ValueError("loader: expected images, got none")
    result.complete = True
    if path is not None:
        result.save(path)
    return result


def _check_scores(scores: Tensor, targets: Tensor, features: int | None) -> None:
    """Refuse what would be counted as wrong, or right, without a word.

    Args:
        features: of a model that says it has no classifier: as many numbers are its features. Others may be class scores of its own.
    """
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"model: expected class scores [B, classes], got {got}; give classifier= or forward=")
    if scores.shape[1] == features:
        raise ValueError(
            f"model: has no classifier (num_classes = 0) and puts out its {features} features, and without one no image is right or wrong; "
            "give classifier=, from its output to class scores, such as a linear probe"
        )
    if targets.shape != scores.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"loader: expected class indices [{len(scores)}], one for each image, got {targets.dtype} {tuple(targets.shape)}"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= scores.shape[1]:
        raise ValueError(
            f"loader: expected class indices from 0 to {scores.shape[1] - 1}, as many as the model or classifier has, got "
            f"{low} to {high}; give a classifier= of these classes"
        )


def select_heads(
    selection: str,
    model: nn.Module,
    blocks: Blocks = (-3, -2, -1),
    *,
    importance: HeadImportance | None = None,
    seed: int = 0,
) -> list[int] | str:
    """The teacher heads for :class:`attnkd.methods.ssta.SSTA`, one for every block, in running order.

    Args:
        selection: 'importance': the most important ones of ``importance``; 'random': drawn with ``seed``; 'average': the
            string 'average', with which the student imitates the mean of all heads.
        model: the teacher.
        blocks: its blocks; with 'importance' those that were searched.

    Raises:
        ValueError: an unknown selection, or importance that is missing, unfinished or of other blocks.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection: expected one of {', '.join(map(repr, SELECTIONS))}, got {selection!r}")
    if selection == "average":
        return "average"
    paths = attention_paths(model, blocks)
    if selection == "random":
        generator = torch.Generator().manual_seed(seed)
        return [int(torch.randint(num_heads(model, name), (), generator=generator)) for name in paths]
    if importance is None or not importance.complete:
        raise ValueError("importance: 'importance' needs the finished result of head_importance")
    if importance.paths != paths:
        raise ValueError(f"importance: expected a search over {paths}, got one over {importance.paths}")
    return importance.best()


def _start(
    model: nn.Module, paths: list[str], heads: list[int], combinations: bool, path: str | os.PathLike | None
) -> HeadImportance:
    """An empty result, or the one at ``path`` if it belongs to this model and these settings."""
    crc = 0
    for parameter in model.state_dict().values():
        crc = zlib.crc32(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), crc)
    shapes = [heads] if combinations else [[count] for count in heads]
    fresh = HeadImportance(plain_class(model).__name__, paths, heads, combinations, weights_crc=crc)
    fresh.set_counts([torch.zeros(shape, dtype=torch.int64) for shape in shapes])
    if path is None or not Path(path).exists():
        return fresh
    found = HeadImportance.load(path)
    for name in ("model", "paths", "heads", "combinations", "weights_crc"):
        if getattr(found, name) != getattr(fresh, name):
            raise ValueError(
                f"path: {path} belongs to another search ({name} is {getattr(found, name)}, here {getattr(fresh, name)}); "
                "choose another file or delete it"
            )
    return found


def _first_spread(shape: Sequence[int], max_batch: int) -> int:
    """From which block on the heads are spread over the batch; those of earlier blocks run one after another."""
    first = len(shape)
    while first > 0 and math.prod(shape[first - 1 :]) <= max_batch:
        first -= 1
    return first


class _Counter:
    """Counts right images with every combination of heads silenced."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module, Tensor], Tensor] | None,
        classifier: Callable[[Tensor], Tensor] | None,
        max_batch: int,
    ) -> None:
        self.model, self.forward, self.classifier, self.max_batch = model, forward, classifier, max_batch
        self.at_once = False

    def scores(self, images: Tensor) -> Tensor:
        """Class scores [B, classes] of the model as it is now."""
        output = (self.forward or adapter_or_plain(self.model).forward)(self.model, images)
        return output if self.classifier is None else self.classifier(output)

    def __call__(self, images: Tensor, targets: Tensor, search: Sequence[str], shape: Sequence[int]) -> Tensor:
        """[H1, H2, …]: how many of the images are right with that combination of heads silenced."""
        first = _first_spread(shape, self.max_batch)
        counts = torch.zeros(tuple(shape), dtype=torch.int64)
        for fixed in itertools.product(*(range(size) for size in shape[:first])):
            output = self._output(images, dict(zip(search, (*fixed, *[None] * (len(shape) - first)), strict=True)))
            right = output.argmax(-1).view(len(images), *shape[first:]) == targets.view(-1, *[1] * (len(shape) - first))
            counts[fixed] = right.sum(0).cpu()
        return counts

    def _output(self, images: Tensor, heads: dict[str, int | None]) -> Tensor:
        if not self.at_once:
            try:
                with silenced(self.model, heads):
                    return self.scores(images)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # What puts outputs of several blocks together cannot run with batches that grow from block to
                # block. If that is not the reason, the next lines raise the same error.
                self.at_once = True
        images = images.repeat_interleave(copies(self.model, heads), 0)
        with silenced(self.model, heads, at_once=len(images)):
            return self.scores(images)


def _progress(show: bool, loader: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
    from tqdm.auto import tqdm

    return tqdm(loader, desc="head importance", unit="batch", disable=not show)
