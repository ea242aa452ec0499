"""Owns giving data sets their features, from a cache that is completed first.

`prepare_features` goes through these steps, each shared by the ranks:

1. Hash all pictures, so that names stand for contents.
2. Check the entries of these pictures, and discard the damaged ones.
3. Compute what is missing, as far as `max_gib` and the disk allow.
4. Give each data set its features. What is not in the cache is read and computed as without one.

Two runs may do so at once: see `shards.py` and `Making`.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.features.making import CacheOptions, Group, Maker, Making, Missing, take_turns
from dataset.features.reading import CachedFeatures
from dataset.features.shards import Layout, ShardMaps
from dataset.features.survey import Index, Survey, discard_damaged, find_pictures
from dataset.features.table import KEY_TYPE, Table
from dataset.lm_dataset import VLMDataset

FORMAT = 1
DESCRIPTION = "description.json"


@dataclass(frozen=True)
class Cache:
    """The part of a cache that belongs to one tower, preprocessing, layer and format."""

    home: Path
    layout: Layout


def open_cache(maker: Maker, options: CacheOptions) -> Cache:
    """The sub-folder of a tower, made if missing, with its description.

    Raises:
        ValueError: it cannot be made.
    """
    described = maker.describe() | {"dtype": options.dtype, "format": FORMAT}
    text = json.dumps(described, indent=1, sort_keys=True, default=str)
    seal = hashlib.sha256(text.encode()).digest()
    layout = Layout(maker.num_patches, maker.width, options.dtype, seal)
    kind = described["tower"].get("model_type", "tower")
    home = options.folder / f"{kind}-{options.dtype}-{seal.hex()[:12]}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not (home / DESCRIPTION).is_file():
            beside = home / f".{DESCRIPTION}.{uuid.uuid4().hex[:8]}"
            beside.write_text(text + "\n", encoding="utf-8")
            os.replace(beside, home / DESCRIPTION)
    except OSError as error:
        raise ValueError(
            f"--cache_vision_features {options.folder} cannot be written ({error.strerror}); name "
            "another folder"
        ) from error
    return Cache(home, layout)


def prepare_features(
    datasets: Sequence[tuple[VLMDataset, int]],
    maker: Maker,
    options: CacheOptions,
    group: Group,
    *,
    log: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Complete the cache for the pictures of data sets, and let these read from it.

    Args:
        datasets: each with the number of its first records that are used.
        log, warn: print a line on the main process.
    Raises:
        ValueError, OSError: on every rank: the folder, disk or memory does not suffice.
    """
    (cache, *_) = group.collect(lambda: [open_cache(maker, options)])
    try:
        survey = find_all_pictures(datasets, group)
        missing = find_missing(cache, survey, group, warn=warn)
        Making(
            [dataset for dataset, _ in datasets],
            maker,
            home=cache.home,
            layout=cache.layout,
            options=options,
            group=group,
            log=log,
        ).run(missing, num_pictures=len(survey.sources))
    except KeyboardInterrupt:
        log(f"stopped: what is in {cache.home} stays, and the next run goes on from there")
        raise
    index = Index(cache.home, cache.layout)
    maps = ShardMaps(index.paths, cache.layout)
    places = Table(index.items(), dtype="i8")
    for (dataset, _), names in zip(datasets, survey.names, strict=True):
        named = Table(names.items(), dtype=KEY_TYPE)
        dataset.features = CachedFeatures(maps, places=places, names=named, warn=warn)
    report_coverage(cache, survey, missing, index, options, group, log=log)


def find_all_pictures(datasets: Sequence[tuple[VLMDataset, int]], group: Group) -> Survey:
    """The pictures of all data sets, the same on every rank."""
    own = Survey([{} for _ in datasets])
    take_turns(group, find_pictures(datasets, own, rank=group.rank, world_size=group.world_size))
    survey = Survey([{} for _ in datasets])
    for found in group.gather(own):
        survey.add(found)
    return survey


def find_missing(
    cache: Cache, survey: Survey, group: Group, *, warn: Callable[[str], None]
) -> Missing:
    """The pictures without a whole entry, the same on every rank."""
    index = Index(cache.home, cache.layout)
    known = [key for key in survey.sources if key in index.places]
    damaged: list[bytes] = []
    take_turns(group, discard_damaged(index, known[group.rank :: group.world_size], damaged))
    lost = {key for of_rank in group.gather(damaged) for key in of_rank}
    if lost:
        warn(
            f"{cache.home}: {len(lost)} entry(s) were damaged or of another tower: they are "
            "discarded and computed anew"
        )
        index = Index(cache.home, cache.layout)
    missing = [key for key in survey.sources if key not in index.places]
    missing = group.gather(missing)[0]  # another run may have added some between two ranks' looks
    return Missing(missing, survey.sources)


def report_coverage(
    cache: Cache,
    survey: Survey,
    missing: Missing,
    index: Index,
    options: CacheOptions,
    group: Group,
    *,
    log: Callable[[str], None],
) -> None:
    """Say how many pictures are read from the cache, and why the others are not."""
    num_known = sum(key in index.places for key in survey.sources)
    broken = [reason for of_rank in group.gather(missing.broken) for reason in of_rank]
    num_unfit = sum(group.gather(missing.num_unfit))
    num_left = len(survey.sources) - num_known - len(broken) - num_unfit
    reasons = [
        (num_left, f"do not fit into --cache_gb {options.max_gib:g}")
        if options.max_gib is not None
        else (num_left, "were changed meanwhile"),
        (num_unfit, f"have values beyond {options.dtype}"),
        (len(broken), f"cannot be read, the first: {broken[0]}" if broken else ""),
    ]
    others = "".join(f"; {num} {why}" for num, why in reasons if num > 0)
    log(
        f"feature cache {cache.home}: {num_known} of {len(survey.sources)} pictures are read from "
        f"it{others}{'; these are computed as without the cache' if others else ''}"
    )
