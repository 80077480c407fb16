"""Published backbones in, ours out.

What a checkpoint of the field looks like: a state dict, perhaps under `state_dict` or `model`, whose backbone sits
under one of a dozen prefixes beside a projection head, a momentum encoder and a queue. Nothing is loaded by luck:
every key is either the backbone's, or known to belong to something else and listed in the report, or an error.

Torchvision's, timm's, MoCo's, DenseCL's and mmdet's checkpoints load as they are. Others, and those whose stride or
pixels are not torchvision's, are imported once (`import_backbone`) and load from the model file that this makes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freesolo.errors import UsageError
from freesolo.models.array_pickle import is_array_pickle, read_array_pickle, write_array_pickle
from freesolo.models.layouts import EXPORT, Layout, Pixels, for_rgb, to_torchvision
from freesolo.models.model_file import ModelFile
from freesolo.models.resnet import ResNet, backbone_name, build_resnet, differ_in_stride_alone
from freesolo.models.torch_file import read_torch_file, write_torch_file
from freesolo.ops.images import IMAGENET_MEAN, IMAGENET_STD
from freesolo.settings import Backbone

_WRAPPERS = ("", "module.", "model.", "module.model.", "_orig_mod.")
_ENCODERS = (
    *("", "backbone.", "encoder_q.0.", "encoder_q.", "query.backbone.", "base_encoder."),
    *("backbone.bottom_up.", "bottom_up."),  # detectron2's, with a feature pyramid
)
# First parts of names beside a backbone that say what they are: classifiers and projection heads, the momentum
# encoder, queues, and the second name that OpenSelfSup's checkpoints give to the query encoder.
_BESIDE = (
    *("fc", "neck", "head", "projector", "predictor", "encoder_k", "key", "momentum_encoder", "encoder_q", "query"),
    *("rpn_head", "roi_head", "bbox_head", "mask_head"),  # mmdet's
    *("linear", "proposal_generator", "roi_heads", "sem_seg_head", "pixel_mean", "pixel_std"),  # detectron2's
)
_BESIDE_PATTERN = re.compile(r"(\w+_)?queue\d*(_ptr|_pointer)?\d*|fpn_(lateral|output)[2-5]|\w+_momentum")
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of the keys of a checkpoint.

    Attributes:
        prefix: What stood before the backbone's names.
        loaded: How many tensors went into the network.
        cast: Names, in the network, of tensors that were not of its floating type and were converted.
        ignored: Keys, in the checkpoint, that belong to something beside the backbone.
    """

    prefix: str
    loaded: int
    cast: tuple[str, ...]
    ignored: tuple[str, ...]


