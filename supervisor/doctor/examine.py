"""`supervisor doctor` tells whether this machine is fit to serve, and if not, what is to be changed.

All checks run at the same time, each by itself: one that hangs, on a driver or a name server, is shown as such when the
time is up, and one that fails by a fault of its own is a row like the others.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from supervisor.around.machine import Machine
from supervisor.bounded import Call
from supervisor.doctor import machine, model
from supervisor.doctor.hub import Hub
from supervisor.doctor.patient import FAIL, OK, WARN, Patient, Row
from supervisor.engine.workspace import temporary_folder
from supervisor.secrets import Mask
from supervisor.settings.settings import Arguments, SettingsError, gather

PATIENCE = 10.0
# The settings, which the checks need, get so much of that: an unknown `vllm` is asked for its version.
SETTINGS_PATIENCE = 5.0
LATE_SETTINGS = (
    "the settings could not be read in {:g} s. A vLLM that is new here is asked for its version and its options once, "
    "which takes it 10 s: `supervisor explain` does that. Or `vllm --version` hangs"
)
COLOURS = {OK: "green", WARN: "yellow", FAIL: "bold red"}

Check = Callable[[Patient], Row | Iterable[Row] | None]


def check_settings(patient: Patient) -> Iterable[Row]:
    if patient.settings is None:
        rows = [Row(FAIL, problem) for problem in patient.problems]
    else:
        model, mode = patient.settings.model, patient.settings.mode
        rows = [Row(OK, f"valid: {model.value} ({model.source}), mode {mode}")]
    return [*rows, *(Row(WARN, warning) for warning in patient.warnings)]


# They are shown in this order.
CHECKS: dict[str, Check] = {
    "settings": check_settings,
    "vllm": machine.check_vllm,
    "packages": machine.check_packages,
    "gpu": machine.check_gpus,
    "gpu memory": machine.check_gpu_memory,
    "driver": machine.check_driver,
    "shm": machine.check_shared_memory,
    "memory": machine.check_memory,
    "port": machine.check_port,
    "volume": partial(
        machine.check_write, lambda patient: patient.volume,
        "Mount it writable, or downloads and caches last for one start.", WARN,
    ),
    "cache": partial(
        machine.check_write, lambda patient: patient.settings.cache if patient.settings else None,
        "Set SUPERVISOR_CACHE_DIR, or each start compiles anew.", WARN,
    ),
    "downloads": partial(
        machine.check_write, lambda patient: patient.download_path, "Set HF_HOME to a folder that can be written.", FAIL
    ),
    "temporary": partial(
        machine.check_write, lambda patient: temporary_folder(patient.environ),
        "Set TMPDIR, or mount a tmpfs on /tmp (--tmpfs /tmp:exec).", FAIL, for_code=True,
    ),
    "hub": model.check_hub,
    "model": model.check_access,
    "disk": model.check_disk,
    "weights": model.check_weights,
}  # fmt: skip


def show(arguments: Arguments, environ: Mapping[str, str], *, as_json: bool) -> int:
    """Prints a row for each check; returns 0 where nothing failed, else 1."""
    deadline = time.monotonic() + PATIENCE
    patient = make_patient(arguments, environ)
    mask = patient.settings.mask if patient.settings else Mask(environ)
    mask.add([patient.hub.token])
    rows = [row.apply_mask(mask) for row in examine(patient, CHECKS, deadline - time.monotonic())]
    failed = any(row.verdict == FAIL for row in rows)
    if as_json:
        checks = [{"check": row.check, "verdict": row.verdict, "found": row.text, "remedy": row.remedy} for row in rows]
        print(json.dumps({"ok": not failed, "checks": checks}, indent=2))
    elif sys.stdout.isatty():
        _print_table(rows)
    else:
        for row in rows:
            print(" ".join(filter(None, (f"{row.verdict:<5}{row.check:<13}{row.text.rstrip('.')}.", row.remedy))))
    return 1 if failed else 0


def make_patient(
    arguments: Arguments, environ: Mapping[str, str], host: Machine | None = None, patience: float = SETTINGS_PATIENCE
) -> Patient:
    """Returns a patient with the settings, which are read in a thread that may stay behind."""
    patient = partial(Patient, environ, host := host or Machine(), Hub(environ))
    reading = Call(partial(gather, arguments, environ))
    if not reading.wait(patience):
        return patient(None, (LATE_SETTINGS.format(patience),))
    try:
        settings = reading.result()
    except SettingsError as error:
        return patient(None, tuple(error.problems), tuple(error.warnings))
    hub = Hub(settings.environ)  # the environment as the start reads it, without what is around a value
    return Patient(settings.environ, host, hub, settings, (), tuple(settings.warnings))


def examine(patient: Patient, checks: Mapping[str, Check], patience: float) -> list[Row]:
    """Runs all checks at once, in threads that are left behind where they hang; returns rows in the table's order."""
    deadline = time.monotonic() + patience
    calls = {name: Call(partial(_run_check, check, patient)) for name, check in checks.items()}
    hang = Row(WARN, f"no answer within {PATIENCE:g} s", "What it asks hangs: a driver, a network disk, a name server.")
    return [
        row._replace(check=name)
        for name, call in calls.items()
        for row in (call.result() if call.wait(max(0.0, deadline - time.monotonic())) else [hang])
    ]


def _run_check(check: Check, patient: Patient) -> list[Row]:
    try:
        found = check(patient)
    except Exception as error:  # noqa: BLE001  # a fault of one check must not hide what the others found
        return [Row(WARN, f"the check itself failed: {type(error).__name__}: {error}", "This is a bug: report it.")]
    return [found] if isinstance(found, Row) else list(found or ())


def _print_table(rows: Iterable[Row]) -> None:
    from rich.console import Console  # noqa: PLC0415  # it takes 60 ms, which only a table should cost
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "CHECK", "FOUND", "WHAT TO DO"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(Text(row.verdict, COLOURS[row.verdict]), Text(row.check), Text(row.text), Text(row.remedy))
    Console(highlight=False).print(table)
