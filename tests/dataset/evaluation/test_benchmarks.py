"""If this fails, a published benchmark is misread: a column of its file is taken for another, the
answers are shifted, or pictures go to the wrong questions.
"""

import pytest
from support import benchmark_files as files
from support.choice_files import options_of, png

from dataset.evaluation.benchmarks import BENCHMARKS, BenchmarkData
from dataset.evaluation.multiple_choice import Choice


def read(name: str, path, images=None, **options) -> list:
    return list(BenchmarkData(BENCHMARKS[name], path, images, **options))


@pytest.mark.parametrize(
    ("name", "file", "write"),
    [
        ("mmstar", "mmstar.parquet", files.write_mmstar),
        ("mmbench", "MMBench_DEV_EN.tsv", files.write_mmbench),
        ("scienceqa", "test.parquet", files.write_scienceqa),
    ],
)
def test_letters(name, file, write, painted, tmp_path):
    write(tmp_path / file, painted)
    rows = read(name, tmp_path / file)[: files.NUM]
    questions = [row for row in rows if isinstance(row, Choice)]
    assert len(questions) >= files.NUM - 1
    for i, question in enumerate(questions):
        options, answer = options_of(i)
        assert question.question == files.QUESTION and list(question.options) == options
        assert "ABC"[question.answer] == answer and question.image == png(painted, i)
        assert question.prompt("letter").startswith("<image>\n")


def test_mmbench_turns_belong_to_one_question(painted, tmp_path):
    files.write_mmbench(tmp_path / "MMBench_DEV_EN.tsv", painted)
    questions = read("mmbench", tmp_path / "MMBench_DEV_EN.tsv")
    assert len(questions) == 3 * files.NUM
    for i in range(files.NUM):
        turns = [q for q in questions if q.question_id == str(i)]
        assert len(turns) == 3 and {q.image for q in turns} == {png(painted, i)}
        assert len({q.options[q.answer] for q in turns}) == 1 < len({q.options for q in turns})


def test_scienceqa_without_picture_is_told(painted, tmp_path):
    files.write_scienceqa(tmp_path / "test.parquet", painted)
    rows = read("scienceqa", tmp_path / "test.parquet")
    assert str(rows[-1]) == "test.parquet:row 5: no image"
    assert rows[1].hint == "Look closely." and rows[0].hint == ""
    assert (rows[0].category, rows[0].l2_category) == ("natural science", "physics")


def test_pope_as_table_and_as_lines(painted, tmp_path):
    files.write_pope(tmp_path / "test-00000-of-00001.parquet", painted)
    files.write_pope_lines(tmp_path / "coco_pope_random.json", painted)
    table = read("pope", tmp_path / "test-00000-of-00001.parquet")
    lines = read("pope", tmp_path / "coco_pope_random.json", painted / "images")
    expected = files.pope_rows()
    for rows in (table, lines):
        assert len(rows) == len(expected)
        for row, (i, colour, answer) in zip(rows, expected, strict=True):
            assert row.question == files.pope_text(colour) and row.options == ("Yes", "No")
            assert ("yes", "no")[row.answer] == answer and row.image == png(painted, i)
    assert {row.category for row in table} == {"adversarial", "popular", "random"}
    assert table[0].prompt("word").endswith("Answer the question using a single word or phrase.")


def test_parts_follow_one_another(painted, tmp_path):
    for part in range(2):
        files.write_pope(tmp_path / f"test-0000{part}-of-00002.parquet", painted)
    rows = read("pope", tmp_path)
    assert [row.index for row in rows] == list(range(4 * files.NUM))
    assert len(read("pope", tmp_path, num_records=15)) == 15


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("pope", files.write_mmstar, None),  # it has POPE's columns; its answers are no yes or no
        (
            "mmstar",
            files.write_pope,
            "no column A, B, only id, question_id, .*MMStar.tsv.*, or q",
        ),
        ("scienceqa", files.write_mmstar, "no column choices, hint, subject, topic, only index"),
        ("mmbench", files.write_mmstar, "no column A, B, only index"),
    ],
)
def test_file_of_another_benchmark_is_refused(name, write, message, painted, tmp_path):
    write(tmp_path / "a.parquet", painted)
    if message is None:
        assert all(
            "NO YES OR NO' is none of A, B" in str(row)
            for row in read(name, tmp_path / "a.parquet")
        )
        return
    with pytest.raises(ValueError, match=message) as error:
        read(name, tmp_path / "a.parquet")
    assert "\n" not in str(error.value)


def test_lines_need_their_pictures(painted, tmp_path):
    path = tmp_path / "coco_pope_random.json"
    files.write_pope_lines(path, painted)
    with pytest.raises(ValueError, match="names its pictures; say where they lie by --images_path"):
        read("pope", path)
    (tmp_path / "images").mkdir()
    assert "its image 'test00.png' is not in" in str(read("pope", path, tmp_path / "images")[0])
    path.write_text(path.read_text() + "[1]\n")
    with pytest.raises(ValueError, match=r"coco_pope_random.json:13: expected a JSON object"):
        read("pope", path, painted / "images")
