"""If this fails, training with DeepSpeed differs from DDP, or its state cannot be resumed by the
other.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.rank_group import RankGroup, run_ranks
from support.scripts import ROOT, free_port, script_environment, train_flags
from support.third_generation import make_assets3
from support.tiny_parts import make_records

from trainer import train_pretrain_vlm
from trainer.loop.zero_engine import CONFIG_DIR

TIMEOUT_S = 600
VARIANTS = {  # stage, flags
    "zero2": (2, {}),
    "zero3-moe": (3, {"use_moe": 1}),
    "zero1": (1, {}),
    "zero1-moe": (1, {"use_moe": 1}),
    "zero2-moe": (2, {"use_moe": 1}),
    "zero2-bfloat16-moe": (2, {"use_moe": 1, "dtype": "bfloat16"}),
    "zero3": (3, {}),
    "zero3-bfloat16": (3, {"dtype": "bfloat16"}),
    "zero2-third-moe": (2, {"generation": 3, "use_moe": 1}),
    "zero3-third-moe": (3, {"generation": 3, "use_moe": 1}),
    "zero1-projection": (1, {"freeze_llm": 1}),
    "zero2-projection": (2, {"freeze_llm": 1}),
    "zero3-projection": (3, {"freeze_llm": 1}),
}
QUICK = ("zero2", "zero3-moe")
ALLOWED = {"loss": 1e-5, "val_loss": 1e-3, "grad_norm": 1e-3, "weights": 2e-3}  # in float32


@pytest.fixture
def data(tmp_path):
    """46 samples: 2 ranks x 2 x accumulation 2 leave an incomplete step in each epoch."""
    return make_records(tmp_path / "data", num_records=46, multi=True)


def flags_of(assets, out, data, **flags) -> list[str]:
    common = {"batch_size": 2, "accumulation_steps": 2, "epochs": 4, "learning_rate": 1e-3}
    return train_flags(assets, out, *data, **common | flags)


def figures(folder, key: str) -> torch.Tensor:
    lines = next((folder / "out").glob("*_metrics.jsonl")).read_text().splitlines()
    values = [figures.get(key) for figures in map(json.loads, lines)]
    return torch.tensor([v for v in values if v is not None], dtype=torch.float64)


def state_of(folder) -> dict:
    return torch.load(next((folder / "checkpoints").glob("*_resume.pth")), weights_only=True)


def differences(folder, left: str, right: str) -> dict[str, torch.Tensor]:
    """Between two runs: of each step's figures, relative, and of the weights at the end."""
    sides = [folder / left, folder / right]
    apart = {}
    for key in ("loss", "val_loss", "grad_norm"):
        ours, theirs = (figures(side, key) for side in sides)
        apart[key] = (ours - theirs).abs() / ours
    ours, theirs = (state_of(side)["model"] for side in sides)
    apart["weights"] = torch.stack([(ours[name] - theirs[name]).abs().max() for name in ours])
    return apart


def assert_same_bits(left: dict, right: dict):
    for name, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][name]), name
    for index, moments in left["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, right["optimizer"]["state"][index][name]), (index, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in VARIANTS]
)
def test_zero_is_the_training_of_ddp(name, assets, tmp_path, data):
    stage, options = VARIANTS[name]
    if "generation" in options:
        assets = tmp_path / "assets3"
        make_assets3(assets)
    val = make_records(tmp_path / "val", num_records=7, seed=1)
    options = options | {"val_data_path": val[0], "val_images_path": val[1]}
    run_ranks(flags_of(assets, tmp_path / "ddp", data, **options), tmp_path, world_size=2)
    zero = flags_of(assets, tmp_path / "zero", data, deepspeed=f"ds_zero{stage}.json", **options)
    shown = run_ranks(zero, tmp_path, world_size=2, name="zero")
    apart = differences(tmp_path, "ddp", "zero")
    assert len(apart["loss"]) == 24 and len(apart["val_loss"]) == 4
    print(f"\n{name}: " + ", ".join(f"{key} {d.max():.1e}" for key, d in apart.items()), end="")
    allowed = ALLOWED
    if "dtype" in options:
        # Equal weights, equal loss. From then on rounding parts them, as it parts DDP split anew.
        assert apart["loss"][0] == 0 and apart["grad_norm"][0] < ALLOWED["grad_norm"]
        split = flags_of(assets, tmp_path / "split", data, batch_size=4, **options)
        run_ranks(split, tmp_path, world_size=1, name="split")
        own = {key: d.max() for key, d in differences(tmp_path, "ddp", "split").items()}
        print("; DDP split anew: " + ", ".join(f"{key} {d:.1e}" for key, d in own.items()), end="")
        allowed = {key: 3 * d for key, d in own.items()}
    for key, difference in apart.items():
        assert difference.max() <= allowed[key], key
    rates = [figures(tmp_path / side, "lr") for side in ("ddp", "zero")]
    assert torch.equal(*rates)
    ddp, sharded = (state_of(tmp_path / side) for side in ("ddp", "zero"))
    assert ddp["model"].keys() == sharded["model"].keys()
    assert ddp["optimizer"]["state"].keys() == sharded["optimizer"]["state"].keys()
    assert sharded["optimizer"]["state"][0]["step"] == 24
    weights = [
        torch.load(next((tmp_path / side / "out").glob("*.pth")), weights_only=True)
        for side in ("ddp", "zero")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(w.dtype == torch.float16 for w in weights[1].values())
    assert shown.count("Epoch:[4/4](6/6)") == 1  # one rank talks


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=pytest.mark.full),
                                   pytest.param(3, marks=pytest.mark.full)])  # fmt: skip
