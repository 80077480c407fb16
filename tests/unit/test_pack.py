"""Packing: the right photos, reproducible shards whoever writes them, and every photo accounted for."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from freesolo.data import files
from freesolo.data.coco import export_coco
from freesolo.data.pack import finish_data_set, pack, pack_shard, plan_shards
from freesolo.data.shards import Sample, SkippedPhoto, read_dataset_manifest, read_shard
from freesolo.data.sources import find_photos
from freesolo.errors import JobError, UsageError
from freesolo.settings import BoundsSettings


def photo(seed: int = 0, *, height: int = 12, width: int = 16, kind: str = "JPEG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def photos(folder: Path, names: Iterable[str]) -> str:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(seed, kind="PNG" if name.lower().endswith("png") else "JPEG"))
    return str(folder)


def contents(url: str) -> dict[str, bytes]:
    return {name: files.read_bytes(files.join(url, name)) for name in files.list_files(url)}


def all_samples(url: str) -> list[Sample]:
    return [sample for shard in read_dataset_manifest(url).shards for sample in read_shard(url, shard)]


def coco(folder: Path, records: list[dict[str, Any]], annotations: list[dict[str, Any]] | None = None) -> str:
    """A COCO JSON in `folder`, beside its photos."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        path = folder / record["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(record["id"], height=record.get("height", 12), width=record.get("width", 16)))
    document: dict[str, Any] = {"images": records}
    if annotations is not None:
        document |= {"annotations": annotations, "categories": [{"id": 3, "name": "car"}, {"id": 18, "name": "dog"}]}
    (folder / "instances.json").write_text(json.dumps(document), encoding="utf-8")
    return str(folder / "instances.json")


def record(image_id: int, name: str | None = None, **extra: Any) -> dict[str, Any]:
    return {"id": image_id, "file_name": name or f"{image_id}.jpg", "height": 12, "width": 16, **extra}


