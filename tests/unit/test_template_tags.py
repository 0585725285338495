"""The templates of every tag of worker-vllm and runpod-LLM: no value is refused, and none is lost without a word."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisor.settings.command import build
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather
from supervisor.vllm.catalogue import FLAGS, parse

HERE = Path(__file__).parent
TAGS: dict[str, Any] = json.loads((HERE / "template_tags.json").read_text())
TODAY: dict[str, Any] = json.loads((HERE / "templates.json").read_text())
OPTIONS = {option.variable: option for option in parse((FLAGS / "0.32.0.json").read_text()).by_key.values()}
MODELS = ("MODEL", "MODEL_NAME", "LLM_MODEL")
# Another program's, or nobody's, and no setting of ours: the child gets them as they are, and nothing is said.
PASSED_ON = {
    "HF_DATASETS_CACHE", "HF_HOME", "HF_HUB_ENABLE_HF_TRANSFER", "HF_HUB_OFFLINE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN", "PYTHONUNBUFFERED", "PYTORCH_ALLOC_CONF", "RAYON_NUM_THREADS", "RAY_DISABLE_USAGE_STATS",
    "RAY_METRICS_EXPORT_ENABLED", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE",
    "VLLM_USE_DEEP_GEMM", "VLLM_WORKER_MULTIPROC_METHOD",
    "BASE_IMAGE_VERSION", "BATCH_SIZE", "STREAMING",  # of 2023 and 2024, and too general to be taken for ours
    "RUNPOD_HUGGINGFACE_CACHE",  # RunPod's own
}  # fmt: skip
# Where the pages have no value, or one that needs a file.
VALUES = {
    "ALLOWED_LOCAL_MEDIA_PATH": "/tmp",
    "VIDEO_PRUNING_RATE": "0.5",
    "VLLM_CONFIG_FILE": "vllm.yaml",
}
# What an option is not set without.
WITH = {
    "ENABLE_AUTO_TOOL_CHOICE": {"TOOL_CALL_PARSER": "hermes"},
    "LORA_MODULES": {"ENABLE_LORA": "true"},
}
# Values that vLLM has no more, which ends the start: their weights could not be read.
GONE = {
    "LOAD_FORMAT": {"bitsandbytes", "gguf"},
    "QUANTIZATION": {"bitsandbytes", "gguf", "squeezellm", "marlin", "aqlm", "deepspeedfp", "tpu_int8", "qqq", "hqq",
                     "ptpc_fp8", "auto-round", "rtn", "petit_nvfp4", "ipex", "gptq_marlin_24", "gptq_bitblas",
                     "bitblas", "neuron_quant"},
}  # fmt: skip
BY_TYPE = {"json": "{}", "json_human": "{}"}


def walk(tags: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Each tag with all that it has, from what differs."""
    have: dict[str, dict[str, Any]] = {}
    for tag, row in tags.items():
        for part, changed in row.items():
            if part != "commit":
                every = have.get(part, {}) | changed if changed is not None else {}
                have[part] = {name: value for name, value in every.items() if value is not None}
        yield tag, dict(have)


def templates() -> dict[str, dict[str, str]]:
    """All environments that a tag injects, each under the first tag that has it."""
    found: dict[str, dict[str, str]] = {}
    for worker in ("worker-vllm", "runpod-LLM"):
        for tag, have in walk(TAGS[worker]):
            injected = {part: have[part] for part in ("hub", "console") if have.get(part)}
            for name, preset in have.get("presets", {}).items():
                injected[name] = have.get("hub", {}) | preset
            if not injected:  # before there were templates: what the page says
                injected["page"] = {name: values[0] for name, values in have["documented"].items() if values}
            for what, environ in injected.items():
                found[f"{worker} {tag} {what}"] = have.get("image", {}) | environ
    unique = {json.dumps(environ, sort_keys=True): name for name, environ in reversed(found.items())}
    return {name: found[name] for name in reversed(unique.values())}


