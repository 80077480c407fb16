"""Who goes on in a sweep: what Ray's schedulers, set up as ours are, say to trials, and what these tell again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from freesolo.config import TrainJob
from freesolo.config_file import parse_config
from freesolo.settings import RangeSettings, TuneSettings
from freesolo.stages import StageFolder
from freesolo.sweep import Sweep
from freesolo.tracking.journal import Journal
from freesolo.trials import _reason, _scheduler

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


class TrialOfTune:
    """Of Tune's trials what schedulers look at."""

    def __init__(self, name: str) -> None:
        self.trial_id = name
        self.status = "PENDING"


class Controller:
    """Of Tune's controller what schedulers ask."""

    def __init__(self, trials: list[TrialOfTune]) -> None:
        self._trials = trials

    def get_live_trials(self) -> list[TrialOfTune]:
        return [trial for trial in self._trials if trial.status != "TERMINATED"]


class Tuning:
    """A scheduler of ours, and as many trials as there are names, all of them waiting."""

    def __init__(self, names: str, *, steps: int, every: int, **settings: Any) -> None:
        tune = TuneSettings(space={"train.optimizer.learning_rate": RangeSettings(grid=(0.1, 0.2))}, **settings)
        self._scheduler = _scheduler(tune, [train_job(steps=steps, checkpoint_every=every)])
        self._scheduler.set_search_properties("metric", tune.mode)
        self._trials = {name: TrialOfTune(name) for name in names}
        self._controller: Any = Controller(list(self._trials.values()))
        for trial in self._controller.get_live_trials():
            self._scheduler.on_trial_add(self._controller, trial)

    def tell(self, name: str, step: int, metric: float) -> str:
        """What the scheduler says to a trial's report."""
        trial: Any = self._trials[name]
        trial.status = "RUNNING"
        decision = self._scheduler.on_trial_result(self._controller, trial, {"step": step, "metric": metric})
        if decision == STOP:
            self.end(name, step, metric)
        return decision

    def end(self, name: str, step: int, metric: float) -> None:
        trial: Any = self._trials[name]
        trial.status = "TERMINATED"
        self._scheduler.on_trial_complete(self._controller, trial, {"step": step, "metric": metric})


def train_job(**loop: int) -> TrainJob:
    raw = {"dataset": "data", "train": {"supervision": "masks", "loop": {"batch_size": 4, **loop}}}
    return parse_config(TrainJob, raw, source="test")


@pytest.mark.parametrize("mode", ["min", "max"])
def test_by_the_median_a_laggard_is_stopped_and_none_has_to_wait_for_another(mode: str) -> None:
    """Six trials, two at once: while the first ones run others wait for room, and a trial cannot be paused."""
    sign = 1.0 if mode == "min" else -1.0
    tuning = Tuning("abcdef", steps=8, every=2, scheduler="median", mode=mode)
    for pair in ("ab", "cd"):
        for step in (2, 4, 6):
            assert [tuning.tell(name, step, sign * 1.0) for name in pair] == [CONTINUE, CONTINUE], (pair, step)
        for name in pair:
            tuning.end(name, 8, sign * 1.0)
    assert tuning.tell("e", 2, sign * 0.5) == CONTINUE
    assert tuning.tell("f", 2, sign * 2.0) == STOP
    assert tuning.tell("e", 4, sign * 0.5) == CONTINUE


