"""Models by name: registered versions, the aliases `candidate` and `champion`, and weights by any kind of reference.

A version holds our model file (`freesolo.models.model_file`) and the code that serves it, so that both the next stage
(`resolve_weights`) and `mlflow models serve` can use it. `candidate` is the newest version; `champion` is the best one,
moved by an evaluation and by nothing else.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from freesolo.config import PredictSettings
from freesolo.data.files import is_local, open_stream
from freesolo.errors import JobError, UsageError
from freesolo.models.download import sha256_of_file
from freesolo.models.model_file import load_model
from freesolo.models.weights import PUBLISHED, pull
from freesolo.provenance import code_version
from freesolo.served_model import MODEL_NAME, SHA256_TAG, ServedModel
from freesolo.tracking import TrackingServer, experiment_id, explain, is_refusal, request_limits

CANDIDATE = "candidate"
CHAMPION = "champion"

_DATASET_TAG = "evaluation.dataset_digest"
_METRIC_TAG = "evaluation."
_REFERENCE = re.compile(r"models:/(?P<name>[^@/]+)(@(?P<alias>[^@/]+)|/(?P<version>\d+))")


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """A version of a registered model.

    Attributes:
        name: Of the model.
        version: Number of the version.
        sha256: Of the model file.
    """

    name: str
    version: str
    sha256: str

    @property
    def reference(self) -> str:
        """What `resolve_weights` takes, as `models:/freesolo/3`."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True, slots=True)
