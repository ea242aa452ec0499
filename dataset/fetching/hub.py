"""Owns the network: listing a repository, and fetching a file whole or not at all.

1. A file is received into a `.part` file in its folder; a later run resumes from that.
2. It gets its own name only when size and checksum are those that the hub declares.

There are two hubs, Hugging Face and ModelScope, and plain archives. The HTTP client is
`huggingface_hub`'s, so its proxy and offline settings apply. Its downloader is not used, because it
discards the bytes of an interrupted download, nor its HfApi, because that first sends a request
about the calling program to another address.
"""

import errno
import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, urlencode

from httpx2 import HTTPError
from huggingface_hub import get_session, hf_hub_url
from tqdm import tqdm

# Environment variable with a mirror's URL, and the default. huggingface_hub reads HF_ENDPOINT too.
ENDPOINTS = {
    "huggingface": ("HF_ENDPOINT", "https://huggingface.co"),
    "modelscope": ("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn"),
    "github": ("GITHUB_ENDPOINT", "https://github.com"),
    "opencompass": ("OPENCOMPASS_ENDPOINT", "https://opencompass.openxlab.space/utils"),
}
TIMEOUT_S = 30.0
MAX_STALLS = 5  # a fetch gives up after so many attempts in a row that receive nothing
RETRY_WAIT_S = 1.0
READ_BYTES = 1 << 22
MODELSCOPE_PAGE = 100


