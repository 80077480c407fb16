"""All stages in a row: from photos to a registered segmenter.

    photos ─▶ pretrain ─▶ free-masks ─▶ solo-r0 ─▶ pseudo-labels-r1 ─▶ solo-r1 ─▶ ...
                              │            │                              │
                              └────────────┴── held-out label sets ───────┴─▶ evaluation ─▶ report, registry

Each stage is a folder of the run (`freesolo.stages`), and a child of the run in MLflow. Submitting the same run again
does what is not done yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from freesolo.comparison import check_comparable, compare
from freesolo.config import ExtractJob, Job, MethodJob, PipelineJob, PredictJob, PretrainJob, TrainJob
from freesolo.data.files import join
from freesolo.data.ingest import over_shards
from freesolo.data.shards import read_dataset_manifest
from freesolo.evaluation import Metrics
from freesolo.found_objects import group_objects
from freesolo.gallery import gallery
from freesolo.jobs import (
    extract_stage,
    predict_stage,
    pretrain_stage,
    show_comparison,
    tell_dataset,
    train_stage,
    witnessed,
)
from freesolo.registry.champion import promote_if_better
from freesolo.report.records import GroupedObjects
from freesolo.run_report import write_report
from freesolo.stages import StageFolder, StageResult, run_stage, what_is_made
from freesolo.tracking.journal import Journal
from freesolo.tracking.server import TrackingServer, resolve_server
from freesolo.tracking.witness import Witness

LabellingJobType = TypeVar("LabellingJobType", ExtractJob, PredictJob)

_LOG = logging.getLogger(__name__)
_SUMMARY = (
    "Unsupervised instance segmentation after FreeSOLO (arXiv:2202.12181): DenseCL learns dense features from photos "
    "without labels, Free Mask turns them into coarse object masks, SOLO learns to segment from those, and labels the "
    "photos anew for the next round. No annotation was used in training; where there are any, they only measure."
)


def pipeline_stage(job: PipelineJob, folder: StageFolder) -> StageResult:
    """Pre-training, Free Masks, SOLO, rounds of self-training, evaluation, report and registry."""

    def work(_: None) -> StageResult:
        started = time.monotonic()
        with witnessed(job, folder, None) as (witness, journal):
            tell_dataset(witness, job.dataset)
            made = run_method(job, folder, lambda name, _: folder.sibling(name))
            result = _report(job, folder, made, witness, journal)
        return replace(result, seconds=time.monotonic() - started)

    return run_stage(folder, what_is_made(job), partial(check_data, job), work)


def check_data(job: MethodJob) -> None:
    """Refuse at the start what a later stage would refuse hours later.

    Raises:
        UsageError: A data set is missing, or has no annotations to evaluate with.
    """
    read_dataset_manifest(job.dataset)
    if job.evaluation_dataset is not None:
        check_comparable(job.evaluation_dataset, {})


# --- the sequence ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Made:
    """What the stages made, each by its name for people, in the order in which they ran.

    Attributes:
        results: Of those that are shown: not of what labels the held-out photos.
        trained: Folders of the trainings.
        labels: Label sets of the data set.
        held_out: Label sets of the evaluation data set; none where there is no such.
    """

    results: dict[str, StageResult] = field(default_factory=dict)
    trained: dict[str, StageFolder] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)


def run_method(job: MethodJob, folder: StageFolder, folder_of: Callable[[str, Job], StageFolder]) -> Made:
    """All stages but the evaluation; those that are done already are not done again.

    Args:
        job: What to do.
        folder: Of the stage that they are stages of.
        folder_of: Where a stage belongs, by its name and what it does. It is asked when what is upstream is done, so
            a job's inputs are known; where it writes labels follows from its folder, and is left open.

    Raises:
        UsageError, JobError: As the stages.
    """
    method = _Method(job, folder, folder_of)
    backbone = job.initial_backbone or method.pretrain()
    labels = method.extract(backbone)
    segmenter = method.train(0, labels, backbone)
    for number in range(1, job.rounds + 1):
        labels = method.label(number, segmenter)
        segmenter = method.train(number, labels, backbone)
    return method.made


@dataclass(frozen=True, slots=True)
class _Method:
    """The stages; each is given what the ones before it made."""

    job: MethodJob
    folder: StageFolder
    folder_of: Callable[[str, Job], StageFolder]
    made: Made = field(default_factory=Made)

    def pretrain(self) -> str:
        job = PretrainJob(**self._common("-backbone"), dataset=self.job.dataset, pretrain=self.job.pretrain)
        folder = self.folder_of("pretrain", job)
        self.made.results["DenseCL"] = result = pretrain_stage(job, folder, self.folder.url)
        self.made.trained["DenseCL"] = folder
        return result.outputs["model"]

    def extract(self, backbone: str) -> str:
        result = self._extract_from(self.job.dataset, "free-masks", backbone)
        self.made.results["Free Mask"] = result
        self.made.labels["Free Mask"] = result.outputs["labels"]
        if self.job.evaluation_dataset is not None:
            held_out = self._extract_from(self.job.evaluation_dataset, "held-out-free-masks", backbone)
            self.made.held_out["Free Mask"] = held_out.outputs["labels"]
        return result.outputs["labels"]

    def train(self, number: int, labels: str, backbone: str) -> str:
        name = _round_name(number)
        job = TrainJob(
            **self._common(""),
            dataset=self.job.dataset,
            labels=labels,
            train=self.job.train.model_copy(update={"initial_weights": backbone}),
        )
        folder = self.folder_of(f"solo-r{number}", job)
        self.made.results[name] = result = train_stage(job, folder, self.folder.url)
        self.made.trained[name] = folder
        model = result.outputs["model"]
        if self.job.evaluation_dataset is not None:
            predict = PredictJob(
                **self._common(None),
                dataset=self.job.evaluation_dataset,
                labels=self.folder.run_url,
                weights=model,
                kind="predictions",
                predict=self.job.held_out,
            )
            held_out = self._predict(f"held-out-solo-r{number}", predict)
            self.made.held_out[name] = held_out.outputs["labels"]
        return model

    def label(self, number: int, segmenter: str) -> str:
        name = f"Pseudo-labels {number}"
        job = PredictJob(
            **self._common(None),
            dataset=self.job.dataset,
            labels=self.folder.run_url,
            weights=segmenter,
            predict=self.job.predict,
        )
        self.made.results[name] = result = self._predict(f"pseudo-labels-r{number}", job)
        self.made.labels[name] = result.outputs["labels"]
        return result.outputs["labels"]

    def _extract_from(self, dataset: str, stage: str, backbone: str) -> StageResult:
        job = ExtractJob(
            **self._common(None),
            dataset=dataset,
            labels=self.folder.run_url,
            weights=backbone,
            extract=self.job.extract,
        )
        folder = self.folder_of(stage, job)
        return extract_stage(_labels_in(folder, job), folder, self.folder.url)

    def _predict(self, stage: str, job: PredictJob) -> StageResult:
        folder = self.folder_of(stage, job)
        return predict_stage(_labels_in(folder, job), folder, self.folder.url)

    def _common(self, registered_suffix: str | None) -> dict[str, Any]:
        """What all stages share; a model is registered only by the stages that make one."""
        tracking = self.job.tracking
        name = tracking.registered_model
        registered = None if name is None or registered_suffix is None else name + registered_suffix
        return {
            "resources": self.job.resources,
            "bounds": self.job.bounds,
            "tracking": tracking.model_copy(update={"registered_model": registered}),
        }


def _labels_in(folder: StageFolder, job: LabellingJobType) -> LabellingJobType:
    """A job that writes its labels into its stage's folder, not, as before that was known, into the run's."""
    return job.model_copy(update={"labels": join(folder.url, "labels")})


def _round_name(number: int) -> str:
    return "SOLO on Free Masks" if number == 0 else f"SOLO round {number}"


# --- what came of it ------------------------------------------------------------------------------------------------


def _report(job: PipelineJob, folder: StageFolder, made: Made, witness: Witness, journal: Journal) -> StageResult:
    """Evaluate what was held out, move the champion, write the page."""
    rows, digest, metrics = {}, None, {}
    registered = {
        name: result.outputs["registered"] for name, result in made.results.items() if "registered" in result.outputs
    }
    if job.evaluation_dataset is not None:
        comparison = compare(job.evaluation_dataset, made.held_out, over_shards=over_shards)
        rows, digest = comparison.rows, comparison.dataset_digest
        photos = gallery(job.evaluation_dataset, made.held_out, images=job.gallery_images, bounds=job.bounds)
        metrics = show_comparison(comparison, witness, journal)
        _promote(registered, rows, digest, resolve_server(job.tracking, folder.storage))
    else:
        photos = gallery(job.dataset, made.labels, images=job.gallery_images, bounds=job.bounds)
    url = write_report(
        folder,
        witness,
        title=folder.run_name,
        summary=_SUMMARY,
        stages=list(made.results.items()),
        trained=list(made.trained.items()),
        rows=rows,
        gallery=photos,
        notes=job.notes,
        settings=job,
        provenance={
            "Data set": f"{job.dataset}, {read_dataset_manifest(job.dataset).digest}",
            "Evaluated on": f"{job.evaluation_dataset}, {digest}" if digest else "nothing: no annotated data set",
            "Registered": ", ".join(registered.values()) or "nothing: tracking.registered_model is not set",
        },
        found=_found(job, made),
    )
    return StageResult(folder.stage, 0.0, {"report": url, **registered}, metrics=metrics)


def _found(job: PipelineJob, made: Made) -> GroupedObjects | None:
    """The objects of the last label set that was made of the training photos, in groups; None if not asked for."""
    if not job.object_groups:
        return None
    name, labels = list(made.labels.items())[-1]
    shown = f"{name}, the last label set of the training photos"
    return group_objects(job.dataset, shown, labels, groups=job.object_groups, bounds=job.bounds)


def _promote(
    registered: Mapping[str, str], rows: Mapping[str, Metrics], digest: str, server: TrackingServer | None
) -> None:
    """Offer each round's model for champion, on the strength of its evaluation."""
    for name, reference in registered.items():
        if name in rows and server is not None:
            model, version = reference.removeprefix("models:/").split("/")
            decision = promote_if_better(model, version, rows[name].as_dict(), digest, server=server)
            _LOG.info("%s: %s", name, decision.reason)
