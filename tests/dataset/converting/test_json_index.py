"""If this fails, elements of a JSON file are not found, or at another line than they stand."""

import json

import pytest

from dataset.converting.json_index import index_arrays
from dataset.records.conversation import BadRecordError


def indexed(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return index_arrays(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_elements_are_those_of_json(tmp_path, indent):
    values = [{"a": [1, {"b": 'x]}"\\'}], "图": "，"}, 3, "s, [", [], [[1], 2], None, {}]
    (array,) = indexed(tmp_path, json.dumps(values, indent=indent)).values()
    assert [array[i] for i in range(len(array))] == values and array.cut_at is None
    whole = {"info": {"x": [1, 2]}, "n": "images", "images": values, "e": [], "annotations": [1]}
    arrays = indexed(tmp_path, json.dumps(whole, indent=indent, ensure_ascii=False))
    assert list(arrays) == ["images", "e", "annotations"]
    assert [arrays["images"][i] for i in range(len(values))] == values
    assert len(arrays["e"]) == 0 and arrays["annotations"][0] == 1


def test_lines_are_those_of_the_file(tmp_path):
    (array,) = indexed(tmp_path, '\n[{"a":\n 1},\n\n{"a": "x\\n"}, {"b": 2}\n]').values()
    assert array.lines.tolist() == [2, 5, 5]
    places = [array.where(i).partition("a.json:")[2] for i in range(3)]
    assert places == ["2", "5, element 2", "5, element 3"]


def test_broken_element_costs_no_other(tmp_path):
    (array,) = indexed(tmp_path, b'[{"a": 1},\n{"a" 1},\n{"a": "\xff"},\n{"a": 4}]').values()
    assert len(array) == 4 and array[0] == {"a": 1} and array[3] == {"a": 4}
    for index, message in ((1, "a.json:2: not valid JSON"), (2, "a.json:3: not UTF-8")):
        with pytest.raises(BadRecordError, match=message):
            array[index]


@pytest.mark.parametrize(
    ("text", "num"),
    [('[1,\n2,\n"abc', 2), ('[{"a": 1}, {"a": ', 1), ("[", 0), ('[1, 2, "' + '\\"' * 50_000, 2)],
)
def test_file_that_is_cut_keeps_what_is_whole(tmp_path, text, num):
    (array,) = indexed(tmp_path, text).values()
    assert len(array) == num and array.cut_at == text.count("\n") + 1


@pytest.mark.parametrize("text", ["", " ", "1", '"[1]"', "]]][1]", "}", "\0\0", '{"a": 1}'])
def test_other_json_has_no_arrays(tmp_path, text):
    assert indexed(tmp_path, text) == {}
