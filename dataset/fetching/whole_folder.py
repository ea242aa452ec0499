"""Owns that a folder appears whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` where the block ends well.

    What stood there is replaced. The new one lies in `.NAME.part` beside it; what a killed run left
    of that is cleared.

    Raises:
        OSError: the disk is full. As after any other error, the former folder is as it was.
    """
    part = folder.parent.resolve() / f".{folder.name}.part"
    new = part / "new"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        if os.path.lexists(folder):
            folder.rename(part / "old")
        new.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"the disk of {folder.parent} is full, and nothing was left there: free some space "
            "and run the same command again, or name another folder by --to"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
