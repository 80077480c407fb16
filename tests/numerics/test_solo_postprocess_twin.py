"""Post-processing against a slow twin written from SOLOv2 (arXiv:2003.10152) sec. 3.3, in loops over cells, pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from freesolo.settings import InferenceSettings
from freesolo.solo import postprocess
from freesolo.solo.heads.solov2 import SoloV2Head, SoloV2Predictions
from freesolo.solo.postprocess import instances_from_predictions
from tests.small import small_solo

MODEL = small_solo(num_categories=2, embedding_channels=3, grid_sizes=(5, 4, 3, 2, 1))
CELLS = 25 + 16 + 9 + 4 + 1
HEIGHT, WIDTH = 32, 64


@dataclass
class Proposal:
    """A cell's mask on its way through the steps."""

    cell: int
    category: int
    score: float
    soft: np.ndarray

    def binary(self, threshold: float) -> np.ndarray:
        return self.soft > threshold


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def twin_proposals(one: SoloV2Predictions, settings: InferenceSettings) -> list[Proposal]:
    """Point NMS, least category score, masks, least size, maskness; for a batch of one image."""
    proposals = []
    first = 0
    for size, stride in zip(MODEL.grid_sizes, MODEL.strides, strict=True):
        for category in range(MODEL.num_categories):
            grid = one.category_logits[0, category, first : first + size * size].view(size, size).tolist()
            for row in range(size):
                for column in range(size):
                    window = [(row, column), (row - 1, column), (row, column - 1), (row - 1, column - 1)]
                    best = max(grid[r][c] for r, c in window if r >= 0 and c >= 0)
                    score = sigmoid(grid[row][column])
                    if grid[row][column] < best or score <= settings.min_category_score:
                        continue
                    cell = first + row * size + column
                    kernel = one.kernels[0, :, cell].double().numpy()
                    logits = np.tensordot(kernel, one.mask_features[0].double().numpy(), axes=1)
                    soft = np.vectorize(sigmoid)(logits)
                    inside = soft[soft > settings.mask_threshold]
                    if len(inside) >= stride:
                        proposals.append(Proposal(cell, category, score * inside.mean(), soft))
        first += size * size
    return sorted(proposals, key=lambda proposal: -proposal.score)[: settings.max_before_nms]


def twin_matrix_nms(proposals: list[Proposal], threshold: float, sigma: float) -> None:
    """Decay in place; sorted by score."""

    def iou(i: int, j: int) -> float:
        if proposals[i].category != proposals[j].category:
            return 0.0
        a, b = proposals[i].binary(threshold), proposals[j].binary(threshold)
        return float((a & b).sum() / max((a | b).sum(), 1))

    compensate = [max((iou(k, i) for k in range(i)), default=0.0) for i in range(len(proposals))]
    decays = [
        min((math.exp(-sigma * (iou(i, j) ** 2 - compensate[i] ** 2)) for i in range(j)), default=1.0)
        for j in range(len(proposals))
    ]
    for proposal, decay in zip(proposals, decays, strict=True):
        proposal.score *= decay


def twin_resize(soft: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear between pixel centres, the border repeated."""
    rows, columns = soft.shape
    result = np.zeros((height, width))
    for r in range(height):
        for c in range(width):
            y = min(max((r + 0.5) * rows / height - 0.5, 0), rows - 1)
            x = min(max((c + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = soft[top, left] * (1 - (x - left)) + soft[top, right] * (x - left)
            lower = soft[bottom, left] * (1 - (x - left)) + soft[bottom, right] * (x - left)
            result[r, c] = upper * (1 - (y - top)) + lower * (y - top)
    return result


def random_predictions(seed: int) -> SoloV2Predictions:
    """Blobs: features are smooth bumps, so that masks overlap, some are tiny and some empty."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(16.0), indexing="ij")
    centres = torch.rand(2, 32, 2, generator=generator) * torch.tensor([8.0, 16.0])
    distance = (y - centres[..., 0, None, None]) ** 2 + (x - centres[..., 1, None, None]) ** 2
    features = torch.exp(-distance / 6)
    features[:, 0] = -0.3  # a bias
    kernels = torch.zeros(2, 32, CELLS)
    kernels[:, 0] = 1 + torch.rand(2, CELLS, generator=generator)
    for cell in range(CELLS):
        kernels[:, 1 + cell % 31, cell] = 4 * torch.rand(2, generator=generator)
    return SoloV2Predictions(
        category_logits=2 * torch.randn(2, 2, CELLS, generator=generator) - 1,
        kernels=kernels,
        embeddings=torch.randn(2, 3, CELLS, generator=generator),
        mask_features=features,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings",
    [
        InferenceSettings(),
        InferenceSettings(min_category_score=0.3, max_before_nms=12, min_score=0.2, max_instances=5, nms_sigma=0.5),
    ],
)
def test_instances_equal_their_twin(settings: InferenceSettings, seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(postprocess, "MASKS_AT_ONCE", 7)
    predictions = random_predictions(seed)
    sizes, originals = [(29, 64), (32, 41)], [(58, 128), (24, 37)]
    found = instances_from_predictions(SoloV2Head(MODEL), predictions, torch.tensor(sizes), originals, settings, MODEL)
    assert len(found) == 2
    for one, instances, size, original in zip(predictions.each_image(), found, sizes, originals, strict=True):
        proposals = twin_proposals(one, settings)
        twin_matrix_nms(proposals, settings.mask_threshold, settings.nms_sigma)
        proposals = sorted(proposals, key=lambda proposal: -proposal.score)[: settings.max_instances]
        expected = []
        for proposal in proposals:
            padded = twin_resize(proposal.soft, HEIGHT, WIDTH)[: size[0], : size[1]]
            mask = twin_resize(padded, *original) > 0.5
            if proposal.score >= settings.min_score and mask.any():
                expected.append((proposal, mask))
        assert len(instances) == len(expected) > 0
        assert instances.masks.shape == (len(expected), *original)
        assert instances.category_ids.tolist() == [proposal.category for proposal, _ in expected]
        assert instances.scores.tolist() == pytest.approx([proposal.score for proposal, _ in expected], rel=1e-4)
        assert not instances.image_index.any()
        for (proposal, mask), got, embedding in zip(expected, instances.masks, instances.embeddings, strict=True):
            # A pixel whose soft value is 0.5 to within float32 may fall to either side.
            assert (torch.from_numpy(mask) != got).float().mean() < 0.002
            vector = one.embeddings[0, :, proposal.cell]
            torch.testing.assert_close(embedding, vector / vector.norm())


def test_the_cases_need_every_step():
    settings = InferenceSettings()
    for seed in range(4):
        image = random_predictions(seed).each_image()[0]
        proposals = twin_proposals(image, settings)
        assert len(proposals) < (image.category_logits.sigmoid() > settings.min_category_score).sum()
        before = [proposal.score for proposal in proposals]
        twin_matrix_nms(proposals, settings.mask_threshold, settings.nms_sigma)
        decays = [proposal.score / score for proposal, score in zip(proposals, before, strict=True)]
        assert min(decays) < 0.5
        assert max(decays[1:]) > 0.5
