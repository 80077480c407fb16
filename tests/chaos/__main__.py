"""README's fault table, from what `make chaos` measured: the last row that was recorded of each fault and job.

Jobs of which the same came are one line, with the longest time.
"""

from __future__ import annotations

import json
import sys
import textwrap
from typing import Any

from tests.chaos.record import FOLDER

HEAD = "| fault | during | outcome | lost | done twice | recovery, or error, after |\n|---|---|---|---|---|---|\n"


def main() -> None:
    """Print the table."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(FOLDER.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["fault"], row["job"]] = row
    merged: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows.values():
        outcome = textwrap.shorten(row["outcome"].replace("|", "/").replace(": error: ", ": "), 130, placeholder=" …")
        merged.setdefault(
            (
                row["fault"],
                outcome,
                "no result" if row["lost"] is None else str(row["lost"]),
                row["twice"] or "nothing",
            ),
            [],
        ).append(row)
    sys.stdout.write(HEAD)
    for (fault, outcome, lost, twice), same in merged.items():
        jobs, longest = ", ".join(row["job"] for row in same), max(row["seconds"] for row in same)
        sys.stdout.write(f"| {fault} | {jobs} | {outcome} | {lost} | {twice} | {longest} s |\n")


if __name__ == "__main__":
    main()
