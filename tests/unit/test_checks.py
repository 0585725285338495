"""What can't work together is told before anything starts, with what to set: vLLM would say it after minutes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from supervisor.settings.checks import RULES
from supervisor.settings.knobs import KNOBS
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather
from supervisor.vllm.catalogue import FLAGS, parse


def read(folder: Path, *raw: str, **environ: str) -> Settings:
    vllm = {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")}
    return gather(Arguments(model="m", vllm_args=raw), vllm | environ)


def problems(folder: Path, *raw: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(folder, *raw, **environ)
    return caught.value.problems


def lora(folder: Path, name: str, rank: object) -> str:
    (folder / name).mkdir()
    (folder / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return str(folder / name)


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"ENABLE_AUTO_TOOL_CHOICE": "true"}, "it needs TOOL_CALL_PARSER"),
        ({"SUPERVISOR_EXTRA_ARGS": "--enable-auto-tool-choice"}, "it needs TOOL_CALL_PARSER"),
        ({"LORA_MODULES": "sql=org/sql-lora"}, "adapters need ENABLE_LORA=true"),
        ({"SUPERVISOR_EXTRA_ARGS": "--lora-modules sql=org/sql-lora"}, "adapters need ENABLE_LORA=true"),
        ({"LORA_MODULES": "sql=/no/such", "ENABLE_LORA": "true"}, "expected a folder that is there"),
        ({"CHAT_TEMPLATE": "/no/such.jinja"}, "expected a file that is there"),
        ({"CHAT_TEMPLATE": "chat.jinja"}, "expected a file that is there"),
        ({"TOOL_PARSER_PLUGIN": "/no/such.py"}, "expected a file that is there"),
        ({"ALLOWED_LOCAL_MEDIA_PATH": "/no/such"}, "expected a folder that is there"),
        ({"QUANTIZATION": "bitsandbytes"}, "vLLM 0.32.0 has no such name, which an older one had; it has "),
        ({"LOAD_FORMAT": "gguf"}, "vLLM 0.32.0 has no such name: since 0.24 a plugin has it; it has "),
        ({"QUANTIZATION": "awk"}, "did you mean awq?"),
        ({"TOOL_CALL_PARSER": "herms"}, "did you mean hermes?"),
        ({"REASONING_PARSER": "qwen33"}, "did you mean qwen3?"),
        ({"MAX_NUM_BATCHED_TOKENS": "16", "MAX_NUM_SEQS": "32"}, "expected at least MAX_NUM_SEQS, which is 32"),
        (
            {"SPECULATIVE_CONFIG": '{"num_speculative_tokens": 3}'},
            "it names neither a method, such as ngram, nor a model",
        ),
        (
            {"SPECULATIVE_CONFIG": '{"method": "ngram", "num_speculative_tokens": 3}', "NUM_SPECULATIVE_TOKENS": "5"},
            "SPEC_TOKENS=5 (environment NUM_SPECULATIVE_TOKENS): SPECULATIVE_CONFIG has num_speculative_tokens as well"
            ", and vLLM takes it from one of them alone: remove one",
        ),
        ({"SPECULATIVE_CONFIG": '{"method": "ngram"}', "SPEC_METHOD": "suffix"}, "SPECULATIVE_CONFIG has a method"),
        ({"SPECULATIVE_CONFIG": '{"model": "org/d"}', "SPECULATIVE_MODEL": "org/d"}, "SPECULATIVE_CONFIG has a model"),
        ({"MAX_LORAS": "4", "MAX_CPU_LORAS": "2"}, "expected at least MAX_LORAS, which is 4"),
        ({"HF_ENDPOINT": "hf-mirror.com"}, "expected an address such as https://hf-mirror.com"),
        (
            {"SUPERVISOR_EXTRA_ARGS": "-p 8000:8000"},
            "-p (environment SUPERVISOR_EXTRA_ARGS): this is an option of docker's",
        ),
        ({"SUPERVISOR_EXTRA_ARGS": "--gpus all"}, "this is an option of docker's"),
        ({"SUPERVISOR_EXTRA_ARGS": "--ipc=host"}, "this is an option of docker's"),
        ({"SUPERVISOR_EXTRA_ARGS": "--shm-size 8g --seed 1"}, "this is an option of docker's"),
    ],
)
def test_what_fails_after_minutes_is_told_now(folder: Path, environ: dict[str, str], told: str) -> None:
    (problem,) = problems(folder, **environ)
    assert told in problem
    assert any(name in problem for name in environ)


@pytest.mark.parametrize(
    "environ",
    [
        {"ENABLE_AUTO_TOOL_CHOICE": "true", "TOOL_CALL_PARSER": "hermes"},
        {"ENABLE_AUTO_TOOL_CHOICE": "true", "SUPERVISOR_EXTRA_ARGS": "--tool-call-parser hermes"},
        {"ENABLE_AUTO_TOOL_CHOICE": "false"},
        {"LORA_MODULES": "sql=org/sql-lora", "ENABLE_LORA": "true"},
        {"SPECULATIVE_CONFIG": '{"num_speculative_tokens": 3}', "SPEC_METHOD": "ngram"},
        {"SPECULATIVE_CONFIG": '{"num_speculative_tokens": 3}', "SPECULATIVE_MODEL": "[ngram]"},
        {"SPECULATIVE_CONFIG": '{"num_speculative_tokens": 3}', "SPEC_MODEL": "org/draft"},
        {"SPECULATIVE_CONFIG": '{"model": "org/draft", "draft": {"method": "x"}}', "SPEC_METHOD": "eagle"},
        {"CHAT_TEMPLATE": "template_chatml.jinja"},  # of vLLM's own folder
        {"LORA_MODULES": '{"name": "a", "path": "org/b"}', "SUPERVISOR_EXTRA_ARGS": "--enable-lora"},
        {"CHAT_TEMPLATE": "{{ messages }}"},
        {"CHAT_TEMPLATE": "template_of_vllms_own"},
        {"QUANTIZATION": "AWQ"},
        {"QUANTIZATION": "None"},
        {"TOOL_PARSER_PLUGIN": __file__, "TOOL_CALL_PARSER": "my_own"},
        {"MAX_NUM_BATCHED_TOKENS": "8k", "MAX_NUM_SEQS": "32"},
        {"SPECULATIVE_CONFIG": '{"method": "ngram", "num_speculative_tokens": 3}'},
        {"SPECULATIVE_CONFIG": '{"model": "org/draft", "num_speculative_tokens": 3}'},
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        {"HF_ENDPOINT": "HTTPS://hub.example"},
    ],
)
def test_what_works_together_is_not_told(folder: Path, environ: dict[str, str]) -> None:
    assert read(folder, **environ).warnings == ()


@pytest.mark.parametrize("config", [{"num_attention_heads": 14}, {"text_config": {"num_attention_heads": 14}}])
def test_heads_that_gpus_can_not_share(folder: Path, config: dict[str, object]) -> None:
    (folder / "local").mkdir()
    (folder / "local" / "config.json").write_text(json.dumps(config))
    vllm = {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")}
    with pytest.raises(SettingsError, match=r"14 heads of attention .* set TENSOR_PARALLEL_SIZE=2"):
        gather(Arguments(model="./local"), vllm | {"TENSOR_PARALLEL_SIZE": "4"})
    assert gather(Arguments(model="./local"), vllm | {"TENSOR_PARALLEL_SIZE": "7"}).warnings == ()
    assert read(folder, TENSOR_PARALLEL_SIZE="4").warnings == ()  # the hub's: nobody has looked


def test_the_rank_of_a_local_adapter(folder: Path) -> None:
    path = lora(folder, "big", 40)
    (problem,) = problems(folder, ENABLE_LORA="true", LORA_MODULES=f"small={lora(folder, 'small', 8)} big={path}")
    assert problem == (
        f"LORA_MODULES=big={path} (environment LORA_MODULES): its rank is 40, and MAX_LORA_RANK is 16: "
        "set MAX_LORA_RANK=64"
    )
    modules = json.dumps([{"name": "big", "path": path}])
    assert len(problems(folder, ENABLE_LORA="true", LORA_MODULES=modules)) == 1
    assert read(folder, ENABLE_LORA="true", LORA_MODULES=modules, MAX_LORA_RANK="64").warnings == ()


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"r": "many"}'])
def test_an_adapter_that_says_nothing_of_its_rank_is_vllms_to_judge(folder: Path, content: str) -> None:
    (folder / "odd").mkdir()
    (folder / "odd" / "adapter_config.json").write_text(content)
    assert read(folder, ENABLE_LORA="true", LORA_MODULES=f"odd={folder / 'odd'}").warnings == ()


# The file of vLLM's own --config


def test_values_in_vllms_file_are_checked_as_all_others(folder: Path) -> None:
    (folder / "vllm.yaml").write_text(
        "max-num-seqs: many\ndtype: bf16\nmax-modle-len: 4\nswap-space: 4\nport: 1\nquantization: bitsandbytes\n"
        "enable-auto-tool-choice: true\nof-my-own-plugin: 7\nseed: 3\n"
    )
    found = problems(folder, VLLM_CONFIG_FILE="vllm.yaml")
    for told in (
        "MAX_NUM_SEQS=many (vllm.yaml (environment VLLM_CONFIG_FILE) max_num_seqs): expected a whole number",
        "DTYPE=bf16 (vllm.yaml (environment VLLM_CONFIG_FILE) dtype): expected one of",
        "vLLM 0.32.0 has no option max_modle_len; did you mean max_model_len?",
        "vLLM 0.32.0 has no option swap_space any more: ",
        "port can't be set there: set PORT",
        "QUANTIZATION=bitsandbytes (vllm.yaml (environment VLLM_CONFIG_FILE) quantization): vLLM 0.32.0 has no such",
        "ENABLE_AUTO_TOOL_CHOICE=true (vllm.yaml (environment VLLM_CONFIG_FILE) enable_auto_tool_choice): it needs",
    ):
        assert [problem for problem in found if told in problem], (told, found)
    assert len(found) == 7


def test_what_is_right_in_vllms_file_counts(folder: Path) -> None:
    (folder / "vllm.yaml").write_text("enable-auto-tool-choice: true\nlora-modules: [a=org/b]\n")
    settings = read(folder, VLLM_CONFIG_FILE="vllm.yaml", TOOL_CALL_PARSER="hermes", ENABLE_LORA="true")
    assert settings.warnings == ()


# The table


@pytest.mark.parametrize("row", [row for part in ("problems", "warnings") for row in RULES[part]])
def test_a_row_speaks_of_settings_that_there_are(row: dict[str, Any]) -> None:
    known = {"mode", "volume", "read-only volume", "cluster", *(knob.variable for knob in KNOBS)}
    known |= {option.variable for option in parse((FLAGS / "0.32.0.json").read_text()).by_key.values()}
    texts = [*row["when"], row["told"]]
    for name, attribute in [found for text in texts for found in re.findall(r"\{([^.}]+)\.?(\w*)\}", text)]:
        assert name.startswith("$") or name in known
        assert attribute in ("shown", "source", "named")
    assert set(row.get("above", {})) <= known
    assert all(map(re.compile, row["when"].values()))


# Another vLLM


def test_the_catalogue_of_the_next_release_is_there() -> None:
    this, following = (parse((FLAGS / f"{version}.json").read_text()) for version in ("0.32.0", "0.33.0"))
    assert following.version == "0.33.0"
    assert following.by_key.keys() & this.by_key.keys() > set(list(this.by_key)[:300])
    assert following.by_key["quantization"].names
    assert following.switches


def test_a_vllm_whose_names_nobody_knows_is_not_judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"version": "0.5.0", "options": [{"name": "--quantization", "kind": "value"}]}'
    monkeypatch.setattr("supervisor.vllm.catalogue.load", lambda vllm, cache: parse(text))
    assert read(folder, QUANTIZATION="bitsandbytes").option("quantization") == "bitsandbytes"


@pytest.mark.parametrize(
    ("variable", "given", "told"),
    [
        ("MAX_MODEL_LEN", "-5", "expected at least -1, such as 4096"),
        ("MAX_NUM_SEQS", "0", "expected at least 1, such as 8"),
        ("MAX_NUM_SEQS", "-1", "expected at least 1, such as 8"),
        ("BLOCK_SIZE", "0", "expected more than 0, such as 8"),
        ("TENSOR_PARALLEL_SIZE", "0", "expected at least 1, such as 1"),
        ("GPU_MEMORY_UTILIZATION", "1.5", "expected more than 0 and at most 1, such as 0.92"),
        ("GPU_MEMORY_UTILIZATION", "0", "expected more than 0 and at most 1, such as 0.92"),
        ("CPU_OFFLOAD_GB", "-1", "expected at least 0, such as 0"),
        ("DATA_PARALLEL_RPC_PORT", "70000", "expected at least 1 and at most 65535, such as 8"),
        ("DATA_PARALLEL_SUPERVISOR_PORT", "70000", "expected a port from 1 to 65535"),
        ("DATA_PARALLEL_SUPERVISOR_PORT", "0", "expected a port from 1 to 65535"),
        ("API_SERVER_COUNT", "0", "expected at least 1: with none vLLM serves nobody"),
        ("API_SERVER_COUNT", "-2", "expected at least 1: with none vLLM serves nobody"),
        ("NUM_GPU_BLOCKS_OVERRIDE", "-1", "expected at least 1"),
        ("RENDERER_NUM_WORKERS", "0", "expected at least 1"),
        ("SPEC_TOKENS", "-1", "expected at least 1"),
        ("KV_CACHE_MEMORY_BYTES", "-1", "expected 0 or more"),
        ("KV_OFFLOADING_SIZE", "-0.5", "expected 0 or more"),
        ("SEED", "-1", "expected 0 or more"),
        ("SSE_KEEP_ALIVE_INTERVAL", "-1", "expected 0 or more"),
        ("DISTRIBUTED_TIMEOUT_SECONDS", "-1", "expected 0 or more"),
        ("CPU_DISTRIBUTED_TIMEOUT_SECONDS", "-1", "expected 0 or more"),
        ("MAX_CUDAGRAPH_CAPTURE_SIZE", "-1", "expected 0 or more"),
        ("CUDAGRAPH_CAPTURE_SIZES", "1,0", "expected sizes from 1 on"),
        ("CUDAGRAPH_CAPTURE_SIZES", "-1", "expected sizes from 1 on"),
    ],
)
def test_numbers_that_can_not_be_are_told_whatever_says_them(
    folder: Path, variable: str, given: str, told: str
) -> None:
    """Of many vLLM's own check comes late, or its code fails somewhere."""
    (problem,) = problems(folder, **{variable: given})
    assert problem.startswith(f"{variable}=")
    assert told in problem
    name = "--" + variable.lower().replace("_", "-")
    (problem,) = problems(folder, name, *given.split(","))
    assert told in problem
    shown = f"[{given}]" if "SIZES" in variable else given
    (folder / "a.yaml").write_text(f"{name[2:]}: {shown}\n")
    (problem,) = problems(folder, SUPERVISOR_CONFIG="a.yaml")
    assert told in problem
    (problem,) = problems(folder, CONFIG="a.yaml")
    assert told in problem


