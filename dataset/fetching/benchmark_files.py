"""Owns the published files of the benchmarks: where each lies, and how it is checked.

Source: the tables DATASET_URL and DATASET_MD5 of VLMEvalKit, in vlmeval/dataset/image_mcq.py and
image_yorn.py of ms-vlmeval 0.0.20. Each has terms of its own, which its authors publish.
"""

from dataclasses import dataclass
from pathlib import Path

from dataset.fetching.hub import RemoteFile, endpoint, fetch, is_same

FOLDER = "dataset/benchmarks"
ROOM_BYTES = 1 << 33  # the sizes are not published; the largest takes some gigabytes


@dataclass(frozen=True)
class BenchmarkFile:
    """A published file.

    title: of the benchmark. address: below the endpoint. md5: as VLMEvalKit checks it.
    """

    title: str
    address: str
    md5: str

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def remote(self) -> RemoteFile:
        way_out = f"put {self.name} into {FOLDER} by hand, or name it by --data_path"
        url = f"{endpoint('opencompass')}/{self.address}"
        return RemoteFile(url, self.name, md5=self.md5, way_out=way_out)

    def state(self, path: Path) -> str:
        """ "fetch", "there", or "differs": something else is there."""
        if not path.is_file():
            return "fetch"
        return "there" if is_same(self.remote, path) else "differs"

    def fetch(self, path: Path) -> None:
        """Receive the file and check it; raises as `hub.fetch`."""
        fetch(self.remote, path)


# By the names of `eval_vlm.py --benchmark`.
FILES = {
    "mmstar": BenchmarkFile("MMStar", "VLMEval/MMStar.tsv", "e1ecd2140806c1b1bbf54b43372efb9e"),
    "mmbench": BenchmarkFile(
        "MMBench, development set, English",
        "benchmarks/MMBench/MMBench_DEV_EN.tsv",
        "b6caf1133a01c6bb705cf753bb527ed8",
    ),
    "ccbench": BenchmarkFile("CCBench", "VLMEval/CCBench.tsv", "f5dde47f24dc5a6fb6e595b409b466ac"),
    "seedbench": BenchmarkFile(
        "SEED-Bench, images",
        "benchmarks/SEEDBench/SEEDBench_IMG.tsv",
        "68017231464752261a2526d6ca3a10c0",
    ),
    "ai2d": BenchmarkFile("AI2D", "VLMEval/AI2D_TEST.tsv", "0f593e0d1c7df9a3d69bf1f947e71975"),
    "scienceqa": BenchmarkFile(
        "ScienceQA",
        "benchmarks/ScienceQA/ScienceQA_TEST.tsv",
        "e42e9e00f9c59a80d8a5db35bc32b71f",
    ),
    "pope": BenchmarkFile("POPE", "VLMEval/POPE.tsv", "c12f5acb142f2ef1f85a26ba2fbe41d5"),
}


def how_to_use(path: Path, *, name: str) -> str:
    """The command that scores a model on a file."""
    return f"python eval_vlm.py --benchmark {name} --data_path {path}"
