"""The SOLO losses by hand, at their extremes, without positives, with padded slots, in bfloat16."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from freesolo.settings import LossSettings
from freesolo.solo.heads.solov2 import SoloV2Head, SoloV2Predictions
from freesolo.solo.losses import (
    SoftProjections,
    box_regions,
    dice_loss,
    embedding_loss,
    mask_dice_loss,
    max_projection_loss,
    mean_projection_loss,
    sigmoid_focal_loss,
)
from freesolo.solo.supervisions import positives as subject
from freesolo.solo.supervisions.base import LossInputs, Positives
from freesolo.solo.supervisions.boxes import Boxes
from freesolo.solo.supervisions.free_masks import FreeMasks
from freesolo.solo.supervisions.masks import Masks
from freesolo.solo.supervisions.weak_terms import pairwise_warmup
from freesolo.solo.targets import assign_targets
from freesolo.types import GridTargets, ImageBatch, Instances
from tests.small import small_solo

MODEL = small_solo(
    grid_sizes=(4, 3, 2, 2, 1),
    scale_ranges=((1, 8), (6, 12), (10, 20), (16, 32), (24, 64)),
)
CELLS = 16 + 9 + 4 + 4 + 1
HEAD = SoloV2Head(MODEL)
ALL_TERMS = {"category", "max_projection", "mean_projection", "pairwise", "embedding"}


def predictions(batch_size: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> SoloV2Predictions:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=generator).to(dtype).requires_grad_()

    return SoloV2Predictions(random(1, CELLS), random(32, CELLS), random(4, CELLS), random(32, 8, 8))


def columns(record: SoloV2Predictions) -> tuple[torch.Tensor, ...]:
    return (record.category_logits, record.kernels, record.embeddings, record.mask_features)


def instances(*boxes: tuple[int, int, int, int], images: list[int] | None = None) -> Instances:
    masks = torch.zeros(len(boxes), 32, 32, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return Instances(
        image_index=torch.tensor(images or [0] * len(boxes), dtype=torch.int64),
        masks=masks,
        category_ids=torch.zeros(len(boxes), dtype=torch.int64),
        scores=torch.ones(len(boxes)),
        embeddings=functional.normalize(torch.ones(len(boxes), 4), dim=1),
    )


THREE = instances((2, 2, 9, 9), (10, 4, 30, 28), (0, 0, 7, 20), images=[0, 0, 1])


def inputs_of(
    made: SoloV2Predictions, labels: Instances, settings: LossSettings | None = None, **options: object
) -> LossInputs:
    """Grey images, late enough that the pairwise term has its whole weight."""
    targets = assign_targets(labels, len(made), 32, 32, MODEL)
    images = ImageBatch(
        pixels=torch.full((len(made), 3, 32, 32), 120, dtype=torch.uint8),
        sizes=torch.tensor([[32, 32]] * len(made)),
        image_ids=tuple(range(len(made))),
    )
    given = {"positives": Positives.of(targets), "step": 2000} | options
    return LossInputs(
        HEAD, made, targets.categories, given.pop("positives"), images, labels, settings or LossSettings(), **given
    )


def coarse_losses(
    made: SoloV2Predictions, labels: Instances, settings: LossSettings | None = None, **options: object
) -> dict[str, torch.Tensor]:
    return FreeMasks().losses(inputs_of(made, labels, settings, **options))


def right_losses(made: SoloV2Predictions, labels: Instances, **options: object) -> dict[str, torch.Tensor]:
    return Masks().losses(inputs_of(made, labels, **options))


def box_losses(made: SoloV2Predictions, labels: Instances, **options: object) -> dict[str, torch.Tensor]:
    return Boxes().losses(inputs_of(made, Boxes().trusted(labels), **options))


def test_focal_by_hand():
    # Two categories, three cells: one of category 0, one of category 1, one of background; all logits 0, p = 1/2.
    # A cell's own category: 0.25 * (1/2)^2 * log 2; another: 0.75 * (1/2)^2 * log 2.
    own, other = 0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)
    loss = sigmoid_focal_loss(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(loss, torch.tensor([[own + other, own + other, other + other]]))


def test_focal_with_gamma_zero_is_balanced_cross_entropy():
    logits, categories = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 5).long()
    expected = 0.4 * functional.binary_cross_entropy_with_logits(logits, torch.ones(2, 1, 5), reduction="none")[:, 0]
    torch.testing.assert_close(sigmoid_focal_loss(logits, categories, alpha=0.4, gamma=0.0), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_finite_at_extremes(gamma):
    logits = torch.tensor([[[-1e4, -100.0, 0.0, 100.0, 1e4]]]).repeat(2, 1, 1).requires_grad_()
    categories = torch.tensor([[0] * 5, [1] * 5])
    loss = sigmoid_focal_loss(logits, categories, gamma=gamma)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()
    assert loss[0].argmax() == 0
    assert loss[1].argmax() == 4


def test_focal_gradient():
    logits = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    categories = torch.tensor([[0, 1, 2, 2]])
    loss = sigmoid_focal_loss(logits, categories).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    for index in range(8):
        step = torch.zeros(8, dtype=torch.float64)
        step[index] = 1e-2
        ahead, behind = (sigmoid_focal_loss(logits + s * step.view(1, 2, 4), categories).sum() for s in (1, -1))
        assert gradient.flatten()[index].item() == pytest.approx((ahead - behind).item() / 2e-2, abs=2e-3)


def test_dice_by_hand():
    # p = (1, 1/2), q = (1, 0): 1 - 2 * 1 / (1 + 1/4 + 1) = 1/9. Equal: 0. Disjoint: 1.
    p = torch.tensor([[1.0, 0.5], [1.0, 0.0], [0.0, 1.0]])
    q = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    torch.testing.assert_close(dice_loss(p, q), torch.tensor([1 / 9, 0.0, 1.0]))


def test_dice_of_nothing_is_one_with_a_finite_gradient():
    p = torch.zeros(1, 2, 2, requires_grad=True)
    loss = dice_loss(p, torch.zeros(1, 2, 2))
    loss.sum().backward()
    assert loss.item() == 1.0
    assert p.grad.isfinite().all()
    assert dice_loss(torch.zeros(0, 2, 2), torch.zeros(0, 2, 2)).shape == (0,)


def test_max_projections_by_hand():
    # p: rows' maxima (1, 1/2), columns' (1, 1/2). q: rows' (1, 0), columns' (1, 1).
    # Rows: 1 - 2 * 1 / (1.25 + 1) = 1/9. Columns: 1 - 2 * 1.5 / (1.25 + 2) = 1/13.
    p, q = torch.tensor([[[1.0, 0.5], [0.5, 0.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    loss = max_projection_loss(SoftProjections.of(p), SoftProjections.of(q))
    torch.testing.assert_close(loss, torch.tensor([1 / 9 + 1 / 13]))


def test_mean_projections_by_hand():
    # p: rows' means (3/4, 1/4), columns' (3/4, 1/4). q: rows' (1, 0), columns' (1/2, 1/2).
    # Rows: 1 - 2 * 3/4 / (10/16 + 1) = 1/13. Columns: 1 - 2 * 1/2 / (10/16 + 1/2) = 1/9.
    p, q = torch.tensor([[[1.0, 0.5], [0.5, 0.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    loss = mean_projection_loss(SoftProjections.of(p), SoftProjections.of(q))
    torch.testing.assert_close(loss, torch.tensor([1 / 13 + 1 / 9]))


def test_a_stray_pixel_moves_maxima_but_hardly_means():
    clean = torch.zeros(1, 16, 16)
    clean[0, 2:10, 2:10] = 1
    stray = clean.clone()
    stray[0, 14, 14] = 1
    projections = [SoftProjections.of(mask) for mask in (clean, stray)]
    assert mean_projection_loss(*projections).item() < 0.05 * max_projection_loss(*projections).item()


@pytest.mark.parametrize("extent", [(3, 1, 1), (2, 5, 3), (4, 8, 9), (0, 2, 3)])
def test_projections_of_logits_are_those_of_their_sigmoid_with_its_gradient(extent):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(extent, generator=generator, dtype=torch.float64).requires_grad_()
    ours, plain = SoftProjections.of_logits(logits), SoftProjections.of(logits.sigmoid())
    names = ("column_maxima", "row_maxima", "column_means", "row_means")
    weights = [torch.randn(getattr(plain, name).shape, generator=generator, dtype=torch.float64) for name in names]
    for name in names:
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name))
    gradients = [
        torch.autograd.grad(
            sum((getattr(one, name) * weight).sum() for name, weight in zip(names, weights, strict=True)), logits
        )[0]
        for one in (ours, plain)
    ]
    torch.testing.assert_close(*gradients)


def test_of_equal_maxima_one_is_taught():
    logits = torch.zeros(1, 2, 3).requires_grad_()
    SoftProjections.of_logits(logits).row_maxima.sum().backward()
    assert (logits.grad != 0).sum(dim=2).tolist() == [[1, 1]]
    assert logits.grad.sum().item() == 2 * 0.25


@pytest.mark.parametrize("extent", [(3, 1, 1), (2, 5, 3), (0, 2, 3)])
def test_dice_of_logits_is_that_of_their_sigmoid_with_its_gradient(extent):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(extent, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.rand(extent, generator=generator) > 0.5
    weights = torch.randn(extent[0], generator=generator, dtype=torch.float64)
    ours, plain = mask_dice_loss(logits, targets), dice_loss(logits.sigmoid(), targets.double())
    torch.testing.assert_close(ours, plain)
    gradients = [torch.autograd.grad((one * weights).sum(), logits)[0] for one in (ours, plain)]
    torch.testing.assert_close(*gradients)


def test_dice_of_logits_at_their_extremes():
    logits = torch.tensor([[[-1e4, -1e4]], [[1e4, -1e4]], [[1e4, 1e4]]]).requires_grad_()
    targets = torch.tensor([[[False, False]], [[True, False]], [[False, False]]])
    loss = mask_dice_loss(logits, targets)
    loss.sum().backward()
    assert loss.tolist() == [1.0, 0.0, 1.0]
    assert logits.grad.isfinite().all()


def test_embedding_loss_by_hand():
    predicted = torch.tensor([[3.0, 4.0], [0.0, -2.0], [1.0, 0.0], [0.0, 0.0]])
    target = torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(embedding_loss(predicted, target), torch.tensor([-1.0, 1.0, 0.0, 0.0]))


def test_box_regions():
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[0, 1, 3] = masks[0, 2, 1] = True
    masks[1, 3, 4] = True
    regions = box_regions(masks)
    assert regions[0].int().tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    assert regions[1].nonzero().tolist() == [[3, 4]]
    assert not regions[2].any()
    assert box_regions(masks[:0]).shape == (0, 4, 5)


def test_pairwise_warms_up_in_a_line():
    assert [pairwise_warmup(step, 1000) for step in (0, 250, 1000, 5000)] == [0.0, 0.25, 1.0, 1.0]
    assert pairwise_warmup(0, 0) == 1.0


def test_weights_and_warmup_scale_the_terms():
    made = predictions()
    plain = LossSettings(
        category=1, max_projection=1, mean_projection=1, pairwise=1, embedding=1, pairwise_warmup_steps=0
    )
    weighted = LossSettings(
        category=2, max_projection=3, mean_projection=5, pairwise=7, embedding=11, pairwise_warmup_steps=100
    )
    ones, weights = coarse_losses(made, THREE, plain), coarse_losses(made, THREE, weighted, step=10)
    ratios = {name: (weights[name] / ones[name]).item() for name in ones}
    expected = {"category": 2, "max_projection": 3, "mean_projection": 5, "pairwise": 0.7, "embedding": 11}
    assert ratios == pytest.approx(expected, rel=1e-5)


def test_terms_of_weight_zero_are_left_out():
    made = predictions()
    losses = coarse_losses(made, THREE, LossSettings(pairwise=0.0, embedding=0.0))
    assert set(losses) == ALL_TERMS - {"pairwise", "embedding"}
    only_category = LossSettings(max_projection=0.0, mean_projection=0.0, pairwise=0.0, embedding=0.0)
    assert set(coarse_losses(made, THREE, only_category)) == {"category"}


def test_levels_count_alike_however_many_positives_they_have():
    # The embedding is the target's on one level, at right angles to it elsewhere: -1 times the share of that level.
    made = predictions(1)
    labels = instances((2, 2, 9, 9), (10, 4, 30, 28))
    targets = assign_targets(labels, 1, 32, 32, MODEL)
    levels, counts = targets.level.unique(return_counts=True)
    assert counts.unique().numel() > 1
    embeddings = torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None].repeat(1, 1, CELLS)
    embeddings[0, :, targets.cell[targets.level == levels[0]]] = 1.0
    losses = coarse_losses(replace(made, embeddings=embeddings), labels, LossSettings(embedding=1.0))
    assert losses["embedding"].item() == pytest.approx(-1 / len(levels), rel=1e-5)


@pytest.mark.parametrize("losses_of", [coarse_losses, right_losses, box_losses])
@pytest.mark.parametrize("labels", [Instances.empty(32, 32, embedding_channels=4), instances((0, 0, 0, 0), images=[1])])
def test_without_positives_losses_are_zero_or_background_with_gradients(losses_of, labels):
    made = predictions()
    losses = losses_of(made, labels)
    sum(losses.values()).backward()
    assert all(column.grad is not None for column in columns(made))
    assert all(not column.grad.any() for column in columns(made)[1:])
    assert {name for name, loss in losses.items() if loss.item() != 0} == (
        set() if losses_of is coarse_losses else {"category"}
    )


def test_zero_depends_on_everything_even_on_what_is_infinite():
    made = predictions()
    with torch.no_grad():
        made.mask_features.fill_(torch.inf)
    made.zero().backward()
    assert made.zero().item() == 0
    assert all(torch.equal(column.grad, torch.zeros_like(column)) for column in columns(made))


def test_cells_of_images_without_instances():
    labels = instances((2, 2, 9, 9), images=[0])
    made = predictions()
    unknown, background = (
        supervision.losses(inputs_of(made, labels))["category"] for supervision in (FreeMasks(), Boxes())
    )
    alone = coarse_losses(made.each_image()[0], labels)["category"]
    torch.testing.assert_close(unknown, alone)
    assert background > unknown
    torch.testing.assert_close(background, right_losses(made, labels)["category"])


def with_padding(targets: GridTargets, slots: int) -> GridTargets:
    padded = {
        name: functional.pad(getattr(targets, name), (0, slots))
        for name in ("valid", "instance", "image", "level", "cell")
    }
    return replace(targets, **padded)


@pytest.mark.parametrize("counted", ["here", "before"])
def test_slots_that_hold_nothing_contribute_nothing(counted):
    targets = assign_targets(THREE, 2, 32, 32, MODEL)
    per_image = torch.bincount(targets.image, minlength=2).tolist() if counted == "before" else None
    gradients = []
    for one in (targets, with_padding(targets, 50)):
        made = predictions()
        positives = Positives.of(one, per_image)
        losses = coarse_losses(made, THREE, positives=positives) | right_losses(made, THREE, positives=positives)
        sum(losses.values()).backward()
        gradients.append([column.grad for column in columns(made)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_chunks_do_not_change_the_losses(monkeypatch):
    results, chunks = [], subject._chunks
    for at_once, join in ((1, False), (3, False), (1000, False), (3, True), (1000, True)):
        monkeypatch.setattr(subject, "SLOTS_AT_ONCE", at_once)
        monkeypatch.setattr(subject, "_chunks", lambda counts, *, join, joined=join: chunks(counts, join=joined))
        made = predictions()
        losses = coarse_losses(made, THREE)
        sum(losses.values()).backward()
        results.append([*losses.values(), *(column.grad for column in columns(made))])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-6)


def test_images_with_few_positives_share_a_chunk_where_they_are_joined(monkeypatch):
    monkeypatch.setattr(subject, "SLOTS_AT_ONCE", 5)
    counts = [2, 0, 3, 7, 1]
    first, second, long, rest, last = (
        *((0, slice(0, 2)), (2, slice(2, 5))),
        *((3, slice(5, 10)), (3, slice(10, 12)), (4, slice(12, 13))),
    )
    assert subject._chunks(counts, join=False) == [[first], [second], [long], [rest], [last]]
    assert subject._chunks(counts, join=True) == [[first, second], [long], [rest, last]]
    assert subject._chunks([0, 0], join=True) == []


def test_gradients_are_those_of_the_masks_kept():
    # The same Dice without chunks, its gradient by autograd.
    made = predictions()
    gradients = torch.autograd.grad(right_losses(made, THREE)["dice"], columns(made)[1::2])
    targets = assign_targets(THREE, 2, 32, 32, MODEL)
    masks = functional.interpolate(THREE.masks[:, None].float(), scale_factor=0.25, mode="bilinear")[:, 0] >= 0.5
    logits = torch.einsum(
        "pd,pdhw->phw", made.kernels[targets.image, :, targets.cell], made.mask_features[targets.image]
    )
    loss = 3 * dice_loss(logits.sigmoid(), masks[targets.instance].float()).mean()
    torch.testing.assert_close(torch.autograd.grad(loss, columns(made)[1::2]), gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_float32(dtype, scale):
    labels = instances((2, 2, 9, 9), (10, 4, 30, 28), (31, 31, 32, 32), (5, 0, 6, 32), (0, 0, 32, 32), images=[0] * 5)
    made = predictions(dtype=dtype)
    with torch.no_grad():
        for column in columns(made):
            column.mul_(scale)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = coarse_losses(made, labels) | right_losses(made, labels)
    assert set(losses) == ALL_TERMS | {"dice"}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(column.grad.isfinite().all() for column in columns(made))


def test_losses_of_half_precision_predictions_are_computed_in_float32():
    # One-hot kernels pass on a feature, so that masks are the same numbers in either precision.
    half = predictions(dtype=torch.bfloat16)
    with torch.no_grad():
        half.kernels.copy_(torch.eye(32)[:, torch.arange(CELLS) % 32].expand(2, -1, -1))
    single = SoloV2Predictions(*(column.detach().float() for column in columns(half)))
    for losses_of in (coarse_losses, right_losses):
        torch.testing.assert_close(losses_of(half, THREE), losses_of(single, THREE), rtol=1e-6, atol=1e-7)


def test_autocast_does_not_lower_the_precision():
    made = predictions()
    for losses_of in (coarse_losses, right_losses, box_losses):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = losses_of(made, THREE)
        torch.testing.assert_close(inside, losses_of(made, THREE), rtol=0, atol=0)


@pytest.mark.parametrize("losses_of", [coarse_losses, right_losses, box_losses])
def test_two_workers_make_one(losses_of):
    # Each worker has one image. They are asked what they count, then told the sums; their gradients are the whole's.
    whole = predictions()
    sum(losses_of(whole, THREE).values()).backward()
    halves = [THREE.of_image(0), THREE.of_image(1)]
    halves[1] = replace(halves[1], image_index=torch.zeros(1, dtype=torch.int64))
    counted = ([], [])
    for own, image, half in zip(counted, predictions().each_image(), halves, strict=True):
        losses_of(image, half, sum_over_workers=lambda count, own=own: own.append(count) or count)
    sums = [first + second for first, second in zip(*counted, strict=True)]
    assert sums
    for worker, half in enumerate(halves):
        made, told = predictions(), iter(sums)
        losses = losses_of(made.each_image()[worker], half, sum_over_workers=lambda _, told=told: next(told))
        sum(losses.values()).backward()
        for column, expected in zip(columns(made), columns(whole), strict=True):
            torch.testing.assert_close(column.grad[worker], expected.grad[worker], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("channels", [0, 3])
def test_embeddings_of_another_length_are_refused(channels):
    labels = replace(THREE, embeddings=torch.zeros(3, channels))
    with pytest.raises(
        ValueError, match=rf"embeddings have {channels} channels and the head's 4: .*losses.embedding=0"
    ):
        coarse_losses(predictions(), labels)
    coarse_losses(predictions(), labels, LossSettings(embedding=0.0))
