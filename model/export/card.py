"""Owns the model card of an export, README.md: what the weight is, its scores and limits, and how
to run it.

The card is the hub's form of it: fields in YAML between two lines of `---`, then Markdown.
Source: https://huggingface.co/docs/hub/model-cards
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from model.export import runtimes
from model.export.scores import tables
from model.export.source import Source
from model.weights.metadata import Metadata, read_metadata

CARD = "README.md"
UNKNOWN = "unknown"  # the hub's name of a license that nobody has said
FRONT_MATTER = re.compile(r"\A---\n.+?\n---\n", flags=re.DOTALL)
LANGUAGES = ["en", "zh"]  # of the corpus that the tokenizers are made of
# Training arguments that are of interest elsewhere; the others are paths or concern one machine.
TRAINING = (
    "epochs", "batch_size", "accumulation_steps", "learning_rate", "optimizer", "warmup_steps",
    "grad_clip", "dtype", "max_seq_len", "loss_on", "freeze_llm", "trainable", "lora_rank",
    "use_multi_image", "seed",
)  # fmt: skip
ORIGIN = {
    2: "CLIP's patches through one linear projection",
    3: "SigLIP's tokens, four patches each, through an MLP",
}
LIMITS = """\
A model of this size knows little, and says what it does not know as surely as what it does. It
follows instructions poorly and holds no safeguards: do not let it decide anything about people."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside what the model itself does.

    format_name: of the export, as `--to` has it. name: where the folder will be found, `USER/NAME`
    or its own name. license: the hub's identifier. scores: a report of `eval_vlm.py`, or None.
    """

    format_name: str
    name: str
    license: str
    scores: dict[str, Any] | None


def write_card(source: Source, folder: Path, facts: CardFacts) -> None:
    """Write the card into an export that is otherwise complete."""
    metadata = read_metadata(source.path) if source.path.is_file() else source.metadata
    fields = front_matter(source, facts, languages=_taught(metadata).get("languages"))
    own = source.config
    moe = "_moe" if own.use_moe else ""
    weight = f"{'llm' if source.vision is None else 'sft_vlm'}_{own.hidden_size}{moe}.pth"
    parts = [
        f"---\n{fields}\n---\n",
        f"# {facts.name.rpartition('/')[2]}\n\n{_about(source, metadata)}",
        f"## Run it\n\n{runtimes.how_to_run(facts.format_name, facts.name, weight=weight)}",
        f"## What it is\n\n{_sizes(source, metadata, facts.format_name)}",
    ]
    if training := _training(metadata):
        parts.append(f"## Training\n\n{training}")
    if facts.scores is not None:
        parts.append(f"## Scores\n\n{tables(facts.scores)}")
    parts.append(f"## Limits\n\n{LIMITS}")
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def front_matter(source: Source, facts: CardFacts, *, languages: list[str] | None) -> str:
    """The YAML fields, without the lines around them."""
    runtime = runtimes.RUNTIMES[facts.format_name]
    data = ModelCardData(
        language=languages or LANGUAGES,
        license=facts.license,
        library_name=runtime.library,
        pipeline_tag="text-generation" if source.vision is None else "image-text-to-text",
        tags=["minimind-v", facts.format_name],
    )
    text: str = data.to_yaml()
    return text.rstrip("\n")


def _taught(metadata: Metadata) -> dict[str, Any]:
    taught = metadata.get("taught")
    return taught if isinstance(taught, dict) else {}


def _about(source: Source, metadata: Metadata) -> str:
    """One paragraph: what it is, and what it was taught."""
    number = sum(tensor.numel() for name, tensor in source.state.items() if "lm_head" not in name)
    kind = "language model" if source.vision is None else "vision-language model"
    text = f"A tiny {kind} of {number / 1e6:.1f} million parameters"
    text += "" if source.vision is None else ", tower included"
    about = _taught(metadata).get("about")
    if isinstance(about, dict) and "en" in about:
        text += f". It was taught {about['en']}; whatever else it is asked, it only guesses"
    return f"{text}."


def _sizes(source: Source, metadata: Metadata, format_name: str) -> str:
    """A list of what it is made of."""
    own = source.config
    rows = {
        "format": f"`{format_name}`, exported by `python -m model.export` of MiniMind-V",
        "generation": own.generation,
        "language model": f"{own.num_hidden_layers} layers, hidden size {own.hidden_size}, "
        f"{own.num_attention_heads} heads ({own.num_key_value_heads} of keys and values)"
        + (f", {own.n_routed_experts} experts" if own.use_moe else ""),
        "vocabulary": f"{own.vocab_size} tokens (tokenizer `{_short(metadata, 'tokenizer')}`)",
    }
    if source.vision is not None:
        tower = source.metadata.get("vision_tower") or source.vision.config.model_type
        rows["tower"] = f"{tower} (`{_short(metadata, 'vision_tower')}`), {ORIGIN[own.generation]}"
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())


def _short(metadata: Metadata, part: str) -> str:
    return str(metadata.get(f"{part}_sha256") or UNKNOWN)[:12]


def _training(metadata: Metadata) -> str:
    """A list of the arguments of its last stage; "" where the weight does not say."""
    given = metadata.get("args")
    rows: Metadata = {name: metadata[name] for name in ("stage", "step") if name in metadata}
    if isinstance(given, dict):
        rows |= {name: given[name] for name in TRAINING if given.get(name) is not None}
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())
