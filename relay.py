#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.9"
# dependencies = ["websockets>=14"]
# ///
"""Let two WebRTC peers find each other: a signaling relay in one file.

Each client opens a WebSocket, registers under a UUID, and exchanges session descriptions with
its peers through the relay; their data then flows without it. Clients are the endpoints of
ProxyStore, every release; browsers; and whatever else opens a WebSocket and writes JSON.

Each message is one JSON object in one text frame. The client speaks first:

    {"message_type": "server_registration", "name": "laptop", "uuid": "<its UUID>"}

and is answered, before anything else is sent to it, by

    {"success": true, "message": null, "error": false, "message_type": "server_response"}

A `relay_registration` (ProxyStore 0.6 and later) is the same, answered by a `relay_response`.
From then on the client sends, and is sent,

    {"message_type": "peer_connection",
     "source_uuid": "<its UUID>", "source_name": "laptop", "peer_uuid": "<the peer's UUID>",
     "description_type": "offer", "description": "<SDP>", "error": null}

which is forwarded to the peer exactly as it came. The last three fields, of which `error` may be
left out, are the peers' business; keys that are not named here travel along.

What cannot be forwarded comes back to its sender with `error` saying why: the peer is unknown,
the peer does not read what is sent to it, or `source_uuid` is not the sender's. What is not a
message is answered by a response with `success: false`, `error: true` and the reason in
`message`. Neither ends the connection, nor the registration.

A UUID that registers on a new connection displaces its old one, which is closed: with 1001 if it
spoke `server_registration`, with 4004 ("do not come back") if it spoke `relay_registration`.
Other close codes: 1001, the relay stops; 1009, a message is longer than 1 MiB; 1011, no answer to
a ping.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging.handlers
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any
from uuid import UUID

try:
    from websockets.asyncio.server import Server, ServerConnection, broadcast
    from websockets.asyncio.server import serve as listen
    from websockets.exceptions import ConnectionClosed
    from websockets.protocol import State
    from websockets.version import version as websockets_version
except ImportError as error:
    if __name__ != '__main__':
        raise
    raise SystemExit(f"relay.py: {error}; pip install 'websockets>=14' mends it") from None

__version__ = '0.1.0'

logger = logging.getLogger('relay')

# Bytes of the longest message: what the original takes, and all that ProxyStore's clients take.
MAX_MESSAGE = 2**20
# Messages read ahead of the one being dealt with: a flood is to wait in the flooder's socket.
MAX_QUEUE = 1
# Bytes that may wait for a peer to read them. When none wait, any message is taken.
MAX_BACKLOG = 2**20
# Seconds for a displaced connection to answer its close. It may be dead, and the client that
# registers anew gives up after 10 s.
TAKEOVER_WAIT = 0.5
# Seconds between pings, and for their answer: slack for a laptop on a bad network, because many
# clients never come back from a lost connection.
PING_INTERVAL, PING_TIMEOUT = 30, 90
# Milliseconds until the kernel ends a connection whose peer takes nothing. Keepalive would not:
# its pings wait behind what is not taken.
STALL_TIMEOUT = 120_000
# Seconds for a client to open a connection, to close it, and for all to be closed at the end.
OPEN_TIMEOUT, CLOSE_TIMEOUT, STOP_TIMEOUT = 10, 10, 12
# Seconds between log lines on what one connection is refused; those in between are counted.
REFUSAL_INTERVAL = 60
# Characters of a number in a message. No field takes one, and long ones take long to convert.
MAX_DIGITS = 100
# Characters of a client's text that the log or an answer repeats.
MAX_SHOWN = 64

# ------------------------------------------------------------------------------- Messages


class MessageEncodeError(Exception):
    """Raised when a message cannot be encoded."""


class MessageDecodeError(Exception):
    """Raised when a text is not a message, with a reason for the one who sent it.

    `response_type` is the type of response that the sender understands.
    """

    def __init__(self, reason: str, response_type: str = 'server_response') -> None:
        super().__init__(reason)
        self.response_type = response_type


@dataclass(frozen=True)
class Message:
    """Base of the three messages."""


@dataclass(frozen=True)
class ServerRegistration(Message):
    """Asks to be known under a UUID; `message_type` tells the client's generation."""

    name: str
    uuid: UUID
    message_type: str = 'server_registration'


