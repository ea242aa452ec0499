"""Owns the frozen CLIP vision tower: its folder, config, preprocessing and weights."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging as hf_logging

VISION_DIR = Path(__file__).resolve().parent / "vision_model"
CLIP_DIR = VISION_DIR / "clip-vit-base-patch16"


def find_vision_dir(
    vision_model_path: str | Path | None = None, *, named: str | None = None
) -> Path:
    """The folder of the CLIP tower: the given one, else the default places.

    Args:
        named: the folder in `model/vision_model/` that a weight was trained with.
    Raises:
        FileNotFoundError: no `config.json` there; says what to do.
    """
    if vision_model_path:
        candidates = [Path(vision_model_path)]
    else:
        known = [VISION_DIR / Path(named).name] if named else []
        candidates = [*known, CLIP_DIR, VISION_DIR]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"no CLIP vision tower: {' nor '.join(str(c) for c in candidates)} holds a config.json; "
        "fetch it by `python dataset/download.py vision`, or name another folder by "
        "--vision_model_path"
    )


def load_vision_config(folder: Path) -> CLIPVisionConfig:
    """The tower's config, from a full CLIP folder or a vision-only one."""
    config, _ = CLIPVisionConfig.get_config_dict(folder)
    model_type = config.get("model_type")
    if model_type == CLIPConfig.model_type:
        vision_config = CLIPConfig.from_pretrained(folder).vision_config
        assert isinstance(vision_config, CLIPVisionConfig)
        return vision_config
    if model_type == CLIPVisionConfig.model_type:
        return CLIPVisionConfig.from_pretrained(folder)
    raise ValueError(
        f"{folder}/config.json: model_type {model_type!r} is not a CLIP tower; "
        "use for example openai/clip-vit-base-patch16"
    )


def image_side(vision_config: CLIPVisionConfig) -> int:
    """Side in pixels of the square images that the tower takes."""
    assert isinstance(vision_config.image_size, int)  # transformers allows pairs, CLIP has none
    return vision_config.image_size


def count_image_tokens(vision_config: CLIPVisionConfig, *, keep_cls: bool) -> int:
    """Patches of one image, plus one if the CLS token is kept."""
    assert isinstance(vision_config.patch_size, int)
    return (image_side(vision_config) // vision_config.patch_size) ** 2 + int(keep_cls)


def load_image_processor(folder: Path, vision_config: CLIPVisionConfig) -> CLIPImageProcessorPil:
    """The folder's preprocessing; without `preprocessor_config.json`, CLIP's own at this size."""
    side = image_side(vision_config)
    if (folder / "preprocessor_config.json").is_file():
        processor = CLIPImageProcessorPil.from_pretrained(folder)
        crop = processor.crop_size
        if (crop["height"], crop["width"]) != (side, side):
            raise ValueError(
                f"{folder}: preprocessor_config.json crops to {crop['height']}x{crop['width']} "
                f"but the tower takes {side}x{side}; the two files belong to different towers"
            )
        return processor
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def load_vision_tower(folder: Path) -> CLIPVisionModel:
    """The frozen tower in float32 and eval mode; every one of its tensors must be in the file."""
    config = load_vision_config(folder)
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # in a full CLIP folder the text tower counts as unexpected
    progress_bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        tower, report = _read_tower(folder, config)
    except Exception as error:  # safetensors and the unpickler raise almost anything
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{folder}: the tower's weights cannot be read ({first_line}); fetch the folder again "
            "(a clone may need `git lfs pull`)"
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
        if progress_bar:
            hf_logging.enable_progress_bar()
    lost = sorted([*report["missing_keys"], *(str(k) for k in report["mismatched_keys"])])
    if lost:
        raise ValueError(
            f"{folder}: {len(lost)} tensors of the vision tower are missing or of another size, "
            f"such as {lost[0]}; fetch the folder again"
        )
    tower.eval().requires_grad_(False)
    return tower


def _read_tower(
    folder: Path, config: CLIPVisionConfig
) -> tuple[CLIPVisionModel, dict[str, set[str]]]:
    """The model, and which tensors transformers reports as missing, unexpected or mismatched."""
    loaded: tuple[CLIPVisionModel, dict[str, set[str]]] = CLIPVisionModel.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )  # type: ignore[assignment]  # annotated as the model alone
    return loaded
