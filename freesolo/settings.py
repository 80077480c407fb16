"""Every setting that a stage has, with its default and its meaning.

A job's YAML states what differs from the defaults here (`freesolo.config` reads it). Models are frozen and strict:
unknown keys and wrong types are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"{list(bounds)}: give [low, high]")
    return bounds


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Interval = Annotated[tuple[float, float], AfterValidator(_ascending)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
LabelFraction = Annotated[float, Field(gt=0.0, le=1.0)]
PlainName = Annotated[str, Field(pattern=r"^\w[\w .-]*$", max_length=50)]  # is part of names of folders and metrics
MAX_INSTANCES = 1000  # of a photo, in what is written and what is read: the masks of all lie in memory together
InstanceLimit = Annotated[int, Field(gt=0, le=MAX_INSTANCES)]
# `_caffe`: the stride of a block is in its first 1x1 convolution, as in MSRA's weights, those of detectron2's models.
Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet50_caffe", "resnet101_caffe"]
EvaluationMetric = Literal["segm/AP", "segm/AP50", "segm/AP75", "segm/AR100", "category/AP", "category/AP50", "corloc"]
SupervisionKind = Literal["free_masks", "masks", "boxes"]


def absolute_url(url: str) -> str:
    """A relative path made absolute, so that it means the same in every process; anything else as it is."""
    return url if "://" in url else str(Path(url).absolute())


def _absolute_file(reference: str) -> str:
    try:
        return absolute_url(reference) if Path(reference).is_file() else reference
    except OSError:  # a name that is too long for a file
        return reference


Url = Annotated[str, AfterValidator(absolute_url)]  # folder or file: a path or any fsspec URL
Weights = Annotated[str, AfterValidator(_absolute_file)]  # path, URL, published name or models:/name@alias


class Settings(BaseModel):
    """What all settings share: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


# --- what every job has -------------------------------------------------------------------------------------------


class ResourceSettings(Settings):
    """What a job asks of the Ray cluster."""

    workers: Positive | tuple[Positive, Positive] = 1  # train workers or an extraction's actors; [min, max]: elastic
    cpus_per_worker: Positive = 1
    gpus_per_worker: float = Field(default=0.0, ge=0.0)
    label_selector: dict[str, str] = Field(default_factory=dict)  # Ray labels of the nodes that workers may run on
    data_cpus: Positive | None = None  # for reading and decoding, all workers together; None: all that workers leave
    max_failures: NonNegative = 3  # restarts of the training group after worker loss
    resize_seconds: float = Field(default=60.0, gt=0.0)  # elastic: time between looks for room for more train workers

    @field_validator("workers")
    @classmethod
    def _in_order(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"workers={list(workers)}: give [min, max], the smaller number first")
        return workers

    @property
    def min_workers(self) -> int:
        """The fewest that a job can do with."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def max_workers(self) -> int:
        """The most that it will use."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class BoundsSettings(Settings):
    """The largest sample that is read. A larger one is a bad sample: counted, named, never decoded into memory."""

    max_sample_bytes: Positive = 256 * 2**20  # of a photo's file, as the shard holds it
    max_pixels: Annotated[int, Field(gt=0, lt=2**29)] = 128_000_000  # height times width; three bytes each in memory


DEFAULT_BOUNDS = BoundsSettings()


class TrackingSettings(Settings):
    """Where runs are witnessed and models are registered."""

    uri: str | None = None  # MLflow's; None: MLFLOW_TRACKING_URI, or SQLite in the storage folder; "off": no MLflow
    experiment: str = "freesolo"
    registered_model: str | None = None  # name in the registry; None: not registered

    @field_validator("uri", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads an unquoted off as false


class StreamSettings(Settings):
    """How training streams a data set."""

    shuffle_window_shards: Positive = 1  # shards whose samples are mixed with one another
    max_bad_samples: Fraction = 0.001  # share of unreadable samples above which a job stops
    prefetch_batches: Positive = 2


class OptimizerSettings(Settings):
    """SGD, as in the papers, or AdamW, which gets further in short runs; and the learning rate's schedule."""

    method: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(gt=0.0)
    momentum: Fraction = 0.9  # SGD's; AdamW's first beta
    weight_decay: float = Field(default=1e-4, ge=0.0)
    warmup_steps: NonNegative = 0
    warmup_factor: Fraction = 0.01  # the learning rate starts at this share of itself
    schedule: Literal["constant", "step", "cosine"] = "constant"
    milestones: tuple[Positive, ...] = ()  # steps at which `step` multiplies the rate by 0.1
    gradient_clip_norm: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _milestones_are_used(self) -> OptimizerSettings:
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"schedule={self.schedule} with milestones={list(self.milestones)}: `step` needs them, and no other "
                "schedule has any; change one of them"
            )
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={list(self.milestones)}: must ascend")
        return self


