"""When requests are sent: as they come (Poisson), or so many at a time."""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from specinfer.loadtest.client import Record
from specinfer.loadtest.prompts import Prompt


def arrivals(num: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which requests arrive, independently of each other.

    rate  requests per second; infinite: all at once
    law   gaps are exponential with mean 1 / rate: a Poisson process
    """
    rng = random.Random(seed)
    at_s, times = 0.0, []
    for _ in range(num):
        at_s += 0.0 if math.isinf(rate) else rng.expovariate(rate)
        times.append(at_s)
    return times


async def run(
    ask: Callable[[Prompt], Awaitable[Record]],
    prompts: Sequence[Prompt],
    arrive_s: Sequence[float],
    max_concurrency: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Record], float]:
    """Ask every prompt when its time comes, without waiting for those before.

    max_concurrency  more than these wait here; the wait counts in no latency, as with vLLM's
    advance          called whenever one is done
    returns          records in the order of the prompts, and the seconds it took
    """
    places = asyncio.Semaphore(max_concurrency or len(prompts))
    start_s = time.perf_counter()

    async def one(prompt: Prompt, at_s: float) -> Record:
        # By the clock and not by gaps: a slow server must not make its clients wait for it
        await asyncio.sleep(start_s + at_s - time.perf_counter())
        async with places:
            record = await ask(prompt)
        advance()
        return record

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(prompt, at_s))
            for prompt, at_s in zip(prompts, arrive_s, strict=True)
        ]
    return [task.result() for task in tasks], time.perf_counter() - start_s
