"""Learning curves for the page's script: grouped by stage and chart, thinned, without what JSON cannot say."""

from __future__ import annotations

import math
from typing import TypedDict

import numpy as np

from freesolo.report.records import Curve, Trend

POINTS_MAX = 1000
"""Of a drawn curve; a chart has fewer pixels across than that."""


class Line(TypedDict):
    """A curve or a trend.

    `values` has None where the value was not finite, or there was none; `not_finite` counts the former, thinned ones
    included.
    """

    name: str
    steps: list[int] | list[float]
    values: list[float | None]
    not_finite: int


class Chart(TypedDict):
    """Curves that share axes; trends where there is a `unit`: of their places, on a logarithmic axis."""

    title: str
    lines: list[Line]
    unit: str | None


class StageCharts(TypedDict):
    """A heading and its charts."""

    stage: str
    charts: list[Chart]


def chart_data(curves: tuple[Curve, ...]) -> list[StageCharts]:
    """The curves by stage, then by chart, each in the order of its first curve. Curves without a point are left out."""
    stages: dict[str, dict[str, list[Line]]] = {}
    for curve in curves:
        if curve.steps:
            charts = stages.setdefault(curve.stage, {})
            charts.setdefault(curve.chart or curve.name, []).append(_line(curve))
    return [
        {"stage": stage, "charts": [{"title": title, "lines": lines, "unit": None} for title, lines in charts.items()]}
        for stage, charts in stages.items()
    ]


def trend_data(trends: tuple[Trend, ...]) -> list[Chart]:
    """The trends by chart, in the order of its first trend. Trends without a place are left out."""
    charts: dict[str, Chart] = {}
    for trend in trends:
        if trend.places:
            chart = charts.setdefault(trend.chart, {"title": trend.chart, "lines": [], "unit": trend.unit})
            values = [None if value is None else float(f"{value:.5g}") for value in trend.values]
            chart["lines"].append({"name": trend.name, "steps": list(trend.places), "values": values, "not_finite": 0})
    return list(charts.values())


def _line(curve: Curve) -> Line:
    last_values = dict(zip(curve.steps, curve.values, strict=True))
    steps = np.array(sorted(last_values), dtype=np.int64)
    values = np.array([last_values[int(step)] for step in steps], dtype=np.float64)
    not_finite = int((~np.isfinite(values)).sum())
    kept = _thin(values)
    return {
        "name": curve.name,
        "steps": steps[kept].tolist(),
        "values": [float(f"{value:.5g}") if math.isfinite(value) else None for value in values[kept]],
        "not_finite": not_finite,
    }


def _thin(values: np.ndarray) -> np.ndarray:
    """Indices of at most `POINTS_MAX` values: the first, the last, and each bucket's extremes, so that spikes stay."""
    count = len(values)
    if count <= POINTS_MAX:
        return np.arange(count)
    kept = {0, count - 1}
    for bucket in np.array_split(np.arange(1, count - 1), (POINTS_MAX - 2) // 2):
        finite = bucket[np.isfinite(values[bucket])]
        # A gap is an extreme too: a bucket without a finite value is kept as one.
        kept |= (
            {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
            if len(finite)
            else {int(bucket[0])}
        )
    return np.array(sorted(kept))
