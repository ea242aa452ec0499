"""If this fails, what is random about a sample depends on more than seed, epoch and sample, so that
a resumed run, or one split otherwise, trains on other texts. Or validation is random too.
"""

import json
import pickle

import pytest
import torch
from support.processor3 import make_processor3
from support.scripts import train_flags
from support.tiny_parts import conversation, make_records

from dataset.draws import SYSTEM_MESSAGES, Draws
from dataset.lm_dataset import VLMDataset
from trainer import train_pretrain_vlm
from trainer.loop.sample_order import epoch_order
from trainer.ranks.group import Ranks
from trainer.ranks.signals import StopSignal
from trainer.run.build import Loaders, read_draws
from trainer.train_args import TrainArgs

NUM_RECORDS = 40
EMPTY = "<think>\n\n</think>\n\n"
PINNED = [True, False, True, False, True, True, False, False]  # seed 42, epoch 1
DRAWS = Draws(seed=7, system_share=0.5, empty_think_share=0.5)


@pytest.fixture(scope="module")
def processor3(tmp_path_factory):
    return make_processor3(tmp_path_factory.mktemp("tokenizer3"))


def dataset_of(folder, processor, records, draws) -> VLMDataset:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return VLMDataset(path, None, processor, draws=draws)


@pytest.fixture
def dataset(processor3, tmp_path):
    records = [conversation(f"What is {i}?", "A circle.") for i in range(NUM_RECORDS)]
    return dataset_of(tmp_path, processor3, records, DRAWS)


def text_of(sample, processor) -> str:
    return processor.tokenizer.decode(sample.input_ids)


def test_shares_are_met_and_every_message_comes():
    draws = Draws(seed=1, system_share=0.2, empty_think_share=0.2)
    drawn = [draws.of(epoch, i) for epoch in range(2) for i in range(5000)]
    added = [one.system for one in drawn if one.system]
    assert 0.18 < len(added) / len(drawn) < 0.22
    assert 0.18 < sum(one.keep_empty_thinking for one in drawn) / len(drawn) < 0.22
    counts = [added.count(message) for message in SYSTEM_MESSAGES]
    assert len(set(SYSTEM_MESSAGES)) == 10 and min(counts) > 140 and sum(counts) == len(added)
    assert sum(message.isascii() for message in SYSTEM_MESSAGES) == 5


