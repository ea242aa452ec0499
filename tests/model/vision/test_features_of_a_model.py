"""If this fails, features that were computed before are not what the tower says of a picture, or
the model takes them for another image.
"""

import io
import json

import pytest
import torch
from support.noise import make_noise_records
from support.tiny_vlm import conversations, make_loaded, save_tiny
from support.towers import make_tower_of

import eval_vlm
from dataset.collate import VLMCollator
from dataset.lm_dataset import VLMDataset
from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.vision.features import FeatureMaker
from model.vision_tower import load_vision_tower


def encoded(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def loaded(assets):
    return make_loaded(assets)


@pytest.mark.parametrize("fields", [{}, {"vision_layer": -2}, {"token_merge": 2, "num": 4}])
def test_features_are_those_of_the_tower(fields, assets):
    num = fields.pop("num", 16)
    placeholder = {"image_special_token": "@" * num, "image_ids": [34] * num}
    loaded = make_loaded(assets, **fields, **placeholder)
    maker = FeatureMaker(loaded.model, loaded.processor, batch_size=2)
    pixels = torch.cat([maker.preprocess(encoded(i)) for i in conversations()[2][1]])
    features = maker.features(pixels)
    assert features.shape == (2, maker.num_patches, maker.width) == (2, 16, 24)
    with torch.no_grad():
        wanted = loaded.model.encode_images(pixels)
        assert torch.equal(loaded.model.encode_images(None, vision_features=features), wanted)


def test_a_lightened_model_keeps_features_in_full(assets, loaded):
    maker = FeatureMaker(loaded.model, loaded.processor, batch_size=2)
    light = make_loaded(assets)
    light.model.to(torch.bfloat16)
    other = FeatureMaker(light.model, light.processor, batch_size=2)
    assert other.describe() == maker.describe()
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(other.features(pixels), maker.features(pixels))


def test_description_tells_towers_and_layers_apart(assets, loaded, tmp_path):
    found = [FeatureMaker(loaded.model, loaded.processor, batch_size=1).describe()]
    last = make_loaded(assets, vision_layer=-1)
    found.append(FeatureMaker(last.model, last.processor, batch_size=1).describe())
    with torch.no_grad():
        loaded.model.vision_encoder.encoder.layers[0].mlp.fc1.bias[3] += 1
    found.append(FeatureMaker(loaded.model, loaded.processor, batch_size=1).describe())
    loaded.model.vision_encoder = load_vision_tower(assets / "tower")
    loaded.processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    found.append(FeatureMaker(loaded.model, loaded.processor, batch_size=1).describe())
    texts = {json.dumps(one, sort_keys=True, default=str) for one in found}
    assert len(texts) == 4
    assert found[0]["vision_tower_sha256"] == found[2]["vision_tower_sha256"]  # the first and last


class Known:
    """Features of some of the pictures."""

    def __init__(self, dataset, maker, names):
        self._kept = {
            name: maker.features(maker.preprocess(dataset.records.read_image(name)))[0]
            for name in names
        }

    def get(self, image):
        return self._kept.get(image)


@pytest.mark.parametrize("which", ["all", "some", "none"])
def test_a_batch_of_features_and_pictures_is_the_batch_of_pictures(which, assets, tmp_path):
    loaded = make_loaded(assets)
    data, images, _ = make_noise_records(tmp_path)
    datasets = [VLMDataset(data, images, loaded.processor) for _ in range(2)]
    names = [n for i in range(20) for n in datasets[0].records[i].images]
    names = {"all": names, "some": names[1::2], "none": []}[which]
    maker = FeatureMaker(loaded.model, loaded.processor, batch_size=2)
    datasets[1].features = Known(datasets[1], maker, names)
    collate = VLMCollator(pad_token_id=0)
    without, given = (collate([d[i] for i in range(8)]) for d in datasets)
    assert given.inputs["input_ids"].equal(without.inputs["input_ids"])
    assert (given.inputs["pixel_values"] is None) == (which == "all")
    assert ("vision_features" in given.inputs) == (which != "none")
    assert ("has_features" in given.inputs) == (which == "some")
    with torch.no_grad():
        outputs = [loaded.model(**batch.inputs).logits for batch in (without, given)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_features_of_another_shape_are_refused(assets):
    model = make_loaded(assets).model
    ids = torch.full((1, 20), 34)
    with pytest.raises(ValueError, match=r"shape \(1, 9, 24\).*\(images, 16, 24\)"):
        model(ids, vision_features=torch.zeros(1, 9, 24))
    with pytest.raises(ValueError, match="20 image placeholder|1 image placeholder"):
        model(ids, vision_features=torch.zeros(2, 16, 24))
    with pytest.raises(ValueError, match="need has_features"):
        model.encode_images(torch.zeros(1, 3, 32, 32), vision_features=torch.zeros(1, 16, 24))
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32), vision_features=torch.zeros(1, 16, 24))


