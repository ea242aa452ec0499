"""The tiny vision tower: a CLIP trained contrastively on pictures and captions of the sample world.

    python trainer/train_clip_tiny.py --steps 4000

The loss is a sum of two contrastive losses: of whole pictures with their captions, as in CLIP, and
of single patches with the words for what they show, since the language model reads patches. One
part of the pictures teaches colours; in the other, which teaches shapes, no colour has a name. So
the tower cannot learn which shape comes in which colour, and recognises held-out pairs too.
The result is an ordinary CLIP folder, of which the language model reads only the vision half.
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
from torch.utils.data import DataLoader
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerBase,
)

from dataset.synthetic.clip_data import (
    NUM_ROWS,
    UNNAMED,
    WORDS,
    Scenes,
    collate,
    draw,
    encode_words,
    name_patches,
)
from dataset.synthetic.scenes import sample_scene
from model.machine.device import (
    check_dtype,
    choose_device,
    memory_guard,
    prepare_device,
    training_dtype,
)
from model.machine.paths import ROOT
from model.options import OnceParser
from model.vlm_processor import load_tokenizer
from trainer.loop.engine import autocast
from trainer.loop.optimizers import make_optimizer
from trainer.loop.randomness import setup_seed
from trainer.loop.schedule import get_lr
from trainer.run.preflight import check_writable

PATCH_SIDE = 16
IMAGE_SIDE = NUM_ROWS * PATCH_SIDE
PROCESSOR = CLIPImageProcessorPil()  # CLIP's own mean and deviation
HEAD_DIM = 64  # as in CLIP; fewer, wider heads are also much faster on a CPU
MAX_WAVELENGTH = 100.0  # of the sines that initialise the positions, in patches
WORD_WEIGHT = 5.0  # of the loss of patches and words
NUM_HELDOUT = 512  # scenes with a held-out pair, to measure how often it is recognised

Words = tuple[Tensor, Tensor, list[int]]  # see `encode_words`


def preprocess(pictures: Tensor) -> Tensor:
    """What CLIP's image processor does to square pictures: (B, 3, 224, 224) float32."""
    # On 8-bit values, first along rows, as Pillow does it; GPUs scale floating-point numbers only.
    pixels = pictures if pictures.is_cpu else pictures.float()
    for size in ((pictures.shape[2], IMAGE_SIDE), (IMAGE_SIDE, IMAGE_SIDE)):
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        pixels = pixels.round().clamp(0, 255)
    mean, std = (
        torch.tensor(values, device=pixels.device).view(1, 3, 1, 1)
        for values in (PROCESSOR.image_mean, PROCESSOR.image_std)
    )
    return pixels.float().mul_(1 / (255 * std)).sub_(mean / std)


def position_waves(num_rows: int, width: int) -> Tensor:
    """Sines and cosines of each patch's column and row: (P, width).

    Source: Beyer et al., "Better plain ViT baselines for ImageNet-1k" (2022), with a shorter
    longest wavelength, since there are few rows.
    """
    frequencies = MAX_WAVELENGTH ** -(torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(num_rows), torch.arange(num_rows), indexing="ij")
    angles = [at.flatten()[:, None] * frequencies for at in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """A CLIP of the flags' sizes with random weights."""
    heads = args.hidden_size // HEAD_DIM
    shared = {"hidden_act": "gelu", "projection_dim": args.projection_dim}
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
        "num_attention_heads": max(1, args.text_hidden_size // HEAD_DIM),
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.pad_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=args.projection_dim)
    )
    model.set_attn_implementation("eager")  # at this width faster than SDPA's backward
    positions = model.vision_model.embeddings.position_embedding.weight
    with torch.no_grad():  # CLIP's own, near zero, take long to become distinct
        positions[1:] = position_waves(NUM_ROWS, args.hidden_size)
    return model


