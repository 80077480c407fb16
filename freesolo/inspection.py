"""What a URL holds and whether it is whole: a data set, a label set, or a run."""

from __future__ import annotations

from collections.abc import Iterator

from freesolo.data.files import exists, join
from freesolo.data.labels import LabelManifest, read_label_manifest, read_label_plan
from freesolo.data.shards import DatasetManifest, ShardError, read_dataset_manifest, read_shard
from freesolo.errors import UsageError
from freesolo.progress import progress
from freesolo.stages import read_result, stages_of


def inspect(url: str, *, verify: bool = False) -> tuple[str, bool]:
    """Describe what a URL holds.

    Args:
        url: Of a data set, a label set or a run.
        verify: Read every byte of a data set and compare checksums.

    Returns:
        Lines for people, and whether it is whole.

    Raises:
        UsageError: Nothing of ours is there.
        JobError: The store cannot be reached.
    """
    if exists(join(url, "plan.json")):
        return _describe_label_set(url)
    if exists(join(url, "manifest.json")):
        return _describe_data_set(url, read_dataset_manifest(url), verify=verify)
    if stages := stages_of(url):
        return _describe_run(url, stages)
    raise UsageError(f"{url}: neither a data set, nor a label set, nor a run; give the folder that has its manifest")


def _describe_data_set(url: str, manifest: DatasetManifest, *, verify: bool) -> tuple[str, bool]:
    total = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"data set {url}",
        f"  {manifest.samples:,} photos in {len(manifest.shards)} shards, {total / 1e6:,.1f} MB",
        f"  {f'annotated, {len(manifest.categories)} categories' if manifest.annotated else 'without annotations'}",
        f"  digest {manifest.digest}",
    ]
    if manifest.skipped:
        first = "; ".join(f"{photo.file_name}: {photo.reason}" for photo in manifest.skipped[:3])
        lines.append(f"  {len(manifest.skipped)} photos were unreadable and are not in it: {first}")
    damage = list(_damage(url, manifest, verify=verify))
    lines += [f"  DAMAGED {line}" for line in damage]
    checked = "every byte read" if verify else "all shards are there; --verify reads every byte"
    return "\n".join(lines if damage else [*lines, f"  whole ({checked})"]), not damage


def _damage(url: str, manifest: DatasetManifest, *, verify: bool) -> Iterator[str]:
    missing = [shard.name for shard in manifest.shards if not exists(join(url, f"{shard.name}.tar"))]
    yield from (f"{name}.tar is missing" for name in missing)
    if not verify:
        return
    with progress("verify", total=manifest.samples, unit="photos") as advance:
        for shard in manifest.shards:
            if shard.name in missing:
                continue
            try:
                for _ in read_shard(url, shard):
                    advance()
            except ShardError as error:
                yield str(error)


def _describe_label_set(url: str) -> tuple[str, bool]:
    if not exists(join(url, "manifest.json")):
        dataset = read_label_plan(url).dataset_url
        lines = [f"label set {url}", "  NOT WHOLE: being made, or its job was stopped; run that again"]
        return "\n".join([*lines, f"  of data set {dataset}"]), False
    manifest = read_label_manifest(url)
    lines = [
        f"label set {url}",
        f"  {manifest.plan.kind}: {manifest.instances:,} instances in {manifest.images:,} images, "
        f"{manifest.instances / max(manifest.images, 1):.1f} an image, {manifest.unreadable} unreadable",
        f"  of data set {manifest.plan.dataset_url}, digest {manifest.plan.dataset_digest}",
        f"  made with {manifest.plan.model.get('weights', '?')}, sha256 {manifest.plan.model.get('sha256', '?')}",
        f"  digest {manifest.digest}",
    ]
    damaged = _damaged_files(url, manifest)
    lines += [f"  DAMAGED {name}" for name in damaged]
    return "\n".join(lines if damaged else [*lines, "  whole"]), not damaged


def _damaged_files(url: str, manifest: LabelManifest) -> list[str]:
    return [file.name for file in manifest.files if not exists(join(url, f"{file.name}.parquet"))]


def _describe_run(url: str, stages: list[str]) -> tuple[str, bool]:
    lines, whole = [f"run {url}"], True
    for stage in stages:
        result = read_result(join(url, stage))
        if result is None:
            lines.append(f"  {stage}: NOT FINISHED; submit the run again to go on")
            whole = False
            continue
        counts = ", ".join(f"{count:,} {name}" for name, count in result.counts.items())
        outputs = ", ".join(result.outputs.values())
        lines.append(f"  {stage}: {result.seconds:.0f} s; {counts or 'done'}; {outputs}")
    return "\n".join(lines), whole
