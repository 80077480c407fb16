"""What each part of the method is worth: a base, and beside it rows in which something is missing, added or other.

    base ─────────┐                        pretrain ─▶ ... ─▶ solo-r0 ─▶ ... ─▶ solo-r1 ─┐
    a row ────────┼─▶ with each seed: ─▶                                                 ├─▶ evaluation ─▶ ablations.md
    another ──────┘                        (what two rows have in common is one stage) ──┘

After the paper's ablations (FreeSOLO, arXiv:2202.12181). A stage's folder is named by what it makes, so nothing is
done twice, and a run that is submitted again goes on where it stopped. A seed is the pre-training's too, and results
depend most on how a short one begins. So a row is judged by its difference from the base with the same seed, seed by
seed: the spread of levels is one that all rows have in common.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

from freesolo.comparison import compare
from freesolo.config import BASE, AblationJob, metric_name
from freesolo.data.files import join, write_atomic
from freesolo.data.ingest import over_shards
from freesolo.errors import JobError, UsageError
from freesolo.jobs import tell_dataset, witnessed
from freesolo.pipeline import Made, check_data, run_method
from freesolo.stages import StageFolder, StageResult, run_stage, what_is_made

TABLE = "ablations.md"

_COLUMNS = {
    "AP50": "mask AP50",
    "AP50 difference": "difference in AP50",
    "AP": "mask AP",
    "AR100": "mask AR100",
    "Free Mask AP50": "Free Mask's AP50",
}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Score:
    """What was found in the held-out photos in one row with one seed; in [0, 1], None where there is no object to find.

    Attributes:
        ap50: Mask AP50 of the last round's SOLO.
        ap: Its mask AP.
        ar100: Its mask AR with 100 predictions a photo.
        free_mask_ap50: Mask AP50 of the Free Masks that the row begins with.
    """

    ap50: float | None
    ap: float | None
    ar100: float | None
    free_mask_ap50: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some values the mean, and the standard deviation of the population that they are a sample of.

    Attributes:
        mean: Of all.
        deviation: With n - 1; None of a single value, which has none.
    """

    mean: float
    deviation: float | None


def ablations_stage(job: AblationJob, folder: StageFolder) -> StageResult:
    """The method as configured, and rows that differ from that, each with each seed: a table of what each is worth."""

    def work(_: None) -> StageResult:
        started = time.monotonic()
        with witnessed(job, folder, None) as (witness, journal):
            tell_dataset(witness, job.dataset)
            made = _make(job, folder)
            scores = _evaluate(job, made)
            metrics = _as_metrics(summarize(scores))
            journal.append(0, {name: value for name, value in metrics.items() if value is not None})
            page = f"{_introduction(job)}\n{as_table(scores)}"
            witness.text(TABLE, page)
            write_atomic(join(folder.url, TABLE), page.encode())
            _LOG.info("%s\n%s", join(folder.url, TABLE), page)
        trained = {stage.url for runs in made.values() for one in runs for stage in one.trained.values()}
        counts = {"rows": len(made), "seeds": len(job.seeds), "trainings": len(trained)}
        outputs = {"table": join(folder.url, TABLE)}
        return StageResult(folder.stage, time.monotonic() - started, outputs, counts, metrics)

    return run_stage(folder, what_is_made(job), partial(check_data, job), work)


def _make(job: AblationJob, folder: StageFolder) -> dict[str, list[Made]]:
    """All stages of all rows, in the order of the seeds; a seed's rows are made one after the other.

    Raises:
        UsageError, JobError: A stage's, with its row and seed.
    """
    rows = {BASE: {}, **job.rows}
    made: dict[str, list[Made]] = {name: [] for name in rows}
    for seed in job.seeds:
        for number, (name, values) in enumerate(rows.items(), 1):
            _LOG.info("seed %d of %s: row %d of %d, %s", seed, list(job.seeds), number, len(rows), name)
            try:
                made[name].append(run_method(job.row_job(values, seed), folder, folder.by_content))
            except (UsageError, JobError) as error:
                raise type(error)(f"{name}, seed {seed}: {error}") from error
    return made


