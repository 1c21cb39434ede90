"""No test reaches for the network unless it is asked for with `-m network`, and none is timed.

What the tests of the server set up alike stands here, imported where a test asks for it.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from specinfer.engine import build
from specinfer.engine.times import StepTimes
from specinfer.paths import cache_folder
from tests.engines import Told

# Nor is an example of hypothesis', or the making of it: a busy machine may take long over any
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

LONGEST = (
    *("page", "filters", "identity", "law", "builders", "verify", "levels", "engine", "lumping"),
    *("cli", "pressure", "triton_linear", "triton_attention", "graph", "soak", "serve_process"),
    *("growth_native", "quantization", "serve_fuzz", "exports", "serve_tools", "tracing"),
)
"""Files that take long, longest first: begun last, one would keep a worker busy and others idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_configure(config: pytest.Config) -> None:
    if "network" not in str(config.option.markexpr).replace("not network", ""):
        os.environ["HF_HUB_OFFLINE"] = "1"
    if not torch.cuda.is_available():  # read when a kernel is first imported
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def step_times(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines are told times instead of measuring them; nothing is kept outside the test run."""

    def told(names: Sequence[str], *rest: Any, **options: Any) -> list[StepTimes]:
        sizes = [1, 8, 64, 512]
        target = StepTimes(sizes, [1e-2, 1.1e-2, 2e-2, 8e-2], span_s=1e-4)
        return [target, *(StepTimes(sizes, [1e-3, 1e-3, 2e-3, 6e-3]) for _ in names[1:])]

    with pytest.MonkeyPatch.context() as patch:
        cache: Path = tmp_path_factory.mktemp("cache")
        # But compiled kernels, which cost seconds and are the same in every run.
        compiled = cache_folder() / "kernels"
        compiled.mkdir(parents=True, exist_ok=True)
        (cache / "kernels").symlink_to(compiled)
        patch.setenv("SPECINFER_CACHE", str(cache))
        patch.setattr(build, "measure_models", told)
        patch.setattr(build, "Controller", Told)  # nor do they learn from the clock
        yield


@pytest.fixture(scope="module")
def parley() -> Iterator[Any]:
    """The bundled pair behind asyncio, an `AsyncLLM`."""
    from tests.serving import pair

    llm = pair()
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    """The official client of the module's server, an `OpenAI`; it asks once."""
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
