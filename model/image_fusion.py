"""Owns where images stand in a token sequence, and how their features are put there.

Shapes: B batch, T tokens, n placeholder tokens per image, D hidden, I images of the batch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def check_placeholder(image_ids: list[int]) -> None:
    """Refuse a placeholder whose occurrences could overlap.

    Allowed are n times one token (`@` * 196), and sequences without a border: no proper prefix is
    also a suffix (25 `<` then 25 `>`).

    Raises:
        ValueError: the placeholder is empty or ambiguous.
    """
    if not image_ids:
        raise ValueError("the image placeholder has no tokens; set image_special_token")
    if len(set(image_ids)) == 1:
        return
    for size in range(1, len(image_ids)):
        if image_ids[:size] == image_ids[-size:]:
            raise ValueError(
                f"the image placeholder's first {size} tokens are also its last ones, so adjacent "
                "images could be read in two ways; use one repeated token or, for example, "
                "'<' * 25 + '>' * 25"
            )


def placeholder_mask(input_ids: Tensor, image_ids: list[int]) -> Tensor:
    """Which positions are image tokens. Stays on the device, with no host sync.

    Where the placeholder repeats one id, a run of m such ids holds m // n images from its first
    position on; the remaining ids are text. Any other placeholder must match as a whole.

    Args:
        input_ids: (B, T) integer ids.
        image_ids: the n ids of one image's placeholder.
    Returns:
        (B, T) bool.
    """
    size = len(image_ids)
    if input_ids.shape[1] < size:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    if len(set(image_ids)) > 1:
        pattern = torch.tensor(image_ids, device=input_ids.device)
        starts = (input_ids.unfold(1, size, 1) == pattern).all(-1)  # (B, T - n + 1)
        starts = F.pad(starts, (size - 1, size - 1)).int()
        return starts.unfold(1, size, 1).sum(-1) > 0
    position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    is_text = input_ids != image_ids[0]
    text_so_far = torch.where(is_text, position, -1).cummax(1).values
    text_ahead = torch.where(is_text, position, input_ids.shape[1]).flip(1).cummin(1).values.flip(1)
    offset = position - text_so_far - 1  # of a placeholder id within its run
    run_length = text_ahead - text_so_far - 1
    return ~is_text & (offset < run_length // size * size)


def placeholder_runs(input_ids: list[int], image_ids: list[int]) -> NDArray[np.bool_]:
    """`placeholder_mask` of one row of ids in the host's memory, (T,), in a tenth of the time."""
    size = len(image_ids)
    if len(set(image_ids)) > 1:
        return placeholder_mask(torch.tensor(input_ids)[None], image_ids)[0].numpy()
    is_image = np.array([0, *input_ids, 0]) == image_ids[0]
    is_image[[0, -1]] = False
    mask = np.zeros(len(input_ids), dtype=np.bool_)
    edges = np.flatnonzero(is_image[1:] != is_image[:-1])
    for start, end in edges.reshape(-1, 2):
        mask[start : start + (end - start) // size * size] = True
    return mask


def images_per_sample(image_mask: Tensor, num_image_tokens: int) -> list[int]:
    """How many images each row of a (B, T) image mask holds (one host sync)."""
    return (image_mask.sum(1) // num_image_tokens).tolist()


def check_image_count(counts: list[int], num_images: int, *, per_sample: int | None) -> None:
    """Compare full placeholders with the images that were given.

    Args:
        counts: placeholders in each sample. num_images: images in the batch.
        per_sample: images each sample was given, or None where only the total is known.
    Raises:
        ValueError: naming the sample (or every sample's count) that does not fit.
    """
    if per_sample is not None:
        for sample, count in enumerate(counts):
            if count != per_sample:
                raise ValueError(
                    f"sample {sample} of the batch holds {count} image placeholder(s) but was "
                    f"given {per_sample} image(s); every <image> needs exactly one image"
                )
    if sum(counts) != num_images:
        raise ValueError(
            f"the batch holds {sum(counts)} image placeholder(s), sample by sample {counts}, but "
            f"{num_images} image(s) were given; every <image> needs exactly one image"
        )


def fuse_images(inputs_embeds: Tensor, image_mask: Tensor, features: Tensor) -> Tensor:
    """Put the features, in reading order, where the mask is set.

    Args:
        inputs_embeds: (B, T, D). image_mask: (B, T) bool with exactly I * n positions set.
        features: (I, n, D).
    Returns:
        (B, T, D) in the dtype of `inputs_embeds`.
    """
    rows = features.flatten(0, 1).to(inputs_embeds.dtype)  # (I * n, D)
    row = (image_mask.flatten().cumsum(0) - 1).clamp(min=0).view_as(image_mask)
    # An embedding lookup rather than masked_scatter, whose backward waits for the host.
    return torch.where(image_mask[..., None], F.embedding(row, rows), inputs_embeds)


def flat_images(
    pixel_values: Tensor | None, *, batch_size: int
) -> tuple[Tensor | None, int | None]:
    """All images as (I, 3, S, S), and the number of images per sample if the shape implies it."""
    if pixel_values is None:
        return None, None
    if pixel_values.ndim == 4:
        return (pixel_values if len(pixel_values) else None), None
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim == 6 and shape[2] == 1:
        pixel_values = pixel_values.squeeze(2)
    if pixel_values.ndim != 5 or shape[0] != batch_size:
        raise ValueError(
            f"pixel_values has shape {shape}; expected (I, 3, H, W), ({batch_size}, N, 3, H, W) "
            f"or ({batch_size}, N, 1, 3, H, W)"
        )
    return (pixel_values.flatten(0, 1) if shape[1] else None), shape[1]


def check_features(vision_features: Tensor, num_patches: int, width: int) -> None:
    """Raise ValueError unless the features of a tower are (J, num_patches, width)."""
    if vision_features.ndim != 3 or tuple(vision_features.shape[1:]) != (num_patches, width):
        raise ValueError(
            f"vision_features has shape {tuple(vision_features.shape)}; this model takes "
            f"(images, {num_patches}, {width}), as its own tower gives them"
        )
