"""The Ray cluster: connecting to it, and refusing at once what it can never give.

Ray itself would wait: for workers that no node can hold, and without a word for the CPU that reading data needs beside
workers that have taken them all.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ray
from ray._private.state import state as ray_state

from freesolo.errors import JobError, UsageError
from freesolo.settings import ResourceSettings

DATA_CPUS = 1
"""Left beside the workers for reading and decoding, at the least."""

WAIT_FOR_NODES_SECONDS = 600.0
_LOOK_SECONDS = 2.0

# What a cluster that is started for a job has beside its workers.
_OWN_DATA_CPUS_PER_WORKER = 2

OWN_CLUSTER = {
    # Nothing outside this machine can reach a cluster on its loopback, so it needs no tokens.
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A person watches this terminal: it shows the job's progress and errors. What Ray and its workers say of processes
    # and nodes is in Ray's own logs.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Nobody takes this machine's only node away on notice, and asking its workers how they are costs nothing.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
"""Ray's settings, as environment variables, of a cluster that is started for a job; those that are set already stay."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Node:
    """What Ray knows of a node.

    Attributes:
        resources: `CPU`, `GPU` and others.
        labels: Its Ray labels.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


def connect(resources: ResourceSettings) -> None:
    """Connect to the cluster that RAY_ADDRESS names, as it does in a submitted job, or start one on this machine.

    Args:
        resources: What the job will ask for; a cluster of its own is started large enough for it.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return
    for name, value in OWN_CLUSTER.items():
        os.environ.setdefault(name, value)
    wanted = resources.max_workers * (resources.cpus_per_worker + _OWN_DATA_CPUS_PER_WORKER)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, wanted),
        include_dashboard=False,  # six processes more, for a cluster that ends with the job
        logging_level=logging.WARNING,
        log_to_driver=False,
    )


def check_cluster(resources: ResourceSettings) -> float:
    """Refuse workers that the connected cluster can never hold.

    Returns:
        CPUs that the fewest workers leave, at least `DATA_CPUS`; no more than `resources.data_cpus`.

    Raises:
        UsageError: The workers don't fit; says what is asked for and what there is.
    """
    # Kinds of node are not known of those that an autoscaler may add, so only the sums are checked.
    limits = _autoscaler_limits()
    nodes = [Node(limits)] if limits else _nodes()
    return spare_cpus(resources, nodes, kinds_known=not limits)


def spare_cpus(resources: ResourceSettings, nodes: Sequence[Node], *, kinds_known: bool = True) -> float:
    """CPUs left on some nodes beside the fewest workers that a job can do with.

    Args:
        resources: Workers of `cpus_per_worker` and `gpus_per_worker`, each on one node that has the labels.
        nodes: Of the cluster.
        kinds_known: Whether these are real nodes; else labels are taken for granted.

    Raises:
        UsageError: The workers don't fit, or leave less than `DATA_CPUS`.
    """
    fitting = [node for node in nodes if not kinds_known or _matches(node.labels, resources.label_selector)]
    places = sum(_places(resources, node) for node in fitting)
    cpus = sum(node.resources.get("CPU", 0.0) for node in nodes)
    spare = cpus - resources.min_workers * resources.cpus_per_worker
    if places >= resources.min_workers and spare >= DATA_CPUS:
        return min(spare, float(resources.data_cpus or spare))
    gpus = sum(node.resources.get("GPU", 0.0) for node in nodes)
    with_gpus = f" and {resources.gpus_per_worker:g} GPUs" if resources.gpus_per_worker else ""
    on_nodes = f" on nodes with {resources.label_selector}" if resources.label_selector else ""
    raise UsageError(
        f"resources.workers={resources.min_workers} of {resources.cpus_per_worker} CPUs{with_gpus} each{on_nodes}, and "
        f"{DATA_CPUS} CPU to read data, do not fit the Ray cluster: it has {cpus:g} CPUs and {gpus:g} GPUs on "
        f"{len(nodes)} nodes, room for {places} such workers; lower resources.workers or enlarge the cluster"
    )


def trainings_at_once(resources: ResourceSettings, *, at_most: int) -> tuple[int, int]:
    """How many trainings the connected cluster has room for beside each other, each with CPUs of its own for reading.

    Args:
        resources: Of each of them; their number of workers is fixed.
        at_most: Of them.

    Returns:
        The number, and the CPUs that each may use for reading: no more than `resources.data_cpus`.

    Raises:
        UsageError: As `check_cluster`: not even one fits.
    """
    check_cluster(resources)
    limits = _autoscaler_limits()
    return share_out(resources, [Node(limits)] if limits else _nodes(), at_most=at_most, kinds_known=not limits)


