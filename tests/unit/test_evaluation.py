"""Class-agnostic metrics: hand arithmetic, pycocotools called directly, and everything that may be missing."""

import contextlib
import copy
import dataclasses
import io
import sys

import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from freesolo.evaluation import CategoryMetrics, Detections, Metrics, evaluate, match, summarize
from freesolo.ops.masks import boxes_xywh, encode_rle

SIDE = 160
Span = tuple[int, int, int, int]  # x, y, width, height


def rectangles(*spans: Span) -> torch.Tensor:
    masks = torch.zeros(len(spans), SIDE, SIDE, dtype=torch.bool)
    for mask, (x, y, width, height) in zip(masks, spans, strict=True):
        mask[y : y + height, x : x + width] = True
    return masks


def truth(objects: dict[int, list[Span]]) -> dict:
    """A COCO ground truth of rectangles."""
    annotations = []
    for image_id, spans in objects.items():
        for rle in encode_rle(rectangles(*spans)):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0, "segmentation": rle}
            )
    images = [{"id": image_id, "height": SIDE, "width": SIDE} for image_id in objects]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}


def predicted(image_id: int, *scored: tuple[Span, float]) -> Detections:
    spans = [span for span, _ in scored]
    rles = encode_rle(rectangles(*spans))
    return Detections(image_id, rles, [tuple(map(float, span)) for span in spans], [score for _, score in scored])


FIRST, SECOND, ELSEWHERE = (0, 0, 10, 10), (50, 50, 10, 10), (100, 0, 10, 10)


def test_precision_and_recall_of_a_right_a_wrong_and_a_right_prediction():
    metrics = evaluate(truth({1: [FIRST, SECOND]}), [predicted(1, (SECOND, 0.7), (FIRST, 0.9), (ELSEWHERE, 0.8))])
    # By score: right (precision 1, recall 1/2), wrong (1/2, 1/2), right (2/3, 1). Of 101 recalls 51 have 1, 50 2/3.
    expected = (51 + 50 * 2 / 3) / 101
    for region in (metrics.segm, metrics.bbox):
        assert region.ap == pytest.approx(expected)
        assert region.ap50 == pytest.approx(expected)
        assert region.ap75 == pytest.approx(expected)
        assert (region.ar1, region.ar10, region.ar100) == pytest.approx((0.5, 1.0, 1.0))
    assert (metrics.images, metrics.objects, metrics.predictions) == (1, 2, 3)


def test_each_threshold_counts_for_itself():
    # Shifted by 2 of 10 columns: IoU 80 / 120 = 2/3, enough for 0.50, 0.55, 0.60 and 0.65: 4 of the 10 thresholds.
    metrics = evaluate(truth({1: [FIRST]}), [predicted(1, ((2, 0, 10, 10), 0.5))])
    for region in (metrics.segm, metrics.bbox):
        assert region.ap == pytest.approx(0.4)
        assert (region.ap50, region.ap75) == pytest.approx((1.0, 0.0))
        assert region.ar100 == pytest.approx(0.4)


def test_objects_are_sorted_by_area():
    small, medium, large = (0, 0, 31, 31), (0, 40, 50, 50), (60, 0, 97, 97)
    metrics = evaluate(truth({1: [small, medium, large]}), [predicted(1, (small, 0.9), (large, 0.8), (ELSEWHERE, 0.7))])
    assert (metrics.segm.ap_small, metrics.segm.ap_medium, metrics.segm.ap_large) == pytest.approx((1.0, 0.0, 1.0))
    assert (metrics.segm.ar_small, metrics.segm.ar_medium, metrics.segm.ar_large) == pytest.approx((1.0, 0.0, 1.0))
    # Two of three found, by all sizes: recalls up to 2/3 are 67 of the 101.
    assert metrics.segm.ap == pytest.approx(67 / 101)


def test_sizes_without_objects_have_no_numbers():
    metrics = evaluate(truth({1: [FIRST]}), [predicted(1, (FIRST, 0.9))])
    assert (metrics.segm.ap_small, metrics.segm.ap_medium, metrics.segm.ap_large) == pytest.approx((1.0, None, None))
    assert (metrics.bbox.ar_small, metrics.bbox.ar_medium, metrics.bbox.ar_large) == pytest.approx((1.0, None, None))


