"""Every model on the same task: binarized MNIST, Bernoulli pixels, the same test images; a row of a table for each.

    python -m benchmarks.models --data data/mnist

Images are padded to 32x32, which the models see and the likelihood does not count: 784 dimensions for all. How long
each is trained is its own (column "epochs"): these are figures of this table, not what the models can reach.
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
FLAT = ("train.batch_size=128", "train.epochs=5", "optim.lr=1e-3")
MODELS = {
    "mlp_vae": ("--model", "mlp_vae", *FLAT),
    "mlp_vae, 8 planar flows": ("--model", "mlp_vae", *FLAT, "model.flows={name: planar, length: 8}"),
    "mlp_vae, 2 autoregressive flows": ("--model", "mlp_vae", *FLAT, "model.flows={name: iaf, length: 2}"),
    "mlp_cvae (told the class)": ("--model", "mlp_cvae", *FLAT),
    "conv_vae": ("--model", "conv_vae", *FLAT),
    "resnet_vae": ("--model", "resnet_vae", *FLAT, "train.epochs=0.1", "train.batch_size=64"),
    "nvae (recipe nvae_mnist_small)": ("--model", "nvae_mnist_small"),
}


def run(*command: str) -> str:
    """What a command of this project prints. Raises RuntimeError with its errors where it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


def rows(parsed: argparse.Namespace, folder: Path) -> Iterator[str]:
    """A Markdown row for each model."""
    for number, name in enumerate(parsed.models):
        run_dir = folder / f"run{number}"
        words = [*MODELS[name], *COMMON, "--data", parsed.data, "--run-dir", str(run_dir), f"checkpoint.every={10**9}"]
        run("pipeline/train.py", *words, *parsed.words)
        report = run_dir / "report.json"
        asked = ["--split", "test", "--images", parsed.images, "--importance-samples", parsed.importance_samples]
        run("pipeline/evaluate.py", str(run_dir), *map(str, asked), "--out", str(report))
        yield row(name, run_dir, json.loads(report.read_text())["figures"])


def row(name: str, run_dir: Path, figures: dict[str, float]) -> str:
    """Parameters, seconds per epoch by the median speed, what was trained, and the figures."""
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
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME", help="which")
    parser.add_argument("--images", type=int, default=2000, help="test images that are evaluated (default: 2000)")
    parser.add_argument("--importance-samples", type=int, default=20, help="draws per image (default: 20)")
    parser.add_argument("words", nargs="*", metavar="section.key=value", help="settings for all")
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
