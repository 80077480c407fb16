"""What each job does: a stage of a run, tracked, its model registered."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from freesolo.cluster import connect
from freesolo.comparison import Comparison, as_table, check_comparable, compare
from freesolo.config import (
    EvaluateJob,
    ExtractJob,
    FineTuneJob,
    Job,
    PackJob,
    PredictJob,
    PretrainJob,
    TrainJob,
    TuneJob,
    metric_name,
)
from freesolo.data.files import join, read_bytes
from freesolo.data.ingest import over_shards, pack_on_cluster
from freesolo.data.pack import ShardTask, plan_shards
from freesolo.data.shards import DatasetManifest, read_dataset_manifest
from freesolo.data.sources import PhotoCollection, find_photos
from freesolo.gallery import gallery
from freesolo.inference.extract import free_mask_labelling
from freesolo.inference.pipeline import LabellingJob, LabellingResult, label_photos
from freesolo.inference.predict import prediction_labelling
from freesolo.registry.versions import register_backbone, register_segmenter
from freesolo.run_report import write_report
from freesolo.settings import PredictSettings, TrainSettings
from freesolo.stages import StageFolder, StageResult, run_stage, what_is_made
from freesolo.tracking.journal import Journal
from freesolo.tracking.record import read_record
from freesolo.tracking.server import resolve_server
from freesolo.tracking.witness import TrackedRun, Witness
from freesolo.train.control import BY_SIGNALS, TrainingControl
from freesolo.train.pretraining import PretrainInputs, pretrain, pretrain_inputs
from freesolo.train.segmentation import SegmenterInputs, choose_labels, segmenter_inputs, train_segmenter

_LOG = logging.getLogger(__name__)


def pretrain_stage(job: PretrainJob, folder: StageFolder, parent_url: str | None = None) -> StageResult:
    """Pre-train a backbone with DenseCL, and register it."""

    def work(inputs: PretrainInputs) -> StageResult:
        connect(job.resources)
        result = pretrain(job, inputs, folder, _tracked_run(job, folder, parent_url))
        return with_registration(result, job, folder)

    return run_stage(folder, what_is_made(job), partial(pretrain_inputs, job, folder.storage), work)


def extract_stage(job: ExtractJob, folder: StageFolder, parent_url: str | None = None) -> StageResult:
    """Find coarse object masks in every photo of a data set."""

    def work(labelling: LabellingJob) -> StageResult:
        connect(job.resources)
        with witnessed(job, folder, parent_url) as (witness, journal):
            tell_dataset(witness, job.dataset)
            return _labelled(folder, job.labels, label_photos(labelling), journal)

    return run_stage(folder, what_is_made(job), partial(free_mask_labelling, job, storage=folder.storage), work)


def train_stage(
    job: TrainJob, folder: StageFolder, parent_url: str | None = None, *, control: TrainingControl = BY_SIGNALS
) -> StageResult:
    """Train SOLO on a label set or on a data set's own annotations, or a fraction of those, and register it."""

    def work(inputs: SegmenterInputs) -> StageResult:
        connect(job.resources)
        result = train_segmenter(job, inputs, folder, _tracked_run(job, folder, parent_url), control)
        return with_registration(result, job, folder)

    return run_stage(folder, what_is_made(job), partial(training_inputs, job, folder), work)


def training_inputs(job: TrainJob, folder: StageFolder) -> SegmenterInputs:
    """What `train_stage` starts from. A fraction of the labels is chosen on the cluster; nothing is written.

    Raises:
        UsageError, JobError: As `segmenter_inputs` and `choose_labels`.
    """
    inputs = segmenter_inputs(job, folder.storage)
    if job.label_fraction < 1:
        connect(job.resources)
    return choose_labels(job, inputs, folder)


def predict_stage(job: PredictJob, folder: StageFolder, parent_url: str | None = None) -> StageResult:
    """Segment every photo of a data set: pseudo-labels for a next round, or predictions for their own sake."""

    def work(labelling: LabellingJob) -> StageResult:
        connect(job.resources)
        with witnessed(job, folder, parent_url) as (witness, journal):
            tell_dataset(witness, job.dataset)
            return _labelled(folder, job.labels, label_photos(labelling), journal)

    return run_stage(
        folder, what_is_made(job), partial(prediction_labelling, job, storage=folder.storage, kind=job.kind), work
    )


def predict_held_out(job: TuneJob | FineTuneJob, dataset: str, model: str, folder: StageFolder, parent_url: str) -> str:
    """What a model that a job trained finds in photos that it was not trained on.

    Returns:
        The label set, which is in the stage's folder.
    """
    predict = PredictJob(
        resources=job.resources,
        tracking=job.tracking.model_copy(update={"registered_model": None}),
        bounds=job.bounds,
        dataset=dataset,
        labels=join(folder.url, "labels"),
        weights=model,
        kind="predictions",
        predict=job.held_out,
    )
    return predict_stage(predict, folder, parent_url).outputs["labels"]


