"""If this fails, records of shards on other machines are others than those of the files, come in
another order from time to time, fill the disk, or a fault of a server is no clear line.
"""

import gzip
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support.layouts import every_layout, read_lines
from support.scripts import ROOT
from support.shard_server import ShardServer

from dataset.records.address import Address, StreamOptions
from dataset.records.mixing import parse_sources
from dataset.records.reader import open_records
from dataset.records.streams import cache, remote, units
from dataset.records.streams import records as stream_records
from trainer.loop.stream_order import StreamBatches
from trainer.ranks.group import Ranks

NUM_RECORDS = 24


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    found = every_layout(folder, num_records=NUM_RECORDS)
    packed = folder / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(found["ms-swift"][0].read_bytes()))
    return found | {"gzip": (packed, found["ms-swift"][1])}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.01,) * 4)


def opened(url, folder, *, images=None, gb=1.0, window=2, seed=0):
    options = StreamOptions(seed, folder, gb, window)
    return open_records(Address(str(url)), images, stream=options)


def ids_of(records, epoch=0, start=0) -> list[int]:
    return np.concatenate([*records.ids(epoch, start), np.empty(0, np.int64)]).astype(int).tolist()


def contents(records, ids=None) -> list:
    numbers = range(len(records)) if ids is None else ids
    return [(r.messages, [records.read_image(i) for i in r.images])
            for r in map(records.__getitem__, numbers)]  # fmt: skip


@pytest.mark.parametrize("name", ["Parquet", "TRL", "tar", "JSON array", "ms-swift", "gzip"])
def test_records_are_those_of_the_file(name, layouts, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)  # TRL's file is of several units
    data, images = layouts[name]
    local = layouts["ms-swift"][0] if name == "gzip" else data
    records = opened(f"file://{data}", tmp_path, images=images)
    ids = ids_of(records)
    assert len(records) == len(ids) == NUM_RECORDS and records.is_counted
    assert contents(records, sorted(ids)) == contents(open_records(local, images))
    assert len(records.units_of(0)) == (3 if name == "TRL" else 1)
    again = pickle.loads(pickle.dumps(records))
    assert contents(again, ids[:3]) == contents(records, ids[:3])
    assert records.where(ids[0]).startswith(data.name)


