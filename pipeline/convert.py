"""A checkpoint of another implementation of NVAE or VDVAE becomes a model folder, and the other way round.

    python pipeline/convert.py --from nvlabs checkpoint.pt --out models/cifar10
    python pipeline/convert.py --from nvlabs checkpoint.pt --out models/celeba64_t0.6 --readjust 500 --temperature 0.6
    python pipeline/convert.py --to nvlabs runs/nvae_mnist --out nvae_mnist.pt
    python pipeline/convert.py --from openai-vdvae model-ema.th --out models/vdvae_cifar10
    python pipeline/convert.py --from openai-vdvae mine.th --recipe mine.yaml --out models/mine
    python pipeline/convert.py --to openai-vdvae runs/vdvae_cifar10 --weights average --out model-ema.th

`nvlabs` is NVIDIA's release of NVAE, github.com/NVlabs/NVAE. Its checkpoints for MNIST, CIFAR-10, CelebA 64,
CelebA-HQ 256 and FFHQ 256 are in a download folder that the README of that repository links to. Their license allows
non-commercial use only; the model card states it. `openai-vdvae` is OpenAI's release of VDVAE, github.com/openai/vdvae,
whose README links to models for CIFAR-10, ImageNet 32 and 64, and FFHQ 256. Nothing is downloaded here.

--from reads what torch.save wrote. Nothing in the file can run code. Every weight has to be known, by name, shape and
precision, with none left over. The model folder that is written can be given to evaluate.py, sample.py, edit.py,
`pipeline.load` and `train.py --init`. evaluate.py then measures as the release does.

  nvlabs        weights and options (an argparse.Namespace), and what resumes training there, which is not used. Every
                option that decides the model has to be known; old files get the defaults of their time. The recipe has
                its binarization of MNIST and crop of the padding, and its bin rule for 8-bit images
  openai-vdvae  the weights of a model, or of its moving average, and nothing else. The architecture is that of the
                published model that has these tensors, or of --recipe: a name of pipeline/configs, or a YAML file

--to writes such a file from a run, a checkpoint or a model folder, for the release's code. What the format has no place
for is refused: conditions, another likelihood, sizes of images that its data sets do not have. For nvlabs the state of
Adamax is written if a run's last weights are; with the moving average, or from a model folder, there is none, and the
entry is empty. For openai-vdvae the options that the release's code needs beside the file are printed.
"""

import argparse
import logging
import sys
from pathlib import Path

if not __package__:  # run as a script, whose own folder comes first on the path; `pipeline` is found in its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

from pipeline.cli import CommandLine, log_lines, run_tool  # noqa: E402
from pipeline.inference import announce, model_card, nvlabs_export, nvlabs_import, openai_vdvae  # noqa: E402
from pipeline.inference.export_run import shows_real_faces  # noqa: E402
from pipeline.inference.load_model import find_device  # noqa: E402
from pipeline.inference.locations import LOCATIONS, find_model  # noqa: E402
from pipeline.inference.model_folder import ModelContent, write_model_folder  # noqa: E402
from pipeline.inference.readjust import Readjustment, add_arguments, parse_arguments, readjusted_content  # noqa: E402
from pipeline.inference.releases import license_of  # noqa: E402
from pipeline.storage.new_folder import check_new  # noqa: E402

log = logging.getLogger("pipeline")
RECIPE = "with --from openai-vdvae: a recipe of pipeline/configs, or a YAML file (default: found by the tensors)"
WRITERS = {"nvlabs": nvlabs_export.write_release, "openai-vdvae": openai_vdvae.write_release}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine("convert.py", __doc__)
    add = parser.add_argument
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="source", choices=WRITERS, help="read this format, write a model folder")
    direction.add_argument("--to", dest="target", choices=WRITERS, help="read a model of this project, write a file")
    add("input", metavar="INPUT", help=f"with --from the file; with --to {LOCATIONS}")
    add("--out", metavar="PATH", type=Path, required=True, help="new folder (--from) or new file (--to)")
    add("--recipe", metavar="NAME", help=RECIPE)
    add_arguments(parser)
    add("--device", help="with --readjust: cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--checkpoint", default="latest", help="with --to, of a run: latest (default), best, a step, or a folder")
    add(
        "--weights",
        choices=["average", "last"],
        help="with --to, of a run that keeps a moving average of its weights: the average, or the last weights",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: import_file(parsed) if parsed.source else export_file(parsed))


def import_file(parsed: argparse.Namespace) -> None:
    """From a file of another implementation to a model folder."""
    if parsed.checkpoint != "latest" or parsed.weights:
        raise ValueError("--checkpoint and --weights: apply to --to")
    how = parse_readjustment(parsed)
    check_new(parsed.out)
    content = read_file(parsed)
    device = find_device(parsed.device) if how else None
    log_lines(first_lines(parsed, content, device))
    if how is not None:
        content = readjusted_content(content, how, device)
    name, is_real = parsed.out.resolve().name, shows_real_faces(content.recipe, None)
    about = model_card.About(name, location=name, license=license_of(content.facts), real_faces=is_real)
    write_model_folder(parsed.out, content, model_card.render(content, about))
    log.info("%s", announce.written_to(parsed.out))


def parse_readjustment(parsed: argparse.Namespace) -> Readjustment | None:
    """As `parse_arguments`; the device too is only for it."""
    if parsed.device and parsed.readjust is None:
        raise ValueError("--device: applies to --readjust N")
    return parse_arguments(parsed)


def first_lines(parsed: argparse.Namespace, content: ModelContent, device: torch.device | None) -> list[str]:
    """Which model is read from which file, and where it is written."""
    count = sum(tensor.numel() for tensor in content.weights.values())
    return announce.first_lines(
        "model folder",
        content.recipe.model.name,
        content.step,
        device,
        {
            "reads": f"{parsed.input}, {parsed.source}: {count:,} numbers",
            "readjust": f"{parsed.readjust:,} batches of samples at temperature {parsed.temperature:g}"
            if device
            else "",
            "writes": str(parsed.out),
        },
    )


def read_file(parsed: argparse.Namespace) -> ModelContent:
    """What the file holds. Raises ValueError for one that cannot be used."""
    if parsed.source == openai_vdvae.KIND:
        return openai_vdvae.read_release(Path(parsed.input), parsed.recipe)
    if parsed.recipe:
        raise ValueError("--recipe: applies to --from openai-vdvae; files of nvlabs state their options")
    return nvlabs_import.read_release(Path(parsed.input))


def export_file(parsed: argparse.Namespace) -> None:
    """From a model of this project to a file for another implementation."""
    if parse_readjustment(parsed) is not None:
        raise ValueError("--readjust: applies to --from; readjust a model folder with export.py")
    if parsed.recipe:
        raise ValueError("--recipe: applies to --from openai-vdvae; a model of this project has its own")
    if parsed.out.exists():
        raise ValueError(f"--out {parsed.out}: is there; name a new file")
    WRITERS[parsed.target](parsed.out, find_model(parsed.input, parsed.checkpoint).checkpoint, parsed.weights)
    log.info("written to %s", parsed.out)


if __name__ == "__main__":
    sys.exit(main())
