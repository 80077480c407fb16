"""Rules for what points at something else: names, selectors, ports, images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.kubernetes.manifests import ROOT, Build, Object, name_of
from tests.kubernetes.pods import Pod, pods_of
from tests.kubernetes.problem import Problem

NAMESPACE = "freesolo"
CLUSTER_WIDE = ("Namespace", "PriorityClass")
MADE_BY_KUBERNETES = {("ConfigMap", "kube-root-ca.crt"): {"ca.crt"}}
SECRET_WORDS = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|API_KEY|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE)
SECRET_VALUES = re.compile(r"://[^/\s:@]+:[^/\s@$]+@|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----")


def documented_secrets(readme: Path = ROOT / "k8s" / "README.md") -> dict[str, set[str]]:
    """The Secrets that k8s/README.md tells people to create, and their keys: rows of its table of Secrets."""
    section = readme.read_text(encoding="utf-8").partition("## Secrets")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]+) \|", section, re.MULTILINE)
    return {name: set(re.findall(r"`([A-Za-z0-9_.-]+)`", keys)) for name, keys in rows}


def references(build: Build) -> Iterator[Problem]:
    """ConfigMaps, Secrets, accounts, claims and priorities that are used and not there."""
    there: dict[tuple[str, str], set[str] | None] = {**MADE_BY_KUBERNETES}
    there |= {("Secret", name): keys for name, keys in documented_secrets().items()}
    for one in build.present:
        keys = set(one.get("data", ())) if one["kind"] == "ConfigMap" else None
        there[one["kind"], one["metadata"]["name"]] = keys
    for one in build.objects:
        for kind, name, key in _references(one):
            keys = there.get((kind, name), set())
            if (kind, name) not in there:
                fix = "document it in k8s/README.md, Secrets" if kind == "Secret" else "add it, or correct the name"
                yield Problem(name_of(one), f"refers to the {kind} {name}, which does not exist; {fix}")
            elif key is not None and keys is not None and key not in keys:
                yield Problem(name_of(one), f"refers to the key {key} of the {kind} {name}, which has no such key")


def _references(one: Object) -> Iterator[tuple[str, str, str | None]]:
    """Kind, name and key, wherever in an object a pod's or KubeRay's fields refer to another."""
    for node in _nodes(one.get("spec", {})):
        for field, kind in _NAMED_BY_A_WORD:
            if isinstance(node.get(field), str):
                yield kind, node[field], None
        for field, kind, name in _NAMED_IN_A_MAPPING:
            reference = node.get(field)
            if isinstance(reference, dict) and name in reference:
                keys = [item["key"] for item in reference.get("items", ())] or [reference.get("key")]
                yield from ((kind, reference[name], key) for key in keys)
        for secret in node.get("imagePullSecrets", ()):
            yield "Secret", secret["name"], None


_NAMED_BY_A_WORD = (("serviceAccountName", "ServiceAccount"), ("priorityClassName", "PriorityClass"))
_NAMED_IN_A_MAPPING = (
    ("configMapRef", "ConfigMap", "name"),
    ("configMapKeyRef", "ConfigMap", "name"),
    ("configMap", "ConfigMap", "name"),  # volumes
    ("secretRef", "Secret", "name"),
    ("secretKeyRef", "Secret", "name"),
    ("secret", "Secret", "secretName"),
    ("secret", "Secret", "name"),  # of a projected volume
    ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
)


def _nodes(value: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings in a document."""
    if isinstance(value, dict):
        yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _nodes(child)


