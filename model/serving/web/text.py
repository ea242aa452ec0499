"""Owns the words of the web page, in English and Chinese, and its CSS."""

from typing import Any

LANGUAGES = {"English": "en", "中文": "zh"}
TEXTS = {
    "head": (
        "<h1>Talk to MiniMind-V</h1><p>A tiny vision-language model: show it pictures, ask about "
        "them, and go on asking.</p>",
        "<h1>和 MiniMind-V 对话</h1>"
        "<p>一个小小的视觉语言模型：给它看图片，向它提问，再接着问。</p>",
    ),
    "title": ("A conversation with MiniMind-V", "与 MiniMind-V 的对话"),
    "conversation": ("Conversation", "对话"),
    "empty": (
        "Drop, paste or photograph a picture below and ask about it.",
        "在下方拖入、粘贴或拍摄图片，然后提问。",
    ),
    "question": (
        "Ask something; pictures can be dropped or pasted here (Enter sends)",
        "输入问题；图片可以拖入或粘贴到这里（回车发送）",
    ),
    "stop": ("■ Stop", "■ 停止"),
    "regenerate": ("↻ Regenerate", "↻ 重新生成"),
    "clear": ("✕ New conversation", "✕ 新对话"),
    "share": ("⇩ Save as HTML", "⇩ 存为 HTML"),
    "examples": ("Example pictures: click to add", "示例图片：点击添加"),
    "camera": ("Camera", "拍照"),
    "weight": ("Weight", "权重"),
    "sampling": ("Sampling", "采样"),
    "temperature": ("Temperature (0: greedy)", "温度（0 为贪心）"),
    "top_p": ("Top-p", "Top-p 核采样"),
    "top_k": ("Top-k (0: off)", "Top-k（0 为关闭）"),
    "repetition_penalty": ("Repeat penalty (1: off)", "重复惩罚（1 为关闭）"),
    "max_new_tokens": ("Longest answer (tokens)", "最大生成长度"),
    "num_beams": (
        "Beam search: beams (1: off; with more, the temperature does not count)",
        "束搜索宽度（1 为关闭；大于 1 时温度不起作用）",
    ),
    "seed": ("Seed (empty: a new one each time)", "随机种子（留空则每次不同）"),
    "look": ("Where does it look?", "它在看哪里？"),
    "look_help": (
        "The patches that the last answer's tokens attend to, the brighter the more.",
        "最后一个回答的词元关注哪些图块：越亮表示越关注。",
    ),
    "look_layer": ("Layer (0: average of all)", "层（0 为所有层平均）"),
    "look_image": ("Picture", "第几张图"),
    "look_go": ("Show", "显示"),
    "look_share": (
        "{share:.0%} of the attention goes to this picture.",
        "{share:.0%} 的注意力落在这张图片上。",
    ),
    "describe_2": ("Describe this image.", "描述一下这个图像的内容。"),
    "describe_3": (
        "Describe the main objects and the scene in this picture.",
        "请描述这张图中的主要物体和场景。",
    ),
    "thinking": ("Thinking", "思考"),
    "open_thinking": ("Think before answering", "先思考再回答"),
    "user": ("You", "你"),
    "gone": ("[the picture is no longer here]", "[图片已不在]"),
    "loaded": ("Now talking: {weight}", "当前权重：{weight}"),
    "blind": (
        "{weight} has no projection: it cannot see, what it says about pictures is made up.",
        "{weight} 没有投影层：它看不见图片，关于图片的话都是编的。",
    ),
    "not_loaded": (
        "{weight} was not loaded, the one before stays; the server's log says why.",
        "无法加载 {weight}，继续使用原权重；原因见服务器日志。",
    ),
    "refused": ("Not sent: {error}", "未发送：{error}"),
    "not_taken": ("Not taken: {error}", "未接收：{error}"),
    "failed": ("The answer failed: {error}", "生成失败：{error}"),
    "bug": ("something broke; the server's log says what", "程序出错，详见服务器日志"),
    "nothing_to_look_at": (
        "It takes an answer to a question with a picture.",
        "需要先就图片提问并得到回答。",
    ),
    "busy": ("Wait for the answer, or stop it first.", "请等回答结束，或先停止。"),
    "status": (
        "{tokens} tokens · {seconds:.1f} s · seed {seed} · {weight}{beams}{ending}{dropped}",
        "{tokens} 个词元 · {seconds:.1f} 秒 · 种子 {seed} · {weight}{beams}{ending}{dropped}",
    ),
    "beams": (" · {count} beams", " · 束宽 {count}"),
    "ending_cancelled": (" · stopped", " · 已停止"),
    "ending_length": (" · cut at the longest length", " · 达到最大长度"),
    "dropped": (
        " · the {count} oldest turns no longer fit",
        " · 最早的 {count} 轮对话已放不下",
    ),
}
ANY_NAME = "Any name will do; the password is the server's. 用户名随意，密码请问服务器主人。"


def text(key: str, language: str, **values: Any) -> str:
    """One text in "en" or "zh", its values filled in."""
    return TEXTS[key][list(LANGUAGES.values()).index(language)].format(**values)


def page_language(accept_language: str | None) -> str:
    """The language that a browser's Accept-Language header puts first."""
    return "zh" if (accept_language or "").strip().lower().startswith("zh") else "en"


CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
#head { align-items: center; }
#head h1 { margin-bottom: 0; }
#language { max-width: 190px; margin-left: auto; }
#status { min-height: 1.6em; opacity: .75; font-size: .9em; }
#chat .message { white-space: pre-wrap; overflow-wrap: anywhere; }
#chat img { max-height: 150px; width: auto; border-radius: 8px; }
/* Gradio's share button would send the picture to a hub. */
#chat .message-row:has(.component) + .message-buttons { display: none; }
#examples { border-width: 0 !important; }
#examples .grid-wrap { height: auto; max-height: none; min-height: 0; padding: 2px; }
#examples .grid-wrap { overflow: visible; outline: none; box-shadow: none; }
#examples .grid-container { grid-template-columns: repeat(4, 1fr); gap: 8px; padding: 0; }
#examples .grid-container { grid-template-rows: none; grid-auto-rows: auto; }
#examples .thumbnail-item { width: 100%; height: auto; aspect-ratio: 1; }
footer { display: none !important; }
"""
