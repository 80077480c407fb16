"""One local Ray cluster for all tests that want one."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray

from freesolo.train.cluster import OWN_CLUSTER


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A cluster of 6 CPUs, whatever the machine has: Ray Data needs some beside the workers of a test."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        for name, value in OWN_CLUSTER.items():
            environment.setenv(name, value)
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about a coming default
        ray.init(
            address="local",
            num_cpus=6,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=512 * 2**20,
        )
        try:
            yield
        finally:
            ray.shutdown()
