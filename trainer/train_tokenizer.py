"""Trains the tokenizer: byte-level BPE on text given by path, the sample world and common hanzi.

    python trainer/train_tokenizer.py --data_path en.txt zh.txt --weights 2 1
    python trainer/train_tokenizer.py --data_path en.txt zh.txt --weights 2 1 --save_dir model

The second command makes the tokenizer in `model/` from the English and the Chinese text of the book
Dive into Deep Learning. It takes one process and a few seconds; the same texts and flags give the
same bytes. `--eval_path` prints how many tokens other texts need (of records, the answers), and
with `--reference_path` how that compares with another tokenizer.

A model belongs to the tokenizer it was trained with: a new one needs new weights.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset.records.conversation import IMAGE_TAG, check_conversation
from dataset.synthetic.sample_data import sample_text
from dataset.synthetic.text import CHINESE
from model.options import OnceParser, parse_bool

ROOT = Path(__file__).resolve().parents[1]
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
# Characters that stay single tokens: image placeholders consist of `@`, `<` and `>` and must have a
# known number of tokens; numbers are tokenized digit by digit.
UNMERGED = "@<>0123456789"
TEMPLATE_ROLES = ("system", "user", "assistant")
SYSTEM_PROMPT = "You are a helpful assistant"
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    f"{{{{- '<|im_start|>system\\n{SYSTEM_PROMPT}<|im_end|>\\n' -}}}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "bos_token": SPECIAL_TOKENS[1],
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": SPECIAL_TOKENS[2],
    "model_max_length": 32768,
    "pad_token": SPECIAL_TOKENS[0],
    "spaces_between_special_tokens": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": SPECIAL_TOKENS[0],
}


def read_texts(
    path: Path, *, answers_only: bool = False, flag: str = "--data_path"
) -> Iterator[str]:
    """The lines of a text file, or the messages (or "text") of each record of a `.jsonl`.

    Args:
        answers_only: of a conversation, only the assistant's messages.
        flag: the flag that gave the path, for the message.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or a line that is not a record.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no text file {path}; name it by {flag}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if path.suffix == ".jsonl" and line.strip():
            texts = _record_texts(line, where=f"{path.name}:{number}", answers_only=answers_only)
            yield from texts
        elif line.strip():
            yield line


def _record_texts(line: str, *, where: str, answers_only: bool) -> list[str]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return [record["text"]]
    if not isinstance(record, dict) or "conversations" not in record:
        raise ValueError(f"{where}: expected a record with 'conversations' or 'text'")
    messages = check_conversation(record["conversations"], where=where)
    return [
        message["content"].replace(IMAGE_TAG, "").strip()
        for message in messages
        if message["role"] == "assistant" or not answers_only
    ]


