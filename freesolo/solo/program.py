"""A segmenter as a program that runs without freesolo: photos in, everything that its head says out.

    pixels    (B, 3, H, W), uint8, RGB, of any extent from 65 pixels; normalised inside, and padded with 0 at the right
              and bottom to multiples of 32
    outputs   by name, float32: the fields of the head's predictions (`freesolo.solo.heads`), those that are one map a
              level as `name_0` to `name_4`; maps cover the padded photo

A photo is resized before (`freesolo.ops.sizes`), and what comes out is raw: category logits, and what masks are made
of. Masks and their suppression depend on how many cells score well, which no fixed program knows.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from freesolo.errors import UsageError
from freesolo.ops.images import normalize
from freesolo.solo.heads.base import Predictions
from freesolo.solo.model import INPUT_DIVISOR, Segmenter

MIN_SIDE = 65
"""Of a photo: below it the coarsest level of the pyramid is one pixel, which is another program."""

_TRACED_WITH = (2, 3, 131, 170)  # no two extents equal or special, on any level
_AXES = {0: "batch", 2: "height", 3: "width"}


class SegmenterProgram(nn.Module):
    """What is exported: a segmenter with its normalisation and padding."""

    def __init__(self, segmenter: Segmenter) -> None:
        """Wrap a segmenter, which is put in evaluation mode."""
        super().__init__()
        self.segmenter = segmenter.eval()

    def forward(self, pixels: UInt8[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """Predict every cell of every grid, as the head of this module says."""
        height, width = pixels.shape[-2:]
        # Multiples by floor division: so the sizes of maps stay whole numbers of 32 in a program for any extent.
        below = (height + INPUT_DIVISOR - 1) // INPUT_DIVISOR * INPUT_DIVISOR - height
        right = (width + INPUT_DIVISOR - 1) // INPUT_DIVISOR * INPUT_DIVISOR - width
        padded = nn.functional.pad(pixels.float(), (0, right, 0, below))
        return named_tensors(self.segmenter(normalize(padded)))


def named_tensors(predictions: Predictions) -> dict[str, Tensor]:
    """The tensors of a head's predictions, by the names that they have in a program."""
    named: dict[str, Tensor] = {}
    for field in dataclasses.fields(predictions):  # type: ignore[arg-type]  # every kind's are a dataclass
        value = getattr(predictions, field.name)
        if isinstance(value, tuple):
            named |= {f"{field.name}_{level}": map_ for level, map_ in enumerate(value)}
        else:
            named[field.name] = value
    return named


@dataclass(frozen=True, slots=True)
class TracedSegmenter:
    """A segmenter as a program.

    Attributes:
        program: Of `torch.export`.
        outputs: The names of what it gives, in their order.
    """

    program: ExportedProgram
    outputs: tuple[str, ...]


@torch.no_grad()
def trace(segmenter: Segmenter) -> TracedSegmenter:
    """The segmenter as a program for any number of photos of any extent from `MIN_SIDE`.

    Args:
        segmenter: On the CPU, in float32.
    """
    wrapped = SegmenterProgram(segmenter)
    example = torch.zeros(_TRACED_WITH, dtype=torch.uint8)
    axes = {0: Dim(_AXES[0], min=1), 2: Dim(_AXES[2], min=MIN_SIDE), 3: Dim(_AXES[3], min=MIN_SIDE)}
    program = torch.export.export(wrapped, (example,), dynamic_shapes={"pixels": axes})
    return TracedSegmenter(program, tuple(wrapped(example)))


def save_torch_export(traced: TracedSegmenter, path: Path, about: Mapping[str, object]) -> None:
    """Write a program that `torch.export.load` reads.

    Args:
        traced: What `trace` gave.
        path: The file, whose name ends in `.pt2`.
        about: Plain JSON, kept in the program's extra file `freesolo.json`.
    """
    with warnings.catch_warnings(action="ignore"):  # of torch's own code
        torch.export.save(traced.program, path, extra_files={"freesolo.json": json.dumps(dict(about))})


def save_onnx(traced: TracedSegmenter, path: Path, about: Mapping[str, object]) -> None:
    """Write an ONNX model, its weights within.

    Args:
        traced: What `trace` gave.
        path: The file.
        about: Plain JSON, kept in the model's metadata as `freesolo`.

    Raises:
        UsageError: The packages that translate programs are not installed.
    """
    if find_spec("onnxscript") is None:
        raise UsageError("ONNX needs more packages: pip install 'freesolo[export]'")
    # It says that it could do more with torchvision.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):  # of torch's own code
        translated = torch.onnx.export(
            traced.program,
            dynamo=True,
            input_names=["pixels"],
            output_names=traced.outputs,
            dynamic_shapes={"pixels": _AXES},  # their names
            verbose=False,
        )
    assert translated is not None
    translated.model.metadata_props["freesolo"] = json.dumps(dict(about))
    translated.save(path)


SAVE: dict[str, Callable[[TracedSegmenter, Path, Mapping[str, object]], None]] = {
    "torch-export": save_torch_export,
    "onnx": save_onnx,
}
"""By format."""
