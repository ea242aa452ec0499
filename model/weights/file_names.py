"""Owns how weight files are named and which one is read.

A weight is `NAME_{hidden}{_moe}.pth`, with `NAME_{hidden}{_moe}.json` beside it that describes it.
"""

import os
import re
from pathlib import Path

from model.generations import DEFAULT_GENERATION, GENERATIONS
from model.machine.paths import OUT_DIR


def weight_stem(name: str, *, hidden_size: int, use_moe: bool) -> str:
    """`NAME_{hidden}{_moe}`, the stem that weight, metadata, state and metrics share."""
    return f"{name}_{hidden_size}{'_moe' if use_moe else ''}"


def name_without_size(stem: str) -> str:
    """NAME of `NAME_{hidden}{_moe}`; another stem stays as it is."""
    return re.sub(r"_\d+(_moe)?$", "", stem)


def find_weight(
    name: str,
    *,
    save_dir: Path,
    hidden_size: int | None,
    use_moe: bool | None,
    generation: int | None = None,
) -> Path:
    """The file of a weight's name, in `save_dir` or else in `out/`; a path is taken as it is.

    Without a hidden size, the generation's is preferred (512 in generation 2, which is taken where
    none is named); of other sizes there must be only one.

    Raises:
        FileNotFoundError: nothing fits; lists what is there.
        ValueError: several sizes fit.
    """
    if name.endswith(".pth") or os.sep in name:
        path = Path(name).expanduser()
        if not path.is_file():
            there = _names_of([path.parent if path.parent.is_dir() else save_dir])
            raise FileNotFoundError(f"no weight file {name} (there: {there})")
        return path
    usual_size = GENERATIONS[generation or DEFAULT_GENERATION].config["hidden_size"]
    folders = list(dict.fromkeys([save_dir.resolve(), OUT_DIR]))
    size = r"\d+" if hidden_size is None else str(hidden_size)
    moe = "(_moe)?" if use_moe is None else "_moe" if use_moe else ""
    for alias in (name, "lm") if name == "llm" else (name,):
        pattern = re.compile(rf"{re.escape(alias)}_{size}{moe}\.pth")
        for folder in folders:
            found = sorted(p for p in folder.glob("*.pth") if pattern.fullmatch(p.name))
            default = weight_stem(alias, hidden_size=usual_size, use_moe=bool(use_moe))
            usual = [p for p in found if p.stem == default]
            if len(found) == 1 or usual:
                return (usual or found)[0]
            if found:
                raise ValueError(
                    f"several weights fit {name!r} in {folder}: "
                    f"{', '.join(p.name for p in found)}; choose one by --hidden_size and --use_moe"
                )
    wanted = weight_stem(name, hidden_size=hidden_size or usual_size, use_moe=bool(use_moe))
    raise _not_found(name, wanted, folders, published="llm3" if generation == 3 else "llm_512")


def weight_at_hand(name: str, *, save_dir: Path) -> Path | None:
    """What to take where there is no weight of this name: the newest whose name begins with it, in
    `save_dir` or else in `out/`. None where the weight is there, or nothing like it.
    """
    for folder in dict.fromkeys([save_dir.resolve(), OUT_DIR]):
        found = sorted(folder.glob(f"{name}_*.pth"), key=lambda p: (p.stat().st_mtime, p.name))
        if any(name_without_size(path.stem) == name for path in found):
            return None
        if found:
            return found[-1]
    return None


def _not_found(name: str, wanted: str, folders: list[Path], *, published: str) -> FileNotFoundError:
    """The error for a weight that is in none of the folders; it lists what is there."""
    ways_out = {
        "llm": f"fetch it by `python dataset/download.py {published}`, make it by "
        "trainer/train_llm.py",
        "pretrain_vlm": "make it by trainer/train_pretrain_vlm.py",
        "sft_vlm": "make it by trainer/train_sft_vlm.py",
    }
    way_out = ways_out.get(name, "make it first")
    return FileNotFoundError(
        f"no weight {wanted}.pth in {' or '.join(str(f) for f in folders)} (there: "
        f"{_names_of(folders)}); {way_out}, or name another: its path, or its name without the size"
    )


def _names_of(folders: list[Path]) -> str:
    present = sorted({p.name for folder in folders for p in folder.glob("*.pth")})
    return ", ".join(present) or "no weights"
