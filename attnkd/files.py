"""Writes files in one step, with one writer at a time: a file is complete or absent. The whole package writes through it."""

from __future__ import annotations

import io
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PATIENCE = 10.0
"""Seconds to wait for a lock: worker processes of a killed command keep it until they notice."""
LEFT_OVER = 3600.0
"""Seconds after which a temporary file that nobody writes to belongs to a killed process."""


@contextmanager
def replacing(path: str | os.PathLike, mode: str = "w", **options: Any) -> Iterator[IO]:
    """A new file that takes the place of ``path`` when the block ends; after an error or a kill ``path`` is as it was.

    The new file is in the same folder under another name, and is on the disk before it gets its final name. What is
    no ordinary file (/dev/stdout, a pipe) is written to directly.

    Args:
        mode, options: as for ``open``.

    Raises:
        OSError: with the file's name, also where the system gives none (a full disk).
    """
    target = Path(os.path.realpath(path))
    with named(path):
        if target.exists() and not target.is_file() and not target.is_dir():
            with target.open(mode, **options) as file:
                yield file
            return
        temporary = _temporary(target)
        try:
            with temporary.open(mode.replace("w", "x"), **options) as file:
                if target.exists():
                    os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Replace ``path`` in one step, see :func:`replacing`."""
    with replacing(path, "wb") as file:
        file.write(content)


def write_text(path: str | os.PathLike, content: str) -> None:
    """Replace ``path`` in one step by UTF-8 text."""
    write_bytes(path, content.encode())


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Replace ``path`` in one step by JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_figure(path: str | os.PathLike, figure: Any) -> None:
    """Replace ``path`` in one step by a matplotlib figure, as the format of its suffix."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:] or "png")
    write_bytes(path, content.getvalue())


def check_writable(name: str, path: str | os.PathLike) -> None:
    """Find out before the work whether :func:`replacing` could write ``path``.

    Raises:
        ValueError: it could not; ``name`` is the argument that the message begins with.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise IsADirectoryError(None, "Is a directory")
        if not target.exists() or target.is_file():
            probe = _temporary(target)
            probe.touch(exist_ok=False)
            probe.unlink()
    except OSError as error:
        raise ValueError(f"{name}: cannot write {path} ({error.strerror})") from None


def make_folder(name: str, path: str | os.PathLike) -> Path:
    """Make a folder for results, with those above it, where it is not there yet.

    Raises:
        ValueError: it cannot be made or written to; ``name`` is the argument that the message begins with.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}: cannot make the folder {path} ({error.strerror})") from None
    check_writable(name, folder / "any")
    _remove_left_overs(folder)
    return folder


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Keep other processes that lock the same file out while the block runs. The lock ends with its process.

    Raises:
        RuntimeError: another process has held it for all of ten seconds.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with named(path):
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise RuntimeError(
                f"{path}: another process is at work there; wait until it ends, or choose another output"
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Give the file's name to errors of the system that come without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.tmp")


def _remove_left_overs(folder: Path) -> None:
    """Temporary files of writers that were killed."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 12}.tmp"):
        try:
            if time.time() - path.stat().st_mtime > LEFT_OVER:
                path.unlink()
        except OSError:
            continue  # another process was faster, or it is not ours
