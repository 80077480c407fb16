"""Eight photos are learned by heart, by each head, under each supervision: all parts of training and finding agree.

Photos: the first eight by image id that are not upright and have one to six instances, none of them a crowd or of
COCO's "small" ones (under 32 x 32 px), which at this test's size would be a few pixels of the mask features.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn import functional

from freesolo.ops.images import normalize, pad_to_batch
from freesolo.ops.mask_storage import rle_from_coco
from freesolo.ops.masks import decode_rle, encode_rle
from freesolo.ops.sizes import resized_size
from freesolo.settings import HeadSettings, InferenceSettings, LossSettings, SoloModelSettings, SupervisionKind
from freesolo.solo.postprocess import instances_from_predictions
from freesolo.solo.task import SoloTask
from freesolo.types import ImageBatch, Instances, SegmentationBatch

DATA = Path(os.environ.get("FREESOLO_TEST_DATA", Path(__file__).parents[3] / "shared/data")) / "coco-train-470"
PHOTOS = 8
SHORT_SIDE = 160
STEPS = 240
LEARNING_RATE = 0.01
SCALE = SHORT_SIDE / 800

MODEL = SoloModelSettings(
    backbone="resnet18",
    fpn_channels=64,
    head=HeadSettings(tower_channels=64, mask_tower_channels=64, kernel_channels=64),
    embedding_channels=8,
    grid_sizes=(20, 18, 12, 8, 6),
    scale_ranges=tuple((low * SCALE, high * SCALE) for low, high in SoloModelSettings().scale_ranges),
)
SETTINGS = InferenceSettings()
# Eight pixels of such small photos are forty of a usual one, and less alike; BoxInst's 0.3 would leave few pairs.
WEAK_LOSSES = LossSettings(pairwise_warmup_steps=STEPS // 4, pairwise_min_similarity=0.1)


def chosen_photos(coco: dict) -> list[dict]:
    by_image = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    photos = []
    for image in sorted(coco["images"], key=lambda image: image["id"]):
        annotations = by_image[image["id"]]
        simple = all(one["area"] >= 32**2 and not one["iscrowd"] for one in annotations)
        if image["width"] >= image["height"] and 1 <= len(annotations) <= 6 and simple:
            photos.append({**image, "annotations": annotations})
    return photos[:PHOTOS]


def load_batch(photos: list[dict]) -> SegmentationBatch:
    images, masks, image_index = [], [], []
    for index, photo in enumerate(photos):
        height, width = resized_size(photo["height"], photo["width"], SHORT_SIDE, 2 * SHORT_SIDE)
        with Image.open(DATA / "images" / photo["file_name"]) as file:
            pixels = np.array(file.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        rles = [rle_from_coco(one["segmentation"], photo["height"], photo["width"]) for one in photo["annotations"]]
        full = decode_rle(rles, photo["height"], photo["width"])[:, None].float()
        masks.extend(functional.interpolate(full, (height, width), mode="bilinear")[:, 0] >= 0.5)
        image_index += [index] * len(rles)
    pixels, sizes = pad_to_batch(images, 32)
    padded = torch.zeros(len(masks), *pixels.shape[-2:], dtype=torch.bool)
    for row, mask in zip(padded, masks, strict=True):
        row[: mask.shape[0], : mask.shape[1]] = mask
    count, generator = len(masks), torch.Generator().manual_seed(0)
    return SegmentationBatch(
        images=ImageBatch(pixels, sizes, tuple(photo["id"] for photo in photos)),
        instances=Instances(
            image_index=torch.tensor(image_index),
            masks=padded,
            category_ids=torch.zeros(count, dtype=torch.int64),
            scores=torch.ones(count),
            embeddings=functional.normalize(torch.randn(count, MODEL.embedding_channels, generator=generator), dim=1),
        ),
    )


def train(task: SoloTask, batch: SegmentationBatch) -> dict[str, float]:
    """The losses of the last step."""
    # SGD, as the papers have it, with a long warm-up. A mask that goes empty in the first steps stays so, because Dice
    # has next to no slope there: twice this rate, reached in a third of the steps, lost a third of the objects for good
    # with one seed and number of threads and none with another; so did AdamW.
    optimizer = torch.optim.SGD(task.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=STEPS, pct_start=0.4, cycle_momentum=False
    )
    task.train()
    started = time.monotonic()
    for step in range(STEPS):
        losses = task((batch,), step)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 35.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == STEPS - 1:
            shown = ", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items())
            print(f"step {step}: {shown}, {time.monotonic() - started:.0f} s", flush=True)  # noqa: T201
    return {name: loss.item() for name, loss in losses.items()}


def predict(task: SoloTask, batch: SegmentationBatch, photos: list[dict]) -> list[Instances]:
    task.eval()
    with torch.no_grad():
        predictions = task.segmenter(normalize(batch.images.pixels))
    originals = [(photo["height"], photo["width"]) for photo in photos]
    head, sizes = task.segmenter.head, batch.images.sizes
    return instances_from_predictions(head, predictions, sizes, originals, SETTINGS, MODEL)


def mask_ap50(photos: list[dict], predicted: list[Instances]) -> float:
    truth = COCO()
    truth.dataset = {
        "images": [{key: photo[key] for key in ("id", "height", "width")} for photo in photos],
        "annotations": [{**one, "category_id": 1} for photo in photos for one in photo["annotations"]],
        "categories": [{"id": 1, "name": "object"}],
    }
    truth.createIndex()
    results = [
        {"image_id": photo["id"], "category_id": 1, "segmentation": rle, "score": float(score)}
        for photo, instances in zip(photos, predicted, strict=True)
        for rle, score in zip(encode_rle(instances.masks), instances.scores, strict=True)
    ]
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    evaluation.params.useCats = 0
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[1])


def draw(photos: list[dict], predicted: list[Instances], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(0).integers(64, 256, (200, 3))
    for photo, instances in zip(photos, predicted, strict=True):
        with Image.open(DATA / "images" / photo["file_name"]) as file:
            pixels = np.array(file.convert("RGB")).astype(np.float32)
        for mask, score, colour in zip(instances.masks.numpy(), instances.scores, colours, strict=False):
            if score >= 0.3:
                pixels[mask] = 0.4 * pixels[mask] + 0.6 * colour
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{photo['id']:012d}.png")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("kind", "supervision", "losses", "least_ap50"),
    [
        ("solov2", "masks", LossSettings(), 0.90),
        ("decoupled", "masks", LossSettings(), 0.90),
        ("solo", "masks", LossSettings(), 0.90),
        ("solov2", "boxes", WEAK_LOSSES, 0.60),
        # 0.46 to 0.82 in six runs: which small objects are lost for good, the last bits of sums decide.
        ("solov2", "free_masks", WEAK_LOSSES, 0.35),
    ],
)
def test_eight_photos_are_learned_by_heart(
    kind: str, supervision: SupervisionKind, losses: LossSettings, least_ap50: float, tmp_path: Path
) -> None:
    if not (DATA / "instances.json").is_file():
        pytest.skip(f"no photos: {DATA} is absent (FREESOLO_TEST_DATA names the folder that holds coco-train-470)")
    photos = chosen_photos(json.loads((DATA / "instances.json").read_text()))
    assert len(photos) == PHOTOS
    batch = load_batch(photos)
    head = MODEL.head.model_copy(update={"kind": kind})
    model = MODEL.model_copy(update={"head": head})
    task = SoloTask(model, supervision, losses).initialise(torch.Generator().manual_seed(0))
    last = train(task, batch)
    predicted = predict(task, batch, photos)
    draw(photos, predicted, Path(os.environ.get("FREESOLO_OVERLAYS", tmp_path)) / f"{kind}-{supervision}")
    found = mask_ap50(photos, predicted)
    print(f"{kind} from {supervision}: mask AP50 {found:.3f}", flush=True)  # noqa: T201
    assert found >= least_ap50
    if supervision == "free_masks":
        # Where objects are is learned, and which cells are theirs, whatever the outlines are. The projections' losses
        # begin at 1.08 and 0.16; an object that is lost for good keeps its share of them (0.21 and 0.043 in a run with
        # an AP50 of 0.68).
        assert last["category"] < 0.01
        assert last["max_projection"] < 0.25
        assert last["mean_projection"] < 0.05
