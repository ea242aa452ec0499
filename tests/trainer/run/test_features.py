"""If this fails, training on kept features is not training on the pictures: other losses, samples
or messages, or a cache that a kill, a flipped byte or another run has spoilt is used.
"""

import json
import os
import signal
import types
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from support.noise import entry_bytes, make_noise_records, num_entries, shards_of, slow_tower
from support.rank_group import RankGroup, run_ranks
from support.scripts import train_flags
from support.states import leave_at
from support.tiny_parts import make_tower

from dataset.records.images import ImageFolder
from trainer import train_llm, train_pretrain_vlm
from trainer.loop import train_loop

BF16_STEP = 2.0**-8  # between neighbouring numbers, relative, and above 1 in nats
FAST = {"num_hidden_layers": 1, "learning_rate": 0.003}


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> tuple[Path, Path, int]:
    return make_noise_records(tmp_path_factory.mktemp("noise"))


def train(assets, out: Path, noise, *, status: int = 0, **flags) -> list[dict]:
    """Train in this process; returns the metrics."""
    argv = train_flags(assets, out, *noise[:2], **(FAST | flags))
    assert train_pretrain_vlm.main(argv) == status
    lines = (out / "out" / "pretrain_vlm_32_metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(figures: list[dict]) -> torch.Tensor:
    return torch.tensor([f.get("loss", f.get("val_loss")) for f in figures])


@pytest.fixture(scope="module")
def cached(assets, noise, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A whole cache in float16, and the losses of the run that made it."""
    folder = tmp_path_factory.mktemp("cached")
    return folder / "cache", losses(
        train(assets, folder, noise, cache_vision_features=folder / "cache")
    )


def copy_of(cache: Path, folder: Path) -> Path:
    for path in filter(Path.is_file, cache.rglob("*")):
        place = folder / "cache" / path.relative_to(cache)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    return folder / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [20, pytest.param(200, marks=pytest.mark.full)])
def test_losses_are_those_without_the_cache(num_steps, assets, noise, tmp_path, monkeypatch):
    """Data, draws and validation too, and after the making no picture is touched."""
    monkeypatch.chdir(tmp_path)
    flags = {"dtype": "bfloat16", "epochs": num_steps // 4, "batch_size": 5, "system_share": 0.5}
    flags |= {"val_data_path": noise[0], "val_images_path": noise[1]}
    without = train(assets, tmp_path / "without", noise, **flags)
    read, reads = ImageFolder.read, []
    monkeypatch.setattr(
        ImageFolder, "read", lambda self, name: reads.append(name) or read(self, name)
    )
    found = train(assets, tmp_path / "with", noise, cache_vision_features=1, **flags)
    assert len(reads) == 2 * noise[2] + noise[2], "to hash, for each data set, and to compute once"
    assert num_entries(tmp_path / "with" / "out" / "features") == noise[2]
    for name in ("samples", "val_tokens", "bad_samples"):
        assert [f.get(name) for f in found] == [f.get(name) for f in without]
    torch.testing.assert_close(losses(found), losses(without), rtol=BF16_STEP, atol=BF16_STEP)


def test_a_second_run_reads_what_the_first_has_made(assets, noise, cached, tmp_path, capfd):
    cache, expected = cached
    before = {path: path.read_bytes() for path in shards_of(cache)}
    found = train(assets, tmp_path, noise, cache_vision_features=cache, num_workers=1)
    assert torch.equal(losses(found), expected)
    assert {path: path.read_bytes() for path in shards_of(cache)} == before
    out = capfd.readouterr().out
    assert f"{noise[2]} of {noise[2]} pictures are read from it" in out and "compute" not in out


def test_int8_is_near_and_is_not_resumed_as_float16(assets, noise, cached, tmp_path, capfd):
    cache, expected = cached
    flags = {"cache_vision_features": cache, "epochs": 1}
    found = train(assets, tmp_path, noise, cache_dtype="int8", **flags)
    torch.testing.assert_close(losses(found), expected, rtol=0.01, atol=0)
    assert not torch.equal(losses(found), expected)
    assert sorted(p.name.split("-")[1] for p in cache.iterdir()) == ["float16", "int8"]
    train(assets, tmp_path, noise, status=1, from_resume=1, **flags)
    assert "--cache_dtype of the features is 'int8'" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "torn", "foreign"])
def test_a_damaged_entry_is_computed_anew(damage, assets, noise, cached, tmp_path, capfd):
    cache = copy_of(cached[0], tmp_path)
    (shard,) = [path for path in shards_of(cache) if "float16" in path.parent.name]
    data = bytearray(shard.read_bytes())
    if damage == "flipped":
        data[3 * entry_bytes() + 100] ^= 1
    elif damage == "torn":
        del data[-10:]
    else:
        make_tower(tmp_path / "tower", image_size=32, patch_size=8)
        weights = tmp_path / "tower" / "model.safetensors"
        other = bytearray(weights.read_bytes())
        other[len(other) // 2] ^= 8  # a number of a layer that no digest of old covers
        weights.write_bytes(other)
        train(
            assets,
            tmp_path / "other",
            noise,
            vision_model_path=tmp_path / "tower",
            cache_vision_features=tmp_path / "foreign",
        )
        (foreign,) = shards_of(tmp_path / "foreign")
        assert foreign.parent.name != shard.parent.name
        data = foreign.read_bytes()
    shard.write_bytes(data)
    capfd.readouterr()
    found = train(assets, tmp_path / "run", noise, cache_vision_features=cache)
    said = capfd.readouterr()
    num = noise[2] if damage == "foreign" else 1
    assert f"{noise[2] - num} of {noise[2]} pictures are there, {num} to compute" in said.out
    assert (f"{num} entry(s) were damaged or of another tower" in said.err) == (damage != "torn")
    torch.testing.assert_close(losses(found), cached[1], rtol=1e-4, atol=0)
    train(assets, tmp_path / "run", noise, cache_vision_features=cache)
    assert "entry(s) were damaged" not in capfd.readouterr().err  # it was mended for good


def test_damage_during_a_run_costs_only_the_picture(
    assets, noise, cached, tmp_path, monkeypatch, capfd
):
    cache = copy_of(cached[0], tmp_path)
    step, damaged = train_loop.optimizer_step, []

    def spoil(*arguments):
        if not damaged:
            for shard in shards_of(cache):
                with open(shard, "r+b") as file:  # in place: it is mapped
                    file.seek(50)
                    file.write(os.urandom(os.path.getsize(shard) - 50))
            damaged.append(True)
        return step(*arguments)

    monkeypatch.setattr(train_loop, "optimizer_step", spoil)
    found = train(assets, tmp_path, noise, cache_vision_features=cache)
    assert "is damaged: its picture is computed anew" in capfd.readouterr().err
    torch.testing.assert_close(losses(found), cached[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_that_fit", [0, 7])
def test_what_does_not_fit_is_computed_as_without(
    num_that_fit, assets, noise, cached, tmp_path, capfd
):
    bound = (num_that_fit + 0.5) * entry_bytes() + 4096  # and the description
    flags = {"cache_vision_features": tmp_path / "cache", "cache_gb": bound / 2**30}
    found = train(assets, tmp_path, noise, **flags)
    assert sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file()) <= bound
    num = num_entries(tmp_path / "cache")
    assert num_that_fit <= num < noise[2]
    assert f"{noise[2] - num} do not fit into --cache_gb" in capfd.readouterr().out
    torch.testing.assert_close(losses(found), cached[1], rtol=1e-3, atol=0)


def test_a_disk_that_is_too_small_is_said_first(assets, noise, tmp_path, monkeypatch, capfd):
    usage = types.SimpleNamespace(disk_usage=lambda _: types.SimpleNamespace(free=1 << 20))
    monkeypatch.setattr("dataset.features.making.shutil", usage)
    argv = train_flags(assets, tmp_path, *noise[:2], **FAST, cache_vision_features=1)
    assert train_pretrain_vlm.main(argv) == 1
    assert "bound them by --cache_gb" in capfd.readouterr().err


@pytest.mark.slow
def test_broken_pictures_stay_bad_samples(assets, noise, tmp_path, capfd):
    data, images, num = make_noise_records(tmp_path / "data", num_records=110)
    (images / "0_0.png").write_bytes((images / "0_0.png").read_bytes()[:90])
    told = []
    for cache in (0, tmp_path / "cache"):
        train(assets, tmp_path, (data, images), cache_vision_features=cache, batch_size=50)
        out = capfd.readouterr().out.splitlines()
        told.append([line for line in out if "sample left out" in line])
    assert told[0] == told[1] and len(told[0]) == 1 and "data.jsonl:1: not a readable" in told[0][0]
    assert any("1 cannot be read, the first: data.jsonl:1: not a" in line for line in out)
    assert num_entries(tmp_path / "cache") == num - 1


def test_pictures_in_parquet_are_found_by_their_bytes(assets, noise, cached, tmp_path, capfd):
    records = [json.loads(line) for line in noise[0].read_text().splitlines()]
    columns = {
        "conversations": [json.dumps(record["conversations"]) for record in records],
        "image_bytes": [[(noise[1] / n).read_bytes() for n in r["image"]] for r in records],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    found = train(
        assets, tmp_path, (tmp_path / "data.parquet", None), cache_vision_features=cached[0]
    )
    assert torch.equal(losses(found), cached[1])
    assert "compute" not in capfd.readouterr().out


@pytest.mark.slow
def test_resumes_with_equal_bits(assets, noise, cached, tmp_path, monkeypatch):
    flags = {
        "cache_vision_features": cached[0],
        "epochs": 2,
        "save_interval": 2,
        "dtype": "bfloat16",
    }
    train(assets, tmp_path / "whole", noise, **flags)
    leave_at(monkeypatch, 5)
    train(assets, tmp_path / "cut", noise, status=130, **flags)
    monkeypatch.undo()
    train(assets, tmp_path / "cut", noise, from_resume=1, **flags)
    weights = [
        torch.load(tmp_path / side / "out" / "pretrain_vlm_32.pth", weights_only=True)
        for side in ("whole", "cut")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def argv_of(assets, out: Path, noise, cache: Path) -> list[str]:
    return train_flags(assets, out, *noise[:2], **FAST, batch_size=2, cache_vision_features=cache)


@pytest.mark.slow
def test_killed_while_it_is_made_goes_on_from_there(assets, noise, cached, tmp_path):
    cache = tmp_path / "cache"
    argv = argv_of(assets, tmp_path, noise, cache)
    with RankGroup(argv, tmp_path, world_size=1, hook=(slow_tower, 0.3), name="killed") as group:
        group.wait_for(lambda: num_entries(cache) >= 5, "entries")
        group.kill(signum=signal.SIGKILL)
        group.wait()
    num = num_entries(cache)
    assert 5 <= num < noise[2]
    said = run_ranks(argv, tmp_path, world_size=1, name="again")
    assert f"{num} of {noise[2]} pictures are there" in said
    assert num_entries(cache) == noise[2]


@pytest.mark.slow
def test_two_ranks_share_the_work(assets, noise, tmp_path):
    cache = tmp_path / "cache"
    said = run_ranks(argv_of(assets, tmp_path, noise, cache), tmp_path, world_size=2)
    assert "on 2 rank(s)" in said and num_entries(cache) == noise[2]
    sizes = [path.stat().st_size // entry_bytes() for path in shards_of(cache)]
    assert sorted(sizes) == [noise[2] // 2, noise[2] - noise[2] // 2]
    lines = (tmp_path / "out" / "pretrain_vlm_32_metrics.jsonl").read_text().splitlines()
    alone = train(assets, tmp_path / "alone", noise, cache_vision_features=cache)
    found = losses([json.loads(line) for line in lines])
    torch.testing.assert_close(found, losses(alone), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_runs_make_one_cache(assets, noise, tmp_path):
    cache = tmp_path / "cache"
    hook = (slow_tower, 0.2)
    argvs = [argv_of(assets, tmp_path / name, noise, cache) for name in "ab"]
    with (
        RankGroup(argvs[0], tmp_path, world_size=1, hook=hook, name="a") as a,
        RankGroup(argvs[1], tmp_path, world_size=1, hook=hook, name="b") as b,
    ):
        assert a.wait() == b.wait() == [0], a.said() + b.said()
    assert noise[2] <= num_entries(cache) <= 2 * noise[2]
    both = [losses_of(tmp_path / name) for name in "ab"]
    torch.testing.assert_close(*both, rtol=1e-5, atol=0)


def losses_of(folder: Path) -> torch.Tensor:
    lines = (folder / "out" / "pretrain_vlm_32_metrics.jsonl").read_text().splitlines()
    return losses([json.loads(line) for line in lines])


def test_flag_is_0_1_or_a_folder(assets, noise, tmp_path, capfd):
    argv = train_flags(assets, tmp_path, *noise[:2], cache_vision_features="yes")
    assert train_pretrain_vlm.main(argv) == 1
    assert "'yes' is not 0, 1 or a folder" in capfd.readouterr().err
    text = tmp_path / "corpus.txt"
    text.write_text("A red circle on a blue ground. " * 40)
    argv = train_flags(assets, tmp_path, text, None, cache_vision_features=1, max_seq_len=32)
    argv = [a for a in argv if a]
    assert train_llm.main(argv) == 0
    assert "this stage reads no pictures" in capfd.readouterr().err
