"""Owns the words of the web page, in English and Chinese."""

import json
from typing import Any

from model.serving.web.errors import CHINESE

LANGUAGES = {"English": "en", "中文": "zh"}
TEXTS = {
    "head": (
        "<h1>MiniMind-V</h1><p>A tiny vision-language model: show it pictures, ask about them.</p>",
        "<h1>MiniMind-V</h1><p>一个小小的视觉语言模型：给它看图片，向它提问。</p>",
    ),
    "page": ("Talk to MiniMind-V", "和 MiniMind-V 对话"),
    "title": ("A conversation with MiniMind-V", "与 MiniMind-V 的对话"),
    "begin": ("<h2>What can I ask it?</h2>", "<h2>可以问它什么？</h2>"),
    "taught": (
        "It was taught {about}.{languages} Whatever else it is asked, it only guesses.",
        "它学过：{about}。{languages}其他问题它只能猜。",
    ),
    "taught_languages": (" It answers in {names}.", "它用{names}回答。"),
    "and": (" and ", "和"),
    "language_en": ("English", "英文"),
    "language_zh": ("Chinese", "中文"),
    "taught_pretrain": (
        "It has only begun to put pictures into words: ask it to describe one. Whatever else it is "
        "asked, it only guesses.",
        "它刚开始学着用文字描述图片：请让它描述一张。其他问题它只能猜。",
    ),
    "taught_sft": (
        "It was taught to answer questions about pictures; its weight does not say which. Where "
        "they are unlike yours, it only guesses.",
        "它学过回答关于图片的问题，权重没有说明是哪些图片；与之不同的图片，它只能猜。",
    ),
    "taught_llm": ("It was taught words only, no pictures.", "它只学过文字，没有学过图片。"),
    "taught_unknown": (
        "Its weight does not say what it was taught: what it says may be a guess.",
        "权重没有说明它学过什么：它的回答可能只是猜测。",
    ),
    "taught_blind": (
        "This weight cannot see: what it says about pictures is made up.",
        "这个权重看不见图片，关于图片的话都是编的。",
    ),
    "question": (
        "Ask about a picture: drop or paste it anywhere",
        "就图片提问：图片可拖入或粘贴到页面任意处",
    ),
    "box": ("Question and pictures", "问题与图片"),
    "language": ("Language", "语言"),
    "clear": ("New conversation", "新对话"),
    "share": ("Save as HTML", "存为 HTML"),
    "details": ("Details", "详情"),
    "answering": ("Answering …", "正在回答……"),
    "examples": ("Example pictures", "示例图片"),
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


# Names of parts that Gradio does not name, or only in the browser's language: CSS selector ->
# name.
NAMES = {
    "#box [data-testid=upload-button]": ("Add pictures", "添加图片"),
    "#box .submit-button": ("Send", "发送"),
    "#box .stop-button": ("Stop", "停止"),
    "#box .delete-button": ("Remove the picture", "移除图片"),
    "#box textarea": ("Question", "问题"),
    "#box [role=group]": ("Question and pictures", "问题与图片"),
    "#box .thumbnails": ("Pictures of the question", "问题的图片"),
    "#chat [role=log]": ("Conversation", "对话"),
    "#chat [data-testid=user]": ("You", "你"),
    "#chat [data-testid=bot]": ("Answer", "回答"),
    "#chat [data-minimind=copy]": ("Copy", "复制"),
    "#chat [data-minimind=retry]": ("Regenerate", "重新生成"),
    "#chat [data-minimind=undo]": ("Edit the question", "修改问题"),
    "#chat [data-minimind=fullscreen]": ("Enlarge the picture", "放大图片"),
    "#look_picture img": ("Where it looks", "它看的地方"),
    "#look_picture [title=Fullscreen]": ("Enlarge the picture", "放大图片"),
    "#tools_button": ("Settings", "设置"),
    "#language": ("Language", "语言"),
    ".toast-close": ("Close", "关闭"),
}


def text(key: str, language: str, **values: Any) -> str:
    """One text in "en" or "zh", its values filled in."""
    return TEXTS[key][list(LANGUAGES.values()).index(language)].format(**values)


def page_language(accept_language: str | None) -> str:
    """The language that a browser's Accept-Language header puts first."""
    return "zh" if (accept_language or "").strip().lower().startswith("zh") else "en"


def browser_words() -> str:
    """The words that the page's script needs, as JavaScript."""
    words = {code: {"name": name, "title": text("page", code)} for name, code in LANGUAGES.items()}
    names = {selector: list(translations) for selector, translations in NAMES.items()}
    data = json.dumps({"languages": words, "names": names, "errors": CHINESE}, ensure_ascii=False)
    return f"const MINIMIND_WORDS = {data};"
