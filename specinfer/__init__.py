"""Public names and nothing else, each imported when first asked for: PyTorch takes seconds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specinfer.async_llm import AsyncLLM
    from specinfer.config import Speculation
    from specinfer.errors import SpecInferError
    from specinfer.llm import LLM
    from specinfer.request import CompletionOutput, RequestOutput, SamplingParams

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "CompletionOutput": "request",
    "RequestOutput": "request",
    "SamplingParams": "request",
    "SpecInferError": "errors",
    "Speculation": "config",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "SpecInferError",
    "Speculation",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'specinfer' has no attribute {name!r}")
    return getattr(import_module(f"specinfer.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
