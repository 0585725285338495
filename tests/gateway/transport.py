"""A connection whose one end is a product's protocol, and whose other end is a script.

It keeps asyncio's contract as uvloop does it. There is one read in a turn, of 256 KiB at most. What comes while reading
is paused lies in the kernel, the connection's end included. `pause_writing` is called above 64 KiB that the other end
has not taken. A write behind `write_eof`, or behind the end, is an error. An exception in a callback reaches the loop's
handler and ends the connection.

The kernel between them is one whose buffers are full: what the other end does not take stays in the gateway's.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any

READ_SIZE = 256 * 1024
HIGH_WATER = 64 * 1024
LOW_WATER = HIGH_WATER // 4
ESTABLISHED, CLOSE_WAIT = 1, 8  # TCP's states, as the kernel numbers them
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class FarEnd:
    """The script's end. What the gateway writes is `taken` as it comes, unless `stops_reading` was said."""

    transport: ScriptedTransport

    def __init__(self) -> None:
        self.reading = True
        self.left = False  # closed by the script, both ways
        self.ended = False  # the gateway's end was closed, or half closed, and all before it was read
        self.reset = False  # the gateway's end was closed so that what was under way is lost

    # What a script does

    def sends(self, *pieces: bytes) -> None:
        """Each piece is one read of the gateway's, if it reads."""
        for piece in pieces:
            self.transport.deliver(piece)
            self._settle()

    def stops_reading(self) -> None:
        self.reading = False

    def reads(self, size: int | None = None) -> None:
        """Takes `size` bytes, or all, and what comes from now on."""
        self.reading = size is None
        self.transport.flush(size)
        self._settle()

    def half_closes(self) -> None:
        self.transport.deliver_end(None)
        self._settle()

    def leaves(self) -> None:
        """Closes in order: what the gateway still writes is lost, and it is told by the first of it."""
        self.left = True
        self.transport.deliver_end(None)
        self._settle()

    def breaks(self) -> None:
        """Closes by a reset."""
        self.left = True
        self.transport.deliver_end(ConnectionResetError(104, "Connection reset by peer"))
        self._settle()

    @property
    def closed(self) -> bool:
        """By the gateway."""
        return self.ended or self.reset

    @property
    def unread_by_gateway(self) -> int:
        return len(self.transport.kernel)

    @property
    def unread(self) -> int:
        """Bytes that the gateway has written, and this end has not taken."""
        return len(self.transport.buffer)

    # For those below

    def bytes_arrived(self, data: bytes) -> None:
        raise NotImplementedError

    def end_arrived(self, *, reset: bool) -> None:
        self.reset = self.reset or reset
        self.ended = self.ended or not reset

    def _settle(self) -> None:
        raise NotImplementedError


class ScriptedSocket:
    """What protocols ask of a socket."""

    def __init__(self, transport: ScriptedTransport, family: socket.AddressFamily) -> None:
        self.transport = transport
        self.family = family
        self.resets_on_close = False
        self.number = 3

    def fileno(self) -> int:
        return self.number

    def getpeername(self) -> Any:
        return ("192.0.2.7", 40000) if self.family != socket.AF_UNIX else ""

    def getsockname(self) -> Any:
        return ("192.0.2.1", 8000) if self.family != socket.AF_UNIX else "gateway.socket"

    def setsockopt(self, level: int, option: int, value: object) -> None:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self.resets_on_close = value == RESET_ON_CLOSE

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        """TCP_INFO begins with the connection's state."""
        if (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO) and self.family != socket.AF_UNIX:
            return bytes([CLOSE_WAIT if self.transport.far_ended else ESTABLISHED]).ljust(size, b"\0")
        return 0


