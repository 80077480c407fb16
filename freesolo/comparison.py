"""Stage `evaluate`: several label sets against one data set's annotations, on the same images, and a page to look at.

The table has a row a label set, in the order given: Free Mask, then each round of SOLO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from freesolo.data.coco import category_names, label_category_ids, shard_ground_truth
from freesolo.data.label_records import ImageLabels
from freesolo.data.labels import LabelFile, LabelSet, read_label_file, read_labels_of
from freesolo.data.shards import DatasetManifest, ShardInfo, read_dataset_manifest
from freesolo.errors import UsageError
from freesolo.evaluation import Detections, Matches, Metrics, match, summarize

OverShards: TypeAlias = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Does something to each shard, in whatever processes; gives the results in the order of the shards, as `map` does."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the evaluation of some label sets gave.

    Attributes:
        dataset_digest: Of the data set that they were evaluated on.
        rows: Metrics of each label set.
    """

    dataset_digest: str
    rows: dict[str, Metrics]


@dataclass(frozen=True, slots=True)
class ShardLabels:
    """What a label set has of a shard.

    Attributes:
        url: Of the label set.
        file: Of the shard.
        category_ids: COCO's ids of the categories that it tells apart, ascending; none for class-agnostic labels.
    """

    url: str
    file: LabelFile
    category_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard, and what each label set has of it.

    Attributes:
        dataset: URL of the data set.
        shard: One of its shards.
        labels: Of each label set.
        categories: Names of all of the data set's categories, by COCO's id.
    """

    dataset: str
    shard: ShardInfo
    labels: tuple[ShardLabels, ...]
    categories: dict[int, str]


def compare(dataset: str, label_sets: Mapping[str, str], *, over_shards: OverShards = map) -> Comparison:
    """Evaluate label sets against the annotations of their data set.

    A shard at a time: nobody holds the masks of more.

    Args:
        dataset: URL of an annotated data set.
        label_sets: A URL for each name, in the order of the table.
        over_shards: What matches the shards.

    Raises:
        UsageError: The data set has no annotations, or a label set is of another data set.
    """
    manifest = check_comparable(dataset, label_sets)
    names = category_names(manifest.categories)
    opened = [read_labels_of(url, manifest) for url in label_sets.values()]
    tasks = [
        ShardTask(
            dataset=dataset,
            shard=shard,
            labels=tuple(ShardLabels(one.url, one.manifest.files[number], _category_ids(one)) for one in opened),
            categories=names,
        )
        for number, shard in enumerate(manifest.shards)
    ]
    of_shards: list[list[Matches]] = list(over_shards(match_shard, tasks))
    rows = {
        name: summarize([matches[number] for matches in of_shards], names if _category_ids(labels) else None)
        for number, (name, labels) in enumerate(zip(label_sets, opened, strict=True))
    }
    return Comparison(manifest.digest, rows)


def match_shard(task: ShardTask) -> list[Matches]:
    """How what each label set has of a shard's photos matches their annotations.

    Raises:
        UsageError: An annotation is damaged, or a label is of no category of its model.
        JobError: The shard or a label file is damaged, or a store cannot be reached.
    """
    truth = shard_ground_truth(task.dataset, task.shard)
    return [
        match(
            truth,
            _detections(read_label_file(labels.url, labels.file), labels),
            task.categories if labels.category_ids else None,
        )
        for labels in task.labels
    ]


def check_comparable(dataset: str, label_sets: Mapping[str, str]) -> DatasetManifest:
    """The manifest of a data set that label sets can be evaluated on.

    Raises:
        UsageError: It has no annotations, or a label set is of another data set or tells other categories apart.
    """
    manifest = read_dataset_manifest(dataset)
    if not manifest.annotated:
        raise UsageError(f"{dataset}: has no annotations to evaluate against; pack it from a COCO JSON")
    for url in label_sets.values():
        if unknown := set(_category_ids(read_labels_of(url, manifest))) - {one["id"] for one in manifest.categories}:
            raise UsageError(f"{url}: its category {min(unknown)} is none of those of {dataset}")
    return manifest


def check_held_out(evaluation_dataset: str, trained_on: DatasetManifest, *, num_categories: int) -> None:
    """See that models that are trained on a data set can be evaluated on another.

    Args:
        evaluation_dataset: URL.
        trained_on: Manifest of the other.
        num_categories: That the models tell apart; 1: none.

    Raises:
        UsageError: It is the same data set, has no annotations, or lacks a category that models would know.
    """
    held_out = check_comparable(evaluation_dataset, {})
    if held_out.digest == trained_on.digest:
        raise UsageError(f"evaluation_dataset: {evaluation_dataset} is what is trained on; give other photos")
    unknown = {one["id"] for one in trained_on.categories} - {one["id"] for one in held_out.categories}
    if num_categories > 1 and unknown:
        raise UsageError(
            f"evaluation_dataset: {evaluation_dataset} does not know category {min(unknown)} of those trained on; "
            "give one of the same categories"
        )


def _category_ids(labels: LabelSet) -> tuple[int, ...]:
    """COCO's, ascending, so that a label's category is a place among them; none for class-agnostic labels."""
    return tuple(category["id"] for category in labels.manifest.plan.model.get("categories", ()))


def _detections(records: Iterable[ImageLabels], of: ShardLabels) -> Iterator[Detections]:
    for labels in records:
        if labels.is_lost:
            continue  # nothing was found in what was not there
        yield Detections(
            image_id=labels.image_id,
            rles=[instance.rle for instance in labels.instances],
            boxes_xywh=[instance.bbox_xywh for instance in labels.instances],
            scores=[instance.score for instance in labels.instances],
            category_ids=label_category_ids(labels, of.category_ids, of.url) if of.category_ids else None,
        )


def as_table(rows: Mapping[str, Metrics]) -> str:
    """The comparison as a Markdown table, in percent; a dash where nothing could be measured."""
    columns = {"mask AP50": "segm/AP50", "mask AP": "segm/AP", "mask AR100": "segm/AR100", "box AP50": "bbox/AP50"}
    if any(row.categories for row in rows.values()):
        columns |= {"AP by category": "category/AP", "AP50 by category": "category/AP50"}
    lines = ["| label set | " + " | ".join([*columns, "CorLoc"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, row in rows.items():
        values = row.as_dict()
        shown = [values.get(key) for key in [*columns.values(), "corloc"]]
        lines.append(f"| {name} | " + " | ".join("-" if v is None else f"{100 * v:.1f}" for v in shown) + " |")
    return "\n".join(lines) + "\n"
