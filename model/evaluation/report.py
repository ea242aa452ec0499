"""Owns the report of scored records: figures with intervals, tables, the comparison of two weights.

Intervals are the middle 95% of a bootstrap. It draws pictures with replacement, each with all of
its records and all of its figures, so differences between conditions and weights are paired.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from model.evaluation.evaluator import CONDITIONS, AnswerRow, CaptionRow, TextRow
from model.evaluation.statistics import NUM_RESAMPLES, interval, resample, wilson_lower_bound
from model.evaluation.text_metrics import (
    CiderD,
    bleu,
    chrf,
    jieba_bleu,
    papers_bleu,
    vqa_accuracy,
)

TOTALS = ("right", "total", "loss_sum", "num_tokens")
BOOTSTRAP_SEED = 0
BOOTSTRAP = {
    "unit": "picture, with all of its records",
    "resamples": NUM_RESAMPLES,
    "seed": BOOTSTRAP_SEED,
    "level": 0.95,
}
LABELS = {  # figure -> (what the table calls it, number format)
    "loss": ("loss, nats per token", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "gap_shuffled": ("gap: another record's image", ".4f"),
    "gap_grey": ("gap: grey image", ".4f"),
    "gap_blind": ("gap: no image", ".4f"),
    "exact_match": ("exact match", ".1%"),
    "recall": ("right caption likeliest", ".1%"),
    "recall_shuffled": ("  with another's image", ".1%"),
    "gain_recall": ("right caption gains most", ".1%"),
    "gain_recall_shuffled": ("  with another's image", ".1%"),
    "cider_d": ("CIDEr-D", ".3f"),
    "vqa_accuracy": ("VQA accuracy", ".1%"),
}
PLAIN_LABELS = {  # without interval; of BLEU a list, for 1- to 4-grams
    "bleu": ("BLEU-1 to 4", ".1f"),
    "papers_bleu": ("BLEU-1 to 4, papers' way", ".1f"),
    "jieba_bleu": ("BLEU-1 to 4, jieba's words", ".1f"),
    "chrf": ("chrF", ".2f"),
}


@dataclass
class Results:
    """All rows of a data set, from every rank, in order.

    Args:
        references: of every captioned picture, by language; the document frequencies of CIDEr-D
            come from them.
        decoding: how the texts were generated, as `Sampling.decoding` has it.
    """

    answers: list[AnswerRow]
    captions: list[CaptionRow] = field(default_factory=list)
    texts: list[TextRow] = field(default_factory=list)
    references: dict[str, list[list[str]]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    decoding: dict[str, float] = field(default_factory=dict)

    @cached_property
    def ciders(self) -> dict[str, CiderD]:
        """CIDEr-D of each language that has two captioned pictures or more."""
        return {k: CiderD(texts) for k, texts in self.references.items() if len(texts) > 1}

    @property
    def languages(self) -> list[str]:
        """ "all", then each that occurs; "all" alone where there is only one."""
        found = sorted({row.language for row in self.answers})
        return ["all", *found] if len(found) > 1 else ["all"]


def unit_sums(results: Results, language: str) -> dict[tuple[str, ...], Counter[str]]:
    """The counts and sums behind the figures, of each picture's rows in a language."""
    sums: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in results.answers:
        if language in ("all", row.language):
            own = sums[row.unit]
            right = row.scores["right"]
            own.update(loss=right.loss_sum, tokens=right.num_tokens, hits=right.is_right, answers=1)
            for condition in CONDITIONS[1:]:
                if other := row.scores.get(condition):
                    own[f"gap_{condition}"] += other.loss_sum - right.loss_sum
                    own[f"tokens_{condition}"] += right.num_tokens
    for caption in results.captions:
        if language in ("all", caption.language):
            for kind, found in (("", caption.is_right), ("gain_", caption.gains_most)):
                for condition, is_right in found.items():
                    sums[caption.unit][f"{kind}recall_{condition}"] += is_right
                    sums[caption.unit][f"{kind}captions_{condition}"] += 1
    for text in results.texts:
        if language in ("all", text.language):
            if not text.is_caption:
                sums[text.unit].update(vqa=vqa_accuracy(text.answer, text.references), questions=1)
            elif text.language in results.ciders:
                cider = results.ciders[text.language].score(text.answer, text.references)
                sums[text.unit].update(cider=cider, texts=1)
    return sums


