"""What a request cost and what speculation did for it, in OpenAI's shape and vLLM's."""

from collections.abc import Iterable
from typing import Any

from specinfer.request import RequestOutput


def usage_of(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """OpenAI's usage object of requests that were made together."""
    outputs = list(outputs)
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_completion = sum(len(each.token_ids) for output in outputs for each in output.outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }
