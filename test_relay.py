"""Tests of relay.py: plain functions, real sockets, no sleeps.

Run as a script, it measures a relay: `python test_relay.py ws://localhost:8765`.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import contextlib
import functools
import gc
import inspect
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest
import websockets.asyncio.server
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CTRL_OPCODES, CloseCode, Frame, Opcode
from websockets.protocol import Protocol, Side, State

import relay
from relay import (
    MessageDecodeError,
    MessageEncodeError,
    PeerConnection,
    RelayServer,
    ServerRegistration,
    ServerResponse,
    decode,
    encode,
)

HERE = Path(__file__).parent
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)
A, B, C = (UUID(int=n) for n in (0xA, 0xB, 0xC))
GENERATIONS = ['server', 'relay']
both_generations = pytest.mark.parametrize('generation', GENERATIONS)


# ------------------------------------------------------------------------------- Tools


def run_within(seconds):
    """Let pytest run a coroutine, and fail it when it takes longer."""

    def decorate(test):
        @functools.wraps(test)
        def wrapper(*args, **kwargs):
            asyncio.run(asyncio.wait_for(test(*args, **kwargs), timeout=seconds))

        return wrapper

    return decorate


# Seconds that a coroutine may take, by a fixture that it uses.
TIME_LIMITS = {'upgradable': 60, 'bus': 20, 'nats_server': 20}


def run_coroutines(names):
    """Let pytest run each test that is a coroutine; called at the end of this file."""
    for name, test in list(names.items()):
        if name.startswith('test_') and inspect.iscoroutinefunction(test):
            used = TIME_LIMITS.keys() & inspect.signature(test).parameters.keys()
            names[name] = run_within(max((TIME_LIMITS[x] for x in used), default=8))(test)


def each(names, *rows, **options):
    """Run a test with each of some rows of data; with a dict, its keys are the names."""
    if len(rows) == 1 and isinstance(rows[0], dict):
        options, rows = {'ids': rows[0], **options}, rows[0].values()
    return pytest.mark.parametrize(names, rows, **options)


@contextlib.asynccontextmanager
async def all_of(contexts):
    """Enter several contexts, and yield what they yield."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(context) for context in contexts]


def constants_in(options):
    """Take what is named in capitals, which are constants of relay.py, out of some options."""
    return {name: options.pop(name) for name in [*options] if name.isupper()}


@contextlib.asynccontextmanager
async def running_relay(tls=None, tokens=None, max_clients=None, rate=0, **limits):
    """Serve a relay as the command line does; yields it, with its URL as `url`."""
    async with contextlib.AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in constants_in(limits).items():
            patch.setattr(relay, name, value)
        server = RelayServer(tokens, max_clients, rate)
        if way == 'serve':
            bounds, process = relay.Limits(**limits), server.process_request
            listener = server.listener = relay.Listener(server, process, bounds, tls=tls)
            await listener.listen('127.0.0.1', 0)
            stack.push_async_callback(listener.closed.wait)
            stack.callback(listener.close)
        else:
            where = server.handler, '127.0.0.1', 0
            # `process_request` is for tokens.
            process = server.process_request if tokens else None
            options = {'compression': None, 'process_request': process, **limits}
            serving = websockets.asyncio.server.serve(*where, ssl=tls, **options)
            listener = await stack.enter_async_context(serving)
        port = listener.sockets[0].getsockname()[1]
        server.url = f'{"wss" if tls else "ws"}://127.0.0.1:{port}/'
        yield server


way = 'serve'


@pytest.fixture
def embedded(monkeypatch):
    """Let websockets serve the relays of a test, as in somebody else's program."""
    monkeypatch.setitem(globals(), 'way', 'handler')


@pytest.fixture(params=['serve', 'handler'])
def way_of_serving(request, monkeypatch):
    """Run a test with a relay that serves itself, and with one that websockets serves."""
    monkeypatch.setitem(globals(), 'way', request.param)


both_ways = pytest.mark.usefixtures('way_of_serving')


def reset(transport):
    """Close a connection with a RST."""
    sock = transport.get_extra_info('socket')
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
    transport.abort()


class Peer:
    """A client that speaks the protocol in plain JSON."""

    def __init__(self, websocket, uuid=None, name='', generation='server'):
        self.websocket = websocket
        self.uuid, self.name, self.generation = uuid, name, generation
        # What came before the close that a test has waited for.
        self.last_words = []

    @property
    def transport(self):
        return self.websocket.transport

    def send(self, *data):
        """Send bytes, which need not be a frame."""
        self.transport.write(b''.join(data))

    def stall(self):
        """Stop reading from the socket, as a client does that hangs or lost its network."""
        self.transport.pause_reading()

    def reset(self):
        reset(self.transport)

    async def say(self, message):
        await self.websocket.send(
            message if isinstance(message, (str, bytes)) else json.dumps(message)
        )

    async def hear(self):
        return json.loads(await self.websocket.recv())

    async def ask(self, message):
        await self.say(message)
        return await self.hear()

    def registration(self):
        kind = f'{self.generation}_registration'
        return {'message_type': kind, 'name': self.name, 'uuid': str(self.uuid)}

    def response(self, reason=None):
        return {
            'success': reason is None,
            'message': reason,
            'error': reason is not None,
            'message_type': f'{self.generation}_response',
        }

    def offer(self, peer_uuid, **fields):
        return {
            'message_type': 'peer_connection',
            'source_uuid': str(self.uuid),
            'source_name': self.name,
            'peer_uuid': str(peer_uuid),
            'description_type': 'offer',
            'description': 'v=0',
            'error': None,
            **fields,
        }

    async def closed_with(self):
        """Wait for the relay to close this client, and return the code it sent."""
        return (await self.close_frame()).code

    async def close_frame(self):
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                self.last_words.append(await self.websocket.recv())
        return caught.value.rcvd


@contextlib.asynccontextmanager
async def connected(server, **options):
    """Connect to a relay, or to an address."""
    async with open_websocket(getattr(server, 'url', server), **options) as websocket:
        yield Peer(websocket)


@contextlib.asynccontextmanager
async def registered(server, uuid, name='laptop', generation='server', **options):
    async with connected(server, **options) as peer:
        peer.uuid, peer.name, peer.generation = uuid, name, generation
        assert await peer.ask(peer.registration()) == peer.response()
        yield peer


def holder(server, uuid, user=''):
    """Return the client that a UUID is registered for, or None."""
    return server._uuid_to_client.get((user, uuid))


def unknown(uuid):
    return f'Cannot forward peer connection message to peer {uuid} because this peer is unknown.'


async def until(condition):
    """Let the loop run until a condition holds; the test's own limit bounds it."""
    while not condition():
        await asyncio.sleep(0.001)


async def exchange(one, other):
    """Send a message each way and see that it arrives."""
    for sender, receiver in ((one, other), (other, one)):
        await sender.say(sender.offer(receiver.uuid, description=str(uuid4())))
        assert (await receiver.hear())['source_uuid'] == str(sender.uuid)


async def before_mark(sender, receiver):
    """Send a message, and return what the receiver hears before it."""
    mark, heard = sender.offer(receiver.uuid, description=str(uuid4())), []
    await sender.say(mark)
    while (message := await receiver.hear()) != mark:
        heard.append(message)
    return heard


