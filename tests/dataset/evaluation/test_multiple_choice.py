"""Multiple choice: both layouts, answered by likelihood, with chance beside."""

import base64
import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from support.choice_files import options_of, png, write_tsv
from support.painted import eval_flags

import eval_vlm
from dataset.evaluation.multiple_choice import Choice, ChoiceFile, split_options


def write_parquet(path, painted, *, as_struct: bool) -> None:
    """A file like MMStar's: options in the question, pictures as bytes."""
    rows = []
    for i in range(6):
        options, answer = options_of(i)
        listed = ", ".join(f"{letter}: {text}" for letter, text in zip("ABC", options, strict=True))
        image = {"bytes": png(painted, i), "path": None} if as_struct else png(painted, i)
        rows.append(
            {
                "index": i,
                "question": f"What is in the picture?\nOptions: {listed}",
                "image": image,
                "answer": answer,
                "category": "perception",
                "l2_category": "colour",
                "meta_info": {"source": "painted"},
            }
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def run(assets, painted, path, **values) -> dict:
    out = path.with_suffix(".json")
    assert eval_vlm.main(eval_flags(assets, painted, choices=path, json=out, **values)) == 0
    return json.loads(out.read_text())


def test_mmbench_layout_by_the_options_texts(assets, painted, tmp_path, capfd):
    write_tsv(tmp_path / "bench.tsv", painted)
    report = run(assets, painted, tmp_path / "bench.tsv", choice_by="text")
    cells = report["categories"]
    assert cells["all"] == {"right": 10, "total": 10, "chance": pytest.approx(1 / 3)}
    assert cells["colour"]["total"] == cells["paint"]["total"] == 5
    assert cells["colour / attribute"]["total"] == 5
    assert [p[1] for p in report["predictions"]] == [p[2] for p in report["predictions"]]
    out = capfd.readouterr().out
    assert "100.0%" in out and "33.3%" in out


def test_wrong_pictures_make_it_fail(assets, painted, tmp_path):
    """What the accuracy rests on is the picture: with one picture for all it is chance."""
    image = base64.b64encode(png(painted, 0)).decode()
    write_tsv(tmp_path / "bench.tsv", painted, image=image)
    report = run(assets, painted, tmp_path / "bench.tsv", choice_by="text")
    assert report["categories"]["all"]["right"] == 4  # three red pictures, and the last row's


@pytest.mark.parametrize("as_struct", [False, True])
def test_mmstar_layout(as_struct, assets, painted, tmp_path):
    write_parquet(tmp_path / "star.parquet", painted, as_struct=as_struct)
    report = run(assets, painted, tmp_path / "star.parquet", choice_by="text")
    assert report["categories"]["perception / colour"]["right"] == 6
    questions = list(ChoiceFile(tmp_path / "star.parquet"))
    assert questions[0].question == "What is in the picture?" and len(questions[1].options) == 3


def test_letters_are_asked_with_the_options_listed(assets, painted, tmp_path):
    write_tsv(tmp_path / "bench.tsv", painted, count=4, hint="Look closely.")
    choice = next(iter(ChoiceFile(tmp_path / "bench.tsv")))
    assert choice.prompt("letter").splitlines() == [
        "<image>", "Look closely.", "What is in the picture?", "A. red", "B. green", "C. blue",
        "Answer with the option's letter from the given choices directly.",
    ]  # fmt: skip
    plain = run(assets, painted, tmp_path / "bench.tsv")["categories"]["all"]
    circular = run(assets, painted, tmp_path / "bench.tsv", circular=True)["categories"]["all"]
    # This model has never seen a letter: it prefers one, so it cannot be right in every order.
    assert circular["right"] == 0 <= plain["right"] and plain["total"] == 4


def test_turned_options_keep_the_right_one():
    choice = Choice(0, "x", "?", "", ("p", "q", "r"), 2, "all", "", b"")
    for shift in range(3):
        turned = choice.turned(shift)
        assert turned.options[turned.answer] == "r" and sorted(turned.options) == ["p", "q", "r"]
    assert choice.turned(1).options == ("q", "r", "p")


def test_options_inside_a_question():
    assert split_options("Which?\nOptions: A: On it., B: A. b. c., C: 1.5") == (
        "Which?",
        ["On it.", "A. b. c.", "1.5"],
    )
    assert split_options("Q\nChoices:\n(A) 2\n(B) 3") == ("Q", ["2", "3"])
    assert split_options("什么？\n选项：A. 红色 B. 蓝色") == ("什么？", ["红色", "蓝色"])
    for text in ("Is A: or B: right?", "Which of these options: red or blue?"):
        assert split_options(text) == (text, [])
    assert split_options("Which? Options: A: two choices: x, B: three")[1] == []


def test_rows_that_cannot_be_used_are_counted(assets, painted, tmp_path, capfd):
    write_tsv(tmp_path / "bench.tsv", painted, count=4)
    with (tmp_path / "bench.tsv").open("a") as file:
        file.write("7\tWhat?\t\tonly one\t\t\t\tA\tx\tnone\t\tdev\n")
        file.write("8\tWhat?\t\tred\tblue\t\t\tC\tx\tnone\t\tdev\n")
        file.write("9\tWhat?\t\tred\tblue\t\t\tB\tx\tno base64!\t\tdev\n")
        file.write(
            f"10\tWhat?\t\tred\tblue\t\t\tB\tx\t{base64.b64encode(b'x' * 80).decode()}\t\t\n"
        )
    report = run(assets, painted, tmp_path / "bench.tsv")
    assert report["categories"]["all"]["total"] == 4 and report["left_out"] == {"unusable": 4}
    assert "bench.tsv:row 4: no options" in capfd.readouterr().err
    reasons = [str(row) for row in ChoiceFile(tmp_path / "bench.tsv")][4:7]
    assert "answer 'C' is none of A, B" in reasons[1] and "not base64" in reasons[2]


ROWS = [["index", "question", "A", "B", "answer", "image"]] + [
    [str(i), f"What is {i}?", "red", "blue", "A", "none"] for i in range(10)
]


def write_rows(path, changes: dict[int, str], *, column: int = 1) -> None:
    """A file without quotes, with other texts in some of its rows."""
    rows = [list(row) for row in ROWS]
    for row, text in changes.items():
        rows[row + 1][column] = text
    path.write_text("".join("\t".join(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "changes",
    [
        {3: '"What is it?'},
        {3: '"What is it?', 8: 'Is it 3"'},  # six questions would be one cell of the fourth row
        {3: '"What is it?', 4: 'Is it 3"'},
        {3: '"What is it?', 8: '"Is it" or not?'},
        {3: '"Yes", he said'},
    ],
)
def test_unmatched_quote_is_named_with_its_line(changes, tmp_path):
    write_rows(tmp_path / "a.tsv", changes)
    with pytest.raises(ValueError, match=r"a\.tsv:5: a cell of this row begins with a quote") as e:
        ChoiceFile(tmp_path / "a.tsv")
    assert repr(changes[3])[1:12] in str(e.value) and "\n" not in str(e.value)


def test_quotes_of_pandas_are_read_as_they_were(tmp_path):
    """Published files come from `to_csv`: cells with quotes, tabs and line breaks are quoted."""
    cells = ['He said "hi".', '"Yes" he said', "two\nlines", "a\ttab", 'a\nb\t"c"', '3"', '"']
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(ROWS[0])
        writer.writerows([*ROWS[1][:1], cell, *ROWS[1][2:5], "aGVsbG8="] for cell in cells)
    choices = list(ChoiceFile(tmp_path / "a.tsv"))
    assert [c.question for c in choices] == [cell.strip() for cell in cells]


def test_nul_and_surplus_cells_are_named(tmp_path):
    write_rows(tmp_path / "a.tsv", {3: "What\0?"})
    with pytest.raises(ValueError, match=r"a\.tsv:5: holds a NUL character"):
        ChoiceFile(tmp_path / "a.tsv")
    write_rows(tmp_path / "a.tsv", {3: "What\tis it?"})
    rows = list(ChoiceFile(tmp_path / "a.tsv"))
    assert "row 3: has more cells than the file has columns" in str(rows[3]) and len(rows) == 10


def test_damage_within_a_parquet_file_is_found_at_once(painted, tmp_path):
    path = tmp_path / "star.parquet"
    write_parquet(path, painted, as_struct=False)
    whole = bytearray(path.read_bytes())
    start = len(whole) // 4
    whole[start : start + 200] = bytes(200)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"star\.parquet"):
        ChoiceFile(path)


def test_large_picture_is_one_cell(tmp_path):
    """Python's own limit is 128 KiB."""
    write_rows(tmp_path / "a.tsv", {2: "A" * 400_000}, column=5)
    assert len(list(ChoiceFile(tmp_path / "a.tsv"))[2].image) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.tsv", None, "no multiple-choice file"),
        ("a.csv", "question,answer,image\n", "expected a .tsv or .parquet file"),
        ("a.tsv", "index\tquestion\tA\tB\n", "no column answer, image"),
        ("a.tsv", "question\tanswer\timage\n", "no usable question"),
        ("a.tsv", "question\tanswer\timage\nWhat?\tA\tx\n", "no options: neither columns A, B"),
        ("a.tsv", "question\tanswer\timage\t问题\n", "a.tsv: not a readable TSV file in UTF-8"),
        ("a.tsv", "", "no column question, answer, image"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
    ],
)
def test_wrong_file_is_one_clear_line(name, content, message, assets, painted, tmp_path, capfd):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="gbk")
    assert eval_vlm.main(eval_flags(assets, painted, choices=tmp_path / name)) == 1
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err and err.startswith("error: ")
    assert err.count("\n") == 1
