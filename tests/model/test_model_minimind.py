"""If this fails, the language model computes wrong values in attention, RoPE, experts or losses."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny_parts import TINY_MODEL
from transformers import LlamaConfig, LlamaForCausalLM

from dataset.collate import target_positions
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

torch.set_num_threads(1)  # at these sizes more threads only wait for each other
VOCAB = 120
TOLERANCE = 1e-5  # float32, logits of the order of 1
ALPHA = 0.01
KINDS = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def make_model(use_moe: bool = False, **fields) -> MiniMindForCausalLM:
    """Weights wide enough (0.3) that attention and routing matter to the logits."""
    torch.manual_seed(0)
    fields = {"vocab_size": VOCAB, "initializer_range": 0.3} | TINY_MODEL | fields
    return MiniMindForCausalLM(MiniMindConfig(use_moe=use_moe, **fields)).eval()


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def pad_rows(rows: list[torch.Tensor], *, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one batch and its attention mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask.long()


def rows_of_lengths(*lengths: int) -> list[torch.Tensor]:
    return [random_ids(length, seed=length) for length in lengths]


LLAMA_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def llama_of(model: MiniMindForCausalLM, rope: dict) -> LlamaForCausalLM:
    """transformers' Llama with the same weights: the dense model is one, under other names."""
    fields = {k: v for k, v in model.config.to_dict().items() if k in LLAMA_FIELDS}
    llama = LlamaForCausalLM(LlamaConfig(**fields, rope_parameters=rope)).eval()
    llama.load_state_dict(model.state_dict())
    return llama


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
    "attention_factor": 1.0,
}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "yarn"])
@torch.no_grad()
def test_rope_equals_transformers(scaled):
    fields = {"hidden_size": 128, "initializer_range": 0.1}
    model = make_model(inference_rope_scaling=scaled, **fields)
    ids = random_ids(2, 24)
    positions = torch.arange(24)[None] * 150  # up to 3450, beyond the 2048 of pretraining
    rope = YARN if scaled else {"rope_type": "default", "rope_theta": 1e6}
    expected = llama_of(model, rope)(ids, position_ids=positions).logits
    logits = model(ids, position_ids=positions).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    other = make_model(inference_rope_scaling=not scaled, **fields)
    assert (other(ids, position_ids=positions).logits - expected).abs().max() > 1e-2


@KINDS
@ATTENTION
@torch.no_grad()
def test_attention_left_padding_changes_nothing(use_moe, attention):
    model = make_model(use_moe)
    model.set_attn_implementation(attention)
    rows = rows_of_lengths(5, 9, 12)
    ids, mask = pad_rows(rows, side="left")
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, padded in zip(rows, logits, strict=True):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(padded[-len(row) :], alone, atol=TOLERANCE, rtol=0)


def test_attention_left_padding_gradient_is_finite():
    model = make_model().train()
    ids, mask = pad_rows(rows_of_lengths(2, 12), side="left")
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@KINDS
@ATTENTION
@torch.no_grad()
def test_attention_chunked_prefill_equals_one_forward(use_moe, attention):
    model = make_model(use_moe)
    model.set_attn_implementation(attention)
    ids, mask = pad_rows(rows_of_lengths(7, 13), side="left")
    whole = model(ids, attention_mask=mask).logits
    cache, parts = None, []
    for start, end in ((0, 6), (6, 10), (10, 11), (11, 13)):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache)
        cache = output.cache
        parts.append(output.logits)
    chunked = torch.cat(parts, 1)
    real = mask.bool()
    torch.testing.assert_close(chunked[real], whole[real], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_cache_may_be_given_by_its_older_name():
    model = make_model()
    ids, _ = pad_rows(rows_of_lengths(9), side="left")
    whole = model(ids).logits[:, -1]
    cache = model(ids[:, :-1]).cache
    with pytest.warns(FutureWarning, match="Use `cache`"):
        last = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, whole, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_attention_is_causal():
    model = make_model()
    ids = random_ids(1, 10)
    changed = ids.clone()
    changed[0, 6] = 3 + (ids[0, 6] - 2) % (VOCAB - 3)
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :6], before[:, :6], atol=TOLERANCE, rtol=0)
    assert (after[:, 6:] - before[:, 6:]).abs().amax(-1).min() > 1e-3


