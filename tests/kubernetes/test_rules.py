"""Each rule is broken once in each of its ways: the check names the object, what is wrong and the fix."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes.check import RULES, problems
from tests.kubernetes.manifests import ROOT, Build, Object, kustomize
from tests.kubernetes.pod_rules import quantity
from tests.kubernetes.reference_rules import documented_secrets
from tests.kubernetes.version_rules import pins

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kubectl comes as a Linux wheel only")

Spec = dict[str, Any]


@pytest.fixture(scope="module")
def shipped() -> dict[str, Build]:
    """A platform and a job of each overlay, as they are shipped."""
    made = {}
    for overlay in ("dev", "prod"):
        folder = ROOT / "k8s" / "overlays" / overlay
        platform = kustomize(folder)
        made[overlay] = Build(f"k8s/overlays/{overlay}", overlay, platform)
        job = kustomize(folder / "jobs" / "train-solo")
        made[f"{overlay} job"] = Build(f"k8s/overlays/{overlay}/jobs/train-solo", overlay, job, platform)
    return made


class Broken:
    """A build that one thing is done to."""

    def __init__(self, build: Build) -> None:
        self.objects: list[Object] = copy.deepcopy(list(build.objects))

    def find(self, kind: str, name: str) -> Object:
        return next(one for one in self.objects if (one["kind"], one["metadata"]["name"]) == (kind, name))

    def spec(self, kind: str, name: str) -> Spec:
        spec: Spec = self.find(kind, name)["spec"]
        return spec

    def pod(self, kind: str, name: str) -> Spec:
        pod: Spec = self.spec(kind, name)["template"]["spec"]
        return pod

    def container(self, kind: str, name: str) -> Spec:
        container: Spec = self.pod(kind, name)["containers"][0]
        return container

    @property
    def job(self) -> Spec:
        (job,) = [one["spec"] for one in self.objects if one["kind"] == "RayJob"]
        return job

    @property
    def cluster(self) -> Spec:
        clusters = [one["spec"] for one in self.objects if one["kind"] == "RayCluster"]
        return clusters[0] if clusters else self.job["rayClusterSpec"]

    @property
    def head(self) -> Spec:
        head: Spec = self.cluster["headGroupSpec"]
        return head

    @property
    def head_container(self) -> Spec:
        container: Spec = self.head["template"]["spec"]["containers"][0]
        return container

    @property
    def group(self) -> Spec:
        group: Spec = self.cluster["workerGroupSpecs"][0]
        return group

    @property
    def worker(self) -> Spec:
        worker: Spec = self.group["template"]["spec"]
        return worker

    def say(self, old: str, new: str) -> None:
        """In a job's command."""
        assert old in self.job["entrypoint"]
        self.job["entrypoint"] = self.job["entrypoint"].replace(old, new)


def put(where: Spec, **values: Any) -> None:
    where.update(values)


def drop(where: Spec, *keys: str) -> None:
    for key in keys:
        del where[key]


SECRET = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3", "namespace": "freesolo"}, "stringData": {}}
MOUNT = {"name": "kubernetes-api", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
DASHBOARD = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "grafana", "namespace": "freesolo", "labels": {"grafana_dashboard": "1"}},
    "data": {"x.json": json.dumps({"panels": [{"title": "P", "targets": [{"expr": "rate(ray_data_guessed[1m])"}]}]})},
}

