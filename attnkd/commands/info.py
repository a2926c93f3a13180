"""`attnkd info`: versions, devices and what impl="auto" would choose here, with the reason."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform

import torch

from attnkd import __version__
from attnkd.attention import dispatch
from attnkd.attention.api import choose
from attnkd.attention.problem import make_problem

PACKAGES = ("torch", "triton", "timm", "numpy")


def versions() -> dict[str, str]:
    """Versions of attnkd, Python and the packages it stands on ('not installed' where missing)."""
    found = {"attnkd": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> list[dict[str, str]]:
    """Every device PyTorch can use here, GPUs first."""
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        arch = getattr(p, "gcnArchName", "") if torch.version.hip else f"sm_{p.major}{p.minor}"
        found.append(
            {"device": f"cuda:{index}", "name": p.name, "details": f"{arch}, {p.total_memory >> 30} GiB, {toolkit}"}
        )
    found.append({"device": "cpu", "name": platform.machine(), "details": f"{torch.get_num_threads()} threads"})
    return found


def choices(device: torch.device) -> list[dict[str, str]]:
    """What impl="auto" does on ``device`` for each kind of call, found by asking the dispatcher."""
    rows = []
    for label, query_rows, merge in (
        ("attention_divergence, CLS row", 1, None),
        ("attention_divergence, CLS row, merge='logsum'", 1, "logsum"),
        ("attention_divergence, CLS row, merge='mean'", 1, "mean"),
        ("attention_divergence, whole map", 64, None),
        ("attention_divergence, whole map, merge='max'", 64, "max"),
    ):
        query = torch.empty(1, 2, query_rows, 64, device=device)
        key = torch.empty(1, 2, 64, 64, device=device)
        problem = make_problem(query, key, query, key, None, None, None, None, None, merge, "forward_kl", 1.0)
        reason = dispatch.why_not_triton(query.device, query.dtype)
        if reason is None:
            from attnkd.attention import fused  # which needs Triton

            reason = fused.why_not(problem)
        rows.append({"operation": label, "impl": choose("auto", problem), "why": reason or "fused Triton kernel"})
    query = torch.empty(1, 2, 1, 64, device=device)
    reason = dispatch.why_not_triton(query.device, query.dtype)
    impl = dispatch.choose("auto", (query,))
    rows.append({"operation": "attention_rows", "impl": impl, "why": reason or "fused Triton kernel"})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, usable, auto = versions(), devices(), choices(device)
    if args.json:
        print(json.dumps({"versions": found, "devices": usable, "auto": auto}, indent=2))
        return 0
    print("  ".join(f"{name} {version}" for name, version in found.items()))
    for row in usable:
        print(f"{row['device']}: {row['name']} ({row['details']})")
    print(f'\nimpl="auto" on {device}:')
    width = max(len(row["operation"]) for row in auto)
    for row in auto:
        print(f"  {row['operation']:<{width}}  {row['impl']:<8} {row['why']}")
    return 0
