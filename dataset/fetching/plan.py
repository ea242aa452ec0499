"""Owns the plan of a download: which assets are meant, what is there, what is to be fetched.

Of a branch, the plan prints and records the commit that it points to now. Every file is checked
against the size and checksum that the hub declares, and against a pinned checksum where there is
one.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from dataset.fetching.assets import ASSETS, DEFAULT_ASSETS, OF_NO_HUB, Asset, Source
from dataset.fetching.hub import RemoteFile, is_same, list_files, part_size

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Item:
    """One file of the plan; `state` is "fetch", "there" or "differs"."""

    asset: str
    remote: RemoteFile
    path: Path
    state: str
    origin: dict[str, str]

    @property
    def missing_bytes(self) -> int:
        return max(0, (self.remote.size or 0) - part_size(self.remote, self.path))


def _of_generation(name: str, generation: int | None) -> str:
    """The asset that a name means under --generation.

    A name of generation 2, or the name of a weight's file, means the one of generation 3 there.

    Raises:
        ValueError: the asset serves the other generation alone.
    """
    if generation == 3:
        names = {"vision": "vision3", "tokenizer": "tokenizer3"}
        names |= {
            a.files[0].removesuffix(".pth"): n
            for n, a in ASSETS.items()
            if a.stage and a.generation == 3
        }
        name = names.get(name, name)
    if generation and name in ASSETS and ASSETS[name].generation not in (None, generation):
        raise ValueError(
            f"{name} is of generation {ASSETS[name].generation}, not {generation}; leave out "
            f"--generation, or choose from {', '.join(_names_of(generation))}"
        )
    return name


def _names_of(generation: int) -> list[str]:
    return [n for n, a in ASSETS.items() if a.generation in (None, generation)]


def chosen_assets(
    names: list[str], *, revision: str | None, generation: int | None = None
) -> list[str]:
    """Asset names in order, each after those it needs.

    Args:
        generation: which one is meant where a name could mean either; None: as named.
    Raises:
        ValueError: an unknown name, one of the other generation, or a revision for anything but
            one asset of a hub.
    """
    known = [*ASSETS, *OF_NO_HUB]
    names = [_of_generation(name, generation) for name in names]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"unknown asset {name!r}{hint}; choose from {', '.join(known)}")
    if revision is not None and (len(names) != 1 or names[0] not in ASSETS):
        raise ValueError(
            f"--revision {revision} belongs to one repository: name exactly one asset of a hub, "
            f"got {' '.join(names) or 'none'}"
        )
    names = names or list(DEFAULT_ASSETS[generation or 2])
    chosen = [x for name in names for x in (*(ASSETS[name].needs if name in ASSETS else ()), name)]
    return list(dict.fromkeys(chosen))


def make_plan(
    names: list[str],
    *,
    hub: str,
    revision: str | None,
    root: Path,
    save_dir: Path | None = None,
) -> list[Item]:
    """Ask the hub for the files of these assets and compare them with the local ones.

    Args:
        revision: replaces the last asset's pinned one; pinned checksums then do not apply.
        root: the repository, or a folder of the same layout.
        save_dir: takes the place of its `out`.
    Raises:
        FileNotFoundError, ConnectionError: from the hub.
        ValueError: the hub lacks a file, or declares another checksum than the pinned one.
    """
    plan = []
    for name in names:
        asset, source = ASSETS[name], getattr(ASSETS[name], hub)
        if revision is not None and name == names[-1]:
            source = Source(source.repo, revision)
        listing = list_files(hub, source.repo, kind=asset.kind, revision=source.revision)
        if not COMMIT.fullmatch(source.revision):
            now = f", now {listing.commit}" if listing.commit else ""
            print(f"note: {source.repo} is taken at {source.revision}{now}; no commit is pinned")
        for wanted in asset.files:
            if wanted.endswith("?") and wanted[:-1] not in listing.files:
                continue
            remote = _find(wanted.removesuffix("?"), listing.files, source=source)
            path = _local_folder(asset, root=root, save_dir=save_dir) / remote.name
            origin = {
                "hub": hub,
                "repository": source.repo,
                "file": remote.name,
                "revision": listing.commit or source.revision,
            }
            plan.append(Item(name, remote, path, _state(remote, path), origin))
    return plan


def _state(remote: RemoteFile, path: Path) -> str:
    if not path.is_file():
        return "fetch"
    return "there" if is_same(remote, path) else "differs"


def _local_folder(asset: Asset, *, root: Path, save_dir: Path | None) -> Path:
    first, *rest = Path(asset.folder).parts
    return save_dir.joinpath(*rest) if save_dir and first == "out" else root / asset.folder


def _find(wanted: str, files: dict[str, RemoteFile], *, source: Source) -> RemoteFile:
    """The first of the alternatives (a|b) in the repository, with its pinned checksum."""
    where = f"{source.repo} at {source.revision}"
    for name in wanted.split("|"):
        if name in files:
            remote, pinned = files[name], source.sha256.get(name)
            if pinned and remote.sha256 not in (None, pinned):
                raise ValueError(
                    f"{where}: {name} has sha256 {remote.sha256}, expected {pinned}: it was "
                    "replaced there; choose another --hub, or take it as it is by naming its "
                    f"asset with --revision {source.revision}"
                )
            return RemoteFile(
                remote.url, name, remote.size, pinned or remote.sha256, remote.git_sha1
            )
    raise ValueError(
        f"{where} has no {wanted.replace('|', ' or ')} (there: {', '.join(sorted(files)[:12])}); "
        "name another by --revision, or choose another --hub"
    )
