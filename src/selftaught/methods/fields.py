"""Which values a method's fields may have, written as intervals."""

from __future__ import annotations

import dataclasses
from typing import Any

CLIP = {"eps_low": "[0, 1) or None: no clip", "eps_high": "[0, inf) or None: no clip"}
DUAL_CLIP = "(1, inf) or None: no bound"
NUMBER = "must be a number (in YAML 1e-3 is text; write 1.0e-3)"


def require(method: Any, **rules: str) -> None:
    """Check fields by rules such as "[0, 1)", "(0, inf)", "int [1, inf)", "one of a, b" or "bool"; "inf]" lets
    infinity in.

    A rule that ends in "or None: MEANING" lets a field be None, and tells in its message what that would mean; what
    follows "; " in a rule is said of numbers outside it. A field whose default is true or false needs no rule: text
    such as "false" would count as true.

    Raises:
        ValueError: a value outside its rule, with the field, the value and the rule.
    """
    switches = {field.name: "bool" for field in dataclasses.fields(method) if isinstance(field.default, bool)}
    for field, rule in {**switches, **rules}.items():
        allowed, _, without = rule.partition(" or None: ")
        value = getattr(method, field)
        if value is None and without:
            continue
        fault = _fault(value, allowed)
        if fault:
            else_ = f", or None (null in YAML) for {without}" if without else ""
            raise ValueError(f"{field} = {value!r}: {fault}{else_}")


def _fault(value: Any, rule: str) -> str | None:
    """What `value` must be and is not; None: it is."""
    if rule.startswith("one of "):
        choices = rule.removeprefix("one of ").split(", ")
        return None if value in choices else f"must be {rule}"
    if rule == "bool":
        return None if isinstance(value, bool) else "must be true or false"
    rule, mark, hint = rule.partition("; ")
    kind, interval = (int, rule.removeprefix("int ")) if rule.startswith("int ") else ((int, float), rule)
    if isinstance(value, bool) or not isinstance(value, kind):
        return f"must be a whole number in {interval}" if kind is int else NUMBER
    low, high = (float(end) for end in interval[1:-1].split(", "))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return None if above and below else f"must be {'a whole number ' if kind is int else ''}in {interval}{mark}{hint}"
