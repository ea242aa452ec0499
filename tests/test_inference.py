"""Using a model: loading it by the shared flags, generating, streaming."""

import argparse
import threading

import pytest
import torch
from conftest import TINY_MODEL
from PIL import Image

from model.inference import (
    LoadedModel,
    Sampling,
    add_model_arguments,
    ask,
    generate,
    load_model,
    stream,
)
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vlm_processor import VLMProcessor, load_tokenizer, tokenizer_sha256
from model.weights import describe_model, save_weights

torch.set_num_threads(1)  # at these sizes more threads only wait for each other
NUM_TOKENS, NEW_TOKENS, VOCAB = 16, 24, 400
KINDS = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
GREEDY = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)


def make_loaded(assets, **fields) -> LoadedModel:
    """Weights wide enough (0.3) that pictures and words change the answer."""
    torch.manual_seed(0)
    placeholder = {"image_special_token": "@" * NUM_TOKENS, "image_ids": [34] * NUM_TOKENS}
    own = {"vocab_size": VOCAB, "vision_hidden_size": 24, "initializer_range": 0.3}
    config = VLMConfig(**(TINY_MODEL | own | placeholder | fields))
    model = MiniMindVLM(config, vision_model_path=assets / "tower").eval().requires_grad_(False)
    tokenizer = load_tokenizer(assets / "tokenizer")
    processor = VLMProcessor(tokenizer, model.image_processor, config=config)
    return LoadedModel(model, processor, assets, can_see=True)


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def loaded(request, assets) -> LoadedModel:
    return make_loaded(assets, use_moe=request.param)


def picture(factor: int) -> Image.Image:
    """Rings; their number grows with the factor."""
    rings = Image.radial_gradient("L").resize((40, 36)).convert("RGB")
    return rings.point(lambda value: value * factor % 256)


def conversations() -> list[tuple[list[dict], list]]:
    """Samples with 0, 1 and 2 pictures, of different lengths."""
    few, many = picture(6), picture(9)
    return [
        (ask("What is a circle?", num_images=0), []),
        (ask("<image>\nWhat is in the picture?", num_images=1), [few]),
        (ask("图像里有什么？ <image> or <image>?", num_images=2), [many, few]),
    ]


def greedy_ids(loaded: LoadedModel, samples: list, **kwargs) -> list[list[int]]:
    """New tokens of each sample by `model.generate`."""
    batch = loaded.processor.prompt_batch(samples)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0} | kwargs
    output = loaded.model.generate(**batch, **settings)
    return output[:, batch["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def naive_greedy_ids(loaded: LoadedModel, sample: tuple) -> list[int]:
    """One forward of everything for each token: no cache, no padding, no `generate`."""
    batch = loaded.processor.prompt_batch([sample])
    ids, start = batch["input_ids"], batch["input_ids"].shape[1]
    for _ in range(NEW_TOKENS):
        logits = loaded.model(ids, pixel_values=batch["pixel_values"]).logits[0, -1]
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
        if ids[0, -1] == loaded.processor.tokenizer.eos_token_id:
            break
    return ids[0, start:].tolist()


def without_padding(ids: list[int]) -> list[int]:
    return ids[: ids.index(2) + 1] if 2 in ids else ids


def test_generate_cached_batched_and_uncached_are_the_same(loaded):
    samples = conversations()
    expected = [naive_greedy_ids(loaded, sample) for sample in samples]
    assert len({tuple(ids) for ids in expected}) == len(samples)
    for use_cache in (True, False):
        together = greedy_ids(loaded, samples, use_cache=use_cache)
        assert [without_padding(ids) for ids in together] == expected
        alone = [greedy_ids(loaded, [sample], use_cache=use_cache)[0] for sample in samples]
        assert alone == expected


def test_generate_depends_on_the_pictures(loaded):
    (_, one, two) = conversations()
    other = (one[0], [picture(9)]), (two[0], two[1][::-1])
    for sample, swapped in zip((one, two), other, strict=True):
        assert greedy_ids(loaded, [sample]) != greedy_ids(loaded, [swapped])


def test_generate_goes_on_when_a_row_has_ended(loaded):
    samples = conversations()
    end = greedy_ids(loaded, samples[:1])[0][3]
    together = greedy_ids(loaded, samples, eos_token_id=end)
    for sample, ids in zip(samples, together, strict=True):
        alone = greedy_ids(loaded, [sample], eos_token_id=end)[0]
        assert ids == alone + [0] * (len(ids) - len(alone))
    assert len(together[0]) > together[0].index(end) + 1  # another row was longer


def test_generate_runs_the_tower_once(loaded):
    calls = []
    handle = loaded.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert len(greedy_ids(loaded, conversations())[0]) > 1
    finally:
        handle.remove()
    assert len(calls) == 1


BEAMS = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}


@torch.no_grad()
def beams_of_one(loaded: LoadedModel, sample: tuple) -> list[list[int]]:
    """Beam search that never sees an image: the features stand in its embeddings already."""
    batch = loaded.processor.prompt_batch([sample])
    embeds = loaded.model.model.embed_tokens(batch["input_ids"])
    if len(batch["pixel_values"]):
        features = loaded.model.encode_images(batch["pixel_values"]).flatten(0, 1)
        embeds[batch["image_mask"]] = features
    llm = MiniMindForCausalLM(loaded.model.config).eval()
    llm.model, llm.lm_head = loaded.model.model, loaded.model.lm_head
    return llm.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], pad_token_id=0, **BEAMS
    ).tolist()


