"""Owns the report of a data set as one HTML page with its pictures in it."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from dataset.examining.exhibits import Exhibit, Pair, Shown
from dataset.examining.faults import FaultBook
from dataset.examining.text_report import hours, share, spread_of

STYLE = """
:root{--ink:#1f2328;--soft:#656d76;--line:#d8dee4;--ground:#f6f8fa;--accent:#3b6fd4;
--text:#eceff2;--supervised:#b7e1cd;--image:#aecbfa}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0}h2{font-size:18px;margin:36px 0 12px}h2 small{color:var(--soft);
font-weight:400;margin-left:8px;white-space:nowrap}
.files{color:var(--soft);overflow-wrap:anywhere;margin:2px 0 18px}
.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(128px,1fr))}
.box,.card{background:#fff;border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.box b{display:block;font-size:24px;font-weight:600;font-variant-numeric:tabular-nums}
.box span{color:var(--soft);font-size:13px}
.box.bad b{color:#b42318}.box.good b{color:#1a7f37}
.two{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr))}
.card h3{margin:0 0 8px;font-size:15px}.card p{margin:6px 0 0;color:var(--soft);font-size:13px}
table{border-collapse:collapse;width:100%}td{padding:5px 8px;border-top:1px solid var(--line);
vertical-align:top}tr:first-child td{border-top:0}td.n{text-align:right;white-space:nowrap;width:1%;
font-variant-numeric:tabular-nums}td.k{color:var(--soft);white-space:nowrap;width:1%;padding-right:18px}
td:first-child{padding-left:0}
svg{display:block;width:100%;height:150px;border-bottom:1px solid var(--line)}
.axis{display:flex;justify-content:space-between;color:var(--soft);font-size:12px;
font-variant-numeric:tabular-nums;margin-top:3px}
details{border-top:1px solid var(--line);padding:8px 0}details:first-child{border-top:0}
summary{cursor:pointer;font-weight:600}summary em{font-style:normal;color:#b42318;margin-left:6px}
.fault{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere;
margin:4px 0 0 18px}.fault b{font-weight:600}
.record{display:grid;grid-template-columns:240px 1fr;gap:18px;margin-bottom:12px}
.record.plain{grid-template-columns:1fr}
.record img,.pair img{width:100%;border-radius:6px;display:block;margin-bottom:8px}
.where{font:12px ui-monospace,Menlo,Consolas,monospace;color:var(--soft);overflow-wrap:anywhere;
margin-bottom:8px}
.prompt{line-height:1.8;overflow-wrap:anywhere}
.prompt i{font-style:normal;padding:2px 0;border-radius:3px;margin-right:1px;white-space:pre-wrap}
.prompt .text{background:var(--text)}.prompt .supervised{background:var(--supervised)}
.prompt .image{background:var(--image);padding:2px 8px}
.legend{display:flex;gap:18px;flex-wrap:wrap;color:var(--soft);font-size:13px;margin:0 0 12px}
.legend i{display:inline-block;width:14px;height:14px;border-radius:4px;vertical-align:-2px;
margin-right:6px}
.pairs{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(340px,1fr))}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:10px}.pair div{font-size:13px}
@media(max-width:720px){.record{grid-template-columns:1fr;gap:8px}
.grid{grid-template-columns:1fr 1fr}.box:last-child:nth-child(odd){grid-column:1/-1}}
"""


def render(
    figures: dict[str, Any], faults: FaultBook, shown: Shown, *, tokens_per_s: float | None
) -> str:
    """The page; `figures` as in `report_lines`."""
    parts = [
        _boxes(figures, faults),
        _heading("Tokens", "长度"),
        _token_cards(figures["tokens"]),
        _heading("Contents", "内容"),
        _tables(figures, tokens_per_s),
        _heading("Faults", "问题"),
        _fault_list(faults),
        *_pairs("Pictures also in the held-out set", "与留出集重复的图片", shown.leaks),
        *_pairs("Near-duplicate pictures", "近似重复的图片", shown.near_pictures),
        *_pairs("Near-duplicate answers", "近似重复的回答", shown.near_answers),
        *_frequent(shown.frequent_answers),
        _heading("Samples as training sees them", "训练所见的样本"),
        _legend(),
        *(_record(sample) for sample in shown.samples),
    ]
    files = ", ".join(figures["files"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(files)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>Data report</h1><p class="files">{_text(files)}</p>'
        + "\n".join(parts)
        + "</main></body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _heading(english: str, chinese: str) -> str:
    return f"<h2>{english}<small>{chinese}</small></h2>"


def _boxes(figures: dict[str, Any], faults: FaultBook) -> str:
    images, tokens = figures["images"], figures["tokens"]["percentiles"]
    boxes = [
        ("", f"{figures['records']:,}", "usable records"),
        ("bad" if len(faults) else "good", f"{len(faults):,}", "faults"),
        ("", f"{figures['turns']:,}", "turns"),
        ("", f"{images['distinct']:,}", "distinct images"),
        ("", f"{tokens.get('p50', 0):,}", "tokens a record, median"),
        ("", _short(figures["epoch"]["tokens"]), "tokens an epoch"),
    ]
    if "leakage" in figures:
        leaking = figures["leakage"]["leaking_records"]
        boxes.append(("bad" if leaking else "good", f"{leaking:,}", "records that leak"))
    cells = (f'<div class="box {look}"><b>{n}</b><span>{w}</span></div>' for look, n, w in boxes)
    return f'<div class="grid">{"".join(cells)}</div>'


def _short(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _token_cards(tokens: dict[str, Any]) -> str:
    names = ("p0", "p5", "p50", "p95", "p99", "p100")
    num = sum(bar[2] for bar in tokens["histogram"])
    limit = tokens["max_seq_len"]
    cut = f"--max_seq_len {limit} cuts {share(tokens['num_cut'], num)}"
    cards = (
        ("Tokens a record", tokens["histogram"], limit, tokens["percentiles"], f"{cut}."),
        ("Supervised tokens", tokens["supervised_histogram"], None,
         tokens["supervised_percentiles"], "The loss counts these alone."),
    )  # fmt: skip
    return '<div class="two">' + "".join(
        f'<div class="card"><h3>{title}</h3>{_chart(bars, limit)}'
        f"<p>{_text(spread_of(values, *names))}. {_text(note)}</p></div>"
        for title, bars, limit, values, note in cards
    ) + "</div>"  # fmt: skip


def _chart(bars: Sequence[Sequence[int]], limit: int | None) -> str:
    """A histogram; bars at and above the limit are red."""
    if not bars:
        return ""
    most, width = max(bar[2] for bar in bars), 100 / len(bars)
    shapes = []
    for i, (low, high, count) in enumerate(bars):
        tall = 96 * count / most
        colour = "#d1495b" if limit is not None and low > limit else "#3b6fd4"
        shapes.append(
            f'<rect x="{i * width:.3f}" y="{100 - tall:.2f}" width="{width * 0.92:.3f}" '
            f'height="{tall:.2f}" fill="{colour}">'
            f"<title>{low:,} to {high - 1:,}: {count:,}</title></rect>"
        )
    first, last = bars[0][0], bars[-1][1] - 1
    marks = "".join(f"<span>{first + (last - first) * i // 4:,}</span>" for i in range(5))
    return (
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img">'
        f'{"".join(shapes)}</svg><div class="axis">{marks}</div>'
    )


def _tables(figures: dict[str, Any], tokens_per_s: float | None) -> str:
    return (
        f'<div class="two">{_table("Records", _record_rows(figures))}'
        f"{_table('Images', _image_rows(figures['images']))}"
        f"{_table('An epoch', _epoch_rows(figures['epoch'], tokens_per_s))}"
        f"{_table('Repetition', _repetition_rows(figures))}</div>"
    )


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    cells = (f'<tr><td class="k">{_text(k)}</td><td>{_text(v)}</td></tr>' for k, v in rows)
    return f'<div class="card"><h3>{title}</h3><table>{"".join(cells)}</table></div>'


def _record_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    good, bad = figures["records"], figures["num_faulty"]
    languages = (f"{name} {share(n, good)}" for name, n in figures["languages"].items())
    rows = [
        ("usable", share(good, good + bad)),
        ("with faults", share(bad, good + bad)),
        ("turns a record", spread_of(figures["turns_of_a_record"], "p0", "p50", "p100")),
        ("languages", ", ".join(languages) or "none"),
        ("system message", share(figures["with_system_message"], good)),
    ]
    if figures["with_unread_tools"]:
        rows.append(("'tools', not read", share(figures["with_unread_tools"], good)))
    return rows


def _image_rows(images: dict[str, Any]) -> list[tuple[str, str]]:
    sides = ("p0", "p50", "p100")
    sizes = (f"{w}x{h} {share(n, images['total'])}" for w, h, n in images["most_frequent_sizes"])
    of_a_record = ", ".join(f"{n} ({c:,} records)" for n, c in images["of_a_record"].items())
    return [
        ("in all", f"{images['total']:,}, {images['distinct']:,} distinct"),
        ("of a record", of_a_record or "none"),
        ("width", spread_of(images["width"], *sides)),
        ("height", spread_of(images["height"], *sides)),
        ("bytes", spread_of(images["bytes"], *sides)),
        ("frequent sizes", ", ".join(sizes) or "none"),
    ]


def _epoch_rows(epoch: dict[str, Any], tokens_per_s: float | None) -> list[tuple[str, str]]:
    rows = [
        ("tokens", f"{epoch['tokens']:,}"),
        ("of images", share(epoch["image_tokens"], epoch["tokens"])),
        ("supervised", share(epoch["supervised_tokens"], epoch["tokens"])),
        ("with padding", f"{epoch['padded_tokens']:,}"),
        ("steps", f"{epoch['steps']:,} of {epoch['batch_size']} samples"),
    ]
    if tokens_per_s:
        rows.append((f"at {tokens_per_s:,.0f} tokens/s", hours(epoch["tokens"], tokens_per_s)))
    return rows


def _repetition_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    images, answers, records = figures["images"], figures["answers"], figures["records"]
    rows = [
        ("equal records", share(figures["repeated_records"], records)),
        ("equal answers", share(answers["repeated"], records)),
        ("answers alike", _groups(answers)),
        ("pictures alike", _groups(images)),
    ]
    if "leakage" in figures:
        leakage = figures["leakage"]
        rows += [
            ("leaking records", share(leakage["leaking_records"], records)),
            ("held-out pictures", f"{leakage['equal_pictures']:,} equal, "
             f"{leakage['like_pictures']:,} alike"),
            ("held-out answers", f"{leakage['equal_answers']:,} equal"),
        ]  # fmt: skip
    return rows


def _groups(counted: dict[str, Any]) -> str:
    members = share(counted["near_duplicates"], counted["distinct"])
    return f"{members} in {counted['near_duplicate_groups']:,} groups"


def _fault_list(faults: FaultBook) -> str:
    if not len(faults):
        return '<div class="card">None: every record can be trained on.</div>'
    groups = []
    for kind in faults.by_count():
        examples = faults.examples[kind]
        lines = "".join(
            f'<div class="fault"><b>{_text(f.where)}</b> {_text(f.message)}</div>' for f in examples
        )
        more = faults.counts[kind] - len(examples)
        lines += f'<div class="fault">and {more:,} more</div>' if more else ""
        count = f"<em>{faults.counts[kind]:,}</em>"
        groups.append(f"<details open><summary>{_text(kind)}{count}</summary>{lines}</details>")
    return f'<div class="card">{"".join(groups)}</div>'


def _where(exhibit: Exhibit) -> str:
    """A record's place, its folder only where the mouse rests."""
    return f'<span title="{_text(exhibit.where)}">{_text(exhibit.where.rsplit("/", 1)[-1])}</span>'


