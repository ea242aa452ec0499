"""If this fails, a command that takes `--device` does not run on the GPU that the user named, or
two ranks share one.

On a pretend GPU as strict as a real one, whose tensors are real enough to run the commands whole.
"""

import base64
import contextlib
import csv
import io
import sys

import pytest
import torch
from support.pretend_gpu import TURING, Gpu, pretend_gpus
from support.pretend_tensor import pretend_tensors
from support.scripts import train_flags
from support.tiny_parts import make_records
from support.tiny_vlm import make_loaded, save_tiny

import eval_vlm
import web_demo
from model.generation.engine import ask
from model.generation.sampling import Sampling
from trainer import benchmark_saving, train_clip_tiny, train_llm, train_pretrain_vlm, train_sft_vlm
from trainer.ranks import group as trainer_utils
from trainer.run import build, report, setup

WISHES = {None: 0, "cuda": 0, "cuda:0": 0, "cuda:1": 1}  # of two GPUs, and which one it means
STAGES = {"pretrain": train_pretrain_vlm, "sft": train_sft_vlm, "llm": train_llm}


class Unwatched(contextlib.nullcontext):
    """In place of the watch over other ranks, which are not there."""

    lost = None


class Reached(Exception):
    """The command is where the test wanted it."""


@pytest.fixture(scope="module")
def folder(assets, tmp_path_factory):
    """A weight, records, pictures, a text and a multiple-choice file."""
    folder = tmp_path_factory.mktemp("choice")
    save_tiny(make_loaded(assets), folder / "out" / "sft_vlm_32.pth")
    make_records(folder / "data", num_records=8)
    make_records(folder / "one", num_records=1)
    (folder / "text.txt").write_text("A red circle on a blue ground. " * 60)
    picture = folder / "one" / "images" / "0_0.png"
    with open(folder / "choices.tsv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", "A", "B", "answer", "image"])
        encoded = base64.b64encode(picture.read_bytes()).decode()
        writer.writerow([1, "What is in the picture?", "red", "blue", "A", encoded])
    return folder


def named(device: str | None) -> list[str]:
    return [] if device is None else ["--device", device]


def training(name: str, assets, folder, tmp_path) -> list[str]:
    """Flags of a run of two steps, without `--device`."""
    data, images = folder / "data" / "data_0.jsonl", folder / "data" / "images"
    if name == "llm":
        data, images = folder / "text.txt", None
    flags = {"device": None, "dtype": "bfloat16", "num_workers": 2, "max_seq_len": 64}
    if name != "llm":
        del flags["max_seq_len"]
    return train_flags(assets, tmp_path, data, images, **flags)


def answering(assets, folder) -> list[str]:
    return [
        "--save_dir",
        str(folder / "out"),
        "--vision_model_path",
        str(assets / "tower"),
        "--tokenizer_path",
        str(assets / "tokenizer"),
        "--max_new_tokens",
        "3",
    ]


def eval_task(task: str, folder) -> list[str]:
    one = folder / "one"
    return {
        "describe": ["--image_dir", str(one / "images")],
        "score": [
            "--data_path",
            str(one / "data_0.jsonl"),
            "--images_path",
            str(one / "images"),
            *"--num_generate 1 --num_wrong 1".split(),
        ],
        "choose": ["--choices", str(folder / "choices.tsv")],
        "chat": ["--chat"],
    }[task]


@pytest.fixture
def machine(monkeypatch):
    """Two GPUs, tensors on them, and no launcher."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MINIMIND_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(report, "draw_curves", lambda paths: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is a circle?\n"))
    with pretend_gpus(Gpu(), Gpu()) as driver, pretend_tensors(driver) as world:
        yield world


def assert_computed_on(world, index: int) -> None:
    """All work was done on one GPU, which is the current one, and cuDNN's attention is off."""
    assert {gpu for _, gpu in world.kernels} == {index}
    assert world.driver.current == index
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("device", WISHES)
@pytest.mark.parametrize("name", STAGES)
def test_training_chooses_a_gpu_with_an_index(
    name, device, machine, monkeypatch, assets, folder, tmp_path
):
    """As far as the model is built; the runs below are whole."""

    def build(stage, args, *, device):
        raise Reached(device)

    monkeypatch.setattr(setup, "build", build)
    with pytest.raises(Reached) as reached:
        STAGES[name].main([*training(name, assets, folder, tmp_path), *named(device)])
    assert str(reached.value) == f"cuda:{WISHES[device]}"
    assert machine.driver.current == WISHES[device]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("name, device", [("pretrain", "cuda:1"), ("sft", None), ("llm", "cuda")])
def test_training_runs_whole(name, device, machine, monkeypatch, assets, folder, tmp_path, capfd):
    # Worker processes know no pretend GPU: the count is looked at, then the batches are made here.
    asked = []

    def loader(*args, num_workers, _loader=build.Loader, **kwargs):
        asked.append(num_workers)
        return _loader(*args, num_workers=0, **kwargs)

    monkeypatch.setattr(build, "Loader", loader)
    argv = [*training(name, assets, folder, tmp_path), *named(device)]
    assert STAGES[name].main(argv) == 0
    assert_computed_on(machine, WISHES[device])
    assert asked and f"device cuda:{WISHES[device]} (Pretend GPU)" in capfd.readouterr().out
    # Only from pinned memory does a batch come without waiting.
    batches = [c for c in machine.traffic.to_device if c.line.startswith("dataset/collate.py")]
    assert batches and not any(copy.waits for copy in batches)


