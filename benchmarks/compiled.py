"""Compiles what a call launches, for a GPU that is not there, and reads the machine code. Worker side of the gate.

No kernel is described a second time. A replacement for Triton's GPU driver names the target; every launch of the call then goes through
Triton's own specialisation (pointer alignment, integers equal to 1 or divisible by 16) and compilation, and stops before the
GPU would be needed. So what is read is what that GPU would run.

Import this only in a process without ``TRITON_INTERPRET``: Triton compiles or interprets, never both.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from attnkd_kernels import replay
from benchmarks.calls import Call
from benchmarks.gate import SHARED
from benchmarks.sass import matrix_loops

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Target:
    """A GPU architecture and what one of its processors (streaming multiprocessor, compute unit) holds.

    Attributes:
        shared: bytes of shared memory one program may have.
        shared_per_processor: bytes shared by all programs of a processor; each takes ``reserved`` more.
        registers: registers of 32 bits per thread slot that a program of one warp may use in total, per processor.
        max_warps, max_programs: resident per processor.
        processors: of a typical device (A100, H100, B200, RTX 5090, MI300X); decides how keys are split.
    """

    gpu: GPUTarget
    shared: int
    shared_per_processor: int
    reserved: int
    max_warps: int
    max_programs: int
    processors: int


TARGETS = {
    "sm80": Target(GPUTarget("cuda", 80, 32), SHARED["sm80"], 167936, 1024, 64, 32, 108),
    "sm90": Target(GPUTarget("cuda", 90, 32), SHARED["sm90"], 233472, 1024, 64, 32, 132),
    "sm100": Target(GPUTarget("cuda", 100, 32), SHARED["sm100"], 233472, 1024, 64, 32, 148),
    "sm120": Target(GPUTarget("cuda", 120, 32), SHARED["sm120"], 102400, 1024, 48, 24, 170),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), SHARED["gfx942"], 65536, 0, 32, 32, 304),
}


class _Driver:
    """What Triton asks its GPU driver before a launch."""

    def __init__(self, name: str) -> None:
        self.target = TARGETS[name]
        self.device = list(TARGETS).index(name)  # Triton keeps one kernel cache per device
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"multiprocessor_count": self.target.processors, "max_shared_mem": self.target.shared}


class _LoadingDriver(_Driver):
    """One that also takes compiled kernels and their launches, and keeps the launched kernels' names; nothing runs."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.launched: list[str] = []

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        return "loaded", name, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        launched = self.launched

        def launch(x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
            launched.append(function)

        return launch


def measure(call: Call, target: str, note: Path | None = None) -> list[dict[str, Any]]:
    """Runs the call, compiling what it launches for the target; one record per launched kernel.

    The file ``note`` holds the name of the kernel being compiled, for whoever finds this process dead.

    A record has the kernel's name, the compiled kernel's hash and what :func:`read` finds in it, or an ``error``.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: this process interprets kernels and cannot compile them")
    records: list[dict[str, Any]] = []
    with _no_gpu(target), _captured(target, records, note):
        try:
            call.run()
        except Exception as error:  # the launcher itself
            records.append({"kernel": "", "hash": "", "error": _what(error)})
    return records


@contextlib.contextmanager
def _captured(target: str, records: list[dict[str, Any]], note: Path | None) -> Iterator[None]:
    """Turns every launch into a compilation and a record."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        record: dict[str, Any] = {"kernel": self.fn.__name__, "hash": ""}
        if note is not None:
            note.write_text(self.fn.__name__)
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            record["hash"] = kernel.hash
            record |= read(target, kernel.hash, kernel)
        except Exception as error:
            record["error"] = _what(error)
        records.append(record)

    triton.runtime.driver.set_active(_Driver(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield


@functools.cache
def _loading_driver(target: str) -> _LoadingDriver:
    return _LoadingDriver(target)


@contextlib.contextmanager
def unlaunched(target: str) -> Iterator[list[str]]:
    """Calls on CPU tensors run as on that GPU, up to the driver's launch, which only adds the kernel's name to the list given."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: this process interprets kernels and cannot compile them")
    driver = _loading_driver(target)  # one for all calls, because a loaded kernel keeps it
    triton.runtime.driver.set_active(driver)
    with _no_gpu(target):
        yield driver.launched


@contextlib.contextmanager
def _no_gpu(target: str) -> Iterator[None]:
    """Answers, for CPU tensors, the questions about the device that launchers ask PyTorch."""
    import attnkd.attention.dispatch
    import attnkd.attention.fused_maps
    import attnkd.attention.fused_rows  # noqa: F401

    answers = {
        "interpreting": lambda: True,  # tensors on the CPU are welcome
        "interpreter_is_exact": lambda: True,  # in bfloat16 too: nothing is computed
        "architecture": lambda device: target,
        "num_processors": lambda device: TARGETS[target].processors,
        "_processors": lambda device: TARGETS[target].processors,
    }
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in ("attnkd", "attnkd_kernels"):
                for function, answer in answers.items():
                    if hasattr(module, function):
                        stack.enter_context(mock.patch.object(module, function, answer))
        _forget()  # what was found for another target, or for the CPU
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    from attnkd.attention import kinds

    replay.forget()
    kinds.forget()


def _what(error: Exception) -> str:
    """The error's type and its last line, which is where the compiler puts the message."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}"


# --- reading machine code ---------------------------------------------------------------------------------------------

_cache: dict[tuple[str, str], dict[str, Any]] = {}


def read(target: str, key: str, kernel: Any) -> dict[str, Any]:
    """What the compiled kernel uses.

    Returns:
        registers (per thread), spills (bytes a thread: of stack on NVIDIA; 4 a spilled vector register or instruction on scratch on
        AMD), shared (bytes), loads and stores (global instructions by width in bits), tiles (bytes of the two-dimensional tiles that the
        source loads and stores), matrix (matrix instructions by kind), loops (NVIDIA's, see :mod:`benchmarks.sass`), dots (the source's
        dots as 'MxK dtype'), last_loop (products, and pairs a thread has of the first one's result), warps, threads, programs (resident on a processor), occupancy (resident warps / possible warps).
    """
    if (target, key) not in _cache:
        reader = _read_amd if TARGETS[target].gpu.backend == "hip" else _read_nvidia
        threads = kernel.metadata.num_warps * TARGETS[target].gpu.warp_size
        facts = reader(kernel) | {
            "shared": kernel.metadata.shared,
            "warps": kernel.metadata.num_warps,
            "dots": sorted(set(_dots(kernel.asm["ttir"]))),
            "last_loop": _last_loop(kernel.asm["ttir"], threads),
            "tiles": {kind: _tile_bytes(kernel.asm["ttir"], kind, threads) for kind in ("load", "store")},
            "threads": threads,
        }
        facts["programs"] = resident(target, facts["registers"], facts["shared"], facts["warps"])
        facts["occupancy"] = round(facts["programs"] * facts["warps"] / TARGETS[target].max_warps, 3)
        _cache[target, key] = facts
    return dict(_cache[target, key])


def _dots(ttir: str) -> list[str]:
    found = re.findall(r"tt\.dot .*?: tensor<(\d+)x(\d+)x(\w+)>", ttir)
    return [f"{m}x{k} {dtype}" for m, k, dtype in found]


def _last_loop(ttir: str, threads: int) -> dict[str, float]:
    """Of the source's last loop with products: how many, and the elements of the first one's result that a thread has."""
    shapes = re.findall(r"tt\.dot .*-> tensor<(\d+)x(\d+)xf32>", ttir.rpartition("scf.for")[2])
    return {"products": len(shapes), "pairs": int(shapes[0][0]) * int(shapes[0][1]) / threads} if shapes else {}


def _tile_bytes(ttir: str, kind: str, threads: int) -> int:
    """Bytes of the two-dimensional tiles that the source loads (stores), each counted once.

    Those with fewer than 16 bytes a thread cannot use 128 bits and do not count.
    """
    shapes = re.findall(rf"tt\.{kind} .*?: tensor<(\d+)x(\d+)x!tt\.ptr<[a-z]+(\d+)>>", ttir)
    tiles = [int(m) * int(n) * int(bits) // 8 for m, n, bits in shapes if "1" not in (m, n)]
    return sum(size for size in tiles if size >= 16 * threads)


def _read_nvidia(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {usage[:200]!r}")
    return {
        "registers": int(resources[1]),
        "spills": int(resources[2]),
        "loads": _widths(re.findall(r"\b(?:LDG|LDGSTS|UTMALDG)\b(?:\.[\w.]+)?", sass), _nvidia_width),
        "stores": _widths(re.findall(r"\b(?:STG|UTMASTG)\b(?:\.[\w.]+)?", sass), _nvidia_width),
        "matrix": _count(re.findall(r"\b(HGMMA|HMMA|IMMA|DMMA|QMMA|OMMA|UTC\w*MMA)\b", sass)),
        "loops": matrix_loops(sass),
    }


def _nvidia_width(instruction: str) -> int:
    name, *modifiers = instruction.split(".")
    if name.startswith("UTMA"):
        return 128  # a copy of a whole tile by the tensor memory accelerator
    widths = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((widths[m] for m in modifiers if m in widths), 32)


def _read_amd(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"the assembly does not say .{name}")
        return int(found[1])

    return {
        "registers": field("vgpr_count"),
        # Scalar registers are parked in lanes of vector registers first, which touches no memory. The assembler reserves a few
        # bytes of scratch for that, used or not; what counts is what touches them.
        "spills": 4 * max(field("vgpr_spill_count"), len(re.findall(r"\bscratch_(?:load|store)", code))),
        "parked_scalars": field("sgpr_spill_count"),
        "loads": _widths(re.findall(r"\b(?:global|buffer)_load_(\w+)", code), _amd_width),
        "stores": _widths(re.findall(r"\b(?:global|buffer)_store_(\w+)", code), _amd_width),
        "matrix": _count(re.findall(r"\b(v_mfma_\w+)", code)),
    }


def _amd_width(suffix: str) -> int:
    if multiple := re.match(r"(?:dword|lds_dword)x(\d)", suffix):
        return 32 * int(multiple[1])
    if bits := re.match(r"b(\d+)", suffix):
        return int(bits[1])
    return 32 if "dword" in suffix else 16 if "short" in suffix else 8


def _widths(instructions: list[str], width: Any) -> dict[str, int]:
    return _count([str(width(each)) for each in instructions])


def _count(words: list[str]) -> dict[str, int]:
    return {word: words.count(word) for word in sorted(set(words))}


@functools.cache
def _path(tool: str) -> Path:
    path = BIN / tool
    if not path.exists():
        raise RuntimeError(f"{tool} is not where Triton's NVIDIA backend keeps its tools ({BIN})")
    return path


def _tool(tool: str, *arguments: str) -> str:
    return subprocess.run([_path(tool), *arguments], capture_output=True, text=True, check=True).stdout


def resident(target: str, registers: int, shared: int, warps: int) -> int:
    """How many programs of this size a processor holds at a time: an estimate, by the architecture's rules."""
    t = TARGETS[target]
    by_shared = t.shared_per_processor // (shared + t.reserved) if shared + t.reserved else t.max_programs
    if t.gpu.backend == "hip":  # 512 registers per lane and SIMD, in blocks of 8; 4 SIMDs of 8 waves
        waves_per_simd = min(8, 512 // max(8 * math.ceil(registers / 8), 8))
        by_registers = 4 * waves_per_simd // warps
    else:  # 65536 registers per processor, handed to warps in blocks of 256
        by_registers = 65536 // max(256 * math.ceil(registers * 32 / 256), 256) // warps
    return min(by_shared, by_registers, t.max_warps // warps, t.max_programs)
