"""Owns the description of what the chain on the sample world teaches, for the page that serves its
model: see `model/serving/web/suggestions.py`.
"""

from typing import Any

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
