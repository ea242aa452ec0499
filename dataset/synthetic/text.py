"""Owns the texts about scenes of the sample world, in English and Chinese.

No answer of a record can be read from the turns before it:
1. the number of shapes is asked first, before any shape is named;
2. at most one question asks for a place, and no other question names that place;
3. a question asks for a shape's colour or shape only if no question about it names that.
"""

from dataclasses import dataclass
from random import Random

from dataset.synthetic.scenes import CHARACTERS, COLOURS, LEFT_OUT, PLACES, SHAPES, Item, Scene

LANGUAGES = ("en", "zh")
PLACE_TURN_SHARE = 0.8  # of the records ask for a place; as many ask for the number
MAX_PIECES = 3  # how often the style "pieces" names a shape at most
NUM_RESTATED = 12  # pieces of a text that repeats a scene's shapes
NUM_LISTED = 10  # pieces of the answer that lists a picture's shapes again and again
STYLES = ("sentences", "table", "pieces")

# What a uniform guess among the type's answers scores.
CHANCE = {
    "count": 1 / 4,
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "position": 1 / len(PLACES),
    "character": 1 / len(CHARACTERS),
    "compare": 1 / 2,
    "combination": (1 / len(COLOURS) + 1 / len(SHAPES)) / 2,  # asks as often for one as the other
}

CHINESE = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星",
    "cross": "十字形", "heart": "心形",
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "purple": "紫色", "white": "白色", "black": "黑色",
    "top left": "左上角", "top right": "右上角", "bottom left": "左下角", "bottom right": "右下角",
    "small": "小的", "medium": "中等的", "large": "大的",
    "plain": "", "striped": "条纹", "dotted": "圆点", "checked": "格子",
    "the first": "第一张", "the second": "第二张",
    "nothing": "空",
}  # fmt: skip

# (type, how the shape is named) -> ways to ask.
QUESTIONS = {
    "en": {
        ("count", None): ("How many shapes are there?", "How many shapes do you see?",
                          "Count the shapes."),
        ("character", None): ("Which letter or digit is in the picture?",
                              "What letter or digit do you see?"),
        ("shape", "only"): ("What shape is it?", "Which shape is in the picture?"),
        ("shape", "place"): ("What shape is at the {place}?", "Which shape do you see at the "
                             "{place}?"),
        ("shape", "colour"): ("What shape is {colour}?", "Which shape is the {colour} one?"),
        ("colour", "only"): ("What colour is the shape?", "What color is it?"),
        ("colour", "place"): ("What colour is the shape at the {place}?",
                              "Which color is at the {place}?"),
        ("colour", "shape"): ("What colour is the {shape}?", "Which color is the {shape}?"),
        ("position", "only"): ("Where is the shape?", "Where is it?"),
        ("position", "shape"): ("Where is the {shape}?", "In which corner is the {shape}?"),
        ("position", "colour"): ("Where is the {colour} shape?",
                                 "In which corner is the {colour} shape?"),
        ("position", "both"): ("Where is the {colour} {shape}?",
                               "In which corner is the {colour} {shape}?"),
        ("compare", "count"): ("Which picture has more shapes?",
                               "In which picture are there more shapes?"),
        ("compare", "shape"): ("Which picture has a {shape}?", "In which picture is a {shape}?"),
        ("compare", "colour"): ("Which picture has a {colour} shape?",
                                "In which picture is something {colour}?"),
        ("caption", None): ("Describe the picture.", "What is in the picture?",
                            "Provide a brief description of the given image."),
        ("list", None): ("List the shapes over and over.",),
    },
    "zh": {
        ("count", None): ("图中有几个图形？", "有多少个图形？", "数一数图形的个数。"),
        ("character", None): ("图中写着哪个字母或数字？", "你看到了哪个字母或数字？"),
        ("shape", "only"): ("这是什么形状？", "图中的图形是什么形状？"),
        ("shape", "place"): ("{place}是什么形状？", "{place}的图形是什么形状？"),
        ("shape", "colour"): ("{colour}的图形是什么形状？", "什么形状是{colour}的？"),
        ("colour", "only"): ("图形是什么颜色？", "它是什么颜色的？"),
        ("colour", "place"): ("{place}的图形是什么颜色？", "{place}是什么颜色？"),
        ("colour", "shape"): ("{shape}是什么颜色？", "{shape}的颜色是什么？"),
        ("position", "only"): ("图形在哪里？", "它在哪个角？"),
        ("position", "shape"): ("{shape}在哪里？", "{shape}在哪个角？"),
        ("position", "colour"): ("{colour}的图形在哪里？", "{colour}的图形在哪个角？"),
        ("position", "both"): ("{colour}{shape}在哪里？", "{colour}{shape}在哪个角？"),
        ("compare", "count"): ("哪张图的图形更多？", "哪张图里有更多的图形？"),
        ("compare", "shape"): ("哪张图里有{shape}？", "{shape}在哪张图里？"),
        ("compare", "colour"): ("哪张图里有{colour}的图形？", "{colour}的图形在哪张图里？"),
        ("caption", None): ("描述一下这张图片。", "图中有什么？", "简要描述这张图片。"),
        ("list", None): ("反复列出图中的图形。",),
    },
}  # fmt: skip