@pytest.mark.parametrize(
    ("mode", "stopped"),
    [
        # At step 2: d is better than the median of 3, 1 and 4; at step 4 it is worse than that of 3 and 1, which is 2.
        ("min", {("c", 2), ("d", 4)}),
        # At step 2: b is worse than 3, c better than the median of 3 and 1, d worse than that of 3, 1 and 4.
        ("max", {("b", 2), ("d", 2)}),
    ],
)
def test_asha_stops_who_is_worse_than_half_of_those_that_came_to_a_rung_before(
    mode: str, stopped: set[tuple[str, int]]
) -> None:
    tuning = Tuning("abcd", steps=8, every=2, scheduler="asha", reduction_factor=2.0, mode=mode)
    told = {2: {"a": 3.0, "b": 1.0, "c": 4.0, "d": 2.0}, 4: {"a": 3.0, "b": 1.0, "c": 4.0, "d": 2.5}}
    found: set[tuple[str, int]] = set()
    for step, metrics in told.items():
        for name, metric in metrics.items():
            gone = name in {before for before, _ in found}
            if not gone and tuning.tell(name, step, metric) == STOP:
                found.add((name, step))
    assert found == stopped


def sweep_of_one(folder: Path, *, steps: int, entries: int) -> Sweep:
    """A sweep whose trial has told every 10 steps, up to `entries`, a loss that is the step; checkpoints: every 25."""
    job = train_job(steps=steps, log_every=10, checkpoint_every=25)
    sweep = Sweep(StageFolder(str(folder), "run", "tune"), "loss", ({},), (job,), 1)
    journal = Journal(sweep.folder_of(0).url)
    for step in range(10, entries + 1, 10):
        journal.append(step, {"loss": float(step)})
        journal.append(step, {"another": 0.0})
    journal.close()
    return sweep


def steps_and_metrics(sweep: Sweep) -> list[tuple[int, float]]:
    return [(report["step"], report["metric"]) for report in sweep.told(0)]


def test_what_was_told_at_checkpoints_between_two_entries_is_told_again(tmp_path: Path) -> None:
    assert steps_and_metrics(sweep_of_one(tmp_path, steps=200, entries=0)) == []
    assert steps_and_metrics(sweep_of_one(tmp_path, steps=200, entries=20)) == []
    assert steps_and_metrics(sweep_of_one(tmp_path, steps=200, entries=60)) == [(25, 20.0), (50, 50.0)]


def test_the_last_checkpoint_is_told_again_where_the_journal_ends_before_it(tmp_path: Path) -> None:
    sweep = sweep_of_one(tmp_path, steps=200, entries=70)
    for name in ("step-00000050-again", "step-00000075"):
        Path(sweep.folder_of(0).url, "checkpoints", name).mkdir(parents=True)
        Path(sweep.folder_of(0).url, "checkpoints", name, "learner.pt").touch()
    assert steps_and_metrics(sweep) == [(25, 20.0), (50, 50.0), (75, 70.0)]


def test_what_was_stopped_early_tells_no_more_than_before(tmp_path: Path) -> None:
    sweep = sweep_of_one(tmp_path, steps=200, entries=90)  # it went on for a while until it heard of it
    Path(sweep.stopped_url(0)).write_text('{"step": 75, "metric": 70.0}')
    assert steps_and_metrics(sweep) == [(25, 20.0), (50, 50.0), (75, 70.0)]
    assert sweep.outcome(0, None).step == 70


def test_what_is_at_its_end_is_not_decided_on(tmp_path: Path) -> None:
    sweep = sweep_of_one(tmp_path, steps=100, entries=100)
    assert steps_and_metrics(sweep) == [(25, 20.0), (50, 50.0), (75, 70.0)]


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (
            "\x1b[36mray::Trial.train()\x1b[39m (pid=1)\n  File x, line 1, in step\n    raise self._error\n"
            "freesolo.errors.JobError: step 3: a loss is not finite (loss=nan); image ids of the batch: [1]\n",
            "step 3: a loss is not finite (loss=nan); image ids of the batch: [1]",
        ),
        (
            "The actor died unexpectedly before finishing this task.\n\tclass_name: Trial\n\tactor_id: 1f\n",
            "The actor died unexpectedly before finishing this task.",
        ),
    ],
)
def test_why_a_trial_ended_is_told_in_one_line(kept: str, reason: str) -> None:
    assert _reason(f"Failure # 1 (occurred at 2026-11-26_22-00-00)\n{kept}\n") == reason
