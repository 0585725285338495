"""Downloads: the hub's real client in vLLM's environment, a stand-in for the hub, and the fake vLLM behind them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    DEMO,
    FAKE,
    ROOT,
    SUPERVISOR,
    Supervisor,
    clean_environment,
    http,
    mounted,
    session_pids,
    wait_until,
)
from tests.vllm.conftest import VLLM

pytestmark = pytest.mark.vllm

PYTHON = VLLM.with_name("python")
DOWNLOAD = ROOT / "supervisor" / "weights" / "download.py"
MB = 1_000_000
PART = 3 * MB
PARTS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
CHAT = {"model": "org/large", "messages": [{"role": "user", "content": "hi"}]}


def told(*repos: str) -> str:
    """What the downloading program is told to fetch."""
    return json.dumps({"repositories": [{"repo": repo} for repo in repos], "stall": 60})


def safetensors(size: int, seed: int = 0) -> bytes:
    """A file of one tensor, `size` bytes of it random."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(size)


def make_large(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for number, name in enumerate(PARTS):
        (folder / name).write_bytes(safetensors(PART, seed + number))
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(PARTS)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Hub:
    """The stand-in, with `org/tiny`, the demo model, and `org/large`, three files of 3 MB; `more` are its options."""

    def __init__(self, large: Path, *more: str) -> None:
        repos = ("--repo", f"org/tiny={DEMO}", "--repo", f"org/large={large}")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/stand_in_hub.py"), *repos, *more],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def change(self, **wanted: object) -> Any:
        return http.post(f"{self.url}/stand-in", json=wanted).json()

    def sent(self, suffix: str = ".safetensors") -> int:
        """The bytes of such files that it has sent so far."""
        return sum(count for name, count in self.change()["sent"].items() if name.endswith(suffix))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_large(tmp_path_factory.mktemp("models") / "large")


@pytest.fixture
def hub(large: Path) -> Iterator[Hub]:
    with Hub(large) as found:
        yield found


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `vllm` of the real one's Python, and so with the hub's client beside it, which is the fake."""
    assert PYTHON.exists(), "the real vLLM is missing: run scripts/setup"
    program = tmp_path_factory.mktemp("vllm") / "vllm"
    program.write_text(f"#!{PYTHON}\nimport os, sys\nos.execv({str(FAKE)!r}, [{str(FAKE)!r}, *sys.argv[1:]])\n")
    program.chmod(0o755)
    return program


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for temporary files whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory() as found:
        yield Path(found)


class User:
    """Somebody with a home of their own, for whom the hub is ours."""

    def __init__(self, vllm: Path, home: Path) -> None:
        self.vllm, self.home = vllm, home
        self.cache = home / "hf" / "hub"

    def environ(self, hub: Hub, **more: str) -> dict[str, str]:
        own = {"HF_HOME": str(self.home / "hf")} if "SUPERVISOR_VOLUME" not in more else {}
        cache = {"XDG_CACHE_HOME": str(self.vllm.parent / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": hub.url, "HOME": str(self.home), **cache, **own, **more}

    def up(self, hub: Hub, model: str, *, vllm: str = "", **more: str) -> Supervisor:
        return Supervisor(model, vllm=vllm or self.vllm, environ=self.environ(hub, **more))

    def fails(self, hub: Hub, model: str, **more: str) -> str:
        """What it says of a start that can't succeed."""
        with self.up(hub, model, **more) as supervisor:
            assert supervisor.exit_code() == 3, supervisor.output
            return supervisor.output

    def run(self, hub: Hub, repo: str, *before: str, **more: str) -> subprocess.CompletedProcess[str]:
        """The downloading program alone. `before`: what its Python does first."""
        program = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
        started = ["-c", "\n".join((*before, program))]
        words = [PYTHON, *(started if before else ()), DOWNLOAD, told(repo)]
        environ = clean_environment(**self.environ(hub, **more))
        return subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=60)

    def snapshot(self, model: str, cache: Path | None = None) -> Path:
        repository = (cache or self.cache) / f"models--{model.replace('/', '--')}"
        return repository / "snapshots" / (repository / "refs/main").read_text()

    def has(self, model: str, folder: Path) -> bool:
        """Whether its cache has the very files of `folder`, but for what is for people."""
        found = self.snapshot(model)
        files = [path for path in folder.iterdir() if path.suffix != ".md"]
        return all((found / path.name).read_bytes() == path.read_bytes() for path in files)


@pytest.fixture
def user(vllm: Path, tmp_path: Path) -> User:
    return User(vllm, tmp_path)


