"""Which files are a model's weights, whether they are whole, where they are looked for, and how they are read ahead."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from supervisor.around import prefetch
from supervisor.around.machine import Machine
from supervisor.around.prefetch import Prefetch
from supervisor.repositories import BAKED_CACHE, hub_cache, hub_env, list_places
from supervisor.settings import volume as volumes
from supervisor.settings.volume import Volume
from supervisor.weights import find as finding
from supervisor.weights import snapshot
from supervisor.weights.find import Place, find, find_snapshot
from tests.harness import mounted, wait_until

MODEL = "Org/Model"
COMMIT, NEWER = "a" * 40, "b" * 40
INDEX = "model.safetensors.index.json"


def safetensors(size: int = 100) -> bytes:
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": "U8", "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def index_of(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(names)}}).encode()


def parts(stem: str, count: int, suffix: str = "safetensors") -> list[str]:
    return [f"{stem}-{number:05}-of-{count:05}.{suffix}" for number in range(1, count + 1)]


# Which files


TWO = parts("model", 2)
ZERO = [f"model-{number:05}-of-00003.safetensors" for number in range(3)]
MISTRAL = ["consolidated.safetensors", "params.json", "config.json", INDEX, *TWO]


@pytest.mark.parametrize(
    ("names", "load_format", "index", "expected"),
    [
        (["config.json", "model.safetensors"], "auto", None, ["model.safetensors"]),
        ([INDEX, *TWO], "auto", index_of(*TWO), TWO),
        ([INDEX, TWO[0]], "auto", index_of(*TWO), TWO),  # what is missing is needed all the same
        ([INDEX, *TWO, "extra.safetensors"], "auto", index_of(*TWO), TWO),
        ([INDEX, *TWO], "auto", b"no JSON", TWO),
        ([INDEX, *TWO], "auto", b"[]", TWO),
        ([INDEX, *TWO], "auto", b'{"weight_map": {}}', TWO),
        ([TWO[1]], "auto", None, TWO),  # no index, but a row
        (ZERO, "auto", None, ZERO),  # some count from 0
        ([ZERO[0], ZERO[2]], "auto", None, ZERO),
        (parts("a", 1) + parts("b", 2)[:1], "auto", None, parts("a", 1) + parts("b", 2)),
        (MISTRAL, "auto", index_of(*TWO), ["consolidated.safetensors"]),
        (MISTRAL, "mistral", index_of(*TWO), ["consolidated.safetensors"]),
        (MISTRAL, "hf", index_of(*TWO), TWO),
        (MISTRAL, "safetensors", index_of(*TWO), TWO),
        (["consolidated.safetensors", *TWO], "hf", None, TWO),
        (["consolidated.safetensors"], "hf", None, ["consolidated.safetensors"]),
        (parts("consolidated", 2), "hf", None, parts("consolidated", 2)),
        (parts("consolidated", 2)[:1], "auto", None, parts("consolidated", 2)),
        (TWO, "mistral", None, []),
        (["pytorch_model.bin", "training_args.bin"], "auto", None, ["pytorch_model.bin"]),
        (parts("pytorch_model", 2, "bin")[:1], "auto", None, parts("pytorch_model", 2, "bin")),
        (["model.safetensors", "pytorch_model.bin", "m.pt"], "auto", None, ["model.safetensors"]),
        (["model.safetensors", "pytorch_model.bin", "m.pt"], "pt", None, ["m.pt"]),
        (["model.safetensors", "pytorch_model.bin"], "npcache", None, ["pytorch_model.bin"]),
        (["pytorch_model.bin", "optimizer.pt", "scheduler.pt"], "safetensors", None, []),
        (["m.gguf"], "auto", None, []),  # a plugin's
        (["original/consolidated.safetensors", "model.safetensors"], "auto", None, ["model.safetensors"]),
        (["original/consolidated.safetensors"], "auto", None, []),
        (["model.safetensors", "2_Dense/model.safetensors", "lora/adapter_model.safetensors"], "auto", None,
         ["2_Dense/model.safetensors", "model.safetensors"]),
        ([INDEX, *TWO, "joint_head.safetensors"], "auto", index_of(*TWO), ["joint_head.safetensors", *TWO]),
        (["pytorch_model.bin", "colbert_linear.pt", "sparse_linear.pt"], "auto", None,
         ["colbert_linear.pt", "pytorch_model.bin", "sparse_linear.pt"]),
        ([INDEX, *TWO, "whisper-large-v3/model.safetensors"], "auto", index_of(*TWO),
         [*TWO, "whisper-large-v3/model.safetensors"]),
        (["transformer/a.safetensors", "vae/b.safetensors"], "auto", None, ["transformer/a.safetensors"]),
        (["model.safetensors", "transformer/a.safetensors"], "auto", None, ["model.safetensors"]),
        (["adapter_model.safetensors", "adapter_model.bin", "optimizer.pt"], "lora", None,
         ["adapter_model.safetensors"]),
        (["adapter_model.bin", "checkpoint-9/adapter_model.safetensors"], "lora", None, ["adapter_model.bin"]),
        (["tokenizer.json", "model.safetensors"], "tokenizer", None, []),
        (["model.safetensors"], "dummy", None, []),
        (["model.safetensors"], "runai_streamer", None, []),
        ([], "auto", None, []),
    ],
)  # fmt: skip
def test_which_files_are_read(
    tmp_path: Path, names: list[str], load_format: str, index: bytes | None, expected: list[str]
) -> None:
    def locate(name: str) -> Path:
        assert name in names
        path = tmp_path / name
        path.write_bytes(index or b"")
        return path

    assert snapshot.weights(names, load_format, locate) == expected


def test_what_is_read_beside_the_weights() -> None:
    read = (
        "config.json", "params.json", "tekken.json", "tokenizer.model", "sentencepiece.bpe.model", "source.spm",
        "merges.txt", "vocab.txt", "bpe.codes", "qwen.tiktoken", "chat_template.jinja", "modeling_x.py", INDEX,
        "additional_chat_templates/rag.jinja", "1_Pooling/config.json", "speech_tokenizer/preprocessor_config.json",
        "remote/config.yaml", "tokenizer.model.v3", "tokenizer.model.v7m1", "tokenizer.model.v11", "vocab.bpe",
    )  # fmt: skip
    unread = (
        "README.md", "LICENSE", ".gitattributes", "model.safetensors", "m.nemo", "m.ckpt", "m.npz", "m.tar.gz", "m.zip",
        "m.mp4", "m.litertlm", "m.gguf", "tf_model.h5", "onnx/config.json", "original/tokenizer.model",
        "runs/Nov27/events.out.tfevents.1", "checkpoint-500/trainer_state.json", "image.png", "eval.parquet",
    )  # fmt: skip
    assert [name for name in read if not snapshot.is_read(name)] == []
    assert [name for name in unread if snapshot.is_read(name)] == []


# Whole or not


def link(path: Path, content: bytes) -> None:
    """As a hub's cache has it."""
    blob = path.parent / "blobs" / f"{path.name}.blob"
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(content)
    path.symlink_to(blob)


