"""Imports what vLLM's processes import, leaves a copy of itself behind to fork the next engines from, and is `vllm`.

    PYTHON zygote.py SOCKET VLLM serve MODEL ...

Runs in vLLM's environment, by its path, in the place of the script VLLM. The copy, the zygote, is made before vLLM has
begun: it holds no port, no lock, no GPU memory, and one thread alone, so that a fork of it is as good as a new start.
It is the supervisor's child by adoption, waits at SOCKET (prefork.py), and ends with it. vLLM's own processes are
forked as well, where that is known to do no harm: each would import all of it again.

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

# What a server and its engine import until they serve. What is not there, or for other hardware, is passed over. Not
# `vllm.compilation.backends`, `flashinfer` and `flashinfer.autotuner`: they initialize CUDA, which does not outlive a
# fork; without them a start takes 1.2 s more.
MODULES = (
    "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve", "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.launchers.api_server", "vllm.v1.engine.core", "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core_client", "vllm.v1.executor.uniproc_executor", "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.registry", "vllm.model_executor.models.llama", "vllm.tokenizers", "torch._dynamo",
    "torch._inductor.compile_fx", "transformers.models.llama",
)  # fmt: skip
# By vLLM's name of the platform: on others nobody has tried it.
PLATFORMS = {
    "cuda": ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner", "vllm.v1.attention.backends.flash_attn",
             "triton"),
    "cpu": ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner", "vllm.v1.attention.backends.cpu_attn"),
}  # fmt: skip
# Where there is no locale, Python sets one.
MADE_BY_PYTHON = {"LC_CTYPE"}
METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
# The script that pip writes: `from package.module import function`, and its call.
SCRIPT = re.compile(r"^from ([\w.]+) import (\w+)$.*^\s+sys\.exit\(\2\(\)\)", re.M | re.S)
# Where memory runs out it is the first to go: the engine can do without it.
OOM_SCORE, FIRST_TO_GO = "/proc/self/oom_score_adj", "1000"
# Seconds without a byte until a look at a model, which takes one, is given up.
LOOK_PATIENCE = 60.0
# Seconds until a process that was forked has been adopted by the supervisor.
ADOPTION = 5.0
SIZE = struct.Struct("!Q")


def main() -> NoReturn:
    born = dict(os.environ)
    address, program, *words = sys.argv[1:]
    sys.argv[:] = [program, *words]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(program)  # noqa: PTH120  # not this folder; the script's, as Python has it
    try:
        run = entry(program)
        platform = load()
        if platform in PLATFORMS:
            stay(address, born)
            allow_forks(born)
        as_script(program)
    except Exception as error:  # noqa: BLE001  # of a vLLM that nobody foresaw
        print(f"zygote: {type(error).__name__}: {error}: started as it is", file=sys.stderr, flush=True)
        os.execv(program, sys.argv)  # noqa: S606
    sys.exit(run())


def entry(program: str) -> Callable[[], Any]:
    with open(program, encoding="utf-8") as file:  # noqa: PTH123
        found = SCRIPT.search(file.read(10_000))
    if found is None:
        raise ValueError(f"{program} is no script of pip's")
    return getattr(importlib.import_module(found[1]), found[2])  # type: ignore[no-any-return]


def load() -> str:
    """vLLM's name of the platform, once all is imported."""
    for name in MODULES:
        _import(name)
    platform = platform_name()
    for name in PLATFORMS.get(platform, ()):
        _import(name)
    return platform


def _import(name: str) -> None:
    with contextlib.suppress(Exception):  # whoever needs it says what is wrong with it
        importlib.import_module(name)


def platform_name() -> str:
    platforms = sys.modules.get("vllm.platforms")
    return str(getattr(getattr(platforms, "current_platform", None), "device_name", ""))


def as_script(program: str) -> None:
    """What multiprocessing would start again in a new process is the script, not this file."""
    script = types.ModuleType("__main__")
    script.__file__, script.__spec__ = program, None
    sys.modules["zygote"], sys.modules["__main__"] = sys.modules["__main__"], script


def allow_forks(born: Mapping[str, str]) -> None:
    """vLLM's command line and its CPU platform want new processes, as something may have begun that does not outlive a
    fork: a program's own use of CUDA, OpenMP's threads. Here nothing was. Its check for that comes later, and stays."""
    if METHOD in born:
        return
    platform = type(sys.modules["vllm.platforms"].current_platform)
    check = platform.check_and_update_config

    def checked(config: Any) -> None:
        check(config)
        if may_fork(config):
            os.environ[METHOD] = "fork"

    platform.check_and_update_config = staticmethod(checked)
    registry = sys.modules.get("vllm.model_executor.models.registry")
    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = partial(forked, registry._run_in_subprocess)  # type: ignore[union-attr]


