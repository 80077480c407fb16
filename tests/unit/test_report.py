"""The report page's data and its plain HTML. That it works in a browser is tested in e2e."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from freesolo.report.chart_data import POINTS_MAX, chart_data
from freesolo.report.gallery_data import LONG_SIDE_MAX, gallery_data
from freesolo.report.group_data import group_data
from freesolo.report.page import render_page
from freesolo.report.records import (
    Curve,
    FoundObject,
    GalleryLayer,
    GalleryPhoto,
    GroupedObjects,
    MetricRow,
    ObjectGroup,
    Report,
    StageSummary,
)

HOSTILE = "<!--<script </script x></script><script>alert('x')</script> & \"quotes\" \u2028 \udcff.jpg"


class Page(HTMLParser):
    """Elements by tag, and the text of the page outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data = ""
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script" and dict(attrs).get("type") == "application/json":
            self._inside = "data"

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif not self._inside:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def photo(*layers: GalleryLayer, name: str = "a.jpg", height: int = 6, width: int = 8) -> GalleryPhoto:
    return GalleryPhoto(name, np.full((height, width, 3), 90, dtype=np.uint8), layers)


def layer(name: str, *areas: int, scores: tuple[float, ...] | None = None) -> GalleryLayer:
    """A layer of 6 x 8 masks; each covers that many pixels of the first row."""
    masks = np.zeros((len(areas), 6, 8), dtype=bool)
    for mask, area in zip(masks, areas, strict=True):
        mask[0, :area] = True
    return GalleryLayer(name, masks, None if scores is None else np.asarray(scores, dtype=np.float32))


# --- curves ---------------------------------------------------------------------------------------------------------


def test_curves_are_grouped_by_stage_and_chart_in_their_order() -> None:
    curves = (
        Curve("total", (0, 1), (2.0, 1.0), "SOLO", "loss"),
        Curve("rate", (0,), (0.1,), "DenseCL"),
        Curve("pairwise", (0,), (3.0,), "SOLO", "loss"),
        Curve("rate", (0,), (0.2,), "SOLO"),
    )
    stages = chart_data(curves)
    assert [stage["stage"] for stage in stages] == ["SOLO", "DenseCL"]
    assert [chart["title"] for chart in stages[0]["charts"]] == ["loss", "rate"]
    assert [line["name"] for line in stages[0]["charts"][0]["lines"]] == ["total", "pairwise"]


def test_curves_without_points_are_left_out() -> None:
    assert chart_data((Curve("total", (), (), "SOLO"),)) == []


def test_a_replayed_step_shows_its_last_value_in_its_place() -> None:
    curve = Curve("total", (0, 20, 10, 20, 30), (5.0, 3.0, 4.5, 3.5, 3.25), "SOLO")
    line = chart_data((curve,))[0]["charts"][0]["lines"][0]
    assert line["steps"] == [0, 10, 20, 30]
    assert line["values"] == [5.0, 4.5, 3.5, 3.25]


def test_what_is_not_finite_becomes_a_gap_and_is_counted() -> None:
    curve = Curve("total", (0, 1, 2, 3), (1.0, math.nan, math.inf, 2.0), "SOLO")
    line = chart_data((curve,))[0]["charts"][0]["lines"][0]
    assert line["values"] == [1.0, None, None, 2.0]
    assert line["not_finite"] == 2


def test_a_long_curve_is_thinned_but_keeps_its_ends_and_its_spike() -> None:
    values = np.zeros(30_000)
    values[[0, 17_771, -1]] = 1.0, 99.0, 2.0
    values[17_770] = math.nan
    line = chart_data((Curve("total", tuple(range(30_000)), tuple(values.tolist()), "SOLO"),))[0]["charts"][0]["lines"][
        0
    ]
    assert len(line["steps"]) <= POINTS_MAX
    assert len(line["steps"]) > POINTS_MAX / 3
    assert (line["steps"][0], line["values"][0]) == (0, 1.0)
    assert (line["steps"][-1], line["values"][-1]) == (29_999, 2.0)
    assert line["values"][line["steps"].index(17_771)] == 99.0


