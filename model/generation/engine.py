"""Owns `VLMEngine`, by which evaluation, terminal chat, web page and API server all use a model.

They build messages by `ask` and `VLMEngine.remember`, so that the same text, pictures and seed give
the same answer everywhere.
"""

import argparse
import copy
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from model.generation.attention_map import image_attention
from model.generation.batch import Batch
from model.generation.beam_search import BeamDecoder, shared_room
from model.generation.context import Context
from model.generation.decoding import AnswerState, Decoder
from model.generation.member import Member
from model.generation.sampler import Sampler
from model.generation.sampling import MAX_SEED, Sampling, cannot_think
from model.generation.stream import NO_ROOM_ADVICE, Answer, DecodesAnswers, Stream, Streams
from model.generation.thinking import without_thinking
from model.generation.token_step import TokenStep
from model.machine.device import memory_guard
from model.vision.pictures import Picture
from model.vlm_processor import IMAGE_TAG, Message
from model.weights.build_model import LoadedModel, load_model

# As `VLMProcessor` takes them: pictures, or what is known of them already.
Images = Sequence[Picture | Tensor] | Tensor


def ask(prompt: str, *, num_images: int) -> list[Message]:
    """One user message; a prompt without any `<image>` gets one in front for every image."""
    if IMAGE_TAG not in prompt:
        prompt = f"{IMAGE_TAG}\n" * num_images + prompt
    return [{"role": "user", "content": prompt}]


