from __future__ import annotations

import math
import threading
import uuid
from pathlib import Path

import pytest

from freesolo.data.files import join, read_bytes, write_atomic
from freesolo.errors import JobError
from freesolo.tracking.journal import JOURNAL_NAME, Journal, read_journal


@pytest.fixture(params=["folder", "file", "memory"])
def run_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "folder": str(tmp_path / "run"),
        "file": f"file://{tmp_path}/run",
        "memory": f"memory://{uuid.uuid4().hex}/run",
    }[request.param]


def steps(run_url: str) -> list[int]:
    return [entry.step for entry in read_journal(run_url)]


def test_a_run_without_a_journal_has_no_entries(run_url: str) -> None:
    assert read_journal(run_url) == []


def test_entries_reach_the_url_on_flush_and_not_before(run_url: str) -> None:
    journal = Journal(run_url)
    journal.append(10, {"loss": 0.5, "images_per_second": 48})
    assert steps(run_url) == []
    journal.flush()
    journal.append(20, {"loss": 0.25})
    assert steps(run_url) == [10]
    assert read_journal(run_url)[0].metrics == {"loss": 0.5, "images_per_second": 48.0}
    journal.close()
    assert steps(run_url) == [10, 20]


def test_a_resumed_journal_drops_what_will_be_replayed(run_url: str) -> None:
    first = Journal(run_url)
    for step in (0, 10, 20, 30):
        first.append(step, {"loss": float(step)})
    first.close()

    resumed = Journal(run_url, resume_step=20)
    assert len(resumed) == 2
    assert resumed.last_step == 10
    resumed.append(20, {"loss": -1.0})
    resumed.close()
    assert [(entry.step, entry.metrics["loss"]) for entry in read_journal(run_url)] == [
        (0, 0.0),
        (10, 10.0),
        (20, -1.0),
    ]


def test_a_new_run_under_an_old_url_begins_anew_and_none_keeps_all(run_url: str) -> None:
    first = Journal(run_url)
    first.append(0, {"loss": 1.0})
    first.close()
    all_kept = Journal(run_url, resume_step=None)
    assert len(all_kept) == 1
    all_kept.close()
    anew = Journal(run_url)
    assert len(anew) == 0
    assert anew.last_step == 0
    anew.close()
    assert steps(run_url) == []


def test_numbers_that_json_lacks_survive(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.append(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    journal.close()
    assert b"NaN" not in (tmp_path / JOURNAL_NAME).read_bytes()  # strict parsers refuse it
    metrics = read_journal(str(tmp_path))[0].metrics
    assert math.isnan(metrics["a"])
    assert (metrics["b"], metrics["c"]) == (math.inf, -math.inf)


def test_no_metrics_make_no_entry(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.append(0, {})
    assert len(journal) == 0
    journal.close()
    assert read_bytes(journal.url) == b""


def test_reading_behind_goes_on_where_it_left_off(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    assert journal.read() == ([], 0)
    for step in range(5):
        journal.append(step, {"loss": 1.0})
    some, offset = journal.read(max_entries=3)
    rest, end = journal.read(offset)
    assert [entry.step for entry in some + rest] == [0, 1, 2, 3, 4]
    assert journal.read(end) == ([], end)
    journal.append(5, {"loss": 1.0})
    assert [entry.step for entry in journal.read(end)[0]] == [5]
    journal.close()


def test_a_reader_never_sees_half_an_entry(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    seen: list[int] = []

    def follow() -> None:
        offset = 0
        while len(seen) < 300:
            entries, offset = journal.read(offset)
            seen.extend(entry.step for entry in entries)

    reader = threading.Thread(target=follow)
    reader.start()
    for step in range(300):
        journal.append(step, {f"metric_{number}": 1 / 3 for number in range(20)})
    reader.join(30)
    assert seen == list(range(300))
    journal.close()


def test_closing_again_does_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.close()
    write_atomic(journal.url, b"")
    journal.close()
    assert [file.name for file in tmp_path.iterdir()] == [JOURNAL_NAME]


@pytest.mark.parametrize("line", [b"{half", b"[]", b'{"step": 1}', b'{"step": 1, "time_ms": 1, "metrics": {"a": "x"}}'])
def test_a_broken_journal_is_named(tmp_path: Path, line: bytes) -> None:
    good = b'{"step": 0, "time_ms": 1, "metrics": {"loss": 1.0}}\n'
    write_atomic(join(str(tmp_path), JOURNAL_NAME), good + line + b"\n")
    with pytest.raises(JobError, match=r"metrics\.jsonl: line 2 is not a journal entry"):
        Journal(str(tmp_path))
