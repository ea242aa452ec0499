"""The tiny vision tower: a CLIP trained contrastively on pictures and captions of the sample world.

    python trainer/train_clip_tiny.py --steps 2500

A caption says what stands in each corner. After a first part with unrelated scenes, a batch is made
of groups of scenes that differ in one thing (a shape, a colour, a place), so telling pictures apart
takes what the questions will ask for. The result is an ordinary CLIP folder; the language model
only reads its vision half.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from dataset.synthetic_drawing import draw_scene
from dataset.synthetic_text import describe
from dataset.synthetic_world import (
    COLOURS,
    PLACES,
    SHAPES,
    Scene,
    is_heldout_scene,
    sample_scene,
)
from model.inference import choose_device
from model.vlm_processor import load_tokenizer
from model.weights import ROOT
from trainer.optim import get_lr, make_optimizer
from trainer.trainer_utils import autocast, setup_seed

GROUP = 4  # scenes of a group: one, and three that differ from it in one thing each
UNRELATED_SHARE = 0.4  # of the groups, at the beginning, hold unrelated scenes: those are easier
IMAGE_SIDE, PATCH_SIDE, DRAWN_SIDE = 224, 16, 96
PROCESSOR = CLIPImageProcessorPil()  # CLIP's own mean and deviation


def change_scene(scene: Scene, rng: Random) -> Scene:
    """The scene with another shape, another colour or another place of one of its items."""
    items = list(scene.items)
    index = rng.randrange(len(items))
    item = items[index]
    kind = rng.choice(("shape", "colour", "place"))
    if kind == "shape":
        items[index] = replace(item, shape=rng.choice([s for s in SHAPES if s != item.shape]))
    elif kind == "colour":
        colour = rng.choice([c for c in COLOURS if c != item.colour])
        items[index] = replace(item, colour=colour, rgb=COLOURS[colour])
    else:
        taken = {scene.character_place}
        place = rng.choice([p for p in PLACES if p != item.place and p not in taken])
        for other, neighbour in enumerate(items):
            if neighbour.place == place:  # the two change places
                items[other] = move(neighbour, item.place)
        items[index] = move(item, place)
    return replace(scene, items=tuple(items))


def move(item, place: str):
    """The item in another quadrant, as far from its middle as before."""
    (column, row), (old_column, old_row) = PLACES[place], PLACES[item.place]
    x, y = item.x + 0.5 * (column - old_column), item.y + 0.5 * (row - old_row)
    return replace(item, place=place, x=x, y=y)


class SceneGroups(Dataset):
    """Group `index` of a seed: `GROUP` pictures with their captions, of training scenes only."""

    def __init__(self, num_groups: int, *, seed: int, tokenizer):
        self.num_groups, self.seed, self.tokenizer = num_groups, seed, tokenizer

    def __len__(self) -> int:
        return self.num_groups

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[list[int]]]:
        """Pictures (GROUP, side, side, 3) uint8, and caption ids that end with eos."""
        rng = Random(f"{self.seed} {index}")
        scenes = [sample_scene(rng)]
        is_unrelated = index < UNRELATED_SHARE * self.num_groups
        while len(scenes) < GROUP:
            changed = sample_scene(rng) if is_unrelated else change_scene(scenes[0], rng)
            if not is_heldout_scene(changed) and changed not in scenes:
                scenes.append(changed)
        pictures = [np.asarray(draw_scene(s, image_size=DRAWN_SIDE)) for s in scenes]
        tokenizer = self.tokenizer
        captions = [describe(s, rng, style="table") for s in scenes]
        texts = [tokenizer.encode(c) + [tokenizer.eos_token_id] for c in captions]
        return np.stack(pictures), texts


def collate(groups: list) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, side, side) uint8, ids and mask (B, T)."""
    pictures = torch.from_numpy(np.concatenate([g[0] for g in groups])).permute(0, 3, 1, 2)
    texts = [torch.tensor(ids) for g in groups for ids in g[1]]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(t) for t in texts])
    return pictures, ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def preprocess(pictures: Tensor) -> Tensor:
    """What CLIP's image processor does to square pictures: (B, 3, 224, 224) float32."""
    # On 8-bit values, as Pillow does it.
    pixels = F.interpolate(pictures, size=IMAGE_SIDE, mode="bicubic", antialias=True).float()
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1)
                 for v in (PROCESSOR.image_mean, PROCESSOR.image_std))  # fmt: skip
    return (pixels / 255 - mean) / std


