"""Free Mask extraction: a frozen self-supervised backbone finds coarse object masks in every photo of a data set.

Source: FreeSOLO (arXiv:2202.12181) sec. 3.1. The first label set that a SOLO is trained on, embeddings included.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from freesolo.config import ExtractJob
from freesolo.data.labels import LabelPlan, check_label_set
from freesolo.data.shards import read_dataset_manifest
from freesolo.inference.batches import BatchPlan
from freesolo.inference.labellers import FreeMaskLabeller
from freesolo.inference.pipeline import LabellingJob, LabellingResult, label_photos, plan_settings
from freesolo.inference.pool import ModelPool
from freesolo.models.resnet import build_resnet
from freesolo.models.weights import backbone_state_dict, load_backbone, read_state_dict
from freesolo.registry.weights import resolve_weights
from freesolo.tracking.server import resolve_server


def extract_free_masks(job: ExtractJob, *, storage: str) -> LabellingResult:
    """Make the label set of free masks of a data set, on the cluster that this process is connected to.

    Kill it anywhere and call it again: finished shards are not done again, and the label set is the same.

    Args:
        job: What to do.
        storage: Where runs are kept; the model registry is looked for there where nothing else names one.

    Raises:
        UsageError: As `free_mask_labelling`, or the pool does not fit the cluster.
        JobError: More photos than `extract.max_bad_samples` are unreadable, or a shard was altered.
    """
    return label_photos(free_mask_labelling(job, storage=storage))


def free_mask_labelling(job: ExtractJob, *, storage: str) -> LabellingJob:
    """Read what an extraction starts from, and see that it fits; needs no cluster.

    Args:
        job: What to do.
        storage: Where runs are kept; the model registry is looked for there where nothing else names one.

    Raises:
        UsageError: There is no such data set or weights, the weights are another network's, or a label set made
            otherwise is at the URL.
    """
    settings = job.extract
    dataset = read_dataset_manifest(job.dataset)
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolve_weights(job.weights, Path(folder), server=resolve_server(job.tracking, storage))
        backbone = build_resnet(settings.backbone)
        tensors = read_state_dict(resolved.path, backbone=settings.backbone)
        load_backbone(backbone, tensors, source=job.weights)
    plan = LabelPlan(
        dataset_digest=dataset.digest,
        dataset_url=job.dataset,
        kind="free-masks",
        model={"weights": job.weights, "sha256": resolved.sha256, "version": resolved.version},
        settings=plan_settings(settings, job.resources),
        parent=None,
    )
    check_label_set(job.labels, plan)
    return LabellingJob(
        name="extract",
        dataset_url=job.dataset,
        dataset=dataset,
        labels_url=job.labels,
        plan=plan,
        batches=BatchPlan(
            settings.free_mask.short_side, settings.free_mask.long_side_max, settings.batch_size, bounds=job.bounds
        ),
        pool=ModelPool(partial(FreeMaskLabeller, settings), backbone_state_dict(backbone), job.resources),
        max_bad_samples=settings.max_bad_samples,
    )
