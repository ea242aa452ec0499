"""If this fails, a tower is shown other pixels than its own preprocessing makes of a picture."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.tiny_vlm import make_loaded
from support.towers import PROCESSORS, TOWERS, make_config, make_preprocessing

from model.model_vlm import MiniMindVLM
from model.vision.preprocessing import measure
from model.vision_tower import load_image_processor, load_vision_config, read_tower_shape

KINDS = pytest.mark.parametrize("kind", TOWERS)
SIDES = {"efficientnet": 128}  # of the pictures; all others have 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """Kind -> folder with config and preprocessing; weights are not read here."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in TOWERS}
    for kind, folder in made.items():
        make_config(kind).save_pretrained(folder)
        make_preprocessing(kind, folder)
    return made


def processor_of(folder) -> object:
    return load_image_processor(folder, load_vision_config(folder))


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8), mode)


@KINDS
def test_preprocessing_is_the_librarys(folders, kind):
    folder = folders[kind]
    processor = processor_of(folder)
    name, options = PROCESSORS[kind]
    own = getattr(transformers, name)(**options)
    for picture in (gradient(50, 41), gradient(23, 70)):
        expected = own(images=picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(MiniMindVLM.image2tensor(picture, processor), expected)
    if kind == "siglip":  # resized as a whole, not cropped
        resized = np.asarray(gradient(50, 41).resize((32, 32), Image.Resampling.BILINEAR))
        expected = torch.tensor(resized).permute(2, 0, 1) / 255 * 2 - 1
        found = MiniMindVLM.image2tensor(gradient(50, 41), processor)[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@KINDS
def test_preprocessing_without_a_file_is_the_kinds_own(tmp_path, kind):
    make_config(kind).save_pretrained(tmp_path)
    processor = processor_of(tmp_path)
    assert type(processor).__name__ == PROCESSORS[kind][0]
    side = {"resnet": 224, "efficientnet": 128}.get(kind, 32)
    assert read_tower_shape(tmp_path).side == measure(processor).side == side
    assert MiniMindVLM.image2tensor(gradient(90, 41), processor).shape == (1, 3, side, side)


@pytest.mark.parametrize("named", ["DINOv3ViTImageProcessorFast", "ViTFeatureExtractor", None])
def test_preprocessing_is_known_by_older_names(folders, tmp_path, named):
    steps = json.loads((folders["dinov3"] / "preprocessor_config.json").read_text())
    del steps["image_processor_type"]
    key = "feature_extractor_type" if named and "Extractor" in named else "image_processor_type"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps | {key: named}))
    processor = load_image_processor(tmp_path, load_vision_config(folders["dinov3"]))
    own = processor_of(folders["dinov3"])
    picture = gradient(40, 50)
    assert torch.equal(*(MiniMindVLM.image2tensor(picture, p) for p in (processor, own)))


@KINDS
def test_processor_knows_side_and_range_of_the_pixels(folders, assets, kind):
    processor = make_loaded(assets).processor
    processor.image_processor = processor_of(folders[kind])
    side = SIDES.get(kind, 32)
    assert processor.pixel_values([]).shape == (0, 3, side, side)
    colours = [(250, 3, 120), (0, 0, 0), (255, 255, 255), (17, 200, 66)]
    pixels = processor.pixel_values([Image.new("RGB", (60, 44), c) for c in colours])
    assert [np.asarray(p)[1, 2].tolist() for p in processor.pictures(pixels)] == [
        *map(list, colours)
    ]


def test_alpha_becomes_rgb_before_the_preprocessing(folders, assets):
    processor = make_loaded(assets).processor
    processor.image_processor = processor_of(folders["siglip"])
    picture = gradient(40, 30, "RGBA")
    expected = MiniMindVLM.image2tensor(picture.convert("RGB"), processor.image_processor)
    assert torch.equal(MiniMindVLM.image2tensor(picture, processor.image_processor), expected)
    assert processor.pixel_values([picture]).shape == expected.shape


@pytest.mark.parametrize(
    "steps, message",
    [
        ("{", "preprocessor_config.json cannot be read"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "names 'Siglip2ImageProcessor', which"),
        ({"size": {"shortest_edge": 32}}, "makes 64x32 of a wide picture, but a tower takes squ"),
        ({"size": {"height": 16, "width": 16}}, "makes pictures of 16x16 but the tower takes 32x"),
        ({"size": {"depth": 3}}, "preprocessor_config.json cannot be used|its preprocessing fails"),
        ({"image_mean": "grey"}, "preprocessor_config.json cannot be used|its preprocessing fails"),
    ],
)
def test_damaged_preprocessing_is_one_clear_line(tmp_path, steps, message):
    make_config("siglip").save_pretrained(tmp_path)
    make_preprocessing("siglip", tmp_path)
    path = tmp_path / "preprocessor_config.json"
    text = steps if isinstance(steps, str) else json.dumps(json.loads(path.read_text()) | steps)
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_tower_shape(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
