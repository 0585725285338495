"""Every option of the installed vLLM, by every way in: what comes out is what vLLM's own parser makes of the option.

For each option a value is chosen that is not its default. It goes in as a variable, in config.yaml (both spellings),
and behind `--`; the argv that comes out is parsed by vLLM's parser, in vLLM's environment, and so is the option as one
would write it for `vllm serve` itself. All must give the same value, and another than without the option.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from supervisor.settings.command import build
from supervisor.settings.names import OWNED
from supervisor.settings.settings import Arguments, SettingsError, gather
from supervisor.vllm import catalogue as catalogues
from supervisor.vllm.catalogue import Option
from supervisor.vllm.installed import PINNED
from tests.vllm.conftest import VLLM

pytestmark = pytest.mark.vllm

OPTIONS = catalogues.parse((catalogues.FLAGS / f"{PINNED}.json").read_text()).by_key
# Options whose JSON has to have certain fields, or that have one value only that another than the default.
SAMPLES: dict[str, object] = {
    "attention_config": {"backend": "TRITON_ATTN"},
    "aux_output_config": {"max_bytes": 7},
    "compilation_config": {"cudagraph_capture_sizes": [1, 2]},
    "diffusion_config": {"canvas_length": 7},
    "ec_manager_config": {"encoder_cache_manager_cls": "a.b"},
    "ec_transfer_config": {"ec_connector": "x", "ec_role": "ec_producer", "engine_id": "x"},
    "eplb_config": {"window_size": 7},
    "fault_tolerance_config": {"engine_recovery_timeout_sec": 7},
    "ir_op_priority": {"rms_norm": ["native"]},
    "kernel_config": {"moe_backend": "triton"},
    "kv_events_config": {"publisher": "zmq"},
    "kv_transfer_config": {"kv_connector": "x", "kv_role": "kv_both", "engine_id": "x"},
    "pooler_config": {"pooling_type": "MEAN"},
    "profiler_config": {"max_iterations": 7},
    "reasoning_config": {"reasoning_start_str": "<a>", "reasoning_end_str": "</a>"},
    "structured_outputs_config": {"disable_any_whitespace": True, "backend": "xgrammar"},
    "watermark_config": {"context_width": 7},
    "weight_transfer_config": {"backend": "ipc"},
    "mm_encoder_attn_backend": "TRITON_ATTN",
    "attention_backend": "TRITON_ATTN",
    "limit_mm_per_prompt": {"image": 3},
    "lora_modules": [{"name": "a", "path": "b"}, {"name": "c", "path": "d,e f"}],
    "middleware": ["a.b", "c.d"],
    "grpc_port": 5001,
    "load_format": "safetensors",
    "quantization": "awq",
    "reasoning_parser": "qwen3",
    "tool_call_parser": "hermes",
    "speculative_config": {"method": "ngram"},
}
# Options that mean something in company alone: what is set beside them. A rank above 0 has another command, and is
# tests/unit/test_cluster.py's.
COMPANY = {
    "enable_auto_tool_choice": {"TOOL_CALL_PARSER": "hermes"},
    "lora_modules": {"ENABLE_LORA": "true"},
    "max_num_batched_tokens": {"MAX_NUM_SEQS": "1"},
    "nnodes": {"TENSOR_PARALLEL_SIZE": "7", "MASTER_ADDR": "h"},
    "master_addr": {"NNODES": "2", "TENSOR_PARALLEL_SIZE": "2"},
    "master_port": {"NNODES": "2", "TENSOR_PARALLEL_SIZE": "2", "MASTER_ADDR": "h"},
}
ELSEWHERE = {"node_rank"}


@dataclass(frozen=True)
class Row:
    """One way in: the argv that came out."""

    option: Option
    way: str
    argv: list[str]


def sample(option: Option, folder: Path) -> object:
    """A value that is not the default, as one would write it in YAML."""
    if option.key in SAMPLES:
        return SAMPLES[option.key]
    if option.key == "allowed_local_media_path":
        return str(folder)
    if option.key in ("chat_template", "tool_parser_plugin", "reasoning_parser_plugin"):
        file = folder / "a.file"
        file.touch()
        return str(file)
    if option.key == "config":
        file = folder / "vllm.yaml"
        file.write_text("max-num-seqs: 7\n")
        return str(file)
    if option.kind in ("pair", "switch"):
        return not option.default
    if option.choices:
        found: object = next(choice for choice in option.choices if choice != str(option.default))
    elif option.type == "int":
        found = next(number for number in (7, 8) if number != option.default)
    else:
        found = {
            "float": 0.5, "human_int": "3k", "human_int_or_auto": "3k", "csv": ["0", "1"],
            "json": ["x"] if isinstance(option.default, list) else {"a": 1},
            "json_or_str": {"a": "b"}, "json_human": {},
        }.get(option.type, "some/text")  # fmt: skip
    return [found] if option.kind in ("list", "append") else found


def written(option: Option, value: object) -> str:
    """As a text for the environment."""
    if isinstance(value, list) and option.type != "json" and all(isinstance(item, str | int) for item in value):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def reference(option: Option, value: object) -> list[str]:
    """As one writes it for `vllm serve`."""
    if option.kind in ("pair", "switch"):
        return [option.name if value else f"--no-{option.name[2:]}"]
    if isinstance(value, list) and option.kind in ("list", "append"):
        texts = [json.dumps(item) if isinstance(item, dict) else str(item) for item in value]
        return (
            [word for text in texts for word in (option.name, text)]
            if option.kind == "append"
            else [option.name, *texts]
        )
    if option.type == "csv" and isinstance(value, list):
        return [option.name, ",".join(value)]
    return [option.name, json.dumps(value) if isinstance(value, dict | list) else str(value)]


def out(arguments: Arguments, **environ: str) -> list[str]:
    settings = gather(arguments, {"SUPERVISOR_VLLM": str(VLLM), "SUPERVISOR_ACCESS_LOG": "false", **environ})
    argv = list(build(settings, "S", "F").argv)
    assert argv[1:5] == ["serve", "m", "--uds", "S"]
    return [*argv[2:3], *argv[5:]]


def ways(option: Option, value: object, folder: Path) -> list[Row]:
    plain, company = Arguments(model="m"), COMPANY.get(option.key, {})
    rows = [Row(option, "environment", out(plain, **company, **{option.variable: written(option, value)}))]
    for name in {option.key, option.name[2:]}:
        file = folder / f"{name}.config"
        file.write_text(yaml.safe_dump({name: value}))
        rows.append(Row(option, f"config.yaml {name}", out(Arguments(model="m", config=str(file)), **company)))
    raw = Arguments(model="m", vllm_args=tuple(reference(option, value)))
    rows.append(Row(option, "command line", out(raw, **company)))
    if option.kind == "list" and isinstance(value, list):
        as_json = {option.variable: json.dumps(value)}
        rows.append(Row(option, "environment, JSON", out(plain, **company, **as_json)))
        if all(isinstance(item, str) for item in value):
            rows.append(Row(option, "environment, spaces", out(plain, **company, **{option.variable: " ".join(value)})))
    if option.kind == "pair" and option.opposite:
        rows.append(Row(option, "opposite", out(plain, **company, **{option.opposite.upper(): str(not value).lower()})))
    return rows


def parsed(rows: list[list[str]]) -> list[dict[str, str]]:
    done = subprocess.run(
        [str(VLLM.parent / "python"), str(Path(__file__).parent / "parse_argv.py")],
        input=json.dumps(rows), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, list)
    return found


def test_every_option_by_every_way_is_what_vllm_would_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows: list[Row] = []
    for option in OPTIONS.values():
        if option.key in OWNED | dict.fromkeys(ELSEWHERE, "") or option.key == "model":
            continue
        value = sample(option, tmp_path)
        beside = [
            word
            for key, text in COMPANY.get(option.key, {}).items()
            for word in (reference(OPTIONS[key.lower()], text == "true" or text))
        ]
        whole = ["m", *beside, *reference(option, value)]
        rows += [Row(option, "without", ["m", *beside]), Row(option, "reference", whole)]
        rows += ways(option, value, tmp_path)
    found = parsed([row.argv for row in rows])
    wrong, values = [], {}
    for row, result in zip(rows, found, strict=True):
        if row.way in ("without", "reference"):
            values[row.option.key, row.way] = result
        if "error" in result or (row.way != "without" and result != values[row.option.key, "reference"]):
            wrong.append(f"{row.option.name} by {row.way}: {row.argv[1:]} -> {result}")
        if row.way == "reference" and result == values[row.option.key, "without"]:
            wrong.append(f"{row.option.name}: {row.argv[1:]} changes nothing: choose another sample")
    assert not wrong, "\n".join(wrong)
    assert len({row.option.key for row in rows}) + len(OWNED) + len(ELSEWHERE) + 1 == 316


def test_owned_options_are_reported_by_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vllm = {"SUPERVISOR_VLLM": str(VLLM), "SUPERVISOR_ACCESS_LOG": "false"}
    for key in OWNED:
        option = OPTIONS[key]
        value = sample(option, tmp_path)
        if option.variable not in ("PORT", "HF_TOKEN"):
            settings = gather(Arguments(model="m"), vllm | {option.variable: written(option, value)})
            assert any(option.variable in warning for warning in settings.warnings), key
            assert build(settings, "S", "F").argv[3:] == ("--uds", "S")
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({key: value}))
        settings = gather(Arguments(model="m", config="c.yaml"), vllm)
        assert any(key in warning for warning in settings.warnings), key
        with pytest.raises(SettingsError, match=option.name):
            gather(Arguments(model="m", vllm_args=(option.name,)), vllm)


def test_the_model_by_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: m\n")
    (tmp_path / "vllm.yaml").write_text("model: m\nmax-num-seqs: 7\n")
    assert out(Arguments(model="m")) == out(Arguments(), MODEL="m") == out(Arguments(config="c.yaml")) == ["m"]
    by_vllm = out(Arguments(), CONFIG="vllm.yaml")
    (found,) = parsed([by_vllm])
    assert "('max_num_seqs', 7)" in found["value"]
    assert "('model_tag', 'm')" in found["value"]