def figures(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The figures of summed columns: of all units, or of each resample."""
    nothing = np.zeros_like(sums["answers"])

    def ratio(top: str, bottom: str) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums.get(top, nothing) / sums.get(bottom, nothing)

    loss = ratio("loss", "tokens")
    gaps = {f"gap_{c}": ratio(f"gap_{c}", f"tokens_{c}") for c in CONDITIONS[1:]}
    return {
        "loss": loss,
        "perplexity": np.exp(loss),
        **gaps,
        "exact_match": ratio("hits", "answers"),
        "recall": ratio("recall_right", "captions_right"),
        "recall_shuffled": ratio("recall_shuffled", "captions_shuffled"),
        "gain_recall": ratio("gain_recall_right", "gain_captions_right"),
        "gain_recall_shuffled": ratio("gain_recall_shuffled", "gain_captions_shuffled"),
        "cider_d": ratio("cider", "texts"),
        "vqa_accuracy": ratio("vqa", "questions"),
    }


def _resampled(
    sums: dict[tuple[str, ...], Counter[str]], units: list[tuple[str, ...]]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Figures of all units, and of each resample of them."""
    columns = sorted({name for counts in sums.values() for name in counts})
    table = np.array([[sums[unit][name] for name in columns] for unit in units], dtype=float)
    whole = dict(zip(columns, table.sum(0, keepdims=True).T, strict=True))
    drawn = dict(zip(columns, resample(table, seed=BOOTSTRAP_SEED).T, strict=True))
    return figures(whole), figures(drawn)


def language_figures(results: Results, language: str) -> dict[str, Any]:
    """Every figure of a language that has rows, with its interval but for BLEU-4 and chrF."""
    sums = unit_sums(results, language)
    whole, drawn = _resampled(sums, sorted(sums))
    report: dict[str, Any] = {n: interval(float(whole[n][0]), drawn[n]) for n in LABELS}
    rows = [r for r in results.answers if language in ("all", r.language)]
    captions = [c for c in results.captions if language in ("all", c.language)]
    report |= {"num_answers": len(rows), "num_pictures": len(sums), "num_captions": len(captions)}
    if captions:
        report["recall_chance"] = float(np.mean([1 / c.num_candidates for c in captions]))
    texts = [t for t in results.texts if t.is_caption and t.language == language]
    if results.languages == ["all"]:
        texts = [t for t in results.texts if t.is_caption]
    if texts:
        report |= text_figures(texts)
    report["num_generated"] = sum(language in ("all", t.language) for t in results.texts)
    return {name: value for name, value in report.items() if value is not None}


def text_figures(texts: list[TextRow]) -> dict[str, Any]:
    """BLEU and chrF of generated captions in one language."""
    language = texts[0].language
    pair = [t.answer for t in texts], [t.references for t in texts]
    by_order = bleu(*pair, language=language)
    figures: dict[str, Any] = {"bleu": by_order, "bleu_4": by_order[-1], "chrf": chrf(*pair)}
    if language == "en":
        figures["papers_bleu"] = papers_bleu(*pair)
    if language == "zh":
        figures["jieba_bleu"] = jieba_bleu(*pair)
    return figures


def totals_by_type(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """Sums by condition and question type, and over all: right, total, loss_sum, num_tokens."""
    totals: dict[str, Any] = {c: defaultdict(lambda: dict.fromkeys(TOTALS, 0)) for c in CONDITIONS}
    for row in results.answers:
        for condition, score in row.scores.items():
            for name in ["all", *([row.type] if row.type else [])]:
                cell = totals[condition][name]
                cell["right"] += score.is_right
                cell["total"] += 1
                cell["loss_sum"] += score.loss_sum
                cell["num_tokens"] += score.num_tokens
    return {condition: dict(cells) for condition, cells in totals.items()}


def vqa_by_type(results: Results) -> dict[str, dict[str, Any]]:
    """VQA accuracy of generated short answers by question type, and over all."""
    scores = defaultdict(list)
    for text in results.texts:
        if not text.is_caption:
            accuracy = vqa_accuracy(text.answer, text.references)
            for name in ["all", *([text.type] if text.type else [])]:
                scores[name].append(accuracy)
    return {name: {"accuracy": float(np.mean(s)), "total": len(s)} for name, s in scores.items()}


def build_report(results: Results) -> dict[str, Any]:
    """Everything that goes into the JSON."""
    languages = {name: language_figures(results, name) for name in results.languages}
    gap = languages["all"].get("gap_shuffled")
    return totals_by_type(results) | {
        "grounding_gap": gap["value"] if gap else None,
        "languages": languages,
        "vqa_by_type": vqa_by_type(results),
        "left_out": dict(results.left_out),
        "generated": [
            {
                "record": text.index,
                "turn": text.turn,
                "images": list(text.unit),
                "language": text.language,
                "answer": text.answer,
                "references": text.references,
            }
            for text in results.texts
        ],
        "decoding": results.decoding,
        "bootstrap": BOOTSTRAP,
    }


def compare(first: Results, second: Results) -> dict[str, dict[str, Any]]:
    """The second's figures minus the first's, by language, on the answers that both have.

    Raises:
        ValueError: there is no such answer.
    """
    common = {(r.index, r.turn) for r in first.answers} & {
        (r.index, r.turn) for r in second.answers
    }
    if not common:
        raise ValueError("no record could be scored with both weights; see what was left out")
    report = {}
    first, second = (_only(results, {index for index, _ in common}) for results in (first, second))
    for language in first.languages:
        sums = [unit_sums(results, language) for results in (first, second)]
        units = sorted(sums[0])
        (before, drawn_before), (after, drawn_after) = (_resampled(s, units) for s in sums)
        found = {
            n: interval(float((after[n] - before[n])[0]), drawn_after[n] - drawn_before[n])
            for n in LABELS
        }
        report[language] = {name: value for name, value in found.items() if value is not None}
    return report


def _only(results: Results, indices: set[int]) -> Results:
    """The rows of these records."""
    return Results(
        answers=[r for r in results.answers if r.index in indices],
        captions=[r for r in results.captions if r.index in indices],
        texts=[r for r in results.texts if r.index in indices],
        references=results.references,
    )


def _plain(figure: float | list[float], form: str) -> str:
    if isinstance(figure, list):
        return " ".join(format(one, form) for one in figure)
    return format(figure, form)


def _with_interval(figure: dict[str, float], form: str) -> str:
    value, low, high = (format(figure[k], form) for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def print_figures(by_language: dict[str, dict[str, Any]]) -> None:
    """A row for each figure, a column for each language."""
    print(f"\n{'[95% interval]':30}" + "".join(f"{name:>28}" for name in by_language))
    for name, label in (("num_answers", "answers"), ("num_generated", "answers generated")):
        if any(cells.get(name) for cells in by_language.values()):
            print(f"{label:30}" + "".join(f"{c.get(name, ''):>28}" for c in by_language.values()))
    for name, (label, form) in (LABELS | PLAIN_LABELS).items():
        cells = [c[name] if name in c else None for c in by_language.values()]
        if all(cell is None for cell in cells):
            continue
        if name in ("recall", "gain_recall") and (
            chance := by_language["all"].get("recall_chance")
        ):
            label += f" ({chance:.1%})"
        show = _plain if name in PLAIN_LABELS else _with_interval
        shown = ("" if cell is None else show(cell, form) for cell in cells)
        print(f"{label:30}" + "".join(f"{text:>28}" for text in shown))


def print_report(report: dict[str, Any]) -> None:
    """Exact matches by question type; then the figures.

    Beside the share with the right images stand its one-sided 95% lower bound and the shares under
    the other conditions.
    """
    if report["left_out"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in report["left_out"].items())
        print(f"{sum(report['left_out'].values())} record(s) are left out: {reasons}")
    conditions = "".join(f"{c:>10}" for c in CONDITIONS[1:])
    print(f"{'type':14}{'answers':>8}{'right':>8}{'>= (95%)':>10}{conditions}{'VQA':>8}")
    for name in sorted(report["right"], key=lambda name: name == "all"):
        print(_type_line(report, name))
    print_figures(report["languages"])
    gap = report["grounding_gap"]
    if gap is None:
        print("grounding gap: no record has another one's image to compare with")
    else:
        print(f"grounding gap: {gap:.4f} nats per supervised token")


def _type_line(report: dict[str, Any], name: str) -> str:
    """The row of a question type."""
    cell = report["right"][name]
    share, bound = cell["right"] / cell["total"], wilson_lower_bound(cell["right"], cell["total"])
    others = (report[c].get(name) for c in CONDITIONS[1:])
    shares = [f"{o['right'] / o['total']:>10.1%}" if o else f"{'-':>10}" for o in others]
    vqa = report["vqa_by_type"].get(name)
    line = f"{name:14}{cell['total']:>8}{share:>8.1%}{bound:>10.1%}" + "".join(shares)
    return line + (f"{vqa['accuracy']:>8.1%}" if vqa else "")
