"""What each job is configured with: the settings of its stages, and what they are applied to.

A job's YAML (`freesolo.config_file`) states what differs from the defaults here and in `freesolo.settings`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from pydantic import Field, JsonValue, model_validator

from freesolo.config_file import parse_config
from freesolo.errors import UsageError
from freesolo.settings import (
    BoundsSettings,
    ExtractSettings,
    Fraction,
    InferenceSettings,
    LabelFraction,
    LoopSettings,
    NonNegative,
    PlainName,
    Positive,
    PredictSettings,
    PretrainSettings,
    ResourceSettings,
    Settings,
    TrackingSettings,
    TrainSettings,
    TuneSettings,
    Url,
    Weights,
)
from freesolo.space import Values, check_values, draw_trials, with_values
from freesolo.unused import unused_settings, why_unused

BASE = "base"
"""The first row of ablations: what they are configured with, before a row sets anything."""

ANNOTATIONS = "Annotations"
"""What a data set's own objects are called beside those of label sets."""

_SEEDS = ("pretrain.loop.seed", "train.loop.seed")
_ABLATED = ("rounds", "pretrain", "extract", "train", "predict", "held_out")

JobType = TypeVar("JobType", bound="Job")

ALL_THAT_IS_FOUND = PredictSettings(inference=InferenceSettings(), max_width=1.0)
"""How predictions to be evaluated are made: COCO's numbers are of up to 100 an image, whatever their score."""


class Job(Settings):
    """What every job's configuration has beside its stage's settings."""

    resources: ResourceSettings = ResourceSettings()
    tracking: TrackingSettings = TrackingSettings()
    bounds: BoundsSettings = BoundsSettings()


class PackJob(Job):
    """`jobs/pack_shards.py`."""

    photos: Url  # folder, glob or COCO JSON
    images: Url | None = None  # folder of a COCO JSON's photos; default: beside it
    dataset: Url  # where the shards go
    samples_per_shard: Positive = 1000
    seed: NonNegative = 0  # of the order of the photos in the shards
    max_bad_samples: Fraction = 0.001


class PretrainJob(Job):
    """`jobs/pretrain_densecl.py`."""

    dataset: Url
    pretrain: PretrainSettings

    @model_validator(mode="after")
    def _batch_divides(self) -> PretrainJob:
        _check_batch("pretrain.loop", self.pretrain.loop, self.resources)
        return self


class ExtractJob(Job):
    """`jobs/extract_free_masks.py`."""

    dataset: Url
    labels: Url  # the label set to write
    weights: Weights  # of the backbone: path, URL or models:/name@alias
    extract: ExtractSettings = ExtractSettings()


class TrainJob(Job):
    """`jobs/train_solo.py`."""

    dataset: Url
    labels: Url | None = None  # None: the data set's own annotations
    label_fraction: LabelFraction = 1.0  # share of the photos whose annotations are used, every category's share of it
    label_seed: NonNegative = 0  # of the choice; with the same one, 5% contains 1%
    train: TrainSettings

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainJob:
        _check_batch("train.loop", self.train.loop, self.resources)
        return self

    @model_validator(mode="after")
    def _fraction_is_of_annotations(self) -> TrainJob:
        if self.labels is not None and self.label_fraction < 1:
            raise ValueError(
                f"label_fraction={self.label_fraction:g}: a fraction is of a data set's own annotations, not of "
                f"{self.labels}; leave one of the two out"
            )
        return self


_MAKE_A_LOSS = (
    "dataset",
    "labels",
    "label_fraction",
    "label_seed",
    "train.supervision",
    "train.losses",
    "train.views",
    "train.model.num_categories",
    "train.model.grid_sizes",
    "train.model.strides",
    "train.model.scale_ranges",
    "train.model.centre_sigma",
)
"""Settings of a training that say what its losses measure."""


