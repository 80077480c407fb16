from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

from freesolo.errors import UsageError
from freesolo.models.download import sha256_of_file
from freesolo.models.model_file import load_model, save_model
from freesolo.models.torch_file import write_torch_file
from freesolo.models.weights import read_state_dict
from freesolo.settings import SoloModelSettings

STATE = {"conv.weight": torch.arange(12.0).reshape(3, 4), "bn.num_batches_tracked": torch.tensor(7)}


@pytest.fixture
def backbone_file(tmp_path: Path) -> Path:
    save_model(tmp_path / "model.pt", "backbone", {"backbone": "resnet18"}, STATE, {"dataset": "s3://b/photos"})
    return tmp_path / "model.pt"


def test_what_is_saved_is_loaded(backbone_file: Path) -> None:
    model = load_model(backbone_file, "backbone", backbone="resnet18")
    assert (model.kind, model.settings, model.lineage) == (
        "backbone",
        {"backbone": "resnet18"},
        {"dataset": "s3://b/photos"},
    )
    assert list(model.state_dict) == list(STATE)
    assert all(torch.equal(model.state_dict[name], value) for name, value in STATE.items())
    assert model.state_dict["bn.num_batches_tracked"].dtype == torch.int64
    assert model.sha256 == sha256_of_file(backbone_file)


def test_the_settings_of_a_segmenter_read_back_equal(tmp_path: Path) -> None:
    settings = SoloModelSettings(backbone="resnet18", num_categories=3)
    save_model(tmp_path / "m.pt", "segmenter", settings.model_dump(), {}, {})
    loaded = load_model(tmp_path / "m.pt", "segmenter", backbone="resnet18")
    assert SoloModelSettings.model_validate_json(json.dumps(loaded.settings)) == settings
    assert loaded.state_dict == {}