def test_an_annotations_own_area_decides_its_size():
    ground_truth = truth({1: [FIRST]})
    ground_truth["annotations"][0]["area"] = 5000.0
    metrics = evaluate(ground_truth, [predicted(1, (FIRST, 0.9))])
    assert (metrics.segm.ap_small, metrics.segm.ap_medium) == pytest.approx((None, 1.0))


def test_a_wrong_prediction_hurts_only_the_size_of_its_own_region():
    # A wrong mask of 100 px, better scored, whose stated box is medium: it spoils small masks and medium boxes.
    small, medium = (0, 0, 20, 20), (60, 60, 50, 50)
    rles = encode_rle(rectangles(ELSEWHERE, small, medium))
    boxes = [(100.0, 0.0, 50.0, 50.0), (0.0, 0.0, 20.0, 20.0), (60.0, 60.0, 50.0, 50.0)]
    metrics = evaluate(truth({1: [small, medium]}), [Detections(1, rles, boxes, [0.9, 0.8, 0.7])])
    assert (metrics.segm.ap_small, metrics.segm.ap_medium) == pytest.approx((0.5, 1.0))
    assert (metrics.bbox.ap_small, metrics.bbox.ap_medium) == pytest.approx((1.0, 0.5))


def test_categories_do_not_matter():
    ground_truth = truth({1: [FIRST, SECOND]})
    for annotation, category in zip(ground_truth["annotations"], (7, 90), strict=True):
        annotation["category_id"] = category
    ground_truth["categories"] = []
    metrics = evaluate(ground_truth, [predicted(1, (FIRST, 0.9), (SECOND, 0.8))])
    assert metrics.segm.ap == pytest.approx(1.0)


def test_predictions_in_a_crowd_are_neither_right_nor_wrong():
    ground_truth = truth({1: [FIRST, (80, 80, 60, 60)]})
    ground_truth["annotations"][1]["iscrowd"] = 1
    in_crowd = [((80 + 12 * i, 80, 10, 10), 0.9) for i in range(3)]
    metrics = evaluate(ground_truth, [predicted(1, *in_crowd, (FIRST, 0.5))])
    assert metrics.segm.ap == pytest.approx(1.0)
    assert metrics.bbox.ap == pytest.approx(1.0)
    assert metrics.objects == 1


