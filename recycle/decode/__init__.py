"""Text from a family of adapters."""

from .text import DecodeError, generate_text

__all__ = ["DecodeError", "generate_text"]