class ScriptedTransport(asyncio.Transport):
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol: asyncio.Protocol,
        far_end: FarEnd,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> None:
        self.socket = ScriptedSocket(self, family)
        super().__init__({"socket": self.socket})
        self.loop = loop
        self.protocol = protocol
        self.far_end = far_end
        self.kernel = bytearray()  # came, and was not read
        self.buffer = bytearray()  # written, and not taken
        self.far_ended = False
        self.far_error: Exception | None = None
        self.bytes_read = 0
        self.paused = False
        self.read_scheduled = False
        self.eof_reported = False
        self.writing_paused = False
        self.eof_written = False
        self.closing = False
        self.loss_scheduled = False  # connection_lost is called, or will be in the next turn
        self.loss_reported = False  # it was called
        far_end.transport = self

    def connect(self) -> None:
        self._call("connection_made", self)

    # From the far end

    def deliver(self, data: bytes) -> None:
        assert not self.far_ended, "it has closed its end"
        if not self.closing:
            self.kernel += data
            self._schedule_read()

    def deliver_end(self, error: Exception | None) -> None:
        self.far_ended = True
        self.far_error = error
        if error is not None:
            self.kernel.clear()
        self._schedule_read()
        if self.far_end.left and self.buffer:
            self._schedule_failure()

    def _schedule_read(self) -> None:
        if not (self.read_scheduled or self.paused or self.closing or self.eof_reported):
            self.read_scheduled = True
            self.loop.call_soon(self._read)

    def _read(self) -> None:
        self.read_scheduled = False
        if self.paused or self.closing:
            return
        if self.kernel:
            data = bytes(self.kernel[:READ_SIZE])
            del self.kernel[:READ_SIZE]
            self.bytes_read += len(data)
            self._call("data_received", data)
        elif self.far_error is not None:
            self._force_close(self.far_error)
        elif self.far_ended and not self.eof_reported:
            self.eof_reported = True
            if not self._call("eof_received"):
                self.close()
        if self.kernel or (self.far_ended and not self.eof_reported):
            self._schedule_read()

    # To the far end

    def flush(self, size: int | None = None) -> None:
        if size is None and not self.far_end.reading:
            size = 0
        if self.far_end.left:
            return
        data = bytes(self.buffer if size is None else self.buffer[:size])
        del self.buffer[: len(data)]
        if data:
            self.far_end.bytes_arrived(data)
        if self.writing_paused and len(self.buffer) <= LOW_WATER and not self.loss_reported:
            self.writing_paused = False
            self._call("resume_writing")
        if self.buffer:
            return
        if self.eof_written:
            self.far_end.end_arrived(reset=False)
        if self.closing and not self.loss_scheduled:
            self._lose(None)

    # asyncio's interface

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._ensure_alive()
        if self.eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if not data or self.loss_scheduled:
            return
        self.buffer += data
        if self.far_end.left:
            self._schedule_failure()
            return
        if self.far_end.reading:
            self.flush()
        elif len(self.buffer) > HIGH_WATER and not self.writing_paused:
            self.writing_paused = True
            self._call("pause_writing")

    def writelines(self, pieces: Any) -> None:
        self.write(b"".join(pieces))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._ensure_alive()
        if not self.eof_written:
            self.eof_written = True
            self.flush()

    def pause_reading(self) -> None:
        if not self.closing:
            self.paused = True

    def resume_reading(self) -> None:
        if self.closing or not self.paused:
            return
        self.paused = False
        if self.kernel or self.far_ended:
            self._schedule_read()

    def is_reading(self) -> bool:
        return not self.paused and not self.closing

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if self.closing:
            return
        self.closing = True
        if not self.buffer:
            self._lose(None)

    def abort(self) -> None:
        self._force_close(None)

    def get_write_buffer_size(self) -> int:
        return len(self.buffer)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol  # type: ignore[assignment]

    # The end

    def _schedule_failure(self) -> None:
        self.loop.call_soon(self._force_close, BrokenPipeError(32, "Broken pipe"))

    def _force_close(self, error: Exception | None) -> None:
        if self.loss_scheduled:
            return
        self.closing = True
        self.buffer.clear()
        self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        self.loss_scheduled = True
        self.loop.call_soon(self._report_loss, error)

    def _report_loss(self, error: Exception | None) -> None:
        try:
            self._call("connection_lost", error)
        finally:
            self.loss_reported = True
            # Closing with something unread resets the connection.
            self.far_end.end_arrived(reset=self.socket.resets_on_close or bool(self.kernel))

    def _ensure_alive(self) -> None:
        if self.loss_reported:
            raise RuntimeError(f"unable to perform operation on {self!r}; the handler is closed")

    def _call(self, name: str, *arguments: object) -> object:
        """As a loop does it: an exception is reported, and ends the connection."""
        call: Callable[..., object] = getattr(self.protocol, name)
        try:
            return call(*arguments)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is reported
            text = f"Fatal error: protocol.{name}() call failed."
            self.loop.call_exception_handler({"message": text, "exception": error, "protocol": self.protocol})
            self._force_close(error)
            return None
