"""Tells what an error is about: its words, or its place -> the part of vLLM, and the settings that govern it.

It is for errors that no row of `causes.toml` knows by themselves, but a row for a kind of error does. `[[topic]]` there
is the table of the parts; `find_named` finds the settings that an error names itself. It is pure.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from supervisor.engine.tracebacks import Failure
from supervisor.settings.names import REMOVED

TABLE = tomllib.loads(Path(__file__).with_name("causes.toml").read_text(encoding="utf-8"))
GAP = re.compile(r" \( ?\)| (?=[,.:](?: |$)| )")  # what is left where a group matched nothing
LEADING_ELSE = re.compile(r"^Else (\w)")  # where nothing stands before it
WORD_BOUNDARY = re.compile(r"-|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # max-num-seqs, KVTransferConfig
# Only this many innermost frames say what it is about: every traceback of vLLM's comes through its worker in the end.
MAX_FRAMES = 9
LONGEST_ERROR = 2000
LONGEST_LOG = 100_000
FRAME = re.compile(r'(?m:^) *File "([^"\n]{1,400})"(?:, line \d+)?(?:, in ([^\n]{1,100}))?')
# These frames are around every call, whatever it is about.
WRAPPER = re.compile(
    r"vllm/tracing/\w+\.py:\w*wrapper|compilation/decorators\.py:__init__|/offloader/\w+\.py:wrap_modules|:decorate_context$"
    r"|compilation/(?:decorators|wrapper|cuda_graph|piecewise_backend)\.py:__call__|eval_frame\.py:|fx/graph_module\.py:"
    r"|model_loader/\w+\.py:(?:(?:load|create|get|initialize)_model)$"
    r"|modules/module\.py:_\w*call_impl|:run_method$|:collective_rpc$|models/utils\.py:(?:make_layers|<genexpr>)"
)
# This is `--max-num-seqs`, or a variable that is no option of vLLM's. A library's errors, constants and backends
# (TRITON_MLA) look like those, and what is said of pip and docker has options too.
SETTING_NAME = re.compile(
    r"(?<![\w./-])(?:--(?!(?:upgrade|user|pre|no-deps|force-reinstall|gpus|ipc|shm-size|device|privileged)(?![\w-]))"
    r"[a-z][a-z\d-]{2,50}|(?:VLLM|HF|NCCL|CUDA|HIP|HSA|ROCR|RAY|TRITON|TORCH|TORCHINDUCTOR|PYTORCH|UCX|GLOO|FLASHINFER|LMCACHE|MOONCAKE|NVSHMEM|"
    r"DG|OMP|CCL|ZE|XLA|TPU|ASCEND)_(?!ERROR|STATUS|VERSION|ABI_|SUCCESS|CHECK|M[LS]A(?!_DIS)|ATTN|SDPA|TRTLLM|CUT|CUDNN|B12X|MXFP8\b|UNFUSED)[A-Z\d_]{2,60})\b"
)
# torch's name of an operation of vLLM's is made of words.
OPERATION = re.compile(
    r"'_OpNamespace' '(\w{1,40})' object has no attribute '(\w{1,100})'|'(_\w{0,40}C\w{0,40})::(\w{1,100})'"
)
# An object that lacks something is no setting, even if it is called CompilationConfig.
OWNER = re.compile(r"'\w{1,60}' object has no")
# The error is not about the wrong arguments that something is called with.
ARGUMENT = re.compile(r"arguments?:? '[^\n]{1,200}")
# A name of Python's counts as a whole, for block_size_m is not BLOCK_SIZE.
PYTHON_NAME = re.compile(r"(?<![A-Za-z])[A-Za-z]+\d*(?:_[A-Za-z\d]+)+")
PATH = re.compile(r"/\S{1,300}")
# This is an option that is set, in what vLLM shows of its settings: `'cpu_offload_gb': 4` of those that are not the
# default, and `speculative_config=SpeculativeConfig(` of all of them.
SETTING = re.compile(r"'([a-z]\w{1,60})': (?!None|False|'auto'|'')|\b([a-z]\w{1,60})=(?!None|False|auto|'auto'|''|0)")
# Of all settings that are shown, nobody has these without asking for them, or the model does (kv_cache_dtype).
OPT_INS = {"speculative_config", "kv_cache_dtype", "kv_transfer_config", "enable_expert_parallel", "cpu_offload_gb"}
OPTIONAL_PART = re.compile(r"Leave|Unset|Set ")  # a part that can be left out has a remedy that begins so
# These packages around vLLM are made for one version of it, or of torch, as a frame's path has them.
PACKAGE = re.compile(
    r"(?:(?:site|dist)-packages|venv|vllm-workspace/[\w-]{1,40})/(vllm_\w+|lmcache\w*|nixl\w*|mooncake\w*|deep_ep|deep_gemm|flashinfer|flash_attn\w*|aiter|"
    r"xformers|bitsandbytes|torchao|compressed_tensors|gptqmodel|auto_gptq|awq|quark|modelopt|mistral_common|transformers|"
    r"xgrammar|outlines\w*|llguidance|tilelang|fla|mamba_ssm|causal_conv1d|torch_npu|tpu_inference|torch_xla|optimum\w*|"
    r"intel_extension_for_pytorch|habana_frameworks|ray|runai_model_streamer|fastsafetensors|open_clip|timm|mori)/"
)
# These settings are of several machines: the supervisor's own, and vLLM's.
SEVERAL_MACHINES = re.compile(
    r"(?i:\bnnodes\W{1,4}(?:[2-9]|1\d)|\bnode_rank\W{1,4}[1-9]|'headless': True|in run_headless"
    r"|\b(?:master_addr|data_parallel_address|data_parallel_rpc_ip)\W{1,4}(?!127\.|localhost|None|::1)\w)"
)
ONE_MACHINE = re.compile(r"(?:tcp://|\(|\[)(?:127\.0\.0\.1|localhost)\b|engine/multiprocessing/")


@dataclass(frozen=True, kw_only=True)
class Topic:
    """A row of the table. `words` are looked for in the last error, `path` in the innermost frames as
    `path:function`. `weak`: words that are said of much else too and prove nothing; `general`: a path that all sorts of
    errors come through. `part` begins a sentence, `remedy` is one or two, with three ways at most. `suspects`: settings
    to leave out where the log shows that they are set. `compiles`: its kernels are compiled at the start. `example`: an
    error, or a frame's line."""

    words: str = "(?!)"
    weak: str = "(?!)"
    path: str = "(?!)"
    part: str
    remedy: str
    suspects: list[str] = field(default_factory=list)
    compiles: bool = False
    general: bool = False
    example: str

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
        return re.compile(self.words), re.compile(self.path), re.compile(self.weak)

    def is_proven(self, error: str, places: str) -> bool:
        return bool(self.patterns[0].search(error) or self.patterns[1].search(places))


