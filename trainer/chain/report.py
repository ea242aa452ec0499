"""Owns the report of the chain: the table of scores, and a picture of loss curves and answers."""

import argparse
import json
from pathlib import Path
from typing import Any

from dataset.synthetic.text import CHANCE
from trainer.chain.settings import VLM, Chain
from trainer.tracking.curves import draw_curve, read_metrics

NUM_EXAMPLES = 8  # pictures in the report
CONTROLS = ("right", "shuffled", "blind")  # the record's image, another record's, none


def print_table(scores: dict[str, Any]) -> None:
    """Accuracy per question type beside chance."""
    print(
        f"\n{'held-out question':20}{'answers':>8}{'right image':>13}{'shuffled':>10}"
        f"{'no image':>10}{'chance':>8}"
    )
    for name, cell in sorted(scores["right"].items(), key=lambda item: item[0] == "all"):
        right, shuffled, blind = (scores[c][name]["right"] / cell["total"] for c in CONTROLS)
        chance = f"{CHANCE[name]:.1%}" if name in CHANCE else ""
        print(
            f"{name:20}{cell['total']:>8}{right:>13.1%}{shuffled:>10.1%}{blind:>10.1%}{chance:>8}"
        )
    print(f"grounding gap: {scores['grounding_gap']:.3f} nats per supervised token")


def write_report(chain: Chain) -> None:
    """Loss curves of both stages, and held-out pictures with the model's answers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from model.vision.pictures import open_image

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
    """A few held-out pictures, each with a question, the model's answer and the right one."""
    from model.generation.engine import VLMEngine
    from model.generation.sampling import Sampling
    from model.options import add_model_arguments

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    weight = ["--weight", str(chain.out / f"{VLM}.pth")]
    args = parser.parse_args([*weight, "--vision_model_path", str(chain.tower)])
    engine = VLMEngine.from_args(args)
    examples = []
    with (chain.data / "heldout.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    english = [r for r in records if r["conversations"][0]["content"].isascii()]
    for record in english[:NUM_EXAMPLES]:
        image = chain.data / "heldout_images" / record["image"]
        question, right = (m["content"] for m in record["conversations"][:2])
        messages = [{"role": "user", "content": question}]
        answer = engine.generate([(messages, [image])], Sampling(16, 0))[0].text
        answer = answer.encode(
            "ascii", "replace"
        ).decode()  # an untrained model may answer in any script
        title = f"{question.removeprefix('<image>').strip()}\n{answer} (right: {right})"
        examples.append((image, title))
    return examples
