"""Which variables are told to be misspelt: those that somebody meant for us, and not other programs'."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from supervisor.settings import typos
from supervisor.settings.knobs import KNOBS
from supervisor.settings.names import ALIASES, FOREIGN_NAMES, FORMER, OWNED, REMOVED, REMOVED_VARIABLES
from supervisor.settings.settings import Arguments, Settings, gather
from supervisor.vllm import catalogue as catalogues
from supervisor.vllm.catalogue import FLAGS, Catalogue, Option, parse

CATALOGUE = parse((FLAGS / "0.32.0.json").read_text())
READ = {option.variable for option in CATALOGUE.by_key.values()} | {knob.variable for knob in KNOBS}
READ |= {name for names in ALIASES.values() for name in names} | {"HF_TOKEN", "MODEL", "SUPERVISOR_CONFIG"}
OTHERS = [
    name
    for line in (Path(__file__).parent / "environments.txt").read_text().splitlines()
    if not line.startswith("#")
    for name in line.split()
]


def told(**environ: str) -> list[str]:
    return list(typos.check_unread(environ, READ, CATALOGUE))


def test_other_programs_variables_are_none_of_our_business() -> None:
    assert len(OTHERS) > 400
    assert told(**dict.fromkeys(OTHERS, "x")) == []
    assert told(**dict(os.environ)) == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("MAX_MODEL_LENGTH", "MAX_MODEL_LEN"),
        ("MAX_MODLE_LEN", "MAX_MODEL_LEN"),
        ("MAXMODELLEN", "MAX_MODEL_LEN"),
        ("GPUMEMORYUTILIZATION", "GPU_MEMORY_UTILIZATION"),
        ("SUPERVISOR_APIKEYS", "SUPERVISOR_API_KEYS"),
        ("NO_ENABLE_PREFIX_CACHING", "ENABLE_PREFIX_CACHING=false"),
        ("NO_ENFORCE_EAGER", "ENFORCE_EAGER=false"),
        ("MODEL_LEN", "MAX_MODEL_LEN"),
        ("max_model_len", "MAX_MODEL_LEN"),
        ("MAX-MODEL-LEN", "MAX_MODEL_LEN"),
        ("VLLM_MAX_MODEL_LEN", "MAX_MODEL_LEN"),
        ("LLM_MAX_MODEL_LEN", "MAX_MODEL_LEN"),
        ("SUPERVISOR_MAX_MODEL_LEN", "MAX_MODEL_LEN"),
        ("GPU_MEM_UTILIZATION", "GPU_MEMORY_UTILIZATION"),
        ("GPU_UTILIZATION", "GPU_MEMORY_UTILIZATION"),
        ("TENSOR_PARALLEL", "TENSOR_PARALLEL_SIZE"),
        ("TENSOR_PARALLELSIZE", "TENSOR_PARALLEL_SIZE"),
        ("MAX_SEQS", "MAX_NUM_SEQS"),
        ("QUANTISATION", "QUANTIZATION"),
        ("TOKENISER", "TOKENIZER"),
        ("SERVED_MODEL", "SERVED_MODEL_NAME"),
        ("SERVED_MODEL_NAMES", "SERVED_MODEL_NAME"),
        ("CHAT_TEMPLATE_FILE", "CHAT_TEMPLATE"),
        ("PREFIX_CACHING", "ENABLE_PREFIX_CACHING"),
        ("TRUST_REMOTE", "TRUST_REMOTE_CODE"),
        ("AUTO_TOOL_CHOICE", "ENABLE_AUTO_TOOL_CHOICE"),
        ("TOOL_PARSER", "TOOL_CALL_PARSER"),
        ("SPECULATIVE_CONF", "SPECULATIVE_CONFIG"),
        ("SUPERVISOR_HOLD_TIMOUT", "SUPERVISOR_HOLD_TIMEOUT"),
        ("HOLD_TIMEOUT", "SUPERVISOR_HOLD_TIMEOUT"),
        ("API_KEYS", "SUPERVISOR_API_KEYS"),
        ("SUPERVISOR_PORT", "PORT"),
        ("SUPERVISOR_CONFIG_FILE", "SUPERVISOR_CONFIG"),
        ("SUPERVISOR_CONF", "SUPERVISOR_CONFIG"),
        ("SUPERVISOR_MODEL", "MODEL"),
        ("MODEL_NAMES", "MODEL_NAME"),
        ("MAX_CONCURENCY", "MAX_CONCURRENCY"),
    ],
)
def test_near_misses_are_told(written: str, meant: str) -> None:
    (line,) = told(**{written: "1"})
    assert line == f"{written} has no effect: nothing reads it; did you mean {meant}?"


@pytest.mark.parametrize(
    ("written", "value", "meant"),
    [
        ("NO_ENFORCE_EAGER", "true", "ENFORCE_EAGER=false"),
        ("NO_ENFORCE_EAGER", " 0", "ENFORCE_EAGER=true"),
        ("NO_ENABLE_LORA", "False", "ENABLE_LORA=true"),
        ("NO_DISABLE_LOG_STATS", "yes", "DISABLE_LOG_STATS=false"),
        ("NO_TRUST_REMOTE_CODE", "", None),
        ("NO_LLM_TRUST_REMOTE_CODE", "1", "LLM_TRUST_REMOTE_CODE=false"),
        ("NO_SUPERVISOR_ACCESS_LOG", "1", "SUPERVISOR_ACCESS_LOG=false"),
        ("NO_SUPERVISOR_FAST_RESTART", "no", "SUPERVISOR_FAST_RESTART=true"),
        ("NO_ENABLE_PREFIX_CACHING", "1", "ENABLE_PREFIX_CACHING=false"),
        # What is no yes or no has no opposite.
        *((f"NO_{name}", "1", None) for name in ("MAX_MODEL_LEN", "PORT", "MODEL", "HF_TOKEN", "DTYPE")),
        *((f"NO_{name}", "1", None) for name in ("SUPERVISOR_HOST", "SUPERVISOR_API_KEYS", "SUPERVISOR_CONFIG")),
    ],
)  # fmt: skip
def test_no_before_a_switch_is_its_opposite(written: str, value: str, meant: str | None) -> None:
    expected = [f"{written} has no effect: nothing reads it; did you mean {meant}?"] if meant else []
    assert told(**{written: value}) == expected


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ("NUM_SHARD", "it is TGI's; set TENSOR_PARALLEL_SIZE"),
        ("MAX_TOTAL_TOKENS", "it is TGI's; set MAX_MODEL_LEN"),
        ("MAX_BATCH_PREFILL_TOKENS", "it is TGI's; set MAX_NUM_BATCHED_TOKENS"),
        ("OPTION_TENSOR_PARALLEL_DEGREE", "it is LMI's; set TENSOR_PARALLEL_SIZE"),
        ("OPTION_MAX_MODEL_LEN", "it is LMI's; set MAX_MODEL_LEN"),
        ("OPTION_DTYPE", "it is LMI's; set DTYPE"),
        ("OPTION_ROLLING_BATCH", "it is LMI's; there is nothing to set"),
        ("OLLAMA_CONTEXT_LENGTH", "it is Ollama's; set MAX_MODEL_LEN"),
        ("NUM_CTX", "it is Ollama's; set MAX_MODEL_LEN"),
        ("LLAMA_ARG_CTX_SIZE", "it is llama.cpp's; set MAX_MODEL_LEN"),
        ("N_GPU_LAYERS", "it is llama.cpp's; there is nothing to set"),
        ("MEM_FRACTION_STATIC", "it is SGLang's; set GPU_MEMORY_UTILIZATION"),
        ("CONTEXT_LENGTH", "it is SGLang's; set MAX_MODEL_LEN"),
        ("TP_SIZE", "it is SGLang's; set TENSOR_PARALLEL_SIZE"),
        ("TP", "set TENSOR_PARALLEL_SIZE"),
        ("HF_MODEL_ID", "set MODEL"),
        ("MAX_SEQ_LEN", "set MAX_MODEL_LEN"),
        ("VLLM_ARGS", "set SUPERVISOR_EXTRA_ARGS"),
        ("VLLM_SERVE_ARGS", "set SUPERVISOR_EXTRA_ARGS"),
        ("HUGGINGFACE_HUB_TOKEN", "set HF_TOKEN"),
        ("VLLM_HOST", OWNED["host"]),
        ("VLLM_USER_V1", "vLLM 0.32.0 reads no such variable, unless a plugin does"),
    ],
)
def test_names_of_other_servers_are_told_with_what_to_set_here(written: str, line: str) -> None:
    assert told(**{written: "1"}) == [f"{written} has no effect: {line}"]


def test_all_that_is_to_be_set_instead_is_there() -> None:
    assert {ours for _, ours in FOREIGN_NAMES.values()} - {""} <= READ
    assert not FOREIGN_NAMES.keys() & READ


def test_a_name_of_ours_that_is_like_no_other_is_told_too() -> None:
    (line,) = told(SUPERVISOR_COFFEE="black")
    assert "SUPERVISOR_COFFEE has no effect" in line


def test_kubernetes_makes_variables_for_services_of_any_name() -> None:
    services = {
        "SUPERVISOR_SERVICE_HOST": "10.0.0.1",
        "SUPERVISOR_SERVICE_PORT": "8000",
        "SUPERVISOR_SERVICE_PORT_HTTP": "8000",
        "SUPERVISOR_PORT": "tcp://10.0.0.1:8000",
        "SUPERVISOR_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "SUPERVISOR_PORT_8000_TCP_ADDR": "10.0.0.1",
        "VLLM_SERVICE_HOST": "10.0.0.1",
    }
    assert told(**services) == []


def test_what_supervisord_tells_its_programs_is_not_ours() -> None:
    names = ("ENABLED", "PROCESS_NAME", "GROUP_NAME", "SERVER_URL")
    assert told(**{f"SUPERVISOR_{name}": "x" for name in names}) == []


@pytest.mark.parametrize("empty", ["", " "])
def test_no_plugins_at_all_is_said_by_a_word(folder: Path, empty: str) -> None:
    """To vLLM nothing means none of them, and in compose's `${VLLM_PLUGINS:-}` that nobody set it."""
    settings = gather_with(folder, CATALOGUE, VLLM_PLUGINS=empty)
    assert "VLLM_PLUGINS" not in settings.environ
    (warning,) = settings.warnings
    assert warning == (
        "VLLM_PLUGINS is empty, which is taken for not set, and vLLM loads all plugins: set VLLM_PLUGINS=none for none "
        "of them, or remove it for all"
    )