TOPICS = tuple(Topic(**row) for row in TABLE["topic"])
OPTIONS: list[str] = TABLE["options"]
REMEDIES: dict[str, str] = TABLE["remedies"]


def variable(name: str) -> str:
    """Returns the variable of an option, or of a configuration's class."""
    return WORD_BOUNDARY.sub("_", name).upper()


def fill_in(text: str, groups: dict[str, str]) -> str:
    """Returns the text with what was found put in, and without the gaps where nothing was."""
    return LEADING_ELSE.sub(lambda first: first[1].upper(), GAP.sub("", text.format_map(groups)).strip())


def placeholders(failure: Failure) -> dict[str, str]:
    """Returns what a row for a kind of error may name: the header of `causes.toml` explains each."""
    topic, names, suspects = find_topic(failure), ", ".join(find_named(failure)[:3]), ", ".join(find_used(failure)[:3])
    places, log = _places(failure), f"{failure.settings[-LONGEST_LOG:]}\n{failure.whole[-LONGEST_LOG:]}"
    is_proven = topic.is_proven(_words(failure), places)
    governs = topic.remedy if is_proven else f"Where it is about {_lower(topic.part)}: {_lower(topic.remedy)}"
    elsewhere = "" if topic is TOPICS[-1] else governs
    package = next((found[1] for place in reversed(places.split("\n")) if (found := PACKAGE.search(place))), "")
    # This tells whether the ranks are on several machines, where the log shows it.
    ranks = "other_ranks" if SEVERAL_MACHINES.search(log) else "own_ranks" if ONE_MACHINE.search(log) else "any_ranks"
    return {
        "part": topic.part if is_proven else TOPICS[-1].part,
        "at": f"({topic.part})" if elsewhere and is_proven else "",
        "governs": governs,
        "elsewhere": elsewhere,
        "otherwise": "" if names else elsewhere,
        "by_name": elsewhere if OPTIONAL_PART.match(elsewhere) and topic.patterns[0].search(_words(failure)) else "",
        "in_use": f"The log shows {suspects} set: leave that out first." if suspects else "",
        "named": f"Look at {names} first: set it otherwise, or unset it." if names else "",
        "fit": REMEDIES["fit"].format(package=package.replace("_", "-")) if package else "",
        "without": topic.remedy if topic.compiles else REMEDIES["kernels"],
        "instead": _find_replacements(_words(failure)),
        "ranks": REMEDIES[ranks],
    }


