"""If this fails, a score, its confidence interval or the comparison of two weights is wrong, or
depends on batches and ranks.
"""

import json

import numpy as np
import pytest
from PIL import Image
from support.choice_files import write_tsv
from support.painted import eval_flags
from support.rank_group import RankGroup, run_main
from support.tiny_parts import conversation

import eval_vlm
from dataset.evaluation.eval_data import EvalData
from dataset.evaluation.language import detect_language
from dataset.lm_dataset import VLMDataset
from model.evaluation.choices import ChoiceRow, compare_choices
from model.evaluation.evaluator import CONDITIONS
from model.evaluation.statistics import interval, resample
from model.generation.engine import VLMEngine


def score(assets, painted, out, **values) -> dict:
    values = {"data_path": painted / "captions.jsonl", "json": out / "scores.json"} | values
    assert eval_vlm.main(eval_flags(assets, painted, **values)) == 0
    return json.loads(values["json"].read_text())


@pytest.fixture(scope="module")
def engine(assets, painted) -> VLMEngine:
    return VLMEngine.from_args(eval_vlm.parse_args(eval_flags(assets, painted)))


@pytest.fixture(scope="module")
def captions(assets, painted, tmp_path_factory) -> dict:
    """The report on captions of 10 pictures, two in each language."""
    return score(assets, painted, tmp_path_factory.mktemp("captions"))


def is_inside(figure: dict) -> bool:
    return figure["low"] <= figure["value"] <= figure["high"]


@pytest.mark.slow
def test_captions_are_scored_per_language(captions):
    languages = captions["languages"]
    assert list(languages) == ["all", "en", "zh"]
    for name, cells in languages.items():
        assert cells["num_pictures"] == 10 and cells["num_answers"] == (40 if name == "all" else 20)
        figures = [
            cells[f] for f in ("loss", "perplexity", "gap_shuffled", "gap_grey", "gap_blind")
        ]
        assert all(map(is_inside, figures))
        assert cells["gap_shuffled"]["low"] > 0, "it looks, and this is no chance"
        assert cells["perplexity"]["value"] == pytest.approx(np.exp(cells["loss"]["value"]))
    en, zh, both = (languages[n]["loss"]["value"] for n in ("en", "zh", "all"))
    assert min(en, zh) < both < max(en, zh)


def test_right_captions_are_told_from_wrong_ones(captions):
    """Nine others, of which a third or so say the same of another picture: those are not asked."""
    for cells in captions["languages"].values():
        assert cells["recall"]["value"] == 1 and cells["recall_shuffled"]["value"] < 0.6
        assert 0.1 <= cells["recall_chance"] <= 0.5
    assert captions["languages"]["all"]["num_captions"] == 20  # one a picture and language


def test_generated_captions_are_compared_with_all_references(captions):
    for name in ("en", "zh"):
        cells = captions["languages"][name]
        assert cells["bleu_4"] > 90 and cells["chrf"] > 90, "one of both references is said"
        assert cells["num_generated"] == 10  # not 20: the references of a picture share an answer
        assert cells["cider_d"]["value"] > 1
        assert "vqa_accuracy" not in cells
    assert "bleu_4" not in captions["languages"]["all"]  # languages are tokenized differently


def test_short_answers_by_type(assets, painted, tmp_path, capfd):
    report = score(assets, painted, tmp_path, data_path=painted / "questions.jsonl")
    right = {c: report[c]["colour"]["right"] for c in CONDITIONS}
    assert right["right"] == 10 and right["shuffled"] == 0  # another colour in every case
    assert right["grey"] <= 4 and right["blind"] <= 4  # one guess for all
    assert report["right"]["all"].keys() == {"right", "total", "loss_sum", "num_tokens"}
    assert report["right"]["all"]["total"] == 20 and report["right"]["known"]["right"] == 10
    all_right = {"accuracy": 1.0, "total": 10}
    everything = {"accuracy": 1.0, "total": 20}
    assert report["vqa_by_type"] == {"all": everything, "colour": all_right, "known": all_right}
    gap = report["languages"]["all"]["gap_shuffled"]
    assert report["grounding_gap"] == gap["value"] > 0.3 and is_inside(gap)
    out = capfd.readouterr().out
    assert "colour" in out and "grounding gap" in out and "VQA accuracy" in out
    (row,) = (line.split() for line in out.splitlines() if line.startswith("all "))
    assert row[-1] == "100.0%" and len(row) == 8, "VQA accuracy over all stands in the table"
    assert "BLEU" not in out and "caption" not in out