def test_what_kubernetes_makes_for_a_service_is_no_value(folder: Path) -> None:
    """These services are named master, grpc, and data-parallel-rpc."""
    link = "tcp://10.0.0.1:8000"
    settings = gather_with(folder, CATALOGUE, MASTER_PORT=link, GRPC_PORT=link, DATA_PARALLEL_RPC_PORT=link)
    assert settings.options == ()
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("given", "level"),
    [("warn", "WARNING"), ("Trace", "DEBUG"), ("FATAL", "CRITICAL"), ("info", "INFO"), ("20", None), ("verbose", None)],
)
def test_a_level_that_other_programs_share(folder: Path, given: str, level: str | None) -> None:
    """A ConfigMap may have it for all of its pods."""
    settings = gather_with(folder, CATALOGUE, LOG_LEVEL=given)
    assert settings.option("log_level") == level
    if level is None:
        known = "CRITICAL, ERROR, WARNING, INFO, DEBUG, NOTSET"
        assert settings.warnings == (f"environment LOG_LEVEL={given} is not passed to vLLM: expected one of {known}",)


def test_vllms_own_variables_are_checked_against_those_it_reads() -> None:
    near, unknown = told(VLLM_USE_DEEPGEMM="1", VLLM_LOGGING_LEVEL="INFO", VLLM_OF_A_PLUGIN="1")
    assert "VLLM_USE_DEEPGEMM" in near
    assert "did you mean VLLM_USE_DEEP_GEMM?" in near
    assert unknown == "VLLM_OF_A_PLUGIN has no effect: vLLM 0.32.0 reads no such variable, unless a plugin does"


