"""Trains a model from nothing on photos with captions in two languages, and scores it.

    python dataset/download.py flickr8k
    python trainer/photos.py
    python trainer/photos.py --data my/flickr8k --seed 7
    python trainer/photos.py --num_cut 500 --out out/choices

`make photos` is the second command. The tower, which has seen ImageNet's photos, is frozen; its
features are computed once and kept. The captions are learnt first, then the model's own answers by
how well they agree with the captions (`train_scst_vlm.py`). The run ends with a table beside
published figures, the picture `report.png` and the commands to go on with. What a run finds done,
it does not do again.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.machine.paths import ROOT
from model.options import OnceParser, parse_path
from trainer.chain.photo_report import print_table, write_report
from trainer.chain.photo_settings import DATA, NUM_BEAMS, SEED, TOWER, Photos
from trainer.chain.photo_steps import (
    check_inputs,
    cut_records,
    evaluate,
    fetch_tower,
    learn_from_answers,
    train,
    train_tokenizer,
)
from trainer.chain.running import INTERRUPTED, check_settings
from trainer.measuring.matrix_rate import matrix_rate

PROMPT = "<image> Describe the picture in one sentence."  # as the captions were asked for


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = OnceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, usual = parser.add_argument, Photos()
    add(
        "--data",
        type=parse_path,
        default=DATA,
        help="folder with train and val, each with data.jsonl and images.zip / 照片数据目录",
    )
    add("--out", type=parse_path, default=usual.folder, help="folder of the results / 输出目录")
    tower_help = "folder of the tower; the default is fetched where it is missing / 视觉塔目录"
    add("--tower", type=parse_path, default=TOWER, help=tower_help)
    add("--seed", type=int, default=SEED, help="of order and new weights / 随机种子")
    add("--epochs", type=int, default=usual.epochs, help="passes over the data / 训练轮数")
    cut_help = (
        "training photos to hold back and score in place of the validation photos, for choices / "
        "从训练集中留出并代替验证集的照片数"
    )
    add("--num_cut", type=int, default=0, help=cut_help)
    args = parser.parse_args(argv)
    for name in ("data", "out", "tower"):  # the scripts run in the repository
        setattr(args, name, getattr(args, name).absolute())
    for name, low in (("num_cut", 0), ("epochs", 1), ("seed", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name} must be {low} or more, got {getattr(args, name)}")
    return args


def print_next_steps(photos: Photos) -> None:
    """The commands to talk to the model."""
    model = ["--weight", photos.weight, "--vision_model_path", photos.tower]

    def command(script: str, *flags: str | Path) -> str:
        words = [sys.executable, ROOT / script, *flags, *model]
        return shlex.join(map(str, words)) + f" --num_beams {NUM_BEAMS}"

    print(f"""
Talk to it:
  your photos  {command("eval_vlm.py", "--prompt", PROMPT)} --image_dir FOLDER
  chat         {command("eval_vlm.py", "--chat")}
  web page     {command("web_demo.py", "--examples", photos.examples)}""")


def run_chain(photos: Photos) -> int:
    """Train, score and report; returns the exit status."""
    try:
        if photos.tower == TOWER:
            fetch_tower(photos)
        if photos.num_cut:
            cut_records(photos)
        train_tokenizer(photos)
        train(photos)
        learn_from_answers(photos)
        scores = evaluate(photos)
        print_table(scores)
        write_report(photos, scores)
    except subprocess.CalledProcessError as error:
        print(f"error: the step above ended with status {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nleft; the same command goes on from here / 重新运行即可继续")
        return INTERRUPTED
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the chain; returns the exit status."""
    args = parse_args(argv)
    photos = Photos(args.data, args.out, args.tower, args.seed, args.num_cut, args.epochs)
    started_s = time.perf_counter()
    try:
        check_inputs(photos)
        check_settings(photos.folder, photos.settings())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"matrix products: {matrix_rate():.0f} GFLOP/s in float32")
    try:
        status = run_chain(photos)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if status:
        return status
    cpu_s = sum(os.times()[:4])
    print(
        f"\n{time.perf_counter() - started_s:.0f} s, {cpu_s:.0f} CPU-seconds; "
        f"curves and answers: {photos.out / 'report.png'}"
    )
    print_next_steps(photos)
    return 0


if __name__ == "__main__":
    sys.exit(main())
