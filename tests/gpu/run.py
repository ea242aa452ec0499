"""Offers the command that starts `report.py` with a Python that has the packages it needs; this
file needs the standard library alone.

    python tests/gpu/run.py

A PyTorch that is installed is used as it is. Other packages that are missing come into a virtual
environment of their own, `.venv-gpu`, which sees that PyTorch; without a network a line says which.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-gpu"
# What the cases import, and the package that it is in.
NEEDED = {
    "transformers": "transformers",
    "numpy": "numpy",
    "PIL": "pillow",
    "jinja2": "jinja2",
    "tqdm": "tqdm",
    "huggingface_hub": "huggingface_hub",
    "pytest": "pytest",
}


def missing(python: str) -> list[str]:
    """The requirements that an interpreter lacks, as requirements.txt and its sister name them."""
    code = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if not "
    code += "importlib.util.find_spec(m)])"
    said = subprocess.run([python, "-c", code, *NEEDED], capture_output=True, text=True, check=True)
    return [requirement(NEEDED[module]) for module in said.stdout.split()]


def requirement(package: str) -> str:
    """A package with the range that this project names, such as `pillow>=12,<14`."""
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if re.match(rf"{package}[<>=]", line):
                return line.split("#")[0].strip()
    return package


def find_python() -> str:
    """An interpreter with PyTorch and all that is needed.

    Raises:
        ValueError: there is none, with the way out.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            f"{sys.executable} has no PyTorch; install its CUDA build (pip install torch), or name "
            "the Python that has it: make test-gpu PYTHON=/path/to/python"
        )
    if not missing(sys.executable):
        return sys.executable
    own = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    if not Path(own).is_file():
        command = [sys.executable, "-m", "venv", "--system-site-packages", str(VENV)]
        subprocess.run(command, check=True)
        see_parent(own)
    if lacking := missing(own):
        print(f"installing into {VENV.name}: {', '.join(lacking)}", flush=True)
        installed = subprocess.run([own, "-m", "pip", "install", "-q", *lacking])
        if installed.returncode:
            wanted = " ".join(f'"{item}"' for item in lacking)
            raise ValueError(f"missing, and could not be fetched: pip install {wanted}")
    return own


def see_parent(own: str) -> None:
    """Let the new environment see this Python's packages: where that is in a virtual environment
    itself, `--system-site-packages` shows those of the Python beneath only."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    said = subprocess.run([own, "-c", code], capture_output=True, text=True, check=True)
    (Path(said.stdout.strip()) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")


def main(argv: list[str]) -> int:
    """Becomes the report; returns the exit status where it cannot."""
    try:
        python = find_python()
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = [python, str(Path(__file__).with_name("report.py")), *argv]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
