"""Measures a trained model on a split of a shard set.

    python pipeline/evaluate.py runs/nvae --split test --importance-samples 100
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml pipeline/evaluate.py runs/nvae --data data/mine

Prints the evidence lower bound, the KL and the active units of each latent group, and with importance samples the
importance-weighted likelihood, and writes them with all that they depend on to RUN/evaluation_SPLIT_step_N.json.
With a judge (train_classifier.py), `--metrics edit` tells how often an edit shows what was asked and leaves the rest as
it was, and `--metrics recognition` how many samples of a class are recognised as such.
The figures do not depend on the number of processes or the batch size, but for rounding.
"""

import argparse
import logging
import sys
from pathlib import Path

# A script's own folder comes first on the path; put the project's root there instead, so that `pipeline` is a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.distributed.agreement import code_version  # noqa: E402
from pipeline.distributed.logs import launched_rank, start_logging  # noqa: E402
from pipeline.distributed.runtime import Runtime  # noqa: E402
from pipeline.inference.report import (  # noqa: E402
    bound_figures,
    check_held_out,
    check_metrics,
    describe_measurement,
    edit_measurement,
    evaluation_recipe,
    recognition_measurement,
    report_path,
    save_report,
    table,
)
from pipeline.inference.trained import TrainedModel, find_checkpoint, load  # noqa: E402
from pipeline.recipe import Recipe  # noqa: E402
from pipeline.run.data import RunData  # noqa: E402

log = logging.getLogger("pipeline")
METRICS = ("elbo", "edit", "recognition")


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
    add("--data", metavar="DIR", help="shard set, a folder or an address (default: the one that it was trained on)")
    add("--split", default="test", help="split of the set (default: test)")
    add("--metrics", nargs="+", choices=METRICS, default=["elbo"], help="what to measure (default elbo)")
    add("--importance-samples", metavar="N", type=int, default=0, help="draws per image for the likelihood (default 0)")
    add("--images", metavar="N", type=int, help="only the first N images of the split")
    add("--batch-size", metavar="N", type=int, default=100, help="images in a pass over all processes (default 100)")
    add("--classifier", metavar="FOLDER", type=Path, help="judge of edit and recognition, of train_classifier.py")
    add("--per-class", metavar="N", type=int, default=1000, help="samples of each class to recognise (default 1000)")
    add("--temperature", metavar="T", type=float, default=1.0, help="of the samples to recognise (default 1)")
    add("--checkpoint", default="latest", help="latest (default), best by validation, or a checkpoint's folder")
    add("--precision", choices=("fp32", "bf16", "fp64"), default="fp32", help="of the computation (default fp32)")
    add("--seed", type=int, help="of the latent draws (default: the run's, as in its validation)")
    add("--threads", metavar="N", type=int, help="CPU threads of each process (default: the cores, shared)")
    add("--out", metavar="FILE.json", type=Path, help="where the figures go (default: in RUN)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 measured, 2 something the user can mend, 130 interrupted by Ctrl-C."""
    parsed = build_parser().parse_args(arguments)
    start_logging(launched_rank() == 0)
    try:
        run(parsed)
    except (ValueError, OSError) as error:
        if launched_rank() == 0:
            log.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(parsed: argparse.Namespace) -> None:
    """Evaluates among the processes that a launcher may have started."""
    runtime = Runtime(parsed.precision, parsed.threads)
    with runtime.closing():
        evaluate(parsed, runtime)


def evaluate(parsed: argparse.Namespace, runtime: Runtime) -> None:
    """From the command line to the report."""
    # One chooses for all: a run that is being trained may have a newer checkpoint any moment.
    chosen = runtime.run_on_main(lambda: str(find_checkpoint(parsed.run, parsed.checkpoint).path))
    path = runtime.from_main(chosen)
    trained, recipe = runtime.run_on_all(lambda: prepare(parsed, path, runtime))
    seed = recipe.train.seed if parsed.seed is None else parsed.seed
    log.info("%s at step %d on %s, split %s", recipe.model.name, trained.step, recipe.data.root, parsed.split)
    data = RunData(recipe, runtime, progress=True)
    check_held_out(trained, data)
    runtime.check_agreement({"data": data.held_out.fingerprint, "code": code_version()})
    figures = measure(parsed, trained, data, runtime, seed)
    report = describe_measurement(trained, data, runtime, seed, figures)
    if parsed.classifier is not None:
        report |= {
            "classifier": str(parsed.classifier),
            "per_class": parsed.per_class,
            "temperature": parsed.temperature,
        }
    out = parsed.out or report_path(parsed.run, parsed.split, trained.step, parsed.metrics)
    runtime.run_on_main(lambda: save_report(out, report))
    if runtime.is_main:
        print(table(figures))
        log.info("written to %s", out)


def prepare(parsed: argparse.Namespace, path: str, runtime: Runtime) -> tuple[TrainedModel, Recipe]:
    """The model, and the recipe of what it is measured on. Raises ValueError for what cannot be measured."""
    trained = load(parsed.run, path, runtime.device, runtime.dtype)
    check_metrics(parsed.metrics, trained, parsed.classifier)
    asked = parsed.images, parsed.batch_size, parsed.importance_samples
    return trained, evaluation_recipe(trained.recipe, parsed.data, parsed.split, *asked)


def measure(
    parsed: argparse.Namespace, trained: TrainedModel, data: RunData, runtime: Runtime, seed: int
) -> dict[str, float]:
    """The figures asked for with --metrics."""
    figures = {}
    if "elbo" in parsed.metrics:
        figures |= bound_figures(trained, data, runtime, seed)
    if "edit" in parsed.metrics:
        figures |= edit_measurement(trained, data, runtime, parsed.classifier, seed)
    if "recognition" in parsed.metrics:
        asked = parsed.per_class, parsed.temperature, seed
        figures |= recognition_measurement(trained, runtime, parsed.classifier, *asked)
    return figures


if __name__ == "__main__":
    sys.exit(main())
