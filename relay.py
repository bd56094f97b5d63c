#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.9"
# dependencies = ["websockets>=14"]
# ///
"""A signaling relay in one file: two WebRTC peers use it to find each other.

Each client opens a WebSocket, registers under a UUID, and exchanges session descriptions with
its peers through the relay. After that, the peers talk to each other directly. Clients are the
endpoints of ProxyStore (every release), browsers, and any program that can open a WebSocket and
write JSON.

Protocol. Every message is one JSON object in one text frame. A client sends a registration and
receives a response before anything else. Then it sends and receives `peer_connection` messages:

    {"message_type": "server_registration", "name": "laptop", "uuid": "<its UUID>"}
    {"success": true, "message": null, "error": false, "message_type": "server_response"}
    {"message_type": "peer_connection", "source_uuid": "<its UUID>", "source_name": "laptop",
     "peer_uuid": "<the peer's UUID>", "description_type": "offer", "description": "<SDP>",
     "error": null}

A `relay_registration` (ProxyStore 0.6 and later, the newer generation) works the same and is
answered by a `relay_response`. A `peer_connection` is forwarded unchanged, to the byte. The relay
does not interpret its last three fields; `error` may be missing, and unknown keys are allowed.

A message that cannot be forwarded is returned to its sender with the reason in `error`: the peer
is unknown or does not read, `source_uuid` is not the sender's or, with --nats, the message is too
long or the peer's relay cannot be reached. Anything that is not a valid message is answered by a
response with `success: false`, `error: true` and a reason in `message`. The connection stays.

If a UUID is registered again on a new connection, the old connection is closed: with 1001 if it
used `server_registration`, with 4004 ("do not come back") if it used `relay_registration`. Other
close codes: 1001 the relay stops; 1002 invalid frame; 1007 text not UTF-8; 1008 not registered
or message not complete within 30 s, or token revoked; 1009 message longer than 1 MiB (64 KiB
before registering); 1011 ping not answered or internal error; 1012 upgrade; 1013 too many clients
or out of memory.

If the relay requires tokens, a client sends one in its handshake: `Authorization: Bearer TOKEN`,
ws://USER:TOKEN@HOST or ws://HOST/?token=TOKEN. A client without a valid token gets HTTP 401. A
client can only see and reach clients of its own user.

Map of this file. `decode` turns a text into a message, `RelayServer` decides what happens with
it, and `Connection` moves bytes between a socket and the relay. Around them: `Listener` accepts
connections, `Backplane` links several relays over NATS, and `serve` starts and stops it all.
"""

from __future__ import annotations  # Python 3.6 stops here and prints this line: 3.9 is needed

import argparse
import asyncio
import base64
import contextlib
import datetime
import hashlib
import importlib
import ipaddress
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
from collections.abc import Awaitable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any, Callable, NamedTuple, Optional, TextIO, get_type_hints
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

if sys.version_info < (3, 9):
    raise SystemExit('relay.py needs Python 3.9 or newer')
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
    raise SystemExit(f"relay.py: {error}; try: pip install 'websockets>=14'") from None

__version__ = '0.2.0'
logger = logging.getLogger('relay')
# Aliases: before Python 3.12, it is slow to look up a member of an enumeration.
OPEN, CONNECTING = State.OPEN, State.CONNECTING
TEXT, BINARY, CONT = Opcode.TEXT, Opcode.BINARY, Opcode.CONT
OPCODES = frozenset(int(opcode) for opcode in Opcode)

# ------------------------------------------------------------------------------- Limits
#
# The limits of the relay, grouped by unit. Options can change some of them.

# Bytes.
MAX_MESSAGE = 2**20  # the limit of ProxyStore's own relay and clients
MAX_UNREGISTERED = 2**16  # a request, or a message before registration; a registration has 150
MAX_BACKLOG = 2**20  # output waiting for one client; if nothing waits, any message is accepted
MAX_BUFFERED = 2**28  # input and output waiting, of all connections together
LONG_MESSAGE = 2**15  # longer messages are decoded one at a time, to keep the event loop free
SLICE = 2**15  # input of one client that is processed in one turn of the event loop
SLICE_MINIMUM = 2**11  # each frame counts at least this much against SLICE
RATE_UNIT = 2**14  # a longer message counts as several against the rate, one per started unit
RECEIVE_BUFFER = 2**16  # read at once, held while paused, and (doubled by Linux) in the kernel
SEND_BUFFER = 2**17  # in the kernel, which otherwise takes up to 4 MiB for a slow client
TLS_RECORD = 2**14  # encrypted at once; also the most of a handshake, or of OpenSSL's own answers

# Seconds.
REGISTER_TIMEOUT = 30  # for a client to register
MESSAGE_TIMEOUT = 30  # from the first byte of a message to its last
BURST = 0.1  # burst allowance, in seconds at the full rate
TAKEOVER_TIMEOUT = 0.5  # for a displaced client, which may be dead, to close
STOP_TIMEOUT = 11  # for clients to close when the relay stops; relay.service allows 15 in all
STOP_HANDSHAKE = 1  # for a handshake to complete when the relay stops, before it is dropped
DRAIN_TIMEOUT = 1  # to finish what is in flight before a stop or an upgrade
STALL_TIMEOUT = 120  # until the kernel drops a connection that acknowledges or reads nothing
SWEEP_INTERVAL = 1  # between checks for idle, incomplete and lost connections
ACCEPT_RETRY = 1  # until accepting is tried again after running out of file descriptors
TRIAL_TIMEOUT = 30  # for a new version to show that it starts
CHECK_TIMEOUT = 10  # for a --check
REFUSAL_INTERVAL = 60  # between log lines about one source of refusals; all are counted
FLAP_INTERVAL = 60  # between warnings about clients that displace each other again and again

# Numbers.
RATE = 500  # messages and pings a second of one client; peers that connect exchange a dozen
FLAP_COUNT = 3  # takeovers of one UUID within FLAP_INTERVAL before a warning
RESERVED_FDS = 32  # file descriptors kept for the log, files to reload, metrics and NATS
MAX_HANDSHAKES = 2048  # at once; one more drops the oldest
HANDSHAKE_FDS = 32  # for handshakes and clients that are refused; --help adds up these two
STRICT_DECODE = 2**12  # characters; in a longer text, a search for long numbers comes first
MAX_DIGITS = 100  # in a number; no field needs more, and a peer may not be able to read it
LISTEN_BACKLOG = 1024  # connections that wait in the kernel to be accepted
WATCHED_TAKEOVERS = 4096  # UUIDs whose takeovers are counted at once
MAX_SHOWN = 64  # characters of a client's text in the log or in an answer
MAX_REASON = 300  # characters of the reason why a new version does not start
ACCEPT_BATCH = 16  # connections accepted in one turn of the event loop

# NATS.
NATS_REQUEST_TIMEOUT = 2  # s for another relay to answer
SUBSCRIPTION_PROPAGATION = 0.05  # s until all NATS servers know of a new subscription
NATS_HEARTBEAT = 0.5  # s between pings to NATS, and between attempts to connect
CLAIM_BEATS = 120  # heartbeats between claims, so that relays agree again after a split of NATS
CLAIM_SIZE = 2**12  # bytes reserved for each claim in a batch; a typical one has 160
UPGRADE_TIMEOUT = 5  # s for a relay that is being upgraded to claim its clients again
MESSAGE_COST = 2**12  # bytes of memory for a message in flight over NATS, besides its content
MAX_IN_FLIGHT = 2**26  # bytes of memory for all messages in flight over NATS
NATS_OPTIONS: dict[str, Any] = {
    'name': 'relay.py',
    'allow_reconnect': False,  # Backplane does so itself: its subscriptions begin anew
    'max_reconnect_attempts': -1,  # for each new connection: try forever
    'reconnect_time_wait': NATS_HEARTBEAT,
    'no_echo': True,
    # Write each command at once. Otherwise nats-py 2.16 sends a PING before an UNSUB that is still
    # queued, and loses messages that arrive after the PONG.
    'pending_size': 1,
    'flush_timeout': NATS_REQUEST_TIMEOUT,
}


@dataclass(frozen=True)
class Limits:
    """Limits of each connection, named as websockets names them. Times are in seconds."""

    max_size: int = MAX_MESSAGE  # bytes of a message
    origins: tuple[Any, ...] | None = None  # None: web pages of any origin may connect
    open_timeout: float = 10  # for TLS and the handshake
    close_timeout: float = 10  # for the client to answer a close, and to end its stream
    ping_interval: float | None = 30  # of silence; None: no pings
    ping_timeout: float = 90  # generous: a ProxyStore endpoint does not survive a lost connection


# ------------------------------------------------------------------------------- Messages
#
# From text to message and back. There is no I/O in this section.


class MessageEncodeError(Exception):
    """Raised when a message cannot be encoded."""


class MessageDecodeError(Exception):
    """Raised when a text is not a valid message.

    The text of the error is the reason. `response_type` is the type of the response that the
    sender expects, or `server_response` if the text does not tell.
    """

    def __init__(self, reason: str, response_type: str = 'server_response') -> None:
        super().__init__(reason)
        self.response_type = response_type


@dataclass
class Message:
    """Base class of the three messages."""


@dataclass
class ServerRegistration(Message):
    """A client's request to be registered under a UUID."""

    name: str
    uuid: UUID
    message_type: str = 'server_registration'  # `relay_registration` from ProxyStore 0.6 on


@dataclass
class ServerResponse(Message):
    """The relay's answer to a registration, or to a text that is not a valid message."""

    success: bool = True
    message: Optional[str] = None  # not `str | None`: Python 3.9 could not evaluate it below
    error: bool = False
    message_type: str = 'server_response'  # `relay_response` from ProxyStore 0.6 on


@dataclass
class PeerConnection(Message):
    """A session description on its way to a peer, or back to its sender with an error."""

    source_uuid: UUID
    source_name: str
    peer_uuid: UUID
    description_type: str
    description: str
    error: Optional[str] = None
    message_type: str = 'peer_connection'


class Field(NamedTuple):
    """A field of a message: its JSON types, and how an error describes them."""

    name: str
    types: tuple[type, ...]
    expected: str
    default: object  # dataclasses.MISSING if the key is required: it matches none of the types
    is_uuid: bool


JSON_TYPES: dict[object, tuple[tuple[type, ...], str]] = {
    str: ((str,), 'a string'),
    Optional[str]: ((str, type(None)), 'a string or null'),
    bool: ((bool,), 'true or false'),
    UUID: ((str,), 'a string that holds a UUID'),
}


def _schema(message_class: type[Message]) -> tuple[type[Message], list[Field]]:
    hints = get_type_hints(message_class)
    return message_class, [
        Field(f.name, *JSON_TYPES[hints[f.name]], f.default, is_uuid=hints[f.name] is UUID)
        for f in fields(message_class)
    ]


# The class of each message type, and its fields in the order of the class.
SCHEMAS = {
    'server_registration': _schema(ServerRegistration),
    'relay_registration': _schema(ServerRegistration),
    'server_response': _schema(ServerResponse),
    'relay_response': _schema(ServerResponse),
    'peer_connection': _schema(PeerConnection),
}


def encode(message: Message) -> str:
    """Return the JSON text of a message.

    Raises MessageEncodeError if it is not a message, if its `message_type` is not one of its
    class, or if a field has a value that JSON does not know.
    """
    try:
        if SCHEMAS[vars(message)['message_type']][0] is not type(message):
            raise TypeError('message_type does not match the class')
        values = {k: str(v) if isinstance(v, UUID) else v for k, v in vars(message).items()}
        return json.dumps(values, allow_nan=False)
    except (KeyError, TypeError, ValueError) as error:
        raise MessageEncodeError(f'{type(message).__name__}: {error}') from error


def decode(text: str | bytes) -> Message:
    """Return the message in a frame's payload. Raises MessageDecodeError, and nothing else."""
    message_type: object = None
    try:
        data = _parse_object(text)
        message_type = data.get('message_type')
        if not isinstance(message_type, str) or message_type not in SCHEMAS:
            raise ValueError(f'message_type must be one of {", ".join(SCHEMAS)}')
        message_class, schema = SCHEMAS[message_type]
        values = []
        for key, types, expected, default, is_uuid in schema:
            value = data.get(key, default)
            if not isinstance(value, types):
                raise ValueError(f'{key} must be {expected}')
            values.append(_parse_uuid(key, value) if is_uuid else value)
        return message_class(*values)
    except RecursionError:  # each of these sets a reason
        reason = 'nested too deep'
    except json.JSONDecodeError as error:
        reason = f'not JSON: {error}'
    except ValueError as error:
        reason = str(error)
    generation = 'relay' if str(message_type).startswith('relay_') else 'server'
    raise MessageDecodeError(reason, f'{generation}_response')


def _parse_object(text: str | bytes) -> dict[str, Any]:
    if not isinstance(text, str):
        raise ValueError('a message must be a text frame, not a binary frame')
    decoder = _strict_decoder
    if len(text) > STRICT_DECODE and not _LONG_NUMBER.search(text):
        decoder = _decoder
    # A JSONDecoder's own `decode` takes a quarter longer: it searches for white space.
    text = text.strip(' \t\n\r')
    data, end = decoder.raw_decode(text)
    if end < len(text):
        raise json.JSONDecodeError('Extra data', text, end)
    if not isinstance(data, dict):
        raise ValueError('a message must be a JSON object')
    return data


# The same few UUIDs come again and again. Parsing them would be an eighth of a forward.
_cached_uuid = lru_cache(4096)(UUID)


def _parse_uuid(key: str, value: Any) -> UUID:
    try:
        # 36 characters are the usual form. Others may be very long, and are not kept.
        return _cached_uuid(value) if len(value) == 36 else UUID(value)
    except ValueError:
        raise ValueError(f'{key} must be a string that holds a UUID, not {shown(value)}') from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # If a key is there twice, the relay might read one value and the peer the other.
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError('duplicate key in an object')
    return data


