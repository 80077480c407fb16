"""What long work tells the person who watches it."""

from __future__ import annotations

import io
import threading
import time

import pytest

from freesolo.progress import describe_progress, describe_seconds, progress


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-1.0, "0.0 s"),
        (0.0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (12.4, "12 s"),
        (59.7, "1 min"),
        (113.0, "1 min 53 s"),
        (120.0, "2 min"),
        (7500.0, "2 h 5 min"),
        (86400.0 * 3 + 3600 * 4 + 59, "3 d 4 h"),
    ],
)
def test_seconds_read_as_people_say_them(seconds: float, expected: str) -> None:
    assert describe_seconds(seconds) == expected


def test_a_line_gives_amount_rate_and_time_left() -> None:
    # 470 - 120 = 350 images at 3.1 a second: 112.9 s.
    assert describe_progress(120, 470, "images", rate=3.1) == "120/470 images, 3.1/s, 1 min 53 s left"


def test_a_line_leaves_out_what_is_not_known() -> None:
    assert describe_progress(120, None, "images", rate=0.25) == "120 images, 0.25/s"
    assert describe_progress(0, 470, "images", rate=0.0) == "0/470 images"


def test_bytes_are_shown_as_megabytes() -> None:
    line = describe_progress(12_300_000, 98_000_000, "bytes", rate=2_000_000.0)
    assert line == "12.3/98.0 MB, 2.0 MB/s, 43 s left"  # 85.7 MB at 2 MB/s


def test_lines_come_at_most_every_five_seconds_and_once_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with progress("extract", total=40, unit="images", stream=stream, clock=clock) as advance:
        for _ in range(40):
            clock.now += 0.5
            advance()
    # 20 s of work at 2/s: lines at 5, 10, 15 and 20 s, then the summary.
    assert stream.getvalue().splitlines() == [
        "extract: 10/40 images, 2.0/s, 15 s left",
        "extract: 20/40 images, 2.0/s, 10 s left",
        "extract: 30/40 images, 2.0/s, 5.0 s left",
        "extract: 40/40 images, 2.0/s, 0.0 s left",
        "extract: 40/40 images, 2.0/s, took 20 s",
    ]


def test_one_slow_item_is_told_of_at_once() -> None:
    clock, stream = Clock(), io.StringIO()
    with progress("train", total=3, unit="steps", stream=stream, clock=clock) as advance:
        clock.now += 60
        advance()
        assert stream.getvalue() == "train: 1/3 steps, 0.017/s, 2 min left\n"


def test_the_rate_forgets_a_slow_start() -> None:
    clock, stream = Clock(), io.StringIO()
    with progress("train", total=1000, unit="steps", stream=stream, clock=clock) as advance:
        clock.now += 600
        advance()
        for _ in range(100):
            clock.now += 1
            advance()
        last = stream.getvalue().splitlines()[-1]
    # Over all time it would be 101 steps in 700 s, 0.14/s.
    assert last == "train: 101/1000 steps, 1.0/s, 14 min 59 s left"


def test_many_quick_items_do_not_make_the_rate_forgetful() -> None:
    clock, stream = Clock(), io.StringIO()
    with progress("pack", total=None, unit="photos", stream=stream, clock=clock) as advance:
        for seconds in [0.25] * 80 + [0.125] * 40:
            clock.now += seconds
            advance()
        # 120 photos in 25 s; the last thirty alone came at 8 a second.
        assert stream.getvalue().splitlines()[-1] == "pack: 120 photos, 4.8/s"


def test_what_an_earlier_run_did_counts_as_done_but_not_as_fast() -> None:
    clock, stream = Clock(), io.StringIO()
    with progress("extract", total=200, unit="images", done=100, stream=stream, clock=clock) as advance:
        clock.now += 10
        advance(20)
    assert stream.getvalue().splitlines() == [
        "extract: 120/200 images, 2.0/s, 40 s left",
        "extract: 120/200 images, 2.0/s, took 10 s",
    ]


def test_work_that_fails_says_where_it_stopped() -> None:
    clock, stream = Clock(), io.StringIO()

    def work() -> None:
        with progress("pack", total=4, unit="photos", stream=stream, clock=clock) as advance:
            clock.now += 1
            advance()
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        work()
    assert stream.getvalue() == "pack: stopped at 1/4 photos, 1.0/s, took 1.0 s\n"


def test_no_work_at_all_is_one_line() -> None:
    clock, stream = Clock(), io.StringIO()
    with progress("pack", total=0, unit="photos", stream=stream, clock=clock):
        pass
    assert stream.getvalue() == "pack: 0/0 photos, took 0.0 s\n"


def test_going_back_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="cannot go back"),
        progress("pack", total=4, stream=io.StringIO()) as advance,
    ):
        advance(-1)


def test_a_terminal_gets_a_bar_and_then_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    clock, stream = Clock(), Terminal()
    with progress("[pack]", total=4, unit="photos", stream=stream, clock=clock) as advance:
        clock.now += 2
        advance(4)
    text = stream.getvalue()
    bar, summary = text.rsplit("\x1b[2K", maxsplit=1)  # the bar's line is erased before the summary is written
    assert "━" in bar
    assert "━" not in summary
    assert "[pack]" in bar  # a name in brackets is no markup
    assert "4/4 photos, 2.0/s, 0.0 s left" in text
    assert text.endswith("[pack]: 4/4 photos, 2.0/s, took 2.0 s\n")


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    clock, stream = Clock(), Terminal()
    with progress("pack", total=1, unit="photos", stream=stream, clock=clock) as advance:
        clock.now += 2
        advance()
    assert stream.getvalue() == "pack: 1/1 photos, 0.5/s, took 2.0 s\n"


def test_standard_output_stays_the_jobs_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with progress("pack", total=1, stream=terminal) as advance:
        print('{"result": 1}')  # noqa: T201
        advance()
    assert capsys.readouterr().out == '{"result": 1}\n'
    assert "result" not in terminal.getvalue()


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("pack", total=1) as advance:
        advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pack: 1/1 items")


def test_threads_come_in_one_at_a_time() -> None:
    inside: list[int] = []

    def clock() -> float:
        inside.append(1)
        time.sleep(0)  # lets another thread run
        together = len(inside)
        inside.pop()
        assert together == 1
        return 0.0

    stream = io.StringIO()
    with progress("download", total=None, unit="files", stream=stream, clock=clock) as advance:

        def work() -> None:
            for _ in range(300):
                advance()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert stream.getvalue() == "download: 1200 files, took 0.0 s\n"
