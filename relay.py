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

Each message is one JSON object in one text frame. The client sends the first of these, is
answered by the second before anything else, and from then on sends, and is sent, the third:

    {"message_type": "server_registration", "name": "laptop", "uuid": "<its UUID>"}
    {"success": true, "message": null, "error": false, "message_type": "server_response"}
    {"message_type": "peer_connection", "source_uuid": "<its UUID>", "source_name": "laptop",
     "peer_uuid": "<the peer's UUID>", "description_type": "offer", "description": "<SDP>",
     "error": null}

A `relay_registration` (ProxyStore 0.6 and later) is the same, answered by a `relay_response`. A
`peer_connection` is forwarded exactly as it came: its last three fields, of which `error` may be
left out, are the peers' business, and keys that are not named here travel along.

What cannot be forwarded comes back to its sender, with these fields only and `error` saying why:
the peer is unknown, the peer does not read what is sent to it, `source_uuid` is not the sender's
or, with --nats, the relay of the peer cannot be reached. What is not a message is answered by a
response with `success: false`, `error: true` and the reason in `message`. Neither ends the
connection, nor the registration.

A UUID that registers on a new connection displaces its old one, which is closed: with 1001 if it
spoke `server_registration`, with 4004 ("do not come back") if it spoke `relay_registration`.
Other close codes: 1001, the relay stops; 1008, no registration within 30 s, or its user has no
token any more; 1009, a message of more than 1 MiB; 1011, no answer to a ping; 1013, no room.

Where there are tokens, a client shows one: `Authorization: Bearer TOKEN`, ws://USER:TOKEN@HOST
or ws://HOST/?token=TOKEN. Without, it gets HTTP 401. To it, only its own user's clients exist.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import datetime
import errno
import hashlib
import importlib
import itertools
import json
import logging.handlers
import os
import re
import resource
import signal
import socket
import ssl
import sys
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

try:
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
    from websockets.frames import Frame, Opcode
    from websockets.http11 import Request, Response
    from websockets.protocol import State
    from websockets.server import ServerProtocol
    from websockets.version import version as websockets_version
except ImportError as error:
    if __name__ != '__main__':
        raise
    raise SystemExit(f"relay.py: {error}; pip install 'websockets>=14' mends it") from None

__version__ = '0.1.0'
# On some versions of Python, a member of an enumeration takes longer to reach.
OPEN = State.OPEN
TEXT, PING, PONG, CLOSE = Opcode.TEXT, Opcode.PING, Opcode.PONG, Opcode.CLOSE
logger = logging.getLogger('relay')

# Limits, each with its reason.
MAX_MESSAGE = 2**20  # bytes: what ProxyStore's own relay takes, and its clients
MAX_FRAGMENTS = 4096  # of one message; websockets has a limit of its own from version 17 on
MAX_BACKLOG = 2**20  # bytes that wait for a peer to read; when none wait, any message is taken
RECEIVE_BUFFER = 2**16  # bytes the kernel reads ahead: a flood is to wait in the flooder's memory
RATE = 500  # messages a second of one client; peers that connect exchange a dozen
BURST = 0.1  # seconds' worth of messages that a client that was silent may send at once
SPARE_FILES = 64  # not for clients: the log, those that are connecting, those that are refused
MAX_PONGS = 2**13  # bytes of them left unread before a client is taken for a flood of pings
TAKEOVER_WAIT = 0.5  # s for a displaced connection to close: it may be dead, and the next waits
STALL_TIMEOUT = 120_000  # ms until the kernel ends a connection that takes nothing, pings included
REGISTER_TIMEOUT = 30  # s for a client to register
STOP_TIMEOUT = 12  # s for the relay to stop, whatever its clients do
CHECK_TIMEOUT = 10  # s until a check has failed
REFUSAL_INTERVAL = 60  # s between log lines on what one connection is refused; all are counted
MAX_DIGITS = 100  # characters of a number, which no field takes and peers may not read
NATS_REQUEST_TIMEOUT = 2  # s for another relay to answer
SUBSCRIPTION_PROPAGATION = 0.05  # s until all NATS servers know of a new subscription
NEVER = float('inf')  # s
NATS_HEARTBEAT = 0.5  # s between pings to NATS, and between attempts to connect
CLAIM_BEATS = 120  # heartbeats between claims: a split of NATS servers ends without a sign
CLAIM_SIZE = 2**12  # bytes of NATS' max_payload for each claim in a batch; most take 160
UPGRADE_TIMEOUT = 5  # s for a relay that is being upgraded to claim its clients again
DRAIN_TIMEOUT = 1  # s for messages in flight over NATS when the relay stops
MESSAGE_COST = 2**12  # bytes of memory for a message in flight over NATS, besides its text
MAX_IN_FLIGHT = 2**26  # bytes of all messages in flight over NATS
MAX_SHOWN = 64  # characters of a client's text that the log or an answer repeats
LIMITS: dict[str, Any] = {  # of a connection, as websockets names them
    'max_size': MAX_MESSAGE,
    'origins': None,
    'reuse_port': None,  # as asyncio names it
    'open_timeout': 10,
    'close_timeout': 10,
    # Slack for a laptop on a bad network: many clients never come back from a lost connection.
    'ping_interval': 30,
    'ping_timeout': 90,
}
NATS_OPTIONS: dict[str, Any] = {
    'name': 'relay.py',
    'allow_reconnect': False,
    'max_reconnect_attempts': -1,  # until it is connected
    'reconnect_time_wait': NATS_HEARTBEAT,
    'no_echo': True,
    # Each command is written before the next one. Otherwise nats-py 2.16 pings before it has
    # written that a subscription ends, and loses the messages that arrive after the pong.
    'pending_size': 1,
    'flush_timeout': NATS_REQUEST_TIMEOUT,
}

# ------------------------------------------------------------------------------- Messages


class MessageEncodeError(Exception):
    """Raised when a message cannot be encoded."""


class MessageDecodeError(Exception):
    """Raised when a text is not a message; says why, to one who understands `response_type`."""

    def __init__(self, reason: str, response_type: str = 'server_response') -> None:
        super().__init__(reason)
        self.response_type = response_type


@dataclass
class Message:
    """Base of the three messages."""


@dataclass
class ServerRegistration(Message):
    """Asks to be known under a UUID; `message_type` tells the client's generation."""

    name: str
    uuid: UUID
    message_type: str = 'server_registration'


@dataclass
class ServerResponse(Message):
    """Tells a client that it is registered, or what was wrong."""

    success: bool = True
    message: str | None = None
    error: bool = False
    message_type: str = 'server_response'


@dataclass
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

A_UUID = 'a string that holds a UUID'
# By annotation of a field: what JSON gives for it, and how to ask for it.
FIELD_TYPES: dict[Any, Any] = {
    'str': (str, 'a string'),
    'str | None': ((str, type(None)), 'a string or null'),
    'bool': (bool, 'true or false'),
    'UUID': (str, A_UUID),
}
# By message_type: its class, and the name, types, words and default of each field.
FORMS = {
    name: (kind, [(f.name, *FIELD_TYPES[f.type], f.default) for f in fields(kind)])
    for name, kind in MESSAGE_TYPES.items()
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
    name: Any = None
    try:
        if not isinstance(text, str):
            raise ValueError('a message comes in a text frame, not in a binary one')
        # This takes three quarters of the time, but no space before or after it.
        data, end = _decoder.raw_decode(text) if text.startswith('{') else (None, -1)
        if end < len(text):
            data = _decoder.decode(text)
        if not isinstance(data, dict):
            raise ValueError('a message is a JSON object')
        name = data.get('message_type')
        if not isinstance(name, str) or name not in MESSAGE_TYPES:
            raise ValueError(f'message_type must be one of {", ".join(MESSAGE_TYPES)}')
        kind, form = FORMS[name]
        values = []
        for key, types, expected, default in form:
            value = data.get(key, default)
            if not isinstance(value, types):
                raise ValueError(f'{key} must be {expected}')
            values.append(_uuid(key, value) if expected is A_UUID else value)
        return kind(*values)
    except RecursionError:
        reason = 'nested too deep'
    except json.JSONDecodeError as error:
        reason = f'not JSON: {error}'
    except ValueError as error:
        reason = str(error)
    generation = 'relay' if str(name).startswith('relay_') else 'server'
    raise MessageDecodeError(reason, f'{generation}_response')


# Most are those of the same few peers; others than the usual form may be long.
_known = lru_cache(4096)(UUID)


def _uuid(key: str, value: str) -> UUID:
    try:
        return _known(value) if len(value) == 36 else UUID(value)
    except ValueError:
        raise ValueError(f'{key} must be {A_UUID}, not {shown(value)}') from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a key that comes twice, the relay might read one value and the peer the other.
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError('a key comes twice in one object')
    return data


def _number(text: str) -> float:
    if len(text) > MAX_DIGITS or text[-1].isalpha():
        raise ValueError(f'{shown(text)} is NaN, Infinity or too long for a number')
    return float(text)


_decoder = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_number, parse_float=_number, parse_int=_number
)


