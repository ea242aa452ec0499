"""If this fails, samples are lost or repeated where batches are taken in parts by length, or a rank
takes another number of parts than the others and all of them wait for ever.
"""

import pytest
import torch

from dataset.collate import GroupingCollator, VLMCollator
from dataset.lm_dataset import BadSample, Sample


def sample(length: int) -> Sample:
    ids = torch.arange(length) + 3
    return Sample(
        index=length,
        where=f"line {length}",
        input_ids=ids,
        labels=ids.clone(),
        image_mask=torch.zeros(length, dtype=torch.bool),
        pixel_values=torch.zeros(0, 3, 4, 4),
        is_truncated=False,
    )


def collate(samples, num_groups):
    return GroupingCollator(VLMCollator(pad_token_id=0), num_groups=num_groups)(samples)


def test_parts_hold_samples_of_similar_length_once():
    lengths = [9, 30, 4, 28, 11, 3, 31, 10]
    batches = collate([sample(n) for n in lengths], 3)
    names = [name for batch in batches for name in batch.sample_names]
    assert names == [f"line {n}" for n in sorted(lengths)]
    assert [batch.inputs["input_ids"].shape for batch in batches] == [(3, 9), (3, 28), (2, 31)]
    assert sum(batch.num_samples for batch in batches) == len(lengths)
    assert sum(batch.num_supervised for batch in batches) == sum(n - 1 for n in lengths)
    whole = collate([sample(n) for n in lengths], 1)
    assert [name for b in whole for name in b.sample_names] == [f"line {n}" for n in lengths]


@pytest.mark.parametrize("num_samples", [0, 1, 3, 4, 5])
def test_there_are_as_many_parts_for_any_number_of_samples(num_samples):
    batches = collate([sample(5 + i) for i in range(num_samples)], 4)
    assert len(batches) == 4
    assert sum(batch.num_samples for batch in batches) == num_samples
    for batch in batches:
        assert batch.inputs["input_ids"].shape[0] >= 1
        assert batch.num_supervised > 0 or not batch.num_sequences


def test_bad_samples_are_counted_in_one_part():
    batches = collate([sample(5), BadSample(1, "line 1: broken"), sample(7)], 2)
    assert [len(batch.bad_samples) for batch in batches] == [1, 0]
    assert sum(batch.num_samples for batch in batches) == 3
