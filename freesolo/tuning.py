"""Sweeps: many trainings that differ in some settings, of which Ray Tune says what runs when, and which fall behind.

    space ──▶ trials, all drawn at the start ──▶ Tune: as many at once as there is room for
                                                  │   ▲ at each checkpoint: the metric
                                                  ▼   │
                                            trial-00000, trial-00001, ...: each a training of its own under Ray Train
                                                  │
        of those that went to the end the best ◀──┘ ──▶ best.yaml, registry

A trial is a stage of the run, as `jobs/train_solo.py` would have it: its folder holds what it has done, and from there
it goes on when the sweep is submitted again. That and the draws, which are a function of the settings, is all that a
sweep needs to go on. Tune's own snapshots, which would have to be unpickled from the storage, are not read.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from freesolo.cluster import connect
from freesolo.comparison import check_held_out, compare
from freesolo.config import TuneJob
from freesolo.config_file import dump_config
from freesolo.data.files import exists, join, write_atomic
from freesolo.data.ingest import choose_subsets_on_cluster, over_shards, write_subset_on_cluster
from freesolo.data.shards import DatasetManifest
from freesolo.data.subset import Subset, SubsetSource
from freesolo.errors import JobError
from freesolo.jobs import (
    predict_held_out,
    show_comparison,
    tell_dataset,
    train_stage,
    with_registration,
    witnessed,
)
from freesolo.stages import StageFolder, StageResult, run_stage, what_is_made
from freesolo.sweep import Sweep, TrialOutcome
from freesolo.tracking.journal import Journal
from freesolo.tracking.witness import Witness
from freesolo.train.initial import keep_weights
from freesolo.train.segmentation import labels_url, missing_labels, segmenter_inputs
from freesolo.trials import run_trials

_LOG = logging.getLogger(__name__)


def tune_stage(job: TuneJob, folder: StageFolder) -> StageResult:
    """Train many times with other settings, and keep the best model and its configuration."""

    def work(subsets: Sequence[Subset]) -> StageResult:
        started = time.monotonic()
        connect(job.resources)
        with witnessed(job, folder, None) as (witness, journal):
            tell_dataset(witness, job.dataset)
            for subset in subsets:  # before several trials want it at once
                write_subset_on_cluster(subset, labels_url(folder, subset.source), bounds=job.bounds)
            sweep = Sweep.of(job, folder, _keep_starts(job, folder))
            failed = run_trials(sweep, job.tune)
            outcomes = [sweep.outcome(number, failed.get(number)) for number in range(len(sweep.jobs))]
            if job.evaluation_dataset is not None:
                outcomes = _evaluated(job, job.evaluation_dataset, sweep, outcomes, witness, journal)
            table = as_table(outcomes, job.tune.metric, _held_out_metric(job))
            write_atomic(join(folder.url, "trials.md"), table.encode())
            witness.text("trials.md", table)
            best = best_of(outcomes, job.tune.mode, held_out=job.evaluation_dataset is not None)
            metrics = {job.tune.metric: best.metric}
            if (metric := _held_out_metric(job)) is not None:
                metrics[metric] = best.held_out
            journal.append(0, {name: value for name, value in metrics.items() if value is not None})
            _LOG.info("%d trials; the best: %s", len(outcomes), best)
            result = _with_best(job, sweep, outcomes.index(best), best)
        counts = {"trials": len(outcomes), "steps": sum(outcome.step for outcome in outcomes)}
        counts |= {
            f"trials {state}": sum(outcome.state == state for outcome in outcomes)
            for state in ("finished", "stopped early", "failed")
        }
        return replace(result, seconds=time.monotonic() - started, counts=counts, metrics=metrics)

    return run_stage(folder, what_is_made(job), partial(_prepare, job, folder), work)


def _prepare(job: TuneJob, folder: StageFolder) -> list[Subset]:
    """See that the trials could start, once for all that start from the same.

    Returns:
        The fractions of the labels that are not written yet.

    Raises:
        UsageError, JobError: As `segmenter_inputs` and `choose_subsets_on_cluster`.
    """
    different = {}
    for values in job.trials():
        trial = job.trial_job(values)
        starts_from = trial.model_dump_json(
            include={name: True for name in ("dataset", "labels", "label_fraction", "label_seed")}
            | {"train": {"model", "initial_weights"}}
        )
        different[starts_from] = trial
    manifests: dict[str, DatasetManifest] = {}
    missing: dict[str, dict[SubsetSource, None]] = {}  # by data set, each of which is read once for all
    kept = {reference: url for reference, url in _starts(job, folder).items() if exists(url)}
    for trial in different.values():
        if (start := trial.train.initial_weights) in kept:  # the reference may name another by now, or none
            trial = trial.model_copy(update={"train": trial.train.model_copy(update={"initial_weights": kept[start]})})
        manifest = manifests[trial.dataset] = segmenter_inputs(trial, folder.storage).manifest
        if job.evaluation_dataset is not None:
            check_held_out(job.evaluation_dataset, manifest, num_categories=trial.train.model.num_categories)
        if (source := missing_labels(trial, manifest, folder)) is not None:
            missing.setdefault(trial.dataset, {})[source] = None
    if missing:
        connect(job.resources)
    return [
        subset
        for dataset, sources in missing.items()
        for subset in choose_subsets_on_cluster(dataset, manifests[dataset], list(sources), bounds=job.bounds)
    ]


def _keep_starts(job: TuneJob, folder: StageFolder) -> dict[str | None, str | None]:
    """The sweep's own copy of each of the weights that trials start from; of none, none."""
    return {
        reference: keep_weights(reference, url, job.tracking, folder.storage)
        for reference, url in _starts(job, folder).items()
    }


