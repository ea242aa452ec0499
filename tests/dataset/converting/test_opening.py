"""If this fails, conversion refuses a layout that training reads, or makes other records of it."""

import base64
import json
import shutil

import pytest
from support.layouts import every_layout, in_parts
from support.tiny_parts import conversation, make_records

from dataset import convert
from dataset.records.conversation import BadRecordError
from dataset.records.reader import open_records


def contents_of(data, images) -> list:
    records = open_records(data, images)
    return [
        (record.messages, [records.read_image(image) for image in record.images])
        for record in (records[i] for i in range(len(records)))
    ]


def converted(folder, data, images, *flags) -> list:
    argv = [data, "--to", folder / "out.parquet", "--num_processes", 1, *flags]
    argv += ["--images_path", images] if images else []
    assert convert.main([str(one) for one in argv]) == convert.DONE
    return contents_of(folder / "out.parquet", None)


def test_every_layout_of_training_is_converted(tmp_path):
    layouts = every_layout(tmp_path, num_records=6)
    wanted = contents_of(*layouts["folder"])
    upper = tmp_path / "upper.PARQ"
    upper.write_bytes((tmp_path / "a.parquet").read_bytes())
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / "0.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    lines, array = layouts["ms-swift"], layouts["JSON array"]
    for name, (data, images) in {"lines": lines, "arrays": array}.items():
        (tmp_path / name).mkdir()
        shutil.copy(data, tmp_path / name)
        layouts[name] = tmp_path / name, images
    shutil.copy(lines[0], tmp_path / "lines.json")
    layouts["lines in .json"] = tmp_path / "lines.json", lines[1]
    layouts["pattern of lines"] = tmp_path / "lines" / "*.jsonl", lines[1]
    for name, place in (layouts | {"upper": (upper, None), "tars": (tars, None)}).items():
        folder = tmp_path / "out" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        assert converted(folder, *place) == wanted, name


@pytest.mark.parametrize("is_typed", [False, True])
def test_arrays_with_names_in_a_text_or_in_typed_parts(is_typed, tmp_path):
    _, images = make_records(tmp_path, num_records=2)
    turns = conversation("<image><image>\nWhat?", "Circles.")["conversations"]
    fields = {"conversations": turns, "image": "0_0.png, 0_1.png"}
    if is_typed:
        fields = {"messages": in_parts(turns)}
        names = iter(("0_0.png", "0_1.png"))
        for part in fields["messages"][0]["content"]:
            part |= {"image": next(names)} if part["type"] == "image" else {}
    (tmp_path / "a.json").write_text(json.dumps([fields], indent=1))
    [(messages, pictures)] = converted(tmp_path, tmp_path / "a.json", images)
    assert messages[0]["content"] == "<image><image>\nWhat?"
    assert pictures == [(images / name).read_bytes() for name in ("0_0.png", "0_1.png")]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_types_stay_and_surplus_tags_go_where_that_is_asked_for(name, tmp_path, capsys):
    _, images = make_records(tmp_path, num_records=2)
    fields = conversation("<image><image>?", "A circle.", image="0_0.png") | {"types": ["shape"]}
    (tmp_path / name).write_text(json.dumps([fields] if name == "a.json" else fields))
    argv = [tmp_path / name, "--images_path", images, "--to", tmp_path / "bad.jsonl"]
    assert convert.main([*map(str, argv), "--num_processes", "1"]) == convert.FAULTY
    assert "(--fix_image_count 1 drops the surplus tags)" in capsys.readouterr().out
    [(messages, pictures)] = converted(tmp_path, tmp_path / name, images, "--fix_image_count", 1)
    assert messages[0]["content"] == "<image>?" and len(pictures) == 1
    assert open_records(tmp_path / "out.parquet", None)[0].types == ("shape",)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_pictures_in_base64_are_those_they_hold(name, tmp_path, monkeypatch):
    _, images = make_records(tmp_path, num_records=1)
    content = (images / "0_0.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    turns = conversation("<image>?", "A circle.")["conversations"]
    typed = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    records = [
        {"conversations": turns, "image": url},
        {"conversations": turns, "images": [url]},
        {"messages": [{"role": "user", "content": typed}, turns[1]]},
    ]
    lines = [json.dumps(one) for one in records]
    (tmp_path / name).write_text(f"[{','.join(lines)}]" if name == "a.json" else "\n".join(lines))
    assert contents_of(tmp_path / name, None) == converted(tmp_path, tmp_path / name, None)
    assert [pictures for _, pictures in contents_of(tmp_path / name, None)] == [[content]] * 3
    monkeypatch.setattr("dataset.records.images.MAX_IMAGE_BYTES", 10)
    records = open_records(tmp_path / name, None)
    with pytest.raises(BadRecordError, match="image 'data:image/png;.*a picture's file may have"):
        records[0]
    (tmp_path / "b.jsonl").write_text(json.dumps({"conversations": turns, "image": url[:23] + "?"}))
    with pytest.raises(BadRecordError, match="^b.jsonl:1: image 'data:image/png;.* cannot be read"):
        open_records(tmp_path / "b.jsonl", None)[0]
