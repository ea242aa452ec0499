"""If this fails, a model's figures on MMStar, MMBench, ScienceQA or POPE are not what their own
rules give, so that they cannot stand beside published ones.
"""

import json

import pytest
from support import benchmark_files as files
from support.painted import eval_flags

import eval_vlm
from model.evaluation.answer_rules import RULES, is_clear

COLOURS = ("red", "green", "blue")


def run(assets, painted, path, name, **values) -> dict:
    out = path.with_suffix(".scores")
    flags = {"benchmark": name, "data_path": path, "json": out, "images_path": None} | values
    assert eval_vlm.main(eval_flags(assets, painted, **flags)) == 0
    return json.loads(out.read_text())


def test_mmbench_counts_questions_in_every_order(assets, painted, tmp_path, capfd):
    path = tmp_path / "MMBench_DEV_EN.tsv"
    files.write_mmbench(path, painted)
    report = run(assets, painted, path, "mmbench", compare="early")
    cell, rows = report["categories"]["all"], report["predictions"]
    assert cell["total"] == 18 and cell["questions"] == 6
    assert cell["chance"] == pytest.approx(1 / 3)
    assert cell["circular_chance"] == pytest.approx(1 / 27)
    for column, way in ((2, "likelihood"), (3, "generation")):
        right = [row[1] == row[column] for row in rows]
        all_right = [all(right[i::6]) for i in range(6)]
        assert cell[way]["accuracy"]["value"] == pytest.approx(sum(right) / 18)
        assert cell[way]["circular"]["value"] == pytest.approx(sum(all_right) / 6)
    for row in rows:
        assert row[3] == RULES["letter"](row[4], options_in(path)[row[0]])
    # What the likelihood of the letters says is what --choices says of the same file.
    values = {"benchmark": None, "data_path": None, "choices": path}
    choices = run(assets, painted, path, "mmbench", **values)
    assert [p[2] for p in choices["predictions"]] == [row[2] for row in rows]
    gain = report["compare"]["difference"]["generation"]["accuracy"]
    both = [
        r["categories"]["all"]["generation"]["accuracy"]["value"]
        for r in (report, report["compare"])
    ]
    assert gain["value"] == pytest.approx(both[1] - both[0])
    out = capfd.readouterr().out
    assert "| MMBench | by | rows | accuracy, % [95%] | chance | in every order, % [95%] |" in out
    assert "| all | generation | 18 | " in out and "| 33.3 |" in out and "| 3.7 |" in out


def options_in(path) -> list[tuple[str, ...]]:
    from dataset.evaluation.multiple_choice import ChoiceFile

    return [choice.options for choice in ChoiceFile(path)]


def test_pope_gives_precision_recall_and_the_share_of_yes(assets, painted, tmp_path, capfd):
    path = tmp_path / "coco_pope_random.json"
    files.write_pope_lines(path, painted)
    report = run(assets, painted, path, "pope", images_path=painted / "images")
    labels = [answer == "yes" for _, _, answer in files.pope_rows()]
    for column, way in ((2, "likelihood"), (3, "generation")):
        says = [row[column] == 0 for row in report["predictions"]]
        hits = sum(a and b for a, b in zip(says, labels, strict=True))
        right = sum(a == b for a, b in zip(says, labels, strict=True))
        found = report["categories"]["all"][way]
        assert found["accuracy"]["value"] == pytest.approx(right / 12)
        assert found["yes_share"]["value"] == pytest.approx(sum(says) / 12)
        assert found["recall"]["value"] == pytest.approx(hits / 6)
        if sum(says):
            assert found["precision"]["value"] == pytest.approx(hits / sum(says))
        assert found["f1"]["value"] == pytest.approx(2 * hits / (sum(says) + 6))
        assert all(f["low"] <= f["value"] <= f["high"] for f in found.values() if f)
    assert report["rule"] == "yes unless no" and report["decoding"]["temperature"] == 0
    assert "| POPE | by | rows | accuracy, % [95%] | chance | precision" in capfd.readouterr().out


def test_first_questions_of_a_file_with_some_unusable(assets, painted, tmp_path, capfd):
    path = tmp_path / "test.parquet"
    files.write_scienceqa(path, painted)
    report = run(assets, painted, path, "scienceqa", max_new_tokens=4)
    assert report["categories"]["natural science / physics"]["total"] == files.NUM - 1
    assert report["left_out"] == {"unusable": 1}
    assert "1 question(s) are left out, as test.parquet:row 5: no image" in capfd.readouterr().err
    assert len(run(assets, painted, path, "scienceqa", num_records=2)["predictions"]) == 2


@pytest.mark.parametrize(
    ("rule", "answer", "option"),
    [
        ("letter", "B", 1),
        ("letter", "(B) the green one.", 1),
        ("letter", "The answer is C.", 2),
        ("letter", "A", 0),
        ("letter", "A very green wall", 1),  # the article, then the option's text
        ("letter", "B or C", None),
        ("letter", "D", None),  # there are three options
        ("letter", "It is Blue", 2),
        ("letter", "red or blue", None),
        ("letter", "x" * 40 + " red", None),
        ("letter", "", None),
        ("first letter", " b ", 1),
        ("first letter", "C. blue", 2),
        ("first letter", "The answer is C.", None),
        ("first letter", "blue", None),
        ("first letter", "D. none", None),
        ("first letter", "", None),
        ("yes unless no", "Yes, there is.", 0),
        ("yes unless no", "No", 1),
        ("yes unless no", "There is not, I think", 1),
        ("yes unless no", "Yes. No.", 0),
        ("yes unless no", "A dog", 0),
        ("yes unless no", "", 0),
    ],
)
def test_rule_reads_an_option(rule, answer, option):
    assert RULES[rule](answer, COLOURS) == option
    says = {"A dog": False, "": False}.get(answer, True)
    assert is_clear(answer, rule, COLOURS) is (
        says if rule == "yes unless no" else option is not None
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"data_path": None},
            "--benchmark pope needs its published file (`python dataset/download.py pope`): name",
        ),
        ({"data_path": "gone.parquet"}, "no data file gone.parquet"),
        ({"images_path": None}, "names its pictures; say where they lie by --images_path"),
        ({"cache_vision_features": 1}, "keeps features of records, not of a --benchmark"),
        ({"benchmark": "mmstar"}, "no column question, A, B, answer, only question_id"),
    ],
)
def test_wrong_use_is_one_clear_line(values, message, assets, painted, tmp_path, capfd):
    path = tmp_path / "coco_pope_random.json"
    files.write_pope_lines(path, painted)
    images = painted / "images" if "data_path" not in values else None
    flags = {"benchmark": "pope", "data_path": path, "images_path": images} | values
    assert eval_vlm.main(eval_flags(assets, painted, **flags)) == 1
    err = capfd.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
