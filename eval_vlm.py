"""Describe every image of a folder.

python eval_vlm.py
python eval_vlm.py --weight pretrain_vlm --image_dir my_photos --prompt "<image> What is this?"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from model.inference import LoadedModel, Sampling, add_model_arguments, ask, load_model, stream
from model.weights import ROOT

DEFAULT_PROMPT = "仔细看一下这张图：\n\n<image>\n\n描述一下这个图像的内容。"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image_dir", type=Path, default=ROOT / "dataset" / "eval_images",
        help="folder of images / 图像目录")  # fmt: skip
    add("--prompt", default=DEFAULT_PROMPT,
        help="question; without <image>, the image comes first / 提问")  # fmt: skip
    add("--max_new_tokens", type=int, default=512, help="longest answer / 最大生成长度")
    add("--temperature", type=float, default=0.65, help="0 is greedy / 采样温度")
    add("--top_p", type=float, default=0.85, help="nucleus sampling / 核采样阈值")
    add("--seed", type=int, default=2026, help="of the sampling / 随机种子")
    return parser.parse_args(argv)


def find_images(folder: Path) -> list[Path]:
    """Image files of a folder, in name order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--image_dir {folder} is not a folder")
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise FileNotFoundError(
            f"--image_dir {folder} holds no image ({' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return images


def describe(loaded: LoadedModel, image: Path, prompt: str, sampling: Sampling) -> None:
    """Print the answer as it comes."""
    print(f"[{image.name}] ", end="", flush=True)
    for piece in stream(loaded, ask(prompt, num_images=1), [image], sampling):
        print(piece, end="", flush=True)
    print("\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if the model or every image failed, or some image did."""
    args = parse_args(argv)
    try:
        images = find_images(args.image_dir)
        sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p)
        torch.manual_seed(args.seed)  # a projection that the weight lacks is random
        loaded = load_model(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"weights: {loaded.path}")
    if not loaded.can_see:
        print(
            f"warning: {loaded.path.name} has no projection, so this model cannot see: what it "
            "says about images is made up; train it by trainer/train_pretrain_vlm.py",
            file=sys.stderr,
        )
    status = 0
    for image in images:
        torch.manual_seed(args.seed)
        try:
            describe(loaded, image, args.prompt, sampling)
        except ValueError as error:
            print(f"\nerror: {image}: {error}", file=sys.stderr)
            status = 1
        except KeyboardInterrupt:
            print()
            return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
