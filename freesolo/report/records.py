"""What a report page is made of; plain records, so that whoever has the facts can fill them in.

Legend of shapes: H, W height and width of a photo in px; N masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, UInt8


@dataclass(frozen=True, slots=True)
class StageSummary:
    """One stage of what was run.

    Attributes:
        name: For people: "DenseCL pre-training", "Free Mask", "SOLO round 1".
        seconds: How long it took; None where it was not run this time, its result being there already.
        counts: What went in and came out, in order: `{"photos": 470, "masks": 1312, "bad samples": 0}`. May be empty.
    """

    name: str
    seconds: float | None
    counts: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity over the steps of a stage.

    Attributes:
        name: The quantity's: "pairwise", "learning rate".
        steps: Optimiser steps. Where one comes twice, as after a resume that replayed it, its last value is shown.
        values: One a step; those that are not finite are shown as gaps, and counted.
        stage: The stage that was trained; each has its own heading.
        chart: Curves of a stage with the same chart share axes; empty: one of its own, titled with its name.
    """

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    stage: str
    chart: str = ""

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(f"curve {self.name!r} has {len(self.steps)} steps but {len(self.values)} values")


@dataclass(frozen=True, slots=True)
class Trend:
    """A measure against what was varied from one training to the next: a point each, joined in order.

    Attributes:
        name: The line's: "FreeSOLO".
        chart: What was measured, with its unit: "Mask AP, %". Trends of the same chart share axes.
        unit: Of what was varied, as it is read after its number: "% of the labels".
        places: What was varied, above 0, ascending; drawn on a logarithmic axis. May be empty.
        values: One a place; None where nothing could be measured.
    """

    name: str
    chart: str
    unit: str
    places: tuple[float, ...]
    values: tuple[float | None, ...]

    def __post_init__(self) -> None:
        if len(self.places) != len(self.values):
            raise ValueError(f"trend {self.name!r} has {len(self.places)} places but {len(self.values)} values")
        if list(self.places) != sorted(set(self.places)) or any(place <= 0 for place in self.places):
            raise ValueError(f"trend {self.name!r}: places {list(self.places)} must be above 0 and ascend")


@dataclass(frozen=True, slots=True)
class MetricRow:
    """What was measured of one label set.

    Attributes:
        name: The label set's, for people: "Free Mask", "SOLO round 1".
        metrics: Shares in [0, 1], higher is better, named "table/column": `{"Masks/AP50": 0.098, "Boxes/AP50": None}`.
            None where nothing could be measured, as of a size of which there is no object. A name without a slash
            goes into a table called Metrics; an underscore is shown as a space.
    """

    name: str
    metrics: Mapping[str, float | None]

    def __post_init__(self) -> None:
        for key, value in self.metrics.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"metric {key!r} of {self.name!r} is {value}: give a share in [0, 1] or None")


@dataclass(frozen=True, slots=True)
class GalleryLayer:
    """The masks that one label set has for a photo.

    Attributes:
        name: The label set's; layers of the same name in different photos are shown and hidden together.
        masks: Over the photo's pixels, `(N, H, W)`. N may be 0.
        scores: In [0, 1], one a mask; None where masks have none, as ground truth: no score hides them.
    """

    name: str
    masks: Bool[np.ndarray, "N H W"]
    scores: Float[np.ndarray, " scores"] | None = None

    def __post_init__(self) -> None:
        if self.scores is not None and self.scores.shape != self.masks.shape[:1]:
            raise ValueError(f"layer {self.name!r} has {len(self.masks)} masks but {len(self.scores)} scores")
        if self.scores is not None and not np.isfinite(self.scores).all():
            raise ValueError(f"layer {self.name!r} has a score that is not finite")


@dataclass(frozen=True, slots=True)
class GalleryPhoto:
    """A photo and what each label set found in it.

    Attributes:
        file_name: Shown under the photo; any text.
        pixels: RGB, `(H, W, 3)`.
        layers: In the order in which they are shown. A label set that does not know the photo has none.
    """

    file_name: str
    pixels: UInt8[np.ndarray, "H W 3"]
    layers: tuple[GalleryLayer, ...]

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ValueError(f"photo {self.file_name!r} has two layers of one name: {names}")
        for layer in self.layers:
            if layer.masks.shape[1:] != self.pixels.shape[:2]:
                raise ValueError(
                    f"photo {self.file_name!r} is {self.pixels.shape[:2]} (height, width) but masks of layer "
                    f"{layer.name!r} are {layer.masks.shape[1:]}"
                )


@dataclass(frozen=True, slots=True)
class FoundObject:
    """An object of a label set.

    Attributes:
        file_name: Of its photo; any text.
        score: In [0, 1].
        picture: The object cut out of its photo, RGB, `(h, w, 3)`, small.
        nearest: Other objects that look like it to the model, the most alike first: the place of each in
            `GroupedObjects.objects`, and the cosine between their embeddings, in [-1, 1]. May be empty.
    """

    file_name: str
    score: float
    picture: UInt8[np.ndarray, "h w 3"]
    nearest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ObjectGroup:
    """Objects that look alike to the model.

    Attributes:
        size: How many there are.
        shown: The places in `GroupedObjects.objects` of the most typical of them, the most typical first.
    """

    size: int
    shown: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GroupedObjects:
    """What a label set found, by likeness.

    Attributes:
        label_set: Its name.
        found: Objects of the whole label set.
        shards: Of the whole label set.
        sampled_shards: Those whose objects were drawn from.
        groups: The largest first; none where there is no object, or they have no embeddings.
        objects: Those that are shown, each once, as members of a group or as another's nearest.
    """

    label_set: str
    found: int
    shards: int
    sampled_shards: int
    groups: tuple[ObjectGroup, ...] = ()
    objects: tuple[FoundObject, ...] = ()

    def __post_init__(self) -> None:
        places = [place for group in self.groups for place in group.shown]
        places += [place for each in self.objects for place, _ in each.nearest]
        if not all(0 <= place < len(self.objects) for place in places):
            raise ValueError(f"a group or an object of {self.label_set!r} names one of {len(self.objects)} by no place")

    @property
    def grouped(self) -> int:
        """Objects of all groups: those of the label set that were drawn."""
        return sum(group.size for group in self.groups)


@dataclass(frozen=True, slots=True)
class Report:
    """One run, as `page.render_page` shows it. Every part but the title may be empty, and the page then says so.

    Attributes:
        title: The run's name.
        summary: What was run, in words; blank lines part paragraphs.
        stages: In the order in which they ran.
        curves: Of all stages.
        metric_rows: One a label set, in the order of the table: Free Mask, then the rounds.
        found: Objects in groups; None where nobody looked, which gives no section.
        trends: Drawn beside the table.
        gallery: Photos to look at.
        notes: What this run can and cannot show, in plain words, a paragraph each.
        provenance: What the run came of, in order: git commit, data set digest, model version, lineage, the
            configuration's YAML. Values of several lines are folded away.
    """

    title: str
    summary: str
    stages: tuple[StageSummary, ...] = ()
    curves: tuple[Curve, ...] = ()
    metric_rows: tuple[MetricRow, ...] = ()
    found: GroupedObjects | None = None
    trends: tuple[Trend, ...] = ()
    gallery: tuple[GalleryPhoto, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
