"""`freesolo ...`: what a person does at a terminal, beside the jobs that a cluster runs."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from freesolo.data.coco import write_coco
from freesolo.data.files import join, read_bytes, write_atomic
from freesolo.data.pack import pack, plan_shards
from freesolo.data.photos import PhotoError, decode_photo
from freesolo.data.scenes import compose_scenes, demo_photos
from freesolo.data.sources import find_photos
from freesolo.entry import exit_code
from freesolo.errors import JobError, UsageError
from freesolo.inference.segment import SegmentPhotos, build_segmenter
from freesolo.inspection import inspect
from freesolo.models.download import sha256_of_file
from freesolo.models.layouts import EXPORT
from freesolo.models.model_file import load_model, save_model
from freesolo.models.published import PUBLISHED, pull, recorded_sha256
from freesolo.models.weights import detectron2_settings, export_backbone, import_backbone
from freesolo.progress import progress
from freesolo.report.pictures import draw_masks, encode_png
from freesolo.settings import InferenceSettings, PredictSettings, TrackingSettings
from freesolo.solo.program import SAVE, trace
from freesolo.stages import stages_of

if TYPE_CHECKING:
    from freesolo.registry.weights import ResolvedWeights
    from freesolo.tracking.server import TrackingServer

_TRAINING_SEED = 0
_HELD_OUT_SEED = 4  # seeds 1 to 3 were looked at while the demo's settings were chosen; nothing was chosen on this one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 for a failure, 2 for a wrong use."""
    options = _parser().parse_args(arguments)
    return exit_code(lambda: options.act(options), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    parser = argparse.ArgumentParser(prog="freesolo", description="Unsupervised instance segmentation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("pack", parents=[common], help="photos into the shards of a data set")
    command.add_argument("photos", help="folder, glob or COCO JSON")
    command.add_argument("dataset", help="URL of the data set to make")
    command.add_argument("--images", help="folder of a COCO JSON's photos; default: beside it")
    command.add_argument("--samples-per-shard", type=_positive, default=1000)
    command.add_argument("--seed", type=int, default=0, help="of the order of the photos")
    command.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes")
    command.add_argument("--max-bad-samples", type=_share, default=0.001, help="share of photos that may be unreadable")
    command.set_defaults(act=_pack)

    command = commands.add_parser("demo-data", parents=[common], help="the demo's photos, and scenes made of them")
    command.add_argument("folder", help="gets unlabelled/ to train on and held-out/ with annotations")
    command.add_argument("--scenes", type=_positive, default=320, help="to train on")
    command.add_argument("--held-out", type=_positive, default=64, help="scenes to evaluate on")
    command.set_defaults(act=_demo_data)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", help="model file, URL or models:/name@alias")
    model.add_argument("--storage", default="runs", help="where runs are kept, for models:/ without a tracking server")
    model.add_argument("--tracking-uri", help="MLflow's; default: MLFLOW_TRACKING_URI, or SQLite in the storage")

    command = commands.add_parser("predict", parents=[common, model], help="segment one photo, draw what was found")
    command.add_argument("photo", help="path or URL")
    command.add_argument("--out", required=True, help="the picture to write, a PNG")
    command.add_argument("--short-side", type=_positive, default=800, help="pixels that the photo is resized to")
    command.add_argument("--min-score", type=_share, default=0.3)
    command.set_defaults(act=_predict)

    command = commands.add_parser("inspect", parents=[common], help="what a data set, a label set or a run holds")
    command.add_argument("url")
    command.add_argument("--verify", action="store_true", help="read every byte and compare checksums")
    command.set_defaults(act=_inspect)

    command = commands.add_parser("deliver", parents=[common], help="send MLflow what it missed of an ended run")
    command.add_argument("run", help="URL of the run; on the machine that it ran on, pictures and files too")
    command.add_argument("--timeout", type=float, default=60.0, help="seconds to try, for each stage")
    command.set_defaults(act=_deliver)

    exports = commands.add_parser("export", help="into other formats").add_subparsers(required=True, metavar="FORMAT")
    command = exports.add_parser("coco", parents=[common], help="a label set or annotated data set as COCO JSON")
    command.add_argument("url")
    command.add_argument("out", help="the JSON to write")
    command.set_defaults(act=_export_coco)
    command = exports.add_parser("weights", parents=[common, model], help="a model's backbone for another project")
    command.add_argument("out", help="the file to write: .pth, or .pkl for detectron2")
    command.add_argument("--layout", choices=EXPORT, required=True, help="whose names the tensors get")
    command.set_defaults(act=_export_weights)
    command = exports.add_parser("program", parents=[common, model], help="a segmenter that runs without freesolo")
    command.add_argument("out", help="the file to write: .pt2, or .onnx")
    command.add_argument("--format", choices=SAVE, required=True)
    command.add_argument("--register", action="store_true", help="beside the model, which is models:/..., too")
    command.set_defaults(act=_export_program)

    weights = commands.add_parser("weights", help="published checkpoints").add_subparsers(required=True, metavar="DO")
    command = weights.add_parser("pull", parents=[common], help="fetch a checkpoint and verify its checksum")
    command.add_argument("name", help=f"an address, or one of {', '.join(PUBLISHED)}")
    command.add_argument("--to", default="weights", help="folder")
    command.add_argument("--sha256", help="what the file must hash to")
    command.set_defaults(act=_pull)
    command = weights.add_parser("import", parents=[common], help="a ResNet of another project into a model file")
    command.add_argument("file", help="torchvision's, timm's, mmdet's or detectron2's")
    command.add_argument("out", help="the model file to write")
    command.add_argument(
        "--stride-in", choices=("1x1", "3x3"), required=True, help="the convolution of a block: 1x1 is caffe's style"
    )
    command.add_argument(
        "--pixels", choices=("rgb", "bgr"), required=True, help="normalised RGB, or BGR to 255 less the mean"
    )
    command.set_defaults(act=_import)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return share


def _pack(options: argparse.Namespace) -> None:
    found = find_photos(options.photos, images=options.images)
    plan_shards(found, options.dataset, samples_per_shard=options.samples_per_shard, seed=options.seed)  # may refuse
    count = len(found.photos)
    with progress("pack", total=count, unit="photos") as advance:
        manifest = pack(
            options.photos,
            options.dataset,
            images=options.images,
            samples_per_shard=options.samples_per_shard,
            seed=options.seed,
            max_bad_samples=options.max_bad_samples,
            workers=options.workers,
            progress=advance,
        )
    print(f"{options.dataset}: {manifest.samples} photos in {len(manifest.shards)} shards")
    for photo in manifest.skipped:
        print(f"  skipped {photo.file_name}: {photo.reason}")


def _demo_data(options: argparse.Namespace) -> None:
    for name, photo in demo_photos():
        write_atomic(join(options.folder, "unlabelled", "photos", name), photo)
    compose_scenes(join(options.folder, "unlabelled"), options.scenes, seed=_TRAINING_SEED)
    annotations = compose_scenes(join(options.folder, "held-out"), options.held_out, seed=_HELD_OUT_SEED)
    print(f"{options.folder}: {options.scenes} scenes and the photos they are made of; held out: {annotations}")


def _predict(options: argparse.Namespace) -> None:
    settings = PredictSettings(
        short_side=options.short_side,
        inference=InferenceSettings(min_score=options.min_score),
        max_width=1.0,
    )
    try:
        photo = decode_photo(read_bytes(options.photo))
    except PhotoError as error:
        raise JobError(f"{options.photo}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        segment = SegmentPhotos.from_file(_resolve(options, folder).path, settings)
    (found,) = segment([photo])
    picture = draw_masks(photo, found.masks.numpy(), found.scores.double().numpy())
    write_atomic(options.out, encode_png(picture))
    print(f"{options.out}: {len(found)} instances")


def _resolve(options: argparse.Namespace, folder: str) -> ResolvedWeights:
    # MLflow takes seconds to import: only the commands that talk to it do.
    from freesolo.registry.weights import resolve_weights

    return resolve_weights(options.model, Path(folder), server=_server(options))


def _server(options: argparse.Namespace) -> TrackingServer | None:
    from freesolo.tracking.server import resolve_server

    if not options.model.startswith("models:"):
        return None
    return resolve_server(TrackingSettings(uri=options.tracking_uri), options.storage)


def _inspect(options: argparse.Namespace) -> None:
    text, whole = inspect(options.url, verify=options.verify)
    print(text)
    if not whole:
        raise JobError(f"{options.url}: not whole")


def _deliver(options: argparse.Namespace) -> None:
    from freesolo.tracking.record import read_record
    from freesolo.tracking.witness import deliver_later

    records = {stage: read_record(join(options.run, stage)) for stage in stages_of(options.run)}
    # A run before its stages, which name it as their parent.
    tracked = sorted((record.parent_run_url is not None, stage) for stage, record in records.items() if record)
    if not tracked:
        raise UsageError(f"{options.run}: not a run that MLflow was told of; give <storage>/<run name>")
    undelivered = 0
    for _, stage in tracked:
        delivery = deliver_later(join(options.run, stage), timeout=options.timeout)
        undelivered += delivery.undelivered
        print(f"{stage}: {delivery}")
    if undelivered:
        raise JobError(f"{options.run}: {undelivered} records were not delivered; run the same again")


def _export_coco(options: argparse.Namespace) -> None:
    write_coco(options.url, options.out)
    print(options.out)


def _export_weights(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(_resolve(options, folder).path)
        file = Path(folder) / "exported"
        export_backbone(model, options.layout, file)
        write_atomic(options.out, file.read_bytes())
    print(f"{options.out}: the backbone, {model.settings['backbone']}, of {options.model}")
    if options.layout == "detectron2":
        print("in detectron2's configuration:", ", ".join(f"{k}={v}" for k, v in detectron2_settings(model).items()))


def _export_program(options: argparse.Namespace) -> None:
    if options.register and not options.model.startswith("models:"):
        raise UsageError(f"--register: {options.model} is not of a registry; give models:/name@alias")
    with tempfile.TemporaryDirectory() as folder:
        resolved = _resolve(options, folder)
        model = load_model(resolved.path, "segmenter")
        file = Path(folder) / f"segmenter{'.onnx' if options.format == 'onnx' else '.pt2'}"
        traced = trace(build_segmenter(model))
        SAVE[options.format](traced, file, {"sha256": model.sha256, "settings": model.settings})
        write_atomic(options.out, file.read_bytes())
        print(f"{options.out}: pixels in, {', '.join(traced.outputs)} out")
        server = _server(options)
        if options.register and server is not None and resolved.name is not None and resolved.version is not None:
            from freesolo.registry.programs import register_program

            print(register_program(file, resolved.name, resolved.version, server))


def _import(options: argparse.Namespace) -> None:
    path = Path(options.file)
    imported = import_backbone(path, stride_in_1x1=options.stride_in == "1x1", pixels=options.pixels)
    lineage = {
        "imported": path.name,
        "imported_sha256": sha256_of_file(path),
        "imported_stride_in": options.stride_in,
        "imported_pixels": options.pixels,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        save_model(file, "backbone", {"backbone": imported.backbone}, imported.state_dict, lineage)
        write_atomic(options.out, file.read_bytes())
    ignored = imported.report.ignored
    print(f"{options.out}: a {imported.backbone}, {imported.report.loaded} tensors; {len(ignored)} others left out")


def _pull(options: argparse.Namespace) -> None:
    path = pull(options.name, Path(options.to), sha256=options.sha256)
    print(f"{path}: sha256 {recorded_sha256(path)}")


if __name__ == "__main__":
    sys.exit(main())
