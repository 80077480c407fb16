"""The report page of a run: what its stages did, how their losses went, what was found, and what it came of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from freesolo.config_file import dump_config
from freesolo.data.files import join, write_atomic
from freesolo.evaluation import Metrics
from freesolo.provenance import code_version, git_commit
from freesolo.report.page import render_page
from freesolo.report.records import Curve, GalleryPhoto, GroupedObjects, MetricRow, Report, StageSummary, Trend
from freesolo.settings import Settings
from freesolo.stages import StageFolder, StageResult
from freesolo.tracking.journal import read_journal
from freesolo.tracking.witness import Witness

PAGE = "report/index.html"

# Which metrics of a training are drawn, and on which axes.
_CHARTS = {"learning_rate": "Learning rate", "images_per_second": "Images per second", "gradient_norm": "Gradient norm"}


def write_report(
    folder: StageFolder,
    witness: Witness,
    *,
    title: str,
    summary: str,
    stages: Sequence[tuple[str, StageResult]],
    trained: Sequence[tuple[str, StageFolder]],
    rows: Mapping[str, Metrics],
    gallery: tuple[GalleryPhoto, ...],
    notes: tuple[str, ...],
    settings: Settings,
    provenance: Mapping[str, str],
    found: GroupedObjects | None = None,
    trends: tuple[Trend, ...] = (),
) -> str:
    """Write `report/index.html` into a stage's folder, and tell MLflow as an artifact of that name.

    Args:
        folder: Of the stage.
        witness: Of the stage's MLflow run.
        title: The run's name.
        summary: What was run, in words.
        stages: A name for people and what came of it, in the order in which they ran.
        trained: A name for people and the folder of each stage that has learning curves.
        rows: Metrics of each label set, in the order of the table.
        gallery: Photos with masks.
        notes: What the run can and cannot show.
        settings: The resolved configuration.
        provenance: Digests, versions and lineage, beside the code's and the configuration.
        found: What was found, grouped; None for no such section.
        trends: How a measure goes with what was varied.

    Returns:
        The page's URL.
    """
    report = Report(
        title=title,
        summary=summary,
        stages=tuple(StageSummary(name, result.seconds, result.counts) for name, result in stages),
        curves=tuple(curve for name, stage in trained for curve in _curves(name, stage)),
        metric_rows=tuple(MetricRow(name, _shares(metrics)) for name, metrics in rows.items()),
        found=found,
        trends=trends,
        gallery=gallery,
        notes=notes,
        provenance={
            "Git commit": git_commit() or f"not in a checkout; freesolo {code_version()}",
            **provenance,
            "Configuration": dump_config(settings),
        },
    )
    page, url = render_page(report), join(folder.url, PAGE)
    write_atomic(url, page.encode())
    witness.text(PAGE, page)
    return url


def _curves(name: str, folder: StageFolder) -> list[Curve]:
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in read_journal(folder.url):
        for metric, value in entry.metrics.items():
            if metric == "loss" or metric.startswith(("loss/", "probe/")) or metric in _CHARTS:
                points.setdefault(metric, []).append((entry.step, value))
    return [
        Curve(
            name=metric.rpartition("/")[2] if metric != "loss" else "sum",
            steps=tuple(step for step, _ in values),
            values=tuple(value for _, value in values),
            stage=name,
            chart="Frozen features" if metric.startswith("probe/") else _CHARTS.get(metric, "Losses"),
        )
        for metric, values in points.items()
    ]


def _shares(metrics: Metrics) -> dict[str, float | None]:
    """Metrics under the page's names: a table for masks, one for boxes, one for categories where there are any."""
    tables = {"segm": "Masks", "bbox": "Boxes", "category": "Categories"}
    shares: dict[str, float | None] = {}
    for key, value in metrics.as_dict().items():
        kind, slash, name = key.partition("/")
        if slash and "/" not in name:  # each single category's would make a table as wide as there are categories
            shares[f"{tables[kind]}/{name}"] = value
    shares["Masks/CorLoc"] = metrics.corloc
    return shares
