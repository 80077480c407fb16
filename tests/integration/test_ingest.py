"""Streams of a data set on a real Ray cluster: which samples come when, with which labels, and what cannot be read."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from freesolo.comparison import compare
from freesolo.data.collate import collate_crops, collate_photos
from freesolo.data.ingest import StreamBatch, TrainingStream, configure_ray_data, over_shards
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.labels import (
    LabelPlan,
    begin_label_set,
    finish_label_set,
    read_label_manifest,
    read_labels_of,
    write_label_file,
)
from freesolo.data.order import Order, StreamState, advance, worker_spans
from freesolo.data.shards import DatasetManifest, Sample, read_shard, shard_name, write_dataset_manifest, write_shard
from freesolo.data.views import ContrastiveView, SegmentationView, View
from freesolo.errors import JobError, UsageError
from freesolo.ops.mask_storage import Rle
from freesolo.settings import BoundsSettings, SegmentationViewSettings, ViewSettings
from freesolo.types import SegmentationBatch

pytestmark = pytest.mark.usefixtures("ray_cluster", "ray_data")

SIDE = 32
SHARDS = (5, 3, 4)  # samples of each
SAMPLES = sum(SHARDS)
GREY = 20  # times the image's id is its colour
CHANNELS = 4  # of an embedding
WEAK = SegmentationViewSettings(short_sides=(SIDE,), size_divisor=SIDE, flip_probability=0.0)


@pytest.fixture(scope="module")
def ray_data() -> None:
    configure_ray_data()


def photo(image_id: int) -> bytes:
    """Of one grey, which tells the image."""
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (GREY * image_id,) * 3).save(file, "png")
    return file.getvalue()


def key(image_id: int) -> str:
    return f"k{image_id:02d}"


def rle(rows: slice) -> Rle:
    """A mask of whole rows."""
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[rows] = 1
    encoded: Rle = coco_mask.encode(mask)
    return {"size": [SIDE, SIDE], "counts": encoded["counts"].decode()}


ANNOTATED = slice(0, 4)  # rows of every photo's own annotation; no label of the label set covers them
LABELLED = (slice(8, 12), slice(16, 28))
SCORES = (0.75, 0.5)
EMBEDDINGS = np.eye(2, CHANNELS, dtype=np.float16)


def write_dataset(folder: Path, *, unreadable: int | None = None, sizes: tuple[int, ...] = SHARDS) -> DatasetManifest:
    annotation = {
        **{"id": 1, "category_id": 1, "iscrowd": 0, "area": 4 * SIDE, "bbox": [0, 0, SIDE, 4]},
        "segmentation": rle(ANNOTATED),
    }
    shards, first = [], 0
    for index, count in enumerate(sizes):
        samples = [
            Sample(
                key(image_id),
                photo(image_id)[: 20 if image_id == unreadable else None],
                image_id,
                f"{key(image_id)}.png",
                SIDE,
                SIDE,
                (annotation | {"id": image_id + 1, "image_id": image_id},),
            )
            for image_id in range(first, first + count)
        ]
        shards.append(write_shard(str(folder), shard_name(index), samples))
        first += count
    category = {"id": 1, "name": "object"}
    manifest = DatasetManifest(1, tuple(shards), annotated=True, categories=(category,), skipped=())
    write_dataset_manifest(str(folder), manifest)
    return manifest


def write_labels(folder: Path, dataset: Path, manifest: DatasetManifest) -> None:
    """Image i has the first i % 3 of the labelled instances."""
    plan = LabelPlan(manifest.digest, str(dataset), "free-masks", {"weights": "w"}, {}, None)
    begin_label_set(str(folder), plan)
    for shard in manifest.shards:
        write_label_file(str(folder), shard.name, [labels_of(sample) for sample in read_shard(str(dataset), shard)])
    finish_label_set(str(folder), manifest)


def labels_of(sample: Sample) -> ImageLabels:
    instances = [
        LabelledInstance(0, rle(rows), (0.0, float(rows.start), float(SIDE), 1.0), score, 0, embedding)
        for rows, score, embedding in zip(LABELLED, SCORES, EMBEDDINGS, strict=True)
    ]
    return ImageLabels(
        *(sample.key, sample.image_id, sample.file_name, sample.width, sample.height, None),
        tuple(instances[: sample.image_id % 3]),
    )


@dataclass(frozen=True)
class Stored:
    """A data set with its label set, in a folder."""

    dataset: Path
    labels: Path
    manifest: DatasetManifest

    def stream(self, view: View, batch_size: int, *, labelled: bool = True) -> TrainingStream[Any, Any]:
        return TrainingStream(
            dataset_url=str(self.dataset),
            manifest=self.manifest,
            labels=read_labels_of(str(self.labels), self.manifest) if labelled else None,
            view=view,
            collate=collate_crops if isinstance(view, ContrastiveView) else collate_photos,
            order=Order(tuple(shard.samples for shard in self.manifest.shards), seed=3, window_shards=2),
            batch_size=batch_size,
            max_bad_samples=1.0,
        )

    def segmentation_batches(self, *, steps: int, batch_size: int) -> list[StreamBatch[SegmentationBatch]]:
        stream = self.stream(SegmentationView(WEAK, CHANNELS), batch_size)
        return list(stream.batches(StreamState(), steps=steps))


def store(folder: Path, *, unreadable: int | None = None, sizes: tuple[int, ...] = SHARDS) -> Stored:
    manifest = write_dataset(folder / "data", unreadable=unreadable, sizes=sizes)
    write_labels(folder / "labels", folder / "data", manifest)
    return Stored(folder / "data", folder / "labels", manifest)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return store(tmp_path_factory.mktemp("stored"))


def ordered_ids(
    order: Order, state: StreamState, *, steps: int, batch_size: int, worker: int, workers: int
) -> list[int]:
    """The image ids that `data.order` gives a worker: here a sample's place in the data set is its id."""
    starts = np.cumsum([0, *SHARDS])
    ids: list[int] = []
    spans = worker_spans(state, order.samples, steps=steps, batch_size=batch_size, worker=worker, workers=workers)
    for piece in order.pieces(spans):
        members = [starts[shard] + i for shard in piece.window.shards for i in range(SHARDS[shard])]
        ids += [int(members[place]) for place in piece.window.permutation()[piece.start : piece.stop]]
    return ids