def test_order_is_a_function_of_seed_and_epoch_and_starts_anywhere(layouts, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    url = f"file://{layouts['pattern'][0]}"
    records = opened(url, tmp_path / "a")
    epochs = [ids_of(records, epoch) for epoch in range(3)]
    assert all(len(set(epoch)) == NUM_RECORDS for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = opened(url, tmp_path / "b")  # nothing is known of the shards here
    for start in (0, 1, 9, NUM_RECORDS - 1):
        assert ids_of(other, 2, start) == epochs[2][start:]
    assert ids_of(opened(url, tmp_path / "a", seed=1)) != epochs[0]
    assert ids_of(opened(url, tmp_path / "a", window=1)) != epochs[0]
    assert other.fingerprint == records.fingerprint


@pytest.mark.parametrize("start", [0, 5])
def test_ranks_share_the_order_sample_by_sample(start, layouts, tmp_path):
    records = opened(f"file://{layouts['pattern'][0]}", tmp_path)
    whole = ids_of(records)[start:]
    for world_size, size in ((1, 4), (2, 2), (3, 5)):
        shares = [
            list(StreamBatches(records, epoch=0, start=start, batch_size=size,
                               ranks=Ranks(rank, world_size, None)))
            for rank in range(world_size)
        ]  # fmt: skip
        assert len({len(share) for share in shares}) == 1
        for number, batches in enumerate(zip(*shares, strict=True)):
            piece = whole[number * size * world_size :][: size * world_size]
            assert [piece[rank::world_size] for rank in range(world_size)] == list(batches)


def many_shards(layouts, folder, *, num_shards=12) -> str:
    """JSONL shards of 1 to 12 records, too many to be counted before the first step."""
    lines = layouts["ms-swift"][0].read_text().splitlines()
    folder.mkdir()
    for number in range(num_shards):
        (folder / f"s-{number:02}.jsonl").write_text("\n".join(lines[: number + 1]) + "\n")
    return f"file://{folder}/s-{{00..{num_shards - 1}}}.jsonl"


def test_shards_that_are_not_counted_repeat_nothing_before_all_were_taken(layouts, tmp_path):
    url = many_shards(layouts, tmp_path / "shards")
    images = layouts["ms-swift"][1]
    records = opened(url, tmp_path / "cache", images=images)
    assert not records.is_counted and "about" in records.summary
    num_records = sum(range(1, 13))
    assert len(records) != num_records and abs(len(records) - num_records) < 30
    num_known = len(list((tmp_path / "cache" / "facts").iterdir()))
    assert num_known == 1  # the first step does not wait for the others
    taken = [i for epoch in range(4) for i in ids_of(records, epoch)]
    assert len(taken) == 4 * len(records) > 2 * num_records
    for turn in range(2):
        assert len(set(taken[turn * num_records : (turn + 1) * num_records])) == num_records
    other = opened(url, tmp_path / "other", images=images)
    assert ids_of(other, 3, 7) == taken[3 * len(records) :][7:]


def test_of_very_many_shards_few_are_asked_about(server, layouts, tmp_path, monkeypatch):
    """And their sizes still say when one was changed, where it is among those compared."""
    needs_aiohttp()
    lines = layouts["ms-swift"][0].read_text().splitlines()
    num_shards, images = 200, layouts["ms-swift"][1]
    server.files = {f"s-{n:03}.jsonl": f"{lines[n % 24]}\n".encode() for n in range(num_shards)}
    url = f"{server.url}/s-{{000..{num_shards - 1}}}.jsonl"
    whole = opened(url, tmp_path / "cache", images=images)
    assert len({name for _, name, _ in server.requests}) == num_shards
    monkeypatch.setattr(remote, "MOST_ASKED", 100)
    server.requests.clear()
    records = opened(url, tmp_path / "cache", images=images)
    own = records.fingerprint
    asked = {name for _, name, _ in server.requests}
    assert len(asked) <= stream_records.COMPARED + 2 and {"s-000.jsonl", "s-199.jsonl"} <= asked
    assert "about" in records.summary and abs(len(records) - num_shards) < 40
    assert ids_of(records)[:50] == ids_of(whole)[:50]
    assert contents(records, ids_of(records)[:9]) == contents(whole, ids_of(whole)[:9])
    assert whole.fingerprint != own == records.former_fingerprint
    again = pickle.loads(pickle.dumps(opened(url, tmp_path / "other", images=images)))
    assert again.fingerprint == own and ids_of(again, 1, 30) == ids_of(records, 1, 30)
    server.files["s-199.jsonl"] += b"\n"
    assert opened(url, tmp_path / "cache", images=images).fingerprint != own


def test_cache_stays_within_its_bound(layouts, tmp_path):
    url = many_shards(layouts, tmp_path / "shards")
    folder, images = tmp_path / "cache", layouts["ms-swift"][1]
    records = opened(url, folder, images=images, window=1, gb=16000 / 2**30)
    before = contents(records, ids_of(records))
    kept = [path for path in folder.iterdir() if len(path.name) == 32]
    assert sum(map(cache.size_on_disk, kept)) <= 16000 and len(kept) < 12
    assert sorted(p.name for p in folder.iterdir() if p not in kept) == ["facts", "locks"]
    assert len(before) == len(records)
    wide = opened(url, folder, images=images, window=12, gb=16000 / 2**30)
    with pytest.raises(ValueError, match=r"3 windows of \d+ shards .* a smaller --stream_window"):
        ids_of(wide)


def test_what_a_killed_process_left_is_removed(layouts, tmp_path):
    url = f"file://{layouts['pattern'][0]}"
    code = (
        "import os, sys; from pathlib import Path; from dataset.records.streams.cache import *\n"
        "c = ShardCache(Path(sys.argv[1]), max_bytes=10**9)\n"
        "c.keep('ab' * 16, 'x', num_bytes=10**9, fetch=lambda p: (p.write_text('half'), "
        "os.kill(os.getpid(), 9)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9 and list(tmp_path.glob("part-*"))
    records = opened(url, tmp_path)
    assert contents(records, ids_of(records))
    assert not list(tmp_path.glob("part-*"))


def test_shard_is_fetched_once_however_many_want_it(tmp_path):
    store, calls = cache.ShardCache(tmp_path, max_bytes=10**6), []

    def fetch(path):
        calls.append(path)
        path.write_text("x")

    keep = {"num_bytes": 10, "fetch": fetch}
    threads = [
        threading.Thread(target=store.keep, args=("ab" * 16, "x"), kwargs=keep) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and store.find("ab" * 16, "x").read_text() == "x"


@pytest.fixture
def server(layouts):
    shards = sorted(layouts["shards"][0].rglob("*.parquet"))
    with ShardServer({f"s-{i}.parquet": path.read_bytes() for i, path in enumerate(shards)}) as s:
        yield s


def needs_aiohttp():
    pytest.importorskip("aiohttp", reason="aiohttp is not installed, by which http:// is read")


def test_http_faults_are_tried_again_and_told_in_one_line(server, layouts, tmp_path, capfd):
    needs_aiohttp()
    url = f"{server.url}/s-{{0..2}}.parquet"
    expected = contents(open_records(layouts["pattern"][0], None))
    for number, fault in enumerate(("cuts", "gone", "busy", "ranges")):
        faults = {"cuts": {"s-1.parquet": [10, 500]}, "gone": {"s-1.parquet": 2},
                  "busy": {"s-1.parquet": 2}}  # fmt: skip
        server.has_ranges = fault != "ranges"
        setattr(server, "has_ranges" if fault == "ranges" else fault, faults.get(fault, False))
        records = opened(url, tmp_path / str(number))
        assert contents(records, sorted(ids_of(records))) == expected
        told = capfd.readouterr().err.splitlines()
        assert len(told) in ((0,) if fault == "ranges" else (1, 2))  # fsspec asks twice itself
        assert all(f"warning: {server.url}/s-1.parquet: " in line for line in told)
    server.has_ranges, records = True, opened(url, tmp_path / "gone")
    server.gone["s-1.parquet"] = 10**6
    with pytest.raises(ValueError, match=f"^{server.url}/s-1.parquet: it is not there .404., in"):
        ids_of(records)
    server.gone.clear()
    assert contents(records, sorted(ids_of(records))) == expected
    records = opened(url, tmp_path / "changed")
    server.files["s-1.parquet"] = server.files["s-1.parquet"][:-1] + b"?"
    with pytest.raises(ValueError, match="s-1.parquet was changed while it is in use"):
        ids_of(records)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nothing://host/x.parquet", "nothing:// is not read; hf://, http://, https://, s3://"),
        ("ftp://127.0.0.1:9/x.parquet", "ftp:// is not read; hf://"),
        ("file:///nowhere/x.parquet", "it is not there"),
        ("file:///nowhere/*.parquet", "nothing there matches it"),
        ("file://{folder}", "is a folder; name its shards by a pattern"),
        ("file://{folder}/x.csv", "no shard that can be read; they end in .parquet"),
        ("file://{folder}/x.parquet", "not a readable Parquet file"),
        ("file://{folder}/x.jsonl.gz", "not a readable gzip file"),
        ("file://{folder}/x.tar", "not a readable tar file"),
        ("file://{folder}/x-{9..1}.tar", "is neither {000..010} with a rising number nor {a,b}"),
    ],
)
def test_fault_of_an_address_is_one_line(url, says, tmp_path):
    for name in ("x.csv", "x.parquet", "x.jsonl.gz", "x.tar"):
        (tmp_path / name).write_bytes(b"no shard at all" * 50)
    with pytest.raises(ValueError) as caught:
        ids_of(opened(url.replace("{folder}", str(tmp_path)), tmp_path / "cache"))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ValueError, match="reading https:// needs `pip install aiohttp`"):
        opened("https://127.0.0.1/x.tar", tmp_path)


def test_addresses_are_read_from_the_flag():
    address = parse_sources(["https://host:80/a-{08..11}.tar?key=1"])
    assert isinstance(address, Address) and address.name == "a-{08..11}.tar"
    assert [url[-12:] for url in address.urls()] == [f"-{n}.tar?key=1"[-12:] for n in
                                                     ("08", "09", "10", "11")]  # fmt: skip
    assert Address("s3://b/{x,y}/{1..2}.tar").urls() == [
        f"s3://b/{folder}/{n}.tar" for folder in "xy" for n in (1, 2)
    ]
    with pytest.raises(ValueError, match=r"^hf://u/n/x\.parquet: only --data_path"):
        open_records(Path("hf://u/n/x.parquet"), None)


def test_lines_are_where_they_were(layouts, tmp_path):
    """A record's own place is that in its shard."""
    data, images = layouts["gzip"]
    records = opened(f"file://{data}", tmp_path, images=images)
    assert len(read_lines(layouts["ms-swift"][0])) == NUM_RECORDS
    assert records[3].where == "packed.jsonl:4" and os.listdir(tmp_path)


def test_packed_local_file_is_refused_with_the_address_that_is_read(layouts, tmp_path):
    data, images = layouts["gzip"]
    with pytest.raises(ValueError, match="is compressed; unpack it by `gunzip -k`, or") as caught:
        open_records(data, images)
    url = str(caught.value).rpartition(" ")[2]
    assert len(contents(opened(url, tmp_path, images=images), [0, 1])) == 2


def test_mixture_takes_each_source_by_its_weight_and_starts_anywhere(
    layouts, tmp_path, monkeypatch
):
    from dataset.records.streams import mixed

    monkeypatch.setattr(mixed, "BLOCK", 7)
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    local, images = layouts["ms-swift"]
    sources = [f"file://{layouts['pattern'][0]}:0.5", f"{local}", f"file://{layouts['tar'][0]}"]

    def mixture(folder):
        return open_records(parse_sources(sources), images, stream=StreamOptions(3, folder, 1, 2))

    records = mixture(tmp_path / "a")
    assert [part.num_taken for part in records.parts] == [12, 24, 24] and len(records) == 60
    epochs = [ids_of(records, epoch) for epoch in range(2)]
    for epoch in epochs:
        found = np.bincount([records.source_of(number) for number in epoch])
        assert found.tolist() == [12, 24, 24]
        assert all(records[number].messages for number in epoch)
    halves = [{i for i in epoch if not records.source_of(i)} for epoch in epochs]
    assert len(halves[0] | halves[1]) == NUM_RECORDS  # each once before any is taken again
    other = mixture(tmp_path / "b")
    for start in (0, 6, 7, 30, 59):
        assert ids_of(other, 1, start) == epochs[1][start:]
    assert other.fingerprint == records.fingerprint
    assert {other.source_of(number) for number in other.first_ids(9)} == {0, 1, 2}
    assert other.summary.count("shard(s)") == 2


def test_server_that_does_not_answer_is_not_called_a_lost_file(monkeypatch, capsys):
    monkeypatch.setattr(remote, "PAUSES_S", (0, 0))

    def ask():
        try:
            raise ConnectionRefusedError(111, "Connect call failed")
        except OSError as error:
            raise FileNotFoundError("https://host/a.parquet") from error  # as fsspec does

    with pytest.raises(
        remote.StreamError, match=r"https://host/a.parquet: .*Connect call failed, in each"
    ):
        remote.patiently(ask, url="https://host/a.parquet")
    assert "404" not in capsys.readouterr().err


def test_what_cannot_be_asked_for_is_not_tried_again(monkeypatch, capsys):
    calls = []

    def ask():
        calls.append(1)
        raise TypeError("__init__() missing 1 required argument: 'host'\nand more")

    with pytest.raises(remote.StreamError, match=r"^s3://b/a: it cannot be asked for .*'host'.$"):
        remote.patiently(ask, url="s3://b/a")
    assert len(calls) == 1 and not capsys.readouterr().err
