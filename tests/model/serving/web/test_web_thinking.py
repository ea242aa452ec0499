"""If this fails, visitors of the page see thinking unfolded or as HTML, or cannot ask for it."""

import pytest
from support.third_generation import make_assets3, make_loaded3
from support.tiny_vlm import save_tiny
from support.web_visitor import serving, visiting

pytestmark = pytest.mark.slow
EVIL = '<img src=x onerror="window.hacked=1"><b>It</b> is red.'


def test_thinking_is_folded_and_asked_for_by_a_switch(browser, tmp_path):
    make_assets3(tmp_path)
    save_tiny(make_loaded3(tmp_path), tmp_path / "sft_vlm_32.pth")
    said = f"{EVIL}\n</think>\n\nRed <i>it</i> is."
    with serving(tmp_path, SAY=said) as site, visiting(browser, site) as me:
        me.ask("What is it?")  # without thinking, all is the answer
        assert me.said() == [said]
        me.page.locator("#thinking input").check()
        me.ask("And with thinking?")
        title = me.page.locator("#chat").get_by_text("Thinking", exact=True)
        title.wait_for()
        thought = me.page.locator("#chat").get_by_text(EVIL, exact=True)
        assert thought.count() == 0 or not thought.is_visible()
        assert "Red <i>it</i> is." in me.said()
        title.click()
        thought.wait_for(state="visible")
        assert me.page.locator("#chat b").count() == 0 == me.page.locator("#chat img").count()
        me.ask("And now?")
        history = site.events("question")[-1]["messages"]
        assert history[3] == {"role": "assistant", "content": "Red <i>it</i> is."}
        assert site.events("answer")[-1]["text"] == "Red <i>it</i> is."
