"""If this fails, one of the supported data layouts gives the model other text, pictures or
supervised tokens than its records hold, or a batch is put together wrongly.
"""

import json
import pickle
import shutil
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from support.tiny_parts import conversation, make_records

from dataset.collate import VLMCollator
from dataset.lm_dataset import BadSample, VLMDataset
from dataset.records.conversation import BadRecordError
from dataset.records.reader import default_data_paths, open_records
from model.vision_tower import load_image_processor, load_vision_config
from model.vlm_processor import VLMProcessor, load_tokenizer
from model.weights.build_model import placeholder_config


@pytest.fixture(scope="module")
def processor(assets):
    tokenizer = load_tokenizer(assets / "tokenizer")
    tower = assets / "tower"
    images = load_image_processor(tower, load_vision_config(tower))
    config = placeholder_config({"hidden_size": 32}, tokenizer, tower)
    return VLMProcessor(tokenizer, images, config=config)


def write_lines(folder, *lines):
    path = folder / "data.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def assert_same_sample(left, right):
    for name in ("input_ids", "labels", "image_mask", "pixel_values"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def test_both_generations_give_the_same_sample(tmp_path, processor):
    _, images = make_records(tmp_path)
    turns = conversation("<image> What?", "A circle.")["conversations"]
    old = [{"from": {"user": "human"}.get(t["role"], "gpt"), "value": t["content"]} for t in turns]
    data = write_lines(
        tmp_path,
        {"conversations": turns, "image": "0_0.png"},
        {"id": "7", "image": "0_0.png", "conversations": old},
    )
    dataset = VLMDataset(data, images, processor)
    assert_same_sample(dataset[0], dataset[1])
    answer = dataset[0].input_ids[dataset[0].labels != -100]
    assert processor.tokenizer.decode(answer) == "A circle.<|im_end|>\n"


def test_roles_come_from_the_record_not_from_parity(tmp_path, processor):
    system = {"role": "system", "content": "Be brief."}
    turns = conversation("What?", "A circle.")["conversations"]
    data = write_lines(
        tmp_path, {"conversations": [system, *turns]}, {"conversations": [*turns, turns[1]]}
    )
    dataset = VLMDataset(data, None, processor)
    targets = [processor.tokenizer.decode(s.input_ids[s.labels != -100]) for s in dataset]
    assert targets == ["A circle.<|im_end|>\n", "A circle.<|im_end|>\n" * 2]
    assert "Be brief." in processor.tokenizer.decode(dataset[0].input_ids)


def test_images_are_found_in_folder_zip_and_list(tmp_path, processor):
    data, images = make_records(tmp_path, multi=True)
    from_folder = VLMDataset(data, images, processor)
    zipped = tmp_path / "elsewhere"
    with zipfile.ZipFile(tmp_path / "elsewhere.zip", "w") as archive:
        for path in images.iterdir():
            archive.write(path, f"images/{path.name}")
    from_zip = pickle.loads(pickle.dumps(VLMDataset(data, zipped, processor)))
    assert {len(s.pixel_values) for s in from_folder} == {0, 1, 2}
    for left, right in zip(from_folder, from_zip, strict=True):
        assert_same_sample(left, right)
    listed = write_lines(
        tmp_path, conversation("<image><image>", "Yes.", image=["0_1.png", "0_2.png"])
    )
    assert len(VLMDataset(listed, images, processor)[0].pixel_values) == 2


def test_parquet_gives_the_samples_of_its_jsonl(tmp_path, processor):
    data, images = make_records(tmp_path, multi=True)
    raw = [json.loads(line) for line in data.open()]
    columns = {"conversations": [json.dumps(r["conversations"]) for r in raw], "image_bytes": []}
    for record in raw:
        names = [n.strip() for n in record.get("image", "").split(",") if n.strip()]
        columns["image_bytes"].append([(images / n).read_bytes() for n in names])
    table = pyarrow.table(
        columns,
        schema=pyarrow.schema(
            {"conversations": pyarrow.string(), "image_bytes": pyarrow.list_(pyarrow.binary())}
        ),
    )
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    parquet = VLMDataset(tmp_path / "data.parquet", None, processor)
    jsonl = VLMDataset(data, images, processor)
    assert len(parquet) == len(jsonl) == 24
    for left, right in zip(parquet, jsonl, strict=True):
        assert_same_sample(left, right)


def test_parquet_with_plain_binary_images(tmp_path, processor):
    _, images = make_records(tmp_path)
    turns = json.dumps(conversation("<image> What?", "A circle.")["conversations"])
    table = pyarrow.table(
        {"conversations": [turns], "image_bytes": [(images / "0_0.png").read_bytes()]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    assert len(VLMDataset(tmp_path / "data.parquet", None, processor)[0].pixel_values) == 1
    with pytest.raises(ValueError, match="no column 'image_bytes'"):
        pyarrow.parquet.write_table(table.select(["conversations"]), tmp_path / "data.parquet")
        open_records(tmp_path / "data.parquet", None)


def test_blank_lines_are_no_records_and_keep_line_numbers(tmp_path):
    good = conversation("What?", "A circle.")
    records = open_records(write_lines(tmp_path, good, "", "  ", good, "{broken", ""), None)
    assert len(records) == 3 and records.num_blank == 3
    assert [records[i].where for i in (0, 1)] == ["data.jsonl:1", "data.jsonl:4"]
    with pytest.raises(BadRecordError, match=r"data.jsonl:5: not valid JSON"):
        records[2]


BAD_RECORDS = {
    "role": (conversation("<image>", "x", image="0_0.png") | {"conversations": [
        {"role": "robot", "content": "x"}]}, "message 1 has role 'robot'; allowed are"),
    "no role": ({"conversations": [{"content": "x"}]}, "message 1 has role None"),
    "late system": ({"conversations": [{"role": "user", "content": "x"},
        {"role": "system", "content": "x"}]}, "message 2 is a system message"),
    "no answer": ({"conversations": [{"role": "user", "content": "x"}]}, "no assistant message"),
    "no text": ({"conversations": [{"role": "user", "content": 3}]}, "no text"),
    "no list": ({"conversations": "hello"}, "must be a list"),
    "no object": ([1, 2], "must be a JSON object"),
    "tags": (conversation("<image> <image>", "x", image="0_0.png"), "2 <image> tag(s) but 1 image"),
    "no tag": (conversation("What?", "x", image="0_0.png"), "0 <image> tag(s) but 1 image"),
    "tag in answer": (conversation("<image>", "<image>", image="0_0.png"), "an answer, holds"),
    "missing": (conversation("<image>", "x", image="gone.png"), "image 'gone.png' is not in"),
    "image field": (conversation("<image>", "x", image=5), "'image' must be a file name"),
    "special": (conversation("<|im_end|>", "x"), "special token <|im_end|>"),
    "literal": (conversation("@" * 16, "x"), "holds the image placeholder"),
    "too long": (conversation("long " * 900, "x"), "no supervised token within 640 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_record_says_where_and_what(case, tmp_path, processor):
    record, message = BAD_RECORDS[case]
    _, images = make_records(tmp_path, num_records=1)
    data = write_lines(tmp_path, "", record)
    with pytest.raises(BadRecordError) as caught:
        VLMDataset(data, images, processor)[0]
    assert str(caught.value).startswith("data.jsonl:2: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)
    returned = VLMDataset(data, images, processor, on_bad_sample="return")[0]
    assert returned == BadSample(0, str(caught.value))


def test_broken_pictures_are_named(tmp_path, processor):
    _, images = make_records(tmp_path, num_records=1)
    Image.new("RGB", (64, 64)).save(images / "whole.jpg")
    (images / "cut.jpg").write_bytes((images / "whole.jpg").read_bytes()[:400])
    (images / "text.jpg").write_text("hello")
    (images / "empty.jpg").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.jpg"):
        data = write_lines(tmp_path, conversation("<image>", "x", image=name))
        with pytest.raises(BadRecordError, match=rf"^data.jsonl:1: not a readable .*'{name}'\)$"):
            VLMDataset(data, images, processor)[0]


def test_truncation_keeps_whole_images(tmp_path, processor):
    _, images = make_records(tmp_path, num_records=4)
    turns = conversation("<image> What?", "A circle.")["conversations"]
    more = conversation("<image> And this?", "A circle.")["conversations"]
    data = write_lines(tmp_path, {"conversations": turns + more, "image": "0_0.png, 0_1.png"})
    whole = VLMDataset(data, images, processor)[0]
    second_image = int(whole.image_mask.nonzero()[16])
    for limit in range(second_image - 3, len(whole.input_ids) + 1):
        sample = VLMDataset(data, images, processor, max_length=limit)[0]
        num_images = 1 if limit < second_image + 16 else 2
        assert len(sample.pixel_values) == num_images
        assert int(sample.image_mask.sum()) == 16 * num_images
        length = second_image if second_image < limit < second_image + 16 else limit
        assert len(sample.input_ids) == length
        assert torch.equal(sample.labels, whole.labels[:length])
        assert sample.is_truncated == (limit < len(whole.input_ids))


def test_collator_pads_to_the_longest_of_the_batch(tmp_path, processor):
    data, images = make_records(tmp_path, multi=True)
    dataset = VLMDataset(data, images, processor)
    samples = [dataset[i] for i in (3, 0, 6)]  # no picture, one, two
    batch = VLMCollator(pad_token_id=0)([*samples, BadSample(9, "data.jsonl:9: broken")])
    inputs = batch.inputs
    longest = max(len(s.input_ids) for s in samples)
    assert inputs["input_ids"].shape == inputs["labels"].shape == (3, longest)
    assert len(inputs["pixel_values"]) == 3
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        assert torch.equal(inputs["input_ids"][row, :length], sample.input_ids)
        assert (inputs["labels"][row, length:] == -100).all()
        assert inputs["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
    assert (batch.num_samples, batch.num_sequences, len(batch.bad_samples)) == (4, 3, 1)
    assert batch.num_tokens == sum(len(s.input_ids) for s in samples)
    assert batch.num_supervised == int((inputs["labels"][:, 1:] != -100).sum())


def test_batch_of_bad_samples_supervises_nothing():
    batch = VLMCollator(pad_token_id=0)([BadSample(0, "broken")])
    assert batch.num_supervised == batch.num_sequences == 0 and batch.num_samples == 1
    assert (batch.inputs["labels"] == -100).all()


def test_missing_files_are_named(tmp_path, processor):
    data, images = make_records(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone.jsonl.*--data_path"):
        open_records(tmp_path / "gone.jsonl", images)
    with pytest.raises(FileNotFoundError, match="gone.*--images_path"):
        open_records(data, tmp_path / "gone")
    data.write_text("\n\n")
    with pytest.raises(ValueError, match="no records"):
        open_records(data, images)
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match="not a readable Parquet"):
        open_records(tmp_path / "bad.parquet", None)


def test_fingerprint_follows_the_content_not_the_place(tmp_path):
    data, images = make_records(tmp_path)
    first = open_records(data, images).fingerprint
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    assert open_records(tmp_path / "moved.jsonl", images).fingerprint == first
    with open(moved, "a") as file:
        file.write(json.dumps(conversation("What?", "x")) + "\n")
    assert open_records(tmp_path / "moved.jsonl", images).fingerprint != first


def test_default_paths_are_the_contracts(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.records.reader.DATASET_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match="pretrain_data.jsonl.*--data_path"):
        default_data_paths("pretrain")
    for kind, name, images in (
        ("pretrain", "pretrain_vlm_data.jsonl", "pretrain_images"),
        ("pretrain", "pretrain_data.jsonl", "pretrain_images"),
        ("sft", "sft_vlm_data.jsonl", "sft_images"),
        ("multi", "sft_vlm_data_multi.jsonl", "sft_multi_images_trans_image"),
    ):
        (tmp_path / name).touch()
        assert default_data_paths(kind) == (tmp_path / name, tmp_path / images)
