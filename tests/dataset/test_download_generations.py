"""If this fails, `dataset/download.py` writes a weight of one generation over the other's, or puts
the third generation's files where nothing looks for them.
"""

import io

import pytest
import torch
from support.fake_hub import CLIP, error_of, files_below, pin, run
from support.third_generation import VOCAB3, make_tokenizer3
from support.tiny_parts import TINY_MODEL, make_tokenizer

from dataset import download
from dataset.fetching import assets as manifest
from model.generations import GENERATIONS
from model.machine.paths import ROOT
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights.metadata import read_metadata

REPOS = {2: manifest.WEIGHTS[0].repo, 3: manifest.WEIGHTS3[0].repo}
PINS = {2: manifest.TOKENIZER_SHA256, 3: manifest.TOKENIZER3_SHA256}
LLM = {2: "llm_768", 3: "llm3"}


@pytest.fixture
def both(hub, tmp_path_factory, monkeypatch):
    """A hub with `llm_768.pth`, tokenizer and tower of each generation."""
    for generation, make in ((2, make_tokenizer), (3, make_tokenizer3)):
        folder = tmp_path_factory.mktemp("tokenizer")
        make(folder)
        name = "tokenizer3" if generation == 3 else "tokenizer"
        files = {p.name: p.read_bytes() for p in folder.iterdir()}
        hub.files[manifest.ASSETS[name].huggingface.repo] = files
        pin(monkeypatch, PINS[generation], "tokenizer.json", files["tokenizer.json"])
        config = MiniMindConfig(generation=generation, vocab_size=VOCAB3, **TINY_MODEL)
        buffer = io.BytesIO()
        torch.save(MiniMindForCausalLM(config).half().state_dict(), buffer)
        hub.files[REPOS[generation]]["llm_768.pth"] = buffer.getvalue()
    tower = dict(hub.files[CLIP]) | {"model.safetensors": b"SigLIP"}
    hub.files[manifest.ASSETS["vision3"].huggingface.repo] = tower
    pin(monkeypatch, manifest.SIGLIP_SHA256, "model.safetensors", b"SigLIP")
    return hub


@pytest.mark.parametrize(("there", "wanted"), [(2, 3), (3, 2)])
def test_weight_of_the_other_generation_is_never_overwritten(there, wanted, both, tmp_path, capfd):
    assert run(tmp_path, LLM[there]) == 0
    weight = tmp_path / "out/llm_768.pth"
    before = weight.read_bytes()
    for force in ([], ["--force"]):
        error = error_of(capfd, tmp_path, LLM[wanted], *force)
        assert f"{weight} is a weight of generation {there}" in error
        assert f"generation {wanted}" in error and "--save_dir" in error
        assert weight.read_bytes() == before == both.files[REPOS[there]]["llm_768.pth"]
    other = tmp_path / "other"
    assert run(tmp_path, LLM[wanted], "--save_dir", str(other)) == 0
    assert weight.read_bytes() == before
    assert (other / "llm_768.pth").read_bytes() == both.files[REPOS[wanted]]["llm_768.pth"]


def test_two_generations_in_one_run_are_refused(both, tmp_path, capfd):
    error = error_of(capfd, tmp_path, "llm_768", "llm3")
    assert "llm_768 and llm3 are both" in error and "--save_dir" in error
    assert not files_below(tmp_path)


def test_weight_is_recorded_with_the_tokenizer_of_its_generation(both, tmp_path):
    assert run(tmp_path, "llm_768") == 0
    assert run(tmp_path, "llm3", "--save_dir", str(tmp_path / "out3")) == 0
    second, third = (read_metadata(tmp_path / folder / "llm_768.pth") for folder in ("out", "out3"))
    assert second["tokenizer_sha256"] != third["tokenizer_sha256"]
    assert third["source"]["repository"] == REPOS[3] and third["stage"] == "llm"


def test_files_of_the_third_generation_lie_where_the_model_looks(both, tmp_path):
    assert run(tmp_path, "--generation", "3") == 0
    generation = GENERATIONS[3]
    tower = tmp_path / generation.vision_dir.relative_to(ROOT)
    assert files_below(tower) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    tokenizer = tmp_path / generation.tokenizer_dirs[0].relative_to(ROOT)
    assert "chat_template.jinja" in files_below(tokenizer), "where the hub has one"
    assert (tmp_path / "out/llm_768.pth").is_file()
    assert (tmp_path / "dataset/sft_i2t.parquet").is_file()
    assert {generation.vision, generation.tokenizer} <= set(manifest.ASSETS)


def test_names_mean_the_generation_that_is_named(both, tmp_path, capfd):
    assert run(tmp_path, "llm_768", "vision", "--generation", "3") == 0
    assert (tmp_path / "out/llm_768.pth").read_bytes() == both.files[REPOS[3]]["llm_768.pth"]
    assert "generation 3: minimind-3v" in capfd.readouterr().out
    error = error_of(capfd, tmp_path, "llm_512", "--generation", "3")
    assert "llm_512 is of generation 2, not 3" in error and "llm3" in error
    assert "llm3 is of generation 3" in error_of(capfd, tmp_path, "llm3", "--generation", "2")


def test_transformers_folder_comes_without_its_code(both, tmp_path):
    repo = manifest.ASSETS["folder3"].huggingface.repo
    code = {"config.json": b"{}", "model_vlm.py": b"raise SystemExit", "pytorch_model.bin": b"x"}
    both.files[repo] |= code
    assert run(tmp_path, "folder3") == 0
    names = files_below(tmp_path / "out/minimind-3v")
    assert "pytorch_model.bin" in names and "tokenizer.json" in names
    assert not [name for name in names if name.endswith(".py")]


def test_list_says_what_each_asset_is_and_asks_no_hub(hub, capfd):
    assert download.main(["--list"]) == 0
    out = capfd.readouterr().out
    assert "generation 2, MiniMind2-V" in out and "generation 3, minimind-3v" in out
    assert all(f"  {name} " in out for name in (*manifest.ASSETS, manifest.CORPUS))
    assert not hub.requests