def test_nothing_is_generated_unless_wanted(assets, painted, tmp_path):
    report = score(assets, painted, tmp_path, num_generate=0, num_records=8)
    assert report["languages"]["all"]["num_answers"] == 8
    assert report["languages"]["all"]["num_generated"] == 0
    assert "cider_d" not in report["languages"]["en"]


@pytest.mark.slow
def test_two_ranks_give_the_same_numbers(assets, painted, tmp_path, captions):
    flags = eval_flags(
        assets, painted, data_path=painted / "captions.jsonl", json=tmp_path / "scores.json"
    )
    hook = (run_main, eval_vlm.main, flags)
    with RankGroup(flags, tmp_path, world_size=2, hook=hook, name="scores") as group:
        assert group.wait() == [0, 0], group.said()
        said = "".join(path.read_text() for path in group.logs)
    assert said.count("grounding gap") == said.count("weights: ") == 1
    two = json.loads((tmp_path / "scores.json").read_text())
    assert_close(two, captions)
    # Only one rank finds the fault, all of them end, and it is reported once.
    (tmp_path / "photos").mkdir()
    flags = eval_flags(assets, painted, image_dir=tmp_path / "photos")
    with RankGroup(flags, tmp_path, world_size=2, hook=(run_main, eval_vlm.main, flags)) as group:
        assert 0 not in group.wait(timeout_s=600), group.said()
        said = "".join(path.read_text() for path in group.logs)
        assert said.count("holds no image") == 1


def assert_close(first, second) -> None:
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_close(first[key], second[key])
    elif isinstance(first, float):
        assert first == pytest.approx(second, rel=1e-5, abs=1e-6)
    else:
        assert first == second


@pytest.mark.slow
def test_weights_are_compared_with_paired_intervals(assets, painted, tmp_path, capfd):
    report = score(assets, painted, tmp_path, compare="early")
    other = report["compare"]
    for language, figures in other["difference"].items():
        for name in ("loss", "gap_shuffled", "exact_match", "cider_d"):
            values = (r["languages"][language][name]["value"] for r in (other, report))
            assert figures[name]["value"] == pytest.approx(np.subtract(*values), abs=1e-9)
            assert is_inside(figures[name])
        assert figures["loss"]["low"] > 0, "the early weight is surely worse"
    assert "early_32.pth minus sft_vlm_32.pth, paired:" in capfd.readouterr().out
    same = score(assets, painted, tmp_path, compare="sft_vlm", num_generate=0)["compare"]
    assert same["difference"]["all"]["loss"] == {"value": 0, "low": 0, "high": 0}


@pytest.mark.slow
def test_transformers_folder_is_compared(assets, painted, engine, tmp_path):
    """The same model in the other format: no difference but rounding to fp16."""
    engine.model.save_pretrained(tmp_path / "folder")
    engine.processor.tokenizer.save_pretrained(tmp_path / "folder")
    report = score(
        assets, painted, tmp_path, compare=tmp_path / "folder", num_generate=0, dtype="bfloat16"
    )
    assert report["compare"]["weight"] == str(tmp_path / "folder")
    assert abs(report["compare"]["difference"]["all"]["loss"]["value"]) < 1e-3


def test_multiple_choice_of_two_weights(assets, painted, tmp_path, capfd):

    write_tsv(tmp_path / "bench.tsv", painted)
    report = score(
        assets,
        painted,
        tmp_path,
        data_path=None,
        images_path=None,
        compare="early",
        choices=tmp_path / "bench.tsv",
        choice_by="text",
    )
    gain = report["compare"]["difference"]
    right = [r["categories"]["all"]["right"] for r in (report["compare"], report)]
    assert gain["value"] == pytest.approx((right[0] - right[1]) / 10) and is_inside(gain)


