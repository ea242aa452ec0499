"""Owns self-critical training: what makes of a batch the model's own answers, each with a weight.

For each prompt the model draws K answers. One that agrees with people's answers more than the other
K - 1 do is made likelier, one that agrees less unlikelier: the gradient of the expected reward. The
records' own answers are learnt beside them.

Sources: Rennie et al., "Self-critical Sequence Training for Image Captioning" (CVPR 2017); the mean
of the other answers as the baseline: Luo, "A Better Variant of Self-Critical Sequence Training"
(2020).

Shapes: B samples, T tokens, K answers of each, N supervised tokens, I images, P patches, V width of
the vision tower.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dataset.collate import Batch
from dataset.lm_dataset import IGNORE_INDEX, Sample
from model.generation.key_values import KeyValues
from model.generation.sampler import Sampler
from model.generation.sampling import Sampling
from model.generation.token_step import TokenStep
from model.model_vlm import MiniMindVLM
from trainer.loop.engine import autocast
from trainer.run.rewards import AnswerRewards

# An answer may be so many times as long as the record's own, and so many tokens longer.
LONGER_TIMES, LONGER_TOKENS = 2, 16
PLAIN = Sampling(temperature=1.0, top_p=1.0)  # draws from what the model says, as it is


@dataclass
class SelfCritical:
    """Makes batches of which each token's loss has a weight; safe to resume and to split, for what
    is drawn depends on seed, epoch and sample alone.

    Args:
        collate: makes a batch of samples.
        decode: text of tokens, without special ones.
        num_answers: K. answer_weight: of the records' own answers.
    """

    model: MiniMindVLM
    rewards: AnswerRewards
    collate: Callable[[list[Sample]], Batch]
    decode: Callable[[list[int]], str]
    end_id: int
    num_answers: int
    answer_weight: float
    seed: int
    dtype: str
    device: torch.device
    _window: list[float] = field(default_factory=list)  # rewards since the last log line

    def __call__(self, batch: Batch, epoch: int) -> Batch:
        """The batch's samples and the answers drawn to them, with `target_weights`."""
        if not batch.num_sequences:
            return batch
        samples = self._samples_of(batch)
        asked = [s for s in samples if self._can_be_asked(s)]
        rows, weights = list(samples), [self.answer_weight] * len(samples)
        for sample, answers in zip(asked, self._answers(asked, epoch), strict=True):
            rewards = torch.tensor([self._reward(sample, tokens) for tokens in answers])
            self._window += rewards.tolist()
            advantages = (rewards - rewards.mean()) * self.num_answers / (self.num_answers - 1)
            rows += [_answered(sample, tokens) for tokens in answers]
            weights += (advantages / self.num_answers).tolist()
        made = self.collate(rows)
        width = made.inputs["labels"].shape[1]
        of_rows = torch.tensor(weights)
        made = replace(
            made,
            num_samples=batch.num_samples,
            num_supervised=batch.num_supervised,
            sample_names=batch.sample_names,
            bad_samples=batch.bad_samples,
            num_truncated=batch.num_truncated,
            target_weights=of_rows[made.inputs["target_positions"] // width],
        )
        return made.pin_memory() if self.device.type == "cuda" else made

    def take_reward(self) -> float | None:
        """The mean reward of this rank's answers since the last call."""
        taken, self._window = self._window, []
        return sum(taken) / len(taken) if taken else None

    def _samples_of(self, batch: Batch) -> list[Sample]:
        """The batch's samples, with features of all their images on the device."""
        inputs = batch.inputs
        features, num_taken = self._features(batch), 0
        samples = []
        for row, where in enumerate(batch.sample_names):
            length = int(inputs["attention_mask"][row].sum())
            mask = inputs["image_mask"][row, :length]
            num_images = int(mask.sum()) // self.model.config.num_image_tokens
            own = None
            if features is not None and num_images:
                own = features[num_taken : num_taken + num_images]
            num_taken += num_images
            samples.append(
                Sample(
                    index=row,
                    where=where,
                    input_ids=inputs["input_ids"][row, :length],
                    labels=inputs["labels"][row, :length],
                    image_mask=mask,
                    pixel_values=torch.empty(0, 3, 1, 1),
                    is_truncated=False,
                    vision_features=own,
                    has_features=(True,) * num_images,
                )
            )
        return samples

    @torch.no_grad()
    def _features(self, batch: Batch) -> Tensor | None:  # (I, P, V)
        """The tower sees each picture once, however many answers are drawn about it."""
        inputs = batch.inputs_on(self.device)
        given = {
            "vision_features": inputs.get("vision_features"),
            "has_features": inputs.get("has_features"),
        }
        if inputs["pixel_values"] is None and given["vision_features"] is None:
            return None
        with autocast(self.device, self.dtype):
            return self.model.patches_of(inputs["pixel_values"], **given)

    def _can_be_asked(self, sample: Sample) -> bool:
        """Whether there is a first question with all the images before its answer."""
        start = _start(sample)
        return (
            start > 0 and not sample.image_mask[start:].any() and self.rewards.knows(sample.where)
        )

    def _reward(self, sample: Sample, tokens: list[int]) -> float:
        text = self.decode(tokens).strip()
        return self.rewards.of(sample.where, text, is_whole=tokens[-1] == self.end_id)

    def _answers(self, samples: Sequence[Sample], epoch: int) -> list[list[list[int]]]:
        """K answers to each sample's first question, as tokens."""
        if not samples:
            return []
        limits = [
            LONGER_TIMES * int((s.labels != IGNORE_INDEX).sum()) + LONGER_TOKENS for s in samples
        ]
        seeds = [
            zlib.crc32(f"{self.seed} {epoch} {s.where} {number}".encode())
            for s in samples
            for number in range(self.num_answers)
        ]
        was_training = self.model.training
        self.model.eval()  # nothing is dropped while answers are drawn
        try:
            found = draw_answers(
                self.model,
                [_prompt(s) for s in samples],
                seeds=seeds,
                end_id=self.end_id,
                limits=[limit for limit in limits for _ in range(self.num_answers)],
                device=self.device,
            )
        finally:
            self.model.train(was_training)
        return [found[i : i + self.num_answers] for i in range(0, len(found), self.num_answers)]


def _start(sample: Sample) -> int:
    """Where the first answer begins; 0 where there is none."""
    return int((sample.labels != IGNORE_INDEX).int().argmax())


def _prompt(sample: Sample) -> Sample:
    """What stands before the first answer."""
    start = _start(sample)
    parts = {name: getattr(sample, name)[:start] for name in ("input_ids", "labels", "image_mask")}
    return replace(sample, **parts)


def _answered(sample: Sample, tokens: list[int]) -> Sample:
    """The first question with another answer."""
    prompt, answer = _prompt(sample), torch.tensor(tokens)
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, answer]),
        labels=torch.cat([prompt.labels, answer]),
        image_mask=nn.functional.pad(prompt.image_mask, (0, len(tokens))),
    )


