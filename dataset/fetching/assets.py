"""Owns the list of real assets, and the plan of a download: what is there, what is to be fetched.

A revision is a commit where one is pinned, else a branch; of a branch, the plan prints it and
records the commit that it points to now. Every file is checked against the size and checksum that
the hub declares, and against a pinned checksum where there is one.
"""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

from dataset.fetching.hub import RemoteFile, is_same, list_files, part_size

CORPUS = "corpus"  # the asset that comes from no hub: see corpus.py
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A repository on one hub; `sha256` maps a file to its pinned checksum at this revision."""

    repo: str
    revision: str
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asset:
    """Files that belong together and their folder; "a|b" is the first of them that exists."""

    about: str
    kind: str
    files: tuple[str, ...]
    folder: str
    huggingface: Source
    modelscope: Source
    needs: tuple[str, ...] = ()


# The vocabulary of the MiniMind2 weights. That of their successor has the same size but other ids:
# with it these weights would give noise and no error.
TOKENIZER_SHA256 = {
    "tokenizer.json": "d98595c6aef70d95f72748582fb9b4f53d76dd58c1ae1dd702ad7c84e1caf5e4"
}
TOKENIZER_DIR = "model/minimind_tokenizer"
WEIGHTS = (
    Source("jingyaogong/MiniMind2-V-PyTorch", "main"),
    Source("gongjy/MiniMind2-V-PyTorch", "master"),
)
DATA = (
    Source(
        "jingyaogong/minimind-v_dataset",
        "1e279a8b665cb10383451a6af6fd62b9f35bdd79",
        {
            "pretrain_i2t.parquet": "65761f37d1947d54a1d85457ff70938275e4ef58ba5cedcd02463a3a247c93fd",  # noqa: E501
            "sft_i2t.parquet": "712f4026cd0e21b369feddca7334b1e465cb8182b5f298006f3f4f877f926643",
        },
    ),
    Source("gongjy/minimind-v_dataset", "master"),
)
OLD_DATA = (Source(DATA[0].repo, "main"), DATA[1])
ASSETS = {
    "vision": Asset(
        "CLIP ViT-B/16 / CLIP 视觉塔", "model",
        ("config.json", "preprocessor_config.json", "model.safetensors|pytorch_model.bin"),
        "model/vision_model/clip-vit-base-patch16",
        Source("openai/clip-vit-base-patch16", "57c216476eefef5ab752ec549e440a49ae4ae5f3"),
        Source("openai-mirror/clip-vit-base-patch16", "master"),
    ),
    "tokenizer": Asset(
        "the tokenizer of the published weights / 官方分词器", "model",
        ("tokenizer.json", "tokenizer_config.json"), TOKENIZER_DIR,
        Source("jingyaogong/MiniMind2", "main", TOKENIZER_SHA256),
        Source("gongjy/MiniMind2", "master", TOKENIZER_SHA256),
    ),
    "llm_512": Asset(
        "base language model, 26M / 语言模型 26M", "model",
        ("llm_512.pth|lm_512.pth",), "out", *WEIGHTS, needs=("tokenizer",),
    ),
    "llm_768": Asset(
        "base language model, 104M / 语言模型 104M", "model",
        ("llm_768.pth|lm_768.pth",), "out", *WEIGHTS, needs=("tokenizer",),
    ),
    "pretrain": Asset(
        "pretraining data, Parquet / 预训练数据", "dataset",
        ("pretrain_i2t.parquet|pretrain_data.parquet",), "dataset", *DATA,
    ),
    "sft": Asset(
        "fine-tuning data, Parquet / 微调数据", "dataset",
        ("sft_i2t.parquet|sft_data.parquet",), "dataset", *DATA,
    ),
    "pretrain_jsonl": Asset(
        "the older form of pretrain / 旧版预训练数据", "dataset",
        ("pretrain_data.jsonl|pretrain_vlm_data.jsonl", "pretrain_images.zip"),
        "dataset", *OLD_DATA,
    ),
    "sft_jsonl": Asset(
        "the older form of sft / 旧版微调数据", "dataset",
        ("sft_data.jsonl|sft_vlm_data.jsonl", "sft_images.zip"), "dataset", *OLD_DATA,
    ),
    "multi_jsonl": Asset(
        "multi-image data / 多图数据", "dataset",
        ("sft_vlm_data_multi.jsonl", "sft_multi_images_trans_image.zip"), "dataset", *OLD_DATA,
    ),
}  # fmt: skip
DEFAULT_ASSETS = ("vision", "llm_512", "pretrain", "sft")


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


def chosen_assets(names: list[str], *, revision: str | None) -> list[str]:
    """Asset names in order, each after those it needs.

    Raises:
        ValueError: an unknown name, or a revision for anything but one asset of a hub.
    """
    known = [*ASSETS, CORPUS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"unknown asset {name!r}{hint}; choose from {', '.join(known)}")
    if revision is not None and (len(names) != 1 or names[0] == CORPUS):
        raise ValueError(
            f"--revision {revision} belongs to one repository: name exactly one asset of a hub, "
            f"got {' '.join(names) or 'none'}"
        )
    names = names or list(DEFAULT_ASSETS)
    chosen = [x for name in names for x in (*(ASSETS[name].needs if name in ASSETS else ()), name)]
    return list(dict.fromkeys(chosen))


def make_plan(names: list[str], *, hub: str, revision: str | None, root: Path) -> list[Item]:
    """Ask the hub for the files of these assets and compare them with the local ones.

    Args:
        revision: replaces the last asset's pinned one; pinned checksums then do not apply.
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
            remote = _find(wanted, listing.files, source=source)
            path = root / asset.folder / remote.name
            state = "fetch"
            if path.is_file():
                state = "there" if is_same(remote, path) else "differs"
            origin = {
                "hub": hub,
                "repository": source.repo,
                "file": remote.name,
                "revision": listing.commit or source.revision,
            }
            plan.append(Item(name, remote, path, state, origin))
    return plan


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
