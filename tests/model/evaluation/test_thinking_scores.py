"""If this fails, `eval_vlm.py` scores what a model thinks instead of its answer, loses the thinking
from its results, or takes another generation's defaults.
"""

import json

import pytest
import torch
from PIL import Image
from support.third_generation import make_assets3, make_it_say, make_loaded3
from support.tiny_parts import conversation
from support.tiny_vlm import make_loaded, save_tiny

import eval_vlm
from dataset.lm_dataset import VLMDataset
from model.evaluation.likelihood import IGNORE_INDEX
from model.evaluation.think_block import without_blocks
from model.generation.engine import VLMEngine
from model.generations import GENERATIONS

SAID = ("It is <red>.\n", "</think>", "\n\nA red circle.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of both generations, a picture, and records of it."""
    folder = tmp_path_factory.mktemp("scores3")
    make_assets3(folder)
    save_tiny(make_loaded3(folder), folder / "sft_vlm_32.pth")
    (folder / "images").mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 32), colour).save(folder / "images" / f"{i}.png")
    return folder


def flags(folder, **values) -> list[str]:
    values = {
        "save_dir": folder,
        "vision_model_path": folder / "tower",
        "tokenizer_path": folder / "tokenizer",
        "image_dir": folder / "images",
        "device": "cpu",
        "json": folder / "out.json",
    } | values
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def scripted(monkeypatch):
    """Every loaded model says `SAID`; holds what it was asked."""
    asked, make, generate = [], VLMEngine.__init__, VLMEngine.generate

    def with_script(self, loaded):
        make(self, loaded)
        make_it_say(loaded, *SAID)

    def recorded(self, conversations, sampling, **options):
        asked.append((conversations, sampling))
        return generate(self, conversations, sampling, **options)

    monkeypatch.setattr(VLMEngine, "__init__", with_script)
    monkeypatch.setattr(VLMEngine, "generate", recorded)
    return asked


def test_results_keep_both_and_the_defaults_are_the_generations(folder, scripted, capfd):
    argv = flags(folder, open_thinking=1, html=folder / "out.html")
    assert eval_vlm.main(argv) == 0
    report = json.loads((folder / "out.json").read_text())
    assert report["prompt"] == GENERATIONS[3].prompt
    for sample in report["samples"]:
        assert (sample["answer"], sample["reasoning"]) == ("A red circle.", "It is <red>.")
    page = (folder / "out.html").read_text()
    thought = "<details><summary>thinking / 思考</summary>It is &lt;red&gt;.</details>"
    assert page.count(f"{thought}A red circle.") == 2
    ((_, sampling),) = scripted
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.85, 50)
    captured = capfd.readouterr()
    assert (
        "[0.png] [thinking / 思考]\nIt is <red>.\n[answer / 回答]\nA red circle.\n" in captured.out
    )
    assert "tokens/s" in captured.err and "tokens/s" not in captured.out


def test_speed_is_shown_if_wanted(folder, scripted, capfd):
    assert eval_vlm.main(flags(folder, show_speed=0)) == 0
    assert "tokens/s" not in capfd.readouterr().err
    assert eval_vlm.main(flags(folder, show_speed=1, batch_size=1)) == 0
    assert capfd.readouterr().err.count("tokens/s") == 2


def test_second_generation_is_described_as_ever(assets, folder, tmp_path, scripted, capfd):
    save_tiny(make_loaded(assets), tmp_path / "sft_vlm_32.pth")
    own = {
        "save_dir": tmp_path,
        "tokenizer_path": assets / "tokenizer",
        "vision_model_path": assets / "tower",
    }
    assert eval_vlm.main(flags(folder, **own)) == 0
    report = json.loads((folder / "out.json").read_text())
    assert report["prompt"] == GENERATIONS[2].prompt
    assert [list(s) for s in report["samples"]] == [
        ["name", "images", "answer", "finish_reason"]
    ] * 2
    assert report["samples"][0]["answer"] == "".join(SAID)
    ((_, sampling),) = scripted
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.65, 0.85, 0)
    assert capfd.readouterr().err == ""
    assert eval_vlm.main(flags(folder, **own, open_thinking=1)) == 1
    err = capfd.readouterr().err
    assert "--open_thinking 1: a model of generation 2 does not think" in err
    assert err.count("\n") == 1


