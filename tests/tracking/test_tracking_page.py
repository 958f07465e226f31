"""docs/tracking.md: its commands are ones that the tools take, its alerts and keys those of the code."""

import re
import shlex

import pytest

from pipeline.recipe import load_recipe, recipe_path
from pipeline.tracking import dashboard, upload
from pipeline.tracking.wandb_metrics import KL_BY_GROUP
from pipeline.train import parse
from tests.helpers.launching import ROOT

PAGE = (ROOT / "docs/tracking.md").read_text()
TOOLS = {"dashboard": dashboard.build_parser, "upload": upload.build_parser}
COMMANDS = sorted(set(re.findall(r"python -m pipeline\.tracking\.(\w+)([^`\n]*)", PAGE)))


@pytest.mark.parametrize(("tool", "words"), COMMANDS)
def test_the_tools_take_the_commands(tool, words):
    TOOLS[tool]().parse_args(shlex.split(words))


def test_every_tool_and_training_is_shown():
    assert {tool for tool, _ in COMMANDS} == TOOLS.keys()
    (words,) = re.findall(r"pipeline/train\.py (.*)", PAGE)
    parsed = parse(shlex.split(words))
    assert load_recipe(recipe_path(parsed.model), parsed.overrides).tracking.tensorboard
    assert (ROOT / re.search(r"wandb sweep (\S+)", PAGE)[1]).is_file()


def test_the_table_of_alerts_is_that_of_the_code():
    table = PAGE[PAGE.index("| alert |") : PAGE.index("### Dashboard")]
    stated = {line.split(" | ")[0].removeprefix("| ") for line in table.strip().splitlines()[2:]}
    found = set(re.findall(r'Alert\("(.+?)"', (ROOT / "pipeline/tracking/alerts.py").read_text()))
    assert found <= stated
    assert len(found) == 4
    code = "".join(path.read_text() for path in (ROOT / "pipeline").glob("run/*.py"))
    code += (ROOT / "pipeline/tracking/tracker.py").read_text()
    for title in stated - found:
        assert title in code, title
    assert f"`{KL_BY_GROUP}`" in PAGE