@dataclass(frozen=True)
class QuestionAnswer:
    """A turn: question, its only right answer, its type (of `CHANCE`, "caption" or "list")."""

    question: str
    answer: str
    type: str


def word(name: str, language: str) -> str:
    """A word of the sample world in a language."""
    return name if language == "en" else CHINESE[name]


def ask(
    rng: Random, language: str, type_: str, reference: str | None, *, answer: str, **names: str
) -> QuestionAnswer:
    """A turn of a type, worded at random; `names` and `answer` are the English words."""
    wording = rng.choice(QUESTIONS[language][type_, reference])
    names = {name: word(value, language) for name, value in names.items()}
    answer = CHINESE.get(answer, answer) if language == "zh" else answer
    return QuestionAnswer(wording.format(**names), answer, type_)


def scene_turns(
    scene: Scene, rng: Random, *, language: str = "en", num_turns: int = 8
) -> list[QuestionAnswer]:
    """Up to `num_turns` questions about a scene, each with exactly one right answer."""
    turns = []
    if rng.random() < PLACE_TURN_SHARE:
        turns.append(ask(rng, language, "count", None, answer=str(len(scene.items))))
    if scene.character is not None:
        turns.append(ask(rng, language, "character", None, answer=scene.character))
    references = {item: _references(item, scene) for item in scene.items}
    named = [item for item in scene.items if references[item] != ["place"]]
    located = rng.choice(named) if named and rng.random() < PLACE_TURN_SHARE else None
    others = []
    for item in scene.items:
        reference = rng.choice(references[item])
        if item is located:
            by_name = [name for name in references[item] if name != "place"]
            reference = rng.choice(by_name)
            if {"shape", "colour"} <= set(by_name) and rng.random() < 1 / 3:
                reference = "both"
            turns.append(_item_turn(item, rng, language, "position", reference))
        others += item_turns(item, rng, language=language, reference=reference)
    rng.shuffle(others)
    return (turns + others)[:num_turns]


def item_turns(item: Item, rng: Random, *, language: str, reference: str) -> list[QuestionAnswer]:
    """Questions about a shape that is named by its place, its shape, its colour, both, or as the
    only one: those for its colour and its shape that the name does not answer."""
    types = [t for t in ("shape", "colour") if reference not in (t, "both")]
    return [_item_turn(item, rng, language, t, reference) for t in types]


def combination_turns(scene: Scene, rng: Random, *, language: str = "en") -> list[QuestionAnswer]:
    """Shape and colour of the one shape that is of a held-out pair (the scene's first)."""
    reference = "only" if len(scene.items) == 1 else "place"
    turns = item_turns(scene.items[0], rng, language=language, reference=reference)
    rng.shuffle(turns)
    return [QuestionAnswer(turn.question, turn.answer, "combination") for turn in turns]


def pair_turns(
    first: Scene, second: Scene, rng: Random, *, language: str = "en"
) -> list[QuestionAnswer]:
    """Questions that compare two pictures; each of the two is the answer equally often.

    Where a question has no single answer (as many shapes in both) it is left out.
    """
    turns = []
    if len(first.items) != len(second.items):
        more = "the first" if len(first.items) > len(second.items) else "the second"
        turns.append(ask(rng, language, "compare", "count", answer=more))
    for attribute in ("shape", "colour"):
        seen = [{getattr(item, attribute) for item in s.items} for s in (first, second)]
        alone = [sorted(seen[0] - seen[1]), sorted(seen[1] - seen[0])]
        if all(alone):  # else the answer would follow from which picture has more in it
            which = rng.randrange(2)
            name = {attribute: rng.choice(alone[which])}
            answer = ("the first", "the second")[which]
            turns.append(ask(rng, language, "compare", attribute, answer=answer, **name))
    rng.shuffle(turns)
    return turns


def _references(item: Item, scene: Scene) -> list[str]:
    """The ways to name a shape that fit no other one of the scene."""
    if len(scene.items) == 1:
        return ["only"]
    unique = [
        name
        for name in ("shape", "colour")
        if sum(getattr(other, name) == getattr(item, name) for other in scene.items) == 1
    ]
    return ["place", *unique]


