"""Owns the one prompt format of training and inference: chat + images -> ids and pixel_values.

Shapes: B batch, T tokens, I images, S image side in pixels.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

from model.generations import DEFAULT_GENERATION, GENERATIONS
from model.image_fusion import placeholder_runs
from model.model_vlm import VLMConfig
from model.vision.pictures import Picture, open_image
from model.vision.pixels import PixelSteps
from model.vision.preprocessing import PixelRange, measure

Message = dict[str, Any]  # "role", "content", and for a first system message "tools"
Conversation = tuple[list[Message], Sequence[Picture | Tensor] | Tensor]

IMAGE_TAG = "<image>"
OWN_TOKENIZER_DIR = "tokenizer"  # beside a weight: the one it was trained with, if not a usual one
SPECIAL_TOKENS = {"pad": 0, "bos": 1, "eos": 2}
EMPTY_THINKING = "<think>\n\n</think>\n\n"  # as the template of generation 3 writes it


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of vocabulary and merges: equal for tokenizers that give the same ids."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [tuple(m.split(" ")) if isinstance(m, str) else m for m in spec["model"]["merges"]]
    core = json.dumps([sorted(tokenizer.get_vocab().items()), merges], ensure_ascii=True)
    return hashlib.sha256(core.encode()).hexdigest()


def load_tokenizer(
    tokenizer_path: str | Path | None = None,
    *,
    expected_sha256: str | None = None,
    generation: int = DEFAULT_GENERATION,
    weight: Path | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or the first of the usual folders that has the expected one.

    It is read by the library's own class, so that no code is run, or asked for, that the folder
    names in an `auto_map`.

    Args:
        tokenizer_path: a folder with `tokenizer.json`; None looks into the generation's places,
            and then into `tokenizer` beside the weight.
        expected_sha256: from the weight's metadata: the tokenizer it was trained with.
    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: it is not the one that the weight was trained with.
    """
    places = list(GENERATIONS[generation].tokenizer_dirs)
    if weight is not None:
        places.append(weight.parent / OWN_TOKENIZER_DIR)
    folders = [Path(tokenizer_path)] if tokenizer_path else places
    present = [f for f in folders if (f / "tokenizer.json").is_file()]
    if not present:
        raise FileNotFoundError(
            f"no tokenizer: {' and '.join(map(str, folders))} "
            f"{'has' if len(folders) == 1 else 'have'} no tokenizer.json; "
            f"fetch it by `python dataset/download.py {GENERATIONS[generation].tokenizer}`, or "
            "name its folder by --tokenizer_path"
        )
    for folder in present:
        try:
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # a damaged file raises almost anything
            raise ValueError(
                f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error}); fetch "
                "it again (a clone may need `git lfs pull`)"
            ) from error
        if expected_sha256 in (None, tokenizer_sha256(tokenizer)):
            return tokenizer
    assert expected_sha256 is not None
    raise ValueError(
        f"the tokenizer in {' or '.join(str(f) for f in present)} is not the one this weight was "
        f"trained with (vocabulary {expected_sha256[:12]}...); "
        "name the right folder by --tokenizer_path"
    )


def check_special_tokens(
    tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, model_name: str = "the model"
) -> None:
    """Check the special token ids that model, loss mask and padding rely on.

    Raises:
        ValueError: they differ, or the vocabulary is larger than the model's.
    """
    way_out = "use the tokenizer that belongs to the weights (--tokenizer_path)"
    for name, expected in SPECIAL_TOKENS.items():
        found = getattr(tokenizer, f"{name}_token_id")
        if found != expected:
            raise ValueError(
                f"the tokenizer's {name} token has id {found}, MiniMind's has {expected}; {way_out}"
            )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but {model_name} {vocab_size}; {way_out}"
        )


