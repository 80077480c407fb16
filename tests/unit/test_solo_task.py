"""SOLO's training task: views together, supervision, gradients everywhere, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from freesolo.models.resnet import freeze_batch_norm
from freesolo.ops.images import normalize
from freesolo.settings import InferenceSettings, LossSettings, SoloModelSettings, TrainSettings
from freesolo.solo.model import HEADS
from freesolo.solo.postprocess import instances_from_predictions
from freesolo.solo.task import SUPERVISIONS, SoloTask, concatenate
from freesolo.types import ImageBatch, Instances, SegmentationBatch
from tests.small import small_solo

MODEL = small_solo()


def task(
    supervision: str = "free_masks", losses: LossSettings | None = None, *, model: SoloModelSettings = MODEL
) -> SoloTask:
    built = SoloTask(model, supervision, losses or LossSettings())
    built.initialise(torch.Generator().manual_seed(0))
    freeze_batch_norm(built)  # else what one view gives depends on the other
    return built


def batch(*boxes: tuple[int, int, int, int], images: list[int], seed: int = 0, count: int = 2) -> SegmentationBatch:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return SegmentationBatch(
        images=ImageBatch(
            pixels=torch.randint(100, 130, (count, 3, 64, 64), generator=generator, dtype=torch.uint8),
            sizes=torch.tensor([[64, 64], [50, 60], [64, 40]])[:count],
            image_ids=tuple(range(7, 7 + count)),
        ),
        instances=Instances(
            image_index=torch.tensor(images, dtype=torch.int64),
            masks=masks,
            category_ids=torch.zeros(len(boxes), dtype=torch.int64),
            scores=torch.ones(len(boxes)),
            embeddings=functional.normalize(torch.randn(len(boxes), 4, generator=generator), dim=1),
        ),
    )


WEAK = batch((4, 4, 20, 30), (30, 10, 60, 50), images=[0, 1])
STRONG = batch((6, 6, 16, 20), (2, 30, 40, 60), (44, 2, 60, 10), images=[0, 0, 1], seed=1)


@pytest.mark.parametrize(
    ("supervision", "names"),
    [
        ("free_masks", {"category", "max_projection", "mean_projection", "pairwise", "embedding"}),
        ("masks", {"category", "dice"}),
    ],
)
def test_losses_and_their_gradients(supervision, names):
    one = task(supervision)
    losses = one((WEAK, STRONG), 500)
    assert set(losses) == names
    assert all(loss.isfinite() and loss.item() != 0 for loss in losses.values())
    sum(losses.values()).backward()
    learned = {name for name, parameter in one.named_parameters() if parameter.requires_grad and parameter.grad.any()}
    idle = {name for name, parameter in one.named_parameters() if parameter.requires_grad} - learned
    assert idle == (
        set() if supervision == "free_masks" else {"segmenter.head.embedding_output." + n for n in ("weight", "bias")}
    )


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_every_head_learns_under_every_supervision_and_is_asked_alike(kind, supervision):
    """Some steps lower the losses, and the same post-processing finds something, at such a training's thresholds."""
    model = small_solo(head=MODEL.head.model_copy(update={"kind": kind}))
    one = task(supervision, LossSettings(pairwise_warmup_steps=0), model=model)
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.003)
    totals = []
    for _ in range(8):
        total = sum(one((WEAK,), 0).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0] - 0.5, totals
    one.eval()
    with torch.no_grad():
        predictions = one.segmenter(normalize(WEAK.images.pixels))
    settings = InferenceSettings(min_category_score=0.0, mask_threshold=1e-5, min_score=0.0)
    sizes = [(int(height), int(width)) for height, width in WEAK.images.sizes]
    found = instances_from_predictions(one.segmenter.head, predictions, WEAK.images.sizes, sizes, settings, model)
    assert [tuple(instances.masks.shape[1:]) for instances in found] == sizes
    assert all(len(instances) > 0 for instances in found)


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("losses", [LossSettings(), LossSettings(pairwise=0.0, embedding=0.0, dice=0.0)])
def test_settings_name_the_losses_that_there_are(supervision, losses):
    settings = TrainSettings.model_validate(
        {"loop": {"steps": 1, "batch_size": 1}, "supervision": supervision, "losses": losses}
    )
    named = [name.removeprefix("loss/") for name in settings.metrics if name.startswith("loss/")]
    assert named == list(task(supervision, losses)((WEAK,), 500))


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_without_instances_every_parameter_still_has_a_gradient(supervision):
    one = task(supervision)
    sum(one((batch(images=[]),), 500).values()).backward()
    assert all(parameter.grad is not None for parameter in one.parameters() if parameter.requires_grad)
    assert all(parameter.grad.isfinite().all() for parameter in one.parameters() if parameter.requires_grad)


def test_views_are_one_batch():
    # What two views give is what one batch of both's images gives: counts are taken over both.
    together = concatenate((WEAK, STRONG))
    for supervision in ("free_masks", "masks"):
        one = task(supervision)
        torch.testing.assert_close(one((WEAK, STRONG), 500), one((together,), 500))


def test_concatenation():
    together = concatenate((WEAK, STRONG, WEAK))
    assert len(together) == 6
    assert together.images.image_ids == (7, 8) * 3
    assert together.instances.image_index.tolist() == [0, 1, 2, 2, 3, 4, 5]
    assert torch.equal(together.images.pixels[2:4], STRONG.images.pixels)
    assert torch.equal(together.images.sizes[4:], WEAK.images.sizes)
    assert torch.equal(together.instances.masks[2:5], STRONG.instances.masks)
    assert torch.equal(together.instances.embeddings[5:], WEAK.instances.embeddings)


def test_the_pairwise_term_warms_up_with_the_step():
    one = task(losses=LossSettings(pairwise_warmup_steps=100))
    at = {step: one((WEAK,), step) for step in (0, 50, 100, 200)}
    assert at[0]["pairwise"].item() == 0
    torch.testing.assert_close(2 * at[50]["pairwise"], at[100]["pairwise"])
    torch.testing.assert_close(at[100], at[200])


def test_the_network_sees_normalised_images():
    one = task()
    seen = []
    one.segmenter.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    one((WEAK,), 0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (WEAK.images.pixels / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


def test_padding_does_not_teach_the_pairwise_term():
    one = task()
    changed = WEAK.images.pixels.clone()
    changed[1, :, 50:] = 200
    changed[1, :, :, 60:] = 200
    other = replace(WEAK, images=replace(WEAK.images, pixels=changed))
    # The network sees the padding; the similarity of colours must not. Only the pairwise term can differ by it.
    with torch.no_grad():
        for parameter in one.segmenter.backbone.conv1.parameters():
            parameter.zero_()
    torch.testing.assert_close(one((WEAK,), 500), one((other,), 500))


def test_batches_of_integers_and_of_floats_are_the_same():
    one = task()
    floats = replace(WEAK, images=replace(WEAK.images, pixels=WEAK.images.pixels.float()))
    torch.testing.assert_close(one((WEAK,), 0), one((floats,), 0))


def test_views_of_different_extents_are_refused():
    small = replace(
        WEAK,
        images=replace(WEAK.images, pixels=WEAK.images.pixels[:, :, :32]),
        instances=replace(WEAK.instances, masks=WEAK.instances.masks[:, :32]),
    )
    with pytest.raises(ValueError, match=r"padded to different extents, \[\(32, 64\), \(64, 64\)\]"):
        task()((WEAK, small), 0)


def test_no_views_are_refused():
    with pytest.raises(ValueError, match="no views"):
        task()((), 0)
