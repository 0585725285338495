"""Ends an answer that has begun, at any moment: it says what may go to the client now, and what ends it well.

An event stream is ended by an error event and its proper end, a WebSocket by a close frame. Of all else a cut alone
tells that it is not whole.
"""

from __future__ import annotations

import re

from supervisor.gateway.errors import Refusal
from supervisor.gateway.frames import GOING_AWAY, INTERNAL_ERROR, Frames, close_frame
from supervisor.gateway.http1 import Dechunker

PARTIAL_LIMIT = 64 * 1024  # an event of more bytes than this passes in pieces
# A chunk that ends an event ends with one of EVENT_ENDS, and vLLM's chunks with one of the usual ends.
USUAL_ENDS = (b"}\n\n\r\n", b"]\n\n\r\n")
EVENT_ENDS = (b"\n\n\r\n", b"\r\n\r\n\r\n")
# A chunk of a line end and no more looks as if it ended an event, because its size ends with a line end, too. It
# ends one where the chunk before it ends with a line end.
LINE_END_ALONE = (b"1\r\n\n\r\n", b"2\r\n\r\n\r\n")
SECOND_LINE_END = (b"\n\r\n1\r\n\n\r\n", b"\r\n\r\n2\r\n\r\n\r\n")
LONGEST_END = 12  # bytes that hold any of these ends
LINE_ENDS = re.compile(rb"[\r\n]+")
# The last event of a stream ends so, by the dialect of its route.
STREAM_ENDS = (b"data: [DONE]\n\n\r\n", b'"type":"message_stop"}\n\n\r\n')
# This matches a piece of an event stream that vLLM's API server makes without the engine: a comment, or what every
# stream of /v1/responses begins with. The size of the piece's chunk may stand before it.
NO_PROGRESS = re.compile(rb"(?:[0-9A-Fa-f]+\r\n)?(?::|event: response\.(?:created|in_progress)\b)")
COMMENT = re.compile(rb"(?:[0-9A-Fa-f]+\r\n)?:")
# An engine that dies makes such an event of its death, and vLLM's API server ends the stream as if it were well.
FAILED = re.compile(rb"""(?m)^(?:data: ?\{"error"|event: ?error)|"finish_reason": ?"(?:abort|error)\"""")
COMMENT_CHUNK = b"3\r\n:\n\n\r\n"
# A comment that keeps a connection alive has at most so many bytes; an event with a token in it has more.
LARGEST_COMMENT = 64


class Body:
    """Passes the body of an answer that has begun as it comes: one that is no event stream, and no WebSocket."""

    __slots__ = ("dechunker",)

    def __init__(self, dechunker: Dechunker | None = None) -> None:
        """A `dechunker` takes the chunks off for a client that speaks HTTP/1.0, and knows none."""
        self.dechunker = dechunker

    def feed(self, data: bytes, in_chunk: bool) -> bytes:
        """Returns what may go to the client now. `in_chunk`: vLLM's bytes so far end within a chunk."""
        return data if self.dechunker is None else self.dechunker.feed(data)

    def flush(self) -> bytes:
        """Returns what was kept back. It is called once all of the body is there."""
        return b""

    def ending(self, refusal: Refusal, path: bytes) -> bytes | None:
        """Returns what ends the body well at this moment; None where only a cut tells."""
        return None

    def filler(self) -> bytes:
        """Returns bytes without a meaning, which a client that is gone will not take; b"" where there are none."""
        return b""


PLAIN = Body()