def _number(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise ValueError(f'{shown(text)} is a number that is too long')
    return float(text)


def _no_constant(text: str) -> float:
    raise ValueError(f'{text} is not JSON')  # NaN, Infinity


# To call `_number` for each number of a long text may take longer than all the rest.
_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_strict_decoder = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_number, parse_int=_number
)
_LONG_NUMBER = re.compile(f'(?<![0-9.eE+-])[0-9.eE+-]{{{MAX_DIGITS + 1}}}')


def shown(text: str) -> str:
    """Return the first MAX_SHOWN characters of a client's text for the log: quoted, in ASCII."""
    return ascii(text[:MAX_SHOWN]) + ('...' if len(text) > MAX_SHOWN else '')


# ------------------------------------------------------------------------------- Access
#
# Tokens and addresses: reading the token file, finding the user and the address of a handshake.


class StartError(Exception):
    """Raised for an error that the operator has to fix; its text is one line for the operator."""


def read_tokens(path: str) -> dict[bytes, str]:
    """Return the users of a token file by the hash of their tokens.

    Each line is `user:token`; ` #` begins a comment. Logs a warning if other users can read the
    file. Raises StartError if it cannot be read, has any other line, or has no token.
    """
    tokens: dict[bytes, str] = {}
    try:
        with open(path, encoding='utf-8-sig') as file:
            if os.fstat(file.fileno()).st_mode & 0o007:
                logger.warning('%s can be read or changed by every user of this machine', path)
            # A # begins a comment at the start of a line or after a space, but not inside a token.
            lines = [f' {line}'.partition(' #')[0].strip() for line in file]
    except (OSError, ValueError) as error:  # ValueError: the file is not in UTF-8
        raise StartError(f'cannot read {path}: {getattr(error, "strerror", error)}') from error
    for number, line in enumerate(lines, 1):
        user, _, token = line.partition(':')
        if line and not (user and token and line.isprintable() and ' ' not in line):
            raise StartError(f'{path}, line {number}: not in the form user:token')
        if line and not token.isascii():  # a Bearer header could not carry it
            raise StartError(f'{path}, line {number}: a token must consist of ASCII characters')
        if line and tokens.setdefault(_hash(token), user) != user:
            raise StartError(f'{path}, line {number}: this token belongs to another user')
    if not tokens:
        raise StartError(f'{path}: no line in the form user:token')
    return tokens


def find_user(request: Request, tokens: dict[bytes, str] | None) -> tuple[str, bytes] | None:
    """Return the user of a handshake and the hash of its token, or None without a valid token."""
    if tokens is None:  # none is required
        return '', b''
    user: str | None = None
    try:
        # A header with a token wins over the path. Two are joined, which matches no token.
        scheme, _, value = ' '.join(request.headers.get_all('Authorization')).partition(' ')
        if scheme.lower() == 'basic':
            user, _, token = base64.b64decode(value, validate=True).decode().partition(':')
        elif scheme.lower() == 'bearer':
            token = value.strip()
        else:
            # A plus is a plus here: no token contains a space.
            token = parse_qs(urlsplit(request.path).query.replace('+', '%2B'))['token'][0]
    except (KeyError, ValueError):
        return None
    owner = tokens.get(_hash(token))
    if owner is None or user not in (None, owner):
        return None
    return owner, _hash(token)


def _hash(token: str) -> bytes:
    # The time of looking up a hash tells nothing about a token. websockets 14 decodes bytes that
    # are not ASCII as surrogates.
    return hashlib.sha256(token.encode(errors='surrogatepass')).digest()


def format_address(address: Any) -> str:
    """Return the name of a socket as host:port."""
    if not isinstance(address, tuple):
        return 'unknown address'
    return f'[{address[0]}]:{address[1]}' if ':' in address[0] else f'{address[0]}:{address[1]}'


def client_address(address: Any, request: Request) -> str:
    """Return the address of a client, from X-Forwarded-For if a proxy is on this machine."""
    forwarded = request.headers.get_all('X-Forwarded-For')
    with contextlib.suppress(ValueError, TypeError, IndexError):
        if forwarded and ipaddress.ip_address(address[0]).is_loopback:
            last = forwarded[-1].rpartition(',')[2].partition('%')[0]  # the proxy's own, no zone
            return str(ipaddress.ip_address(last.strip()))
    return format_address(address)


# ------------------------------------------------------------------------------- Relay
#
# What happens with each message. The decisions in here are plain functions without an `await`, so
# nothing can change between looking up a client and acting on it. A connection is only known by
# what EmbeddedLink, below, and Connection have in common.

WELCOME = 'This is a signaling relay for WebRTC peers. Connect to it with a WebSocket (ws://).\n'
# Reasons to return a message to its sender, by their names in the metrics.
FORWARD_ERRORS = {
    'unknown_peer': 'this peer is unknown',
    'forged_source': "source_uuid is not the sender's",
    'backlog': 'this peer does not read what is sent to it',
    'too_long': 'it is too long to be sent to another relay',
    'disconnected': 'the relays are disconnected',
}
COUNTERS = (
    'registrations displaced_registrations pings_unanswered '
    'forwarded_messages forwarded_bytes remote_messages remote_unknown'
).split()
# Reasons of refusals; `rate_paced` counts how often a client was made to wait.
REFUSALS = [
    *FORWARD_ERRORS,
    *'malformed too_large rate_paced never_registered'.split(),
    *'incomplete unauthorized full out_of_memory'.split(),
]
# Why the relay closes a connection, in at most 123 bytes (RFC 6455, section 5.5.1).
PING_TIMEOUT = 'keepalive ping timeout'  # the words of websockets
NOT_REGISTERED = f'not registered within {REGISTER_TIMEOUT} s'
INCOMPLETE = f'message not complete within {MESSAGE_TIMEOUT} s'
# ProxyStore's relay uses these words, and its endpoints show them to their users.
DISPLACED = (
    'Relay received a registration with the same ID. '
    'This might mean that the endpoint is running in multiple locations.'
)


class EmbeddedLink:
    """Sends to a client of websockets' own server, as Connection (below) does to one of ours."""

    def __init__(self, websocket: Any) -> None:
        self.websocket = websocket
        self.closing: asyncio.Task[None] | None = None  # set when the relay closes it

    @property
    def is_open(self) -> bool:
        """Whether messages can still be exchanged."""
        return self.closing is None and self.websocket.state is OPEN

    @property
    def unsent_bytes(self) -> int:
        """Bytes that wait in the transport for the client to read."""
        return int(self.websocket.transport.get_write_buffer_size())

    def write(self, data: bytes) -> None:
        """Send a text without waiting, or do nothing if the connection is not open."""
        from websockets.asyncio.server import broadcast  # at hand only if embedded

        broadcast((self.websocket,), data.decode())

    def close(self, code: int, reason: str) -> None:
        """Start closing the connection."""
        if self.closing is None:
            self.closing = asyncio.ensure_future(self.websocket.close(code, reason))


# Without eq, clients are keys of dicts. Without repr, errors of asyncio show no text of a client.
@dataclass(eq=False, repr=False)
class Client:
    """A connected program: how to reach it and, once it has registered, its name and UUID."""

    name: str
    uuid: UUID | None
    websocket: Any  # as public methods know it; unless the relay is embedded, the same as `link`
    link: Connection | EmbeddedLink
    user: str = ''  # the owner of the client's token, if the relay requires tokens
    token_hash: bytes = b''
    address: str = 'unknown address'
    response_type: str = 'server_response'
    next_allowed: float = 0.0  # monotonic time from which its next message is within the rate
    registration_order: int = 0  # of several clients that register a UUID, the highest holds it
    registration_timer: asyncio.TimerHandle | None = None
    takeover: asyncio.Future[None] | None = None  # if displaced; cancelled once it has closed

    def __str__(self) -> str:
        user = f'user {shown(self.user)}, ' if self.user else ''
        return f'{self.uuid or "unregistered"} ({shown(self.name)}, {user}at {self.address})'


class Claim(NamedTuple):
    """A client's claim to its UUID among relays. The highest (stamp, id) holds the UUID."""

    stamp: int  # ns, wall clock at registration; raised to outbid an older claim
    id: str  # unique; decides between equal stamps
    since: float  # s, monotonic clock at registration; on Linux the same in all processes


# A message to another relay: its sender, the message, its text, and its bytes of memory.
InFlight = tuple[Client, PeerConnection, bytes, int]


