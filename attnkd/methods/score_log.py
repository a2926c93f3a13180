"""Scores of listed images on disk, appended batch by batch: a kill at any moment loses at most the last batch."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnkd import files
from attnkd.methods.image_stream import ENCODING, Batch, read_lines
from attnkd.methods.probe_scores import ProbeScores

Row = list[str]
"""[path, V_n, label, error, V_a of each block]; an image that could not be read has a path and an error only."""


class ScoreLog:
    """Rows of CSV in the order of a list of names.

    Args:
        names: the list, one name a line.
        rows: the rows written so far.
    """

    def __init__(self, names: Path, rows: Path) -> None:
        self.names, self.rows = names, rows

    def done(self, batch_size: int, count: int) -> int:
        """The number of rows of whole batches; what a kill left after them is cut off.

        Whole batches, because a batch of other images rounds differently: a run that was killed ends with the same bytes as
        one that was not.
        """
        if not self.rows.exists():
            return 0
        seen = position = kept = end = 0
        with self.rows.open("rb+") as file:
            for line in file:
                if line.endswith(b"\n"):
                    seen, position = seen + 1, position + len(line)
                    if seen % batch_size == 0 or seen == count:
                        kept, end = seen, position
            file.truncate(end)
        return kept

    @contextmanager
    def appending(self) -> Iterator[Any]:
        """A function (batch, its scores) that appends the batch's rows."""
        with files.named(self.rows), self.rows.open("a", **ENCODING) as file:
            writer = csv.writer(file, lineterminator="\n")

            def append(batch: Batch, scores: ProbeScores | None) -> None:
                writer.writerows(_rows(batch, scores))
                file.flush()

            yield append
            os.fsync(file.fileno())

    def read(self) -> Iterator[Row]:
        """The rows written so far.

        Raises:
            RuntimeError: they do not belong to the list.
        """
        with self.rows.open(**ENCODING) as file:
            for name, row in zip(read_lines(self.names), csv.reader(file), strict=False):
                if row[0] != name:
                    raise RuntimeError(
                        f"{self.rows}: its row for {row[0]!r} belongs to {name!r} of {self.names}; start again with --restart"
                    )
                yield row

    def list_errors(self, again: ScoreLog) -> int:
        """Write the names of images that could not be read as the list of another, empty log; their number."""
        again.rows.unlink(missing_ok=True)
        count = 0
        with files.replacing(again.names, **ENCODING) as file:
            for row in self.read() if self.rows.exists() else ():
                if row[3]:
                    file.write(row[0] + "\n")
                    count += 1
        return count

    def merge(self, again: ScoreLog) -> None:
        """Replace these rows by the other log's, which are some of them in the same order, and delete the other log."""
        with files.replacing(self.rows, **ENCODING) as file:
            writer, better = csv.writer(file, lineterminator="\n"), again.read()
            new = next(better, None)
            for row in self.read():
                if new is not None and new[0] == row[0]:
                    row, new = new, next(better, None)
                writer.writerow(row)
        again.remove()

    def remove(self) -> None:
        """Delete list and rows, the list first: rows without a list are nothing."""
        self.names.unlink(missing_ok=True)
        self.rows.unlink(missing_ok=True)


def _rows(batch: Batch, scores: ProbeScores | None) -> Iterator[list[Any]]:
    columns = [] if scores is None else [x.tolist() for x in scores]
    readable = iter(zip(*columns, strict=True))
    for name, error in zip(batch.names, batch.errors, strict=True):
        if error:
            yield [name, "", "", error]
            continue
        attention, output, label = next(readable)
        if not all(map(math.isfinite, [*attention, output])):
            raise RuntimeError(
                f"{name}: the teacher's scores are not finite ({attention}, {output}); check weights and precision"
            )
        yield [name, f"{output:.9g}", label, "", *(f"{value:.9g}" for value in attention)]
