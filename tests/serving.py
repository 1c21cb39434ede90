"""What the tests of the server share: an app on the bundled pair behind a real socket."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from specinfer.async_llm import AsyncLLM
from specinfer.serve.app import make_app
from specinfer.serve.settings import ServerSettings
from specinfer.serve.state import Service

MODEL = "zoo:parley"
DRAFTER = "zoo:parley-draft"


def pair(**options: Any) -> AsyncLLM:
    """The bundled pair in float32, where greedy text does not depend on the batch."""
    return AsyncLLM(MODEL, **{"drafters": [DRAFTER], "dtype": "float32"} | options)


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """Serve on a free port of this machine; gives the URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(make_app(service), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def served_pair(settings: ServerSettings | None = None, **options: Any) -> Iterator[str]:
    """The bundled pair, served."""
    llm = pair(**options)
    try:
        with serving(Service(llm, settings or ServerSettings(), MODEL)) as url:
            yield url
    finally:
        llm.close()
