"""What `supervisor explain` and `/status` show: each setting with its source, the warnings, vLLM's command. Masked."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from supervisor.secrets import MASK, has_secret_name
from supervisor.settings.command import build
from supervisor.settings.settings import Setting, Settings, SettingsError

# These stand for the real ones, which are made at the start and are private to each run.
SOCKET, FOLDER = "/tmp/supervisor-XXXXXXXX/vllm.sock", "/tmp/supervisor-XXXXXXXX/tmp"  # noqa: S108  # shown, not used
PIPE_WIDTH = 200  # the width of tables where the output is no terminal: no row is folded, and `grep` finds whole rows


def facts(settings: Settings) -> dict[str, object]:
    """Returns for machines: `settings` (each with name, value, source, overrode) and `warnings`."""
    mask, rows = settings.mask, []
    for row in _rows(settings):
        overrode = [mask(text) for text in row.overrode]
        rows.append({"name": row.name, "value": mask(row.shown), "source": mask(row.source), "overrode": overrode})
    return {"settings": rows, "warnings": list(settings.warnings)}


def command(settings: Settings) -> str:
    return settings.mask.command(build(settings, SOCKET, FOLDER).argv)


def show(settings: Settings, *, as_json: bool) -> None:
    if as_json:
        content = {"mode": settings.mode, "vllm_version": settings.vllm.version, **facts(settings)}
        print(json.dumps(content | {"problems": [], "command": command(settings)}, indent=2))
        return
    from rich.console import Console  # noqa: PLC0415  # it takes 60 ms, for which no other verb should pay
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    mask = settings.mask
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("SETTING", "VALUE", "SOURCE", "OVERRODE"):
        table.add_column(heading, overflow="fold")
    for setting in _rows(settings):
        texts = (setting.name, setting.shown, setting.source, "; ".join(setting.overrode))
        style = "dim" if setting.source == "default" else ""
        table.add_row(*(Text(mask(text)) for text in texts), style=style)
    console.print(table)
    if settings.warnings:
        console.print()
    for warning in settings.warnings:
        console.print(Text("warning: ", "yellow") + Text(warning), soft_wrap=True)
    console.print(Text(f"\nvLLM {settings.vllm.version}, mode {settings.mode}:", "bold"))
    console.print(Text(command(settings)), soft_wrap=True)
    if MASK in command(settings):
        console.print(Text(f"({MASK} stands for a secret: put it in before you paste this)", "dim"))


def show_problems(error: SettingsError, *, as_json: bool) -> None:
    """Prints all that is wrong at once: for machines on standard output, for people on standard error."""
    if as_json:
        print(json.dumps({"problems": error.problems, "warnings": error.warnings}, indent=2))
    for line in (*error.problems, *(f"warning: {warning}" for warning in error.warnings)):
        print(f"supervisor: {line}", file=sys.stderr)


def _rows(settings: Settings) -> list[Setting]:
    """Returns all settings: those that were set come first, and each part has the order of vLLM's options."""
    options = (setting for _, setting in (*settings.options, *settings.raw_options))
    options = (replace(each, is_secret=has_secret_name(each.name)) for each in options)  # `--x.password`
    return [settings.model, *options, *sorted(settings.knob_settings, key=lambda knob: knob.source == "default")]
