"""Measure this package against peers: `python -m tests.benchmarks [name ...] [--repeats N] [--json path]`.

Nothing is asserted about times. Each benchmark prints one table; all of them are written as JSON, with every repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from freesolo.provenance import code_version
from tests.benchmarks import free_mask, matrix_nms, solo_targets_and_losses
from tests.benchmarks.measure import as_json, compare, table

BENCHMARKS = (solo_targets_and_losses.BENCHMARK, free_mask.BENCHMARK, matrix_nms.BENCHMARK)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks that are asked for, all by default."""
    arguments = _arguments(argv)
    # A log has no width of its own.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    machine = _machine()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    results = []
    for benchmark in BENCHMARKS:
        if arguments.names and benchmark.name not in arguments.names:
            continue
        comparisons = [compare(case, repeats=arguments.repeats) for case in benchmark.cases()]
        console.print(table(benchmark, comparisons))
        results.append(as_json(benchmark, comparisons))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": machine, "benchmarks": results}, indent=2) + "\n")
    console.print(f"every repeat is in {arguments.json}", highlight=False)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure freesolo against peers.")
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--repeats", type=int, help="how often each side is timed; default: each case's own")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks.json"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.names) - set(names))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}: there are {', '.join(names)}")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: at least 1")
    return arguments


def _machine() -> dict[str, Any]:
    """What the times depend on besides the code."""
    return {
        "code": code_version(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pycocotools": version("pycocotools"),
    }


if __name__ == "__main__":
    main()