@pytest.mark.parametrize("with_mask", [True, False], ids=["image_mask", "ids_only"])
def test_generate_beams_keep_images_with_their_sample(loaded, with_mask):
    samples = conversations()[::-1]  # 2, 1, 0 pictures
    batch = loaded.processor.prompt_batch(samples)
    if not with_mask:
        del batch["image_mask"]
    output = loaded.model.generate(**batch, pad_token_id=0, **BEAMS)
    together = output[:, batch["input_ids"].shape[1] :].tolist()
    expected = [ids for sample in samples for ids in beams_of_one(loaded, sample)]
    width = len(together[0])
    assert together == [ids + [0] * (width - len(ids)) for ids in expected]


def test_generate_several_answers_keep_images_with_their_sample(loaded):
    """Sampling that always takes the likeliest token: every answer is the greedy one."""
    samples = conversations()[::-1]
    texts = generate(loaded, samples, Sampling(max_new_tokens=8, temperature=1.0, top_p=1e-9),
                     num_return_sequences=2)  # fmt: skip
    expected = generate(loaded, samples, Sampling(max_new_tokens=8, temperature=0))
    assert texts == [text for text in expected for _ in range(2)]


def test_generate_is_seeded(loaded):
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=1.0, top_p=1.0)
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(generate(loaded, conversations(), sampling))
    assert answers[0] == answers[1] != answers[2]


def test_generate_stops_at_the_last_position(assets):
    short, samples = make_loaded(assets, max_position_embeddings=100), conversations()[:1]
    room = 100 - short.processor.prompt_batch(samples)["input_ids"].shape[1]
    text = generate(short, samples, Sampling(max_new_tokens=1000, temperature=0))[0]
    (expected,) = greedy_ids(short, samples, max_new_tokens=room)
    assert text == short.processor.tokenizer.decode(expected, skip_special_tokens=True)
    with pytest.raises(ValueError, match="the model takes 100"):
        generate(short, [(ask("circle " * 100, num_images=0), [])], GREEDY)


@pytest.mark.parametrize("sample", range(3))
def test_stream_gives_the_text_of_generate(loaded, sample):
    messages, images = conversations()[sample]
    pieces = list(stream(loaded, messages, images, GREEDY))
    assert len(pieces) > 1
    assert "".join(pieces) == generate(loaded, [(messages, images)], GREEDY)[0]


def test_stream_samples_like_generate(loaded):
    messages, images = conversations()[2]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.8, top_p=0.9)
    torch.manual_seed(3)
    text = "".join(stream(loaded, messages, images, sampling))
    torch.manual_seed(3)
    assert text == generate(loaded, [(messages, images)], sampling)[0]


def test_stream_stops_when_it_is_closed(loaded):
    calls, threads = [], threading.active_count()

    def never_end(_module, _args, logits):
        calls.append(1)
        logits[..., loaded.processor.tokenizer.eos_token_id] = -torch.inf

    messages, images = conversations()[1]
    handle = loaded.model.lm_head.register_forward_hook(never_end)
    try:
        pieces = stream(loaded, messages, images, Sampling(max_new_tokens=3000, temperature=0))
        next(pieces)
        pieces.close()
    finally:
        handle.remove()
    assert 0 < len(calls) < 1000 and threading.active_count() == threads
    assert generate(loaded, [(messages, images)], GREEDY)  # and the model is usable again