def namespaces(build: Build) -> Iterator[Problem]:
    """Objects that would end up somewhere else, and a namespace that lets every pod in."""
    for one in build.objects:
        if one["kind"] not in CLUSTER_WIDE and one["metadata"].get("namespace") != NAMESPACE:
            yield Problem(name_of(one), f"is not in the namespace {NAMESPACE}; set `namespace` in its kustomization")
    if build.is_job:
        return
    for one in build.of_kind("Namespace"):
        if one["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield Problem(name_of(one), "must have the label pod-security.kubernetes.io/enforce: restricted")
    if not any(_denies_all(one) for one in build.of_kind("NetworkPolicy")):
        yield Problem(build.path, "no NetworkPolicy denies by default: one with an empty podSelector and both types")


def _denies_all(policy: Object) -> bool:
    spec = policy["spec"]
    rules = spec.get("ingress") or spec.get("egress")
    return spec["podSelector"] == {} and set(spec.get("policyTypes", ())) == {"Ingress", "Egress"} and not rules


def selectors(build: Build) -> Iterator[Problem]:
    """Selectors that no pod has the labels for, and ports by names that the selected pods don't have."""
    pods = [pod for one in build.present for pod in pods_of(one)]
    pods += _submitters(build)
    for one in build.of_kind("Deployment", "StatefulSet"):
        if not _matches(one["spec"]["selector"], one["spec"]["template"]["metadata"].get("labels", {})):
            yield Problem(name_of(one), "selector does not match the labels of its own template; make them the same")
    for one in build.objects:
        for place, selector, names in _selectors(one):
            selected = [pod for pod in pods if _matches(selector, pod.labels)]
            if not selected:
                yield Problem(name_of(one), f"{place}: no pod has the labels of {_words(selector)}; correct them")
            elif names:
                known = set().union(*(pod.ports() for pod in selected))
                for name in sorted(names - known):
                    yield Problem(
                        name_of(one),
                        f"{place}: no container of {selected[0].where} has a port named {name}; it has "
                        f"{', '.join(sorted(known)) or 'none with a name'}",
                    )


def _submitters(build: Build) -> list[Pod]:
    """Pods of jobs, which are not there yet when a platform is applied."""
    return [] if build.is_job else [Pod("a job's submitter", {"freesolo.dev/role": "submitter"}, {}, ())]


def _selectors(one: Object) -> Iterator[tuple[str, Mapping[str, Any], set[str]]]:
    """Place, label selector and names of ports that the selected pods must have."""
    spec, kind = one.get("spec", {}), one["kind"]
    if kind == "Service":
        yield "selector", {"matchLabels": spec["selector"]}, _names(port.get("targetPort") for port in spec["ports"])
    if kind == "PodDisruptionBudget":
        yield "selector", spec["selector"], set()
    if kind in ("ServiceMonitor", "PodMonitor"):
        endpoints = spec.get("endpoints", spec.get("podMetricsEndpoints", ()))
        yield "selector", spec["selector"], _names(endpoint["port"] for endpoint in endpoints)
    if kind == "NetworkPolicy":
        yield from _policy_selectors(spec)
    for node in _nodes(spec):
        for spread in node.get("topologySpreadConstraints", ()):
            yield "topologySpreadConstraints", spread.get("labelSelector", {}), set()
        if "podAffinityTerm" in node:
            yield "podAffinity", node["podAffinityTerm"].get("labelSelector", {}), set()


def _policy_selectors(spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], set[str]]]:
    inward = set()
    for rule in spec.get("ingress") or ():
        inward |= _names(port.get("port") for port in rule.get("ports", ()))
    yield "podSelector", spec["podSelector"], inward
    for direction, field in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction) or ():
            outward = _names(port.get("port") for port in rule.get("ports", ())) if direction == "egress" else set()
            for peer in rule.get(field, ()):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    yield f"{direction}.{field}", peer["podSelector"], outward


def _names(ports: Any) -> set[str]:
    return {port for port in ports if isinstance(port, str)}


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", ())
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        _holds(expression, labels) for expression in expressions
    )


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, operator, values = expression["key"], expression["operator"], expression.get("values", ())
    if operator in ("In", "NotIn"):
        return (labels.get(key) in values) == (operator == "In")
    return (key in labels) == (operator == "Exists")


def _words(selector: Mapping[str, Any]) -> str:
    labels = [f"{key}={value}" for key, value in selector.get("matchLabels", {}).items()]
    labels += [
        f"{one['key']} {one['operator']} {one.get('values', '')}" for one in selector.get("matchExpressions", ())
    ]
    return ", ".join(labels)


def images(build: Build) -> Iterator[Problem]:
    """Images that can change under their name: no tag, `latest`, and in prod anything but a digest."""
    for one in build.objects:
        for pod in pods_of(one):
            for container in pod.containers:
                image, where = container.spec.get("image", ""), f"{pod.where}, {container.where}"
                name, _, digest = image.partition("@")
                tag = name.rpartition("/")[2].partition(":")[2]
                if digest and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
                    yield Problem(where, f"image {image}: the digest is not sha256: and 64 digits")
                elif not digest and tag in ("", "latest"):
                    yield Problem(where, f"image {image}: name a version; what `latest` is changes")
                elif not digest and build.overlay == "prod":
                    yield Problem(where, f"image {image}: name it by digest in k8s/overlays/prod/images")


def inline_secrets(build: Build) -> Iterator[Problem]:
    """Secrets in manifests, where everyone who may read the repository reads them."""
    for one in build.objects:
        if one["kind"] == "Secret":
            yield Problem(name_of(one), "is a Secret in a manifest; people create it (k8s/README.md, Secrets)")
            continue
        for node in _nodes(one):
            if SECRET_WORDS.search(str(node.get("name", ""))) and node.get("value"):
                yield Problem(
                    name_of(one), f"{node['name']} has its value in the manifest; take valueFrom.secretKeyRef"
                )
            for key, value in node.items():
                if one["kind"] == "ConfigMap" and SECRET_WORDS.search(key):
                    yield Problem(name_of(one), f"{key} looks like a secret; it belongs into a Secret")
                if isinstance(value, str) and SECRET_VALUES.search(value):
                    yield Problem(name_of(one), f"{key} has a password or key in it; take it from a Secret")
