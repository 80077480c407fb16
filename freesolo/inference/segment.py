"""A trained segmenter applied to photos: one path for batch prediction, the command line and the served model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from freesolo.models.model_file import ModelFile, load_model
from freesolo.ops.images import normalize, pad_to_batch
from freesolo.ops.sizes import resized_size
from freesolo.settings import PredictSettings, SoloModelSettings
from freesolo.solo.model import INPUT_DIVISOR, Segmenter
from freesolo.solo.postprocess import instances_from_predictions
from freesolo.types import ImageBatch, Instances

Photo = UInt8[np.ndarray, "_ _ 3"]  # height and width of its own


def build_segmenter(model: ModelFile) -> Segmenter:
    """The network of a model file with its weights, in evaluation mode, on the CPU.

    Args:
        model: Of kind "segmenter".
    """
    settings = SoloModelSettings.model_validate_json(json.dumps(dict(model.settings)))
    segmenter = Segmenter(settings)
    segmenter.load_state_dict(dict(model.state_dict))
    return segmenter.eval()


class SegmentPhotos:
    """A segmenter on a device, from photos to instances.

    A photo's instances do not depend on the photos that it comes with: only photos of one padded extent share a
    forward pass.
    """

    def __init__(self, segmenter: Segmenter, settings: PredictSettings, device: torch.device | str = "cpu") -> None:
        """Move the network to its device.

        Args:
            segmenter: Trained; put in evaluation mode.
            settings: Input size, thresholds, photos of a forward pass at most.
            device: Where to compute. On a GPU the network runs in bfloat16.
        """
        self._settings = settings
        self._device = torch.device(device)
        self._segmenter = segmenter.eval().to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def from_file(cls, path: Path, settings: PredictSettings, device: torch.device | str = "cpu") -> SegmentPhotos:
        """Read the model from its file.

        Raises:
            UsageError: As `freesolo.models.model_file.load_model`.
        """
        return cls(build_segmenter(load_model(path, "segmenter")), settings, device)

    def __call__(self, photos: Sequence[Photo]) -> list[Instances]:
        """The instances of each photo, best first, masks at its own size; empty where nothing was found.

        Args:
            photos: RGB, of any sizes; may be none.
        """
        resized = [self._resize(photo) for photo in photos]
        found: dict[int, Instances] = {}
        for group in self._groups(resized):
            pixels, sizes = pad_to_batch([resized[index] for index in group], INPUT_DIVISOR)
            batch = ImageBatch(pixels, sizes, image_ids=tuple(group))
            originals = [(photos[index].shape[0], photos[index].shape[1]) for index in group]
            found.update(zip(group, self.segment(batch, originals), strict=True))
        return [found[index] for index in range(len(photos))]

    @torch.inference_mode()
    def segment(self, images: ImageBatch, original_sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """The instances of each image of a batch, best first, masks at its original size.

        Args:
            images: Resized to the settings' input size and padded to one extent, divisible by 32; on any device.
            original_sizes: Height and width of each photo as it is stored.

        Returns:
            One record an image, `image_index` all 0; empty where nothing was found.
        """
        pixels = normalize(images.pixels.to(self._device, non_blocking=True))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            predictions = self._segmenter(pixels.contiguous(memory_format=torch.channels_last))
            instances = instances_from_predictions(
                self._segmenter.head,
                predictions,
                images.sizes,
                original_sizes,
                self._settings.inference,
                self._segmenter.settings,
            )
        return [_without_wide(one, self._settings.max_width) for one in instances]

    def _resize(self, photo: Photo) -> UInt8[Tensor, "3 h w"]:
        # Here, because what is at its size already is segmented where no photo can be resized.
        from freesolo.data.resizing import resize_photo

        settings = self._settings
        height, width = resized_size(photo.shape[0], photo.shape[1], settings.short_side, settings.long_side_max)
        return torch.from_numpy(resize_photo(photo, height, width).copy()).permute(2, 0, 1)

    def _groups(self, images: Sequence[Tensor]) -> list[list[int]]:
        """Indices of images that share a forward pass."""
        by_extent: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            extent = tuple(-(-side // INPUT_DIVISOR) for side in image.shape[1:])
            by_extent.setdefault(extent, []).append(index)
        size = self._settings.batch_size
        return [
            indices[start : start + size] for indices in by_extent.values() for start in range(0, len(indices), size)
        ]


def _without_wide(instances: Instances, max_width: float) -> Instances:
    """Drop masks on `max_width` of the columns or more: background, as a rule; 1 drops none.

    Source: FreeSOLO (arXiv:2202.12181), the released code's filter of pseudo-labels.
    """
    if max_width >= 1.0:
        return instances
    columns = instances.masks.any(dim=1).sum(dim=1)
    return instances[columns < max_width * instances.masks.shape[2]]
