"""One Ray cluster and one S3 server for all tests that want them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator

import hypothesis
import pytest
import ray
from s3fs import S3FileSystem

from freesolo.cluster import OWN_CLUSTER
from tests.faults import FaultyProxy
from tests.servers import S3Server

# How long an example takes on these machines says nothing.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Known to the cluster from its start; started by the first test that wants a bucket."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def s3_proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """Between the cluster's workers and the S3 server; breaks nothing until a test tells it to."""
    with FaultyProxy(s3_server.url) as proxy:
        yield proxy


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket, and the environment of a person who may use it."""
    if not s3_server.running:
        s3_server.start()
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # fsspec keeps one connected client a process
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server, s3_proxy: FaultyProxy) -> Iterator[None]:
    """A cluster of 6 CPUs, whatever the machine has: Ray Data needs some beside the workers of a test.

    Ray schedules one GPU too, which is no device of the machine.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        for name, value in OWN_CLUSTER.items():
            environment.setenv(name, value)
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about a coming default
        with pytest.MonkeyPatch.context() as of_workers:  # as on a cluster, whose pods have credentials of their own
            for name, value in s3_server.environment.items():
                of_workers.setenv(name, value)
            of_workers.setenv("AWS_ENDPOINT_URL", s3_proxy.url)
            ray.init(
                address="local",
                num_cpus=6,
                num_gpus=1,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                object_store_memory=512 * 2**20,
            )
        try:
            yield
        finally:
            ray.shutdown()