def score(folder, records, **values) -> dict:
    data = folder / "records.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    argv = flags(folder, data_path=data, images_path=folder / "images", **values)
    argv = [word for pair in zip(argv[::2], argv[1::2], strict=True) if pair[0] != "--image_dir"
            for word in pair]  # fmt: skip
    assert eval_vlm.main(argv) == 0
    return json.loads((folder / "out.json").read_text())


def records(answer: str, *, kind: str = "x") -> list[dict]:
    question = "<image>\nWhat is it?"
    return [conversation(question, answer, image=f"{i}.png", types=[kind]) for i in (0, 1)]


def test_generated_answers_and_references_are_scored_without_thinking(folder, scripted):
    answer = "A red circle."
    for reference in (answer, f"<think>\nlong thoughts\n</think>\n\n{answer}"):
        report = score(folder, records(reference), open_thinking=1)
        assert report["vqa_by_type"]["x"]["accuracy"] == 1.0
        _, sampling = scripted[-1]
        assert sampling.temperature == 0 and sampling.max_new_tokens == 512
        report = score(folder, records(reference, kind="caption"), open_thinking=1)
        assert report["languages"]["all"]["bleu_4"] == pytest.approx(100)
    scripted.clear()
    score(folder, records(answer))
    assert scripted[0][1].max_new_tokens == 64


def test_earlier_answers_of_a_record_lose_their_thinking(folder, scripted):
    record = {"image": "0.png", "conversations": [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "<think>\nsecret\n</think>\n\nRed."},
        {"role": "user", "content": "Round?"},
        {"role": "assistant", "content": "Yes."},
    ]}  # fmt: skip
    score(folder, [record])
    prompts = [messages for batch, _ in scripted for messages, _ in batch]
    assert any(len(messages) == 3 for messages in prompts) and "secret" not in str(prompts)


def test_likelihood_is_of_what_follows_the_block(folder):
    """A model that would say exactly the answer behind the block is right, whatever it thinks of
    the block itself; the block stands in front as the template writes it."""
    loaded = make_loaded3(folder)
    tokenizer = loaded.processor.tokenizer
    thoughts = "<think>\nlong\n\nthoughts\n</think>\n\n"
    data = folder / "likelihood.jsonl"
    texts = ("A red circle.", f"{thoughts}A red circle.", "\nRed\n", "")
    data.write_text("\n".join(json.dumps(records(text)[0]) for text in texts))
    dataset = VLMDataset(data, folder / "images", loaded.processor)
    for index, expected in enumerate(("A red circle.", "A red circle.", "Red\n", "")):
        sample = dataset[index]
        text = tokenizer.decode(sample.input_ids)
        assert (thoughts if index == 1 else "<think>\n\n</think>\n\n") in text
        labels = without_blocks(sample.labels, tokenizer)
        kept = labels[labels != IGNORE_INDEX]
        assert tokenizer.decode(kept) == f"{expected}<|im_end|>\n"
        is_kept = labels == sample.labels
        assert torch.equal(labels[is_kept], sample.labels[is_kept])


def test_exact_match_ignores_the_block(folder, monkeypatch):
    """The model's logits say the answer behind the block and nothing of the block."""
    load, num_tokens = VLMEngine.from_args.__func__, []

    def sure(cls, args):
        engine = load(cls, args)
        tokenizer = engine.processor.tokenizer
        ids = tokenizer.encode("red<|im_end|>\n", add_special_tokens=False)
        num_tokens.append(len(ids))

        def head(_module, _args, logits):
            logits = torch.full_like(logits, -100.0)
            flat = logits.view(-1, logits.shape[-1])
            for i in range(len(flat)):  # the tokens that are supervised, one answer after another
                flat[i, ids[i % len(ids)]] = 100.0
            return flat.view_as(logits)

        engine.model.lm_head.register_forward_hook(head)
        return engine

    monkeypatch.setattr(VLMEngine, "from_args", classmethod(sure))
    for reference in ("red", "<think>\nthoughts\n</think>\n\nred"):
        report = score(folder, records(reference), num_generate=0)
        assert (report["right"]["all"]["right"], report["right"]["all"]["total"]) == (2, 2)
        assert report["right"]["all"]["num_tokens"] == 2 * num_tokens[0]
        assert report["languages"]["all"]["loss"]["value"] == pytest.approx(0, abs=1e-6)
