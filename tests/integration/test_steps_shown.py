"""What the person who started a training sees of its steps, whatever becomes of the workers."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray

from freesolo.train import steps_shown as module
from freesolo.train.steps_shown import steps_shown

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.01)


def say(board: Any, what: str, step: int) -> None:
    """Tell the board, and give the terminal's thread time to look."""
    ray.get(getattr(board, what).remote(step))
    time.sleep(0.3)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines without rates and times."""
    return [", ".join(line.split(", ")[:1]) for line in capsys.readouterr().err.splitlines()]


def test_a_lost_group_stops_and_the_next_goes_on_from_its_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    with steps_shown("solo-r0", 8) as board:
        say(board, "begin", 0)
        say(board, "tell", 5)
        say(board, "begin", 4)
        say(board, "tell", 8)
    assert shown(capsys) == ["solo-r0: stopped at 5/8 steps", "solo-r0: 8/8 steps"]


def test_a_resumed_training_counts_what_was_done_before(capsys: pytest.CaptureFixture[str]) -> None:
    with steps_shown("solo-r0", 8) as board:
        say(board, "begin", 6)
        say(board, "tell", 8)
    assert shown(capsys) == ["solo-r0: 8/8 steps"]


def test_a_training_that_fails_says_where_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    with steps_shown("solo-r0", 8) as board:
        say(board, "begin", 0)
        say(board, "tell", 3)
    assert shown(capsys) == ["solo-r0: stopped at 3/8 steps"]


def test_a_training_whose_workers_never_start_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with steps_shown("solo-r0", 8):
        time.sleep(0.1)
    assert shown(capsys) == []


def test_a_board_that_is_lost_costs_only_the_display(capsys: pytest.CaptureFixture[str]) -> None:
    with steps_shown("solo-r0", 8) as board:
        say(board, "begin", 0)
        ray.kill(board)
        board.tell.remote(3)
        time.sleep(0.3)
    assert shown(capsys) == ["solo-r0: stopped at 0/8 steps"]
