"""If this fails, a command picks the wrong GPU or number format, or fails on one with a traceback.
A strict stand-in for `torch.cuda` answers, so no GPU is needed.
"""

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.cuda_errors import CUDA_ERROR
from support.scripts import train_flags
from support.tiny_parts import make_records
from support.tiny_vlm import make_loaded, save_tiny

from model.machine import device as devices
from model.machine.device import (
    OutOfMemory,
    check_dtype,
    choose_device,
    default_dtype,
    has_grouped_mm,
    memory_guard,
    out_of_memory_line,
    prepare_device,
)
from model.options import add_model_arguments
from model.weights.build_model import load_model
from trainer import benchmark_saving, train_clip_tiny, train_pretrain_vlm
from trainer.loop.zero_engine import read_config
from trainer.ranks.group import Ranks, init_distributed_mode, local_ranks, resolve_compute
from trainer.run.report import print_header
from trainer.run.setup import check_run
from trainer.saving.run_paths import RunPaths
from trainer.stages import PRETRAIN
from trainer.train_args import TrainArgs

MPS_ERROR = (
    "MPS backend out of memory (MPS allocated: 8.00 GiB, other allocations: 1.00 GiB, max "
    "allowed: 9.07 GiB). Tried to allocate 256.00 MiB on private pool. Use "
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations (may "
    "cause system failure)."
)

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture
def cuda(monkeypatch):
    """Two GPUs as strict as real ones; what they were told, and their `capability`."""
    told = SimpleNamespace(current=None, has_cudnn_sdp=True, capability=(9, 0))

    def set_device(device) -> None:
        if not isinstance(device, int) and torch.device(device).index is None:
            raise ValueError(f"Expected a torch.device with a specified index, but got:{device}")
        told.current = torch.device(device)

    def capability(device=None) -> tuple[int, int]:
        assert torch.device(device).index in (0, 1)
        return told.capability

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    # The real one counts emulation.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(
        torch.backends.cuda, "enable_cudnn_sdp", lambda is_on: setattr(told, "has_cudnn_sdp", is_on)
    )
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    yield told
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


def launch(monkeypatch, **variables: int) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


WISHES = [(None, 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]


@pytest.mark.parametrize("wish, index", WISHES)
def test_every_wish_for_a_gpu_becomes_one_with_an_index(wish, index, cuda):
    ranks = init_distributed_mode(wish)  # training and evaluation begin so
    assert ranks.device == cuda.current == torch.device("cuda", index)
    assert not cuda.has_cudnn_sdp


@pytest.mark.parametrize("wish, index", WISHES)
@pytest.mark.parametrize("local_rank", [0, 1])
def test_of_several_processes_each_takes_the_gpu_of_its_local_rank(wish, index, local_rank, cuda):
    assert choose_device(wish, local_rank=local_rank) == torch.device("cuda", local_rank)
    assert resolve_compute(wish, "float16", local_rank=local_rank)[0].index == local_rank


@pytest.mark.parametrize(
    "wish, message",
    [
        ("cuda:2", "there are 2 CUDA device"),
        ("cuda:255", "there are 2 CUDA device"),
        ("cuda:-1", "is not a device"),
        ("cuda:x", "is not a device"),
        ("gpu", "is not a device"),
        ("meta", "is not a device"),
        ("cpu:1", "there is one cpu only"),
        ("mps", "has no MPS"),
    ],
)
def test_wish_that_cannot_be_is_one_line(wish, message, cuda):
    with pytest.raises(ValueError, match=message) as told:
        choose_device(wish)
    assert "\n" not in str(told.value) and "--device" in str(told.value)


def test_without_a_gpu_the_best_is_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == choose_device("cpu:0") == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA"):
        choose_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device() == choose_device("mps:0") == torch.device("mps")
    assert choose_device("cpu", local_rank=3) == torch.device("cpu")


def test_local_ranks_are_read_from_every_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    assert local_ranks() == (0, 1)
    launch(monkeypatch, RANK=5, WORLD_SIZE=8, LOCAL_RANK=1)
    assert local_ranks() == (1, 8)
    launch(monkeypatch, LOCAL_SIZE=4)  # deepspeed
    assert local_ranks() == (1, 4)
    launch(monkeypatch, LOCAL_WORLD_SIZE=2)  # torchrun
    assert local_ranks() == (1, 2)


@pytest.mark.parametrize("num_local, index", [(1, 1), (2, 0)])
def test_named_gpu_counts_for_a_process_that_is_alone(num_local, index, cuda, monkeypatch, capsys):
    joined = []
    launch(monkeypatch, RANK=0, WORLD_SIZE=num_local, LOCAL_RANK=0, LOCAL_WORLD_SIZE=num_local)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: num_local)
    monkeypatch.setattr(
        "trainer.ranks.group.join_process_group", lambda *a, **k: joined.append((a, k["device"]))
    )
    device = torch.device("cuda", index)
    assert init_distributed_mode("cuda:1").device == device
    # nccl is told its device and so connects at once; gloo alone must not be given one.
    assert joined == [(("cpu:gloo,cuda:nccl",), device)]
    assert ("its own local rank" in capsys.readouterr().err) == (num_local == 2)
    init_distributed_mode("cpu")
    assert joined[1:] == [(("gloo",), None)]


