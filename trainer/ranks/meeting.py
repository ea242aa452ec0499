"""Owns the rendezvous: how ranks find one another in the launcher's key-value store.

torchrun keeps one store over all its restarts of the ranks, so the store still holds the addresses
of ranks that are dead. A rank that reads such an address waits for nobody until it times out. So
the ranks that are alive first agree on a fresh key prefix (`meet`), and exchange addresses there.
"""

import json
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

CONNECT_TIMEOUT = timedelta(seconds=45)  # once all ranks have met
CONNECT_TRIES = 3
POLL_S = 0.05
CPP_TRACE = "Exception raised from"  # begins the C++ stack trace in an error's text
NOT_SET = "null"  # JSON
if hasattr(dist, "set_timeout"):
    set_timeout = dist.set_timeout
else:  # PyTorch before 2.15 has no public way
    set_timeout = dist.distributed_c10d._set_pg_timeout


def join_process_group(
    backend: str, *, timeout: timedelta, device: torch.device | None = None
) -> None:
    """`init_process_group` with the other ranks that the launcher started, tried a few times.

    Each try:
    1. `meet` waits up to `timeout` for all ranks and gives them a fresh key prefix.
    2. `init_process_group` and a barrier, with the short `CONNECT_TIMEOUT`: ranks that have met
       connect soon or not at all.
    3. Each rank writes whether it is connected and reads the others'. If all are, the timeout of
       later collectives becomes `timeout`; else every rank destroys its group and tries again.

    Args:
        device: this process's GPU. NCCL then connects here, where a failure is one line on every
            rank, and not in the first collective, where it would be a traceback.
    Raises:
        ConnectionError: no try succeeded, or a rank never came.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    for _ in range(CONNECT_TRIES):
        prefix = meet(store, rank, world_size, timeout=timeout)
        error = None
        try:
            dist.init_process_group(
                backend,
                store=prefix,
                rank=rank,
                world_size=world_size,
                timeout=CONNECT_TIMEOUT,
                device_id=device,
            )
            dist.barrier()
        except RuntimeError as problem:  # DistError and its subclasses
            error = problem
        prefix.set(f"is connected {rank}", str(error is None))
        answers = [prefix.get(f"is connected {other}") for other in range(world_size)]
        if all(answer == b"True" for answer in answers):
            set_timeout(timeout)
            return
        if dist.is_initialized():
            dist.destroy_process_group()
    raise _cannot_connect(world_size, error)


def _cannot_connect(world_size: int, error: Exception | None) -> ConnectionError:
    lines = str(error).partition(CPP_TRACE)[0].splitlines()
    why = "; ".join(filter(None, map(str.strip, lines)))
    return ConnectionError(
        f"the {world_size} ranks met, but could not connect with one another: {why}; see that "
        "nothing between their machines blocks the ports, and name the network by "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )


def meet(store: Store, rank: int, world_size: int, *, timeout: timedelta) -> Store:
    """A part of the store (a key prefix) that these processes share, and no earlier ones.

    1. Every rank draws a random id and writes it under `id <rank>`.
    2. Rank 0 reads all ids. Whenever one has changed (a rank came, perhaps in the place of a dead
       one), it draws a new random prefix and writes `proposal` = (prefix, ids).
    3. A rank that finds its own id in the proposal writes the prefix under `accepted <rank>`.
    4. Once all ranks have accepted the same prefix, rank 0 writes it under `opened`.
    5. A rank that has accepted the prefix which is opened returns it.

    A dead rank cannot accept a new prefix, so a proposal that still holds its id is never opened.

    Raises:
        ConnectionError: not all ranks came within `timeout`.
    """
    store = PrefixStore("minimind/meeting", store)
    id_keys = [f"id {r}" for r in range(world_size)]
    accepted_keys = [f"accepted {r}" for r in range(world_size)]
    for key in (*id_keys, *accepted_keys, "proposal", "opened"):
        store.compare_set(key, "", NOT_SET)
    own_id = uuid.uuid4().hex
    store.set(id_keys[rank], json.dumps(own_id))
    deadline_s = time.monotonic() + timeout.total_seconds()
    ids, prefix = None, None  # rank 0's last proposal
    while time.monotonic() < deadline_s:
        if rank == 0:
            now = read(store, id_keys)
            if now != ids:
                ids, prefix = now, uuid.uuid4().hex
                store.set("proposal", json.dumps([prefix, ids]))
            if read(store, accepted_keys) == [prefix] * world_size:
                store.set("opened", json.dumps(prefix))
        proposal, opened = read(store, ["proposal", "opened"])
        if proposal is not None and proposal[1][rank] == own_id:
            store.set(accepted_keys[rank], json.dumps(proposal[0]))
            if opened == proposal[0]:
                return PrefixStore(opened, store)
        time.sleep(POLL_S)
    raise _did_not_meet(read(store, id_keys), timeout)


def _did_not_meet(ids: list[Any], timeout: timedelta) -> ConnectionError:
    missing = [r for r, found in enumerate(ids) if found is None]
    return ConnectionError(
        f"the {len(ids)} ranks did not all come within {timeout}"
        + (f": {', '.join(f'rank {r}' for r in missing)} never did" if missing else "")
    )


def read(store: Store, keys: list[str]) -> list[Any]:
    """The JSON values under these keys."""
    return [json.loads(value) for value in store.multi_get(keys)]
