"""`supervision: boxes`: nothing that an instance's mask says, beside its box, reaches a loss."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from freesolo.config import TrainJob
from freesolo.data.collate import collate_photos
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.shards import DatasetManifest, Sample
from freesolo.data.views import SegmentationView
from freesolo.ops.mask_storage import Rle
from freesolo.ops.masks import boxes_xyxy, encode_rle
from freesolo.settings import LoopSettings, LossSettings, SegmentationViewSettings, SupervisionKind, TrainSettings
from freesolo.solo.task import SoloTask
from freesolo.train.segmentation import segmentation_view
from freesolo.train.tasks import SoloTraining
from freesolo.types import SegmentationBatch
from tests.small import small_solo

HEIGHT, WIDTH = 60, 90
CHANNELS = 4
BOXES_XYWH = ((4.0, 6.0, 30.0, 40.0), (50.0, 10.0, 24.0, 18.0), (20.5, 30.25, 60.0, 25.5))
VIEWS = SegmentationViewSettings(short_sides=(48, 64), long_side_max=96)
STEP = 2000
"""Past the pairwise term's warm-up."""


def photo(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(100, 130, (HEIGHT // 6, WIDTH // 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def ellipse(box_xywh: tuple[float, float, float, float]) -> Rle:
    x, y, width, height = box_xywh
    down = (torch.arange(HEIGHT) + 0.5 - y - height / 2) / (height / 2)
    across = (torch.arange(WIDTH) + 0.5 - x - width / 2) / (width / 2)
    (rle,) = encode_rle((down.square()[:, None] + across.square() <= 1)[None])
    return rle


def noise(box_xywh: tuple[float, float, float, float]) -> Rle:
    generator = torch.Generator().manual_seed(int(box_xywh[0]))
    (rle,) = encode_rle(torch.rand(1, HEIGHT, WIDTH, generator=generator) < 0.5)
    return rle


def nothing(_: tuple[float, float, float, float]) -> Rle:
    return encode_rle(torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool))[0]


def damaged(_: tuple[float, float, float, float]) -> Rle:
    return {"size": [1, 1], "counts": "not an encoding"}


def labels(mask_of: Callable[[tuple[float, float, float, float]], Rle], image: int) -> ImageLabels:
    return ImageLabels(
        key=str(image),
        image_id=image,
        file_name=f"{image}.jpg",
        width=WIDTH,
        height=HEIGHT,
        error=None,
        instances=tuple(
            LabelledInstance(
                mask_id=number,
                rle=mask_of(box),
                bbox_xywh=box,
                score=1.0,
                category_id=0,
                embedding=np.zeros(0, np.float16),
            )
            for number, box in enumerate(BOXES_XYWH[image:])
        ),
    )


def view_of(supervision: SupervisionKind) -> SegmentationView:
    """As a training with such a supervision has it."""
    model = small_solo(embedding_channels=CHANNELS)
    loop = LoopSettings(steps=1, batch_size=1)
    train = TrainSettings(model=model, supervision=supervision, views=VIEWS, loop=loop)
    manifest = DatasetManifest(format_version=1, shards=(), annotated=True, categories=(), skipped=())
    return segmentation_view(TrainJob(dataset="photos", train=train), manifest, None)


def batch(
    mask_of: Callable[[tuple[float, float, float, float]], Rle], supervision: SupervisionKind = "boxes"
) -> SegmentationBatch:
    """Two photos as a training's stream gives them."""
    view = view_of(supervision)
    rows = []
    for image in range(2):
        sample = Sample(str(image), photo(image), image, f"{image}.jpg", WIDTH, HEIGHT)
        row = view.row(sample, labels(mask_of, image), np.random.default_rng(image))
        assert "error" not in row or not row["error"]
        rows.append(row)
    return collate_photos(view, rows)


def losses_and_gradients(one: SegmentationBatch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    task = SoloTask(small_solo(), "boxes", LossSettings()).initialise(torch.Generator().manual_seed(0))
    views = SoloTraining(task, VIEWS).prepare(one, torch.Generator().manual_seed(1))  # strong view, copy-paste
    losses = task(views, STEP)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: one.grad for name, one in task.named_parameters() if one.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


@pytest.fixture(scope="module")
def undisturbed() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return losses_and_gradients(batch(ellipse))


@pytest.mark.parametrize("scrambled", [noise, nothing, damaged])
def test_scrambled_masks_change_nothing_from_the_label_to_the_gradients(
    undisturbed: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
    scrambled: Callable[[tuple[float, float, float, float]], Rle],
) -> None:
    losses, gradients = undisturbed
    others, other_gradients = losses_and_gradients(batch(scrambled))
    assert set(losses) == {"category", "max_projection", "pairwise"}
    assert all(loss > 0 for loss in losses.values())
    for name, loss in losses.items():
        assert torch.equal(others[name], loss), name
    for name, gradient in gradients.items():
        assert torch.equal(other_gradients[name], gradient), name


@pytest.mark.parametrize("scrambled", [noise, nothing, damaged])
def test_a_data_sets_own_masks_are_not_looked_at_either(
    scrambled: Callable[[tuple[float, float, float, float]], Rle],
) -> None:
    view = view_of("boxes")

    def row(mask_of: Callable[[tuple[float, float, float, float]], Rle] | None) -> dict[str, object]:
        annotations = [
            {"id": number, "category_id": 1, "bbox": list(box)} | ({"segmentation": mask_of(box)} if mask_of else {})
            for number, box in enumerate(BOXES_XYWH, start=1)
        ]
        sample = Sample("0", photo(0), 0, "0.jpg", WIDTH, HEIGHT, tuple(annotations))
        return view.row(sample, None, np.random.default_rng(0))

    assert row(scrambled) == row(ellipse) == row(None)
    assert len(row(None)["scores"]) == len(BOXES_XYWH)


def test_with_masks_the_scrambling_would_be_noticed() -> None:
    one, other = batch(ellipse, "masks"), batch(noise, "masks")
    assert not torch.equal(one.instances.masks, other.instances.masks)


def test_the_task_looks_at_boxes_whatever_it_is_given() -> None:
    """Masks of the same boxes: filled, and the outlines alone."""
    filled = batch(ellipse)
    instances = filled.instances
    outlines = torch.zeros_like(instances.masks)
    for outline, (left, top, right, bottom) in zip(outlines, boxes_xyxy(instances.masks).long().tolist(), strict=True):
        outline[top:bottom, [left, right - 1]] = True
        outline[[top, bottom - 1], left:right] = True
    task = SoloTask(small_solo(), "boxes", LossSettings()).initialise(torch.Generator().manual_seed(0)).eval()
    here = task((filled,), STEP)
    there = task((replace(filled, instances=replace(instances, masks=outlines)),), STEP)
    assert all(torch.equal(there[name], loss) for name, loss in here.items())


def test_boxes_are_those_of_the_labels() -> None:
    """To the pixels that they touch, in a photo that is neither resized nor flipped."""
    settings = SegmentationViewSettings(short_sides=(HEIGHT,), long_side_max=WIDTH, flip_probability=0.0)
    view = SegmentationView(settings, CHANNELS, boxes_alone=True)
    sample = Sample("0", photo(0), 0, "0.jpg", WIDTH, HEIGHT)
    one = collate_photos(view, [view.row(sample, labels(noise, 0), np.random.default_rng(0))])
    expected = torch.tensor([[4, 6, 34, 46], [50, 10, 74, 28], [20, 30, 81, 56]]).float()
    assert torch.equal(boxes_xyxy(one.instances.masks), expected)
    assert torch.equal(one.instances.masks.flatten(1).sum(dim=1), torch.tensor([30 * 40, 24 * 18, 61 * 26]))


def test_an_image_without_boxes_is_background() -> None:
    """Someone has looked, and there is nothing: its cells are trained, as they are not with free masks."""
    empty = batch(ellipse)
    empty = replace(empty, instances=empty.instances[:0])
    for supervision, trained in (("boxes", True), ("free_masks", False)):
        losses = LossSettings(embedding=0.0)
        task = SoloTask(small_solo(), supervision, losses).initialise(torch.Generator().manual_seed(0))
        assert bool(task((empty,), STEP)["category"] > 0) is trained
