"""Streams, events and captures: what is queued where, and whether something orders two uses of the same memory.

Work is done at once, in the order it is given, which any device may do. What is checked is whether another order was
possible: memory that one stream writes and another uses needs an event between them, or the null stream, for which
streams wait that were not made non-blocking. A stream that is captured notes its work; the graph does it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from tests.ptx.text import PtxError

Work = Callable[[], tuple[list[Any], list[Any]]]
"""Does something, and gives the allocations that it read and those that it wrote."""


class StreamError(PtxError):
    """What streams must not be used for."""


class Graph:
    """What was captured."""

    def __init__(self, streams: Streams, work: list[Work]) -> None:
        self._streams, self.work = streams, work

    def launch(self, stream: Any = None) -> None:
        """All of it again, in order."""
        for step in self.work:
            self._streams.submit(step, stream)


class Event:
    """As `cupy.cuda.Event`."""

    def __init__(self, *_: object, **__: object) -> None:
        self.knows: dict[int, int] = {}

    def record(self, stream: Any = None) -> None:
        stream.record(self)

    def synchronize(self) -> None:
        """All is done when it is given."""


class Streams:
    """The null stream and those that were made."""

    def __init__(self) -> None:
        streams, numbers = self, itertools.count(1)

        class Stream:
            """As `cupy.cuda.Stream`."""

            def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False, **_: object) -> None:
                self.ptr = 0 if null else next(numbers)
                self.non_blocking, self.captured = non_blocking, None
                self.time, self.knows = 0, {}
                self.before: list[Any] = []
                streams.known[self.ptr] = self

            def __enter__(self) -> Any:
                self.before.append(streams.current)
                streams.current = self
                return self

            def __exit__(self, *_: object) -> None:
                streams.current = self.before.pop()

            def use(self) -> Any:
                streams.current = self
                return self

            def record(self, event: Event | None = None) -> Event:
                event = Event() if event is None else event
                event.knows = {**self.knows, self.ptr: self.time}
                return event

            def wait_event(self, event: Event) -> None:
                streams.learn(self, event.knows)

            def synchronize(self) -> None:
                if self.captured is not None:
                    raise StreamError("a stream is waited for while it is captured")

            @property
            def done(self) -> bool:
                return True

            def begin_capture(self, mode: Any = None) -> None:
                if self.ptr == 0:
                    raise StreamError("the null stream cannot be captured")
                streams.begin(self)

            def end_capture(self) -> Graph:
                return streams.end(self)

        self.known: dict[int, Any] = {}
        self.Stream, self.Event = Stream, Event
        self.null = Stream(null=True)
        Stream.null = self.null
        self.current = self.null
        self._written: dict[Any, tuple[int, int]] = {}
        self._read: dict[Any, dict[int, int]] = {}

    def number(self, stream: Any) -> int:
        """Of a stream, its number or None, which is the current one."""
        return int(getattr(stream, "ptr", self.current.ptr if stream is None else stream))

    @staticmethod
    def learn(stream: Any, knows: dict[int, int]) -> None:
        """What the stream does from now on comes after these times of others."""
        for other, time in knows.items():
            stream.knows[other] = max(stream.knows.get(other, 0), time)

    def submit(self, work: Work, stream: Any = None) -> None:
        """Do something on a stream, or note it."""
        here = self.known[self.number(stream)]
        if here.captured is not None:
            here.captured.append(work)
            return
        if here.ptr == 0 and any(s.captured is not None and not s.non_blocking for s in self.known.values()):
            raise StreamError("the null stream is used while a stream is captured that waits for it")
        for other in self.known.values():
            if other is not here and 0 in (here.ptr, other.ptr) and not (here.non_blocking or other.non_blocking):
                self.learn(here, {other.ptr: other.time})
        here.time += 1
        read, written = work()
        for allocation in (*read, *written):
            self._check(here, allocation, *self._written.get(allocation, (here.ptr, 0)), "written")
        for allocation in written:
            for other, time in self._read.get(allocation, {}).items():
                self._check(here, allocation, other, time, "read")
            self._written[allocation], self._read[allocation] = (here.ptr, here.time), {}
        for allocation in read:
            self._read.setdefault(allocation, {})[here.ptr] = here.time

    @staticmethod
    def _check(here: Any, allocation: Any, other: int, time: int, how: str) -> None:
        if other != here.ptr and here.knows.get(other, 0) < time:
            size = allocation.high - allocation.low
            raise StreamError(
                f"stream {here.ptr} uses {size} bytes at {allocation.low:#x} that stream {other} has {how}, "
                "and no event orders them"
            )

    # --- captures -----------------------------------------------------------------------------------------------------

    def begin(self, stream: Any) -> None:
        """Note what is given to a stream from now on."""
        from tests.simt import host_cupy

        if stream.captured is not None:
            raise StreamError("a stream is captured twice")
        stream.captured, self._operations = [], sum(host_cupy.operations.values())

    def end(self, stream: Any) -> Graph:
        """The graph of what was noted."""
        from tests.simt import host_cupy

        if stream.captured is None:
            raise StreamError("a capture ends that did not begin")
        work, stream.captured = stream.captured, None
        if done := sum(host_cupy.operations.values()) - self._operations:
            raise StreamError(f"{done} operations of CuPy ran while a stream was captured: they are in no graph here")
        return Graph(self, work)

    def wait_for_device(self, *_: object) -> None:
        """cudaDeviceSynchronize."""
        if any(stream.captured is not None for stream in self.known.values()):
            raise StreamError("the device is waited for while a stream is captured")
