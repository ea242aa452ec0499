"""Run by the Python of vLLM's own environment: prints the likeliest first tokens of answers.

    python ask_vllm.py FOLDER QUESTION NUM_TOP [PICTURE ...]

The first prompt has no picture; each picture makes one more. Prints a JSON list of
{token: log-probability}, and the version of vLLM. An InternVL folder runs on the
library's own class, which is told of the tower.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main(folder: str, question: str, num_top: str, *pictures: str) -> None:
    import vllm
    from PIL import Image
    from transformers import AutoConfig, AutoTokenizer, SiglipVisionConfig

    def with_tower(config):
        config.vision_config = SiglipVisionConfig.from_pretrained(folder)
        return config

    is_internvl = AutoConfig.from_pretrained(folder).model_type == "internvl"
    others = {"model_impl": "transformers", "hf_overrides": with_tower} if is_internvl else {}

    llm = vllm.LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
        max_logprobs=int(num_top),
        limit_mm_per_prompt={"image": 1},
        **others,
    )
    wish = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=int(num_top))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for picture in (None, *pictures):
        parts = [{"type": "text", "text": question}]
        prompt = {}
        if picture is not None:
            parts.insert(0, {"type": "image"})
            prompt["multi_modal_data"] = {"image": Image.open(picture).convert("RGB")}
        messages = [{"role": "user", "content": parts}]
        prompt["prompt"] = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        (answer,) = llm.generate([prompt], wish)
        (tops,) = answer.outputs[0].logprobs
        found.append({token: top.logprob for token, top in tops.items()})
    print(json.dumps({"version": vllm.__version__, "found": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
