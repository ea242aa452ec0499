"""The whole chain on the sample world, with the real scripts: data, pretrain, sft, scores, report.

    python trainer/demo.py
    python trainer/demo.py --from_zero 1

The first (`make demo`) starts from the tiny tower and language model of the repository; the second
(`make from-zero`) makes those too, from generated data alone. Both end with a table, the picture
`report.png` and the commands to go on with. What a run finds done, it does not do again.

What was made lies beside the settings it was made with (`chain.json`); others need another start.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dataset.synthetic.text import CHANCE
from model.machine.paths import OUT_DIR, ROOT
from model.options import OnceParser, parse_bool
from model.vision_tower import VISION_DIR
from model.vlm_processor import MODEL_DIR
from trainer.chain.settings import (
    FROM_ZERO,
    LLM,
    SIZES,
    TEXT_STAGES,
    TOWER,
    VLM,
    Chain,
    check_settings,
    describe,
)
from trainer.tracking.curves import draw_curve, read_metrics

MATRIX_SIDE, MATRIX_ROUNDS = 1024, 10
EXAMPLES = 8  # pictures in the report
TEXTS_PER_HELDOUT = 50  # texts to train on for each to validate with


def run_script(*words: object) -> None:
    """Run `python words...` in the repository; the output goes to the terminal.

    Raises:
        subprocess.CalledProcessError: it ended with another status than 0.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the script has saved and ended.
    """
    command = [sys.executable, *map(str, words)]
    print(f"\n$ python {' '.join(command[1:])}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT)

    def pass_on(_signum, _frame) -> None:
        process.terminate()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # Ctrl-C went to the script as well
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    if status:
        raise subprocess.CalledProcessError(status, command)


def matrix_rate() -> float:
    """Float32 matrix products of this machine at this moment, in GFLOP/s."""
    left = torch.ones(MATRIX_SIDE, MATRIX_SIDE)
    started_s = time.perf_counter()
    for _ in range(MATRIX_ROUNDS):
        left @ left
    return 2e-9 * MATRIX_ROUNDS * MATRIX_SIDE**3 / (time.perf_counter() - started_s)


def make_data(chain: Chain) -> None:
    """Pictures for both stages and held-out ones, with their questions."""
    told = ("--caption_share", chain.caption_share, "--list_share", 1, "--num_listed",
            chain.num_listed, "--num_turns", chain.num_turns)  # fmt: skip
    for folder, split, count, more in (
        (chain.pretrain_data, "train", chain.num_pretrain, (*told, "--seed", 1)),
        (chain.data, "train", chain.num_train, (*told, "--num_blind", chain.num_train // 20)),
        (chain.data, "heldout", chain.num_heldout, ()),
    ):
        if not (folder / f"{split}.jsonl").is_file():
            run_script("-m", "dataset.synthetic", "--out", folder, "--split", split,
                       "--num_images", count, "--num_pairs", 0, *more)  # fmt: skip


def train_tower(chain: Chain) -> None:
    """The tower, on pictures, captions and words."""
    if not (chain.tower / "preprocessor_config.json").is_file():  # written last
        run_script("trainer/train_clip_tiny.py", "--save_dir", chain.tower, "--steps",
                   chain.tower_steps, "--tokenizer_path", MODEL_DIR)  # fmt: skip


def train_llm(chain: Chain) -> None:
    """The language model: scenes told over and over, then questions about told scenes."""
    start = "none"
    for stage in TEXT_STAGES:
        text = chain.data / stage.name
        count = round(stage.count * chain.text_share)
        for split, num in (("heldout", max(1, count // TEXTS_PER_HELDOUT)), ("train", count)):
            if not (text / f"{split}_text.jsonl").is_file():
                run_script("-m", "dataset.synthetic", "--out", text, "--split", split,
                           "--seed", stage.seed, "--num_images", 1, "--num_pairs", 0,
                           "--caption_share", 0.1, "--character_share", stage.character_share,
                           stage.flag, num)  # fmt: skip
        run_script("trainer/train_llm.py", *SIZES, "--max_seq_len", 340, "--loss_on", "answers",
                   "--data_path", text / "train_text.jsonl",
                   "--val_data_path", text / "heldout_text.jsonl",
                   "--batch_size", stage.batch_size, "--learning_rate", stage.learning_rate,
                   "--warmup_steps", 50, "--log_interval", 50, "--dtype", "float32",
                   "--num_workers", 0, "--tokenizer_path", MODEL_DIR,
                   "--save_dir", chain.folder, "--checkpoint_dir", chain.folder,
                   "--from_weight", start, "--save_weight", stage.name,
                   "--from_resume", 1)  # fmt: skip
        start = stage.name


def train(chain: Chain) -> None:
    """Both stages; one that is complete ends at once."""
    common = ("--vision_model_path", chain.tower, "--save_dir", chain.out,
              "--checkpoint_dir", chain.out, "--seed", chain.seed, "--epochs", 1, "--dtype",
              "float32", "--log_interval", 20, "--save_interval", 500, "--num_workers", 1,
              "--from_resume", 1)  # fmt: skip
    for script, data, recipe, more in (
        ("trainer/train_pretrain_vlm.py", chain.pretrain_data, chain.pretrain, (
            "--from_weight", chain.llm, "--save_weight", "pretrain_vlm_demo")),
        ("trainer/train_sft_vlm.py", chain.data, chain.sft, (
            "--from_weight", "pretrain_vlm_demo", "--hidden_size", 128,
            "--save_weight", "sft_vlm_demo")),
    ):  # fmt: skip
        run_script(script, *common, "--data_path", data / "train.jsonl", "--images_path",
                   data / "train_images", *recipe.flags(), *more)  # fmt: skip


def evaluate(chain: Chain) -> dict:
    """Score the held-out questions; returns the scores."""
    scores = chain.out / "scores.json"
    run_script("eval_vlm.py", "--weight", chain.out / f"{VLM}.pth", "--vision_model_path",
               chain.tower, "--data_path", chain.data / "heldout.jsonl", "--images_path",
               chain.data / "heldout_images", "--json", scores)  # fmt: skip
    return json.loads(scores.read_text())


def print_table(scores: dict) -> None:
    """Accuracy per question type beside chance."""
    print(f"\n{'held-out question':20}{'answers':>8}{'right image':>13}{'shuffled':>10}"
          f"{'no image':>10}{'chance':>8}")  # fmt: skip
    for name, cell in sorted(scores["right"].items(), key=lambda item: item[0] == "all"):
        shares = [scores[c][name]["right"] / cell["total"] for c in ("right", "shuffled", "blind")]
        chance = f"{CHANCE[name]:.1%}" if name in CHANCE else ""
        print(f"{name:20}{cell['total']:>8}{shares[0]:>13.1%}{shares[1]:>10.1%}{shares[2]:>10.1%}"
              f"{chance:>8}")  # fmt: skip
    print(f"grounding gap: {scores['grounding_gap']:.3f} nats per supervised token")


def write_report(chain: Chain) -> None:
    """Loss curves of both stages, and held-out pictures with the model's answers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from model.pictures import open_image

    figure = plt.figure(figsize=(13, 9), layout="constrained")
    grid = figure.add_gridspec(3, 4)
    for column, name in ((0, "pretrain_vlm_demo"), (2, "sft_vlm_demo")):
        axes = figure.add_subplot(grid[0, column : column + 2])
        draw_curve(axes, read_metrics(chain.out / f"{name}_128_metrics.jsonl"), "loss")
        axes.set(title=name, xlabel="step", ylabel="loss (nats per supervised token)")
    for i, (image, title) in enumerate(answered_examples(chain)):
        axes = figure.add_subplot(grid[1 + i // 4, i % 4])
        axes.imshow(open_image(image))
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    figure.savefig(chain.out / "report.png", dpi=100)
    plt.close(figure)


def answered_examples(chain: Chain) -> list[tuple[Path, str]]:
    """A few held-out pictures, each with a question and the model's and the right answer."""
    from model.generation.engine import VLMEngine
    from model.generation.sampling import Sampling
    from model.options import add_model_arguments

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    engine = VLMEngine.from_args(parser.parse_args(
        ["--weight", str(chain.out / f"{VLM}.pth"), "--vision_model_path", str(chain.tower)]
    ))  # fmt: skip
    shown = []
    with (chain.data / "heldout.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    english = [r for r in records if r["conversations"][0]["content"].isascii()]
    for record in english[:EXAMPLES]:
        image = chain.data / "heldout_images" / record["image"]
        question, answer = (m["content"] for m in record["conversations"][:2])
        messages = [{"role": "user", "content": question}]
        said = engine.generate([(messages, [image])], Sampling(16, 0))[0].text
        said = said.encode("ascii", "replace").decode()  # an untrained model may say anything
        title = f"{question.removeprefix('<image>').strip()}\n{said} (right: {answer})"
        shown.append((image, title))
    return shown


def print_next_steps(chain: Chain) -> None:
    """The three commands to go on with."""
    model = f"--weight {chain.out / VLM}.pth --vision_model_path {chain.tower}"
    print(f"""
Go on with:
  chat       {sys.executable} eval_vlm.py --chat {model}
  web page   {sys.executable} web_demo.py {model}
  real data  {sys.executable} dataset/download.py --help""")


def publish(chain: Chain) -> None:
    """Put what a chain from zero made where the repository keeps it."""
    shutil.copytree(chain.tower, VISION_DIR / TOWER, dirs_exist_ok=True)
    for stem, source in ((LLM, chain.folder), (VLM, chain.out)):
        shutil.copy(source / f"{stem}.pth", OUT_DIR)
        about = json.loads((source / f"{stem}.json").read_text(encoding="utf-8"))
        about.pop("former", None)  # the save before: needed only while a save may be cut off
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        text = text.replace(f"{ROOT}{os.sep}", "")  # where it was made concerns nobody
        (OUT_DIR / f"{stem}.json").write_text(text, encoding="utf-8")
    print(f"published: {VISION_DIR / TOWER}, {OUT_DIR / LLM}.pth, {OUT_DIR / VLM}.pth")


def parse_args(argv: list[str] | None) -> tuple[Chain, argparse.Namespace]:
    """The chain that the flags describe, and the other flags."""
    parser = OnceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--from_zero", type=parse_bool, nargs="?", const=True, default=False,
        help="make tower and language model too / 从零训练视觉塔和语言模型")  # fmt: skip
    add("--publish", type=parse_bool, nargs="?", const=True, default=False,
        help="copy what --from_zero made over the repository's own / 覆盖仓库中的权重")  # fmt: skip
    add("--seed", type=int, help="of the stages with images / 视觉语言阶段的随机种子")
    for name, text in (
        ("tower_steps", "of the tower / 视觉塔训练步数"),
        ("num_pretrain", "pictures of the first stage / 预训练图片数"),
        ("num_train", "pictures of the second / 微调图片数"),
        ("num_heldout", "held-out pictures / 留出图片数"),
    ):
        add(f"--{name}", type=int, help=text)
    add("--text_share", type=float, help="of the texts from zero / 文本比例")
    args = parser.parse_args(argv)
    if args.publish and not args.from_zero:
        parser.error("--publish needs --from_zero 1")
    names = ("seed", "tower_steps", "text_share", "num_pretrain", "num_train", "num_heldout")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Chain(**((FROM_ZERO if args.from_zero else {}) | given)), args


def main(argv: list[str] | None = None) -> int:
    """Run the chain; returns the exit status."""
    chain, args = parse_args(argv)
    if not args.from_zero and not (chain.llm.is_file() and (chain.tower / "config.json").is_file()):
        print(f"error: the repository's {chain.llm} or {chain.tower} is missing; fetch them by "
              "`git checkout -- out model/vision_model`, or make them anew by `make from-zero` "
              "(an hour or two on 2 CPU cores) and `python trainer/demo.py --from_zero 1 "
              "--publish 1`", file=sys.stderr)  # fmt: skip
        return 1
    started_s = time.perf_counter()
    try:
        check_settings(chain, describe(chain, is_from_zero=args.from_zero))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"matrix products: {matrix_rate():.0f} GFLOP/s in float32")
    try:
        make_data(chain)
        if args.from_zero:
            train_tower(chain)
            train_llm(chain)
        train(chain)
        scores = evaluate(chain)
    except subprocess.CalledProcessError as error:
        print(f"error: the step above ended with status {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nleft; the same command goes on from here (a data set or a tower in the making "
              "begins anew) / 重新运行即可继续")  # fmt: skip
        return 130
    write_report(chain)
    print_table(scores)
    cpu_s = sum(os.times()[:4])
    print(f"\n{time.perf_counter() - started_s:.0f} s, {cpu_s:.0f} CPU-seconds; "
          f"curves and answers: {chain.out / 'report.png'}")  # fmt: skip
    if args.publish:
        publish(chain)
    print_next_steps(chain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