class LoopSettings(Settings):
    """How long to train and how often to look."""

    steps: Positive
    batch_size: Positive  # of all workers together, over one optimiser step
    accumulation_steps: Positive = 1  # backward passes per optimiser step with all workers; with fewer, more
    seed: NonNegative = 0
    log_every: Positive = 10
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2  # the last ones; the best one is kept too
    overlay_every: NonNegative = 0  # steps between looks: SOLO's predictions, pre-training's probe; 0: none
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast on a GPU
    record_samples: bool = False  # write down which image ids each step used, for audits

    def accumulation_with(self, workers: int, max_workers: int) -> int:
        """Backward passes per optimiser step for a number of workers, so that a pass is no larger than with all.

        Args:
            workers: That there are now; the batch divides by it.
            max_workers: That `accumulation_steps` is meant for.
        """
        largest = self.batch_size // (max_workers * self.accumulation_steps)
        rows = self.batch_size // workers
        return next(passes for passes in range(1, rows + 1) if rows % passes == 0 and rows // passes <= largest)


LOOP_METRICS = ("images_per_second", "data_wait_share", "bad_samples", "learning_rate", "gradient_norm")
"""What every training reports beside its losses."""


# --- DenseCL ------------------------------------------------------------------------------------------------------


class DenseCLModelSettings(Settings):
    """DenseCL (arXiv:2011.09157) sec. 3."""

    backbone: Backbone = "resnet50"
    backbone_weights: Weights | None = None  # path, URL or models:/name@alias to start from
    hidden_channels: Positive = 2048
    projection_channels: Positive = 128
    grid_size: Positive | None = None  # adaptive pool of the dense branch to this many cells a side
    queue_length: Positive = 65536
    momentum: Fraction = 0.999
    temperature: float = Field(default=0.2, gt=0.0)
    dense_loss_weight: Fraction = 0.5  # lambda; 0 is MoCo v2
    dense_loss_warmup_steps: NonNegative = 0
    batch_norm: Literal["shuffle", "sync"] = "shuffle"


class ColourSettings(Settings):
    """MoCo v2's jitter, grey and blur (arXiv:2003.04297), which FreeSOLO's strong view shares."""

    jitter_probability: Fraction = 0.8
    brightness: Fraction = 0.4  # a factor from 1 less this to 1 and this; contrast and saturation likewise
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: float = Field(default=0.1, ge=0.0, le=0.5)  # of a turn, each way
    grayscale_probability: Fraction = 0.2
    blur_probability: Fraction = 0.5
    blur_sigma: Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)] = (0.1, 2.0)


class ViewSettings(ColourSettings):
    """MoCo v2's augmentation, each view alone."""

    size: Positive = 224
    # Shares of the photo's area.
    crop_scale: Annotated[tuple[LabelFraction, LabelFraction], AfterValidator(_ascending)] = (0.2, 1.0)
    flip_probability: Fraction = 0.5


class ProbeSettings(Settings):
    """What a pre-training is looked at by every `loop.overlay_every` steps: features, in numbers and in a picture.

    Worker 0 looks while the others wait: at R50 and 224 px, 256 photos and their objects are a thousand crops, a second
    or two on a GPU, minutes on a CPU, and 150 MB of its memory.
    """

    dataset: Url | None = None  # whose first photos are looked at, best held-out ones; None: those trained on
    photos: NonNegative = 256  # 0: no look
    picture_size: Positive = 448  # side of the few photos in the picture, in px; a cell of their maps is 32


class PretrainSettings(Settings):
    """One DenseCL pre-training."""

    model: DenseCLModelSettings = DenseCLModelSettings()
    views: ViewSettings = ViewSettings()
    probe: ProbeSettings = ProbeSettings()
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=0.3, schedule="cosine")
    loop: LoopSettings
    stream: StreamSettings = StreamSettings()

    @model_validator(mode="after")
    def _queue_divides(self) -> PretrainSettings:
        if self.model.queue_length % self.loop.batch_size:
            raise ValueError(
                f"model.queue_length={self.model.queue_length} is not divisible by loop.batch_size="
                f"{self.loop.batch_size}: the queue is replaced a whole batch at a time; make it a multiple"
            )
        return self


