"""If this fails, a run that is killed and resumed, also with other numbers of ranks, trains on a
sample twice or never.
"""

import random
import signal
from collections import Counter

import pytest
import torch
from support.rank_group import RankGroup, record_steps, recorded_steps, run_ranks
from support.scripts import train_flags
from support.tiny_parts import make_records

NUM_RECORDS = 60
TIMING = {"save_interval": 2, "num_hidden_layers": 1}


def state_of(folder) -> dict | None:
    path = folder / "checkpoints" / "pretrain_vlm_32_resume.pth"
    return torch.load(path, weights_only=True) if path.exists() else None


def samples_of(folder) -> int:
    state = state_of(folder)
    return state["progress"]["samples"] if state else 0


def kill_at_random(group: RankGroup, folder, name: str, dice: random.Random) -> str:
    """Let some steps pass and kill all ranks, or one, or in the middle of a save."""
    steps = dice.randrange(1, 9)
    enough = lambda: len(recorded_steps(folder, name)) >= steps * len(group.processes)  # noqa: E731
    group.wait_for(enough, f"{steps} steps")
    how = dice.choice(("all ranks", "all ranks", "one rank", "in a save", "SIGTERM to one"))
    if how == "in a save":
        saving = lambda: any(folder.glob("*/.*.tmp"))  # noqa: E731
        group.wait_for(saving, "save")
    victim = dice.randrange(len(group.processes))
    if how == "SIGTERM to one":
        group.kill(victim, signum=signal.SIGTERM)
        assert set(group.wait()) == {143}, group.said()
    elif how == "one rank":
        group.kill(victim)
        statuses = group.wait(timeout_s=60)
        assert statuses[victim] == -signal.SIGKILL
        for rank, status in enumerate(statuses):
            if rank != victim:
                assert status == 1 and f"rank {victim} (" in group.output(rank), group.said()
    else:
        group.kill()
        group.wait()
    return how


def assert_every_sample_once(used: list[tuple[int, list[str]]], num_epochs: int) -> None:
    """`used` is what is in the surviving weights, as (samples before, names)."""
    for epoch in range(num_epochs):
        within = range(epoch * NUM_RECORDS, (epoch + 1) * NUM_RECORDS)
        counts = Counter(name for start, names in used if start in within for name in names)
        assert len(counts) == NUM_RECORDS and set(counts.values()) == {1}, (epoch, counts)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.full)])
def test_every_sample_is_used_once_whatever_kills_and_ranks(rounds, assets, tmp_path):
    data, images = make_records(tmp_path / "data", num_records=NUM_RECORDS)
    seed = random.SystemRandom().randrange(10**6)
    dice, used, tally = random.Random(seed), [], Counter()
    world_size, survived = 0, 0
    for round_number in range(rounds):
        world_size = dice.choice([n for n in (1, 2, 3, 4) if n != world_size])
        split = {"batch_size": dice.randrange(1, 4), "accumulation_steps": dice.randrange(1, 3)}
        argv = train_flags(
            assets, tmp_path, data, images, epochs=1000, from_resume=1, **split, **TIMING
        )
        name = f"round{round_number}"
        hook = (record_steps, tmp_path, name)
        group = RankGroup(argv, tmp_path, world_size=world_size, hook=hook, name=name)
        with group:
            tally[kill_at_random(group, tmp_path, name, dice)] += 1
        before, survived = survived, samples_of(tmp_path)
        assert survived >= before, (seed, round_number, group.said())
        steps = recorded_steps(tmp_path, name)
        used += [step for step in steps if before <= step[0] < survived]
    num_epochs = survived // NUM_RECORDS + 1
    argv = train_flags(assets, tmp_path, data, images, epochs=num_epochs, from_resume=1, **TIMING)
    run_ranks(argv, tmp_path, world_size=2, hook=(record_steps, tmp_path, "last"), name="last")
    used += [step for step in recorded_steps(tmp_path, "last") if step[0] >= survived]
    assert_every_sample_once(used, num_epochs)
    print(f"\nsurvived {rounds} rounds over {num_epochs} epochs (seed {seed}): {dict(tally)}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "kills"), [(2, 3), pytest.param(3, 12, marks=pytest.mark.full)]
)
def test_same_ranks_end_with_the_same_bits(world_size, kills, assets, tmp_path):
    data, images = make_records(tmp_path / "data", num_records=NUM_RECORDS)
    seed = random.SystemRandom().randrange(10**6)
    dice = random.Random(seed)
    common = {"epochs": 2 + kills // 3, "batch_size": 2, "from_resume": 1, **TIMING}
    whole = train_flags(assets, tmp_path / "whole", data, images, **common)
    cut = train_flags(assets, tmp_path / "cut", data, images, **common)
    run_ranks(whole, tmp_path, world_size=world_size)
    for round_number in range(kills):
        name = f"round{round_number}"
        hook = (record_steps, tmp_path / "cut", name)
        (tmp_path / "cut").mkdir(exist_ok=True)
        group = RankGroup(cut, tmp_path, world_size=world_size, hook=hook, name=name)
        with group:
            kill_at_random(group, tmp_path / "cut", name, dice)
    run_ranks(cut, tmp_path, world_size=world_size, name="last")
    states = [state_of(tmp_path / side) for side in ("whole", "cut")]
    assert states[0]["progress"] == states[1]["progress"]
    for part in ("model", "optimizer"):
        assert same_bits(states[0][part], states[1][part]), (part, seed)
    assert same_bits(states[0]["rng"], states[1]["rng"]), seed
    weights = [
        torch.load(tmp_path / side / "out" / "pretrain_vlm_32.pth", weights_only=True)
        for side in ("whole", "cut")
    ]
    assert same_bits(*weights), seed


def same_bits(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_bits(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        pairs = zip(left, right, strict=True)
        return len(left) == len(right) and all(same_bits(a, b) for a, b in pairs)
    return left == right
