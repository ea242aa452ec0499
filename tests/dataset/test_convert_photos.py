"""If this fails, a real data set is no longer the same once it has been converted and back."""

import json
from itertools import islice

import pytest
from support.scripts import train_flags

from dataset import convert
from dataset.records.reader import open_records
from trainer import train_sft_vlm

NUM_TRAINED = 96


def contents_of(data, images) -> list:
    records = open_records(data, images)
    found = []
    for i in range(len(records)):
        record = records[i]
        pictures = [hash(records.read_image(image)) for image in record.images]
        found.append((record.messages, pictures))
    return found


def losses_of(assets, folder, data, images) -> list[float]:
    argv = train_flags(assets, folder, data, images, epochs=1, batch_size=4)
    assert train_sft_vlm.main(argv) == 0
    lines = next((folder / "out").glob("*_metrics.jsonl")).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.full
def test_photos_survive_parquet_and_the_way_back(shared, assets, tmp_path):
    source = shared / "data" / "flickr8k224" / "val"
    images = source / "images.zip"
    few = tmp_path / "few.jsonl"
    with open(source / "data.jsonl", encoding="utf-8") as lines:
        few.write_text("".join(islice(lines, NUM_TRAINED)), encoding="utf-8")
    for name, data, is_trained in (("all", source / "data.jsonl", False), ("few", few, True)):
        table, back = tmp_path / name / "a.parquet", tmp_path / name / "b.jsonl"
        table.parent.mkdir()
        for argv in ([data, "--images_path", images, "--to", table], [table, "--to", back]):
            assert convert.main([str(one) for one in argv]) == convert.DONE
        zipped = back.with_name("b_images.zip")
        wanted = contents_of(data, images)
        assert len(wanted) == (NUM_TRAINED if is_trained else 10_000)
        assert contents_of(table, None) == wanted == contents_of(back, zipped)
        if is_trained:
            plain = losses_of(assets, tmp_path / "plain", data, images)
            assert len(plain) == NUM_TRAINED // 4
            assert losses_of(assets, tmp_path / "table", table, None) == plain
            assert losses_of(assets, tmp_path / "back", back, zipped) == plain
