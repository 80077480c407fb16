"""Connecting to Ray, and refusing at once what a cluster can never give."""

from __future__ import annotations

import logging
import os

import ray

from freesolo.errors import UsageError
from freesolo.settings import ResourceSettings

DATA_CPUS_PER_WORKER = 2

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
    wanted = resources.workers * (resources.cpus_per_worker + DATA_CPUS_PER_WORKER)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, wanted),
        logging_level=logging.WARNING,
        log_to_driver=False,
    )


def data_cpus(resources: ResourceSettings) -> float:
    """CPUs that are left to Ray Data beside the train workers.

    Raises:
        UsageError: The workers don't fit the cluster, or leave Ray Data none, which would then wait for ever.
    """
    available: dict[str, float] = ray.cluster_resources()
    cpus, gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
    workers = resources.workers
    if workers * resources.cpus_per_worker + 1 > cpus:
        raise UsageError(
            f"resources: {workers} workers of {resources.cpus_per_worker} CPUs and 1 CPU for reading data need "
            f"{workers * resources.cpus_per_worker + 1} CPUs, the cluster has {cpus:g}; lower resources.workers or "
            "resources.cpus_per_worker"
        )
    if workers * resources.gpus_per_worker > gpus:
        raise UsageError(
            f"resources: {workers} workers of {resources.gpus_per_worker:g} GPUs need "
            f"{workers * resources.gpus_per_worker:g} GPUs, the cluster has {gpus:g}; lower resources.workers or "
            "resources.gpus_per_worker"
        )
    return cpus - workers * resources.cpus_per_worker
