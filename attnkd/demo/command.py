"""What `attnkd demo` does and prints."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from attnkd.demo import QUICK, figures, models, report
from attnkd.demo.experiment import ARMS, Config, Experiment, Outcome
from attnkd.demo.training import Record, TrainingError
from attnkd.info import versions


def run(args: argparse.Namespace) -> int:
    names = ("epochs", "teacher_epochs", "seeds", "attn_weight", "temperature", "resample_mode")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        config = Config(**{**(QUICK if args.quick else {}), **given})
        device = choose_device(args.device)
    except ValueError as error:
        print(f"attnkd demo: {error}", file=sys.stderr)
        return 2
    directory = args.output_dir or Path("runs/demo-quick" if args.quick else "runs/demo")
    # A pipe or a log file has no width of its own; 80 columns would fold the table.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 110)
    wall, cpu = time.perf_counter(), time.process_time()
    console.print(
        f"attnkd demo on {device_name(device)}, results in {directory}\n"
        f"A teacher, {config.teacher_epochs} epochs; then {len(ARMS) * config.seeds} students, {config.epochs} epochs "
        f"each: {config.seeds} with {ARMS['pa']}, {config.seeds} with {ARMS['pa_ag']}",
        markup=False,
    )
    try:
        with Progress(console, config) as progress:
            outcome = Experiment(config, directory, device, progress).run()
    except TrainingError as error:
        print(f"attnkd demo: {error}", file=sys.stderr)
        return 1

    summary = report.summarise(outcome)
    console.print(report.table(summary))
    for sentence in summary["verdict"]:
        console.print(sentence)
    checkpoints = prove_checkpoints(outcome, directory)
    console.print(f"\n{len(checkpoints)} checkpoints loaded again by timm.create_model: features equal bit for bit")
    figures.draw_curves(outcome, directory / "curves.png")
    figures.draw_attention(outcome, directory / "attention.png")
    write_json(directory / "curves.json", report.curves(outcome))
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "training": training_time(outcome)}
    write_json(
        directory / "summary.json",
        {
            **summary,
            "checkpoints": checkpoints,
            "config": asdict(config),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "versions": versions(),
        },
    )
    console.print(f"summary.json, curves.json, curves.png and attention.png are in {directory}")
    console.print(
        f"{seconds['wall']:.0f} s ({seconds['cpu']:.0f} s of CPU time); all training: {seconds['training']:.0f} s"
    )
    return 0


class Progress:
    """Progress bars on a terminal; there and elsewhere a line about each stage when it is done."""

    def __init__(self, console: Console, config: Config) -> None:
        self.console = console
        values = TextColumn("{task.fields[values]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), values)
        self.bars = Bars(*columns, console=console, transient=True, disable=not console.is_terminal)
        total = config.teacher_epochs + len(ARMS) * config.seeds * config.epochs
        self.whole = self.bars.add_task("all epochs", total=total, values="")
        self.stage = self.bars.add_task("", total=1, values="", visible=False)

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def begin(self, name: str, epochs: int, done: int, note: str) -> None:
        if note:
            self.console.print(f"{name}: {note}", markup=False)
        self.bars.reset(self.stage, description=name, total=epochs, completed=done, visible=True, values="")
        self.bars.advance(self.whole, done)

    def epoch(self, record: Record) -> None:
        values = (f"{name} {record[name]:.3g}" for name in ("loss", "top1", "knn", "kl") if name in record)
        self.bars.update(self.stage, advance=1, values="  ".join(values))
        self.bars.advance(self.whole)

    def end(self, name: str, scores: Mapping[str, float]) -> None:
        self.console.print(f"{name}: {report.scores_in_words(scores)}", markup=False)


def prove_checkpoints(outcome: Outcome, directory: Path) -> list[str]:
    """Load every checkpoint with timm, compare its features with the trained model's, and list the files."""
    for stage in outcome.stages():
        models.check_reload(stage.model, stage.checkpoint, outcome.digits.test_images)
    return [str(stage.checkpoint.relative_to(directory)) for stage in outcome.stages()]


def training_time(outcome: Outcome) -> float:
    """Seconds that all stages took, in this run and in those it continued."""
    return sum(record["seconds"] for stage in outcome.stages() for record in stage.history)


def choose_device(name: str | None) -> torch.device:
    """Raises: ValueError: PyTorch cannot use a device of that name here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected a device PyTorch can use here, got {name!r} ({reason})") from None
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return str(device)


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
