"""Settings: precedence, provenance, values and their checks, the command that comes out. No process is started."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from supervisor.secrets import Mask
from supervisor.settings import models
from supervisor.settings.command import build
from supervisor.settings.knobs import KNOBS, Keys, Knobs, read_keys
from supervisor.settings.names import ALIASES, OWNED
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather
from supervisor.vllm import catalogue, installed
from supervisor.vllm.catalogue import Option
from supervisor.vllm.installed import Vllm, VllmError
from supervisor.vllm.values import READERS, BadValue

SHIPPED = catalogue.parse((catalogue.FLAGS / "0.32.0.json").read_text())


def read(folder: Path, arguments: Arguments = Arguments(model="m"), /, **environ: str) -> Settings:  # noqa: B008  # frozen
    return gather(arguments, {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")} | environ)


def problems(folder: Path, arguments: Arguments = Arguments(model="m"), /, **environ: str) -> list[str]:  # noqa: B008
    with pytest.raises(SettingsError) as caught:
        read(folder, arguments, **environ)
    return caught.value.problems


def argv(settings: Settings) -> list[str]:
    found = list(build(settings, "SOCKET", "FOLDER").argv[1:])
    assert found[:2] == ["serve", str(settings.model.value)]
    assert found[2:4] == ["--uds", "SOCKET"]
    return found[4:]


# Precedence and provenance


def test_command_line_beats_environment_beats_file_beats_default(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: from-file\nsupervisor: {port: 1, host: 127.0.0.3}\nmax_model_len: 1\n")
    settings = read(folder, Arguments(model="from-cli", port="3"), MODEL="from-env", PORT="2", MAX_MODEL_LEN="2")
    assert (settings.model.value, settings.model.source) == ("from-cli", "command line")
    assert settings.model.overrode == ("environment MODEL: from-env", "config.yaml model: from-file")
    assert (settings.knobs.port, settings.knobs.host, settings.knobs.hold_timeout) == (3, "127.0.0.3", 120.0)
    length = {option.key: setting for option, setting in settings.options}["max_model_len"]
    assert (length.value, length.source) == ("2", "environment MAX_MODEL_LEN")
    assert length.overrode == ("config.yaml max_model_len: 1",)


def test_a_source_that_says_the_opposite_keeps_its_rank(folder: Path) -> None:
    (folder / "config.yaml").write_text("supervisor:\nenable_prefix_caching: true\ngpu_memory_utilization: 0.5\n")
    settings = read(folder, DISABLE_PREFIX_CACHING="true", DEVICE_MEMORY_UTILIZATION="0.7")
    values = {option.key: setting for option, setting in settings.options}
    assert values["enable_prefix_caching"].value is False
    assert values["enable_prefix_caching"].overrode == ("config.yaml enable_prefix_caching: true",)
    assert values["gpu_memory_utilization"].value == "0.7"


def test_empty_means_unset(folder: Path) -> None:
    settings = read(folder, Arguments(), MODEL="", MODEL_NAME="x", PORT="", MAX_MODEL_LEN="")
    assert settings.model.value == "x"
    assert settings.knobs.port == 8000
    assert argv(settings) == []


VALUES = {"TRUST_REMOTE_CODE": "true", "DTYPE": "auto", "SPEC_METHOD": "ngram", "SUPERVISOR_EXTRA_ARGS": "--seed=7"}


def test_every_alias_is_read(folder: Path) -> None:
    knobs = {knob.variable: knob.field for knob in KNOBS}
    for ours, others in ALIASES.items():
        for other in others:
            if ours == "CONFIG":
                (folder / "7.yaml").write_text("max-model-len: 7\n")
                assert argv(read(folder, **{other: "7.yaml"})) == ["--config", "7.yaml"]
                continue
            value = VALUES.get(ours, "7")
            settings = read(folder, Arguments(model=None if ours == "MODEL" else "m"), **{other: value})
            if ours == "MODEL":
                assert settings.model.source == f"environment {other}"
            elif ours in knobs:
                value = getattr(settings.knobs, knobs[ours])
                assert str(getattr(value, "values", value)) in ("7", "7.0", "('7',)", "('--seed=7',)")
            else:
                assert [setting.source for _, setting in settings.options] == [f"environment {other}"]


def test_ours_wins_over_an_alias(folder: Path) -> None:
    settings = read(folder, Arguments(), MODEL="ours", MODEL_NAME="theirs")
    assert settings.model.value == "ours"
    assert settings.model.overrode == ("environment MODEL_NAME: theirs",)


def test_settings_are_frozen(folder: Path) -> None:
    settings = read(folder)
    with pytest.raises(AttributeError):
        settings.knobs.port = 1  # type: ignore[misc]


def test_the_table_of_knobs_and_their_object_agree() -> None:
    assert {knob.field for knob in KNOBS} == set(Knobs.__dataclass_fields__)


# Values


@pytest.mark.parametrize(
    ("variable", "given", "expected"),
    [
        ("MAX_MODEL_LEN", "32k", ["--max-model-len", "32k"]),
        ("MAX_MODEL_LEN", "auto", ["--max-model-len", "auto"]),
        ("GPU_MEMORY_UTILIZATION", "0.9", ["--gpu-memory-utilization", "0.9"]),
        ("ENFORCE_EAGER", "yes", ["--enforce-eager"]),
        ("ENFORCE_EAGER", "0", ["--no-enforce-eager"]),
        ("DISABLE_LOG_STATS", "on", ["--disable-log-stats"]),
        ("DISABLE_LOG_STATS", "false", []),
        ("SERVED_MODEL_NAME", "a b", ["--served-model-name", "a", "b"]),
        ("SERVED_MODEL_NAME", '["a", "b c"]', ["--served-model-name", "a", "b c"]),
        ("SERVED_MODEL_NAME", "a,b", ["--served-model-name", "a", "b"]),
        ("MIDDLEWARE", "a,b", ["--middleware", "a", "--middleware", "b"]),
        ("SPECULATIVE_CONFIG", '{"method": "ngram"}', ["--speculative-config", '{"method": "ngram"}']),
        ("MAX_LOGPROBS", "-1", ["--max-logprobs=-1"]),
        ("CHAT_TEMPLATE", "{% for x in y %}", ["--chat-template", "{% for x in y %}"]),
        ("DTYPE", "bfloat16", ["--dtype", "bfloat16"]),
    ],
)
def test_values_become_argv(folder: Path, variable: str, given: str, expected: list[str]) -> None:
    assert argv(read(folder, **{variable: given})) == expected


def test_yaml_values_become_argv(folder: Path) -> None:
    (folder / "config.yaml").write_text(
        "supervisor:\nmax-model-len: 4096\nenforce_eager: false\nserved_model_name: [a, b]\n"
        "speculative-config:\n  method: ngram\n"
    )
    assert argv(read(folder)) == [
        "--no-enforce-eager", "--max-model-len", "4096", "--served-model-name", "a", "b",
        "--speculative-config", '{"method": "ngram"}',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "given", "expected"),
    [
        ("MAX_NUM_SEQS", "many", "a whole number"),
        ("GPU_MEMORY_UTILIZATION", "90%", "a number"),
        ("ENFORCE_EAGER", "maybe", "true or false"),
        ("MAX_MODEL_LEN", "4 k", "4096"),
        ("DTYPE", "float8", "bfloat16"),
        ("SPECULATIVE_CONFIG", "{method: ngram}", "JSON"),
        ("SERVED_MODEL_NAME", "[a", "a list"),
        ("PORT", "eighty", "a port"),
        ("PORT", "65536", "a port"),
        ("SUPERVISOR_HOLD_TIMEOUT", "-1", "seconds"),
        ("SUPERVISOR_HOLD_TIMEOUT", "nan", "seconds"),
        ("SUPERVISOR_LOG_FORMAT", "xml", "text, json"),
        ("SUPERVISOR_EXTRA_ARGS", "'open", "arguments"),
        ("SUPERVISOR_API_KEYS", "@/no/such/file", "keys"),
    ],
)
def test_bad_values_name_variable_value_and_expectation(folder: Path, variable: str, given: str, expected: str) -> None:
    (problem,) = problems(folder, **{variable: given})
    assert problem.startswith(f"{variable}=")
    assert expected in problem
    assert given in problem or "KEYS" in variable


def test_all_problems_come_at_once(folder: Path) -> None:
    (folder / "config.yaml").write_text("max_modle_len: 1\nsupervisor: {prot: 1}\n")
    found = problems(folder, MAX_NUM_SEQS="x", PORT="y")
    assert len(found) == 4
    assert any("unknown key max_modle_len; did you mean max_model_len?" in problem for problem in found)
    assert any("unknown key supervisor.prot; did you mean supervisor.port?" in problem for problem in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\n", "is not valid YAML at line"),
        ("- a\n- b\n", "must be a mapping"),
        ("just words", "must be a mapping"),
        ("supervisor: 3\nmodel: m\n", "'supervisor' must be a mapping"),
        ("a: \x00", "is not valid YAML"),
    ],
)
def test_malformed_config(folder: Path, text: str, expected: str) -> None:
    (folder / "other.yaml").write_text(text)
    found = problems(folder, Arguments(model="m", config="other.yaml"))
    assert any(expected in problem for problem in found)


def test_named_config_must_exist(folder: Path) -> None:
    (problem,) = problems(folder, Arguments(model="m", config="other.yaml"))
    assert "other.yaml can't be read" in problem


def test_empty_config_is_none(folder: Path) -> None:
    (folder / "config.yaml").write_text("# all comments\n")
    assert argv(read(folder)) == []


# Keys


KEYS = ("SUPERVISOR_API_KEYS", "SUPERVISOR_ADMIN_KEYS")


@pytest.mark.parametrize("variable", [*KEYS, "VLLM_API_KEY", "SM_VLLM_SUPERVISOR_API_KEYS"])
@pytest.mark.parametrize("blank", [" ", "\t", "\n", " \r\n\t"], ids=repr)
def test_a_blank_key_is_refused_and_not_taken_for_none(folder: Path, variable: str, blank: str) -> None:
    (problem,) = problems(folder, **{variable: blank})
    assert f"(environment {variable}): expected" in problem
    assert "there is nothing but blanks" in problem


@pytest.mark.parametrize("variable", KEYS)
def test_an_empty_text_is_no_key(folder: Path, variable: str) -> None:
    settings = read(folder, **{variable: ""})
    assert settings.keys == (Keys(), Keys())
    assert settings.warnings == ()


@pytest.mark.parametrize("variable", KEYS)
@pytest.mark.parametrize("content", ["", " ", "\n\n", "\t\r\n , \n"], ids=repr)
def test_a_file_without_a_key_is_refused(folder: Path, variable: str, content: str) -> None:
    (folder / "keys").write_text(content)
    (problem,) = problems(folder, **{variable: f"@{folder / 'keys'}"})
    assert f"(environment {variable}): expected" in problem
    assert "there is nothing but blanks" in problem
    with pytest.raises(BadValue):  # so that a file that was emptied does not open the server on SIGHUP
        Keys(("a-valid-key",), str(folder / "keys")).reread()


def test_a_blank_key_in_the_file_of_settings_is_refused(folder: Path) -> None:
    (folder / "config.yaml").write_text("supervisor: {api_keys: ' '}\n")
    (problem,) = problems(folder)
    assert "there is nothing but blanks" in problem
    assert "(config.yaml supervisor.api_keys)" in problem


def test_keys_are_no_list_in_json_and_their_file_may_have_comments(folder: Path) -> None:
    (problem,) = problems(folder, SUPERVISOR_API_KEYS='["key-number-1", "key-number-2"]')
    assert "brackets" in problem
    (folder / "keys").write_text("# ours\nkey-number-1\n\n  # theirs\nkey-number-2\n")
    assert read(folder, SUPERVISOR_API_KEYS="@keys").keys[0].values == ("key-number-1", "key-number-2")
    (problem,) = problems(folder, SUPERVISOR_API_KEYS="key-number-1 # mine")
    assert "--env-file" in problem
    assert "key-number" not in problem


@pytest.mark.parametrize("name", ["VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "VLLM_DISABLE_LOG_LOGO"])
def test_what_vllm_takes_for_yes_as_a_number_alone_is_one(folder: Path, name: str) -> None:
    assert read(folder, **{name: "true"}).environ[name] == "1"


def test_a_file_of_keys_may_have_blanks_around_its_name(folder: Path) -> None:
    (folder / "keys").write_text("the-key-of-the-file\n")
    assert read(folder, SUPERVISOR_API_KEYS=f" @{folder / 'keys'}\n").knobs.api_keys == Keys(
        ("the-key-of-the-file",), str(folder / "keys")
    )


PLACEHOLDERS = {
    "${API_KEY}": "${NAME}",
    "${API_KEY:-}": "${NAME}",
    "sk-${SUFFIX}": "${NAME}",
    "a-valid-key,${API_KEY}": "${NAME}",
    "$(API_KEY)": "$(NAME)",
    "$API_KEY": "$NAME",
    "{{ API_KEY }}": "{{ NAME }}",
    "{{API_KEY}}": "{{ NAME }}",
    "{{ .Values.apiKey }}": "{{ NAME }}",
    "${{ secrets.API_KEY }}": "{{ NAME }}",
}


@pytest.mark.parametrize("variable", KEYS)
@pytest.mark.parametrize(("given", "form"), PLACEHOLDERS.items(), ids=PLACEHOLDERS)
def test_a_placeholder_that_nothing_filled_in_is_no_key(folder: Path, variable: str, given: str, form: str) -> None:
    (problem,) = problems(folder, **{variable: given})
    assert problem.startswith(f"{variable}=****")
    assert f"has a placeholder like {form}, which nothing has filled in" in problem
    (folder / "keys").write_text(f"{given}\n")
    (problem,) = problems(folder, **{variable: f"@{folder / 'keys'}"})
    assert form in problem


QUOTED = [
    '"a-valid-key"',
    "'a-valid-key'",
    "one-valid-key,'another-one'",
    '"one-valid-key,another-one"',
    '"@/run/keys"',
]


@pytest.mark.parametrize("variable", KEYS)
@pytest.mark.parametrize("given", QUOTED)
def test_a_key_that_is_still_in_its_quotes_is_told(folder: Path, variable: str, given: str) -> None:
    (problem,) = problems(folder, **{variable: given})
    assert problem.startswith(f"{variable}=****")
    assert "stands in quotes" in problem
    assert "valid-key" not in problem


@pytest.mark.parametrize(
    "key", ["$2b$12$abcdefgh", "pa$$word-1234", "a{b}c{d}e{f}", "it's-a-key-1", 'a"b"c-1234', "$ecret123"]
)
def test_keys_that_only_look_a_little_like_it_are_keys(folder: Path, key: str) -> None:
    settings = read(folder, SUPERVISOR_API_KEYS=key)
    assert settings.knobs.api_keys == Keys((key,))
    assert settings.warnings == ()


@pytest.mark.parametrize("variable", KEYS)
def test_a_short_key_is_told_and_is_a_key(folder: Path, variable: str) -> None:
    assert read(folder, **{variable: "eight-88,12345678"}).warnings == ()
    settings = read(folder, **{variable: "long-enough,1234567,7654321"})
    assert [keys.values for keys in settings.keys if keys.values] == [("long-enough", "1234567", "7654321")]
    assert settings.warnings == (f"{variable}: 2 keys have less than 8 characters, which can be guessed",)
    (warning,) = read(folder, **{variable: "12345"}).warnings
    assert warning.startswith(f"{variable}: a key has less than 8 characters, which can be guessed")
    assert "less than 6 can't be masked in the log" in warning
    assert "12345" not in warning


# Hosts and the keep-alive of streams


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ()),
        (" ", ()),
        ("gpu1", ("gpu1",)),
        ("GPU1.Example.com.", ("gpu1.example.com",)),
        ("a.example.com, *.example.org,", ("a.example.com", "*.example.org")),
        ("my_box.local,xn--bcher-kva.example", ("my_box.local", "xn--bcher-kva.example")),
        ("192.0.2.7", ("192.0.2.7",)),
    ],
)
def test_hosts_are_names_between_commas(folder: Path, given: str, expected: tuple[str, ...]) -> None:
    assert read(folder, SUPERVISOR_ALLOWED_HOSTS=given).knobs.allowed_hosts == expected


@pytest.mark.parametrize(
    "given",
    [
        "http://example.com", "example.com/", "example.com:8000", "example.com?x", "user@example.com", "*", "*.",
        "*.*.a", "a.*.example.com", "*example.com", "ex*.com", "a..b", ".example.com", "-a.example.com",
        "a-.example.com", "[::1]", "a b", "bücher.example", "a" * 64, ".".join(["a" * 60] * 5),
        "good.example.com,bad/path", "a\x00b",
    ],
)  # fmt: skip
def test_what_is_no_host_is_told(folder: Path, given: str) -> None:
    assert any(
        problem.startswith("SUPERVISOR_ALLOWED_HOSTS=") and "names of hosts without scheme, port or path" in problem
        for problem in problems(folder, SUPERVISOR_ALLOWED_HOSTS=given)
    )


def test_the_keep_alive_of_streams_is_off_until_asked_for(folder: Path) -> None:
    assert read(folder).knobs.sse_keep_alive == 0
    assert read(folder, SUPERVISOR_SSE_KEEP_ALIVE="15").knobs.sse_keep_alive == 15
    (problem,) = problems(folder, SUPERVISOR_SSE_KEEP_ALIVE="often")
    assert "expected seconds" in problem


# The model


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_folder_that_does_not_exist(folder: Path, name: str) -> None:
    (problem,) = problems(folder, Arguments(model=name))
    assert "expected a folder that is there" in problem
    assert name in problem


@pytest.mark.parametrize("name", ["./missing", "../missing", "/models/llama", "./models/llama"])
def test_a_missing_folder_is_no_name_of_the_hub(folder: Path, name: str) -> None:
    (problem,) = problems(folder, Arguments(model=name))
    assert problem == f"MODEL={name} (command line): expected a folder that is there, or a name such as org/model"


def test_no_model_on_a_platform_names_the_variable(folder: Path) -> None:
    (problem,) = problems(folder, Arguments(), RUNPOD_POD_ID="x")
    assert "set MODEL" in problem


def test_no_model_on_a_laptop_is_the_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_demo_obstacle", lambda environ: None)
    settings = read(folder, Arguments(), MAX_MODEL_LEN="512")
    assert settings.is_demo
    assert Path(settings.model.value) == models.DEMO_MODEL
    found = argv(settings)
    assert found[found.index("--max-model-len") + 1] == "512"
    assert "--enable-auto-tool-choice" in found
    environ = build(settings, "s", "f").environ
    assert (environ["VLLM_CPU_KVCACHE_SPACE"], environ["OMP_NUM_THREADS"]) == ("1", "1")
    theirs = read(folder, Arguments(), OMP_NUM_THREADS="4")  # what the user says wins
    assert build(theirs, "s", "f").environ["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("mode", "environ"),
    [
        ("http", {}),
        ("queue", {"SUPERVISOR_MODE": "queue"}),
        ("queue", {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1/"}),
        # A load balancer's worker asks to be looked at; it may have been given a queue's address all the same.
        ("http", {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1/", "PORT_HEALTH": "80"}),
        ("http", {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1/", "HEALTH_CHECK_PATH": "/ping"}),
        ("http", {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1/", "SUPERVISOR_MODE": "http"}),
        ("queue", {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1/", "PORT_HEALTH": " ", "HEALTH_CHECK_PATH": "\n"}),
    ],
)
def test_mode(folder: Path, mode: str, environ: dict[str, str]) -> None:
    assert read(folder, **environ).mode == mode


def test_queue_mode_has_defaults_of_its_own(folder: Path) -> None:
    queue = read(folder, SUPERVISOR_MODE="queue")
    assert (queue.knobs.on_failure, queue.knobs.max_concurrency) == ("serve", 30)
    assert not queue.is_set("SUPERVISOR_ON_FAILURE")
    asked = read(folder, SUPERVISOR_MODE="queue", SUPERVISOR_ON_FAILURE="exit", MAX_CONCURRENCY="7")
    assert (asked.knobs.on_failure, asked.knobs.max_concurrency) == ("exit", 7)
    assert asked.is_set("SUPERVISOR_ON_FAILURE")
    assert (read(folder).knobs.on_failure, read(folder).knobs.max_concurrency) == ("exit", None)


# What is not the user's to set


def test_owned_options_are_said_to_be_owned(folder: Path) -> None:
    settings = read(folder, HOST="0.0.0.0", API_KEY="k", UDS="/x", PORT="8001")
    assert argv(settings) == []
    assert len(settings.warnings) == 3
    assert all("is not passed to vLLM" in note for note in settings.warnings)


def test_owned_options_in_raw_arguments_are_refused(folder: Path) -> None:
    for token in ("--uds", "--port=1", "--api-key"):
        assert any(token.partition("=")[0] in problem for problem in problems(folder, SUPERVISOR_EXTRA_ARGS=token))
    assert all(f"--{key.replace('_', '-')}" in SHIPPED_NAMES or key == "grpc" for key in OWNED)


SHIPPED_NAMES = {option.name for option in SHIPPED.by_key.values()}


def test_raw_arguments_come_last_as_they_are(folder: Path) -> None:
    settings = read(
        folder, Arguments(model="m", vllm_args=("--xx", "a b")), SUPERVISOR_EXTRA_ARGS="--yy 'c d'", SEED="1"
    )
    assert argv(settings) == ["--seed", "1", "--yy", "c d", "--xx", "a b"]
    assert all("it is passed as it is" in warning for warning in settings.warnings)
    assert len(settings.warnings) == 2


# The child's environment, and what a person may see


def test_tokens_reach_vllm_as_variables_and_nothing_of_ours_does(folder: Path) -> None:
    environ = {"HF_TOKEN": "hf_secretsecret", "RUNPOD_AI_API_KEY": "k", "SUPERVISOR_API_KEYS": "k1", "VLLM_X": "1"}
    command = build(read(folder, **environ), "SOCKET", "FOLDER")
    assert "hf_secretsecret" not in " ".join(command.argv)
    assert command.environ["HF_TOKEN"] == "hf_secretsecret"
    assert command.environ["VLLM_X"] == "1"
    assert command.environ["TMPDIR"] == command.environ["VLLM_RPC_BASE_PATH"] == "FOLDER"
    assert not {"RUNPOD_AI_API_KEY", "SUPERVISOR_API_KEYS", "SUPERVISOR_VLLM"} & set(command.environ)


@pytest.mark.parametrize(
    ("variable", "ours", "theirs"),
    [
        # A redirect is not compared with ALLOWED_MEDIA_DOMAINS.
        ("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0", "1"),
        # Who speaks to a private socket is the gateway, whose word on https counts.
        ("FORWARDED_ALLOW_IPS", "*", "127.0.0.1"),
    ],
)
def test_what_is_safer_for_vllm_is_set_unless_the_user_did(folder: Path, variable: str, ours: str, theirs: str) -> None:
    def passed(**environ: str) -> str:
        return build(read(folder, **environ), "SOCKET", "FOLDER").environ[variable]

    assert passed() == ours
    assert passed(**{variable: ""}) == ours  # an empty value is not set
    assert passed(**{variable: theirs}) == theirs


def test_mask_hides_what_is_secret_and_nothing_else() -> None:
    mask = Mask({"HF_TOKEN": "hf_secretsecret", "MY_PASSWORD": "pa.*ss", "KEYBOARD": "qwertz", "MONKEY": "banana"})
    assert mask("hf_secretsecret pa.*ss qwertz banana") == "**** **** qwertz banana"
    assert mask("https://user:pw@host/x sk-abcdefghij hf_other123456") == "https://****@host/x **** ****"
    assert Mask({"API_KEY": "1"})("1 and 1") == "1 and 1"


@pytest.mark.parametrize("password", ["ab/cd", "ab/cd+/e=", "1/2/a", "a:b/c"])
def test_a_password_in_an_address_may_have_slashes(password: str) -> None:
    """Those that a generator makes in base64 do."""
    assert Mask({})(f"at http://user:{password}@proxy:3128/x, no") == "at http://****@proxy:3128/x, no"
    assert Mask({})(f"redis://:{password}@h") == "redis://****@h"


@pytest.mark.parametrize(
    "text", ["http://h:8000/a@b", "oci://h:5000/a:b@sha256", "http://h/a:b/c@d", "http://[::1]:80/a@b", "x://a:b //c@d"]
)
def test_what_is_behind_a_path_is_no_password(text: str) -> None:
    assert Mask({})(text) == text


# The catalogue


def test_the_shipped_catalogue_is_whole() -> None:
    assert SHIPPED.version == "0.32.0"
    assert len(SHIPPED.by_key) == 316  # and the positional model: 317
    kinds = [option.kind for option in SHIPPED.by_key.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "value": 206, "pair": 88, "list": 15, "switch": 5, "optional": 1, "append": 1,
    }  # fmt: skip
    assert {option.type for option in SHIPPED.by_key.values()} <= set(READERS)


def test_numbers_that_look_like_other_things() -> None:
    option = Option("--x", "value", "int", ())
    assert option.read("8") == option.read(8) == "8"
    assert option.read("1_000") == option.read(" 1000 ") == "1000"
    for bad in (True, "8.5", 8.5, "", "²", "1k"):
        with pytest.raises(BadValue):
            option.read(bad)


def test_an_unknown_version_is_dumped_once_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def dump(vllm: Vllm) -> str:
        calls.append(vllm.version)
        return '{"version": "9.9.9", "options": [{"name": "--new", "kind": "switch"}]}'

    monkeypatch.setattr(catalogue, "dump", dump)
    vllm = Vllm(("vllm",), "9.9.9", None)
    for _ in range(2):
        assert list(catalogue.load(vllm, tmp_path).by_key) == ["new"]
    assert calls == ["9.9.9"]
    (tmp_path / "flags" / "9.9.9.json").write_text('{"version": "9.')  # cut off while it was written
    assert list(catalogue.load(vllm, tmp_path).by_key) == ["new"]
    monkeypatch.undo()
    with pytest.raises(VllmError, match=r"9\.9\.8"):
        catalogue.load(Vllm(("vllm",), "9.9.8", None), tmp_path)


@pytest.mark.parametrize("variable", ["RUNPOD_ENDPOINT_ID", "RUNPOD_POD_ID"])
def test_on_runpod_a_queue_without_its_address_is_no_simulated_one(tmp_path: Path, variable: str) -> None:
    """It would be taken for a worker that has nothing to do."""
    found = problems(tmp_path, **{variable: "x", "SUPERVISOR_MODE": "queue"})
    (problem,) = [each for each in found if "RUNPOD_WEBHOOK_GET_JOB" in each]
    assert f"{variable} is set" in problem


# What a value may do that nobody meant


@pytest.mark.parametrize("name", ["--help", "-x", "-", "--seed=1"])
def test_a_model_is_no_option(folder: Path, name: str) -> None:
    (problem,) = problems(folder, Arguments(), MODEL=name)
    assert problem.startswith(f"MODEL={name} (environment MODEL): expected ")


@pytest.mark.parametrize("given", ["a,--api-key,secret1", "a -b", '["a", "--disable-log-stats"]'])
def test_an_item_of_a_list_is_no_option(folder: Path, given: str) -> None:
    """`--served-model-name a --api-key x` is a name and a key."""
    (problem,) = problems(folder, SERVED_MODEL_NAME=given)
    assert problem.endswith("expected items of which none begins with a dash")


def test_a_model_s_folder_has_something_in_it(folder: Path) -> None:
    """A volume that is not mounted is an empty folder."""
    (folder / "model").mkdir()
    (problem,) = problems(folder, Arguments(model="./model"))
    assert problem == "MODEL=./model (command line): expected a folder with a model in it; there is nothing in this one"
    os.mkfifo(folder / "pipe")
    for name in ("/dev/null", "./pipe"):
        (problem,) = problems(folder, Arguments(), MODEL=name)
        assert problem.endswith("expected a folder with a model in it; there is nothing in this one")


@pytest.mark.parametrize("name", ["SUPERVISOR_CACHE_DIR", "SUPERVISOR_VOLUME", "SUPERVISOR_TLS_CERT"])
def test_a_tilde_is_the_home(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """docker's -e and compose leave it as it is, and a folder named `~` was made."""
    monkeypatch.setenv("HOME", str(folder))
    (knob,) = (knob for knob in KNOBS if knob.variable == name)
    assert knob.read("~/x") == f"{folder}/x"
    (folder / "keys").write_text("a-key-of-some-length\n")
    assert read_keys("@~/keys").values == ("a-key-of-some-length",)


