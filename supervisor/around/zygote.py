"""Imports what vLLM's processes import, leaves a copy of itself behind to fork the next engines from, and is `vllm`.

    PYTHON zygote.py SOCKET VLLM serve MODEL ...

It runs in vLLM's environment, by its path, in the place of the script VLLM. The copy, the zygote, is made before vLLM
has begun: it holds no port, no lock, no GPU memory, and one thread alone, so that a fork of it is as good as a new
start. It is the supervisor's child by adoption, waits at SOCKET (prefork.py), and ends with it. vLLM's own processes
are forked as well, where that is known to do no harm: each would import all of it again.

Whatever is wrong with all this, VLLM is run as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pickle
import re
import select
import signal
import socket
import struct
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

# A server and its engine import these until they serve. What is not there, or for other hardware, is passed over. Left
# out are `vllm.compilation.backends`, `flashinfer` and `flashinfer.autotuner`: they initialize CUDA, which does not
# outlive a fork; without them a start takes 1.2 s more.
MODULES = (
    "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve", "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.launchers.api_server", "vllm.v1.engine.core", "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core_client", "vllm.v1.executor.uniproc_executor", "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.registry", "vllm.model_executor.models.llama", "vllm.tokenizers", "torch._dynamo",
    "torch._inductor.compile_fx", "transformers.models.llama",
)  # fmt: skip
# The keys are vLLM's names of platforms: on others nobody has tried it.
PLATFORM_MODULES = {
    "cuda": ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner", "vllm.v1.attention.backends.flash_attn",
             "triton"),
    "cpu": ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner", "vllm.v1.attention.backends.cpu_attn"),
}  # fmt: skip
# Where there is no locale, Python sets one.
PYTHON_VARIABLES = {"LC_CTYPE"}
METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
# The script that pip writes has `from package.module import function`, and its call.
SCRIPT_PATTERN = re.compile(r"^from ([\w.]+) import (\w+)$.*^\s+sys\.exit\(\2\(\)\)", re.M | re.S)
# Where memory runs out, the zygote is the first to go: the engine can do without it.
OOM_SCORE_FILE, MAX_OOM_SCORE = "/proc/self/oom_score_adj", "1000"
# A look at a model takes one second. It is given up after so many seconds without a byte.
JOB_PATIENCE = 60.0
# The supervisor has so many seconds to adopt a process that was forked.
ADOPTION_PATIENCE = 5.0
LENGTH_PREFIX = struct.Struct("!Q")


def main() -> NoReturn:
    initial_environ = dict(os.environ)
    address, program, *arguments = sys.argv[1:]
    sys.argv[:] = [program, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(program)  # noqa: PTH120  # the script's folder, as Python has it, not this one
    try:
        vllm_main = find_entry_point(program)
        platform = import_modules()
        if platform in PLATFORM_MODULES:
            fork_zygote(address, initial_environ)
            allow_forks(initial_environ)
        set_main_module(program)
    except Exception as error:  # noqa: BLE001  # nobody may have foreseen this vLLM
        print(f"zygote: {type(error).__name__}: {error}: started as it is", file=sys.stderr, flush=True)
        os.execv(program, sys.argv)  # noqa: S606
    sys.exit(vllm_main())


def find_entry_point(program: str) -> Callable[[], Any]:
    with open(program, encoding="utf-8") as file:  # noqa: PTH123
        match = SCRIPT_PATTERN.search(file.read(10_000))
    if match is None:
        raise ValueError(f"{program} is no script of pip's")
    return getattr(importlib.import_module(match[1]), match[2])  # type: ignore[no-any-return]


def import_modules() -> str:
    """Imports all of it, and returns vLLM's name of the platform."""
    for name in MODULES:
        _try_import(name)
    platform = platform_name()
    for name in PLATFORM_MODULES.get(platform, ()):
        _try_import(name)
    return platform


def _try_import(name: str) -> None:
    with contextlib.suppress(Exception):  # whoever needs it says what is wrong with it
        importlib.import_module(name)


def platform_name() -> str:
    platforms = sys.modules.get("vllm.platforms")
    return str(getattr(getattr(platforms, "current_platform", None), "device_name", ""))


def set_main_module(program: str) -> None:
    """Sees to it that multiprocessing would start the script again in a new process, not this file."""
    script = types.ModuleType("__main__")
    script.__file__, script.__spec__ = program, None
    sys.modules["zygote"], sys.modules["__main__"] = sys.modules["__main__"], script


def allow_forks(initial_environ: Mapping[str, str]) -> None:
    """vLLM's command line and its CPU platform want new processes, as something may have begun that does not outlive a
    fork: a program's own use of CUDA, OpenMP's threads. Nothing has begun here. vLLM's check comes later, and stays."""
    if METHOD_VARIABLE in initial_environ:
        return
    platform = type(sys.modules["vllm.platforms"].current_platform)
    check = platform.check_and_update_config

    def check_and_set_method(config: Any) -> None:
        check(config)
        if may_fork(config):
            os.environ[METHOD_VARIABLE] = "fork"

    platform.check_and_update_config = staticmethod(check_and_set_method)
    registry = sys.modules.get("vllm.model_executor.models.registry")
    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = partial(run_forked, registry._run_in_subprocess)  # type: ignore[union-attr]


