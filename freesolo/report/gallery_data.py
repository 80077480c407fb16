"""Photos and masks as the page's script shows them: small JPEG files and outlines, both inside the page."""

from __future__ import annotations

import base64
from typing import TypedDict

import numpy as np

from freesolo.report.outline import outline_path
from freesolo.report.pictures import encode_jpeg, instance_colours, shrink, shrink_mask
from freesolo.report.records import GalleryLayer, GalleryPhoto

LONG_SIDE_MAX = 640
"""Of a photo in the page, in px: enough to judge an outline by, small enough for a page of hundreds of photos."""

COLOURS = 24
"""Distinct mask colours; the 25th mask has the first one's."""


class Layer(TypedDict):
    """A label set's masks of one photo, largest first: an SVG path each, and the score where there is one."""

    paths: list[str]
    scores: list[float] | None


class Photo(TypedDict):
    """A photo; `layers` has one entry a label set of the gallery, None where that one does not know the photo."""

    name: str
    width: int
    height: int
    source: str
    layers: list[Layer | None]


class Gallery(TypedDict):
    """All of the gallery."""

    names: list[str]
    colours: list[str]
    photos: list[Photo]


def gallery_data(photos: tuple[GalleryPhoto, ...]) -> Gallery:
    """The gallery; its label sets in the order in which the photos first name them."""
    names = list(dict.fromkeys(layer.name for photo in photos for layer in photo.layers))
    return {
        "names": names,
        "colours": [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in instance_colours(COLOURS)],
        "photos": [_photo(photo, names) for photo in photos],
    }


def _photo(photo: GalleryPhoto, names: list[str]) -> Photo:
    pixels = shrink(photo.pixels, LONG_SIDE_MAX)
    layers = {layer.name: _layer(layer) for layer in photo.layers}
    return {
        "name": photo.file_name,
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "source": "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(pixels)).decode(),
        "layers": [layers.get(name) for name in names],
    }


def _layer(layer: GalleryLayer) -> Layer:
    largest_first = np.argsort(-layer.masks.sum(axis=(1, 2)), kind="stable")
    return {
        "paths": [outline_path(shrink_mask(layer.masks[n], LONG_SIDE_MAX)) for n in largest_first],
        "scores": None if layer.scores is None else [round(float(layer.scores[n]), 4) for n in largest_first],
    }
