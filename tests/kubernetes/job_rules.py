"""Rules for what a RayJob runs: its command is read as the job itself would read it."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from freesolo import config
from freesolo.config import Job
from freesolo.config_file import load_config
from freesolo.errors import UsageError
from tests.kubernetes.manifests import ROOT, Build, Object, name_of
from tests.kubernetes.pod_rules import quantity
from tests.kubernetes.problem import Problem

DATA_CPUS = 1
"""CPUs beside the workers, without which Ray Data waits for ever."""
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True)
class Command:
    """A job's command, taken apart.

    Attributes:
        script: `jobs/X.py`.
        options: `--config`, `--run-name`, `--storage`.
        overrides: `key=value` each.
    """

    script: str
    options: Mapping[str, str]
    overrides: Sequence[str]


def entrypoints(build: Build) -> Iterator[Problem]:
    """Commands that would end with exit code 2, or that could never get the workers that they ask for."""
    for one in build.of_kind("RayJob"):
        where = f"{name_of(one)} entrypoint"
        if not {"entrypoint", "submitterPodTemplate", "rayClusterSpec"} <= one["spec"].keys():
            yield Problem(
                where, "needs entrypoint, submitterPodTemplate and rayClusterSpec, as k8s/jobs/ray-job.yaml has"
            )
            continue
        unknown = [name for name in _variables(one["spec"]["entrypoint"]) if name not in _environment(build, one)]
        if unknown:
            yield Problem(where, f"${unknown[0]} is in no ConfigMap that submitter and head both have; add it to one")
            continue
        try:
            command = _command(_expanded(one["spec"]["entrypoint"], _environment(build, one)))
            job = load_config(_job_type(command.script), ROOT / command.options["--config"], command.overrides)
        except (UsageError, ValueError) as error:
            yield Problem(where, str(error).replace(f"{ROOT}/", ""))
            continue
        yield from (Problem(where, what) for what in _not_a_url(command, job))
        yield from (Problem(where, what) for what in _no_room(job, one["spec"]["rayClusterSpec"]))


def _environment(build: Build, one: Object) -> Mapping[str, str]:
    """Variables that both know: the submitter, whose shell reads the command, and the head, which runs it."""
    maps = {o["metadata"]["name"]: o.get("data", {}) for o in build.present if o["kind"] == "ConfigMap"}
    spec = one["spec"]
    templates = (spec["submitterPodTemplate"], spec["rayClusterSpec"]["headGroupSpec"]["template"])
    known = []
    for template in templates:
        sources = template["spec"]["containers"][0].get("envFrom", ())
        names = [source["configMapRef"]["name"] for source in sources if "configMapRef" in source]
        known.append({key: value for name in names for key, value in maps.get(name, {}).items()})
    return {key: value for key, value in known[0].items() if key in known[1]}


def _variables(text: str) -> list[str]:
    return [found[1] or found[2] for part in _read_by_the_shell(text) for found in _VARIABLE.finditer(part)]


def _expanded(text: str, environment: Mapping[str, str]) -> str:
    parts = re.split(r"('[^']*')", text)  # every second one is in single quotes, where a shell puts nothing in
    parts[::2] = [_VARIABLE.sub(lambda found: environment[found[1] or found[2]], part) for part in parts[::2]]
    return "".join(parts)


def _read_by_the_shell(text: str) -> list[str]:
    return re.split(r"'[^']*'", text)


def _command(text: str) -> Command:
    """Take a command apart.

    Raises:
        ValueError: It is not `python jobs/X.py` with the options that all jobs have.
    """
    # KubeRay writes the command into a shell script as it is.
    if found := re.search(r"[;&|<>`\n]|\$\(", " ".join(_read_by_the_shell(text))):
        raise ValueError(f"{found[0]!r} would be read by the submitter's shell; write one command, in one line")
    if found := re.search(r"'[^']*\$[^']*'", text):
        raise ValueError(f"{found[0]}: in single quotes the shell puts nothing in for a $; take double quotes")
    python, script, *rest = shlex.split(text)
    if python != "python" or not re.fullmatch(r"jobs/\w+\.py", script) or not (ROOT / script).is_file():
        raise ValueError(f"{python} {script}: must be `python jobs/X.py` with one of {', '.join(_scripts())}")
    options, overrides, words = {}, [], iter(rest)
    for word in words:
        if word.startswith("--"):
            options[word] = next(words, "")
        else:
            overrides.append(word)
    for name in ("--config", "--run-name", "--storage"):
        if not options.get(name):
            raise ValueError(f"has no {name}; every job needs one")
    if unknown := options.keys() - {"--config", "--run-name", "--storage"}:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such option of {script}")
    return Command(script, options, overrides)


def _scripts() -> list[str]:
    return sorted(f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py"))


@cache
def _job_type(script: str) -> type[Job]:
    """The configuration's model that a job's script gives to `run_job`."""
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run_job":
            model = getattr(config, ast.unparse(node.args[0]))
            assert issubclass(model, Job)
            return model
    raise ValueError(f"{script} calls no run_job; where does it read its configuration?")


def _not_a_url(command: Command, job: Job) -> Iterator[str]:
    """Places that another pod could not reach."""
    found = {"--storage": command.options["--storage"]}
    for name in ("photos", "images", "dataset", "evaluation_dataset", "labels"):
        value = getattr(job, name, None)
        found |= {f"{name}.{key}": url for key, url in value.items()} if isinstance(value, dict) else {name: value}
    for name, value in found.items():
        if value is not None and not value.startswith("s3://"):
            yield f"{name}={value}: pods share no disk; give a URL in the bucket"


def _no_room(job: Job, cluster: Mapping[str, Any]) -> Iterator[str]:
    """What the cluster that the job starts with could not hold; more pods may come, but need not."""
    asked = job.resources
    workers = asked.workers if isinstance(asked.workers, int) else min(asked.workers)
    nodes = []
    for group in cluster.get("workerGroupSpecs", ()):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        node = (quantity(limits.get("cpu", 0)) or 0, quantity(limits.get("nvidia.com/gpu", 0)) or 0)
        nodes += [node] * group.get("replicas", 0)
    if isinstance(job, config.EvaluateJob):
        return  # its tasks wait until pods come
    places = 0
    for cpus, gpus in nodes:
        here = cpus // asked.cpus_per_worker
        places += int(min(here, gpus // asked.gpus_per_worker) if asked.gpus_per_worker else here)
    spare = sum(cpus for cpus, _ in nodes) - workers * asked.cpus_per_worker
    if places < workers or spare < DATA_CPUS:
        yield (
            f"{workers} workers of {asked.cpus_per_worker} CPUs and {asked.gpus_per_worker:g} GPUs, and {DATA_CPUS} "
            f"CPU for data, do not fit the {len(nodes)} pods that its cluster starts with (places for {places}, "
            f"{spare:g} CPUs over); raise the group's replicas, or lower resources.workers"
        )
