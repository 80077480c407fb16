"""What an extraction's actor holds: Free Mask on the map that the settings name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freesolo.freemask.algorithm import free_masks
from freesolo.inference.labellers import FreeMaskLabeller
from freesolo.models.resnet import ResNet, build_resnet
from freesolo.models.weights import backbone_state_dict
from freesolo.ops.images import normalize
from freesolo.settings import ExtractSettings, FreeMaskSettings
from freesolo.types import ImageBatch


@pytest.fixture(scope="module")
def backbone() -> ResNet:
    network = build_resnet("resnet18").initialise(torch.Generator().manual_seed(3))
    for name, buffer in network.named_buffers():  # statistics that evaluation mode must use
        if name.endswith("running_mean"):
            buffer.fill_(0.1)
    return network


@pytest.mark.parametrize("level", [3, 4, 5])
def test_instances_are_free_masks_of_the_map_that_is_asked_for(backbone: ResNet, level: int) -> None:
    masks = FreeMaskSettings(feature_level=level, min_maskness=0.5, max_instances=6, embedding_channels=16)
    pixels = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageBatch(pixels, torch.tensor([[96, 128], [96, 128]]), (4, 9))
    sizes = [(96, 128), (48, 64)]

    found = FreeMaskLabeller(
        ExtractSettings(backbone="resnet18", free_mask=masks), backbone_state_dict(backbone), torch.device("cpu")
    )(images, sizes)

    with torch.no_grad():
        maps = backbone.eval()(normalize(pixels))
    features = {3: maps.c3, 4: maps.c4, 5: maps.c5}[level]
    for instances, size, expected in zip(found, sizes, free_masks(features, sizes, masks), strict=True):
        assert len(instances) == len(expected) > 0
        assert all(each.rle["size"] == list(size) for each in instances)
        # A pixel at the threshold may fall on either side: the labeller's memory format orders sums otherwise.
        boxes = torch.tensor([each.bbox_xywh for each in instances])
        assert (boxes - expected.masks.projections().boxes_xywh()).abs().max() <= 1
        assert sum(a == b.rle for a, b in zip(expected.masks.encode_rle(), instances, strict=True)) >= len(expected) / 2
        torch.testing.assert_close(
            torch.tensor([each.score for each in instances]), expected.scores, rtol=1e-3, atol=1e-4
        )
        stored = torch.from_numpy(np.stack([each.embedding for each in instances])).float()
        torch.testing.assert_close(stored, expected.embeddings, rtol=1e-2, atol=2e-3)
        assert {each.category_id for each in instances} == {0}
