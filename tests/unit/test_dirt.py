"""Values as files, platforms and shells hand them over: each kind of dirt, in each kind of setting."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.settings.command import build
from supervisor.settings.knobs import KNOBS
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather
from supervisor.settings.sources import ENGINE_NAME
from supervisor.vllm.catalogue import FLAGS, parse
from supervisor.vllm.values import BadValue, clean

CATALOGUE = parse((FLAGS / "0.32.0.json").read_text())

# A good value for each kind of setting: options of each kind and type, our own, the model, what others read.
VALUES = {
    "MAX_NUM_SEQS": "8",
    "MAX_MODEL_LEN": "32k",
    "GPU_MEMORY_UTILIZATION": "0.5",
    "DTYPE": "bfloat16",
    "REVISION": "main",
    "TOKENIZER": "org/tokenizer",
    "QUANTIZATION": "awq",
    "DOWNLOAD_DIR": "/models",
    "ATTENTION_BACKEND": "FLASH_ATTN",
    "LOAD_FORMAT": "safetensors",
    "SERVED_MODEL_NAME": "a",
    "MIDDLEWARE": "a.b",
    "ENFORCE_EAGER": "true",
    "DISABLE_LOG_STATS": "true",
    "HF_OVERRIDES": '{"a": 1}',
    "SPECULATIVE_CONFIG": '{"method": "ngram"}',
    "ALLOWED_ORIGINS": "https://a",
    "DEVICE_IDS": "0",
    "PORT": "8001",
    "SUPERVISOR_HOST": "127.0.0.2",
    "SUPERVISOR_MODE": "http",
    "SUPERVISOR_MAX_RESTARTS": "3",
    "SUPERVISOR_HOLD_TIMEOUT": "7",
    "SUPERVISOR_RATE_LIMIT": "9",
    "SUPERVISOR_LOG_FORMAT": "json",
    "SUPERVISOR_MAX_BODY": "1MiB",
    "SUPERVISOR_ALLOW_ROUTES": "/x",
    "SUPERVISOR_WARM_UP": "true",
    "SUPERVISOR_API_KEYS": "a-valid-key",
    "SUPERVISOR_EXTRA_ARGS": "--seed 1",
    "MODEL": "org/model",
    "MODEL_NAME": "org/model",
    "HF_TOKEN": "hf_secretsecret",
    "HF_HOME": "/hub",
    "HF_ENDPOINT": "https://hub.example",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "CUDA_VISIBLE_DEVICES": "0,1",
}
IN_FILES = {variable for variable in VALUES if variable.lower() in CATALOGUE.by_key} - {"MODEL", "PORT", "HF_TOKEN"}
# What is told of these in vLLM's own file, whose white space and quotes vLLM does not take away.
TO_THE_LETTER = {
    "ALLOWED_ORIGINS": "expected JSON",
    "DISABLE_LOG_STATS": "write true, without quotes",
    "DTYPE": "without blanks",
    "ENFORCE_EAGER": "write true, without quotes",
}
# One of each way in which a value is read; the others take a while.
QUICK = {
    "MAX_MODEL_LEN", "DTYPE", "REVISION", "SERVED_MODEL_NAME", "ENFORCE_EAGER", "HF_OVERRIDES", "PORT", "MODEL",
    "HF_TOKEN", "SUPERVISOR_API_KEYS", "SUPERVISOR_HOLD_TIMEOUT", "VLLM_LOGGING_LEVEL",
}  # fmt: skip
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VALUES]
TOLD = re.compile("stands in quotes|has a placeholder")
AROUND = ["{}\n", "{}\r\n", "{}\r", " {}\t", "\n{}"]
COPIED = ["\ufeff{}", "{}\u00a0", "\u200b{}\u200b\n"]
QUOTED = ['"{}"', "'{}'", '"{}"\n', " '{}' "]
ODD_QUOTES = ["\u201c{}\u201d", "\u2018{}\u2019", "`{}`"]
PLACEHOLDERS = {
    "${{X}}": "${NAME}",
    "${{X:-{}}}": "${NAME}",
    "$(X)": "$(NAME)",
    "{{{{ X }}}}": "{{ NAME }}",
    "$X": "$NAME",
    "%X%": "%NAME%",
    "{{X}}": "{NAME}",
    "<your value>": "<NAME>",
}


def read(folder: Path, **environ: str) -> Settings:
    vllm = {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")}
    model = {} if environ.keys() & {"MODEL", "MODEL_NAME"} else {"MODEL": "m"}
    return gather(Arguments(), vllm | model | environ)


def effective(settings: Settings) -> dict[str, object]:
    """What is in effect, but for where it came from."""
    every = [settings.model, *settings.knob_settings, *(setting for _, setting in settings.options)]
    child = {name: build(settings, "S", "F").environ.get(name) for name in VALUES if ENGINE_NAME.match(name)}
    return {setting.name: setting.value for setting in every if setting.name != "SUPERVISOR_VLLM"} | {"child": child}


def problems(folder: Path, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(folder, **environ)
    return caught.value.problems


@pytest.mark.parametrize("variable", EACH)
def test_white_space_around_a_value_is_none_of_it(folder: Path, variable: str) -> None:
    value = VALUES[variable]
    meant = effective(read(folder, **{variable: value}))
    for form in (*AROUND, *COPIED):
        settings = read(folder, **{variable: form.format(value)})
        assert effective(settings) == meant, repr(form)


@pytest.mark.parametrize("variable", EACH)
def test_a_value_in_quotes_is_told_with_who_keeps_them(folder: Path, variable: str) -> None:
    for form in (*QUOTED, *ODD_QUOTES):
        if form.strip()[0] in VALUES[variable]:
            continue
        (problem,) = problems(folder, **{variable: form.format(VALUES[variable])})
        assert f"(environment {variable}): expected the value alone; it stands in quotes" in problem
        assert "docker's --env-file" in problem
        assert "secret" not in problem


@pytest.mark.parametrize("variable", EACH)
def test_a_placeholder_is_refused_wherever_it_stands(folder: Path, variable: str) -> None:
    for form, told in PLACEHOLDERS.items():
        given = form.format(VALUES[variable]) if "{}" in form else form.format()
        if variable == "SUPERVISOR_EXTRA_ARGS":
            given = f"--seed '{given}'"
        found = problems(folder, **{variable: given})
        assert len(found) == 1, found
        assert variable in found[0]
        assert f"a placeholder like {told}, which nothing has filled in" in found[0]


@pytest.mark.parametrize("variable", [each for each in EACH if each.values[0] in IN_FILES])
def test_the_files_are_read_as_variables_are(folder: Path, variable: str) -> None:
    """config.yaml, and the file of vLLM's own --config, which vLLM reads itself: it takes some values to the letter."""
    key, value = variable.lower(), VALUES[variable]
    for name, environ in (("config.yaml", {}), ("vllm.yaml", {"CONFIG": "vllm.yaml"})):
        text = "supervisor:\n" if name == "config.yaml" else ""
        dirt = {f"{value}\n": None, f'"{value}"' if '"' not in value else f"'{value}'": "quotes", "${X}": "${NAME}"}
        if name == "vllm.yaml" and variable in TO_THE_LETTER:
            dirt = {given: TO_THE_LETTER[variable] if value == "true" else told for given, told in dirt.items()}
            dirt[f"{value}\n"] = TO_THE_LETTER[variable]
        for given, told in dirt.items():
            (folder / name).write_text(f"{text}{key}: {json.dumps(given)}\n")
            if told is None:
                read(folder, **environ)
            else:
                (problem,) = problems(folder, **environ)
                assert told in problem
                assert name in problem
        (folder / name).unlink()


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.variable)
def test_each_setting_of_ours_refuses_what_nobody_filled_in(folder: Path, knob: object) -> None:
    variable = knob.variable  # type: ignore[attr-defined]
    if variable == "SUPERVISOR_EXTRA_ARGS":  # may have a template: its options are looked at one by one
        return
    for given in (
        "${X}",
        "{{ X }}",
        "$(X)",
        *(['"x"'] if variable != "SUPERVISOR_VLLM" else []),
    ):  # a command has its own
        found = problems(folder, **{variable: given})
        assert any(problem.startswith(f"{variable}=") and TOLD.search(problem) for problem in found)