def engine(supervisor: Supervisor) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of the engine."""
    folder = Path(f"/proc/{supervisor.engine()}")
    argv, environ = ((folder / name).read_text().rstrip("\0").split("\0") for name in ("cmdline", "environ"))
    return argv, dict(line.split("=", 1) for line in environ)


def served(supervisor: Supervisor) -> list[str]:
    return [row["id"] for row in supervisor.client.get("/v1/models").json()["data"]]


# A start, and the next one


def test_a_volume_is_filled_once_and_needs_no_hub_afterwards(user: User, hub: Hub, short: Path) -> None:
    volume = user.home / "volume"
    volume.mkdir()
    more = {"SUPERVISOR_VOLUME": str(volume), "TMPDIR": str(short)}
    with user.up(hub, "org/tiny", **more) as supervisor:
        supervisor.says(
            r"weights: Downloading weights: org/tiny, 6 files, 1\.9 MB, to \S+/volume/huggingface-cache/hub"
        )
        supervisor.ready()
        assert served(supervisor) == ["org/tiny"]
        argv, environ = engine(supervisor)
        folder = user.snapshot("org/tiny", volume / "huggingface-cache" / "hub")
        assert str(folder) in argv
        assert environ["HF_HUB_OFFLINE"] == "1"
        names = [phase["name"] for phase in supervisor.client.get("/status").json()["phases"]]
        assert names[:3] == ["asking the hub", "fetching weights", "importing vLLM"]
    hub.stop()
    with user.up(hub, "org/tiny", **more) as supervisor:
        supervisor.says(r"supervisor: weights: on the volume, ")
        supervisor.ready()
        assert served(supervisor) == ["org/tiny"]
        argv, environ = engine(supervisor)
        assert str(folder) in argv
        assert environ["HF_HUB_OFFLINE"] == "1"


def test_a_cache_is_asked_for_news_and_served_all_the_same_without_a_hub(user: User, large: Path) -> None:
    folder = user.home / "model"
    shutil.copytree(DEMO, folder)
    with Hub(large, "--repo", f"org/moves={folder}") as hub:
        assert user.run(hub, "org/moves").returncode == 0
        old = user.snapshot("org/moves")
        (folder / "generation_config.json").write_text("{}")
        with user.up(hub, "org/moves") as supervisor:
            supervisor.says(r"the hub has a newer org/moves: \w{12}, not \w{12}")
            supervisor.says(r"Downloading weights: org/moves, 1 files, 0\.0 MB")  # what is the same is there already
            supervisor.ready()
            new = user.snapshot("org/moves")
            assert new != old
            assert str(new) in engine(supervisor)[0]
        assert hub.sent() == (DEMO / "model.safetensors").stat().st_size
    with user.up(hub, "org/moves") as supervisor:
        supervisor.says(r"weights: The hub could not be reached: .*refused.* Serving what is in the cache: ")
        supervisor.ready()
        assert str(new) in engine(supervisor)[0]
        assert served(supervisor) == ["org/moves"]


def test_fetch(user: User, hub: Hub) -> None:
    def fetch(model: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [SUPERVISOR, "fetch", model], capture_output=True, text=True, check=False, timeout=60, cwd=user.home,
            env=clean_environment(**user.environ(hub, **{"SUPERVISOR_VLLM": str(user.vllm)} | more)),
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    code, said = fetch("org/tiny")
    assert code == 0
    assert said.endswith(f"weights: {user.snapshot('org/tiny')}\n")
    assert user.has("org/tiny", DEMO)
    assert fetch("org/tiny", HF_HUB_OFFLINE="1")[0] == 0
    code, said = fetch("org/large", HF_HUB_OFFLINE="1")
    assert (code, "org/large is not in the cache, and HF_HUB_OFFLINE forbids" in said) == (3, True)
    assert fetch("org/large", VLLM_USE_MODELSCOPE="1") == (3, "supervisor: org/large: left to vLLM\n")
    code, said = fetch("org/nosuch", HF_TOKEN="hf_member")
    assert (code, "There is no model org/nosuch on the hub" in said) == (3, True)
    code, said = fetch("org/large", SUPERVISOR_VLLM=str(FAKE))  # in a Python that has no such client
    assert (code, "huggingface_hub, is not in vLLM's environment" in said) == (3, True)


def test_only_what_is_read_is_fetched(user: User, large: Path) -> None:
    folder = user.home / "model"
    shutil.copytree(large, folder)
    unread = [
        "pytorch_model.bin", "original/consolidated.pth", "original/params.json", "onnx/model.onnx", "tf_model.h5",
        "model.nemo", "last.ckpt", "weights.npz", "all.tar.gz", "all.zip", "demo.mp4", "m.litertlm", "README.md",
        "runs/Nov27/events.out.tfevents.1", "checkpoint-500/model.safetensors", "m-Q4_K_M.gguf",
    ]  # fmt: skip
    read = [
        "tokenizer.json", "merges.txt", "tokenizer.model", "qwen.tiktoken", "chat_template.jinja", "modeling_x.py",
        "additional_chat_templates/tool_use.jinja", "2_Dense/model.safetensors", "2_Dense/config.json",
    ]  # fmt: skip
    extra = dict.fromkeys(unread, 0) | dict.fromkeys(read, 1)
    for name in extra:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(safetensors(1000))
    with Hub(large, "--repo", f"org/more={folder}") as hub:
        assert user.run(hub, "org/more").returncode == 0
        found = user.snapshot("org/more")
        there = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
        assert there == {path.name for path in large.iterdir()} | {name for name, wanted in extra.items() if wanted}


def test_no_weights_are_fetched_for_dummy_ones(user: User, hub: Hub) -> None:
    with user.up(hub, "org/large", LOAD_FORMAT="dummy") as supervisor:
        supervisor.ready()
        assert hub.sent() == 0
        assert (user.snapshot("org/large") / "config.json").exists()


def test_a_revision(user: User, large: Path, tmp_path: Path) -> None:
    other = make_large(tmp_path / "other", seed=7)
    with Hub(large, "--repo", f"org/large@v2={other}") as hub, user.up(hub, "org/large", REVISION="v2") as supervisor:
        supervisor.ready()
        commit = (user.cache / "models--org--large/refs/v2").read_text()
        folder = user.cache / "models--org--large/snapshots" / commit
        assert str(folder) in engine(supervisor)[0]
        assert (folder / PARTS[0]).read_bytes() == (other / PARTS[0]).read_bytes()
        assert user.fails(hub, "org/large", REVISION="v3").count("org/large has no revision v3. Check REVISION.")


def test_code_of_another_repository_may_be_asked_for(user: User, large: Path, tmp_path: Path) -> None:
    folder = make_large(tmp_path / "code")
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "org/other--configuration.Config"}}')
    with Hub(large, "--repo", f"org/code={folder}") as hub, user.up(hub, "org/code") as supervisor:
        supervisor.ready()
        assert "HF_HUB_OFFLINE" not in engine(supervisor)[1]


GGUF = "is GGUF, and this vLLM has no GGUF. Install its GGUF plugin (vllm-gguf-plugin) beside it, or set MODEL to the"


def make_gguf(folder: Path) -> Path:
    folder.mkdir()
    for name in ("m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"):
        (folder / name).write_bytes(b"GGUF")
    return folder


@pytest.mark.parametrize("model", ["org/gguf", "org/gguf:Q4_K_M", "FILE"])
def test_gguf_is_told_of_before_anything_is_downloaded(user: User, large: Path, tmp_path: Path, model: str) -> None:
    folder = make_gguf(tmp_path / "gguf")
    model = model.replace("FILE", str(folder / "m-Q4_K_M.gguf"))
    with Hub(large, "--repo", f"org/gguf={folder}") as hub:
        assert f"{model} {GGUF}" in user.fails(hub, model)
        assert hub.sent(".gguf") == 0


def test_gguf_is_left_to_its_plugin(user: User, large: Path, tmp_path: Path) -> None:
    folder = make_gguf(tmp_path / "gguf")
    info = tmp_path / "plugins" / "vllm_gguf_plugin-0.0.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-gguf-plugin\nVersion: 0.0.5\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ngguf = vllm_gguf_plugin:register\n")
    with Hub(large, "--repo", f"org/gguf={folder}") as hub:
        for model in ("org/gguf", "org/gguf:Q4_K_M"):
            with user.up(hub, model, PYTHONPATH=str(info.parent)) as supervisor:
                supervisor.ready()
                argv, environ = engine(supervisor)
                assert model in argv
                assert "HF_HUB_OFFLINE" not in environ
        assert GGUF in user.fails(hub, "org/gguf", PYTHONPATH=str(info.parent), VLLM_PLUGINS="another")
        assert hub.sent(".gguf") == 0


@pytest.mark.parametrize("load_format", ["runai_streamer", "sharded_state", "tensorizer"])
def test_a_format_that_has_its_own_way_is_left_to_vllm(user: User, hub: Hub, load_format: str) -> None:
    with user.up(hub, "org/tiny", LOAD_FORMAT=load_format) as supervisor:
        supervisor.says(rf"weights: left to vLLM, whose {load_format} has them in a way of its own")
        supervisor.ready()
        assert "org/tiny" in engine(supervisor)[0]
    assert hub.change()["requests"] == 0


# What vLLM reads beside the model


ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": safetensors(1000), "optimizer.pt": b"x"}


@pytest.fixture
def beside(large: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub with `org/sql`, an adapter, and `org/words`, a tokenizer with somebody's weights, as well."""
    for name, content in ADAPTER.items():
        (tmp_path / "sql" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "sql" / name).write_bytes(content)
    shutil.copytree(DEMO, tmp_path / "words")
    folders = {"sql": tmp_path / "sql", "words": tmp_path / "words", "gated": DEMO}
    repos = [word for name, folder in folders.items() for word in ("--repo", f"org/{name}={folder}")]
    with Hub(large, *repos, "--gated", "org/gated", "--private", "org/private") as hub:
        yield hub


