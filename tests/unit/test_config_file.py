"""Which file of settings is read: one that is named, or a `config.yaml` in the current folder that says it is ours."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor import explain
from supervisor.settings import models
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather
from tests.unit.test_settings import argv, problems, read

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "# yaml-language-server: $schema=config.schema.json\n"
NOT_READ = "config.yaml in this folder is not read: "
ADVICE = ". Name it with --config (or SUPERVISOR_CONFIG) if it is meant for this."
NO_SECTION = f"{NOT_READ}it has no `supervisor:` section{ADVICE}"


def row(settings: Settings) -> dict[str, object] | None:
    """What `explain` shows of the file itself."""
    rows = explain.facts(settings)["settings"]
    assert isinstance(rows, list)
    found = [row for row in rows if row["name"] == "SUPERVISOR_CONFIG"]
    return found[0] if found else None


# A file that is named


@pytest.mark.parametrize("variable", ["SUPERVISOR_CONFIG", "SM_VLLM_SUPERVISOR_CONFIG"])
def test_a_variable_names_the_file(folder: Path, variable: str) -> None:
    (folder / "other.yaml").write_text("seed: 3\n")
    (folder / "config.yaml").write_text("supervisor: {port: 1}\nseed: 4\n")
    settings = read(folder, **{variable: "other.yaml"})
    assert argv(settings) == ["--seed", "3"]
    assert settings.knobs.port == 8000
    assert settings.warnings == ()
    assert [setting.source for _, setting in settings.options] == ["other.yaml seed"]
    assert row(settings) == {
        "name": "SUPERVISOR_CONFIG",
        "value": "other.yaml",
        "source": f"environment {variable}",
        "overrode": [],
    }


def test_the_command_line_wins_over_the_variable(folder: Path) -> None:
    (folder / "a.yaml").write_text("seed: 3\n")
    settings = read(folder, Arguments(model="m", config="a.yaml"), SUPERVISOR_CONFIG="/no/such.yaml")
    assert argv(settings) == ["--seed", "3"]
    found = row(settings)
    assert found is not None
    assert found["source"] == "command line --config"
    assert found["overrode"] == ["environment SUPERVISOR_CONFIG: /no/such.yaml"]


@pytest.mark.parametrize("written", ["~/a.yaml", " ~/a.yaml\r\n", "a.yaml ", "./a.yaml"])
def test_a_name_as_people_write_it(folder: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "a.yaml").write_text("seed: 3\n")
    expected = ["--seed", "3"]
    assert argv(read(folder, SUPERVISOR_CONFIG=written)) == expected
    assert argv(read(folder, Arguments(model="m", config=written))) == expected


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_an_empty_name_is_none(folder: Path, empty: str) -> None:
    (folder / "config.yaml").write_text("supervisor:\nseed: 3\n")
    settings = read(folder, Arguments(model="m", config=empty), SUPERVISOR_CONFIG=empty)
    assert argv(settings) == ["--seed", "3"]
    assert row(settings) is None


@pytest.mark.parametrize("name", ["other.yaml", "~no-such-user/other.yaml", "link.yaml"])
def test_a_named_file_that_is_missing(folder: Path, name: str) -> None:
    (folder / "link.yaml").symlink_to("nowhere")
    (folder / "config.yaml").write_text("supervisor:\nseed: 3\n")
    missing = f"{name} can't be read (No such file or directory; named by"
    (problem,) = problems(folder, SUPERVISOR_CONFIG=name)
    assert problem == f"{missing} environment SUPERVISOR_CONFIG)"
    (problem,) = problems(folder, Arguments(model="m", config=name), SUPERVISOR_CONFIG="x")
    assert problem == f"{missing} command line --config)"


def test_a_named_folder(folder: Path) -> None:
    (problem,) = problems(folder, SUPERVISOR_CONFIG=".")
    assert problem == ". can't be read (Is a directory; named by environment SUPERVISOR_CONFIG)"


@pytest.mark.parametrize(
    "text",
    [
        "a: [1\n",
        "- a\n",
        "x: !!int ''\n",
        "x: {y: !!bool maybe}\n",
        "x: {y: !!timestamp z}\n",
        "x: {y: 2024-13-45}",
        pytest.param("[" * 1500, marks=pytest.mark.slow),
        pytest.param("{" * 1500, marks=pytest.mark.slow),
    ],
)
def test_a_named_file_that_is_malformed_is_an_error(folder: Path, text: str) -> None:
    (folder / "a.yaml").write_text(text)
    (problem,) = problems(folder, SUPERVISOR_CONFIG="a.yaml")
    assert problem.startswith(("a.yaml is not valid YAML", "a.yaml must be a mapping"))


def test_a_named_file_need_not_say_that_it_is_ours_and_may_name_a_program(folder: Path) -> None:
    (folder / "config.yaml").write_text("max_modle_len: 1\n")
    (problem,) = problems(folder, SUPERVISOR_CONFIG="config.yaml")
    assert "unknown key max_modle_len; did you mean max_model_len?" in problem
    vllm = folder.parent / "vllm/bin/vllm"
    (folder / "config.yaml").write_text(f"supervisor: {{vllm: {vllm}}}\n")
    for settings in (
        gather(Arguments(model="m"), {"SUPERVISOR_CONFIG": "config.yaml"}),
        gather(Arguments(model="m", config="config.yaml"), {}),
    ):
        assert settings.vllm.command == (str(vllm),)


def test_vllms_own_file_is_another(folder: Path) -> None:
    (folder / "ours.yaml").write_text("seed: 3\n")
    (folder / "vllm.yaml").write_text("seed: 4\n")
    settings = read(folder, SUPERVISOR_CONFIG="ours.yaml", CONFIG="vllm.yaml")
    assert sorted(argv(settings)) == sorted(["--seed", "3", "--config", "vllm.yaml"])


# One that nobody named


@pytest.mark.parametrize(
    "text",
    [
        "supervisor:\nseed: 3\n",
        "seed: 3\nsupervisor: {}\n",
        "seed: 3\nsupervisor:\n  hold_timeout: 7\n",
        "seed: 3\nsupervisor: ~\n",
        '{"supervisor": {}, "seed": 3}',
        f"{SCHEMA}seed: 3\n",
        f"\ufeff{SCHEMA}seed: 3\n",
        "# yaml-language-server: $schema=../vllm-supervisor/config.schema.json\r\nseed: 3\r\n",
    ],
)
def test_a_config_yaml_that_says_it_is_ours_is_read(folder: Path, text: str) -> None:
    (folder / "config.yaml").write_text(text)
    settings = read(folder)
    assert argv(settings) == ["--seed", "3"]
    assert settings.warnings == ()


def test_the_example_says_that_it_is_ours() -> None:
    text = (ROOT / "config.yaml").read_text()
    assert text.startswith(SCHEMA)
    assert "\nsupervisor:\n" in text


@pytest.mark.parametrize(
    "text",
    [
        "trainer: {max_steps: 3}\nmodel: gpt\n",
        "model: m\nseed: 3\n",
        "supervisor: vllm\nmodel: gpt\n",
        "supervisor: 3\n",
        "supervisor: [a]\n",
        "supervisors: {a: b}\n",
        "a: {supervisor: {vllm: /bin/false}}\n",
        "- supervisor: {}\n",
        "just words of a supervisor\n",
        "a: [1\n",
        "supervised: {{ it }}\n",
        "supervisor of: [1\n",
        "x: !!bool maybe # supervisor\n",
        "a: supervisor\n---\nb: 1\n",
        pytest.param("# supervisor\n" + "[" * 1500, marks=pytest.mark.slow),
        "# yaml-language-server: $schema=other.json\nseed: 3\n",
        "# yaml-language-server: $schema=my-config.schema.json\nseed: 3\n",
        f"#\n{SCHEMA}seed: 3\n",
        "!!python/object/apply:os.system ['touch supervisor']\n",
    ],
)
def test_any_other_config_yaml_is_passed_over_and_told(folder: Path, text: str) -> None:
    (folder / "config.yaml").write_text(text)
    settings = read(folder)
    assert argv(settings) == []
    assert settings.model.value == "m"
    assert settings.warnings == (NO_SECTION,)
    assert os.listdir(folder) == ["config.yaml"]


def test_it_is_told_beside_what_is_wrong(folder: Path) -> None:
    (folder / "config.yaml").write_text("trainer: {}\n")
    with pytest.raises(SettingsError) as caught:
        read(folder, MAX_NUM_SEQS="x")
    assert len(caught.value.problems) == 1
    assert caught.value.warnings == [NO_SECTION]


@pytest.mark.parametrize("text", ["", "\n", "# all comments\n  # of a supervisor\n\n"])
def test_where_nothing_is_lost_nothing_is_told(folder: Path, text: str) -> None:
    (folder / "config.yaml").write_text(text)
    assert read(folder).warnings == ()


def test_what_is_no_file_or_can_not_be_read_is_passed_over(folder: Path) -> None:
    path = folder / "config.yaml"

    def told() -> tuple[str, ...]:
        settings = read(folder)
        assert argv(settings) == []
        return settings.warnings

    def unread(why: str) -> tuple[str]:
        return (f"{NOT_READ}it can't be read ({why}){ADVICE}",)

    path.mkdir()  # what Docker makes of a mount whose source is not there
    assert told() == unread("no plain file")
    path.rmdir()
    path.symlink_to("nowhere")
    assert told() == unread("No such file or directory")
    path.unlink()
    path.symlink_to("config.yaml")
    assert told() == unread("Too many levels of symbolic links")
    path.unlink()
    os.mkfifo(path)  # opening it would wait for somebody who writes
    assert told() == unread("no plain file")
    path.unlink()
    path.write_bytes(b"supervisor: {port: 1}\nname: \xff\n")
    assert told() == (f"{NOT_READ}it is not a text (invalid start byte at byte 28){ADVICE}",)
    path.unlink()
    assert told() == ()


def test_one_that_this_user_may_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "config.yaml").write_text("supervisor:\n")

    def refuse(path: Path, *, regular_only: bool) -> bytes:  # root may read everything
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("supervisor.settings.config_file.read_file", refuse)
    assert read(folder).warnings == (f"{NOT_READ}it can't be read (Permission denied){ADVICE}",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("supervisor:\nmax_modle_len: 1\n", "unknown key max_modle_len; did you mean max_model_len?"),
        ("supervisor: {prot: 1}\n", "unknown key supervisor.prot; did you mean supervisor.port?"),
        ("supervisor: {config: other.yaml}\n", "unknown key supervisor.config"),
        ("supervisor:\n  port: [1\n", "config.yaml is not valid YAML at line"),
        (f"{SCHEMA}seed: [1\n", "config.yaml is not valid YAML at line"),
        (f"{SCHEMA}- seed\n", "config.yaml must be a mapping"),
        (f"{SCHEMA}supervisor: 3\n", "'supervisor' must be a mapping"),
    ],
)
def test_what_is_wrong_in_a_file_of_ours_is_an_error(folder: Path, text: str, expected: str) -> None:
    (folder / "config.yaml").write_text(text)
    (problem,) = problems(folder)
    assert expected in problem


# It can't name a program


@pytest.mark.parametrize("key", ["vllm", "VLLM", "Vllm"])
@pytest.mark.parametrize("form", ["supervisor: {{{key}: {program}}}\n", SCHEMA + "supervisor:\n  {key}: [{program}]\n"])
def test_a_file_that_nobody_named_can_not_name_a_program(folder: Path, key: str, form: str) -> None:
    program, ran = folder / "program", folder / "ran"
    program.write_text(f"#!/bin/sh\ntouch {ran}\necho vllm 0.32.0\n")
    program.chmod(0o755)
    (folder / "config.yaml").write_text(form.format(key=key, program=program))
    with pytest.raises(SettingsError) as caught:
        gather(Arguments(model="m"), {"PATH": str(folder.parent / "vllm/bin")})
    (problem,) = caught.value.problems
    assert problem == (
        "config.yaml supervisor.vllm is not obeyed, for it names a program and nobody named the file: "
        "name it with --config (or SUPERVISOR_CONFIG), or set SUPERVISOR_VLLM"
    )
    assert not ran.exists()


@pytest.mark.parametrize("key", ["supervisor-vllm", "SUPERVISOR_VLLM"])
def test_nor_by_another_spelling(folder: Path, key: str) -> None:
    for text in (f"supervisor: {{{key}: /bin/false}}\n", f"supervisor:\n{key}: /bin/false\n"):
        (folder / "config.yaml").write_text(text)
        (problem,) = problems(folder)
        assert "unknown key" in problem


@pytest.mark.parametrize("value", ["", "~", "''"])
def test_a_program_that_is_not_named(folder: Path, value: str) -> None:
    (folder / "config.yaml").write_text(f"supervisor:\n  vllm: {value}\n")
    assert argv(gather_on_path(folder)) == []


def gather_on_path(folder: Path) -> Settings:
    return gather(Arguments(model="m"), {"PATH": str(folder.parent / "vllm/bin")})


def test_a_program_that_the_environment_overrides_anyway(folder: Path) -> None:
    (folder / "config.yaml").write_text("supervisor: {vllm: /no/such/program}\n")
    settings = read(folder)
    (knob,) = [setting for setting in settings.knob_settings if setting.name == "SUPERVISOR_VLLM"]
    assert knob.source == "environment SUPERVISOR_VLLM"
    assert knob.overrode == ("config.yaml supervisor.vllm: /no/such/program",)


# PyYAML takes 30 ms


@pytest.mark.parametrize(("text", "expected"), [(None, False), ("trainer: {}\n", False), ("supervisor:\n", True)])
def test_pyyaml_is_imported_only_where_there_is_a_file_to_look_into(
    folder: Path, text: str | None, expected: bool
) -> None:
    if text is not None:
        (folder / "config.yaml").write_text(text)
    program = (
        "import sys; from supervisor.settings.settings import Arguments, gather; "
        f"gather(Arguments(model='m'), {{'SUPERVISOR_VLLM': {str(folder.parent / 'vllm/bin/vllm')!r}}}); "
        "print('yaml' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"


# scripts/up, which asks for the demo model where nothing names one (SUPERVISOR_DEMO)


@pytest.mark.parametrize("given", ["", "org/name --mode queue", "--config a.yaml -- --seed 1", "--port"])
def test_scripts_up_guesses_nothing(tmp_path: Path, folder: Path, given: str) -> None:
    """What it is given goes to `supervisor up` as it is; of files it opens none, not even a pipe."""
    for path, text in (("scripts/setup", "exit 0"), (".venv/bin/supervisor", 'echo "$@"; echo "$SUPERVISOR_DEMO"')):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / path).chmod(0o755)
    (tmp_path / "scripts/up").write_text((ROOT / "scripts/up").read_text())
    for name in ("config.yaml", "a.yaml"):
        os.mkfifo(folder / name)
    done = subprocess.run(
        ["bash", str(tmp_path / "scripts/up"), *given.split()],
        env={"PATH": os.environ["PATH"]}, cwd=folder, capture_output=True, text=True, check=True, timeout=10,
    )  # fmt: skip
    assert done.stdout == f"{' '.join(('up', *given.split()))}\n1\n"
    assert done.stderr == ""


DEMO = str(models.DEMO_MODEL)
OURS = "config.yaml"


@pytest.mark.parametrize(
    ("files", "environ", "expected"),
    [
        ({}, {}, DEMO),
        ({}, {"MODEL": "org/name"}, "org/name"),
        ({}, {"SM_VLLM_LLM_MODEL": "org/name"}, "org/name"),
        ({OURS: "model: gpt\ntrainer: {}\n"}, {}, DEMO),
        ({OURS: "model: gpt\nx:\n  supervisor:\n"}, {}, DEMO),
        ({OURS: "model: gpt\nsupervisor: {}\n"}, {}, "gpt"),
        ({OURS: f"{SCHEMA}model: gpt\n"}, {}, "gpt"),
        ({OURS: f"\ufeff{SCHEMA}model: gpt\n"}, {}, "gpt"),
        ({OURS: "supervisor:\nseed: 3\n# model: m\n"}, {}, DEMO),
        ({"a.yaml": "model : gpt\n"}, {"SUPERVISOR_CONFIG": "a.yaml"}, "gpt"),
        ({"a.yaml": '"model": gpt\n'}, {"SUPERVISOR_CONFIG": "a.yaml"}, "gpt"),
        ({"a.yaml": "MODEL: gpt\n"}, {"SUPERVISOR_CONFIG": "a.yaml"}, "gpt"),
        ({"a.yaml": '{"model": "gpt"}'}, {"SUPERVISOR_CONFIG": "a.yaml"}, "gpt"),
        ({"a.yaml": "\ufeffmodel: gpt\n"}, {"SUPERVISOR_CONFIG": "a.yaml"}, "gpt"),
        ({"a.yaml": "model: gpt\n"}, {"SUPERVISOR_CONFIG": "~/a.yaml"}, "gpt"),
        ({"a.yaml": "model: gpt\n"}, {"SUPERVISOR_CONFIG": ""}, DEMO),
        ({"a.yaml": "seed: 3\n", OURS: "supervisor:\nmodel: m\n"}, {"SUPERVISOR_CONFIG": "a.yaml"}, DEMO),
        ({"v.yaml": "model: gpt\n"}, {"CONFIG": "v.yaml"}, "gpt"),
        ({"v.yaml": "model: gpt\n"}, {"VLLM_CONFIG_FILE": "v.yaml"}, "gpt"),
        ({"v.yaml": "seed: 3\n", OURS: "model: m\n"}, {"CONFIG": "v.yaml"}, DEMO),
    ],
)
def test_the_demo_is_served_where_it_is_asked_for_and_nothing_names_a_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], environ: dict[str, str], expected: str
) -> None:
    """Even where a missing model is a mistake, as in a container or beside a GPU."""
    monkeypatch.setenv("HOME", str(folder))
    for name, text in files.items():
        (folder / name).write_text(text)
    for arguments in (Arguments(), Arguments(vllm_args=("--seed", "1"))):
        settings = read(folder, arguments, SUPERVISOR_DEMO="1", SUPERVISOR_IMAGE="1", **environ)
        assert settings.model.value == expected
        assert settings.is_demo is (expected == DEMO)
        assert not [warning for warning in settings.warnings if "SUPERVISOR_DEMO" in warning]


def test_a_model_of_the_command_line_is_no_wish_for_the_demo(folder: Path) -> None:
    (folder / "v.yaml").write_text("model: gpt\n")
    assert read(folder, Arguments(model="m"), SUPERVISOR_DEMO="1").model.value == "m"
    assert read(folder, Arguments(vllm_args=("--config", "v.yaml")), SUPERVISOR_DEMO="1").model.value == "gpt"


# Values that JSON has not


def test_a_date_is_a_text(folder: Path) -> None:
    (folder / "a.yaml").write_text("revision: 2024-01-02\nhf_overrides: {a: 2024-01-01}\n")
    settings = read(folder, SUPERVISOR_CONFIG="a.yaml")
    assert sorted(argv(settings)) == sorted(["--revision", "2024-01-02", "--hf-overrides", '{"a": "2024-01-01"}'])


@pytest.mark.parametrize("value", ["{a: !!binary aGk=}", "{a: !!set {x}}", "&q {x: *q}", "{[a]: 1}"])
def test_what_no_option_can_be_is_told(folder: Path, value: str) -> None:
    (folder / "a.yaml").write_text(f"hf_overrides: {value}\n")
    (problem,) = problems(folder, SUPERVISOR_CONFIG="a.yaml")
    assert "a.yaml" in problem


def test_keys_may_be_a_list(folder: Path) -> None:
    (folder / "a.yaml").write_text("supervisor: {api_keys: [key-number-1, key-number-2]}\n")
    settings = read(folder, SUPERVISOR_CONFIG="a.yaml")
    assert settings.keys[0].values == ("key-number-1", "key-number-2")
    assert "key-number-2" not in settings.mask("key-number-2")
    (folder / "a.yaml").write_text("supervisor: {api_keys: {a: key-number-1}}\n")
    (problem,) = problems(folder, SUPERVISOR_CONFIG="a.yaml")
    assert "brackets" in problem


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nmax_model_len: 2\nseed: 3\n", "at line 1: seed is there twice"),
        ("supervisor:\n  port: 1\n  mode: http\n  port: 2\n", "at line 2: port is there twice"),
        ("seed: 1\nhf_overrides:\n  a: {b: 1, b: 2}\n", "at line 3: b is there twice"),
    ],
)
def test_what_is_there_twice_is_told(folder: Path, text: str, told: str) -> None:
    """The last one counted, without a word: a file that was put together of two."""
    (folder / "a.yaml").write_text(text)
    (problem,) = problems(folder, SUPERVISOR_CONFIG="a.yaml")
    assert problem == f"a.yaml is not valid YAML {told}"
    (folder / "vllm.yaml").write_text(text)
    assert any(told in line for line in problems(folder, CONFIG="vllm.yaml"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max-model-len: 1\nmax_model_len: 2\n", "has max_model_len twice, written in two ways"),
        ("seed: 1\nSeed: 2\n", "has seed twice, written in two ways"),
        ("supervisor:\n  max-waiting: 1\n  MAX_WAITING: 2\n", "has max_waiting twice, written in two ways"),
    ],
)
def test_what_is_there_twice_in_two_spellings_is_told(folder: Path, text: str, told: str) -> None:
    (folder / "a.yaml").write_text(text)
    assert problems(folder, SUPERVISOR_CONFIG="a.yaml") == [f"a.yaml {told}"]
    (folder / "a.yaml").write_text("hf_overrides: {a-b: 1, a_b: 2, A_B: 3}\n")  # of objects they are names as any
    read(folder, SUPERVISOR_CONFIG="a.yaml")


def test_numbers_in_the_objects_of_a_list_are_numbers(folder: Path) -> None:
    settings = read(
        folder, SERVED_MODEL_NAME="[1.10, 1e5]", LORA_MODULES='[{"name": "a", "x": [1.5]}]', ENABLE_LORA="1"
    )
    assert settings.option("served_model_name") == ("1.10", "1e5")
    assert json.loads(settings.option("lora_modules")[0]) == {"name": "a", "x": [1.5]}


def test_our_own_numbers_may_have_underscores(folder: Path) -> None:
    (folder / "a.yaml").write_text("supervisor: {port: 8_001, startup_timeout: 1_200, max_body: 64_000_000}\n")
    knobs = read(folder, SUPERVISOR_CONFIG="a.yaml", SUPERVISOR_MAX_WAITING="1_500").knobs
    assert (knobs.port, knobs.startup_timeout, knobs.max_body, knobs.max_waiting) == (8001, 1200, 64_000_000, 1500)
    for bad in ("1__0", "_10", "10_", "1_0_MB", "MB"):
        assert len(problems(folder, SUPERVISOR_MAX_BODY=bad)) == 1, bad


def test_what_is_merged_is_not_there_twice(folder: Path) -> None:
    (folder / "a.yaml").write_text("hf_overrides: {a: &x {b: 1, c: 2}, d: {<<: *x, c: 3}}\n")
    (found,) = (s for o, s in read(folder, SUPERVISOR_CONFIG="a.yaml").options if o.key == "hf_overrides")
    assert json.loads(str(found.value)) == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}


# What is no plain file


@pytest.fixture
def odd(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names of what is no file of settings, and what is said of each."""
    monkeypatch.setattr("supervisor.bounded.FILE_PATIENCE", 0.2)
    os.mkfifo(folder / "pipe.yaml")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket.yaml"))
    (folder / "huge.yaml").write_bytes(b"# " + b"x" * 2**20)
    (folder / "zero.yaml").symlink_to("/dev/zero")
    silent = "nothing came of it in 0.2 s: a pipe that nobody fills, or a disk that hangs"
    large = "it has more than 1 MiB"
    return {"pipe.yaml": silent, "socket.yaml": "No such device or address", "huge.yaml": large, "zero.yaml": large}


