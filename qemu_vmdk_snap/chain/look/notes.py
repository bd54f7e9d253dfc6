"""What was found wrong and could be read all the same, from whoever reads to whoever listens.

Some of it is known when an image is opened, some only after its tables or grains have been read, and the operation that
opened the image is the one that closes it. So a link says its notes when it is closed, and the command hears of them
whatever operation it called. The same note may be said several times: an operation may open an image more than once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Final

Listener = Callable[[str], object]

_LISTENER: Final[ContextVar[Listener | None]] = ContextVar("listener", default=None)


def say(notes: Iterable[str]) -> None:
    """Hand `notes`, one line each, to the listener; without one they are dropped."""
    listener = _LISTENER.get()
    if listener is not None:
        for note in notes:
            listener(note)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Hand each note that is said inside the block, in this thread, to `listener`."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