class TuneJob(TrainJob):
    """`jobs/tune_solo.py`: many of `jobs/train_solo.py`, which share these settings but for some; the best is kept."""

    tune: TuneSettings
    evaluation_dataset: Url | None = None  # annotated, other photos: the best trial is the best on them
    held_out: PredictSettings = ALL_THAT_IS_FOUND  # of those photos

    @model_validator(mode="after")
    def _trials_are_right(self) -> TuneJob:
        if self.resources.min_workers != self.resources.max_workers:
            raise ValueError("resources.workers: trials that run beside each other are not elastic: give one number")
        of_a_training = tuple(name for name in TrainJob.model_fields if name not in Job.model_fields)
        tried = {name: values.given for name, values in self.tune.space.items()}
        check_values("tune.space", TrainJob, of_a_training, tried)
        self._check_comparable()
        for values in self.trials():
            job = self.trial_job(values)
            if self._by_category() and job.train.model.num_categories == 1:
                raise ValueError(
                    f"tune.evaluation_metric={self.tune.evaluation_metric}: a model of one category has none; give "
                    "train.model.num_categories, or segm/AP"
                )
            if self.tune.metric not in job.train.metrics:
                with_these = ", ".join(f"{name}={value}" for name, value in values.items())
                raise ValueError(
                    f"tune.metric={self.tune.metric}: a training with {with_these} does not report it; it reports "
                    f"{', '.join(job.train.metrics)}"
                )
        return self

    def _by_category(self) -> bool:
        return self.evaluation_dataset is not None and self.tune.evaluation_metric.startswith("category/")

    def _check_comparable(self) -> None:
        """Refuse to compare losses that measure different things."""
        compared = self.tune.metric.startswith("loss")
        if not compared or (self.tune.scheduler == "none" and self.evaluation_dataset is not None):
            return
        for name in self.tune.space:
            for other in _MAKE_A_LOSS:
                if f"{name}.".startswith(f"{other}.") or other.startswith(f"{name}."):
                    raise ValueError(
                        f"tune.space: with another {name} {self.tune.metric} measures something else, and cannot "
                        "compare trials; give an evaluation_dataset, and tune.scheduler=none"
                    )

    def trials(self) -> tuple[Values, ...]:
        """What each trial sets of the space, the same at every call."""
        return draw_trials(self.tune.space, draws=self.tune.trials, seed=self.tune.seed)

    def trial_job(self, values: Values) -> TrainJob:
        """The training of a trial, as it would be by itself.

        Raises:
            ValueError: The values don't go together with each other, or with what the trials share.
        """
        with_these = ", ".join(f"{name}={value}" for name, value in values.items())
        return _job_with(self, TrainJob, values, source=f"the trial {with_these}")


class PredictJob(Job):
    """`jobs/predict.py`."""

    dataset: Url
    labels: Url  # the label set to write
    weights: Weights  # of the segmenter: path, URL or models:/name@alias
    kind: Literal["pseudo-labels", "predictions"] = "pseudo-labels"
    predict: PredictSettings = PredictSettings()


class EvaluateJob(Job):
    """`jobs/evaluate.py`."""

    dataset: Url  # annotated
    labels: dict[PlainName, Url]  # a name for each label set to compare, in the order of the table
    gallery_images: NonNegative = 24

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluateJob:
        _check_metric_names("labels", self.labels)
        if ANNOTATIONS in self.labels:
            raise ValueError(f"labels: {ANNOTATIONS} is what the data set's own are called; give another name")
        return self


