"""If this fails, vLLM says otherwise than the weight that was exported for it.

VLLM_PYTHON names the Python of an environment with vLLM: it needs other versions than this project.
"""

import json
import os
import subprocess

import pytest
import torch
from support import ask_vllm
from support.exporting import Kit, export, make_kit
from support.third_generation import make_assets3
from support.tiny_vlm import picture

from model.generation.engine import ask

QUESTION, NUM_TOP, TOLERANCE = "What is in the picture?", 20, 1e-3
PYTHON = os.environ.get("VLLM_PYTHON")
DEMO = Kit(None, ["--weight", "sft_vlm_demo"])
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


@pytest.mark.full
@pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM")
def test_llava(tmp_path):
    """vLLM knows no linear activation between the two layers of a LLaVA projector."""
    export(DEMO, "llava", tmp_path / "out", "--projector_gelu", "1")
    check_first_tokens(DEMO, tmp_path)


@pytest.mark.full
@pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM")
def test_internvl(tmp_path):
    make_assets3(tmp_path / "assets")
    kit = make_kit(tmp_path / "kit", tmp_path / "assets", generation=3, **HEADS)
    export(kit, "internvl", tmp_path / "out")
    check_first_tokens(kit, tmp_path)


@torch.inference_mode()
def check_first_tokens(kit, folder):
    """They are as likely as ours, without a picture and with each of two."""
    loaded = kit.load()
    side = loaded.processor.pixel_values([picture(6)]).shape[-1]
    images = [None, *(picture(factor).resize((side, side)) for factor in (6, 9))]
    places = []
    for number, image in enumerate(images[1:]):
        places.append(folder / f"{number}.png")
        image.save(places[-1])
    command = [PYTHON, ask_vllm.__file__, str(folder / "out"), QUESTION, str(NUM_TOP)]
    done = subprocess.run([*command, *map(str, places)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    worst = 0.0
    firsts = []
    for image, theirs in zip(images, said["found"], strict=True):
        shown = [image] if image else []
        question = f"<image>\n{QUESTION}" if image else QUESTION
        batch = loaded.processor.prompt_batch([(ask(question, num_images=len(shown)), shown)])
        ours = loaded.model(**batch).logits[0, -1].log_softmax(-1)
        assert len(theirs) >= NUM_TOP
        worst = max(worst, *(abs(float(ours[int(t)]) - value) for t, value in theirs.items()))
        firsts.append(tuple(theirs.values()))
    print(f"vLLM {said['version']}: log-probabilities within {worst:.1e} of ours")
    assert worst < TOLERANCE
    assert len(set(firsts)) == len(images), "each picture tells something else"
