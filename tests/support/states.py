"""Offers readers and comparisons of training states, and runs that are left in the middle."""

import torch

from trainer.loop import train_loop


def leave_at(patch, step: int) -> None:
    """Ctrl-C in front of a step of every run from now on.

    Args:
        patch: a `MonkeyPatch`, whose `undo` ends that.
    """
    go_on = train_loop.optimizer_step

    def leave(run, *rest):
        if run.progress.step == step:
            raise KeyboardInterrupt
        return go_on(run, *rest)

    patch.setattr(train_loop, "optimizer_step", leave)


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
