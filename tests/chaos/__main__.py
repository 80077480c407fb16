"""README's fault table, from what `make chaos` measured: the last row that was recorded of each fault and job."""

from __future__ import annotations

import json
import sys

from tests.chaos.record import FOLDER

HEAD = "| fault | during | outcome | lost | done twice | recovery |\n|---|---|---|---|---|---|\n"


def main() -> None:
    """Print the table."""
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for path in sorted(FOLDER.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["fault"], row["job"]] = row
    sys.stdout.write(HEAD)
    for (fault, job), row in rows.items():
        twice = row["twice"] or "nothing"
        sys.stdout.write(f"| {fault} | {job} | {row['outcome']} | {row['lost']} | {twice} | {row['seconds']} s |\n")


if __name__ == "__main__":
    main()
