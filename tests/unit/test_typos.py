"""Which variables are told to be misspelt: those that somebody meant for us, and not other programs'."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisor.settings import typos
from supervisor.settings.aliases import ALIASES, FORMER
from supervisor.settings.catalogue import FLAGS, Catalogue, parse
from supervisor.settings.knobs import KNOBS
from supervisor.settings.removed import REMOVED, REMOVED_ENVIRONMENT

CATALOGUE = parse((FLAGS / "0.32.0.json").read_text())
READ = {option.variable for option in CATALOGUE.by_key.values()} | {knob.variable for knob in KNOBS}
READ |= {name for names in ALIASES.values() for name in names} | {"HF_TOKEN", "MODEL"}
OTHERS = [
    name
    for line in (Path(__file__).parent / "environments.txt").read_text().splitlines()
    if not line.startswith("#")
    for name in line.split()
]


def told(**environ: str) -> list[str]:
    return typos.unread(environ, READ, CATALOGUE)


def test_other_programs_variables_are_none_of_our_business() -> None:
    assert len(OTHERS) > 400
    assert told(**dict.fromkeys(OTHERS, "x")) == []
    assert told(**dict(os.environ)) == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("MAX_MODEL_LENGTH", "MAX_MODEL_LEN"),
        ("MAX_MODLE_LEN", "MAX_MODEL_LEN"),
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
        ("SUPERVISOR_MODEL", "MODEL"),
        ("MODEL_NAMES", "MODEL_NAME"),
        ("MAX_CONCURENCY", "MAX_CONCURRENCY"),
        ("HF_MODEL_ID", "MODEL"),
        ("NUM_SHARD", "TENSOR_PARALLEL_SIZE"),
    ],
)
def test_near_misses_are_told(written: str, meant: str) -> None:
    (line,) = told(**{written: "1"})
    assert line == f"{written} has no effect: nothing reads it; did you mean {meant}?"


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


def test_vllms_own_variables_are_checked_against_those_it_reads() -> None:
    catalogue = Catalogue("0.32.0", CATALOGUE.by_key, frozenset({"VLLM_USE_DEEP_GEMM", "VLLM_LOGGING_LEVEL"}))
    environ = {"VLLM_USE_DEEPGEMM": "1", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_OF_A_PLUGIN": "1"}
    (line,) = typos.unread(environ, READ, catalogue)
    assert "VLLM_USE_DEEPGEMM" in line
    assert "did you mean VLLM_USE_DEEP_GEMM?" in line


def test_each_name_without_effect_says_what_to_do() -> None:
    for table in (FORMER, REMOVED, REMOVED_ENVIRONMENT):
        for name, advice in table.items():
            assert len(advice) > 10, name
    assert not set(FORMER) & READ - {name for names in ALIASES.values() for name in names}
