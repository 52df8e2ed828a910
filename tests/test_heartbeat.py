"""The heartbeat between ranks that are objects of one process."""

import contextlib
import json
import os
import socket
import threading
import time

import pytest
from torch.distributed import HashStore

from quaver.comm import heartbeat as module
from quaver.comm.heartbeat import Heartbeat, RankFailure
from quaver.comm.peer import Peer


@pytest.fixture
def star():
    """Makes the heartbeats of `size` ranks; the first listens."""
    store, made = HashStore(), []

    def make(size, there=None):
        made.extend(Heartbeat(store, rank, size) for rank in range(there or size))
        return made

    make.store = store
    yield make
    for beat in made:
        beat.stop()


def await_failure(beat, seconds=10):
    end = time.monotonic() + seconds
    while beat.failure is None and time.monotonic() < end:
        time.sleep(0.01)
    return beat.failure and beat.failure.text


def gather(beats, timeout=10, padding=None):
    """The result or error of `gather` on every rank, of its number and `padding`."""
    found = [None] * len(beats)

    def run(i):
        try:
            found[i] = beats[i].gather({"rank": i, **(padding or {})}, timeout)
        except RankFailure as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(beats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_gather_gives_every_rank_all_values(star):
    assert gather(star(4)) == [[{"rank": r} for r in range(4)]] * 4


def test_gather_takes_more_than_a_socket_holds(star):
    padding = {"text": "x" * (4 << 20)}
    assert gather(star(3), padding=padding) == [[{"rank": r} | padding for r in range(3)]] * 3


def test_a_rank_that_does_not_arrive_is_named_on_all(star):
    found = gather(star(4, there=2), timeout=0.5)
    assert [str(error) for error in found] == ["ranks 2, 3 have not arrived within 0.5 s"] * 2


@pytest.mark.parametrize("culprit", [0, 2])
def test_an_error_of_one_rank_reaches_all_and_the_first_counts(star, culprit):
    beats, called = star(3), []
    for i, beat in enumerate(beats):
        beat.on_failure(lambda i=i: called.append(i))
    beats[culprit].report("no such file", usage=True)
    text = f"rank {culprit}: no such file"
    assert [await_failure(beat) for beat in beats] == [text] * 3
    beats[1].report("another")
    time.sleep(module.ABORT_DELAY + 2 * module.PERIOD)
    assert [(beat.failure.text, beat.failure.usage) for beat in beats] == [(text, True)] * 3
    assert sorted(called) == [0, 1, 2]
    with pytest.raises(RankFailure, match=text) as raised:
        beats[1].gather(0, 1)
    assert raised.value.usage


def test_an_error_reaches_a_rank_that_comes_later(star):
    first = star(2, there=1)[0]
    first.report("out of memory")
    await_failure(first)
    late = Heartbeat(star.store, 1, 2)
    assert await_failure(late) == "rank 0: out of memory"
    late.stop()


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_connection_that_closes_is_a_dead_rank(star, culprit, monkeypatch):
    beats = star(3)
    gather(beats)  # all are connected
    monkeypatch.setattr(beats[culprit], "_take", lambda *a: None)  # the dead do not speak
    for peer in list(beats[culprit]._silence):  # as the kernel does when a process ends
        peer.connection.shutdown(socket.SHUT_RDWR)
    others = [beat for beat in beats if beat.rank != culprit]
    assert [await_failure(beat) for beat in others] == [f"rank {culprit} has died"] * 2


def test_a_rank_that_ends_is_not_dead_but_explains_a_failed_message(star):
    beats = star(3)
    gather(beats)
    beats[1].stop()
    time.sleep(2 * module.PERIOD)
    for beat in (beats[0], beats[2]):
        assert beat.failure is None
        assert beat.reason().text == "rank 1 has ended"


def test_a_rank_without_a_beat_has_stopped(star, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 1.5)
    beats = star(3)
    gather(beats)
    monkeypatch.setattr(beats[1], "_beat", lambda: None)
    monkeypatch.setattr(beats[1], "_take", lambda *a: None)
    assert await_failure(beats[0]) == await_failure(beats[2]) == "rank 1 has not answered for 1.5 s"


@pytest.mark.parametrize(
    "sent", [b"{}\n", b'{"rank": 1, "token": "x"}\n', b"GET /\n\n", b"[1]\n", b""]
)
def test_a_stranger_is_turned_away(star, sent):
    beats = star(2)
    gather(beats)
    with socket.create_connection(beats[0]._listener.getsockname()) as stranger:
        stranger.sendall(sent)
        if not sent:
            stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1 << 10):
                pass
    time.sleep(2 * module.PERIOD)
    assert [beat.failure for beat in beats] == [None, None]


def test_a_store_serves_several_groups_in_turn(star):
    for _ in range(2):
        beats = [Heartbeat(star.store, rank, 2) for rank in range(2)]
        assert gather(beats) == [[{"rank": 0}, {"rank": 1}]] * 2
        for beat in beats:
            beat.stop()


def test_nothing_is_left_after_stop(star):
    def left():
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = left()
    beats = [Heartbeat(star.store, rank, 3) for rank in range(3)]
    gather(beats)
    beats[1].report("an error")
    for beat in beats[::-1]:
        beat.stop(farewell=5)
    assert left() == before


def test_a_line_may_arrive_in_parts():
    ours, theirs = socket.socketpair()
    peer, text = Peer(ours), json.dumps({"value": "é" * 1000}).encode() + b"\n"
    assert peer.receive() == []
    theirs.sendall(text[:700])
    assert peer.receive() == []
    theirs.sendall(text[700:] + b'{"rank": 2}\n')
    assert peer.receive() == [{"value": "é" * 1000}, {"rank": 2}]
    theirs.close()
    assert peer.receive() is None
    peer.close()
