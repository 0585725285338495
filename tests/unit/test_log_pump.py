"""What is kept of vLLM's log."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from supervisor.engine.diagnosis import diagnose
from supervisor.engine.log_pump import TAIL_LINES, LogBuffer, LogPump
from supervisor.lines import LineStyle
from supervisor.secrets import Mask

CORE = [
    "EngineCore encountered a fatal error.",
    "Traceback (most recent call last):",
    '  File "/venv/vllm/v1/engine/core.py", line 676, in step',
    "    model_output = self.model_executor.sample_tokens(grammar_output)",
    "RuntimeError: Worker failed with error 'CUDA error: an illegal memory access was encountered', please check the "
    "stack trace above for the root cause",
]
ANNOUNCED = [
    "AsyncLLM output_handler failed.",
    "Traceback (most recent call last):",
    '  File "/venv/vllm/v1/engine/async_llm.py", line 849, in output_handler',
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root "
    "cause.",
]
FRAME = [
    '  File "/venv/vllm/entrypoints/openai/chat_completion/serving.py", line 527, in chat_completion_stream_generator',
    "    async for res in result_generator:",
    '  File "/venv/vllm/v1/engine/async_llm.py", line 767, in generate',
    "    out = q.get_nowait() or await q.get()",
    "                            ^^^^^^^^^^^^^",
    '  File "/venv/vllm/v1/engine/output_processor.py", line 92, in get',
    "    raise output",
]


def engine_death(streams: int, core: str, server: str, places: tuple[str, str, str]) -> list[str]:
    """As vLLM writes it: the exception is one, and each stream that raises it adds its own frames to its traceback."""
    found = [f"{core}ERROR 12-01 02:00:34 [{places[0]}] {line}" for line in CORE]
    found += [f"{server}ERROR 12-01 02:00:34 [{places[1]}] {line}" for line in ANNOUNCED]
    for number in range(streams):
        words = ["Error in chat completion stream generator.", ANNOUNCED[1], *FRAME * (number + 1), *ANNOUNCED[2:]]
        found += [f"{server}ERROR 12-01 02:00:34 [{places[2]}] {line}" for line in words]
    return found


@pytest.mark.parametrize(
    ("core", "server", "places"),
    [
        ("(EngineCore pid=9) ", "(APIServer pid=1) ", ("core.py:1512", "async_llm.py:906", "serving.py:929")),
        ("(EngineCore_DP1 pid=9) ", "(ApiServer_3 pid=1) ", ("core.py:1512", "async_llm.py:906", "serving.py:929")),
        ("", "", ("v1/engine/core.py:938", "v1/engine/async_llm.py:543", "entrypoints/openai/serving_chat.py:1130")),
        ("", "", ("core.py:588", "async_llm.py:419", "serving_chat.py:948")),
    ],
)
def test_the_streams_of_an_engine_that_died_do_not_push_the_cause_out(
    core: str, server: str, places: tuple[str, str, str]
) -> None:
    log = engine_death(48, core, server, places)
    assert len(log) > 4 * TAIL_LINES
    lines = LogBuffer()
    for begin in range(0, len(log), 400):  # as they are read
        lines.add(log[begin : begin + 400])
    lines.add([f"{server}INFO:     Shutting down"])
    assert lines.tail[-1].endswith("Shutting down")
    assert len(lines.tail) < 100
    assert "illegal memory access" in diagnose(1, lines.tail).cause
    assert len(lines.take()) == len(log) + 1  # of the log itself nothing is missing


def test_colours_change_nothing() -> None:
    """VLLM_LOGGING_COLOR=1"""
    plain = engine_death(
        8, "(EngineCore pid=9) ", "(APIServer pid=1) ", ("core.py:1512", "async_llm.py:906", "serving.py:9")
    )
    form = re.compile(r"(\(\w+ pid=\d+\)) ERROR (\S+ \S+) (\[\S+\]) ")
    lines = LogBuffer()
    lines.add(
        [
            form.sub("\x1b[0;36m\\1\x1b[0;0m \x1b[31mERROR\x1b[0m \x1b[90m\\2\x1b[0m \x1b[90m\\3\x1b[0m ", line)
            for line in plain
        ]
    )
    assert len(lines.tail) == len(CORE) + len(ANNOUNCED)
    assert "illegal memory access" in diagnose(1, lines.tail).cause


def test_an_error_of_a_request_is_kept_where_the_engine_lives() -> None:
    """Neither a client's own words nor another exception end that."""
    lines = LogBuffer()
    prompt = "(APIServer pid=1) INFO 12-01 02:00:34 [logger.py:43] Received request: prompt: 'EngineDeadError: ', ERROR"
    other = "(APIServer pid=1) ERROR 12-01 02:00:34 [serving.py:929] ValueError: a client's EngineDeadError: none"
    log = [
        prompt,
        other,
        other.replace("929", "930"),
        *[f"(APIServer pid=1) ERROR 12-01 02:00:34 [serving.py:929] {line}" for line in FRAME],
    ]
    lines.add(log)
    assert list(lines.tail) == log


