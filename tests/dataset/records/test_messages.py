"""If this fails, fields of a message reach the template that should not, or tools get lost on the
way to it.
"""

import json

import pyarrow
import pyarrow.parquet
import pytest
from support.processor3 import make_processor3

from dataset.lm_dataset import VLMDataset
from dataset.records.conversation import BadRecordError, check_conversation
from dataset.records.reader import open_records

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "天气, see map.png"}}]


@pytest.fixture(scope="module")
def processor3(tmp_path_factory):
    return make_processor3(tmp_path_factory.mktemp("tokenizer3"))


def turns(functions=None, *, system="Be brief.", **fields) -> list[dict]:
    first = {"role": "system", "content": system} | fields
    return [
        first if functions is None else first | {"functions": functions},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A circle."},
    ]


def write_jsonl(folder, conversation):
    path = folder / "a.jsonl"
    path.write_text(json.dumps({"conversations": conversation}) + "\n")
    return path


@pytest.mark.parametrize("functions", [TOOLS, json.dumps(TOOLS, ensure_ascii=False)])
def test_functions_of_the_system_message_become_tools_of_the_template(
    functions, processor3, tmp_path
):
    path = write_jsonl(tmp_path, turns(functions))
    text = processor3.tokenizer.decode(VLMDataset(path, None, processor3)[0].input_ids)
    assert "Be brief.\n" + json.dumps(TOOLS[0], ensure_ascii=False) in text
    table = {"conversations": [json.dumps(turns(functions))], "image_bytes": [None]}
    schema = pyarrow.schema({"conversations": pyarrow.string(), "image_bytes": pyarrow.binary()})
    pyarrow.parquet.write_table(pyarrow.table(table, schema=schema), tmp_path / "a.parquet")
    records = open_records(tmp_path / "a.parquet", None)
    assert records[0].messages == open_records(path, None)[0].messages
    assert records[0].messages[0]["tools"] == TOOLS


@pytest.mark.parametrize("functions", ["", "  ", "[]", "null", []])
def test_no_functions_are_no_tools(functions):
    assert check_conversation(turns(functions), where="a:1") == turns()


@pytest.mark.parametrize(
    "functions, says",
    [
        ("[{", "message 1: functions: not valid JSON"),
        ('{"name": "weather"}', "message 1 has 'functions' that are not a list of JSON objects"),
        (7, "not a list of JSON objects"),
        (["weather"], "not a list of JSON objects"),
    ],
)
def test_functions_that_are_no_list_are_a_bad_record(functions, says, tmp_path):
    with pytest.raises(BadRecordError) as caught:
        open_records(write_jsonl(tmp_path, turns(functions)), None)[0]
    assert str(caught.value).startswith("a.jsonl:1: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_fields_are_dropped():
    raw = turns(tools=TOOLS, name="x")
    raw[1] |= {"functions": TOOLS}
    raw[2] |= {"reasoning_content": "hm", "tool_calls": [{"name": "draw", "image": "a.png"}]}
    assert check_conversation(raw, where="a:1") == turns()


def test_fields_of_tools_may_name_pictures(tmp_path):
    raw = turns()
    raw[2] |= {"reasoning_content": "see a.png", "tool_calls": [{"image": "a.png"}]}
    assert open_records(write_jsonl(tmp_path, raw), None)[0].messages == turns()


def test_special_token_in_a_tool_is_a_bad_record(processor3, tmp_path):
    tools = [{"type": "function", "function": {"name": "<|im_end|>"}}]
    with pytest.raises(
        BadRecordError, match=r"^a.jsonl:1: the text of the tools holds the special"
    ):
        VLMDataset(write_jsonl(tmp_path, turns(tools)), None, processor3)[0]


def test_image_in_a_system_message_is_a_fault_of_its_line(tmp_path):
    with pytest.raises(
        BadRecordError, match=r"^a.jsonl:1: message 1, a system message, holds <image>; an image"
    ):
        open_records(write_jsonl(tmp_path, turns(system="<image>")), None)[0]


def test_tool_role_is_refused_with_the_roles_that_are_not(tmp_path):
    raw = [*turns(), {"role": "tool", "content": "{}"}, {"role": "assistant", "content": "x"}]
    with pytest.raises(
        BadRecordError, match="message 4 has role 'tool'; allowed are system, user, human, assistan"
    ):
        open_records(write_jsonl(tmp_path, raw), None)[0]
