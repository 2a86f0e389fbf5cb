"""Exact search in the folders that `clip-fast encode` writes."""

from .index import Hit, Index

__all__ = ["Hit", "Index"]