WHOLE: dict[str, bytes] = {"config.json": b"{}", INDEX: index_of(*TWO)} | dict.fromkeys(TWO, safetensors())
SIZE = len(safetensors())
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n"


@pytest.mark.parametrize(
    ("changes", "load_format", "expected"),
    [
        ({}, "auto", None),
        ({"config.json": None}, "auto", "config.json is missing"),
        ({"config.json": None, "params.json": b"{}"}, "auto", None),
        ({TWO[1]: None}, "auto", f"{TWO[1]} is missing"),
        ({TWO[1]: None}, "dummy", None),
        ({TWO[1]: None}, "tensorizer", None),  # who knows
        ({INDEX: None, TWO[0]: None}, "auto", f"{TWO[0]} is missing"),
        ({INDEX: index_of("other.safetensors")}, "auto", "other.safetensors is missing"),
        ({INDEX: b"{"}, "auto", None),  # then all that are there
        ({INDEX: b"[" * 200_000}, "auto", None),
        ({TWO[0]: POINTER}, "auto", f"{TWO[0]} is only a Git LFS pointer"),
        ({TWO[0]: safetensors()[:-1]}, "auto", f"{TWO[0]} is not complete: {SIZE - 1} of {SIZE} bytes"),
        ({TWO[0]: safetensors()[:40]}, "auto", f"{TWO[0]} is damaged"),
        ({TWO[0]: safetensors() + b"more"}, "auto", None),
        ({TWO[0]: b""}, "auto", f"{TWO[0]} is damaged"),
        ({TWO[0]: b"\xff" * 200}, "auto", f"{TWO[0]} is damaged"),
        ({TWO[0]: bytes(200)}, "auto", f"{TWO[0]} is damaged"),
        ({TWO[0]: (2).to_bytes(8, "little") + b"[]"}, "auto", f"{TWO[0]} is damaged"),
        ({TWO[0]: (8).to_bytes(8, "little") + b'{"w": 1}'}, "auto", f"{TWO[0]} is damaged"),
        ({TWO[0]: (30000).to_bytes(8, "little") + b"[" * 30000}, "auto", f"{TWO[0]} is damaged"),
        ({TWO[0]: None, TWO[1]: None, INDEX: None}, "auto", "there are no weights"),
        ({TWO[0]: None, TWO[1]: None, INDEX: None, "pytorch_model.bin": b"x"}, "auto", None),
        ({TWO[0]: None, TWO[1]: None, INDEX: None, "pytorch_model.bin": b""}, "auto",
         "pytorch_model.bin is not complete: 0 of 1 bytes"),
        ({TWO[0]: None, TWO[1]: None, INDEX: None, "pytorch_model.bin": POINTER}, "auto",
         "pytorch_model.bin is only a Git LFS pointer"),
        (dict.fromkeys(WHOLE) | {"m-Q4_K_M.gguf": b"GGUF"}, "auto", "config.json is missing"),
        (dict.fromkeys(WHOLE) | {"tokenizer.json": b"{}"}, "tokenizer", None),
        (dict.fromkeys(WHOLE) | {"README.md": b""}, "tokenizer", "a tokenizer is missing"),
        ({"config.json": None, "adapter_config.json": b"{}"}, "lora", "there are no weights"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": safetensors()}, "lora", None),
        ({}, "lora", "adapter_config.json is missing"),
        ({TWO[0]: "folder"}, "auto", f"{TWO[0]} can't be read (Is a directory)"),
        ({TWO[0]: "dangling"}, "auto", f"{TWO[0]} is missing"),
        ({TWO[0]: "loop"}, "auto", f"{TWO[0]} can't be read (Too many levels of symbolic links)"),
        ({"config.json": "dangling"}, "auto", "config.json is missing"),
        ({"config.json": "dangling"}, "tensorizer", "config.json is missing"),
        ({"config.json": b""}, "auto", "config.json is not complete: 0 of 1 bytes"),
        ({"adapter_config.json": b"", "adapter_model.safetensors": safetensors()}, "lora",
         "adapter_config.json is not complete: 0 of 1 bytes"),
        ({"tokenizer.json": "dangling"}, "auto", "tokenizer.json is missing"),
        ({"tokenizer.json": "dangling"}, "tokenizer", "tokenizer.json is missing"),
        ({"tokenizer.json": POINTER}, "auto", "tokenizer.json is only a Git LFS pointer"),
        ({"1_Pooling/config.json": "dangling"}, "auto", "1_Pooling/config.json is missing"),
        ({"README.md": "dangling", "image.png": "dangling", "onnx/config.json": "dangling"}, "auto", None),
        ({"tokens.txt": b"version control"}, "auto", None),
        ({"merges.txt": b"", "__init__.py": b"", "generation_config.json": b""}, "auto", None),
    ],
)  # fmt: skip
def test_what_a_folder_lacks(
    tmp_path: Path, changes: dict[str, bytes | str | None], load_format: str, expected: str | None
) -> None:
    for name, content in (WHOLE | changes).items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            link(path, content)
        elif content == "folder":
            path.mkdir()
        elif content is not None:
            path.symlink_to("nowhere" if content == "dangling" else path)
    assert snapshot.find_fault(tmp_path, load_format) == expected


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert snapshot.find_fault(tmp_path / "nowhere") == "it can't be read (No such file or directory)"
    assert snapshot.find_fault(tmp_path / "file") == "it can't be read (Not a directory)"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, True),
        ({"config.json": "{}"}, True),
        ({"config.json": "no JSON"}, True),
        ({"config.json": "[]"}, True),
        ({"config.json": '{"auto_map": {"AutoModel": "modeling_x.X"}}'}, True),
        ({"config.json": '{"auto_map": {"AutoModel": "org/other--modeling_x.X"}}'}, False),
        ({"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["org/other--tokenization.T", null]}}'}, False),
        ({"preprocessor_config.json": '{"auto_map": {"AutoProcessor": "org/other--processing.P"}}'}, False),
        ({"config.json": '{"text_model_id": "org/text", "audio_model_id": null}'}, False),
        ({"config.json": '{"text_model_id": null, "audio_model_id": "org/audio"}'}, False),
        ({"config.json": '{"text_model_id": null, "audio_model_id": null}'}, True),
        ({"config.json": '{"speculators_config": {"verifier": {"name_or_path": "org/verifier"}}}'}, False),
    ],
)
def test_self_contained(tmp_path: Path, files: dict[str, str], expected: bool) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert snapshot.is_self_contained(tmp_path) is expected