def test_each_option_refuses_what_nobody_filled_in() -> None:
    taken = []
    for option in CATALOGUE.by_key.values():
        for given in ("${X}", "$(X)", '"x"'):
            try:
                option.check(given) if option.kind not in ("pair", "switch") else clean(given)
                taken.append((option.variable, given))
            except BadValue as error:
                assert TOLD.search(str(error)), option.variable
    assert taken == []


def test_a_chat_template_has_braces_of_its_own(folder: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    settings = read(folder, CHAT_TEMPLATE=f" {template}\n")
    assert settings.option("chat_template") == template
    raw = read(folder, SUPERVISOR_EXTRA_ARGS=f"--chat-template '{template}' --seed 1")
    assert raw.option("chat_template") == template
    assert "quotes" in problems(folder, CHAT_TEMPLATE='"template.jinja"')[0]


@pytest.mark.parametrize(
    "given",
    [
        "it's",
        '"a" and "b"',
        "a{b}c",
        "pa$$word",
        "$1",
        "5$",
        "{a: {b: 1}}",
        "#{x}",
        "a$(b",
        "100%",
        "~/x",
        "<think>",
        "<|im_end|>",
        "<a>",
    ],
)
def test_what_only_looks_a_little_like_it_stays(given: str) -> None:
    assert clean(given) == given


@pytest.mark.parametrize("given", ['"a","b"', "'a' 'b'", "[\"'a'\"]", "a,${X}"])
def test_each_item_of_a_list_is_looked_at(folder: Path, given: str) -> None:
    (problem,) = problems(folder, SERVED_MODEL_NAME=given)
    assert TOLD.search(problem)


@pytest.mark.parametrize("variable", ["MODEL", "MAX_NUM_SEQS", "DTYPE", "PORT", "SUPERVISOR_HOLD_TIMEOUT"])
def test_a_comment_behind_a_value_is_told(folder: Path, variable: str) -> None:
    (problem,) = problems(folder, **{variable: f"{VALUES[variable]}  # as before"})
    assert "docker's --env-file keeps what stands behind a #" in problem


def test_values_of_lists_and_objects_are_cleaned_too() -> None:
    assert clean([" a\n", {"b": "c "}, 7, True]) == ["a", {"b": "c"}, 7, True]
    with pytest.raises(BadValue, match="placeholder"):
        clean(["a", "${X}"])


# What vLLM and the hub's client read themselves


def passed(settings: Settings) -> Callable[[str], str | None]:
    return build(settings, "S", "F").environ.get


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_CPU_KVCACHE_SPACE", "VLLM_ENGINE_READY_TIMEOUT_S", "VLLM_PORT",
        "VLLM_USE_FLASHINFER_SAMPLER", "FLASHINFER_WORKSPACE_BASE", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN",
    ],
)  # fmt: skip
@pytest.mark.parametrize("blank", ["", " ", "\r\n"], ids=repr)
def test_what_is_set_to_nothing_is_not_set(folder: Path, name: str, blank: str) -> None:
    assert passed(read(folder, **{name: blank}))(name) is None


