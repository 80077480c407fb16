"""What there is to pack: photos in a folder, under a glob, in a list, or named by a COCO JSON.

A COCO JSON gives photos their ids, sizes and annotations. Elsewhere photos are numbered 1, 2, ... in the order of their
relative names, so that the same folder gives the same ids wherever it lies.
"""

from __future__ import annotations

import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from freesolo.data import files
from freesolo.data.documents import short
from freesolo.data.shards import SkippedPhoto
from freesolo.errors import UsageError

# HEIC cannot be read, but is a photo: it is counted and named as unreadable, not passed over.
PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)


@dataclass(frozen=True, slots=True)
class PhotoSource:
    """A photo to pack.

    Attributes:
        url: Of its file.
        file_name: Relative to the folder that is packed.
        image_id: Unique among the photos, at least 0.
        size: Height and width that its annotations were made for; None where there are none to go by.
        annotations: COCO's, verbatim.
    """

    url: str
    file_name: str
    image_id: int
    size: tuple[int, int] | None = None
    annotations: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class PhotoCollection:
    """Photos to pack together.

    Attributes:
        name: What they were found by, for messages.
        photos: At least one, in ascending order of ids.
        annotated: Whether they came with annotations.
        categories: COCO's, verbatim.
        skipped: Annotations that belong to no photo, named.
    """

    name: str
    photos: tuple[PhotoSource, ...]
    annotated: bool = False
    categories: tuple[dict[str, Any], ...] = ()
    skipped: tuple[SkippedPhoto, ...] = ()


def find_photos(source: str | Sequence[str], *, images: str | None = None) -> PhotoCollection:
    """Find the photos that `source` means.

    Args:
        source: A folder (searched to any depth), a glob, a COCO JSON (a name that ends in `.json`), one photo, or a
            list of photos; all URLs. In a folder and under a glob, links are followed, hidden files and those without a
            photo's extension are passed over; a list is taken as it is.
        images: The folder that a COCO JSON's file names are relative to. Default: the JSON's own folder, or `images`
            in it or beside it, whichever has the first photo.

    Raises:
        UsageError: Nothing is there, no photo is there, or the JSON is not COCO's or contradicts itself.
        JobError: The store cannot be reached.
    """
    if not isinstance(source, str):
        return _from_list(source)
    if source.endswith(".json"):
        return _from_coco(source, images)
    if files.is_folder(source):
        return _numbered(source, _below(source, _photo_names(files.list_files(source))))
    if files.exists(source):
        return _from_list([source])
    if files.has_wildcard(source):
        base, names = files.glob_files(source)
        return _numbered(source, _below(base, _photo_names(names)))
    raise UsageError(f"{source}: no such folder, file or glob; check the path to the photos")


def _photo_names(names: Sequence[str]) -> list[str]:
    return [
        name
        for name in names
        if name.lower().endswith(PHOTO_SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))
    ]


def _from_list(urls: Sequence[str]) -> PhotoCollection:
    name = f"a list of {len(urls)} photos" if len(urls) != 1 else urls[0]
    if len(set(urls)) != len(urls):
        twice = next(url for url in urls if list(urls).count(url) > 1)
        raise UsageError(f"{name}: {twice} is in it twice")
    folders = [url.split("/")[:-1] for url in urls]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    common = "/".join([*(parts[0] for parts in shared), ""])
    return _numbered(name, {url.removeprefix(common): url for url in urls})


def _numbered(name: str, urls: Mapping[str, str]) -> PhotoCollection:
    """Photos with ids from 1 in the order of their relative names, the keys of `urls`."""
    if not urls:
        raise UsageError(f"{name}: no photos there; looked for {', '.join(PHOTO_SUFFIXES)}")
    photos = (PhotoSource(urls[each], as_utf8(each), number) for number, each in enumerate(sorted(urls), start=1))
    return PhotoCollection(name, tuple(photos))


def _below(base: str, names: Iterable[str]) -> dict[str, str]:
    return {name: files.join(base, name) for name in names}


