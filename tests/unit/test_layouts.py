"""Other projects' ResNets become ours and ours theirs: the same outputs, every key accounted for, no code run."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from freesolo import cli
from freesolo.errors import UsageError
from freesolo.models.array_pickle import read_array_pickle, write_array_pickle
from freesolo.models.layouts import to_detectron2, to_torchvision
from freesolo.models.model_file import load_model, save_model
from freesolo.models.resnet import ResNet, build_resnet
from freesolo.models.weights import (
    backbone_state_dict,
    digest,
    export_backbone,
    import_backbone,
    load_backbone,
    read_state_dict,
)
from freesolo.settings import Backbone, HeadSettings, SoloModelSettings
from freesolo.solo.model import Segmenter

# Of the largest value of a map: float32 summed in another order, and, folded, the first convolution's weights rounded
# once more; 50 layers carry that on.
TOLERANCE = 1e-4
MEAN = (123.675, 116.280, 103.530)  # RGB
DEVIATION = (58.395, 57.120, 57.375)


@functools.cache
def random_state(name: str) -> Mapping[str, Tensor]:
    """A network's tensors with statistics that a forgotten or misplaced one would show."""
    generator = torch.Generator().manual_seed(0)
    state = backbone_state_dict(build_resnet(name).initialise(generator))
    for key, value in state.items():
        if key.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "1.weight")) and value.ndim == 1:
            value.uniform_(0.5, 1.5, generator=generator)
        elif key.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1, generator=generator)
    return state


def photos(count: int = 1, height: int = 45, width: int = 70) -> Tensor:
    """RGB in 0..255, of a size at which a stride elsewhere shows."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(9)) * 255


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


@torch.no_grad()
def outputs(name: str, state: Mapping[str, Tensor], pixels: Tensor) -> tuple[Tensor, ...]:
    network = build_resnet(name)
    network.load_state_dict(dict(state))
    return tuple(network.eval()(pixels))


@torch.no_grad()
def detectron2_forward(weights: Mapping[str, Tensor], images: Tensor, *, stride_in_1x1: bool) -> list[Tensor]:
    """A bottleneck ResNet written from the paper's table 1, of tensors by detectron2's names."""

    def layer(features: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        features = functional.conv2d(features, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, variance, scale, shift = (
            weights[f"{name}.norm.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (features - mean) / (variance + 1e-5).sqrt() * scale + shift

    features = functional.max_pool2d(layer(images, "stem.conv1", 2).relu(), 3, 2, 1)
    stages = []
    for stage in (2, 3, 4, 5):
        block = 0
        while f"res{stage}.{block}.conv1.weight" in weights:
            name = f"res{stage}.{block}"
            stride = 2 if stage > 2 and block == 0 else 1
            shortcut = layer(features, f"{name}.shortcut", stride) if block == 0 else features
            inner = layer(features, f"{name}.conv1", stride if stride_in_1x1 else 1).relu()
            inner = layer(inner, f"{name}.conv2", 1 if stride_in_1x1 else stride).relu()
            features = (layer(inner, f"{name}.conv3") + shortcut).relu()
            block += 1
        stages.append(features)
    return stages


def assert_same_maps(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() < TOLERANCE * theirs.abs().max()


def caffe2_blobs(state: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """By MSRA's names: batch norms are a scale and a shift alone, and the first convolution has a bias of zeros."""
    blobs = {}
    for key, value in to_detectron2(state).items():
        if re.search(r"running|num_batches", key):
            continue
        key = key.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.", "").replace("shortcut", "branch1")
        key = re.sub(r"\.conv([123])", lambda number: ".branch2" + "abc"[int(number[1]) - 1], key)
        key = re.sub(r"\.?norm\.weight$|_bn\.weight$", "_bn_s", key)
        key = re.sub(r"\.?norm\.bias$|_bn\.bias$", "_bn_b", key)
        blobs[re.sub(r"\.weight$", "_w", key).replace(".", "_")] = value.numpy()
    return blobs | {"conv1_b": np.zeros(64, np.float32), "fc1000_w": np.zeros((5, 2048), np.float32)}


