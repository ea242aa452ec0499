"""Owns the checks and estimates before the first step."""

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from model.model_minimind import MiniMindForCausalLM
from model.vision.preprocessing import measure
from trainer.loop.left_out import MAX_BAD_SHARE, too_many_bad
from trainer.ranks.group import Logger, Ranks, warn
from trainer.run.memory import StepShape, estimate_step
from trainer.tracking.metrics import GIB
from trainer.train_args import TrainArgs

# With the right tokenizer a trained language model is far below chance on such sentences.
PROBE_TEXTS = (
    "The sun rises in the east and sets in the west.",
    "She went to the market to buy some bread and milk.",
    "今天天气很好，我们一起去公园散步。",
    "他喜欢在晚上读书，也喜欢听音乐。",
)
NEAR_CHANCE = 0.85  # share of ln(vocabulary) above which a loss counts as near chance
STATE_BYTES = {"weight": 2, "master": 4, "adam": 8}  # per parameter
ALL_UP_TO = 10_000  # records that are all looked at before the first step; of more, a sample
NUM_LOOKED_AT = 2_000
MORE_LOOKED_AT = 20_000  # where the first sample is near the limit
LOOK, LOOK_ON = 0x100C, 0x100D  # keep the draws of the samples apart from others of the seed
SURE = 3  # standard deviations over the limit, from which a sample speaks for all records
KEPT_STATES = 2  # the newest and the one before
ACTIVATION_BYTES = 120  # per token, layer and hidden unit, in float32 with a SwiGLU block


@torch.no_grad()
def probe_loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean loss per token, in nats, on a few ordinary English and Chinese sentences."""
    model.eval()
    total = num_tokens = 0.0
    for text in PROBE_TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
        loss = model(input_ids=ids.to(model.device), labels=ids.to(model.device)).loss.item()
        total, num_tokens = total + loss * (ids.shape[1] - 1), num_tokens + ids.shape[1] - 1
    return total / num_tokens


def check_tokenizer_fits(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, weight: Path
) -> None:
    """Warn loudly if a language model is near chance on ordinary sentences."""
    loss, chance = probe_loss(model, tokenizer), math.log(model.config.vocab_size)
    if not loss < NEAR_CHANCE * chance:
        warn(
            f"weights and tokenizer may not belong together: {weight.name} has a loss of "
            f"{loss:.2f} per token on ordinary sentences, chance is {chance:.2f}; name the "
            "tokenizer this weight was trained with by --tokenizer_path, or choose another "
            "--from_weight / 权重与分词器可能不匹配，请用 --tokenizer_path 指定"
        )


def check_writable(folder: Path, *, flag: str) -> None:
    """Raise ValueError unless a file can be written into the folder, which is made if missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except OSError as error:
        raise ValueError(
            f"{flag} {folder} cannot be written ({error.strerror}); choose another folder"
        ) from error


def check_disk(
    model: nn.Module, *, save_dir: Path, checkpoint_dir: Path, num_states: int = 0
) -> None:
    """Raise ValueError unless weights and states fit."""
    needs = saving_needs(
        model, save_dir=save_dir, checkpoint_dir=checkpoint_dir, num_states=num_states
    )
    for folder, size in needs.values():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ValueError(
                f"{folder} has {free / GIB:.2f} GiB free, saving needs {size / GIB:.2f}; free "
                "some space or choose other folders by --save_dir and --checkpoint_dir"
            )


def saving_needs(
    model: nn.Module, *, save_dir: Path, checkpoint_dir: Path, num_states: int
) -> dict[int, list[Any]]:
    """Folder and bytes that saving needs, by file system (`st_dev`); an old file stays until its
    successor is complete.

    Args:
        num_states: how many states of this run are there already.
    """
    own = [p for n, p in model.named_parameters() if not n.startswith("vision_encoder.")]
    num_all = sum(p.numel() for p in own)
    num_trained = sum(p.numel() for p in own if p.requires_grad)
    needs: dict[int, list[Any]] = {}
    state_size = STATE_BYTES["master"] * num_all + STATE_BYTES["adam"] * num_trained
    for folder, size in (
        (save_dir, 2 * STATE_BYTES["weight"] * num_all),
        (checkpoint_dir, (KEPT_STATES + 1 - min(num_states, KEPT_STATES)) * state_size),
    ):
        need = needs.setdefault(os.stat(folder).st_dev, [folder, 0])
        need[1] += size
    return needs


def report_memory(
    model: MiniMindForCausalLM, ranks: Ranks, args: TrainArgs, *, num_rows: int
) -> None:
    """Print the estimated memory of a step by what takes it, for samples of an image and a short
    answer; where it is surely little, that alone, for the estimate takes seconds.

    Args:
        num_rows: of a micro-step: the samples, and the answers drawn to them.
    """
    num_image_tokens = getattr(model.config, "num_image_tokens", 0)
    num_tokens = min(args.max_seq_len, (num_image_tokens or 512) + 64)
    where = f"on {ranks.device.type} for {num_rows} samples of about {num_tokens} tokens"
    if upper_bound_gib(model, batch_size=num_rows, num_tokens=num_tokens) < 1:
        Logger(f"estimated memory: less than 1 GiB {where}")
        return
    processor = getattr(model, "image_processor", None)
    is_seen = processor is not None and args.cache_folder() is None
    shape = StepShape(
        -(-num_rows // args.length_groups),
        num_tokens,
        max(1, num_tokens - num_image_tokens),
        measure(processor).side if is_seen else None,
    )
    memory = estimate_step(
        model,
        shape,
        device=ranks.device,
        dtype=args.dtype,
        optimizer=args.optimizer,
        keeps_gradients=args.accumulation_steps * args.length_groups * ranks.world_size > 1,
    )
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in asdict(memory).items() if size)
    Logger(f"estimated memory: {memory.total / GIB:.1f} GiB {where} ({parts})")


