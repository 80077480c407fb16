"""Stage `train`: SOLO on a label set, or on a data set's own annotations or a fraction of them, gives a segmenter."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from freesolo.config import TrainJob
from freesolo.data.collate import collate_photos
from freesolo.data.files import join
from freesolo.data.ingest import TrainingStream, choose_subsets_on_cluster, write_subset_on_cluster
from freesolo.data.labels import LabelSet, read_labels_of
from freesolo.data.order import Order
from freesolo.data.shards import DatasetManifest, read_dataset_manifest
from freesolo.data.subset import Subset, SubsetSource, finished_subset
from freesolo.data.views import SegmentationView
from freesolo.errors import UsageError
from freesolo.models.model_file import save_model
from freesolo.models.resnet import freeze_batch_norm
from freesolo.models.weights import load_backbone
from freesolo.ops.images import normalize
from freesolo.report.pictures import contact_sheet, draw_masks
from freesolo.solo.model import Segmenter
from freesolo.solo.postprocess import instances_from_predictions
from freesolo.solo.task import SUPERVISIONS, SoloTask
from freesolo.stages import StageFolder, StageResult
from freesolo.tracking.witness import TrackedRun
from freesolo.train.control import BY_SIGNALS, TrainingControl
from freesolo.train.initial import InitialWeights, SharedWeights, read_initial_weights
from freesolo.train.learner import Learner
from freesolo.train.plan import Look, Training, TrainingPlan
from freesolo.train.tasks import SoloTraining
from freesolo.train.worker import run_training
from freesolo.types import SegmentationBatch

PICTURED_IMAGES = 8


@dataclass(frozen=True, slots=True)
class SegmenterInputs:
    """What the training of a segmenter starts from.

    Attributes:
        manifest: Of the data set.
        labels: Of the label set; None: the data set's own annotations.
        weights: To start from; None: random ones.
        subset: What `choose_labels` chose; None: all photos are used, or the fraction of them is there already.
    """

    manifest: DatasetManifest
    labels: LabelSet | None
    weights: InitialWeights | None
    subset: Subset | None = None


@dataclass(frozen=True, slots=True)
class _Photos:
    """What a training streams: the data set itself, or a fraction of it."""

    url: str
    manifest: DatasetManifest


def segmenter_inputs(job: TrainJob, storage: str) -> SegmenterInputs:
    """Read what a job starts from, and see that it fits; needs no cluster.

    Args:
        job: What to do.
        storage: Where runs are kept.

    Raises:
        UsageError: The data set, the labels or the initial weights are not there or don't fit.
    """
    manifest = read_dataset_manifest(job.dataset)
    labels = _matching_labels(job, manifest)
    _categories(job, manifest, labels)
    weights = read_initial_weights(job.train.initial_weights, job.tracking, storage, backbone=job.train.model.backbone)
    if weights is not None:
        load_initial_weights(Segmenter(job.train.model), weights)
    return SegmenterInputs(manifest, labels, weights)


def choose_labels(job: TrainJob, inputs: SegmenterInputs, folder: StageFolder) -> SegmenterInputs:
    """Choose the photos of a job's `label_fraction`, on the CPUs of the cluster that this process is connected to.

    Nothing is written. Of a fraction of 1, and of one that an earlier submission has written, nothing is read.

    Raises:
        UsageError: The fraction leaves a category without an object; names it, and a fraction that would do.
        JobError: A shard is damaged, or the store cannot be reached.
    """
    source = missing_labels(job, inputs.manifest, folder)
    if source is None:
        return inputs
    (subset,) = choose_subsets_on_cluster(job.dataset, inputs.manifest, [source], bounds=job.bounds)
    return replace(inputs, subset=subset)


def missing_labels(job: TrainJob, manifest: DatasetManifest, folder: StageFolder) -> SubsetSource | None:
    """The fraction of a data set's labels that a job wants and the run does not keep yet."""
    source = SubsetSource(manifest.digest, job.label_fraction, job.label_seed)
    if job.label_fraction == 1 or finished_subset(labels_url(folder, source), source):
        return None
    return source


def labels_url(folder: StageFolder, source: SubsetSource) -> str:
    """Where a run keeps a fraction of a data set's labelled photos, for all of its trainings on that data set."""
    return join(folder.run_url, f"labelled-{source.dataset_digest[:8]}-{source.fraction!r}-seed-{source.seed}")