def shown(text: str) -> str:
    """Return a text that a client chose as the log may hold it: quoted, ASCII and short."""
    return ascii(text[:MAX_SHOWN]) + ('...' if len(text) > MAX_SHOWN else '')


# ------------------------------------------------------------------------------- Relay

WELCOME = 'This is a relay for WebRTC peers. Connect to it with a WebSocket: ws:// or wss://.\n'
UNWELCOME = 'This relay asks for a token.\n'
# Why a message is not forwarded, by the name under which it is counted.
UNFORWARDED = {
    'unknown_peer': 'this peer is unknown',
    'forged_source': "source_uuid is not the sender's",
    'backlog': 'this peer does not read what is sent to it',
    'too_long': 'it is too long to go from relay to relay',
    'disconnected': 'the relays are disconnected',
}
# What ProxyStore's relay says, and its endpoints show to their users.
DISPLACED = 'Relay received a registration with the same ID. '
DISPLACED += 'This might mean that the endpoint is running in multiple locations.'


@dataclass(eq=False, repr=False)  # asyncio may log one, and not what its client chose
class Client:
    """A connection and, once it has registered, its name and UUID.

    This one is served by `websockets.asyncio.server.serve`; `serve` below has Connection.
    """

    name: str
    uuid: UUID | None
    websocket: Any
    user: str = ''
    address: str = 'unknown address'
    response_type: str = 'server_response'
    pending: int = 0  # bytes that its connection is about to write
    due: float = 0.0  # when it may send its next message, where there is a rate
    deadline: asyncio.TimerHandle | None = None  # until which it must have registered
    gone: asyncio.Future[None] | None = None  # what somebody waits for who wants its UUID
    closing: Any = None  # true, or the task that sees to it: what the client sends does nothing

    def __str__(self) -> str:
        user = f'user {shown(self.user)}, ' if self.user else ''
        return f'{self.uuid or "unregistered"} ({shown(self.name)}, {user}at {self.address})'

    def write(self, data: bytes) -> None:
        """Write a text, or nothing if the connection is closed, without waiting."""
        from websockets.asyncio.server import broadcast

        broadcast((self.websocket,), data.decode())

    def close(self, code: int, reason: str) -> None:
        """Close the connection, without waiting."""
        self.closing = asyncio.ensure_future(self.websocket.close(code, reason))


