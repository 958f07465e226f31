"""docs/tools.md and the scripts' own examples: every command that they show is one that the tools take."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline import convert, edit, evaluate, export, report, runs, sample, status

ROOT = Path(__file__).parents[2]
TOOLS = {f"{tool.__name__.split('.')[-1]}.py": tool for tool in (evaluate, sample, edit, convert, export, report)}
TOOLS |= {"pipeline.runs": runs, "pipeline.status": status}
TEXTS = [(ROOT / "docs/tools.md").read_text(), *(tool.__doc__ for tool in TOOLS.values())]
SHOWN = re.compile(
    r"^ *(?:.*pipeline/\w+\.py (?:runs/|models/|hf-hub:|--from|--to).*|python -m pipeline\.(?:runs|status)\b.*)$", re.M
)
COMMANDS = sorted({line.strip() for text in TEXTS for line in SHOWN.findall(text)})


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_shown_can_be_typed(command):
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.removeprefix("pipeline/") in TOOLS)
    tool = TOOLS[words[place].removeprefix("pipeline/")]
    parsed = tool.build_parser().parse_args(words[place + 1 :])
    if tool is export and "models/" not in parsed.location:
        export.check_arguments(parsed)
    if tool is edit:
        edit.check_arguments(parsed)
        edit.parse_strengths(parsed.strength or "1", parsed.steps)


@pytest.mark.parametrize("tool", TOOLS.values())
def test_every_option_is_explained(tool):
    assert all(action.help for action in tool.build_parser()._actions)