def test_a_long_gap_stays_a_gap_when_thinned() -> None:
    values = np.ones(5_000)
    values[1_000:] = math.nan
    line = chart_data((Curve("total", tuple(range(5_000)), tuple(values.tolist()), "SOLO"),))[0]["charts"][0]["lines"][
        0
    ]
    assert line["not_finite"] == 4_000
    assert all(value is None for step, value in zip(line["steps"], line["values"], strict=True) if step >= 1_000)
    assert line["values"].count(None) > 300


def test_steps_and_values_must_agree() -> None:
    with pytest.raises(ValueError, match="'total' has 2 steps but 1 values"):
        Curve("total", (0, 1), (1.0,), "SOLO")


# --- gallery --------------------------------------------------------------------------------------------------------


def test_a_photo_travels_inside_the_page() -> None:
    shown = gallery_data((photo(),))["photos"][0]
    kind, _, text = shown["source"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert image.size == (8, 6) == (shown["width"], shown["height"])


def test_masks_come_largest_first_with_their_scores() -> None:
    shown = gallery_data((photo(layer("Free Mask", 2, 5, 1, scores=(0.7, 0.80001, 0.9))),))["photos"][0]["layers"]
    assert shown == [{"paths": ["M0 0h5v1h-5z", "M0 0h2v1h-2z", "M0 0h1v1h-1z"], "scores": [0.8, 0.7, 0.9]}]


def test_label_sets_keep_their_column_where_a_photo_lacks_them() -> None:
    gallery = gallery_data(
        (photo(layer("Ground truth", 3)), photo(layer("Free Mask", scores=()), layer("Ground truth", 1)))
    )
    assert gallery["names"] == ["Ground truth", "Free Mask"]
    first, second = gallery["photos"]
    assert first["layers"][1] is None  # not in that label set
    assert second["layers"][1] == {"paths": [], "scores": []}  # in it, without a mask
    assert second["layers"][0] == {"paths": ["M0 0h1v1h-1z"], "scores": None}


def test_large_photos_and_their_masks_are_shrunk_together() -> None:
    height, width = 3 * LONG_SIDE_MAX, LONG_SIDE_MAX
    masks = np.zeros((1, height, width), dtype=bool)
    masks[0, 1_200:1_500, 300:330] = True
    big = GalleryPhoto("big.jpg", np.zeros((height, width, 3), np.uint8), (GalleryLayer("Free Mask", masks),))
    shown = gallery_data((big,))["photos"][0]
    assert (shown["width"], shown["height"]) == (213, LONG_SIDE_MAX)  # 640 / 3 = 213.3
    labels = shown["layers"][0]
    assert labels is not None
    assert labels["paths"] == ["M100 400h10v100h-10z"]


def test_an_empty_gallery_is_empty() -> None:
    gallery = gallery_data(())
    assert (gallery["names"], gallery["photos"]) == ([], [])


def test_a_photos_parts_must_agree() -> None:
    with pytest.raises(ValueError, match="1 masks but 2 scores"):
        layer("Free Mask", 3, scores=(0.1, 0.2))
    with pytest.raises(ValueError, match="score that is not finite"):
        layer("Free Mask", 3, scores=(math.nan,))
    with pytest.raises(ValueError, match=r"'a.jpg' is \(5, 8\) .* 'Free Mask' are \(6, 8\)"):
        photo(layer("Free Mask", 3), height=5)
    with pytest.raises(ValueError, match="two layers of one name"):
        photo(layer("Free Mask", 3), layer("Free Mask", 2))


# --- groups ---------------------------------------------------------------------------------------------------------


def found_object(name: str = "a.jpg", nearest: tuple[tuple[int, float], ...] = ()) -> FoundObject:
    return FoundObject(name, 0.87654, np.full((6, 8, 3), 90, np.uint8), nearest)


def test_groups_travel_inside_the_page_each_picture_once() -> None:
    objects = (found_object("a.jpg", ((1, 0.987), (2, -0.304))), found_object("b.jpg"), found_object("c.jpg"))
    groups = group_data(GroupedObjects("SOLO", 9, 1, 1, (ObjectGroup(7, (0, 2)), ObjectGroup(2, (1,))), objects))
    assert groups is not None
    assert (groups["grouped"], groups["groups"]) == (9, [{"size": 7, "shown": [0, 2]}, {"size": 2, "shown": [1]}])
    assert [each["nearest"] for each in groups["objects"]] == [[(1, 99), (2, -30)], [], []]
    first = groups["objects"][0]
    assert (first["name"], first["score"], first["width"], first["height"]) == ("a.jpg", 0.8765, 8, 6)
    kind, _, text = first["source"].partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert (image.format, image.size) == ("WEBP", (8, 6))
    assert group_data(None) is None


@pytest.mark.parametrize(("shown", "nearest"), [((1,), 0), ((0,), 1), ((-1,), 0)])
def test_groups_name_objects_that_are_there(shown: tuple[int, ...], nearest: int) -> None:
    with pytest.raises(ValueError, match="'SOLO' names one of 1 by no place"):
        GroupedObjects("SOLO", 1, 1, 1, (ObjectGroup(1, shown),), (found_object(nearest=((nearest, 1.0),)),))


def words_of(found: GroupedObjects | None) -> str:
    return " ".join(Page(render_page(Report("r", "", found=found))).text.split())


def test_the_page_says_what_was_grouped() -> None:
    groups = (ObjectGroup(1200, (0,)), ObjectGroup(34, ()))
    everything = words_of(GroupedObjects("Pseudo-labels <1>", 1234, 5, 5, groups, (found_object(),)))
    assert "What it found, grouped 1,234 objects of Pseudo-labels <1>, gathered by k-means" in everything
    assert "2 groups of objects" in everything
    sampled = words_of(GroupedObjects("Free Mask", 1_000_000, 1183, 8, groups, (found_object(),)))
    assert "1,234 of the 1,000,000 objects of Free Mask, drawn at random from 8 of its 1,183 shards, gath" in sampled


def test_the_page_says_why_nothing_was_grouped_or_nothing_at_all() -> None:
    assert "No objects of Free Mask to group: it has none." in words_of(GroupedObjects("Free Mask", 0, 5, 0))
    without = words_of(GroupedObjects("Free Mask", 7, 5, 5))
    assert "No objects of Free Mask to group: its objects have no embeddings." in without
    assert "groups of objects" not in without
    assert "grouped" not in words_of(None)


# --- the page -------------------------------------------------------------------------------------------------------


def test_a_part_that_is_empty_has_no_section() -> None:
    page = Page(render_page(Report("nothing", "")))
    assert "Nothing was recorded." in page.text
    assert page.count("section") == page.count("table") == page.count("li") == 0
    assert json.loads(page.data)["curves"] == []
    noted = Page(render_page(Report("noted", "", notes=("A small run.",))))
    assert noted.count("section") == noted.count("li") == 1
    assert "What this run can and cannot show" in noted.text


def test_stages_show_counts_and_their_share_of_the_time() -> None:
    stages = (
        StageSummary("Free Mask", 90.0, {"masks": 1312, "mean score": 0.81234, "device": "cpu"}),
        StageSummary("SOLO <1>", 30.0),
        StageSummary("Predict", None, {"photos": 4}),
    )
    html = render_page(Report("r", "", stages=stages))
    page = Page(html)
    assert "1,312" in page.text
    assert "0.8123" in page.text
    assert "1 min 30 s" in page.text
    assert "SOLO <1>" in page.text
    assert "reused, not run again" in page.text
    assert "3 stages · 2 min in all" in page.text
    assert re.findall(r"width: ([\d.]+%)", html.partition('id="pipeline"')[2].partition("</section>")[0]) == [
        "75.0%",
        "25.0%",
    ]


def test_stages_without_any_time_have_no_share() -> None:
    assert "0.0 s" in Page(render_page(Report("r", "", stages=(StageSummary("Pack", 0.0),)))).text


def metric_cells(rows: tuple[MetricRow, ...]) -> list[str]:
    html = render_page(Report("r", "", metric_rows=rows))
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", html)]


def test_metrics_are_percents_with_the_best_of_each_column_marked() -> None:
    rows = (
        MetricRow("Free Mask", {"Masks/AP50": 0.0984, "Masks/S": None}),
        MetricRow("SOLO round 1", {"Masks/AP50": 0.124, "Masks/S": 0.0}),
        MetricRow("SOLO round 2", {"Masks/AP50": 0.124}),
    )
    dash = "&ndash;nothing to measure"
    # A column with one value, or with the same everywhere, has no best.
    assert metric_cells(rows) == ["9.8", dash, "12.4 best", "0.0", "12.4 best", dash]


def test_each_kind_of_metric_is_a_table() -> None:
    rows = (MetricRow("Free Mask", {"Masks/AP": 0.1, "Boxes/AP_small": 0.2, "CorLoc": 0.3}),)
    html = render_page(Report("r", "", metric_rows=rows))
    assert re.findall(r"<caption>(.*?)</caption>", html) == ["Masks", "Boxes", "Metrics"]
    assert re.findall(r'<th scope="col">(.*?)</th>', html) == [
        "Label set",
        "AP",
        "Label set",
        "AP small",
        "Label set",
        "CorLoc",
    ]
    assert metric_cells(rows) == ["10.0", "20.0", "30.0"]


@pytest.mark.parametrize("value", [-1.0, 9.8, math.nan])
def test_a_metric_that_is_no_share_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"'Masks/AP' of 'Free Mask' is .*: give a share in \[0, 1\] or None"):
        MetricRow("Free Mask", {"Masks/AP": value})


