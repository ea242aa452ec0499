"""If this fails, text for the language model is lost, repeated or misread when it is packed into
blocks, or the language-model stage does not lead on to pretraining.
"""

import json

import pytest
import torch
from support.scripts import train_flags
from support.tiny_parts import TINY_MODEL, TOKENIZER_TEXT, conversation, make_records

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


def llm_flags(assets, folder, path, **more) -> list[str]:
    flags = {
        "tokenizer_path": assets / "tokenizer",
        "data_path": path,
        "save_dir": folder / "out",
        "checkpoint_dir": folder / "checkpoints",
        "max_seq_len": 32,
        "batch_size": 4,
        "epochs": 1,
        "learning_rate": 0.005,
        "device": "cpu",
        "dtype": "float32",
        "num_workers": 0,
        "log_interval": 5,
        **TINY_MODEL,
    } | more
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


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
    records = [
        {"text": "A red circle."},
        conversation("What?", "A circle."),
        conversation("Why?", "A long reason. " * 30),
    ]
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


def test_share_of_bad_lines_is_that_of_lines(assets, tmp_path, capfd):
    path = tmp_path / "text.jsonl"
    argv = llm_flags(assets, tmp_path, path, max_seq_len=512)
    for num_bad, num_good, is_usable in ((2, 300, True), (2, 100, False)):
        lines = [json.dumps({"text": "A red circle. " * 3})] * num_good + ["{broken"] * num_bad
        path.write_text("\n".join(lines))
        assert train_llm.main(argv) == (0 if is_usable else 1)
        said = "2 record(s) will be left out" if is_usable else "2 of 102 samples cannot be used"
        assert said in capfd.readouterr().err


def test_odd_characters_are_bad_lines(tokenizer, tmp_path):
    for name, content, says in (
        ("a.jsonl", b'{"text": "a\\ud83d"}\n{"text": "b"}\n', "a.jsonl:1: half a character"),
        (
            "b.jsonl",
            json.dumps(conversation("?", "a\ud83d")).encode() + b'\n{"text": "b"}',
            "b.jsonl:1: half a character",
        ),
        ("c.txt", "b\n狗\n".encode("gbk"), "c.txt:2: not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        dataset = TextDataset(tmp_path / name, tokenizer)
        assert [bad.reason[: len(says)] for bad in dataset.find_bad_records()] == [says]
        assert dataset.num_records == 2 and "b" in tokenizer.decode(dataset[0].input_ids)


def test_frozen_language_model_has_nothing_to_train(assets, tmp_path, capfd):
    path = tmp_path / "text.txt"
    path.write_text("A red circle.\n" * 9)
    assert train_llm.main([*llm_flags(assets, tmp_path, path), "--freeze_llm", "1"]) == 1
    assert "error: --freeze_llm 1 leaves nothing to train" in capfd.readouterr().err


@pytest.mark.parametrize("loss_on", ["all", "answers"])
def test_blocks_of_another_length_are_not_resumed(loss_on, assets, tmp_path, capfd):
    path = tmp_path / "text.txt"
    path.write_text("A red circle.\n" * 9)
    statuses = [
        train_llm.main(
            llm_flags(
                assets,
                tmp_path,
                path,
                max_seq_len=length,
                loss_on=loss_on,
                epochs=epochs,
                from_resume=epochs - 1,
            )
        )
        for epochs, length in ((1, 8), (2, 16))
    ]
    assert statuses == [0, 1 if loss_on == "all" else 0]
    err = capfd.readouterr().err
    assert ("its max_seq_len is 8, this run's is 16" in err) == (loss_on == "all")


def test_missing_or_empty_text_is_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.txt.*--data_path"):
        TextDataset(tmp_path / "gone.txt", tokenizer)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="no text in it$"):
        TextDataset(tmp_path / "empty.txt", tokenizer)
    (tmp_path / "gbk.txt").write_text("狗\n狗\n", encoding="gbk")
    with pytest.raises(ValueError, match="no text in it that can be used.*gbk.txt:1: not UTF-8"):
        TextDataset(tmp_path / "gbk.txt", tokenizer)


@pytest.mark.slow
def test_language_model_stage_leads_to_pretraining(assets, tmp_path, capfd):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TOKENIZER_TEXT * 20), encoding="utf-8")
    argv = llm_flags(assets, tmp_path, path, val_data_path=path, epochs=2)
    assert train_llm.main(argv) == 0
    figures = [json.loads(x) for x in (tmp_path / "out" / "llm_32_metrics.jsonl").open()]
    assert [f["val_loss"] for f in figures if "val_loss" in f][-1] < 4
    weight = torch.load(tmp_path / "out" / "llm_32.pth", weights_only=True)
    assert not any("vision" in name for name in weight)
    assert train_llm.main([*argv, "--from_resume", "1"]) == 0

    assert "generation 2; trains: language model\n" in capfd.readouterr().out
    data = make_records(tmp_path / "data", num_records=8)
    argv = train_flags(assets, tmp_path, *data, from_weight="llm", freeze_llm=1)
    assert train_pretrain_vlm.main(argv) == 0
    assert "(its projection is new)" in capfd.readouterr().out
    after = torch.load(tmp_path / "out" / "pretrain_vlm_32.pth", weights_only=True)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weight.items())


