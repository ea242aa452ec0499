"""Offers the fixtures that all tests share: a tiny tokenizer, tower and data set, made by the tests
themselves.

`shared` is the folder of real photos and golden tensors beside the repository; where it is
absent, the tests that ask for it skip and say so.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from support.fake_hub import hub, only_this_machine  # noqa: F401 (fixtures)
from support.flickr_files import flickr  # noqa: F401 (a fixture)
from support.painted import train_painted
from support.scripts import SHARED
from support.tiny_parts import make_tokenizer, make_tower

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts what runs in the background with Ctrl-C ignored, nohup what it runs with SIGHUP
# ignored, and all its children inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # tiny models are faster so, and runs side by side do not fight


def pytest_collection_modifyitems(items):
    """The quick tests run first, so that a broken one shows early."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("../shared (golden tensors and real photos) is not there")
    return SHARED


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """A folder with `tokenizer/` and `tower/` (16 tokens per image)."""
    folder = tmp_path_factory.mktemp("assets")
    make_tokenizer(folder / "tokenizer")
    make_tower(folder / "tower", image_size=32, patch_size=8)
    return folder


@pytest.fixture(scope="session")
def painted(assets, tmp_path_factory) -> Path:
    """A folder with a model that has learnt to see colours: see `support/painted.py`."""
    folder = tmp_path_factory.mktemp("painted")
    train_painted(assets, folder)
    return folder
