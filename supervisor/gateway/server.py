"""uvicorn, set up for the gateway: our protocol, our loop, our signals, sockets that are bound already."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any, cast

import uvicorn

from supervisor.gateway.app import Gateway
from supervisor.gateway.relay import RelayProtocol


class GatewayServer(uvicorn.Server):
    """`await run_on(sockets)` serves until `should_exit` is set."""

    def __init__(
        self, gateway: Gateway, close_patience: int, *, certificate: str | None = None, key: str | None = None
    ) -> None:
        """`certificate` and `key`: files, for HTTPS."""
        config = uvicorn.Config(
            cast(Any, gateway),
            http=RelayProtocol,
            ws="none",
            loop="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ssl_certfile=certificate,
            ssl_keyfile=key,
            timeout_graceful_shutdown=close_patience,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield  # the supervisor handles them

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """No TLS on the private socket, whatever the ports have: who asks there is the same user, on this machine."""
        private = [listener for listener in sockets or [] if listener.family == socket.AF_UNIX]
        await super().startup([listener for listener in sockets or [] if listener not in private])
        for listener in private:
            self.servers.append(await asyncio.get_running_loop().create_unix_server(self._protocol, sock=listener))

    def _protocol(self) -> RelayProtocol:
        return RelayProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def run_on(self, sockets: list[socket.socket]) -> None:
        await self.serve(sockets)
