"""`python -m benchmarks.plot_curves`: one curve per run, or one line that says why there is none."""

import math
import xml.etree.ElementTree

import pytest

from benchmarks.plot_curves import main
from pipeline.storage.metrics_file import MetricsFile


def write_run(folder, values):
    folder.mkdir(parents=True)
    file = MetricsFile(folder / "metrics.jsonl", -1)
    for step, value in enumerate(values):
        file.add(step, {"val/elbo": value})
    file.close()
    return folder


@pytest.mark.parametrize("values", [[-3.0, math.nan, -1.0, math.inf, 2.0], [5.0, 5.0, 5.0]], ids=["rising", "constant"])
def test_a_curve_has_the_finite_values(tmp_path, values):
    runs = [write_run(tmp_path / place / "a<b", values) for place in "xy"]
    assert main([*map(str, runs), "--out", str(tmp_path / "curve.svg")]) == 0
    picture = xml.etree.ElementTree.parse(tmp_path / "curve.svg").getroot()
    lines = picture.findall("{*}polyline")
    points = [[tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in lines]
    finite = [value for value in values if math.isfinite(value)]
    assert [len(curve) for curve in points] == [len(finite)] * 2
    heights = [y for _, y in points[0]]
    assert heights == sorted(heights, reverse=True)  # y grows downwards in an SVG
    assert {text.text for text in picture.findall("{*}text")} >= {*map(str, runs), "val/elbo"}


def test_runs_of_one_name_share_a_color_and_an_entry_over_minutes_of_training(tmp_path):
    clocks = {"a": [60, 120, 240], "b": [60, 180, 300], "c": [30, 60, 120]}
    for run, seconds in clocks.items():
        (tmp_path / run).mkdir()
        file = MetricsFile(tmp_path / run / "metrics.jsonl", -1)
        for step, clock in enumerate(seconds):
            file.add(step, {"val/elbo": float(step), "perf/wall_clock_s": clock})
        file.close()
    words = [f"nvae={tmp_path}/a", f"nvae={tmp_path}/b", f"vdvae={tmp_path}/c"]
    assert main([*words, "--over", "minutes", "--out", str(tmp_path / "x.svg")]) == 0
    picture = xml.etree.ElementTree.parse(tmp_path / "x.svg").getroot()
    lines = picture.findall("{*}polyline")
    assert [line.get("stroke") == lines[0].get("stroke") for line in lines] == [True, True, False]
    texts = [text.text for text in picture.findall("{*}text")]
    assert [texts.count(word) for word in ("nvae", "vdvae", "minutes", "5")] == [1, 1, 1, 1]
    ends = [float(line.get("points").split()[-1].split(",")[0]) for line in lines]
    left = float(picture.find("{*}path").get("d")[1:].split()[0])
    assert [(end - left) / (ends[1] - left) for end in ends] == pytest.approx([4 / 5, 1, 2 / 5], abs=0.001)
    assert main([*words[:2], "--over", "minutes", "--start", "2", "--out", str(tmp_path / "x.svg")]) == 0
    picture = xml.etree.ElementTree.parse(tmp_path / "x.svg").getroot()
    first = [float(line.get("points").split()[0].split(",")[0]) for line in picture.findall("{*}polyline")]
    assert [(x - left) / (ends[1] - left) for x in first] == pytest.approx([0, 1 / 3], abs=0.001)


def test_wrong_input_is_explained_in_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", [1.0])
    for words, message in (
        ([str(tmp_path / "nope")], "nope/metrics.jsonl: no such file; give run folders of pipeline/train.py"),
        ([str(run)], "needs two values of it in"),
        ([str(run), "--key", "val/elbow"], "it has: val/elbo"),
    ):
        assert main([*words, "--out", str(tmp_path / "x.svg")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()
