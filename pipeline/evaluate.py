"""Measures a trained model on a split of a shard set.

    python pipeline/evaluate.py runs/nvae --split test --importance-samples 100
    python pipeline/launch.py --config_file accelerate_configs/multi_gpu.yaml pipeline/evaluate.py runs/nvae
    python pipeline/evaluate.py runs/nvae --list
    python pipeline/evaluate.py --repeat runs/nvae/evaluations/elbo_test_step_00010000.json

Prints the evidence lower bound, the KL and the active units of each latent group, and with importance samples the
importance-weighted likelihood. With a judge (train_classifier.py), `--metrics edit` gives the share of edits that show
the target attribute and of other attributes that stay, and `--metrics recognition` the share of samples of a class that
are recognized as such. `--metrics fid kid precision_recall` compare samples with the split's images in the features of
the Inception network, by a stated protocol. Figures do not depend on the number of processes or the batch size, except
for rounding.

Each metric is written, with everything that it depends on, to a file of its own in MODEL/evaluations, named after what
was measured. The same evaluation again replaces its file, and the log says so; nothing else is overwritten.

`--repeat FILE.json` runs the evaluation of a report again, on the same weights and images, and prints each figure
before and now. It writes nothing. Exit code 0: all figures that can be compared agree; 1: some do not, or none can be
compared. MODEL, `--data`, `--classifier` and `--feature-weights` name places that have changed.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

if not __package__:  # run as a script, whose own folder comes first on the path; `pipeline` is found in its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli import CommandLine, log_next, run_tool  # noqa: E402
from pipeline.distributed.device_settings import DeviceSettings  # noqa: E402
from pipeline.distributed.logs import launched_rank  # noqa: E402
from pipeline.distributed.runtime import Runtime  # noqa: E402
from pipeline.evaluation.image_features import Rounding  # noqa: E402
from pipeline.evaluation.inception import Resize  # noqa: E402
from pipeline.inference.evaluate_run import EvaluationRequest, evaluate  # noqa: E402
from pipeline.inference.locations import HELP, results_folder  # noqa: E402
from pipeline.inference.metrics import METRICS, Options  # noqa: E402
from pipeline.inference.repeat import load_report, repeat, request_of  # noqa: E402
from pipeline.inference.report import list_reports  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine("evaluate.py", __doc__)
    parser.add_argument("location", metavar="MODEL", nargs="?", help=HELP)
    add_choices(parser.add_argument_group("what is measured"))
    add_likelihood_options(parser.add_argument_group("elbo and nll"))
    add_sample_options(parser.add_argument_group("metrics of samples and edits"))
    add_feature_options(parser.add_argument_group("fid, kid, precision_recall"))
    add_run_options(parser.add_argument_group("computation and results"))
    parser.set_defaults(command=sys.argv)
    return parser


def add_choices(options: argparse._ArgumentGroup) -> None:
    """Which metrics of which checkpoint, on which images."""
    add = options.add_argument
    metrics = f"any of {', '.join(METRICS)} (default elbo)"
    add("--metrics", metavar="METRIC", nargs="+", choices=METRICS, default=["elbo"], help=metrics)
    add("--checkpoint", default="latest", help="latest (default), best by validation, a step, or a checkpoint's folder")
    add("--data", metavar="DIR", help="shard set, a folder or an address (default: that of the training)")
    add("--split", default="test", help="split of the shard set (default test)")
    add("--images", metavar="N", type=int, help="only the first N images of the split (default: all)")
    add("--images-seed", metavar="S", type=int, help="with --images: N images at random with this seed, not the first")
    add("--list", action="store_true", help="list the evaluations of MODEL and stop")
    add("--repeat", metavar="FILE.json", type=Path, help="measure again what this report states, and compare")


def add_likelihood_options(options: argparse._ArgumentGroup) -> None:
    """Of elbo."""
    add = options.add_argument
    samples = "also nll, with N latent samples per image (default 0: the bound only)"
    add("--importance-samples", metavar="N", type=int, default=0, help=samples)
    binarizations = "random binarizations of each image, where the model's data are binarized at random (default 1)"
    add("--binarizations", metavar="R", type=int, default=1, help=binarizations)


def add_sample_options(options: argparse._ArgumentGroup) -> None:
    """Of recognition and edit, and of the samples that others use as well."""
    add = options.add_argument
    add("--classifier", metavar="FOLDER", type=Path, help="for edit, recognition: what train_classifier.py wrote")
    add("--per-class", metavar="N", type=int, default=1000, help="samples of each class for recognition (default 1000)")
    temperature = "of the samples (default 1); several temperatures give a report each"
    add("--temperature", metavar="T", type=float, nargs="+", default=[1.0], help=temperature)
    readjust = "first re-estimate batch norm's statistics with N batches of such samples (default 0: do not)"
    add("--readjust", metavar="N", type=int, default=0, help=readjust)


def add_feature_options(options: argparse._ArgumentGroup) -> None:
    """Of the metrics in the features of the Inception network."""
    add = options.add_argument
    add("--samples", metavar="N", type=int, default=50_000, help="number of samples (default 50000)")
    decoder = "a sample's image: the mean of p(x | z), or a sample of it (default mean)"
    add("--decoder", choices=("mean", "sample"), default="mean", help=decoder)
    rounding = "pixels that the network gets: rounded to 8 bits, or as they are (default uint8)"
    add("--rounding", choices=get_args(Rounding), default="uint8", help=rounding)
    resize = "whose resizing to the network's 299 x 299 pixels is used (default pytorch-fid)"
    add("--resize", choices=get_args(Resize), default="pytorch-fid", help=resize)
    add("--kid-subsets", metavar="N", type=int, default=100, help="pairs of subsets for kid (default 100)")
    add("--kid-subset-size", metavar="N", type=int, default=1000, help="images in each of them (default 1000)")
    weights = "weights of the network (default: the file in torch hub's cache, downloaded where it is missing)"
    add("--feature-weights", metavar="FILE", type=Path, help=weights)


def add_run_options(options: argparse._ArgumentGroup) -> None:
    """What changes no figure but by rounding, the seed, and the report's place."""
    add = options.add_argument
    add("--batch-size", metavar="N", type=int, default=100, help="images per pass over all processes (default 100)")
    add("--precision", choices=("fp32", "bf16", "fp64"), default="fp32", help="of the computation (default fp32)")
    add("--seed", type=int, help="of the latent noise (default: the run's, as in its validation)")
    add("--threads", metavar="N", type=int, help="CPU threads of each process (default: the cores, shared)")
    add("--out", metavar="FILE.json", type=Path, help="one file for all metrics (default: files in MODEL/evaluations)")


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    if arguments is not None:
        parsed.command = [sys.argv[0], *arguments]
    return run_tool(lambda: run(parsed))