def run_forked(fallback: Callable[[Callable[[], Any]], Any], job: Callable[[], Any]) -> Any:
    """Returns what the job gives, in a process of its own. In this way vLLM looks at a model that it sees for the first
    time, and a new process would import all of it for that. Where it fails, `fallback` does it."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            with open(writer, "wb") as file:  # noqa: PTH123
                file.write(pickle.dumps(job()))
        finally:
            os._exit(0)
    os.close(writer)
    data = b""
    with open(reader, "rb") as file:  # noqa: PTH123
        while select.select([file], [], [], JOB_PATIENCE)[0] and (chunk := file.read1()):
            data += chunk
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        return pickle.loads(data)  # noqa: S301  # they are our own
    except (EOFError, pickle.UnpicklingError):
        return fallback(job)


def may_fork(config: Any) -> bool:
    """Allows one engine on one machine. GPUs' workers are forked before EngineCore starts its threads, as offline;
    CPUs' get OpenMP's settings at a new start. Whisper's may hang, torch's shared memory fails, says vLLM itself."""
    parallel, model = config.parallel_config, config.model_config
    multimodal = getattr(model, "multimodal_config", None)
    return (
        (parallel.world_size == 1 or (platform_name() == "cuda" and parallel.distributed_executor_backend == "mp"))
        and getattr(parallel, "nnodes", 1) == parallel.data_parallel_size == 1
        and "Whisper" not in str(getattr(model, "architecture", ""))
        and getattr(multimodal, "mm_tensor_ipc", None) != "torch_shm"
    )


def find_fork_obstacle() -> str:
    """Returns why no engine can be forked from this process; empty where one can. That the driver was opened, to count
    the GPUs, does no harm; a context on one does not outlive a fork."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialized"
    if "/libcuda.so" in _read("/proc/self/maps"):
        cuda, count, flags = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_uint()
        if cuda.cuDeviceGetCount(ctypes.byref(count)) == 0:
            for device in range(count.value):
                active = ctypes.c_int()
                cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
                if active.value:
                    return "CUDA has a context"
    return ""


# The zygote


def fork_zygote(address: str, initial_environ: Mapping[str, str]) -> None:
    """Forks the zygote off. This never returns in the zygote; it does in each engine that is forked from it."""
    if find_fork_obstacle():
        return
    threads = Counter(_read(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task"))  # noqa: PTH208
    gc.freeze()  # a collection would write to all that is shared
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there are other threads: in the copy there are not
        if child := os.fork():
            os.waitpid(child, 0)
            return
    try:
        if os.fork():
            os._exit(0)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.close(null)
        oom_score = _read(OOM_SCORE_FILE)
        _write(OOM_SCORE_FILE, MAX_OOM_SCORE)
        _set_title("VLLM::Zygote")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            send(connection, {"threads": threads})
            if (request := wait_for_request(connection, initial_environ)) is None:
                os._exit(0)
        become_engine(request, oom_score)
    except BaseException:  # noqa: BLE001  # it must not become a second vLLM
        os._exit(1)


def wait_for_request(connection: socket.socket, initial_environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns what is asked, in each process forked to do it; None in the zygote, when nobody is left to ask."""
    while (message := receive(connection)) is not None:
        request, descriptors = message
        request["files"] = descriptors
        obstacle = find_fork_obstacle()
        if differences := {name for name, _ in request["environ"].items() ^ initial_environ.items()} - PYTHON_VARIABLES:
            obstacle = f"the environment is another one: {', '.join(sorted(differences))}"
        reader, writer = os.pipe()
        if not obstacle and not (intermediary := os.fork()):
            if (engine_pid := os.fork()) == 0:
                for descriptor in (reader, writer):
                    os.close(descriptor)
                return request
            os.write(writer, str(engine_pid).encode())
            os._exit(0)
        os.close(writer)
        if obstacle:
            send(connection, {"why": obstacle})
        else:
            os.waitpid(intermediary, 0)
            send(connection, {"pid": int(os.read(reader, 20))})
        os.close(reader)
        for descriptor in descriptors:
            os.close(descriptor)
    return None


def become_engine(request: Mapping[str, Any], oom_score: str) -> None:
    """Does in the process that is to be the next engine what `Popen` does for a new one."""
    os.setsid()
    deadline = time.monotonic() + ADOPTION_PATIENCE
    while os.getppid() != request["parent"]:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.001)
    _write(OOM_SCORE_FILE, oom_score)
    _set_title(" ".join([sys.argv[0], *request["argv"]]))
    for target, descriptor in enumerate(request["files"], 1):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.argv[1:] = request["argv"]


# A message is its length, then JSON. With a request come the descriptors of standard output and error.


def send(connection: socket.socket, content: object, descriptors: Sequence[int] = ()) -> None:
    data = json.dumps(content).encode()
    socket.send_fds(connection, [LENGTH_PREFIX.pack(len(data))], descriptors)
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Returns a message and its descriptors; None where there is nobody any more."""
    prefix, descriptors, _, _ = socket.recv_fds(connection, LENGTH_PREFIX.size, 2)
    with connection.makefile("rb") as reader:  # eight bytes come in one piece
        data = reader.read(LENGTH_PREFIX.unpack(prefix)[0]) if prefix else b""
    return (json.loads(data), list(descriptors)) if data else None


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:  # noqa: PTH123
        return file.read().strip()
    return ""


def _set_title(title: str) -> None:
    """Names this process for people who look at it. vLLM names its own so, where that package is there."""
    with contextlib.suppress(Exception):
        importlib.import_module("setproctitle").setproctitle(title)


def _write(path: str, text: str) -> None:
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(text)


if __name__ == "__main__":
    main()
