"""Connecting to Ray, and refusing at once what a cluster can never give."""

from __future__ import annotations

import os

import ray

from freesolo.config import ResourceSettings
from freesolo.errors import UsageError

DATA_CPUS_PER_WORKER = 2


def connect(resources: ResourceSettings) -> None:
    """Connect to the cluster that this process belongs to, or start a local one on this machine's loopback.

    Args:
        resources: What the job will ask for; a local cluster is started large enough for it.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", logging_level="WARNING")
    except ConnectionError:
        # Nothing outside this machine can reach a local cluster, so it needs no tokens.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        wanted = resources.workers * (resources.cpus_per_worker + DATA_CPUS_PER_WORKER)
        ray.init(num_cpus=max(os.cpu_count() or 1, wanted), logging_level="WARNING", configure_logging=True)


def data_cpus(resources: ResourceSettings) -> float:
    """CPUs that are left to Ray Data beside the train workers.

    Raises:
        UsageError: The workers don't fit the cluster, or leave Ray Data none, which would then wait for ever.
    """
    available = ray.cluster_resources()
    cpus, gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
    wanted_cpus, wanted_gpus = (
        resources.workers * resources.cpus_per_worker,
        resources.workers * resources.gpus_per_worker,
    )
    if wanted_cpus + 1 > cpus:
        raise UsageError(
            f"resources: {resources.workers} workers of {resources.cpus_per_worker} CPUs and 1 CPU for reading data need "
            f"{wanted_cpus + 1:g} CPUs, the cluster has {cpus:g}; lower resources.workers or resources.cpus_per_worker"
        )
    if wanted_gpus > gpus:
        raise UsageError(
            f"resources: {resources.workers} workers of {resources.gpus_per_worker:g} GPUs need {wanted_gpus:g} GPUs, the "
            f"cluster has {gpus:g}; lower resources.workers or resources.gpus_per_worker"
        )
    return cpus - wanted_cpus