HISTORY = json.loads((Path(__file__).parent / "vllm_history.json").read_text())


@pytest.mark.parametrize("name", HISTORY["options"])
def test_every_option_that_a_release_since_0_11_had_is_told_of(name: str) -> None:
    variable, last = name[2:].replace("-", "_").upper(), HISTORY["options"][name]
    (line,) = told(**{variable: "1"})
    assert line.startswith(f"{variable} has no effect: ")
    assert f"(vLLM had it until {last})" in line


@pytest.mark.parametrize("name", HISTORY["environment"])
def test_every_variable_that_a_release_since_0_11_read_is_told_of(name: str) -> None:
    (line,) = told(**{name: "1"})
    assert line.startswith(f"{name} has no effect in vLLM 0.32.0: ")
    assert f"(vLLM had it until {HISTORY['environment'][name]})" in line


def test_what_stands_for_them_exists() -> None:
    """Every name in capitals in the advice is an option's variable, or one of vLLM's own."""
    known = READ | CATALOGUE.environment | {"MONOKERNEL", "JSON", "GPU"}  # the first came with 0.33
    for table in (REMOVED, REMOVED_VARIABLES, FORMER):
        for name, advice in table.items():
            assert set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", advice)) - known <= {
                "FLASH_ATTN", "TRTLLM_RAGGED", "VLLM_VERSION", "HF_HOME",
            }, name  # fmt: skip


def test_a_vllm_that_has_the_name_is_given_it(folder: Path) -> None:
    """The table is asked last: vLLM 0.17 still has --swap-space."""
    options = {**CATALOGUE.by_key, "swap_space": Option("--swap-space", "value", "float")}
    catalogue = Catalogue("0.17.1", options, frozenset({"VLLM_USE_V1"}))
    settings = gather_with(folder, catalogue, SWAP_SPACE="4", VLLM_USE_V1="1")
    assert settings.option("swap_space") == "4"
    assert settings.warnings == ()


def gather_with(folder: Path, catalogue: Catalogue, **environ: str) -> Settings:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogues, "load", lambda vllm, cache: catalogue)
        return gather(Arguments(model="m"), {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")} | environ)


def test_each_name_without_effect_says_what_to_do() -> None:
    for table in (FORMER, REMOVED, REMOVED_VARIABLES):
        for name, advice in table.items():
            assert len(advice) > 10, name
    assert not set(FORMER) & READ - {name for names in ALIASES.values() for name in names}
