"""Owns the MiniMind language model: config, decoder, causal LM.

Shapes: B batch, T tokens, N selected positions, D hidden, K head dim, V vocabulary, L layers,
E experts.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.attention import Attention, RMSNorm, rope_tables, select_positions
from model.cache_name import CACHE_NAME, takes_past_key_values
from model.feed_forward import FeedForward, MoEFeedForward, MoEGate, balance_loss
from model.generations import DEFAULT_GENERATION, GENERATIONS
from model.packing import Packing

YARN_ORIGINAL_POSITIONS = 2048  # of pretraining
IGNORE_INDEX = -100  # label of a position that is not supervised


def of_generation() -> Any:
    """Default of a config field that follows from the generation."""
    return None


class MiniMindConfig(PreTrainedConfig):
    """Sizes and options of the language model; the defaults are those of the generation.

    Args:
        generation: 2 or 3, see `model.generations`; it decides the defaults of the other fields.
        head_dim: K; None means `hidden_size / num_attention_heads`.
        intermediate_size: F; None means the generation's multiple of `hidden_size`.
        initializer_range: standard deviation of new weights; None means that of `nn.Linear`,
            `(3 * hidden_size) ** -0.5`: a fixed value would be too small for narrow models.
        inference_rope_scaling: YaRN by the generation's factor over 2048 positions.
        use_moe: experts instead of one MLP; the fields below it are ignored otherwise.
        n_routed_experts, aux_loss_alpha: also `num_experts` and `router_aux_loss_coef`.
        moe_intermediate_size: width of an expert; None means `intermediate_size`.
        seq_aux: balance experts within each sequence (True) or over the whole step.
    Raises:
        ValueError: sizes that do not divide, an unknown generation or `scoring_func`.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["cache"]
    attribute_map = {"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"}

    generation: int = DEFAULT_GENERATION
    hidden_size: int = of_generation()
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = of_generation()
    head_dim: int = of_generation()
    intermediate_size: int = of_generation()
    hidden_act: str = "silu"
    vocab_size: int = 6400
    max_position_embeddings: int = 32768
    rms_norm_eps: float = of_generation()
    rope_theta: float = 1e6
    rope_parameters: dict[str, Any] | None = None
    inference_rope_scaling: bool = False
    dropout: float = 0.0
    initializer_range: float = of_generation()
    use_moe: bool = False
    n_routed_experts: int = 4
    num_experts_per_tok: int = of_generation()
    n_shared_experts: int = of_generation()
    moe_intermediate_size: int = of_generation()
    scoring_func: str = "softmax"
    aux_loss_alpha: float = of_generation()
    seq_aux: bool = of_generation()
    norm_topk_prob: bool = True
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    tie_word_embeddings: bool = True
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.generation not in GENERATIONS:
            known = " and ".join(map(str, GENERATIONS))
            raise ValueError(f"generation {self.generation} is unknown; there are {known}")
        for alias in self.attribute_map.keys() & kwargs.keys():
            setattr(self, alias, kwargs.pop(alias))
        generation = GENERATIONS[self.generation]
        for name, value in generation.config.items():
            if getattr(self, name, value) is None:
                setattr(self, name, value)
        self._check_sizes()
        hidden = self.hidden_size
        self.head_dim = self.head_dim or hidden // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or generation.intermediate_size(hidden)
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        self.initializer_range = self.initializer_range or (3 * hidden) ** -0.5
        self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.inference_rope_scaling:
            self.rope_parameters |= {
                "rope_type": "yarn",
                "factor": generation.yarn_factor,
                "original_max_position_embeddings": YARN_ORIGINAL_POSITIONS,
                "attention_factor": 1.0,
            }
        super().__post_init__(**kwargs)

    @property
    def slots_per_token(self) -> int:
        """What a token counts in the load-balance loss over a whole step: generation 2 takes the
        mean over its experts, generation 3 their sum."""
        return 1 if self.generation == 2 else self.num_experts_per_tok

    def _check_sizes(self) -> None:
        def must_divide(name: str, multiple_of: int) -> None:
            if getattr(self, name) % multiple_of:
                raise ValueError(f"{name} {getattr(self, name)} is no multiple of {multiple_of}")

        must_divide("num_attention_heads", self.num_key_value_heads)
        if self.head_dim is not None:
            must_divide("head_dim", 2)  # RoPE rotates halves of a head
        else:
            must_divide("hidden_size", 2 * self.num_attention_heads)
        if self.use_moe and self.scoring_func != "softmax":
            raise ValueError(f"scoring_func {self.scoring_func!r} is unknown; only 'softmax' is")
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError("num_experts_per_tok must be between 1 and n_routed_experts")


