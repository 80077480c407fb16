"""Inference of a SOLOv2 with an R50 on one photo at 800 px, from pixels on the host to masks at the photo's size.

The peer is torchvision's Mask R-CNN with the same backbone, precision and number of instances. An untrained network
would find nothing, or everything: ours goes on with the best 1,000 of its 3,872 cells before suppression, more than a
trained one has on a crowded photo, and both keep 100 instances, as a trained one does at most.
"""

from __future__ import annotations

from typing import Any

import torch

from freesolo.inference.segment import SegmentPhotos
from freesolo.ops.images import normalize
from freesolo.settings import InferenceSettings, PredictSettings, SoloModelSettings
from freesolo.solo.model import Segmenter
from freesolo.types import ImageBatch, Instances
from tests.benchmarks.measure import Benchmark, Case
from tests.benchmarks.solo_train_step import flops_of
from tests.benchmarks.synthetic import photo

CELLS = 1000
INSTANCES = 100


def cases(device: torch.device) -> tuple[Case[Any, Any], ...]:
    """One photo, and a batch of eight."""
    return tuple(_case(device, photos) for photos in ((1, 8) if device.type == "cuda" else (1,)))


def _case(device: torch.device, photos: int) -> Case[Any, Any]:
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    generator = torch.Generator().manual_seed(0)
    original = (480, 640)
    # Padded to a multiple of 32, as the stream does.
    pixels = torch.zeros(photos, 3, 800, 1088, dtype=torch.uint8)
    for image in range(photos):
        pixels[image, :, :, :1067] = photo(800, 1067, generator)
    images = ImageBatch(pixels, torch.tensor([[800, 1067]] * photos), tuple(range(photos)))

    segmenter = Segmenter(SoloModelSettings())
    segmenter.initialise(generator)
    segmenter.to(device).eval()
    with torch.no_grad():
        scores = segmenter(normalize(pixels[:1].to(device))).category_logits.sigmoid()
    least = float(scores.flatten().topk(CELLS).values[-1])
    post_processing = InferenceSettings(min_category_score=least, min_score=0.0, max_instances=INSTANCES)
    segment = SegmentPhotos(segmenter, PredictSettings(inference=post_processing, batch_size=photos), device)

    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=2,
        min_size=480,
        box_score_thresh=0.0,
        box_detections_per_img=INSTANCES,
    )
    model.to(device).eval()
    # Resized by the model: enlarged by the same factor, as the photo was for ours.
    model.transform.min_size, model.transform.max_size = (800,), 1333
    stored = [torch.nn.functional.interpolate(one[None].float() / 255, size=original)[0] for one in pixels[..., :1067]]

    @torch.inference_mode()
    def peer() -> list[dict[str, torch.Tensor]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found: list[dict[str, torch.Tensor]] = model([one.to(device) for one in stored])
        return [one | {"masks": one["masks"] > 0.5} for one in found]

    def ours() -> list[Instances]:
        return segment.segment(images, [original] * photos)

    return Case(
        name=f"{photos} photo{'s' if photos > 1 else ''}, {INSTANCES} instances in each at most",
        peer_name="torchvision's Mask R-CNN R50-FPN, 800 px",
        ours=ours,
        peer=peer,
        assert_equal=_assert_as_many,
        flops=flops_of(ours),
    )


def _assert_as_many(ours: list[Instances], peer: list[dict[str, torch.Tensor]]) -> None:
    """Untrained networks find nothing in particular; the masks must be at the photo's size."""
    assert len(ours) == len(peer)
    for one, other in zip(ours, peer, strict=True):
        assert one.masks.shape[1:] == other["masks"].shape[-2:]


BENCHMARK = Benchmark(
    name="inference",
    inputs="photos of 480 x 640 px at 800 x 1067 px, R50; bfloat16 autocast on a GPU",
    cases=cases,
    needs=("torchvision",),
)