@pytest.mark.parametrize(
    ("variable", "given"),
    [
        ("MAX_MODEL_LEN", "-1"), ("MAX_MODEL_LEN", "auto"), ("MAX_MODEL_LEN", "1"), ("MAX_LOGPROBS", "-1"),
        ("MAX_LOG_LEN", "-1"), ("MAX_CPU_LORAS", "-1"), ("KV_CACHE_MEMORY_BYTES", "0"), ("SEED", "0"),
        ("MAX_CUDAGRAPH_CAPTURE_SIZE", "0"), ("UBATCH_SIZE", "0"), ("GPU_MEMORY_UTILIZATION", "1"),
        ("DATA_PARALLEL_SIZE_LOCAL", "0"), ("DATA_PARALLEL_SUPERVISOR_PORT", "65535"), ("CPU_OFFLOAD_GB", "0"),
    ],
)  # fmt: skip
def test_what_vllm_takes_is_taken(folder: Path, variable: str, given: str) -> None:
    assert read(folder, **{variable: given}).option(variable.lower()) == given


def test_a_length_of_zero_is_told_where_nobody_takes_it_for_not_set(folder: Path) -> None:
    (problem,) = problems(folder, "--max-model-len", "0")
    assert problem == "MAX_MODEL_LEN=0 (command line): expected at least 1, or auto"


@pytest.mark.parametrize("port", ["70000", "0", "-1"])
def test_the_port_of_the_first_machine_is_one(folder: Path, port: str) -> None:
    several = {"NNODES": "2", "TENSOR_PARALLEL_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}
    (problem,) = problems(folder, MASTER_PORT=port, **several)
    assert problem == f"MASTER_PORT={port} (environment MASTER_PORT): expected a port from 1 to 65535"
    assert read(folder, MASTER_PORT=port).warnings == ()  # a launcher's, for its own ends