# --- stride ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stride_in_1x1"), [("resnet50", False), ("resnet50_caffe", True)])
def test_both_strides_are_the_papers(name: str, stride_in_1x1: bool) -> None:
    state, pixels = random_state(name), normalised(photos())
    found = outputs(name, state, pixels)
    expected = detectron2_forward(to_detectron2(state), pixels, stride_in_1x1=stride_in_1x1)
    other = detectron2_forward(to_detectron2(state), pixels, stride_in_1x1=not stride_in_1x1)
    assert_same_maps(found, expected)
    with pytest.raises(AssertionError):
        assert_same_maps(found, other)


def test_a_shallow_network_has_no_1x1_to_stride_in() -> None:
    with pytest.raises(ValueError, match="depth=18: only blocks of ResNet-50 and -101"):
        ResNet(18, stride_in_1x1=True)


def test_a_model_file_says_where_its_stride_is(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_model(path, "backbone", {"backbone": "resnet50_caffe"}, {"conv1.weight": torch.zeros(1)}, {})
    assert read_state_dict(path, backbone="resnet50_caffe").keys() == read_state_dict(path).keys()
    with pytest.raises(UsageError, match=r"of a resnet50_caffe, the configuration says resnet50: .*set backbone to"):
        read_state_dict(path, backbone="resnet50")
    read_state_dict(path, backbone="resnet101")  # which its shapes will tell


# --- in -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up."])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_detectron2_names_and_back(name: str, prefix: str) -> None:
    state = random_state(name)
    theirs = {prefix + key: value for key, value in to_detectron2(state).items()}
    assert f"{prefix}res3.0.shortcut.norm.running_var" in theirs
    assert f"{prefix}stem.conv1.norm.bias" in theirs
    assert not any("layer" in key or "bn" in key or "downsample" in key for key in theirs)
    back = to_torchvision(theirs)
    assert digest({key.removeprefix(prefix): value for key, value in back.items()}) == digest(state)


def test_a_detector_of_detectron2_is_imported(tmp_path: Path) -> None:
    state = random_state("resnet50_caffe")
    beside = [
        "backbone.fpn_lateral2.weight",
        "backbone.fpn_output5.bias",
        "roi_heads.box_head.fc1.weight",
        "pixel_mean",
    ]
    beside += ["proposal_generator.rpn_head.conv.weight"]
    model = {f"backbone.bottom_up.{key}": value.numpy() for key, value in to_detectron2(state).items()}
    model |= {key: np.zeros(2, np.float32) for key in beside}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": model, "__author__": "Detectron2 Model Zoo"}))
    imported = import_backbone(path, stride_in_1x1=True, pixels="bgr")
    assert imported.backbone == "resnet50_caffe"
    assert sorted(imported.report.ignored) == sorted(beside)
    pixels = photos()
    bgr = (pixels - torch.tensor(MEAN)[:, None, None]).flip(1)
    expected = detectron2_forward(to_detectron2(state), bgr, stride_in_1x1=True)
    assert_same_maps(outputs("resnet50_caffe", imported.state_dict, normalised(pixels)), expected)
    with pytest.raises(UsageError, match=r"in detectron2's layout; .* freesolo weights import"):
        load_backbone(build_resnet("resnet50"), read_state_dict(path), source="w")


def test_msras_weights_are_imported(tmp_path: Path) -> None:
    state = random_state("resnet50_caffe")
    blobs = caffe2_blobs(state)
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_bn_b", "res5_2_branch2c_w"} <= blobs.keys()
    blobs["conv1_b"] = np.linspace(-1, 1, 64, dtype=np.float32)
    momentum = ("conv1_w_momentum", "res3_0_branch2a_w_momentum", "res_conv1_bn_s_momentum")  # Detectron's optimiser's
    blobs |= {name: np.zeros(2, np.float32) for name in momentum}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(blobs, protocol=2))
    imported = import_backbone(path, stride_in_1x1=True, pixels="bgr")
    assert sorted(imported.report.ignored) == sorted(("fc.weight", *momentum))
    pixels = photos()
    bgr = (pixels - torch.tensor(MEAN)[:, None, None]).flip(1)
    affine = {key: value.clone() for key, value in to_detectron2(state).items()}
    for key, value in affine.items():
        if key.endswith("running_mean"):
            value.zero_()
        elif key.endswith("running_var"):
            value.fill_(1 - 1e-5)
    affine["stem.conv1.norm.running_mean"] = -torch.from_numpy(blobs["conv1_b"])
    expected = detectron2_forward(affine, bgr, stride_in_1x1=True)
    assert_same_maps(outputs("resnet50_caffe", imported.state_dict, normalised(pixels)), expected)


