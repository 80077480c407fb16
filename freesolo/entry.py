"""What all jobs have in common at a terminal: arguments, errors in one line, exit codes, a result in JSON."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from freesolo.config import Job
from freesolo.config_file import load_config
from freesolo.errors import JobError, StoppedError, UsageError
from freesolo.settings import absolute_url
from freesolo.stages import StageFolder, StageResult
from freesolo.termination import TERMINATED, leave, on_termination

JobType = TypeVar("JobType", bound=Job)


def run_job(
    job_type: type[JobType],
    stage: str,
    work: Callable[[JobType, StageFolder], StageResult],
    arguments: Sequence[str] | None = None,
) -> int:
    """Do what the command line says.

    Standard output gets one line of JSON, last: the result. Progress and errors go to standard error.

    Args:
        job_type: The configuration's model.
        stage: Name of the stage's folder in the run.
        work: Does the job.
        arguments: Of the command line; None: the process's own.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a wrong use, 130 or 143 where Ctrl-C or SIGTERM stopped it.
    """
    parser = argparse.ArgumentParser(description=(work.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, help="YAML that says what to do")
    parser.add_argument("--run-name", required=True, help="names the run; submitting it again goes on where it stopped")
    parser.add_argument("--storage", required=True, help="folder or URL where runs are kept")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting: section.field=value")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    for chatty in ("alembic", "botocore", "aiobotocore", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

    def act() -> None:
        job = load_config(job_type, options.config, options.overrides)
        result = work(job, StageFolder(absolute_url(options.storage), options.run_name, stage))
        sys.stdout.write(json.dumps(asdict(result)) + "\n")

    return exit_code(act, debug=options.debug)


def exit_code(act: Callable[[], None], *, debug: bool) -> int:
    """Run something; an error made for people is one line on standard error, others show their traceback.

    SIGTERM and Ctrl-C end it in good order: leases are released, and MLflow is told.

    Args:
        act: What to run.
        debug: Whether errors made for people show their traceback too, before the line.
    """
    try:
        with on_termination(leave):
            act()
    except (UsageError, JobError) as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n")
        return _exit_code_of(error)
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; run the same again to go on\n")
        return 128 + signal.SIGINT
    return 0


def _exit_code_of(error: UsageError | JobError) -> int:
    if isinstance(error, StoppedError):
        return TERMINATED
    return 2 if isinstance(error, UsageError) else 1