PLAIN = "no plain file"


def test_what_never_ends_or_never_comes_is_told(folder: Path, odd: dict[str, str]) -> None:
    for name, told in odd.items():
        (problem,) = problems(folder, SUPERVISOR_CONFIG=name)
        assert problem == f"{name} can't be read ({told}; named by environment SUPERVISOR_CONFIG)"
        for variable in ("SUPERVISOR_API_KEYS", "SUPERVISOR_ADMIN_KEYS"):
            (problem,) = problems(folder, **{variable: f"@{name}"})
            assert told in problem
        (folder / "a.yaml").write_text(f"supervisor: {{api_keys: '@{name}'}}\n")
        (problem,) = problems(folder, SUPERVISOR_CONFIG="a.yaml")
        assert told in problem


def test_what_others_read_once_more_has_to_be_a_plain_file(folder: Path, odd: dict[str, str]) -> None:
    for name, told in odd.items():
        expected = told if name == "huge.yaml" else PLAIN
        (problem,) = problems(folder, CONFIG=name)
        assert problem == f"{name} (environment CONFIG) can't be read ({expected})"
        (problem,) = problems(folder, Arguments(model="m", vllm_args=("--config", name)))
        assert problem == f"{name} (command line) can't be read ({expected})"
        (problem,) = problems(folder, SUPERVISOR_TLS_CERT=name)
        assert f"({expected})" in problem
        for variable in ("CHAT_TEMPLATE", "TOOL_PARSER_PLUGIN"):
            if name != "huge.yaml":
                (problem,) = problems(folder, **{variable: f"./{name}"})
                assert problem.endswith("expected a file that is there")


