"""Owns this model in lmms-eval, as a chat model of the name `minimind_v`.

    pip install lmms_eval "filelock<4" && pip install --no-deps -e .
    lmms-eval --model minimind_v --model_args weight=sft_vlm --tasks mmstar,pope

`--model_args` takes the model's flags of `eval_vlm.py`, separated by commas. The entry point
`lmms_eval.models` of this project names `manifest`; only lmms-eval imports this module.
Source: lmms_eval/api/model.py and lmms_eval/models/registry_v2.py of lmms-eval 0.7.3.
"""

from collections.abc import Sequence
from typing import Any

import torch

from model.evaluation.harness import Asked, answers, conversation, load_engine, sampling_of
from model.evaluation.harness import score_answer as score
from model.evaluation.task import progress

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise ImportError(f"lmms-eval is needed here ({error}): `pip install lmms_eval`") from error

NAME = "minimind_v"


def manifest() -> ModelManifest:
    """What lmms-eval's entry point gives."""
    return ModelManifest(NAME, chat_class_path=f"{__name__}.MiniMindV")


class MiniMindV(lmms):
    """The model for chat tasks; a request's `args` are (context, doc_to_messages, generation
    arguments, document, task, split).

    Args:
        batch_size: prompts at a time.
        max_batch_size: is not used; lmms-eval passes it to every model.
        options: flags of the model, as `load_engine` takes them.
    """

    is_simple = False

    def __init__(self, batch_size: int | str = 1, max_batch_size: Any = None, **options: Any):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of at least 1; got {batch_size}")
        self.batch_size = int(batch_size)
        self.engine = load_engine(**options)

    def _document(self, args: Sequence[Any]) -> Any:
        number, task, split = args[-3:]
        return self.task_dict[task][split][number]

    def _ask(self, messages: Sequence[Any]) -> Asked:
        return conversation(self.engine.processor, messages)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; those of one kind share a batch."""
        found: list[str] = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(request.args[2]), []).append(i)
        batches = [
            some[start : start + self.batch_size]
            for some in kinds.values()
            for start in range(0, len(some), self.batch_size)
        ]
        for batch in progress(batches, self):
            options = requests[batch[0]].args[2]
            asked = [
                self._ask(requests[i].args[1](self._document(requests[i].args))) for i in batch
            ]
            texts = answers(self.engine, asked, sampling_of(options), until=stops(options))
            for i, text in zip(batch, texts, strict=True):
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
                found[i] = text
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each answer as a whole turn.

        Here `args` are (context, answer or what gives it, doc_to_visual, document, task, split).
        """
        found = []
        for request in progress(requests, self):
            context, answer, doc_to_visual, *_ = request.args
            document = self._document(request.args)
            parts = [{"type": "image", "url": image} for image in doc_to_visual(document) or ()]
            parts.append({"type": "text", "text": context})
            text = answer(document) if callable(answer) else answer
            with torch.inference_mode():
                own = score(self.engine, self._ask([{"role": "user", "content": parts}]), text)
            found.append((-own.loss_sum, own.is_right))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """For each request, the answers of its rounds; the task makes the messages of each and
        says when it ends."""
        return [self._rounds(request.args) for request in progress(requests, self)]

    def _rounds(self, args: Sequence[Any]) -> list[str]:
        _, doc_to_messages, options, *_ = args
        document, outputs, info = self._document(args), list[str](), None
        messages = doc_to_messages(document)
        while True:
            outputs += answers(
                self.engine,
                [self._ask(messages)],
                sampling_of(options),
                until=stops(options),
            )
            payload = doc_to_messages(
                document,
                round_idx=len(outputs),
                previous_output=list(outputs),
                previous_round_info=info,
            )
            if not isinstance(payload, tuple):
                return outputs
            messages, is_over, _, info = payload
            if is_over:
                return outputs


def stops(options: dict[str, Any]) -> list[str]:
    """The texts that end an answer."""
    until = options.get("until") or []
    return [until] if isinstance(until, str) else list(until)
