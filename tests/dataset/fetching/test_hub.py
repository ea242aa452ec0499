"""If this fails, a download that is cut off leaves a damaged file in place, or starts over instead
of fetching the rest.
"""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.fake_hub import CLIP, DATA, PARQUET, error_of, files_below, run
from support.scripts import ROOT, script_environment

from dataset.fetching import assets as manifest
from dataset.fetching import hub as network


def test_cut_connection_is_resumed_with_the_rest_only(hub, tmp_path):
    hub.cuts["pretrain_i2t.parquet"] = [100_000, 50_000]
    assert run(tmp_path, "pretrain") == 0
    assert (tmp_path / "dataset/pretrain_i2t.parquet").read_bytes() == PARQUET
    assert hub.ranges("pretrain_i2t") == [None, "bytes=100000-", "bytes=150000-"]
    assert files_below(tmp_path) == ["dataset/pretrain_i2t.parquet"]


def test_next_run_goes_on_where_the_last_one_gave_up(hub, tmp_path, capfd):
    hub.cuts["pretrain_i2t.parquet"] = [120_000, *[0] * network.MAX_STALLS]
    error = error_of(capfd, tmp_path, "pretrain")
    assert "120000 of 300000 bytes are kept" in error and "run the same command again" in error
    assert not (tmp_path / "dataset/pretrain_i2t.parquet").exists()
    hub.requests.clear()
    capfd.readouterr()
    assert run(tmp_path, "pretrain") == 0
    assert "180.0 kB to fetch" in capfd.readouterr().out
    assert hub.ranges("pretrain_i2t") == ["bytes=120000-"]
    assert (tmp_path / "dataset/pretrain_i2t.parquet").read_bytes() == PARQUET


def test_killed_run_is_resumed_with_the_rest_only(hub, tmp_path):
    """Nothing of the process survives `kill -9` but what it had received."""
    name = "pytorch_model.bin"
    hub.files[CLIP][name] = PARQUET
    hub.stalls[name] = 100_000
    words = ("vision", "--yes", "--to", str(tmp_path))
    command = [sys.executable, str(ROOT / "dataset/download.py"), *words]
    env = script_environment() | hub.environment(tmp_path / "home")
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    folder = tmp_path / "model/vision_model/clip-vit-base-patch16"
    deadline = time.monotonic() + 60
    while not [p for p in folder.glob(f".{name}.*.part") if p.stat().st_size]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    hub.release.set()
    [part] = folder.glob(f".{name}.*.part")
    received = part.stat().st_size
    assert run(tmp_path, "vision") == 0
    assert hub.ranges(name) == [None, f"bytes={received}-"]
    assert (folder / name).read_bytes() == PARQUET and not part.exists()


def test_server_without_ranges_starts_over(hub, tmp_path):
    hub.without_range = True
    hub.cuts["pretrain_i2t.parquet"] = [100_000]
    assert run(tmp_path, "pretrain") == 0
    assert hub.ranges("pretrain_i2t") == [None, "bytes=100000-"]
    assert (tmp_path / "dataset/pretrain_i2t.parquet").read_bytes() == PARQUET


def test_busy_server_is_asked_again_but_not_for_ever(hub, tmp_path, capfd):
    hub.busy["pretrain_i2t.parquet"] = network.MAX_STALLS - 1
    assert run(tmp_path, "pretrain") == 0
    hub.busy["sft_i2t.parquet"] = 1000
    assert "HTTP 503" in error_of(capfd, tmp_path, "sft")
    assert len(hub.ranges("sft_i2t")) == network.MAX_STALLS


@pytest.mark.parametrize(
    ("asset", "name", "kind"),
    [("pretrain", "pretrain_i2t.parquet", "sha256"), ("vision", "config.json", "git blob id")],
)
def test_wrong_checksum_leaves_nothing(asset, name, kind, hub, tmp_path, capfd):
    hub.corrupt.add(name)
    error = error_of(capfd, tmp_path, asset)
    assert f"came with the wrong {kind}" in error and name in error
    assert not [x for x in files_below(tmp_path) if name in x]
    hub.corrupt.clear()
    assert run(tmp_path, asset) == 0


def test_missing_repository_file_and_bytes_are_named(hub, tmp_path, capfd):
    hub.vanished.add("pretrain_i2t.parquet")
    error = error_of(capfd, tmp_path, "pretrain")
    assert "pretrain_i2t.parquet: HTTP 404, so the file is not there" in error
    assert len([path for path, _ in hub.requests if "/resolve/" in path]) == 1, "asked once"
    there = "has no sft_vlm_data_multi.jsonl (there: pretrain_i2t.parquet, sft_i2t.parquet)"
    assert there in error_of(capfd, tmp_path, "multi_jsonl")
    assert there in error_of(capfd, tmp_path, "multi_jsonl", "--hub", "modelscope")
    del hub.files[DATA]
    error = error_of(capfd, tmp_path, "pretrain")
    assert f"{DATA} at revision" in error and "HTTP 404" in error and "--hub" in error
    assert not files_below(tmp_path)


def test_hub_out_of_reach_is_named(hub, tmp_path, capfd, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert f"http://127.0.0.1:{port} cannot be listed" in error_of(capfd, tmp_path, "pretrain")


@pytest.mark.parametrize("kind", ["vision", "pretrain"])
def test_fetch_from_modelscope(kind, hub, tmp_path, capfd):
    assert run(tmp_path, kind, "--hub", "modelscope") == 0
    asset = manifest.ASSETS[kind]
    paths = [path for path, _ in hub.requests if not path.startswith("/bytes/")]
    assert all(p.startswith(f"/api/v1/{asset.kind}s/{asset.modelscope.repo}/repo") for p in paths)
    fetched = [p for p in (tmp_path / asset.folder).iterdir()]
    assert len(fetched) == len(asset.files)
    for path in fetched:
        assert path.read_bytes() == hub.files[asset.modelscope.repo][path.name]
    assert f"note: {asset.modelscope.repo} is taken at master" in capfd.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_disk_that_fills_up_is_one_clear_line(hub, tmp_path, capfd):
    listing = network.list_files("huggingface", DATA, kind="dataset", revision="main")
    path = tmp_path / "dataset/pretrain_i2t.parquet"
    path.parent.mkdir()
    part = network.part_path(listing.files[path.name], path)
    part.symlink_to("/dev/full")
    error = error_of(capfd, tmp_path, "pretrain")
    assert f"the disk of {path.parent} is full" in error and "run the same command again" in error
    assert not path.exists()
    part.unlink()
    assert run(tmp_path, "pretrain") == 0
