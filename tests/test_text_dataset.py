"""Packed text, and the language-model stage on it."""

import json

import pytest
import torch
from conftest import TINY_MODEL, TOKENIZER_TEXT, conversation, make_records, train_flags

from dataset.text_dataset import TextDataset
from model.vlm_processor import load_tokenizer
from trainer import train_llm, train_pretrain_vlm


@pytest.fixture(scope="module")
def tokenizer(assets):
    return load_tokenizer(assets / "tokenizer")


def stream_of(dataset: TextDataset) -> list[int]:
    """The blocks' targets behind the very first token: every token once."""
    tokens = dataset[0].input_ids[:1].tolist()
    for block in dataset:
        tokens += block.labels[1:].tolist()
    return tokens


@pytest.mark.parametrize("max_length", [1, 7, 16, 1000])
def test_every_token_is_a_target_exactly_once(max_length, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TOKENIZER_TEXT[:4]) + "\n\n", encoding="utf-8")
    dataset = TextDataset(path, tokenizer, max_length=max_length)
    expected = []
    for text in TOKENIZER_TEXT[:4]:
        expected += [1, *tokenizer.encode(text), 2]
    assert stream_of(dataset) == expected
    assert len(dataset) == -(-(len(expected) - 1) // max_length)
    assert dataset.num_blank == 1
    assert all(len(block.input_ids) <= max_length + 1 for block in dataset)


def test_jsonl_holds_text_and_conversations(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    records = [{"text": "A red circle."}, conversation("What?", "A circle."), {"colour": "red"}]
    lines = [json.dumps(r) for r in records] + ["{broken", ""]
    path.write_text("\n".join(lines) + "\n")
    dataset = TextDataset(path, tokenizer, max_length=1000)
    text = tokenizer.decode(dataset[0].input_ids)
    assert text.startswith("<|im_start|>A red circle.<|im_end|><|im_start|>system\n")
    assert text.endswith("<|im_start|>assistant\nA circle.<|im_end|>\n")
    reasons = [bad.reason for bad in dataset.find_bad_records()]
    assert len(reasons) == 2 and dataset.num_blank == 1
    assert reasons[0].startswith("text.jsonl:3: a record needs 'text' or 'conversations'")
    assert reasons[1].startswith("text.jsonl:4: not valid JSON")


def test_answers_alone_are_targets_and_a_document_is_a_sample(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    records = [{"text": "A red circle."}, conversation("What?", "A circle."),
               conversation("Why?", "A long reason. " * 30)]  # fmt: skip
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    dataset = TextDataset(path, tokenizer, max_length=60, loss_on="answers")
    assert len(dataset) == 3
    said = [tokenizer.decode(s.labels[s.labels >= 0]) for s in dataset]
    assert said[0] == "<|im_start|>A red circle.<|im_end|>"
    assert said[1] == "A circle.<|im_end|>\n"
    assert [s.is_truncated for s in dataset] == [False, False, True]
    assert len(dataset[2].input_ids) == 60
    packed = TextDataset(path, tokenizer, max_length=60)
    assert packed.fingerprint != dataset.fingerprint  # a state of one is not the other's
    with pytest.raises(ValueError, match="loss_on 'questions'"):
        TextDataset(path, tokenizer, loss_on="questions")


def test_missing_or_empty_text_is_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.txt.*--data_path"):
        TextDataset(tmp_path / "gone.txt", tokenizer)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="no text in it"):
        TextDataset(tmp_path / "empty.txt", tokenizer)


def test_language_model_stage_leads_to_pretraining(assets, tmp_path, capfd):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TOKENIZER_TEXT * 20), encoding="utf-8")
    flags = {"tokenizer_path": assets / "tokenizer", "data_path": path, "val_data_path": path,
             "save_dir": tmp_path / "out", "checkpoint_dir": tmp_path / "checkpoints",
             "max_seq_len": 32, "batch_size": 4, "epochs": 2, "learning_rate": 0.005,
             "device": "cpu", "dtype": "float32", "num_workers": 0, "log_interval": 5,
             **TINY_MODEL}  # fmt: skip
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    assert train_llm.main(argv) == 0
    figures = [json.loads(x) for x in (tmp_path / "out" / "llm_32_metrics.jsonl").open()]
    assert [f["val_loss"] for f in figures if "val_loss" in f][-1] < 4
    weight = torch.load(tmp_path / "out" / "llm_32.pth", weights_only=True)
    assert not any("vision" in name for name in weight)
    assert train_llm.main([*argv, "--from_resume", "1"]) == 0

    capfd.readouterr()
    data = make_records(tmp_path / "data", num_records=8)
    argv = train_flags(assets, tmp_path, *data, from_weight="llm", freeze_llm=1)
    assert train_pretrain_vlm.main(argv) == 0
    assert "(its projection is new)" in capfd.readouterr().out
    after = torch.load(tmp_path / "out" / "pretrain_vlm_32.pth", weights_only=True)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weight.items())


def test_language_model_stage_needs_text(capfd, assets, tmp_path):
    argv = ["--save_dir", str(tmp_path), "--checkpoint_dir", str(tmp_path), "--tokenizer_path",
            str(assets / "tokenizer")]  # fmt: skip
    assert train_llm.main(argv) == 1
    assert "name the text to train on by --data_path" in capfd.readouterr().err