def annotation(number: int, image_id: int, **extra: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": 18, "segmentation": [[1, 1, 5, 1, 5, 5]], **extra}


@pytest.fixture
def target(tmp_path: Path) -> str:
    return str(tmp_path / "dataset")


# --- what is found ------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_to_any_depth_and_numbered_by_name(tmp_path: Path) -> None:
    root = photos(tmp_path / "in", ["dog/1.jpg", "cat/1.jpg", "b.JPEG", "cat/10.png", "cat/2.webp.jpg"])
    for name in ("notes.txt", ".hidden.jpg", ".thumbnails/1.jpg", "cat/._1.jpg", "cat/jpg"):
        files.write_atomic(files.join(root, name), b"not a photo")
    found = find_photos(root).photos
    assert [(each.image_id, each.file_name) for each in found] == [
        (1, "b.JPEG"),
        (2, "cat/1.jpg"),
        (3, "cat/10.png"),
        (4, "cat/2.webp.jpg"),
        (5, "dog/1.jpg"),
    ]
    assert all(files.exists(each.url) for each in found)


def test_globs_folders_and_lists_agree(tmp_path: Path) -> None:
    root = photos(tmp_path / "in", ["dog/1.jpg", "cat/1.jpg", "b.jpg"])
    files.write_atomic(files.join(root, "cat/notes.txt"), b"")
    folder = find_photos(root).photos
    assert find_photos(f"{root}/").photos == folder
    assert find_photos(f"{root}/**/*").photos == folder
    assert find_photos([f"{root}/{name}" for name in ("dog/1.jpg", "b.jpg", "cat/1.jpg")]).photos == folder
    some = find_photos(f"{root}/*/1.jpg").photos
    assert [each.file_name for each in some] == ["cat/1.jpg", "dog/1.jpg"]


def test_one_photo_and_a_folder_named_like_a_glob(tmp_path: Path) -> None:
    root = photos(tmp_path / "trip [2020]", ["1.jpg"])
    assert [each.file_name for each in find_photos(root).photos] == ["1.jpg"]
    single = find_photos(f"{root}/1.jpg").photos
    assert [(each.url, each.file_name) for each in single] == [(f"{root}/1.jpg", "1.jpg")]


def test_lists_keep_what_tells_their_photos_apart() -> None:
    listed = find_photos(["s3://a/x/1.jpg", "s3://a/y/1.jpg"]).photos
    assert [(each.file_name, each.url) for each in listed] == [
        ("x/1.jpg", "s3://a/x/1.jpg"),
        ("y/1.jpg", "s3://a/y/1.jpg"),
    ]
    assert [each.file_name for each in find_photos(["/a/1.jpg", "/b/1.jpg"]).photos] == ["a/1.jpg", "b/1.jpg"]
    assert [each.file_name for each in find_photos(["/a/ab.jpg", "/a/ac.jpg"]).photos] == ["ab.jpg", "ac.jpg"]
    with pytest.raises(UsageError, match=r"/a/1\.jpg is in it twice"):
        find_photos(["/a/1.jpg", "/a/1.jpg"])


@pytest.mark.parametrize("source", ["in", "in/*.jpg", "in/**/*.png", "nowhere", "nowhere/*.jpg"])
def test_no_photos_is_an_error(tmp_path: Path, source: str) -> None:
    files.write_atomic(str(tmp_path / "in" / "notes.txt"), b"")
    with pytest.raises(UsageError, match=r"no photos there; looked for \.jpg|no such folder, file or glob"):
        find_photos(str(tmp_path / source))
    with pytest.raises(UsageError, match="no photos there"):
        find_photos([])


# --- shards of a folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "memory"])
def test_every_photo_is_packed_once_with_its_own_bytes(tmp_path: Path, place: str) -> None:
    names = [f"{group}/{i}.v2.jpg" for group in ("cat", "dog", "été ☃") for i in range(5)]
    root = photos(tmp_path / "in", names)
    target = {"file": str(tmp_path / "out"), "memory": "memory://pack/every"}[place]
    manifest = pack(root, target, samples_per_shard=4)
    samples = all_samples(target)
    assert manifest == read_dataset_manifest(target)
    assert [shard.samples for shard in manifest.shards] == [4, 4, 4, 3]
    assert sorted(sample.file_name for sample in samples) == sorted(names)
    for sample in samples:
        assert sample.image_bytes == Path(root, sample.file_name).read_bytes()
        assert sample.key == f"{sample.image_id:012d}"
        assert (sample.height, sample.width, sample.annotations) == (12, 16, ())
    assert sorted(sample.image_id for sample in samples) == list(range(1, 16))
    assert not manifest.annotated
    assert manifest.skipped == ()


def test_shards_are_random_subsets_by_seed(tmp_path: Path) -> None:
    root = photos(tmp_path / "in", [f"{group}/{i:02d}.jpg" for group in "ab" for i in range(20)])

    def order(seed: int) -> list[str]:
        tasks = plan_shards(find_photos(root), str(tmp_path / "out"), samples_per_shard=20, seed=seed)
        return [each.file_name for task in tasks for each in task.photos]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2))
    # Of the first shard's 20 photos about half are of either folder; unshuffled all would be of "a".
    assert 4 < sum(name.startswith("a/") for name in order(1)[:20]) < 16


def test_the_same_photos_give_the_same_bytes_wherever_they_lie(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(7)]
    first = photos(tmp_path / "here", names)
    second = photos(tmp_path / "there", names)
    for name in names:
        os.utime(Path(second, name), (1, 1))
    one = pack(first, str(tmp_path / "a"), samples_per_shard=3)
    two = pack([f"{second}/{name}" for name in reversed(names)], str(tmp_path / "b"), samples_per_shard=3)
    assert contents(str(tmp_path / "a")) == contents(str(tmp_path / "b"))
    assert one.digest == two.digest


def test_more_workers_give_the_same_bytes(tmp_path: Path) -> None:
    root = photos(tmp_path / "in", [f"{i}.jpg" for i in range(9)])
    files.write_atomic(files.join(root, "4.jpg"), b"damaged")
    files.write_atomic(files.join(root, "7.jpg"), b"")
    done: list[int] = []
    alone = pack(root, str(tmp_path / "a"), samples_per_shard=2, max_bad_samples=0.5)
    together = pack(
        root, str(tmp_path / "b"), samples_per_shard=2, max_bad_samples=0.5, workers=2, progress=done.append
    )
    assert alone == together
    assert contents(str(tmp_path / "a")) == contents(str(tmp_path / "b"))
    assert done == [2, 2, 2, 2, 1]