@dataclass(frozen=True)
class ServerResponse(Message):
    """Tells a client that it is registered, or what was wrong."""

    success: bool = True
    message: str | None = None
    error: bool = False
    message_type: str = 'server_response'


@dataclass(frozen=True)
class PeerConnection(Message):
    """Carries a session description from peer to peer, or back with an error."""

    source_uuid: UUID
    source_name: str
    peer_uuid: UUID
    description_type: str
    description: str
    error: str | None = None
    message_type: str = 'peer_connection'


MESSAGE_TYPES: dict[str, type[Message]] = {
    'server_registration': ServerRegistration,
    'relay_registration': ServerRegistration,
    'server_response': ServerResponse,
    'relay_response': ServerResponse,
    'peer_connection': PeerConnection,
}

# By annotation of a field: what JSON gives for it, and how to ask for it.
FIELD_TYPES: dict[Any, Any] = {
    'str': ((str,), 'a string'),
    'str | None': ((str, type(None)), 'a string or null'),
    'bool': ((bool,), 'true or false'),
    'UUID': ((str,), 'a string that holds a UUID'),
}


def encode(message: Message) -> str:
    """Return the JSON text of a message."""
    try:
        if MESSAGE_TYPES[vars(message)['message_type']] is not type(message):
            raise TypeError('a message of another message_type')
        values = {k: str(v) if isinstance(v, UUID) else v for k, v in vars(message).items()}
        return json.dumps(values, allow_nan=False)
    except (KeyError, TypeError, ValueError) as error:
        raise MessageEncodeError(f'{type(message).__name__}: {error}') from error


def decode(text: str | bytes) -> Message:
    """Return the message in a text, or raise MessageDecodeError: there is no third way."""
    response_type = 'server_response'
    try:
        if not isinstance(text, str):
            raise ValueError('a message comes in a text frame, not in a binary one')
        data = _decoder.decode(text)
        if not isinstance(data, dict):
            raise ValueError('a message is a JSON object')
        name = data.get('message_type')
        if not isinstance(name, str) or name not in MESSAGE_TYPES:
            raise ValueError(f'message_type must be one of {", ".join(MESSAGE_TYPES)}')
        if name.startswith('relay_'):
            response_type = 'relay_response'
        kind = MESSAGE_TYPES[name]
        return kind(**{f.name: _value(data, f.name, f.type, f.default) for f in fields(kind)})
    except RecursionError:
        reason = 'nested too deep'
    except json.JSONDecodeError as error:
        reason = f'not JSON: {error}'
    except ValueError as error:
        reason = str(error)
    raise MessageDecodeError(reason, response_type)


def _value(data: dict[str, Any], name: str, annotation: Any, default: Any) -> Any:
    """Return a field's value, checked against its annotation."""
    value = data.get(name, default)
    if value is MISSING:
        raise ValueError(f'{name} is missing')
    types, expected = FIELD_TYPES[annotation]
    if not isinstance(value, types):
        raise ValueError(f'{name} must be {expected}')
    try:
        return UUID(value) if annotation == 'UUID' else value
    except ValueError:
        raise ValueError(f'{name} must be {expected}, not {shown(value)}') from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a key that comes twice, the relay might read one value and the peer the other.
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError('a key comes twice in one object')
    return data


def _number(text: str) -> float:
    if len(text) > MAX_DIGITS or text[-1].isalpha():
        raise ValueError(f'{shown(text)} is too long for a number, or is NaN or Infinity')
    return float(text)


_decoder = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_number, parse_float=_number, parse_int=_number
)


def shown(text: str) -> str:
    """Return a text that a client chose as the log may hold it: quoted, ASCII and short."""
    return ascii(text[:MAX_SHOWN]) + ('...' if len(text) > MAX_SHOWN else '')


# ------------------------------------------------------------------------------- Relay

# ProxyStore shows this to its user; the beginning is what its clients may look for.
DISPLACED = (
    'Relay received a registration with the same ID. '
    'This might mean that the endpoint is running in multiple locations.'
)


@dataclass(frozen=True)
class Client:
    """A registered client, and the connection that holds its registration."""

    name: str
    uuid: UUID
    websocket: ServerConnection
    response_type: str = 'server_response'
    address: str = 'unknown address'

    def __str__(self) -> str:
        return f'{self.uuid} ({shown(self.name)} at {self.address})'


