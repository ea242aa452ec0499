"""If this fails, the losses and exact matches that evaluation prints are not the model's, or do not
show whether it looks at its images.
"""

import json

import pytest
import torch
from PIL import Image
from support.scripts import train_flags
from support.tiny_parts import conversation, make_records

import eval_vlm
from model.evaluation.likelihood import score_answers
from model.evaluation.statistics import wilson_lower_bound
from trainer import train_pretrain_vlm

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def seeing(assets, tmp_path_factory):
    """A model trained to name the colour of a picture, and records of another 10 pictures."""
    folder = tmp_path_factory.mktemp("seeing")
    (folder / "images").mkdir()
    for split, count in (("train", 48), ("test", 10)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(count):
                colour, rgb = list(COLOURS.items())[i % 3]
                name = f"{split}{i}.png"
                rgb = tuple(c + i % 7 for c in rgb)
                Image.new("RGB", (32, 32), rgb).save(folder / "images" / name)
                record = conversation("<image>\nWhat is in the picture?", colour, image=name)
                turns = conversation("Is it a picture?", "A picture.")["conversations"]
                record["conversations"] += turns
                print(json.dumps(record | {"types": ["colour", "known"]}), file=file)
    argv = train_flags(
        assets,
        folder,
        folder / "train.jsonl",
        folder / "images",
        epochs=8,
        learning_rate=0.01,
        log_interval=50,
    )
    assert train_pretrain_vlm.main([*argv, "--save_weight", "sft_vlm"]) == 0
    return folder


def score_flags(assets, folder, **extra) -> list[str]:
    values = {
        "save_dir": folder / "out",
        "vision_model_path": assets / "tower",
        "device": "cpu",
        "tokenizer_path": assets / "tokenizer",
        "data_path": folder / "test.jsonl",
        "images_path": folder / "images",
        "json": folder / "scores.json",
        "batch_size": 5,
    } | extra
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


@pytest.mark.slow
def test_scores_show_that_the_model_looks(assets, seeing, capfd):
    assert eval_vlm.main(score_flags(assets, seeing)) == 0
    scores = json.loads((seeing / "scores.json").read_text())
    colour = {c: scores[c]["colour"]["right"] for c in ("right", "shuffled", "blind")}
    assert colour["right"] == 10
    assert colour["shuffled"] == 0  # here the other record always has another colour
    assert colour["blind"] <= 4  # one guess for all
    assert scores["right"]["known"] == scores["shuffled"]["known"] | {
        "loss_sum": scores["right"]["known"]["loss_sum"]
    }
    assert scores["right"]["all"]["total"] == 20 and scores["grounding_gap"] > 0.3
    out = capfd.readouterr().out
    assert "colour" in out and "100.0%" in out and "grounding gap" in out


def test_score_of_an_answer_is_that_of_greedy_decoding(assets, seeing):
    """Right by one forward pass is right by generating."""
    import argparse

    from dataset.collate import VLMCollator
    from dataset.lm_dataset import VLMDataset
    from model.generation.engine import VLMEngine
    from model.generation.sampling import Sampling
    from model.options import add_model_arguments

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    loaded = VLMEngine.from_args(parser.parse_known_args(score_flags(assets, seeing))[0])
    dataset = VLMDataset(seeing / "test.jsonl", seeing / "images", loaded.processor)
    verdicts = []
    for i in range(9):
        sample, record = dataset[i], dataset.records[i]
        shown = i + i % 2  # every other record is shown the next one's picture
        sample.pixel_values.copy_(dataset[shown].pixel_values)
        first = score_answers(loaded.model, VLMCollator(pad_token_id=0)([sample]).inputs)[0][0]
        images = [dataset.records.read_image(x) for x in dataset.records[shown].images]
        answer = loaded.generate([(record.messages[:1], images)], Sampling(8, 0))[0].text
        assert first.is_right == (answer == record.messages[1]["content"])
        verdicts.append(first.is_right)
    assert verdicts == [True, False] * 4 + [True]


def test_loss_sums_are_those_of_the_forward_pass(assets, seeing):
    import argparse

    from dataset.collate import VLMCollator
    from dataset.lm_dataset import VLMDataset
    from model.options import add_model_arguments
    from model.weights.build_model import load_model

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    loaded = load_model(parser.parse_known_args(score_flags(assets, seeing))[0])
    dataset = VLMDataset(seeing / "test.jsonl", seeing / "images", loaded.processor)
    batch = VLMCollator(pad_token_id=0)([dataset[i] for i in range(5)])
    scores = [s for row in score_answers(loaded.model, batch.inputs) for s in row]
    assert sum(s.num_tokens for s in scores) == batch.num_supervised
    with torch.no_grad():
        loss = loaded.model(**batch.inputs).loss.item()
    assert sum(s.loss_sum for s in scores) == pytest.approx(loss * batch.num_supervised, rel=1e-4)


def test_records_that_cannot_be_scored_are_counted(assets, seeing, tmp_path, capfd):
    data, images = make_records(tmp_path, num_records=8)  # every fourth has no picture
    assert eval_vlm.main(score_flags(assets, seeing, data_path=data, images_path=images)) == 0
    assert "2 record(s) are left out" in capfd.readouterr().out
    data.write_text(json.dumps(conversation("What?", "A circle.")) + "\n")
    assert eval_vlm.main(score_flags(assets, seeing, data_path=data, images_path=images)) == 1
    assert "no usable record with images" in capfd.readouterr().err


def test_wilson_bound_is_the_textbooks():
    assert wilson_lower_bound(0, 0) == 0
    assert wilson_lower_bound(90, 100) == pytest.approx(0.8396, abs=5e-4)
    assert wilson_lower_bound(500, 500) == pytest.approx(0.9946, abs=5e-4)