def word_loss(
    model: CLIPModel, states: Tensor, names: Tensor, words: Words
) -> tuple[Tensor, Tensor]:
    """Classify every named patch among the words of each list, by cosine similarity.

    Args:
        states: the tower's last hidden states of the patches (B, P, V).
        names: (B, word lists, P), see `name_patches`. words: see `encode_words`.
    Returns:
        The mean cross entropy over the lists, and for each list the share of patches whose word
        is the likeliest.

    Source: the contrast of regions and texts in Zhong et al., "RegionCLIP" (2022).
    """
    patches = model.visual_projection(model.vision_model.post_layernorm(states))
    patches = F.normalize(patches.float(), dim=-1)
    ids, mask, lengths = words
    texts = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    texts = F.normalize(texts.float(), dim=-1).split(lengths)
    losses, shares = [], []
    for index, text in enumerate(texts):
        targets = names[:, index].flatten()
        logits = (model.logit_scale.exp() * patches @ text.T).flatten(0, 1)
        num_named = (targets != UNNAMED).sum().clamp(min=1)
        total = F.cross_entropy(logits, targets, ignore_index=UNNAMED, reduction="sum")
        losses.append(total / num_named)
        shares.append((logits.argmax(-1) == targets).sum() / num_named)
    return torch.stack(losses).mean(), torch.stack(shares).detach()