async def fill_backlog(sender, uuid, letter='x'):
    """Send to a peer until the relay refuses, and return the refusal."""
    message = sender.offer(uuid, description=letter * (2**19 // len(letter.encode())))
    message = json.dumps(message, ensure_ascii=False)
    for _ in range(100):
        await sender.say(message)
        if refusals := await before_mark(sender, sender):
            return refusals[0]
    raise AssertionError('never refused')


# ------------------------------------------------------------------------------- Messages

MESSAGES = [
    ServerRegistration('laptop', A),
    ServerRegistration('laptop', A, 'relay_registration'),
    ServerResponse(),
    ServerResponse(False, 'why', True, 'relay_response'),
    PeerConnection(A, 'laptop', B, 'offer', 'v=0'),
    PeerConnection(A, '\ud800\n\u202e', B, '', '', 'declined'),
]
REGISTRATION, OFFER = (json.loads(encode(message)) for message in (MESSAGES[0], MESSAGES[4]))
OPEN_OFFER = json.dumps(OFFER)[:-1]  # without its last brace


def changed(message, **values):
    return json.dumps({**message, **values})


def without(message, key):
    return json.dumps({k: v for k, v in message.items() if k != key})


def zeros(size):
    """Return a text that takes long to decode for its length, and is not a message."""
    return '{"a":[' + '0,' * ((size - 9) // 2) + '0]}'


def rows(table):
    """Return a pair of each thing in a table and what the table has it under."""
    return [(thing, key) for key, things in table.items() for thing in things]


# What the answer must say, and the texts that are not a valid message.
MALFORMED = {
    'not JSON': ['', 'nope', json.dumps(OFFER)[:-9], '\ufeff{}', json.dumps(OFFER) * 2],
    'JSON object': ['null', '[]', '3', '"x"', 'true'],
    'message_type': ['{}', '{"message_type": "offer"}', '{"message_type": []}'],
    'duplicate key': [OPEN_OFFER + ', "error": "x"}', OPEN_OFFER + ', "x": {"y": 1, "y": 2}}'],
    'NaN': [changed(OFFER, x=float('nan'))],
    'Infinity': [changed(OFFER, x=float('-inf'))],
    'nested too deep': ['[' * 60_000, '{"a":' * 60_000],
    'too long': [f'{OPEN_OFFER}, "x": {start}{"1" * 6000}}}' for start in ('', '0.')],
    'text frame': [json.dumps(OFFER).encode(), b''],
    "UUID, not 'x'": [changed(REGISTRATION, uuid='x')],
    'UUID': [changed(REGISTRATION, uuid='\n' * 9999)],
    'only the relay': [json.dumps({'message_type': f'{name}_response'}) for name in GENERATIONS],
}
KEYS = [(message, key) for message in (REGISTRATION, OFFER) for key in message]
MISSING = [(without(message, key), key) for message, key in KEYS if key != 'error']
MISTYPED = [
    (changed(message, **{key: value}), key)
    for message, key in KEYS
    for value in (7, None, True, [], {}, 1.5)
    if (key, value) != ('error', None)
]


@each(
    'text, message',
    *((encode(message), message) for message in MESSAGES),
    ('{"message_type": "server_response"}', ServerResponse()),  # keys with a default
    (changed(OFFER, retries=[3]), MESSAGES[4]),  # an unknown key
)
def test_a_text_is_decoded(text, message):
    assert decode(text) == message


@each('start', '', ' ', f'{{"b":{"1" * 100},"a":[{"1" * 50},')
def test_a_long_text_of_short_numbers_is_decoded_without_a_check_of_each(start, monkeypatch):
    monkeypatch.setattr(relay, '_strict_decoder', None)
    text = zeros(2**18)
    with pytest.raises(MessageDecodeError, match='message_type'):
        decode(start + (text[6:] if start.strip() else text))


@each('number', '1' * 101, '-' + '9' * 101, '0.' + '1' * 101, '1e' + '0' * 101)
@each('offset', *range(10))
def test_a_long_number_is_found_anywhere_in_a_long_text(number, offset):
    text = zeros(4 * relay.STRICT_DECODE)
    place = text.index(',', len(text) // 2 + offset)
    with pytest.raises(MessageDecodeError, match='a number that is too long'):
        decode(text[:place] + ' ' * offset + ',' + number + text[place:])


@each(
    'thing',
    *(None, 'text', {}, relay.Message()),
    *(ServerRegistration('laptop', A, kind) for kind in ('server_response', [])),
    *(ServerRegistration(name, A) for name in (object(), float('nan'))),
    ids=repr,
)
def test_an_object_that_is_not_a_message_is_an_encode_error(thing):
    with pytest.raises(MessageEncodeError):
        encode(thing)


# ------------------------------------------------------------------------------- Protocol


@contextlib.asynccontextmanager
async def relay_with(*uuids, tls=None, tokens=None, **options):
    """Serve a relay to clients that have registered; yields it and them."""
    async with running_relay(tls, tokens, **constants_in(options)) as server:
        async with all_of(registered(server, uuid, **options) for uuid in uuids) as peers:
            yield server, *peers


takeover_codes = pytest.mark.parametrize('generation, code', [('server', 1001), ('relay', 4004)])


@both_generations
@both_ways
async def test_an_answer_is_in_the_words_of_the_registration(generation):
    async with running_relay() as server, connected(server) as peer:
        assert await peer.ask(OFFER) == peer.response('client has not registered yet')
        peer.uuid, peer.name, peer.generation = A, 'laptop', generation
        request, reason = peer.registration(), f'this connection is already registered as {A}'
        wrong = 'uuid must be a string that holds a UUID'
        assert await peer.ask(without(request, 'uuid')) == peer.response(wrong)
        # A second registration changes nothing.
        for fields, answer in (({}, None), ({'name': 'x'}, None), ({'uuid': str(B)}, reason)):
            assert await peer.ask({**request, **fields}) == peer.response(answer)
            assert list(server._uuid_to_client) == [('', A)]
            assert holder(server, A).name == 'laptop'
        assert await peer.ask('nope') == peer.response(NOT_JSON)


@takeover_codes
@both_ways
async def test_a_registration_displaces_the_old_socket_before_it_is_answered(generation, code):
    async with relay_with(B) as (server, peer), connected(server) as new:
        async with registered(server, A, generation=generation) as old:
            new.uuid, order = A, []
            await new.say(new.registration())
            await new.say(new.offer(B))  # which waits for the registration
            closed = asyncio.ensure_future(old.close_frame())
            closed.add_done_callback(order.append)
            answered = asyncio.ensure_future(new.hear())
            answered.add_done_callback(order.append)
            await asyncio.wait({closed, answered})
            assert order == [closed, answered] and answered.result() == new.response()
            close = closed.result()
            assert close.code == code
            assert close.reason.startswith('Relay received a registration with the same ID.')
            await until(lambda: len(server._websocket_to_client) == 2)
            assert await peer.hear() == new.offer(B)
            await exchange(new, peer)


@both_ways
async def test_a_dead_socket_does_not_keep_its_uuid_from_the_next():
    async with relay_with(B, A, TAKEOVER_TIMEOUT=0.05) as (server, peer, old):
        old.stall()
        # The relay gives a dead socket 10 s to close, longer than this test may take.
        async with registered(server, A) as new:
            await exchange(new, peer)
            old.transport.abort()
            await exchange(new, peer)


@takeover_codes
@both_ways
async def test_the_last_of_three_to_register_holds_the_uuid(generation, code, log):
    async with relay_with(A, FLAP_COUNT=1) as (server, first):
        async with connected(server) as second, connected(server) as third:
            first.stall()
            for peer, name in ((second, 'second'), (third, 'third')):
                peer.uuid, peer.name, peer.generation = A, name, generation
            await second.say(second.registration())
            # The second waits for the first to close when the third arrives.
            await until(lambda: not holder(server, A))
            assert await third.ask(third.registration()) == third.response()
            first.transport.abort()
            assert await second.closed_with() == code
            assert holder(server, A).name == 'third'
            await exchange(third, third)
    assert log(f'UUID {A} is registered') and not log('UUID None')


@both_ways
async def test_one_client_wins_a_race_for_a_uuid_and_is_reachable():
    async with relay_with(B) as (server, peer):
        async with all_of(connected(server) for _ in range(20)) as racers:
            for racer in racers:
                racer.uuid = A
            answers = await asyncio.gather(*(racer.ask(racer.registration()) for racer in racers))
            assert answers == [racers[0].response()] * 20
            await until(lambda: len(server._websocket_to_client) == 2)
            await peer.say(peer.offer(A))
            address = holder(server, A).websocket.remote_address
            (winner,) = [r for r in racers if r.websocket.local_address == address]
            assert await winner.hear() == peer.offer(A)
        await until(lambda: not holder(server, A))
        assert 'unknown' in (await peer.ask(peer.offer(A)))['error']


@both_ways
async def test_the_text_of_a_forwarded_message_is_the_text_received():
    texts = [
        json.dumps(OFFER),
        json.dumps(OFFER, separators=(',', ':')),
        json.dumps(OFFER, indent=2),
        without(OFFER, 'error'),
        changed(OFFER, error='declined', description_type='candidate'),
        changed(OFFER, retries=[1.50, {'é': '\ud800'}]),
        json.dumps(OFFER).replace('laptop', 'é\u202e').replace('v=0', '\U0001f600'),
        changed(OFFER, source_uuid=f'urn:uuid:{str(A).upper()}'),
        changed(OFFER, description='x' * (2**20 - len(json.dumps(OFFER)) + 3)),
    ]
    async with relay_with(A, B) as (_, one, other):
        for text in texts:
            await one.say(text)
            assert await other.websocket.recv() == text


# What differs from an offer of A to B, what is changed when it comes back, and what it counts as.
RETURNED = [
    ({'peer_uuid': str(C)}, {'error': unknown(C)}, 'unknown_peer'),
    (
        {'peer_uuid': str(C), 'description': '\u00e9' * (2**19 - 200)},  # too long with an error
        {'error': unknown(C), 'description': '', 'description_type': '', 'source_name': ''},
        'unknown_peer',
    ),
    (
        {'source_uuid': str(C)},
        {'error': unknown(B).replace('this peer is unknown', "source_uuid is not the sender's")},
        'forged_source',
    ),
]


@each('one', *GENERATIONS)
@each('other', *GENERATIONS)
@both_ways
async def test_a_message_comes_back_to_its_sender_alone(one, other):
    async with relay_with(A, generation=one) as (server, peer):
        async with registered(server, B, generation=other) as receiver:
            for fields, changes, kind in RETURNED:
                message = {**OFFER, **fields}
                with moves(server, refused(kind)):
                    await peer.say(json.dumps(message, ensure_ascii=False))
                    assert await peer.hear() == {**message, **changes}
            await exchange(peer, peer)
            await peer.say(OFFER)
            assert await receiver.hear() == OFFER
            await exchange(receiver, peer)


@each('letter', 'x', '\U0001f600')
@both_ways
async def test_a_peer_that_does_not_read_delays_no_other_and_may_read_again(letter):
    async with relay_with(A, B, C) as (server, sender, slow, other):
        slow.stall()
        with moves(server, refused('backlog')):
            refusal = await fill_backlog(sender, B, letter)
        assert refusal['error'].endswith('this peer does not read what is sent to it.')
        assert holder(server, B).link.unsent_bytes <= relay.MAX_BACKLOG
        await exchange(sender, other)
        slow.transport.resume_reading()
        await sender.say(sender.offer(B, description='last'))
        while (heard := (await slow.hear())['description']) != 'last':
            assert len(heard.encode()) == 2**19


@both_ways
async def test_a_message_longer_than_the_backlog_is_accepted_if_the_backlog_is_empty():
    async with relay_with(A, B, MAX_BACKLOG=10) as (_, one, other):
        await exchange(one, other)


@both_ways
async def test_an_invalid_message_closes_neither_connection_nor_registration():
    texts = rows(MALFORMED) + MISSING + MISTYPED
    async with relay_with(A) as (server, peer):
        with moves(server, refused('malformed'), len(texts)):
            for text, reason in texts:
                answer = await peer.ask(text)
                assert answer == peer.response(answer['message'])
                assert reason in answer['message'] and len(answer['message']) < 600, text[:99]
                await exchange(peer, peer)


@both_ways
async def test_a_new_client_receives_its_response_first():
    async with relay_with(A) as (server, sender):
        for _ in range(50):
            async with connected(server) as peer:
                peer.uuid = B
                messages = (sender.say(sender.offer(B)) for _ in range(5))
                await asyncio.gather(peer.say(peer.registration()), *messages)
                assert await peer.hear() == peer.response()
                # The answer to another registration marks the end of what comes back.
                refused = 0
                await sender.say(sender.registration())
                while await sender.hear() != sender.response():
                    refused += 1
                for _ in range(5 - refused):
                    assert await peer.hear() == sender.offer(B)
            await until(lambda: not holder(server, B))


# ------------------------------------------------------------------------------- Endings


@pytest.fixture
def log(caplog):
    """Return a function that returns the logged lines with a word.

    Neither an ERROR nor a traceback may be among them in the end.
    """
    caplog.set_level('DEBUG', 'relay')
    yield lambda word='': [
        r.getMessage() for r in caplog.records if r.name == 'relay' and word in r.getMessage()
    ]
    for record in caplog.get_records('call'):
        assert record.levelno < logging.ERROR and not record.exc_info, record.getMessage()


# What breaks the rules of WebSocket also ends a connection: see BROKEN and ENDINGS below.
LEAVES = {
    'close': [lambda peer: peer.websocket.close()],
    'reset': [Peer.reset],
    'end in a frame': [b'\x81\xfe\xff\xff', lambda peer: peer.transport.close()],
}


@each('steps', LEAVES)
@both_ways
async def test_a_registration_ends_with_its_connection(steps, log):
    async with relay_with(B) as (server, peer):
        async with registered(server, A) as gone:
            await end(gone, steps)
            await until(lambda: not holder(server, A))
        assert 'unknown' in (await peer.ask(peer.offer(A)))['error']
        assert list(server._websocket_to_client) == [holder(server, B).websocket]
    assert not server._websocket_to_client and not server.refusal_log
    assert log(f'Unregistered {A}')


async def test_an_internal_error_is_logged_and_closes_only_its_own_connection(caplog, monkeypatch):
    async with relay_with(A, B) as (server, one, other):
        with monkeypatch.context() as patch:
            patch.setattr(relay, 'decode', lambda _: 1 / 0)
            await one.say(one.offer(B))
            assert await one.closed_with() == CloseCode.INTERNAL_ERROR
        await until(lambda: list(server._uuid_to_client) == [('', B)])
        await exchange(other, other)
    assert [r.exc_info[0] for r in caplog.records if r.name == 'relay'] == [ZeroDivisionError]


async def test_the_kernel_knows_the_bounds_of_a_connection_before_the_first_can_come(monkeypatch):
    def note(sock):
        seen.append((sock, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)))
        limit_socket(sock)

    limit_socket, seen = relay.limit_socket, []
    monkeypatch.setattr(relay, 'limit_socket', note)
    async with relay_with(A) as (server, _):
        assert seen == [(sock, False) for sock in server.listener.sockets] != []
        # One that acknowledges nothing is ended by the kernel.
        sock, option = holder(server, A).link.sock, socket.TCP_USER_TIMEOUT
        milliseconds = sock.getsockopt(socket.IPPROTO_TCP, option)
        assert relay.Limits().ping_timeout * 1000 < milliseconds < 5 * 60_000


# ------------------------------------------------------------------------------- Embedding


async def test_the_handler_serves_on_a_unix_socket(tmp_path):
    server, path = RelayServer(), str(tmp_path / 'relay')
    async with websockets.asyncio.server.unix_serve(server.handler, path):
        async with websockets.asyncio.client.unix_connect(path) as websocket:
            peer = Peer(websocket, A)
            assert await peer.ask(peer.registration()) == peer.response()


@each('expected, code', (True, 1000), (False, 1001))
async def test_unregister_closes_the_connection(expected, code, embedded):
    async with relay_with(A) as (server, peer):
        websocket = holder(server, A).websocket
        await server.unregister(websocket, expected)
        assert await peer.closed_with() == code
        await server.unregister(websocket, expected)
        assert not server._uuid_to_client


async def test_a_message_to_a_closed_connection_is_dropped():
    async with running_relay() as server:
        await server.send(object(), ServerResponse())


async def test_connect_forwards_a_message_that_came_without_a_text(embedded):
    async with relay_with(A, B) as (server, _, other):
        await server.connect(holder(server, A).websocket, MESSAGES[4])
        assert await other.websocket.recv() == encode(MESSAGES[4])


# ------------------------------------------------------------------------------- Log


async def test_the_log_says_who_connected_and_disconnected_and_why(log):
    async with relay_with(A) as (_, peer):
        address = '%s:%d' % peer.websocket.local_address
        await peer.ask('nope')
        await peer.websocket.close(4999)
    who = f"{A} ('laptop', at {address})"
    assert log() == [
        f'Registered {who}',
        f'Refused {who}: {NOT_JSON} (1 refusals so far)',
        f'Unregistered {who}: closed by the client with 4999',
    ]


async def test_repeated_refusals_are_counted_and_not_each_logged(log, monkeypatch):
    async with relay_with(A) as (server, peer):
        for _ in range(30):
            await peer.ask('nope')
            # Those that have not registered share a line.
            async with connected(server) as other:
                assert (await other.ask('{}'))['success'] is False
        assert len(log('Refused')) == 2
        monkeypatch.setattr(relay, 'REFUSAL_INTERVAL', 0)
        await peer.ask('nope')
        assert log('Refused')[-1].endswith('(31 refusals so far)')


NAMES = ['x\nERROR disk on fire', '\x1b[2J', '\u202egnp.exe', '\ud800', '\0\x85\u2028']
NAMES += ['n' * 5000, 'x' * 60_000, '\U0001f600' * 5000]


@each('name', *NAMES, ids=range(len(NAMES)))
async def test_text_of_a_client_is_shortened_when_stored_and_escaped_in_the_log(name, log):
    async with relay_with(A, name=name, REFUSAL_INTERVAL=0) as (server, peer):
        # One more than is shown, so that the log shows that it was cut.
        assert holder(server, A).name == name[: relay.MAX_SHOWN + 1]
        await peer.ask(peer.offer(A, description='secret'))
        await peer.ask(peer.offer(B, description='secret', description_type=name))
        await peer.ask(changed(OFFER, description='secret')[:-3])
        await peer.ask({'message_type': name})
        await peer.ask({**peer.registration(), 'uuid': name})
        await peer.ask({**peer.registration(), name: 1, 'name': 2})
        await peer.websocket.close(4999, name[:30].replace('\ud800', ''))
    for line in log():
        assert line.isprintable() and line.isascii()
        assert len(line) < 300 + 2 * len(relay.shown(name))
    assert log('Forwarded') and len(log('Refused')) == 5 and not log('secret')


@both_ways
async def test_clients_that_displace_each_other_are_one_warning_an_interval(log):
    async with running_relay() as server:
        for expected in (1, 2):
            for _ in range(3 * relay.FLAP_COUNT):
                async with registered(server, A) as one, registered(server, A):
                    await one.closed_with()
            assert len(log('again and again')) == expected
            server._takeovers_since -= relay.FLAP_INTERVAL + 1
    addresses = re.findall(r'Registered .* at (\S+)\)', '\n'.join(log()))
    form = rf'UUID {A} is registered again and again by (\S+) and (\S+);.*new UUID'
    for line in log('again and again'):
        one, other = re.match(form, line).groups()
        assert one != other and {one, other} <= set(addresses)


# ------------------------------------------------------------------------------- Processes


class Program:
    """A program that can be killed, frozen and started again; its output goes to files."""

    def __init__(self, folder, *command):
        self.folder, self.log, self.errors = folder, folder / 'log', folder / 'errors'
        self.command = [str(word) for word in command]
        self.child, self.deaths = None, []  # s, monotonic clock

    def __enter__(self):
        self.recover()
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        if self.child is not None:
            self.deaths.append(time.monotonic())
            self.child.kill()
            self.child.wait()

    def freeze(self):
        self.child.send_signal(signal.SIGSTOP)
        # Until all its threads have stopped, they pass on what they receive.
        os.waitpid(self.child.pid, os.WUNTRACED)

    def recover(self):
        """Resume the process, or start it."""
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGCONT)
        else:
            with self.log.open('a') as out, self.errors.open('a') as err:
                options = {'cwd': self.folder, 'stdout': out, 'stderr': err}
                self.child = subprocess.Popen(self.command, **options)

    def lines(self, word=''):
        """Return the lines of its output that contain a word, without the time and level."""
        lines = (self.log.read_text() + self.errors.read_text()).splitlines()
        return [line.partition(' :: ')[2] or line for line in lines if word in line]

    async def logs(self, word, count=1):
        """Wait until so many lines contain a word, and return the last of them."""
        while len(lines := self.lines(word)) < count:
            ended = self.child.poll() is not None
            assert not ended or len(self.lines(word)) >= count, self.lines()
            await asyncio.sleep(0.005)
        return lines[count - 1]

    async def signal(self, number, word):
        """Send a signal, and return the next line that contains a word."""
        count = len(self.lines(word)) + 1
        self.child.send_signal(number)
        return await self.logs(word, count)

    async def ends(self, status=0, errors=''):
        """Wait for its end, and see its exit status and what it wrote to standard error."""
        await until(lambda: self.child.poll() is not None)
        assert (self.child.returncode, self.errors.read_text()) == (status, errors)


class RelayProgram(Program):
    """A copy of relay.py that runs as a process. Its constants and its text can be changed."""

    def __init__(self, folder, options, edits, constants):
        command = [sys.executable, '-W', 'error', 'relay.py', '--host', '127.0.0.1']
        super().__init__(folder, *command, '--port', 0, '--metrics-port', 0, *options)
        self.edits, self.constants = edits, constants
        self.install(relay.__version__)

    def install(self, version, *edits):
        """Put a version of relay.py, with some edits, where the process looks for it."""
        text = (HERE / 'relay.py').read_text()
        for name, value in {'__version__': version, **self.constants}.items():
            text, count = re.subn(rf'(?m)^{name} = .*', f'{name} = {value!r}', text)
            assert count == 1, name
        for old, new in (*self.edits, *edits):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (self.folder / 'relay.py').write_text(text)

    async def serves(self):
        """Wait until it serves, and note where."""
        line = await self.logs('Serving metrics on ')
        self.metrics_port = int(line.rpartition(':')[2])
        lines = self.lines('Serving relay server on ')
        self.ports = [int(line.rpartition(':')[2]) for line in lines]
        scheme = 'wss' if '--certfile' in self.command else 'ws'
        self.url = f'{scheme}://127.0.0.1:{self.ports[0]}'

    async def samples(self):
        return samples_in((await fetch(self.metrics_port))[1])

    async def upgrade(self, version='9.0.0', *edits):
        """Upgrade the process, and return its log line about that."""
        self.install(version, *edits)
        return await self.signal(signal.SIGUSR2, 'Upgraded ')

    @contextlib.asynccontextmanager
    async def gap(self, *edits):
        """Upgrade the process, and stop it in the middle for as long as the block runs."""
        for name in ('waiting', 'go'):
            (self.folder / name).unlink(missing_ok=True)
        self.install('9.0.0', *edits)
        upgrading = asyncio.ensure_future(self.signal(signal.SIGUSR2, 'Upgraded '))
        await until((self.folder / 'waiting').exists)
        yield
        (self.folder / 'go').touch()
        await upgrading

    def descriptors(self):
        names = []
        for path in Path(f'/proc/{self.child.pid}/fd').iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed just now
                names.append(os.readlink(path))
        return names

    def listening(self):
        """Return the sockets on which the process listens; the kernel numbers them."""
        rows = ''.join(Path(f'/proc/net/{name}').read_text() for name in ('tcp', 'tcp6'))
        rows = [row.split() for row in rows.splitlines()]
        sockets = {f'socket:[{row[9]}]' for row in rows if row[3] == '0A'}
        return sockets.intersection(self.descriptors())


@contextlib.asynccontextmanager
async def running(*options, files=None, edits=(), **constants):
    """Run relay.py as a process that may open so many files; yields it once it serves.

    Names in capitals are constants of relay.py.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = RelayProgram(Path(folder), options, edits, constants)
        if files is not None:
            program.command[:0] = 'bash', '-c', f'ulimit -n {files}; exec "$@"', 'bash'
        with program:
            await program.serves()
            yield program
            assert program.errors.read_text() == ''


@pytest.fixture
def upgradable():
    """Return `running`; upgrades only work on Linux."""
    if sys.platform != 'linux':
        pytest.skip('needs Linux')
    return running


# ------------------------------------------------------------------------------- Command line


def forked(program, *options):
    """Run a program's `main` in a fork of this process, where all that it imports is at hand.

    Returns a function that waits for its end, and returns its status, what it has printed and
    what it has complained of.
    """
    files = [tempfile.TemporaryFile('w+') for _ in range(2)]

    def run():
        signal.alarm(20)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio.run has its own
        sys.stdout, sys.stderr = files
        os.dup2(files[0].fileno(), 1)
        os.dup2(files[1].fileno(), 2)
        logging.getLogger().handlers.clear()
        sys.exit(program([str(option) for option in options]))

    def ended():
        child.join()
        with files[0], files[1]:
            return child.exitcode, *[file.seek(0) or file.read() for file in files]

    child = multiprocessing.get_context('fork').Process(target=run)
    child.start()
    ended.child = child.pid
    return ended


def one_line(result, status=1):
    """See that a program failed with one line on standard error, and return the line."""
    ended, text, line = result
    assert (ended, text, line.count('\n')) == (status, '', 1)
    return line


def fails(*options, status=1):
    """Run relay.py, see it fail with one line on standard error, and return the line."""
    line = one_line(forked(relay.main, *options)(), status)
    assert line.startswith('relay.py: ')
    return line


WRONG_NATS_URLS = ['127.0.0.1', 'http://127.0.0.1', 'nats://', 'nats://:4222', 'nats://h:x']
WRONG_NATS_URLS += ['nats://u:secret@h:0']
NATS_FORM = ': argument --nats: not in the form nats://HOST:PORT or tls://HOST:PORT\n'
# Options, the exit status, and what the line must say. {} is a port in use.
ONE_LINE_ERRORS = [
    *((f'--port {port}', 2, '--port') for port in ('65536', '-1', 'http', '8e3', '')),
    ('--keyfile key.pem', 2, '--keyfile'),
    ('--log-level LOUD', 2, '--log-level'),
    ('--verbose', 2, '--verbose'),
    ('--ping-interval ' + '9' * 400, 2, '--ping-interval'),
    *((f'--nats {url}', 2, NATS_FORM) for url in WRONG_NATS_URLS),
    ('--nats-creds x', 2, '--nats-creds needs --nats'),
    ('--check ws://a ws://b ws://c', 2, 'one URL or two'),
    ('--log-dir cert.pem/logs', 1, 'cert.pem/logs'),
    ('--host 127.0.0.1 --port {}', 1, ' cannot listen on 127.0.0.1:{}: Address already in use\n'),
    ('--host relay.invalid', 1, 'cannot listen on relay.invalid:0: '),
    ('--host 127.0.0.1 --metrics-port {}', 1, ' cannot listen on 127.0.0.1:{}: Address already'),
    ('--host 192.0.2.1', 1, 'cannot listen on 192.0.2.1:0: '),
    ('--host a..b', 1, 'cannot listen on a..b:0: '),
    ('--host ::::', 1, 'cannot listen on :::::0: '),
    ('--certfile none.pem --keyfile cert.key', 1, 'none.pem: No such file'),
    ('--certfile cert.pem --keyfile none.key', 1, 'none.key: No such file'),
    ('--certfile . --keyfile cert.key', 1, ': Is a directory'),
    ('--certfile cert.pem --keyfile .', 1, ': Is a directory'),
    ('--certfile text.pem --keyfile cert.key', 1, 'text.pem: no certificate'),
    ('--certfile cert.key --keyfile cert.key', 1, 'cert.key: no certificate'),
    ('--certfile cert.pem --keyfile text.pem', 1, 'text.pem: no private key'),
    ('--certfile cert.pem --keyfile cert.pem', 1, 'cert.pem: no private key'),
    ('--certfile cert.pem --keyfile locked.key', 1, 'locked.key: no private key without a passw'),
    ('--certfile cert.pem --keyfile other.key', 1, 'other.key does not belong to the certificate'),
    ('--certfile cert.pem', 1, 'cert.pem: no private key'),
    ('--certfile text.pem', 1, 'text.pem: no certificate'),
    ('--certfile /dev/null', 1, '/dev/null: no certificate'),
]


@each('options, status, fault', *ONE_LINE_ERRORS)
def test_a_wrong_option_or_file_is_one_line(options, status, fault, pem, monkeypatch):
    monkeypatch.chdir(pem)
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        line = fails('--port', '0', *options.format(port).split(' '), status=status)
    assert fault.format(port) in line and 'None' not in line


@each(
    'options, result',
    ('--version', (0, f'relay.py {relay.__version__}\n', '')),
    ('--certfile /no', (1, '', 'relay.py: cannot read /no: No such file or directory\n')),
)
def test_the_file_can_be_started_by_its_name(options, result):
    assert (HERE / 'relay.py').read_text().startswith('#!/usr/bin/env python3\n')
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    command, env = [HERE / 'relay.py', *options.split()], {**os.environ, 'PATH': path}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == result


@each('signals, secure', ('SIGINT', False), ('SIGTERM SIGTERM SIGINT', True))
async def test_a_signal_closes_all_connections_and_stops_the_relay(signals, secure, pem):
    options = ['--certfile', pem / 'both.pem'] if secure else []
    trust = trusting(pem) if secure else None
    assert relay.STOP_HANDSHAKE < 5
    async with running(*options, STOP_HANDSHAKE=0.1) as program:
        async with (
            registered(program, A, ssl=trust) as peer,
            wired(program, trust, opened=False),  # sends nothing
            wired(program, trust, opened=False) as wire,
        ):
            wire.send(b'GET / HTTP/1.1\r\nUp')
            # Connections are accepted in order.
            async with wired(program, trust):
                pass
            for name in signals.split():
                program.child.send_signal(signal.Signals[name])
            assert await peer.closed_with() == CloseCode.GOING_AWAY
            # Otherwise, a handshake has ten seconds, longer than this test may take.
            await program.ends()
        lines = program.log.read_text().splitlines()
    form = r'\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\] (INFO |WARNING) \(relay\) :: \S.*'
    assert len(lines) == 6 and all(re.fullmatch(form, line) for line in lines)


async def test_a_client_that_neither_reads_nor_closes_does_not_delay_the_stop():
    async with running(STOP_TIMEOUT=0.1) as program:
        async with registered(program, A) as peer:
            peer.stall()
            program.child.terminate()
            # Otherwise, a client has ten seconds to close, longer than this test may take.
            await program.ends()
            peer.websocket.transport.abort()
        log = program.log.read_text()
    assert re.search(r'Unregistered .*\n.*Server closed\n', log) and 'Traceback' not in log


def test_a_log_file_is_new_each_sunday_at_midnight(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(logging, 'basicConfig', lambda **options: seen.update(options))
    monkeypatch.setattr(logging, 'raiseExceptions', True)
    monkeypatch.setattr(logging.Logger, 'setLevel', lambda *_: None)
    relay.configure_logging(str(tmp_path), 'INFO')
    weekly = seen['handlers'][1]
    weekly.close()
    end = time.localtime(weekly.rolloverAt)
    # The end of a Sunday, which is the first second of a Monday.
    assert (end.tm_wday, end.tm_hour, end.tm_min, end.tm_sec) == (0, 0, 0, 0)
    assert 0 < weekly.rolloverAt - time.time() <= 7 * 25 * 3600


async def test_the_open_file_limit_is_raised_to_the_hard_limit():
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        async with running() as program:
            after = resource.prlimit(program.child.pid, resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert after == (before[1], before[1])


@each(
    'environment, output',
    ('WATCHDOG_USEC=rubbish NOTIFY_SOCKET=/nowhere JOURNAL_STREAM=8:1234', '>&2'),
    # Without a standard output, the log goes to the standard error.
    ('JOURNAL_STREAM=rubbish', '>&-'),
)
async def test_the_log_goes_to_its_folder_too_in_an_odd_environment(environment, output, tmp_path):
    folder = tmp_path / 'new' / 'logs'
    program = f'{sys.executable} {HERE}/relay.py --host 127.0.0.1 --port 0 --log-dir {folder}'
    with Program(tmp_path, 'bash', '-c', f'{environment} exec {program} {output}') as shell:
        await shell.logs('No --token-file')
        shell.child.terminate()
        assert await asyncio.to_thread(shell.child.wait) == 0
    log = shell.errors.read_text()
    assert log.count('\n') == 3 and all(line[0] == '[' for line in log.splitlines())
    assert (folder / 'server.log').read_text() == log


@pytest.mark.parametrize('function', [relay.serve, relay.Listener])
def test_a_misspelt_keyword_is_a_type_error(function):
    with pytest.raises(TypeError, match='certifcate'):
        function('127.0.0.1', 0, certifcate='cert.pem')


# ------------------------------------------------------------------------------- TLS


@pytest.fixture(scope='module')
def pem(tmp_path_factory):
    """A folder with a certificate, its key, both in one file, and another key."""

    def openssl(*arguments):
        subprocess.run(['openssl', *arguments], cwd=folder, check=True, capture_output=True)

    folder = tmp_path_factory.mktemp('pem')
    new = 'req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2'.split()
    name = '-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1'.split()
    openssl(*new, *name, '-out', 'cert.pem', '-keyout', 'cert.key')
    openssl(*new, *name, '-out', 'other.pem', '-keyout', 'other.key')
    new[3:6] = ['rsa:2048']
    openssl(*new, *name, '-out', 'rsa.pem', '-keyout', 'rsa.key')
    openssl(*'ec -aes128 -passout pass:x -in cert.key -out locked.key'.split())
    both = (folder / 'cert.key').read_text() + (folder / 'cert.pem').read_text()
    (folder / 'both.pem').write_text(both)
    (folder / 'text.pem').write_text('This is no certificate.\n')
    return folder


@pytest.fixture
def tls(pem):
    return relay.tls_context(str(pem / 'both.pem'), None)


def trusting(pem):
    return ssl.create_default_context(cafile=pem / 'cert.pem')


@each('files', ['cert.pem', 'cert.key'], ['both.pem', None], ids=str)
async def test_messages_over_tls_are_forwarded_and_a_backlog_is_bounded(pem, files):
    tls = relay.tls_context(*(name and str(pem / name) for name in files))
    async with relay_with(A, B, tls=tls, ssl=trusting(pem)) as (_, one, other):
        await exchange(one, other)
        other.stall()
        assert 'does not read' in (await fill_backlog(one, B))['error']
        other.transport.resume_reading()


def test_a_file_that_may_not_be_read_is_one_line_that_names_it(pem, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('builtins.open', refuse)
    with pytest.raises(relay.StartError, match=r'cannot read .*cert\.key: Permission denied'):
        relay.tls_context(str(pem / 'cert.pem'), str(pem / 'cert.key'))


# ------------------------------------------------------------------------------- Access


@pytest.fixture
def tokens(tmp_path):
    """A token file: two tokens of alice, one of bob."""
    path = tmp_path / 'tokens'
    path.write_text('\ufeff# who may use it\n\nalice:a1 # her laptop\r\n  alice:a2:x#y\nbob:b1\n')
    path.chmod(0o600)
    return str(path)


def authorization(*values):
    return {'additional_headers': [('Authorization', value) for value in values]}


def bearer(token):
    return authorization(f'Bearer {token}')


def basic(text):
    return authorization('Basic ' + base64.b64encode(text).decode())


@each(
    'options, userinfo, query, user',
    (bearer('a1'), '', '', 'alice'),
    (bearer('b1'), '', '', 'bob'),
    ({'additional_headers': {'authorization': 'bearer a2:x#y'}}, '', '', 'alice'),
    (basic(b'alice:a2:x#y'), '', '', 'alice'),
    (basic(b'bob:b1'), '', '', 'bob'),
    ({}, 'alice:a1@', '', 'alice'),
    ({}, '', '?token=b1', 'bob'),
    ({}, '', 'any/path?x=1&token=a2%3Ax%23y', 'alice'),
)
async def test_a_token_identifies_the_user(tokens, options, userinfo, query, user):
    async with running_relay(tokens=tokens) as server:
        url = server.url.replace('://', f'://{userinfo}') + query
        async with registered(url, A, **options):
            assert holder(server, A, user)


async def test_a_token_in_the_path_may_contain_a_plus(tmp_path):
    path = tmp_path / 'tokens'
    path.touch(0o600)
    path.write_text('alice:a+b')
    async with running_relay(tokens=path) as server:
        async with registered(f'{server.url}?token=a+b', A):
            assert holder(server, A, 'alice')


NOT_A_TOKEN = [
    ({}, ''),
    *((bearer(token), '') for token in ('', 'a', 'a11', 'alice:a1')),
    *((basic(text), '') for text in (b'bob:a1', b'alice:', b'a1', b'\xff\xfe')),
    (authorization('Basic %%%'), ''),
    (authorization('Digest a1'), ''),
    (authorization('Bearer a1', 'Bearer b1'), ''),
    *(({}, f'?token={token}') for token in ('', '%ff', 'x' * 4000)),
    ({}, '?Token=a1'),
    ({}, '/[?token=a1'),
]


@each('options, query', *NOT_A_TOKEN, ids=range(17))
async def test_without_a_valid_token_the_handshake_ends_with_401(tokens, options, query, log):
    async with running_relay(tokens=tokens) as server:
        with moves(server, refused('unauthorized'), 3):
            for _ in range(3):
                with pytest.raises(InvalidStatus) as caught:
                    await open_websocket(server.url + query, **options)
                assert caught.value.response.status_code == 401
                assert 'Bearer' in caught.value.response.headers['WWW-Authenticate']
        assert not server._websocket_to_client
    (line,) = log('Refused')
    assert line.endswith(': no valid token (1 refusals so far)') and not log('a1')


@each('query, header', (b'', b'\xff'), (b'?token=\xff', b''))
async def test_a_token_that_is_not_text_is_refused(query, header, tokens, log):
    async with running_relay(tokens=tokens) as server:
        token = b'Upgrade: websocket\r\nAuthorization: Bearer ' + header
        answer = await http(server, b'GET /%s HTTP/1.1\r\n%s\r\n\r\n' % (query, token))
        assert answer.startswith(b'HTTP/1.1 40')


async def test_to_a_client_only_those_of_its_own_user_exist(tokens):
    async with running_relay(tokens=tokens) as server:
        async with (
            registered(server, A, **bearer('a1')) as one,
            registered(server, B, **bearer('b1')) as bob,
        ):
            missing = (await one.ask(one.offer(C)))['error']
            assert (await one.ask(one.offer(B)))['error'] == missing.replace(str(C), str(B))
            # The same UUID, of another user: nobody is displaced, and each reaches its own.
            async with registered(server, A, **bearer('b1')) as other:
                async with registered(server, B, **bearer('a2:x#y')) as two:
                    await exchange(one, two)
                    await exchange(bob, other)
            assert 'unknown' in (await one.ask(one.offer(B)))['error']
            await exchange(one, one)


async def test_the_handler_refuses_a_client_without_a_token(tokens, embedded):
    async with running_relay(tokens=tokens, process_request=None) as server:
        async with connected(server) as peer:
            assert await peer.closed_with() == CloseCode.POLICY_VIOLATION
        async with registered(server, A, **bearer('a1')):
            assert holder(server, A, 'alice')


@both_ways
async def test_a_reload_changes_tokens_and_closes_only_revoked_clients(tokens, caplog):
    async with (
        running_relay(tokens=tokens) as server,
        registered(server, A, **bearer('a1')) as kept,
        registered(server, B, **bearer('a2:x#y')) as revoked,
        connected(server, **bearer('a2:x#y')) as unregistered,
    ):
        Path(tokens).write_text('alice:a1\nbob:b3\n')
        server.reload(None, None)
        # The user has another token.
        assert await revoked.closed_with() == CloseCode.POLICY_VIOLATION
        assert await unregistered.closed_with() == CloseCode.POLICY_VIOLATION
        assert 'unknown' in (await kept.ask(kept.offer(B)))['error']
        Path(tokens).write_text('nonsense')
        server.reload(None, None)
        errors = [r.getMessage() for r in caplog.records if r.levelname == 'ERROR']
        assert len(errors) == 1 and f'{tokens}, line 1' in errors[0]
        await exchange(kept, kept)
        async with registered(server, B, **bearer('b3')):
            assert holder(server, B, 'bob')
        for gone in ('a2:x#y', 'b1'):
            with pytest.raises(InvalidStatus):
                await open_websocket(server.url, **bearer(gone))


# By name: the address of a peer, the X-Forwarded-For it sent, and the address in the log.
PROXY, STRANGER = ('127.0.0.1', 5), ('198.51.100.1', 5)
FORWARDED = {
    'none': (PROXY, [], '127.0.0.1:5'),
    'one address': (PROXY, ['192.0.2.7'], '192.0.2.7'),
    'IPv6': (('::1', 5, 0, 0), ['2001:db8::1'], '2001:db8::1'),
    'a forged address before': (PROXY, ['10.0.0.1, 192.0.2.7'], '192.0.2.7'),
    'a forged line before': (PROXY, ['10.0.0.1', '192.0.2.7'], '192.0.2.7'),
    'not from a proxy': (STRANGER, ['192.0.2.7'], '198.51.100.1:5'),
    'empty': (PROXY, [''], '127.0.0.1:5'),
    'garbage': (PROXY, ['\x1b[2J\n'], '127.0.0.1:5'),
    'garbage at the end': (PROXY, ['192.0.2.7, x'], '127.0.0.1:5'),
    'a Unix socket': ('', ['192.0.2.7'], 'unknown address'),
}


@each('address, lines, expected', FORWARDED)
def test_the_address_of_a_client_is_taken_only_from_a_local_proxy(address, lines, expected):
    headers = SimpleNamespace(get_all={'X-Forwarded-For': lines}.get)
    assert relay.client_address(address, SimpleNamespace(headers=headers)) == expected


@both_ways
async def test_the_address_that_a_proxy_adds_is_logged(log):
    headers = {'X-Forwarded-For': '10.0.0.1, 192.0.2.7'}
    async with relay_with(A, additional_headers=headers):
        assert log()[-1].endswith('at 192.0.2.7)')


# What is wrong with token files, and what they hold.
TOKEN_FILES = {
    'line 1: not in the form': [b'alice', b':a1', b'alice:', b'alice:a 1', b'alice:a\x1b1'],
    'line 3: not in the form': [b'# x\nalice:a1\nbob b1'],
    'line 1: a token must consist of ASCII': ['alice:\u00e9'.encode()],
    'line 2: this token belongs to another user': [b'alice:a1\nbob:a1'],
    'no line in the form user:token': [b'', b'# alice:a1\n\n'],
    'cannot read': [b'alice:\xff', None],
}


@each('content, fault', *rows(TOKEN_FILES))
def test_a_wrong_token_file_is_one_line_that_names_it(content, fault, tmp_path):
    path = tmp_path / 'tokens'
    if content is not None:
        path.touch(0o600)
        path.write_bytes(content)
    line = fails('--port', '0', '--token-file', path)
    assert fault in line and str(path) in line and 'a1' not in line


def test_a_token_file_that_others_may_read_is_a_warning(tokens, caplog):
    Path(tokens).chmod(0o644)
    assert len(relay.read_tokens(tokens)) == 3
    assert [r.levelname for r in caplog.records] == ['WARNING'] and tokens in caplog.text


async def test_a_reload_changes_the_certificate_and_disconnects_no_client(pem, tmp_path):
    cert, key = shutil.copy(pem / 'cert.pem', tmp_path), shutil.copy(pem / 'cert.key', tmp_path)
    async with running('--certfile', cert, '--keyfile', key, '--rate', 0) as program:
        address = '127.0.0.1', program.ports[0]
        async with registered(program, A, ssl=trusting(pem)) as peer:
            shutil.copy(pem / 'rsa.pem', cert)
            line = await program.signal(signal.SIGHUP, ' ERROR ')
            assert f'the key in {key} does not belong' in line
            assert ssl.get_server_certificate(address) == (pem / 'cert.pem').read_text()
            shutil.copy(pem / 'rsa.key', key)
            await program.signal(signal.SIGHUP, 'Reloaded')
            assert ssl.get_server_certificate(address) == (pem / 'rsa.pem').read_text()
            await exchange(peer, peer)


# ------------------------------------------------------------------------------- Limits


def port_of(server):
    return int(server.url.rstrip('/').rpartition(':')[2])


async def http(server, request):
    """Send bytes to the relay, and return all that it answers."""
    reader, writer = await asyncio.open_connection('127.0.0.1', port_of(server))
    try:
        writer.write(request)
        if request.endswith(b'EOF'):
            writer.write_eof()
        return await reader.read()
    except ConnectionError:
        return b''
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_one_client_too_many_is_closed_with_1013(log):
    async with running_relay(max_clients=2) as server, registered(server, A) as one:
        async with connected(server):
            for _ in range(2):
                with moves(server, refused('full')):
                    async with connected(server) as late:
                        assert await late.closed_with() == CloseCode.TRY_AGAIN_LATER
            await exchange(one, one)
        await until(lambda: len(server._websocket_to_client) == 1)
        async with registered(server, B) as other:
            await exchange(one, other)
    assert len(log('the relay is full')) == 1


def test_the_limit_of_open_files_limits_the_number_of_clients():
    files = relay.resource.getrlimit(relay.resource.RLIMIT_NOFILE)[0]
    assert RelayServer()._max_clients == files - relay.RESERVED_FDS - relay.HANDSHAKE_FDS


async def test_a_message_in_fragments_is_forwarded_whole():
    async with relay_with(A) as (_, peer):
        text = json.dumps(peer.offer(A, description='\u00e9' * 4000), ensure_ascii=False)
        await peer.websocket.send([*text[:-1], *[''] * 5000, text[-1]])
        assert await peer.websocket.recv() == text


async def test_a_client_that_is_too_fast_waits_and_loses_nothing():
    async with running_relay(rate=500) as server, registered(server, A) as fast:
        async with registered(server, B) as peer, registered(server, C) as other:
            messages = [fast.offer(B, description=str(n)) for n in range(150)]
            sending = asyncio.gather(*(fast.say(message) for message in messages))
            await other.say(other.offer(B))
            heard = [await peer.hear() for _ in range(151)]
            await sending
            # The other client does not wait: its message arrives before the last of these.
            assert heard.index(other.offer(B)) < 150
            heard.remove(other.offer(B))
            assert heard == messages


def paced(server, monkeypatch, clock):
    """Return the list of how long a relay would wait after each message; it does not wait."""
    waits, pace = [], server.pace

    def note(client, size):
        waits.append(pace(client, size))
        return 0

    monkeypatch.setattr(server, 'pace', note)
    still = SimpleNamespace(**{**vars(time), 'monotonic': lambda: clock[0]})
    monkeypatch.setattr(relay, 'time', still)
    return waits


@both_ways
async def test_messages_after_a_burst_are_read_at_the_rate(monkeypatch):
    clock = [1000.0]
    async with running_relay(rate=100) as server:
        # The clock stands still, so the waits add up.
        waits = paced(server, monkeypatch, clock)
        async with registered(server, A) as peer:
            for _ in range(20):
                await peer.ask(peer.registration())
            assert waits[:20] == pytest.approx([0] * 10 + [n / 100 for n in range(1, 11)])
            clock[0] += 3600
            for _ in range(13):
                await peer.ask(peer.registration())
    assert waits[21:30] == [0] * 9 and waits[32] > 0


@each('size, units', (1, 1), (2**14, 1), (2**14 + 1, 2), (2**20, 64))
async def test_a_message_counts_against_the_rate_once_for_each_16_kib(size, units, monkeypatch):
    async with running_relay(rate=10) as server:
        waits = paced(server, monkeypatch, [1000.0])
        async with registered(server, A) as peer:
            await peer.ask('x' * size)
    assert waits[1] - waits[0] == pytest.approx(units / 10)


@each('with_tokens', False, True)
@each('path, status, text', ('/', 426, relay.WELCOME), ('/healthz', 200, 'ok\n'))
async def test_a_plain_request_is_answered(path, status, text, tokens, with_tokens):
    async with running_relay(tokens=tokens if with_tokens else None) as server:
        request = f'GET {path} HTTP/1.1\r\nHost: relay\r\n\r\n'
        head, _, body = (await http(server, request.encode())).decode().partition('\r\n\r\n')
        assert head.startswith(f'HTTP/1.1 {status} ') and body == text
        assert ('\r\nUpgrade: websocket' in head) == (status == 426)


OURS = 'https://ours.example'


@each('query, origin', ('', None), ('', OURS), ('some/where?x=y', None))
async def test_any_path_and_an_allowed_origin_open_a_websocket(query, origin):
    async with running_relay(origins=[OURS, None]) as server:
        async with registered(server.url + query, A, origin=origin) as peer:
            assert holder(server, A)
            # Compression is offered, and not used.
            assert 'Sec-WebSocket-Extensions' not in peer.websocket.response.headers


async def test_a_page_of_another_origin_is_refused_with_403(log):
    async with running_relay(origins=[OURS, None]) as server:
        with moves(server, refused('unauthorized')), pytest.raises(InvalidStatus) as caught:
            await open_websocket(server.url, origin='https://theirs')
    assert caught.value.response.status_code == 403
    assert log(": origin 'https://theirs' is not allowed (1 refusals")


def test_the_limits_are_options(monkeypatch):
    seen = {}

    async def serve(host, port, certfile, keyfile, **options):
        seen.update(options)

    monkeypatch.setattr(relay, 'serve', serve)
    monkeypatch.setattr(relay, 'configure_logging', lambda *_: None)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    line = '--max-clients 7 --max-message 300 --rate 0 --ping-interval 0 --allow-origin x'
    assert relay.main([*line.split(), '--allow-origin', 'y']) == 0
    server = seen.pop('relay')
    assert (server._max_clients, server._rate, server.tokens) == (7, 0, None)
    assert seen['limits'] == relay.Limits(300, ('x', 'y', None), ping_interval=None)
    assert relay.main([]) == 0
    assert seen['limits'] == relay.Limits()
    assert seen['relay']._rate == 500


# ------------------------------------------------------------------------------- Operations


async def fetch(port, path='/', lines=''):
    """Ask for a page in plain HTTP; return the status and the text."""
    server = SimpleNamespace(url=f'http://127.0.0.1:{port}')
    answer = await http(server, f'GET {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n'.encode())
    head, _, text = answer.decode().partition('\r\n\r\n')
    return int(head.split()[1]), text


def samples_in(text):
    """Return the values in a text for Prometheus, by the name of their sample."""
    lines = [line.rsplit(' ', 1) for line in text.splitlines() if line[0] != '#']
    return {name: float(value) for name, value in lines}


def samples(server):
    return samples_in(relay.metrics(server))


@contextlib.contextmanager
def moves(server, name, amount=1):
    """See that a sample changes by an amount, and that no other refusal is counted."""
    before = samples(server)
    yield
    after = samples(server)
    assert after[name] - before[name] == amount
    changed = {key for key in after if 'refusals' in key and after[key] != before[key]}
    assert changed <= {name}


def refused(kind):
    return f'relay_refusals_total{{reason="{kind}"}}'


@each('code', 1001, 1012)
async def test_a_handshake_that_completes_at_a_stop_or_upgrade_is_closed_with_its_code(
    code, security
):
    async with running_relay(security[0]) as server:
        async with wired(server, security[1], opened=False) as wire:
            await wire.send_and_wait(HANDSHAKE[:60])
            if code == 1001:
                server.listener.close()
            else:
                wire.link.close(code, '')
            wire.send(HANDSHAKE[60:])
            await wire.welcomed()
            assert await wire.frame() == (CLOSE, code_of(code))


async def test_the_health_of_a_stopping_relay_is_503():
    async with running_relay() as server, wired(server, opened=False) as wire:
        server.listener.close()
        wire.send(b'GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n')
        answer = await wire.read(10_000)
    assert answer.startswith(b'HTTP/1.1 503 ') and answer.endswith(b'\r\n\r\nstopping\n')


def test_each_family_of_metrics_has_one_help_and_one_type():
    lines = relay.metrics(RelayServer()).splitlines()
    families = [line.split()[2] for line in lines if line.startswith('# HELP ')]
    assert len(families) == len(set(families)) >= 12
    for family in families:
        kind = 'counter' if family.endswith('_total') else 'gauge'
        assert lines.count(f'# TYPE {family} {kind}') == 1
    assert {line.split('{')[0].split()[0] for line in lines if line[0] != '#'} == set(families)


@pytest.mark.skipif(not shutil.which('promtool'), reason='promtool is not here')
def test_promtool_accepts_the_metrics_and_the_configuration_in_the_readme():
    server = RelayServer()
    server.certificate_expiry = 1.0
    server.backplane = SimpleNamespace(connected=True, round_trip=0.001)
    checks = [(['metrics'], relay.metrics(server))]
    for kind, head in (('config', 'scrape_configs:'), ('rules', 'groups:')):
        block = re.search(rf'(?m)^    {head}\n(    .*\n)+', (HERE / 'README.md').read_text())[0]
        names = set(re.findall(r'\b(?:relay|process)_\w+', block))
        assert names <= {name.partition('{')[0] for name in samples(server)}
        checks.append(([kind, '/dev/stdin'], re.sub('(?m)^    ', '', block)))
    for arguments, text in checks:
        command = ['promtool', 'check', *arguments]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done


async def test_clients_are_counted_by_their_generation():
    def count():
        values = samples(server)
        names = [f'relay_registered_clients{{generation="{name}"}}' for name in GENERATIONS]
        return [values[name] for name in ('relay_connected_clients', *names)]

    async with running_relay() as server, connected(server), registered(server, A):
        async with registered(server, B, generation='relay'):
            assert count() == [3, 1, 1]
        await until(lambda: samples(server)['relay_connected_clients'] == 2)
        assert count() == [2, 1, 0]


async def test_registrations_and_messages_are_counted():
    async with running_relay() as server, registered(server, A) as old:
        text = json.dumps(old.offer(A, description='\u00e9' * 100), ensure_ascii=False)
        with moves(server, 'relay_forwarded_messages_total', 3):
            with moves(server, 'relay_forwarded_bytes_total', 3 * len(text.encode())):
                for _ in range(3):
                    await old.ask(text)
        with moves(server, 'relay_registrations_total'):
            with moves(server, 'relay_displaced_registrations_total'):
                async with registered(server, A) as peer:
                    await peer.ask(peer.registration())  # again, which is nothing new
                    await old.closed_with()


async def test_refused_messages_are_counted_by_reason():
    async with running_relay() as server, registered(server, A) as peer:
        for kind, message in (
            ('unknown_peer', peer.offer(B)),
            ('forged_source', peer.offer(A, source_uuid=str(B))),
            ('malformed', '{}'),
            ('malformed', peer.response()),
        ):
            with moves(server, refused(kind)):
                await peer.ask(message)
        async with registered(server, B) as other:
            other.stall()
            with moves(server, refused('backlog')):
                await fill_backlog(peer, B)
            other.websocket.transport.abort()


async def test_messages_that_wait_for_the_rate_are_counted():
    async with running_relay(rate=100) as server, registered(server, A) as peer:
        with moves(server, refused('rate_paced'), 0):
            await peer.ask(peer.registration())
        # A tenth of a second's messages may be sent at once.
        for _ in range(20):
            await peer.ask(peer.registration())
        assert samples(server)[refused('rate_paced')] > 0


def test_the_process_is_measured_under_the_standard_names():
    values = samples(RelayServer())
    assert values['process_cpu_seconds_total'] > 0
    assert values['process_resident_memory_bytes'] > 2**20
    assert 3 < values['process_open_fds'] < values['process_max_fds']
    assert 0 <= time.time() - values['process_start_time_seconds'] < 60
    assert 0 <= values['relay_uptime_seconds'] < 60


def certify(key, path, days):
    """Write a certificate for a key, and return when it expires, in seconds since 1970."""
    command = ['openssl', 'req', '-x509', '-new', '-key', key, '-subj', '/CN=localhost']
    subprocess.run([*command, '-days', str(days), '-out', path], check=True, capture_output=True)
    command = ['openssl', 'x509', '-in', path, '-noout', '-enddate']
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return ssl.cert_time_to_seconds(line.strip().partition('=')[2])


EXPIRY = 'relay_certificate_expiry_timestamp_seconds'


@pytest.mark.parametrize('year', [2027, 2063])
def test_the_expiry_of_the_certificate_is_a_metric(year, pem, tmp_path):
    days = (year - time.gmtime().tm_year) * 365
    expiry = certify(pem / 'cert.key', tmp_path / 'cert.pem', days)
    # The first certificate of the file is the relay's own, whatever stands before it.
    chain = [pem / 'cert.key', tmp_path / 'cert.pem', pem / 'other.pem']
    (tmp_path / 'chain.pem').write_text('about us\n' + ''.join(p.read_text() for p in chain))
    server = RelayServer()
    assert EXPIRY not in samples(server)
    server.listener = SimpleNamespace(connections=(), buffered_bytes=0)
    server.reload(str(tmp_path / 'chain.pem'), str(pem / 'cert.key'))
    assert server.listener.tls
    assert samples(server)[EXPIRY] == expiry


@pytest.mark.parametrize(
    'usec, delay',
    [('30000000', 15), ('1', 0.01), ('', 30), ('-5', 30), ('rubbish', 30), ('9' * 400, 30)],
)
def test_the_watchdog_is_notified_twice_in_its_period(usec, delay, monkeypatch):
    periods = []
    loop = SimpleNamespace(call_later=lambda delay, *_: periods.append(delay))
    monkeypatch.setattr(relay, 'asyncio', SimpleNamespace(get_running_loop=lambda: loop))
    monkeypatch.setenv('WATCHDOG_USEC', usec)
    relay.send_status(RelayServer())
    assert periods == [delay]


@pytest.fixture
def systemd(request, tmp_path, monkeypatch):
    """A socket that a program is told to notify."""
    name = f'\0relay-{uuid4()}' if request.param == 'abstract' else str(tmp_path / 'notify')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        sock.setblocking(False)
        monkeypatch.setenv('NOTIFY_SOCKET', name.replace('\0', '@'))
        yield sock


async def heard(sock, word=''):
    """Return the next notification that contains a word."""
    text = None
    while text is None or word not in text:
        text = (await asyncio.get_running_loop().sock_recv(sock, 4096)).decode()
    return text


@each('systemd', 'path', indirect=True)
async def test_systemd_is_notified_of_start_status_reload_and_stop(systemd, tokens, monkeypatch):
    monkeypatch.setenv('WATCHDOG_USEC', '100000')
    async with running('--token-file', tokens) as program:
        await heard(systemd, 'READY=1')
        socket.create_connection(('127.0.0.1', program.ports[0])).close()
        began = time.monotonic()
        for _ in range(3):
            status = (await heard(systemd, 'WATCHDOG=1')).split('\n')[1]
            assert status.startswith('STATUS=0 clients, ')
        # At half of its period, so that none is late.
        assert time.monotonic() - began >= 0.075
        for text in ('alice:a1\n', 'nonsense\n'):  # the second reload fails
            Path(tokens).write_text(text)
            program.child.send_signal(signal.SIGHUP)
            reloading = await heard(systemd, 'RELOADING=1')
            microseconds = int(re.fullmatch(r'RELOADING=1\nMONOTONIC_USEC=(\d+)', reloading)[1])
            assert 0 <= time.monotonic() - microseconds / 1e6 < 5
            await heard(systemd, 'READY=1')
        program.child.terminate()
        await heard(systemd, 'STOPPING=1')


@each('seconds, span', (0, '0:00:00'), (119, '0:01:59'), (41 * 86400 + 7200, '41 days, 2:00:00'))
async def test_the_status_is_a_line_for_people(seconds, span, monkeypatch):
    told = []
    monkeypatch.setattr(relay, 'notify', lambda *states: told.extend(states))
    server = RelayServer()
    server.counts['forwarded_messages'] = 3456
    server.started -= seconds
    relay.send_status(server)
    assert told[1] == f'STATUS=0 clients, 3,456 messages forwarded, up {span}'


def test_lines_for_the_journal_have_a_level_and_no_time():
    record = logging.LogRecord('relay', logging.ERROR, '', 0, 'one\ntwo', (), None)
    assert relay.JournalFormatter('%(message)s').format(record) == '<3>one\n<3>two'


async def test_the_log_has_the_format_of_the_journal_if_it_goes_there(tmp_path, monkeypatch):
    log = tmp_path / 'log'
    log.touch()
    monkeypatch.setenv('JOURNAL_STREAM', f'{log.stat().st_dev}:{log.stat().st_ino}')
    with Program(tmp_path, sys.executable, HERE / 'relay.py', '--port', 0) as program:
        await program.logs('No --tok')
        assert log.read_text().splitlines()[-1].startswith('<4>No --tok')


# ------------------------------------------------------------------------------- Upgrade
#
# A copy of relay.py runs as a process. The tests change the file on disk and send SIGUSR2.

on_linux = pytest.mark.skipif(sys.platform != 'linux', reason='needs Linux')


def prefixed(code):
    """Return an edit of relay.py: a new version that runs some code when it starts."""
    return 'import argparse\n', f'{code}\nimport argparse\n'


def waiting(when):
    """Return an edit of relay.py: a new version that waits until a test lets it go on."""
    return prefixed(f'import os, time\nif {when}:{WAIT}')


WAIT = """
            open('waiting', 'w').close()
            while not os.path.exists('go'):
                time.sleep(0.01)
"""
TRYING = waiting("'RELAY_TRIAL' in os.environ")
RESTORING = waiting("'RELAY_TRIAL' not in os.environ")
EXECUTING = '        os.execve(', f'        if True:{WAIT}        os.execve('


async def numbered(sender, receiver, stop, window=8):
    """Send numbered messages until told to stop; see each arrive once, and in order.

    As many as `window` are on their way at once. Returns how many arrived.
    """
    sent = received = 0
    while received < sent or not stop.is_set():
        while sent < received + window and not stop.is_set():
            await sender.say(sender.offer(receiver.uuid, description=str(sent)))
            sent += 1
        message = await receiver.hear()
        assert (message['error'], message['description']) == (None, str(received))
        received += 1
    return received


@contextlib.asynccontextmanager
async def talking(*pairs):
    """Let pairs send each other numbered messages meanwhile, and see that all arrive."""
    stop = asyncio.Event()
    ways = [way for one, other in pairs for way in ((one, other), (other, one))]
    exchanges = [asyncio.ensure_future(numbered(*way, stop)) for way in ways]
    try:
        yield
        stop.set()
        assert min(await asyncio.gather(*exchanges)) > 0
    finally:
        for task in exchanges:
            task.cancel()


@contextlib.asynccontextmanager
async def pair_of(server, **options):
    async with registered(server, uuid4(), **options) as one:
        async with registered(server, uuid4(), generation='relay', **options) as other:
            yield one, other


async def until_read(program):
    """Wait until the relay has read what clients have sent: it reads all sockets in a turn."""
    for _ in range(2):
        await program.samples()


async def test_pairs_lose_nothing_over_several_upgrades_that_leave_nothing_behind(upgradable):
    def files():
        return sorted(re.sub(r'\d+', '', name) for name in program.descriptors())

    versions, memory = [relay.__version__, '9.0', '9.1', '9.2'], []
    async with upgradable() as program, all_of(pair_of(program) for _ in range(3)) as pairs:
        before = files()
        async with talking(*pairs):
            for old, new in zip(versions, versions[1:]):
                async with registered(program, uuid4()) as leaving:
                    line = await program.upgrade(new)
                kept = r'in \d+\.\d\d s: 7 clients kept, 0 closed'
                assert re.fullmatch(f'Upgraded {re.escape(f"{old} to {new}")} {kept}', line)
                assert line in program.lines(' INFO ')
                await program.logs(f'Unregistered {leaving.uuid}')
                memory.append((await program.samples())['process_resident_memory_bytes'])
                await until(lambda: files() == before)
        assert max(memory) - min(memory) < 2**19, memory
        values = await program.samples()
        assert values['relay_connected_clients'] == 6
        assert values['relay_registered_clients{generation="relay"}'] == 3


async def test_many_signals_in_a_row_do_no_harm(upgradable):
    async with upgradable() as program, pair_of(program) as pair:
        async with talking(pair):
            for number in 2 * [signal.SIGHUP, signal.SIGUSR2, signal.SIGUSR2, signal.SIGHUP]:
                program.child.send_signal(number)
            await program.logs('Upgraded ')
        await program.upgrade()
        await exchange(*pair)
        assert not program.lines('ERROR')


# Incomplete messages, each a text of 508 bytes: where it is cut into fragments (after 311, in the
# middle of a character), how many pings follow the first one, how many bytes the old code reads.
BEGUN = {
    **{f'{count} bytes': ([], 0, count) for count in (1, 2, 3, 5, 8, 9, 150, 399)},
    'a fragment': ([99], 0, 107),
    'a fragment and some': ([99], 0, 130),
    'a fragment and a ping': ([99], 1, 109),
    'an empty fragment': ([0], 0, 6),
    'two fragments': ([9, 30], 0, 15 + 27),
    'some of half a character': ([311], 0, 300),
    'half a character': ([311], 0, 325),
}


def fragmented(text, cuts):
    frames = []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        opcode, head = CONT if frames else TEXT, LAST if end == len(text) else 0
        frames.append(frame_of(opcode, text[start:end], head))
    return frames


async def test_an_upgrade_keeps_incomplete_messages(upgradable):
    async with upgradable() as program, contextlib.AsyncExitStack() as stack:
        begun = []
        for cuts, pings, count in BEGUN.values():
            wire = await (await stack.enter_async_context(wired(program))).register()
            offer = wire.offer(wire.uuid, description='x' * 99 + '\u00e9' * 99)
            frames = fragmented(json.dumps(offer, ensure_ascii=False).encode(), cuts)
            frames[1:1] = [frame_of(PING)] * pings
            wire.send(b''.join(frames)[:count])
            begun.append((wire, b''.join(frames)[count:], [(PONG, b'')] * pings, offer))
        long = await (await stack.enter_async_context(wired(program))).register()
        long.send(frame_of(TEXT, b'x' * 700_000, 0))
        await until_read(program)
        line = await program.upgrade()
        assert line.endswith(f': {len(BEGUN) + 1} clients kept, 0 closed')
        for name, (wire, rest, pongs, offer) in zip(BEGUN, begun):
            wire.send(rest)
            assert [await wire.frame() for _ in pongs] == pongs, name
            assert await wire.hear() == offer, name
        # The fragments before the upgrade count for the limit of a message.
        long.send(frame_of(CONT, b'x' * 700_000, 0))
        assert (await long.end())[1] == 1009


async def test_messages_that_wait_for_their_rate_are_handled_after_the_upgrade(upgradable):
    options = '--rate', 10, '--ping-interval', 0  # a ping would wake the relay
    async with upgradable(*options) as program, pair_of(program) as (one, other):
        async with registered(program, A) as peer:
            await peer.ask(peer.offer(A, description='x' * 900_000))  # which uses up 5 seconds
            await peer.say(peer.offer(A))
            await say_all(one, offers := numbered_offers(one, other.uuid, 10))
            await program.upgrade()
            assert [await other.hear() for _ in offers] == offers
            assert await peer.hear() == peer.offer(A)


async def test_an_upgrade_does_not_restart_the_time_to_register(upgradable):
    async with upgradable(REGISTER_TIMEOUT=1, TAKEOVER_TIMEOUT=0.01) as program:
        began = time.monotonic()
        async with wired(program) as late, wired(program) as early, wired(program) as displaced:
            await displaced.register()
            async with registered(program, displaced.uuid):
                pass
            program.constants['REGISTER_TIMEOUT'] = 300  # if it were to begin again
            limit = 'close_timeout: float = 10', 'close_timeout: float = 0.1'
            await program.upgrade('9.0.0', limit)
            in_time = time.monotonic() - began < 0.5
            if in_time:
                await early.register()
            # The time to close begins again, with the limit of the new version.
            assert await displaced.end() == ([], 1001)
            opcode, data = await late.frame()
            assert (opcode, data[:2]) == (CLOSE, code_of(1008))
            assert re.fullmatch(rb'not registered within (1|300) s', data[2:])
            assert time.monotonic() - began > 0.9
            if in_time:
                await early.register()  # it is still connected


@contextlib.asynccontextmanager
async def unread(program, sender, texts):
    """Send offers to a client that does not read them; yields the client and the offers."""
    async with wired(program, narrow=True) as slow:
        await slow.register()
        slow.stall()
        offers = [sender.offer(slow.uuid, description=text) for text in texts]
        for offer in offers:
            await sender.say(offer)
        await sender.ask(sender.offer(sender.uuid))  # which is handled after these
        yield slow, offers


async def test_clients_that_do_not_read_get_their_messages_and_their_codes(upgradable):
    texts = [f'{number} ' + chr(97 + number) * 40_000 for number in range(10)]
    # A takeover may take longer than an upgrade.
    async with upgradable('--rate', 0, TAKEOVER_TIMEOUT=20) as program:
        async with registered(program, A) as sender, wired(program) as new:
            async with all_of(unread(program, sender, texts) for _ in range(4)) as clients:
                *closing, (slow, kept) = clients
                displaced, invalid, long = (wire for wire, _ in closing)
                new.send(said(displaced.registration()))
                invalid.send(frame_of(3))
                long.send(frame_of(TEXT, length=2**21))
                await until_read(program)
                assert (await program.samples())['relay_buffered_bytes'] > 500_000
                assert (await program.upgrade()).endswith(': 3 clients kept, 0 closed')
                assert (await program.samples())['relay_buffered_bytes'] > 500_000
                assert await new.hear() == displaced.response()
                for (wire, offers), code in zip(closing, (1001, 1002, 1009)):
                    wire.writer.transport.resume_reading()
                    assert [await wire.hear() for _ in offers] == offers
                    opcode, data = await wire.frame()
                    assert (opcode, data[:2]) == (CLOSE, code_of(code))
                    wire.send(said('ignored'), frame_of(CLOSE, code_of(code)))
                    assert await wire.frame() is None
                    wire.finish()
                while (await program.samples())['relay_open_connections'] > 3:
                    pass
                await sender.say(last := sender.offer(slow.uuid))
                slow.writer.transport.resume_reading()
                assert [await slow.hear() for _ in range(11)] == [*kept, last]
                await sender.say(offer := sender.offer(displaced.uuid))
                assert await new.hear() == offer


async def test_an_upgrade_reads_the_state_line_by_line(upgradable):
    texts = ['x' * 250_000] * 4
    async with upgradable('--rate', 0) as program, registered(program, A) as sender:
        async with all_of(unread(program, sender, texts) for _ in range(10)):
            held = (await program.samples())['relay_buffered_bytes']
            await program.upgrade()
            assert (await program.samples())['relay_buffered_bytes'] > 2**22
            status = Path(f'/proc/{program.child.pid}/status').read_text()
            now, peak = (int(re.search(rf'{k}:\s+(\d+)', status)[1]) for k in ('VmRSS', 'VmHWM'))
            assert (peak - now) * 1024 < held / 2


async def test_what_clients_do_during_an_upgrade_is_handled_after_it(upgradable):
    async with upgradable() as program, pair_of(program) as (one, other):
        async with (
            all_of(wired(program) for _ in range(3)) as wires,
            contextlib.AsyncExitStack() as stack,
        ):
            ended, reset, closing = [await wire.register() for wire in wires]
            early = await stack.enter_async_context(wired(program, opened=False))
            early.send(HANDSHAKE[:60])
            refused = await stack.enter_async_context(wired(program, opened=False))
            refused.send(b'GET / HTTP/1.1\r\n\r\n')
            assert (await refused.read(2**16)).startswith(b'HTTP/1.1 426 ')
            await until_read(program)
            async with program.gap(RESTORING):
                await one.say(offer := one.offer(other.uuid))
                early.send(HANDSHAKE[60:], said(early.registration()))
                ended.finish()
                reset.reset()
                closing.send(frame_of(CLOSE, code_of(1000)))
                newcomer = asyncio.ensure_future(open_websocket(program.url))
                hasty = await stack.enter_async_context(wired(program, opened=False))
                hasty.send(HANDSHAKE, said(hasty.registration()))
            assert await other.hear() == offer
            assert (await closing.end())[1] == 1000
            closing.finish()
            for wire in wires:
                await program.logs(f'Unregistered {wire.uuid}')
            async with await newcomer as websocket:
                peer = Peer(websocket, B)
                assert await peer.ask(peer.registration()) == peer.response()
                await exchange(one, peer)
            refused.send(HANDSHAKE, said(refused.registration()))
            for wire in (early, hasty):
                await wire.welcomed()
                assert await wire.hear() == wire.response()
            await until_read(program)
            assert not program.lines(f'Registered {refused.uuid}')


async def test_only_clients_that_the_upgrade_closes_are_counted_as_closed(upgradable):
    async with upgradable() as program, pair_of(program) as (one, _), pair_of(program) as leaving:
        async with contextlib.AsyncExitStack() as stack:
            async with program.gap(TRYING):
                peer = await stack.enter_async_context(registered(program, uuid4()))
                for gone in leaving:
                    await gone.websocket.close()
                    await program.logs(f'Unregistered {gone.uuid}')
            assert program.lines('Upgraded ')[0].endswith(': 3 clients kept, 0 closed')
            await exchange(one, peer)


async def test_an_upgrade_keeps_the_listening_sockets(upgradable):
    found = socket.getaddrinfo(None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    async with upgradable('--host', '') as program:
        sockets = program.listening()
        assert len(sockets) == len(program.ports) + 1 == len(found) + 1
        assert (await program.upgrade()).endswith(': 0 clients kept, 0 closed')
        assert program.listening() == sockets
        addresses = [line.split()[-1] for line in program.lines('Serving relay server on ')]
        assert len(addresses) == len(program.ports)  # not logged again
        for address in addresses:
            where = address.replace('0.0.0.0', '127.0.0.1').replace('[::]', '[::1]')
            async with registered(SimpleNamespace(url=f'ws://{where}'), uuid4()) as peer:
                await exchange(peer, peer)
        # Metrics are served on this machine only.
        address = f'127.0.0.1:{program.metrics_port}'
        assert program.lines('Serving metrics') == [f'Serving metrics on {address}']
        assert (await fetch(program.metrics_port, '/metrics'))[0] == 200
        with pytest.raises(OSError):
            socket.create_connection(('127.0.0.2', program.metrics_port))
        socket.create_connection(('127.0.0.2', program.ports[0])).close()


@each('systemd', 'abstract', indirect=True)
async def test_an_upgrade_keeps_metrics_and_log_and_notifies_systemd(upgradable, systemd):
    options = '--rate', 0, '--log-dir', 'logs'
    async with upgradable(*options) as program, pair_of(program) as pair:
        for _ in range(20):
            await exchange(*pair)
        await pair[0].ask('nope')
        async with registered(program, pair[0].uuid):
            await pair[0].closed_with()
            before = await program.samples()
            await program.upgrade('7.8.9')
            after = await program.samples()
        file = program.folder / 'logs/server.log'
        assert "('laptop', at 127.0.0.1:" in await program.logs('Unregistered', 2)
        await until(lambda: file.read_text() == program.log.read_text())
    same = [name for name in before if re.search(r'_total\b', name)]
    same.remove('process_cpu_seconds_total')
    same += ['process_start_time_seconds', 'process_max_fds', 'relay_connected_clients']
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert after['relay_uptime_seconds'] > before['relay_uptime_seconds']
    assert after['relay_forwarded_messages_total'] == 40
    assert [name for name in after if 'version="7.8.9"' in name and 'relay_build_info' in name]
    told = []
    while told.count('READY=1') < 2:
        told.append(await heard(systemd))
    assert 'RELOADING=1' in ''.join(told) and 'STOPPING' not in ''.join(told)
    assert 'STATUS=2 clients, 40 messages forwarded, up 0:' in told[-2]


async def test_an_upgrade_closes_clients_over_tls_with_1012(upgradable, pem):
    tls = {'ssl': trusting(pem)}
    async with upgradable('--certfile', pem / 'both.pem') as program:
        async with registered(program, A, **tls) as peer, connected(program, **tls) as other:
            before = await program.samples()
            line = await program.upgrade()
            assert line.endswith(': 0 clients kept, 2 closed')
            assert await peer.closed_with() == await other.closed_with() == 1012
        assert (await program.samples())[EXPIRY] == before[EXPIRY]
        async with registered(program, A, **tls) as peer:
            await exchange(peer, peer)


# What is wrong with a new version: an edit of a file (None: it is missing), and the logged reason.
WRONG = [
    ('relay.py', prefixed('import import'), 'SyntaxError'),
    ('relay.py', prefixed('import no_such_package'), 'no_such_package'),
    ('relay.py', ("add('--rate'", "add('--pace'"), '--rate'),
    ('relay.py', prefixed("raise ValueError('in vain')"), 'ValueError: in vain'),
    ('relay.py', prefixed(r"raise SystemExit('\x1b[2J' + 'x' * 9999)"), 'xxx'),
    ('relay.py', prefixed('raise SystemExit(3)'), 'status 3'),
    ('relay.py', prefixed('import os; os.abort()'), 'status -6'),
    ('relay.py', ('STATE_VERSION = 1\n', 'STATE_VERSION = 2\n'), 'restart the relay'),
    ('relay.py', ("if __name__ == '__main__':\n    raise SystemExit(main())", ''), 'status 0'),
    ('relay.py', None, 'relay.py'),
    ('tokens', ('bob:b1', 'nonsense'), 'not in the form user:token'),
]


async def test_an_upgrade_that_fails_changes_nothing(upgradable, tokens):
    # With this file, an upgrade fails at its last step.
    vain = """        if os.path.exists('vain'):
            with open('vain') as code:
                exec(code.read())
"""
    edits = [('        os.execve(', f'{vain}        os.execve(')]
    options, token = ('--rate', 500, '--token-file', tokens), bearer('a1')
    async with upgradable(*options, edits=edits) as program, pair_of(program, **token) as pair:
        for name, edit, reason in WRONG:
            program.install('9.0.0')
            path, count = program.folder / name.replace('tokens', tokens), len(program.lines())
            right = path.read_text()
            if edit:
                path.write_text(right.replace(*edit))
            else:
                path.unlink()
            line = await program.signal(signal.SIGUSR2, ' ERROR ')
            assert line.startswith('Upgrade failed, keeping the running version: ')
            assert reason in line and line.isprintable() and len(line) < 700
            await exchange(*pair)
            assert program.lines()[count:] == [line]
            version = f'version="{relay.__version__}"'
            assert any(version in name for name in await program.samples())
            path.write_text(right)
        for code, reason in (("raise OSError('vain')", 'vain'), ('1 / 0', 'division by zero')):
            (program.folder / 'vain').write_text(code)
            line = await program.signal(signal.SIGUSR2, ' ERROR ')
            assert line == f'Upgrade failed, keeping the running version: {reason}'
        assert len(program.lines('Traceback')) == 1  # a bug is more than a line
        await exchange(*pair)
        async with registered(program, A, **token) as peer:
            await exchange(peer, peer)
        (program.folder / 'vain').unlink()
        assert (await program.upgrade()).endswith(': 2 clients kept, 0 closed')


async def test_a_client_that_cannot_be_restored_costs_only_itself(upgradable, tokens):
    head = 'def restore_connection(listener: Listener, saved: dict[str, Any]) -> None:\n'
    broken = head, f"{head}    if saved['name'] == 'broken':\n        del saved['address']\n"
    clients = (A, 'x', 'a1'), (A, 'x', 'b1'), (B, 'x', 'a2:x#y'), (C, 'broken', 'b1')
    async with (
        upgradable('--token-file', tokens) as program,
        all_of(
            registered(program, uuid, name, **bearer(token)) for uuid, name, token in clients
        ) as (alice, bob, revoked, lost),
    ):
        Path(tokens).write_text('alice:a1\nbob:b1\n')
        line = await program.upgrade('9.0.0', broken)
        assert line.endswith(': 3 clients kept, 1 closed')
        assert await revoked.closed_with() == 1008
        assert await lost.close_frame() is None
        assert len(program.lines(' ERROR ')) == 1
        # Users are still kept apart.
        await exchange(alice, alice)
        await exchange(bob, bob)
        assert (await alice.ask(alice.offer(B)))['error'] == unknown(B)
        assert (await program.samples())['relay_connected_clients'] == 2


async def test_a_signal_during_the_upgrade_does_not_kill(upgradable):
    async with upgradable() as program, pair_of(program) as pair:
        async with program.gap(RESTORING, EXECUTING):
            program.child.send_signal(signal.SIGHUP)
            program.child.send_signal(signal.SIGUSR2)
        await exchange(*pair)
        # This time, the old code waits, just before it ends.
        async with program.gap():
            program.child.send_signal(signal.SIGTERM)
        assert [await peer.closed_with() for peer in pair] == [1001, 1001]
        await program.ends()


async def test_a_signal_does_not_kill_a_relay_that_has_stopped(upgradable):
    end = '    return 0\n\n\nif __name__'
    async with upgradable(edits=[(end, f'    if True:{WAIT}{end}')]) as program:
        program.child.terminate()
        await until((program.folder / 'waiting').exists)
        for number in relay.HANDLED_SIGNALS:
            program.child.send_signal(number)
        (program.folder / 'go').touch()
        await program.ends()


async def test_a_stop_wins_over_an_upgrade(upgradable):
    async with upgradable() as program, pair_of(program) as pair:
        program.install('9.0.0', prefixed('import time; time.sleep(9)'))
        for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGUSR2):
            program.child.send_signal(number)
        assert [await peer.closed_with() for peer in pair] == [1001, 1001]
        await program.ends()
        assert program.lines()[-1] == 'Server closed'
        assert not program.lines('ERROR')


async def test_a_relay_that_is_about_to_serve_is_not_killed_by_the_signal(tmp_path):
    os.mkfifo(tmp_path / 'tokens', 0o600)
    options = '--host', '127.0.0.1', '--port', '0', '--token-file', 'tokens'
    with Program(tmp_path, sys.executable, HERE / 'relay.py', *options) as program:
        with open(tmp_path / 'tokens', 'w') as file:  # it reads this before it serves
            program.child.send_signal(signal.SIGUSR2)
            file.write('alice:a1\n')
        await program.logs('Serving relay server')
        program.child.terminate()
        await program.ends()
        assert program.lines()[-1] == 'Server closed'


# ------------------------------------------------------------------------------- Check


async def check_line(*urls):
    try:
        return await relay.check(*urls)
    except relay.StartError as error:
        return str(error)


def url_of(listener):
    return 'ws://127.0.0.1:%d' % listener.sockets[0].getsockname()[1]


@contextlib.asynccontextmanager
async def http_server(status):
    """Answer each request with a status; yields its URL."""

    def respond(websocket, request):
        return websocket.respond(status, '')

    serve = websockets.asyncio.server.serve
    async with serve(None, '127.0.0.1', 0, process_request=respond) as listener:
        yield url_of(listener)


@contextlib.asynccontextmanager
async def silent_server(_):
    with socket.create_server(('127.0.0.1', 0)) as sock:
        yield 'ws://127.0.0.1:%d' % sock.getsockname()[1]


@contextlib.asynccontextmanager
async def websocket_server(answer):
    """Answer each text with what a function returns, unless that is None; yields its URL."""

    async def handler(websocket):
        async for text in websocket:
            if (reply := answer(text)) is not None:
                await websocket.send(reply)

    async with websockets.asyncio.server.serve(handler, '127.0.0.1', 0) as listener:
        yield url_of(listener)


@contextlib.asynccontextmanager
async def newer_relay(forwarded=lambda text: text):
    """Serve only `relay_registration`, like ProxyStore's relay 0.6 and later; yields its URL.

    (The earlier one does not close: it ignores the types that it does not know.)
    """

    async def handler(websocket):
        async for text in websocket:
            if 'server_' in text:
                await websocket.close(4000, 'Unknown message type.')
            elif 'registration' in text:
                await websocket.send(encode(ServerResponse(message_type='relay_response')))
                peers[decode(text).uuid] = websocket
            else:
                await peers[decode(text).peer_uuid].send(forwarded(text))

    peers = {}
    async with websockets.asyncio.server.serve(handler, '127.0.0.1', 0) as listener:
        yield url_of(listener)


def returned(text):
    """Return what a relay answers that does not know the peer."""
    if 'registration' in text:
        return encode(ServerResponse())
    return encode(relay.replace(decode(text), error='unknown here'))


REFUSAL = encode(ServerResponse(False, 'a\n\x1b[1mb', True))


async def test_check_connects_two_clients(tokens):
    async with running_relay(tokens=tokens) as server:
        place = server.url[5:]
        for url in (f'ws://alice:a1@{place}', f'ws://{place}?token=a1'):
            expected = rf'ok: two clients connected through ws://{place} in \d+\.\d ms'
            assert re.fullmatch(expected, await check_line(url))
        await until(lambda: not server._uuid_to_client)


async def test_check_ignores_a_proxy_of_the_environment(monkeypatch):
    for name in ('http_proxy', 'https_proxy', 'all_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:1')
    monkeypatch.delenv('no_proxy', raising=False)
    async with running_relay() as server:
        assert (await check_line(server.url)).startswith('ok: ')


async def test_check_says_how_long_the_certificate_is_valid(pem, tls, monkeypatch):
    monkeypatch.setenv('SSL_CERT_FILE', str(pem / 'cert.pem'))
    async with running_relay(tls) as server:
        assert (await check_line(server.url)).endswith(' ms (certificate valid for 2 more days)')


@each(
    'server, argument, reason',
    (silent_server, None, 'no WebSocket within 0.3 s; check the firewall, and that the relay '),
    (http_server, 401, 'HTTP 401; check the token in the address, and --token-file'),
    (http_server, 404, 'HTTP 404; there is no relay at this address'),
    (http_server, 426, 'HTTP 426; a proxy in front of the relay does not pass on the Upgrade'),
    (http_server, 502, 'HTTP 502; a proxy answers, but the relay behind it does not'),
    (http_server, 503, 'HTTP 503; a proxy answers, but the relay behind it does not'),
    (http_server, 504, 'HTTP 504; a proxy answers, but the relay behind it does not'),
    (websocket_server, lambda text: None, 'connected, but no answer within 0.3 s; check that'),
    (websocket_server, lambda text: text, 'an echo server, not a relay; check the address'),
    (websocket_server, lambda text: 'hi', 'a WebSocket server, but not a relay; check the'),
    (websocket_server, lambda text: REFUSAL, 'a\\n\\x1b[1mb; see the log of the relay'),
    (websocket_server, returned, 'unknown here; see the log of the relay or, if'),
    (lambda count: running_relay(max_clients=count), 1, 'closed: received 1013 '),
)
async def test_check_says_what_failed_and_where_to_look(server, argument, reason, monkeypatch):
    monkeypatch.setattr(relay, 'CHECK_TIMEOUT', 0.3 if ' 0.3 s' in reason else 60)
    async with server(argument) as started:
        url = getattr(started, 'url', started)
        assert (await check_line(url)).startswith(f'{url}: {reason}')


NO_ADDRESS = '--check: not an address such as wss://'


@each(
    'url, reason',
    ('ws://alice:secret@nowhere.invalid', 'ws://nowhere.invalid: [Errno -'),
    ('ws://alice:secret@127.0.0.1:1/?token=secret', 'ws://127.0.0.1:1/: [Errno '),
    ('ws://alice:secret@localhost:1', 'ws://localhost:1: '),
    ('ws://alice:sec\nret@127.0.0.1:1', 'ws://127.0.0.1:1: [Errno '),
    ('ws://127.0.0.1:1/?token=sec@ret', 'ws://127.0.0.1:1/: [Errno '),
    ('http://alice:secret@localhost', NO_ADDRESS),
    ('ws://alice:sec/ret@localhost:1', NO_ADDRESS),
    ('alice:secret@localhost:8765', NO_ADDRESS),
    ('ws://alice:secret', NO_ADDRESS),
    ('ws://127.0.0.1:99999', NO_ADDRESS),
    ('', NO_ADDRESS),
)
async def test_check_that_cannot_connect_shows_no_token(url, reason):
    line = await check_line(url)
    assert line.startswith(reason)
    assert not re.search('secret|ret@|@ret|sec$', line, re.M), line


async def test_check_says_what_is_wrong_with_tls(tls):
    hint = '; check the address, ws:// or wss://, and that the relay is running'
    async with running_relay(tls) as secure, running_relay() as plain:
        assert 'if it is self-signed, set SSL_CERT_FILE' in await check_line(secure.url)
        assert (await check_line(secure.url.replace('wss:', 'ws:'))).endswith(hint)
        assert (await check_line(plain.url.replace('ws:', 'wss:'))).endswith(hint)


async def test_check_says_that_two_relays_need_nats():
    hint = 'is unknown; see the log of the relay or, if there are several, check their --nats'
    async with running_relay() as one, running_relay() as other:
        line = await check_line(one.url, other.url)
    assert line.startswith(f'{one.url} and {other.url}: Cannot forward ') and line.endswith(hint)


async def test_check_is_one_line_and_a_status():
    assert fails('--check', 'ws://127.0.0.1:1').startswith('relay.py: ws://127.0.0.1:1: [Errno ')
    async with running_relay() as server:
        status, text, errors = await asyncio.to_thread(forked(relay.main, '--check', server.url))
    assert (status, text.count('\n'), errors) == (0, 1, '')


def test_a_check_that_is_interrupted_in_the_middle_of_anything_is_one_line(monkeypatch):
    class Unfinished:
        def __del__(self):
            raise AttributeError('_closing')

    async def interrupted(url):
        Unfinished()
        raise KeyboardInterrupt

    monkeypatch.setattr(relay, 'check', interrupted)
    # As it is in a program; pytest has one of its own.
    monkeypatch.setattr(sys, 'unraisablehook', sys.__unraisablehook__)
    assert fails('--check', 'ws://127.0.0.1:1') == 'relay.py: interrupted\n'


async def test_a_check_that_is_interrupted_is_one_line(tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as silent:
        url = 'ws://127.0.0.1:%d' % silent.getsockname()[1]
        with Program(tmp_path, sys.executable, HERE / 'relay.py', '--check', url) as program:
            with silent.accept()[0] as accepted:
                program.child.send_signal(signal.SIGINT)
                # asyncio.run does not see a signal that comes just before it waits: wake it up.
                while program.child.poll() is None:
                    await asyncio.sleep(0.2)
                    with contextlib.suppress(OSError):
                        accepted.send(b' ')
                await program.ends(1, 'relay.py: interrupted\n')


# ------------------------------------------------------------------------------- Connection

HANDSHAKE = (
    b'GET / HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
    b'Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n'
)
CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
LAST = 0x80  # the bit of a message's last frame
KEY = b'\x5a\xc3\0\x81'


def frame_of(opcode, data=b'', head=LAST, length=None):
    """Return the bytes of a client's frame; its length may be a lie."""
    size = len(data) if length is None else length
    if size < 126:
        sizes = bytes([LAST | size])
    else:
        form, octets = (126, 2) if size < 2**16 else (127, 8)
        sizes = bytes([LAST | form]) + size.to_bytes(octets, 'big')
    mask = KEY * (len(data) // 4 + 1)
    masked = int.from_bytes(data, 'big') ^ int.from_bytes(mask[: len(data)], 'big')
    return bytes([head | opcode]) + sizes + KEY + masked.to_bytes(len(data), 'big')


def frames_of(*frames):
    return b''.join(frame_of(*frame) for frame in frames)


def said(message):
    """Return the bytes of a client's message: of a dict, or of anything in place of its JSON."""
    if isinstance(message, dict):
        message = json.dumps(message)
    return frame_of(TEXT, message.encode() if isinstance(message, str) else message)


def code_of(code, reason=b''):
    return code.to_bytes(2, 'big') + reason


CLOSE_1000 = frame_of(CLOSE, code_of(1000))
PLAIN = b'GET / HTTP/1.1\r\n\r\n'


class Wire(Peer):
    """A client that writes bytes, over TLS if it has a context, and reads frames."""

    def __init__(self, server, reader, writer, tls=None):
        super().__init__(None, uuid4(), 'wire')
        self.server, self.reader, self.writer = server, reader, writer
        self.sent, self.received = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = tls and tls.wrap_bio(self.received, self.sent, server_hostname='localhost')

    @property
    def transport(self):
        return self.writer.transport

    @property
    def link(self):
        """The relay's side of this connection, None before and after it."""
        mine, links = self.writer.get_extra_info('sockname'), self.server.listener.connections
        return next((link for link in links if link.remote_address == mine), None)

    def records(self, data):
        self.tls.write(data)
        return self.sent.read()

    def send(self, *data):
        data = b''.join(data)
        # Some versions of Python cannot write nothing.
        self.writer.write(self.records(data) if self.tls and data else data)

    async def send_and_wait(self, data):
        """Send bytes, and wait until the relay has read them or a part of them."""
        link, heard = self.link, self.link.last_heard
        self.send(data)
        await until(lambda: link.last_heard != heard)

    async def send_cut(self, data, cut):
        """Send bytes in two parts, the second when the relay has read the first."""
        await self.send_and_wait(data[:cut])
        self.send(data[cut:])

    async def say(self, message):
        self.send(said(message))

    async def step(self, call, *args):
        """Do what OpenSSL asks for until it has done something."""
        while True:
            try:
                return call(*args)
            except ssl.SSLWantReadError:
                self.writer.write(self.sent.read())
                data = await self.reader.read(2**16)
                self.received.write(data) if data else self.received.write_eof()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b''

    async def read(self, size):
        """Read so many bytes, fewer only at the end."""
        data = bytearray()
        while len(data) < size:
            rest = size - len(data)
            more = await (self.step(self.tls.read, rest) if self.tls else self.reader.read(rest))
            if not more:
                break
            data += more
        return bytes(data)

    async def open(self, early=b''):
        self.send(HANDSHAKE, early)
        return await self.welcomed()

    async def welcomed(self):
        answer = b''
        while not answer.endswith(b'\r\n\r\n'):
            byte = await self.read(1)
            assert byte, answer
            answer += byte
        assert answer.startswith(b'HTTP/1.1 101 ')
        return self

    async def register(self):
        assert await self.ask(self.registration()) == self.response()
        return self

    async def frame(self):
        """Read a frame: its opcode and its data, or nothing at the end."""
        head = await self.read(2)
        if not head:
            return None
        size = head[1]
        assert head[0] & 0x70 == 0 and size < 128
        if size > 125:
            size = int.from_bytes(await self.read(2 if size == 126 else 8), 'big')
        return head[0] & 0x0F, await self.read(size)

    async def hear(self):
        # A slow machine may be pinged before.
        while (frame := await self.frame()) == (PING, b''):
            pass
        opcode, data = frame
        assert opcode == TEXT
        return json.loads(data)

    async def end(self):
        """Read to the end: return what came before the close, and its code, None without."""
        frames = []
        while (frame := await self.frame()) and frame[0] != CLOSE:
            frames.append(frame)
        if frame is None:
            return frames, None
        # Nothing comes after a close, and the relay ends what it has to say.
        assert await self.read(1) == b''
        return frames, int.from_bytes(frame[1][:2], 'big')

    def finish(self):
        self.writer.write_eof()

    def end_tls(self):
        """Send close_notify, and do not close the connection."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self.writer.write(self.sent.read())


@contextlib.asynccontextmanager
async def wired(server, tls=None, opened=True, narrow=False):
    """Connect to a relay with bytes; a narrow client has little room for what it does not read."""
    sock = socket.socket()
    if narrow:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect(('127.0.0.1', port_of(server)))
    reader, writer = await asyncio.open_connection(sock=sock)
    wire = Wire(server, reader, writer, tls)
    if tls:
        await wire.step(wire.tls.do_handshake)
    if isinstance(server, RelayServer):
        await until(lambda: wire.link)
    try:
        yield await wire.open() if opened else wire
    finally:
        writer.transport.abort()


async def alone(server, peer):
    """Wait until nothing is left of anybody but one peer, who goes on."""
    only = [holder(server, peer.uuid).websocket]
    await until(lambda: list(server.listener.connections) == only)
    assert list(server._websocket_to_client) == only and len(server._uuid_to_client) == 1
    await exchange(peer, peer)


@contextlib.asynccontextmanager
async def relay_with_peer(security=(None, None), **limits):
    """Serve a relay to a peer, whom nothing may affect and who is alone in the end."""
    tls, trust = security
    async with running_relay(tls, **limits) as server, registered(server, A, ssl=trust) as peer:
        yield server, peer
        await alone(server, peer)


@contextlib.asynccontextmanager
async def relay_with_wire(security=(None, None), narrow=False, **limits):
    """Serve a relay to such a peer and to a registered wire."""
    async with relay_with_peer(security, **limits) as (server, peer):
        async with wired(server, security[1], narrow=narrow) as wire:
            yield server, peer, await wire.register()


@pytest.fixture(params=['ws', 'wss'])
def security(request, tls, pem):
    """The TLS contexts of a relay and its clients: a test is run without and with them."""
    return (None, None) if request.param == 'ws' else (tls, trusting(pem))


def cuts(data):
    """Where to cut a frame: at every byte, but for what lies deep in a long one."""
    return [cut for cut in range(1, len(data)) if cut < 40 or cut > len(data) - 4]


# By name: bytes, and what they are answered with: reasons in texts, and pongs.
NOT_JSON = 'not JSON: Expecting value: line 1 column 1 (char 0)'
NOT_TEXT = 'a message must be a text frame, not a binary frame'
WELL_FORMED = {
    'a text': (said('x'), [NOT_JSON]),
    'an empty text': (said(''), [NOT_JSON]),
    'a longer text': (said('x' * 126), [NOT_JSON]),
    'a long text': (said('x' * 2**16), [NOT_JSON]),
    'a length longer than it need be': (b'\x81\xff' + bytes(7) + b'\1\0\0\0\0x', [NOT_JSON]),
    'a text of letters of two bytes': (said('\u00e9\u00e9'), [NOT_JSON]),
    'a letter in two': (frames_of((TEXT, b'\xc3', 0), (CONT, b'\xa9')), [NOT_JSON]),
    'a text in three': (frames_of((TEXT, b'x', 0), (CONT, b'', 0), (CONT, b'y')), [NOT_JSON]),
    'pings and pongs between fragments': (
        frames_of((TEXT, b'x', 0), (PING, b'1'), (PONG, b'2'), (CONT, b'y', 0), (PING, b'3'))
        + frame_of(CONT),
        [b'1', b'3', NOT_JSON],
    ),
    'a binary message': (frame_of(BINARY, b'\xff'), [NOT_TEXT]),
    'a binary message in two': (frames_of((BINARY, b'\xff', 0), (CONT, b'\xff')), [NOT_TEXT]),
    'a ping': (frame_of(PING, b'pong'), [b'pong']),
    'an empty ping': (frame_of(PING), [b'']),
    'a long ping': (frame_of(PING, b'x' * 125), [b'x' * 125]),
    'a pong that nobody asked for': (frame_of(PONG, b'?'), []),
}


async def test_a_request_may_come_in_pieces():
    async with running_relay() as server:
        for cut in range(1, len(HANDSHAKE)):
            async with wired(server, opened=False) as wire:
                await wire.send_cut(HANDSHAKE, cut)
                await wire.welcomed()
        await until(lambda: not server.listener.connections)


@each('data, answers', WELL_FORMED)
async def test_a_frame_may_come_in_pieces(data, answers):
    async with running_relay() as server, wired(server) as wire:
        for cut in cuts(data):
            await wire.send_cut(data, cut)
            for answer in answers:
                if isinstance(answer, bytes):
                    assert await wire.frame() == (PONG, answer)
                else:
                    assert await wire.hear() == wire.response(answer)
        wire.send(frame_of(PING, b'still here'))
        assert await wire.frame() == (PONG, b'still here')


async def test_many_frames_may_come_at_once():
    async with running_relay() as server, wired(server) as wire:
        data, answers = zip(*WELL_FORMED.values())
        wire.send(*data * 20)
        heard = []
        while len(heard) < 20 * sum(map(len, answers)):
            opcode, answer = await wire.frame()
            heard.append(answer if opcode == PONG else json.loads(answer)['message'])
        # Pongs may come before the answers to what came before, as the RFC has it.
        for kind in (bytes, str):
            expected = [a for some in answers for a in some if isinstance(a, kind)] * 20
            assert [a for a in heard if isinstance(a, kind)] == expected


CLOSES = {
    'without a code': b'',
    **{f'with {code}': code_of(code, b'why') for code in (1000, 1001, 1011, 3000, 4999)},
    'with a long reason': code_of(1000, b'x' * 123),
}


@each('data', CLOSES)
async def test_a_close_is_echoed_wherever_it_is_cut(data):
    async with relay_with_peer() as (server, _):
        frame = frame_of(CLOSE, data)
        for cut in cuts(frame):
            async with wired(server) as wire:
                await wire.send_cut(frame, cut)
                assert await wire.frame() == (CLOSE, data)
                assert await wire.read(1) == b''


# By name: bytes that a connection is closed for, and with what code.
BROKEN = {
    'an unmasked text': (b'\x81\x02{}', 1002),
    'an unmasked ping': (b'\x89\0', 1002),
    'an unmasked close': (b'\x88\0', 1002),
    **{f'reserved bit {n}': (frame_of(TEXT, b'{}', LAST | n), 1002) for n in (64, 32, 16)},
    **{f'reserved opcode {n}': (frame_of(n, b'{}'), 1002) for n in (3, 4, 5, 6, 7)},
    **{f'reserved opcode {n}': (frame_of(n, b'{}'), 1002) for n in (11, 12, 13, 14, 15)},
    **{
        f'{fault} {name}': (frame_of(opcode, b'\3\xe8' + b'x' * size, head), 1002)
        for name, opcode in (('close', CLOSE), ('ping', PING), ('pong', PONG))
        for fault, size, head in (('too long a', 124, LAST), ('a fragment of a', 0, 0))
    },
    'a continuation of nothing': (frame_of(CONT, b'{}'), 1002),
    'more of a whole text': (frames_of((TEXT, b'{', 0), (CONT, b'}'), (CONT, b'{}')), 1002),
    'a text inside a text': (frames_of((TEXT, b'{', 0), (TEXT, b'}')), 1002),
    'a binary message inside a text': (frames_of((TEXT, b'{', 0), (BINARY, b'}')), 1002),
    'a close inside a text': (frame_of(TEXT, b'{', 0) + CLOSE_1000, 1002),
    'bytes that are no UTF-8': (said(b'{\xff}'), 1007),
    'a letter that ends too early': (said(b'"\xe2\x82'), 1007),
    'a letter longer than it need be': (said(b'"\xc0\xaf"'), 1007),
    'half of a surrogate pair': (said(b'"\xed\xa0\x80"'), 1007),
    'no UTF-8 in fragments': (frames_of((TEXT, b'\xe2\x82', 0), (CONT, b'}')), 1007),
    'half a letter in fragments': (frames_of((TEXT, b'\xe2', 0), (CONT, b'\x82')), 1007),
    'one byte too many': (frame_of(TEXT, length=2**20 + 1), 1009),
    'far too many bytes': (frame_of(TEXT, length=2**63 - 1), 1009),
    'more bytes than there can be': (frame_of(BINARY, length=2**64 - 1), 1009),
    'one byte too many in fragments': (
        frame_of(TEXT, b'x' * 1000, 0) + frame_of(CONT, length=2**20 - 999),
        1009,
    ),
    **{
        f'a close with {code}': (frame_of(CLOSE, code_of(code)), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535)
    },
    'a proper close': (CLOSE_1000, 1000),
    'a close with half a code': (frame_of(CLOSE, b'\3'), 1002),
    'a close with a reason that is no UTF-8': (frame_of(CLOSE, code_of(1000, b'\xff')), 1007),
}


@each('data, code', BROKEN)
async def test_a_protocol_error_closes_with_its_code_and_the_rest_is_ignored(data, code):
    async with relay_with_wire() as (server, peer, wire):
        offer, more = wire.offer(A), frame_of(PING) + b'\xff\xff'
        # Just one of them begins with a whole text, which is answered.
        answers = int(data == BROKEN['more of a whole text'][0])
        kind = 'too_large' if code == CloseCode.MESSAGE_TOO_BIG else 'malformed'
        # A proper close is not a refusal, not even inside a text.
        count = answers + (not data.endswith(CLOSE_1000))
        with moves(server, refused(kind), count):
            # The message before it counts, those after it do not: the peer would hear of them.
            wire.send(said(offer), data, said(offer), more)
            frames, ended_with = await wire.end()
            assert ended_with == code
            assert [b'message_type must be' in text for _, text in frames] == [True] * answers
            wire.send(said(offer), more)
            wire.finish()
            assert await peer.hear() == offer
            await alone(server, peer)


async def test_after_the_close_of_the_relay_nothing_that_a_client_says_does_anything():
    async with relay_with_wire() as (server, _, wire):
        await server.unregister(wire.link, expected=True)
        wire.send(said(wire.registration()))
        wire.send(said(wire.offer(A)), said(b'\xff'), frame_of(PING, b'?'))
        assert await wire.frame() == (CLOSE, code_of(1000))
        assert await wire.frame() == (PONG, b'?')
        wire.send(CLOSE_1000)
        assert await wire.frame() is None


@each('rate', 0, 2000)
@each('close', CLOSE_1000, b'', ids=['close', ''])
@each('security, notify', ('ws', False), ('wss', False), ('wss', True), indirect=['security'])
async def test_messages_before_a_close_or_an_end_are_forwarded(rate, close, security, notify):
    async with relay_with_wire(security, rate=rate) as (_, peer, wire):
        offers = [wire.offer(A, description=f'{n:0500}') for n in range(200)]
        wire.send(*map(said, offers), close)
        if notify:
            wire.end_tls()
        wire.finish()
        assert [await peer.hear() for _ in offers] == offers


@each('cut', 0, 1, 2**19)
async def test_a_message_may_have_as_many_bytes_as_the_limit(cut):
    async with relay_with_wire() as (_, _, wire):
        text = json.dumps(wire.offer(wire.uuid)).encode().ljust(2**20)
        wire.send(frames_of((TEXT, text[:cut], 0), (CONT, text[cut:])))
        assert await wire.frame() == (TEXT, text)


# By name: what a client may send with its request, and the opcode of the answer.
EARLY = {
    'a ping': (frame_of(PING), PONG),
    'a close': (frame_of(CLOSE), CLOSE),
    'garbage': (b'\xff\xff', CLOSE),
    'the same again': (HANDSHAKE, CLOSE),
}


@each('early, answer', EARLY)
async def test_frames_sent_with_a_request_are_handled_after_it(early, answer, log):
    async with relay_with_peer() as (server, _):
        async with wired(server, opened=False) as wire:
            await wire.open(early)
            assert (await wire.frame())[0] == answer
        plain = await http(server, b'GET /healthz HTTP/1.1\r\n\r\n' + early)
        assert plain.startswith(b'HTTP/1.1 200 ') and plain.endswith(b'\r\n\r\nok\n')


@each('cut', *range(-5, 0))
async def test_a_blank_line_in_a_frame_does_not_end_a_request(cut, log):
    blank = frame_of(PING, bytes(a ^ b for a, b in zip(b'\r\n\r\n', KEY)))
    plain = HANDSHAKE.replace(b'Upgrade: websocket\r\n', b'')
    async with running_relay() as server:
        async with wired(server, opened=False) as wire:
            await wire.send_and_wait(HANDSHAKE[:cut])
            wire.send(HANDSHAKE[cut:], frame_of(PING), CLOSE_1000, blank)
            await wire.welcomed()
            assert await wire.end() == ([(PONG, b'')], 1000)
        # What a client sends after a request that is refused is not a message.
        async with wired(server, opened=False) as wire:
            await wire.send_and_wait(plain[:cut])
            wire.send(plain[cut:], said('x'), blank)
            assert (await wire.reader.read()).startswith(b'HTTP/1.1 426 ')
        assert not any(server.refusal_counts.values())


@each('size', 2**13, 2**17, 2**23)
async def test_a_request_too_long_is_refused_and_ended(size, log):
    async with relay_with_peer(close_timeout=0.1) as (server, peer):
        async with wired(server, opened=False) as wire:
            wire.send(HANDSHAKE[:-2], b'X: ' + b'x' * size + b'\r\n\r\n')
            # It does not read, and does not close.
            await alone(server, peer)
            with contextlib.suppress(ConnectionError):
                assert b'HTTP/1.1 101' not in await wire.reader.read()


async def test_a_header_that_never_ends_is_answered_with_431():
    async with relay_with_peer() as (server, peer), wired(server, opened=False) as wire:
        wire.send(HANDSHAKE[:-2], *[b'X: ' + b'x' * 2**12 + b'\r\n'] * 17)
        assert (await wire.reader.read()).startswith(b'HTTP/1.1 431 ')
        wire.finish()
        await alone(server, peer)


def ends_with(code, pings=(0, 1)):
    """Read to the end; a slow machine may be pinged before."""

    async def read_to_the_end(wire):
        frames, ended_with = await wire.end()
        assert ended_with == code and len(frames) in pings and {*frames} <= {(PING, b'')}

    return read_to_the_end


async def is_closed(wire):
    """The relay closes the client, which does not answer; it may have more to read before."""
    await wire.server.unregister(wire.link, expected=True)
    if not wire.link.output:
        while (frame := await wire.frame()) == (PING, b''):
            pass
        assert frame == (CLOSE, code_of(1000))


async def leaves_unread(wire):
    """More waits for a client than the kernel holds, and less than it is held for."""
    wire.stall()
    link, log = wire.link, wire.server.refusal_log
    while not link.output:
        before = log.get(link.client)
        # It comes back.
        wire.send(said(wire.offer(C, description='x' * 2**16)))
        await until(lambda last=before: log.get(link.client) != last)


def paused(seconds):
    """From now on, each message of the client waits for so long."""

    def pause(wire):
        uuid, pace = wire.uuid, wire.server.pace
        wire.server.pace = lambda c, size: seconds if c.uuid == uuid else pace(c, size)

    return pause


def received(size):
    """Wait until so many bytes wait to be processed."""
    return lambda wire: until(lambda: len(wire.link.input) >= size)


def is_not_read(wire):
    """Wait until nothing is read of a client, for longer than a turn of the loop."""
    link, unread = wire.link, wire.server.listener.not_reading
    return until(lambda: link in unread and link.paused_for != {relay.SLICE_USED})


# What a client may do once it has registered, in place of a proper end: bytes, and other steps.
# After them, it stays connected and does not answer.
ENDINGS = {
    'end': [Wire.finish],
    'end in a frame': [said('x' * 300)[:99], Wire.finish],
    'end in a message': [frame_of(TEXT, b'x', 0), Wire.finish],
    'end, unread output': [leaves_unread, Wire.finish],
    'close': [CLOSE_1000, ends_with(1000)],
    'close and end': [CLOSE_1000, ends_with(1000), Wire.finish],
    'close, unread output': [leaves_unread, CLOSE_1000],
    'protocol error': [b'\xff\xff', ends_with(1002)],
    'protocol error, unread output': [leaves_unread, b'\xff\xff'],
    'closed by the relay': [is_closed],
    'closed by the relay, unread output': [leaves_unread, is_closed],
    'closed by the relay, and more': [is_closed, said('x') * 2**14],
    'no pong': [ends_with(1011, pings=[1])],
    'no pong, stalled': [Wire.stall],
    'no pong, unread output': [leaves_unread],
    'reset': [Wire.reset],
    'reset in a frame': [said('x' * 300)[:99], Wire.reset],
    'reset after its close': [CLOSE_1000, Wire.reset],
    'reset after the echo of its close': [CLOSE_1000, ends_with(1000), Wire.reset],
    'reset after the close of the relay': [is_closed, Wire.reset],
    'reset, unread output': [leaves_unread, Wire.reset],
    'reset, paused': [paused(60), said('{}') * 300, received(2000), Wire.reset],
    'reset, more': [paused(60), said('x' * 500) * 100, received(49_000), Wire.reset],
    'reset, not read': [paused(60), said('x' * 1000) * 1000, is_not_read, Wire.reset],
    'reset, flooded': [Wire.stall, frame_of(PING, b'x' * 125) * 2**14, is_not_read, Wire.reset],
    # The answer to the first but one cannot be written.
    'messages and reset, paused': [paused(0.01), said('x' * 6000) * 9, Wire.reset],
}
TLS_ENDINGS = {
    **ENDINGS,
    'close_notify': [Wire.end_tls],
    'close and close_notify': [CLOSE_1000, Wire.end_tls],
    'close_notify, paused': [leaves_unread, paused(0.02), said('x' * 6000) * 3, Wire.end_tls],
    'end in a record': [lambda w: w.writer.write(w.records(said('x' * 300))[:99]), Wire.finish],
    'no record': [lambda wire: wire.writer.write(PLAIN)],
    'no record after a text': [lambda wire: wire.writer.write(wire.records(said('x')) + PLAIN)],
}
SOON = {'open_timeout': 0.5, 'close_timeout': 0.05, 'ping_interval': 0.1, 'ping_timeout': 0.5}


async def pings_on(wire):
    link = wire.link
    while link.is_open:
        await wire.send_and_wait(frame_of(PING))


async def end(wire, steps):
    """Let a client take some steps; one that is bytes is sent."""
    for step in steps:
        if isinstance(step, bytes):
            wire.send(step)
        elif waiting := step(wire):
            await waiting


# By name: limits, what a client does, the code it is closed with, and what counts it.
INCOMPLETE = {'MESSAGE_TIMEOUT': 0.1, 'SWEEP_INTERVAL': 0.02}
FRAGMENT = frame_of(TEXT, b'x' * 2**15, 0)
CLOSED = {
    'too long': ({'max_size': 300}, [frame_of(TEXT, length=301)], 1009, 'too_large'),
    'too long, unregistered': ({}, [frame_of(TEXT, length=2**16 + 1)], 1009, 'too_large'),
    'too long in two': ({}, [FRAGMENT, frame_of(CONT, length=2**15 + 1)], 1009, 'too_large'),
    'silence': ({'REGISTER_TIMEOUT': 0.1, 'close_timeout': 0.1}, [], 1008, 'never_registered'),
    'half a frame': (INCOMPLETE, [said('x' * 99)[:50]], 1008, 'incomplete'),
    'a fragment': (INCOMPLETE, [FRAGMENT], 1008, 'incomplete'),
    'an empty fragment': (INCOMPLETE, [frame_of(TEXT, b'', 0)], 1008, 'incomplete'),
    'a fragment and pings': (INCOMPLETE, [FRAGMENT, pings_on], 1008, 'incomplete'),
    'no pong': ({'ping_interval': 0.05, 'ping_timeout': 0.2}, [], 1011, None),
}


@each('limits, steps, code, kind', CLOSED)
async def test_a_client_beyond_a_limit_is_closed_and_counted(limits, steps, code, kind):
    async with relay_with_peer(**limits) as (server, peer), wired(server) as wire:
        with moves(server, refused(kind) if kind else 'relay_pings_unanswered_total'):
            await end(wire, steps)
            frames, ended_with = await wire.end()
            assert ended_with == code and {opcode for opcode, _ in frames} <= {PING, PONG}
            wire.finish()
            await alone(server, peer)


@each('name', 'close', 'protocol error', 'closed by the relay')
async def test_a_client_has_close_timeout_to_close(name):
    async with relay_with_wire(close_timeout=0.1) as (server, peer, wire):
        began = time.monotonic()
        await end(wire, ENDINGS[name])
        await alone(server, peer)
        assert time.monotonic() - began > 0.09


def client_hello():
    sent, context = ssl.MemoryBIO(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname='localhost').do_handshake()
    return sent.read()


HELLO = client_hello()
STARTS = [HANDSHAKE[:0], HANDSHAKE[:1], HANDSHAKE[:60], HANDSHAKE]
TLS_STARTS = [HELLO[:0], HELLO[:3], HELLO[:99], HELLO, bytes(9), PLAIN]


@pytest.fixture
def no_collection(monkeypatch, log):
    """Nothing is collected unless a test asks for it, and no log record keeps anything alive."""

    def note(record):
        if record.levelno >= logging.ERROR or record.exc_info:
            errors.append(record.getMessage())

    errors = []
    monkeypatch.setattr(relay.logger, 'handle', note)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    assert not errors


def kept(*kinds):
    """Return what is in memory of some kinds, or of a connection."""
    kinds = kinds or (relay.Connection, relay.Client, relay.TlsSession, relay.ServerProtocol)
    return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]


async def test_every_kind_of_ending_is_in_time_and_leaves_no_garbage(security, no_collection):
    async with relay_with_peer(security, **SOON) as (server, peer):
        left, files = kept(), len(os.listdir('/proc/self/fd'))
        async with contextlib.AsyncExitStack() as stack:

            async def begin(name, steps, **options):
                wires[name] = await stack.enter_async_context(wired(server, **options))
                tasks.append(asyncio.ensure_future(end(wires[name], steps)))

            wires, tasks = {}, []
            for name, steps in (TLS_ENDINGS if security[0] else ENDINGS).items():
                await begin(name, [Wire.register, *steps], tls=security[1], narrow=True)
            for name, (data, _) in BROKEN.items():
                await begin(name, [data], tls=security[1])
            for start in TLS_STARTS if security[0] else STARTS:
                for leave in (Wire.reset, Wire.finish, Wire.stall):
                    await begin((start, leave), [start, leave], opened=False)
            await asyncio.gather(*tasks)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(alone(server, peer), 4)
            assert [name for name, wire in wires.items() if wire.link] == []
        assert not server.refusal_log.keys() - {None}
        # Three do not answer, and one after the handshake: the ends of others were noticed.
        assert server.counts['pings_unanswered'] == (3 if security[0] else 4)
        await until(lambda: len(os.listdir('/proc/self/fd')) <= files)
        assert kept() == left


async def test_clients_that_are_lost_leave_no_timer(no_collection):
    def timers():
        return [timer for timer in kept(asyncio.TimerHandle) if not timer.cancelled()]

    async with running_relay() as server:
        left, before = kept(), len(timers())
        for after in ('', ' after its close', ' after the close of the relay', ', paused'):
            async with wired(server) as wire:
                await end(await wire.register(), ENDINGS['reset' + after])
        for data in (b'GET / HTTP/1.1', HANDSHAKE, b'?\r\n\r\n'):
            async with wired(server, opened=False) as wire:
                await wire.send_and_wait(data)
                wire.reset()
        await until(lambda: not server.listener.connections)
        gc.collect()
        assert kept() == left
        assert len(timers()) == before


async def test_a_peer_that_reads_a_byte_at_a_time_does_not_hurt_others():
    async with relay_with_wire(narrow=True) as (server, one, slow):
        async with registered(server, B) as other:
            slow.stall()
            message = one.offer(slow.uuid, description='x' * 2**16)
            for _ in range(100):
                await one.say(message)
                with contextlib.suppress(BlockingIOError):
                    os.read(slow.writer.get_extra_info('socket').fileno(), 1)
                await before_mark(one, one)
                await before_mark(other, other)
            assert slow.link.unsent_bytes <= relay.MAX_BACKLOG


# By name: what makes a relay answer, and how many of them.
FLOODS = {
    'texts': (said('x'), 2**13),
    'pings': (frame_of(PING, b'x' * 125), 2**13),
    'messages': (said({**OFFER, 'description': 'x' * 2**14}), 2**6),
}


async def test_a_paused_connection_is_read_up_to_a_limit_and_loses_nothing(security):
    async with relay_with_wire(security) as (server, _, wire):
        link, limit = wire.link, relay.RECEIVE_BUFFER
        link.pause('test')
        wire.send(frame_of(PING, b'x' * 125) * 2000)
        await until(lambda: link in server.listener.not_reading)
        # A record of TLS may be decrypted when its last byte is read.
        more = relay.TLS_RECORD if link.tls else relay.SLICE_MINIMUM
        assert limit <= len(link.input) < limit + more
        link.resume('test')
        for _ in range(2000):
            assert await wire.frame() == (PONG, b'x' * 125)


async def test_what_is_written_counts_before_it_is_sent():
    async with relay_with_wire(MAX_BUFFERED=2**18) as (server, _, wire):
        link = wire.link
        for _ in range(5):
            link.write(b'x' * 2**16)
            assert server.listener.buffered_bytes <= 2**18
        assert not link.is_open


@each('data, count', FLOODS)
async def test_a_client_that_does_not_read_is_not_read(data, count, security):
    options = {'narrow': True, 'MAX_BACKLOG': 2**18}
    async with relay_with_wire(security, **options) as (_, peer, wire):
        wire.stall()
        wire.send(data * count)
        link = wire.link
        await until(lambda: relay.UNREAD in link.paused_for)
        for _ in range(20):
            await exchange(peer, peer)
            assert link.unsent_bytes < relay.MAX_BACKLOG + 2**17
            assert len(link.input) <= 2 * relay.RECEIVE_BUFFER
        # When it reads in the end, nothing is lost.
        wire.transport.resume_reading()
        _, first = await wire.frame()
        assert first == b'x' * 125 or json.loads(first)['error']
        rest = await wire.read((len(first) + (4 if len(first) > 125 else 2)) * (count - 1))
        assert rest.count(first) == count - 1


async def test_a_client_that_makes_tls_answer_again_and_again_is_disconnected(tls, pem):
    async with relay_with_wire((tls, trusting(pem))) as (server, peer, wire):
        session = wire.link.tls
        # OpenSSL answers each KeyUpdate, which is not input. Python cannot send any.
        session.outgoing = SimpleNamespace(read=lambda: bytes(2**12))
        for _ in range(5):
            session.answer()
        wire.send(frame_of(PING))
        await alone(server, peer)


async def test_a_client_that_is_held_for_its_rate_is_not_given_up():
    async with running_relay(rate=20, ping_interval=0.02, ping_timeout=0.02) as server:
        async with wired(server) as wire:
            wire.send(said('x') * 7)
            for _ in range(7):
                while (await wire.frame())[0] == PING:
                    wire.send(frame_of(PONG))
            wire.send(CLOSE_1000)
            assert (await wire.end())[1] == 1000


async def test_a_paused_client_can_answer_a_close():
    async with relay_with_wire() as (server, peer, wire):
        await end(wire, [paused(60), said('x') * 9])
        assert (await wire.hear())['error']
        await is_closed(wire)
        wire.send(CLOSE_1000)
        assert await wire.frame() is None
        wire.finish()
        await alone(server, peer)


async def test_timers_of_a_client_that_is_lost_do_nothing():
    async with relay_with_wire() as (_, _, wire):
        link = wire.link
        link.keep_alive(1e9)
        wire.writer.get_extra_info('socket').shutdown(socket.SHUT_RDWR)
        link.keep_alive(2e9)
        await until(lambda: not wire.link)
        link.resume(relay.RATE_LIMIT)


async def test_messages_before_an_end_are_forwarded_even_if_no_answer_can_be_sent():
    async with relay_with_wire() as (_, peer, wire):
        offers = [wire.offer(A, description=str(n)) for n in range(10)]
        data = [said(offer) for offer in offers]
        # The relay answers the third message, and the network resets the connection for it.
        await end(wire, [paused(0.01), *data[:2], said('x') * 3, *data[2:], Wire.finish])
        wire.transport.abort()
        assert [await peer.hear() for _ in offers] == offers


async def test_other_clients_have_their_turn_while_long_messages_are_decoded():
    text = zeros(relay.LONG_MESSAGE + 2**14)
    async with relay_with_peer() as (server, one), registered(server, B) as other:
        async with all_of(wired(server) for _ in range(20)) as wires:
            for wire in wires:
                await wire.register()
            for wire in wires:
                wire.send(said(text))
            await one.say(one.offer(B))
            assert await other.hear() == one.offer(B)
            # Of the long messages, most are still to come.
            assert server.refusal_counts['malformed'] < len(wires) / 2
            for wire in wires:
                assert 'message_type' in (await wire.hear())['message']


async def test_between_two_long_messages_others_have_as_long_as_the_first_took(monkeypatch):
    def decode(text):
        began = time.monotonic()
        time.sleep(0.02)
        times.append((began, time.monotonic()))
        raise MessageDecodeError('slow')

    times = []
    async with running_relay() as server, all_of(wired(server) for _ in range(4)) as wires:
        for wire in wires:
            await wire.register()
        monkeypatch.setattr(relay, 'decode', decode)
        for wire in wires:
            wire.send(said(zeros(relay.LONG_MESSAGE + 1)))
        await until(lambda: len(times) == len(wires))
    for (began, ended), (next_began, _) in zip(times, times[1:]):
        assert next_began - ended > 0.9 * (ended - began)


async def test_a_client_with_many_messages_has_a_limited_part_of_each_turn():
    async with running_relay() as server, wired(server) as wire:
        await wire.register()
        wire.send(said('x') * 2000)
        counts = [0]
        while counts[-1] < 2000:
            await asyncio.sleep(0)
            counts.append(server.refusal_counts['malformed'])
        most = max(later - earlier for earlier, later in zip(counts, counts[1:]))
        assert most <= relay.SLICE // relay.SLICE_MINIMUM + 1


async def test_a_ping_between_fragments_does_not_count_against_their_limit():
    async with relay_with_wire(max_size=300) as (_, _, wire):
        wire.send(frames_of((TEXT, b'x' * 290, 0), (PING, b'x' * 100), (CONT, b'')))
        assert await wire.frame() == (PONG, b'x' * 100)
        assert await wire.hear() == wire.response(NOT_JSON)


async def test_pings_and_pongs_count_against_the_rate():
    async with running_relay(rate=1000, BURST=0) as server, wired(server) as wire:
        wire.send(frame_of(PONG) * 20, frame_of(PING) * 20, said('x'))
        while (await wire.frame())[0] == PONG:
            pass
        assert server.refusal_counts['rate_paced'] == 41


async def test_a_tls_handshake_of_single_bytes_has_no_more_time_than_another(tls, log):
    async with running_relay(tls, open_timeout=0.05) as server:
        async with wired(server, opened=False) as wire:
            link, data = wire.link, iter(HELLO[:-1])
            # Each byte takes at least a millisecond, and there are hundreds.
            while wire.link:
                heard = link.last_heard
                wire.send(bytes([next(data)]))
                await until(lambda h=heard: link.last_heard > h or link.finished)


async def test_tls_is_not_negotiated_again(tls, pem):
    async with running_relay(tls) as server, registered(server, A, ssl=trusting(pem)) as peer:
        command = ['openssl', 's_client', '-tls1_2', '-connect', f'127.0.0.1:{port_of(server)}']
        pipes = {'input': b'R\n', 'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
        output = (await asyncio.to_thread(subprocess.run, command, **pipes)).stdout
        assert b'RENEGOTIATING' in output and b'no renegotiation' in output
        await exchange(peer, peer)


@each('order', [A, B], [B, A], ids=['first', 'last'])
async def test_an_internal_error_with_one_peer_does_not_affect_another(order, caplog):
    def fail():
        link.unflushed_bytes = 0
        raise RuntimeError('a defect')

    async with relay_with_peer() as (server, one), registered(server, B) as other:
        async with registered(server, C) as sender:
            link = holder(server, A).link
            link.flush = fail
            # In one piece, so that both are written to in one go.
            sender.websocket.transport.write(b''.join(said(sender.offer(u)) for u in order))
            assert await other.hear() == sender.offer(B)
            del link.flush
            await exchange(other, sender)
            assert await one.ask(one.offer(A)) == sender.offer(A)
    assert [r.exc_info[1].args for r in caplog.records if r.exc_info] == [('a defect',)]


async def test_an_internal_error_does_not_end_the_sweep(caplog):
    def fail(now):
        del link.keep_alive
        raise RuntimeError('a defect')

    async with running_relay(ping_interval=0.02) as server, registered(server, A):
        link = holder(server, A).link
        link.keep_alive = fail
        pinged = link.last_pinged
        await until(lambda: link.last_pinged > pinged)
    assert [r.exc_info[1].args for r in caplog.records if r.exc_info] == [('a defect',)]


async def test_out_of_memory_the_client_that_holds_the_most_is_closed():
    async with relay_with_wire(MAX_BUFFERED=2**18) as (server, peer, innocent):
        async with wired(server) as most, wired(server) as last:
            offer = innocent.offer(A, description='x' * 10_000)
            innocent.send(said(offer)[:-1])
            (await most.register()).send(frame_of(TEXT, b'x' * 150_000, length=2**20))
            await until(lambda: server.listener.buffered_bytes > 160_000)
            (await last.register()).send(frame_of(TEXT, b'x' * 120_000, length=2**20))
            assert await most.end() == ([], CloseCode.TRY_AGAIN_LATER)
            innocent.send(said(offer)[-1:])
            assert await peer.hear() == offer
            assert holder(server, last.uuid)
            assert server.refusal_counts['out_of_memory'] == 1
        await until(lambda: server.listener.buffered_bytes == 0)


async def test_out_of_memory_a_client_that_does_not_read_is_dropped():
    async with relay_with_wire(narrow=True, MAX_BUFFERED=2**18) as (server, sender, wire):
        wire.stall()
        while holder(server, wire.uuid):
            await sender.say(sender.offer(wire.uuid, description='x' * 2**14))
            await before_mark(sender, sender)
        await alone(server, sender)
        assert server.refusal_counts['out_of_memory'] == 1
        assert server.listener.buffered_bytes == 0


async def test_a_client_may_be_dropped_for_the_answer_to_its_own_message(monkeypatch, log):
    async with relay_with_wire(narrow=True) as (server, peer, wire):
        await leaves_unread(wire)
        # There is no memory left for the close frame.
        monkeypatch.setattr(relay, 'MAX_BUFFERED', server.listener.buffered_bytes)
        wire.send(said(b'\xff'))
        await alone(server, peer)


async def test_a_client_whose_message_came_in_two_parts_may_be_idle_afterwards():
    async with relay_with_wire(**INCOMPLETE) as (server, _, wire), wired(server) as late:
        link = wire.link
        wire.send(said('x')[:4])
        await until(lambda: link in server.listener.incomplete)
        wire.send(said('x')[4:])
        assert (await wire.hear())['error']
        late.send(said('x')[:4])  # until this is closed, the time has passed for both
        assert await late.end() == ([], CloseCode.POLICY_VIOLATION)
        wire.send(said('x'))
        assert (await wire.hear())['error']


@each('reason', relay.RATE_LIMIT, relay.TURN)
async def test_a_message_that_waits_for_the_relay_does_not_time_out(reason, monkeypatch):
    async with (
        running_relay(SWEEP_INTERVAL=0.02) as server,
        wired(server) as wire,
        wired(server) as late,
    ):
        link = (await wire.register()).link
        data = frame_of(TEXT, b'{', 0) + frame_of(CONT, b'{', 0)
        if reason is relay.TURN:
            data = said(zeros(2**17))
        wire.send(data[:-1])
        await until(lambda: link in server.listener.incomplete)
        monkeypatch.setattr(server, 'pace', lambda client, size: 60)
        monkeypatch.setattr(server.listener, 'request_turn', lambda connection: None)
        wire.send(data[-1:])
        await until(lambda: link.paused_for == {reason})
        late.send(frame_of(TEXT, b'{', 0)[:-1])
        monkeypatch.setattr(relay, 'MESSAGE_TIMEOUT', 0)
        assert await late.end() == ([], CloseCode.POLICY_VIOLATION)
        assert link.is_open and link.paused_for == {reason}


async def test_the_oldest_of_too_many_handshakes_is_dropped():
    async with (
        relay_with_peer(MAX_HANDSHAKES=2) as (server, _),
        wired(server, opened=False) as oldest,
    ):
        async with wired(server, opened=False) as one, wired(server, opened=False) as other:
            assert await oldest.reader.read() == b''
            await one.open()
            await other.open()


# ------------------------------------------------------------------------------- Attacks

# By name: requests that are not a handshake, or not a valid one. Some versions of websockets
# answer some of them by themselves.
REQUESTS = {
    'POST': b'POST / HTTP/1.1\r\n\r\n',
    'POST with a body': b'POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello',
    'POST with chunks': (
        b'POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n'
    ),
    'HEAD': b'HEAD / HTTP/1.1\r\n\r\n',
    'GET with a body': b'GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello',
    'GET with an empty body': b'GET / HTTP/1.1\r\nContent-Length: 0\r\n\r\n',
    'HTTP/1.0': b'GET / HTTP/1.0\r\n\r\n',
    'a handshake with a body': HANDSHAKE[:-2] + b'Content-Length: 5\r\n\r\nhello',
}
PROBES = {
    **REQUESTS,
    'nothing': b'EOF',
    'a few bytes': b'\0\1\2\3EOF',
    'TLS hello': bytes.fromhex('16030100c8010000c40303') + bytes(200),
    'HTTP/2 preface': b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n' + bytes(9),
    'SSH banner': b'SSH-2.0-OpenSSH_9.9\r\n',
    '100 KB of header': b'GET / HTTP/1.1\r\nX: ' + b'x' * 100_000 + b'\r\n\r\n',
    'many headers': b'GET / HTTP/1.1\r\n' + b'X: y\r\n' * 1000 + b'\r\n',
    '100 KB of path': b'GET /' + b'x' * 100_000 + b' HTTP/1.1\r\n\r\n',
    'half a handshake': b'GET / HTTP/1.1\r\nUpgrade: websocket\r\nEOF',
    'a handshake without a key': b'GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n',
    'escapes in the path': b'GET /\x1b[2J\r\nERROR HTTP/1.1\r\nUpgrade: websocket\r\n\r\n',
}


@each('probe', PROBES)
async def test_a_scanner_leaves_no_more_than_a_debug_line(probe, caplog, monkeypatch):
    monkeypatch.setattr(logging, 'raiseExceptions', True)
    monkeypatch.setattr(logging, 'basicConfig', lambda **_: None)
    caplog.set_level('DEBUG')
    for name in ('websockets', 'asyncio'):
        caplog.set_level('NOTSET', name)  # which caplog restores
    relay.configure_logging(None, 'DEBUG')
    async with relay_with_peer(open_timeout=0.2) as (server, _):
        head, _, body = (await http(server, probe)).partition(b'\r\n\r\n')
        await until(lambda: caplog.text.count('No handshake') == 1)
    assert not [r for r in caplog.records if r.levelno > logging.INFO or r.exc_info]
    assert len(caplog.text) < 2000
    if probe in REQUESTS.values():
        assert head.split()[:2] in ([b'HTTP/1.1', b'426'], [b'HTTP/1.1', b'400'])
        assert body.endswith(b'\n')


async def test_plain_text_on_a_tls_port_and_tls_on_a_plain_port_are_refused_quickly(tls, log):
    for context, data in ((tls, PLAIN), (None, HELLO)):
        async with running_relay(context) as server:
            assert await http(server, data) == b''


@each('version', 'TLSv1_1', 'TLSv1_2', 'TLSv1_3')
async def test_tls_is_spoken_from_1_2_on(version, tls, pem):
    trust = trusting(pem)
    for context in (tls, trust):
        # Whatever the defaults of the machine are.
        context.set_ciphers('ALL:@SECLEVEL=0')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        trust.minimum_version = trust.maximum_version = ssl.TLSVersion[version]
    async with running_relay(tls) as server:
        with pytest.raises(OSError) if version == 'TLSv1_1' else contextlib.nullcontext():
            async with registered(server, A, ssl=trust) as peer:
                await exchange(peer, peer)


async def test_a_peer_lost_while_it_is_written_to_affects_no_other(security, log):
    async with relay_with_peer(security) as (server, peer):
        for _ in range(20):
            async with wired(server, security[1]) as wire:
                await wire.register()
                wire.send(said('{}') * 200)
                await peer.say(peer.offer(wire.uuid, description='x' * 2**16))
                wire.reset()
                while holder(server, wire.uuid):
                    await peer.say(peer.offer(wire.uuid))
                    await before_mark(peer, peer)


async def test_mutated_messages_cost_others_nothing(log):
    chance, letters = random.Random(2), '{}[]",:\\ue0123456789-+.NaInfty\0\x85\u202e'

    async def attack(server):
        async with wired(server) as wire:
            await wire.register()
            targets = [encode(message) for message in MESSAGES]
            targets += [json.dumps(wire.offer(uuid)) for uuid in (A, C, wire.uuid)]
            for _ in range(1000):
                text = list(chance.choice(targets))
                for _ in range(chance.randint(1, 8)):
                    place = chance.randrange(len(text))
                    text[place : place + chance.randint(0, 2)] = chance.choice(letters)
                wire.send(said(''.join(text)))
            wire.send(CLOSE_1000)
            assert (await wire.end())[1] == 1000

    async with relay_with_peer() as (server, one), registered(server, B) as other:
        attacks, marks = asyncio.gather(*(attack(server) for _ in range(4))), 0
        while not attacks.done() or marks < 20:
            marks += 1
            await one.say(mark := one.offer(B, description=f'mark {marks}'))
            assert await other.hear() == mark
        await attacks
        await before_mark(one, one)  # after what was sent to it
    assert len(log()) - len(log('Forwarded')) < 40


async def drain(peer):
    """Read whatever comes, to the end of the connection."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await peer.websocket.recv()


async def test_silent_connections_give_way_when_there_are_no_file_descriptors_left():
    async with running('--max-clients', 99, files=40) as program:
        async with registered(program, A) as one, registered(program, B) as other:
            port = port_of(program)
            silent = [await asyncio.open_connection('127.0.0.1', port) for _ in range(40)]
            await exchange(one, other)
            # There is room for 8 connections.
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(6):
                    late = await stack.enter_async_context(registered(program, uuid4()))
                    await exchange(one, late)
                for reader, writer in silent:
                    assert await reader.read() == b''
                    writer.close()


async def test_a_reload_works_while_silent_connections_use_up_the_file_descriptors(tokens):
    async with running('--token-file', tokens, files=128) as program:
        async with registered(program, A, **bearer('b1')) as peer:
            with contextlib.ExitStack() as stack:
                for _ in range(200):
                    sock = stack.enter_context(socket.socket())
                    sock.setblocking(False)
                    sock.connect_ex(('127.0.0.1', port_of(program)))
                files = f'/proc/{program.child.pid}/fd'
                await until(lambda: len(os.listdir(files)) > 128 - relay.RESERVED_FDS)
                Path(tokens).write_text('alice:a1\n')
                await program.signal(signal.SIGHUP, 'Reloaded')
                assert await peer.closed_with() == CloseCode.POLICY_VIOLATION
                async with registered(program, B, **bearer('a1')) as other:
                    await exchange(other, other)


async def test_a_client_over_tls_takes_little_memory(pem):
    async with running('--certfile', pem / 'both.pem') as program:
        status, memory = Path(f'/proc/{program.child.pid}/status'), []
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(60):
                wire = await stack.enter_async_context(wired(program, trusting(pem)))
                await wire.register()
                memory.append(int(re.search(r'VmRSS:\s+(\d+)', status.read_text())[1]))
        # In KiB: about 21 each; asyncio's own TLS takes 287.
        assert (memory[59] - memory[9]) / 50 < 64


# ------------------------------------------------------------------------------- Scale-out

NATS_SERVER = shutil.which('nats-server', path=f'{os.environ["PATH"]}:/usr/sbin')
NO_NATS = '' if NATS_SERVER else 'nats-server is not installed'
try:
    import nats.errors
except ImportError:
    NO_NATS = NO_NATS or 'nats-py is not installed'
needs_nats = pytest.mark.skipif(bool(NO_NATS), reason=NO_NATS)
DISCONNECTED = 'the relays are disconnected.'
LOST = '; clients of other relays cannot be reached'
HOUR = 3600 * 10**9  # ns


@contextlib.contextmanager
def port_to_come():
    """Keep a port for a process that will listen there, also when it is started again."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(('127.0.0.1', 0))
        yield sock.getsockname()[1]


class Link:
    """A TCP proxy that can be cut, stalled, slow, or change what the server says."""

    def __init__(self, port, delay=0, edited=bytes):
        self.target, self.delay, self.edited = port, delay, edited  # delay: s, each way
        self.flowing, self.cut = asyncio.Event(), False
        self.transports, self.count = [], 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.accept, '127.0.0.1', 0)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f'nats://127.0.0.1:{self.port}'
        self.recover()
        return self

    async def __aexit__(self, *_):
        self.server.close()
        self.recover()
        self.kill()
        await until(lambda: not self.count)

    def kill(self):
        """Reset all connections and, until it recovers, new ones."""
        self.cut = True
        for transport in self.transports:
            if not transport.is_closing():
                reset(transport)

    def freeze(self):
        self.flowing.clear()

    def recover(self):
        self.cut = False
        self.flowing.set()

    async def accept(self, reader, writer):
        self.count += 1
        self.transports.append(writer.transport)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            far_reader, far_writer = await asyncio.open_connection('127.0.0.1', self.target)
            self.transports.append(far_writer.transport)
            there = self.copy(reader, far_writer, bytes)
            await asyncio.gather(there, self.copy(far_reader, writer, self.edited))
        writer.transport.abort()
        self.count -= 1

    async def copy(self, reader, writer, edited):
        with contextlib.suppress(OSError):
            while not self.cut and (data := await reader.read(2**16)):
                await asyncio.sleep(self.delay)
                await self.flowing.wait()
                writer.write(edited(data))
        writer.transport.abort()


def run_nats(stack, *lines, routes=(), started=True):
    """Run a NATS server with lines in its configuration and routes to others of its cluster."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    server = Program(folder, NATS_SERVER, '-c', 'nats.conf')
    ports = [stack.enter_context(port_to_come()) for _ in range(3)]
    server.port, server.cluster, server.monitoring = ports
    server.url = f'nats://127.0.0.1:{server.port}'
    routes = [f'nats://127.0.0.1:{port}' for port in routes]
    cluster = {'name': 'c', 'port': server.cluster, 'no_advertise': True, 'routes': routes}
    lines += f'port: {server.port}', f'http_port: {server.monitoring}', 'host: 127.0.0.1'
    lines += (f'cluster: {json.dumps({"host": "127.0.0.1", **cluster})}',)
    (folder / 'nats.conf').write_text('\n'.join(lines))
    stack.callback(server.kill)
    if started:
        server.recover()
        while not server.lines('Server is ready'):
            assert server.child.poll() is None, server.lines()
            time.sleep(0.001)
    return server


def run_cluster(nats_server, count):
    """Run NATS servers that know each other."""
    servers = []
    for _ in range(count):
        servers.append(nats_server(routes=[server.cluster for server in servers]))
    return servers


@pytest.fixture
def nats_server():
    """Return a function that runs a NATS server, or skip the test."""
    if NO_NATS:
        pytest.skip(NO_NATS)
    with contextlib.ExitStack() as stack:
        yield functools.partial(run_nats, stack)


@pytest.fixture(scope='module')
def bus():
    """Return the URL of a NATS server that nobody disturbs."""
    if NO_NATS:
        pytest.skip(NO_NATS)
    with contextlib.ExitStack() as stack:
        yield run_nats(stack).url


@pytest.fixture
def quick(monkeypatch):
    """Let relays notice sooner that they have lost NATS, and connect again sooner."""
    monkeypatch.setattr(relay, 'NATS_HEARTBEAT', 0.02)
    monkeypatch.setattr(relay, 'CLAIM_BEATS', 3000)  # once a minute, as otherwise
    monkeypatch.setattr(relay, 'NATS_REQUEST_TIMEOUT', 0.5)
    monkeypatch.setitem(relay.NATS_OPTIONS, 'reconnect_time_wait', 0.02)


async def until_subscribed(server, *uuids):
    """Wait until the NATS server has a subscription for each of these clients and no others."""
    url = f'http://127.0.0.1:{server.monitoring}/subsz?subs=1&limit=1000'
    expected, found = sorted(f'relay.client.-.{uuid}' for uuid in uuids), None
    while found != expected:
        with await asyncio.to_thread(urllib.request.urlopen, url) as answer:
            listed = json.load(answer).get('subscriptions_list') or []
        subjects = [item['subject'] for item in listed]
        found = sorted(subject for subject in subjects if subject.startswith('relay.client.'))


@contextlib.asynccontextmanager
async def relay_process(*urls, **constants):
    """Run relay.py as a process that can be killed, frozen and started again."""
    options = ['--rate', 0, *(x for url in urls for x in ('--nats', url))]
    with port_to_come() as port:
        async with running(*options, '--port', port, **constants) as process:
            await process.logs('NATS is connected')
            yield process


@contextlib.asynccontextmanager
async def joined_relay(*urls, wait=True, **options):
    """Serve a relay that shares its clients with others over NATS."""
    async with running_relay(**options) as server:
        server.backplane = relay.Backplane(server, list(urls), None)
        try:
            await until(lambda: server.backplane.connected or not wait)
            yield server
        finally:
            await server.backplane.close()


@contextlib.asynccontextmanager
async def two_relays(*urls, **options):
    async with joined_relay(*urls, **options) as one, joined_relay(*urls, **options) as other:
        yield one, other


@contextlib.asynccontextmanager
async def two_clients(url, other_url=None, **options):
    """Serve two relays, with A registered at one and B at the other."""
    at_one, at_other = (joined_relay(x, **options) for x in (url, other_url or url))
    async with at_one as one, at_other as other:
        async with registered(one, A) as a, registered(other, B, generation='relay') as b:
            yield one, other, a, b


@contextlib.asynccontextmanager
async def client_of_a_process(url, constants=None, **options):
    """Serve a relay here, with A, and another one as a process, with constants and with B."""
    there, here = relay_process(url, **(constants or {})), joined_relay(url, **options)
    async with there as process, here as one:
        async with registered(one, A) as a, registered(process, B) as b:
            await until_connected(a, b)
            yield process, one, a, b


async def say_all(sender, offers):
    for offer in offers:
        await sender.say(offer)


async def hears_only(peer, *messages):
    """See that these messages arrive, and no others before one that it sends to itself."""
    for message in messages:
        assert await peer.hear() == message
    assert await before_mark(peer, peer) == []


async def until_handled(peer):
    """Wait until a relay without a rate has handled what a client has sent."""
    await (await peer.websocket.ping())


async def reaches(sender, receiver):
    """Send a message; return whether it arrives. If not, it comes back."""
    offer = sender.offer(receiver.uuid, description=str(uuid4()))
    await sender.say(offer)

    async def hear(peer):
        # What was sent before may come first.
        while (await peer.hear()).get('description') != offer['description']:
            pass

    hearing = [asyncio.ensure_future(hear(peer)) for peer in (sender, receiver)]
    done, waiting = await asyncio.wait(hearing, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
        await asyncio.wait({task})
    return hearing[1] in done


async def until_connected(one, other):
    while not (await reaches(one, other) and await reaches(other, one)):
        pass


def numbered_offers(sender, uuid, count):
    return [sender.offer(uuid, description=str(n)) for n in range(count)]


def sent_back(message, kind):
    error = f'Cannot forward peer connection message to peer {message["peer_uuid"]} because '
    return {**message, 'error': f'{error}{relay.FORWARD_ERRORS[kind]}.'}


def is_idle(server):
    """Return whether nothing is on its way to other relays."""
    return not (server.backplane.queues or server.backplane.in_flight_bytes)


def is_settled(server):
    """Return whether all clients are subscribed and claimed, and nothing is on its way."""
    backplane = server.backplane
    subscribed = backplane.subscriptions.keys() == backplane.claims.keys()
    return subscribed and is_idle(server) and not backplane.tasks


async def settled(*servers):
    """Wait until relays are settled, and NATS has delivered what they have published."""
    for server in servers:
        await until(functools.partial(is_settled, server))
    for backplane in 2 * [server.backplane for server in servers]:
        if backplane.connected:
            await backplane.nats.flush()


def tasks_of(name):
    return [task for task in asyncio.all_tasks() if name in task.get_coro().__qualname__]


async def test_the_text_of_a_message_between_relays_is_the_text_received(bus):
    async with two_clients(bus) as (one, other, a, b):
        for sender, receiver in ((a, b), (b, a), (a, b)):
            offer = sender.offer(receiver.uuid, description='\u2013 "\\\U0001f600\r\n', x=[1])
            text = f' {json.dumps(offer, ensure_ascii=False, indent=1)}\n'
            await sender.say(text)
            assert await receiver.websocket.recv() == text
        await settled(one, other)
        for server, counts in ((one, (2, 1)), (other, (1, 2))):
            names = (f'relay_{kind}_messages_total' for kind in ('remote', 'forwarded'))
            assert tuple(samples(server)[name] for name in names) == counts
        await hears_only(a)
        await hears_only(b)


@each(
    'fields, kind',
    ({'source_uuid': str(C)}, 'forged_source'),
    ({'peer_uuid': str(C)}, 'unknown_peer'),
    ({'description': 'x' * 1000}, 'too_long'),
)
async def test_a_message_that_cannot_be_forwarded_is_returned_once(fields, kind, nats_server):
    async with two_clients(nats_server('max_payload: 1000').url) as (one, _, a, b):
        offer = {**a.offer(B), **fields}
        with moves(one, refused(kind)):
            assert await a.ask(offer) == sent_back(offer, kind)
        assert samples(one)['relay_remote_unknown_total'] == (kind == 'unknown_peer')
        await exchange(a, b)
        await hears_only(a)
        await hears_only(b)


async def test_a_client_that_left_or_whose_relay_was_killed_is_unknown(nats_server):
    server = nats_server()
    async with client_of_a_process(server.url) as (process, _, a, _):
        async with registered(process, C):
            await until_subscribed(server, A, B, C)
        assert await a.ask(a.offer(C)) == {**a.offer(C), 'error': unknown(C)}
        process.kill()
        await until_subscribed(server, A)  # NATS itself has to notice first
        assert await a.ask(a.offer(B)) == {**a.offer(B), 'error': unknown(B)}
        await hears_only(a)


async def test_a_full_backlog_on_another_relay_is_reported_to_the_sender(bus):
    async with two_clients(bus) as (one, _, a, b):
        b.stall()
        offer = a.offer(B, description='x' * 2**19)
        while not one.refusal_counts['backlog']:
            await a.say(offer)
            await until_handled(a)
            await until(lambda: is_idle(one))
        await hears_only(a, sent_back(offer, 'backlog'))
        b.websocket.transport.abort()


USERS = ['a', 'a.b', 'a b', '*', '>', 'a.*', '-', '', '61', 'J\u00fcrgen', '\u65e5\u672c']
USERS += ['x' * 60]


async def test_users_are_kept_apart_across_relays(bus):
    async with two_relays(bus) as (one, other):
        # Set here, because a file of tokens allows fewer names.
        one.tokens = other.tokens = {relay._hash(str(n)): user for n, user in enumerate(USERS)}
        users = range(len(USERS))
        async with (
            all_of(registered(one, A, f'{n}', **bearer(n)) for n in users) as near,
            all_of(registered(other, B, f'{n}', **bearer(n)) for n in users) as far,
        ):
            for a, b in zip(near, far):
                await a.say(a.offer(B))
                await b.say(b.offer(A))
            for a, b in zip(near, far):
                await hears_only(a, b.offer(A))
                await hears_only(b, a.offer(B))


def clocks(**functions):
    """Return a stand-in for the time module, with some functions replaced."""
    return SimpleNamespace(**{**vars(time), **functions})


@each('ahead', {'': 0, 'clock ahead': HOUR, 'clock behind': -HOUR})
@each('generation, code', ('server', 1001), ('relay', 4004))
async def test_a_registration_displaces_the_one_on_another_relay(
    bus, monkeypatch, generation, code, ahead
):
    async with two_relays(bus) as (one, other), registered(one, B) as peer:
        with monkeypatch.context() as patch:
            # A second ago, because claims do not age on their way.
            wall, monotonic = lambda: time.time_ns() + ahead, lambda: time.monotonic() - 1
            patch.setattr(relay, 'time', clocks(time_ns=wall, monotonic=monotonic))
            old = Peer(await open_websocket(other.url), A, 'old', generation)
            assert await old.ask(old.registration()) == old.response()
        await settled(other)
        async with registered(one, A) as new, registered(other, C) as third:
            close = await old.close_frame()
            assert (close.code, close.reason) == (code, relay.DISPLACED)
            await settled(one, other)
            assert holder(one, A) and not holder(other, A)
            await exchange(third, new)
            await exchange(peer, new)
            assert one.counts['displaced_registrations'] == 0


async def race(one, other, a, uuids):
    """Register UUIDs with two relays at the same time; see that one registration of each stays."""

    def have_one_holder():
        return all(bool(holder(one, uuid)) != bool(holder(other, uuid)) for uuid in uuids)

    places = [*itertools.product((one, other), uuids)]
    async with all_of(connected(server) for server, _ in places) as peers:
        racers = dict(zip(places, peers))
        for (_, uuid), racer in racers.items():
            racer.uuid = uuid
            await racer.say(racer.registration())
        for racer in peers:
            assert await racer.hear() == racer.response()
        await until(have_one_holder)
        await settled(one, other)
        assert have_one_holder()
        for uuid in uuids:
            await a.say(a.offer(uuid))
            assert await racers[one if holder(one, uuid) else other, uuid].hear() == a.offer(uuid)
        await hears_only(a)


@each('servers, count', (1, 200), (2, 20))
async def test_of_two_simultaneous_registrations_of_a_uuid_one_stays(servers, count, nats_server):
    urls = [server.url for server in run_cluster(nats_server, servers)]
    async with two_clients(urls[0], urls[-1]) as (one, other, a, b):
        # The servers may not know each other yet.
        await until_connected(a, b)
        await race(one, other, a, [UUID(int=n) for n in range(1000, 1000 + count)])


@each('delay', 0, 0.03)
async def test_messages_between_relays_keep_their_order_and_hold_up_no_others(delay, nats_server):
    # More than fits into a message to NATS waits there.
    server = nats_server('max_payload: 10000')
    async with Link(server.port, delay) as link, two_clients(link.url, server.url) as clients:
        one, _, a, b = clients
        async with registered(one, C) as near:
            await until_connected(a, b)
            for offers in zip(*(numbered_offers(a, uuid, 200) for uuid in (B, C))):
                await say_all(a, offers)
            await hears_only(near, *numbered_offers(a, C, 200))
            await hears_only(b, *numbered_offers(a, B, 200))
            await say_all(b, numbered_offers(b, A, 100))
            await hears_only(a, *numbered_offers(b, A, 100))
            await hears_only(b)


async def test_messages_to_a_peer_that_has_just_registered_arrive(bus):
    async with two_relays(bus) as (one, other), registered(one, A) as a:
        for number in range(1, 20):
            async with registered(other, UUID(int=number << 32)) as b:
                await say_all(a, numbered_offers(a, b.uuid, 10))
                await hears_only(b, *numbered_offers(a, b.uuid, 10))
        await hears_only(a)


@contextlib.asynccontextmanager
async def lost_nats(server, strike):
    """Strike the NATS server of two relays and three clients; see what works without it."""
    clients = two_clients(server.url, NATS_REQUEST_TIMEOUT=0.2)
    async with clients as (one, other, a, b), registered(one, C) as near:
        await exchange(a, b)
        # A message whose verdict is lost would come back although it has arrived.
        await settled(one, other)
        await until(lambda: samples(one)['relay_nats_round_trip_seconds'] > 0)
        assert samples(one)['relay_nats_connected'] == 1
        returned = sent_back(a.offer(B), 'disconnected')
        strike(server)
        # Nobody has noticed yet.
        assert await a.ask(a.offer(B)) == returned
        await until(lambda: not samples(one)['relay_nats_connected'])
        with pytest.MonkeyPatch.context() as patch, moves(one, refused('disconnected'), 2):
            # No time passes now before a message comes back.
            patch.setattr(relay, 'NATS_REQUEST_TIMEOUT', 60)
            for _ in range(2):
                await exchange(a, near)
                assert await a.ask(a.offer(B)) == returned
        yield one, other, a, b, near


@each('strike, late', (Program.kill, 0), (Program.freeze, 1))
async def test_local_peers_are_reached_without_nats_and_all_when_it_is_back(
    strike, late, nats_server, log, quick
):
    server, (left, newcomer) = nats_server(), (UUID(int=8), UUID(int=9))
    async with lost_nats(server, strike) as (one, other, a, b, near):
        async with registered(one, left) as peer:
            await exchange(a, peer)
        await until(lambda: any(line.endswith(LOST) for line in log('NATS: ')))
        async with registered(other, newcomer) as peer:
            server.recover()
            await until(lambda: one.backplane.connected and other.backplane.connected)
            await settled(one, other)
            # The message that came back may arrive after all.
            assert len(await before_mark(a, b)) <= late
            await exchange(a, b)
            await exchange(a, peer)
        await until_subscribed(server, A, B, C)
        assert await a.ask(a.offer(left)) == sent_back(a.offer(left), 'unknown_peer')
        for peer in (a, b, near):
            await hears_only(peer)
    assert all('by the client with 1000' in line for line in log('Unregistered'))
    assert len(log('NATS: ')) <= 8


async def test_a_relay_serves_before_nats_is_there(nats_server, log, quick):
    server = nats_server(started=False)
    async with two_relays(server.url, wait=False) as (one, other):
        async with registered(one, A) as a, registered(one, C) as near:
            async with registered(other, B) as b, registered(other, A) as later:
                await exchange(a, near)
                await exchange(later, b)
                assert await a.ask(a.offer(B)) == sent_back(a.offer(B), 'disconnected')
                await until(lambda: len(log('NATS')) == 2)
                server.recover()
                # The UUID belongs to the client that registered later.
                assert await a.closed_with() == 1001
                await settled(one, other)
                await exchange(later, near)
                await exchange(near, b)
    assert len(log('Connect call failed')) == 2


async def test_news_of_the_cluster_during_the_first_ping_disconnects_nobody(bus, log, quick):
    def edited(data):
        said.append(data)
        # The first line that NATS said, again, before its answer to the first ping.
        return said[0] + data if said.count(b'PONG\r\n') == 1 == len(said) - 1 else data

    said = []
    async with Link(urlsplit(bus).port, edited=edited) as link:
        async with two_clients(link.url, bus) as (_, _, a, b):
            await exchange(a, b)
    assert log('interrupted while connecting')


async def test_after_a_split_the_later_registration_holds_the_uuid(nats_server, quick):
    first = nats_server()
    async with Link(first.cluster) as link:
        second = nats_server(routes=[link.port])
        clients = two_clients(first.url, second.url, CLAIM_BEATS=2)
        async with clients as (one, other, a, b):
            await until_connected(a, b)
            link.kill()
            while await reaches(a, b):
                pass
            async with registered(other, C) as earlier, registered(one, C) as later:
                assert holder(one, C) and holder(other, C)
                link.recover()
                assert await earlier.closed_with() == 1001
                await until_connected(a, later)
                await until_connected(b, later)


async def test_after_a_frozen_relay_misses_a_message_no_later_one_is_sent_to_it(bus, monkeypatch):
    async def counted(*args, **options):
        requests.append(args)
        return await request(*args, **options)

    requests, request = [], nats.NATS.request
    async with client_of_a_process(bus, NATS_REQUEST_TIMEOUT=0.5) as (process, one, a, b):
        process.freeze()
        monkeypatch.setattr('nats.NATS.request', counted)
        for offer in numbered_offers(a, B, 20):
            await a.say(offer)
            await until_handled(a)
        await exchange(a, a)
        assert not is_idle(one)
        for offer in numbered_offers(a, B, 20):
            assert await a.hear() == sent_back(offer, 'disconnected')
        # All have waited for the first alone, which may still arrive.
        assert len(requests) == 1 and is_idle(one)
        process.recover()
        assert len(await before_mark(a, b)) <= 1
        await exchange(a, b)
        await hears_only(a)


@each('strike', None, Program.kill, Program.freeze)
async def test_a_relay_that_stops_delivers_what_is_in_flight(strike, nats_server):
    server, constants = nats_server(), {}
    if strike:  # only the first of these ends the wait for an answer
        constants = {'DRAIN_TIMEOUT': 0.2, 'NATS_HEARTBEAT': 0.1, 'NATS_REQUEST_TIMEOUT': 60}
    async with Link(server.port, delay=0.02) as slow:
        async with client_of_a_process(slow.url, constants) as (process, _, a, b):
            if strike:
                strike(server)
            # The relay would not read from a client that does not read its errors.
            closing = asyncio.ensure_future(b.close_frame())
            await say_all(b, numbered_offers(b, A, 100))
            await until_handled(b)
            process.child.terminate()
            await asyncio.wait_for(process.ends(), 4)
            assert (await closing).code == 1001
            if not strike:
                await hears_only(a, *numbered_offers(b, A, 100))
                assert b.last_words == []
            assert not re.search('ERROR|Traceback', process.log.read_text())


async def test_each_message_to_a_relay_that_stops_arrives_or_comes_back(bus):
    async with client_of_a_process(bus) as (process, _, a, b):
        offers = numbered_offers(a, B, 200)
        await say_all(a, offers[:50])
        process.child.terminate()
        await say_all(a, offers[50:])
        await b.close_frame()
        arrived = [json.loads(text) for text in b.last_words]
        assert arrived == offers[: len(arrived)]
        await hears_only(a, *(sent_back(x, 'unknown_peer') for x in offers[len(arrived) :]))
        await process.ends()


async def test_of_three_nats_servers_one_may_be_killed(nats_server, log, quick):
    servers = run_cluster(nats_server, 3)
    async with two_relays(*(server.url for server in servers)) as (one, other):
        async with registered(one, B) as b, registered(other, C) as c:
            await until_connected(b, c)
            used = log('NATS is connected')[0]
            next(server for server in servers if f':{server.port}' in used).kill()
            await until(lambda: not one.backplane.connected)
            await until(lambda: one.backplane.connected and other.backplane.connected)
            await until_connected(b, c)
            await hears_only(b)
            await hears_only(c)


async def test_clients_that_leave_leave_nothing_with_nats(nats_server):
    def passing():
        gc.collect()
        return [client for client in kept(relay.Client) if client.name == 'passing']

    server = nats_server()
    async with two_relays(server.url) as (one, other):
        async with registered(one, C) as near, registered(other, C) as newer:
            assert await near.closed_with() == 1001
            reading = asyncio.ensure_future(drain(newer))
            for number in range(30):
                # Messages to earlier ones may arrive: more than a client usually reads ahead.
                async with registered(one, A, 'passing', max_queue=1000) as a:
                    async with registered(other, B, 'passing') as b:
                        await b.say(b.offer(A))
                        await say_all(a, [a.offer(B), a.offer(UUID(int=number + 1))])
                        await end(a, [*LEAVES.values()][number % 2])
                        if number % 3:
                            await newer.say(newer.offer(A))
            await until(lambda: not holder(one, A) and not holder(other, B))
            await settled(one, other)
            reading.cancel()
            # One for the client that is left; for each relay, its claims and its answers.
            await until(lambda: len(tasks_of('_wait_for_msgs')) == 5)
            await until(lambda: len(tasks_of('Backplane')) == 2)
            await until_subscribed(server, C)
            # Only the last client that each relay claimed may be in memory.
            await until(lambda: len(passing()) <= 2)


async def is_refused_by_nats(url, reason, log):
    """See that a relay logs why NATS refuses it, and serves without."""
    async with joined_relay(url, wait=False) as server, registered(server, A) as a:
        await until(lambda: log(reason))
        assert await a.ask(a.offer(B)) == sent_back(a.offer(B), 'disconnected')


async def test_credentials_for_nats_are_in_its_address(nats_server, log, caplog, quick):
    server = nats_server('authorization: {user: relay, password: secret}')
    async with two_clients(server.url.replace('//', '//relay:secret@')) as (_, _, a, b):
        await exchange(a, b)
    refusal = f'NATS: Authorization Violation{LOST}'
    await is_refused_by_nats(server.url.replace('//', '//relay:wr0ng@'), refusal, log)
    assert log('Authorization') == [refusal]
    assert not re.search('secret|wr0ng', ''.join(r.getMessage() for r in caplog.records))


async def test_relays_verify_the_certificate_of_nats(pem, nats_server, log, monkeypatch, quick):
    server = nats_server(f'tls: {{cert_file: "{pem}/cert.pem", key_file: "{pem}/cert.key"}}')
    url = server.url.replace('nats', 'tls')
    await is_refused_by_nats(url, 'certificate verify failed', log)
    monkeypatch.setenv('SSL_CERT_FILE', str(pem / 'cert.pem'))
    async with two_clients(url) as (_, _, a, b):
        await exchange(a, b)


ABSENT = "--nats: No module named 'absent'"


def replace_package(name, code, tmp_path, monkeypatch):
    """Let this process, its forks and new processes import other code by the name of a package."""
    (tmp_path / f'{name}.py').write_text(code)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    for module in [module for module in sys.modules if module.partition('.')[0] == name]:
        monkeypatch.delitem(sys.modules, module)


@needs_nats
@each(
    'nkeys, file, line',
    ('', '/nowhere/x', 'cannot read /nowhere/x: No such file or directory'),
    ('', os.devnull, f'{os.devnull} holds no credentials for NATS'),
    ('import absent', os.devnull, f"{ABSENT}; try: pip install 'nats-py[nkeys]'"),
)
def test_credentials_that_cannot_be_used_are_one_line(nkeys, file, line, tmp_path, monkeypatch):
    replace_package('nkeys', nkeys, tmp_path, monkeypatch)
    options = '--port', '0', '--nats', 'nats://127.0.0.1', '--nats-creds', file
    assert fails(*options) == f'relay.py: {line}\n'


def test_without_nats_py_the_option_is_one_line(tmp_path, monkeypatch):
    replace_package('nats', 'import absent', tmp_path, monkeypatch)
    line = fails('--port', '0', '--nats', 'nats://127.0.0.1')
    assert line == f'relay.py: {ABSENT}; try: pip install nats-py\n'


async def test_without_the_option_nothing_of_nats_is_imported(tmp_path, monkeypatch):
    replace_package('nats', 'import absent', tmp_path, monkeypatch)
    async with running() as program:
        program.child.terminate()
        await program.ends()


async def test_a_check_connects_two_clients_across_relays(bus, tokens):
    async with two_relays(bus, tokens=tokens) as (one, other):
        line = await relay.check(*(x.url.replace('//', '//alice:a1@') for x in (one, other)))
        places = f'{one.url} and {other.url}'
        assert re.fullmatch(rf'ok: two clients connected through {places} in \d+\.\d ms', line)
        assert one.counts['registrations'] == other.counts['registrations'] == 1


@each('error, count', ('ConnectionClosedError', 0), ('KeyError', 1))
async def test_a_bug_in_a_task_is_logged_as_an_error_and_a_fault_is_not(
    bus, caplog, monkeypatch, error, count
):
    async def drain(subscription):
        failed.append(error)
        raise {**vars(nats.errors), 'KeyError': KeyError}[error]

    failed = []
    monkeypatch.setattr('nats.aio.subscription.Subscription.drain', drain)
    async with joined_relay(bus) as server:
        async with registered(server, A):
            await settled(server)
        await until(lambda: failed)
    gc.collect()
    lines = [r.getMessage() for r in caplog.records if r.levelname == 'ERROR']
    assert lines == ['Internal error while using NATS'] * count


async def test_a_bug_while_sending_leaves_each_message_one_outcome(bus, caplog, monkeypatch):
    async def without_reply(*args):
        await request(*args)

    request = nats.NATS.request
    async with two_clients(bus) as (one, _, a, b):
        await exchange(a, b)
        with monkeypatch.context() as patch:
            patch.setattr('nats.NATS.request', without_reply)
            assert (await a.ask(a.offer(B)))['error'].endswith(f' because {DISCONNECTED}')
        assert await b.hear() == a.offer(B)  # which the relay of A cannot know
        await exchange(a, b)
        await until(lambda: is_idle(one))
    assert 'Internal error while using NATS' in [r.getMessage() for r in caplog.records]


async def test_losing_nats_while_subscribing_is_a_fault(bus, log, monkeypatch, quick):
    async def interrupted(client, *args, **options):
        found = await subscribe(client, *args, **options)
        if not calls:
            await client.close()
        calls.append(args)
        return found

    calls, subscribe = [], nats.NATS.subscribe
    monkeypatch.setattr('nats.NATS.subscribe', interrupted)
    async with joined_relay(bus) as server:
        await until(lambda: server.backplane.round_trip)
        assert log('NATS: ') == [f'NATS: interrupted while connecting{LOST}']


@needs_nats
async def test_writing_to_a_lost_connection_leaves_no_descriptor_registered():
    transport = relay._import_nats(None).aio.transport.TcpTransport()
    with socket.create_server(('127.0.0.1', 0)) as server:
        url = urlsplit('nats://%s:%d' % server.getsockname())
        await transport.connect(url, buffer_size=2**16, connect_timeout=5)
        accepted, _ = server.accept()
        writer = transport._io_writer
        descriptor = writer.get_extra_info('socket').fileno()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
        accepted.close()
        for _ in range(3):  # like nats-py, which has not noticed yet
            transport.writelines([b'x'])
        with pytest.raises(OSError):
            await writer.drain()
            await writer.wait_closed()
    assert not asyncio.get_running_loop().remove_writer(descriptor)


async def test_an_answer_in_flight_when_nats_is_lost_leaves_no_task(
    nats_server, log, monkeypatch, quick
):
    async def respond(message, data):
        answering.set()
        # The library does this where it waits for what it writes.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    server, answering = nats_server(), asyncio.Event()
    monkeypatch.setattr('nats.aio.msg.Msg.respond', respond)
    async with two_clients(server.url) as (_, other, a, _):
        await a.say(a.offer(B))
        await answering.wait()
        server.kill()
        await until(lambda: not other.backplane.connected)
    gc.collect()
    assert tasks_of('_wait_for_msgs') == []


async def test_all_clients_are_reached_after_nats_is_killed_during_claims(
    nats_server, monkeypatch, quick
):
    async def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 30:
            server.kill()
            server.recover()
            # The relay is busy until NATS has long been there again.
            time.sleep(0.2)
        return await subscribe(*args, **options)

    server, calls, uuids = nats_server(started=False), [], [UUID(int=n) for n in range(1000, 1060)]
    subscribe = nats.NATS.subscribe
    monkeypatch.setattr('nats.NATS.subscribe', interrupted)
    async with two_relays(server.url, wait=False) as (one, other), registered(one, A) as a:
        async with all_of(registered(other, uuid) for uuid in uuids) as peers:
            server.recover()
            await until(lambda: len(calls) > 30 + 60)
            await until(lambda: one.backplane.connected and other.backplane.connected)
            await settled(one, other)
            for peer in peers:
                await a.say(a.offer(peer.uuid))
                assert await peer.hear() == a.offer(peer.uuid)
            await until_subscribed(server, A, *uuids)


async def test_a_relay_whose_port_is_taken_leaves_nats_before_it_ends(bus):
    with pytest.raises(relay.StartError, match='Address already in use'):
        await relay.serve('127.0.0.1', urlsplit(bus).port, nats=[bus])
    # asyncio.run would cancel them only once, which nats-py may ignore.
    assert not tasks_of('Backplane')


async def test_work_cancelled_before_it_starts_leaves_no_coroutine(bus):
    async with joined_relay(bus) as server:
        await settled(server)
        server.backplane._start(server.backplane._subscribe_and_claim, [])
        for task in server.backplane.tasks:
            task.cancel()
        await until(lambda: not server.backplane.tasks)
        gc.collect()  # a warning would fail the test


@each('how', 'reset', 'killed')
async def test_a_lost_connection_to_nats_leaves_no_task(how, nats_server, log, monkeypatch, quick):
    async def drain(transport):
        if lost:
            transport._io_writer.transport.abort()
            raise ConnectionResetError

    async def flush_pending(client, *args, **options):
        await flush(client, *args, **options)
        if client.is_closed:  # something is still to be written when it closes
            client._pending_data_size = 1

    lost, flush, server = [], nats.NATS._flush_pending, nats_server()
    monkeypatch.setattr('nats.aio.transport.TcpTransport.drain', drain)
    monkeypatch.setattr('nats.NATS._flush_pending', flush_pending)
    async with Link(server.port) as link, joined_relay(link.url) as one:
        async with all_of(registered(one, UUID(int=n + 1)) for n in range(50)):
            await settled(one)
            tasks = tasks_of('_wait_for_msgs')
            assert len(tasks) >= 51
            lost.append(how)
            if how == 'killed':
                server.kill()
            link.kill()
            await asyncio.wait(tasks)
            lost.clear()
            link.recover()
            if how == 'reset':
                await until(lambda: one.backplane.connected)
    del tasks
    gc.collect()
    assert tasks_of('_wait_for_msgs') == []


@contextlib.asynccontextmanager
async def another_program(url, *replies):
    """Hold the UUID B like another relay. Yields a connection to NATS and what arrives for B."""
    replies = itertools.cycle(replies or [''])

    async def on_request(message):
        arrived.append(json.loads(message.data))
        await message.respond(next(replies).encode())

    arrived, client = [], await nats.connect(url)
    await client.subscribe(f'relay.client.-.{B}', 'relays', on_request)
    await client.flush()
    yield client, arrived
    await client.close()


async def test_each_message_goes_to_only_one_of_two_holders(bus):
    async with two_clients(bus) as (one, other, a, b), another_program(bus) as (_, arrived):
        await settled(other)
        offers = numbered_offers(a, B, 100)
        for offer in offers:
            await a.say(offer)
            await until_handled(a)
            await until(lambda: is_idle(one))
        await hears_only(a)
        arrived += await before_mark(b, b)
        assert sorted(arrived, key=lambda message: int(message['description'])) == offers


@each('reply', 'sold_out', 'backlog,backlog', '{"verdict": null}', '\x00')
async def test_a_verdict_of_a_newer_relay_sends_the_message_back(bus, log, reply):
    async with another_program(bus, reply), joined_relay(bus) as one, registered(one, A) as a:
        for _ in range(2):
            assert await a.ask(a.offer(B)) == sent_back(a.offer(B), 'disconnected')
    assert log('verdict') == ['NATS: another relay gave a verdict not known here']


async def test_a_message_to_a_client_that_has_just_moved_is_sent_again(bus):
    async with another_program(bus, 'unknown_peer', '') as (_, arrived):
        async with joined_relay(bus) as one, registered(one, A) as a:
            await a.say(a.offer(B))
            await until(lambda: len(arrived) == 2 and is_idle(one))
            assert arrived == 2 * [a.offer(B)]
            await hears_only(a)


async def test_claims_of_another_version_are_ignored_with_one_warning(bus, log):
    async def publish(**batch):
        additional = 'f', 0, 'x', 'an additional item'
        batch['claims'] = [[f'relay.client.-.{A}', time.time_ns() + HOUR, *additional]]
        await client.publish('relay.claims', json.dumps(batch).encode())
        await client.flush()
        await settled(one)

    async with joined_relay(bus) as one, registered(one, A) as a:
        async with another_program(bus) as (client, _):
            await settled(one)
            for _ in range(2):
                await publish(version=2)
            await exchange(a, a)
            assert log('version') == [
                'NATS: another relay makes claims of a version not known here'
            ]
            await publish(version=1, additional=None)
            assert await a.closed_with() == 1001


async def test_a_uuid_that_clients_of_two_relays_fight_over_is_named_once(bus, log):
    async with two_relays(bus) as servers, contextlib.AsyncExitStack() as stack:
        for number in range(10):
            await stack.enter_async_context(registered(servers[number % 2], A))
            await settled(*servers)
    place, advice = r'127\.0\.0\.1:\d+', 'give one of them a new UUID'
    pattern = rf'UUID {A} .* by {place} and {place} \(on another relay\); .*{advice}'
    # Each relay counts by itself.
    assert len(log('again and again')) == 2
    assert all(re.fullmatch(pattern, line) for line in log('again and again'))


async def test_a_message_sent_while_a_relay_leaves_nats_comes_back(bus):
    async with two_clients(bus) as (one, _, a, _):
        closing = asyncio.ensure_future(one.backplane.close())
        while not one.backplane.closed:
            await asyncio.sleep(0)  # it must be seen at once
        text = json.dumps(a.offer(B))
        sent = one.backplane.forward(holder(one, A), decode(text), text.encode())
        assert sent == 'disconnected'
        await closing


async def test_the_content_of_a_message_in_flight_is_counted_besides_its_text(bus):
    async with joined_relay(bus) as server, registered(server, A) as a:
        # Four bytes for each character, because of the last.
        text = json.dumps(a.offer(B, description='x' * 10**5 + '\U0001f600'))
        server.backplane.forward(holder(server, A), decode(text), text.encode())
        assert server.backplane.in_flight_bytes > 5 * 10**5
        assert (await a.hear())['error'] == unknown(B)
        assert server.backplane.in_flight_bytes == 0


@each('limit, kind', ('MAX_IN_FLIGHT', 'disconnected'), ('MAX_BACKLOG', 'backlog'))
async def test_messages_in_flight_are_limited(bus, limit, kind):
    limits = {limit: 100_000, 'NATS_REQUEST_TIMEOUT': 60}
    async with client_of_a_process(bus, **limits) as (process, one, a, b), registered(one, C) as c:
        text = json.dumps(a.offer(B, description='x' * 1000))
        size = len(text) + relay.MESSAGE_COST
        if limit == 'MAX_IN_FLIGHT':
            size += sum(map(sys.getsizeof, vars(decode(text)).values()))
        rooms = {a: 100_000 // size, c: 0}
        process.freeze()
        for sender, room in rooms.items():
            offer = sender.offer(B, description='x' * 1000)
            await say_all(sender, [offer] * 100)
            await hears_only(sender, *[sent_back(offer, kind)] * (100 - room))
        with moves(one, 'relay_remote_messages_total', sum(rooms.values())):
            process.recover()
            await until(lambda: is_idle(one))
        b.websocket.transport.abort()  # it has more unread messages than it would read


async def test_an_upgrade_that_takes_too_long_sends_messages_back(bus, monkeypatch):
    async with two_clients(bus, NATS_REQUEST_TIMEOUT=0.2) as (_, other, a, b):
        await exchange(a, b)
        await other.backplane.close(upgrading=True)
        assert await a.ask(a.offer(B)) == sent_back(a.offer(B), 'disconnected')
        later = clocks(monotonic=lambda: time.monotonic() + relay.UPGRADE_TIMEOUT)
        monkeypatch.setattr(relay, 'time', later)
        assert await a.ask(a.offer(B)) == sent_back(a.offer(B), 'unknown_peer')
        await hears_only(b)


async def test_a_task_that_ignores_its_cancellation_does_not_keep_a_relay_from_stopping(bus):
    async def ignore():
        while not stopped:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    stopped = []
    async with joined_relay(bus, NATS_HEARTBEAT=0.02, DRAIN_TIMEOUT=0.02) as server:
        task = asyncio.ensure_future(ignore())
        server.backplane.tasks.add(task)
        try:
            await server.backplane.close()
            assert not task.done()
        finally:
            stopped.append(task.cancel())


# ------------------------------------------------------------------------------- Checker


class Attempt:
    """A client's attempt to register: a connection, and what happened to it."""

    def __init__(self, uuid, place):
        self.uuid, self.place, self.began = uuid, place, time.monotonic()
        self.websocket = self.registered = self.ended = None

    @property
    def alive(self):
        return self.registered is not None and self.ended is None


class Checker:
    """Relays, NATS servers and clients that exchange numbered messages while things happen.

    It sees only what clients see, and the logs: one outcome for each message, in order; one
    holder of each UUID, the one that registered last; nobody dropped without a reason; no ERROR.
    """

    def __init__(self, seed, faults):
        self.random, self.faults = random.Random(seed), faults
        self.servers, self.relays, self.links = [], [], []
        self.attempts, self.problems, self.ongoing = [], [], {}
        self.holders = {UUID(int=n): None for n in range(1, 13)}  # the last attempt, by UUID
        self.messages, self.outcomes = [], {}  # (sender, UUID, time); reasons or None, by number
        self.arrivals = []  # (attempt, number), in order
        self.counts = Counter()

    async def wait_for(self, condition, patience):
        end = time.monotonic() + patience
        while not condition() and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def register(self, uuid, place):
        """Register a UUID with a relay and listen; return None if that does not work."""
        attempt, before = Attempt(uuid, place), self.holders.get(uuid)
        try:
            attempt.websocket = await open_websocket(self.relays[place].url, open_timeout=5)
            # From here on, it may be registered without knowing that.
            self.attempts.append(attempt)
            peer = Peer(attempt.websocket, uuid)
            answer = await asyncio.wait_for(peer.ask(peer.registration()), 10)
        except (OSError, EOFError, asyncio.TimeoutError, WebSocketException):
            if attempt.websocket is not None:
                attempt.websocket.transport.abort()
            attempt.ended = time.monotonic()
            return None
        assert answer == peer.response(), answer
        attempt.registered = time.monotonic()
        self.holders[uuid] = attempt
        self.counts['takeovers'] += bool(before and before.alive)
        attempt.listening = asyncio.ensure_future(self.listen(attempt))
        return attempt

    async def register_at_last(self, uuid, place=0):
        """Register a UUID with a relay that may still be starting."""
        while not (attempt := await self.register(uuid, place)):
            await asyncio.sleep(0.05)
        return attempt

    async def listen(self, attempt):
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = json.loads(await attempt.websocket.recv())
                number, error = int(message['description']), message['error']
                reason = error and error.partition('because ')[2]
                self.outcomes.setdefault(number, []).append(reason)
                if not error:
                    self.arrivals.append((attempt, number))
        attempt.ended = time.monotonic()

    async def send(self, attempt, uuid):
        number = len(self.messages)
        self.messages.append((attempt, uuid, time.monotonic()))
        with contextlib.suppress(ConnectionClosed):
            peer = Peer(attempt.websocket, attempt.uuid)
            await peer.say(peer.offer(uuid, description=str(number)))
        return number

    async def talk(self):
        while True:
            living = [attempt for attempt in self.holders.values() if attempt and attempt.alive]
            if living:
                sender, uuid = self.random.choice(living), self.random.choice([*self.holders])
                for _ in range(self.random.choice((1, 1, 1, 5, 20))):
                    await self.send(sender, uuid)
            await asyncio.sleep(self.random.uniform(0, 0.01))

    def begin(self, key, work):
        """Begin a task, unless the last one of this key is not done; return it."""
        if key not in self.ongoing or self.ongoing[key].done():
            self.ongoing[key] = asyncio.ensure_future(work())
            return self.ongoing[key]

    async def take_over(self):
        """Register random UUIDs with random relays, one registration of each at a time."""
        while True:
            uuid = self.random.choice([*self.holders])
            place = self.random.randrange(len(self.relays))
            self.begin(uuid, functools.partial(self.register, uuid, place))
            await asyncio.sleep(self.random.uniform(0, 0.03))

    async def harm(self):
        """Kill and freeze things, several at a time."""
        while True:
            thing = self.random.choice(self.random.choice([self.relays, self.servers, self.links]))
            seconds = self.random.choice([0.1, 0.5] if self.quick else [0.1, 0.5, 1, 3])
            strike = self.random.choice([thing.kill, thing.freeze])

            async def harm(thing=thing, strike=strike, seconds=seconds):
                strike()
                await asyncio.sleep(seconds)
                thing.recover()

            if harming := self.begin(thing, harm):
                self.counts['faults'] += 1
                await asyncio.wait({harming}, timeout=0.7)

    async def upgrade(self):
        """Upgrade each relay, and the first one again."""
        for process in [*self.relays, self.relays[0]]:
            await process.signal(signal.SIGUSR2, 'Upgraded ')
            self.counts['upgrades'] += 1

    async def run(self, seconds, *happenings):
        """Let things happen for so long at most, then see that all is well; return figures."""
        self.quick = seconds < 5
        for uuid in self.holders:
            await self.register(uuid, self.random.randrange(len(self.relays)))
        tasks = [asyncio.ensure_future(work()) for work in (self.talk, *happenings)]
        done, waiting = await asyncio.wait(
            tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        for task in waiting:
            task.cancel()
            await asyncio.wait({task})
        for task in done:
            task.result()
        await asyncio.gather(*self.ongoing.values())
        await self.look_at_holders()
        await self.look_at_messages()
        self.look_at_ends()
        for process in self.relays:
            text = process.log.read_text()
            if found := re.search('ERROR|Traceback|destroyed', text):
                self.problems.append(text[max(found.start() - 200, 0) :][:2500])
        return {**self.counts, 'messages': len(self.messages)}

    async def look_at_holders(self):
        """See that each UUID is reached from each relay, where it registered last."""
        for uuid in [uuid for uuid, a in self.holders.items() if not (a and a.alive)]:
            await asyncio.wait_for(self.register_at_last(uuid), 30)
        joining = [self.register_at_last(uuid4(), place) for place in range(len(self.relays))]
        probes = await asyncio.wait_for(asyncio.gather(*joining), 30)
        # Relays claim once a minute, in case NATS servers lost each other for a time.
        patience = 20 if len(self.servers) == 1 else 80
        end = time.monotonic() + patience
        missing = set(itertools.product(probes, self.holders))
        while missing and time.monotonic() < end:
            sent = {await self.send(*pair): pair for pair in missing}
            await self.wait_for(lambda sent=sent: sent.keys() <= self.outcomes.keys(), 4)
            missing -= {pair for n, pair in sent.items() if self.outcomes.get(n) == [None]}
        self.problems += [f'{uuid} is not reached from relay {a.place}' for a, uuid in missing]

        def extra():
            return [a for a in self.attempts if a.alive and self.holders[a.uuid] is not a]

        await self.wait_for(lambda: not extra(), patience)
        self.problems += [f'{attempt.uuid} is still held at an older place' for attempt in extra()]

    async def look_at_messages(self):
        """See that each message has one outcome, or a reason to have none, or another."""
        await self.wait_for(lambda: not self.without_outcome(), 6)
        self.problems += [f'message {number}: no outcome' for number in self.without_outcome()]
        last = {}
        for attempt, number in self.arrivals:
            pair = attempt, self.messages[number][0]
            # A message that came back as disconnected may still arrive, at any time.
            if number <= last.get(pair, -1) and len(self.outcomes[number]) == 1:
                self.problems.append(f'message {number} out of order')
            last[pair] = number
        for number, reasons in self.outcomes.items():
            self.counts.update(reason or 'arrived' for reason in reasons)
            if self.faults and sorted(map(str, reasons)) == ['None', DISCONNECTED]:
                self.counts['arrived and came back'] += 1
            elif len(reasons) != 1:
                self.problems.append(f'message {number}: {reasons}')

    def without_outcome(self):
        """Return the messages without an outcome that somebody should have heard."""
        ends = [(a.uuid, a.ended) for a in self.attempts if a.ended and self.faults]
        return [
            number
            for number, (sender, uuid, sent) in enumerate(self.messages)
            if number not in self.outcomes
            and sender.ended is None
            and not any(uuid == left and ended > sent for left, ended in ends)
        ]

    def look_at_ends(self):
        """See that each connection that ended was displaced, or its relay killed."""
        for attempt in self.attempts:
            others = [a for a in self.attempts if a.uuid == attempt.uuid and a is not attempt]
            later = any(other.began >= attempt.began for other in others)
            killed = any(death > attempt.began for death in self.relays[attempt.place].deaths)
            if attempt.registered and attempt.ended and not later and not killed:
                self.problems.append(f'{attempt.uuid} was dropped: {attempt.websocket.close_code}')


async def check_relays(seed, seconds, relays=2, servers=1, happenings=('take_over', 'harm')):
    """Check relays under random faults; return figures. Raises AssertionError with problems."""
    async with contextlib.AsyncExitStack() as stack:
        checker = Checker(seed, 'harm' in happenings)
        checker.servers = run_cluster(functools.partial(run_nats, stack), servers)
        for _ in range(relays):
            links = [await stack.enter_async_context(Link(s.port)) for s in checker.servers]
            process = relay_process(*(link.url for link in links))
            checker.relays.append(await stack.enter_async_context(process))
            checker.links += links
        try:
            works = [getattr(checker, name) for name in happenings]
            figures = await checker.run(seconds, *works)
        finally:
            for attempt in checker.attempts:
                attempt.websocket.transport.abort()
    assert not checker.problems, f'seed {seed}: {checker.problems[:20]} of {len(checker.problems)}'
    return figures


@each('relays', 2, 3)
def test_relays_recover_from_random_faults(relays, nats_server):
    figures = asyncio.run(check_relays(1, 1.5, relays))
    assert figures['messages'] > 100 and figures['faults']


def test_each_message_has_one_outcome_during_takeovers(nats_server):
    figures = asyncio.run(check_relays(1, 1, relays=3, servers=3, happenings=['take_over']))
    assert figures['messages'] > 100 and figures['takeovers']


@on_linux
def test_each_message_arrives_or_comes_back_during_upgrades(nats_server):
    figures = asyncio.run(check_relays(1, 60, happenings=['upgrade', *3 * ['talk']]))
    assert figures['upgrades'] == 3 and figures['messages'] > 100
    # About 240 messages wait for a peer whose relay is being upgraded; more are refused.
    allowed = {f'{relay.FORWARD_ERRORS[kind]}.' for kind in ('disconnected', 'backlog')}
    assert figures.keys() <= {'upgrades', 'messages', 'takeovers', 'arrived', *allowed}


async def test_a_shared_port_stays_shared(upgradable, bus):
    async with upgradable('--nats', bus) as one:
        async with upgradable('--nats', bus, '--port', one.ports[0]) as other:
            assert one.ports == other.ports
            sockets = one.listening(), other.listening()
            await one.upgrade()
            await other.upgrade()
            assert (one.listening(), other.listening()) == sockets
            async with all_of(registered(one, uuid4()) for _ in range(20)) as peers:
                for pair in zip(peers, peers[1:]):
                    await until_connected(*pair)
                for process in (one, other):
                    process.child.terminate()
                for peer in peers:
                    await peer.closed_with()
                for process in (one, other):
                    await process.ends()
            counts = [len(process.lines('Registered')) for process in (one, other)]
            assert min(counts) > 0 and sum(counts) == 20
            assert not one.lines('"') + other.lines('"')


async def test_a_client_that_registers_elsewhere_during_the_upgrade_keeps_its_uuid(
    upgradable, bus
):
    async with upgradable('--nats', bus) as program:
        await program.logs('NATS is connected')
        async with joined_relay(bus) as server, registered(server, B) as peer:
            async with registered(program, A) as old:
                async with program.gap(RESTORING):
                    new = await open_websocket(server.url)
                    new = Peer(new, A)
                    assert await new.ask(new.registration()) == new.response()
                assert await old.closed_with() == 1001
                await exchange(peer, new)
                await new.websocket.close()


# ------------------------------------------------------------------------------- Files


def functions(source):
    """Return the lines of each function, without its docstring, by its qualified name."""
    sizes = {}

    def visit(node, path):
        for child in ast.iter_child_nodes(node):
            name = path
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f'{path}.{child.name}'
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = child.body[0]
                doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(child) else 0
                sizes[name] = child.end_lineno - child.lineno + 1 - doc
            visit(child, name)

    visit(ast.parse(source), '')
    return sizes


def test_relay_py_stays_short_enough_to_be_read_before_it_is_run():
    source = (HERE / 'relay.py').read_text()
    sizes = functions(source)
    assert source.count('\n') <= 2690
    assert statistics.median(sizes.values()) <= 10
    assert max(size for name, size in sizes.items() if name != '._parser') <= 30


def test_the_inline_metadata_asks_for_what_requirements_txt_asks_for():
    block = re.search(
        r'(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$', (HERE / 'relay.py').read_text()
    )[1]
    (wanted,) = json.loads(re.search(r'dependencies = (.*)', block)[1])
    assert [wanted, 'pytest'] == (HERE / 'requirements.txt').read_text().split()
    assert 'requires-python = ">=3.9"' in block


def test_older_versions_of_python_read_on_to_the_line_that_refuses_them():
    ast.parse((HERE / 'relay.py').read_text(), feature_version=(3, 6))


def test_nothing_is_imported_that_no_option_asks_for():
    program = 'import sys, relay; print(*(name for name in sys.modules))'
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=HERE, capture_output=True, text=True
    )
    modules = set(done.stdout.split())
    assert 'websockets.server' in modules
    assert not modules & {'websockets.asyncio.server', 'websockets.asyncio.client', 'nats'}


def test_the_readme_names_every_option():
    readme = (HERE / 'README.md').read_text()
    options = re.findall(r"add\('(--[a-z-]+)'", (HERE / 'relay.py').read_text())
    assert len(options) >= 7
    assert [option for option in options if f'`{option}' not in readme] == []


@pytest.mark.skipif(not shutil.which('systemd-analyze'), reason='systemd-analyze is not here')
def test_the_unit_is_valid_and_exposes_little(tmp_path):
    unit = HERE / 'relay.service'
    # A copy of it is a template, for several relays on one machine.
    shutil.copy(unit, tmp_path / 'relay@.service')
    for command in (
        ['systemd-analyze', 'verify', unit, tmp_path / 'relay@1.service'],
        ['systemd-analyze', 'security', '--offline=true', '--threshold=12', unit],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ''), done.stdout


# ------------------------------------------------------------------------------- Benchmark


class Talker(asyncio.Protocol):
    """A client that answers each offer of its peer with one of its own.

    It takes the place of websockets' own, once that is registered: what measures has to be quicker
    than what is measured. It looks closer only at what is not, byte for byte, what it expects.
    """

    def __init__(self, websocket, talk):
        self.websocket, self.transport, self.talk = websocket, websocket.transport, talk
        self.protocol, self.message = Protocol(Side.CLIENT, max_size=None), b''
        # It sends nothing compressed, but has offered that as clients do.
        self.protocol.extensions = websocket.protocol.extensions
        # When the offer was sent that is on its way to this client.
        self.uuid, self.sent = uuid4(), None

    def meet(self, peer):
        text = 'x' * self.talk.options.size
        self.peer, peer.offer = peer, PeerConnection(self.uuid, '', peer.uuid, 'offer', text)
        frame = Frame(Opcode.TEXT, encode(peer.offer).encode())
        self.frame, peer.expected = frame.serialize(mask=True), frame.serialize(mask=False)
        self.transport.set_protocol(self)

    def speak(self):
        self.peer.sent = time.perf_counter()
        self.transport.write(self.frame)

    def hear(self, as_sent):
        sent, self.sent = self.sent, None
        if sent and as_sent:
            self.talk.latencies.append(time.perf_counter() - sent)
        else:
            self.talk.errors += 1
        if sent and self.talk.goes_on:
            self.speak()

    def data_received(self, data):
        if data == self.expected:
            return self.hear(True)
        self.protocol.receive_data(data)
        for frame in self.protocol.events_received():
            if frame.opcode not in CTRL_OPCODES:
                self.message += frame.data
                if frame.fin:
                    self.hear(self.is_offer())
        for data in self.protocol.data_to_send():
            self.transport.write(data)

    def is_offer(self):
        message, self.message = self.message, b''
        with contextlib.suppress(UnicodeDecodeError, MessageDecodeError):
            return decode(message.decode()) == self.offer

    def connection_lost(self, error):
        self.protocol.receive_eof()
        self.talk.failure = self.talk.failure or self.protocol.close_exc
        self.websocket.connection_lost(error)

    async def leave(self):
        if not self.transport.is_closing():
            self.transport.set_protocol(self.websocket)
        await self.websocket.close()


async def begin(talk):
    """See which generation the relay speaks, and connect all clients to it."""
    await relay.check(talk.options.url)
    try:
        await relay.exchange(talk.options.url, talk.options.url, talk.generation)
    except ConnectionClosed:
        talk.generation = 'relay'
    limits = {'ping_interval': None, 'close_timeout': relay.CHECK_TIMEOUT / 10}
    answer = ServerResponse(message_type=f'{talk.generation}_response')
    mark(talk)
    while len(talk.clients) < 2 * talk.options.pairs:
        progress(f'{len(talk.clients)} clients are connected')
        websocket = await open_websocket(talk.options.url, **limits)
        talk.clients.append(Talker(websocket, talk))
        request = ServerRegistration('', talk.clients[-1].uuid, f'{talk.generation}_registration')
        await relay.expect(request, websocket, websocket, answer)
    for client in talk.clients:
        if client.websocket.state is not State.OPEN:
            await client.websocket.wait_closed()
            raise client.websocket.protocol.close_exc
    for one, other in zip(talk.clients[::2], talk.clients[1::2]):
        one.meet(other)
        other.meet(one)
    mark(talk)


async def go_on(talk, doing, seconds):
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        progress(f'{doing}, {left:.0f} s left, {len(talk.latencies):,} messages')
        await asyncio.sleep(min(left, 0.5))
        if talk.failure:
            raise talk.failure
    mark(talk)


async def finish(talk):
    """Wait for what is on its way, and count what does not arrive."""
    talk.goes_on = False
    with contextlib.suppress(asyncio.TimeoutError):
        arrived = until(lambda: not any(client.sent for client in talk.clients))
        await asyncio.wait_for(arrived, relay.CHECK_TIMEOUT)
    talk.errors += sum(client.sent is not None for client in talk.clients)


async def measure(options):
    talk = SimpleNamespace(options=options, generation='server', clients=[], marks=[])
    talk.latencies, talk.errors, talk.goes_on, talk.failure = [], 0, True, None
    try:
        await begin(talk)
        for client in talk.clients[::2]:
            client.speak()
        # Caches fill, and buffers grow.
        await go_on(talk, 'warming up', options.seconds / 10)
        talk.latencies.clear()
        await go_on(talk, 'measuring', options.seconds)
        latencies = sorted(talk.latencies)
        await finish(talk)
        return figures(talk, latencies)
    finally:
        progress()
        leaving = (client.leave() for client in talk.clients)
        await asyncio.gather(*leaving, return_exceptions=True)


def progress(text=''):
    """Replace the last line, on a terminal."""
    if sys.stderr.isatty():
        print(f'\r{text}\x1b[K', end='', file=sys.stderr, flush=True)


def mark(talk):
    """Note the time, and the seconds of CPU and the KiB of the process that is watched."""
    cpu, memory = 0, 0
    if talk.options.pid:
        try:
            stat = Path(f'/proc/{talk.options.pid}/stat').read_text().rpartition(')')[2].split()
        except OSError as error:
            raise relay.StartError(f'--pid {talk.options.pid}: {error.strerror}') from error
        cpu = (int(stat[11]) + int(stat[12])) / os.sysconf('SC_CLK_TCK')
        memory = int(stat[21]) * os.sysconf('SC_PAGE_SIZE') / 1024
    talk.marks.append((time.perf_counter(), cpu, memory))


def figures(talk, latencies):
    """Return what the marks and the sorted latencies amount to."""
    alone, full, start, end = talk.marks
    count = len(latencies)
    if not count:
        raise relay.StartError('no message arrived as it was sent')
    found = {name: getattr(talk.options, name) for name in ('pairs', 'seconds', 'size')}
    found['messages_per_second'] = round(count / (end[0] - start[0]))
    for name, index in (('p50', count // 2), ('p99', count * 99 // 100), ('max', -1)):
        found[f'{name}_ms'] = round(1000 * latencies[index], 2)
    if talk.options.pid:
        found['cpu_us_per_message'] = round(1e6 * (end[1] - start[1]) / count, 1)
        found['kib_per_client'] = round((full[2] - alone[2]) / len(talk.clients), 1)
    return {'generation': talk.generation, **found, 'errors': talk.errors}


def options_of(argv):
    parser = argparse.ArgumentParser('test_relay.py', usage=argparse.SUPPRESS)
    parser.description = 'Measure a relay: each of some clients exchanges offers with another.'
    checks = 'instead, check relays of its own over NATS under random faults'
    add, number = parser.add_argument, functools.partial(relay._integer, least=1)
    add('url', metavar='URL', nargs='?', help='of the relay, with a token if it wants one')
    add('--check-relays', action='store_true', help=checks)
    add('--seed', default=1, type=int, metavar='N', help='of a check (%(default)s)')
    add('--relays', default=2, type=number, metavar='N', help='of a check (%(default)s)')
    add('--servers', default=1, type=number, metavar='N', help='of NATS, in a check (%(default)s)')
    add('--no-faults', action='store_true', help='check takeovers alone')
    add('--pairs', default=50, type=number, metavar='N', help='of clients (%(default)s)')
    add('--seconds', default=10, type=float, metavar='S', help='to measure (%(default)s)')
    add('--size', default=1024, type=number, metavar='BYTES', help='of an offer (%(default)s)')
    add('--pid', type=number, help="the relay's process on this host, to see its CPU and memory")
    add('--json', action='store_true', help='print one JSON object')
    options = parser.parse_args(argv)
    if options.url is None and not options.check_relays:
        parser.error('the following arguments are required: URL')
    return options


def main(argv=None):
    """Measure a relay, or check relays; return the exit status."""
    options = options_of(argv)
    logging.disable()  # errors are one line
    if options.check_relays:
        happenings = ['take_over'] if options.no_faults else ['take_over', 'harm']
        size = options.relays, options.servers
        print(asyncio.run(check_relays(options.seed, options.seconds, *size, happenings)))
        return 0
    try:
        found = asyncio.run(measure(options))
    except (relay.StartError, KeyboardInterrupt) as error:
        print(f'test_relay.py: {str(error) or "interrupted"}', file=sys.stderr)
        return 1
    except (OSError, EOFError, WebSocketException, asyncio.TimeoutError) as error:
        print(f'test_relay.py: {ascii(relay.explain(error))[1:-1]}', file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f'{name.replace("_", " "):<20}{value:>10}')
    if found['errors']:
        print(f'test_relay.py: {found["errors"]} messages not heard as sent', file=sys.stderr)
    return 1 if found['errors'] else 0


def measured(url, *options):
    """Run the benchmark as a fork, which may be waited for in a thread."""
    return asyncio.to_thread(forked(main, url, '--pairs', 3, '--seconds', 0.2, *options))


async def test_the_benchmark_measures_a_relay():
    options = '--pairs', '3', '--seconds', '0.2', '--json', '--pid', str(os.getpid())
    async with running_relay() as server:
        command = [sys.executable, HERE / 'test_relay.py', server.url, *options]
        run = functools.partial(
            subprocess.run, command, capture_output=True, text=True, timeout=20
        )
        done = await asyncio.to_thread(run)
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, '')
    assert (found['errors'], found['generation']) == (0, 'server')
    assert found['messages_per_second'] > 0
    assert 0 < found['p50_ms'] <= found['p99_ms'] <= found['max_ms']
    assert found.keys() >= {'cpu_us_per_message', 'kib_per_client'}


async def test_the_benchmark_prints_a_table_and_uses_a_token_and_tls(
    pem, tls, tokens, monkeypatch
):
    monkeypatch.setenv('SSL_CERT_FILE', str(pem / 'cert.pem'))
    async with running_relay(tls, tokens) as server:
        # A message of this size arrives in many pieces.
        url = server.url.replace('wss://', 'wss://alice:a1@')
        status, text, errors = await measured(url, '--size', '500000')
    assert (status, errors) == (0, '')
    assert re.search(r'^messages per second +[1-9]\d*$', text, re.M) and 'cpu' not in text


async def test_the_benchmark_knows_the_relay_of_the_later_generation():
    async with newer_relay() as url:
        status, text, errors = await measured(url, '--json')
    assert (status, errors, json.loads(text)['generation']) == (0, '', 'relay')


async def test_the_benchmark_counts_messages_that_change_on_the_way():
    def changed(text):
        return text.replace('xxx', 'xyx') if next(numbers) % 5 == 0 else text

    numbers = itertools.count(1)
    async with newer_relay(changed) as url:
        status, text, errors = await measured(url, '--json')
    count = json.loads(text)['errors']
    assert count > 0
    assert (status, errors) == (1, f'test_relay.py: {count} messages not heard as sent\n')


def abort_all(server):
    for link in [*server.listener.connections]:
        link.abort()


@each(
    'end, line',
    {
        'Ctrl-C': (lambda server, benchmark: os.kill(benchmark, signal.SIGINT), 'interrupted'),
        'the relay stops': (lambda server, benchmark: server.listener.close(), 'closed: '),
        'the relay is killed': (lambda server, benchmark: abort_all(server), 'closed: '),
    },
)
async def test_a_benchmark_that_ends_early_is_one_line(end, line):
    async with running_relay() as server:
        benchmark = forked(main, server.url, '--pairs', 3)
        # Its six clients register after two of the check and two that look for the generation.
        await until(lambda: server.counts['registrations'] == 2 + 2 + 6)
        end(server, benchmark.child)
        assert one_line(await asyncio.to_thread(benchmark)).startswith(f'test_relay.py: {line}')


async def test_a_benchmark_whose_clients_are_expelled_is_one_line():
    def admit(client, request):
        RelayServer._admit(server, client, request)
        if request.name != 'check':
            server._close(client, 1008, 'not today')

    async with running_relay() as server:
        server._admit = admit
        line = one_line(await measured(server.url))
    assert 'closed: received 1008 (policy violation) not today; ' in line


async def test_a_benchmark_that_cannot_begin_is_one_line():
    line = one_line(await measured('ws://alice:secret@127.0.0.1:1'))
    assert line.startswith('test_relay.py: ws://127.0.0.1:1: [Errno ')
    async with running_relay(max_clients=5) as server:
        assert ': closed: received 1013 ' in one_line(await measured(server.url))
        line = one_line(await measured(server.url, '--pid', 999999999))
        assert '--pid 999999999: No such file' in line


run_coroutines(globals())
if __name__ == '__main__':
    raise SystemExit(main())
