"""The downloading program's decisions, with a stand-in for the hub's client, which only vLLM's environment has."""

from __future__ import annotations

import fcntl
import json
import sys
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from supervisor.weights import download, halves, refusals


class Client:
    """`huggingface_hub`: modules with what a test puts there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hub = ModuleType("huggingface_hub")
        self.constants = SimpleNamespace(DOWNLOAD_CHUNK_SIZE=10_000_000)
        self.file_download = SimpleNamespace()
        self.hub.__dict__.update(__version__="9.9", constants=self.constants, file_download=self.file_download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", self.hub)

    def takes(self, content: bytes, *, breaks_off_after: int | None = None) -> None:
        """Gives it a way to take files."""

        def http_get(url: str, temp_file: Any, *, resume_size: int = 0, expected_size: int | None = None) -> None:
            assert temp_file.tell() == resume_size
            temp_file.write(content[resume_size:breaks_off_after])
            if breaks_off_after is not None:
                raise ConnectionError(url)

        self.file_download.http_get = http_get

    def download(self, blob: Path, size: int) -> None:
        """As the client does it: into a file of this try, which is deleted when that fails, and renamed at the end."""
        path = blob.with_name(f"{blob.name}.0123abcd.incomplete")
        try:
            with path.open("wb") as file:
                self.file_download.http_get("http://hub", file, expected_size=size)
            path.replace(blob)
        finally:
            path.unlink(missing_ok=True)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(monkeypatch)


# Halves


def test_a_half_is_gone_on_with(client: Client, tmp_path: Path) -> None:
    told: list[str] = []
    content = bytes(range(200))
    client.takes(content, breaks_off_after=120)
    halves.keep(told.append)
    with pytest.raises(ConnectionError):
        client.download(tmp_path / "blob", 200)
    assert [path.name for path in tmp_path.iterdir()] == ["blob.kept.incomplete"]
    client.takes(content)
    halves.keep(told.append)
    client.download(tmp_path / "blob", 200)
    assert (tmp_path / "blob").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]
    assert told == []
    assert client.constants.DOWNLOAD_CHUNK_SIZE == halves.CHUNK_BYTES


def test_a_half_that_is_too_long_is_begun_anew(client: Client, tmp_path: Path) -> None:
    (tmp_path / "blob.kept.incomplete").write_bytes(bytes(300))
    client.takes(b"1" * 200)
    halves.keep(lambda _: None)
    client.download(tmp_path / "blob", 200)
    assert (tmp_path / "blob").read_bytes() == b"1" * 200


def test_two_workers_without_a_lock_write_the_same_file(client: Client, tmp_path: Path) -> None:
    """On a volume whose locks hold nobody off. The slower one's file is gone at its end; its next try has it."""
    content, whole = bytes(range(200)), tmp_path / "blob"

    def slower(url: str, temp_file: Any, *, resume_size: int, expected_size: int) -> None:
        temp_file.write(content[:50])
        temp_file.flush()
        client.takes(content)
        halves.keep(lambda _: None)
        client.download(whole, 200)
        temp_file.write(content[50:])

    client.file_download.http_get = slower
    halves.keep(lambda _: None)
    with pytest.raises(FileNotFoundError):
        client.download(whole, 200)
    assert whole.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


def fetch(url: str, temp_file: Any, *, start: int = 0) -> None:
    """A way to take files that we do not know."""


@pytest.mark.parametrize("theirs", [None, fetch, "no function"])
def test_a_client_that_has_no_such_seam_is_told_of(client: Client, theirs: object) -> None:
    told: list[str] = []
    if theirs is not None:
        client.file_download.http_get = theirs
    halves.keep(told.append)
    assert told == ["what breaks off begins anew: huggingface_hub 9.9 takes files in a way that is new to us"]
    assert getattr(client.file_download, "http_get", None) is theirs


def test_a_client_that_names_its_files_otherwise_is_told_of(client: Client, tmp_path: Path) -> None:
    told: list[str] = []
    client.takes(b"content")
    halves.keep(told.append)
    with (tmp_path / "blob.part").open("wb") as file:
        client.file_download.http_get("http://hub", file, expected_size=7)
    assert (tmp_path / "blob.part").read_bytes() == b"content"
    assert len(told) == 1


# What Xet has checked


LARGE, SMALL = SimpleNamespace(sha256="0" * 64), None