# Rule, build, what is done to it, and words that the problem must have: object, what is wrong, fix.
CASES: list[tuple[str, str, Callable[[Broken], Any], tuple[str, ...]]] = [
    # Schemas: what the API server would refuse or silently drop.
    ("schemas", "dev", lambda b: put(b.spec("Deployment", "mlflow"), replicsa=2), ("Deployment/mlflow", "replicsa")),
    ("schemas", "dev", lambda b: put(b.spec("Deployment", "mlflow"), replicas="2"), ("Deployment/mlflow", "replicas")),
    ("schemas", "dev", lambda b: put(b.container("StatefulSet", "redis"), imagee="x"), ("redis", "imagee")),
    ("schemas", "dev", lambda b: put(b.cluster, rayversion="2.60.0"), ("RayCluster/ray", "rayversion")),
    ("schemas", "prod job", lambda b: put(b.job, backofLimit=1), ("RayJob/train-solo", "backofLimit")),
    ("schemas", "prod job", lambda b: put(b.worker, restartPolcy="Never"), ("RayJob/train-solo", "restartPolcy")),
    ("schemas", "prod job", lambda b: put(b.group, replicas="1"), ("RayJob/train-solo", "replicas")),
    ("schemas", "prod job", lambda b: put(b.cluster["authOptions"], mode="tokens"), ("RayJob/train-solo", "tokens")),
    ("schemas", "dev", lambda b: put(b.find("Service", "mlflow"), kind="Srvice"), ("no such kind", "correct it")),
    (
        "schemas",
        "dev",
        lambda b: put(b.find("RayCluster", "ray"), apiVersion="ray.io/v2"),
        ("ray.io/v2 RayCluster", "no such kind"),
    ),
    # KubeRay's own rules.
    ("ray_objects", "dev", lambda b: drop(b.cluster, "authOptions"), ("RayCluster/ray", "authOptions: {mode: token}")),
    ("ray_objects", "prod job", lambda b: put(b.cluster["authOptions"], mode="disabled"), ("set authOptions",)),
    ("ray_objects", "prod job", lambda b: drop(b.cluster["autoscalerOptions"], "version"), ("version: v2",)),
    ("ray_objects", "prod job", lambda b: put(b.cluster, enableInTreeAutoscaling=False), ("autoscalerOptions",)),
    (
        "ray_objects",
        "prod job",
        lambda b: put(b.worker, restartPolicy="Always"),
        ("group data", "restartPolicy: Never"),
    ),
    ("ray_objects", "prod job", lambda b: put(b.group, replicas=9, maxReplicas=8), ("replicas 9", "maxReplicas 8")),
    ("ray_objects", "prod job", lambda b: put(b.group, groupName="train"), ("more than one group train",)),
    ("ray_objects", "prod job", lambda b: put(b.group, suspend=True), ("suspend",)),
    ("ray_objects", "prod job", lambda b: put(b.group, rayStartParams={"labels": "a=b"}), ("own field labels",)),
    (
        "ray_objects",
        "prod job",
        lambda b: put(b.group, rayStartParams={"num-cpus": "4"}, resources={"CPU": "4"}),
        ("use one",),
    ),
    ("ray_objects", "dev", lambda b: drop(b.head["rayStartParams"], "num-cpus"), ("RayCluster/ray", "num-cpus")),
    (
        "ray_objects",
        "dev",
        lambda b: put(b.head["rayStartParams"], **{"redis-password": "$X"}),
        ("RayCluster/ray", "gcsFaultToleranceOptions.redisPassword"),
    ),
    (
        "ray_objects",
        "dev",
        lambda b: put(b.cluster["gcsFaultToleranceOptions"], redisPassword={"value": "x"}),
        ("secretKeyRef",),
    ),
    (
        "ray_objects",
        "dev",
        lambda b: b.head_container["env"].append({"name": "RAY_ADDRESS", "value": "x"}),
        ("RayCluster/ray head", "RAY_ADDRESS", "remove it"),
    ),
    ("ray_objects", "prod job", lambda b: put(b.job, suspend=True, shutdownAfterJobFinishes=False), ("suspend needs",)),
    ("ray_objects", "prod job", lambda b: put(b.job, shutdownAfterJobFinishes=False), ("ttlSecondsAfterFinished",)),
    ("ray_objects", "prod job", lambda b: put(b.job, backoffLimit=-1), ("backoffLimit",)),
    ("ray_objects", "prod job", lambda b: put(b.job, submissionMode="Sidecar"), ("submissionMode Sidecar",)),
    ("ray_objects", "prod job", lambda b: put(b.job, submissionMode="SidecarMode"), ("SidecarMode takes no",)),
    ("ray_objects", "prod job", lambda b: put(b.job, submissionMode="InteractiveMode"), ("InteractiveMode takes no",)),
    ("ray_objects", "prod job", lambda b: put(b.job, clusterSelector={"a": "b"}), ("rayClusterSpec or clusterSel",)),
    ("ray_objects", "prod job", lambda b: put(b.job, managedBy="someone"), ("managedBy", "kueue")),
    (
        "ray_objects",
        "prod job",
        lambda b: put(b.job, deletionStrategy={"onSuccess": {"policy": "DeleteCluster"}}),
        ("both onSuccess and onFailure",),
    ),
    (
        "ray_objects",
        "prod job",
        lambda b: put(
            b.job,
            deletionStrategy={
                "deletionRules": [
                    {
                        "policy": "DeleteCluster",
                        "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed", "ttlSeconds": 1},
                    }
                ]
            },
        ),
        ("either jobStatus or jobDeploymentStatus",),
    ),
    (
        "ray_objects",
        "prod job",
        lambda b: put(b.objects[0]["metadata"], name="a" * 48),
        ("more than 47 characters",),
    ),
    ("ray_objects", "prod job", lambda b: put(b.objects[0]["metadata"], name="1st"), ("begin with a letter",)),
    (
        "disruption_budgets",
        "dev",
        lambda b: put(b.spec("PodDisruptionBudget", "ray-head"), minAvailable="50%"),
        ("PodDisruptionBudget/ray-head", "whole number of minAvailable"),
    ),
    # What is applied with what.
    (
        "one_thing_each",
        "prod",
        lambda b: b.objects.append({**copy.deepcopy(JOB), "metadata": {"name": "j", "namespace": "freesolo"}}),
        ("RayJob/j", "a kustomization of its own"),
    ),
    (
        "one_thing_each",
        "prod job",
        lambda b: b.objects.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x", "namespace": "freesolo"}}
        ),
        ("one RayJob and nothing else", "ConfigMap/x"),
    ),
    # The restricted standard, in every kind of container.
    (
        "restricted",
        "dev",
        lambda b: drop(b.container("Deployment", "mlflow")["securityContext"], "allowPrivilegeEscalation"),
        ("Deployment/mlflow, container mlflow", "allowPrivilegeEscalation: false"),
    ),
    (
        "restricted",
        "dev",
        lambda b: put(b.container("StatefulSet", "redis")["securityContext"], capabilities={"drop": ["NET_RAW"]}),
        ("StatefulSet/redis", "drop: [ALL]"),
    ),
    (
        "restricted",
        "dev",
        lambda b: put(b.pod("StatefulSet", "postgres")["securityContext"], runAsUser=0),
        ("StatefulSet/postgres", "runAsUser"),
    ),
    ("restricted", "dev", lambda b: put(b.pod("Deployment", "mlflow"), hostNetwork=True), ("mlflow", "hostNetwork")),
    (
        "restricted",
        "dev",
        lambda b: drop(b.pod("Deployment", "mlflow")["securityContext"], "runAsNonRoot"),
        ("mlflow", "runAsNonRoot: true"),
    ),
    (
        "restricted",
        "dev",
        lambda b: drop(b.pod("Deployment", "mlflow")["securityContext"], "seccompProfile"),
        ("mlflow", "seccompProfile"),
    ),
    (
        "restricted",
        "dev",
        lambda b: b.pod("Deployment", "mlflow")["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
        ("Deployment/mlflow", "volume h is a hostPath"),
    ),
    (
        "restricted",
        "dev",
        lambda b: put(b.container("Deployment", "mlflow")["ports"][0], hostPort=1),
        ("mlflow", "hostPort"),
    ),
    (
        "restricted",
        "prod job",
        lambda b: drop(b.cluster["autoscalerOptions"], "securityContext", "volumeMounts"),
        ("RayJob/train-solo head, autoscalerOptions", "allowPrivilegeEscalation"),
    ),
    (
        "restricted",
        "prod job",
        lambda b: put(b.job["submitterPodTemplate"]["spec"]["containers"][0]["securityContext"], privileged=True),
        ("RayJob/train-solo submitter", "privileged"),
    ),
    (
        "restricted",
        "prod job",
        lambda b: put(b.worker, initContainers=[{"name": "i", "image": "x:1", "resources": WHOLE, "volumeMounts": []}]),
        ("group data, init container i", "allowPrivilegeEscalation"),
    ),
    (
        "read_only_root",
        "prod job",
        lambda b: drop(b.worker["containers"][0]["securityContext"], "readOnlyRootFilesystem"),
        ("group data, container ray-worker", "readOnlyRootFilesystem"),
    ),
    (
        "read_only_root",
        "dev",
        lambda b: b.container("Deployment", "mlflow").update(
            volumeMounts=[m for m in b.container("Deployment", "mlflow")["volumeMounts"] if m["name"] != "tmp"]
        ),
        ("mlflow", "emptyDir at /tmp"),
    ),
    (
        "api_tokens",
        "dev",
        lambda b: drop(b.find("ServiceAccount", "mlflow"), "automountServiceAccountToken"),
        ("ServiceAccount/mlflow", "automountServiceAccountToken: false"),
    ),
    ("api_tokens", "prod job", lambda b: put(b.worker, automountServiceAccountToken=True), ("group data", "automount")),
    ("api_tokens", "dev", lambda b: drop(b.pod("StatefulSet", "redis"), "serviceAccountName"), ("serviceAccountName",)),
    (
        "api_tokens",
        "prod job",
        lambda b: b.head_container["volumeMounts"].append(dict(MOUNT)),
        ("head, container ray-head", "only the autoscaler"),
    ),
    # Resources.
    (
        "resources",
        "dev",
        lambda b: drop(b.container("Deployment", "mlflow")["resources"], "limits"),
        ("mlflow", "resources.limits.memory"),
    ),
    (
        "resources",
        "prod job",
        lambda b: drop(b.worker["containers"][0]["resources"]["limits"], "cpu"),
        ("group data", "Ray's number of CPUs"),
    ),
    (
        "resources",
        "dev",
        lambda b: put(b.container("Deployment", "mlflow")["resources"]["requests"], memory="1GB"),
        ("mlflow", "1GB is no quantity"),
    ),
    (
        "resources",
        "dev",
        lambda b: put(b.container("Deployment", "mlflow")["resources"]["requests"], memory="4Gi"),
        ("requests more memory (4Gi)", "(2Gi)"),
    ),
    (
        "volumes",
        "dev",
        lambda b: b.container("Deployment", "mlflow")["volumeMounts"].append({"name": "no", "mountPath": "/no"}),
        ("mlflow", "mounts the volume no"),
    ),
    ("volumes", "prod job", lambda b: put(b.worker["volumes"][1], emptyDir={}), ("group data", "sizeLimit")),
    (
        "volumes",
        "prod job",
        lambda b: drop(b.worker["volumes"][0]["emptyDir"], "medium"),
        ("group data", "no memory at /dev/shm"),
    ),
    (
        "volumes",
        "prod job",
        lambda b: put(b.worker["volumes"][0]["emptyDir"], sizeLimit="1Gi"),
        ("group data", "/dev/shm of 1Gi", "28Gi"),
    ),
    ("probes", "dev", lambda b: drop(b.container("StatefulSet", "seaweedfs"), "livenessProbe"), ("no livenessProbe",)),
    ("probes", "prod job", lambda b: drop(b.head_container, "startupProbe"), ("ray-head", "no startupProbe")),
    ("grace", "prod job", lambda b: put(b.worker, terminationGracePeriodSeconds=60), ("group data", "60", "longer")),
    ("grace", "prod job", lambda b: put(b.head_container, env=[]), ("ray-head", "not set (30)")),
    ("priorities", "dev", lambda b: drop(b.pod("StatefulSet", "redis"), "priorityClassName"), ("priorityClassName",)),
    # References.
    (
        "references",
        "dev",
        lambda b: put(b.container("Deployment", "mlflow")["envFrom"][0]["configMapRef"], name="storag"),
        ("Deployment/mlflow", "ConfigMap storag, which does not exist"),
    ),
    (
        "references",
        "dev",
        lambda b: put(b.container("StatefulSet", "seaweedfs")["envFrom"][0]["secretRef"], name="s3"),
        ("StatefulSet/seaweedfs", "Secret s3, which does not exist", "k8s/README.md"),
    ),
    (
        "references",
        "dev",
        lambda b: put(b.container("StatefulSet", "redis")["env"][0]["valueFrom"]["secretKeyRef"], key="pass"),
        ("StatefulSet/redis", "key pass of the Secret redis"),
    ),
    (
        "references",
        "prod job",
        lambda b: put(b.worker, serviceAccountName="w"),
        ("RayJob/train-solo", "ServiceAccount w"),
    ),
    (
        "references",
        "prod job",
        lambda b: put(b.worker, priorityClassName="p"),
        ("RayJob/train-solo", "PriorityClass p"),
    ),
    (
        "references",
        "dev",
        lambda b: b.pod("Deployment", "mlflow")["volumes"].append(
            {"name": "c", "persistentVolumeClaim": {"claimName": "lost"}}
        ),
        ("Deployment/mlflow", "PersistentVolumeClaim lost"),
    ),
    ("namespaces", "dev", lambda b: drop(b.find("Service", "mlflow")["metadata"], "namespace"), ("Service/mlflow",)),
    (
        "namespaces",
        "dev",
        lambda b: put(b.find("Namespace", "freesolo")["metadata"], labels={}),
        ("Namespace/freesolo", "enforce: restricted"),
    ),
    (
        "namespaces",
        "dev",
        lambda b: b.objects.remove(b.find("NetworkPolicy", "default-deny")),
        ("no NetworkPolicy denies by default",),
    ),
    # Selectors and names of ports.
    (
        "selectors",
        "dev",
        lambda b: put(b.spec("Service", "mlflow")["selector"], **{"app.kubernetes.io/name": "flow"}),
        ("Service/mlflow", "no pod has the labels of app.kubernetes.io/name=flow"),
    ),
    ("selectors", "dev", lambda b: put(b.spec("Service", "redis")["ports"][0], targetPort="r"), ("port named r",)),
    (
        "selectors",
        "dev",
        lambda b: put(b.spec("NetworkPolicy", "mlflow"), podSelector={"matchLabels": {"app": "m"}}),
        ("NetworkPolicy/mlflow", "app=m"),
    ),
    (
        "selectors",
        "dev",
        lambda b: put(b.spec("NetworkPolicy", "ray-head")["ingress"][0]["ports"][0], port="dash"),
        ("NetworkPolicy/ray-head", "port named dash", "dashboard"),
    ),
    (
        "selectors",
        "dev",
        lambda b: put(
            b.spec("NetworkPolicy", "redis")["ingress"][0]["from"][0]["podSelector"]["matchExpressions"][0],
            values=["hed"],
        ),
        ("NetworkPolicy/redis", "ingress.from", "hed"),
    ),
    (
        "selectors",
        "dev",
        lambda b: put(b.spec("PodDisruptionBudget", "mlflow")["selector"]["matchLabels"], a="b"),
        ("PodDisruptionBudget/mlflow", "a=b"),
    ),
    (
        "selectors",
        "dev",
        lambda b: put(b.spec("Deployment", "mlflow"), selector={"matchLabels": {"a": "b"}}),
        ("Deployment/mlflow", "labels of its own template"),
    ),
    (
        "selectors",
        "prod job",
        lambda b: put(b.worker["topologySpreadConstraints"][0], labelSelector={"matchLabels": {"ray.io/group": "x"}}),
        ("RayJob/train-solo", "topologySpreadConstraints", "ray.io/group=x"),
    ),
    # Images and secrets.
    (
        "images",
        "dev",
        lambda b: put(b.container("StatefulSet", "redis"), image="redis:latest"),
        ("StatefulSet/redis", "redis:latest", "name a version"),
    ),
    ("images", "dev", lambda b: put(b.container("StatefulSet", "redis"), image="host:5000/redis"), ("name a version",)),
    (
        "images",
        "prod job",
        lambda b: put(b.worker["containers"][0], image="ghcr.io/freesolo/freesolo:0.1.0"),
        ("group data", "by digest"),
    ),
    (
        "images",
        "prod job",
        lambda b: put(b.worker["containers"][0], image="ghcr.io/freesolo/freesolo@sha256:12"),
        ("64 digits",),
    ),
    ("inline_secrets", "dev", lambda b: b.objects.append(copy.deepcopy(SECRET)), ("Secret/s3", "people create it")),
    (
        "inline_secrets",
        "dev",
        lambda b: b.container("StatefulSet", "redis").update(env=[{"name": "REDIS_PASSWORD", "value": "hunter2"}]),
        ("StatefulSet/redis", "REDIS_PASSWORD", "secretKeyRef"),
    ),
    (
        "inline_secrets",
        "dev",
        lambda b: put(b.find("ConfigMap", "storage")["data"], AWS_SECRET_ACCESS_KEY="x"),
        ("ConfigMap/storage", "AWS_SECRET_ACCESS_KEY"),
    ),
    (
        "inline_secrets",
        "dev",
        lambda b: put(b.find("ConfigMap", "storage")["data"], URI="postgresql://mlflow:pw@postgres/mlflow"),
        ("ConfigMap/storage", "URI has a password"),
    ),
    # Commands.
    ("entrypoints", "prod job", lambda b: b.say("train_solo.py", "train_sol.py"), ("jobs/train_sol.py", "must be")),
    ("entrypoints", "prod job", lambda b: b.say("solo_r50.yaml", "solo_r51.yaml"), ("solo_r51.yaml", "no such file")),
    (
        "entrypoints",
        "prod job",
        lambda b: b.say("labels=", "train.lop.steps=3 labels="),
        ("RayJob/train-solo entrypoint", "train.lop", "did you mean loop"),
    ),
    ("entrypoints", "prod job", lambda b: b.say("labels=", "train.loop.steps=x labels="), ("train.loop.steps='x'",)),
    ("entrypoints", "prod job", lambda b: b.say("--run-name solo", ""), ("no --run-name",)),
    ("entrypoints", "prod job", lambda b: b.say("--run-name", "--name x --run-name"), ("--name", "no such option")),
    ("entrypoints", "prod job", lambda b: b.say("--storage $FREESOLO_BUCKET", "--storage $BUCKET"), ("$BUCKET",)),
    (
        "entrypoints",
        "prod job",
        lambda b: b.say("dataset=$FREESOLO_BUCKET/", "dataset="),
        ("dataset=", "share no disk"),
    ),
    ("entrypoints", "prod job", lambda b: b.say("labels=", "; rm -r x labels="), ("';'", "shell")),
    (
        "entrypoints",
        "prod job",
        lambda b: b.say("labels=", "resources.workers=16 labels="),
        ("16 workers of 4 CPUs and 1 GPUs", "places for 8", "raise the group's replicas"),
    ),
    (
        "entrypoints",
        "dev job",
        lambda b: b.say("resources.cpus_per_worker=1", "resources.cpus_per_worker=4"),
        ("1 CPU for data", "0 CPUs over"),
    ),
    (
        "entrypoints",
        "prod job",
        lambda b: put(b.job["submitterPodTemplate"]["spec"]["containers"][0], envFrom=[]),
        ("$FREESOLO_BUCKET", "submitter and head"),
    ),
    (
        "entrypoints",
        "prod job",
        lambda b: b.say("labels=$FREESOLO_BUCKET/data/free-masks", "'labels=$FREESOLO_BUCKET/data/free-masks'"),
        ("single quotes", "take double quotes"),
    ),
    ("entrypoints", "prod job", lambda b: drop(b.job, "entrypoint"), ("RayJob/train-solo", "needs entrypoint")),
    # Versions and metrics.
    (
        "versions",
        "dev",
        lambda b: put(b.cluster, rayVersion="2.59.0"),
        ("RayCluster/ray", "2.59.0", "requirements.lock"),
    ),
    (
        "versions",
        "dev",
        lambda b: put(b.container("Deployment", "mlflow"), image="ghcr.io/freesolo/freesolo:0.0.1"),
        ("Deployment/mlflow", "0.0.1", "pyproject.toml"),
    ),
    ("dashboards", "dev", lambda b: b.objects.append(copy.deepcopy(DASHBOARD)), ("x.json, P", "ray_data_guessed")),
]
WHOLE = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
JOB: Object = {"apiVersion": "ray.io/v1", "kind": "RayJob", "spec": {}}


