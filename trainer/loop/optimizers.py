"""Owns which parameters train, and the optimizers: AdamW, Muon."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from model.generations import DEFAULT_GENERATION
from model.machine.device import product_dtype

WEIGHT_DECAY = 0.01
MUON_RATE = 10.0  # Muon's learning rate, in AdamW's
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # coefficients of x, x^3 and x^5
STACKED = 2**22  # elements of the matrices that Muon updates in one stack


FROZEN = {  # --freeze_llm -> what trains of the language model, beside the projection
    2: {0: "all", 1: "none", 2: "none"},
    3: {0: "all", 1: "ends", 2: "none"},
}
TRAINED_WORDS = {
    "all": "language model and projection",
    "ends": "projection, first and last decoder layer",
    "none": "projection only",
}


def set_trainable(
    model: nn.Module,
    *,
    freeze_llm: int,
    generation: int = DEFAULT_GENERATION,
    trainable: str | None = None,
) -> list[str]:
    """Choose the parameters that train; the vision tower never does.

    Args:
        freeze_llm: 0 trains all, 2 the projection only; 1 does too in generation 2, and trains the
            first and the last decoder layer as well in generation 3.
        trainable: a regular expression searched in the names; `freeze_llm` then has no effect.
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
    if trainable is None:
        pattern = _frozen_pattern(model, FROZEN[generation][int(freeze_llm)])
    names = []
    for name, parameter in model.named_parameters():
        wanted = not name.startswith("vision_encoder.") and bool(pattern.search(name))
        parameter.requires_grad_(wanted)
        if wanted:
            names.append(name)
    if not names and trainable is None:
        raise ValueError(
            f"--freeze_llm {int(freeze_llm)} leaves nothing to train: this model has no projection"
        )
    if not names:
        raise ValueError(
            f"--trainable {trainable!r} matches no parameter, such as model.norm.weight"
        )
    return names


def _frozen_pattern(model: nn.Module, trained: str) -> re.Pattern[str]:
    """Of the names that train under a freeze policy."""
    config: Any = model.config
    last = config.num_hidden_layers - 1
    patterns = {
        "all": "",
        "ends": rf"^vision_proj\.|^model\.layers\.(0|{last})\.",
        "none": r"^vision_proj\.",
    }
    return re.compile(patterns[trained])


class MuonAdamW(torch.optim.AdamW):
    """Muon on the hidden matrices, AdamW on embeddings, norms and all else.

    Muon updates a matrix by its Nesterov momentum M = U S V^T, made orthogonal to U V^T: all
    singular values become about 1. So directions that are rare in the gradients move as far as
    the frequent ones, and the loss falls in fewer steps. Its learning rate is `MUON_RATE` times
    AdamW's, times sqrt(rows / columns) for tall matrices; so one schedule serves both.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], *, lr: float):
        groups = [{"params": matrices, "is_muon": True}, {"params": others, "is_muon": False}]
        kept = [group for group in groups if group["params"]]
        super().__init__(kept, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; none if the attribute `found_inf` is 1, which only the device reads."""
        groups = self.param_groups
        for group in groups:
            if group["is_muon"]:
                self._update_group(group)
        self.param_groups = [group for group in groups if not group["is_muon"]]
        try:
            loss: float | None = super().step(closure)
            return loss
        finally:
            self.param_groups = groups

    def _update_group(self, group: dict[str, Any]) -> None:
        """Update matrices of one shape in stacks: many small products one by one are slow."""
        alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[nn.Parameter]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                key = (matrix.shape, matrix.dtype, matrix.device)
                alike.setdefault(key, []).append(matrix)
        for (shape, *_), matrices in alike.items():
            count = max(1, STACKED // shape.numel())
            for start in range(0, len(matrices), count):
                self._update_stack(matrices[start : start + count], group["lr"])

    def _update_stack(self, matrices: list[nn.Parameter], lr: float) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
                self.state[matrix]["step"] = torch.zeros(())  # AdamW's loading looks for it
        before = torch.stack([self.state[matrix]["momentum"] for matrix in matrices])
        weights = torch.stack([*matrices])
        grads = torch.stack([m.grad for m in matrices if m.grad is not None])
        momenta = MOMENTUM * before + grads
        dtype = product_dtype(weights.device)
        update = orthogonal(grads + MOMENTUM * momenta, dtype=dtype).to(weights.dtype)
        rows, columns = weights.shape[1:]
        rate = MUON_RATE * lr * max(1.0, rows / columns) ** 0.5
        after = (1 - lr * WEIGHT_DECAY) * weights - rate * update
        is_bad = getattr(self, "found_inf", None)
        if is_bad is not None:
            momenta = torch.where(is_bad.bool(), before, momenta)
            after = torch.where(is_bad.bool(), weights, after)
        for matrix, new, momentum in zip(matrices, after, momenta, strict=True):
            matrix.copy_(new)
            self.state[matrix]["momentum"].copy_(momentum)


def orthogonal(matrices: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Orthogonalise matrices (N, R, C): set all singular values to about 1, by five Newton-Schulz
    iterations.

    Args:
        dtype: of the products; bfloat16 is exact enough, since singular values need not be 1.
    Source: Jordan et al. (2024); their quintic polynomial is tuned to raise small values fast.
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
    """The optimizer of named parameters. Its fused kernel reads the attribute `found_inf`, a tensor
    on the device, and leaves a step out if it is 1: so the host need not wait for the device.

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
