"""Colour similarity and the pairwise loss against slow twins written from BoxInst (arXiv:2012.02310) sec. 3.2."""

import math

import pytest
import torch

from freesolo.ops.affinity import colour_similarity, pairwise_affinity_loss, pairwise_affinity_terms, rgb_to_lab

STEPS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def twin_lab(rgb: list[float]) -> list[float]:
    """sRGB (IEC 61966-2-1) to CIE XYZ to CIE Lab, white D65, for one pixel in 0..255."""
    linear = []
    for value in rgb:
        v = value / 255
        linear.append(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4)
    matrix = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    white = [0.95047, 1.0, 1.08883]
    fx, fy, fz = (
        t ** (1 / 3) if t > (6 / 29) ** 3 else t * (29 / 6) ** 2 / 3 + 4 / 29
        for t in (
            sum(m * v for m, v in zip(row, linear, strict=True)) / w for row, w in zip(matrix, white, strict=True)
        )
    )
    return [116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)]


def twin_similarity(
    pixels: torch.Tensor, size: tuple[int, int], stride: int, dilation: int, bottom: int
) -> list[list[list[float]]]:
    """One image: average each block, then compare each usable block with each usable neighbour."""
    rows, columns = pixels.shape[1] // stride, pixels.shape[2] // stride
    lab, usable = {}, {}
    for r in range(rows):
        for c in range(columns):
            block = pixels[:, r * stride : (r + 1) * stride, c * stride : (c + 1) * stride].double()
            lab[r, c] = twin_lab(block.mean(dim=(1, 2)).tolist())
            usable[r, c] = (r + 1) * stride <= size[0] - bottom and (c + 1) * stride <= size[1]
    result = [[[0.0] * columns for _ in range(rows)] for _ in STEPS]
    for k, (dr, dc) in enumerate(STEPS):
        for (r, c), colour in lab.items():
            other = (r + dr * dilation, c + dc * dilation)
            if other in lab and usable[r, c] and usable[other]:
                result[k][r][c] = math.exp(-math.dist(colour, lab[other]) / 2)
    return result


@pytest.mark.parametrize("value", [0, 1, 5, 10, 11, 30, 128, 254, 255])
def test_lab_equals_its_twin(value: int):
    for colour in ([value] * 3, [value, 200, 3], [0, value, 255], [77, 0, value]):
        lab = rgb_to_lab(torch.tensor(colour, dtype=torch.uint8)[:, None, None]).flatten()
        torch.testing.assert_close(lab, torch.tensor(twin_lab(colour)), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("stride", "dilation", "bottom"), [(4, 2, 10), (2, 1, 3), (1, 3, 0)])
def test_colour_similarity_equals_its_twin(stride: int, dilation: int, bottom: int):
    generator = torch.Generator().manual_seed(stride)
    height, width = 28, 20
    # Nearly grey, so that similarities are not all close to 0.
    pixels = (120 + 12 * torch.rand(2, 3, height, width, generator=generator)).round().to(torch.uint8)
    sizes = [(28, 17), (23, 20)]
    valid = torch.zeros(2, height, width, dtype=torch.bool)
    for image, (rows, columns) in enumerate(sizes):
        valid[image, :rows, :columns] = True
    similarity = colour_similarity(pixels, valid, stride=stride, dilation=dilation, bottom_rows_ignored=bottom)
    for image, size in enumerate(sizes):
        expected = torch.tensor(twin_similarity(pixels[image], size, stride, dilation, bottom))
        assert (expected > 0.3).any()
        torch.testing.assert_close(similarity[image], expected, atol=2e-4, rtol=0)


def test_pooled_similarity_is_symmetric():
    pixels = 100 + 20 * torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    similarity = colour_similarity(pixels, torch.ones(1, 24, 24, dtype=torch.bool))[0]
    for k, (dr, dc) in enumerate(STEPS):
        for row in range(2, 4):
            for column in range(2, 4):
                there = similarity[7 - k, row + 2 * dr, column + 2 * dc]
                assert similarity[k, row, column] == there


def twin_pairwise(
    logits: torch.Tensor, similarity: torch.Tensor, region: torch.Tensor, threshold: float, dilation: int
) -> tuple[float, int]:
    """One mask: for each pixel of the region and each similar neighbour, -log P(both in or both out)."""
    rows, columns = logits.shape
    total, pairs = 0.0, 0
    for r in range(rows):
        for c in range(columns):
            for k, (dr, dc) in enumerate(STEPS):
                r2, c2 = r + dr * dilation, c + dc * dilation
                if not (0 <= r2 < rows and 0 <= c2 < columns and region[r, c] and similarity[k, r, c] >= threshold):
                    continue
                a, b = (1 / (1 + math.exp(-logits[p].item())) for p in ((r, c), (r2, c2)))
                total -= math.log(a * b + (1 - a) * (1 - b))
                pairs += 1
    return total, pairs


@pytest.mark.parametrize("whole_maps", [False, True])
@pytest.mark.parametrize("extent", [(1, 1), (2, 7), (6, 5), (9, 12)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_pairwise_loss_equals_its_twin(extent: tuple[int, int], dilation: int, whole_maps: bool):
    generator = torch.Generator().manual_seed(dilation)
    # Similarities without symmetry: each end of a pair has its own.
    maps = torch.rand(2, 8, *extent, generator=generator)
    index = torch.tensor([0, 1, 1])
    logits = 3 * torch.randn(3, *extent, generator=generator)
    region = torch.rand(3, *extent, generator=generator) > 0.3
    region[0, :, extent[1] // 2 :] = region[1, 1:] = region[1, :, :-1] = False  # the left half, and a corner
    terms = pairwise_affinity_terms(
        logits, maps, index, region, min_similarity=0.4, dilation=dilation, whole_maps=whole_maps
    )
    expected = [twin_pairwise(logits[n], maps[index[n]], region[n], 0.4, dilation) for n in range(3)]
    torch.testing.assert_close(terms.loss_sum, torch.tensor([total for total, _ in expected]))
    assert terms.pair_count.tolist() == [pairs for _, pairs in expected]
    loss = pairwise_affinity_loss(logits, maps[index], region, min_similarity=0.4, dilation=dilation)
    pairs = max(1, sum(count for _, count in expected))
    torch.testing.assert_close(loss, torch.tensor(sum(total for total, _ in expected) / pairs))


def test_pairwise_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(0)
    maps, region = torch.rand(1, 8, 3, 4, generator=generator), torch.ones(1, 3, 4, dtype=torch.bool)
    logits = torch.randn(1, 3, 4, generator=generator).requires_grad_()
    pairwise_affinity_loss(logits, maps, region, dilation=1).backward()
    for row, column in ((0, 0), (1, 2), (2, 3)):
        ends = []
        for step in (1e-3, -1e-3):
            moved = logits.detach().double()[0].clone()
            moved[row, column] += step
            total, pairs = twin_pairwise(moved, maps[0], region[0], 0.3, 1)
            ends.append(total / pairs)
        slope = (ends[0] - ends[1]) / 2e-3
        assert logits.grad[0, row, column].item() == pytest.approx(slope, abs=1e-5)