@dataclass
class MiniMindOutput(CausalLMOutputWithPast):
    """`loss` is the mean cross entropy per supervised token, without `aux_loss`, the MoE
    load-balance loss (a scalar tensor, zero for a dense model or outside training).

    `expert_use` (L, 2, E) is what the load-balance loss of a whole step is made of, if it is one
    over all tokens: routed slots, and sums of router probabilities (see `balance_loss`)."""

    aux_loss: Tensor | None = None
    expert_use: Tensor | None = None


class DecoderLayer(GradientCheckpointingLayer):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        width = config.intermediate_size
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config, width)

    def forward(
        self,
        hidden: Tensor,  # (B, T, D)
        *,
        rope: tuple[Tensor, Tensor],  # 2 x (B, T, K/2)
        attention_mask: Tensor | None,
        cache: Cache | None,
        token_mask: Tensor | None,  # (B, T)
        output_positions: Tensor | None = None,  # (N,) into the flattened (B, T); None: all
        packing: Packing | None = None,  # hidden is a row of packed samples, (1, N, D)
    ) -> tuple[Tensor, Tensor]:
        """Returns hidden states (B, T, D), or (N, D) at `output_positions`, and the balance of the
        experts (see `MoEGate`).

        Attention is computed at every position. A dense layer computes what follows it at
        `output_positions` only. An MoE layer selects them last: its load-balance loss needs the
        routing of every token of a sequence.
        """
        is_moe = isinstance(self.mlp, MoEFeedForward)
        before_mlp, after_mlp = (None, output_positions) if is_moe else (output_positions, None)
        normed = self.input_layernorm(hidden)
        mixed = self.self_attn(normed, rope, attention_mask, cache, before_mlp, packing)
        hidden = select_positions(hidden, before_mlp) + mixed
        mixed, balance = self.mlp(self.post_attention_layernorm(hidden), token_mask, packing)
        return select_positions(hidden + mixed, after_mlp), balance


class MiniMindPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every MiniMind model."""

    config: MiniMindConfig
    config_class: type[PreTrainedConfig] = MiniMindConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoEGate):
            init.normal_(module.weight, std=self.config.initializer_range)


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config)
        self.post_init()

    def forward(
        self,
        inputs_embeds: Tensor,  # (B, T, D)
        *,
        attention_mask: Tensor | None = None,  # (B, past + T)
        position_ids: Tensor | None = None,  # (B, T)
        cache: Cache | None = None,
        is_right_padded: bool = False,
        output_positions: Tensor | None = None,  # (N,) into the flattened (B, T); None: all
        packed_positions: Tensor | None = None,  # (N,) into the flattened (B, T)
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns hidden states (B, T, D) or (N, D), and each layer's balance (see `MoEGate`).

        With `packed_positions` the states are those of the row that they make, (1, N, D).
        """
        num_tokens = inputs_embeds.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        is_2d = attention_mask is not None and attention_mask.ndim == 2
        padding_mask = attention_mask if is_2d else None  # (B, past + T)
        token_mask = None if padding_mask is None else padding_mask[:, -num_tokens:]
        if position_ids is None and padding_mask is not None and not is_right_padded:
            position_ids = (padding_mask.cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + num_tokens, device=inputs_embeds.device)[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            # Causality alone hides padding after the text; without a mask the fast kernel runs.
            attention_mask=None if is_right_padded or inputs_embeds.is_meta else attention_mask,
            position_ids=None,
            **{CACHE_NAME: cache},
        )
        packing = None
        if packed_positions is not None:
            packing = Packing(packed_positions, *inputs_embeds.shape[:2])
            inputs_embeds, position_ids = packing.pack(inputs_embeds), packing.position_ids
            output_positions = (
                None if output_positions is None else packing.within(output_positions)
            )
        cos, sin = rope_tables(self.config, position_ids)
        rope = (cos.to(inputs_embeds.dtype), sin.to(inputs_embeds.dtype))
        hidden = F.dropout(inputs_embeds, self.config.dropout, self.training)
        balances = []
        for layer in self.layers:
            hidden, balance = layer(
                hidden,
                rope=rope,
                attention_mask=causal_mask,
                cache=cache,
                token_mask=token_mask,
                output_positions=output_positions if layer is self.layers[-1] else None,
                packing=packing,
            )
            balances.append(balance)
        return self.norm(hidden), balances


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The language model with its head, tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_past_key_values
    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, past + T), 1 for text and 0 for padding
        *,
        inputs_embeds: Tensor | None = None,  # (B, T, D) instead of input_ids
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,  # (B, T) like input_ids, -100 where not supervised
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        target_positions: Tensor | None = None,  # (N,) into the flattened (B, T)
        is_right_padded: bool = False,
        packed_positions: Tensor | None = None,  # (N,) into the flattened (B, T)
        **_: Any,
    ) -> MiniMindOutput:
        """Logits of the next token at each position, and with `labels` the loss.

        Args:
            logits_to_keep: how many of the last positions get logits (0: all), or their indices.
            target_positions: where the next token is supervised: logits (N, V) there only.
            is_right_padded: every row is padded on the right, as training batches are, so that
                attention needs no mask but the causal one.
            packed_positions: of all text, ascending, in a batch that is right-padded: the layers
                compute these alone, as one row (see `model.packing`). Needs `target_positions`.
        Returns:
            See `MiniMindOutput`; `logits` are (B, T, V), or (N, V).
        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; labels together
                with `logits_to_keep`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of every position: leave logits_to_keep at 0")
        if packed_positions is not None:
            assert is_right_padded and target_positions is not None, "see packed_positions"
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        hidden, balances = self.model(
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            is_right_padded=is_right_padded,
            output_positions=target_positions,
            packed_positions=packed_positions,
        )
        aux_loss, expert_use = self._balance(balances)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep] if target_positions is None else hidden)
        return MiniMindOutput(
            loss=None if labels is None else next_token_loss(logits, labels, target_positions),
            logits=logits,
            aux_loss=aux_loss,
            expert_use=expert_use,
            **cast(dict[str, Any], {CACHE_NAME: cache}),
        )

    def _balance(self, balances: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The aux loss of this batch, and the `expert_use` it was made of, if it was."""
        if balances[0].ndim == 0:
            total = balances[0].new_zeros((), dtype=torch.float32)
            for balance in balances:
                total = total + balance
            return total, None
        use = torch.stack(balances)  # (L, 2, E)
        num_tokens = (use[0, 0].sum() / self.config.slots_per_token).clamp(min=1)
        loss = balance_loss(use[:, 0], use[:, 1], num_tokens=num_tokens)
        return self.config.aux_loss_alpha * loss, use


def next_token_loss(logits: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
    """Mean cross entropy of the supervised tokens, each predicted from those before it; float32.

    Args:
        logits: (B, T, V), or (N, V) at `positions`. labels: (B, T) aligned with the inputs.
    Returns:
        A scalar; 0, not NaN, when nothing is supervised.
    """
    # Shift the labels, not the logits: these are large, and a shifted slice would be copied.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    targets = targets if positions is None else targets[positions]
    logits = logits.flatten(0, -2).float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)
