"""The report page in a real browser: what a person can do with it works, and nothing is asked of any network."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

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
    Trend,
)

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the playwright package (pip install freesolo[dev])"
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
SIZES = ((96, 128), (128, 96))


def disc(height: int, width: int, row: float, column: float, radius: float) -> np.ndarray:
    rows, columns = np.indices((height, width))
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def scene(number: int) -> GalleryPhoto:
    """A photo of two discs on a slope of colour. Free Mask finds both, coarsely; SOLO finds the larger and a speck.

    Photo 0 has no masks of SOLO, photo 1 is not in its label set at all.
    """
    height, width = SIZES[number % 2]
    rows, columns = np.indices((height, width))
    pixels = np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 40 + 9 * number)], axis=2)
    objects = [disc(height, width, 50, 40, 22), disc(height, width, 40, 80, 12)]
    for n, mask in enumerate(objects):
        pixels[mask] = (230, 210 - 140 * n, 60 + 150 * n)
    coarse = np.stack([disc(height, width, 52, 42, 26), disc(height, width, 40, 78, 15)])
    speck = np.zeros((height, width), dtype=bool)
    speck[70, 70] = True
    fine = np.stack([objects[0], speck]) if number else np.zeros((0, height, width), dtype=bool)
    layers = [
        GalleryLayer("Ground truth", np.stack(objects)),
        GalleryLayer("Free Mask", coarse, np.array([0.95, 0.72])),
        GalleryLayer("SOLO round 1", fine, np.array([0.6, 0.2])[: len(fine)]),
    ]
    return GalleryPhoto(f"scene-{number:02d}.jpg", pixels.astype(np.uint8), tuple(layers[: 2 if number == 1 else 3]))


def found_object(number: int, *nearest: tuple[int, float]) -> FoundObject:
    return FoundObject(f"found-{number}.jpg", 0.5, np.full((128, 96, 3), 40 * number, np.uint8), nearest)


def grouped_objects() -> GroupedObjects:
    """1,240 objects in three groups, of which five are shown; the last group's photos could not be read."""
    objects = (
        found_object(0, (1, 0.98), (3, 0.51)),
        found_object(1, (0, 0.98), (2, 0.7), (4, -0.05)),
        found_object(2),  # nothing is near it
        found_object(3, (4, 1.0)),
        found_object(4),
    )
    groups = (ObjectGroup(1200, (0, 1, 2)), ObjectGroup(36, (3,)), ObjectGroup(4, ()))
    return GroupedObjects("Pseudo-labels 1", 1240, 3, 3, groups, objects)


