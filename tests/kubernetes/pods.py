"""The pods that objects lead to, with what KubeRay adds to them (v1.7, controllers/ray/common/pod.go)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.kubernetes.manifests import Object, name_of


@dataclass(frozen=True)
class Container:
    """A container and where it is in its object."""

    where: str
    spec: Mapping[str, Any]
    serves: bool  # it runs until it is stopped, so that probes make sense


@dataclass(frozen=True)
class Pod:
    """A pod that an object leads to.

    Attributes:
        where: Object and group, for people.
        labels: That it has when it runs.
        spec: Of the pod, as it is in the object.
        containers: Its own, and those that KubeRay adds.
        ray: `head`, `worker`, `redis-cleanup` or, for pods that are none of Ray's, empty.
    """

    where: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]
    containers: tuple[Container, ...]
    ray: str = ""

    def ports(self) -> set[str]:
        """Names of its containers' ports."""
        return {port["name"] for one in self.containers for port in one.spec.get("ports", ()) if "name" in port}


def ray_cluster_spec(one: Object) -> Mapping[str, Any] | None:
    """The spec of an object's Ray cluster, if it has one."""
    if one["kind"] == "RayCluster":
        return one["spec"]
    return one["spec"].get("rayClusterSpec") if one["kind"] == "RayJob" else None


def pods_of(one: Object) -> Iterator[Pod]:
    """The pods that an object leads to; none for most kinds."""
    if one["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
        template = one["spec"]["template"]
        yield _pod(name_of(one), template, serves=one["kind"] != "Job")
    if one["kind"] == "RayJob" and "submitterPodTemplate" in one["spec"]:
        yield _pod(f"{name_of(one)} submitter", one["spec"]["submitterPodTemplate"], serves=False)
    cluster = ray_cluster_spec(one)
    if cluster is not None:
        yield from _ray_pods(one, cluster)


def _pod(where: str, template: Mapping[str, Any], *, serves: bool) -> Pod:
    return Pod(
        where, template.get("metadata", {}).get("labels", {}), template["spec"], tuple(_containers(template, serves))
    )


def _containers(template: Mapping[str, Any], serves: bool) -> Iterator[Container]:
    for one in template["spec"].get("initContainers", ()):
        yield Container(f"init container {one['name']}", one, serves=False)
    for one in template["spec"]["containers"]:
        yield Container(f"container {one['name']}", one, serves)


def _ray_pods(one: Object, cluster: Mapping[str, Any]) -> Iterator[Pod]:
    # A RayJob's cluster has a name that ends at random.
    name = one["metadata"]["name"] if one["kind"] == "RayCluster" else f"{one['metadata']['name']}-xxxxx"
    head = cluster["headGroupSpec"]
    added = [_autoscaler(head, cluster)] if cluster.get("enableInTreeAutoscaling") else []
    yield _ray_pod(f"{name_of(one)} head", name, "head", "headgroup", head, added)
    if "gcsFaultToleranceOptions" in cluster:
        yield _ray_pod(f"{name_of(one)} redis-cleanup", name, "redis-cleanup", "headgroup", head, [])
    for group in cluster.get("workerGroupSpecs", ()):
        where = f"{name_of(one)} group {group['groupName']}"
        yield _ray_pod(where, name, "worker", group["groupName"], group, [])


def _ray_pod(
    where: str, cluster: str, node_type: str, group: str, spec: Mapping[str, Any], added: list[Container]
) -> Pod:
    template = spec["template"]
    labels = {
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": cluster,
        "ray.io/node-type": node_type,
        "ray.io/group": group,
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    own = template.get("metadata", {}).get("labels", {})
    containers = [*_containers(template, serves=node_type != "redis-cleanup"), *added]
    return Pod(where, {**own, **labels}, template["spec"], tuple(containers), node_type)


def _autoscaler(head: Mapping[str, Any], cluster: Mapping[str, Any]) -> Container:
    """KubeRay makes this container; only what autoscalerOptions has can be set in it."""
    options = cluster.get("autoscalerOptions", {})
    limits = {"cpu": "500m", "memory": "512Mi"}
    spec = {
        "name": "autoscaler",
        "image": options.get("image", head["template"]["spec"]["containers"][0]["image"]),
        "resources": options.get("resources", {"requests": limits, "limits": limits}),
        "securityContext": options.get("securityContext", {}),
        "volumeMounts": options.get("volumeMounts", []),
        "env": options.get("env", []),
        "envFrom": options.get("envFrom", []),
    }
    return Container("autoscalerOptions", spec, serves=False)
