"""The application: its routes, and its answers to what goes wrong."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from specinfer import __version__
from specinfer.errors import SpecInferError
from specinfer.serve.chat import create_chat_completion
from specinfer.serve.completions import create_completion
from specinfer.serve.errors import ApiError, as_api_error, describe_problems
from specinfer.serve.middleware import Surroundings
from specinfer.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    TokenizeRequest,
)
from specinfer.serve.state import Service
from specinfer.serve.tokens import create_text, create_tokens
from specinfer.serve.web import mount_page

_ERRORS = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in (
        (400, "The request is not understood or cannot be served."),
        (401, "The API key is missing or wrong."),
        (404, "There is no such model."),
        (408, "The body took too long to arrive."),
        (413, "The body is too large."),
        (500, "The engine failed."),
        (503, "Too many requests wait, or the server is going down."),
        (504, "The request took longer than the server allows."),
    )
}


def make_app(service: Service) -> FastAPI:
    """The whole server as an ASGI application."""
    app = FastAPI(
        title="specinfer",
        version=__version__,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,  # type: ignore[arg-type]
    )
    app.add_middleware(Surroundings, service=service)
    if service.settings.allowed_origins:  # outermost: a browser asks before it sends a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    app.exception_handler(ApiError)(_refuse)
    app.exception_handler(SpecInferError)(_refuse)
    app.exception_handler(HTTPException)(_refuse_http)
    app.exception_handler(RequestValidationError)(_refuse_body)
    _add_inference(app, service)
    _add_facts(app, service)
    mount_page(app)
    return app


def _add_inference(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        async with asyncio.timeout_at(service.deadline(request.state)):
            return await create_chat_completion(service, body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt or several."""
        async with asyncio.timeout_at(service.deadline(request.state)):
            return await create_completion(service, body, request)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a text, or of messages through the chat template."""
        return await create_tokens(service, body)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        return await create_text(service, body)


def _add_facts(app: FastAPI, service: Service) -> None:
    def describe(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "specinfer",
            "root": service.model,
            "parent": None,
            "max_model_len": service.llm.llm.engine.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What is served, under all its names."""
        return {"object": "list", "data": [describe(name) for name in service.model_names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        return describe(service.resolve_model(name))

    @app.get("/health")
    async def health() -> Response:
        """200 while the engine serves, else 503."""
        return Response(status_code=200 if service.llm.is_alive else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """This program's version."""
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        write, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(write(service.metrics.registry), media_type=content_type)


async def _refuse(request: Request, error: Exception) -> Response:
    return _tell(request, as_api_error(error))


async def _refuse_http(request: Request, error: Exception) -> Response:
    """What the framework refuses itself: no such path, no such method, no JSON at all."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _tell(request, ApiError(error.status_code, message, headers=error.headers))


async def _refuse_body(request: Request, error: Exception) -> Response:
    """A body that does not fit its model."""
    assert isinstance(error, RequestValidationError)
    return _tell(request, describe_problems(error.errors(), error.body))


def _tell(request: Request, error: ApiError) -> Response:
    request.state.note["error"] = error.code or error.status
    return JSONResponse(error.body, error.status, error.headers)
