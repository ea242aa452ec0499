"""If this fails, the flags that all commands share load another model than the weight holds, or one
that does not fit its tokenizer or tower.
"""

import argparse
import json

import pytest
import torch
from support.tiny_parts import TINY_MODEL
from support.tiny_vlm import GREEDY, VOCAB, conversations, make_loaded, save_tiny

from model.generation.engine import VLMEngine
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.options import add_model_arguments
from model.vlm_processor import load_tokenizer, tokenizer_sha256
from model.weights.build_model import LoadedModel, load_model
from model.weights.metadata import describe_model

KINDS = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


def texts(loaded: LoadedModel) -> list[str]:
    return [a.text for a in VLMEngine(loaded).generate(conversations(), GREEDY)]


def arguments(assets, folder, *more) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    own = [
        "--vision_model_path",
        assets / "tower",
        "--tokenizer_path",
        assets / "tokenizer",
        "--save_dir",
        folder,
        "--device",
        "cpu",
    ]
    return parser.parse_args([str(a) for a in [*own, *more]])


def save(loaded: LoadedModel, path, *, with_metadata: bool) -> None:
    save_tiny(loaded, path)
    if not with_metadata:
        path.with_suffix(".json").unlink()


@pytest.mark.parametrize("with_metadata", [True, False], ids=["described", "published"])
@KINDS
def test_load_model_native_gives_the_saved_model(assets, tmp_path, use_moe, with_metadata):
    saved = make_loaded(assets, use_moe=use_moe)
    save(saved, tmp_path / f"sft_vlm_32{'_moe' * use_moe}.pth", with_metadata=with_metadata)
    saved.model.half().float()  # what the file holds
    loaded = load_model(arguments(assets, tmp_path))
    assert loaded.can_see and not loaded.model.training and loaded.model.dtype == torch.float32
    assert texts(loaded) == texts(saved)


def test_load_model_folder_gives_the_saved_model(assets, tmp_path):
    saved = make_loaded(assets, use_moe=True)
    saved.model.save_pretrained(tmp_path / "hf")
    loaded = load_model(arguments(assets, tmp_path, "--load_from", tmp_path / "hf"))
    assert texts(loaded) == texts(saved)
    with pytest.raises(ValueError, match="hidden_size 32, not 64"):
        load_model(arguments(assets, tmp_path, "--load_from", tmp_path / "hf", "--dim", 64))


def test_load_model_of_a_language_model_cannot_see(assets, tmp_path):
    torch.manual_seed(0)
    llm = MiniMindForCausalLM(MiniMindConfig(vocab_size=VOCAB, **TINY_MODEL))
    torch.save(llm.half().state_dict(), tmp_path / "llm_32.pth")
    loaded = load_model(arguments(assets, tmp_path, "--weight", "llm"))
    assert not loaded.can_see
    said = texts(loaded)
    assert len(said) == 3
    torch.manual_seed(1)  # the projection that the weight lacks is the same at every start
    again = load_model(arguments(assets, tmp_path, "--weight", "llm"))
    for first, second in zip(
        loaded.model.vision_proj.parameters(), again.model.vision_proj.parameters(), strict=True
    ):
        assert torch.equal(first, second) and first.std() > 0
    assert texts(again) == said


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_load_model_says_that_a_folder_is_damaged(assets, tmp_path, name):
    """As a clone without git-LFS leaves it, and as a copy that was cut off."""
    make_loaded(assets).model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content in (pointer, whole[:1000], b""):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read") as caught:
            load_model(arguments(assets, tmp_path, "--load_from", tmp_path))
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_load_model_runs_no_code_of_a_folder(assets, tmp_path, monkeypatch):
    """Code that config or tokenizer name is neither run nor asked for, nor is a kernel fetched."""
    folder, trap = tmp_path / "hf", tmp_path / "trap"
    saved = make_loaded(assets)
    saved.model.save_pretrained(folder)
    saved.processor.tokenizer.save_pretrained(folder)
    (folder / "own.py").write_text(f"open({str(trap)!r}, 'w')")
    auto_map = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Slow", "own.Fast"]}
    kernel = {name: "some/kernel" for name in ("attn_implementation", "_attn_implementation")}
    for name, own in (("config.json", kernel), ("tokenizer_config.json", {})):
        fields = json.loads((folder / name).read_text()) | own | {"auto_map": auto_map}
        (folder / name).write_text(json.dumps(fields))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    arguments_of_folder = arguments(assets, tmp_path, "--load_from", folder)
    arguments_of_folder.tokenizer_path = None
    assert texts(load_model(arguments_of_folder)) == texts(saved)
    assert not trap.exists()


