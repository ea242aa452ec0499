"""If this fails, a run that goes wrong (bad data, NaN, a stop at a bad moment) loses weights or
samples, or stops where it could go on.
"""

import json
import signal
import zipfile

import numpy as np
import pytest
import torch
from support.scripts import train_flags
from support.tiny_parts import conversation, make_records

from trainer import train_pretrain_vlm
from trainer.loop.sample_order import epoch_order, rank_batches
from trainer.ranks.group import Ranks
from trainer.ranks.signals import StopSignal


@pytest.fixture
def data(tmp_path):
    return make_records(tmp_path / "data")


def state_of(folder) -> dict:
    return torch.load(next((folder / "checkpoints").glob("*_resume.pth")), weights_only=True)


def losses_of(folder) -> list[float]:
    lines = next((folder / "out").glob("*_metrics.jsonl")).read_text().splitlines()
    return [f["loss"] for f in map(json.loads, lines) if "loss" in f]


class StoppedAtOnce(StopSignal):
    def __enter__(self):
        self.signum = signal.SIGTERM
        return self

    def __exit__(self, *_):
        pass


def test_stop_before_the_first_step_changes_nothing(assets, tmp_path, data, monkeypatch, capfd):
    argv = train_flags(assets, tmp_path, *data)
    assert train_pretrain_vlm.main(argv) == 0
    files = {p: p.read_bytes() for d in ("out", "checkpoints") for p in (tmp_path / d).iterdir()}
    monkeypatch.setattr("trainer.run.setup.StopSignal", StoppedAtOnce)
    assert train_pretrain_vlm.main(argv) == 128 + signal.SIGTERM
    captured = capfd.readouterr()
    assert "nothing was written" in captured.out
    assert "is the state of an earlier run" in captured.err and "--from_resume 1" in captured.err
    assert {p: p.read_bytes() for p in files} == files


def test_state_of_an_earlier_run_is_kept_once(assets, tmp_path, data):
    argv = train_flags(assets, tmp_path, *data)
    assert train_pretrain_vlm.main(argv) == 0
    first = next((tmp_path / "checkpoints").glob("*_resume.pth")).read_bytes()
    assert train_pretrain_vlm.main([*argv, "--learning_rate", "0.1"]) == 0
    old = tmp_path / "checkpoints" / "pretrain_vlm_32_resume.pth.old"
    assert old.read_bytes() == first
    assert train_pretrain_vlm.main([*argv, "--learning_rate", "0.1", "--from_resume", "1"]) == 0
    assert old.read_bytes() == first


def test_float16_goes_on_after_a_step_without_a_usable_sample(assets, tmp_path, capfd):
    data, images = make_records(tmp_path / "data", num_records=120)
    (images / "broken.png").write_text("no picture")
    with data.open("a") as file:
        file.write(json.dumps(conversation("<image>", "A picture.", image="broken.png")) + "\n")
    argv = train_flags(
        assets, tmp_path, data, images, dtype="float16", batch_size=1, log_interval=100
    )
    assert train_pretrain_vlm.main(argv) == 0
    assert "sample left out: data_0.jsonl:121" in capfd.readouterr().out


