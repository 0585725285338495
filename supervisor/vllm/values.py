"""Reads values, written as text or in YAML, for options of `vllm serve`; it raises BadValue where it can't.

vLLM's own converters decide what is right (`engine/arg_utils.py` and `utils/argparse_utils.py` there); each reader
returns the text that goes on argv. What a person may write more freely (a list between commas, a choice in other
capitals) is brought into vLLM's form.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

TRUE_WORDS = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS = frozenset({"false", "0", "no", "off"})
# Decimal suffixes are small, binary ones large (`1k` is 1000, `1K` is 1024); only small ones take a fraction.
HUMAN_INT = re.compile(r"\d+(\.\d+)?[kmgt]|\d+[KMGT]")
HUMAN_INT_IN_JSON = re.compile(r'("(?:[^"\\]|\\.)*")|\b(?:\d+(?:\.\d+)?[kmgt]|\d+[KMGT])\b')
JSON_OBJECT = 'a JSON object, such as {"key": "value"}'
CHOICES_SHOWN = 12  # more choices than this are not all printed


class BadValue(ValueError):
    """The option does not take the value; the text says what it expects, with an example."""


# A pattern of a template that was not filled in -> how such placeholders are written.
PLACEHOLDERS = (
    (re.compile(r"\{\{.*\}\}", re.DOTALL), "{{ NAME }}"),  # Helm, RunPod's secrets, GitHub's
    (re.compile(r"\$\{[A-Za-z_]\w*(\W.*)?\}", re.DOTALL), "${NAME}"),  # shells, compose
    (re.compile(r"\$\([A-Za-z_]\w*\)"), "$(NAME)"),  # Kubernetes, where there is no such variable
    (re.compile(r"^\$[A-Z_][A-Z0-9_]*$"), "$NAME"),
    (re.compile(r"^%[A-Za-z_]\w*%$"), "%NAME%"),  # Windows
    (re.compile(r"^\{[A-Z_][A-Z0-9_]*\}$"), "{NAME}"),
    # A page's example, for a person to fill in; `<think>` is a value.
    (re.compile(r"^<[^<>]*(your|token|key|model|name|secret|value|here)[^<>]*>$", re.IGNORECASE), "<NAME>"),
)
QUOTES = {"'": "'", '"': '"', "`": "`", "\u201c": "\u201d", "\u2018": "\u2019"}  # the last two are a word processor's
INVISIBLES = "\ufeff\u200b\u2060"  # a copy from a page may have these at its ends; they are no white space to Python


def clean(given: Any, *, template: bool = False, command: bool = False) -> Any:
    """Returns a value as it was meant, from whatever source, without white space around it. `template`: its braces are
    its own; `command`: so are its quotes.

    Raises BadValue for what somebody else was to fill in, or to take out of its quotes.
    """
    if isinstance(given, list | tuple):
        return [clean(item, template=template, command=command) for item in given]
    if isinstance(given, dict):
        return {key: clean(value, template=template, command=command) for key, value in given.items()}
    if not isinstance(given, str):
        return given
    text = given.strip().strip(INVISIBLES).strip()
    for pattern, form in PLACEHOLDERS[1:] if template else PLACEHOLDERS:
        if pattern.search(text):
            raise BadValue(f"a value; this one has a placeholder like {form}, which nothing has filled in")
    end = QUOTES.get(text[:1])
    if not command and end and len(text) > 1 and text[-1] == end and not set(text[1:-1]) & {text[0], end}:
        raise BadValue("the value alone; it stands in quotes, which are a part of it (docker's --env-file keeps them)")
    return text


def read_bool(given: object) -> bool:
    if isinstance(given, bool):
        return given
    word = str(given).strip().lower()
    if word not in TRUE_WORDS | FALSE_WORDS:
        raise BadValue("true or false (or 1, 0, yes, no, on, off)")
    return word in TRUE_WORDS


def split_items(given: object) -> list[object]:
    """Splits a YAML list, or a text: a JSON list, JSON objects in a row, or items between commas or spaces."""
    if isinstance(given, list | tuple):
        return list(given)
    if isinstance(given, dict):
        return [given]
    text = str(given).strip()
    if text.startswith("["):
        try:
            both = zip(json.loads(text), json.loads(text, parse_float=str), strict=True)
            return [name if isinstance(item, float) else item for item, name in both]  # 1.10 is a name as well
        except json.JSONDecodeError:
            raise BadValue('a list, such as a,b or JSON like ["a", "b"]') from None
    if text.startswith("{"):  # commas and spaces stand inside of objects too
        return _split_objects(text)
    separator = "," if "," in text else None
    return [item.strip() for item in text.split(separator) if item.strip()]


def _split_objects(text: str) -> list[object]:
    decoder, found, offset = json.JSONDecoder(), [], 0
    while offset < len(text):
        try:
            item, offset = decoder.raw_decode(text, offset)
        except json.JSONDecodeError:
            raise BadValue('a list of JSON objects, such as [{"name": "a"}, {"name": "b"}]') from None
        found.append(item)
        while offset < len(text) and text[offset] in ", \n\t":
            offset += 1
    return found


def read_choice(given: object, choices: Sequence[str]) -> str:
    """Returns the choice that is meant, whatever its capitals and hyphens."""
    text = read_word(given)
    if match := unfold(text, choices):
        return match
    close_matches = difflib.get_close_matches(text.lower(), choices, 3)
    hint = f"; did you mean {close_matches[0]}?" if close_matches else ""
    if len(choices) <= CHOICES_SHOWN:
        raise BadValue(f"one of {', '.join(choices)}{hint}")
    raise BadValue(f"one of {len(choices)} names, such as {', '.join(close_matches or choices[:3])}{hint}")


def unfold(text: str, choices: Sequence[str]) -> str | None:
    """Returns the one choice that differs in capitals and hyphens at most."""
    matches = [text] if text in choices else [each for each in choices if _fold(each) == _fold(text)]
    return matches[0] if len(matches) == 1 else None


def _fold(word: str) -> str:
    return word.lower().replace("-", "_")


def read_word(given: object) -> str:
    """Returns the word that YAML made something of: a bare `true` was meant as that word."""
    return str(given).lower() if isinstance(given, bool) else str(given).strip()


def _read_int(given: object, expected: str = "a whole number, such as 8") -> str:
    with contextlib.suppress(ValueError):
        if not isinstance(given, bool | float):
            return str(int(str(given)))
    raise BadValue(expected)


def _read_float(given: object) -> str:
    text = str(given).strip()
    with contextlib.suppress(ValueError):
        if not isinstance(given, bool) and not math.isnan(float(text)):
            return text
    raise BadValue("a number, such as 0.9")


def _read_text(given: object) -> str:
    if given is None or isinstance(given, dict | list):
        raise BadValue("a text, such as abc")
    return str(given).lower() if isinstance(given, bool) else str(given)


def _read_text_or_json(given: object) -> str:
    """Reads an item of a list, such as one of LORA_MODULES: `name=path`, or an object."""
    return json.dumps(given) if isinstance(given, dict | list) else _read_text(given)


def _read_json_with_human_ints(given: object) -> str:
    """Reads JSON for vLLM's own classes of settings, in which numbers may be written as 32k."""
    if isinstance(given, list) or str(given).lstrip().startswith("["):
        raise BadValue(JSON_OBJECT)
    return _read_json(given, partial(HUMAN_INT_IN_JSON.sub, lambda found: found[1] or "1"))