def test_load_model_stretches_rope_by_the_flag_alone(assets, tmp_path):
    make_loaded(assets).model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    rope = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 2048}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_scaling": rope}))
    loaded = load_model(arguments(assets, tmp_path, "--load_from", tmp_path))
    assert loaded.model.config.rope_parameters["rope_type"] == "default"


def test_load_model_first_release_placeholder(assets, tmp_path):
    placeholder = "<" * 9 + ">" * 8
    ids = load_tokenizer(assets / "tokenizer").encode(placeholder)
    saved = make_loaded(assets, keep_cls=True, image_special_token=placeholder, image_ids=ids)
    save(saved, tmp_path / "sft_vlm_32.pth", with_metadata=False)
    saved.model.half().float()
    flags = ("--keep_cls", "1", "--image_special_token", placeholder)
    loaded = load_model(arguments(assets, tmp_path, *flags))
    assert texts(loaded) == texts(saved)


def test_load_model_refuses_what_does_not_fit(assets, tmp_path):
    saved = make_loaded(assets)
    save(saved, tmp_path / "sft_vlm_32.pth", with_metadata=True)
    path = tmp_path / "sft_vlm_32.pth"
    with pytest.raises(ValueError, match="num_hidden_layers 2, not 3"):
        load_model(arguments(assets, tmp_path, "--n_layers", "3", "--weight", path))
    with pytest.raises(FileNotFoundError, match="no weight sft_vlm_64.pth"):
        load_model(arguments(assets, tmp_path, "--hidden_size", "64"))
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_model(arguments(assets, tmp_path, "--load_from", tmp_path))
    with pytest.raises(ValueError, match="model_type 'clip_vision_model'"):
        load_model(arguments(assets, tmp_path, "--load_from", assets / "tower"))
    metadata = tmp_path / "sft_vlm_32.json"
    text = metadata.read_text()
    sha256 = describe_model(saved.model, tokenizer_sha256="")["vision_tower_sha256"]
    metadata.write_text(text.replace(sha256, "0" * 64))
    with pytest.raises(ValueError, match="another vision tower"):
        load_model(arguments(assets, tmp_path))
    metadata.write_text(text.replace(tokenizer_sha256(saved.processor.tokenizer), "0" * 64))
    with pytest.raises(ValueError, match="--tokenizer_path"):
        load_model(arguments(assets, tmp_path))


def test_load_model_refuses_a_tokenizer_larger_than_the_vocabulary(assets, tmp_path):
    num_tokens = len(load_tokenizer(assets / "tokenizer"))
    state = make_loaded(assets, vocab_size=num_tokens - 9).model.half().state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("vision_encoder.")}
    path = tmp_path / "sft_vlm_32.pth"
    torch.save(state, path)
    expected = rf"the tokenizer has {num_tokens} tokens but {path} {num_tokens - 9}"
    with pytest.raises(ValueError, match=expected):
        load_model(arguments(assets, tmp_path))


def test_load_model_takes_a_vocabulary_larger_than_the_tokenizer(assets, tmp_path):
    """Ids that the tokenizer does not know are nothing that is said."""
    save(make_loaded(assets, vocab_size=5000), tmp_path / "sft_vlm_32.pth", with_metadata=False)
    assert len(texts(load_model(arguments(assets, tmp_path)))) == 3


def test_model_arguments_take_0_1_and_words(assets, tmp_path):
    for words, expected in ((["1"], True), (["FALSE"], False), (["true"], True), ([], True)):
        assert arguments(assets, tmp_path, "--use_moe", *words).use_moe is expected
    assert arguments(assets, tmp_path).use_moe is None
    with pytest.raises(SystemExit):
        arguments(assets, tmp_path, "--use_moe", "maybe")
