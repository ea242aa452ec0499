"""Draws the curves of training runs: metrics files -> one PNG, several runs overlaid.

    python -m trainer.plot
    python -m trainer.plot out/a_512_metrics.jsonl out/b_512_metrics.jsonl --out compare.png

Every complete run draws its own curves beside its metrics; this draws those of a running or
stopped one, or compares several. Without names: all metrics files in `out/`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.machine.paths import OUT_DIR
from model.options import OnceParser
from trainer.tracking.curves import METRICS_SUFFIX, write_curves


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OnceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("metrics", nargs="*", type=Path, help=f"files NAME{METRICS_SUFFIX} / 指标文件")
    add("--out", type=Path, default=OUT_DIR / "curves.png", help="the PNG / 输出图片")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_args(argv)
    try:
        paths = args.metrics or sorted(OUT_DIR.glob(f"*{METRICS_SUFFIX}"))
        paths = list(dict.fromkeys(path.expanduser().resolve() for path in paths))
        if not paths:
            raise FileNotFoundError(
                f"no *{METRICS_SUFFIX} in {OUT_DIR}; name the metrics files to draw"
            )
        write_curves(paths, args.out.expanduser())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"curves of {len(paths)} run(s): {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
