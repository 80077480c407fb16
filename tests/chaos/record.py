"""What a fault did to a job, as it was measured: a line of JSON each, from which README's table is made."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "chaos"


@dataclass(frozen=True, slots=True)
class Row:
    """One fault in one job.

    Attributes:
        fault: What broke.
        job: In which job.
        outcome: What came of the job: "same result", or the line that it ended with.
        lost: Samples, records or files that the result lacks, beside an undisturbed run's; None: not counted, because
            the job ended with an error.
        twice: What was done more than once, counted; "" for nothing.
        seconds: From the fault to recovery, or from the job's start to its error.
        hits: Requests, processes or files that the fault hit.
    """

    fault: str
    job: str
    outcome: str
    lost: int | None
    twice: str
    seconds: float
    hits: int


def record(file: str, row: Row) -> None:
    """Append a row to `build/chaos/<file>.jsonl`.

    Args:
        file: Named after the test file; readers take a fault's and job's last row.
        row: Measured, never a constant.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    line = asdict(row) | {
        "seconds": round(row.seconds, 1),
        "recorded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with (FOLDER / f"{file}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