def _images_of(exhibit: Exhibit) -> str:
    return "".join(f'<img alt="" src="{_text(url)}">' for url in exhibit.pictures)


def _pairs(english: str, chinese: str, pairs: Sequence[Pair]) -> list[str]:
    if not pairs:
        return []
    cards = (
        '<div class="card pair">'
        + "".join(
            f'<div>{_images_of(one)}<div class="where">{_where(one)}</div>{_text(one.answer)}</div>'
            for one in pair
        )
        + "</div>"
        for pair in pairs
    )
    return [_heading(english, chinese), f'<div class="pairs">{"".join(cards)}</div>']


def _frequent(answers: Sequence[tuple[Exhibit, int]]) -> list[str]:
    if not answers:
        return []
    rows = (
        f'<tr><td class="n">{count:,} times</td><td>{_text(exhibit.answer)}</td></tr>'
        for exhibit, count in answers
    )
    table = f'<div class="card"><table>{"".join(rows)}</table></div>'
    return [_heading("Most frequent answers", "最常见的回答"), table]


def _legend() -> str:
    kinds = (
        ("image", "image placeholders"), ("text", "text, not supervised"),
        ("supervised", "supervised: the loss counts it"),
    )  # fmt: skip
    marks = (f'<span><i style="background:var(--{k})"></i>{words}</span>' for k, words in kinds)
    return f'<div class="legend">{"".join(marks)}</div>'


def _record(sample: Exhibit) -> str:
    pieces = []
    for span in sample.spans:
        text = span.text.replace("\n", "↵")
        pieces.append(f'<i class="{span.kind}">{_text(text)}</i>')
        if span.text.endswith("\n"):
            pieces.append("<br>")
    counts = f"{sample.num_tokens:,} tokens, {sample.num_supervised:,} supervised"
    prompt = (
        f'<div><div class="where">{_where(sample)} · {counts}</div>'
        f'<div class="prompt">{"".join(pieces)}</div></div>'
    )
    if not sample.pictures:
        return f'<div class="card record plain">{prompt}</div>'
    return f'<div class="card record"><div>{_images_of(sample)}</div>{prompt}</div>'
