"""A program that downloads what vLLM is to read, then becomes the command behind `--`, with folders for `{weights}`.

It runs in vLLM's environment, by its path: with the hub's client that vLLM itself will read the cache with, and as the
process that then is vLLM. So a download is a phase of a start like any other: its progress is in the log, its failure
is an exit with a cause, SIGTERM ends it, and what is there already is not fetched again.

    PYTHON download.py '{"repositories": [{"repo": "org/name", "have": DIR, ...}, ...], "stall": 60}' -- COMMAND...

After `stall` seconds without a byte it gives up, and whoever started it begins again.
Its lines on standard output are `weights: ...`; the last of a failure is `weights: cannot be had: CAUSE | REMEDY`, with
exit code 3, or `weights: cannot be had now: ...`, with 4, where another try may end otherwise.
"""

from __future__ import annotations

import contextlib
import glob
import inspect
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from importlib import metadata, util
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING or __package__:
    from supervisor.weights import halves, refusals, snapshot
else:  # these lie beside this file; the package itself can't be had: the supervisor is not installed where vLLM is
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import halves
    import refusals
    import snapshot

REPORT_INTERVAL, ASK_TIMEOUT = 5.0, 10.0  # seconds
TRIES = 5  # in a row, without a byte more than before
# Another process may fill the disk, too: so many bytes stay free, or a tenth of what comes, where that is less.
SPARE_BYTES = 200_000_000
LARGE_BYTES = 500_000_000  # so many bytes take longer to come than vLLM's import, and longer than a moment to be read
HUB_TROUBLE, DOWNLOAD_TROUBLE = refusals.REFUSALS["troubles"]


def say(text: str) -> None:
    print(f"weights: {text}", flush=True)


