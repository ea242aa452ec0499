"""If this fails, `make check-published` calls a useless weight right, or a right one useless."""

import copy

import pytest
from support.published import publish_assets, publish_weight, train_on_questions
from support.scripts import run_script
from support.third_generation import make_assets3, make_loaded3
from support.tiny_vlm import make_loaded

from dataset import check_published
from dataset.fetching import assets as manifest

WEIGHTS = manifest.WEIGHTS[0].repo


@pytest.fixture(scope="module")
def trained(assets):
    """The tensors of a tiny model that knows the built-in answers."""
    loaded = make_loaded(assets, initializer_range=0.1)
    train_on_questions(loaded)
    return loaded.model.state_dict()


@pytest.fixture
def published(hub, assets, trained, monkeypatch):
    """A hub with the second generation in small."""
    publish_assets(hub, monkeypatch, assets, generation=2)
    publish_weight(hub, "sft_vlm_512", trained)
    return hub


def check(folder, *words: str) -> int:
    return check_published.main([*words, "--save_dir", str(folder)])


def lines_of(capfd, beginning: str | tuple[str, ...]) -> list[str]:
    return [line for line in capfd.readouterr().out.splitlines() if line.startswith(beginning)]


def without_projection(state):
    return {k: v for k, v in state.items() if not k.startswith("vision_proj.")}


@pytest.mark.slow
def test_trained_weights_are_fetched_loaded_and_right(published, trained, tmp_path, capfd):
    publish_weight(published, "llm_512", without_projection(trained))
    assert check(tmp_path, "llm_512", "sft_vlm_512") == 0
    llm, vlm = lines_of(capfd, "ok ")
    assert "llm_512 (generation 2): as it should be" in llm and "pictures" not in llm
    assert "sft_vlm_512" in vlm and "of 56 (at least 75%)" in vlm
    assert (tmp_path / "generation2/out/sft_vlm_512.pth").is_file()
    published.requests.clear()
    assert check(tmp_path, "sft_vlm_512") == 0
    assert not [path for path, _ in published.requests if path.startswith("/bytes/")]


def test_random_weight_is_not_what_it_should_be(published, assets, tmp_path, capfd):
    random = make_loaded(assets, initializer_range=0.02).model.state_dict()
    publish_weight(published, "sft_vlm_512", random)
    assert check(tmp_path, "sft_vlm_512") == 1
    [line] = lines_of(capfd, "FAILED")
    assert "NOT what it should be" in line and "English is hardly likelier than chance" in line


def test_weight_that_does_not_see_is_not_what_it_should_be(published, trained, tmp_path, capfd):
    blind = {k: v * (not k.startswith("vision_proj.")) for k, v in trained.items()}
    publish_weight(published, "sft_vlm_512", blind)
    assert check(tmp_path, "sft_vlm_512") == 1
    [line] = lines_of(capfd, "FAILED")
    assert "(captions do not follow the pictures)" in line and "0 of 56" in line
    publish_weight(published, "sft_vlm_512", without_projection(trained))
    assert check(tmp_path, "sft_vlm_512") == 1
    [line] = lines_of(capfd, "FAILED")
    assert "has no projection" in line


def test_one_that_cannot_be_had_is_one_line_and_the_others_go_on(
    published, trained, tmp_path, capfd
):
    publish_weight(published, "llm_512", without_projection(trained))
    published.files[WEIGHTS]["llm_768.pth"] = b"no weight"  # as published
    published.files[WEIGHTS]["pretrain_vlm_512.pth"] = b"changed on its way"
    published.corrupt.add("pretrain_vlm_512.pth")
    names = ("llm_768", "pretrain_vlm_512", "pretrain_vlm_768", "llm_512")
    assert check(tmp_path, *names) == 1
    damaged, changed, missing, right, end = lines_of(capfd, ("FAILED", "ok ", "1 of 4"))
    assert "llm_768" in damaged and "not a readable weight file" in damaged
    assert "wrong sha256" in changed
    assert f"{WEIGHTS} at main has no pretrain_vlm_768.pth" in missing
    assert "llm_512" in right and end == "1 of 4 are as they should be"
    assert not (tmp_path / "generation2/out/pretrain_vlm_512.pth").exists()


def test_weight_of_another_layout_is_refused_by_name(published, trained, tmp_path, capfd):
    state = copy.copy(trained)
    state.pop("model.norm.weight")
    publish_weight(published, "sft_vlm_512", state)
    assert check(tmp_path, "sft_vlm_512") == 1
    [line] = lines_of(capfd, "FAILED")
    assert "model.norm.weight" in line


def test_no_hub_is_one_line(published, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert check(tmp_path, "sft_vlm_512", "llm_512") == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "cannot be listed" in line and "HF_ENDPOINT" in line


def test_unknown_weight_is_refused_before_anything_is_fetched(published, tmp_path, capfd):
    assert check(tmp_path, "vision") == 1
    [line] = capfd.readouterr().err.splitlines()
    assert "'vision' is no published weight; choose from llm_512, " in line
    assert not published.requests


def test_every_weight_of_both_generations_is_checked_by_default():
    names = check_published.chosen_weights([])
    assert {manifest.ASSETS[name].generation for name in names} == {2, 3}
    assert len(names) == 12


@pytest.mark.slow
def test_script_runs_from_any_directory(published, tmp_path):
    """The real process, whose checksums are the real ones: the tiny tokenizer is refused."""
    words = ("dataset/check_published.py", "sft_vlm_512", "--save_dir", "cache")
    env = published.environment(tmp_path / "home")
    process = run_script(*words, cwd=tmp_path, check=False, env=env, cold=True)
    assert process.returncode == 1 and "0 of 1 are as they should be" in process.stdout
    [line] = [x for x in process.stdout.splitlines() if x.startswith("FAILED")]
    assert "tokenizer.json came with the wrong sha256" in line
    tower = tmp_path / "cache/generation2/model/vision_model/clip-vit-base-patch16"
    assert (tower / "model.safetensors").is_file()


@pytest.mark.slow
def test_third_generation_is_told_by_its_tensors(hub, tmp_path, capfd, monkeypatch):
    make_assets3(tmp_path)
    loaded = make_loaded3(tmp_path, initializer_range=0.1)
    publish_assets(hub, monkeypatch, tmp_path, generation=3)
    publish_weight(hub, "sft_vlm3_moe", loaded.model.state_dict())
    train_on_questions(loaded)
    publish_weight(hub, "sft_vlm3", loaded.model.state_dict())
    status = check(tmp_path / "cache", "sft_vlm3", "sft_vlm3_moe")
    right, wrong = lines_of(capfd, ("ok ", "FAILED"))
    assert right.startswith("ok ") and "sft_vlm3 (generation 3)" in right
    assert wrong.startswith("FAILED") and "NOT what it should be" in wrong
    assert status == 1
