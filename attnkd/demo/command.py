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
from attnkd.demo import data, figures, report
from attnkd.demo.config import ALL, QUICK, QUICK_ALL, Config
from attnkd.demo.experiment import Demo, Outcome
from attnkd.demo.workers import one_thread, usual_jobs, workers


def run(args: argparse.Namespace) -> int:
    names = ("epochs", "teacher_epochs", "seeds", "attn_weight", "temperature", "resample_mode")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    usual = [[{}, QUICK], [ALL, QUICK_ALL]][args.all][args.quick]
    config = Config(**{**usual, **given})
    device = choose_device(args.device)
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"jobs: expected an integer >= 1, got {args.jobs}")
    jobs = args.jobs or (1 if args.quick else usual_jobs(device))
    directory = files.make_folder(
        "output_dir", args.output_dir or Path("runs") / f"demo{'-all' * args.all}{'-quick' * args.quick}"
    )
    # A pipe or a log file has no width of its own; 80 columns would fold the table.
    console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    wall, cpu = time.perf_counter(), cpu_time()
    at_once = f", {jobs} at a time" if jobs > 1 else ""
    console.print(f"attnkd demo on {device_name(device)}{at_once}, results in {directory}")
    with files.locked(directory / "lock"), one_thread():
        outcome = train(config, directory.resolve(), device, jobs, console)
        summary = report.summarise(outcome)
        seconds = {"wall": time.perf_counter() - wall, "cpu": cpu_time() - cpu}
        summary |= {"config": asdict(config), "device": device_name(device), "jobs": jobs, "seconds": seconds}
        files.write_json(directory / "summary.json", {**summary, "versions": versions()})
        show(outcome, summary, directory, console)
    console.print(f"{seconds['wall']:.0f} s ({seconds['cpu']:.0f} s of CPU time)")
    return 0


def train(config: Config, directory: Path, device: torch.device, jobs: int, console: Console) -> Outcome:
    teachers = "two teachers" if config.assisted else "a teacher"
    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    console.print(
        f"{seeds}: for each {teachers}, {config.teacher_epochs} epochs, and a student in each of "
        f"{len(config.arms)} arms",
    )
    make = functools.partial(Demo, config, directory, device)
    with Progress(console, config.all_epochs()) as progress:
        demo = make(progress)  # makes the data, before others look for them
        with workers(make, jobs, progress) as run:
            return demo.run(run)


def show(outcome: Outcome, summary: dict[str, Any], directory: Path, console: Console) -> None:
    """The table and the sentences on the screen, and pictures and a page into the folder."""
    console.print(report.table(summary))
    for line in report.teachers_in_words(summary):
        console.print(line)
    for compared in summary["comparisons"]:
        console.print(compared["verdict"])
    data.save_pictures(directory / "images", outcome.digits)
    if len(outcome.config.arms) == 2:
        drawn = ["curves.png", "attention.png"]
        figures.draw_curves(outcome, directory / "curves.png")
        figures.draw_attention(outcome, directory / "attention.png")
    else:
        drawn = ["methods.png"]
        figures.draw_comparison(summary, directory / "methods.png")
    files.write_text(directory / "results.md", report.markdown(summary))
    console.print(f"{', '.join(drawn)}, results.md (the table) and summary.json are in {directory}")


class Progress:
    """Progress bars on a terminal; there and elsewhere a line about each run when it is done."""

    def __init__(self, console: Console, epochs: int) -> None:
        self.console = console
        values = TextColumn("{task.fields[values]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), values)
        self.bars = Bars(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.whole = self.bars.add_task("all epochs", total=epochs, values="")
        self.running: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def begin(self, name: str, epochs: int, done: int, note: str) -> None:
        if note:
            self.console.print(f"{name}: {note}")
        self.running[name] = self.bars.add_task(name, total=epochs, completed=done, values="")
        self.bars.advance(self.whole, done)

    def epoch(self, name: str, record: Mapping[str, float]) -> None:
        values = (f"{part} {record[part]:.3g}" for part in ("loss", "attn_loss") if part in record)
        self.bars.update(self.running[name], advance=1, values="  ".join(values))
        self.bars.advance(self.whole)

    def end(self, name: str, scores: Mapping[str, float]) -> None:
        if name in self.running:
            self.bars.remove_task(self.running.pop(name))
        self.console.print(f"{name}: {report.scores_in_words(scores)}")


def cpu_time() -> float:
    """Seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({platform.machine()})"
    return str(device)
