"""`attnkd eval`: k-NN, linear probe and fine-tuning of a model; two models, or the results of several runs, side by side."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from attnkd import files
from attnkd.capture.loading import image_config, image_transform, load_model, load_saved
from attnkd.commands.eval_options import add_arguments as add_arguments
from attnkd.commands.eval_options import check_options, recipe_of
from attnkd.commands.options import check_format, choose_device, require
from attnkd.evaluation.agreement import alignment, look, overlap
from attnkd.evaluation.features import Features, batches, extract_together
from attnkd.evaluation.finetune import RECIPE, finetune
from attnkd.evaluation.knn import TEMPERATURE, knn
from attnkd.evaluation.linear import linear_probe
from attnkd.evaluation.results import as_text, compared, draw_pairs, in_short, paired, pairs_as_text
from attnkd.training.carrying import PRECISIONS, Carrying
from attnkd.training.config import saved_settings
from attnkd.training.distributed import World, joined
from attnkd.training.run import CONFIG, DESCRIPTION, WEIGHTS
from attnkd.training.sources import Source, open_source, subset, with_classes_of


class Asked(NamedTuple):
    """The model of a command, and where what is said about it goes."""

    name: str
    folder: Path | None
    """Of a run."""
    data: dict[str, Any]
    changed: dict[str, Any]
    """Options besides that change what is measured, where they are not what a plain evaluation of the run has."""
    suffix: str
    """Of file names, so that no result takes another's place; '' for the run's own data, all labels and nothing changed."""


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status. What is wrong is raised, see :func:`attnkd.commands.cli.main`."""
    check_options(args)
    if args.how == "compare":
        return _compare(args)
    if args.how == "agree":
        return _agree(args)
    with joined(choose_device(args.device)) as world:
        return _evaluate(args, world)


def _evaluate(args: argparse.Namespace, world: World) -> int:
    """knn, linear or finetune, on one process or on several."""
    asked = _asked(args, args.model)
    outputs = [
        path for path in (asked.folder and asked.folder / f"eval_{args.how}{asked.suffix}.json", args.json) if path
    ]
    for path in outputs if world.first else ():
        files.check_writable("json", path)
    if world.first and asked.folder is not None:
        _check_name(outputs[0], asked)
    model = _load(args, asked)
    config = image_config(model, img_size=args.img_size, mean=args.mean, std=args.std)
    train, val = _sources(args, asked, config)
    result: dict[str, Any] = {
        "evaluation": args.how,
        "model": asked.name,
        **asked.data,
        **{name: value for name, value in asked.changed.items() if name not in asked.data},
        "train_images": len(train.images),
        "val_images": len(val.images),
        "precision": args.precision,
        "seed": args.seed,
    }
    if world.first:
        print(
            f"{asked.name}: {result['val_images']} images of {asked.data['data']}, learnt from {result['train_images']}",
            flush=True,
        )
    if args.how == "finetune":
        found = _finetune(args, asked, model, config, train, val, world.device)
    else:
        found = _frozen(args, model.to(world.device), config, train, val, world)
    if found is None:
        return 0
    for path in outputs:
        files.write_json(path, result | found)
        print(f"wrote {path}")
    return 0


