"""Hypothesis strategies for files that an attacker, an editor or a bad disk could leave."""

import json
from typing import Any

from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.text(max_size=6),
    st.sampled_from(["", "..", "/etc/passwd", "\x1b[31m", "\ud800", "NaN", "-Infinity", "x" * 300]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
"""Values that `json.loads` can give."""

NESTED = st.builds(
    lambda depth, opening: (opening * depth).encode(), st.integers(1, 20_000), st.sampled_from(["[", '{"a":', "{"])
)
"""JSON that is nested deeply and not closed."""


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a JSON value in which one or two places have another value, are missing, or have another name."""
    result = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        place, key = result, draw(st.sampled_from(_keys(result)))
        while isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from(_keys(place)))
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if what == "replace":
            place[key] = draw(VALUES)
        elif what == "rename" and isinstance(place, dict):
            place[draw(st.text(max_size=5))] = place.pop(key)
        else:
            del place[key]
        if not result:
            break
    return result


def _keys(place: dict | list) -> list:
    return list(place) if isinstance(place, dict) else list(range(len(place)))


@st.composite
def flipped(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with a few replaced, inserted or cut out."""
    result, syntax = bytearray(content), [b"[", b"{", b'"', b",", b"\n", b"\0", b"9" * 40]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(result)))
        stop = min(len(result), start + draw(st.integers(0, 8)))
        result[start:stop] = draw(st.binary(max_size=4) | st.sampled_from(syntax))
    return bytes(result)


def dumps(value: Any) -> bytes:
    """JSON as Python writes it: NaN and lone surrogates included."""
    return json.dumps(value, indent=1).encode()
