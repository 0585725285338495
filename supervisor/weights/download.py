"""Downloads a model, then becomes the command behind `--`, with the folder of its files in the place of `{weights}`.

Runs in vLLM's environment, by its path: with the hub's client that vLLM itself will read the cache with, and as the
process that then is vLLM. So a download is a phase of a start like any other: its progress is in the log, its failure
an exit with a cause, SIGTERM ends it, and what is there already is not fetched again.

    PYTHON download.py --repo org/name [--revision R] [--cache DIR] [--load-format F] [--have DIR] -- COMMAND...

Lines on standard output: `weights: ...`; the last of a failure is `weights: cannot be had: CAUSE | REMEDY`, with exit
code 3, or `weights: cannot be had now: ...`, with 4, where another try may end otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from supervisor.weights import snapshot
else:  # beside this file, and of the package nothing else: the supervisor is not installed where vLLM is
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import snapshot

    del sys.path[0]

PERMANENT, TRANSIENT = 3, 4
PLACE = "{weights}"
REPORT_EVERY = 5.0  # seconds
ASK_TIMEOUT = 10.0
# Seconds without a byte until it is given up, and begun again by whoever started it.
STALL = 60.0
TRIES = 5  # in a row, without a byte more than before
# Another process may fill the disk, too: so much, or a tenth of what comes, where that is less.
SPARE = 200_000_000
# A file that the client is writing, and ours of what came before a download broke off.
TEMPORARY = re.compile(r"(?P<blob>.+)\.[0-9a-f]{8}\.incomplete")
KEPT = ".kept.incomplete"
# Bytes that are written at once. The client's own 10 MB are lost whenever a connection breaks off, and on a slow line
# come so seldom that it seems to stand still.
PIECE = 1 << 20
# So many seconds after its last byte a half-written file is nobody's; on some network volumes locks do not tell.
ABANDONED = 60.0
# What takes longer to come than vLLM's import: 10 GB of libraries are read meanwhile.
WARM_UP_FROM = 500_000_000


def say(text: str) -> None:
    print(f"weights: {text}", flush=True)


class CannotError(Exception):
    """Why the model can't be had, what to change, and the exit code that tells whether another try may help."""


def fail(cause: str, remedy: str, code: int = PERMANENT) -> NoReturn:
    raise CannotError(cause, remedy, code)


def end(cause: str, remedy: str, code: int) -> NoReturn:
    say(f"cannot be had{' now' if code == TRANSIENT else ''}: {cause} | {remedy}")
    os._exit(code)  # the client's threads may be waiting for the network


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class Wanted:
    """What the hub has of the model, and which files of it are to be there in the end."""

    def __init__(self, info: Any, load_format: str, index: Any) -> None:
        self.repo: str = info.id
        self.commit: str = info.sha
        # A name that leads out of the folder is none of the hub's own; files that are damaged are deleted.
        self.files = {row.rfilename: row for row in info.siblings or () if ".." not in Path(row.rfilename).parts}
        needed = snapshot.weights(self.files, load_format, index)
        names = [name for name in self.files if not snapshot.is_weights(name) and not name.startswith("original/")]
        if needed is None:
            names = [name for name in self.files if not name.startswith("original/")]
        else:
            names += needed
        self.weights = set(needed or ())
        self.names = sorted(name for name in set(names) if name in self.files)
        self.lacking = sorted(self.weights - set(self.files))

    def gguf(self) -> list[str]:
        """The models among the weights, where these are GGUF: each file is one, or each row of parts."""
        names = [(name, snapshot.PART.fullmatch(name)) for name in self.weights if name.endswith(".gguf")]
        return sorted({part["stem"] if part else name for name, part in names})

    def size(self, names: Iterable[str]) -> int:
        return sum(self.files[name].size or 0 for name in names)

    def digest(self, name: str) -> str:
        row = self.files[name]
        return str(row.lfs.sha256 if row.lfs else row.blob_id or "")


