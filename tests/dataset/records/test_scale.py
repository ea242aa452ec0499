"""If this fails, opening a data set takes longer the larger it is. Figures are printed for
BENCHMARKS.md: `pytest -s -m full tests/dataset/records/test_scale.py`.
"""

import json
import os
import random
import resource
import subprocess
import time
import zipfile
from pathlib import Path
from statistics import median

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
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


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
    beside, _ = index_places(many)
    taken = []

    def anew():
        beside.unlink(missing_ok=True)
        open_records(many, None)

    for _ in range(12):  # in turn: other work on the machine slows both
        counted = least_s(lambda: subprocess.run(wc, check=True, capture_output=True), 1, cpu_s)
        taken.append((counted, least_s(anew, 1, cpu_s)))
    wc_s, without_s = map(median, zip(*taken, strict=True))
    opened = {n: least_s(lambda n=n: open_records(lines / f"{n}.jsonl", None), 20) for n in SIZES}
    print(f"\nCPU: wc -l {wc_s:.3f} s, without index {without_s:.3f} s; with it {opened} s")
    assert without_s < 3 * wc_s
    assert opened["many"] < opened["few"] + 0.005


def test_a_worker_has_little_memory_of_its_own(lines):
    own = {name: private_mib_of_reading(lines / f"{name}.jsonl") for name in SIZES}
    print(f"\nMiB of a forked reader's own: {own}")
    assert own["many"] < own["few"] + 50


def test_sampling_is_as_fast_as_from_few_records(lines, tmp_path):
    """Records of a large file and of a small one, in turn, 1,000 of either at a time."""
    size = 200_000
    for name, num in (("few", NUM_READ), ("many", size)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for n in range(num):
                archive.writestr(zipfile.ZipInfo(f"images/{n:06d}.jpg"), b"x" * 4096)
        turns = [conversation("<image>", "A circle.", image=f"{n:06d}.jpg") for n in range(num)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(t) + "\n" for t in turns))
    places = {"text": {n: (lines / f"{n}.jsonl", None) for n in SIZES}}
    places["zip"] = {n: (tmp_path / f"{n}.jsonl", tmp_path / f"{n}.zip") for n in SIZES}
    for kind, named in places.items():
        check_sampling(kind, {name: open_records(*place) for name, place in named.items()})


def check_sampling(kind: str, opened: dict) -> None:
    taken = {name: [] for name in opened}
    for turn in range(15):
        for name, records in opened.items():
            order = random.Random(turn).choices(range(len(records)), k=1_000)

            def read(records=records, order=order):
                for i in order:
                    for image in records[i].images:
                        records.read_image(image)

            taken[name].append(least_s(read, 1, cpu_s))
    few_s, many_s = (median(taken[name]) for name in SIZES)
    print(f"\n{kind}: 1,000 records of few {few_s:.4f} s, of many {many_s:.4f} s of CPU")
    assert many_s < 1.1 * few_s


@pytest.mark.parametrize("codec", ["snappy", "none"])
def test_parquet_as_its_writer_writes_it_by_default(codec, tmp_path):
    """Pages of 1,024 pictures, all of which were unpacked for each that was asked for."""
    turns = json.dumps(conversation("<image>\nWhat?", "A circle.")["conversations"])
    dice, own, opened = random.Random(0), {}, {}
    for name, num_rows in (("few", 1_000), ("many", 100_000)):
        images = [dice.randbytes(4_096) for _ in range(num_rows)]
        table = pyarrow.table({"conversations": [turns] * num_rows, "image_bytes": images})
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(table, path, compression=codec)
        own[name] = private_mib_of_reading(path)
        opened[name] = open_records(path, None)
        started_s = cpu_s()
        for row in range(0, num_rows, 500):
            opened[name][row]
        print(f"\n{name}, {codec}: {cpu_s() - started_s:.2f} s of CPU to find all values once")
    print(f"MiB of a forked reader's own: {own}")
    assert own["many"] < own["few"] + 50
    check_sampling(codec, opened)


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