def test_each_worker_gets_the_samples_that_the_order_gives_it(stored: Stored) -> None:
    """Two workers, 9 steps of 4: three epochs of 12. Both crops are of the photo that the batch names."""
    stream = stored.stream(ContrastiveView(ViewSettings(size=16)), 4, labelled=False)
    seen: Counter[int] = Counter()
    for worker in range(2):
        batches = list(stream.batches(StreamState(), steps=9, worker=worker, workers=2))
        assert [len(batch.content) for batch in batches] == [2] * 9
        assert all(batch.bad == () for batch in batches)
        ids = [image_id for batch in batches for image_id in batch.content.image_ids]
        assert ids == ordered_ids(stream.order, StreamState(), steps=9, batch_size=4, worker=worker, workers=2)
        for batch in batches:
            greys = torch.tensor([GREY * image_id for image_id in batch.content.image_ids], dtype=torch.uint8)
            expected = greys[:, None, None, None].expand(-1, 3, 16, 16)
            assert torch.equal(batch.content.query, expected)
            assert torch.equal(batch.content.key, expected)
        seen.update(ids)
    assert seen == {image_id: 3 for image_id in range(SAMPLES)}


def test_what_is_left_after_some_steps_comes_as_it_would_have_come(stored: Stored) -> None:
    """The same photos at the same random sizes, turned the same way: augmentation depends on epoch and sample alone."""
    settings = SegmentationViewSettings(short_sides=(32, 48, 64), size_divisor=32)
    stream = stored.stream(SegmentationView(settings, CHANNELS), 4)
    whole = list(stream.batches(StreamState(), steps=7))
    rest = list(stream.batches(advance(StreamState(), 4, SAMPLES, 4, workers=1), steps=3))
    assert {height for batch in whole for height, _ in batch.content.images.sizes.tolist()} == {32, 48, 64}
    for one, other in zip(whole[4:], rest, strict=True):
        assert one.content.image_ids == other.content.image_ids
        assert torch.equal(one.content.images.pixels, other.content.images.pixels)
        assert torch.equal(one.content.instances.masks, other.content.instances.masks)