# --- Free Mask ----------------------------------------------------------------------------------------------------


class FreeMaskSettings(Settings):
    """Free Mask (arXiv:2202.12181) sec. 3.1, with the released code's filters."""

    short_side: Positive = 800
    long_side_max: Positive = 1333
    feature_level: Literal[3, 4, 5] = 5  # which ResNet stage's map: stride 8, 16 or 32
    query_scales: tuple[Annotated[float, Field(gt=0.0, le=4.0)], ...] = Field(default=(1.0, 0.5, 0.25), min_length=1)
    mask_threshold: Fraction = 0.5
    min_maskness: Fraction = 0.7  # after NMS
    max_instances: InstanceLimit = 20
    nms_sigma: float = Field(default=2.0, gt=0.0)
    top_border: Fraction = 0.2  # masks centred at or above this share of the height are dropped; 0: none
    max_width: Fraction = 0.95  # masks on this share of the columns or more are dropped; 1: none
    embedding_channels: Positive = 128


class ExtractSettings(Settings):
    """One Free Mask extraction."""

    backbone: Backbone = "resnet50"
    free_mask: FreeMaskSettings = FreeMaskSettings()
    batch_size: Positive = 8  # images of equal size a forward pass
    max_bad_samples: Fraction = 0.001


# --- SOLO ---------------------------------------------------------------------------------------------------------


class HeadSettings(Settings):
    """How cells get their masks; the defaults are SOLOv2's; SOLO's towers have 7 convolutions of 256 channels."""

    kind: Literal["solo", "decoupled", "solov2"] = "solov2"
    tower_channels: Positive = 512  # category towers, and those of kernels or masks
    tower_convs: Positive = 4
    mask_tower_channels: Positive = 128  # solov2
    kernel_channels: Positive = 256  # solov2

    @model_validator(mode="after")
    def _groups_divide(self) -> HeadSettings:
        for name in ("tower_channels", "mask_tower_channels", "kernel_channels"):
            if getattr(self, name) % 32:
                raise ValueError(f"{name}={getattr(self, name)} is not divisible by 32, GroupNorm's groups")
        return self


class SoloModelSettings(Settings):
    """A ResNet-FPN with a head of the SOLO family."""

    backbone: Backbone = "resnet50"
    num_categories: Positive = 1  # 1: class-agnostic
    fpn_channels: Positive = 256
    head: HeadSettings = HeadSettings()
    embedding_channels: Positive = 128
    grid_sizes: tuple[Positive, ...] = (40, 36, 24, 16, 12)
    strides: tuple[Positive, ...] = (8, 8, 16, 32, 32)
    scale_ranges: tuple[Interval, ...] = (
        (1, 96),
        (48, 192),
        (96, 384),
        (192, 768),
        (384, 2048),
    )
    centre_sigma: float = Field(default=0.2, gt=0.0)

    @model_validator(mode="after")
    def _five_levels(self) -> SoloModelSettings:
        lengths = {len(self.grid_sizes), len(self.strides), len(self.scale_ranges)}
        if lengths != {5}:
            raise ValueError("grid_sizes, strides and scale_ranges must each have 5 entries, one a pyramid level")
        return self


MASK_LOSSES: dict[SupervisionKind, tuple[str, ...]] = {
    "masks": ("dice",),
    "boxes": ("max_projection", "pairwise"),
    "free_masks": ("max_projection", "mean_projection", "pairwise", "embedding"),
}
"""The losses of each supervision beside the categories'."""


class LossSettings(Settings):
    """Weights of the SOLO losses; the defaults are FreeSOLO's (arXiv:2202.12181) sec. 3.2."""

    category: float = Field(default=1.0, ge=0.0)
    max_projection: float = Field(default=1.0, ge=0.0)
    mean_projection: float = Field(default=0.1, ge=0.0)
    pairwise: float = Field(default=1.0, ge=0.0)
    pairwise_warmup_steps: NonNegative = 1000
    pairwise_min_similarity: float = Field(default=0.3, gt=0.0, le=1.0)  # pairs that must not count have 0
    embedding: float = Field(default=4.0, ge=0.0)
    dice: float = Field(default=3.0, ge=0.0)  # supervision: masks
    focal_alpha: Fraction = 0.25
    focal_gamma: float = Field(default=2.0, ge=0.0)


