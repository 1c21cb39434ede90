"""No test reaches for the network unless it is asked for with `-m network`."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if "network" not in str(config.option.markexpr).replace("not network", ""):
        os.environ["HF_HUB_OFFLINE"] = "1"
