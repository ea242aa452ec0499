"""If this fails, the curves of a run are wrong or missing, or drawing them fails a run that is
complete.
"""

import json
import math

import pytest
from PIL import Image
from support.scripts import run_script, train_flags
from support.tiny_parts import make_records

from trainer import train_pretrain_vlm
from trainer.plot import main
from trainer.tracking import curves

BLUE, ORANGE = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)  # matplotlib's first two colours


def write_metrics(path, *, num_steps=20, val=True, offset=0.0):
    lines = []
    for step in range(1, num_steps + 1):
        loss = 5 * math.exp(-step / 10) + offset
        lines.append({"step": step, "loss": loss, "grad_norm": 1 / step, "lr": 1e-3 / step})
        if val and step % 10 == 0:
            lines.append({"step": step, "epoch": step // 10, "val_loss": loss + 0.1})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def num_pixels(path, colour, box=None) -> int:
    picture = Image.open(path).convert("RGB")
    return sum(n for n, c in picture.crop(box).getcolors(1 << 24) if c == colour)


def panels(path) -> list[tuple[int, int, int, int]]:
    """The quarters of the picture, in reading order."""
    width, height = Image.open(path).size
    halves = [(0, width // 2), (width // 2, width)]
    rows = [(0, height // 2 - 20), (height // 2 - 20, height - 40)]
    return [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in halves]


def test_plot_overlays_runs_in_every_panel(tmp_path, capsys):
    one = write_metrics(tmp_path / "a_32_metrics.jsonl")
    two = write_metrics(tmp_path / "b_32_metrics.jsonl", offset=1.0)
    out = tmp_path / "new" / "curves.png"
    assert main([str(one), str(two), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    for box in panels(out):
        assert num_pixels(out, ORANGE, box) > 50
    assert num_pixels(out, BLUE, panels(out)[0]) > 50
    assert main([str(one), "--out", str(out)]) == 0
    assert num_pixels(out, BLUE) > 50 and num_pixels(out, ORANGE) == 0


def test_plot_leaves_a_panel_empty_where_a_run_has_no_such_figures(tmp_path):
    path = write_metrics(tmp_path / "a_metrics.jsonl", val=False)
    assert main([str(path), "--out", str(tmp_path / "a.png")]) == 0
    counts = [num_pixels(tmp_path / "a.png", BLUE, box) for box in panels(tmp_path / "a.png")]
    assert counts[1] == 0 and all(counts[i] > 50 for i in (0, 2, 3))


def test_plot_takes_a_file_torn_by_a_kill_and_values_that_were_not_finite(tmp_path):
    path = write_metrics(tmp_path / "a_metrics.jsonl", num_steps=100)
    with path.open("a") as file:
        file.write('{"step": 101, "loss": null, "grad_norm": null, "lr": 0.1}\n{"step": 102, "lo')
    figures = curves.read_metrics(path)
    assert figures[-1]["step"] == 101
    steps, values = curves.points(figures, "loss")
    assert steps[-1] == 101 and math.isnan(values[-1]) and not math.isnan(values[-2])
    assert main([str(path), "--out", str(tmp_path / "a.png")]) == 0


def test_running_mean_is_the_mean_of_the_values_behind():
    assert curves.running_mean([1.0, 3.0, math.nan, 5.0], 2) == [1.0, 2.0, 3.0, 5.0]


def test_plot_names_runs_apart(tmp_path):
    same = [tmp_path / name / "sft_32_metrics.jsonl" for name in ("x", "y")]
    assert curves.run_names(same) == ["x/sft_32", "y/sft_32"]
    assert curves.run_names([same[0], tmp_path / "b_metrics.jsonl"]) == ["sft_32", "b"]
    deep = [tmp_path / "1" / "x" / "a_metrics.jsonl", tmp_path / "2" / "x" / "a_metrics.jsonl"]
    assert len(set(curves.run_names(deep))) == 2


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no metrics file"), ("", "no figures"), ("[1]\n", "no figures")]
)
def test_plot_says_what_it_cannot_draw(tmp_path, capsys, content, message):
    path = tmp_path / "a_metrics.jsonl"
    if content is not None:
        path.write_text(content)
    assert main([str(path), "--out", str(tmp_path / "a.png")]) == 1
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_a_complete_run_draws_its_curves(assets, tmp_path):
    data, images = make_records(tmp_path / "data", num_records=8)
    flags = train_flags(assets, tmp_path, data, images, val_data_path=data, val_images_path=images)
    assert train_pretrain_vlm.main(flags) == 0
    out = tmp_path / "out" / "pretrain_vlm_32_curves.png"
    assert all(num_pixels(out, BLUE, box) for box in panels(out))


def test_a_hundred_runs_find_room_below_the_panels():
    runs = {f"run {i}": [{"step": s, "loss": 1 / s} for s in (1, 2)] for i in range(100)}
    figure = curves.draw_runs(runs)
    figure.draw_without_rendering()
    lowest = min(axes.get_tightbbox().y0 for axes in figure.axes)
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 >= 0 and legend.y1 <= lowest


@pytest.mark.slow
def test_a_run_is_complete_without_matplotlib(assets, tmp_path):
    broken = tmp_path / "broken" / "matplotlib"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')")
    data = make_records(tmp_path / "data", num_records=4)
    process = run_script(
        "trainer/train_pretrain_vlm.py",
        *train_flags(assets, tmp_path, *data),
        env={"PYTHONPATH": str(broken.parent)},
        cold=True,
    )
    assert "warning: the curves were not drawn (broken on purpose)" in process.stderr
    assert (tmp_path / "out" / "pretrain_vlm_32.pth").is_file()
