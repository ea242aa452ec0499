"""If this fails, the main use does not work: pretrain, SFT and describe on real photos with English
and Chinese captions.
"""

import json
import math
import os
import re
import zipfile
from collections import Counter
from itertools import islice

import pytest
from support.scripts import run_script
from transformers import AutoTokenizer

FORMS = {
    # records, validation records, hidden size, layers, epochs of pretraining, learning rate
    "short": (500, 100, 128, 2, 1, 2e-3),
    "full": (4000, 400, 256, 4, 1, 4e-4),
}


def take(source, target, count: int):
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(islice(lines, count)), encoding="utf-8")
    return target


def answer_counts(path, tokenizer) -> Counter:
    """How often each token stands in the answers: those that the loss is about."""
    counts = Counter()
    for line in path.open(encoding="utf-8"):
        for message in json.loads(line)["conversations"]:
            if message["role"] == "assistant":
                counts.update(tokenizer.encode(message["content"] + "<|im_end|>\n"))
    return counts


def unigram_losses(train, val, tokenizer) -> tuple[float, float]:
    """Loss on the validation answers of a unigram model fitted to the training answers (with one
    added to each count), and of one fitted to the validation answers themselves: no unigram model
    can be better than that."""
    fitted, own = answer_counts(train, tokenizer), answer_counts(val, tokenizer)
    num_fitted, num_own = sum(fitted.values()) + len(tokenizer), sum(own.values())
    losses = [
        sum(-n * math.log(share(token)) for token, n in own.items()) / num_own
        for share in (lambda t: (fitted[t] + 1) / num_fitted, lambda t: own[t] / num_own)
    ]
    return losses[0], losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["short", pytest.param("full", marks=pytest.mark.full)])
def test_real_photos_end_to_end(form, shared, tmp_path):
    num_train, num_val, hidden, layers, epochs, lr = FORMS[form]
    flickr, reference = shared / "data" / "flickr8k", shared / "reference"
    for split in ("train", "val"):
        with zipfile.ZipFile(flickr / split / "images.zip") as archive:
            archive.extractall(tmp_path / split)
    train = take(flickr / "train" / "data.jsonl", tmp_path / "train.jsonl", num_train)
    val = take(flickr / "val" / "data.jsonl", tmp_path / "val.jsonl", num_val)
    tower, tokenizer_path = reference / "tiny-clip-vit-patch16", reference / "minimind_tokenizer"
    common = [
        "--vision_model_path",
        tower,
        "--tokenizer_path",
        tokenizer_path,
        "--save_dir",
        tmp_path / "out",
        "--hidden_size",
        hidden,
    ]
    data = [
        "--data_path",
        train,
        "--images_path",
        tmp_path / "train",
        "--val_data_path",
        val,
        "--val_images_path",
        tmp_path / "val",
        "--checkpoint_dir",
        tmp_path,
        "--epochs",
        epochs,
        "--log_interval",
        20,
    ]
    threads = {}
    if form == "short":  # many a CPU takes several times as long for bfloat16
        data += ["--dtype", "float32"]
        # Ten records share a photo, and both stages its features.
        data += ["--cache_vision_features", tmp_path / "features"]
    else:
        threads = {"env": {"OMP_NUM_THREADS": str(os.cpu_count())}, "cold": True}
    run_script(
        "trainer/train_pretrain_vlm.py",
        *common,
        *data,
        "--num_hidden_layers",
        layers,
        *"--from_weight none --freeze_llm 0".split(),
        "--learning_rate",
        lr,
        timeout_s=3000,
        **threads,
    )
    sft = run_script("trainer/train_sft_vlm.py", *common, *data, timeout_s=3000, **threads)

    fitted, own = unigram_losses(train, val, AutoTokenizer.from_pretrained(tokenizer_path))
    loss = float(re.findall(r"val_loss:(\S+)", sft.stdout)[-1])
    print(f"validation loss {loss:.3f}; unigram {fitted:.3f} from training, {own:.3f} from itself")
    assert loss < (fitted if form == "short" else own)

    photos = tmp_path / "photos"
    photos.mkdir()
    for picture in sorted((tmp_path / "val").rglob("*.jpg"))[:3]:
        (photos / picture.name).write_bytes(picture.read_bytes())
    shown = run_script("eval_vlm.py", *common, "--image_dir", photos, "--max_new_tokens", 24)
    for picture in photos.iterdir():
        answer = re.search(rf"\[{picture.name}\] (.*)", shown.stdout)
        assert answer and answer[1].strip(), shown.stdout
