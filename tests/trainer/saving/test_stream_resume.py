"""If this fails, a run from shards on another machine takes other samples once it was killed, or
with another number of ranks or workers."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from huggingface_hub import constants
from support.layouts import every_layout
from support.rank_group import RankGroup, record_steps, recorded_steps, run_ranks
from support.scripts import train_flags
from support.shard_server import REPO, ShardServer

from dataset.records.address import Address, StreamOptions
from dataset.records.reader import open_records
from dataset.records.streams import remote, units

NUM_RECORDS = 60
HUB = f"hf://{REPO}/*.parquet"


def use_hub(url: str) -> None:
    """Ask this server in place of Hugging Face's, without long pauses, for small units."""
    constants.ENDPOINT = url
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = template
    remote.PAUSES_S = (0.05,) * 4
    units.UNIT_BYTES = 1000


def on_hub(url: str, folder, name: str) -> None:
    """A hook: ask this server, and write down what each step takes."""
    use_hub(url)
    record_steps(folder, name)


@pytest.fixture
def server(tmp_path):
    layouts = every_layout(tmp_path / "data", num_records=NUM_RECORDS)
    with ShardServer(
        {p.name: p.read_bytes() for p in layouts["shards"][0].rglob("*.parquet")}
    ) as s:
        yield s


@pytest.fixture(autouse=True)
def settings_of_this_process():
    """Tests change what is asked; put it back."""
    before = (
        constants.ENDPOINT,
        constants.HUGGINGFACE_CO_URL_TEMPLATE,
        remote.PAUSES_S,
        units.UNIT_BYTES,
    )
    yield
    constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE = before[:2]
    remote.PAUSES_S, units.UNIT_BYTES = before[2:]


def flags_of(assets, out, **more):
    options = {"stream_cache_dir": out / "cache", "stream_window": 2, "epochs": 2}
    return train_flags(assets, out, HUB, None, **options | more)


def names_in_order(server, tmp_path, *, window: int = 2) -> list[list[str]]:
    """What two epochs take, read here."""
    use_hub(server.url)
    options = StreamOptions(42, tmp_path / "here", 1, window)
    records = open_records(Address(HUB), None, stream=options)
    epochs = [np.concatenate(list(records.ids(epoch, 0))) for epoch in range(2)]
    return [[records[int(index)].where for index in epoch] for epoch in epochs]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_stream_goes_on_at_the_next_sample_with_other_ranks_and_workers(
    num_workers, server, assets, tmp_path
):
    """Killed on one rank, continued on two without; a shard is cut and gone for a
    while."""
    expected = names_in_order(server, tmp_path)
    out = tmp_path / "out"
    name = "train-00001-of-00003.parquet"
    server.cuts[name], server.gone[name] = [50], 1
    common = {"save_interval": 2, "log_interval": 1}
    argv = flags_of(assets, out, **common, num_workers=num_workers, batch_size=4)
    hook = (on_hub, server.url, tmp_path, "first")
    at_step = random.SystemRandom().randrange(3, 20)
    with RankGroup(argv, tmp_path, world_size=1, hook=hook, name="first") as group:
        metrics = out / "out" / "pretrain_vlm_32_metrics.jsonl"
        group.wait_for(lambda: len(recorded_steps(tmp_path, "first")) > at_step, "a step")
        group.kill()
    assert metrics.exists()
    argv = flags_of(
        assets, out, **common, from_resume=1, batch_size=2, num_workers=num_workers // 2
    )
    hook = (on_hub, server.url, tmp_path, "second")
    output = run_ranks(argv, tmp_path, world_size=2, hook=hook, name="second")
    second = recorded_steps(tmp_path, "second")
    start = min(samples for samples, _ in second)
    assert 0 < start <= 4 * at_step + 4 and f"at step {start // 4}," in output
    first = [step for step in recorded_steps(tmp_path, "first") if step[0] < start]
    taken = sorted([*first, *second])
    flat = [name for epoch in expected for name in epoch]
    for samples in range(0, 2 * NUM_RECORDS, 4):
        names = sum((step for place, step in taken if place == samples), [])
        assert Counter(names) == Counter(flat[samples : samples + 4]), samples
    for epoch in expected:
        assert len(set(epoch)) == NUM_RECORDS
    assert expected[0] != expected[1]
    assert json.loads(metrics.read_text().splitlines()[-1])["samples"] == 2 * NUM_RECORDS


@pytest.mark.slow
@pytest.mark.full
def test_shard_that_is_gone_is_one_line_and_the_run_can_go_on(server, assets, tmp_path):
    flat = names_in_order(server, tmp_path, window=1)[0]
    late = flat[-1].partition(":")[0]
    out, hook = tmp_path / "out", (on_hub, server.url, tmp_path, "gone")
    more = {"epochs": 1, "num_workers": 1, "stream_window": 1}
    argv = flags_of(assets, out, **more)
    with RankGroup(argv, tmp_path, world_size=1, hook=hook, name="gone") as group:
        group.wait_for(lambda: len(recorded_steps(tmp_path, "gone")) > 0, "a step")
        server.gone[late] = 10**6
        status = group.wait()
        output = group.output()
    assert status == [1], output
    error = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and f"hf://{REPO}/{late}: it is not there (404)" in error[0], output
    assert "go on with --from_resume 1" in error[0] and "Traceback" not in output
    server.gone.clear()
    server.slow_s = 2.0  # longer than workers may be silent
    argv = flags_of(assets, out, **more, from_resume=1, rank_timeout=2)
    run_ranks(argv, tmp_path, world_size=1, hook=(on_hub, server.url, tmp_path, "again"))
    taken = [
        n for name in ("gone", "again") for _, step in recorded_steps(tmp_path, name) for n in step
    ]
    assert Counter(taken) == Counter(flat)
