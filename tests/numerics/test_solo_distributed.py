"""Two workers with two images each make the gradients of one with all four, through DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from freesolo.models.resnet import freeze_batch_norm
from freesolo.settings import LossSettings
from freesolo.solo.task import SoloTask
from freesolo.types import ImageBatch, Instances, SegmentationBatch
from tests.small import small_solo
from tests.workers import on_workers

MODEL = small_solo()
# Positives of worker 0 (images 0 and 1) and worker 1 (2 and 3) are on different levels, in different numbers.
SPREAD = [(0, (4, 4, 12, 12)), (0, (30, 10, 60, 50)), (0, (2, 40, 20, 60)), (1, (0, 0, 64, 64)), (3, (20, 20, 24, 26))]
# Worker 1 has no instances at all, but must take part in every sum and every gradient.
LOPSIDED = [(0, (4, 4, 12, 12)), (1, (10, 10, 60, 40))]
CASES = {"spread": SPREAD, "lopsided": LOPSIDED, "empty": []}


def batch(boxes: list[tuple[int, tuple[int, int, int, int]]], images: range) -> SegmentationBatch:
    """The chosen ones of four images."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(100, 130, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    embeddings = functional.normalize(torch.randn(max(len(boxes), 1), 4, generator=generator), dim=1)
    chosen = [index for index, (image, _) in enumerate(boxes) if image in images]
    masks = torch.zeros(len(chosen), 64, 64, dtype=torch.bool)
    for mask, index in zip(masks, chosen, strict=True):
        left, top, right, bottom = boxes[index][1]
        mask[top:bottom, left:right] = True
    return SegmentationBatch(
        images=ImageBatch(pixels[images.start : images.stop], torch.full((len(images), 2), 64), tuple(images)),
        instances=Instances(
            image_index=torch.tensor([boxes[index][0] - images.start for index in chosen], dtype=torch.int64),
            masks=masks,
            category_ids=torch.zeros(len(chosen), dtype=torch.int64),
            scores=torch.ones(len(chosen)),
            embeddings=embeddings[chosen],
        ),
    )


def task(supervision: str) -> SoloTask:
    built = SoloTask(MODEL, supervision, LossSettings())
    built.initialise(torch.Generator().manual_seed(0))
    freeze_batch_norm(built)
    return built


def result(supervision: str, case: str, images: range, *, workers: int) -> dict[str, torch.Tensor]:
    """Losses and gradients, by name."""
    one = task(supervision)
    module = DistributedDataParallel(one) if workers > 1 else one
    losses = module((batch(CASES[case], images),), 500)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in one.named_parameters() if parameter.requires_grad}
    return {f"loss {name}": loss.detach() for name, loss in losses.items()} | gradients


def work(worker: int, folder: Path) -> None:
    """What a worker process does: every case, in the same order as the other one."""
    images = range(2 * worker, 2 * worker + 2)
    results = {
        f"{supervision} {case}": result(supervision, case, images, workers=2)
        for supervision in ("free_masks", "masks")
        for case in CASES
    }
    torch.save(results, folder / f"{worker}.pt")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("workers")
    on_workers(2, work, folder)
    return [torch.load(folder / f"{worker}.pt") for worker in range(2)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("supervision", ["free_masks", "masks"])
def test_two_workers_equal_one(workers, supervision, case):
    expected = result(supervision, case, range(4), workers=1)
    first, second = (results[f"{supervision} {case}"] for results in workers)
    assert set(first) == set(expected)
    for name, value in expected.items():
        # The loop reports the mean of the workers' losses; DDP has already taken that of the gradients.
        got = (first[name] + second[name]) / 2 if name.startswith("loss") else first[name]
        torch.testing.assert_close(got, value, rtol=2e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    if case == "spread":
        assert any(value.abs().max() > 1e-3 for name, value in expected.items() if not name.startswith("loss"))
