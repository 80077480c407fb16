"""Build and check everything in k8s/: `python -m tests.kubernetes`. Exit code 1, and a line for each problem."""

from __future__ import annotations

import sys

from tests.kubernetes.check import RULES, problems
from tests.kubernetes.manifests import shipped
from tests.kubernetes.version_rules import pins


def main() -> int:
    """Check, and say what was found."""
    lines = [str(problem) for problem in pins()]
    builds = objects = 0
    try:
        for build in shipped():
            builds, objects = builds + 1, objects + len(build.objects)
            lines += [f"{build.path}: {problem}" for problem in problems(build)]
    except RuntimeError as error:
        lines.append(str(error))
    for line in lines:
        sys.stderr.write(f"error: {line}\n")
    sys.stdout.write(f"k8s-check: {objects} objects of {builds} builds, {len(RULES)} rules: {len(lines)} problems\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
