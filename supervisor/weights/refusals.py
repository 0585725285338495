"""Why something can't be had, and what to change: the errors of the hub's client and of the disk, in words."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

PERMANENT, TRANSIENT = 3, 4
# The client's errors by the names that all its versions have, and the status that came, where that matters.
REFUSALS = json.loads(Path(__file__).with_suffix(".json").read_bytes())
# What leads to the hub, or past it.
ROUTES = ("HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")


class CannotError(Exception):
    """Why something can't be had, what to change, and the exit code that tells whether another try may help."""


def fail(cause: str, remedy: str, code: int = PERMANENT) -> NoReturn:
    raise CannotError(cause, remedy, code)


def refused(error: BaseException, words: Mapping[str, object]) -> None:
    """Raises CannotError where the hub's answer is a final one."""
    for each in _chain(error):
        names = {kind.__name__ for kind in type(each).__mro__}
        for row in REFUSALS:
            if row["error"] in names and row["status"] in (0, _status(each)):
                fail(row["cause"].format_map(words), row["remedy"].format_map(words))


def unreachable(what: str, error: BaseException) -> NoReturn:
    again = "it is tried again, and goes on where it stopped."
    if any(_status(each) == 429 for each in _chain(error)):
        remedy = f"Set HF_TOKEN: with an account the limits are higher; {again}"
        fail("The hub turned us away: too many requests (429).", remedy, TRANSIENT)
    routes = [name for name in ROUTES if os.environ.get(name) or os.environ.get(name.lower())]
    fail(f"{what}: {reason(error)}.", f"Check {', '.join(['the network', *routes])}; {again}", TRANSIENT)


def reason(error: BaseException) -> str:
    """In a line; of two of the client's errors the one below says more."""
    told = [each for each in _chain(error) if type(each).__name__ not in ("LocalEntryNotFoundError", "DryRunError")]
    return (str((told or [error])[0]).strip().splitlines() or [type(error).__name__])[0][:200]


def pause(error: BaseException, number: int) -> float:
    """Seconds until the next try: what the hub asks for, else more each time."""
    for each in _chain(error):
        with contextlib.suppress(AttributeError, KeyError, ValueError):
            return min(float(each.response.headers["Retry-After"]), 60.0)  # type: ignore[attr-defined]
    return min(2.0**number, 60.0)


def disk(error: BaseException, repo: str, cache: Path) -> None:
    """Raises CannotError where the disk is what failed."""
    for each in _chain(error):
        number = getattr(each, "errno", None)
        if number is None and (found := re.search(r"\(os error (\d+)\)", str(each))):  # by Xet's client
            number = int(found[1])
        elif number in (1, 13) and getattr(each, "filename", None) is None:
            continue  # the network's: a firewall
        if number in (28, 122):  # ENOSPC, EDQUOT
            fail(f"The disk became full while {repo} came to {cache}.", "Mount a larger volume, or free space.")
        if number in (1, 13, 30):  # EPERM, EACCES, EROFS
            why = "is read-only" if number == 30 else "may not be written by this user"
            fail(f"{cache} {why}.", "Mount it writable, or point HF_HOME at a folder that is.")
        if number == 20:  # ENOTDIR
            fail(f"{cache} can't be written to ({os.strerror(20)}).", "Point HF_HOME at a folder that can.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))
