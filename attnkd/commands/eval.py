"""`attnkd eval`: k-NN and linear probe of a frozen model's class tokens."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnkd import files
from attnkd.capture.loading import image_config, image_transform, load_model, load_saved
from attnkd.commands.options import choose_device
from attnkd.evaluation.features import Features, batches, extract
from attnkd.evaluation.knn import KS, TEMPERATURE, knn
from attnkd.evaluation.linear import RATES, linear_probe
from attnkd.training.run import CONFIG, WEIGHTS
from attnkd.training.sources import open_source

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from timm.utils import ParseKwargs

    parser.description = (
        "Evaluates a frozen model on a labelled data set. knn: the weighted k-NN classifier of DINO, on cosines of class tokens. "
        "linear: a linear classifier on them, trained by SGD; its learning rate is chosen on held-out training images."
    )
    option = parser.add_argument
    option("how", choices=("knn", "linear"), help="what to do with the features")
    option("model", help="folder of a run of attnkd train, a model.safetensors with its .json, or a timm model name")
    option("--data", metavar="SPEC", help="data set, as for attnkd train (default: the run's)")
    option("--data-root", metavar="DIR", help="where torch/ and hfds/ data sets are kept (default: the run's)")
    option("--download", action="store_true", help="fetch a torch/ data set")
    option("--train-split", metavar="NAME", help="labelled images (default: the run's, else train)")
    option("--val-split", metavar="NAME", help="images to score (default: the run's, else validation)")
    option("--checkpoint", type=Path, metavar="FILE", help="weights for a model given by name")
    option("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="arguments of a timm model")
    option("--img-size", type=int, metavar="N", help="image size (default: the model's)")
    option("--mean", type=float, nargs="+", metavar="X", help="image mean per channel (default: the model's)")
    option("--std", type=float, nargs="+", metavar="X", help="image standard deviation (default: the model's)")
    option("--last-blocks", type=int, metavar="N", default=1, help="class tokens of so many blocks (default: 1)")
    option("--k", type=int, nargs="+", default=list(KS), metavar="K", help="knn: neighbours (default: 10 20 100 200)")
    option("--temperature", type=float, default=TEMPERATURE, metavar="T", help="knn: of the votes (default: 0.07)")
    option(
        "--lr", type=float, nargs="+", default=list(RATES), metavar="X", help="linear: learning rates to choose from"
    )
    option("--epochs", type=int, default=100, metavar="N", help="linear: (default: 100)")
    option("--batch-size", type=int, default=256, metavar="N", help="images at a time (default: 256)")
    option("--workers", type=int, default=4, metavar="N", help="processes that decode images (default: 4)")
    option("--precision", choices=tuple(PRECISIONS), default="fp32", help="of the model's autocast (default: fp32)")
    option("--seed", type=int, default=0, help="linear: of order and held-out images (default: 0)")
    option("--device", metavar="NAME", help="a PyTorch device (default: cuda if there is one, else cpu)")
    option("--json", type=Path, metavar="FILE", help="also write the result here (a run has it in its folder)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status. What is wrong is raised, see :func:`attnkd.commands.cli.main`."""
    device = choose_device(args.device)
    folder = Path(args.model) if (Path(args.model) / CONFIG).is_file() else None
    earlier = {} if folder is None else _settings(folder)
    data = {
        name: getattr(args, name) or earlier.get(name) for name in ("data", "data_root", "train_split", "val_split")
    }
    if data["data"] is None:
        raise ValueError("data: expected a data set, got none (only a run's folder has one)")
    outputs = [path for path in (folder and folder / f"eval_{args.how}.json", args.json) if path]
    for path in outputs:
        files.check_writable("json", path)
    model = _load(args, folder).to(device)
    values = _features(args, model, data, device)
    result: dict[str, Any] = {
        "evaluation": args.how,
        "model": args.model,
        **data,
        "train_images": len(values["train"].labels),
        "val_images": len(values["val"].labels),
        "last_blocks": args.last_blocks,
        "precision": args.precision,
    }
    print(f"{args.model}: {result['val_images']} images of {data['data']}, learnt from {result['train_images']}")
    if args.how == "knn":
        scores = knn(values["train"], values["val"], args.k, args.temperature, device=device)
        result |= {"temperature": args.temperature, "scores": {str(k): score for k, score in scores.items()}}
        print(f"{'k':>6}{'top-1 %':>10}{'top-5 %':>10}")
        for k, found in scores.items():
            print(f"{k:>6}{found['top1']:>10.2f}" + (f"{found['top5']:>10.2f}" if "top5" in found else ""))
    else:
        hold_out = 0.1 if len(args.lr) > 1 else 0.0
        probe = linear_probe(
            values["train"], values["val"], epochs=args.epochs, rates=args.lr, hold_out=hold_out, seed=args.seed, device=device
        )  # fmt: skip
        result |= {"epochs": args.epochs, "lr": probe.lr, "held_out": {str(k): v for k, v in probe.held_out.items()}}
        result |= {"top1": probe.top1, "top5": probe.top5, "seed": args.seed}
        print(f"{'lr':>10}{'held out, top-1 %':>20}")
        for rate, score in probe.held_out.items() if hold_out else ():
            print(f"{rate:>10g}{score:>20.2f}{' *' if rate == probe.lr else ''}")
        print(f"top-1 {probe.top1:.2f} %" + ("" if probe.top5 is None else f", top-5 {probe.top5:.2f} %"))
    for path in outputs:
        files.write_json(path, result)
        print(f"wrote {path}")
    return 0


def _settings(folder: Path) -> dict[str, Any]:
    """A run's settings, as its config.yaml has them."""
    import yaml

    try:
        return dict(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"model: {folder / CONFIG} cannot be read ({str(error).splitlines()[0]})") from None


def _load(args: argparse.Namespace, folder: Path | None) -> nn.Module:
    if folder is None:
        return load_model("model", args.model, args.checkpoint, **args.model_kwargs)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"model: {folder} has no {WEIGHTS} yet; let the run end first")
    return load_saved(folder / WEIGHTS)


def _features(
    args: argparse.Namespace, model: nn.Module, data: dict[str, Any], device: torch.device
) -> dict[str, Features]:
    config = image_config(model, img_size=args.img_size, mean=args.mean, std=args.std)
    transform = image_transform(config)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    found = {}
    for part, split in (("train", data["train_split"] or "train"), ("val", data["val_split"] or "validation")):
        source = open_source(data["data"], split, root=data["data_root"], download=args.download, mode=mode)
        if not source.labelled:
            raise ValueError(f"data: {data['data']} has no labels to evaluate with")
        seen = _with_progress(batches(source.images, transform, args.batch_size, args.workers), part)
        found[part] = extract(
            model, seen, last_blocks=args.last_blocks, device=device, precision=PRECISIONS[args.precision]
        )  # fmt: skip
    return found


def _with_progress(data: Any, part: str) -> Any:
    from tqdm.auto import tqdm

    return tqdm(data, desc=f"{part} features", unit="batch", leave=False, disable=None, file=sys.stderr)
