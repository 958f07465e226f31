"""A trained model as programs of `torch.export`, which torch alone runs, without this package.

    encoder.pt2      (images, noise[, condition]) -> latents
    decoder.pt2      (latents[, condition]) -> images
    sampler.pt2      (noise, temperature[, condition]) -> images
    programs.json    names, shapes and dtypes of inputs and outputs; where the model comes from; the sha256 of each file
    examples.bin     inputs and outputs of a few images, for check.py
    check.py         runs the programs on the examples, with torch alone
    README.md        how to use them

The batch size is free. Padding and the number of bits are inside, as in `TrainedModel`.
"""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.preprocess import to_model_input
from pipeline.distributed.logs import log_lines
from pipeline.evaluation.images import to_uint8
from pipeline.inference import announce, check_programs
from pipeline.inference.export_run import ExportRequest
from pipeline.inference.load_model import load
from pipeline.inference.model_card import license_text
from pipeline.inference.releases import license_of
from pipeline.inference.trained import TrainedModel
from pipeline.models.base import VAE, without_border
from pipeline.models.conditions import ClassCondition
from pipeline.models.noise import draw_noise
from pipeline.models.nvae import NVAE
from pipeline.storage.new_folder import check_new, new_folder

log = logging.getLogger("pipeline")

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Largest error of an output that check.py accepts, as a share of the output's largest value."""
COUNTS = (1, 3)
"""Images of the examples."""
TRACED = 2
"""Images with which the programs are traced."""
TEMPERATURE = 0.7
"""Of the sampler's examples."""
CHECK_SECONDS = 600


class Program(NamedTuple):
    """One program, and what `TrainedModel` gives for the same inputs."""

    module: nn.Module
    inputs: tuple[str, ...]
    output: str
    examples: Sequence["Example"]


class Example(NamedTuple):
    """Inputs in the order of the program, and its output: tensors and lists of tensors."""

    inputs: tuple
    output: Any


class Encoder(nn.Module):
    """(images (B, C, H, W) in [0, 1], noise of each group[, condition]) -> latents of each group."""

    def __init__(self, trained: TrainedModel):
        super().__init__()
        self.model, data = trained.model, trained.recipe.data
        self.bits, self.pad, self.dtype = data.bits, data.pad, trained.dtype

    def forward(self, images: Tensor, noise: list[Tensor], condition: Tensor | None = None) -> list[Tensor]:
        x = images if self.bits == 8 else to_model_input(to_uint8(images), self.bits, self.dtype)
        return self.model.encode(F.pad(x, [self.pad] * 4), noise, condition)


class Decoder(nn.Module):
    """(latents of each group[, condition]) -> images (B, C, H, W) in [0, 1]: the decoder's mean."""

    def __init__(self, trained: TrainedModel):
        super().__init__()
        self.model, self.pad = trained.model, trained.recipe.data.pad

    def forward(self, latents: list[Tensor], condition: Tensor | None = None) -> Tensor:
        return without_border(self.model.decode(latents, condition), self.pad).contiguous()


class Sampler(Decoder):
    """(noise of each group, temperature ()[, condition]) -> images (B, C, H, W) in [0, 1] from the prior.

    Noise times the temperature is the same as sigmas of the prior times the temperature.
    """

    def forward(self, noise: list[Tensor], temperature: Tensor, condition: Tensor | None = None) -> Tensor:
        images = self.model.sample([temperature * values for values in noise], 1.0, condition)
        return without_border(images, self.pad).contiguous()


def export_programs(request: ExportRequest) -> None:
    """`export.py --format torch-export`. Raises what `load` and `write_programs` raise."""
    check_new(request.out)
    trained = load(request.location, request.checkpoint, device="cpu")
    weights = announce.weights_of(trained.place, trained.averaged)
    facts = {"model": weights, "writes": str(request.out)}
    log_lines(announce.first_lines("programs", trained.recipe.model.name, trained.step, trained.device, facts))
    write_programs(request.out, trained)
    written = announce.written_to(request.out)
    log.info("%s; the programs give what the model gives, checked without this package", written)


