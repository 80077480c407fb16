"""All rules, over all that is shipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from tests.kubernetes import job_rules, pod_rules, ray_rules, reference_rules, version_rules
from tests.kubernetes.manifests import Build, name_of
from tests.kubernetes.problem import Problem
from tests.kubernetes.schemas import schema_errors

Rule = Callable[[Build], Iterable[Problem]]


def schemas(build: Build) -> Iterator[Problem]:
    """Objects that are not what their kind's schema says."""
    for one in build.objects:
        yield from (Problem(name_of(one), what) for what in schema_errors(one))


RULES: tuple[Rule, ...] = (
    schemas,
    ray_rules.ray_objects,
    ray_rules.disruption_budgets,
    ray_rules.one_thing_each,
    pod_rules.restricted,
    pod_rules.read_only_root,
    pod_rules.api_tokens,
    pod_rules.resources,
    pod_rules.volumes,
    pod_rules.probes,
    pod_rules.grace,
    pod_rules.priorities,
    reference_rules.references,
    reference_rules.namespaces,
    reference_rules.selectors,
    reference_rules.images,
    reference_rules.inline_secrets,
    job_rules.entrypoints,
    version_rules.versions,
    version_rules.dashboards,
)


def problems(build: Build) -> list[Problem]:
    """Everything that is wrong with a build. An object that its schema refuses is not looked at further."""
    wrong = list(schemas(build))
    return wrong or list(chain.from_iterable(rule(build) for rule in RULES))
