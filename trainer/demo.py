"""The whole chain on the sample world, with the real scripts: data, pretrain, sft, scores, report.

    python trainer/demo.py --from_zero 1

Trains tower and language model first (`make from-zero`), or starts from those it finds (`make
demo`); ends with a table, the picture `out/demo/report.png` and the commands to go on with. What a
run finds done, it does not do again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dataset.synthetic_text import CHANCE
from model.inference import parse_bool
from model.weights import ROOT

DEMO_DIR = ROOT / "out" / "demo"
TOWER_DIR = DEMO_DIR / "clip-tiny-patch16"
LLM = DEMO_DIR / "llm_192.pth"
MATRIX_SIDE, MATRIX_ROUNDS = 1024, 10
EXAMPLES = 8  # pictures in the report


def run(*command) -> None:
    """Run a script of the repository; its output goes to the terminal."""
    words = [str(word) for word in command]
    print(f"\n$ python {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def matrix_rate() -> float:
    """Float32 matrix products of this machine at this moment, in GFLOP/s."""
    left = torch.ones(MATRIX_SIDE, MATRIX_SIDE)
    started_s = time.perf_counter()
    for _ in range(MATRIX_ROUNDS):
        left @ left
    return 2e-9 * MATRIX_ROUNDS * MATRIX_SIDE**3 / (time.perf_counter() - started_s)


def make_data(folder: Path, args: argparse.Namespace) -> None:
    """Training and held-out pictures with their questions."""
    for split, count in (("train", args.num_train), ("heldout", args.num_heldout)):
        if not (folder / f"{split}.jsonl").is_file():
            run("-m", "dataset.synthetic", "--out", folder, "--split", split, "--num_images", count,
                "--num_pairs", 0)  # fmt: skip


def train_from_zero(data: Path, args: argparse.Namespace) -> None:
    """The tower on pictures and captions, the language model on scenes told in words."""
    if not (TOWER_DIR / "preprocessor_config.json").is_file():  # written last
        run("trainer/train_clip_tiny.py", "--save_dir", TOWER_DIR, "--steps", args.tower_steps,
            "--batch_size", 64, "--warmup_steps", 50)  # fmt: skip
    text = data / "text"
    if not (text / "train_text.jsonl").is_file():
        run("-m", "dataset.synthetic", "--out", text, "--split", "train", "--seed", 11,
            "--num_images", 1, "--num_pairs", 0, "--num_text", args.num_text)  # fmt: skip
    run("trainer/train_llm.py", "--data_path", text / "train_text.jsonl", "--hidden_size", 192,
        "--num_hidden_layers", 4, "--batch_size", 16, "--learning_rate", 2e-3, "--log_interval", 20,
        "--num_workers", 0, "--save_dir", DEMO_DIR, "--checkpoint_dir", DEMO_DIR,
        "--from_resume", 1)  # fmt: skip


def train(data: Path, args: argparse.Namespace) -> None:
    """Both stages; one that is complete ends at once."""
    common = ("--vision_model_path", TOWER_DIR, "--save_dir", DEMO_DIR,
              "--checkpoint_dir", DEMO_DIR,
              "--data_path", data / "train.jsonl", "--images_path", data / "train_images",
              "--batch_size", 16, "--log_interval", 20, "--num_workers", 1,
              "--from_resume", 1)  # fmt: skip
    run("trainer/train_pretrain_vlm.py", *common, "--from_weight", LLM, "--epochs",
        args.pretrain_epochs, "--learning_rate", args.pretrain_lr)  # fmt: skip
    run("trainer/train_sft_vlm.py", *common, "--from_weight", "pretrain_vlm", "--hidden_size", 192,
        "--epochs", args.sft_epochs, "--learning_rate", args.sft_lr)  # fmt: skip


def evaluate(data: Path) -> dict:
    """Score the held-out questions; returns the scores."""
    scores = DEMO_DIR / "scores.json"
    run("eval_vlm.py", "--save_dir", DEMO_DIR, "--hidden_size", 192,
        "--vision_model_path", TOWER_DIR,
        "--data_path", data / "heldout.jsonl", "--images_path", data / "heldout_images",
        "--json", scores)  # fmt: skip
    return json.loads(scores.read_text())


def print_table(scores: dict) -> None:
    """Accuracy per question type beside chance."""
    print(f"\n{'held-out question':20}{'answers':>8}{'right image':>13}{'shuffled':>10}"
          f"{'no image':>10}{'chance':>8}")  # fmt: skip
    for name, cell in scores["right"].items():
        shares = [scores[c][name]["right"] / cell["total"] for c in ("right", "shuffled", "blind")]
        chance = f"{CHANCE[name]:.1%}" if name in CHANCE else ""
        print(f"{name:20}{cell['total']:>8}{shares[0]:>13.1%}{shares[1]:>10.1%}{shares[2]:>10.1%}"
              f"{chance:>8}")  # fmt: skip
    print(f"grounding gap: {scores['grounding_gap']:.3f} nats per supervised token")


def write_report(path: Path, data: Path) -> None:
    """Loss curves of both stages, and held-out pictures with the model's captions of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    figure = plt.figure(figsize=(13, 9), layout="constrained")
    grid = figure.add_gridspec(3, 4)
    for column, name in ((0, "pretrain_vlm"), (2, "sft_vlm")):
        axes = figure.add_subplot(grid[0, column : column + 2])
        lines = (DEMO_DIR / f"{name}_192_metrics.jsonl").read_text().splitlines()
        points = [(f["step"], f["loss"]) for f in map(json.loads, lines) if f.get("loss")]
        axes.plot(*zip(*points, strict=True), marker=".")
        axes.set(title=name, xlabel="step", ylabel="loss (nats per token)")
    for i, (image, title) in enumerate(answered_examples(data)):
        axes = figure.add_subplot(grid[1 + i // 4, i % 4])
        axes.imshow(Image.open(image))
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def answered_examples(data: Path) -> list[tuple[Path, str]]:
    """A few held-out pictures, each with a question and the model's and the right answer."""
    from model.inference import Sampling, add_model_arguments, generate, load_model

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    loaded = load_model(parser.parse_args(
        ["--save_dir", str(DEMO_DIR), "--hidden_size", "192", "--vision_model_path", str(TOWER_DIR)]
    ))  # fmt: skip
    shown = []
    with (data / "heldout.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    english = [r for r in records if r["conversations"][0]["content"].isascii()]
    for record in english[:EXAMPLES]:
        image = data / "heldout_images" / record["image"]
        question, answer = (m["content"] for m in record["conversations"][:2])
        messages = [{"role": "user", "content": question}]
        said = generate(loaded, [(messages, [image])], Sampling(16, 0))[0]
        title = f"{question.removeprefix('<image>').strip()}\n{said} (right: {answer})"
        shown.append((image, title))
    return shown


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--from_zero", type=parse_bool, nargs="?", const=True, default=False,
        help="train tower and language model first / 先训练视觉塔和语言模型")  # fmt: skip
    add("--tower_steps", type=int, default=1100, help="of the tower / 视觉塔训练步数")
    add("--num_text", type=int, default=7000, help="scenes told in words / 文本场景数")
    add("--num_train", type=int, default=5000, help="training pictures / 训练图片数")
    add("--num_heldout", type=int, default=500, help="held-out pictures / 留出图片数")
    add("--pretrain_epochs", type=int, default=1, help="passes of the first stage / 预训练轮数")
    add("--pretrain_lr", type=float, default=2e-3, help="its learning rate / 预训练学习率")
    add("--sft_epochs", type=int, default=2, help="passes of the second / 微调轮数")
    add("--sft_lr", type=float, default=1e-3, help="its learning rate / 微调学习率")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the chain; returns the exit status."""
    args = parse_args(argv)
    if not args.from_zero and not (LLM.is_file() and (TOWER_DIR / "config.json").is_file()):
        print("error: the tiny language model and tower are not part of the repository yet; "
              "`make from-zero` trains them here first, in about an hour on 2 CPU cores",
              file=sys.stderr)  # fmt: skip
        return 1
    started_s, data = time.perf_counter(), DEMO_DIR / "data"
    print(f"matrix products: {matrix_rate():.0f} GFLOP/s in float32")
    try:
        make_data(data, args)
        if args.from_zero:
            train_from_zero(data, args)
        train(data, args)
        scores = evaluate(data)
    except subprocess.CalledProcessError as error:
        print(f"error: the step above ended with status {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nleft; `make demo` goes on from here")
        return 130
    write_report(DEMO_DIR / "report.png", data)
    print_table(scores)
    cpu_s = sum(os.times()[:4])
    print(f"\n{time.perf_counter() - started_s:.0f} s, {cpu_s:.0f} CPU-seconds; "
          f"curves and answers: {DEMO_DIR / 'report.png'}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
