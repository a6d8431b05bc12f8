"""What a process knows of its world before it meets the others."""

from __future__ import annotations

import random
import socket

from pipeline.world import free_port


def test_a_port_that_another_listens_on_is_not_given(monkeypatch):
    with socket.socket() as other:
        while True:
            taken = random.randrange(20000, 32000)
            try:
                other.bind(("127.0.0.1", taken))
                break
            except OSError:
                continue
        other.listen()
        given = iter([taken, taken, 0])
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda *_: next(given))
        assert free_port() == 0, "the system finds a free one for 0"
