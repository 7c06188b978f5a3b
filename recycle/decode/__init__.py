"""Text from a family of adapters."""

from .text import generate_text

__all__ = ["generate_text"]