class RelayServer:
    """The registry of clients, and the rules by which they register and reach each other.

    `serve` below runs one. To embed it, run `websockets.asyncio.server.serve(relay.handler, ...)`,
    with `process_request=relay.process_request` where tokens or health checks are wanted.

    `rate` is in messages a second, 0 for no limit. Raises StartError if the token file cannot be
    used. `register` and `connect` raise KeyError for a connection that has closed.
    """

    def __init__(
        self, token_file: str | None = None, max_clients: int | None = None, rate: float = RATE
    ) -> None:
        fds = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_clients = max_clients or max(1, fds - RESERVED_FDS - HANDSHAKE_FDS)
        self._rate = rate
        self._token_file = token_file
        self.tokens = None if token_file is None else read_tokens(token_file)
        # All connected clients, and the registry: registered clients by user and UUID.
        self._websocket_to_client: dict[Any, Client] = {}
        self._uuid_to_client: dict[tuple[str, UUID | None], Client] = {}
        self._registration_order = itertools.count(1)
        self.listener: Listener | None = None  # unless it is embedded
        self.backplane: Backplane | None = None  # with --nats
        # For the operator.
        self.started = time.time()
        self.certificate_expiry: float | None = None  # seconds since 1970
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.refusal_counts = dict.fromkeys(REFUSALS, 0)
        # When each source of refusals was last logged, and how many there were.
        self.refusal_log: dict[object, tuple[float, int]] = {}
        # Takeovers by user and UUID; cleared after FLAP_INTERVAL, or if there are too many.
        self._takeovers: Counter[tuple[str, UUID | None]] = Counter()
        self._takeovers_since = 0.0

    # Connections: opening, reading, closing.

    def process_request(self, websocket: Any, request: Request) -> Response | None:
        """Answer a request that is no handshake or has no valid token. None accepts it."""
        extra: dict[str, str] = {}
        if request.path == '/healthz':
            status, text = (200, 'ok\n') if websocket.server.is_serving() else (503, 'stopping\n')
        elif 'Upgrade' not in request.headers:
            status, text, extra = 426, WELCOME, {'Upgrade': 'websocket'}
        elif find_user(request, self.tokens) is not None:
            return None
        else:
            address = client_address(websocket.remote_address, request)
            self.log_refusal('unauthorized', 401, address, 'no valid token')
            status, text = 401, 'This relay requires a token.\n'
            extra = {'WWW-Authenticate': 'Bearer realm="relay"'}
        response: Response = websocket.respond(status, text)
        response.headers.update(extra)
        return response

    async def handler(self, websocket: Any) -> None:
        """Serve a connection of `websockets.asyncio.server.serve` until it closes."""
        limit_socket(websocket.transport.get_extra_info('socket'))  # as Listener does
        client = Client('', None, websocket, EmbeddedLink(websocket))
        error: ConnectionClosed | None = None
        self.on_open(client, websocket.request)
        try:
            while True:
                text = await websocket.recv()
                if client.link.is_open:  # else, the relay has closed it
                    takeover = self.receive(client, text)
                    if takeover is not None:
                        await asyncio.wait({takeover})
                    # A sleep of 0 s, too, gives other clients a turn.
                    await asyncio.sleep(self.pace(client, len(text)))
        except ConnectionClosed as closed:
            error = closed
        finally:
            self.on_close(client, error)

    def on_open(self, client: Client, request: Request) -> None:
        """Admit a new connection, or close it if it has no token or the relay is full."""
        client.address = client_address(client.websocket.remote_address, request)
        user = find_user(request, self.tokens)
        if user is None:  # the relay is embedded without `process_request`
            self.log_refusal('unauthorized', 1008, client.address, 'no valid token')
            client.link.close(1008, 'no valid token')
        elif len(self._websocket_to_client) >= self._max_clients:
            # An HTTP error would terminate a ProxyStore endpoint. After 1013, it tries again.
            self.log_refusal('full', 1013, client.address, 'the relay is full')
            client.link.close(1013, 'the relay is full')
        else:
            client.user, client.token_hash = user
            self._websocket_to_client[client.websocket] = client
            self.start_registration_timer(client, REGISTER_TIMEOUT)

    def readmit(self, client: Client, seconds: float | None, claim: Claim | None) -> None:
        """Admit a client from before an upgrade: with the seconds left to register, or a claim."""
        self._websocket_to_client[client.websocket] = client
        if seconds is not None:
            self.start_registration_timer(client, seconds)
        if client.uuid is not None:
            self._uuid_to_client[client.user, client.uuid] = client
            if self.backplane is not None:
                self.backplane.announce(client, claim)

    def start_registration_timer(self, client: Client, seconds: float) -> None:
        """Close a client with 1008 unless it registers within some seconds."""
        client.registration_timer = asyncio.get_running_loop().call_later(
            seconds, self._close, client, 1008, NOT_REGISTERED
        )

    def on_close(self, client: Client, error: ConnectionClosed | None) -> None:
        """Clean up after a closed connection. Without an error, `handler` was ended."""
        if self._websocket_to_client.pop(client.websocket, None) is None:
            return  # it was turned away
        reason = 'its handler ended' if error is None else self._describe_close(client, error)
        self._unregister(client, reason)
        self.refusal_log.pop(client, None)
        if client.takeover is not None:
            client.takeover.cancel()

    def _describe_close(self, client: Client, error: ConnectionClosed) -> str:
        """Return how a connection was closed, for the log. Counts it if it is a refusal."""
        if error.sent is None or error.rcvd_then_sent:  # the client closed it
            if error.rcvd is None:
                return 'connection lost'
            reason = f': {shown(error.rcvd.reason)}' if error.rcvd.reason else ''
            return f'closed by the client with {error.rcvd.code}{reason}'
        code, reason = error.sent.code, error.sent.reason
        kind = {1002: 'malformed', 1007: 'malformed', 1009: 'too_large'}.get(code)
        if code == 1008:
            kinds = {NOT_REGISTERED: 'never_registered', INCOMPLETE: 'incomplete'}
            kind = kinds.get(reason, 'unauthorized')
        if kind is not None:
            self._log_client_refusal(kind, client, f'{reason} ({code})')
        if reason == PING_TIMEOUT:
            self.counts['pings_unanswered'] += 1
        return f'closed by the relay with {code}: {reason}'.rstrip(': ')

    def pace(self, client: Client, size: int) -> float:
        """Charge a client for a message of this many bytes. Return the seconds to its next one."""
        if not self._rate:
            return 0
        now = time.monotonic()
        cost = (1 + max(0, size - 1) // RATE_UNIT) / self._rate
        client.next_allowed = max(client.next_allowed, now - BURST) + cost
        if client.next_allowed <= now:
            return 0
        self.refusal_counts['rate_paced'] += 1
        return client.next_allowed - now

    def receive(self, client: Client, text: str | bytes) -> asyncio.Future[None] | None:
        """Handle one message. Return a future if reading must pause until it is done."""
        try:
            message = decode(text)
        except MessageDecodeError as error:
            if client.uuid is None:  # then its generation is not known yet
                client.response_type = error.response_type
            self._refuse(client, str(error))
            return None
        if isinstance(message, PeerConnection):
            self._connect(client, message, text)
        elif isinstance(message, ServerRegistration):
            return self._register(client, message)
        else:
            self._refuse(client, 'only the relay sends responses')
        return None

    # Registrations.

    async def register(self, websocket: Any, request: ServerRegistration) -> None:
        """Register a client and answer it. Displaces the client that holds the UUID, if any."""
        takeover = self._register(self._websocket_to_client[websocket], request)
        if takeover is not None:
            await asyncio.wait({takeover})

    def _register(
        self, client: Client, request: ServerRegistration
    ) -> asyncio.Future[None] | None:
        """Return a future if the client has to wait for the holder of the UUID to close."""
        if client.uuid == request.uuid:
            self._send(client, ServerResponse(message_type=client.response_type))
        elif client.uuid is not None:
            self._refuse(client, f'this connection is already registered as {client.uuid}')
        else:
            client.registration_order = next(self._registration_order)
            holder = self._uuid_to_client.get((client.user, request.uuid))
            if holder is not None:
                return self._take_over(holder, client, request)
            self._admit(client, request)
        return None

    def _take_over(
        self, holder: Client, client: Client, request: ServerRegistration
    ) -> asyncio.Future[None]:
        """Displace the holder of a UUID, and register the client once the holder has closed.

        Waits at most TAKEOVER_TIMEOUT: the holder may be dead. Returns a future that is done then.
        """
        loop = asyncio.get_running_loop()
        holder.takeover = loop.create_future()
        # The first callback: the client is registered before its next message is read.
        holder.takeover.add_done_callback(lambda _: self._admit(client, request))
        loop.call_later(TAKEOVER_TIMEOUT, holder.takeover.cancel)
        self.displace(holder, client.address)
        return holder.takeover

    def _admit(self, client: Client, request: ServerRegistration) -> None:
        """Put a client into the registry and answer it, in one step, unless a later one has won.

        While client B waited for A to close, C may have registered the same UUID. The one that
        registered last keeps it, so B may have to displace C, or be displaced by it.
        """
        if not client.link.is_open:
            return
        key = (client.user, request.uuid)
        holder = self._uuid_to_client.get(key)
        # A name can be as long as a message. With one more character, `shown` knows it was longer.
        client.name, client.uuid = request.name[: MAX_SHOWN + 1], request.uuid
        client.response_type = request.message_type.replace('registration', 'response')
        if holder is not None:
            if holder.registration_order > client.registration_order:
                self.displace(client, holder.address)
                return
            self.displace(holder, client.address)
        if client.registration_timer is not None:
            client.registration_timer.cancel()
            client.registration_timer = None
        self._uuid_to_client[key] = client
        self.counts['registrations'] += 1
        if self.backplane is not None:
            self.backplane.announce(client)
        # There was no await since it entered the registry: nothing is sent to it before this.
        self._send(client, ServerResponse(message_type=client.response_type))
        logger.info('Registered %s', client)

    def displace(self, client: Client, by_address: str) -> None:
        """Close a client because its UUID was registered again, from another address."""
        self.counts['displaced_registrations'] += 1
        key, now = (client.user, client.uuid), time.monotonic()
        expired = now - self._takeovers_since > FLAP_INTERVAL
        if expired or len(self._takeovers) > WATCHED_TAKEOVERS:
            self._takeovers.clear()
            self._takeovers_since = now
        self._takeovers[key] += 1
        if self._takeovers[key] == FLAP_COUNT:
            text = 'UUID %s is registered again and again by %s and %s; %s'
            hint = 'two endpoints probably share one configuration: give one of them a new UUID'
            logger.warning(text, client.uuid, client.address, by_address, hint)
        code = 4004 if client.response_type == 'relay_response' else 1001
        self._close(client, code, DISPLACED)

    def _close(self, client: Client, code: int, reason: str) -> None:
        """Remove a registration at once, and start closing its connection."""
        self._unregister(client, f'closed by the relay with {code}: {reason}'.rstrip(': '))
        client.link.close(code, reason)

    async def unregister(self, websocket: Any, expected: bool) -> None:
        """Remove a registration and close its connection, with 1000 if `expected`."""
        client = self._websocket_to_client.get(websocket)
        if client is not None and expected:
            self._close(client, 1000, '')
        elif client is not None:
            self.displace(client, 'the relay itself')

    def _unregister(self, client: Client, reason: str) -> None:
        if client.registration_timer is not None:
            client.registration_timer.cancel()
            client.registration_timer = None
        # The UUID may never have been registered, or may have a new holder already.
        if self._uuid_to_client.get((client.user, client.uuid)) is client:
            del self._uuid_to_client[client.user, client.uuid]
            if self.backplane is not None:
                self.backplane.withdraw(client)
            logger.info('Unregistered %s: %s', client, reason)

    # Messages.

    async def connect(self, websocket: Any, message: PeerConnection) -> None:
        """Forward a message to its peer, or return it to its sender with an error."""
        self._connect(self._websocket_to_client[websocket], message, encode(message))

    def _connect(self, client: Client, message: PeerConnection, text: str | bytes) -> None:
        if client.uuid is None:
            self._refuse(client, 'client has not registered yet')
            return
        kind: str | None = 'forged_source'
        if message.source_uuid == client.uuid:
            data = text.encode() if isinstance(text, str) else text
            kind = self.deliver(client.user, message.peer_uuid, data)
            if kind == 'unknown_peer' and self.backplane is not None:
                kind = self.backplane.forward(client, message, data)
        if kind is not None:
            self.send_back(client, message, kind)

    def send_back(self, client: Client, message: PeerConnection, kind: str) -> None:
        """Return a message to its sender with an error, one of FORWARD_ERRORS."""
        reason = FORWARD_ERRORS[kind]
        self.log_refusal(kind, client, client, f'message to {message.peer_uuid}: {reason}')
        error = f'Cannot forward peer connection message to peer {message.peer_uuid} because '
        answer = replace(message, error=f'{error}{reason}.')
        text = encode(answer)
        if len(text) > MAX_MESSAGE:  # ProxyStore reads no more; the error has made it longer
            text = encode(replace(answer, source_name='', description_type='', description=''))
        client.link.write(text.encode())

    def deliver(self, user: str, uuid: UUID, data: bytes) -> str | None:
        """Send a text to a registered client. Return one of FORWARD_ERRORS if that fails."""
        peer = self._uuid_to_client.get((user, uuid))
        # A connection that is closing would lose the message.
        if peer is None or not peer.link.is_open:
            return 'unknown_peer'
        backlog = peer.link.unsent_bytes
        if backlog and backlog + len(data) > MAX_BACKLOG:
            return 'backlog'
        peer.link.write(data)
        self.counts['forwarded_messages'] += 1
        self.counts['forwarded_bytes'] += len(data)
        logger.debug('Forwarded to %s', uuid)
        return None

    async def send(self, websocket: Any, message: Message) -> None:
        """Send a message to a connection, or do nothing if it has closed."""
        client = self._websocket_to_client.get(websocket)
        if client is not None:
            self._send(client, message)

    def _send(self, client: Client, message: Message) -> None:
        client.link.write(encode(message).encode())

    def _refuse(self, client: Client, reason: str) -> None:
        """Answer a text that is not a valid message, or not allowed now, with the reason."""
        self._log_client_refusal('malformed', client, reason)
        self._send(client, ServerResponse(False, reason, True, client.response_type))

    # Operations.

    def log_refusal(self, kind: str, source: object, refused: object, reason: str) -> None:
        """Count a refusal, and log it unless its source was logged within REFUSAL_INTERVAL."""
        self.refusal_counts[kind] += 1
        logged, count = self.refusal_log.get(source, (float('-inf'), 0))
        now = time.monotonic()
        if now - logged >= REFUSAL_INTERVAL:
            logged = now
            logger.warning('Refused %s: %s (%d refusals so far)', refused, reason, count + 1)
        self.refusal_log[source] = (logged, count + 1)

    def _log_client_refusal(self, kind: str, client: Client, reason: str) -> None:
        # Unregistered clients share one source: with each new connection, they would have another.
        source = None if client.uuid is None else client
        self.log_refusal(kind, source, client, reason)

    def reload(self, certfile: str | None, keyfile: str | None) -> None:
        """Read tokens and certificate again, both or neither. Close clients of revoked tokens."""
        notify_reloading()
        try:
            tokens = None if self._token_file is None else read_tokens(self._token_file)
            if certfile is not None and self.listener is not None:
                # A new context: the old one would keep a certificate of another type of key.
                tls, expiry = tls_context(certfile, keyfile), expiry_of(certfile)
                self.listener.tls, self.certificate_expiry = tls, expiry
            self.tokens = tokens
            self.close_revoked()
            logger.info('Reloaded')
        except (StartError, OSError) as error:
            logger.error('Reload failed, keeping the old configuration: %s', error)
        finally:
            notify('READY=1')

    def close_revoked(self) -> None:
        """Close clients whose token is no longer in the file."""
        for client in list(self._websocket_to_client.values()):
            if self.tokens is not None and self.tokens.get(client.token_hash) != client.user:
                self._close(client, 1008, 'the token was revoked')


def limit_socket(sock: Any) -> None:
    """Bound what the kernel buffers for a connection, and drop it when its peer is unreachable."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, 'TCP_USER_TIMEOUT'):  # not on macOS
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * STALL_TIMEOUT)


# ------------------------------------------------------------------------------- Connection
#
# From bytes to messages and back: TCP, TLS, the handshake, frames, pausing and keepalive.
#
#     socket -> (TLS) -> input -> next whole request or frame -> protocol -> relay
#     socket <- (TLS) <- output <------------------------------- protocol <- relay
#
# The sockets are read and written here rather than by asyncio's transports, which hide how much
# waits to be written and cannot be handed over to another process. `protocol` is websockets'
# implementation of RFC 6455 without I/O. It only gets whole requests and frames; the rest stays
# in `input`, where it is counted, and can be refused or handed over.
#
# The life of a connection, by the state of its protocol:
#
#     CONNECTING   TLS and HTTP handshake. Dropped after open_timeout.
#     OPEN         The handshake is complete (`opened`). Frames are processed, unless paused.
#     CLOSING      A close frame was sent. Until the client answers it, frames are still processed,
#                  but messages are ignored. Dropped after close_timeout.
#     CLOSED       Close frames were exchanged, or the client's stream has ended.
#
# `close` sends a close frame and waits for the client's, `fail` does not wait. Once the last bytes
# for the client are in `output`, the connection is `finished`: input is discarded, and the stream
# ends after the output. `abort` closes the socket: when both streams have ended, when a timer runs
# out, or after a reset.
#
# Processing is paused for these reasons. A paused connection is read until RECEIVE_BUFFER bytes
# wait, and notices its end. What it received before is processed, unless its end is a reset.

RATE_LIMIT = 'rate limit'  # until the client's next message is within the rate (a timer)
TAKEOVER = 'takeover'  # until the previous holder of its UUID has closed (a future)
UNREAD = 'unread output'  # until the client has read most of its output (_on_writable)
TURN = 'turn'  # until its long message may be decoded (Listener.request_turn)
SLICE_USED = 'slice used'  # until the next turn of the event loop
UPGRADING = 'upgrading'  # until the new version has taken over, or has failed to


class TlsSession:
    """The TLS of one connection: OpenSSL between two memory buffers.

    asyncio's own TLS takes 287 KiB for each client from Python 3.11 on (this: about 21), and
    loses received data when a client sends and closes at once.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()  # both encrypted
        self.session = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.established = False
        # Received in the handshake; later, answered by OpenSSL itself. TLS_RECORD is the limit.
        self.overhead_bytes = 0
        self.ended = False  # by the client, or by an error

    def decrypt(self, data: memoryview, plain: bytearray) -> None:
        """Decrypt data into `plain`. Afterwards, the caller has to send `answer()`."""
        # In pieces: a MemoryBIO never shrinks.
        for start in range(0, len(data), TLS_RECORD // 4):
            piece = data[start : start + TLS_RECORD // 4]
            self.incoming.write(piece)
            try:
                if not self.established:
                    self.overhead_bytes += len(piece)
                    self.session.do_handshake()
                    self.established, self.overhead_bytes = True, 0
                while not self.ended:
                    chunk = self.session.read(TLS_RECORD)
                    plain += chunk
                    self.ended = not chunk
            except ssl.SSLWantReadError:  # all is decrypted
                self.ended = self.overhead_bytes > TLS_RECORD
            except ssl.SSLError:
                self.ended = True
            if self.ended:
                return

    def answer(self) -> bytes:
        """Return what OpenSSL has to send in answer to received data."""
        data = self.outgoing.read()
        if self.established:
            self.overhead_bytes += len(data)  # to a key update; a client needs few or none
        return data

    def encrypt(self, data: bytes) -> bytes:
        """Encrypt data. Raises ssl.SSLError if the session has failed."""
        records = []
        for start in range(0, len(data), TLS_RECORD):
            self.session.write(data[start : start + TLS_RECORD])
            records.append(self.outgoing.read())
        return b''.join(records)

    def end(self) -> bytes:
        """Return the alert that ends the session."""
        with contextlib.suppress(ssl.SSLError):  # the client's own alert is not here
            self.session.unwrap()
        return self.outgoing.read()


# A websockets protocol and its parser refer to each other, so only the garbage collector would
# free them. A closed connection clears its protocol and uses this one, which does nothing.
CLOSED_PROTOCOL = ServerProtocol(state=State.CLOSED)
CLOSED_PROTOCOL.receive_eof()
CLOSED_PROTOCOL.data_to_send()  # nothing is left to send


class Connection:
    """The connection of one client.

    Sending to it, or buffering for it, may `abort` it. Then it has no `client` any more, and all
    methods do nothing.
    """

    def __init__(
        self, server: Listener, sock: socket.socket, address: Any, state: State = CONNECTING
    ) -> None:
        limits = server.limits
        # `server` and `respond` are the names of websockets, for `process_request`.
        self.server, self.relay, self.loop = server, server.relay, server.loop
        self.sock, self.fd, self.remote_address = sock, sock.fileno(), address
        # websockets counts a ping of 125 bytes between fragments as one of them.
        size = limits.max_size + 125
        self.protocol = ServerProtocol(origins=limits.origins, max_size=size, state=state)
        self.tls = TlsSession(server.tls) if server.tls is not None else None
        self.client = Client('', None, websocket=self, link=self)
        self.input, self.output = bytearray(), bytearray()
        self.fragments = bytearray()  # of a message whose last frame is still to come
        self.opcode: Opcode | None = None  # of that message, if there is one
        self.unflushed_bytes = 0  # in the protocol, until the next turn of the loop
        self.counted_bytes = 0  # in the listener's total
        self.paused_for: set[str] = set()
        self.has_turn = False  # it may process one long message now
        self.eof = False  # everything the client sent was received
        self.closing: tuple[int, str] | None = None  # code and reason after the handshake
        self.opened = False  # the handshake was completed; stays set when the connection closes
        self.finished = False  # all for the client was sent or is in `output`; input is discarded
        self.rate_timer: asyncio.TimerHandle | None = None
        self.last_heard = self.last_pinged = time.monotonic()
        self.drop_timer = self.loop.call_later(limits.open_timeout, self.abort)
        server.connections[self] = None
        server.handshakes[self] = None
        # The number: of an unknown socket, asyncio's selector calls repr(), with two system calls.
        self.loop.add_reader(self.fd, self._on_readable)

    # Used by the relay.

    @property
    def is_open(self) -> bool:
        """Whether messages can still be exchanged."""
        return self.protocol.state is OPEN

    @property
    def unsent_bytes(self) -> int:
        """Bytes that were written and wait for the client to read."""
        return len(self.output) + self.unflushed_bytes

    def write(self, data: bytes) -> None:
        """Send a text, or do nothing if the connection is not open."""
        if self.protocol.state is OPEN:
            self.protocol.send_text(data)
            if not self.unflushed_bytes:  # soon, with what else is written to this client
                self.loop.call_soon(self.flush)
            self.unflushed_bytes += len(data)
            if self.unflushed_bytes > SLICE_MINIMUM:  # to count each short message would cost time
                self._count_bytes()

    def close(self, code: int, reason: str) -> None:
        """Send a close frame, or soon drop the connection if the handshake is not complete."""
        if self.protocol.state is CONNECTING:
            self.closing = code, reason
            self._drop_after(STOP_HANDSHAKE)
        elif self.protocol.state is OPEN:
            self.protocol.send_close(code, reason)
            self.flush()
            self._drop_after(self.server.limits.close_timeout)
            # The client's own close frame must not wait for its rate.
            self.resume(RATE_LIMIT)

    def fail(self, code: int, reason: str) -> None:
        """Send a close frame, and ignore what else the client sends."""
        self.protocol.fail(code, reason)
        self.flush()

    def respond(self, status: int, text: str) -> Response:
        """Return a response that refuses a request."""
        return self.protocol.reject(status, text)

    # Receiving.

    def _on_readable(self) -> None:
        try:
            # Less over TLS, where some records cost CPU but hold no message.
            most = TLS_RECORD if self.tls else RECEIVE_BUFFER
            if self.paused_for:
                most = min(most, max(SLICE_MINIMUM, RECEIVE_BUFFER - len(self.input)))
            count = self.sock.recv_into(self.server.buffer, most)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        self.last_heard = time.monotonic()
        self.server.connections.move_to_end(self)  # those not heard for long stay in front
        if count == 0:
            self._on_eof()
        elif self.finished:
            return
        elif self.tls is None:
            self.input += self.server.buffer[:count]
            self.process_input()
        else:
            self._decrypt(self.tls, self.server.buffer[:count])

    def _decrypt(self, tls: TlsSession, data: memoryview) -> None:
        tls.decrypt(data, self.input)
        self.send_raw(tls.answer())
        if tls.ended:
            self._on_eof()
        else:
            self.process_input()

    def _on_eof(self) -> None:
        self.eof = True
        self.loop.remove_reader(self.fd)
        self.server.not_reading.pop(self, None)
        self.process_input()

    def process_input(self) -> None:
        """Process all whole requests and frames, unless processing is or becomes paused."""
        budget = SLICE
        while self.input and not self.paused_for:
            size = self._next_size()
            if size == 0 or size > len(self.input):
                break
            if size + len(self.fragments) > LONG_MESSAGE and not self.has_turn:
                self.pause(TURN)
                self.server.request_turn(self)
            elif budget <= 0:
                self.pause(SLICE_USED)
                self.loop.call_soon(self.resume, SLICE_USED)
            else:
                self._process(size)
                self.has_turn = False
                budget -= max(size, SLICE_MINIMUM)
        self._count_bytes()
        incomplete = bool(self.input) or self.opcode is not None
        if incomplete and self.is_open and not self.paused_for:
            self.server.incomplete.setdefault(self, time.monotonic())
        if self.paused_for or self.server.not_reading:
            self._control_reading()
        if self.eof and not self.paused_for:
            self.protocol.receive_eof()
            self.flush()
            self._finish()

    def _control_reading(self) -> None:
        """Do not read the socket while the connection is paused with a full input or output."""
        # Output counts too: OpenSSL answers some records, which never become input.
        too_much = len(self.input) >= RECEIVE_BUFFER or len(self.output) > MAX_BACKLOG
        full = bool(self.paused_for) and too_much
        if full and not self.eof and self not in self.server.not_reading:
            self.loop.remove_reader(self.fd)
            self.server.not_reading[self] = None
        elif not full and self in self.server.not_reading:
            del self.server.not_reading[self]
            self.loop.add_reader(self.fd, self._on_readable)

    def _next_size(self) -> int:
        """Return how much of the input to give to the protocol next, 0 if that is not known yet.

        This is a whole request or a whole frame, whose header is 2 to 14 bytes long (RFC 6455,
        section 5.2), or two bytes that the protocol refuses: an unknown opcode, or no mask. If the
        message is too long, closes the connection with 1009 and returns 0.
        """
        data = self.input
        if not self.opened:
            return self._request_size()
        if len(data) < 2 or data[0] & 0x0F not in OPCODES or data[1] < 0x80:
            return 2
        length, header = data[1] & 0x7F, 6  # with the mask of 4 bytes
        if length > 125:
            header = 8 if length == 126 else 14
            if len(data) < header:
                return header
            length = int.from_bytes(data[2 : header - 4], 'big')
        limit = self.server.limits.max_size
        if self.client.uuid is None:
            limit = min(limit, MAX_UNREGISTERED)
        held = 0 if data[0] & 0x08 else len(self.fragments)  # a control frame is apart from them
        if length + held > limit:
            self.fail(1009, f'message longer than {limit} bytes')
            return 0
        return header + length

    def _request_size(self) -> int:
        """Return the size of the request, 0 if it is not whole. Refuses what is no request."""
        end = self.input.find(b'\r\n\r\n')
        if end >= 0:
            return end + 4
        if self.input[0] == 0x16:  # TLS, on a port without it
            self.abort()
        elif len(self.input) > MAX_UNREGISTERED:
            self._answer(self.respond(431, 'The request is too long.\n'))
        return 0

    def _process(self, size: int) -> None:
        data = self.input[:size]
        del self.input[:size]
        self.protocol.receive_data(data)
        events = self.protocol.events_received()
        for event in events:
            if isinstance(event, Frame):
                self._on_frame(event)
            elif isinstance(event, Request):
                self._on_request(event)
        if not events and self.opened:  # the protocol has refused a frame, or ignores it
            self.flush()
        elif not events:
            self._refuse_request()
        if self.opcode is None and self.server.incomplete:
            self.server.incomplete.pop(self, None)

    def _on_request(self, request: Request) -> None:
        response = self.server.process_request(self, request)
        if response is None:
            response = self.protocol.accept(request)  # this may be a refusal
        self._answer(response)
        if self.is_open:
            self.mark_open()
            self.relay.on_open(self.client, request)
            request.headers.clear()  # to free them: the protocol keeps the request
            if self.closing is not None:
                # An HTTP error would terminate a ProxyStore endpoint; after these, it tries again.
                self.close(*self.closing)
        elif response.status_code == 403:  # only the check of the origin answers so
            address = client_address(self.remote_address, request)
            reason = f'origin {shown(request.headers.get("Origin", ""))} is not allowed'
            self.relay.log_refusal('unauthorized', 403, address, reason)

    def _answer(self, response: Response) -> None:
        self.protocol.send_response(response)
        self.flush()

    def mark_open(self) -> None:
        """Note that the handshake is complete."""
        self.opened = True
        self.server.handshakes.pop(self)
        self.drop_timer.cancel()

    def _refuse_request(self) -> None:
        # If websockets cannot parse a request, it ends the stream; newer versions answer some.
        answer = b''.join(self.protocol.data_to_send())
        if not answer:
            error = self.protocol.handshake_exc
            reason = shown(str(error.__cause__ or error)) if error is not None else ''
            answer = self.respond(400, f'Bad request: {reason}\n').serialize()
        self._send(answer)
        self._finish()

    def _on_frame(self, frame: Frame) -> None:
        if frame.opcode not in (TEXT, BINARY, CONT):
            self.flush()  # the protocol answers pings and closes
        elif self.is_open:
            self._on_data(frame)
        if not self.is_open:  # maybe because of this frame
            return
        wait = self.relay.pace(self.client, len(frame.data))
        if wait:
            self.pause(RATE_LIMIT)
            self.rate_timer = self.loop.call_later(wait, self.resume, RATE_LIMIT)

    def _on_data(self, frame: Frame) -> None:
        """Give a message to the relay when its last frame is here."""
        opcode = frame.opcode if self.opcode is None else self.opcode  # of its first frame
        if not frame.fin:
            self.opcode = opcode
            self.fragments += frame.data
            return
        data = bytes(frame.data)
        if self.opcode is not None:
            data = bytes(self.fragments) + data
            self.opcode, self.fragments = None, bytearray()
        try:
            text = data.decode() if opcode is TEXT else data  # bytes are refused by the relay
            takeover = self.relay.receive(self.client, text)
            if takeover is not None:
                self.pause(TAKEOVER)
                takeover.add_done_callback(lambda _: self.resume(TAKEOVER))
        except UnicodeDecodeError as error:
            self.fail(1007, f'{error.reason} at position {error.start}')
        except Exception:
            logger.exception('Internal error while serving %s', self.client)
            self.fail(1011, 'internal error')

    # Pausing.

    def pause(self, reason: str) -> None:
        """Stop processing input until `resume` is called for the same reason."""
        self.paused_for.add(reason)

    def resume(self, reason: str) -> None:
        """Process input again, unless there are other reasons not to."""
        if reason in self.paused_for:
            self.paused_for.remove(reason)
            if not self.paused_for:
                self.process_input()

    def take_turn(self) -> None:
        """Process the long message that waited for its turn, unless something else pauses it."""
        self.has_turn = True
        self.resume(TURN)
        self.has_turn = False

    # Sending.

    def flush(self) -> None:
        """Send what the protocol has to send."""
        self.unflushed_bytes = 0
        writes = self.protocol.data_to_send()
        if writes:
            self._send(b''.join(writes))
            self._count_bytes()
        if b'' in writes:  # the end of the stream
            self._finish()

    def _send(self, data: bytes) -> None:
        try:
            self.send_raw(self.tls.encrypt(data) if self.tls is not None else data)
        except ssl.SSLError:
            self.loop.call_soon(self.abort)  # not now: the caller still uses the connection

    def send_raw(self, data: bytes) -> None:
        """Send some bytes now, or when the client has read those before."""
        if data and not self.output:
            try:
                data = data[self.sock.send(data) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                return  # the client is gone, which is noticed by reading or by `is_reset`
            if data:
                self.loop.add_writer(self.fd, self._on_writable)
        if data:
            self.output += data
            self._count_bytes()
            if len(self.output) > MAX_BACKLOG:
                self.pause(UNREAD)

    def _on_writable(self) -> None:
        try:
            sent = self.sock.send(self.output)
            del self.output[:sent]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the client is gone
            self.output.clear()
        self._count_bytes()
        if not self.output:
            self.loop.remove_writer(self.fd)
            self._end_if_done()
        if len(self.output) <= MAX_BACKLOG // 4:
            self.resume(UNREAD)

    def _count_bytes(self) -> None:
        held = len(self.input) + len(self.fragments) + len(self.output) + self.unflushed_bytes
        if held != self.counted_bytes:
            self.server.count_bytes(self, held)

    def keep_alive(self, now: float) -> None:
        """Ping a client that has been silent, or close it if it has not answered a ping."""
        # While it is paused, its answer might not be read.
        if self.paused_for or not self.is_open:
            return
        if self.last_pinged <= self.last_heard:  # no ping is unanswered
            self.last_pinged = now
            self.protocol.send_ping(b'')
            self.flush()
        elif now - self.last_pinged > self.server.limits.ping_timeout:
            self.fail(1011, PING_TIMEOUT)

    # Closing.

    def _drop_after(self, seconds: float) -> None:
        self.drop_timer.cancel()
        self.drop_timer = self.loop.call_later(seconds, self.abort)

    def continue_closing(self, finished: bool) -> None:
        """After an upgrade, wait for the client's close frame or, if `finished`, its end."""
        self._drop_after(self.server.limits.close_timeout)
        if finished:
            self._finish()

    def _finish(self) -> None:
        """End the stream after what is in `output`, and discard further input."""
        if not self.finished:
            if self.tls is not None:
                self.send_raw(self.tls.end())
            self.finished = True
            self.input.clear()
            self.fragments.clear()
            self._count_bytes()
            self._drop_after(self.server.limits.close_timeout)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self.finished and not self.output:
            if self.eof:
                self.abort()
            else:
                with contextlib.suppress(OSError):  # the client may have reset the connection
                    self.sock.shutdown(socket.SHUT_WR)

    def is_reset(self) -> bool:
        """Return whether the client has reset the connection, which an unread socket hides."""
        if sys.platform != 'linux':
            return False
        return self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 7  # TCP_CLOSE

    def abort(self) -> None:
        """Close the socket at once and clean up; the client leaves the registry."""
        if self not in self.server.connections:
            return
        self.loop.remove_reader(self.fd)
        self.loop.remove_writer(self.fd)
        self.sock.close()
        self.drop_timer.cancel()
        if self.rate_timer is not None:
            self.rate_timer.cancel()
        self.finished, self.unflushed_bytes = True, 0
        self.paused_for.clear()
        for buffer in (self.input, self.fragments, self.output):
            buffer.clear()
        self._count_bytes()
        self.protocol.receive_eof()  # so that it has a `close_exc`
        self.server.forget(self)
        self.relay.on_close(self.client, self.protocol.close_exc)
        self.protocol.__dict__.clear()  # see CLOSED_PROTOCOL
        self.protocol = CLOSED_PROTOCOL
        del self.client  # which refers to this connection as well
        if not self.opened:
            logger.debug('No handshake from %s', format_address(self.remote_address))


class Listener:
    """Listening sockets, the connections that were accepted on them, and what those share."""

    def __init__(
        self,
        relay: RelayServer,
        process_request: Callable[[Connection, Request], Response | None],
        limits: Limits = Limits(),
        *,
        tls: ssl.SSLContext | None = None,
        max_connections: int | None = None,
    ) -> None:
        self.relay, self.process_request = relay, process_request
        self.limits, self.tls = limits, tls
        self.loop = asyncio.get_running_loop()
        self.sockets: list[socket.socket] = []
        fds = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # Clients that are being turned away need one as well.
        self.max_connections = max_connections or max(1, fds - RESERVED_FDS)
        self.accept_timer: asyncio.TimerHandle | None = None
        self.closed = asyncio.Event()
        # A dict with values of None is an ordered set. Here, the silent for longest are first.
        self.connections = OrderedDict[Connection, None]()
        self.handshakes: dict[Connection, None] = {}
        self.buffer = memoryview(bytearray(RECEIVE_BUFFER))  # each read is copied out of it
        self.not_reading: dict[Connection, None] = {}  # paused, with a full input or output
        self.incomplete: dict[Connection, float] = {}  # since when only part of a message is here
        # Connections with a long message, which take turns, one at a time.
        self.turns = deque[Connection]()
        self.turn_timer: asyncio.Handle | None = None
        self.buffered_bytes = 0  # of all connections

    # Accepting.

    async def listen(
        self, host: str, port: int, *, reuse_port: bool = False, inherited: Iterable[int] = ()
    ) -> Listener:
        """Listen on inherited sockets, or on all addresses of a host. Raises StartError."""
        for fd in inherited:
            self.sockets.append(socket.socket(fileno=fd))
            self.sockets[-1].set_inheritable(False)
        try:
            if not self.sockets:
                await self._open_sockets(host, port, reuse_port)
        except (OSError, ValueError) as error:  # ValueError: this cannot be the name of a host
            for sock in self.sockets:
                sock.close()
            reason = getattr(error, 'strerror', None) or error
            raise StartError(f'cannot listen on {host}:{port}: {reason}') from error
        self.start_accepting()
        self._sweep()
        return self

    async def _open_sockets(self, host: str, port: int, reuse_port: bool) -> None:
        addresses = await self.loop.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, _, _, _, address in dict.fromkeys(addresses):  # some are there twice
            self._open_socket(family, address, reuse_port)

    def _open_socket(self, family: int, address: Any, reuse_port: bool) -> None:
        sock = socket.socket(family)
        self.sockets.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:  # IPv4 has a socket of its own
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        limit_socket(sock)  # before the first connection, which inherits it
        sock.bind(address)
        sock.listen(LISTEN_BACKLOG)

    def is_serving(self) -> bool:
        """Return whether new clients are accepted."""
        return bool(self.sockets)

    def start_accepting(self) -> None:
        """Start or resume accepting connections."""
        for sock in self.sockets:
            self.loop.add_reader(sock, self._accept, sock)

    def stop_accepting(self) -> None:
        """Let new connections wait in the kernel."""
        if self.accept_timer is not None:
            self.accept_timer.cancel()
        for sock in self.sockets:
            self.loop.remove_reader(sock)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPT_BATCH):
            full = len(self.connections) >= self.max_connections
            if full and not self.handshakes:
                self._pause_accepting('too many connections')
                return
            try:
                sock, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause_accepting(str(error.strerror))
                return
            if self.handshakes and (full or len(self.handshakes) >= MAX_HANDSHAKES):
                # Most handshakes take less than a second: the oldest has probably stalled.
                next(iter(self.handshakes)).abort()
            sock.setblocking(False)
            Connection(self, sock, address)

    def _pause_accepting(self, reason: str) -> None:
        self.stop_accepting()
        self.accept_timer = self.loop.call_later(ACCEPT_RETRY, self.start_accepting)
        reason = f'{reason} ({len(self.connections)} are open)'
        self.relay.log_refusal('full', 'accept', 'new connections for now', reason)

    # Shared by the connections.

    def request_turn(self, connection: Connection) -> None:
        """Call `take_turn` of a connection after those that asked before."""
        self.turns.append(connection)
        if self.turn_timer is None:
            self.turn_timer = self.loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        began = time.perf_counter()
        try:
            self.turns.popleft().take_turn()
        finally:
            self.turn_timer = None
            if self.turns:
                # The rest of the relay gets as much time as the turn has taken.
                delay = time.perf_counter() - began
                self.turn_timer = self.loop.call_later(delay, self._next_turn)

    def count_bytes(self, connection: Connection, held: int) -> None:
        """Note how many bytes a connection buffers. Over the limit, close those with the most."""
        self.buffered_bytes += held - connection.counted_bytes
        connection.counted_bytes = held
        while self.buffered_bytes > MAX_BUFFERED:
            largest = max(self.connections, key=lambda c: c.counted_bytes)
            reason = f'out of memory: {largest.counted_bytes} bytes buffered'
            self.relay.log_refusal('out_of_memory', 'memory', largest.client, reason)
            if largest.output:  # a close frame would have to wait behind it
                largest.abort()
            else:
                largest.fail(1013, 'the relay is out of memory')

    def _sweep(self) -> None:
        """Ping idle connections and close incomplete and lost ones, again and again."""
        interval = self.limits.ping_interval
        if not self.closed.is_set():
            self.loop.call_later(min(SWEEP_INTERVAL, (interval or 60) / 4), self._sweep)
        now = time.monotonic()
        if interval:  # `connections` and `incomplete` are in the order of these times
            idle = itertools.takewhile(lambda c: c.last_heard <= now - interval, self.connections)
            for connection in list(idle):
                connection.keep_alive(now)
        for connection, since in list(self.incomplete.items()):
            if since > now - MESSAGE_TIMEOUT:
                break
            if not connection.paused_for:
                connection.fail(1008, INCOMPLETE)
        for connection in list(self.not_reading):
            if connection.is_reset():
                connection.abort()

    # Closing.

    def forget(self, connection: Connection) -> None:
        """Remove a closed connection."""
        for collection in (self.connections, self.handshakes, self.not_reading, self.incomplete):
            collection.pop(connection, None)
        self._check_closed()

    def _check_closed(self) -> None:
        if not self.connections and not self.sockets:
            self.closed.set()

    def close(self) -> None:
        """Stop listening, and close all connections with 1001. Sets `closed` when that is done."""
        self.stop_accepting()
        for sock in self.sockets:
            sock.close()
        self.sockets = []
        for connection in list(self.connections):
            connection.close(1001, '')
        self._check_closed()


# ------------------------------------------------------------------------------- Upgrade
#
# `kill -USR2` replaces the running code with the relay.py on disk, in the same process. First, a
# child process shows that the new code starts with these options. Then the state is written to a
# file in memory, one JSON text per line, and the process executes the new code, which inherits all
# sockets. Clients on ws:// stay connected. TLS connections are closed with 1012, because OpenSSL
# cannot hand over its state. All this needs Linux.

# How the state may change: a new key needs a default for states without it; older versions ignore
# it. Any other change needs a new number: then the trial fails, and the relay needs a restart.
STATE_VERSION = 1
TRIAL = 'RELAY_TRIAL'  # environment variable of a trial: the STATE_VERSION of the running code
STATE_FD = 'RELAY_STATE_FD'  # environment variable of an upgrade: the descriptor of the state
HANDLED_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}
CLIENT_STATE = ('name', 'user', 'address', 'response_type')  # handed over as they are


async def block_signals() -> None:
    """Block signals. Those that arrived before are handled: SIGTERM cancels the upgrade."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    # It takes asyncio four turns of its loop to read a signal from a pipe, call the handler, wake
    # up the task that waits for a stop, and deliver the cancellation.
    for _ in range(4):
        await asyncio.sleep(0)


def command_line() -> list[str]:
    """Return the command that started this process, with the full path of the interpreter."""
    with open('/proc/self/cmdline', 'rb') as file:  # sys.orig_argv needs Python 3.10
        return [sys.executable, *map(os.fsdecode, file.read().split(b'\0')[1:-1])]


async def try_new_code() -> None:
    """Run the new code until just before it would listen. Raises StartError if it fails."""
    pipe, devnull = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    environment = {**os.environ, TRIAL: str(STATE_VERSION)}
    # The child inherits that they are blocked: `systemctl kill` sends USR2 to it as well.
    await block_signals()
    child = await asyncio.create_subprocess_exec(
        *command_line(), env=environment, stdin=devnull, stdout=devnull, stderr=pipe
    )
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
    ending = asyncio.ensure_future(child.communicate())
    try:
        # Not `wait_for`: before Python 3.12, it may swallow the cancellation by a stop.
        await asyncio.wait({ending}, timeout=TRIAL_TIMEOUT)
        if not ending.done():
            raise StartError(f'the new version does not start within {TRIAL_TIMEOUT} s')
        output = ending.result()[1]
    finally:  # also if the relay stops in the meantime
        ending.cancel()
        if child.returncode is None:
            child.kill()
            await child.wait()
    # An empty or incomplete file exits with 0 as well, but does not print TRIAL.
    if child.returncode != 0 or TRIAL.encode() not in output:
        # The last line may be anything, even escape codes for a terminal.
        last = output.decode(errors='replace').strip().rpartition('\n')[2].strip()
        reason = ascii(last[:MAX_REASON])[1:-1]
        raise StartError(reason or f'the new version exits with status {child.returncode}')


def is_trial() -> bool:
    """Return whether this process only has to show that it starts. If so, print TRIAL."""
    state_version = os.environ.get(TRIAL)
    if state_version is None:
        return False
    if state_version != str(STATE_VERSION):
        raise StartError('the new version cannot take over the clients; restart the relay')
    print(TRIAL, file=sys.stderr)
    return True


async def prepare_upgrade(listeners: list[Listener]) -> int:
    """Close or finish what cannot be handed over. Return how many clients that closed."""
    relay = listeners[0].relay
    encrypted: list[Connection] = []
    for listener in listeners:
        listener.stop_accepting()
        for connection in list(listener.connections):
            if connection.tls is None:
                connection.pause(UPGRADING)
            else:
                encrypted.append(connection)
                connection.close(1012, 'the relay is being upgraded')
    if relay.backplane is not None:
        await relay.backplane.close(upgrading=True)
    deadline = time.monotonic() + DRAIN_TIMEOUT
    while time.monotonic() < deadline and any(c in c.server.connections for c in encrypted):
        await asyncio.sleep(DRAIN_TIMEOUT / 10)
    for client in list(relay._websocket_to_client.values()):
        if client.takeover is not None:
            client.takeover.cancel()  # the next holder of its UUID waits no longer
    # From here on, a stop waits for the new code. Meanwhile, takeovers and closings are completed.
    await block_signals()
    return sum(connection.opened for connection in encrypted)


def connection_state(connection: Connection) -> dict[str, Any]:
    """Return the state of a connection as values of JSON, for `restore_connection`."""
    client, backplane = connection.client, connection.relay.backplane
    timer = client.registration_timer
    data = bytes(connection.input)
    if connection.opcode is not None:  # the fragments of an unfinished message, as one fragment
        fragment = Frame(connection.opcode, bytes(connection.fragments), fin=False)
        data = fragment.serialize(mask=True) + data
    return {
        **{name: getattr(client, name) for name in CLIENT_STATE},
        'uuid': None if client.uuid is None else str(client.uuid),
        'token_hash': client.token_hash.hex(),
        'seconds_to_register': None if timer is None else timer.when() - connection.loop.time(),
        'claim': None if backplane is None else backplane.claims.get(client),
        'fd': connection.sock.fileno(),
        'remote_address': connection.remote_address,
        'opened': connection.opened,
        'is_open': connection.is_open,
        'finished': connection.finished,
        'input': base64.b64encode(data).decode(),
        'output': base64.b64encode(connection.output).decode(),
    }


def execute_new_code(listeners: list[Listener], began: float, closed: int) -> None:
    """Write the state and execute the new code. Raises OSError if that fails."""
    relay, sockets = listeners[0].relay, [listener.sockets for listener in listeners]
    for connection in list(listeners[0].connections):
        connection.flush()  # which may close it
    connections = [c for c in listeners[0].connections if c.tls is None]
    header = {
        'relay_version': __version__,
        'began': began,
        'closed': closed,
        'sockets': [[sock.fileno() for sock in group] for group in sockets],
        'started': relay.started,
        'counts': relay.counts,
        'refusal_counts': relay.refusal_counts,
    }
    for sock in itertools.chain(*sockets, (c.sock for c in connections)):
        sock.set_inheritable(True)
    memory = os.memfd_create('relay-state', 0)  # without MFD_CLOEXEC: the new code inherits it
    with open(memory, 'w+', encoding='utf-8') as file:
        file.write(json.dumps(header) + '\n')
        for connection in connections:
            file.write(json.dumps(connection_state(connection)) + '\n')
        file.seek(0)
        environment = {**os.environ, STATE_FD: str(file.fileno())}
        os.execve(sys.executable, command_line(), environment)  # this does not return


async def upgrade_on_request(request: asyncio.Event, listeners: list[Listener]) -> None:
    """Upgrade whenever the event is set. This task is cancelled when the relay stops."""
    while True:
        request.clear()  # a request during an upgrade is ignored
        await request.wait()
        try:
            began = time.monotonic()
            await try_new_code()
            notify_reloading()
            closed = await prepare_upgrade(listeners)
            execute_new_code(listeners, began, closed)
        except Exception as error:
            bug = not isinstance(error, (StartError, OSError))
            logger.error('Upgrade failed, keeping the running version: %s', error, exc_info=bug)
            backplane = listeners[0].relay.backplane
            if backplane is not None:
                backplane.start()
            notify('READY=1')
        finally:  # still here, so the new code was not executed
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
            for listener in listeners:
                listener.start_accepting()
                for connection in list(listener.connections):
                    connection.resume(UPGRADING)


def restore_connection(listener: Listener, saved: dict[str, Any]) -> None:
    """Continue a connection. Its input is not processed before all of them are restored."""
    sock = socket.socket(fileno=saved['fd'])
    sock.set_inheritable(False)
    opened = saved.get('opened', True)  # older versions handed over no others
    state = OPEN if opened else CONNECTING
    connection = Connection(listener, sock, tuple(saved['remote_address']), state)
    connection.input += base64.b64decode(saved['input'])
    try:
        if not opened:
            if saved['finished']:  # it was refused
                connection.continue_closing(finished=True)
            return
        client = connection.client
        for name in CLIENT_STATE:
            setattr(client, name, saved[name])
        client.uuid = None if saved['uuid'] is None else UUID(saved['uuid'])
        client.token_hash = bytes.fromhex(saved['token_hash'])
        connection.mark_open()
        connection.send_raw(base64.b64decode(saved['output']))
        if saved['is_open'] and connection.is_open:
            claim = None if saved['claim'] is None else Claim(*saved['claim'])
            listener.relay.readmit(client, saved['seconds_to_register'], claim)
        else:
            connection.protocol.send_close()  # for its state; the old code has sent the frame
            connection.protocol.data_to_send()
            connection.continue_closing(saved['finished'])
    except Exception:
        connection.abort()
        raise


class Handover(NamedTuple):
    """The new code's part in an upgrade: the state that the old code has left."""

    header: dict[str, Any]
    file: TextIO  # its other lines: one for each connection

    def restore(self, listener: Listener) -> None:
        """Continue all connections and counters, and log how that went."""
        relay, header = listener.relay, self.header
        relay.started = header['started']
        relay.counts.update(header['counts'])
        relay.refusal_counts.update(header['refusal_counts'])
        closed = header['closed']
        with self.file:
            for line in self.file:  # all at once may not fit into memory
                try:
                    restore_connection(listener, json.loads(line))
                except Exception as error:
                    closed += 1
                    logger.error('A client was lost in the upgrade: %r', error)
        relay.close_revoked()
        versions = f'{header["relay_version"]} to {__version__}'
        seconds, kept = time.monotonic() - header['began'], len(relay._websocket_to_client)
        text = 'Upgraded %s in %.2f s: %d clients kept, %d closed'
        logger.info(text, versions, seconds, kept, closed)
        for connection in list(listener.connections):
            connection.process_input()


def receive_handover() -> Handover | None:
    """Return the state that the old code has left, or None if this is not an upgrade."""
    fd = os.environ.pop(STATE_FD, None)
    if fd is None:
        return None
    file = open(int(fd), encoding='utf-8')  # `restore` closes it
    return Handover(json.loads(next(file)), file)


# ------------------------------------------------------------------------------- Operations
#
# What the operator sees: metrics, systemd's view of the service, and the log.

# Levels of the log, as syslog and the journal number them.
LEVELS = {'CRITICAL': 2, 'ERROR': 3, 'WARNING': 4, 'INFO': 6, 'DEBUG': 7}


def metrics(relay: RelayServer) -> str:
    """Return the metrics of a relay in Prometheus' text format."""
    versions = f'version="{__version__}",websockets="{websockets_version}"'
    generations = [client.response_type for client in relay._uuid_to_client.values()]
    values: dict[str, float] = {
        f'relay_build_info{{{versions},python="{sys.version.split()[0]}"}}': 1,
        'relay_uptime_seconds': time.time() - relay.started,
        'relay_connected_clients': len(relay._websocket_to_client),
        'relay_registered_clients{generation="server"}': generations.count('server_response'),
        'relay_registered_clients{generation="relay"}': generations.count('relay_response'),
        **{f'relay_{name}_total': count for name, count in relay.counts.items()},
        **{f'relay_refusals_total{{reason="{k}"}}': n for k, n in relay.refusal_counts.items()},
        **process_metrics(relay),
    }
    if relay.listener is not None:
        values['relay_open_connections'] = len(relay.listener.connections)
        values['relay_buffered_bytes'] = relay.listener.buffered_bytes
    if relay.backplane is not None:
        values['relay_nats_connected'] = int(relay.backplane.connected)
        values['relay_nats_round_trip_seconds'] = relay.backplane.round_trip
    if relay.certificate_expiry is not None:
        values['relay_certificate_expiry_timestamp_seconds'] = relay.certificate_expiry
    lines = []
    for family, names in itertools.groupby(values, lambda name: name.partition('{')[0]):
        kind = 'counter' if family.endswith('_total') else 'gauge'
        lines += [f'# HELP {family} {family.replace("_", " ")}', f'# TYPE {family} {kind}']
        lines += [f'{name} {values[name]}' for name in names]
    return '\n'.join(lines) + '\n'


def process_metrics(relay: RelayServer) -> dict[str, float]:
    """Return metrics of the process, under the names that Prometheus' client libraries use."""
    values: dict[str, float] = {
        'process_start_time_seconds': relay.started,
        'process_cpu_seconds_total': time.process_time(),
        'process_max_fds': resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    with contextlib.suppress(OSError), open('/proc/self/statm') as file:  # not on macOS
        values['process_open_fds'] = len(os.listdir('/proc/self/fd'))
        pages = int(file.read().split()[1])
        values['process_resident_memory_bytes'] = pages * resource.getpagesize()
    return values


def expiry_of(certfile: str) -> float:
    """Return when a certificate expires, in s since 1970. Raises OSError and StartError."""
    with open(certfile, encoding='latin-1') as file:
        pem = file.read().partition('CERTIFICATE-----')[2].partition('-----END')[0]
    # The standard library only parses certificates it has verified. The first two dates of one are
    # its first and last day (RFC 5280, section 4.1.2.5); years after 17 0d have two digits.
    try:
        dates = re.findall(rb'(?:\x17\r|\x18\x0f)(\d{12,14})Z', base64.b64decode(pem))
        end = (b'20' + dates[1])[-14:].decode()
        return datetime.datetime.strptime(f'{end}+0000', '%Y%m%d%H%M%S%z').timestamp()
    except (ValueError, IndexError) as error:
        raise StartError(f'{certfile}: cannot tell when the certificate expires') from error


def notify(*states: str) -> None:
    """Send states to systemd, if it started the relay and wants to know (sd_notify(3))."""
    path = os.environ.get('NOTIFY_SOCKET')
    if not path:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        # A leading @ stands for the null byte of an abstract socket.
        sock.connect('\0' + path[1:] if path[0] == '@' else path)
        sock.send('\n'.join(states).encode())


def notify_reloading() -> None:
    """Tell systemd that a reload or an upgrade has begun; it ends with READY=1."""
    notify('RELOADING=1', f'MONOTONIC_USEC={time.monotonic_ns() // 1000}')


def send_status(relay: RelayServer) -> None:
    """Send systemd a sign of life and the status line, twice in a watchdog period or minute."""
    clients, messages = len(relay._uuid_to_client), relay.counts['forwarded_messages']
    uptime = datetime.timedelta(seconds=int(time.time() - relay.started))
    status = f'STATUS={clients:,} clients, {messages:,} messages forwarded, up {uptime}'
    notify('WATCHDOG=1', status)
    usec = os.environ.get('WATCHDOG_USEC', '')
    period = int(usec) / 1_000_000 if usec.isdecimal() and len(usec) < 16 else 60
    asyncio.get_running_loop().call_later(max(period, 0.02) / 2, send_status, relay)


class LogFormatter(logging.Formatter):
    """Formats a line for a file or a terminal. For speed, it keeps the time of the last second."""

    cached_second, cached_time = 0, ''

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Return the local time of a record, to the second."""
        if int(record.created) != self.cached_second:
            self.cached_second = int(record.created)
            self.cached_time = super().formatTime(record, datefmt)
        return self.cached_time


class JournalFormatter(logging.Formatter):
    """Formats a line for the journal, which adds the time: the level comes first."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one or more lines."""
        lines = super().format(record).splitlines()
        return '\n'.join(f'<{LEVELS[record.levelname]}>{line}' for line in lines)


def is_journal() -> bool:
    """Return whether standard output goes to the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):  # it may be closed
        status = os.fstat(1)
        return os.environ.get('JOURNAL_STREAM') == f'{status.st_dev}:{status.st_ino}'
    return False


def configure_logging(log_dir: str | None, level: str) -> None:
    """Log to standard output and, if given, to a folder. Raises StartError if that fails."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if log_dir is not None:
        path = os.path.join(log_dir, 'server.log')
        try:
            os.makedirs(log_dir, exist_ok=True)
            # A new file begins when Sunday ends; the old ones are kept.
            handlers.append(logging.handlers.TimedRotatingFileHandler(path, 'W6'))
        except OSError as error:
            raise StartError(f'cannot log to {path}: {error.strerror}') from error
    line = '[%(asctime)s.%(msecs)03d] %(levelname)-5s (%(name)s) :: %(message)s'
    for handler in handlers:
        handler.setFormatter(LogFormatter(line, '%Y-%m-%d %H:%M:%S'))
    if is_journal():
        handlers[0].setFormatter(JournalFormatter('%(message)s'))
    logging.basicConfig(level=level, handlers=handlers)
    logging.raiseExceptions = False  # a full disk must not print a traceback for each line
    # Do not collect what no format shows (logging HOWTO, section Optimization).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    # websockets logs session descriptions at DEBUG and, up to version 15, each port scan as an
    # ERROR. asyncio warns of slow callbacks; only its errors are worth a line.
    logging.getLogger('websockets').setLevel(logging.CRITICAL)
    logging.getLogger('asyncio').setLevel(logging.ERROR)


# ------------------------------------------------------------------------------- Scale-out
#
# Connects clients of different relays over NATS. Nothing here runs without --nats. The subjects:
#   relay.client.USER.UUID: a request with messages for this client, separated by NUL bytes, which
#       no JSON text contains. Relays subscribe as a queue group, so NATS asks only one. The reply
#       is a verdict on each message, separated by commas: empty, or a key of FORWARD_ERRORS.
#   relay.claims: {"version": 1, "claims": [[subject, stamp (ns), id, age (s), address]]} goes to
#       all. With "upgrading": true, the sender's clients will be back. Relays trust each other.
# New keys, items and verdicts are ignored. Another change needs a version that all relays know.


def _import_nats(credentials: str | None) -> Any:
    try:
        nats: Any = importlib.import_module('nats')
        if credentials:
            importlib.import_module('nkeys')
            with open(credentials, 'rb') as file:
                # nats-py 2.16 loops forever if the first of these is missing.
                if not re.search(b'BEGIN NATS USER JWT.*BEGIN USER NKEY SEED', file.read(), re.S):
                    raise StartError(f'{credentials} holds no credentials for NATS')
    except ImportError as error:
        package = "'nats-py[nkeys]'" if credentials else 'nats-py'
        raise StartError(f'--nats: {error}; try: pip install {package}') from error
    except OSError as error:
        raise StartError(f'cannot read {credentials}: {error.strerror}') from error
    logging.getLogger('nats').setLevel(logging.CRITICAL)  # all that matters reaches `_on_error`
    # gh-136234, Python 3.12 to 3.14.0: writelines() after a loss may mute a later connection.
    nats.aio.transport.TcpTransport.writelines = lambda self, data: self.write(b''.join(data))
    return nats


class Backplane:
    """A relay's connection to the others: claims and subscriptions, and a queue for each peer."""

    def __init__(self, relay: RelayServer, servers: list[str], credentials: str | None) -> None:
        self.relay, self.library = relay, _import_nats(credentials)
        self.options = {'servers': servers, 'user_credentials': credentials, **NATS_OPTIONS}
        self.nats: Any = self.library.NATS()
        self.round_trip = 0.0  # s, to NATS and back
        self.logged_faults: set[str] = set()  # faults logged since the last connection was made
        self.claims: dict[Client, Claim] = {}
        self.clients: dict[str, Client] = {}  # those in `claims`, by subject
        self.subscriptions: dict[Client, Any] = {}
        self.changed: set[Client] = set()  # to subscribe and claim, or to unsubscribe if they left
        self.updating = asyncio.Lock()
        self.upgrade_ends = 0.0  # s, monotonic clock: until then, another relay may be upgrading
        self.queues: dict[tuple[str, UUID], deque[InFlight]] = {}  # by user and UUID
        self.in_flight_bytes = 0  # in all queues
        self.tasks: set[asyncio.Future[Any]] = set()  # cancelled when the connection has failed
        self.closed = True
        self.start()

    def start(self) -> None:
        """Connect, also again after a close."""
        if self.closed:
            self.closed = False
            self.running = asyncio.ensure_future(self._run())

    @property
    def connected(self) -> bool:
        """Whether messages can be sent to other relays."""
        return bool(self.nats.is_connected) and not self.closed

    async def _run(self) -> None:
        while True:
            await self._run_logged(self._connect_and_claim)
            await asyncio.sleep(NATS_HEARTBEAT)

    async def _connect_and_claim(self) -> None:
        self.nats, self.subscriptions = self.library.NATS(), {}  # new for each connection
        try:
            await self.nats.connect(error_cb=self._on_error, **self.options)
            await self.nats.subscribe('relay.claims', cb=self._on_claims)
            if not self.connected:  # nats-py 2.16 may take another message for its first PONG
                raise ConnectionError('interrupted while connecting')
            self.logged_faults.clear()
            logger.info('NATS is connected: %s', self.nats.connected_url.netloc.rpartition('@')[2])
            for beat in itertools.count():
                # Again at the second beat: by then, all NATS servers know that this relay listens.
                if beat == 1 or beat % CLAIM_BEATS == 0:
                    self._start(self._subscribe_and_claim, self.claims)
                self.round_trip = await self.nats.rtt(NATS_REQUEST_TIMEOUT)  # fails if it is lost
                await asyncio.sleep(NATS_HEARTBEAT)
        finally:
            await self._disconnect()

    async def _disconnect(self) -> None:
        # nats-py 2.16: its tasks may fail; close() may last long, and leave tasks running.
        work = [getattr(self.nats, f'_{name}_task', None) for name in ('flusher', 'reading')]
        closing = asyncio.gather(self.nats.close(), *filter(None, work), return_exceptions=True)
        try:
            await asyncio.wait({closing}, timeout=NATS_HEARTBEAT)
        finally:  # also if it is cancelled
            writer = getattr(getattr(self.nats, '_transport', None), '_io_writer', None)
            if writer is not None:  # a frozen server would never read the rest
                writer.transport.abort()
            for subscription in list(getattr(self.nats, '_subs', {}).values()):
                subscription._stop_processing()
            for task in self.tasks:
                task.cancel()
        await asyncio.wait({closing, *self.tasks}, timeout=NATS_REQUEST_TIMEOUT)

    def _start(self, work: Callable[..., Awaitable[Any]], *args: Any) -> None:
        task = asyncio.ensure_future(self._run_logged(work, *args))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run_logged(self, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        try:  # called only here: a task cancelled before its start would leave a coroutine behind
            return await work(*args)
        except Exception as error:
            await self._on_error(error)

    async def _on_error(self, error: Exception) -> None:
        """Log a fault of NATS or the network in one line, and a bug here with its traceback."""
        # nats-py 2.16: texts begin with its name, or quote a subject; it asserts to be connected.
        text = str(error).partition('"')[0].rpartition('nats: ')[2].strip(" '")
        text = text or type(error).__name__
        faults = self.library.errors.Error, OSError, asyncio.TimeoutError, AssertionError
        if not isinstance(error, faults):
            logger.error('Internal error while using NATS', exc_info=error)
        elif text not in self.logged_faults:
            self.logged_faults.add(text)
            lost = '' if self.connected else '; clients of other relays cannot be reached'
            logger.warning('NATS: %s%s', text, lost)

    async def close(self, upgrading: bool = False) -> None:
        """Finish what is in flight, for up to DRAIN_TIMEOUT, and leave NATS; 4 s at most."""
        if upgrading and self.connected:
            notice = json.dumps({'version': 1, 'claims': [], 'upgrading': True})
            self._start(self.nats.publish, 'relay.claims', notice.encode())
        for subscription in self.subscriptions.values():
            self._start(subscription.drain)
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=DRAIN_TIMEOUT)
        self.closed = True  # a task that starts later would be cancelled before it has begun
        for _ in range(6):  # nats-py 2.16 may take a cancellation for one of its own
            await asyncio.sleep(0)  # a task that is cancelled before it starts would do nothing
            for work in (self.running, *self.tasks):
                work.cancel()
            await asyncio.wait({self.running, *self.tasks}, timeout=NATS_HEARTBEAT)

    def announce(self, client: Client, claim: Claim | None = None) -> None:
        """Subscribe to a client's messages and claim its UUID, with an earlier claim if given."""
        self.claims[client] = claim or Claim(time.time_ns(), uuid4().hex, time.monotonic())
        self.clients[_subject(client.user, client.uuid)] = client
        self._start(self._subscribe_and_claim, [client])

    def withdraw(self, client: Client) -> None:
        """Unsubscribe from a client's messages."""
        del self.claims[client], self.clients[_subject(client.user, client.uuid)]
        self._start(self._subscribe_and_claim, [client])

    async def _subscribe_and_claim(self, clients: Iterable[Client]) -> None:
        """Subscribe and claim clients in batches, and unsubscribe those that have left."""
        if not self.connected:
            return
        nats, subscriptions, batch = self.nats, self.subscriptions, []  # of this connection
        self.changed.update(clients)
        async with self.updating:
            while self.changed:
                client = self.changed.pop()
                subject = _subject(client.user, client.uuid)
                if client not in self.claims and client in subscriptions:
                    self._start(subscriptions.pop(client).drain)
                if client in self.claims and client not in subscriptions:
                    handler = partial(self._on_request, client.user, client.uuid)
                    subscriptions[client] = await nats.subscribe(subject, 'relays', handler)
                if client in self.claims:
                    own = self.claims[client]
                    batch.append((subject, *own[:2], time.monotonic() - own.since, client.address))
                if batch and (not self.changed or len(batch) * CLAIM_SIZE > nats.max_payload):
                    text = json.dumps({'version': 1, 'claims': batch})
                    await nats.publish('relay.claims', text.encode())
                    batch.clear()

    async def _on_claims(self, message: Any) -> None:
        # A registers at relay 1 (stamp 10), then B at relay 2 with a slow clock (stamp 7). Relay 1
        # answers with A's claim. Relay 2, whose client is younger, outbids it (11), and relay 1
        # displaces A. A claim does not age on its way: if clocks differ, a late one may win.
        batch, now = json.loads(message.data), time.monotonic()
        if batch['version'] != 1:
            raise ConnectionError('another relay makes claims of a version not known here')
        if batch.get('upgrading'):
            self.upgrade_ends = now + UPGRADE_TIMEOUT
        for subject, stamp, claim_id, age, address, *_ in batch['claims']:
            if subject in self.clients:
                client = self.clients[subject]
                own = self.claims[client]
                if (stamp, claim_id) > own[:2] and now - age >= own.since:  # and it is younger
                    self.relay.displace(client, f'{address} (on another relay)')
                elif claim_id != own.id:  # it has the same id if it is from before an upgrade
                    self.claims[client] = own._replace(stamp=max(own.stamp, stamp + 1))
                    self._start(self._subscribe_and_claim, [client])

    def forward(self, client: Client, message: PeerConnection, data: bytes) -> str | None:
        """Forward a message or return why not. What another relay refuses is sent back later."""
        key = client.user, message.peer_uuid
        memory = MESSAGE_COST + len(data) + sum(map(sys.getsizeof, vars(message).values()))
        queue = self.queues.get(key, deque())
        if not self.connected or self.in_flight_bytes + memory > MAX_IN_FLIGHT:
            return 'disconnected'
        if len(data) > self.nats.max_payload:
            return 'too_long'
        texts = [data, *(text for _, _, text, _ in queue)]
        if queue and sum(len(text) + MESSAGE_COST for text in texts) > MAX_BACKLOG:
            return 'backlog'
        if key not in self.queues:
            self.queues[key] = queue
            self._start(self._send_queue, key, queue)
        queue.append((client, message, data, memory))
        self.in_flight_bytes += memory
        return None

    async def _send_queue(self, key: tuple[str, UUID], queue: deque[InFlight]) -> None:
        while queue:
            verdicts: list[str] | None = None
            with contextlib.suppress(asyncio.CancelledError):  # when the connection has failed
                verdicts = await self._run_logged(self._send_batch, _subject(*key), queue)
            # After a failure, a batch may still arrive: nothing is sent that could overtake it.
            for kind in verdicts or ['disconnected'] * len(queue):
                client, message, _, memory = queue.popleft()
                self.in_flight_bytes -= memory
                if kind and client.link.is_open:
                    self.relay.send_back(client, message, kind)
        del self.queues[key]

    async def _send_batch(self, subject: str, queue: Iterable[InFlight]) -> list[str]:
        ends = itertools.accumulate(len(text) + 1 for *_, text, _ in queue)  # with NUL in between
        batch = [sent[2] for sent, end in zip(queue, ends) if end - 1 <= self.nats.max_payload]
        for attempt in range(int(NATS_REQUEST_TIMEOUT / SUBSCRIPTION_PROPAGATION)):
            with contextlib.suppress(self.library.errors.NoRespondersError):
                reply = await self.nats.request(subject, b'\0'.join(batch), NATS_REQUEST_TIMEOUT)
                verdicts: list[str] = reply.data.decode(errors='replace').split(',')
                if len(verdicts) != len(batch) or not {'', *FORWARD_ERRORS}.issuperset(verdicts):
                    raise ConnectionError('another relay gave a verdict not known here')
                # A relay says 'unknown_peer', to all, if it has just lost the client to another.
                if verdicts[0] != 'unknown_peer':
                    self.relay.counts['remote_messages'] += verdicts.count('')
                    return verdicts
            if attempt > 0 and time.monotonic() > self.upgrade_ends:  # or else, try again
                self.relay.counts['remote_unknown'] += len(batch)
                return ['unknown_peer'] * len(batch)
            await asyncio.sleep(SUBSCRIPTION_PROPAGATION)
        raise self.library.errors.TimeoutError

    async def _on_request(self, user: str, uuid: Any, message: Any) -> None:
        verdicts = [self.relay.deliver(user, uuid, data) for data in message.data.split(b'\0')]
        await message.respond(','.join(kind or '' for kind in verdicts).encode())
        if not self.connected:  # end this task of nats-py 2.16, which ignores some cancellations
            raise asyncio.CancelledError


def _subject(user: str, uuid: UUID | None) -> str:
    return f'relay.client.{user.encode().hex() or "-"}.{uuid}'  # hex: dots and stars are special


# ------------------------------------------------------------------------------- Server
#
# Starting and stopping a relay: TLS files, sockets, signals.


async def serve(
    host: str,
    port: int,
    certfile: str | None = None,
    keyfile: str | None = None,
    *,
    relay: RelayServer | None = None,
    limits: Limits = Limits(),
    metrics_port: int | None = None,
    nats: list[str] | None = None,
    nats_credentials: str | None = None,
) -> None:
    """Serve a relay until SIGINT or SIGTERM. SIGHUP reloads its files, SIGUSR2 upgrades it.

    Handles these signals, so it has to run in the main thread. `nats` are URLs of NATS servers.
    Raises StartError if a file or package cannot be used, or if it cannot listen on an address.
    """
    # Names are looked up in threads, which must not receive a signal that is blocked elsewhere.
    block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, HANDLED_SIGNALS)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(initializer=block))
    relay = relay or RelayServer()
    tls = None
    if certfile is not None:
        tls, relay.certificate_expiry = tls_context(certfile, keyfile), expiry_of(certfile)
    if nats:
        relay.backplane = Backplane(relay, nats, nats_credentials)
    relay.listener = Listener(relay, relay.process_request, limits, tls=tls)
    if is_trial():  # all that needs no network has succeeded
        return
    handover = receive_handover()
    listeners = await _listen(relay.listener, host, port, metrics_port, handover)
    reload = partial(relay.reload, certfile, keyfile)
    await _run_until_stopped(listeners, handover, reload)


async def _listen(
    listener: Listener, host: str, port: int, metrics_port: int | None, handover: Handover | None
) -> list[Listener]:
    """Listen for clients and for Prometheus; after an upgrade, on the inherited sockets."""
    relay = listener.relay
    inherited = [(), ()] if handover is None else handover.header['sockets']
    # Several relays of one machine can share a port if NATS links them.
    shared = relay.backplane is not None
    try:
        await listener.listen(host, port, reuse_port=shared, inherited=inherited[0])
        if metrics_port is None:
            return [listener]
        scrapes = Listener(relay, lambda ws, _: ws.respond(200, metrics(relay)), max_connections=8)
        return [listener, await scrapes.listen('127.0.0.1', metrics_port, inherited=inherited[1])]
    except StartError:
        if relay.backplane is not None:  # nats-py may ignore the cancellation by asyncio.run
            await relay.backplane.close()
        raise


async def _run_until_stopped(
    listeners: list[Listener], handover: Handover | None, reload: Callable[[], None]
) -> None:
    loop = asyncio.get_running_loop()
    stop, upgrade = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload)
    loop.add_signal_handler(signal.SIGUSR2, upgrade.set)
    # An upgrade blocks them until they have handlers.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
    upgrading = asyncio.ensure_future(upgrade_on_request(upgrade, listeners))
    if handover is not None:
        handover.restore(listeners[0])
    else:
        _log_start(listeners)
    send_status(listeners[0].relay)
    notify('READY=1')
    await stop.wait()
    upgrading.cancel()
    await asyncio.wait({upgrading})
    await _stop(listeners)
    # The handlers end with the loop: until the process exits, another signal must not kill it.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)


