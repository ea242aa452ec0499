"""Owns how all commands read their flags."""

import argparse
import sys

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