class TransientError(Exception):
    """The server could not answer now; asking again may help."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository, as its hub declares it; None where the hub does not say.

    `git_sha1` is the id of the git blob, which Hugging Face declares for small files; `md5` that of
    an older release. `way_out` says in errors what to do where the file cannot be had.
    """

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    md5: str | None = None
    way_out: str | None = None

    @property
    def identity(self) -> str:
        """Identifies this version of the file: a checksum, or a hash of the URL."""
        declared = self.sha256 or self.git_sha1 or self.md5
        return declared or hashlib.sha256(self.url.encode()).hexdigest()


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit (None where the hub does not name it)."""

    commit: str | None
    files: dict[str, RemoteFile] = field(default_factory=dict)


def endpoint(hub: str) -> str:
    """The URL of a hub, or of the mirror in its environment variable."""
    variable, default = ENDPOINTS[hub]
    return os.environ.get(variable, default).rstrip("/")


def list_files(hub: str, repo: str, *, kind: str, revision: str) -> Listing:
    """The files of a repository at a revision.

    Args:
        hub: "huggingface" or "modelscope".
        repo: "owner/name".
        kind: "model" or "dataset".
        revision: a commit, tag or branch.
    Raises:
        FileNotFoundError: no such repository or revision.
        ConnectionError: the hub cannot be reached, or its answer has an unknown form.
    """
    where = f"{repo} at revision {revision} on {endpoint(hub)}"
    ask = {"huggingface": _list_huggingface, "modelscope": _list_modelscope}[hub]
    try:
        return ask(repo, kind, revision)
    except HTTPError as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403, 404):
            raise FileNotFoundError(
                f"{where}: HTTP {response.status_code}, so there is no such repository or "
                "revision, or it is not public; try another --hub or --revision"
            ) from error
        raise ConnectionError(f"{where} cannot be listed ({_first_line(error)})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConnectionError(f"{where}: an answer of unknown form ({error!r})") from error


def _list_huggingface(repo: str, kind: str, revision: str) -> Listing:
    """Source: HfApi.model_info and dataset_info with files_metadata=True."""
    address = endpoint("huggingface")
    url = f"{address}/api/{kind}s/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    response = get_session().get(url, timeout=TIMEOUT_S)
    response.raise_for_status()
    info = response.json()
    files = {}
    for entry in info["siblings"]:
        name, lfs = entry["rfilename"], entry.get("lfs")
        url = hf_hub_url(repo, name, repo_type=kind, revision=info["sha"], endpoint=address)
        sha256 = lfs["sha256"] if lfs else None
        git_sha1 = None if lfs else entry.get("blobId")  # a large file's is that of its pointer
        files[name] = RemoteFile(url, name, entry.get("size"), sha256, git_sha1)
    return Listing(info["sha"], files)


def _list_modelscope(repo: str, kind: str, revision: str) -> Listing:
    """Source: modelscope/hub/api.py of the ModelScope client (names of paths and fields)."""
    base = f"{endpoint('modelscope')}/api/v1/{kind}s/{quote(repo)}/repo"
    query = {"Revision": revision, "Root": "", "PageNumber": 1, "PageSize": MODELSCOPE_PAGE}
    listing = f"{base}/{'files' if kind == 'model' else 'tree'}?{urlencode(query)}"
    response = get_session().get(listing, timeout=TIMEOUT_S)
    response.raise_for_status()
    files = {}
    for entry in response.json()["Data"]["Files"]:
        if entry["Type"] != "tree":
            path = entry["Path"]
            url = f"{base}?{urlencode({'Revision': revision, 'FilePath': path})}"
            files[path] = RemoteFile(url, path, int(entry["Size"]), entry.get("Sha256") or None)
    return Listing(None, files)


def part_path(remote: RemoteFile, path: Path) -> Path:
    """The file to receive into: in the same folder, one for each version of the file."""
    return path.with_name(f".{path.name}.{remote.identity[:12]}.part")


def part_size(remote: RemoteFile, path: Path) -> int:
    """Bytes already received for a file."""
    part = part_path(remote, path)
    return part.stat().st_size if part.is_file() else 0


def is_same(remote: RemoteFile, path: Path) -> bool:
    """Whether a local file has the size and the checksum that the hub declares."""
    if remote.size is not None and path.stat().st_size != remote.size:
        return False
    return not _wrong_checksum(remote, path)


def _wrong_checksum(remote: RemoteFile, path: Path) -> str:
    """The first checksum that differs from the declared one, in words; "" if none does."""
    git_blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    for kind, expected, digest in (
        ("sha256", remote.sha256, hashlib.sha256()),
        ("git blob id", remote.git_sha1, git_blob),
        ("md5", remote.md5, hashlib.md5(usedforsecurity=False)),
    ):
        if expected is not None:
            with open(path, "rb") as file:
                while block := file.read(READ_BYTES):
                    digest.update(block)
            if digest.hexdigest() != expected:
                return f"{kind} {digest.hexdigest()}, expected {expected}"
    return ""


def fetch(remote: RemoteFile, path: Path) -> None:
    """Receive a file, resuming an earlier attempt, and check it.

    Raises:
        FileNotFoundError: the hub has no such file, or it is not public.
        ConnectionError: `MAX_STALLS` attempts received nothing; the received part is kept.
        ValueError: the checksum is wrong; nothing is left behind.
        OSError: the disk is full; the received part is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(remote, path)
    stalls = 0
    with tqdm(total=remote.size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        while not _is_complete(remote, part):
            before = part_size(remote, path)
            try:
                _receive(remote, part, bar)
                if remote.size is None:
                    break
                if part.stat().st_size < remote.size:
                    raise TransientError("the answer ended early")
            except (HTTPError, TransientError) as error:
                received = part_size(remote, path)
                stalls = stalls + 1 if received <= before else 0
                if stalls >= MAX_STALLS:
                    or_else = f", or {remote.way_out}" if remote.way_out else ""
                    raise ConnectionError(
                        f"{remote.url}: {_first_line(error)}; {received} of "
                        f"{remote.size or 'unknown'} bytes are kept in {part}: run the same "
                        f"command again to go on{or_else}"
                    ) from error
                time.sleep(RETRY_WAIT_S)
    if problem := _wrong_checksum(remote, part):
        part.unlink()
        raise ValueError(
            f"{remote.url} came with the wrong {problem}; nothing was left in {path}: try again, "
            f"or {remote.way_out or 'another --hub'}"
        )
    os.replace(part, path)


def _is_complete(remote: RemoteFile, part: Path) -> bool:
    if remote.size is None or not part.is_file():
        return False
    if part.stat().st_size > remote.size:  # not made by this module; no Range request mends it
        part.unlink()
        return False
    return part.stat().st_size == remote.size


def _check_offer(remote: RemoteFile, start: int, length: str | None) -> None:
    """Raise ValueError if an answer that begins at `start` will end elsewhere than the file."""
    if remote.size is not None and length is not None and start + int(length) != remote.size:
        raise ValueError(
            f"{remote.url} has {start + int(length)} bytes, expected {remote.size}: it is another "
            f"file, and nothing of it was taken; try again, or {remote.way_out or 'another --hub'}"
        )


def _receive(remote: RemoteFile, part: Path, bar: "tqdm[NoReturn]") -> None:
    """One request: append the missing bytes, or get the file anew if the server has no ranges."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with get_session().stream("GET", remote.url, headers=headers, timeout=TIMEOUT_S) as response:
        status = response.status_code
        if status in (401, 403, 404):
            raise FileNotFoundError(
                f"{remote.url}: HTTP {status}, so the file is not there or not public; "
                f"{remote.way_out or 'try another --hub or --revision'}"
            )
        if status not in (200, 206):
            if status == 416:  # the part is longer than the file: begin again
                part.unlink(missing_ok=True)
            raise TransientError(f"HTTP {status}")
        if status == 206 and not response.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        ):
            raise TransientError("the server sent another range than the one asked for")
        start = have if status == 206 else 0
        if "Content-Encoding" not in response.headers:  # else the length is of the packed bytes
            _check_offer(remote, start, response.headers.get("Content-Length"))
        bar.n = start
        try:
            with open(part, "ab" if status == 206 else "wb") as file:
                for block in response.iter_bytes():
                    file.write(block)
                    bar.update(len(block))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"the disk of {part.parent} is full; what was received is kept in {part.name}: "
                "free some space and run the same command again, or name another folder by --to"
            ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
