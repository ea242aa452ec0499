"""If this fails, training, resuming or answering on a GPU mixes devices or waits for the device in
every step, or the pretend GPU of these tests is laxer than a real one.
"""

import signal

import pytest
import torch
from support.pretend_gpu import HOPPER, TURING, Gpu, pretend_gpus
from support.pretend_tensor import pretend_tensors
from support.scripts import train_flags
from support.states import assert_same_state, saved
from support.tiny_parts import make_records, make_tower
from support.tiny_vlm import GREEDY, conversations, make_loaded

from model.generation.engine import VLMEngine
from model.machine.device import prepare_device
from trainer import train_pretrain_vlm, train_scst_vlm
from trainer.loop import train_loop
from trainer.run import report

GROUPED = "aten::_grouped_mm"


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing them takes as long as such a run."""
    monkeypatch.setattr(report, "draw_curves", lambda paths: None)


@pytest.fixture
def gpu():
    """A world with one GPU of Hopper's kind, and tensors on it."""
    with pretend_gpus() as driver, pretend_tensors(driver) as world:
        yield world


# The rules, as PyTorch has them on a real GPU.


def test_a_device_needs_its_index():
    with pretend_gpus(Gpu(), Gpu()):
        with pytest.raises(ValueError, match="specified index or an integer, but got:? ?cuda"):
            torch.cuda.set_device(torch.device("cuda"))
        torch.cuda.set_device(torch.device("cuda:1"))
        assert torch.cuda.current_device() == 1
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.cuda.set_device(2)
    assert not torch.cuda.is_available()


def test_capability_and_memory_are_those_of_the_test():
    with pretend_gpus(Gpu(TURING, total_gib=16, free_gib=12), Gpu(HOPPER)):
        assert torch.cuda.device_count() == 2
        assert torch.cuda.get_device_capability("cuda:0") == TURING
        assert torch.cuda.is_bf16_supported(including_emulation=False) is False
        assert torch.cuda.mem_get_info(0) == (12 * 2**30, 16 * 2**30)
        assert torch.cuda.max_memory_allocated(0) == 4 * 2**30
        assert torch.cuda.get_device_properties(1).major == 9


def test_mixing_devices_raises_but_for_a_single_number(gpu):
    far, near = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="on the same device.* cuda:0 and cpu"):
        far + near
    with pytest.raises(RuntimeError, match="on the same device.* cuda:0 and cpu"):
        torch.nn.Linear(3, 3).to("cuda")(near)
    assert (far + torch.tensor(2.0)).device == torch.device("cuda:0")
    assert torch.equal(far[torch.tensor([1])].cpu(), near[:1])
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        near[torch.tensor([1], device="cuda")]
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        far.numpy()


def test_mixing_gpus_raises():
    with pretend_gpus(Gpu(), Gpu()) as driver, pretend_tensors(driver):
        first, second = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        with pytest.raises(RuntimeError, match="on the same device.* cuda:1 and cuda:0"):
            first * second
        assert (first * second.to(first.device)).tolist() == [1, 1]


COPIES = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.sum() > 0),
    "float": lambda t: float(t[0]),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu", torch.float64),
    "copy_": lambda t: torch.empty(3).copy_(t),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "masked_select": lambda t: t.masked_select(t > 0),
    "equal": lambda t: torch.equal(t, t),
    "unique": lambda t: t.unique(),
    "repeat": lambda t: t.repeat_interleave(t.long()),
}


@pytest.mark.parametrize("kind", COPIES)
def test_each_copy_to_the_host_is_noted_with_its_line(kind, gpu):
    tensor = torch.ones(3, device="cuda")
    _ = tensor * 2 + tensor.sum(), torch.where(tensor > 0, 0.0, tensor)
    assert not gpu.traffic.to_host
    COPIES[kind](tensor)
    (copy,) = gpu.traffic.to_host
    assert copy.waits and copy.line.startswith("tests/model/machine/test_pretend_gpu.py")


def test_waiting_is_an_error_where_the_program_says_so(gpu):
    tensor = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        tensor.sum().item()
    tensor.to("cpu", non_blocking=True)


def test_copies_to_the_device_wait_unless_pinned_and_not_blocking(gpu):
    plain = torch.ones(3)
    plain.to("cuda", non_blocking=True)
    plain.pin_memory().to("cuda")
    plain.pin_memory().to("cuda", non_blocking=True)
    torch.tensor([1, 2], device="cuda")
    assert [copy.waits for copy in gpu.traffic.to_device] == [True, True, False, True]


def test_gradients_and_optimizer_stay_on_the_device(gpu):
    layer = torch.nn.Linear(3, 3).to("cuda")
    layer.bias = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    layer(torch.ones(2, 3, device="cuda")).square().sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(t.is_cuda for t in (layer.weight.grad, layer.bias, *moments))
    assert not gpu.traffic.to_host


# What our code does there.


