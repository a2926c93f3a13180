"""What `attnkd demo` does and prints."""

from __future__ import annotations

import argparse
import functools
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

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
    usual_folder = Path("runs", f"demo{'-all' * args.all}{'-quick' * args.quick}")
    directory = files.make_folder("output_dir", args.output_dir or usual_folder)
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    print(
        f"attnkd demo on {device_name(device)}{f', {jobs} at a time' * (jobs > 1)}, results in {directory}\n"
        f"{config.seeds} seed{'s' * (config.seeds > 1)}: for each {'two teachers' if config.assisted else 'a teacher'}, "
        f"{config.teacher_epochs} epochs, and a student in each of {len(config.arms)} arms"
    )
    with files.locked(directory / "lock"), one_thread():
        outcome = train(config, directory.resolve(), device, jobs)
        summary = report.summarise(outcome)
        seconds = {"wall": time.perf_counter() - wall, "cpu": sum(os.times()[:4]) - cpu}  # with ended processes
        summary |= {"config": asdict(config), "device": device_name(device), "jobs": jobs, "seconds": seconds}
        files.write_json(directory / "summary.json", {**summary, "versions": versions()})
        page = report.markdown(summary)
        print("", *report.teachers_in_words(summary), "", page, sep="\n")
        files.write_text(directory / "results.md", page)
        data.save_pictures(directory / "images", outcome.digits)
        figures.draw_comparison(summary, directory / "comparison.png")
        figures.draw_attention(outcome, directory / "attention.png")
    print(f"comparison.png, attention.png, results.md (the table) and summary.json are in {directory}")
    print(f"{seconds['wall']:.0f} s ({seconds['cpu']:.0f} s of CPU time)")
    return 0


def train(config: Config, directory: Path, device: torch.device, jobs: int) -> Outcome:
    """All runs, with a progress bar on a terminal; there and elsewhere a line about each run when it is done."""
    with tqdm(total=config.all_epochs(), unit="epoch", leave=False, disable=None) as bar:

        def hear(said: Any) -> None:
            bar.write(said) if isinstance(said, str) else bar.update(said)

        make = functools.partial(Demo, config, directory, device)
        demo = make(hear)  # makes the data, before others look for them
        with workers(make, jobs, hear) as run:
            return demo.run(run)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({platform.machine()})"
    return str(device)
