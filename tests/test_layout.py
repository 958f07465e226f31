"""The house rules that a machine can check: who may import whom, one door for each third party, and no surprising
names."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    # 1: stands on nothing but third parties and its own floor
    """schema config conditions distributions likelihoods models.base noise
    nn.layers nn.cells nn.batch_norm nn.depthwise nn.flows nn.posterior nn.posterior_flows
    nn.conditional_norm nn.gradient_reversal nn.independence classifier
    data.hashing data.recent data.manifest data.order data.shards data.preprocess data.remote data.damage
    checkpoint checkpoint_writer tensor_file
    tracking wandb_run wandb_files records status run_lock metrics ema files images runtime torchvision_guard
    processes.agreement processes.launcher processes.preemption processes.roll processes.watchdog""".split(),
    # 2
    """models.nvae models.nvae_names models.flat models.mlp_vae models.conv_vae models.resnet_vae models.attribute_vae
    edit_metric recognition
    data.loader objective regularizers optim evaluation flops
    sampling state resume data_trace damage tools.asking tools.common tools.latents tools.pictures""".split(),
    # 3
    """trainer recipe run_data building session trained
    tools.report tools.drawing tools.inference tools.editing""".split(),
    # 4: scripts
    ["train", "evaluate", "train_classifier", "sample", "edit"],
]

DOORS = {
    "wandb": {"pipeline/wandb_run.py"},
    "yaml": {"pipeline/config.py"},
    "accelerate": {"pipeline/runtime.py"},
    "torchvision": {"pipeline/torchvision_guard.py"},
    "webdataset": {"shard_data/verify.py"},
    "pydantic": None,
}

FORBIDDEN_TO_MODELS = {
    "config",
    "objective",
    "trainer",
    "optim",
    "regularizers",
    "checkpoint",
    "tracking",
    "session",
    "recipe",
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "pipeline").with_suffix("").parts)


def floor_of(name: str) -> int:
    return next(number for number, floor in enumerate(FLOORS, start=1) if name in floor)


def test_every_module_has_a_floor():
    modules = {module(path) for path in sources("pipeline") if path.name != "__init__.py"}
    assert modules == set().union(*FLOORS)


@pytest.mark.parametrize("path", [p for p in sources("pipeline") if p.name != "__init__.py"], ids=module)
def test_a_file_imports_only_from_its_floor_and_below(path):
    used = {name.removeprefix("pipeline.") for name in imports(path) if name.startswith("pipeline.")}
    used = {name for name in used if any(name in floor for floor in FLOORS)}
    too_high = {name for name in used if floor_of(name) > floor_of(module(path))}
    assert too_high == set()
    assert "train" not in used


def test_models_know_nothing_of_training():
    for path in [*sources("pipeline/models"), *sources("pipeline/nn")]:
        used = {name.removeprefix("pipeline.").split(".")[0] for name in imports(path) if name.startswith("pipeline.")}
        assert used & (FORBIDDEN_TO_MODELS | {"data"}) == set(), path


def test_the_two_packages_do_not_import_each_other():
    assert [
        path
        for path in sources("shard_data")
        if any(name.split(".")[0] in ("pipeline", "torch") for name in imports(path))
    ] == []
    assert [
        path for path in sources("pipeline") if any(name.split(".")[0] == "shard_data" for name in imports(path))
    ] == []


@pytest.mark.parametrize("library", [name for name, door in DOORS.items() if door is not None])
def test_each_third_party_has_one_door(library):
    users = {
        str(path.relative_to(ROOT))
        for package in ("pipeline", "shard_data")
        for path in sources(package)
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users <= DOORS[library]


def test_nothing_shadows_the_standard_library():
    """`python pipeline/train.py` puts pipeline/ itself on the path first."""
    names = {path.stem for path in (ROOT / "pipeline").iterdir()}
    assert names & set(sys.stdlib_module_names) == set()


def test_no_way_to_run_code_from_a_file():
    for path in [*sources("pipeline"), *sources("shard_data")]:
        assert imports(path) & {"pickle", "dill", "cloudpickle", "shelve", "marshal"} == set(), path
        text = path.read_text()
        assert not re.search(r"(?<!\.)torch\.load\(", text), path
        assert "allow_pickle=True" not in text, path


@pytest.mark.parametrize("path", [*sources("pipeline"), *sources("shard_data")], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_classes_can_be_read_in_one_sitting(path):
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 450
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 250, node.name
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
