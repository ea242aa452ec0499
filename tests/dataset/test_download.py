"""If this fails, `dataset/download.py` overwrites a user's file, fetches the wrong one, or puts it
where training does not look.
"""

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from support.fake_hub import (
    CLIP,
    COMMIT,
    CONFIG,
    DATA,
    PARQUET,
    error_of,
    files_below,
    pin,
    run,
)
from support.scripts import ROOT, run_script

from dataset import download
from dataset.fetching import assets as manifest
from dataset.fetching import disk
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.vlm_processor import load_tokenizer, tokenizer_sha256
from model.weights.metadata import read_metadata
from model.weights.strict_loading import read_weights, weight_config

WEIGHTS = manifest.WEIGHTS[0].repo
TOKENIZER = manifest.ASSETS["tokenizer"].huggingface.repo


def test_fetch_puts_the_tower_where_training_looks(hub, tmp_path, capfd):
    assert run(tmp_path, "vision") == 0
    folder = tmp_path / "model/vision_model/clip-vit-base-patch16"
    assert files_below(folder) == ["config.json", "preprocessor_config.json", "pytorch_model.bin"]
    for name in files_below(folder):
        assert (folder / name).read_bytes() == hub.files[CLIP][name]
    listed = [path for path, _ in hub.requests if path.startswith("/api/")]
    revision = manifest.ASSETS["vision"].huggingface.revision
    assert listed == [f"/api/models/{CLIP}/revision/{revision}?blobs=true"]
    out = capfd.readouterr().out
    assert "5.0 kB  model/vision_model/clip-vit-base-patch16/pytorch_model.bin" in out
    assert "note:" not in out, "a pinned revision needs no notice"


def test_fetch_prefers_safetensors_where_the_repository_has_it(hub, tmp_path):
    hub.files[CLIP]["model.safetensors"] = b"safe"
    assert run(tmp_path, "vision") == 0
    names = files_below(tmp_path / "model/vision_model/clip-vit-base-patch16")
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]


def test_answers_that_a_server_packs_are_taken(hub, tmp_path):
    """Their length is that of the packed bytes, not of the file."""
    hub.packs = True
    assert run(tmp_path, "vision") == 0
    tower = tmp_path / "model" / "vision_model" / "clip-vit-base-patch16"
    held = {data for files in hub.files.values() for data in files.values()}
    assert all(path.read_bytes() in held for path in tower.iterdir() if path.is_file())
    assert any(tower.iterdir())


def test_second_run_fetches_nothing(hub, tmp_path, capfd):
    assert run(tmp_path, "vision", "pretrain") == 0
    hub.requests.clear()
    capfd.readouterr()
    assert run(tmp_path, "vision", "pretrain") == 0
    assert all(path.startswith("/api/") for path, _ in hub.requests)
    out = capfd.readouterr().out
    assert out.count("there   ") == 4 and "0 B to fetch" in out


def test_dry_run_lists_and_fetches_nothing(hub, tmp_path, capfd):
    assert download.main(["pretrain", "--dry_run", "--to", str(tmp_path / "new")]) == 0
    assert not (tmp_path / "new").exists()
    assert all(path.startswith("/api/") for path, _ in hub.requests)
    out = capfd.readouterr().out
    assert "fetch     300.0 kB  dataset/pretrain_i2t.parquet" in out
    assert "300.0 kB to fetch" in out and "checked by sha256" in out


