"""If this fails, training or answering on a CUDA build of PyTorch puts a tensor on the wrong device
or makes the host wait in every step. Forward, update and decoding run with fake tensors on `cuda`;
no GPU is needed.

A fake tensor has a shape, a type and a device but no numbers, and what PyTorch says of each
operation is what its CUDA build says: a tensor on the wrong device raises, and so does whatever
the host would have to know. Backward does not run so: it asks the driver for a stream.
"""

import os

import pytest
import torch
from support.pretend_gpu import AMPERE, HOPPER
from support.tiny_parts import make_records
from support.tiny_vlm import conversations, make_loaded
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dataset.collate import VLMCollator
from dataset.lm_dataset import VLMDataset
from trainer.loop.engine import Engine, autocast
from trainer.loop.optimizers import make_optimizer, set_trainable

MUST_RUN = "CUDA_BUILD_MUST_RUN" in os.environ  # set by run.py: not to run is a failure there
CUDA = torch.device("cuda", 0)
KINDS = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
pytestmark = [
    pytest.mark.cuda_build,
    pytest.mark.skipif(
        torch.version.cuda is None and not MUST_RUN,
        reason="needs a CUDA build of PyTorch (no GPU): make test-cuda-build",
    ),
]


@pytest.fixture(params=[HOPPER, AMPERE], ids=["hopper", "ampere"])
def mode(request, monkeypatch):
    """Fake tensors on a GPU whose capability decides about grouped products."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for module in (torch.cuda.amp.common, torch.amp.grad_scaler):  # autocast counts on a GPU
        monkeypatch.setattr(module, "amp_definitely_not_available", lambda: False, raising=False)
    return FakeTensorMode()


def fake_model(mode, assets, *, use_moe: bool, attention: str = "sdpa", dtype: str = "float32"):
    """A tiny model on `cuda`, its weights tied as they were, and its processor."""
    loaded = make_loaded(assets, use_moe=use_moe)
    loaded.model.set_attn_implementation(attention)
    made: dict[torch.Tensor, torch.Tensor] = {}  # by identity
    for module in loaded.model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor not in made:
                    made[tensor] = fake_on_cuda(mode, tensor, getattr(torch, dtype))
                store[name] = made.get(tensor)
    return loaded.model, loaded.processor


def fake_on_cuda(mode, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    plain = tensor.detach()
    with mode:
        fake = mode.from_tensor(plain)
        fake = fake.to(CUDA, dtype if tensor.is_floating_point() else None)
        is_weight = isinstance(tensor, torch.nn.Parameter)
        return torch.nn.Parameter(fake, tensor.requires_grad) if is_weight else fake


def on_cuda(mode, inputs: dict) -> dict:
    """Tensors of a batch, fake and on `cuda`."""
    return {
        name: fake_on_cuda(mode, value, value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


@ATTENTION
@DTYPES
@KINDS
def test_training_forward_stays_on_the_device(use_moe, dtype, attention, mode, assets, tmp_path):
    model, processor = fake_model(mode, assets, use_moe=use_moe, attention=attention)
    dataset = VLMDataset(*make_records(tmp_path, num_records=8, multi=True), processor)
    collate = VLMCollator(pad_token_id=0, pad_multiple=64)
    inputs = on_cuda(mode, collate([dataset[i] for i in range(8)]).inputs)
    model.train()
    with mode, autocast(CUDA, dtype):
        output = model(**inputs)
    assert output.loss.device == output.aux_loss.device == CUDA
    assert output.logits.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@DTYPES
@KINDS
def test_update_stays_on_the_device(use_moe, dtype, optimizer, mode, assets):
    """Unscaling, clipping and the fused kernels, with gradients made up."""
    model, _ = fake_model(mode, assets, use_moe=use_moe)
    set_trainable(model, freeze_llm=False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    engine = Engine(
        model,
        optimizer=make_optimizer(named, lr=1e-3, kind=optimizer),
        scaler=torch.amp.GradScaler("cuda", enabled=dtype == "float16"),
        grad_clip=1.0,
    )
    with mode:
        engine.scaler.scale(torch.ones((), device=CUDA))
        for _ in range(2):
            for _, parameter in named:
                parameter.grad = torch.ones_like(parameter)
            norm, is_bad = engine.step(torch.zeros(2, device=CUDA), is_empty=False)
    assert norm.device == is_bad.device == CUDA
    assert all(
        t.device == CUDA for s in engine.optimizer.state.values() for t in s.values() if t.dim()
    )


@ATTENTION
@DTYPES
@KINDS
def test_prompt_and_next_token_stay_on_the_device(use_moe, dtype, attention, mode, assets):
    """A batch padded on the left, then one token more, as `model/decoding.py` asks for them."""
    model, processor = fake_model(mode, assets, use_moe=use_moe, attention=attention, dtype=dtype)
    inputs = on_cuda(mode, processor.prompt_batch(conversations()))
    model.eval()
    with mode, torch.no_grad():
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        assert output.logits.device == CUDA and output.logits.dtype == getattr(torch, dtype)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        embeds = model.model.embed_tokens(torch.zeros(3, 1, dtype=torch.long, device=CUDA))
        output = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            use_cache=True,
            cache=output.cache,
            logits_to_keep=1,
        )
    assert output.logits.shape == (3, 1, model.config.vocab_size) and output.logits.device == CUDA


def test_wrong_devices_and_host_syncs_raise_there(mode):
    """What these tests rest on."""
    with mode:
        far = torch.ones(2, 3, device=CUDA)
        with pytest.raises(RuntimeError, match="cuda:0|device"):
            far + torch.ones(2, 3)
        with pytest.raises(DataDependentOutputException):
            far.sum().item()
