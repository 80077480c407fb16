"""The benchmarks' clockwork, by hand arithmetic; and that each peer gives our answer, at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from rich.console import Console

from freesolo.ops.masks import boxes_xywh
from tests.benchmarks import (
    checkpoint,
    evaluation,
    free_mask,
    growth,
    input_paths,
    matrix_nms,
    ray_cost,
    scaling,
    solo_targets_and_losses,
)
from tests.benchmarks.__main__ import NAMES, main
from tests.benchmarks.measure import Benchmark, Case, Comparison, Measurement, as_json, compare, table
from tests.benchmarks.synthetic import ellipses
from tests.small import small_solo

CPU = torch.device("cpu")


@dataclass
class FakeWork:
    """A clock, and work that moves it and writes down whose turn it was."""

    now: float = 0.0
    turns: list[str] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: Iterator[float], answer: int) -> int:
        self.turns.append(name)
        self.now += next(seconds)
        return answer


def assert_equal(ours: int, peer: int) -> None:
    assert ours == peer


def fake_case(fake: FakeWork, ours: list[float], peer: list[float], answers: tuple[int, int] = (7, 7)) -> Case:
    """Each side's first call, the check's, takes the first of its seconds."""
    ours_seconds, peer_seconds = iter(ours), iter(peer)
    return Case(
        name="sums",
        peer_name="an abacus",
        ours=lambda: fake.work("ours", ours_seconds, answers[0]),
        peer=lambda: fake.work("peer", peer_seconds, answers[1]),
        assert_equal=assert_equal,
    )


def test_sides_take_turns_and_the_check_is_not_timed():
    fake = FakeWork()
    case = fake_case(fake, ours=[100.0, 2.0, 4.0, 1.0], peer=[100.0, 6.0, 4.0, 8.0])
    comparison = compare(case, repeats=3, clock=fake.clock)
    check, repeats = ["ours", "peer"], ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert fake.turns == check + repeats
    assert comparison == Comparison("sums", "an abacus", Measurement((2.0, 4.0, 1.0)), Measurement((6.0, 4.0, 8.0)))
    assert comparison.ours.median == 2.0
    assert comparison.peer.median == 6.0
    assert comparison.ratios == (3.0, 1.0, 8.0)


def test_different_answers_are_not_timed():
    fake = FakeWork()
    case = fake_case(fake, ours=[1.0], peer=[1.0], answers=(7, 8))
    with pytest.raises(AssertionError):
        compare(case, repeats=1, clock=fake.clock)
    assert fake.turns == ["ours", "peer"]


# Ratios 4, 1 and 6. Their median is 4; the ratio of the medians, 6 / 2, would be 3.
COMPARISON = Comparison("sums", "an abacus", Measurement((2.0, 4.0, 1.0)), Measurement((8.0, 4.0, 6.0)))
BENCHMARK = Benchmark(name="arithmetic", inputs="numbers", cases=tuple)


def printed(comparison: Comparison) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(BENCHMARK, [comparison], peak=100.0))
    return capture.get()


def test_the_table_says_medians_and_spread():
    text = printed(COMPARISON)
    assert "arithmetic: numbers" in text
    for cell in ("sums", "an abacus", " 3 ", "2,000 ms", "6,000 ms", "4.00", "(1.00 to 6.00)"):
        assert cell in text


def test_short_times_have_a_decimal():
    text = printed(Comparison("sums", "an abacus", Measurement((0.01234,)), Measurement((0.1,))))
    assert "12.3 ms" in text
    assert "100 ms" in text


def test_what_arithmetic_limits_says_how_near_it_comes():
    # 50 operations in the median repeat's 2 seconds, where 100 a second are possible.
    comparison = replace(COMPARISON, flops=50.0)
    assert comparison.flops_per_second == 25.0
    assert " 25% " in printed(comparison)
    assert "%" not in printed(COMPARISON)


def test_what_has_a_limit_says_how_near_it_comes_and_uses_up_what_was_made_ready():
    fake = FakeWork()
    limits = iter([9.0, 1.0, 9.0, 3.0, 9.0, 1.0])
    case = replace(
        fake_case(fake, ours=[9.0, 9.0, 4.0, 9.0, 4.0, 9.0, 5.0], peer=[9.0, 9.0, 8.0, 9.0, 8.0, 9.0, 8.0]),
        untimed=1,
        limit=lambda: fake.work("limit", limits, 0),
    )
    comparison = compare(case, repeats=3, clock=fake.clock)
    assert comparison.ours.seconds == (4.0, 4.0, 5.0)
    assert comparison.limit == Measurement((1.0, 3.0, 1.0))
    assert comparison.share_of_limit(peak=1.0) == 0.25
    assert " 25% " in printed(comparison)


def test_json_has_every_repeat():
    written = json.loads(json.dumps(as_json(BENCHMARK, [COMPARISON])))
    assert written["name"] == "arithmetic"
    assert written["inputs"] == "numbers"
    (case,) = written["cases"]
    assert case == {
        "name": "sums",
        "peer": "an abacus",
        "ours_seconds": [2.0, 4.0, 1.0],
        "peer_seconds": [8.0, 4.0, 6.0],
        "flops_per_second": None,
        "limit_seconds": None,
        "ratio": {"median": 4.0, "lowest": 1.0, "highest": 6.0},
    }


@pytest.mark.parametrize("arguments", [["no-such"], ["matrix_nms", "--repeats", "0"]])
def test_wrong_use_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_each_is_found_by_its_name(name: str):
    assert import_module(f"tests.benchmarks.{name}").BENCHMARK.name == name


WITH_LITTLE_ELSE = """
import sys