def test_a_large_file_that_nobody_named_is_passed_over(folder: Path, odd: dict[str, str]) -> None:
    (folder / "huge.yaml").rename(folder / "config.yaml")
    assert read(folder).warnings == (f"{NOT_READ}it can't be read ({odd['huge.yaml']}){ADVICE}",)


def test_what_a_shell_fills_is_read(folder: Path) -> None:
    """`--config <(vault ...)`, and `SUPERVISOR_API_KEYS=@/dev/stdin`; the keys of a pipe stay as they are at SIGHUP."""
    reading, writing = os.pipe()
    os.write(writing, b"supervisor: {port: 3}\nseed: 3\n")
    os.close(writing)
    settings = read(folder, Arguments(model="m", config=f"/dev/fd/{reading}"))
    assert (argv(settings), settings.knobs.port) == (["--seed", "3"], 3)
    os.close(reading)
    reading, writing = os.pipe()
    os.write(writing, b"key-number-1\r\nkey-number-2\n")
    os.close(writing)
    keys, _ = read(folder, SUPERVISOR_API_KEYS=f"@/dev/fd/{reading}").keys
    assert keys.values == keys.reread().values == ("key-number-1", "key-number-2")
    os.close(reading)


# What YAML makes of bare words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("served_model_name: 1.10", ["--served-model-name", "1.10"]),
        ("served_model_name: [1.10, no, 0x1F, 2024-01-02, 2024-13-45]",
         ["--served-model-name", "1.10", "no", "0x1F", "2024-01-02", "2024-13-45"]),
        ("served_model_name: 1:30", ["--served-model-name", "1:30"]),
        ("revision: 0123456", ["--revision", "0123456"]),
        ("revision: 1_000", ["--revision", "1_000"]),
        ("revision: 12e03", ["--revision", "12e03"]),
        ("revision: 2024-01-02 10:00:00", ["--revision", "2024-01-02 10:00:00"]),
        ("tokenizer: Off", ["--tokenizer", "Off"]),
        ("tokenizer: null", []),
        ("tokenizer: ~", []),
        ("tokenizer:", []),
        ("max_model_len: 8_000", ["--max-model-len", "8000"]),
        ("max_num_seqs: 010", ["--max-num-seqs", "10"]),
        ("enforce_eager: no", ["--no-enforce-eager"]),
        ("enforce_eager: ON", ["--enforce-eager"]),
        ("gpu_memory_utilization: .5", ["--gpu-memory-utilization", ".5"]),
        ("allowed_origins: [a, b]", ["--allowed-origins", '["a", "b"]']),
        # In objects YAML's numbers are numbers: they are JSON. Its keys are texts there.
        ("hf_overrides: {a: 1.10, b: no, c: [1]}", ["--hf-overrides", '{"a": 1.1, "b": false, "c": [1]}']),
        ("hf_overrides: {on: 1, 1.10: 2, 2024-01-03: 3}",
         ["--hf-overrides", '{"on": 1, "1.10": 2, "2024-01-03": 3}']),
        ("max_model_len: &len 4096\nhf_overrides: {a: *len, b: &n 1.10}\nserved_model_name: *n",
         ["--hf-overrides", '{"a": 4096, "b": 1.1}', "--max-model-len", "4096", "--served-model-name", "1.10"]),
        ("served_model_name: !!float 1.10", ["--served-model-name", "1.10"]),
        ('{"served_model_name": 1.10, "enforce_eager": true}',
         ["--enforce-eager", "--served-model-name", "1.10"]),
    ],
)  # fmt: skip
def test_what_is_written_is_what_is_meant(folder: Path, text: str, expected: list[str]) -> None:
    """To YAML 1.1 `no` is false, `1.10` is 1.1, `0123456` is octal and `1:30` is 90."""
    (folder / "a.yaml").write_text(text + "\n")
    assert sorted(argv(read(folder, SUPERVISOR_CONFIG="a.yaml"))) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("served_model_name: [a, null]", "SERVED_MODEL_NAME=['a', None] (a.yaml served_model_name): expected a text"),
        ("supervisor: {api_keys: [a-key, ~]}", "SUPERVISOR_API_KEYS=**** (a.yaml supervisor.api_keys): expected keys"),
        ("supervisor: {extra_args: [--seed, null]}", "there is no option before it"),
        ("supervisor: {allow_routes: [/a, null]}", "SUPERVISOR_ALLOW_ROUTES=['/a', None] (a.yaml supervisor"),
    ],
)  # fmt: skip
def test_nothing_is_no_item_of_a_list(folder: Path, text: str, expected: str) -> None:
    """It was the word None: a name, and a key that opens."""
    (folder / "a.yaml").write_text(text + "\n")
    assert expected in problems(folder, SUPERVISOR_CONFIG="a.yaml")[0]


