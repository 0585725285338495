"""Downloads what vLLM is to read, then becomes the command behind `--`, with the folders in the place of `{weights}`.

Runs in vLLM's environment, by its path: with the hub's client that vLLM itself will read the cache with, and as the
process that then is vLLM. So a download is a phase of a start like any other: its progress is in the log, its failure
an exit with a cause, SIGTERM ends it, and what is there already is not fetched again.

    PYTHON download.py '{"repositories": [{"repo": "org/name", "have": DIR, ...}, ...], "stall": 60}' -- COMMAND...

`stall`: seconds without a byte until it is given up, and begun again by whoever started it.
Lines on standard output: `weights: ...`; the last of a failure is `weights: cannot be had: CAUSE | REMEDY`, with exit
code 3, or `weights: cannot be had now: ...`, with 4, where another try may end otherwise.
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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from importlib import metadata, util
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING or __package__:
    from supervisor.weights import halves, refusals, snapshot
else:  # beside this file, and of the package nothing else: the supervisor is not installed where vLLM is
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import halves
    import refusals
    import snapshot

REPORT_EVERY = 5.0  # seconds
ASK_TIMEOUT = 10.0
TRIES = 5  # in a row, without a byte more than before
OUTSIDE = {"..", "/", "//"}  # parts of a path that leads out of a folder
# Another process may fill the disk, too: so much, or a tenth of what comes, where that is less.
SPARE = 200_000_000
# What takes longer to come than vLLM's import, and than a moment to be read.
LARGE = 500_000_000
# What a try ended with, and what all of them did.
UNREACHABLE = ("the hub did not answer", "The hub could not be reached")
BROKEN = ("the download broke off", "The download broke off, again and again")


def say(text: str) -> None:
    print(f"weights: {text}", flush=True)


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class Repository:
    """One that is to be in the cache. `folder` is what is served of it: at first what the cache has already."""

    def __init__(self, cache: Path, given: Mapping[str, Any]) -> None:
        self.repo, self.revision = given["repo"], given.get("revision")
        self.setting, self.place = given.get("setting", "MODEL"), given.get("place", "{weights}")
        self.where = "REVISION" if self.setting == "MODEL" else self.setting  # what names the revision
        self.load_format, self.is_gguf = given.get("load_format", "auto"), given.get("gguf", False)
        self.folder = Path(given["have"]) if given.get("have") else None
        self.cache, self.path = cache, cache / f"models--{self.repo.replace('/', '--')}"
        self.blobs, self.ref = self.path / "blobs", self.path / "refs" / (self.revision or "main")
        self.snapshot = self.path  # what the hub has today
        self.files: dict[str, Any] = {}  # what vLLM reads of it, as the hub tells; nothing where all is done
        self.coming: list[int] = []  # sizes of those that are not here
        self.needed = 0  # bytes of these that are not here

    def ask(self) -> None:
        """Asks the hub what it has, and what of that is to come. Raises CannotError."""
        if self.is_gguf:
            need_gguf(self.repo, self.setting)
        else:  # where it is in the cache, one question has to do
            self._insist(self._ask, UNREACHABLE, 1 if self.folder else TRIES)

    def _insist(self, step: Callable[[], object], trouble: tuple[str, str], tries: int = TRIES) -> object:
        """Does it again and again for as long as more comes, and so many times where nothing does."""
        tried, most = 0, 0
        while True:
            try:
                return step()
            except refusals.CannotError:
                raise
            except Exception as error:  # noqa: BLE001  # of the client, its HTTP library, the disk: told apart there
                refusals.refused(error, vars(self))
                here = sum(sizes(self.blobs).values())
                tried, most = (1, here) if here > most else (tried + 1, most)
                if tried >= tries:
                    refusals.unreachable(trouble[1], error)
                say(f"{trouble[0]} ({refusals.reason(error)}); it is tried again")
                time.sleep(refusals.pause(error, tried))

    def _ask(self) -> None:
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # noqa: PLC0415

        commit = HfApi().model_info(self.repo, revision=self.revision, timeout=ASK_TIMEOUT).sha
        self.snapshot = self.path / "snapshots" / commit
        if self.folder and self.folder.name != commit:
            say(f"the hub has a newer {self.repo}: {commit[:12]}, not {self.folder.name[:12]}")
        elif self.folder and self.ref.is_file() and self.ref.read_text() == commit:
            return
        where: dict[str, Any] = {"revision": commit, "cache_dir": str(self.cache)}
        rows = HfApi().list_repo_tree(self.repo, recursive=True, revision=commit)
        # A name that leads out of the folder is none of the hub's own; files that are damaged are deleted.
        found = {row.path: row for row in rows if hasattr(row, "size") and not OUTSIDE & {*Path(row.path).parts}}
        weights = snapshot.weights(found, self.load_format, partial(hf_hub_download, self.repo, **where))
        if not weights and snapshot.PATTERNS[self.load_format] and any(name.endswith(".gguf") for name in found):
            return need_gguf(self.repo, self.setting)  # a plugin knows which of them is wanted
        if lacking := sorted({*weights} - {*found}):
            raise refusals.cannot("lacking", repo=self.repo, file=lacking[0], setting=self.setting)
        self.files = {name: row for name, row in found.items() if name in weights or snapshot.is_read(name)}
        for name, row in self.files.items():  # for the client takes each that is there
            path = self.snapshot / name
            if path.exists() and (path.stat().st_size != row.size or (name in weights and snapshot.damage(path))):
                say(f"{name} is damaged, and is fetched again")
                delete(path)
        self.load = partial(snapshot_download, self.repo, allow_patterns=[*map(glob.escape, self.files)], **where)
        if can_tell := "dry_run" in inspect.signature(snapshot_download).parameters:
            missing = {row.filename for row in self.load(dry_run=True) if row.will_download}
        else:
            say("this huggingface_hub can't tell beforehand what comes; whether there is room is not looked at")
            missing = {name for name in self.files if not (self.snapshot / name).exists()}
        coming = [self.files[name] for name in missing]
        self.coming = [row.size for row in coming]
        there = halves.sweep(self.path, {row.lfs.sha256 if row.lfs else row.blob_id for row in coming})
        self.needed = sum(self.coming) - there if can_tell else 0

    def fetch(self, stall: float) -> None:
        """Downloads what is lacking, and checks it. Raises CannotError."""
        if not self.files:
            return
        began, total = time.monotonic(), sum(self.coming)
        if self.coming:
            say(f"Downloading weights: {self.repo}, {len(self.coming)} files, {size(total)}, to {self.cache}")
        whole = sum(count for name, count in sizes(self.blobs).items() if not name.endswith(".incomplete"))
        self._insist(partial(self._load, stall, whole), BROKEN)
        self._insist(self._check, UNREACHABLE)
        if self.coming:
            seconds = max(time.monotonic() - began, 0.001)
            say(f"downloaded {size(total)} in {seconds:.0f} s, {size(total / seconds)}/s")
        self.folder = self.snapshot

    def _load(self, stall: float, before: int) -> None:
        """Tells each few seconds how far it is. Raises CannotError where not a byte comes. `before`: bytes of the cache
        that are none of the download's."""
        total, seen = sum(self.coming), sizes(self.blobs)
        last, moved = sum(seen.values()), time.monotonic()
        told = moved
        loading = ThreadPoolExecutor(1).submit(self.load)
        while not wait([loading], min(1.0, stall / 4)).done:
            now, here = time.monotonic(), sizes(self.blobs)
            if here != seen:
                moved, seen = now, here
            elif now - moved > stall:
                raise refusals.cannot("stalled", stall=stall)
            if total and now - told >= REPORT_EVERY:
                come = sum(here.values())
                done, rate = min(come - before, total), max(0, come - last) / (now - told)
                last, told = come, now
                left = f", {(total - done) / rate:.0f} s left" if rate > 1000 else ""
                say(f"Downloading weights: {size(done)} of {size(total)}, {size(rate)}/s{left}")
        loading.result()

    def _check(self) -> None:
        """By the client, which compares sizes alone where nobody asks for more. Then its name leads to this commit."""
        from huggingface_hub import HfApi  # noqa: PLC0415

        verify = getattr(HfApi(), "verify_repo_checksums", None)
        if verify is None:
            say("this huggingface_hub checks no more than sizes")
        elif not come_by_xet(self.files.values()):
            if (total := sum(row.size for row in self.files.values())) >= LARGE:
                say(f"comparing {size(total)} with the hub's checksums")
            found = verify(self.repo, revision=self.snapshot.name, cache_dir=str(self.cache))
            damaged = [row["path"] for row in found.mismatches if row["path"] in self.files]
            for name in damaged:  # not to be taken for whole by the next start
                delete(self.snapshot / name)
            if damaged:
                raise refusals.cannot("damaged", files=", ".join(damaged[:3]))
        if self.ref.name != self.snapshot.name:  # what the client writes where it is asked for a name
            self.ref.parent.mkdir(parents=True, exist_ok=True)
            half = self.ref.with_name(f".{self.ref.name}.{os.getpid()}")
            half.write_text(self.snapshot.name)
            half.replace(self.ref)

    def give_up(self, cannot: refusals.CannotError) -> None:
        """Returns where there is something to serve all the same."""
        if self.folder is None or snapshot.lacking(self.folder, self.load_format):  # what was damaged has been deleted
            now = " now" if cannot.exit_code == refusals.TRANSIENT else ""
            say(f"cannot be had{now}: {cannot.cause} | {cannot.remedy}")
            os._exit(cannot.exit_code)  # the client's threads may be waiting for the network
        say(f"{cannot.cause} Serving what is in the cache: {self.folder}")
        self.files, self.needed = {}, 0


