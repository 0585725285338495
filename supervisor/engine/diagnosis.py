"""Why the engine ended: exit code and log tail -> cause and remedy, by an ordered table.

Each rule's pattern is looked for in the last lines of vLLM's log; the first rule that matches speaks. The lines that
the patterns were written for lie in `tests/unit/failures/`, as vLLM wrote them. A cause that is permanent makes a start
that never succeeded not worth repeating.
"""
# ruff: noqa: E501  # a pattern in two pieces is hard to compare with the line that it is for

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass

ERROR_LINE = re.compile(r"\b\w*(Error|Exception)(_\w+)?: |\berror: ")
# What vLLM puts before each of its lines: "(APIServer pid=12) ERROR 11-21 19:00:00 [core.py:1] ".
LINE_PREFIX = re.compile(r"^(\([^)]*pid=\d+\) )*([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (\[[^\]]*\] ?)?)?")
# Levels below ERROR, vLLM's and torch's: such a line may name an exception that was dealt with.
HARMLESS = re.compile(r"^(\([^)]*pid=\d+\) )*(DEBUG|INFO|WARNING)\b|^\[?[IW]\d{4} ")
# What a part of vLLM says when another one has ended: never the root.
FOLLOW_UP = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|EngineCore encountered an issue|EngineDeadError|"
    r"Engine core proc \S+ died|cancelled$|RuntimeError: Executor failed"
)
# What the API server says on SIGTERM; the errors after it are those of things being taken away.
TOLD_TO_STOP = re.compile(r"\[shutdown\] API server: shutdown triggered")


