"""Owns how all commands read their flags."""

import argparse
import sys
from pathlib import Path

from model.machine.paths import OUT_DIR

# Who names two of these wants both of them read, which no command does.
SOURCES = {"data_path", "images_path", "val_data_path", "val_images_path", "choices", "compare"}


class _StoreOnce(argparse.Action):
    """Store a flag's value; a second one is refused or told of, never taken in silence."""

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string is not None and self.dest in parser.given:
            if self.dest in SOURCES:
                parser.exit(
                    2,
                    f"error: {option_string} is given more than once, and only one can be read; "
                    "leave the others out / 参数重复\n",
                )
            elif getattr(namespace, self.dest) != values:
                print(f"warning: {option_string} is given more than once; the last, {values}, "
                      "counts / 参数重复，以最后一个为准", file=sys.stderr)  # fmt: skip
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class OnceParser(argparse.ArgumentParser):
    """A parser that does not keep the last of a repeated flag in silence, as argparse does: one
    that names data is refused, for any other the last counts and a warning says so.

    Flags with an action of their own (`append`, `store_true`) are read as ever.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.given: set[str] = set()
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)

    def parse_known_args(self, args=None, namespace=None):
        self.given = set()
        return super().parse_known_args(args, namespace)


NATIVE = "model"  # --load_from: our own weight files


def parse_bool(text: str) -> bool:
    """0/1, true/false in any case."""
    values = {"0": False, "1": True, "false": False, "true": True}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of 0, 1, true, false")
    return values[text.lower()]


def parse_path(text: str) -> Path:
    """A path; `~` is the home folder also where the shell left it alone."""
    return Path(text).expanduser()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model to use; evaluation, demo and export share them."""
    add = parser.add_argument
    add("--load_from", default=NATIVE,
        help="'model': a weight of this project; else a transformers folder / "
             "原生权重，或 transformers 目录")  # fmt: skip
    add(
        "--save_dir",
        "--out_dir",
        type=parse_path,
        default=OUT_DIR,
        help="folder of weights / 权重目录",
    )
    add("--weight", default="sft_vlm", help="name or path of the weight / 权重名称或路径")
    add("--hidden_size", "--dim", type=int, help="default: the weight's / 默认随权重")
    add("--num_hidden_layers", "--n_layers", type=int, help="default: the weight's / 默认随权重")
    add(
        "--use_moe",
        type=parse_bool,
        nargs="?",
        const=True,
        help="default: the weight's / 默认随权重",
    )
    add("--vision_model_path", type=parse_path, help="folder of the CLIP tower / CLIP 目录")
    add("--tokenizer_path", type=parse_path, help="folder of the tokenizer / 分词器目录")
    add("--keep_cls", type=parse_bool, nargs="?", const=True,
        help="CLS is an image token (first release) / 保留 CLS")  # fmt: skip
    add("--image_special_token", help="placeholder text of one image / 图像占位符")
    add("--inference_rope_scaling", type=parse_bool, nargs="?", const=True, default=False,
        help="YaRN for prompts over 2048 tokens / 长上下文外推")  # fmt: skip
    add("--device", default=None, help="cpu, cuda, cuda:1, mps; default: the best / 默认自动选择")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
        help="default: float32 on a CPU, bfloat16 on a GPU, float16 on one without / "
             "默认 CPU 用 float32，GPU 用 bfloat16，不支持则 float16")  # fmt: skip
