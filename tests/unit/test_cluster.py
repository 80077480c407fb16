"""What a cluster can hold is known before anything waits for it."""

from __future__ import annotations

import pytest

from freesolo.cluster import Node, places_without_labels, spare_cpus
from freesolo.errors import UsageError
from freesolo.settings import ResourceSettings


def cpus(*counts: float) -> list[Node]:
    """Nodes with so many CPUs each."""
    return [Node({"CPU": count}) for count in counts]


def test_workers_that_fit_leave_the_rest_for_data() -> None:
    assert spare_cpus(ResourceSettings(workers=3, cpus_per_worker=2), cpus(4.0, 4.0)) == 2.0
    assert spare_cpus(ResourceSettings(workers=2, gpus_per_worker=0.5), [Node({"CPU": 3.0, "GPU": 1.0})]) == 1.0
    assert spare_cpus(ResourceSettings(workers=1, data_cpus=2), cpus(8.0)) == 2


def test_elastic_workers_need_room_for_the_fewest() -> None:
    assert spare_cpus(ResourceSettings(workers=(2, 40)), cpus(4.0)) == 2.0


@pytest.mark.parametrize(
    ("resources", "nodes"),
    [
        (ResourceSettings(workers=4), cpus(4.0)),  # nothing left for data
        (ResourceSettings(workers=1, cpus_per_worker=4), cpus(3.0, 3.0)),  # in sum, but on no node
        (ResourceSettings(workers=1, gpus_per_worker=1), cpus(8.0)),
        (ResourceSettings(workers=3, gpus_per_worker=1), [Node({"CPU": 8.0, "GPU": 2.0})]),
        (ResourceSettings(workers=(3, 9)), cpus(3.0)),
        (ResourceSettings(workers=1), []),
    ],
)
def test_workers_that_never_fit_are_refused_with_the_numbers(resources: ResourceSettings, nodes: list[Node]) -> None:
    with pytest.raises(UsageError, match=f"resources.workers={resources.min_workers} .*do not fit.*room for"):
        spare_cpus(resources, nodes)


@pytest.mark.parametrize(
    ("wanted", "places"), [("a100", 4), ("!a100", 3), ("in(a100, h100)", 6), ("!in(a100,h100)", 1), ("t4", 0)]
)
def test_only_nodes_with_the_labels_count(wanted: str, places: int) -> None:
    nodes = [
        Node({"CPU": 4.0}, {"gpu": "a100"}),
        Node({"CPU": 2.0}, {"gpu": "h100"}),
        Node({"CPU": 1.0}),
        Node({"CPU": 1.0}, {"other": "a100"}),
    ][: 3 if wanted.startswith("!") else 4]
    selector = {"gpu": wanted}
    if places:
        assert spare_cpus(ResourceSettings(workers=places, label_selector=selector), nodes) >= 1
    with pytest.raises(UsageError, match=rf"room for {places} such .*"):
        spare_cpus(ResourceSettings(workers=places + 1, label_selector=selector), nodes)


def test_elastic_workers_with_labels_may_be_counted_on_nodes_without_them() -> None:
    nodes = [Node({"CPU": 4.0}, {"pool": "train"}), Node({"CPU": 4.0}), Node({"CPU": 1.0})]
    labelled = {"cpus_per_worker": 2, "label_selector": {"pool": "train"}}
    assert places_without_labels(ResourceSettings(workers=(1, 2), **labelled), nodes) == 2
    assert places_without_labels(ResourceSettings(workers=2, **labelled), nodes) == 0
    assert places_without_labels(ResourceSettings(workers=(1, 2), cpus_per_worker=2), nodes) == 0
    assert places_without_labels(ResourceSettings(workers=(1, 2), gpus_per_worker=1, **labelled), nodes) == 0


def test_what_an_autoscaler_may_add_has_no_labels_yet() -> None:
    resources = ResourceSettings(workers=2, label_selector={"gpu": "a100"})
    assert spare_cpus(resources, cpus(8.0), kinds_known=False) == 6.0


@pytest.mark.parametrize("workers", [(3, 2), (0, 2), 0])
def test_numbers_of_workers_that_make_no_sense(workers: object) -> None:
    with pytest.raises(ValueError, match="workers"):
        ResourceSettings.model_validate({"workers": workers})