def test_photos_come_with_their_labels_and_without_their_annotations(stored: Stored) -> None:
    for batch in stored.segmentation_batches(steps=3, batch_size=4):
        instances = batch.content.instances
        for image, image_id in enumerate(batch.content.image_ids):
            found = instances.of_image(image)
            assert len(found) == image_id % 3
            for mask, rows in zip(found.masks, LABELLED, strict=False):
                assert mask[rows].all()
                assert mask.sum() == (rows.stop - rows.start) * SIDE
            assert found.scores.tolist() == list(SCORES[: image_id % 3])
            assert torch.equal(found.embeddings, torch.from_numpy(EMBEDDINGS[: image_id % 3].astype(np.float32)))


def test_without_a_label_set_photos_come_with_their_annotations(stored: Stored) -> None:
    stream = stored.stream(SegmentationView(WEAK, CHANNELS), 4, labelled=False)
    (batch,) = stream.batches(StreamState(), steps=1)
    assert len(batch.content.instances) == 4
    assert batch.content.instances.masks[:, ANNOTATED].all()
    assert not batch.content.instances.masks[:, ANNOTATED.stop :].any()


def test_a_batch_may_be_larger_than_the_data_set(stored: Stored) -> None:
    (batch,) = stored.segmentation_batches(steps=1, batch_size=30)
    seen = Counter(batch.content.image_ids)
    assert set(seen) == set(range(SAMPLES))
    assert sorted(seen.values()) == [2] * 6 + [3] * 6


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def cut_in_the_fourth_photo(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: data.index(b"k03.png") + 600])


def turn_a_bit(file: Path) -> None:
    """In the last photo's pixels, which decode all the same."""
    data = bytearray(file.read_bytes())
    data[data.rindex(b"IDAT") + 9] ^= 1
    file.write_bytes(data)


def drop_the_last_record(file: Path) -> None:
    pq.write_table(pq.read_table(file)[:-1], file)


def reshape_the_last_record(file: Path) -> None:
    """As many pixels, otherwise arranged: the masks fit the record, and not the photo."""
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[-1] |= {"width": 2 * SIDE, "height": SIDE // 2}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)


def rename_the_last_record(file: Path) -> None:
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[-1] |= {"key": "k99"}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)


