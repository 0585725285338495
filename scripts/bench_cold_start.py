#!/usr/bin/env python3
"""Seconds to the first answer: `vllm serve` alone and the supervisor, with empty caches, with kept ones, after a crash.

    .venv/bin/python scripts/bench_cold_start.py --vllm .vllm/bin/vllm --model supervisor/demo/model [--cold]
        [--made GB [--hidden 4096]] [--crashes 3] [--runs 1] [--json FILE] -- --max-model-len 1024

Each start is one in a new container: an empty home, an empty folder for temporary files, with --cold (root) an empty
page cache, too. vLLM alone keeps its home for its second start. Of the supervisor only the volume outlives the first
one, and the second finds there what that left: compiled code, and the weights, if they came from the hub. A crash is a
SIGKILL of EngineCore with a request sent right after it; what is printed is how long that waits for its whole answer,
and whether greedy answers are the same as before. `--made GB` serves a Llama of that size, of noise, with the tokenizer
of --model: one whose weights take some time to read. vLLM's own arguments stand behind `--`.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import json
import os
import platform
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from supervisor.around.phases import Waterfall

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 1200.0
TOTAL = "first answer"
PROMPTS = [f"{number} {word}" for number in range(5) for word in ("What", "Once upon a time", "def f(x):", "€")]
Rows = dict[str, float]


def make_noise() -> bytes:
    """Returns 128 MB of bfloat16 between 0.0078 and 0.016, half of them below zero."""
    numbers = array.array("H", random.Random(1).randbytes(1 << 22))
    return array.array("H", (number & 0x807F | 0x3C00 for number in numbers)).tobytes() * 32


def make_model(folder: Path, tokenizer: Path, gigabytes: float, hidden: int) -> Path:
    """Makes a Llama in bfloat16: as many layers as the size takes, in files of four layers each. Its answers make no
    sense, but depend on all of it."""
    inner, vocabulary, kv = 4 * hidden, 1024, hidden // 4
    layer = 2 * (hidden * (2 * hidden + 2 * kv) + 3 * hidden * inner + 2 * hidden)
    layers = max(2, round(gigabytes * 1e9 / layer))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "torch_dtype": "bfloat16",
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config))
    shapes: list[dict[str, list[int]]] = [
        {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    ]
    for first in range(0, layers, 4):
        shapes.append({})
        for number in range(first, min(layers, first + 4)):
            name = f"model.layers.{number}"
            for part, shape in (
                ("self_attn.q_proj", [hidden, hidden]), ("self_attn.k_proj", [kv, hidden]),
                ("self_attn.v_proj", [kv, hidden]), ("self_attn.o_proj", [hidden, hidden]),
                ("mlp.gate_proj", [inner, hidden]), ("mlp.up_proj", [inner, hidden]),
                ("mlp.down_proj", [hidden, inner]), ("input_layernorm", [hidden]),
                ("post_attention_layernorm", [hidden]),
            ):  # fmt: skip
                shapes[-1][f"{name}.{part}.weight"] = shape
    noise, ones = make_noise(), array.array("H", [0x3F80] * hidden).tobytes()
    for number, tensors in enumerate(shapes, 1):
        header: dict[str, Any] = {}
        end = 0
        for name, shape in tensors.items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        head = json.dumps(header).encode()
        with (folder / f"model-{number:05}-of-{len(shapes):05}.safetensors").open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for index, name in enumerate(tensors):
                if "norm" in name:
                    file.write(ones)
                    continue
                first, last = header[name]["data_offsets"]
                remaining, begin = last - first, 2 * (7919 * (index + 9 * number) % (len(noise) // 4))  # its own
                while remaining > 0:
                    remaining -= file.write(noise[begin : begin + remaining])
                    begin = 0
    os.sync()
    return folder


def empty_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def make_environ(folder: Path, *, keep: bool = False) -> dict[str, str]:
    """Returns the environment of a new container, or, with `keep`, of one that was stopped."""
    for name in ("home", "tmp"):
        if not keep:
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(exist_ok=True)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SUPERVISOR_", "XDG_"))}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return environ | {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}


@contextlib.contextmanager
def start_program(command: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def await_ready(process: subprocess.Popen[str], waterfall: Waterfall, log: Path, is_ready: Callable[[], bool]) -> None:
    """Waits until the process is ready. Its lines go to the waterfall."""
    assert process.stdout is not None
    source = process.stdout

    def read() -> None:
        with log.open("a", buffering=1) as file:
            for line in source:
                waterfall.hear(line.rstrip())
                file.write(line)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + PATIENCE
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"bench_cold_start: it does not get ready:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)


def ask(url: str, uds: str | None = None, prompt: str = "What are you?") -> str | None:
    """Returns a greedy answer that is not streamed, or None if there is none."""
    body = {"model": "bench", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=uds), timeout=PATIENCE) as client:
            response = client.post(f"{url}/v1/completions", json=body)
            return str(response.json()["choices"][0]["text"]) if response.status_code == 200 else None
    except httpx.HTTPError:
        return None


def run_alone(options: argparse.Namespace, model: str, folder: Path, raw: list[str], *, keep: bool) -> Rows:
    environ = make_environ(folder, keep=keep)
    socket, log = str(folder / "tmp" / "alone.sock"), folder / "alone.log"
    for path in (log, Path(socket)):
        path.unlink(missing_ok=True)
    started_at = time.monotonic()
    waterfall = Waterfall(started_at)
    command = [*shlex.split(options.vllm), "serve", model, "--uds", socket, "--served-model-name", "bench", *raw]
    with start_program(command, environ) as process:
        await_ready(process, waterfall, log, lambda: ask("http://vllm", socket) is not None)
        waterfall.finish()
        return make_rows(waterfall.as_rows(), time.monotonic() - started_at)


def run_supervised(
    options: argparse.Namespace, model: str, folder: Path, raw: list[str], crashes: list[Rows] | None
) -> Rows:
    port = 18000 + os.getpid() % 1000
    url = f"http://127.0.0.1:{port}"
    environ = make_environ(folder) | {
        "SUPERVISOR_VLLM": options.vllm, "SUPERVISOR_VOLUME": str(folder / "volume"), "PORT": str(port),
        "SUPERVISOR_MAX_RESTARTS": "1000", "SUPERVISOR_RESTART_WINDOW": "0.05", "SERVED_MODEL_NAME": "bench",
        "SUPERVISOR_HOLD_TIMEOUT": "600", "SUPERVISOR_LOG_LEVEL": "debug",
    }  # fmt: skip
    log = folder / "supervised.log"
    log.unlink(missing_ok=True)
    started_at = time.monotonic()
    command = [sys.executable, "-P", "-m", "supervisor", "up", model, "--", *raw]
    with start_program(command, environ) as process:
        await_ready(process, Waterfall(started_at), log, lambda: ask(url) is not None)
        total = time.monotonic() - started_at
        phases = make_rows(httpx.get(f"{url}/status").json()["phases"], total)
        if options.kept:
            deadline = time.monotonic() + 60
            while "compiled code kept" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.1)
        answers = [ask(url, prompt=prompt) for prompt in PROMPTS]
        for _ in range(options.crashes if crashes is not None else 0):
            crash = measure_crash(url)
            crashes.append(crash)  # type: ignore[union-attr]
            equal = sum(ask(url, prompt=prompt) == text for prompt, text in zip(PROMPTS, answers, strict=True))
            print(f"crash: {crash[TOTAL]:.1f} s, {equal} of {len(PROMPTS)} greedy answers as before", flush=True)
        if options.log:
            shutil.copy(log, options.log)
        return phases


def measure_crash(url: str) -> Rows:
    """Kills EngineCore, and takes the time until a request that is sent then is answered."""
    leader = psutil.Process(httpx.get(f"{url}/status").json()["pid"])
    (core,) = [each for each in leader.children(recursive=True) if each.name().startswith("VLLM::EngineCore")]
    core.kill()
    crashed_at = time.monotonic()
    if ask(url) is None:
        sys.exit("bench_cold_start: the request was not answered")
    total = time.monotonic() - crashed_at
    return make_rows(httpx.get(f"{url}/status").json()["phases"], total)


def make_rows(phases: list[dict[str, object]], total: float) -> Rows:
    return {str(row["name"]): float(str(row["seconds"])) for row in phases} | {TOTAL: total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the command that stands for `vllm`")
    parser.add_argument("--model", required=True)
    parser.add_argument("--made", type=float, metavar="GB")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--crashes", type=int, default=3)
    parser.add_argument("--only", help="some of the cases, between commas")
    parser.add_argument("--log", type=Path, help="a copy of the supervisor's")
    parser.add_argument("--cold", action="store_true", help="with an empty page cache (root)")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, raw = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    options.kept = "--enforce-eager" not in raw
    options.vllm = str(Path(options.vllm).absolute()) if Path(options.vllm).exists() else options.vllm
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    results: dict[str, list[Rows]] = {"alone": [], "alone again": [], "first": [], "crash": [], "second": []}
    cases = options.only.split(",") if options.only else list(results)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.made:
            (folder / "model").mkdir()
            model = str(make_model(folder / "model", Path(model), options.made, options.hidden))
        for _ in range(options.runs):
            shutil.rmtree(folder / "volume", ignore_errors=True)
            (folder / "volume").mkdir()
            for case in [case for case in cases if case != "crash"]:
                if options.cold:
                    empty_page_cache()
                if case.startswith("alone"):
                    results[case].append(run_alone(options, model, folder, raw, keep=case != "alone"))
                else:
                    results[case].append(
                        run_supervised(options, model, folder, raw, results["crash"] if case == "first" else None)
                    )
                print(f"{case}: {results[case][-1][TOTAL]:.1f} s", flush=True)
    print(f"\n{os.cpu_count()} cores, {platform.machine()}, seconds, median of {options.runs}")
    names = list(dict.fromkeys(name for case in results.values() for row in case for name in row))
    print(f"{'':28}" + "".join(f"{case:>13}" for case in results if results[case]))
    for phase in [name for name in names if name != TOTAL] + [TOTAL]:
        cells = (statistics.median(row.get(phase, 0.0) for row in case) for case in results.values() if case)
        print(f"{phase:28}" + "".join(f"{cell:13.1f}" for cell in cells))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