class NothingOfACluster:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NothingOfACluster())
import tests.benchmarks.__main__ as benchmarks
for name in sys.argv[3].split():
    __import__(f"tests.benchmarks.{name}")
benchmarks.main(["input_paths", "matrix_nms", "--repeats", "1", "--json", sys.argv[1]])
"""


def test_those_for_a_gpu_need_nothing_of_a_cluster(tmp_path: Path):
    path = tmp_path / "benchmarks.json"
    stores = "fsspec s3fs boto3 botocore aiobotocore pyarrow webdataset simplejpeg cykooz_resizer"
    missing = f"ray mlflow pandas yaml psutil {stores}"
    of_a_gpu = " ".join(name for name in NAMES if name not in ("input_paths", "evaluation", "checkpoint"))
    command = [sys.executable, "-c", WITH_LITTLE_ELSE, str(path), missing, of_a_gpu]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "input_paths: left out, because" in done.stdout
    (written,) = json.loads(path.read_text())["benchmarks"]
    assert written["name"] == "matrix_nms"


def test_drawn_objects_are_of_the_sizes_asked_for():
    masks = ellipses(30, 60, 80, torch.Generator().manual_seed(0), smallest=8, largest=50)
    _, _, widths, heights = boxes_xywh(masks).unbind(dim=1)
    for sides in (widths, heights):
        assert sides.min() >= 7  # a side of 8 px may miss the centres of the pixels at both ends
        assert sides.max() <= 50
    with pytest.raises(ValueError, match="61 px does not fit"):
        ellipses(1, 60, 80, torch.Generator(), smallest=8, largest=61)


@pytest.mark.parametrize(
    "case",
    [
        *solo_targets_and_losses.cases(CPU, solo_targets_and_losses.TINY),
        *free_mask.cases(CPU, channels=64, map_size=(10, 14), photo_size=(60, 80)),
        *matrix_nms.cases(CPU, objects=4, masks_per_object=5, height=20, width=30),
    ],
    ids=lambda case: case.name,
)
def test_the_peer_gives_our_answer(case: Case):
    case.check()


@pytest.mark.usefixtures("ray_cluster")
def test_both_input_paths_give_batches_of_the_same_kind():
    for case in input_paths.cases(CPU, input_paths.TINY):
        case.check()
        assert case.limit is not None
        case.limit()


@pytest.mark.usefixtures("ray_cluster")
def test_evaluation_gives_pycocotools_numbers():
    for case in evaluation.cases(CPU, evaluation.TINY):
        case.check()
        assert 0 < case.ours().segm.ap50 < 1


@pytest.mark.usefixtures("ray_cluster")
def test_an_evaluations_straight_line_is_that_of_one_process_shared_by_the_cores():
    alone, shared, larger = growth.evaluations((4, 8), replace(evaluation.TINY, shards=2))
    assert [row.amount for row in (alone, shared, larger)] == [
        "4 photos, this process",
        "4 photos, tasks",
        "8 photos, tasks",
    ]
    cores = os.cpu_count() or 1
    assert (alone.straight, shared.straight) == (alone.seconds, alone.seconds / cores)
    assert larger.straight == 2 * shared.straight


def test_what_is_copied_for_a_checkpoint_is_what_would_be_saved():
    for case in checkpoint.cases(CPU, small_solo()):
        case.check()


def test_benchmarks_photos_are_about_as_large_as_coco_s():
    sizes = [len(input_paths.photo_file(480, 640, torch.Generator().manual_seed(seed))) for seed in range(3)]
    assert all(120_000 < size < 220_000 for size in sizes), sizes  # COCO's train2017 has 163 kB a photo


def test_a_step_takes_what_it_takes_once_training_is_under_way():
    # Told of every five steps, from 30 s on; after the first twenty, 5, 10 and 40 s go by from one to the next.
    assert ray_cost.step_seconds([30.0, 50.0, 60.0, 65.0, 70.0, 80.0, 120.0]) == 2.0


def test_a_pool_s_rate_is_that_of_the_time_when_all_of_it_is_at_work():
    # Two actors, batches of four: the first two and the last two do not count.
    arrivals = [(10.0, 4), (11.0, 8), (20.0, 12), (22.0, 16), (24.0, 20), (26.0, 24), (40.0, 28), (50.0, 32)]
    assert growth.steady_rate(arrivals, actors=2) == (24 - 12) / (26.0 - 20.0)


def test_both_sides_of_what_ray_costs_train_the_same(tmp_path: Path):
    job = ray_cost.job_of(tmp_path)
    assert job.pretrain.loop.steps == ray_cost.STEPS
    assert job.pretrain.loop.overlay_every == 0
    assert job.resources.max_workers == 1
    assert job.resources.gpus_per_worker == 0.0
    assert job.tracking.registered_model is None


def test_costs_are_sums_of_times_and_requests():
    rates = scaling.Rates(
        pretrain_gpu=100.0, pretrain_core=10.0, extract_gpu=50.0, train_gpu=16.0, train_core=20.0, predict_gpu=25.0
    )
    recipe = scaling.Recipe("photos", 36_000, scaling.READ_BLOCK / 2, epochs=10, solo_steps=3600)
    cost = scaling.cost_of(recipe, rates, scaling.Prices(gpu_hour=3.0, core_hour=0.5))
    assert (cost.pretrain_hours, cost.extract_hours, cost.train_hours, cost.predict_hours) == (1.0, 0.2, 2.0, 0.4)
    photos = 360_000 + 2 * 3600 * 16 + 2 * 36_000  # crops, two trainings, two labellings
    assert cost.core_hours == 10.0 + 187_200 / 20 / 3600
    assert cost.gets == photos / 2
    assert cost.puts == 72.0
    assert cost.gigabytes == photos * scaling.READ_BLOCK / 2 / 1e9
    assert cost.gpu_hours == 3.6
    # A GPU comes with more cores than it needs here: none is paid for.
    assert cost.dollars == pytest.approx(3.6 * 3.0 + photos / 2 * 4e-7 + 72 * 5e-6)
    many = replace(rates, pretrain_core=1.0)
    assert scaling.cost_of(recipe, many, scaling.Prices(gpu_hour=3.0, core_hour=0.5)).dollars == pytest.approx(
        cost.dollars + (100.0 + 2.6 - 24 * 3.6) * 0.5
    )


def test_what_gpus_share_is_asked_for_by_all_of_them():
    rates = scaling.Rates(
        pretrain_gpu=100.0, pretrain_core=10.0, extract_gpu=1.0, train_gpu=1.0, train_core=1.0, predict_gpu=1.0
    )
    assert scaling.load_of(8, rates, 1e6) == scaling.Load(80.0, 0.8, 8e8 / scaling.READ_BLOCK)