class FineTuneJob(Job):
    """`jobs/fine_tune.py`: from each start with each fraction of the labels; evaluate all, plot AP against fraction."""

    dataset: Url  # annotated
    evaluation_dataset: Url  # annotated, other photos
    starts: dict[PlainName, Weights | None]  # what to begin with, by its name on the page; null: random weights
    fractions: tuple[LabelFraction, ...]  # of the data set's photos
    label_seed: NonNegative = 0  # of the choice; the larger fractions contain the smaller ones
    min_steps: Positive | None = None  # None: all train for loop.steps; else as many epochs as those are of all photos
    train: TrainSettings  # initial_weights are the starts'
    held_out: PredictSettings = ALL_THAT_IS_FOUND
    gallery_images: NonNegative = 24
    notes: tuple[str, ...] = ()  # on the report page: what such a run can and cannot show

    @model_validator(mode="after")
    def _batch_divides(self) -> FineTuneJob:
        _check_batch("train.loop", self.train.loop, self.resources)
        return self

    @model_validator(mode="after")
    def _something_to_compare(self) -> FineTuneJob:
        if not self.starts or not self.fractions:
            raise ValueError(
                "starts, fractions: at least one of each; give starts={NAME: WEIGHTS} and fractions=[0.05]"
            )
        if list(self.fractions) != sorted(set(self.fractions)):
            raise ValueError(f"fractions={list(self.fractions)}: must ascend, each once")
        folders = [start_folder(name) for name in self.starts]
        if len(set(folders)) < len(folders):
            raise ValueError(
                f"starts: {', '.join(self.starts)}: two names differ in capitals or spaces only; rename one"
            )
        _check_metric_names(
            "starts, fractions", [training_name(start, at) for at in self.fractions for start in self.starts]
        )
        if self.train.initial_weights is not None:
            raise ValueError("train.initial_weights: leave it out, each of the starts has its own")
        return self


def start_folder(name: str) -> str:
    """A start's name as a part of a folder's: `Random weights` is `random-weights`."""
    return name.lower().replace(" ", "-")


def training_name(start: str, fraction: float) -> str:
    """A training from a start with a fraction of the labels; MLflow's names may have no percent sign."""
    return f"{start} at {100 * fraction:g} percent"


def metric_name(name: str) -> str:
    """A name that people gave as a part of a metric's: `no pairs` is `no_pairs`."""
    return name.replace(" ", "_")


class MethodJob(Job):
    """The whole method: pretrain, extract, train; `rounds` times label anew and train again."""

    dataset: Url
    evaluation_dataset: Url | None = None  # annotated; None: nothing is evaluated
    initial_backbone: Weights | None = None  # extract with these weights instead of pre-training
    rounds: NonNegative = 1  # of self-training, after the training on Free Masks
    pretrain: PretrainSettings
    extract: ExtractSettings = ExtractSettings()
    train: TrainSettings
    predict: PredictSettings = PredictSettings()  # of pseudo-labels
    held_out: PredictSettings = ALL_THAT_IS_FOUND  # of what is evaluated

    @model_validator(mode="after")
    def _batches_divide(self) -> MethodJob:
        _check_batch("pretrain.loop", self.pretrain.loop, self.resources)
        _check_batch("train.loop", self.train.loop, self.resources)
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> MethodJob:
        if (wanted := self.train.model.num_categories) != 1:
            raise ValueError(f"train.model.num_categories={wanted}: Free Masks are of objects as such; set it to 1")
        backbones = {"extract.backbone": self.extract.backbone, "train.model.backbone": self.train.model.backbone}
        if self.initial_backbone is None:
            backbones = {"pretrain.model.backbone": self.pretrain.model.backbone, **backbones}
        embeddings = {
            "extract.free_mask.embedding_channels": self.extract.free_mask.embedding_channels,
            "train.model.embedding_channels": self.train.model.embedding_channels,
        }
        for settings in (backbones, embeddings):
            if len(set(settings.values())) > 1:
                said = ", ".join(f"{key}={value}" for key, value in settings.items())
                raise ValueError(
                    f"{said}: must be the same, a stage takes what the one before made; change one of them"
                )
        return self


class PipelineJob(MethodJob):
    """`jobs/run_pipeline.py`: the whole method, an evaluation of all that it made, a champion and a page."""

    gallery_images: NonNegative = 24
    object_groups: int = Field(default=12, ge=0, le=64)  # on the report page, of what was found; 0: no such section
    notes: tuple[str, ...] = ()  # on the report page: what such a run can and cannot show