def write_programs(folder: Path, trained: TrainedModel) -> None:
    """Writes a new folder with the programs of a model on the CPU, complete or not at all.

    Before it is complete, check.py runs in a process of its own. Raises ValueError where `folder` is there and is not
    empty, and where the programs differ from the model; OSError where it cannot be written.
    """
    with new_folder(folder) as hidden, torch.no_grad():
        hidden.mkdir()
        programs = build_programs(trained)
        for name, program in programs.items():
            torch.export.save(exported(program), hidden / f"{name}.pt2")
        examples, blob = pack(programs)
        (hidden / "examples.bin").write_bytes(blob)
        (hidden / "check.py").write_bytes(Path(check_programs.__file__).read_bytes())
        description = describe(trained, programs, hidden) | {"examples": examples}
        (hidden / "programs.json").write_text(json.dumps(description, indent=1) + "\n")
        (hidden / "README.md").write_text(readme(trained, description))
        check_in_another_process(hidden)


def build_programs(trained: TrainedModel) -> dict[str, Program]:
    """By name, each with examples that `TrainedModel` computed."""
    condition = ("condition",) if trained.model.condition_size else ()
    frozen = replace(trained, model=frozen_copy(trained.model))
    kinds = {"encoder": encoder_example, "decoder": decoder_example, "sampler": sampler_example}
    examples = {name: [example(trained, count) for count in COUNTS] for name, example in kinds.items()}
    return {
        "encoder": Program(Encoder(frozen), ("images", "noise", *condition), "latents", examples["encoder"]),
        "decoder": Program(Decoder(frozen), ("latents", *condition), "images", examples["decoder"]),
        "sampler": Program(Sampler(frozen), ("noise", "temperature", *condition), "images", examples["sampler"]),
    }


def frozen_copy(model: VAE) -> VAE:
    """The model with the weights that its layers apply: a program then has no weights that it does not use, and
    normalizes none.
    """
    model = deepcopy(model)
    if isinstance(model, NVAE):
        model.weight_cache.freeze()
    return model


def encoder_example(trained: TrainedModel, count: int) -> Example:
    levels = torch.randint(0, 256, (count, *trained.image_shape), generator=torch.Generator().manual_seed(count))
    images, condition = to_model_input(levels.to(torch.uint8), 8, trained.dtype), conditions(trained, count)
    noise = noise_of(trained, "encode", count)
    return Example((images, noise, *condition), trained.encode(images, *condition, seed=0))


def decoder_example(trained: TrainedModel, count: int) -> Example:
    latents, condition = noise_of(trained, "latents", count), conditions(trained, count)
    return Example((latents, *condition), trained.decode(latents, *condition))


def sampler_example(trained: TrainedModel, count: int) -> Example:
    noise, condition = noise_of(trained, "sample", count), conditions(trained, count)
    temperature = torch.tensor(TEMPERATURE, dtype=trained.dtype)
    given = {"condition": condition[0]} if condition else {}
    return Example((noise, temperature, *condition), trained.sample(count, TEMPERATURE, seed=0, **given))


def noise_of(trained: TrainedModel, stream: str, count: int) -> list[Tensor]:
    """What `TrainedModel` uses with seed 0."""
    return draw_noise(trained.model.groups, 0, stream, range(count), dtype=trained.dtype)


def conditions(trained: TrainedModel, count: int) -> list[Tensor]:
    """One condition (count, K), another column set in each row; nothing for an unconditional model."""
    size = trained.model.condition_size
    return [torch.eye(size, dtype=trained.dtype)[torch.arange(count) % size]] if size else []


def exported(program: Program) -> torch.export.ExportedProgram:
    """The program for any number of images."""
    inputs = resized(program.examples[0].inputs, TRACED)
    batch = torch.export.Dim("batch", min=1)
    shapes = map_tensors(lambda tensor: {0: batch} if tensor.dim() else None, inputs)
    return torch.export.export(program.module.eval(), inputs, dynamic_shapes=shapes)


def resized(inputs: Any, count: int) -> Any:
    """The first row of each tensor, repeated."""
    return map_tensors(lambda tensor: tensor[:1].repeat_interleave(count, 0) if tensor.dim() else tensor, inputs)


def map_tensors(function: Any, values: Any) -> Any:
    """The same structure of tuples and lists with the function's results."""
    if isinstance(values, Tensor):
        return function(values)
    return type(values)(map_tensors(function, value) for value in values)


# ---------------------------------------------------------------------------------------------- what stands beside them


def pack(programs: Mapping[str, Program]) -> tuple[dict[str, list], bytes]:
    """The examples: where each tensor is, and the bytes of all."""
    parts: list[bytes] = []

    def add(tensor: Tensor) -> dict[str, Any]:
        offset = sum(map(len, parts))
        parts.append(tensor.contiguous().numpy().tobytes())
        return {"shape": list(tensor.shape), "offset": offset}

    packed = {
        name: [
            {"inputs": map_tensors(add, example.inputs), "output": map_tensors(add, example.output)}
            for example in program.examples
        ]
        for name, program in programs.items()
    }
    return packed, b"".join(parts)


