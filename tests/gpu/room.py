"""Offers what the cases for a GPU share: the device, sizes, generated data, short runs."""

import contextlib
import gc
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from support.scripts import train_flags
from support.tiny_parts import make_records, make_tokenizer, make_tower
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset.collate import VLMCollator
from dataset.lm_dataset import VLMDataset
from model.machine.device import has_bfloat16, pad_multiple
from model.model_vlm import MiniMindVLM
from model.vlm_processor import VLMProcessor, load_tokenizer
from model.weights.build_model import placeholder_config
from trainer import train_pretrain_vlm, train_sft_vlm
from trainer.run import report

STAGES = {"pretrain": train_pretrain_vlm, "sft": train_sft_vlm}


class Skip(Exception):
    """This machine cannot do what a case is about; says why."""


@dataclass(frozen=True)
class Case:
    """One thing to try: `run(room)` returns its figures in a few words, or raises."""

    name: str
    run: Callable[["Room"], str]


@dataclass
class Room:
    """Where the cases run.

    Args:
        is_rehearsal: everything tiny and short, on a CPU, to try the cases themselves.
        deadline_s: when the runner wants to be done, by `time.monotonic`.
    """

    device: torch.device
    folder: Path
    is_rehearsal: bool
    deadline_s: float = float("inf")
    details: list[str] = field(default_factory=list)  # longer figures, for the end of the report

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Hidden size and layers."""
        return [(32, 2), (48, 3)] if self.is_rehearsal else [(512, 8), (768, 16)]

    @property
    def dtypes(self) -> list[str]:
        first = ["bfloat16"] if has_bfloat16(self.device) else []
        return [*first, "float16", "float32"]

    @cached_property
    def assets(self) -> Path:
        """A folder with `tokenizer/` and `tower/`: random weights of the size of ViT-B/16."""
        folder = self.folder / "assets"
        make_tokenizer(folder / "tokenizer")
        if self.is_rehearsal:
            make_tower(folder / "tower", image_size=32, patch_size=8)
        else:
            torch.manual_seed(0)
            CLIPVisionModel(
                CLIPVisionConfig(
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                    image_size=224,
                    patch_size=16,
                )
            ).save_pretrained(folder / "tower")
        return folder

    def records(self, num_records: int) -> tuple[Path, Path]:
        """Records about coloured pictures, some with two and some with none."""
        folder = self.folder / f"records_{num_records}"
        if not folder.is_dir():
            make_records(folder, num_records=num_records, multi=True)
        return folder / "data_0.jsonl", folder / "images"

    def model(self, **fields) -> tuple[MiniMindVLM, VLMProcessor]:
        """A new model of the first size on the device, in training mode, and its processor."""
        hidden_size, num_layers = self.sizes[0]
        fields = {"hidden_size": hidden_size, "num_hidden_layers": num_layers} | fields
        tokenizer, tower = load_tokenizer(self.assets / "tokenizer"), self.assets / "tower"
        torch.manual_seed(0)
        model = MiniMindVLM(placeholder_config(fields, tokenizer, tower), tower)
        processor = VLMProcessor(tokenizer, model.image_processor, config=model.config)
        return model.to(self.device).train(), processor

    def batch(self, processor: VLMProcessor, *, size: int = 8):
        """A batch as training loads it, from pinned memory where there is a GPU."""
        dataset = VLMDataset(*self.records(24), processor)
        collate = VLMCollator(pad_token_id=0, pad_multiple=pad_multiple(self.device))
        batch = collate([dataset[i] for i in range(size)])
        return batch.pin_memory() if self.is_cuda else batch

    def flags(self, out: Path, *, num_records: int = 32, **options) -> list[str]:
        """Of a short run that writes below `out`."""
        hidden_size, num_layers = self.sizes[0]
        flags = {
            "device": str(self.device),
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "batch_size": 4,
            "learning_rate": 0.001,
            "dtype": self.dtypes[0],
        }
        return train_flags(self.assets, out, *self.records(num_records), **(flags | options))

    def train(self, out: Path, *, stage: str = "pretrain", **options) -> list[dict]:
        """Run a stage; returns its metrics, a line each. Its own words come in the error only."""
        expected = options.pop("status", 0)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), without_curves():
            status = STAGES[stage].main(self.flags(out, **options))
        assert status == expected, f"{stage} ended with {status}:\n{said.getvalue()[-3000:]}"
        return read_metrics(out)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], object], *, times: int = 20) -> float:
        """Of one call, once it is warm."""
        for _ in range(3):
            work()
        self.synchronize()
        started_s = time.perf_counter()
        for _ in range(2 if self.is_rehearsal else times):
            work()
        self.synchronize()
        return 1000 * (time.perf_counter() - started_s) / (2 if self.is_rehearsal else times)

    def tidy(self) -> None:
        """Let go of what a case left on the device."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def read_metrics(out: Path) -> list[dict]:
    (path,) = (out / "out").glob("*_metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def without_curves() -> Iterator[None]:
    """Short runs draw none: they take longer than such a run, and want matplotlib."""
    former, report.draw_curves = report.draw_curves, lambda paths: None
    try:
        yield
    finally:
        report.draw_curves = former


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for as long as the block lasts."""
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """What makes the host wait for a CUDA device raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