def test_feature_maps_are_kept_too(assets, tmp_path):
    make_tower_of("resnet", tmp_path / "tower")
    (tmp_path / "tokenizer").symlink_to(assets / "tokenizer")
    loaded = make_loaded(tmp_path, vision_hidden_size=12)
    maker = FeatureMaker(loaded.model, loaded.processor, batch_size=2)
    pixels = torch.rand(2, 3, 32, 32)
    found = loaded.model.encode_images(None, vision_features=maker.features(pixels))
    torch.testing.assert_close(found, loaded.model.encode_images(pixels))


def test_scores_from_the_cache_are_those_from_the_pictures(assets, tmp_path, capfd):
    loaded = make_loaded(assets)
    save_tiny(loaded, tmp_path / "sft_vlm_32.pth")
    data, images, num = make_noise_records(tmp_path / "data")
    common = {"weight": tmp_path / "sft_vlm_32.pth", "vision_model_path": assets / "tower"}
    common |= {"tokenizer_path": assets / "tokenizer", "data_path": data, "images_path": images}
    common |= {"num_generate": 0, "device": "cpu", "max_seq_len": 640}
    reports = []
    for cache in (0, tmp_path / "cache", tmp_path / "cache"):
        argv = common | {"cache_vision_features": cache, "json": tmp_path / "scores.json"}
        argv = [str(text) for name, value in argv.items() for text in (f"--{name}", value)]
        assert eval_vlm.main(argv) == 0, capfd.readouterr().err
        reports.append(json.loads((tmp_path / "scores.json").read_text()))
    out = capfd.readouterr().out
    assert f"{num} of {num} pictures are read from it" in out
    assert reports[1] == reports[2]
    flat = [list(numbers(report)) for report in reports]
    torch.testing.assert_close(torch.tensor(flat[1]), torch.tensor(flat[0]), rtol=1e-2, atol=1e-2)
    assert eval_vlm.main(["--cache_vision_features", "1"]) == 1
    assert "--cache_vision_features needs --data_path" in capfd.readouterr().err


def numbers(value):
    """All numbers of a report, in order."""
    if isinstance(value, dict):
        for one in value.values():
            yield from numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("which", ["all", "some"])
def test_answers_about_features_are_those_about_pictures(which, num_beams, assets, tmp_path):
    """A batch of two pictures, one, none and two; with features the tower sees nothing."""
    loaded = make_loaded(assets)
    data, images, _ = make_noise_records(tmp_path)
    dataset = VLMDataset(data, images, loaded.processor)
    names = [n for i in range(20) for n in dataset.records[i].images][:5]
    maker = FeatureMaker(loaded.model, loaded.processor, batch_size=2)
    known = Known(dataset, maker, names if which == "all" else names[1::2])
    engine = VLMEngine(loaded)
    batches = []
    for given in (lambda name: None, known.get):
        batch = []
        for some in (names[:2], names[2:3], [], names[3:]):
            pictures = [dataset.records.read_image(name) for name in some]
            seen = [
                picture if given(name) is None else given(name)
                for name, picture in zip(some, pictures, strict=True)
            ]
            batch.append((ask("What?", num_images=len(some)), seen))
        batches.append(batch)
    sampling = Sampling(12, 0, num_beams=num_beams)
    right = engine.generate(batches[0], sampling)
    if which == "all":
        loaded.model.vision_encoder = None
    assert engine.generate(batches[1], sampling) == right
    assert engine.generate(batches[1][:1], sampling) == right[:1]
    stream = engine.stream(*batches[1][0], sampling)
    assert "".join(stream) == right[0].text