# Where


def make_cache(
    cache: Path, commits: tuple[str, ...] = (COMMIT,), refs: dict[str, str] | None = None, **more: object
) -> Path:
    """A cache that has the model, and `refs`; `name`: the folder's, where it is not as the hub's client writes it."""
    repository = cache / str(more.get("name", "models--Org--Model"))
    for number, commit in enumerate(commits):
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        for name, content in WHOLE.items():
            if name != more.get("without"):
                (folder / name).write_bytes(content)
        os.utime(folder, (number, number))
    for name, commit in ({"main": COMMIT} if refs is None else refs).items():
        (repository / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    return repository / "snapshots"


BOTH = (NEWER, COMMIT)  # the latter was written last


@pytest.mark.parametrize(
    ("commits", "refs", "revision", "expected"),
    [
        ((COMMIT,), {"main": COMMIT}, None, COMMIT),
        ((COMMIT,), {"main": COMMIT + "\n"}, None, COMMIT),
        (BOTH, {"main": NEWER}, None, NEWER),
        (BOTH, {"main": NEWER, "v2": COMMIT}, "v2", COMMIT),
        (BOTH, {"refs/pr/1": COMMIT}, "refs/pr/1", COMMIT),
        (BOTH, {"main": NEWER}, COMMIT, COMMIT),
        (BOTH, {"main": NEWER}, "c" * 40, None),
        (BOTH, {"main": NEWER}, "v3", None),
        ((COMMIT,), {"main": NEWER}, None, None),  # half of an update
        ((COMMIT,), {}, None, COMMIT),
        (BOTH, {}, None, COMMIT),
        (BOTH, {"main": ""}, None, COMMIT),
        ((), {"main": COMMIT}, None, None),
        ((), {}, None, None),
    ],
)
def test_which_snapshot(
    tmp_path: Path, commits: tuple[str, ...], refs: dict[str, str], revision: str | None, expected: str | None
) -> None:
    snapshots = make_cache(tmp_path, commits, refs)
    snapshots.mkdir(parents=True, exist_ok=True)
    (snapshots / "dangling").symlink_to("nowhere")
    found = find_snapshot(tmp_path, MODEL, revision)
    assert found == (snapshots / expected if expected else None)


def test_capitals_do_not_matter_but_the_exact_name_is_preferred(tmp_path: Path) -> None:
    lower = make_cache(tmp_path, name="models--org--model")
    assert find_snapshot(tmp_path, MODEL, None) == lower / COMMIT
    exact = make_cache(tmp_path)
    assert find_snapshot(tmp_path, MODEL, None) == exact / COMMIT
    assert find_snapshot(tmp_path, "Org/Other", None) is None
    assert find_snapshot(tmp_path / "nowhere", MODEL, None) is None


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Place]:
    names = {"baked": "baked into the image", "volume": "on the volume", "cache": "in the hub's cache"}
    return {name: Place(text, tmp_path / name, is_pinned=name != "cache") for name, text in names.items()}


