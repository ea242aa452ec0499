"""If this fails, pretrain or SFT trains the wrong parameters, makes other updates than its flags
say, or writes or reports wrong results.
"""

import json
import math
import re

import pytest
import torch
from support.rank_group import run_ranks
from support.scripts import run_script, train_flags
from support.tiny_parts import conversation, make_records, make_tower

from model.machine import device
from model.weights.metadata import read_metadata
from model.weights.saving import save_weights
from trainer import train_pretrain_vlm, train_sft_vlm
from trainer.loop.sample_order import epoch_order, rank_batches
from trainer.ranks.group import Ranks


@pytest.fixture
def data(tmp_path):
    return make_records(tmp_path / "data", multi=True)


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in next(folder.glob("*_metrics.jsonl")).open()]


def weight_of(folder, name: str) -> dict:
    return torch.load(folder / "out" / name, weights_only=True)


def test_stages_follow_one_another(assets, tmp_path, data, capfd):
    val = make_records(tmp_path / "val", num_records=8, seed=1)
    flags = {"val_data_path": val[0], "val_images_path": val[1], "learning_rate": 0.003}
    argv = train_flags(assets, tmp_path, *data, epochs=3, **flags)
    assert train_pretrain_vlm.main(argv) == 0
    out = capfd.readouterr().out
    assert "Epoch:[1/3](6/6) loss:" in out and "vision_proj" in out and "git " in out
    figures = metrics_of(tmp_path / "out")
    steps = [f for f in figures if "loss" in f]
    assert [f["step"] for f in steps] == list(range(1, 19))
    wanted = {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "samples_per_s",
        "data_wait_pct",
        "peak_gib",
    }
    assert wanted <= steps[0].keys()
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    losses = [f["val_loss"] for f in figures if "val_loss" in f]
    assert len(losses) == 3 and losses[-1] < losses[0] < math.log(6400)

    sft = train_flags(
        assets,
        tmp_path,
        *data,
        from_weight=None,
        hidden_size=None,
        num_hidden_layers=None,
        learning_rate=1e-4,
    )
    assert train_sft_vlm.main(sft) == 0
    before, after = (weight_of(tmp_path, f"{n}_vlm_32.pth") for n in ("pretrain", "sft"))
    assert before.keys() == after.keys()
    assert not any(k.startswith("vision_encoder") for k in after)
    assert all(v.dtype == torch.float16 for v in after.values())
    assert all(not torch.equal(before[k], after[k]) for k in before if "proj" in k)
    about = json.loads((tmp_path / "out" / "sft_vlm_32.json").read_text())
    assert about["stage"] == "sft" and about["config"]["hidden_size"] == 32


def test_pretrain_trains_the_projection_only_by_default(assets, tmp_path, data):
    argv = train_flags(assets, tmp_path, *data)
    assert train_pretrain_vlm.main([*argv, "--save_weight", "llm"]) == 0
    argv = train_flags(assets, tmp_path, *data, from_weight="llm", freeze_llm=None)
    assert train_pretrain_vlm.main(argv) == 0
    before, after = (weight_of(tmp_path, f"{n}_32.pth") for n in ("llm", "pretrain_vlm"))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"}


def test_trainable_chooses_by_name(assets, tmp_path, data):
    argv = train_flags(assets, tmp_path, *data)
    train_pretrain_vlm.main([*argv, "--save_weight", "llm"])
    argv = train_flags(assets, tmp_path, *data, from_weight="llm")
    assert (
        train_sft_vlm.main(
            [*argv, "--trainable", r"layers\.1\.self_attn", "--learning_rate", "0.01"]
        )
        == 0
    )
    before, after = (weight_of(tmp_path, f"{n}_32.pth") for n in ("llm", "sft_vlm"))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if "layers.1.self_attn" in k}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_on_the_cpu(dtype, assets, tmp_path, data):
    argv = train_flags(
        assets,
        tmp_path,
        *data,
        dtype=dtype,
        epochs=3,
        learning_rate=0.003,
        use_moe=int(dtype == "bfloat16"),
    )
    assert train_pretrain_vlm.main(argv) == 0
    losses = [f["loss"] for f in metrics_of(tmp_path / "out") if f.get("loss")]
    assert losses[-1] < losses[0] - 1
    state = torch.load(next((tmp_path / "checkpoints").glob("*.pth")), weights_only=True)
    assert all(v.dtype == torch.float32 for v in state["model"].values())


