"""Latency goals: more drafting for the sequences that are late."""


def urgency(goal_s: float | None, elapsed_s: float, num_tokens: int, step_s: float) -> float:
    """What a token is worth to a sequence with a goal of seconds per output token.

    elapsed_s  since its first token, with num_tokens after it
    step_s     of the next step
    returns    1 without a goal; above 1 (up to 4) for one that will be late after the next step,
               below 1 (down to 1/4) for one that is early
    source     SpecServe (arXiv 2503.05096), AdaServe (arXiv 2501.12162), in kind
    """
    if goal_s is None:
        return 1.0
    pace = (elapsed_s + step_s) / (num_tokens + 1)
    return min(2.0, max(0.5, pace / goal_s)) ** 2
