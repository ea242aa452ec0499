"""Owns the chat template of an export: ours, which also takes content in parts, as pipelines do."""

# Each part is a line, as pictures and questions are in training.
# A message's content may be a text, or parts {"type": "image"} and {"type": "text", "text": ...}.
PARTS = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set content = namespace(text='') -%}
{%- for part in message['content'] or [] -%}
{%- set content.text = content.text + ('' if loop.first else '\\n') -%}
{%- set content.text = content.text + (part['text'] if part['type'] == 'text' else IMAGE) -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def with_parts(template: str, *, image: str) -> str:
    """A template of texts as one of texts or parts.

    Args:
        image: the token that stands for a picture.
    """
    return PARTS.replace("IMAGE", f"'{image}'") + template
