"""If this fails, a model trained at another `--image_size` is scored at the tower's own, or the
features of two sizes are mixed up.
"""

import json

import pytest
from support.scripts import train_flags
from support.tiny_parts import make_records

import eval_vlm
from trainer import train_pretrain_vlm

SIDE = 64  # of a tower made for 32 with patches of 8: 64 image tokens in place of 16


@pytest.mark.slow
def test_size_follows_the_weight(assets, tmp_path, capsys):
    data, images = make_records(tmp_path, num_records=8)
    cache = tmp_path / "features"
    for size in (32, SIDE):
        flags = train_flags(
            assets, tmp_path / str(size), data, images, image_size=size,
            cache_vision_features=cache, freeze_llm=0,
        )  # fmt: skip
        assert train_pretrain_vlm.main(flags) == 0, capsys.readouterr().err
    assert len(list(cache.iterdir())) == 2
    weight = next((tmp_path / str(SIDE) / "out").glob("*.pth"))
    config = json.loads(weight.with_suffix(".json").read_text())["config"]
    assert (config["image_size"], len(config["image_ids"])) == (SIDE, 64)
    scores = tmp_path / "scores.json"
    command = [
        "--weight", weight, "--vision_model_path", assets / "tower", "--data_path", data,
        "--tokenizer_path", assets / "tokenizer", "--images_path", images, "--json", scores,
    ]  # fmt: skip
    assert eval_vlm.main([*map(str, command)]) == 0, capsys.readouterr().err
    assert json.loads(scores.read_text())
    assert eval_vlm.main([*map(str, command), "--image_size", "32"]) == 1
    assert f"has image_size {SIDE}, not 32 as the flags say" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "message"), [(60, "take 64"), (0, "the least is 1")])
def test_wrong_size_is_one_line(assets, tmp_path, capsys, size, message):
    data, images = make_records(tmp_path, num_records=2)
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, data, images, image_size=size))
    error = capsys.readouterr().err
    assert f"--image_size {size} is" in error and message in error and "Traceback" not in error
