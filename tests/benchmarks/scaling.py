"""What data sets of any size cost, by the rates that were measured: `python -m tests.benchmarks.scaling`.

Arithmetic alone, for README's section of the same name: every figure here is either measured, with where it was
measured beside it, or a price that somebody asks, or a recipe that a configuration has.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Rates:
    """Photos a second, of a GPU (an H200) or of a CPU core; measured where README says.

    Attributes:
        pretrain_gpu: DenseCL, R50, 224 px; two views of each photo.
        pretrain_core: Photos read, decoded and cropped twice.
        extract_gpu: Free Mask, R50, 800 px, from shard to label file.
        train_gpu: SOLO, R50, at 640 to 800 px.
        train_core: Photos and masks read, decoded and resized.
        predict_gpu: SOLO, R50, 800 px, eight photos at a time.
    """

    pretrain_gpu: float
    pretrain_core: float
    extract_gpu: float
    train_gpu: float
    train_core: float
    predict_gpu: float


@dataclass(frozen=True, slots=True)
class Prices:
    """In dollars, about what large clouds ask in 2026; those of GPUs differ by a factor of three.

    Attributes:
        gpu_hour: Of an H100 or H200 with its share of a host's cores.
        core_hour: Of a core more.
        thousand_gets: Requests that read.
        thousand_puts: Requests that write.
    """

    gpu_hour: float = 6.0
    core_hour: float = 0.045
    thousand_gets: float = 0.0004
    thousand_puts: float = 0.005


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done with a data set.

    Attributes:
        name: Of the data set.
        photos: In it.
        photo_bytes: Of a photo's file, on average.
        epochs: Of DenseCL.
        solo_steps: Of each of two trainings of SOLO, on Free Masks and on what the first labelled; 16 photos a step.
    """

    name: str
    photos: int
    photo_bytes: float
    epochs: float
    solo_steps: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a recipe.

    Attributes:
        pretrain_hours: Hours of one GPU.
        extract_hours: Likewise.
        train_hours: Likewise, both trainings.
        predict_hours: Likewise, the labelling between them.
        core_hours: Of the CPU cores that read, decode and crop.
        gigabytes: Read from the object store.
        gets: Requests that read, of `READ_BLOCK` each.
        puts: Requests that write: a label file is one.
        dollars: Of all that, without what storing takes.
    """

    pretrain_hours: float
    extract_hours: float
    train_hours: float
    predict_hours: float
    core_hours: float
    gigabytes: float
    gets: float
    puts: float
    dollars: float

    @property
    def gpu_hours(self) -> float:
        """All together."""
        return self.pretrain_hours + self.extract_hours + self.train_hours + self.predict_hours


SOLO_BATCH = 16
ROUNDS = 2
SAMPLES_PER_SHARD = 1000
READ_BLOCK = 8 * 2**20
"""Bytes of a shard that a request asks for."""
HOST_CORES_PER_GPU = 24
"""That come with a GPU of such a host, at its price."""

RECIPES = (
    Recipe("COCO train and unlabelled", 241_000, 163e3, 800, 30_000),
    Recipe("ImageNet", 1_300_000, 115e3, 200, 90_000),
    Recipe("100 M photos", 100_000_000, 163e3, 4, 90_000),
)


def cost_of(recipe: Recipe, rates: Rates, prices: Prices = Prices()) -> Cost:
    """What a recipe takes, whatever the number of GPUs: nothing is lost here by sharing the work."""
    pretrained = recipe.photos * recipe.epochs
    trained = ROUNDS * recipe.solo_steps * SOLO_BATCH
    labelled = ROUNDS * recipe.photos  # by Free Mask, and by the first SOLO
    reads = pretrained + trained + labelled
    core_hours = (pretrained / rates.pretrain_core + (trained + labelled) / rates.train_core) / 3600
    hours = (
        pretrained / rates.pretrain_gpu / 3600,
        recipe.photos / rates.extract_gpu / 3600,
        trained / rates.train_gpu / 3600,
        recipe.photos / rates.predict_gpu / 3600,
    )
    gets, puts = reads * recipe.photo_bytes / READ_BLOCK, labelled / SAMPLES_PER_SHARD
    extra_core_hours = max(0.0, core_hours - HOST_CORES_PER_GPU * sum(hours))
    dollars = sum(hours) * prices.gpu_hour + extra_core_hours * prices.core_hour
    dollars += (gets * prices.thousand_gets + puts * prices.thousand_puts) / 1000
    return Cost(*hours, core_hours, reads * recipe.photo_bytes / 1e9, gets, puts, dollars)


@dataclass(frozen=True, slots=True)
class Load:
    """What so many GPUs ask of what they share, while DenseCL is trained.

    Attributes:
        cores: That keep them fed.
        gigabytes_per_second: From the object store.
        gets_per_second: Of it.
    """

    cores: float
    gigabytes_per_second: float
    gets_per_second: float


def load_of(gpus: int, rates: Rates, photo_bytes: float) -> Load:
    """While all of them are busy."""
    photos = gpus * rates.pretrain_gpu
    return Load(photos / rates.pretrain_core, photos * photo_bytes / 1e9, photos * photo_bytes / READ_BLOCK)


# What was measured: on a GPU README's figures of one H200, on a core `python -m tests.benchmarks input_paths`.
MEASURED = Rates(
    pretrain_gpu=930.0, pretrain_core=205.0, extract_gpu=54.0, train_gpu=52.0, train_core=41.0, predict_gpu=125.0
)


def main() -> None:
    """Print README's tables."""
    console = Console(width=120)
    costs = Table(title=f"at {MEASURED}", title_justify="left")
    headings = ("data set", "DenseCL", "Free Mask", "SOLO", "labelling", "cores", "TB read", "GETs", "dollars")
    for heading in headings:
        costs.add_column(heading, justify="left" if heading == "data set" else "right")
    for recipe in RECIPES:
        cost = cost_of(recipe, MEASURED)
        hours = (cost.pretrain_hours, cost.extract_hours, cost.train_hours, cost.predict_hours, cost.core_hours)
        costs.add_row(
            f"{recipe.name}, {recipe.epochs:g} epochs, SOLO {ROUNDS} x {recipe.solo_steps:,} steps",
            *(f"{each:,.0f} h" for each in hours),
            f"{cost.gigabytes / 1000:,.1f}",
            f"{cost.gets / 1e6:,.2f} M",
            f"{cost.dollars:,.0f}",
        )
    console.print(costs)
    loads = Table(title="what DenseCL asks of what GPUs share", title_justify="left")
    for heading in ("GPUs", "cores", "GB/s read", "GETs/s"):
        loads.add_column(heading, justify="right")
    for gpus in (8, 64, 512):
        load = load_of(gpus, MEASURED, RECIPES[0].photo_bytes)
        loads.add_row(
            str(gpus), f"{load.cores:,.0f}", f"{load.gigabytes_per_second:,.1f}", f"{load.gets_per_second:,.0f}"
        )
    console.print(loads)


if __name__ == "__main__":
    main()
