"""The package's own exceptions, and exceptions of others in words for people."""

from __future__ import annotations


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint is missing or not sound; the message names the file and what is wrong with it.

    It is a RuntimeError too, which `clip.load` raises for an unknown name.
    """

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


CLIPS_OWN = "clip_fast.accelerate(clip.load(…)[0]) has all of openai-clip's own model, made fast"


def no_attribute(owner: str, name: str) -> AttributeError:
    """The error for a name that a module or an object does not have, though openai-clip's may."""
    return AttributeError(f"{owner} has no attribute {name!r}: {CLIPS_OWN}")


class NotServed(ValueError):
    """The fast path does not serve a model; the message names the part that keeps it from that."""


class TooManyErrors(Exception):
    """More inputs failed than `--max-errors` allows."""


def summary(error: Exception) -> str:
    """An exception in one line, with its type."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def reason_of(error: Exception) -> str:
    """The reason for an exception in one line, for people: without the type and, of an OSError, without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def printable(text: str) -> str:
    """`text` on one line: control characters, line breaks and undecodable bytes as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