def run(parsed: argparse.Namespace) -> int:
    """Evaluates, on the processes that a launcher may have started, or lists evaluations. Returns the exit code."""
    check_arguments(parsed)
    if parsed.list:
        if launched_rank() == 0:
            folder = results_folder(parsed.location)
            print("\n".join(list_reports(folder)) or f"no evaluations in {folder}")
        return 0
    report = load_report(parsed.repeat) if parsed.repeat else None
    precision = report.earlier.precision if report else parsed.precision
    threads = parsed.threads or (report and report.earlier.threads)
    # Reported figures are those of the precision that they state, with no TensorFloat-32 on GPUs; and they can be
    # repeated to the bit, so that cuDNN's algorithm is not the one that was fastest at the moment.
    runtime = Runtime(precision, threads, device_settings=DeviceSettings(tf32=False, cudnn_benchmark=False))
    with runtime.closing():
        if report is None:
            files = evaluate(build_request(parsed), runtime)
            if runtime.is_main:
                log_next(next_commands(parsed.location, files))
            return 0
        files = {"classifier": parsed.classifier, "feature_weights": parsed.feature_weights}
        request = request_of(report, parsed.location, parsed.data, parsed.command, **files)
        return 0 if repeat(report, request, runtime) else 1


def next_commands(location: str, files: Sequence[Path]) -> list[str]:
    """What one does after an evaluation."""
    place = shlex.quote(location)
    commands = [f"python pipeline/evaluate.py {place} --list"]
    commands += [f"python pipeline/evaluate.py --repeat {shlex.quote(str(path))}" for path in files[:1]]
    if (Path(location) / "metrics.jsonl").is_file():
        commands.append(f"python pipeline/report.py {place}")
    return commands


def build_request(parsed: argparse.Namespace) -> EvaluationRequest:
    """The command line as a request."""
    first, *others = dict.fromkeys(parsed.temperature)
    stated = {field.name: getattr(parsed, field.name) for field in fields(Options)}
    return EvaluationRequest(
        location=parsed.location,
        checkpoint=parsed.checkpoint,
        data=parsed.data,
        metrics=parsed.metrics,
        options=Options(**stated | {"temperature": first}),
        batch_size=parsed.batch_size,
        out=parsed.out,
        command=parsed.command,
        more_temperatures=others,
    )


def check_arguments(parsed: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit together, numbers out of range, and a report that cannot be
    written.
    """
    if parsed.location is None and not parsed.repeat:
        raise ValueError("no MODEL: give the folder of a run, or another location; see --help")
    if parsed.repeat:
        known = {"location", "repeat", "data", "classifier", "feature_weights", "threads", "command"}
        default = build_parser().get_default
        changed = [name for name, value in vars(parsed).items() if name not in known and value != default(name)]
        if changed:
            name = f"--{changed[0].replace('_', '-')}"
            raise ValueError(f"{name}: not with --repeat, which measures what {parsed.repeat} states; omit {name}")
    for name in ("seed", "images_seed"):
        value = getattr(parsed, name)
        if value is not None and not 0 <= value < 2**63:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be from 0 to 2^63 - 1")
    if parsed.images_seed is not None and parsed.images is None:
        raise ValueError(f"--images-seed {parsed.images_seed}: chooses among the images of --images N; give that, too")
    least = {"images": 1, "importance_samples": 0, "binarizations": 1, "batch_size": 1, "per_class": 1, "threads": 1}
    least |= {"readjust": 0, "samples": 2, "kid_subsets": 1, "kid_subset_size": 2}
    for name, minimum in least.items():
        value = getattr(parsed, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")
    for temperature in parsed.temperature:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"--temperature {temperature}: must be a finite number of at least 0")
    if parsed.out is not None and len(parsed.temperature) > 1:
        raise ValueError(f"--out {parsed.out}: one file is of one temperature; omit --out, or give one --temperature")
    if parsed.out is not None and parsed.out.is_dir():
        raise ValueError(f"--out {parsed.out}: is a folder; name a file")


if __name__ == "__main__":
    sys.exit(main())