# Nodes of a cluster come minutes apart: waiting for them is no mistake.
OTHER_RANKS = (
    "Start the other machines with the same MASTER_ADDR and MASTER_PORT (NODE_RANK 0, 1, ...), and open all ports between "
    "them; it is tried again."
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What happened, and what to change. `permanent`: the same settings will end the same way."""

    cause: str
    remedy: str
    permanent: bool

    @property
    def text(self) -> str:
        return f"{self.cause} {self.remedy}".strip()


@dataclass(frozen=True, slots=True)
class Rule:
    """`cause` and `remedy` may name the pattern's groups, `{option}`, and as an environment variable, `{OPTION}`."""

    pattern: re.Pattern[str]
    cause: str
    remedy: str
    permanent: bool = True


def _rule(pattern: str, cause: str, remedy: str, *, permanent: bool = True) -> Rule:
    return Rule(re.compile(pattern, re.I | re.S), cause, remedy, permanent)


# In this order: the specific before the general, the root before what follows from it.
RULES = (
    # The download's own words (weights/download.py).
    _rule(r"(?:^|\n)weights: cannot be had: (?P<what>[^|\n]+) \| (?P<then>[^\n]+)", "{what}.", "{then}."),
    _rule(
        r"(?:^|\n)weights: cannot be had now: (?P<what>[^|\n]+) \| (?P<then>[^\n]+)",
        "{what}.",
        "{then}.",
        permanent=False,
    ),
    _rule(
        r"unrecognized arguments: (?P<what>[^\n]+)",
        "vLLM does not know the option {what}.",
        "Take it out of SUPERVISOR_EXTRA_ARGS or of what follows `--`; `vllm serve --help` lists what there is.",
    ),
    _rule(
        r"error: argument (?:-\w+/)?--(?P<option>[\w-]+)[^\s:]*: Value (?P<value>[^\n]*) cannot be converted to <function loads",
        "The value of --{option} is no JSON: {value}.",
        "Correct {OPTION}; `supervisor explain` shows where it came from.",
    ),
    _rule(
        r"error: argument (?:-\w+/)?--(?P<option>[\w-]+)[^\s:]*: (?P<why>[^\n]+)",
        "vLLM does not take the value of --{option}: {why}.",
        "Correct {OPTION}; `supervisor explain` shows where it came from.",
    ),
    # Several machines (docs/scale.md).
    _rule(
        r"DistStoreError: Timed out after (?P<what>\d+) seconds waiting for clients\. (?P<count>\d+/\d+) clients joined",
        "Only {count} ranks came within {what} s.",
        OTHER_RANKS,
        permanent=False,
    ),
    _rule(
        r"DistNetworkError: [^\n]*?(?:trying to connect to|any network address of) \((?P<what>[^,)\n]+), (?P<port>\d+)",
        "Rank 0 does not answer at {what}, port {port}.",
        "Check that it runs, and MASTER_ADDR and MASTER_PORT; it is tried again.",
        permanent=False,
    ),
    _rule(
        r"Did not receive response from front-end process",
        "Rank 0 does not answer.",
        "Check that it runs, and DATA_PARALLEL_ADDRESS and DATA_PARALLEL_RPC_PORT; it is tried again.",
        permanent=False,
    ),
    _rule(
        r"Gloo connectFullMesh failed[^\n]*remote=\[(?P<what>127\.[^\]\n]+)\]",
        "The ranks can't reach each other: one of them gives its loopback address, {what}.",
        "Set VLLM_HOST_IP, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on each machine to its address and network.",
    ),
    _rule(
        r"Gloo connectFullMesh failed[^\n]*remote=\[(?P<what>[^\]\n]+)\]",
        "The rank at {what} does not answer.",
        "Open all ports between the machines; it is tried again.",
        permanent=False,
    ),
    _rule(
        r"Not enough allowed NUMA nodes to bind threads",
        "This machine has fewer NUMA nodes than workers.",
        "On a CPU set VLLM_CPU_OMP_THREADS_BIND=nobind.",
    ),
    _rule(
        r"max(?:imum)? seq(?:uence)? len(?:gth)? \((?P<asked>\d+)\).{0,400}estimated maximum model length is (?P<fits>\d+)",
        "The KV cache has room for {fits} tokens, and the model's length is {asked}.",
        "Set MAX_MODEL_LEN={fits} or less, or give it more memory (GPU_MEMORY_UTILIZATION; on a CPU VLLM_CPU_KVCACHE_SPACE).",
    ),
    _rule(
        r"max(?:imum)? seq(?:uence)? len(?:gth)? \((?P<asked>\d+)\).{0,300}KV cache",
        "The KV cache has no room for one request of {asked} tokens.",
        "Lower MAX_MODEL_LEN, or give it more memory (GPU_MEMORY_UTILIZATION; on a CPU VLLM_CPU_KVCACHE_SPACE).",
    ),
    _rule(
        r"No common block size for (?P<asked>\d+) \((?P<why>[^\n]{1,200}?)\)\.",
        "The attention on this machine has no blocks of {asked} tokens ({why}).",
        "Leave BLOCK_SIZE unset: vLLM then takes one that fits.",
    ),
    _rule(
        r"No available memory for the cache blocks|less than requested memory for kv \(-",
        "There is no memory left for the KV cache beside the weights.",
        "Raise GPU_MEMORY_UTILIZATION (or KV_CACHE_MEMORY_BYTES, if set), use a smaller or quantized model, or spread it "
        "with TENSOR_PARALLEL_SIZE.",
    ),
    _rule(
        r"Available memory on node \d+ \((?P<free>[\d.]+)/[^)]+\) on kv cache allocation is less than requested [^(\n]*\((?P<asked>[\d.]+)",
        "The KV cache is to have {asked} GiB, and the machine has {free} GiB to spare.",
        "Lower VLLM_CPU_KVCACHE_SPACE or KV_CACHE_MEMORY_BYTES.",
    ),
    _rule(
        r"Free memory on device [^\n]{1,200} is less than",
        "Something else holds the GPU's memory.",
        "Free it (`nvidia-smi` shows who), or lower GPU_MEMORY_UTILIZATION.",
        permanent=False,
    ),
    _rule(
        r"out of memory occurred when warming up sampler with (?P<what>\d+)",
        "The GPU's memory was not enough for {what} sequences at once.",
        "Lower MAX_NUM_SEQS or GPU_MEMORY_UTILIZATION.",
    ),
    _rule(
        r"CUDA out of memory|torch\.OutOfMemoryError|HIP out of memory",
        "The GPU's memory was not enough.",
        "Lower MAX_MODEL_LEN, MAX_NUM_SEQS or GPU_MEMORY_UTILIZATION, quantize the model, or use more GPUs "
        "(TENSOR_PARALLEL_SIZE).",
    ),
    _rule(
        r"in parse_safetensors_file_metadata\n|validation errors? for VllmConfig\n  Value error, [^\n]{1,80}\(char \d+\)|"
        r"SafetensorError|Error while deserializing header|UnpicklingError|PytorchStreamReader failed",
        "A file of the weights is damaged, or only a Git LFS pointer to one.",
        "Delete it and let it be downloaded again (MODEL; a clone needs `git lfs pull`).",
    ),
    _rule(
        r"MemoryError|Cannot allocate memory|DefaultCPUAllocator: (?:can't|not enough)|std::bad_alloc",
        "The machine's memory was not enough.",
        "Give the container more memory, or lower MAX_MODEL_LEN and, on a CPU, VLLM_CPU_KVCACHE_SPACE.",
    ),
    _rule(
        r"Resource temporarily unavailable \(src/|what\(\): +Resource temporarily unavailable|can't start new thread",
        "There is no memory left for another thread, or the container may have no more of them.",
        "Give the container more memory, and more processes (`docker run --pids-limit`).",
    ),
    _rule(
        r"Insufficient space in /dev/shm for shared-memory allocation: (?P<what>\d+ MiB) required, (?P<free>\d+ MiB) free",
        "The shared memory (/dev/shm) is too small: vLLM needs {what} of it, and {free} are free.",
        "Start the container with --ipc=host or --shm-size=8g.",
    ),
    _rule(
        r"No space left on device: '/psm_|creating shared memory segment|unable to (?:open|allocate|write to) shared memory|Bus error|"
        r"insufficient shared memory",
        "The shared memory (/dev/shm) is full.",
        "Start the container with --ipc=host or --shm-size=8g.",
    ),
    _rule(
        r"file size is: (?P<size>[\d.]+ \w+)\. The target location (?P<what>\S+) only has (?P<free>[\d.]+ \w+) free.{0,20000}?No space left on device",
        "The disk is full: {free} are free at {what}, and a file of {size} was to be downloaded.",
        "Mount a larger volume and point HF_HOME at it, or free space.",
    ),
    _rule(
        r"No space left on device|Disk quota exceeded",
        "The disk is full.",
        "Mount a larger volume and point HF_HOME at it, or free space.",
    ),
    _rule(
        r"(?:Read-only file system|Permission denied): '(?P<what>[^'\n]+)'",
        "vLLM may not write to {what}, or not read it.",
        "Mount it writable for the container's user, or point HF_HOME at a folder that is.",
    ),
    _rule(
        r"Invalid credentials in Authorization header|Invalid user token",
        "The hub does not know the token in HF_TOKEN.",
        "Set HF_TOKEN to a valid one, or unset it.",
    ),
    _rule(
        r"GatedRepoError: 401|401 Client Error\.\s+Cannot access gated repo",
        "The model's repository is gated, and no token was given.",
        "Accept its terms on the hub, and set HF_TOKEN to a token of that account.",
    ),
    _rule(
        r"GatedRepoError|Cannot access gated repo|Access to model \S+ is restricted|403 Client Error|403 Forbidden",
        "The model's repository is gated, and HF_TOKEN gives no access to it.",
        "Accept its terms on the hub with that token's account, or set HF_TOKEN to another's.",
    ),
    _rule(
        r"Repository Not Found for url: \w+://[^/\s]+/(?:api/models/)?(?P<what>[\w.-]+/[\w.-]+)",
        "There is no model {what} on the hub, or it is private.",
        "Check the spelling of MODEL (or TOKENIZER); for a private one set HF_TOKEN to a token that may read it.",
    ),
    _rule(
        r"Revision Not Found for url: \w+://[^/\s]+/(?:api/models/)?(?P<model>[\w.-]+/[\w.-]+)/\w+/(?P<what>[^/\s]+)",
        "{model} has no revision {what}.",
        "Check REVISION.",
    ),
    _rule(
        r"outgoing traffic has been disabled|HF_HUB_OFFLINE|offline mode is enabled",
        "The model is not in the cache, and downloads are switched off.",
        "Unset HF_HUB_OFFLINE, or put the model into the cache (HF_HOME).",
    ),
    _rule(
        r"429 Too Many Requests|429 Client Error",
        "The hub turned us away: too many requests (429).",
        "Set HF_TOKEN: with an account the limits are higher. It is tried again.",
        permanent=False,
    ),
    _rule(
        r"Server error '(?P<what>5\d\d [^'\n]+)'|(?P<older>5\d\d) Server Error",
        "The hub is out of order: it answers {what}{older}.",
        "It is tried again; check HF_ENDPOINT, if set.",
        permanent=False,
    ),
    _rule(
        r"Connect(?:ion)?Error: (?:\[[^\]\n]*\] )?(?P<what>[^\n]+)\n.{0,6000}?(?:We couldn't connect to|LocalEntryNotFoundError)",
        "The hub could not be reached: {what}.",
        "Check the network and, if set, HF_ENDPOINT; it is tried again.",
        permanent=False,
    ),
    _rule(
        r"peer closed connection without sending complete message body|IncompleteRead",
        "The connection to the hub broke off, again and again.",
        "Check the network and, if set, HF_ENDPOINT; it is tried again.",
        permanent=False,
    ),
    _rule(
        r"LocalEntryNotFoundError|We couldn't connect to|Max retries exceeded|ConnectTimeout|ReadTimeout",
        "The hub could not be reached.",
        "Check the network and, if set, HF_ENDPOINT; it is tried again.",
        permanent=False,
    ),
    _rule(
        r"Model architectures? \[?(?P<what>[^\]\n]+?)\]? (?:are|is) not supported",
        "This vLLM does not support the architecture {what}.",
        "Use a newer image, or set MODEL to another model.",
    ),
    _rule(
        r"model type `(?P<what>[^`\n]+)` but Transformers does not recognize",
        "This vLLM does not know the model type {what}.",
        "Use a newer image, or set MODEL to another model.",
    ),
    _rule(
        r"Unrecognized model in|Should have a `model_type` key",
        "The model's config.json does not say what type of model it is.",
        "Check that MODEL names the folder of a whole model.",
    ),
    _rule(
        r"Unknown quantization method: (?P<what>[\w.-]+)",
        "This vLLM does not know the quantization {what}.",
        "Use a newer image, or set MODEL to another model (and check QUANTIZATION, if set).",
    ),
    _rule(
        r"contains custom code which must be executed|requires you to execute the \w+ file",
        "The model brings code of its own.",
        "If you trust it, set TRUST_REMOTE_CODE=true.",
    ),
    _rule(
        r"Cannot find any model weights with `(?P<what>[^`\n]+)`",
        "There are no weights in {what}.",
        "Check that MODEL's download is complete, and LOAD_FORMAT, if set.",
    ),
    _rule(
        r"Load format `(?P<what>[^`\n]+)` is not supported",
        "This vLLM has no load format {what}.",
        "Correct LOAD_FORMAT, or leave it unset.",
    ),
    _rule(
        r"Following weights were not initialized|in \w*weight_loader\n.{0,600}?Error: ",
        "The weights do not fit the model's config.json.",
        "Check that the files of MODEL belong together, or let it be downloaded again.",
    ),
    _rule(
        r"Couldn't instantiate the backend tokenizer|Can't load tokenizer for|"
        r"tokenization_utils\w*\.py\", line \d+, in .{0,1200}JSONDecodeError",
        "The model's tokenizer is missing or damaged.",
        "Check that the folder has its tokenizer.json, or name another model's with TOKENIZER.",
    ),
    _rule(
        r"Repo id must [^\n]{1,200}: '(?P<what>[^'\n]+)'\. Use `repo_type`",
        "There is no folder {what}, and it can't be a model's name on the hub.",
        "Check MODEL, or whichever setting names it.",
    ),
    _rule(
        r"Invalid repository ID or local directory specified: '(?P<what>[^'\n]+)'",
        "There is no config.json in {what}.",
        "Check that MODEL names a folder with a config.json, or a model on the hub that has one.",
    ),
    _rule(
        r"config file at '(?P<what>[^'\n]+)' is not a valid JSON file",
        "{what} is not valid JSON.",
        "Correct it, or let MODEL be downloaded again.",
    ),
    _rule(
        r"driver on your system is too old|driver version is insufficient|Error 80[34]: ",
        "The GPU's driver is too old for this image's CUDA.",
        "Use a machine with a newer driver (on RunPod: the endpoint's allowed CUDA versions), or an older image.",
    ),
    _rule(
        r"no kernel image is available",
        "This image has no code for this GPU: it is too old for it, or too new.",
        "Use another GPU (on RunPod: the endpoint's GPU types), or another image.",
    ),
    _rule(
        r"Error 802: ",
        "The GPU is not set up yet (CUDA error 802): the host's fabric manager does not run.",
        "Use another machine; it is tried again.",
        permanent=False,
    ),
    _rule(
        r"No CUDA GPUs are available|Failed to infer device type|Device string must not be empty|NVML Shared Library Not Found|"
        r"Found no NVIDIA driver",
        "vLLM sees no GPU.",
        "Start the container with --gpus all, and check CUDA_VISIBLE_DEVICES; `nvidia-smi` must work inside it.",
    ),
    _rule(
        r"NVMLError_InvalidArgument",  # seen on an H200 with CUDA_VISIBLE_DEVICES=5
        "CUDA_VISIBLE_DEVICES names a GPU that is not here.",
        "Set it to what `nvidia-smi -L` lists, counted from 0, or leave it out.",
    ),
    _rule(
        r"Bfloat16 is only supported on GPUs",
        "This GPU can't compute in bfloat16.",
        "Set DTYPE=half.",
    ),
    _rule(
        r"quantization method (?P<what>\S+) is not supported for the current GPU",
        "This GPU is too old for the model's quantization, {what}.",
        "Set MODEL to one that is quantized otherwise, or use a newer GPU.",
    ),
    _rule(
        r"World size \(\d+\) is larger than the number of|cannot be larger than the number of available|"
        r"world_size \(\d+\) (?:must be less than or equal to|is less than than)",
        "The model is to be spread over more devices than there are.",
        "Lower TENSOR_PARALLEL_SIZE (and PIPELINE_PARALLEL_SIZE, DATA_PARALLEL_SIZE).",
    ),
    _rule(
        r"attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size \((?P<what>\d+)\)",
        "TENSOR_PARALLEL_SIZE={what} does not divide the model's {heads} attention heads.",
        "Set TENSOR_PARALLEL_SIZE to a divisor of {heads}.",
    ),
    _rule(
        r"User-specified max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len \(\w+=(?P<fits>\d+)",
        "MAX_MODEL_LEN={asked} is more than the {fits} that the model was made for.",
        "Set MAX_MODEL_LEN={fits} or less, or leave it unset (VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 allows it, at the price of nonsense).",
    ),
    _rule(
        r"Loading lora (?P<what>\S+) failed: (?P<why>[^\n']+?)(?:'|$|\n)",
        "The LoRA adapter {what} can't be loaded: {why}.",
        "Correct LORA_MODULES.",
    ),
    _rule(
        r"chat template string \((?P<what>[^)\n]+)\) appears path-like, but doesn't exist",
        "There is no chat template {what}.",
        "Correct CHAT_TEMPLATE.",
    ),
    _rule(
        r"invalid tool call parser: (?P<what>\S+)",
        "This vLLM has no tool parser {what}.",
        "Correct TOOL_CALL_PARSER; the log lists those that there are.",
    ),
    _rule(
        r"Reasoning parser '(?P<what>[^'\n]+)' not found",
        "This vLLM has no reasoning parser {what}.",
        "Correct REASONING_PARSER; the log lists those that there are.",
    ),
    _rule(
        r"Address already in use",
        "A port or socket that vLLM needs is taken.",
        "It is tried again; if it stays, look for another vLLM on this machine.",
        permanent=False,
    ),
    _rule(
        r"in create_server_unix_socket\n.{0,200}?Error: (?P<why>[^\n]+)",
        "vLLM can't make its socket: {why}.",
        "Set TMPDIR to a folder that exists, is writable and has a short path.",
    ),
    _rule(
        r"No working C\+\+ compiler found|InvalidCxxCompiler",
        "vLLM is to compile the model, and there is no C++ compiler.",
        "Set ENFORCE_EAGER=true, or use an image that has one (g++).",
    ),
    _rule(
        r"Too many open files",
        "vLLM may not open as many files and sockets as it needs.",
        "Start the container with --ulimit nofile=65536.",
    ),
    _rule(
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError",
        "The GPUs could not talk to each other (NCCL).",
        "Set NCCL_DEBUG=INFO to see why; often it is the shared memory: start the container with --ipc=host.",
        permanent=False,
    ),
    _rule(
        r"CUDA error: (?P<what>[^\n]+)",
        "The GPU failed: {what}.",
        "If it comes back, try another machine, or ENFORCE_EAGER=true.",
        permanent=False,
    ),
    _rule(
        r"Segfault encountered|Fatal Python error: Segmentation fault",
        "vLLM crashed (segmentation fault).",
        "The log above says what it was doing; a newer image, or ENFORCE_EAGER=true, may help.",
        permanent=False,
    ),
    # How the engine process or a worker ended, which is all that is known of it.
    _rule(
        r"(?:Failed core proc\(s\): \{'|died unexpectedly \(exit code: )(?:\w+': )?-9\b",
        "vLLM's engine process was killed by SIGKILL, most likely by the kernel because memory ran out.",
        "Give the container more memory, or lower MAX_MODEL_LEN; `dmesg` on the host tells.",
        permanent=False,
    ),
    _rule(
        r"(?:Failed core proc\(s\): \{'|died unexpectedly \(exit code: )(?:\w+': )?-(?P<signal>\d+)\b",
        "vLLM's engine process crashed (signal {signal}).",
        "The log above says what it was doing; a newer image, or ENFORCE_EAGER=true, may help.",
        permanent=False,
    ),
    # vLLM's own checks of its settings, of which there are hundreds.
    _rule(
        r"validation errors? for \w+\n(?P<option>[a-z]\w*)\S*\n  (?P<why>[^\n]+?) \[type=",
        "vLLM does not take the value of {option}: {why}.",
        "Correct {OPTION}; `supervisor explain` shows where it came from.",
    ),
    _rule(
        r"validation errors? for \w+\n  (?:Value error|Assertion failed), (?P<why>.{1,600}?)(?: \[type=|\n\n)",
        "vLLM does not take these settings: {why}.",
        "`supervisor explain` shows where each came from.",
    ),
    # What the others' parts say when a worker, here or on another machine, has ended: its own words come first.
    _rule(
        r"\bDist(?:Store|Network)Error: (?P<what>[^\n]+)",
        "The ranks did not come together: {what}.",
        OTHER_RANKS,
        permanent=False,
    ),
    _rule(
        r"pair\.cc:\d+\] (?:Connection closed by peer|Read error|Write error) \[(?P<what>[^\]\n]+)\]",
        "The rank at {what} ended.",
        "Its own log says why; all of them start again.",
        permanent=False,
    ),
    _rule(
        r"TimeoutError: RPC call to (?P<what>\w+) timed out",
        "A rank did not answer in time ({what}).",
        "Its own log, or the network between the machines, says why; all of them start again.",
        permanent=False,
    ),
    _rule(
        r"Engine core process (?P<what>\S+) died unexpectedly",
        "{what} died.",
        "If it comes back, the log above, or `dmesg` on the host, says why.",
        permanent=False,
    ),
)

# Where the log says nothing: by the signal.
SIGNALS = {
    signal.SIGKILL: ("It was killed by SIGKILL, most likely by the kernel because memory ran out.",
                     "Give the container more memory; `dmesg` on the host tells."),
    signal.SIGSEGV: ("It crashed (SIGSEGV).", "A newer image may help; the log above says what it was doing."),
    signal.SIGBUS: ("It crashed (SIGBUS), most likely because the shared memory (/dev/shm) is full.",
                    "Start the container with --ipc=host or --shm-size=8g."),
    signal.SIGILL: ("It crashed (SIGILL): this processor lacks instructions that this build of vLLM uses.",
                    "Use a build for this processor."),
}  # fmt: skip


# An engine process or a worker was gone, and none of them said why.
ENGINE_GONE = (
    "vLLM's engine process was gone without a word, most likely killed by the kernel because memory ran out.",
    "Give the container more memory; `dmesg` on the host tells.",
)


def diagnose(exit_code: int, lines: Iterable[str], ended_by_us: str | None = None) -> Diagnosis:
    """`exit_code` is -N for signal N; `lines` the last ones of the log, oldest first; `ended_by_us` says why, where it
    was us who killed it, and then the exit code means nothing."""
    lines = list(lines)
    told = (LINE_PREFIX.sub("", line) for line in lines if not HARMLESS.match(line))
    text = "\n".join(line for line in told if not line.startswith("    "))  # a traceback's quoted source tells nothing
    for rule in RULES:
        if found := rule.pattern.search(text):
            groups = {name: (value or "").strip().rstrip(".") for name, value in found.groupdict().items()}
            groups |= {name.upper(): value.upper().replace("-", "_") for name, value in groups.items()}
            return Diagnosis(rule.cause.format_map(groups), rule.remedy.format_map(groups), rule.permanent)
    if ended_by_us is not None:
        if "waiting for the other" in ended_by_us:
            return Diagnosis(f"{ended_by_us}.", OTHER_RANKS, permanent=False)
        return Diagnosis(f"{ended_by_us}.", "", permanent="SUPERVISOR_STARTUP_TIMEOUT" in ended_by_us)
    return by_the_end(exit_code, lines)


def by_the_end(exit_code: int, lines: list[str]) -> Diagnosis:
    """The diagnosis of a log that no rule knows: by who stopped it, by the signal, by its last error."""
    if any(TOLD_TO_STOP.search(line) for line in lines):
        return Diagnosis("It was told to stop (SIGTERM), and not by us.", "", permanent=False)
    if exit_code < 0 and -exit_code in SIGNALS:
        return Diagnosis(*SIGNALS[signal.Signals(-exit_code)], permanent=False)
    error = last_error(lines)
    if error is not None:
        return Diagnosis(error, "", permanent=exit_code > 0)
    if any(FOLLOW_UP.search(line) for line in lines if not HARMLESS.match(line)):
        return Diagnosis(*ENGINE_GONE, permanent=False)
    return Diagnosis("Its log does not say why.", "", permanent=False)


def last_error(lines: Iterable[str]) -> str | None:
    """The last line of a log that names an error, without vLLM's prefix; what only follows from one is no error."""
    found = None
    for line in lines:
        if HARMLESS.search(line) or FOLLOW_UP.search(line):
            continue
        text = LINE_PREFIX.sub("", line).strip()
        if ERROR_LINE.search(text):
            found = text
    return found