def test_stream_hands_an_error_to_its_reader(loaded, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(loaded.model, "encode_images", fail)
    messages, images = conversations()[1]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(stream(loaded, messages, images, GREEDY))


def test_ask_puts_missing_tags_in_front():
    assert ask("What?", num_images=2)[0]["content"] == "<image>\n<image>\nWhat?"
    assert ask("What? <image>", num_images=1) == [{"role": "user", "content": "What? <image>"}]


def arguments(assets, folder, *more) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    own = ["--vision_model_path", assets / "tower", "--tokenizer_path", assets / "tokenizer",
           "--save_dir", folder, "--device", "cpu"]  # fmt: skip
    return parser.parse_args([str(a) for a in [*own, *more]])


def save(loaded: LoadedModel, path, *, with_metadata: bool) -> None:
    sha256 = tokenizer_sha256(loaded.processor.tokenizer)
    save_weights(loaded.model, path, describe_model(loaded.model, tokenizer_sha256=sha256))
    if not with_metadata:
        path.with_suffix(".json").unlink()


@pytest.mark.parametrize("with_metadata", [True, False], ids=["described", "published"])
@KINDS
def test_load_model_native_gives_the_saved_model(assets, tmp_path, use_moe, with_metadata):
    saved = make_loaded(assets, use_moe=use_moe)
    save(saved, tmp_path / f"sft_vlm_32{'_moe' * use_moe}.pth", with_metadata=with_metadata)
    saved.model.half().float()  # what the file holds
    loaded = load_model(arguments(assets, tmp_path))
    assert loaded.can_see and not loaded.model.training and loaded.model.dtype == torch.float32
    assert generate(loaded, conversations(), GREEDY) == generate(saved, conversations(), GREEDY)


def test_load_model_folder_gives_the_saved_model(assets, tmp_path):
    saved = make_loaded(assets, use_moe=True)
    saved.model.save_pretrained(tmp_path / "hf")
    loaded = load_model(arguments(assets, tmp_path, "--load_from", tmp_path / "hf"))
    assert generate(loaded, conversations(), GREEDY) == generate(saved, conversations(), GREEDY)
    with pytest.raises(ValueError, match="hidden_size 32, not 64"):
        load_model(arguments(assets, tmp_path, "--load_from", tmp_path / "hf", "--dim", 64))


def test_load_model_of_a_language_model_cannot_see(assets, tmp_path):
    torch.manual_seed(0)
    llm = MiniMindForCausalLM(MiniMindConfig(vocab_size=VOCAB, **TINY_MODEL))
    torch.save(llm.half().state_dict(), tmp_path / "llm_32.pth")
    loaded = load_model(arguments(assets, tmp_path, "--weight", "llm"))
    assert not loaded.can_see
    assert len(generate(loaded, conversations(), GREEDY)) == 3


def test_load_model_first_release_placeholder(assets, tmp_path):
    placeholder = "<" * 9 + ">" * 8
    ids = load_tokenizer(assets / "tokenizer").encode(placeholder)
    saved = make_loaded(assets, keep_cls=True, image_special_token=placeholder, image_ids=ids)
    save(saved, tmp_path / "sft_vlm_32.pth", with_metadata=False)
    saved.model.half().float()
    flags = ("--keep_cls", "1", "--image_special_token", placeholder)
    loaded = load_model(arguments(assets, tmp_path, *flags))
    assert generate(loaded, conversations(), GREEDY) == generate(saved, conversations(), GREEDY)


def test_load_model_refuses_what_does_not_fit(assets, tmp_path):
    saved = make_loaded(assets)
    save(saved, tmp_path / "sft_vlm_32.pth", with_metadata=True)
    path = tmp_path / "sft_vlm_32.pth"
    with pytest.raises(ValueError, match="num_hidden_layers 2, not 3"):
        load_model(arguments(assets, tmp_path, "--n_layers", "3", "--weight", path))
    with pytest.raises(FileNotFoundError, match="no weight sft_vlm_64.pth"):
        load_model(arguments(assets, tmp_path, "--hidden_size", "64"))
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_model(arguments(assets, tmp_path, "--load_from", tmp_path))
    with pytest.raises(ValueError, match="model_type 'clip_vision_model'"):
        load_model(arguments(assets, tmp_path, "--load_from", assets / "tower"))
    metadata = tmp_path / "sft_vlm_32.json"
    text = metadata.read_text()
    sha256 = describe_model(saved.model, tokenizer_sha256="")["vision_tower_sha256"]
    metadata.write_text(text.replace(sha256, "0" * 64))
    with pytest.raises(ValueError, match="another vision tower"):
        load_model(arguments(assets, tmp_path))
    metadata.write_text(text.replace(tokenizer_sha256(saved.processor.tokenizer), "0" * 64))
    with pytest.raises(ValueError, match="--tokenizer_path"):
        load_model(arguments(assets, tmp_path))


def test_model_arguments_take_0_1_and_words(assets, tmp_path):
    for words, expected in ((["1"], True), (["FALSE"], False), (["true"], True), ([], True)):
        assert arguments(assets, tmp_path, "--use_moe", *words).use_moe is expected
    assert arguments(assets, tmp_path).use_moe is None
    with pytest.raises(SystemExit):
        arguments(assets, tmp_path, "--use_moe", "maybe")
