"""Owns the report of a data set as lines of text."""

from collections.abc import Iterator
from typing import Any

from dataset.examining.faults import FaultBook

BAR_WIDTH = 40  # characters
NUM_LINES = 20  # of a histogram
BLOCKS = " ▏▎▍▌▋▊▉█"


def report_lines(
    figures: dict[str, Any], faults: FaultBook, *, num_shown: int, tokens_per_s: float | None
) -> Iterator[str]:
    """The report, line by line.

    Args:
        figures: of `summarise`, with "files", "num_faulty", "blank_lines" and perhaps "leakage".
        num_shown: faults of a kind that are listed.
        tokens_per_s: what training takes a second, if it is known.
    """
    yield from _overview(figures)
    yield from _tokens(figures["tokens"])
    yield from _epoch(figures["epoch"], tokens_per_s)
    yield from _images(figures["images"])
    yield from _answers(figures)
    if "leakage" in figures:
        yield from _leakage(figures["leakage"])
    yield from fault_lines(faults, num_shown)


def share(part: int, whole: int) -> str:
    """A number with its share of another."""
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def hours(tokens: int, tokens_per_s: float) -> str:
    """How long so many tokens take."""
    minutes = tokens / tokens_per_s / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.1f} minutes"


def spread_of(values: dict[str, int], *names: str) -> str:
    """Percentiles in words."""
    if not values:
        return "none"
    words = {"p0": "least", "p50": "median", "p100": "most"}
    return ", ".join(f"{words.get(name, name)} {values[name]:,}" for name in names)


def _overview(figures: dict[str, Any]) -> Iterator[str]:
    good, bad = figures["records"], figures["num_faulty"]
    yield f"records: {good + bad:,} in {', '.join(figures['files'])}"
    yield f"  usable {good:,}, with faults {share(bad, good + bad)}"
    if figures["blank_lines"]:
        yield f"  blank lines, without a record: {figures['blank_lines']:,}"
    yield f"turns: {figures['turns']:,}; a record: " + spread_of(
        figures["turns_of_a_record"], "p0", "p50", "p95", "p100"
    )
    languages = figures["languages"].items()
    yield "languages of the answers: " + (
        ", ".join(f"{name} {share(n, good)}" for name, n in languages) or "none"
    )
    if figures["with_system_message"]:
        yield f"with a system message: {share(figures['with_system_message'], good)}"
    if figures["with_unread_tools"]:
        yield f"with 'tools' in a message, which are not read: {figures['with_unread_tools']:,}"


def _tokens(tokens: dict[str, Any]) -> Iterator[str]:
    names = ("p0", "p5", "p50", "p95", "p99", "p100")
    yield "tokens a record: " + spread_of(tokens["percentiles"], *names)
    num = sum(count for _, _, count in tokens["histogram"])
    for low, high, count in _merged(tokens["histogram"]):
        yield f"  {low:>7,} to {high - 1:>7,} {_bar(count / num)} {count:,}"
    yield (
        f"cut by --max_seq_len {tokens['max_seq_len']}: {share(tokens['num_cut'], num)}, which "
        f"loses {tokens['lost_by_cuts']:,} tokens"
    )
    yield "supervised tokens a sample: " + spread_of(tokens["supervised_percentiles"], *names)


def _merged(bars: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """A histogram with at most `NUM_LINES` bars."""
    step = max(1, -(-len(bars) // NUM_LINES))
    groups = [bars[i : i + step] for i in range(0, len(bars), step)]
    return [(group[0][0], group[-1][1], sum(bar[2] for bar in group)) for group in groups]


def _bar(part: float) -> str:
    eighths = round(part * BAR_WIDTH * 8)
    return ("█" * (eighths // 8) + BLOCKS[eighths % 8]).ljust(BAR_WIDTH + 1)


def _epoch(epoch: dict[str, Any], tokens_per_s: float | None) -> Iterator[str]:
    yield (
        f"an epoch: {epoch['tokens']:,} tokens, of them {epoch['image_tokens']:,} of images and "
        f"{epoch['supervised_tokens']:,} supervised; {epoch['steps']:,} steps of "
        f"{epoch['batch_size']}; {epoch['padded_tokens']:,} tokens with padding"
    )
    if tokens_per_s:
        yield f"  at {tokens_per_s:,.0f} tokens a second: {hours(epoch['tokens'], tokens_per_s)}"


def _images(images: dict[str, Any]) -> Iterator[str]:
    of_a_record = ", ".join(f"{n} ({c:,} records)" for n, c in images["of_a_record"].items())
    yield f"images: {images['total']:,}, {images['distinct']:,} distinct; a record: {of_a_record}"
    if not images["total"]:
        return
    sides = ("p0", "p50", "p100")
    yield f"  width: {spread_of(images['width'], *sides)}; height: " + spread_of(
        images["height"], *sides
    )
    yield "  bytes: " + spread_of(images["bytes"], *sides)
    sizes = (f"{w}x{h} {share(n, images['total'])}" for w, h, n in images["most_frequent_sizes"])
    yield "  most frequent sizes: " + ", ".join(sizes)
    yield (
        f"  near-duplicates: {share(images['near_duplicates'], images['distinct'])} in "
        f"{images['near_duplicate_groups']:,} groups"
    )


def _answers(figures: dict[str, Any]) -> Iterator[str]:
    answers, records = figures["answers"], figures["records"]
    yield (
        f"answers: {answers['distinct']:,} distinct; {share(answers['repeated'], records)} repeat "
        f"another; near-duplicates: {share(answers['near_duplicates'], answers['distinct'])} in "
        f"{answers['near_duplicate_groups']:,} groups"
    )
    yield f"records that repeat another: {share(figures['repeated_records'], records)}"


def _leakage(leakage: dict[str, Any]) -> Iterator[str]:
    yield (
        f"overlap with the held-out set ({leakage['held_out_records']:,} records): "
        f"{leakage['leaking_records']:,} records leak; {leakage['equal_pictures']:,} pictures "
        f"equal, {leakage['like_pictures']:,} alike; {leakage['equal_records']:,} records equal; "
        f"{leakage['equal_answers']:,} answers equal"
    )


def fault_lines(faults: FaultBook, num_shown: int) -> Iterator[str]:
    """Faults by kind, `num_shown` of each with file and line."""
    yield f"faults: {len(faults):,}" if len(faults) else "faults: none"
    for kind in faults.by_count():
        yield f"  {kind}: {faults.counts[kind]:,}"
        examples = faults.examples[kind][:num_shown]
        yield from (f"    {fault}" for fault in examples)
        if len(examples) < faults.counts[kind]:
            yield f"    and {faults.counts[kind] - len(examples):,} more: --faults FILE lists all"
