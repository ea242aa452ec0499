"""Owns the description of a run: metadata of its weights, and what a resumed run must share."""

from typing import Any

from model.vlm_processor import tokenizer_sha256
from model.weights.metadata import describe_model
from trainer.run.build import Parts
from trainer.train_args import Stage, TrainArgs


def metadata_and_identity(
    stage: Stage, args: TrainArgs, parts: Parts, *, trained: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weight's metadata, and the identity that a state and its run share."""
    sha256 = tokenizer_sha256(parts.tokenizer)
    metadata = describe_model(parts.model, tokenizer_sha256=sha256) | {"stage": stage.name}
    identity = {
        "stage": stage.name,
        "data": parts.dataset.fingerprint[:16],
        "tokenizer": sha256[:16],
        "vision tower": (metadata["vision_tower_sha256"] or "")[:16],
        "model": {k: v for k, v in metadata["config"].items() if k != "image_ids"},
        "trained parameters": trained,
        "optimizer": args.optimizer,
        "seed": args.seed,
    }
    # None too in states of earlier versions
    identity["--lora_rank"] = args.lora_rank or None
    # float16 keeps more bits than a tower in bfloat16 gives; int8 gives other numbers.
    is_coarse = args.cache_folder() is not None and args.cache_dtype == "int8"
    identity["--cache_dtype of the features"] = "int8" if is_coarse else None
    draws = getattr(parts.dataset, "draws", None)  # None too in states of earlier versions
    identity["random system messages and think blocks"] = draws and (
        f"--system_share {draws.system_share} --empty_think_share {draws.empty_think_share}"
    )
    identity["--fix_image_count"] = args.fix_image_count or None
    identity["--stream_window"] = args.stream_window if args.reads_stream() else None
    if parts.dataset.is_packed:
        identity["max_seq_len"] = args.max_seq_len
    return metadata, identity
