"""What KubeRay's definitions and its operator (v1.7, utils/validation.go) refuse, which no schema says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tests.kubernetes.manifests import Build, Object, name_of
from tests.kubernetes.pods import ray_cluster_spec
from tests.kubernetes.problem import Problem

LONGEST_NAME = {"RayCluster": 63, "RayJob": 47}
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
# Set by the operator; a pod that sets them itself gets another cluster's address or password.
OPERATORS_OWN = ("RAY_ADDRESS", "RAY_IP", "FQ_RAY_IP", "RAY_AUTH_TOKEN", "RAY_REDIS_ADDRESS", "REDIS_PASSWORD")
OPERATORS_OWN += ("RAY_enable_autoscaler_v2",)


def ray_objects(build: Build) -> Iterator[Problem]:
    """RayClusters and RayJobs that the API server or the operator would refuse."""
    for one in build.of_kind("RayCluster", "RayJob"):
        where = name_of(one)
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", one["metadata"]["name"]):
            yield Problem(where, "its name must begin with a letter and have only a-z, 0-9 and -")
        if len(one["metadata"]["name"]) > LONGEST_NAME[one["kind"]]:
            yield Problem(where, f"its name has more than {LONGEST_NAME[one['kind']]} characters; shorten it")
        if one["spec"].get("managedBy", MANAGERS[0]) not in MANAGERS:
            yield Problem(where, f"managedBy must be one of {', '.join(MANAGERS)}")
        if one["kind"] == "RayJob":
            yield from _job(where, one["spec"])
        cluster = ray_cluster_spec(one)
        if cluster is not None:
            yield from _cluster(where, cluster)
            yield from _groups(where, cluster)
            yield from _fault_tolerance(where, cluster)


def _job(where: str, job: Mapping[str, Any]) -> Iterator[Problem]:
    if bool(job.get("rayClusterSpec")) == bool(job.get("clusterSelector")):
        yield Problem(where, "must have either rayClusterSpec or clusterSelector")
    if job.get("suspend") and not job.get("shutdownAfterJobFinishes"):
        yield Problem(where, "suspend needs shutdownAfterJobFinishes: true")
    if job.get("ttlSecondsAfterFinished", 0) and not job.get("shutdownAfterJobFinishes"):
        yield Problem(where, "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true")
    for field in ("ttlSecondsAfterFinished", "backoffLimit"):
        if job.get(field, 0) < 0:
            yield Problem(where, f"{field} must not be negative")
    yield from _submission(where, job)
    strategy = job.get("deletionStrategy")
    if strategy is not None:
        yield from _deletion(where, strategy)


def _submission(where: str, job: Mapping[str, Any]) -> Iterator[Problem]:
    mode = job.get("submissionMode", "K8sJobMode")
    if mode not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
        yield Problem(where, f"there is no submissionMode {mode}; take K8sJobMode")
    if mode == "K8sJobMode" and "submitterPodTemplate" not in job:
        yield Problem(where, "has no submitterPodTemplate; the operator's own is refused by the restricted standard")
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(job):
        yield Problem(where, "SidecarMode takes no submitterPodTemplate, submitterConfig or clusterSelector")
    if mode == "InteractiveMode" and job.get("backoffLimit", 0):
        yield Problem(where, "InteractiveMode takes no backoffLimit")


def _deletion(where: str, strategy: Mapping[str, Any]) -> Iterator[Problem]:
    old, rules = {"onSuccess", "onFailure"} & set(strategy), "deletionRules" in strategy
    if (old and rules) or not (rules or len(old) == 2):
        yield Problem(where, "deletionStrategy must have either deletionRules, or both onSuccess and onFailure")
    for rule in strategy.get("deletionRules", ()):
        if len({"jobStatus", "jobDeploymentStatus"} & set(rule.get("condition", {}))) != 1:
            yield Problem(where, "a deletion condition must have either jobStatus or jobDeploymentStatus")


def _cluster(where: str, cluster: Mapping[str, Any]) -> Iterator[Problem]:
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield Problem(where, "asks for no token: set authOptions: {mode: token}, else who reaches a port runs code")
    if not cluster.get("rayVersion"):
        yield Problem(where, "has no rayVersion, which authOptions needs; set the image's")
    scaled = cluster.get("enableInTreeAutoscaling", False)
    if not scaled and "autoscalerOptions" in cluster:
        yield Problem(where, "autoscalerOptions without enableInTreeAutoscaling: true; set it or remove them")
    if scaled and cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield Problem(where, "scales with the autoscaler v1; set autoscalerOptions: {version: v2}")
    for name, group in _all_groups(cluster):
        spec = group["template"]["spec"]
        if scaled and spec.get("restartPolicy", "Never") != "Never":
            yield Problem(f"{where} {name}", "autoscaler v2 needs restartPolicy: Never")
        for env in spec["containers"][0].get("env", ()):
            if env["name"] in OPERATORS_OWN:
                yield Problem(f"{where} {name}", f"sets {env['name']}, which the operator sets; remove it")


def _groups(where: str, cluster: Mapping[str, Any]) -> Iterator[Problem]:
    names = [group["groupName"] for group in cluster.get("workerGroupSpecs", ())]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(where, f"has more than one group {name}; give them different names")
    if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield Problem(where, 'its head takes tasks; set rayStartParams: {num-cpus: "0"}')
    for group in cluster.get("workerGroupSpecs", ()):
        low, count = group.get("minReplicas", 0), group.get("replicas", 0)
        if not low <= count <= group["maxReplicas"]:
            yield Problem(
                f"{where} group {group['groupName']}",
                f"replicas {count} is not between minReplicas {low} and maxReplicas {group['maxReplicas']}",
            )
        if group.get("suspend") and cluster.get("enableInTreeAutoscaling"):
            yield Problem(f"{where} group {group['groupName']}", "suspend does not go with the autoscaler")
    for name, group in _all_groups(cluster):
        params = group.get("rayStartParams", {})
        if "labels" in params:
            yield Problem(f"{where} {name}", "rayStartParams has labels; use the group's own field labels")
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(params):
            yield Problem(f"{where} {name}", "has resources of Ray in rayStartParams and in resources; use one")


def _fault_tolerance(where: str, cluster: Mapping[str, Any]) -> Iterator[Problem]:
    if "gcsFaultToleranceOptions" not in cluster:
        return
    options, head = cluster["gcsFaultToleranceOptions"], cluster["headGroupSpec"]
    if {"redis-password", "redis-username"} & set(head.get("rayStartParams", {})):
        yield Problem(where, "has a Redis password in rayStartParams; use gcsFaultToleranceOptions.redisPassword")
    if "secretKeyRef" not in options.get("redisPassword", {}).get("valueFrom", {}):
        yield Problem(where, "gcsFaultToleranceOptions.redisPassword must come from a Secret (valueFrom.secretKeyRef)")


def _all_groups(cluster: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "head", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", ()):
        yield f"group {group['groupName']}", group


def disruption_budgets(build: Build) -> Iterator[Problem]:
    """Budgets that can't be counted: pods that an operator makes belong to nothing that has a number of replicas."""
    for one in build.of_kind("PodDisruptionBudget"):
        selects_ray = any(key.startswith("ray.io/") for key in one["spec"]["selector"].get("matchLabels", {}))
        if selects_ray and not isinstance(one["spec"].get("minAvailable"), int):
            yield Problem(
                name_of(one),
                "selects pods that KubeRay makes; for those only a whole number of minAvailable works, not "
                "maxUnavailable or a percentage",
            )


def one_thing_each(build: Build) -> Iterator[Problem]:
    """A platform that would start a job when it is applied, and a job that brings more than itself."""
    kinds: list[Object] = list(build.objects)
    if not build.is_job:
        for one in build.of_kind("RayJob"):
            yield Problem(name_of(one), "would start with the platform; a job has a kustomization of its own")
    elif [one["kind"] for one in kinds] != ["RayJob"]:
        extra = ", ".join(name_of(one) for one in kinds if one["kind"] != "RayJob")
        yield Problem(build.path, f"must create one RayJob and nothing else, has {extra or 'several RayJobs'}")
