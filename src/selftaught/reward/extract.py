"""Pure functions from a completion's text to the answer in it. None means that no answer was found."""

from __future__ import annotations

import re
from fractions import Fraction

LETTERS = "ABCDEFGHIJ"

# A sign counts only where it cannot be a minus between two terms: "5-3" ends with 3, "= -3" with -3.
_NUMBER = (
    r"(?:(?<![\w.)\]}])[-+\u2212])?[$€£]?(?<![\w.])"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?"
    r"(?!\d|\.\d|[eE][-+]?\d)"  # never the front part of a longer number
)
_FIND_NUMBER = re.compile(rf"{_NUMBER}(?:\s?/\s?\d+(?![\d.]))?")
_LETTER = r"(?:\(\s*([A-Ja-j])\s*\)|\*\*\(?([A-Ja-j])\)?\*\*|([A-Ja-j])(?![\w'’]))"
_TAGGED = re.compile(r"<answer>\s*\(?([A-Ja-j])\)?[.:]?\s*</answer>")
_STATED = re.compile(rf"(?:answer|choice|option)(?:\s+is)?\s*[:=]?\s*(?:\*\*)?\s*{_LETTER}", re.IGNORECASE)
_LEADING = re.compile(r"\A\s*(?:\(([A-Ja-j])\)|([A-Ja-j])[.):](?!\w)|([A-Ja-j])\s*(?:\n|\Z))")
_ALONE = re.compile(r"(?:\(([A-J])\)|^\s*([A-J])[.)]?\s*$)", re.MULTILINE)
_ANOTHER = re.compile(r"\s*(?:,|/|&|or|and)\s*\(?[A-Ja-j](?![\w'’])")


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} whose braces balance."""
    for match in reversed(list(re.finditer(r"\\f?box(?:ed)?\s*\{", text))):
        depth = 1
        for at in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[match.end() : at].strip()
    return None


def captured(text: str, pattern: str) -> str | None:
    """The last match of `pattern`: its first group that took part, or the whole match if it has no group."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    if last.re.groups == 0:
        return last.group().strip()
    return next((group.strip() for group in last.groups() if group is not None), None)


def extract(text: str, how: str, pattern: str | None = None) -> str | None:
    """The answer in `text` by one of the rules that a recipe may name.

    whole: all of it, stripped. last_line: the last line that is not blank. last_number. boxed.
    after:MARK: the rest of the line after the last MARK, without one closing full stop.
    regex: the last match of `pattern`, its first group if it has one.
    """
    if how == "whole":
        return text.strip() or None
    if how == "last_line":
        return text.strip().rpartition("\n")[2].strip() or None
    if how == "last_number":
        found = _FIND_NUMBER.findall(text)
        return found[-1].strip() if found else None
    if how == "boxed":
        return boxed(text)
    if how == "regex":
        return captured(text, pattern or "")
    mark = how.removeprefix("after:")
    _, found_mark, rest = text.rpartition(mark)
    return rest.strip().partition("\n")[0].strip().removesuffix(".").strip() or None if found_mark else None


def number(text: str) -> Fraction | None:
    """The exact value of a text that is one number: "1,234.5", "-3/4", "2e3", "$5", "5 %" (5), "\\frac{1}{2}"."""
    text = re.sub(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text).replace("\u2212", "-")
    text = text.strip().strip("$ ").replace("\\,", "").replace("{,}", ",").rstrip("%\\ ").removesuffix(".").strip()
    if not re.fullmatch(rf"{_NUMBER}(?:\s?/\s?{_NUMBER})?", text):
        return None
    plain = re.sub(r"[,\s$€£]", "", text)
    try:
        top, _, bottom = plain.partition("/")
        return Fraction(top) / Fraction(bottom or "1")
    except (ValueError, ZeroDivisionError):  # ValueError: more digits than Python turns into an int
        return None


def number_text(value: Fraction) -> str:
    """One spelling per value, so that equal answers vote together: "12", "-0.75", "1/3"."""
    if value.denominator == 1:
        return str(value.numerator)
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return str(value)
    digits = max(twos, fives)
    scaled = str(abs(value.numerator) * 10**digits // value.denominator).rjust(digits + 1, "0")
    return f"{'-' if value < 0 else ''}{scaled[:-digits]}.{scaled[-digits:]}"


def letter(text: str) -> str | None:
    """The one choice A to J that a text settles on; None where it names none or hedges ("A or B").

    In order: a boxed one, the last one in tags ("<answer>B</answer>"), the last one stated ("Answer: B", "the answer is
    (B)"), one that opens the text ("B.", "(B) because"), and the last one that stands alone ("(B)", or a line of its
    own).
    """
    inside = boxed(text)
    if inside is not None:
        bare = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", inside).strip().strip("().").upper()
        return bare if len(bare) == 1 and bare in LETTERS else None
    for pattern in (_TAGGED, _STATED, _LEADING, _ALONE):
        matches = [match for match in pattern.finditer(text) if not _is_article(match, text)]
        if matches:
            last = matches[-1]
            if _ANOTHER.match(text, last.end()):
                return None
            return next(group for group in last.groups() if group).upper()
    return None


def _is_article(match: re.Match[str], text: str) -> bool:
    """Is the letter the word "a" or "I", as in "the answer is a number"?"""
    if match.re is not _STATED or match.group(3) not in ("a", "i", "I"):
        return False
    return re.match(r"[ \t]+[a-z]", text[match.end() : match.end() + 2]) is not None and not _ANOTHER.match(
        text, match.end()
    )
