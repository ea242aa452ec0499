"""Offers the cases about single results on a GPU: attention, grouped products, answers, memory."""

from functools import partial

import torch
import torch.nn.functional as F
from gpu.room import Case, Room, Skip
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.feed_forward import MoEFeedForward
from model.generation.engine import VLMEngine, ask
from model.generation.key_values import KeyValues
from model.generation.sampling import Sampling
from model.generation.token_step import TokenStep
from model.machine.compiling import check_compiler
from model.machine.device import OutOfMemory, has_grouped_mm, memory_guard
from model.weights.build_model import LoadedModel

# Largest difference that counts as rounding, as a share of the largest true value.
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-4}
GROUPED_TOLERANCE = 4e-2  # three products of bfloat16 one after another


def share_off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).abs().max() / expected.abs().max())


def attention(room: Room, *, dtype: str, head_dim: int, kind: str) -> str:
    """The kernels that PyTorch takes by itself, as commands have them, against the formula."""
    if dtype not in room.dtypes:
        return f"refused: this GPU has no {dtype}"
    length = 24 if room.is_rehearsal else 320
    generator = torch.Generator().manual_seed(0)

    def states(num_heads: int, num_tokens: int) -> torch.Tensor:
        made = torch.randn(2, num_heads, num_tokens, head_dim, generator=generator)
        return made.to(room.device, getattr(torch, dtype)).requires_grad_(kind == "causal")

    query = states(8, 1 if kind == "decode" else length)
    key, value = states(2, length), states(2, length)
    mask = None
    if kind != "causal":  # the second row is padded on the left
        allowed = torch.ones(query.shape[2], length, dtype=torch.bool).tril(length - query.shape[2])
        allowed = allowed.expand(2, 1, -1, -1).clone()
        allowed[1, :, :, : length // 3] = False
        allowed[
            1, :, torch.arange(query.shape[2]), -query.shape[2] + torch.arange(query.shape[2])
        ] = True  # nobody looks at nothing
        mask = allowed.to(room.device)
    options = {"attn_mask": mask, "is_causal": kind == "causal", "enable_gqa": True}
    found = F.scaled_dot_product_attention(query, key, value, **options)
    exact = [t.detach().double().cpu().requires_grad_() for t in (query, key, value)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(
            *exact, **(options | {"attn_mask": None if mask is None else mask.cpu()})
        )
    worst = share_off(found.detach(), expected.detach())
    if kind == "causal":
        weights = torch.randn(found.shape, generator=generator)
        (found * weights.to(found)).sum().backward()
        (expected * weights.double()).sum().backward()
        worst = max(
            share_off(t.grad, e.grad) for t, e in zip((query, key, value), exact, strict=True)
        )
    assert worst < TOLERANCE[dtype], f"off by {worst:.1e}"
    return f"off by {worst:.1e} of the largest value"


def decoding_pace(room: Room) -> str:
    """A query against one key more each time, with cuDNN's attention off, as here, and on."""
    cuda, length = torch.backends.cuda, 40 if room.is_rehearsal else 600
    dtype = getattr(torch, room.dtypes[0])
    query = torch.randn(1, 8, 1, 64, device=room.device, dtype=dtype)
    keys = torch.randn(1, 8, length, 64, device=room.device, dtype=dtype)

    def decode(first: int, last: int) -> None:
        for end in range(first, last):
            F.scaled_dot_product_attention(query, keys[:, :, :end], keys[:, :, :end])
        room.synchronize()

    before, figures = cuda.cudnn_sdp_enabled(), []
    assert not (room.is_cuda and before), "prepare_device left cuDNN's attention on"
    try:
        for number, is_on in enumerate((False, True)):
            cuda.enable_cudnn_sdp(is_on)
            start, span = 8 + number * length // 2, length // 3
            decode(start - 2, start)
            took_ms = room.milliseconds(partial(decode, start, start + span), times=1) / span
            figures.append(f"{'on' if is_on else 'off'} {took_ms:.3f}")
    finally:
        cuda.enable_cudnn_sdp(before)
    return f"ms a token, cuDNN {', '.join(figures)} (lengths met for the first time only once)"


def grouped(room: Room, *, is_lonely: bool) -> str:
    """Grouped products against every expert on every token: results, gradients, time.

    Args:
        is_lonely: one expert gets no token at all: its gradient is zero.
    """
    model, _ = room.model(use_moe=True)
    dtype = torch.bfloat16
    block: MoEFeedForward = model.model.layers[0].mlp
    num_experts, width = len(block.experts), model.config.hidden_size
    if not has_grouped_mm(room.device, dtype, (width, model.config.intermediate_size)):
        raise Skip("grouped products do not pay on this GPU, so every expert takes every token")
    num_tokens = 64 if room.is_rehearsal else 8192
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(num_tokens, width, generator=generator)
    ids = torch.stack(
        [
            torch.randperm(num_experts - is_lonely, generator=generator)[:2]
            for _ in range(num_tokens)
        ]
    )
    weights = torch.rand(num_tokens, 2, generator=generator)
    results = {}
    for name in ("_grouped", "_every_expert"):
        stacked = [
            torch.stack([getattr(e, part).weight for e in block.experts])
            .detach()
            .to(dtype)
            .mT.requires_grad_()
            for part in ("gate_proj", "up_proj", "down_proj")
        ]
        inputs = tokens.to(room.device, dtype).requires_grad_()
        share = weights.to(room.device, dtype)
        route, where = getattr(block, name), ids.to(room.device)

        def work(route=route, inputs=inputs, where=where, share=share, stacked=stacked):
            mixed = route(inputs, where, share, stacked)
            return mixed, *torch.autograd.grad(mixed.float().square().sum(), [inputs, *stacked])

        results[name] = work(), room.milliseconds(work)
    (found, found_ms), (expected, expected_ms) = results.values()
    worst = max(share_off(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True))
    assert all(t.isfinite().all() for t in found), "not finite"
    assert worst < GROUPED_TOLERANCE, f"off by {worst:.1e}"
    if is_lonely:
        assert not any(gradient[-1].any() for gradient in found[2:]), "a gradient from nothing"
    return f"off by {worst:.1e}; {found_ms:.2f} ms grouped, {expected_ms:.2f} ms by every expert"


def left_padded(room: Room, *, use_moe: bool, dtype: str) -> str:
    """A batch of prompts of several lengths answers as each prompt alone."""
    if dtype not in room.dtypes:
        return f"refused: this GPU has no {dtype}"
    model, processor = room.model(use_moe=use_moe, initializer_range=0.3, **tiny(room))
    model.eval().requires_grad_(False).to(getattr(torch, dtype))
    engine = VLMEngine(LoadedModel(model, processor, room.folder, can_see=True))
    picture = Image.radial_gradient("L").resize((60, 44)).convert("RGB")
    other = picture.point(lambda value: value * 7 % 256)
    asked = [
        (ask("What is a circle?", num_images=0), []),
        (ask("<image>\nWhat is in the picture?", num_images=1), [picture]),
        (ask("图像里有什么？ <image> or <image>?", num_images=2), [other, picture]),
    ]
    sampling = Sampling(max_new_tokens=16, temperature=0)
    together = engine.generate(asked, sampling)
    alone = [engine.generate([one], sampling)[0] for one in asked]
    equal = [a.text == b.text for a, b in zip(together, alone, strict=True)]
    assert dtype != "float32" or all(equal), "float32 answers differ"
    heads = [first_logits(engine, asked), [first_logits(engine, [one])[0] for one in asked]]
    worst = max(share_off(a, b) for a, b in zip(*heads, strict=True))
    assert worst < 5 * TOLERANCE[dtype], f"logits of the first token off by {worst:.1e}"
    return f"{sum(equal)} of {len(equal)} answers are the same, logits off by {worst:.1e}"


@torch.inference_mode()
def compiled_steps(room: Room) -> str:
    """`--compile 1` of the answering commands: the same logits, and its time, for one row."""
    try:
        check_compiler(room.device)
    except ValueError as error:
        raise Skip(str(error)) from error
    dtype = room.dtypes[0]
    model, _ = room.model(**(tiny(room) if room.is_rehearsal else {}))
    model.eval().requires_grad_(False).to(getattr(torch, dtype))
    ids = torch.randint(300, 600, (1, 64), generator=torch.Generator().manual_seed(0))
    ids, logits, figures = ids.to(room.device), [], []
    for does_compile in (False, True):
        step = TokenStep(model, compile=does_compile)
        past = KeyValues(model(ids, use_cache=True).cache, [64], max_new_tokens=400)
        logits.append(step(ids[:, 0], past))
        figures.append(room.milliseconds(partial(step, ids[:, 0], past), times=200))
    worst = share_off(logits[1], logits[0])
    assert worst < 5 * TOLERANCE[dtype], f"logits off by {worst:.1e}"
    plain_ms, compiled_ms = figures
    return f"{plain_ms:.2f} ms a token plain, {compiled_ms:.2f} compiled; off by {worst:.1e}"


def tiny(room: Room) -> dict:
    """Few layers: with such wide weights, many make every difference large."""
    return {"num_hidden_layers": 2, "hidden_size": room.sizes[0][0] if room.is_rehearsal else 256}


@torch.inference_mode()
def first_logits(engine: VLMEngine, asked: list) -> torch.Tensor:
    """Logits (B, V) of the first new token."""
    batch = engine.processor.prompt_batch(asked)
    inputs = {name: tensor.to(engine.model.device) for name, tensor in batch.items()}
    return engine.model(**inputs, logits_to_keep=1).logits[:, -1].float().cpu()


def no_room(room: Room) -> str:
    """Asking for more memory than there is becomes one line, and the next thing works."""
    size = torch.cuda.mem_get_info(room.device)[1] if room.is_cuda else 2**50
    try:
        with memory_guard("use less"):
            torch.empty(2 * size, dtype=torch.uint8, device=room.device)
    except OutOfMemory as error:
        line = str(error)
    else:
        raise AssertionError("there was room")
    assert line.startswith("out of memory (") and "\n" not in line and "use less" in line, line
    assert torch.ones(3, device=room.device).sum().item() == 3
    return line


def cases(room: Room) -> list[Case]:
    """What matters most first."""
    dtypes = ("bfloat16", "float16", "float32")
    kinds = {"dense": False, "moe": True}
    return [
        *(
            Case(
                f"left-padded batch against single prompts: {kind}, {dtype}",
                partial(left_padded, use_moe=use_moe, dtype=dtype),
            )
            for dtype in dtypes
            for kind, use_moe in kinds.items()
        ),
        *(
            Case(
                f"attention against the formula: {kind}, {head_dim} wide heads, {dtype}",
                partial(attention, dtype=dtype, head_dim=head_dim, kind=kind),
            )
            for kind in ("causal", "padded", "decode")
            for head_dim in (64, 96)
            for dtype in dtypes
        ),
        Case("decoding without and with cuDNN's attention", decoding_pace),
        Case("compiled steps of a token against plain ones", compiled_steps),
        Case("grouped products against plain ones", partial(grouped, is_lonely=False)),
        Case("an expert without a token", partial(grouped, is_lonely=True)),
        Case("out of memory is one line", no_room),
    ]