def _read_json(given: object, normalize: Callable[[str], str] = str) -> str:
    """`normalize` makes JSON of what vLLM takes for it."""
    if isinstance(given, dict | list):
        return json.dumps(given)
    if not isinstance(given, str):
        raise BadValue(JSON_OBJECT)
    try:
        value = json.loads(normalize(given))
    except json.JSONDecodeError as error:
        for repair in (given.replace("'", '"'), given.replace("\\", "")):  # Python's quotes; a shell's, in compose
            with contextlib.suppress(json.JSONDecodeError):
                json.loads(normalize(repair))
                raise BadValue(f"JSON: write {repair}") from None
        raise BadValue(f'JSON, such as {{"key": "value"}} ({error.msg} at character {error.pos + 1})') from None
    if not isinstance(value, dict | list):
        raise BadValue(JSON_OBJECT)
    return given


def json_object(text: object) -> dict[str, Any] | None:
    """Returns the object that a text of JSON holds; None where it holds none."""
    with contextlib.suppress(ValueError):
        found = json.loads(str(text))
        return found if isinstance(found, dict) else None
    return None


def _read_json_or_text(given: object) -> str:
    if isinstance(given, str) and not re.fullmatch(r"(?s)\s*{.*}\s*", given):
        return given
    return _read_json(given)


def _read_human_int(given: object, expected: str = "") -> str:
    text = read_word(given)
    known = HUMAN_INT.fullmatch(text)
    return text if known else _read_int(given, f"{expected}a whole number, such as 4096, 32k (32000) or 32K (32768)")


def _read_human_int_or_auto(given: object) -> str:
    return "auto" if read_word(given).lower() == "auto" else _read_human_int(given, "auto, or ")


READERS: dict[str, Callable[[object], str]] = {
    "int": _read_int,
    "float": _read_float,
    "str": _read_text,
    "folded": _read_text,  # has choices
    "csv": lambda given: ",".join(map(_read_text, split_items(given))),
    "json": _read_json,
    "json_human": _read_json_with_human_ints,
    "json_or_str": _read_json_or_text,
    "human_int": _read_human_int,
    "human_int_or_auto": _read_human_int_or_auto,
}
ITEM_READERS = READERS | {"str": _read_text_or_json, "json_or_str": _read_text_or_json}
