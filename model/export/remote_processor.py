"""Owns text and pictures to model inputs for `trust_remote_code`, as `VLMProcessor` makes them.

A copy of this file stands in the folder: see `remote`.
"""

import re
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor


class MiniMindVProcessor(ProcessorMixin):
    """Every `<image>` of a text becomes the placeholder of one picture.

    Args:
        placeholder: the text that stands for a picture, such as 196 `@`.
        image_token: what stands in a prompt for it.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        placeholder: str = "",
        image_token: str = "<image>",
        **_: Any,
    ):
        self.placeholder, self.image_token = placeholder, image_token
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """What takes the place of each `<image>`."""
        return self.placeholder

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """As every processor of the library."""
        if isinstance(text, str):
            text = [text]
        text = [self._set_apart(t) if isinstance(t, str) else t for t in text or []] or None
        inputs: BatchFeature = super().__call__(images=images, text=text, **kwargs)
        return inputs

    def _set_apart(self, text: str) -> str:
        """A literal `@` must not touch a placeholder of `@`: a blank goes between."""
        special = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        if not self.placeholder or any(self.placeholder.startswith(token) for token in special):
            return text
        first, last = (re.escape(self.placeholder[i]) for i in (0, -1))
        image = re.escape(self.image_token)
        return re.sub(f"(?<={first})(?={image})|(?<={image})(?={last})", " ", text)
