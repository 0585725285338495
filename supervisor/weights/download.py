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
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
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
# Another process may fill the disk, too.
SPARE = 200_000_000
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
        self.commit: str = info.sha
        self.files = {row.rfilename: row for row in info.siblings or ()}
        needed = snapshot.weights(self.files, load_format, index)
        names = [name for name in self.files if not snapshot.is_weights(name) and not name.startswith("original/")]
        if needed is None:
            names = [name for name in self.files if not name.startswith("original/")]
        else:
            names += needed
        self.names = sorted(name for name in set(names) if name in self.files)
        self.lacking = sorted(set(needed or ()) - set(self.files))
        self.bytes = sum(self.files[name].size or 0 for name in self.names)

    def digest(self, name: str) -> str:
        row = self.files[name]
        return str(row.lfs.sha256 if row.lfs else row.blob_id or "")


class Progress:
    """Tells each few seconds how far it is, by the sizes of the files: whatever way the client takes them."""

    def __init__(self, blobs: Path, before: int, total: int, stall: float) -> None:
        self.blobs, self.before, self.total, self.stall = blobs, before, total, stall
        self.began = self.moved = time.monotonic()
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

    def here(self) -> int:
        found = 0
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.blobs):
                with contextlib.suppress(OSError):
                    # What is allotted, for a client may write a file's end first.
                    facts = entry.stat()
                    found += min(facts.st_size, facts.st_blocks * 512) if facts.st_blocks else facts.st_size
        return found

    def _run(self) -> None:
        last = time.monotonic()
        rate = 0.0
        while not self.over.wait(min(1.0, self.stall / 4)):
            now, here = time.monotonic(), self.here()
            if here != self.seen:
                self.moved = now
                rate = 0.7 * rate + 0.3 * (here - self.seen) if rate else float(here - self.seen)
                self.seen = here
            elif now - self.moved > self.stall:
                end(
                    f"The download stands still: not a byte came in {self.stall:g} s.",
                    "Check the network; if another worker that fills the same cache died, delete the cache's folder "
                    ".locks. It is tried again, and goes on where it stopped.",
                    TRANSIENT,
                )
            if now - last >= REPORT_EVERY:
                last = now
                done = min(here - self.before, self.total)
                left = f", {(self.total - done) / rate:.0f} s left" if rate > 0 else ""
                say(f"Downloading weights: {size(done)} of {size(self.total)}, {size(max(0.0, rate))}/s{left}")


def ask_hub(given: argparse.Namespace, have: Path | None) -> Any:
    """What the hub says of the model. `have`: it is in the cache, so one question has to do."""
    from huggingface_hub import HfApi  # noqa: PLC0415  # not in every environment
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    last: Exception | None = None
    for attempt in range(1 if have else TRIES):
        if attempt:
            time.sleep(min(2**attempt, 20))
        try:
            info = HfApi().model_info(given.repo, revision=given.revision, files_metadata=True, timeout=ASK_TIMEOUT)
        except RevisionNotFoundError:
            fail(f"{given.repo} has no revision {given.revision}.", "Check REVISION.")
        except GatedRepoError as error:
            gated(given.repo, error)
        except RepositoryNotFoundError as error:
            if "Invalid credentials" in str(error):
                fail("The hub does not know the token in HF_TOKEN.", "Set HF_TOKEN to a valid one, or unset it.")
            fail(
                f"There is no model {given.repo} on the hub, or it is private.",
                "Check the spelling of MODEL; for a private one set HF_TOKEN to a token that may read it.",
            )
        except (HfHubHTTPError, OSError) as error:
            last = error
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if status in (401, 403):
                fail(f"The hub refuses access ({status}).", "Set HF_TOKEN to a token that may read the model.")
        except Exception as error:  # noqa: BLE001  # the client's HTTP library has its own errors, by its version
            last = error
        else:
            if info.gated and not have:
                readable(given.repo, info)
            return info
        if not have:
            say(f"the hub did not answer ({reason(last)})")
    fail(
        f"The hub could not be reached: {reason(last)}.",
        "Check the network and, if set, HF_ENDPOINT; it is tried again.",
        TRANSIENT,
    )


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
    if getattr(getattr(error, "response", None), "status_code", 0) == 401:
        fail(
            f"{repo} is gated, and no token was given.",
            "Accept its terms on the hub, and set HF_TOKEN to a token of that account.",
        )
    fail(
        f"{repo} is gated, and HF_TOKEN gives no access to it.",
        "Accept its terms on the hub with that token's account, or set HF_TOKEN to another's.",
    )


