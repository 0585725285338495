"""A terminal on which a few lines stay below the log while it passes: the foot, where `up` shows how far a start is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from supervisor.output import Output

USUAL_HEIGHT = 24  # it counts where a terminal tells none
REDRAW_INTERVAL = 0.15  # seconds between two pictures of the foot

Picture = Callable[[], Sequence[str]]


class Terminal(Output):
    """An output that has a foot from `show` until `hide`."""

    _picture: Picture | None = None
    _drawn_lines = 0  # of the foot, below the log

    def show(self, picture: Picture) -> None:
        """Shows a foot: the thread calls `picture`, which returns its lines."""
        with self._condition:
            self._picture = picture
            self._condition.notify()

    def hide(self) -> None:
        self._picture = None

    def close(self) -> None:
        self.hide()
        super().close()

    # The thread calls these.

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
        # The terminal does not wrap here, so that a line is a line.
        return ("\x1b[?7l" + "".join(f"{line}\n" for line in lines) + "\x1b[?7h").encode()