class AblationJob(MethodJob):
    """`jobs/run_ablations.py`: the method, and rows that differ from that in some settings, each with each seed."""

    evaluation_dataset: Url  # annotated
    seeds: tuple[NonNegative, ...] = Field(default=(0, 1, 2), min_length=1)  # of pre-training and training
    rows: dict[PlainName, dict[str, JsonValue]]  # beside the base; what each sets: train.losses.pairwise: 0.0

    @model_validator(mode="after")
    def _rows_are_right(self) -> AblationJob:
        _check_metric_names("rows", [BASE, *self.rows])
        seen = {BASE: _what_is_run(self.row_job({}, self.seeds[0]))}
        for name, values in self.rows.items():
            where = f"rows.{name}"
            for setting, seed in itertools.product(values, _SEEDS):
                if setting == seed:
                    raise ValueError(f"{where}: {seed}: leave it out, each row is run with each of seeds")
                if seed.startswith(f"{setting}."):
                    raise ValueError(f"{where}: {setting}: holds the seed, {seed}; set what is inside of it")
            check_values(where, MethodJob, _ABLATED, {setting: (value,) for setting, value in values.items()})
            job = self.row_job(values, self.seeds[0], source=where)
            run = _what_is_run(job)
            if same := next((other for other, its in seen.items() if its == run), None):
                raise ValueError(
                    f"{where}: is the same as {same}{why_unused(values, _unused(job))}; set something that is run"
                )
            seen[name] = run
        return self

    @model_validator(mode="after")
    def _rows_compare(self) -> AblationJob:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: each once")
        if self.tracking.registered_model is not None:
            raise ValueError("tracking.registered_model: leave it out, models of ablations are not registered")
        backbone = self.initial_backbone or ""
        if backbone.startswith("models:") and "@" in backbone:
            raise ValueError(
                f"initial_backbone={self.initial_backbone}: an alias may move between two rows; give a version, "
                "as models:/name/1"
            )
        return self

    def row_job(self, values: Values, seed: int, *, source: str = BASE) -> MethodJob:
        """The method with other settings than the base's.

        Raises:
            ValueError: The values don't go together with each other, or with the rest.
        """
        return _job_with(self, MethodJob, {**values, **dict.fromkeys(_SEEDS, seed)}, source=source)


def _unused(job: MethodJob) -> dict[str, str]:
    return unused_settings(job.train, pre_trains=job.initial_backbone is None, labels_anew=job.rounds > 0)


def _what_is_run(job: MethodJob) -> dict[str, Any]:
    """The settings of a method that its results depend on; the others are null."""
    return with_values(job.model_dump(mode="json"), dict.fromkeys(_unused(job)))


def _job_with(job: Job, kind: type[JobType], values: Values, *, source: str) -> JobType:
    """A job with another's settings, and some values for theirs.

    Raises:
        ValueError: The values don't go together with each other, or with the rest.
    """
    raw = with_values(job.model_dump(mode="json", include=set(kind.model_fields)), values)
    try:
        return parse_config(kind, raw, source=source)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _check_metric_names(where: str, names: Iterable[str]) -> None:
    """Refuse two names of which one's metrics would be written over the other's."""
    for metric, count in Counter(map(metric_name, names)).items():
        if count > 1:
            raise ValueError(f"{where}: {count} of them would be {metric} among the metrics; they must differ in that")


def _check_batch(section: str, loop: LoopSettings, resources: ResourceSettings) -> None:
    fixed = resources.min_workers == resources.max_workers
    parts = {workers: workers for workers in range(resources.min_workers, resources.max_workers + 1)}
    parts[resources.max_workers] *= loop.accumulation_steps
    for workers, count in parts.items():
        if loop.batch_size % count:
            elastic = "" if fixed else f", as by every number of workers from {resources.min_workers} to that"
            raise ValueError(
                f"{section}.batch_size={loop.batch_size} must divide by the {workers} workers of resources.workers, "
                f"times {count // workers} accumulation_steps{elastic}; change one of them"
            )