@pytest.mark.parametrize("device", WISHES)
@pytest.mark.parametrize("task", ["describe", "score", "choose", "chat"])
def test_evaluation_runs_whole(task, device, machine, assets, folder, capfd):
    argv = [*answering(assets, folder), *eval_task(task, folder), *named(device)]
    status = eval_vlm.main(argv)
    assert status == 0, capfd.readouterr().err
    assert_computed_on(machine, WISHES[device])


@pytest.mark.parametrize("device", WISHES)
@pytest.mark.parametrize("kind", ["page", "server"])
def test_page_and_server_load_their_model_there(kind, device, machine, monkeypatch, assets, folder):
    def serve(source, *_, **__):
        raise Reached(source.get(source.default) if kind == "page" else source)

    monkeypatch.setattr(web_demo, "serve_page" if kind == "page" else "serve_api", serve)
    argv = [*answering(assets, folder), *["--api"] * (kind == "server"), *named(device)]
    with pytest.raises(Reached) as reached:
        web_demo.main(argv)
    (engine,) = reached.value.args
    engine.generate([(ask("What is a circle?", num_images=0), [])], Sampling(max_new_tokens=2))
    assert_computed_on(machine, WISHES[device])


@pytest.mark.parametrize("device", WISHES)
def test_benchmark_runs_there(device, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_saving, "MODES", ("no save",) * 3)
    argv = [
        *"--sizes 32x1 --num_rounds 1 --num_steps 1 --batch_size 1 --num_tokens 16".split(),
        "--folder",
        str(tmp_path),
        *named(device),
    ]
    assert benchmark_saving.main(argv) == 0
    assert_computed_on(machine, WISHES[device])


@pytest.mark.parametrize("device", WISHES)
def test_tower_training_runs_there(device, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(train_clip_tiny, "NUM_HELDOUT", 1)
    argv = [
        *"--steps 1 --batch_size 2 --hidden_size 64 --num_hidden_layers 1".split(),
        *"--text_hidden_size 64 --num_workers 0".split(),
        "--save_dir",
        str(tmp_path / "clip"),
        *named(device),
    ]
    assert train_clip_tiny.main(argv) == 0
    assert_computed_on(machine, WISHES[device])


# Under a launcher that started two processes on this machine.


@pytest.fixture
def second_of_two(machine, monkeypatch):
    """This is rank 1; meeting the other is not part of these tests."""
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def join(backend, **options):
        raise Reached(backend, options.get("device"))

    monkeypatch.setattr(trainer_utils, "join_process_group", join)
    monkeypatch.setattr(setup, "RankWatch", lambda timeout_s: Unwatched())
    return machine


@pytest.mark.parametrize("device", [None, "cuda"])
@pytest.mark.parametrize("name", [*STAGES, "eval"])
def test_each_rank_takes_its_own_gpu(name, device, second_of_two, assets, folder, tmp_path):
    """Before it meets the others, so that nccl knows it."""
    if name == "eval":
        command, argv = eval_vlm, [*answering(assets, folder), *eval_task("score", folder)]
    else:
        command, argv = STAGES[name], training(name, assets, folder, tmp_path)
    with pytest.raises(Reached) as reached:
        command.main([*argv, *named(device)])
    backend, joined = reached.value.args
    assert backend == "cpu:gloo,cuda:nccl" and str(joined) == "cuda:1"
    assert second_of_two.driver.current == 1


def test_without_nccl_cuda_tensors_travel_over_gloo(
    second_of_two, monkeypatch, assets, folder, tmp_path
):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(Reached) as reached:
        train_pretrain_vlm.main(training("pretrain", assets, folder, tmp_path))
    assert reached.value.args == ("gloo", None) and second_of_two.driver.current == 1


# What a machine cannot do is one line.


@pytest.mark.parametrize("name", ["pretrain", "eval", "page"])
@pytest.mark.parametrize("device, said", [("cuda:2", "2 CUDA device"), ("cuda:x", "not a device")])
def test_a_gpu_that_is_not_there_is_one_line(
    name, device, said, machine, assets, folder, tmp_path, capfd
):
    argv = [*answering(assets, folder), *named(device)]
    if name == "pretrain":
        argv = [*training("pretrain", assets, folder, tmp_path), *named(device)]
    command = {"pretrain": train_pretrain_vlm, "eval": eval_vlm, "page": web_demo}[name]
    assert command.main(argv) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_an_older_gpu_answers_in_float16_and_refuses_bfloat16(
    assets, folder, tmp_path, capfd, monkeypatch
):
    """Turing only emulates bfloat16, which PyTorch counts unless it is told not to."""
    monkeypatch.delenv("RANK", raising=False)
    with pretend_gpus(Gpu(TURING)) as driver, pretend_tensors(driver) as world:
        assert train_pretrain_vlm.main(training("pretrain", assets, folder, tmp_path)) == 1
        assert "this GPU has no bfloat16; use --dtype float16" in capfd.readouterr().err
        dtypes = set()
        forward = torch.nn.Linear.forward

        def noted(self, rows):
            dtypes.add(rows.dtype)
            return forward(self, rows)

        monkeypatch.setattr(torch.nn.Linear, "forward", noted)
        assert eval_vlm.main([*answering(assets, folder), *eval_task("describe", folder)]) == 0
        assert dtypes == {torch.float16}
        assert_computed_on(world, 0)
