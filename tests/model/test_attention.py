"""If this fails, attention by whole score matrices differs from that of PyTorch, or is taken where
the kernel of PyTorch is faster.
"""

import pytest
import torch
import torch.nn.functional as F
from support.tiny_parts import TINY_MODEL

from model.attention import attend_in_full
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM


@pytest.mark.parametrize("num_groups", [4, 2, 1])
def test_attention_in_full_is_the_fused_one(num_groups):
    torch.manual_seed(0)
    shapes = [(2, 4, 9, 8), (2, num_groups, 9, 8), (2, num_groups, 9, 8)]
    own = [torch.randn(2, 9, s[1], 8).transpose(1, 2).requires_grad_() for s in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in own]
    mixed = attend_in_full(*own, scaling=0.3, dropout=0.0)
    query, *pair = theirs
    key, value = (tensor.repeat_interleave(4 // num_groups, 1) for tensor in pair)
    right = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    torch.testing.assert_close(mixed, right.transpose(1, 2))
    gradient = torch.randn_like(mixed)
    mixed.backward(gradient)
    right.transpose(1, 2).backward(gradient)
    for one, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_attention_in_full_drops_weights_and_keeps_their_mean():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 40, 8).unbind()
    value = torch.eye(40)[None, None]  # the output is then the weights themselves
    weights = attend_in_full(query, key, value, scaling=0.3, dropout=0.0)
    some = attend_in_full(query, key, value, scaling=0.3, dropout=0.25)
    is_dropped = (some == 0) & (weights > 0)
    assert 0.2 < is_dropped.sum() / (weights > 0).sum() < 0.3
    torch.testing.assert_close(some[~is_dropped], weights[~is_dropped] / 0.75)


@pytest.mark.parametrize(
    ("what", "is_in_full"),
    [
        ("training", True), ("evaluation", False), ("float32", False), ("long", False),
        ("masked", False), ("eager", False),
    ],
)  # fmt: skip
def test_short_training_in_bfloat16_attends_in_full(what, is_in_full, monkeypatch):
    """Only there the fused kernel is slow; both give the same loss within bfloat16's rounding."""
    torch.manual_seed(0)
    config = MiniMindConfig(vocab_size=120, initializer_range=0.3, **TINY_MODEL)
    model = MiniMindForCausalLM(config)
    model.set_attn_implementation("eager" if what == "eager" else "sdpa")
    model.train(what != "evaluation")
    monkeypatch.setattr("model.attention.SHORT", 8 if what == "long" else 12)
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return attend_in_full(*args, **options)

    monkeypatch.setattr("model.attention.attend_in_full", counted)
    ids = torch.randint(3, 120, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = what != "masked"
    with torch.autocast("cpu", torch.bfloat16, enabled=what != "float32"):
        loss = model(ids, mask, labels=ids, is_right_padded=what != "masked").loss
    assert len(calls) == (model.config.num_hidden_layers if is_in_full else 0)
    if what == "training":
        right = model.eval()(ids, labels=ids).loss
        assert loss.item() == pytest.approx(right.item(), rel=0.01)
