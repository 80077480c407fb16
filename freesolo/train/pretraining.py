"""Stage `pretrain`: DenseCL on unlabelled photos gives a backbone with dense features."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from freesolo.config import PretrainJob
from freesolo.data.collate import collate_crops
from freesolo.data.ingest import TrainingStream
from freesolo.data.order import Order
from freesolo.data.probe_photos import read_probe_photos
from freesolo.data.shards import DatasetManifest, read_dataset_manifest
from freesolo.data.views import ContrastiveView
from freesolo.densecl.model import DenseCL
from freesolo.models.model_file import save_model
from freesolo.models.resnet import build_resnet
from freesolo.models.weights import backbone_state_dict, load_backbone
from freesolo.ops.collectives import rank
from freesolo.stages import StageFolder, StageResult
from freesolo.tracking.witness import TrackedRun
from freesolo.train.initial import InitialWeights, SharedWeights, read_initial_weights
from freesolo.train.learner import Learner
from freesolo.train.plan import Look, Training, TrainingPlan
from freesolo.train.probe import Probe
from freesolo.train.tasks import DenseCLTraining
from freesolo.train.worker import run_training

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PretrainInputs:
    """What a pre-training starts from.

    Attributes:
        manifest: Of the data set.
        weights: To start from; None: random ones.
        probed: Of the data set whose photos the training is looked at by.
    """

    manifest: DatasetManifest
    weights: InitialWeights | None
    probed: DatasetManifest


def pretrain_inputs(job: PretrainJob, storage: str) -> PretrainInputs:
    """Read what a job starts from, and see that it fits; needs no cluster.

    Args:
        job: What to do.
        storage: Where runs are kept.

    Raises:
        UsageError: The data set or the initial weights are not there or don't fit the settings.
    """
    manifest = read_dataset_manifest(job.dataset)
    settings = job.pretrain.model
    weights = read_initial_weights(settings.backbone_weights, job.tracking, storage, backbone=settings.backbone)
    if weights is not None:
        load_backbone(build_resnet(settings.backbone), weights.tensors, source=weights.reference)
    probe_url = job.pretrain.probe.dataset
    return PretrainInputs(manifest, weights, manifest if probe_url is None else read_dataset_manifest(probe_url))


def pretrain(job: PretrainJob, inputs: PretrainInputs, folder: StageFolder, tracked: TrackedRun) -> StageResult:
    """Pre-train a backbone on the cluster that this process is connected to.

    Args:
        job: What to do.
        inputs: What `pretrain_inputs` read.
        folder: Where everything goes; what an earlier submission left there is gone on from.
        tracked: The MLflow run of this stage.

    Returns:
        `outputs["model"]`: the query backbone, under torchvision's names.

    Raises:
        UsageError: The settings are not usable.
        JobError: Training failed.
    """
    started = time.monotonic()
    weights = inputs.weights.share() if inputs.weights is not None else None
    build = partial(_build, job, inputs.manifest, inputs.probed, weights)
    plan = TrainingPlan(folder, job, job.pretrain.loop, tracked, build)
    metrics = run_training(plan, job.resources)
    return StageResult(
        stage=folder.stage,
        seconds=time.monotonic() - started,
        outputs={"model": plan.model_url},
        counts={"images": inputs.manifest.samples, "steps": job.pretrain.loop.steps},
        metrics=dict(metrics),
    )


def _build(
    job: PretrainJob,
    manifest: DatasetManifest,
    probed: DatasetManifest,
    weights: SharedWeights | None,
    device: torch.device,
) -> Training:
    """In a train worker: the model, its optimiser and its stream."""
    settings = job.pretrain
    model = DenseCL(settings.model)
    model.initialise(torch.Generator().manual_seed(settings.loop.seed))
    if weights is not None:
        load_backbone(model.backbone, weights.fetch().tensors, source=weights.reference)
        model.copy_query_to_key()
    stream = TrainingStream(
        dataset_url=job.dataset,
        manifest=manifest,
        labels=None,
        view=ContrastiveView(settings.views),
        collate=collate_crops,
        order=Order(
            tuple(shard.samples for shard in manifest.shards), settings.loop.seed, settings.stream.shuffle_window_shards
        ),
        batch_size=settings.loop.batch_size,
        max_bad_samples=settings.stream.max_bad_samples,
        accumulation_steps=settings.loop.accumulation_steps,
        prefetch_batches=settings.stream.prefetch_batches,
        bounds=job.bounds,
    )
    task = DenseCLTraining(model, settings.views)
    learner = Learner(task, settings.loop, settings.optimizer, device)
    return Training(
        learner=learner,
        stream=stream,
        optimizer=settings.optimizer,
        save_model=partial(_save_backbone, job, manifest),
        look=_look(job, probed),
    )


def _look(job: PretrainJob, probed: DatasetManifest) -> Callable[[Learner, Any], Look] | None:
    """The probe, on worker 0; None where nothing is to be looked at, or no photo could be read to look by."""
    settings = job.pretrain
    if rank() > 0 or not settings.loop.overlay_every or not settings.probe.photos:
        return None
    url, seed = settings.probe.dataset or job.dataset, settings.loop.seed
    photos = read_probe_photos(url, probed, settings.probe, settings.views, bounds=job.bounds, seed=seed)
    if len(photos) == 0:
        _LOG.warning("%s: no photo can be read to look at the training by: it goes on unseen", url)
        return None
    return Probe(photos, settings.views, seed).look


def _save_backbone(job: PretrainJob, manifest: DatasetManifest, learner: Learner, path: Path) -> None:
    module = learner.best_module()
    assert isinstance(module, DenseCL)
    save_model(
        path,
        "backbone",
        settings={"backbone": job.pretrain.model.backbone},
        state_dict=backbone_state_dict(module.backbone),
        lineage={"dataset": job.dataset, "dataset_digest": manifest.digest, "method": "DenseCL"},
    )
