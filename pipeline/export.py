"""Writes a trained model as a folder to keep, to copy or to publish, and pushes it to the Hugging Face Hub.

    python pipeline/export.py runs/nvae --out models/faces
    python pipeline/export.py runs/nvae --out models/faces --checkpoint best --license apache-2.0 --push alice/faces
    python pipeline/export.py models/faces --push alice/faces --private
    python pipeline/export.py runs/nvae --out programs/faces --format torch-export

A model folder holds model.safetensors and meta.json (weights, settings, sha256 of both), config.yaml, a model card in
README.md, and samples.png. The card states the figures that `evaluate.py` has measured of exactly these weights: run it
first. Without --out, a model folder is pushed as it is, with what you have written into its card.

--format torch-export writes encoder, decoder and sampler as programs that torch alone runs, without this package.

`pipeline.load`, evaluate.py, sample.py and edit.py open the folder, and from the Hub hf-hub:OWNER/NAME[@REVISION]. The
folder does not state absolute paths of this machine or names of W&B accounts. --readjust 500 --temperature 0.6 saves
batch norm's statistics for samples at that temperature, which the card states. Pushing needs a token that may write:
`hf auth login`, or HF_TOKEN.
"""

import argparse
import re
import sys
from pathlib import Path

if not __package__:  # run as a script, whose own folder comes first on the path; `pipeline` is found in its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli import CommandLine, run_tool  # noqa: E402
from pipeline.inference import hub  # noqa: E402
from pipeline.inference.export_run import ExportRequest, export_model_folder, push_folder  # noqa: E402
from pipeline.inference.locations import LOCATIONS, is_hub, local_path  # noqa: E402
from pipeline.inference.model_card import License  # noqa: E402
from pipeline.inference.model_folder import CARD  # noqa: E402
from pipeline.inference.readjust import add_arguments, parse_arguments  # noqa: E402
from pipeline.inference.torch_export import export_programs  # noqa: E402

FORMATS = {"model-folder": export_model_folder, "torch-export": export_programs}
"""What --format can be: a function that writes `out` of an ExportRequest, completely or not at all."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine("export.py", __doc__)
    add = parser.add_argument
    add("location", metavar="MODEL", help=LOCATIONS)
    add("--out", metavar="DIR", type=Path, help="the folder to write, new or empty")
    add("--format", choices=FORMATS, default="model-folder", help="what to write (default model-folder)")
    add("--checkpoint", default="latest", help="latest (default), best by validation, a step, or a checkpoint's folder")
    add("--push", metavar="OWNER/NAME", help="push the folder to this repository of the Hub, new or not")
    add("--private", action="store_true", help="with --push: a repository that is created is private")
    add("--license", metavar="ID", help="of the weights, as the Hub spells it: apache-2.0, cc-by-nc-4.0, other ...")
    add("--license-name", metavar="NAME", help="with --license other: its name")
    add("--license-link", metavar="URL", help="with --license other: the address of its text")
    add("--data-name", metavar="ID", nargs="+", default=[], help="ids on the Hub of the data sets it was trained on")
    picture = "with a picture of samples: yes, no, or auto (default), which is no for data sets of real people"
    add("--picture", choices=("auto", "yes", "no"), default="auto", help=picture)
    add_arguments(parser)
    add("--device", help="for the samples: cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: export(parsed))


def export(parsed: argparse.Namespace) -> None:
    """From the command line to the folder, and to the Hub."""
    check_arguments(parsed)
    repository = hub.parse_repository(parsed.push) if parsed.push else None
    if repository:
        hub.check_token(repository)
    if parsed.out:
        FORMATS[parsed.format](build_request(parsed, repository))
    if repository:
        push_folder(parsed.out or local_path(parsed.location), repository, parsed.private)


def build_request(parsed: argparse.Namespace, repository: hub.Repository | None) -> ExportRequest:
    """The command line as a request."""
    return ExportRequest(
        location=parsed.location,
        checkpoint=parsed.checkpoint,
        out=parsed.out,
        picture=parsed.picture,
        repository=repository,
        license=License(parsed.license, parsed.license_name, parsed.license_link) if parsed.license else None,
        datasets=parsed.data_name,
        device=parsed.device,
        readjust=parse_arguments(parsed),
    )


def check_arguments(parsed: argparse.Namespace) -> None:
    """Raises ValueError for arguments that are missing or contradict each other."""
    if parsed.format != "model-folder":
        check_only_one_folder(parsed)
    if not parsed.out and not parsed.push:
        raise ValueError("--out: name the folder to write; or push a model folder with --push OWNER/NAME")
    if not parsed.out and (is_hub(parsed.location) or not (local_path(parsed.location) / CARD).is_file()):
        raise ValueError(f"{parsed.location}: not a model folder with a card; name the folder to write with --out DIR")
    if parsed.readjust is not None and not (parsed.out and parsed.format == "model-folder"):
        raise ValueError("--readjust: applies to a model folder that is written; name it with --out DIR")
    if parsed.private and not parsed.push:
        raise ValueError("--private: applies to --push")
    if parsed.push and "@" in parsed.push:
        raise ValueError(f"--push {parsed.push}: name OWNER/NAME, without a revision")
    if parsed.license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", parsed.license):
        raise ValueError(f"--license {parsed.license}: give an id of huggingface.co/docs/hub/repositories-licenses")
    details = [parsed.license_name, parsed.license_link]
    if not (all(details) if parsed.license == "other" else details == [None, None]):
        raise ValueError("--license other: goes with --license-name NAME and --license-link URL, and only it does")
    if parsed.license_link and not re.fullmatch(r"https?://[^\s()<>\[\]]+", parsed.license_link):
        raise ValueError(f"--license-link {parsed.license_link}: give an http(s):// address")
    for name in parsed.data_name:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
            raise ValueError(f"--data-name {name}: give the id of a data set on the Hub, such as OWNER/NAME")


def check_only_one_folder(parsed: argparse.Namespace) -> None:
    """Raises ValueError for options that only model folders have."""
    options = {"--push": parsed.push, "--license": parsed.license, "--data-name": parsed.data_name}
    options |= {"--picture": parsed.picture != "auto", "--device": parsed.device, "--readjust": parsed.readjust}
    for name, given in options.items():
        if given:
            raise ValueError(f"{name}: applies to a model folder, not to --format {parsed.format}")


if __name__ == "__main__":
    sys.exit(main())
