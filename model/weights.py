"""Owns weight files: their names, the metadata beside them, strict loading, saving.

A weight is `NAME_{hidden}{_moe}.pth`, a plain fp16 state dict of the contract's names, and
`NAME_{hidden}{_moe}.json`, which says what it is. The vision tower is never in it.
"""

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from model.atomic_file import atomic_write, staged_write

ROOT = Path(__file__).resolve().parents[1]
OUT_DIR = ROOT / "out"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VISION_PREFIX = "vision_encoder."
PROJECTION_PREFIX = "vision_proj."
METADATA_FORMAT = 1
# The first release (2024) called its tensors tok_embeddings, attention.wq, feed_forward.w1, ...
FIRST_RELEASE_KEY = re.compile(r"tok_embeddings|attention\.w[qkvo]|feed_forward\.w\d")
TRAINING_STATE_KEYS = {"model", "optimizer"}
# Config fields that decide which tensors a model has; a flag must not contradict them.
SIZE_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "use_moe", "n_routed_experts", "n_shared_experts",
    "vision_hidden_size",
)  # fmt: skip


def weight_stem(name: str, *, hidden_size: int, use_moe: bool) -> str:
    """`NAME_{hidden}{_moe}`, the stem that weight, metadata, state and metrics share."""
    return f"{name}_{hidden_size}{'_moe' if use_moe else ''}"


def half_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as fp16 on the CPU, without the tower; tied ones stay tied.

    Raises:
        ValueError: a tensor does not fit fp16, or is not finite.
    """
    halves: dict[int, Tensor] = {}
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(VISION_PREFIX):
            continue
        if tensor.data_ptr() not in halves:
            half = tensor.detach().to("cpu", torch.float16)
            if not half.isfinite().all():
                peak = tensor.detach().float().abs().max().item()
                raise ValueError(
                    f"weight not saved: {name} reaches {peak:.3g}, which fp16 cannot hold (65504 "
                    "at most); training diverged, so go on from an earlier weight with a lower "
                    "--learning_rate"
                )
            halves[tensor.data_ptr()] = half
        state[name] = halves[tensor.data_ptr()]
    return state


def save_weights(model: nn.Module | dict[str, Tensor], path: Path, metadata: dict) -> None:
    """Save the fp16 weight and, beside it, what it is.

    The description is written first and holds the former one too: whichever weight stands there
    after a kill, `read_metadata` finds the one that belongs to it.

    Args:
        model: the model, or its state dict.
        metadata: from `describe_model`, with the stage and its arguments.
    """
    state = half_state(model.state_dict() if isinstance(model, nn.Module) else model)
    former = former_metadata(path) if path.is_file() else None
    with staged_write(path, lambda file: torch.save(state, file)) as temporary:
        about = {"format": METADATA_FORMAT} | metadata | {"weight_id": weight_id(temporary)}
        text = json.dumps(about | {"former": former}, indent=1, ensure_ascii=False)
        atomic_write(path.with_suffix(".json"), lambda file: file.write(text.encode()))


def weight_id(path: Path) -> str | None:
    """Tells weight files apart by the checksums of their tensors; None for what is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            sums = [(item.filename.partition("/")[2], item.CRC) for item in archive.infolist()]
    except (zipfile.BadZipFile, OSError):
        return None
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def former_metadata(path: Path) -> dict:
    """What is known of the weight that a save replaces, with its id."""
    try:
        metadata = read_metadata(path)
    except ValueError:
        metadata = {}
    return metadata | {"weight_id": weight_id(path)}


def describe_model(model, *, tokenizer_sha256: str) -> dict:
    """The metadata that loading checks: sizes, placeholder, tower and tokenizer."""
    config = model.config
    names = (*SIZE_FIELDS, "keep_cls", "image_special_token", "image_ids", "rope_theta",
             "max_position_embeddings", "num_experts_per_tok", "norm_topk_prob",
             "rms_norm_eps", "dropout", "hidden_act", "aux_loss_alpha", "seq_aux")  # fmt: skip
    tower = getattr(model, "vision_encoder", None)
    return {
        "config": {name: getattr(config, name) for name in names if hasattr(config, name)},
        "vision_tower": model.vision_dir.name if tower is not None else None,
        "vision_tower_sha256": tower_sha256(tower) if tower is not None else None,
        "tokenizer_sha256": tokenizer_sha256,
    }


