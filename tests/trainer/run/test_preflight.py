"""If this fails, a full disk, a wrong tokenizer or bad records show only after hours."""

import pytest
import torch
from support.scripts import train_flags
from support.tiny_parts import make_records

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
