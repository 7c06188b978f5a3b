"""Text from a family of adapters."""

from .text import DecodeError, generate_text
