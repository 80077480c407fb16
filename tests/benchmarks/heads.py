"""The kinds of head side by side: `python -m tests.benchmarks.heads [--device D] [--json path]`.

Each kind is measured in a process of its own, for its peak memory; nobody takes turns with it at the clock,
so compare medians, not single repeats. The heads have equal towers on one backbone, and train on one batch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from freesolo.ops.images import normalize
from freesolo.settings import HeadSettings, LossSettings, SoloModelSettings
from freesolo.solo.model import HEADS
from freesolo.solo.task import SoloTask
from tests.benchmarks.measure import clock_of
from tests.benchmarks.solo_train_step import solo_step
from tests.benchmarks.synthetic import segmentation_batch

REPEATS = 5
GRID_SCALES = (0.5, 1.0, 2.0)
PHOTO, PADDED_WIDTH = (320, 427), 448
CELLS_IN_USE = 100


@dataclass(frozen=True, slots=True)
class Figures:
    """What one kind of head costs.

    Attributes:
        kind: Of head.
        parameters: Of the head alone.
        forward_seconds: Of the network on a batch of two photos, median.
        step_seconds: Of a training step on it, median.
        peak_bytes: Of the process, or of the device's allocations, over the training steps.
        mask_bytes: What the mask branch holds of a photo, and the masks of 100 cells, by how many times the usual
            number of cells a side the grids have.
        all_maps_bytes: What the maps of all cells would be, likewise.
    """

    kind: str
    parameters: int
    forward_seconds: float
    step_seconds: float
    peak_bytes: int
    mask_bytes: dict[str, int]
    all_maps_bytes: dict[str, int]


def model(kind: str, grid_scale: float = 1.0) -> SoloModelSettings:
    """A ResNet-18 with a head of SOLO's own towers' width."""
    return SoloModelSettings(
        backbone="resnet18",
        head=HeadSettings(kind=kind, tower_channels=256, tower_convs=4),  # type: ignore[arg-type]
        grid_sizes=tuple(max(2, round(grid_scale * size)) for size in SoloModelSettings().grid_sizes),
    )


def measure(kind: str, device: torch.device) -> Figures:
    """All figures of a kind, in this process."""
    settings = model(kind)
    batch = segmentation_batch(
        2,
        10,
        PHOTO,
        torch.Generator().manual_seed(0),
        padded_width=PADDED_WIDTH,
        smallest=16,
        largest=160,
        embedding_channels=settings.embedding_channels,
    ).to(device)
    step = solo_step(batch, device, "masks", settings)
    step_seconds = _seconds(step, device)
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    task = SoloTask(settings, "masks", LossSettings()).initialise(torch.Generator().manual_seed(0)).to(device).eval()
    pixels = normalize(batch.images.pixels)
    with torch.inference_mode():
        forward_seconds = _seconds(lambda: task.segmenter(pixels), device)
    held = {f"{scale:g}": _mask_bytes(kind, scale, pixels[:1]) for scale in GRID_SCALES}
    return Figures(
        kind=kind,
        parameters=sum(one.numel() for one in task.segmenter.head.parameters()),
        forward_seconds=forward_seconds,
        step_seconds=step_seconds,
        peak_bytes=peak,
        mask_bytes={scale: held_bytes for scale, (held_bytes, _) in held.items()},
        all_maps_bytes={scale: all_bytes for scale, (_, all_bytes) in held.items()},
    )


def _seconds(action: Any, device: torch.device) -> float:
    clock = clock_of(device)
    seconds = []
    for _ in range(REPEATS + 1):
        start = clock()
        action()
        seconds.append(clock() - start)
    return median(seconds[1:])  # the first is the warm-up


@torch.inference_mode()
def _mask_bytes(kind: str, grid_scale: float, pixels: torch.Tensor) -> tuple[int, int]:
    """Bytes that the mask branch holds of one photo with the masks of some cells; and those of all cells' masks."""
    settings = model(kind, grid_scale)
    task = SoloTask(settings, "masks", LossSettings()).initialise(torch.Generator().manual_seed(0)).to(pixels.device)
    (one,) = task.eval().segmenter(pixels).each_image()
    cells = sum(size * size for size in settings.grid_sizes)
    chosen = torch.arange(0, cells, cells // CELLS_IN_USE, device=pixels.device)[:CELLS_IN_USE]
    masks = task.segmenter.head.mask_logits(one, chosen)
    said = {name: getattr(one, name) for name in one.__slots__ if name not in ("category_logits", "embeddings")}
    tensors = [tensor for value in said.values() for tensor in (value if isinstance(value, tuple) else (value,))]
    held = sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, masks])
    return held, cells * masks[0].numel() * masks.element_size()


def table(figures: Sequence[Figures]) -> Table:
    """A row a kind."""
    result = Table(
        title=f"heads: R18, two photos of {PHOTO[0]} x {PHOTO[1]} px with ten instances each, towers of 256 channels",
        caption=f"mask memory: what is held of a photo and the masks of {CELLS_IN_USE} cells, with grids of half the "
        "cells a side, as many, and twice as many; in brackets the maps of all cells",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("head", "parameters", "forward", "train step", "peak memory", "mask memory (all maps), MiB"):
        result.add_column(heading, justify="left" if heading == "head" else "right")
    for one in figures:
        held = ", ".join(
            f"{_mib(one.mask_bytes[scale])} ({_mib(one.all_maps_bytes[scale])})" for scale in one.mask_bytes
        )
        result.add_row(
            one.kind,
            f"{one.parameters / 1e6:.1f} M",
            f"{1000 * one.forward_seconds:,.0f} ms",
            f"{1000 * one.step_seconds:,.0f} ms",
            f"{_mib(one.peak_bytes)} MiB",
            held,
        )
    return result


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each kind in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.heads", description="Measure the kinds of head.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=Path("build/heads.json"), help="default: %(default)s")
    parser.add_argument("--kind", choices=sorted(HEADS), help="measure this one here, and print its figures as JSON")
    arguments = parser.parse_args(argv)
    if arguments.kind:
        print(json.dumps(asdict(measure(arguments.kind, torch.device(arguments.device)))))
        return
    figures = []
    for kind in HEADS:
        command = [sys.executable, "-m", "tests.benchmarks.heads", "--kind", kind, "--device", arguments.device]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures.append(Figures(**json.loads(done.stdout.splitlines()[-1])))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(one) for one in figures], indent=2) + "\n")
    (Console() if sys.stdout.isatty() else Console(width=120)).print(table(figures))


if __name__ == "__main__":
    main()
