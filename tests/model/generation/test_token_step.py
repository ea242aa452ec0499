"""If this fails, an answer is not what the model says: a token is computed in another way than by
the model's own forward pass.
"""

from functools import partial

import pytest
import torch
from support.tiny_parts import TINY_MODEL

from model.generation import key_values, token_step
from model.generation.key_values import KeyValues
from model.generation.token_step import TokenStep
from model.model_vlm import MiniMindVLM, VLMConfig

KINDS = {
    "dense": {},
    "moe": {"use_moe": True},
    "third": {"generation": 3},
    "third moe": {"generation": 3, "use_moe": True},
    "yarn": {"inference_rope_scaling": True},
}
LENGTHS, NUM_NEW = (7, 12, 5), 9


def make_model(dtype: torch.dtype, **fields) -> MiniMindVLM:
    torch.manual_seed(0)
    config = VLMConfig(**(TINY_MODEL | {"vocab_size": 60, "initializer_range": 0.3} | fields))
    return MiniMindVLM(config).eval().requires_grad_(False).to(dtype)


def make_text(lengths=LENGTHS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T), padded on the left, and what follows, (B, `NUM_NEW`)."""
    torch.manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, 60, (len(lengths), width + NUM_NEW))
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return ids, mask


def begin(model: MiniMindVLM, ids, mask, *, repeats: int = 1) -> KeyValues:
    output = model(ids[:, : mask.shape[1]], mask, use_cache=True)
    lengths = [length for length in mask.sum(1).tolist() for _ in range(repeats)]
    return KeyValues(output.cache, lengths, max_new_tokens=NUM_NEW)


def from_scratch(model: MiniMindVLM, row: int, ids, mask, num_new: int) -> torch.Tensor:
    text = ids[row, mask.shape[1] - mask[row].sum() : mask.shape[1] + num_new]
    return model(text[None], use_cache=False).logits[0, -1]


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("lengths", [LENGTHS, (6, 6), (4,)], ids=["uneven", "even", "one"])
@torch.inference_mode()
def test_logits_are_the_models(fields, lengths, monkeypatch):
    monkeypatch.setattr(key_values, "FIRST_SLOTS", 2)  # it has to grow
    model = make_model(torch.float32, **fields)
    ids, mask = make_text(lengths)
    past, step = begin(model, ids, mask), TokenStep(model)
    for new in range(NUM_NEW):
        logits = step(ids[:, mask.shape[1] + new], past)
        wanted = [from_scratch(model, row, ids, mask, new + 1) for row in range(len(lengths))]
        torch.testing.assert_close(logits, torch.stack(wanted), atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_rows_that_leave_and_rows_of_one_prompt():
    model, step = make_model(torch.float32), None
    step = TokenStep(model)
    ids, mask = make_text()
    past = begin(model, ids, mask, repeats=2)
    rows = [0, 0, 1, 1, 2, 2]
    step(ids[rows, mask.shape[1]], past)
    for kept in ([1, 2, 4], [0, 2], [1]):
        past.select(kept)
        rows = [rows[i] for i in kept]
        num_new = past.num_slots - max(int(mask[row].sum()) for row in rows)
        logits = step(ids[rows, mask.shape[1] + num_new], past)
        wanted = [from_scratch(model, row, ids, mask, num_new + 1) for row in rows]
        torch.testing.assert_close(logits, torch.stack(wanted), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("generation", [2, 3])
@torch.inference_mode()
def test_bfloat16_is_as_near_as_its_rounding(generation):
    model = make_model(torch.bfloat16, generation=generation)
    ids, mask = make_text()
    past, step = begin(model, ids, mask), TokenStep(model)
    logits = step(ids[:, mask.shape[1]], past)
    wanted = torch.stack([from_scratch(model, row, ids, mask, 1) for row in range(len(ids))])
    assert logits.dtype == torch.bfloat16
    assert (logits - wanted).abs().max() <= 0.03 * wanted.abs().max()


# What is compiled is traced in one piece; the full form also builds the kernels. The chosen experts
# depend on the values, so that a mixture is traced in several.
TRACED = partial(torch.compile, dynamic=True, fullgraph=True, backend="eager")


@pytest.mark.parametrize("fields", [{}, {"generation": 3}], ids=["dense", "third"])
def test_compiled_steps_are_traced_in_one_piece(fields, monkeypatch):
    monkeypatch.setattr(token_step, "compiled", TRACED)
    assert_compiled_is_plain(fields)


@pytest.mark.full
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())
def test_compiled_steps_say_the_same(fields):
    assert_compiled_is_plain(fields)


@torch.inference_mode()
def assert_compiled_is_plain(fields):
    torch.compiler.reset()
    model = make_model(torch.float32, **fields)
    plain, fast = TokenStep(model), TokenStep(model, compile=True)
    for lengths in ((6,), LENGTHS, (4, 4)):
        ids, mask = make_text(lengths)
        pasts = [begin(model, ids, mask) for _ in range(2)]
        for new in range(NUM_NEW):
            tokens = ids[:, mask.shape[1] + new]
            wanted, found = plain(tokens, pasts[0]), fast(tokens, pasts[1])
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
