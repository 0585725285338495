#!/usr/bin/env python3
"""The waterfall of a cold start: `vllm serve` alone, the supervisor's first start, and its second, with a volume.

    .venv/bin/python scripts/bench_cold_start.py --vllm .vllm/bin/vllm --model supervisor/demo/model [--cold]
        [--made GB] [--runs 1] [--json FILE] -- --max-model-len 1024

Each start is one in a new container: an empty home, an empty folder for temporary files, with --cold (root) an empty
page cache, too. Only the volume outlives it, and the second start finds there what the first one left: compiled code,
and the weights, if they came from the hub. `--made GB` serves a Llama of that size, of noise, with the tokenizer of
--model: one whose weights take some time to read. vLLM's own arguments stand behind `--`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from supervisor.around.phases import Waterfall

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 1200.0
TOTAL = "ready"
Rows = dict[str, float]


def made(folder: Path, like: Path, gigabytes: float) -> Path:
    """A Llama in bfloat16: as many layers of 2048 as it takes, in files of four layers each."""
    hidden, inner, vocabulary, kv = 2048, 8192, 1024, 512
    layer = 2 * (hidden * (2 * hidden + 2 * kv) + 3 * hidden * inner + 2 * hidden)
    layers = max(2, round(gigabytes * 1e9 / layer))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "torch_dtype": "bfloat16",
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    for path in like.glob("*token*"):
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
    noise = struct.pack("<8H", *range(0x3C00, 0x3C08)) * 65536  # small numbers: what they are does not matter
    for number, tensors in enumerate(shapes, 1):
        header, end = {}, 0
        for name, shape in tensors.items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        head = json.dumps(header).encode()
        with (folder / f"model-{number:05}-of-{len(shapes):05}.safetensors").open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            while end > 0:
                end -= file.write(noise[: min(end, len(noise))])
    os.sync()
    return folder


def empty_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def fresh(folder: Path) -> dict[str, str]:
    """The environment of a container that has just been made."""
    for name in ("home", "tmp"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("SUPERVISOR_", "XDG_"))}
    keep.pop("PYTHONDONTWRITEBYTECODE", None)
    return keep | {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}


@contextlib.contextmanager
def running(command: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
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


def hear(process: subprocess.Popen[str], waterfall: Waterfall, log: Path, ready: Callable[[], bool]) -> None:
    """Until it is ready; its lines go to the waterfall."""
    assert process.stdout is not None
    source = process.stdout

    def read() -> None:
        with log.open("a") as file:
            for line in source:
                waterfall.hear(line.rstrip())
                file.write(line)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"bench_cold_start: it does not get ready:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)


def answers(url: str, uds: str | None = None) -> bool:
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=uds), timeout=5) as client:
            return client.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def alone(options: argparse.Namespace, model: str, folder: Path, raw: list[str]) -> Rows:
    environ = fresh(folder)
    socket, log = str(folder / "tmp" / "alone.sock"), folder / "alone.log"
    began = time.monotonic()
    waterfall = Waterfall(began)
    log.unlink(missing_ok=True)
    command = [*shlex.split(options.vllm), "serve", model, "--uds", socket, *raw]
    with running(command, environ) as process:
        hear(process, waterfall, log, lambda: answers("http://vllm/health", socket))
        waterfall.finish()
        return rows(waterfall.as_rows(), time.monotonic() - began)


def supervised(options: argparse.Namespace, model: str, folder: Path, raw: list[str]) -> Rows:
    port = 18000 + os.getpid() % 1000
    environ = fresh(folder) | {
        "SUPERVISOR_VLLM": options.vllm, "SUPERVISOR_VOLUME": str(folder / "volume"), "PORT": str(port),
    }  # fmt: skip
    log = folder / "supervised.log"
    log.unlink(missing_ok=True)
    began = time.monotonic()
    command = [sys.executable, "-P", "-m", "supervisor", "up", model, "--", *raw]
    with running(command, environ) as process:
        hear(process, Waterfall(began), log, lambda: answers(f"http://127.0.0.1:{port}/health"))
        total = time.monotonic() - began
        status = httpx.get(f"http://127.0.0.1:{port}/status").json()
        if options.kept:
            deadline = time.monotonic() + 60
            while "compiled code kept" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.1)
        return rows(status["phases"], total)


def rows(phases: list[dict[str, object]], total: float) -> Rows:
    return {str(row["name"]): float(str(row["seconds"])) for row in phases} | {TOTAL: total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the command that stands for `vllm`")
    parser.add_argument("--model", required=True)
    parser.add_argument("--made", type=float, metavar="GB")
    parser.add_argument("--cold", action="store_true", help="with an empty page cache (root)")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, raw = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    options.kept = "--enforce-eager" not in raw
    options.vllm = str(Path(options.vllm).absolute()) if Path(options.vllm).exists() else options.vllm
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    found: dict[str, list[Rows]] = {"alone": [], "first": [], "second": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.made:
            (folder / "model").mkdir()
            model = str(made(folder / "model", Path(model), options.made))
        for _ in range(options.runs):
            shutil.rmtree(folder / "volume", ignore_errors=True)
            (folder / "volume").mkdir()
            for case, starts in found.items():
                if options.cold:
                    empty_page_cache()
                start = alone if case == "alone" else supervised
                starts.append(start(options, model, folder, raw))
                print(f"{case}: {starts[-1][TOTAL]:.1f} s", flush=True)
    print(f"\n{os.cpu_count()} cores, {platform.machine()}, seconds, median of {options.runs}")
    names = list(dict.fromkeys(name for case in found.values() for row in case for name in row))
    print(f"{'':28}" + "".join(f"{case:>10}" for case in found))
    for phase in [name for name in names if name != TOTAL] + [TOTAL]:
        cells = (statistics.median(row.get(phase, 0.0) for row in case) for case in found.values())
        print(f"{phase:28}" + "".join(f"{cell:10.1f}" for cell in cells))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