def forked(instead: Callable[[Callable[[], Any]], Any], job: Callable[[], Any]) -> Any:
    """What the job gives, in a process of its own: a model that vLLM sees for the first time is looked at so, and a
    new process would import all of it for that. Where it fails, `instead` does it."""
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
        while select.select([file], [], [], LOOK_PATIENCE)[0] and (more := file.read1()):
            data += more
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        return pickle.loads(data)  # noqa: S301  # our own
    except (EOFError, pickle.UnpicklingError):
        return instead(job)


def may_fork(config: Any) -> bool:
    """One engine on one machine. GPUs' workers are forked before EngineCore starts its threads, as offline; CPUs' get
    OpenMP's settings at a new start. Whisper's may hang, and torch's shared memory fails, says vLLM itself."""
    parallel, model = config.parallel_config, config.model_config
    multimodal = getattr(model, "multimodal_config", None)
    return (
        (parallel.world_size == 1 or (platform_name() == "cuda" and parallel.distributed_executor_backend == "mp"))
        and getattr(parallel, "nnodes", 1) == parallel.data_parallel_size == 1
        and "Whisper" not in str(getattr(model, "architecture", ""))
        and getattr(multimodal, "mm_tensor_ipc", None) != "torch_shm"
    )


def unfit() -> str:
    """Why no engine can be forked from this process; empty: it can. That the driver was opened, to count the GPUs, does
    no harm; a context on one does not outlive a fork."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialized"
    if "/libcuda.so" in _read("/proc/self/maps"):
        cuda, number, flags = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_uint()
        if cuda.cuDeviceGetCount(ctypes.byref(number)) == 0:
            for device in range(number.value):
                active = ctypes.c_int()
                cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
                if active.value:
                    return "CUDA has a context"
    return ""


# The zygote


def stay(address: str, born: Mapping[str, str]) -> None:
    """Forks the zygote off, in which this never returns; it does in each engine that is forked from it."""
    if unfit():
        return
    threads = Counter(_read(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task"))  # noqa: PTH208
    gc.freeze()  # a collection would write to all that is shared
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are other threads: in the copy there are not
        if child := os.fork():
            os.waitpid(child, 0)
            return
    try:
        if os.fork():
            os._exit(0)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.close(null)
        score = _read(OOM_SCORE)
        _write(OOM_SCORE, FIRST_TO_GO)
        _call_it("VLLM::Zygote")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            send(connection, {"threads": threads})
            if (request := wait(connection, born)) is None:
                os._exit(0)
        begin(request, score)
    except BaseException:  # noqa: BLE001  # it must not become a second vLLM
        os._exit(1)


def wait(connection: socket.socket, born: Mapping[str, str]) -> dict[str, Any] | None:
    """What is asked, in each process that was forked to do it; None in the zygote, when nobody is left to ask."""
    while (asked := receive(connection)) is not None:
        request, files = asked
        request["files"] = files
        why = unfit()
        if changed := {name for name, _ in request["environ"].items() ^ born.items()} - MADE_BY_PYTHON:
            why = f"the environment is another one: {', '.join(sorted(changed))}"
        reader, writer = os.pipe()
        if not why and not (between := os.fork()):
            if (engine := os.fork()) == 0:
                for number in (reader, writer):
                    os.close(number)
                return request
            os.write(writer, str(engine).encode())
            os._exit(0)
        os.close(writer)
        if why:
            send(connection, {"why": why})
        else:
            os.waitpid(between, 0)
            send(connection, {"pid": int(os.read(reader, 20))})
        os.close(reader)
        for number in files:
            os.close(number)
    return None


def begin(request: Mapping[str, Any], score: str) -> None:
    """In the process that is to be the next engine: what `Popen` does for a new one."""
    os.setsid()
    deadline = time.monotonic() + ADOPTION
    while os.getppid() != request["parent"]:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.001)
    _write(OOM_SCORE, score)
    _call_it(" ".join([sys.argv[0], *request["argv"]]))
    for number, file_number in enumerate(request["files"], 1):
        os.dup2(file_number, number)
        os.close(file_number)
    sys.argv[1:] = request["argv"]


# A message: its length, then JSON. With a request come the files for standard output and error.


def send(connection: socket.socket, content: object, files: Sequence[int] = ()) -> None:
    data = json.dumps(content).encode()
    socket.send_fds(connection, [SIZE.pack(len(data))], files)
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """None where there is nobody any more."""
    size, files, _, _ = socket.recv_fds(connection, SIZE.size, 2)
    with connection.makefile("rb") as reader:  # eight bytes come in one piece
        data = reader.read(SIZE.unpack(size)[0]) if size else b""
    return (json.loads(data), list(files)) if data else None


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:  # noqa: PTH123
        return file.read().strip()
    return ""


def _call_it(title: str) -> None:
    """For who looks at the processes. vLLM names its own so, where that package is there."""
    with contextlib.suppress(Exception):
        importlib.import_module("setproctitle").setproctitle(title)


def _write(path: str, text: str) -> None:
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(text)


if __name__ == "__main__":
    main()