def evaluate_stage(job: EvaluateJob, folder: StageFolder, parent_url: str | None = None) -> StageResult:
    """Evaluate label sets against a data set's annotations, and write the page that shows them."""

    def work(_: DatasetManifest) -> StageResult:
        started = time.monotonic()
        connect(job.resources)
        with witnessed(job, folder, parent_url) as (witness, journal):
            tell_dataset(witness, job.dataset, context="evaluation")
            comparison = compare(job.dataset, job.labels, over_shards=over_shards)
            url = write_report(
                folder,
                witness,
                title=folder.run_name,
                summary=f"{', '.join(job.labels)}: found in the photos of {job.dataset}, beside its annotations.",
                stages=(),
                trained=(),
                rows=comparison.rows,
                gallery=gallery(job.dataset, job.labels, images=job.gallery_images, bounds=job.bounds),
                notes=(),
                settings=job,
                provenance={"Evaluation data set": comparison.dataset_digest},
            )
            metrics = show_comparison(comparison, witness, journal)
            return StageResult(folder.stage, time.monotonic() - started, {"report": url}, metrics=metrics)

    return run_stage(folder, what_is_made(job), partial(check_comparable, job.dataset, job.labels), work)


def pack_stage(job: PackJob, folder: StageFolder, parent_url: str | None = None) -> StageResult:
    """Pack photos into the shards that all jobs stream."""

    def plan() -> tuple[PhotoCollection, list[ShardTask]]:
        photos = find_photos(job.photos, images=job.images)
        tasks = plan_shards(
            photos, job.dataset, samples_per_shard=job.samples_per_shard, seed=job.seed, bounds=job.bounds
        )
        return photos, tasks

    def work(planned: tuple[PhotoCollection, list[ShardTask]]) -> StageResult:
        started = time.monotonic()
        connect(job.resources)
        manifest = pack_on_cluster(*planned, job.dataset, max_bad_samples=job.max_bad_samples)
        return StageResult(
            stage=folder.stage,
            seconds=time.monotonic() - started,
            outputs={"dataset": job.dataset},
            counts={"images": manifest.samples, "shards": len(manifest.shards), "skipped": len(manifest.skipped)},
        )

    return run_stage(folder, what_is_made(job), plan, work)


@contextmanager
def witnessed(job: Job, folder: StageFolder, parent_url: str | None) -> Iterator[tuple[Witness, Journal]]:
    """Tell MLflow of work that this process does, from entry to exit; how it ended too.

    Args:
        job: The resolved configuration.
        folder: Of the stage.
        parent_url: Folder of the run that it is a stage of.
    """
    journal = Journal(folder.url, resume_step=None)
    witness = Witness(_tracked_run(job, folder, parent_url), journal)
    witness.settings(job)
    status: Literal["FINISHED", "FAILED"] = "FAILED"
    try:
        yield witness, journal
        status = "FINISHED"
    finally:
        journal.flush()
        delivery = witness.close(status)
        journal.close()
        if delivery.reason is not None:
            _LOG.warning("MLflow: %s; later: freesolo deliver %s", delivery, folder.run_url)


def tell_dataset(witness: Witness, url: str, *, context: str = "training") -> None:
    """Tell MLflow which data set a run uses."""
    witness.dataset(url, read_dataset_manifest(url).digest, url, context=context)


def show_comparison(comparison: Comparison, witness: Witness, journal: Journal) -> dict[str, float | None]:
    """Keep an evaluation as metrics of its run: `<label set>/<metric>` each.

    Returns:
        The metrics; None where nothing could be measured.
    """
    metrics = {
        f"{metric_name(name)}/{metric}": value
        for name, row in comparison.rows.items()
        for metric, value in row.as_dict().items()
    }
    journal.append(0, {name: value for name, value in metrics.items() if value is not None})
    witness.text("metrics.md", as_table(comparison.rows))
    return metrics


def _tracked_run(job: Job, folder: StageFolder, parent_url: str | None) -> TrackedRun:
    server = resolve_server(job.tracking, folder.storage)
    name = folder.stage if parent_url is not None else folder.run_name
    return TrackedRun(folder.url, name, job.tracking.experiment, server, parent_url)


def _labelled(folder: StageFolder, labels: str, result: LabellingResult, journal: Journal) -> StageResult:
    counts = {"images": result.images, "instances": result.instances, "unreadable": result.unreadable}
    rate = {} if result.images_per_second is None else {"images_per_second": result.images_per_second}
    journal.append(0, {**counts, **rate})
    return StageResult(folder.stage, result.seconds, {"labels": labels}, counts, dict(rate))


def _serving(train: TrainSettings) -> PredictSettings:
    """How its model is served: at the largest size that it was trained at, by the thresholds of its pictures."""
    short_side, long_side_max = max(train.views.short_sides), train.views.long_side_max
    return PredictSettings(short_side=short_side, long_side_max=long_side_max, inference=train.inference, max_width=1.0)


def with_registration(result: StageResult, job: PretrainJob | TrainJob, folder: StageFolder) -> StageResult:
    """Register the stage's model, where the settings name one; its version joins the outputs."""
    name, server = job.tracking.registered_model, resolve_server(job.tracking, folder.storage)
    if name is None or server is None:
        return result
    record = read_record(folder.url)
    register = (
        register_backbone if isinstance(job, PretrainJob) else partial(register_segmenter, predict=_serving(job.train))
    )
    with tempfile.TemporaryDirectory() as local:
        path = Path(local) / "model.pt"
        path.write_bytes(read_bytes(result.outputs["model"]))
        version = register(
            path, name, server, experiment=job.tracking.experiment, run_id=record.run_id if record else None
        )
    return replace(result, outputs={**result.outputs, "registered": version.reference})