def amount(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class Download:
    """A repository that is to be in the cache. What is served is `folder`: at first what the cache has already."""

    def __init__(self, cache: Path, row: Mapping[str, Any]) -> None:
        self.repo, self.revision = row["repo"], row.get("revision")
        self.setting, self.placeholder = row.get("setting", "MODEL"), row.get("place", "{weights}")
        self.where = "REVISION" if self.setting == "MODEL" else self.setting  # the setting that names the revision
        self.load_format, self.is_gguf = row.get("load_format", "auto"), row.get("gguf", False)
        self.ignored, self.folder = row.get("ignore", ()), Path(row["have"]) if row.get("have") else None
        self.cache, self.path = cache, cache / f"models--{self.repo.replace('/', '--')}"
        self.blobs, self.ref = self.path / "blobs", self.path / "refs" / (self.revision or "main")
        self.snapshot = self.path  # it becomes what the hub has today
        self.files: dict[str, Any] = {}  # those that vLLM reads, as the hub lists them; none where all is done
        self.missing: dict[Path, Any] = {}  # those of them that are not here, by their blobs
        self.missing_bytes: dict[Path, int] = {}  # of these, less what the cache has of them

    def ask(self) -> None:
        """Asks the hub what it has, and finds out what of that is to come. Raises UnavailableError."""
        if self.is_gguf:
            check_gguf(self.repo, self.setting)
        else:  # where the cache has it, one question has to do
            self._retry(self._ask_hub, HUB_TROUBLE, 1 if self.folder else TRIES)

    def _retry(self, step: Callable[[], object], trouble: tuple[str, str], tries: int = TRIES) -> object:
        """Repeats a step as long as more bytes come, and `tries` times where none do. Raises UnavailableError."""
        attempts, most_bytes = 0, 0
        while True:
            try:
                return step()
            except refusals.UnavailableError:
                raise
            except Exception as error:  # noqa: BLE001  # they are told apart there: the client's, its HTTP library's, the disk's
                refusals.raise_known(error, vars(self))
                loaded_bytes = sum(sizes(self.path).values())
                attempts, most_bytes = (1, loaded_bytes) if loaded_bytes > most_bytes else (attempts + 1, most_bytes)
                if attempts >= tries:
                    refusals.raise_unreachable(trouble[1], error)
                say(f"{trouble[0]} ({refusals.reason(error)}); it is tried again")
                time.sleep(refusals.backoff(error, attempts))

    def _ask_hub(self) -> None:
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # noqa: PLC0415

        commit = HfApi().model_info(self.repo, revision=self.revision, timeout=ASK_TIMEOUT).sha or ""
        if not snapshot.COMMIT_HASH.fullmatch(commit):  # it becomes a folder's name
            raise ValueError("the hub names no commit")
        self.snapshot = self.path / "snapshots" / commit
        if self.folder and self.folder.name != commit:
            say(f"the hub has a newer {self.repo}: {commit[:12]}, not {self.folder.name[:12]}")
        elif self.folder and self.ref.is_file() and self.ref.read_text() == commit:
            return
        options: dict[str, Any] = {"revision": commit, "cache_dir": str(self.cache)}
        tree = HfApi().list_repo_tree(self.repo, recursive=True, revision=commit)
        # A name that leads out of the folder is none of the hub's own; this matters, for damaged files are deleted.
        files = {row.path: row for row in tree if hasattr(row, "size") and not snapshot.OUTSIDE.fullmatch(row.path)}
        ignored = {name for name in files if snapshot.matches_any(name, self.ignored) and not snapshot.is_read(name)}
        files = {name: row for name, row in files.items() if name not in ignored}
        weights = snapshot.weights(files, self.load_format, partial(hf_hub_download, self.repo, **options))
        if not weights and snapshot.PATTERNS[self.load_format] and any(name.endswith(".gguf") for name in files):
            return check_gguf(self.repo, self.setting)  # a plugin knows which of them is wanted
        if absent := sorted({*weights} - {*files}):
            raise refusals.unavailable("lacking", repo=self.repo, file=absent[0], setting=self.setting)
        self.files = {name: row for name, row in files.items() if name in weights or snapshot.is_read(name)}
        for name, row in self.files.items():  # the client accepts each that is there
            path = self.snapshot / name
            if path.exists() and (path.stat().st_size != row.size or (name in weights and snapshot.find_damage(path))):
                say(f"{name} is damaged, and is fetched again")
                delete(path)
        self.load = partial(snapshot_download, self.repo, allow_patterns=[*map(glob.escape, self.files)], **options)
        if has_dry_run := "dry_run" in inspect.signature(snapshot_download).parameters:
            rows = [self.files[row.filename] for row in self.load(dry_run=True) if row.will_download]
        else:
            say("this huggingface_hub can't tell beforehand what comes; whether there is room is not looked at")
            rows = [row for name, row in self.files.items() if not (self.snapshot / name).exists()]
        self.missing = {self.blobs / (row.lfs.sha256 if row.lfs else row.blob_id): row for row in rows}
        missing_bytes = halves.sweep(self.path, {blob: row.size for blob, row in self.missing.items()})
        self.missing_bytes = missing_bytes if has_dry_run else {}

    def fetch(self, stall: float) -> None:
        """Downloads the files that are missing, and checks them. Raises UnavailableError."""
        if not self.files:
            return
        there = sizes(self.path).keys()  # by now: a repository may be named twice
        self.missing = {blob: row for blob, row in self.missing.items() if not there & {blob, self.snapshot / row.path}}
        started_at, total = time.monotonic(), sum(row.size for row in self.missing.values())
        if self.missing:
            say(f"Downloading weights: {self.repo}, {len(self.missing)} files, {amount(total)}, to {self.cache}")
        others = {path for path in there if not path.name.endswith(halves.KEPT_SUFFIX)}
        self._retry(partial(self._load, stall, total, others), DOWNLOAD_TROUBLE)
        self._retry(self._check, HUB_TROUBLE)
        if self.missing:
            seconds = max(time.monotonic() - started_at, 0.001)
            say(f"downloaded {amount(total)} in {seconds:.0f} s, {amount(total / seconds)}/s")
        self.folder = self.snapshot

    def _load(self, stall: float, total: int, others: Set[Path]) -> None:
        """Downloads, and says how far it is, without these `others`. Raises UnavailableError where not a byte comes."""
        last_sizes, moved_at = sizes(self.path), time.monotonic()
        last_progress, reported_at = sum(last_sizes[path] for path in last_sizes.keys() - others), moved_at
        future = ThreadPoolExecutor(1).submit(self.load)
        while not wait([future], min(1.0, stall / 4)).done:
            now, current_sizes = time.monotonic(), sizes(self.path)
            if current_sizes != last_sizes:
                moved_at, last_sizes = now, current_sizes
            elif now - moved_at > stall:
                raise refusals.unavailable("stalled", stall=stall)
            if total and now - reported_at >= REPORT_INTERVAL:
                progress = sum(current_sizes[path] for path in current_sizes.keys() - others)
                done, rate = min(progress, total), max(0, progress - last_progress) / (now - reported_at)
                last_progress, reported_at = progress, now
                time_left = f", {(total - done) / rate:.0f} s left" if rate > 1000 else ""
                say(f"Downloading weights: {amount(done)} of {amount(total)}, {amount(rate)}/s{time_left}")
        future.result()

    def _check(self) -> None:
        """Has the client check more than sizes, which it only does when asked. Then the ref names this commit."""
        from huggingface_hub import HfApi  # noqa: PLC0415

        verify = getattr(HfApi(), "verify_repo_checksums", None)
        if verify is None:
            say("this huggingface_hub checks no more than sizes")
        elif not uses_xet(self.files.values()):
            if (total := sum(row.size for row in self.files.values())) >= LARGE_BYTES:
                say(f"comparing {amount(total)} with the hub's checksums")
            report = verify(self.repo, revision=self.snapshot.name, cache_dir=str(self.cache))
            damaged = [row["path"] for row in report.mismatches if row["path"] in self.files]
            for name in damaged:  # the next start must not take it for whole
                delete(self.snapshot / name)
            if damaged:
                raise refusals.unavailable("damaged", files=", ".join(damaged[:3]))
        if self.ref.name != self.snapshot.name:  # the client writes this where it is asked for a name
            self.ref.parent.mkdir(parents=True, exist_ok=True)
            half = self.ref.with_name(f".{self.ref.name}.{os.getpid()}")
            half.write_text(self.snapshot.name)
            half.replace(self.ref)

    def give_up(self, error: refusals.UnavailableError) -> None:
        """Returns only where there is something to serve all the same; else ends the program."""
        if self.folder is None or snapshot.find_fault(self.folder, self.load_format):  # damaged files have been deleted
            say(f"cannot be had{' now' * (error.exit_code == refusals.EXIT_TRANSIENT)}: {error.cause} | {error.remedy}")
            os._exit(error.exit_code)  # the client's threads may be waiting for the network
        say(f"{error.cause} Serving what is in the cache: {self.folder}")
        self.files, self.missing_bytes = {}, {}


def sizes(repository: Path) -> dict[Path, int]:
    """Returns the size of each file in a cache, whichever way and by whomever it comes."""
    size_by_path = {}
    for path in (*repository.glob("blobs/*"), *repository.glob("snapshots/**/*")):  # the latter, without links
        with contextlib.suppress(OSError):  # only what is allotted counts: a client may write a file's end first
            status = path.stat()
            if path.is_file() and not path.is_symlink():
                size_by_path[path] = min(status.st_size, status.st_blocks * 512 or status.st_size)
    return size_by_path


def uses_xet(rows: Iterable[Any]) -> bool:
    """Returns whether all large files come by Xet, which checks them by their content as they come."""
    from huggingface_hub import file_download  # noqa: PLC0415

    large, has_xet = [row for row in rows if row.lfs], getattr(file_download, "is_xet_available", lambda: False)
    return bool(large) and has_xet() and all(getattr(row, "xet_hash", None) for row in large)


def delete(path: Path) -> None:
    """Deletes a file of the cache, and what it leads to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def check_room(download: Download, downloads: list[Download]) -> int:
    """Returns how many bytes are missing of all of them. Raises UnavailableError where these find no room."""
    folder = next(path for path in (download.cache, *download.cache.parents) if path.exists())
    needed = sum({blob: count for each in downloads for blob, count in each.missing_bytes.items()}.values())
    free = shutil.disk_usage(folder).free
    lacking = needed + min(SPARE_BYTES, needed // 10) - free
    if lacking > 0:
        left = sum(count for path, count in sizes(download.path).items() if halves.TEMPORARY_NAME.fullmatch(str(path)))
        name, words = "room" if lacking > left else "room now", {"needed": amount(needed), "free": amount(free)}
        raise refusals.unavailable(name, repo=download.repo, folder=folder, **words)
    return needed


def check_gguf(repo: str, setting: str) -> None:
    """Raises UnavailableError where vLLM reads no GGUF: since 0.24 it takes a plugin. vLLM is not imported here."""
    found, allowed = util.find_spec("vllm"), os.environ.get("VLLM_PLUGINS")
    folders = map(Path, (found and found.submodule_search_locations) or ())
    has_loader = any((folder / "model_executor/model_loader/gguf_loader.py").exists() for folder in folders)
    plugins = [each for each in metadata.entry_points(group="vllm.general_plugins") if "gguf" in each.value]
    if not has_loader and not any(allowed is None or each.name in allowed.split(",") for each in plugins):
        raise refusals.unavailable("gguf", repo=repo, setting=setting)


def fetch_all(downloads: list[Download], stall: float, command: list[str]) -> None:
    """Asks the hub about all of them before the first byte of any comes, then fetches them."""
    halves.keep(say)
    reader, is_hub_silent, needed = None, False, 0
    for download in downloads:
        try:
            if not (is_hub_silent and download.folder):  # one question to a hub that does not answer has to do
                download.ask()
            needed = check_room(download, downloads)
        except refusals.UnavailableError as error:
            download.give_up(error)
            is_hub_silent = error.exit_code == refusals.EXIT_TRANSIENT
    if command and needed >= LARGE_BYTES:  # vLLM's libraries come off the disk while the network is waited for
        with contextlib.suppress(OSError):
            words = ["nice", "-n", "10", sys.executable, "-c", "import vllm.entrypoints.openai.api_server"]
            reader = Popen(words, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
    for download in downloads:
        try:
            download.fetch(stall)
        except refusals.UnavailableError as error:
            download.give_up(error)
    if reader is not None:
        reader.kill()
        reader.wait()


def become(command: list[str], downloads: list[Download], *, offline: bool) -> NoReturn:
    """Becomes the command, or ends where there is none. With `offline` the command asks the hub nothing more."""
    folders = [str(download.folder or download.repo) for download in downloads]
    for folder in folders if not command else [f"vLLM is started with {', '.join(folders)}"]:
        say(folder)
    if not command:
        os._exit(0)
    if offline and all(download.folder and snapshot.is_self_contained(download.folder) for download in downloads):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for download, folder in zip(downloads, folders, strict=True):
        command = [word.replace(download.placeholder, folder) for word in command]
    os.execvp(command[0], command)  # noqa: S606


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # threads that wait for the network would hold us up
    arguments, command = json.loads(sys.argv[1]), sys.argv[3:]
    try:
        from huggingface_hub import constants, utils  # noqa: PLC0415
    except ImportError:
        downloads = [Download(Path(), each) for each in arguments["repositories"]]
        for each in downloads if not command else ():
            each.give_up(refusals.unavailable("client"))
    else:
        utils.disable_progress_bars()  # ours is in the log
        cache = Path(arguments.get("cache") or constants.HF_HUB_CACHE)
        downloads = [Download(cache, each) for each in arguments["repositories"]]
        fetch_all(downloads, arguments["stall"], command)
    become(command, downloads, offline=arguments.get("offline", False))


if __name__ == "__main__":
    main()
