"""A terminal on which a few lines stay below the log while it passes: the foot, where `up` shows how far a start is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from supervisor.output import Output

USUAL_HEIGHT = 24  # where a terminal tells none
INTERVAL = 0.15  # seconds between two pictures of the foot

Picture = Callable[[], Sequence[str]]


class Terminal(Output):
    """An output with a foot: from `show(picture)` until `hide()`."""

    _picture: Picture | None = None
    _drawn = 0  # lines

    def show(self, picture: Picture) -> None:
        """`picture` is called by the thread, and gives the foot's lines."""
        with self._changed:
            self._picture = picture
            self._changed.notify()

    def hide(self) -> None:
        self._picture = None

    def close(self) -> None:
        self.hide()
        super().close()

    # In the thread

    def _pause(self) -> float | None:
        return INTERVAL if self._drawn or self._picture else None

    def _write(self, data: bytes | bytearray) -> None:
        erased = b"\x1b[%dF\x1b[J" % self._drawn if self._drawn else b""
        self._drawn = 0
        super()._write(erased + data + self._foot())

    def _foot(self) -> bytes:
        picture = self._picture
        if picture is None:
            return b""
        try:
            height = os.get_terminal_size(self.target).lines or USUAL_HEIGHT
        except OSError:
            return b""
        lines = picture()[-(height // 2) :]
        self._drawn = len(lines)
        # Without wrapping, so that a line is a line.
        return ("\x1b[?7l" + "".join(f"{line}\n" for line in lines) + "\x1b[?7h").encode()
