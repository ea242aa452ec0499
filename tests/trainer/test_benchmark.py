"""If this fails, `trainer/benchmark.py` measures something else than training, or miscounts it."""

import json

import pytest
import torch

from model.generations import GENERATIONS
from model.machine.device import training_dtype
from model.vision_tower import count_image_tokens, read_tower_shape
from trainer import benchmark
from trainer.measuring import phases
from trainer.measuring.materials import make_tower
from trainer.measuring.matrix_rate import matrix_rate

HIDDEN, LAYERS, VOCABULARY, LENGTH = 32, 1, 6400, 400


@pytest.fixture(scope="session")
def flags(assets):
    tiny = {
        "tokenizer_path": assets / "tokenizer",
        "vision_model_path": assets / "tower",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "batch_size": 2,
        "max_seq_len": LENGTH,
        "num_workers": 1,
        "device": "cpu",
        "rounds": 2,
        "steps": 2,
    }
    return [str(word) for name, value in tiny.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def report(flags, tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    assert benchmark.main(["--stage", "sft", "--baseline", "--json", str(path), *flags]) == 0
    return json.loads(path.read_text())


def test_both_ways_are_measured_in_turn(report, capfd):
    benchmark.print_measured(report)
    out = capfd.readouterr().out
    assert json.loads(out.splitlines()[-1]) == report
    ordinary, plain = report["ordinary"], report["plain"]
    for figures in (ordinary, plain):
        assert len(figures["step_s_rounds"]) == 2 and figures["step_s"] > 0
        assert figures["samples_per_s"] == pytest.approx(2 / figures["step_s"], rel=0.5)
        assert figures["flop_per_step"]["total"] > figures["flop_per_step"]["tower"] > 0
    assert plain["tokens_per_s"] == pytest.approx(LENGTH * plain["samples_per_s"])
    assert ordinary["tokens_per_s"] <= LENGTH * ordinary["samples_per_s"] * (1 + 1e-9)
    assert ordinary["tokens_per_s"] <= ordinary["padded_tokens_per_s"]
    assert ordinary["phases"].keys() == {
        "tower", "forward", "backward", "optimizer", "data wait", "other",
    }  # fmt: skip
    assert sum(ordinary["phases"].values()) == pytest.approx(1)
    assert all(share > -1e-6 for share in ordinary["phases"].values())
    assert report["speedup"] > 0 and "times as fast" in out
    assert set(report["matrix_gflops"]) == {"float32", training_dtype(torch.device("cpu"))}
    # Logits of every padded position, forward; the ordinary run has them where it is supervised.
    assert plain["flop_per_step"]["total"] > 2 * 2 * LENGTH * HIDDEN * VOCABULARY / 16
    assert plain["flop_per_step"]["total"] > ordinary["flop_per_step"]["total"]


def test_kept_features_leave_the_tower_out(flags, tmp_path):
    path = tmp_path / "report.json"
    argv = ["--cache_vision_features", str(tmp_path / "cache"), "--json", str(path), *flags]
    assert benchmark.main(argv) == 0
    figures = json.loads(path.read_text())["ordinary"]
    assert figures["flop_per_step"]["tower"] == 0 and figures["flop_per_step"]["total"] > 0
    assert "tower" not in figures["phase_shares"]


def test_operations_are_counted_as_products_of_matrices_have_them():
    left, weight = torch.ones(7, 11), torch.ones(11, 13, requires_grad=True)
    counted = phases.count_flop(lambda: (left @ weight).sum().backward())
    assert counted == {"total": 2 * (2 * 7 * 11 * 13), "tower": 0}  # forward, gradient of a weight
    query = torch.ones(2, 3, 16, 8)  # batch, heads, tokens, width
    counted = phases.count_flop(
        lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)
    )
    assert counted["total"] == 2 * (2 * 2 * 3 * 16 * 16 * 8)


def test_two_reports_are_compared(report, tmp_path, capfd):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(report))
    faster = report["ordinary"] | {"samples_per_s": 2 * report["ordinary"]["samples_per_s"]}
    setting = report["setting"] | {"batch_size": 4}
    second.write_text(json.dumps(report | {"ordinary": faster, "setting": setting}))
    assert benchmark.main(["--compare", str(first), str(second)]) == 0
    out = capfd.readouterr().out
    row = next(line for line in out.splitlines() if "samples_per_s" in line)
    assert row.split()[-1] == "2.000"
    assert "settings differ in batch_size" in out
    assert benchmark.main(["--compare", str(first), str(tmp_path / "gone.json")]) == 1
    assert "gone.json" in capfd.readouterr().err


def test_wrong_flags_end_before_anything_is_made(flags, capfd):
    for argv, message in (
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag"),
        (["--batch_size", "0"], "--batch_size 0 is too small"),
        (["--json", "no/such/folder/a.json"], "there is no folder"),
        (["--compare", __file__, __file__], "test_benchmark.py is no report"),
    ):
        try:
            assert benchmark.main(argv) == 1
        except SystemExit as error:
            assert error.code == 2
        assert message in capfd.readouterr().err


@pytest.mark.parametrize("generation", [2, 3])
def test_made_tower_gives_the_image_tokens_of_its_generation(generation, tmp_path):
    make_tower(tmp_path, generation=generation)
    shape = read_tower_shape(tmp_path)
    num_tokens = count_image_tokens(shape, keep_cls=False, token_merge=1)
    assert num_tokens == GENERATIONS[generation].config["image_token_len"]


def test_matrix_rate_is_a_speed():
    assert matrix_rate() > 0.1