def train_segmenter(
    job: TrainJob,
    inputs: SegmenterInputs,
    folder: StageFolder,
    tracked: TrackedRun,
    control: TrainingControl = BY_SIGNALS,
) -> StageResult:
    """Train a segmenter on the cluster that this process is connected to.

    Args:
        job: What to do.
        inputs: What `segmenter_inputs` read and, for a fraction of the labels, `choose_labels` chose.
        folder: Where everything goes; what an earlier submission left there is gone on from.
        tracked: The MLflow run of this stage.
        control: Who follows the training, and may stop it.

    Returns:
        `outputs["model"]`: the segmenter.

    Raises:
        UsageError: The settings are not usable.
        JobError: Training failed.
    """
    started = time.monotonic()
    labels, photos = inputs.labels, _photos(job, inputs, folder)
    weights = inputs.weights.share() if inputs.weights is not None else None
    build = partial(_build, job, inputs.manifest, labels, photos, weights)
    plan = TrainingPlan(folder, job, job.train.loop, tracked, build)
    metrics = run_training(plan, job.resources, control)
    counts = {"images": photos.manifest.samples, "steps": job.train.loop.steps}
    if labels is not None:
        counts["instances"] = labels.manifest.instances
    return StageResult(
        stage=folder.stage,
        seconds=time.monotonic() - started,
        outputs={"model": plan.model_url},
        counts=counts,
        metrics=dict(metrics),
    )


def _photos(job: TrainJob, inputs: SegmenterInputs, folder: StageFolder) -> _Photos:
    """The data set, or the fraction of it, which is written where it is not there yet."""
    if job.label_fraction == 1:
        return _Photos(job.dataset, inputs.manifest)
    source = SubsetSource(inputs.manifest.digest, job.label_fraction, job.label_seed)
    url = labels_url(folder, source)
    if inputs.subset is not None:
        return _Photos(url, write_subset_on_cluster(inputs.subset, url, bounds=job.bounds))
    return _Photos(url, read_dataset_manifest(url))


def _matching_labels(job: TrainJob, manifest: DatasetManifest) -> LabelSet | None:
    if job.labels is None:
        if not manifest.annotated:
            raise UsageError(f"labels: {job.dataset} has no annotations of its own; give the URL of a label set")
        return None
    labels = read_labels_of(job.labels, manifest)
    if labels.manifest.instances == 0:
        raise UsageError(f"labels: {job.labels} holds no instance at all: nothing to train on; give another label set")
    channels = labels.manifest.plan.settings.get("free_mask", {}).get("embedding_channels")
    if channels not in (None, job.train.model.embedding_channels):
        raise UsageError(
            f"train.model.embedding_channels={job.train.model.embedding_channels}: the embeddings of {job.labels} have "
            f"{channels} channels; set it to {channels}"
        )
    return labels


def _categories(job: TrainJob, manifest: DatasetManifest, labels: LabelSet | None) -> tuple[dict[str, Any], ...]:
    """COCO's records of the categories that the model tells apart, by ascending id; none for a class-agnostic one.

    Raises:
        UsageError: The labels do not have as many as the model.
    """
    wanted = job.train.model.num_categories
    if wanted == 1:
        return ()
    known = manifest.categories if labels is None else labels.manifest.plan.model.get("categories", ())
    if len(known) != wanted:
        number = f"{len(known)} categories; set it to {len(known)}, or" if len(known) > 1 else "no categories; set it"
        raise UsageError(
            f"train.model.num_categories={wanted}: the labels of {job.labels or job.dataset} have {number} to 1, for "
            "objects as such"
        )
    return tuple(sorted(known, key=lambda category: category["id"]))