def as_utf8(name: str) -> str:
    """A text with a file's name that is not UTF-8, which Linux allows, as one that can be stored and shown."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _from_coco(url: str, images: str | None) -> PhotoCollection:
    document = _read_coco(url)
    records = document["images"]
    if not records:
        raise UsageError(f"{url}: no images in it")
    try:
        annotations, strays = _annotations_by_image(document)
        folder = images if images is not None else _image_folder(url, _inside(records[0]["file_name"]))
        photos = [_coco_photo(record, folder, annotations) for record in records]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{url}: not COCO's form: {error!r}; see https://cocodataset.org/#format-data") from error
    photos.sort(key=lambda photo: photo.image_id)
    for previous, photo in pairwise(photos):
        if previous.image_id == photo.image_id:
            raise UsageError(f"{url}: image id {photo.image_id} is used twice")
    return PhotoCollection(
        name=url,
        photos=tuple(photos),
        annotated="annotations" in document,
        categories=tuple(document.get("categories", [])),
        skipped=tuple(strays),
    )


def _read_coco(url: str) -> dict[str, Any]:
    try:
        # Not documents.parse_json, whose care with each number and key would double the minute that COCO's own takes.
        document = json.loads(files.read_bytes(url).decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{url}: not valid JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise UsageError(f"{url}: not a COCO JSON: it has no list of images")
    return document


def _annotations_by_image(document: dict[str, Any]) -> tuple[dict[int, list[dict[str, Any]]], list[SkippedPhoto]]:
    """Annotations of each image, in the file's order, and those of images that are not there."""
    known = {record["id"] for record in document["images"]}
    categories = _category_ids(document.get("categories", []))
    seen: set[object] = set()
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    strays: list[SkippedPhoto] = []
    for annotation in document.get("annotations", []):
        if not isinstance(annotation, dict):
            raise TypeError("an annotation that is no object")
        number, image_id = annotation["id"], annotation["image_id"]
        if number in seen:
            raise ValueError(f"annotation id {number} is used twice")
        seen.add(number)
        if categories and annotation.get("category_id") not in categories:
            raise ValueError(f"annotation {number} has no known category: {annotation.get('category_id')}")
        if image_id in known:
            by_image[image_id].append(annotation)
        else:
            strays.append(SkippedPhoto(f"annotation {number}", f"image {image_id} is not among the images"))
    return by_image, strays


def _coco_photo(record: dict[str, Any], folder: str, annotations: dict[int, list[dict[str, Any]]]) -> PhotoSource:
    image_id, file_name = record["id"], record["file_name"]
    if type(image_id) is not int or not 0 <= image_id < 2**63:
        raise ValueError(f"image id {short(image_id)} is not a number from 0")
    size = (record["height"], record["width"]) if "height" in record and "width" in record else None
    if size is not None and not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"image {image_id} has height and width {short(size)}")
    return PhotoSource(
        files.join(folder, _inside(file_name)), file_name, image_id, size, tuple(annotations.get(image_id, ()))
    )


def _inside(file_name: object) -> str:
    """A photo's name that stays in the folder of photos: a COCO JSON from elsewhere must not choose what is read."""
    if not isinstance(file_name, str) or any(unicodedata.category(each) in ("Cc", "Cs") for each in file_name):
        raise ValueError(f"file name {short(file_name)} is not text without control characters")
    if not file_name or file_name.startswith("/") or "::" in file_name or "://" in file_name:
        raise ValueError(f"file name {short(file_name)} is not relative to the folder of the photos")
    if ".." in file_name.split("/"):
        raise ValueError(f"file name {short(file_name)} leads out of the folder of the photos")
    return file_name


def _category_ids(categories: object) -> set[int]:
    if not isinstance(categories, list) or not all(isinstance(category, dict) for category in categories):
        raise TypeError("categories are not a list of objects")
    ids = {category["id"] for category in categories}
    if not all(type(each) is int for each in ids) or len(ids) != len(categories):
        raise ValueError("category ids are not whole numbers that differ from one another")
    json.dumps(categories, ensure_ascii=False, allow_nan=False).encode()  # the manifest will have to
    return ids


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _image_folder(url: str, first: str) -> str:
    """The folder of a COCO JSON's photos, where it was not given."""
    own, _, _ = url.rpartition("/")
    above, _, _ = own.rpartition("/")
    candidates = [own or ".", files.join(own or ".", "images"), files.join(above or ("." if own else ".."), "images")]
    for folder in candidates:
        if files.exists(files.join(folder, first)):
            return folder
    raise UsageError(f"{url}: {first} is in none of {', '.join(candidates)}; say where the photos are (`images`)")
