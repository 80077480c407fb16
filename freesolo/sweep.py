"""What is known of a sweep: its trials, what each of them sets, and from their folders what each has done."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from freesolo.cluster import trainings_at_once
from freesolo.config import TrainJob, TuneJob
from freesolo.data.files import exists, join, list_files, read_bytes
from freesolo.space import Values
from freesolo.stages import StageFolder
from freesolo.tracking.journal import read_journal


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """What came of a trial.

    Attributes:
        name: Of its stage.
        values: What it set of the space.
        state: Whether it went to the end.
        step: The last one that the metric is known of; 0: none.
        metric: Its value there; None: never reported.
        reason: Why it failed; None where it did not.
        held_out: Of one that went to the end, what its predictions on the held-out photos are worth; None without such
            photos, or where they have no object.
    """

    name: str
    values: Values
    state: Literal["finished", "stopped early", "failed"]
    step: int
    metric: float | None
    reason: str | None = None
    held_out: float | None = None

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.values.items())
        metric = "" if self.metric is None else f", {self.metric:g} at step {self.step}"
        held_out = "" if self.held_out is None else f", {self.held_out:.4f} on held-out photos"
        return f"{self.name} ({values}): {self.state}{metric}{held_out}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True)
class Sweep:
    """What all processes of a sweep know.

    Attributes:
        folder: Of the sweep's own stage; its trials' are beside it.
        metric: That trials are compared by.
        values: What each trial sets of the space.
        jobs: The trials' trainings.
        at_once: How many of them.
    """

    folder: StageFolder
    metric: str
    values: tuple[Values, ...]
    jobs: tuple[TrainJob, ...]
    at_once: int

    @classmethod
    def of(cls, job: TuneJob, folder: StageFolder, starts: Mapping[str | None, str | None]) -> Sweep:
        """Share out the connected cluster.

        Args:
            job: What to do.
            folder: Of the sweep's own stage.
            starts: For each `train.initial_weights` of the trials where they are kept.

        Raises:
            UsageError: It cannot hold a single trial.
        """
        values = job.trials()
        at_most = min(job.tune.max_concurrent or len(values), len(values))
        at_once, data_cpus = trainings_at_once(job.resources, at_most=at_most)
        shares = {
            "resources": job.resources.model_copy(update={"data_cpus": data_cpus}),
            "tracking": job.tracking.model_copy(update={"registered_model": None}),  # the best one's is, at the end
        }
        jobs = []
        for trial in map(job.trial_job, values):
            train = trial.train.model_copy(update={"initial_weights": starts[trial.train.initial_weights]})
            jobs.append(trial.model_copy(update={**shares, "train": train}))
        return cls(folder, job.tune.metric, values, tuple(jobs), at_once)

    def folder_of(self, number: int) -> StageFolder:
        return self.folder.sibling(f"trial-{number:05d}")

    def finished(self, number: int) -> bool:
        return exists(join(self.folder_of(number).url, "result.json"))

    def over(self, number: int) -> bool:
        return self.finished(number) or exists(self.stopped_url(number))

    def stopped_url(self, number: int) -> str:
        """Of the file that says that a trial was stopped early, and where."""
        return join(self.folder_of(number).url, "stopped.json")

    def stopped(self, number: int) -> dict[str, Any] | None:
        """What a trial told last before it was stopped early; None where it was not."""
        if self.finished(number) or not exists(self.stopped_url(number)):
            return None
        told: dict[str, Any] = json.loads(read_bytes(self.stopped_url(number)))
        return told

    def reports(self, number: int) -> list[dict[str, Any]]:
        """What a trial's journal says of the metric, ascending by step; after an early stop no more."""
        stopped = self.stopped(number)
        return [
            {"step": entry.step, "metric": entry.metrics[self.metric]}
            for entry in read_journal(self.folder_of(number).url)
            if self.metric in entry.metrics and (stopped is None or entry.step <= stopped["step"])
        ]

    def told(self, number: int) -> list[dict[str, Any]]:
        """What a trial has told at its checkpoints, ascending by step: the metric as it was last known there.

        What it tells at its end is not among it.
        """
        loop = self.jobs[number].train.loop
        reports = self.reports(number)
        steps = range(loop.checkpoint_every, min(self._reached(number) + 1, loop.steps), loop.checkpoint_every)
        known = {step: [report for report in reports if report["step"] <= step] for step in steps}
        return [{**until[-1], "step": step} for step, until in known.items() if until]

    def _reached(self, number: int) -> int:
        """The last step that is known to be done. The journal alone may end before the last checkpoint."""
        if (stopped := self.stopped(number)) is not None:
            return int(stopped["step"])
        saved = re.findall(
            r"^step-(\d+)", "\n".join(list_files(join(self.folder_of(number).url, "checkpoints"))), re.MULTILINE
        )
        return max([int(report["step"]) for report in self.reports(number)] + [int(step) for step in saved], default=0)

    def outcome(self, number: int, reason: str | None) -> TrialOutcome:
        last = next(reversed(self.reports(number)), {"step": 0, "metric": None})
        state: Literal["finished", "stopped early", "failed"] = "failed"
        if self.finished(number):
            state, reason = "finished", None
        elif reason is None:
            state = "stopped early"
        return TrialOutcome(
            self.folder_of(number).stage, self.values[number], state, int(last["step"] or 0), last["metric"], reason
        )
