"""What is shipped passes its own check, and is what this page of files says it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kubernetes.check import problems
from tests.kubernetes.manifests import OVERLAYS, ROOT, Build, name_of, shipped
from tests.kubernetes.version_rules import pins

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kubectl comes as a Linux wheel only")


@pytest.fixture(scope="module")
def builds() -> dict[str, Build]:
    return {build.path: build for build in shipped()}


def test_everything_shipped_passes(builds: dict[str, Build]) -> None:
    found = [f"{build.path}: {problem}" for build in builds.values() for problem in problems(build)]
    assert not found, "\n".join(found)
    assert not list(pins())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_there_is_a_rayjob_for_every_job(builds: dict[str, Build], overlay: str) -> None:
    commands = [
        job["spec"]["entrypoint"].split()[1]
        for build in builds.values()
        if build.overlay == overlay and build.is_job and " with " not in build.path
        for job in build.objects
    ]
    assert sorted(commands) == sorted(f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_jobs_cluster_is_the_interactive_one_of_its_overlay(builds: dict[str, Build], overlay: str) -> None:
    """But for sizes, which are the job's, and for GCS fault tolerance, which only the other has."""
    platform = builds[f"k8s/overlays/{overlay}"]
    (cluster,) = platform.of_kind("RayCluster")
    expected = {key: value for key, value in cluster["spec"].items() if key != "gcsFaultToleranceOptions"}
    for build in builds.values():
        if build.overlay == overlay and build.is_job and " with " not in build.path:
            (job,) = build.objects
            assert _without_sizes(job["spec"]["rayClusterSpec"]) == _without_sizes(expected), name_of(job)


def _without_sizes(cluster: dict[str, object]) -> dict[str, object]:
    sizes = ("replicas", "minReplicas", "maxReplicas")
    groups = cluster["workerGroupSpecs"]
    assert isinstance(groups, list)
    return {
        **cluster,
        "workerGroupSpecs": [{key: value for key, value in group.items() if key not in sizes} for group in groups],
    }


def test_an_optional_queue_suspends_a_job_and_leaves_its_size_alone(builds: dict[str, Build]) -> None:
    (job,) = builds["k8s/overlays/prod/jobs/train-solo with kueue"].objects
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "freesolo"
    assert job["spec"]["suspend"] is True
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    replicas = [group["replicas"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    assert replicas == [0, 1, 0]


def test_the_command_says_what_it_checked_and_ends_with_its_verdict() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kubernetes"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("k8s-check: "), done.stdout
    assert done.stdout.rstrip().endswith(": 0 problems")
