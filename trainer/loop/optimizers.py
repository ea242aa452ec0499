"""Owns what moves the weights: which parameters train, AdamW, Muon."""

import re
from collections.abc import Iterable

import torch
from torch import nn

from model.machine.device import product_dtype

WEIGHT_DECAY = 0.01
MUON_RATE = 10.0  # in learning rates
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
STACKED = 2**22  # numbers of matrices that Muon moves at a time


def set_trainable(model: nn.Module, *, freeze_llm: bool, trainable: str | None = None) -> list[str]:
    """Choose the parameters that train; the vision tower never does.

    Args:
        freeze_llm: the projection only, else language model and projection.
        trainable: a regular expression searched in the names, instead of that policy.
    Returns:
        The names that train.
    Raises:
        ValueError: nothing is left to train, or not a regular expression.
    """
    try:
        pattern = re.compile(trainable if trainable is not None else "")
    except re.error as error:
        raise ValueError(
            f"--trainable {trainable!r} is not a regular expression: {error}"
        ) from None
    names = []
    for name, parameter in model.named_parameters():
        if name.startswith("vision_encoder."):
            wanted = False
        elif trainable is not None:
            wanted = bool(pattern.search(name))
        else:
            wanted = not freeze_llm or name.startswith("vision_proj.")
        parameter.requires_grad_(wanted)
        if wanted:
            names.append(name)
    if not names and trainable is None:
        raise ValueError("--freeze_llm 1 leaves nothing to train: this model has no projection")
    if not names:
        raise ValueError(
            f"--trainable {trainable!r} matches no parameter, such as model.norm.weight"
        )
    return names


class MuonAdamW(torch.optim.AdamW):
    """Muon on the hidden matrices, AdamW on embeddings, norms and all else.

    Muon moves a matrix by its momentum made orthogonal, so that rare directions count as much as
    frequent ones; what is said of one thing together is then learnt in far fewer steps. Its rate
    is `MUON_RATE` times AdamW's, so one schedule serves both.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], *, lr: float):
        groups = [{"params": matrices, "is_muon": True}, {"params": others, "is_muon": False}]
        kept = [group for group in groups if group["params"]]
        super().__init__(kept, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; a `found_inf` of 1 leaves all as it is, without waiting for the device."""
        groups = self.param_groups
        for group in groups:
            if group["is_muon"]:
                self._turn(group)
        self.param_groups = [group for group in groups if not group["is_muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _turn(self, group: dict) -> None:
        """Matrices of one shape move together: many small products take long one by one."""
        alike: dict[tuple, list[nn.Parameter]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                key = (matrix.shape, matrix.dtype, matrix.device)
                alike.setdefault(key, []).append(matrix)
        for (shape, *_), matrices in alike.items():
            count = max(1, STACKED // shape.numel())
            for start in range(0, len(matrices), count):
                self._turn_stack(matrices[start : start + count], group["lr"])

    def _turn_stack(self, matrices: list[nn.Parameter], lr: float) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
                self.state[matrix]["step"] = torch.zeros(())  # AdamW's loading looks for it
        before = torch.stack([self.state[matrix]["momentum"] for matrix in matrices])
        weights, grads = torch.stack(matrices), torch.stack([m.grad for m in matrices])
        momenta = MOMENTUM * before + grads
        dtype = product_dtype(weights.device)
        turn = orthogonal(grads + MOMENTUM * momenta, dtype=dtype).to(weights.dtype)
        rows, columns = weights.shape[1:]
        rate = MUON_RATE * lr * max(1.0, rows / columns) ** 0.5
        after = (1 - lr * WEIGHT_DECAY) * weights - rate * turn
        is_bad = getattr(self, "found_inf", None)
        if is_bad is not None:
            momenta = torch.where(is_bad.bool(), before, momenta)
            after = torch.where(is_bad.bool(), weights, after)
        for matrix, new, momentum in zip(matrices, after, momenta, strict=True):
            matrix.copy_(new)
            self.state[matrix]["momentum"].copy_(momentum)


def orthogonal(matrices: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Matrices (N, R, C) with all their singular values near 1, by five steps of Newton and Schulz.

    Args:
        dtype: of the products; bfloat16 will do, since near 1 is all that is asked for.
    Source: the polynomial of Jordan et al. (2024), tuned to rise fast from small values.
    """
    near = matrices.float()
    is_tall = near.shape[1] > near.shape[2]
    near = near.mT if is_tall else near
    near = (near / (near.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    first, third, fifth = NEWTON_SCHULZ
    for _ in range(5):
        gram = near @ near.mT
        gram = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        near = torch.baddbmm(near, gram, near, beta=first)
    return near.mT if is_tall else near


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, kind: str = "adamw"
) -> torch.optim.AdamW:
    """The optimizer of named parameters. Its kernel can be told on the device, by `found_inf`, to
    leave a step out, so that no step waits for the host.

    Args:
        kind: "adamw" with its default betas, or "muon", see `MuonAdamW`.
    """
    named = list(parameters)
    if kind == "adamw":
        return torch.optim.AdamW(
            [p for _, p in named], lr=lr, weight_decay=WEIGHT_DECAY, fused=True
        )
    is_matrix = {n: p.ndim == 2 and not re.search("embed|lm_head", n) for n, p in named}
    return MuonAdamW(
        [p for n, p in named if is_matrix[n]], [p for n, p in named if not is_matrix[n]], lr=lr
    )
