"""What only a CUDA device can show."""

import json

import pytest
import torch
from conftest import TINY_MODEL, make_records, train_flags

from dataset.collate import VLMCollator
from dataset.lm_dataset import VLMDataset
from model.inference import placeholder_config
from model.model_vlm import MiniMindVLM
from model.vlm_processor import VLMProcessor, load_tokenizer
from trainer import train_pretrain_vlm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("use_moe", [False, True])
def test_training_forward_never_waits_for_the_device(use_moe, assets, tmp_path):
    tokenizer = load_tokenizer(assets / "tokenizer")
    fields = TINY_MODEL | {"use_moe": use_moe}
    model = MiniMindVLM(placeholder_config(fields, tokenizer, assets / "tower"), assets / "tower")
    processor = VLMProcessor(tokenizer, model.image_processor, config=model.config)
    dataset = VLMDataset(*make_records(tmp_path, multi=True), processor)
    batch = VLMCollator(pad_token_id=0)([dataset[i] for i in range(8)]).pin_memory()
    model.cuda().train()
    inputs = batch.inputs_on(torch.device("cuda"))
    for mode in ("default", "error"):  # the first pass loads kernels, which may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                output = model(**inputs)
            (output.loss + output.aux_loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("use_moe", [0, 1])
def test_training_on_the_gpu_learns_and_resumes(dtype, use_moe, assets, tmp_path):
    data = make_records(tmp_path / "data", multi=True)
    flags = {"device": "cuda", "dtype": dtype, "use_moe": use_moe, "learning_rate": 0.003}
    assert train_pretrain_vlm.main(train_flags(assets, tmp_path, *data, epochs=3, **flags)) == 0
    metrics = next((tmp_path / "out").glob("*_metrics.jsonl")).read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in metrics]
    assert losses[-1] < losses[0] - 1
    argv = train_flags(assets, tmp_path, *data, epochs=4, from_resume=1, **flags)
    assert train_pretrain_vlm.main(argv) == 0
