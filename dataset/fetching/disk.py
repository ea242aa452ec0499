"""Owns sizes in words, and whether the disk has room for what is to be fetched."""

import shutil
from pathlib import Path

DISK_MARGIN_BYTES = 64 << 20  # left free for the system and other programs


def readable(num_bytes: int | None) -> str:
    """A size in decimal units, as hubs show it."""
    if num_bytes is None:
        return "size ?"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"


def check_disk(needed: list[tuple[Path, int]]) -> None:
    """Raise OSError unless each disk has room for what will be written to it.

    Args:
        needed: folders, which need not exist yet, and the bytes to write into each.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, num_bytes in needed:
        folder = folder.resolve()
        while not folder.exists():
            folder = folder.parent
        disk = folder.stat().st_dev
        first, before = disks.get(disk, (folder, 0))
        disks[disk] = (first, before + num_bytes)
    for folder, num_bytes in disks.values():
        free = shutil.disk_usage(folder).free
        if free < num_bytes + DISK_MARGIN_BYTES:
            raise OSError(
                f"not enough space on the disk of {folder}: {readable(num_bytes)} to come, "
                f"{readable(free)} free; free some, choose fewer assets, or another --to"
            )
