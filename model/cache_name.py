"""Owns what transformers calls a key-value cache: `past_key_values` before 5.24, `cache` since.

This project needs 5.24; a folder of `--to transformers` has its code in it and is loaded by older
releases too.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from transformers.masking_utils import create_causal_mask
from transformers.utils.deprecation import deprecate_kwarg

FORMER_NAME = "past_key_values"
IS_FORMER = "cache" not in inspect.signature(create_causal_mask).parameters
CACHE_NAME = FORMER_NAME if IS_FORMER else "cache"  # of the library's arguments and outputs

ForwardT = TypeVar("ForwardT", bound=Callable[..., Any])


def takes_past_key_values(forward: ForwardT) -> ForwardT:
    """`cache` may also be given by its former name, with a warning where the library has both."""
    if not IS_FORMER:
        return cast(ForwardT, deprecate_kwarg(FORMER_NAME, "5.40.0", new_name="cache")(forward))

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if FORMER_NAME in kwargs:
            kwargs["cache"] = kwargs.pop(FORMER_NAME)
        return forward(*args, **kwargs)

    return cast(ForwardT, renamed)
