"""Raw arguments: what follows `--`, and SUPERVISOR_EXTRA_ARGS. They pass as they are, and are read all the same."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from supervisor.settings.command import build
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather


def read(folder: Path, raw: str, **environ: str) -> Settings:
    vllm = {"SUPERVISOR_VLLM": str(folder.parent / "vllm/bin/vllm")}
    return gather(Arguments(model="m", vllm_args=tuple(shlex.split(raw))), vllm | environ)


def problems(folder: Path, raw: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(folder, raw, **environ)
    return caught.value.problems


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("--max-model-len 4096", {"MAX_MODEL_LEN": "4096"}),
        ("--max-model-len=4k", {"MAX_MODEL_LEN": "4k"}),
        ("--max_model_len 4096", {"MAX_MODEL_LEN": "4096"}),
        ("--max-model-len -1", {"MAX_MODEL_LEN": "-1"}),
        ("--max-model 4096", {"MAX_MODEL_LEN": "4096"}),  # argparse takes a beginning
        ("--no-enable-prefix", {"ENABLE_PREFIX_CACHING": "false"}),
        ("-tp 2", {"TENSOR_PARALLEL_SIZE": "2"}),
        ("-tp=2", {"TENSOR_PARALLEL_SIZE": "2"}),
        ("--enable-lora", {"ENABLE_LORA": "true"}),
        ("--no-enable-lora", {"ENABLE_LORA": "false"}),
        ("--disable-log-stats", {"DISABLE_LOG_STATS": "true"}),
        ("--served-model-name a b --seed 3", {"SERVED_MODEL_NAME": "a b", "SEED": "3"}),
        ("--seed 1 --seed 2", {"SEED": "2"}),
        ("--middleware a.b --middleware c.d", {"--middleware": "c.d"}),
        ("-cc.cudagraph_mode FULL", {"-cc.cudagraph_mode": "FULL"}),
        ("--compilation-config.mode=3", {"--compilation-config.mode": "3"}),
        ('--speculative-config \'{"method": "ngram"}\'', {"SPECULATIVE_CONFIG": '{"method": "ngram"}'}),
        ("--quantization None", {"QUANTIZATION": "None"}),
        ("--device-memory-utilization 0.5", {"GPU_MEMORY_UTILIZATION": "0.5"}),
        ("-O3", {}),
        ("--moe-backend Flashinfer-Cutlass", {"MOE_BACKEND": "Flashinfer-Cutlass"}),  # vLLM folds it itself
    ],
)
def test_they_pass_verbatim_and_are_understood(folder: Path, raw: str, shown: dict[str, str]) -> None:
    settings = read(folder, raw)
    assert list(build(settings, "S", "F").argv[5:]) == shlex.split(raw)
    assert {setting.name: setting.shown for _, setting in settings.raw_options} == shown
    assert settings.warnings == ()


def test_they_win_and_what_they_override_is_not_passed_twice(folder: Path) -> None:
    (folder / "config.yaml").write_text("supervisor:\nseed: 5\n")
    settings = read(folder, "--seed 7", SEED="6", MAX_NUM_SEQS="2", SUPERVISOR_EXTRA_ARGS="--max-num-seqs 3")
    assert list(build(settings, "S", "F").argv[5:]) == ["--max-num-seqs", "3", "--seed", "7"]
    told = {setting.name: (setting.shown, setting.source, setting.overrode) for _, setting in settings.raw_options}
    assert told == {
        "MAX_NUM_SEQS": ("3", "environment SUPERVISOR_EXTRA_ARGS", ("environment MAX_NUM_SEQS: 2",)),
        "SEED": ("7", "command line", ("environment SEED: 6", "config.yaml seed: 5")),
    }
    assert settings.option("seed") == "7"


def test_a_part_of_a_json_option_replaces_the_whole_as_vllm_does(folder: Path) -> None:
    settings = read(folder, "--compilation-config.mode 3", COMPILATION_CONFIG='{"cudagraph_mode": "NONE"}')
    assert list(build(settings, "S", "F").argv[5:]) == ["--compilation-config.mode", "3"]
    ((_, setting),) = settings.raw_options
    assert setting.overrode == ('environment COMPILATION_CONFIG: {"cudagraph_mode": "NONE"}',)


def test_several_add_up_where_vllm_adds_them_up(folder: Path) -> None:
    settings = read(folder, "--middleware c.d", MIDDLEWARE="a.b")
    assert list(build(settings, "S", "F").argv[5:]) == ["--middleware", "a.b", "--middleware", "c.d"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            "--max-modle-len 4",
            "--max-modle-len (command line): vLLM 0.32.0 has no such option; did you mean max-model-len?",
        ),
        ("--max-model-len four", "--max-model-len four (command line): expected auto, or a whole number, such as 4096"),
        ("--max-model-len", "--max-model-len (command line): a value is missing"),
        ("--max-model-len --seed 3", "--max-model-len (command line): a value is missing"),
        ("--dtype BFLOAT16", "expected bfloat16, in these capitals"),
        ("--tool-call-parser Hermes", "did you mean hermes?"),
        ("--dtype float8", "did you mean float"),
        (
            "--Max-Model-Len 4",
            "--Max-Model-Len (command line): vLLM 0.32.0 has no such option; did you mean max-model-len?",
        ),
        ("--allowed-origins https://a,https://b", """expected JSON: write '["https://a", "https://b"]'"""),
        ("--seed 1 2", "2 (command line): there is no option before it that takes it"),
        ("--seed 1 -2", "-2 (command line): there is no option before it that takes it"),
        ("stray", "stray (command line): there is no option before it that takes it"),
        ("--enable-lora=true", "--enable-lora takes no value"),
        ("--speculative-config {a}", "expected JSON"),
        ("--gpu-memory-utilization 90", "expected more than 0 and at most 1"),
        ("--cudagraph-capture-sizes 1 two", "expected a whole number"),
        ("--swap-space 4", "vLLM 0.32.0 has no such option any more: "),
        ("--model other", "set MODEL, or name the model after `supervisor up`"),
        ("--headless", "can't be passed to vLLM"),
        ("--hf-token x", "set HF_TOKEN in the environment"),
        ("--compilation-config.mode", "a value is missing"),
        ("--nnodes many", "--nnodes many (command line): expected a whole number"),
        ("-seed 3", "-seed (command line): vLLM 0.32.0 has no such option"),
    ],
)
def test_what_is_wrong_with_them_is_told_before_vllm_starts(folder: Path, raw: str, expected: str) -> None:
    (problem,) = problems(folder, raw)
    assert expected in problem


def test_an_option_like_no_other_may_be_of_a_vllm_of_the_users_own(folder: Path) -> None:
    settings = read(folder, "--my-companys-scheduler fancy")
    assert settings.warnings == (
        "--my-companys-scheduler (command line): vLLM 0.32.0 has no such option; it is passed as it is",
    )
    assert list(build(settings, "S", "F").argv[5:]) == ["--my-companys-scheduler", "fancy"]


@pytest.mark.parametrize("given", ["-- --seed 1", "--seed 1 --", "--seed 1 -- --enforce-eager", "--"])
def test_what_stands_before_vllms_arguments_stands_once(folder: Path, given: str) -> None:
    """vLLM would take what follows a second one for models."""
    told = "leave it out: `--` stands once, between the supervisor's arguments and vLLM's"
    assert problems(folder, given) == [f"-- (command line): {told}"]
    assert problems(folder, "", SUPERVISOR_EXTRA_ARGS=given) == [f"-- (environment SUPERVISOR_EXTRA_ARGS): {told}"]


@pytest.mark.parametrize(("given", "told"), [("--seed 1", "--seed=1"), ("-tp  2", "-tp=2")])
def test_an_option_and_its_value_in_one_word(folder: Path, given: str, told: str) -> None:
    """As in a list of arguments in YAML, where each item is a word."""
    (problem,) = problems(folder, shlex.quote(given))
    assert problem == f"{given} (command line): its value is a word of its own, or stands behind a '=': write {told}"