class RelayServer:
    """Registers clients and forwards messages between them.

    Serve it with `serve` below, or with `websockets.asyncio.server.serve(relay.handler, ...)` and,
    for tokens, its `process_request=relay.process_request`. Whatever decides is plain code without
    an `await`: nothing can come between a look-up and what is done with it.
    """

    def __init__(
        self, token_file: str | None = None, max_clients: int | None = None, rate: float = RATE
    ) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_clients = max_clients or max(1, files - SPARE_FILES)
        self._rate = rate
        self._token_file = token_file
        self.tokens = None if token_file is None else read_tokens(token_file)
        # All connections, and the registry: those that are registered, by user and UUID.
        self._websocket_to_client: dict[Any, Client] = {}
        self._uuid_to_client: dict[tuple[str, UUID | None], Client] = {}
        # For the operator: since when, until when the certificate holds, what happened how often.
        self.started = time.time()
        self.expiry: float | None = None
        self.counts = dict.fromkeys(COUNTS, 0)
        self.refusals = dict.fromkeys(REFUSALS, 0)
        # Where other relays share the clients.
        self.backplane: Backplane | None = None
        # By source: when its last refusal was logged, and how many it had in all.
        self._refusals: dict[Any, tuple[float, int]] = {}
        self._takeovers = Counter[tuple[str, 'UUID | None']]()
        self._takeovers_end = 0.0

    def process_request(self, websocket: Any, request: Request) -> Response | None:
        """Answer what does not ask for a WebSocket, or shows no valid token where one is due."""
        headers: dict[str, str] = {}
        if request.path == '/healthz':
            status, text = (200, 'ok\n') if websocket.server.is_serving() else (503, 'stopping\n')
        elif 'Upgrade' not in request.headers:
            status, text, headers = 426, WELCOME, {'Upgrade': 'websocket'}
        elif user_of(request, self.tokens) is not None:
            return None
        else:
            address = address_of(websocket.remote_address)
            self.log_refusal('unauthorized', 401, address, 'no valid token')
            status, text, headers = 401, UNWELCOME, {'WWW-Authenticate': 'Bearer realm="relay"'}
        response: Response = websocket.respond(status, text)
        response.headers.update(headers)
        return response

    async def handler(self, websocket: Any) -> None:
        """Serve a connection of `websockets.asyncio.server.serve` until it ends."""
        client, ending = Client('', None, websocket), None
        _bound_buffers(websocket.transport.get_extra_info('socket'))
        self.enter(client, websocket.request)
        try:
            while True:
                text = await websocket.recv()
                if not client.closing:
                    waiting = self.receive(client, text)
                    await (asyncio.wait({waiting}) if waiting else asyncio.sleep(0))
                    await asyncio.sleep(self.pace(client))
        except ConnectionClosed as error:
            ending = error
        finally:
            self.leave(client, ending)

    def enter(self, client: Client, request: Request | None) -> None:
        """Take in a new connection, or close it if it must not or cannot be served."""
        client.address = address_of(client.websocket.remote_address)
        user = user_of(request, self.tokens)
        if user is None or len(self._websocket_to_client) >= self._max_clients:
            # Not an HTTP error when full: clients end of one, and come back after 1013.
            code, reason = (1008, 'no valid token') if user is None else (1013, 'no room')
            kind = 'unauthorized' if user is None else 'full'
            self.log_refusal(kind, code, client.address, reason)
            return client.close(code, reason)
        client.user = user
        self._websocket_to_client[client.websocket] = client
        late = f'no registration within {REGISTER_TIMEOUT} s'
        loop = asyncio.get_running_loop()
        client.deadline = loop.call_later(REGISTER_TIMEOUT, self._close, client, 1008, late)

    def leave(self, client: Client, error: ConnectionClosed | None) -> None:
        """Have nothing left of a client whose connection has ended, in the way the error tells."""
        if self._websocket_to_client.pop(client.websocket, None) is None:
            return
        reason = 'the relay has stopped' if error is None else self._ending(client, error)
        self._remove(client, reason)
        self._refusals.pop(client, None)
        if client.gone is not None:
            client.gone.cancel()

    def _ending(self, client: Client, error: ConnectionClosed) -> str:
        """Return how a connection ended, for the log; log it at once if it was refused."""
        if error.sent is None or error.rcvd_then_sent:
            if error.rcvd is None:
                return 'connection lost'
            reason = f': {shown(error.rcvd.reason)}' if error.rcvd.reason else ''
            return f'closed with {error.rcvd.code}{reason}'
        code, reason = error.sent.code, error.sent.reason
        late = 'unauthorized' if client.uuid else 'never_registered'
        kinds = {1002: 'malformed', 1007: 'malformed', 1008: late, 1009: 'too_large'}
        if code in kinds:
            self.log_refusal(kinds[code], client.uuid and client, client, f'{reason} ({code})')
        # The other reason for 1011 is a defect of ours.
        self.counts['pings_given_up'] += code == 1011 and 'ping' in reason
        return f'closed by the relay with {code}' + (f': {reason}' if reason else '')

    def pace(self, client: Client) -> float:
        """Return the seconds that a client has to wait with its next message."""
        if not self._rate:
            return 0
        now = time.monotonic()
        client.due = max(client.due, now - BURST) + 1 / self._rate
        self.refusals['rate_paced'] += client.due > now
        return max(0, client.due - now)

    def receive(self, client: Client, text: str | bytes) -> asyncio.Future[None] | None:
        """Deal with a client's message; return what the next one has to wait for, if anything."""
        try:
            message = decode(text)
        except MessageDecodeError as error:
            if client.uuid is None:
                client.response_type = error.response_type
            self._refuse(client, str(error))
            return None
        if isinstance(message, ServerRegistration):
            return self._register(client, message)
        if isinstance(message, PeerConnection):
            self._connect(client, message, str(text))
        else:
            self._refuse(client, 'a response is for the relay to send')
        return None

    async def register(self, websocket: Any, request: ServerRegistration) -> None:
        """Register a client and answer it, displacing whoever holds its UUID."""
        waiting = self._register(self._websocket_to_client[websocket], request)
        if waiting is not None:
            await asyncio.wait({waiting})

    def _register(
        self, client: Client, request: ServerRegistration
    ) -> asyncio.Future[None] | None:
        holder = self._uuid_to_client.get((client.user, request.uuid))
        if client.uuid == request.uuid:
            self._send(client, ServerResponse(message_type=client.response_type))
        elif client.uuid is not None:
            self._refuse(client, f'this connection is already registered as {client.uuid}')
        elif holder is None:
            self._admit(client, request)
        else:
            loop = asyncio.get_running_loop()
            holder.gone = loop.create_future()
            holder.gone.add_done_callback(lambda _: self._admit(client, request))
            loop.call_later(TAKEOVER_WAIT, holder.gone.cancel)
            self.displace(holder, client.address)
            return holder.gone
        return None

    def _admit(self, client: Client, request: ServerRegistration) -> None:
        if client.websocket.state is not OPEN:
            return
        # Whoever has taken the UUID meanwhile is displaced as well.
        key = (client.user, request.uuid)
        if key in self._uuid_to_client:
            self.displace(self._uuid_to_client[key], client.address)
        if client.deadline is not None:
            client.deadline.cancel()
            client.deadline = None
        client.name, client.uuid = request.name, request.uuid
        client.response_type = request.message_type.replace('registration', 'response')
        self._uuid_to_client[key] = client
        self.counts['registrations'] += 1
        if self.backplane is not None:
            self.backplane.announce(client)
        # Nothing is forwarded to it before this.
        self._send(client, ServerResponse(message_type=client.response_type))
        logger.info('Registered %s', client)

    def displace(self, client: Client, by: str) -> None:
        """Close a client whose UUID was registered again, by a client at this address."""
        self.counts['displaced_registrations'] += 1
        now, key = time.monotonic(), (client.user, client.uuid)
        if now >= self._takeovers_end:
            self._takeovers.clear()
            self._takeovers_end = now + REFUSAL_INTERVAL
        self._takeovers[key] += 1
        if self._takeovers[key] == 3:
            logger.warning(
                'UUID %s is registered again and again by %s and %s; two endpoints probably share '
                'one configuration: give one of them a new UUID',
                client.uuid,
                client.address,
                by,
            )
        self._close(client, 4004 if client.response_type == 'relay_response' else 1001, DISPLACED)

    def _close(self, client: Client, code: int, reason: str) -> None:
        """Remove a registration at once, and close its connection."""
        self._remove(client, f'closed by the relay with {code}: {reason}')
        client.close(code, reason)

    async def unregister(self, websocket: Any, expected: bool) -> None:
        """Remove a registration and close its connection: with 1000, or as displaced."""
        client = self._websocket_to_client.get(websocket)
        if client is not None:
            self._close(client, 1000, '') if expected else self.displace(client, 'unregister')

    def _remove(self, client: Client, reason: str) -> None:
        if client.deadline is not None:
            client.deadline.cancel()
        # The UUID may never have been this connection's, or have become another's.
        if self._uuid_to_client.get((client.user, client.uuid)) is client:
            del self._uuid_to_client[client.user, client.uuid]
            if self.backplane is not None:
                self.backplane.withdraw(client)
            logger.info('Unregistered %s: %s', client, reason)

    async def connect(self, websocket: Any, message: PeerConnection) -> None:
        """Forward a message, or send it back with an error."""
        self._connect(self._websocket_to_client[websocket], message, encode(message))

    def _connect(self, client: Client, message: PeerConnection, text: str) -> None:
        if client.uuid is None:
            return self._refuse(client, 'client has not registered yet')
        if message.source_uuid != client.uuid:
            kind: str | None = 'forged_source'
        elif self.backplane is None:
            kind = self.deliver(client.user, message.peer_uuid, text.encode())
        else:
            kind = self.backplane.forward(client, message, text.encode())
        if kind is not None:
            self.send_back(client, message, kind)

    def send_back(self, client: Client, message: PeerConnection, kind: str) -> None:
        """Send a message back with its error, which is one of UNFORWARDED."""
        reason = UNFORWARDED[kind]
        self.log_refusal(kind, client, client, f'message to {message.peer_uuid}: {reason}')
        error = f'Cannot forward peer connection message to peer {message.peer_uuid} '
        answer = replace(message, error=f'{error}because {reason}.')
        # With the error, and escapes for what is not ASCII, it may be too long for its sender.
        if len(encode(answer)) > MAX_MESSAGE:
            answer = replace(answer, source_name='', description_type='', description='')
        self._send(client, answer)

    def deliver(self, user: str, uuid: UUID, data: bytes) -> str | None:
        """Write a text to a peer that is here, or return which of UNFORWARDED it is."""
        peer = self._uuid_to_client.get((user, uuid))
        # A connection that is being closed, or lost, would lose the message without a word.
        if peer is None or peer.websocket.state is not OPEN:
            return 'unknown_peer'
        try:
            backlog = peer.pending + peer.websocket.transport.get_write_buffer_size()
        except AttributeError:  # so a TLS connection is lost in Python 3.9 and 3.10
            return 'unknown_peer'
        if backlog and backlog + len(data) > MAX_BACKLOG:
            return 'backlog'
        peer.write(data)
        self.counts['forwarded_messages'] += 1
        self.counts['forwarded_bytes'] += len(data)
        logger.debug('Forwarded to %s', uuid)
        return None

    async def send(self, websocket: Any, message: Message) -> None:
        """Send a message to a connection, or nothing if it is closed."""
        self._send(self._websocket_to_client[websocket], message)

    def _send(self, client: Client, message: Message) -> None:
        client.write(encode(message).encode())

    def _refuse(self, client: Client, reason: str) -> None:
        """Answer what is not a message, or not in its place, with the reason."""
        # One source for all that are not registered: they come as often as they like.
        self.log_refusal('malformed', client.uuid and client, client, reason)
        self._send(client, ServerResponse(False, reason, True, client.response_type))

    def log_refusal(self, kind: str, source: Any, who: Any, reason: str) -> None:
        """Count a refusal, and log it unless its source had one logged lately."""
        self.refusals[kind] += 1
        logged, count = self._refusals.get(source, (float('-inf'), 0))
        now = time.monotonic()
        if now - logged >= REFUSAL_INTERVAL:
            logged = now
            logger.warning('Refused %s: %s (%d times so far)', who, reason, count + 1)
        self._refusals[source] = (logged, count + 1)

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log in one line that newcomers have to wait until there are files for them again."""
        error = context.get('exception')
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            self.log_refusal('full', errno.EMFILE, 'newcomers for a second', error.strerror or '')
        else:
            loop.default_exception_handler(context)

    def reload(self, tls: ssl.SSLContext | None, certfile: str, keyfile: str | None) -> None:
        """Read tokens and certificate again, both or neither; close clients whose user is gone."""
        notify('RELOADING=1', f'MONOTONIC_USEC={time.monotonic_ns() // 1000}')
        try:
            tokens = self._token_file and read_tokens(self._token_file)
            if tls is not None:
                # A pair that does not match would leave the context in use with neither.
                _tls(certfile, keyfile)
                tls.load_cert_chain(certfile, keyfile, password=str)
                self.expiry = expiry_of(certfile)
        except (StartError, OSError) as error:
            logger.error('Reloaded nothing: %s', error)
            return
        finally:
            notify('READY=1')
        if tokens:
            self.tokens = tokens
            users = set(tokens.values())
            for client in self._websocket_to_client.values():
                if client.user not in users:
                    self._close(client, 1008, 'no valid token')
        logger.info('Reloaded')


def address_of(address: Any) -> str:
    """Return the address of a socket in one word."""
    if not isinstance(address, tuple):
        return 'unknown address'
    return f'[{address[0]}]:{address[1]}' if ':' in address[0] else f'{address[0]}:{address[1]}'


def _bound_buffers(sock: Any) -> None:
    """Have the kernel end a connection whose peer has stopped reading, and read little ahead."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    if hasattr(socket, 'TCP_USER_TIMEOUT') and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_TIMEOUT)


# ------------------------------------------------------------------------------- Connection