def sizes(blobs: Path) -> dict[str, int]:
    """Of all files in a cache, whichever way and by whomever they come."""
    found = {}
    for path in blobs.glob("*"):
        with contextlib.suppress(OSError):  # what is allotted, for a client may write a file's end first
            facts = path.stat()
            found[path.name] = min(facts.st_size, facts.st_blocks * 512 or facts.st_size)
    return found


def come_by_xet(rows: Iterable[Any]) -> bool:
    """Whether the large ones of the hub's files do, which then are checked by their content as they come."""
    from huggingface_hub import file_download  # noqa: PLC0415

    large, has_xet = [row for row in rows if row.lfs], getattr(file_download, "is_xet_available", lambda: False)
    return bool(large) and has_xet() and all(getattr(row, "xet_hash", None) for row in large)


def delete(path: Path) -> None:
    """A file of the cache and what it leads to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def room_for(repo: str, needed: int, cache: Path) -> None:
    """Raises CannotError where so many bytes find no room."""
    folder = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > 0 and needed + min(SPARE, needed // 10) > free:
        raise refusals.cannot("room", repo=repo, needed=size(needed), folder=folder, free=size(free))


def need_gguf(repo: str, setting: str) -> None:
    """Raises CannotError where this vLLM reads no GGUF: since 0.24 that takes a plugin. It is not imported for this."""
    found, allowed = util.find_spec("vllm"), os.environ.get("VLLM_PLUGINS")
    for folder in (found and found.submodule_search_locations) or ():
        if Path(folder, "model_executor/model_loader/gguf_loader.py").exists():
            return
    for plugin in metadata.entry_points(group="vllm.general_plugins"):
        if "gguf" in plugin.value and (allowed is None or plugin.name in allowed.split(",")):
            return
    raise refusals.cannot("gguf", repo=repo, setting=setting)


def fetch_all(repositories: list[Repository], stall: float, command: list[str]) -> None:
    """Asks for all of them before the first byte of any comes."""
    halves.keep(say)
    reading, silent = None, False
    for each in repositories:
        try:
            if not (silent and each.folder):  # one question to a hub that does not answer has to do
                each.ask()
            room_for(each.repo, sum(other.needed for other in repositories), each.cache)
        except refusals.CannotError as cannot:
            each.give_up(cannot)
            silent = cannot.exit_code == refusals.TRANSIENT
    if command and sum(each.needed for each in repositories) >= LARGE:
        # vLLM's libraries come off the disk while the network is waited for.
        with contextlib.suppress(OSError):
            words = ["nice", "-n", "10", sys.executable, "-c", "import vllm.entrypoints.openai.api_server"]
            reading = Popen(words, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
    for each in repositories:
        try:
            each.fetch(stall)
        except refusals.CannotError as cannot:
            each.give_up(cannot)
    if reading is not None:
        reading.kill()
        reading.wait()


def become(command: list[str], repositories: list[Repository], *, offline: bool) -> NoReturn:
    """`offline`: it asks the hub nothing more."""
    folders = [str(each.folder or each.repo) for each in repositories]
    for folder in folders if not command else [f"vLLM is started with {', '.join(folders)}"]:
        say(folder)
    if not command:
        os._exit(0)
    if offline and all(each.folder and snapshot.self_contained(each.folder) for each in repositories):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for each, folder in zip(repositories, folders, strict=True):
        command = [word.replace(each.place, folder) for word in command]
    os.execvp(command[0], command)  # noqa: S606


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # threads that wait for the network would hold us up
    given, command = json.loads(sys.argv[1]), sys.argv[3:]
    try:
        from huggingface_hub import constants, utils  # noqa: PLC0415
    except ImportError:
        repositories = [Repository(Path(), each) for each in given["repositories"]]
        for each in repositories if not command else ():
            each.give_up(refusals.cannot("client"))
    else:
        utils.disable_progress_bars()  # ours is in the log
        cache = Path(given.get("cache") or constants.HF_HUB_CACHE)
        repositories = [Repository(cache, each) for each in given["repositories"]]
        fetch_all(repositories, given["stall"], command)
    become(command, repositories, offline=given.get("offline", False))


if __name__ == "__main__":
    main()
