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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from freesolo.comparison import check_comparable, compare, gallery
from freesolo.config import ExtractJob, PipelineJob, PredictJob, PretrainJob, TrainJob
from freesolo.data.files import join
from freesolo.data.shards import read_dataset_manifest
from freesolo.evaluation import Metrics
from freesolo.found_objects import group_objects
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
from freesolo.tracking.server import resolve_server
from freesolo.tracking.witness import Witness

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
            result = _Pipeline(job, folder).run(witness, journal)
        return replace(result, seconds=time.monotonic() - started)

    return run_stage(folder, what_is_made(job), partial(_check_data, job), work)


def _check_data(job: PipelineJob) -> None:
    """Refuse at the start what a later stage would refuse hours later.

    Raises:
        UsageError: A data set is missing, or has no annotations to evaluate with.
    """
    read_dataset_manifest(job.dataset)
    if job.evaluation_dataset is not None:
        check_comparable(job.evaluation_dataset, {})


@dataclass
class _Pipeline:
    """The stages of one run, in order; each is given what the ones before it made."""

    job: PipelineJob
    folder: StageFolder
    results: list[tuple[str, StageResult]] = field(default_factory=list)
    trained: list[tuple[str, StageFolder]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)

    def run(self, witness: Witness, journal: Journal) -> StageResult:
        tell_dataset(witness, self.job.dataset)
        backbone = self.job.initial_backbone or self._pretrain()
        labels = self._extract(backbone)
        segmenter = self._train(0, labels, backbone)
        for number in range(1, self.job.rounds + 1):
            labels = self._label(number, segmenter)
            segmenter = self._train(number, labels, backbone)
        return self._report(witness, journal)

    def _pretrain(self) -> str:
        job = PretrainJob(**self._common("-backbone"), dataset=self.job.dataset, pretrain=self.job.pretrain)
        folder = self.folder.sibling("pretrain")
        result = pretrain_stage(job, folder, self.folder.url)
        self.results.append(("DenseCL", result))
        self.trained.append(("DenseCL", folder))
        return result.outputs["model"]

    def _extract(self, backbone: str) -> str:
        labels = self._extract_from(self.job.dataset, "free-masks", backbone)
        if self.job.evaluation_dataset is not None:
            held_out = self._extract_from(self.job.evaluation_dataset, "held-out-free-masks", backbone, shown=False)
            self.held_out["Free Mask"] = held_out
        return labels

    def _extract_from(self, dataset: str, stage: str, backbone: str, *, shown: bool = True) -> str:
        folder = self.folder.sibling(stage)
        job = ExtractJob(
            **self._common(None),
            dataset=dataset,
            labels=join(folder.url, "labels"),
            weights=backbone,
            extract=self.job.extract,
        )
        result = extract_stage(job, folder, self.folder.url)
        if shown:
            self.results.append(("Free Mask", result))
            self.labels["Free Mask"] = result.outputs["labels"]
        return result.outputs["labels"]

    def _train(self, number: int, labels: str, backbone: str) -> str:
        name, folder = _round_name(number), self.folder.sibling(f"solo-r{number}")
        job = TrainJob(
            **self._common(""),
            dataset=self.job.dataset,
            labels=labels,
            train=self.job.train.model_copy(update={"initial_weights": backbone}),
        )
        result = train_stage(job, folder, self.folder.url)
        self.results.append((name, result))
        self.trained.append((name, folder))
        model = result.outputs["model"]
        if self.job.evaluation_dataset is not None:
            predict = PredictJob(
                **self._common(None),
                dataset=self.job.evaluation_dataset,
                labels=join(self.folder.sibling(f"held-out-solo-r{number}").url, "labels"),
                weights=model,
                kind="predictions",
                predict=self.job.held_out,
            )
            predicted = predict_stage(predict, self.folder.sibling(f"held-out-solo-r{number}"), self.folder.url)
            self.held_out[name] = predicted.outputs["labels"]
        return model

    def _label(self, number: int, segmenter: str) -> str:
        folder = self.folder.sibling(f"pseudo-labels-r{number}")
        job = PredictJob(
            **self._common(None),
            dataset=self.job.dataset,
            labels=join(folder.url, "labels"),
            weights=segmenter,
            predict=self.job.predict,
        )
        result = predict_stage(job, folder, self.folder.url)
        self.results.append((f"Pseudo-labels {number}", result))
        self.labels[f"Pseudo-labels {number}"] = result.outputs["labels"]
        return result.outputs["labels"]

    def _report(self, witness: Witness, journal: Journal) -> StageResult:
        """Evaluate what was held out, move the champion, write the page."""
        job = self.job
        rows, digest, metrics = {}, None, {}
        if job.evaluation_dataset is not None:
            comparison = compare(job.evaluation_dataset, self.held_out, gallery_images=job.gallery_images)
            rows, digest, photos = comparison.rows, comparison.dataset_digest, comparison.gallery
            metrics = show_comparison(comparison, witness, journal)
            self._promote(rows, digest)
        else:
            photos = gallery(job.dataset, self.labels, images=job.gallery_images)
        url = write_report(
            self.folder,
            witness,
            title=self.folder.run_name,
            summary=_SUMMARY,
            stages=self.results,
            trained=self.trained,
            rows=rows,
            gallery=photos,
            notes=job.notes,
            settings=job,
            provenance={
                "Data set": f"{job.dataset}, {read_dataset_manifest(job.dataset).digest}",
                "Evaluated on": f"{job.evaluation_dataset}, {digest}" if digest else "nothing: no annotated data set",
                "Registered": ", ".join(self._registered().values()) or "nothing: tracking.registered_model is not set",
            },
            found=self._found(),
        )
        return StageResult(self.folder.stage, 0.0, {"report": url, **self._registered()}, metrics=metrics)

    def _found(self) -> GroupedObjects | None:
        """The objects of the last label set that was made of the training photos, in groups; None if not asked for."""
        if not self.job.object_groups:
            return None
        name, labels = list(self.labels.items())[-1]
        shown = f"{name}, the last label set of the training photos"
        return group_objects(self.job.dataset, shown, labels, groups=self.job.object_groups, bounds=self.job.bounds)

    def _promote(self, rows: dict[str, Metrics], digest: str) -> None:
        """Offer each round's model for champion, on the strength of its evaluation."""
        server = resolve_server(self.job.tracking, self.folder.storage)
        for name, reference in self._registered().items():
            if name in rows and server is not None:
                model, version = reference.removeprefix("models:/").split("/")
                decision = promote_if_better(model, version, rows[name].as_dict(), digest, server=server)
                _LOG.info("%s: %s", name, decision.reason)

    def _registered(self) -> dict[str, str]:
        return {name: result.outputs["registered"] for name, result in self.results if "registered" in result.outputs}

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


def _round_name(number: int) -> str:
    return "SOLO on Free Masks" if number == 0 else f"SOLO round {number}"
