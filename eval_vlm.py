"""Describe every image of a folder, or score the answers to a data set.

    python eval_vlm.py
    python eval_vlm.py --weight pretrain_vlm --image_dir my_photos --prompt "<image> What is this?"
    python eval_vlm.py --data_path my/val.jsonl --images_path my/images --json scores.json

Scores are exact matches and losses of the answers with the right images, with those of another
record, and without any: what the last two lack is what the model sees.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from dataset.collate import VLMCollator
from dataset.lm_dataset import BadSample, Sample, VLMDataset
from model.inference import (
    LoadedModel,
    Sampling,
    add_model_arguments,
    ask,
    load_model,
    parse_path,
    stream,
)
from model.scoring import score_answers, wilson_lower_bound
from model.weights import ROOT, atomic_write

DEFAULT_PROMPT = "仔细看一下这张图：\n\n<image>\n\n描述一下这个图像的内容。"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TOTALS = ("right", "total", "loss_sum", "num_tokens")
CONDITIONS = ("right", "shuffled", "blind")  # the images: right, another record's, none


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image_dir", type=parse_path, default=ROOT / "dataset" / "eval_images",
        help="folder of images / 图像目录")  # fmt: skip
    add("--prompt", default=DEFAULT_PROMPT,
        help="question; without <image>, the image comes first / 提问")  # fmt: skip
    add("--max_new_tokens", type=int, default=512, help="longest answer / 最大生成长度")
    add("--temperature", type=float, default=0.65, help="0 is greedy / 采样温度")
    add("--top_p", type=float, default=0.85, help="nucleus sampling / 核采样阈值")
    add("--seed", type=int, default=2026, help="of the sampling / 随机种子")
    add("--data_path", type=parse_path, help="score these records instead / 改为对数据集评分")
    add("--images_path", type=parse_path, help="their images / 其图像")
    add("--max_seq_len", type=int, default=1536, help="longest record in tokens / 最大长度")
    add("--batch_size", type=int, default=16, help="records scored at a time / 批大小")
    add("--json", type=parse_path, help="write the scores here too / 评分写入 JSON")
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


def describe_folder(loaded: LoadedModel, images: list[Path], args: argparse.Namespace) -> int:
    """Describe every image, naming those that cannot be; returns the exit status."""
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p)
    status = 0
    for image in images:
        torch.manual_seed(args.seed)
        try:
            describe(loaded, image, args.prompt, sampling)
        except (ValueError, OSError) as error:
            print(f"\nerror: {image}: {error}", file=sys.stderr)
            status = 1
    return status


def partners(dataset: VLMDataset, indices: list[int]) -> dict[int, int]:
    """For every record with images another one with as many, half the data set away."""
    groups = defaultdict(list)
    for index in indices:
        groups[len(dataset.records[index].images)].append(index)
    pairs = {}
    for members in groups.values():
        half = max(1, len(members) // 2)
        pairs |= dict(zip(members, members[half:] + members[:half], strict=True))
    return pairs


def samples_of(dataset: VLMDataset, condition: str, indices: list[int]) -> Iterator[Sample]:
    """The records with their images, with another record's, or without any."""
    partner = partners(dataset, indices) if condition == "shuffled" else {}
    for index in indices:
        if condition == "blind":
            yield dataset.without_images(index)
            continue
        sample = dataset[index]
        if condition == "shuffled":
            sample.pixel_values.copy_(dataset[partner[index]].pixel_values)
        yield sample


def is_scorable(sample: Sample | BadSample) -> bool:
    """Whether a record has pictures and is whole: a cut one would count against the model."""
    if isinstance(sample, BadSample):
        return False
    return len(sample.pixel_values) > 0 and not sample.is_truncated


def score_data(loaded: LoadedModel, dataset: VLMDataset, *, batch_size: int) -> dict:
    """Scores by condition and question type ("all" besides): right, total, loss_sum, num_tokens."""
    collate = VLMCollator(pad_token_id=loaded.processor.tokenizer.pad_token_id)
    good = [i for i in range(len(dataset)) if is_scorable(dataset[i])]
    if not good:
        raise ValueError(f"{dataset.data_path}: no usable record with images")
    if len(good) < len(dataset):
        print(f"{len(dataset) - len(good)} record(s) are left out: no images, too long, or broken")
    totals = {c: defaultdict(lambda: dict.fromkeys(TOTALS, 0)) for c in CONDITIONS}
    for condition in CONDITIONS:
        source = samples_of(dataset, condition, good)
        while batch := list(islice(source, batch_size)):
            inputs = collate(batch).inputs_on(loaded.model.device)
            for sample, scores in zip(batch, score_answers(loaded.model, inputs), strict=True):
                types = dataset.records[sample.index].types
                for turn, score in enumerate(scores):
                    names = ["all", *types[turn : turn + 1]]
                    for name in names:
                        add_score(totals[condition][name], score)
    return {condition: dict(by_type) for condition, by_type in totals.items()}


def add_score(total: dict, score) -> None:
    total["right"] += score.is_right
    total["total"] += 1
    total["loss_sum"] += score.loss_sum
    total["num_tokens"] += score.num_tokens


def grounding_gap(report: dict) -> float:
    """Nats per supervised token that the right image saves over another record's."""
    right, shuffled = (report[c]["all"] for c in ("right", "shuffled"))
    return (shuffled["loss_sum"] - right["loss_sum"]) / right["num_tokens"]


def print_scores(report: dict) -> None:
    """One table: exact matches by type, with the 95% lower bound of the right images'."""
    print(f"{'type':14}{'answers':>8}{'right':>8}{'>= (95%)':>10}{'shuffled':>10}{'blind':>8}")
    for name, cell in sorted(report["right"].items(), key=lambda item: item[0] == "all"):
        shares = [report[c][name]["right"] / report[c][name]["total"] for c in CONDITIONS]
        bound = wilson_lower_bound(cell["right"], cell["total"])
        print(
            f"{name:14}{cell['total']:>8}{shares[0]:>8.1%}{bound:>10.1%}{shares[1]:>10.1%}"
            f"{shares[2]:>8.1%}"
        )
    print(f"grounding gap: {grounding_gap(report):.4f} nats per supervised token")


def score(loaded: LoadedModel, args: argparse.Namespace) -> int:
    """Score a data set, print the table and write the JSON; returns the exit status."""
    dataset = VLMDataset(args.data_path, args.images_path, loaded.processor,
                         max_length=args.max_seq_len, on_bad_sample="return")  # fmt: skip
    report = score_data(loaded, dataset, batch_size=args.batch_size)
    print_scores(report)
    if args.json:
        text = json.dumps(report | {"grounding_gap": grounding_gap(report)}, indent=1)
        atomic_write(args.json, lambda file: file.write(text.encode()))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if something could not be loaded, or an image described."""
    args = parse_args(argv)
    try:
        images = [] if args.data_path else find_images(args.image_dir)
        Sampling(args.max_new_tokens, args.temperature, args.top_p)
        torch.manual_seed(args.seed)  # a projection that the weight lacks is random
        loaded = load_model(args)
        print(f"weights: {loaded.path}")
        if not loaded.can_see:
            print(
                f"warning: {loaded.path.name} has no projection, so this model cannot see: what it "
                "says about images is made up; train it by trainer/train_pretrain_vlm.py",
                file=sys.stderr,
            )
        return score(loaded, args) if args.data_path else describe_folder(loaded, images, args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