class Connection(Client, asyncio.BufferedProtocol):
    """A client served by `serve`: websockets' sans-I/O protocol between transport and relay.

    What comes is dealt with as it comes. While the client has to wait, for its rate, for a UUID or
    for the answers it has not read, what has come is held and nothing more is read.
    """

    transport: asyncio.Transport

    def __init__(self, server: Listener) -> None:
        super().__init__('', None, self)
        self.server, self.relay = server, server.relay
        origins, max_size = server.limits['origins'], server.limits['max_size']
        self.protocol = ServerProtocol(origins=origins, max_size=max_size)
        # What has come and is held, its frames the last first; the fragments of a message.
        self.input, self.events, self.parts = b'', list[Any](), list[Frame]()
        self.held = self.pongs = 0
        self.opened = self.ending = False
        self.heard = self.pinged = time.monotonic()

    @property
    def state(self) -> State:
        return self.protocol.state

    def respond(self, status: int, text: str) -> Response:
        """Return an answer to a request that is not to be accepted."""
        return self.protocol.reject(status, text)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(MAX_BACKLOG)
        self.remote_address = transport.get_extra_info('peername')
        self.server.connections[self] = None
        self.timer = self._later('open_timeout')

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where to put what comes: one place for all, since it is dealt with at once."""
        return self.server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.input += self.server.buffer[:nbytes]
        # A TLS hello, which the protocol would take for the beginning of a line.
        if not self.opened and self.input.startswith(b'\x16'):
            return self.transport.abort()
        self.heard = time.monotonic()
        # To the end: the least recently heard come first.
        self.server.connections.move_to_end(self)
        self._deal()

    def eof_received(self) -> None:
        self.protocol.receive_eof()
        # TLS may end while there is input that is held.
        self.input = b''
        self.flush()
        # What is still to be written may never be read.
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()
        self.input, self.events = b'', []
        self.protocol.receive_eof()
        self.server.forget(self)
        self.relay.leave(self, self.protocol.close_exc)
        if not self.opened:
            logger.debug('No handshake from %s', address_of(self.remote_address))

    def write(self, data: bytes) -> None:
        if self.protocol.state is OPEN:
            self.protocol.send_text(data)
            if not self.pending:
                self.server.flush_soon(self)
            self.pending += len(data)

    def close(self, code: int, reason: str) -> None:
        self.closing = True
        if self.state is OPEN:
            self.protocol.send_close(code, reason)
            self.flush()
        # It is to be heard when it answers that.
        self.held = 0
        self._release()

    def keep_alive(self, now: float) -> None:
        """Ping a client that has not been heard for long, or give it up."""
        if self.held or self.state is not OPEN:
            return
        if self.pinged <= self.heard:
            self.pinged = now
            self.protocol.send_ping(b'')
        elif now - self.pinged > self.server.limits['ping_timeout']:
            self.protocol.fail(1011, 'keepalive ping timeout')
        self.flush()

    def _later(self, limit: str) -> asyncio.TimerHandle:
        return self.server.loop.call_later(self.server.limits[limit], self.transport.abort)

    def _hold(self) -> None:
        self.held += 1
        self.transport.pause_reading()

    def _release(self, _: Any = None) -> None:
        self.held = max(0, self.held - 1)
        if not self.held:
            with contextlib.suppress(AttributeError):  # as in deliver
                self.transport.resume_reading()
            self._deal()

    # Of a client that does not read, no more is read.
    pause_writing, resume_writing = _hold, _release

    def _deal(self) -> None:
        while not self.held and (self.events or self.input):
            if self.events:
                self._take(self.events.pop())
                continue
            # In pieces: many pings would cost much at once, many messages much memory. A request
            # to its end, which may have begun: what follows is a frame only once it is accepted.
            size = MAX_PONGS
            if not (self.opened or self.ending):
                line, end = self.input.find(b'\n') + 1, self.input.find(b'\r\n\r\n')
                size = end + 4 if line > 2 and end > 0 else line or MAX_PONGS
            piece, self.input = self.input[:size], self.input[size:]
            self.protocol.receive_data(piece)
            self.events = self.protocol.events_received()[::-1]
            self.flush()

    def flush(self) -> None:
        """Write what the protocol has to say."""
        self.pending = 0
        writes = self.protocol.data_to_send()
        if any(writes):
            self.transport.write(b''.join(writes))
        if b'' in writes:  # for the end
            if self.transport.can_write_eof():
                with contextlib.suppress(OSError):  # the client has reset the connection
                    self.transport.write_eof()
            else:
                self.transport.close()
        if self.protocol.close_expected():
            self._end()

    def _end(self) -> None:
        if not self.ending:
            self.ending = True
            self.timer.cancel()
            self.timer = self._later('close_timeout')

    def _take(self, event: Any) -> None:
        if isinstance(event, Request):
            return self._open(event)
        if event.opcode is PING:
            # It is answered whether that is read or not.
            unread = self.transport.get_write_buffer_size()
            self.pongs = self.pongs + 2 + len(event.data) if unread else 0
            if self.pongs > MAX_PONGS:
                return self.transport.abort()
        if self.closing or event.opcode is CLOSE:
            return
        if event.opcode is not PING and event.opcode is not PONG:
            self._put_together(event)
        wait = self.relay.pace(self)
        if wait:
            self._hold()
            self.server.loop.call_later(wait, self._release)

    def _open(self, request: Request) -> None:
        response = self.server.answer(self, request)
        if response is None and not self.server.is_serving():
            response = self.respond(503, 'stopping\n')
        response = response or self.protocol.accept(request)
        self.protocol.send_response(response)
        self.flush()
        if self.state is OPEN:
            self.opened = True
            self.timer.cancel()
            self.relay.enter(self, request)
            request.headers.clear()  # the protocol keeps the request
        elif response.status_code == 403:
            who = address_of(self.remote_address)
            reason = f'no page of {shown(request.headers.get("Origin", ""))} may connect'
            self.relay.log_refusal('unauthorized', 403, who, reason)

    def _put_together(self, frame: Frame) -> None:
        """Have the relay deal with a message once its last fragment has come."""
        self.parts.append(frame)
        # In fragments of a byte each, one message could take 200 MB.
        if len(self.parts) > MAX_FRAGMENTS:
            return self._fail(1009, f'more than {MAX_FRAGMENTS} fragments')
        if not frame.fin:
            return
        parts, self.parts = self.parts, []
        data = bytes(frame.data) if len(parts) == 1 else b''.join([part.data for part in parts])
        try:
            text = data.decode() if parts[0].opcode is TEXT else data
            waiting = self.relay.receive(self, text)
            if waiting is not None:
                self._hold()
                waiting.add_done_callback(self._release)
        except UnicodeDecodeError as error:
            self._fail(1007, f'{error.reason} at position {error.start}')
        except Exception:
            logger.exception('A defect of the relay, met by %s', self)
            self._fail(1011, '')

    def _fail(self, code: int, reason: str) -> None:
        self.closing = True
        self.protocol.fail(code, reason)
        self.flush()


class Listener:
    """What serves a relay: sockets, their connections, and one keepalive for all of them."""

    def __init__(self, relay: RelayServer, answer: Any, limits: dict[str, Any]) -> None:
        self.relay, self.answer, self.limits = relay, answer, {**LIMITS, **limits}
        self.connections = OrderedDict[Connection, None]()  # the least recently heard first
        self.unflushed: list[Connection] = []
        self.buffer = memoryview(bytearray(RECEIVE_BUFFER))
        self.closed = asyncio.Event()

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None) -> Listener:
        """Listen on each address of a host; raises StartError."""
        more: Any = {'ssl_handshake_timeout': self.limits['open_timeout']} if tls else {}
        more.update(ssl=tls, reuse_port=self.limits['reuse_port'], start_serving=False)
        loop = self.loop = asyncio.get_running_loop()
        try:
            self.server = await loop.create_server(partial(Connection, self), host, port, **more)
            self.sockets, self.is_serving = self.server.sockets, self.server.is_serving
            for sock in self.sockets:  # connections inherit it, from the first on
                _bound_buffers(sock)
            await self.server.start_serving()
        except (OSError, ValueError) as error:
            # asyncio puts the address and a number before the reason.
            reason = str(error).rpartition('): ')[2].rpartition('] ')[2]
            raise StartError(f'cannot listen on {host}:{port}: {reason}') from error
        if self.limits['ping_interval']:
            self._sweep(self.limits['ping_interval'])
        return self

    def flush_soon(self, connection: Connection) -> None:
        """Have a connection write once what has come is dealt with: many messages at one go."""
        if not self.unflushed:
            self.loop.call_soon(self._flush)
        self.unflushed.append(connection)

    def _flush(self) -> None:
        try:
            while self.unflushed:
                self.unflushed.pop().flush()
        finally:
            if self.unflushed:  # a defect that one met is not to hold up the others
                self.loop.call_soon(self._flush)

    def _sweep(self, interval: float) -> None:
        if not self.closed.is_set():
            self.loop.call_later(min(1, interval / 4), self._sweep, interval)
        now = time.monotonic()
        quiet = itertools.takewhile(lambda c: c.heard <= now - interval, self.connections)
        for connection in list(quiet):
            connection.keep_alive(now)

    def forget(self, connection: Connection | None) -> None:
        """Have one connection less."""
        self.connections.pop(connection, None)  # type: ignore[arg-type]
        if not self.connections and not self.is_serving():
            self.closed.set()

    def close(self) -> None:
        """Take no more connections, and close those that there are."""
        self.server.close()
        for connection in list(self.connections):
            connection.close(1001, '')
        self.forget(None)


# ------------------------------------------------------------------------------- Access


class StartError(Exception):
    """Raised when the relay cannot start: one line that tells the operator what to mend."""


def read_tokens(path: str) -> dict[bytes, str]:
    """Return the tokens in a file: a line `user:token` each, comments after `#`, nothing else."""
    tokens: dict[bytes, str] = {}
    try:
        with open(path, encoding='utf-8-sig') as file:
            if os.fstat(file.fileno()).st_mode & 0o007:
                logger.warning('%s is open to every user of this machine', path)
            # A token may hold a #, which begins a comment only after a space.
            lines = [f' {line}'.partition(' #')[0].strip() for line in file]
    except (OSError, ValueError) as error:
        raise StartError(f'cannot read {path}: {getattr(error, "strerror", error)}') from error
    for number, line in enumerate(lines, 1):
        user, _, token = line.partition(':')
        if line and not (user and token and line.isprintable() and ' ' not in line):
            raise StartError(f'{path}, line {number}: not of the form user:token')
        if line and tokens.setdefault(_digest(token), user) != user:
            raise StartError(f'{path}, line {number}: the token of another user')
    if not tokens:
        raise StartError(f'{path} holds no line of the form user:token')
    return tokens


def user_of(request: Request | None, tokens: dict[bytes, str] | None) -> str | None:
    """Return whose token a request shows, None if nobody's, '' if no tokens are in use."""
    if request is None or tokens is None:
        return ''
    try:
        kind, _, value = ' '.join(request.headers.get_all('Authorization')).partition(' ')
        if kind.lower() == 'basic':
            named, _, token = base64.b64decode(value, validate=True).decode().partition(':')
            user = tokens.get(_digest(token))
            return user if user == named else None
        query = parse_qs(urlsplit(request.path).query)
        return tokens.get(_digest(value if kind.lower() == 'bearer' else query['token'][0]))
    except (KeyError, ValueError):
        return None