class InferenceSettings(Settings):
    """SOLOv2's post-processing (arXiv:2003.10152)."""

    min_category_score: Fraction = 0.1
    mask_threshold: Fraction = 0.5
    max_before_nms: Positive = 500
    nms_sigma: float = Field(default=2.0, gt=0.0)
    min_score: Fraction = 0.05  # after Matrix NMS
    max_instances: InstanceLimit = 100


class SegmentationViewSettings(ColourSettings):
    """FreeSOLO's weak and strong views and copy-paste (arXiv:2202.12181)."""

    short_sides: tuple[Positive, ...] = Field(default=(640, 672, 704, 736, 768, 800), min_length=1)
    long_side_max: Positive = 1333
    size_divisor: int = Field(default=32, gt=0, multiple_of=32)  # of the padded height and width
    flip_probability: Fraction = 0.5
    strong: bool = True  # train on a strong view beside the weak one
    erasing_probabilities: tuple[Fraction, ...] = (0.7, 0.5, 0.3)
    copy_paste: bool = True  # into the strong view


class TrainSettings(Settings):
    """One SOLO training."""

    model: SoloModelSettings = SoloModelSettings()
    supervision: SupervisionKind = "free_masks"
    initial_weights: Weights | None = None  # backbone or segmenter: path, URL or models:/name@alias
    freeze_batch_norm: bool = False
    losses: LossSettings = LossSettings()
    views: SegmentationViewSettings = SegmentationViewSettings()
    inference: InferenceSettings = InferenceSettings()
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=0.001, warmup_steps=1000, gradient_clip_norm=35.0)
    loop: LoopSettings
    stream: StreamSettings = StreamSettings()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all that such a training reports: its losses by term and summed, and what every training does."""
        names = MASK_LOSSES[self.supervision]
        terms = [name for name in names if name == "dice" or getattr(self.losses, name) > 0]
        return ("loss", "loss/category", *(f"loss/{term}" for term in terms), *LOOP_METRICS)


class PredictSettings(Settings):
    """One batch inference; the defaults are self-training's (arXiv:2202.12181, sec. 3.2)."""

    short_side: Positive = 800
    long_side_max: Positive = 1333
    inference: InferenceSettings = InferenceSettings(min_score=0.3, max_instances=20)
    max_width: Fraction = 0.95  # masks on this share of the columns or more are dropped; 1: none
    batch_size: Positive = 8
    max_bad_samples: Fraction = 0.001


# --- sweeps -------------------------------------------------------------------------------------------------------


class RangeSettings(Settings):
    """The values that a sweep tries of one setting: one of these."""

    choice: tuple[JsonValue, ...] | None = None  # each trial draws one
    uniform: tuple[float, float] | None = None  # each trial draws from [low, high]
    loguniform: tuple[float, float] | None = None  # likewise, its logarithm
    grid: tuple[JsonValue, ...] | None = None  # each draw is tried with every one

    @model_validator(mode="after")
    def _is_one(self) -> RangeSettings:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one of choice, uniform, loguniform and grid, not {len(given)}")
        ((kind, values),) = given.items()
        if not values:
            raise ValueError(f"{kind}: [] has nothing to try")
        bounds = self.uniform or self.loguniform
        if bounds is not None and bounds[0] >= bounds[1]:
            raise ValueError(f"{kind}: {list(bounds)}: give [low, high]")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform: {list(self.loguniform)}: there is no logarithm of the first")
        return self

    @property
    def given(self) -> tuple[JsonValue, ...]:
        """The values that are written down: all that may be tried, or the ends of a range."""
        return self.choice or self.grid or self.uniform or self.loguniform or ()


class TuneSettings(Settings):
    """What a sweep tries, and which trial is the best."""

    space: dict[str, RangeSettings] = Field(min_length=1)  # by dotted setting: train.optimizer.learning_rate
    trials: Positive = 1  # draws from the space; each of them at every point of its grids
    seed: NonNegative = 0  # of the draws
    # Any that the training reports; it says who falls behind, and without held-out photos who is best.
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    # With held-out photos: of those that went to the end the best has most.
    evaluation_metric: EvaluationMetric = "segm/AP"
    scheduler: Literal["asha", "median", "none"] = "asha"  # who stops trials that fall behind, at their checkpoints
    grace_steps: Positive | None = None  # no trial is stopped before; None: not before its first checkpoint
    reduction_factor: float = Field(default=3.0, gt=1.0)  # asha: of this many trials one goes on, at each rung
    max_concurrent: Positive | None = None  # None: as many trials as the cluster has room for