def read_state_dict(path: Path, *, backbone: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, out of its `state_dict`, `model` or `blobs` wrapper, on the CPU.

    Nothing in the file is executed (`freesolo.models.torch_file`, `freesolo.models.array_pickle`).

    Args:
        path: The file.
        backbone: The network that they are for. A model file of ours says which it is of; where that differs in what
            no tensor's shape shows, it is refused here. None: not known yet.

    Raises:
        UsageError: There is no such file, or it is no checkpoint, or holds more than tensors and plain values, or is of
            another network.
    """
    loaded = _read(path)
    found = _backbone_of(loaded)
    if backbone is not None and found is not None and differ_in_stride_alone(found, backbone):
        raise UsageError(
            f"{path}: of a {found}, the configuration says {backbone}: the stride is in other convolutions; "
            f"set backbone to {found}, or give other weights"
        )
    for wrapper in ("state_dict", "model", "blobs"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    tensors = {str(key): value for key, value in loaded.items()} if isinstance(loaded, Mapping) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UsageError(
            f"{path}: holds no state dict (looked at the top level and under 'state_dict', 'model' and 'blobs')"
        )
    return tensors


@dataclass(frozen=True, slots=True)
class ImportedBackbone:
    """A backbone of another project's, as one of ours.

    Attributes:
        backbone: The network that it is of.
        state_dict: By torchvision's names, for normalised RGB.
        report: What became of the keys.
    """

    backbone: Backbone
    state_dict: dict[str, Tensor]
    report: LoadReport


def import_backbone(path: Path, *, stride_in_1x1: bool, pixels: Pixels) -> ImportedBackbone:
    """Read a ResNet in any of the layouts (`freesolo.models.layouts`), for a network of ours.

    Args:
        path: A checkpoint of torch's, or a pickle of arrays as detectron2's `.pkl`.
        stride_in_1x1: Where the stride of a block is; nothing in a checkpoint says so.
        pixels: What the network expects; nothing in a checkpoint says so.

    Raises:
        UsageError: There is no such file, or it is no checkpoint, or a model file of ours already, or of no ResNet that
            there is here; or keys are missing, unexpected or of the wrong shape.
    """
    if _backbone_of(_read(path)) is not None:
        raise UsageError(f"{path}: a model file of freesolo already, which says of itself what it is")
    try:
        tensors = to_torchvision(read_state_dict(path))
    except ValueError as error:
        raise UsageError(f"{path}: cannot be read as a ResNet of another project: {error}") from error
    depth = _depth(tensors, _find_prefix(tensors, str(path)))
    name = backbone_name(depth or 0, stride_in_1x1=stride_in_1x1)
    if name is None:
        what = f"a ResNet-{depth}" if depth else "no plain ResNet"
        raise UsageError(f"{path}: {what}{' with its stride in 1x1 convolutions' * stride_in_1x1}, which is not here")
    network = build_resnet(name)
    report = load_backbone(network, tensors, source=str(path))
    return ImportedBackbone(name, for_rgb(backbone_state_dict(network), pixels), report)


@torch.no_grad()
def load_backbone(network: ResNet, state_dict: Mapping[str, Tensor], *, source: str) -> LoadReport:
    """Copy a checkpoint's backbone into `network`.

    Every tensor of the network must be there in the right shape, except batch norms' `num_batches_tracked`, which
    older checkpoints lack and nothing uses; those become 0. Every other key must be known not to be the backbone's.

    Args:
        network: Where to; on any device, in any floating type.
        state_dict: As `read_state_dict` gives it.
        source: Named in errors.

    Raises:
        UsageError: Keys are missing, unexpected or of the wrong shape; says which and what to do.
    """
    wanted = network.state_dict()
    prefix = _find_prefix(state_dict, source)
    given, ignored, unexpected = _sort_keys(state_dict, prefix, wanted)
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    misshapen = [
        f"{name} {tuple(value.shape)}, not {tuple(wanted[name].shape)}"
        for name, value in given.items()
        if value.shape != wanted[name].shape
    ]
    if missing or unexpected or misshapen:
        raise UsageError(
            f"{source}: does not fit a resnet{network.depth}: "
            + "; ".join(
                f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
                for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
                if names
            )
            + _likely_fix(state_dict, prefix, network)
        )
    for name, value in wanted.items():
        value.copy_(given[name]) if name in given else value.zero_()
    cast = tuple(name for name, value in given.items() if value.dtype != wanted[name].dtype)
    return LoadReport(prefix, len(given), cast, tuple(ignored))


def export_backbone(model: ModelFile, layout: Layout, path: Path) -> None:
    """Write a model's backbone for another project: torch's file, or for detectron2 a pickle of arrays.

    What it expects is normalised RGB; for detectron2 that is a matter of its configuration (`detectron2_settings`).

    Args:
        model: A backbone or a segmenter.
        layout: Whose names it gets.
        path: The file; for detectron2 its name ends in `.pkl`.

    Raises:
        UsageError: The project has no such network, or the model has no backbone in it.
        OSError: The disk is full, or will not have it.
    """
    name = str(model.settings.get("backbone"))
    if layout != "detectron2" and name.endswith("_caffe"):
        raise UsageError(f"{layout} has no {name}, a ResNet with its stride in 1x1 convolutions; detectron2 has")
    prefix = "backbone." if model.kind == "segmenter" else ""
    backbone = {key.removeprefix(prefix): value for key, value in model.state_dict.items() if key.startswith(prefix)}
    if "conv1.weight" not in backbone:
        raise UsageError(f"there is no ResNet in this {model.kind}")
    named = EXPORT[layout](backbone)
    if layout == "detectron2":
        arrays = {key: value.numpy() for key, value in named.items()}
        write_array_pickle({"model": arrays, "__author__": "freesolo", "matching_heuristics": True}, path)
    else:
        write_torch_file(named, path)


def detectron2_settings(model: ModelFile) -> dict[str, object]:
    """What detectron2's configuration has to say for a backbone that `export_backbone` wrote."""
    return {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [round(255 * mean, 3) for mean in IMAGENET_MEAN],
        "MODEL.PIXEL_STD": [round(255 * deviation, 3) for deviation in IMAGENET_STD],
        "MODEL.RESNETS.STRIDE_IN_1X1": str(model.settings.get("backbone")).endswith("_caffe"),
    }


def backbone_state_dict(network: ResNet) -> dict[str, Tensor]:
    """The network's tensors under torchvision's names, copied to the CPU: what `torch.save` should be given."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}


def digest(state_dict: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names, types, shapes and bytes, the same whatever the order of the keys or the device."""
    total = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _find_prefix(state_dict: Mapping[str, Tensor], source: str) -> str:
    for wrapper in _WRAPPERS:
        for encoder in _ENCODERS:
            if f"{wrapper}{encoder}conv1.weight" in state_dict:
                return wrapper + encoder
    if "conv1_w" in state_dict or any(key.endswith("stem.conv1.weight") for key in state_dict):
        raise UsageError(f"{source}: in detectron2's layout; make a model file of it: freesolo weights import")
    raise UsageError(
        f"{source}: no ResNet found (no key ends in conv1.weight behind a known prefix); "
        f"its keys begin {', '.join(list(state_dict)[:_SHOWN])}"
    )


def _sort_keys(
    state_dict: Mapping[str, Tensor], prefix: str, wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The backbone's tensors by their names in the network; keys known to be something else; keys that are neither."""
    given: dict[str, Tensor] = {}
    ignored: list[str] = []
    unexpected: list[str] = []
    wrapper = max((wrapper for wrapper in _WRAPPERS if prefix.startswith(wrapper)), key=len)
    pyramid = prefix.removesuffix("bottom_up.")
    for key, value in state_dict.items():
        name = key.removeprefix(prefix)
        inside = key.startswith(prefix)
        if inside and name in wanted:
            given[name] = value
        elif _is_beside(name if inside else key.removeprefix(pyramid).removeprefix(wrapper)):
            ignored.append(key)
        else:
            unexpected.append(key)
    return given, ignored, unexpected


def _is_beside(name: str) -> bool:
    first = name.partition(".")[0]
    return first in _BESIDE or _BESIDE_PATTERN.fullmatch(first) is not None


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path}: no such weights file")
    try:
        return read_array_pickle(path) if is_array_pickle(path) else read_torch_file(path)
    except ValueError as error:
        raise UsageError(f"{path}: cannot be read as a checkpoint of plain tensors: {error}") from error


def _backbone_of(loaded: Any) -> str | None:
    """What a model file of ours says that its backbone is; None for any other checkpoint."""
    settings = loaded.get("settings") if isinstance(loaded, Mapping) and "kind" in loaded else None
    backbone = settings.get("backbone") if isinstance(settings, Mapping) else None
    return backbone if isinstance(backbone, str) else None


def _depth(state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
    """Of the ResNet behind a prefix, by the blocks that it has; None for a network of no such depth."""
    inside = [key.removeprefix(prefix) for key in state_dict]
    blocks = {key.split(".")[1] for key in inside if key.startswith("layer3.")}
    bottleneck = f"{prefix}layer1.0.conv3.weight" in state_dict
    kinds = {(False, 2): 18, (False, 6): 34, (True, 6): 50, (True, 23): 101, (True, 36): 152}
    return kinds.get((bottleneck, len(blocks)))


def _likely_fix(state_dict: Mapping[str, Tensor], prefix: str, network: ResNet) -> str:
    depth = _depth(state_dict, prefix)
    if depth is None:
        return ". It is no plain ResNet"
    if depth != network.depth:
        advice = f"set backbone to resnet{depth}" if depth != 152 else "resnet152 is not supported"
        return f". It is a ResNet-{depth} checkpoint, the configuration says resnet{network.depth}: {advice}"
    return ". It is of the right depth: a variant of ResNet, or damaged"