def test_no_gpus_are_no_gpus(folder: Path) -> None:
    assert passed(read(folder, CUDA_VISIBLE_DEVICES=""))("CUDA_VISIBLE_DEVICES") == ""


@pytest.mark.parametrize(
    ("word", "number"),
    [("false", "0"), ("No", "0"), ("off", "0"), ("TRUE", "1"), ("yes\n", "1"), ("0", "0"), ("1", "1")],
)
def test_yes_and_no_are_numbers_where_vllm_wants_numbers(folder: Path, word: str, number: str) -> None:
    assert "VLLM_USE_FLASHINFER_SAMPLER" in CATALOGUE.switches
    assert passed(read(folder, VLLM_USE_FLASHINFER_SAMPLER=word))("VLLM_USE_FLASHINFER_SAMPLER") == number


def test_a_word_that_is_neither_is_told(folder: Path) -> None:
    (problem,) = problems(folder, VLLM_USE_FLASHINFER_SAMPLER="maybe")
    assert problem == (
        "VLLM_USE_FLASHINFER_SAMPLER=maybe (environment VLLM_USE_FLASHINFER_SAMPLER): "
        "expected true or false (or 1, 0, yes, no, on, off)"
    )
    assert passed(read(folder, VLLM_LOGGING_LEVEL="no"))("VLLM_LOGGING_LEVEL") == "no"  # a word to vLLM, too


# The model


