"""Groups of objects as the page's script shows them: numbers, and small WebP files inside the page, each once."""

from __future__ import annotations

import base64
from typing import TypedDict

from freesolo.report.pictures import encode_webp
from freesolo.report.records import FoundObject, GroupedObjects


class Object(TypedDict):
    """An object; `nearest` has the places of others in `Groups.objects` and how alike they are, in percent."""

    name: str
    score: float
    width: int
    height: int
    source: str
    nearest: list[tuple[int, int]]


class Group(TypedDict):
    """A group; `shown` has places in `Groups.objects`."""

    size: int
    shown: list[int]


class Groups(TypedDict):
    """All of them."""

    grouped: int
    groups: list[Group]
    objects: list[Object]


def group_data(found: GroupedObjects | None) -> Groups | None:
    """The groups in their order; None where nobody looked for any."""
    if found is None:
        return None
    return {
        "grouped": found.grouped,
        "groups": [{"size": group.size, "shown": list(group.shown)} for group in found.groups],
        "objects": [_object(each) for each in found.objects],
    }


def _object(found: FoundObject) -> Object:
    height, width, _ = found.picture.shape
    return {
        "name": found.file_name,
        "score": round(found.score, 4),
        "width": width,
        "height": height,
        "source": "data:image/webp;base64," + base64.b64encode(encode_webp(found.picture)).decode(),
        "nearest": [(place, round(100 * cosine)) for place, cosine in found.nearest],
    }