def test_words_and_provenance_are_shown() -> None:
    report = Report(
        "r",
        "First.\n\nSecond.",
        notes=("Can.", "Cannot."),
        provenance={"git commit": "b6d65db", "configuration": "loop:\n  steps: 300\n"},
    )
    html = render_page(report)
    for paragraph in ("First.", "Second.", "Can.", "Cannot."):
        assert f"<p>{paragraph}</p>" in html
    assert "<dt>git commit</dt><dd><code>b6d65db</code></dd>" in html
    assert "<details><summary>2 lines</summary><pre>loop:\n  steps: 300\n</pre></details>" in html


def hostile_report() -> Report:
    name = HOSTILE.replace("\udcff", "")
    return Report(
        name,
        name,
        stages=(StageSummary(name, 1.0, {name: name}),),
        curves=(Curve(name, (0, 1), (1.0, 2.0), name, name),),
        metric_rows=(MetricRow(name, {f"{name}/AP": 0.5, name.replace("/", ""): 0.5}),),
        found=GroupedObjects(name, 1, 1, 1, (ObjectGroup(1, (0,)),), (found_object(HOSTILE, ((0, 1.0),)),)),
        gallery=(photo(GalleryLayer(name, np.ones((1, 6, 8), dtype=bool)), name=HOSTILE),),
        notes=(name,),
        provenance={name: name},
    )


