"""Label sets: every image accounted for, whole or not there, resumable, reproducible, and only for their data set."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask

from freesolo.data import files
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.labels import (
    LabelFile,
    LabelFileError,
    LabelManifest,
    LabelPlan,
    begin_label_set,
    check_labels_match,
    finish_label_set,
    finished_label_files,
    number_instances,
    read_label_file,
    read_label_manifest,
    write_label_file,
)
from freesolo.data.shards import DatasetManifest, ShardInfo, shard_name
from freesolo.errors import JobError, UsageError

DATASET = DatasetManifest(1, tuple(ShardInfo(shard_name(i), 3, 10, 64 * f"{i}") for i in range(2)), False, (), ())
PLAN = LabelPlan(
    dataset_digest=DATASET.digest,
    dataset_url="s3://photos/set",
    kind="free-masks",
    model={"weights": "models:/densecl@champion", "sha256": "ab", "version": 3},
    settings={"free_mask": {"min_maskness": 0.7, "query_scales": (1.0, 0.5)}, "batch_size": 8},
    parent=None,
)


def counts(seed: int) -> str:
    """A mask of 6 x 8 pixels, another for each seed."""
    pixels = np.array([seed >> bit & 1 for bit in range(48)], np.uint8).reshape(6, 8)
    return coco_mask.encode(np.asfortranarray(pixels))["counts"].decode()


def instance(seed: int, channels: int = 4) -> LabelledInstance:
    random = np.random.default_rng(seed)
    return LabelledInstance(
        mask_id=0,
        rle={"size": [6, 8], "counts": counts(seed)},
        bbox_xywh=(0.5, 1.0, float(seed), 2.25),
        score=float(random.random()),
        category_id=seed % 2,
        embedding=random.standard_normal(channels).astype(np.float16),
    )


def labels(index: int, instances: int, *, error: str | None = None, channels: int = 4) -> ImageLabels:
    found = tuple(instance(100 * index + i, channels) for i in range(instances))
    return ImageLabels(f"{index:012d}", index, f"été/{index}.jpg", 8, 6, error, found)


def records(first: int = 0) -> list[ImageLabels]:
    """A shard of three: two objects, none, and an unreadable image."""
    return [labels(first, 2), labels(first + 1, 0), labels(first + 2, 0, error="truncated JPEG")]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "labels")


def described(url: str, name: str = "shard-000000") -> LabelFile:
    """A label file as a manifest that was made of it as it is now would have it."""
    data = Path(url.removeprefix("file://"), f"{name}.parquet").read_bytes()
    return LabelFile(name, 0, 0, 0, len(data), hashlib.sha256(data).hexdigest())


def whole(url: str) -> LabelManifest:
    begin_label_set(url, PLAN)
    for i, shard in enumerate(DATASET.shards):
        write_label_file(url, shard.name, records(10 * i))
    return finish_label_set(url, DATASET)


@pytest.mark.parametrize("place", ["file", "memory"])
def test_labels_come_back_as_they_went_in(place: str, tmp_path: Path) -> None:
    url = {"file": f"file://{tmp_path}/l", "memory": "memory://labels/round-trip"}[place]
    read = read_label_file(url, write_label_file(url, "shard-000000", records()))
    assert read == number_instances("shard-000000", records())
    first, original = read[0].instances[0], records()[0].instances[0]
    assert first.embedding.dtype == np.float16
    np.testing.assert_array_equal(first.embedding, original.embedding)
    assert first.rle == {"size": [6, 8], "counts": counts(0)}
    assert (first.bbox_xywh, first.score, first.category_id) == ((0.5, 1.0, 0.0, 2.25), original.score, 0)
    assert read[1].instances == ()
    assert read[2].error == "truncated JPEG"


def test_a_difference_anywhere_is_a_difference() -> None:
    one = instance(1)
    assert one == instance(1)
    for changed in (
        replace(one, mask_id=5),
        replace(one, rle={"size": [6, 8], "counts": "other"}),
        replace(one, rle={"size": [8, 6], "counts": one.rle["counts"]}),
        replace(one, bbox_xywh=(0.0, 0.0, 0.0, 0.0)),
        replace(one, score=0.123),
        replace(one, category_id=7),
        replace(one, embedding=one.embedding + np.float16(1)),
    ):
        assert changed != one
    assert replace(one, rle={"size": (6, 8), "counts": counts(1).encode()}) == one
    assert one != "something else"


@pytest.mark.parametrize("channels", [0, 128])
def test_embeddings_of_any_width(url: str, channels: int) -> None:
    file = write_label_file(url, "shard-000000", [labels(0, 3, channels=channels), labels(1, 0)])
    read = read_label_file(url, file)
    assert [each.embedding.shape for each in read[0].instances] == [(channels,)] * 3
    assert read[0].instances[2].embedding.tobytes() == instance(2, channels).embedding.tobytes()


def test_a_shard_in_which_nothing_was_found(url: str) -> None:
    file = write_label_file(url, "shard-000000", [labels(0, 0), labels(1, 0)])
    assert (file.images, file.instances, file.unreadable) == (2, 0, 0)
    assert [record.instances for record in read_label_file(url, file)] == [(), ()]


def test_a_shard_without_images(url: str) -> None:
    file = write_label_file(url, "shard-000000", [])
    assert file.images == 0
    assert read_label_file(url, file) == []


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_label_file(str(tmp_path / "a"), "shard-000001", records())
    assert write_label_file(str(tmp_path / "b"), "shard-000001", iter(records())) == first
    data = (tmp_path / "a" / "shard-000001.parquet").read_bytes()
    assert first == LabelFile("shard-000001", 3, 2, 1, len(data), hashlib.sha256(data).hexdigest())


def test_mask_ids_are_unique_and_tell_their_shard(url: str) -> None:
    files = [write_label_file(url, shard_name(i), [labels(0, 2), labels(1, 0), labels(2, 3)]) for i in range(2)]
    ids = [[each.mask_id for record in read_label_file(url, file) for each in record.instances] for file in files]
    assert ids[0] == [1, 2, 3, 4, 5]
    assert ids[1] == [10_000_001, 10_000_002, 10_000_003, 10_000_004, 10_000_005]


def test_other_tools_read_the_file(url: str) -> None:
    write_label_file(url, "shard-000000", records())
    rows = pq.read_table(Path(url, "shard-000000.parquet")).to_pylist()
    assert rows[0]["instances"][1]["counts"] == counts(1)
    assert rows[0]["instances"][1]["bbox_xywh"] == [0.5, 1.0, 1.0, 2.25]
    assert rows[2]["error"] == "truncated JPEG"


def test_an_image_twice_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="2 records have 1 different keys"):
        write_label_file(url, "shard-000000", [labels(0, 1), labels(0, 1)])
    assert files.list_files(url) == []


def test_an_rle_of_another_size_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"size \[6, 8\] in an image of height and width \[6, 9\]"):
        write_label_file(url, "shard-000000", [replace(labels(0, 1), width=9)])


def test_a_whole_label_set(url: str) -> None:
    manifest = whole(url)
    assert read_label_manifest(url) == manifest
    assert (manifest.images, manifest.instances, manifest.unreadable) == (6, 4, 2)
    assert manifest.plan.kind == "free-masks"
    assert manifest.plan.settings["free_mask"]["query_scales"] == [1.0, 0.5]
    raw = json.loads(Path(url, "manifest.json").read_text(encoding="utf-8"))
    assert raw["totals"] == {"images": 6, "instances": 4, "unreadable": 2}
    check_labels_match(manifest, DATASET)


def test_digest_follows_content_and_plan(url: str) -> None:
    manifest = whole(url)
    assert read_label_manifest(url).digest == manifest.digest
    assert replace(manifest, plan=replace(PLAN, parent=64 * "b")).digest != manifest.digest
    assert replace(manifest, files=manifest.files[:1]).digest != manifest.digest


def test_labels_of_another_data_set_are_refused(url: str) -> None:
    other, manifest = replace(DATASET, annotated=True), whole(url)
    with pytest.raises(UsageError, match=r"made for another data set \(s3://photos/set"):
        check_labels_match(manifest, other)
    reordered = replace(manifest, files=manifest.files[::-1])
    with pytest.raises(UsageError, match="a damaged manifest: its files are not those of the data set's shards"):
        check_labels_match(reordered, DATASET)
    with pytest.raises(UsageError, match="made for another data set"):
        finish_label_set(url, other)


def test_a_half_written_label_set_is_not_there(url: str) -> None:
    with pytest.raises(UsageError, match="no label set there"):
        read_label_manifest(url)
    begin_label_set(url, PLAN)
    for shard in DATASET.shards:
        write_label_file(url, shard.name, records())
        with pytest.raises(UsageError, match="begun and not finished; run its job again"):
            read_label_manifest(url)


def test_a_killed_job_goes_on_where_it_was(url: str, tmp_path: Path) -> None:
    begin_label_set(url, PLAN)
    first = write_label_file(url, "shard-000000", records(0))
    Path(url, ".shard-000001.parquet.99-ab.part").write_bytes(b"half")  # what a kill in mid-write leaves

    begin_label_set(url, PLAN)
    finished = finished_label_files(url, DATASET)
    assert finished == {"shard-000000": first}
    second = write_label_file(url, "shard-000001", records(10))
    resumed = finish_label_set(url, DATASET, written=[*finished.values(), second])
    assert resumed == whole(str(tmp_path / "never killed"))
    assert resumed == read_label_manifest(url)


def test_finishing_twice_changes_nothing(url: str) -> None:
    manifest = whole(url)
    before = Path(url, "manifest.json").read_bytes()
    assert finish_label_set(url, DATASET) == manifest
    assert Path(url, "manifest.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "fewer", "something else"])
def test_what_is_not_whole_is_made_again(url: str, damage: str) -> None:
    begin_label_set(url, PLAN)
    write_label_file(url, "shard-000000", records(0))
    file = write_label_file(url, "shard-000001", records(10))
    path = Path(url, "shard-000001.parquet")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "altered":
        at = 60  # within the first column's page
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif damage == "fewer":
        write_label_file(url, "shard-000001", records(10)[:2])
    else:
        path.write_bytes(b"not a parquet file")
    assert set(finished_label_files(url, DATASET)) == {"shard-000000"}
    with pytest.raises(JobError, match="1 label files are not whole, first: shard-000001"):
        finish_label_set(url, DATASET)
    if damage in ("missing", "truncated", "fewer"):
        with pytest.raises(JobError, match="shard-000001 is missing or damaged"):
            finish_label_set(url, DATASET, written=[file])
    with pytest.raises(UsageError, match="not finished"):
        read_label_manifest(url)


def test_a_label_file_that_is_missing_or_damaged_is_named(url: str) -> None:
    path = Path(url, "shard-000000.parquet")
    file = write_label_file(url, "shard-000000", records())
    path.unlink()
    with pytest.raises(LabelFileError, match=r"shard-000000\.parquet: the label file is missing"):
        read_label_file(url, file)
    write_label_file(url, "shard-000000", records(10))
    with pytest.raises(LabelFileError, match=r"shard-000000\.parquet: its sha256 is not the manifest's: altered since"):
        read_label_file(url, file)
    path.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(LabelFileError, match=r"shard-000000\.parquet: a damaged label file"):
        read_label_file(url, described(url))
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(LabelFileError, match="not a label file"):
        read_label_file(url, described(url))


def test_another_plan_at_the_same_url_is_refused_with_what_differs(url: str) -> None:
    begin_label_set(url, PLAN)
    settings = {"free_mask": {"min_maskness": 0.6, "query_scales": (1.0, 0.5)}, "batch_size": 8, "new": 1}
    with pytest.raises(UsageError) as caught:
        begin_label_set(url, replace(PLAN, settings=settings, parent="cd"))
    message = str(caught.value)
    assert "settings.free_mask.min_maskness: 0.7, now 0.6" in message
    assert "settings.new: None, now 1" in message
    assert "parent: None, now 'cd'" in message
    assert "batch_size" not in message
    assert "choose another URL" in message


def test_the_same_data_set_under_another_url_is_the_same_plan(url: str) -> None:
    begin_label_set(url, PLAN)
    begin_label_set(url, replace(PLAN, dataset_url="s3://mirror/set"))
    assert whole(url).plan.dataset_url == "s3://photos/set"


def test_a_data_set_is_not_overwritten_with_labels(url: str) -> None:
    files.write_atomic(files.join(url, "manifest.json"), DATASET.to_json().encode())
    with pytest.raises(UsageError, match="something else already"):
        begin_label_set(url, PLAN)
    with pytest.raises(UsageError, match=r"not a freesolo\.labels but freesolo\.dataset"):
        read_label_manifest(url)


def test_a_newer_format_is_refused(url: str) -> None:
    whole(url)
    for name in ("manifest.json", "plan.json"):
        path = Path(url, name)
        path.write_text(path.read_text(encoding="utf-8").replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UsageError, match=r"manifest\.json: format version 9 was made by a newer freesolo: upgrade"):
        read_label_manifest(url)
    with pytest.raises(UsageError, match=r"plan\.json: format version 9 was made by a newer freesolo"):
        begin_label_set(url, PLAN)


def test_a_label_set_that_was_not_begun_cannot_be_finished(url: str) -> None:
    with pytest.raises(UsageError, match="no label set was begun there"):
        finish_label_set(url, DATASET)


# --- label files of bad actors --------------------------------------------------------------------------------------


def rows(**changes: object) -> dict[str, object]:
    """One image with one instance, as a row of the parquet; a change of an instance's field begins with `i_`."""
    found = {
        "mask_id": 1,
        "counts": counts(5),
        "bbox_xywh": [0.0, 0.0, 2.0, 2.0],
        "score": 0.5,
        "category_id": 0,
        "embedding": [np.float16(1)],
    }
    found |= {name.removeprefix("i_"): value for name, value in changes.items() if name.startswith("i_")}
    row = {
        "key": "1",
        "image_id": 1,
        "file_name": "1.jpg",
        "width": 8,
        "height": 6,
        "error": None,
        "instances": [found],
    }
    return row | {name: value for name, value in changes.items() if not name.startswith("i_")}