def test_accumulation_gives_the_update_of_one_large_batch(assets, tmp_path):
    data = make_records(tmp_path / "data", num_records=20)
    ends = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        out = tmp_path / f"{batch_size}x{accumulation}"
        argv = train_flags(
            assets,
            out,
            *data,
            batch_size=batch_size,
            use_moe=1,
            accumulation_steps=accumulation,
            learning_rate=1e-3,
        )
        assert train_pretrain_vlm.main(argv) == 0
        ends.append([f["loss"] for f in metrics_of(out / "out")])
    assert len(ends[0]) == 3  # the epoch's last 4 samples are a step of their own
    torch.testing.assert_close(torch.tensor(ends[0]), torch.tensor(ends[1]), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_ranks_give_the_update_of_one_process(assets, tmp_path):
    data = make_records(tmp_path / "data", num_records=20)
    one = train_flags(assets, tmp_path / "one", *data, batch_size=8)
    assert train_pretrain_vlm.main(one) == 0
    two = train_flags(assets, tmp_path / "two", *data, batch_size=2, accumulation_steps=2)
    run_ranks(two, tmp_path, world_size=2)
    losses = [[f["loss"] for f in metrics_of(tmp_path / n / "out")] for n in ("one", "two")]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)


def test_learning_rate_follows_the_share_of_samples(assets, tmp_path):
    data = make_records(tmp_path / "data", num_records=10)
    argv = train_flags(assets, tmp_path, *data, epochs=2, learning_rate=1e-3)
    assert train_pretrain_vlm.main(argv) == 0
    rates = [f["lr"] for f in metrics_of(tmp_path / "out")]
    shares = [0.2, 0.4, 0.5, 0.7, 0.9, 1.0]  # 4, 4, 2 of 10 samples, twice
    expected = [1e-4 + 5e-4 * (1 + math.cos(math.pi * p)) for p in shares]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


def test_order_depends_on_seed_and_epoch_alone(assets, tmp_path, data):
    def losses(out, **flags):
        argv = train_flags(assets, tmp_path / out, *data, epochs=2, learning_rate=1e-9, **flags)
        assert train_pretrain_vlm.main(argv) == 0
        return [round(f["loss"], 4) for f in metrics_of(tmp_path / out / "out")]

    first, again, other = losses("a"), losses("b", num_workers=2), losses("c", seed=7)
    assert first == again != other
    assert first[:6] != first[6:]  # the second epoch has another order


def test_first_release_layout_trains_and_evaluates(assets, tmp_path, capfd):
    """49 patches and CLS, 25 `<` then 25 `>`, from/value records: by flags alone."""
    tower = tmp_path / "vit-b32"
    make_tower(tower, image_size=56, patch_size=8)
    _, images = make_records(tmp_path, num_records=8)
    data = tmp_path / "first_release.jsonl"
    with data.open("w") as file:
        for i in range(8):
            turns = conversation("What is this?\n<image>", "A picture.")["conversations"]
            turns = [
                {"from": {"user": "human"}.get(t["role"], "gpt"), "value": t["content"]}
                for t in turns
            ]
            image = "0_3.png" if i == 3 else f"0_{i}.png"
            print(json.dumps({"id": i, "image": image, "conversations": turns}), file=file)
    layout = ["--keep_cls", "1", "--image_special_token", "<" * 25 + ">" * 25]
    flags = {"vision_model_path": tower}
    argv = train_flags(assets, tmp_path, data, images, **flags)
    assert train_pretrain_vlm.main([*argv, *layout]) == 0
    sft = train_flags(assets, tmp_path, data, images, from_weight=None, **flags)
    assert train_sft_vlm.main([*sft, *layout]) == 0
    shown = run_script(
        "eval_vlm.py",
        "--save_dir",
        tmp_path / "out",
        "--vision_model_path",
        tower,
        "--tokenizer_path",
        assets / "tokenizer",
        "--image_dir",
        images,
        *"--max_new_tokens 4 --keep_cls 1 --hidden_size 32".split(),
        "--image_special_token",
        "<" * 25 + ">" * 25,
    )
    assert "[0_0.png]" in shown.stdout


