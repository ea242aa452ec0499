"""Owns building a model and its processor from a weight or from a transformers folder."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from model.generations import DEFAULT_GENERATION, GENERATIONS
from model.machine.compiling import check_compiler
from model.machine.device import (
    check_dtype,
    choose_device,
    default_dtype,
    memory_guard,
    prepare_device,
)
from model.machine.int8 import check_int8
from model.model_minimind import MiniMindConfig
from model.model_vlm import MiniMindVLM, VLMConfig
from model.options import NATIVE
from model.quantizing import quantize_int8
from model.vision_tower import (
    count_image_tokens,
    find_vision_dir,
    has_own_tower,
    read_tower_shape,
)
from model.vlm_processor import VLMProcessor, check_special_tokens, load_tokenizer
from model.weights.file_names import find_weight
from model.weights.metadata import Metadata, read_metadata, tower_sha256
from model.weights.strict_loading import (
    PROJECTION_LAYERS,
    check_tensors,
    is_third_generation,
    load_weights,
    read_weights,
    weight_config,
)

# Flags that are config fields.
CONFIG_FLAGS = (
    "generation", "hidden_size", "num_hidden_layers", "use_moe", "keep_cls", "vision_layer",
    "image_size", "token_merge", "image_special_token", "inference_rope_scaling",
)  # fmt: skip
# What a folder's config may say: nothing else of it reaches transformers, which would fetch and run
# a kernel that `attn_implementation` names. How RoPE is stretched is a flag's.
FOLDER_FIELDS = {
    *MiniMindConfig.__annotations__, *VLMConfig.__annotations__, *VLMConfig.attribute_map,
} - {"rope_parameters", "inference_rope_scaling"}  # fmt: skip
PROJECTION_SEED = 0  # of the random projection that a language model gets


class InputFlags(Protocol):
    """The flags that say how text and pictures become the model's inputs."""

    tokenizer_path: Path | None
    vision_model_path: Path | None


@dataclass
class LoadedModel:
    """A model ready for inference.

    Args:
        can_see: False if its weight had no projection.
        compile: whether to compile what decoding does over and over.
    """

    model: MiniMindVLM
    processor: VLMProcessor
    path: Path
    can_see: bool
    compile: bool = False


@memory_guard("free some of it, choose a smaller weight or --dtype, or use --device cpu")
def load_model(args: argparse.Namespace) -> LoadedModel:
    """Load what `add_model_arguments` describes, strictly.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, and what to do.
    """
    device = prepare_device(choose_device(args.device))
    dtype = args.dtype or default_dtype(device)
    check_dtype(device, dtype)
    quantize = getattr(args, "quantize", None)  # a flag of some commands
    if quantize:
        check_int8(device, dtype)
    does_compile = getattr(args, "compile", False)
    if does_compile:
        check_compiler(device)
        if quantize:
            raise ValueError(
                "--compile and --quantize do not go together: int8 layers are kernels already; "
                "leave --compile out"
            )
    flags = {name: getattr(args, name) for name in CONFIG_FLAGS}
    loaded = _load_native(args, flags) if args.load_from == NATIVE else _load_folder(args, flags)
    check_special_tokens(
        loaded.processor.tokenizer,
        vocab_size=loaded.model.config.vocab_size,
        model_name=str(loaded.path),
    )
    loaded.model.eval().requires_grad_(False).to(device, getattr(torch, dtype))
    if quantize:
        quantize_int8(loaded.model)
    loaded.compile = does_compile
    return loaded


def find_inputs(
    args: InputFlags, metadata: Metadata, *, generation: int, weight: Path | None
) -> tuple[PreTrainedTokenizerBase, Path]:
    """The tokenizer of the flags, else the one a weight was trained with, and the tower's folder.

    Raises:
        FileNotFoundError, ValueError: as `load_tokenizer` and `find_vision_dir`.
    """
    tokenizer = load_tokenizer(
        args.tokenizer_path,
        expected_sha256=metadata.get("tokenizer_sha256"),
        generation=generation,
        weight=weight,
    )
    named = metadata.get("vision_tower")
    return tokenizer, find_vision_dir(args.vision_model_path, named=named, generation=generation)


