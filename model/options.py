"""Owns how all commands read their flags."""

import argparse


class _StoreOnce(argparse.Action):
    """Store a flag's value; a second one is an error."""

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string is not None and self.dest in parser.given:
            parser.exit(
                2,
                f"error: {option_string} is given more than once, and only one can count; leave "
                "the others out / 参数重复\n",
            )
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class OnceParser(argparse.ArgumentParser):
    """A parser that refuses a repeated flag in one line, where argparse keeps the last in silence.

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