def _lower(text: str) -> str:
    """Returns a sentence as it stands within another one."""
    return text[0].lower() + text[1:] if text[1:2].islower() else text


def find_used(failure: Failure) -> list[str]:
    """Returns the settings that can be why: those that the log tells as not the default, where it does."""
    topic, shown = find_topic(failure), failure.settings[-LONGEST_LOG:]
    opt_ins = set() if "non-default args" in shown else OPT_INS
    found = {plain or (every if every in opt_ins else "") for plain, every in SETTING.findall(shown)}
    return [name for name in topic.suspects if name.lower() in found]


def find_topic(failure: Failure) -> Topic:
    """Returns the first that fits; the last of all fits any. Weak words give way to a place, or another's words."""
    error, places = _words(failure), _places(failure)
    first = next(t for t in TOPICS if t.is_proven(error, places) or t.patterns[2].search(error))
    others = (t for t in TOPICS[:-1] if t.is_proven(error, "" if t.general else places))
    return first if first.is_proven(error, places) else next(others, first)


def find_named(failure: Failure) -> list[str]:
    """Returns the variables of settings that the error names: by option, by variable, or in words (chunked prefill)."""
    error = OWNER.sub("", _words(failure))
    found = [name.lstrip("-").upper().replace("-", "_").removeprefix("NO_") for name in SETTING_NAME.findall(error)]
    plain = PATH.sub("", error)
    names = {name.upper() for name in PYTHON_NAME.findall(plain)}
    words = re.sub(r"[\s-]|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", PYTHON_NAME.sub("|", plain)).upper()
    found += [option for option in OPTIONS if _core(option) in words or names & {option, _core(option)}]
    return list(dict.fromkeys(found))


def _places(failure: Failure) -> str:
    """Returns the innermost frames, as `path:function`, a line each."""
    frames = [f"{path}:{function}" for path, function in FRAME.findall(failure.raised)]
    return "\n".join([frame for frame in frames if frame is frames[-1] or not WRAPPER.search(frame)][-MAX_FRAMES:])


def _find_replacements(text: str) -> str:
    """Returns what to set instead of the options of older vLLMs that the text names."""
    names = dict.fromkeys(re.findall(r"--([a-z][a-z\d_-]{1,60})", text))
    replacements = ((name, REMOVED.get(name.replace("-", "_"))) for name in names)
    return " ".join(f"Instead of --{name}: {advice}." for name, advice in replacements if advice)


def _words(failure: Failure) -> str:
    """Returns the error's words, and its line's: of a refused setting only that names the part of the configuration."""
    error = f"{failure.error or ''}"[:LONGEST_ERROR]
    error = OPERATION.sub(lambda op: f"{op[0]} {' '.join(filter(None, op.groups())).replace('_', ' ')}", error)
    return ARGUMENT.sub("", f"{error}\n{failure.raised.rpartition(chr(10))[2][:LONGEST_ERROR]}")


def _core(option: str) -> str:
    """Returns what errors say for an option: ENABLE_CHUNKED_PREFILL is `chunked prefill`."""
    core = re.sub(r"^(?:ENABLE|DISABLE)_|_(?:SIZE|CONFIG)$", "", option)
    return core if "_" in core else option
