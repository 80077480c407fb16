"""What a served model answers: photos as bytes in, plain JSON out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.resizing import resize_photo
from freesolo.inference.segment import SegmentPhotos, build_segmenter
from freesolo.models.model_file import ModelFile, load_model
from freesolo.models.resnet import build_resnet
from freesolo.ops.images import normalize
from freesolo.ops.masks import boxes_xywh, encode_rle
from freesolo.ops.sizes import resized_size
from freesolo.settings import PredictSettings
from freesolo.types import Instances

EMBEDDING_SHORT_SIDE = 224
EMBEDDING_LONG_SIDE_MAX = 448


class EmbedPhotos:
    """A backbone on a device, from photos to one embedding each: the mean of its last map, L2-normalised."""

    def __init__(self, model: ModelFile, device: torch.device) -> None:
        """Build the network.

        Args:
            model: Of kind "backbone".
            device: Where to compute.
        """
        self._device = device
        self._backbone = build_resnet(model.settings["backbone"])
        self._backbone.load_state_dict(dict(model.state_dict))
        self._backbone.eval().to(device)

    @torch.inference_mode()
    def __call__(self, photo: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, " E"]:
        """The embedding of an RGB photo, on the CPU."""
        height, width = resized_size(photo.shape[0], photo.shape[1], EMBEDDING_SHORT_SIDE, EMBEDDING_LONG_SIDE_MAX)
        resized = resize_photo(photo, height, width).copy()
        pixels = torch.from_numpy(resized).permute(2, 0, 1)[None].to(self._device)
        mean = self._backbone(normalize(pixels)).c5.mean(dim=(0, 2, 3))
        return torch.nn.functional.normalize(mean, dim=0).cpu()


def open_model(path: Path, config: Mapping[str, Any] | None) -> SegmentPhotos | EmbedPhotos:
    """Make a model file ready to answer, on a GPU where there is one.

    Args:
        path: The model file.
        config: `{"predict": ...}`, PredictSettings as JSON; None or without it: the defaults. For segmenters.

    Raises:
        UsageError: As `freesolo.models.model_file.load_model`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(path)
    if model.kind == "backbone":
        return EmbedPhotos(model, device)
    settings = PredictSettings.model_validate_json(json.dumps((config or {}).get("predict", {})))
    return SegmentPhotos(build_segmenter(model), settings, device)


def answer_photos(model: SegmentPhotos | EmbedPhotos, images: Sequence[bytes]) -> list[dict[str, Any]]:
    """One answer an image, in order.

    A segmenter's has, best instance first: `masks` (COCO run-length encodings, counts as text), `boxes`
    (`[x, y, width, height]` in px), `scores` and `category_ids`. A backbone's has `embedding`.

    Args:
        model: From `open_model`.
        images: Photos as files, JPEG or what else `decode_photo` reads.

    Raises:
        ValueError: An image cannot be read; says which, from 0, and why.
    """
    photos = [_decode(index, data) for index, data in enumerate(images)]
    if isinstance(model, EmbedPhotos):
        return [{"embedding": model(photo).tolist()} for photo in photos]
    return [_answer(instances) for instances in model(photos)]


def _decode(index: int, data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    try:
        return decode_photo(data)
    except PhotoError as error:
        raise ValueError(f"image {index}: {error}") from error


def _answer(instances: Instances) -> dict[str, Any]:
    return {
        "masks": encode_rle(instances.masks),
        "boxes": boxes_xywh(instances.masks).tolist(),
        "scores": instances.scores.tolist(),
        "category_ids": instances.category_ids.tolist(),
    }
