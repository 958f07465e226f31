"""Measures a trained model on a split of a shard set.

    python pipeline/evaluate.py runs/nvae --split test --importance-samples 100
    python pipeline/launch.py --config_file accelerate_configs/multi_gpu.yaml pipeline/evaluate.py runs/nvae
    python pipeline/evaluate.py runs/nvae --list

Prints the evidence lower bound, the KL and the active units of each latent group, and with importance samples the
importance-weighted likelihood. With a judge (train_classifier.py), `--metrics edit` gives the share of edits that show
the target attribute and of other attributes that stay, and `--metrics recognition` the share of samples of a class that
are recognized as such. Figures do not depend on the number of processes or the batch size, except for rounding.

Each metric is written, with everything that it depends on, to a file of its own in RUN/evaluations, named after what
was measured. The same evaluation again replaces its file, and the log says so; nothing else is overwritten.
"""

import argparse
import logging
import math
import sys
from pathlib import Path

# A script's own folder comes first on the path; put the project's root there instead, so that `pipeline` is a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli import run_tool  # noqa: E402
from pipeline.data.remote import is_address  # noqa: E402
from pipeline.distributed.agreement import code_version  # noqa: E402
from pipeline.distributed.logs import launched_rank  # noqa: E402
from pipeline.distributed.runtime import Runtime  # noqa: E402
from pipeline.inference.folders import check_split, check_writable, output_folder  # noqa: E402
from pipeline.inference.metrics import (  # noqa: E402
    METRICS,
    Measurement,
    Options,
    check_held_out,
    check_metrics,
    evaluation_recipe,
)
from pipeline.inference.report import (  # noqa: E402
    FOLDER,
    describe_measurement,
    list_reports,
    save_in_run,
    save_report,
    table,
)
from pipeline.inference.text import printable  # noqa: E402
from pipeline.inference.trained import find_checkpoint, load  # noqa: E402
from pipeline.run.classifier_folder import load_classifier  # noqa: E402
from pipeline.run.data import RunData  # noqa: E402

log = logging.getLogger("pipeline")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="the folder of a training run")
    add("--list", action="store_true", help="list the evaluations of RUN and stop")
    add("--data", metavar="DIR", help="shard set, a folder or an address (default: the one that it was trained on)")
    add("--split", default="test", help="split of the set (default: test)")
    add("--metrics", nargs="+", choices=METRICS, default=["elbo"], help="what to measure (default elbo)")
    add("--importance-samples", metavar="N", type=int, default=0, help="latent samples per image for nll (default 0)")
    add("--images", metavar="N", type=int, help="only the first N images of the split")
    add("--batch-size", metavar="N", type=int, default=100, help="images in a pass over all processes (default 100)")
    add("--classifier", metavar="FOLDER", type=Path, help="judge of edit and recognition, of train_classifier.py")
    add("--per-class", metavar="N", type=int, default=1000, help="samples of each class for recognition (default 1000)")
    add("--temperature", metavar="T", type=float, default=1.0, help="of the samples for recognition (default 1)")
    add("--checkpoint", default="latest", help="latest (default), best by validation, a step, or a checkpoint's folder")
    add("--precision", choices=("fp32", "bf16", "fp64"), default="fp32", help="of the computation (default fp32)")
    add("--seed", type=int, help="of the latent noise (default: the run's, as in its validation)")
    add("--threads", metavar="N", type=int, help="CPU threads of each process (default: the cores, shared)")
    add("--out", metavar="FILE.json", type=Path, help="one file for all metrics (default: files in RUN/evaluations)")
    parser.set_defaults(command=sys.argv)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    if arguments is not None:
        parsed.command = [sys.argv[0], *arguments]
    return run_tool(lambda: run(parsed))


def run(parsed: argparse.Namespace) -> None:
    """Evaluates, on the processes that a launcher may have started, or lists evaluations."""
    if parsed.list:
        if launched_rank() == 0:
            print("\n".join(list_reports(parsed.run)) or f"no evaluations in {parsed.run}")
        return
    check_numbers(parsed)
    runtime = Runtime(parsed.precision, parsed.threads)
    with runtime.closing():
        evaluate(parsed, runtime)