def test_at_most_a_hundred_predictions_an_image_count():
    wrong = [((120, 120, 5 + i % 30, 5 + i // 30), 0.9) for i in range(100)]
    metrics = evaluate(truth({1: [FIRST]}), [predicted(1, *wrong, (FIRST, 0.1))])
    assert metrics.segm.ar100 == 0.0
    metrics = evaluate(truth({1: [FIRST]}), [predicted(1, *wrong[:99], (FIRST, 0.1))])
    assert metrics.segm.ar100 == pytest.approx(1.0)
    assert metrics.segm.ar10 == 0.0


def test_corloc_is_the_share_of_images_with_a_localised_object():
    metrics = evaluate(
        truth({1: [FIRST, SECOND], 2: [FIRST], 3: [FIRST], 4: [], 5: []}),
        [
            predicted(1, (ELSEWHERE, 0.9), ((50, 50, 5, 10), 0.1)),  # half of the second object: exactly 0.5
            predicted(2, ((0, 0, 4, 10), 0.9)),  # 0.4
            predicted(4, (FIRST, 0.9)),  # nothing to find
            predicted(5),
        ],
    )
    assert metrics.corloc == pytest.approx(1 / 3)


def test_corloc_goes_by_masks_and_leaves_out_crowds():
    rle = encode_rle(rectangles((0, 0, 2, 2)))
    box_only = Detections(1, rle, [(0.0, 0.0, 10.0, 10.0)], [0.9])
    metrics = evaluate(truth({1: [FIRST]}), [box_only])
    assert (metrics.bbox.ap, metrics.segm.ap, metrics.corloc) == pytest.approx((1.0, 0.0, 0.0))
    ground_truth = truth({1: [FIRST]})
    ground_truth["annotations"][0]["iscrowd"] = 1
    assert evaluate(ground_truth, [predicted(1, (FIRST, 0.9))]).corloc is None


def numbers(metrics: Metrics) -> set[float | None]:
    counts = {"images", "objects", "predictions"}
    return {value for name, value in metrics.as_dict().items() if name not in counts}


@pytest.mark.parametrize("predictions", [[], [predicted(1)], [predicted(1), predicted(2)]])
def test_no_predictions_score_zero(predictions: list[Detections]):
    metrics = evaluate(truth({1: [FIRST], 2: [(0, 0, 50, 50), (0, 60, 99, 99)]}), predictions)
    assert numbers(metrics) == {0.0}
    assert metrics.predictions == 0


@pytest.mark.parametrize("predictions", [[], [predicted(1, (FIRST, 0.9))]])
def test_no_objects_have_no_numbers(predictions: list[Detections]):
    metrics = evaluate(truth({1: [], 2: []}), predictions)
    assert numbers(metrics) == {None}
    assert (metrics.images, metrics.objects) == (2, 0)


def test_no_images_have_no_numbers():
    assert numbers(evaluate(truth({}), [])) == {None}


def test_names_are_flat():
    names = evaluate(truth({1: [FIRST]}), []).as_dict()
    one_kind = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
    one_kind += ["AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]
    expected = [f"{kind}/{name}" for kind in ("segm", "bbox") for name in one_kind]
    assert list(names) == [*expected, "corloc", "images", "objects", "predictions"]


def test_ids_of_annotations_do_not_matter():
    # COCOeval itself takes a match with an object of id 0 for none, and confuses objects that share an id.
    for ids in ((0, 1), (5, 5)):
        ground_truth = truth({1: [FIRST, SECOND]})
        for annotation, annotation_id in zip(ground_truth["annotations"], ids, strict=True):
            annotation["id"] = annotation_id
        assert evaluate(ground_truth, [predicted(1, (FIRST, 0.9), (SECOND, 0.8))]).segm.ap == pytest.approx(1.0)


def test_ground_truth_is_not_changed_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]):
    ground_truth = truth({1: [FIRST]})
    ground_truth["annotations"][0]["segmentation"] = [[0.0, 0.0, 10.0, 0.0, 10.0, 10.0, 0.0, 10.0]]
    before = copy.deepcopy(ground_truth)
    stdout = sys.stdout
    assert evaluate(ground_truth, [predicted(1, (FIRST, 0.9))]).segm.ap == pytest.approx(1.0)
    assert ground_truth == before
    assert capsys.readouterr() == ("", "")
    assert sys.stdout is stdout


def test_output_is_given_back_when_pycocotools_fails():
    ground_truth = truth({1: [FIRST]})
    ground_truth["annotations"][0]["bbox"] = ["zero", 0, 10, 10]
    stdout = sys.stdout
    with pytest.raises(Exception, match=r"could not convert string"):
        evaluate(ground_truth, [predicted(1, (FIRST, 0.9))])
    assert sys.stdout is stdout


def direct(ground_truth: dict, predictions: list[Detections], kind: str) -> list[float | None]:
    """pycocotools as its own demo calls it."""
    results = []
    for record in predictions:
        for rle, box, score in zip(record.rles, record.boxes_xywh, record.scores, strict=True):
            region = {"segmentation": rle} if kind == "segm" else {"bbox": list(box)}
            results.append({"image_id": record.image_id, "category_id": 1, "score": score, **region})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(ground_truth)
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), kind)
        evaluator.params.useCats = 0
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [None if number == -1 else number for number in evaluator.stats]


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_those_of_pycocotools(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def spans(count: int) -> torch.Tensor:
        corners = torch.randint(0, 100, (count, 2), generator=generator)
        return torch.cat((corners, torch.randint(5, 60 if seed else 30, (count, 2), generator=generator)), dim=1)

    objects = {image_id: [tuple(span) for span in spans(6).tolist()] for image_id in (3, 11, 20)}
    ground_truth = truth({**objects, 40: []})
    ground_truth["categories"] = [{"id": number, "name": str(number)} for number in (1, 2, 3)]
    for number, annotation in enumerate(ground_truth["annotations"]):
        annotation["iscrowd"] = int(number % 6 == 5)
        annotation["category_id"] = 1 + number % 3
        annotation["bbox"] = [float(side) for side in objects[annotation["image_id"]][number % 6]]
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3] * 0.9
        if number % 6 == 1:
            x, y, width, height = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + width, y, x + width / 2, y + height]]
    predictions = []
    for image_id in (40, 20, 3):
        close = torch.tensor(objects.get(image_id, [(5, 5, 9, 9)] * 6)) + torch.randint(
            -3, 4, (6, 4), generator=generator
        )
        boxes = torch.cat((close, spans(15))).clamp(min=1)
        masks = rectangles(*[tuple(box) for box in boxes.tolist()])
        scores = torch.randint(0, 10, (len(masks),), generator=generator) / 10  # with ties
        scores[6:] /= 4
        predictions.append(Detections(image_id, encode_rle(masks), boxes_xywh(masks).tolist(), scores.tolist()))

    metrics = evaluate(ground_truth, predictions).as_dict()
    for kind in ("segm", "bbox"):
        ours = [value for name, value in metrics.items() if name.startswith(kind)]
        assert ours == direct(ground_truth, predictions, kind)
        assert 0.02 < ours[0] < 0.98

    for parts in ([(40,), (20, 3), (7,)], [(3, 7, 20, 40)], [(7,), (3,), (40, 20)]):
        known = {image["id"] for image in ground_truth["images"]}
        left = tuple(known - {image_id for part in parts for image_id in part})
        matched = [match(*only(part, ground_truth, predictions)) for part in (*parts, left)]
        assert summarize(matched).as_dict() == metrics, "in parts it is the same, bit for bit"


