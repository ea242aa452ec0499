"""Owns sending an export to Hugging Face's hub: what would be sent, and one commit that sends it.

The repository shows the whole export or nothing of it: large files are uploaded first, and appear
by the commit alone. What other files the repository has stay as they are.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from model.export.card import CARD, FRONT_MATTER, UNKNOWN

HUBS = ("huggingface", "modelscope")
DEFAULT_ENDPOINT = "https://huggingface.co"  # else HF_ENDPOINT, as dataset/download.py has it
OWN_FILES = (".gitattributes",)  # the hub makes them in every repository
MAX_NAMED = 3  # files in an error
READ_BYTES = 1 << 22
WAYS_OUT = {
    401: "the token is not valid there; `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; make one with the right to write, or name another USER",
    404: "there is no such repository for this token; name another USER",
    409: "it is taken and this token may not read it; name another one",
    412: "somebody else has just changed it; look there, then run the same command again",
}


@dataclass(frozen=True)
class Target:
    """Where an export goes: `repo` is USER/NAME."""

    repo: str
    private: bool = False
    force: bool = False

    @property
    def endpoint(self) -> str:
        """The hub's URL, or that of the mirror in `HF_ENDPOINT`."""
        return os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")


def check_target(repo: str, *, hub: str, folder: Path, sends: bool) -> None:
    """Check what can be known before the export is made.

    Raises:
        ValueError: no such name can be, the hub takes no whole folder, or there is no token.
    """
    if hub == "modelscope":
        raise ValueError(
            "--push sends to Hugging Face alone: ModelScope's client makes several commits of a "
            f"folder, which show it by halves; send it by `modelscope upload {repo} {folder}`"
        )
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"--push {repo!r}: {error}") from None
    if "/" not in repo:
        raise ValueError(f"--push {repo}: name it USER/NAME")
    if sends and not get_token():
        raise ValueError(
            "--push needs a token with the right to write: `hf auth login`, or set HF_TOKEN"
        )


def files_of(folder: Path) -> dict[str, Path]:
    """The files of an export by their names in the repository.

    Raises:
        FileNotFoundError, ValueError: it is no export with a card.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--out {folder}: no such folder; --to FORMAT makes it")
    card = folder / CARD
    if not card.is_file() or not FRONT_MATTER.match(card.read_text(encoding="utf-8")):
        raise ValueError(
            f"{folder} has no {CARD} that begins with fields between lines of ---, so it is no "
            "export of today; export it again by --to FORMAT"
        )
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def plan(folder: Path, target: Target) -> str:
    """What would be sent, where, and the card, in words."""
    files = files_of(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    width = max(len(f"{size:,}") for size in sizes.values())
    lines = [f"{size:>{width},} bytes  {name}" for name, size in sizes.items()]
    card = files[CARD].read_text(encoding="utf-8")
    where = f"{target.endpoint}/{target.repo}"
    total = f"{len(sizes)} files, {sum(sizes.values()):,} bytes -> {where}"
    if f"\nlicense: {UNKNOWN}\n" in card:
        lines.append(f"note: its license is {UNKNOWN}; --license of the export, or {CARD}, says it")
    return "\n".join([card, *lines, total])


def push(folder: Path, target: Target) -> str:
    """Send an export in one commit; returns its address, or that all is there already.

    Raises:
        ValueError: the repository holds other files, and `force` is not set.
        OSError: why the hub did not take it.
    """
    files = files_of(folder)
    api = HfApi(endpoint=target.endpoint)
    with _explained(target):
        try:
            info = api.model_info(target.repo, files_metadata=True)
        except RepositoryNotFoundError:
            api.create_repo(target.repo, private=target.private or None)
            found, parent = {}, None
        else:
            found, parent = {file.rfilename: file for file in info.siblings or []}, info.sha
        same = {n for n, file in found.items() if n in files and _is_same(file, files[n])}
        if same == files.keys():
            return f"{target.endpoint}/{target.repo} has all of it already"
        others = sorted(found.keys() - same - set(OWN_FILES))
        if others and not target.force:
            more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
            raise ValueError(
                f"{target.repo} holds other files ({', '.join(others[:MAX_NAMED])}{more}); --force "
                "replaces those of the same names by a commit on top, and leaves the others"
            )
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        message = "Upload an export of MiniMind-V"
        made = api.create_commit(
            target.repo, operations, commit_message=message, parent_commit=parent
        )
    return str(made.commit_url)


def _is_same(theirs: RepoSibling, path: Path) -> bool:
    """Whether a file of the repository has the bytes of a local one."""
    size = path.stat().st_size
    if theirs.size != size:
        return False
    git_blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    digest = hashlib.sha256() if theirs.lfs else git_blob
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest() == (theirs.lfs.sha256 if theirs.lfs else theirs.blob_id)


@contextmanager
def _explained(target: Target) -> Iterator[None]:
    """Raise OSError in one line for whatever the hub or its client says."""
    where = f"{target.repo} on {target.endpoint}"
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            way_out = WAYS_OUT.get(status, "try again later")
            raise OSError(f"{where}: HTTP {status}, {way_out}; no commit was made") from error
        reason = (str(cause or error).strip().splitlines() or [type(error).__name__])[0]
        raise ConnectionError(
            f"{where} cannot be reached ({reason}); no commit was made, try again"
        ) from error
