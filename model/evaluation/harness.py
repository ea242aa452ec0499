"""Owns what the harnesses of others ask of a model: an engine by keyword, answers to messages, and
how likely an answer is.

They bring messages in parts, `{"type": "text", "text"}` and `{"type": "image", "url"}`, where `url`
is a picture or a path. The prompt is that of `eval_vlm.py`, and so is the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from model.evaluation.likelihood import AnswerScore, LabelledSequence, score_sequences
from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling
from model.generation.thinking import without_thinking
from model.model_minimind import IGNORE_INDEX
from model.options import OnceParser, add_model_arguments
from model.vision.pictures import Picture
from model.vlm_processor import IMAGE_TAG, Message, VLMProcessor

MAX_NEW_TOKENS = 512
Asked = tuple[list[Message], list[Picture]]


def load_engine(**options: Any) -> VLMEngine:
    """The model that the flags of `eval_vlm.py` name, given as keywords: `weight`, `load_from`,
    `device`, ...; None stands for a flag that is not given.

    Raises:
        ValueError: no such flag, or as `VLMEngine.from_args`.
    """
    parser = OnceParser()
    add_model_arguments(parser)
    known = {action.dest for action in parser._actions} - {"help"}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"no model argument {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return VLMEngine.from_args(parser.parse_args(flags))


def conversation(processor: VLMProcessor, messages: Sequence[Mapping[str, Any]]) -> Asked:
    """Messages in parts as the engine takes them, and their pictures.

    Raises:
        ValueError: a part is neither text nor a picture.
    """
    asked: list[Message] = []
    images: list[Picture] = []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        lines = []
        for part in parts:
            if part["type"] == "image":
                images.append(part["url"])
                lines.append(IMAGE_TAG)
            elif part["type"] == "text":
                lines.append(processor.plain(part["text"]))
            else:
                raise ValueError(
                    f"the task brings {part['type']}, and this model takes text and pictures only; "
                    "choose another task"
                )
        asked.append({"role": message["role"], "content": "\n".join(lines)})
    return asked, images


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """A harness's generation arguments; greedy unless they ask for a temperature. What this model
    does not know of them is left out, as harnesses' own models do."""
    num_beams = options.get("num_beams") or 1
    is_drawn = options.get("do_sample", True) and num_beams == 1
    top_p = options.get("top_p") or 1.0
    return Sampling(
        max_new_tokens=options.get("max_new_tokens") or MAX_NEW_TOKENS,
        temperature=(options.get("temperature") or 0.0) if is_drawn else 0.0,
        top_p=top_p if 0 < top_p <= 1 else 1.0,
        num_beams=num_beams,
        seed=options.get("seed"),
    )


def answers(
    engine: VLMEngine, asked: Sequence[Asked], sampling: Sampling, *, until: Sequence[str] = ()
) -> list[str]:
    """Answers to a batch, without what the model thinks first, each cut before the first of the
    texts that end it."""
    texts = []
    for answer in engine.generate(list(asked), sampling):
        text = without_thinking(answer.text) if engine.can_think else answer.text
        for stop in filter(None, until):
            text = text.partition(stop)[0]
        texts.append(text)
    return texts


def score_answer(engine: VLMEngine, asked: Asked, answer: str) -> AnswerScore:
    """How likely an answer is as the whole of the next turn, its end included.

    White space before it is left out: the turn's header stands between it and the question.
    """
    messages, images = asked
    processor, model = engine.processor, engine.model
    reply = {"role": "assistant", "content": processor.plain(answer.strip())}
    prompt = processor(messages, images, add_generation_prompt=True)["input_ids"]
    whole = processor([*messages, reply], images)
    ids = whole["input_ids"]
    labels = ids.clone()
    labels[: len(prompt)] = IGNORE_INDEX
    features = None
    if images:
        pixels = whole["pixel_values"].to(model.device, model.dtype)
        features = model.encode_images(pixels)
    sequence = LabelledSequence(ids, labels, whole["image_mask"], features)
    return score_sequences(model, [sequence], batch_size=1)[0][0]
