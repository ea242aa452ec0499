"""Owns the descriptions of what the chains teach, for the page that serves their models: see
`model/serving/web/suggestions.py`.
"""

import json
from pathlib import Path
from typing import Any

from model.machine.atomic_file import atomic_write

TAUGHT: dict[str, Any] = {
    "languages": ["en", "zh"],
    "about": {
        "en": "coloured shapes on plain backgrounds: which they are, their colours, how many, in "
        "which corner, and a single letter or digit",
        "zh": "纯色背景上的彩色图形：形状、颜色、个数、所在的角，以及单个字母或数字",
    },
    "questions": [
        {
            "picture": "橙色圆形等三个图形-orange-circle-and-two-more.png",
            "en": "How many shapes are there?",
            "zh": "有多少个图形？",
        },
        {
            "picture": "红色圆形-red-circle.png",
            "en": "What colour is the shape?",
            "zh": "图形是什么颜色？",
        },
        {
            "picture": "黄色五角星-yellow-star.png",
            "en": "What shape is it?",
            "zh": "这是什么形状？",
        },
        {
            "picture": "紫色心形和另一个图形-purple-heart-and-another.png",
            "en": "Where is the heart?",
            "zh": "心形在哪里？",
        },
    ],
}
NUM_ASKED = 4  # photos that the page shows with a question


def photo_name(number: int) -> str:
    """File name of a held-back photo among those to try, counted from 1."""
    return f"photo_{number:02}.jpg"


PHOTOS_TAUGHT: dict[str, Any] = {
    "languages": ["en", "zh"],
    "about": {
        "en": "to say in one sentence what people and dogs do in a photo",
        "zh": "用一句话描述照片中的人和狗在做什么",
    },
    "questions": [
        {
            "picture": photo_name(number),
            "en": "Describe the picture in one sentence.",
            "zh": "用一句话描述这张图片。",
        }
        for number in range(1, NUM_ASKED + 1)
    ],
}


def add_taught(weight: Path, taught: dict[str, Any]) -> None:
    """Say in the metadata beside a weight what it was taught; a no-op where it says so."""
    beside = weight.with_suffix(".json")
    about = json.loads(beside.read_text(encoding="utf-8"))
    if about.get("taught") != taught:
        text = json.dumps(about | {"taught": taught}, indent=1, ensure_ascii=False)
        atomic_write(beside, lambda file: file.write(text.encode()))
