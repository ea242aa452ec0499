"""If this fails, a write that is cut off destroys the file before it, or writing through a link or
a pipe replaces it.
"""

import os
import pty
import threading
from pathlib import Path

import pytest
import torch
from support.tiny_vlm import make_loaded, save_tiny

from model.machine.atomic_file import atomic_write, check_place
from model.weights.metadata import read_metadata
from model.weights.strict_loading import read_weights
from trainer.trainer_utils import vlm_checkpoint


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), RuntimeError("torch: disk")])
def test_atomic_write_failing_leaves_the_old_file(tmp_path, failure):
    def write(file):
        file.write(b"half")
        raise failure

    (tmp_path / "x.pth").write_bytes(b"old")
    with pytest.raises(OSError, match=r"could not write .*x\.pth.*untouched"):
        atomic_write(tmp_path / "x.pth", write)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x.pth", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_atomic_write_names_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(OSError, match=r"could not write .*x\.pth"):
        atomic_write(tmp_path / "out" / "x.pth", lambda file: file.write(b"new"))


def put(path, content: bytes = b"new") -> None:
    atomic_write(path, lambda file: file.write(content))


def test_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "there").write_bytes(b"old")
    for name, target in (("a", "disk/there"), ("b", "disk/not_yet"), ("c", "a")):
        (tmp_path / name).symlink_to(target)
        put(tmp_path / name, name.encode())
        assert (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == name
    assert (tmp_path / "disk" / "there").read_bytes() == b"c", "a link to a link"
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {"there", "not_yet"}


def test_weight_is_saved_through_a_link(assets, tmp_path):
    """As where `out/` holds links to a larger disk."""
    (tmp_path / "disk").mkdir()
    path = tmp_path / "sft_vlm_32.pth"
    path.symlink_to("disk/sft_vlm_32.pth")
    for _ in range(2):
        save_tiny(make_loaded(assets), path)
        assert path.is_symlink() and len(read_weights(path)) > 10
        assert read_metadata(path)["config"]["hidden_size"] == 32
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["sft_vlm_32.pth"]


def test_state_behind_a_link_keeps_the_one_before(tmp_path):
    (tmp_path / "disk").mkdir()
    path = tmp_path / "x_resume.pth"
    path.symlink_to("disk/x_resume.pth")
    for step in (1, 2):
        vlm_checkpoint(path, {"step": step}, identity={})
    assert path.is_symlink() and vlm_checkpoint(path, identity={})["step"] == 2
    steps = [torch.load(p, weights_only=True)["step"] for p in tmp_path.glob("*.prev*")]
    assert steps == [1]


def test_pipe_is_written_to_and_stays(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    put(pipe)
    reader.join(timeout=10)
    assert not pipe.is_file() and list(tmp_path.iterdir()) == [pipe]
    assert read == [b"new"]


def test_terminal_is_written_to():
    leader, follower = pty.openpty()
    try:
        put(Path(os.ttyname(follower)))
        assert os.read(leader, 100) == b"new"
    finally:
        os.close(leader)
        os.close(follower)


def test_pipe_whose_reader_has_left_is_named():
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(OSError, match=rf"could not write to /dev/fd/{writer}"):
        put(Path(f"/dev/fd/{writer}"))
    os.close(writer)


def test_place_is_checked_without_a_trace(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.json").write_text("old")
    for name, message in (
        ("folder", "it is a folder"),
        ("gone/x.json", "there is no folder"),
        ("old.json/x.json", "there is no folder"),
        ("x" * 250, "file name too long"),
        ("loop", "it is a link to itself"),
    ):
        with pytest.raises(ValueError, match=rf"(?i)--json .* cannot be written \({message}"):
            check_place(tmp_path / name, flag="--json")
    for path in (tmp_path / "new.json", tmp_path / "old.json", Path("/dev/null")):
        check_place(path, flag="--json")
    assert {p.name for p in tmp_path.iterdir()} == {"loop", "folder", "old.json"}
