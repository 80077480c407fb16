"""What a person is told of a training that Ray gave up, and of a node without memory."""

from __future__ import annotations

import pytest
import torch
from ray.exceptions import ObjectStoreFullError, RayTaskError
from ray.train import WorkerGroupError

from freesolo.data.ingest import full_memory_told
from freesolo.errors import JobError, TooLargeError
from freesolo.train.worker import _failure, _reason, full_device_told

GLOO = 'Traceback (most recent call last):\n  File "loop.py", line 1, in train\nRuntimeError: Connection closed by peer'
DISK = 'Traceback (most recent call last):\n  File "worker.py"\nRuntimeError: step 2: the disk is full'
LOST = "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n"
TASK = "\x1b[36mray::MapBatches(_view_block)()\x1b[39m (pid=1, ip=127.0.0.1)\n  File x, line 1\nValueError: a bug"


def failed(*texts: str) -> WorkerGroupError:
    return WorkerGroupError("\n".join(texts), {rank: RuntimeError(text) for rank, text in enumerate(texts)})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (failed(GLOO, LOST), "worker 1: The actor died unexpectedly before finishing this task."),
        (failed(DISK, GLOO), "worker 0: RuntimeError: step 2: the disk is full"),
        (failed(TASK), "worker 0: ValueError: a bug"),
        (failed(""), "worker 0: RuntimeError('')"),
        (WorkerGroupError("no worker\nwas started", {}), "Training failed due to worker errors: no worker was started"),
        (OSError("no such\nbucket"), "no such bucket"),
    ],
)
def test_the_cause_is_told_in_one_line(error: WorkerGroupError | OSError, told: str) -> None:
    assert _reason(error) == told


def test_full_shared_memory_is_told_whoever_met_it() -> None:
    full = ObjectStoreFullError("too large")
    for error in (full, RayTaskError("read", "Traceback ...", full)):
        with pytest.raises(JobError, match=r"^a node's shared memory is full, and so is the disk"), full_memory_told():
            raise error
    other = RayTaskError("read", "Traceback ...", ValueError("a bug"))
    with pytest.raises(RayTaskError), full_memory_told():
        raise other


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB")


def test_a_full_device_is_told_with_what_to_do_about_it() -> None:
    told = r"^CUDA out of memory: lower loop.batch_size, .* a higher loop.accumulation_steps$"
    with pytest.raises(TooLargeError, match=told), full_device_told():
        raise CUDA
    with pytest.raises(RuntimeError, match="a bug"), full_device_told():
        raise RuntimeError("a bug")


def test_one_worker_among_others_fails_of_it_and_the_training_ends_with_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("freesolo.train.worker.world_size", lambda: 2)
    with pytest.raises(RuntimeError) as failure, full_device_told():
        raise CUDA
    traceback = f'Traceback (most recent call last):\n  File "loop.py"\nRuntimeError: {failure.value}'
    error = _failure("s3://bucket/run", failed(GLOO, traceback))
    assert isinstance(error, TooLargeError)
    assert str(error).startswith("CUDA out of memory: lower loop.batch_size")
    other = _failure("s3://bucket/run", failed(DISK))
    assert not isinstance(other, TooLargeError)
    assert str(other).startswith("s3://bucket/run: training failed: worker 0: RuntimeError: step 2")