@pytest.mark.parametrize(
    ("rows", "has_client", "expected"),
    [
        ([(LARGE, "x"), (SMALL, None)], True, True),
        ([(LARGE, "x")], False, False),  # hf_xet is missing, or HF_HUB_DISABLE_XET is set
        ([(LARGE, None), (SMALL, None)], True, False),  # a mirror
        ([(LARGE, "x"), (LARGE, None)], True, False),
        ([(SMALL, None)], True, False),
    ],
)
def test_what_is_not_read_a_second_time(
    client: Client, tmp_path: Path, rows: list[tuple[Any, str | None]], has_client: bool, expected: bool
) -> None:
    client.file_download.is_xet_available = lambda: has_client
    asked: list[str] = []

    class HfApi:
        def verify_repo_checksums(self, repo: str, **_: str) -> SimpleNamespace:
            asked.append(repo)
            return SimpleNamespace(mismatches=[])

    client.hub.__dict__["HfApi"] = HfApi
    repository = download.Download(tmp_path, {"repo": "org/name"})
    repository.files = {
        f"file {number}": SimpleNamespace(lfs=lfs, xet_hash=xet, size=1) for number, (lfs, xet) in enumerate(rows)
    }
    assert download.uses_xet(repository.files.values()) is expected
    repository._check()
    assert asked == ([] if expected else ["org/name"])


def test_an_older_client_has_neither_xet_nor_checksums(client: Client, tmp_path: Path) -> None:
    client.hub.__dict__["HfApi"] = object
    repository = download.Download(tmp_path, {"repo": "org/name"})
    repository.files = {"model.safetensors": SimpleNamespace(lfs=LARGE, size=1)}
    assert not download.uses_xet(repository.files.values())
    repository._check()


# What comes


def listing(client: Client, *names: str, sha: str | None = "a" * 40) -> None:
    """The hub has these files."""
    rows = [SimpleNamespace(path=name, size=1, lfs=None, blob_id=f"{number:040}") for number, name in enumerate(names)]

    class HfApi:
        def model_info(self, _repo: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(sha=sha)

        def list_repo_tree(self, _repo: str, **_: object) -> list[SimpleNamespace]:
            return [*rows, SimpleNamespace(path="folder")]

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], dry_run: bool = False, **_: object) -> list[Any]:
        assert dry_run
        return [SimpleNamespace(filename=name, will_download=True) for name in allow_patterns]

    client.hub.__dict__.update(HfApi=HfApi, snapshot_download=snapshot_download, hf_hub_download=print)


def test_files_that_are_to_be_ignored_do_not_come(client: Client, tmp_path: Path) -> None:
    """vLLM has the patterns hold for weights: a configuration or a tokenizer comes whatever they say."""
    listing(client, "config.json", "merges.txt", "model.safetensors", "model.fp16.safetensors")
    repository = download.Download(tmp_path, {"repo": "org/name", "ignore": ["*.fp16.safetensors", "*.txt"]})
    repository.ask()
    assert list(repository.files) == ["config.json", "merges.txt", "model.safetensors"]


def test_a_name_that_leads_out_of_the_folder_is_none(client: Client, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("somebody else's")
    names = ["config.json", "model.safetensors", str(outside), f"/{outside}", "../../../../outside.json"]
    names += ["..\\outside.json", "a\\..\\..\\outside.json", "\\outside.json", "a//../outside.json"]
    listing(client, *names)
    repository = download.Download(tmp_path / "cache", {"repo": "org/name"})
    repository.ask()
    assert list(repository.files) == ["config.json", "model.safetensors"]
    assert download.check_room(repository, [repository]) == 2
    assert outside.read_text() == "somebody else's"


@pytest.mark.parametrize("sha", [None, "", "main", "../../../outside", "A" * 40, "a" * 40 + "\n"])
def test_a_commit_that_is_none_is_no_folder(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha: str | None
) -> None:
    """It may come right at the next try, as with anything else that a proxy says in the hub's place."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    listing(client, "config.json", "model.safetensors", sha=sha)
    repository = download.Download(tmp_path, {"repo": "org/name"})
    with pytest.raises(
        refusals.UnavailableError, match="The hub could not be reached: the hub names no commit"
    ) as error:
        repository.ask()
    assert error.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


# What has room


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a download that was killed a moment ago left of a file; its lock's folder is there."""
    blob = tmp_path / "models--org--name/blobs" / ("1" * 64)
    blob.parent.mkdir(parents=True)
    (tmp_path / ".locks/models--org--name").mkdir(parents=True)
    path = blob.with_name(f"{blob.name}.0123abcd.incomplete")
    path.write_bytes(bytes(5000))
    return path


def test_what_was_killed_a_moment_ago_is_removed_only_where_its_room_is_needed(
    tmp_path: Path, left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = left.with_name("1" * 64)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    assert halves.sweep(left.parent.parent, {blob: 9000}) == {blob: 9000}
    assert left.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=8000))
    halves.sweep(left.parent.parent, {blob: 9000})
    assert not left.exists()


