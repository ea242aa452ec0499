"""Owns the weights that the page offers: those of a folder with metadata, loaded on demand."""

import argparse
import logging
import threading
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from model.generation.batch import ROWS
from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling, sampling_from
from model.serving.web.suggestions import Taught
from model.weights.build_model import check_native
from model.weights.metadata import read_metadata, tower_sha256

log = logging.getLogger(__name__)
MAX_LOADED = 3  # models in memory; beyond that the least recently used is dropped


class Weights:
    """The weights of `--save_dir`, by file name; the flags' one is loaded at the start.

    Safe to share between threads. A visitor chooses by name, never by path.
    """

    def __init__(self, args: argparse.Namespace, *, concurrency: int = ROWS):
        """Loads the weight of the flags; raises as `VLMEngine.from_args`.

        Args:
            concurrency: answers of each model that are decoded at once.
        """
        self._args, self._concurrency = args, concurrency
        self._lock, self._loading = threading.Lock(), threading.Lock()
        first = self._from(args)
        self.default = first.path.stem
        self._loaded = OrderedDict({self.default: first})
        self._taught: dict[str, Taught] = {}
        self.taught(self.default)  # a wrong description is told at the start
        self._tower = (first.model.vision_dir, tower_sha256(first.model.vision_encoder))
        # Path -> (times and sizes of its files, what the page shows).
        self._checked: dict[Path, tuple[tuple[Any, ...], str | None]] = {}

    def names(self) -> dict[str, str]:
        """File stem -> what the page shows, for each weight whose metadata says that it would load.

        Others are left out, with a line in the log when that is first found.
        """
        found = {self.default: self.default}
        for beside in sorted(self._args.save_dir.glob("*.json")):
            path = beside.with_suffix(".pth")
            try:
                files = tuple((s.st_mtime_ns, s.st_size) for s in (path.stat(), beside.stat()))
            except OSError:
                continue  # no weight beside it, or just deleted
            if self._checked.get(path, (None,))[0] != files:
                self._checked[path] = (files, self._about(path))
            about = self._checked[path][1]
            if about is not None:
                found[path.stem] = about
        return found

    def _about(self, path: Path) -> str | None:
        """What the page shows for a weight; None for one that would not load."""
        try:
            metadata = read_metadata(path)
            tower, expected = check_native(self._args, path), metadata.get("vision_tower_sha256")
            if expected and tower.resolve() == self._tower[0] and expected != self._tower[1]:
                raise ValueError(f"{path} was trained with another vision tower than {tower}")
            Taught.of(metadata, can_see=True, generation=2)
        except (ValueError, TypeError, OSError) as error:
            log.warning("not offered on the page: %s", error)
            return None
        config, stage = metadata.get("config", {}), metadata.get("stage")
        about = [str(stage)] if stage else []
        if "hidden_size" in config:
            kind = " MoE" if config.get("use_moe") else ""
            about.append(f"{config['hidden_size']} x {config.get('num_hidden_layers')}{kind}")
        return f"{path.stem} ({', '.join(about)})" if about else path.stem

    def taught(self, name: str) -> Taught:
        """What one of `names` was taught; loads it, and raises, as `get`."""
        engine = self.get(name)
        if name not in self._taught:
            about, can_see = read_metadata(engine.path), engine.can_see
            self._taught[name] = Taught.of(about, can_see=can_see, generation=engine.generation)
        return self._taught[name]

    def get(self, name: str) -> VLMEngine:
        """The model of one of `names`, loaded now if need be.

        Raises:
            ValueError, FileNotFoundError: there is no such weight, or it does not load.
        """
        with self._loading if name not in self._loaded else nullcontext():
            # Two visitors who choose the same weight load it once; other weights stay usable.
            engine = self._loaded.get(name) or self._load(name)
            with self._lock:
                self._loaded[name] = engine
                self._loaded.move_to_end(name)
                while len(self._loaded) > MAX_LOADED:
                    self._loaded.popitem(last=False)
            return engine

    def sampling(self, engine: VLMEngine) -> Sampling:
        """What the flags say for one of the weights, and its generation where they say nothing."""
        thinking = {"open_thinking": self._args.open_thinking and engine.can_think}
        return sampling_from(argparse.Namespace(**vars(self._args) | thinking), engine.generation)

    def _load(self, name: str) -> VLMEngine:
        if name not in self.names():
            raise ValueError(f"no weight {name!r} in {self._args.save_dir.name}/")
        if name == self.default:
            return self._from(self._args)
        path = self._args.save_dir / f"{Path(name).name}.pth"
        sizes = {"hidden_size": None, "num_hidden_layers": None, "use_moe": None}
        named = {"load_from": "model", "weight": str(path)}
        return self._from(argparse.Namespace(**vars(self._args) | sizes | named))

    def _from(self, args: argparse.Namespace) -> VLMEngine:
        """Each model decodes its visitors' answers in a batch of its own."""
        return VLMEngine.from_args(args).batched(self._concurrency)