def test_equal_models_make_equal_files(tmp_path: Path) -> None:
    first = save_model(tmp_path / "a.pt", "backbone", {"backbone": "resnet18"}, STATE, {})
    second = save_model(tmp_path / "b.pt", "backbone", {"backbone": "resnet18"}, STATE, {})
    assert first == second == sha256_of_file(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    large = torch.zeros(1_000_000)
    save_model(tmp_path / "m.pt", "backbone", {}, {"w": large[:10]}, {})
    assert (tmp_path / "m.pt").stat().st_size < 10_000


def test_a_file_is_replaced_whole_and_nothing_else_is_left(backbone_file: Path) -> None:
    save_model(backbone_file, "backbone", {"backbone": "resnet50"}, {}, {})
    assert load_model(backbone_file).settings == {"backbone": "resnet50"}
    with pytest.raises(TypeError):
        save_model(backbone_file, "backbone", {"backbone": Path("x")}, {}, {})
    assert load_model(backbone_file).settings == {"backbone": "resnet50"}
    assert [file.name for file in backbone_file.parent.iterdir()] == ["model.pt"]


def test_a_reader_of_published_checkpoints_finds_the_tensors(backbone_file: Path) -> None:
    assert list(read_state_dict(backbone_file)) == list(STATE)


def test_the_wrong_kind_and_the_wrong_backbone_are_named(backbone_file: Path) -> None:
    with pytest.raises(UsageError, match=r"holds a backbone, and a segmenter is needed"):
        load_model(backbone_file, "segmenter")
    with pytest.raises(UsageError, match=r"a resnet18 backbone, the configuration says resnet50"):
        load_model(backbone_file, backbone="resnet50")


def test_a_newer_format_is_named(backbone_file: Path) -> None:
    content = torch.load(backbone_file, weights_only=True)
    torch.save({**content, "format_version": 2}, backbone_file)
    with pytest.raises(UsageError, match=r"of format 2, this version of freesolo reads format 1"):
        load_model(backbone_file)


def test_what_is_no_model_file_is_refused(backbone_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model file"):
        load_model(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UsageError, match=r"text\.pt: cannot be read as a model file"):
        load_model(tmp_path / "text.pt")
    torch.save({"state_dict": STATE}, tmp_path / "published.pth")
    with pytest.raises(UsageError, match="not a model file of freesolo"):
        load_model(tmp_path / "published.pth")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(UsageError, match="not a model file of freesolo"):
        load_model(tmp_path / "list.pt")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(backbone_file.read_bytes()[:-200])
    with pytest.raises(UsageError, match=r"cut\.pt: cannot be read as a model file"):
        load_model(cut)


class _Touch:
    """Executed by an unsafe reader."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (Path(self.path),)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"format_version": 1, "kind": _Touch(str(tmp_path / "touched"))}, tmp_path / "bad.pt")
    with pytest.raises(UsageError, match="cannot be read"):
        load_model(tmp_path / "bad.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("how", ["zip", "old", "plain pickle"])
def test_the_code_is_named_and_no_one_is_told_to_run_it(tmp_path: Path, how: str) -> None:
    path, content = tmp_path / "bad.pt", {"format_version": 1, "kind": _Touch(str(tmp_path / "touched"))}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UsageError) as caught:
        load_model(path)
    said = str(caught.value)
    assert "\n" not in said
    assert "weights_only" not in said  # torch's own advice is to switch the check off
    if how == "zip":
        assert re.search("it holds '[a-zA-Z.]+', which is no tensor or plain value: code of whoever made it", said)
    assert not (tmp_path / "touched").exists()


def rezipped(path: Path, compression: int, change: dict[str, bytes]) -> None:
    """A model file's archive written anew with some members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change.get(name.rpartition("/")[2], data))


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    save_model(path, "backbone", {"backbone": "resnet18"}, {"w": torch.zeros(3)}, {})
    rezipped(path, zipfile.ZIP_DEFLATED, {"0": bytes(200 * 2**20)})
    assert path.stat().st_size < 2**20
    with pytest.raises(UsageError, match="an archive with compressed members, which torch does not write"):
        load_model(path)


def test_a_tensor_with_fewer_numbers_than_its_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    for tensor in (torch.zeros(1).expand(10**12), torch.zeros(5, device="meta"), torch.zeros(5).to_sparse()):
        torch.save({"state_dict": {"w": tensor}}, path)
        with pytest.raises(UsageError, match=r"fewer numbers than that|sparse, nested, quantised or without numbers"):
            read_state_dict(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(tmp_path: Path, value: float) -> None:
    path = tmp_path / "spoiled.pt"
    torch.save({"state_dict": {"bn.running_var": torch.tensor([1.0, value]), "w": torch.zeros(2)}}, path)
    with pytest.raises(UsageError, match=r"state_dict\.bn\.running_var has values that are NaN or infinite"):
        read_state_dict(path)


def test_numbers_of_a_type_that_is_not_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    torch.save({"state_dict": {"w": torch.zeros(2).to(torch.float8_e4m3fn)}}, path)
    with pytest.raises(UsageError, match=r"state_dict\.w is of torch\.float8_e4m3fn, which is not read; convert it"):
        read_state_dict(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_called_one() -> None:
    """torch itself reports a position in an archive."""
    with pytest.raises(OSError, match="No space left on device"):
        write_torch_file({"w": torch.zeros(10**6)}, Path("/dev/full"))


def test_a_list_in_itself_is_refused(tmp_path: Path) -> None:
    endless: list[object] = []
    endless.append(endless)
    laughs: list[object] = []
    for _ in range(40):
        laughs = [laughs, laughs]
    for content in (endless, laughs):
        torch.save({"settings": content}, tmp_path / "bad.pt")
        with pytest.raises(UsageError, match="it holds more than 1000000 values"):
            load_model(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("kind", "virus", "holds a 'virus', which this version"),
        ("kind", ["backbone"], "holds a .* which this version"),
        ("format_version", True, "a model file of format True"),
        ("settings", ["backbone"], "settings is not plain JSON: it is a list"),
        ("settings", {"a": torch.zeros(1)}, "settings is not plain JSON"),
        ("lineage", {"a": float("nan")}, "lineage is not plain JSON"),
        ("state_dict", {"w": 1}, "state_dict is not tensors by name"),
        ("state_dict", {1: torch.zeros(1)}, "state_dict is not tensors by name"),
    ],
)
def test_fields_are_what_the_format_says(tmp_path: Path, field: str, value: object, complaint: str) -> None:
    content = {"format_version": 1, "kind": "backbone", "settings": {}, "state_dict": {}, "lineage": {}}
    torch.save(content | {field: value}, tmp_path / "bad.pt")
    with pytest.raises(UsageError, match=complaint):
        load_model(tmp_path / "bad.pt")