def test_zero_resumes_to_the_same_bits_and_under_ddp(stage, assets, tmp_path, data):
    """Stopped by a scheduler's SIGTERM, it goes on sharded, or without DeepSpeed."""
    options = {"deepspeed": f"ds_zero{stage}.json", "use_moe": int(stage == 3)}
    run_ranks(flags_of(assets, tmp_path / "whole", data, **options), tmp_path, world_size=2)
    cut = flags_of(assets, tmp_path / "cut", data, **options)
    with RankGroup(cut, tmp_path, world_size=2, name="cut") as group:
        group.wait_for(lambda: "Epoch:[2/4](2/6)" in group.output(), "step 8")
        group.kill(1, signum=signal.SIGTERM)
        assert group.wait() == [128 + signal.SIGTERM] * 2, group.said()
    before = state_of(tmp_path / "cut")
    assert 8 <= before["progress"]["step"] < 24
    assert before["optimizer"]["state"][0]["step"] == before["progress"]["step"]
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    run_ranks([*cut, "--from_resume", "1"], tmp_path, world_size=2, name="resumed")
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))
    assert torch.equal(*(figures(tmp_path / side, "loss") for side in ("whole", "cut")))

    ddp = flags_of(assets, tmp_path / "other", data, use_moe=options["use_moe"], batch_size=4)
    run_ranks([*ddp, "--from_resume", "1"], tmp_path, world_size=1, name="ddp")
    losses = [figures(tmp_path / side, "loss") for side in ("whole", "other")]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_deepspeed_launcher_starts_the_ranks(assets, tmp_path, data):
    launcher = Path(sys.executable).with_name("deepspeed")
    flags = flags_of(assets, tmp_path, data, deepspeed="ds_zero2.json", epochs=1)
    path = os.pathsep.join((str(launcher.parent), os.environ["PATH"]))
    process = subprocess.run(
        [
            sys.executable,
            str(launcher),
            "--master_port",
            str(free_port()),
            "--num_gpus=2",
            str(ROOT / "trainer" / "train_sft_vlm.py"),
            *flags,
        ],
        env=script_environment() | {"PATH": path},
        timeout=TIMEOUT_S,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    assert process.returncode == 0, process.stdout
    assert "2 rank(s)" in process.stdout and process.stdout.count("Epoch:[1/1](6/6)") == 1
    assert (tmp_path / "out" / "sft_vlm_32.pth").is_file()


@pytest.mark.slow
def test_zero_leaves_out_what_is_not_finite(assets, tmp_path, data):
    """The first step throws the weights far off; what follows must not reach them."""
    flags = {"deepspeed": "ds_zero2.json", "learning_rate": 1e37, "grad_clip": 0}
    argv = flags_of(assets, tmp_path, data, **flags)
    shown = run_ranks(argv, tmp_path, world_size=1, status=1)
    assert "steps in a row were not finite" in shown
    state = state_of(tmp_path)
    assert all(v.isfinite().all() for v in state["model"].values())
    applied = state["progress"]["step"] - state["progress"]["skipped_steps"]
    assert 1 <= applied == state["optimizer"]["state"][0]["step"]
    assert all(v.isfinite().all() for v in state["optimizer"]["state"][0].values())


def test_shipped_configurations_say_only_how_to_shard():
    names = sorted(p.name for p in CONFIG_DIR.glob("*.json"))
    assert names == ["ds_zero1.json", "ds_zero2.json", "ds_zero3.json"]
    for stage, name in enumerate(names, 1):
        config = json.loads((CONFIG_DIR / name).read_text())
        assert config["_comment"] and config["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (None, {}, "needs a launcher"),
        ("nowhere.json", {}, "no --deepspeed configuration nowhere.json; write one, or use ours: "
                             "ds_zero1.json, ds_zero2.json, ds_zero3.json"),
        ("{", {}, "is not a JSON object"),
        ("[]", {}, "is not a JSON object"),
        ('{"zero_optimization": {"stage": 0}}', {}, "stage is 0, not 1, 2 or 3"),
        ('{"gradient_clipping": 0.5}', {}, "that is the flag --grad_clip here"),
        ('{"bf16": {"enabled": true}}', {}, "that is the flag --dtype here"),
        ('{"optimizer": {"type": "Adam"}}', {}, "that is the flag --learning_rate here"),
        ('{"compression_training": {"x": 1}}', {}, "which does not work here"),
        ("ds_zero2.json", {"dtype": "float16"}, "does not train in float16"),
    ],
)  # fmt: skip
def test_what_cannot_run_ends_in_one_line(
    config, flags, message, assets, tmp_path, monkeypatch, capfd
):
    data = make_records(tmp_path / "data", num_records=4)
    if config is not None:
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }.items():
            monkeypatch.setenv(name, value)
    if config is not None and not config.endswith(".json"):
        path = tmp_path / "config.json"
        path.write_text(config)
        config = path
    flags = {"deepspeed": config or "ds_zero2.json"} | flags
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, *data, **flags)) == 1
    error = capfd.readouterr().err
    assert message in error and error.count("error:") == 1, error


def test_auto_of_other_projects_files_means_the_flags(assets, tmp_path, monkeypatch, capfd):
    """A file written for transformers' trainer gets as far as DeepSpeed, which is not there."""
    data = make_records(tmp_path / "data", num_records=4)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "fp16": {"enabled": "auto", "loss_scale": 0},
                "bf16": {"enabled": "auto"},
                "gradient_clipping": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
            }
        )
    )
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, *data, deepspeed=path)) == 1
    assert "pip install deepspeed" in capfd.readouterr().err