def _build(
    job: TrainJob,
    manifest: DatasetManifest,
    labels: LabelSet | None,
    photos: _Photos,
    weights: SharedWeights | None,
    device: torch.device,
) -> Training:
    """In a train worker: the model, its optimiser and its stream."""
    settings = job.train
    task = SoloTask(settings.model, settings.supervision, settings.losses)
    task.initialise(torch.Generator().manual_seed(settings.loop.seed))
    if weights is not None:
        load_initial_weights(task.segmenter, weights.fetch())
    if settings.freeze_batch_norm:
        freeze_batch_norm(task.segmenter.backbone)
    stream = TrainingStream(
        dataset_url=photos.url,
        manifest=photos.manifest,
        labels=labels,
        view=segmentation_view(job, manifest, labels),
        collate=collate_photos,
        order=Order(
            tuple(shard.samples for shard in photos.manifest.shards),
            settings.loop.seed,
            settings.stream.shuffle_window_shards,
        ),
        batch_size=settings.loop.batch_size,
        max_bad_samples=settings.stream.max_bad_samples,
        accumulation_steps=settings.loop.accumulation_steps,
        prefetch_batches=settings.stream.prefetch_batches,
        bounds=job.bounds,
    )
    return Training(
        learner=Learner(SoloTraining(task, settings.views), settings.loop, settings.optimizer, device),
        stream=stream,
        optimizer=settings.optimizer,
        save_model=partial(_save_segmenter, job, manifest, labels),
        look=partial(_look, job),
    )


def segmentation_view(job: TrainJob, manifest: DatasetManifest, labels: LabelSet | None) -> SegmentationView:
    """How a job's samples become rows; under a supervision of boxes alone masks are not even read."""
    return SegmentationView(
        job.train.views,
        job.train.model.embedding_channels,
        boxes_alone=SUPERVISIONS[job.train.supervision].boxes_alone,
        category_ids=tuple(category["id"] for category in _categories(job, manifest, labels)),
    )


def load_initial_weights(segmenter: Segmenter, weights: InitialWeights) -> None:
    """Begin a segmenter from another one, or from a backbone.

    What a segmenter says of categories is kept only where there are as many: fine-tuning on others begins it anew
    (FreeSOLO, arXiv:2202.12181, sec. 4.2).

    Raises:
        UsageError: The weights are of another architecture; names a tensor.
    """
    tensors = dict(weights.tensors)
    if not any(name.startswith("head.") for name in tensors):
        load_backbone(segmenter.backbone, tensors, source=weights.reference)
        return
    own = segmenter.state_dict()
    for name in ("head.category_output.weight", "head.category_output.bias"):
        if name in tensors and tensors[name].shape != own[name].shape:
            tensors[name] = own[name]
    try:
        segmenter.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(
            f"train.initial_weights={weights.reference}: a segmenter of another architecture than train.model "
            f"({str(error).splitlines()[-1].strip()[:200]}); give train.model its settings, or other weights"
        ) from error


def _save_segmenter(
    job: TrainJob, manifest: DatasetManifest, labels: LabelSet | None, learner: Learner, path: Path
) -> None:
    module = learner.best_module()
    assert isinstance(module, SoloTask)
    lineage: dict[str, Any] = {
        "dataset": job.dataset,
        "dataset_digest": manifest.digest,
        "supervision": job.train.supervision,
    }
    if job.label_fraction < 1:
        lineage |= {"label_fraction": job.label_fraction, "label_seed": job.label_seed}
    if labels is not None:
        lineage |= {"labels": str(job.labels), "labels_digest": labels.manifest.digest}
    if categories := _categories(job, manifest, labels):
        lineage |= {"categories": list(categories)}
    state = {name: value.detach().cpu().contiguous() for name, value in module.segmenter.state_dict().items()}
    save_model(path, "segmenter", settings=job.train.model.model_dump(), state_dict=state, lineage=lineage)


@torch.no_grad()
def _look(job: TrainJob, learner: Learner, views: tuple[SegmentationBatch, ...]) -> Look:
    """The first photos of the weak view: above the labels that it is trained on, below what it predicts."""
    module = learner.best_module()
    assert isinstance(module, SoloTask)
    images, labels = views[0].images, views[0].instances
    count = min(PICTURED_IMAGES, len(images))
    sizes = [(height, width) for height, width in images.sizes[:count].tolist()]
    module.eval()
    with learner.autocast():
        predictions = module.segmenter(normalize(images.pixels[:count]))
    module.train()
    found = instances_from_predictions(
        module.segmenter.head, predictions, images.sizes[:count], sizes, job.train.inference, job.train.model
    )
    trained_on, predicted = [], []
    for image, (height, width) in enumerate(sizes):
        photo = images.pixels[image, :, :height, :width].to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        coarse = labels.of_image(image).masks[:, :height, :width]
        trained_on.append(draw_masks(photo, coarse.cpu().numpy()))
        predicted.append(draw_masks(photo, found[image].masks.cpu().numpy(), found[image].scores.cpu().numpy()))
    return Look({}, {"predictions": contact_sheet([*trained_on, *predicted], columns=count)})
