"""How cost grows with what there is to do: `python -m tests.benchmarks.growth [part ...] [--json path]`.

Beside a straight line: what a part would take if the cost of its first row were paid again and again, or if more
workers shared it and lost nothing. Above 1 is worse than straight.

    instances   losses, targets and gradients of SOLOv2, by the objects in each photo
    images      Free Mask extraction, by the photos in the data set
    actors      the same extraction, by the actors of the pool
    evaluation  of a label set by a data set's annotations, by the photos and by who does it
    workers     a step of DenseCL under Ray Train, by the train workers; a thread each
    nodes       scheduling alone: extraction by models that sleep as long as a real one takes, on a cluster of nodes
                that are simulated on this machine (Ray's own way: a raylet each, for two cores that are not there)
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import ray
import torch
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table
from torch import Tensor

from freesolo.cluster import connect
from freesolo.comparison import compare
from freesolo.data.label_records import LabelledInstance
from freesolo.data.pack import pack
from freesolo.data.shards import DatasetManifest
from freesolo.inference.batches import BatchPlan
from freesolo.inference.labellers import FreeMaskLabeller
from freesolo.inference.pool import ModelPool, label_batches
from freesolo.models.resnet import build_resnet
from freesolo.settings import ExtractSettings, FreeMaskSettings, ResourceSettings
from freesolo.types import ImageBatch
from tests.benchmarks import evaluation, ray_cost, solo_targets_and_losses
from tests.benchmarks.input_paths import Sizes, photo_file, store

BATCH_SIZE = 4
PHOTOS_PER_SHARD = 32
NODE_CPUS = 2
EVALUATION = evaluation.Sizes()


@dataclass(frozen=True, slots=True)
class Row:
    """What some amount of work took.

    Attributes:
        amount: Of whatever the part is about.
        unit: What `seconds` are of.
        seconds: Measured.
        straight: What a straight line through the part's first row says.
    """

    amount: str
    unit: str
    seconds: float
    straight: float


# --- Instances --------------------------------------------------------------------------------------------------------


def instances(counts: Sequence[int] = (1, 5, 20, 100)) -> Iterator[Row]:
    """Of four photos at 640 px: the whole cost is not that of the objects, so the line begins at 1."""
    device = torch.device("cpu")
    for place, name in ((1, "free-mask losses"), (2, "mask losses")):
        first = 0.0
        for count in counts:
            size = replace(solo_targets_and_losses.FULL, instances=count)
            seconds = median_seconds(solo_targets_and_losses.cases(device, size)[place].ours)
            first = first or seconds
            yield Row(f"{count} objects a photo", name, seconds, first * count / counts[0])


def median_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """After a call to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


# --- Extraction -------------------------------------------------------------------------------------------------------


def images(counts: Sequence[int] = (64, 256, 1024)) -> Iterator[Row]:
    """The first photos bear the start of the actors too: the line is of the time after the first batch."""
    settings = extraction_settings()
    with data_set(max(counts), (480, 640)) as (url, manifest):
        connect(ResourceSettings())
        first = 0.0
        for count in counts:
            arrivals = extraction(url, manifest, count, plan_of(settings), free_mask_pool(settings, actors=1))
            seconds = arrivals[-1][0] - arrivals[0][0]
            first = first or seconds
            yield Row(f"{count} photos", "after the first batch", seconds, first * count / counts[0])


def actors(counts: Sequence[int] = (1, 2), photos: int = 256) -> Iterator[Row]:
    """With a core each, beside which decoding and the driver need theirs."""
    settings = extraction_settings()
    with data_set(photos, (480, 640)) as (url, manifest):
        connect(ResourceSettings(workers=max(counts)))
        first = 0.0
        for count in counts:
            arrivals = extraction(url, manifest, photos, plan_of(settings), free_mask_pool(settings, actors=count))
            seconds = arrivals[-1][0] - arrivals[0][0]
            first = first or seconds
            yield Row(f"{count} actors", f"{photos} photos, after the first batch", seconds, first / count)


