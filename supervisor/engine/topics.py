"""What an error is about: its words, or where it was raised -> the part of vLLM, and the settings that govern it.

For errors that no row of `causes.toml` knows by themselves, but a kind of error does. `[[topic]]` there is the table of
the parts; `named` finds the settings that an error names itself. Pure.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from supervisor.engine.tracebacks import Failure

TABLE = tomllib.loads(Path(__file__).with_name("causes.toml").read_text(encoding="utf-8"))
# How far out a frame still says what it is about: every traceback of vLLM's comes through its worker in the end.
NEAR = 9
LONGEST_ERROR = 2000
LONGEST_LOG = 100_000
FRAME = re.compile(r' +File "([^"\n]{1,400})", line \d+, in ([^\n]{1,100})')
# `--max-num-seqs`, or a variable that is no option of vLLM's; a library's errors and constants look like those.
NAME = re.compile(
    r"(?<![\w./-])(?:--[a-z][a-z\d-]{2,50}|(?:VLLM|HF|NCCL|CUDA|HIP|HSA|ROCR|RAY|TRITON|TORCH|TORCHINDUCTOR|PYTORCH|UCX|GLOO|"
    r"FLASHINFER|LMCACHE|MOONCAKE|NVSHMEM|DG|OMP|CCL|ZE|XLA|TPU|ASCEND)_(?!ERROR|STATUS|VERSION|SUCCESS|CHECK)[A-Z\d_]{2,60})\b"
)
PATH = re.compile(r"/\S{1,300}")
# What a dying engine says of its settings ("Dumping input data for V1 LLM engine (v0.11.0) with config: ..."), where
# they can be left out.
IN_USE = re.compile(r"\b(speculative_config|kv_cache_dtype|quantization|kv_transfer_config)=(?!None|auto|'auto'|')\w")


@dataclass(frozen=True, kw_only=True)
class Topic:
    """A row of the table. `words` are looked for in the last error, `path` in the innermost frames as `path:function`;
    `part` begins a sentence, `remedy` is one or two. `example`: an error, or a frame's line."""

    words: str = "(?!)"
    path: str = "(?!)"
    part: str
    remedy: str
    example: str

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        return re.compile(self.words), re.compile(self.path)


TOPICS = tuple(Topic(**row) for row in TABLE["topic"])
OPTIONS: list[str] = TABLE["options"]


def told(failure: Failure) -> dict[str, str]:
    """What a row for a kind of error may say: the header of `causes.toml` has them."""
    topic, names = about(failure), ", ".join(named(failure)[:4])
    elsewhere = "" if topic is TOPICS[-1] else topic.remedy
    in_use = ", ".join(dict.fromkeys(name.upper() for name in IN_USE.findall(failure.whole[-LONGEST_LOG:])))
    return {
        "part": topic.part,
        "at": f"({topic.part})" if elsewhere else "",
        "governs": topic.remedy,
        "elsewhere": elsewhere,
        "otherwise": "" if names else elsewhere,
        "in_use": f"The log shows {in_use} in use: leave that out first." if in_use else "",
        "named": f"Look at {names} first: change or unset it." if names else "",
    }


def about(failure: Failure) -> Topic:
    """The first that fits; the last of the table fits all."""
    error = _words(failure)
    frames = FRAME.findall(failure.raised)[-NEAR:]
    places = "\n".join(f"{path}:{function}" for path, function in frames)
    return next(t for t in TOPICS if t.patterns[0].search(error) or t.patterns[1].search(places))


def named(failure: Failure) -> list[str]:
    """The settings that the error names, as variables: as an option, as a variable, or in words (chunked prefill)."""
    error = _words(failure)
    found = [name.lstrip("-").upper().replace("-", "_") for name in NAME.findall(error)]
    words = re.sub(r"[\s-]|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", PATH.sub("", error)).upper()
    found += [option for option in OPTIONS if _core(option) in words]
    return list(dict.fromkeys(found))


def _words(failure: Failure) -> str:
    """The error's, and those of its own line: of a refused setting only that names the part of vLLM's configuration."""
    return f"{failure.error or ''}"[:LONGEST_ERROR] + "\n" + failure.raised.rpartition("\n")[2][:LONGEST_ERROR]


def _core(option: str) -> str:
    """What is said of it: ENABLE_CHUNKED_PREFILL is `chunked prefill`."""
    core = re.sub(r"^(?:ENABLE|DISABLE)_|_(?:SIZE|CONFIG)$", "", option)
    return core if "_" in core else option
