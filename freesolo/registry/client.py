"""Asking the registry: what is there, and what to say where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from freesolo.errors import JobError, UsageError
from freesolo.tracking.mlflow_run import is_refusal
from freesolo.tracking.server import TrackingServer, explain, request_limits


@contextmanager
def talking_to(server: TrackingServer, failure: str) -> Iterator[MlflowClient]:
    """A client of the registry; what it raises is put in words, with what did not happen."""
    with request_limits(seconds=60, retries=2):
        try:
            yield MlflowClient(server.uri, server.uri)
        except MlflowException as error:
            if is_refusal(error):
                raise UsageError(f"{failure}: {explain(server.uri, error)}") from error
            raise JobError(f"{failure}: {explain(server.uri, error)}; run the same again") from error


def version_of_alias(client: MlflowClient, name: str, alias: str) -> str:
    aliases = find_model(client, name).aliases
    if alias not in aliases:
        there_are = ", ".join(f"@{known}" for known in sorted(aliases)) or "none"
        raise UsageError(f"models:/{name}@{alias}: {name} has no such alias; there are: {there_are}")
    return str(aliases[alias])


def find_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    find_model(client, name)
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    found = client.search_model_versions(f"name = '{name}'", order_by=["version_number ASC"])
    there_are = ", ".join(str(one.version) for one in found) or "none"
    raise UsageError(f"models:/{name}/{version}: no such version; there are: {there_are}")


def find_model(client: MlflowClient, name: str) -> RegisteredModel:
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    names = sorted(model.name for model in client.search_registered_models())
    raise UsageError(f"models:/{name}: no such model is registered; there are: {', '.join(names) or 'none'}")
