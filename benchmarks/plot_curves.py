"""Draws one figure of several runs over their steps, as an SVG file.

python -m benchmarks.plot_curves runs/a runs/b --key val/elbo --label "ELBO, nats" --out curve.svg
"""

import argparse
import json
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 640, 360, 56
COLOURS = ("#2a6fbb", "#d1632b", "#3d8f4f", "#8a4fb0", "#b03a5b")

Points = list[tuple[float, float]]


def read_points(run: Path, key: str, sign: int) -> Points:
    """(step, value) of every record that has the key."""
    records = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], sign * record[key]) for record in records if key in record]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    return [low + (high - low) * i / count for i in range(count + 1)]


class Axes:
    """Data coordinates to picture coordinates."""

    def __init__(self, curves: list[Points]):
        steps = [step for curve in curves for step, _ in curve]
        values = [value for curve in curves for _, value in curve]
        self.left, self.right = 0, max(steps)
        pad = 0.05 * (max(values) - min(values))
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


def draw(curves: dict[str, Points], label: str) -> str:
    """The SVG text: a line and its points for each run, a grid, and the runs' names."""
    axes = Axes(list(curves.values()))
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    parts += [level(axes, value) for value in ticks(axes.bottom, axes.top)]
    for step in ticks(axes.left, axes.right):
        x = axes.x(step)
        parts += [f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{step:g}</text>']
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">step</text>')
    parts.append(f'<text x="{MARGIN}" y="{MARGIN / 2 - 8}">{label}</text>')
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{axes.x(s):.1f}" cy="{axes.y(v):.1f}" r="3" fill="{colour}"/>' for s, v in points]
        parts.append(f'<text x="{WIDTH - 170}" y="{MARGIN / 2 + 18 * number + 14}" fill="{colour}">{name}</text>')
    style = 'font-family="sans-serif" font-size="12"'
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with a metrics.jsonl")
    parser.add_argument("--key", default="val/elbo", help="the figure (default val/elbo)")
    parser.add_argument("--negate", action="store_true", help="draw it with the other sign")
    parser.add_argument("--label", default="", help="what stands above the picture")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file")
    arguments = parser.parse_args()
    curves = {run.name: read_points(run, arguments.key, -1 if arguments.negate else 1) for run in arguments.runs}
    empty = [name for name, points in curves.items() if len(points) < 2]
    if empty:
        parser.error(f"no curve of {arguments.key} in {', '.join(empty)}")
    arguments.out.write_text(draw(curves, arguments.label or arguments.key))


if __name__ == "__main__":
    main()