@pytest.mark.parametrize(("size", "code"), [(9000, 4), (90_000, 3)])
def test_room_that_another_download_takes_may_become_free(
    tmp_path: Path, left: Path, monkeypatch: pytest.MonkeyPatch, size: int, code: int
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=8000))
    repository = download.Download(tmp_path, {"repo": "org/name"})
    with (tmp_path / f".locks/models--org--name/{'1' * 64}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        repository.missing_bytes = halves.sweep(repository.path, {repository.blobs / ("1" * 64): size})
    assert left.exists()
    with pytest.raises(refusals.UnavailableError, match="org/name needs ") as error:
        download.check_room(repository, [repository])
    assert error.value.exit_code == code


def test_a_repository_that_is_named_twice_needs_its_room_once(client: Client, tmp_path: Path) -> None:
    listing(client, "config.json", "model.safetensors")
    both = [download.Download(tmp_path, {"repo": "org/name", "place": place}) for place in ("{a}", "{b}")]
    for repository in both:
        repository.ask()
    assert download.check_room(both[0], both) == 2


# How far it is


class Partial(download.Download):
    """One of 10 MB, of which 6 MB came before."""

    def __init__(self, cache: Path, given: Mapping[str, str], seconds: float = 0.4) -> None:
        super().__init__(cache, given)
        self.blobs.mkdir(parents=True)
        (self.blobs / "large.kept.incomplete").write_bytes(bytes(6_000_000))
        self.files = {"large": SimpleNamespace(path="large", lfs=LARGE, size=10_000_000)}
        self.missing = {self.blobs / "large": self.files["large"]}
        self.over = threading.Event()
        self.load: Any = partial(self.over.wait, seconds)


def test_what_came_before_is_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download, "REPORT_INTERVAL", 0)
    repository = Partial(tmp_path, {"repo": "org/name"}, 60)

    def say(text: str) -> None:
        print(text)
        repository.over.set()

    monkeypatch.setattr(download, "say", say)
    repository._load(stall=60, total=10_000_000, others=set())
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "Downloading weights: 6.0 MB of 10.0 MB, 0.0 MB/s"


def test_what_others_left_is_no_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download, "REPORT_INTERVAL", 0)
    monkeypatch.setattr(download.Download, "_check", lambda _: None)
    repository = Partial(tmp_path, {"repo": "org/name"}, 0.6)
    (repository.blobs / "large.0123abcd.incomplete").write_bytes(bytes(3_000_000))
    (repository.blobs / "older").write_bytes(bytes(3_000_000))
    repository.fetch(stall=0.8)
    assert "Downloading weights: 6.0 MB of 10.0 MB, 0.0 MB/s" in capsys.readouterr().out.splitlines()[1]


def test_files_that_are_no_links_count_as_well(tmp_path: Path) -> None:
    """A volume that can't have links has finished files where these would be."""
    repository = download.Download(tmp_path, {"repo": "org/name"})
    commit = repository.path / "snapshots" / ("a" * 40)
    (commit / "folder").mkdir(parents=True)
    repository.blobs.mkdir()
    blob, file = repository.blobs / "blob", commit / "folder/model.safetensors"
    blob.write_bytes(bytes(1000))
    (commit / "config.json").symlink_to(blob)
    file.write_bytes(bytes(2000))
    assert download.sizes(repository.path) == {blob: 1000, file: 2000}


def test_what_has_come_by_now_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download.Download, "_check", lambda _: None)
    repository = Partial(tmp_path, {"repo": "org/name"}, 0)
    (repository.blobs / "large.kept.incomplete").rename(repository.blobs / "large")
    repository.fetch(stall=60)
    assert capsys.readouterr().out == ""


def test_what_a_try_raises_in_its_thread_is_told(tmp_path: Path) -> None:
    repository = Partial(tmp_path, {"repo": "org/name"})
    repository.load = partial(int, "nothing")
    with pytest.raises(ValueError, match="nothing"):
        repository._load(stall=60, total=10_000_000, others=set())


def test_a_newer_one_that_stands_still_keeps_nothing_else_from_coming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in the cache is served, and the next repository is fetched."""
    monkeypatch.setattr(download.Download, "ask", lambda _: None)
    monkeypatch.setattr(download.Download, "_check", lambda _: None)
    monkeypatch.setattr(halves, "keep", lambda _: None)
    (tmp_path / "config.json").write_text("{}")
    still = Partial(tmp_path / "1", {"repo": "org/1", "have": str(tmp_path), "load_format": "dummy"}, 60)
    other = Partial(tmp_path / "2", {"repo": "org/2"}, 0)
    download.fetch_all([still, other], 0.2, [])
    still.over.set()
    assert (still.folder, other.folder) == (tmp_path, other.snapshot)
    assert f"The download stands still: not a byte came in 0.2 s. Serving what is in the cache: {tmp_path}" in (
        capsys.readouterr().out
    )


def test_what_is_given_up_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a newer one there is none, so the one in the cache is served; what is small comes all the same."""
    monkeypatch.setattr(download.Download, "ask", lambda _: None)
    monkeypatch.setattr(halves, "keep", lambda _: None)
    (tmp_path / "config.json").write_text("{}")
    newer = download.Download(tmp_path, {"repo": "org/1", "have": str(tmp_path), "load_format": "dummy"})
    newer.missing_bytes = {newer.blobs: 10**18}
    small = download.Download(tmp_path, {"repo": "org/2"})
    small.missing_bytes = {small.blobs: 1000}
    download.fetch_all([newer, small], 60, [])
    assert newer.folder == tmp_path