def test_non_finite_loss_never_reaches_the_weights(assets, tmp_path, capfd):
    """A weight that makes some samples overflow float16 stands in for a diverged model."""
    data = make_records(tmp_path / "data", num_records=12)
    blinding_weight(assets, tmp_path, data)
    argv = train_flags(
        assets,
        tmp_path,
        *data,
        from_weight="llm",
        batch_size=1,
        epochs=1,
        learning_rate=1e-12,
        dtype="float16",
    )
    capfd.readouterr()
    train_pretrain_vlm.main(argv)
    captured = capfd.readouterr()
    assert "left out: loss or gradient not finite; samples: data_0.jsonl:" in captured.out
    saved = torch.load(next((tmp_path / "checkpoints").glob("pretrain*")), weights_only=True)
    assert all(v.isfinite().all() for v in saved["model"].values())
    assert saved["progress"]["skipped_steps"] > 0


def blinding_weight(assets, folder, data) -> None:
    """A weight that makes samples with a picture overflow float16, and no others."""
    argv = train_flags(assets, folder, *data)
    assert train_pretrain_vlm.main([*argv, "--save_weight", "llm"]) == 0
    weight = folder / "out" / "llm_32.pth"
    state, described = torch.load(weight, weights_only=True), read_metadata(weight)
    state["vision_proj.vision_proj.0.weight"].fill_(6e4)
    save_weights(state, weight, described)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_sample_of_a_loss_that_is_not_finite_is_named(assets, tmp_path, world_size):
    """One record has a picture: of the second step, where on two ranks it is rank 1's."""
    ranks = Ranks(1, 2, torch.device("cpu"))
    batches = list(
        rank_batches(epoch_order(24, seed=42, epoch=0), start=0, batch_size=3, ranks=ranks)
    )
    pictured = batches[2][0]
    data, images = make_records(tmp_path / "data")
    lines = [json.dumps(conversation("What is a circle?", "A circle.")) for _ in range(24)]
    lines[pictured] = json.dumps(conversation("<image>", "A circle.", image="0_0.png"))
    data.write_text("\n".join(lines) + "\n")
    blinding_weight(assets, tmp_path, (data, images))
    argv = train_flags(
        assets,
        tmp_path,
        data,
        images,
        from_weight="llm",
        dtype="float16",
        batch_size=6 // world_size,
        accumulation_steps=2,
        learning_rate=1e-12,
    )
    said = run_ranks(argv, tmp_path, world_size=world_size, status=1)  # no step was applied:
    left_out = [line for line in said.splitlines() if line.startswith("step ")]
    assert left_out[0].endswith(", ...")  # in the other one the first loss scale is too high
    line = left_out[1]
    named = re.findall(r"data_0.jsonl:(\d+)", line)
    assert len(named) == 6 // world_size and str(pictured + 1) in named


def test_disk_that_fills_while_saving_keeps_the_old_files(assets, tmp_path, data, monkeypatch):
    argv = train_flags(assets, tmp_path, *data)
    assert train_pretrain_vlm.main(argv) == 0
    before = {p: p.read_bytes() for p in tmp_path.glob("*/pretrain*.pth")}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert train_pretrain_vlm.main(argv) == 1
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in before} == before
    assert not list(tmp_path.glob("*/.*.tmp"))


@pytest.mark.parametrize(
    ("is_native", "given", "used", "line"),
    [
        (True, None, "bfloat16", None),
        (False, None, "float32", "this CPU has no instructions for bfloat16"),
        (False, "bfloat16", "bfloat16", "takes many times as long; leave the flag out"),
        (False, "float32", "float32", None),
    ],
)
def test_a_cpu_without_bfloat16_trains_in_float32(
    is_native, given, used, line, assets, tmp_path, monkeypatch, capsys
):
    """Emulated, its products take thirty times as long, and nothing says so."""
    monkeypatch.setattr(device, "has_bfloat16", lambda _: is_native)
    data, images = make_records(tmp_path, num_records=4)
    argv = train_flags(assets, tmp_path, data, images, dtype=given)
    assert train_pretrain_vlm.main(argv) == 0
    said = "".join(capsys.readouterr())
    assert f"--dtype {used} " in said
    assert ("this CPU has no instructions" in said) == (line is not None)
    assert line is None or line in said