def _log_start(listeners: list[Listener]) -> None:
    for service, listener in zip(('relay server', 'metrics'), listeners):
        for sock in listener.sockets:
            logger.info('Serving %s on %s', service, format_address(sock.getsockname()))
    if listeners[0].relay.tokens is None:
        logger.warning('No --token-file: anyone who can reach this relay can use it')


async def _stop(listeners: list[Listener]) -> None:
    notify('STOPPING=1')
    backplane = listeners[0].relay.backplane
    if backplane is not None:
        await backplane.close()
    for listener in listeners:
        listener.close()
    closed = [asyncio.ensure_future(listener.closed.wait()) for listener in listeners]
    # A client that neither reads nor closes must not keep the relay from stopping.
    await asyncio.wait(closed, timeout=STOP_TIMEOUT)
    for listener in listeners:
        for connection in list(listener.connections):
            connection.abort()
    logger.info('Server closed')


def tls_context(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """Return a context for TLS 1.2 and later. Raises a StartError that names the faulty file."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    path, content = certfile, 'certificate'
    try:
        # The errors of load_cert_chain do not name a file, so each one is tried by itself.
        ssl.create_default_context(cafile=certfile)
        path, content = keyfile or certfile, 'private key without a password'
        with open(path, 'rb'):  # a file that cannot be read is an OSError here
            # With an empty password, OpenSSL does not ask for one on the terminal.
            context.load_cert_chain(certfile, keyfile, password='')
    except ssl.SSLError as error:
        fault = f'{path}: no {content} in PEM format ({error.reason or error})'
        if error.reason in ('KEY_VALUES_MISMATCH', 'NO_CERTIFICATE_ASSIGNED'):
            fault = f'the key in {path} does not belong to the certificate in {certfile}'
        raise StartError(fault) from error
    except OSError as error:
        raise StartError(f'cannot read {path}: {error.strerror}') from error
    return context


# ------------------------------------------------------------------------------- Check
#
# `relay.py --check URL`: two clients exchange an offer and an answer through a running relay. It
# works with ProxyStore's relays, too.

STATUS_HINTS = {  # where to look if this HTTP status is received in place of a WebSocket
    401: 'check the token in the address, and --token-file',
    426: 'a proxy in front of the relay does not pass on the Upgrade header',
    **dict.fromkeys((502, 503, 504), 'a proxy answers, but the relay behind it does not'),
}


async def check(url: str, other_url: str | None = None) -> str:
    """Connect two clients through the relay at `url`; return a line that says how long it took.

    The second client uses `other_url` if given: two relays that share their clients. Raises
    StartError with one line: what failed and where to look. Neither line contains a token.
    """
    urls = url, other_url or url
    place = ' and '.join(dict.fromkeys(map(_without_token, urls)))
    try:
        try:
            result = await exchange(*urls, 'server')
        except ConnectionClosed:  # ProxyStore's relay 0.6 and later accepts only the newer type
            result = await exchange(*urls, 'relay')
    except Exception as error:
        # What a relay says may contain line breaks and terminal escapes.
        raise StartError(f'{place}: {ascii(explain(error))[1:-1]}') from error
    return f'ok: two clients connected through {place} {result}'


def _without_token(url: str) -> str:
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ('ws', 'wss') and parts.hostname and parts.port != 0:
            # Cut off the token first: it may contain an @ or a ? and, by mistake, a line break.
            url = re.split('[?&]token=', ''.join(url.split()))[0]
            return re.sub('//.*@', '//', url).partition('?')[0]
    raise StartError('--check: not an address such as wss://relay.example.org:8765')


def explain(error: Exception) -> str:
    """Return what failed for a client, and where to look."""
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        return f'HTTP {status}; {STATUS_HINTS.get(status, "there is no relay at this address")}'
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = 'check --certfile and the address; if it is self-signed, set SSL_CERT_FILE'
        return f'{error.verify_message}; {hint}'
    if isinstance(error, ConnectionClosed):
        return f'closed: {error}; see the log of the relay'
    if isinstance(error, MessageDecodeError):
        return 'a WebSocket server, but not a relay; check the address'
    if isinstance(error, asyncio.TimeoutError):
        return f'connected, but no answer within {CHECK_TIMEOUT} s; check that it is a relay'
    if isinstance(error, StartError):
        return str(error)
    # Other errors, such as InvalidURI, may quote the address with its token.
    known = isinstance(error, (OSError, EOFError, InvalidHandshake))
    reason = str(error) if known else type(error).__name__
    return f'{reason}; check the address, ws:// or wss://, and that the relay is running'


async def exchange(url: str, other_url: str, generation: str) -> str:
    """Register two clients, send an offer and an answer; return how long these took."""
    async with await _open_websocket(url) as one, await _open_websocket(other_url) as other:
        uuids = {one: uuid4(), other: uuid4()}
        for websocket, uuid in uuids.items():
            request = ServerRegistration('check', uuid, f'{generation}_registration')
            response = ServerResponse(message_type=f'{generation}_response')
            await expect(request, websocket, websocket, response)
        start = time.perf_counter()
        for kind, source, peer in (('offer', one, other), ('answer', other, one)):
            message = PeerConnection(uuids[source], 'check', uuids[peer], kind, 'v=0')
            await expect(message, source, peer, message)
        result = f'in {1000 * (time.perf_counter() - start):.1f} ms'
        tls = one.transport.get_extra_info('ssl_object')
        if tls is None:
            return result
        days = (ssl.cert_time_to_seconds(tls.getpeercert()['notAfter']) - time.time()) / 86400
        return f'{result} (certificate valid for {days:.0f} more days)'


async def _open_websocket(url: str) -> Any:
    from websockets.asyncio.client import connect

    # Version 15 and later would use `https_proxy`, even for localhost; 14 has no such parameter.
    newer = int(websockets_version.partition('.')[0]) >= 15
    direct: dict[str, Any] = {'proxy': None} if newer else {}
    try:
        return await connect(url, open_timeout=CHECK_TIMEOUT, close_timeout=1, **direct)
    except asyncio.TimeoutError:
        hint = 'check the firewall, and that the relay is not stuck'
        raise StartError(f'no WebSocket within {CHECK_TIMEOUT} s; {hint}') from None


async def expect(message: Message, source: Any, peer: Any, expected: Message) -> None:
    """Send a message from `source`; raise StartError unless `peer` receives what is expected."""
    await source.send(encode(message))
    # A refusal is sent to the source.
    receiving = [asyncio.ensure_future(websocket.recv()) for websocket in {source, peer}]
    try:
        received = decode(await next(asyncio.as_completed(receiving, timeout=CHECK_TIMEOUT)))
    finally:
        for task in receiving:
            task.cancel()
    if received == message and message != expected:
        raise StartError('an echo server, not a relay; check the address')
    if received != expected:
        reason = getattr(received, 'message', None) or getattr(received, 'error', None)
        reason = str(reason or 'an unexpected message').rstrip('.')
        hint = 'see the log of the relay or, if there are several, check their --nats'
        raise StartError(f'{reason}; {hint}')


# ------------------------------------------------------------------------------- Command line
#
# The options, and what the program does with them.


def _integer(text: str, least: int = 0, most: int = 10**9) -> int:
    if text.isdecimal() and len(text) < 12 and least <= int(text) <= most:
        return int(text)
    raise argparse.ArgumentTypeError(f'{shown(text)} is not a number from {least} to {most:,}')


def _nats_url(text: str) -> str:
    # An error must not show the text, which may hold a password.
    with contextlib.suppress(ValueError):
        url = urlsplit(text)
        if url.scheme in ('nats', 'tls') and url.hostname and url.port != 0:
            return text
    raise argparse.ArgumentTypeError('not in the form nats://HOST:PORT or tls://HOST:PORT')


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or '').partition('\n')[0]
    # Without a usage message, an error is one line.
    parser = argparse.ArgumentParser('relay.py', usage=argparse.SUPPRESS, description=about)
    add = parser.add_argument
    port, positive = partial(_integer, most=65535), partial(_integer, least=1)
    seconds = partial(_integer, most=86_400)
    add('--host', default='0.0.0.0', metavar='ADDRESS', help='address to listen on (%(default)s)')
    add('--port', default=8765, type=port, help='port, 0 for any free one (%(default)s)')
    add('--certfile', metavar='PATH', help='serve TLS (wss://) with this certificate (PEM)')
    add('--keyfile', metavar='PATH', help='its private key, unless that is in the same file')
    add('--token-file', metavar='PATH', help='require a token from this file of user:token lines')
    origin = 'accept only web pages of this origin; repeatable (any)'
    add('--allow-origin', action='append', metavar='ORIGIN', help=origin)
    clients = 'maximum number of clients (the limit of open files less 64)'
    add('--max-clients', type=positive, metavar='N', help=clients)
    message = 'maximum length of a message (%(default)s)'
    add('--max-message', default=MAX_MESSAGE, type=positive, metavar='BYTES', help=message)
    rate = 'messages per second that each client may send, 0 for no limit (%(default)s)'
    add('--rate', default=RATE, type=_integer, metavar='N', help=rate)
    ping = 'time between pings, 0 for none (%(default)s)'
    add('--ping-interval', default=30, type=seconds, metavar='SECONDS', help=ping)
    add('--metrics-port', type=port, metavar='PORT', help='serve Prometheus metrics on 127.0.0.1')
    folder = 'also log to server.log in this folder, a new file each Monday'
    add('--log-dir', metavar='PATH', help=folder)
    level = 'log messages of this level and above (%(default)s)'
    add('--log-level', default='INFO', type=str.upper, choices=LEVELS, help=level)
    nats = 'share clients with other relays over this NATS server; repeatable'
    add('--nats', action='append', type=_nats_url, metavar='URL', help=nats)
    creds = 'credentials file for NATS, unless the URL contains a password'
    add('--nats-creds', metavar='PATH', help=creds)
    check = 'connect two clients through the relay at this URL, or through two relays, and exit'
    add('--check', metavar='URL', nargs='+', help=check)
    add('--version', action='version', version=f'relay.py {__version__}')
    return parser


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.keyfile and not options.certfile:
        parser.error('--keyfile needs --certfile')
    if options.nats_creds and not options.nats:
        parser.error('--nats-creds needs --nats')
    if options.check and len(options.check) > 2:
        parser.error('argument --check: one URL or two')
    return options


def _run_check(urls: list[str]) -> None:
    # A check prints one line only; asyncio must not log.
    logging.disable()
    # Python 3.9 prints a traceback if a check is interrupted just when it connects.
    sys.unraisablehook = lambda _: None
    print(asyncio.run(check(*urls)))


def _run_relay(options: argparse.Namespace) -> None:
    configure_logging(options.log_dir, options.log_level)
    # The usual limit of 1,024 open files is the first that a relay hits. (macOS may refuse this.)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    relay = RelayServer(options.token_file, options.max_clients, options.rate)
    # Clients other than web pages send no origin.
    origins = (*options.allow_origin, None) if options.allow_origin else None
    limits = Limits(options.max_message, origins, ping_interval=options.ping_interval or None)
    asyncio.run(
        serve(
            options.host,
            options.port,
            options.certfile,
            options.keyfile,
            relay=relay,
            limits=limits,
            metrics_port=options.metrics_port,
            nats=options.nats,
            nats_credentials=options.nats_creds,
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Run the relay or a check. Return the exit status."""
    options = _parse(argv)
    # A reload or an upgrade must not kill a relay that is starting.
    for number in (signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        if options.check is not None:
            _run_check(options.check)
        else:
            _run_relay(options)
    except (StartError, KeyboardInterrupt) as error:
        print(f'relay.py: {str(error) or "interrupted"}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
