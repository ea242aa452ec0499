"""Owns loading a model with its processor, and the flags that say which one."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from model.device import (
    check_dtype,
    choose_device,
    default_dtype,
    memory_guard,
    prepare_device,
)
from model.model_vlm import (
    MiniMindVLM,
    VLMConfig,
    count_image_tokens,
    find_vision_dir,
    load_vision_config,
)
from model.vlm_processor import VLMProcessor, check_special_tokens, load_tokenizer
from model.weights import (
    OUT_DIR,
    check_tensors,
    find_weight,
    load_weights,
    read_metadata,
    read_weights,
    tower_sha256,
    weight_config,
)

NATIVE = "model"  # --load_from: our own weight files
BLIND_SEED = 0  # of the projection that a language model lacks


def parse_bool(text: str) -> bool:
    """0/1, true/false in any case."""
    values = {"0": False, "1": True, "false": False, "true": True}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of 0, 1, true, false")
    return values[text.lower()]


def parse_path(text: str) -> Path:
    """A path; `~` is the home folder also where the shell left it alone."""
    return Path(text).expanduser()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model to use; evaluation, demo and export share them."""
    add = parser.add_argument
    add("--load_from", default=NATIVE,
        help="'model': a weight of this project; else a transformers folder / "
             "原生权重，或 transformers 目录")  # fmt: skip
    add(
        "--save_dir",
        "--out_dir",
        type=parse_path,
        default=OUT_DIR,
        help="folder of weights / 权重目录",
    )
    add("--weight", default="sft_vlm", help="name or path of the weight / 权重名称或路径")
    add("--hidden_size", "--dim", type=int, help="default: the weight's / 默认随权重")
    add("--num_hidden_layers", "--n_layers", type=int, help="default: the weight's / 默认随权重")
    add(
        "--use_moe",
        type=parse_bool,
        nargs="?",
        const=True,
        help="default: the weight's / 默认随权重",
    )
    add("--vision_model_path", type=parse_path, help="folder of the CLIP tower / CLIP 目录")
    add("--tokenizer_path", type=parse_path, help="folder of the tokenizer / 分词器目录")
    add("--keep_cls", type=parse_bool, nargs="?", const=True,
        help="CLS is an image token (first release) / 保留 CLS")  # fmt: skip
    add("--image_special_token", help="placeholder text of one image / 图像占位符")
    add("--inference_rope_scaling", type=parse_bool, nargs="?", const=True, default=False,
        help="YaRN for prompts over 2048 tokens / 长上下文外推")  # fmt: skip
    add("--device", default=None, help="cpu, cuda, cuda:1, mps; default: the best / 默认自动选择")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
        help="default: float32 on a CPU, bfloat16 on a GPU, float16 on one without / "
             "默认 CPU 用 float32，GPU 用 bfloat16，不支持则 float16")  # fmt: skip


@dataclass
class LoadedModel:
    """A model ready to use; `can_see` is False for a language model without a projection."""

    model: MiniMindVLM
    processor: VLMProcessor
    path: Path
    can_see: bool


@memory_guard("free some of it, choose a smaller weight or --dtype, or use --device cpu")
def load_model(args: argparse.Namespace) -> LoadedModel:
    """Load what `add_model_arguments` describes, strictly.

    Raises:
        FileNotFoundError, ValueError: what is missing or does not fit, and what to do.
    """
    device = prepare_device(choose_device(args.device))
    dtype = args.dtype or default_dtype(device)
    check_dtype(device, dtype)
    flags = {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "use_moe": args.use_moe,
        "keep_cls": args.keep_cls,
        "image_special_token": args.image_special_token,
        "inference_rope_scaling": args.inference_rope_scaling,
    }
    loaded = _load_native(args, flags) if args.load_from == NATIVE else _load_folder(args, flags)
    check_special_tokens(
        loaded.processor.tokenizer,
        vocab_size=loaded.model.config.vocab_size,
        model_name=str(loaded.path),
    )
    loaded.model.eval().requires_grad_(False).to(device, getattr(torch, dtype))
    return loaded


def check_native(args: argparse.Namespace, path: Path) -> Path:
    """What `load_model` checks of a weight file but for the tensors' values, in a moment.

    Returns:
        the folder of the tower it is for, whose values are not looked at either.
    Raises:
        FileNotFoundError, ValueError: why it would not load.
    """
    state, metadata = read_weights(path, shapes_only=True), read_metadata(path)
    fields = weight_config(state, path=path, flags={})
    tokenizer = load_tokenizer(
        args.tokenizer_path, expected_sha256=metadata.get("tokenizer_sha256")
    )
    tower = find_vision_dir(args.vision_model_path, named=metadata.get("vision_tower"))
    config, vision = placeholder_config(fields, tokenizer, tower), load_vision_config(tower)
    num_tokens = count_image_tokens(vision, keep_cls=config.keep_cls)
    if (vision.hidden_size, num_tokens) != (config.vision_hidden_size, config.num_image_tokens):
        raise ValueError(f"{path} is for another vision tower than the one in {tower}")
    with torch.device("meta"):
        model = MiniMindVLM(config)
    check_tensors(model.state_dict(), state, path=path, may_lack_projection=True)
    return tower