def test_mended_sample_is_not_lost_by_a_resumed_run(assets, tmp_path, capfd):
    """The run that stopped at it takes it again: the end is that of a run on whole data."""
    data, images = make_records(tmp_path / "data", num_records=40)
    picture = (images / "0_5.png").read_bytes()
    flags = {"epochs": 2, "save_interval": 1, "batch_size": 2}
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path / "a", data, images, **flags)) == 0
    (images / "0_5.png").write_bytes(picture[: len(picture) // 2])
    argv = train_flags(assets, tmp_path / "b", data, images, **flags)
    assert train_pretrain_vlm.main([*argv, "--on_bad_sample", "error"]) == 1
    assert "error: data_0.jsonl:6: not a readable image" in capfd.readouterr().err
    (images / "0_5.png").write_bytes(picture)
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 0
    whole, mended = (state_of(tmp_path / side) for side in ("a", "b"))
    assert whole["progress"] == mended["progress"]
    assert all(torch.equal(whole["model"][k], mended["model"][k]) for k in whole["model"])


def test_longer_sequences_let_a_stopped_run_go_on(assets, tmp_path, capfd):
    data, images = make_records(tmp_path / "data", num_records=117)
    long = conversation("word " * 100 + "<image>", "Late.", image="0_0.png")
    with data.open("a") as file:
        file.write((json.dumps(long) + "\n") * 3)
    flags = {"save_interval": 1, "batch_size": 2}
    argv = train_flags(assets, tmp_path, data, images, **flags, max_seq_len=100)
    assert train_pretrain_vlm.main(argv) == 1
    err = capfd.readouterr().err
    assert "2 of 120 samples cannot be used" in err and "another --max_seq_len" in err
    argv = train_flags(assets, tmp_path, data, images, **flags, max_seq_len=640)
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 0
    assert "--max_seq_len was 100, now 640" in capfd.readouterr().out
    progress = state_of(tmp_path)["progress"]
    assert progress["samples"] == 120 and progress["bad_samples"] == 1


def test_validation_without_a_usable_sample_costs_nothing(assets, tmp_path, data, capfd):
    val, pictures = make_records(tmp_path / "val", num_records=3)
    content = {path: path.read_bytes() for path in pictures.iterdir()}
    for path in content:
        path.write_bytes(content[path][:60])
    argv = train_flags(assets, tmp_path, *data, val_data_path=val, val_images_path=pictures)
    assert train_pretrain_vlm.main(argv) == 1
    assert "the validation data holds no usable sample" in capfd.readouterr().err
    assert (tmp_path / "out" / "pretrain_vlm_32.pth").is_file()
    for path in content:
        path.write_bytes(content[path])
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 0
    out = capfd.readouterr().out
    assert "Epoch:[1/1] val_loss:" in out and "loss:" not in out.partition("val_loss:")[0]
    assert state_of(tmp_path)["progress"]["epoch"] == 1


@pytest.mark.parametrize(
    "stopped_at", [6, 9, 18], ids=["first epoch", "in validation", "last epoch"]
)
def test_validation_that_a_stop_prevented_comes_when_resumed(
    stopped_at, assets, tmp_path, data, monkeypatch, capfd
):
    class StoppedAtStep(StopSignal):
        asked = -1  # once before the first step

        def votes(self):
            self.asked += 1
            self.signum = signal.SIGTERM if self.asked == stopped_at else None
            return super().votes()

    argv = train_flags(
        assets, tmp_path, *data, val_data_path=data[0], val_images_path=data[1], epochs=2
    )
    with monkeypatch.context() as patch:
        patch.setattr("trainer.run.setup.StopSignal", StoppedAtStep)
        assert train_pretrain_vlm.main(argv) == 128 + signal.SIGTERM
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 0
    capfd.readouterr()
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 0
    assert "val_loss" not in capfd.readouterr().out  # complete: nothing is done again
    lines = next((tmp_path / "out").glob("*_metrics.jsonl")).read_text().splitlines()
    figures = [json.loads(line) for line in lines]
    assert [f["epoch"] for f in figures if "val_loss" in f] == [1, 2]
    assert [f["step"] for f in figures if "loss" in f] == list(range(1, 13))


@pytest.mark.parametrize(("before", "after"), [("float32", "float16"), ("float16", "bfloat16")])
def test_resume_with_another_dtype(before, after, assets, tmp_path, data, capfd):
    argv = train_flags(assets, tmp_path, *data, dtype=before)
    assert train_pretrain_vlm.main(argv) == 0
    argv = train_flags(assets, tmp_path, *data, dtype=after, epochs=2)
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 0
    out = capfd.readouterr().out
    assert f"--dtype was {before}, now {after}" in out and "Epoch:[2/2](6/6)" in out


def test_diverged_run_stops_and_keeps_finite_weights(assets, tmp_path, data, capfd):
    argv = train_flags(assets, tmp_path, *data, learning_rate=1e30, epochs=9)
    assert train_pretrain_vlm.main(argv) == 1
    captured = capfd.readouterr()
    assert "5 steps in a row were not finite" in captured.err
    assert "data_0.jsonl:" in captured.err and "--learning_rate" in captured.err
    assert captured.out.count("left out: loss or gradient not finite") == 5
    assert all(v.isfinite().all() for v in state_of(tmp_path)["model"].values())


def test_validation_loss_is_the_mean_over_its_tokens(assets, tmp_path, data, capfd):
    """With a learning rate of next to nothing it is the same as the training loss on that data,
    also when the last batch is smaller."""
    flags = {"val_data_path": data[0], "val_images_path": data[1], "learning_rate": 1e-12}
    argv = train_flags(assets, tmp_path, *data, batch_size=7, accumulation_steps=4, **flags)
    assert train_pretrain_vlm.main(argv) == 0
    lines = next((tmp_path / "out").glob("*_metrics.jsonl")).read_text().splitlines()
    val = [f["val_loss"] for f in map(json.loads, lines) if "val_loss" in f]
    assert val == pytest.approx(losses_of(tmp_path), rel=1e-6)


def test_gradient_clipping_limits_the_step(assets, tmp_path, data):
    moments = []
    for clip in (1e-3, 1e3):
        out = tmp_path / str(clip)
        argv = train_flags(assets, out, *data, grad_clip=clip, batch_size=24)
        assert train_pretrain_vlm.main(argv) == 0
        state = state_of(out)["optimizer"]["state"]
        moments.append(torch.cat([m["exp_avg"].flatten() for m in state.values()]).norm())
    assert moments[0] == pytest.approx(0.1 * 1e-3, rel=1e-3)  # one step: a tenth of the gradient
    assert moments[1] > 10 * moments[0]


def test_estimate_follows_the_first_steps(assets, tmp_path, data, capfd):
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, *data)) == 0
    assert "estimate after 5 steps: 0:0" in capfd.readouterr().out


