"""If this fails, `--quantize int8` answers otherwise than the model by more than its rounding, or
is taken where nothing can come of it.
"""

import copy
import warnings

import pytest
import torch
from support.scripts import ROOT
from support.tiny_vlm import GREEDY, conversations, make_loaded

import eval_vlm
import web_demo
from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling
from model.machine.int8 import Int8Linear
from model.quantizing import quantize_int8
from model.vision.pictures import open_image

LEAST_AGREEMENT = 0.95  # of the finished model's tokens
QUESTIONS = (
    "描述一下这个图像的内容。",
    "What is in the picture? Tell me in detail.",
    "左上角是什么？",
)


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The difference's share of the whole."""
    return float((found - wanted).norm() / wanted.norm())


def test_layer_is_the_layer_within_its_rounding():
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 40, bias=False)
    layer = Int8Linear(plain.weight)
    with torch.inference_mode():
        rows = torch.randn(3, 7, 96)
        assert far(layer(rows), plain(rows)) < 0.02
        one = rows[:1, :1]
        assert far(layer(one), plain(one)) < 0.02
        assert not layer(torch.zeros(2, 96)).any()


def test_a_large_row_takes_no_precision_from_a_small_one():
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 40, bias=False)
    layer, rows = Int8Linear(plain.weight), torch.randn(2, 96)
    with torch.inference_mode():
        assert far(layer(torch.stack([rows[0] * 1e4, rows[1]]))[1], plain(rows[1])) < 0.02


@pytest.mark.parametrize("fields", [{}, {"use_moe": True}, {"generation": 3, "use_moe": True}])
def test_model_is_the_model_within_its_rounding(assets, fields):
    loaded = make_loaded(assets, **fields, hidden_size=64, initializer_range=0.1)
    batch = loaded.processor.prompt_batch(conversations()[1:2])
    small = copy.deepcopy(loaded.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_int8(small)
    with torch.inference_mode():
        assert far(small(**batch).logits, loaded.model(**batch).logits) < 0.3
    loaded.model = small
    engine = VLMEngine(loaded)
    together = engine.generate(conversations(), GREEDY)
    assert all(answer.num_new_tokens for answer in together)
    assert engine.look(*conversations()[1], "What?")[0].isfinite().all()


@pytest.mark.slow
@torch.inference_mode()
def test_finished_model_says_the_same():
    weight = ROOT / "out" / "sft_vlm_demo_128.pth"
    if not weight.is_file():
        pytest.skip(f"{weight} is not there")
    flags = ["--weight", str(weight), "--device", "cpu"]
    plain, small = (
        VLMEngine.from_args(eval_vlm.parse_args([*flags, *more]))
        for more in ([], ["--quantize", "int8"])
    )
    pictures = sorted((ROOT / "dataset" / "eval_images").glob("*.png"))
    sampling = Sampling(max_new_tokens=32, temperature=0)
    num_equal = num_tokens = 0
    for question in (
        "描述一下这个图像的内容。",
        "What is in the picture? Tell me in detail.",
        "左上角是什么？",
    ):
        asked = [(ask(question, num_images=1), [open_image(path)]) for path in pictures]
        for answer, sample in zip(plain.generate(asked, sampling), asked, strict=True):
            ids = plain.processor.tokenizer.encode(answer.text, add_special_tokens=False)
            batch = plain.processor.prompt_batch([sample])
            start = batch["input_ids"].shape[1]
            text = torch.cat([batch["input_ids"], torch.tensor([ids])], 1)
            inputs = {"pixel_values": batch["pixel_values"]}
            said = [
                e.model(text, **inputs).logits[0, start - 1 :].argmax(-1) for e in (plain, small)
            ]
            num_tokens += len(said[0])
            num_equal += int((said[0] == said[1]).sum())
    print(f"tokens compared: {num_tokens}, the same: {num_equal}")
    assert num_tokens > 50 and num_equal >= LEAST_AGREEMENT * num_tokens


@pytest.mark.parametrize("command", [eval_vlm, web_demo], ids=["eval", "serve"])
def test_other_number_formats_are_refused(command, capfd):
    assert command.main(["--device", "cpu", "--dtype", "bfloat16", "--quantize", "int8"]) == 1
    err = capfd.readouterr().err
    assert "--quantize int8 computes with float32" in err and err.rstrip().count("\n") <= 1
    assert command.main(["--device", "cpu", "--quantize", "int8", "--compile", "1"]) == 1
    assert "--compile and --quantize do not go together" in capfd.readouterr().err
