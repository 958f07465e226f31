"""The page of report.py: nothing from a run becomes markup, missing things are named, and the size is bounded."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import report, runs
from pipeline.reporting.build_page import build_page, json_for_html
from pipeline.reporting.run_folder import RunReader
from pipeline.tracking.meters import BY_RANK, extremes

ROOT = Path(__file__).parents[2]
OLD_RUNS = ROOT / "tests/old_runs"
ATTACK = "</script ><script >alert(1)</script ><!--<img src=x onerror=alert(2)>"


class Parsed(HTMLParser):
    """Elements, the texts between them, and addresses."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.texts, self.addresses, self.handlers = [], [], [], []
        self.feed(page)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


def page_of(*folders: Path) -> str:
    return build_page([RunReader(folder).read() for folder in folders])


def make_run(folder: Path, records=(), status=None, config: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if status:
        (folder / "status.json").write_text(json.dumps(status))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def drawn(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="drawn">(.*?)</script>', page, re.S)[1])


def test_a_run_of_an_older_version():
    page = page_of(OLD_RUNS / "nvae")
    parsed = Parsed(page)
    assert "Step 8 of 8" in parsed.text
    assert "finished" in parsed.text
    assert "evaluation_val_step_00000008.json" in parsed.text
    assert "4,114.8" in parsed.text.replace("\u2212", "-")  # its nll
    assert drawn(page)["runs"][0]["groups"]["kl"]["rows"] == ["4x4_group00", "8x8_group00", "8x8_group01"]
    assert "data.binarize" in parsed.text  # as it is called today


def test_text_from_a_run_is_shown_as_text(tmp_path):
    folder = tmp_path / "a<b>&'\"<script>alert(3)"
    run = make_run(
        folder,
        [{"step": 1, "time": 1, ATTACK: 1.0, f"kl/{ATTACK}": 2.0}],
        {"state": "failed", "step": 1, "total_steps": 5, "attempt": 1, "reason": ATTACK, "time": 1.0},
        json.dumps({"model": {"name": ATTACK, ATTACK: ATTACK}, "data": {"root": ATTACK}}),
    )
    (run / "evaluations").mkdir()
    (run / "evaluations" / "x.json").write_text(json.dumps({"figures": {"<script>": 1.0}, "step": ATTACK}))
    (run / "log.txt").write_text(f"2026-11-28 14:15:56,471 ERROR {ATTACK}\n")
    for page in (page_of(run), page_of(run, run)):
        parsed = Parsed(page)
        assert parsed.elements.count("script") == 3  # the data, uPlot, and this project's own
        assert parsed.elements.count("img") == 0
        assert parsed.handlers == []
        assert ATTACK in parsed.text
        assert drawn(page)["runs"][0]["name"].endswith(folder.name)
        assert list(drawn(page)["runs"][0]["curves"]) == [ATTACK]


def test_numbers_and_names_cannot_end_the_element_that_holds_them():
    text = json_for_html({ATTACK: [1.5, ATTACK]})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {ATTACK: [1.5, ATTACK]}


def test_nothing_is_fetched(tmp_path):
    page = page_of(OLD_RUNS / "nvae", OLD_RUNS / "attribute_vae")
    assert all(address.startswith(("data:", "#")) for address in Parsed(page).addresses)
    assert "default-src 'none'" in page
    assert "url(" not in page.replace("'unsafe-inline'", "")


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("metrics.jsonl", "There is no metrics.jsonl, so there are no curves; the rest of the folder is shown."),
        ("config.yaml", "There is no config.yaml, so no settings are shown."),
        ("status.json", "status.json is missing or cannot be read: the state and the number of steps are unknown."),
        ("checkpoints", None),
        ("log.txt", None),
    ],
)
def test_what_is_missing_is_named_and_the_rest_is_shown(tmp_path, missing, sentence):
    run = tmp_path / "run"
    shutil.copytree(OLD_RUNS / "nvae", run)
    shutil.rmtree(run / missing) if (run / missing).is_dir() else (run / missing).unlink()
    text = Parsed(page_of(run)).text
    assert sentence is None or sentence in text
    assert "evaluation_val_step_00000008.json" in text


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(OLD_RUNS / "nvae", run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("torn {\n" + json.dumps({"step": 10, "time": 1, "train/loss": "NaN"}) + "\n")
    (run / "config.yaml").write_text("model: {")
    (run / "evaluations").mkdir()
    (run / "evaluations" / "broken.json").write_text("{")
    (run / "samples").mkdir()
    save(run / "samples" / "step_00000004.png", np.zeros((8, 8, 3)))
    (run / "samples" / "step_00000008.png").write_bytes(b"no picture")
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to("/etc/hostname")
    page = page_of(run)
    text = Parsed(page).text
    for sentence in (
        "1 line of metrics.jsonl cannot be read as a record; skipped.",
        "train/loss was not finite at 1 of its steps, first at step 10.",
        "config.yaml cannot be read, so no settings are shown",
        "evaluations/broken.json is not an evaluation that can be read; skipped.",
        "samples/step_00000008.png cannot be shown",
        "log.txt cannot be read (is a symbolic link, which is refused), so its warnings are not shown.",
    ):
        assert sentence in text
    assert drawn(page)["runs"][0]["steps"] == [4]


def test_a_huge_picture_is_not_decoded(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "samples").mkdir()
    Image.new("1", (9000, 9000)).save(run / "samples" / "step_00000001.png")
    page = page_of(run)
    assert "samples/step_00000001.png cannot be shown" in Parsed(page).text
    assert drawn(page)["runs"][0]["steps"] == []


def test_a_run_that_is_silent_may_have_been_killed(tmp_path):
    status = {"state": "running", "step": 1, "total_steps": 9, "attempt": 1, "reason": "", "time": 1e9}
    text = Parsed(page_of(make_run(tmp_path / "run", [{"step": 2, "time": 1e9}], status))).text
    assert "If no process is training, the run was killed: the same command again continues it." in text


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.mark.slow
def test_a_page_of_long_runs_with_large_pictures_stays_below_3_mb(tmp_path):
    rng = np.random.default_rng(0)
    folders = []
    for name in ("a", "b"):
        keys = ["train/loss", "train/elbo", "val/elbo", *(f"other/{i}" for i in range(60))]
        records = [
            {"step": step, "time": step, **{f"kl/8x8_group{i:02d}": 1.0 for i in range(36)}}
            | dict(zip(keys, rng.normal(size=len(keys)).tolist(), strict=True))
            for step in range(1, 3000)
        ]
        folders.append(make_run(tmp_path / name, records))
        (tmp_path / name / "samples").mkdir()
        for step in range(1, 30):
            pixels = np.kron(rng.integers(0, 255, (130, 130, 3)), np.ones((4, 4, 1)))
            save(tmp_path / name / "samples" / f"step_{step:08d}_temperature_1.png", pixels)
    page = page_of(*folders)
    assert len(page.encode()) < 3_000_000
    content = drawn(page)
    for run in content["runs"]:
        assert 2 <= len(run["steps"]) < 29
        assert (run["steps"][0], run["steps"][-1]) == (1, 29)
    assert re.search(
        rf"a: {len(content['runs'][0]['steps'])} of 29 steps with pictures, evenly spaced", Parsed(page).text
    )


def test_the_curve_of_a_page_holds_the_extremes_of_the_file(tmp_path):
    values = np.random.default_rng(1).normal(size=20_000)
    values[[777, 15_001]] = 50, -60
    records = [{"step": step, "time": 1, "train/loss": value} for step, value in enumerate(values.tolist())]
    steps, shown = drawn(page_of(make_run(tmp_path / "run", records)))["runs"][0]["curves"]["train/loss"]
    assert len(steps) < 2500
    assert shown[steps.index(777)] == 50
    assert shown[steps.index(15_001)] == -60


def test_several_runs_are_compared(tmp_path):
    status = {"state": "finished", "step": 2, "total_steps": 2, "attempt": 1, "reason": "", "time": 1.0}
    for name, bpd, rate in (("a", 3.5, 0.01), ("b", 3.25, 0.02)):
        config = json.dumps({"optim": {"lr": rate}, "train": {"seed": 1}})
        make_run(tmp_path / name, [{"step": 2, "time": 1, "val/bpd": bpd}], status, config)
    page = page_of(tmp_path / "a", tmp_path / "b")
    rows = re.findall(r"<tr>.*?</tr>", page, re.S)
    assert [bool(re.search("wins.*3.250", row)) for row in rows if "finished" in row] == [False, True]
    differing = page[page.index("Settings that differ") : page.index('id="curves"')]
    assert "optim.lr" in differing
    assert "train.seed" not in differing


def test_figures_of_different_splits_have_no_best_of_all(tmp_path):
    for split, elbo in (("val", -90.0), ("test", -80.0)):
        config = json.dumps({"model": {"likelihood": {"name": "bernoulli"}}, "validation": {"split": split}})
        make_run(tmp_path / split, [{"step": 2, "time": 1, "val/elbo": elbo}], {"state": "finished"}, config)
    page = page_of(tmp_path / "val", tmp_path / "test")
    assert "ELBO, nats, val" in page
    assert "ELBO, nats, test" in page
    assert "(best of all)" not in page


def test_figures_of_all_processes_are_in_the_charts_of_the_main_one(tmp_path):
    found = dict.fromkeys(BY_RANK, 2.0)
    record = found | extremes([found, dict.fromkeys(BY_RANK, 1.0)])
    charts = drawn(page_of(make_run(tmp_path / "run", [{"step": 2, "time": 1} | record])))["charts"]
    assert {tuple(chart["keys"]) for chart in charts} == {(name, f"{name}_min", f"{name}_max") for name in BY_RANK}
    assert {chart["section"] for chart in charts} == {"Speed"}


def test_many_settings_that_differ_are_folded(tmp_path):
    for count, folded in ((15, False), (16, True)):
        for name in ("a", "b"):
            config = json.dumps({"model": {f"setting{number}": f"{name}{number}" for number in range(count)}})
            make_run(tmp_path / str(count) / name, [{"step": 2, "time": 1, "val/bpd": 1.0}], None, config)
        page = page_of(tmp_path / str(count) / "a", tmp_path / str(count) / "b")
        differing = page[page.index("Settings that differ") : page.index('id="curves"')]
        assert "model.setting14" in differing
        assert (f"<details><summary>{count} settings</summary>" in differing) == folded


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("x", "y"):
        make_run(tmp_path / parent / "nvae", [{"step": 2, "time": 1, "val/bpd": 1.0}])
    names = [run["name"] for run in drawn(page_of(tmp_path / "x/nvae", tmp_path / "y/nvae"))["runs"]]
    assert names == [str(tmp_path / "x/nvae"), str(tmp_path / "y/nvae")]


def test_the_command(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(OLD_RUNS / "nvae", run)
    assert report.main([str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert report.main([str(run), str(tmp_path / "empty")]) == 2
    assert "not a run folder, as it holds none of config.yaml, metrics.jsonl" in capsys.readouterr().err
    assert report.main([str(run), "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_long_reading_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    """A line per minute where there is no terminal, here after each record; what programs read stays as it is."""
    run = make_run(tmp_path / "run", [{"step": step, "time": 1.0, "train/loss": 3.0} for step in range(1, 5)])
    monkeypatch.setattr("shard_data.terminal.MINUTE", 0.0)
    assert report.main([str(run)]) == 0
    assert [line.split(" MB ")[1][:4] for line in capsys.readouterr().err.splitlines()[:-1]] == ["(25 ", "(50 ", "(75 "]
    assert runs.main([str(tmp_path), "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("metrics: 0.0 of 0.0 MB (") == 3
    assert len(json.loads(shown.out)) == 1


def test_a_report_needs_no_torch():
    code = "import sys; from pipeline import report; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout == "False\n", result.stderr