def extraction_settings() -> ExtractSettings:
    """An R18 at short side 320, which a core can do a few of in a second."""
    free_mask = FreeMaskSettings(short_side=320, long_side_max=640)
    return ExtractSettings(backbone="resnet18", free_mask=free_mask, batch_size=BATCH_SIZE)


def plan_of(settings: ExtractSettings) -> BatchPlan:
    """As the job has it."""
    return BatchPlan(settings.free_mask.short_side, settings.free_mask.long_side_max, settings.batch_size)


def free_mask_pool(settings: ExtractSettings, *, actors: int) -> ModelPool:
    """Random weights, which take as long as others."""
    torch.manual_seed(0)
    weights = build_resnet(settings.backbone).state_dict()
    return ModelPool(partial(FreeMaskLabeller, settings), weights, ResourceSettings(workers=actors))


def extraction(
    url: str, manifest: DatasetManifest, photos: int, plan: BatchPlan, pool: ModelPool
) -> list[tuple[float, int]]:
    """When each batch came back, in seconds since the start, and how many photos had come with it."""
    shards = manifest.shards[: photos // PHOTOS_PER_SHARD]
    arrivals: list[tuple[float, int]] = []
    done, start = 0, time.perf_counter()
    for _, entries in label_batches(pool, url, shards, plan):
        done += len(entries)
        arrivals.append((time.perf_counter() - start, done))
    assert done == photos
    return arrivals


@contextmanager
def data_set(photos: int, size: tuple[int, int]) -> Iterator[tuple[str, DatasetManifest]]:
    """A data set of photos that are all alike, in a folder of this machine."""
    with tempfile.TemporaryDirectory(prefix="freesolo-benchmark-") as name:
        folder, url = Path(name, "photos"), f"{name}/data"
        folder.mkdir()
        jpeg = photo_file(*size, torch.Generator().manual_seed(0))
        for number in range(photos):
            (folder / f"{number:06d}.jpg").write_bytes(jpeg)
        yield url, pack(str(folder), url, samples_per_shard=PHOTOS_PER_SHARD)


# --- Evaluation -------------------------------------------------------------------------------------------------------


def evaluations(counts: Sequence[int] = (500, 5000), size: evaluation.Sizes = EVALUATION) -> Iterator[Row]:
    """Of the fewest photos in this process alone, then all of them in tasks of the cluster, which has every core."""
    with tempfile.TemporaryDirectory(prefix="freesolo-benchmark-") as name:
        stored = []
        for count in counts:
            folder = Path(name, str(count))
            folder.mkdir()
            stored.append(evaluation.store(folder, replace(size, photos=count)))
        dataset, labels = stored[0]
        alone = median_seconds(lambda: compare(dataset, {"found": labels}), repeats=3)
        yield Row(f"{counts[0]} photos, this process", "an evaluation", alone, alone)
        connect(ResourceSettings())
        for count, (dataset, labels) in zip(counts, stored, strict=True):
            seconds = median_seconds(partial(evaluation.our_metrics, dataset, labels), repeats=3)
            straight = alone * count / counts[0] / (os.cpu_count() or 1)
            yield Row(f"{count} photos, tasks", "an evaluation", seconds, straight)


# --- Nodes ------------------------------------------------------------------------------------------------------------


class SleepingLabeller:
    """Finds nothing, and takes its time.

    Args:
        seconds: Of a photo.
        weights: None.
        device: Not used.
    """

    def __init__(self, seconds: float, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._seconds = seconds

    def __call__(
        self, images: ImageBatch, original_sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[LabelledInstance, ...]]:
        time.sleep(self._seconds * len(images))
        return [() for _ in original_sizes]


def nodes(counts: Sequence[int] = (1, 4, 16), photos_per_node: int = 32) -> Iterator[Row]:
    """Photos of a few pixels, which cost nothing to decode; counted while all actors are at work."""
    seconds = seconds_of_a_photo()
    with data_set(max(counts) * photos_per_node, (32, 32)) as (url, manifest):
        for count in counts:
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": NODE_CPUS})
            try:
                for _ in range(count - 1):
                    cluster.add_node(num_cpus=NODE_CPUS)
                ray.init(address=cluster.address, log_to_driver=False)
                pool = ModelPool(partial(SleepingLabeller, seconds), {}, ResourceSettings(workers=count))
                plan = BatchPlan(32, 64, BATCH_SIZE)
                arrivals = extraction(url, manifest, count * photos_per_node, plan, pool)
                rate = steady_rate(arrivals, actors=count)
            finally:
                ray.shutdown()
                cluster.shutdown()
            yield Row(f"{count} nodes", "a photo, all nodes together", 1 / rate, seconds / count)


def seconds_of_a_photo() -> float:
    """Free Mask at the released size, with an R50, on this machine's cores."""
    settings = ExtractSettings()
    torch.manual_seed(0)
    label = FreeMaskLabeller(settings, build_resnet(settings.backbone).state_dict(), torch.device("cpu"))
    pixels = torch.randint(256, (1, 3, 800, 1067), dtype=torch.uint8)
    photo = ImageBatch(pixels, torch.tensor([[800, 1067]]), (1,))
    return median_seconds(lambda: label(photo, [(480, 640)]), repeats=3)


def steady_rate(arrivals: Sequence[tuple[float, int]], *, actors: int) -> float:
    """Photos a second between the time when every actor may have had a batch and the time when some may have none.

    Args:
        arrivals: When each batch came, and how many photos had come with it.
        actors: That were at work.
    """
    begin, end = arrivals[actors], arrivals[-actors - 1]
    return (end[1] - begin[1]) / (end[0] - begin[0])


# --- Workers ----------------------------------------------------------------------------------------------------------


def workers(counts: Sequence[int] = (1, 2)) -> Iterator[Row]:
    """The same batch in all; each worker has one thread, and so has the data path what they leave."""
    with tempfile.TemporaryDirectory(prefix="freesolo-benchmark-") as name:
        folder = Path(name)
        store(folder, Sizes(photos=128))
        first = 0.0
        for count in counts:
            resources = f"resources={{workers: {count}, cpus_per_worker: 1}}"
            seconds = ray_cost.step_seconds(ray_cost.our_times(folder, f"workers-{count}", resources))
            first = first or seconds
            yield Row(f"{count} train workers", "a step", seconds, first / count)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "instances": instances,
    "images": images,
    "actors": actors,
    "evaluation": evaluations,
    "workers": workers,
    "nodes": nodes,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for, all by default."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description="Measure how cost grows.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--json", type=Path, default=Path("build/growth.json"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        parser.error(f"there is no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    console = Console(width=120)
    measured: dict[str, list[Row]] = {}
    for name in arguments.parts or PARTS:
        measured[name] = list(PARTS[name]())
        if ray.is_initialized():
            ray.shutdown()
        console.print(table(name, measured[name]))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"cores": os.cpu_count(), "parts": {name: list(map(asdict, rows)) for name, rows in measured.items()}}
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def table(name: str, rows: Sequence[Row]) -> Table:
    """A part's rows, each beside the straight line."""
    result = Table(title=f"growth: {name}, {os.cpu_count()} cores", title_justify="left")
    for heading in ("amount", "of", "seconds", "straight line", "times straight"):
        result.add_column(heading, justify="left" if heading in ("amount", "of") else "right", no_wrap=True)
    for row in rows:
        result.add_row(
            row.amount, row.unit, f"{row.seconds:,.3f}", f"{row.straight:,.3f}", f"{row.seconds / row.straight:.2f}"
        )
    return result


if __name__ == "__main__":
    main()