def test_a_killed_worker_is_told_of_and_leaves_no_data_set(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed:
        def __init__(self, workers: int, **_: object) -> None:
            pass

        def map(self, *_: object) -> list[object]:
            raise BrokenProcessPool

        def shutdown(self, **_: object) -> None:
            pass

    monkeypatch.setattr("freesolo.data.pack.ProcessPoolExecutor", Killed)
    root = photos(tmp_path / "in", ["1.jpg", "2.jpg"])
    with pytest.raises(JobError, match="a packing process was killed"):
        pack(root, target, samples_per_shard=1, workers=2)
    with pytest.raises(UsageError, match="no data set there"):
        read_dataset_manifest(target)


def test_shards_can_be_packed_anywhere_in_any_order(tmp_path: Path) -> None:
    root = photos(tmp_path / "in", [f"{i}.jpg" for i in range(9)])
    files.write_atomic(files.join(root, "4.jpg"), b"damaged")
    expected = pack(root, str(tmp_path / "a"), samples_per_shard=2, max_bad_samples=0.5)
    collection = find_photos(root)
    tasks = plan_shards(collection, str(tmp_path / "b"), samples_per_shard=2, seed=0)
    packed = [pack_shard(task) for task in reversed(tasks)]
    assert finish_data_set(collection, str(tmp_path / "b"), packed, max_bad_samples=0.5) == expected


def test_photos_are_measured_upright(tmp_path: Path, target: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files.write_atomic(str(tmp_path / "in" / "turned.jpg"), photo(height=12, width=16, exif=exif))
    pack(str(tmp_path / "in"), target)
    sample = all_samples(target)[0]
    assert (sample.height, sample.width) == (16, 12)


def test_names_that_are_not_utf8(tmp_path: Path, target: str) -> None:
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/\xff.jpg", "wb") as stream:  # noqa: PTH123  no Path for such a name
        stream.write(photo())
    pack(str(tmp_path / "in"), target)
    assert all_samples(target)[0].file_name == "\N{REPLACEMENT CHARACTER}.jpg"


def test_a_photo_of_such_a_name_that_cannot_be_read_is_passed_over(tmp_path: Path, target: str) -> None:
    root = photos(tmp_path / "in", ["1.jpg"])
    os.symlink(b"gone", os.fsencode(root) + b"/\xff.jpg")  # noqa: PTH211  no Path for such a name
    (skipped,) = pack(root, target, max_bad_samples=0.5).skipped
    assert skipped.file_name == "\N{REPLACEMENT CHARACTER}.jpg"
    assert "\N{REPLACEMENT CHARACTER}.jpg: no such file" in skipped.reason


def test_photos_in_a_linked_folder(tmp_path: Path, target: str) -> None:
    photos(tmp_path / "elsewhere", ["2.jpg"])
    root = photos(tmp_path / "in", ["1.jpg"])
    Path(root, "linked").symlink_to(tmp_path / "elsewhere")
    pack(root, target)
    assert sorted(sample.file_name for sample in all_samples(target)) == ["1.jpg", "linked/2.jpg"]


def test_a_data_set_is_not_overwritten(tmp_path: Path, target: str) -> None:
    root = photos(tmp_path / "in", ["1.jpg"])
    pack(root, target)
    before = contents(target)
    with pytest.raises(UsageError, match="there is a data set already"):
        pack(root, target, seed=1)
    assert contents(target) == before


# --- what cannot be read ------------------------------------------------------------------------------------------


def broken_set(folder: Path) -> str:
    root = photos(folder, [f"{i:02d}.jpg" for i in range(20)])
    Path(root, "03.jpg").write_bytes(b"")
    Path(root, "07.jpg").write_bytes(photo(7, height=64, width=64)[:-2000])
    Path(root, "11.heic").write_bytes(b"\0\0\0\x18ftypheic")
    return root


def test_unreadable_photos_are_named_and_leave_their_shard_short(tmp_path: Path, target: str) -> None:
    manifest = pack(broken_set(tmp_path / "in"), target, samples_per_shard=7, max_bad_samples=0.2)
    assert [photo.file_name for photo in manifest.skipped] == ["03.jpg", "07.jpg", "11.heic"]
    assert manifest.skipped[0].reason == "empty file"
    assert "truncated or damaged" in manifest.skipped[1].reason
    assert manifest.samples == 18
    assert sum(7 - shard.samples for shard in manifest.shards) == 3
    # Ids are of the photos that were found, so that repairing one changes no other.
    assert {sample.file_name: sample.image_id for sample in all_samples(target)}["04.jpg"] == 5


@pytest.mark.parametrize("allowed", [0.0, 0.001, 2.9 / 21])
def test_too_many_unreadable_photos_stop_the_job_and_are_named(tmp_path: Path, target: str, allowed: float) -> None:
    with pytest.raises(JobError, match=r"cannot be used, more than max_bad_samples=.* first: \d\d\."):
        pack(broken_set(tmp_path / "in"), target, samples_per_shard=7, max_bad_samples=allowed)
    with pytest.raises(UsageError, match="no data set there"):
        read_dataset_manifest(target)


def test_exactly_the_budget_is_within_it(tmp_path: Path, target: str) -> None:
    assert len(pack(broken_set(tmp_path / "in"), target, max_bad_samples=3 / 21).skipped) == 3


def test_no_readable_photo_at_all(tmp_path: Path, target: str) -> None:
    for i in range(3):
        files.write_atomic(str(tmp_path / "in" / f"{i}.jpg"), b"")
    with pytest.raises(UsageError, match=r"none of 3 photos can be read; 0\.jpg: empty file"):
        pack(str(tmp_path / "in"), target, max_bad_samples=1.0)
    assert files.list_files(target) == []


def test_a_shard_without_a_readable_photo_is_not_written(tmp_path: Path, target: str) -> None:
    root = photos(tmp_path / "in", [f"{i}.jpg" for i in range(4)])
    tasks = plan_shards(find_photos(root), target, samples_per_shard=1, seed=0)
    Path(tasks[1].photos[0].url).write_bytes(b"")
    manifest = pack(root, target, samples_per_shard=1, max_bad_samples=0.5)
    assert [shard.name for shard in manifest.shards] == ["shard-000000", "shard-000002", "shard-000003"]
    assert not files.exists(files.join(target, "shard-000001.tar"))


def test_a_photo_that_went_away_is_unreadable(tmp_path: Path, target: str) -> None:
    root = photos(tmp_path / "in", ["1.jpg", "2.jpg"])
    manifest = pack([f"{root}/1.jpg", f"{root}/2.jpg", f"{root}/gone.jpg"], target, max_bad_samples=0.5)
    assert [photo.file_name for photo in manifest.skipped] == ["gone.jpg"]
    assert "no such file" in manifest.skipped[0].reason


# --- COCO ---------------------------------------------------------------------------------------------------------


def test_coco_keeps_ids_annotations_and_categories(tmp_path: Path, target: str) -> None:
    crowd = annotation(8, 42, iscrowd=1, segmentation={"size": [12, 16], "counts": [0, 192]}, area=192, note="ü")
    source = coco(
        tmp_path / "in", [record(42, "a/x.jpg"), record(7), record(139)], [annotation(5, 42), crowd, annotation(6, 7)]
    )
    manifest = pack(source, target, samples_per_shard=2)
    samples = {sample.image_id: sample for sample in all_samples(target)}
    assert sorted(samples) == [7, 42, 139]
    assert samples[42].annotations == (annotation(5, 42), crowd)
    assert (samples[42].key, samples[42].file_name) == ("000000000042", "a/x.jpg")
    assert samples[139].annotations == ()
    assert manifest.annotated
    assert manifest.categories == ({"id": 3, "name": "car"}, {"id": 18, "name": "dog"})
    document = export_coco(target)
    original = json.loads(Path(source).read_text(encoding="utf-8"))
    assert document["annotations"] == sorted(original["annotations"], key=lambda each: each["id"])
    assert document["categories"] == original["categories"]
    assert document["images"] == sorted(original["images"], key=lambda each: each["id"])


def test_coco_without_annotations_is_a_list_of_photos(tmp_path: Path, target: str) -> None:
    manifest = pack(coco(tmp_path / "in", [record(42), {"id": 1, "file_name": "1.jpg"}]), target)
    assert (manifest.samples, manifest.annotated) == (2, False)


@pytest.mark.parametrize("layout", ["beside", "images below", "images above", "given"])
def test_where_cocos_photos_are_looked_for(tmp_path: Path, layout: str) -> None:
    source = Path(coco(tmp_path / "photos", [record(1)], []))
    json_path, folder = {
        "beside": ("photos/instances.json", "photos"),
        "images below": ("set/instances.json", "set/images"),
        "images above": ("set/annotations/instances.json", "set/images"),
        "given": ("set/instances.json", "elsewhere"),
    }[layout]
    destination = tmp_path / json_path
    destination.parent.mkdir(parents=True, exist_ok=True)
    if layout != "beside":
        source.rename(destination)
        (tmp_path / "photos").rename(tmp_path / folder)
    found = find_photos(str(destination), images=str(tmp_path / folder) if layout == "given" else None)
    assert found.photos[0].url == str(tmp_path / folder / "1.jpg")


def test_cocos_photos_beside_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco(tmp_path / "images", [record(1)], [])
    (tmp_path / "images" / "instances.json").rename(tmp_path / "instances.json")
    monkeypatch.chdir(tmp_path)
    assert files.exists(find_photos("instances.json").photos[0].url)


def test_cocos_photos_that_are_nowhere(tmp_path: Path) -> None:
    source = coco(tmp_path / "in", [record(1)], [])
    (tmp_path / "in" / "1.jpg").unlink()
    with pytest.raises(UsageError, match=r"1\.jpg is in none of .*/in, .*/in/images, .*/images; say where"):
        find_photos(source)


def test_annotations_that_do_not_fit_their_photo_are_bad_samples(tmp_path: Path, target: str) -> None:
    source = coco(
        tmp_path / "in",
        [record(1), record(2), record(3), record(4)],
        [annotation(1, 1), annotation(2, 2), annotation(3, 3, segmentation={"size": [16, 12], "counts": [192]})],
    )
    (tmp_path / "in" / "2.jpg").write_bytes(photo(2, height=16, width=12))
    manifest = pack(source, target, max_bad_samples=0.5)
    assert [(photo.file_name, photo.reason) for photo in manifest.skipped] == [
        ("2.jpg", "12 x 16 pixels, annotated as 16 x 12 (was it turned, or resized?)"),
        ("3.jpg", "annotation 3 is damaged: a mask of size [16, 12] (height, width) in an image of [12, 16]"),
    ]


def test_annotations_of_unknown_images_are_counted_and_named(tmp_path: Path, target: str) -> None:
    source = coco(tmp_path / "in", [record(1), record(2)], [annotation(1, 1), annotation(2, 99)])
    with pytest.raises(JobError, match="annotation 2: image 99 is not among the images"):
        pack(source, target)
    manifest = pack(source, target, max_bad_samples=0.5)
    assert manifest.skipped == (SkippedPhoto("annotation 2", "image 99 is not among the images"),)
    assert manifest.samples == 2


@pytest.mark.parametrize(
    ("records", "annotations", "message"),
    [
        ([record(1), record(1, "2.jpg")], [], "image id 1 is used twice"),
        ([record(1)], [annotation(5, 1), annotation(5, 1)], "annotation id 5 is used twice"),
        ([record(1)], [annotation(5, 1, category_id=4)], "annotation 5 has no known category: 4"),
        ([record(1)], [{"id": 5}], "not COCO's form: KeyError\\('image_id'\\)"),
        ([], [], "no images in it"),
    ],
)
def test_a_coco_json_that_contradicts_itself_is_refused(
    tmp_path: Path, records: list[dict[str, Any]], annotations: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        find_photos(coco(tmp_path / "in", records, annotations))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"photos": []}', '{"images": [{"id": "x", "file_name": "1.jpg"}]}'])
def test_what_is_not_coco_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    (tmp_path / "1.jpg").write_bytes(photo())
    with pytest.raises(UsageError, match=r"x\.json: (not valid JSON|not a COCO JSON|not COCO's form)"):
        find_photos(str(tmp_path / "x.json"))


# --- COCO JSON of bad actors ----------------------------------------------------------------------------------------


def coco_of(folder: Path, **changes: Any) -> str:
    """A COCO JSON of one photo, which is there, with a field of the photo or of its annotation changed."""
    write_image(folder / "1.jpg")
    image = {"id": 1, "file_name": "1.jpg", "width": 20, "height": 10}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25}
    document = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "object"}]}
    for name, value in changes.items():
        part, _, field = name.partition("_")
        holder = {"image": image, "annotation": annotation, "document": document}[part]
        holder[field] = value
    path = folder / "coco.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image_file_name": "../../etc/passwd"}, "leads out of the folder of the photos"),
        ({"image_file_name": "/etc/passwd"}, "is not relative to the folder of the photos"),
        ({"image_file_name": "x::file:///etc/passwd"}, "is not relative to the folder of the photos"),
        ({"image_file_name": "s3://bucket/1.jpg"}, "is not relative to the folder of the photos"),
        ({"image_file_name": "1.jpg\x1b[31m"}, "is not text without control characters"),
        ({"image_file_name": ["1.jpg"]}, "is not text without control characters"),
        ({"image_id": True}, "is not a number from 0"),
        ({"image_id": 2**63}, "is not a number from 0"),
        ({"image_width": "20"}, "image 1 has height and width"),
        ({"image_width": 0}, "image 1 has height and width"),
        ({"annotation_area": float("nan")}, "NaN is not a number"),
        ({"annotation_category_id": [1]}, "unhashable"),
        ({"document_categories": [{"id": 1}, {"id": 1}]}, "category ids are not whole numbers that differ"),
        ({"document_categories": [{"id": "1"}]}, "category ids are not whole numbers that differ"),
        ({"document_categories": [5]}, "categories are not a list of objects"),
        ({"document_annotations": {"id": 1}}, "an annotation that is no object"),
        ({"document_annotations": None}, "is not iterable"),
        ({"document_images": [5]}, "is not subscriptable"),
    ],
)
def test_a_coco_json_is_read_strictly(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    assert len(find_photos(coco_of(tmp_path)).photos) == 1
    with pytest.raises(UsageError, match=f"coco.json: not .*{complaint}") as caught:
        find_photos(coco_of(tmp_path, **changes), images=str(tmp_path))
    assert str(caught.value).isprintable()


def test_a_coco_json_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text('{"images": ' + "[" * 200_000, encoding="utf-8")
    with pytest.raises(UsageError, match="not valid JSON"):
        find_photos(str(tmp_path / "coco.json"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"annotation_bbox": [0, 0, 1e9, 1e9]}, "annotation 1 is damaged: a polygon with a coordinate"),
        ({"annotation_bbox": [0, 0, 1]}, r"annotation 1 is damaged: bbox=\[0, 0, 1\] is not x, y, width, height"),
        ({"annotation_bbox": "abcd"}, "annotation 1 is damaged: bbox=abcd is not x, y, width, height"),
        ({"annotation_area": "25"}, "annotation 1 is damaged: area=25 is not a number"),
        ({"annotation_iscrowd": 2}, "annotation 1 is damaged: iscrowd=2 is neither 0 nor 1"),
        ({"annotation_segmentation": [[1, 2, 3, "x", 5, 6]]}, "annotation 1 is damaged: a polygon with a coordinate"),
        ({"annotation_segmentation": {"size": [10, 20], "counts": "oooo"}}, "annotation 1 is damaged: run-length"),
        (
            {"annotation_segmentation": {"size": [10, 20], "counts": [7]}},
            "annotation 1 is damaged: counts that are not",
        ),
        (
            {"annotation_segmentation": {"size": [2**31, 2**31], "counts": "0"}},
            "annotation 1 is damaged: a mask of size",
        ),
        ({"annotation_note": "\ud800"}, "its annotations cannot be stored: .*surrogates not allowed"),
        ({"annotation_note": json.loads("[" * 80 + "]" * 80)}, "its annotations cannot be stored: nested more than 64"),
    ],
)
def test_a_damaged_annotation_costs_its_photo(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    (task,) = plan_shards(find_photos(coco_of(tmp_path, **changes)), str(tmp_path / "d"), samples_per_shard=9, seed=0)
    packed = pack_shard(task)
    assert packed.info is None
    (skipped,) = packed.skipped
    assert skipped.file_name == "1.jpg"
    assert re.search(complaint, skipped.reason)


def test_a_photo_over_the_bounds_is_skipped_and_named(tmp_path: Path) -> None:
    write_image(tmp_path / "photos" / "1.jpg")
    with (tmp_path / "photos" / "2.jpg").open("wb") as stream:
        stream.truncate(2**33)  # as a sparse file: who reads it has no memory left
    tasks = plan_shards(
        find_photos(str(tmp_path / "photos")),
        str(tmp_path / "d"),
        samples_per_shard=9,
        seed=0,
        bounds=BoundsSettings(max_sample_bytes=10**6),
    )
    (skipped,) = pack_shard(tasks[0]).skipped
    assert skipped.file_name == "2.jpg"
    assert skipped.reason == (
        "8589934592 bytes are more than bounds.max_sample_bytes=1000000 allows; raise it to read this"
    )
    small = plan_shards(
        find_photos(str(tmp_path / "photos" / "1.jpg")),
        str(tmp_path / "e"),
        samples_per_shard=9,
        seed=0,
        bounds=BoundsSettings(max_pixels=199),
    )
    (skipped,) = pack_shard(small[0]).skipped
    assert skipped.reason == "20 x 10 pixels are more than bounds.max_pixels=199 allows"


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), "red").save(path)
