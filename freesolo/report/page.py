"""One run as one HTML file that needs nothing else: photos, masks, styles and script are all inside.

It opens from a disk, from a bucket and inside MLflow's artifact viewer (a frame without storage or same origin), and
fetches nothing: its content security policy forbids it to. The tables are plain HTML; the script draws the groups
of objects, the gallery and the curves.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template

from freesolo.progress import describe_seconds
from freesolo.report.chart_data import chart_data, trend_data
from freesolo.report.gallery_data import gallery_data
from freesolo.report.group_data import group_data
from freesolo.report.records import GroupedObjects, MetricRow, Report, StageSummary

SCRIPTS = ("elements.js", "groups.js", "gallery.js", "charts.js", "page.js")


def render_page(report: Report) -> str:
    """The page as HTML text, to be written in UTF-8; the same report gives the same page.

    Args:
        report: Any part but the title may be empty; the page then has no section for it.
    """
    curves, trends = chart_data(report.curves), trend_data(report.trends)
    sections = [
        ("pipeline", "Pipeline", _pipeline(report.stages)),
        ("results", "Results", _metrics(report.metric_rows) + (_asset("trends.html") if trends else "")),
        ("notes", "What this run can and cannot show", _paragraphs(report.notes)),
        ("found", "What it found, grouped", _found(report.found)),
        ("gallery", "Gallery", _asset("gallery.html") if report.gallery else ""),
        ("curves", "Learning curves", _asset("curves.html") if curves else ""),
        ("provenance", "Provenance", _provenance(report.provenance)),
    ]
    shown = [section for section in sections if section[2]]
    script = '"use strict";\n' + "\n".join(_asset(name) for name in SCRIPTS)
    return Template(_asset("page.html")).substitute(
        policy=_policy(script),
        title=escape(report.title),
        style=_asset("page.css"),
        summary=_paragraphs(report.summary.split("\n\n")),
        facts=escape(_facts(report)),
        contents="\n".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in shown),
        sections="\n".join(_section(*section) for section in shown) or "<p>Nothing was recorded.</p>",
        data=_script_json(
            {
                "groups": group_data(report.found),
                "gallery": gallery_data(report.gallery),
                "curves": curves,
                "trends": trends,
            }
        ),
        script=script,
    )


def _policy(script: str) -> str:
    """Of scripts only ours may run, by its digest; nothing may be fetched; pictures are those inside the page."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _script_json(data: object) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings hold."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _facts(report: Report) -> str:
    facts = []
    timed = [stage.seconds for stage in report.stages if stage.seconds is not None]
    if report.stages:
        facts.append(_counted(len(report.stages), "stage"))
    if timed:
        facts.append(f"{describe_seconds(sum(timed))} in all")
    if report.metric_rows:
        facts.append(f"{_counted(len(report.metric_rows), 'label set')} compared")
    if report.found is not None and report.found.groups:
        facts.append(f"{_counted(len(report.found.groups), 'group')} of objects")
    if report.gallery:
        facts.append(f"{_counted(len(report.gallery), 'photo')} to look at")
    return " · ".join(facts)


def _section(name: str, title: str, content: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n'
        f"{content}\n</section>"
    )


def _pipeline(stages: tuple[StageSummary, ...]) -> str:
    if not stages:
        return ""
    total = sum(stage.seconds or 0.0 for stage in stages)
    return '<ol class="pipeline">\n' + "\n".join(_stage(stage, total) for stage in stages) + "\n</ol>"


def _stage(stage: StageSummary, total_seconds: float) -> str:
    share = (stage.seconds or 0.0) / total_seconds if total_seconds else 0.0
    time = "reused, not run again" if stage.seconds is None else describe_seconds(stage.seconds)
    bar = f'<span style="width: {share:.1%}"></span>' if share else ""
    counts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_count_text(count))}</dd></div>"
        for name, count in stage.counts.items()
    )
    return (
        f'<li class="stage"><h3>{escape(stage.name)}</h3><p class="stage-time">{time}</p>'
        f'<div class="share" aria-hidden="true">{bar}</div>' + (f"<dl>{counts}</dl>" if counts else "") + "</li>"
    )


