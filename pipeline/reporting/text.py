"""Numbers and times as a reader wants them."""

import json
import math
from datetime import datetime
from typing import Any

MINUS = "\N{MINUS SIGN}"


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, and a thousands separator: `12,345`, `0.1738`, `1.2e-05`."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else f"{MINUS}\N{INFINITY}"
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif 1e-4 <= abs(value) < 1e7:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
    else:
        text = f"{value:.{digits - 1}g}"
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


def moment(seconds: float) -> str:
    """A time since 1970 in the local time zone: `2026-11-28 15:13`."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds > 0 else "\N{EN DASH}"
    except (ValueError, OverflowError, OSError):
        return "\N{EN DASH}"


def setting(value: Any) -> str:
    """A setting as one writes it in a recipe."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)
