"""Phases, diagnosis and policy: small pure pieces."""

from __future__ import annotations

import re
import time

import pytest

from supervisor.around.phases import Waterfall
from supervisor.engine import tracebacks
from supervisor.engine.child import describe_exit
from supervisor.engine.diagnosis import is_effect

# vLLM 0.32's own lines, cut to what matters.
LOG = """\
(APIServer pid=9946) INFO 11-21 19:33:40 [api_utils.py:286] non-default args: {'model_tag': 'demo'}
(EngineCore pid=10595) INFO 11-21 19:34:30 [core.py:112] Initializing a V1 LLM engine (v0.32.0) with config
(Worker pid=10817) INFO 11-21 19:34:53 [cpu_model_runner.py:68] Starting to load model supervisor/demo/model...
Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]
(Worker pid=10817) INFO 11-21 19:34:53 [default_loader.py:501] Loading weights took 0.03 seconds
(EngineCore pid=10595) INFO 11-21 19:34:55 [kv_cache_utils.py:2327] CPU KV cache size: 1,048,576 tokens
(EngineCore pid=10595) INFO 11-21 19:35:01 [core.py:402] init engine (profile, kv cache, warmup) took 6.20 s
(Worker pid=10818) INFO 11-21 19:35:01 [cpu_model_runner.py:68] Starting to load model (a second rank, late)
(APIServer pid=9946) INFO 11-21 19:35:03 [entry.py:140] Starting vLLM server on unix:/tmp/vllm.sock
"""


def test_an_empty_line_begins_no_phase() -> None:
    waterfall = Waterfall(time.monotonic())
    assert waterfall.hear("") is None
    assert waterfall.current_phase == "importing vLLM"


def test_phases_of_a_real_start_only_go_forward() -> None:
    waterfall = Waterfall(time.monotonic())
    assert waterfall.current_phase == "importing vLLM"
    begun = [phase for line in LOG.splitlines() if (phase := waterfall.hear(line))]
    assert begun == [
        "reading the model's config",
        "starting the engine core",
        "loading weights",
        "profiling memory",
        "starting the API server",
    ]
    waterfall.finish()
    assert waterfall.hear("Loading model weights") is None
    rows = waterfall.as_rows()
    assert [row["name"] for row in rows] == ["importing vLLM", *begun]
    assert all(isinstance(row["seconds"], float) and row["seconds"] >= 0 for row in rows)


