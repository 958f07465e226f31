"""The figures of a model card: tables for people, and results for the Hugging Face Hub."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.inference.markdown import code
from pipeline.inference.text import printable

Reports = Mapping[str, Mapping[str, Any]]
"""Evaluations of one model's weights, by the names of their files."""

FIGURES = {
    "nll": "negative log-likelihood, nats",
    "bpd_nll": "negative log-likelihood, bits/dim",
    "elbo": "evidence lower bound, nats",
    "bpd": "negative evidence lower bound, bits/dim",
    "fid": "Frechet inception distance",
    "kid": "kernel inception distance",
    "precision": "precision of samples",
    "recall": "recall of samples",
}
"""The figures that the Hub is given, in the order of the card."""
TITLES = FIGURES | {"log_px": "log-likelihood given the latents, nats", "kl": "KL of posterior and prior, nats"}
CONDITIONS = ("importance_samples", "per_class", "temperature", "seed", "precision", "device")
"""The entries of a report that the card states, where they are there."""
MAX_REPORTS = 20


def tables(reports: Reports) -> str:
    """Figures with their provenance, a table for each report."""
    shown = [_table(file, report) for file, report in list(reports.items())[:MAX_REPORTS] if main_figures(report)]
    if not shown:
        return "No evaluation of these weights was at hand."
    digest = code(next(iter(reports.values())).get("weights_sha256"))
    more = f" {len(reports) - MAX_REPORTS} more evaluations are not shown." if len(reports) > MAX_REPORTS else ""
    return (
        f"Measured by `pipeline/evaluate.py` of nvae-pipeline, with exactly these weights (sha256 {digest}). A number "
        f"after +- is the standard error. Compare bits/dim only for the same data and likelihood.{more}\n\n"
        + "\n\n".join(shown)
    )


def _table(file: str, report: Mapping[str, Any]) -> str:
    rows = [f"| {TITLES.get(name, code(name))} | {_value(name, report)} |" for name in main_figures(report)]
    head = f"On {_images(report)}: {_conditions(report)} ({code(file)})\n\n| figure | value |\n| -- | --: |\n"
    return head + "\n".join(rows)


def main_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a report, those with a title first; without those of single groups or classes, counts, standard
    errors, and figures that are not finite.
    """
    figures = {name: value for name, value in report["figures"].items() if _is_finite(value) and name[-3:] != "_se"}
    figures.pop("skipped_samples", None)
    depth = min((name.count("/") for name in figures), default=0)
    main = {name: value for name, value in figures.items() if name.count("/") == depth}
    return {name: main[name] for name in TITLES if name in main} | main


def hub_results(reports: Reports, data_name: str, datasets: Sequence[str]) -> list[dict[str, Any]]:
    """For the `model-index` of the front matter (`hub.front_matter`)."""
    return [
        {
            "task_type": "unconditional-image-generation",
            "dataset_type": datasets[0] if datasets else data_name,
            "dataset_name": data_name,
            "dataset_split": printable(str(_data(report)["split"])) if "split" in _data(report) else None,
            "metric_type": name,
            "metric_value": value,
            "metric_name": FIGURES[name],
        }
        for report in list(reports.values())[:MAX_REPORTS]
        for name, value in main_figures(report).items()
        if name in FIGURES
    ]


def _value(name: str, report: Mapping[str, Any]) -> str:
    value, error = report["figures"][name], report["figures"].get(f"{name}_se")
    return f"{value:.4f} +- {error:.4f}" if _is_finite(error) else f"{value:.4f}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _data(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a report states about the images; empty where none were read."""
    data = report.get("data")
    return data if isinstance(data, Mapping) else {}


def _images(report: Mapping[str, Any]) -> str:
    data = _data(report)
    if not data:
        return "samples"
    name = data.get("name") or str(data.get("root")).rstrip("/").rpartition("/")[2]
    counts = f"{code(report.get('images'))} of {code(report.get('split_images'))} images"
    fingerprint = code(str(data.get("fingerprint"))[:12])
    return f"{counts} of split {code(data.get('split'))} of {code(name)} (fingerprint {fingerprint}...)"


def _conditions(report: Mapping[str, Any]) -> str:
    data = _data(report)
    stated = {name: report.get(name) for name in CONDITIONS}
    stated |= {name: data[name] for name in ("binarize", "bits") if data.get(name) not in (None, "none", 8)}
    return ", ".join(f"{name.replace('_', ' ')} {code(value)}" for name, value in stated.items() if value is not None)
