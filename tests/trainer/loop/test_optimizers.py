"""If this fails, Muon or AdamW makes wrong updates, or a step with a gradient that is not finite
changes the weights.
"""

import copy

import pytest
import torch
from torch import nn

from trainer.loop.optimizers import make_optimizer, orthogonal
from trainer.train_args import OPTIMIZERS


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(9, 6),
            "proj": nn.Linear(6, 12),
            "norm": nn.LayerNorm(6),
        }
    )


def give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_singular_values_come_near_one(shape):
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = left @ torch.diag(torch.linspace(0.1, 1, min(shape))) @ right
    values = torch.linalg.svdvals(orthogonal(matrix[None])[0])
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_moves_hidden_matrices_and_adamw_the_rest(model):
    optimizer = make_optimizer(model.named_parameters(), lr=1e-3, kind="muon")
    names = {p: n for n, p in model.named_parameters()}
    groups = {g["is_muon"]: {names[p] for p in g["params"]} for g in optimizer.param_groups}
    assert groups[True] == {"proj.weight"}
    before = weights(model)
    give_gradients(model)
    reference = torch.optim.AdamW(
        [nn.Parameter(before[n].clone()) for n in before], lr=1e-3, weight_decay=0.01
    )
    for own, parameter in zip(reference.param_groups[0]["params"], model.parameters(), strict=True):
        own.grad = parameter.grad.clone()
    reference.step()
    optimizer.step()
    after = dict(zip(before, reference.param_groups[0]["params"], strict=True))
    for name, parameter in model.named_parameters():
        is_same = torch.allclose(parameter, after[name], atol=1e-6)
        assert is_same == (name != "proj.weight"), name
    moved = model["proj"].weight - before["proj.weight"]  # 12 x 6: rate 10 lr sqrt(2)
    values = torch.linalg.svdvals(moved) / (10 * 1e-3 * 2**0.5)
    assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_loaded_state_goes_on_with_the_same_bits(model, kind):
    first = make_optimizer(model.named_parameters(), lr=1e-3, kind=kind)
    give_gradients(model)
    first.step()
    twin = copy.deepcopy(model)
    second = make_optimizer(twin.named_parameters(), lr=1e-3, kind=kind)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    give_gradients(model)
    for own, parameter in zip(twin.parameters(), model.parameters(), strict=True):
        own.grad = parameter.grad.clone()
    first.step()
    second.step()
    for own, parameter in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, parameter)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("num_before", [0, 2])
def test_step_left_out_changes_nothing(model, kind, num_before):
    optimizer = make_optimizer(model.named_parameters(), lr=1e-3, kind=kind)
    for _ in range(num_before):
        give_gradients(model)
        optimizer.step()
    before, states = weights(model), [dict(s) for s in optimizer.state_dict()["state"].values()]
    moments = [{k: v.clone() for k, v in s.items()} for s in states]
    give_gradients(model)
    model["proj"].weight.grad[0, 0] = float("nan")
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    after = list(optimizer.state_dict()["state"].values())
    for old, new in zip(moments, after, strict=False):
        assert all(torch.equal(old[k], new[k]) for k in old)
    assert all(torch.isfinite(v).all() for state in after for v in state.values())