def sample_report(photos: int = 11) -> Report:
    steps = tuple(range(0, 2000, 10))
    total = tuple(math.nan if step == 500 else 1 + 2 * math.exp(-step / 600) for step in steps)
    columns = [f"Masks/{name}" for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")]
    return Report(
        title="demo-run",
        summary="Two discs a scene.",
        stages=(
            StageSummary("Free Mask", 41.0, {"photos": photos, "masks": 2 * photos}),
            StageSummary("SOLO round 1", 600.0, {"steps": 2000}),
        ),
        curves=(
            Curve("total", steps, total, "SOLO round 1", "loss"),
            Curve("pairwise", steps, tuple(0.5 for _ in steps), "SOLO round 1", "loss"),
            Curve("learning rate", steps, tuple(1e-3 * step / 2000 for step in steps), "SOLO round 1"),
        ),
        metric_rows=(
            MetricRow("Free Mask", dict.fromkeys(columns) | {"Masks/AP50": 0.098, "Boxes/AP50": 0.12}),
            MetricRow("SOLO round 1", dict.fromkeys(columns) | {"Masks/AP50": 0.124, "Boxes/AP50": 0.11}),
        ),
        found=grouped_objects(),
        gallery=tuple(scene(number) for number in range(photos)),
        notes=("It can show that the page works.", "It cannot show more."),
        provenance={"git commit": "b6d65db", "configuration": "loop:\n  steps: 2000\n"},
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        yield opened
        opened.close()


class Opened:
    """A page, what it asked for and what it complained about."""

    def __init__(self, browser: Browser, url: str, **options: object) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)


def write(report: Report, folder: Path) -> str:
    path = folder / "index.html"
    path.write_text(render_page(report), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(sample_report(), tmp_path_factory.mktemp("report"))


@pytest.fixture
def opened(browser: Browser, url: str) -> Iterator[Opened]:
    """The sample report, which must still have asked for nothing and complained of nothing when the test is over."""
    shown = Opened(browser, url, viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    yield shown
    shown.context.close()
    assert shown.complaints == []
    assert [request for request in shown.requests if not request.startswith("data:")] == [url]


def status(page: Page) -> str:
    return page.locator("[data-pager] .status").first.inner_text()


def visible_masks(page: Page) -> int:
    return page.locator("#photos .mask:visible").count()


def test_groups_of_objects_are_rows_of_pictures(opened: Opened) -> None:
    page = opened.page
    rows = page.locator("#groups-view .group")
    heads = rows.locator(".group-head").all_inner_texts()
    assert [" ".join(head.split()) for head in heads] == [
        "Group 1 1,200 objects, 97%",
        "Group 2 36 objects, 3%",
        "Group 3 4 objects, under 1%",
    ]
    assert [rows.nth(n).locator("img").count() for n in range(3)] == [3, 1, 0]
    assert rows.nth(2).get_by_text("No photo of these could be read.").is_visible()
    assert page.get_by_role("img", name="Object 2 of group 1, from found-1.jpg, score 0.50").is_visible()
    decoded = "images => images.map(image => image.complete && [image.naturalHeight, image.naturalWidth])"
    assert rows.locator("img").evaluate_all(decoded) == [[128, 96]] * 4
    assert page.locator("#groups-view .nearest:visible").count() == 0
    assert rows.first.get_by_role("button").count() == 2  # what has no nearest objects cannot be asked for them


def test_an_object_shows_its_nearest_and_hides_them(opened: Opened) -> None:
    page = opened.page
    shown = page.locator("#groups-view .nearest:visible")
    second = page.get_by_role("button", name="Object 2 of group 1")
    second.click()
    assert shown.locator("p").inner_text() == "Nearest to found-1.jpg, and how alike they are:"
    assert shown.locator("figcaption").all_inner_texts() == ["98%", "70%", "-5%"]
    alternatives = shown.locator("img").evaluate_all("images => images.map(image => image.alt)")
    assert alternatives[0] == "98 percent alike, from found-0.jpg, score 0.50"
    sources = "images => images.map(image => image.src)"
    own = page.locator("#groups-view .group").first.locator("ul").first.locator("img").evaluate_all(sources)
    assert shown.locator("img").evaluate_all(sources)[:2] == [own[0], own[2]]
    assert second.get_attribute("aria-expanded") == "true"
    page.get_by_role("button", name="Object 1 of group 2").click()  # one row at a time
    assert shown.locator("figcaption").all_inner_texts() == ["100%"]
    assert second.get_attribute("aria-expanded") == "false"
    page.get_by_role("button", name="Object 1 of group 2").click()
    assert shown.count() == 0


def test_nearest_objects_are_found_from_the_keyboard(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("button", name="Object 1 of group 1").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#groups-view .nearest:visible p").inner_text().startswith("Nearest to found-1.jpg")
    page.keyboard.press("Space")
    assert page.locator("#groups-view .nearest:visible").count() == 0


def test_the_first_page_shows_every_label_set(opened: Opened) -> None:
    page = opened.page
    assert page.locator("#photos .photo").count() == 8
    # 8 photos: 16 true masks, 16 of Free Mask, and of SOLO 0 + not known + 6 * 2 = 12.
    assert status(page) == "Photos 1 to 8 of 11 · 44 masks"
    assert visible_masks(page) == 44
    captions = page.locator("#photos .photo").first.locator(".caption").all_inner_texts()
    assert [" ".join(caption.split()) for caption in captions] == [
        "Ground truth 2 masks",
        "Free Mask 2 masks",
        "SOLO round 1 no masks",
    ]
    assert "not in this label set" in page.locator("#photos .photo").nth(1).inner_text()


def test_photos_are_decoded_and_masks_lie_where_they_should(opened: Opened) -> None:
    page = opened.page
    # An SVG image that failed to load has no size of its own to tell; a canvas drawing of it does.
    width, height = page.evaluate(
        """async () => {
             const picture = new Image();
             picture.src = document.querySelector("#photos image").getAttribute("href");
             await picture.decode();
             return [picture.naturalWidth, picture.naturalHeight];
           }"""
    )
    assert (height, width) == SIZES[0]
    panel, shown = page.locator("#photos .panel").first, page.locator("#photos svg").first
    width_of = "node => node.getBoundingClientRect().width"
    assert panel.evaluate(width_of) == pytest.approx(shown.evaluate(width_of))
    box = page.evaluate(
        """() => {
             const mask = document.querySelector("#photos .mask").getBBox();
             return [mask.x, mask.y, mask.width, mask.height];
           }"""
    )
    assert box == [18, 28, 45, 45]  # the disc at row 50, column 40 of radius 22


def test_a_label_set_can_be_hidden(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("checkbox", name="Free Mask").uncheck()
    assert status(page) == "Photos 1 to 8 of 11 · 28 masks"
    assert visible_masks(page) == 28
    assert page.locator("#photos .photo").first.locator(".panel:visible").count() == 2
    page.get_by_role("checkbox", name="Free Mask").check()
    assert status(page) == "Photos 1 to 8 of 11 · 44 masks"


def test_masks_below_the_score_are_hidden(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("slider", name="Lowest score shown of Free Mask").fill("0.8")
    # Free Mask keeps 0.95 and loses 0.72 in each of 8 photos.
    assert status(page) == "Photos 1 to 8 of 11 · 36 of 44 masks"
    assert visible_masks(page) == 36
    assert page.locator(".label-set", has_text="Free Mask").inner_text().split() == [
        "Free",
        "Mask",
        "≥",
        "0.80",
        "8",
        "of",
        "16",
        "masks",
    ]
    assert page.get_by_role("slider").count() == 2  # ground truth has no scores
    page.get_by_role("slider", name="Lowest score shown of SOLO round 1").fill("0.6")
    # A mask at exactly the score stays: of SOLO's 12 the 6 of 0.6.
    assert status(page) == "Photos 1 to 8 of 11 · 30 of 44 masks"


def test_pages_can_be_turned_and_resized(opened: Opened) -> None:
    page = opened.page
    previous, following = (
        page.get_by_role("button", name="← Previous").first,
        page.get_by_role("button", name="Next →").first,
    )
    assert previous.get_attribute("aria-disabled") == "true"
    page.get_by_role("slider", name="Lowest score shown of Free Mask").fill("0.8")
    following.click()
    assert status(page) == "Photos 9 to 11 of 11 · 15 of 18 masks"  # the score stays in force
    assert page.locator("#photos figcaption").all_inner_texts() == ["scene-08.jpg", "scene-09.jpg", "scene-10.jpg"]
    assert following.get_attribute("aria-disabled") == "true"
    following.click(force=True)  # as a person may; it stays where it can be focused
    assert status(page).startswith("Photos 9 to 11")
    page.get_by_label("Photos per page").select_option("4")
    assert status(page).startswith("Photos 9 to 11")  # the first photo stayed in sight
    previous.click()
    assert status(page).startswith("Photos 5 to 8")
    page.get_by_label("Photos per page").select_option("16")
    assert status(page).startswith("Photos 1 to 11")


def test_turning_at_the_foot_returns_to_the_head_of_the_gallery(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("button", name="Next →").last.click()
    assert page.evaluate("document.getElementById('gallery-view').getBoundingClientRect().top") >= 0
    assert status(page).startswith("Photos 9 to 11")


def test_label_sets_can_share_one_photo(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("radio", name="On one photo").check()
    first = page.locator("#photos .photo").nth(2)
    assert first.locator(".panel").count() == 1
    assert first.locator(".mask").count() == 6
    colours = first.locator(".masks").evaluate_all(
        "groups => groups.map(group => getComputedStyle(group.querySelector('.mask')).fill)"
    )
    assert len(set(colours)) == 3  # one a label set
    page.get_by_role("checkbox", name="Ground truth").uncheck()
    assert first.locator(".mask:visible").count() == 4
    assert first.locator(".caption .shown").inner_text() == "4 masks"
    assert status(page) == "Photos 1 to 8 of 11 · 28 masks"
    page.get_by_role("checkbox", name="Photo without masks too").check()
    assert first.locator(".panel").count() == 2
    assert first.locator(".panel").first.locator(".mask").count() == 0


def test_outlines_can_be_shown_alone(opened: Opened) -> None:
    page = opened.page
    opacity = "getComputedStyle(document.querySelector('#photos .mask')).fillOpacity"
    assert float(page.evaluate(opacity)) > 0
    page.get_by_role("checkbox", name="Outlines only").check()
    assert float(page.evaluate(opacity)) == 0


def test_a_photo_can_be_enlarged_and_turned_by_keys(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("slider", name="Lowest score shown of Free Mask").fill("0.8")
    panel = page.get_by_role("button", name="Enlarge scene-00.jpg, Free Mask: 1 of 2 masks")
    small = panel.locator("svg").bounding_box()
    panel.click()
    dialog = page.get_by_role("dialog", name="scene-00.jpg")
    large = dialog.locator("svg").bounding_box()
    assert small is not None
    assert large is not None
    assert large["width"] > 1.5 * small["width"]
    assert large["width"] / large["height"] == pytest.approx(128 / 96, rel=0.01)
    assert dialog.locator("#zoom-count").inner_text() == "Free Mask: 1 of 2 masks"
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("dialog", name="scene-01.jpg").is_visible()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert page.get_by_role("dialog", name="scene-10.jpg").is_visible()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
    assert panel.evaluate("node => node === document.activeElement")  # focus is back where it was


def test_the_gallery_works_from_the_keyboard(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("checkbox", name="Ground truth").focus()
    page.keyboard.press("Space")
    assert status(page) == "Photos 1 to 8 of 11 · 28 masks"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Lowest score shown of Free Mask"
    page.keyboard.press("End")  # a score of 1 hides all that have one
    assert status(page) == "Photos 1 to 8 of 11 · 12 of 28 masks"


def test_values_of_a_curve_are_read_out(opened: Opened) -> None:
    page = opened.page
    chart = page.locator(".chart").first
    assert chart.locator(".step").inner_text() == "step 1,990"
    assert chart.locator(".legend, ul").inner_text().split() == [
        "total",
        "1.073",
        "1",
        "not",
        "finite",
        "pairwise",
        "0.5",
    ]
    box = chart.locator("svg").bounding_box()
    assert box is not None
    chart.locator("svg").hover(position={"x": 50, "y": box["height"] / 2})  # the left end of the axis: 1 + 2
    assert chart.locator(".step").inner_text() == "step 0"
    assert chart.locator(".value").first.inner_text() == "3"
    assert chart.locator(".dot").count() == 2
    page.mouse.move(0, 0)
    assert chart.locator(".step").inner_text() == "step 1,990"
    chart.locator("svg").focus()
    page.keyboard.press("ArrowLeft")
    assert chart.locator(".step").inner_text() == "step 1,950"
    assert re.fullmatch(r"step 1,950: total 1\.07\d+, pairwise 0\.5", chart.locator("[role=status]").inner_text())


def test_curves_are_drawn_with_gaps_smoothed_and_hidden_on_demand(opened: Opened) -> None:
    page = opened.page
    chart = page.locator(".chart").first
    assert page.get_by_role("checkbox", name="Smooth").is_checked()  # 200 points
    assert chart.locator(".smoothed").count() == 2
    measured = chart.locator(".measured").first.get_attribute("d")
    assert measured is not None
    assert measured.count("M") == 2  # one gap
    assert "NaN" not in measured
    page.get_by_role("checkbox", name="Smooth").uncheck()
    assert chart.locator(".smoothed").count() == 0
    chart.get_by_role("button", name="total").click()
    assert chart.locator(".measured").count() == 1
    assert chart.get_by_role("button", name="total").get_attribute("aria-pressed") == "false"


def test_tables_and_words_are_there(opened: Opened) -> None:
    page = opened.page
    assert page.locator("table").count() == 2
    assert page.locator("td.best").all_inner_texts() == ["12.4\nbest", "12.0\nbest"]
    assert page.get_by_text("It cannot show more.").is_visible()
    page.get_by_text("2 lines").click()
    assert page.get_by_text("steps: 2000").is_visible()


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_overflows_and_nothing_jumps(browser: Browser, url: str, width: int) -> None:
    shown = Opened(browser, url, viewport={"width": width, "height": 800})
    assert shown.page.evaluate("document.documentElement.scrollWidth") == width
    shift = shown.page.evaluate(
        """() => new Promise(resolve => {
             let shift = 0;
             new PerformanceObserver(list => list.getEntries().forEach(entry => (shift += entry.value)))
               .observe({ type: "layout-shift", buffered: true });
             setTimeout(() => resolve(shift), 300);
           })"""
    )
    shown.context.close()
    assert shift == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser: Browser, url: str, scheme: str) -> None:
    shown = Opened(browser, url, color_scheme=scheme)
    colours = shown.page.evaluate(
        """() => {
             const style = getComputedStyle(document.documentElement);
             const names = ["paper", "surface", "sunk", "ink", "muted", "accent", "accent-soft", "accent-ink"];
             return Object.fromEntries(names.map(name => [name, style.getPropertyValue(`--${name}`)]));
           }"""
    )
    shown.context.close()
    pairs = [(text, ground) for text in ("ink", "muted") for ground in ("paper", "surface", "sunk")]
    for text, ground in [*pairs, ("accent", "paper"), ("accent-ink", "accent-soft")]:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)  # WCAG 2 AA
    assert (luminance(colours["paper"]) < 0.1) == (scheme == "dark")


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2)."""
    shares = [int(colour.strip()[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_works_in_a_frame_without_an_origin(browser: Browser, url: str, tmp_path: Path) -> None:
    # MLflow shows HTML artifacts like this: scripts may run, storage and the parent are out of reach.
    frame = tmp_path / "viewer.html"
    frame.write_text(
        f'<iframe sandbox="allow-scripts" width="1000" height="700" src="{url}"></iframe>', encoding="utf-8"
    )
    shown = Opened(browser, frame.as_uri())
    inside = shown.page.frame_locator("iframe")
    inside.get_by_role("checkbox", name="Free Mask").uncheck()
    assert inside.locator("[data-pager] .status").first.inner_text() == "Photos 1 to 8 of 11 · 28 masks"
    assert inside.locator(".chart .measured").count() > 0
    shown.context.close()
    assert shown.complaints == []


def test_hostile_names_are_shown_as_they_are(browser: Browser, tmp_path: Path) -> None:
    name = "</script><script>window.taken=1</script><img src=x onerror=window.taken=2> {{x}} \u2028.jpg"
    layer = GalleryLayer(name, np.ones((1, 4, 4), dtype=bool), np.array([0.5]))
    report = Report(
        title=name,
        summary=name,
        stages=(StageSummary(name, 1.0, {name: name}),),
        curves=(Curve(name, (0, 1), (1.0, 2.0), name, name),),
        metric_rows=(MetricRow(name, {name.replace("/", "") + "/AP": 0.1}),),
        found=GroupedObjects(
            name,
            1,
            1,
            1,
            (ObjectGroup(1, (0,)),),
            (FoundObject(name, 0.5, np.zeros((4, 4, 3), np.uint8), ((0, 1.0),)),),
        ),
        gallery=(GalleryPhoto(name, np.zeros((4, 4, 3), np.uint8), (layer,)),),
        notes=(name,),
        provenance={name: name},
    )
    url = write(report, tmp_path)
    shown = Opened(browser, url)
    shown.page.locator("#groups-view button").click()
    assert shown.page.locator("#groups-view strong").inner_text().replace("\n", "\u2028") == name
    assert shown.page.evaluate("window.taken") is None
    assert shown.page.locator("#photos figcaption").inner_text().replace("\n", "\u2028") == name
    assert shown.page.locator("img").count() == shown.page.locator("#groups-view img").count() == 2
    assert shown.page.get_by_role("checkbox", name="window.taken").is_visible()
    shown.context.close()
    assert shown.complaints == []
    assert [request for request in shown.requests if not request.startswith("data:")] == [url]


def empty_cases() -> dict[str, Report]:
    bare = GalleryPhoto("bare.jpg", np.zeros((3, 2, 3), np.uint8), ())
    unseen = GalleryLayer("Free Mask", np.zeros((0, 3, 2), dtype=bool), np.zeros(0))
    empty_mask = GalleryLayer("Free Mask", np.zeros((1, 3, 2), dtype=bool), np.ones(1))
    one_pixel = GalleryPhoto("dot.png", np.zeros((1, 1, 3), np.uint8), (GalleryLayer("A", np.ones((1, 1, 1), bool)),))
    return {
        "nothing at all": Report("empty", ""),
        "no object to group": Report("none", "", found=GroupedObjects("Free Mask", 0, 1, 0)),
        "groups without pictures": Report("lost", "", found=GroupedObjects("A", 1, 1, 1, (ObjectGroup(1, ()),))),
        "a photo without label sets": Report("bare", "", gallery=(bare,)),
        "a photo without masks": Report("none", "", gallery=(GalleryPhoto("n.jpg", bare.pixels, (unseen,)),)),
        "a mask without pixels": Report("void", "", gallery=(GalleryPhoto("v.jpg", bare.pixels, (empty_mask,)),)),
        "a photo of one pixel": Report("dot", "", gallery=(one_pixel,)),
        "a curve of one point": Report("dot", "", curves=(Curve("loss", (5,), (2.0,), "SOLO"),)),
        "a curve that never was finite": Report("nan", "", curves=(Curve("loss", (0, 1), (math.nan,) * 2, "SOLO"),)),
        "a curve of zeros": Report("flat", "", curves=(Curve("loss", (0, 1), (0.0, 0.0), "SOLO"),)),
    }


@pytest.mark.parametrize("case", empty_cases())
def test_little_to_show_is_shown_without_a_complaint(browser: Browser, tmp_path: Path, case: str) -> None:
    report = empty_cases()[case]
    shown = Opened(browser, write(report, tmp_path))
    text = shown.page.locator("main").inner_text()
    drawn = shown.page.locator("#charts path").evaluate_all("nodes => nodes.map(node => node.getAttribute('d'))")
    panels = shown.page.locator("#photos .panel:visible").count()
    shown.context.close()
    assert shown.complaints == []
    assert ("What it found, grouped" in text) == (report.found is not None)
    assert ("Gallery" in text) == bool(report.gallery)
    assert ("Learning curves" in text) == bool(report.curves)
    assert panels == len(report.gallery)
    assert not any("NaN" in path or "Infinity" in path for path in drawn)
    if case == "a photo without masks":
        assert "no masks" in text


def test_a_crowded_label_set_opens_with_its_best_masks(browser: Browser, tmp_path: Path) -> None:
    """20 masks of scores 0.05, 0.10 ... 1.00 in one photo: it opens at the score of the ninth, 0.60."""
    masks = np.zeros((20, 8, 24), dtype=bool)
    for number in range(20):
        masks[number, 2:5, number : number + 3] = True
    scores = np.arange(1, 21) / 20
    photo = GalleryPhoto("crowd.jpg", np.zeros((8, 24, 3), np.uint8), (GalleryLayer("SOLO", masks, scores),))
    shown = Opened(browser, write(Report("crowd", "", gallery=(photo,)), tmp_path))
    slider = shown.page.get_by_role("slider", name="Lowest score shown of SOLO")
    lowest = float(slider.input_value())
    status = shown.page.locator("[data-pager] .status").first.inner_text()
    slider.fill("0")
    everything = shown.page.locator("[data-pager] .status").first.inner_text()
    shown.context.close()
    assert shown.complaints == []
    assert (lowest, status) == (0.6, "Photo 1 of 1 · 9 of 20 masks")
    assert everything == "Photo 1 of 1 · 20 masks"


def trends_report() -> Report:
    """Three starts at four fractions; nothing at 1% is missing, and DenseCL at 2% could not be measured."""
    unit, places = "% of the labels", (1.0, 2.0, 5.0, 10.0)
    lines: dict[str, tuple[tuple[float, ...], tuple[float | None, ...]]] = {
        "FreeSOLO": (places, (7.5, 9.25, 13.0, 16.0)),
        "DenseCL": (places, (4.0, None, 9.0, 12.5)),
        "nothing": (places[1:], (0.5, 1.25, 4.0)),
    }
    trends = [
        Trend(name, chart, unit, *line) for chart in ("Mask AP, %", "AP by category, %") for name, line in lines.items()
    ]
    return Report("labels", "", metric_rows=(MetricRow("FreeSOLO", {"Masks/AP": 0.16}),), trends=tuple(trends))


def test_a_measure_is_plotted_against_what_was_varied(browser: Browser, tmp_path: Path) -> None:
    """Fractions on a logarithmic axis: from 1 to 10, 2 lies at 0.301 of the way and 5 at 0.699."""
    shown = Opened(browser, write(trends_report(), tmp_path), viewport={"width": 1280, "height": 900})
    charts = shown.page.locator("#results .chart")
    assert charts.locator("h4").all_inner_texts() == ["Mask AP, %", "AP by category, %"]
    chart = charts.first
    marks = chart.locator("circle.mark")
    across = marks.evaluate_all("nodes => nodes.map(node => Number(node.getAttribute('cx')))")
    assert len(across) == 4 + 3 + 3
    left, right = across[0], across[3]
    assert [(x - left) / (right - left) for x in across[:4]] == pytest.approx([0, 0.301, 0.699, 1], abs=0.001)
    assert across[4:7] == pytest.approx([across[0], across[2], across[3]])
    assert chart.locator("svg text").all_text_contents()[-4:] == ["1%", "2%", "5%", "10%"]
    assert chart.locator(".step").inner_text() == "10% of the labels"
    assert chart.locator(".value").all_inner_texts() == ["16", "12.5", "4"]
    chart.locator("svg").focus()
    shown.page.keyboard.press("ArrowLeft")
    shown.page.keyboard.press("ArrowLeft")
    assert chart.locator(".step").inner_text() == "2% of the labels"
    assert chart.locator(".value").all_inner_texts() == ["9.25", "-", "0.5"]
    assert chart.locator(".dot").count() == 2
    shown.page.keyboard.press("ArrowLeft")
    assert chart.locator(".value").all_inner_texts() == ["7.5", "4", "-"]
    chart.get_by_role("button", name="FreeSOLO").click()
    assert marks.count() == 6
    shown.context.close()
    assert shown.complaints == []


def test_a_single_fraction_is_a_point(browser: Browser, tmp_path: Path) -> None:
    trends = (Trend("FreeSOLO", "Mask AP", "% of the labels", (5.0,), (0.0,)), Trend("none", "Mask AP", "%", (), ()))
    shown = Opened(browser, write(Report("one", "", metric_rows=trends_report().metric_rows, trends=trends), tmp_path))
    assert shown.page.locator("#results circle.mark").count() == 1
    assert "NaN" not in shown.page.locator("#results").inner_html()
    shown.context.close()
    assert shown.complaints == []


def test_a_trend_without_order_is_refused() -> None:
    for places, values in (((2.0, 1.0), (1.0, 2.0)), ((0.0, 1.0), (1.0, 2.0)), ((1.0,), (1.0, 2.0))):
        with pytest.raises(ValueError, match="places"):
            Trend("FreeSOLO", "AP", "%", places, values)
