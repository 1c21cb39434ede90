"""Text in and out: tokenizer, chat template, incremental detokeniser, stop strings."""

from specinfer.text.stream import IncrementalDetokenizer, StopStrings
from specinfer.text.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "StopStrings", "Tokenizer"]
