"""Reads the tables of this room, which have the reasons: `names.json` has names other than vLLM's of today and ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def read_table(name: str) -> dict[str, Any]:
    """Returns the content of a JSON file of this folder, without its comments."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text, object_hook=lambda row: {key: row[key] for key in row if key != "//"})
    return table


_TABLE = read_table("names.json")
DEFAULTS = read_table("defaults.json")  # by the name of the source


def advice(part: str, text: str) -> str:
    """Returns that part's message of the first pattern that fits the text, and an empty text where none does."""
    matches = ((re.fullmatch(pattern, text, re.ASCII | re.DOTALL), told) for pattern, told in _TABLE[part].items())
    return next((told.format(**match.groupdict()) for match, told in matches if match), "")


def _read_removed(part: str) -> dict[str, str]:
    return {name: f"{hint} (vLLM had it until {last_version})" for name, (last_version, hint) in _TABLE[part].items()}


ALIASES: dict[str, tuple[str, ...]] = {ours: tuple(names) for ours, names in _TABLE["aliases"].items()}
BY_ALIAS = {alias: ours for ours, names in ALIASES.items() for alias in names}
OWNED: dict[str, str] = _TABLE["owned"]
ZERO_MEANS_UNSET = frozenset(_TABLE["zero means unset"])
RESPELLED: dict[str, dict[str, str]] = _TABLE["respelled"]
FORMER: dict[str, str] = _TABLE["former"]
MESSAGES: dict[str, str] = _TABLE["messages"]
NEAR_MISSES: dict[str, Any] = _TABLE["near misses"]
WITHHELD, WITHHELD_PREFIXES = frozenset(_TABLE["not passed on"]["names"]), tuple(_TABLE["not passed on"]["prefixes"])
# Options are found by key (`swap_space`), and variables by name.
REMOVED, REMOVED_VARIABLES = _read_removed("removed options"), _read_removed("removed variables")
# A name -> whose it is, and what to set here; each may be empty.
FOREIGN_NAMES: dict[str, tuple[str, str]] = {
    name: (family, ours) for family, names in _TABLE["elsewhere"].items() for name, ours in names.items()
}
# A name -> what is told of a variable that does nothing here.
NO_EFFECT = {key.upper(): hint for key, hint in REMOVED.items()} | FORMER
NO_EFFECT |= {
    name: (f"it is {family}'s; " if family else "") + (f"set {ours}" if ours else "there is nothing to set")
    for name, (family, ours) in FOREIGN_NAMES.items()
}
# vLLM's and AWS's own images for SageMaker put it before any of these names, and vLLM's: SM_VLLM_MAX_MODEL_LEN.
SM_PREFIX = "SM_VLLM_"
# These are owned by name, and need no warning: the gateway's own port, and a token that reaches vLLM as it is.
QUIET_NAMES = frozenset({"PORT", "HF_TOKEN", f"{SM_PREFIX}PORT"})