def test_a_detector_of_mmdet_loads_as_it_is(tmp_path: Path) -> None:
    state = random_state("resnet18")
    beside = ["neck.lateral_convs.0.conv.weight", "rpn_head.rpn_conv.weight", "roi_head.bbox_head.fc_cls.bias"]
    detector = {f"backbone.{key}": value for key, value in state.items()} | {key: torch.zeros(2) for key in beside}
    torch.save({"meta": {"epoch": 12}, "state_dict": detector}, tmp_path / "mmdet.pth")
    network = build_resnet("resnet18")
    report = load_backbone(network, read_state_dict(tmp_path / "mmdet.pth"), source="mmdet.pth")
    assert (report.prefix, sorted(report.ignored)) == ("backbone.", sorted(beside))
    assert digest(backbone_state_dict(network)) == digest(state)


def detectron2_with(changes: Mapping[str, Any]) -> dict[str, Any]:
    model = {key: value.numpy() for key, value in to_detectron2(random_state("resnet18")).items()}
    return {"model": {key: value for key, value in (model | changes).items() if value is not None}}


@pytest.mark.parametrize(
    ("content", "stride_in_1x1", "message"),
    [
        (detectron2_with({"res3.0.conv1.weight": None}), False, r"1 missing \(layer2.0.conv1.weight\)"),
        (detectron2_with({"res3.0.attention.weight": np.zeros(1)}), False, r"1 unexpected \(res3.0.attention.weight\)"),
        (detectron2_with({"res2.0.conv1.norm.bias": np.zeros(3)}), False, r"1 of another shape \(layer1.0.bn1.bias"),
        (detectron2_with({"conv1.weight": np.zeros(3)}), False, "two keys of it are names of the same tensor"),
        (detectron2_with({}), True, "a ResNet-18 with its stride in 1x1 convolutions, which is not here"),
        (detectron2_with({"res4.5.conv1.weight": np.zeros(1)}), False, "no plain ResNet, which is not here"),
        ({"conv1_w": np.zeros(1), "res_conv1_bn_s": np.zeros(1)}, True, "the scale or the shift of bn1 is missing"),
        ({"conv1_w": np.zeros(1), "conv1_b": np.zeros(1)}, True, "the normalisation of conv1 is missing"),
        ({"model": {"vit.weight": np.zeros(1)}}, False, "no ResNet found"),
        ({"model": {}}, False, "holds no state dict"),
        ({"model": {"conv1.weight": "text"}}, False, "holds no state dict"),
        ([1, 2], False, "holds no state dict"),
        (b"", False, "R.pkl: cannot be read"),
        (b"\x80\x02}", False, r"R.pkl: cannot be read .*damaged, or no pickle of arrays"),
    ],
)
def test_what_is_no_backbone_is_refused_in_words(
    content: Any, stride_in_1x1: bool, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "R.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
    with pytest.raises(UsageError, match=message):
        import_backbone(path, stride_in_1x1=stride_in_1x1, pixels="rgb")


def test_a_model_file_is_not_imported_again(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", "backbone", {"backbone": "resnet18"}, random_state("resnet18"), {})
    with pytest.raises(UsageError, match="a model file of freesolo already"):
        import_backbone(tmp_path / "model.pt", stride_in_1x1=False, pixels="rgb")


# --- out ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "backbone"),
    [
        *((layout, "resnet18") for layout in ("torchvision", "timm", "detectron2")),
        *((layout, "resnet50") for layout in ("torchvision", "timm", "detectron2")),
        ("detectron2", "resnet50_caffe"),  # the others have no stride in the first 1x1 convolution
    ],
)
@pytest.mark.parametrize("kind", ["backbone", "segmenter"])
def test_out_and_in_again_is_the_same_network(kind: str, layout: str, backbone: Backbone, tmp_path: Path) -> None:
    settings = SoloModelSettings(
        backbone=backbone,
        fpn_channels=32,
        head=HeadSettings(tower_channels=32, mask_tower_channels=32),
        grid_sizes=(5,) * 5,
    )
    segmenter = Segmenter(settings).initialise(torch.Generator().manual_seed(0))
    segmenter.backbone.load_state_dict(random_state(backbone))
    model = segmenter if kind == "segmenter" else segmenter.backbone
    save_model(tmp_path / "model.pt", kind, settings.model_dump(mode="json"), model.state_dict(), {})  # type: ignore[arg-type]
    exported = tmp_path / f"out.{'pkl' if layout == 'detectron2' else 'pth'}"
    assert cli.main(["export", "weights", str(tmp_path / "model.pt"), str(exported), "--layout", layout]) == 0
    imported = tmp_path / "again.pt"
    stride_in = "1x1" if backbone == "resnet50_caffe" else "3x3"
    command = ["weights", "import", str(exported), str(imported), "--stride-in", stride_in, "--pixels", "rgb"]
    assert cli.main(command) == 0
    again = load_model(imported, "backbone", backbone=backbone)
    assert digest(again.state_dict) == digest(segmenter.backbone.state_dict())
    pixels = normalised(photos())
    before, after = (outputs(backbone, state, pixels) for state in (segmenter.backbone.state_dict(), again.state_dict))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(before, after, strict=True))
    assert again.lineage["imported"] == exported.name


