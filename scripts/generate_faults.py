#!/usr/bin/env python3
"""Writes the table of what vLLM's ends are put down to into docs/faults.md, from supervisor/engine/causes.toml.

    .venv/bin/python scripts/generate_faults.py [--check]

`--check` writes nothing and exits 1 where the table is not what would be written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from supervisor.engine.diagnosis import EFFECTS, GONE, OOM_KILLED, REMEDIES, RULES, SIGNALS, Rule
from supervisor.engine.topics import GAP, TOPICS

PAGE = Path(__file__).resolve().parent.parent / "docs/faults.md"
BEGIN, END = "<!-- scripts/generate_faults.py: from here -->", "<!-- scripts/generate_faults.py: to here -->"
HEAD = "| vLLM's words, as an example | cause | remedy | tried again |\n| --- | --- | --- | --- |\n"
ABOUT = """
Where the table knows the kind of an error alone, it is put down to a part of vLLM, by the error's words or by where it
was raised, and the remedy is the part's. Words that are said of much else too (a weight, an image) accuse no part: the
remedy then begins with "Where it is about":

| the part | what to change |
| --- | --- |
"""
EXAMPLE = 110  # characters


def table() -> str:
    return HEAD + rows((*of_rules(), *of_ends())) + ABOUT + rows((cell(t.part), cell(t.remedy)) for t in TOPICS)


def rows(of: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in of)


def of_rules() -> Iterator[tuple[str, ...]]:
    for rule in unlike((*RULES, *EFFECTS, *GONE)):
        yield f"`{told(rule.example)}`", said(rule.cause), said(rule.remedy), again(rule.permanent)


def unlike(rules: Iterable[Rule]) -> list[Rule]:
    """Of rows that say the same of several wordings, the first."""
    return list({(rule.cause, rule.remedy): rule for rule in reversed(list(rules))}.values())[::-1]


def of_ends() -> Iterator[tuple[str, ...]]:
    for number, end in SIGNALS.items():
        yield f"nothing, and it ended by {number.name}", said(end.cause), said(end.remedy), again(end.permanent)
    yield "nothing, and the container's `oom_kill` rose", said(OOM_KILLED.cause), said(OOM_KILLED.remedy), "yes"


def told(example: str) -> str:
    """The line that says it: the last but for hints and prefixes, cut."""
    lines = [line.strip() for line in example.strip().splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"Error|error:|Exception", line)] or lines
    line = re.sub(r"^(?:\([^)]*pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d [\d:]+ )?(?:\[[\w.]+:\d+\] )?", "", errors[-1])
    line = cell(line).replace("`", "'")
    return line if len(line) <= EXAMPLE else f"{line[:EXAMPLE].rstrip()} ..."


def said(text: str) -> str:
    text = text.format_map(Shown(REMEDIES)).strip()
    return cell(GAP.sub("", re.sub(r"…(?: ?…)+", "…", text)))


class Shown(dict[str, str]):
    """What is taken from the log, as `…`; and a kind of error's part of vLLM, which the second table has."""

    def __missing__(self, name: str) -> str:
        part = {
            "part": "A part of vLLM",
            "at": "",
            "governs": "What the part's row says, below.",
            "named": "",
            "in_use": "",
            "instead": "",
            "by_name": "",
            "fit": "",
            "without": REMEDIES["kernels"],
            "ranks": REMEDIES["any_ranks"],
        }
        return (part | {"otherwise": part["governs"], "elsewhere": part["governs"]}).get(name, "…")


def cell(text: str) -> str:
    return text.replace("|", "/").replace("](", "] (").replace("<", "‹").replace(">", "›")


def again(permanent: bool) -> str:
    return "no" if permanent else "yes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    written = f"{before}{BEGIN}\n\n{table()}\n{END}{after}"
    stale = page != written
    if parser.parse_args().check:
        if stale:
            print("docs/faults.md is stale: run scripts/generate_faults.py", file=sys.stderr)
        sys.exit(stale)
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
