"""`supervisor doctor`: is this machine fit to serve, and if not, what is to be changed.

Each check (checks.py) is asked by itself, all at the same time: one that hangs, on a driver or a name server, is told
as such when the time is up, and one that fails by a fault of its own is a row like the others.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from supervisor.around.machine import Machine
from supervisor.doctor.checks import CHECKS
from supervisor.doctor.hub import Hub
from supervisor.doctor.patient import FAIL, OK, WARN, Patient, Row
from supervisor.secrets import Mask
from supervisor.settings.settings import Arguments, Settings, SettingsError, gather

PATIENCE = 10.0
# Of that, for the settings, which the checks need: an unknown `vllm` is asked for its version.
SETTINGS_PATIENCE = 5.0
COLOURS = {OK: "green", WARN: "yellow", FAIL: "bold red"}

Check = Callable[[Patient], Row | Iterable[Row] | None]


def show(given: Arguments, environ: Mapping[str, str], *, as_json: bool) -> int:
    """Prints a row for each check; 0 where nothing failed, else 1."""
    deadline = time.monotonic() + PATIENCE
    patient = admit(given, environ)
    mask = patient.settings.mask if patient.settings else Mask(environ)
    mask.add([patient.hub.token])
    rows = [row.masked(mask) for row in examine(patient, CHECKS, deadline - time.monotonic())]
    failed = any(row.verdict == FAIL for row in rows)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [row.as_dict() for row in rows]}, indent=2))
    elif sys.stdout.isatty():
        _table(rows)
    else:
        for row in rows:
            print(" ".join(filter(None, (f"{row.verdict:<5}{row.check:<13}{row.text.rstrip('.')}.", row.remedy))))
    return 1 if failed else 0


def admit(
    given: Arguments,
    environ: Mapping[str, str],
    machine: Machine | None = None,
    patience: float = SETTINGS_PATIENCE,
) -> Patient:
    """Reads the settings, in a thread that may stay behind."""
    found: list[Settings | SettingsError] = []

    def read() -> None:
        try:
            found.append(gather(given, environ))
        except SettingsError as error:
            found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(patience)
    late = SettingsError(
        [
            f"the settings could not be read in {patience:g} s. A vLLM that is new here is asked for its version and "
            "its options once, which takes it 10 s: `supervisor explain` does that. Or `vllm --version` hangs"
        ]
    )
    result = found[0] if found else late
    hub = Hub(environ)
    if isinstance(result, Settings):
        return Patient(environ, machine or Machine(), hub, result)
    return Patient(environ, machine or Machine(), hub, None, tuple(result.problems), tuple(result.warnings))


def examine(patient: Patient, checks: Mapping[str, Check], patience: float) -> list[Row]:
    """All checks at once, in threads that are left behind where they hang; their rows in the table's order."""
    found: dict[str, list[Row]] = {}

    def run(name: str, check: Check) -> None:
        try:
            rows = check(patient)
        except Exception as error:  # noqa: BLE001  # a fault of one check must not hide what the others found
            rows = Row(WARN, f"the check itself failed: {type(error).__name__}: {error}", "This is a bug: report it.")
        listed = [] if rows is None else [rows] if isinstance(rows, Row) else rows
        found[name] = [row.named(name) for row in listed]

    threads = {
        name: threading.Thread(target=run, args=(name, check), daemon=True, name=name) for name, check in checks.items()
    }
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + patience
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    late = Row(WARN, f"no answer within {PATIENCE:g} s", "What it asks hangs: a driver, a network disk, a name server.")
    return [row for name in checks for row in found.get(name, [late.named(name)])]


def _table(rows: Iterable[Row]) -> None:
    from rich.console import Console  # noqa: PLC0415  # 60 ms, and here alone
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "CHECK", "FOUND", "WHAT TO DO"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(Text(row.verdict, COLOURS[row.verdict]), Text(row.check), Text(row.text), Text(row.remedy))
    Console(highlight=False).print(table)
