"""Owns what is asked of other machines: which shards there are, and bytes of them.

Every request is tried again, with longer and longer pauses; what does not come at all is a
`StreamError` of one line that begins with the address. The file systems are those of fsspec.
"""

import os
import posixpath
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec

from dataset.records.address import Address

Result = TypeVar("Result")
Item = TypeVar("Item")
Wanted = Callable[[], bool]
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # between two tries
PAUSES_IF_GONE = 3  # of them, for a shard that the server does not have
CONNECT_S, SILENCE_S = 20.0, 60.0  # after which a connection counts as dead
AT_ONCE = 32  # requests about shards
MOST_ASKED = 512  # shards that are all asked about before the first step
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
SCHEMES = ("hf", *PACKAGES, "file")
TAGS = ("ETag", "etag", "blob_id", "sha256", "md5", "Last-Modified", "LastModified", "mtime",
        "created")  # fmt: skip


def always() -> bool:
    """What is asked for is wanted whatever happens."""
    return True


class StreamError(ValueError):
    """What is on another machine cannot be had; begins with its address."""


@dataclass(frozen=True)
class Shard:
    """A file on another machine. tag: changes with its content; "" where the server has none."""

    url: str
    size: int
    tag: str

    @property
    def name(self) -> str:
        """The last part of the address, for messages."""
        return Address(self.url).name


class Shards:
    """The shards of an address, by number. Of very many that are named one by one, each is asked
    about when it is first needed, so that a run starts as soon with a million as with a thousand.
    """

    def __init__(self, remote: "Remote", urls: Sequence[str], known: Mapping[int, Shard]):
        self.urls = list(urls)
        self._remote, self._known = remote, dict(known)

    @property
    def names(self) -> list[str]:
        """The last part of each address."""
        return [Address(url).name for url in self.urls]

    @property
    def is_known(self) -> bool:
        """Whether all have been asked about."""
        return len(self._known) == len(self.urls)

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, number: int) -> Shard:
        return self.ask([number])[0]

    def ask(self, numbers: Sequence[int]) -> list[Shard]:
        """Several of them, asked about at once."""
        unknown = [number for number in numbers if number not in self._known]
        found = at_once(lambda number: self._remote.about(self.urls[number]), unknown)
        self._known.update(zip(unknown, found, strict=True))
        return [self._known[number] for number in numbers]


