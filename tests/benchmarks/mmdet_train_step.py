"""A training step of SOLOv2 with an R50 at 640 px on masks: forward, losses, backward, optimiser, beside mmdet's.

mmdet 3.3's own configuration, for one category, nothing frozen, on the same photos, objects and precision. It asks for
mmcv, which has to be compiled for each version of PyTorch. mmcv-lite, which has not, lacks operators that mmdet imports
and that its SOLOv2 never calls; there are empty modules in their place here. An environment to throw away:

    pip install torch==2.11.0 torchvision mmdet==3.3.0 mmcv-lite==2.1.0 "setuptools<81" pydantic jaxtyping rich
    python -m tests.benchmarks mmdet_train_step
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from freesolo.ops.images import normalize
from freesolo.ops.masks import boxes_xyxy
from freesolo.settings import SoloModelSettings
from freesolo.types import SegmentationBatch
from tests.benchmarks.measure import Benchmark, Case
from tests.benchmarks.solo_train_step import assert_trained, flops_of, peers_step, photos_with_objects, solo_step

CONFIG = Path(".mim/configs/solov2/solov2_r50_fpn_1x_coco.py")
_OPERATORS = ("", ".carafe", ".merge_cells", ".modulated_deform_conv", ".multi_scale_deform_attn", ".nms", ".roi_align")


def cases(device: torch.device, images: int = 4) -> tuple[Case[Any, Any], ...]:
    """A step on masks."""
    model = SoloModelSettings()
    batch = photos_with_objects(images, model).to(device)
    step = solo_step(batch, device, "masks", model)
    return (
        Case(
            name="supervision: masks",
            peer_name="mmdet's SOLOv2 R50-FPN",
            ours=step,
            peer=mmdet_step(batch, device),
            assert_equal=assert_trained,
            repeats=3,
            flops=flops_of(step),
        ),
    )


def mmdet_step(batch: SegmentationBatch, device: torch.device) -> Callable[[], Tensor]:
    """A step of mmdet's SOLOv2 on the same batch."""
    _stand_in_for_operators()
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.structures import InstanceData

    register_all_modules(init_default_scope=True)
    package = find_spec("mmdet")
    assert package is not None
    assert package.origin is not None
    settings = Config.fromfile(Path(package.origin).parent / CONFIG).model
    settings.backbone.update(init_cfg=None, frozen_stages=-1, norm_eval=False)
    settings.mask_head.num_classes = 1
    model = MODELS.build(settings).to(device).train()
    extent = tuple(batch.images.pixels.shape[-2:])
    pixels = normalize(batch.images.pixels)
    samples = []
    for image, size in enumerate(batch.images.sizes.tolist()):
        own = batch.instances.of_image(image)
        objects = InstanceData()
        objects.bboxes = boxes_xyxy(own.masks)
        objects.labels = torch.zeros(len(own), dtype=torch.int64, device=device)
        objects.masks = BitmapMasks(own.masks.byte().cpu().numpy(), *extent)
        sample = DetDataSample(gt_instances=objects)
        sample.set_metainfo({"img_shape": tuple(size), "batch_input_shape": extent, "pad_shape": extent})
        samples.append(sample)

    def losses() -> list[Tensor]:
        by_name = model.loss(pixels, samples)
        return [one for each in by_name.values() for one in (each if isinstance(each, list) else [each])]

    return peers_step(model, losses, device)


class _NoOperators(ModuleType):
    """Has a layer that does nothing, whatever it is asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type[nn.Module]:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def _stand_in_for_operators() -> None:
    for name in (f"mmcv.ops{part}" for part in _OPERATORS):
        sys.modules.setdefault(name, _NoOperators(name))


BENCHMARK = Benchmark(
    name="mmdet_train_step",
    inputs="4 photos of 640 x 853 px, 20 instances in each, R50; bfloat16 autocast on a GPU",
    cases=cases,
    needs=("mmdet",),
)
