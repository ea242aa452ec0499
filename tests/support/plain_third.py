"""Offers generation 3 written again as plainly as it can be, to compare the project's code with: a
model of functions over a dict of tensors, and a training loop without accumulation, ranks, masks or
kernels. It takes nothing from `model/`, `dataset/` or `trainer/`.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

IMAGE_ID, NUM_HEADS, NUM_IMAGE_TOKENS = 12, 8, 16
BALANCE = 5e-4


def norm(x, weight):
    return x / (x * x).mean(-1, keepdim=True).add(1e-6).sqrt() * weight


def rotate(x, angles):
    """(H, T, K): the first half of a head's width against the second."""
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def attention(w, name, x):
    num_tokens, head_dim = len(x), w[f"{name}q_norm.weight"].numel()

    def heads(letter):
        return (
            (x @ w[f"{name}{letter}_proj.weight"].T).view(num_tokens, -1, head_dim).transpose(0, 1)
        )

    speed = 1e6 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(num_tokens)[:, None] * speed
    query = rotate(norm(heads("q"), w[f"{name}q_norm.weight"]), angles)
    key = rotate(norm(heads("k"), w[f"{name}k_norm.weight"]), angles)
    value = heads("v")
    group = NUM_HEADS // len(key)
    mixed = []
    for head in range(NUM_HEADS):
        scores = query[head] @ key[head // group].T / math.sqrt(head_dim)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        mixed.append(scores.softmax(-1) @ value[head // group])
    return torch.cat(mixed, -1) @ w[f"{name}o_proj.weight"].T


def mlp(w, name, x):
    gate, up, down = (w[f"{name}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts(w, name, x):
    """Top 1 of the experts; also which ones, and all probabilities."""
    probs = (x @ w[f"{name}gate.weight"].T).softmax(-1)
    best = probs.argmax(-1)
    share = probs.gather(1, best[:, None])
    share = share / (share + 1e-20)
    rows = [mlp(w, f"{name}experts.{e}.", x[i : i + 1]) for i, e in enumerate(best.tolist())]
    return torch.cat(rows) * share, best, probs


def project(w, patches):
    normed = F.layer_norm(patches, patches.shape[-1:], w["vision_proj.mlp.0.weight"],
                          w["vision_proj.mlp.0.bias"])  # fmt: skip
    inner = F.gelu(normed @ w["vision_proj.mlp.1.weight"].T + w["vision_proj.mlp.1.bias"])
    return inner @ w["vision_proj.mlp.3.weight"].T + w["vision_proj.mlp.3.bias"]


def logits_of(w, ids, patches, num_layers):
    """One sequence: (T, V), and of each layer with experts (which, probabilities)."""
    x, routed = w["model.embed_tokens.weight"][ids], []
    if patches is not None:
        image = project(w, patches).flatten(0, 1)
        x = x.index_put((torch.tensor(ids).eq(IMAGE_ID).nonzero()[:, 0],), image)
    for i in range(num_layers):
        name = f"model.layers.{i}."
        x = x + attention(w, f"{name}self_attn.", norm(x, w[f"{name}input_layernorm.weight"]))
        inner = norm(x, w[f"{name}post_attention_layernorm.weight"])
        if f"{name}mlp.gate.weight" in w:
            mixed, best, probs = experts(w, f"{name}mlp.", inner)
            routed.append((best, probs))
        else:
            mixed = mlp(w, f"{name}mlp.", inner)
        x = x + mixed
    return norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T, routed


def read_samples(data: Path, images: Path, assets: Path) -> list[dict]:
    """Ids, which of them are supervised, and the patches of each record."""
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizer")
    tower = SiglipVisionModel.from_pretrained(assets / "tower").eval()
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    samples = []
    for line in data.read_text().splitlines():
        record = json.loads(line)
        ids, targets = [], []
        for message in record["conversations"]:
            text = message["content"].replace("<image>", "<|image_pad|>" * NUM_IMAGE_TOKENS)
            is_answer = message["role"] == "assistant"
            head = tokenizer.encode(f"<|im_start|>{message['role']}\n")
            thinking = "<think>\n\n</think>\n\n" if is_answer else ""
            body = tokenizer.encode(f"{thinking}{text}<|im_end|>\n")
            ids += head + body
            targets += [False] * len(head) + [is_answer] * len(body)
        patches = None
        if record.get("image"):
            pictures = [Image.open(images / name) for name in record["image"].split(", ")]
            with torch.no_grad():
                pixels = processor(pictures, return_tensors="pt")["pixel_values"]
                patches = tower(pixels).last_hidden_state
        samples.append({"ids": ids, "targets": targets, "patches": patches})
    return samples


def trained_names(w, freeze_llm: int, num_layers: int) -> list[str]:
    starts = {
        0: "",
        1: ("vision_proj.", "model.layers.0.", f"model.layers.{num_layers - 1}."),
        2: "vision_proj.",
    }
    return [name for name in w if name.startswith(starts[freeze_llm])]


def train(
    w, steps: list[list[dict]], *, lr: float, freeze_llm: int, num_layers: int
) -> list[float]:
    """AdamW over batches of samples; changes `w`, returns each step's loss per supervised token."""
    w.pop("lm_head.weight", None)  # tied
    names = trained_names(w, freeze_llm, num_layers)
    for name in names:
        w[name].requires_grad_(True)
    optimizer = torch.optim.AdamW([w[n] for n in names], lr=lr, weight_decay=0.01)
    losses = []
    for number, batch in enumerate(steps, 1):
        rate = lr * (0.1 + 0.45 * (1 + math.cos(math.pi * number / len(steps))))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        total, count, routed = 0.0, 0, []
        for sample in batch:
            logits, own = logits_of(w, sample["ids"], sample["patches"], num_layers)
            wanted = torch.tensor(sample["targets"][1:])
            targets = torch.tensor(sample["ids"][1:])[wanted]
            total = total + F.cross_entropy(logits[:-1][wanted], targets, reduction="sum")
            count += int(wanted.sum())
            routed.append(own)
        loss = total / count
        losses.append(loss.item())
        for layer in zip(*routed, strict=True):
            best = torch.cat([b for b, _ in layer])
            probs = torch.cat([p for _, p in layer])
            share = F.one_hot(best, probs.shape[1]).float().mean(0)
            loss = loss + BALANCE * probs.shape[1] * (share * probs.mean(0)).sum()
        loss.backward()
        for name in names:  # an expert that no token went to still decays and keeps its momentum
            if w[name].grad is None:
                w[name].grad = torch.zeros_like(w[name])
        torch.nn.utils.clip_grad_norm_([w[n] for n in names], 1.0)
        optimizer.step()
    return losses
