"""Owns errors as a visitor reads them: without the server's paths, and in the page's language."""

import re

from model.serving.web.protection.privacy import without_paths

# What the page, the engine and Gradio's script say to a visitor -> the same in Chinese. Groups are
# kept; a message that is none of these stays as it is.
CHINESE = {
    r"(.*): larger than (\d+) MB": r"\1：大于 \2 MB",
    r"(.*): .*not a readable image.*": r"\1：不是可读取的图片",
    r"(.*): .*?([\dx]+) is over ([\d,]+) pixels.*": r"\1：\2 超过 \3 像素",
    r"(.*): .*too thin.*": r"\1：图片过于细长",
    r"more than (\d+) characters": r"超过 \1 个字符",
    r"(\d+) pictures at once, (\d+) at most": r"一次 \1 张图片，最多 \2 张",
    r"(.*) is no longer here; add it again": r"\1 已不在，请重新添加",
    r"there is no question": "没有问题",
    r"no file": "没有文件",
    r"more than (\d+) MB at once": r"一次超过 \1 MB",
    r"your pictures are more than (\d+) MB together": r"你的图片合计超过 \1 MB",
    r"there is no room for more pictures now; try again in an hour": (
        "现在没有空间存放更多图片，请一小时后再试"
    ),
    r"the seed (.*) is no whole number from 0 to (\d+)": r"随机种子 \1 不是 0 到 \2 的整数",
    r"(\d+) <image> tag\(s\) but (\d+) image\(s\); every tag needs exactly one image": (
        r"有 \1 个 <image> 标记和 \2 张图片，每个标记需要一张图片"
    ),
    r"the prompt has ([\d,]+) tokens.* the model takes ([\d,]+) with the answer.*": (
        r"提示有 \1 个词元，模型连同回答最多 \2 个；请缩短问题或减少图片"
    ),
    r"the prompt has ([\d,]+) characters.*": r"提示有 \1 个字符，太长；请缩短问题",
    r"the (?:.*) holds the special token (.*); take it out": r"含有特殊标记 \1，请去掉",
    r"the (?:.*) holds half a character .*": "含有不完整的字符，请去掉",
    r"(\d+) .* with a prompt of ([\d,]+) tokens hold more than ([\d,]+) tokens; .*": (
        r"\1 束与 \2 个词元的提示共超过 \3 个词元；请减小束宽、缩短问题或减少图片"
    ),
    r"the answer is empty: there is nothing to look from": "回答是空的，没有可看的",
    r"No such file or directory": "文件已不在",
    r"This application is currently busy\. Please try again\.\s*": "现在人太多，请稍后再试",
    r"Connection errored out\.\s*": "连接中断",
    r"File\(s\) exceed the maximum allowed size of (.*?): (.*)": r"文件超过 \1 的上限：\2",
}


def reason(error: Exception | str, language: str) -> str:
    """Why something was refused or failed, in "en" or "zh"."""
    words = without_paths(error)
    if language == "zh":
        for pattern, chinese in CHINESE.items():
            found = re.fullmatch(pattern, words, re.DOTALL)
            if found:
                return found.expand(chinese)
    return words
