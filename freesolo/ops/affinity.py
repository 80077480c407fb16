"""Colour affinity of neighbouring pixels, and the loss by which masks follow it (BoxInst, arXiv:2012.02310, sec. 3.2).

Legend of shapes beyond that of `freesolo.types`:
    K     neighbours of a pixel: 8, the 3 x 3 window without its centre, in row order; k and K - 1 - k are opposite
    h, w  height and width at stride 4
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from freesolo.ops.masks import boxes_xyxy

NEIGHBOURS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0))
"""Steps `(rows, columns)` to the K neighbours, in units of the dilation."""

_FORWARD = range(len(NEIGHBOURS) // 2, len(NEIGHBOURS))
"""Half of them, of which each pair has one."""

_WHITE_D65 = (0.95047, 1.0, 1.08883)
_BRIGHTNESS_STEP = 0.008856  # below it CIE Lab is linear
_GAMMA_STEP = 0.04045  # below it sRGB is linear


@dataclass(frozen=True, slots=True)
class PairwiseTerms:
    """What the pairwise loss sums, before any mean is taken.

    Attributes:
        loss_sum: Sum over the selected pairs of each instance, `(N,)`.
        pair_count: How many pairs were selected, `(N,)`; float, so that workers can add it up with `loss_sum`.
    """

    loss_sum: Float[Tensor, " N"]
    pair_count: Float[Tensor, " N"]


def rgb_to_lab(pixels: Shaped[Tensor, "*batch 3 H W"]) -> Float[Tensor, "*batch 3 H W"]:
    """CIE Lab (D65, 2 degrees) of sRGB pixels in 0..255: L in 0..100, a and b about -128..127.

    Written out channel by channel, so that neither autocast nor TF32 lowers its precision.
    """
    encoded = pixels.float() / 255.0
    linear = torch.where(encoded > _GAMMA_STEP, ((encoded + 0.055) / 1.055) ** 2.4, encoded / 12.92)
    red, green, blue = linear.unbind(dim=-3)
    x = 0.412453 * red + 0.357580 * green + 0.180423 * blue
    y = 0.212671 * red + 0.715160 * green + 0.072169 * blue
    z = 0.019334 * red + 0.119193 * green + 0.950227 * blue
    response_x, response_y, response_z = (
        _lab_response(tristimulus / white) for tristimulus, white in zip((x, y, z), _WHITE_D65, strict=True)
    )
    return torch.stack(
        (116.0 * response_y - 16.0, 500.0 * (response_x - response_y), 200.0 * (response_y - response_z)), dim=-3
    )


def colour_similarity(
    pixels: Shaped[Tensor, "B 3 H W"],
    valid_pixels: Bool[Tensor, "B H W"],
    *,
    stride: int = 4,
    dilation: int = 2,
    bottom_rows_ignored: int = 10,
) -> Float[Tensor, "B K h w"]:
    """How alike in colour each pixel of the down-scaled image and its neighbours are: `exp(-||Lab_a - Lab_b|| / 2)`.

    Source: BoxInst (arXiv:2012.02310) sec. 3.2 and its released settings, as used by FreeSOLO (arXiv:2202.12181).

    Args:
        pixels: RGB in 0..255, not normalised; H and W multiples of `stride`.
        valid_pixels: False in the padding.
        stride: The image is average-pooled by it.
        dilation: Distance to the neighbours, in pooled pixels.
        bottom_rows_ignored: Rows at the bottom of each image, in rows of `pixels`, whose pairs do not count: COCO's
            outlines are often missing there.

    Returns:
        Similarity in [0, 1], h = H / stride; 0 for a pair with an end in the padding (a pooled pixel with any padding
        in it), in the ignored rows or outside the map. Symmetric: where neighbour k of pixel a is b,
        neighbour K - 1 - k of b is a, with the same value.

    Raises:
        ValueError: If H or W is not a multiple of `stride`.
    """
    height, width = pixels.shape[-2:]
    if height % stride or width % stride:
        raise ValueError(f"an image of {height} x {width} is not a whole number of {stride} x {stride} blocks: pad it")
    # Deviation: BoxInst counts its bottom rows in the photo's own pixels and scales them by the resize; these are rows
    # of the resized image, because a batch does not carry the photo's size.
    usable = _without_bottom_rows(valid_pixels, bottom_rows_ignored)
    lab = rgb_to_lab(functional.avg_pool2d(pixels.float(), stride))
    whole_blocks = functional.avg_pool2d(usable.float()[:, None], stride)[:, 0] == 1.0
    similarity = lab.new_zeros(lab.shape[0], len(NEIGHBOURS), *lab.shape[2:])
    for direction in _FORWARD:
        a, b = _pair_ends(NEIGHBOURS[direction], whole_blocks, dilation)
        # Channel by channel: a norm over them reads memory in strides.
        squares = [(channel[a] - channel[b]).square() for channel in lab.unbind(dim=1)]
        alike = torch.exp(-0.5 * (squares[0] + squares[1] + squares[2]).sqrt()) * (whole_blocks[a] & whole_blocks[b])
        similarity[:, direction][a] = alike
        similarity[:, _opposite(direction)][b] = alike
    return similarity


def pairwise_affinity_loss(
    mask_logits: Float[Tensor, "N H W"],
    similarity: Float[Tensor, "N K H W"],
    region: Bool[Tensor, "N H W"],
    *,
    min_similarity: float = 0.3,
    dilation: int = 2,
) -> Float[Tensor, ""]:
    """Encourage neighbouring pixels of similar colour to share a mask label.

    Source: BoxInst (arXiv:2012.02310) sec. 3.2, as used by FreeSOLO (arXiv:2202.12181) sec. 3.2. Where masks
    share an image, or the mean is taken otherwise, use `pairwise_affinity_terms`.

    Args:
        mask_logits: Masks before the sigmoid, at stride 4. N may be 0.
        similarity: Colour similarity in [0, 1] to each of the K neighbours, same stride.
        region: Pixels that may contribute (inside the coarse box).
        min_similarity: Pairs below it are ignored.
        dilation: Distance to the neighbours, as it was for `similarity`.

    Returns:
        Mean over the selected pairs; 0, with a gradient, where none is selected.

    Raises:
        ValueError: If shapes disagree.
    """
    own_map = torch.arange(similarity.shape[0], device=similarity.device)
    terms = pairwise_affinity_terms(
        mask_logits, similarity, own_map, region, min_similarity=min_similarity, dilation=dilation
    )
    return terms.loss_sum.sum() / terms.pair_count.sum().clamp(min=1.0)


def pairwise_affinity_terms(
    mask_logits: Float[Tensor, "N H W"],
    similarity: Float[Tensor, "B K H W"],
    image_index: Int64[Tensor, " N"],
    region: Bool[Tensor, "N H W"],
    *,
    min_similarity: float = 0.3,
    dilation: int = 2,
    whole_maps: bool | None = None,
) -> PairwiseTerms:
    """The sums of `pairwise_affinity_loss` per instance, for instances that share their images' similarity maps.

    `-log P(same label)`, `P = m_a m_b + (1 - m_a)(1 - m_b)`, is the same seen from either end of a pair, so four of the
    eight directions are computed, each weighted by how many of its ends select it. No `(N, K, H, W)` tensor is made.

    Args:
        mask_logits: Masks before the sigmoid, at stride 4. N may be 0.
        similarity: One map an image, from `colour_similarity`. Pairs that leave the map never count.
        image_index: The map that each instance uses.
        region: Pixels whose pairs may contribute.
        min_similarity: Pairs below it are ignored.
        dilation: Distance to the neighbours, as it was for `similarity`.
        whole_maps: Work on whole maps, for which nothing need be known on the host; None: on windows around the
            regions where that waits for nothing, on the CPU.

    Returns:
        Sums and counts, always in float32; both 0 for an instance that selects no pair. Sums carry a gradient.

    Raises:
        ValueError: If shapes disagree.
    """
    _check_shapes(mask_logits, similarity, image_index, region)
    similar = similarity >= min_similarity
    whole = region.device.type != "cpu" if whole_maps is None else whole_maps
    windows = (_Window.whole(region),) if whole else _windows(region, dilation)
    return PairwiseTerms(
        *_PairSums.apply(  # type: ignore[no-untyped-call]
            mask_logits.float(), similar, image_index, region, windows, dilation
        )
    )


@dataclass(frozen=True, slots=True)
class _Window:
    """A part of some maps, of one size, in each in a place of its own.

    Attributes:
        index: Which maps, `(G,)`.
        rows: Of the part, `(G, h, 1)`.
        columns: Of the part, `(G, 1, w)`.
    """

    index: Int64[Tensor, " G"]
    rows: Int64[Tensor, "_ h 1"]
    columns: Int64[Tensor, "_ 1 w"]

    @classmethod
    def whole(cls, maps: Shaped[Tensor, "N H W"]) -> _Window:
        """All of the maps."""
        count, height, width = (torch.arange(size, device=maps.device) for size in maps.shape)
        return cls(count, height[None, :, None], width[None, None, :])

    @property
    def place(self) -> tuple[Tensor, Tensor, Tensor]:
        """What indexes maps."""
        return self.index[:, None, None], self.rows, self.columns


_MAPS_AT_ONCE = 16
"""In a window. Fewer waste less on maps whose regions are smaller, and cost more calls."""


def _windows(region: Bool[Tensor, "N H W"], dilation: int) -> tuple[_Window, ...]:
    """Windows that hold every pair with an end in the regions, those of a size together."""
    extent = torch.tensor([region.shape[2], region.shape[1]])
    boxes = boxes_xyxy(region).long()
    low = (boxes[:, :2] - dilation).clamp(min=0)
    sizes = torch.minimum(boxes[:, 2:] + dilation, extent) - low
    windows = []
    for index in sizes.prod(dim=1).argsort().split(_MAPS_AT_ONCE) if len(region) else ():
        size = sizes[index].amax(dim=0)
        left, top = torch.minimum(low[index], extent - size)[:, :, None, None].unbind(dim=1)
        width, height = size.tolist()
        windows.append(_Window(index, top + torch.arange(height)[:, None], left + torch.arange(width)))
    return tuple(windows)


class _PairSums(torch.autograd.Function):
    """What `pairwise_affinity_terms` gives, with its gradient written out.

    With `m = sigmoid(x)` and `s = sigmoid(x_a + x_b)`, the probability that both are inside given that they are alike,
    `d(-log P) / dx_a = m_a - s`. Autograd would keep and fill a whole map for each window of each term.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        similar: Tensor,
        image_index: Tensor,
        region: Tensor,
        windows: tuple[_Window, ...],
        dilation: int,
    ) -> tuple[Tensor, Tensor]:
        loss_sum, pair_count = logits.new_zeros(2, logits.shape[0]).unbind()
        saved = []
        for window in windows:
            x, near = logits[window.place], region[window.place]
            images = image_index[window.index][:, None, None]
            inside, outside = functional.logsigmoid(x), functional.logsigmoid(-x)
            saved.append(x)
            for direction in _FORWARD:
                a, b = _pair_ends(NEIGHBOURS[direction], x, dilation)
                chosen_by_a = similar[images, direction, window.rows, window.columns][a] & near[a]
                chosen_by_b = similar[images, _opposite(direction), window.rows, window.columns][b] & near[b]
                weight = chosen_by_a.byte() + chosen_by_b
                log_same = torch.logaddexp(inside[a] + inside[b], outside[a] + outside[b])
                loss_sum[window.index] -= (log_same * weight).sum(dim=(1, 2))
                pair_count[window.index] += weight.sum(dim=(1, 2))
                saved.append(weight)
        ctx.save_for_backward(*saved)
        ctx.windows, ctx.shape, ctx.dilation = windows, logits.shape, dilation
        ctx.mark_non_differentiable(pair_count)
        return loss_sum, pair_count

    @staticmethod
    def backward(ctx: Any, *of_sums: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        saved = iter(ctx.saved_tensors)
        gradient = of_sums[0].new_zeros(ctx.shape)
        for window in ctx.windows:
            x = next(saved)
            inside, of_window = x.sigmoid(), torch.zeros_like(x)
            for direction in _FORWARD:
                a, b = _pair_ends(NEIGHBOURS[direction], x, ctx.dilation)
                weight = next(saved)
                both_inside = (x[a] + x[b]).sigmoid_()
                of_window[a] += (inside[a] - both_inside).mul_(weight)
                of_window[b] += (inside[b] - both_inside).mul_(weight)
            gradient[window.place] = of_window.mul_(of_sums[0][window.index, None, None])
        return gradient, None, None, None, None, None


def _opposite(direction: int) -> int:
    return len(NEIGHBOURS) - 1 - direction


def _lab_response(relative: Tensor) -> Tensor:
    # The clamp only keeps the branch that `where` discards away from 0 ** (1 / 3), whose slope is infinite.
    return torch.where(
        relative > _BRIGHTNESS_STEP,
        relative.clamp(min=_BRIGHTNESS_STEP) ** (1.0 / 3.0),
        7.787 * relative + 16.0 / 116.0,
    )


def _without_bottom_rows(valid: Bool[Tensor, "B H W"], count: int) -> Bool[Tensor, "B H W"]:
    rows = torch.arange(valid.shape[1], device=valid.device)
    image_heights = torch.where(valid.any(dim=2), rows + 1, 0).amax(dim=1)
    return valid & (rows[None, :, None] < (image_heights - count)[:, None, None])


def _along(step: tuple[int, int], maps: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """The step and the map's size along rows, and along columns."""
    return (step[0], maps.shape[-2]), (step[1], maps.shape[-1])


def _pair_ends(
    step: tuple[int, int], maps: Tensor, dilation: int
) -> tuple[tuple[slice, slice, slice], tuple[slice, slice, slice]]:
    """Windows of an `(N, H, W)` map with the first and the second ends of all pairs that lie `step` apart."""
    first, second = [], []
    for way, size in _along(step, maps):
        shift = way * dilation
        first.append(slice(max(0, -shift), max(0, size - max(0, shift))))
        second.append(slice(max(0, shift), max(0, size - max(0, -shift))))
    everything = slice(None)
    return (everything, first[0], first[1]), (everything, second[0], second[1])


def _check_shapes(mask_logits: Tensor, similarity: Tensor, image_index: Tensor, region: Tensor) -> None:
    if region.shape != mask_logits.shape:
        raise ValueError(f"region {tuple(region.shape)} is not of the masks' shape {tuple(mask_logits.shape)}")
    if similarity.shape[-2:] != mask_logits.shape[-2:]:
        raise ValueError(
            f"similarity of {tuple(similarity.shape[-2:])} for masks of {tuple(mask_logits.shape[-2:])}: "
            "both must be at the same stride of the same padded batch"
        )
    if similarity.shape[1] != len(NEIGHBOURS):
        raise ValueError(f"similarity to {similarity.shape[1]} neighbours, need {len(NEIGHBOURS)}")
    if image_index.shape[0] != mask_logits.shape[0]:
        raise ValueError(f"{image_index.shape[0]} map indices for {mask_logits.shape[0]} masks")
