"""If this fails, a full disk, a wrong tokenizer or bad records show only after hours."""

from pathlib import Path

import pytest
import torch
from support.scripts import train_flags
from support.tiny_parts import make_records

from dataset.lm_dataset import BadSample
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.vlm_processor import load_tokenizer
from trainer import train_pretrain_vlm
from trainer.run import preflight


@pytest.fixture(scope="module")
def literate(assets):
    """A language model that has learnt the probe sentences with the tests' tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(assets / "tokenizer")
    model = MiniMindForCausalLM(
        MiniMindConfig(hidden_size=64, num_hidden_layers=2, vocab_size=len(tokenizer))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [
        torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
        for text in preflight.PROBE_TEXTS
    ]
    for _ in range(25):
        for ids in rows:
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


class Shuffled:
    """The same tokenizer with its ordinary ids permuted: one that belongs to other weights."""

    def __init__(self, tokenizer):
        self.inner, self.bos_token_id = tokenizer, tokenizer.bos_token_id
        order = torch.randperm(len(tokenizer) - 3, generator=torch.Generator().manual_seed(1))
        self.order = [0, 1, 2, *(order + 3).tolist()]

    def encode(self, text):
        return [self.order[i] for i in self.inner.encode(text)]


def test_probe_tells_the_right_tokenizer_from_a_wrong_one(literate, capfd, tmp_path):
    model, tokenizer = literate
    preflight.check_tokenizer_fits(model, tokenizer, weight=tmp_path / "llm_64.pth")
    assert capfd.readouterr().err == ""
    preflight.check_tokenizer_fits(model, Shuffled(tokenizer), weight=tmp_path / "llm_64.pth")
    warning = capfd.readouterr().err
    assert "llm_64.pth" in warning and "may not belong together" in warning
    assert warning.count("\n") == 1


def test_full_disk_is_seen_before_training(assets, tmp_path, capfd, monkeypatch):
    data = make_records(tmp_path / "data", num_records=4)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: usage)
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, *data)) == 1
    captured = capfd.readouterr()
    assert "GiB free, saving needs" in captured.err and "Epoch:[" not in captured.out


def test_blank_lines_are_said(assets, tmp_path, capfd):
    data, images = make_records(tmp_path / "data", num_records=4)
    data.write_text("\n\n" + data.read_text())
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, data, images)) == 0
    assert "data_0.jsonl: 2 blank line(s) hold no record" in capfd.readouterr().err


def test_cut_samples_are_counted(assets, tmp_path, capfd):
    data = make_records(tmp_path / "data", num_records=8)
    argv = train_flags(assets, tmp_path, *data, max_seq_len=60)
    assert train_pretrain_vlm.main(argv) == 0
    assert "sample(s) were cut at 60 tokens" in capfd.readouterr().err


class Many:
    """Records of which some numbers are bad; keeps which were looked at."""

    num_blank, data_path = 0, Path("many.jsonl")

    def __init__(self, num_records, is_bad):
        self.num_records, self.is_bad, self.seen = num_records, is_bad, []

    def bad_records(self, indices):
        for index in indices:
            self.seen.append(index)
            if self.is_bad(index):
                yield BadSample(index, f"many.jsonl:{index}: broken")

    def find_bad_records(self, indices=None):
        return list(self.bad_records(range(self.num_records) if indices is None else indices))


def test_of_many_records_a_seeded_sample_is_looked_at(capfd):
    many = Many(3_000_000, lambda _index: False)
    preflight.check_records(many, on_bad_sample="skip", seed=1)
    assert len(many.seen) == preflight.NUM_LOOKED_AT and many.seen == sorted(set(many.seen))
    assert (
        many.seen
        == preflight.looked_at(3_000_000, seed=1)
        != preflight.looked_at(3_000_000, seed=2)
    )
    assert "many.jsonl: 2000 of 3000000 records looked at" in capfd.readouterr().out
    few = Many(10_000, lambda index: index == 9_999)
    preflight.check_records(few, on_bad_sample="skip", seed=1)
    assert few.seen == list(range(10_000))
    assert "1 record(s) will be left out; the first: many.jsonl:9999" in capfd.readouterr().err


def test_a_bad_sample_leads_to_a_larger_one_never_to_all_records(capfd):
    bad = Many(200_000, lambda index: index % 50 == 0)  # 2%
    with pytest.raises(ValueError, match=r"\d+ of 2\d{4} samples cannot be used, more than 1%"):
        preflight.check_records(bad, on_bad_sample="skip", seed=0)
    for every in (110, 102):  # 0.9% and 0.98%: a sample may well have 1%, and still all have not
        near = Many(200_000, lambda index, every=every: index % every == 0)
        preflight.check_records(near, on_bad_sample="skip", seed=0)
        num_seen = len(near.seen)
        assert num_seen == len(set(near.seen)) > preflight.MORE_LOOKED_AT
        assert f"many.jsonl: {num_seen} of 200000 records looked at" in capfd.readouterr().out
    assert len(bad.seen) <= preflight.NUM_LOOKED_AT + preflight.MORE_LOOKED_AT
    with pytest.raises(ValueError, match="broken .--on_bad_sample skip goes on"):
        preflight.check_records(bad, on_bad_sample="error", seed=0)
    of_few = Many(15_000, lambda index: index % 98 == 0)  # 1.02%, which is known for certain
    with pytest.raises(ValueError, match="154 of 15000 samples cannot be used, more than 1%"):
        preflight.check_records(of_few, on_bad_sample="skip", seed=0)


class Stream(Many):
    """A stream whose first unit has so many records."""

    def __init__(self, num_records, is_bad, *, first):
        super().__init__(num_records, is_bad)
        self.stream, self.first_ids = self, lambda most: list(range(min(first, most)))


def test_a_stream_is_not_judged_by_a_few_records(capfd):
    one = Stream(1_200, lambda index: index == 3, first=20)  # 5% of its first unit
    preflight.check_records(one, on_bad_sample="skip", seed=0)
    captured = capfd.readouterr()
    assert "1 record(s) will be left out; the first: many.jsonl:3" in captured.err
    assert "20 of 1200 records looked at" in captured.out
    for first, says in ((20, "20 of 1200"), (500, "500 of 500")):
        lost = Stream(1_200 if first == 20 else 10**6, lambda _index: True, first=first)
        with pytest.raises(ValueError, match=f"{says} samples cannot be used, more than 1%"):
            preflight.check_records(lost, on_bad_sample="skip", seed=0)


def test_what_the_sample_left_out_is_checked_as_it_comes(assets, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(preflight, "ALL_UP_TO", 10)
    monkeypatch.setattr(preflight, "NUM_LOOKED_AT", 2)
    data, images = make_records(tmp_path / "data", num_records=12)
    lines = data.read_text().splitlines()
    unseen = next(i for i in range(12) if i not in preflight.looked_at(12, seed=42))
    lines[unseen] = lines[unseen].replace("assistant", "robot")
    data.write_text("\n".join(lines))
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, data, images)) == 1
    captured = capfd.readouterr()
    assert "2 of 12 records looked at" in captured.out
    assert f"1 of 12 samples cannot be used, more than 1%; the last: data_0.jsonl:{unseen + 1}" in (
        captured.err
    )
