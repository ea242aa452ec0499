"""Owns the feature cache of a run: the tower's features of its pictures, kept and read instead."""

import os
from pathlib import Path

from dataset.features.making import CacheOptions
from dataset.features.prepare import prepare_features
from dataset.lm_dataset import VLMDataset
from model.model_vlm import MiniMindVLM
from model.vision.features import FeatureMaker
from model.vlm_processor import VLMProcessor
from trainer.ranks.group import Logger, Ranks, warn
from trainer.run.build import Parts
from trainer.run.preflight import saving_needs
from trainer.saving.run_paths import RunPaths
from trainer.train_args import TrainArgs


def keep_features(args: TrainArgs, ranks: Ranks, parts: Parts, paths: RunPaths) -> None:
    """Complete the cache of --cache_vision_features for training and validation data, which then
    read from it; nothing where the flag is 0. Every rank must call it, with its tower in float32.

    Raises:
        ValueError, OSError: the cache cannot be made.
    """
    folder = args.cache_folder()
    if folder is None:
        return
    sets = [d for d in (parts.dataset, parts.val_dataset) if isinstance(d, VLMDataset)]
    if not sets or not isinstance(parts.model, MiniMindVLM):
        warn("--cache_vision_features: this stage reads no pictures, so there is nothing to keep")
        return
    processor = sets[0].processor
    assert isinstance(processor, VLMProcessor)
    options = CacheOptions(
        folder,
        args.cache_dtype,
        max_gib=args.cache_gb,
        num_threads=args.num_workers,
        reserve_bytes=reserve_bytes(folder, args, parts.model, paths),
    )
    prepare_features(
        [(dataset, len(dataset)) for dataset in sets],
        FeatureMaker(parts.model, processor, batch_size=args.batch_size),
        options,
        ranks,
        log=Logger,
        warn=warn,
    )


def reserve_bytes(folder: Path, args: TrainArgs, model: MiniMindVLM, paths: RunPaths) -> int:
    """What saving needs of the file system that a folder, which may be missing yet, is on."""
    needs = saving_needs(
        model,
        save_dir=args.save_dir,
        checkpoint_dir=args.checkpoint_dir,
        num_states=paths.num_states(),
    )
    place = next((p for p in (folder, *folder.absolute().parents) if p.exists()), args.save_dir)
    _, size = needs.get(os.stat(place).st_dev, (place, 0))
    return int(size)