def check_native(args: argparse.Namespace, path: Path) -> Path:
    """Check a weight file as `load_model` does, without reading tensor values: a quick look.

    Returns:
        The folder of the vision tower it was trained with, whose values are not read either.
    Raises:
        FileNotFoundError, ValueError: why it would not load.
    """
    state, metadata = read_weights(path, shapes_only=True), read_metadata(path)
    fields = weight_config(state, path=path, flags={})
    tokenizer, tower = find_inputs(args, metadata, generation=fields["generation"], weight=path)
    config = placeholder_config(fields, tokenizer, tower)
    shape = read_tower_shape(tower, vision_layer=config.vision_layer, image_size=config.image_size)
    num_tokens = count_image_tokens(shape, keep_cls=config.keep_cls, token_merge=config.token_merge)
    if (shape.width, num_tokens) != (config.vision_hidden_size, config.num_image_tokens):
        raise ValueError(f"{path} is for another vision tower than the one in {tower}")
    with torch.device("meta"):
        model = MiniMindVLM(config)
    check_tensors(model.state_dict(), state, path=path, may_lack_projection=True)
    return tower


@dataclass(frozen=True)
class Weight:
    """A weight as its files say: tensors, description, and config fields with the flags' on top."""

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, Any]
    fields: dict[str, Any]


def read_weight(args: argparse.Namespace, flags: dict[str, Any]) -> Weight:
    """Read the weight that `--weight` and the flags of its size name."""
    path = find_weight(
        args.weight,
        save_dir=args.save_dir,
        hidden_size=args.hidden_size,
        use_moe=args.use_moe,
        generation=args.generation,
    )
    state, metadata = read_weights(path), read_metadata(path)
    return Weight(path, state, metadata, weight_config(state, path=path, flags=flags))


def _load_native(args: argparse.Namespace, flags: dict[str, Any]) -> LoadedModel:
    weight = read_weight(args, flags)
    path, metadata, fields = weight.path, weight.metadata, weight.fields
    tokenizer, tower = find_inputs(args, metadata, generation=fields["generation"], weight=path)
    model = MiniMindVLM(placeholder_config(fields, tokenizer, tower))
    can_see = load_weights(model, weight.state, path=path, may_lack_projection=True)
    if not can_see:
        _seed_projection(model)
    image_processor = attach_tower(model, tower, metadata=metadata, path=path)
    processor = VLMProcessor(tokenizer, image_processor, config=model.config)
    return LoadedModel(model, processor, path, can_see)


def _seed_projection(model: MiniMindVLM) -> None:
    """Initialise the linear layers of a language model's projection, the same at every start.

    With the bound of `nn.Linear`, and without using the global random generator.
    """
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    for layer in model.vision_proj.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