def test_deepspeed_cannot_take_another_gpu_than_the_local_ranks(cuda, monkeypatch):
    launch(monkeypatch, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
    args = argparse.Namespace(
        deepspeed="ds_zero2.json",
        device="cuda:1",
        optimizer="adamw",
        dtype="bfloat16",
        batch_size=1,
        grad_clip=1.0,
    )
    ranks = SimpleNamespace(device=torch.device("cuda:1"))
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        read_config(args, ranks)
    ranks.device = torch.device("cuda:0")
    assert read_config(args, ranks)


@pytest.mark.parametrize("main", [benchmark_saving.main, train_clip_tiny.main])
def test_scripts_refuse_a_gpu_that_is_not_there_in_one_line(main, cuda, tmp_path, capsys):
    folder = "--folder" if main is benchmark_saving.main else "--save_dir"
    assert main(["--device", "cuda:2", folder, str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --device cuda:2")


def test_gpu_that_the_driver_refuses_is_one_line(cuda, monkeypatch):
    def refuse(_device) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy\nCUDA kernel errors")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(ValueError, match=r"cuda:1 cannot be used: .* busy$"):
        init_distributed_mode("cuda:1")


@pytest.mark.parametrize(
    "device, dtype, tf32, is_said",
    [("cuda:0", "float32", False, True), ("cuda:0", "float32", True, False),
     ("cuda:0", "bfloat16", False, False), ("cpu", "float32", False, False)],
)  # fmt: skip
def test_float32_without_tf32_is_said(device, dtype, tf32, is_said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    ranks = Ranks(0, 1, torch.device(device))
    paths = RunPaths(*map(Path, "abcd"))
    model = torch.nn.Linear(1, 1)
    print_header(
        PRETRAIN, TrainArgs(dtype=dtype, tf32=tf32, generation=2, freeze_llm=0), ranks, model, paths
    )
    assert ("--tf32 1 is several times as fast" in capsys.readouterr().out) == is_said


def test_tf32_is_off_unless_asked_for(cuda):
    for tf32 in (True, False):
        prepare_device(torch.device("cuda:0"), tf32=tf32)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_gpu_without_bfloat16_answers_in_float16(capability, dtype, cuda):
    cuda.capability, device = capability, torch.device("cuda:1")
    assert default_dtype(device) == dtype
    assert default_dtype(torch.device("cpu")) == "float32"
    if dtype == "float16":
        with pytest.raises(ValueError, match="no bfloat16; use --dtype float16"):
            check_dtype(device, "bfloat16")
        with pytest.raises(ValueError, match="no bfloat16"):
            resolve_compute("cuda", "bfloat16")
    check_dtype(device, dtype)


def model_args(assets, *flags) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return parser.parse_args(
        [
            "--vision_model_path",
            str(assets / "tower"),
            "--device",
            "cpu",
            *map(str, flags),
            "--tokenizer_path",
            str(assets / "tokenizer"),
        ]
    )


def test_model_is_loaded_in_what_the_device_computes_in(assets, tmp_path, monkeypatch, cuda):
    save_tiny(make_loaded(assets), tmp_path / "pretrain_vlm_32.pth")
    args = model_args(assets, "--save_dir", tmp_path, "--weight", "pretrain_vlm")
    monkeypatch.setattr("model.weights.build_model.default_dtype", lambda _device: "float16")
    assert load_model(args).model.dtype == torch.float16
    args.device, args.dtype, cuda.capability = "cuda", "bfloat16", (7, 5)
    with pytest.raises(ValueError, match="no bfloat16"):
        load_model(args)


@pytest.mark.parametrize(
    "capability, dtype, pays",
    [
        ((8, 0), torch.bfloat16, False),
        ((8, 9), torch.bfloat16, False),
        ((9, 0), torch.bfloat16, True),
        ((10, 0), torch.bfloat16, True),
        ((10, 3), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, False),
        ((9, 0), torch.float16, False),
        ((9, 0), torch.float32, False),
    ],
)
def test_grouped_products_only_where_they_pay(capability, dtype, pays, cuda, monkeypatch):
    cuda.capability = capability
    assert has_grouped_mm(torch.device("cuda:0"), dtype, (64, 128)) == pays
    assert not has_grouped_mm(torch.device("cuda:0"), dtype, (20, 128))  # not in 16 bytes
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not has_grouped_mm(torch.device("cuda:0"), dtype, (64, 128))


@pytest.mark.parametrize(
    "error, shown",
    [
        (torch.OutOfMemoryError(CUDA_ERROR),
         "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB "
         "of which 1.25 GiB is free"),
        (RuntimeError(MPS_ERROR),
         "MPS backend out of memory (MPS allocated: 8.00 GiB, other allocations: 1.00 GiB, max "
         "allowed: 9.07 GiB). Tried to allocate 256.00 MiB on private pool"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously"),
         "CUDA error: out of memory"),
    ],
)  # fmt: skip
def test_out_of_memory_is_one_line_with_the_sizes(error, shown):
    assert out_of_memory_line(error, advice="do less") == f"out of memory ({shown}); do less"


def test_out_of_memory_of_a_cpu_is_known_by_its_own_words():
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**50)
    line = out_of_memory_line(told.value, advice="do less")
    assert line == "out of memory (tried to allocate 4194304.00 GiB on the CPU); do less"
    assert out_of_memory_line(MemoryError(), advice="do less") == "out of memory; do less"
    for other in (RuntimeError("shape mismatch"), ValueError("CUDA out of memory")):
        assert out_of_memory_line(other, advice="do less") is None


def test_memory_guard_lets_go_of_what_the_failed_call_held():
    alive = []

    class Held:
        def __init__(self):
            alive.append(self)

        def __del__(self):
            alive.append("freed")

    def work() -> None:
        held = Held()
        alive.clear()
        assert held
        raise torch.OutOfMemoryError(CUDA_ERROR)

    try:
        with memory_guard("do less"):
            work()
    except OutOfMemory as error:  # told while it is still being handled
        assert alive == ["freed"] and "20.00 GiB" in str(error)
    with pytest.raises(RuntimeError, match="^another"), memory_guard("do less"):
        raise RuntimeError("another")


def test_training_out_of_memory_ends_in_one_line(assets, tmp_path, monkeypatch, capsys):
    def forward(*_, **__):
        raise torch.OutOfMemoryError(CUDA_ERROR)

    monkeypatch.setattr("model.model_vlm.MiniMindVLM.forward", forward)
    monkeypatch.setattr("trainer.run.preflight.check_tokenizer_fits", lambda *_, **__: None)
    argv = train_flags(assets, tmp_path, *make_records(tmp_path / "data", num_records=4))
    assert train_pretrain_vlm.main(argv) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert "Tried to allocate 20.00 GiB" in line and "--batch_size" in line


@pytest.mark.parametrize("variables, num_workers", [({}, 8), ({"LOCAL_WORLD_SIZE": 3}, 2)])
def test_ranks_of_a_machine_share_its_cores(variables, num_workers, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name in ("check_disk", "check_records", "report_memory"):
        monkeypatch.setattr(f"trainer.run.preflight.{name}", lambda *_, **__: None)
    launch(monkeypatch, RANK=0, WORLD_SIZE=3, **(variables or {"LOCAL_WORLD_SIZE": 1}))
    args = argparse.Namespace(
        num_workers=64, batch_size=1, save_dir=None, checkpoint_dir=None, on_bad_sample=""
    )
    paths = SimpleNamespace(num_states=lambda: 0)
    model, data = SimpleNamespace(config=None), {"dataset": None, "val_dataset": None}
    parts = SimpleNamespace(model=model, rewards=None, **data)
    check_run(args, None, parts, paths)
    assert args.num_workers == num_workers


def test_pad_multiple_and_products_follow_the_device(cuda):
    cpu, gpu, mps = (torch.device(name) for name in ("cpu", "cuda:0", "mps"))
    assert [devices.pad_multiple(d) for d in (cpu, gpu, mps)] == [1, 64, 1]
    assert [devices.heeds_found_inf(d) for d in (cpu, gpu, mps)] == [True, True, False]
    float32, bfloat16 = torch.float32, torch.bfloat16
    assert [devices.product_dtype(d) for d in (cpu, gpu, mps)] == [float32, bfloat16, float32]
    cuda.capability = (7, 5)
    assert devices.product_dtype(gpu) == float32
