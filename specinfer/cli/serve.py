"""`specinfer serve`: the OpenAI API and the page, over HTTP."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from specinfer.cli.options import Asked
from specinfer.errors import ConfigError, DependencyError
from specinfer.serve.settings import ServerSettings

if TYPE_CHECKING:
    from specinfer.serve.state import Service

KEY_VARIABLE = "SPECINFER_API_KEY"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="A Hugging Face id, a folder, or zoo:NAME.", show_default="zoo:parley"),
    ] = None,
    *,
    asked: Asked,
    settings: ServerSettings,
) -> None:
    """Serve a model with OpenAI's API and a page to try it, over HTTP.

    SIGTERM or Ctrl-C lets running requests finish; a second one ends at once.
    """
    try:
        from specinfer.serve.launch import bind, run_server
        from specinfer.serve.logs import configure_logs
    except ImportError as error:
        raise DependencyError(
            f"serving needs {error.name}: pip install 'specinfer[serve]'"
        ) from None
    given = os.environ.get(KEY_VARIABLE)
    if not settings.api_key and given is not None:
        keys = [key.strip() for key in given.split(",")]
        if not all(keys):
            raise ConfigError(f"{KEY_VARIABLE}={given!r} has an empty key: unset it, or give keys")
        settings = replace(settings, api_key=keys)
    configure_logs(settings.log_format)
    with bind(settings) as taken:  # before weights are read: a port in use is told at once
        service = _load(asked, settings)
        try:
            run_server(service, taken)
        finally:
            service.llm.close()
            asked.keep(service.llm.llm)


def _load(asked: Asked, settings: ServerSettings) -> "Service":
    from specinfer.async_llm import AsyncLLM
    from specinfer.serve.state import Service

    return Service(AsyncLLM.of(asked.load()), settings, asked.loading.model)