def upper_bound_gib(model: nn.Module, *, batch_size: int, num_tokens: int) -> float:
    """More than a step takes: parameters, gradients, AdamW and activations."""
    config = model.config
    size = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())
    hidden = config.hidden_size * config.num_hidden_layers
    size += batch_size * num_tokens * (hidden * ACTIVATION_BYTES + config.vocab_size * 12)
    return size / GIB


def check_ranks_agree(ranks: Ranks, facts: dict[str, str]) -> None:
    """Check that all ranks have the same values.

    Raises:
        ValueError: on every rank, naming what differs and which ranks have what.
    """
    of_ranks = ranks.gather(facts)
    names = dict.fromkeys(name for of_rank in of_ranks for name in of_rank)
    problems = []
    for name in names:
        holders: dict[str, list[str]] = {}
        for rank, of_rank in enumerate(of_ranks):
            holders.setdefault(of_rank.get(name, "none"), []).append(str(rank))
        if len(holders) > 1:
            has = (f"{value[:80]} on rank {', '.join(who)}" for value, who in holders.items())
            problems.append(f"{name}: {'; '.join(has)}")
    if problems:
        raise ValueError(
            f"the ranks differ in {' | '.join(problems)}; give all of them the same files and flags"
        )


def sample_of(dataset, *, seed: int) -> Sequence[int]:
    """The records of a data set that are looked at before the first step; of a stream those that
    are needed first."""
    if getattr(dataset, "stream", None) is not None:
        return dataset.stream.first_ids(NUM_LOOKED_AT)
    return looked_at(dataset.num_records, seed=seed)


def looked_at(num_records: int, *, seed: int) -> Sequence[int]:
    """The records that are looked at before the first step: all, or a seeded sample in order."""
    if num_records <= ALL_UP_TO:
        return range(num_records)
    return _draw(num_records, NUM_LOOKED_AT, key=(LOOK, seed))


def _draw(num_records: int, num: int, *, key: tuple[int, int]) -> list[int]:
    """So many of the records, or all if there are no more, in order."""
    dice = np.random.default_rng(key)
    drawn: list[int] = dice.choice(num_records, min(num, num_records), replace=False).tolist()
    return sorted(drawn)


def check_records(dataset, *, on_bad_sample: str, seed: int) -> None:
    """Look at records without decoding pictures: at all, or where there are many, at a sample.

    What a sample leaves out is checked as it comes: a run stops as soon as more than 1% of an
    epoch's samples were bad. Where the sample is so bad that this may happen, a larger one is
    looked at first; of a stream, which would have to be fetched, the first records alone.

    Raises:
        ValueError: one is bad and the policy is "error", or more than 1% are: of all, or so many
            of a sample that all cannot be better.
    """
    if dataset.num_blank:
        warn(f"{dataset.data_path.name}: {dataset.num_blank} blank line(s) hold no record")
    is_stream = getattr(dataset, "stream", None) is not None
    is_short = dataset.num_records <= ALL_UP_TO and not is_stream
    if is_short or not hasattr(dataset, "bad_records"):
        judge(dataset, dataset.find_bad_records(), on_bad_sample=on_bad_sample)
        return
    sample = sample_of(dataset, seed=seed)
    bad, num_seen = dataset.find_bad_records(sample), len(sample)
    may_stop = len(bad) > MAX_BAD_SHARE / 2 * num_seen and on_bad_sample != "error"
    if may_stop and not is_stream:
        drawn = _draw(dataset.num_records, MORE_LOOKED_AT, key=(LOOK_ON, seed))
        more = sorted(set(drawn) - set(sample))
        bad, num_seen = bad + dataset.find_bad_records(more), num_seen + len(more)
    if may_stop and tells_too_many(len(bad), num_seen, num_records=dataset.num_records):
        raise ValueError(too_many_bad(len(bad), num_seen, bad[-1].reason))
    judge(dataset, bad, on_bad_sample=on_bad_sample)
    Logger(
        f"{dataset.data_path.name}: {num_seen} of {dataset.num_records} records looked at; the "
        "others are checked as they come"
    )


def tells_too_many(num_bad: int, num_seen: int, *, num_records: int) -> bool:
    """Whether so many bad ones among the records that were looked at say that more than 1% of all
    are. Few records say little: they are taken for a whole sample whose rest is good."""
    limit = MAX_BAD_SHARE * max(num_seen, NUM_LOOKED_AT)
    return num_seen < num_records and num_bad > limit + SURE * math.sqrt(limit)


def judge(dataset, bad: list, *, on_bad_sample: str) -> None:
    """Warn of bad records, or raise ValueError as `check_records` says."""
    if not bad:
        return
    if on_bad_sample == "error":
        raise ValueError(f"{bad[0].reason} (--on_bad_sample skip goes on without it)")
    if len(bad) > MAX_BAD_SHARE * dataset.num_records:
        raise ValueError(too_many_bad(len(bad), dataset.num_records, bad[-1].reason))
    warn(f"{len(bad)} record(s) will be left out; the first: {bad[0].reason}")
