"""Owns what a model card says about running an export, by format.

`NAME` stands for the repository or folder.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """library: the hub's name of what loads it. text: Markdown."""

    library: str
    text: str


SEEING = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessorIMPORTS

processor = AutoProcessor.from_pretrained("NAME"REMOTE)
model = AutoModelForImageTextToText.from_pretrained("NAME"MORE)
parts = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": parts}], add_generation_prompt=True
)
inputs = processor(text=prompt, images=[Image.open("picture.png")], return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```"""
TEXT = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("NAME")
model = AutoModelForCausalLM.from_pretrained("NAME")
messages = [{"role": "user", "content": "What is a circle?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```"""
GGUF = """\
Text alone, no pictures. With Ollama, in a copy of this repository:

```bash
ollama create minimind -f Modelfile
ollama run minimind "What is a circle?"
```

With llama.cpp: `llama-cli -m model.gguf --jinja -p "What is a circle?"`."""
BACK = """\
In MiniMind-V itself, from a copy of this repository (`FOLDER`):

```bash
python -m model.export --load_from FOLDER --to pth --out out/WEIGHT
```"""
ONNX = """\
In a copy of this repository, with `pip install onnxruntime transformers pillow`:

```python
import json

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

see, embed, decode = (
    InferenceSession(f"{name}.onnx") for name in ("vision_encoder", "embed_tokens", "decoder")
)
tokenizer, processor = AutoTokenizer.from_pretrained("."), AutoImageProcessor.from_pretrained(".")
config = json.load(open("minimind.json"))["config"]
image = Image.open("picture.png").convert("RGB")
pixels = processor(images=[image], return_tensors="np")["pixel_values"]
(features,) = see.run(None, {"pixel_values": pixels})

placeholder = config["image_special_token"] * (features.shape[1] // len(config["image_ids"]))
messages = [{"role": "user", "content": f"{placeholder}\\nWhat is in the picture?"}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
ids = np.array([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
(states,) = embed.run(None, {"input_ids": ids})
states[np.isin(ids, config["image_ids"])] = features.reshape(-1, features.shape[-1])

mask, answer = np.ones_like(ids), []
past = {
    one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
    for one in decode.get_inputs()[2:]
}
while len(answer) < 64 and answer[-1:] != [tokenizer.eos_token_id]:
    inputs = {"inputs_embeds": states, "attention_mask": mask}
    logits, *present = decode.run(None, inputs | past)
    answer.append(int(logits[0, -1].argmax()))
    past = dict(zip(past, present))
    mask = np.append(mask, [[1]], axis=1)
    (states,) = embed.run(None, {"input_ids": np.array([answer[-1:]])})
print(tokenizer.decode(answer, skip_special_tokens=True))
```"""
TOWER_IMPORT, TOWER = (
    ", SiglipVisionConfig",
    ', vision_config=SiglipVisionConfig.from_pretrained("NAME")',
)


def _seeing(*, imports: str = "", more: str = "", remote: str = "") -> str:
    code = SEEING.replace("IMPORTS", imports).replace("MORE", more or remote)
    return code.replace("REMOTE", remote)


RUNTIMES = {
    "llava": Runtime("transformers", _seeing()),
    "internvl": Runtime("transformers", _seeing(imports=TOWER_IMPORT, more=TOWER)),
    "transformers": Runtime("transformers", _seeing(remote=", trust_remote_code=True")),
    "llama": Runtime("transformers", TEXT),
    "qwen3": Runtime("transformers", TEXT),
    "gguf": Runtime("gguf", GGUF),
    "onnx": Runtime("onnx", ONNX),
}


def how_to_run(format_name: str, name: str, *, weight: str) -> str:
    """Markdown of each way to run an export.

    Args:
        name: the repository, or the folder where it is in none.
        weight: the file's name that the way back gives it.
    """
    text = RUNTIMES[format_name].text
    if RUNTIMES[format_name].library == "transformers":
        text = f"{text}\n\n{BACK.replace('WEIGHT', weight)}"
    return text.replace("NAME", name)