def only(
    image_ids: tuple[int, ...], ground_truth: dict, predictions: list[Detections]
) -> tuple[dict, list[Detections]]:
    """Of some images."""
    part = ground_truth | {
        "images": [image for image in ground_truth["images"] if image["id"] in image_ids],
        "annotations": [one for one in ground_truth["annotations"] if one["image_id"] in image_ids],
    }
    return part, [record for record in predictions if record.image_id in image_ids]


def test_records_that_contradict_themselves_are_refused():
    rles = encode_rle(rectangles(FIRST))
    with pytest.raises(ValueError, match="image 4: 1 masks, 0 boxes, 1 scores"):
        Detections(4, rles, [], [0.5])
    with pytest.raises(ValueError, match="image 4: a score"):
        Detections(4, rles, [(0.0, 0.0, 10.0, 10.0)], [float("nan")])


def test_predictions_that_do_not_fit_the_ground_truth_are_refused():
    ground_truth = truth({1: [FIRST]})
    with pytest.raises(ValueError, match="image 2, which the ground truth does not have"):
        evaluate(ground_truth, [predicted(2)])
    with pytest.raises(ValueError, match="two records of predictions for image 1"):
        evaluate(ground_truth, [predicted(1), predicted(1)])
    small = Detections(1, encode_rle(torch.ones(1, 4, 5, dtype=torch.bool)), [(0.0, 0.0, 5.0, 4.0)], [0.5])
    with pytest.raises(ValueError, match=r"\(4, 5\).*image 1 of \(160, 160\)"):
        evaluate(ground_truth, [small])


def test_annotations_that_do_not_fit_their_images_are_refused():
    ground_truth = truth({1: [FIRST]})
    ground_truth["annotations"][0]["image_id"] = 9
    with pytest.raises(ValueError, match="annotation 1 is of image 9, which is not listed"):
        evaluate(ground_truth, [])
    ground_truth = truth({1: [FIRST]})
    ground_truth["annotations"][0]["segmentation"] = []
    with pytest.raises(ValueError, match="annotation 1 of image 1: a segmentation without polygons"):
        evaluate(ground_truth, [])


CATEGORIES = {3: "cat", 7: "dog", 9: "tree"}


def evaluate_by_category(
    ground_truth: dict, predictions: list[Detections], categories: dict[int, str]
) -> CategoryMetrics:
    metrics = evaluate(ground_truth, predictions, categories).categories
    assert metrics is not None
    return metrics


def in_categories(record: Detections, *category_ids: int) -> Detections:
    return dataclasses.replace(record, category_ids=category_ids)