class VLMProcessor:
    """Messages and pictures to model inputs.

    Args:
        tokenizer: with the ChatML template.
        image_processor: of the vision tower.
        config: names the placeholder of an image.
        pixel_steps: of the image processor: conversations get 8-bit pixels, for a model that knows
            these steps; None: the image processor's numbers.
    Raises:
        ValueError: the tokenizer does not turn the placeholder into the config's ids.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        *,
        config: VLMConfig,
        pixel_steps: PixelSteps | None = None,
    ):
        self.tokenizer = tokenizer
        self.pixel_steps = pixel_steps
        self.image_processor = image_processor
        self.image_ids = config.placeholder_ids
        self.placeholder = config.placeholder
        self.can_think = GENERATIONS[config.generation].can_think
        self.special_tokens = [
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        ids = tokenizer.encode(self.placeholder, add_special_tokens=False)
        if ids != self.image_ids:
            raise ValueError(
                f"the tokenizer turns the image placeholder {self.placeholder[:8]!r}... into "
                f"{len(ids)} tokens beginning {ids[:3]}, but the model expects "
                f"{len(self.image_ids)} beginning {self.image_ids[:3]}; use the tokenizer this "
                "model belongs to (--tokenizer_path) or another --image_special_token"
            )

    def render(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = False,
        open_thinking: bool = False,
        keep_empty_thinking: bool = True,
    ) -> str:
        """The prompt as text, every `<image>` replaced by the placeholder.

        Args:
            messages: a first system message may have `tools`, a list for the template. If the last
                one is the assistant's, the generation prompt ends with it: the model goes on there.
            open_thinking: the generation prompt opens a think block (generation 3).
            keep_empty_thinking: False drops the empty think blocks that the template writes.
        Raises:
            ValueError: a message or tool holds a special token or the placeholder itself as text.
        """
        tools = (messages[0].get("tools") if messages else None) or None
        if tools is not None:
            self._check_text(json.dumps(tools, ensure_ascii=False), what="text of the tools")
        is_begun = add_generation_prompt and messages[-1]["role"] == "assistant"
        asked = messages[:-1] if is_begun else messages
        text = self.tokenizer.apply_chat_template(
            [{"role": m["role"], "content": self._fill(m["content"])} for m in asked],
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            open_thinking=open_thinking,
        )
        assert isinstance(text, str)
        if is_begun:
            text += self._fill(messages[-1]["content"])
        return text if keep_empty_thinking else text.replace(EMPTY_THINKING, "")

    def plain(self, text: str) -> str:
        """Escape a text for `render`: a space splits image tags, special tokens and placeholders.

        For text that the user did not write as a prompt, such as the model's earlier answers.
        """
        for token in (IMAGE_TAG, *self.special_tokens, self.placeholder):
            middle = max(1, len(token) // 2)
            while token in text:  # again: in a long run of @ the halves of two join to a new one
                text = text.replace(token, f"{token[:middle]} {token[middle:]}")
        return text

    def _check_text(self, text: str, *, what: str = "text") -> None:
        """Raise ValueError where a text holds what would not be read as text."""
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"the {what} holds half a character (a UTF-16 surrogate); take it out")
        for token in self.special_tokens:
            if token in text:
                raise ValueError(f"the {what} holds the special token {token}; take it out")
        if any(self.placeholder in piece for piece in text.split(IMAGE_TAG)):
            raise ValueError(
                f"the {what} holds the image placeholder {self.placeholder[:8]!r}... itself "
                f"({len(self.placeholder)} characters); write {IMAGE_TAG} for an image"
            )

    def _fill(self, content: str) -> str:
        self._check_text(content)
        pieces = content.split(IMAGE_TAG)
        if any(self.placeholder.startswith(token) for token in self.special_tokens):
            return self.placeholder.join(pieces)  # no text can merge with it
        first, last = self.placeholder[0], self.placeholder[-1]
        for i, piece in enumerate(pieces):  # a literal @ must not touch a placeholder
            if i > 0 and piece.startswith(last):
                piece = " " + piece
            if i < len(pieces) - 1 and piece.endswith(first):
                piece = piece + " "
            pieces[i] = piece
        return self.placeholder.join(pieces)

    def __call__(
        self,
        messages: list[Message],
        images: Sequence[Picture | Tensor] | Tensor,
        *,
        max_length: int | None = None,
        **prompt_options: bool,
    ) -> dict[str, Any]:
        """One conversation as model inputs.

        Args:
            messages: `{"role", "content"}` each, with one `<image>` per picture.
            images: pictures in reading order: PIL images, encoded bytes or paths; or, where they
                are preprocessed already, their `pixel_values`. In a list, a (3, S, S) tensor is a
                preprocessed picture, and a (G * G, V) tensor the features of one that the tower
                has seen before.
            max_length: tokens to keep; the text ends before an image that would be cut.
            prompt_options: those of `render`.
        Returns:
            `input_ids` (T,) int64, `image_mask` (T,) bool, `pixel_values` (I, 3, S, S) float32 or
            as of `PixelSteps.look`, `is_truncated`; for features in `images` also
            `vision_features` (J, G * G, V) and `has_features`, a flag for each image.
        Raises:
            ValueError: tags and pictures differ in number, or a picture is broken.
        """
        num_tags = sum(m["content"].count(IMAGE_TAG) for m in messages)
        if num_tags != len(images):
            raise ValueError(
                f"{num_tags} {IMAGE_TAG} tag(s) but {len(images)} image(s); "
                "every tag needs exactly one image"
            )
        text = self.render(messages, **prompt_options)
        # Half the time of the library's call, whose truncation and padding were reset in `__init__`
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        input_ids = torch.from_numpy(np.array(encoding.ids, dtype=np.int64))
        mask = torch.from_numpy(placeholder_runs(encoding.ids, self.image_ids))
        num_found = int(mask.count_nonzero()) // len(self.image_ids)
        if num_found != len(images):
            raise ValueError(
                f"{len(images)} image(s) but {num_found} placeholder(s) after tokenizing"
            )
        is_truncated = max_length is not None and len(input_ids) > max_length
        if max_length is not None and is_truncated:
            length, num_images = self._cut(mask, max_length)
            input_ids, mask, images = input_ids[:length], mask[:length], images[:num_images]
        return {
            "input_ids": input_ids,
            "image_mask": mask,
            **self._look(images),
            "is_truncated": is_truncated,
        }

    def _look(self, images: Sequence[Picture | Tensor] | Tensor) -> dict[str, Any]:
        """The images as the model takes them; those with features are not preprocessed."""
        if isinstance(images, Tensor):
            return {"pixel_values": images}
        features: list[Tensor] = []
        pictures: list[Any] = []
        for image in images:
            if isinstance(image, Tensor) and image.ndim == 2:
                features.append(image)
            else:
                pictures.append(image)
        look = self.pixel_values if self.pixel_steps is None else self.pixel_steps.look
        looked: dict[str, Any] = {"pixel_values": look(pictures)}
        if features:
            flags = (isinstance(image, Tensor) and image.ndim == 2 for image in images)
            looked |= {"vision_features": torch.stack(features), "has_features": tuple(flags)}
        return looked

    def _cut(self, mask: Tensor, max_length: int) -> tuple[int, int]:
        """How many tokens and images of a (T,) image mask fit into `max_length` tokens."""
        num_image_tokens = int(mask[:max_length].sum())
        num_images, rest = divmod(num_image_tokens, len(self.image_ids))
        if rest:  # back to where the image that would be cut begins
            max_length = int(mask.nonzero()[num_images * len(self.image_ids)])
        return max_length, num_images

    @cached_property
    def pixel_range(self) -> PixelRange:
        """Side S and range of the pixels that the tower takes."""
        return measure(self.image_processor)

    def pixel_values(self, images: Sequence[Picture | Tensor] | Tensor) -> Tensor:
        """Preprocess pictures: (I, 3, S, S) float32; (0, 3, S, S) for none.

        One at a time: the pictures of a request, all decoded in full size, could fill the memory.
        """
        if isinstance(images, Tensor):
            return images
        if not images:
            side = self.pixel_range.side
            return torch.zeros(0, 3, side, side)
        return torch.cat(
            [i[None] if isinstance(i, Tensor) else self._preprocess(i) for i in images]
        )

    def _preprocess(self, image: Picture) -> Tensor:  # (1, 3, S, S)
        inputs = self.image_processor(images=open_image(image), return_tensors="pt")
        pixel_values: Tensor = inputs["pixel_values"]
        return pixel_values

    def pictures(self, pixel_values: Tensor) -> list[Image.Image]:
        """(I, 3, S, S) as pictures, the normalisation undone: what the tower sees."""
        undone = self.pixel_range.undo(pixel_values)
        return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in undone]

    def prompt_batch(
        self, conversations: Sequence[Conversation], *, open_thinking: bool = False
    ) -> dict[str, Tensor]:
        """Prompts for generation, padded on the left.

        Args:
            conversations: (messages, images) each. open_thinking: see `render`.
        Returns:
            `input_ids`, `attention_mask` and `image_mask` (B, T); `pixel_values` (I, 3, S, S); for
            features among the images also `vision_features` (J, G * G, V) and `has_features`
            (I + J,) bool.
        """
        options = {"add_generation_prompt": True, "open_thinking": open_thinking}
        return self._pad_left([self(m, images, **options) for m, images in conversations])

    def text_batch(
        self, prompts: Sequence[str | Sequence[int]], *, max_tokens: int
    ) -> dict[str, Tensor]:
        """Texts, or their ids, as they stand, as a batch like that of `prompt_batch`.

        Raises:
            ValueError: a prompt is empty, leaves no room for an answer, or holds what is no text or
                no id.
        """
        rows = []
        for prompt in prompts:
            if isinstance(prompt, str) and any("\ud800" <= c <= "\udfff" for c in prompt):
                raise ValueError("the prompt holds half a character (a UTF-16 surrogate)")
            if isinstance(prompt, str):
                prompt = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ids = torch.tensor(prompt, dtype=torch.int64)
            if not 0 < len(ids) < max_tokens:
                raise ValueError(
                    f"the prompt has {len(ids):,} tokens; 1 to {max_tokens - 1:,} are taken: the "
                    "answer needs room too"
                )
            if not 0 <= int(ids.min()) <= int(ids.max()) < len(self.tokenizer):
                raise ValueError(f"the prompt's ids must be from 0 to {len(self.tokenizer) - 1}")
            mask = torch.zeros(len(ids), dtype=torch.bool)
            rows.append({"input_ids": ids, "image_mask": mask, **self._look([])})
        return self._pad_left(rows)

    def _pad_left(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), width)
        batch = {
            "input_ids": torch.full(shape, self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "image_mask": torch.zeros(shape, dtype=torch.bool),
            "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        }
        for i, row in enumerate(rows):
            start = width - len(row["input_ids"])
            batch["input_ids"][i, start:] = row["input_ids"]
            batch["attention_mask"][i, start:] = 1
            batch["image_mask"][i, start:] = row["image_mask"]
        if given := [row["vision_features"] for row in rows if "vision_features" in row]:
            flags: list[bool] = []
            for row in rows:
                flags += row.get("has_features", [False] * len(row["pixel_values"]))
            batch["vision_features"] = torch.cat(given)
            batch["has_features"] = torch.tensor(flags)
            if not len(batch["pixel_values"]):
                del batch["pixel_values"]
        return batch
