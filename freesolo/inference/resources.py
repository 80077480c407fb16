"""Whether a cluster can run a pool of actors and feed it; asked before starting, because Ray would wait for ever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray
from ray._private.state import state as ray_state

from freesolo.errors import UsageError
from freesolo.settings import ResourceSettings

DATA_CPUS = 1
"""Left beside the actors for reading and decoding; with none Ray Data hangs without a word."""


def check_cluster(resources: ResourceSettings) -> float:
    """Refuse a pool that the connected cluster can never hold.

    Returns:
        CPUs that are left beside the actors, at least `DATA_CPUS`.

    Raises:
        UsageError: The pool does not fit; says what is asked for and what there is.
    """
    # What the autoscaler may still add counts. This is where Ray Train asks for it too; there is no public name.
    limits = ray_state.get_max_resources_from_cluster_config()
    if limits:
        # Kinds of node are not known from here, so only the sums are checked.
        return spare_cpus(resources, [limits])
    return spare_cpus(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def spare_cpus(resources: ResourceSettings, nodes: Sequence[Mapping[str, float]]) -> float:
    """CPUs left beside a pool of actors on these nodes.

    Args:
        resources: `workers` actors of `cpus_per_worker` and `gpus_per_worker`, each on one node.
        nodes: Ray's resources of each node: `CPU`, `GPU`.

    Raises:
        UsageError: The pool does not fit, or leaves less than `DATA_CPUS`.
    """
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    places = sum(_places(resources, node) for node in nodes)
    spare = cpus - resources.workers * resources.cpus_per_worker
    if places >= resources.workers and spare >= DATA_CPUS:
        return spare
    with_gpus = f" and {resources.gpus_per_worker:g} GPUs" if resources.gpus_per_worker else ""
    raise UsageError(
        f"resources.workers={resources.workers} of {resources.cpus_per_worker} CPUs{with_gpus} each, and {DATA_CPUS} "
        f"CPU to read data, do not fit the Ray cluster: it has {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes, "
        f"room for {places} such workers; lower resources.workers or enlarge the cluster"
    )


def _places(resources: ResourceSettings, node: Mapping[str, float]) -> int:
    """How many of the actors one node can hold."""
    places = node.get("CPU", 0.0) // resources.cpus_per_worker
    if resources.gpus_per_worker:
        places = min(places, node.get("GPU", 0.0) // resources.gpus_per_worker)
    return int(places)
