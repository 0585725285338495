"""A connection whose one end is a protocol of the gateway's, and whose other end, the `FarEnd`, is a script.

    transport = ScriptedTransport(loop, protocol, far_end)
    transport.connect()
    far_end.sends(b"GET / HTTP/1.1\r\n", b"Host: x\r\n\r\n")
    far_end.leaves()

It keeps asyncio's contract as uvloop does. There is one read in a turn of the loop, of 256 KiB at most. What comes
while reading is paused stays in the kernel, and so does the connection's end. `pause_writing` is called above 64 KiB
that the other end has not taken. A write behind `write_eof`, or behind the end, is an error. An exception in a callback
reaches the loop's handler and ends the connection.

The kernel's buffers towards the other end count as full: what it does not take stays in the gateway's buffer.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any

READ_SIZE = 256 * 1024  # bytes of one read at most
HIGH_WATER = 64 * 1024  # more bytes than these in the buffer pause writing
LOW_WATER = HIGH_WATER // 4  # so many bytes, or fewer, resume it
ESTABLISHED, CLOSE_WAIT = 1, 8  # TCP's states, as the kernel numbers them
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing the socket resets the connection


class FarEnd:
    """The script's end of a connection. It takes what the gateway writes at once, unless `stops_reading` was called.

    A subclass says what is done with bytes and with the end, in `bytes_arrived` and `end_arrived`.
    """

    transport: ScriptedTransport  # set by the transport itself

    def __init__(self) -> None:
        self.reading = True
        self.left = False  # the script closed the connection, both ways
        self.ended = False  # the gateway closed its end, or half closed it, and all before that was read
        self.reset = False  # the gateway closed its end in such a way that what was under way is lost

    # What a script does

    def sends(self, *pieces: bytes) -> None:
        """Sends the pieces; each is a read of its own for the gateway, if it reads."""
        for piece in pieces:
            self.transport.deliver(piece)
            self._settle()

    def stops_reading(self) -> None:
        """Takes nothing from now on, until `reads` is called."""
        self.reading = False

    def reads(self, size: int | None = None) -> None:
        """Takes `size` bytes and then nothing, or else all, and what comes from now on."""
        self.reading = size is None
        self.transport.flush(size)
        self._settle()

    def half_closes(self) -> None:
        """Sends nothing further, and still reads."""
        self.transport.deliver_end(None)
        self._settle()

    def leaves(self) -> None:
        """Closes in order. What the gateway still writes is lost, and its first write fails the connection."""
        self.left = True
        self.transport.deliver_end(None)
        self._settle()

    def breaks(self) -> None:
        """Closes by a reset: what the gateway has not read is lost."""
        self.left = True
        self.transport.deliver_end(ConnectionResetError(104, "Connection reset by peer"))
        self._settle()

    @property
    def closed(self) -> bool:
        """True when the gateway has closed its end."""
        return self.ended or self.reset

    @property
    def unread_by_gateway(self) -> int:
        """Bytes that this end has sent, and the gateway has not read."""
        return len(self.transport.kernel)

    @property
    def unread(self) -> int:
        """Bytes that the gateway has written, and this end has not taken."""
        return len(self.transport.buffer)

    # What the transport calls, and a subclass defines

    def bytes_arrived(self, data: bytes) -> None:
        """Takes bytes that the gateway wrote."""
        raise NotImplementedError

    def end_arrived(self, *, reset: bool) -> None:
        """Takes the gateway's end of the connection, in order or by a reset. It may be called twice."""
        self.reset = self.reset or reset
        self.ended = self.ended or not reset

    def _settle(self) -> None:
        """Runs the loop until nothing is left to do."""
        raise NotImplementedError


class ScriptedSocket:
    """A socket, as far as the gateway's protocols ask one: its file number, addresses and options."""

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
        """Returns TCP_INFO, which begins with the connection's state, for a TCP socket, and 0 for all else."""
        if (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO) and self.family != socket.AF_UNIX:
            return bytes([CLOSE_WAIT if self.transport.far_ended else ESTABLISHED]).ljust(size, b"\0")
        return 0


class ScriptedTransport(asyncio.Transport):
    """The gateway's end of a connection: asyncio's interface to its protocol, and the kernel towards the `FarEnd`."""

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
        self.kernel = bytearray()  # what the far end sent, and the gateway has not read
        self.buffer = bytearray()  # what the gateway wrote, and the far end has not taken
        self.far_ended = False  # the far end has closed or half closed
        self.far_error: Exception | None = None  # it did so by a reset
        self.bytes_read = 0  # by the gateway, in all
        self.paused = False  # the gateway has paused reading
        self.read_scheduled = False
        self.eof_reported = False  # eof_received was called
        self.writing_paused = False
        self.eof_written = False
        self.closing = False
        self.loss_scheduled = False  # connection_lost was called, or will be in the next turn
        self.loss_reported = False  # connection_lost was called
        far_end.transport = self

    def connect(self) -> None:
        """Tells the protocol that the connection is made."""
        self._call("connection_made", self)

    # From the far end

    def deliver(self, data: bytes) -> None:
        """Takes bytes of the far end's, which the gateway reads in the next turn at the earliest."""
        assert not self.far_ended, "it has closed its end"
        if not self.closing:
            self.kernel += data
            self._schedule_read()

    def deliver_end(self, error: Exception | None) -> None:
        """Takes the far end's end. With an error it is a reset, and what was not read is lost."""
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
        """Passes `size` bytes of the buffer to the far end, or all if it reads, and then the end, if it is written."""
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
        """Calls the protocol as a loop does: an exception is reported, and ends the connection."""
        call: Callable[..., object] = getattr(self.protocol, name)
        try:
            return call(*arguments)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is reported
            text = f"Fatal error: protocol.{name}() call failed."
            self.loop.call_exception_handler({"message": text, "exception": error, "protocol": self.protocol})
            self._force_close(error)
            return None