def common_hanzi() -> list[str]:
    """The 3,755 hanzi in common use. Source: GB/T 2312-1980, level 1 (rows 16 to 55)."""
    codes = (bytes([row, cell]) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    return [hanzi for code in codes if (hanzi := code.decode("gb2312", errors="ignore"))]


def damped_words(texts: Iterable[str], damping: float) -> Iterator[str]:
    """Every word (with its leading space), repeated count ** `damping` times.

    So a text's frequent terms get less of the vocabulary than with their plain counts.
    """
    split = _training_split()
    counts: Counter[str] = Counter()
    for text in texts:
        for _, (start, end) in split.pre_tokenize_str(text):
            counts[text[start:end]] += 1
    for word, count in counts.items():
        yield from [word] * max(1, round(count**damping))


def sample_words(num_scenes: int) -> Iterator[str]:
    """The sample world's text, split at its Chinese words: Chinese has no spaces, and so no token
    can join a colour, shape or place with its neighbour."""
    names = sorted(filter(None, CHINESE.values()), key=len, reverse=True)
    cut = re.compile("(" + "|".join(names) + ")")
    for text in sample_text(num_scenes):
        yield from filter(None, cut.split(text))


def _training_split() -> pre_tokenizers.PreTokenizer:
    """Splits text into words by GPT-2's pattern, and isolates the `UNMERGED` characters."""
    alone = pre_tokenizers.Split(Regex(f"[{UNMERGED}]"), "isolated")
    return pre_tokenizers.Sequence([alone, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int = 6400,
    max_token_bytes: int | None = None,
    allow_fewer: bool = False,
) -> Tokenizer:
    """Byte-level BPE with the special tokens as ids 0, 1, 2 and the bytes from id 3 on.

    The `UNMERGED` characters are isolated in training only. With no merge that contains them, a
    plain byte-level tokenizer keeps them apart too, and other programs can read that kind.

    Args:
        texts: read once; a repeated text counts repeatedly.
        vocab_size: special tokens and the 256 bytes included.
        max_token_bytes: of a merged token; None: no limit. A hanzi has three bytes.
        allow_fewer: whether texts that give fewer tokens are taken.
    Raises:
        ValueError: the texts give fewer tokens, or the size is too small.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"--vocab_size must be {MIN_VOCAB_SIZE} or more, got {vocab_size}")
    if max_token_bytes is not None and max_token_bytes < 1:
        raise ValueError(f"--max_token_bytes must be 1 or more, got {max_token_bytes}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _training_split()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=max_token_bytes,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size and not allow_fewer:
        raise ValueError(
            f"the text gives only {tokenizer.get_vocab_size()} of {vocab_size} tokens; "
            "give more text, a smaller --vocab_size or --allow_fewer 1"
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(TOKENIZER_CONFIG, indent=2, ensure_ascii=False)
    files = {"tokenizer.json": tokenizer.to_str(pretty=False), "tokenizer_config.json": config}
    for name, text in files.items():
        partial = folder / f"{name}.part"
        partial.write_text(text + "\n", encoding="utf-8", newline="\n")
        os.replace(partial, folder / name)


def count_tokens(tokenizer: Tokenizer, texts: list[str]) -> int:
    """How many tokens the texts have in all."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings)


def report(tokenizer: Tokenizer, texts: list[str], reference: Tokenizer | None) -> list[str]:
    """A line each for texts with and without hanzi: tokens, characters a token, reference."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        has_hanzi = any("\u4e00" <= char <= "\u9fff" for char in text)
        groups.setdefault("with hanzi" if has_hanzi else "without hanzi", []).append(text)
    lines = []
    for name, group in sorted(groups.items()):
        num_tokens = count_tokens(tokenizer, group)
        line = (
            f"{len(group)} texts {name}: {num_tokens} tokens, "
            f"{sum(map(len, group)) / num_tokens:.3f} characters a token"
        )
        if reference is not None:
            ratio = num_tokens / count_tokens(reference, group)
            line += f", {ratio - 1:+.1%} against the reference"
        lines.append(line)
    return lines


def main(argv: list[str] | None = None) -> int:
    """Train, save and report; returns the exit status."""
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        reference = _open_reference(args.reference_path)
        held_out = [text for path in args.eval_path for text in _read_answers(path)]
        tokenizer = train_tokenizer(
            _training_texts(args),
            vocab_size=args.vocab_size,
            max_token_bytes=args.max_token_bytes,
            allow_fewer=args.allow_fewer,
        )
        save_tokenizer(tokenizer, args.save_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in report(tokenizer, held_out, reference):
        print(line)
    print(f"{tokenizer.get_vocab_size()} tokens in {args.save_dir}")
    return 0


def _read_answers(path: Path) -> list[str]:
    texts = [*filter(None, read_texts(path, answers_only=True, flag="--eval_path"))]
    if not texts:
        raise ValueError(f"--eval_path {path}: no text in it to count the tokens of")
    return texts


def _training_texts(args: argparse.Namespace) -> list[str]:
    weights = args.weights or [1] * len(args.data_path)
    if len(weights) != len(args.data_path) or min(weights) < 1:
        raise ValueError(
            f"--weights must be one positive number for each of the {len(args.data_path)} files "
            f"of --data_path, got {weights}"
        )
    if not 0 < args.damping <= 1:
        raise ValueError(f"--damping must be above 0 and at most 1, got {args.damping}")
    if min(args.num_scenes, args.hanzi_weight, args.template_weight) < 0:
        raise ValueError("--num_scenes, --hanzi_weight and --template_weight must be 0 or more")
    texts = [*damped_words(sample_words(args.num_scenes), args.damping)]
    texts += common_hanzi() * args.hanzi_weight
    texts += [*TEMPLATE_ROLES, SYSTEM_PROMPT] * args.template_weight
    for path, weight in zip(args.data_path, weights, strict=True):
        texts += list(damped_words(read_texts(path), args.damping)) * weight
    return texts


def _open_reference(path: Path | None) -> Tokenizer | None:
    if path is None:
        return None
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer {file}; name its folder by --reference_path")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other type
        raise ValueError(f"{file}: not a readable tokenizer ({error})") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OnceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--data_path",
        type=Path,
        nargs="+",
        required=True,
        help=".txt (a text a line) or .jsonl (records) | 训练文本",
    )
    add("--weights", type=int, nargs="+", help="how often each file counts; default 1 | 各文件权重")
    add(
        "--damping",
        type=float,
        default=0.75,
        help="power taken of each word's count; 1 leaves it | 词频指数",
    )
    add("--num_scenes", type=int, default=1000, help="scenes of the sample world | 示例场景数")
    add(
        "--hanzi_weight",
        type=int,
        default=20,
        help="how often each of 3,755 common hanzi counts | 常用汉字权重",
    )
    add(
        "--template_weight",
        type=int,
        default=0,
        help="how often the words of the chat template count | 对话模板词语权重",
    )
    add("--vocab_size", type=int, default=6400, help="tokens | 词表大小")
    add("--max_token_bytes", type=int, help="longest token; a hanzi has 3 | 词元最大字节数")
    add(
        "--allow_fewer",
        type=parse_bool,
        default=False,
        help="whether a text of fewer tokens than that is taken {0,1} | 允许词表更小",
    )
    add(
        "--save_dir",
        "--out_dir",
        type=Path,
        default=ROOT / "out" / "tokenizer",
        help="folder to write into | 输出目录",
    )
    add(
        "--eval_path",
        type=Path,
        nargs="+",
        default=[],
        help="texts, or records whose answers, to count tokens of | 评测文本",
    )
    add("--reference_path", type=Path, help="tokenizer to compare with | 对照分词器")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
