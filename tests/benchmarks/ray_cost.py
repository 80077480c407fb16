"""What Ray costs a training: `python -m tests.benchmarks.ray_cost [--repeats N] [--json path]`.

Ours is a job as a person starts it: `jobs/pretrain_densecl.py`, with a cluster of its own, photos from shards, metrics
to MLflow. The peer is a loop of plain PyTorch in a process of its own, over batches that lie in its memory. Both train
the same model with as many threads, in turns; what is compared is the time of a step once training is under way, and
beside it how long each took until then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from freesolo.config import PretrainJob
from freesolo.config_file import load_config
from freesolo.densecl.model import DenseCL
from freesolo.train.learner import Learner
from freesolo.train.tasks import DenseCLTraining
from freesolo.types import CropPair
from tests.benchmarks.input_paths import Sizes, store
from tests.benchmarks.measure import Benchmark, Comparison, Measurement, as_json, table

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/pretrain/densecl_r50_coco.yaml"
CORES = os.cpu_count() or 1
THREADS = max(1, CORES - 1)
"""Of the training: a core is left to read and decode with, as a cluster's has to be (`freesolo.cluster.DATA_CPUS`)."""
LOG_EVERY = 5
WARM_UP_STEPS = 20
STEPS = 60
SETTINGS = (
    f"resources={{workers: 1, cpus_per_worker: {THREADS}}}",
    "tracking={}",
    "pretrain.model={backbone: resnet18, hidden_channels: 256, projection_channels: 64, queue_length: 4096}",
    "pretrain.views.size=128",
    f"pretrain.loop={{steps: {STEPS}, batch_size: 16, log_every: {LOG_EVERY}, checkpoint_every: {STEPS}}}",
)


def job_of(folder: Path) -> PretrainJob:
    """What both sides train."""
    return load_config(PretrainJob, CONFIG, [*SETTINGS, f"dataset={folder}/data"])


def our_times(folder: Path, name: str, *others: str) -> list[float]:
    """When each `LOG_EVERY`th step of the job was done, in seconds after the job was started.

    Args:
        folder: With the data set; runs are kept there too.
        name: Of the run.
        others: Settings that are not `SETTINGS`.
    """
    command = [sys.executable, str(ROOT / "jobs/pretrain_densecl.py"), "--config", str(CONFIG), "--run-name", name]
    started = time.time()
    subprocess.run(
        [*command, "--storage", str(folder / "runs"), f"dataset={folder}/data", *SETTINGS, *others],
        check=True,
        capture_output=True,
    )
    lines = (folder / "runs" / name / "pretrain" / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    return [record["time_ms"] / 1000 - started for record in told if "loss" in record["metrics"]]


def peers_times(folder: Path) -> list[float]:
    """The same of the plain loop."""
    command = [sys.executable, "-m", "tests.benchmarks.ray_cost", "--peer-in", str(folder)]
    started = time.time()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return [moment - started for moment in json.loads(done.stdout.splitlines()[-1])]


def plain_loop(job: PretrainJob) -> list[float]:
    """Train in this process; gives the moments at which each `LOG_EVERY`th step was done."""
    torch.set_num_threads(job.resources.cpus_per_worker)
    settings, generator = job.pretrain, torch.Generator().manual_seed(0)
    model = DenseCL(settings.model)
    model.initialise(generator)
    task = DenseCLTraining(model, settings.views)
    optimizer = Learner(task, settings.loop, settings.optimizer, torch.device("cpu")).optimizer
    size, photos = settings.views.size, settings.loop.batch_size
    crops = torch.randint(256, (4, 2, photos, 3, size, size), dtype=torch.uint8, generator=generator)
    moments = []
    for step in range(settings.loop.steps):
        query, key = crops[step % len(crops)]
        losses = model(task.prepare(CropPair(query, key, tuple(range(photos))), generator), step)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_step(step)
        if (step + 1) % LOG_EVERY == 0:
            moments.append(time.time())
    return moments


def step_seconds(times: Sequence[float]) -> float:
    """Of a step once training is under way, at the median."""
    steady = times[WARM_UP_STEPS // LOG_EVERY - 1 :]
    return median((after - before) / LOG_EVERY for before, after in pairwise(steady))


def main(argv: Sequence[str] | None = None) -> None:
    """Train in turns, and say what a step takes each way."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ray_cost", description="Measure what Ray costs.")
    parser.add_argument("--repeats", type=int, default=3, help="trainings each way; default: %(default)s")
    parser.add_argument("--json", type=Path, default=Path("build/ray_cost.json"), help="default: %(default)s")
    parser.add_argument("--peer-in", type=Path, help="run the plain loop here, and print its moments as JSON")
    arguments = parser.parse_args(argv)
    if arguments.peer_in:
        print(json.dumps(plain_loop(job_of(arguments.peer_in))))
        return
    ours, peers = [], []
    with tempfile.TemporaryDirectory(prefix="freesolo-benchmark-") as name:
        folder = Path(name)
        store(folder, Sizes(photos=128))
        for repeat in range(arguments.repeats):
            ours.append(our_times(folder, f"run-{repeat}"))
            peers.append(peers_times(folder))
    steady, first = (
        Comparison(what, "a loop of plain PyTorch", *(Measurement(tuple(map(of, times))) for times in (ours, peers)))
        for what, of in (("a step", step_seconds), (f"until step {LOG_EVERY}", lambda times: times[0]))
    )
    benchmark = Benchmark(
        "ray_cost",
        f"DenseCL, R18, 16 photos of 128 px, {THREADS} of {CORES} cores; a job against tensors in memory",
        tuple,
    )
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table(benchmark, [steady, first], peak=1.0))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(as_json(benchmark, [steady, first]), indent=2) + "\n")


if __name__ == "__main__":
    main()