def read_rows(url: str, *images: dict[str, object]) -> list[ImageLabels]:
    write_label_file(url, "shard-000000", records())
    path = Path(url, "shard-000000.parquet")
    pq.write_table(pa.Table.from_pylist(list(images), schema=pq.read_schema(path)), path)
    return read_label_file(url, described(url))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"key": None}, "image None has no key"),
        ({"width": None}, "image 1 has no width"),
        ({"width": 0}, "image 1 is 0 x 6 pixels"),
        ({"width": -8}, "image 1 is -8 x 6 pixels"),
        ({"width": 2**31 - 1, "height": 2**31 - 1}, "image 1 is 2147483647 x 2147483647 pixels"),
        ({"width": 9}, "run-length encoding 0 does not add up to the pixels"),
        ({"error": "unreadable"}, "image 1 has 1 instances: unreadable"),
        ({"instances": None}, "a value of an instance is missing"),
        ({"instances": [None]}, "a value of an instance is missing"),
        ({"instances": rows()["instances"] * 1001}, "image 1 has 1001 instances: more than 1000"),
        ({"i_counts": None}, "a value of an instance is missing"),
        ({"i_counts": "oooo"}, "run-length encoding 0 breaks off"),
        ({"i_counts": ""}, "run-length encoding 0 is empty"),
        ({"i_score": None}, "a value of an instance is missing"),
        ({"i_score": float("nan")}, "a score that is not in"),
        ({"i_score": 1.5}, "a score that is not in"),
        ({"i_bbox_xywh": [1.0, 2.0, 3.0]}, "a box that is not four numbers"),
        ({"i_bbox_xywh": [1.0, 2.0, 3.0, None]}, "a value of an instance is missing"),
        ({"i_bbox_xywh": [1.0, 2.0, 3.0, float("inf")]}, "a box or an embedding that is not finite"),
        ({"i_category_id": -1}, "a category or a mask id below 0"),
        ({"i_embedding": [np.float16("nan")]}, "a box or an embedding that is not finite"),
        ({"i_embedding": None}, "a value of an instance is missing"),
    ],
)
def test_a_value_that_no_writer_writes_is_damage(url: str, changes: dict[str, object], complaint: str) -> None:
    assert len(read_rows(url, rows())[0].instances) == 1
    with pytest.raises(LabelFileError, match=rf"shard-000000\.parquet: a damaged label file \(.*{complaint}"):
        read_rows(url, rows(**changes))


