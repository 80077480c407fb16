"""Batches are a function of the shard alone, and lose no photo whatever is wrong with it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from freesolo.data.label_records import ImageLabels
from freesolo.data.resizing import resize_photo
from freesolo.data.shards import Sample, ShardError, ShardInfo, shard_name, write_shard
from freesolo.inference.batches import (
    MAX_WAITING_BATCHES,
    BatchPlan,
    EncodedBatch,
    EncodedPhoto,
    Entry,
    decode_batch,
    group_by_extent,
    read_batches,
)
from freesolo.inference.labellers import labelled_instances
from freesolo.inference.pipeline import plan_settings
from freesolo.inference.pool import DECODE_CPUS, READ_CPUS, decoder_count, reader_count
from freesolo.ops.masks import boxes_xywh, decode_rle, encode_rle
from freesolo.settings import BoundsSettings, ExtractSettings, PredictSettings, ResourceSettings

PLAN = BatchPlan(short_side=32, long_side_max=64, batch_size=3)


def photo(index: int, width: int, height: int, data: bytes = b"") -> EncodedPhoto:
    labels = ImageLabels(f"k{index}", index, f"{index}.png", width, height, error=None, instances=())
    return EncodedPhoto(Entry(index, labels), data)


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def indices(groups: object) -> list[list[int]]:
    return [[each.entry.index for each in group] for group in groups]


def test_neighbours_of_one_resized_size_share_a_batch() -> None:
    # 64 x 32 and 128 x 64 both become 64 x 32; 32 x 64 becomes itself.
    photos = [photo(0, 64, 32), photo(1, 32, 64), photo(2, 128, 64), photo(3, 64, 32), photo(4, 64, 32)]

    assert indices(group_by_extent(photos, PLAN)) == [[0, 2, 3], [1], [4]]


def test_no_photos_make_no_batches() -> None:
    assert list(group_by_extent([], PLAN)) == []


def test_a_divisor_puts_almost_equal_sizes_together() -> None:
    photos = [photo(0, 64, 32), photo(1, 60, 32), photo(2, 70, 32)]

    assert indices(group_by_extent(photos, PLAN)) == [[0], [1], [2]]
    # Widths 64, 60 and, of 70 x 32 limited to 64, 64 x 29: all within 64 x 32.
    assert indices(group_by_extent(photos, replace(PLAN, size_divisor=32))) == [[0, 1, 2]]


@settings(max_examples=60)
@given(
    sides=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=80),
    batch_size=st.integers(1, 5),
    divisor=st.sampled_from([1, 32]),
)
def test_every_photo_is_in_exactly_one_batch_of_its_size(
    sides: list[tuple[int, int]], batch_size: int, divisor: int
) -> None:
    plan = BatchPlan(32, 64, batch_size, divisor)
    groups = list(group_by_extent((photo(i, *side) for i, side in enumerate(sides)), plan))

    assert sorted(index for group in indices(groups) for index in group) == list(range(len(sides)))
    for group in groups:
        assert 1 <= len(group) <= batch_size
        assert len({plan.extent(each.entry.labels) for each in group}) == 1
        assert [each.entry.index for each in group] == sorted(each.entry.index for each in group)


def test_photos_of_rare_sizes_do_not_pile_up() -> None:
    taken = 0

    def many_sizes() -> object:
        nonlocal taken
        for index in range(1000):
            taken += 1
            yield photo(index, 32 + index, 32)

    plan = BatchPlan(32, 10_000, batch_size=2)
    given_out = 0
    for group in group_by_extent(many_sizes(), plan):
        given_out += len(group)
        if taken < 1000:
            assert taken - given_out < MAX_WAITING_BATCHES * 2
    assert given_out == 1000


def test_the_fullest_group_goes_first_when_too_many_wait() -> None:
    plan = BatchPlan(32, 10_000, batch_size=3)
    rare = [photo(i, 100 + i, 32) for i in range(MAX_WAITING_BATCHES * 3 - 2)]
    pair = [photo(500, 64, 32), photo(501, 64, 32)]

    first = next(iter(group_by_extent([*rare, *pair], plan)))

    assert [each.entry.index for each in first] == [500, 501]


def test_a_batch_is_decoded_resized_and_padded() -> None:
    data = png(10, 20)
    plan = BatchPlan(short_side=5, long_side_max=100, batch_size=2, size_divisor=8)

    decoded = decode_batch(EncodedBatch("shard-000000", (photo(7, 10, 20, data),)), plan)

    with Image.open(io.BytesIO(data)) as image:
        expected = resize_photo(np.asarray(image), 10, 5)
    assert decoded.pixels.shape == (1, 16, 8, 3)
    np.testing.assert_array_equal(decoded.pixels[0, :10, :5], expected)
    assert decoded.pixels[0, 10:].max() == 0
    assert decoded.pixels[0, :, 5:].max() == 0
    assert decoded.sizes.tolist() == [[10, 5]]
    assert [entry.index for entry in decoded.readable] == [7]


def test_a_photo_that_is_not_of_its_recorded_size_counts_as_unreadable() -> None:
    decoded = decode_batch(EncodedBatch("shard-000000", (photo(0, 16, 20, png(20, 16)),)), PLAN)

    assert decoded.readable == ()
    assert "16 x 20" in str(decoded.unreadable[0].labels.error)


def test_an_unreadable_photo_is_told_apart_and_moves_no_other() -> None:
    good, bad = photo(0, 16, 16, png(16, 16)), photo(1, 16, 16, png(16, 16)[:60])

    decoded = decode_batch(EncodedBatch("shard-000000", (bad, good)), PLAN)

    assert [entry.index for entry in decoded.readable] == [0]
    assert len(decoded.pixels) == 1
    [entry] = decoded.unreadable
    assert entry.index == 1
    assert entry.labels.error
    assert entry.labels.key == "k1"


def test_a_batch_without_a_readable_photo_is_empty_but_accounts_for_all() -> None:
    lost = Entry(2, ImageLabels("k2", 2, "2.png", 0, 0, error="lost", instances=()))

    decoded = decode_batch(EncodedBatch("shard-000000", (photo(0, 16, 16, b"no photo"),), (lost,)), PLAN)

    assert decoded.pixels.shape == (0, 0, 0, 3)
    assert decoded.sizes.shape == (0, 2)
    assert sorted(entry.index for entry in decoded.unreadable) == [0, 2]


def write_photos(folder: Path, count: int) -> ShardInfo:
    samples = (Sample(f"k{i}", png(16, 8 + i % 2, seed=i), i, f"{i}.png", 16, 8 + i % 2) for i in range(count))
    return write_shard(str(folder), shard_name(3), samples)


def accounted(batches: list[EncodedBatch]) -> list[int]:
    return sorted(entry.index for batch in batches for entry in (*(each.entry for each in batch.photos), *batch.lost))


def test_a_shard_is_read_whole(tmp_path: Path) -> None:
    shard = write_photos(tmp_path, 7)

    batches = list(read_batches(str(tmp_path), shard, PLAN))

    assert accounted(batches) == list(range(7))
    assert {batch.shard for batch in batches} == {"shard-000003"}
    assert not any(batch.lost for batch in batches)


def test_a_sample_over_the_bounds_is_an_unreadable_one(tmp_path: Path) -> None:
    shard = write_photos(tmp_path, 4)
    (batch,) = read_batches(str(tmp_path), shard, BatchPlan(8, 16, 8, 8, bounds=BoundsSettings(max_pixels=16 * 8)))
    decoded = decode_batch(batch, BatchPlan(8, 16, 8, 8))
    assert [entry.index for entry in decoded.readable] == [0, 2]
    assert [(entry.index, entry.labels.key) for entry in decoded.unreadable] == [(1, "k1"), (3, "k3")]
    assert str(decoded.unreadable[0].labels.error).startswith(
        "16 x 9 pixels are more than bounds.max_pixels=128 allows"
    )


def test_an_empty_shard_has_no_batches(tmp_path: Path) -> None:
    assert list(read_batches(str(tmp_path), write_photos(tmp_path, 0), PLAN)) == []


def test_samples_that_a_truncated_shard_has_lost_are_accounted_for(tmp_path: Path) -> None:
    shard = write_photos(tmp_path, 20)
    file = tmp_path / f"{shard.name}.tar"
    file.write_bytes(file.read_bytes()[: shard.bytes // 2])

    batches = list(read_batches(str(tmp_path), shard, PLAN))

    assert accounted(batches) == list(range(20))
    lost = [entry.labels for batch in batches for entry in batch.lost]
    assert 5 <= len(lost) <= 15
    assert all("truncated" in str(labels.error) for labels in lost)
    assert len({labels.key for labels in lost}) == len({labels.image_id for labels in lost}) == len(lost)
    assert all(labels.image_id < 0 for labels in lost)


def test_all_samples_of_a_missing_shard_are_lost(tmp_path: Path) -> None:
    shard = write_photos(tmp_path, 4)
    (tmp_path / f"{shard.name}.tar").unlink()

    batches = list(read_batches(str(tmp_path), shard, PLAN))

    assert [len(batch.lost) for batch in batches] == [4]


def test_an_altered_shard_is_refused_before_its_last_batch(tmp_path: Path) -> None:
    shard = write_photos(tmp_path, 6)  # two full batches of 3, nothing left over
    read = []

    def read_all() -> None:
        for batch in read_batches(str(tmp_path), replace(shard, sha256="0" * 64), PLAN):
            read.append(batch)

    with pytest.raises(ShardError, match="sha256"):
        read_all()
    assert len(accounted(read)) < 6


def test_a_shard_with_more_samples_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    shard = write_photos(tmp_path, 6)

    with pytest.raises(ShardError, match="more than the 5 samples"):
        list(read_batches(str(tmp_path), replace(shard, samples=5), PLAN))


def test_instances_are_stored_with_boxes_and_embeddings() -> None:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 1, 2] = True  # one pixel
    masks[1, 2:5, 3:8] = True
    embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8]])

    first, second = labelled_instances(
        encode_rle(masks), boxes_xywh(masks), torch.tensor([0.75, 0.5]), torch.tensor([0, 4]), embeddings
    )

    assert first.bbox_xywh == (2.0, 1.0, 1.0, 1.0)
    assert second.bbox_xywh == (3.0, 2.0, 5.0, 3.0)
    assert (first.score, second.category_id) == (0.75, 4)
    assert first.rle["size"] == [6, 8]
    assert decode_rle([first.rle, second.rle], 6, 8).equal(masks)
    assert second.embedding.dtype == np.float16
    np.testing.assert_array_equal(second.embedding, np.array([0.6, 0.8], np.float16))


def test_no_instances_are_stored_as_none() -> None:
    none = torch.zeros(0, dtype=torch.int64)

    assert labelled_instances([], torch.zeros(0, 4), torch.zeros(0), none, torch.zeros(0, 128)) == ()


@pytest.mark.parametrize(("workers", "spare"), [(1, 1.0), (4, 1.0), (40, 2.0), (3, 100.0), (1, 1.5)])
def test_readers_always_leave_a_decoder_its_cpu(workers: int, spare: float) -> None:
    readers = reader_count(workers, spare)

    assert 1 <= readers <= 1 + workers // 2
    assert readers * READ_CPUS + DECODE_CPUS <= spare + 1e-6


@pytest.mark.parametrize(
    ("resources", "readers", "spare", "decoders"),
    [
        ({"workers": 3}, 2, 8.0, 3),  # on CPUs, no more than actors
        ({"workers": 3, "data_cpus": 2}, 2, 2.0, 2),
        ({"workers": 3, "data_cpus": 1}, 1, 1.0, 1),
        ({"workers": 2, "gpus_per_worker": 1.0}, 2, 30.0, None),  # on GPUs, as many as there can be
        ({"workers": 2, "gpus_per_worker": 1.0, "data_cpus": 10}, 2, 10.0, 10),  # 0.2 for the readers, 0.9 for each
        ({"workers": 2, "gpus_per_worker": 1.0, "data_cpus": 1}, 1, 1.0, 1),
    ],
)
def test_decoders_use_no_more_cpus_than_reading_and_decoding_may(
    resources: dict[str, float | int], readers: int, spare: float, decoders: int | None
) -> None:
    assert decoder_count(ResourceSettings.model_validate(resources), readers, spare) == decoders


def test_what_a_label_set_is_made_with_leaves_out_what_does_not_change_it() -> None:
    strict, lenient = ExtractSettings(max_bad_samples=0.0), ExtractSettings(max_bad_samples=0.5)

    assert plan_settings(strict, ResourceSettings()) == plan_settings(lenient, ResourceSettings(workers=4))
    assert plan_settings(strict, ResourceSettings(gpus_per_worker=1)) != plan_settings(strict, ResourceSettings())
    assert plan_settings(PredictSettings(batch_size=2), ResourceSettings())["batch_size"] == 2
