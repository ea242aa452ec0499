"""If this fails, weights are saved damaged, loaded into a model that they do not fit, or found
under the wrong name.
"""

import json
import random

import pytest
import torch
from support.tiny_parts import TINY_MODEL, make_tower

from model.model_vlm import MiniMindVLM, VLMConfig
from model.weights.file_names import find_weight
from model.weights.metadata import describe_model, read_metadata, tower_sha256
from model.weights.saving import save_weights
from model.weights.strict_loading import (
    load_weights,
    read_weights,
    sizes_from_tensors,
    weight_config,
)

torch.set_num_threads(1)  # at these sizes more threads only wait for each other
KINDS = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
NAN = float("nan")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM, Q_PROJ = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
PROJECTION = "vision_proj.vision_proj.0.weight"


def make_vlm(assets=None, *, seed: int = 0, **fields) -> MiniMindVLM:
    torch.manual_seed(seed)
    own = {"vocab_size": 60, "vision_hidden_size": 24, "image_ids": [34] * 16}
    config = VLMConfig(**(TINY_MODEL | own | {"image_special_token": "@" * 16} | fields))
    return MiniMindVLM(config, vision_model_path=assets and assets / "tower").eval()


def save(model, path):
    save_weights(model, path, describe_model(model, tokenizer_sha256="abc") | {"stage": "sft"})
    return path


def load(model, path, *, may_lack_projection=False) -> bool:
    state = read_weights(path)
    return load_weights(model, state, path=path, may_lack_projection=may_lack_projection)


@KINDS
def test_weights_round_trip(assets, tmp_path, use_moe):
    model = make_vlm(assets, use_moe=use_moe)
    path = save(model, tmp_path / "new" / "x.pth")
    stored = torch.load(path, weights_only=True)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("vision_encoder.")}
    assert stored.keys() == own.keys() and HEAD in stored
    assert all(t.dtype == torch.float16 for t in stored.values())
    other = make_vlm(assets, use_moe=use_moe, seed=1)
    assert load(other, path)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].half().float()) or "encoder" in name
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.json", "x.pth"]


@KINDS
def test_metadata_and_tensors_give_the_config(assets, tmp_path, use_moe):
    model = make_vlm(assets, use_moe=use_moe, num_attention_heads=4, rope_theta=1e4)
    path = save(model, tmp_path / "x.pth")
    metadata = read_metadata(path)
    assert metadata["stage"] == "sft" and metadata["tokenizer_sha256"] == "abc"
    assert metadata["vision_tower_sha256"] == tower_sha256(model.vision_encoder)
    config = VLMConfig(**weight_config(read_weights(path), path=path, flags={}))
    names = [n for n in VLMConfig().to_dict() if n not in ("architectures", "dtype")]
    assert {n: getattr(config, n) for n in names} == {n: getattr(model.config, n) for n in names}


@pytest.mark.parametrize("num_heads", [2, 6, 12, 32])
def test_any_number_of_heads_is_read_back(tmp_path, num_heads):
    model = make_vlm(hidden_size=192, num_attention_heads=num_heads, num_key_value_heads=2)
    path = save(model, tmp_path / "x.pth")
    flags = {"num_attention_heads": num_heads}
    for _ in ("described", "plain"):
        config = weight_config(read_weights(path), path=path, flags=flags)
        assert config["num_attention_heads"] == num_heads and config["num_key_value_heads"] == 2
        path.with_suffix(".json").unlink(missing_ok=True)


def test_description_of_another_weight_is_refused(tmp_path):
    path = save(make_vlm(), tmp_path / "x.pth")
    described = path.with_suffix(".json").read_bytes()
    save(make_vlm(seed=1), path)
    path.with_suffix(".json").write_bytes(described)
    with pytest.raises(ValueError, match="x.json describes another weight than the x.pth"):
        read_metadata(path)
    save(make_vlm(), path)  # an own save mends it
    assert read_metadata(path)["stage"] == "sft"


@KINDS
def test_sizes_from_tensors(use_moe):
    model = make_vlm(use_moe=use_moe, n_routed_experts=3, n_shared_experts=2)
    sizes = sizes_from_tensors(model.state_dict(), path="x.pth")
    expected = {name: getattr(model.config, name) for name in sizes}
    assert sizes == expected and sizes["use_moe"] == use_moe
    assert {"hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"} < sizes.keys()


def test_tower_sha256_tells_towers_apart(assets, tmp_path):
    make_tower(tmp_path, image_size=32, patch_size=8)
    tower, _ = MiniMindVLM.get_vision_model(assets / "tower")
    same, _ = MiniMindVLM.get_vision_model(tmp_path)
    assert tower_sha256(same) == tower_sha256(tower)
    with torch.no_grad():
        next(p for n, p in same.named_parameters() if "post_layernorm" in n).add_(1e-3)
    assert tower_sha256(same) != tower_sha256(tower)