def tower_sha256(tower: nn.Module) -> str:
    """Tells towers apart by the tensors at their two ends."""
    digest = hashlib.sha256()
    for name, tensor in tower.state_dict().items():
        if "embedding" in name or "post_layernorm" in name:
            digest.update(tensor.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def find_weight(
    name: str, *, save_dir: Path, hidden_size: int | None, use_moe: bool | None
) -> Path:
    """The file of a weight name: in `save_dir`, then in `out/`; a path is taken as it is.

    Without a hidden size the one that exists is taken, 512 before others.

    Raises:
        FileNotFoundError: nothing fits; lists what is there.
        ValueError: several sizes fit.
    """
    if name.endswith(".pth") or os.sep in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no weight file {name}")
        return path
    folders = list(dict.fromkeys([save_dir.resolve(), OUT_DIR]))
    size = r"\d+" if hidden_size is None else str(hidden_size)
    moe = "(_moe)?" if use_moe is None else "_moe" if use_moe else ""
    for alias in (name, "lm") if name == "llm" else (name,):
        pattern = re.compile(rf"{re.escape(alias)}_{size}{moe}\.pth")
        for folder in folders:
            found = sorted(p for p in folder.glob("*.pth") if pattern.fullmatch(p.name))
            default = weight_stem(alias, hidden_size=512, use_moe=bool(use_moe))
            usual = [p for p in found if p.stem == default]
            if len(found) == 1 or usual:
                return (usual or found)[0]
            if found:
                raise ValueError(
                    f"several weights fit {name!r} in {folder}: "
                    f"{', '.join(p.name for p in found)}; choose one by --hidden_size and --use_moe"
                )
    there = sorted({p.name for folder in folders for p in folder.glob("*.pth")})
    wanted = weight_stem(name, hidden_size=hidden_size or 512, use_moe=bool(use_moe)) + ".pth"
    ways = {
        "llm": "fetch it by `python dataset/download.py llm_512`, make it by trainer/train_llm.py",
        "pretrain_vlm": "make it by trainer/train_pretrain_vlm.py",
        "sft_vlm": "make it by trainer/train_sft_vlm.py",
    }
    raise FileNotFoundError(
        f"no weight {wanted} in {' or '.join(str(f) for f in folders)} (there: "
        f"{', '.join(there) or 'no weights'}); {ways.get(name, 'make it first')}, or name its path"
    )


def read_weights(path: Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """The state dict of a weight file, refusing what is not one.

    With `shapes_only` the tensors have no values (they are on `meta`).

    Raises:
        ValueError: unreadable, of the first release, or a training state.
    """
    try:
        state = torch.load(path, map_location="meta" if shapes_only else "cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # the unpickler raises almost anything on damaged data
        raise ValueError(
            f"{path} is not a readable weight file ({type(error).__name__}); copy or fetch it again"
        ) from error
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} is not a state dict of tensors")
    if TRAINING_STATE_KEYS <= state.keys():
        raise ValueError(
            f"{path} is a training state, not a weight; use the weight saved beside it in out/, "
            "or resume by --from_resume 1"
        )
    if any(FIRST_RELEASE_KEY.search(str(key)) for key in state):
        raise ValueError(
            f"{path} comes from the first release (2024), whose tensors are named otherwise; it "
            "cannot be loaded here: use the weights published since then"
        )
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds more than tensors, so it is not a weight file")
    return {k: v for k, v in state.items() if not k.startswith(VISION_PREFIX)}


def read_metadata(path: Path) -> dict:
    """What lies beside a weight, or {} for a plain published file."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        metadata = json.loads(beside.read_text(encoding="utf-8"))
        if isinstance(metadata, dict) and "format" not in metadata:
            return {}  # somebody else's JSON; the tensors' shapes are enough
        metadata["config"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{beside} is not weight metadata ({error!r}); mend it") from None
    if metadata["format"] != METADATA_FORMAT:
        raise ValueError(f"{beside} has format {metadata.get('format')}, not {METADATA_FORMAT}")
    former, described = metadata.pop("former", None), metadata.get("weight_id")
    found = weight_id(path) if former or described else None
    if former and former["weight_id"] == found:
        return former if "format" in former else {}  # a save was cut off before the weight
    if described and described != found:
        raise ValueError(
            f"{beside} describes another weight than the {path.name} beside it; if that came from "
            f"elsewhere, delete {beside.name}, else put the weight back that belongs to it"
        )
    return metadata


def sizes_from_tensors(state: dict[str, Tensor], *, path: Path, num_heads: int = 8) -> dict:
    """The sizes of a model, read off its tensors' shapes.

    Args:
        num_heads: query heads, which show in no shape.
    """
    try:
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        num_layers = 1 + max(
            int(m[1]) for k in state if (m := re.match(r"model\.layers\.(\d+)\.", k))
        )
        kv_dim = state["model.layers.0.self_attn.k_proj.weight"].shape[0]
        up_projections = [k for k in state if re.match(r"model\.layers\.0\.mlp\..*up_proj", k)]
        experts = [k for k in up_projections if ".experts." in k]
        shared = [k for k in up_projections if ".shared_experts." in k]
        mlp = "mlp.experts.0" if experts else "mlp"
        intermediate = state[f"model.layers.0.{mlp}.up_proj.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a MiniMind weight: {error} is not among its {len(state)} tensors"
        ) from None
    sizes = {
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": kv_dim * num_heads // hidden_size,
        "intermediate_size": intermediate,
        "use_moe": bool(experts),
    }
    if experts:
        sizes |= {"n_routed_experts": len(experts), "n_shared_experts": len(shared)}
    projection = state.get("vision_proj.vision_proj.0.weight")
    if projection is not None:
        sizes["vision_hidden_size"] = projection.shape[1]
    return sizes


def weight_config(state: dict[str, Tensor], *, path: Path, flags: dict) -> dict:
    """Config fields of a weight: from its metadata, else its shapes, else the flags.

    Args:
        flags: what the user asked for, None where left open.
    Raises:
        ValueError: a flag, or the metadata, contradicts the tensors.
    """
    config = read_metadata(path).get("config", {})
    num_heads = config.get("num_attention_heads") or flags.get("num_attention_heads") or 8
    sizes = sizes_from_tensors(state, path=path, num_heads=num_heads)
    for name, size in sizes.items():
        if name in config and config[name] != size:
            raise ValueError(
                f"{path.with_suffix('.json')} says {name} {config[name]} but the tensors of "
                f"{path.name} say {size}: the two files do not belong together"
            )
    config = config | sizes
    for name, wanted in flags.items():
        if wanted is not None and name in SIZE_FIELDS and name in config and config[name] != wanted:
            raise ValueError(
                f"{path} has {name} {config[name]}, not {wanted} as the flags say; leave the "
                f"flag out, or choose another weight"
            )
    return config | {k: v for k, v in flags.items() if v is not None}


def load_weights(
    model: nn.Module, state: dict[str, Tensor], *, path: Path, may_lack_projection: bool
) -> bool:
    """Copy a state dict into a model, strictly.

    Args:
        may_lack_projection: accept a language model without `vision_proj.*`.
    Returns:
        Whether the weight had a projection.
    Raises:
        ValueError: naming the tensors that are missing, left over, misshapen or untied.
    """
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(VISION_PREFIX)}
    has_projection = check_tensors(own, state, path=path, may_lack_projection=may_lack_projection)
    infinite = [k for k in state if not state[k].isfinite().all()]
    _refuse(path, "has values that are not finite in", infinite)
    if {EMBEDDING, HEAD} <= state.keys() and not torch.equal(state[EMBEDDING], state[HEAD]):
        raise ValueError(f"{path}: {HEAD} differs from {EMBEDDING}, but here they are one tensor")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return has_projection


def check_tensors(
    own: dict[str, Tensor], state: dict[str, Tensor], *, path: Path, may_lack_projection: bool
) -> bool:
    """Names and shapes only; returns and raises as `load_weights` does."""
    has_projection = any(k.startswith(PROJECTION_PREFIX) for k in state)
    missing = [k for k in own if k not in state and k != HEAD]
    if may_lack_projection and not has_projection:
        missing = [k for k in missing if not k.startswith(PROJECTION_PREFIX)]
    _refuse(path, "lacks", missing)
    _refuse(path, "has unknown", [k for k in state if k not in own])
    _refuse(path, "has another size of", [k for k in state if state[k].shape != own[k].shape])
    return has_projection


def _refuse(path: Path, problem: str, names: list[str]) -> None:
    if names:
        raise ValueError(
            f"{path} {problem} {len(names)} tensor(s): {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}; it is not a weight of this model"
        )