def test_without_a_terminal_it_does_not_start(hub, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert download.main(["pretrain", "--to", str(tmp_path)]) == 1
    assert "--yes" in capfd.readouterr().err and not files_below(tmp_path)


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("", 1), ("no", 1)])
def test_it_asks_before_it_starts(answer, status, hub, tmp_path, monkeypatch):
    terminal = io.StringIO(f"{answer}\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert download.main(["pretrain", "--to", str(tmp_path)]) == status
    assert bool(files_below(tmp_path)) == (status == 0)


def test_file_replaced_on_the_hub_is_refused_before_it_is_fetched(hub, tmp_path, capfd):
    hub.files[DATA]["pretrain_i2t.parquet"] = b"another"
    error = error_of(capfd, tmp_path, "pretrain")
    assert "it was replaced there" in error and "--revision" in error
    assert not files_below(tmp_path) and not hub.ranges("pretrain_i2t")
    assert run(tmp_path, "pretrain", "--revision", "main") == 0, "the way out works"


def test_too_small_disk_is_refused_before_anything_is_fetched(hub, tmp_path, capfd, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    enough = disk.DISK_MARGIN_BYTES + len(PARQUET)
    for free, status in ((enough - 1, 1), (enough, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, f=free: usage._replace(free=f))
        assert run(tmp_path, "pretrain") == status
        assert bool(files_below(tmp_path)) == (status == 0)
    assert "300.0 kB to come" in capfd.readouterr().err


@pytest.mark.parametrize("own", [b"mine", PARQUET[::-1]], ids=["other size", "same size"])
def test_file_of_the_user_is_not_overwritten(own, hub, tmp_path, capfd):
    path = tmp_path / "dataset/pretrain_i2t.parquet"
    path.parent.mkdir()
    path.write_bytes(own)
    error = error_of(capfd, tmp_path, "pretrain")
    assert str(path) in error and "--force" in error and path.read_bytes() == own
    assert run(tmp_path, "pretrain", "--force") == 0 and path.read_bytes() == PARQUET


def test_force_replaces_only_what_differs(hub, tmp_path):
    assert run(tmp_path, "vision") == 0
    config = tmp_path / "model/vision_model/clip-vit-base-patch16/config.json"
    config.write_bytes(b"{}")
    hub.requests.clear()
    assert run(tmp_path, "vision", "--force") == 0
    assert config.read_bytes() == CONFIG
    assert len([path for path, _ in hub.requests if path.startswith("/bytes/")]) == 1


BAD_WORDS = {
    "unknown": (["pretrian"], "unknown asset 'pretrian' (did you mean pretrain?); choose from"),
    "two revisions": (["sft", "vision", "--revision", "x"], "name exactly one asset"),
    "no revision": (["corpus", "--revision", "x"], "name exactly one asset"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words_end_in_one_line(case, hub, tmp_path, capfd):
    words, message = BAD_WORDS[case]
    assert message in error_of(capfd, tmp_path, *words)
    assert not hub.requests


@pytest.fixture
def published(hub, assets, monkeypatch, tmp_path_factory):
    """A hub with a real small weight and tokenizer; returns the hub and the tokenizer's folder."""
    tokenizer = assets / "tokenizer"
    folder = tmp_path_factory.mktemp("published")
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=2, vocab_size=400)
    torch.manual_seed(0)
    weight = folder / "llm_512.pth"
    model = MiniMindForCausalLM(config)
    torch.save({k: v.half() for k, v in model.state_dict().items()}, weight)
    hub.files[WEIGHTS][weight.name] = weight.read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        hub.files[TOKENIZER][name] = (tokenizer / name).read_bytes()
    pin(
        monkeypatch,
        manifest.TOKENIZER_SHA256,
        "tokenizer.json",
        hub.files[TOKENIZER]["tokenizer.json"],
    )
    return hub, tokenizer


def test_weight_and_tokenizer_are_recorded_as_belonging_together(published, tmp_path, capfd):
    hub, tokenizer = published
    assert run(tmp_path, "llm_512") == 0
    weight = tmp_path / "out/llm_512.pth"
    metadata = read_metadata(weight)
    assert metadata["tokenizer_sha256"] == tokenizer_sha256(load_tokenizer(tokenizer))
    assert metadata["source"] == {
        "hub": "huggingface",
        "repository": WEIGHTS,
        "file": weight.name,
        "revision": COMMIT,
    }
    sizes = weight_config(read_weights(weight), path=weight, flags={})
    assert (sizes["hidden_size"], sizes["num_hidden_layers"]) == (32, 2)
    fetched = tmp_path / manifest.TOKENIZER_DIRS[2]
    load_tokenizer(fetched, expected_sha256=metadata["tokenizer_sha256"])
    assert f"note: {WEIGHTS} is taken at main, now {COMMIT}" in capfd.readouterr().out
    before = weight.with_suffix(".json").stat().st_mtime_ns
    assert run(tmp_path, "llm_512") == 0
    assert weight.with_suffix(".json").stat().st_mtime_ns == before


def test_weight_replaced_by_force_gets_its_own_record(published, tmp_path):
    weight = tmp_path / "out/llm_512.pth"
    weight.parent.mkdir()
    weight.write_bytes(b"mine")
    weight.with_suffix(".json").write_text('{"format": 1, "config": {}, "tokenizer_sha256": "0"}')
    assert run(tmp_path, "llm_512", "--force") == 0
    assert read_metadata(weight)["source"]["repository"] == WEIGHTS


def test_successor_of_the_tokenizer_is_refused(published, tmp_path, capfd):
    hub, _ = published
    hub.files[TOKENIZER]["tokenizer.json"] = b'{"version": "other"}'
    error = error_of(capfd, tmp_path, "llm_512")
    assert "tokenizer.json" in error and "wrong sha256" in error
    assert not (tmp_path / manifest.TOKENIZER_DIRS[2] / "tokenizer.json").exists()


def test_metadata_that_names_another_tokenizer_is_not_overwritten(published, tmp_path, capfd):
    assert run(tmp_path, "llm_512") == 0
    beside = tmp_path / "out/llm_512.json"
    text = json.dumps(json.loads(beside.read_text()) | {"tokenizer_sha256": "0" * 64})
    beside.write_text(text)
    assert "names another tokenizer" in error_of(capfd, tmp_path, "llm_512")
    assert beside.read_text() == text


def test_script_runs_from_any_directory(hub, tmp_path):
    """The real process: paths of the user, exit status, nothing left in the home directory."""
    home = tmp_path / "home"
    words = ("dataset/download.py", "vision", "--yes", "--to", "assets")
    process = run_script(*words, cwd=tmp_path, env=hub.environment(home), cold=True)
    folder = tmp_path / "assets/model/vision_model/clip-vit-base-patch16"
    assert (folder / "config.json").read_bytes() == CONFIG
    assert "all there" in process.stdout and not home.exists()
    words = ("dataset/download.py", "gone")
    process = run_script(*words, check=False, env=hub.environment(home), cold=True)
    assert process.returncode == 1 and process.stderr.startswith("error: unknown asset 'gone'")
    assert process.stderr.count("\n") == 1


def test_module_explains_itself_in_both_languages():
    command = [sys.executable, "-m", "dataset.download", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "do not ask / 不再询问" in text
    assert all(f"  {name}" in text for name in (*manifest.ASSETS, manifest.CORPUS))


def test_end_of_input_at_the_question_fetches_nothing(hub, tmp_path, monkeypatch, capfd):
    def end(_question):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert download.main(["vision", "--to", str(tmp_path)]) == 1
    assert "nothing fetched" in capfd.readouterr().out and not files_below(tmp_path)


def test_interrupt_says_that_it_can_go_on(hub, tmp_path, capfd, monkeypatch):
    def interrupted(remote, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "fetch", interrupted)
    assert run(tmp_path, "pretrain") == download.INTERRUPTED
    assert "goes on from here" in capfd.readouterr().err