def _metrics(rows: tuple[MetricRow, ...]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    if not names:
        return ""
    tables: dict[str, list[str]] = {}
    for name in names:
        tables.setdefault(name.rpartition("/")[0], []).append(name)
    explained = (
        '<p class="legend-text">In percent, on the same photos; higher is better, and the best of each column is '
        "marked. A dash means that there was nothing to measure. AP is the average precision over overlaps (IoU) of "
        "50 to 95 percent; AP50 and AP75 ask for one overlap. AR100 is the average recall of up to 100 predictions a "
        "photo. Small objects have up to 32 x 32 px, large ones at least 96 x 96. CorLoc is the share of photos in "
        "which some prediction overlaps an object by half.</p>"
    )
    return "\n".join(_metric_table(title, columns, rows) for title, columns in tables.items()) + explained


def _metric_table(title: str, columns: list[str], rows: tuple[MetricRow, ...]) -> str:
    label = title or "Metrics"
    head = "".join(f'<th scope="col">{_column_title(column)}</th>' for column in columns)
    best = {column: _best(column, rows) for column in columns}
    body = "\n".join(
        f'<tr><th scope="row">{escape(row.name)}</th>'
        + "".join(_metric_cell(row.metrics.get(column), best[column]) for column in columns)
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table class="metrics">'
        f"<caption>{escape(label)}</caption>"
        f'<thead><tr><th scope="col">Label set</th>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _column_title(column: str) -> str:
    return escape(column.rpartition("/")[2].replace("_", " "))


def _best(column: str, rows: tuple[MetricRow, ...]) -> float | None:
    """The highest value of a column; None where there is nothing to be better than."""
    values = [value for row in rows if (value := row.metrics.get(column)) is not None]
    return max(values) if values and max(values) > min(values) else None


def _metric_cell(value: float | None, best: float | None) -> str:
    if value is None:
        dash = '<span aria-hidden="true">&ndash;</span><span class="visually-hidden">nothing to measure</span>'
        return f'<td class="nothing">{dash}</td>'
    if value == best:
        return f'<td class="best"><span>{value * 100:.1f}</span><span class="visually-hidden"> best</span></td>'
    return f"<td>{value * 100:.1f}</td>"


def _found(found: GroupedObjects | None) -> str:
    """What was grouped, in words, and the groups' place."""
    if found is None:
        return ""
    name = escape(found.label_set)
    if not found.groups:
        why = "its objects have no embeddings" if found.found else "it has none"
        return f'<p class="empty">No objects of {name} to group: {why}.</p>'
    if found.grouped == found.found:
        which = f"{_counted(found.found, 'object')} of {name}"
    else:
        which = (
            f"{found.grouped:,} of the {found.found:,} objects of {name}, drawn at random from "
            f"{found.sampled_shards:,} of its {found.shards:,} shards"
        )
    explained = (
        "gathered by k-means over their semantic embeddings: nobody told the model what belongs together, or what "
        "anything is called. The largest group is first, and in it its most typical objects. Choose one to see which "
        "others are nearest to it, of whatever group; how alike two are is the cosine between their embeddings."
    )
    return f'<p class="legend-text">{which}, {explained}</p>' + _asset("groups.html")


def _provenance(provenance: Mapping[str, str]) -> str:
    if not provenance:
        return ""
    rows = (f"<dt>{escape(name)}</dt><dd>{_fact(value)}</dd>" for name, value in provenance.items())
    return '<dl class="provenance">\n' + "\n".join(rows) + "\n</dl>"


def _fact(value: str) -> str:
    lines = value.strip("\n").split("\n")
    if len(lines) == 1:
        return f"<code>{escape(value)}</code>"
    return f"<details><summary>{len(lines)} lines</summary><pre>{escape(value)}</pre></details>"


def _paragraphs(paragraphs: tuple[str, ...] | list[str]) -> str:
    return "\n".join(f"<p>{escape(text.strip())}</p>" for text in paragraphs if text.strip())


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}s"


def _count_text(count: int | float | str) -> str:
    if isinstance(count, int):
        return f"{count:,}"
    return f"{count:,.4g}" if isinstance(count, float) else count


def _asset(name: str) -> str:
    return files("freesolo.report").joinpath("assets", name).read_text(encoding="utf-8").rstrip("\n")
