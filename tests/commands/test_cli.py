"""What goes wrong in any command becomes one sentence and a status, and Ctrl-C and SIGTERM end it cleanly."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attnkd.commands import cli, info

ROOT = Path(__file__).resolve().parents[2]


def raising(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr(info, "run", run)
    return cli.main(["info"])


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (ValueError("json: expected one"), 2, "attnkd info: --json: expected one"),
        (ValueError("weight: expected one"), 2, "attnkd info: weight: expected one"),
        (TypeError("x: expected a tensor"), 2, "attnkd info: x: expected a tensor"),
        (NotImplementedError("no such thing"), 2, "attnkd info: no such thing"),
        (ModuleNotFoundError("needs rich"), 2, "attnkd info: needs rich"),
        (RuntimeError("not finite"), 1, "attnkd info: not finite"),
        (OSError(errno.ENOSPC, "No space left on device", "x.csv"), 1, "attnkd info: x.csv: No space left on device"),
        (MemoryError(), 1, "attnkd info: MemoryError"),
    ],
)
def test_errors_become_sentences(monkeypatch, capsys, error, status, sentence):
    assert raising(monkeypatch, error) == status
    assert capsys.readouterr().err.strip() == sentence


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    with pytest.raises(AssertionError):
        raising(monkeypatch, AssertionError("a fault"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_cleanly(monkeypatch, capsys, number, status):
    before = signal.getsignal(signal.SIGTERM)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    closed = []

    def run(args):
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            closed.append(True)

    monkeypatch.setattr(info, "run", run)
    try:
        assert cli.main(["info"]) == status and closed
    finally:
        signal.signal(signal.SIGINT, usual)
    assert "run the same command again to continue" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written():
    """In one process each, as Python writes what is left at its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "attnkd", "info"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == "attnkd info: standard output: No space left on device"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")
