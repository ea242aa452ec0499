"""If this fails, llama.cpp or Ollama would compute something else than the weight, or a weight that
they cannot compute is written.
"""

import sys

import numpy as np
import pytest
import torch
from support.exporting import export, make_kits

from model.export.__main__ import main
from model.export.gguf_file import MODEL_FILE, MODELFILE

PROMPT = "What is in the picture?"
NUM_NEW = 32
FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


@pytest.fixture(scope="module")
def kits(assets, tmp_path_factory):
    return make_kits(tmp_path_factory.mktemp("weights"), assets)


def read(folder) -> tuple[dict, dict[str, np.ndarray]]:
    """The file's fields, and its tensors as float32."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    reader = gguf.GGUFReader(folder / MODEL_FILE)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        for t in reader.tensors
    }
    return fields, tensors


class LlamaCpp:
    """The forward pass as llama.cpp's graphs of llama and qwen3 have it, over a file's contents."""

    def __init__(self, fields: dict, tensors: dict[str, np.ndarray]):
        self.arch = fields["general.architecture"]
        self.get = lambda name: fields[f"{self.arch}.{name}"]
        self.tensors = tensors

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt(
            (x * x).mean(-1, keepdims=True) + self.get("attention.layer_norm_rms_epsilon")
        )
        return x / scale * self.tensors[f"{name}.weight"]

    def rope(self, x: np.ndarray) -> np.ndarray:
        """(T, H, K): a llama's neighbours are pairs, a qwen3's halves are."""
        num_dims = self.get("rope.dimension_count")
        rates = self.get("rope.freq_base") ** (-np.arange(0, num_dims, 2) / num_dims)
        angles = np.arange(len(x))[:, None, None] * rates
        half = num_dims // 2
        first, second = (
            (x[..., 0::2], x[..., 1::2]) if self.arch == "llama" else (x[..., :half], x[..., half:])
        )
        turned = (
            first * np.cos(angles) - second * np.sin(angles),
            first * np.sin(angles) + second * np.cos(angles),
        )
        if self.arch == "llama":
            return np.stack(turned, -1).reshape(x.shape)
        return np.concatenate(turned, -1)

    def attention(self, x: np.ndarray, block: str) -> np.ndarray:
        num_heads, num_kv = self.get("attention.head_count"), self.get("attention.head_count_kv")
        q, k, v = (
            (x @ self.tensors[f"{block}.attn_{part}.weight"].T).reshape(len(x), heads, -1)
            for part, heads in (("q", num_heads), ("k", num_kv), ("v", num_kv))
        )
        if self.arch == "qwen3":
            q, k = self.norm(q, f"{block}.attn_q_norm"), self.norm(k, f"{block}.attn_k_norm")
        q, k = self.rope(q), self.rope(k)
        k, v = (np.repeat(part, num_heads // num_kv, axis=1) for part in (k, v))
        scores = np.einsum("qhk,thk->hqt", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        seen = np.einsum("hqt,thk->qhk", weights, v).reshape(len(x), -1)
        return seen @ self.tensors[f"{block}.attn_output.weight"].T

    def logits(self, ids: list[int]) -> np.ndarray:
        x = self.tensors["token_embd.weight"][ids]
        for i in range(self.get("block_count")):
            block = f"blk.{i}"
            x = x + self.attention(self.norm(x, f"{block}.attn_norm"), block)
            inner = self.norm(x, f"{block}.ffn_norm")
            gate, up = (inner @ self.tensors[f"{block}.ffn_{p}.weight"].T for p in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.tensors[f"{block}.ffn_down.weight"].T
        return self.norm(x, "output_norm") @ self.tensors["token_embd.weight"].T


def greedy(logits, ids: list[int]) -> list[int]:
    for _ in range(NUM_NEW):
        ids = [*ids, int(logits(ids)[-1].argmax())]
    return ids


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-4), ("f16", 1e-2), ("q8_0", None)])
@pytest.mark.parametrize("generation", ["2", "3"])
def test_file_computes_what_the_weight_does(generation, kind, tolerance, kits, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    kit = kits[generation]
    export(kit, "gguf", tmp_path / "out", "--gguf_type", kind)
    fields, tensors = read(tmp_path / "out")
    loaded = kit.load()
    model, config = loaded.model, loaded.model.config
    arch = {"2": "llama", "3": "qwen3"}[generation]
    assert fields["general.architecture"] == arch
    for name, ours in FIELDS.items():
        assert fields[f"{arch}.{name}"] == pytest.approx(getattr(config, ours)), name
    assert fields[f"{arch}.rope.freq_base"] == config.rope_parameters["rope_theta"]
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("vision_")}
    assert len(tensors) == len(state) - 1  # the head is the embedding
    sums = sorted(float(t.float().abs().sum()) for n, t in state.items() if n != "lm_head.weight")
    found = sorted(float(np.abs(t).sum()) for t in tensors.values())
    assert found == pytest.approx(sums, rel=1e-2)

    @torch.inference_mode()
    def own(ids: list[int]) -> np.ndarray:
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()

    ids = loaded.processor.tokenizer(PROMPT)["input_ids"]
    theirs = LlamaCpp(fields, tensors).logits
    if tolerance is not None:
        np.testing.assert_allclose(theirs(ids), own(ids), atol=tolerance)
    if kind == "f32":
        assert greedy(theirs, ids) == greedy(own, ids)


@pytest.mark.parametrize("generation", ["2", "3"])
def test_tokenizer_goes_along(generation, kits, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    kit = kits[generation]
    export(kit, "gguf", tmp_path / "out")
    fields, _ = read(tmp_path / "out")
    loaded = kit.load()
    tokenizer = loaded.processor.tokenizer
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == loaded.model.config.vocab_size
    assert {tokens[i]: i for i in tokenizer.get_vocab().values()} == tokenizer.get_vocab()
    types = fields["tokenizer.ggml.token_type"]
    assert all(types[i] == 3 for i in tokenizer.all_special_ids)  # control
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    text = (tmp_path / "out" / MODELFILE).read_text()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "question"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("FROM ./model.gguf\n") and text.count('"""') == 2
    assert prompt.partition("question<|im_end|>\n")[2] + '"""' in text


@pytest.mark.parametrize(
    ("generation", "flags", "line"),
    [
        ("2_moe", ["--to", "gguf"], "has experts, which --to gguf does not write; take --to trans"),
        ("3_moe", ["--to", "gguf"], "has experts, which --to gguf does not write; take --to trans"),
        ("2", ["--to", "llama", "--gguf_type", "f16"], "--gguf_type is of --to gguf"),
        ("2", ["--to", "gguf"], "--to gguf needs a package"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    generation, flags, line, kits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as where it is not installed
    assert main([*kits[generation].flags, *flags, "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and line in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