@KINDS
def test_attention_right_padded_fast_path_equals_masked_path(use_moe):
    ids, mask = pad_rows(rows_of_lengths(5, 12, 8), side="right")
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for fast in (False, True):
        model = make_model(use_moe).train()
        output = model(ids, attention_mask=mask, labels=labels, is_right_padded=fast)
        (output.loss + output.aux_loss).backward()
        results.append((output, [p.grad for p in model.parameters()]))
    (masked, masked_grads), (fast, fast_grads) = results
    real = mask.bool()
    torch.testing.assert_close(fast.logits[real], masked.logits[real], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(fast.aux_loss, masked.aux_loss, atol=1e-7, rtol=0)
    torch.testing.assert_close(fast_grads, masked_grads, atol=TOLERANCE, rtol=0)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_model_half_precision_is_finite_and_near_float32(use_moe, dtype):
    model = make_model(use_moe, initializer_range=0.1)
    ids, mask = pad_rows(rows_of_lengths(4, 11), side="left")
    expected = model(ids, attention_mask=mask).logits
    logits = model.to(dtype)(ids, attention_mask=mask).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    error = (logits.float() - expected)[mask.bool()].abs().mean() / expected.std()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.003)


@KINDS
@torch.no_grad()
def test_model_autocast_is_finite_and_near_float32(use_moe):
    model = make_model(use_moe, initializer_range=0.1)
    ids = random_ids(2, 9)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    assert (logits.float() - expected).abs().mean() / expected.std() < 0.05


@KINDS
def test_model_gradient_checkpointing_gives_the_same_gradients(use_moe):
    ids, mask = pad_rows(rows_of_lengths(5, 9), side="right")
    grads, calls = [], []
    for checkpointing in (False, True):
        model = make_model(use_moe).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        count = []
        model.model.layers[0].self_attn.q_proj.register_forward_hook(
            lambda *_, c=count: c.append(1)
        )
        output = model(ids, attention_mask=mask, labels=ids)
        (output.loss + output.aux_loss).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        calls.append(len(count))
    assert calls == [1, 2]  # the second one really recomputes
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=0)


@KINDS
@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
def test_model_meta_forward_has_the_right_shape(use_moe, masked):
    with torch.device("meta"):
        model = make_model(use_moe)
        ids = torch.zeros(2, 7, dtype=torch.int64)
        output = model(ids, attention_mask=torch.ones_like(ids) if masked else None, labels=ids)
    assert output.logits.shape == (2, 7, VOCAB) and output.loss.is_meta


@KINDS
def test_model_state_dict_names_are_the_contract(use_moe):
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    mlps = ["mlp"]
    if use_moe:
        mlps = [f"mlp.experts.{e}" for e in range(4)] + ["mlp.shared_experts.0"]
    for layer in range(TINY_MODEL["num_hidden_layers"]):
        parts = [f"self_attn.{p}_proj" for p in "qkvo"]
        parts += ["input_layernorm", "post_attention_layernorm"] + ["mlp.gate"] * use_moe
        parts += [f"{mlp}.{p}_proj" for mlp in mlps for p in ("gate", "up", "down")]
        names |= {f"model.layers.{layer}.{part}.weight" for part in parts}
    model = make_model(use_moe)
    assert model.state_dict().keys() == names
    assert model.lm_head.weight is model.model.embed_tokens.weight


def naive_moe(mlp, hidden: torch.Tensor) -> torch.Tensor:
    """Token by token, as the contract words it."""
    mixed = torch.zeros_like(hidden)
    for b, t in torch.cartesian_prod(*map(torch.arange, hidden.shape[:2])).tolist():
        token = hidden[b, t]
        probs = torch.softmax(mlp.gate.weight @ token, 0)
        best = sorted(range(len(probs)), key=lambda e: -probs[e])[:2]
        total = sum(probs[e] for e in best) + 1e-20
        chosen = [(probs[e] / total, mlp.experts[e]) for e in best] + [(1, mlp.shared_experts[0])]
        for weight, expert in chosen:
            inner = F.silu(expert.gate_proj(token)) * expert.up_proj(token)
            mixed[b, t] += weight * expert.down_proj(inner)
    return mixed


