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

from supervisor.engine.diagnosis import EFFECTS, GONE, OOM_KILLED, RULES, SIGNALS, Rule
from supervisor.engine.topics import GAP, REMEDIES, TOPICS

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
    return HEAD + rows((*rule_rows(), *signal_rows())) + ABOUT + rows((cell(t.part), cell(t.remedy)) for t in TOPICS)


def rows(cell_rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in cell_rows)


def rule_rows() -> Iterator[tuple[str, ...]]:
    for rule in drop_repeats((*RULES, *EFFECTS, *GONE)):
        yield f"`{pick_line(rule.example)}`", fill(rule.cause), fill(rule.remedy), retry(rule.permanent)


def drop_repeats(rules: Iterable[Rule]) -> list[Rule]:
    """Returns the rules, but of those with the same cause and remedy only the first."""
    return list({(rule.cause, rule.remedy): rule for rule in reversed(list(rules))}.values())[::-1]


def signal_rows() -> Iterator[tuple[str, ...]]:
    for number, end in SIGNALS.items():
        yield f"nothing, and it ended by {number.name}", fill(end.cause), fill(end.remedy), retry(end.permanent)
    yield "nothing, and the container's `oom_kill` rose", fill(OOM_KILLED.cause), fill(OOM_KILLED.remedy), "yes"


def pick_line(example: str) -> str:
    """Returns the line that names the error: the last one, but for hints, without its prefixes, and cut."""
    lines = [line.strip() for line in example.strip().splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"Error|error:|Exception", line)] or lines
    line = re.sub(r"^(?:\([^)]*pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d [\d:]+ )?(?:\[[\w.]+:\d+\] )?", "", errors[-1])
    line = cell(line).replace("`", "'")
    return line if len(line) <= EXAMPLE else f"{line[:EXAMPLE].rstrip()} ..."


def fill(text: str) -> str:
    text = text.format_map(Placeholders(REMEDIES)).strip()
    return cell(GAP.sub("", re.sub(r"…(?: ?…)+", "…", text)))


class Placeholders(dict[str, str]):
    """The values of placeholders: `…` for words of the log, and for a kind of error, what the second table has."""

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


def retry(permanent: bool) -> str:
    return "no" if permanent else "yes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    written = f"{before}{BEGIN}\n\n{table()}\n{END}{after}"
    is_stale = page != written
    if parser.parse_args().check:
        if is_stale:
            print("docs/faults.md is stale: run scripts/generate_faults.py", file=sys.stderr)
        sys.exit(is_stale)
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
