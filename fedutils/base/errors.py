"""What is raised where somebody can do something about it."""

from collections.abc import Callable, Iterable
from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used: the message says what was found and what to do."""

    status = 2  # of the command line, which prints the message as one line


def each(work: Callable[[Any], Any], things: Iterable[Any]) -> list[Any]:
    """Work on each of several things; one InputError tells what is wrong with any of them."""
    done, wrong = [], []
    for thing in things:
        try:
            done.append(work(thing))
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("; and ".join(wrong))
    return done


class SumFailed(RuntimeError):
    """What clients sent could not be put together: the message says why."""


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error: the message names notebook, cell and error."""

    status = 1


def in_a_line(error: Exception) -> str:
    """Write an error as the history has it."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")
