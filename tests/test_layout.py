"""Rules of the code base that a test can check: imports between folders, one module per third party, names, sizes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "launch train evaluate sample edit convert export train_classifier status report runs": 7,  # the commands
    "inference reporting": 6,
    "run": 5,
    "recipe": 4,
    "evaluation training": 3,
    "data models tracking": 2,
    "nn storage cli": 1,
    "config distributed": 0,
    "schema": -1,
}
"""Folders and modules of pipeline/ by floor. Each imports only from itself and from floors below. A module that is not
named here may not stand at the top of pipeline/."""

FLOOR = {name: floor for names, floor in FLOORS.items() for name in names.split()}
FOLDERS = {
    "inference",
    "reporting",
    "run",
    "evaluation",
    "training",
    "data",
    "models",
    "tracking",
    "nn",
    "storage",
    "distributed",
}

DOORS = {
    "wandb": {f"pipeline/tracking/wandb_{name}.py" for name in ("connection", "service", "media", "artifacts")},
    "wandb_workspaces": {"pipeline/tracking/dashboard.py"},
    "torch.utils.tensorboard": {"pipeline/tracking/tensorboard_run.py"},
    "yaml": {"pipeline/config.py"},
    "accelerate": {"pipeline/distributed/runtime.py", "pipeline/launch.py"},
    "torch.distributed": {"pipeline/distributed/collectives.py", "pipeline/launch.py"},
    "torchvision": {"pipeline/evaluation/images.py"},
    "webdataset": {"shard_data/verify.py"},
    "huggingface_hub": {"pipeline/inference/hub.py"},
    "pydantic": None,
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in the file. Also torch.distributed, which comes with torch."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def place(path: Path) -> str:
    """The folder, or the module at the top of pipeline/, that a file belongs to."""
    return path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")


def test_everything_in_pipeline_has_a_floor():
    found = {place(path) for path in sources("pipeline")} - {"__init__", "configs"}
    assert found == FLOOR.keys()
    assert {name for name in found if (ROOT / "pipeline" / name).is_dir()} == FOLDERS


@pytest.mark.parametrize("name", FLOOR)
def test_imports_go_to_floors_below(name):
    used = {
        imported.split(".")[1]
        for path in sources("pipeline")
        if place(path) == name
        for imported in imports(path)
        if imported.startswith("pipeline.")
    } - {name}
    assert {other for other in used if FLOOR[other] >= FLOOR[name]} == set()


def test_few_places_depend_on_each_other():
    """An arrow leads from one folder, script or module at the top to another one that it imports."""
    arrows = set()
    for package in ("pipeline", "shard_data", "benchmarks"):
        for path in sources(package):
            start = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
            arrows |= {
                (start, room(name)) for name in imports(path) if name.split(".")[0] in ("pipeline", "shard_data")
            }
    arrows = {(start, end) for start, end in arrows if start != end and end != "pipeline"}
    assert len({place for arrow in arrows for place in arrow}) <= 28
    assert len(arrows) <= 98


def room(module: str) -> str:
    """The part of the project that a module belongs to: `pipeline.data`, `pipeline.recipe`, `shard_data`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "pipeline" else parts[0]


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_says_what_it_is_for(folder):
    file = ROOT / "pipeline" / folder / "__init__.py"
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert text, f"pipeline/{folder}/__init__.py has no docstring"
    assert len(text.splitlines()) <= 3


def test_shard_data_imports_neither_pipeline_nor_torch():
    assert [
        path
        for path in sources("shard_data")
        if any(name.split(".")[0] in ("pipeline", "torch") for name in imports(path))
    ] == []


FORMAT = {
    "data": {"errors", "fetch", "file_lock", "files", "manifest", "progress", "terminal"},
    "run": {"manifest", "progress", "terminal"},
    "inference": {"fetch", "file_lock", "files", "manifest", "progress", "terminal"},
    "reporting": {"errors", "files", "info", "manifest", "terminal"},
    "storage": {"file_lock", "files", "progress"},
    "distributed": {"progress", "terminal"},
    "cli": {"progress", "terminal"},
}
"""Modules of shard_data that parts of pipeline/ may import: the format of a shard set, locks, and progress."""


