"""Draws one figure of several runs over their steps, or over the minutes of training, as an SVG file.

python -m benchmarks.plot_curves runs/a runs/b --key val/elbo --label "ELBO, nats" --out curve.svg
python -m benchmarks.plot_curves nvae=runs/a nvae=runs/b vdvae=runs/c --over minutes --out curve.svg
"""

import argparse
import math
import sys
from html import escape
from pathlib import Path

from pipeline.storage.metrics_file import read_records

WIDTH, HEIGHT, MARGIN = 640, 360, 56
COLORS = ("#2a6fbb", "#d1632b", "#3d8f4f", "#8a4fb0", "#b03a5b")

OVER = {"step": ("step", 1), "minutes": ("perf/wall_clock_s", 60)}  # the x-axis: a figure, and what to divide it by

Points = list[tuple[float, float]]


def read_points(run: Path, key: str, sign: int, over: str = "step", start: float = 0) -> Points:
    """(x, value) of each record from `start` on where the figure is finite. Raises ValueError for fewer than two."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give run folders of pipeline/train.py")
    (axis, unit), names, points = OVER[over], set(), []
    for record in read_records(path):
        names |= record.keys() - {"step", "time"}
        if math.isfinite(record.get(key, math.nan)) and record.get(axis, -1) / unit >= start:
            points.append((record[axis] / unit, sign * record[key]))
    if len(points) < 2:
        known = f"it has: {', '.join(sorted(names))}" if key not in names else f"it has {len(points)}"
        raise ValueError(f"--key {key}: a curve needs two values of it in {path}; {known}")
    return points


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    return [low + (high - low) * i / count for i in range(count + 1)]


class Axes:
    """Data coordinates to picture coordinates."""

    def __init__(self, curves: list[Points], start: float):
        steps = [x for curve in curves for x, _ in curve]
        values = [value for curve in curves for _, value in curve]
        self.left, self.right = start, max(steps)
        pad = 0.05 * (max(values) - min(values)) or 1.0
        self.bottom, self.top = min(values) - pad, max(values) + pad

    def x(self, step: float) -> float:
        return MARGIN + (WIDTH - 1.5 * MARGIN) * (step - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 1.5 * MARGIN) * (value - self.bottom) / (self.top - self.bottom)


def level(axes: Axes, value: float) -> str:
    """A line across the picture at a value, with its number."""
    y = axes.y(value)
    number = f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.1f}</text>'
    return f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN / 2}" stroke="#ddd"/>{number}'


def draw(curves: list[tuple[str, Points]], label: str, over: str, start: float) -> str:
    """The SVG text: a line and its points for each curve, a grid, and the names. One color for each name."""
    axes = Axes([points for _, points in curves], start)
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    parts += [level(axes, value) for value in ticks(axes.bottom, axes.top)]
    for value in ticks(axes.left, axes.right):
        x = axes.x(value)
        parts += [f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{value:.3g}</text>']
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">{over}</text>')
    parts.append(f'<text x="{MARGIN}" y="{MARGIN / 2 - 8}">{escape(label)}</text>')
    colors = {
        name: COLORS[number % len(COLORS)] for number, name in enumerate(dict.fromkeys(name for name, _ in curves))
    }
    for name, points in curves:
        path = " ".join(f"{axes.x(x):.1f},{axes.y(value):.1f}" for x, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colors[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(v):.1f}" r="3" fill="{colors[name]}"/>' for x, v in points]
    for number, (name, color) in enumerate(colors.items()):
        place = f'x="{WIDTH - MARGIN / 2}" y="{MARGIN / 2 + 18 * number + 14}" text-anchor="end"'
        parts.append(f'<text {place} fill="{color}">{escape(name)}</text>')
    style = 'font-family="sans-serif" font-size="12"'
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def named(word: str) -> tuple[str, Path]:
    """NAME=RUN, or RUN, whose name is its path."""
    name, equals, run = word.partition("=")
    return (name, Path(run)) if equals else (word, Path(word))


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0; 2 for a run without such a figure, and for a file that cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_curves", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "runs", nargs="+", type=named, metavar="[NAME=]RUN", help="run folders; runs of one name have one color"
    )
    parser.add_argument("--key", default="val/elbo", help="name of the figure in metrics.jsonl (default: val/elbo)")
    parser.add_argument("--over", choices=OVER, default="step", help="the x-axis (default: step)")
    parser.add_argument("--start", type=float, default=0, metavar="X", help="leave out what is before X (default: 0)")
    parser.add_argument("--negate", action="store_true", help="draw it with the other sign")
    parser.add_argument("--label", default="", help="text above the picture (default: the key)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the SVG file to write")
    parsed = parser.parse_args(arguments)
    try:
        sign = -1 if parsed.negate else 1
        curves = [(name, read_points(run, parsed.key, sign, parsed.over, parsed.start)) for name, run in parsed.runs]
        parsed.out.write_text(draw(curves, parsed.label or parsed.key, parsed.over, parsed.start))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
