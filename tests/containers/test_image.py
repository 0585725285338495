"""The image as its users meet it: `docker build`, `docker run`, `docker stop`, on the real vLLM where that matters."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.vllm import catalogue
from supervisor.vllm.installed import PINNED
from tests.containers.conftest import MODEL, RIG, START, Container, podman, ran, rig, volume
from tests.harness import DEMO, ROOT, Supervisor, clean_environment, events, self_signed, wait_until
from tests.pages import CONTAINER, DOCKER, QUEUE
from tests.queue.conftest import RunPod

pytestmark = pytest.mark.container

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "What are you?"}]}
# What a log must not have, where all is well.
ODD = re.compile(r"Traceback|Permission denied|Read-only file system|getpwuid|No such file", re.IGNORECASE)
GATED, TOKEN = "org/tiny", f"hf_{secrets.token_hex(16)}"


# What is in it


def test_what_the_image_says_of_itself(image: str) -> None:
    (found,) = json.loads(podman("image", "inspect", image))
    config = found["Config"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"] == ["/opt/supervisor/entrypoint.sh"]
    assert config["Cmd"] == ["up"]
    assert {"SUPERVISOR_IMAGE=1", "SUPERVISOR_HOST=0.0.0.0", "SUPERVISOR_LOG_FORMAT=json"} <= set(config["Env"])
    assert found["HealthCheck" if "HealthCheck" in found else "Healthcheck"]["Test"][0] == "CMD"
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items() if "opencontainers" in name}
    assert labels["title"] == "vllm-supervisor"
    assert labels["licenses"] == "MIT"
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", labels["revision"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S*", labels["created"])
    assert labels["version"]
    assert "source" not in labels


def test_our_layers_are_small_and_the_supervisors_own_is_the_smallest(image: str) -> None:
    """A new version of ours is pulled in seconds: what it needs lies in a layer that stays."""
    layers = json.loads(podman("history", "--format", "json", image))
    sizes = [layer["size"] for layer in layers[:-1]]  # the last one is vLLM's image
    assert sum(sizes) < 250e6
    assert sorted(sizes)[-2] < 10e6


@pytest.mark.parametrize(
    ("meddling", "told"),
    [
        ("mkdir evil-1.dist-info && printf 'Name: evil\\nVersion: 1\\n' >evil-1.dist-info/METADATA", "> evil==1"),
        ("echo '#' >>pip/__init__.py", r"> \d+ files, "),
        ("ln -s /opt/supervisor/bin/python /usr/local/bin/python3", "> /usr/local/bin/python3"),
    ],
    ids=["a package more", "a file changed", "another python3"],
)
def test_the_build_fails_when_vllms_environment_is_touched(
    image: str, tmp_path: Path, meddling: str, told: str
) -> None:
    text = (ROOT / "Dockerfile").read_text()
    before = "# A link, not PATH"
    assert text.count(before) == 1
    step = f"RUN cd /usr/lib/python3/dist-packages && {meddling}\n\n"
    (tmp_path / "Dockerfile").write_text(text.replace(before, step + before))
    done = rig("build", "--file", tmp_path / "Dockerfile", "--tag", "meddled")
    assert done.returncode not in (0, 77, 78)
    assert re.search(told, done.stdout), done.stdout[-2000:]


def test_a_vllm_without_a_shipped_catalogue_gets_one_at_build(image: str, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "entrypoint.sh", "Dockerfile"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("requirements", "scripts", "supervisor"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", f"{PINNED}.json"))
    done = rig("build", "--target", "build", "--tag", "other-version", CONTEXT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    file = f"/opt/package/lib/python3*/site-packages/supervisor/vllm/flags/{PINNED}.json"
    dumped = catalogue.parse(podman("run", "--rm", "--entrypoint", "sh", "other-version", "-c", f"cat {file}"))
    shipped = catalogue.parse((catalogue.FLAGS / f"{PINNED}.json").read_text())
    assert dumped.by_key.keys() == shipped.by_key.keys()


# Weights inside


@contextlib.contextmanager
def stand_in_hub(*options: str) -> Iterator[str]:
    """The address of one that has what `options` say."""
    process = subprocess.Popen([sys.executable, ROOT / "scripts/stand_in_hub.py", *options], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().decode().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def gated(image: str) -> Iterator[str]:
    """A hub's address; it has the gated org/tiny, for those with the token."""
    with stand_in_hub("--repo", f"org/tiny={DEMO}", "--gated", "org/tiny", "--token", TOKEN) as address:
        yield address


