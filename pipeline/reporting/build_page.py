"""From run folders to one HTML page that needs nothing else."""

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.reporting import tables
from pipeline.reporting.curves import SECTIONS, Chart, clock, curves_within, heat_map, plan_charts, restarts
from pipeline.reporting.data_set import DataSet, describe_data
from pipeline.reporting.pictures import Gallery, build_gallery
from pipeline.reporting.run_folder import Run
from pipeline.reporting.summary import Summary, summarize
from pipeline.reporting.text import moment

PAGE = Path(__file__).parent / "page"
MAX_CURVE_BYTES = 1_200_000
MAX_PICTURE_BYTES = 900_000
"""Of WebP, which takes a third more in the page."""
MAX_SHEET_BYTES = 100_000
MAX_RUNS = 12
"""In one page; more curves than that cannot be distinguished."""
MAX_OPEN_SETTINGS = 15
"""More settings that differ are folded, so that the curves are near."""
REFRESH_SECONDS = 5


@dataclass(frozen=True)
class Options:
    """What the user asks of a report."""

    contact_sheet: bool = False
    """Show the first pictures of the data set also where they may show people."""
    version: str = ""
    """Of a page that asks its server for news: what the server calls the present state of the runs."""


@dataclass(frozen=True)
class RunView:
    """One run as the template shows it."""

    name: str
    run: Run
    summary: Summary
    gallery: Gallery
    data: DataSet
    notes: list[str]


def build_page(runs: Sequence[Run], options: Options = Options()) -> str:
    """The page. Raises ValueError for more runs than a page can show."""
    if len(runs) > MAX_RUNS:
        raise ValueError(f"{len(runs)} runs are too many for one page; give at most {MAX_RUNS}")
    charts = plan_charts(runs)
    curves, max_ranges = curves_within(runs, charts, MAX_CURVE_BYTES)
    views = view_runs(runs, options)
    drawn = {
        "runs": [drawn_run(view, curve) for view, curve in zip(views, curves, strict=True)],
        "charts": [asdict(chart) for chart in charts],
        "refresh": {"version": options.version, "seconds": REFRESH_SECONDS} if options.version else None,
    }
    return render(views, charts, drawn, max_ranges)


def view_runs(runs: Sequence[Run], options: Options) -> list[RunView]:
    """The runs with their pictures and data, which share the bytes of the page."""
    picture_bytes = MAX_PICTURE_BYTES // max(1, sum(bool(run.pictures) for run in runs))
    views, shown_sets = [], set()
    for run, name in zip(runs, distinct_names(runs), strict=True):
        gallery = build_gallery(run.pictures, picture_bytes)
        data = describe_data(run, options.contact_sheet, MAX_SHEET_BYTES // len(runs))
        if data.fingerprint in shown_sets:
            data.sheet = ""
        shown_sets.add(data.fingerprint)
        notes = [*run.notes, *not_finite(run), *gallery.notes[:5]]
        views.append(RunView(name, run, summarize(run), gallery, data, notes))
    return views


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """The folders' names; where two are equal, the folders as they were given; of one folder given twice, a number."""
    names = [run.name for run in runs]
    names = [str(run.folder) if names.count(run.name) > 1 else run.name for run in runs]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def not_finite(run: Run) -> list[str]:
    """A sentence for each curve with values that cannot be drawn."""
    return [
        f"{key} was not finite at {curve.not_finite:,} of its steps, first at step {curve.first_not_finite:,}."
        for key, curve in run.history.curves.items()
        if curve.not_finite
    ][:5]


def drawn_run(view: RunView, curves: dict[str, Any]) -> dict[str, Any]:
    """What the script draws of one run."""
    history = view.run.history
    return {
        "name": view.name,
        "curves": curves,
        "clock": clock(history),
        "groups": {name: heat_map(history, name) for name in history.groups},
        "restarts": restarts(history),
        "steps": view.gallery.steps,
        "pictures": view.gallery.pictures,
        "sizes": view.gallery.sizes,
    }


def render(views: list[RunView], charts: list[Chart], drawn: dict[str, Any], max_ranges: int) -> str:
    """The HTML of the page. Whatever comes from a run is escaped; the script and the style are this project's own."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    scripts = [own_file("uplot/uPlot.iife.min.js"), own_file("report.js")]
    return environment.get_template("report.html").render(
        views=views,
        tables=tables,
        comparison=tables.comparison_table([view.run for view in views]),
        sections=[section for section in SECTIONS if any(chart.section == section for chart in charts)],
        styles=[own_file("uplot/uPlot.min.css"), own_file("report.css")],
        scripts=scripts,
        script_hashes=[sha256_source(script) for script in scripts],
        drawn=json_for_html(drawn),
        max_ranges=max_ranges,
        max_open_settings=MAX_OPEN_SETTINGS,
        made=moment(time.time()),
        has_groups=any(run["groups"]["kl"] for run in drawn["runs"]),
        has_clock=any(run["clock"] for run in drawn["runs"]),
        has_pictures=any(view.gallery.steps for view in views),
        refresh=drawn["refresh"] is not None,
    )


def own_file(name: str) -> Markup:
    """A script or a style of this project, which is not escaped."""
    return Markup((PAGE / name).read_text(encoding="utf-8"))  # noqa: S704 - not from a run


def sha256_source(script: str) -> Markup:
    """The source of a Content-Security-Policy that allows this script alone."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'")  # noqa: S704


def json_for_html(content: Any) -> Markup:
    """JSON that can stand in a script element: no text in it ends the element or begins a comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    escaped = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(escaped)  # noqa: S704 - escaped above