def make_model(args: argparse.Namespace, tokenizer) -> CLIPModel:
    """A CLIP of the flags' sizes with random weights."""
    heads = args.hidden_size // 48
    shared = {"hidden_act": "quick_gelu", "projection_dim": args.projection_dim}
    vision = shared | {
        "hidden_size": args.hidden_size,
        "intermediate_size": 4 * args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": heads,
        "image_size": IMAGE_SIDE,
        "patch_size": PATCH_SIDE,
    }
    text = shared | {
        "vocab_size": len(tokenizer),
        "hidden_size": args.text_hidden_size,
        "intermediate_size": 4 * args.text_hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=args.projection_dim)
    )
    model.set_attn_implementation("eager")  # at this width faster than SDPA, whose backward is slow
    return model


def train(model: CLIPModel, args: argparse.Namespace, tokenizer, device: torch.device) -> float:
    """Train with the symmetric contrastive loss; returns the last window's in-batch accuracy.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision" (2021).
    """
    groups = SceneGroups(args.steps * args.batch_size // GROUP, seed=args.seed, tokenizer=tokenizer)
    loader = DataLoader(groups, batch_size=args.batch_size // GROUP, collate_fn=collate,
                        num_workers=args.num_workers)  # fmt: skip
    optimizer = make_optimizer(model.parameters(), lr=args.learning_rate)
    started_s, correct, total = time.perf_counter(), 0, 0
    for step, (pictures, ids, mask) in enumerate(loader, 1):
        warmup = min(1.0, step / args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = warmup * get_lr(step, args.steps, args.learning_rate)
        with autocast(device, args.dtype):
            output = model(
                pixel_values=preprocess(pictures.to(device)),
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                return_loss=True,
            )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100.0))
            guessed = output.logits_per_image.argmax(1)
            correct += int((guessed == torch.arange(len(guessed), device=device)).sum())
            total += len(guessed)
        if step % args.log_interval == 0 or step == args.steps:
            elapsed_s = time.perf_counter() - started_s
            print(f"step {step}/{args.steps} loss:{output.loss.item():.4f} "
                  f"in-batch accuracy:{correct / total:.3f} "
                  f"images/s:{step * args.batch_size / elapsed_s:.0f}", flush=True)  # fmt: skip
            accuracy, correct, total = correct / total, 0, 0
    return accuracy


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--save_dir", type=Path, default=ROOT / "model" / "vision_model" / "clip-tiny-patch16",
        help="CLIP folder to write / 输出目录")  # fmt: skip
    add("--steps", type=int, default=2500, help="training steps / 训练步数")
    add("--batch_size", type=int, default=128, help="pictures per step / 批大小")
    add("--learning_rate", type=float, default=1e-3, help="peak is 1.1 times this / 学习率")
    add("--warmup_steps", type=int, default=100, help="steps of rising rate / 预热步数")
    add("--hidden_size", type=int, default=192, help="width of the tower / 视觉宽度")
    add("--num_hidden_layers", type=int, default=4, help="its layers / 视觉层数")
    add("--text_hidden_size", type=int, default=128, help="width of the text half / 文本宽度")
    add("--projection_dim", type=int, default=128, help="of the shared space / 共享空间维度")
    add("--tokenizer_path", type=Path, help="folder of the tokenizer / 分词器目录")
    add("--device", help="default: the best / 默认自动选择")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="arithmetic / 精度")
    add("--num_workers", type=int, default=1, help="processes that draw / 绘图进程数")
    add("--log_interval", type=int, default=50, help="steps between lines / 日志间隔")
    add("--seed", type=int, default=42, help="of scenes and weights / 随机种子")
    args = parser.parse_args(argv)
    if args.batch_size % GROUP or args.batch_size < GROUP:
        raise ValueError(f"--batch_size {args.batch_size} is not a multiple of {GROUP}")
    if args.hidden_size % 48 or args.text_hidden_size % 4:
        raise ValueError("--hidden_size must be a multiple of 48, --text_hidden_size of 4")
    if min(args.steps, args.warmup_steps, args.num_hidden_layers, args.log_interval) < 1:
        raise ValueError("--steps, --warmup_steps, --num_hidden_layers, --log_interval: at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Train and write the folder; returns the exit status."""
    try:
        args = parse_args(argv)
        device = choose_device(args.device)
        tokenizer = load_tokenizer(args.tokenizer_path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    setup_seed(args.seed)
    model = make_model(args, tokenizer).to(device)
    size = sum(p.numel() for p in model.vision_model.parameters())
    print(f"tower: {size:,} parameters of {sum(p.numel() for p in model.parameters()):,}")
    accuracy = train(model, args, tokenizer, device)
    model.to("cpu", torch.float16).save_pretrained(args.save_dir)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    ).save_pretrained(args.save_dir)
    print(f"done: {args.save_dir}, in-batch accuracy {accuracy:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
