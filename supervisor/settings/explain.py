"""What `supervisor explain` shows: each setting with its source, what was not taken, and vLLM's command. Masked."""

from __future__ import annotations

import json

from supervisor.settings.command import Mask, build
from supervisor.settings.sources import Setting, Settings

# The real ones are made at start, private to each run.
SOCKET, FOLDER = "/tmp/supervisor-XXXXXXXX/vllm.sock", "/tmp/supervisor-XXXXXXXX/tmp"  # noqa: S108  # shown, not used


def show(settings: Settings, *, as_json: bool) -> None:
    mask = Mask.of(settings)
    command = mask.command(build(settings, SOCKET, FOLDER).argv)
    rows = [settings.model, *(setting for _, setting in settings.options), *settings.knob_settings]
    if as_json:
        content = {
            "vllm_version": settings.vllm.version,
            "settings": [_row(setting, mask) for setting in rows],
            "notes": [mask(note) for note in settings.notes],
            "command": command,
        }
        print(json.dumps(content, indent=2))
        return
    table = [(row.name, mask(row.shown), row.source, mask("; ".join(row.overrode))) for row in rows]
    table.insert(0, ("SETTING", "VALUE", "SOURCE", "OVERRODE"))
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for note in settings.notes:
        print(f"\nnote: {mask(note)}")
    print(f"\nvLLM {settings.vllm.version}:\n{command}")


def _row(setting: Setting, mask: Mask) -> dict[str, object]:
    return {
        "name": setting.name,
        "value": mask(setting.shown),
        "source": setting.source,
        "overrode": [mask(text) for text in setting.overrode],
    }
