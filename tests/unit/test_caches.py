"""Compiled code on a volume: kept, and unpacked by the next start; what is wrong with the volume costs time alone."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import tarfile
import threading
import time
from pathlib import Path

import pytest

from supervisor.around import caches
from supervisor.around.caches import Caches, hardware_id
from tests.harness import mounted


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "volume" / "compiled"


def start(tmp_path: Path, store: Path, worker: str = "one", model: str = "Org/Model") -> Caches:
    """One worker's; each has a disk of its own."""
    base = tmp_path / worker
    base.mkdir(exist_ok=True)
    return Caches(base, store, version="0.32.0", model=model)


def compile_into(cache: Caches, **files: str | bytes) -> None:
    """What vLLM does. `__` stands for a folder's slash, and a dot is `_dot_`."""
    for name, content in files.items():
        path = cache.folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def content(cache: Caches) -> dict[str, bytes]:
    found = (path for path in cache.folder.rglob("*") if path.is_file())
    return {path.relative_to(cache.folder).as_posix(): path.read_bytes() for path in found}


def test_what_one_start_compiles_the_next_one_has(tmp_path: Path, store: Path) -> None:
    first = start(tmp_path, store)
    assert first.restore() == "no compiled code is kept for this vLLM, GPU and model yet"
    compile_into(first, vllm__graph="graph", triton__kernel_dot_so=b"\x7fELF")
    (first.folder / "triton/kernel.so").chmod(0o755)
    told = first.keep()
    assert told is not None
    assert told.startswith("compiled code kept for the next start: 0 MB, ")
    assert [path.name for path in store.iterdir()] == [first.archive.name]  # nothing half-written beside it
    second = start(tmp_path, store, "two")
    assert second.restore().startswith("compiled code of an earlier start: 0 MB in ")
    assert content(second) == {"vllm/graph": b"graph", "triton/kernel.so": b"\x7fELF"}
    assert (second.folder / "triton/kernel.so").stat().st_mode & 0o100