class ResolvedWeights:
    """Weights on this machine's disk.

    Attributes:
        path: The file.
        sha256: Of the file, in hexadecimal.
        name: Of the registered model; None where they are not from the registry.
        version: Of the registered model; None where they are not from the registry.
    """

    path: Path
    sha256: str
    name: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a version became the champion.

    Attributes:
        promoted: Whether the alias was moved.
        champion: The version that the alias is at now; None where there is none.
        reason: In words for people.
    """

    promoted: bool
    champion: str | None
    reason: str


# --- registering ----------------------------------------------------------------------------------------------------


def register_segmenter(
    model_file: Path,
    name: str,
    server: TrackingServer,
    *,
    experiment: str,
    predict: PredictSettings | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> RegisteredVersion:
    """Register a segmenter as the newest version of `name` and its candidate.

    Served, it takes a binary column `image` of photos as files, and answers `masks` (COCO run-length encodings),
    `boxes` (`[x, y, width, height]`), `scores` and `category_ids` for each.

    A version with the same file and settings as the newest is not registered again: a stage that was killed between
    registering and saying so can be repeated.

    Args:
        model_file: Of kind "segmenter".
        name: Of the registered model; made where there is none.
        server: Whose registry.
        experiment: Where MLflow shows the model, where `run_id` does not say.
        predict: Input size and thresholds of the served model; default: PredictSettings().
        run_id: MLflow's id of the run that made it; None where the server did not get to know it.
        tags: Of the version, beside what the model file says.

    Raises:
        UsageError: The file is not a segmenter's, or MLflow refuses the name.
        JobError: The registry does not answer.
    """
    config = {"predict": (predict or PredictSettings()).model_dump(mode="json")}
    served = ServedModel(model_file, load_model(model_file, "segmenter"), config)
    return _register(served, name, server, experiment, run_id, tags or {})


def register_backbone(
    model_file: Path,
    name: str,
    server: TrackingServer,
    *,
    experiment: str,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> RegisteredVersion:
    """Register a backbone as the newest version of `name` and its candidate.

    Served, it takes a binary column `image` of photos as files and answers an `embedding` for each. For the rest see
    `register_segmenter`.

    Raises:
        UsageError: The file is not a backbone's, or MLflow refuses the name.
        JobError: The registry does not answer.
    """
    served = ServedModel(model_file, load_model(model_file, "backbone"), {})
    return _register(served, name, server, experiment, run_id, tags or {})


def _register(
    served: ServedModel, name: str, server: TrackingServer, experiment: str, run_id: str | None, tags: Mapping[str, str]
) -> RegisteredVersion:
    with _talking_to(server, f"{name} was not registered") as client:
        _make_model(client, name)
        version = _newest_if_same(client, name, served.tags())
        if version is None:
            logged = _log(client, served, name, run_id, experiment_id(client, server, experiment))
            made = client.create_model_version(
                name,
                logged.artifact_location,
                run_id,
                {**served.tags(), "code_version": code_version(), **tags},
                # Given a model and no run, MLflow's database code looks the run up at the process's global address.
                model_id=logged.model_id if run_id is not None or server.artifact_root is None else None,
            )
            version = str(made.version)
        client.set_registered_model_alias(name, CANDIDATE, version)
    return RegisteredVersion(name, version, served.model.sha256)


def _make_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _newest_if_same(client: MlflowClient, name: str, tags: Mapping[str, str]) -> str | None:
    newest = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    if newest and tags.items() <= newest[0].tags.items():
        return str(newest[0].version)
    return None


def _log(client: MlflowClient, served: ServedModel, name: str, run_id: str | None, experiment: str) -> LoggedModel:
    """Upload a model, as one that the run made."""
    if run_id is not None:
        experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name, source_run_id=run_id, model_type=served.model.kind)
    flavoured = Model(
        artifact_path=logged.artifact_location, run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id
    )
    with tempfile.TemporaryDirectory() as folder:
        served.save(Path(folder) / "model", flavoured)
        client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
    client.finalize_logged_model(logged.model_id, "READY")
    if run_id is not None:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged


# --- evaluation moves the champion -----------------------------------------------------------------------------------


def promote_if_better(
    name: str,
    version: str,
    metrics: Mapping[str, float | None],
    dataset_digest: str,
    *,
    server: TrackingServer,
    metric: str = "segm/AP50",
) -> Decision:
    """Record an evaluation of a version, and make the version champion if it is better than the champion.

    Better is: a higher `metric` on the same data. The first version that is evaluated becomes champion.

    Args:
        name: Of the registered model.
        version: That was evaluated.
        metrics: Its numbers; None where undefined.
        dataset_digest: Of the data set that it was evaluated on.
        server: Whose registry.
        metric: Which of the numbers decides.

    Raises:
        UsageError: There is no such version, or `metrics` lacks `metric`.
        JobError: The registry does not answer.
    """
    if metric not in metrics:
        raise UsageError(f"{metric}: not among the metrics of this evaluation: {', '.join(sorted(metrics))}")
    with _talking_to(server, f"the evaluation of {name} {version} was not recorded") as client:
        _find_version(client, name, version)
        recorded = {_METRIC_TAG + key: repr(float(value)) for key, value in metrics.items() if value is not None}
        for key, text in {_DATASET_TAG: dataset_digest, **recorded}.items():
            client.set_model_version_tag(name, version, key, text)
        champion = _champion(client, name)
        decision = _decide(version, metrics[metric], dataset_digest, champion, metric)
        if decision.promoted:
            client.set_registered_model_alias(name, CHAMPION, version)
    return decision


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    aliases = client.get_registered_model(name).aliases
    return client.get_model_version(name, str(aliases[CHAMPION])) if CHAMPION in aliases else None


def _decide(
    version: str, value: float | None, dataset_digest: str, champion: ModelVersion | None, metric: str
) -> Decision:
    now_at = None if champion is None else str(champion.version)
    if value is None or math.isnan(value):
        return Decision(False, now_at, f"{metric} of version {version} is undefined")
    if champion is None:
        return Decision(True, version, f"version {version} is the first with an evaluation: {metric} {value:.4f}")
    if now_at == version:
        return Decision(False, now_at, f"version {version} is the champion already")
    before = champion.tags.get(_METRIC_TAG + metric)
    if before is None or _DATASET_TAG not in champion.tags:
        return Decision(
            False, now_at, f"the champion, version {now_at}, has no evaluation with {metric}: evaluate it first"
        )
    if champion.tags[_DATASET_TAG] != dataset_digest:
        return Decision(
            False,
            now_at,
            f"the champion, version {now_at}, was evaluated on other data (digest "
            f"{champion.tags[_DATASET_TAG][:12]}, now {dataset_digest[:12]}): evaluate both on the same",
        )
    comparison = f"{metric} {value:.4f} of version {version} against {float(before):.4f} of version {now_at}"
    if value > float(before):
        return Decision(True, version, f"better: {comparison}")
    return Decision(False, now_at, f"not better: {comparison}")


# --- weights by reference --------------------------------------------------------------------------------------------


def resolve_weights(reference: str, cache_dir: Path, *, server: TrackingServer | None = None) -> ResolvedWeights:
    """Get weights onto this machine's disk.

    Args:
        reference: A path, an fsspec URL, an `http(s)://` address, the name of published weights
            (`freesolo.models.weights.PUBLISHED`), `models:/name@alias` or `models:/name/3`.
        cache_dir: Where to put what is not on this machine yet; made if need be.
        server: Whose registry `models:/` means; None: there is none.

    Raises:
        UsageError: There is no such file, model, alias or version; lists those that there are.
        JobError: The store or the registry does not answer.
    """
    if reference.startswith("models:"):
        return _from_registry(reference, cache_dir, server)
    if reference in PUBLISHED or urlsplit(reference).scheme in ("http", "https"):
        path = pull(reference, cache_dir)
        return ResolvedWeights(path, sha256_of_file(path))
    if is_local(reference):
        path = Path(urlsplit(reference).path if "://" in reference else reference)
        if not path.is_file():
            raise UsageError(f"{reference}: no such weights file; published ones are {', '.join(PUBLISHED)}")
        return ResolvedWeights(path, sha256_of_file(path))
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        fetched = Path(folder) / PurePosixPath(urlsplit(reference).path).name
        with open_stream(reference) as source, fetched.open("wb") as target:
            shutil.copyfileobj(source, target)
        return _keep(fetched, cache_dir)


def _from_registry(reference: str, cache_dir: Path, server: TrackingServer | None) -> ResolvedWeights:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError(f"{reference}: write models:/name@alias or models:/name/3")
    if server is None:
        raise UsageError(f"{reference}: there is no registry with tracking.uri=off; give a file, or set tracking.uri")
    name = match["name"]
    with _talking_to(server, f"{reference} was not found") as client:
        version = match["version"] or _version_of_alias(client, name, match["alias"])
        sha256 = _find_version(client, name, version).tags.get(SHA256_TAG)
        if sha256 is None:
            raise UsageError(f"{reference}: not a model of freesolo: version {version} holds no {MODEL_NAME}")
        cached = cache_dir / f"{sha256}.pt"
        if not (cached.is_file() and sha256_of_file(cached) == sha256):
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
                # Not `models:/...`, which MLflow looks up at the process's global address.
                location = client.get_model_version_download_uri(name, version)
                fetched = mlflow.artifacts.download_artifacts(
                    f"{location}/artifacts/{MODEL_NAME}", dst_path=folder, tracking_uri=server.uri
                )
                found = _keep(Path(fetched), cache_dir).sha256
            if found != sha256:
                raise JobError(f"{reference}: its file has sha256 {found}, {sha256} was registered: register it again")
    return ResolvedWeights(cached, sha256, name, version)


def _keep(fetched: Path, cache_dir: Path) -> ResolvedWeights:
    """Move a file into the cache under its checksum; several processes may do so at once."""
    sha256 = sha256_of_file(fetched)
    path = cache_dir / f"{sha256}.pt"
    fetched.replace(path)
    return ResolvedWeights(path, sha256)


def _version_of_alias(client: MlflowClient, name: str, alias: str) -> str:
    aliases = _find_model(client, name).aliases
    if alias not in aliases:
        there_are = ", ".join(f"@{known}" for known in sorted(aliases)) or "none"
        raise UsageError(f"models:/{name}@{alias}: {name} has no such alias; there are: {there_are}")
    return str(aliases[alias])


def _find_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    _find_model(client, name)
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    found = client.search_model_versions(f"name = '{name}'", order_by=["version_number ASC"])
    there_are = ", ".join(str(one.version) for one in found) or "none"
    raise UsageError(f"models:/{name}/{version}: no such version; there are: {there_are}")


def _find_model(client: MlflowClient, name: str) -> RegisteredModel:
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    names = sorted(model.name for model in client.search_registered_models())
    raise UsageError(f"models:/{name}: no such model is registered; there are: {', '.join(names) or 'none'}")


@contextmanager
def _talking_to(server: TrackingServer, failure: str) -> Iterator[MlflowClient]:
    """A client of the registry; what it raises is put in words, with what did not happen."""
    with request_limits(seconds=60, retries=2):
        try:
            yield MlflowClient(server.uri, server.uri)
        except MlflowException as error:
            if is_refusal(error):
                raise UsageError(f"{failure}: {explain(server.uri, error)}") from error
            raise JobError(f"{failure}: {explain(server.uri, error)}; run the same again") from error