def test_so_are_values_that_contradict_one_another(url: str) -> None:
    with pytest.raises(LabelFileError, match="image 1 is there twice"):
        read_rows(url, rows(), rows())
    with pytest.raises(LabelFileError, match="embeddings of several lengths"):
        read_rows(url, rows(), rows(key="2", i_embedding=[np.float16(1)] * 2))


@pytest.mark.parametrize("bomb", ["rows", "instances", "texts"])
def test_a_small_file_that_becomes_large_is_refused(url: str, bomb: str) -> None:
    write_label_file(url, "shard-000000", records())
    path = Path(url, "shard-000000.parquet")
    schema = pq.read_schema(path)
    one, times = {
        "rows": (rows(instances=[]), 2_000_000),
        "instances": (rows(instances=rows()["instances"] * 1000), 700),
        "texts": (rows(file_name="x" * 2**20), 100),
    }[bomb]
    table = pa.Table.from_pylist([one], schema=schema).take(pa.array(np.zeros(times, int)))
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 2**21
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("freesolo.data.label_table.MAX_DECODED_BYTES", 2**25)
        with pytest.raises(LabelFileError, match=r"it would take \d+ bytes of memory, more than \d+; use smaller"):
            read_label_file(url, described(url))


MANIFEST = LabelManifest(1, PLAN, (LabelFile("shard-000000", 3, 4, 1, 99, 64 * "a"),)).to_json()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"name": "shard-000000"', '"name": "../shard-000000"', r"files\.0\.name: string should match"),
        ('"images": 3,\n   "instances": 4', '"images": -3,\n   "instances": 4', r"files\.0\.images"),
        ('"unreadable": 1\n', '"unreadable": 2\n', "its totals are"),
        ('"kind": "free-masks"', '"kind": "virus"', r"plan\.kind: input should be"),
        ('"parent": null', '"parent": "x"', r"plan\.parent: string should match"),
        ('"dataset_url": "s3://photos/set"', '"dataset_url": 5', r"plan\.dataset_url: input should be a valid string"),
        ('"settings": {', '"settings": null, "unknown": {', r"plan\.settings"),
    ],
)
def test_a_manifest_is_read_strictly(old: str, new: str, complaint: str) -> None:
    assert LabelManifest.from_json(MANIFEST).plan.kind == "free-masks"
    assert old in MANIFEST
    with pytest.raises(UsageError, match=f"a damaged manifest: .*{complaint}.*; make the label set again"):
        LabelManifest.from_json(MANIFEST.replace(old, new, 1))