@pytest.mark.parametrize(
    "name", ["s3://bucket/model", "gs://bucket/a/b", "az://container/model", "org/model", "m", "a.b-c_d"]
)
def test_names_and_stores_pass(folder: Path, name: str) -> None:
    assert read(folder, MODEL=name).model.value == name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "set MODEL=Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "set MODEL=Qwen/Qwen3-0.6B"),
        ("https://hf.co/Qwen/Qwen3-0.6B/tree/v1.0?x=1", "set MODEL=Qwen/Qwen3-0.6B and REVISION=v1.0"),
        ("huggingface.co/Qwen/Qwen3-0.6B", "set MODEL=Qwen/Qwen3-0.6B"),
        ("hf://Qwen/Qwen3-0.6B", "set MODEL=Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B.git", "set MODEL=Qwen/Qwen3-0.6B"),
        ("org/model@v2", "set MODEL=org/model and REVISION=v2"),
        ("model@refs/pr/3", "set MODEL=model and REVISION=refs/pr/3"),
        ("llama3:8b", "looks like Ollama's"),
        ("library/llama3:latest", "looks like Ollama's"),
        ("https://example.com/model", "s3://bucket/model"),
        ("ftp://a/b", "s3://bucket/model"),
        ("file:///models/a", "set MODEL=/models/a"),
        ("my model", "a folder that is there"),
        ("org//model", "set MODEL=org/model"),
        ("org/model/", "set MODEL=org/model"),
        ("/org/model", "a folder that is there"),
        ("org\\model", "set MODEL=org/model"),
        ("models--org--model", "set MODEL=org/model"),
        ("/no/such/hub/models--org--my-model", "set MODEL=org/my-model"),
        ("hf.co/org/model-GGUF:Q4_K_M", "set MODEL=org/model-GGUF:Q4_K_M"),
        ("https://www.modelscope.cn/models/org/model/summary", "set MODEL=org/model and VLLM_USE_MODELSCOPE=true"),
        ("/no/such/folder/at-all", "a folder that is there"),
        ("org/model:Q4_K_M", "it has no GGUF"),
        ("org/model:UD-IQ2_XXS", "it has no GGUF"),
        ("org/model/file.Q4_K_M.gguf", "it has no GGUF"),
    ],
)
def test_a_model_that_is_none_is_told_with_the_line_to_use_instead(folder: Path, name: str, told: str) -> None:
    (problem,) = problems(folder, MODEL=name)
    assert problem.startswith(f"MODEL={name} (environment MODEL): expected ")
    assert told in problem


def test_a_file_of_gguf_that_is_there(folder: Path) -> None:
    (folder / "a.gguf").write_text("")
    (problem,) = problems(folder, MODEL="./a.gguf")
    assert "vLLM 0.32.0 can read, and it has no GGUF" in problem


def plugin(folder: Path) -> None:
    info = folder.parent / "vllm/lib/python3.12/site-packages/vllm_gguf_plugin-1.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ngguf = a:b\n")


def test_a_plugin_may_know_more_than_vllm(folder: Path) -> None:
    plugin(folder)
    (folder / "a.gguf").write_text("")
    assert read(folder, MODEL="./a.gguf").model.value == "a.gguf"
    assert read(folder, MODEL="org/model:Q4_K_M").model.value == "org/model:Q4_K_M"
    assert read(folder, QUANTIZATION="bitsandbytes").option("quantization") == "bitsandbytes"


def test_a_plugin_on_pythons_path_counts_and_where_vllm_is_not_found_nobody_knows(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    (elsewhere / "vllm_gguf_plugin-1.dist-info").mkdir(parents=True)
    (elsewhere / "vllm_gguf_plugin-1.dist-info" / "entry_points.txt").write_text("[vllm.general_plugins]\ngguf = a:b\n")
    assert read(folder, MODEL="org/model:Q4_K_M", PYTHONPATH=f"/x:{elsewhere}").model.value == "org/model:Q4_K_M"
    assert "it has no GGUF" in problems(folder, MODEL="org/model:Q4_K_M", PYTHONPATH="/x")[0]
    wrapped = f"env {folder.parent / 'vllm/bin/vllm'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("supervisor.vllm.installed._cached_version", lambda command, cache: "0.32.0")
        settings = read(folder, MODEL="org/model:Q4_K_M", SUPERVISOR_VLLM=wrapped, PATH=os.environ["PATH"])
        assert settings.model.value == "org/model:Q4_K_M"


def test_a_folder_with_a_blank_in_its_name(folder: Path) -> None:
    (folder / "my model").mkdir()
    (folder / "my model" / "config.json").write_text("{}")
    assert read(folder, MODEL="my model").model.value == "my model"


def test_a_home_of_nobody_is_told(folder: Path) -> None:
    (problem,) = problems(folder, MODEL="~nobody-of-that-name/model")
    assert "expected a folder that is there" in problem
