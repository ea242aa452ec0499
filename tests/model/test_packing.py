"""If this fails, `--pack` changes what is learnt: a sample attends to its neighbour in the row, or
has other positions than alone.
"""

import pytest
import torch
from support.tiny_vlm import NUM_TOKENS, make_loaded

from dataset.collate import VLMCollator
from dataset.lm_dataset import IGNORE_INDEX, Sample

TOLERANCE = 1e-5  # float32, relative
AT, TOWER_WIDTH = 34, 24
KINDS = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


def make_model(assets, **fields):
    return make_loaded(assets, **fields).model.requires_grad_(True).train()


def make_samples() -> list[Sample]:
    """Of very unequal lengths; with no image, one, and two."""
    samples = []
    for i, pieces in enumerate([(3, "image", 4), (31,), (2, "image", 1, "image", 9), (5,)]):
        parts = [
            torch.full((NUM_TOKENS,), AT) if piece == "image" else torch.arange(50, 50 + piece)
            for piece in pieces
        ]
        ids = torch.cat(parts)
        labels = torch.where(ids == AT, IGNORE_INDEX, ids)
        labels[: len(ids) // 2] = IGNORE_INDEX
        features = torch.randn(
            pieces.count("image"), NUM_TOKENS, TOWER_WIDTH, generator=torch.manual_seed(i)
        )
        samples.append(
            Sample(
                index=i,
                is_truncated=False,
                input_ids=ids,
                labels=labels,
                image_mask=ids == AT,
                pixel_values=torch.zeros(0, 3, 32, 32),
                vision_features=features if len(features) else None,
                has_features=(True,) * len(features),
                where=f"sample {i}",
            )
        )
    return samples


def losses_and_gradients(model, *, packs: bool, multiple: int = 1):
    batch = VLMCollator(pad_token_id=0, pad_multiple=multiple, packs=packs)(make_samples())
    model.zero_grad()
    output = model(**batch.inputs)
    (output.loss + output.aux_loss).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return output, torch.cat([g.flatten() for g in gradients])


@KINDS
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize(
    "fields", [{}, {"generation": 3}, {"attn_implementation": "eager"}], ids=["2", "3", "eager"]
)
def test_a_packed_batch_gives_the_loss_and_gradient_of_a_padded_one(
    assets, use_moe, multiple, fields
):
    model = make_model(assets, use_moe=use_moe, **fields)
    padded, gradient = losses_and_gradients(model, packs=False)
    packed, packed_gradient = losses_and_gradients(model, packs=True, multiple=multiple)
    assert packed.logits.shape == padded.logits.shape
    torch.testing.assert_close(packed.loss, padded.loss, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(packed.aux_loss, padded.aux_loss, rtol=TOLERANCE, atol=1e-9)
    scale = gradient.norm()
    assert scale > 0 and (packed_gradient - gradient).norm() <= TOLERANCE * scale


def test_the_layers_see_no_padding(assets):
    seen = []
    model = make_model(assets)
    model.model.layers[0].mlp.register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].shape[:2].numel())
    )
    lengths = [len(sample.input_ids) for sample in make_samples()]
    for packs in (False, True):
        losses_and_gradients(model, packs=packs)
    assert seen == [len(lengths) * max(lengths), sum(lengths)]


def test_a_batch_of_bad_samples_alone_packs_to_nothing(assets):
    model = make_model(assets)
    for multiple in (1, 16):
        batch = VLMCollator(pad_token_id=0, pad_multiple=multiple, packs=True)([])
        output = model(**batch.inputs)
        output.loss.backward()
        assert output.loss == 0