def _load_native(args: argparse.Namespace, flags: dict) -> LoadedModel:
    path = find_weight(
        args.weight, save_dir=args.save_dir, hidden_size=args.hidden_size, use_moe=args.use_moe
    )
    state, metadata = read_weights(path), read_metadata(path)
    fields = weight_config(state, path=path, flags=flags)
    tokenizer = load_tokenizer(
        args.tokenizer_path, expected_sha256=metadata.get("tokenizer_sha256")
    )
    tower = find_vision_dir(args.vision_model_path, named=metadata.get("vision_tower"))
    model = MiniMindVLM(placeholder_config(fields, tokenizer, tower))
    can_see = load_weights(model, state, path=path, may_lack_projection=True)
    if not can_see:
        _seed_projection(model)
    attach_tower(model, tower, metadata=metadata, path=path)
    processor = VLMProcessor(tokenizer, model.image_processor, config=model.config)
    return LoadedModel(model, processor, path, can_see)


def _seed_projection(model: MiniMindVLM) -> None:
    """Make the random projection of a model that lacks one the same at every start.

    As wide as `nn.Linear` begins, without touching the global random numbers.
    """
    generator = torch.Generator().manual_seed(BLIND_SEED)
    bound = model.config.vision_hidden_size**-0.5
    for parameter in model.vision_proj.parameters():
        torch.nn.init.uniform_(parameter, -bound, bound, generator=generator)


def placeholder_config(fields: dict, tokenizer, vision_model_path: Path | None) -> VLMConfig:
    """Complete config fields with what follows from tower and tokenizer.

    A placeholder that neither metadata nor flags name is `@` times the tower's tokens.
    """
    vision = load_vision_config(find_vision_dir(vision_model_path))
    fields = {"vision_hidden_size": vision.hidden_size} | fields
    num_tokens = count_image_tokens(vision, keep_cls=bool(fields.get("keep_cls")))
    placeholder = fields.get("image_special_token") or "@" * num_tokens
    ids = tokenizer.encode(placeholder, add_special_tokens=False)
    return VLMConfig(**(fields | {"image_special_token": placeholder, "image_ids": ids}))


def attach_tower(
    model: MiniMindVLM, vision_model_path: Path | None, *, metadata: dict, path: Path
) -> None:
    """Load the vision tower and compare it with the one the weight was trained with."""
    folder = find_vision_dir(vision_model_path)
    model.load_vision_encoder(folder)
    expected = metadata.get("vision_tower_sha256")
    if expected and expected != tower_sha256(model.vision_encoder):
        raise ValueError(
            f"{path} was trained with another vision tower than the one in {folder}; name the "
            "right folder by --vision_model_path"
        )


def _load_folder(args: argparse.Namespace, flags: dict) -> LoadedModel:
    """A folder as `save_pretrained` writes it, with its tokenizer if it has one."""
    folder = Path(args.load_from)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--load_from {folder}: no config.json there; give a transformers folder, or "
            "'model' for this project's own weights"
        )
    kind = VLMConfig.get_config_dict(folder)[0].get("model_type")
    if kind != VLMConfig.model_type:
        raise ValueError(
            f"{folder}/config.json: model_type {kind!r} cannot be loaded here, only "
            f"{VLMConfig.model_type!r} can"
        )
    config = VLMConfig.from_pretrained(folder)
    for name, wanted in flags.items():
        if name == "inference_rope_scaling":
            continue
        if wanted is not None and getattr(config, name) != wanted:
            raise ValueError(f"{folder} has {name} {getattr(config, name)}, not {wanted}")
    if flags["inference_rope_scaling"]:
        config = VLMConfig(**(config.to_dict() | {"inference_rope_scaling": True}))
    model, report = _read_folder(folder, config)
    lost = sorted([*report["missing_keys"], *(str(k) for k in report["mismatched_keys"])])
    if lost or report["unexpected_keys"]:
        raise ValueError(
            f"{folder}: tensors missing {lost[:4]}, unknown {sorted(report['unexpected_keys'])[:4]}"
        )
    own_tokenizer = folder if (folder / "tokenizer.json").is_file() else None
    tokenizer = load_tokenizer(args.tokenizer_path or own_tokenizer)
    attach_tower(model, args.vision_model_path, metadata={}, path=folder)
    processor = VLMProcessor(tokenizer, model.image_processor, config=model.config)
    return LoadedModel(model, processor, folder, can_see=True)


def _read_folder(folder: Path, config: VLMConfig) -> tuple[MiniMindVLM, dict]:
    """The model, and what transformers says of its tensors."""
    try:
        return MiniMindVLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # safetensors and the unpickler raise almost anything
        first, *_ = [*str(error).splitlines(), ""]
        raise ValueError(
            f"--load_from {folder} cannot be read ({type(error).__name__}: {first}); mend its "
            "config.json, or copy or fetch it again (in a git clone: git lfs pull)"
        ) from error
