"""If this fails, a mixture takes other shares of its sources than its weights say, repeats samples
before it has shown all, or cannot be resumed.
"""

import json
import pickle

import numpy as np
import pytest
from support.layouts import names_of, read_lines, write_table
from support.scripts import train_flags
from support.states import assert_same_state, saved
from support.tiny_parts import conversation, make_records

from dataset.records.mixing import Mixture, Part, parse_sources
from dataset.records.reader import open_records
from trainer import train_llm, train_sft_vlm
from trainer.loop import train_loop
from trainer.loop.sample_order import epoch_order, mixed_order


def make_sources(folder):
    """Three sources and their images: JSONL with pictures (12 records), Parquet shards (10), text
    (6)."""
    data, images = make_records(folder, num_records=12, multi=True)
    raw, shards = read_lines(data)[:10], folder / "shards"
    shards.mkdir()
    for i, part in enumerate((raw[:4], raw[4:])):
        pictures = [[(images / name).read_bytes() for name in names_of(r)] for r in part]
        turns = [json.dumps(r["conversations"]) for r in part]
        write_table(shards / f"{i}.parquet", {"conversations": turns, "image_bytes": pictures})
    text = folder / "text.jsonl"
    lines = [json.dumps(conversation(f"What is {i}?", f"Number {i}.")) for i in range(6)]
    text.write_text("\n".join(lines) + "\n")
    return [data, f"{shards}/*.parquet:0.5", f"{text}:2"], images


def flags_of(assets, out, sources, images, **more):
    argv = train_flags(assets, out, sources[0], images, **more)
    place = argv.index("--data_path") + 2
    return [*argv[:place], *map(str, sources[1:]), *argv[place:]]


def test_sources_are_read_from_the_flag(tmp_path):
    assert parse_sources(["a.jsonl"]).name == "a.jsonl"
    mixture = parse_sources(["a.jsonl", "b/*.parquet:0.5", "~/t.jsonl:.1", "c:/d.jsonl"])
    assert isinstance(mixture, Mixture)
    assert [source.weight for source in mixture.sources] == [None, 0.5, 0.1, None]
    assert not str(mixture.sources[2].path).startswith("~")
    assert str(parse_sources(["a.jsonl:2"])) == "a.jsonl:2"
    (tmp_path / "odd:0.5").touch()
    assert parse_sources([str(tmp_path / "odd:0.5")]).name == "odd:0.5"
    assert parse_sources(["a:1000"]).sources[0].weight == 1000
    for texts, says in (
        (["a:0"], "a weight must be above 0"),
        (["a", "b", "a:2"], "a twice"),
        (["b", "a:99999999"], "^--data_path a:99999999: a weight may be 1,000 at most"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_sources(texts)


def test_every_record_is_taken_once_before_any_is_taken_again():
    parts = [Part("a", 10, 10), Part("b", 7, 3), Part("c", 4, 9)]
    epochs = [mixed_order(parts, seed=1, epoch=epoch) for epoch in range(14)]
    for epoch, order in enumerate(epochs):
        assert len(order) == 22
        again = mixed_order(parts, seed=1, epoch=epoch)
        assert (order == again).all()
        assert (np.bincount(order[order < 10], minlength=10) == 1).all()
    for first, size in ((0, 10), (10, 7), (17, 4)):
        taken = np.zeros(size, dtype=int)
        for order in epochs:
            own = order[(order >= first) & (order < first + size)] - first
            taken += np.bincount(own, minlength=size)
            assert taken.max() - taken.min() <= 1
    assert not (epochs[0] == mixed_order(parts, seed=2, epoch=0)).all()
    assert not (epochs[0] == np.sort(epochs[0])).all()


def test_sources_of_weight_1_are_shuffled_through(tmp_path):
    sources, images = make_sources(tmp_path)
    records = open_records(parse_sources([str(sources[0]), sources[2]]), images)
    order = mixed_order(records.parts, seed=0, epoch=0)
    assert sorted(order.tolist()) == sorted([*range(12), *range(12, 18), *range(12, 18)])
    assert not (order == epoch_order(24, seed=0, epoch=0)).all()


def test_a_mixture_is_records_like_any_other(tmp_path):
    sources, images = make_sources(tmp_path)
    records = open_records(parse_sources([str(s) for s in sources]), images)
    records = pickle.loads(pickle.dumps(records))
    assert len(records) == 28 and [p.num_taken for p in records.parts] == [12, 5, 12]
    assert [p.name for p in records.parts] == ["data_0", "shards", "text"]
    assert [records.source_of(i) for i in (0, 11, 12, 21, 22, 27)] == [0, 0, 1, 1, 2, 2]
    assert [records.where(i) for i in (1, 17, 23)] == [
        "data_0.jsonl:2", "1.parquet:row 1", "text.jsonl:2"
    ]  # fmt: skip
    for i in range(10):
        left, right = records[i], records[12 + i]
        assert left.messages == right.messages
        pictures = [[records.read_image(image) for image in r.images] for r in (left, right)]
        assert pictures[0] == pictures[1]
    other = open_records(parse_sources([str(s) for s in sources[:2]]), images)
    assert other.fingerprint != records.fingerprint


@pytest.mark.slow
def test_a_mixture_trains_reports_each_source_and_resumes(assets, tmp_path, monkeypatch, capfd):
    sources, images = make_sources(tmp_path)
    common = {"epochs": 2, "save_interval": 3}
    whole = flags_of(assets, tmp_path / "whole", sources, images, **common)
    assert train_sft_vlm.main(whole) == 0
    out = capfd.readouterr().out
    assert "source shards: 5 of 10 records an epoch" in out and " text:" in out
    metrics = next((tmp_path / "whole" / "out").glob("*_metrics.jsonl"))
    figures = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(figures) == 16 and figures[-1]["samples"] == 58
    for of_step in figures:
        known = [of_step[f"loss/{n}"] for n in ("data_0", "shards", "text")]
        known = [loss for loss in known if loss is not None]
        assert (
            known
            and min(known) <= of_step["loss"] + 1e-4
            and max(known) >= (of_step["loss"] - 1e-4)
        )

    cut = flags_of(assets, tmp_path / "cut", sources, images, **common)
    step, steps = train_loop.optimizer_step, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 11:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_loop, "optimizer_step", interrupted)
    assert train_sft_vlm.main(cut) == 130
    monkeypatch.undo()
    assert train_sft_vlm.main([*cut, "--from_resume", "1"]) == 0
    assert_same_state(*(saved(tmp_path / n / "checkpoints", "*_resume.pth")
        for n in ("whole", "cut")))  # fmt: skip
    other = [word.replace(":0.5", ":0.6") for word in cut]
    assert train_sft_vlm.main([*other, "--from_resume", "1"]) == 1
    assert "cannot be resumed: its data is" in capfd.readouterr().err


def test_the_text_stage_says_that_it_mixes_nothing(assets, tmp_path, capfd):
    argv = ["--data_path", "a.txt", "b.txt:2", "--tokenizer_path", str(assets / "tokenizer")]
    where = ["--save_dir", str(tmp_path), "--checkpoint_dir", str(tmp_path), "--device", "cpu"]
    small = ["--from_weight", "none", "--hidden_size", "32", "--num_hidden_layers", "1"]
    assert train_llm.main([*argv, *where, *small]) == 1
    assert "this stage reads one file of text" in capfd.readouterr().err