def reason(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def fetch(given: argparse.Namespace, wanted: Wanted, cache: Path) -> Path:
    """Downloads what is lacking. Returns the snapshot's folder, each new file of it checked."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    repository = cache / f"models--{given.repo.replace('/', '--')}"
    blobs = repository / "blobs"
    folder = repository / "snapshots" / wanted.commit
    lacking = [name for name in wanted.names if not (folder / name).exists()]
    needed = sum(wanted.files[name].size or 0 for name in lacking)
    needed -= sum(part.stat().st_size for part in blobs.glob("*.incomplete")) if blobs.is_dir() else 0
    room_for(given.repo, needed, cache)
    total = sum(wanted.files[name].size or 0 for name in lacking)
    say(f"Downloading weights: {given.repo}, {len(lacking)} files, {size(total)}, to {cache}")
    began = time.monotonic()
    tries, seen = TRIES, -1
    with Progress(blobs, 0, 0, given.stall) as progress, warming_up(given.command, total):
        progress.before = progress.seen - sum(p.stat().st_size for p in incomplete(blobs))
        progress.total = total
        while True:
            try:
                path = snapshot_download(
                    given.repo,
                    revision=wanted.commit,
                    cache_dir=str(cache),
                    allow_patterns=[escaped(name) for name in wanted.names],
                )
                break
            except Exception as error:  # noqa: BLE001  # of the client, its HTTP library, the disk: told apart below
                no_room_or_right(error, given.repo, cache)
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
                time.sleep(min(retry_after(error) or 2 ** (TRIES - tries), 60))
    damaged = check(Path(path), lacking, wanted)
    for name in damaged:  # not to be taken for whole by the next start
        with contextlib.suppress(OSError):
            (Path(path) / name).resolve().unlink()
            (Path(path) / name).unlink()
    if damaged:
        fail(
            f"{', '.join(damaged[:3])} came damaged: the checksum is not the hub's.",
            "It was deleted, and is fetched again.",
            TRANSIENT,
        )
    seconds = time.monotonic() - began
    say(f"downloaded {size(total)} in {seconds:.0f} s, {size(total / max(seconds, 0.001))}/s, checksums right")
    remember_revision(repository, given.revision, wanted.commit)
    return Path(path)


def remember_revision(repository: Path, revision: str | None, commit: str) -> None:
    """What the client writes where it is asked by name; it was asked for a commit, so that all files are of one."""
    name = revision or "main"
    with contextlib.suppress(OSError):
        (repository / "refs").mkdir(exist_ok=True)
        target = repository / "refs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f".{target.name}.{os.getpid()}")
        half.write_text(commit)
        half.replace(target)


def incomplete(blobs: Path) -> Iterable[Path]:
    return blobs.glob("*.incomplete") if blobs.is_dir() else ()


def escaped(name: str) -> str:
    """A file's name as a pattern for itself alone."""
    return "".join(f"[{letter}]" if letter in "[*?" else letter for letter in name)


def room_for(repo: str, needed: int, cache: Path) -> None:
    folder = cache
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > 0 and needed + SPARE > free:
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


def no_room_or_right(error: BaseException, repo: str, cache: Path) -> None:
    """Ends where the disk is what failed."""
    cause: BaseException | None = error
    while cause is not None:
        number = getattr(cause, "errno", None)
        if number in (28, 122):  # ENOSPC, EDQUOT
            fail(f"The disk became full while {repo} came to {cache}.", "Mount a larger volume, or free space.")
        if number in (13, 1, 30):  # EACCES, EPERM, EROFS
            why = "is read-only" if number == 30 else "may not be written by this user"
            fail(f"{cache} {why}.", "Mount it writable, or point HF_HOME at a folder that is.")
        cause = cause.__cause__ or cause.__context__


def retry_after(error: BaseException) -> float:
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
            say(f"{name} can't be read ({reason(error)})")
            return None

    return index


def folder_of(given: argparse.Namespace) -> Path | None:
    """The folder to serve; None where the client is missing, and vLLM is to see to it by itself."""
    try:
        from huggingface_hub import constants  # noqa: PLC0415
        from huggingface_hub.utils import disable_progress_bars  # noqa: PLC0415
    except ImportError:
        return None
    disable_progress_bars()  # ours is in the log
    cache = Path(given.cache or constants.HF_HUB_CACHE)
    have = Path(given.have) if given.have else None
    try:
        return newest(given, cache, have)
    except CannotError as error:
        cause, remedy, code = error.args
        if have is None:
            end(cause, remedy, code)
        say(f"{cause} Serving what is in the cache: {have}")
        return have


def newest(given: argparse.Namespace, cache: Path, have: Path | None) -> Path:
    """Raises CannotError."""
    info = ask_hub(given, have)
    if have is not None and have.name == info.sha:
        return have
    if have is not None:
        say(f"the hub has a newer {given.repo}: {info.sha[:12]}, not {have.name[:12]}")
    room_for(given.repo, 0, cache)
    wanted = Wanted(info, given.load_format, read_index(given, info, cache))
    if wanted.lacking:
        fail(f"{given.repo} lacks {wanted.lacking[0]} on the hub itself.", "Check MODEL and REVISION.")
    return fetch(given, wanted, cache)


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
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
    folder = folder_of(given)
    if not given.command:
        say(str(folder))
        return
    say(f"vLLM is started with {folder or given.repo}")
    if folder is not None and given.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    command = [word.replace(PLACE, str(folder or given.repo)) for word in given.command]
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