class Progress:
    """Tells each few seconds how far it is, by the sizes of the files: whatever way the client takes them."""

    def __init__(self, blobs: Path, total: int, stall: float, stalled: Callable[[], None]) -> None:
        """`stalled` is called, in another thread, when not a byte came in `stall` seconds."""
        self.blobs, self.total, self.stall, self.stalled = blobs, total, stall, stalled
        self.before = self.here(finished=True)
        self.moved = time.monotonic()
        self.seen = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Progress:
        self.seen = self.here()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def pause(self, seconds: float) -> None:
        """Sleeps. That no byte comes meanwhile is no wonder."""
        self.moved = time.monotonic() + seconds
        time.sleep(seconds)

    def here(self, *, finished: bool = False) -> int:
        """Bytes of the cache, or of its finished files alone."""
        found = 0
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.blobs):
                if finished and entry.name.endswith(".incomplete"):
                    continue
                with contextlib.suppress(OSError):
                    # What is allotted, for a client may write a file's end first.
                    facts = entry.stat()
                    found += min(facts.st_size, facts.st_blocks * 512) if facts.st_blocks else facts.st_size
        return found

    def _run(self) -> None:
        last = told = time.monotonic()
        rate = 0.0
        while not self.over.wait(min(1.0, self.stall / 4)):
            now, here = time.monotonic(), self.here()
            latest = (here - self.seen) / (now - last)
            rate = 0.7 * rate + 0.3 * latest if rate else latest
            last = now
            if here != self.seen:
                self.moved, self.seen = max(self.moved, now), here
            elif now - self.moved > self.stall:
                self.stalled()
            if now - told >= REPORT_EVERY:
                told = now
                done = min(here - self.before, self.total)
                left = f", {(self.total - done) / rate:.0f} s left" if rate > 1000 else ""
                say(f"Downloading weights: {size(done)} of {size(self.total)}, {size(max(0.0, rate))}/s{left}")


def ask_hub(given: argparse.Namespace, have: Path | None) -> Any:
    """What the hub says of the model. `have`: it is in the cache, so one question has to do."""
    from huggingface_hub import HfApi  # noqa: PLC0415  # not in every environment

    last: Exception | None = None
    for attempt in range(1 if have else TRIES):
        if attempt:
            time.sleep(min(retry_after(last) or 2**attempt, 60))
        try:
            info = HfApi().model_info(given.repo, revision=given.revision, files_metadata=True, timeout=ASK_TIMEOUT)
        except Exception as error:  # noqa: BLE001  # the client's HTTP library has its own errors, by its version
            refused(given, error)
            last = error
        else:
            if info.gated and not have:
                readable(given.repo, info)
            return info
        if not have:
            say(f"the hub did not answer ({reason(last)})")
    if status_of(last) == 429:
        fail(
            "The hub turned us away: too many requests (429).",
            "Set HF_TOKEN: with an account the limits are higher. It is tried again.",
            TRANSIENT,
        )
    fail(
        f"The hub could not be reached: {reason(last)}.",
        "Check the network and, if set, HF_ENDPOINT; it is tried again.",
        TRANSIENT,
    )


def refused(given: argparse.Namespace, error: Exception) -> None:
    """Ends where the hub's answer is a final one."""
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        fail(
            f"{given.repo} is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub.",
            "Unset HF_HUB_OFFLINE, or put the model into the cache (HF_HOME).",
        )
    if isinstance(error, RevisionNotFoundError):
        fail(f"{given.repo} has no revision {given.revision}.", "Check REVISION.")
    if isinstance(error, GatedRepoError):
        gated(given.repo, error)
    if status == 401 and "Invalid credentials" in str(error):
        fail("The hub does not know the token in HF_TOKEN.", "Set HF_TOKEN to a valid one, or unset it.")
    if isinstance(error, RepositoryNotFoundError):
        fail(
            f"There is no model {given.repo} on the hub, or it is private.",
            "Check the spelling of MODEL; for a private one set HF_TOKEN to a token that may read it.",
        )
    if status in (401, 403):
        fail(f"The hub refuses access ({status}).", "Set HF_TOKEN to a token that may read the model.")


def readable(repo: str, info: Any) -> None:
    """Everybody may see what a gated repository has; who may read it is told by a file alone."""
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import GatedRepoError  # noqa: PLC0415

    try:
        HfApi().auth_check(repo)
    except GatedRepoError as error:
        gated(repo, error)
    except Exception as error:  # noqa: BLE001  # only a look ahead: the download itself will say it
        say(f"whether {repo} may be read can't be told ({reason(error)})")


def gated(repo: str, error: Exception) -> NoReturn:
    if status_of(error) == 401:
        fail(
            f"{repo} is gated, and no token was given.",
            "Accept its terms on the hub, and set HF_TOKEN to a token of that account.",
        )
    fail(
        f"{repo} is gated, and HF_TOKEN gives no access to it.",
        "Accept its terms on the hub with that token's account, or set HF_TOKEN to another's.",
    )