def _item_turn(
    item: Item, rng: Random, language: str, type_: str, reference: str
) -> QuestionAnswer:
    names = {"place": item.place, "shape": item.shape, "colour": item.colour}
    answer = item.place if type_ == "position" else names[type_]
    return ask(rng, language, type_, reference, answer=answer, **names)


def caption(scene: Scene, rng: Random, *, language: str = "en") -> str:
    """A sentence that names every shape with size, texture, colour and place, in any order."""
    parts = [_phrase(item, language) for item in rng.sample(scene.items, len(scene.items))]
    count = len(parts)
    if language == "zh":
        text = "，".join(parts) + "。"
        if rng.random() < 0.5:
            text = f"图中有{count}个图形：{text}"
        return text + (f"还写着{scene.character}。" if scene.character else "")
    text = parts[0] if count == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    if rng.random() < 0.5:
        text = f"there {'is 1 shape' if count == 1 else f'are {count} shapes'}: {text}"
    text = text[0].upper() + text[1:] + "."
    return text + (f" The picture also shows {scene.character}." if scene.character else "")


def caption_turn(scene: Scene, rng: Random, *, language: str = "en") -> QuestionAnswer:
    """A request to describe the picture, and its caption."""
    return ask(rng, language, "caption", None, answer=caption(scene, rng, language=language))


def list_turn(
    scene: Scene, rng: Random, *, language: str = "en", num_listed: int = NUM_LISTED
) -> QuestionAnswer:
    """A request to list the shapes over and over, and the list.

    Most words of the list follow from the picture and the word before: after "red" comes the
    shape or the place of the red shape. So an answer has many target tokens that need such a
    look-up, where the answer to a question has one.
    """
    pieces = [
        _piece(rng.choice(scene.items), rng, language, with_size=False) for _ in range(num_listed)
    ]
    return ask(rng, language, "list", None, answer=_join(pieces, language))


def _phrase(item: Item, language: str) -> str:
    place, size, texture = (word(n, language) for n in (item.place, item.size, item.texture))
    colour, shape = word(item.colour, language), word(item.shape, language)
    if language == "zh":
        return f"{place}有一个{size}{texture}{colour}{shape}"
    texture = "" if item.texture == "plain" else texture + " "
    return f"a {size} {texture}{colour} {shape} at the {place}"


def scene_in_words(
    scene: Scene, rng: Random, *, language: str = "en", style: str = "sentences"
) -> str:
    """A description of a scene, to stand where a picture would.

    Args:
        style: "sentences" is a caption; "table" has a line for each quadrant; "pieces" names
            every shape once or more, in random order and with its words in random order, as
            each patch of a picture shows a part of it.
    Raises:
        ValueError: an unknown style.
    """
    if style == "sentences":
        return caption(scene, rng, language=language)
    if style == "table":
        return _table(scene, language)
    if style == "pieces":
        return _pieces(scene, rng, language)
    raise ValueError(f"style {style!r} is unknown; expected one of {', '.join(STYLES)}")


def _table(scene: Scene, language: str) -> str:
    content = {item.place: item for item in scene.items}
    gap, lines = " " if language == "en" else "", []
    for place in PLACES:
        if place in content:
            item = content[place]
            names = [n for n in (item.size, item.colour, item.shape) if n != LEFT_OUT]
            words = gap.join(word(n, language) for n in names)
        elif scene.character is not None and place == scene.character_place:
            words = scene.character
        else:
            words = word("nothing", language)
        lines.append(f"{word(place, language)}: {words}")
    return "\n".join(lines)


def _pieces(scene: Scene, rng: Random, language: str) -> str:
    items = [item for item in scene.items for _ in range(rng.randint(1, MAX_PIECES))]
    pieces = [_piece(item, rng, language) for item in items]
    if scene.character is not None and scene.character_place is not None:
        gap = " " if language == "en" else ""
        pieces.append(gap.join((word(scene.character_place, language), scene.character)))
    rng.shuffle(pieces)
    return _join(pieces, language)


def _join(pieces: list[str], language: str) -> str:
    return (", " if language == "en" else "，").join(pieces)


def _piece(item: Item, rng: Random, language: str, *, with_size: bool = True) -> str:
    names = [item.colour, item.shape, item.place]
    if with_size and rng.random() < 0.5:
        names.append(item.size)
    rng.shuffle(names)
    return (" " if language == "en" else "").join(word(name, language) for name in names)


def restate(scene: Scene, rng: Random, *, language: str = "en") -> str:
    """A text that names a scene's shapes again and again, the words of each in random order.

    To predict the next word, a model has to look up the earlier mention of the same shape; so it
    has to for every question about a scene.
    """
    pieces = [_piece(rng.choice(scene.items), rng, language) for _ in range(NUM_RESTATED)]
    return _join(pieces, language)
