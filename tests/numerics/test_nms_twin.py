"""Matrix NMS against a slow twin written from SOLOv2 (arXiv:2003.10152) sec. 3.4, pair by pair."""

import math

import pytest
import torch

from freesolo.ops.nms import matrix_nms, point_nms


def twin_iou(first: set[int], second: set[int]) -> float:
    union = len(first | second)
    return len(first & second) / union if union else 0.0


def twin_matrix_nms(
    masks: torch.Tensor, scores: torch.Tensor, categories: torch.Tensor, sigma: float, kernel: str
) -> list[float]:
    """For each mask j: the minimum over better-scored masks i of its category of f(IoU_ij) / f(compensate_i)."""
    pixels = [set(mask.flatten().nonzero().flatten().tolist()) for mask in masks]
    better = {
        j: [
            i
            for i in range(len(pixels))
            if categories[i] == categories[j] and (scores[i] > scores[j] or (scores[i] == scores[j] and i < j))
        ]
        for j in range(len(pixels))
    }
    compensate = {j: max([twin_iou(pixels[i], pixels[j]) for i in better[j]], default=0.0) for j in better}

    def ratio(i: int, j: int) -> float:
        iou = twin_iou(pixels[i], pixels[j])
        if kernel == "gaussian":
            return math.exp(-sigma * iou**2) / math.exp(-sigma * compensate[i] ** 2)
        # A fully suppressed mask does not suppress.
        return math.inf if compensate[i] == 1.0 else (1 - iou) / (1 - compensate[i])

    return [scores[j].item() * min([ratio(i, j) for i in better[j]], default=1.0) for j in range(len(pixels))]


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("seed", range(6))
def test_matrix_nms_equals_its_twin(kernel: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    count = (0, 1, 2, 7, 15, 30)[seed]
    masks = torch.rand(count, 3, 4, generator=generator) > 0.5
    if count > 6:
        masks[4], masks[5], masks[6] = masks[1], masks[2], False  # duplicates and an empty mask
    # Few distinct scores, so that ties are common.
    scores = torch.randint(1, 6, (count,), generator=generator) / 5
    categories = torch.randint(0, 2, (count,), generator=generator)
    decayed = matrix_nms(masks, scores, categories, sigma=1.5, kernel=kernel)
    expected = twin_matrix_nms(masks, scores, categories, 1.5, kernel)
    torch.testing.assert_close(decayed, torch.tensor(expected).reshape(count))
    assert (decayed <= scores).all()


@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_point_nms_equals_its_twin(side: int):
    scores = torch.randint(0, 9, (2, 3, side, side), generator=torch.Generator().manual_seed(side)) / 8
    expected = torch.zeros_like(scores)
    for image in range(2):
        for category in range(3):
            for row in range(side):
                for column in range(side):
                    window = [(row, column), (row - 1, column), (row, column - 1), (row - 1, column - 1)]
                    values = [scores[image, category, r, c] for r, c in window if r >= 0 and c >= 0]
                    if scores[image, category, row, column] == max(values):
                        expected[image, category, row, column] = scores[image, category, row, column]
    assert torch.equal(point_nms(scores), expected)
