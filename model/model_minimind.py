"""Owns the MiniMind language model: config, RMSNorm, attention, decoder, causal LM.

Shapes: B batch, T tokens, D hidden, H query heads, K head dim, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.deprecation import deprecate_kwarg

from model.feed_forward import FeedForward, MoEFeedForward, MoEGate
from model.rope import apply_rope, rope_tables

YARN_FACTOR = 4.0  # `inference_rope_scaling`: four times the 2048 positions of pretraining
YARN_ORIGINAL_POSITIONS = 2048
IGNORE_INDEX = -100  # label of a position that is not supervised

ForwardT = TypeVar("ForwardT", bound=Callable[..., Any])


class MiniMindConfig(PreTrainedConfig):
    """Sizes and options of the language model; the defaults are the 26M model.

    Args:
        intermediate_size: F; None means `64 * ceil(int(hidden_size * 8 / 3) / 64)`.
        initializer_range: standard deviation of new weights; None means that of `nn.Linear`,
            `(3 * hidden_size) ** -0.5`: a fixed value would be too small for narrow models.
        inference_rope_scaling: YaRN by a factor of 4 over 2048 positions.
        use_moe: experts instead of one MLP; the fields below it are ignored otherwise.
        seq_aux: balance experts within each sequence (True) or over the whole batch.
    Raises:
        ValueError: sizes that do not divide, or an unknown `scoring_func`.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["cache"]

    def __init__(
        self,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 2,
        intermediate_size: int | None = None,
        hidden_act: str = "silu",
        vocab_size: int = 6400,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 1e6,
        inference_rope_scaling: bool = False,
        dropout: float = 0.0,
        initializer_range: float | None = None,
        use_moe: bool = False,
        n_routed_experts: int = 4,
        num_experts_per_tok: int = 2,
        n_shared_experts: int = 1,
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.01,
        seq_aux: bool = True,
        norm_topk_prob: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or 64 * math.ceil(int(hidden_size * 8 / 3) / 64)
        self.hidden_act = hidden_act
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.inference_rope_scaling = inference_rope_scaling
        self.dropout = dropout
        self.initializer_range = initializer_range or (3 * hidden_size) ** -0.5
        self.use_moe = use_moe
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_shared_experts = n_shared_experts
        self.scoring_func = scoring_func
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.norm_topk_prob = norm_topk_prob
        self.use_cache = use_cache
        for derived in ("head_dim", "rope_parameters"):  # follow from the fields above
            kwargs.pop(derived, None)
        self.rope_parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope_theta}
        if inference_rope_scaling:
            self.rope_parameters |= {
                "rope_type": "yarn",
                "factor": YARN_FACTOR,
                "original_max_position_embeddings": YARN_ORIGINAL_POSITIONS,
                "attention_factor": 1.0,
            }
        self._check_sizes()
        super().__init__(  # type: ignore[call-arg]  # it takes these four through **kwargs
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check_sizes(self) -> None:
        def must_divide(name: str, multiple_of: int) -> None:
            if getattr(self, name) % multiple_of:
                raise ValueError(f"{name} {getattr(self, name)} is no multiple of {multiple_of}")

        must_divide("num_attention_heads", self.num_key_value_heads)
        must_divide("hidden_size", 2 * self.num_attention_heads)  # RoPE rotates halves of a head
        if self.use_moe and self.scoring_func != "softmax":
            raise ValueError(f"scoring_func {self.scoring_func!r} is unknown; only 'softmax' is")
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError("num_experts_per_tok must be between 1 and n_routed_experts")


@dataclass
class MiniMindOutput(CausalLMOutputWithPast):
    """`loss` is the mean cross entropy per supervised token, without `aux_loss`, the MoE
    load-balance loss (a scalar tensor, zero for a dense model or outside training)."""

    aux_loss: Tensor | None = None


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, rms in float32. Source: Zhang and Sennrich, "RMSNorm" (2019)."""

    def __init__(self, dim: int, *, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


def select_positions(states: Tensor, positions: Tensor | None) -> Tensor:
    """(B, T, D) to (N, D): the rows at positions (N,) of the flattened (B, T); None selects all."""
    return states if positions is None else states.flatten(0, 1).index_select(0, positions)


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE.

    Source: Ainslie et al., "GQA" (2023).
    """

    is_causal = True

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden: Tensor,  # (B, T, D)
        rope: tuple[Tensor, Tensor],  # 2 x (B, T, K/2)
        attention_mask: Tensor | None,
        cache: Cache | None,
        output_positions: Tensor | None = None,  # (N,) into the flattened (B, T); None: all
    ) -> Tensor:  # (B, T, D), or (N, D)
        def heads(projected: Tensor) -> Tensor:  # (B, T, H * K) -> (B, H, T, K)
            return projected.view(*projected.shape[:2], -1, self.head_dim).transpose(1, 2)

        query, key = heads(self.q_proj(hidden)), heads(self.k_proj(hidden))
        value = heads(self.v_proj(hidden))
        query = apply_rope(query, *rope).to(value.dtype)
        key = apply_rope(key, *rope).to(value.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.dropout if self.training else 0.0
        mixed, _ = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout
        )
        mixed = mixed.reshape(*hidden.shape[:2], -1)  # (B, T, H * K)
        mixed = self.o_proj(select_positions(mixed, output_positions))
        return F.dropout(mixed, self.config.dropout, self.training)