def look(three: dict[str, Place], model: str = MODEL, revision: str | None = None, **environ: str) -> finding.Weights:
    return find(model, revision, "auto", three.values(), environ)


def test_the_order(three: dict[str, Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert look(three) == finding.Weights("the hub", None, needs_download=True)
    for name in ("cache", "volume", "baked"):  # each before the one that was there already
        folder = make_cache(three[name].cache) / COMMIT
        found = look(three)
        assert found == finding.Weights(f"{three[name].name}, {folder}", folder, needs_download=name == "cache")
    (tmp_path / MODEL).mkdir(parents=True)
    found = look(three)
    assert (found.folder, found.needs_download, found.source) == (Path(MODEL), False, "the folder Org/Model")


def test_who_is_asked_for_news(three: dict[str, Place]) -> None:
    """Whoever filled the image or the volume chose what is served; the hub's cache is the hub's."""
    make_cache(three["cache"].cache, refs={"main": COMMIT, "v2": COMMIT})
    assert look(three).needs_download
    assert look(three, revision="v2").needs_download
    assert not look(three, revision=COMMIT).needs_download  # never changes
    assert not look(three, HF_HUB_OFFLINE="1").needs_download
    assert not look(three, HF_HUB_OFFLINE="YES").needs_download
    assert not look(three, TRANSFORMERS_OFFLINE="1").needs_download
    assert look(three, HF_HUB_OFFLINE="0").needs_download


def test_what_is_not_whole_is_passed_over_and_said_to_be(three: dict[str, Place]) -> None:
    half = make_cache(three["baked"].cache, without=TWO[1]) / COMMIT
    told = (f"Org/Model is baked into the image ({half}), but not whole: {TWO[1]} is missing",)
    assert look(three) == finding.Weights("the hub", None, needs_download=True, rejections=told)
    whole = make_cache(three["volume"].cache) / COMMIT
    assert look(three) == finding.Weights(f"on the volume, {whole}", whole, rejections=told)


def test_without_a_hub(three: dict[str, Place]) -> None:
    """The download is what says that there may be none; of half a model vLLM may make something."""
    assert look(three, HF_HUB_OFFLINE="1") == finding.Weights("the hub", None, needs_download=True)
    make_cache(three["cache"].cache, without=TWO[1])
    found = look(three, HF_HUB_OFFLINE="1")
    assert (found.folder, found.needs_download, len(found.rejections)) == (None, False, 1)


@pytest.mark.parametrize("model", ["s3://bucket/model", "/models/nowhere", "a/b/c", "hf://a/b"])
def test_what_is_left_to_vllm(three: dict[str, Place], model: str) -> None:
    assert look(three, model) == finding.Weights("left to vLLM")


def test_gguf(three: dict[str, Place], tmp_path: Path) -> None:
    """Whether this vLLM has it is told where vLLM's Python is to be had."""
    assert look(three, "org/name:Q4_K_M") == finding.Weights("left to vLLM", is_gguf=True)
    assert find("org/name", None, "gguf", three.values(), {}) == finding.Weights("left to vLLM", is_gguf=True)
    (tmp_path / "m.gguf").touch()
    assert look(three, str(tmp_path / "m.gguf")).is_gguf
    assert not look(three, str(tmp_path)).is_gguf


@pytest.mark.parametrize("load_format", ["runai_streamer", "sharded_state", "tensorizer", "my_own"])
def test_formats_that_have_weights_in_ways_of_their_own(three: dict[str, Place], load_format: str) -> None:
    def found() -> finding.Weights:
        return find(MODEL, None, load_format, three.values(), {})

    told = finding.Weights(f"left to vLLM, whose {load_format} has them in a way of its own")
    assert found() == told
    make_cache(three["cache"].cache)
    assert found() == told
    folder = make_cache(three["volume"].cache) / COMMIT  # somebody put it there for this
    assert found().folder == folder


def test_another_hub_is_left_to_vllm(three: dict[str, Place]) -> None:
    make_cache(three["cache"].cache)
    assert look(three, VLLM_USE_MODELSCOPE="True") == finding.Weights("left to vLLM")
    assert look(three, VLLM_USE_MODELSCOPE="0").folder is not None


def test_a_name_that_is_too_long_for_a_file(three: dict[str, Place]) -> None:
    assert look(three, "a/" + "b" * 5000).needs_download


def test_places(tmp_path: Path) -> None:
    environ = {"HF_HOME": "/h", "HOME": "/home/u"}
    assert [(place.cache, place.is_pinned) for place in list_places(environ, tmp_path)] == [
        (BAKED_CACHE, True),
        (tmp_path / "huggingface-cache/hub", True),
        (Path("/h/hub"), False),
    ]
    own = {"HF_HOME": str(tmp_path / "huggingface-cache")}  # the volume's, as we set it: no second time
    assert [place.is_pinned for place in list_places(own, tmp_path)] == [True, True]
    assert [place.cache for place in list_places(environ, None, "/models")] == [BAKED_CACHE, Path("/models")]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HOME": "/u"}, "/u/.cache/huggingface/hub"),
        ({"HOME": "/u", "XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HOME": "/u", "HF_HOME": "/h"}, "/h/hub"),
        ({"HOME": "/u", "HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HOME": "/u", "HF_HUB_CACHE": "/c", "HUGGINGFACE_HUB_CACHE": "/old"}, "/c"),
        ({"HF_HOME": ""}, "/tmp/.cache/huggingface/hub"),
        ({"HOME": "/u", "HF_HOME": "$HOME/hf"}, "/u/hf/hub"),
        ({"DATA": "/d", "HF_HUB_CACHE": "$DATA/hub"}, "/d/hub"),
        ({"HF_HUB_CACHE": "$NOWHERE/hub"}, "$NOWHERE/hub"),
        ({"HF_HOME": "~/hf"}, "/me/hf/hub"),
    ],
)
def test_the_hubs_own_cache(environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the client reads it: with variables, and with the home."""
    monkeypatch.setenv("HOME", "/me")
    assert hub_cache(environ) == Path(expected)


# The volume


def test_the_hubs_client_on_a_volume(tmp_path: Path) -> None:
    fast = {"HF_XET_HIGH_PERFORMANCE": "1"}
    own = {"HF_HOME": str(tmp_path / "huggingface-cache"), "HF_XET_CACHE": "/w/xet"}
    assert hub_env(Volume(tmp_path, is_writable=True), {}, "/w") == fast | own
    assert hub_env(Volume(tmp_path, is_writable=False), {}, "/w") == fast
    assert hub_env(None, {}, "/w") == fast
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        assert hub_env(Volume(tmp_path, is_writable=True), {name: "/mine"}, "/w") == fast
    assert hub_env(None, {"HF_XET_HIGH_PERFORMANCE": "0"}, "/w") == {}


def test_which_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serverless, pod = tmp_path / "runpod-volume", tmp_path / "workspace"
    monkeypatch.setattr(volumes, "SERVERLESS_MOUNT", serverless)
    monkeypatch.setattr(volumes, "POD_MOUNT", pod)
    assert volumes.find(None, {"RUNPOD_POD_ID": "p"}) is None
    pod.mkdir()
    assert volumes.find(None, {}) is None  # anybody's folder of that name
    assert volumes.find(None, {"RUNPOD_POD_ID": "p"}) == Volume(pod, is_writable=True)
    serverless.mkdir()
    assert volumes.find(None, {"RUNPOD_POD_ID": "p"}) == Volume(serverless, is_writable=True)
    assert volumes.find(str(tmp_path), {}) == Volume(tmp_path, is_writable=True)
    assert volumes.find(str(tmp_path / "nowhere"), {}) is None
    (tmp_path / "file").write_text("")
    assert volumes.find(str(tmp_path / "file"), {}) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "runpod-volume", "workspace"]


def test_a_read_only_volume(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with mounted(tmp_path / "data", "--bind", "-o", "ro", str(tmp_path / "data")) as folder:
        assert volumes.find(str(folder), {}) == Volume(folder, is_writable=False)


def test_what_another_user_may_not_see(tmp_path: Path) -> None:
    """In a process of nobody's: it is neither a volume nor a place with weights, and no error."""
    if os.getuid() != 0:
        pytest.skip("another user needs root")
    (tmp_path / "hidden" / "hub").mkdir(parents=True)
    tmp_path.chmod(0o700)
    program = (
        "import os, sys; sys.path.insert(0, os.getcwd())\n"
        "from pathlib import Path\n"
        "from supervisor.settings import volume; from supervisor.weights.find import Place, find\n"
        "os.setgid(65534); os.setuid(65534); folder = Path(sys.argv[1])\n"
        "print(volume.find(str(folder / 'hidden'), {}))\n"
        "places = [Place('there', folder / 'hidden' / 'hub', is_pinned=True)]\n"
        "print(find('Org/Model', None, 'auto', places, {}).source, find(str(folder), None, 'auto', [], {}).source)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "None\nthe hub left to vLLM\n", done.stderr


# Reading ahead


def cached(path: Path) -> float:
    """How much of a file is in the page cache, as the kernel tells."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_WRITE) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        begin = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(size), pages) == 0, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in pages) / len(pages)


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{number}.safetensors" for number in range(6)]
    for path in found:
        path.write_bytes(os.urandom(1 << 20) * 4)
        forget(path)
    if cached(found[0]) > 0.5:
        pytest.skip("this file system keeps its files in memory")
    return found


def test_the_weights_are_in_the_page_cache(files: list[Path]) -> None:
    reading = Prefetch(files)
    wait_until(lambda: not any(thread.is_alive() for thread in reading.threads), "all to be read")
    assert min(cached(path) for path in files) > 0.99  # a machine that is short of memory takes some back
    assert reading.total_bytes == len(files) * 4 << 20


def test_more_than_memory_is_not_read(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "spare_memory", lambda _: (len(files) * 4 << 20) - 1)
    assert Prefetch(files).threads == []
    assert max(map(cached, files)) < 0.5


def test_it_stops_early(tmp_path: Path) -> None:
    """A pipe that nobody writes to holds a reader up for as long as the test wants."""
    pipes = [tmp_path / f"{number}" for number in range(prefetch.READERS)]
    for path in pipes:
        os.mkfifo(path)
    later = tmp_path / "later"
    later.write_bytes(bytes(1 << 20))
    forget(later)
    reading = Prefetch([*pipes, later])
    assert len(reading.threads) == prefetch.READERS
    wait_until(lambda: reading.pending_files == [later], "a reader for each pipe")
    reading.stop()

    def let_go(path: Path) -> bool:
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return True
        return False

    for path in pipes:
        wait_until(partial(let_go, path), "a reader")
    wait_until(lambda: not any(thread.is_alive() for thread in reading.threads), "the readers to leave")
    assert reading.pending_files == [later]


def test_what_can_not_be_read_is_none_of_its_business(tmp_path: Path) -> None:
    assert Prefetch([tmp_path / "nowhere"]).threads == []
    assert Prefetch([]).threads == []
