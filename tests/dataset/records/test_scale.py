"""If this fails, opening a data set takes longer the larger it is. Figures are printed for
BENCHMARKS.md: `pytest -s -m full tests/dataset/records/test_scale.py`.
"""

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support.layouts import every_layout
from support.tiny_parts import conversation

from dataset.records.index_file import index_places
from dataset.records.reader import open_records

pytestmark = pytest.mark.full
SIZES = {"few": 1_000, "many": 600_000}
NUM_READ = 3_000


def cpu_s() -> float:
    """Seconds of CPU of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def least_s(act, times=5, clock=time.perf_counter) -> float:
    """Seconds of the fastest of several times."""
    taken = []
    for _ in range(times):
        started_s = clock()
        act()
        taken.append(clock() - started_s)
    return min(taken)


def private_mib_of_reading(path: Path) -> float:
    """MiB that a forked process has for itself after it has read records in random order."""
    records = open_records(path, None)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        dice = random.Random(0)
        for _ in range(NUM_READ):
            records[dice.randrange(len(records))]
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        kib = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        os.write(writer, str(kib).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(reader, 100)) / 1024


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    line = json.dumps(conversation("What is this?", "A circle. " * 60))
    for name, size in SIZES.items():
        (folder / f"{name}.jsonl").write_text(f"{line}\n" * size)
    return folder


def test_opening_jsonl_does_not_grow_with_the_records(lines):
    many = lines / "many.jsonl"
    wc = ["wc", "-l", str(many)]
    wc_s = least_s(lambda: subprocess.run(wc, check=True, capture_output=True), clock=cpu_s)
    beside, _ = index_places(many)

    def anew():
        beside.unlink(missing_ok=True)
        open_records(many, None)

    without_s = least_s(anew, clock=cpu_s)
    opened = {n: least_s(lambda n=n: open_records(lines / f"{n}.jsonl", None), 20) for n in SIZES}
    print(f"\nCPU: wc -l {wc_s:.3f} s, without index {without_s:.3f} s; with it {opened} s")
    assert without_s < 3 * wc_s
    assert opened["many"] < opened["few"] + 0.005


def test_a_worker_has_little_memory_of_its_own(lines):
    own = {name: private_mib_of_reading(lines / f"{name}.jsonl") for name in SIZES}
    print(f"\nMiB of a forked reader's own: {own}")
    assert own["many"] < own["few"] + 50


def test_opening_parquet_does_not_grow_with_the_rows(tmp_path):
    turns = json.dumps(conversation("<image>\nWhat?", "A circle.")["conversations"])
    dice, opened = random.Random(0), {}
    for num_rows in (1_000, 300_000):
        path = tmp_path / f"{num_rows}.parquet"
        schema = pyarrow.schema(
            {"conversations": pyarrow.string(), "image_bytes": pyarrow.binary()}
        )
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for _ in range(0, num_rows, 1_000):
                blobs = [dice.randbytes(4096) for _ in range(1_000)]
                writer.write_table(pyarrow.table([[turns] * 1_000, blobs], schema=schema))
        opened[num_rows] = least_s(lambda p=path: open_records(p, None)[500], clock=cpu_s)
    print(f"\nCPU of opening, with the first record: {opened} s")
    assert opened[300_000] < opened[1_000] + 0.5


def test_pictures_a_second_of_each_layout(tmp_path):
    layouts = every_layout(tmp_path, num_records=600)
    for name, (data, images) in layouts.items():
        records = open_records(data, images)
        order = random.Random(0).choices(range(len(records)), k=NUM_READ)

        def read(records=records, order=order) -> int:
            pictures = [image for i in order for image in records[i].images]
            return sum(len(records.read_image(image)) for image in pictures)

        read_s = least_s(read, 3)
        num_images = sum(len(records[i].images) for i in order)
        print(f"\n{name}: {num_images / read_s:,.0f} images/s, {NUM_READ / read_s:,.0f} records/s")
