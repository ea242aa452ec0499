"""Offers the command that sets up a CUDA build of PyTorch in its own virtual environment and runs
the tests that need one.

    python tests/cuda_build/run.py

No GPU is needed. The build is some 3 GB of downloads and 6 GB on the disk, in `.venv-cuda`; it
stays there for the next time, `rm -r .venv-cuda` removes it. This file needs Python alone.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-cuda"
DOWNLOAD_GB, DISK_GB = 3, 6
PACKAGES = ("torch", "transformers", "numpy", "pillow", "jinja2", "tqdm", "huggingface_hub",
            "pytest")  # fmt: skip


def requirements() -> list[str]:
    """What the tests import, with the ranges of requirements.txt and its sister."""
    lines = [
        line.split("#")[0].strip()
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if re.split("[<>=]", line)[0] in PACKAGES]


def check_machine() -> None:
    """Raise ValueError where no CUDA build can come."""
    if sys.platform == "darwin":
        raise ValueError("there is no CUDA build of PyTorch for macOS; use Linux or Windows")
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if not VENV.is_dir() and free_gb < DISK_GB + 1:
        raise ValueError(f"{ROOT} has {free_gb:.1f} GB free, this takes {DISK_GB}")


def set_up() -> str:
    """The environment's Python, with everything installed."""
    python = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    done = VENV / ".done"
    if done.is_file():
        return python
    print(
        f"a CUDA build of PyTorch comes into {VENV.name}: about {DOWNLOAD_GB} GB to download, "
        f"{DISK_GB} GB on the disk; rm -r {VENV.name} removes it",
        flush=True,
    )
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *requirements()], check=True)
    done.touch()
    return python


def build_of(python: str) -> str:
    """The environment's PyTorch, such as `2.14.1+cu130 (CUDA 13.0)`.

    Raises:
        ValueError: it is no CUDA build.
    """
    code = "import torch; print(torch.__version__, torch.version.cuda)"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    version, cuda = said.stdout.split()
    if cuda == "None":
        raise ValueError(
            f"pip gave {version}, which is no CUDA build; on Windows and ARM add "
            "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu130"
        )
    return f"{version} (CUDA {cuda})"


def main() -> int:
    """Returns the exit status of pytest; a test that is skipped there is a failure."""
    try:
        check_machine()
        python = set_up()
        print(f"PyTorch {build_of(python)}, Python {platform.python_version()}", flush=True)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = [
        python,
        *"-m pytest -p no:cacheprovider -q -m cuda_build".split(),
        str(ROOT / "tests" / "cuda_build"),
    ]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CUDA_BUILD_MUST_RUN": "1"}
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
