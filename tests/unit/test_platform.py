"""What the platform allows, and the warnings where the settings ask for more."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.settings import platform
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather

QUEUE = {"RUNPOD_ENDPOINT_ID": "e", "RUNPOD_POD_ID": "p", "RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1/"}
BALANCER = {"RUNPOD_ENDPOINT_ID": "e", "RUNPOD_POD_ID": "p", "PORT_HEALTH": "8001"}


def read(folder: Path, **environ: str) -> Settings:
    return gather(Arguments(model="m"), {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")} | environ)


FOUR = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


@pytest.mark.parametrize(
    ("where", "environ", "expected"),
    [
        ({}, {}, []),
        ({}, {"SUPERVISOR_STARTUP_TIMEOUT": "9000", "SUPERVISOR_MAX_BODY": "1GiB"}, []),
        (QUEUE, {}, ["set RUNPOD_INIT_TIMEOUT=1200 on the endpoint"]),
        (QUEUE, {"RUNPOD_INIT_TIMEOUT": "1200"}, []),
        (QUEUE, {"RUNPOD_INIT_TIMEOUT": "800", "SUPERVISOR_STARTUP_TIMEOUT": "900"}, ["gives a worker 800 s"]),
        (QUEUE, {"SUPERVISOR_STARTUP_TIMEOUT": "420"}, []),
        (QUEUE, {"RUNPOD_INIT_TIMEOUT": "soon"}, ["gives a worker 420 s"]),
        (BALANCER, {"RUNPOD_INIT_TIMEOUT": "1200"}, ["ends a request after 330 s"]),
        (BALANCER, {"RUNPOD_INIT_TIMEOUT": "1200", "SUPERVISOR_REQUEST_TIMEOUT": "330"}, []),
        (
            BALANCER,
            {"RUNPOD_INIT_TIMEOUT": "1200", "REQUEST_TIMEOUT": "300", "SUPERVISOR_MAX_BODY": "64MiB"},
            ["takes bodies of up to 30 MB"],
        ),
        ({}, {"ENABLE_PREFIX_CACHING": "false"}, ["it is a default of worker-vllm's template"]),
        ({}, {"ENABLE_PREFIX_CACHING": "true"}, []),
        ({}, {"DISABLE_PREFIX_CACHING": "true"}, ["it is a default of worker-vllm's template"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"TENSOR_PARALLEL_SIZE": "2"}, []),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            {"TENSOR_PARALLEL_SIZE": "4"},
            ["TENSOR_PARALLEL_SIZE=4: only 2 GPUs are here"],
        ),
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"SUPERVISOR_EXTRA_ARGS": "-tp 2"}, ["only 1 GPU is here"]),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            {"TENSOR_PARALLEL_SIZE": "2", "PIPELINE_PARALLEL_SIZE": "2"},
            ["TENSOR_PARALLEL_SIZE=2 x PIPELINE_PARALLEL_SIZE=2: only 2"],
        ),
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"TENSOR_PARALLEL_SIZE": "2", "DISTRIBUTED_EXECUTOR_BACKEND": "ray"}, []),
        (
            {"CUDA_VISIBLE_DEVICES": "0"},
            {"TENSOR_PARALLEL_SIZE": "2", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"},
            [],
        ),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"TENSOR_PARALLEL_SIZE": "auto"}, []),
        (FOUR, {"TENSOR_PARALLEL_SIZE": "auto", "PIPELINE_PARALLEL_SIZE": "2"}, []),
        (FOUR, {"TENSOR_PARALLEL_SIZE": "auto", "DATA_PARALLEL_SIZE": "2"}, []),
        (
            FOUR,
            {"TENSOR_PARALLEL_SIZE": "auto", "PIPELINE_PARALLEL_SIZE": "8"},
            ["PIPELINE_PARALLEL_SIZE=8: only 4 GPUs are here; set sizes"],
        ),
        (
            FOUR,
            {"TENSOR_PARALLEL_SIZE": "auto", "SUPERVISOR_EXTRA_ARGS": "-pp 2"},
            ["TENSOR_PARALLEL_SIZE=4 x PIPELINE_PARALLEL_SIZE=2: only 4 GPUs are here; set sizes"],
        ),
        (
            FOUR,
            {"TENSOR_PARALLEL_SIZE": "4", "DATA_PARALLEL_SIZE": "2"},
            [
                "TENSOR_PARALLEL_SIZE=4 x DATA_PARALLEL_SIZE=2: only 4 GPUs are here; "
                "set sizes whose product is no more; TENSOR_PARALLEL_SIZE=auto is what the others leave"
            ],
        ),
        (
            FOUR,
            {
                "TENSOR_PARALLEL_SIZE": "4",
                "DATA_PARALLEL_SIZE": "2",
                "DATA_PARALLEL_SIZE_LOCAL": "1",
                "DATA_PARALLEL_ADDRESS": "127.0.0.1",
            },
            [],
        ),
        (FOUR, {"TENSOR_PARALLEL_SIZE": "4", "DATA_PARALLEL_SIZE": "2", "DATA_PARALLEL_BACKEND": "ray"}, []),
        (FOUR, {"TENSOR_PARALLEL_SIZE": "4", "DATA_PARALLEL_SIZE": "2", "DATA_PARALLEL_RANK": "1"}, []),
    ],
)
def test_limits(folder: Path, where: dict[str, str], environ: dict[str, str], expected: list[str]) -> None:
    warnings = read(folder, **where, **environ).warnings
    assert len(warnings) == len(expected), warnings
    for text in expected:
        assert any(text in warning for warning in warnings)


def test_a_load_balancers_worker_takes_what_the_balancer_takes(folder: Path) -> None:
    settings = read(folder, **BALANCER)
    assert settings.knobs.max_body == 30_000_000
    (found,) = [setting for setting in settings.knob_settings if setting.name == "SUPERVISOR_MAX_BODY"]
    assert found.source == "default on RunPod's load balancer"
    assert not settings.is_set("SUPERVISOR_MAX_BODY")


@pytest.mark.parametrize(
    ("visible", "expected"), [("0,1,2", "3"), ("0", "1"), ("", "1"), ("-1", "1"), ("GPU-aa,GPU-bb", "2"), (None, "2")]
)
def test_all_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str) -> None:
    monkeypatch.setattr(platform, "DEVICES", folder.parent)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (folder.parent / name).touch()
    monkeypatch.setattr("supervisor.vllm.installed._installed_version", lambda program: "0.32.0")
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    settings = read(folder, TENSOR_PARALLEL_SIZE="auto", **environ)
    assert settings.option("tensor_parallel_size") == expected
    (setting,) = [setting for _, setting in settings.options]
    assert setting.source == "environment TENSOR_PARALLEL_SIZE=auto"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"PIPELINE_PARALLEL_SIZE": "2"}, "2"),
        ({"PIPELINE_PARALLEL_SIZE": "3"}, "1"),
        ({"PIPELINE_PARALLEL_SIZE": "8"}, "1"),
        ({"DATA_PARALLEL_SIZE": "2"}, "2"),
        ({"DATA_PARALLEL_SIZE": "2", "PIPELINE_PARALLEL_SIZE": "2"}, "1"),
        ({"DATA_PARALLEL_SIZE": "4", "DATA_PARALLEL_SIZE_LOCAL": "2", "DATA_PARALLEL_ADDRESS": "127.0.0.1"}, "2"),
        ({"DATA_PARALLEL_SIZE": "4", "DATA_PARALLEL_RANK": "1"}, "4"),
        ({"PIPELINE_PARALLEL_SIZE": "2", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}, "4"),
        ({"PIPELINE_PARALLEL_SIZE": "4", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}, "2"),
        ({"PIPELINE_PARALLEL_SIZE": "2", "DISTRIBUTED_EXECUTOR_BACKEND": "ray"}, "4"),
    ],
)
def test_all_gpus_are_shared_by_what_else_they_are_spread_over(
    folder: Path, environ: dict[str, str], expected: str
) -> None:
    settings = read(folder, TENSOR_PARALLEL_SIZE="auto", **FOUR, **environ)
    assert settings.option("tensor_parallel_size") == expected


# SageMaker

SAGEMAKER = {"SAGEMAKER_BIND_TO_PORT": "8080", "SUPERVISOR_HOST": "0.0.0.0"}


def test_sagemaker_names_the_port_and_leaves_30_s_to_end(folder: Path) -> None:
    settings = read(folder, **SAGEMAKER)
    assert (settings.knobs.port, settings.knobs.drain_timeout) == (8080, 15.0)
    assert settings.warnings == ()  # its callers are known to it: no key is missed
    assert read(folder, **SAGEMAKER, PORT="9000").knobs.port == 9000


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_the_model_that_sagemaker_has_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fetched = folder / "model"
    monkeypatch.setattr(platform, "SAGEMAKER_MODEL", fetched)
    environ = {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm"), "SUPERVISOR_IMAGE": "1"} | SAGEMAKER
    with pytest.raises(SettingsError, match="no model is named"):
        gather(Arguments(), environ)
    fetched.mkdir()
    (fetched / name).write_text("{}")
    model = gather(Arguments(), environ).model
    assert (model.value, model.source) == (str(fetched), "default on SageMaker")
    assert gather(Arguments(), environ | {"SM_VLLM_MODEL": "other"}).model.value == "other"
    with pytest.raises(SettingsError, match="no model is named"):  # anywhere else the folder says nothing
        gather(Arguments(), {name: value for name, value in environ.items() if name not in SAGEMAKER})


@pytest.mark.parametrize(
    ("environ", "argv", "warning"),
    [
        ({"SM_VLLM_MAX_MODEL_LEN": "32k"}, ["--max-model-len", "32k"], None),
        ({"SM_VLLM_MAX_MODEL_LEN": "1", "MAX_MODEL_LEN": "2"}, ["--max-model-len", "2"], None),
        ({"SM_VLLM_ENFORCE_EAGER": ""}, ["--enforce-eager"], None),
        ({"SM_VLLM_ENFORCE_EAGER": "true"}, ["--enforce-eager"], None),
        ({"SM_VLLM_ENABLE_PREFIX_CACHING": "false"}, ["--no-enable-prefix-caching"], "makes chats"),
        ({"SM_VLLM_MAX_MODEL_LEN": ""}, [], None),
        ({"SM_VLLM_OPENAI_SERVED_MODEL_NAME_OVERRIDE": "a"}, ["--served-model-name", "a"], None),
        ({"SM_VLLM_PORT": "9000"}, [], None),
        ({"SM_VLLM_HOST": "0.0.0.0"}, [], "set SUPERVISOR_HOST"),
        ({"SM_VLLM_HF_TOKEN": "x"}, [], "set HF_TOKEN"),
        ({"SM_VLLM_MAX_MODEL_LENGTH": "1"}, [], "did you mean SM_VLLM_MAX_MODEL_LEN?"),
        ({"SM_VLLM_WHATEVER": "1"}, [], "there is no such setting"),
        ({"SM_MODEL_DIR": "/opt/ml/model", "SM_NUM_GPUS": "1"}, [], None),
    ],
)
def test_the_names_of_vllms_own_image_for_sagemaker(
    folder: Path, environ: dict[str, str], argv: list[str], warning: str | None
) -> None:
    settings = read(folder, **environ)
    assert [token for option, setting in settings.options for token in option.argv(setting.value)] == argv
    assert settings.knobs.port == int(environ.get("SM_VLLM_PORT", 8000))
    assert [warning is not None and warning in line for line in settings.warnings] == ([True] if warning else [])
