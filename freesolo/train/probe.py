"""A look at a pre-training's backbone as it is: numbers that can be followed during a run, and a picture.

What is computed is in `densecl.probe`, what it is computed on in `data.probe_photos`. Nothing is trained by it: no
gradient, no statistics of batch norm, no randomness that a step uses. A run with looks has the bits of one without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from freesolo.data.augment import contrastive_view
from freesolo.data.probe_photos import PicturedPhoto, ProbePhotos
from freesolo.densecl.model import DenseCL
from freesolo.densecl.probe import cell_hits, knn_hits, retrieval_hits, similarity_map, true_cells
from freesolo.models.resnet import ResNet
from freesolo.ops.images import normalize
from freesolo.report.pictures import contact_sheet, draw_point, draw_similarity
from freesolo.settings import ViewSettings
from freesolo.train.learner import Learner
from freesolo.train.plan import Look

_BATCH = 64  # crops a forward pass

Encode = Callable[[Tensor], Tensor]  # normalised images to maps of features


@dataclass(frozen=True, slots=True)
class Probe:
    """Looks at a `DenseCL` learner, at the weights that would be saved as its model.

    Attributes:
        photos: That it is looked at by; at least one.
        views: The training's, for the colours of the crops.
        seed: Of the colours.
    """

    photos: ProbePhotos
    views: ViewSettings
    seed: int

    def look(self, learner: Learner, inputs: object) -> Look:
        """Everything that there is to see.

        Args:
            learner: Is left as it was.
            inputs: Of the step; nothing is done with them.

        Returns:
            `probe/retrieval_top1`: share of the photos of which a view is nearest to their own other view, by the
            pooled features. `probe/cells_top1`: share of the cells of a view that are matched with the true cell of the
            other, of those that it shows; missing where no two views overlap. `probe/knn_top1`: share of the objects
            that their neighbours classify rightly, and `probe/knn_commonest` what the commonest category would give;
            missing where there are fewer than two objects. `similarity`: to some points of some photos.
        """
        del inputs
        module = learner.best_module()
        assert isinstance(module, DenseCL)
        encode = partial(_features, learner, module.backbone)
        with torch.no_grad(), _evaluating(module.backbone):
            metrics = {**self._views(encode, learner.device), **self._objects(encode, learner.device)}
            return Look(metrics, {"similarity": self._picture(encode, learner.device)})

    def _views(self, encode: Encode, device: torch.device) -> dict[str, float]:
        """Both views get colours as in training, but no flip: then it is known where each cell lies."""
        settings = self.views.model_copy(update={"flip_probability": 0.0})
        generator = torch.Generator().manual_seed(self.seed)
        photos, pooled, hits, cells = self.photos, [], 0, 0
        for rows in _batches(len(photos)):
            query, key = (
                encode(contrastive_view(_tensor(crops[rows], device), settings, generator))
                for crops in (photos.query, photos.key)
            )
            query_boxes, key_boxes = (
                torch.from_numpy(boxes[rows]) for boxes in (photos.query_boxes_xywh, photos.key_boxes_xywh)
            )
            truth = true_cells(query_boxes, key_boxes, query.shape[-1]).to(device)
            hits += int(cell_hits(_unit(query.flatten(2)), _unit(key.flatten(2)), truth).sum())
            cells += int((truth >= 0).sum())
            pooled.append(torch.stack([_unit(query.mean(dim=(2, 3))), _unit(key.mean(dim=(2, 3)))]))
        found = retrieval_hits(*torch.cat(pooled, dim=1)).float().mean()
        return {"probe/retrieval_top1": float(found), **({"probe/cells_top1": hits / cells} if cells else {})}

    def _objects(self, encode: Encode, device: torch.device) -> dict[str, float]:
        if len(self.photos.objects) < 2:
            return {}
        pooled = [
            _unit(encode(normalize(_tensor(self.photos.objects[rows], device))).mean(dim=(2, 3)))
            for rows in _batches(len(self.photos.objects))
        ]
        categories, photos = (torch.from_numpy(numbers) for numbers in (self.photos.categories, self.photos.photos))
        hits = knn_hits(torch.cat(pooled), categories.to(device), photos.to(device))
        commonest = categories.bincount().max() / len(categories)
        return {"probe/knn_top1": float(hits.float().mean()), "probe/knn_commonest": float(commonest)}

    def _picture(self, encode: Encode, device: torch.device) -> UInt8[np.ndarray, "H W 3"]:
        """A row a photo: its points, then the map of each."""
        pictures, captions = [], []
        for photo in self.photos.pictured:
            features = _unit(encode(normalize(_tensor(photo.pixels[None], device))))[0]
            maps = [similarity_map(features, x, y).cpu().numpy() for x, y in photo.points]
            pictures += _drawn(photo, maps)
            captions += [photo.file_name, *(f"cosine {each.min():.2f} to {each.max():.2f}" for each in maps)]
        return contact_sheet(pictures, captions, columns=3)


def _drawn(photo: PicturedPhoto, maps: list[Float[np.ndarray, "h w"]]) -> list[UInt8[np.ndarray, "H W 3"]]:
    marked = photo.pixels
    for point in photo.points:
        marked = draw_point(marked, point)
    maps_drawn = [
        draw_point(draw_similarity(photo.pixels, each), point) for each, point in zip(maps, photo.points, strict=True)
    ]
    return [marked, *maps_drawn]


@contextlib.contextmanager
def _evaluating(backbone: ResNet) -> Iterator[None]:
    """Batch norm by its running statistics, which stay what they are."""
    was_training = backbone.training
    backbone.eval()
    try:
        yield
    finally:
        backbone.train(was_training)


def _features(learner: Learner, backbone: ResNet, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
    """In single precision from here on: cosines of bfloat16 would often be equal."""
    with learner.autocast():
        features: Tensor = backbone(images).c5
    return features.float()


def _unit(vectors: Float[Tensor, "B C *rest"]) -> Float[Tensor, "B C *rest"]:
    return functional.normalize(vectors, dim=1)


def _tensor(pixels: UInt8[np.ndarray, "B H W 3"], device: torch.device) -> UInt8[Tensor, "B 3 H W"]:
    return torch.tensor(pixels, device=device).permute(0, 3, 1, 2).contiguous()


def _batches(count: int) -> Iterator[slice]:
    return (slice(start, start + _BATCH) for start in range(0, count, _BATCH))
