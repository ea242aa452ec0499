"""If this fails, image features replace the wrong tokens, or reach the wrong sample."""

import random

import pytest
import torch

from model.image_fusion import (
    check_image_count,
    check_placeholder,
    fuse_images,
    images_per_sample,
    placeholder_mask,
    placeholder_runs,
)

AT = 34
SIZE = 4  # placeholder tokens of an image in these tests
FIRST_RELEASE = [60] * 25 + [62] * 25  # 25 `<`, then 25 `>`


def naive_mask(ids: list[int], placeholder: list[int]) -> list[bool]:
    """The contract's rule, run by run: n // size images from the run's start, the rest is text."""
    mask, size = [False] * len(ids), len(placeholder)
    i = 0
    while i < len(ids):
        run = 0
        while i + run < len(ids) and ids[i + run] == placeholder[0]:
            run += 1
        for k in range(run // size * size):
            mask[i + k] = True
        i += max(run, 1)
    return mask


def mask_of(*rows: list[int], placeholder=(AT,) * SIZE) -> list[list[bool]]:
    masks = placeholder_mask(torch.tensor(rows), list(placeholder)).tolist()
    assert [placeholder_runs(row, list(placeholder)).tolist() for row in rows] == masks
    return masks


@pytest.mark.parametrize(
    "run, images",
    [(0, 0), (1, 0), (SIZE - 1, 0), (SIZE, 1), (SIZE + 1, 1), (2 * SIZE, 2), (3 * SIZE - 1, 2)],
)
def test_placeholder_mask_whole_run_rule(run, images):
    ids = [7, *[AT] * run, 8, AT, 9, *[7] * SIZE]  # and an ordinary `@` between words
    expected = [False] + [True] * images * SIZE
    assert mask_of(ids) == [expected + [False] * (len(ids) - len(expected))]
    mask = placeholder_mask(torch.tensor([ids]), [AT] * SIZE)
    assert images_per_sample(mask, SIZE) == [images]


def test_placeholder_mask_at_both_ends_and_across_rows():
    image, text = [AT] * SIZE, [5] * SIZE
    full, none = [True] * SIZE, [False] * SIZE
    assert mask_of(image + text, text + image) == [full + none, none + full]
    # A run that ends one row does not go on in the next.
    half = SIZE // 2
    rows = [5] * half + [AT] * half, [AT] * half + [5] * half
    assert mask_of(*rows) == [none, none]


def test_placeholder_mask_equals_the_naive_rule():
    chance = random.Random(0)
    for _ in range(300):
        size, width = chance.randint(1, 6), chance.randint(1, 40)
        rows = []
        for _ in range(chance.randint(1, 4)):
            row: list[int] = []
            while len(row) < width:
                token = AT if chance.random() < 0.6 else chance.randint(0, 50)
                row += [token] * chance.randint(1, 2 * size + 1)
            rows.append(row[:width])
        expected = [naive_mask(row, [AT] * size) for row in rows]
        assert mask_of(*rows, placeholder=[AT] * size) == expected, (size, rows)


def test_placeholder_mask_196_tokens():
    ids = [5, AT, 6, *[AT] * (2 * 196 + 3), 7]
    mask = placeholder_mask(torch.tensor([ids]), [AT] * 196)[0]
    assert mask.nonzero().flatten().tolist() == list(range(3, 3 + 2 * 196))


def test_placeholder_mask_of_the_first_release():
    less, more = [60] * 25, [62] * 25
    pieces = [
        ([60, 62, 5], False),
        (less + more, True),
        (less + more, True),
        ([62, 60, 60], False),
        (less + more, True),
        (less + [5] + more, False),
        (less[:24] + more, False),
        (less, False),
    ]
    ids = [i for piece, _ in pieces for i in piece]
    expected = [is_image for piece, is_image in pieces for _ in piece]
    assert mask_of(ids, placeholder=FIRST_RELEASE) == [expected]
    mask = placeholder_mask(torch.tensor([ids]), FIRST_RELEASE)
    assert images_per_sample(mask, 50) == [3]


def test_check_placeholder_refuses_what_could_overlap():
    for allowed in ([AT] * 196, FIRST_RELEASE, [AT], [1, 2, 3]):
        check_placeholder(allowed)
    for refused in ([], [1, 2, 1], [1, 2, 1, 2], [1, 1, 2, 1]):
        with pytest.raises(ValueError, match="placeholder"):
            check_placeholder(refused)


def test_check_image_count_names_the_sample():
    check_image_count([1, 0, 2], 3, per_sample=None)
    check_image_count([2, 2], 4, per_sample=2)
    with pytest.raises(ValueError, match=r"sample 1 .*3 image placeholder.*2 image"):
        check_image_count([2, 3, 1], 6, per_sample=2)
    for images in (2, 4):
        with pytest.raises(ValueError, match=rf"\[1, 0, 2\].*{images} image"):
            check_image_count([1, 0, 2], images, per_sample=None)


def test_fuse_images_puts_features_in_reading_order():
    rows = [
        [AT] * SIZE + [5] * SIZE + [AT] * SIZE,  # two images, apart
        [5] * 3 * SIZE,  # none
        [AT] * 3 * SIZE,  # three, adjacent
        [AT] * 2 + [5] * (SIZE - 2) + [6] * SIZE + [AT] * SIZE,  # one, behind a literal `@@`
    ]
    torch.manual_seed(0)
    embeds, features = torch.randn(4, 3 * SIZE, 8), torch.randn(6, SIZE, 8)
    mask = placeholder_mask(torch.tensor(rows), [AT] * SIZE)
    assert images_per_sample(mask, SIZE) == [2, 0, 3, 1]
    expected, row_of_features = embeds.clone(), features.flatten(0, 1)
    taken = 0
    for b, row in enumerate(rows):
        for t, is_image in enumerate(naive_mask(row, [AT] * SIZE)):
            if is_image:
                expected[b, t] = row_of_features[taken]
                taken += 1
    assert taken == 6 * SIZE
    assert torch.equal(fuse_images(embeds, mask, features), expected)


def test_fuse_images_gradient_reaches_each_side_once():
    mask = placeholder_mask(torch.tensor([[5, *[AT] * SIZE, 6], [AT] * SIZE + [5, 6]]), [AT] * SIZE)
    embeds = torch.zeros(2, SIZE + 2, 3, requires_grad=True)
    features = torch.zeros(2, SIZE, 3, requires_grad=True)
    fuse_images(embeds, mask, features).sum().backward()
    assert (features.grad == 1).all()
    assert torch.equal(embeds.grad, (~mask)[..., None].expand_as(embeds).float())


def test_fuse_images_keeps_the_embeddings_dtype():
    mask = placeholder_mask(torch.tensor([[AT] * SIZE]), [AT] * SIZE)
    fused = fuse_images(torch.zeros(1, SIZE, 2, dtype=torch.bfloat16), mask, torch.ones(1, SIZE, 2))
    assert fused.dtype == torch.bfloat16 and (fused == 1).all()