BROKEN = {
    "lacks 1 tensor.*model.norm.weight": lambda s: {k: v for k, v in s.items() if k != NORM},
    "has unknown 1 tensor.*more.weight": lambda s: s | {"more.weight": torch.zeros(1)},
    "has another size of 1 .*q_proj": lambda s: s | {Q_PROJ: torch.zeros(32, 16)},
    "not finite in 1 .*q_proj": lambda s: s | {Q_PROJ: s[Q_PROJ] * NAN},
    "not finite in 2 .*embed_tokens": lambda s: s | dict.fromkeys((EMBED, HEAD), s[EMBED] * NAN),
    "differs from model.embed_tokens": lambda s: s | {HEAD: s[HEAD] + 1},
    "lacks 2 tensor.*vision_proj": lambda s: {k: v for k, v in s.items() if "vision" not in k},
    "first release": lambda s: {"tok_embeddings.weight": s[EMBED]} | s,
    "first release \\(2024\\)": lambda s: {"layers.0.attention.wq.weight": s[Q_PROJ]},
    "training state": lambda s: {"model": s, "optimizer": {}, "step": 3},
    "not a state dict": lambda s: list(s.values()),
    "more than tensors": lambda s: s | {"epoch": 3},
}


@pytest.mark.parametrize("words", BROKEN)
def test_weights_that_do_not_fit_are_refused(tmp_path, words):
    model, path = make_vlm(), tmp_path / "bad.pth"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(BROKEN[words](model.state_dict()), path)
    with pytest.raises(ValueError, match=rf"(?s)bad\.pth.*{words}"):
        load(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("fields", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"use_moe": 1}])
def test_weights_of_another_model_are_refused(tmp_path, fields):
    path = tmp_path / "x.pth"
    torch.save(make_vlm().state_dict(), path)
    with pytest.raises(ValueError, match="not a weight of this model"):
        load(make_vlm(**fields), path)


@pytest.mark.parametrize("data", [b"", b"hello world", b"<html>404</html>", b"PK\x03\x04", b"\x80"])
def test_read_weights_refuses_what_is_no_weight_file(tmp_path, data):
    path = tmp_path / "bad.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.pth is not a readable weight file"):
        read_weights(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_read_weights_refuses_damaged_files(tmp_path):
    """Whatever the bytes, the answer is a state dict or a ValueError that names the file."""
    chance, path = random.Random(0), tmp_path / "bad.pth"
    torch.save({EMBED: torch.ones(4, 8)}, path)
    whole = path.read_bytes()
    for trial in range(200):
        data = bytearray(whole if trial % 2 else chance.randbytes(chance.randint(1, 99)))
        for _ in range(4):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(bytes(data[: chance.randint(1, len(data))] if trial % 4 == 1 else data))
        try:
            read_weights(path)
        except ValueError as error:
            assert "bad.pth" in str(error)


def test_read_weights_drops_a_vision_tower(tmp_path):
    torch.save({EMBED: torch.ones(2), "vision_encoder.x": torch.ones(2)}, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").keys() == {EMBED}


def test_load_weights_takes_a_language_model_without_projection(tmp_path):
    model, other = make_vlm(), make_vlm(seed=1)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("vision_proj.")}
    torch.save({k: v for k, v in state.items() if k != HEAD}, tmp_path / "llm.pth")
    projection = other.state_dict()[PROJECTION].clone()
    assert load(other, tmp_path / "llm.pth", may_lack_projection=True) is False
    assert torch.equal(other.state_dict()[PROJECTION], projection)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    half = model.state_dict() | {}
    del half[PROJECTION]  # the bias alone is no projection
    with pytest.raises(ValueError, match="lacks 1 .*vision_proj"):
        load_weights(other, half, path=tmp_path / "x.pth", may_lack_projection=True)


def test_metadata_of_another_size_is_refused(assets, tmp_path):
    path = save(make_vlm(assets), tmp_path / "x.pth")
    save(make_vlm(assets, num_hidden_layers=3), tmp_path / "y.pth")
    described = json.loads((tmp_path / "y.json").read_text())
    del described["weight_id"]  # as written by hand
    (tmp_path / "x.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="num_hidden_layers 3 but the tensors of x.pth say 2"):
        weight_config(read_weights(path), path=path, flags={})


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"format": 1}', '{"config": {}, "format": 99}', '{"format": 1, "config": 3}'],
)
def test_metadata_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_metadata(tmp_path / "x.pth")
    assert read_metadata(tmp_path / "absent.pth") == {}


