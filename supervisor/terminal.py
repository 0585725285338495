"""A terminal on which a few lines stay below the log while it passes: the foot, where `up` shows how far a start is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from supervisor.output import Output

USUAL_HEIGHT = 24  # where a terminal tells none
REDRAW_INTERVAL = 0.15  # seconds between two pictures of the foot

Picture = Callable[[], Sequence[str]]


class Terminal(Output):
    """An output with a foot: from `show(picture)` until `hide()`."""

    _picture: Picture | None = None
    _drawn_lines = 0  # lines

    def show(self, picture: Picture) -> None:
        """`picture` is called by the thread, and gives the foot's lines."""
        with self._condition:
            self._picture = picture
            self._condition.notify()

    def hide(self) -> None:
        self._picture = None

    def close(self) -> None:
        self.hide()
        super().close()

    # In the thread

    def _wait_timeout(self) -> float | None:
        return REDRAW_INTERVAL if self._drawn_lines or self._picture else None

    def _write(self, data: bytes | bytearray) -> None:
        erased = b"\x1b[%dF\x1b[J" % self._drawn_lines if self._drawn_lines else b""
        self._drawn_lines = 0
        super()._write(erased + data + self._draw_foot())

    def _draw_foot(self) -> bytes:
        picture = self._picture
        if picture is None:
            return b""
        try:
            height = os.get_terminal_size(self.descriptor).lines or USUAL_HEIGHT
        except OSError:
            return b""
        lines = picture()[-(height // 2) :]
        self._drawn_lines = len(lines)
        # Without wrapping, so that a line is a line.
        return ("\x1b[?7l" + "".join(f"{line}\n" for line in lines) + "\x1b[?7h").encode()