def test_an_empty_home_is_none(folder: Path) -> None:
    assert read(folder, HOME="").cache == Path("/tmp/.cache/vllm-supervisor")


@pytest.mark.parametrize("name", ["SERVED_MODEL_NAME", "REVISION", "VLLM_LOGGING_PREFIX", "SUPERVISOR_CACHE_DIR"])
def test_a_comment_behind_a_value_is_told(folder: Path, name: str) -> None:
    settings = read(folder, **{name: f"{folder} # the best"})
    (told,) = [line for line in settings.warnings if "#" in line]
    about = "docker's --env-file keeps what stands behind a #"
    assert told == f"{name}={folder} # the best (environment {name}): {about}"


def test_a_comment_in_a_secret_is_told_without_it(folder: Path) -> None:
    settings = read(folder, HF_TOKEN="abcdefghij # mine")
    (told,) = [line for line in settings.warnings if "#" in line]
    assert told.startswith("HF_TOKEN=**** (environment HF_TOKEN): ")


def test_a_hash_within_a_template_or_a_word_is_none(folder: Path) -> None:
    settings = read(folder, CHAT_TEMPLATE="{{ x }} # y {% if z %}", SERVED_MODEL_NAME="a#b", REVISION="#1")
    assert not any("#" in line for line in settings.warnings)