@pytest.mark.parametrize("core", ["", "(EngineCore pid=9) "])
@pytest.mark.parametrize("server", ["", "(APIServer pid=1) "])
def test_answers_after_the_engines_death_do_not_show_that_it_serves(core: str, server: str) -> None:
    """An older vLLM's processes write without their names: then the API server's last lines hid EngineCore's error."""
    log = engine_death(2, core, server, ("core.py:588", "async_llm.py:419", "serving_chat.py:948"))
    log.insert(0, f'{server}INFO:     127.0.0.1:60242 - "POST /v1/chat/completions HTTP/1.1" 200 OK')
    log += [
        f'{server}INFO:     127.0.0.1:60242 - "POST /v1/chat/completions HTTP/1.1" 500 Internal Server Error',
        f'{server}INFO:     127.0.0.1:60242 - "GET /metrics HTTP/1.1" 200 OK',
        f"{server}INFO:     Shutting down",
    ]
    assert "illegal memory access" in diagnose(1, log).cause


def test_the_ranks_that_only_follow_do_not_push_the_cause_out() -> None:
    """Each of eight writes the stack of its native code, twice."""
    lines = LogBuffer()
    words = [*CORE[1:4], "torch.OutOfMemoryError: CUDA out of memory."]
    lines.add([f"(Worker_TP3 pid=13) ERROR 12-01 02:00:34 [multiproc_executor.py:950] {line}" for line in words])
    for rank in range(16):
        lines.add(
            [f"[rank{rank % 8}]:[E1201 02:00:35 ProcessGroupNCCL.cpp:1823] Process group watchdog thread terminated"]
        )
        lines.add(
            [f"frame #{number}: <unknown function> + 0xd6df4 (0x7f (in /venv/libtorch_cuda.so)" for number in range(45)]
        )
    assert "memory" in diagnose(-6, lines.tail).cause


class Collected:
    """An output that keeps what it is given."""

    descriptor = 1

    def __init__(self) -> None:
        self.data = b""

    def put(self, data: bytes, lines: int) -> None:
        self.data += data


def pumped(data: bytes, **environ: str) -> bytes:
    reader, writer = os.pipe()
    output: Any = Collected()
    source = open(reader, "rb", buffering=0)  # noqa: SIM115  # the pump closes it
    pump = LogPump(source, output, LogBuffer(), LineStyle(mask=Mask(environ)))
    with open(writer, "wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
    pump.thread.join(10)
    return bytes(output.data)


@pytest.mark.parametrize("token", ["hf_" + "Q7wErTy9" * 4, "Q7wErTy9/abcd+Q7wErTy9==", "Q7wErTy9-gräßlich-Q7wErTy9"])
@pytest.mark.parametrize("before", [b"x" * 131_056 + b" ", b"x " * 65_528, b"word " * 26_211])
def test_a_secret_at_the_seam_of_a_long_line_is_masked(before: bytes, token: str) -> None:
    found = pumped(before + token.encode() + b" behind\n", HF_TOKEN=token)
    assert b"Q7wErTy9" not in found
    assert found.endswith(b"**** behind\n")
    assert len(found) < len(before) + 100


def test_a_long_line_without_a_blank_is_cut_all_the_same() -> None:
    assert pumped(b"x" * 500_000 + b"\n").replace(b"\n", b"") == b"x" * 500_000


def test_a_secret_of_other_letters_is_masked() -> None:
    assert pumped("a gehéim-pässwort b\n".encode(), S3_PASSWORD="gehéim-pässwort") == b"a **** b\n"