def truth_of_categories(objects: dict[int, list[tuple[Span, int]]]) -> dict:
    ground_truth = truth({image_id: [span for span, _ in spans] for image_id, spans in objects.items()})
    given = [category for spans in objects.values() for _, category in spans]
    for annotation, category in zip(ground_truth["annotations"], given, strict=True):
        annotation["category_id"] = category
    return ground_truth


def test_a_category_is_right_or_the_object_is_not_found():
    ground_truth = truth_of_categories({1: [(FIRST, 3), (SECOND, 7)]})
    right = in_categories(predicted(1, (FIRST, 0.9), (SECOND, 0.8)), 3, 7)
    metrics = evaluate_by_category(ground_truth, [right], CATEGORIES)
    assert (metrics.ap, metrics.ap50) == pytest.approx((1.0, 1.0))
    assert metrics.by_category == pytest.approx({"cat": 1.0, "dog": 1.0, "tree": None})
    swapped = in_categories(predicted(1, (FIRST, 0.9), (SECOND, 0.8)), 3, 3)
    metrics = evaluate_by_category(ground_truth, [swapped], CATEGORIES)
    # Of cats the first is right, the second wrong after it: all recalls have precision 1. No dog is found.
    assert metrics.by_category == pytest.approx({"cat": 1.0, "dog": 0.0, "tree": None})
    assert metrics.ap == pytest.approx(0.5)


def test_categories_agree_with_pycocotools():
    generator = torch.Generator().manual_seed(5)
    objects: dict[int, list[tuple[Span, int]]] = {}
    records = []
    for image_id in range(1, 7):
        spans = [tuple(map(int, torch.randint(5, 60, (4,), generator=generator))) for _ in range(5)]
        kinds = [sorted(CATEGORIES)[int(torch.randint(0, 2, (1,), generator=generator))] for _ in spans]
        objects[image_id] = list(zip(spans, kinds, strict=True))
        moved = [(max(0, x - 2), y + 1, w, h) for x, y, w, h in spans]
        scores = torch.rand(len(spans), generator=generator).tolist()
        records.append(in_categories(predicted(image_id, *zip(moved, scores, strict=True)), *kinds[:-1], 9))
    ground_truth = truth_of_categories(objects)
    coco = COCO()
    coco.dataset = copy.deepcopy(ground_truth) | {"categories": [{"id": one} for one in CATEGORIES]}
    for annotation in coco.dataset["annotations"]:
        annotation |= {"area": float(coco_mask.area(annotation["segmentation"])), "bbox": [0, 0, 1, 1]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        results = coco.loadRes(
            [
                {"image_id": record.image_id, "category_id": category, "segmentation": rle, "score": score}
                for record in records
                for rle, score, category in zip(record.rles, record.scores, record.category_ids, strict=True)
            ]
        )
        evaluator = COCOeval(coco, results, "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics = evaluate_by_category(ground_truth, records, CATEGORIES)
    assert metrics.ap == pytest.approx(evaluator.stats[0])
    assert metrics.ap50 == pytest.approx(evaluator.stats[1])
    assert 0 < metrics.ap < 1
    parts = [match(*only(ids, ground_truth, records), CATEGORIES) for ids in ((5, 2), (1,), (6, 4, 3))]
    assert summarize(parts, CATEGORIES).categories == metrics


def test_categories_that_nobody_knows_are_refused():
    ground_truth = truth_of_categories({1: [(FIRST, 3)]})
    with pytest.raises(ValueError, match="category 8 is none of the 3 known ones"):
        evaluate_by_category(ground_truth, [in_categories(predicted(1, (FIRST, 0.9)), 8)], CATEGORIES)
    with pytest.raises(ValueError, match="image 1: predictions without categories"):
        evaluate_by_category(ground_truth, [predicted(1, (FIRST, 0.9))], CATEGORIES)
    with pytest.raises(ValueError, match="image 1: 2 categories, 1 scores"):
        in_categories(predicted(1, (FIRST, 0.9)), 3, 7)


def test_without_objects_or_predictions_categories_have_no_number_or_0():
    assert evaluate_by_category(truth({1: []}), [], CATEGORIES).ap is None
    metrics = evaluate_by_category(truth_of_categories({1: [(FIRST, 7)]}), [], CATEGORIES)
    assert (metrics.ap, metrics.by_category) == (0.0, {"cat": None, "dog": 0.0, "tree": None})