# vLLM's own file of options


@pytest.mark.parametrize("where", ["environment", "extra", "command line"])
def test_vllms_file_is_looked_at_wherever_it_is_named(folder: Path, where: str) -> None:
    (folder / "v.yaml").write_text("max-num-seqs: 0\nport: 9000\nno-such-thing-at-all: 1\n")
    if where == "environment":
        found = problems(folder, CONFIG="v.yaml")
    elif where == "extra":
        found = problems(folder, SUPERVISOR_EXTRA_ARGS="--config v.yaml")
    else:
        found = problems(folder, Arguments(model="m", vllm_args=("--config", "v.yaml")))
    assert [line.split(": ")[0].rpartition("(")[0].strip() for line in found] == ["MAX_NUM_SEQS=0 (v.yaml", "v.yaml"]
    assert "at least 1" in found[0]


def test_what_vllms_file_has_and_vllm_has_not_is_told(folder: Path) -> None:
    (folder / "v.yaml").write_text("no-such-thing-at-all: 1\n")
    assert [line for line in read(folder, CONFIG="v.yaml").warnings if "no_such" in line] == [
        "v.yaml (environment CONFIG): vLLM 0.32.0 has no option no_such_thing_at_all, and most likely ends at it"
    ]


# Where the gateway listens


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "127.1",
        "0",
        "::",
        "::1",
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
        "localhost",
        "gpu1",
        "GPU_1.example.com.",
    ],
)
def test_what_is_a_host(folder: Path, host: str) -> None:
    assert read(folder, SUPERVISOR_HOST=host).knobs.host == host


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("http://localhost", "an address alone: set SUPERVISOR_HOST=localhost"),
        ("https://10.0.0.1/v1", "an address alone: set SUPERVISOR_HOST=10.0.0.1"),
        ("0.0.0.0/0", "an address alone: set SUPERVISOR_HOST=0.0.0.0"),
        ("http://0.0.0.0:8000/", "an address alone: set SUPERVISOR_HOST=0.0.0.0 and PORT=8000"),
        ("localhost:8000", "an address alone: set SUPERVISOR_HOST=localhost and PORT=8000"),
        ("[::1]:8000", "an address alone: set SUPERVISOR_HOST=::1 and PORT=8000"),
        ("tcp://[::]:80", "an address alone: set SUPERVISOR_HOST=:: and PORT=80"),
        ("[::]", "an address alone: set SUPERVISOR_HOST=::"),
        ("*", "0.0.0.0 for all IPv4 addresses of this machine, or ::"),
        ("*:8000", "0.0.0.0 for all IPv4 addresses of this machine, or ::"),
        ("8000", "an address, such as 0.0.0.0: the port is PORT=8000"),
        (":8000", "an address, such as 0.0.0.0: the port is PORT=8000"),
        ("256.1.1.1", "an address of this machine, or its name, such as 0.0.0.0 or ::1"),
        ("1.2.3.4.5", "an address of this machine, or its name, such as 0.0.0.0 or ::1"),
        ("::ffff:zz", "an address of this machine, or its name, such as 0.0.0.0 or ::1"),
        ("a b", "an address of this machine, or its name, such as 0.0.0.0 or ::1"),
        ("*.example.com", "an address of this machine, or its name, such as 0.0.0.0 or ::1"),
        ("-a", "an address of this machine, or its name, such as 0.0.0.0 or ::1"),
    ],
)
def test_what_is_no_host_is_told_with_what_to_write(folder: Path, host: str, told: str) -> None:
    (problem,) = problems(folder, SUPERVISOR_HOST=host)
    assert problem == f"SUPERVISOR_HOST={host} (environment SUPERVISOR_HOST): expected {told}"
    (problem,) = problems(folder, Arguments(model="m", host=host))
    assert problem == f"SUPERVISOR_HOST={host} (command line --host): expected {told}"
    (folder / "config.yaml").write_text(f"supervisor: {{host: '{host}'}}\n")
    (problem,) = problems(folder)
    assert problem == f"SUPERVISOR_HOST={host} (config.yaml supervisor.host): expected {told}"


