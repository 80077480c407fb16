"""What README and k8s/README.md tell people to type is there: kustomizations, objects, Secrets and keys, versions.

Their commands (`kubectl`, `helm`, `kind`, `docker build`, `export`) can't be run without a cluster.
"""

from __future__ import annotations

import re
import shlex
import sys
import tomllib

import pytest

from tests.kubernetes.manifests import ROOT, Object, kustomize
from tests.kubernetes.reference_rules import documented_secrets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kubectl comes as a Linux wheel only")

DOCUMENTS = ("README.md", "k8s/README.md")
KINDS = {
    "deployment": "Deployment",
    "statefulset": "StatefulSet",
    "svc": "Service",
    "raycluster": "RayCluster",
    "rayjob": "RayJob",
    "job": "RayJob",  # the submitter's Job has the name of its RayJob
}
# KubeRay makes these for the RayCluster `ray`.
MADE_BY_KUBERAY = {("Service", "ray-head-svc"), ("Secret", "ray")}


def commands() -> list[list[str]]:
    """The words of all commands that people are told to type about a cluster."""
    blocks = [block for name in DOCUMENTS for block in re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(), re.S)]
    lines = [line for block in blocks for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [one for one in words if one and one[0] in ("kubectl", "helm", "kind", "docker")]


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    """Those of dev, which README installs, and of its jobs."""
    folder = ROOT / "k8s" / "overlays" / "dev"
    jobs = [kustomize(path) for path in sorted((folder / "jobs").iterdir()) if path.name != "base"]
    return [one for build in (kustomize(folder), *jobs) for one in build]


def test_what_is_applied_and_created_builds() -> None:
    folders = [words[words.index("-k") + 1] for words in commands() if "-k" in words]
    assert len(folders) >= 4
    for folder in folders:
        assert kustomize(ROOT / folder), folder
    files = [words[words.index("-f") + 1] for words in commands() if words[:3] == ["kubectl", "apply", "-f"]]
    assert files
    assert all((ROOT / file).is_file() for file in files)


def test_jobs_are_created_and_platforms_are_applied() -> None:
    """`apply` would change a RayJob that has run, which can't be changed."""
    for words in commands():
        if "-k" in words:
            folder = words[words.index("-k") + 1]
            assert (words[1] == "apply") != ("/jobs/" in folder), " ".join(words)


def test_what_is_named_exists(objects: list[Object]) -> None:
    there = {(one["kind"], one["metadata"]["name"]) for one in objects} | MADE_BY_KUBERAY
    named = set()
    for words in commands():
        for word in words:
            kind, slash, name = word.partition("/")
            if slash and kind in KINDS:
                named.add((KINDS[kind], name))
    assert len(named) >= 6
    assert named <= there, f"there are no {named - there}"


def test_namespaces_are_given_where_objects_are_named() -> None:
    for words in commands():
        if words[0] == "kubectl" and words[1] not in ("apply", "create", "replace"):
            assert words[1:3] == ["-n", "freesolo"], " ".join(words)


def test_secrets_are_created_with_the_keys_that_are_documented() -> None:
    created = {}
    for words in commands():
        if "secret" in words and "create" in words:
            name = words[words.index("generic") + 1]
            created[name] = {word.split("=")[1] for word in words if word.startswith("--from-literal=")}
    assert created == documented_secrets()


def test_versions_are_those_that_are_checked() -> None:
    (install,) = [words for words in commands() if words[:2] == ["helm", "install"]]
    assert install[install.index("--version") + 1] == "1.7.0"
    assert "KubeRay v1.7.0" in (ROOT / "tests" / "kubernetes" / "crds" / "README.md").read_text()
    assert install[install.index("--namespace") + 1] == "kuberay-system"  # which the network policies let in
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {word for words in commands() for word in words if word.startswith("ghcr.io/freesolo/freesolo")}
    assert images == {f"ghcr.io/freesolo/freesolo:{version}"}


def test_the_bucket_is_the_overlays(objects: list[Object]) -> None:
    (storage,) = [one for one in objects if one["metadata"]["name"] == "storage"]
    used = {url for url in re.findall(r"s3://[a-z-]+", _section()) if url != "s3://bucket"}
    assert used == {storage["data"]["FREESOLO_BUCKET"]}


def _section() -> str:
    return (ROOT / "README.md").read_text().partition("## Run it on Kubernetes")[2].partition("\n## ")[0]
