"""The file of vLLM's own --config: what it says counts as if it stood on vLLM's command line, and ranks below that.

vLLM makes arguments of the file, in a way of its own.
tests/vllm/test_vllm_file.py walks the two tables by vLLM's own parser.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisor import explain
from supervisor.repositories import find_companions, find_model, needs_hub
from supervisor.settings.command import Start, build, served_name
from supervisor.settings.models import DEMO_MODEL
from supervisor.settings.settings import Arguments, Settings
from tests.unit.test_repositories import ADAPTER, DRAFT, TOKENIZER, has
from tests.unit.test_settings import argv, problems, read

# What stands in the file, and what is in effect then.
TAKEN: tuple[tuple[str, dict[str, object]], ...] = (
    ("no-enable-prefix-caching: true", {"ENABLE_PREFIX_CACHING": False}),  # as in vLLM's own recipes
    ("no-async-scheduling: true", {"ASYNC_SCHEDULING": False}),
    ("no-enable-prefix: true", {"ENABLE_PREFIX_CACHING": False}),
    ("compilation-config.mode: 3", {"--compilation-config.mode": "3"}),
    ("speculative-config.model: x", {"--speculative-config.model": "x"}),
    ('speculative-config.model: x\nspeculative-config.disable_padded_drafter_batch: "true"',
     {"--speculative-config.model": "x", "--speculative-config.disable_padded_drafter_batch": "true"}),
    ('chat-template: "{{ x }}"', {"CHAT_TEMPLATE": "{{ x }}"}),
    ("headless: false", {}),
    ("grpc: false", {}),
    ("disable-log-stats: false", {}),
    ("enforce-eager: false", {"ENFORCE_EAGER": False}),
    ("enforce_eager: true", {"ENFORCE_EAGER": True}),
    ("max-model: 100", {"MAX_MODEL_LEN": "100"}),
    ("max-model-len: 4_000", {"MAX_MODEL_LEN": "4000"}),
    ("max-model-len: -1", {"MAX_MODEL_LEN": "-1"}),
    ("gpu-memory-utilization: .5", {"GPU_MEMORY_UTILIZATION": "0.5"}),
    ("quantization: null", {}),
    ("quantization: 'None'", {}),
    ("served-model-name: []", {}),
    ("served-model-name: a,b", {"SERVED_MODEL_NAME": ("a,b",)}),
    ("served_model_name: [a, b]", {"SERVED_MODEL_NAME": ("a", "b")}),
    ("enable-lora: true\nlora-modules: 'a=b c=d'", {"ENABLE_LORA": True, "LORA_MODULES": ("a=b c=d",)}),
    ("enable-lora: true\nlora-modules: ['{\"name\": \"a\", \"path\": \"b\"}']",
     {"ENABLE_LORA": True, "LORA_MODULES": ('{"name": "a", "path": "b"}',)}),
    ("otlp-traces-endpoint: x\ncollect-detailed-traces: [model, worker]",
     {"OTLP_TRACES_ENDPOINT": "x", "COLLECT_DETAILED_TRACES": ("model", "worker")}),
    ("allowed-origins: '[\"*\"]'", {"ALLOWED_ORIGINS": '["*"]'}),
    ("hf-overrides: {a: 1}", {"HF_OVERRIDES": '{"a": 1}'}),
    ("dtype: [auto]", {"DTYPE": "auto"}),
    ("middleware: a.b", {"--middleware": ("a.b",)}),
    ("middleware: [a.b]", {"--middleware": ("a.b",)}),
    ("{}", {}),
)  # fmt: skip
# What stands in the file, and what is told of it: vLLM fails at it, or drops it without a word.
REFUSED: tuple[tuple[str, str], ...] = (
    ("enable-prefix-caching: false", "vLLM ignores false there: write no-enable-prefix-caching: true"),
    ("scheduler_reserve_full_isl: no", "vLLM ignores false there: write no-scheduler-reserve-full-isl: true"),
    ("no-enable-prefix-caching: false", "vLLM ignores false there: write enable-prefix-caching: true"),
    ("seed: false", "seed: vLLM ignores false there: leave it out"),
    ("seed: true", "a value is missing"),
    ("compilation-config.x: true", 'compilation_config.x: YAML makes True of true: put it in quotes'),
    ("compilation-config.x: false", 'compilation_config.x: YAML makes False of false: put it in quotes'),
    ('enable-lora: "true"', "enable_lora: write true, without quotes"),
    ("enable-lora: 1", "enable_lora: write true, without quotes"),
    ("async-scheduling:", "async_scheduling: write true, without quotes"),
    ("no-enable-prefix-caching: 1", "write true, without quotes"),
    ("max-model-len:", "max_model_len: an empty value is one to vLLM: leave it out"),
    ("tensor-parallel-size: null", "an empty value is one to vLLM: leave it out"),
    ("tokenizer: null", "an empty value is one to vLLM: leave it out"),
    ("tokenizer: ''", "tokenizer: an empty value is one to vLLM: leave it out"),
    ("max-model-len: 0", "max_model_len: vLLM can't run with 0: leave it out"),
    ("served-model-name: null", "an empty value is one to vLLM: leave it out"),
    ("compilation-config.mode: null", "an empty value is one to vLLM: leave it out"),
    ("dtype: BFLOAT16", "expected bfloat16, in these capitals"),
    ('allowed-origins: "*"', """expected JSON: write '["*"]'"""),
    ('cudagraph-capture-sizes: "1,2"', "expected a whole number, such as 8"),
    ("collect-detailed-traces: model,worker", "expected one of all, model, worker"),
    ("middleware: [a.b, c.d]", "middleware: vLLM can't take that from a file: set MIDDLEWARE"),
    ("max-num-seqs: [1, 2]", "2 (v.yaml (environment CONFIG) max_num_seqs): there is no option before it"),
    ("served-model-name: [a, -x]", "vLLM can't take that from a file: set SERVED_MODEL_NAME"),
    ("Max-Model-Len: 1", "has no option Max_Model_Len; did you mean max_model_len?"),
    ("config: b.yaml", "vLLM reads no file named so: write --config FILE, in two words"),
    ("", "is empty, at which vLLM fails: write a line into it, or don't name it"),
    ("# seed: 1", "is empty, at which vLLM fails: write a line into it, or don't name it"),
    ("headless: true", "headless can't be set there: "),
)  # fmt: skip


@pytest.fixture(params=["environment", "extra", "command line"])
def named(request: pytest.FixtureRequest) -> Iterator[tuple[Arguments, dict[str, str]]]:
    """The ways to name v.yaml."""
    raw = ("--config", "v.yaml") if request.param == "command line" else ()
    environ = {"environment": {"CONFIG": "v.yaml"}, "extra": {"SUPERVISOR_EXTRA_ARGS": "--config v.yaml"}}
    yield Arguments(model="m", vllm_args=raw), environ.get(request.param, {})


def with_file(folder: Path, text: str, *vllm_args: str, **environ: str) -> Settings:
    (folder / "v.yaml").write_text(text + "\n")
    return read(folder, Arguments(model="m", vllm_args=vllm_args), CONFIG="v.yaml", **environ)


def effective(settings: Settings) -> dict[str, object]:
    return {each.name: each.value for _, each in (*settings.options, *settings.raw_options) if each.name != "CONFIG"}


@pytest.mark.parametrize(("text", "expected"), TAKEN)
def test_what_vllm_takes_is_in_effect(folder: Path, text: str, expected: dict[str, object]) -> None:
    settings = with_file(folder, text)
    assert effective(settings) == expected
    assert argv(settings) == ["--config", "v.yaml"]  # vLLM reads it there


@pytest.mark.parametrize(("text", "expected"), REFUSED)
def test_what_vllm_does_not_take_is_told(folder: Path, text: str, expected: str) -> None:
    (folder / "v.yaml").write_text(text + "\n")
    found = problems(folder, CONFIG="v.yaml")
    assert any(expected in line for line in found), found
    assert all("v.yaml (environment CONFIG)" in line for line in found)


def test_vllm_looks_for_the_very_word(folder: Path) -> None:
    """It takes `--config=FILE` for an option, and ignores it."""
    (folder / "v.yaml").write_text("max-num-seqs: many\n")
    told, in_file = problems(folder, Arguments(model="m", vllm_args=("--config=v.yaml",)))
    assert told == "--config (command line): vLLM reads no file named so: write --config FILE, in two words"
    assert "MAX_NUM_SEQS=many (v.yaml (command line) max_num_seqs): expected a whole number" in in_file


@pytest.mark.parametrize(
    ("extra", "raw"),
    [
        ("--config v.yaml", "--config v.yaml"),
        ("", "--config v.yaml --config w.yaml"),
        ("--config v.yaml --config v.yaml", ""),
    ],
)  # fmt: skip
def test_vllm_takes_one_file(folder: Path, extra: str, raw: str) -> None:
    for name in ("v.yaml", "w.yaml"):
        (folder / name).write_text("seed: 1\n")
    (problem,) = problems(folder, Arguments(model="m", vllm_args=tuple(raw.split())), SUPERVISOR_EXTRA_ARGS=extra)
    assert problem == "--config stands twice among vLLM's arguments, and vLLM takes one file: leave one out"


def test_a_variable_and_an_argument_make_one(folder: Path) -> None:
    (folder / "v.yaml").write_text("seed: 1\n")
    settings = read(folder, Arguments(model="m", vllm_args=("--config", "v.yaml")), CONFIG="w.yaml")
    assert (argv(settings), settings.option("seed")) == (["--config", "v.yaml"], "1")


# What it says is known


def test_it_counts_wherever_it_is_named(folder: Path, named: tuple[Arguments, dict[str, str]]) -> None:
    (folder / "v.yaml").write_text("served-model-name: nice\nrevision: v2\nload-format: pt\ndownload-dir: /d\n")
    settings = read(folder, named[0], **named[1])
    assert served_name(settings) == "nice"
    assert settings.option("download_dir") == "/d"
    model = find_model(settings)
    assert (model.revision, model.load_format) == ("v2", "pt")


def test_it_ranks_below_what_the_user_says_elsewhere_and_above_the_defaults(folder: Path) -> None:
    (folder / "config.yaml").write_text("supervisor:\nmax_num_seqs: 4\n")
    text = "max-num-seqs: 3\nmax-model-len: 1\nseed: 1\ndtype: half\nblock-size: 16"
    settings = with_file(folder, text, "--max-model-len", "2", SEED="2")
    assert effective(settings) == {
        "MAX_NUM_SEQS": "4", "MAX_MODEL_LEN": "2", "SEED": "2", "DTYPE": "half", "BLOCK_SIZE": "16",
    }  # fmt: skip
    assert [(settings.option(key)) for key in ("max_num_seqs", "max_model_len", "seed")] == ["4", "2", "2"]
    rows: Any = explain.facts(settings)["settings"]
    shown = {row["name"]: (row["source"], row["overrode"]) for row in rows}
    label = "v.yaml (environment CONFIG)"
    assert shown["MAX_NUM_SEQS"] == ("config.yaml max_num_seqs", [f"{label} max_num_seqs: 3"])
    assert shown["MAX_MODEL_LEN"] == ("command line", [f"{label} max_model_len: 1"])
    assert shown["DTYPE"] == (f"{label} dtype", [])


def test_no_default_of_ours_beats_it(folder: Path) -> None:
    """The demo model's, and what a cluster's variables stand for, would stand on the command line."""
    (folder / "v.yaml").write_text("served-model-name: nice\nmax-model-len: 512\nenforce-eager: false\n")
    settings = read(folder, Arguments(model=str(DEMO_MODEL)), CONFIG="v.yaml")
    assert settings.is_demo
    assert argv(settings) == ["--config", "v.yaml", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    assert served_name(settings) == "nice"


def test_a_part_of_an_object_in_it_replaces_the_whole_as_in_vllm(folder: Path) -> None:
    """vLLM puts the parts behind all else, as it does with those of the command line."""
    settings = with_file(folder, "compilation-config.mode: 3", COMPILATION_CONFIG='{"mode": 1}')
    assert argv(settings) == ["--config", "v.yaml"]
    ((_, setting),) = settings.raw_options
    assert setting.overrode == ('environment COMPILATION_CONFIG: {"mode": 1}',)


def test_several_machines_by_the_file(folder: Path) -> None:
    text = "nnodes: 2\nnode-rank: 1\nmaster-addr: 10.0.0.1\ntensor-parallel-size: 2"
    settings = with_file(folder, text)
    assert settings.cluster is not None
    assert settings.cluster.name == "rank 1 of 2"
    assert "--headless" in build(settings, "S", "F").argv


def test_a_clusters_variables_give_way_to_the_file(folder: Path) -> None:
    cluster = {"NUM_NODES": "2", "NODE_RANK": "1", "PRIMARY_ADDR": "10.0.0.1", "NUM_TRAINERS": "8"}
    settings = with_file(folder, "tensor-parallel-size: 4", **cluster)
    assert settings.option("pipeline_parallel_size") is None  # the user spreads the model himself
    assert settings.option("tensor_parallel_size") == "4"
    assert settings.cluster is not None
    settings = with_file(folder, "distributed-executor-backend: ray", **cluster)
    assert settings.cluster is None
    assert "--nnodes" not in argv(settings)


# Repositories


def hub_settings(folder: Path, cache: Path, text: str, *vllm_args: str, **environ: str) -> Settings:
    (folder / "v.yaml").write_text(text + "\n")
    arguments = Arguments(model="org/model", vllm_args=vllm_args)
    return read(folder, arguments, CONFIG="v.yaml", HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1", **environ)


def test_repositories_that_it_names_are_found_as_others_are(folder: Path, tmp_path: Path) -> None:
    """vLLM gets their folders on the command line, which beats the file."""
    names = ("org/t", "org/a", "org/d")
    folders = dict(
        zip(
            names,
            (has(tmp_path, name, **files) for name, files in zip(names, (TOKENIZER, ADAPTER, DRAFT), strict=True)),
            strict=True,
        )
    )
    text = (
        "tokenizer: org/t\nenable-lora: true\nlora-modules: [a=org/a]\n"
        "speculative-config: {model: org/d, num_speculative_tokens: 1}"
    )  # fmt: skip
    settings = hub_settings(folder, tmp_path, text)
    companions, settings = find_companions(settings)
    assert [each.name for each in companions] == ["org/t", "org/a", "org/d"] or len(companions) == 3
    assert not needs_hub(settings, companions)
    words = list(build(settings, "S", "F").argv)
    assert words[words.index("--tokenizer") + 1] == str(folders["org/t"])
    assert words[words.index("--lora-modules") + 1] == f"a={folders['org/a']}"
    draft = json.loads(words[words.index("--speculative-config") + 1])
    assert draft == {"model": str(folders["org/d"]), "num_speculative_tokens": 1}
    assert "--enable-lora" not in words


def test_what_beats_the_file_names_the_repository(folder: Path, tmp_path: Path) -> None:
    has(tmp_path, "org/t", **TOKENIZER)
    companions, settings = find_companions(hub_settings(folder, tmp_path, "tokenizer: org/other", TOKENIZER="org/t"))
    assert [each.name for each in companions] == ["org/t"]
    assert not needs_hub(settings, companions)


@pytest.mark.parametrize(
    "text", ["speculative-config.model: org/d", "hf-config-path: org/c", "generation-config: org/g"]
)
def test_what_can_not_be_rewritten_is_left_to_vllm_which_may_ask_the_hub(
    folder: Path, tmp_path: Path, text: str
) -> None:
    companions, settings = find_companions(hub_settings(folder, tmp_path, text))
    assert needs_hub(settings, companions)


def test_a_name_for_a_model_of_the_hub_is_not_beaten_by_ours(folder: Path) -> None:
    settings = with_file(folder, "served-model-name: nice")
    assert "--served-model-name" not in build(settings, "S", "F", Start("/folder/of/m", {})).argv