class VLMEngine:
    """A loaded model that answers; safe to share between threads.

    It has no state that answering changes: every answer has its own cache and random numbers. The
    engine that `batched` gives has one batch for the answers of all who ask at the same time.
    """

    _batch: Batch | None = None

    def __init__(self, loaded: LoadedModel):
        self.model, self.processor = loaded.model, loaded.processor
        self.path, self.can_see = loaded.path, loaded.can_see
        self._step = TokenStep(self.model, compile=loaded.compile)
        self.context = Context(self.processor, max_tokens=self.model.config.max_position_embeddings)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "VLMEngine":
        """Load the model that the flags name, strictly; raises as `load_model` does."""
        loaded = load_model(args)
        if loaded.compile:
            print(
                "note: the first answer compiles the step of a token: a minute or more / "
                "第一个回答需先编译，一分钟以上",
                file=sys.stderr,
                flush=True,
            )
        return cls(loaded)

    def batched(self, num_rows: int) -> "VLMEngine":
        """The same model, whose single answers of `stream`, `choices` and `complete` are decoded
        together, `num_rows` at once; several answers of one request, and beams, are not.

        Its answers are computed ahead of who reads them, until they are closed.
        """
        own = copy.copy(self)
        own._batch = Batch(self.model, self._step, num_rows=num_rows, max_tokens=self.max_tokens)
        return own

    @property
    def generation(self) -> int:
        """Of the model; a key of `GENERATIONS`."""
        return self.model.config.generation

    @property
    def can_think(self) -> bool:
        """Whether its answers may stand behind a think block."""
        return self.processor.can_think

    @property
    def warning(self) -> str | None:
        """What the user should know before using this model; None if nothing."""
        if self.can_see:
            return None
        return (
            f"{self.path.name} has no projection, so this model cannot see: what it says about "
            "images is made up; train it by trainer/train_pretrain_vlm.py"
        )

    @property
    def max_tokens(self) -> int:
        """Length of the context: prompt and answer together."""
        return self.context.max_tokens

    @memory_guard(NO_ROOM_ADVICE)
    def generate(
        self,
        conversations: list[tuple[list[Message], Images]],
        sampling: Sampling,
        *,
        cancel: threading.Event | None = None,
    ) -> list[Answer]:
        """Answers to a batch of (messages, images).

        Every answer has its own random numbers from `sampling.seed`, so that the other
        conversations of the batch do not change it.

        Raises:
            ValueError, OSError: a conversation or picture that cannot be used.
            OutOfMemory: (a ValueError too) memory ran out; what was allocated is free again.
        """
        batch, dropped = self._prompts(conversations, sampling)
        streams = self._streams(batch, dropped, sampling, cancel=cancel)
        for _ in streams:
            pass
        return streams.answers

    @memory_guard(NO_ROOM_ADVICE)
    def stream(
        self,
        messages: list[Message],
        images: Images,
        sampling: Sampling,
        *,
        cancel: threading.Event | None = None,
    ) -> Stream:
        """One answer in pieces.

        Raises:
            ValueError, OSError: as `generate`, before the first piece.
            OutOfMemory: here or while any piece is read.
        """
        return Stream(self.choices(messages, images, sampling, cancel=cancel))

    @memory_guard(NO_ROOM_ADVICE)
    def choices(
        self,
        messages: list[Message],
        images: Images,
        sampling: Sampling,
        *,
        num_choices: int = 1,
        cancel: threading.Event | None = None,
    ) -> Streams:
        """Several answers to one question, computed together; the prompt is computed once.

        The first has the random numbers of `sampling.seed`, each further one those of the next
        seed. Raises as `stream`.
        """
        batch, dropped = self._prompts([(messages, images)], sampling)
        return self._streams(
            batch, dropped, sampling, num_choices=num_choices, is_shared=True, cancel=cancel
        )

    @memory_guard(NO_ROOM_ADVICE)
    def complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling,
        *,
        num_choices: int = 1,
        cancel: threading.Event | None = None,
    ) -> Streams:
        """Texts that go on from each prompt as it stands: no chat template, no pictures.

        Args:
            prompts: texts, in which special tokens are read as such, or ids.
            num_choices: answers to each prompt; they follow one another.
        Raises:
            ValueError: a prompt that is empty, too long or has other ids than the vocabulary's.
        """
        batch = self.processor.text_batch(prompts, max_tokens=self.max_tokens)
        dropped = [0] * len(prompts)
        return self._streams(
            batch, dropped, sampling, num_choices=num_choices, is_shared=True, cancel=cancel
        )

    def _prompts(
        self, conversations: list[tuple[list[Message], Images]], sampling: Sampling
    ) -> tuple[dict[str, Tensor], list[int]]:
        """The model's inputs, and how many turns were dropped from each conversation."""
        if not conversations:
            raise ValueError("no conversation to answer")
        thinks = sampling.open_thinking
        if thinks and not self.can_think:
            raise ValueError(f"open_thinking: {cannot_think(self.generation)}")
        prompts, dropped = [], []
        for messages, images in conversations:
            kept, num_dropped = self.context.fit(
                messages, max_new_tokens=sampling.max_new_tokens, open_thinking=thinks
            )
            prompts.append((kept, images))
            dropped.append(num_dropped)
        return self.processor.prompt_batch(prompts, open_thinking=thinks), dropped

    def _streams(
        self,
        batch: dict[str, Tensor],
        dropped: list[int],
        sampling: Sampling,
        *,
        num_choices: int = 1,
        is_shared: bool = False,
        cancel: threading.Event | None,
    ) -> Streams:
        """The answers to a batch of prompts.

        Args:
            is_shared: all answers are one request's, which has the memory of one full context.
        """
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        prompts = [ids[mask.bool()] for ids, mask in rows for _ in range(num_choices)]
        num_beams = sampling.num_beams
        num_rows, name = (num_beams, "num_beams") if num_beams > 1 else (1, "n")
        if is_shared:
            num_rows *= len(prompts)
        longest = max(map(len, prompts)) if is_shared else None
        answers = []
        for ids in prompts:
            room = shared_room(longest or len(ids), num_rows, max_tokens=self.max_tokens, name=name)
            limit = min(sampling.max_new_tokens, room)
            answers.append(AnswerState(len(ids), max_new_tokens=limit))
        decoder: DecodesAnswers
        if num_beams > 1:
            decoder = self._beam_decoder(batch, answers, sampling, cancel)
        elif is_shared and len(answers) == 1 and self._batch is not None:
            decoder = self._member(self._batch, batch, answers[0], sampling, prompts, cancel)
        else:
            decoder = self._decoder(batch, answers, sampling, prompts, num_choices)
        return Streams(
            decoder,
            self.processor.tokenizer,
            sampling,
            can_think=self.can_think,
            num_dropped_turns=[n for n in dropped for _ in range(num_choices)],
            cancel=cancel,
        )

    def _beam_decoder(
        self,
        batch: dict[str, Tensor],
        answers: list[AnswerState],
        sampling: Sampling,
        cancel: threading.Event | None,
    ) -> BeamDecoder:
        assert len(answers) == len(batch["input_ids"]), "beams give one answer to a prompt"
        end = self.processor.tokenizer.eos_token_id
        return BeamDecoder(self.model, batch, answers, sampling, eos_token_id=end, cancel=cancel)

    def _member(
        self,
        shared: Batch,
        batch: dict[str, Tensor],
        answer: AnswerState,
        sampling: Sampling,
        prompts: list[Tensor],
        cancel: threading.Event | None,
    ) -> Member:
        end_ids = self._end_ids(sampling)
        sampler = self._sampler(sampling, prompts, end_ids, num_choices=1)
        return Member(
            shared.join,
            batch,
            answer,
            sampler,
            num_image_tokens=self.model.config.num_image_tokens,
            end_ids=end_ids,
            num_logprobs=sampling.num_logprobs,
            cancel=cancel,
        )

    def _decoder(
        self,
        batch: dict[str, Tensor],
        answers: list[AnswerState],
        sampling: Sampling,
        prompts: list[Tensor],
        num_choices: int,
    ) -> Decoder:
        end_ids = self._end_ids(sampling)
        sampler = self._sampler(sampling, prompts, end_ids, num_choices=num_choices)
        logprobs = sampling.num_logprobs
        return Decoder(
            self.model, self._step, batch, answers, sampler, end_ids=end_ids, num_logprobs=logprobs
        )

    def _end_ids(self, sampling: Sampling) -> set[int]:
        own = set() if sampling.ignore_eos else {self.processor.tokenizer.eos_token_id}
        return own | {*sampling.stop_token_ids}

    def _sampler(
        self,
        sampling: Sampling,
        prompts: list[Tensor],
        end_ids: set[int],
        *,
        num_choices: int,
    ) -> Sampler:
        """Of answers to the prompts, `num_choices` of which follow one another."""
        first = sampling.seed
        seeds = [
            None if first is None else (first + i) % (MAX_SEED + 1) for i in range(num_choices)
        ]
        return Sampler(
            sampling,
            prompts,
            seeds=seeds * (len(prompts) // num_choices),
            end_ids=end_ids,
            vocab_size=self.model.config.vocab_size,
            device=self.model.device,
        )

    def remember(self, messages: list[Message], answer: str) -> list[Message]:
        """The conversation with the model's answer appended, for the next question.

        Where an answer spells `<image>` or a special token, it is made ordinary text. Thinking
        does not stay in the conversation.
        """
        if self.can_think:
            answer = without_thinking(answer)
        return [*messages, {"role": "assistant", "content": self.processor.plain(answer)}]

    @memory_guard(NO_ROOM_ADVICE)
    @torch.inference_mode()
    def look(
        self,
        messages: list[Message],
        images: Images,
        answer_text: str,
        *,
        layer: int | None = None,
    ) -> list[Tensor]:
        """Attention maps: how much an answer's tokens attend to each patch of each image.

        Args:
            layer: of the language model, from 0; None is the mean over all layers.
        Returns:
            One (side, side) float32 map for each image, on the CPU. The values are shares of all
            attention: the maps together sum to at most 1.
        Raises:
            ValueError: the answer is empty, there is no such layer, or as `generate`.
        """
        num_layers = self.model.config.num_hidden_layers
        if layer is not None and not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} is none of the model's 0 to {num_layers - 1}")
        answer = self.processor.tokenizer(answer_text, add_special_tokens=False)["input_ids"]
        if not answer:
            raise ValueError("the answer is empty: there is nothing to look from")
        messages, _ = self.context.fit(messages, max_new_tokens=len(answer))
        batch = self.processor.prompt_batch([(messages, images)])
        answer_ids = torch.tensor([answer[: self.max_tokens - batch["input_ids"].shape[1]]])
        return image_attention(self.model, batch, answer_ids, layer=layer)
