"""Write ray_metrics.txt anew: `python -m tests.kubernetes.record_ray_metrics`, after Ray's version has changed.

A small Ray runs a data stream, a pool of actors, a training and a task that fails, while its /metrics are read. GPUs'
metrics are taken from Ray's own table of them, since there may be none here.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ |= {"RAY_metrics_report_interval_ms": "2000"}

import ray
import ray.data
import ray.train.torch
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from tests.kubernetes.version_rules import METRICS


class _Reader(threading.Thread):
    """Reads every second what is there."""

    def __init__(self, discovery: Path) -> None:
        super().__init__(daemon=True)
        self.names: set[str] = set()
        self.done = threading.Event()
        self._discovery = discovery

    def run(self) -> None:
        while not self.done.wait(1.0):
            try:
                groups = json.loads(self._discovery.read_text())
                targets = {target for group in groups for target in group["targets"]}
                for target in targets:
                    with urllib.request.urlopen(f"http://{target}/metrics", timeout=3) as answer:
                        text = answer.read().decode()
                    self.names |= set(re.findall(r"^([a-z][\w:]*)[{ ]", text, re.MULTILINE))
            except (OSError, ValueError):
                continue  # not yet there, or being written


class _Slow:
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.05)
        return batch


def _train() -> None:
    for _ in ray.train.get_dataset_shard("train").iter_batches(batch_size=50):
        time.sleep(0.05)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "state").write_text("x")
        ray.train.report({"loss": 0.0}, checkpoint=ray.train.Checkpoint.from_directory(folder))


@ray.remote(max_retries=0)
def _fail() -> None:
    raise ValueError("on purpose")


def main() -> None:
    """Run all that and write the names."""
    with tempfile.TemporaryDirectory() as storage:
        ray.init(address="local", num_cpus=8, include_dashboard=True)
        reader = _Reader(Path("/tmp/ray/prom_metrics_service_discovery.json"))
        reader.start()
        stream = ray.data.range(4000, override_num_blocks=20).map_batches(_Slow, concurrency=2, batch_size=50)
        ray.train.torch.TorchTrainer(
            _train,
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            datasets={"train": stream},
            run_config=ray.train.RunConfig(name="metrics", storage_path=storage),
        ).fit()
        stream.materialize()
        ray.wait([_fail.remote()])
        time.sleep(10)
        reader.done.set()
        reader.join()
    names = {name for name in reader.names if name.startswith(("ray_", "autoscaler_"))}
    names |= {f"ray_{name}" for name in METRICS_GAUGES}
    head = f"# Ray {ray.__version__}: what its /metrics have (record_ray_metrics.py)."
    METRICS.write_text("\n".join([head, *sorted(names)]) + "\n")


if __name__ == "__main__":
    main()
