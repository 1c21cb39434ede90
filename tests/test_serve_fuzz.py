"""Schemathesis asks whatever the server's own OpenAPI description allows, and some of what it does
not: nothing it asks may be a 500."""

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error

from specinfer.serve.app import make_app
from tests.serving import pair, service_of


@pytest.fixture(scope="module")
def schema() -> Iterator[schemathesis.BaseSchema]:
    llm = pair(max_model_len=64)
    service = service_of(llm, max_body_bytes=50_000)
    yield schemathesis.openapi.from_asgi("/openapi.json", make_app(service))
    llm.close()


def ask(schema: schemathesis.BaseSchema, num_examples: int) -> int:
    """Ask each operation so often; returns how often in all."""
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=num_examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            nonlocal count
            count += 1
            case.call_and_validate(checks=[not_a_server_error])

        check()
    return count


def test_nothing_it_asks_is_a_500(schema: schemathesis.BaseSchema) -> None:
    assert ask(schema, 25) >= 100


@pytest.mark.slow
def test_nor_is_anything_of_two_thousand(schema: schemathesis.BaseSchema) -> None:
    assert ask(schema, 400) >= 2_000