@pytest.mark.parametrize("address", ["http://10.0.0.1", "10.0.0.1:29501", "tcp://10.0.0.1:29501", "[::1]:29501"])
def test_the_first_machines_address_is_an_address_alone(folder: Path, address: str) -> None:
    for variable in ("MASTER_ADDR", "DATA_PARALLEL_ADDRESS"):
        found = problems(folder, NNODES="2", TENSOR_PARALLEL_SIZE="2", NODE_RANK="1", **{variable: address})
        (told,) = [line for line in found if line.startswith(f"{variable}={address} ")]
        assert "expected the address alone, such as 10.0.0.1; its port is" in told


# Which vLLM


def program(folder: Path, text: str, name: str = "program") -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "said",
    ["Python 3.11.2", "echo (GNU coreutils) 9.1\nWritten by Brian Fox.", "", "v20.1.0", "jq-1.6", "0", "vllm", "1 2 3"],
)
def test_a_program_that_is_no_vllm_is_told(folder: Path, said: str) -> None:
    path = program(folder, f"cat <<'.'\n{said}\n.")
    (problem,) = problems(folder, SUPERVISOR_VLLM=path, SUPERVISOR_CACHE_DIR=str(folder / "cache"))
    last = f" (it says {said.splitlines()[-1]!r})" if said else ""
    assert problem == f"`{path} --version` failed: it is not a working vLLM{last}."
    assert not (folder / "cache").exists()