def _starts(job: TuneJob, folder: StageFolder) -> dict[str | None, str]:
    """For each reference that trials start from where the sweep keeps its copy; of none nothing is there."""
    references = dict.fromkeys(job.trial_job(values).train.initial_weights for values in job.trials())
    return {reference: join(folder.url, "starts", f"{number}.pt") for number, reference in enumerate(references)}


def _held_out_metric(job: TuneJob) -> str | None:
    return None if job.evaluation_dataset is None else job.tune.evaluation_metric


def _evaluated(
    job: TuneJob, dataset: str, sweep: Sweep, outcomes: Sequence[TrialOutcome], witness: Witness, journal: Journal
) -> list[TrialOutcome]:
    """The outcomes, those of trials that went to the end with what they are worth on the held-out photos."""
    predictions = {}
    for number, outcome in enumerate(outcomes):
        if outcome.state == "finished":
            folder = sweep.folder.sibling(f"held-out-{number:05d}")
            trained = train_stage(sweep.jobs[number], sweep.folder_of(number))
            model = trained.outputs["model"]
            predictions[outcome.name] = predict_held_out(job, dataset, model, folder, sweep.folder.url)
    comparison = compare(dataset, predictions, over_shards=over_shards)
    show_comparison(comparison, witness, journal)
    worth = {name: row.as_dict()[job.tune.evaluation_metric] for name, row in comparison.rows.items()}
    return [replace(outcome, held_out=worth.get(outcome.name)) for outcome in outcomes]


def best_of(outcomes: Sequence[TrialOutcome], mode: Literal["min", "max"], *, held_out: bool = False) -> TrialOutcome:
    """The best of those that went to the end, and of equals the first.

    Args:
        outcomes: Of all trials.
        mode: Of the training's metric.
        held_out: Whether the best is who does best on the held-out photos instead.

    Raises:
        JobError: None did; says what the first failed of.
    """
    finished = [outcome for outcome in outcomes if outcome.state == "finished" and outcome.metric is not None]
    if not finished:
        reason = next((outcome.reason for outcome in outcomes if outcome.reason), "all were stopped early")
        raise JobError(f"none of {len(outcomes)} trials went to the end: {reason}; give tune.space other values")
    if held_out:
        return max(finished, key=lambda outcome: -1.0 if outcome.held_out is None else outcome.held_out)
    pick = min if mode == "min" else max
    return pick(finished, key=lambda outcome: outcome.metric or 0.0)


def as_table(outcomes: Sequence[TrialOutcome], metric: str, held_out_metric: str | None = None) -> str:
    """The trials as a Markdown table."""
    measured = [metric] if held_out_metric is None else [metric, held_out_metric]
    columns = ["trial", *outcomes[0].values, *measured, "step", "state"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for outcome in outcomes:
        figures = [outcome.metric] if held_out_metric is None else [outcome.metric, outcome.held_out]
        cells = [_shown(value, "null") for value in outcome.values.values()] + [_shown(one, "-") for one in figures]
        lines.append(f"| {' | '.join([outcome.name, *cells, str(outcome.step), outcome.state])} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any, none: str) -> str:
    if value is None:
        return none
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _with_best(job: TuneJob, sweep: Sweep, number: int, best: TrialOutcome) -> StageResult:
    """Register the best trial's model, and write its configuration where one can train from it."""
    folder, trial = sweep.folder, sweep.folder_of(number)
    winner = sweep.jobs[number].model_copy(update={"resources": job.resources, "tracking": job.tracking})
    config = join(folder.url, "best.yaml")
    write_atomic(config, f"# {best}, of run {folder.run_name}.\n{dump_config(winner)}".encode())
    result = with_registration(train_stage(winner, trial), winner, trial)
    outputs = {"trial": best.name, "values": json.dumps(best.values), "config": config, **result.outputs}
    return StageResult(folder.stage, 0.0, outputs)