def check_numbers(parsed: argparse.Namespace) -> None:
    """Raises ValueError for numbers out of range and a report that cannot be written."""
    if parsed.seed is not None and not 0 <= parsed.seed < 2**63:
        raise ValueError(f"--seed {parsed.seed}: must be from 0 to 2^63 - 1")
    least = {"images": 1, "importance_samples": 0, "batch_size": 1, "per_class": 1, "threads": 1}
    for name, minimum in least.items():
        value = getattr(parsed, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")
    if not 0 <= parsed.temperature < math.inf:
        raise ValueError(f"--temperature {parsed.temperature}: must be a finite number of at least 0")
    if parsed.out is not None and parsed.out.is_dir():
        raise ValueError(f"--out {parsed.out}: is a folder; name a file")


def evaluate(parsed: argparse.Namespace, runtime: Runtime) -> None:
    """From the command line to the reports."""
    # The main process chooses for all: a run that is being trained may write a newer checkpoint at any moment.
    chosen = runtime.run_on_main(lambda: str(find_checkpoint(parsed.run, parsed.checkpoint).path))
    path = runtime.from_main(chosen)
    measurement = prepare(parsed, path, runtime)
    facts = {"code": code_version()}
    if measurement.data is not None:
        facts["data"] = measurement.data.held_out.fingerprint
    runtime.check_agreement(facts)
    names, figures = list(dict.fromkeys(parsed.metrics)), {}
    for name in names:
        log.info("%s", printable(describe_question(name, measurement)))
        found = METRICS[name].measure(measurement)
        if parsed.out is None:
            save(parsed, measurement, [name], found)
        figures |= found
    if parsed.out is not None:
        save(parsed, measurement, names, figures)
    if runtime.is_main:
        print(table(figures))


def prepare(parsed: argparse.Namespace, path: str, runtime: Runtime) -> Measurement:
    """Loads the model, the judge and the data. Raises ValueError, on every rank, for what cannot be measured."""
    metrics = [METRICS[name] for name in parsed.metrics]
    reads_images = any(metric.reads_images for metric in metrics)

    def load_all() -> tuple:
        if parsed.out is None:
            check_writable(output_folder(parsed.run, FOLDER))
        trained = load(parsed.run, path, runtime.device, runtime.dtype)
        options = Options(
            seed=trained.recipe.train.seed if parsed.seed is None else parsed.seed,
            split=parsed.split,
            images=parsed.images,
            importance_samples=parsed.importance_samples,
            temperature=parsed.temperature,
            per_class=parsed.per_class,
            classifier=parsed.classifier,
        )
        check_metrics(parsed.metrics, trained, options)
        judged = any("classifier" in metric.options for metric in metrics)
        judge = load_classifier(parsed.classifier) if judged else None
        recipe = evaluation_recipe(trained.recipe, parsed.data, options, parsed.batch_size)
        if reads_images and not is_address(recipe.data.root) and not recipe.data.holdout:
            check_split(recipe.data.root, parsed.split)
        return trained, options, judge, recipe

    trained, options, judge, recipe = runtime.run_on_all(load_all)
    data = RunData(recipe, runtime, progress=True) if reads_images else None
    if data is not None:
        check_held_out(trained, data)
    return Measurement(trained, runtime, options, data, judge)


def describe_question(name: str, measurement: Measurement) -> str:
    """One line that says what is measured."""
    trained, _, options, data, _ = measurement
    values = {option: getattr(options, option) for option in METRICS[name].options}
    shown = [f"{option.replace('_', ' ')} {value}" for option, value in values.items() if value is not None]
    where = f" on {data.recipe.data.root}" if METRICS[name].reads_images else ""
    return f"{name} of {trained.recipe.model.name} at step {trained.step}{where}: {', '.join(shown)}"


def save(parsed: argparse.Namespace, measurement: Measurement, names: list[str], figures: dict[str, float]) -> None:
    """Writes the report of these metrics, on the main process, to `--out` or into RUN/evaluations."""

    def write() -> Path:
        report = describe_measurement(names, measurement, figures, parsed.batch_size, parsed.command)
        if parsed.out is None:
            return save_in_run(parsed.run, report, measurement.trained.recipe.train.seed)
        save_report(parsed.out, report)
        return parsed.out

    path = measurement.runtime.run_on_main(write)
    if measurement.runtime.is_main:
        log.info("written to %s", path)


if __name__ == "__main__":
    sys.exit(main())
