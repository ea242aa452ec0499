"""Owns the embedded sample data: records, pictures and texts of the sample world, as files.

    python -m dataset.synthetic --out dataset/sample --num_images 4000 --num_text 20000
    python -m dataset.synthetic --out dataset/sample --num_images 1000 --split heldout

writes into --out, for the split S (train or heldout):

    S_images/          the pictures (PNG)
    S.jsonl            questions, several turns a picture
    S_captions.jsonl   a caption a picture
    S_pairs.jsonl      questions that compare two of the pictures
    S_text.jsonl       the questions about scenes described in words, without pictures
                       (--num_text), and plain texts that repeat a scene's shapes (--num_retold)

--num_blind adds questions with neither a picture nor a description to S.jsonl. They teach how
likely each answer is when nothing is seen, so that scoring without images is a fair baseline.

The same arguments give the same bytes. A held-out question has one right answer, to be compared
as text; the record's field "types" holds the type of each turn, in order. A quarter of the
held-out pictures hold a colour-shape pair that never occurs in training; they get only questions
of the type "combination" and are in no pair.

    python -m dataset.synthetic --out dataset/eval_images --eval_images 1

writes a few named pictures instead, and `--eval_images 2` two of them in a folder each, for
`dataset/eval_multi_images`.
"""

import argparse
import sys
from pathlib import Path

from dataset.synthetic.drawing import (
    MIN_IMAGE_SIZE,
    write_eval_images,
    write_eval_multi_images,
)
from dataset.synthetic.sample_data import CHARACTER_SHARE, MAX_IMAGES, write_dataset
from dataset.synthetic.scenes import SPLITS
from dataset.synthetic.text import CHANCE, LANGUAGES, NUM_LISTED


def main(argv: list[str] | None = None) -> int:
    """Write a data set or the evaluation pictures; returns the exit status."""
    args = parse_args(argv)
    try:
        if args.eval_images:
            writers = {1: write_eval_images, 2: write_eval_multi_images}
            for path in writers[args.eval_images](args.out):
                print(path)
            return 0
        _check_args(args)
        counts = write_dataset(
            args.out,
            num_images=args.num_images,
            seed=args.seed,
            split=args.split,
            num_pairs=args.num_images // 4 if args.num_pairs is None else args.num_pairs,
            num_text=args.num_text,
            num_turns=args.num_turns,
            image_size=args.image_size,
            languages=LANGUAGES if args.language == "both" else (args.language,),
            character_share=args.character_share,
            caption_share=args.caption_share,
            list_share=args.list_share,
            num_listed=args.num_listed,
            num_blind=args.num_blind,
            num_retold=args.num_retold,
        )
    except KeyboardInterrupt:
        print("stopped; the same command makes this set anew / 已中断", file=sys.stderr)
        return 130  # 128 plus the signal's number
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.num_images} {args.split} pictures with their records to {args.out}")
    for type_, num in sorted(counts.items()):
        print(f"  {type_}: {num}" + (f", chance {CHANCE[type_]:.1%}" if type_ in CHANCE else ""))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dataset.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write into | 输出目录")
    add("--num_images", type=int, default=1000, help="pictures | 图片数")
    add("--seed", type=int, default=0, help="another seed gives other scenes | 随机种子")
    add("--split", choices=SPLITS, default="train", help="which set | 训练集或留出集")
    add(
        "--num_pairs",
        type=int,
        help="two-picture records; default a quarter of --num_images | 双图记录数",
    )
    add("--num_text", type=int, default=0, help="records without pictures | 纯文本记录数")
    add("--num_turns", type=int, default=8, help="questions a record at most | 每条最多提问数")
    add("--image_size", type=int, default=96, help="side in pixels | 图片边长（像素）")
    add("--language", choices=("both", *LANGUAGES), default="both", help="of the texts | 语言")
    _add_shares(parser)
    add("--num_blind", type=int, default=0, help="records without anything to see | 无图提问记录数")
    add("--num_retold", type=int, default=0, help="plain texts about scenes | 纯文本复述数")
    add(
        "--eval_images",
        type=int,
        choices=(0, 1, 2),
        nargs="?",
        const=1,
        default=0,
        help="1: write the named evaluation pictures instead, 2: pairs of them "
        "| 改为生成评测图片，2 为成对图片",
    )
    return parser.parse_args(argv)


def _add_shares(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--character_share",
        type=float,
        default=CHARACTER_SHARE,
        help="share of scenes with room that get a letter or digit, drawn or in words "
        "| 带字符的比例",
    )
    add(
        "--caption_share",
        type=float,
        default=0.0,
        help="share of records that also ask for a caption | 带描述的比例",
    )
    add(
        "--list_share",
        type=float,
        default=0.0,
        help="share of records that also ask to list the shapes again and again | 带反复列举的比例",
    )
    add("--num_listed", type=int, default=NUM_LISTED, help="pieces of such a list | 每次列举的条数")


def _check_args(args: argparse.Namespace) -> None:
    limits = {
        "num_images": (1, MAX_IMAGES),
        "num_pairs": (0, MAX_IMAGES),
        "num_text": (0, None),
        "num_turns": (1, None),
        "image_size": (MIN_IMAGE_SIZE, 1024),
        "character_share": (0.0, 1.0),
        "caption_share": (0.0, 1.0),
        "list_share": (0.0, 1.0),
        "num_listed": (1, None),
        "num_blind": (0, None),
        "num_retold": (0, None),
    }
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            wanted = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"--{name} must be {wanted}, got {value}")


if __name__ == "__main__":
    sys.exit(main())
