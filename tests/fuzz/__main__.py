"""`python -m tests.fuzz`: each parser for a while, a table of what came of it; exit code 1 if anything failed."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue

from tests.fuzz.arena import Arena, Tally
from tests.fuzz.parsers import PARSERS


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="parsers; default: all")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"), help="folder for inputs that failed")
    options = parser.parse_args()

    arenas: SimpleQueue[Arena] = SimpleQueue()

    def run(name: str) -> tuple[str, Tally]:
        arena = arenas.get()
        tally = arena.fuzz(name, seed=options.seed, seconds=options.seconds)
        arenas.put(arena)
        return name, tally

    total = failed = 0
    print(f"{'parser':24}{'inputs':>9}{'read':>9}{'refused':>9}{'failed':>8}{'s':>7}")
    with ExitStack() as stack, ThreadPoolExecutor(options.processes) as pool:
        for _ in range(options.processes):
            arenas.put(stack.enter_context(Arena()))
        for name, tally in pool.map(run, options.names or PARSERS):
            total, failed = total + tally.inputs, failed + len(tally.failures)
            print(
                f"{name:24}{tally.inputs:9,}{tally.read:9,}{tally.refused:9,}{len(tally.failures):8}"
                f"{tally.seconds:7.0f}",
                flush=True,
            )
            for content, reason in tally.failures:
                path = options.failures / name.replace(" ", "-").replace("'", "") / sha256(content).hexdigest()[:16]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                print(f"  {path}\n    {reason.strip()[-1500:]}".replace("\n", "\n    "), flush=True)
    print(f"{'all':24}{total:9,}{'':18}{failed:8}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
