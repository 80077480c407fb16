"""A run and its stages, as folders.

    <storage>/<run name>/<stage>/settings.json   what the stage was asked to do; a second submission must ask the same
                                 result.json     what came of it; written last, so its presence means that it is done
                                 .lease/         who works on it: one job at a time
                                 ...             the stage's own files: checkpoints, metrics, model, label set

A job names its run, so submitting it again goes on where it stopped, and a finished stage is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from freesolo.config import Job
from freesolo.data.documents import canonical_digest, differences, parse_fields
from freesolo.data.files import exists, join, list_files, read_bytes, write_atomic
from freesolo.data.lease import held
from freesolo.errors import UsageError

Inputs = TypeVar("Inputs")


@dataclass(frozen=True, slots=True)
class StageFolder:
    """Where a stage of a run keeps everything it makes."""

    storage: str
    run_name: str
    stage: str

    @property
    def run_url(self) -> str:
        """Folder of the whole run."""
        return join(self.storage, self.run_name)

    @property
    def url(self) -> str:
        """Folder of the stage."""
        return join(self.run_url, self.stage)

    def sibling(self, stage: str) -> StageFolder:
        """Another stage of the same run."""
        return StageFolder(self.storage, self.run_name, stage)

    def by_content(self, name: str, job: Job) -> StageFolder:
        """Another stage of the same run, named by what it makes too: whoever wants the same made shares it.

        A job's inputs are URLs of earlier stages, so by their names the same includes all that is upstream.
        """
        return self.sibling(f"{name}-{canonical_digest(what_is_made(job))[:8]}")


@dataclass(frozen=True, slots=True)
class StageResult:
    """What came of a stage.

    Attributes:
        stage: Its name.
        seconds: Time that the attempt took which ended it; of a stage that was killed and went on, the last one.
        outputs: URLs of what it made: `model`, `labels`, `report` ...
        counts: Images, instances, steps ...
        metrics: Last losses, or an evaluation's figures.
    """

    stage: str
    seconds: float
    outputs: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)


def run_stage(
    folder: StageFolder,
    settings: dict[str, Any],
    prepare: Callable[[], Inputs],
    work: Callable[[Inputs], StageResult],
) -> StageResult:
    """Do a stage's work, unless it is done already. One process does it at a time.

    Args:
        folder: Of the stage.
        settings: All that determines the result, JSON-able.
        prepare: Reads what the work starts from, and raises if it cannot be done as asked. Comes before anything is
            written, so that what was refused can be put right and submitted under the same name.
        work: Does it, going on from what an earlier attempt left in the folder.

    Raises:
        UsageError: The folder belongs to a stage with other settings; names the first that differ.
        LeaseError: Another process works on it.
    """
    wanted = json.loads(json.dumps(settings))
    if done := _result_of_same(folder, wanted):
        return done
    inputs = prepare()
    with held(join(folder.url, ".lease")):
        if done := _result_of_same(folder, wanted):  # by who held the lease just now
            return done
        write_atomic(join(folder.url, "settings.json"), json.dumps(wanted, indent=1).encode())
        result = work(inputs)
        write_atomic(join(folder.url, "result.json"), json.dumps(asdict(result), indent=1).encode())
    return result


def _result_of_same(folder: StageFolder, wanted: dict[str, Any]) -> StageResult | None:
    """The result of a stage; None if it is not done.

    Raises:
        UsageError: It was begun with other settings.
    """
    settings_url = join(folder.url, "settings.json")
    if exists(settings_url):
        different = differences(json.loads(read_bytes(settings_url)), wanted)
        if different:
            raise UsageError(
                f"{folder.url}: run {folder.run_name!r} was started with other settings: {'; '.join(different[:3])}; "
                "choose another --run-name, or the same settings"
            )
    return read_result(folder.url)


def read_result(stage_url: str) -> StageResult | None:
    """What came of the stage in a folder; None if it is not done.

    Raises:
        UsageError: Its file is damaged.
    """
    url = join(stage_url, "result.json")
    if not exists(url):
        return None
    try:
        return parse_fields(StageResult, json.loads(read_bytes(url)))
    except (ValueError, UsageError) as error:
        raise UsageError(f"{url}: damaged ({error}); delete it, and submit the run again") from error


def stages_of(run_url: str) -> list[str]:
    """Names of the stages that were begun in a run's folder, sorted; empty where it is no run's.

    Raises:
        UsageError, JobError: As `freesolo.data.files.list_files`.
    """
    return sorted(
        {name.split("/")[0] for name in list_files(run_url) if name.endswith("/settings.json") and name.count("/") == 1}
    )


def what_is_made(job: Job) -> dict[str, Any]:
    """The settings that determine a job's result; who does it, who is told, and what is forgiven may change.

    So a run that stopped for too many bad samples, or for want of workers, goes on under its name with others.
    """
    record: dict[str, Any] = job.model_dump(mode="json", exclude={"resources", "tracking", "bounds"})
    return _without(_without(record, "max_bad_samples"), "max_concurrent")


def _without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        key: _without(value, name) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key != name
    }
