"""Offers a browser to the tests of this folder."""

import shutil

import pytest
from support.web_visitor import CHROMIUM_FLAGS, CHROMIUM_NAMES, PATIENCE_S


@pytest.fixture(scope="module")
def browser():
    """A real Chromium; without one these tests skip."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium here (none of {', '.join(CHROMIUM_NAMES)})")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=CHROMIUM_FLAGS, timeout=1000 * PATIENCE_S
        )
        yield browser
        browser.close()
