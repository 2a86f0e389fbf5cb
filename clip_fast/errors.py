"""What is wrong with a checkpoint, in an exception that names it."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be had or is not sound; the message names the file and what is wrong with it."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


def summary(error: Exception) -> str:
    """Another exception in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