class Events(Body):
    """Passes an event stream in chunks. Half an event is of no use to the client, and a stream that stops there could
    not be ended well. So the client gets whole events, unless one is too large to be kept."""

    __slots__ = ("last_piece", "partial_event", "previous_piece", "torn")

    def __init__(self, dechunker: Dechunker | None = None) -> None:
        super().__init__(dechunker)
        self.partial_event = b""  # bytes that end within an event, and are kept from the client until that ends
        self.torn = False  # set while the client has half an event, and maybe half a chunk
        self.previous_piece = self.last_piece = b""  # what the client got last but one, and last

    def feed(self, data: bytes, in_chunk: bool) -> bytes:
        if not (self.partial_event or in_chunk or self.torn) and data.endswith(USUAL_ENDS):  # nearly always so
            self.previous_piece, self.last_piece = self.last_piece, data
            return data if self.dechunker is None else self.dechunker.feed(data)
        if self.torn:
            # The end of an event may come in pieces.
            self.last_piece = data if len(data) >= LONGEST_END else (self.last_piece + data)[-LONGEST_END:]
            self.torn = in_chunk or not _ends_event(self.last_piece)
        else:
            data = self.partial_event + data
            if in_chunk or not _ends_event(data):
                if len(data) < PARTIAL_LIMIT:
                    self.partial_event = data
                    return b""
                self.torn = True
            self.partial_event = b""
            self.previous_piece, self.last_piece = self.last_piece, data
        return data if self.dechunker is None else self.dechunker.feed(data)

    def flush(self) -> bytes:
        data, self.partial_event = self.partial_event, b""
        return data if self.dechunker is None else self.dechunker.feed(data)

    @property
    def failed(self) -> bool:
        """Tells whether vLLM itself ended the stream by an error. The end mark follows, maybe in a piece of its own."""
        return FAILED.search(self.previous_piece + self.last_piece) is not None

    def ending(self, refusal: Refusal, path: bytes) -> bytes | None:
        if self.torn:
            return None
        rest = _cut_to_whole_events(self.partial_event)
        # vLLM may have ended the stream itself, and died before the last chunk.
        events = b"" if (rest or self.last_piece).endswith(STREAM_ENDS) else refusal.events(path)
        if self.dechunker is not None:
            return self.dechunker.feed(rest) + events
        return rest + (b"%x\r\n%b\r\n" % (len(events), events) if events else b"") + b"0\r\n\r\n"

    def filler(self) -> bytes:
        if self.torn:
            return b""
        return COMMENT_CHUNK if self.dechunker is None else b":\n\n"


class LateAnswer(Body):
    """Makes one event of an answer that is no stream: its client was given a stream's head while it waited."""

    def __init__(self, path: bytes, *, chunked: bool) -> None:
        super().__init__(Dechunker() if chunked else None)
        self.path = path
        self.content = b""

    def feed(self, data: bytes, in_chunk: bool) -> bytes:
        self.content += super().feed(data, in_chunk)
        return b""

    def flush(self) -> bytes:
        one_line = LINE_ENDS.sub(b" ", self.content)
        named = self.path.startswith((b"/v1/messages", b"/v1/responses"))
        events = b"event: error\ndata: %b\n\n" % one_line if named else b"data: %b\n\ndata: [DONE]\n\n" % one_line
        return b"%x\r\n%b\r\n0\r\n\r\n" % (len(events), events)

    def ending(self, refusal: Refusal, path: bytes) -> bytes:
        return Events().ending(refusal, path) or b""

    def filler(self) -> bytes:
        return COMMENT_CHUNK


class Tunnel(Body):
    """Passes vLLM's frames of a WebSocket, and watches where they end."""

    def __init__(self) -> None:
        self.frames = Frames()

    def feed(self, data: bytes, in_chunk: bool) -> bytes:
        self.frames.feed(data)
        return data

    def flush(self) -> bytes:
        """Returns a close frame, as vLLM closed the connection; none where vLLM sent one, or half a frame."""
        if self.frames.closed or not self.frames.is_between_frames:
            return b""
        return close_frame(INTERNAL_ERROR, "The engine closed the connection.")

    def ending(self, refusal: Refusal, path: bytes) -> bytes:
        if self.frames.closed or not self.frames.is_between_frames:  # within a frame it would be part of a message
            return b""
        return close_frame(GOING_AWAY if refusal.code == "shutting_down" else INTERNAL_ERROR, refusal.message)


def is_comment(data: bytes) -> bool:
    """Tells whether a piece of an event stream keeps a connection alive, and is nothing else."""
    return len(data) <= LARGEST_COMMENT and COMMENT.match(data) is not None


def _ends_event(data: bytes) -> bool:
    return data.endswith(EVENT_ENDS) and (not data.endswith(LINE_END_ALONE) or data.endswith(SECOND_LINE_END))


def _cut_to_whole_events(data: bytes) -> bytes:
    """Returns the chunks at the beginning of `data` up to the last that ends an event, without what follows."""
    at = whole_size = 0
    while (line := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line].partition(b";")[0], 16)
        end = line + 2 + size + 2
        if size == 0 or end > len(data):
            break
        at = end
        if _ends_event(data[:at]):
            whole_size = at
    return data[:whole_size]