def _check_name(path: Path, asked: Asked) -> None:
    """Two data sets may be spelt alike in a file's name, where no slash can be."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [f"{name} {before[name]}" for name in ("data", "subset") if before[name] != asked.data[name]]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if other:
        raise ValueError(
            f"data: {path} has the result of {' and '.join(other)}, whose name is spelt alike; move it away"
        )


def _compare(args: argparse.Namespace) -> int:
    if args.picture is not None:
        if args.against is None:
            raise ValueError("picture: is of differences; give --against too")
        require({"matplotlib": "matplotlib"}, extra="demo")
        files.check_writable("picture", args.picture)
        check_format("picture", args.picture)
    runs, others = ([Path(name) for name in names] for names in (args.model, args.against or []))
    found: Any = compared(runs + others)
    if not found:
        raise ValueError(
            f"model: no results in {', '.join(args.model)}; attnkd eval knn, linear and finetune leave some"
        )
    print(as_text(found, runs + others))
    if args.against is not None:
        require({"scipy": "scipy"}, extra="train")
        found = paired(runs, others)
        print("\n" + pairs_as_text(found))
    if args.picture is not None:
        files.write_figure(args.picture, draw_pairs(found))
        print(f"wrote {args.picture}")
    if args.json is not None:
        files.write_json(args.json, found)
    return 0


def _agree(args: argparse.Namespace) -> int:
    if len(args.model) != 2:
        raise ValueError(f"model: agree takes two, got {len(args.model)}")
    if args.json is not None:
        files.check_writable("json", args.json)
    device = choose_device(args.device)
    data, seen = _asked(args, args.model[:1]).data, []
    for name in args.model:
        model = _load(args, _asked(args, [name], data["data"]))
        config = image_config(model, img_size=args.img_size, mean=args.mean, std=args.std)
        val = _validation(args, data, config)
        images = batches(val.images, image_transform(config), args.batch_size, args.workers)
        seen.append(look(model, _with_progress(images, "val"), device, PRECISIONS[args.precision]))
    found: dict[str, Any] = {"evaluation": "agree", "models": args.model, **data, "val_images": len(seen[0].labels)}
    print(f"{' and '.join(args.model)} on {found['val_images']} images of {data['data']}")
    if all(one.classes is not None for one in seen):
        found["overlap"] = overlap(*seen)._asdict()
        print(
            "".join(f"{name.replace('_', ' ')} {share:.2f} %   " for name, share in found["overlap"].items()).rstrip()
        )
    table = alignment(*seen)
    found["cka"] = table.tolist()
    print("CKA of the first model's blocks (rows) with the second's")
    for index, row in enumerate(found["cka"]):
        print(f"{index:>4}" + "".join(f"{value:>6.2f}" for value in row))
    if args.json is not None:
        files.write_json(args.json, found)
    return 0


def _asked(args: argparse.Namespace, models: list[str], default: str | None = None) -> Asked:
    if len(models) > 1:
        raise ValueError(f"model: {args.how} takes one, got {len(models)}")
    (name,) = models
    folder = Path(name) if (Path(name) / CONFIG).is_file() else None
    earlier = {} if folder is None else saved_settings("model", folder / CONFIG)
    wanted = default or args.data
    if wanted not in (None, earlier.get("data")):
        earlier = {**earlier, "data_root": None, "train_split": None, "val_split": None}  # of another data set
    data = {
        option: getattr(args, option) or earlier.get(option)
        for option in ("data", "data_root", "train_split", "val_split")
    }
    data["data"] = wanted or data["data"]
    if data["data"] is None:
        raise ValueError(f"data: expected a data set, got none (only a run's folder has one, and {name} is none)")
    parts = [] if data["data"] == earlier.get("data") else [data["data"]]
    if args.subset is not None and re.fullmatch(r"[\d.]+", args.subset) and not Path(args.subset).exists():
        with contextlib.suppress(ValueError):
            args.subset = f"{float(args.subset):g}"  # .50 is 0.5
    parts += [] if args.subset is None else [args.subset]
    plain: dict[str, Any] = {
        "train_split": earlier.get("train_split") or "train",
        "val_split": earlier.get("val_split") or "validation",
        "last_blocks": 1,
        "temperature": TEMPERATURE,
        **dict.fromkeys(("img_size", "mean", "std")),
        "model_kwargs": {},
    }
    changed = {name: getattr(args, name) for name in plain if getattr(args, name) not in (None, plain[name])}
    parts += [f"{name} {in_short(value)}" for name, value in changed.items()]
    suffix = "".join("_" + re.sub(r"[^\w.-]+", "_", part).strip("_") for part in parts)
    return Asked(name, folder, {**data, "subset": args.subset}, changed, suffix)


def _load(args: argparse.Namespace, asked: Asked) -> nn.Module:
    if asked.folder is None:
        return load_model("model", asked.name, args.checkpoint, **args.model_kwargs)
    if args.checkpoint is not None:
        raise ValueError(f"checkpoint: {asked.folder} is a run, and has its weights; leave it out")
    if not (asked.folder / WEIGHTS).is_file():
        raise ValueError(f"model: {asked.folder} has no {WEIGHTS} yet; let the run end first")
    return load_saved(asked.folder / WEIGHTS, **args.model_kwargs)


def _sources(args: argparse.Namespace, asked: Asked, config: dict[str, Any]) -> tuple[Source, Source]:
    """Labelled images to learn from, and those to score."""
    train = _source(args, asked.data, asked.data["train_split"] or "train", config)
    val = with_classes_of(train, _source(args, asked.data, asked.data["val_split"] or "validation", config))
    return (train if args.subset is None else subset(train, args.subset, args.seed)), val


def _validation(args: argparse.Namespace, data: dict[str, Any], config: dict[str, Any]) -> Source:
    """Images to look at, with the classes of the training images where there are any: those are the models'."""
    val = _source(args, data, data["val_split"] or "validation", config)
    try:
        train = _source(args, data, data["train_split"] or "train", config)
    except ValueError:
        return val
    return with_classes_of(train, val)