def test_what_is_read_beside_the_model_is_fetched_as_well(user: User, beside: Hub) -> None:
    more = {
        "TOKENIZER": "org/words",
        "SPECULATIVE_CONFIG": '{"model": "org/large", "num_speculative_tokens": 3}',
        "ENABLE_LORA": "true",
        "LORA_MODULES": "sql=org/sql",
    }
    with user.up(beside, "org/tiny", **more) as supervisor:
        supervisor.ready()
        for line in ("org/tiny, 6 files", "org/words, 5 files", "org/large, 4 files, 9.0 MB", "org/sql, 2 files"):
            assert f"weights: Downloading weights: {line}" in supervisor.output
        argv, environ = engine(supervisor)
        assert argv[argv.index("--tokenizer") + 1] == str(user.snapshot("org/words"))
        draft = json.loads(argv[argv.index("--speculative-config") + 1])
        assert draft == {"model": str(user.snapshot("org/large")), "num_speculative_tokens": 3}
        assert argv[argv.index("--lora-modules") + 1] == f"sql={user.snapshot('org/sql')}"
        assert environ["HF_HUB_OFFLINE"] == "1"
        assert served(supervisor)[0] == "org/tiny"
        assert "--tokenizer org/words" in supervisor.client.get("/status").json()["command"]
    assert not (user.snapshot("org/words") / "model.safetensors").exists()
    assert not (user.snapshot("org/sql") / "optimizer.pt").exists()
    sent = beside.sent("")
    with user.up(beside, "org/tiny", **more) as supervisor:
        supervisor.ready()
        assert f"sql={user.snapshot('org/sql')}" in engine(supervisor)[0]
    assert beside.sent("") == sent
    beside.stop()
    with user.up(beside, "org/tiny", **more) as supervisor:
        supervisor.ready()
        assert f"sql={user.snapshot('org/sql')}" in engine(supervisor)[0]
        assert supervisor.output.count("The hub could not be reached") == 1


