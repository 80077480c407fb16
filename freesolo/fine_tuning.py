"""How much a start is worth where labels are few: supervised trainings from each of several starts, side by side.

    labels ─▶ 1% ─┬─▶ from FreeSOLO ─▶ training ─▶ held-out predictions ─┐
               ⊂  ├─▶ from DenseCL  ─▶ ...                               ├─▶ evaluation ─▶ report: AP against fraction
              5% ─┴─▶ from nothing  ─▶ ...                               ┘

After FreeSOLO (arXiv:2202.12181), sec. 4.2. All trainings of a fraction see the same photos, and all are evaluated on
the same others. Each training is a stage of the run, so submitting the run again does what is not done yet. The starts'
weights are copied into the run first, and beside each copy is written what it is of: when an alias of the registry
moves meanwhile, or the original is deleted, that changes nothing.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from freesolo.cluster import connect
from freesolo.comparison import check_held_out, compare
from freesolo.config import FineTuneJob, TrainJob, start_folder, training_name
from freesolo.data.files import exists, join, read_bytes, write_atomic
from freesolo.data.ingest import choose_subsets_on_cluster, over_shards, write_subset_on_cluster
from freesolo.data.shards import read_dataset_manifest
from freesolo.data.subset import Subset, SubsetSource, finished_subset, part_of
from freesolo.evaluation import Metrics
from freesolo.gallery import gallery
from freesolo.jobs import predict_held_out, show_comparison, tell_dataset, train_stage, witnessed
from freesolo.registry.weights import resolve_weights
from freesolo.report.records import Trend
from freesolo.run_report import write_report
from freesolo.settings import TrainSettings
from freesolo.stages import StageFolder, StageResult, run_stage, what_is_made
from freesolo.tracking.journal import Journal
from freesolo.tracking.server import resolve_server
from freesolo.tracking.witness import Witness
from freesolo.train.initial import keep_weights
from freesolo.train.segmentation import labels_url, segmenter_inputs

_DRAWN = {"segm/AP": "Mask AP, %", "category/AP": "AP by category, %"}
_SUMMARY = (
    "Supervised fine-tuning with few labels, after FreeSOLO (arXiv:2202.12181), sec. 4.2: SOLO trained on fractions of "
    "the annotated photos, beginning with {starts}. Every fraction has each category's share of photos, a larger one "
    "contains the smaller ones, and all models are evaluated on the same other photos."
)


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a start's weights were when they were looked at, before they were copied.

    Attributes:
        weights: As the job names them.
        sha256: Of the file, in hexadecimal.
        name: Of the registered model; None where they are not from the registry.
        version: Of the registered model; None where they are not from the registry.
    """

    weights: str
    sha256: str
    name: str | None
    version: str | None

    @property
    def pinned(self) -> str:
        """What they are called where no alias may move."""
        return self.weights if self.version is None else f"models:/{self.name}/{self.version}"

    def __str__(self) -> str:
        """For people."""
        which = "" if self.version is None else f" (version {self.version})"
        return f"{self.weights}{which}, sha256 {self.sha256}"


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the trainings start from.

    Attributes:
        subsets: The fractions of the labels that are not written yet.
        origins: Of the starts that are not copied yet.
    """

    subsets: list[Subset]
    origins: dict[str, _Origin]


@dataclass(frozen=True, slots=True)
class _Trained:
    """One training and its predictions on the held-out photos.

    Attributes:
        start: What it began with.
        fraction: Of the labels.
        folder: Of the training.
        result: Of the training.
        labels: URL of the predictions.
    """

    start: str
    fraction: float
    folder: StageFolder
    result: StageResult
    labels: str

    @property
    def name(self) -> str:
        """For people and MLflow."""
        return training_name(self.start, self.fraction)


def fine_tune_stage(job: FineTuneJob, folder: StageFolder) -> StageResult:
    """Train from each start with each fraction of the labels, evaluate all, and plot AP against fraction."""

    def work(inputs: _Inputs) -> StageResult:
        started = time.monotonic()
        connect(job.resources)
        with witnessed(job, folder, None) as (witness, journal):
            tell_dataset(witness, job.dataset)
            for subset in inputs.subsets:
                write_subset_on_cluster(subset, labels_url(folder, subset.source), bounds=job.bounds)
            starts = {
                name: keep_weights(reference, _copy_url(folder, name), job.tracking, folder.storage)
                for name, reference in _pin_starts(job, folder, inputs.origins).items()
            }
            trained = [
                _train(job, folder, start, weights, fraction)
                for fraction in job.fractions
                for start, weights in starts.items()
            ]
            result = _report(job, folder, trained, witness, journal)
        return replace(result, seconds=time.monotonic() - started)

    return run_stage(folder, what_is_made(job), partial(_prepare, job, folder), work)


def _prepare(job: FineTuneJob, folder: StageFolder) -> _Inputs:
    """Refuse at the start what a later stage would refuse hours later; no GPU is taken for it.

    Raises:
        UsageError: Data sets or starts do not fit, or a fraction leaves a category without an object.
    """
    manifest = read_dataset_manifest(job.dataset)
    check_held_out(job.evaluation_dataset, manifest, num_categories=job.train.model.num_categories)
    origins: dict[str, _Origin] = {}
    for start, weights in job.starts.items():
        begun_with = weights
        if weights is not None and exists(_copy_url(folder, start)):
            begun_with = _copy_url(folder, start)
        elif weights is not None:
            origins[start] = _origin(job, folder, weights)
            begun_with = origins[start].pinned
        segmenter_inputs(_train_job(job, start, begun_with, 1.0), folder.storage)
    sources = [SubsetSource(manifest.digest, part, job.label_seed) for part in job.fractions if part < 1]
    missing = [source for source in sources if not finished_subset(labels_url(folder, source), source)]
    if missing:
        connect(job.resources)
    return _Inputs(choose_subsets_on_cluster(job.dataset, manifest, missing, bounds=job.bounds), origins)


def _origin(job: FineTuneJob, folder: StageFolder, weights: str) -> _Origin:
    """What weights are now."""
    with tempfile.TemporaryDirectory() as local:
        found = resolve_weights(weights, Path(local), server=resolve_server(job.tracking, folder.storage))
        return _Origin(weights, found.sha256, found.name, found.version)


def _pin_starts(job: FineTuneJob, folder: StageFolder, origins: Mapping[str, _Origin]) -> dict[str, str | None]:
    """Write what is about to be copied beside where it goes.

    Returns:
        All starts, those that are not copied yet by their very versions.
    """
    for start, origin in origins.items():
        if not exists(_copy_url(folder, start)):  # by who held the lease just now
            write_atomic(_origin_url(folder, start), json.dumps(asdict(origin), indent=1).encode())
    return job.starts | {start: origin.pinned for start, origin in origins.items()}


def _copy_url(folder: StageFolder, start: str) -> str:
    return join(folder.url, "starts", f"{start_folder(start)}.pt")


def _origin_url(folder: StageFolder, start: str) -> str:
    return join(folder.url, "starts", f"{start_folder(start)}.json")


def _told_start(job: FineTuneJob, folder: StageFolder, start: str) -> str:
    """What a start was, for people; of a copy of before that was written down, what the job calls it."""
    url = _origin_url(folder, start)
    return str(_Origin(**json.loads(read_bytes(url)))) if exists(url) else job.starts[start] or "random weights"


def _train(job: FineTuneJob, folder: StageFolder, start: str, weights: str | None, fraction: float) -> _Trained:
    """One training, and what it finds in the photos that are held out."""
    name = f"{start_folder(start)}-{fraction!r}"
    training, held_out = folder.sibling(f"train-{name}"), folder.sibling(f"held-out-{name}")
    result = train_stage(_train_job(job, start, weights, fraction), training, folder.url)
    predicted = predict_held_out(job, job.evaluation_dataset, result.outputs["model"], held_out, folder.url)
    return _Trained(start, fraction, training, result, predicted)


def _train_job(job: FineTuneJob, start: str, weights: str | None, fraction: float) -> TrainJob:
    name = job.tracking.registered_model
    registered = None if name is None else f"{name}-{start_folder(start)}"
    return TrainJob(
        resources=job.resources,
        tracking=job.tracking.model_copy(update={"registered_model": registered}),
        bounds=job.bounds,
        dataset=job.dataset,
        label_fraction=fraction,
        label_seed=job.label_seed,
        train=train_settings(job, fraction).model_copy(update={"initial_weights": weights}),
    )


def train_settings(job: FineTuneJob, fraction: float) -> TrainSettings:
    """The settings of the trainings on a fraction: with `min_steps` fewer steps, and milestones in proportion."""
    loop, optimizer = job.train.loop, job.train.optimizer
    if job.min_steps is None:
        return job.train
    steps = min(max(part_of(loop.steps, fraction), job.min_steps), loop.steps)
    milestones = tuple(max(1, round(milestone * steps / loop.steps)) for milestone in optimizer.milestones)
    return job.train.model_copy(
        update={
            "loop": loop.model_copy(update={"steps": steps}),
            "optimizer": optimizer.model_copy(update={"milestones": milestones}),
        }
    )


def _report(
    job: FineTuneJob, folder: StageFolder, trained: Sequence[_Trained], witness: Witness, journal: Journal
) -> StageResult:
    """Evaluate all, tell MLflow, write the page. Its gallery is of the smallest fraction, where starts differ most."""
    comparison = compare(job.evaluation_dataset, {one.name: one.labels for one in trained}, over_shards=over_shards)
    metrics = show_comparison(comparison, witness, journal)
    least = {one.name: one.labels for one in trained if one.fraction == job.fractions[0]}
    photos = {f"{_percent(one.fraction):g}% of the labels": one.result.counts["images"] for one in trained}
    registered = {one.name: one.result.outputs["registered"] for one in trained if "registered" in one.result.outputs}
    url = write_report(
        folder,
        witness,
        title=folder.run_name,
        summary=_SUMMARY.format(starts=", ".join(job.starts)),
        stages=[(one.name, one.result) for one in trained],
        trained=[(one.name, one.folder) for one in trained],
        rows=comparison.rows,
        trends=trends(trained, comparison.rows),
        gallery=gallery(job.evaluation_dataset, least, images=job.gallery_images, bounds=job.bounds),
        notes=job.notes,
        settings=job,
        provenance={
            "Data set": f"{job.dataset}, {read_dataset_manifest(job.dataset).digest}",
            "Photos trained on": "\n".join(f"{part}: {count}" for part, count in photos.items()),
            "Starts": "\n".join(f"{name}: {_told_start(job, folder, name)}" for name in job.starts),
            "Evaluated on": f"{job.evaluation_dataset}, {comparison.dataset_digest}",
            "Registered": ", ".join(registered.values()) or "nothing: tracking.registered_model is not set",
        },
    )
    return StageResult(folder.stage, 0.0, {"report": url, **registered}, metrics=metrics)


def trends(trained: Sequence[_Trained], rows: Mapping[str, Metrics]) -> tuple[Trend, ...]:
    """AP in percent against percent of the labels, a line a start; by category too where models tell any apart."""
    values = {name: row.as_dict() for name, row in rows.items()}
    drawn = [metric for metric in _DRAWN if any(metric in row for row in values.values())]
    return tuple(
        Trend(
            name=start,
            chart=_DRAWN[metric],
            unit="% of the labels",
            places=tuple(_percent(one.fraction) for one in trained if one.start == start),
            values=tuple(_percent_or_none(values[one.name].get(metric)) for one in trained if one.start == start),
        )
        for metric in drawn
        for start in dict.fromkeys(one.start for one in trained)
    )


def _percent(share: float) -> float:
    return round(100 * share, 10)


def _percent_or_none(share: float | None) -> float | None:
    return None if share is None else _percent(share)
