"""Owns the environment of a run: versions of the libraries, the commit of this repository."""

import platform
import subprocess

import torch
import transformers

from model.machine.paths import ROOT


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the results."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass that a safe load refuses
        "transformers": transformers.__version__,
    }


def git_state() -> str:
    """Commit of this repository, with "+" if files differ from it; or a text if there is none."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
