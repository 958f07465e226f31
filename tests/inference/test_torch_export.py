"""Programs of torch.export: what the model gives, in a process that has torch and not this package."""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline import export
from pipeline.inference import torch_export
from pipeline.inference.trained import TrainedModel
from tests.helpers.model_cases import CASES, make_recipe, one_hot_conditions
from tests.helpers.trained_runs import STEP, make_run

FILES = ["README.md", "check.py", "decoder.pt2", "encoder.pt2", "examples.bin", "programs.json", "sampler.pt2"]
PADDED = "mlp_vae with discretized logistics"
FAST = ("mlp_vae by class", PADDED)
OTHERS = [case for case in CASES if case not in FAST]
OTHER_SIZE = """
import json, sys, torch
run = torch.export.load("{name}.pt2").module()
inputs = [[torch.tensor(one) for one in value] if value and depth else torch.tensor(value)
          for value, depth in json.load(sys.stdin)]
assert "pipeline" not in sys.modules
found = run(*inputs)
print(json.dumps([one.tolist() for one in (found if isinstance(found, list) else [found])]))
"""


def trained_case(case: str, folder: Path) -> Path:
    """The run of an untrained model; one case with padding and 5 bits."""
    recipe = make_recipe(case, folder / "unused", *(["data.pad=2", "data.bits=5"] if case == PADDED else []))
    names = list("abcdefghij") if recipe.condition and recipe.condition.name == "class" else None
    return make_run(folder / "run", recipe.model_dump(mode="json"), classes=names)


def in_another_process(folder: Path, name: str, *inputs) -> list[torch.Tensor]:
    """The outputs of a program, in a process without this package."""
    given = [
        ([one.tolist() for one in value], True) if isinstance(value, list) else (value.tolist(), False)
        for value in inputs
    ]
    command = [sys.executable, "-I", "-c", OTHER_SIZE.format(name=name)]
    done = subprocess.run(command, cwd=folder, input=json.dumps(given), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.tensor(one) for one in json.loads(done.stdout)]


def check_five_images(folder: Path, trained: TrainedModel, name: str) -> None:
    """A batch size that the examples do not have."""
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(5, *group.shape, generator=generator) for group in trained.model.groups]
    rows = one_hot_conditions(trained.model, 5)
    condition = [] if rows is None else [rows]
    images = torch.rand(5, *trained.image_shape, generator=generator)
    temperature = torch.tensor(0.5)
    with torch.no_grad():
        inputs, expected = {
            "encoder": ((images, noise), trained.model.encode(trained.input(images), noise, rows)),
            "decoder": ((noise,), [trained.decode(noise, *condition)]),
            "sampler": ((noise, temperature), [trained._output([trained.model.sample(noise, 0.5, rows)])]),
        }[name]
    found = in_another_process(folder, name, *inputs, *condition)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_programs_give_what_the_model_gives(case, tmp_path):
    """For one and three images in the check of the export itself, for five here."""
    run, out = trained_case(case, tmp_path), tmp_path / "elsewhere" / "programs"
    assert export.main([str(run), "--out", str(out), "--format", "torch-export"]) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    trained = pipeline.load(run, device="cpu")
    for name in ("encoder",) if case in FAST else ("encoder", "decoder", "sampler"):
        check_five_images(out, trained, name)
    description = json.loads((out / "programs.json").read_text())
    assert (description["step"], description["weights_sha256"]) == (STEP, trained.weights_sha256)
    size = trained.model.condition_size
    assert len(description["condition"]["columns"] if description["condition"] else []) == size
    assert ("condition" in description["programs"]["decoder"]["inputs"]) == bool(size)
    assert description["programs"]["encoder"]["inputs"]["images"] == ["batch", 3, 16, 16]
    assert "linalg_vector_norm" not in str(torch.export.load(out / "decoder.pt2").graph)  # weights are normalized


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_case("mlp_vae", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def programs(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "programs"
    torch_export.write_programs(out, pipeline.load(run, device="cpu"))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Encoder", "Decoder", "Sampler"])
def test_a_program_that_gives_something_else_is_not_written(name, run, tmp_path, monkeypatch, capsys):
    program = getattr(torch_export, name)

    class Wrong(program):
        @functools.wraps(program.forward)  # torch.export reads the signature
        def forward(self, *inputs):
            found = super().forward(*inputs)
            return [one * 1.01 for one in found] if isinstance(found, list) else found * 1.01

    monkeypatch.setattr(torch_export, name, Wrong)
    assert export.main([str(run), "--out", str(tmp_path / "out"), "--format", "torch-export"]) == 2
    assert "differ from the model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def check(folder: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-I", folder / "check.py"], capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_the_check_can_be_repeated_and_notices_other_numbers(programs, tmp_path):
    code, text = check(programs)
    assert (code, len(text.splitlines())) == (0, 3)
    data = (programs / "examples.bin").read_bytes()
    (programs / "examples.bin").write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")  # NaN
    code, text = check(programs)
    (programs / "examples.bin").write_bytes(data)
    assert code == 1
    assert "sampler.pt2: largest error nan" in text


def test_a_changed_program_is_not_loaded(programs):
    path = programs / "decoder.pt2"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    found = check(programs)
    path.write_bytes(content)
    assert found == (1, "decoder.pt2: its sha256 is not that of programs.json; it was not loaded\n")


def test_what_the_readme_shows_is_there(programs, monkeypatch):
    text = (programs / "README.md").read_text()
    monkeypatch.chdir(programs)
    given: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], given)
    assert tuple(given["images"].shape) == (16, 3, 16, 16)
    assert "| `decoder.pt2` | `latents` list of 1 (batch, 8, 1, 1) | `images` (batch, 3, 16, 16) |" in text


def test_the_readme_states_the_license_of_a_release(programs, run):
    assert "None is stated" in (programs / "README.md").read_text()
    trained = replace(pipeline.load(run, device="cpu"), facts={"source": {"kind": "nvlabs"}})
    text = torch_export.readme(trained, json.loads((programs / "programs.json").read_text()))
    assert "None is stated" not in text
    assert "non-commercial use only" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push", "a/b"], "--push: applies to a model folder, not to --format torch-export"),
        (["--readjust", "3", "--temperature", "1"], "--readjust: applies to a model folder"),
    ],
)
def test_options_of_model_folders_are_refused(options, message, run, tmp_path, capsys):
    assert export.main([str(run), "--out", str(tmp_path / "out"), "--format", "torch-export", *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
