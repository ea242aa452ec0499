"""If this fails, an export reaches the hub by halves, unasked, over somebody's files, or with a
card that says what is not so.
"""

import json
import os
import signal

import pytest
import yaml
from huggingface_hub import constants
from support.exporting import export, make_kit
from support.hub_uploads import FRONT_MATTER, OWNER, READER, WRITER
from support.tiny_vlm import picture

from model.export.__main__ import main

REPO = f"{OWNER}/tiny"
COMMIT_PATH = f"/api/models/{REPO}/commit/main"
TAUGHT = {"languages": ["en"], "about": {"en": "rings on grey"}}
SCORES = {
    "weight": "somewhere/sft_vlm_32.pth",
    "categories": {"all": {"right": 3, "total": 4, "chance": 0.25}},
}


@pytest.fixture(scope="module")
def kit(assets, tmp_path_factory):
    """A weight that says how it was trained and what it was taught, its scores beside it."""
    made = make_kit(tmp_path_factory.mktemp("weights"), assets)
    beside = made.weight.with_suffix(".json")
    told = {"stage": "sft", "args": {"epochs": 2, "data_path": "/secret/place"}, "taught": TAUGHT}
    beside.write_text(json.dumps(json.loads(beside.read_text()) | told))
    (made.weight.parent / "scores.json").write_text(json.dumps(SCORES))
    return made