def _digest(token: str) -> bytes:
    # Tokens are looked up by this: the time it takes tells nothing about any of them.
    return hashlib.sha256(token.encode()).digest()


def _import_nats(credentials: str | None) -> Any:
    """Return the package of nats-py; raises StartError if it or the credentials cannot be used."""
    package = "'nats-py[nkeys]'" if credentials else 'nats-py'
    try:
        import nats.aio.client

        if credentials:
            importlib.import_module('nkeys')
            with open(credentials, 'rb') as file:
                if b'BEGIN USER NKEY SEED' not in file.read():
                    raise StartError(f'{credentials} holds no credentials for NATS')
    except ImportError as error:
        raise StartError(f'--nats: {error}; try: pip install {package}') from error
    except OSError as error:
        raise StartError(f'cannot read {credentials}: {error.strerror}') from error
    # It logs errors of its clean-up after a lost connection, which is replaced in any case.
    logging.getLogger('nats').setLevel(logging.CRITICAL)
    # Python 3.12 to 3.14.0 (gh-136234): writelines() on a lost connection, as nats-py does, may
    # register a descriptor that by then belongs to a client, who is never heard again.
    write: Any = lambda writer, pieces: writer.write(b''.join(pieces))  # noqa: E731
    asyncio.StreamWriter.writelines = write  # type: ignore[method-assign]
    return nats


# ------------------------------------------------------------------------------- Scale-out

# Connects clients of different relays over NATS; nothing here runs without --nats. The wire:
#   relay.client.USER.UUID: a request with messages for this client, separated by NUL bytes (no
#       JSON text contains any). Relays subscribe as a queue group, so NATS gives it to only one,
#       which replies for each message, separated by commas: nothing, or a key of UNFORWARDED.
#   relay.claims: {"version": 1, "claims": [[subject, stamp, id, age, address]], "upgrading": bool}
#       is heard by all relays; the last key says that the sender's clients will soon be back.
#
# How it may change: readers ignore additional keys and additional items at the end of a claim, and
# take an unknown verdict for "disconnected". Anything else needs another version, whose claims
# older relays ignore with a WARNING: all relays have to know it before the first one uses it.


class Claim(NamedTuple):
    """A client's claim to its UUID, in plain values; the highest (stamp, id) holds the UUID."""

    stamp: int  # ns, wall clock at registration, or higher to outbid an older client
    id: str  # unique; decides between equal stamps
    since: float  # s, monotonic clock at registration; on Linux the same in all processes


