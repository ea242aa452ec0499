"""If this fails, models of generation 3 are trained otherwise than their recipe says."""

import json
import random

import pytest
import torch
from support.plain_third import read_samples, train
from support.published_rows import in_type, mixed_rows, write
from support.rank_group import RankGroup, run_ranks, run_sft
from support.scripts import train_flags
from support.third_generation import make_assets3, make_loaded3
from support.tiny_parts import make_records
from support.tiny_vlm import save_tiny

from trainer import train_pretrain_vlm, train_sft_vlm
from trainer.loop.sample_order import epoch_order

NUM_STEPS, BATCH = 20, 4


@pytest.fixture(scope="module")
def assets3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets3")
    make_assets3(folder)
    for use_moe in (False, True):
        loaded = make_loaded3(folder, use_moe=use_moe, initializer_range=0.1)
        save_tiny(loaded, folder / f"sft_vlm_32{'_moe' if use_moe else ''}.pth")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data3"), num_records=NUM_STEPS * BATCH, multi=True)


def losses_of(folder) -> list[float]:
    lines = next((folder / "out").glob("*_metrics.jsonl")).read_text().splitlines()
    return [f["loss"] for f in map(json.loads, lines) if "loss" in f]


@pytest.mark.parametrize("use_moe", [0, 1], ids=["dense", "moe"])
@pytest.mark.parametrize("freeze_llm", [0, 1, 2])
def test_twenty_steps_are_those_of_a_plain_loop(freeze_llm, use_moe, assets3, data, tmp_path):
    start = assets3 / f"sft_vlm_32{'_moe' if use_moe else ''}.pth"
    argv = train_flags(
        assets3,
        tmp_path,
        *data,
        from_weight=start,
        freeze_llm=freeze_llm,
        learning_rate=1e-3,
        use_moe=use_moe,
        batch_size=BATCH // 2,
        accumulation_steps=2,
        system_share=0,
        empty_think_share=1,
    )
    assert train_sft_vlm.main(argv) == 0
    w = {k: v.float() for k, v in torch.load(start, weights_only=True).items()}
    samples = read_samples(*data, assets3)
    order = epoch_order(len(samples), seed=42, epoch=0)
    steps = [[samples[i] for i in order[s : s + BATCH]] for s in range(0, len(order), BATCH)]
    expected = train(w, steps, lr=1e-3, freeze_llm=freeze_llm, num_layers=2)
    torch.testing.assert_close(losses_of(tmp_path), expected, rtol=1e-4, atol=0)
    path = next((tmp_path / "checkpoints").glob("*_resume.pth"))
    state = torch.load(path, weights_only=True)["model"]
    for name, weight in w.items():
        distance = (state[name] - weight).norm() / weight.norm()
        assert distance <= 1e-4, (name, distance)


def test_recipe_follows_the_weight(assets3, data, tmp_path, capfd):
    """Nothing names the generation: the weight's tensors do."""
    (tmp_path / "out").mkdir()
    weight = assets3 / "sft_vlm_32.pth"
    (tmp_path / "out" / "llm_32.pth").write_bytes(weight.read_bytes())
    flags = {"freeze_llm": None, "save_interval": None, "epochs": None, "hidden_size": None}
    flags |= {"num_hidden_layers": None, "from_weight": None, "batch_size": 40}
    assert train_pretrain_vlm.main(train_flags(assets3, tmp_path, *data, **flags)) == 0
    said = capfd.readouterr().out
    for word in ("--epochs 2", "--freeze_llm 2", "--save_interval 1000", "--max_seq_len 450"):
        assert word in said
    assert "--generation 3" in said and "generation 3; trains: projection only" in said
    argv = train_flags(assets3, tmp_path, *data, **(flags | {"learning_rate": None}))
    argv += ["--from_weight", "pretrain_vlm"]
    assert train_sft_vlm.main(argv) == 0
    said = capfd.readouterr().out
    assert "--learning_rate 5e-06" in said and "first and last decoder layer" in said


@pytest.mark.parametrize("stage", [train_pretrain_vlm, train_sft_vlm])
def test_a_weight_of_another_generation_is_one_line(stage, assets, assets3, data, tmp_path, capfd):
    argv = train_flags(assets3, tmp_path, *data, from_weight=assets3 / "sft_vlm_32.pth")
    assert stage.main([*argv, "--generation", "2"]) == 1
    assert "has generation 3, not 2" in capfd.readouterr().err
    argv = train_flags(assets, tmp_path, *data)
    assert stage.main([*argv, "--generation", "3"]) == 1
    line = capfd.readouterr().err
    assert line.startswith("error: the tokenizer has no token <|image_pad|>")


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [120, pytest.param(3000, marks=pytest.mark.full)])
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_parquet_as_published_trains_and_resumes_with_equal_bits(
    stage, num_rows, assets3, tmp_path
):
    """Rows of text alone with a black picture, several pictures, dictionaries in lists; with random
    system messages and think blocks; killed with `kill -9` in the middle."""
    texts, images = mixed_rows(random.Random(0), num_rows)
    data = tmp_path / f"{stage}_i2t.parquet"
    write(data, texts, in_type(images, "list of dictionary"), data_page_size=4096)

    def argv(name):
        flags = {"from_weight": assets3 / "sft_vlm_32.pth", "freeze_llm": None, "batch_size": 10}
        flags |= {"num_workers": 1, "save_interval": 3, "from_resume": 1}
        return train_flags(assets3, tmp_path / name, data, None, **flags)

    def launch(name) -> dict:
        hook = (run_sft, argv(name)) if stage == "sft" else None
        return {"argv": argv(name), "folder": tmp_path, "hook": hook, "name": name}

    run_ranks(world_size=1, **launch("whole"))
    with RankGroup(world_size=1, **launch("cut")) as group:
        group.wait_for(lambda: len(losses_so_far(tmp_path / "cut")) > num_rows // 20)
        group.kill()
        group.wait()
    assert "resumed" in run_ranks(world_size=1, **launch("cut"))
    whole, cut = (
        torch.load(next((tmp_path / name / "checkpoints").glob("*_resume.pth")), weights_only=True)
        for name in ("whole", "cut")
    )
    assert whole["progress"] == cut["progress"] and whole["progress"]["bad_samples"] == 0
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, cut["model"][name]), name
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")


def losses_so_far(folder) -> list[str]:
    files = list((folder / "out").glob("*_metrics.jsonl"))
    return files[0].read_text().splitlines() if files else []