def accept(labels: Path) -> None:
    """Have the label set's manifest say what its first file has become."""
    manifest = read_label_manifest(str(labels))
    data = (labels / "shard-000000.parquet").read_bytes()
    first = replace(manifest.files[0], bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (labels / "manifest.json").write_text(replace(manifest, files=(first, *manifest.files[1:])).to_json())


@dataclass(frozen=True)
class Fault:
    """Something wrong with shard 0, which has images 0 to 4.

    Attributes:
        apply: Does it to the shard's file, or its labels'.
        labels: Whether to the labels'.
        lost: Images that cannot be used.
        reason: Why, in the words that a person is told.
        accepted: Whether the label set's manifest was made after it.
    """

    apply: Callable[[Path], object]
    labels: bool
    lost: tuple[int, ...]
    reason: str
    accepted: bool = False


FAULTS = {
    "shard cut short": Fault(
        cut_in_the_fourth_photo, False, (3, 4), "shard-000000.tar: 3 samples where the manifest says 5: truncated"
    ),
    "shard gone": Fault(Path.unlink, False, (0, 1, 2, 3, 4), "shard-000000.tar: the shard is missing"),
    "shard altered": Fault(turn_a_bit, False, (0, 1, 2, 3, 4), "shard-000000.tar: its sha256 is not the manifest's"),
    "labels gone": Fault(Path.unlink, True, (0, 1, 2, 3, 4), "shard-000000.parquet: the label file is missing"),
    "labels cut short": Fault(cut, True, (0, 1, 2, 3, 4), "shard-000000.parquet: "),
    "labels altered": Fault(
        drop_the_last_record, True, (0, 1, 2, 3, 4), "shard-000000.parquet: its sha256 is not the manifest's"
    ),
    "a record of another size": Fault(
        reshape_the_last_record, True, (4,), "64 x 16 pixels in shard-000000", accepted=True
    ),
    "a record gone": Fault(drop_the_last_record, True, (4,), "no record in shard-000000", accepted=True),
    "a record of an unknown image": Fault(
        *(rename_the_last_record, True, (0, 1, 2, 3, 4)),
        "labels of 1 unknown images, first: k99",
        accepted=True,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_read_is_named_and_replaced(name: str, tmp_path: Path) -> None:
    fault, whole = FAULTS[name], store(tmp_path)
    fault.apply(whole.labels / "shard-000000.parquet" if fault.labels else whole.dataset / "shard-000000.tar")
    if fault.accepted:
        accept(whole.labels)
    (batch,) = whole.segmentation_batches(steps=1, batch_size=SAMPLES)
    assert len(batch.bad) == len(fault.lost)
    assert all(fault.reason in bad.reason for bad in batch.bad), batch.bad
    assert {bad.key for bad in batch.bad} <= {"shard-000000", *map(key, fault.lost)}
    assert set(batch.content.image_ids) == set(range(SAMPLES)) - set(fault.lost)
    assert len(batch.content) == SAMPLES, "copies of good ones fill the batch"
    assert not batch.content.instances.masks[:, ANNOTATED].any(), "annotations stood in for labels"


def test_an_unreadable_photo_is_named_and_replaced(tmp_path: Path) -> None:
    (batch,) = store(tmp_path, unreadable=7).segmentation_batches(steps=1, batch_size=SAMPLES)
    (bad,) = batch.bad
    assert bad.key == key(7)
    assert set(batch.content.image_ids) == set(range(SAMPLES)) - {7}
    assert len(batch.content) == SAMPLES


def test_samples_over_the_bounds_are_bad_ones(tmp_path: Path) -> None:
    whole = store(tmp_path)
    bounds = BoundsSettings(max_pixels=SIDE * SIDE - 1)
    stream = replace(whole.stream(SegmentationView(WEAK, CHANNELS), SAMPLES), bounds=bounds)
    told = r"first: k\d\d \(32 x 32 pixels are more than bounds\.max_pixels=1023 allows"
    with pytest.raises(JobError, match=f"epoch 0: unusable samples, nothing else; {told}"):
        list(stream.batches(StreamState(), steps=1))


def test_labels_of_other_channels_than_the_models_are_named(tmp_path: Path) -> None:
    stream = store(tmp_path).stream(SegmentationView(WEAK, CHANNELS + 1), SAMPLES)
    (batch,) = stream.batches(StreamState(), steps=1)
    assert {bad.reason for bad in batch.bad} == {f"its labels' embeddings do not have {CHANNELS + 1} channels"}


def test_stand_ins_are_the_same_whoever_reads_and_wherever_reading_begins(tmp_path: Path) -> None:
    """A shard of five is lost, no other is mixed with it, and a batch of one worker has one sample."""
    whole = store(tmp_path)
    (whole.dataset / "shard-000000.tar").unlink()
    view = ContrastiveView(ViewSettings(size=16))
    stream = replace(whole.stream(view, 2, labelled=False), order=Order(SHARDS, seed=3))
    steps = 2 * SAMPLES // 2

    def seen(start: int, steps: int, worker: int, workers: int) -> list[tuple[tuple[int, ...], bytes, tuple[str, ...]]]:
        """Of each batch: which samples, their crops' pixels, and which were bad."""
        state = advance(StreamState(), start, SAMPLES, 2, workers)
        batches = stream.batches(state, steps=steps, worker=worker, workers=workers)
        return [
            (batch.content.image_ids, batch.content.query.numpy().tobytes(), tuple(bad.key for bad in batch.bad))
            for batch in batches
        ]

    alone = [seen(0, steps, worker, 2) for worker in range(2)]
    bad = [keys for batches in alone for _, _, keys in batches]
    assert Counter(bad) == {(): 2 * (SAMPLES - 5), ("shard-000000",): 2 * 5}
    for worker in range(2):
        lost = [number for number, (_, _, keys) in enumerate(alone[worker]) if keys]
        resumed = [seen(start, steps - start, worker, 2) for start in lost[:2]]
        assert resumed == [alone[worker][start:] for start in lost[:2]]


def test_a_run_goes_on_inside_the_second_of_two_neighbouring_lost_shards(tmp_path: Path) -> None:
    """Of three shards of 40 in windows of one the last two of the epoch are lost; batches are of four."""
    whole = store(tmp_path, sizes=(40, 40, 40))
    view = ContrastiveView(ViewSettings(size=16))
    stream = whole.stream(view, 4, labelled=False)
    stream = replace(stream, order=replace(stream.order, window_shards=1), max_bad_samples=2 / 3)
    for window in stream.order.windows(epoch=0)[1:]:
        (whole.dataset / f"{shard_name(window.shards[0])}.tar").unlink()
    uninterrupted = list(stream.batches(StreamState(), steps=30))
    assert [len(batch.bad) for batch in uninterrupted] == [0] * 10 + [4] * 20
    for step in (25, 29):
        resumed = list(stream.batches(advance(StreamState(), step, 120, 4, workers=1), steps=30 - step))
        for one, other in zip(uninterrupted[step:], resumed, strict=True):
            assert one.content.image_ids == other.content.image_ids
            assert torch.equal(one.content.query, other.content.query)


def test_where_no_sample_is_usable_the_stream_stops(tmp_path: Path) -> None:
    whole = store(tmp_path)
    for shard in whole.manifest.shards:
        (whole.dataset / f"{shard.name}.tar").unlink()
    with pytest.raises(
        JobError, match=rf"epoch 0: unusable samples, nothing else; first: .*{whole.dataset}/\S+: the shard is miss"
    ):
        whole.segmentation_batches(steps=1, batch_size=4)


def test_evaluation_by_the_clusters_tasks_is_that_of_one_process(stored: Stored) -> None:
    assert len(stored.manifest.shards) > 1
    sets = {"labels": str(stored.labels)}
    rows = compare(str(stored.dataset), sets, over_shards=over_shards).rows
    assert rows == compare(str(stored.dataset), sets).rows
    assert rows["labels"].predictions == sum(number % 3 for number in range(SAMPLES))


def test_what_is_wrong_with_a_shard_is_said_as_it_is(stored: Stored) -> None:
    with pytest.raises(UsageError, match=r"^shard 2 is odd$"):
        over_shards(refuse_the_second, [1, 2])
    with pytest.raises(UsageError, match=r"^shard 2 is odd$"):
        over_shards(refuse_the_second, [2])
    assert over_shards(refuse_the_second, [5, 3, 4]) == [5, 3, 4]
    assert over_shards(refuse_the_second, []) == []


def refuse_the_second(number: int) -> int:
    if number == 2:
        raise UsageError("shard 2 is odd")
    return number
