"""Evaluations move the alias `champion`, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from freesolo.errors import UsageError
from freesolo.registry.client import find_version, talking_to
from freesolo.tracking.server import TrackingServer

CHAMPION = "champion"

_DATASET_TAG = "evaluation.dataset_digest"
_METRIC_TAG = "evaluation."


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
    with talking_to(server, f"the evaluation of {name} {version} was not recorded") as client:
        find_version(client, name, version)
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
