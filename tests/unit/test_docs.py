"""What README, docs and config.yaml say exists, does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from supervisor.settings import catalogue
from supervisor.settings.aliases import ALIASES
from supervisor.settings.knobs import KNOBS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = catalogue.parse((catalogue.FLAGS / "0.32.0.json").read_text())
KNOWN = (
    {knob.variable for knob in KNOBS}
    | {option.variable for option in OPTIONS.by_key.values()}
    | set(ALIASES)
    | {"HF_TOKEN"}
)
KNOWN |= {name for names in ALIASES.values() for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_variables_of_the_readme_are_read() -> None:
    named = set(re.findall(r"`([A-Z][A-Z_]{3,})(?:=[^`]*)?`", (ROOT / "README.md").read_text()))
    assert named - KNOWN == set()
    assert "SUPERVISOR_DRAIN_TIMEOUT" in named


def test_config_yaml_uncommented_is_valid() -> None:
    text = (ROOT / "config.yaml").read_text()
    assert yaml.safe_load(text) is None
    lines = [line.removeprefix("# ") for line in text.splitlines() if re.match(r"# ( *)[a-z_]+:( |$)", line)]
    content = yaml.safe_load("\n".join(lines))
    own = content.pop("supervisor")
    assert set(own) == {knob.field for knob in KNOBS}
    assert set(content) - {"model"} <= set(OPTIONS.by_key)
    for key, value in content.items():
        if key != "model":
            OPTIONS.by_key[key].read(value)
    for knob in KNOBS:
        if knob.field != "api_keys":
            knob.read(str(own[knob.field]))
