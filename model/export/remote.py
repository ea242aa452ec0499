"""Owns the folder of our own classes: code files in it, for `trust_remote_code=True`."""

import ast
import copy
import json
import re
from pathlib import Path
from typing import Any

import torch

from model.export.chat_template import with_parts
from model.export.files import save_common, save_config
from model.export.remote_processor import MiniMindVProcessor
from model.export.source import Source
from model.generations import MODEL_DIR
from model.model_vlm import VLMConfig
from model.vlm_processor import IMAGE_TAG
from model.weights.strict_loading import HEAD

CLASS_NAME = "MiniMindVForConditionalGeneration"
MODEL_CODE, PROCESSOR_CODE = "model.export.remote_model", "model.export.remote_processor"
CONFIG_CODE = "model.model_vlm"
OWN_IMPORT = re.compile(r"^from (model\.[\w.]+) import", flags=re.MULTILINE)


def write_remote(source: Source, folder: Path, *, dtype: str) -> str:
    """Write a folder of our own classes, with their code, the tower and the processor.

    Returns:
        The name of the class that loads it.
    """
    own, vision = copy.deepcopy(source.config), source.vision
    assert isinstance(own, VLMConfig) and vision is not None
    own.vision_config = json.loads(vision.config.to_json_string(use_diff=False))
    own.architectures = [CLASS_NAME]
    own.auto_map = {
        "AutoConfig": f"{_flat(CONFIG_CODE)}.{VLMConfig.__name__}",
        "AutoModelForImageTextToText": f"{_flat(MODEL_CODE)}.{CLASS_NAME}",
        "AutoModelForCausalLM": f"{_flat(MODEL_CODE)}.{CLASS_NAME}",
    }
    MiniMindVProcessor(
        image_processor=vision.image_processor,
        tokenizer=source.tokenizer,
        chat_template=with_parts(source.tokenizer.chat_template, image=IMAGE_TAG),
        placeholder=own.placeholder,
        image_token=IMAGE_TAG,
    ).save_pretrained(folder)
    name = f"{_flat(PROCESSOR_CODE)}.{MiniMindVProcessor.__name__}"
    _add_to_json(folder / "processor_config.json", auto_map={"AutoProcessor": name})
    tensors = {name: tensor for name, tensor in source.state.items() if name != HEAD}
    save_config(own, folder, dtype=dtype)
    save_common(source, tensors, folder, dtype=getattr(torch, dtype))
    for module in _with_imports(MODEL_CODE) | _with_imports(PROCESSOR_CODE):
        text = OWN_IMPORT.sub(lambda match: f"from .{_flat(match[1])} import", _code(module))
        (folder / f"{_flat(module)}.py").write_text(text, encoding="utf-8")
    return CLASS_NAME


def _flat(module: str) -> str:
    """`model.vision.projection` as `vision_projection`: remote code lies in one folder."""
    return module.removeprefix("model.").replace(".", "_")


def _code(module: str) -> str:
    path = MODEL_DIR.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return path.read_text(encoding="utf-8")


def _with_imports(module: str) -> set[str]:
    """A module of ours and all that it imports of ours."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        found.add(name)
        imports = [n for n in ast.walk(ast.parse(_code(name))) if isinstance(n, ast.ImportFrom)]
        own = {n.module for n in imports if n.module and n.module.startswith("model.")}
        waiting += own - found
    return found


def _add_to_json(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
