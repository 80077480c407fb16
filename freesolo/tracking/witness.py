"""Tells MLflow of a run, as a witness and not as a dependency.

A run's own journal (`freesolo.tracking.journal`) is the truth. A `Witness` reads behind it in one background thread,
and sends what it finds there, and what else it is told, to MLflow. It never blocks or stops the run: while the server
is away metrics wait in the journal and the rest on this machine's disk, both are tried again, and `close` reports what
was not delivered.

Which MLflow run belongs to a run of ours stands in `<run_url>/mlflow_run.json`, so that a run that is submitted again
re-opens the same one. Steps that the server has from before a restart are not sent twice.

```python
journal = Journal(run_url, resume_step=step)
witness = Witness(TrackedRun(run_url, "solo", "freesolo", resolve_server(job.tracking, storage)), journal)
witness.settings(job)
journal.append(step, {"loss": 0.71})  # the witness sees it by itself
journal.flush()  # with each checkpoint
delivery = witness.close("FINISHED")
journal.close()
```
"""

from __future__ import annotations

import getpass
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from freesolo.config_file import dump_config
from freesolo.data.files import join
from freesolo.data.lease import held
from freesolo.errors import JobError, UsageError
from freesolo.provenance import git_commit, package_version
from freesolo.settings import Settings
from freesolo.tracking.courier import Courier, Delivery
from freesolo.tracking.journal import Journal
from freesolo.tracking.record import RECORD_NAME, RunRecord, read_record, write_record
from freesolo.tracking.server import TrackingServer, explain
from freesolo.tracking.spool import Bulk, Spool

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run of ours and how MLflow shall know it; can be sent to another process.

    Attributes:
        run_url: The run's folder.
        name: Shown by MLflow.
        experiment: Of MLflow; made where there is none of that name.
        server: None: nothing is sent.
        parent_run_url: Folder of the run that this one is a stage of.
    """

    run_url: str
    name: str
    experiment: str
    server: TrackingServer | None
    parent_run_url: str | None = None


class Witness:
    """Tells MLflow of one run. All methods but `close` return at once."""

    def __init__(self, run: TrackedRun, journal: Journal, *, max_pause_seconds: float = 30.0) -> None:
        """Read or make the run's record, and begin to send.

        Args:
            run: Of which MLflow is told. Where it has a record of the same server, its MLflow run is re-opened.
            journal: The run's metrics; sent as they are appended. Must stay open until `close` has returned.
            max_pause_seconds: Between attempts while the server is away.

        Raises:
            UsageError, JobError: The run's folder cannot be read or written, where checkpoints must go too.
        """
        self._courier: Courier | None = None
        if run.server is None:
            return
        # MLflow takes seconds to import: a process that tells it nothing need not wait for it.
        from freesolo.tracking.mlflow_run import MlflowRun

        record = _open_record(run, run.server)
        self._spool = Spool(_spool_folder(record.token))
        self._recipient = MlflowRun(run.run_url, record)
        if record.parent_run_url is not None:
            self._spool.put({"kind": "parent", "run_url": record.parent_run_url})
        self._journal = journal
        self._courier = Courier(
            journal,
            self._spool,
            self._recipient,
            explain=lambda error: explain(record.uri, error),
            sample=self._sample_machine,
            max_pause_seconds=max_pause_seconds,
        )
        self._courier.start()
        self.tags(_code_tags())

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while the server has not been reached, and without one."""
        return None if self._courier is None else self._recipient.run_id

    def settings(self, settings: Settings) -> None:
        """Tell the resolved configuration: each setting a parameter, the whole as the artifact `config.yaml`."""
        self.params(_flatten(settings.model_dump(mode="json")))
        self.text("config.yaml", dump_config(settings))

    def params(self, params: Mapping[str, object]) -> None:
        """Tell parameters. MLflow keeps the first value of each, also when a run is resumed with another."""
        self._put({"kind": "params", "params": {name: str(value) for name, value in params.items()}})

    def tags(self, tags: Mapping[str, str]) -> None:
        """Tell tags; a later value replaces an earlier one."""
        self._put({"kind": "tags", "tags": dict(tags)})

    def dataset(self, name: str, digest: str, url: str, *, context: str = "training") -> None:
        """Tell which data the run used.

        Args:
            name: For people.
            digest: Of the data set's manifest.
            url: Of the data set.
            context: What it was used for, as "training" or "evaluation".
        """
        self._put({"kind": "dataset", "name": name, "digest": digest, "url": url, "context": context})

    def text(self, name: str, text: str) -> None:
        """Tell a text, kept as the artifact `name`; a later one replaces an earlier one."""
        self._put({"kind": "text", "name": name, "text": text})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Tell a file or a folder, copied now, kept under its own name in the artifact folder `folder`."""
        self._put({"kind": "artifact", "folder": folder}, path)

    def picture(self, name: str, image: Bulk, step: int) -> None:
        """Tell a picture of a step.

        Args:
            name: The same at each step; letters, digits, `_-./ `.
            image: A PNG's bytes, or pixels.
            step: Of the run.
        """
        self._put({"kind": "picture", "name": name, "step": step, "time_ms": _now()}, image)

    def close(self, status: Status = "FINISHED", *, timeout: float | int = 30.0) -> Delivery:
        """Send the rest and end the MLflow run.

        Args:
            status: How the run ended.
            timeout: Seconds to try.

        Returns:
            What was delivered, for the caller to print; what was not is sent by `deliver_later`, on this machine.
        """
        if self._courier is None:
            return Delivery(0, 0, None)
        try:
            self._recipient.update_record(status=status)
        except (UsageError, JobError) as error:
            self._courier.refuse(f"how the run ended could not be recorded: {error}")
        delivery = self._courier.close(status, timeout)
        if delivery.reason is None:
            self._spool.delete()
        return delivery

    def _put(self, content: dict[str, Any], payload: Bulk | Path | None = None) -> None:
        if self._courier is None:
            return
        try:
            taken = self._spool.put(content, payload)
        except OSError as error:  # a full disk must not end the run that it would be told of
            self._courier.refuse(f"{content['kind']} could not be kept to be sent: {error}")
            return
        if not taken:
            self._courier.refuse(f"{content['kind']} could not be kept to be sent: too much is waiting")

    def _sample_machine(self) -> None:
        # MLflow's own monitor ends for good when its server is away once, and logs through the global client.
        metrics = {f"system/{name}": value for name, value in (_machine_load() | _gpu_load()).items()}
        self._put({"kind": "metrics", "step": self._journal.last_step, "time_ms": _now(), "metrics": metrics})


def deliver_later(run_url: str, *, timeout: float | int = 60.0) -> Delivery:
    """Send what an ended run could not deliver: all of its metrics, and what else this machine kept for it.

    Raises:
        UsageError: The run has never had an MLflow run.
        LeaseError: It has not ended: who works on it delivers.
        UsageError, JobError: The run's folder cannot be read.
    """
    from freesolo.tracking.mlflow_run import MlflowRun

    record = read_record(run_url)
    if record is None:
        raise UsageError(f"{run_url}: no {RECORD_NAME}: this run was never to be sent to MLflow")
    with held(join(run_url, ".lease")):
        journal = Journal(run_url, resume_step=None)
        spool = Spool(_spool_folder(record.token))
        courier = Courier(journal, spool, MlflowRun(run_url, record), explain=lambda error: explain(record.uri, error))
        courier.start()
        delivery = courier.close(record.status or "KILLED", timeout)
        if delivery.reason is None:
            spool.delete()
        journal.discard()  # it was only read
    return delivery


def _open_record(run: TrackedRun, server: TrackingServer) -> RunRecord:
    """The record to go on with: the run's own, as far as it is of the same server, or a new one."""
    old = read_record(run.run_url)
    new = RunRecord(
        token=uuid.uuid4().hex if old is None else old.token,
        uri=server.uri,
        artifact_root=server.artifact_root,
        experiment=run.experiment,
        name=run.name,
        parent_run_url=run.parent_run_url,
        run_id=old.run_id if old is not None and old.uri == server.uri else None,
    )
    write_record(run.run_url, new)
    return new


