"""Public names and nothing else; each is imported when first asked for: PyTorch takes seconds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specinfer.async_llm import AsyncLLM
    from specinfer.config import Speculation
    from specinfer.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DependencyError,
        LawError,
        ModelError,
        ModelNotFoundError,
        RequestError,
        SpecInferError,
        UnsupportedModelError,
    )
    from specinfer.llm import LLM
    from specinfer.outputs import CompletionOutput, Logprob, RequestOutput, RequestStats
    from specinfer.request import SamplingParams
    from specinfer.structured import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - plain alphabetical order
    "AsyncLLM",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "DependencyError",
    "LLM",
    "LawError",
    "Logprob",
    "ModelError",
    "ModelNotFoundError",
    "RequestError",
    "RequestOutput",
    "RequestStats",
    "SamplingParams",
    "SpecInferError",
    "Speculation",
    "StructuredOutputsParams",
    "UnsupportedModelError",
]

_MODULES = {
    "AsyncLLM": "async_llm",
    "CompletionOutput": "outputs",
    "LLM": "llm",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "RequestStats": "outputs",
    "SamplingParams": "request",
    "Speculation": "config",
    "StructuredOutputsParams": "structured",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'specinfer' has no attribute {name!r}")
    return getattr(import_module(f"specinfer.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
