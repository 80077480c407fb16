"""What a person is told of a training that Ray gave up, and of a node without memory."""

from __future__ import annotations

import pytest
from ray.exceptions import ObjectStoreFullError, RayTaskError
from ray.train import WorkerGroupError

from freesolo.data.ingest import full_memory_told
from freesolo.errors import JobError
from freesolo.train.worker import _reason

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