def placeholder_config(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vision_model_path: Path | None
) -> VLMConfig:
    """Complete config fields with what follows from tower and tokenizer.

    The default placeholder is the generation's image token for each image token of the tower: in
    generation 2 as one text of 196 `@`, in generation 3 one token that is repeated.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    generation = fields.get("generation") or DEFAULT_GENERATION
    shape = read_tower_shape(
        find_vision_dir(vision_model_path, generation=generation),
        vision_layer=fields.get("vision_layer"),
        image_size=fields.get("image_size"),
    )
    fields = {"vision_hidden_size": shape.width} | fields
    num_tokens = count_image_tokens(
        shape,
        keep_cls=bool(fields.get("keep_cls")),
        token_merge=fields.get("token_merge") or 1,
    )
    is_repeated = len(GENERATIONS[generation].config["image_ids"]) == 1
    token = GENERATIONS[generation].image_token
    default = token if is_repeated else token * num_tokens
    placeholder = fields.get("image_special_token") or default
    ids = tokenizer.encode(placeholder, add_special_tokens=False)
    if placeholder == default and is_repeated and len(ids) != 1:
        raise ValueError(
            f"the tokenizer has no token {token}, which stands for an image in generation "
            f"{generation}; name that generation's tokenizer by --tokenizer_path"
        )
    own = {"image_special_token": placeholder, "image_ids": ids}
    own["image_token_len"] = num_tokens if len(ids) == 1 else len(ids)
    return VLMConfig(**(fields | own))


def attach_tower(
    model: MiniMindVLM, vision_model_path: Path | None, *, metadata: Metadata, path: Path
) -> BaseImageProcessor:
    """Load the tower and its preprocessing; check that the weight was trained with this tower."""
    folder = find_vision_dir(vision_model_path, generation=model.config.generation)
    model.load_vision_encoder(folder)
    assert model.vision_encoder is not None and model.image_processor is not None
    expected = metadata.get("vision_tower_sha256")
    if expected and expected != tower_sha256(model.vision_encoder):
        raise ValueError(
            f"{path} was trained with another vision tower than the one in {folder}; name the "
            "right folder by --vision_model_path"
        )
    return model.image_processor


def _load_folder(args: argparse.Namespace, flags: dict[str, Any]) -> LoadedModel:
    """A folder as `save_pretrained` writes it, or as published; with its tokenizer if it has one.

    Code in the folder is never run.
    """
    folder = Path(args.load_from)
    config = _folder_config(folder, flags)
    model, report = _read_folder(folder, config)
    lost = sorted([*report["missing_keys"], *(str(k) for k in report["mismatched_keys"])])
    if lost or report["unexpected_keys"]:
        raise ValueError(
            f"{folder}: tensors missing {lost[:4]}, unknown {sorted(report['unexpected_keys'])[:4]}"
        )
    own_tokenizer = folder if (folder / "tokenizer.json").is_file() else None
    tokenizer = load_tokenizer(args.tokenizer_path or own_tokenizer, generation=config.generation)
    own_tower = folder if has_own_tower(folder) else None
    tower = args.vision_model_path or own_tower
    image_processor = attach_tower(model, tower, metadata={}, path=folder)
    processor = VLMProcessor(tokenizer, image_processor, config=model.config)
    return LoadedModel(model, processor, folder, can_see=True)


def _folder_config(folder: Path, flags: dict[str, Any]) -> VLMConfig:
    """The config of a folder, of the generation that its tensors show.

    Raises:
        FileNotFoundError, ValueError: no model of ours there, or the flags contradict it.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--load_from {folder}: no config.json there; give a transformers folder, or "
            "'model' for this project's own weights"
        )
    fields, _ = VLMConfig.get_config_dict(folder)
    if fields.get("model_type") != VLMConfig.model_type:
        raise ValueError(
            f"{folder}/config.json: model_type {fields.get('model_type')!r} cannot be loaded here, "
            f"only {VLMConfig.model_type!r} can"
        )
    names = _tensor_names(folder)
    if is_third_generation(names):
        fields["generation"] = 3
    for projector, name in PROJECTION_LAYERS.items():
        if name in names:
            fields["projector"] = projector
    given = {name: value for name, value in flags.items() if value is not None}
    fields = {name: value for name, value in fields.items() if name in FOLDER_FIELDS}
    try:
        config = VLMConfig(
            **fields, inference_rope_scaling=given.pop("inference_rope_scaling", False)
        )
    except Exception as error:  # wrong fields raise almost anything
        raise ValueError(_unreadable(folder, error)) from error
    for name, wanted in given.items():
        if getattr(config, name) != wanted:
            raise ValueError(f"{folder} has {name} {getattr(config, name)}, not {wanted}")
    return config


def _tensor_names(folder: Path) -> set[str]:
    """Names of a folder's tensors, read without their values."""
    names: set[str] = set()
    for path in (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")):
        try:
            if path.suffix == ".bin":
                names |= torch.load(path, map_location="meta", weights_only=True).keys()
            else:
                with safe_open(path, "pt") as file:
                    names |= set(file.keys())
        except Exception as error:  # safetensors and the unpickler raise almost anything
            raise ValueError(_unreadable(folder, error)) from error
    return names


def _unreadable(folder: Path, error: Exception) -> str:
    first, *_ = [*str(error).splitlines(), ""]
    return (
        f"--load_from {folder} cannot be read ({type(error).__name__}: {first}); mend its "
        "config.json, or copy or fetch it again (in a git clone: git lfs pull)"
    )


def _read_folder(folder: Path, config: VLMConfig) -> tuple[MiniMindVLM, dict[str, set[str]]]:
    """The model, and which tensors transformers reports as missing, unexpected or mismatched."""
    try:
        return MiniMindVLM.from_pretrained(  # type: ignore[return-value]  # with loading info
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # safetensors and the unpickler raise almost anything
        raise ValueError(_unreadable(folder, error)) from error