def test_nor_of_one_in_json(folder: Path) -> None:
    (problem,) = problems(folder, SERVED_MODEL_NAME='["a", null]')
    assert problem.endswith("expected a text, such as abc")


def test_our_own_settings_are_what_is_written_too(folder: Path) -> None:
    (folder / "a.yaml").write_text("supervisor: {api_keys: 00123456712, port: 0800, access_log: No, cache_dir: 1.10}\n")
    settings = read(folder, SUPERVISOR_CONFIG="a.yaml")
    assert settings.keys[0].values == ("00123456712",)
    assert (settings.knobs.port, settings.knobs.access_log, settings.knobs.cache_dir) == (800, False, "1.10")
    (folder / "a.yaml").write_text("supervisor: {startup_timeout: 1:30}\n")
    (problem,) = problems(folder, SUPERVISOR_CONFIG="a.yaml")
    assert problem.startswith("SUPERVISOR_STARTUP_TIMEOUT=1:30 (a.yaml supervisor.startup_timeout): expected seconds")


@pytest.mark.parametrize("word", ["no", "False", "true", "ON", "null", "None"])
def test_a_word_that_is_no_models_name(folder: Path, word: str) -> None:
    expected = "expected a folder that is there, or a name such as org/model"
    (problem,) = problems(folder, Arguments(), MODEL=word)
    assert expected in problem
    if word != "null":  # to YAML, nothing
        (folder / "a.yaml").write_text(f"model: {word}\n")
        (problem,) = problems(folder, Arguments(), SUPERVISOR_CONFIG="a.yaml")
        assert problem == f"MODEL={word} (a.yaml model): {expected}"
    (folder / word).mkdir()
    (folder / word / "config.json").touch()
    assert read(folder, Arguments(), MODEL=word).model.value == word