def describe(trained: TrainedModel, programs: Mapping[str, Program], folder: Path) -> dict[str, Any]:
    """programs.json, without the examples."""
    return {
        "format": "nvae-pipeline torch-export",
        "version": 1,
        "torch": torch.__version__,
        "model": trained.recipe.model.name,
        "step": trained.step,
        "averaged": trained.averaged,
        "weights_sha256": trained.weights_sha256,
        "dtype": str(trained.dtype).removeprefix("torch."),
        "tolerance": TOLERANCE[trained.dtype],
        "condition": condition_columns(trained),
        "latents": [{"name": group.name, "shape": ["batch", *group.shape]} for group in trained.model.groups],
        "programs": {
            name: {
                "file": f"{name}.pt2",
                "sha256": hashlib.sha256((folder / f"{name}.pt2").read_bytes()).hexdigest(),
                "inputs": dict(zip(program.inputs, map(shapes_of, program.examples[0].inputs), strict=True)),
                "output": {program.output: shapes_of(program.examples[0].output)},
            }
            for name, program in programs.items()
        },
    }


def shapes_of(values: Any) -> Any:
    """Of an input or output, with the batch size named."""
    return map_tensors(lambda tensor: ["batch", *tensor.shape[1:]] if tensor.dim() else [], values)


def condition_columns(trained: TrainedModel) -> dict[str, Any] | None:
    """What the columns of the condition mean."""
    condition = trained.recipe.condition
    if condition is None:
        return None
    if isinstance(condition, ClassCondition):
        return {"values": "1 for the class, 0 for the others", "columns": list(trained.classes)}
    return {"values": "1 present, 0 absent, 0.5 unknown", "columns": list(condition.chosen)}


README = """# {model}, step {step}: programs of torch.export

Made by nvae-pipeline with torch {torch}. They run with torch alone.

```python
import torch

sampler = torch.export.load("sampler.pt2").module()
with torch.no_grad():
    images = sampler({arguments})
```

**Only load files that you trust: `torch.export.load` reads pickled objects, and a forged file can run code.**
The sha256 of each file is in `programs.json`.

| program | inputs | output |
|---|---|---|
{rows}

`batch` is any number of images. All numbers are {dtype}. Images are in [0, 1]. `noise` is standard normal; with zeros
the encoder gives the mean of each posterior, given the means of the groups before it. `temperature` is one number that
scales the sigmas of the prior.{condition}

`python check.py` compares the programs on this machine with what the model gave where they were made; the largest
accepted error is {tolerance:g} of an output's largest value.

## License

{license}
"""


def readme(trained: TrainedModel, description: Mapping[str, Any]) -> str:
    rows = []
    for program in description["programs"].values():
        inputs = "; ".join(f"`{key}` {shown(shapes)}" for key, shapes in program["inputs"].items())
        ((output, shapes),) = program["output"].items()
        rows.append(f"| `{program['file']}` | {inputs} | `{output}` {shown(shapes)} |")
    columns = description["condition"]
    noise = ", ".join(f"torch.randn(16, {', '.join(map(str, group.shape))})" for group in trained.model.groups)
    condition = f", torch.eye({len(columns['columns'])})[torch.zeros(16, dtype=torch.long)]" if columns else ""
    arguments = f"[{noise}], torch.tensor(0.7){condition}"
    meaning = f"\nColumns of `condition` ({columns['values']}): {', '.join(columns['columns'])}." if columns else ""
    texts = {"rows": "\n".join(rows), "condition": meaning, "arguments": arguments}
    return README.format(**{**description, **texts, "license": license_text(license_of(trained.facts))})


def shown(shapes: Sequence) -> str:
    """A shape, or those of a list of tensors, each once."""
    if not (shapes and isinstance(shapes[0], list)):
        return f"({', '.join(map(str, shapes))})"
    return "list of " + ", ".join(dict.fromkeys(f"{shapes.count(shape)} {shown(shape)}" for shape in shapes))


def check_in_another_process(folder: Path) -> None:
    """Runs check.py, without this package. Raises ValueError with its last line where it fails."""
    command = [sys.executable, "-I", "check.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=CHECK_SECONDS)
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise ValueError(f"the exported programs differ from the model: {''.join(last)}")
