"""If this fails, an exported folder does not compute what our model does, or does not come back."""

import json

import pytest
import torch
from support.exporting import (
    NUM_IMAGES,
    export,
    make_kits,
    our_batch,
    our_logits,
    run_foreign,
)
from transformers import AutoModelForImageTextToText, AutoProcessor

from model.export.__main__ import main, parse_args
from model.weights.build_model import load_model

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4  # of logits, float32
NUM_ANSWERED = 8  # tokens of a greedy answer
# Format, kit -> the class that loads it.
SEEING = {
    ("llava", "2"): "LlavaForConditionalGeneration",
    ("llava", "2_moe"): "LlavaForConditionalGeneration",
    ("internvl", "3"): "InternVLForConditionalGeneration",
    ("internvl", "3_moe"): "InternVLForConditionalGeneration",
    ("transformers", "2"): "MiniMindVForConditionalGeneration",
    ("transformers", "3_moe"): "MiniMindVForConditionalGeneration",
}
TEXT = {
    ("llama", "2"): "LlamaForCausalLM",
    ("llama", "2_moe"): "Qwen2MoeForCausalLM",
    ("qwen3", "3"): "Qwen3ForCausalLM",
    ("qwen3", "3_moe"): "Qwen3MoeForCausalLM",
}
CASES = pytest.mark.parametrize("case", SEEING | TEXT, ids="-".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def kits(folder, assets):
    return make_kits(folder, assets)


@pytest.fixture(scope="module")
def outs(folder, kits):
    """The folder of each case, and of a projector around a GELU."""
    found = {case: folder / "-".join(case) for case in SEEING | TEXT}
    for (to, kit), out in found.items():
        export(kits[kit], to, out)
    found["gelu"] = folder / "gelu"
    export(kits["2"], "llava", found["gelu"], "--projector_gelu", "1")
    return found


@pytest.fixture(scope="module")
def results(folder, outs):
    """What one foreign process makes of all of them."""
    auto = {case: "AutoModelForCausalLM" for case in TEXT}
    jobs = {
        out: {"auto": auto.get(case, "AutoModelForImageTextToText")}
        | ({"tower": "SiglipVisionConfig"} if case[0] == "internvl" else {})
        | {"remote": case[0] == "transformers", "max_new_tokens": NUM_ANSWERED}
        for case, out in outs.items()
    }
    found = run_foreign(folder, jobs)
    return {case: found[out] for case, out in outs.items()}


def difference(result, loaded, folder, index) -> float:
    """The largest of the logits of a sample; the ids are checked to be ours."""
    ids, image_mask, logits = our_logits(loaded, folder, index)
    found = result[f"{index}.input_ids"]
    assert torch.equal(found[~image_mask], ids[~image_mask])
    assert len(found[image_mask].unique()) == (1 if image_mask.any() else 0)
    return (result[f"{index}.logits"][:, : logits.shape[1]] - logits).abs().max().item()


def our_answer(loaded, folder, index) -> list[int]:
    """Ids of the greedy answer to a sample."""
    batch = our_batch(loaded, folder, index)
    ids = loaded.model.generate(**batch, max_new_tokens=NUM_ANSWERED, do_sample=False)[0]
    return ids[batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("case", SEEING, ids="-".join)
def test_exported_model_sees_what_ours_sees(case, results, kits, folder):
    result, loaded = results[case], kits[case[1]].load()
    assert result["class"] == SEEING[case]
    for index in range(len(NUM_IMAGES)):
        assert difference(result, loaded, folder, index) < TOLERANCE
        assert result["answers"][index] == our_answer(loaded, folder, index)
    with_one, other = our_logits(loaded, folder, 1)[2], result["1.logits"].roll(1, 0)
    assert (with_one - other[:, : with_one.shape[1]]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("case", TEXT, ids="-".join)
def test_stock_language_model_says_what_ours_says(case, results, kits, folder):
    result = results[case]
    assert result["class"] == TEXT[case]
    assert difference(result, kits[case[1]].load(), folder, 0) < TOLERANCE


def test_folder_of_our_classes_is_read_with_the_tower_in_it(outs, kits, folder):
    flags = ["--load_from", str(outs["transformers", "2"]), "--to", "pth", "--out", "none"]
    loaded = load_model(parse_args(flags))
    for ours, theirs in zip(
        our_logits(kits["2"].load(), folder, 2), our_logits(loaded, folder, 2), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_internvl_without_its_tower_is_refused_not_random(outs):
    with pytest.raises(KeyError, match="vision_config=SiglipVisionConfig"):
        AutoModelForImageTextToText.from_pretrained(outs["internvl", "3"])


@pytest.mark.parametrize("case", [("llava", "2"), ("internvl", "3")], ids="-".join)
def test_processor_counts_the_tokens_of_a_picture_as_vllm_asks_it_to(case, outs, kits):
    processor = AutoProcessor.from_pretrained(outs[case])
    counted = processor._get_num_multimodal_tokens(image_sizes=[[50, 70]])
    assert counted["num_image_tokens"] == [kits[case[1]].load().model.config.num_image_tokens]


def test_a_gelu_in_the_projector_changes_little(results, outs, kits, folder):
    config = json.loads((outs["gelu"] / "config.json").read_text())
    assert config["projector_hidden_act"] == "gelu"
    assert difference(results["gelu"], kits["2"].load(), folder, 1) < 10 * TOLERANCE


@CASES
def test_way_back_has_equal_bits(case, outs, kits, tmp_path):
    weight = kits[case[1]].weight
    back = tmp_path / weight.name
    assert main(["--load_from", str(outs[case]), "--to", "pth", "--out", str(back)]) == 0
    before, after = (torch.load(path, weights_only=True) for path in (weight, back))
    kept = [k for k in before if case in SEEING or not k.startswith("vision_proj.")]
    assert list(after) == kept
    for name in kept:
        assert after[name].dtype == torch.float16 and torch.equal(after[name], before[name]), name
    described = [json.loads(path.with_suffix(".json").read_text()) for path in (weight, back)]
    for field in ("tokenizer_sha256", "weight_id") if case in SEEING else ("tokenizer_sha256",):
        assert described[0][field] == described[1][field]


@pytest.mark.parametrize("case", TEXT, ids="-".join)
def test_language_model_of_another_program_becomes_a_weight(case, outs, kits, tmp_path):
    """As MiniMind publishes them: no description of ours, bfloat16, a head of its own name."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(outs[case] / name)
    back = tmp_path / "llm_32.pth"
    assert main(["--load_from", str(folder), "--to", "pth", "--out", str(back)]) == 0
    before, after = (torch.load(path, weights_only=True) for path in (kits[case[1]].weight, back))
    assert all(torch.equal(after[name], before[name]) for name in after)
    config = json.loads(back.with_suffix(".json").read_text())["config"]
    ours = json.loads(kits[case[1]].weight.with_suffix(".json").read_text())["config"]
    assert config == {name: value for name, value in ours.items() if name in config}
