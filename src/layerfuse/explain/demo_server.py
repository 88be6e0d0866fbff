"""Serve the web page: to this machine alone if not told otherwise, and nothing but the page."""

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from layerfuse.errors import LayerfuseError
from layerfuse.explain.demo_content import DemoContent
from layerfuse.explain.demo_page import build_page, page_css, page_theme
from layerfuse.explain.demo_paths import without_paths
from layerfuse.explain.demo_pictures import MOST_BYTES, PictureShelf

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""hosts that no other machine reaches"""
MOST_JSON = 100_000
"""bytes of a request that is no picture"""
ROUTES = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/assets/.*|/static/(?:js|img)/.*"
    r"|/picture|/picture/[\w-]+/(?:large|small)"
    r"|/gradio_api/(?:queue/join|queue/data|cancel|reset/?|startup-events|heartbeat/\w+)"
)
"""All that is answered. Gradio has more: files by path, uploads, proxies, monitoring, an API."""
POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio's components are templates that become functions in the browser.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'self'",
    )
)
"""The browser itself refuses to fetch anything from elsewhere."""

Message = MutableMapping[str, Any]
"""of ASGI"""
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """Lets through what the page needs, and nothing else.

    Args:
        app: the page, as an ASGI application.
        hosts: by which it may be called; None allows all. Else a site that somebody visits could
            give its own name this machine's address, and read the page.
    """

    def __init__(self, app: Any, hosts: frozenset[str] | None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or have the page answer it."""
        if scope["type"] != "http":
            # The start and the end of the server; the page has no web sockets.
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            status, reason = refusal
            await _refuse(status, reason, scope, receive, send)
            return
        body = _CountedBody(receive, _most_bytes(scope["path"]))

        async def send_with_policy(message: Message) -> None:
            if body.is_too_long:
                # The page's own word for a body that broke off; a better one follows.
                return
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        # Raised again by what has tried to answer it.
        with suppress(_TooLongError):
            await self.app(scope, body.receive, send_with_policy)
        if body.is_too_long:
            await _refuse(413, f"larger than {body.most:,} bytes", scope, receive, send)

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Status and reason for what is not let through."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self.hosts is not None and name not in self.hosts:
            return 421, "unknown host"
        method = scope["method"]
        if method not in ("GET", "HEAD", "POST") or not ROUTES.fullmatch(scope["path"]):
            return 404, "not found"
        if method == "POST":
            return self._refusal_of_content(scope["path"], headers, host)
        return None

    def _refusal_of_content(
        self, path: str, headers: dict[bytes, str], host: str
    ) -> tuple[int, str] | None:
        """The same for a request that brings something."""
        origin = headers.get(b"origin")
        # Another site may send forms here; only this page's own requests are answered.
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "another site"
        # Sent in chunks, a body is as long as it likes, whatever length is said beside them.
        if b"transfer-encoding" in headers:
            return 411, "a request must come in one piece"
        length = headers.get(b"content-length", "")
        if not length.isdecimal():
            return 411, "a request must say how long it is"
        # Refused before it is read, by what it says; what comes is counted as well.
        most = _most_bytes(path)
        if int(length) > most:
            return 413, f"larger than {most:,} bytes"
        return None


class _TooLongError(Exception):
    """A request brings more than it may."""


class _CountedBody:
    """The body of a request, which ends as soon as more has come than may.

    Args:
        receive: gives its pieces.
        most: bytes that it may have.
    """

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self.most = most
        self._received = 0

    @property
    def is_too_long(self) -> bool:
        """Whether more has come."""
        return self._received > self.most

    async def receive(self) -> Message:
        """Give the next piece, or raise `_TooLongError`."""
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self.is_too_long:
            raise _TooLongError
        return message


def _most_bytes(path: str) -> int:
    """How many a request may bring."""
    return MOST_BYTES if path == "/picture" else MOST_JSON


async def _refuse(status: int, reason: str, scope: Message, receive: Receive, send: Send) -> None:
    """Answer a request with why it is not answered, and read no more of it."""
    headers = {"connection": "close"}
    await JSONResponse({"error": reason}, status, headers)(scope, receive, send)


_HEADERS = [
    (b"content-security-policy", POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def demo_app(page: DemoContent, host: str = LOOPBACK[0]) -> Guard:
    """Make the application that serves a page.

    Args:
        page: what it is made of.
        host: where it will be served.

    Returns:
        An ASGI application.
    """

    async def mounted() -> FastAPI:
        return _mounted(page)

    hosts = None
    if host in LOOPBACK:
        hosts = frozenset(LOOPBACK)
    # Inside an event loop: without one, gradio makes some that nobody closes. In a thread, as this
    # one may have a loop that runs, such as a notebook's.
    with ThreadPoolExecutor(1) as pool:
        app = pool.submit(asyncio.run, mounted()).result()
    return Guard(app, hosts)


def _mounted(page: DemoContent) -> FastAPI:
    """The page and its pictures."""
    blocks = build_page(page)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _add_pictures(app, page.shelf)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        # Errors of the page itself stay on the terminal; those of models are in their columns.
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=page_theme(),
        css=page_css(),
    )
    return app


def _add_pictures(app: FastAPI, shelf: PictureShelf) -> None:
    """The routes of pictures: one takes an upload, one gives those whose token is known."""

    @app.post("/picture")
    async def upload(request: Request) -> JSONResponse:
        # Read by gradio, it would be a file of a temporary folder; here it stays in memory.
        content = await request.body()
        name = unquote(request.headers.get("x-name", ""))
        try:
            shown = await run_in_threadpool(shelf.add, content, name)
        except LayerfuseError as error:
            return JSONResponse({"error": without_paths(str(error))}, 400)
        return JSONResponse(shown.for_page())

    @app.get("/picture/{token}/{size}")
    def picture(token: str, size: str) -> Response:
        try:
            shown = shelf.find(token)
        except LayerfuseError:
            return Response(status_code=404)
        content = shown.small if size == "small" else shown.large
        headers = {"cache-control": "private, max-age=3600"}
        return Response(content, media_type="image/jpeg", headers=headers)


def server_of(app: Guard) -> uvicorn.Server:
    """Make the server of an application.

    Args:
        app: of the page.

    Returns:
        The server, not started.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            # Pages that are open keep a connection for ever.
            timeout_graceful_shutdown=1,
        )
    )