class Backplane:
    """A relay's connection to the other relays, and everything it has in flight there.

    Each client in `claims` is a NATS subscription, listed in `subscriptions` once it is made. If
    the connection fails in any way, a new one subscribes and claims all clients again.

    Messages to other relays wait in `queues`, one for each sender and peer. A queue sends a batch
    and waits for its verdicts, so messages stay in order and each has one outcome.
    """

    def __init__(self, relay: RelayServer, servers: list[str], credentials: str | None) -> None:
        self.relay, self.library = relay, _import_nats(credentials)
        self.faults = self.library.errors.Error, OSError, asyncio.TimeoutError
        self.options = {'servers': servers, 'user_credentials': credentials, **NATS_OPTIONS}
        self.nats: Any = None  # the connection, while there is one
        self.max_payload, self.round_trip = 0, 0.0  # bytes; s, to NATS and back
        self.logged: set[str] = set()  # faults logged since the last connection was made
        self.claims: dict[Client, Claim] = {}
        self.clients: dict[str, Client] = {}  # those in `claims`, by subject
        self.subscriptions: dict[Client, Any] = {}
        self.unclaimed: asyncio.Queue[Client] = asyncio.Queue()  # to subscribe and claim next
        self.upgrade_ends = 0.0  # s, monotonic clock: until then, another relay may be upgrading
        self.queues: dict[tuple[Client, UUID], deque[bytes]] = {}
        self.in_flight, self.total_in_flight = Counter[Client](), 0  # bytes
        self.tasks: set[asyncio.Future[Any]] = set()  # cancelled when the connection has failed
        self.unfinished: set[asyncio.Future[Any]] = set()  # those that close() waits for
        self.running = asyncio.ensure_future(self._run())

    @property
    def connected(self) -> bool:
        return self.nats is not None and bool(self.nats.is_connected)

    def gauges(self) -> dict[str, float]:
        """Return the state of the connection, by names of metrics."""
        names = 'relay_nats_connected', 'relay_nats_round_trip_seconds'
        return dict(zip(names, (int(self.connected), self.round_trip)))

    async def _run(self) -> None:
        while True:
            nats = self.library.NATS()  # a new one: it carries over state of a lost connection
            try:
                await nats.connect(error_cb=self._on_error, **self.options)
                await self._serve(nats)
            except Exception as error:
                self.nats = None
                await self._on_error(error)
            finally:
                self.nats = None
                # If the server does not read, close() lasts until the kernel gives up.
                closing = asyncio.gather(nats.close(), return_exceptions=True)
                await asyncio.wait({closing}, timeout=NATS_HEARTBEAT)
                for task in self.tasks:
                    task.cancel()
                # nats-py 2.16: after a connection reset, close() leaves their tasks running.
                for subscription in list(getattr(nats, '_subs', {}).values()):
                    subscription._stop_processing()
            await asyncio.sleep(NATS_HEARTBEAT)

    async def _serve(self, nats: Any) -> None:
        """Use a connection until it fails, which raises an exception."""
        await nats.subscribe('relay.claims', cb=self._on_claims)
        if not nats.is_connected:  # or never was: nats-py 2.16 may take other news for its pong
            raise ConnectionError('interrupted while connecting')
        # New objects: tasks of the last connection may still be using the old ones.
        self.subscriptions, self.unclaimed = {}, asyncio.Queue()
        self.nats, self.max_payload = nats, nats.max_payload
        self.logged.clear()
        logger.info('NATS is connected: %s', nats.connected_url.netloc.rpartition('@')[2])
        claiming = self._start(self._claim_clients(nats))
        for beat in itertools.count():
            # Again at the second beat, when all NATS servers know that this relay hears claims.
            for client in self.claims if beat == 1 or beat % CLAIM_BEATS == 0 else ():
                self.unclaimed.put_nowait(client)
            ping = self._start(nats.rtt(timeout=NEVER))  # nats-py 2.16 fails on a late answer
            for _ in range(4):  # in steps: if this process stalls, it still reads the answer
                await asyncio.wait({ping}, timeout=NATS_REQUEST_TIMEOUT / 4)
            if not ping.done():
                raise TimeoutError(f'no answer within {NATS_REQUEST_TIMEOUT} s')
            self.round_trip = ping.result()
            if claiming.done():
                claiming.result()
            await asyncio.sleep(NATS_HEARTBEAT)

    def _start(self, work: Any, *sets: set[asyncio.Future[Any]]) -> asyncio.Future[Any]:
        task: asyncio.Future[Any] = asyncio.ensure_future(work)
        for tasks in (self.tasks, *sets):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Future[Any]) -> None:
        # Faults are left to those who wait for the task, and to the heartbeat.
        if not task.cancelled() and not isinstance(task.exception(), (*self.faults, type(None))):
            logger.error('Internal error while using NATS', exc_info=task.exception())

    async def _on_error(self, error: BaseException) -> None:
        """Log a fault of NATS or the network in one line, and a bug here with its traceback."""
        # nats-py puts its name in front of its texts, and quotes subjects in some.
        text = str(error).partition('"')[0].rpartition('nats: ')[2].strip(" '")
        text = text or type(error).__name__
        if not isinstance(error, self.faults):
            logger.error('Internal error while using NATS', exc_info=error)
        elif text not in self.logged:
            self.logged.add(text)
            lost = '' if self.connected else '; clients of other relays cannot be reached'
            logger.warning('NATS: %s%s', text, lost)

    async def close(self, upgrading: bool = False) -> None:
        """Finish what is in flight, for up to DRAIN_TIMEOUT, and leave NATS; `claims` stay.

        If `upgrading`, other relays keep messages to unknown peers for these clients' return.
        """
        if self.connected and upgrading:
            notice = json.dumps({'version': 1, 'claims': [], 'upgrading': True})
            self._start(self.nats.publish('relay.claims', notice.encode()), self.unfinished)
        for subscription in self.subscriptions.values():
            self._start(subscription.drain(), self.unfinished)
        if self.connected and self.unfinished:
            await asyncio.wait(self.unfinished, timeout=DRAIN_TIMEOUT)
        while not self.running.done():  # nats-py may take a cancellation for one of its own
            self.running.cancel()
            await asyncio.wait({self.running}, timeout=2 * NATS_HEARTBEAT)
        if self.unfinished:  # cancelled: these messages come back
            await asyncio.wait(self.unfinished, timeout=NATS_REQUEST_TIMEOUT)

    def announce(self, client: Client, claim: Claim | None = None) -> None:
        """Subscribe to a client's messages and claim its UUID, with an earlier claim if given."""
        self.claims[client] = claim or Claim(time.time_ns(), uuid4().hex, time.monotonic())
        self.clients[_subject(client.user, client.uuid)] = client
        if self.connected:
            self.unclaimed.put_nowait(client)

    def withdraw(self, client: Client) -> None:
        """Unsubscribe from a client's messages."""
        del self.claims[client], self.clients[_subject(client.user, client.uuid)]
        if client in self.subscriptions:
            self._start(self.subscriptions.pop(client).drain(), self.unfinished)

    async def _claim_clients(self, nats: Any) -> None:
        """Subscribe and claim clients, in batches, whenever there are any to claim."""
        subscriptions, unclaimed = self.subscriptions, self.unclaimed
        while not nats.is_closed:
            batch, claims = [await unclaimed.get()], []
            while not unclaimed.empty() and len(batch) < nats.max_payload // CLAIM_SIZE:
                batch.append(unclaimed.get_nowait())
            for client in batch:
                subject = _subject(client.user, client.uuid)
                if client in self.claims and client not in subscriptions:
                    on_request = partial(self._on_request, nats, client)
                    subscriptions[client] = await nats.subscribe(subject, 'relays', on_request)
                if client in self.claims:
                    stamp, name, since = self.claims[client]
                    age = time.monotonic() - since
                    claims.append((subject, stamp, name, age, client.address))
                elif client in subscriptions:  # it left in the meantime
                    self._start(subscriptions.pop(client).drain(), self.unfinished)
            text = json.dumps({'version': 1, 'claims': claims})
            await nats.publish('relay.claims', text.encode())

    async def _on_claims(self, message: Any) -> None:
        batch, now = json.loads(message.data), time.monotonic()
        if batch['version'] != 1:
            raise ConnectionError('another relay makes claims of a version not known here')
        if batch.get('upgrading'):
            self.upgrade_ends = now + UPGRADE_TIMEOUT
        for subject, stamp, name, age, address, *_ in batch['claims']:
            if subject in self.clients:
                self._compare(self.clients[subject], Claim(stamp, name, now - age), address)

    def _compare(self, client: Client, claim: Claim, address: str) -> None:
        # A registers at relay 1, and 5 s later at relay 2. Relay 1 hears a higher stamp of a
        # younger client, and displaces its own. If the clock of relay 2 is slow by more than that,
        # relay 1 hears a lower stamp and answers with its claim. Relay 2 hears a higher stamp, but
        # of an older client: it outbids the stamp, and relay 1 displaces its client after all. A
        # claim does not age on its way, so where clocks differ, a late one may win.
        own = self.claims[client]
        if claim.id == own.id:  # made by this relay before an upgrade
            return
        if claim[:2] > own[:2] and claim.since >= own.since:
            self.relay.displace(client, f'{address} (on another relay)')
        else:
            self.claims[client] = own._replace(stamp=max(own.stamp, claim.stamp + 1))
            self.unclaimed.put_nowait(client)

    def forward(self, client: Client, message: PeerConnection, data: bytes) -> str | None:
        """Forward a message or return why not; what another relay refuses is sent back later."""
        key, size = (client, message.peer_uuid), len(data) + MESSAGE_COST
        if key not in self.queues:
            kind = self.relay.deliver(client.user, message.peer_uuid, data)
            if kind != 'unknown_peer':
                return kind
        if not self.connected or self.total_in_flight + size > MAX_IN_FLIGHT:
            return 'disconnected'
        if len(data) > self.max_payload:
            return 'too_long'
        if self.in_flight[client] and self.in_flight[client] + size > MAX_BACKLOG:
            return 'backlog'
        self._count(client, size)
        if key not in self.queues:
            self.queues[key] = deque()
            self._start(self._send_queue(*key), self.unfinished)
        self.queues[key].append(data)
        return None

    def _count(self, client: Client, size: int) -> None:
        self.total_in_flight += size
        self.in_flight[client] += size
        if not self.in_flight[client]:
            del self.in_flight[client]

    async def _send_queue(self, client: Client, uuid: UUID) -> None:
        queue = self.queues[client, uuid]
        while queue:
            batch, room = [queue.popleft()], self.max_payload
            while queue and len(queue[0]) < (room := room - len(batch[-1]) - 1):
                batch.append(queue.popleft())
            verdicts: list[str | None] = ['disconnected'] * len(batch)
            with contextlib.suppress(asyncio.CancelledError):  # when the connection has failed
                try:
                    verdicts = await self._send_batch(client.user, uuid, batch)
                except Exception as error:
                    await self._on_error(error)
            if 'disconnected' in verdicts:
                # It may have arrived, or still arrive: nothing is sent that could overtake it.
                verdicts += ['disconnected'] * len(queue)
                batch += queue
                queue.clear()
            for data, kind in zip(batch, verdicts):
                self._count(client, -len(data) - MESSAGE_COST)
                if kind is not None and client.websocket.state is OPEN:
                    message: Any = decode(data.decode())
                    self.relay.send_back(client, message, kind)
        del self.queues[client, uuid]

    async def _send_batch(self, user: str, uuid: UUID, batch: list[bytes]) -> list[str | None]:
        """Return the verdict for each message; try again while none can have arrived."""
        deadline, misses = time.monotonic() + NATS_REQUEST_TIMEOUT, 0
        while self.connected and (left := deadline - time.monotonic()) > SUBSCRIPTION_PROPAGATION:
            # It may have registered here in the meantime.
            verdicts = [self.relay.deliver(user, uuid, data) for data in batch]
            if verdicts[0] != 'unknown_peer':
                return verdicts
            try:
                reply = await self.nats.request(_subject(user, uuid), b'\0'.join(batch), left)
                # A relay that has just lost the client to another says 'unknown_peer'.
                if not reply.data.startswith(b'unknown_peer'):
                    return self._read_verdicts(reply.data, len(batch))
                misses = 0
            except self.library.errors.NoRespondersError:
                misses += 1
            except AssertionError:  # nats-py 2.16: its first request, and the connection failed
                break
            if misses > 1 and time.monotonic() > self.upgrade_ends:
                self.relay.counts['remote_unknown'] += len(batch)
                return ['unknown_peer'] * len(batch)
            await asyncio.sleep(SUBSCRIPTION_PROPAGATION)
        return ['disconnected'] * len(batch)

    def _read_verdicts(self, reply: bytes, count: int) -> list[str | None]:
        verdicts = [kind or None for kind in reply.decode(errors='replace').split(',')]
        if len(verdicts) != count or not {None, *UNFORWARDED}.issuperset(verdicts):
            raise ConnectionError('another relay gave a verdict not known here')
        self.relay.counts['remote_messages'] += verdicts.count(None)
        return verdicts

    async def _on_request(self, nats: Any, client: Client, message: Any) -> None:
        if message.reply and client.uuid:
            data = message.data.split(b'\0')
            verdicts = [self.relay.deliver(client.user, client.uuid, text) for text in data]
            await message.respond(','.join(kind or '' for kind in verdicts).encode())
        if nats.is_closed:  # nats-py 2.16 may have ignored a cancellation, and would go on
            raise asyncio.CancelledError


