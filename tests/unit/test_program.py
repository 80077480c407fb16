"""Exported programs say what the segmenter says, of any number of photos of any extent, where freesolo is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from freesolo.errors import UsageError
from freesolo.ops.images import normalize, pad_to_batch
from freesolo.settings import HeadSettings, SoloModelSettings
from freesolo.solo.model import Segmenter
from freesolo.solo.program import (
    MIN_SIDE,
    TracedSegmenter,
    named_tensors,
    save_onnx,
    save_torch_export,
    trace,
)

pytestmark = pytest.mark.timeout(600)  # translating a program takes a minute where the cores are shared

KINDS = ("solo", "decoupled", "solov2")
EXTENTS = ((1, MIN_SIDE, 70), (3, 96, 160), (2, 200, 129))
# Float32 in another order of summation; the largest outputs are about 5.
TOLERANCE = {"torch-export": 1e-5, "onnx": 1e-4}


def small_segmenter(kind: str) -> Segmenter:
    head = HeadSettings.model_validate(
        {"kind": kind, "tower_channels": 32, "tower_convs": 1, "mask_tower_channels": 32, "kernel_channels": 32}
    )
    settings = SoloModelSettings(
        backbone="resnet18", fpn_channels=32, head=head, embedding_channels=8, grid_sizes=(10, 8, 6, 4, 3)
    )
    segmenter = Segmenter(settings).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():  # so that outputs are of the size of a trained network's
        for name, parameter in segmenter.head.named_parameters():
            if name.endswith(("0.weight", "output.weight")):
                parameter *= 5
    return segmenter.eval()


def photos(count: int, height: int, width: int) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
def expected(segmenter: Segmenter, pixels: Tensor) -> dict[str, Tensor]:
    padded, _ = pad_to_batch(list(pixels), 32)
    return named_tensors(segmenter(normalize(padded)))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture(scope="module", params=KINDS)
def segmenter(request: pytest.FixtureRequest) -> Segmenter:
    return small_segmenter(request.param)


@pytest.fixture(scope="module")
def traced(segmenter: Segmenter) -> Iterator[TracedSegmenter]:
    with pytest.MonkeyPatch.context() as patch:  # while it is traced, what is an int elsewhere stands for any
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield trace(segmenter)


def test_a_program_of_torch_export_says_the_same(segmenter: Segmenter, traced: TracedSegmenter, tmp_path: Path) -> None:
    save_torch_export(traced, tmp_path / "segmenter.pt2", {"sha256": "0a"})
    extra = {"freesolo.json": ""}
    program = torch.export.load(tmp_path / "segmenter.pt2", extra_files=extra).module()
    assert json.loads(extra["freesolo.json"]) == {"sha256": "0a"}
    for extent in EXTENTS:
        pixels = photos(*extent)
        with torch.no_grad():
            assert_same(program(pixels), expected(segmenter, pixels), TOLERANCE["torch-export"])
    with pytest.raises(AssertionError, match="Guard failed"):
        program(photos(1, MIN_SIDE - 1, 70))


def test_onnx_says_the_same(segmenter: Segmenter, traced: TracedSegmenter, tmp_path: Path) -> None:
    save_onnx(traced, tmp_path / "segmenter.onnx", {"sha256": "0a"})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(tmp_path / "segmenter.onnx"), options)
    (pixels_input,) = session.get_inputs()
    assert (pixels_input.name, pixels_input.type) == ("pixels", "tensor(uint8)")
    assert pixels_input.shape == ["batch", 3, "height", "width"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["freesolo"]) == {"sha256": "0a"}
    names = [output.name for output in session.get_outputs()]
    for extent in EXTENTS:
        pixels = photos(*extent)
        outputs = session.run(None, {"pixels": np.asarray(pixels)})
        found = {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}
        assert_same(found, expected(segmenter, pixels), TOLERANCE["onnx"])


def test_without_the_packages_onnx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freesolo.solo.program.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'freesolo\[export\]'"):
        save_onnx(TracedSegmenter(None, ()), tmp_path / "segmenter.onnx", {})  # type: ignore[arg-type]
