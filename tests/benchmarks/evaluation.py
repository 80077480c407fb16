"""What was found in annotated photos against their annotations, from files to COCO's numbers of masks and boxes.

The peer is pycocotools as its own demo calls it, in one process, on the same annotations and predictions as JSON; ours
reads shards and label files, a task a shard, and gives CorLoc beside.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from freesolo.comparison import compare
from freesolo.data.coco import export_coco, ground_truth
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.labels import LabelPlan, begin_label_set, finish_label_set, write_label_file
from freesolo.data.pack import pack
from freesolo.data.shards import read_shard
from freesolo.evaluation import Metrics
from freesolo.ops.masks import boxes_xywh, encode_rle
from freesolo.settings import ResourceSettings
from tests.benchmarks.measure import Benchmark, Case
from tests.benchmarks.synthetic import ellipses

CORES = os.cpu_count() or 1
HEIGHT, WIDTH = 120, 160


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much there is to do: photos of 120 x 160 px, in as many shards, with objects and predictions in each."""

    photos: int = 500
    shards: int = 8
    objects: int = 7
    predictions: int = 100


TINY = Sizes(photos=6, shards=3, objects=2, predictions=4)


def cases(device: torch.device, sizes: Sizes = Sizes()) -> Iterator[Case[Any, Any]]:
    """One; the device has no part in it."""
    folder = tempfile.TemporaryDirectory(prefix="freesolo-benchmark-")
    atexit.register(folder.cleanup)
    dataset, labels = store(Path(folder.name), sizes)
    truth, results = Path(folder.name, "truth.json"), Path(folder.name, "results.json")
    truth.write_text(json.dumps(ground_truth(dataset)))
    results.write_text(json.dumps(export_coco(labels)["annotations"]))
    yield Case(
        name=f"{sizes.photos} photos, {sizes.predictions} predictions and {sizes.objects} objects each",
        peer_name="pycocotools, JSON",
        ours=partial(our_metrics, dataset, labels),
        peer=partial(pycocotools_numbers, truth, results),
        assert_equal=assert_equal,
        repeats=3,
    )


def our_metrics(dataset: str, labels: str) -> Metrics:
    """As a job has them."""
    from freesolo.cluster import connect
    from freesolo.data.ingest import over_shards

    connect(ResourceSettings())
    return compare(dataset, {"found": labels}, over_shards=over_shards).rows["found"]


def pycocotools_numbers(truth: Path, results: Path) -> dict[str, list[float]]:
    """COCO's twelve numbers of masks and of boxes."""
    numbers = {}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        found = coco.loadRes(str(results))
        for kind in ("segm", "bbox"):
            evaluator = COCOeval(coco, found, kind)
            evaluator.params.useCats = 0
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            numbers[kind] = evaluator.stats.tolist()
    return numbers


def assert_equal(ours: Metrics, peers: dict[str, list[float]]) -> None:
    """The same numbers where both mean the same: pycocotools sorts predictions by the areas of masks, for boxes too."""
    for kind, region in (("segm", ours.segm), ("bbox", ours.bbox)):
        of_all_sizes = [region.ap, region.ap50, region.ap75, region.ar1, region.ar10, region.ar100]
        assert of_all_sizes == [peers[kind][place] for place in (0, 1, 2, 6, 7, 8)]


def store(folder: Path, sizes: Sizes) -> tuple[str, str]:
    """An annotated data set, and a label set of it: each object is found again and again, and nearly."""
    generator = torch.Generator().manual_seed(0)
    photos = folder / "photos"
    photos.mkdir()
    images, annotations = [], []
    for number in range(1, sizes.photos + 1):
        name = f"{number:06d}.png"
        Image.new("L", (WIDTH, HEIGHT)).save(photos / name)
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        masks = ellipses(sizes.objects, HEIGHT, WIDTH, generator, smallest=8, largest=100)
        for rle, box in zip(encode_rle(masks), boxes_xywh(masks).tolist(), strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            annotations.append(annotation | {"segmentation": rle, "bbox": box})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    (photos / "annotations.json").write_text(json.dumps(document))
    dataset, labels = str(folder / "data"), str(folder / "labels")
    manifest = pack(str(photos / "annotations.json"), dataset, samples_per_shard=-(-sizes.photos // sizes.shards))
    begin_label_set(labels, LabelPlan(manifest.digest, dataset, "predictions", {"weights": "none"}, {}, None))
    for shard in manifest.shards:
        records = []
        for sample in read_shard(dataset, shard):
            masks = ellipses(sizes.predictions, HEIGHT, WIDTH, generator, smallest=8, largest=100)
            rles, boxes = encode_rle(masks), boxes_xywh(masks).tolist()
            for place, annotation in enumerate(sample.annotations[: sizes.predictions]):
                rles[place], boxes[place] = annotation["segmentation"], annotation["bbox"]
            scores = torch.rand(len(rles), generator=generator).tolist()
            records.append(
                ImageLabels(
                    *(sample.key, sample.image_id, sample.file_name, WIDTH, HEIGHT, None),
                    instances=tuple(
                        LabelledInstance(0, rle, tuple(box), score, 0, np.zeros(0, np.float16))
                        for rle, box, score in zip(rles, boxes, scores, strict=True)
                    ),
                )
            )
        write_label_file(labels, shard.name, records)
    finish_label_set(labels, manifest)
    return dataset, labels


BENCHMARK = Benchmark(
    name="evaluation",
    inputs=f"annotations and predictions in files, {CORES} cores",
    cases=cases,
    needs=("ray",),
)