def test_pipeline_imports_only_the_format_side_of_shard_data():
    for path in sources("pipeline"):
        used = {".".join(name.split(".")[:2]) for name in imports(path) if name.split(".")[0] == "shard_data"}
        allowed = {f"shard_data.{module}" for module in FORMAT.get(place(path), ())}
        assert used - {"shard_data"} <= allowed, path


def test_the_format_side_of_shard_data_is_light():
    modules = ", ".join(sorted(f"shard_data.{module}" for module in FORMAT["data"]))
    code = f"import sys, {modules}; print(sorted({{'torch', 'numpy', 'PIL', 'webdataset'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize("library", [name for name, door in DOORS.items() if door is not None])
def test_each_third_party_has_one_door(library):
    users = {
        str(path.relative_to(ROOT))
        for package in ("pipeline", "shard_data")
        for path in sources(package)
        if any(f"{name}.".startswith(f"{library}.") for name in imports(path))
    }
    assert users <= DOORS[library]


def test_nothing_shadows_the_standard_library():
    """`python pipeline/train.py` puts pipeline/ itself on the path first."""
    names = {path.stem for path in (ROOT / "pipeline").iterdir()}
    assert names & set(sys.stdlib_module_names) == set()


PICKLES = {ROOT / "pipeline/data/workers.py": {"pickle"}}
"""What goes from a process to its parent, through a socket that nobody else has."""


READS_PICKLES = {ROOT / "pipeline/storage/pickled_checkpoint.py", ROOT / "pipeline/inference/feature_weights.py"}
"""The only files that call torch.load, once; tests/storage/test_pickled_checkpoint.py and
tests/inference/test_feature_weights.py show what they refuse."""


def test_no_way_to_run_code_from_a_file():
    for path in [*sources("pipeline"), *sources("shard_data")]:
        pickles = imports(path) & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
        assert pickles == PICKLES.get(path, set()), path
        text = path.read_text()
        loads = re.findall(r"^[^\"'`\n]*(?<!\.)torch\.load\((.*)", text, re.M)
        assert len(loads) == (path in READS_PICKLES), path
        assert all("weights_only=True" in arguments for arguments in loads), path
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


@pytest.mark.parametrize("path", sources("tests"), ids=lambda p: str(p.relative_to(ROOT)))
def test_test_files_are_not_imported(path):
    """What several of them need is in tests/helpers. A child process may import the file that starts it."""
    parts = [part for name in imports(path) if name.startswith("tests.") for part in name.split(".")]
    assert [part for part in parts if part == "conftest" or part.startswith("test_")] == []


AVOIDED = re.compile(
    r"\b(told|asked|anew|in patience|crew|witness(es)?|verdicts?|borne|bears|mend(s|ed)?|remed(y|ies)|left out|goes on"
    r"|straight run|step's edge|unlosable|hard to kill|shared fate|\w*colours?|behaviours?|neighbours?"
    r"|licences?|\w*(optimi|normali|initiali|regulari|binari|minimi|maximi|synchroni|randomi|recogni)s"
    r"(e|ed|es|er|ers|ing|ation))\b",
    re.IGNORECASE,
)
"""Words that the project does not use: quaint ones, and British spellings. Plain English is what others search for."""

FORMER_NAMES = {
    "binarise": {"pipeline/config.py", "docs/migration.md", "docs/settings.md"},
    "recognised": {"docs/migration.md"},
}
"""Settings of earlier versions, and the files that name them."""


def texts() -> list[str]:
    """Code and documents that are read by users and contributors."""
    roots = ["pipeline", "shard_data", "benchmarks", "slurm", "docs", "accelerate_configs"]
    files = [
        path for root in roots for path in (ROOT / root).rglob("*") if path.suffix in {".py", ".md", ".sh", ".yaml"}
    ]
    return sorted(str(path.relative_to(ROOT)) for path in [*files, *ROOT.glob("*.md"), ROOT / "Makefile"])


def test_plain_words_are_used():
    """In names, messages, comments and documents; the underscores of a name separate its words."""
    found = []
    for name in texts():
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1):
            words = {match[0].lower() for match in AVOIDED.finditer(line.replace("_", " "))}
            words = {word for word in words if name not in FORMER_NAMES.get(word, ())}
            found += [f"{name}:{number}: {word}" for word in sorted(words)]
    assert sorted(found) == []