@pytest.fixture(scope="module")
def llama(kit, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "llama"
    export(kit, "llama", out, "--license", "apache-2.0", "--push", REPO)
    return out


@pytest.fixture
def site(hub, monkeypatch):
    """The hub, with a token that may write; large files go the way of Git LFS."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


def push(folder, *flags) -> int:
    return main(["--out", str(folder), "--push", REPO, *flags])


def refused(capfd, folder, *flags) -> str:
    capfd.readouterr()
    assert push(folder, *flags) == 1
    (line,) = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error: ")]
    return line


def bytes_of(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")}


def test_without_yes_nothing_is_sent(site, llama, capfd):
    assert push(llama) == 0
    out = capfd.readouterr().out
    assert not site.requests and not site.uploads.calls
    assert (llama / "README.md").read_text() in out
    for name, data in bytes_of(llama).items():
        assert f"{len(data):,} bytes  {name}" in out
    assert f"-> {site.url}/{REPO}" in out
    assert f"python -m model.export --out {llama} --push {REPO} --yes" in out


def test_push_is_one_commit_of_equal_bytes(site, llama, capfd):
    assert push(llama, "--yes", "--private") == 0
    assert site.uploads.created[REPO]["visibility"] == "private"
    (commit,) = site.uploads.commits[REPO]
    assert {n: d for n, d in site.files[REPO].items() if n != ".gitattributes"} == bytes_of(llama)
    assert f"{site.url}/{REPO}/commit/" in capfd.readouterr().out
    assert [call for call in site.uploads.calls if call.startswith("PUT /lfs/")]
    assert push(llama, "--yes") == 0
    assert "has all of it already" in capfd.readouterr().out
    assert site.uploads.commits[REPO] == [commit]


def test_export_and_push_at_once(site, kit, tmp_path, capfd):
    flags = [*kit.flags, "--to", "llama", "--out", str(tmp_path / "out"), "--push", REPO, "--yes"]
    assert main(flags) == 0
    assert len(site.uploads.commits[REPO]) == 1 and "note: its license is unknown" in (
        capfd.readouterr().out
    )


def test_files_of_others_need_force_and_stay(site, llama, capfd):
    theirs = {"model.safetensors": b"theirs", "notes.txt": b"kept", ".gitattributes": b""}
    site.files[REPO] = dict(theirs)
    line = refused(capfd, llama, "--yes")
    assert "holds other files (model.safetensors, notes.txt); --force replaces" in line
    assert site.files[REPO] == theirs
    assert push(llama, "--yes", "--force") == 0
    (commit,) = site.uploads.commits[REPO]
    assert commit["parentCommit"] == site.first_commit
    assert site.files[REPO] == theirs | bytes_of(llama)


def test_somebody_elses_commit_meanwhile_is_not_built_upon(site, llama, capfd):
    site.files[REPO] = {}
    site.uploads.at_call[COMMIT_PATH] = lambda: site.uploads.commits[REPO].append({})
    assert "HTTP 412, somebody else has just changed it" in refused(capfd, llama, "--yes")
    assert site.files[REPO] == {}


@pytest.mark.parametrize(
    ("token", "line"),
    [
        ("", "--push needs a token with the right to write: `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", "HTTP 401, the token is not valid there; `hf auth login`"),
        (READER, "HTTP 403, the token may not write there"),
    ],
)
def test_token_that_does_not_do_is_one_line(token, line, site, llama, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert line in refused(capfd, llama, "--yes")
    assert REPO not in site.files


def test_large_file_that_is_refused_leaves_no_commit(site, llama, capfd):
    site.uploads.refuses[f"/{REPO}.git/info/lfs/objects/batch"] = 403
    assert "HTTP 403" in refused(capfd, llama, "--yes")
    assert not site.uploads.commits[REPO] and list(site.files[REPO]) == [".gitattributes"]


def test_network_that_is_down_is_one_line(site, llama, capfd, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    line = refused(capfd, llama, "--yes")
    assert "on http://127.0.0.1:9 cannot be reached" in line and "no commit was made" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_half_visible(number, site, llama, capfd):
    site.uploads.at_call[COMMIT_PATH] = lambda: os.kill(os.getpid(), number)
    site.uploads.refuses[COMMIT_PATH] = 503
    assert push(llama, "--yes") == 128 + number
    assert "shows all of it or nothing" in capfd.readouterr().err
    assert list(site.files[REPO]) == [".gitattributes"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--push", "tiny"], "--push tiny: name it USER/NAME"),
        (["--push", "a/b/c"], "--push 'a/b/c'"),
        (["--push", REPO, "--hub", "modelscope"], f"send it by `modelscope upload {REPO}"),
        (["--push", REPO, "--to", "pth"], "--push sends a folder, and --to pth makes one file"),
        (["--push", REPO, "--license", "mit"], "give --to FORMAT"),
        (["--to", "llama", "--yes"], "are of --push USER/NAME"),
        (["--push", REPO, "--out", "nowhere"], "--out nowhere: no such folder"),
        (["--push", REPO], "has no README.md"),
        (["--to", "llama", "--scores", "none.json"], "--scores none.json: no such file"),
        (["--to", "llama", "--scores", "OTHER"], "is of other.pth, not of sft_vlm_32.pth"),
    ],
)
def test_flags_that_do_not_do_are_one_line(flags, line, site, kit, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(SCORES | {"weight": "other.pth"}))
    words = [str(other) if word == "OTHER" else word for word in flags]
    out = [] if "--out" in words else ["--out", str(tmp_path / "empty")]
    if "--to" not in words:
        (tmp_path / "empty").mkdir()
    assert main([*kit.flags, *words, *out]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err, err
    assert not site.requests and not site.uploads.calls


def test_card_says_what_the_weight_says(llama, kit):
    card = (llama / "README.md").read_text()
    fields = yaml.safe_load(FRONT_MATTER.match(card)[1])
    assert fields == {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minimind-v", "llama"],
    }
    assert "taught rings on grey" in card and "- epochs: 2" in card and "secret" not in card
    assert "| all | 4 | 75.0% | 25.0% |" in card
    assert json.loads(kit.weight.with_suffix(".json").read_text())["tokenizer_sha256"][:12] in card
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in card and "NAME" not in card


@pytest.mark.slow
@pytest.mark.parametrize("to", ["llama", "llava", "transformers"])
def test_card_s_code_runs(to, kit, tmp_path, monkeypatch, capsys):
    """As somebody would paste it, in the folder that holds the repository and a picture."""
    monkeypatch.chdir(tmp_path)
    picture(6).save("picture.png")
    export(kit, to, tmp_path / "tiny")
    card = (tmp_path / "tiny" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert '"tiny"' in code
    capsys.readouterr()
    exec(compile(code, to, "exec"), {})
    assert capsys.readouterr().out.strip()
