"""What a token is worth to a sequence with a latency goal."""

import numpy as np
import pytest

from specinfer.engine.urgency import urgency


def test_without_a_goal_all_tokens_are_worth_the_same() -> None:
    assert urgency(None, 100.0, 1, 1.0) == 1.0


def test_urgency_grows_with_lateness_between_bounds() -> None:
    values = [urgency(0.1, elapsed, 10, 0.02) for elapsed in np.linspace(0, 10, 50)]
    assert values == sorted(values)
    assert values[0] == 0.25
    assert values[-1] == 4.0
    assert urgency(0.1, 0.1 * 11 - 0.02, 10, 0.02) == pytest.approx(1.0)
    assert urgency(1e-300, 1.5, 10, 0.02) == 4.0
    assert urgency(0.1, 1.5, 10, 0.02) > 1 > urgency(0.1, 0.8, 10, 0.02)