def share_out(
    resources: ResourceSettings, nodes: Sequence[Node], *, at_most: int, kinds_known: bool = True
) -> tuple[int, int]:
    """As `trainings_at_once`, on some nodes on which at least one fits."""
    fitting = [node for node in nodes if not kinds_known or _matches(node.labels, resources.label_selector)]
    places = sum(_places(resources, node) for node in fitting)
    cpus = sum(node.resources.get("CPU", 0.0) for node in nodes)
    of_workers = resources.min_workers * resources.cpus_per_worker
    count = int(min(at_most, places // resources.min_workers, cpus // (of_workers + DATA_CPUS)))
    spare = int(cpus // count - of_workers)
    return count, min(spare, resources.data_cpus or spare)


def warn_of_nodes_without_labels(resources: ResourceSettings) -> None:
    """Say so if an elastic training may wait for a lost node although it could go on with fewer workers.

    Ray Train counts every node that could hold a worker, whatever its labels, and tries again and again to start that
    many.
    """
    others = places_without_labels(resources, _nodes())
    if others:
        _LOG.warning(
            "elastic workers with %s: nodes without these labels could hold %d of them, and Ray Train counts those: "
            "when a node is lost, it may wait for another instead of going on with fewer workers; ask for more CPUs or "
            "GPUs a worker than those nodes have",
            dict(resources.label_selector),
            others,
        )


def places_without_labels(resources: ResourceSettings, nodes: Sequence[Node]) -> int:
    """Elastic workers that would fit on nodes that lack their labels; 0 where their number is fixed."""
    if resources.min_workers == resources.max_workers:
        return 0
    return sum(_places(resources, node) for node in nodes if not _matches(node.labels, resources.label_selector))


def data_cpus(resources: ResourceSettings, workers: int) -> float:
    """CPUs for reading beside workers that run already; waits for nodes where these have taken all that there are.

    Args:
        resources: What the job asks for.
        workers: How many of them there are now.

    Returns:
        At least `DATA_CPUS`, no more than `resources.data_cpus`.

    Raises:
        JobError: Nothing was left for `WAIT_FOR_NODES_SECONDS`.
    """
    deadline = time.monotonic() + WAIT_FOR_NODES_SECONDS
    told = False
    while True:
        cpus = (_autoscaler_limits() or ray.cluster_resources()).get("CPU", 0.0)
        spare = cpus - workers * resources.cpus_per_worker
        if spare >= DATA_CPUS:
            return min(spare, float(resources.data_cpus or spare))
        problem = f"{workers} workers of {resources.cpus_per_worker} CPUs leave none of {cpus:g} for reading data"
        if time.monotonic() > deadline:
            raise JobError(
                f"{problem}; waited {WAIT_FOR_NODES_SECONDS:g} s for more nodes; run the same again to go on"
            )
        if not told:
            _LOG.warning("%s; waiting for more nodes", problem)
            told = True
        time.sleep(_LOOK_SECONDS)


def _autoscaler_limits() -> dict[str, float]:
    """All resources that an autoscaler may let the cluster grow to; empty where there is none."""
    # This is where Ray Train asks for it too; there is no public name.
    return dict(ray_state.get_max_resources_from_cluster_config() or {})


def _nodes() -> list[Node]:
    return [Node(node["Resources"], node.get("Labels", {})) for node in ray.nodes() if node["Alive"]]


def _places(resources: ResourceSettings, node: Node) -> int:
    """How many of the workers one node can hold."""
    places = node.resources.get("CPU", 0.0) // resources.cpus_per_worker
    if resources.gpus_per_worker:
        places = min(places, node.resources.get("GPU", 0.0) // resources.gpus_per_worker)
    return int(places)


def _matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy a selector, in Ray's notation: `value`, `!value`, `in(a, b)`, `!in(a, b)`."""
    return all(_has_label(labels.get(name), wanted) for name, wanted in selector.items())


def _has_label(value: str | None, wanted: str) -> bool:
    positive = wanted.removeprefix("!").strip()
    listed = positive.startswith("in(") and positive.endswith(")")
    allowed = [one.strip() for one in positive[3:-1].split(",")] if listed else [positive]
    return (value in allowed) != wanted.startswith("!")
