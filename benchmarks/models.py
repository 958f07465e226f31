"""Trains and evaluates every model on binarized MNIST, and prints a table with one row per model.

    python -m benchmarks.models --data data/mnist

Bernoulli pixels, the same test images. Images are padded to 32x32 for the models, but the likelihood is over 784
dimensions. The training times differ (column "epochs"), so the figures do not show what the models can reach.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMON = (
    "data.size=28", "data.channels=1", "data.pad=2", "data.binarize=dynamic", "model.likelihood={name: bernoulli}",
    "objective.beta=1", "validation.split=test", "validation.every=0", "samples.every=0", "checkpoint.every=0",
    "tracking.wandb=disabled", "tracking.log_every=20",
)  # fmt: skip
BASELINE = ("train.batch_size=128", "train.epochs=5", "optim.lr=1e-3")
MODELS = {
    "mlp_vae": ("--model", "mlp_vae", *BASELINE),
    "mlp_vae, 8 planar flows": ("--model", "mlp_vae", *BASELINE, "model.flows={name: planar, length: 8}"),
    "mlp_vae, 2 autoregressive flows": ("--model", "mlp_vae", *BASELINE, "model.flows={name: iaf, length: 2}"),
    "mlp_cvae (conditioned on the class)": ("--model", "mlp_cvae", *BASELINE),
    "conv_vae": ("--model", "conv_vae", *BASELINE),
    "resnet_vae": ("--model", "resnet_vae", *BASELINE, "train.epochs=0.1", "train.batch_size=64"),
    "nvae (recipe nvae_mnist_small)": ("--model", "nvae_mnist_small"),
}


def run(*command: str) -> str:
    """The output of a command of this project. Ends this one with its errors if it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


def rows(parsed: argparse.Namespace, folder: Path) -> Iterator[str]:
    """A Markdown row for each model."""
    for number, name in enumerate(parsed.models):
        run_dir = folder / f"run{number}"
        arguments = [
            *MODELS[name],
            *COMMON,
            "--data",
            parsed.data,
            "--run-dir",
            str(run_dir),
            f"checkpoint.every={10**9}",
        ]
        run("pipeline/train.py", *arguments, *parsed.overrides)
        report = run_dir / "report.json"
        arguments = ["--split", "test", "--images", parsed.images, "--importance-samples", parsed.importance_samples]
        if parsed.images_seed is not None:
            arguments += ["--images-seed", parsed.images_seed]
        run("pipeline/evaluate.py", str(run_dir), *map(str, arguments), "--out", str(report))
        yield row(name, run_dir, json.loads(report.read_text())["figures"])


def row(name: str, run_dir: Path, figures: dict[str, float]) -> str:
    """Parameters, seconds per epoch at the median speed, epochs of training, and the figures."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(r["perf/images_per_second"] for r in records if "perf/images_per_second" in r)
    images = max(record.get("samples_seen", 0) for record in records)
    parameters = int(run("-c", COUNT_PARAMETERS, str(run_dir)))
    return (
        f"| {name} | {parameters:,} | {60_000 / speed:,.0f} | {images / 60_000:.2g} | {-figures['elbo']:.1f} | "
        f"{figures['nll']:.1f} | {figures['bpd']:.4f} | {figures['bpd_nll']:.4f} |"
    )


COUNT_PARAMETERS = """
import sys, pipeline
print(sum(parameter.numel() for parameter in pipeline.load(sys.argv[1]).model.parameters()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="shard set of MNIST")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--images", type=int, default=2000, help="test images that are evaluated (default: 2000)")
    parser.add_argument("--images-seed", type=int, help="these are random ones, with this seed (default: the first)")
    parser.add_argument("--importance-samples", type=int, default=20, help="per image (default: 20)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    parsed = parser.parse_args()
    print(
        "| model | parameters | seconds per epoch | epochs | -ELBO, nats | NLL, nats | bits/dim, ELBO | bits/dim, NLL |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in rows(parsed, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
