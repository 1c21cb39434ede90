"""What a request cost and what speculation did for it, in OpenAI's shape and vLLM's."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from specinfer.outputs import RequestOutput, RequestStats


def usage_of(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """OpenAI's usage object, of prompts that came in one request.

    The two counts of predictions are of the request's own `prediction`, as OpenAI has them: how
    many of its tokens came, and how many did not. What drafters did is in `metrics_of`.
    """
    outputs = list(outputs)
    stats = _sum(outputs)
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_completion = sum(len(each.token_ids) for output in outputs for each in output.outputs)
    accepted = stats.num_predicted_accepted
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(output.stats.num_cached_tokens for output in outputs)
        },
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": stats.num_predicted - accepted,
        },
    }


def metrics_of(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """vLLM's block: what speculation did for these requests.

    mean_acceptance_length  tokens per step that had a tree; 1.0 of none
    acceptance_histogram    entry j: steps with a tree that accepted exactly j drafted tokens
    """
    stats = _sum(outputs)
    reached = [stats.num_drafts, *stats.accepted_by_depth, 0]
    drafts, drafted = max(1, stats.num_drafts), max(1, stats.num_drafted)
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1 + stats.num_accepted / drafts,
            "draft_acceptance_rate": stats.num_accepted / drafted,
            "acceptance_histogram": [here - further for here, further in pairwise(reached)],
            "num_spec_steps": stats.num_drafts,
            "num_accepted_draft_tokens": stats.num_accepted,
            "num_draft_tokens": stats.num_drafted,
            "tokens_per_step": stats.tokens_per_step,
            "accepted_by_source": stats.accepted_by_source,
        }
    }


def _sum(outputs: Iterable[RequestOutput]) -> RequestStats:
    stats = RequestStats()
    for output in outputs:
        stats.add(output.stats)
    return stats
