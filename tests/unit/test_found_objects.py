"""What a label set found, by likeness: squares of three colours, whose embeddings tell the colour."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from freesolo import found_objects
from freesolo.data import files
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.labels import LabelPlan, begin_label_set, finish_label_set, write_label_file
from freesolo.data.shards import DatasetManifest, Sample, ShardInfo, shard_name, write_dataset_manifest, write_shard
from freesolo.errors import UsageError
from freesolo.found_objects import group_objects
from freesolo.report.records import FoundObject, GroupedObjects
from freesolo.settings import BoundsSettings

HEIGHT, WIDTH = 40, 60
COLOURS = np.array([(220, 30, 30), (30, 220, 30), (30, 30, 220)])
SHADES = 200  # objects of a colour differ by less than so many parts of an embedding's length


def png(colour: int) -> bytes:
    """A square of 20 px at row 10, column 15, on black."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[10:30, 15:35] = COLOURS[colour]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def labelled(number: int, colours: Sequence[int], *, channels: int = 3) -> ImageLabels:
    """A photo's objects with embeddings of these colours, 0, 1 or 2: its square, all but 4 rows of it, ..."""
    instances = []
    for place, colour in enumerate(colours):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[10 : 30 - 4 * place, 15:35] = 1
        rle: dict[str, Any] = coco_mask.encode(np.asfortranarray(mask))
        box = (15.0, 10.0, 20.0, 20.0 - 4 * place)
        embedding = np.zeros(channels, np.float16)
        if channels:
            embedding[colour] = 1
            embedding[(colour + 1) % 3] = (number + place / 10) / SHADES
        instances.append(LabelledInstance(0, rle, box, 0.5, 0, embedding))
    return ImageLabels(f"{number:03d}", number, f"{number}.png", WIDTH, HEIGHT, None, tuple(instances))


def write(folder: Path, *shards: Sequence[Sequence[int]], channels: int = 3, broken: Sequence[int] = ()) -> str:
    """A data set and a label set: shards of photos of objects of these colours. The photo has its first one's."""
    infos: list[ShardInfo] = []
    records: list[list[ImageLabels]] = []
    for index, shard in enumerate(shards):
        first = sum(len(before) for before in shards[:index])
        samples = [
            Sample(
                key=f"{n:03d}",
                image_bytes=b"no photo" if n in broken else png(colours[0] if colours else 0),
                image_id=n,
                file_name=f"{n}.png",
                width=WIDTH,
                height=HEIGHT,
            )
            for n, colours in enumerate(shard, first)
        ]
        infos.append(write_shard(str(folder / "photos"), shard_name(index), samples))
        records.append([labelled(n, colours, channels=channels) for n, colours in enumerate(shard, first)])
    manifest = DatasetManifest(1, tuple(infos), False, (), ())
    write_dataset_manifest(str(folder / "photos"), manifest)
    labels = str(folder / "labels")
    begin_label_set(labels, LabelPlan(manifest.digest, "there", "pseudo-labels", {"sha256": "ab"}, {}, None))
    for index, shard_records in enumerate(records):
        write_label_file(labels, shard_name(index), shard_records)
    finish_label_set(labels, manifest)
    return labels


def group(folder: Path, groups: int = 3, **options: Any) -> GroupedObjects:
    return group_objects(str(folder / "photos"), "Pseudo-labels 1", str(folder / "labels"), groups=groups, **options)


def colour_of(found: FoundObject) -> int:
    """Which colour the middle of a picture has."""
    return int(np.abs(COLOURS - found.picture[60, 60]).sum(axis=1).argmin())


TWO_SHARDS = ([[0], [1], [], [0]], [[2], [0], [1]])


def test_objects_of_a_colour_are_a_group_with_their_pictures(tmp_path: Path) -> None:
    write(tmp_path, *TWO_SHARDS)
    found = group(tmp_path)
    assert (found.label_set, found.found, found.grouped) == ("Pseudo-labels 1", 6, 6)
    assert (found.shards, found.sampled_shards) == (2, 2)
    assert [each.size for each in found.groups] == [3, 2, 1]
    shown = [[found.objects[place] for place in each.shown] for each in found.groups]
    assert [{each.file_name for each in row} for row in shown[1:]] == [{"1.png", "6.png"}, {"4.png"}]
    # Shades 0, 3 and 5 of red: the middle one is the most typical.
    assert [each.file_name for each in shown[0]] == ["3.png", "5.png", "0.png"]
    assert [{colour_of(each) for each in row} for row in shown] == [{0}, {1}, {2}]
    assert {each.score for each in found.objects} == {0.5}


def test_each_shown_object_names_its_nearest(tmp_path: Path) -> None:
    write(tmp_path, *TWO_SHARDS)
    found = group(tmp_path)
    first = found.objects[found.groups[0].shown[0]]
    names = [found.objects[place].file_name for place, _ in first.nearest]
    assert first.file_name not in names
    assert names[:2] == ["5.png", "0.png"]  # the other reds, then the rest
    assert sorted(names) == sorted({"0.png", "1.png", "4.png", "5.png", "6.png"})
    cosines = [cosine for _, cosine in first.nearest]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[1] > 0.99 > 0.2 > cosines[2]


