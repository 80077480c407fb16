"""One run on an MLflow server: found again or made, and told what there is to tell.

Everything here may raise or take long; `freesolo.tracking.witness` is what a training talks to.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH
from PIL import Image, UnidentifiedImageError

from freesolo.data.files import join
from freesolo.errors import JobError
from freesolo.tracking.courier import Refused
from freesolo.tracking.journal import Entry
from freesolo.tracking.record import RunRecord, read_record, write_record
from freesolo.tracking.server import TrackingServer, one_line, request_limits
from freesolo.tracking.spool import Parcel

TOKEN_TAG = "freesolo.token"

# What MLflow says when it will not take something however often it is offered.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
_ITEMS_AT_ONCE = 100  # params or tags that MLflow takes in one request
_METRICS_AT_ONCE = 1000
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
_DIGEST_LENGTH = 36  # characters of a data set's digest that MLflow keeps; the whole digest is a tag beside it


class MlflowRun:
    """One run on one server, found again or made; a `freesolo.tracking.courier.Recipient`."""

    def __init__(self, run_url: str, record: RunRecord) -> None:
        """Know a run; nothing is asked of the server yet.

        Args:
            run_url: The run's folder, where its record is kept up to date.
            record: Of the run.
        """
        self._run_url = run_url
        self._record = record
        self._record_lock = threading.Lock()
        self._client: MlflowClient | None = None
        self._reopened = False
        self._known_steps: dict[str, set[int]] = {}
        self._limits = ExitStack()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while the server has not been reached."""
        return self._record.run_id

    def update_record(self, **changes: str | None) -> None:
        """Change fields of the record, here and in the run's folder.

        Raises:
            UsageError, JobError: As `write_record`.
        """
        with self._record_lock:
            self._record = replace(self._record, **changes)  # type: ignore[arg-type]
            write_record(self._run_url, self._record)

    def __enter__(self) -> MlflowRun:
        # One attempt, and not a long one: whoever calls tries again, and knows when to stop.
        self._limits.enter_context(request_limits(seconds=15, retries=0))
        return self

    def __exit__(self, *error: object) -> None:
        self._limits.close()

    def open(self) -> None:
        """Find the run again, or make it."""
        client = MlflowClient(self._record.uri, self._record.uri)
        run = self._find(client)
        if run is None:
            run = client.create_run(
                experiment_id(client, self._record.server, self._record.experiment),
                tags={TOKEN_TAG: self._record.token},
                run_name=self._record.name,
            )
        else:
            self._reopened = True
            client.update_run(run.info.run_id, status="RUNNING")
        if run.info.run_id != self._record.run_id:
            self.update_record(run_id=run.info.run_id)
        self._client = client

    def take_entries(self, entries: Sequence[Entry]) -> None:
        """Send entries of the journal, but for those that the server has from before a restart."""
        with _refusals():
            metrics = [
                Metric(_spelled(name), value, entry.time_ms, entry.step)
                for entry in entries
                for name, value in entry.metrics.items()
                if entry.step not in self._steps_known(_spelled(name))
            ]
            self._log_metrics(metrics)

    def take_parcel(self, parcel: Parcel) -> None:
        """Send what a parcel holds."""
        kinds = {
            "params": self._take_params,
            "tags": self._take_tags,
            "metrics": self._take_metrics,
            "dataset": self._take_dataset,
            "parent": self._take_parent,
            "text": self._take_text,
            "artifact": self._take_artifact,
            "picture": self._take_picture,
        }
        with _refusals():
            kinds[parcel.content["kind"]](parcel)

    def finish(self, status: str) -> None:
        """Mark the run as ended."""
        self._at.set_terminated(self._id, status)

    @property
    def _at(self) -> MlflowClient:
        assert self._client is not None, "open() first"
        return self._client

    @property
    def _id(self) -> str:
        assert self._record.run_id is not None, "open() first"
        return self._record.run_id

    def _find(self, client: MlflowClient) -> Run | None:
        """The run by its id, or by its token: the server may have made it and the answer been lost."""
        if self._record.run_id is not None:
            try:
                run = client.get_run(self._record.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                return run if run.info.lifecycle_stage == "active" else None
        experiment = client.get_experiment_by_name(self._record.experiment)
        if experiment is None:
            return None
        found = client.search_runs(
            [experiment.experiment_id], f"tags.`{TOKEN_TAG}` = '{self._record.token}'", max_results=1
        )
        return found[0] if found else None

    def _steps_known(self, metric: str) -> set[int]:
        if not self._reopened:
            return set()
        if metric not in self._known_steps:
            history = self._at.get_metric_history(self._id, metric)
            self._known_steps[metric] = {point.step for point in history}
        return self._known_steps[metric]

    def _log_metrics(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), _METRICS_AT_ONCE):
            chunk = metrics[start : start + _METRICS_AT_ONCE]
            self._at.log_batch(self._id, metrics=chunk, synchronous=True)

    def _take_params(self, parcel: Parcel) -> None:
        told = {_spelled(name): value for name, value in parcel.content["params"].items()}
        known = self._at.get_run(self._id).data.params
        new = [Param(name, value) for name, value in told.items() if name not in known]
        for start in range(0, len(new), _ITEMS_AT_ONCE):
            self._at.log_batch(self._id, params=new[start : start + _ITEMS_AT_ONCE], synchronous=True)
        changed = [name for name, value in told.items() if name in known and known[name] != value]
        if changed:
            raise Refused(f"MLflow keeps the first value of {', '.join(changed)}; the run now has another")

    def _take_tags(self, parcel: Parcel) -> None:
        tags = [RunTag(_spelled(name), value) for name, value in parcel.content["tags"].items()]
        for start in range(0, len(tags), _ITEMS_AT_ONCE):
            self._at.log_batch(self._id, tags=tags[start : start + _ITEMS_AT_ONCE], synchronous=True)

    def _take_metrics(self, parcel: Parcel) -> None:
        content = parcel.content
        metrics = content["metrics"].items()
        self._log_metrics(
            [Metric(_spelled(name), value, content["time_ms"], content["step"]) for name, value in metrics]
        )

    def _take_dataset(self, parcel: Parcel) -> None:
        content = parcel.content
        scheme = urlsplit(content["url"]).scheme or "local"
        dataset = Dataset(
            content["name"],
            content["digest"][:_DIGEST_LENGTH],
            "local" if scheme == "file" else scheme,
            json.dumps({"uri": content["url"]}),
        )
        tags = [InputTag(MLFLOW_DATASET_CONTEXT, content["context"]), InputTag("digest", content["digest"])]
        self._at.log_inputs(self._id, [DatasetInput(dataset, tags)])

    def _take_parent(self, parcel: Parcel) -> None:
        parent = read_record(parcel.content["run_url"])
        if parent is None or parent.run_id is None:
            raise JobError(f"the parent run {parcel.content['run_url']} is not known to MLflow yet")
        self._at.set_tag(self._id, MLFLOW_PARENT_RUN_ID, parent.run_id, synchronous=True)

    def _take_text(self, parcel: Parcel) -> None:
        self._at.log_text(self._id, parcel.content["text"], parcel.content["name"])

    def _take_artifact(self, parcel: Parcel) -> None:
        assert parcel.payload is not None, "an artifact has files"
        self._at.log_artifacts(self._id, str(parcel.payload), parcel.content["folder"])

    def _take_picture(self, parcel: Parcel) -> None:
        assert parcel.payload is not None, "a picture has pixels"
        name, step = parcel.content["name"], parcel.content["step"]
        if self._reopened and self._has_picture(name, step):
            return
        pixels = _decode(parcel.payload)
        time_ms = parcel.content["time_ms"]
        self._at.log_image(self._id, pixels, key=name, step=step, timestamp=time_ms, synchronous=True)

    def _has_picture(self, name: str, step: int) -> bool:
        # The names that `log_image` gives its files, and that MLflow's pages read back.
        start = f"images/{name.replace('/', '~')}+step+{step}+"
        return any(file.path.startswith(start) for file in self._at.list_artifacts(self._id, "images"))


