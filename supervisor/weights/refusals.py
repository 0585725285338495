"""Says why something can't be had, and what to change: errors of the hub's client and of the disk, in words."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

EXIT_PERMANENT, EXIT_TRANSIENT = 3, 4
REFUSALS: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_bytes())
ROUTE_VARIABLES = ("HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")  # they lead to the hub, or past it


class UnavailableError(Exception):
    """An error that says why something can't be had, what to change, and by its exit code, if another try may help."""

    def __init__(self, row: Mapping[str, Any], words: Mapping[str, object]) -> None:
        self.cause, self.remedy = row["cause"].format_map(words), row["remedy"].format_map(words)
        self.exit_code: int = row["exit"]
        super().__init__(self.cause)


def unavailable(name: str, **words: object) -> UnavailableError:
    return UnavailableError(REFUSALS["ours"][name], words)


def raise_known(error: BaseException, words: Mapping[str, object], exit_code: int = EXIT_PERMANENT) -> None:
    """Raises UnavailableError where the hub's or the disk's answer is known to be permanent (or transient)."""
    for each in _chain(error):
        names, code = {kind.__name__ for kind in type(each).__mro__}, _code(each)
        for row in REFUSALS["errors"]:
            if row["exit"] == exit_code and row["error"] in names and code in row.get("codes", (code,)):
                raise UnavailableError(row, words)


def raise_unreachable(summary: str, error: BaseException) -> NoReturn:
    raise_known(error, {}, EXIT_TRANSIENT)
    routes = [name for name in ROUTE_VARIABLES if os.environ.get(name) or os.environ.get(name.lower())]
    raise unavailable("unreachable", what=summary, reason=reason(error), routes=", ".join(["the network", *routes]))


def reason(error: BaseException) -> str:
    """Returns the reason in one line. Two of the client's errors are skipped, for the one below them says more."""
    errors = [each for each in _chain(error) if type(each).__name__ not in ("LocalEntryNotFoundError", "DryRunError")]
    return (str((errors or [error])[0]).strip().splitlines() or [type(error).__name__])[0][:200]


def backoff(error: BaseException, attempt: int) -> float:
    """Returns the seconds until the next try: what the hub asks for, else more each time."""
    for each in _chain(error):
        with contextlib.suppress(AttributeError, KeyError, ValueError):
            return min(float(each.response.headers["Retry-After"]), 60.0)  # type: ignore[attr-defined]
    return min(2.0**attempt, 60.0)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> Any:
    """Returns the status of the hub's answer, or the disk's errno; 0 for neither."""
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # Xet's client says it so
        return int(found[1])
    if isinstance(error, PermissionError) and error.filename is None:  # it is the network's: a firewall
        return 0
    return getattr(getattr(error, "response", None), "status_code", 0) or getattr(error, "errno", None) or 0
