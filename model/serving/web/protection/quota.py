"""Owns the upload quota, and which files are whose.

Three limits: for one visitor; for all visitors at one address, since a browser can become a new
visitor by deleting its cookie; and for all together, which the disk must have free.
"""

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

MB = 2**20
VISITOR_BYTES = 200 * MB  # ten pictures of the largest size, or a hundred photos from a telephone
ADDRESS_BYTES = 1000 * MB  # a class behind one router
ALL_BYTES = 2000 * MB  # fits on a small machine's disk
LEAST_BYTES = 4096  # a file takes a block of the disk, however small it is


class OverQuota(ValueError):
    """There is no room for what a visitor uploads."""


@dataclass
class _Owner:
    folder: Path
    address: str
    num_bytes: int = 0


class Quota:
    """Bytes and folders of visitors. For one thread: the server's event loop.

    Args:
        folder: in which each visitor who uploads gets a folder with a name nobody can guess.
    """

    def __init__(
        self,
        folder: Path,
        *,
        visitor_bytes: int = VISITOR_BYTES,
        address_bytes: int = ADDRESS_BYTES,
        all_bytes: int = ALL_BYTES,
    ):
        self._folder = folder
        self._limits = (visitor_bytes, address_bytes, all_bytes)
        self._owners: dict[str, _Owner] = {}

    def __contains__(self, visitor: str) -> bool:
        return visitor in self._owners

    def charge(self, visitor: str, address: str, num_bytes: int) -> None:
        """Count bytes before they are accepted; a negative number gives them back.

        Raises:
            OverQuota: a limit would be exceeded; nothing is counted.
        """
        mine, here, everyone = self._limits
        owner = self._owners.get(visitor)
        at_address = [o.num_bytes for o in self._owners.values() if o.address == address]
        total = sum(o.num_bytes for o in self._owners.values())
        if num_bytes > 0:
            if (owner.num_bytes if owner else 0) + num_bytes > mine:
                raise OverQuota(f"your pictures are more than {mine / MB:.0f} MB together")
            if sum(at_address) + num_bytes > here or total + num_bytes > everyone:
                raise OverQuota("there is no room for more pictures now; try again in an hour")
        if owner is None:
            owner = _Owner(self._folder / secrets.token_urlsafe(9), address)
            self._owners[visitor] = owner
        owner.num_bytes += num_bytes

    def new_folder(self, visitor: str) -> Path:
        """A new folder for one file of a visitor who has been charged."""
        folder = self._owners[visitor].folder / secrets.token_urlsafe(9)
        folder.mkdir(parents=True)
        return folder

    def forget(self, visitor: str) -> None:
        """Delete all files of a visitor, and count them no longer."""
        owner = self._owners.pop(visitor, None)
        if owner is not None:
            shutil.rmtree(owner.folder, ignore_errors=True)