def is_refusal(error: MlflowException) -> bool:
    """Whether MLflow will not take something however often it is offered."""
    return error.error_code in _REFUSALS


def experiment_id(client: MlflowClient, server: TrackingServer, name: str) -> str:
    """MLflow's id of the experiment of that name, which is made where there is none.

    Raises:
        MlflowException: The server does not answer, or refuses.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None if server.artifact_root is None else join(server.artifact_root, name)
    return str(client.create_experiment(name, artifact_location=location))


def _spelled(name: str) -> str:
    """A name as MLflow takes it, which refuses all that comes with one that it does not: a category may be called
    "mouse (animal)", or "a/", its metrics may not."""
    parts = _NOT_IN_NAMES.sub("_", name)[:MAX_ENTITY_KEY_LENGTH].split("/")
    return "/".join("_" if part in ("", ".") else part.replace("..", "__") for part in parts)  # no path's syntax


@contextmanager
def _refusals() -> Iterator[None]:
    """Tell what MLflow will never take from what it cannot take now."""
    try:
        yield
    except MlflowException as error:
        if is_refusal(error):
            raise Refused(one_line(error)) from error
        raise
    except (ValueError, TypeError) as error:  # what MLflow's client checks before it asks the server
        raise Refused(one_line(error)) from error


def _decode(payload: Path) -> np.ndarray:
    pixels = payload / "pixels.npy"
    if pixels.exists():
        return np.asarray(np.load(pixels))
    try:
        with Image.open(payload / "bytes") as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise Refused("a picture's bytes are not an image") from error