def test_json_of_another_program_beside_a_weight_is_left_alone(tmp_path):
    (tmp_path / "x.json").write_text('{"hidden_size": 64}')
    assert read_metadata(tmp_path / "x.pth") == {}


@pytest.mark.parametrize("name", ["token_merge", "vision_layer"])
def test_flags_that_contradict_what_no_shape_tells_are_refused(assets, tmp_path, name):
    """A described weight without the field has the usual value of it."""
    path = save(make_vlm(assets), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"has {name} (1|None), not 2 as the flags say"):
        weight_config(read_weights(path), path=path, flags={name: 2})


def test_flags_that_contradict_the_weight_are_refused(assets, tmp_path):
    path = save(make_vlm(assets), tmp_path / "x.pth")
    state = read_weights(path)
    agreeing = {"hidden_size": 32, "use_moe": False, "num_hidden_layers": None}
    assert weight_config(state, path=path, flags=agreeing)["num_hidden_layers"] == 2
    for name, value in {"hidden_size": 64, "num_hidden_layers": 3, "use_moe": True}.items():
        with pytest.raises(ValueError, match=f"has {name} .*, not {value}"):
            weight_config(state, path=path, flags={name: value})


@pytest.mark.parametrize("value", [1e5, float("nan"), float("-inf")])
def test_save_weights_refuses_what_fp16_cannot_hold(assets, tmp_path, value):
    model = make_vlm(assets)
    path = save(model, tmp_path / "x.pth")
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(ValueError, match="weight not saved: model.norm.weight"):
        save(model, path)
    assert before == (path.read_bytes(), path.with_suffix(".json").read_bytes())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """`--save_dir`, and the `out/` that is searched after it."""
    monkeypatch.setattr("model.weights.file_names.OUT_DIR", tmp_path / "out")
    for name in ("save", "out"):
        (tmp_path / name).mkdir()
    return tmp_path


def find(folder, name, hidden_size=None, use_moe=None) -> str:
    found = find_weight(name, save_dir=folder / "save", hidden_size=hidden_size, use_moe=use_moe)
    return str(found.relative_to(folder))


def touch(folder, *names) -> None:
    for name in names:
        (folder / name).touch()


def test_find_weight_takes_the_default_size_first(folders):
    touch(folders, "save/sft_vlm_768.pth")
    assert find(folders, "sft_vlm") == "save/sft_vlm_768.pth"
    touch(folders, "save/sft_vlm_512.pth", "save/sft_vlm_512_moe.pth", "save/x_sft_vlm_512.pth")
    assert find(folders, "sft_vlm") == "save/sft_vlm_512.pth"
    assert find(folders, "sft_vlm", 768) == "save/sft_vlm_768.pth"
    assert find(folders, "sft_vlm", use_moe=True) == "save/sft_vlm_512_moe.pth"
    touch(folders, "save/sft_vlm_768_moe.pth")
    assert find(folders, "sft_vlm", 512, use_moe=False) == "save/sft_vlm_512.pth"
    assert find(folders, "sft_vlm", use_moe=True) == "save/sft_vlm_512_moe.pth"


def test_find_weight_asks_when_several_fit(folders):
    touch(folders, "save/sft_vlm_256.pth", "save/sft_vlm_768.pth")
    with pytest.raises(ValueError, match=r"sft_vlm_256.pth, sft_vlm_768.pth.*--hidden_size"):
        find(folders, "sft_vlm")


def test_find_weight_looks_into_out_after_save_dir(folders):
    touch(folders, "out/llm_512.pth")
    assert find(folders, "llm", 512) == "out/llm_512.pth"
    touch(folders, "save/llm_512.pth")
    assert find(folders, "llm", 512) == "save/llm_512.pth"


def test_find_weight_knows_lm_as_llm(folders):
    touch(folders, "save/lm_512.pth", "save/sft_vlm_512.pth")
    assert find(folders, "llm") == "save/lm_512.pth" == find(folders, "lm")
    touch(folders, "save/llm_512.pth")
    assert find(folders, "llm") == "save/llm_512.pth"


def test_find_weight_says_what_is_there(folders):
    touch(folders, "save/sft_vlm_512.pth")
    with pytest.raises(FileNotFoundError, match=r"no weight sft_vlm_768_moe.pth.*sft_vlm_512.pth"):
        find(folders, "sft_vlm", 768, use_moe=True)


def test_find_weight_takes_a_path_as_it_is(folders, monkeypatch):
    touch(folders, "mine.pth")
    assert find(folders, str(folders / "mine.pth"), 768) == "mine.pth"
    monkeypatch.chdir(folders)
    assert str(find_weight("mine.pth", save_dir=folders, hidden_size=1, use_moe=None)) == "mine.pth"
    with pytest.raises(FileNotFoundError, match="other.pth"):
        find(folders, str(folders / "other.pth"))