def test_what_detectron2_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As its DetectionCheckpointer does: a pickle of arrays under `model`, with an author, to be matched by suffix."""
    state = random_state("resnet50_caffe")
    save_model(tmp_path / "model.pt", "backbone", {"backbone": "resnet50_caffe"}, state, {})
    path = tmp_path / "R-50.pkl"
    assert cli.main(["export", "weights", str(tmp_path / "model.pt"), str(path), "--layout", "detectron2"]) == 0
    said = capsys.readouterr().out
    assert (
        "INPUT.FORMAT=RGB, MODEL.PIXEL_MEAN=[123.675, 116.28, 103.53], MODEL.PIXEL_STD=[58.395, 57.12, 57.375]" in said
    )
    assert "MODEL.RESNETS.STRIDE_IN_1X1=True" in said
    content = path.read_bytes()
    assert b"numpy._core" not in content  # which NumPy 1 does not have
    loaded = pickle.loads(content, encoding="latin1")
    assert (loaded["__author__"], loaded["matching_heuristics"]) == ("freesolo", True)
    theirs = {key: torch.from_numpy(value) for key, value in loaded["model"].items()}
    pixels = normalised(photos())
    expected = detectron2_forward(theirs, pixels, stride_in_1x1=True)
    assert_same_maps(outputs("resnet50_caffe", state, pixels), expected)


def test_torchvision_has_no_stride_in_1x1(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", "backbone", {"backbone": "resnet50_caffe"}, {"conv1.weight": torch.zeros(1)}, {})
    for layout in ("torchvision", "timm"):
        with pytest.raises(UsageError, match=f"{layout} has no resnet50_caffe"):
            export_backbone(load_model(tmp_path / "model.pt"), layout, tmp_path / "out.pth")  # type: ignore[arg-type]
    save_model(tmp_path / "none.pt", "backbone", {"backbone": "resnet18"}, {}, {})
    with pytest.raises(UsageError, match="no ResNet in this backbone"):
        export_backbone(load_model(tmp_path / "none.pt"), "detectron2", tmp_path / "out.pkl")


# --- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_and_plain_values_are_read(tmp_path: Path, protocol: int) -> None:
    content = {
        "rows": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">i4"),
        "half": np.ones(2, np.float16),
        "number": np.array(7),
        "none": np.zeros((0, 3), np.float32),
        "scalar": np.float64(0.5),
        "plain": ["text", 1, 2.5, None, True, {"a": (1,)}],
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_array_pickle(tmp_path / "a.pkl")
    for name in ("rows", "columns", "big endian", "half", "number", "none"):
        assert read[name].numpy().tolist() == content[name].tolist()
        assert read[name].shape == content[name].shape
    assert read["half"].dtype == torch.float16
    assert (read["scalar"], read["plain"]) == (0.5, ["text", 1, 2.5, None, True, {"a": [1]}])
    read["rows"].zero_()  # it is no view of the file


def test_written_arrays_are_read(tmp_path: Path) -> None:
    write_array_pickle({"a": np.arange(3.0), "b": {"c": np.zeros((0, 2))}}, tmp_path / "a.pkl")
    read = read_array_pickle(tmp_path / "a.pkl")
    assert read["a"].tolist() == [0, 1, 2]
    assert read["b"]["c"].shape == (0, 2)


class Intruder:
    """What would run on unpickling, were pickles trusted."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call[0], self.call[1:]


