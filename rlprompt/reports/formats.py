"""How values and foreign text are written on a page."""

from __future__ import annotations

import math
import re
from typing import Any

MAX_TEXT = 1500
"""Characters of a text that a page shows."""


def shown_value(value: Any) -> str:
    """Write a number as `shown_number` does, and anything else as text of 500 characters."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return shown_number(value) if number else clean(str(value), 500)


def shown_number(value: float | None) -> str:
    """Write a number for a reader: integers whole, others with three decimals or digits."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.1f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}"


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return ("+" if value >= 0 else "") + shown_number(value)


def clean(text: str, limit: int) -> str:
    """Drop control characters, which HTML has no form for, and cut what is too long to read."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    if len(text) > limit:
        text = f"{text[:limit].rstrip()} ... ({len(text) - limit:,} more characters)"
    return text
