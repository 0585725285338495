"""The file of vLLM's own --config, by vLLM's own parser: it takes what we take, as we do, and not what we refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from supervisor.settings.names import OWNED
from supervisor.settings.settings import Arguments, gather
from supervisor.vllm.catalogue import key_of
from tests.unit.test_vllm_file import REFUSED, TAKEN
from tests.vllm.conftest import VLLM
from tests.vllm.test_every_option import COMPANY, ELSEWHERE, OPTIONS, parsed, sample, written

pytestmark = pytest.mark.vllm


def write_files(folder: Path, texts: list[str]) -> list[list[str]]:
    """Writes a file for each text. Returns command lines that name them."""
    rows = []
    for number, text in enumerate(texts):
        path = folder / f"{number}.yaml"
        path.write_text(text + "\n")
        rows.append(["m", "--config", str(path)])
    return rows


def believed(argv: list[str]) -> list[str]:
    """Returns as a command line what we believe that the file says, which the last word names."""
    environ = {"SUPERVISOR_VLLM": str(VLLM), "SUPERVISOR_ACCESS_LOG": "false", "CONFIG": argv[-1]}
    settings = gather(Arguments(model="m"), environ)
    words = ["m"]
    for option, setting in (*settings.options, *settings.raw_options):
        if setting.name.startswith("--") and option.kind != "append":  # a part
            words += [setting.name, setting.value]
        elif option.key != "config":
            words += option.argv(setting.value)
    return words


def test_vllm_takes_what_we_take_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_files(tmp_path, [text for text, _ in TAKEN])
    found = parsed([*rows, *map(believed, rows)])
    for (text, _), by_file, by_words in zip(TAKEN, found, found[len(rows) :], strict=False):
        assert "value" in by_file, (text, by_file)
        assert by_file == by_words, text


def test_vllm_fails_at_what_we_refuse_or_drops_it(tmp_path: Path) -> None:
    """Or it takes an empty value for one, and fails at a 0 later."""
    texts = [text for text, _ in REFUSED if key_of(text.partition(":")[0]) not in {*OWNED, "config"}]
    without, *found = parsed([["m"], *write_files(tmp_path, texts)])
    for text, result in zip(texts, found, strict=True):
        is_taken = text.endswith((": null", ": ''", ": 0"))
        assert "error" in result or (result != without if is_taken else result == without), (text, result)


def test_every_option_is_what_it_is_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [each for each in OPTIONS.values() if each.key not in {*OWNED, *COMPANY, *ELSEWHERE, "model", "config"}]
    content: list[dict[str, object]] = []
    for option in options:
        value = option.is_switch or sample(option, tmp_path)
        is_text = isinstance(value, list) and option.kind == "value"  # a list is words to vLLM
        content.append({option.name[2:]: written(option, value) if is_text else value})
    content += [{f"no-{option.name[2:]}": True} for option in options if option.kind == "pair"]
    texts = [yaml.safe_dump(each) for each in content if each.get("middleware") is None]
    rows = write_files(tmp_path, texts)
    found = parsed([*rows, *map(believed, rows)])
    wrong = [
        row for row in zip(texts, found, found[len(rows) :], strict=False) if row[1] != row[2] or "error" in row[1]
    ]
    assert not wrong


def test_vllm_ignores_a_file_that_is_named_in_one_word(tmp_path: Path) -> None:
    ((_, option, name),) = write_files(tmp_path, ["seed: 7"])
    in_two, in_one, twice = parsed([["m", option, name], ["m", f"{option}={name}"], ["m", option, name, option, name]])
    assert "('seed', 7)" in in_two["value"]
    assert "('seed', 7)" not in in_one["value"]
    assert "More than one config file" in twice["error"]
