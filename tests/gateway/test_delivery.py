"""The table of a request's delivery: what every cell says, and that all others change nothing.

No process, no socket and no clock: the gate, the client's side and the connection only note what they are asked.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.gateway.counts import Counts
from supervisor.gateway.delivery import BROKEN_OFF, KEEP_LIMIT, LOST_TWICE, TABLE, Delivery, Event, State
from supervisor.gateway.errors import Refusal, UpstreamError
from supervisor.gateway.http1 import KnownAnswer, Request, ResponseHead
from supervisor.gateway.upstream import Disconnected, NotConnected, Unanswered

S, E = State, Event
HEAD = b"POST /v1/completions HTTP/1.1\r\n\r\n"
TOO_LATE = Refusal(504, "Too late.", "request_timeout")


def head(status: int, *, length: int | None = None) -> ResponseHead:
    framing = (b"transfer-encoding", b"chunked") if length is None else (b"content-length", b"%d" % length)
    return ResponseHead(status, b"Reason", [framing])


class Connection:
    def __init__(self, calls: list[str], *, reused: bool = False) -> None:
        self.calls = calls
        self.reused = reused
        self.transport = SimpleNamespace(write=self._write)
        self.written = b""
        self.request_sent = False
        self.response_paused = False
        self.receiver: object = None

    def _write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.calls.append("abort")

    def pause_response(self) -> None:
        self.response_paused = True

    def resume_response(self) -> None:
        self.response_paused = False


class Scene:
    """A delivery, and what it calls, in order."""

    def __init__(self, *, is_head: bool = False) -> None:
        self.calls: list[str] = []
        self.engine = SimpleNamespace(ready=True, is_closed=False, state="starting", explanation="The engine loads.")
        self.counts = Counts()
        self.generation, self.open = 7, True
        self.loop = SimpleNamespace(time=lambda: 1.0)
        self.upstream = SimpleNamespace(send=self._sent)
        self.log_extra = {"request": "r"}
        self.held_for = ""
        self.body: list[tuple[bytes, bool]] = []  # as the client's side got it
        request = Request(b"HEAD" if is_head else b"POST", b"/v1/completions", b"/v1/completions", [])
        self.request, self.gate, self.private = request, self, False
        self.delivery = Delivery(self, HEAD)  # type: ignore[arg-type]

    @property
    def door(self) -> Scene:
        return self

    def __contains__(self, one: object) -> bool:
        return "hold" in self.calls

    # The gate

    def _sent(self, delivery: Delivery, *, fresh: bool) -> None:
        assert delivery is self.delivery
        self.calls.append("send afresh" if fresh else "send")

    def admit(self, delivery: Delivery) -> None:
        self.calls.append("admit")

    def hold(self, delivery: Delivery) -> None:
        self.calls.append("hold")

    def resume(self, delivery: Delivery) -> None:
        self.calls.append("resume")

    def forget(self, delivery: Delivery) -> None:
        self.calls.append("forget")

    def leave(self, delivery: Delivery) -> None:
        self.calls.append("leave")

    def ask(self, delivery: Delivery) -> None:
        self.calls.append("ask")

    def unavailable_refusal(self) -> Refusal:
        return Refusal(503, self.engine.explanation, "engine_unavailable")

    # The client's side

    def request_held(self, state: str) -> None:
        self.held_for = state

    def interim_received(self, head: ResponseHead) -> None:
        self.calls.append(f"interim {head.status}")

    def answer_begun(self, head: ResponseHead) -> None:
        self.calls.append(f"answer {head.status}")

    def answer_received(self, known: KnownAnswer, digits: bytes, body: bytes) -> None:
        self.calls.append(f"whole {known.status}")

    def websocket_opened(self, head: ResponseHead, data: bytes) -> None:
        self.calls.append("switched")

    def request_refused(self, refusal: Refusal) -> None:
        self.refusal = refusal
        self.calls.append(f"refused {refusal.status}")

    def body_received(self, data: bytes, in_chunk: bool) -> None:
        self.body.append((data, in_chunk))

    def answer_ended(self) -> None:
        self.calls.append("ended")

    def pause_request(self) -> None:
        self.calls.append("pause")

    def resume_request(self) -> None:
        self.calls.append("go on")

    # What happens

    def connects(self, *, reused: bool = False) -> Connection:
        connection = Connection(self.calls, reused=reused)
        self.delivery.connected(connection)  # type: ignore[arg-type]
        return connection

    def is_in(self, state: State) -> Scene:
        """The way there; what was called on it is forgotten."""
        delivery = self.delivery
        if state is not S.WAITING:
            delivery.end()
            delivery.go()
        if state not in (S.WAITING, S.UNSENT):
            self.connects()
        match state:
            case S.DOUBTED:
                delivery.head_received(head(500))
            case S.UNSENT:
                delivery.answer_lost(NotConnected("nobody listens"))
            case S.LOST:
                delivery.answer_lost(Disconnected("closed"))
            case S.OVER:
                delivery.head_received(head(200))
        assert delivery.state is state
        self.calls.clear()
        return self

    def happens(self, event: Event) -> None:
        """As it does: by whoever tells it."""
        delivery = self.delivery
        match event:
            case E.GO:
                delivery.go()
            case E.ANSWER:
                delivery.head_received(head(200))
            case E.ERROR:
                delivery.head_received(head(503))
            case E.STALE:
                delivery.connection = Connection(self.calls, reused=True)  # type: ignore[assignment]
                delivery.answer_lost(Unanswered("closed"))
            case E.UNCONNECTED:
                delivery.answer_lost(NotConnected("nobody listens"))
            case E.BROKEN:
                delivery.answer_lost(Disconnected("closed"))
            case E.GONE:
                delivery.answer_lost(UpstreamError("no HTTP"))
            case E.ALIVE | E.DEAD:
                delivery.engine_judged(alive=event is E.ALIVE)
            case E.REFUSE:
                delivery.refuse(TOO_LATE)


# The next state, and what is called, while the engine is ready as far as anybody knows.
CELLS: dict[tuple[State, Event], tuple[State, list[str]]] = {
    (S.WAITING, E.GO): (S.SENT, ["send"]),
    (S.WAITING, E.REFUSE): (S.OVER, ["leave", "refused 504"]),
    (S.SENT, E.ANSWER): (S.OVER, ["answer 200"]),
    (S.SENT, E.ERROR): (S.DOUBTED, ["ask"]),
    (S.SENT, E.STALE): (S.SENT, ["send afresh"]),
    (S.SENT, E.UNCONNECTED): (S.UNSENT, ["hold", "ask"]),
    (S.SENT, E.BROKEN): (S.LOST, ["hold", "ask"]),
    (S.SENT, E.GONE): (S.OVER, ["leave", "refused 502"]),
    (S.SENT, E.REFUSE): (S.OVER, ["abort", "leave", "refused 504"]),
    (S.DOUBTED, E.ALIVE): (S.OVER, ["answer 500"]),
    (S.DOUBTED, E.DEAD): (S.WAITING, ["abort", "resume"]),
    (S.DOUBTED, E.BROKEN): (S.LOST, ["hold", "ask"]),
    (S.DOUBTED, E.GONE): (S.OVER, ["leave", "refused 502"]),
    (S.DOUBTED, E.REFUSE): (S.OVER, ["abort", "leave", "refused 504"]),
    (S.UNSENT, E.GO): (S.SENT, ["send afresh"]),
    (S.UNSENT, E.ALIVE): (S.SENT, ["forget", "send afresh"]),
    (S.UNSENT, E.REFUSE): (S.OVER, ["leave", "refused 504"]),
    (S.LOST, E.GO): (S.SENT, ["send afresh"]),
    (S.LOST, E.ALIVE): (S.OVER, ["leave", "refused 502"]),
    (S.LOST, E.REFUSE): (S.OVER, ["leave", "refused 504"]),
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)), ids=lambda value: value.name)
def test_every_cell_does_what_its_row_says_and_all_others_nothing(state: State, event: Event) -> None:
    scene = Scene().is_in(state)
    scene.happens(event)
    assert (scene.delivery.state, scene.calls) == CELLS.get((state, event), (state, []))


def test_the_table_has_these_cells_and_no_others() -> None:
    assert {cell: row[0] for cell, row in TABLE.items()} == {cell: row[0] for cell, row in CELLS.items()}


# How a loss is told

ANY = None
KINDS: tuple[type[UpstreamError], ...] = (NotConnected, Unanswered, Disconnected, UpstreamError)
# The first row that fits: kind, kept, replayed, sent again on a fresh connection, reused, same engine; and the event.
LOSSES: list[
    tuple[tuple[type[UpstreamError], ...], bool | None, bool | None, bool | None, bool | None, bool | None, Event]
]
LOSSES = [
    ((NotConnected,), ANY, ANY, ANY, ANY, ANY, E.UNCONNECTED),  # nothing was sent, so nothing is lost
    (KINDS, False, ANY, ANY, ANY, ANY, E.GONE),
    ((UpstreamError,), ANY, ANY, ANY, ANY, ANY, E.GONE),  # what came was no HTTP: it would come again
    ((Unanswered,), True, ANY, False, True, True, E.STALE),
    (KINDS, True, True, ANY, ANY, ANY, E.GONE),
    (KINDS, True, False, ANY, ANY, ANY, E.BROKEN),
]  # fmt: skip
# By which an event shows.
SHOWS = {S.UNSENT: E.UNCONNECTED, S.LOST: E.BROKEN, S.OVER: E.GONE, S.SENT: E.STALE}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kept", "replayed", "resent", "reused", "same_engine"), list(itertools.product((True, False), repeat=5))
)
def test_what_a_loss_is(
    kind: type[UpstreamError], kept: bool, replayed: bool, resent: bool, reused: bool, same_engine: bool
) -> None:
    flags = (kept, replayed, resent, reused, same_engine)
    expected = next(
        row[-1]
        for row in LOSSES
        if kind in row[0] and all(asked in (ANY, flag) for asked, flag in zip(row[1:-1], flags, strict=True))
    )
    scene = Scene()
    delivery = scene.delivery
    delivery.go()
    if kind is not NotConnected:
        scene.connects(reused=reused)
    if not kept:
        delivery.write(b"x" * (KEEP_LIMIT + 1))
        delivery.kept = None  # where nothing is connected yet it is kept all the same
    delivery.replayed, delivery.resent = replayed, resent
    if not same_engine:
        scene.generation += 1
    delivery.answer_lost(kind("lost"))
    assert SHOWS[delivery.state] is expected


# Which of two answers a client gets when vLLM gives none


@pytest.mark.parametrize("event", [E.BROKEN, E.UNCONNECTED])
def test_what_is_lost_to_an_engine_that_is_over_is_refused(event: Event) -> None:
    scene = Scene().is_in(S.SENT)
    scene.engine.is_closed, scene.engine.ready, scene.open = True, False, False
    scene.happens(event)
    assert scene.delivery.state is S.OVER
    assert scene.calls[-1] == "refused 503"
    assert scene.refusal.code == "engine_unavailable"
    assert scene.counts.replayed == 0


@pytest.mark.parametrize(("event", "state"), [(E.BROKEN, S.LOST), (E.UNCONNECTED, S.UNSENT)])
def test_of_an_engine_whose_death_is_known_nobody_asks(event: Event, state: State) -> None:
    scene = Scene().is_in(S.SENT)
    scene.engine.ready, scene.open = False, False
    scene.happens(event)
    assert (scene.delivery.state, scene.calls[-1]) == (state, "hold")


@pytest.mark.parametrize(
    ("ready", "status", "code"), [(True, 502, "engine_no_answer"), (False, 503, "engine_unavailable")]
)
def test_what_can_not_be_sent_again_is_told_by_what_is_known_of_the_engine(ready: bool, status: int, code: str) -> None:
    scene = Scene().is_in(S.SENT)
    scene.engine.ready = ready
    scene.happens(E.GONE)
    assert (scene.refusal.status, scene.refusal.code) == (status, code)


@pytest.mark.parametrize("ready", [True, False])
def test_one_that_was_sent_again_is_not_invited_a_third_time(ready: bool) -> None:
    scene = Scene().is_in(S.SENT)
    scene.delivery.replayed = True
    scene.engine.ready = ready
    scene.happens(E.GONE)
    assert scene.refusal.retry_after is None
    assert ("for the second time" if ready else "stopped twice") in scene.refusal.message


def test_a_doubted_answer_that_is_kept_is_replaced_once() -> None:
    scene = Scene().is_in(S.DOUBTED)
    scene.delivery.engine_judged(alive=False)
    assert (scene.delivery.replayed, scene.counts.replayed) == (False, 0)
    scene.delivery.go()
    scene.connects()
    assert (scene.delivery.replayed, scene.counts.replayed) == (True, 1)
    scene.delivery.head_received(head(500))
    scene.delivery.engine_judged(alive=False)
    assert scene.delivery.state is S.OVER
    assert scene.refusal is LOST_TWICE
    assert scene.counts.replayed == 1


def test_a_doubted_answer_whose_request_is_not_kept_is_refused() -> None:
    scene = Scene()
    scene.delivery.go()
    scene.connects()
    scene.delivery.write(b"x" * (KEEP_LIMIT + 1))
    scene.delivery.head_received(head(500))
    scene.delivery.engine_judged(alive=False)
    assert scene.delivery.state is S.OVER
    assert scene.refusal is BROKEN_OFF


def test_an_idle_connection_that_was_closed_is_no_replay() -> None:
    scene = Scene()
    scene.delivery.go()
    scene.connects(reused=True)
    scene.delivery.answer_lost(Unanswered("closed"))
    assert (scene.delivery.resent, scene.delivery.replayed, scene.counts.replayed) == (True, False, 0)
    # The second time on a reused one can't be: it was to be a fresh one. If it were, the engine is asked.
    scene.connects(reused=True)
    scene.delivery.answer_lost(Unanswered("closed"))
    assert scene.delivery.state is S.LOST


def test_what_was_lost_and_given_up_was_not_sent_again() -> None:
    scene = Scene().is_in(S.LOST)
    scene.delivery.engine_judged(alive=True)
    assert scene.calls[-1] == "refused 502"
    assert (scene.delivery.replayed, scene.counts.replayed) == (False, 0)


def test_what_was_lost_and_sent_again_is_counted_once() -> None:
    scene = Scene().is_in(S.LOST)
    scene.delivery.go()
    scene.connects()
    scene.delivery.head_received(head(200))
    assert (scene.delivery.replayed, scene.counts.replayed) == (True, 1)


# Bodies


def test_a_request_is_written_in_order_whatever_comes_first() -> None:
    scene = Scene()
    delivery = scene.delivery
    delivery.write(b"a")
    delivery.go()
    delivery.write(b"b")
    connection = scene.connects()
    delivery.write(b"c")
    assert connection.written == HEAD + b"abc"
    assert not connection.request_sent
    delivery.end()
    assert connection.request_sent


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_body_of_the_limit_is_sent_again_whole(pieces: int) -> None:
    scene = Scene()
    body = b"0123456789abcdef" * (KEEP_LIMIT // 16)
    scene.delivery.go()
    scene.connects()
    step = -(-len(body) // pieces)
    for at in range(0, len(body), step):
        scene.delivery.write(body[at : at + step])
    scene.delivery.end()
    scene.delivery.answer_lost(Disconnected("closed"))
    assert scene.delivery.state is S.LOST
    scene.delivery.go()
    again = scene.connects()
    assert again.written == HEAD + body
    assert again.request_sent


def test_a_larger_body_is_not_kept_and_not_sent_again() -> None:
    scene = Scene()
    scene.delivery.go()
    connection = scene.connects()
    scene.delivery.write(b"x" * KEEP_LIMIT)
    scene.delivery.write(b"y")
    assert len(connection.written) == len(HEAD) + KEEP_LIMIT + 1
    assert scene.delivery.request_bytes == b""
    scene.delivery.answer_lost(Disconnected("closed"))
    assert scene.calls[-1] == "refused 502"


def test_a_body_that_waits_is_asked_for_when_there_is_somebody_to_take_it() -> None:
    scene = Scene()
    scene.delivery.write(b"x" * 70_000)
    assert scene.calls == ["pause"]
    scene.delivery.go()
    scene.connects()
    assert scene.calls == ["pause", "send", "go on"]


def test_once_an_answer_has_begun_the_request_is_forgotten() -> None:
    scene = Scene()
    scene.delivery.go()
    connection = scene.connects()
    scene.delivery.head_received(head(200))
    assert scene.delivery.request_bytes == b""
    assert connection.receiver is scene
    scene.delivery.write(b"rest")  # an early answer: the body goes on
    assert connection.written == HEAD + b"rest"


# Answers


def test_the_head_of_a_whole_answer_waits_for_its_body() -> None:
    scene = Scene().is_in(S.SENT)
    scene.delivery.head_received(head(200, length=4))
    assert (scene.delivery.state, scene.calls) == (S.SENT, [])
    scene.delivery.body_received(b"ab", in_chunk=False)
    assert (scene.delivery.state, scene.calls, scene.body) == (S.OVER, ["answer 200"], [(b"ab", False)])


def test_an_answer_without_a_body_begins_with_its_end() -> None:
    scene = Scene().is_in(S.SENT)
    scene.delivery.head_received(head(200, length=0))
    scene.delivery.answer_ended()
    assert (scene.delivery.state, scene.calls) == (S.OVER, ["answer 200", "ended"])


def test_an_answer_to_head_waits_for_nothing() -> None:
    scene = Scene(is_head=True).is_in(S.SENT)
    scene.delivery.head_received(head(200, length=4))
    assert scene.calls == ["answer 200"]


def test_a_head_whose_body_was_lost_is_not_shown() -> None:
    scene = Scene().is_in(S.SENT)
    scene.delivery.head_received(head(200, length=4))
    scene.delivery.answer_lost(Disconnected("closed"))
    assert scene.delivery.state is S.LOST
    scene.delivery.go()
    scene.connects()
    scene.delivery.body_received(b"ab", in_chunk=False)  # of no answer: none has begun
    assert scene.body == []


def test_an_error_that_is_believed_passes_as_it_came() -> None:
    scene = Scene().is_in(S.SENT)
    scene.delivery.head_received(head(500))
    scene.delivery.body_received(b"3\r\nab", in_chunk=True)
    scene.delivery.body_received(b"c\r\n0\r\n\r\n", in_chunk=False)
    scene.delivery.answer_ended()
    assert scene.calls == ["ask"]
    scene.delivery.engine_judged(alive=True)
    assert scene.calls == ["ask", "answer 500", "ended"]
    assert scene.body == [(b"3\r\nab", True), (b"c\r\n0\r\n\r\n", False)]


def test_of_an_error_that_is_not_believed_nothing_is_left() -> None:
    scene = Scene().is_in(S.SENT)
    scene.delivery.head_received(head(500))
    scene.delivery.body_received(b"0\r\n\r\n", in_chunk=False)
    scene.delivery.answer_ended()
    scene.delivery.engine_judged(alive=False)
    assert scene.calls == ["ask", "resume"]  # its connection was done with: there is nothing to abort
    scene.delivery.go()
    scene.connects()
    scene.delivery.head_received(head(500))
    scene.delivery.engine_judged(alive=True)
    assert scene.calls[-1] == "answer 500"  # and not its end, which has not come
    assert scene.body == []


def test_interim_answers_pass_and_change_nothing() -> None:
    scene = Scene().is_in(S.SENT)
    scene.delivery.head_received(head(103, length=0))
    assert (scene.delivery.state, scene.calls) == (S.SENT, ["interim 103"])


@pytest.mark.parametrize("status", [200, 400, 404, 429, 499, 501, 502, 504])
def test_only_what_a_dying_engine_says_is_doubted(status: int) -> None:
    scene = Scene().is_in(S.SENT)
    scene.delivery.head_received(head(status))
    assert scene.calls == [f"answer {status}"]


def test_a_known_answer_is_one_call_and_the_end() -> None:
    scene = Scene().is_in(S.SENT)
    scene.delivery.answer_received(KnownAnswer(head(200, length=2)), b"2", b"ok")
    assert (scene.delivery.state, scene.delivery.connection, scene.calls) == (S.OVER, None, ["whole 200"])


def test_a_websocket_is_the_clients_once_it_is_open() -> None:
    scene = Scene()
    scene.delivery.go()
    connection = scene.connects()
    scene.delivery.websocket_opened(head(101, length=0), b"frame")
    assert (scene.delivery.state, scene.calls[-1], connection.receiver) == (S.OVER, "switched", scene)


# Its end


@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_an_abort_leaves_the_gate_and_the_connection_once(state: State) -> None:
    scene = Scene().is_in(state)
    connected = scene.delivery.connection is not None
    scene.delivery.abort()
    assert scene.delivery.state is S.OVER
    assert scene.calls == [*["abort"] * connected, "leave"]
    assert scene.delivery.connection is None
    scene.calls.clear()
    for event in Event:
        scene.happens(event)
        assert (scene.delivery.state, scene.calls) == (S.OVER, []), event


@pytest.mark.parametrize("state", [state for state in State if state is not S.SENT], ids=lambda state: state.name)
def test_a_connection_that_nobody_wants_any_more_is_closed(state: State) -> None:
    scene = Scene().is_in(state)
    before: Any = scene.delivery.connection
    scene.connects()
    assert scene.calls == ["abort"]
    assert scene.delivery.connection is before


def test_backpressure_reaches_the_connection_that_there_is() -> None:
    scene = Scene()
    scene.delivery.pause()
    scene.delivery.end()
    scene.delivery.go()
    assert not scene.delivery.is_working
    connection = scene.connects()
    assert connection.response_paused
    assert not scene.delivery.is_working
    scene.delivery.resume()
    assert scene.delivery.is_working


@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_it_waits_only_while_the_gate_has_it(state: State) -> None:
    scene = Scene().is_in(state)
    assert not scene.delivery.is_waiting
    scene.calls.append("hold")
    assert scene.delivery.is_waiting == (state in (S.WAITING, S.UNSENT, S.LOST))


def test_the_marks_tell_what_it_waited_for() -> None:
    scene = Scene().is_in(S.LOST)
    scene.delivery.mark("held")  # as the gate does
    scene.delivery.go()
    assert [what for what, _ in scene.delivery.marks] == ["lost", "held", "sent"]
    assert scene.held_for == "starting"
    undisturbed = Scene().is_in(S.SENT)
    assert undisturbed.delivery.marks == ()
    assert undisturbed.delivery.was_sent
