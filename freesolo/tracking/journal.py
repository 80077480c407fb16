"""A run's own record of its metrics, `<run_url>/metrics.jsonl`: the truth that MLflow is only told of.

One line of JSON an entry, ascending by step:

    {"step": 120, "time_ms": 1796000000000, "metrics": {"loss": 0.71, "images_per_second": 48.2}}

Numbers that JSON lacks are the strings "nan", "inf" and "-inf". Entries gather in a file on this machine's disk and the
whole file replaces the one at the run's URL on `flush`, so the latter is never half an entry and any store will do.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import SEEK_END
from itertools import islice
from pathlib import Path

from freesolo.data.files import exists, join, read_bytes, write_atomic
from freesolo.errors import JobError

JOURNAL_NAME = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Entry:
    """What was measured at one step.

    Attributes:
        step: Of the run.
        time_ms: When it was written, milliseconds since 1970.
        metrics: A value for each name.
    """

    step: int
    time_ms: int
    metrics: Mapping[str, float]


class Journal:
    """Appends a run's metrics to a file on this machine and mirrors it to the run's URL.

    Safe to use from several threads: one appends while another reads behind it.
    """

    def __init__(self, run_url: str, *, resume_step: int | None = 0) -> None:
        """Continue the journal of a run, or begin one.

        Args:
            run_url: The run's folder, any fsspec URL.
            resume_step: The first step that will be (or be again) written: entries of it and of later steps, which
                a run wrote after its last checkpoint, are dropped, so that the replay does not duplicate them.
                None keeps all.

        Raises:
            UsageError, JobError: As `freesolo.data.files.read_bytes`.
            JobError: A line of the journal at the URL is not an entry.
        """
        self.url = join(run_url, JOURNAL_NAME)
        self._lock = threading.Lock()
        kept = [entry for entry in read_journal(run_url) if resume_step is None or entry.step < resume_step]
        self._folder = Path(tempfile.mkdtemp(prefix="freesolo-journal-"))
        self._file = self._folder / JOURNAL_NAME
        self._file.touch()
        self._count = 0
        self._last_step = 0
        for entry in kept:
            self._write(entry)

    def __len__(self) -> int:
        """Entries so far, those of before a resume included."""
        return self._count

    @property
    def last_step(self) -> int:
        """Step of the last entry; 0 where there is none."""
        return self._last_step

    def append(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Write what was measured at `step`; nothing leaves this machine. No metrics: no entry.

        Raises:
            FileNotFoundError: After `close`.
        """
        if metrics:
            now = int(time.time() * 1000)
            self._write(Entry(step, now, {name: float(value) for name, value in metrics.items()}))

    def read(self, offset: int = 0, *, max_entries: int = 1000) -> tuple[list[Entry], int]:
        """Entries from a byte offset on, and the offset after them; none where there are no more.

        The offset of the first entry is 0; every other one is an offset that this returned.
        """
        with self._lock, self._file.open("rb") as file:
            file.seek(offset)
            lines = list(islice(file, max_entries))
        return [_parse(line) for line in lines], offset + sum(map(len, lines))

    def flush(self) -> None:
        """Replace the journal at the run's URL by this one. To be called at checkpoints and at the end.

        Raises:
            UsageError, JobError: As `freesolo.data.files.write_atomic`.
        """
        with self._lock:
            data = self._file.read_bytes()
        write_atomic(self.url, data)

    def close(self) -> None:
        """Flush, and delete the file on this machine. Closing again does nothing.

        Raises:
            UsageError, JobError: As `flush`; the file on this machine is then kept.
        """
        if self._file.exists():
            self.flush()
            shutil.rmtree(self._folder)

    def discard(self) -> None:
        """Delete the file on this machine; what is at the run's URL stays as it is."""
        shutil.rmtree(self._folder)

    def _write(self, entry: Entry) -> None:
        record = {"step": entry.step, "time_ms": entry.time_ms, "metrics": _jsonable(entry.metrics)}
        line = json.dumps(record, allow_nan=False) + "\n"
        with self._lock:
            with self._file.open("r+b") as file:  # not "a", which would make it anew after `close`
                file.seek(0, SEEK_END)
                file.write(line.encode())
            self._count += 1
            self._last_step = entry.step


def read_journal(run_url: str) -> list[Entry]:
    """The entries of a run's journal, as it was last flushed; none where the run has no journal.

    Raises:
        UsageError, JobError: As `freesolo.data.files.read_bytes`.
        JobError: A line is not an entry.
    """
    url = join(run_url, JOURNAL_NAME)
    if not exists(url):
        return []
    entries = []
    for number, line in enumerate(read_bytes(url).splitlines(), start=1):
        try:
            entries.append(_parse(line))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise JobError(f"{url}: line {number} is not a journal entry; restore the file or delete it") from error
    return entries


def _jsonable(metrics: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


def _parse(line: bytes) -> Entry:
    record = json.loads(line)
    metrics = {str(name): float(value) for name, value in record["metrics"].items()}
    return Entry(int(record["step"]), int(record["time_ms"]), metrics)
