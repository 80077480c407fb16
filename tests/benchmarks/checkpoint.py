"""How long a checkpoint has training stand still: an R50's SOLOv2 with its optimiser's momentum, to S3.

Ours copies what is to be saved; a thread writes it, takes its checksum and uploads it while training goes on, which has
that much less of the processor then: this is not counted here. The peer does what training scripts do: `torch.save` to
a file, and then the upload.
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from freesolo.settings import LoopSettings, LossSettings, OptimizerSettings, SegmentationViewSettings, SoloModelSettings
from freesolo.solo.task import SoloTask
from freesolo.train.learner import Learner
from freesolo.train.loop import Progress, check_weights
from freesolo.train.tasks import SoloTraining
from tests.benchmarks.measure import Benchmark, Case

if TYPE_CHECKING:
    from freesolo.train.checkpoint import Snapshot
    from tests.servers import S3Server


def cases(device: torch.device, model: SoloModelSettings | None = None) -> Iterator[Case[Any, Any]]:
    """One checkpoint, to a SeaweedFS on this machine."""
    from tests.servers import S3Server

    learner = learner_with_momentum(device, model or SoloModelSettings())
    folder = tempfile.TemporaryDirectory(prefix="freesolo-benchmark-")
    atexit.register(folder.cleanup)
    server = S3Server(Path(folder.name))
    server.start()
    try:
        yield Case(
            name="training stands still",
            peer_name="torch.save, upload",
            ours=lambda: copied(learner),
            peer=save_and_upload(learner, Path(folder.name), server),
            assert_equal=assert_equal,
        )
    finally:
        server.kill()


def learner_with_momentum(device: torch.device, model: SoloModelSettings) -> Learner:
    """After a step, whose gradients are all zero."""
    task = SoloTask(model, "masks", LossSettings())
    task.initialise(torch.Generator().manual_seed(0))
    training = SoloTraining(task, SegmentationViewSettings(strong=False))
    learner = Learner(training, LoopSettings(steps=1, batch_size=1), OptimizerSettings(learning_rate=1e-4), device)
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.step()
    return learner


def copied(learner: Learner) -> Snapshot:
    """All that the loop waits for."""
    from freesolo.train.checkpoint import take_snapshot

    check_weights(learner, 1)
    return take_snapshot(learner, Progress(1))


def save_and_upload(learner: Learner, folder: Path, server: S3Server) -> Callable[[], Path]:
    """The peer; gives the file that it uploaded."""
    import boto3

    names = {"endpoint_url": "AWS_ENDPOINT_URL", "region_name": "AWS_DEFAULT_REGION"}
    names |= {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    client = boto3.client("s3", **{argument: server.environment[name] for argument, name in names.items()})
    client.create_bucket(Bucket="checkpoints")
    path = folder / "learner.pt"

    def save() -> Path:
        torch.save(learner.state_dict(), path)
        client.upload_file(str(path), "checkpoints", path.name)
        return path

    return save


def assert_equal(ours: Snapshot, peer: Path) -> None:
    """The same tensors."""
    saved = torch.load(peer, map_location="cpu", weights_only=True)
    assert saved.keys() == ours.state.keys()
    assert all(torch.equal(tensor, saved["module"][name]) for name, tensor in ours.state["module"].items())
    momenta = ours.state["optimizer"]["state"]
    assert momenta
    for number, state in momenta.items():
        assert torch.equal(state["momentum_buffer"], saved["optimizer"]["state"][number]["momentum_buffer"])


BENCHMARK = Benchmark(
    name="checkpoint",
    inputs="SOLOv2 with an R50 and its momentum, to an S3 server on this machine",
    cases=cases,
    needs=("boto3", "fsspec", "psutil"),
)