def test_chance_of_being_right_in_every_order_of_the_options(assets, painted, tmp_path):

    write_tsv(tmp_path / "bench.tsv", painted, count=4)
    for circular, chance in ((0, 1 / 3), (1, 3**-3)):
        report = score(
            assets,
            painted,
            tmp_path,
            data_path=None,
            images_path=None,
            choices=tmp_path / "bench.tsv",
            circular=circular,
        )
        assert report["categories"]["all"]["chance"] == pytest.approx(chance)


def test_choices_without_a_common_question_cannot_be_compared():
    rows = [ChoiceRow(i, "x", "", 3, 0, 0, True) for i in range(2)]
    with pytest.raises(ValueError, match="no question could be answered with both weights"):
        compare_choices(rows[:1], rows[1:])


def test_records_of_one_picture_have_no_control(assets, painted, tmp_path, capfd):
    record = conversation("<image>\nWhat is in the picture?", "red", image="test00.png")
    (tmp_path / "one.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    report = score(assets, painted, tmp_path, data_path=tmp_path / "one.jsonl")
    assert report["grounding_gap"] is None and report["shuffled"] == {}
    assert "gap_shuffled" not in report["languages"]["all"]
    assert report["languages"]["all"]["gap_grey"]["value"] != 0
    assert "no record has another one's image" in capfd.readouterr().out


def test_control_images_and_wrong_captions_are_anothers(painted, engine):
    """Four records share each picture: half the data set away, but never the same picture."""
    dataset = VLMDataset(painted / "captions.jsonl", painted / "images", engine.processor)
    data = EvalData(dataset, num_records=5, num_wrong=9, seed=0, window=64)
    assert {case.others for case in data.read_window(0).cases[:4]} == {("test01.png",)}
    data = EvalData(dataset, num_records=None, num_wrong=3, seed=0, window=7)
    cases = [case for i in range(data.num_windows) for case in data.read_window(i).cases]
    assert len(cases) == 40 and all(case.others != case.card.images for case in cases)
    with_captions = [case for case in cases if case.candidates]
    assert len(with_captions) == 20
    for case in with_captions:
        texts = [engine.processor.tokenizer.decode(s.input_ids) for s in case.candidates]
        answers = [t.split("assistant\n")[1].split("<|im_end|>")[0] for t in texts]
        assert answers[0] == case.card.answers[0] and len(set(answers)) == len(answers) >= 2
        assert {detect_language(a) for a in answers} == {case.card.languages[0]}
    questions = data.questions({case.card.index for case in cases})
    assert len(questions) == 20 and all(len(q.references) == 2 for q in questions)


def test_pictures_are_decoded_once_a_window(painted, engine, monkeypatch):
    decoded, real = [], engine.processor.pixel_values
    monkeypatch.setattr(
        engine.processor,
        "pixel_values",
        lambda images: (decoded.append(1) if isinstance(images, list) else None, real(images))[1],
    )
    dataset = VLMDataset(painted / "captions.jsonl", painted / "images", engine.processor)
    data = EvalData(dataset, num_records=None, num_wrong=3, seed=0, window=16)
    assert not decoded
    window = data.read_window(0)
    # 4 of the records, and 6 that are others or controls: all ten of the data set
    assert len(window.pictures) == 10 and len(decoded) == 10


def test_bootstrap_interval_is_that_of_a_mean():
    """Of many units the middle 95% is the mean plus and minus 1.96 standard errors."""
    values = np.random.default_rng(1).normal(5, 2, (400, 1))
    drawn = resample(values, seed=0)[:, 0] / 400
    figure = interval(values.mean(), drawn)
    error = values.std() / 20
    assert figure["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert figure["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert (resample(values, seed=0)[:, 0] / 400 == drawn).all()
    paired = resample(np.hstack([values, values + 1]), seed=0)
    assert paired[:, 1] - paired[:, 0] == pytest.approx(np.full(1000, 400))


def test_real_captions_have_two_references_in_each_language(shared, engine):
    """Flickr8k: four records a photo, found to be captions by what their questions ask for."""
    val = shared / "data" / "flickr8k" / "val"
    dataset = VLMDataset(val / "data.jsonl", val / "images.zip", engine.processor)
    data = EvalData(dataset, num_records=80, num_wrong=9, seed=0, window=16)
    window = data.read_window(0)
    assert len(window.cases) == 16 and not window.left_out
    assert len(window.pictures) == 20, "four photos, four of other records, and controls"
    assert [len(case.candidates) for case in window.cases if case.candidates] == [10] * 8
    questions = data.questions(set(range(80)))
    assert len(questions) == 40 and all(q.is_caption for q in questions)
    assert all(len(q.references) == 2 for q in questions)
    assert {q.language for q in questions} == {"en", "zh"}


def test_languages_by_script():
    assert detect_language("A dog.") == "en" and detect_language("一只狗") == "zh"
    assert (
        detect_language("用 iPhone 拍的照片") == "zh" and detect_language("3", "有几个？") == "zh"
    )
    assert detect_language("3", "How many?") == "en" and detect_language("3") == "other"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": "nothing"}, "no weight nothing_512.pth"),
        ({"compare": "nothing"}, "no weight nothing_512.pth"),
        ({"data_path": "gone.jsonl"}, "no data file gone.jsonl"),
        ({"images_path": "gone"}, "no images: gone"),
        ({"num_records": 0}, "--num_records must be 1 or more"),
        ({"num_wrong": 0}, "--num_wrong must be 1 or more"),
        ({"batch_size": 0}, "--batch_size must be 1 or more"),
        ({"choices": "a.tsv"}, "--data_path and --choices are two tasks"),
        ({"chat": True}, "--data_path and --chat are two tasks"),
        ({"max_seq_len": 40000}, "--max_seq_len 40000: sft_vlm_32.pth takes 32768"),
        ({"data_path": None, "images_path": None, "chat": True, "json": "a.json"}, "--chat has"),
        ({"html": "a.html"}, "--html is a gallery of --image_dir"),
        ({"circular": 1}, "--circular needs --choices"),
        ({"data_path": None}, "--images_path needs --data_path"),
        ({"data_path": None, "images_path": None, "compare": "early"}, "--compare needs something"),
    ],
)
def test_wrong_use_is_one_clear_line(values, message, assets, painted, capfd):
    data = {"data_path": painted / "questions.jsonl", "images_path": painted / "images"}
    flags = data | {"num_generate": 0} | values
    assert eval_vlm.main(eval_flags(assets, painted, **flags)) == 1
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1


