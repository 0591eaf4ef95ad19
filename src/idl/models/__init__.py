"""Explicit models that implicit parts are put into."""

from idl.models.gpt import GPTLanguageModel

__all__ = ["GPTLanguageModel"]