@pytest.mark.parametrize(("rule", "build", "damage", "words"), CASES, ids=[f"{c[0]}-{c[3][0]}" for c in CASES])
def test_what_is_broken_is_named(
    shipped: dict[str, Build], rule: str, build: str, damage: Callable[[Broken], Any], words: tuple[str, ...]
) -> None:
    broken = Broken(shipped[build])
    damage(broken)
    build_of_it = replace(shipped[build], objects=tuple(broken.objects))
    of_the_rule = next(one for one in RULES if one.__name__ == rule)
    found = [str(problem) for problem in of_the_rule(build_of_it)]
    assert any(all(word in problem for word in words) for problem in found), found or "nothing was found"
    assert problems(build_of_it), "the whole check lets it pass"


def test_every_rule_is_broken_once() -> None:
    assert {rule.__name__ for rule in RULES} == {rule for rule, *_ in CASES}


def test_nothing_is_wrong_with_what_they_are_made_from(shipped: dict[str, Build]) -> None:
    for build in shipped.values():
        assert not [str(problem) for problem in problems(build)]


@pytest.mark.parametrize(
    ("dockerfile", "problem"),
    [
        ("RUN pip install 'ray[default]==2.59.0'\n", "ray[default]==2.59.0"),
        ("FROM rayproject/ray:2.44.1-py311\n", "rayproject/ray:2.44.1"),
        ("RUN pip install -r requirements.lock\n", None),
    ],
)
def test_another_ray_in_the_image_is_found(tmp_path: Path, dockerfile: str, problem: str | None) -> None:
    (tmp_path / "Dockerfile").write_text(dockerfile)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    found = [str(one) for one in pins(tmp_path)]
    assert len(found) == (problem is not None)
    assert all(problem is not None and problem in one for one in found)


def test_a_range_without_the_locked_ray_is_found(tmp_path: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace(">=2.60,<2.61", ">=2.61,<2.62"))
    (found,) = pins(tmp_path)
    assert "requirements.lock's ray==2.60.0" in str(found)


def test_what_kustomize_refuses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("kind: Kustomization\nresources: [missing.yaml]\n")
    with pytest.raises(RuntimeError, match=r"missing\.yaml"):
        kustomize(tmp_path)
    (tmp_path / "kustomization.yaml").write_text("kind: Kustomization\nresource: []\n")
    with pytest.raises(RuntimeError, match="resource"):
        kustomize(tmp_path)


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("2", 2), ("1.5Gi", 1.5 * 2**30), ("1M", 1e6), ("1GB", None), ("", None)]
)
def test_quantities(text: str, number: float | None) -> None:
    assert quantity(text) == number


def test_secrets_are_read_from_the_table_that_people_read(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(
        "# x\n| `not` | `a` |\n## Secrets\n| `one` | `a`, `B_C` |\n| `two` | `x.y` |\n\n## Next\n| `no` | `z` |\n"
    )
    assert documented_secrets(readme) == {"one": {"a", "B_C"}, "two": {"x.y"}}
