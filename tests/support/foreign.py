"""Runs exported folders by stock classes, in a process that cannot import this repository.

    python -I tests/support/foreign.py JOBS.json

A job is {"folder", "auto", "tower", "remote", "samples", "out", "max_new_tokens"}; a sample has
`messages` for the chat template and `images`, paths. Into `out` go each sample's ids, logits and,
where `max_new_tokens` is not 0, the ids of its greedy answer.

OTHER_TRANSFORMERS names a folder with another release than that of the environment:
`pip install --no-deps --target FOLDER transformers==5.23.0`.
"""

import importlib.util
import json
import os
import sys

if folder := os.environ.get("OTHER_TRANSFORMERS"):
    sys.path.insert(0, folder)

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file


def main() -> None:
    for name in ("model", "dataset", "trainer"):
        assert importlib.util.find_spec(name) is None, f"{name} can be imported here"
    assert not folder or transformers.__file__.startswith(folder), transformers.__file__
    torch.set_num_threads(1)
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        run(job)


def run(job: dict) -> None:
    options = {"trust_remote_code": True} if job.get("remote") else {}
    auto, parts = getattr(transformers, job["auto"]), {}
    if job.get("tower"):
        parts["vision_config"] = getattr(transformers, job["tower"]).from_pretrained(job["folder"])
    model, report = auto.from_pretrained(
        job["folder"], output_loading_info=True, **parts, **options
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    model.eval()
    reader = "AutoTokenizer" if job["auto"] == "AutoModelForCausalLM" else "AutoProcessor"
    processor = getattr(transformers, reader).from_pretrained(job["folder"], **options)
    tensors, answers = {}, []
    for i, sample in enumerate(job["samples"]):
        inputs = encode(processor, sample)
        with torch.no_grad():
            tensors[f"{i}.logits"] = model(**inputs).logits[0].contiguous()
            tensors[f"{i}.input_ids"] = inputs["input_ids"][0].contiguous()
            if job["max_new_tokens"]:
                options = {"max_new_tokens": job["max_new_tokens"], "do_sample": False}
                ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
                answers.append(ids.tolist())
                if sample["images"] and not job.get("tower"):  # which a pipeline cannot be told
                    expected = processor.decode(ids, skip_special_tokens=True)
                    assert piped(model, processor, sample, job["max_new_tokens"]) == expected
    save_file(tensors, job["out"] + ".safetensors")
    with open(job["out"] + ".json", "w", encoding="utf-8") as file:
        json.dump({"class": type(model).__name__, "answers": answers}, file, ensure_ascii=False)


def piped(model, processor, sample: dict, max_new_tokens: int) -> str:
    """The answer of the library's pipeline."""
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    (answer,) = pipe(
        text=prompt_of(processor, sample),
        images=[Image.open(path).convert("RGB") for path in sample["images"]],
        generate_kwargs={"max_new_tokens": max_new_tokens, "do_sample": False},
        return_full_text=False,
    )
    return answer["generated_text"]


def prompt_of(processor, sample: dict) -> str:
    return processor.apply_chat_template(
        sample["messages"], tokenize=False, add_generation_prompt=True
    )


def encode(processor, sample: dict) -> dict:
    images = [Image.open(path).convert("RGB") for path in sample["images"]]
    given = {"images": images} if images else {}
    inputs = processor(text=prompt_of(processor, sample), return_tensors="pt", **given)
    return {
        name: inputs[name]
        for name in ("input_ids", "attention_mask", "pixel_values")
        if name in inputs
    }


if __name__ == "__main__":
    main()