def documented() -> dict[str, list[str]]:
    """Each variable with all values that any tag names."""
    found: dict[str, dict[str, None]] = {name: dict.fromkeys(row) for name, row in TAGS["worker-vllm untagged"].items()}
    for worker in ("worker-vllm", "runpod-LLM"):
        for _, have in walk(TAGS[worker]):
            for name, values in have.get("documented", {}).items():
                found.setdefault(name, {}).update(dict.fromkeys(values))
            for part in ("hub", "console", "image"):
                for name, value in have.get(part, {}).items():
                    found.setdefault(name, {}).update({value: None} if value else {})
    return {
        name: [VALUES[name]] if name in VALUES else list(values) or [made_up(name)] for name, values in found.items()
    }


def made_up(name: str) -> str:
    option = OPTIONS.get(name)
    return "1" if option is None else (*option.choices, BY_TYPE.get(option.type, "1"))[0]


TEMPLATES, DOCUMENTED = templates(), documented()


def read(folder: Path, environ: dict[str, str]) -> Settings:
    (folder / "vllm.yaml").write_text("seed: 3\n")
    return gather(Arguments(), {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")} | environ)


def lost(settings: Settings, environ: dict[str, str]) -> list[str]:
    """What is set, and neither in effect, nor passed on, nor told of."""
    every = [
        settings.model,
        *settings.knob_settings,
        *(setting for _, setting in (*settings.options, *settings.raw_options)),
    ]
    used = {re.split("[=:]", line)[0] for setting in every for line in (setting.source, *setting.overrode)}
    child = build(settings, "S", "F").environ
    return [
        name
        for name, value in environ.items()
        if value not in ("", "None")  # not set
        and f"environment {name}" not in used
        and not (name in PASSED_ON and child.get(name) == value)
        and not any(re.match(rf"(environment )?{name}\b", warning) for warning in settings.warnings)
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_tags_template_starts_and_loses_nothing(folder: Path, template: str) -> None:
    environ = dict(TEMPLATES[template])
    if not any(environ.get(name) for name in MODELS):
        environ["MODEL_NAME"] = "org/model"
    settings = read(folder, environ)
    assert settings.model.value == next(environ[name] for name in MODELS if environ.get(name))
    assert lost(settings, environ) == []


def test_each_value_that_a_tag_documents_is_taken(folder: Path) -> None:
    for name, values in DOCUMENTED.items():
        for value in values:
            environ = ({} if name in MODELS else {"MODEL": "m"}) | WITH.get(name, {}) | {name: value}
            if value in GONE.get(name, ()):
                with pytest.raises(SettingsError, match=f"{name}={value} .* vLLM 0.32.0 has no such name"):
                    read(folder, environ)
            else:
                assert lost(read(folder, environ), environ) == [], environ


def test_all_tags_are_there() -> None:
    tags = dict(walk(TAGS["worker-vllm"]))
    assert len(tags) == 73 + 2  # two were released without a tag
    assert tags["v2.25.2"]["hub"] == TODAY["worker-vllm template"]
    assert list(walk(TAGS["runpod-LLM"]))[-1][1]["hub"] == TODAY["runpod-LLM template"]
    assert len(TEMPLATES) > 30
    assert len(DOCUMENTED) > 250


def test_a_lost_variable_would_be_seen(folder: Path) -> None:
    environ = {"MODEL": "m", "FOLDER_OF_NOBODY": "x", "SEED": "1", "SWAP_SPACE": "4", "HF_HOME": "/h"}
    assert lost(read(folder, environ), environ) == ["FOLDER_OF_NOBODY"]


@pytest.mark.parametrize(
    "name",
    ["MAX_CPU_LORAS", "MAX_MODEL_LEN", "MAX_PARALLEL_LOADING_WORKERS", "NUM_GPU_BLOCKS_OVERRIDE",
     "NUM_SPECULATIVE_TOKENS"],
)  # fmt: skip
def test_a_zero_was_not_set(folder: Path, name: str) -> None:
    settings = read(folder, {"MODEL": "m", name: "0"})
    assert settings.options == ()
    assert settings.warnings[0].startswith(f"environment {name}=0 is taken for not set: ")
