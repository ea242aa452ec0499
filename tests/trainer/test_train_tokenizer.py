"""If this fails, the tokenizer in model/ does not keep text exactly, has other special ids than
weights expect, or cannot be made again.
"""

import json
import random

import pytest
from support.scripts import SHARED, run_script
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dataset.loss_mask import supervised_mask
from dataset.synthetic.sample_data import text_conversations
from dataset.synthetic.scenes import COLOURS, PLACES, SHAPES
from dataset.synthetic.text import CHINESE
from model.generations import MODEL_DIR
from model.model_vlm import VLMConfig
from trainer import train_tokenizer

CORPUS = SHARED / "data/corpus"
CORPUS_FLAGS = ["--data_path", CORPUS / "en.txt", CORPUS / "zh.txt", "--weights", 2, 1]
SMALL_TEXT = "The quick brown fox, at 12 <b>home</b>, wrote to a@b.c and @@ @.\n敏捷的狐狸 @ 12。\n"


@pytest.fixture(scope="module")
def shipped():
    """The committed tokenizer alone, without whatever else lies in model/."""
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def make_small(folder, *flags):
    text = folder / "text.txt"
    text.write_text(SMALL_TEXT * 40, encoding="utf-8")
    usual = {"data_path": text, "vocab_size": 330, "save_dir": folder / "made", "num_scenes": 20}
    arguments = [*flags, "--hanzi_weight", 0]
    for name, value in usual.items():
        if f"--{name}" not in flags:
            arguments += [f"--{name}", value]
    return train_tokenizer.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Trained on text full of what must not merge."""
    folder = tmp_path_factory.mktemp("small")
    assert make_small(folder, "--damping", 1) == 0
    return AutoTokenizer.from_pretrained(folder / "made")


@pytest.fixture(params=["small", "shipped"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_special_ids_are_those_of_the_contract(tokenizer):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "@", "!"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 34, 3]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert encode(tokenizer, "<|im_start|>a<|im_end|>")[::2] == [1, 2]
    assert tokenizer.encode("a") == encode(tokenizer, "a")  # nothing is put around a text


def test_shipped_vocabulary_has_6400_tokens(shipped):
    assert len(shipped) == shipped.vocab_size == 6400 == VLMConfig().vocab_size


def test_placeholder_characters_never_merge(tokenizer):
    assert not [
        token
        for token in tokenizer.get_vocab()
        if len(token) > 1 and set(token) & set("@<>0123456789") and not token.startswith("<|")
    ]
    for text in ("@" * 196, "a@b", " @", "@ @", "\n@@\n", "看@图", "@.", "  @@"):
        ids = encode(tokenizer, text)
        assert ids.count(34) == text.count("@"), text
        assert tokenizer.decode(ids) == text
    assert encode(tokenizer, "@" * 196) == VLMConfig().image_ids
    assert len(encode(tokenizer, "<" * 25 + ">" * 25)) == 50
    assert len(encode(tokenizer, "2026")) == 4


def test_training_text_could_have_merged_them(tmp_path, monkeypatch):
    """The test above can fail: without the guard the same text merges them."""
    monkeypatch.setattr(train_tokenizer, "UNMERGED", "~")
    assert make_small(tmp_path, "--damping", 1) == 0
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "made").get_vocab()
    assert [token for token in vocabulary if "@" in token and len(token) > 1]


def test_round_trip_is_exact_for_any_text(tokenizer):
    rng = random.Random(0)
    planes = [
        (0x20, 0x7F),
        (0x80, 0x2FF),
        (0x4E00, 0xA000),
        (0x1F300, 0x1FAFF),
        (0, 0x20),
        (0xE000, 0xF000),
        (0x20000, 0x2A6DF),
        (0x2000, 0x2070),
    ]
    texts = [
        "",
        " ",
        "\n\n",
        "  a  b\t\r\n",
        "don't , stop .",
        "e\u0301\u200d👩‍👩‍👧",
        "\u3000全角 ",
    ]
    for _ in range(400):
        chars = (chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randint(1, 40)))
        texts.append("".join(chars))
    for text in texts:
        assert tokenizer.decode(encode(tokenizer, text)) == text


CONVERSATIONS = [
    [{"role": "user", "content": "What is it? 图中有什么？"},
     {"role": "assistant", "content": "A dog.\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "},
     {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye"},
     {"role": "assistant", "content": "再见"}],
]  # fmt: skip


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_chat_template_is_chatml(tokenizer, messages, add_generation_prompt):
    wanted = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    if messages[0]["role"] != "system":
        wanted = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n" + wanted
    wanted += "<|im_start|>assistant\n" * add_generation_prompt
    assert wanted == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def test_chat_template_writes_what_the_published_one_does(shared, shipped):
    published = AutoTokenizer.from_pretrained(shared / "reference/minimind_tokenizer")
    for case in json.loads((shared / "reference/loss_mask.json").read_text(encoding="utf-8")):
        texts = [
            t.apply_chat_template(case["conversations"], tokenize=False)
            for t in (shipped, published)
        ]
        assert texts[0] == texts[1]


def test_answers_are_what_is_supervised(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATIONS[1], tokenize=False)
    ids = encode(tokenizer, text)
    mask = supervised_mask(ids, tokenizer)
    supervised = [i for i, is_target in zip(ids, mask, strict=True) if is_target]
    assert tokenizer.decode(supervised) == "Hi.<|im_end|>\n再见<|im_end|>\n"


def test_every_word_of_the_sample_world_is_a_token_of_its_own(shipped):
    chinese = [CHINESE[name] for name in (*SHAPES, *COLOURS, *PLACES)]
    english = [" " + name for name in (*SHAPES, *COLOURS, *" ".join(PLACES).split())]
    for word in (*SHAPES, *COLOURS, *english, *chinese):
        assert len(encode(shipped, word)) == 1, word
    for record in text_conversations(200, seed=9, styles=("sentences", "table")):
        for message in record["conversations"]:
            tokens = [shipped.decode([i]) for i in encode(shipped, message["content"])]
            for word in chinese:
                assert tokens.count(word) == message["content"].count(word), message


@pytest.mark.parametrize(("is_chinese", "bar"), [(False, 1.08), (True, 1.08)])
def test_captions_need_few_more_tokens_than_with_the_published_one(
    shared, shipped, is_chinese, bar
):
    """The bars of the project are 1.15 and 1.30; measured are 1.056 and 1.048."""
    published = Tokenizer.from_file(str(shared / "reference/minimind_tokenizer/tokenizer.json"))
    texts = list(
        train_tokenizer.read_texts(shared / "data/flickr8k/val/data.jsonl", answers_only=True)
    )
    group = [t for t in texts if is_chinese == any("\u4e00" <= char <= "\u9fff" for char in t)]
    assert len(group) == 1000
    counts = [
        train_tokenizer.count_tokens(t, group) for t in (shipped.backend_tokenizer, published)
    ]
    assert counts[0] / counts[1] <= bar


def test_the_command_makes_the_shipped_files_byte_for_byte(shared, tmp_path):
    options = {"env": {"RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}, "cold": True}
    flags = [*CORPUS_FLAGS, "--save_dir", tmp_path]
    made = run_script("trainer/train_tokenizer.py", *flags, cwd=tmp_path, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (MODEL_DIR / name).read_bytes(), name
    assert "6400 tokens in" in made.stdout


def test_training_twice_gives_the_same_bytes(tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert make_small(tmp_path / name) == 0
        made.append((tmp_path / name / "made/tokenizer.json").read_bytes())
    assert made[0] == made[1]


def test_records_and_lines_are_read_alike(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\u2028three\n", encoding="utf-8")
    records = [
        {
            "conversations": [
                {"role": "user", "content": "<image>\none"},
                {"role": "assistant", "content": "two\u2028three"},
            ]
        },
        {"text": "four"},
        {"conversations": [{"from": "gpt", "value": "five"}]},
    ]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "a.jsonl").write_text(lines + "\n", encoding="utf-8")
    read = train_tokenizer.read_texts
    assert list(read(tmp_path / "a.txt")) == ["one", "two\u2028three"]
    assert list(read(tmp_path / "a.jsonl")) == ["one", "two\u2028three", "four", "five"]
    answers = list(read(tmp_path / "a.jsonl", answers_only=True))
    assert answers == ["two\u2028three", "four", "five"]


def test_damping_and_weights_shift_the_vocabulary(tmp_path):
    words = list(train_tokenizer.damped_words(["a b b b b", " b"], 0.5))
    assert sorted(words) == [" b", " b", "a"]
    (tmp_path / "other.txt").write_text("zebra zebu " * 3, encoding="utf-8")
    flags = ["--data_path", tmp_path / "text.txt", tmp_path / "other.txt", "--damping", 1]
    for weights, has_zebra in (((1, 1), False), ((1, 500), True)):
        assert make_small(tmp_path, *flags, "--weights", *weights) == 0
        vocabulary = AutoTokenizer.from_pretrained(tmp_path / "made").get_vocab()
        assert ("Ġzebra" in vocabulary) == has_zebra


def test_template_and_length_shape_the_vocabulary(tmp_path):
    flags = ["--num_scenes", 0, "--allow_fewer", 1]  # the sample world's text has those words
    for weight, whole in ((0, False), (1000, True)):
        assert make_small(tmp_path, *flags, "--template_weight", weight) == 0
        made = AutoTokenizer.from_pretrained(tmp_path / "made")
        assert ("assistant" in made.get_vocab()) == whole
        assert made.decode(encode(made, "You are a helpful assistant")).startswith("You are a")
    assert make_small(tmp_path, *flags, "--template_weight", 1000, "--max_token_bytes", 6) == 0
    learned = AutoTokenizer.from_pretrained(tmp_path / "made").get_vocab().keys()
    lengths = [len(token) for token in learned - set(train_tokenizer.SPECIAL_TOKENS)]
    assert 1 < max(lengths) <= 6 < len("assistant")


def test_text_of_few_words_gives_a_smaller_vocabulary_where_that_is_allowed(tmp_path, capsys):
    assert make_small(tmp_path, "--vocab_size", 6400) == 1
    assert "--allow_fewer 1" in capsys.readouterr().err
    assert make_small(tmp_path, "--vocab_size", 6400, "--allow_fewer", 1) == 0
    made = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert train_tokenizer.MIN_VOCAB_SIZE < len(made) < 6400
    assert made.decode(encode(made, "麒麟 fox")) == "麒麟 fox"
    assert make_small(tmp_path, "--max_token_bytes", 0) == 1
    assert "--max_token_bytes must be 1 or more" in capsys.readouterr().err


def test_common_hanzi_are_those_of_the_standard():
    hanzi = train_tokenizer.common_hanzi()
    assert len(hanzi) == len(set(hanzi)) == 3755
    assert {"的", "狗", "跑"} < set(hanzi) and "麒" not in hanzi


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data_path", "absent.txt"], "no text file absent.txt"),
        (["--weights", 1, 2], "--weights must be one positive number for each of the 1 files"),
        (["--damping", 0], "--damping must be above 0"),
        (["--vocab_size", 100], "--vocab_size must be 259 or more, got 100"),
        (["--vocab_size", 64000], "of 64000 tokens; give more text"),
        (["--reference_path", "absent"], "--reference_path"),
        (["--reference_path", "text.txt"], "not a readable tokenizer"),
        (["--eval_path", "absent.txt"], "name it by --eval_path"),
        (["--eval_path", "silent.jsonl"], "no text in it"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_one_line(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    silent = {"conversations": [{"role": "assistant", "content": ""}]}
    (tmp_path / "silent.jsonl").write_text(json.dumps(silent))
    assert make_small(tmp_path, *flags) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and says in error and "\n" not in error
    assert not (tmp_path / "made").exists()


def test_broken_texts_are_named(tmp_path, capsys):
    cases = {
        "gbk.txt": ("狗".encode("gbk"), "not UTF-8"),
        "bad.jsonl": (b'{"text": "a"}\n{"image": "a.png"}\n', "bad.jsonl:2: expected a record"),
        "cut.jsonl": (b'{"text": ', "cut.jsonl:1: not valid JSON"),
    }
    for name, (content, says) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert make_small(tmp_path, "--data_path", tmp_path / name) == 1
        assert says in capsys.readouterr().err


def test_script_reports_tokens_beside_a_reference(tmp_path):
    (tmp_path / "eval.txt").write_text("The quick fox\n敏捷的狐狸\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text(SMALL_TEXT * 40, encoding="utf-8")
    printed = run_script(
        *"trainer/train_tokenizer.py --data_path text.txt --vocab_size 400".split(),
        *"--save_dir made --eval_path eval.txt".split(),
        "--reference_path",
        MODEL_DIR,
        cwd=tmp_path,
    ).stdout
    assert "1 texts with hanzi" in printed and "against the reference" in printed
    assert (tmp_path / "made/tokenizer.json").is_file()
