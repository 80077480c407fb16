"""Measure this package against peers: `python -m tests.benchmarks [name ...] [--device D] [--repeats N] [--json path]`.

Nothing is asserted about times. Each benchmark prints one table; all of them are written as JSON, with every repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from freesolo.provenance import code_version
from tests.benchmarks.measure import as_json, clock_of, compare, matrix_product_rate, table

NAMES = (
    "solo_targets_and_losses",
    "solo_train_step",
    "mmdet_train_step",
    "densecl_step",
    "free_mask",
    "matrix_nms",
    "inference",
    "input_paths",
    "evaluation",
    "checkpoint",
)
"""Each a module, imported when its turn comes: where there is a GPU, there may be no Ray, and no reader of buckets."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks that are asked for, all by default."""
    arguments = _arguments(argv)
    # A log has no width of its own.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    device = torch.device(arguments.device)
    # On both sides float32 is float32; where they train it is autocast that says what is bfloat16.
    torch.backends.cudnn.allow_tf32 = False
    peak = matrix_product_rate(device, side=8192 if device.type == "cuda" else 2048)
    machine = _machine(device) | {"matrix products": f"{peak / 1e12:.2f} TFLOP/s"}
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    results = []
    for name in arguments.names or NAMES:
        try:
            benchmark = import_module(f"tests.benchmarks.{name}").BENCHMARK
            missing = [package for package in benchmark.needs if find_spec(package) is None]
        except ModuleNotFoundError as error:
            missing = [str(error.name)]
        if missing:
            console.print(f"{name}: left out, because {', '.join(missing)} is not installed", highlight=False)
            continue
        clock = clock_of(device)
        comparisons = [compare(case, repeats=arguments.repeats, clock=clock) for case in benchmark.cases(device)]
        console.print(table(benchmark, comparisons, peak=peak))
        results.append(as_json(benchmark, comparisons))
        # Each time: a later one may fail, or the machine be taken away.
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "benchmarks": results}, indent=2) + "\n")
    console.print(f"every repeat is in {arguments.json}", highlight=False)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure freesolo against peers.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, help="how often each side is timed; default: each case's own")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks.json"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}: there are {', '.join(NAMES)}")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: at least 1")
    return arguments


def _machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on besides the code."""
    return {
        "code": code_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pycocotools": version("pycocotools"),
    }


if __name__ == "__main__":
    main()
