"""Owns what follows attention in a layer: the SwiGLU block, or a mixture of them (MoE).

Shapes: B batch, T tokens, D hidden, F intermediate, E routed experts, k experts per token,
S routed rows (B * T * k).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from model.machine.device import has_grouped_mm
from model.packing import Packing

FEW = 32  # tokens


class FeedForward(nn.Module):
    """SwiGLU: `down(act(gate(x)) * up(x))`.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(self, config: PreTrainedConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.fused: nn.Module | None = None  # in place of the first two (`model.quantizing`)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = config.dropout

    def forward(
        self, hidden: Tensor, token_mask: Tensor | None, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        mixed = self.mix(hidden)
        return F.dropout(mixed, self.dropout, self.training), hidden.new_zeros(())

    def mix(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        """The block itself, without dropout."""
        if self.fused is None:
            gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        else:
            gate, up = self.fused(hidden).chunk(2, -1)
        mixed: Tensor = self.down_proj(self.act(gate) * up)
        return mixed


class MoEGate(nn.Module):
    """Router: which experts a token goes to, with what weight, and how evenly they are used."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(
        self, hidden: Tensor, token_mask: Tensor | None, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns expert ids (B, T, k), their weights (B, T, k) and the balance.

        The balance is the scalar load-balance loss if that is a mean over sequences (`seq_aux`),
        else `expert_use` (2, E), of which `balance_loss` makes the loss of a whole step; zero
        outside training.
        """
        config = self.config
        probs = F.linear(hidden, self.weight).softmax(dim=-1, dtype=torch.float32)  # (B, T, E)
        top_probs, top_ids = probs.topk(config.num_experts_per_tok, dim=-1, sorted=False)
        if config.norm_topk_prob and (config.num_experts_per_tok > 1 or config.generation > 2):
            top_probs = top_probs / (top_probs.sum(dim=-1, keepdim=True) + 1e-20)
        if not (self.training and config.aux_loss_alpha > 0):
            return top_ids, top_probs, probs.new_zeros(())
        slots = F.one_hot(top_ids, probs.shape[-1]).sum(2)  # (B, T, E)
        if packing is not None:
            slots, probs = packing.unpack(slots), packing.unpack(probs)
        if token_mask is None:
            token_mask = probs.new_ones(probs.shape[:2])
        token_mask = token_mask.to(probs.dtype).unsqueeze(-1)  # (B, T, 1)
        slots, probs = slots * token_mask, probs * token_mask
        if config.seq_aux:
            balance = config.aux_loss_alpha * _imbalance(slots, probs, token_mask)
        else:
            slots = slots * (config.slots_per_token / config.num_experts_per_tok)
            balance = torch.stack((slots.sum((0, 1)), probs.sum((0, 1))))
        return top_ids, top_probs, balance


def _imbalance(slots: Tensor, probs: Tensor, token_mask: Tensor) -> Tensor:
    """E * sum_i f_i * P_i, averaged over sequences: 1 when the experts are evenly used.

    f_i is the fraction of routed slots that go to expert i, P_i the mean router probability
    of expert i. Padding is left out of both; a sequence that is all padding adds 0.
    Source: Fedus et al., "Switch Transformers" (2021), per sequence as in DeepSeek-V2 (2024).

    Args:
        slots, probs: (B, T, E), 0 at padding. token_mask: (B, T, 1).
    """
    num_tokens = token_mask.sum(1)  # (B, 1)
    fraction = slots.sum(1) / slots.sum((1, 2))[:, None].clamp(min=1)
    mean_prob = probs.sum(1) / num_tokens.clamp(min=1)
    per_sequence = probs.shape[-1] * (fraction * mean_prob).sum(-1)  # (B,)
    return per_sequence.sum() / (num_tokens > 0).sum().clamp(min=1)


def balance_loss(slots: Tensor, prob_sums: Tensor, *, num_tokens: int | Tensor) -> Tensor:
    """The load-balance loss over all tokens of a step, summed over layers, without its factor.

    E * sum_i f_i * P_i of a layer, with f_i the routed slots per token that go to expert i, and
    P_i its mean router probability. The tokens may come in parts: f_i is of all of them, and the
    losses of the parts' `prob_sums` add up to the loss.

    Args:
        slots: (L, E), how often all tokens were routed to each expert.
        prob_sums: (L, E), router probabilities summed over the tokens, or over a part of them.
        num_tokens: of all parts, without padding.
    Source: Fedus et al., "Switch Transformers" (2021).
    """
    share = slots.detach() / num_tokens
    return slots.shape[-1] * (share * prob_sums / num_tokens).sum()


class MoEFeedForward(nn.Module):
    """Top-k routed experts plus shared experts that every token passes."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        width = config.moe_intermediate_size
        self.experts = nn.ModuleList(
            FeedForward(config, width) for _ in range(config.n_routed_experts)
        )
        self.gate = MoEGate(config)
        self.act = ACT2FN[config.hidden_act]
        self.shared_experts = nn.ModuleList(
            FeedForward(config, width) for _ in range(config.n_shared_experts)
        )
        self.dropout = config.dropout

    def forward(
        self, hidden: Tensor, token_mask: Tensor | None, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        top_ids, top_probs, balance = self.gate(hidden, token_mask, packing)
        if self._runs_chosen(hidden):
            mixed = self._chosen(
                hidden.flatten(0, 1), top_ids.flatten(0, 1), top_probs.flatten(0, 1)
            )
            return self._with_shared(mixed.view_as(hidden), hidden, token_mask), balance
        device_type, dtype = hidden.device.type, hidden.dtype
        # Not every product of stacked matrices is an autocast operation: cast them here.
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        names = ("gate_proj", "up_proj", "down_proj")
        stacked = [  # 3 x (E, in, out)
            torch.stack([getattr(e, name).weight for e in self.experts]).to(dtype).mT
            for name in names
        ]
        is_grouped = has_grouped_mm(hidden.device, dtype, tuple(stacked[0].shape[1:]))
        run_experts = self._grouped if is_grouped else self._every_expert
        tokens = hidden.flatten(0, 1).to(dtype)
        probs = top_probs.flatten(0, 1).to(dtype)
        mixed = run_experts(tokens, top_ids.flatten(0, 1), probs, stacked)
        mixed = F.dropout(mixed, self.dropout, self.training).view_as(hidden)
        return self._with_shared(mixed, hidden, token_mask), balance

    def _with_shared(self, mixed: Tensor, hidden: Tensor, token_mask: Tensor | None) -> Tensor:
        for expert in self.shared_experts:
            mixed = mixed + expert(hidden, token_mask)[0]
        return mixed

    def _runs_chosen(self, hidden: Tensor) -> bool:
        """Whether experts are run one by one: for few tokens on a CPU, where stacking the weights
        takes longer than all else, and where there are no weights to stack."""
        is_inference = not self.training and not torch.is_grad_enabled()
        is_few = hidden.is_cpu and is_inference and hidden[..., 0].numel() <= FEW
        return is_few or self.experts[0].fused is not None

    def _chosen(self, tokens: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
        """Each expert that is chosen, on its own tokens.

        Args:
            tokens: (B * T, D). ids, probs: (B * T, k).
        """
        mixed = torch.zeros_like(tokens)
        for number in ids.unique().tolist():
            rows, choice = (ids == number).nonzero(as_tuple=True)
            outputs = self.experts[number](tokens[rows], None)[0]
            mixed[rows] += outputs * probs[rows, choice, None].to(outputs.dtype)
        return mixed

    def _grouped(self, tokens: Tensor, ids: Tensor, probs: Tensor, stacked: list[Tensor]) -> Tensor:
        """Sort the routed rows by expert, then multiply each group by its expert's matrices.

        The group sizes stay on the device, so there is no host sync. Rows are first repeated, then
        permuted: both have a deterministic gradient, unlike a gather with repeated indices.

        Args:
            tokens: (B * T, D). ids, probs: (B * T, k). stacked: 3 x (E, in, out).
        """
        num_choices = ids.shape[1]
        order = ids.flatten().argsort(stable=True)
        counts = F.one_hot(ids.flatten(), len(self.experts)).sum(0)
        ends = counts.cumsum(0).to(torch.int32)  # (E,) where each expert's rows end
        rows = tokens[:, None].expand(-1, num_choices, -1).flatten(0, 1)[order]  # (S, D)
        # An expert without rows is detached: the backward kernels would leave its gradient
        # uninitialised, possibly NaN (PyTorch issue 172439).
        has_rows = (counts > 0)[:, None, None]
        gate, up, down = (torch.where(has_rows, w, w.detach()) for w in stacked)
        inner = self.act(F.grouped_mm(rows, gate, offs=ends))
        rows = F.grouped_mm(inner * F.grouped_mm(rows, up, offs=ends), down, offs=ends)
        rows = rows[order.argsort()] * probs.flatten()[:, None]
        return rows.view(-1, num_choices, rows.shape[-1]).sum(1)

    def _every_expert(
        self, tokens: Tensor, ids: Tensor, probs: Tensor, stacked: list[Tensor]
    ) -> Tensor:
        """All experts on all tokens, for devices without grouped products: E / k times the work."""
        all_probs = tokens.new_zeros(len(tokens), len(self.experts)).scatter(1, ids, probs)
        gate, up, down = stacked
        inner = self.act(tokens @ gate) * (tokens @ up)  # (E, B * T, F)
        weighted: Tensor = all_probs.T[..., None] * (inner @ down)  # (E, B * T, D)
        return weighted.sum(0)