# vLLM 0.24.0's own on an H200, cut in the same way; a progress bar is one line, whose end comes when it is done.
COLD = """\
(APIServer pid=1693) INFO 11-26 04:16:09 [api_utils.py:273] non-default args: {'model_tag': '/m'}
(APIServer pid=1693) INFO 11-26 04:16:18 [model.py:598] Resolved architecture: LlamaForCausalLM
(APIServer pid=1693) INFO 11-26 04:16:18 [model.py:1725] Using max model len 131072
(APIServer pid=1693) INFO 11-26 04:16:18 [vllm.py:1006] Asynchronous scheduling is enabled.
(EngineCore pid=1819) INFO 11-26 04:16:25 [core.py:114] Initializing a V1 LLM engine (v0.24.0) with config: model='/m'
(EngineCore pid=1819) INFO 11-26 04:16:26 [parallel_state.py:1588] world_size=1 rank=0 local_rank=0 \
distributed_init_method=tcp://192.0.2.2:51051 backend=nccl
(EngineCore pid=1819) INFO 11-26 04:16:27 [model_runner.py:281] Loading model from scratch...
(EngineCore pid=1819) \rLoading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]
(EngineCore pid=1819) INFO 11-26 04:16:28 [model_runner.py:302] Model loading took 1.84 GiB and 1.377148 seconds
(EngineCore pid=1819) INFO 11-26 04:16:31 [backends.py:1089] Using cache directory: /c for vLLM's torch.compile
(EngineCore pid=1819) INFO 11-26 04:16:31 [backends.py:1148] Dynamo bytecode transform time: 3.10 s
(EngineCore pid=1819) INFO 11-26 04:16:39 [monitor.py:53] torch.compile took 11.19 s in total
(EngineCore pid=1819) INFO 11-26 04:16:39 [monitor.py:81] Initial profiling/warmup run took 0.16 s
(EngineCore pid=1819) INFO 11-26 04:16:41 [gpu_worker.py:508] Available KV cache memory: 126.0 GiB
(EngineCore pid=1819) INFO 11-26 04:16:41 [kv_cache_utils.py:2146] GPU KV cache size: 4,128,672 tokens
(EngineCore pid=1819) INFO 11-26 04:16:41 [kv_cache_utils.py:2147] Maximum concurrency for 131,072 tokens: 31.50x
(EngineCore pid=1819) \rCapturing CUDA graphs (PIECEWISE):   0%|          | 0/51 [00:00<?, ?it/s]
(EngineCore pid=1819) \rCapturing CUDA graphs (FULL):   0%|          | 0/51 [00:00<?, ?it/s]
(EngineCore pid=1819) INFO 11-26 04:16:44 [model_runner.py:726] Graph capturing finished in 2 secs, took 0.45 GiB
(EngineCore pid=1819) INFO 11-26 04:16:54 [jit_monitor.py:60] Kernel JIT monitor activated
(EngineCore pid=1819) INFO 11-26 04:16:54 [core.py:337] init engine (profile, create kv cache, warmup model) took 26 s
(APIServer pid=1693) INFO 11-26 04:16:55 [api_server.py:577] Supported tasks: ['generate']
(APIServer pid=1693) INFO:     Started server process [1693]
"""
# vLLM 0.32.0's on an H200: some graphs are captured before there is a KV cache, to see what they take.
TUNED = """\
(APIServer pid=1) INFO 12-01 07:11:44 [api_utils.py:286] non-default args: {'model_tag': '/m'}
(APIServer pid=1) INFO 12-01 07:11:44 [model.py:2152] Using max model len 2048
(EngineCore pid=2) INFO 12-01 07:12:03 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='/m'
(EngineCore pid=2) INFO 12-01 07:12:05 [model_runner.py:392] Loading model from scratch...
(EngineCore pid=2) INFO 12-01 07:12:08 [model_runner.py:424] Model loading took 0.09 GiB memory and 3.257059 seconds
(EngineCore pid=2) INFO 12-01 07:12:22 [monitor.py:62] [backbone] torch.compile took 12.70 s in total
(EngineCore pid=2) INFO 12-01 07:12:22 [monitor.py:91] [backbone] Initial profiling/warmup run took 0.13 s
(EngineCore pid=2) \rCapturing CUDA graphs (PIECEWISE):   0%|          | 0/51 [00:00<?, ?it/s]
(EngineCore pid=2) INFO 12-01 07:12:38 [model_runner.py:1127] Graph capturing finished in 14 secs, took -6.02 GiB
(EngineCore pid=2) INFO 12-01 07:12:39 [gpu_worker.py:759] Available KV cache memory: 2.28 GiB
(EngineCore pid=2) INFO 12-01 07:12:39 [kv_cache_utils.py:2327] GPU KV cache size: 299,376 tokens
(EngineCore pid=2) INFO 12-01 07:12:39 [kernel_warmup.py:176] JIT kernel warmup starting.
(EngineCore pid=2) INFO 12-01 07:12:39 [kernel_warmup.py:367] Running FlashInfer autotune with 8192 tokens
(EngineCore pid=2) \rCapturing CUDA graphs (FULL):   0%|          | 0/51 [00:00<?, ?it/s]
(EngineCore pid=2) INFO 12-01 07:13:12 [model_runner.py:1127] Graph capturing finished in 12 secs, took 0.43 GiB
(EngineCore pid=2) INFO 12-01 07:13:13 [core.py:395] init engine (profile, create kv cache, warmup model) took 64.89 s
"""
# With ENFORCE_EAGER and LOAD_FORMAT=dummy: no weights are read, nothing is compiled or captured.
DUMMY = """\
(APIServer pid=3191) INFO 11-26 04:29:43 [api_utils.py:273] non-default args: {'model_tag': '/m'}
(APIServer pid=3191) INFO 11-26 04:29:43 [model.py:1725] Using max model len 131072
(APIServer pid=3191) WARNING 11-26 04:29:43 [vllm.py:1062] Enforce eager set, disabling torch.compile and CUDAGraphs.
(EngineCore pid=3306) INFO 11-26 04:29:50 [core.py:114] Initializing a V1 LLM engine (v0.24.0) with config: model='/m'
(EngineCore pid=3306) INFO 11-26 04:29:52 [model_runner.py:281] Loading model from scratch...
(EngineCore pid=3306) INFO 11-26 04:29:53 [model_runner.py:302] Model loading took 1.84 GiB and 1.040882 seconds
(EngineCore pid=3306) INFO 11-26 04:29:54 [gpu_worker.py:508] Available KV cache memory: 126.06 GiB
(EngineCore pid=3306) INFO 11-26 04:29:54 [kv_cache_utils.py:2146] GPU KV cache size: 4,130,592 tokens
(EngineCore pid=3306) INFO 11-26 04:29:54 [jit_monitor.py:60] Kernel JIT monitor activated
(EngineCore pid=3306) INFO 11-26 04:29:55 [core.py:344] init engine (profile, create kv cache, warmup model) took 2.14 s
"""
# Two GPUs: the ranks say the same, one after the other.
RANKS = """\
(Worker_TP1 pid=1637) INFO 11-26 04:26:50 [model_runner.py:302] Model loading took 0.93 GiB and 1.862357 seconds
(Worker_TP0 pid=1636) INFO 11-26 04:26:51 [model_runner.py:302] Model loading took 0.93 GiB and 2.053818 seconds
(Worker_TP0 pid=1636) INFO 11-26 04:26:57 [backends.py:1148] Dynamo bytecode transform time: 5.55 s
(Worker_TP0 pid=1636) INFO 11-26 04:27:10 [monitor.py:53] torch.compile took 19.32 s in total
(Worker_TP0 pid=1636) INFO 11-26 04:27:13 [gpu_worker.py:508] Available KV cache memory: 126.8 GiB
(EngineCore pid=1529) INFO 11-26 04:27:14 [kv_cache_utils.py:2146] GPU KV cache size: 8,309,712 tokens
(Worker_TP1 pid=1637) INFO 11-26 04:27:17 [model_runner.py:726] Graph capturing finished in 3 secs, took 0.35 GiB
(Worker_TP0 pid=1636) INFO 11-26 04:27:17 [model_runner.py:726] Graph capturing finished in 3 secs, took 0.35 GiB
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            COLD,
            {
                "reading the model's config": "non-default args", "starting the engine core": "Using max model len",
                "loading weights": "Loading model from scratch", "compiling": "Model loading took",
                "profiling memory": "torch.compile took", "warming up kernels": "GPU KV cache size",
                "last warm-ups": "Graph capturing finished", "starting the API server": "init engine",
            },
        ),
        (
            DUMMY,
            {
                "reading the model's config": "non-default args", "starting the engine core": "Using max model len",
                "loading weights": "Loading model from scratch", "profiling memory": "Model loading took",
                "warming up kernels": "GPU KV cache size", "starting the API server": "init engine",
            },
        ),
        (
            RANKS,
            {
                "compiling": "Model loading took", "profiling memory": "torch.compile took",
                "warming up kernels": "GPU KV cache size", "last warm-ups": "Graph capturing finished",
            },
        ),
    ],
    ids=["cold", "eager and without weights", "two GPUs"],
)  # fmt: skip
def test_phases_on_a_gpu_and_the_lines_that_begin_them(log: str, expected: dict[str, str]) -> None:
    waterfall = Waterfall(time.monotonic())
    begun = {phase: line for line in log.splitlines() if (phase := waterfall.hear(line))}
    assert list(begun) == list(expected)
    assert {phase: line for phase, line in begun.items() if expected[phase] not in line} == {}


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (TUNED, {"profiling memory": 17, "warming up kernels": 21, "capturing graphs": 12, "last warm-ups": 1}),
        (COLD, {"profiling memory": 2, "warming up kernels": 1, "capturing graphs": 2, "last warm-ups": 10}),
    ],
    ids=["0.32.0", "0.24.0"],
)
def test_graphs_are_told_when_they_are_captured(
    log: str, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0]
    monkeypatch.setattr("supervisor.around.phases.time.monotonic", lambda: now[0])
    waterfall = Waterfall(0)
    for line in log.splitlines():
        if found := re.search(r" (\d\d):(\d\d):(\d\d) ", line):
            now[0] = int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3])
        waterfall.hear(line)
    seconds = {str(row["name"]): row["seconds"] for row in waterfall.as_rows()}
    assert {name: seconds[name] for name in expected} == expected


# The same of several machines.
HEADLESS = """\
(MainProcess pid=2) INFO 11-26 00:10:23 [serve.py:224] Launching vLLM (v0.32.0) headless multiproc executor, with
(Worker pid=3) INFO 11-26 00:10:45 [parallel_state.py:1906] world_size=2 rank=1 distributed_init_method=tcp://10.77.0.1:2
(Worker_TP1 pid=3) INFO 11-26 00:11:02 [cpu_model_runner.py:68] Starting to load model /demo/model...
"""
SPREAD = """\
(APIServer pid=1) INFO 11-26 00:10:21 [api_utils.py:286] non-default args: {'model_tag': 'demo'}
(EngineCore pid=2) INFO 11-26 00:10:40 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config
(Worker pid=3) INFO 11-26 00:11:01 [parallel_state.py:1906] world_size=2 rank=0 distributed_init_method=tcp://10.77.0.1:2
(Worker_TP0 pid=3) INFO 11-26 00:11:02 [cpu_model_runner.py:68] Starting to load model /demo/model...
(EngineCore pid=2) INFO 11-26 00:11:14 [core.py:402] init engine (profile, kv cache, warmup) took 7.39 s
"""
REPLICATED = """\
(APIServer pid=1) INFO 11-26 00:06:50 [api_utils.py:286] non-default args: {'model_tag': 'demo'}
(EngineCore_DP0 pid=2) INFO 11-26 00:07:23 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config
(Worker pid=3) INFO 11-26 00:07:39 [parallel_state.py:1906] world_size=1 rank=0 distributed_init_method=file:///tmp/x
(Worker pid=3) INFO 11-26 00:07:39 [cpu_model_runner.py:68] Starting to load model /demo/model...
(EngineCore_DP0 pid=2) INFO 11-26 00:07:43 [core.py:402] init engine (profile, kv cache, warmup) took 1.60 s
(EngineCore_DP0 pid=2) INFO 11-26 00:07:53 [core.py:1247] Waiting for READY message from DP Coordinator...
(APIServer pid=1) INFO 11-26 00:09:43 [entry.py:136] Supported tasks: ['generate']
"""
FRONT = ["reading the model's config", "starting the engine core"]


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (HEADLESS, ["waiting for the other ranks", "loading weights"]),
        (SPREAD, [*FRONT, "waiting for the other ranks", "loading weights", "starting the API server"]),
        (REPLICATED, [*FRONT, "loading weights", "starting the API server", "waiting for the other engines"]),
    ],
    ids=["headless", "rank 0", "rank 0 of replicas"],
)
def test_phases_of_several_machines(log: str, expected: list[str]) -> None:
    waterfall = Waterfall(time.monotonic())
    assert [phase for line in log.splitlines() if (phase := waterfall.hear(line))] == expected


@pytest.mark.parametrize(
    "line",
    [
        "(Worker pid=3) world_size=2 rank=1 local_rank=1 distributed_init_method=file:///tmp/vllm_dist_83 backend=gloo",
        "(Worker pid=3) world_size=2 rank=1 local_rank=1 distributed_init_method=tcp://127.0.0.1:41251 backend=nccl",
        "(Worker pid=3) world_size=1 rank=0 local_rank=0 distributed_init_method=tcp://172.17.0.2:41251 backend=nccl",
    ],
)
def test_workers_of_one_machine_wait_for_no_rank(line: str) -> None:
    """Older versions, and some GPUs, meet over TCP there too."""
    assert Waterfall(time.monotonic()).hear(line) is None


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["(EngineCore pid=1) ERROR 11-21 19:00:00 [core.py:1] ValueError: too large"], "ValueError: too large"),
        (["  File x", "RuntimeError: something else"], "RuntimeError: something else"),
        (["vllm serve: error: unrecognized arguments: --nope"], "vllm serve: error: unrecognized arguments: --nope"),
        (["ERROR 03-19 11:54:51 [engine.py:158] ValueError('no \"seats\" left')"], 'ValueError: no "seats" left'),
        (["[PID: 37] AclNN_Parameter_Error(EZ1001): too wide"], "[PID: 37] AclNN_Parameter_Error(EZ1001): too wide"),
        (["(Worker pid=3) WARNING 11-21 19:34:54 [utils.py:597] fallback. Exception: no primitive"], None),
        (["INFO:     Application startup complete."], None),
    ],
)  # fmt: skip
def test_last_error(lines: list[str], expected: str | None) -> None:
    assert tracebacks.read(lines, is_effect).error == expected


def test_how_it_ended() -> None:
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-40) == "killed by signal 40"