def test_a_vllm_that_lacks_a_package_is_told_with_its_own_words(folder: Path) -> None:
    path = program(
        folder, "echo INFO importing\necho \"ModuleNotFoundError: No module named 'typing_extensions'\" >&2; exit 1"
    )
    (problem,) = problems(folder, SUPERVISOR_VLLM=path, SUPERVISOR_CACHE_DIR=str(folder / "cache"))
    assert "it is not a working vLLM (it says \"ModuleNotFoundError: No module named 'typing_extensions'\")" in problem


def test_a_program_that_says_no_text_is_told(folder: Path) -> None:
    path = program(folder, r"printf '\377\376\n'")
    (problem,) = problems(folder, SUPERVISOR_VLLM=path, SUPERVISOR_CACHE_DIR=str(folder / "cache"))
    assert problem == f"`{path} --version` failed: it is not a working vLLM (it says '\ufffd\ufffd')."


@pytest.mark.parametrize(
    "said", ["0.32.0", "vllm 0.32.0", "vLLM 0.32.0+cu130", "INFO 09:00 [__init__.py:1] hello\n0.32.0"]
)
def test_what_vllm_says_of_its_version(folder: Path, said: str) -> None:
    path = program(folder, f"cat <<'.'\n{said}\n.")
    settings = read(
        folder, SUPERVISOR_VLLM=f"nice {path}", PATH="/usr/bin:/bin", SUPERVISOR_CACHE_DIR=str(folder / "cache")
    )
    assert settings.vllm.version == "0.32.0"


def test_what_torch_leaves_when_vllm_is_asked_for_its_version_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    path = program(folder, 'mkdir "$TMPDIR/torchinductor_root" && echo 0.32.0')
    assert installed.find(path, None, folder / "cache").version == "0.32.0"
    assert not list((folder / "temporary").iterdir())


def test_a_vllm_that_was_built_without_git_has_no_number(folder: Path) -> None:
    path = program(folder, "echo dev")
    assert installed.find(path, None, folder / "cache").version == "dev"


@pytest.mark.parametrize("name", ["python3", "pip", "supervisord"])
def test_what_is_installed_beside_vllm_is_none(folder: Path, name: str) -> None:
    path = program(folder.parent / "vllm/bin", "echo Python 3.12.1", name)
    (problem,) = problems(folder, SUPERVISOR_VLLM=path, SUPERVISOR_CACHE_DIR=str(folder / "cache"))
    assert "it is not a working vLLM (it says 'Python 3.12.1')" in problem