def test_language_model_stage_needs_text(capfd, assets, tmp_path):
    argv = [
        "--save_dir",
        str(tmp_path),
        "--checkpoint_dir",
        str(tmp_path),
        "--tokenizer_path",
        str(assets / "tokenizer"),
    ]
    assert train_llm.main(argv) == 1
    assert "name the text to train on by --data_path" in capfd.readouterr().err


def test_what_is_no_prose_is_refused_by_name(tokenizer, tmp_path):
    for name in ("a.json", "a.csv", "a.tsv", "a.html", "a.gz", "a.jsonl.gz", "a.parquet", "a"):
        (tmp_path / name).write_text("A red circle.\n")
        with pytest.raises(ValueError, match=f"{name}: text is read from .jsonl .* and from .txt"):
            TextDataset(tmp_path / name, tokenizer)
    for name in ("a.txt", "a.TXT", "a.md"):
        (tmp_path / name).write_text("# A red circle.\n{braces} and a { brace\n")
        assert TextDataset(tmp_path / name, tokenizer).num_records == 2
    (tmp_path / "a.JSONL").write_text('{"text": "A red circle."}\n')
    text = tokenizer.decode(TextDataset(tmp_path / "a.JSONL", tokenizer)[0].input_ids)
    assert text == "<|im_start|>A red circle.<|im_end|>"


def test_records_named_as_prose_are_refused(tokenizer, tmp_path):
    for name in ("a.txt", "a.md"):
        (tmp_path / name).write_text('\n{"text": "A red circle."}\n')
        with pytest.raises(ValueError, match=f"{name} begins with a JSON object.*name it a.jsonl"):
            TextDataset(tmp_path / name, tokenizer)


ODD_TEXTS = {
    "nul": ("a\0b", "a NUL character"),
    "end": ("A circle.<|im_end|>", "holds the special token <|im_end|>"),
    "begin": ("<|im_start|>A circle.", "holds the special token <|im_start|>"),
    "pad": ("A circle.<|endoftext|>A square.", "holds the special token <|endoftext|>"),
    "twice": ("<|im_start|><|im_start|>A<|im_end|>", "special token"),
    "outside": ("<|im_start|>A<|im_end|> B", "special token"),
}


@pytest.mark.parametrize("case", ODD_TEXTS)
def test_nuls_and_special_tokens_are_bad_lines(case, tokenizer, tmp_path):
    text, says = ODD_TEXTS[case]
    good = "A red circle."
    (tmp_path / "a.txt").write_text("\n".join([good] * 40 + [text]))
    lines = [{"text": good}] * 40 + [{"text": text}, conversation("What?", text)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = [1, *tokenizer.encode(good), 2] * 40
    for name, num_bad in (("a.txt", 1), ("a.jsonl", 2)):
        dataset = TextDataset(tmp_path / name, tokenizer)
        reasons = [bad.reason for bad in dataset.find_bad_records()]
        assert len(reasons) == num_bad and dataset.num_records == 40 + num_bad
        assert all(says in reason for reason in reasons)
        assert [reason.split(" ")[0] for reason in reasons] == [f"{name}:41:", f"{name}:42:"][
            :num_bad
        ]
        assert dataset.tokens.tolist() == expected


def test_documents_may_be_marked_in_the_text(tokenizer, tmp_path):
    """As the corpus of the original has it: whole documents between bos and eos."""
    marked = "<|im_start|>A red circle.<|im_end|> <|im_start|>A square.<|im_end|>"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": marked}) + "\n")
    for loss_on in ("all", "answers"):
        dataset = TextDataset(tmp_path / "a.jsonl", tokenizer, loss_on=loss_on)
        assert not dataset.find_bad_records()
        assert dataset.tokens.tolist() == tokenizer.encode(marked)
        assert dataset.is_target.all()  # no answer is in it, so all of it is learnt