class RelayServer:
    """Registers clients and forwards messages between them.

    Serve it with `serve` below, or with `websockets.asyncio.server.serve(relay.handler, ...)`.

    The registry changes in steps without an `await`, so that no two handlers mix theirs. No
    handler waits for a socket other than its own, but for the TAKEOVER_WAIT.
    """

    def __init__(self) -> None:
        self._uuid_to_client: dict[UUID, Client] = {}
        self._websocket_to_client: dict[ServerConnection, Client] = {}
        # When the last refusal of a connection was logged, and how many it had in all.
        self._refusals: dict[ServerConnection, tuple[float, int]] = {}
        # The loop holds no reference to its tasks.
        self._closing: set[asyncio.Task[None]] = set()

    async def handler(self, websocket: ServerConnection) -> None:
        """Serve a connection until it ends."""
        _bound_stall(websocket)
        reason = 'the relay has stopped'
        try:
            while True:
                text = await websocket.recv()
                # A displaced client may still be heard, but must not displace in turn.
                if websocket.state is State.OPEN:
                    await self._receive(websocket, text)
        except ConnectionClosed as error:
            reason = f'closed with {error.rcvd.code}' if error.rcvd else 'connection lost'
        except Exception:
            reason = 'a defect of the relay'
            logger.exception('A defect of the relay, at %s', address_of(websocket.remote_address))
            raise
        finally:
            self._remove(websocket, reason)
            self._refusals.pop(websocket, None)

    async def _receive(self, websocket: ServerConnection, text: str | bytes) -> None:
        try:
            message = decode(text)
        except MessageDecodeError as error:
            await self._refuse(websocket, str(error), error.response_type)
            return
        if isinstance(message, ServerRegistration):
            await self.register(websocket, message)
        elif isinstance(message, PeerConnection):
            await self.connect(websocket, message, str(text))
        else:
            await self._refuse(websocket, 'a response is for the relay to send')

    async def register(self, websocket: ServerConnection, request: ServerRegistration) -> None:
        """Register a client and answer it, displacing whoever holds its UUID."""
        client = self._websocket_to_client.get(websocket)
        if client is None:
            holder = self._uuid_to_client.get(request.uuid)
            if holder is not None:
                await asyncio.wait({self._displace(holder)}, timeout=TAKEOVER_WAIT)
            self._admit(websocket, request)
        elif client.uuid == request.uuid:
            await self.send(websocket, ServerResponse(message_type=client.response_type))
        else:
            await self._refuse(
                websocket, f'this connection is registered as {client.uuid} already'
            )

    def _admit(self, websocket: ServerConnection, request: ServerRegistration) -> None:
        """Register a client and answer it, without an `await` in between.

        So nothing is forwarded to it before the answer, and of those that took the UUID while
        its holder was being displaced none is left in the registry unseen.
        """
        if websocket.state is not State.OPEN:
            return
        if request.uuid in self._uuid_to_client:
            self._displace(self._uuid_to_client[request.uuid])
        response_type = request.message_type.replace('registration', 'response')
        # The address is kept for the log: a connection that is lost does not tell its own.
        address = address_of(websocket.remote_address)
        client = Client(request.name, request.uuid, websocket, response_type, address)
        self._uuid_to_client[client.uuid] = client
        self._websocket_to_client[websocket] = client
        broadcast((websocket,), encode(ServerResponse(message_type=response_type)))
        logger.info('Registered %s', client)

    def _displace(self, client: Client) -> asyncio.Task[None]:
        """Remove a registration at once, and close its connection in a task."""
        self._remove(client.websocket, 'registered on another connection')
        code = 4004 if client.response_type == 'relay_response' else 1001
        task = asyncio.ensure_future(client.websocket.close(code, DISPLACED))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def unregister(self, websocket: ServerConnection, expected: bool) -> None:
        """Remove a registration and close its connection: with 1000, or as displaced."""
        client = self._websocket_to_client.get(websocket)
        if client is not None and not expected:
            await self._displace(client)
        elif client is not None:
            self._remove(websocket, 'closed by the relay')
            await websocket.close()

    def _remove(self, websocket: ServerConnection, reason: str) -> None:
        client = self._websocket_to_client.pop(websocket, None)
        if client is None:
            return
        # The UUID may have become another connection's.
        if self._uuid_to_client.get(client.uuid) is client:
            del self._uuid_to_client[client.uuid]
        refused = self._refusals.get(websocket, (0, 0))[1]
        refusals = f', {refused} messages refused' if refused else ''
        logger.info('Unregistered %s: %s%s', client, reason, refusals)

    async def connect(
        self, websocket: ServerConnection, message: PeerConnection, text: str = ''
    ) -> None:
        """Forward a message, in the text it came in, or send it back with an error."""
        client = self._websocket_to_client.get(websocket)
        if client is None:
            await self._refuse(websocket, 'client has not registered yet')
            return
        reason = self._forward(client, message, text or encode(message))
        if reason is None:
            return
        self._log_refusal(websocket, f'to {message.peer_uuid}, because {reason}')
        error = f'Cannot forward peer connection message to peer {message.peer_uuid} '
        answer = replace(message, error=f'{error}because {reason}.')
        # With the error, and escapes for what is not ASCII, it may be too long for its sender.
        if len(encode(answer)) > MAX_MESSAGE:
            answer = replace(answer, source_name='', description_type='', description='')
        await self.send(websocket, answer)

    def _forward(self, client: Client, message: PeerConnection, text: str) -> str | None:
        """Write a text to the peer without waiting, or return why that cannot be."""
        if message.source_uuid != client.uuid:
            return "source_uuid is not the sender's"
        peer = self._uuid_to_client.get(message.peer_uuid)
        # A connection that is being closed would lose the message without a word.
        if peer is None or peer.websocket.state is not State.OPEN:
            return 'this peer is unknown'
        backlog = peer.websocket.transport.get_write_buffer_size()
        if backlog and backlog + len(text) > MAX_BACKLOG:
            return 'this peer does not read what is sent to it'
        broadcast((peer.websocket,), text)
        logger.debug('Forwarded from %s to %s', client.uuid, peer.uuid)
        return None

    async def send(self, websocket: ServerConnection, message: Message) -> None:
        """Send a message to a connection, or nothing if it is closed."""
        with contextlib.suppress(ConnectionClosed):
            await websocket.send(encode(message))

    async def _refuse(
        self, websocket: ServerConnection, reason: str, response_type: str = 'server_response'
    ) -> None:
        """Answer what is not a message, or not in its place, with the reason."""
        client = self._websocket_to_client.get(websocket)
        if client is not None:
            response_type = client.response_type
        self._log_refusal(websocket, reason)
        await self.send(websocket, ServerResponse(False, reason, True, response_type))

    def _log_refusal(self, websocket: ServerConnection, reason: str) -> None:
        """Count a refusal, and log it unless the connection had one logged lately."""
        logged, count = self._refusals.get(websocket, (float('-inf'), 0))
        now = time.monotonic()
        if now - logged >= REFUSAL_INTERVAL:
            logged = now
            who = self._websocket_to_client.get(websocket) or address_of(websocket.remote_address)
            logger.warning('Refused a message from %s: %s (%d before)', who, reason, count)
        self._refusals[websocket] = (logged, count + 1)


