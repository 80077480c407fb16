"""What can be said of the image without building it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def stages() -> list[list[tuple[str, str]]]:
    """Each stage's instructions with their arguments; what stands before the first is stage 0."""
    text = "\n".join(line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#"))
    found: list[list[tuple[str, str]]] = [[]]
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, arguments = line.strip().partition(" ")
            if name == "FROM":
                found.append([])
            found[-1].append((name, arguments.strip()))
    return found


def arguments(name: str) -> list[str]:
    """Those of the final image's instructions of this name."""
    return [given for instruction, given in stages()[-1] if instruction == name]


def pins(lock: str) -> dict[str, list[str]]:
    """The versions that a lock has of each package."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / lock).read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split(" ;")[0].split("==")  # what follows says on which systems
            found.setdefault(name, []).append(version)
    return found


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_one_image_by_digest_and_every_stage_stands_on_it() -> None:
    base, *built = stages()
    assert len(base) == 1
    assert re.fullmatch(r"BASE_IMAGE=\S+:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", base[0][1])
    names: set[str] = set()
    for stage in built:
        origin, _, name = stage[0][1].partition(" AS ")
        assert origin == "${BASE_IMAGE}" or origin in names
        names.add(name)
    assert len(built) > 1


def test_the_image_runs_as_nobody_special_and_leaves_commands_and_probes_to_the_pod() -> None:
    assert stages()[-1][-1] == ("USER", "10001:10001"), "the last word is who it runs as"
    instructions = {name for name, _ in stages()[-1]}
    assert not instructions & {"HEALTHCHECK", "ENTRYPOINT", "CMD", "EXPOSE", "VOLUME"}
    assert arguments("WORKDIR") == ["/app"]


def test_labels_say_what_it_is_and_of_which_commit() -> None:
    (labels,) = arguments("LABEL")
    found = dict(re.findall(r'org\.opencontainers\.image\.(\S+?)="([^"]*)"', labels))
    assert set(found) == {"title", "description", "version", "revision", "licenses", "base.name"}
    assert found["title"] == PROJECT["name"]
    assert found["version"] == PROJECT["version"]
    assert found["licenses"] == PROJECT["license"]
    assert found["revision"] == "${COMMIT}"
    assert "COMMIT" in arguments("ARG")


def test_the_image_is_told_no_machines_settings() -> None:
    """Those are build secrets: in the environment or in a copied file they would stay."""
    for stage in stages()[1:]:
        for name, given in stage:
            if name in ("ENV", "ARG", "COPY"):
                assert not re.search(r"(?i)find.links|extra.index|proxy|cert|token|password|secret|pip\.conf", given)


def test_there_is_one_version_of_ray_and_of_everything_else() -> None:
    lock, cuda = pins("requirements.lock"), pins("requirements-cuda.lock")
    assert all(len(versions) == 1 for versions in (*lock.values(), *cuda.values()))
    assert not set(lock) & set(cuda)
    (ray,) = (one for one in PROJECT["dependencies"] if one.startswith("ray["))
    major, minor, _ = lock["ray"][0].split(".")
    assert ray.endswith(f">={major}.{minor},<{major}.{int(minor) + 1}")
    assert "ray==" not in DOCKERFILE, "a version of its own"


@pytest.mark.parametrize("kept_out", [".git", ".venv", "demo", "tests", "mlruns", "build", ".env", "docs", "k8s"])
def test_the_builder_is_not_sent(kept_out: str) -> None:
    assert not sent(kept_out)


def test_the_builder_is_sent_what_the_image_is_made_of() -> None:
    sources: set[str] = set()
    for stage in stages()[1:]:
        for name, given in stage:
            if name == "COPY" and not given.startswith("--from="):
                sources.update(given.split()[:-1])
    assert {"freesolo", "jobs", "configs", "requirements.lock", "pyproject.toml"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert sent(source), source


def sent(name: str) -> bool:
    """Whether .dockerignore lets the builder see this of the top folder: the last pattern that fits decides."""
    answer = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and fnmatch(name, pattern):
            answer = line.startswith("!")
    return answer
