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