def same(one: GroupedObjects, other: GroupedObjects) -> bool:
    return (one.groups, [each.nearest for each in one.objects]) == (
        other.groups,
        [each.nearest for each in other.objects],
    ) and all(np.array_equal(a.picture, b.picture) for a, b in zip(one.objects, other.objects, strict=True))


@pytest.fixture
def read_shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the image shards that were opened."""
    opened: list[str] = []
    read_shard = found_objects.read_shard

    def watched(url: str, shard: ShardInfo, *, bounds: BoundsSettings) -> Iterator[Sample]:
        opened.append(shard.name)
        return read_shard(url, shard, bounds=bounds)

    monkeypatch.setattr(found_objects, "read_shard", watched)
    return opened


def test_of_a_large_label_set_a_sample_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_shards: list[str]
) -> None:
    """Of 12 shards, half of them empty, two are drawn, and 25 of their 40 objects; the same for the same seed."""
    monkeypatch.setattr(found_objects, "OBJECTS_MAX", 25)
    monkeypatch.setattr(found_objects, "SHARDS_MAX", 2)
    shards = [[[n % 3]] * 20 if n % 2 else [[]] for n in range(12)]
    write(tmp_path, *shards)
    found = group(tmp_path, seed=1)
    assert (found.found, found.grouped) == (120, 25)
    assert (found.shards, found.sampled_shards) == (12, 2)
    assert len(set(read_shards)) == 2
    assert all(int(name.removeprefix("shard-")) % 2 for name in read_shards)
    assert same(found, group(tmp_path, seed=1))
    assert {each.file_name for each in found.objects} != {each.file_name for each in group(tmp_path, seed=2).objects}


def test_a_photo_is_decoded_once_and_reading_ends_with_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The shard is cut off in its fourth photo, which nobody notices: the third is the last with an object."""
    decoded: list[bytes] = []
    decode_photo = found_objects.decode_photo
    monkeypatch.setattr(
        found_objects, "decode_photo", lambda data, **options: decoded.append(data) or decode_photo(data, **options)
    )
    write(tmp_path, [[0, 0, 1], [], [2], [], []])
    shard = tmp_path / "photos" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:7000])
    found = group(tmp_path)
    assert [each.size for each in found.groups] == [2, 1, 1]
    assert len(decoded) == 2
    assert len({each.picture.tobytes() for each in found.objects}) == 4  # each of its own mask
    assert caplog.text == ""


def test_what_cannot_be_read_has_no_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [[0], [0], [1]], [[2]], broken=[1])
    shard = tmp_path / "photos" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:100])
    found = group(tmp_path)
    assert [each.size for each in found.groups] == [2, 1, 1]
    assert [[found.objects[place].file_name for place in each.shown] for each in found.groups] == [
        ["0.png"],
        ["2.png"],
        [],
    ]
    assert [found.objects[place].file_name for place, _ in found.objects[0].nearest] == ["2.png"]
    assert "shard-000001.tar" in caplog.text


def test_a_damaged_label_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = write(tmp_path, [[0], [1]], [[2], [2]])
    files.write_atomic(files.join(labels, "shard-000000.parquet"), b"damaged")
    found = group(tmp_path)
    assert (found.found, found.grouped) == (4, 2)
    assert {each.file_name for each in found.objects} == {"2.png", "3.png"}
    assert "shard-000000.parquet" in caplog.text


def test_a_photo_over_the_bounds_is_not_decoded(tmp_path: Path) -> None:
    write(tmp_path, *TWO_SHARDS)
    found = group(tmp_path, bounds=BoundsSettings(max_pixels=HEIGHT * WIDTH - 1))
    assert (found.grouped, found.objects) == (6, ())
    assert [each.shown for each in found.groups] == [(), (), ()]


@pytest.mark.parametrize(
    ("shards", "channels"), [(([[], []], [[]]), 3), (([[0, 1], [2]],), 0)], ids=["no object", "no embeddings"]
)
def test_without_objects_or_embeddings_there_are_no_groups(
    tmp_path: Path, shards: tuple[list[list[int]], ...], channels: int
) -> None:
    write(tmp_path, *shards, channels=channels)
    found = group(tmp_path)
    assert found.found == sum(len(colours) for shard in shards for colours in shard)
    assert (found.groups, found.objects, found.grouped) == ((), (), 0)


def test_one_object_is_one_group(tmp_path: Path) -> None:
    write(tmp_path, [[1]])
    found = group(tmp_path, 12)
    assert [each.size for each in found.groups] == [1]
    assert (colour_of(found.objects[0]), found.objects[0].nearest) == (1, ())


def test_labels_of_other_photos_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [[1]])
    write(tmp_path / "other", [[1], [2]])
    with pytest.raises(UsageError, match="made for another data set"):
        group_objects(str(tmp_path / "photos"), "A", str(tmp_path / "other" / "labels"), groups=3)
