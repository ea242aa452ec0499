"""If this fails, the published set's records with a tag too many are lost, or learnt wrongly."""

import json

import pytest
from support.scripts import train_flags
from support.tiny_parts import conversation, make_records

from dataset.records.conversation import BadRecordError
from dataset.records.layout import drop_surplus_tags
from dataset.records.reader import open_records
from trainer import train_sft_vlm


def test_surplus_tags_are_named_or_dropped(tmp_path):
    _, images = make_records(tmp_path, num_records=3)
    data = tmp_path / "a.jsonl"
    lines = [
        conversation("<image>\n<image>\n<image>\nAlike?", "Yes.", image="0_0.png, 0_1.png"),
        conversation("<image> Alike?", "Yes.", image="0_0.png, 0_1.png"),
        conversation("<image> Alike?", "Yes."),
        conversation("<image> and <image>?", "Yes.", image="0_0.png,0_1.png"),
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    records = open_records(data, images)
    says = r"^a.jsonl:1: 3 <image> tag\(s\) but 2 image.*'0_0.png', '0_1.png'.*--fix_image_count 1"
    with pytest.raises(BadRecordError, match=says):
        records[0]
    fixed = open_records(data, images, fix_image_count=True)
    assert fixed[0].messages[0]["content"] == "<image>\n<image>\nAlike?"
    assert fixed[0].images == ["0_0.png", "0_1.png"] and fixed[3] == records[3]
    for index in (1, 2):  # a picture without a tag, and a tag without any picture, stay faults
        with pytest.raises(BadRecordError, match="tag") as caught:
            fixed[index]
        assert "fix_image_count" not in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["<image><image>\nWhat?"], ["<image>\nWhat?"]),
        (["What?\n<image>\n<image>"], ["What?\n<image>"]),
        (["a <image> b <image> c"], ["a <image> b  c"]),
        (["<image>", "yes", "<image>\nAnd this?"], ["<image>", "yes", "And this?"]),
    ],
)
def test_later_tags_are_dropped(texts, wanted):
    messages = [{"role": "user", "content": text} for text in texts]
    assert [m["content"] for m in drop_surplus_tags(messages, num_images=1)] == wanted


@pytest.mark.slow
def test_a_run_with_dropped_tags_is_another_run(assets, tmp_path, capfd):
    data, images = make_records(tmp_path / "data", num_records=8)
    text = data.read_text()
    data.write_text(text.replace("<image>", "<image><image>", 1))
    argv = train_flags(assets, tmp_path, data, images)
    assert train_sft_vlm.main(argv) == 1
    assert "data_0.jsonl:1: 2 <image> tag(s) but 1 image" in capfd.readouterr().err
    assert train_sft_vlm.main([*argv, "--fix_image_count", "1"]) == 0
    assert "left out" not in capfd.readouterr().err
    argv = [*train_flags(assets, tmp_path, data, images), "--from_resume", "1"]
    assert train_sft_vlm.main(argv) == 1
    data.write_text(text)  # no record is bad, and still it is another run
    assert train_sft_vlm.main([*argv, "--fix_image_count", "1"]) == 1
