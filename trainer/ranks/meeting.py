"""Owns how ranks find one another: a place of their own in the launcher's store.

torchrun keeps one store over all its restarts of the ranks, so it still holds the addresses of
ranks that are dead. Who reads one of those connects to nobody, and waits until it times out.
"""

import json
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

CONNECT_TIMEOUT = timedelta(seconds=45)  # once all ranks are there
CONNECT_TRIES = 3
POLL_S = 0.05
CPP_TRACE = "Exception raised from"  # begins the part of an error that is for programmers
NOTHING = "null"  # JSON
if hasattr(dist, "set_timeout"):
    set_timeout = dist.set_timeout
else:  # PyTorch before 2.15 has no public way
    set_timeout = dist.distributed_c10d._set_pg_timeout


def join_process_group(
    backend: str, *, timeout: timedelta, device: torch.device | None = None
) -> None:
    """Connect with the other ranks that the launcher started.

    They may come late by `timeout`, but once all are there they connect soon or not at all; a try
    that fails ends for all of them, and the next starts afresh.

    Args:
        device: this process's GPU, which nccl then connects at once: here a failure is seen by
            all ranks and told in one line, in the first step it would be a traceback.
    Raises:
        ConnectionError: no try succeeded, or a rank never came.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    for _ in range(CONNECT_TRIES):
        place = meet(store, rank, world_size, timeout=timeout)
        error = None
        try:
            dist.init_process_group(
                backend,
                store=place,
                rank=rank,
                world_size=world_size,
                timeout=CONNECT_TIMEOUT,
                device_id=device,
            )
            dist.barrier()
        except RuntimeError as problem:  # DistError and its kind
            error = problem
        place.set(f"is connected {rank}", str(error is None))
        words = [place.get(f"is connected {other}") for other in range(world_size)]
        if all(word == b"True" for word in words):
            set_timeout(timeout)
            return
        if dist.is_initialized():
            dist.destroy_process_group()
    lines = str(error).partition(CPP_TRACE)[0].splitlines()
    why = "; ".join(filter(None, map(str.strip, lines)))
    raise ConnectionError(
        f"the {world_size} ranks met, but could not connect with one another: {why}; see that "
        "nothing between their machines blocks the ports, and name the network by "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )


def meet(store: dist.Store, rank: int, world_size: int, *, timeout: timedelta) -> dist.Store:
    """A part of the store that these processes share, and no earlier ones.

    Every rank writes a name that it just made up. Rank 0 makes up a place whenever one of the
    names changes; who finds its own name beside a place agrees to it, and rank 0 opens it once
    all have. What dead ranks left never agrees.

    Raises:
        ConnectionError: not all ranks came within `timeout`.
    """
    store = dist.PrefixStore("minimind/meeting", store)
    came, agreed = ([f"{what} {r}" for r in range(world_size)] for what in ("came", "agreed"))
    for key in (*came, *agreed, "place", "open"):
        store.compare_set(key, "", NOTHING)
    name = uuid.uuid4().hex
    store.set(came[rank], json.dumps(name))
    last_s, names, place = time.monotonic() + timeout.total_seconds(), None, None
    while time.monotonic() < last_s:
        if rank == 0:
            now = read(store, came)
            if now != names:
                names, place = now, uuid.uuid4().hex
                store.set("place", json.dumps([place, names]))
            if read(store, agreed) == [place] * world_size:
                store.set("open", json.dumps(place))
        (told, is_open) = read(store, ["place", "open"])
        if told is not None and told[1][rank] == name:
            store.set(agreed[rank], json.dumps(told[0]))
            if is_open == told[0]:
                return dist.PrefixStore(is_open, store)
        time.sleep(POLL_S)
    missing = [r for r, key in enumerate(read(store, came)) if key is None]
    raise ConnectionError(
        f"the {world_size} ranks did not all come within {timeout}"
        + (f": {', '.join(f'rank {r}' for r in missing)} never did" if missing else "")
    )


def read(store: dist.Store, keys: list[str]) -> list:
    return [json.loads(value) for value in store.multi_get(keys)]