def test_without_a_client_one_that_is_there_does_not_stand_for_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    model = {"repo": "org/1", "have": str(tmp_path), "load_format": "dummy"}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for repositories, code in (([model], 0), ([model, {"repo": "org/2"}], 3)):
        monkeypatch.setattr(sys, "argv", ["download.py", json.dumps({"repositories": repositories})])
        with pytest.raises(SystemExit) as ended:
            download.main()
        assert ended.value.code == code
    assert "huggingface_hub, is not in vLLM's environment. | Check SUPERVISOR_VLLM." in capsys.readouterr().out


# GGUF


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for installed distributions; no vLLM is in it."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return tmp_path


def test_a_vllm_without_gguf(plugins: Path) -> None:
    with pytest.raises(refusals.UnavailableError) as error:
        download.check_gguf("org/name", "MODEL")
    assert error.value.cause == "org/name is GGUF, and this vLLM has no GGUF."
    assert error.value.remedy.startswith("Install its GGUF plugin")
    assert error.value.exit_code == 3


def test_a_plugin_for_gguf(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = plugins / "any_name-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: any-name\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nreader = vllm_gguf_plugin:register\n")
    download.check_gguf("org/name", "MODEL")
    monkeypatch.setenv("VLLM_PLUGINS", "other,reader")
    download.check_gguf("org/name", "MODEL")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(refusals.UnavailableError):
        download.check_gguf("org/name", "MODEL")


def test_a_vllm_of_before_the_plugin(plugins: Path) -> None:
    """Which is not imported for this."""
    loaders = plugins / "vllm" / "model_executor" / "model_loader"
    loaders.mkdir(parents=True)
    (plugins / "vllm" / "__init__.py").write_text("raise AssertionError")
    (loaders / "gguf_loader.py").touch()
    download.check_gguf("org/name", "MODEL")


# Why it can't be had


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({}, "the network"),
        ({"HF_ENDPOINT": "http://mirror"}, "the network, HF_ENDPOINT"),
        ({"https_proxy": "http://u:secret@p", "HTTP_PROXY": "http://p"}, "the network, HTTPS_PROXY, HTTP_PROXY"),
    ],
)
def test_what_leads_to_the_hub_is_named(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], named: str) -> None:
    for name in refusals.ROUTE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(refusals.UnavailableError) as error:
        refusals.raise_unreachable("The hub could not be reached", OSError("no route"))
    assert error.value.cause == "The hub could not be reached: no route."
    assert error.value.remedy == f"Check {named}; it is tried again, and goes on where it stopped."
    assert error.value.exit_code == 4


def test_the_error_below_says_more() -> None:
    class LocalEntryNotFoundError(Exception):
        """The client's, of any trouble."""

    class OfflineModeIsEnabled(ConnectionError):
        """As it is called there."""

    words = {"repo": "org/name", "revision": None, "setting": "MODEL", "where": "REVISION"}
    for below, told in ((OSError("[Errno 111] refused"), "refused"), (OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE")):
        error = LocalEntryNotFoundError("An error happened")
        error.__cause__ = below
        if told == "refused":
            refusals.raise_known(error, words)
            assert refusals.reason(error) == "[Errno 111] refused"
        else:
            with pytest.raises(refusals.UnavailableError, match=told):
                refusals.raise_known(error, words)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "The disk became full while org/name came to /cache."),
        (PermissionError(13, "Permission denied", "/cache/x"), "/cache may not be written by this user."),
        (PermissionError(13, "Permission denied"), ""),  # a firewall's
        (OSError(30, "Read-only file system", "/cache/x"), "/cache is read-only."),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), "The disk became full"),
        (NotADirectoryError(20, "Not a directory", "/cache/x"), "can't be written to (Not a directory)"),
        (ConnectionRefusedError(111, "Connection refused"), ""),
    ],
)
def test_disks(error: Exception, told: str) -> None:
    words = {"repo": "org/name", "cache": "/cache"}
    if not told:
        refusals.raise_known(error, words)
        return
    with pytest.raises(refusals.UnavailableError) as found:
        refusals.raise_known(error, words)
    assert told in found.value.cause
    assert found.value.exit_code == 3
