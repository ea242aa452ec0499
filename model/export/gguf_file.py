"""Owns the GGUF file of a language model, as llama.cpp and Ollama read it, and a Modelfile beside.

Of generation 2 the architecture is llama, of 3 qwen3, both dense. llama.cpp turns neighbouring
pairs of a llama's queries and keys, where our halves are turned against each other, so that their
rows are written in another order; qwen3's stand as ours do.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's
`convert_hf_to_gguf.py` (the order of the rows, the kinds of tokens).

Shapes: H heads, K head dim, D hidden.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from model.export.names import to_stock
from model.export.source import Source, text_tensors
from model.model_minimind import MiniMindConfig

TYPES = ("f16", "q8_0", "f32")
MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"
ARCHITECTURES = {2: "llama", 3: "qwen3"}
BLOCK = 32  # values of a row that q8_0 scales together
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BEGIN, END, ASKED = "<|im_start|>", "<|im_end|>", "question"


def write_gguf(source: Source, folder: Path, *, kind: str) -> str:
    """Write the language model with its tokenizer and chat template.

    Args:
        kind: of the matrices, one of `TYPES`; what is no matrix is float32.
    Returns:
        What it is, in words.
    Raises:
        ValueError: the package is missing, or what llama.cpp cannot compute.
    """
    config = source.config
    _check_computable(source, kind)
    gguf = import_gguf()
    architecture = ARCHITECTURES[config.generation]
    writer = gguf.GGUFWriter(folder / MODEL_FILE, architecture)
    _add_sizes(writer, config, name=source.path.stem)
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[kind]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, source.tokenizer, gguf.TokenType, num_rows=config.vocab_size)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers
    )
    for name, tensor in to_stock(text_tensors(source.state), architecture).items():
        values = in_order(name, tensor.float().numpy(), config)
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        number = gguf.GGMLQuantizationType[kind.upper() if values.ndim > 1 else "F32"]
        writer.add_tensor(found, gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / MODELFILE).write_text(modelfile(source.tokenizer), encoding="utf-8")
    return f"GGUF ({architecture}, {kind})"


def import_gguf() -> Any:
    """The package; raises ValueError where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"--to gguf needs a package ({error}): `pip install gguf`") from error
    return gguf


def _check_computable(source: Source, kind: str) -> None:
    """Raise ValueError where llama.cpp would compute something else."""
    config, rope = source.config, source.config.rope_parameters or {}
    if config.use_moe:
        raise ValueError(
            f"{source.path} has experts, which --to gguf does not write; take --to transformers"
        )
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"{source.path} stretches its positions ({rope['rope_type']}), which --to gguf does "
            "not write; take --to transformers"
        )
    if kind == "q8_0" and (config.hidden_size % BLOCK or config.intermediate_size % BLOCK):
        raise ValueError(
            f"q8_0 needs sizes that {BLOCK} divides; {source.path} has hidden_size "
            f"{config.hidden_size} and intermediate_size {config.intermediate_size}; take "
            "--gguf_type f16"
        )
    spec = json.loads(source.tokenizer.backend_tokenizer.to_str())
    splits = spec["pre_tokenizer"] or {}
    if spec["normalizer"] or {name: splits.get(name) for name in BYTE_LEVEL} != BYTE_LEVEL:
        raise ValueError(
            "the tokenizer splits text otherwise than GPT-2's, which --to gguf would not tell "
            "llama.cpp; take --to llama or --to qwen3"
        )


def in_order(name: str, values: np.ndarray, config: MiniMindConfig) -> np.ndarray:
    """A tensor as llama.cpp wants it: of a llama's queries and keys, row 2i of a head is ours i,
    row 2i + 1 ours i + K / 2."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if config.generation != 2 or part not in heads:
        return values
    halves = values.reshape(heads[part], 2, config.head_dim // 2, -1)  # (H, 2, K / 2, D)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _add_sizes(writer: Any, config: MiniMindConfig, *, name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    assert config.rope_parameters is not None
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(
    writer: Any, tokenizer: PreTrainedTokenizerBase, types: Any, *, num_rows: int
) -> None:
    """The byte-level BPE; rows of the embedding that no token has are named and never used."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {number: text for text, number in tokenizer.get_vocab().items()}
    kinds = dict.fromkeys(tokens, types.NORMAL)
    for added in spec["added_tokens"]:
        kinds[added["id"]] = types.CONTROL if added["special"] else types.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(i, f"[UNUSED{i}]") for i in range(num_rows)])
    writer.add_token_types([kinds.get(i, types.UNUSED) for i in range(num_rows)])
    merges = spec["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def modelfile(tokenizer: PreTrainedTokenizerBase) -> str:
    """Ollama's description of the model: its prompt is that of the chat template."""
    messages = [{"role": "user", "content": ASKED}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str)
    head, tail = prompt.split(ASKED)
    default = head.removesuffix(f"{BEGIN}user\n")  # a system message of its own, if any
    reply = tail.removeprefix(f"{END}\n")
    system = f"{{{{ if .System }}}}{BEGIN}system\n{{{{ .System }}}}{END}\n"
    system += f"{{{{ else }}}}{default}{{{{ end }}}}"
    turns = '{{ range .Messages }}{{ if ne .Role "system" }}'
    turns += f"{BEGIN}{{{{ .Role }}}}\n{{{{ .Content }}}}{END}\n{{{{ end }}}}{{{{ end }}}}"
    template = f'TEMPLATE """{system}{turns}{reply}"""'
    return f'FROM ./{MODEL_FILE}\n{template}\nPARAMETER stop "{END}"\n'
