"""Three layers become one strict, frozen config: defaults, then a recipe file, then overrides `section.key=value`.

Values are YAML in recipes and overrides. pydantic checks types and values. This module reads YAML strictly (no
duplicate keys, `5e-3` is a number), applies the overrides, and writes the messages: the dotted path of the setting, and
what to write instead. It depends on no particular section.
"""

import difflib
import json
import math
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.schema import Section

SectionType = TypeVar("SectionType", bound=Section)


ALIASES = {"data.binarise": "data.binarize"}
"""Renamed settings: former dotted path to present one. Recipes, overrides and checkpoints may use the former."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message names its dotted path and what is allowed."""


MAX_VALUES = 100_000
"""Values that a recipe may have when its YAML aliases are expanded."""


MAX_RECIPE_BYTES = 2**16
MAX_NESTING = 50
"""Brackets and braces in each other; the time of PyYAML's scanner grows with their number."""
MAX_DIGITS = 400
"""Of a number, which `float` can then still represent."""
_KINDS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader for the values that JSON has: decimal numbers, text, lists, and mappings with unique names.

    Dates are text. What aliases expand to is bounded.
    """

    yaml_implicit_resolvers: typing.ClassVar = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag in _KINDS]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: typing.ClassVar = {
        tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag in {*_KINDS, None}
    }

    def fetch_flow_collection_start(self, token_class: type[yaml.Token]) -> None:
        if self.flow_level >= MAX_NESTING:
            raise yaml.scanner.ScannerError(None, None, "nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > MAX_VALUES:
            raise _refused("its aliases expand to too many values", node)
        return node

    def construct_decimal_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        if ":" in text:
            raise _refused(
                f"{node.value} is a number to base 60 in YAML 1.1; write a decimal number, or quote it", node
            )
        if len(text) > MAX_DIGITS:
            raise _refused(f"a number of {len(text)} digits", node)
        return int(text) if text.lstrip("+-").isdigit() else self.construct_yaml_int(node)

    def construct_decimal_float(self, node: yaml.ScalarNode) -> float:
        if ":" in node.value:
            return self.construct_decimal_int(node)  # refuses it
        return self.construct_yaml_float(node)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = self.construct_scalar(node)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _refused("text that is not valid Unicode", node)
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if not isinstance(name, str):
                raise _refused(f"{name!r} is used as a name; names are text", node)
            if names.count(name) > 1:
                raise _refused(f"key {name!r} is given twice", node)
        return super().construct_mapping(node, deep)


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Values below a node, those behind aliases counted each time; infinite where a node holds itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_decimal_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_decimal_float)
_StrictLoader.add_constructor("tag:yaml.org,2002:str", _StrictLoader.construct_text)
# Text in YAML 1.1, but a number in YAML 1.2 and to a reader: 5e-3, 1e5.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises ConfigError naming `where` and the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(_one_line(f"{where}: not valid YAML: {error.problem}{place}")) from None
    except yaml.YAMLError as error:
        raise ConfigError(_one_line(f"{where}: not valid YAML: {' '.join(str(error).split())}")) from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError where the file is missing or is not a mapping."""
    if not path.exists():
        recipes = [str(other) for other in path.parent.glob("*.yaml")]
        raise ConfigError(f"{path}: no such recipe file{_did_you_mean(str(path), recipes, cutoff=0.8)}")
    if not path.is_file():
        raise ConfigError(f"{path}: not a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_RECIPE_BYTES + 1)
    if len(content) > MAX_RECIPE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes; not a recipe")
    try:
        data = parse_yaml(content.decode(), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8; not a recipe") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a recipe: it holds no sections, for instance train: {{steps: 1000}}")
    return data


def parse_override(override: str) -> tuple[list[str], Any]:
    """`train.batch_size=64`, with or without a leading `--`, to (["train", "batch_size"], 64)."""
    name, equals, value = override.removeprefix("--").partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise ConfigError(f"{override!r}: settings are given as section.key=value, for instance train.batch_size=64")
    return name.split("."), parse_yaml(value, name)


def overlay(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with the value of each override at its dotted path."""
    result = with_present_names(data)
    for override in overrides:
        path, value = parse_override(override)
        path = ALIASES.get(".".join(path), ".".join(path)).split(".")
        place = result
        for depth, key in enumerate(path[:-1], start=1):
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigError(
                    f"{'.'.join(path[:depth])}: holds a value, so '{'.'.join(path)}' cannot be set inside it"
                )
        place[path[-1]] = value
    return result


def with_present_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `data` in which settings have their present names instead of former ones. See ALIASES.

    Raises ConfigError where a setting is given by both names.
    """
    result = json.loads(json.dumps(data, default=str))
    for former, present in ALIASES.items():
        *path, old_key = former.split(".")
        section = result
        for key in path:
            section = section.get(key) if isinstance(section, dict) else None
        if not isinstance(section, dict) or old_key not in section:
            continue
        new_key = present.rpartition(".")[2]  # in the same section
        if new_key in section:
            raise ConfigError(f"{former}: the former name of {present}, which is also given; keep {present}")
        section[new_key] = section.pop(old_key)
    return result


def build(kind: type[SectionType], data: Mapping[str, Any]) -> SectionType:
    """`data` as a validated, frozen `kind`. Raises ConfigError with one line for each invalid setting."""
    data = with_present_names(data)
    try:
        # In JSON mode pydantic is strict about types, yet accepts a list for a tuple, which YAML does not have.
        return kind.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        faults = [fault for fault in error.errors() if not _is_repeated(fault, error.errors())]
        raise ConfigError("\n".join(dict.fromkeys(_one_line(_explain(kind, fault)) for fault in faults))) from None


def dump(section: Section, defaults: bool = True) -> str:
    """The section as YAML that `build` reads back to an equal section, with or without the settings that have their
    defaults.
    """
    data = section.model_dump(mode="json") if defaults else without_defaults(section)
    return yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None)


def without_defaults(section: Section) -> dict[str, Any]:
    """The settings that differ from their defaults, and the names that select the kind of a section."""
    dumped, result = section.model_dump(mode="json"), {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        is_tag = typing.get_origin(field.annotation) is Literal and len(typing.get_args(field.annotation)) == 1
        if is_tag or value != field.get_default(call_default_factory=True):
            result[name] = without_defaults(value) if isinstance(value, Section) else dumped[name]
    return result


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return flat


def _one_line(message: str) -> str:
    """The message in printable characters: parts of it come from a file."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)


def _is_repeated(fault: Mapping[str, Any], faults: list) -> bool:
    """Whether another fault says more: of an element, where the list without it is too short; of the wider type, where
    a setting can be an int or a float.
    """
    place, others = fault["loc"], [each["loc"] for each in faults]
    if fault["type"] == "too_short":
        return any(other[:-1] == place for other in others)
    return place[-1:] == ("int",) and (*place[:-1], "float") in others


def _explain(kind: type[Section], fault: Mapping[str, Any]) -> str:
    """One line: the dotted path of the setting, what is wrong, and a value that is allowed."""
    path, holder = _locate(kind, fault["loc"])
    dotted, given, error = ".".join(path)[:200] or "settings", f"(given: {_shown(fault)})", fault["type"]
    if error == "value_error":  # the check of a whole section names the settings itself
        field = _fields(holder).get(path[-1]) if path else None
        prefix = f"{dotted}: " if field is not None and not sections_in(field.annotation) else ""
        return prefix + fault["msg"].removeprefix("Value error, ")
    if error == "extra_forbidden":
        return f"{dotted}: unknown key{_suggestion(path, kind, holder)}"
    if error == "missing":
        return f"{dotted}: is required and has no default"
    if error == "union_tag_not_found":
        names = [tag_of(section) for section in sections_in(_fields(holder)[path[-1]].annotation)]
        return f"{dotted}: needs a name, one of {', '.join(names)}, for instance {dotted}.name={names[0]}"
    if error == "union_tag_invalid":
        allowed = fault["ctx"]["expected_tags"]
        hint = _did_you_mean(str(fault["ctx"]["tag"]), re.findall(r"'([^']*)'", allowed))
        return f"{dotted}.name: {_shown(fault)} is not allowed{hint or ';'} choose from {allowed}"
    if error == "literal_error":
        return f"{dotted}: {_shown(fault)} is not allowed; choose from {fault['ctx']['expected']}"
    if error in NEEDS:
        return f"{dotted}: needs {NEEDS[error]}{_example(path, holder, fault['input'], error)} {given}"
    bounds = {name: f"{value:g}" if isinstance(value, float) else value for name, value in fault.get("ctx", {}).items()}
    return f"{dotted}: {BOUNDS.get(error, fault['msg']).format(**bounds)} {given}"


NEEDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a section of settings",
    "model_attributes_type": "a section of settings",
    "dict_type": "a section of settings",
}
"""What a setting needs, by the type of pydantic's error."""

BOUNDS = {
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "needs {min_length} or more values",
    "too_long": "must have at most {max_length} values",
    "string_too_short": "needs {min_length} or more characters",
    "string_too_long": "must have at most {max_length} characters",
    "json_invalid": "nested too deeply",
}
"""Messages in place of pydantic's, by the type of its error."""

EXAMPLES = {"int_type": 32, "int_from_float": 32, "float_type": 0.1, "tuple_type": [1, 2], "list_type": [1, 2]}
"""Values of settings that have no default."""


def _example(path: list[str], holder: type[Section] | None, given: Any, error: str) -> str:
    """`, for instance` and an override with a value of the right type; empty for an element of a list."""
    field, name = _fields(holder).get(path[-1]), ".".join(path)
    if field is None:
        return ""
    if sections := sections_in(field.annotation):
        value = f"{{name: {tag_of(sections[0])}}}" if len(sections) > 1 else None
    elif error == "string_type" and isinstance(given, int | float):
        value = f'"{given}"'  # unquoted, YAML reads it as a number
    elif isinstance(field.default, str | int | float | tuple) and field.default != ():
        value = field.default if isinstance(field.default, str) else json.dumps(field.default)
    else:
        value = "[a, b]" if "tuple[str" in str(field.annotation) else json.dumps(EXAMPLES.get(error))
    return "" if value in (None, "null") else f", for instance {shlex.quote(f'{name}={value}')}"


def _shown(fault: Mapping[str, Any]) -> str:
    value = fault.get("ctx", {}).get("tag", fault.get("input"))
    return repr(value)[:80]


def _locate(kind: type[Section], loc: tuple) -> tuple[list[str], type[Section] | None]:
    """The path as the user writes it (without the tags that pydantic puts in for unions) and the section that holds
    its last key.
    """
    path: list[str] = []
    holder: type[Section] | None = kind
    current: Any = kind
    for part in loc:
        members = {tag_of(section): section for section in sections_in(current)}
        if part in members and part not in _fields(current):
            current = members[part]  # a union's tag, which the user did not write
            continue
        if part in ("int", "float") and path and part not in _fields(current):
            continue  # a type of a union
        holder = current if _is_section(current) else None
        path.append(str(part))
        field = _fields(current).get(part)
        current = field.annotation if field is not None else None
        sections = sections_in(current)
        if len(sections) == 1:
            current = sections[0]
    return path, holder


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _fields(kind: Any) -> dict:
    return kind.model_fields if _is_section(kind) else {}


def sections_in(annotation: Any) -> list[type[Section]]:
    if _is_section(annotation):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [section for part in typing.get_args(annotation) for section in sections_in(part)]
    return []


def tag_of(section: type[Section]) -> str | None:
    field = section.model_fields.get("name")
    return field.default if field is not None and isinstance(field.default, str) else section.__name__


def _suggestion(path: list[str], root: type[Section], holder: type[Section] | None) -> str:
    key, names = path[-1], list(_fields(holder))
    elsewhere = [f"{name}.{key}" for name, field in _fields(root).items() if _has_setting(field.annotation, key)]
    if len(path) == 1 and elsewhere:
        return f"; did you mean {' or '.join(map(repr, elsewhere))}?"
    return _did_you_mean(key, names) or (f"; known keys: {', '.join(names)}" if names else "")


def _did_you_mean(word: str, names: list[str], cutoff: float = 0.5) -> str:
    """Names the one that a mistyped word is most similar to, if any is."""
    similar = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def _has_setting(annotation: Any, key: str) -> bool:
    return any(key in section.model_fields for section in sections_in(annotation))
