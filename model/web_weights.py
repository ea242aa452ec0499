"""Owns the weights that the page offers: the described ones of a folder, loaded on demand."""

import argparse
import threading
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

from model.inference import VLMEngine
from model.weights import read_metadata

MAX_LOADED = 3  # models held at once; the one unused for longest goes


class Weights:
    """The weights of `--save_dir`, by file name; the one of the flags is there from the start.

    Safe to share between threads. A visitor picks by name: no path comes from outside.
    """

    def __init__(self, args: argparse.Namespace):
        """Loads the weight of the flags; raises as `VLMEngine.from_args`."""
        self._args = args
        self._lock, self._loading = threading.Lock(), threading.Lock()
        first = VLMEngine.from_args(args)
        self.default = first.path.stem
        self._loaded = OrderedDict({self.default: first})

    def names(self) -> dict[str, str]:
        """File stem -> what the page says about it, for each weight that has its `.json`."""
        found = {self.default: self.default}
        for path in sorted(self._args.save_dir.glob("*.json")):
            if not path.with_suffix(".pth").is_file():
                continue
            try:
                metadata = read_metadata(path.with_suffix(".pth"))
            except (ValueError, OSError):
                metadata = {}  # loading it says what is wrong
            config, stage = metadata.get("config", {}), metadata.get("stage")
            about = [str(stage)] if stage else []
            if "hidden_size" in config:
                kind = " MoE" if config.get("use_moe") else ""
                about.append(f"{config['hidden_size']} x {config.get('num_hidden_layers')}{kind}")
            found[path.stem] = f"{path.stem} ({', '.join(about)})" if about else path.stem
        return found

    def get(self, name: str) -> VLMEngine:
        """The model of one of `names`, loaded now if need be.

        Raises:
            ValueError, FileNotFoundError: there is no such weight, or it does not load.
        """
        with self._loading if name not in self._loaded else nullcontext():
            # Two visitors who pick the same weight load it once; others go on meanwhile.
            engine = self._loaded.get(name) or self._load(name)
            with self._lock:
                self._loaded[name] = engine
                self._loaded.move_to_end(name)
                while len(self._loaded) > MAX_LOADED:
                    self._loaded.popitem(last=False)
            return engine

    def _load(self, name: str) -> VLMEngine:
        if name not in self.names():
            raise ValueError(f"no weight {name!r} in {self._args.save_dir.name}/")
        if name == self.default:
            return VLMEngine.from_args(self._args)
        path = self._args.save_dir / f"{Path(name).name}.pth"
        sizes = {"hidden_size": None, "num_hidden_layers": None, "use_moe": None}
        return VLMEngine.from_args(
            argparse.Namespace(
                **vars(self._args) | sizes | {"load_from": "model", "weight": str(path)}
            )
        )