def status_of(error: BaseException | None) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def reason(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def repository_of(repo: str, cache: Path) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


def fetch(given: argparse.Namespace, wanted: Wanted, cache: Path) -> Path:
    """Downloads what is lacking. Returns the snapshot's folder, its files checked."""
    repository = repository_of(given.repo, cache)
    blobs, folder = repository / "blobs", repository / "snapshots" / wanted.commit
    room_for(given.repo, 0, cache)
    lacking = [name for name in wanted.names if not whole(folder / name, name, wanted, cache)]
    coming = [name for name in lacking if not (blobs / wanted.digest(name)).is_file()]  # another commit may have it
    sweep(repository, {wanted.digest(name) for name in coming})
    room_for(given.repo, wanted.size(coming) - sum(path.stat().st_size for path in incomplete(blobs)), cache)
    # Files of a download that did not come to its end have not been checked.
    unchecked = lacking if is_remembered(repository, given.revision, wanted.commit) else wanted.names
    total = wanted.size(coming)
    began = time.monotonic()
    if lacking:
        say(f"Downloading weights: {given.repo}, {len(coming)} files, {size(total)}, to {cache}")
        with Progress(blobs, total, given.stall, lambda: stalled(given)) as progress, warming_up(given.command, total):
            load(given, wanted, cache, progress)
    if wanted.size(unchecked) >= WARM_UP_FROM:
        say(f"comparing {size(wanted.size(unchecked))} with the hub's checksums")
    damaged = check(folder, unchecked, wanted)
    for name in damaged:  # not to be taken for whole by the next start
        delete(folder / name)
    if damaged:
        fail(
            f"{', '.join(damaged[:3])} came damaged: the checksum is not the hub's.",
            "It was deleted, and is fetched again.",
            TRANSIENT,
        )
    if lacking:
        seconds = time.monotonic() - began
        say(f"downloaded {size(total)} in {seconds:.0f} s, {size(total / max(seconds, 0.001))}/s, checksums right")
    remember_revision(repository, given.revision, wanted.commit)
    return folder


def load(given: argparse.Namespace, wanted: Wanted, cache: Path, progress: Progress) -> None:
    """The client's own download, again and again for as long as more comes."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    keep_what_came()
    tries, seen = TRIES, -1
    while True:
        try:
            snapshot_download(
                given.repo,
                revision=wanted.commit,
                cache_dir=str(cache),
                allow_patterns=[escaped(name) for name in wanted.names],
            )
        except Exception as error:  # noqa: BLE001  # of the client, its HTTP library, the disk: told apart below
            no_room_or_right(error, given.repo, cache)
            refused(given, error)
            here = progress.here()
            tries = TRIES if here > seen else tries - 1
            seen = max(seen, here)
            if tries <= 0:
                fail(
                    f"The download broke off, again and again: {reason(error)}.",
                    "Check the network and, if set, HF_ENDPOINT; it is tried again, and goes on where it stopped.",
                    TRANSIENT,
                )
            say(f"the download broke off ({reason(error)}); it goes on")
            progress.pause(min(retry_after(error) or 2 ** (TRIES - tries), 60))
        else:
            return


def stalled(given: argparse.Namespace) -> None:
    give_up(
        given,
        f"The download stands still: not a byte came in {given.stall:g} s.",
        "Check the network; if another worker that fills the same cache died, delete the cache's folder .locks. It is "
        "tried again, and goes on where it stopped.",
        TRANSIENT,
    )
    become(given, Path(given.have))


def keep_what_came() -> None:
    """The client throws away what it has of a file when the connection breaks off too often, the hub answers with an
    error in between, or its process ends. Here that stays, and the next try asks for the rest. (Not where files come by
    Xet: not in order. There, whole files are what stays.)"""
    from huggingface_hub import constants, file_download  # noqa: PLC0415

    constants.DOWNLOAD_CHUNK_SIZE = PIECE
    theirs = getattr(file_download, "http_get", None)
    if theirs is None or getattr(theirs, "keeps", False):
        return

    def http_get(url: str, temp_file: Any, **more: Any) -> None:
        found = TEMPORARY.fullmatch(str(getattr(temp_file, "name", "")))
        if found is None or more.get("resume_size"):
            theirs(url, temp_file, **more)
            return
        kept = Path(found["blob"] + KEPT)
        kept.touch()
        with kept.open("r+b") as file:
            if file.seek(0, os.SEEK_END) > (more.get("expected_size") or 0):
                file.seek(0)
                file.truncate()
            theirs(url, file, **more, resume_size=file.tell())
        kept.replace(temp_file.name)

    http_get.keeps = True  # type: ignore[attr-defined]
    file_download.http_get = http_get


def whole(path: Path, name: str, wanted: Wanted, cache: Path) -> bool:
    """Whether a file is there, as far as its size and beginning tell. One that is damaged is deleted, for the client
    takes each that is there."""
    try:
        right = wanted.files[name].size in (None, path.stat().st_size)
    except OSError:
        return False
    if right and not (name in wanted.weights and snapshot.damage(path)):
        return True
    say(f"{name} is damaged, and is fetched again")
    try:
        delete(path)
    except OSError as error:
        no_room_or_right(error, wanted.repo, cache)
        raise
    return False


def delete(path: Path) -> None:
    """A file of the cache and what it leads to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def sweep(repository: Path, coming: set[str]) -> None:
    """Removes the halves that processes left that were killed, but for those that are gone on with."""
    for path in incomplete(repository / "blobs"):
        blob = path.name.partition(".")[0]
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > ABANDONED
            goes_on = path.name.endswith(KEPT) and blob in coming
            if old and not goes_on and not locked(repository.parent / ".locks" / repository.name / f"{blob}.lock"):
                path.unlink()


def locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def remember_revision(repository: Path, revision: str | None, commit: str) -> None:
    """What the client writes where it is asked by name; it was asked for a commit, so that all files are of one."""
    name = revision or "main"
    if name == commit:
        return
    with contextlib.suppress(OSError):
        target = repository / "refs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f".{target.name}.{os.getpid()}")
        half.write_text(commit)
        half.replace(target)


def is_remembered(repository: Path, revision: str | None, commit: str) -> bool:
    """Whether an earlier download of that commit came to its end."""
    with contextlib.suppress(OSError, ValueError):
        return (repository / "refs" / (revision or "main")).read_text().strip() == commit
    return False


def incomplete(blobs: Path) -> list[Path]:
    return list(blobs.glob("*.incomplete")) if blobs.is_dir() else []


def escaped(name: str) -> str:
    """A file's name as a pattern for itself alone."""
    return "".join(f"[{letter}]" if letter in "[*?" else letter for letter in name)


def room_for(repo: str, needed: int, cache: Path) -> None:
    folder = cache
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > 0 and needed + min(SPARE, needed // 10) > free:
        fail(
            f"{repo} needs {size(needed)} more, and {folder} has {size(free)} free.",
            "Mount a larger volume and point HF_HOME at it, or free space.",
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        probe = cache / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        no_room_or_right(error, repo, cache)
        fail(f"{cache} can't be written to ({error.strerror}).", "Point HF_HOME at a folder that can.")


def no_room_or_right(error: BaseException, repo: str, cache: Path) -> None:
    """Ends where the disk is what failed."""
    cause: BaseException | None = error
    while cause is not None:
        number = getattr(cause, "errno", None)
        if number is None and (found := re.search(r"\(os error (\d+)\)", str(cause))):  # by Xet's client
            number = int(found[1])
        elif number in (13, 1, 30) and getattr(cause, "filename", None) is None:
            number = None  # the network's: a firewall
        if number in (28, 122):  # ENOSPC, EDQUOT
            fail(f"The disk became full while {repo} came to {cache}.", "Mount a larger volume, or free space.")
        if number in (13, 1, 30):  # EACCES, EPERM, EROFS
            why = "is read-only" if number == 30 else "may not be written by this user"
            fail(f"{cache} {why}.", "Mount it writable, or point HF_HOME at a folder that is.")
        cause = cause.__cause__ or cause.__context__


def retry_after(error: BaseException | None) -> float:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    with contextlib.suppress(ValueError, TypeError):
        return float(headers.get("Retry-After") or 0)
    return 0.0


def check(folder: Path, names: list[str], wanted: Wanted) -> list[str]:
    """Those of the files whose bytes are not what the hub has: the client compares their sizes alone."""

    def wrong(name: str) -> bool:
        digest, path = wanted.digest(name), folder / name
        if len(digest) == 64:
            found = hashlib.sha256()
        elif len(digest) == 40:  # git's: of a header and the content
            found = hashlib.sha1(b"blob %d\0" % path.stat().st_size)  # noqa: S324
        else:
            return False
        with path.open("rb") as file:
            while data := file.read(1 << 22):
                found.update(data)
        return found.hexdigest() != digest

    with ThreadPoolExecutor(8) as pool:
        return [name for name, bad in zip(names, pool.map(wrong, names), strict=True) if bad]


@contextlib.contextmanager
def warming_up(command: list[str], total: int) -> Iterator[None]:
    """vLLM's libraries come off the disk while the network is what is waited for."""
    process = None
    if command and total >= WARM_UP_FROM:
        with contextlib.suppress(OSError):
            process = subprocess.Popen(
                ["nice", "-n", "10", sys.executable, "-c", "import vllm.entrypoints.openai.api_server"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def read_index(given: argparse.Namespace, info: Any, cache: Path) -> Any:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    def index(name: str) -> object:
        try:
            path = hf_hub_download(given.repo, name, revision=info.sha, cache_dir=str(cache))
            return json.loads(Path(path).read_bytes())
        except Exception as error:  # noqa: BLE001  # then all weights are taken
            no_room_or_right(error, given.repo, cache)
            refused(given, error)
            say(f"{name} can't be read ({reason(error)})")
            return None

    return index


def folder_of(given: argparse.Namespace) -> Path | None:
    """The folder to serve; None where the client is missing, and vLLM is to see to it by itself."""
    have = Path(given.have) if given.have else None
    try:
        from huggingface_hub import constants  # noqa: PLC0415
        from huggingface_hub.utils import disable_progress_bars  # noqa: PLC0415
    except ImportError:
        return have
    disable_progress_bars()  # ours is in the log
    try:
        return newest(given, Path(given.cache or constants.HF_HUB_CACHE), have)
    except CannotError as error:
        give_up(given, *error.args)
        return have


def give_up(given: argparse.Namespace, cause: str, remedy: str, code: int) -> None:
    """Returns where there is something to serve all the same."""
    if not given.have or snapshot.lacking(Path(given.have), given.load_format):  # what was damaged has been deleted
        end(cause, remedy, code)
    say(f"{cause} Serving what is in the cache: {given.have}")


def newest(given: argparse.Namespace, cache: Path, have: Path | None) -> Path:
    """Raises CannotError."""
    if have is None:
        room_for(given.repo, 0, cache)
    info = ask_hub(given, have)
    repository = repository_of(given.repo, cache)
    if have is not None and have.name == info.sha and is_remembered(repository, given.revision, info.sha):
        return have
    if have is not None and have.name != info.sha:
        say(f"the hub has a newer {given.repo}: {info.sha[:12]}, not {have.name[:12]}")
    wanted = Wanted(info, given.load_format, read_index(given, info, cache))
    if wanted.lacking:
        fail(f"{given.repo} lacks {wanted.lacking[0]} on the hub itself.", "Check MODEL and REVISION.")
    if len(models := wanted.gguf()) > 1:
        fail(
            f"{given.repo} has {len(models)} models as GGUF, {models[0]} among them.",
            f"Name one by its quantization: MODEL={given.repo}:Q4_K_M, or any other.",
        )
    return fetch(given, wanted, cache)


def become(given: argparse.Namespace, folder: Path | None) -> NoReturn:
    if not given.command and folder is None:
        end("The hub's client, huggingface_hub, is not in vLLM's environment.", "Check SUPERVISOR_VLLM.", PERMANENT)
    if not given.command:
        say(str(folder))
        os._exit(0)
    say(f"vLLM is started with {folder or given.repo}")
    if folder is not None and given.offline and snapshot.self_contained(folder):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = [word.replace(PLACE, str(folder or given.repo)) for word in given.command]
    os.execvp(command[0], command)  # noqa: S606


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # threads that wait for the network would hold us up
    parser = argparse.ArgumentParser()
    parser.add_argument("--repo", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--cache")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--have")
    parser.add_argument("--offline", action="store_true", help="the command asks the hub nothing more")
    parser.add_argument("--stall", type=float, default=STALL)
    given = parser.parse_args(sys.argv[1:at])
    given.command = sys.argv[at + 1 :]
    become(given, folder_of(given))


if __name__ == "__main__":
    main()