@pytest.mark.parametrize("is_grouped", [True, False])
@pytest.mark.parametrize("shape", [(2, 9), (1, 1)])  # one token leaves two experts without any
@torch.no_grad()
def test_moe_equals_a_naive_loop(shape, is_grouped, monkeypatch):
    monkeypatch.setattr("model.feed_forward.has_grouped_mm", lambda *_: is_grouped)
    model, seen = make_model(use_moe=True), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda mlp, args, out: seen.append((mlp, args[0], out)))
    model(random_ids(*shape))
    assert len(seen) == TINY_MODEL["num_hidden_layers"]
    for mlp, hidden, output in seen:
        output = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(output, naive_moe(mlp, hidden), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_routes_give_the_same_gradients(dtype, monkeypatch):
    gradients = []
    for is_grouped in (True, False):
        monkeypatch.setattr("model.feed_forward.has_grouped_mm", lambda *_, g=is_grouped: g)
        model = make_model(use_moe=True).train()
        ids = random_ids(2, 9)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            output = model(ids, labels=ids)
        (output.loss + output.aux_loss).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, grouped in gradients[0].items():
        torch.testing.assert_close(grouped, gradients[1][name], atol=tolerance, rtol=tolerance)


def test_aux_loss_is_a_zero_tensor_when_dense_or_evaluating():
    ids = random_ids(2, 6)
    for model in (make_model(), make_model().train(), make_model(use_moe=True)):
        aux_loss = model(ids).aux_loss
        assert isinstance(aux_loss, torch.Tensor) and aux_loss.shape == () and aux_loss == 0


def test_aux_loss_of_uniform_routing_is_alpha_per_layer():
    model = make_model(use_moe=True).train()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    expected = ALPHA * TINY_MODEL["num_hidden_layers"]
    assert model(random_ids(2, 6)).aux_loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_aux_loss_padding_does_not_count(side):
    model = make_model(use_moe=True).train()
    rows = rows_of_lengths(3, 12, 8)
    alone = torch.stack([model(row[None]).aux_loss for row in rows])
    ids, mask = pad_rows(rows, side=side)
    padded = model(ids, attention_mask=mask).aux_loss
    torch.testing.assert_close(padded, alone.mean(), atol=1e-6, rtol=0)
    assert alone.std() > 1e-4  # so that another weighting would show
    assert (model(ids).aux_loss - padded).abs() > 1e-5


def test_loss_is_the_mean_over_supervised_tokens():
    model = make_model()
    ids = random_ids(2, 8)
    labels = ids.clone()
    labels[0, :5] = labels[1, :2] = -100
    output = model(ids, labels=labels)
    log_probs = output.logits.log_softmax(-1)
    targets = [(b, t) for b, first in ((0, 5), (1, 2)) for t in range(first, 8)]
    expected = -torch.stack([log_probs[b, t - 1, ids[b, t]] for b, t in targets]).mean()
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=0)


def test_loss_without_labels_to_learn_is_zero_and_gives_zero_gradient():
    model = make_model().train()
    ids = random_ids(2, 5)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@torch.no_grad()
def test_logits_to_keep_are_the_last_positions():
    model, ids = make_model(), random_ids(2, 8)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    some = torch.tensor([0, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=some).logits, whole[:, some])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=1)


@KINDS
@torch.no_grad()
def test_model_save_pretrained_round_trip(tmp_path, use_moe):
    model = make_model(use_moe, inference_rope_scaling=True, rope_theta=1e4)
    model.save_pretrained(tmp_path)
    loaded, report = MiniMindForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.inference_rope_scaling and loaded.config.rope_theta == 1e4
    ids = random_ids(1, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@KINDS
def test_logits_at_targets_alone_give_the_same_loss_and_gradient(use_moe):
    ids = random_ids(3, 12)
    labels = ids.masked_fill(random_ids(3, 12, seed=2) % 3 > 0, -100)
    labels[1] = -100  # a row without any target
    losses, gradients = [], []
    for positions in (None, target_positions(labels)):
        model = make_model(use_moe).train()
        output = model(ids, labels=labels, target_positions=positions)
        output.loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        losses.append(output.loss)
    assert len(output.logits) == len(target_positions(labels)) < ids.numel()
    torch.testing.assert_close(*losses)
    for every, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(every, alone)


def test_no_target_at_all_is_a_loss_of_zero_with_a_gradient():
    model, labels = make_model(), torch.full((2, 5), -100)
    loss = model(random_ids(2, 5), labels=labels, target_positions=target_positions(labels)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_new_weights_are_as_wide_as_those_of_a_linear_layer():
    torch.manual_seed(0)
    for hidden_size in (64, 512):
        config = MiniMindConfig(hidden_size=hidden_size, num_hidden_layers=1)
        weight = MiniMindForCausalLM(config).model.layers[0].self_attn.q_proj.weight
        usual = torch.nn.Linear(hidden_size, hidden_size).weight
        assert abs(weight.std() / usual.std() - 1) < 0.05
