"""Offers stand-ins for lmms-eval and VLMEvalKit: the parts that a model meets, as strict as theirs.

Source: lmms_eval/api/model.py, api/instance.py and models/registry_v2.py of lmms-eval 0.7.3;
vlmeval/vlm/base.py of VLMEvalKit.
"""

import abc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any


class Lmms(abc.ABC):
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size


class CacheHook:
    def add_partial(self, attr, req, res) -> None:
        assert isinstance(attr, str) and isinstance(req, tuple) and isinstance(res, str)


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class BaseModel:
    INTERLEAVE = False
    allowed_types = ("text", "image")

    def generate(self, message, dataset=None):
        assert all(set(part) == {"type", "value"} for part in message)
        assert all(part["type"] in self.allowed_types for part in message)
        answer = self.generate_inner(message, dataset)
        assert isinstance(answer, str)
        return answer


@dataclass(frozen=True)
class Request:
    """An `Instance` as far as a model looks: six arguments."""

    arguments: tuple[Any, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        assert len(self.arguments) == 6
        return self.arguments


@contextmanager
def standing_in(**contents: Any) -> Iterator[None]:
    """Modules of these names (with __ for a dot) that hold nothing but what is given."""
    names = {name.replace("__", "."): value for name, value in contents.items()}
    before = dict(sys.modules)
    try:
        for name, content in names.items():
            parts = name.split(".")
            for end in range(1, len(parts)):
                sys.modules[".".join(parts[:end])] = ModuleType(".".join(parts[:end]))
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(content)
        yield
    finally:
        ours = {"model.evaluation.lmms_eval_model", "model.evaluation.vlmevalkit_model"}
        roots = {name.split(".")[0] for name in names}
        for name in [n for n in sys.modules if n in ours or n.split(".")[0] in roots]:
            del sys.modules[name]
        sys.modules.update({n: m for n, m in before.items() if n.split(".")[0] in roots})


def resolve(manifest: ModelManifest) -> type:
    """The class of a chat model, with the checks of lmms-eval's registry."""
    assert manifest.chat_class_path is not None
    module, _, name = manifest.chat_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, Lmms) and found.is_simple is False
    return found
