"""Other names than vLLM's of today and ours, by the table in `names.json`, which has the reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_table(name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return table


_TABLE = read_table("names.json")


def _rows(part: str) -> dict[str, Any]:
    return {name: row for name, row in _TABLE[part].items() if name != "//"}


def _removed(part: str) -> dict[str, str]:
    return {name: f"{advice} (vLLM had it until {last})" for name, (last, advice) in _rows(part).items()}


ALIASES: dict[str, tuple[str, ...]] = {ours: tuple(names) for ours, names in _rows("aliases").items()}
OURS = {alias: ours for ours, names in ALIASES.items() for alias in names}
OWNED: dict[str, str] = _rows("owned")
ZERO_MEANS_UNSET = frozenset(_TABLE["zero means unset"])
FORMER: dict[str, str] = _rows("former")
INSTEAD: dict[str, str] = _rows("instead")
DOCKERS = frozenset(_TABLE["docker's"]["options"])
WITHHELD, WITHHELD_PREFIXES = frozenset(_TABLE["not passed on"]["names"]), tuple(_TABLE["not passed on"]["prefixes"])
# Options by key (`swap_space`), and variables.
REMOVED, REMOVED_ENVIRONMENT = _removed("removed options"), _removed("removed variables")
# Name -> whose it is, and what to set here; each may be empty.
ELSEWHERE: dict[str, tuple[str, str]] = {
    name: (family, ours) for family, names in _rows("elsewhere").items() for name, ours in names.items()
}
# Name -> what is told of a variable that does nothing here.
NO_EFFECT = {key.upper(): told for key, told in REMOVED.items()} | FORMER
NO_EFFECT |= {
    name: (f"it is {family}'s; " if family else "") + (f"set {ours}" if ours else "there is nothing to set")
    for name, (family, ours) in ELSEWHERE.items()
}
# Put before any of these names, and before vLLM's, by vLLM's and AWS's own images for SageMaker: SM_VLLM_MAX_MODEL_LEN.
SAGEMAKER = "SM_VLLM_"
# Owned by name, and yet nothing to warn of: the gateway's own port, and a token that reaches vLLM as it is.
OWNED_AND_READ = frozenset({"PORT", "HF_TOKEN", f"{SAGEMAKER}PORT"})