class Remote:
    """The file system that holds the shards of an address; each process opens it for itself."""

    def __init__(self, address: Address):
        self.address = address
        self._opened: tuple[int, Any] | None = None  # process id and file system

    def __reduce__(self) -> Any:
        return Remote, (self.address,)

    @property
    def files(self) -> Any:
        """The file system; raises `StreamError` where a package is missing."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), self._open()
        return self._opened[1]

    def _open(self) -> Any:
        scheme, options = self.address.scheme, {}
        if scheme not in SCHEMES:
            names = ", ".join(f"{one}://" for one in SCHEMES)
            raise StreamError(f"{self.address}: {scheme}:// is not read; {names} are")
        try:
            if scheme in ("http", "https"):
                import aiohttp

                limits = aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S
                )
                options = {"client_kwargs": {"timeout": limits, "trust_env": True}}
            return fsspec.filesystem(scheme, **options)
        except ImportError as error:
            package = PACKAGES.get(scheme)
            way_out = f"`pip install {package}`" if package else str(error).partition("\n")[0]
            raise StreamError(f"{self.address}: reading {scheme}:// needs {way_out}") from error

    def _path(self, url: str) -> str:
        return str(self.files._strip_protocol(url))

    def shards(self) -> Shards:
        """The shards of the address: those of patterns, in the order of names, then the others.

        Raises:
            StreamError: there is none, or one cannot be asked about.
        """
        found: list[Shard] = []
        single = []
        signs = "*[" if self.address.scheme.startswith("http") else "*?["
        for url in self.address.urls():
            if set(url) & set(signs):
                found += self._matching(url)
            else:
                single.append(url)
        if not found and not single:
            raise StreamError(f"{self.address}: nothing there matches it")
        urls = [*(shard.url for shard in found), *single]
        shards = Shards(self, urls, dict(enumerate(found)))
        if len(shards) <= MOST_ASKED:
            shards.ask(range(len(shards)))
        return shards

    def _matching(self, url: str) -> list[Shard]:
        entries = patiently(lambda: self.files.glob(self._path(url), detail=True), url=url)
        scheme = self.address.scheme
        if scheme.startswith("http"):  # a listing in HTML names no sizes
            return at_once(self.about, sorted(entries))
        return [
            self._shard(f"{scheme}://{name.lstrip('/') if scheme != 'file' else name}", entry)
            for name, entry in sorted(entries.items())
            if entry.get("type") != "directory"
        ]

    def about(self, url: str) -> Shard:
        """What the server says of a shard."""
        return self._shard(url, patiently(lambda: self.files.info(self._path(url)), url=url))

    def _shard(self, url: str, info: dict[str, Any]) -> Shard:
        if info.get("type") == "directory":
            pattern = posixpath.join(url, "*.parquet")
            raise StreamError(f"{url} is a folder; name its shards by a pattern, as {pattern}")
        if info.get("size") is None:
            raise StreamError(f"{url}: its server does not say how large it is")
        tag = next((str(info[name]) for name in TAGS if info.get(name)), "")
        return Shard(url, int(info["size"]), tag)

    def check_unchanged(self, shard: Shard) -> None:
        """Raise StreamError where the shard is no longer what it was when the run began."""
        path = self._path(shard.url)
        is_hub = self.address.scheme == "hf"  # its answer says too little unless it is expanded
        options = {"refresh": True, "expand_info": True} if is_hub else {}

        def ask() -> Any:
            if not is_hub:
                self.files.invalidate_cache(self.files._parent(path))
            return self.files.info(path, **options)

        if self._shard(shard.url, patiently(ask, url=shard.url)) != shard:
            raise StreamError(
                f"{shard.url} was changed while it is in use; begin a new run, best with an "
                "address that does not change (hf://datasets/USER/NAME@REVISION/...)"
            )

    def read(self, shard: Shard, start: int, end: int, *, is_wanted: Wanted = always) -> bytes:
        """The bytes of a shard from start to end; all of them where its server knows no ranges.

        Args:
            is_wanted: whether a failed request is worth another try.
        Raises:
            StreamError: they do not come.
        """
        options = {"cache_type": "none"} if self.address.scheme == "hf" else {}

        def ask() -> bytes:
            path = self._path(shard.url)
            data = bytes(self.files.cat_file(path, start=start, end=end, **options))
            if len(data) not in (end - start, shard.size):
                raise EOFError(f"cut off: {len(data)} of {end - start} bytes came")
            return data

        return patiently(ask, url=shard.url, is_wanted=is_wanted)


def at_once(ask: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The answers about all items, in their order, by several requests at a time; raises what the
    first of them raised. A program that ends does not wait for its threads."""
    if len(items) < 2:
        return [ask(item) for item in items]
    answers: dict[int, Result] = {}
    failures: dict[int, Exception] = {}
    left = deque(enumerate(items))

    def work() -> None:
        while left and not failures:
            try:
                number, item = left.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                answers[number] = ask(item)
            except Exception as error:  # it is raised below
                failures[number] = error

    num_threads = min(AT_ONCE, len(items))
    threads = [threading.Thread(target=work, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[min(failures)]
    return [answers[number] for number in range(len(items))]


def patiently(ask: Callable[[], Result], *, url: str, is_wanted: Wanted = always) -> Result:
    """What a request answers, tried again after a failure.

    Raises:
        StreamError: it failed each time, or is not allowed.
    """
    for tries in range(1, len(PAUSES_S) + 2):
        try:
            return ask()
        except StreamError:
            raise
        except (TypeError, NotImplementedError) as error:  # no other try can help
            raise StreamError(f"{url}: it cannot be asked for ({first_line(error)})") from error
        except Exception as told:  # aiohttp, httpx and botocore each have errors of their own
            error = reason_of(told)
            status = status_of(error)
            if status in (401, 403):
                raise StreamError(f"{url}: not allowed ({status}); log in first") from error
            why = "it is not there (404)" if status == 404 else first_line(error)
            if not is_wanted() or tries > (PAUSES_IF_GONE if status == 404 else len(PAUSES_S)):
                raise StreamError(f"{url}: {why}, in each of {tries} tries") from error
            pause_s = PAUSES_S[tries - 1]
            sys.stderr.write(f"warning: {url}: {why}; try {tries + 1} follows in {pause_s:g} s\n")
            sys.stderr.flush()
            time.sleep(pause_s)
    raise AssertionError("unreachable")


def reason_of(error: Exception) -> Exception:
    """The error, or the failed connection that fsspec reports as a file that is not there."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, OSError):
        return cause
    return error


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error stands for, or None."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return 404 if isinstance(error, FileNotFoundError) else 403
    status = getattr(error, "status", None)  # aiohttp
    status = getattr(getattr(error, "response", None), "status_code", status)  # httpx
    return status if isinstance(status, int) else None


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return str(error).partition("\n")[0] or type(error).__name__