@pytest.mark.parametrize(
    ("text", "written", "taken"),
    [
        ("served-model-name: 1.10", "1.10", "1.1"),
        ("served-model-name: [a, 1.10]", "a 1.10", "a 1.1"),
        ("revision: 0123456", "0123456", "42798"),
        ("tokenizer: no", "no", "False"),
    ],
)
def test_vllms_own_file_says_what_vllm_will_read(folder: Path, text: str, written: str, taken: str) -> None:
    (folder / "vllm.yaml").write_text(text + "\n")
    (problem,) = problems(folder, CONFIG="vllm.yaml")
    key = text.partition(":")[0].replace("-", "_")
    assert problem == f"vllm.yaml (environment CONFIG): {key}: YAML makes {taken} of {written}: put it in quotes"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora-modules: [{name: a, path: b}]", """such as '[{"name": "a", "path": "b"}]'"""),
        ("allowed-origins: [a, b]", """such as '["a", "b"]'"""),
        ("hf-overrides: [1]", "such as '[1]'"),
    ],
)
def test_to_vllm_a_list_in_its_own_file_is_words(folder: Path, text: str, said: str) -> None:
    """`--allowed-origins a b` ended it, though the file says what the option takes."""
    (folder / "vllm.yaml").write_text(text + "\n")
    (problem,) = problems(folder, CONFIG="vllm.yaml")
    key = text.partition(":")[0].replace("-", "_")
    why = f"to vLLM a list there is plain words: put what is JSON in quotes, {said}"
    assert problem == f"vllm.yaml (environment CONFIG): {key}: {why}"


def test_vllms_own_file_may_have_numbers(folder: Path) -> None:
    text = "max-model-len: 0x1000\nrevision: 123\nenforce-eager: no\nserved-model-name: ['1.10', a]\nseed: 1_000\n"
    (folder / "vllm.yaml").write_text(f"{text}hf-overrides: {{a: 1.10}}\nmodel: '1.10'\n")
    settings = read(folder, Arguments(), CONFIG="vllm.yaml")
    assert (settings.model.value, argv(settings)) == ("1.10", ["--config", "vllm.yaml"])


# Arguments in a list


def test_arguments_may_be_a_list(folder: Path) -> None:
    for given in ("[--seed, 3, --hf-overrides, '{\"a b\": 1}']", "[--seed=3, '--hf-overrides={\"a b\": 1}']"):
        (folder / "a.yaml").write_text(f"supervisor: {{extra_args: {given}}}\n")
        settings = read(folder, SUPERVISOR_CONFIG="a.yaml")
        assert [setting.value for _, setting in settings.raw_options] == ["3", '{"a b": 1}']
        assert '{"a b": 1}' in settings.vllm_args[-1]


def test_a_list_may_have_an_option_and_its_value_as_one_item(folder: Path) -> None:
    (folder / "a.yaml").write_text("supervisor:\n  extra_args:\n  - --seed 3\n  - --enforce-eager\n")
    (problem,) = problems(folder, SUPERVISOR_CONFIG="a.yaml")
    assert "--seed 3 (a.yaml supervisor.extra_args)" in problem
    assert "write --seed=3" in problem


def test_a_program_may_be_a_list(folder: Path) -> None:
    program = folder / "a b"
    program.write_text("#!/bin/sh\necho 0.32.0\n")
    program.chmod(0o755)
    (folder / "a.yaml").write_text(f"supervisor: {{vllm: [{program}, '-x y'], cache_dir: {folder}}}\n")
    settings = gather(Arguments(model="m", config="a.yaml"), {"PATH": os.environ["PATH"]})
    assert settings.vllm.command == (str(program), "-x y")


# Secrets in it


@pytest.mark.parametrize("where", ["file", "environment"])
def test_a_key_of_tls_that_is_no_path_is_not_shown(folder: Path, where: str) -> None:
    texts = {"cert": "-----BEGIN CERTIFICATE-----\nAAAA\n", "key": "-----BEGIN PRIVATE KEY-----\nMIIEsecret\n"}
    if where == "file":
        (folder / "config.yaml").write_text(
            f"supervisor: {json.dumps({f'tls_{name}': texts[name] for name in texts})}\n"
        )
        (problem,) = problems(folder)
    else:
        (problem,) = problems(folder, **{f"SUPERVISOR_TLS_{name.upper()}": texts[name] for name in texts})
    assert problem == (
        "SUPERVISOR_TLS_CERT=-----BEGIN CERTIFICATE-----, SUPERVISOR_TLS_KEY=****: expected files with a certificate "
        "and its key in PEM, such as /tls/tls.crt and /tls/tls.key (No such file or directory)"
    )