def address_of(address: Any) -> str:
    """Return a socket's address in one word."""
    if not isinstance(address, tuple):
        return 'unknown address'
    return '{}:{}'.format(f'[{address[0]}]' if ':' in address[0] else address[0], address[1])


def _bound_stall(websocket: ServerConnection) -> None:
    sock = websocket.transport.get_extra_info('socket')
    if hasattr(socket, 'TCP_USER_TIMEOUT') and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_TIMEOUT)


# ------------------------------------------------------------------------------- Server


class StartError(Exception):
    """Raised when the relay cannot start: one line that tells the operator what to mend."""


async def serve(
    host: str, port: int, certfile: str | None = None, keyfile: str | None = None
) -> None:
    """Serve a relay until SIGINT or SIGTERM, with TLS where a certificate is given.

    Raises:
        StartError: If the address, the certificate or its key cannot be used.
    """
    tls = None if certfile is None else _tls(certfile, keyfile)
    _raise_file_limit()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await _listen(RelayServer(), host, port, tls)
    for sock in server.sockets:
        logger.info('Serving relay server on %s', address_of(sock.getsockname()))
    await stop.wait()
    logger.info('Stopping')
    server.close()
    # A client that neither reads nor closes must not hold up the end.
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(server.wait_closed(), STOP_TIMEOUT)
    logger.info('Server closed')