def train(
    model: CLIPModel,
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> dict[str, float]:
    """Train the model.

    Returns:
        the last log window's accuracies: of pictures with their captions within the batch, and
        of patches by word list.
    Raises:
        ValueError: a weight is not finite; checked at each line of the log.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision" (2021).
    """
    scenes = Scenes(args.steps * args.batch_size, seed=args.seed, tokenizer=tokenizer)
    loader = DataLoader(
        scenes, batch_size=args.batch_size, collate_fn=collate, num_workers=args.num_workers
    )
    optimizer = make_optimizer(model.named_parameters(), lr=args.learning_rate, kind="muon")
    words = words_on(device, tokenizer)
    started_s, window = time.perf_counter(), []
    for step, batch in enumerate(loader, 1):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        warmup = min(1.0, step / args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = warmup * get_lr(step, args.steps, args.learning_rate)
        loss, accuracies = train_step(model, optimizer, batch, words, dtype=args.dtype)
        window.append(accuracies)
        if step % args.log_interval == 0 or step == args.steps:
            check_finite(model, step)
            means = torch.stack(window).mean(0).tolist()
            figures = dict(zip(("in-batch", *WORDS), means, strict=True))
            elapsed_s, window = time.perf_counter() - started_s, []
            print(
                f"step {step}/{args.steps} loss:{loss.item():.4f} {as_text(figures)} "
                f"images/s:{step * args.batch_size / elapsed_s:.0f}",
                flush=True,
            )
    return figures


def train_step(
    model: CLIPModel,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    words: Words,
    *,
    dtype: str,
) -> tuple[Tensor, Tensor]:
    """One update; returns CLIP's own loss, and the accuracies (1 + word lists,)."""
    with autocast(model.device, dtype):
        output = model(
            pixel_values=preprocess(batch["pictures"]),
            input_ids=batch["ids"],
            attention_mask=batch["mask"],
            return_loss=True,
        )
        states = output.vision_model_output.last_hidden_state[:, 1:]
        loss, shares = word_loss(model, states, batch["names"], words)
    (output.loss + WORD_WEIGHT * loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model.logit_scale.clamp_(max=np.log(100.0))
        guessed = output.logits_per_image.argmax(1)
        hits = (guessed == torch.arange(len(guessed), device=model.device)).float().mean()
        return output.loss, torch.cat((hits[None], shares))


def words_on(device: torch.device, tokenizer: PreTrainedTokenizerBase) -> Words:
    """The words of all lists, on a device."""
    ids, mask, lengths = encode_words(tokenizer)
    return ids.to(device), mask.to(device), lengths


def check_finite(model: CLIPModel, step: int) -> None:
    """Raise ValueError unless all weights are finite in float16, the type they are saved in. A
    loss or gradient that was not finite makes the weights so, and they stay so."""
    for name, weight in model.named_parameters():
        if not weight.detach().half().isfinite().all():
            raise ValueError(
                f"step {step}: {name} is not finite; nothing was written; "
                "try a lower --learning_rate or --dtype float32"
            )


@torch.no_grad()
def heldout_figures(
    model: CLIPModel, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Accuracy of the colours and shapes of patches, on held-out colour-shape pairs."""
    device = model.device
    words = words_on(device, tokenizer)
    rng, shares = Random("held-out pairs"), []
    for _ in range(NUM_HELDOUT // args.batch_size + 1):
        scenes = [
            sample_scene(rng, split="heldout", is_combination=True) for _ in range(args.batch_size)
        ]
        pixels = preprocess(torch.stack([draw(scene) for scene in scenes]).to(device))
        pairs = [replace(scene, items=scene.items[:1], character=None) for scene in scenes]
        names = torch.stack([torch.from_numpy(name_patches(pair)) for pair in pairs]).to(device)
        with autocast(device, args.dtype):
            states = model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
            shares.append(word_loss(model, states, names, words)[1])
    figures = dict(zip(WORDS, torch.stack(shares).mean(0).tolist(), strict=True))
    return {kind: figures[kind] for kind in ("colour", "shape")}


def as_text(figures: dict[str, float]) -> str:
    return " ".join(f"{name}:{share:.1%}" for name, share in figures.items())


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OnceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--save_dir",
        type=Path,
        default=ROOT / "model" / "vision_model" / "clip-tiny-patch16",
        help="CLIP folder to write / 输出目录",
    )
    add("--steps", type=int, default=4000, help="training steps / 训练步数")
    add("--batch_size", type=int, default=32, help="pictures per step / 批大小")
    add("--learning_rate", type=float, default=1.5e-3, help="peak is 1.1 times this / 学习率")
    add("--warmup_steps", type=int, default=100, help="steps of rising rate / 预热步数")
    add("--hidden_size", type=int, default=128, help="width of the tower / 视觉宽度")
    add("--num_hidden_layers", type=int, default=4, help="its layers / 视觉层数")
    add("--text_hidden_size", type=int, default=64, help="width of the text half / 文本宽度")
    add("--projection_dim", type=int, default=96, help="of the shared space / 共享空间维度")
    add("--tokenizer_path", type=Path, help="folder of the tokenizer / 分词器目录")
    add("--device", help="default: the best / 默认自动选择")
    dtype_help = "arithmetic; default: bfloat16, on a CPU without it float32 / 精度"
    add("--dtype", choices=("bfloat16", "float32"), help=dtype_help)
    add("--num_workers", type=int, default=1, help="processes that draw / 绘图进程数")
    add("--log_interval", type=int, default=50, help="steps between lines / 日志间隔")
    add("--seed", type=int, default=42, help="of scenes and weights / 随机种子")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError that names the flag whose value is not allowed."""
    for name in ("hidden_size", "text_hidden_size"):
        size = getattr(args, name)
        if size < HEAD_DIM or size % HEAD_DIM:
            raise ValueError(f"--{name} must be a multiple of {HEAD_DIM}, got {size}")
    lowest = {
        "steps": 1,
        "batch_size": 1,
        "warmup_steps": 1,
        "num_hidden_layers": 1,
        "projection_dim": 1,
        "log_interval": 1,
        "num_workers": 0,
    }
    for name, low in lowest.items():
        if getattr(args, name) < low:
            raise ValueError(f"--{name} must be {low} or more, got {getattr(args, name)}")
    if not 0 < args.learning_rate < np.inf:
        raise ValueError(f"--learning_rate must be above 0, got {args.learning_rate}")
    check_writable(args.save_dir, flag="--save_dir")


def main(argv: list[str] | None = None) -> int:
    """Train and write the folder; returns the exit status."""
    args = parse_args(argv)
    try:
        check_args(args)
        return run(args)
    except KeyboardInterrupt:
        print("stopped before the end; nothing was written / 已中断, 未写入", file=sys.stderr)
        return 130  # 128 plus the signal's number
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@memory_guard("lower --batch_size")
def run(args: argparse.Namespace) -> int:
    """Train the tower, measure it on held-out pairs, write the folder."""
    device = prepare_device(choose_device(args.device))
    args.dtype = args.dtype or training_dtype(device)
    check_dtype(device, args.dtype)
    tokenizer = load_tokenizer(args.tokenizer_path)
    setup_seed(args.seed)
    model = make_model(args, tokenizer).to(device)  # type: ignore[arg-type]  # stub lacks `self`
    size = sum(p.numel() for p in model.vision_model.parameters())
    print(f"tower: {size:,} parameters of {sum(p.numel() for p in model.parameters()):,}")
    figures = train(model, args, tokenizer, device)
    heldout = heldout_figures(model, args, tokenizer)
    model.to("cpu", torch.float16).save_pretrained(args.save_dir)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    ).save_pretrained(args.save_dir)
    print(f"done: {args.save_dir}; {as_text(figures)}; on pairs never shown: {as_text(heldout)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
