"""Work side by side in threads, with results in order: torch computes without Python's lock."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

import torch

Tool, Item, Result = TypeVar("Tool"), TypeVar("Item"), TypeVar("Result")
NOTICED = 0.5  # seconds; a wait without end misses an interrupt that comes just as it begins


def result_of(future: Future[Result]) -> Result:
    """Return the result of a future, awake often enough to notice an interrupt."""
    while not future.done():
        wait([future], NOTICED)
    return future.result()


class Shared(Generic[Tool]):
    """Tools, such as model replicas, that threads share: whoever works borrows one that is free."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools, self.stopped = list(tools), threading.Event()  # set where one is interrupted
        self.free: queue.SimpleQueue[Tool] = queue.SimpleQueue()
        for tool in tools:
            self.free.put(tool)

    def each(
        self, task: Callable[[Item, Tool], Result], items: Iterable[Item], threads: int = 0
    ) -> Iterator[Result]:
        """Yield task(item, tool) for each item, in the order given, with all tools side by side.

        A worker has as many `threads` of torch, or as its caller; then with one tool the caller
        works itself. However slow the first item is, no more than two for each tool are ahead.
        """

        def work(item: Item) -> Result:
            """Borrow a tool."""
            tool = self.free.get()
            try:
                return task(item, tool)
            finally:
                self.free.put(tool)

        count, ahead = len(self.tools), deque()
        if count == 1 and not threads:
            yield from map(work, items)
            return
        own = (threads or torch.get_num_threads(),)
        with ThreadPoolExecutor(count, "worker", torch.set_num_threads, own) as pool:
            try:
                for item in items:
                    ahead.append(pool.submit(work, item))
                    if len(ahead) > 2 * count:
                        yield result_of(ahead.popleft())
                while ahead:
                    yield result_of(ahead.popleft())
            except KeyboardInterrupt:
                self.stopped.set()
                raise
            finally:
                for future in ahead:
                    future.cancel()