def test_generators_are_restored(assets, tmp_path, data, monkeypatch):
    argv = train_flags(assets, tmp_path, *data)
    assert train_pretrain_vlm.main(argv) == 0
    path = next((tmp_path / "checkpoints").glob("*_resume.pth"))
    state = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(123)
    state["rng"][0]["cpu"] = generator.get_state()
    torch.save(state, path)
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 0
    assert torch.equal(torch.rand(3), torch.rand(3, generator=generator))


def test_ranks_and_batch_sizes_may_change_in_the_middle_of_an_epoch():
    """Whatever the numbers of ranks and batch sizes, every sample is taken exactly once."""
    random = np.random.default_rng(0)
    for _ in range(300):
        num_samples = int(random.integers(1, 60))
        order = epoch_order(num_samples, seed=1, epoch=int(random.integers(4)))
        start, taken = 0, []
        while start < num_samples:
            world, batch_size = (int(n) for n in random.integers(1, 5, size=2))
            ranks = [Ranks(r, world, torch.device("cpu")) for r in range(world)]
            batches = [
                list(rank_batches(order, start=start, batch_size=batch_size, ranks=r))
                for r in ranks
            ]
            assert len({len(b) for b in batches}) == 1, "ranks must take as many steps"
            for step in range(int(random.integers(1, 4))):
                if step < len(batches[0]):
                    taken += [index for rank in batches for index in rank[step]]
            start = len(taken)
        assert sorted(taken) == list(range(num_samples))


def test_zip_that_is_damaged_or_ambiguous(assets, tmp_path, capfd):
    data, images = make_records(tmp_path / "data", num_records=220)
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for picture in sorted(images.iterdir()):
            archive.write(picture, f"a/{picture.name}")
        archive.write(images / "0_1.png", "b/0_2.png")  # 0_2.png is in two folders now
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF  # in the first picture
    path.write_bytes(content)
    argv = train_flags(assets, tmp_path, data, path, batch_size=20)
    assert train_pretrain_vlm.main(argv) == 0
    captured = capfd.readouterr()
    assert "image '0_2.png' is not in" in captured.err and "needs its folder" in captured.err
    assert "0_0.png in pictures.zip cannot be read (Bad CRC-32" in captured.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(conversation("<image>", "x", image="A" * 5000)), "image 'AAAA"),
        ("[" * 200_000, "not valid JSON"),
        (json.dumps(conversation("What?", "A circle.") | {"types": 3}), None),
    ],
)
def test_odd_records_stay_one_short_line(line, message, assets, tmp_path, capfd):
    data, images = make_records(tmp_path / "data", num_records=120)
    with data.open("a") as file:
        file.write(line + "\n")
    argv = train_flags(assets, tmp_path, data, images, batch_size=40)
    assert train_pretrain_vlm.main(argv) == 0
    err = capfd.readouterr().err
    assert (message or "") in err and len(err) < 1000


@pytest.mark.parametrize("name", ["tower/model.safetensors", "tokenizer/tokenizer.json"])
def test_pointer_files_of_git_lfs_are_recognised(name, assets, tmp_path, data, capfd):
    import shutil

    shutil.copytree(assets, tmp_path / "assets")
    (tmp_path / "assets" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    capfd.readouterr()
    assert train_pretrain_vlm.main(train_flags(tmp_path / "assets", tmp_path, *data)) == 1
    err = capfd.readouterr().err
    assert "git lfs pull" in err and name.split("/")[0] in err and err.count("\n") == 1


def test_thin_picture_is_refused_before_it_fills_the_memory(assets, tmp_path, capfd):
    from PIL import Image

    data, images = make_records(tmp_path / "data", num_records=120)
    Image.new("RGB", (1, 60000)).save(images / "0_0.png")
    argv = train_flags(assets, tmp_path, data, images, batch_size=40)
    assert train_pretrain_vlm.main(argv) == 0
    assert "data_0.jsonl:1: not a readable image (1x60000 is too thin)" in capfd.readouterr().out


def test_home_folder_is_expanded(assets, tmp_path, data, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    argv = train_flags(assets, tmp_path, *data, save_dir=None)
    assert train_pretrain_vlm.main([*argv, "--save_dir=~/weights"]) == 0
    assert (tmp_path / "home" / "weights" / "pretrain_vlm_32.pth").is_file()
    assert not (tmp_path / "~").exists()