def test_names_that_look_like_markup_stay_names() -> None:
    html = render_page(hostile_report())
    page = Page(html)
    assert page.count("script") == 2  # the data and ours
    assert "alert" not in {value for _, attributes in page.elements for value in attributes}
    assert "<" not in page.data  # nothing that a browser could take for an end or a comment
    data = json.loads(page.data)
    assert data["gallery"]["photos"][0]["name"] == HOSTILE
    assert data["groups"]["objects"][0]["name"] == HOSTILE
    assert data["curves"][0]["charts"][0]["lines"][0]["name"] == HOSTILE.replace("\udcff", "")
    html.encode("utf-8")  # a name that is not UTF-8 on disk can be written all the same


def test_the_page_asks_for_nothing() -> None:
    html = render_page(hostile_report())
    page = Page(html)
    assert page.count("link") == 1  # an empty icon, or browsers ask for one
    assert not [attributes for _, attributes in page.elements if attributes.get("src")]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML", html)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy


def test_the_same_report_gives_the_same_page() -> None:
    assert render_page(hostile_report()) == render_page(hostile_report())


def test_the_page_needs_no_cluster_and_no_tracker() -> None:
    code = "import sys, freesolo.report.page; print({'ray', 'mlflow', 'fsspec', 'torch', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
