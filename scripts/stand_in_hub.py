#!/usr/bin/env python3
"""A stand-in for the Hugging Face hub on loopback: serves folders as model repositories, and refuses as the hub does.

    scripts/stand_in_hub.py --repo org/tiny=FOLDER [--repo org/tiny@v2=FOLDER] --gated org/x --private org/y

Its first line says where it listens; give that to a client as HF_ENDPOINT. What it promises:
- what `huggingface_hub` needs to look up and download a model: the routes below /api/models, and files with ETag,
  X-Repo-Commit and byte ranges, so that an interrupted download goes on where it stopped;
- the hub's own refusals, with its status and X-Error-Code: a repository that does not exist, is private or gated, a
  revision or file that it has not, a token that nobody has. Without a token, private and missing look the same;
- whose token it is (/api/whoami-v2), and a clock that goes wrong by --clock seconds, in each answer's Date;
- on request a hub in trouble: errors (--fail), a slow line (--rate), connections that break off (--cut) or fall silent
  (--stall), a file that comes damaged (--flip). POST /stand-in with {"cut": 0, ...} changes any of these while it runs;
  the answer, as GET's, has the bytes of each file that were sent and the number of requests.

Model repositories only; no uploads, no Xet.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.server
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

MAIN = "main"
CHUNK = 64 * 1024
# The hub keeps these in its large-file storage: their ETag is a SHA-256. The ETag of others is git's blob id.
LARGE = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx"}
API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>revision|tree|paths-info|auth-check)(?:/(?P<rest>.+))?)?"
)
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class RefusalError(Exception):
    """An answer other than the one that was asked for."""

    def __init__(self, status: int, code: str, message: str, commit: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.commit = status, code, message, commit


@cache
def file_id(path: Path, size: int, _mtime_ns: int) -> str:
    """Returns a file's id, which is its ETag."""
    if path.suffix in LARGE:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    path: Path
    size: int
    id: str

    def tree_item(self) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": self.name, "size": self.size, "oid": self.id}
        if self.path.suffix in LARGE:
            entry["lfs"] = {"oid": self.id, "size": self.size, "pointerSize": 134}
        return entry

    def sibling(self) -> dict[str, object]:
        """Returns the file as the model's own route lists it, which has other keys for the same values."""
        lfs = {"lfs": {"sha256": self.id, "size": self.size, "pointerSize": 134}} if self.path.suffix in LARGE else {}
        return {"rfilename": self.name, "size": self.size, "blobId": "0" * 40 if lfs else self.id, **lfs}


@dataclass(frozen=True, slots=True)
class Revision:
    """A folder as one commit, whose id changes when a file does."""

    entries: dict[str, Entry]
    commit: str

    @classmethod
    def scan(cls, folder: Path | None) -> Revision:
        entries = {}
        for path in sorted(folder.rglob("*")) if folder else ():
            if path.is_file():
                status = path.stat()
                name = path.relative_to(folder).as_posix() if folder else ""
                entries[name] = Entry(name, path, status.st_size, file_id(path, status.st_size, status.st_mtime_ns))
        listing = "".join(f"{entry.id} {name}\n" for name, entry in entries.items())
        return cls(entries, hashlib.sha1(listing.encode()).hexdigest())

    def tree(self, parent: str, recursive: bool) -> Iterator[dict[str, object]]:
        prefix = f"{parent}/" if parent else ""
        folders = set()
        for name, entry in self.entries.items():
            if name.startswith(prefix):
                folder, rest, _ = name.removeprefix(prefix).partition("/")
                if rest and folder not in folders:
                    folders.add(folder)
                    yield {"type": "directory", "path": prefix + folder, "size": 0, "oid": "0" * 40}
                if recursive or not rest:
                    yield entry.tree_item()


