"""Offers tiny weights of every kind, their exports, and what foreign processes make of these."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support.scripts import ROOT, script_environment
from support.third_generation import make_assets3, make_loaded3
from support.tiny_vlm import make_loaded, picture, save_tiny

from model.export.__main__ import main, parse_args
from model.generation.engine import ask
from model.weights.build_model import LoadedModel, load_model

NUM_IMAGES = (0, 1, 3)  # of the samples
QUESTION = "\nWhat is in the picture?"


@dataclass
class Kit:
    """A weight on the disk, and the flags that name it with its tokenizer and tower."""

    weight: Path
    flags: list[str]

    def load(self) -> LoadedModel:
        """The model in float32, as every command loads it."""
        return load_model(parse_args([*self.flags, "--to", "pth", "--out", "none"]))


def make_kit(folder: Path, assets: Path, *, generation: int = 2, **fields: Any) -> Kit:
    """Save a tiny random model; `fields` are of its config."""
    make = make_loaded if generation == 2 else make_loaded3
    loaded = make(assets, **fields)
    name = f"sft_vlm_32{'_moe' if fields.get('use_moe') else ''}.pth"
    path = folder / name
    save_tiny(loaded, path)
    parts = {"weight": path, "tokenizer_path": assets / "tokenizer"}
    parts["vision_model_path"] = assets / "tower"
    return Kit(path, [text for k, v in parts.items() for text in (f"--{k}", str(v))])


def make_kits(folder: Path, assets: Path) -> dict[str, Kit]:
    """One of each generation, dense and with experts."""
    make_assets3(folder / "assets3")
    both = {2: assets, 3: folder / "assets3"}
    return {
        f"{generation}{'_moe' if use_moe else ''}": make_kit(
            folder / str(generation), where, generation=generation, use_moe=use_moe
        )
        for generation, where in both.items()
        for use_moe in (False, True)
    }


def export(kit: Kit, to: str, out: Path, *flags: str) -> None:
    """Run the command; it must do well."""
    assert main([*kit.flags, "--to", to, "--out", str(out), *flags]) == 0


def samples(folder: Path) -> list[dict[str, Any]]:
    """Messages in parts with 0, 1 and 3 pictures, which are written into the folder."""
    paths = [folder / f"{i}.png" for i in range(max(NUM_IMAGES))]
    for i, path in enumerate(paths):
        picture(6 + i).save(path)
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * n + [{"type": "text", "text": QUESTION}],
                }
            ],
            "images": [str(path) for path in paths[:n]],
        }
        for n in NUM_IMAGES
    ]


def run_foreign(folder: Path, jobs: dict[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Run exported folders where this repository cannot be imported.

    Args:
        jobs: exported folder -> its own fields of a job, of `support/foreign.py`.
    Returns:
        By folder: `class`, `answers`, and each sample's `logits` and `input_ids`.
    """
    asked = samples(folder)
    full = []
    for out, own in jobs.items():
        is_text = own["auto"] == "AutoModelForCausalLM"
        plain = {"messages": [{"role": "user", "content": QUESTION}], "images": []}
        common = {"folder": str(out), "out": f"{out}.result", "max_new_tokens": 0}
        full.append(common | {"samples": [plain] if is_text else asked} | own)
    path = folder / "jobs.json"
    path.write_text(json.dumps(full), encoding="utf-8")
    command = [sys.executable, "-I", str(ROOT / "tests" / "support" / "foreign.py"), str(path)]
    process = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env=script_environment() | {"HF_MODULES_CACHE": str(folder / "modules")},
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return {
        out: json.loads(Path(f"{out}.result.json").read_text())
        | load_file(f"{out}.result.safetensors")
        for out in jobs
    }


def our_batch(loaded: LoadedModel, folder: Path, index: int) -> dict[str, torch.Tensor]:
    """A sample as our own classes take it."""
    sample = samples(folder)[index]
    question = "<image>\n" * len(sample["images"]) + QUESTION
    messages = ask(question, num_images=len(sample["images"]))
    return loaded.processor.prompt_batch([(messages, sample["images"])])


@torch.no_grad()
def our_logits(loaded: LoadedModel, folder: Path, index: int) -> tuple[torch.Tensor, ...]:
    """Ids (T,), image mask (T,) and logits (T, V) of a sample, by our own classes."""
    batch = our_batch(loaded, folder, index)
    logits = loaded.model(batch["input_ids"], pixel_values=batch["pixel_values"]).logits[0]
    return batch["input_ids"][0], batch["image_mask"][0], logits
