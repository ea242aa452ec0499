"""Owns how all commands read their flags, and the flags that name a model and a device."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.generations import GENERATIONS
from model.machine.paths import OUT_DIR

CACHE_DTYPES = ("float16", "float32", "int8")
CACHE_HELP = {
    "cache_vision_features": "keep what the frozen tower says of each picture: 0, 1 (in features "
    "of --save_dir) or a folder / 缓存视觉特征",
    "cache_dtype": "of the kept features; float32: as computed; int8: half the size of float16, "
    "with a scale a token / 缓存精度",
    "cache_gb": "largest size of the folder in GiB; the rest is computed as without / 缓存上限",
}
NATIVE = "model"  # --load_from: this project's own weight files
# Flags that name what a command reads. Given twice, both files would be meant, and no command
# reads two.
INPUT_FLAGS = {"data_path", "images_path", "val_data_path", "val_images_path", "choices", "compare"}


class _StoreOnce(argparse.Action):
    """Store a flag's value; a repeated flag is an error for an input, else a warning."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, OnceParser)
        if option_string is not None and self.dest in parser.given:
            if self.dest in INPUT_FLAGS:
                parser.exit(
                    2,
                    f"error: {option_string} is given more than once, and only one can be read; "
                    "leave the others out / 参数重复\n",
                )
            elif getattr(namespace, self.dest) != values:
                print(
                    f"warning: {option_string} is given more than once; the last, {values}, "
                    "counts / 参数重复，以最后一个为准",
                    file=sys.stderr,
                )
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class OnceParser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports a repeated flag, where argparse silently keeps the last.

    A repeated input (`INPUT_FLAGS`) is an error; of any other flag the last value is kept and a
    warning printed. Flags with another action (`append`, `store_true`) work as in argparse.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.given: set[str] = set()  # destinations of the flags read so far
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)

    def parse_known_args(  # type: ignore[override]  # the stubs overload it by kinds of namespace
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self.given = set()
        return super().parse_known_args(args, namespace)


def parse_bool(text: str) -> bool:
    """0/1, true/false in any case."""
    values = {"0": False, "1": True, "false": False, "true": True}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of 0, 1, true, false")
    return values[text.lower()]


def cache_folder(text: str, save_dir: Path) -> Path | None:
    """The folder that `--cache_vision_features` names: none for 0, `features` in the folder of
    weights for 1.

    Raises:
        ValueError: a word or number that looks like another answer than a folder.
    """
    with contextlib.suppress(argparse.ArgumentTypeError):
        return save_dir / "features" if parse_bool(text) else None
    if not text or text.isdigit() or text.lower() in ("yes", "no", "on", "off"):
        raise ValueError(
            f"--cache_vision_features {text!r} is not 0, 1 or a folder; a folder of that name is "
            f"./{text}"
        )
    return parse_path(text)


def parse_path(text: str) -> Path:
    """A path; `~` is expanded here too, for the shell does not in `--flag=~/x`."""
    return Path(text).expanduser()


def add_model_arguments(parser: argparse.ArgumentParser, *, only_answers: bool = False) -> None:
    """The flags that name a model and the device it runs on; all commands that answer share them.

    `model.weights.build_model.load_model` reads them.

    Args:
        only_answers: add the ways to answer faster, which only commands that answer have.
    """
    _add_weight_arguments(parser)
    _add_input_format_arguments(parser)
    _add_device_arguments(parser)
    if only_answers:
        add = parser.add_argument
        add(
            "--quantize",
            choices=("int8",),
            help="language model's weights in 8 bits: faster on CPUs / 权重量化，CPU 上更快",
        )
        add(
            "--compile",
            type=parse_bool,
            nargs="?",
            const=True,
            default=False,
            help="compile the step of a token at the first answer (a minute or more); for GPUs: on "
            "CPUs it is slower / 编译解码步骤，适合 GPU，CPU 上更慢",
        )


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the feature cache, as the training scripts have them."""
    add, told = parser.add_argument, CACHE_HELP
    add(
        "--cache_vision_features",
        default="0",
        nargs="?",
        const="1",
        metavar="0/1/PATH",
        help=told["cache_vision_features"],
    )
    add("--cache_dtype", choices=CACHE_DTYPES, default=CACHE_DTYPES[0], help=told["cache_dtype"])
    add("--cache_gb", type=float, help=told["cache_gb"])


def _add_weight_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weight is read, and the sizes that choose between several of one name."""
    add = parser.add_argument
    add(
        "--load_from",
        default=NATIVE,
        help="'model': a weight of this project; else a transformers folder / "
        "原生权重，或 transformers 目录",
    )
    add(
        "--save_dir",
        "--out_dir",
        type=parse_path,
        default=OUT_DIR,
        help="folder of weights / 权重目录",
    )
    add("--weight", default="sft_vlm", help="name or path of the weight / 权重名称或路径")
    add(
        "--generation",
        type=int,
        choices=tuple(GENERATIONS),
        help="of the model; default: the weight's / 模型代次，默认随权重",
    )
    add("--hidden_size", "--dim", type=int, help="default: the weight's / 默认随权重")
    add("--num_hidden_layers", "--n_layers", type=int, help="default: the weight's / 默认随权重")
    add(
        "--use_moe",
        type=parse_bool,
        nargs="?",
        const=True,
        help="default: the weight's / 默认随权重",
    )


def _add_input_format_arguments(parser: argparse.ArgumentParser) -> None:
    """How images and text become the model's inputs."""
    add = parser.add_argument
    add("--vision_model_path", type=parse_path, help="folder of the vision tower / 视觉塔目录")
    add(
        "--vision_layer",
        type=int,
        help="hidden state of the tower that is read, such as -2; default: the weight's, else its "
        "last output / 取视觉塔哪一层",
    )
    add(
        "--image_size",
        type=int,
        help="side of the pictures in pixels; default: the weight's, else the tower's / 图片边长",
    )
    add(
        "--token_merge",
        type=int,
        help="patches a side that make one image token; default: the weight's / 合并相邻图块",
    )
    add("--tokenizer_path", type=parse_path, help="folder of the tokenizer / 分词器目录")
    add(
        "--keep_cls",
        type=parse_bool,
        nargs="?",
        const=True,
        help="CLS is an image token (first release) / 保留 CLS",
    )
    add("--image_special_token", help="placeholder text of one image / 图像占位符")
    add(
        "--inference_rope_scaling",
        type=parse_bool,
        nargs="?",
        const=True,
        default=False,
        help="YaRN for prompts over 2048 tokens / 长上下文外推",
    )


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the model runs, and in which number format."""
    add = parser.add_argument
    add("--device", default=None, help="cpu, cuda, cuda:1, mps; default: the best / 默认自动选择")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=None,
        help="default: float32 on a CPU, bfloat16 on a GPU, float16 on one without / "
        "默认 CPU 用 float32，GPU 用 bfloat16，不支持则 float16",
    )