def train(assets, folder, *, epochs: int = 1, num_records: int = 24, **flags) -> int:
    """The tower's pictures are larger than those of the records, so that a GPU resizes these."""
    flags["vision_model_path"] = folder / "tower"
    make_tower(folder / "tower", image_size=64, patch_size=16)
    data = make_records(folder / "data", num_records=num_records, multi=True)
    options = {"device": "cuda", "epochs": epochs, "save_interval": 4} | flags
    return train_pretrain_vlm.main(train_flags(assets, folder, *data, **options))


@pytest.mark.parametrize(
    "use_moe, dtype, optimizer",
    [(0, "float16", "adamw"), (1, "bfloat16", "adamw"), (0, "bfloat16", "muon")],
)
def test_no_step_waits_for_the_device_between_log_lines(
    use_moe, dtype, optimizer, gpu, assets, tmp_path, monkeypatch
):
    """Six steps, a log line after each third: the others copy nothing to the host, and what they
    copy to the device they do not wait for."""
    steps = []

    def count(run, *rest, _step=train_loop.optimizer_step):
        gpu.traffic.clear()
        result = _step(run, *rest)
        steps.append(len(gpu.traffic.to_device))
        assert not gpu.traffic.to_host and not any(c.waits for c in gpu.traffic.to_device)
        return result

    def look(run, _log=train_loop.log_window):
        assert not gpu.traffic.to_host, "something between step and log line"
        looks.append(run.progress.step)
        _log(run)
        assert gpu.traffic.to_host
        gpu.traffic.clear()

    looks: list[int] = []
    monkeypatch.setattr(train_loop, "optimizer_step", count)
    monkeypatch.setattr(train_loop, "log_window", look)
    status = train(
        assets,
        tmp_path,
        use_moe=use_moe,
        dtype=dtype,
        optimizer=optimizer,
        log_interval=3,
        save_interval=1000,
    )
    assert status == 0 and len(steps) == 6 and min(steps) > 0 and looks == [3, 6]
    assert bool(gpu.kernels[GROUPED, 0]) == bool(use_moe)


def test_older_gpus_do_without_grouped_products(assets, tmp_path):
    with pretend_gpus(Gpu((8, 0))) as driver, pretend_tensors(driver) as world:
        assert train(assets, tmp_path, use_moe=1, num_records=8, dtype="bfloat16") == 0
        assert not world.kernels[GROUPED, 0]


def test_training_there_gives_the_numbers_of_the_cpu(gpu, assets, tmp_path):
    weights = []
    for device in ("cuda", "cpu"):
        assert train(assets, tmp_path / device, device=device, num_records=12) == 0
        weights.append(saved(tmp_path / device / "out", "*.pth"))
    for name, there in weights[0].items():
        torch.testing.assert_close(there, weights[1][name], rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("use_moe", [0, 1], ids=["dense", "moe"])
def test_learning_from_answers_there_gives_the_numbers_of_the_cpu(use_moe, gpu, assets, tmp_path):
    data = make_records(tmp_path / "data", num_records=8)
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        flags = {"device": device, "use_moe": use_moe, "pack": 1, "learning_rate": 1e-3}
        argv = train_flags(assets, out, *data, epochs=1, log_interval=1, **flags)
        assert train_scst_vlm.main(argv) == 0
        found[device] = saved(out / "checkpoints", "*_resume.pth")["model"]
    for name, tensor in found["cpu"].items():
        torch.testing.assert_close(found["cuda"][name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "use_moe, dtype", [(1, "bfloat16"), pytest.param(0, "float16", marks=pytest.mark.full)]
)
@pytest.mark.slow
def test_a_stopped_run_resumes_there_with_equal_bits(
    use_moe, dtype, gpu, assets, tmp_path, monkeypatch
):
    flags = {"use_moe": use_moe, "dtype": dtype, "epochs": 2, "num_records": 12}
    assert train(assets, tmp_path / "whole", **flags) == 0

    def stop_at_four(run, *rest, _step=train_loop.optimizer_step):
        if run.progress.step == 3:
            run.stop.signum = signal.SIGTERM
        return _step(run, *rest)

    with monkeypatch.context() as context:
        context.setattr(train_loop, "optimizer_step", stop_at_four)
        assert train(assets, tmp_path / "cut", **flags) == 128 + signal.SIGTERM
    assert train(assets, tmp_path / "cut", from_resume=1, **flags) == 0
    states = [saved(tmp_path / name / "checkpoints", "*_resume.pth") for name in ("whole", "cut")]
    assert_same_state(*states)
    assert torch.equal(states[0]["rng"][0]["cuda"], states[1]["rng"][0]["cuda"])


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_answers_there_are_those_of_the_cpu(use_moe, gpu, assets):
    """A batch padded on the left, with 0 to 2 pictures a row."""
    loaded = make_loaded(assets, use_moe=use_moe)
    expected = [answer.text for answer in VLMEngine(loaded).generate(conversations(), GREEDY)]
    loaded.model.to(prepare_device(torch.device("cuda:0")))
    gpu.traffic.clear()
    answers = VLMEngine(loaded).generate(conversations(), GREEDY)
    assert [answer.text for answer in answers] == expected
    longest = max(answer.num_new_tokens for answer in answers)
    # A token needs its logits on the host; beside these, the pictures are counted once.
    assert longest <= len(gpu.traffic.to_host) <= longest + 1
