"""If this fails, llama.cpp's CLIP graph would make other features of a picture than the weight."""

import shutil

import numpy as np
import pytest
import torch
from support.exporting import Kit, export, make_kit, make_kits
from support.tiny_parts import make_tower
from support.tiny_vlm import picture
from support.towers import TOWERS, make_tower_of

from model.export.__main__ import main
from model.export.mmproj_file import MMPROJ_FILE

TOLERANCES = {"f32": 1e-3, "f16": 1e-2}
DEMO = ["--weight", "sft_vlm_demo"]  # a trained tower of four layers


@pytest.fixture(scope="module")
def kits(assets, tmp_path_factory):
    """Also one that reads the last layer but one of three."""
    folder = tmp_path_factory.mktemp("weights")
    make_tower(folder / "deep/tower", image_size=32, patch_size=8, num_layers=3)
    (folder / "deep/tokenizer").symlink_to(assets / "tokenizer")
    made = make_kits(folder, assets)
    made["earlier"] = make_kit(folder / "earlier", folder / "deep", vision_layer=-2)
    return made | {"demo": Kit(None, DEMO)}


def read(path) -> tuple[dict, dict[str, np.ndarray]]:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        for t in reader.tensors
    }
    return fields, tensors


class Clip:
    """The forward pass as llama.cpp's llava graph has it, over a file's contents.

    The class token stands first, as the graph had it before change 13321 and has it by 25844; a
    GELU is the approximation by tanh.
    """

    def __init__(self, fields: dict, tensors: dict[str, np.ndarray]):
        assert (fields["general.architecture"], fields["general.type"]) == ("clip", "mmproj")
        assert fields["clip.projector_type"] == "mlp" and fields["clip.has_vision_encoder"]
        self.get = lambda name: fields[f"clip.vision.{name}"]
        self.use_gelu, self.tensors = fields["clip.use_gelu"], tensors

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        eps = self.get("attention.layer_norm_epsilon")
        normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return normed * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def activated(self, x: np.ndarray) -> np.ndarray:
        return gelu(x) if self.use_gelu else x / (1 + np.exp(-1.702 * x))

    def attention(self, x: np.ndarray, block: str) -> np.ndarray:
        q, k, v = (
            self.linear(x, f"{block}.attn_{part}").reshape(
                len(x), self.get("attention.head_count"), -1
            )
            for part in "qkv"
        )
        scores = np.einsum("qhk,thk->hqt", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqt,thk->qhk", weights, v).reshape(len(x), -1)
        return self.linear(mixed, f"{block}.attn_out")

    def features(self, pixels: np.ndarray) -> np.ndarray:  # (3, S, S) -> (N, D)
        side = self.get("patch_size")
        grid = self.get("image_size") // side
        patches = pixels.reshape(3, grid, side, grid, side).transpose(1, 3, 0, 2, 4)
        kernel = self.tensors["v.patch_embd.weight"]
        rows = patches.reshape(grid * grid, -1) @ kernel.reshape(len(kernel), -1).T
        x = np.concatenate((self.tensors["v.class_embd"][None], rows))
        x = self.norm(x + self.tensors["v.position_embd.weight"], "v.pre_ln")
        (deepest,) = self.get("feature_layer")
        assert deepest == self.get("block_count")
        for i in range(deepest):
            block = f"v.blk.{i}"
            x = x + self.attention(self.norm(x, f"{block}.ln1"), block)
            inner = self.activated(self.linear(self.norm(x, f"{block}.ln2"), f"{block}.ffn_up"))
            x = x + self.linear(inner, f"{block}.ffn_down")
        assert "v.post_ln.weight" not in self.tensors  # the graph would apply it
        return self.linear(gelu(self.linear(x[1:], "mm.0")), "mm.2")


def gelu(x: np.ndarray) -> np.ndarray:
    """By tanh, and x itself from 10 on, as ggml's table has it."""
    approximate = 0.5 * x * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))
    return np.where(x >= 10, x, approximate).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("2", "f32"), ("earlier", "f16"), ("demo", "f32"), ("demo", "q8_0")],
)
def test_file_sees_what_the_weight_sees(name, kind, kits, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    kit = kits[name]
    export(kit, "gguf", tmp_path / "out", "--gguf_type", kind, "--mmproj")
    clip = Clip(*read(tmp_path / "out" / MMPROJ_FILE))
    loaded = kit.load()
    pixels = loaded.processor.pixel_values([picture(6)])
    with torch.no_grad():
        ours = loaded.model.encode_images(pixels)[0].numpy()
    theirs = clip.features(pixels[0].numpy())
    assert theirs.shape == ours.shape
    if kind in TOLERANCES:
        # The demo's tower has exact GELUs, which the graph approximates.
        scale = np.abs(ours).max() if name == "demo" else 1.0
        np.testing.assert_allclose(theirs, ours, atol=TOLERANCES[kind] * scale, rtol=0)
    else:
        assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.999
    black = (0 - np.array(clip.get("image_mean"))) / np.array(clip.get("image_std"))
    blank = loaded.processor.pixel_values([picture(6).point(lambda _: 0)])
    np.testing.assert_allclose(blank[0, :, 0, 0], black, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "flags", "line"),
    [
        ("3", ["--to", "gguf", "--mmproj"], "has projector 'mlp', but llama.cpp's mmproj computes"),
        ("2", ["--to", "llava", "--mmproj"], "--mmproj is of --to gguf"),
        ("2_moe", ["--to", "gguf", "--mmproj"], "has experts, which --to gguf does not write"),
    ],
)
def test_what_it_would_not_compute_is_one_line(name, flags, line, kits, tmp_path, capsys):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    assert main([*kits[name].flags, *flags, "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and line in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tower", ["efficientnet", "convnextv2", "vit"])
def test_tower_of_another_kind_is_one_line(tower, assets, tmp_path, capsys):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    make_tower_of(tower, tmp_path / "assets" / "tower")
    shutil.copytree(assets / "tokenizer", tmp_path / "assets" / "tokenizer")
    width = TOWERS[tower][-1]
    kit = make_kit(tmp_path, tmp_path / "assets", vision_hidden_size=width)
    out = tmp_path / "out"
    capsys.readouterr()  # of making the tower
    assert main([*kit.flags, "--to", "gguf", "--mmproj", "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "has vision tower" in err and "take --to transformers" in err
    assert not out.exists()