def _evaluate(job: AblationJob, made: Mapping[str, Sequence[Made]]) -> dict[str, list[Score]]:
    """The scores of each row, in the order of the seeds; each label set is evaluated once."""
    urls = {name: [(one.held_out["Free Mask"], list(one.held_out.values())[-1]) for one in made[name]] for name in made}
    every = dict.fromkeys(url for pairs in urls.values() for pair in pairs for url in pair)
    metrics = compare(job.evaluation_dataset, {url: url for url in every}, over_shards=over_shards).rows
    return {
        name: [
            Score(metrics[last].segm.ap50, metrics[last].segm.ap, metrics[last].segm.ar100, metrics[first].segm.ap50)
            for first, last in pairs
        ]
        for name, pairs in urls.items()
    }


# --- statistics -----------------------------------------------------------------------------------------------------


def spread_of(values: Sequence[float | None]) -> Spread | None:
    """Mean and standard deviation of some values, one a seed; None if there is none, or if one of them is unknown."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None)


def differences(values: Sequence[float | None], others: Sequence[float | None]) -> list[float | None]:
    """Values less others, seed by seed; None where one of the two is unknown.

    Raises:
        ValueError: There are not as many of both.
    """
    return [
        None if value is None or other is None else value - other for value, other in zip(values, others, strict=True)
    ]


def summarize(scores: Mapping[str, Sequence[Score]]) -> dict[str, dict[str, Spread | None]]:
    """Of each row the columns of the table.

    Args:
        scores: Of each row, one a seed, all in the same order; the first row is the base.

    Returns:
        None where something could not be measured, and for the first row's difference from itself.
    """
    (first, base), *others = ((name, [score.ap50 for score in row]) for name, row in scores.items())
    different = {first: None} | {name: spread_of(differences(ap50, base)) for name, ap50 in others}
    return {
        name: {
            "AP50": spread_of([score.ap50 for score in row]),
            "AP50 difference": different[name],
            "AP": spread_of([score.ap for score in row]),
            "AR100": spread_of([score.ar100 for score in row]),
            "Free Mask AP50": spread_of([score.free_mask_ap50 for score in row]),
        }
        for name, row in scores.items()
    }


# --- the table ------------------------------------------------------------------------------------------------------


def as_table(scores: Mapping[str, Sequence[Score]]) -> str:
    """The rows as a Markdown table, in percent; a dash where there is nothing to say.

    Args:
        scores: As `summarize` takes them.
    """
    header = ["row", *_COLUMNS.values(), "mask AP50 by seed"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, row in summarize(scores).items():
        spreads = [_shown(row[column], signed=column == "AP50 difference") for column in _COLUMNS]
        by_seed = ", ".join(_percent(score.ap50) for score in scores[name])
        lines.append(f"| {' | '.join([name, *spreads, by_seed])} |")
    return "\n".join(lines) + "\n"


def _shown(spread: Spread | None, *, signed: bool) -> str:
    return "-" if spread is None else f"{_percent(spread.mean, signed=signed)} ± {_percent(spread.deviation)}"


def _percent(share: float | None, *, signed: bool = False) -> str:
    return "-" if share is None else f"{100 * share:{'+' if signed else ''}.1f}"


def _introduction(job: AblationJob) -> str:
    """What the numbers are, and what each row sets."""
    rows = [
        f"- {name}: {', '.join(f'`{setting}: {value}`' for setting, value in values.items())}"
        for name, values in job.rows.items()
    ]
    return "\n".join(
        [
            f"Class-agnostic, in percent, on {job.evaluation_dataset}: mean ± standard deviation over the seeds "
            f"{', '.join(map(str, job.seeds))}. Differences are from the {BASE} with the same seed.",
            "",
            *rows,
            "",
        ]
    )


def _as_metrics(summaries: Mapping[str, Mapping[str, Spread | None]]) -> dict[str, float | None]:
    """`<row>/<column>` each, and the deviation, under names that MLflow takes."""
    metrics: dict[str, float | None] = {}
    for name, row in summaries.items():
        for column, spread in row.items():
            metrics[f"{name}/{column}"] = None if spread is None else spread.mean
            metrics[f"{name}/{column} deviation"] = None if spread is None else spread.deviation
    return {metric_name(name): value for name, value in metrics.items()}
