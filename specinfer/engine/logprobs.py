"""Log-probabilities of what was emitted and of prompts: the model's own, before any filter."""

from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from specinfer.engine.work import Work
from specinfer.ops.transfer import to_host
from specinfer.outputs import Logprob, Logprobs
from specinfer.text.tokenizer import Tokenizer
from specinfer.verify import Verdict


def take_prompt_rows(works: ListLike[Work], logits: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Note what prompts' tokens are worth; returns the rows of the trees' nodes alone.

    logits  [rows, vocab], per work its prompt's rows, then those of its nodes
    """
    if not any(work.num_prompt_logits for work in works):
        return logits
    kept, start = [], 0
    for work in works:
        middle = start + work.num_prompt_logits
        if middle > start:
            _note_prompt(work, logits[start:middle], tokenizer)
        start = middle + work.num_logits
        kept.append(logits[middle:start])
    return torch.cat(kept)


def emitted_logprobs(
    works: ListLike[Work], verdicts: ListLike[Verdict], logits: Tensor, tokenizer: Tokenizer
) -> dict[int, list[Logprobs]]:
    """Per number of a sequence that is asked for them, one entry per token of its verdict.

    logits  [rows, vocab], the works' nodes one after the other
    """
    noted, start = {}, 0
    for work, verdict in zip(works, verdicts, strict=True):
        sequence, tree = work.job.sequence, work.tree
        if sequence.params.logprobs is not None:
            rows = [start + node for node in (0, *verdict.path)]
            tokens = [*(tree.tokens[node] for node in verdict.path), verdict.next_token]
            noted[sequence.number] = logprobs_of(
                logits[rows], tokens, sequence.params.logprobs, tokenizer
            )
        start += len(tree)
    return noted


def logprobs_of(
    logits: Tensor, tokens: ListLike[int], num_top: int, tokenizer: Tokenizer
) -> list[Logprobs]:
    """How likely tokens were, and which were the likeliest in their places.

    logits   [rows, vocab]; tokens [rows]
    num_top  of the likeliest tokens; -1: all
    returns  per row, as vLLM has it: the token itself, then the likeliest by rank
    """
    laws = torch.log_softmax(logits.float(), -1)
    own = laws.gather(-1, torch.tensor(tokens, device=laws.device)[:, None])
    ranks = (laws >= own).sum(-1)
    top = laws.topk(laws.shape[-1] if num_top < 0 else min(num_top, laws.shape[-1]), -1)
    noted = []
    columns = (array.tolist() for array in to_host(own[:, 0], ranks, top.indices, top.values))
    for token, value, rank, likeliest, values in zip(tokens, *columns, strict=True):
        row = {token: Logprob(value, rank, tokenizer.token_text(token))}
        for place, (other, of_other) in enumerate(zip(likeliest, values, strict=True), start=1):
            row[other] = Logprob(of_other, place, tokenizer.token_text(other))
        noted.append(row)
    return noted


def _note_prompt(work: Work, logits: Tensor, tokenizer: Tokenizer) -> None:
    """The token after each of these rows; a prompt computed twice is noted once."""
    sequence = work.job.sequence
    noted, num_top = sequence.prompt_logprobs, sequence.params.prompt_logprobs
    assert noted is not None
    assert num_top is not None
    first = sequence.num_computed + 1  # the token after the first row
    skipped = max(0, len(noted) - first)
    tokens = sequence.tokens[first + skipped : first + len(logits)]
    if tokens:
        noted += logprobs_of(logits[skipped:], tokens, num_top, tokenizer)