def _source(args: argparse.Namespace, data: dict[str, Any], split: str, config: dict[str, Any]) -> Source:
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    source = open_source(data["data"], split, root=data["data_root"], download=args.download, mode=mode)
    if not source.labelled:
        raise ValueError(f"data: {data['data']} has no labels to evaluate with")
    return source


def _frozen(
    args: argparse.Namespace, model: nn.Module, config: dict[str, Any], train: Source, val: Source, world: World
) -> dict[str, Any] | None:
    """k-NN or linear probe of the model's features; None on another process than the first."""
    values = {}
    for part, source in (("train", train), ("val", val)):
        values[part] = extract_together(
            model,
            source.images,
            image_transform(config),
            world,
            batch_size=args.batch_size,
            workers=args.workers,
            seen=functools.partial(_with_progress, part=part, show=world.first),
            last_blocks=args.last_blocks,
            precision=PRECISIONS[args.precision],
        )
    how = _knn if args.how == "knn" else _linear
    found = how(args, values, world)
    return {"last_blocks": args.last_blocks, **found} if world.first else None


def _knn(args: argparse.Namespace, values: dict[str, Features], world: World) -> dict[str, Any]:
    scores = knn(values["train"], values["val"], args.k, args.temperature, device=world.device, world=world)
    if world.first:
        print(f"{'k':>6}{'top-1 %':>10}{'top-5 %':>10}")
        for k, found in scores.items():
            print(f"{k:>6}{found['top1']:>10.2f}" + (f"{found['top5']:>10.2f}" if "top5" in found else ""))
    return {"temperature": args.temperature, "scores": {str(k): score for k, score in scores.items()}}


def _linear(args: argparse.Namespace, values: dict[str, Features], world: World) -> dict[str, Any]:
    if not world.first:  # the probe is small: one process trains it
        return {}
    hold_out, epochs = 0.1 if len(args.lr) > 1 else 0.0, 100 if args.epochs is None else args.epochs
    probe = linear_probe(
        values["train"], values["val"], epochs=epochs, rates=args.lr, hold_out=hold_out, seed=args.seed, device=world.device
    )  # fmt: skip
    print(f"{'lr':>10}{'held out, top-1 %':>20}")
    for rate, score in probe.held_out.items() if hold_out else ():
        print(f"{rate:>10g}{score:>20.2f}{' *' if rate == probe.lr else ''}")
    _show(probe.top1, probe.top5)
    return {
        "epochs": epochs,
        "lr": probe.lr,
        "held_out": {str(rate): score for rate, score in probe.held_out.items()},
        "top1": probe.top1,
        "top5": probe.top5,
    }


def _finetune(
    args: argparse.Namespace,
    asked: Asked,
    model: nn.Module,
    config: dict[str, Any],
    train: Source,
    val: Source,
    device: torch.device,
) -> dict[str, Any] | None:
    """The result; None if it was asked to stop before its end."""
    folder = args.output or (asked.folder and asked.folder / f"finetune{asked.suffix}")
    if folder is None:
        raise ValueError("output: expected a folder for the fine-tuned model, got none (only a run has one)")
    recipe, layer_decay = recipe_of(args)
    settings = {**asked.data, "model": asked.name, "description": _description(args, asked)}
    carrying = Carrying(at_once=args.batch_size, workers=args.workers, precision=args.precision)
    found = finetune(
        model, train, val, folder, config, settings,
        recipe=recipe, layer_decay=layer_decay, carrying=carrying, seed=args.seed, device=device,
    )  # fmt: skip
    if not found.finished:
        print(f"step {found.steps} of {found.total}: stopped and saved; run the same command again to continue")
        return None
    if found.top1 is None:
        return None  # another process than the first
    _show(found.top1, found.top5)
    changed = {name: value for name, value in vars(recipe).items() if value != getattr(RECIPE, name)}
    return {
        "folder": str(folder),
        "epochs": recipe.epochs,
        "recipe": {**changed, "layer_decay": layer_decay},
        "top1": found.top1,
        "top5": found.top5,
    }


def _description(args: argparse.Namespace, asked: Asked) -> dict[str, Any]:
    """``timm.create_model`` arguments of the model."""
    saved = asked.folder / DESCRIPTION if asked.folder else Path(asked.name).with_suffix(".json")
    base = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {"model_name": asked.name}
    return {**base, **args.model_kwargs}


def _show(top1: float, top5: float | None) -> None:
    print(f"top-1 {top1:.2f} %" + ("" if top5 is None else f", top-5 {top5:.2f} %"))


def _with_progress(data: Any, part: str, show: bool = True) -> Any:
    from tqdm.auto import tqdm

    hide = None if show else True  # None: only where standard error is no terminal
    return tqdm(data, desc=f"{part} features", unit="batch", leave=False, disable=hide, file=sys.stderr)
