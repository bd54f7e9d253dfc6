"""Notes on faults that do not prevent reading, passed from the reader of an image to a listener.

Some of it is known when an image is opened, some only after its tables or grains have been read, and the operation that
opened the image is the one that closes it. So a link reports its notes when it is closed, and the command gets them
whatever operation it called. A note may be reported several times: an operation may open an image more than once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar

from qemu_vmdk_snap.light import Final

Listener = Callable[[str], object]

_LISTENER: Final[ContextVar[Listener | None]] = ContextVar("listener", default=None)


def say(notes: Iterable[str]) -> None:
    """Pass `notes`, one line each, to the listener; without one they are dropped."""
    listener = _LISTENER.get()
    if listener is not None:
        for note in notes:
            listener(note)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Pass each note that is reported inside the block, in this thread, to `listener`."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
