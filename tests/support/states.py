"""Offers readers and comparisons of training states."""

import torch


def saved(folder, pattern: str):
    return torch.load(next(folder.glob(pattern)), weights_only=True)


def assert_same_state(left, right):
    """Weights, AdamW moments, progress and generators, bit by bit."""
    for name, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][name]), name
    for index, moments in left["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, right["optimizer"]["state"][index][name]), (index, name)
    assert len(left["rng"]) == left["world_size"]
    for of_left, of_right in zip(left["rng"], right["rng"], strict=True):
        assert torch.equal(of_left["cpu"], of_right["cpu"])
    assert left["progress"] == right["progress"]