@dataclass
class Hub:
    """The hub: its repositories, its members, and its faults. A revision without a folder is empty."""

    repos: dict[str, dict[str, Path | None]] = field(default_factory=dict)
    gated: frozenset[str] = frozenset()
    private: frozenset[str] = frozenset()
    token: str = "hf_member"
    outsider: str = "hf_outsider"
    fail: int = 0
    fail_times: int = -1
    rate: int = 0
    cut: int = 0
    stall: int = 0
    flip: str = ""
    retry_after: float = 0
    clock: float = 0
    requests: int = 0
    sent_bytes: Counter[str] = field(default_factory=Counter)

    def configure(self, changes: dict[str, object]) -> None:
        for name in ("fail", "fail_times", "rate", "cut", "stall", "flip", "retry_after", "clock"):
            setattr(self, name, changes.get(name, getattr(self, name)))

    def must_fail(self) -> bool:
        """Returns whether this request must fail. Each request that does is counted."""
        if not self.fail or self.fail_times == 0:
            return False
        self.fail_times -= 1
        return True

    def check_token(self, token: str | None) -> None:
        if token is not None and token not in (self.token, self.outsider):
            raise RefusalError(401, "", "Invalid credentials in Authorization header")

    def identify(self, token: str | None) -> dict[str, object]:
        self.check_token(token)
        if token is None:
            raise RefusalError(401, "", "Invalid username or password.")
        return {"type": "user", "name": "member" if token == self.token else "outsider"}

    def find_revision(self, repo: str, revision: str, token: str | None, reads_content: bool) -> Revision:
        """Finds a revision, or refuses. `reads_content` asks for files; those of a gated repository need access."""
        self.check_token(token)
        if repo not in self.repos or (repo in self.private and token != self.token):
            # A client without a token is not told which names are taken.
            if token is None:
                raise RefusalError(401, "RepoNotFound", "Invalid username or password.")
            raise RefusalError(404, "RepoNotFound", "Repository not found")
        if reads_content and repo in self.gated and token != self.token:
            if token is None:
                raise RefusalError(401, "GatedRepo", f"Access to model {repo} is restricted. Please log in.")
            raise RefusalError(403, "GatedRepo", f"Access to model {repo} is restricted, and you are not in its list.")
        for name, folder in self.repos[repo].items():
            candidate = Revision.scan(folder)
            if revision in (name, candidate.commit):
                return candidate
        raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        try:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        except RefusalError as refusal:
            headers = {"X-Error-Message": refusal.message}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            headers |= {"X-Repo-Commit": refusal.commit} if refusal.commit else {}
            headers |= {"Retry-After": str(self.hub.retry_after)} if refusal.status == 429 else {}
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    do_HEAD = do_POST = do_GET

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string((timestamp or time.time()) + self.hub.clock)

    def _answer(self, body: bytes) -> None:
        if self.path == "/stand-in":
            self.hub.configure(json.loads(body or b"{}"))
            self._send(200, json.dumps({"sent": self.hub.sent_bytes, "requests": self.hub.requests}).encode(), {})
            return
        self.hub.requests += 1
        if self.hub.must_fail():
            raise RefusalError(self.hub.fail, "", HTTPStatus(self.hub.fail).phrase)
        url = urlsplit(self.path)
        path = unquote(url.path)
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        bearer = token if scheme == "Bearer" else None
        if path == "/api/whoami-v2":
            self._send(200, json.dumps(self.hub.identify(bearer)).encode(), {})
        elif match := API.fullmatch(path):
            ref, _, folder = (match["rest"] or MAIN).partition("/")
            revision = self.hub.find_revision(match["repo"], ref, bearer, reads_content=match["verb"] == "auth-check")
            query = parse_qs(url.query)
            if match["verb"] == "tree":
                answer: object = list(revision.tree(folder, query.get("recursive", ["false"])[0].lower() == "true"))
            elif match["verb"] == "paths-info":
                paths = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
                answer = [revision.entries[name].tree_item() for name in paths if name in revision.entries]
            else:
                answer = self._describe_model(match["repo"], revision)
            self._send(200, json.dumps(answer).encode(), {"X-Repo-Commit": revision.commit})
        elif match := FILE.fullmatch(path):
            revision = self.hub.find_revision(match["repo"], unquote(match["revision"]), bearer, reads_content=True)
            if match["file"] not in revision.entries:
                raise RefusalError(404, "EntryNotFound", "Entry not found", revision.commit)
            self._send_file(revision.entries[match["file"]], revision.commit)
        else:
            raise RefusalError(404, "", "Sorry, we can't find the page you are looking for.")

    def _describe_model(self, repo: str, revision: Revision) -> dict[str, object]:
        siblings = [entry.sibling() for entry in revision.entries.values()]
        return {"id": repo, "modelId": repo, "author": repo.partition("/")[0], "sha": revision.commit, "tags": [],
                "private": repo in self.hub.private, "gated": "manual" if repo in self.hub.gated else False,
                "siblings": siblings}  # fmt: skip

    def _send_file(self, entry: Entry, commit: str) -> None:
        headers = {"ETag": f'"{entry.id}"', "X-Repo-Commit": commit}
        status, first, last = 200, 0, entry.size - 1
        if found := RANGE.fullmatch(self.headers.get("Range", "")):
            status, first, last = 206, int(found[1]), min(int(found[2] or last), last)
            if first > last:
                self._send(416, b"", {"Content-Range": f"bytes */{entry.size}"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{entry.size}"
        if not (self.hub.rate or self.hub.cut or self.hub.stall or entry.name == self.hub.flip):
            self._send_from_disk(status, entry, first, last + 1 - first, headers)
            return
        content = bytearray(entry.path.read_bytes())
        if entry.name == self.hub.flip:
            content[-1] ^= 1
        self._send(status, bytes(content[first : last + 1]), headers, entry.name)

    def _send_from_disk(self, status: int, entry: Entry, first: int, count: int, headers: dict[str, str]) -> None:
        """Sends by the kernel, so that the hub itself slows nothing down."""
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/octet-stream", "Content-Length": str(count)} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError), entry.path.open("rb") as file:  # a client may leave when it likes
            self.wfile.flush()
            self.hub.sent_bytes[entry.name] += self.connection.sendfile(file, first, count)

    def _send(self, status: int, body: bytes, headers: dict[str, str], file: str = "") -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, stall = self.hub.cut or len(body), self.hub.stall or len(body)
        if len(body) > min(cut, stall):
            body, self.close_connection = body[: min(cut, stall)], True
        with contextlib.suppress(ConnectionError):  # a client may leave when it likes
            offset = 0
            while offset < len(body):
                rate = self.hub.rate  # POST /stand-in may have changed it
                piece = body[offset : offset + (max(1, rate // 10) if rate else CHUNK)]
                self.wfile.write(piece)
                offset += len(piece)
                self.hub.sent_bytes[file] += len(piece) if file else 0
                time.sleep(len(piece) / rate if rate else 0)
            while self.close_connection and self.hub.stall and stall < cut:
                time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0, the default, is one that is free")
    parser.add_argument("--repo", action="append", default=[], metavar="ORG/NAME[@REVISION]=FOLDER")
    parser.add_argument("--gated", action="append", default=[], metavar="ORG/NAME", help="files for --token alone")
    parser.add_argument("--private", action="append", default=[], metavar="ORG/NAME", help="not there but for --token")
    parser.add_argument("--token", default=Hub.token, help="of an account with access to everything (%(default)s)")
    parser.add_argument("--outsider", default=Hub.outsider, help="token of an account without (%(default)s)")
    parser.add_argument("--fail", type=int, default=0, metavar="STATUS", help="answer every request like this")
    parser.add_argument("--fail-times", type=int, default=-1, metavar="N", help="but only the first N")
    parser.add_argument("--rate", type=int, default=0, metavar="BYTES", help="at most so many a second, per connection")
    parser.add_argument("--cut", type=int, default=0, metavar="BYTES", help="break off each longer answer after these")
    parser.add_argument("--stall", type=int, default=0, metavar="BYTES", help="fall silent in each longer answer")
    parser.add_argument("--flip", default="", metavar="FILE", help="send this file with one byte wrong")
    parser.add_argument("--retry-after", type=float, default=0, metavar="SECONDS", help="what a 429 asks for")
    parser.add_argument("--clock", type=float, default=0, metavar="SECONDS", help="how far its clock is ahead")
    given = parser.parse_args()

    gated, private = frozenset(given.gated), frozenset(given.private)
    hub = Hub(token=given.token, outsider=given.outsider, gated=gated, private=private)
    hub.configure(vars(given))
    for text in given.repo:
        name, _, folder = text.partition("=")
        repo, _, revision = name.partition("@")
        if not Path(folder).is_dir():
            parser.error(f"--repo {text}: no such folder")
        hub.repos.setdefault(repo, {})[revision or MAIN] = Path(folder)
    for repo in hub.gated | hub.private:
        hub.repos.setdefault(repo, {MAIN: None})
    Handler.hub = hub
    with http.server.ThreadingHTTPServer(("127.0.0.1", given.port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
