"""The options of `attnkd eval`: which evaluation uses which, and what they may be."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from attnkd.commands.options import ByName, add_loading, several
from attnkd.evaluation.finetune import LAYER_DECAY, RECIPE
from attnkd.evaluation.knn import KS, TEMPERATURE
from attnkd.evaluation.linear import RATES
from attnkd.evaluation.results import in_short
from attnkd.methods.recipes import Recipe
from attnkd.training.carrying import PRECISIONS

ALL = ("knn", "linear", "finetune", "agree")
LEARNT = ("knn", "linear", "finetune")
TAKEN_BY = {
    "json": (*ALL, "compare"),
    "against": ("compare",),
    "picture": ("compare",),
    "k": ("knn",),
    "temperature": ("knn",),
    "last_blocks": ("knn", "linear"),
    "lr": ("linear",),
    "epochs": ("linear", "finetune"),
    "recipe": ("finetune",),
    "output": ("finetune",),
    "subset": LEARNT,
    "train_split": LEARNT,
}
"""Which evaluations use an option; those that are not here all but compare."""
AT_LEAST = {"k": 1, "last_blocks": 1, "epochs": 1, "batch_size": 1, "workers": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Evaluates a model on a labelled data set. knn: the weighted k-NN classifier of DINO, on cosines of class tokens. "
        "linear: a linear classifier on them, trained by SGD; its learning rate is chosen on held-out training images. "
        "finetune: all weights are trained with a new classifier, as DeiT is, with layer-wise learning rates; the same command "
        "continues it. agree: how often two models predict the same, and the CKA of their blocks' features. compare: a table of what "
        "knn, linear and finetune left in the folders of several runs; with --against, differences of pairs of runs."
    )
    option = parser.add_argument
    option("how", choices=("knn", "linear", "finetune", "agree", "compare"), help="how to evaluate")
    option(
        "model",
        nargs="+",
        help="folder of a run of attnkd train, a model.safetensors with its .json, a timm model name or another library's (docs/models.md); agree: two of them; compare: several folders",
    )
    option(
        "--against",
        nargs="+",
        metavar="RUN",
        help="compare: as many other runs, of the same seeds, say; prints the mean difference of the pairs, its 95 %% interval, and p",
    )
    option(
        "--picture",
        type=Path,
        metavar="FILE",
        help="compare: a picture of the differences --against other runs (needs matplotlib)",
    )
    option("--data", metavar="SPEC", help="data set, as for attnkd train (default: the run's)")
    option("--data-root", metavar="DIR", help="where torch/ and hfds/ data sets are kept (default: the run's)")
    option("--download", action="store_true", help="fetch a torch/ data set")
    option("--train-split", metavar="NAME", help="labelled images (default: the run's, else train)")
    option("--val-split", metavar="NAME", help="images to score (default: the run's, else validation)")
    option(
        "--subset", metavar="X", help="of the labelled images: a share of every class, such as 0.01, or a file of names"
    )
    option("--checkpoint", type=Path, metavar="FILE", help="weights for a model given by name")
    option(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ByName,
        metavar="K=V",
        help="arguments of a model given by name",
    )
    option("--img-size", type=int, metavar="N", help="image size (default: the model's)")
    option("--mean", type=several(float), nargs="+", metavar="X", help="image mean per channel (default: the model's)")
    option("--std", type=several(float), nargs="+", metavar="X", help="image standard deviation (default: the model's)")
    option("--last-blocks", type=int, metavar="N", default=1, help="class tokens of so many blocks (default: 1)")
    option(
        "--k",
        type=several(int),
        nargs="+",
        default=list(KS),
        metavar="K",
        help="knn: neighbours (default: 10 20 100 200)",
    )
    option("--temperature", type=float, default=TEMPERATURE, metavar="T", help="knn: of the votes (default: 0.07)")
    option(
        "--lr",
        type=several(float),
        nargs="+",
        default=list(RATES),
        metavar="X",
        help="linear: learning rates to choose from",
    )
    option("--epochs", type=int, metavar="N", help="linear, finetune: (default: 100)")
    option(
        "--recipe",
        nargs="*",
        default={},
        action=ByName,
        metavar="K=V",
        help="finetune: numbers of attnkd.methods.recipes.Recipe, such as batch_size=256 mixup=0, and layer_decay",
    )
    option("--output", type=Path, metavar="DIR", help="finetune: its folder (default: finetune in the run's folder)")
    add_loading(parser)
    option("--precision", choices=tuple(PRECISIONS), default="fp32", help="of the model's autocast (default: fp32)")
    option("--seed", type=int, default=0, help="of everything random (default: 0)")
    option("--device", metavar="NAME", help="a PyTorch device (default: cuda if there is one, else cpu)")
    option("--json", type=Path, metavar="FILE", help="also write the result here (a run has it in its folder)")


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that this evaluation would not look at, and numbers out of range, before any work."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, default in vars(parser.parse_args([args.how, "model"])).items():
        users = TAKEN_BY.get(name, ALL)
        if name not in ("how", "model") and getattr(args, name) != default and args.how not in users:
            raise ValueError(f"{name}: is for {', '.join(users)}, not for {args.how}")
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < least:
            raise ValueError(f"{name}: expected at least {least}, got {in_short(value)}")
    for name in ("temperature", "lr"):
        value = getattr(args, name)
        if not all(0 < number < math.inf for number in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{name}: expected finite numbers above 0, got {in_short(value)}")


def recipe_of(args: argparse.Namespace) -> tuple[Recipe, float]:
    """The recipe asked for, and layer_decay."""
    if args.epochs is not None and "epochs" in args.recipe:
        raise ValueError("epochs: is in --recipe too; give it once")
    numbers = {**({} if args.epochs is None else {"epochs": args.epochs}), **args.recipe}
    kinds = {**get_type_hints(Recipe), "layer_decay": float}
    unknown = sorted(numbers.keys() - kinds.keys())
    if unknown:
        raise ValueError(f"recipe: expected fields of Recipe, or layer_decay, got {', '.join(unknown)}")
    for name, value in numbers.items():
        if not _is_a(kinds[name], value):
            kind = kinds[name].__name__ if kinds[name] in (int, float, bool, str) else kinds[name]
            raise ValueError(f"--recipe {name}: expected {kind}, got {value!r}")
    layer_decay = numbers.pop("layer_decay", LAYER_DECAY)
    try:
        return replace(RECIPE, **numbers), layer_decay
    except ValueError as error:  # it begins with the field's name, and options of this command have the same names
        raise ValueError(f"--recipe {error}") from None


def _is_a(kind: Any, value: Any) -> bool:
    """Whether a value is of a type as a Recipe's fields have it; a whole number is a float too."""
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(parts) and all(map(_is_a, parts, value))
    if parts:
        return any(_is_a(part, value) for part in parts)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