@torch.no_grad()
def draw_answers(
    model: MiniMindVLM,
    prompts: Sequence[Sample],
    *,
    seeds: Sequence[int],
    end_id: int,
    limits: Sequence[int],
    device: torch.device,
) -> list[list[int]]:
    """Answers drawn to prompts, as many to each, by float32 weights in evaluation mode.

    Args:
        seeds, limits: of each answer, its random numbers and most tokens; those of one prompt
            stand together.
    Returns:
        The tokens of each answer, `end_id` included where it came to its end.
    """
    width = max(len(p.input_ids) for p in prompts)

    def on_the_left(name: str) -> Tensor:  # (B, T)
        rows = [getattr(p, name) for p in prompts]
        return torch.stack([nn.functional.pad(r, (width - len(r), 0)) for r in rows]).to(device)

    lengths = [len(p.input_ids) for p in prompts]
    is_text = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    features = [p.vision_features for p in prompts if p.vision_features is not None]
    output = model(
        on_the_left("input_ids"),
        is_text.long().to(device),
        image_mask=on_the_left("image_mask"),
        vision_features=torch.cat(features) if features else None,
        use_cache=True,
        logits_to_keep=1,
    )
    repeats = len(seeds) // len(prompts)
    past = KeyValues(
        output.cache,
        [length for length in lengths for _ in range(repeats)],
        max_new_tokens=max(limits),
    )
    sampler = Sampler(
        PLAIN,
        [torch.empty(0, dtype=torch.int64)] * len(seeds),
        seeds=seeds,
        end_ids=[end_id],
        vocab_size=output.logits.shape[-1],
        device=device,
    )
    step, logits = TokenStep(model), output.logits[:, -1].repeat_interleave(repeats, 0)
    answers: list[list[int]] = [[] for _ in seeds]
    going = list(range(len(seeds)))
    while True:
        tokens = sampler.choose(logits.float())
        for row, token in zip(going, tokens.tolist(), strict=True):
            answers[row].append(token)
        left = [
            place
            for place, row in enumerate(going)
            if answers[row][-1] != end_id and len(answers[row]) < limits[row]
        ]
        if not left:
            return answers
        if len(left) < len(going):
            past.select(left)
            sampler.select(left)
            going, tokens = [going[place] for place in left], tokens[left]
        logits = step(tokens, past)
