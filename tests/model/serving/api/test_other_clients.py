"""If this fails, the clients that people use beside the official one are refused, or told something
else, by `web_demo.py --api`, with their defaults: LangChain's and LiteLLM's.

They are no part of the requirements; the tests run where they are installed:

    pip install "langchain-openai>=1.7,<2" "litellm>=1.110,<2"
"""

import pytest
from support.api_site import MODEL, data_url, endless_engine, parts, served_thread
from support.tiny_vlm import picture

from model.generation.engine import VLMEngine, ask
from model.generation.sampling import Sampling

pytestmark = [pytest.mark.full, pytest.mark.slow]
HOW = 'not installed: pip install "langchain-openai>=1.7,<2" "litellm>=1.110,<2"'
PLAIN = Sampling(24, temperature=0)  # the server's, which clients do not name


@pytest.fixture(scope="module")
def engine(assets) -> VLMEngine:
    return endless_engine(assets)


@pytest.fixture(scope="module")
def address(engine):
    with served_thread(engine, defaults=PLAIN) as address:
        yield address


def text_of(engine: VLMEngine, messages: list, images: list) -> str:
    return engine.generate([(messages, images)], PLAIN)[0].text


def conversation(engine: VLMEngine) -> list[tuple[list[dict], list, list[dict]]]:
    """Plain, with two pictures, and a second turn: ours, pictures, theirs."""
    few, many = picture(6), picture(9)
    plain = ask("图像里有什么？", num_images=0)
    two, shown = ask("What?", num_images=2), [few, many]
    begun = [{"role": "user", "content": parts(few, many, "What?")}]
    first = text_of(engine, two, shown)
    history = [*begun, {"role": "assistant", "content": first}]
    return [
        (plain, [], plain),
        (two, shown, begun),
        (
            engine.remember(two, first) + ask("And now?", num_images=0),
            shown,
            [*history, {"role": "user", "content": "And now?"}],
        ),
    ]


def test_langchain(engine, address):
    library = pytest.importorskip("langchain_openai", reason=HOW)
    chat = library.ChatOpenAI(base_url=address, api_key="none", model="default", max_retries=0)
    for ours, images, theirs in conversation(engine):
        expected = text_of(engine, ours, images)
        reply = chat.invoke(theirs)
        assert reply.content == expected
        assert reply.usage_metadata["output_tokens"] == 24
        chunks = list(chat.stream(theirs))
        assert "".join(chunk.content for chunk in chunks) == expected and len(chunks) > 3
    several = library.ChatOpenAI(
        base_url=address, api_key="none", model=MODEL, logprobs=True, top_logprobs=2, n=2
    )
    messages = pytest.importorskip("langchain_core.messages", reason=HOW)
    told = several.generate([[messages.HumanMessage("What?")]])
    assert len(told.generations[0]) == 2
    text = library.OpenAI(
        base_url=address, api_key="none", model=MODEL, max_retries=0, temperature=0, max_tokens=24
    )
    prompt = engine.processor.render(ask("What?", num_images=0), add_generation_prompt=True)
    expected = text_of(engine, ask("What?", num_images=0), [])
    assert text.invoke(prompt) == expected == "".join(text.stream(prompt))


def test_litellm(engine, address):
    litellm = pytest.importorskip("litellm", reason=HOW)
    asked = {"model": f"openai/{MODEL}", "api_base": address, "api_key": "none", "max_retries": 0}
    for ours, images, theirs in conversation(engine):
        expected = text_of(engine, ours, images)
        reply = litellm.completion(messages=theirs, **asked)
        assert reply.choices[0].message.content == expected
        assert reply.usage.completion_tokens == 24
        chunks = list(litellm.completion(messages=theirs, stream=True, **asked))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == expected
    settings = {"n": 2, "logprobs": True, "top_logprobs": 1, "presence_penalty": 0.5, "stop": ["x"]}
    reply = litellm.completion(messages=[{"role": "user", "content": "What?"}], **asked, **settings)
    assert len(reply.choices) == 2
    as_text = {"type": "image_url", "image_url": data_url(picture(6))}  # a string, as some send it
    reply = litellm.completion(messages=[{"role": "user", "content": [as_text]}], **asked)
    assert reply.choices[0].message.content
    text = litellm.text_completion(
        prompt="a circle", **asked | {"model": f"text-completion-openai/{MODEL}"}
    )
    assert text.choices[0].text