@pytest.mark.parametrize(
    ("setting", "value", "cause", "remedy"),
    [
        ("TOKENIZER", "org/nosuch", "There is no model org/nosuch on the hub", "Check the spelling of TOKENIZER"),
        ("SPECULATIVE_CONFIG", '{"model": "org/gated"}', "org/gated is gated, and no token was given", "HF_TOKEN"),
        ("LORA_MODULES", "a=org/private", "There is no model org/private on the hub", "spelling of LORA_MODULES"),
    ],
)
def test_what_is_refused_beside_the_model_is_told_before_the_model_comes(
    user: User, beside: Hub, setting: str, value: str, cause: str, remedy: str
) -> None:
    output = user.fails(beside, "org/large", **{setting: value, "ENABLE_LORA": "true"})
    last = output.rstrip().splitlines()[-1]
    assert cause in last
    assert remedy in last
    assert beside.sent() == 0


def test_what_is_read_beside_the_model_is_baked_with_it(user: User, beside: Hub) -> None:
    environ = user.environ(
        beside, SUPERVISOR_VLLM=str(user.vllm), TOKENIZER="org/words", LORA_MODULES="sql=org/sql", ENABLE_LORA="true"
    )
    for comes in (True, False):
        done = subprocess.run(
            [SUPERVISOR, "fetch", "org/tiny"], env=clean_environment(**environ), capture_output=True, text=True,
            check=False, timeout=60, cwd=user.home,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert ("Downloading weights" in done.stdout) is comes
        for name in ("org/tiny", "org/words", "org/sql"):
            assert f"weights: {user.snapshot(name)}\n" in done.stdout


def test_a_model_in_a_folder_with_a_tokenizer_of_the_hub(user: User, beside: Hub) -> None:
    with user.up(beside, str(DEMO), TOKENIZER="org/words") as supervisor:
        supervisor.ready()
        argv, environ = engine(supervisor)
        assert str(DEMO) in argv
        assert str(user.snapshot("org/words")) in argv
        assert "HF_HUB_OFFLINE" not in environ
    assert beside.sent() == 0


def test_a_vllm_that_is_no_python_script_downloads_by_itself(user: User, hub: Hub, vllm: Path, tmp_path: Path) -> None:
    script = tmp_path / "vllm"
    script.write_text(f'#!/bin/sh\nexec {vllm} "$@"\n')
    script.chmod(0o755)
    for command in (str(script), f"nice {vllm}"):
        with user.up(hub, "org/tiny", vllm=command) as supervisor:
            supervisor.ready()
            assert "org/tiny" in engine(supervisor)[0]
    assert hub.change()["requests"] == 0


def test_what_a_folder_lacks_is_vllms_to_tell(user: User, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to("nowhere")
    with user.up(hub, str(folder)) as supervisor:
        supervisor.ready()
        assert str(folder) in engine(supervisor)[0]
    assert hub.change()["requests"] == 0


# Trouble on the way


def test_connections_that_break_off(user: User, hub: Hub, large: Path) -> None:
    hub.change(cut=2 * MB)
    assert user.run(hub, "org/large").returncode == 0
    assert user.has("org/large", large)
    assert hub.sent() < 3 * (PART + 200_000)  # what came of a piece of 64 KiB that is not whole is lost


def test_connections_that_break_off_within_each_megabyte(user: User, hub: Hub, large: Path) -> None:
    hub.change(cut=MB // 2)
    assert user.run(hub, "org/large").returncode == 0
    assert user.has("org/large", large)


def test_a_slow_line_shows_how_far_it_is(user: User, hub: Hub) -> None:
    hub.change(rate=400_000)  # for each of three files
    with user.up(hub, "org/large", SUPERVISOR_HOLD_TIMEOUT="0.2") as supervisor:
        line = r"Downloading weights: ([\d.]+ MB of 9\.0 MB, [\d.]+ MB/s, \d+ s left)"
        supervisor.says(line)
        wait_until(lambda: supervisor.client.get("/status").json()["progress"].endswith("s left"), "progress")
        status = supervisor.client.get("/status").json()
        assert (status["state"], status["phases"][-1]["name"]) == ("starting", "fetching weights")
        answer = supervisor.client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 503
        assert re.search(r"fetching weights \([\d.]+ MB of 9\.0 MB", answer.text)
        hub.change(rate=0)
        supervisor.ready()
        assert supervisor.client.get("/status").json()["progress"] == ""


def test_a_download_that_goes_on_may_take_longer_than_vllms_start(user: User, hub: Hub) -> None:
    hub.change(rate=MB // 2)
    with user.up(hub, "org/large", SUPERVISOR_STARTUP_TIMEOUT="4") as supervisor:
        supervisor.ready()


def test_a_line_that_stands_still(user: User, hub: Hub, large: Path) -> None:
    hub.change(stall=2 * MB)
    with user.up(hub, "org/large", SUPERVISOR_STALL_TIMEOUT="1.5") as supervisor:
        supervisor.says(r"cannot be had now: The download stands still: not a byte came in 1\.5 s\.")
        hub.change(stall=0)
        supervisor.says(r"vLLM ended \(exit code 4\): The download stands still: .*tried again")
        supervisor.says(r"restart 1 of 5")
        supervisor.says(r"(?s)restarting -> starting.*starting -> ready")
        assert user.has("org/large", large)
        assert hub.sent() < 3 * (PART + MB + 10_000)  # and not from the beginning


def test_a_newer_one_that_does_not_come_is_done_without(user: User, large: Path) -> None:
    folder = user.home / "model"
    shutil.copytree(large, folder)
    with Hub(large, "--repo", f"org/moves={folder}") as hub:
        assert user.run(hub, "org/moves").returncode == 0
        old = user.snapshot("org/moves")
        (folder / PARTS[0]).write_bytes(safetensors(PART, 9))
        hub.change(stall=2 * MB)
        with user.up(hub, "org/moves", SUPERVISOR_STALL_TIMEOUT="1") as supervisor:
            supervisor.says(r"The download stands still: .* Serving what is in the cache: ")
            supervisor.ready()
            assert str(old) in engine(supervisor)[0]
        # Half of a newer one is nothing that is served without a hub.
        hub.change(fail=503)
        with user.up(hub, "org/moves") as supervisor:
            supervisor.ready()
            assert str(old) in engine(supervisor)[0]


@pytest.mark.parametrize("trouble", [{"fail": 429, "retry_after": 0.1}, {"fail": 500}])
def test_a_hub_in_trouble(user: User, hub: Hub, trouble: dict[str, int]) -> None:
    hub.change(**trouble, fail_times=1)
    done = user.run(hub, "org/tiny")
    assert done.returncode == 0
    assert re.search(rf"weights: the hub did not answer \(.*{trouble['fail']} ", done.stdout)


def test_a_client_that_can_not_be_told_to_keep_halves(user: User, hub: Hub) -> None:
    """It is told, for a download that breaks off then begins anew; and nothing else is lost."""
    hub.change(flip=PARTS[0])
    for change in ("file_download.fetch = file_download.http_get", "file_download.TEMPORARY = 1"):
        before = ["import uuid", "from huggingface_hub import file_download"]
        if "fetch" in change:
            before += ["real = file_download.http_get", "def fetch(*a, **more): return real(*a, **more)"]
            before += ["file_download.http_get = fetch"]  # whose parameters say nothing
        else:
            before += ["uuid.uuid4 = lambda: type('Name', (), {'hex': 'ANOTHER-'})"]
        done = user.run(hub, "org/large", *before)
        assert "weights: what breaks off begins anew: huggingface_hub " in done.stdout
        assert f"{PARTS[0]} came damaged" in done.stdout


def test_a_client_that_can_not_tell_beforehand(user: User, hub: Hub, large: Path) -> None:
    before = (
        "import functools, huggingface_hub",
        "theirs = huggingface_hub.snapshot_download",
        "def plain(repo_id, *, revision, cache_dir, allow_patterns):",
        "    return theirs(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=allow_patterns)",
        "huggingface_hub.snapshot_download = plain",
    )
    done = user.run(hub, "org/large", *before)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights: this huggingface_hub can't tell beforehand what comes" in done.stdout
    assert user.has("org/large", large)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "http_proxy"])
def test_a_proxy_that_is_dead_is_named(user: User, hub: Hub, name: str) -> None:
    proxies = {name: "http://user:planted@127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    if name == "HTTPS_PROXY":
        proxies["HF_ENDPOINT"] = "https://hub.invalid"
    before = ("import time", "time.sleep = lambda _: None")
    done = user.run(hub, "org/tiny", *before, **proxies)
    assert done.returncode == 4
    assert re.search(rf"cannot be had now: .* \| Check the network, HF_ENDPOINT, {name.upper()}; it is", done.stdout)
    assert "planted" not in done.stdout


def test_a_hub_that_wants_no_more_of_us(user: User, hub: Hub) -> None:
    hub.change(fail=429, retry_after=0.1)
    done = user.run(hub, "org/tiny")
    assert done.returncode == 4
    assert "cannot be had now: The hub turned us away: too many requests (429). | Set HF_TOKEN" in done.stdout


def test_an_error_in_between_costs_nothing_that_has_come(user: User, hub: Hub, large: Path) -> None:
    hub.change(cut=2 * MB)
    arguments: list[str | Path] = [PYTHON, DOWNLOAD, told("org/large")]
    environ = clean_environment(**user.environ(hub))
    with subprocess.Popen(arguments, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: hub.sent() >= 6 * MB, "the first halves")
        hub.change(fail=500, fail_times=3)
        output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0
    assert "the download broke off (" in output
    assert user.has("org/large", large)
    assert hub.sent() < 3 * (PART + MB + 10_000)


def test_a_file_that_comes_damaged(user: User, hub: Hub, large: Path) -> None:
    hub.change(flip=PARTS[1])
    with user.up(hub, "org/large") as supervisor:
        supervisor.says(
            rf"cannot be had now: {PARTS[1]} came damaged: the checksum is not the hub's\. \| It was deleted"
        )
        hub.change(flip="")
        supervisor.says(r"Downloading weights: org/large, 1 files, 3\.0 MB")
        supervisor.says(r"(?s)restarting -> starting.*starting -> ready")
        assert user.has("org/large", large)
        assert hub.sent() < 4 * (PART + 1000)


def test_a_small_file_that_comes_damaged(user: User, hub: Hub) -> None:
    hub.change(flip="config.json")
    assert "config.json came damaged" in user.run(hub, "org/tiny").stdout
    hub.change(flip="")
    assert user.run(hub, "org/tiny").returncode == 0
    assert user.has("org/tiny", DEMO)


# What can't be had


@pytest.mark.parametrize(
    ("model", "more", "cause", "remedy"),
    [
        ("org/gated", {}, "org/gated is gated, and no token was given", "set HF_TOKEN"),
        ("org/gated", {"HF_TOKEN": "hf_outsider"}, "gated, and HF_TOKEN gives no access to it", "Accept its terms"),
        ("org/private", {}, "There is no model org/private on the hub, or it is private", "spelling of MODEL"),
        ("org/private", {"HF_TOKEN": "hf_outsider"}, "There is no model org/private on the hub", "HF_TOKEN"),
        ("org/nosuch", {"HF_TOKEN": "hf_member"}, "There is no model org/nosuch on the hub", "spelling of MODEL"),
        ("org/tiny", {"HF_TOKEN": "hf_of_nobody"}, "The hub does not know the token", "HF_TOKEN"),
        ("org/tiny", {"REVISION": "v9"}, "org/tiny has no revision v9", "REVISION"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses(
    user: User, large: Path, model: str, more: dict[str, str], cause: str, remedy: str
) -> None:
    with Hub(large, "--repo", f"org/gated={DEMO}", "--gated", "org/gated", "--private", "org/private") as hub:
        output = user.fails(hub, model, **more)
    last = output.rstrip().splitlines()[-1]
    assert cause in last
    assert remedy in last
    assert "another start would end the same way" in last
    assert more.get("HF_TOKEN", "hf_member") not in output


def test_who_may_reads_what_is_gated(user: User, large: Path) -> None:
    repo = ("--repo", f"org/gated={DEMO}", "--gated", "org/gated")
    with Hub(large, *repo) as hub, user.up(hub, "org/gated", HF_TOKEN="hf_member") as supervisor:
        supervisor.ready()
        assert "hf_member" not in supervisor.output


def test_a_repository_that_is_not_whole(user: User, large: Path, tmp_path: Path) -> None:
    folder = make_large(tmp_path / "half")
    (folder / PARTS[2]).unlink()
    with Hub(large, "--repo", f"org/half={folder}") as hub:
        output = user.fails(hub, "org/half")
        assert f"org/half lacks {PARTS[2]} on the hub itself. Check MODEL and REVISION." in output
        assert hub.sent() == 0


def test_offline_and_nothing_there(user: User, hub: Hub) -> None:
    output = user.fails(hub, "org/tiny", HF_HUB_OFFLINE="1")
    assert "org/tiny is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub. Unset HF_HUB_OFFLINE" in output
    assert hub.change()["requests"] == 0


# Disks


def test_a_disk_that_is_too_small(user: User, hub: Hub) -> None:
    with mounted(user.home / "hf", "-t", "tmpfs", "-o", "size=6m", "tmpfs"):
        output = user.fails(hub, "org/large")
        assert re.search(r"org/large needs 9\.0 MB more, and \S+ has [56]\.\d MB free\. .*HF_HOME", output)
        assert hub.sent() == 0


def test_a_disk_that_becomes_full(user: User, hub: Hub) -> None:
    hub.change(rate=MB)
    with mounted(user.home / "hf", "-t", "tmpfs", "-o", "size=12m", "tmpfs") as disk:
        with user.up(hub, "org/large") as supervisor:
            wait_until(lambda: hub.sent() > 0, "the first bytes")
            with contextlib.suppress(OSError), (disk / "other").open("wb") as file:
                while True:
                    file.write(bytes(100_000))
            hub.change(rate=0)
            assert supervisor.exit_code() == 3
            assert "The disk became full while org/large came to" in supervisor.output
        (disk / "other").unlink()
        assert user.run(hub, "org/large").returncode == 0


def test_what_is_there_already_needs_no_room(user: User, large: Path) -> None:
    folder = user.home / "model"
    shutil.copytree(large, folder)
    with (
        mounted(user.home / "hf", "-t", "tmpfs", "-o", "size=12m", "tmpfs"),
        Hub(large, "--repo", f"org/moves={folder}") as hub,
    ):
        assert user.run(hub, "org/moves").returncode == 0
        (folder / "generation_config.json").write_text("{}")
        assert user.run(hub, "org/moves").returncode == 0
        assert user.has("org/moves", folder)


def test_what_was_killed_a_moment_ago_takes_no_room(user: User, hub: Hub, large: Path) -> None:
    blobs = user.cache / "models--org--large/blobs"
    with mounted(user.home / "hf", "-t", "tmpfs", "-o", "size=12m", "tmpfs"):
        blobs.mkdir(parents=True)
        (user.cache / ".locks/models--org--large").mkdir(parents=True)
        (blobs / f"{hashlib.sha256((large / PARTS[0]).read_bytes()).hexdigest()}.0123abcd.incomplete").write_bytes(
            bytes(5 * MB)
        )
        done = user.run(hub, "org/large")
        assert done.returncode == 0, done.stdout
        assert user.has("org/large", large)


def test_a_repository_that_is_named_twice_comes_once(user: User, hub: Hub, large: Path) -> None:
    with mounted(user.home / "hf", "-t", "tmpfs", "-o", "size=12m", "tmpfs"):
        words: list[str | Path] = [PYTHON, DOWNLOAD, told("org/large", "org/large")]
        environ = clean_environment(**user.environ(hub))
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("weights: Downloading weights: org/large, ") == 1
        assert done.stdout.count(f"weights: {user.snapshot('org/large')}\n") == 2
        assert user.has("org/large", large)
        assert hub.sent() < 3 * (PART + 1000)


def test_a_cache_that_is_read_only(user: User, hub: Hub) -> None:
    (user.home / "hf").mkdir()
    with mounted(user.home / "hf", "--bind", "-o", "ro", str(user.home / "hf")):
        output = user.fails(hub, "org/tiny")
        assert re.search(r"hf/hub is read-only\. Mount it writable, or point HF_HOME at", output)


def test_a_cache_below_a_file(user: User, hub: Hub) -> None:
    (user.home / "hf").write_text("")
    assert "can't be written to (Not a directory). Point HF_HOME at" in user.fails(hub, "org/tiny")


# A cache that others write, or left unfinished


def test_two_workers_fill_one_cache(user: User, hub: Hub, large: Path) -> None:
    hub.change(rate=4 * MB)
    arguments: list[str | Path]
    arguments, environ = [PYTHON, DOWNLOAD, told("org/large")], clean_environment(**user.environ(hub))
    both = [subprocess.Popen(arguments, env=environ, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert user.has("org/large", large)
    assert hub.sent() < 3 * (PART + 1000)  # one of them waited
    assert not list(user.cache.rglob("*.incomplete"))


def damage(path: Path, how: str) -> None:
    blob = path.resolve()
    if how == "cut short":
        os.truncate(blob, 1000)
    elif how == "emptied":
        os.truncate(blob, 0)
    elif how == "garbage":
        blob.write_bytes(b"\xff" * blob.stat().st_size)
    elif how == "pointer":
        blob.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3000000\n")
    elif how == "dangling":
        blob.unlink()
    elif how == "never came":
        blob.unlink()
        path.unlink()


@pytest.mark.parametrize("how", ["cut short", "garbage", "pointer", "dangling", "never came"])
def test_a_cache_that_is_not_whole(user: User, hub: Hub, large: Path, how: str) -> None:
    assert user.run(hub, "org/large").returncode == 0
    before = hub.sent()
    damage(user.snapshot("org/large") / PARTS[1], how)
    done = user.run(hub, "org/large")
    assert "Downloading weights: org/large, 1 files, 3.0 MB" in done.stdout
    assert user.has("org/large", large)
    assert hub.sent() - before == (large / PARTS[1]).stat().st_size


def test_a_start_from_a_cache_that_is_not_whole(user: User, hub: Hub, large: Path) -> None:
    assert user.run(hub, "org/large").returncode == 0
    damage(user.snapshot("org/large") / PARTS[1], "cut short")
    with user.up(hub, "org/large") as supervisor:
        why = rf"{PARTS[1]} is not complete: 1000 of \d+ bytes"
        supervisor.says(rf"org/large is in the hub's cache \(\S+\), but not whole: {why}")
        supervisor.ready()
        assert user.has("org/large", large)


@pytest.mark.parametrize(("how", "why"), [("dangling", "missing"), ("emptied", "not complete: 0 of 1 bytes")])
def test_a_configuration_that_is_gone_comes_again(user: User, hub: Hub, how: str, why: str) -> None:
    assert user.run(hub, "org/tiny").returncode == 0
    damage(user.snapshot("org/tiny") / "config.json", how)
    with user.up(hub, "org/tiny") as supervisor:
        supervisor.says(rf"org/tiny is in the hub's cache \(\S+\), but not whole: config\.json is {why}")
        supervisor.ready()
        assert user.has("org/tiny", DEMO)


def test_files_of_an_unfinished_download_are_checked_by_the_next(user: User, hub: Hub, large: Path) -> None:
    assert user.run(hub, "org/large").returncode == 0
    found = user.snapshot("org/large")
    (user.cache / "models--org--large/refs/main").unlink()  # written last
    with (found / PARTS[0]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    (found / PARTS[1]).unlink()
    assert f"{PARTS[0]} came damaged" in user.run(hub, "org/large").stdout
    assert user.run(hub, "org/large").returncode == 0
    assert user.has("org/large", large)
    # The same where nothing is missing, and so it is in the cache by all appearances.
    (user.cache / "models--org--large/refs/main").unlink()
    with (found / PARTS[0]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with user.up(hub, "org/large") as supervisor:
        supervisor.says(rf"cannot be had now: {PARTS[0]} came damaged")
        supervisor.says(r"(?s)restarting -> starting.*starting -> ready")
    assert user.has("org/large", large)


def test_sigterm_during_a_download(user: User, hub: Hub, large: Path) -> None:
    hub.change(rate=2 * MB)
    with user.up(hub, "org/large") as supervisor:
        wait_until(lambda: hub.sent() > 5 * MB, "half of it", 20)
        session = supervisor.engine()
        supervisor.signal(signal.SIGTERM)
        began = time.monotonic()
        assert supervisor.exit_code() == 0
        assert time.monotonic() - began < 2
        assert session_pids(session) == []
    hub.change(rate=0)
    with user.up(hub, "org/large") as supervisor:
        supervisor.ready()
        assert user.has("org/large", large)
        assert hub.sent() < 3 * (PART + MB + 500_000)  # what came of the last piece is lost
    assert not list(user.cache.rglob("*.kept.incomplete"))


def test_halves_of_the_dead_are_removed_and_those_of_the_living_are_not(user: User, hub: Hub) -> None:
    blobs, locks = user.cache / "models--org--tiny/blobs", user.cache / ".locks/models--org--tiny"
    blobs.mkdir(parents=True)
    locks.mkdir(parents=True)
    names = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("dead", "living", "young", "kept")}
    halves = {name: blobs / f"{names[name]}.01234567.incomplete" for name in ("dead", "living", "young")}
    halves["kept"] = blobs / f"{names['kept']}.kept.incomplete"  # of a file that is wanted no more
    for path in halves.values():
        path.write_bytes(bytes(1000))
        os.utime(path, (1, 1))
    os.utime(halves["young"])
    (locks / f"{names['living']}.lock").touch()
    with subprocess.Popen(
        ["flock", str(locks / f"{names['living']}.lock"), "sh", "-c", "echo held; exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert user.run(hub, "org/tiny").returncode == 0
        holder.communicate()
    assert {name for name, path in halves.items() if path.exists()} == {"living", "young"}
