"""If this fails, a rank that works is counted as lost, or one that is lost is not noticed or not
named.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from support.rank_group import run_ranks
from support.scripts import train_flags
from support.tiny_parts import make_records
from torch import distributed as dist

from trainer.ranks import meeting as rank_meeting
from trainer.ranks.group import resolve_compute
from trainer.ranks.meeting import meet
from trainer.ranks.watch import Beats


def beat(count: int, **fields) -> bytes:
    return json.dumps({"beat": count, "who": "host, process 7"} | fields).encode()


@pytest.fixture
def beats():
    heard = Beats(0, 3, interval_s=1.0)
    for second in range(3):
        heard.hear([beat(second)] * 3, float(second))
    return heard


def test_silent_rank_is_named_after_the_limit_only(beats):
    for second in range(3, 8):
        beats.hear([beat(second), beat(second), beat(2)], float(second))
    assert beats.silent(5.5, 7.0) is None
    assert beats.silent(4.5, 7.0).startswith("rank 2 (host, process 7) has been silent for 5 s")


def test_rank_that_ends_well_is_not_missed(beats):
    for second in range(3, 9):
        beats.hear([beat(second), beat(second), beat(3, is_done=True, left=None)], float(second))
    assert beats.silent(2.0, 9.0) is None and beats.left() is None


def test_error_of_a_rank_is_told_with_its_words(beats):
    beats.hear([beat(3), beat(3), beat(3, left="ValueError: no such file", is_done=True)], 3.0)
    assert beats.left() == "rank 2 (host, process 7) left: ValueError: no such file"


def test_what_an_earlier_launch_left_in_the_store_does_not_count():
    beats = Beats(0, 2, interval_s=1.0)
    for second in range(30):  # rank 1 is slow to start; the store holds its former self's words
        beats.hear([beat(second), beat(9, left="killed", is_done=True)], float(second))
    assert beats.left() is None and beats.silent(5.0, 30.0) is None


def test_rank_that_was_never_heard_counts_once_a_collective_failed():
    beats = Beats(0, 2, interval_s=1.0)
    beats.hear([beat(1), beat(1)], 1.0)
    assert beats.silent(3.0, 9.0) is None
    beats.expect_all(9.0)
    for second in range(10, 15):
        beats.hear([beat(second), beat(1)], float(second))
    assert beats.silent(3.0, 14.0).startswith("rank 1 (host, process 7)")


def test_process_that_was_stopped_itself_blames_nobody(beats):
    beats.hear([beat(3), beat(2), beat(2)], 500.0)
    assert beats.silent(20.0, 501.0) is None
    beats.hear([beat(4), beat(2), beat(2)], 501.0)
    for second in range(502, 530):
        beats.hear([beat(second), beat(2), beat(2)], float(second))
    assert beats.silent(20.0, 529.0).startswith("rank ")


def test_device_and_backend_are_resolved_in_one_place(monkeypatch):
    assert resolve_compute("cpu", "bfloat16", local_rank=3, is_shared=True)[1] == "gloo"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_compute("mps", "float32")[0].type == "mps"
    with pytest.raises(ValueError, match="several ranks cannot share MPS"):
        resolve_compute("mps", "float32", local_rank=0, is_shared=True)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    device, backend = resolve_compute("cuda", "float16", local_rank=1, is_shared=True)
    assert (str(device), backend) == ("cuda:1", "cpu:gloo,cuda:nccl")
    with pytest.raises(ValueError, match="process 3 of this machine has no GPU of its own"):
        resolve_compute("cuda", "float16", local_rank=2, is_shared=True)
    with pytest.raises(ValueError, match="no bfloat16"):
        resolve_compute("cuda", "bfloat16", local_rank=1, is_shared=True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)  # Windows
    assert resolve_compute("cuda", "float16", local_rank=1, is_shared=True)[1] == "gloo"


def test_ranks_meet_where_no_earlier_ones_did():
    """The store of a launcher outlives its ranks: what they left must mislead nobody."""
    store = dist.HashStore()
    for late in (0, 1, 2):  # three starts, each with another rank that comes late
        with ThreadPoolExecutor(3) as pool:

            def enter(rank, late=late):
                time.sleep(0.3 if rank == late else 0)
                place = meet(store, rank, 3, timeout=timedelta(seconds=60))
                place.set(f"here {rank}", "x")
                return place

            found = list(pool.map(enter, range(3)))
        for place in found:
            assert place.check([f"here {rank}" for rank in range(3)])  # one and the same place
            assert not place.check(["mark"])  # and a new one
        found[0].set("mark", "")


def test_rank_that_never_comes_is_named():
    with pytest.raises(ConnectionError, match="rank 1 never did"):
        meet(dist.HashStore(), 0, 2, timeout=timedelta(seconds=1))


def lose_first_connections(rank: int, count: int) -> None:
    """This rank's first tries to connect come to nothing, which the others wait for in vain."""
    rank_meeting.CONNECT_TIMEOUT = timedelta(seconds=2)
    connect, tries = dist.init_process_group, iter(range(count))

    def unlucky(*args, store, **kwargs):
        if os.environ["RANK"] == str(rank) and next(tries, None) is not None:
            store = dist.PrefixStore("nobody", store)
        return connect(*args, store=store, **kwargs)

    dist.init_process_group = unlucky


@pytest.mark.slow
@pytest.mark.parametrize("count, status", [(2, 0), (3, 1)])
def test_ranks_that_lose_their_connections_try_again_together(assets, tmp_path, count, status):
    data = make_records(tmp_path / "data", num_records=8)
    argv = train_flags(assets, tmp_path, *data)
    hook = (lose_first_connections, 1, count)
    said = run_ranks(argv, tmp_path, world_size=3, hook=hook, status=status)
    assert ("could not connect with one another" in said) == bool(status)