def test_weight_of_another_tokenizer_is_not_compared(assets, painted, tmp_path, capfd):
    from support.scripts import train_flags
    from support.tiny_parts import make_tokenizer, make_tower

    from trainer import train_pretrain_vlm

    make_tokenizer(tmp_path / "tokenizer", texts=["system user assistant, other words"] * 9)
    make_tower(tmp_path / "tower", image_size=32, patch_size=8)
    argv = train_flags(tmp_path, tmp_path, painted / "questions.jsonl", painted / "images")
    assert train_pretrain_vlm.main([*argv, "--save_weight", "other"]) == 0
    flags = eval_flags(
        assets,
        painted,
        data_path=painted / "questions.jsonl",
        num_generate=0,
        compare=tmp_path / "out" / "other_32.pth",
    )
    assert eval_vlm.main(flags) == 1
    err = capfd.readouterr().err
    assert "is not the one this weight was trained with" in err and "Traceback" not in err


def test_broken_records_are_named_and_counted(assets, painted, tmp_path, capfd):
    good = conversation("<image>\nWhat is in the picture?", "red", image="test00.png")
    broken = conversation("<image>\nWhat?", "red", image="broken.png")
    images = tmp_path / "images"
    images.mkdir()
    for name in ("test00.png", "test01.png"):
        Image.open(painted / "images" / name).save(images / name)
    (images / "broken.png").write_text("no picture")
    lines = [good, broken, good | {"image": "test01.png"}, conversation("Hi?", "Hello.")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    report = score(assets, painted, tmp_path, data_path=tmp_path / "data.jsonl", images_path=images)
    assert report["left_out"] == {"no images": 1, "broken": 2}
    assert report["right"]["all"]["total"] == report["shuffled"]["all"]["total"] == 2
    captured = capfd.readouterr()
    assert "3 record(s) are left out: 1 no images, 2 broken" in captured.out
    assert "warning: 2 broken record(s), as data.jsonl:" in captured.err
