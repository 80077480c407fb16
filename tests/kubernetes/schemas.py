"""Each object against its kind's schema: unknown fields and wrong types are refused, as `kubectl apply` would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.kubernetes.manifests import Object
from tests.kubernetes.pods import ray_cluster_spec

CRDS = Path(__file__).parent / "crds"
# Of KubeRay v1.7.0, ray-operator/config/crd/bases (crds/README.md).
SHA256 = {
    "ray.io_rayclusters.yaml": "c44704442eef0c6721ad40c1d66782c8bd3fdab9d3344306a5820910a679baa1",
    "ray.io_rayjobs.yaml": "01a5cf3b17c1769fda44af7e82debcd98722f0c27b9ab84d084681c6649121f5",
}
KUBERNETES = ("1.33", "1.36")  # the oldest release that k8s/README.md names, and the newest that was tried


def schema_errors(one: Object) -> Iterator[str]:
    """What is wrong with an object by its kind's schema; nothing if it is right."""
    known = _custom_kinds().get((one.get("apiVersion", ""), one.get("kind", "")))
    if known is None:
        yield from _core_errors(one)
        return
    for error in known.iter_errors(one):
        yield f"{_path(error)}: {error.message[:200]}"
    cluster = ray_cluster_spec(one) if one["kind"].startswith("Ray") and isinstance(one.get("spec"), dict) else None
    for template in _pod_templates(cluster or {}):
        # KubeRay's schema of a pod is of the Kubernetes that it was made with; the cluster's own has the last word.
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        yield from _core_errors(pod)


def _pod_templates(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", ())):
        if "template" in group:
            yield group["template"]


def _core_errors(one: Object) -> tuple[str, ...]:
    return _core_errors_of_text(json.dumps(one, sort_keys=True))


@cache  # the same pods are in many builds
def _core_errors_of_text(text: str) -> tuple[str, ...]:
    one = json.loads(text)
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(one, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            return (
                f"{one.get('apiVersion')} {one.get('kind')}: no such kind in Kubernetes {version}; correct it, or add "
                "its definition to tests/kubernetes/crds",
            )
        except kubernetes_validate.ValidationError as error:
            return (f"{_path(error)}: {error.message[:200]} (Kubernetes {version})",)
    return ()


def _path(error: Any) -> str:
    return ".".join(str(part) for part in error.absolute_path) or "object"


@cache
def _custom_kinds() -> dict[tuple[str, str], jsonschema.Draft7Validator]:
    kinds = {}
    for file in sorted(CRDS.glob("*.yaml")):
        data = file.read_bytes()
        expected = SHA256.get(file.name)
        if expected is not None and hashlib.sha256(data).hexdigest() != expected:
            raise RuntimeError(f"{file}: not KubeRay v1.7.0's file; take it from the address in {CRDS}/README.md")
        for crd in yaml.load_all(data, Loader=yaml.CSafeLoader):
            for version in crd["spec"]["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}  # the API server knows it, the definition doesn't
                key = (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])
                kinds[key] = jsonschema.Draft7Validator(schema)
    return kinds


def _strict(schema: Any) -> Any:
    """An OpenAPI v3 schema of a definition as a JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string") is True:
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    properties = made.get("properties")
    if made.get("type") == "object" and isinstance(properties, dict):
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
        # The API server fills in defaults before it looks for what is required.
        if isinstance(made.get("required"), list):
            made["required"] = [key for key in made["required"] if "default" not in properties.get(key, {})]
    if made.get("nullable") is True and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    if isinstance(made.get("format"), str):
        del made["format"]  # int32 and friends, which JSON schema doesn't know
    return made
