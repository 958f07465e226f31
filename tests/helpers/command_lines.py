"""Lines that commands show: the facts of a banner, and the commands that come next, which have to be real ones."""

import importlib
import re
import shlex
from pathlib import Path

from tests.helpers.launching import ROOT


def shown_facts(lines: list[str]) -> dict[str, list[str]]:
    """{name: texts} of aligned lines; a line without a name belongs to the one before."""
    facts, name = {}, ""
    for line in lines:
        if match := re.fullmatch(r"  (\w+) +(.*)", line):
            name = match[1]
            facts[name] = [match[2]]
        elif name and line.startswith("   "):
            facts[name].append(line.strip())
    return facts


def check_commands(commands: list[str]) -> None:
    """Each is a command of this project, with arguments that it takes."""
    for command in commands:
        python, *words = shlex.split(command)
        assert python == "python", command
        module = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), command
        if Path(path / "__main__.py").is_file():
            module += ".__main__"
        importlib.import_module(module).build_parser().parse_args(words[2 if words[0] == "-m" else 1 :])
