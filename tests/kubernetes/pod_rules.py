"""Rules for pods: what the namespace's security standard wants, and what Ray and a shared cluster need."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tests.kubernetes.manifests import Build
from tests.kubernetes.pods import Container, Pod, pods_of
from tests.kubernetes.problem import Problem

# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
RESTRICTED_VOLUMES |= {"secret"}
HOST_NAMESPACES = ("hostNetwork", "hostPID", "hostIPC")
API_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_FACTORS = {"m": 1e-3, "": 1, **{unit: 1000 ** (at + 1) for at, unit in enumerate("kMGTP")}}
_FACTORS |= {f"{unit}i": 1024 ** (at + 1) for at, unit in enumerate("KMGTP")}


def quantity(value: object) -> float | None:
    """A Kubernetes quantity as a number; None where it is none."""
    found = _QUANTITY.fullmatch(str(value))
    return float(found[1]) * _FACTORS[found[2] or ""] if found else None


def _pods(build: Build) -> Iterator[Pod]:
    for one in build.objects:
        yield from pods_of(one)


def _containers(build: Build) -> Iterator[tuple[str, Pod, Container]]:
    for pod in _pods(build):
        for container in pod.containers:
            yield f"{pod.where}, {container.where}", pod, container


def restricted(build: Build) -> Iterator[Problem]:
    """Pods that a namespace with the restricted standard would refuse."""
    for pod in _pods(build):
        for field in HOST_NAMESPACES:
            if pod.spec.get(field):
                yield Problem(pod.where, f"{field} is not allowed by the restricted standard; remove it")
        for volume in pod.spec.get("volumes", ()):
            kinds = set(volume) - {"name"}
            if not kinds <= RESTRICTED_VOLUMES:
                yield Problem(
                    pod.where,
                    f"volume {volume['name']} is a {', '.join(kinds)}, which the restricted standard does not allow; "
                    "take an emptyDir or a claim",
                )
    for where, pod, container in _containers(build):
        for wrong in _not_restricted(pod.spec.get("securityContext", {}), container.spec):
            yield Problem(where, f"{wrong}, the restricted standard wants it (securityContext)")


def _not_restricted(pod: Mapping[str, Any], container: Mapping[str, Any]) -> Iterator[str]:
    own = container.get("securityContext", {})
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "set runAsNonRoot: true"
    if own.get("runAsUser", pod.get("runAsUser", 1)) == 0:
        yield "set runAsUser to another than 0"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "set allowPrivilegeEscalation: false"
    if own.get("privileged"):
        yield "remove privileged"
    if own.get("capabilities", {}).get("drop") != ["ALL"] or set(own["capabilities"].get("add", ())):
        yield "set capabilities: {drop: [ALL]} and add none"
    if own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "set seccompProfile: {type: RuntimeDefault}"
    if any("hostPort" in port for port in container.get("ports", ())):
        yield "remove hostPort"


def read_only_root(build: Build) -> Iterator[Problem]:
    """Containers whose file system can be written to, and those that then have no /tmp."""
    for where, _, container in _containers(build):
        if container.spec.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield Problem(where, "set securityContext.readOnlyRootFilesystem: true, and mount emptyDirs to write to")
        paths = {mount["mountPath"] for mount in container.spec.get("volumeMounts", ())}
        if "/tmp" not in paths and "freesolo" in container.spec.get("image", ""):
            yield Problem(where, "has nowhere to write: mount an emptyDir at /tmp")


def api_tokens(build: Build) -> Iterator[Problem]:
    """Tokens of the Kubernetes API where no one needs one."""
    for one in build.of_kind("ServiceAccount"):
        if one.get("automountServiceAccountToken") is not False:
            yield Problem(f"ServiceAccount/{one['metadata']['name']}", "set automountServiceAccountToken: false")
    for pod in _pods(build):
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield Problem(pod.where, "set automountServiceAccountToken: false; who needs a token mounts one by name")
        if "serviceAccountName" not in pod.spec:
            yield Problem(pod.where, "set serviceAccountName: the default account would be shared with everything")
    for where, _, container in _containers(build):
        mounts = [mount for mount in container.spec.get("volumeMounts", ()) if mount["mountPath"] == API_TOKEN]
        if mounts and container.spec["name"] != "autoscaler":
            yield Problem(where, f"has a token of the Kubernetes API; only the autoscaler needs {API_TOKEN}")


def resources(build: Build) -> Iterator[Problem]:
    """Containers that ask for nothing, have no bound, or ask for more than their bound."""
    for where, pod, container in _containers(build):
        asked = container.spec.get("resources", {})
        requests, limits = asked.get("requests", {}), asked.get("limits", {})
        for name, value in [*requests.items(), *limits.items()]:
            if quantity(value) is None:
                yield Problem(where, f"resources: {name}: {value} is no quantity; write it like 500m or 2Gi")
        for section, values, names in (("requests", requests, ("cpu", "memory")), ("limits", limits, ("memory",))):
            for name in names:
                if name not in values:
                    yield Problem(where, f"has no resources.{section}.{name}; set one")
        if pod.ray == "worker" and "cpu" not in limits:
            yield Problem(where, "has no resources.limits.cpu, which is Ray's number of CPUs; set one")
        for name in requests.keys() & limits.keys():
            if (quantity(requests[name]) or 0) > (quantity(limits[name]) or 0):
                yield Problem(where, f"requests more {name} ({requests[name]}) than its limit ({limits[name]})")


def volumes(build: Build) -> Iterator[Problem]:
    """Mounts of volumes that are not there, unbounded emptyDirs, and Ray pods without shared memory of their size."""
    claims = {
        f"{one['kind']}/{one['metadata']['name']}": [c["metadata"]["name"] for c in one["spec"]["volumeClaimTemplates"]]
        for one in build.of_kind("StatefulSet")
        if "volumeClaimTemplates" in one["spec"]
    }
    for where, pod, container in _containers(build):
        known = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
        for mount in container.spec.get("volumeMounts", ()):
            if mount["name"] not in known and mount["name"] not in claims.get(pod.where, ()):
                yield Problem(where, f"mounts the volume {mount['name']}, which the pod does not have; add it")
        if container.serves and pod.ray in ("head", "worker"):
            yield from _shared_memory(where, container.spec, known)
    for pod in _pods(build):
        for volume in pod.spec.get("volumes", ()):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield Problem(pod.where, f"emptyDir {volume['name']} could fill the node's disk; set its sizeLimit")


def _shared_memory(where: str, container: Mapping[str, Any], volumes: Mapping[str, Any]) -> Iterator[Problem]:
    mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container.get("volumeMounts", ())}
    shared = mounts.get("/dev/shm", {}).get("emptyDir", {})
    if shared.get("medium") != "Memory":
        yield Problem(where, "has no memory at /dev/shm for Ray's object store; mount an emptyDir with medium: Memory")
        return
    size = quantity(shared.get("sizeLimit", ""))
    limit = quantity(container.get("resources", {}).get("limits", {}).get("memory", ""))
    if size is not None and limit is not None and not 0.3 * limit <= size <= 0.6 * limit:
        yield Problem(
            where,
            f"/dev/shm of {shared['sizeLimit']} does not go with a memory limit of "
            f"{container['resources']['limits']['memory']}: Ray takes 30% of the limit for its store, and what is in "
            "it counts as the pod's memory; take 30 to 60%",
        )


def probes(build: Build) -> Iterator[Problem]:
    """Containers that serve and that nobody asks how they are."""
    for where, _, container in _containers(build):
        if container.serves:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe not in container.spec:
                    yield Problem(where, f"has no {probe}; add one")


def grace(build: Build) -> Iterator[Problem]:
    """Ray pods that would be killed while they drain."""
    for where, pod, container in _containers(build):
        if not (container.serves and pod.ray in ("head", "worker")):
            continue
        drain = {one["name"]: one.get("value") for one in container.spec.get("env", ())}.get(DRAIN)
        given = pod.spec.get("terminationGracePeriodSeconds", 30)
        if drain is None or float(drain) >= given:
            yield Problem(
                where,
                f"{DRAIN} is {drain or 'not set (30)'}, terminationGracePeriodSeconds {given}: the pod would be killed "
                "while it drains; set the first, and the second longer",
            )


def priorities(build: Build) -> Iterator[Problem]:
    """Pods that would be the first to go, by accident."""
    for pod in _pods(build):
        if "priorityClassName" not in pod.spec:
            yield Problem(pod.where, "has no priorityClassName; set one of k8s/base/priority-classes.yaml")
