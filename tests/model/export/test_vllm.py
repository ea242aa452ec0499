"""If this fails, vLLM says otherwise than the weight that was exported for it.

VLLM_PYTHON names the Python of an environment with vLLM: it needs other versions than this project.
"""

import json
import os
import subprocess

import pytest
import torch
from support import ask_vllm
from support.exporting import Kit, export
from support.tiny_vlm import picture

from model.generation.engine import ask

QUESTION, NUM_TOP, TOLERANCE = "What is in the picture?", 20, 1e-3
PYTHON = os.environ.get("VLLM_PYTHON")
DEMO = Kit(None, ["--weight", "sft_vlm_demo"])


@pytest.mark.full
@pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM")
@torch.inference_mode()
def test_first_tokens_are_as_likely(tmp_path):
    """vLLM knows no linear activation between the two layers of a LLaVA projector."""
    export(DEMO, "llava", tmp_path / "out", "--projector_gelu", "1")
    loaded = DEMO.load()
    side = loaded.processor.pixel_values([picture(6)]).shape[-1]
    images = [None, *(picture(factor).resize((side, side)) for factor in (6, 9))]
    places = []
    for number, image in enumerate(images[1:]):
        places.append(tmp_path / f"{number}.png")
        image.save(places[-1])
    command = [PYTHON, ask_vllm.__file__, str(tmp_path / "out"), QUESTION, str(NUM_TOP)]
    done = subprocess.run([*command, *map(str, places)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    worst = 0.0
    for image, theirs in zip(images, said["found"], strict=True):
        shown = [image] if image else []
        question = f"<image>\n{QUESTION}" if image else QUESTION
        batch = loaded.processor.prompt_batch([(ask(question, num_images=len(shown)), shown)])
        ours = loaded.model(**batch).logits[0, -1].log_softmax(-1)
        assert len(theirs) >= NUM_TOP
        worst = max(worst, *(abs(float(ours[int(t)]) - value) for t, value in theirs.items()))
    print(f"vLLM {said['version']}: log-probabilities within {worst:.1e} of ours")
    assert worst < TOLERANCE