class DecoderLayer(GradientCheckpointingLayer):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)

    def forward(
        self,
        hidden: Tensor,  # (B, T, D)
        *,
        rope: tuple[Tensor, Tensor],  # 2 x (B, T, K/2)
        attention_mask: Tensor | None,
        cache: Cache | None,
        token_mask: Tensor | None,  # (B, T)
        output_positions: Tensor | None = None,  # (N,) into the flattened (B, T); None: all
    ) -> tuple[Tensor, Tensor]:
        """Returns hidden states (B, T, D), or (N, D) at `output_positions`, and the aux loss.

        Attention is computed at every position. A dense layer computes what follows it at
        `output_positions` only. An MoE layer selects them last: its load-balance loss needs the
        routing of every token of a sequence.
        """
        is_moe = isinstance(self.mlp, MoEFeedForward)
        before_mlp, after_mlp = (None, output_positions) if is_moe else (output_positions, None)
        normed = self.input_layernorm(hidden)
        mixed = self.self_attn(normed, rope, attention_mask, cache, before_mlp)
        hidden = select_positions(hidden, before_mlp) + mixed
        mixed, aux_loss = self.mlp(self.post_attention_layernorm(hidden), token_mask)
        return select_positions(hidden + mixed, after_mlp), aux_loss


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
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
    ) -> tuple[Tensor, Tensor]:
        """Returns hidden states (B, T, D) or (N, D), and the aux loss summed over layers."""
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
            cache=cache,
            position_ids=None,
        )
        cos, sin = rope_tables(self.config, position_ids)
        rope = (cos.to(inputs_embeds.dtype), sin.to(inputs_embeds.dtype))
        hidden = F.dropout(inputs_embeds, self.config.dropout, self.training)
        aux_loss = inputs_embeds.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            hidden, layer_aux_loss = layer(
                hidden,
                rope=rope,
                attention_mask=causal_mask,
                cache=cache,
                token_mask=token_mask,
                output_positions=output_positions if layer is self.layers[-1] else None,
            )
            aux_loss = aux_loss + layer_aux_loss
        return self.norm(hidden), aux_loss


def takes_past_key_values(forward: ForwardT) -> ForwardT:
    """`cache` may also be given by the name it had before transformers 5.24, with a warning."""
    return cast(ForwardT, deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward))


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
        **_: Any,
    ) -> MiniMindOutput:
        """Logits of the next token at each position, and with `labels` the loss.

        Args:
            logits_to_keep: how many of the last positions get logits (0: all), or their indices.
            target_positions: where the next token is supervised: logits (N, V) there only.
            is_right_padded: every row is padded on the right, as training batches are, so that
                attention needs no mask but the causal one.
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
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        hidden, aux_loss = self.model(
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            is_right_padded=is_right_padded,
            output_positions=target_positions,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep] if target_positions is None else hidden)
        return MiniMindOutput(
            loss=None if labels is None else next_token_loss(logits, labels, target_positions),
            logits=logits,
            cache=cache,
            aux_loss=aux_loss,
        )


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