def _spool_folder(token: str) -> Path:
    """The same for every process that continues a run on this machine, and for no other run."""
    return Path(tempfile.gettempdir()) / f"freesolo-spool-{getpass.getuser()}" / token


def _code_tags() -> dict[str, str]:
    commit = git_commit()
    tags = {"code_version": commit or package_version()}
    return tags if commit is None else {**tags, "mlflow.source.git.commit": commit}


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """`{"train": {"loop": {"steps": 10}}}` as `{"train.loop.steps": 10}`."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _machine_load() -> dict[str, float]:
    """What this machine and this process use, under the names of MLflow's own monitor."""
    memory, network = psutil.virtual_memory(), psutil.net_io_counters()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_megabytes": memory.used / 1e6,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / 1e6,
        "network_receive_megabytes": network.bytes_recv / 1e6,
        "network_transmit_megabytes": network.bytes_sent / 1e6,
    }


def _gpu_load() -> dict[str, float]:
    """What the GPUs that this process uses are at; empty where it uses none."""
    if not torch.cuda.is_initialized():
        return {}
    load = {}
    for index in range(torch.cuda.device_count()):
        # Not `mem_get_info`: it would make a context, half a gigabyte, on each GPU that it looks at.
        load[f"gpu_{index}_memory_usage_megabytes"] = torch.cuda.memory_reserved(index) / 1e6
        load[f"gpu_{index}_memory_peak_megabytes"] = torch.cuda.max_memory_allocated(index) / 1e6
        if find_spec("pynvml") is not None:
            load[f"gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
    return load


def _now() -> int:
    return int(time.time() * 1000)
