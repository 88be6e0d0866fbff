"""Serve the page on which trained models are asked: `layerfuse demo`."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from importlib.util import find_spec
from tempfile import TemporaryDirectory

from layerfuse.errors import LayerfuseError
from layerfuse.explain.demo_content import DemoContent


def require_gradio() -> None:
    """Raise LayerfuseError where gradio is not installed."""
    if find_spec("gradio") is None:
        raise LayerfuseError("the web page needs gradio: pip install 'layerfuse[demo]'")


def listening(host: str, port: int | None) -> socket.socket:
    """Take a port.

    Args:
        host: a name or address of this machine.
        port: of the page, or None for a free one.

    Returns:
        A socket that is bound to it.

    Raises:
        LayerfuseError: the port is taken, or the host is none of this machine.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port or 0, type=socket.SOCK_STREAM
        )
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _unserved(host, port, error) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _unserved(host, port, error) from error
    return bound


def _unserved(host: str, port: int | None, error: OSError) -> LayerfuseError:
    """The message for an address that cannot be taken."""
    return LayerfuseError(
        f"cannot serve at {host}, port {port or 'any'}: {error}. Leave --port out for a free one, "
        "and --host for this machine alone"
    )


def address_of(host: str, bound: socket.socket) -> str:
    """What a browser on this machine opens.

    Args:
        host: that is served.
        bound: the socket.
    """
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{bound.getsockname()[1]}"


def serve_demo(
    content: DemoContent,
    bound: socket.socket,
    host: str,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a page until the process is interrupted.

    Args:
        content: what the page is made of.
        bound: where it is served.
        host: by which it is called there.
        say: is told the address of the page.

    Raises:
        LayerfuseError: gradio is missing.
    """
    require_gradio()
    with TemporaryDirectory(prefix="layerfuse-demo-") as private:
        # Read while gradio is imported. Pictures stay in memory; whatever else gradio may write
        # goes into a folder of this process, which is removed with it.
        os.environ["GRADIO_TEMP_DIR"] = private
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from layerfuse.explain.demo_server import demo_app, server_of

        server = server_of(demo_app(content, host))
        say(f"the page is at {address_of(host, bound)} (Ctrl+C ends it)")
        ended = threading.Event()

        def run() -> None:
            try:
                server.run(sockets=[bound])
            finally:
                ended.set()

        # In a thread of its own: in this one, the server would end the process by a signal before
        # the folder is removed, with a traceback.
        threading.Thread(target=run, name="layerfuse-demo").start()
        # Who ends the process in another way than by Ctrl+C wants the same.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            ended.wait()
        except KeyboardInterrupt:
            say("the page is closed")
        finally:
            server.should_exit = True
            ended.wait()