HEAD = b"\x80\x02"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\n\x85U\x01btR"
TYPE = b"cnumpy\ndtype\n(U\x02%s\x89\x88tR(I3\nU\x01<NNNI-1\nI-1\nI0\ntb"
NAN = np.array([1, np.nan], np.float32)


def array_with(state: bytes) -> bytes:
    return HEAD + ARRAY + b"(I1\n" + state + b"tb."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02cos\nsystem\n(U\x05touchtR.", r"'os.system', which is no array or plain value: .* not run"),
        (b"\x80\x02cbuiltins\neval\nU\x0213\x85R.", "'builtins.eval'"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.", "'builtins.exec'"),
        (b"\x80\x02(ios\nsystem\n.", "'os.system'"),
        (b"\x80\x02cnumpy\nload\n.", "'numpy.load'"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct.__globals__\n.", "no array or plain value"),
        (b"\x80\x02U\x01aQ.", "refers to something outside"),
        (b"\x80\x02\x82\x01.", "refers to something outside"),
        (b"\x80\x02cnumpy\nndarray\n.", "it holds a ArrayType"),
        (b"\x80\x02cnumpy\nndarray\n}U\x01aI1\nsb.", "damaged"),  # setting an attribute of what a name stands for
        (b"\x80\x02cnumpy\nndarray\nN}U\x01aI1\ns\x86b.", "damaged"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "damaged"),  # making another of it
        (HEAD + ARRAY + b".", "an array without numbers"),
        (HEAD + b"cnumpy\ndtype\nU\x02O8\x85R.", "an array of 'O8', which are no numbers"),
        (array_with(b"(I3\nt" + TYPE % b"f4" + b"\x89U\x04abcd"), r"shape \(3,\) with more or fewer numbers"),
        (array_with(b"(I-1\nt" + TYPE % b"f4" + b"\x89U\x04abcd"), "described wrongly"),
        (array_with(b"(I1000000000000\nt" + TYPE % b"f4" + b"\x89U\x04abcd"), "with more or fewer numbers"),
        (array_with(b"(I1\ntU\x01f\x89U\x04abcd"), "described wrongly"),
        (array_with(b"(I1\nt" + TYPE % b"f4" + b"\x89]"), "described wrongly"),
        (pickle.dumps(NAN, protocol=2), "values that are NaN or infinite"),
        (pickle.dumps(np.array(["a"], object), protocol=2), "which are no numbers"),
        (pickle.dumps(np.array([(1, 2)], [("a", "i4"), ("b", "i4")]), protocol=2), "which are no numbers"),
        (pickle.dumps({1, 2}, protocol=4), "it holds a set"),
        (b"\x80\x02]q\x00h\x00a.", "64 deep"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", ""),
        (b"\x80\x02]" + b"q\x000](h\x00h\x00e" * 40 + b".", "more than 1000000 values"),
        (b"\x80\x02\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
    ],
)
def test_a_malicious_pickle_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    if not message:  # a number of a note that would be a table of gigabytes is nothing to mind
        assert read_array_pickle(path) == []
        return
    with pytest.raises(ValueError, match=message):
        read_array_pickle(path)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    content = {"model": {"conv1.weight": np.zeros(1)}, "hook": Intruder(Path.touch, tmp_path / "ran")}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UsageError, match=r"w\.pkl: cannot be read .*which is not run"):
        import_backbone(tmp_path / "w.pkl", stride_in_1x1=True, pixels="bgr")
    assert not (tmp_path / "ran").exists()
