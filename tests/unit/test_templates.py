"""The templates of worker-vllm and runpod-LLM run unchanged: each variable is applied, or what became of it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from supervisor.settings.command import build
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather

TEMPLATES: dict[str, Any] = json.loads((Path(__file__).parent / "templates.json").read_text())
VLLM_TEMPLATE, LLM_TEMPLATE = TEMPLATES["worker-vllm template"], TEMPLATES["runpod-LLM template"]
REMOVED = {
    name.removeprefix("--").replace("-", "_").upper() for name in TEMPLATES["worker-vllm knows as removed from vLLM"]
}
NAMES = sorted(
    {
        *VLLM_TEMPLATE,
        *TEMPLATES["worker-vllm documented"],
        *TEMPLATES["worker-vllm no longer reads"],
        *REMOVED,
        *LLM_TEMPLATE,
        *TEMPLATES["runpod-LLM documented"],
    }
)
# A value for variables whose template has none, or one that says nothing.
VALUES = {
    "CUSTOM_CHAT_TEMPLATE": "{{ messages }}",
    "DISABLE_LOG_REQUESTS": "true",
    "LLM_DTYPE": "bfloat16",
    "LLM_TRUST_REMOTE_CODE": "1",
    "LOAD_FORMAT": "safetensors",
    "MAX_CPU_LORAS": "2",
    "MODEL_LOADER_EXTRA_CONFIG": '{"a": 1}',
    "NUM_SPECULATIVE_TOKENS": "5",
    "QUANTIZATION": "awq",
    "REASONING_PARSER": "qwen3",
    "REQUEST_TIMEOUT": "300",
    "SPECULATIVE_CONFIG": '{"method": "ngram"}',
    "SPECULATIVE_METHOD": "ngram",
    "TOKENIZER_NAME": "a/b",
    "TOOL_CALL_PARSER": "hermes",
    "VLLM_CONFIG_FILE": "vllm.yaml",
    "VLLM_EXTRA_ARGS": "--seed 3",
    "VLLM_STARTUP_TIMEOUT": "300",
}
# Not settings of ours or of `vllm serve`: the child gets them as they are.
PASSED_ON = {"HF_TOKEN", "HF_HOME", "PYTORCH_ALLOC_CONF", "VLLM_USE_DEEP_GEMM"}
# They do nothing here, and a line at the start says so, and what to do.
REPORTED = {
    "BASE_PATH", "CUDA_GRAPH_SIZES", "DEFAULT_BATCH_SIZE", "DEFAULT_BATCH_SIZE_GROWTH_FACTOR", "DEFAULT_MIN_BATCH_SIZE",
    "DEVICE", "LLM_ALLOW_ANY", "MAX_CONTEXT_LEN_TO_CAPTURE", "NGRAM_PROMPT_LOOKUP_MAX", "NGRAM_PROMPT_LOOKUP_MIN",
    "RAW_OPENAI_OUTPUT", "SCHEDULER_DELAY_FACTOR", "TRANSFORMERS_VERSION", "VLLM_ATTENTION_BACKEND", "VLLM_PORT",
    "VLLM_VERSION",
    *REMOVED,
} - {"DISABLE_LOG_REQUESTS"}  # fmt: skip  # vLLM has the opposite of it


def read(folder: Path, **environ: str) -> Settings:
    return gather(Arguments(), {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")} | environ)


def sources(settings: Settings) -> set[str]:
    every = [
        settings.model,
        *settings.knob_settings,
        *(setting for _, setting in (*settings.options, *settings.raw_options)),
    ]
    return {setting.source.partition("=")[0] for setting in every}


@pytest.mark.parametrize("name", NAMES)
def test_each_variable_is_applied_or_told_of(folder: Path, name: str) -> None:
    (folder / "vllm.yaml").write_text("seed: 3\n")
    value = VALUES.get(name) or VLLM_TEMPLATE.get(name) or LLM_TEMPLATE.get(name) or "1"
    model = {} if name in ("MODEL_NAME", "LLM_MODEL") else {"MODEL": "m"}
    settings = read(folder, **model, **{name: value})
    told = [warning for warning in settings.warnings if warning.startswith((name, f"environment {name}"))]
    if name in PASSED_ON:
        assert build(settings, "S", "F").environ[name] == value
        assert not told
    elif name in REPORTED:
        assert len(told) == 1
        assert (f"environment {name}" in sources(settings)) == (
            "BATCH" in name
        )  # read, for SUPERVISOR_JOB_OUTPUT=tokens
    else:
        assert f"environment {name}" in sources(settings)
        assert not [line for line in told if not line.startswith("ENABLE_PREFIX_CACHING=false")]


def test_worker_vllms_template_as_the_hub_injects_it(folder: Path) -> None:
    settings = read(folder, **(VLLM_TEMPLATE | {"MODEL_NAME": "org/model"}))
    argv = build(settings, "S", "F").argv[5:]
    assert settings.model.value == "org/model"
    assert settings.knobs.max_concurrency == 30
    assert argv[argv.index("--max-model-len") + 1] == "auto"
    assert "--no-enable-prefix-caching" in argv
    assert "--quantization" not in argv
    assert "--tool-call-parser" not in argv
    told = {warning.split()[0].partition("=")[0] for warning in settings.warnings}
    expected = {name for name in VLLM_TEMPLATE if name in REPORTED and VLLM_TEMPLATE[name]}
    assert told == expected | {"ENABLE_PREFIX_CACHING"}


def test_runpod_llms_template(folder: Path) -> None:
    settings = read(folder, **LLM_TEMPLATE)
    assert settings.model.value == "mistralai/Mistral-7B-Instruct-v0.3"
    assert list(build(settings, "S", "F").argv[5:]) == [
        "--gpu-memory-utilization", "0.9", "--max-model-len", "8192", "--tensor-parallel-size", "1",
    ]  # fmt: skip
    assert settings.warnings == ()


@pytest.mark.parametrize("value", ["true", "1", "yes", "on", "True", "YES"])
def test_booleans_as_worker_vllm_reads_them(folder: Path, value: str) -> None:
    assert "--trust-remote-code" in build(read(folder, MODEL="m", TRUST_REMOTE_CODE=value), "S", "F").argv


def test_a_zero_that_means_unset_says_so(folder: Path) -> None:
    settings = read(folder, MODEL="m", MAX_NUM_BATCHED_TOKENS="0")
    assert settings.options == ()
    (warning,) = settings.warnings
    assert warning.startswith("environment MAX_NUM_BATCHED_TOKENS=0 is taken for not set: ")


@pytest.mark.parametrize("value", ["None", "none", ""])
def test_no_quantization(folder: Path, value: str) -> None:
    assert read(folder, MODEL="m", QUANTIZATION=value).options == ()


@pytest.mark.parametrize(
    ("variable", "old", "today"),
    [
        ("LIMIT_MM_PER_PROMPT", "image=10,video=0", '{"image": 10, "video": 0}'),
        ("LIMIT_MM_PER_PROMPT", "image=1", '{"image": 1}'),
        ("LIMIT_MM_PER_PROMPT", "image: 2, audio: 3", '{"image": 2, "audio": 3}'),
        ("COMPILATION_CONFIG", "3", '{"mode": 3}'),
        ("COMPILATION_CONFIG", '{"level": 3}', '{"mode": 3}'),
        (
            "COMPILATION_CONFIG",
            '{"level": 0, "cudagraph_capture_sizes": [1]}',
            '{"mode": 0, "cudagraph_capture_sizes": [1]}',
        ),
        ("COMPILATION_CONFIG", '{"level": 0, "mode": 3}', '{"mode": 3}'),
        ("LORA_DTYPE", "float32", "auto"),
        ("LOG_LEVEL", "warn", "WARNING"),
        ("UVICORN_LOG_LEVEL", "warn", "warning"),
    ],
)
def test_a_value_as_it_was_written_once(folder: Path, variable: str, old: str, today: str) -> None:
    settings = read(folder, MODEL="m", **{variable: old})
    (setting,) = [setting for _, setting in settings.options if setting.name == variable]
    assert setting.value == today
    assert f"environment {variable}={old} is read as {today}, which is how vLLM has it today" in settings.warnings
    with pytest.raises(SettingsError, match="write '"):
        read(folder, MODEL="m", VLLM_EXTRA_ARGS=f"--{variable.lower().replace('_', '-')} '{old}'")
    settings = read(folder, MODEL="m", **{variable: today})
    assert not [warning for warning in settings.warnings if variable in warning]


@pytest.mark.parametrize("wrong", ["image=ten", "image", "10", "image=1;video=2", "=1"])
def test_what_was_never_a_limit_stays_wrong(folder: Path, wrong: str) -> None:
    with pytest.raises(SettingsError, match="LIMIT_MM_PER_PROMPT"):
        read(folder, MODEL="m", LIMIT_MM_PER_PROMPT=wrong)


def test_the_draft_by_ngrams_was_once_the_name_of_a_model(folder: Path) -> None:
    settings = read(folder, MODEL="m", SPECULATIVE_MODEL="[ngram]", NUM_SPECULATIVE_TOKENS="5")
    values = {setting.name: setting.value for _, setting in settings.options}
    assert values.get("SPEC_METHOD") == "ngram"
    assert "SPEC_MODEL" not in values
    draft = read(folder, MODEL="m", SPECULATIVE_MODEL="org/draft")
    assert {setting.name: setting.value for _, setting in draft.options}["SPEC_MODEL"] == "org/draft"


@pytest.mark.parametrize(
    "name",
    [
        "MIN_BATCH_SIZE", "BATCH_SIZE_GROWTH_FACTOR", "PREEMPTION_CHECK_PERIOD", "PREEMPTION_CPU_CAPACITY",
        "WORKER_CUDA_VERSION", "VLLM_NIGHTLY", "TENSORIZER_URI",
    ],
)  # fmt: skip
def test_what_older_workers_read_beside_their_templates_is_told_of(folder: Path, name: str) -> None:
    assert [warning for warning in read(folder, MODEL="m", **{name: "1"}).warnings if warning.startswith(name)]


def test_a_level_of_compilation_in_the_file(folder: Path) -> None:
    (folder / "config.yaml").write_text("supervisor:\nmodel: m\ncompilation_config:\n  level: 3\n")
    (option,) = [setting for _, setting in read(folder).options if setting.name == "COMPILATION_CONFIG"]
    assert option.value == '{"mode": 3}'