def test_draws_differ_by_seed_epoch_and_sample_and_by_nothing_else():
    def some(seed, epoch):
        draws = Draws(seed=seed, system_share=0.5, empty_think_share=0.5)
        return [draws.of(epoch, i) for i in range(64)]

    assert some(0, 0) == some(0, 0)
    assert len({tuple(some(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    # Those of a state that was saved months ago must come again.
    assert [one.keep_empty_thinking for one in some(42, 1)[:8]] == PINNED


def test_bounds_are_kept():
    never = Draws(seed=0, system_share=0, empty_think_share=0)
    always = Draws(seed=0, system_share=1, empty_think_share=1)
    assert all(never.of(0, i).system is None for i in range(99))
    assert not any(never.of(0, i).keep_empty_thinking for i in range(99))
    assert all(always.of(0, i).system and always.of(0, i).keep_empty_thinking for i in range(99))
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"--system_share .* is a probability; give 0 to 1"):
            Draws(seed=0, system_share=share, empty_think_share=1)


def test_sample_has_what_was_drawn(dataset, processor3):
    plain = [text_of(dataset[i], processor3) for i in range(NUM_RECORDS)]
    assert all(EMPTY in text and "system" not in text for text in plain)
    for i, sample in enumerate(dataset.for_epoch(3)):
        drawn, text = DRAWS.of(3, i), text_of(sample, processor3)
        system = f"<|im_start|>system\n{drawn.system}<|im_end|>\n" if drawn.system else ""
        answer = plain[i] if drawn.keep_empty_thinking else plain[i].replace(EMPTY, "")
        assert text == system + answer
        target = processor3.tokenizer.decode(sample.input_ids[sample.labels != -100])
        assert target == (EMPTY if drawn.keep_empty_thinking else "") + "A circle.<|im_end|>\n"
        if i == NUM_RECORDS - 1:
            break


def test_one_draw_drops_all_empty_blocks_of_a_sample_and_no_other(processor3, tmp_path):
    turns = conversation("What?", "A circle.")["conversations"]
    thinks = {"role": "assistant", "content": "<think>\nround\n</think>\n\nA circle."}
    record = {"conversations": [*turns, *turns, turns[0], thinks]}
    dataset = dataset_of(tmp_path, processor3, [record], Draws(0, 0.0, 0.0))
    assert text_of(dataset[0], processor3).count("<think>") == 3
    text = text_of(dataset.for_epoch(0)[0], processor3)
    assert EMPTY not in text and "<think>\nround\n</think>\n\nA circle." in text


def test_own_system_message_and_tools_stay_alone(processor3, tmp_path):
    turns = conversation("What?", "A circle.")["conversations"]
    system = {"role": "system", "content": "Be brief."}
    carries = [turns[0] | {"tools": [{"type": "function"}]}, turns[1]]
    records = [{"conversations": one} for one in ([system, *turns], carries, turns)]
    view = dataset_of(tmp_path, processor3, records, Draws(0, 1.0, 1.0)).for_epoch(0)
    texts = [text_of(view[i], processor3) for i in range(3)]
    assert texts[0].count("system") == 1 and "Be brief." in texts[0]
    assert "system" not in texts[1] and "system" in texts[2]


def test_view_of_an_epoch_travels_to_workers_and_names_its_samples(dataset):
    views = [dataset.for_epoch(epoch) for epoch in range(2)]
    copies = [pickle.loads(pickle.dumps(view)) for view in views]
    for view, copy in zip(views, copies, strict=True):
        assert len(view) == len(copy) == NUM_RECORDS and copy.where(3) == "a.jsonl:4"
        for i in range(NUM_RECORDS):
            assert torch.equal(view[i].input_ids, copy[i].input_ids)
    assert any(len(views[0][i].input_ids) != len(views[1][i].input_ids) for i in range(9))
    plain = VLMDataset(dataset.data_path, None, None)
    assert plain.for_epoch(1) is plain


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_split_and_any_resume_draw_the_same(num_workers, dataset):
    def loaded(world_size, batch_size, epoch, start):
        args = TrainArgs(batch_size=batch_size, num_workers=num_workers, seed=7)
        found = []
        for rank in range(world_size):
            ranks = Ranks(rank, world_size, torch.device("cpu"))
            loader = Loaders(args, ranks, StopSignal(), 0).train(dataset, epoch, start)
            for (batch,) in loader:
                lengths = batch.inputs["attention_mask"].sum(1).tolist()
                rows = zip(batch.inputs["input_ids"], lengths, batch.sample_names, strict=False)
                found += [(name, tuple(ids[:length].tolist())) for ids, length, name in rows]
        return sorted(found)

    whole = loaded(1, 4, 1, 0)
    assert len(whole) == NUM_RECORDS and whole == loaded(3, 2, 1, 0) != loaded(1, 4, 0, 0)
    left = {f"a.jsonl:{i + 1}" for i in epoch_order(NUM_RECORDS, seed=7, epoch=1)[24:]}
    assert loaded(2, 3, 1, 24) == [one for one in whole if one[0] in left]


def test_validation_draws_nothing(dataset):
    args = TrainArgs(batch_size=4, num_workers=0, seed=7)
    ranks = Ranks(0, 1, torch.device("cpu"))
    batches = Loaders(args, ranks, StopSignal(), 0).validation(dataset)
    ids = [row for (batch,) in batches for row in batch.inputs["input_ids"]]
    for i, row in enumerate(ids):
        plain = dataset[i].input_ids
        assert torch.equal(row[: len(plain)], plain) and not row[len(plain) :].any()


def test_defaults_follow_the_generation():
    assert read_draws(TrainArgs(), generation=2) is None
    assert read_draws(TrainArgs(), generation=3) == Draws(42, 0.2, 0.2)
    args = TrainArgs(system_share=0.5, seed=1)
    assert read_draws(args, generation=2) == Draws(1, 0.5, 1.0)
    assert read_draws(args, generation=3) == Draws(1, 0.5, 0.2)
    off = TrainArgs(system_share=0.0, empty_think_share=1.0)
    assert read_draws(off, generation=3) is None


def test_flags_are_probabilities_and_part_of_what_a_state_belongs_to(assets, tmp_path, capfd):
    argv = train_flags(assets, tmp_path, *make_records(tmp_path / "data", num_records=8))
    for flag, says in (("--system_share", "too large"), ("--empty_think_share", "too large")):
        assert train_pretrain_vlm.main([*argv, flag, "1.5"]) == 1
        assert f"error: {flag} 1.5 is {says}; the most is 1.0" in capfd.readouterr().err
    shares = ["--system_share", "0.5"]
    assert train_pretrain_vlm.main([*argv, *shares]) == 0
    assert train_pretrain_vlm.main([*argv, "--from_resume", "1"]) == 1
    said = capfd.readouterr().err
    assert "cannot be resumed: its random system messages and think blocks" in said
    assert "--system_share 0.5 --empty_think_share 1.0" in said
    assert train_pretrain_vlm.main([*argv, *shares, "--from_resume", "1"]) == 0
