"""A ResNet's tensors under the names that other projects give them, and back; pure functions of state dicts.

    torchvision    conv1.weight, bn1.*, layer1.0.conv1.weight, layer1.0.downsample.0.weight; also timm's, mmdet's, ours
    detectron2     stem.conv1.weight, stem.conv1.norm.*, res2.0.conv1.weight, res2.0.shortcut.weight
    caffe2         conv1_w, res_conv1_bn_s, res2_0_branch2a_w, res2_0_branch1_w; Detectron's, MSRA's in detectron2's zoo

What the names don't tell, whoever imports has to say: in which convolution of a block the stride is
(`freesolo.models.resnet`), and what the pixels are that the first convolution expects:

    rgb    RGB in 0..1, ImageNet's mean and standard deviation taken out: torchvision, timm, mmdet's `pytorch` style
    bgr    BGR in 0..255, ImageNet's mean alone taken out: detectron2's own models, mmdet's `caffe` style with
           mean=[103.530, 116.280, 123.675] and std=[1, 1, 1]

Sources: detectron2 tools/convert-torchvision-to-d2.py and checkpoint/c2_model_loading.py (Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from freesolo.ops.images import IMAGENET_STD

Layout = Literal["torchvision", "timm", "detectron2"]
Pixels = Literal["rgb", "bgr"]

_EPSILON = 1e-5  # every batch norm's, here and there
_CONVOLUTIONS_OF_BRANCHES = {"a": "conv1", "b": "conv2", "c": "conv3"}
_CAFFE2_NORM = {
    "s": "weight",
    "gamma": "weight",
    "b": "bias",
    "beta": "bias",
    "rm": "running_mean",
    "riv": "running_var",
}


def to_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's tensors in any of the layouts, by torchvision's names; nothing is lost.

    A key that is no ResNet's keeps its name, and what stands before the names of the ResNet stays there: telling what
    belongs where is `freesolo.models.weights.load_backbone`'s.

    Args:
        state_dict: May be empty. Prefixes as `backbone.bottom_up.` are allowed.

    Raises:
        ValueError: If two keys get one name, or a normalisation of Caffe2's is incomplete or of the wrong shape.
    """
    if "conv1_w" in state_dict:
        return _from_caffe2(state_dict)
    if any(re.search(r"(^|\.)stem\.conv1\.weight$", key) for key in state_dict):
        return _renamed(state_dict, _from_detectron2)
    return dict(state_dict)


def to_detectron2(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's tensors by detectron2's names.

    Args:
        backbone: By torchvision's names, without a prefix.
    """

    def name(key: str) -> str:
        key = key if key.startswith("layer") else f"stem.{key}"
        key = re.sub(r"^layer(\d)\.", lambda stage: f"res{int(stage[1]) + 1}.", key)
        key = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", key)
        return key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")

    return _renamed(backbone, name)


def for_rgb(backbone: Mapping[str, Tensor], pixels: Pixels) -> dict[str, Tensor]:
    """The same network for normalised RGB, which is what all of this system feeds.

    An image as BGR in 0..255 less the mean is 255 times the standard deviation of what it is normalised. That goes into
    the first convolution; padding is 0 either way, so the networks are equal, up to the rounding of products.

    Args:
        backbone: By torchvision's names, without a prefix.
        pixels: What it expects.
    """
    if pixels == "rgb":
        return dict(backbone)
    weight = backbone["conv1.weight"]
    scale = 255.0 * torch.tensor(IMAGENET_STD, dtype=torch.float64)
    folded = (weight.double().flip(1) * scale[:, None, None]).to(weight.dtype)
    return {**backbone, "conv1.weight": folded}


def _renamed(state_dict: Mapping[str, Tensor], name: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {name(key): value for key, value in state_dict.items()}
    if len(renamed) < len(state_dict):
        raise ValueError("two keys of it are names of the same tensor")
    return renamed


def _from_detectron2(key: str) -> str:
    match = re.fullmatch(r"(.*?)(stem|res[2-5]\.\d+)\.(conv\d|shortcut|fc)\.(norm\.)?(\w+)", key)
    if match is None or (match[1] and not match[1].endswith(".")):
        return key
    before, place, layer, norm, tensor = match.groups()
    block = "" if place == "stem" else f"layer{int(place[3]) - 1}{place[4:]}."
    if layer == "shortcut":
        return f"{before}{block}downsample.{1 if norm else 0}.{tensor}"
    return f"{before}{block}{layer.replace('conv', 'bn') if norm else layer}.{tensor}"


def _from_caffe2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Caffe2's blobs; batch norms of nothing but a scale and a shift get statistics that change nothing."""
    tensors = _renamed(state_dict, _caffe2_name)
    norms = {key.rpartition(".")[0] for key in tensors if re.search(r"(^|\.)(bn\d|downsample\.1)\.\w+$", key)}
    for norm in sorted(norms):
        if not {f"{norm}.weight", f"{norm}.bias"} <= tensors.keys():
            raise ValueError(f"the scale or the shift of {norm} is missing")
        scale = tensors[f"{norm}.weight"]
        tensors.setdefault(f"{norm}.running_mean", torch.zeros_like(scale))
        tensors.setdefault(f"{norm}.running_var", torch.full_like(scale, 1.0 - _EPSILON))
    bias = tensors.pop("conv1.bias", None)  # MSRA's first convolution has one
    if bias is not None:
        if "bn1.running_mean" not in tensors:
            raise ValueError("the normalisation of conv1 is missing")
        if bias.shape != tensors["bn1.running_mean"].shape:
            raise ValueError("the bias of conv1 is of the wrong shape")
        tensors["bn1.running_mean"] = tensors["bn1.running_mean"] - bias
    return tensors


def _caffe2_name(key: str) -> str:
    if key.endswith("_momentum"):
        return key  # the optimiser's, of whichever tensor
    if key in ("conv1_w", "conv1_b"):
        return "conv1.weight" if key.endswith("w") else "conv1.bias"
    stem = re.fullmatch(r"res_conv1_bn_(\w+)", key)
    if stem and stem[1] in _CAFFE2_NORM:
        return f"bn1.{_CAFFE2_NORM[stem[1]]}"
    match = re.fullmatch(r"res([2-5])_(\d+)_branch(1|2[abc])_(bn_)?(\w+)", key)
    if match is None:
        return {"fc1000_w": "fc.weight", "fc1000_b": "fc.bias"}.get(key, key)
    stage, block, branch, norm, tensor = match.groups()
    tensor = _CAFFE2_NORM.get(tensor, tensor) if norm else {"w": "weight"}.get(tensor, tensor)
    if branch == "1":
        layer = f"downsample.{1 if norm else 0}"
    else:
        layer = _CONVOLUTIONS_OF_BRANCHES[branch[1]]
        layer = layer.replace("conv", "bn") if norm else layer
    return f"layer{int(stage) - 1}.{block}.{layer}.{tensor}"


EXPORT: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "torchvision": dict,
    "timm": dict,
    "detectron2": to_detectron2,
}
"""By layout: a backbone's tensors by torchvision's names, without a prefix, as the project has them."""
