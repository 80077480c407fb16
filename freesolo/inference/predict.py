"""Batch prediction: a trained segmenter finds instances in every photo of a data set.

Self-training's pseudo-labels (FreeSOLO, arXiv:2202.12181, sec. 3.2) and anyone's predictions are made alike: the same
pool as Free Mask extraction's, with another model in it. They differ in settings, and in what the label set is called.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from freesolo.config import PredictJob
from freesolo.data.labels import LabelPlan, check_label_set
from freesolo.data.shards import read_dataset_manifest
from freesolo.inference.batches import BatchPlan
from freesolo.inference.labellers import SoloLabeller
from freesolo.inference.pipeline import LabellingJob, LabellingResult, label_photos, plan_settings
from freesolo.inference.pool import ModelPool
from freesolo.models.model_file import load_model
from freesolo.registry.weights import resolve_weights
from freesolo.solo.model import INPUT_DIVISOR
from freesolo.tracking.server import resolve_server


def predict_labels(
    job: PredictJob,
    *,
    storage: str,
    kind: Literal["pseudo-labels", "predictions"] = "predictions",
    parent: str | None = None,
) -> LabellingResult:
    """Make the label set of a segmenter's predictions, on the cluster that this process is connected to.

    Kill it anywhere and call it again: finished shards are not done again, and the label set is the same.

    Arguments are those of `prediction_labelling`.

    Raises:
        UsageError: As `prediction_labelling`, or the pool does not fit the cluster.
        JobError: More photos than `predict.max_bad_samples` are unreadable, or a shard was altered.
    """
    return label_photos(prediction_labelling(job, storage=storage, kind=kind, parent=parent))


def prediction_labelling(
    job: PredictJob,
    *,
    storage: str,
    kind: Literal["pseudo-labels", "predictions"] = "predictions",
    parent: str | None = None,
) -> LabellingJob:
    """Read what a prediction starts from, and see that it fits; needs no cluster.

    Args:
        job: What to do.
        storage: Where runs are kept; the model registry is looked for there where nothing else names one.
        kind: What the labels are for.
        parent: Digest of the label set that the model was trained on; None: as the model's own lineage says.

    Raises:
        UsageError: There is no such data set or model, the weights are no segmenter's, or a label set made otherwise is
            at the URL.
    """
    settings = job.predict
    dataset = read_dataset_manifest(job.dataset)
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolve_weights(job.weights, Path(folder), server=resolve_server(job.tracking, storage))
        model = load_model(resolved.path, "segmenter")
    made_by = {"weights": job.weights, "sha256": resolved.sha256, "version": resolved.version}
    if categories := model.lineage.get("categories"):
        made_by |= {"categories": categories}
    plan = LabelPlan(
        dataset_digest=dataset.digest,
        dataset_url=job.dataset,
        kind=kind,
        model=made_by,
        settings=plan_settings(settings, job.resources),
        parent=parent or model.lineage.get("labels_digest"),
    )
    check_label_set(job.labels, plan)
    return LabellingJob(
        name="predict",
        dataset_url=job.dataset,
        dataset=dataset,
        labels_url=job.labels,
        plan=plan,
        batches=BatchPlan(
            settings.short_side, settings.long_side_max, settings.batch_size, INPUT_DIVISOR, bounds=job.bounds
        ),
        pool=ModelPool(partial(SoloLabeller, settings, replace(model, state_dict={})), model.state_dict, job.resources),
        max_bad_samples=settings.max_bad_samples,
    )