async def _listen(relay: RelayServer, host: str, port: int, tls: ssl.SSLContext | None) -> Server:
    limits: dict[str, Any] = {'ssl_handshake_timeout': OPEN_TIMEOUT} if tls else {}
    try:
        return await listen(
            relay.handler,
            host,
            port,
            ssl=tls,
            # For clients that offer compression, as ProxyStore's do, it takes 40 KiB each.
            compression=None,
            max_size=MAX_MESSAGE,
            max_queue=MAX_QUEUE,
            open_timeout=OPEN_TIMEOUT,
            close_timeout=CLOSE_TIMEOUT,
            ping_interval=PING_INTERVAL,
            ping_timeout=PING_TIMEOUT,
            **limits,
        )
    except (OSError, UnicodeError) as error:
        # asyncio wraps the reason in a sentence of its own; a failed look-up has no errno > 0.
        number = getattr(error, 'errno', None) or 0
        reason = os.strerror(number) if number > 0 else getattr(error, 'strerror', error)
        raise StartError(f'cannot listen on {host}:{port}: {reason}') from error


def _tls(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """Return a TLS context for a certificate and its key."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    path, content = certfile, 'certificate'
    try:
        # The errors of load_cert_chain do not name a file: see first what each one holds.
        ssl.create_default_context(cafile=certfile)
        path, content = keyfile or certfile, 'private key without a password'
        with open(path, 'rb'):
            # For a password it would ask on the terminal.
            context.load_cert_chain(certfile, keyfile, password=lambda: '')
    except ssl.SSLError as error:
        if error.reason == 'KEY_VALUES_MISMATCH':
            raise StartError(f'{path} is not the key of the certificate {certfile}') from error
        raise StartError(f'{path} holds no {content} in PEM format') from error
    except OSError as error:
        raise StartError(f'cannot read {path}: {error.strerror}') from error
    return context


def _raise_file_limit() -> None:
    """Allow as many connections as the system does; 1,024 files are a relay's first end."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # Some systems refuse the limit that they call unlimited.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ------------------------------------------------------------------------------- Command line


LEVELS = ('CRITICAL', 'ERROR', 'WARNING', 'INFO', 'DEBUG')
LOG_FORMAT = '[%(asctime)s.%(msecs)03d] %(levelname)-5s (%(name)s) :: %(message)s'
LOG_DATE = '%Y-%m-%d %H:%M:%S'
VERSION = f'relay.py {__version__}, websockets {websockets_version}, Python %d.%d.%d'


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Say what is wrong in one line, without the usage."""
        self.exit(2, f'{self.prog}: {message}\n')


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f'{text!r} is not a port, 0 to 65535')


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser('relay.py', description=(__doc__ or '').partition('\n')[0])
    add = parser.add_argument
    add('--host', default='0.0.0.0', metavar='ADDRESS', help='listen on (%(default)s)')
    add('--port', default=8765, type=_port, help='listen on, 0 for any (%(default)s)')
    add('--certfile', metavar='PATH', help='certificate in PEM format, to serve with TLS')
    add('--keyfile', metavar='PATH', help='its private key, unless that is in the same file')
    add('--log-dir', metavar='PATH', help='also write server.log here, a new one each Sunday')
    add('--log-level', default='INFO', type=str.upper, choices=LEVELS, help='(%(default)s)')
    add('--version', action='version', version=VERSION % sys.version_info[:3])
    options = parser.parse_args(argv)
    if options.keyfile and not options.certfile:
        parser.error('--keyfile needs --certfile')
    return options


def _log_to(log_dir: str | None, level: str) -> None:
    """Log to standard output and, where a folder is given, to a file in it."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if log_dir is not None:
        path = os.path.join(log_dir, 'server.log')
        try:
            os.makedirs(log_dir, exist_ok=True)
            weekly = logging.handlers.TimedRotatingFileHandler(path, 'W6')
        except OSError as error:
            raise StartError(f'cannot log to {path}: {error.strerror}') from error
        handlers.append(weekly)
    logging.basicConfig(format=LOG_FORMAT, datefmt=LOG_DATE, level=level, handlers=handlers)
    # A full disk must not have each line explained on standard error.
    logging.raiseExceptions = False
    # It logs session descriptions at DEBUG and, up to version 15, a traceback for each port scan.
    # The relay's own defects are logged by its handler.
    logging.getLogger('websockets').setLevel(logging.CRITICAL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the relay; return the exit status."""
    options = _options(argv)
    try:
        _log_to(options.log_dir, options.log_level)
        asyncio.run(serve(options.host, options.port, options.certfile, options.keyfile))
    except StartError as error:
        print(f'relay.py: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
