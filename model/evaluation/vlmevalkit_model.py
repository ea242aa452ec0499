"""Owns this model in VLMEvalKit.

Its models are a table in `vlmeval/config.py`, without entry points, so a script of your own adds
ours and then runs its command, `python my_run.py --data POPE --model minimind_v`:

    from functools import partial
    from vlmeval.config import supported_VLM
    from model.evaluation.vlmevalkit_model import MiniMindV
    supported_VLM["minimind_v"] = partial(MiniMindV, weight="sft_vlm")
    from vlmeval.run import main
    main()

Source: vlmeval/vlm/base.py of VLMEvalKit.
"""

from collections.abc import Sequence
from typing import Any

from model.evaluation.harness import answers, conversation, load_engine, sampling_of

try:
    from vlmeval.vlm.base import BaseModel
except ImportError as error:
    raise ImportError(f"VLMEvalKit is needed here ({error}): `pip install ms-vlmeval`") from error


class MiniMindV(BaseModel):
    """The model; several pictures stand where the message has them.

    Args:
        max_new_tokens: longest answer.
        options: flags of the model, as `load_engine` takes them.
    """

    INTERLEAVE = True

    def __init__(self, max_new_tokens: int = 512, **options: Any):
        self.sampling = sampling_of({"max_new_tokens": max_new_tokens})
        self.engine = load_engine(**options)

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to one message of parts, `{"type": "text" or "image", "value"}`."""
        parts = [
            {"type": part["type"], "text" if part["type"] == "text" else "url": part["value"]}
            for part in message
        ]
        asked = conversation(self.engine.processor, [{"role": "user", "content": parts}])
        return answers(self.engine, [asked], self.sampling)[0]