def _subject(user: str, uuid: UUID | None) -> str:
    # In hexadecimal, because some characters have a meaning in subjects.
    return f'relay.client.{user.encode().hex() or "-"}.{uuid}'


# ------------------------------------------------------------------------------- Operations

# What is counted.
COUNTS = ['registrations', 'displaced_registrations', 'pings_given_up']
COUNTS += ['forwarded_messages', 'forwarded_bytes', 'remote_messages', 'remote_unknown']
# What is refused or, at `rate_paced`, held up: counted by these reasons.
REFUSALS = [*UNFORWARDED, 'malformed', 'too_large', 'rate_paced', 'never_registered']
REFUSALS += ['unauthorized', 'full']


def metrics(relay: RelayServer) -> str:
    """Return how the relay does, in Prometheus' text format."""
    versions = f'version="{__version__}",websockets="{websockets_version}"'
    clients = [client.response_type for client in relay._uuid_to_client.values()]
    values: dict[str, float] = {
        f'relay_build_info{{{versions},python="{sys.version.split()[0]}"}}': 1,
        'relay_uptime_seconds': time.time() - relay.started,
        'relay_connected_clients': len(relay._websocket_to_client),
        'relay_registered_clients{generation="server"}': clients.count('server_response'),
        'relay_registered_clients{generation="relay"}': clients.count('relay_response'),
        **{f'relay_{name}_total': count for name, count in relay.counts.items()},
        **{f'relay_refusals_total{{reason="{k}"}}': n for k, n in relay.refusals.items()},
        'process_start_time_seconds': relay.started,
        'process_cpu_seconds_total': time.process_time(),
        'process_max_fds': resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    if relay.backplane is not None:
        values.update(relay.backplane.gauges())
    if relay.expiry is not None:
        values['relay_certificate_expiry_timestamp_seconds'] = relay.expiry
    with contextlib.suppress(OSError), open('/proc/self/statm') as file:
        values['process_open_fds'] = len(os.listdir('/proc/self/fd'))
        pages = int(file.read().split()[1])
        values['process_resident_memory_bytes'] = pages * resource.getpagesize()
    text = ''
    for name, value in values.items():
        family = name.partition('{')[0]
        kind = 'counter' if family.endswith('_total') else 'gauge'
        head = f'# HELP {family} {family.replace("_", " ")}\n# TYPE {family} {kind}\n'
        text += f'{"" if head in text else head}{name} {value}\n'
    return text


def expiry_of(certfile: str) -> float:
    """Return when the first certificate in a file ends, in seconds since 1970."""
    with open(certfile, encoding='latin-1') as file:
        pem = file.read().partition('CERTIFICATE-----')[2].partition('-----END')[0]
    # The standard library tells this only of certificates that it trusts. Two dates stand in one,
    # its beginning and its end, with two or four digits of the year.
    dates = re.findall(rb'(?:\x17\r|\x18\x0f)(\d{12,14})Z', base64.b64decode(pem))
    end = (b'20' + dates[1])[-14:].decode()
    return datetime.datetime.strptime(f'{end}+0000', '%Y%m%d%H%M%S%z').timestamp()


def notify(*states: str) -> None:
    """Tell systemd, where it asked to be told."""
    path = os.environ.get('NOTIFY_SOCKET')
    if not path:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        # The name of an abstract socket begins with a null byte, for which an @ stands.
        sock.connect('\0' + path[1:] if path[0] == '@' else path)
        sock.send('\n'.join(states).encode())


def beat(relay: RelayServer) -> None:
    """Tell systemd, twice in each period of its watchdog, that and how the relay lives."""
    clients, messages = len(relay._uuid_to_client), relay.counts['forwarded_messages']
    uptime = datetime.timedelta(seconds=int(time.time() - relay.started))
    status = f'STATUS={clients:,} clients, {messages:,} messages forwarded, up {uptime}'
    notify('WATCHDOG=1', status)
    period = int(os.environ.get('WATCHDOG_USEC') or 60_000_000) / 1_000_000
    asyncio.get_running_loop().call_later(period / 2, beat, relay)


class _JournalFormatter(logging.Formatter):
    """Begins each line with its level, as the journal reads it; the journal knows the time."""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines()
        return '\n'.join(f'<{LEVELS[record.levelname]}>{line}' for line in lines)


# ------------------------------------------------------------------------------- Server


async def serve(
    host: str, port: int, certfile: str | None = None, keyfile: str | None = None, **options: Any
) -> None:
    """Serve a relay until SIGINT or SIGTERM; SIGHUP reads tokens and certificate again.

    `options`: `relay`, a RelayServer, and what goes before LIMITS. Raises StartError.
    """
    relay: RelayServer = options.pop('relay', None) or RelayServer()
    metrics_port, nats = options.pop('metrics_port', None), options.pop('nats', None)
    tls = None
    if certfile is not None:
        tls, relay.expiry = _tls(certfile, keyfile), expiry_of(certfile)
    if nats:
        options['reuse_port'] = True  # for several relays on one machine
        relay.backplane = Backplane(relay, *nats)
    stop = _signals(relay, tls, certfile, keyfile)
    servers = [await Listener(relay, relay.process_request, options).listen(host, port, tls)]
    for sock in servers[0].sockets:
        logger.info('Serving relay server on %s', address_of(sock.getsockname()))
    if metrics_port is not None:
        own = Listener(relay, lambda websocket, _: websocket.respond(200, metrics(relay)), {})
        servers.append(await own.listen('127.0.0.1', metrics_port, None))
        logger.info('Serving metrics on %s', address_of(servers[1].sockets[0].getsockname()))
    if relay.tokens is None:
        logger.warning('No --token-file: whoever can reach this relay can use it')
    if 'NOTIFY_SOCKET' in os.environ:
        beat(relay)
    notify('READY=1')
    await stop.wait()
    notify('STOPPING=1')
    if relay.backplane is not None:
        await relay.backplane.close()
    await _stop(servers)


def _signals(relay: RelayServer, *files: Any) -> asyncio.Event:
    """Have signals stop the relay, which sets the event that is returned, and reload it."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(relay.on_loop_error)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGHUP, relay.reload, *files)
    return stop


async def _stop(servers: list[Listener]) -> None:
    for server in servers:
        server.close()
    # A client that neither reads nor closes must not hold up the end.
    closed = [asyncio.ensure_future(server.closed.wait()) for server in servers]
    await asyncio.wait(closed, timeout=STOP_TIMEOUT)
    logger.info('Server closed')


def _tls(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    path, content = certfile, 'certificate'
    try:
        # The errors of load_cert_chain do not name a file: see first what each one holds.
        ssl.create_default_context(cafile=certfile)
        path, content = keyfile or certfile, 'private key without a password'
        with open(path, 'rb'):
            # For a password it would ask on the terminal.
            context.load_cert_chain(certfile, keyfile, password=str)
    except ssl.SSLError as error:
        fault = f'{path}: no {content} in PEM format ({error.reason or error})'
        if error.reason == 'KEY_VALUES_MISMATCH':
            fault = f'the key in {path} is not that of {certfile}'
        raise StartError(fault) from error
    except OSError as error:
        raise StartError(f'cannot read {path}: {error.strerror}') from error
    return context


# ------------------------------------------------------------------------------- Check

# What a check may fail with, the first that fits, and where to look.
FAILURES: dict[Any, str] = {
    StartError: '{0}; look at the log of the relay',
    MessageDecodeError: 'a WebSocket server, but no relay; look at the address',
    ConnectionClosed: 'closed: {0}; look at the log of the relay',
    InvalidStatus: 'HTTP {0.response.status_code}; look at the address: there is no relay',
    (InvalidHandshake, EOFError): 'no relay; look at the port, and whether it is ws:// or wss://',
    asyncio.TimeoutError: f'timed out after {CHECK_TIMEOUT} s; look at the firewall',
    socket.gaierror: 'name not found; look at the address',
    ssl.SSLCertVerificationError: '{0.verify_message}; look at --certfile, and at the address',
    OSError: 'cannot connect ({0!r}); look at the port, and whether it is ws:// or wss://',
    Exception: '{0.__class__.__name__}; is the address one like wss://relay.example.org:8765?',
}


async def check(url: str, other: str | None = None) -> str:
    """Have two clients of its own meet through the relay at a URL; return how that went.

    With another URL, they meet through two relays. A relay may be one of ProxyStore's. Raises
    StartError with what failed and where to look. Neither tells the token.
    """
    place = _place(url) + (f' and {_place(other)}' if other else '')
    meet = partial(_meet, url, other or url)
    try:
        try:
            meeting = await asyncio.wait_for(meet('server'), CHECK_TIMEOUT)
        except ConnectionClosed:
            # So ends ProxyStore's later relay who speaks as to its earlier one.
            meeting = await asyncio.wait_for(meet('relay'), CHECK_TIMEOUT)
    except Exception as error:
        reason = next(FAILURES[kind] for kind in FAILURES if isinstance(error, kind))
        if isinstance(error, InvalidStatus) and error.response.status_code == 401:
            reason = 'HTTP 401; look at the token in the address, and at --token-file'
        # One of several, where a name has several addresses.
        if f'[Errno {errno.ECONNREFUSED}]' in str(error):
            reason = 'refused; look whether the relay runs, and at the port'
        if reason is FAILURES[Exception]:
            place = '--check'  # what is no address may be a token
        # What the relay says may have lines, and codes for a terminal.
        raise StartError(f'{place}: {ascii(reason.format(error))[1:-1]}') from error
    return f'ok: two clients met through {place} {meeting}'


def _place(url: str) -> str:
    # A token may hold an @, a ? and, by mistake, the end of a line.
    place = re.split('[?&]token=', ''.join(url.split()))[0]
    return re.sub('//.*@', '//', place).partition('?')[0]


async def _meet(url: str, other_url: str, generation: str) -> str:
    from websockets.asyncio.client import connect

    # What does not answer may not answer a close either.
    dial = partial(connect, open_timeout=None, close_timeout=CHECK_TIMEOUT / 10)
    async with dial(url) as one, dial(other_url) as other:
        uuids = {one: uuid4(), other: uuid4()}
        for websocket, uuid in uuids.items():
            request = ServerRegistration('check', uuid, f'{generation}_registration')
            answer = ServerResponse(message_type=f'{generation}_response')
            await _deliver(request, websocket, websocket, answer)
        began = time.perf_counter()
        for kind, source, peer in (('offer', one, other), ('answer', other, one)):
            message = PeerConnection(uuids[source], 'check', uuids[peer], kind, 'v=0')
            await _deliver(message, source, peer, message)
        meeting = f'in {1000 * (time.perf_counter() - began):.1f} ms'
        tls = one.transport.get_extra_info('ssl_object')
        if tls is None:
            return meeting
        left = ssl.cert_time_to_seconds(tls.getpeercert()['notAfter']) - time.time()
        return f'{meeting} (certificate valid for {left / 86400:.0f} more days)'


async def _deliver(message: Message, source: Any, peer: Any, expected: Message) -> None:
    """Send a message, and hear what is expected at the peer, before an error at the source."""
    await source.send(encode(message))
    hearing = [asyncio.ensure_future(websocket.recv()) for websocket in {source, peer}]
    try:
        done, _ = await asyncio.wait(hearing, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in hearing:
            task.cancel()
    heard = decode(done.pop().result())
    if heard != expected:
        raise StartError(vars(heard).get('message') or vars(heard).get('error') or 'no answer')


# ------------------------------------------------------------------------------- Command line

# As the journal numbers them.
LEVELS = {'CRITICAL': 2, 'ERROR': 3, 'WARNING': 4, 'INFO': 6, 'DEBUG': 7}


def _number_of(text: str, least: int = 0, most: float = float('inf')) -> int:
    if text.isdecimal() and least <= int(text) <= most:
        return int(text)
    limit = f'{least} or more' if most == float('inf') else f'{least} to {most}'
    raise argparse.ArgumentTypeError(f'{text!r} is not a number, {limit}')


def _nats(text: str) -> str:
    # What is wrong may be, or hold, a password.
    with contextlib.suppress(ValueError):
        url = urlsplit(text)
        if url.scheme in ('nats', 'tls') and url.hostname and url.port != 0:
            return text
    raise argparse.ArgumentTypeError('not of the form nats://HOST:PORT or tls://HOST:PORT')


def _options(argv: list[str] | None) -> argparse.Namespace:
    # Without a usage, an error is one line.
    about = (__doc__ or '').partition('\n')[0]
    parser = argparse.ArgumentParser('relay.py', usage=argparse.SUPPRESS, description=about)
    add = parser.add_argument
    port = partial(_number_of, most=65535)
    positive = partial(_number_of, least=1)
    add('--host', default='0.0.0.0', metavar='ADDRESS', help='address to listen on (%(default)s)')
    add('--port', default=8765, type=port, help='port, 0 for any free (%(default)s)')
    add('--certfile', metavar='PATH', help='certificate in PEM format, to serve with TLS')
    add('--keyfile', metavar='PATH', help='its private key, unless that is in the same file')
    add('--token-file', metavar='PATH', help='lines user:token, for who may connect (anybody)')
    add('--allow-origin', action='append', metavar='ORIGIN', help='of web pages; repeatable (any)')
    add('--max-clients', type=positive, metavar='N', help='at once (the open-file limit less 64)')
    size = 'bytes of the longest message (%(default)s)'
    rate = 'messages a second of each client, 0 for any (%(default)s)'
    pings = 'between pings, 0 for none (%(default)s)'
    add('--max-message', default=MAX_MESSAGE, type=positive, metavar='BYTES', help=size)
    add('--rate', default=RATE, type=_number_of, metavar='N', help=rate)
    add('--ping-interval', default=30, type=_number_of, metavar='SECONDS', help=pings)
    add('--metrics-port', type=port, metavar='PORT', help='for Prometheus, on 127.0.0.1')
    add('--log-dir', metavar='PATH', help='also write server.log here, anew as each Sunday ends')
    add('--log-level', default='INFO', type=str.upper, choices=LEVELS, help='(%(default)s)')
    nats = 'share clients with other relays over NATS; repeatable'
    add('--nats', action='append', type=_nats, metavar='URL', help=nats)
    add('--nats-creds', metavar='PATH', help='credentials for NATS, unless they are in its URL')
    check = 'see whether two clients meet through the relay at a URL, or through two relays'
    add('--check', metavar='URL', nargs='+', help=check)
    add('--version', action='version', version=f'relay.py {__version__}')
    options = parser.parse_args(argv)
    if options.keyfile and not options.certfile:
        parser.error('--keyfile needs --certfile')
    if options.nats_creds and not options.nats:
        parser.error('--nats-creds needs --nats')
    if options.check and len(options.check) > 2:
        parser.error('argument --check: one URL or two')
    return options


def _log_to(log_dir: str | None, level: str) -> None:
    """Log to standard output and, where a folder is given, to a file in it."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    journal = os.environ.get('JOURNAL_STREAM')
    if journal and journal == '{0.st_dev}:{0.st_ino}'.format(os.fstat(sys.stdout.fileno())):
        handlers[0].setFormatter(_JournalFormatter('%(message)s'))
    path = os.path.join(log_dir or '', 'server.log')
    try:
        if log_dir is not None:
            os.makedirs(log_dir, exist_ok=True)
            handlers.append(logging.handlers.TimedRotatingFileHandler(path, 'W6'))
    except OSError as error:
        raise StartError(f'cannot log to {path}: {error.strerror}') from error
    form = '[%(asctime)s.%(msecs)03d] %(levelname)-5s (%(name)s) :: %(message)s'
    logging.basicConfig(format=form, datefmt='%Y-%m-%d %H:%M:%S', level=level, handlers=handlers)
    logging.raiseExceptions = False  # a full disk is not to have each line explained on stderr
    # websockets logs session descriptions at DEBUG and, up to version 15, an ERROR for each port
    # scan; asyncio has a WARNING for each pong to a lost connection. Defects are for the handler.
    logging.getLogger('websockets').setLevel(logging.CRITICAL)
    logging.getLogger('asyncio').setLevel(logging.ERROR)


def main(argv: list[str] | None = None) -> int:
    """Run the relay; return the exit status."""
    options = _options(argv)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it means a reload, it must not end us
    try:
        if options.check is not None:
            # One line is what it prints, whatever asyncio has to say.
            logging.disable()
            sys.unraisablehook = lambda _: None  # Python 3.9 may be interrupted as it connects
            print(asyncio.run(check(*options.check)))
            return 0
        _log_to(options.log_dir, options.log_level)
        # 1,024 open files are a relay's first end. (Some systems refuse to give all they have.)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        relay = RelayServer(options.token_file, options.max_clients, options.rate)
        limits = {'max_size': options.max_message, 'ping_interval': options.ping_interval or None}
        # A client that is no browser has no origin.
        limits['origins'] = options.allow_origin and [*options.allow_origin, None]
        where = options.host, options.port, options.certfile, options.keyfile
        limits['nats'] = options.nats and (options.nats, options.nats_creds)
        asyncio.run(serve(*where, relay=relay, metrics_port=options.metrics_port, **limits))
    except (StartError, KeyboardInterrupt) as error:
        print(f'relay.py: {str(error) or "interrupted"}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