def bake(hub: str, *more: str | Path) -> subprocess.CompletedProcess[str]:
    arguments = (f"--build-arg=MODEL={GATED}", f"--build-arg=HF_ENDPOINT={hub}")
    return rig("build", *arguments, "--tag", "baked", *more)


def test_a_gated_model_needs_the_builds_secret(gated: str) -> None:
    done = bake(gated)
    assert done.returncode not in (0, 77, 78)
    assert f"weights: cannot be had: {GATED} is gated, and no token was given." in done.stdout + done.stderr


def test_a_baked_model_is_served_without_a_hub_and_its_token_is_in_no_layer(gated: str, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text(TOKEN)
    done = bake(gated, "--secret", f"id=hf_token,src={secret}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with Container(image="baked", environ={"MODEL": ""}, options=("--user=1234:1234",)) as container:
        container.ready()
        assert container.client.get("/v1/models").json()["data"][0]["id"] == GATED
        assert "weights: baked into the image" in container.output
        container.stop()
        assert container.exit_code() == 0

    assert TOKEN not in podman("history", "--no-trunc", "baked")
    save = subprocess.Popen([RIG, "podman", "save", "baked"], env=clean_environment(), stdout=subprocess.PIPE)
    found = subprocess.run(["grep", "-c", "-a", "-F", "-e", TOKEN], stdin=save.stdout, capture_output=True, check=False)
    assert save.stdout is not None
    save.stdout.close()
    assert save.wait() == 0
    assert found.stdout.strip() == b"0"


# docker run


def test_without_a_model_it_says_what_to_set(image: str) -> None:
    code, output = ran(environ={"MODEL": ""})
    assert code == 2
    assert "supervisor: no model is named: set MODEL, such as MODEL=Qwen/Qwen3-0.6B" in output
    assert "Traceback" not in output


def test_wrong_settings_are_told_all_at_once(image: str) -> None:
    code, output = ran(environ={"MAX_NUM_SEQS": "many", "DTYPE": "bf16"})
    assert code == 2
    assert "MAX_NUM_SEQS=many (environment MAX_NUM_SEQS): expected a whole number" in output
    assert "did you mean bfloat16?" in output


def test_explain_shows_the_settings_and_vllms_command(image: str) -> None:
    code, output = ran("explain", fake=False, environ={"MAX_MODEL_LEN": "1k", "HF_TOKEN": "hf_secretsecretsecret"})
    assert code == 0
    assert re.search(r"^MAX_MODEL_LEN +1k +environment MAX_MODEL_LEN", output, re.MULTILINE)
    assert f"\nvLLM {PINNED}, mode http:\n/usr/local/bin/vllm serve {MODEL} --uds " in output
    assert "hf_secret" not in output


def test_any_other_command_runs_as_given(image: str) -> None:
    assert ran("sh", "-c", "exit 7", fake=False) == (7, "")
    code, output = ran("vllm", "--version", fake=False)
    assert code == 0
    assert output.splitlines()[-1].startswith(PINNED)


def test_without_a_command_it_is_up_and_process_1_is_the_supervisor(image: str) -> None:
    with Container() as container:
        container.ready()
        words = container.inside("cat", "/proc/1/cmdline").split("\0")
        assert words[1:3] == ["/opt/supervisor/bin/supervisor", "up"]
        container.stop()
        assert container.exit_code() == 0


def test_process_1_reaps_orphans(image: str) -> None:
    with Container() as container:
        container.ready()
        orphan = container.inside("sh", "-c", "setsid sleep 0.2 >/dev/null & echo $!").strip()
        assert container.inside("cat", "/proc/1/comm")  # it is not gone with us
        ended = f"! test -d /proc/{orphan} && echo reaped || true"
        wait_until(lambda: container.inside("sh", "-c", ended), "the orphan's end", 20)
        assert " Z" not in container.inside("ps", "-eo", "pid,stat")


# The health check, by whatever way it serves


@pytest.mark.parametrize("way", ["http", "another address and PORT_HEALTH", "keys", "https", "queue"])
def test_healthy_is_ready(image: str, tmp_path: Path, way: str) -> None:
    environ: dict[str, str]
    options: tuple[str, ...]
    environ, options = {}, ()
    if way == "another address and PORT_HEALTH":
        environ = {"SUPERVISOR_HOST": "127.0.0.2", "PORT_HEALTH": "0"}
    elif way == "keys":
        environ = {"SUPERVISOR_API_KEYS": "some-key"}
    elif way == "https":
        self_signed(tmp_path)
        environ = {"SUPERVISOR_TLS_CERT": "/tls/cert.pem", "SUPERVISOR_TLS_KEY": "/tls/key.pem"}
        options = (f"--volume={tmp_path}:/tls:ro",)
    with RunPod("--hold", "5") as runpod:
        if way == "queue":  # as on RunPod: nobody listens on any port
            environ = {**runpod.environment(), "PORT": ""}
        with Container(environ=environ, options=options, plan={"load_seconds": 3}) as container:
            container.says("importing vLLM", 30)
            assert not container.healthy()
            container.says("supervisor: ready: ", 30)
            assert container.healthy()
            container.signal(signal.SIGTERM)
            assert container.exit_code() == 0


# In tight places


def test_a_job_of_runpods_queue_is_answered(image: str) -> None:
    with Container("--mode", "queue") as container:
        endpoint = container.says(r"a simulated RunPod endpoint, (\S+)", 30)[1]
        with RunPod() as other:  # for its client
            other.url = endpoint
            output = other.done(HELLO)
        assert output
        container.stop()
        assert container.exit_code() == 0


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A shell's environment in which `docker` is the rig. Its containers have the fake, the page's model from a hub of
    ours, and a free port: the network is the host's."""
    with stand_in_hub("--repo", f"Qwen/Qwen3-0.6B={DEMO}") as address:
        given = (
            "--env=SUPERVISOR_VLLM=/rig/fake_vllm", f"--volume={ROOT / 'scripts'}:/rig:ro", "--env=PORT=0",
            f"--env=HF_ENDPOINT={address}",
        )  # fmt: skip
        docker = tmp_path / "docker"
        docker.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = run ]; then shift && exec {RIG} run {shlex.join(given)} "$@"; fi\n'
            f'if [ "$1" = build ]; then exec {RIG} build; fi\n'
            f'exec {RIG} podman "$@"\n'
        )
        docker.chmod(0o755)
        yield {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    rig("podman", "rm", "--force", "--time", "0", "--ignore", "queue")


def test_the_commands_of_the_readme(image: str, docker: dict[str, str]) -> None:
    """The first one was run already: it finds its layers."""
    build, serve, explain, other = DOCKER.commands()
    assert build.split() == ["docker", "build", "-t", image, "."]

    def printed(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], env=clean_environment(**docker), cwd=ROOT, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed(build)
    assert re.search(r"^MODEL +Qwen/Qwen3-0\.6B +environment MODEL", printed(explain), re.MULTILINE)
    assert printed(other).splitlines()[-1].startswith(PINNED)
    with Supervisor(program=("bash", "-c", f"exec {serve}"), vllm=None, verb="", environ=docker) as container:
        container.ready(60)
        assert container.client.post(CHAT, json=HELLO).status_code == 200
        container.signal(signal.SIGTERM)
        assert container.exit_code() == 0


def test_the_queue_in_a_container_as_the_page_has_it(image: str, docker: dict[str, str]) -> None:
    run, job = CONTAINER.commands()
    _, curl, _ = QUEUE.commands()
    rig("podman", "rm", "--force", "--time", "0", "--ignore", "queue")  # of a test that was killed
    with Supervisor(program=("bash", "-c", f"exec {run}"), vllm=None, verb="", environ=docker) as container:
        container.says(r"ready: a simulated RunPod endpoint", 60)

        def inside(command: str) -> str:
            done = subprocess.run(
                ["bash", "-c", command], env=clean_environment(**docker), stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        text = inside(job)
        assert len(text.split()) >= 4, text
        assert "{" not in text
        curl = curl.replace("127.0.0.1:8000/", f"127.0.0.1:{container.port}/")
        assert json.loads(podman("exec", "queue", "sh", "-c", curl))["status"] == "COMPLETED"
        podman("stop", "--time", "20", "queue")
        assert container.exit_code() == 0


def test_memory_that_runs_out_is_named_as_the_cause(image: str, tmp_path: Path) -> None:
    greedy = tmp_path / "vllm"
    greedy.write_text(
        '#!/bin/sh\n[ "$1" = serve ] || exec /rig/fake_vllm "$@"\nexec python3 -c "x = b\'x\' * (1 << 30)"\n'
    )
    greedy.chmod(0o755)
    with Container(
        options=("--memory=300m", f"--volume={tmp_path}:/greedy:ro"),
        environ={"SUPERVISOR_VLLM": "/greedy/vllm", "SUPERVISOR_MAX_RESTARTS": "1"},
    ) as container:
        assert container.exit_code(60) == 3
        assert re.search(r"killed by SIGKILL.*memory", container.output)


# The real vLLM


def test_it_serves_a_chat(served: Container) -> None:
    answer = served.client.post(CHAT, json={"model": "demo", **HELLO, "temperature": 0, "max_tokens": 40})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"][0]["message"]["content"]) > 10
    assert served.healthy()


def test_a_crash_inside_is_mended(served: Container) -> None:
    served.inside("pkill", "-KILL", "-f", "VLLM::EngineCore")
    served.says("ready -> restarting")
    assert not served.healthy()
    answer = served.client.post(CHAT, json={"model": "demo", **HELLO, "max_tokens": 10}, timeout=START)
    assert answer.status_code == 200, answer.text
    assert served.status["restarts"] == 1
    assert served.healthy()
    assert " Z" not in served.inside("ps", "-eo", "pid,stat")


def test_docker_stop_in_the_middle_of_a_stream_lets_it_finish(served: Container) -> None:
    body = {"model": "demo", **HELLO, "stream": True, "max_tokens": 1500, "ignore_eos": True}
    with served.client.stream("POST", CHAT, json=body) as answer:
        received = b""
        for data in answer.iter_raw():
            if not received:
                stopping = subprocess.Popen([RIG, "podman", "stop", "--time", "60", served.name])
                served.says("ready -> draining")
            received += data
    assert received.endswith(b"data: [DONE]\n\n")
    assert list(events(received))[-1]["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
    assert served.exit_code(60) == 0
    assert stopping.wait(30) == 0


def test_nobody_on_a_read_only_root(served: Container) -> None:
    """As Kubernetes' restricted profile runs it: no root, no rights, nothing to write but /tmp and a volume."""
    if served.process.poll() is None:  # one vLLM at a time
        served.stop()
    options = (
        "--user=1234:1234", "--cap-drop=all", "--security-opt=no-new-privileges",
        "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:exec",
        "--shm-size=1g", f"--volume={volume('nobody')}:/cache",
    )  # fmt: skip
    environ = {"SUPERVISOR_CACHE_DIR": "/cache", "MAX_MODEL_LEN": "2048"}
    environ |= {"ENFORCE_EAGER": "true", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with Container(fake=False, environ=environ, options=options) as container:
        container.ready(START)
        answer = container.client.post(CHAT, json={"model": MODEL, **HELLO, "max_tokens": 20})
        assert answer.status_code == 200, answer.text
        assert container.healthy()
        assert not ODD.search(container.output), ODD.search(container.output)
        container.stop()
        assert container.exit_code(60) == 0