def test_a_volume_that_knows_no_modes(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a bucket that is mounted."""

    def refuse(descriptor: int, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refuse)
    first = start(tmp_path, store)
    first.restore()
    compile_into(first, vllm__graph="graph")
    before = os.listdir("/proc/self/fd")
    assert (first.keep() or "").startswith("compiled code kept for the next start")
    assert os.listdir("/proc/self/fd") == before
    assert [path.name for path in store.iterdir()] == [first.archive.name]


def test_nothing_new_is_not_written_again(tmp_path: Path, store: Path) -> None:
    first = start(tmp_path, store)
    first.restore()
    assert first.keep() is None  # vLLM compiled nothing
    assert not store.exists()
    compile_into(first, vllm__graph="graph")
    assert first.keep()
    assert first.keep() is None  # a crash, and ready again
    before = first.archive.stat().st_mtime_ns
    second = start(tmp_path, store, "two")
    second.restore()
    compile_into(second, vllm__graph_dot_lock="", vllm__gpu_p2p_access_cache_for_0_dot_json="{}")
    assert second.keep() is None
    assert first.archive.stat().st_mtime_ns == before
    compile_into(second, vllm__more="more")
    assert second.keep()
    third = start(tmp_path, store, "three")
    third.restore()
    assert content(third) == {"vllm/graph": b"graph", "vllm/more": b"more"}


def test_what_is_left_out(tmp_path: Path, store: Path) -> None:
    first = start(tmp_path, store)
    first.restore()
    compile_into(first, vllm__graph="graph", vllm__a_dot_lock="", triton__b_dot_tmp="")
    compile_into(first, vllm__gpu_p2p_access_cache_for_0_dot_json="", triton__tmp_dot_pid_7_x__kernel="half")
    (first.folder / "vllm/link").symlink_to("/etc/passwd")
    os.mkfifo(first.folder / "vllm/pipe")
    assert first.keep()
    with tarfile.open(first.archive) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if not member.isdir()] == ["./vllm/graph"]
    assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, "", "")}


def test_in_the_same_container_it_is_there_already(tmp_path: Path, store: Path) -> None:
    first = start(tmp_path, store)
    first.restore()
    compile_into(first, vllm__graph="graph")
    assert first.keep()
    again = start(tmp_path, store)
    assert again.restore() == f"compiled code of an earlier start is here: {first.folder}"
    assert again.keep() is None


def test_what_an_earlier_start_could_not_keep_the_next_one_does(tmp_path: Path, store: Path) -> None:
    compile_into(start(tmp_path, store), vllm__graph="graph")  # and crashed before it was ready
    again = start(tmp_path, store)
    again.restore()
    assert again.keep()
    assert again.archive.exists()


def test_vllm_was_quicker(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path, store)
    compile_into(first, vllm__graph="graph")
    assert first.keep()
    second = start(tmp_path, store, "two")
    unpack = tarfile.TarFile.extractall

    def slowly(self: tarfile.TarFile, *arguments: object, **more: object) -> None:
        unpack(self, *arguments, **more)  # type: ignore[arg-type]
        compile_into(second, vllm__own="own")

    monkeypatch.setattr(tarfile.TarFile, "extractall", slowly)
    assert second.restore() == "compiled code that was kept came too late"
    assert content(second) == {"vllm/own": b"own"}
    assert [path.name for path in second.folder.parent.iterdir()] == [second.folder.name]


# Others on the same volume


def keep_own(tmp_path: Path, store: Path, worker: str, go: object) -> None:
    cache = start(tmp_path, store, worker)
    compile_into(cache, **{f"vllm__{worker}{number}": worker * 50_000 for number in range(20)})
    go.wait()  # type: ignore[attr-defined]
    assert "kept for the next start" in (cache.keep() or "")


def test_two_workers_keep_at_once(tmp_path: Path, store: Path) -> None:
    context = multiprocessing.get_context("fork")
    go = context.Barrier(4)
    workers = [context.Process(target=keep_own, args=(tmp_path, store, f"w{number}", go)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    after = start(tmp_path, store, "after")
    assert after.restore().startswith("compiled code of an earlier start: ")
    (owner,) = {name.removeprefix("vllm/")[:2] for name in content(after)}  # one of them, and whole
    assert content(after) == {f"vllm/{owner}{number}": owner.encode() * 50_000 for number in range(20)}
    assert len(list(store.iterdir())) == 1


def test_halves_of_workers_that_died_are_removed(tmp_path: Path, store: Path) -> None:
    store.mkdir(parents=True)
    for name, age in ((".old.half", caches.MAX_HALF_AGE_S + 60), (".young.half", 0)):
        (store / name).write_text("")
        os.utime(store / name, (time.time() - age,) * 2)
    cache = start(tmp_path, store)
    compile_into(cache, vllm__graph="graph")
    assert cache.keep()
    assert {path.name for path in store.iterdir()} == {".young.half", cache.archive.name}


@pytest.mark.slow
def test_files_that_come_and_go_meanwhile(tmp_path: Path, store: Path) -> None:
    """vLLM goes on compiling while we pack: that may cost the archive, but not us."""
    cache = start(tmp_path, store)
    over = threading.Event()

    def work() -> None:
        number = 0
        while not over.is_set():
            number += 1
            path = cache.folder / f"triton/{number % 5}/kernel"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(number % 7 * 10_000))
            if number % 3 == 0:
                path.unlink()
                path.parent.rmdir()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for number in range(100):
            compile_into(cache, **{f"vllm__{number}": "x"})
            told = cache.keep()
            assert told is not None
            assert told.startswith(("compiled code kept", "compiled code can't be kept"))
    finally:
        over.set()
        thread.join()
    assert {path.suffix for path in store.iterdir()} == {".tar"}


# Archives that are none


def an_archive(path: Path, *members: tarfile.TarInfo) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(bytes(member.size)))


def member(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size = kind, to, 10 if kind == tarfile.REGTYPE else 0
    return found


@pytest.mark.parametrize(
    "hostile",
    [
        member("../outside"), member("a/../../outside"), member("link", tarfile.SYMTYPE, "../../outside"),
        member("link", tarfile.SYMTYPE, "/etc"), member("link", tarfile.LNKTYPE, "../outside"),
        member("device", tarfile.CHRTYPE),
    ],
    ids=lambda row: f"{row.name}-{row.type.decode()}",
)  # fmt: skip
def test_an_archive_that_reaches_out_of_its_folder(tmp_path: Path, store: Path, hostile: tarfile.TarInfo) -> None:
    cache = start(tmp_path, store)
    an_archive(cache.archive, member("vllm/graph"), hostile)
    assert "is damaged" in cache.restore()
    assert not cache.archive.exists()
    assert list(cache.folder.parent.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"one", "volume"}


def test_an_absolute_name_stays_inside(tmp_path: Path, store: Path) -> None:
    cache = start(tmp_path, store)
    an_archive(cache.archive, member("/outside"))
    cache.restore()
    assert content(cache) == {"outside": bytes(10)}


@pytest.mark.parametrize("how", ["cut", "garbage", "zeros after a while", "compressed", "empty"])
def test_a_damaged_archive_is_deleted_and_made_anew(tmp_path: Path, store: Path, how: str) -> None:
    first = start(tmp_path, store)
    compile_into(first, vllm__graph=os.urandom(100_000))
    assert first.keep()
    data = first.archive.read_bytes()
    bad = {"cut": data[:60_000], "garbage": os.urandom(5000), "zeros after a while": data[:700] + bytes(9000)}
    bad |= {"compressed": b"\x1f\x8b\x08" + bytes(600), "empty": b""}
    first.archive.write_bytes(bad[how])
    second = start(tmp_path, store, "two")
    assert second.restore().startswith("compiled code that was kept is damaged (")
    assert not second.folder.exists()
    assert not second.archive.exists()
    compile_into(second, vllm__graph="graph")
    assert second.keep()


# Disks


def test_a_volume_that_is_full(tmp_path: Path) -> None:
    with mounted(tmp_path / "volume", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as store:
        cache = start(tmp_path, store)
        cache.restore()
        compile_into(cache, vllm__small="small")
        assert cache.keep()
        before = cache.archive.read_bytes()
        compile_into(cache, vllm__graph=os.urandom(2_000_000))
        assert cache.keep() == f"compiled code can't be kept at {store} (No space left on device)"
        assert cache.archive.read_bytes() == before
        assert len(list(store.iterdir())) == 1


def test_a_disk_of_ours_that_is_full_costs_the_archive_nothing(tmp_path: Path, store: Path) -> None:
    first = start(tmp_path, store)
    compile_into(first, vllm__graph=os.urandom(2_000_000))
    assert first.keep()
    with mounted(tmp_path / "two", "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        second = start(tmp_path, store, "two")
        told = second.restore()
        assert told == "compiled code that was kept can't be unpacked (No space left on device): it is made anew"
        assert list(second.folder.parent.iterdir()) == []
    assert start(tmp_path, store, "three").restore().startswith("compiled code of an earlier start: 2 MB")


def test_a_volume_that_is_read_only(tmp_path: Path, store: Path) -> None:
    first = start(tmp_path, store)
    compile_into(first, vllm__graph="graph")
    assert first.keep()
    with mounted(store, "--bind", "-o", "ro", str(store)):
        second = start(tmp_path, store, "two")
        assert second.restore().startswith("compiled code of an earlier start: ")
        compile_into(second, vllm__more="more")
        assert second.keep() == f"compiled code can't be kept at {store} (Read-only file system)"


def test_more_than_is_worth_it(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MAX_ARCHIVE_BYTES", 10)
    cache = start(tmp_path, store)
    compile_into(cache, vllm__graph="more than ten")
    assert cache.keep() == "compiled code is not kept: 0.0 GB are too many"
    assert not store.exists()


# Names


@pytest.mark.parametrize("how", ["writable by others", "somebody else's", "a link", "a file"])
def test_a_folder_that_is_not_ours_alone(tmp_path: Path, store: Path, how: str) -> None:
    ours = tmp_path / "one" / f"vllm-supervisor-{os.getuid()}"
    ours.parent.mkdir()
    if how == "writable by others":
        ours.mkdir()
        ours.chmod(0o777)
    elif how == "somebody else's":
        if os.getuid() != 0:
            pytest.skip("another user's folder needs root")
        ours.mkdir(mode=0o755)
        os.chown(ours, 65534, 65534)
    elif how == "a link":
        ours.symlink_to(tmp_path)
    else:
        ours.write_text("")
    with pytest.raises(OSError, match=r"is somebody else's|File exists"):
        start(tmp_path, store)


def gpu(folder: Path, *models: str) -> Path:
    for number, model in enumerate(models):
        (folder / f"0000:0{number}:00.0").mkdir(parents=True)
        text = f"Model: \t\t {model}\nIRQ:   \t\t 24\nGPU UUID: \t GPU-x\n"
        (folder / f"0000:0{number}:00.0/information").write_text(text)
    return folder


def test_the_gpu_is_in_the_name(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "NVIDIA_GPUS", gpu(tmp_path / "none"))
    without = hardware_id()
    assert without == hardware_id()
    names = set()
    for models in ((), ("NVIDIA L4", "NVIDIA L4"), ("NVIDIA H100 80GB HBM3",), ("NVIDIA L4", "NVIDIA T4")):
        monkeypatch.setattr(caches, "NVIDIA_GPUS", gpu(tmp_path / str(models), *models))
        names.add(start(tmp_path, store).archive.name)
    assert names == {
        f"0.32.0-{without}-Org-Model.tar",
        "0.32.0-NVIDIA-L4-Org-Model.tar",
        "0.32.0-NVIDIA-H100-80GB-HBM3-Org-Model.tar",
        "0.32.0-NVIDIA-L4+NVIDIA-T4-Org-Model.tar",
    }


@pytest.mark.parametrize("model", ["x" * 500, "модель" * 60, "models/../../etc", "a b\nc", "名"])
def test_any_model_makes_a_name(tmp_path: Path, store: Path, model: str) -> None:
    cache = start(tmp_path, store, model=model)
    assert cache.archive.parent == store
    assert len(cache.archive.name.encode()) < 200
    compile_into(cache, vllm__graph="graph")
    assert cache.keep()
    assert start(tmp_path, store, model=model + "x").archive != cache.archive


def test_a_folder_that_the_user_chose_stays(tmp_path: Path, store: Path) -> None:
    cache = start(tmp_path, store)
    environ = cache.environment({"TRITON_CACHE_DIR": "/mine", "CUDA_CACHE_PATH": ""})
    assert "TRITON_CACHE_DIR" not in environ
    assert set(environ) == set(caches.FOLDERS) - {"TRITON_CACHE_DIR"}
    assert all(Path(path).parent == cache.folder for path in environ.values())
    assert len(set(environ.values())) == len(environ)


def test_a_python_that_can_not_unpack_safely_unpacks_nothing(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian 12's own is one: 3.11.2."""
    first = start(tmp_path, store)
    compile_into(first, vllm__graph="graph")
    assert first.keep()
    monkeypatch.delattr(tarfile, "data_filter")
    second = start(tmp_path, store, "two")
    assert "takes Python 3.11.4 or later" in second.restore()
    assert not second.folder.exists()
