"""What `attnkd demo` does and prints."""

from __future__ import annotations

import argparse
import functools
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
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from attnkd import files
from attnkd.commands.info import versions
from attnkd.commands.options import choose_device
from attnkd.demo import QUICK, comparison, comparison_report, figures, report, wild
from attnkd.demo.arms import ARMS
from attnkd.demo.comparison import AllMethods, ComparisonConfig
from attnkd.demo.experiment import ARMS as TWO_ARMS
from attnkd.demo.experiment import Config, Experiment
from attnkd.demo.stages import Trained
from attnkd.demo.training import Record
from attnkd.demo.workers import one_thread, usual_jobs, workers


def run(args: argparse.Namespace) -> int:
    names = ("epochs", "teacher_epochs", "seeds", "attn_weight", "temperature", "resample_mode")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    kind: Any = ComparisonConfig if args.all else Config
    quick: dict[str, Any] = comparison.QUICK if args.all else QUICK
    work: Any = compare if args.all else demonstrate
    config = kind(**{**(quick if args.quick else {}), **given})
    device = choose_device(args.device)
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"jobs: expected an integer >= 1, got {args.jobs}")
    jobs = args.jobs or (1 if args.quick else usual_jobs(device))
    directory = files.make_folder(
        "output_dir", args.output_dir or Path("runs") / f"demo{'-all' * args.all}{'-quick' * args.quick}"
    )
    # A pipe or a log file has no width of its own; 80 columns would fold the table.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    wall, cpu = time.perf_counter(), cpu_time()
    at_once = f", {jobs} students at a time" if jobs > 1 else ""
    console.print(f"attnkd demo on {device_name(device)}{at_once}, results in {directory}", markup=False)
    with files.locked(directory / "lock"), one_thread():
        summary = work(config, directory, device, jobs, console)
        seconds = {
            "wall": time.perf_counter() - wall,
            "cpu": cpu_time() - cpu,
        }
        summary |= {
            "config": asdict(config),
            "device": device_name(device),
            "jobs": jobs,
            "seconds": seconds,
            "versions": versions(),
        }
        files.write_json(directory / "summary.json", summary)
    console.print(f"{seconds['wall']:.0f} s ({seconds['cpu']:.0f} s of CPU time)")
    return 0


def demonstrate(config: Config, directory: Path, device: torch.device, jobs: int, console: Console) -> dict[str, Any]:
    """The demo: AttnDistill without and with attention guidance. Returns what goes into summary.json."""
    console.print(
        f"A teacher, {config.teacher_epochs} epochs; then {len(TWO_ARMS) * config.seeds} students, {config.epochs} epochs "
        f"each: {config.seeds} with {TWO_ARMS['pa']}, {config.seeds} with {TWO_ARMS['pa_ag']}",
        markup=False,
    )
    epochs = config.teacher_epochs + len(TWO_ARMS) * config.seeds * config.epochs
    make = functools.partial(Experiment, config, directory, device)
    with Progress(console, epochs) as progress, workers(make, jobs, progress) as run:
        outcome = make(progress).run(run)
    summary = report.summarise(outcome)
    console.print(report.table(summary))
    for sentence in summary["verdict"]:
        console.print(sentence)
    checkpoints = list_checkpoints(outcome.stages(), directory, console)
    wild.save_pictures(directory / "images", outcome.digits)
    figures.draw_curves(outcome, directory / "curves.png")
    figures.draw_attention(outcome, directory / "attention.png")
    files.write_json(directory / "curves.json", report.curves(outcome))
    console.print(f"summary.json, curves.json, curves.png and attention.png are in {directory}")
    return {**summary, "checkpoints": checkpoints}


def compare(
    config: ComparisonConfig, directory: Path, device: torch.device, jobs: int, console: Console
) -> dict[str, Any]:
    """All four methods, and what they are compared with; returns as :func:`demonstrate`."""
    console.print(
        f"{config.seeds} seeds: for each two teachers, {config.teacher_epochs} epochs, and a student in each of {len(ARMS)} arms",
        markup=False,
    )
    make = functools.partial(AllMethods, config, directory, device)
    with Progress(console, comparison.count_epochs(config)) as progress, workers(make, jobs, progress) as run:
        methods = make(progress)
        outcome = methods.run(run)
    summary = comparison_report.summarise(outcome)
    console.print(comparison_report.table(summary))
    for compared in summary["comparisons"]:
        console.print(compared["verdict"])
    checkpoints = list_checkpoints(outcome.stages(), directory, console)
    wild.save_pictures(directory / "images", methods.lab.digits)
    figures.draw_comparison(summary, directory / "methods.png")
    files.write_text(directory / "methods.md", comparison_report.markdown(summary))
    console.print(f"summary.json, methods.md (the table) and methods.png are in {directory}")
    return {**summary, "checkpoints": checkpoints}


class Progress:
    """Progress bars on a terminal; there and elsewhere a line about each stage when it is done."""

    def __init__(self, console: Console, epochs: int) -> None:
        self.console = console
        values = TextColumn("{task.fields[values]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), values)
        self.bars = Bars(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.whole = self.bars.add_task("all epochs", total=epochs, values="")
        self.stages: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def begin(self, name: str, epochs: int, done: int, note: str) -> None:
        if note:
            self.console.print(f"{name}: {note}", markup=False)
        self.stages[name] = self.bars.add_task(name, total=epochs, completed=done, values="")
        self.bars.advance(self.whole, done)

    def epoch(self, name: str, record: Record) -> None:
        values = (f"{part} {record[part]:.3g}" for part in ("loss", "top1", "knn", "kl") if part in record)
        self.bars.update(self.stages[name], advance=1, values="  ".join(values))
        self.bars.advance(self.whole)

    def end(self, name: str, scores: Mapping[str, float]) -> None:
        self.bars.remove_task(self.stages.pop(name))
        self.console.print(f"{name}: {report.scores_in_words(scores)}", markup=False)


def list_checkpoints(stages: list[Trained], directory: Path, console: Console) -> list[str]:
    """The stages' files; each was compared with the trained model when it was written."""
    console.print(f"\n{len(stages)} checkpoints loaded again by timm.create_model: features equal bit for bit")
    return [str(stage.checkpoint.relative_to(directory)) for stage in stages]


def cpu_time() -> float:
    """Seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({platform.machine()})"
    return str(device)
