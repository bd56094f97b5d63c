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
import itertools
import json
import logging
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
import threading
import time
import traceback
import urllib.request
import warnings
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


run_async = run_within(8)


@contextlib.asynccontextmanager
async def running_relay(tls=None, tokens=None, max_clients=None, rate=0, **limits):
    """Serve a relay as the command line does; yields it, with its URL as `url`."""
    server = RelayServer(tokens, max_clients, rate)
    if way == 'serve':
        listener = relay.Listener(server, server.process_request, relay.Limits(**limits), tls=tls)
        listening = until_closed(await listener.listen('127.0.0.1', 0))
    else:
        process, where = server.process_request, ('127.0.0.1', 0)
        limits = {'max_size': relay.MAX_MESSAGE, 'compression': None, **limits}
        listening = websockets.asyncio.server.serve(
            server.handler, *where, ssl=tls, process_request=process, **limits
        )
    async with listening as listener:
        port = listener.sockets[0].getsockname()[1]
        server.url = f'{"wss" if tls else "ws"}://127.0.0.1:{port}/'
        server.listener = listener
        yield server


@contextlib.asynccontextmanager
async def until_closed(listener):
    """Close a listener of the relay's own."""
    try:
        yield listener
    finally:
        listener.close()
        await listener.closed.wait()


@pytest.fixture(params=['serve', 'handler'])
def way_of_serving(request, monkeypatch):
    """Run a test with a relay that serves itself, and with one that websockets serves."""
    monkeypatch.setitem(globals(), 'way', request.param)


way = 'serve'
both_ways = pytest.mark.usefixtures('way_of_serving')


class Peer:
    """A client that speaks the protocol in plain JSON."""

    def __init__(self, websocket, uuid=None, name='', generation='server'):
        self.websocket = websocket
        self.uuid, self.name, self.generation = uuid, name, generation
        # What came before the close that a test has waited for.
        self.last_words = []

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
    async with open_websocket(server.url, **options) as websocket:
        yield Peer(websocket)


@contextlib.asynccontextmanager
async def registered(server, uuid, name='laptop', generation='server', **options):
    async with open_websocket(server.url, **options) as websocket:
        peer = Peer(websocket, uuid, name, generation)
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


def stall(peer):
    """Stop reading from the socket, as a client does that hangs or lost its network."""
    peer.websocket.transport.pause_reading()


async def fill_backlog(sender, uuid, letter='x'):
    """Send to a peer until the relay refuses, and return the refusal."""
    message = sender.offer(uuid, description=letter * (2**19 // len(letter.encode())))
    message = json.dumps(message, ensure_ascii=False)
    mark = sender.offer(sender.uuid)
    for _ in range(100):
        await sender.say(message)
        # A refusal arrives before the next message, which the sender sends to itself.
        answer = await sender.ask(mark)
        if answer != mark:
            assert await sender.hear() == mark
            return answer
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

REGISTRATION = json.loads(encode(MESSAGES[0]))
OFFER = json.loads(encode(MESSAGES[4]))


def without(message, key):
    return {k: v for k, v in message.items() if k != key}


# By name: a text that is not a message, and what the answer must say.
MALFORMED = {
    'empty': ('', 'not JSON'),
    'not JSON': ('nope', 'not JSON'),
    'half of it': (json.dumps(OFFER)[:-9], 'not JSON'),
    'a byte order mark': ('\ufeff{}', 'not JSON'),
    'two messages': (json.dumps(OFFER) * 2, 'not JSON'),
    'null': ('null', 'JSON object'),
    'a list': ('[]', 'JSON object'),
    'a number': ('3', 'JSON object'),
    'a string': ('"x"', 'JSON object'),
    'true': ('true', 'JSON object'),
    'an empty object': ('{}', 'message_type'),
    'an unknown type': ('{"message_type": "offer"}', 'message_type'),
    'a type of another type': ('{"message_type": []}', 'message_type'),
    'a key twice': (json.dumps(OFFER)[:-1] + ', "error": "x"}', 'duplicate key'),
    'an inner key twice': (json.dumps(OFFER)[:-1] + ', "x": {"y": 1, "y": 2}}', 'duplicate key'),
    'NaN': (json.dumps({**OFFER, 'x': float('nan')}), 'NaN'),
    'Infinity': (json.dumps({**OFFER, 'x': float('-inf')}), 'Infinity'),
    '60,000 brackets': ('[' * 60_000, 'nested too deep'),
    '60,000 braces': ('{"a":' * 60_000, 'nested too deep'),
    'a long number': (json.dumps(OFFER)[:-1] + f', "x": {"1" * 6000}}}', 'too long'),
    'a long fraction': (json.dumps(OFFER)[:-1] + f', "x": 0.{"1" * 6000}}}', 'too long'),
    'a binary frame': (json.dumps(OFFER).encode(), 'text frame'),
    'an empty binary frame': (b'', 'text frame'),
    'a UUID that is none': (json.dumps({**REGISTRATION, 'uuid': 'x'}), "UUID, not 'x'"),
    'a long UUID': (json.dumps({**REGISTRATION, 'uuid': '\n' * 9999}), 'UUID'),
    **{
        f'{key} missing from a {message["message_type"]}': (json.dumps(without(message, key)), key)
        for message in (REGISTRATION, OFFER)
        for key in message
        if key != 'error'
    },
    **{
        f'{key} as {value} in a {message["message_type"]}': (
            json.dumps({**message, key: value}),
            key,
        )
        for message in (REGISTRATION, OFFER)
        for key in message
        for value in (7, None, True, [], {}, 1.5)
        if (key, value) != ('error', None)
    },
}
malformed = pytest.mark.parametrize('text, reason', MALFORMED.values(), ids=MALFORMED)


@pytest.mark.parametrize('message', MESSAGES, ids=repr)
def test_a_message_is_decoded_as_it_was_encoded(message):
    assert decode(encode(message)) == message


@malformed
def test_an_invalid_message_is_refused_with_its_reason(text, reason):
    with pytest.raises(MessageDecodeError) as caught:
        decode(text)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 600


def zeros(size):
    """Return a text that takes long to decode for its length, and is not a message."""
    return '{"a":[' + '0,' * ((size - 9) // 2) + '0]}'


@pytest.mark.parametrize('start', ['', ' ', f'{{"b":{"1" * 100},"a":[{"1" * 50},'])
def test_a_long_text_of_short_numbers_is_decoded_without_a_check_of_each(start, monkeypatch):
    monkeypatch.setattr(relay, '_strict_decoder', None)
    text = zeros(2**18)
    with pytest.raises(MessageDecodeError, match='message_type'):
        decode(start + (text[6:] if start.strip() else text))


@pytest.mark.parametrize(
    'number', ['1' * 101, '-' + '9' * 101, '0.' + '1' * 101, '1e' + '0' * 101], ids=lambda n: n[:3]
)
@pytest.mark.parametrize('offset', range(10))
def test_a_long_number_is_found_anywhere_in_a_long_text(number, offset):
    text = zeros(2**18)
    place = 2**17 + offset
    place += text[place:].index(',')
    with pytest.raises(MessageDecodeError, match='a number that is too long'):
        decode(text[:place] + ' ' * offset + ',' + number + text[place:])


def test_a_response_may_omit_keys_with_a_default():
    assert decode('{"message_type": "server_response"}') == ServerResponse()


def test_unknown_keys_are_ignored():
    assert decode(json.dumps({**OFFER, 'retries': [3]})) == MESSAGES[4]


def test_a_mutated_message_is_decoded_or_refused_and_nothing_else():
    chance = random.Random(1)
    alphabet = '{}[]",:\\ue0123456789-+.\x00\ud800\u202eNaInfty'
    for _ in range(5000):
        text = list(encode(chance.choice(MESSAGES)))
        for _ in range(chance.randint(1, 8)):
            place = chance.randrange(len(text))
            text[place : place + chance.randint(0, 2)] = chance.choice(alphabet)
        with contextlib.suppress(MessageDecodeError):
            assert isinstance(decode(''.join(text)), relay.Message)


@pytest.mark.parametrize(
    'thing',
    [
        None,
        'text',
        {},
        relay.Message(),
        ServerRegistration('laptop', A, 'server_response'),
        ServerRegistration('laptop', A, []),
        ServerRegistration(object(), A),
        ServerRegistration(float('nan'), A),
    ],
    ids=repr,
)
def test_an_object_that_is_not_a_message_is_an_encode_error(thing):
    with pytest.raises(MessageEncodeError):
        encode(thing)


@both_generations
def test_a_wrong_registration_is_answered_in_the_words_of_its_generation(generation):
    with pytest.raises(MessageDecodeError) as caught:
        decode(json.dumps({'message_type': f'{generation}_registration', 'name': 'laptop'}))
    assert caught.value.response_type == f'{generation}_response'


# ------------------------------------------------------------------------------- Protocol


@both_ways
@both_generations
@run_async
async def test_a_registration_is_answered_in_kind(generation):
    async with running_relay() as server, registered(server, A, generation=generation):
        pass  # registered() compares the whole response


@both_ways
@both_generations
@run_async
async def test_registering_again_on_the_same_socket_changes_nothing(generation):
    async with running_relay() as server, registered(server, A, generation=generation) as peer:
        assert await peer.ask({**peer.registration(), 'name': 'other'}) == peer.response()
        assert holder(server, A).name == 'laptop'


@both_ways
@both_generations
@run_async
async def test_a_second_uuid_on_one_socket_is_refused(generation):
    async with running_relay() as server, registered(server, A, generation=generation) as peer:
        answer = await peer.ask({**peer.registration(), 'uuid': str(B)})
        assert answer == peer.response(answer['message'])
        assert str(A) in answer['message']
        assert list(server._uuid_to_client) == [('', A)]


@both_ways
@pytest.mark.parametrize('generation, code', [('server', 1001), ('relay', 4004)])
@run_async
async def test_a_registration_displaces_the_old_socket(generation, code):
    async with running_relay() as server, registered(server, B) as peer:
        async with registered(server, A, generation=generation) as old:
            async with registered(server, A) as new:
                close = await old.close_frame()
                assert close.code == code
                assert close.reason.startswith('Relay received a registration with the same ID.')
                await exchange(new, peer)


@both_ways
@run_async
async def test_a_displaced_client_sees_its_close_before_the_new_one_is_answered():
    async with running_relay() as server, registered(server, A) as old:
        order = []
        async with connected(server) as new:
            await new.say(old.registration())
            closed = asyncio.ensure_future(old.closed_with())
            closed.add_done_callback(lambda _: order.append('closed'))
            answered = asyncio.ensure_future(new.hear())
            answered.add_done_callback(lambda _: order.append('answered'))
            await asyncio.wait({closed, answered})
        assert order == ['closed', 'answered']


@both_ways
@run_async
async def test_a_dead_socket_does_not_keep_its_uuid_from_the_next():
    async with running_relay() as server, registered(server, B) as peer:
        async with registered(server, A) as old:
            stall(old)
            # The relay gives a dead socket 10 s to close, longer than this test may take.
            async with registered(server, A) as new:
                await exchange(new, peer)
                old.websocket.transport.abort()
                await exchange(new, peer)


@both_ways
@pytest.mark.parametrize('generation, code', [('server', 1001), ('relay', 4004)])
@run_async
async def test_the_last_of_three_clients_to_register_a_uuid_holds_it(
    generation, code, monkeypatch, caplog
):
    monkeypatch.setattr(relay, 'FIGHT', 1)
    async with running_relay() as server, registered(server, A, 'first') as first:
        async with connected(server) as second, connected(server) as third:
            stall(first)
            for peer, name in ((second, 'second'), (third, 'third')):
                peer.uuid, peer.name, peer.generation = A, name, generation
            await second.say(second.registration())
            # The second waits for the first to close when the third arrives.
            await until(lambda: not holder(server, A))
            assert await third.ask(third.registration()) == third.response()
            assert await second.closed_with() == code
            assert holder(server, A).name == 'third'
            await exchange(third, third)
            first.websocket.transport.abort()
    assert f'UUID {A} is registered' in caplog.text and 'UUID None' not in caplog.text


@both_ways
@run_async
async def test_one_client_wins_a_race_for_a_uuid_and_is_reachable():
    async with running_relay() as server, registered(server, B) as peer:
        async with contextlib.AsyncExitStack() as stack:
            racers = [
                Peer(await stack.enter_async_context(open_websocket(server.url)), A)
                for _ in range(20)
            ]
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
@run_async
async def test_a_displaced_client_does_not_displace_in_turn():
    async with (
        running_relay() as server,
        registered(server, A) as old,
        registered(server, A) as new,
    ):
        with contextlib.suppress(ConnectionClosed):
            await old.say(old.registration())
        await old.closed_with()
        assert await new.ask(new.registration()) == new.response()


@both_ways
@run_async
async def test_a_new_registration_survives_the_close_of_the_old_connection():
    async with running_relay() as server, registered(server, B) as peer:
        async with registered(server, A) as old, registered(server, A) as new:
            await old.closed_with()
            await until(lambda: len(server._websocket_to_client) == 2)
            await exchange(new, peer)


@both_ways
@run_async
async def test_a_message_before_registration_is_refused():
    async with running_relay() as server, connected(server) as peer:
        peer.uuid = A
        assert await peer.ask(peer.offer(B)) == peer.response('client has not registered yet')


@both_ways
@pytest.mark.parametrize('one', GENERATIONS)
@pytest.mark.parametrize('other', GENERATIONS)
@run_async
async def test_peers_of_every_generation_exchange_messages(one, other):
    async with running_relay() as server, registered(server, A, generation=one) as first:
        async with registered(server, B, generation=other) as second:
            await exchange(first, second)


@both_ways
@pytest.mark.parametrize(
    'text',
    [
        json.dumps(OFFER),
        json.dumps(OFFER, separators=(',', ':')),
        json.dumps(OFFER, indent=2),
        json.dumps(without(OFFER, 'error')),
        json.dumps({**OFFER, 'error': 'declined', 'description_type': 'candidate'}),
        json.dumps({**OFFER, 'retries': [1.50, {'é': '\ud800'}]}),
        json.dumps(
            {**OFFER, 'source_name': 'é\u202e', 'description': '\U0001f600'}, ensure_ascii=False
        ),
        json.dumps({**OFFER, 'source_uuid': f'urn:uuid:{str(A).upper()}'}),
        json.dumps({**OFFER, 'description': 'x' * (2**20 - len(json.dumps(OFFER)) + 3)}),
    ],
    ids=range(9),
)
@run_async
async def test_the_text_of_a_forwarded_message_is_the_text_received(text):
    async with (
        running_relay() as server,
        registered(server, A) as one,
        registered(server, B) as other,
    ):
        await one.say(text)
        assert await other.websocket.recv() == text


@both_ways
@run_async
async def test_a_client_may_send_to_itself():
    async with running_relay() as server, registered(server, A) as peer:
        assert await peer.ask(peer.offer(A)) == peer.offer(A)


@both_ways
@both_generations
@run_async
async def test_a_message_to_an_unknown_peer_is_returned(generation):
    async with running_relay() as server, registered(server, A, generation=generation) as peer:
        assert await peer.ask(peer.offer(B)) == peer.offer(B, error=unknown(B))


@both_ways
@run_async
async def test_a_peer_is_unknown_after_it_has_disconnected():
    async with running_relay() as server, registered(server, A) as peer:
        async with registered(server, B):
            pass
        assert 'unknown' in (await peer.ask(peer.offer(B)))['error']


@both_ways
@run_async
async def test_a_message_with_a_forged_source_is_returned_and_not_delivered():
    async with (
        running_relay() as server,
        registered(server, A) as one,
        registered(server, B) as other,
    ):
        forged = one.offer(B, source_uuid=str(C))
        answer = await one.ask(forged)
        assert answer == {**forged, 'error': answer['error']}
        assert 'source_uuid' in answer['error']
        await one.say(one.offer(B))
        assert await other.hear() == one.offer(B)


@both_ways
@run_async
async def test_a_message_too_long_to_return_is_returned_without_its_text():
    async with running_relay() as server, registered(server, A) as peer:
        message = peer.offer(B, description='\u00e9' * (2**19 - 200))
        assert await peer.ask(json.dumps(message, ensure_ascii=False)) == peer.offer(
            B,
            description='',
            description_type='',
            source_name='',
            error=unknown(B),
        )


@both_ways
@pytest.mark.parametrize('letter', ['x', '\U0001f600'])
@run_async
async def test_a_peer_that_does_not_read_delays_no_other_client(letter):
    async with (
        running_relay() as server,
        registered(server, A) as sender,
        registered(server, C) as other,
    ):
        async with registered(server, B) as stalled:
            stall(stalled)
            refusal = await fill_backlog(sender, B, letter)
            assert refusal['error'].endswith('this peer does not read what is sent to it.')
            assert holder(server, B).link.unsent_bytes <= relay.MAX_BACKLOG
            await exchange(sender, other)
            stalled.websocket.transport.resume_reading()


@both_ways
@run_async
async def test_a_peer_that_reads_again_receives_its_backlog_and_new_messages():
    async with (
        running_relay() as server,
        registered(server, A) as sender,
        registered(server, B) as slow,
    ):
        stall(slow)
        await fill_backlog(sender, B)
        slow.websocket.transport.resume_reading()
        await sender.say(sender.offer(B, description='last'))
        heard = await slow.hear()
        while heard['description'] != 'last':
            assert len(heard['description']) == 2**19
            heard = await slow.hear()


@both_ways
@run_async
async def test_a_message_longer_than_the_backlog_is_accepted_if_the_backlog_is_empty(monkeypatch):
    monkeypatch.setattr(relay, 'MAX_BACKLOG', 10)
    async with (
        running_relay() as server,
        registered(server, A) as one,
        registered(server, B) as other,
    ):
        await exchange(one, other)


@both_ways
@malformed
@run_async
async def test_an_invalid_message_closes_neither_connection_nor_registration(text, reason):
    async with (
        running_relay() as server,
        registered(server, A) as one,
        registered(server, B) as other,
    ):
        answer = await one.ask(text)
        assert answer == one.response(answer['message'])
        assert reason in answer['message']
        await exchange(one, other)


@both_ways
@both_generations
@run_async
async def test_a_refusal_is_in_the_words_of_the_registration(generation):
    async with running_relay() as server, registered(server, A, generation=generation) as peer:
        answer = await peer.ask('nope')
        assert answer == peer.response(answer['message'])


@both_ways
@pytest.mark.parametrize('name', ['server_response', 'relay_response'])
@run_async
async def test_a_response_from_a_client_is_refused(name):
    async with running_relay() as server, registered(server, A) as peer:
        answer = await peer.ask({'message_type': name})
        assert answer == peer.response(answer['message'])


@both_ways
@run_async
async def test_a_frame_over_the_limit_closes_its_connection_with_1009():
    async with running_relay() as server, registered(server, A) as peer:
        await peer.say('x' * (relay.MAX_MESSAGE + 1))
        assert await peer.closed_with() == CloseCode.MESSAGE_TOO_BIG
        await until(lambda: not server._uuid_to_client)


@both_ways
@run_async
async def test_a_new_client_receives_its_response_first():
    async with running_relay() as server, registered(server, A) as sender:
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


@contextlib.contextmanager
def logged(caplog, level='DEBUG'):
    """Collect what is logged; neither an ERROR nor a traceback may be among it."""
    with caplog.at_level(level):
        yield lambda: [r.getMessage() for r in caplog.records if r.name == 'relay']
    for record in caplog.records:
        assert record.levelno < logging.ERROR and not record.exc_info, record.getMessage()


async def leave_with_a_close(peer):
    await peer.websocket.close()


async def leave_with_a_code(peer):
    await peer.websocket.close(4999, 'so \n long')


async def leave_with_a_reset(peer):
    sock = peer.websocket.transport.get_extra_info('socket')
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
    peer.websocket.transport.abort()


async def leave_in_the_middle_of_a_frame(peer):
    peer.websocket.transport.write(b'\x81\xfe\xff\xff')
    peer.websocket.transport.close()


async def leave_in_the_middle_of_a_message(peer):
    peer.websocket.transport.write(b'\x01\x81\0\0\0\0{')
    peer.websocket.transport.abort()


async def send_bad_utf8(peer):
    peer.websocket.transport.write(b'\x81\x81\0\0\0\0\xff')


async def send_an_unmasked_frame(peer):
    peer.websocket.transport.write(b'\x81\x01x')


async def send_a_reserved_opcode(peer):
    peer.websocket.transport.write(b'\x83\x80\0\0\0\0')


@pytest.mark.parametrize(
    'leave',
    [
        leave_with_a_close,
        leave_with_a_code,
        leave_with_a_reset,
        leave_in_the_middle_of_a_frame,
        leave_in_the_middle_of_a_message,
        send_bad_utf8,
        send_an_unmasked_frame,
        send_a_reserved_opcode,
    ],
)
@run_async
async def test_a_registration_ends_with_its_connection(leave, caplog):
    with logged(caplog) as lines:
        async with running_relay() as server, registered(server, B) as peer:
            async with registered(server, A) as gone:
                await leave(gone)
                await until(lambda: not holder(server, A))
            assert 'unknown' in (await peer.ask(peer.offer(A)))['error']
            assert list(server._websocket_to_client) == [holder(server, B).websocket]
        assert not server._websocket_to_client and not server.refusal_log
        assert [line for line in lines() if line.startswith(f'Unregistered {A}')]


@run_async
async def test_an_internal_error_is_logged_and_closes_only_its_own_connection(caplog, monkeypatch):
    def broken(_):
        raise ZeroDivisionError

    async with (
        running_relay() as server,
        registered(server, A) as one,
        registered(server, B) as other,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(relay, 'decode', broken)
            await one.say(one.offer(B))
            assert await one.closed_with() == CloseCode.INTERNAL_ERROR
        await until(lambda: list(server._uuid_to_client) == [('', B)])
        await exchange(other, other)
    assert [r.exc_info[0] for r in caplog.records if r.name == 'relay'] == [ZeroDivisionError]


@run_async
async def test_a_connection_that_takes_nothing_is_ended_by_the_kernel():
    async with running_relay() as server, registered(server, A):
        sock = holder(server, A).link.sock
        milliseconds = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert relay.Limits().ping_timeout * 1000 < milliseconds < 5 * 60_000


@run_async
async def test_the_kernel_knows_the_bounds_of_a_connection_before_the_first_can_come(monkeypatch):
    limit_socket = relay.limit_socket

    def limited(sock):
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        limit_socket(sock)
        sockets.append(sock)

    sockets = []
    monkeypatch.setattr(relay, 'limit_socket', limited)
    async with running_relay() as server:
        assert sockets == server.listener.sockets != []


@pytest.mark.parametrize('letter', ['n', '\U0001f600'])
@run_async
async def test_a_name_is_stored_in_the_length_that_the_log_shows(letter):
    name = letter * 5000
    async with running_relay() as server, registered(server, A, name) as peer:
        # One more, so that the log shows that it was cut.
        assert holder(server, A).name == name[: relay.MAX_SHOWN + 1]
        await exchange(peer, peer)


@run_async
async def test_compression_is_offered_in_vain():
    async with running_relay() as server, registered(server, A, compression='deflate') as peer:
        assert 'Sec-WebSocket-Extensions' not in peer.websocket.response.headers


# ------------------------------------------------------------------------------- Embedding


@contextlib.asynccontextmanager
async def embedded_relay():
    """Serve a relay as somebody else's program does."""
    server = RelayServer()
    async with websockets.asyncio.server.serve(server.handler, '127.0.0.1', 0) as listener:
        server.url = 'ws://127.0.0.1:%d' % listener.sockets[0].getsockname()[1]
        yield server


@run_async
async def test_the_handler_serves_in_another_server():
    async with embedded_relay() as server, registered(server, A) as one:
        async with registered(server, B, generation='relay') as other:
            await exchange(one, other)
            assert (await one.ask('nope'))['success'] is False
            async with registered(server, B) as new:
                assert await other.closed_with() == 4004
                await exchange(one, new)


@run_async
async def test_the_handler_serves_on_a_unix_socket(tmp_path):
    server, path = RelayServer(), str(tmp_path / 'relay')
    async with websockets.asyncio.server.unix_serve(server.handler, path):
        async with websockets.asyncio.client.unix_connect(path) as websocket:
            peer = Peer(websocket, A)
            assert await peer.ask(peer.registration()) == peer.response()


@pytest.mark.parametrize('expected, code', [(True, 1000), (False, 1001)])
@run_async
async def test_unregister_closes_the_connection(expected, code):
    async with embedded_relay() as server, registered(server, A) as peer:
        websocket = holder(server, A).websocket
        await server.unregister(websocket, expected)
        assert await peer.closed_with() == code
        await server.unregister(websocket, expected)
        assert not server._uuid_to_client


@run_async
async def test_connect_forwards_a_message_that_came_without_a_text():
    async with embedded_relay() as server, registered(server, A), registered(server, B) as other:
        await server.connect(holder(server, A).websocket, MESSAGES[4])
        assert await other.websocket.recv() == encode(MESSAGES[4])


# ------------------------------------------------------------------------------- Log


@run_async
async def test_the_log_says_who_connected_and_disconnected_and_why(caplog):
    with logged(caplog, 'INFO') as lines:
        async with running_relay() as server:
            async with registered(server, A) as peer:
                address = '%s:%d' % peer.websocket.local_address
                await peer.ask('nope')
                await peer.websocket.close(4999)
        who = f"{A} ('laptop', at {address})"
        assert lines() == [
            f'Registered {who}',
            f'Refused {who}: {NOT_JSON} (1 refusals so far)',
            f'Unregistered {who}: closed by the client with 4999',
        ]


@run_async
async def test_repeated_refusals_are_counted_and_not_each_logged(caplog, monkeypatch):
    with logged(caplog) as lines:
        async with running_relay() as server, registered(server, A) as peer:
            for _ in range(300):
                await peer.ask('nope')
            assert len([line for line in lines() if 'Refused' in line]) == 1
            monkeypatch.setattr(relay, 'REFUSAL_INTERVAL', 0)
            await peer.ask('nope')
        assert lines()[-2].endswith('(301 refusals so far)')


@pytest.mark.parametrize(
    'name',
    [
        'x\nERROR disk on fire',
        '\x1b[2J',
        '\u202egnp.exe',
        '\ud800',
        '\x00\x85\u2028',
        'x' * 60_000,
    ],
    ids=range(6),
)
@run_async
async def test_text_of_a_client_is_escaped_and_shortened_in_the_log(name, caplog):
    with logged(caplog) as lines:
        async with running_relay() as server, registered(server, A, name) as peer:
            await peer.ask(peer.offer(B, description_type=name))
            await peer.ask({'message_type': name})
            await peer.ask({**peer.registration(), 'uuid': name})
            await peer.ask({**peer.registration(), name: 1, 'name': 2})
            await peer.websocket.close(4999, name[:30].replace('\ud800', ''))
    for line in lines():
        assert line.isprintable() and line.isascii() and len(line) < 700


@both_ways
@run_async
async def test_clients_that_displace_each_other_are_one_warning_an_interval(caplog):
    def warnings():
        return [line for line in lines() if 'again and again' in line]

    with logged(caplog) as lines:
        async with running_relay() as server:
            addresses = set()
            for expected in (1, 2):
                for _ in range(3 * relay.FIGHT):
                    async with registered(server, A) as one, registered(server, A) as other:
                        for peer in (one, other):
                            addresses.add(relay.address_of(peer.websocket.local_address))
                        await one.closed_with()
                assert len(warnings()) == expected
                server._takeovers_since -= relay.FIGHT_INTERVAL + 1
    for line in warnings():
        by = re.search(r'by (\S+) and (\S+);.*new UUID', line).groups()
        assert by[0] != by[1] and addresses.issuperset(by) and str(A) in line


@run_async
async def test_session_descriptions_are_never_logged(caplog):
    with logged(caplog) as lines:
        async with running_relay() as server, registered(server, A) as peer:
            await peer.ask(peer.offer(A, description='secret'))
            await peer.ask(peer.offer(B, description='secret'))
            await peer.ask(json.dumps(peer.offer(B, description='secret'))[:-3])
    assert 'Forwarded' in ''.join(lines()) and 'secret' not in ''.join(lines())


# ------------------------------------------------------------------------------- Command line


@contextlib.contextmanager
def ended_in_time(process):
    """End a process in the end, or when it takes so long that a test would wait for ever."""
    timer = threading.Timer(20, process.kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()


@contextlib.contextmanager
def running_program(*options, hosts=1):
    """Run relay.py as a process; yields it, with its ports once they are bound."""
    command = [
        sys.executable,
        '-W',
        'error',
        HERE / 'relay.py',
        '--port',
        '0',
        *options,
    ]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'encoding': 'utf-8'}
    with subprocess.Popen(command, **pipes) as process, ended_in_time(process):
        process.lines, process.ports = [], []
        while len(process.ports) < hosts:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            process.lines.append(line)
            process.ports += map(int, re.findall(r'Serving relay server on .*:(\d+)', line))
        process.url = 'ws://127.0.0.1:%d' % process.ports[0]
        yield process


def forked(program, *options):
    """Run a program's `main` in a fork of this process, where all that it imports is at hand.

    Returns a function that waits for its end, and returns its status, what it has printed and
    what it has complained of.
    """
    files = tempfile.TemporaryFile('w+'), tempfile.TemporaryFile('w+')
    child = os.fork()
    if not child:
        status = 255
        signal.alarm(20)
        sys.stdout, sys.stderr = files
        os.dup2(files[0].fileno(), 1)
        os.dup2(files[1].fileno(), 2)
        logging.getLogger().handlers.clear()
        try:
            status = program([str(option) for option in options])
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            for file in files:
                file.flush()
            os._exit(status)

    def ended():
        status = os.waitpid(child, 0)[1]
        with files[0], files[1]:
            texts = [file.seek(0) or file.read() for file in files]
        assert os.WIFEXITED(status)
        return os.WEXITSTATUS(status), *texts

    ended.child = child
    return ended


def fails(*options, status=1, program=relay):
    """Run a program, see it fail with one line on standard error, and return the line."""
    ended, text, line = forked(program.main, *options)()
    assert (ended, text, line.count('\n')) == (status, '', 1)
    assert line.startswith(f'{Path(program.__file__).name}: ')
    return line


@pytest.mark.parametrize(
    'signals',
    [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM] * 2, [signal.SIGTERM, signal.SIGINT]],
    ids=str,
)
@run_async
async def test_a_signal_closes_the_clients_and_stops_the_relay(signals):
    with running_program('--host', '127.0.0.1') as process:
        async with registered(process, A) as peer:
            for number in signals:
                process.send_signal(number)
            assert await peer.closed_with() == CloseCode.GOING_AWAY
        # What a readline has read ahead, communicate would lose.
        rest, errors = process.stdout.read(), process.stderr.read()
        process.wait()
        assert (process.returncode, errors) == (0, '')
        form = r'\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\] (INFO |WARNING) \(relay\) :: \S.*'
        lines = [*process.lines, *rest.splitlines()]
        assert len(lines) == 5 and all(re.fullmatch(form, line.strip()) for line in lines)


@run_async
async def test_a_client_that_neither_reads_nor_closes_does_not_hold_up_the_end(
    monkeypatch, caplog
):
    # Less than websockets gives a connection to close, which is more than this test may take.
    monkeypatch.setattr(relay, 'STOP_TIMEOUT', 0.2)
    with caplog.at_level('INFO'):
        serving = asyncio.ensure_future(relay.serve('127.0.0.1', 0))
        await until(lambda: 'Serving' in caplog.text)
        port = re.search(r'Serving relay server on 127.0.0.1:(\d+)', caplog.text)[1]
        async with registered(SimpleNamespace(url=f'ws://127.0.0.1:{port}'), A) as peer:
            stall(peer)
            os.kill(os.getpid(), signal.SIGTERM)
            await serving
            peer.websocket.transport.abort()


@run_async
async def test_stopping_without_waiting_for_clients_is_no_error():
    # The program, but for how long it waits.
    program = """
import relay
relay.STOP_TIMEOUT = 0.1
relay.main(['--host', '127.0.0.1', '--port', '0', '--log-level', 'info'])
"""
    command = [sys.executable, '-c', program]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        with ended_in_time(process):
            port = re.search(r':(\d+)$', process.stdout.readline())[1]
            async with registered(SimpleNamespace(url=f'ws://127.0.0.1:{port}'), A) as peer:
                stall(peer)
                process.terminate()
                log = process.stdout.read()
                peer.websocket.transport.abort()
    assert 'Server closed' in log and 'Traceback' not in log, log


def test_the_program_listens_on_every_address_of_its_host():
    with running_program('--host', 'localhost', '--log-level', 'debug') as process:
        assert process.ports[0] > 0


def test_a_log_folder_holds_the_log_as_well(tmp_path):
    folder = tmp_path / 'new' / 'logs'
    with running_program('--log-dir', str(folder)) as process:
        process.terminate()
        rest = process.stdout.read()
    assert (folder / 'server.log').read_text() == ''.join(process.lines) + rest


def test_a_log_file_is_new_each_sunday_at_midnight(tmp_path, monkeypatch):
    seen = {}
    levels = {name: logging.getLogger(name).level for name in ('websockets', 'asyncio')}
    monkeypatch.setattr(logging, 'basicConfig', lambda **options: seen.update(options))
    monkeypatch.setattr(logging, 'raiseExceptions', True)
    relay.configure_logging(str(tmp_path), 'INFO')
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    weekly = seen['handlers'][1]
    weekly.close()
    end = time.localtime(weekly.rolloverAt)
    # The end of a Sunday, which is the first second of a Monday.
    assert (end.tm_wday, end.tm_hour, end.tm_min, end.tm_sec) == (0, 0, 0, 0)
    assert 0 < weekly.rolloverAt - time.time() <= 7 * 25 * 3600


@pytest.mark.parametrize('shell_limit', [64])
def test_the_open_file_limit_is_raised_to_the_hard_limit(shell_limit):
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (shell_limit * 4, hard))
    try:
        with running_program() as process:
            limits = Path(f'/proc/{process.pid}/limits').read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert re.search(r'Max open files +(\d+) +\1 ', limits)


def test_the_file_can_be_started_by_its_name():
    assert (HERE / 'relay.py').read_text().startswith('#!/usr/bin/env python3\n')
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    done = subprocess.run(
        [HERE / 'relay.py', '--version'],
        env={**os.environ, 'PATH': path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f'relay.py {relay.__version__}\n')


@pytest.mark.parametrize('port', ['65536', '-1', 'http', '8e3', ''])
def test_a_port_out_of_range_is_one_line(port):
    assert '--port' in fails('--port', port, status=2)


@pytest.mark.parametrize(
    'options', [['--keyfile', 'key.pem'], ['--log-level', 'LOUD'], ['--verbose']]
)
def test_a_wrong_option_is_one_line(options):
    assert options[0] in fails(*options, status=2)


def test_a_port_in_use_is_one_line():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = str(taken.getsockname()[1])
        line = fails('--host', '127.0.0.1', '--port', port)
    assert line == f'relay.py: cannot listen on 127.0.0.1:{port}: Address already in use\n'


@pytest.mark.parametrize('host', ['relay.invalid', '192.0.2.1', 'a..b', '::::'])
def test_an_address_that_is_not_ours_is_one_line(host):
    assert f'cannot listen on {host}:0: ' in (line := fails('--host', host, '--port', '0'))
    assert 'None' not in line


def test_a_log_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / 'file').touch()
    assert str(tmp_path / 'file' / 'logs') in fails('--log-dir', str(tmp_path / 'file' / 'logs'))


@pytest.mark.parametrize('sent', [b'', b'GET / HTTP/1.1\r\nUp'], ids=['nothing', 'half'])
@pytest.mark.parametrize('secure', [False, True])
@run_async
async def test_a_connection_without_a_whole_request_does_not_delay_the_stop(sent, secure, pem):
    options = ['--certfile', pem / 'both.pem'] if secure else []
    trust = trusting(pem) if secure else None
    with running_program('--host', '127.0.0.1', *options) as process:
        async with wired(process, trust, opened=False) as wire:
            wire.send(sent)
            # Connections are accepted in order.
            async with wired(process, trust):
                pass
            process.terminate()
            # Within a second; the handshake itself would have ten.
            await asyncio.to_thread(process.wait, 5)
        assert (process.returncode, process.stderr.read()) == (0, '')


@pytest.mark.parametrize(
    'environment, options, lines',
    [
        ('', '--ping-interval ' + '9' * 400, 1),
        ('WATCHDOG_USEC=rubbish NOTIFY_SOCKET=/nowhere', '', 0),
        ('JOURNAL_STREAM=8:1234', '>&-', 0),
        ('JOURNAL_STREAM=rubbish', '>&-', 0),
    ],
)
def test_an_odd_environment_is_one_line_or_nothing(environment, options, lines, tmp_path):
    program = f'{sys.executable} {HERE}/relay.py --host 127.0.0.1 --port 0 --log-dir {tmp_path}'
    command = f'{environment} exec {program} {options}'
    log, pipes = tmp_path / 'server.log', {'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(['bash', '-c', command], **pipes) as process, ended_in_time(process):
        while process.poll() is None and not (log.exists() and 'No --tok' in log.read_text()):
            time.sleep(0.01)
        process.terminate()
        errors = process.stderr.read()
    # Without a standard output, the log goes there.
    others = [line for line in errors.splitlines() if not line.startswith('[')]
    assert len(others) == lines, errors
    assert process.returncode == (2 if lines else 0)


@pytest.mark.parametrize('function', [relay.serve, relay.Listener])
def test_a_misspelt_keyword_is_a_type_error(function):
    with pytest.raises(TypeError, match='certifcate'):
        function('127.0.0.1', 0, certifcate='cert.pem')


# ------------------------------------------------------------------------------- TLS


@pytest.fixture(scope='module')
def pem(tmp_path_factory):
    """A folder with a certificate, its key, both in one file, and another key."""
    folder = tmp_path_factory.mktemp('pem')
    for name in ('cert', 'other'):
        subprocess.run(
            ['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256']
            + ['-nodes', '-days', '2', '-subj', '/CN=localhost', '-out', f'{name}.pem']
            + ['-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1', '-keyout', f'{name}.key'],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    subprocess.run(
        [
            'openssl',
            'ec',
            '-aes128',
            '-passout',
            'pass:x',
            '-in',
            'cert.key',
            '-out',
            'locked.key',
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    both = (folder / 'cert.key').read_text() + (folder / 'cert.pem').read_text()
    (folder / 'both.pem').write_text(both)
    (folder / 'text.pem').write_text('This is no certificate.\n')
    return folder


@pytest.fixture
def tls(pem):
    return relay.tls_context(str(pem / 'both.pem'), None)


def trusting(pem):
    return ssl.create_default_context(cafile=pem / 'cert.pem')


@pytest.mark.parametrize('files', [['cert.pem', 'cert.key'], ['both.pem', None]], ids=str)
@run_async
async def test_clients_exchange_messages_over_tls(pem, files):
    tls = relay.tls_context(*(name and str(pem / name) for name in files))
    async with running_relay(tls) as server, registered(server, A, ssl=trusting(pem)) as one:
        async with registered(server, B, ssl=trusting(pem)) as other:
            await exchange(one, other)


@run_async
async def test_a_backlog_is_bounded_over_tls_too(pem):
    tls = relay.tls_context(str(pem / 'both.pem'), None)
    trust = trusting(pem)
    async with running_relay(tls) as server, registered(server, A, ssl=trust) as sender:
        async with registered(server, B, ssl=trust) as stalled:
            stall(stalled)
            assert 'does not read' in (await fill_backlog(sender, B))['error']
            stalled.websocket.transport.resume_reading()


@pytest.mark.parametrize(
    'cert, key, fault',
    [
        ('none.pem', 'cert.key', 'none.pem: No such file'),
        ('cert.pem', 'none.key', 'none.key: No such file'),
        ('.', 'cert.key', ': Is a directory'),
        ('cert.pem', '.', ': Is a directory'),
        ('text.pem', 'cert.key', 'text.pem: no certificate'),
        ('cert.key', 'cert.key', 'cert.key: no certificate'),
        ('cert.pem', 'text.pem', 'text.pem: no private key'),
        ('cert.pem', 'cert.pem', 'cert.pem: no private key'),
        ('cert.pem', 'locked.key', 'locked.key: no private key without a password'),
        ('cert.pem', 'other.key', 'other.key does not belong to the certificate in '),
        ('cert.pem', None, 'cert.pem: no private key'),
        ('text.pem', None, 'text.pem: no certificate'),
        ('/dev/null', None, '/dev/null: no certificate'),
    ],
)
def test_a_certificate_that_cannot_be_used_is_one_line_that_names_the_file(pem, cert, key, fault):
    files = ['--certfile', pem / cert] + (['--keyfile', pem / key] if key else [])
    assert fault in fails('--port', '0', *files)


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


def bearer(token):
    return {'additional_headers': {'Authorization': f'Bearer {token}'}}


def basic(text):
    return {'additional_headers': {'Authorization': 'Basic ' + base64.b64encode(text).decode()}}


def within(server, userinfo='', query=''):
    """Return the relay with a token in its URL."""
    url = server.url.replace('://', f'://{userinfo}') + query
    return SimpleNamespace(url=url)


@pytest.mark.parametrize(
    'options, user',
    [
        (bearer('a1'), 'alice'),
        (bearer('b1'), 'bob'),
        ({'additional_headers': {'authorization': 'bearer a2:x#y'}}, 'alice'),
        (basic(b'alice:a2:x#y'), 'alice'),
        (basic(b'bob:b1'), 'bob'),
    ],
    ids=str,
)
@run_async
async def test_a_token_in_a_header_identifies_the_user(tokens, options, user):
    async with running_relay(tokens=tokens) as server, registered(server, A, **options):
        assert holder(server, A, user)


@pytest.mark.parametrize(
    'userinfo, query, user',
    [
        ('alice:a1@', '', 'alice'),
        ('', '?token=b1', 'bob'),
        ('', 'any/path?x=1&token=a2%3Ax%23y', 'alice'),
    ],
)
@run_async
async def test_a_token_in_the_url_identifies_the_user(tokens, userinfo, query, user):
    async with running_relay(tokens=tokens) as server:
        async with registered(within(server, userinfo, query), A):
            assert holder(server, A, user)


@pytest.mark.parametrize(
    'query, options',
    [
        ('', {}),
        ('', bearer('')),
        ('', bearer('a')),
        ('', bearer('a11')),
        ('', bearer('alice:a1')),
        ('', basic(b'bob:a1')),
        ('', basic(b'alice:')),
        ('', basic(b'a1')),
        ('', basic(b'\xff\xfe')),
        ('', {'additional_headers': {'Authorization': 'Basic %%%'}}),
        ('', {'additional_headers': {'Authorization': 'Digest a1'}}),
        (
            '',
            {
                'additional_headers': [
                    ('Authorization', 'Bearer a1'),
                    ('Authorization', 'Bearer b1'),
                ]
            },
        ),
        ('?token=', {}),
        ('?token=%ff', {}),
        ('?token=' + 'x' * 4000, {}),
        ('?Token=a1', {}),
        ('/[?token=a1', {}),
    ],
    ids=range(17),
)
@run_async
async def test_without_a_valid_token_the_handshake_ends_with_401(tokens, query, options, caplog):
    with logged(caplog, 'INFO') as lines:
        async with running_relay(tokens=tokens) as server:
            for _ in range(3):
                with pytest.raises(InvalidStatus) as caught:
                    await open_websocket(server.url + query, **options)
                assert caught.value.response.status_code == 401
                assert 'Bearer' in caught.value.response.headers['WWW-Authenticate']
            assert not server._websocket_to_client
    assert [line.partition(': ')[2] for line in lines()] == ['no valid token (1 refusals so far)']
    assert 'a1' not in ''.join(lines())


@pytest.mark.parametrize('query, header', [(b'', b'\xff'), (b'?token=\xff', b'')])
@run_async
async def test_a_token_that_is_not_text_is_refused(query, header, tokens, caplog):
    async with running_relay(tokens=tokens) as server:
        token = b'Upgrade: websocket\r\nAuthorization: Bearer ' + header
        answer = await http(server, b'GET /%s HTTP/1.1\r\n%s\r\n\r\n' % (query, token))
        assert answer.startswith(b'HTTP/1.1 40')
    assert not [record for record in caplog.records if record.levelname == 'ERROR']


@run_async
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


@run_async
async def test_the_handler_refuses_a_client_without_a_token(tokens):
    server = RelayServer(tokens)
    async with websockets.asyncio.server.serve(server.handler, '127.0.0.1', 0) as listener:
        server.url = 'ws://127.0.0.1:%d' % listener.sockets[0].getsockname()[1]
        async with connected(server) as peer:
            assert await peer.closed_with() == CloseCode.POLICY_VIOLATION
        async with registered(server, A, **bearer('a1')):
            assert holder(server, A, 'alice')


@both_ways
@run_async
async def test_a_revoked_token_closes_its_connections_though_the_user_has_another(tokens):
    async with (
        running_relay(tokens=tokens) as server,
        registered(server, A, **bearer('a1')) as kept,
        registered(server, B, **bearer('a2:x#y')) as revoked,
        connected(server, **bearer('a2:x#y')) as unregistered,
    ):
        Path(tokens).write_text('alice:a1\n')
        server.reload(None, '', None)
        assert await revoked.closed_with() == CloseCode.POLICY_VIOLATION
        assert await unregistered.closed_with() == CloseCode.POLICY_VIOLATION
        assert 'unknown' in (await kept.ask(kept.offer(B)))['error']


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


@pytest.mark.parametrize('address, lines, expected', FORWARDED.values(), ids=FORWARDED)
def test_the_address_of_a_client_is_taken_only_from_a_local_proxy(address, lines, expected):
    headers = SimpleNamespace(get_all={'X-Forwarded-For': lines}.get)
    assert relay.client_address(address, SimpleNamespace(headers=headers)) == expected


@both_ways
@run_async
async def test_the_address_that_a_proxy_adds_is_logged(caplog):
    headers = {'X-Forwarded-For': '10.0.0.1, 192.0.2.7'}
    with logged(caplog) as lines:
        async with running_relay() as server, registered(server, A, additional_headers=headers):
            pass
    assert [line for line in lines() if line.endswith('at 192.0.2.7)')]


@pytest.mark.parametrize(
    'content, fault',
    [
        ('alice', 'line 1: not in the form'),
        ('# x\nalice:a1\nbob b1', 'line 3: not in the form'),
        (':a1', 'line 1: not in the form'),
        ('alice:', 'line 1: not in the form'),
        ('alice:a 1', 'line 1: not in the form'),
        ('alice:a\x1b1', 'line 1: not in the form'),
        ('alice:a1\nbob:a1', 'line 2: this token belongs to another user'),
        ('', 'no line in the form user:token'),
        ('# alice:a1\n\n', 'no line in the form user:token'),
        (b'alice:\xff', 'cannot read'),
        (None, 'cannot read'),
    ],
)
def test_a_wrong_token_file_is_one_line_that_names_it(tmp_path, content, fault):
    path = tmp_path / 'tokens'
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(0o600)
    line = fails('--port', '0', '--token-file', path)
    assert fault in line and str(path) in line and 'a1' not in line


def test_a_token_file_that_others_may_read_is_a_warning(tokens, caplog):
    Path(tokens).chmod(0o644)
    assert len(relay.read_tokens(tokens)) == 3
    assert [r.levelname for r in caplog.records] == ['WARNING'] and tokens in caplog.text


async def reloaded(process):
    """Have the relay read its files again, and return the line that says how it went."""
    process.send_signal(signal.SIGHUP)
    line = ''
    while 'Reload' not in line:
        line = await asyncio.get_running_loop().run_in_executor(None, process.stdout.readline)
    return line


@run_async
async def test_a_reload_changes_tokens_and_closes_only_revoked_clients(tokens):
    with running_program('--token-file', tokens, '--rate', '0') as process:
        async with (
            registered(process, A, **bearer('a1')) as alice,
            registered(process, B, **bearer('b1')) as bob,
        ):
            Path(tokens).write_text('alice:a1\nalice:a3')
            assert 'Reloaded' in await reloaded(process)
            assert await bob.closed_with() == CloseCode.POLICY_VIOLATION
            await exchange(alice, alice)
            async with registered(process, B, **bearer('a3')) as new:
                await exchange(alice, new)
                Path(tokens).write_text('nonsense')
                line = await reloaded(process)
                assert 'ERROR' in line and f'{tokens}, line 1' in line
                await exchange(alice, new)
            for gone in ('a2', 'b1'):
                with pytest.raises(InvalidStatus):
                    await open_websocket(process.url, **bearer(gone))


async def certificate_of(process, pem):
    """Return the certificate that a new client is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with open_websocket(process.url.replace('ws:', 'wss:'), ssl=context) as websocket:
        tls = websocket.transport.get_extra_info('ssl_object')
        return ssl.DER_cert_to_PEM_cert(tls.getpeercert(True))


@run_async
async def test_a_reload_changes_the_certificate_and_disconnects_no_client(pem, tmp_path):
    cert, key = tmp_path / 'cert.pem', tmp_path / 'key.pem'
    shutil.copy(pem / 'cert.pem', cert)
    shutil.copy(pem / 'cert.key', key)
    old, new = ((pem / f'{name}.pem').read_text() for name in ('cert', 'other'))
    with running_program('--certfile', cert, '--keyfile', key, '--rate', '0') as process:
        server = SimpleNamespace(url=process.url.replace('ws:', 'wss:'))
        async with registered(server, A, ssl=trusting(pem)) as peer:
            shutil.copy(pem / 'other.pem', cert)
            line = await reloaded(process)
            assert 'ERROR' in line and f'the key in {key} does not belong' in line
            assert await certificate_of(process, pem) == old
            shutil.copy(pem / 'other.key', key)
            assert 'Reloaded' in await reloaded(process)
            assert await certificate_of(process, pem) == new
            await exchange(peer, peer)


@run_async
async def test_a_reload_without_files_disconnects_no_client():
    with running_program('--rate', '0') as process:
        async with registered(process, A) as peer:
            assert 'Reloaded' in await reloaded(process)
            await exchange(peer, peer)


# ------------------------------------------------------------------------------- Limits


@run_async
async def test_one_client_too_many_is_closed_with_1013(caplog):
    with logged(caplog, 'INFO') as lines:
        async with running_relay(max_clients=2) as server, registered(server, A) as one:
            async with connected(server):
                async with connected(server) as late, connected(server) as later:
                    assert await late.closed_with() == CloseCode.TRY_AGAIN_LATER
                    assert await later.closed_with() == CloseCode.TRY_AGAIN_LATER
                await exchange(one, one)
            await until(lambda: len(server._websocket_to_client) == 1)
            async with registered(server, B) as other:
                await exchange(one, other)
    assert len([line for line in lines() if 'the relay is full' in line]) == 1


def test_clients_are_as_many_as_there_are_files_for():
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert RelayServer()._max_clients == files - relay.RESERVED_FDS - relay.HANDSHAKE_FDS


@run_async
async def test_the_longest_message_is_an_option():
    async with running_relay(max_size=300) as server, registered(server, A) as peer:
        await peer.ask(peer.offer(A))
        await peer.say(peer.offer(A, description='x' * 300))
        assert await peer.closed_with() == CloseCode.MESSAGE_TOO_BIG


@run_async
async def test_a_message_too_long_is_refused_from_its_header():
    async with running_relay() as server, registered(server, A) as peer:
        # A frame of 2 GiB, of which one byte comes.
        peer.websocket.transport.write(b'\x81\xff\0\0\0\0\x80\0\0\0' + b'\0' * 5)
        assert await peer.closed_with() == CloseCode.MESSAGE_TOO_BIG


@pytest.mark.parametrize('number', [1, 2, 4000])
@run_async
async def test_a_message_in_fragments_is_forwarded_whole(number):
    async with running_relay() as server, registered(server, A) as peer:
        text = json.dumps(peer.offer(A, description='\u00e9' * 4000), ensure_ascii=False)
        size = len(text) // number + 1
        await peer.websocket.send(text[n : n + size] for n in range(0, len(text), size))
        assert await peer.websocket.recv() == text


@run_async
async def test_a_message_may_have_any_number_of_fragments():
    async with running_relay() as server, registered(server, A) as peer:
        text = json.dumps(peer.offer(A))
        frames = [b'\0\x81\0\0\0\0' + letter.encode() for letter in text]
        frames += [b'\0\x80\0\0\0\0'] * 20_000
        peer.websocket.transport.write(b'\x01' + b''.join(frames)[1:] + b'\x80\x80\0\0\0\0')
        assert await peer.websocket.recv() == text


@run_async
async def test_a_client_that_is_too_fast_waits_and_loses_nothing():
    async with (
        running_relay(rate=500) as server,
        registered(server, A) as fast,
        registered(server, B) as peer,
    ):
        async with registered(server, C) as other:
            messages = [fast.offer(B, description=str(n)) for n in range(300)]
            sending = asyncio.gather(*(fast.say(message) for message in messages))
            # Another client does not wait with it: its message comes before the last of those.
            await other.say(other.offer(B))
            heard = [await peer.hear() for _ in range(301)]
            await sending
            assert heard.index(other.offer(B)) < 300
            heard.remove(other.offer(B))
            assert heard == messages


def paced(server, monkeypatch, clock):
    """Have a relay wait for nothing; returns the list that what it would wait is put into."""
    waits, pace = [], server.pace

    def note(client, size):
        waits.append(pace(client, size))
        return 0

    monkeypatch.setattr(server, 'pace', note)
    monkeypatch.setattr(
        relay, 'time', SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    )
    return waits


@both_ways
@run_async
async def test_messages_are_read_at_the_rate(monkeypatch):
    async with running_relay(rate=10) as server:
        # With the clock at a stand, the waits add up.
        waits = paced(server, monkeypatch, [1000.0])
        async with registered(server, A) as fast:
            for _ in range(20):
                await fast.ask(fast.registration())
    assert waits[:20] == pytest.approx([n / 10 for n in range(20)])


@both_ways
@run_async
async def test_a_client_that_was_silent_may_send_a_burst(monkeypatch):
    clock = [1000.0]
    async with running_relay(rate=100) as server:
        waits = paced(server, monkeypatch, clock)
        async with registered(server, A) as peer:
            clock[0] += 3600
            waits.clear()
            for _ in range(12):
                await peer.ask(peer.registration())
    assert waits[:9] == [0] * 9 and waits[11] > 0


@pytest.mark.parametrize('size, units', [(1, 1), (2**14, 1), (2**14 + 1, 2), (2**20, 64)])
@run_async
async def test_a_message_counts_against_the_rate_once_for_each_16_kib(size, units, monkeypatch):
    async with running_relay(rate=10) as server:
        waits = paced(server, monkeypatch, [1000.0])
        async with registered(server, A) as peer:
            await peer.ask('x' * size)
    assert waits[1] - waits[0] == pytest.approx(units / 10)


@run_async
async def test_the_next_message_waits_for_its_time(monkeypatch):
    async with running_relay() as server, registered(server, A) as peer:
        monkeypatch.setattr(server, 'pace', lambda client, size: 60)
        await peer.say(peer.offer(A))
        await peer.say(peer.offer(A))
        assert await peer.hear() == peer.offer(A)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(peer.hear(), 0.1)
        await server.unregister(holder(server, A).websocket, expected=True)


@run_async
async def test_a_client_that_does_not_register_in_time_is_closed_with_1008(monkeypatch):
    monkeypatch.setattr(relay, 'REGISTER_TIMEOUT', 0.05)
    async with running_relay() as server, registered(server, A) as one:
        async with connected(server) as late:
            assert await late.closed_with() == CloseCode.POLICY_VIOLATION
        await exchange(one, one)


@run_async
async def test_a_half_open_handshake_is_dropped_in_time():
    async with running_relay(open_timeout=0.05) as server:
        reader, writer = await asyncio.open_connection('127.0.0.1', port_of(server))
        writer.write(b'GET / HTTP/1.1\r\nUpgrade:')
        assert await reader.read() == b''
        writer.close()


@run_async
async def test_a_client_that_answers_no_ping_is_closed_and_one_that_does_is_not():
    async with (
        running_relay(ping_interval=0.05, ping_timeout=0.1, close_timeout=0.1) as server,
        registered(server, A) as one,
    ):
        async with registered(server, B) as silent:
            stall(silent)
            await until(lambda: not holder(server, B))
            await exchange(one, one)
            silent.websocket.transport.abort()


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


@pytest.mark.parametrize('with_tokens', [False, True])
@run_async
async def test_a_plain_request_is_answered_with_what_this_is(tokens, with_tokens):
    async with running_relay(tokens=tokens if with_tokens else None) as server:
        answer = (await http(server, b'GET / HTTP/1.1\r\nHost: relay\r\n\r\n')).decode()
        assert answer.startswith('HTTP/1.1 426 ') and '\nUpgrade: websocket\r\n' in answer
        assert answer.partition('\r\n\r\n')[2] == relay.WELCOME


@run_async
async def test_any_path_opens_a_websocket():
    async with running_relay() as server:
        async with registered(within(server, query='some/where?x=y'), A):
            assert holder(server, A)


@pytest.mark.parametrize(
    'origin, welcome',
    [(None, True), ('https://ours.example', True), ('https://theirs.example', False)],
)
@run_async
async def test_web_pages_connect_from_the_origins_that_are_allowed(origin, welcome, caplog):
    async with running_relay(origins=['https://ours.example', None]) as server:
        if welcome:
            async with registered(server, A, origin=origin):
                assert holder(server, A)
        else:
            with pytest.raises(InvalidStatus) as caught, moves(server, refused('unauthorized')):
                await open_websocket(server.url, origin=origin)
            assert caught.value.response.status_code == 403
            assert f": origin '{origin}' is not allowed (1 refusals" in caplog.text


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
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    writer.write(f'GET {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n'.encode())
    answer = (await reader.read()).decode()
    writer.close()
    head, _, text = answer.partition('\r\n\r\n')
    return int(head.split()[1]), text


def samples(server):
    """Return what Prometheus reads: the value of each sample by its name."""
    lines = [line for line in relay.metrics(server).splitlines() if line[0] != '#']
    return {name: float(value) for name, value in (line.rsplit(' ', 1) for line in lines)}


@contextlib.contextmanager
def moves(server, name, amount=1):
    """See that a sample moves by an amount, and that no refusal but it does."""
    before = samples(server)
    yield
    after = samples(server)
    assert after[name] - before[name] == amount
    changed = {key for key in after if 'refusals' in key and after[key] != before[key]}
    assert changed <= {name}


def refused(kind):
    return f'relay_refusals_total{{reason="{kind}"}}'


@run_async
async def test_anyone_can_ask_for_the_health(tokens):
    async with running_relay(tokens=tokens) as server:
        assert await fetch(port_of(server), '/healthz') == (200, 'ok\n')
        status, text = await fetch(port_of(server))
        assert (status, 'relay' in text) == (426, True)


@run_async
async def test_the_health_of_a_stopping_relay_is_503():
    with running_program('--host', '127.0.0.1') as process:
        reader, writer = await asyncio.open_connection('127.0.0.1', process.ports[0])
        async with registered(process, A) as peer:
            process.terminate()
            await peer.closed_with()
            writer.write(b'GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n')
            answer = await reader.read()
            writer.close()
        assert answer.startswith(b'HTTP/1.1 503 ') and answer.endswith(b'\r\n\r\nstopping\n')


@run_async
async def test_metrics_are_served_on_this_machine_only(monkeypatch):
    with running_program('--host', '0.0.0.0', '--metrics-port', '0') as process:
        line = process.stdout.readline()
        port = int(re.search(r'Serving metrics on 127\.0\.0\.1:(\d+)$', line)[1])
        status, text = await fetch(port, '/metrics')
        assert (status, 'relay_uptime_seconds' in text) == (200, True)
        with pytest.raises(OSError):
            socket.create_connection(('127.0.0.2', port))
        with socket.create_connection(('127.0.0.2', process.ports[0])):
            pass


def test_a_metrics_port_in_use_is_one_line():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = str(taken.getsockname()[1])
        options = ['--host', '127.0.0.1', '--port', '0', '--metrics-port', port]
        command = [sys.executable, HERE / 'relay.py', *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    reason = f'cannot listen on 127.0.0.1:{port}: Address already in use'
    assert done.stderr == f'relay.py: {reason}\n'


def test_each_family_of_metrics_has_one_help_and_one_type():
    lines = relay.metrics(RelayServer()).splitlines()
    families = [line.split()[2] for line in lines if line.startswith('# HELP ')]
    assert len(families) == len(set(families)) >= 12
    for family in families:
        kind = 'counter' if family.endswith('_total') else 'gauge'
        assert lines.count(f'# TYPE {family} {kind}') == 1
    assert {line.split('{')[0].split()[0] for line in lines if line[0] != '#'} == set(families)


@pytest.mark.skipif(not shutil.which('promtool'), reason='promtool is not here')
def test_promtool_accepts_the_metrics():
    server = RelayServer()
    server.certificate_expiry = 1.0
    done = subprocess.run(
        ['promtool', 'check', 'metrics'],
        input=relay.metrics(server),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


@pytest.mark.skipif(not shutil.which('promtool'), reason='promtool is not here')
@pytest.mark.parametrize('kind, head', [('config', 'scrape_configs:'), ('rules', 'groups:')])
def test_promtool_accepts_the_configuration_in_the_readme(kind, head, tmp_path):
    block = re.search(rf'(?m)^    {head}\n(    .*\n)+', (HERE / 'README.md').read_text())
    (tmp_path / 'file.yml').write_text(re.sub('(?m)^    ', '', block[0]))
    command = ['promtool', 'check', kind, tmp_path / 'file.yml']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    named = set(re.findall(r'\b(?:relay|process)_\w+', block[0]))
    server = RelayServer()
    server.certificate_expiry = 1.0
    assert named <= {name.partition('{')[0] for name in samples(server)}


@run_async
async def test_clients_are_counted_by_their_generation():
    async with running_relay() as server, connected(server):
        async with registered(server, A), registered(server, B, generation='relay'):
            values = samples(server)
            assert values['relay_connected_clients'] == 3
            for generation in GENERATIONS:
                assert values[f'relay_registered_clients{{generation="{generation}"}}'] == 1
        await until(lambda: samples(server)['relay_connected_clients'] == 1)
        assert samples(server)['relay_registered_clients{generation="relay"}'] == 0


@run_async
async def test_registrations_are_counted_and_those_that_are_displaced():
    async with running_relay() as server:
        with (
            moves(server, 'relay_registrations_total', 2),
            moves(server, 'relay_displaced_registrations_total', 1),
        ):
            async with registered(server, A) as old, registered(server, A) as peer:
                # Again on the same connection is nothing new.
                await peer.ask(peer.registration())
                await old.closed_with()


@run_async
async def test_messages_and_their_bytes_are_counted():
    async with running_relay() as server, registered(server, A) as one:
        text = json.dumps(one.offer(A, description='\u00e9' * 100), ensure_ascii=False)
        with (
            moves(server, 'relay_forwarded_messages_total', 3),
            moves(server, 'relay_forwarded_bytes_total', 3 * len(text.encode())),
        ):
            for _ in range(3):
                await one.ask(text)


@run_async
async def test_returned_messages_are_counted_by_reason():
    async with running_relay() as server, registered(server, A) as one:
        with moves(server, refused('unknown_peer')):
            await one.ask(one.offer(B))
        with moves(server, refused('forged_source')):
            await one.ask({**one.offer(A), 'source_uuid': str(B)})
        with moves(server, refused('malformed'), 2):
            await one.ask('{}')
            await one.ask({'message_type': 'server_response', **one.response()})
        async with registered(server, B) as peer:
            stall(peer)
            with moves(server, refused('backlog')):
                await fill_backlog(one, B)
            peer.websocket.transport.abort()


@run_async
async def test_connections_that_are_ended_are_counted_by_their_reason(monkeypatch, tokens):
    monkeypatch.setattr(relay, 'REGISTER_TIMEOUT', 0.05)
    async with running_relay(max_clients=1) as server:
        with moves(server, refused('never_registered')):
            async with connected(server) as peer:
                assert await peer.closed_with() == 1008
                await until(lambda: not server._websocket_to_client)
        async with registered(server, A) as peer:
            with moves(server, refused('full')):
                async with connected(server) as other:
                    assert await other.closed_with() == 1013
            with moves(server, refused('too_large')):
                await peer.say('x' * (relay.MAX_MESSAGE + 1))
                assert await peer.closed_with() == 1009
                await until(lambda: not server._websocket_to_client)
    async with running_relay(tokens=tokens) as server:
        with moves(server, refused('unauthorized')):
            with pytest.raises(InvalidStatus):
                await open_websocket(server.url)


@run_async
async def test_frames_that_break_the_rules_are_counted_as_malformed():
    async with running_relay() as server, registered(server, A) as peer:
        with moves(server, refused('malformed')):
            # A text frame, masked, that is not UTF-8.
            peer.websocket.transport.write(b'\x81\x81\0\0\0\0\xff')
            assert await peer.closed_with() == 1007
            await until(lambda: not server._websocket_to_client)


@run_async
async def test_messages_that_wait_for_the_rate_are_counted():
    async with running_relay(rate=100) as server, registered(server, A) as peer:
        with moves(server, refused('rate_paced'), 0):
            await peer.ask(peer.registration())
        # A second's worth, of which a tenth may come at once.
        for _ in range(20):
            await peer.ask(peer.registration())
        assert samples(server)[refused('rate_paced')] > 0


@run_async
async def test_connections_that_answer_no_ping_are_counted():
    limits = {'ping_interval': 0.05, 'ping_timeout': 0.05, 'close_timeout': 0.05}
    async with running_relay(**limits) as server, registered(server, A) as peer:
        with moves(server, 'relay_pings_unanswered_total'):
            stall(peer)
            await until(lambda: not server._websocket_to_client)
        peer.websocket.transport.abort()


def test_the_process_is_measured_under_the_standard_names():
    values = samples(RelayServer())
    assert values['process_cpu_seconds_total'] > 0
    assert values['process_resident_memory_bytes'] > 2**20
    assert 3 < values['process_open_fds'] < values['process_max_fds']
    assert 0 <= time.time() - values['process_start_time_seconds'] < 60
    assert 0 <= values['relay_uptime_seconds'] < 60


@pytest.mark.parametrize('year', [2027, 2063])
def test_the_expiry_of_the_certificate_is_a_metric(year, pem, tmp_path):
    days = (year - time.gmtime().tm_year) * 365
    subprocess.run(
        ['openssl', 'req', '-x509', '-new', '-key', pem / 'cert.key', '-subj', '/CN=localhost']
        + ['-days', str(days), '-out', tmp_path / 'cert.pem'],
        check=True,
        capture_output=True,
    )
    command = ['openssl', 'x509', '-in', tmp_path / 'cert.pem', '-noout', '-enddate']
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    end = ssl.cert_time_to_seconds(told.strip().partition('=')[2])
    # The first certificate of the file is the relay's own, whatever stands before it.
    chain = [pem / 'cert.key', tmp_path / 'cert.pem', pem / 'other.pem']
    (tmp_path / 'chain.pem').write_text('about us\n' + ''.join(p.read_text() for p in chain))
    server = RelayServer()
    assert 'relay_certificate_expiry_timestamp_seconds' not in samples(server)
    server.certificate_expiry = relay.expiry_of(str(tmp_path / 'chain.pem'))
    assert samples(server)['relay_certificate_expiry_timestamp_seconds'] == end


@run_async
async def test_the_expiry_of_the_certificate_is_known_from_the_start_and_after_a_reload(
    pem, tmp_path
):
    cert, key = tmp_path / 'cert.pem', str(pem / 'cert.key')
    cert.write_text((pem / 'cert.pem').read_text())
    name = 'relay_certificate_expiry_timestamp_seconds'
    with running_program('--metrics-port', '0', '--certfile', cert, '--keyfile', key) as process:
        port = int(re.search(r':(\d+)$', process.stdout.readline())[1])
        first = re.search(rf'(?m)^{name} (.*)', (await fetch(port))[1])[1]
        command = ['openssl', 'req', '-x509', '-new', '-key', key, '-subj', '/CN=localhost']
        subprocess.run([*command, '-days', '9', '-out', cert], check=True, capture_output=True)
        process.send_signal(signal.SIGHUP)
        while 'Reloaded' not in process.stdout.readline():
            pass
        second = re.search(rf'(?m)^{name} (.*)', (await fetch(port))[1])[1]
    assert 6 * 86400 < float(second) - float(first) < 8 * 86400


@pytest.mark.parametrize(
    'usec, delay',
    [('30000000', 15), ('1', 0.01), ('', 30), ('-5', 30), ('rubbish', 30), ('9' * 400, 30)],
)
def test_the_watchdog_is_notified_twice_in_its_period(usec, delay, monkeypatch):
    periods = []
    loop = SimpleNamespace(call_later=lambda delay, *_: periods.append(delay))
    monkeypatch.setattr(relay, 'asyncio', SimpleNamespace(get_running_loop=lambda: loop))
    monkeypatch.setenv('WATCHDOG_USEC', usec)
    relay.beat(RelayServer())
    assert periods == [delay]


@pytest.fixture(params=['path', 'abstract'])
def systemd(request, tmp_path, monkeypatch):
    """A socket that a program is told to notify."""
    name = f'\0relay-{uuid4()}' if request.param == 'abstract' else str(tmp_path / 'notify')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        sock.settimeout(8)
        monkeypatch.setenv('NOTIFY_SOCKET', name.replace('\0', '@'))
        yield sock


def heard(sock, word):
    """Return the first notification that holds a word."""
    while word not in (text := sock.recv(4096).decode()):
        pass
    return text


def test_systemd_is_notified_of_start_status_and_stop(systemd, monkeypatch):
    monkeypatch.setenv('WATCHDOG_USEC', '200000')
    with running_program('--host', '127.0.0.1') as process:
        heard(systemd, 'READY=1')
        with socket.create_connection(('127.0.0.1', process.ports[0])):
            pass
        began = time.monotonic()
        for _ in range(3):
            assert heard(systemd, 'WATCHDOG=1').split('\n')[1].startswith('STATUS=0 clients, ')
        # At half of what it is given, so that none is late.
        assert time.monotonic() - began >= 0.15
        process.send_signal(signal.SIGHUP)
        reloading = heard(systemd, 'RELOADING=1')
        microseconds = int(re.fullmatch(r'RELOADING=1\nMONOTONIC_USEC=(\d+)', reloading)[1])
        assert 0 <= time.monotonic() - microseconds / 1e6 < 5
        heard(systemd, 'READY=1')
        process.terminate()
        heard(systemd, 'STOPPING=1')


def test_systemd_is_notified_after_a_failed_reload(systemd, tokens):
    with running_program('--token-file', tokens) as process:
        heard(systemd, 'READY=1')
        Path(tokens).write_text('nonsense\n')
        process.send_signal(signal.SIGHUP)
        heard(systemd, 'RELOADING=1')
        heard(systemd, 'READY=1')


def test_a_systemd_that_does_not_listen_does_no_harm(monkeypatch, tmp_path):
    monkeypatch.setenv('NOTIFY_SOCKET', str(tmp_path / 'nobody'))
    with running_program() as process:
        process.send_signal(signal.SIGHUP)
        while 'Reloaded' not in (line := process.stdout.readline()):
            assert line


@pytest.mark.parametrize(
    'seconds, span',
    [(0, '0:00:00'), (119, '0:01:59'), (41 * 86400 + 7200, '41 days, 2:00:00')],
)
@run_async
async def test_the_status_is_a_line_for_people(seconds, span, monkeypatch):
    told = []
    monkeypatch.setattr(relay, 'notify', lambda *states: told.extend(states))
    server = RelayServer()
    server.counts['forwarded_messages'] = 3456
    server.started -= seconds
    relay.beat(server)
    assert told[1] == f'STATUS=0 clients, 3,456 messages forwarded, up {span}'


def test_lines_for_the_journal_have_a_level_and_no_time():
    record = logging.LogRecord('relay', logging.ERROR, '', 0, 'one\ntwo', (), None)
    assert relay.JournalFormatter('%(message)s').format(record) == '<3>one\n<3>two'


def test_the_log_has_the_format_of_the_journal_if_it_goes_there(tmp_path):
    log = tmp_path / 'journal'
    with open(log, 'w') as file:
        stat = os.fstat(file.fileno())
        for stream, form in ((f'{stat.st_dev}:{stat.st_ino}', '<4>No --tok'), ('7:7', '[')):
            command = [sys.executable, HERE / 'relay.py', '--port', '0', '--host', '127.0.0.1']
            environment = {**os.environ, 'JOURNAL_STREAM': stream}
            with subprocess.Popen(command, stdout=file, env=environment) as process:
                with ended_in_time(process):
                    while 'No --tok' not in log.read_text():
                        assert process.poll() is None
                    process.terminate()
            assert log.read_text().splitlines()[1].startswith(form)
            file.truncate(0)
            file.seek(0)


# ------------------------------------------------------------------------------- Upgrade
#
# From outside: a copy of relay.py runs as a process. It is changed on disk, and SIGUSR2 has the
# process go on with what is there.

on_linux = pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
run_upgrades = run_within(60)
UPGRADES = 8  # in a row, to see whether one leaves something behind


def waiting(when):
    """Return a change to relay.py: a new version that waits until a test lets it go on."""
    code = f"""
import os, time
if {when}:
    open('waiting', 'w').close()
    while not os.path.exists('go'):
        time.sleep(0.01)
import argparse
"""
    return 'import argparse\n', code


TRYING, RESTORING = (
    waiting("'RELAY_TRIAL' in os.environ"),
    waiting("'RELAY_TRIAL' not in os.environ"),
)


class Program:
    """A copy of relay.py in a folder, which runs as a process."""

    def __init__(self, folder, options, edits):
        self.folder, self.log, self.errors = folder, folder / 'out', folder / 'err'
        self.edits = edits
        self.install(relay.__version__)
        command = [sys.executable, '-W', 'error', 'relay.py', '--port', '0', *options]
        with self.log.open('w') as out, self.errors.open('w') as err:
            self.process = subprocess.Popen(
                [*command, '--metrics-port', '0'],
                cwd=folder,
                stdout=out,
                stderr=err,
            )

    def install(self, version, *edits):
        """Put a version of relay.py where the process has found its own, with some changes."""
        text = (HERE / 'relay.py').read_text()
        version = f"__version__ = '{relay.__version__}'", f"__version__ = '{version}'"
        for old, new in (version, *self.edits, *edits):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (self.folder / 'relay.py').write_text(text)

    def lines(self, word):
        """Return the lines of the log that hold a word, without the time and level."""
        lines = [line for line in self.log.read_text().splitlines() if word in line]
        return [line.partition(' :: ')[2] or line for line in lines]

    async def logs(self, word, count=1):
        """Wait until so many lines of the log hold a word, and return the last of them."""
        while len(self.lines(word)) < count:
            text = self.log.read_text() + self.errors.read_text()
            assert self.process.poll() is None or len(self.lines(word)) >= count, text
            await asyncio.sleep(0.005)
        return self.lines(word)[count - 1]

    async def signal(self, number, word):
        """Send a signal, and return the next line of the log that holds a word."""
        count = len(self.lines(word)) + 1
        self.process.send_signal(number)
        return await self.logs(word, count)

    async def upgrade(self, version='9.0.0', *edits):
        """Upgrade the process, and return what it says of that."""
        self.install(version, *edits)
        return await self.signal(signal.SIGUSR2, 'Upgraded ')

    @contextlib.asynccontextmanager
    async def gap(self, edit=RESTORING):
        """Upgrade the process; what is done meanwhile is done when it serves nobody."""
        count = len(self.lines('Upgraded ')) + 1
        self.install('9.0.0', edit)
        self.process.send_signal(signal.SIGUSR2)
        await until((self.folder / 'waiting').exists)
        yield
        (self.folder / 'go').touch()
        await self.logs('Upgraded ', count)

    async def samples(self):
        """Return the value of each metric by its name."""
        text = (await fetch(self.metrics_port))[1]
        lines = [line.rsplit(' ', 1) for line in text.splitlines() if line[0] != '#']
        return {name: float(value) for name, value in lines}

    def descriptors(self):
        """Return what each open file of the process is."""
        folder = Path(f'/proc/{self.process.pid}/fd')
        return {path.name: os.readlink(path) for path in folder.iterdir()}

    def listening(self):
        """Return the sockets on which the process listens, which have numbers of their own."""
        rows = ''.join(Path(f'/proc/net/{name}').read_text() for name in ('tcp', 'tcp6'))
        rows = [row.split() for row in rows.splitlines()]
        sockets = {f'socket:[{row[9]}]' for row in rows if row[3] == '0A'}
        return sockets & set(self.descriptors().values())


@contextlib.asynccontextmanager
async def upgradable(folder, *options, host='127.0.0.1', edits=()):
    """Run a copy of relay.py as a process; yields it once it serves."""
    program = Program(folder, ['--host', host, *options], edits)
    try:
        line = await program.logs('Serving metrics on ')
        program.metrics_port = int(line.rpartition(':')[2])
        lines = program.lines('Serving relay server on ')
        program.ports = [int(line.rpartition(':')[2]) for line in lines]
        scheme = 'wss' if '--certfile' in options else 'ws'
        program.url = f'{scheme}://127.0.0.1:{program.ports[0]}'
        yield program
        assert program.errors.read_text() == ''
    finally:
        program.process.kill()
        program.process.wait()


async def numbered(sender, receiver, stop):
    """Send numbered messages until told to stop; see each arrive once, and in order."""
    window = asyncio.Semaphore(8)

    async def send():
        for number in itertools.count():
            await window.acquire()
            last = stop.is_set()
            await sender.say(sender.offer(receiver.uuid, description=f'{number} {last}'))
            if last:
                return

    sending = asyncio.ensure_future(send())
    try:
        for number in itertools.count():
            message = await receiver.hear()
            assert message['error'] is None
            assert message['description'].split()[0] == str(number)
            window.release()
            if message['description'].endswith('True'):
                return number
    finally:
        sending.cancel()


@contextlib.asynccontextmanager
async def talking(*pairs):
    """Have pairs send each other numbered messages meanwhile; in the end see that all arrived."""
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
    """Connect two clients."""
    async with registered(server, uuid4(), **options) as one:
        async with registered(server, uuid4(), generation='relay', **options) as other:
            yield one, other


@run_upgrades
async def test_an_upgrade_says_what_it_did(tmp_path):
    async with upgradable(tmp_path) as program, pair_of(program) as pair:
        line = await program.upgrade('7.8.9')
        old = re.escape(relay.__version__)
        assert re.fullmatch(
            rf'Upgraded {old} to 7\.8\.9 in \d+\.\d\d s: 2 clients kept, 0 closed', line
        )
        assert ' INFO ' in program.log.read_text().splitlines()[-1]
        await exchange(*pair)


@run_upgrades
async def test_pairs_lose_nothing_over_several_upgrades(tmp_path):
    async with upgradable(tmp_path) as program, contextlib.AsyncExitStack() as stack:
        pid = program.process.pid
        pairs = [await stack.enter_async_context(pair_of(program)) for _ in range(5)]
        async with talking(*pairs):
            for number in range(3):
                line = await program.upgrade(f'9.{number}')
                assert line.endswith(': 10 clients kept, 0 closed')
        assert program.process.poll() is None and program.process.pid == pid
        values = await program.samples()
        assert values['relay_connected_clients'] == 10
        assert values['relay_registered_clients{generation="relay"}'] == 5


# What a client has begun to send, by name: all of it, and how much of it comes before the upgrade.
BEGUN = {
    **{f'{cut} bytes': (lambda text: said(text), cut) for cut in (1, 2, 3, 5, 8, 9, 150, 399)},
    'a fragment': (lambda text: frame_of(TEXT, text[:99], 0) + frame_of(CONT, text[99:]), 107),
    'a fragment and some': (
        lambda text: frame_of(TEXT, text[:99], 0) + frame_of(CONT, text[99:]),
        130,
    ),
    'a fragment and a ping': (
        lambda text: frame_of(TEXT, text[:99], 0) + frame_of(PING) + frame_of(CONT, text[99:]),
        109,
    ),
    'an empty fragment': (lambda text: frame_of(TEXT, b'', 0) + frame_of(CONT, text), 6),
    'two fragments': (
        lambda text: (
            frame_of(TEXT, text[:9], 0) + frame_of(CONT, text[9:30], 0) + frame_of(CONT, text[30:])
        ),
        15 + 27,
    ),
    'half a character': (
        lambda text: (
            frame_of(TEXT, text[: text.index(b'\xc3') + 1], 0)
            + frame_of(CONT, text[text.index(b'\xc3') + 1 :])
        ),
        300,
    ),
}


@run_upgrades
async def test_an_upgrade_keeps_incomplete_messages(tmp_path):
    async with upgradable(tmp_path) as program, contextlib.AsyncExitStack() as stack:
        begun = []
        for make, cut in BEGUN.values():
            wire = await (await stack.enter_async_context(wired(program))).register()
            offer = wire.peer.offer(wire.peer.uuid, description='x' * 99 + '\u00e9' * 99)
            data = make(json.dumps(offer, ensure_ascii=False).encode())
            wire.send(data[:cut])
            begun.append((wire, offer, data[cut:]))
        await until_read(program)
        line = await program.upgrade()
        assert line.endswith(f': {len(BEGUN)} clients kept, 0 closed')
        for name, (wire, offer, rest) in zip(BEGUN, begun):
            wire.send(rest)
            opcode, data = await wire.frame()
            if opcode == PONG:
                opcode, data = await wire.frame()
            assert (opcode, json.loads(data)) == (TEXT, offer), name


async def until_read(program):
    """Wait until the relay has read what clients have sent: it reads all sockets in a turn."""
    for _ in range(2):
        await program.samples()


@run_upgrades
async def test_the_limit_of_a_message_counts_its_fragments_before_the_upgrade(tmp_path):
    async with upgradable(tmp_path) as program, wired(program) as wire:
        await wire.register()
        wire.send(frame_of(TEXT, b'x' * 700_000, 0))
        await until_read(program)
        await program.upgrade()
        wire.send(frame_of(CONT, b'x' * 700_000, 0))
        assert (await wire.end())[1] == 1009


@run_upgrades
async def test_messages_that_wait_for_their_rate_are_kept(tmp_path):
    async with upgradable(tmp_path, '--rate', '200') as program, pair_of(program) as (one, other):
        window, upgraded = asyncio.Semaphore(200), asyncio.Event()

        async def send():
            count = 0
            while not upgraded.is_set():
                await window.acquire()
                await one.say(one.offer(other.uuid, description=str(count)))
                count += 1
            return count

        async def hear():
            count = 0
            while not (sending.done() and count == sending.result()):
                assert (await other.hear())['description'] == str(count)
                count += 1
                window.release()
            return count

        sending = asyncio.ensure_future(send())
        hearing = asyncio.ensure_future(hear())
        await program.upgrade()
        upgraded.set()
        assert await hearing > 200


@run_upgrades
async def test_a_registration_that_waits_for_a_takeover_is_kept(tmp_path):
    # Longer than an upgrade takes, so that it falls into one.
    slow = ('TAKEOVER_TIMEOUT = 0.5', 'TAKEOVER_TIMEOUT = 20')
    async with upgradable(tmp_path, edits=[slow]) as program, wired(program) as old:
        await old.register()
        async with wired(program) as new:
            new.send(said(json.dumps(old.peer.registration())))
            assert (await old.frame())[0] == CLOSE  # which it does not answer
            await program.upgrade('9.0.0')
            assert await new.hear() == old.peer.response()
            async with registered(program, uuid4()) as peer:
                await peer.say(offer := peer.offer(old.peer.uuid))
                assert await new.hear() == offer


@run_upgrades
async def test_an_upgrade_does_not_restart_the_time_to_register(tmp_path):
    limit = ('REGISTER_TIMEOUT = 30', 'REGISTER_TIMEOUT = 3')
    async with upgradable(tmp_path, edits=[limit]) as program:
        began = time.monotonic()
        async with wired(program) as late, wired(program) as early:
            await program.upgrade()
            took = time.monotonic() - began
            if took < 2.5:
                await early.register()
            assert await late.frame() == (CLOSE, code_of(1008, b'not registered within 3 s'))
            # Not before its time, and before a new term would have passed.
            assert 2.9 < time.monotonic() - began < took + 3


@run_upgrades
async def test_a_client_that_does_not_read_gets_all_of_it_after_the_upgrade(tmp_path):
    async with upgradable(tmp_path) as program, registered(program, A) as sender:
        async with wired(program, narrow=True) as slow:
            await slow.register()
            slow.stall()
            for number in range(25):
                description = f'{number} ' + chr(97 + number) * 40_000
                await sender.say(sender.offer(slow.peer.uuid, description=description))
            await sender.ask(sender.offer(A))  # so these have been dealt with
            assert (await program.samples())['relay_buffered_bytes'] > 500_000
            assert (await program.upgrade()).endswith(': 2 clients kept, 0 closed')
            assert (await program.samples())['relay_buffered_bytes'] > 500_000
            await sender.say(sender.offer(slow.peer.uuid, description='25 '))
            slow.writer.transport.resume_reading()
            for number in range(26):
                description = (await slow.hear())['description']
                assert description.startswith(f'{number} ')
                assert set(description.split()[-1]) <= {chr(97 + number), '2', '5'}


@pytest.mark.parametrize('code', [1001, 1002, 1009])
@run_upgrades
async def test_a_closing_client_that_does_not_read_gets_its_messages_and_its_code(tmp_path, code):
    async with upgradable(tmp_path) as program, registered(program, A) as sender:
        async with wired(program, narrow=True) as slow, contextlib.AsyncExitStack() as stack:
            await slow.register()
            slow.stall()
            offer = sender.offer(slow.peer.uuid, description='x' * 40_000)
            for _ in range(20):
                await sender.say(offer)
            await sender.ask(sender.offer(A))
            if code == 1001:
                await stack.enter_async_context(registered(program, slow.peer.uuid))
            elif code == 1002:
                slow.send(frame_of(3))
            else:
                slow.send(frame_of(TEXT, length=2**21))
            await until_read(program)
            await program.upgrade()
            slow.writer.transport.resume_reading()
            frames, received = await slow.end()
            assert [json.loads(data) for _, data in frames] == [offer] * 20
            assert received == code


@run_upgrades
async def test_a_client_that_closes_after_the_upgrade_is_answered_as_before(tmp_path):
    async with upgradable(tmp_path) as program, wired(program) as displaced:
        await displaced.register()
        async with registered(program, displaced.peer.uuid) as peer:
            await program.upgrade()
            assert (await displaced.frame())[0] == CLOSE
            displaced.send(said('ignored'), frame_of(CLOSE, code_of(1001)))
            assert await displaced.frame() is None
            displaced.finish()
            while (await program.samples())['relay_open_connections'] > 1:
                pass
            await exchange(peer, peer)


@on_linux
@run_upgrades
async def test_an_upgrade_reads_the_state_line_by_line(tmp_path):
    async with upgradable(tmp_path) as program, registered(program, A) as sender:
        async with contextlib.AsyncExitStack() as stack:
            enter = stack.enter_async_context
            for _ in range(24):
                slow = await (await enter(wired(program, narrow=True))).register()
                slow.stall()
                for _ in range(4):
                    await sender.say(sender.offer(slow.peer.uuid, description='x' * 250_000))
            await sender.ask(sender.offer(A))
            held = (await program.samples())['relay_buffered_bytes']
            await program.upgrade()
            assert (await program.samples())['relay_buffered_bytes'] > 2**24
            status = Path(f'/proc/{program.process.pid}/status').read_text()
            now, peak = (int(re.search(rf'{k}:\s+(\d+)', status)[1]) for k in ('VmRSS', 'VmHWM'))
            assert (peak - now) * 1024 < held / 2


@run_upgrades
async def test_a_newcomer_during_the_upgrade_waits_and_is_served(tmp_path):
    async with upgradable(tmp_path) as program, registered(program, A) as peer:
        async with program.gap():
            newcomer = asyncio.ensure_future(open_websocket(program.url))
            reader, writer = await asyncio.open_connection('127.0.0.1', program.ports[0])
            hasty = Wire(reader, writer)
            hasty.send(HANDSHAKE, said(json.dumps(hasty.peer.registration())))
        async with await newcomer as websocket:
            other = Peer(websocket, B)
            assert await other.ask(other.registration()) == other.response()
            await exchange(peer, other)
        while not (await reader.readline()).isspace():
            pass
        assert await hasty.hear() == hasty.peer.response()
        writer.close()


@run_upgrades
async def test_messages_sent_during_an_upgrade_are_handled_after_it(tmp_path):
    async with upgradable(tmp_path) as program, pair_of(program) as (one, other):
        async with contextlib.AsyncExitStack() as stack:
            enter = stack.enter_async_context
            wires = [await (await enter(wired(program))).register() for _ in range(3)]
            ended, reset, closing = wires
            async with program.gap():
                await one.say(offer := one.offer(other.uuid))
                ended.finish()
                reset.reset()
                closing.send(frame_of(CLOSE, code_of(1000)))
            assert await other.hear() == offer
            assert (await closing.end())[1] == 1000
            closing.finish()
            for wire in wires:
                await program.logs(f'Unregistered {wire.peer.uuid}')
            assert (await program.samples())['relay_connected_clients'] == 2
        await exchange(one, other)


@run_upgrades
async def test_only_clients_that_the_upgrade_closes_are_counted_as_closed(tmp_path):
    async with upgradable(tmp_path) as program, contextlib.AsyncExitStack() as stack:
        async with registered(program, A), program.gap(TRYING):
            peers = [await stack.enter_async_context(registered(program, uuid4())) for _ in '123']
        assert program.lines('Upgraded ')[0].endswith(': 4 clients kept, 0 closed')
        await program.logs(f'Unregistered {A}')
        async with pair_of(program), registered(program, A) as leaving:
            (tmp_path / 'go').unlink()
            (tmp_path / 'waiting').unlink()
            async with program.gap(TRYING):
                await leaving.websocket.close()
        assert program.lines('Upgraded ')[1].endswith(': 5 clients kept, 0 closed')
        await exchange(*peers[:2])


@on_linux
@pytest.mark.parametrize('host', ['', '::1', 'localhost'])
@run_upgrades
async def test_the_listening_sockets_are_the_same(tmp_path, host):
    if host == '::1' and not Path('/proc/net/if_inet6').read_text():
        pytest.skip('no IPv6 here')
    async with upgradable(tmp_path, host=host) as program:
        sockets = program.listening()
        assert len(sockets) == len(program.ports) + 1
        await program.upgrade()
        assert program.listening() == sockets
        addresses = [line.split()[-1] for line in program.lines('Serving relay server on ')]
        for address in addresses[: len(program.ports)]:
            where = address.replace('0.0.0.0', '127.0.0.1').replace('[::]', '[::1]')
            async with registered(SimpleNamespace(url=f'ws://{where}'), uuid4()) as peer:
                await exchange(peer, peer)


@run_upgrades
async def test_an_upgrade_keeps_the_metrics(tmp_path):
    async with upgradable(tmp_path, '--rate', '0') as program, pair_of(program) as pair:
        for _ in range(20):
            await exchange(*pair)
        await pair[0].ask('nope')
        async with registered(program, pair[0].uuid):
            await pair[0].closed_with()
            before = await program.samples()
            await program.upgrade('7.8.9')
            after = await program.samples()
    names = [name for name in before if name.endswith('_total') or '_total{' in name]
    names.remove('process_cpu_seconds_total')
    names += ['process_start_time_seconds', 'process_max_fds', 'relay_connected_clients']
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert after['relay_uptime_seconds'] > before['relay_uptime_seconds']
    assert after['relay_forwarded_messages_total'] == 40
    info = [name for name in after if name.startswith('relay_build_info')]
    assert len(info) == 1 and 'version="7.8.9"' in info[0]


@run_upgrades
async def test_an_upgrade_continues_the_log_file(tmp_path):
    async with upgradable(tmp_path, '--log-dir', 'logs') as program, registered(program, A):
        await program.upgrade()
        async with registered(program, B):
            pass
        await program.logs(f'Unregistered {B}')
        assert (tmp_path / 'logs/server.log').read_text() == program.log.read_text()


@run_upgrades
async def test_an_upgrade_closes_clients_over_tls_with_1012(tmp_path, pem):
    options = '--certfile', str(pem / 'cert.pem'), '--keyfile', str(pem / 'cert.key')
    tls = {'ssl': trusting(pem)}
    async with upgradable(tmp_path, *options) as program:
        async with registered(program, A, **tls) as peer, connected(program, **tls) as other:
            before = await program.samples()
            line = await program.upgrade()
            assert line.endswith(': 0 clients kept, 2 closed')
            assert await peer.closed_with() == await other.closed_with() == 1012
        after = await program.samples()
        name = 'relay_certificate_expiry_timestamp_seconds'
        assert after[name] == before[name]
        async with registered(program, A, **tls) as peer:
            await exchange(peer, peer)


# What is wrong with a new version, by name: a change to relay.py, and what the log says of it.
WRONG = {
    'syntax': (('import argparse\n', 'import argparse import\n'), 'SyntaxError'),
    'a package': (('import argparse\n', 'import argparse, no_such_package\n'), 'no_such_package'),
    'an option': (("    add('--rate'", "    add('--pace'"), '--rate'),
    'an exception': (
        ('import argparse\n', "raise ValueError('in vain')\n"),
        'ValueError: in vain',
    ),
    'its words': (('import argparse\n', "raise SystemExit('\\x1b[2J' + 'x' * 9999)\n"), 'xxx'),
    'no words': (('import argparse\n', 'raise SystemExit(3)\n'), 'status 3'),
    'its death': (('import argparse\n', 'import os; os.abort()\n'), 'status -6'),
}


async def is_refused(program, pair):
    """See that the program tells in a line why it does not upgrade, and that it goes on."""
    count = len(program.log.read_text().splitlines())
    line = await program.signal(signal.SIGUSR2, 'Upgrade failed')
    assert line.startswith('Upgrade failed, the running version goes on: ')
    assert line.isprintable() and len(line) < 700
    await exchange(*pair)
    lines = program.log.read_text().splitlines()[count:]
    assert len(lines) == 1 and ' ERROR ' in lines[0], lines
    version = f'version="{relay.__version__}"'
    assert any(version in name for name in await program.samples())
    return line


@pytest.mark.parametrize('edit, reason', WRONG.values(), ids=WRONG)
@run_upgrades
async def test_a_version_that_does_not_start_changes_nothing(tmp_path, edit, reason):
    async with upgradable(tmp_path, '--rate', '9') as program, pair_of(program) as pair:
        program.install('9.0.0', edit)
        assert reason in await is_refused(program, pair)
        assert (await program.upgrade()).endswith(': 2 clients kept, 0 closed')


@on_linux
@run_upgrades
async def test_a_state_that_cannot_be_read_is_one_line_and_the_relay_starts_empty(tmp_path):
    number = re.search(r'(?m)^STATE_VERSION = (\d+)$', (HERE / 'relay.py').read_text())[1]
    edit = f'STATE_VERSION = {number}\n', 'STATE_VERSION = 99\n'
    with port_to_come() as port:
        async with upgradable(tmp_path, '--port', str(port)) as program:
            async with pair_of(program) as pair, wired(program) as wire:
                await wire.register()
                program.install('9.0.0', edit)
                line = await program.signal(signal.SIGUSR2, ' ERROR ')
                assert line.startswith(
                    'Upgraded without the clients, their state cannot be read: '
                )
                await program.logs('Serving relay server on ', 2)
                for peer in pair:
                    await peer.close_frame()
                assert (await wire.end())[1] in (None, 1012)
            assert len(program.lines(' ERROR ')) == 1
            await program.logs('No --token-file', 2)
            async with registered(program, A) as peer:
                await exchange(peer, peer)
            assert len(program.listening()) == 2


@run_upgrades
async def test_a_client_that_cannot_be_restored_costs_only_itself(tmp_path):
    broken = (
        'def restore_connection(listener: Listener, saved: dict[str, Any]) -> None:\n',
        'def restore_connection(listener: Listener, saved: dict[str, Any]) -> None:\n'
        "    if saved['name'] == 'broken':\n"
        "        del saved['address']\n",
    )
    async with upgradable(tmp_path) as program, pair_of(program) as pair:
        async with registered(program, A, 'broken') as peer:
            line = await program.upgrade('9.0.0', broken)
            assert line.endswith(': 2 clients kept, 1 closed')
            await peer.close_frame()
        assert len(program.lines(' ERROR ')) == 1
        await exchange(*pair)
        assert (await program.samples())['relay_connected_clients'] == 2


@run_upgrades
async def test_a_file_that_is_missing_changes_nothing(tmp_path):
    async with upgradable(tmp_path) as program, pair_of(program) as pair:
        (tmp_path / 'relay.py').unlink()
        assert 'relay.py' in await is_refused(program, pair)


@run_upgrades
async def test_a_token_file_that_is_wrong_changes_nothing(tmp_path, tokens):
    async with upgradable(tmp_path, '--token-file', tokens) as program:
        async with pair_of(program, **bearer('a1')) as pair:
            right = Path(tokens).read_text()
            Path(tokens).write_text('nonsense\n')
            assert 'not in the form user:token' in await is_refused(program, pair)
            Path(tokens).write_text(right)
            await program.upgrade()
            await exchange(*pair)


@run_upgrades
async def test_users_are_kept_apart_after_the_upgrade(tmp_path, tokens):
    async with upgradable(tmp_path, '--token-file', tokens) as program:
        async with registered(program, A, **bearer('a1')) as alice:
            async with registered(program, A, **bearer('b1')) as bob:
                await program.upgrade()
                await exchange(alice, alice)
                await exchange(bob, bob)
                assert (await alice.ask(alice.offer(B)))['error'] == unknown(B)


@run_upgrades
async def test_a_token_that_was_removed_before_the_upgrade_closes_its_clients(tmp_path, tokens):
    async with upgradable(tmp_path, '--token-file', tokens) as program:
        async with pair_of(program, **bearer('a1')) as pair:
            async with registered(program, B, **bearer('b1')) as bob:
                Path(tokens).write_text('alice:a1\n')
                await program.upgrade()
                assert await bob.closed_with() == 1008
                await exchange(*pair)


@on_linux
@run_upgrades
async def test_upgrades_leave_nothing_behind(tmp_path):
    async with upgradable(tmp_path) as program, pair_of(program) as pair:
        seen = []
        for number in range(UPGRADES):
            async with registered(program, uuid4()) as leaving:
                await exchange(pair[0], leaving)
                await program.upgrade(f'9.{number}')
            await program.logs(f'Unregistered {leaving.uuid}')
            memory = (await program.samples())['process_resident_memory_bytes']
            kinds = [re.sub(r'\d+', '', name) for name in program.descriptors().values()]
            seen.append((memory, sorted(kinds)))
        assert [files for _, files in seen] == [seen[0][1]] * UPGRADES
        assert abs(seen[-1][0] - seen[1][0]) < 2**21, [memory for memory, _ in seen]
        await exchange(*pair)


@pytest.mark.parametrize('signals', ['UU', 'UUUUU', 'UH', 'HU', 'HUHUH'])
@run_upgrades
async def test_signals_upon_signals_do_no_harm(tmp_path, signals):
    numbers = {'U': signal.SIGUSR2, 'H': signal.SIGHUP}
    async with upgradable(tmp_path) as program, pair_of(program) as pair:
        async with talking(pair):
            program.install('9.0.0')
            for letter in signals:
                program.process.send_signal(numbers[letter])
            await program.logs('Upgraded ')
        assert not program.lines('ERROR')
        await program.upgrade('9.1.0')
        await exchange(*pair)


@pytest.mark.parametrize('number', [signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM], ids=str)
@run_upgrades
async def test_a_signal_during_the_upgrade_does_not_kill(tmp_path, number):
    async with upgradable(tmp_path) as program, pair_of(program) as pair:
        async with program.gap():
            program.process.send_signal(number)
        if number == signal.SIGTERM:
            assert await pair[0].closed_with() == 1001
            await pair[1].closed_with()
            assert program.process.wait(20) == 0
        else:
            await exchange(*pair)


@pytest.mark.parametrize('stop', [signal.SIGTERM, signal.SIGINT], ids=str)
@run_upgrades
async def test_a_stop_wins_over_an_upgrade(tmp_path, stop):
    async with upgradable(tmp_path) as program, pair_of(program) as pair:
        # The new version takes its time to start.
        program.install(
            '9.0.0', ('import argparse\n', 'import time; time.sleep(9)\nimport argparse\n')
        )
        program.process.send_signal(signal.SIGUSR2)
        program.process.send_signal(stop)
        program.process.send_signal(signal.SIGUSR2)
        assert [await peer.closed_with() for peer in pair] == [1001, 1001]
        await until(lambda: program.process.poll() is not None)
        assert program.process.returncode == 0
        assert program.lines('')[-1] == 'Server closed'
        assert not program.lines('ERROR')


@run_upgrades
async def test_an_upgrade_without_clients_is_one(tmp_path):
    async with upgradable(tmp_path) as program:
        assert (await program.upgrade()).endswith(': 0 clients kept, 0 closed')
        async with registered(program, A) as peer:
            await exchange(peer, peer)


def test_a_relay_that_is_about_to_serve_is_not_killed_by_the_signal(tmp_path):
    os.mkfifo(tmp_path / 'tokens', 0o600)
    options = '--host', '127.0.0.1', '--port', '0', '--token-file', tmp_path / 'tokens'
    command = [sys.executable, HERE / 'relay.py', *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        with ended_in_time(process):
            with open(tmp_path / 'tokens', 'w') as file:  # it reads this before it serves
                process.send_signal(signal.SIGUSR2)
                file.write('alice:a1\n')
            assert 'Serving relay server' in process.stdout.readline()
            process.terminate()
            assert process.stdout.read().endswith('Server closed\n')


@run_upgrades
async def test_an_upgrade_notifies_systemd(tmp_path, systemd, monkeypatch):
    monkeypatch.setenv('WATCHDOG_USEC', '400000')
    async with upgradable(tmp_path) as program, pair_of(program) as pair:
        for _ in range(3):
            await exchange(*pair)
        await program.upgrade()
        told = []
        systemd.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                told.append(systemd.recv(4096).decode())
        assert not [text for text in told if 'STOPPING' in text]
        systemd.settimeout(8)
        status = heard(systemd, 'STATUS=')
        assert 'STATUS=2 clients, 6 messages forwarded, up 0:' in status


# ------------------------------------------------------------------------------- Check


async def check_line(*urls):
    """Return the line that a check ends with."""
    try:
        return await relay.check(*urls)
    except relay.StartError as error:
        return str(error)


@contextlib.asynccontextmanager
async def websocket_server(answer):
    """Answer each text with what a function returns, unless that is None; yields its URL."""

    async def handler(websocket):
        async for text in websocket:
            if (reply := answer(text)) is not None:
                await websocket.send(reply)

    async with websockets.asyncio.server.serve(handler, '127.0.0.1', 0) as listener:
        yield 'ws://127.0.0.1:%d' % listener.sockets[0].getsockname()[1]


@contextlib.asynccontextmanager
async def http_server(status):
    """Answer each request with a status, or not at all if that is None; yields its URL."""

    async def answer(reader, writer):
        await reader.readuntil(b'\r\n\r\n')
        if status is not None:
            writer.write(f'HTTP/1.1 {status} -\r\nContent-Length: 0\r\n\r\n'.encode())
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, '127.0.0.1', 0) as server:
        yield 'ws://127.0.0.1:%d' % server.sockets[0].getsockname()[1]


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
        yield 'ws://127.0.0.1:%d' % listener.sockets[0].getsockname()[1]


def refuse(text):
    return encode(ServerResponse(False, 'a\n\x1b[1mb', True))


def return_with_error(text):
    if 'registration' in text:
        return encode(ServerResponse())
    return encode(relay.replace(decode(text), error='unknown here'))


@run_async
async def test_check_connects_two_clients(tokens):
    async with running_relay(tokens=tokens) as server:
        place = server.url[5:]
        for url in (f'ws://alice:a1@{place}', f'ws://{place}?token=a1'):
            line = await check_line(url)
            expected = rf'ok: two clients connected through ws://{place} in \d+\.\d ms'
            assert re.fullmatch(expected, line)
        await until(lambda: not server._uuid_to_client)


@run_async
async def test_check_ignores_a_proxy_of_the_environment(monkeypatch):
    for name in ('http_proxy', 'https_proxy', 'all_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:1')
    monkeypatch.delenv('no_proxy', raising=False)
    async with running_relay() as server:
        assert (await check_line(server.url)).startswith('ok: ')


@run_async
async def test_check_says_how_long_the_certificate_is_valid(pem, monkeypatch):
    monkeypatch.setenv('SSL_CERT_FILE', str(pem / 'cert.pem'))
    tls = relay.tls_context(str(pem / 'cert.pem'), str(pem / 'cert.key'))
    async with running_relay(tls) as server:
        assert (await check_line(server.url)).endswith(' ms (certificate valid for 2 more days)')


@run_async
async def test_check_works_with_a_relay_of_proxystore_0_6_and_later():
    async with newer_relay() as url:
        assert (await check_line(url)).startswith('ok: ')


@pytest.mark.parametrize(
    'server, argument, reason',
    [
        (http_server, None, 'no WebSocket within 0.5 s; check the firewall, and that the relay '),
        (http_server, 401, 'HTTP 401; check the token in the address, and --token-file'),
        (http_server, 404, 'HTTP 404; there is no relay at this address'),
        (http_server, 426, 'HTTP 426; a proxy in front of the relay does not pass on the Upgrade'),
        (http_server, 502, 'HTTP 502; a proxy answers, but the relay behind it does not'),
        (http_server, 503, 'HTTP 503; a proxy answers, but the relay behind it does not'),
        (http_server, 504, 'HTTP 504; a proxy answers, but the relay behind it does not'),
        (websocket_server, lambda text: None, 'connected, but no answer within 0.5 s; check that'),
        (websocket_server, lambda text: text, 'an echo server, not a relay; check the address'),
        (websocket_server, lambda text: 'hi', 'a WebSocket server, but not a relay; check the'),
        (websocket_server, refuse, 'a\\n\\x1b[1mb; see the log of the relay'),
        (websocket_server, return_with_error, 'unknown here; see the log of the relay or, if'),
        (lambda count: running_relay(max_clients=count), 1, 'closed: received 1013 '),
    ],
)
@run_async
async def test_check_says_what_failed_and_where_to_look(server, argument, reason, monkeypatch):
    monkeypatch.setattr(relay, 'CHECK_TIMEOUT', 0.5)
    async with server(argument) as started:
        url = getattr(started, 'url', started)
        assert (await check_line(url)).startswith(f'{url}: {reason}')


@pytest.mark.parametrize(
    'url, reason',
    [
        ('ws://alice:secret@nowhere.invalid', 'ws://nowhere.invalid: [Errno -'),
        ('ws://alice:secret@127.0.0.1:1/?token=secret', 'ws://127.0.0.1:1/: [Errno '),
        ('ws://alice:secret@localhost:1', 'ws://localhost:1: '),
        ('ws://alice:sec\nret@127.0.0.1:1', 'ws://127.0.0.1:1: [Errno '),
        ('ws://127.0.0.1:1/?token=sec@ret', 'ws://127.0.0.1:1/: [Errno '),
        ('http://alice:secret@localhost', '--check: not an address such as wss://'),
        ('ws://alice:sec/ret@localhost:1', '--check: not an address such as wss://'),
        ('alice:secret@localhost:8765', '--check: not an address such as wss://'),
        ('ws://alice:secret', '--check: not an address such as wss://'),
        ('ws://127.0.0.1:99999', '--check: not an address such as wss://'),
        ('', '--check: not an address such as wss://'),
    ],
)
@run_async
async def test_check_that_cannot_connect_shows_no_token(url, reason):
    line = await check_line(url)
    assert line.startswith(reason)
    assert not re.search('secret|ret@|@ret|sec$', line, re.M), line


@run_async
async def test_check_says_that_a_certificate_is_self_signed(pem):
    tls = relay.tls_context(str(pem / 'cert.pem'), str(pem / 'cert.key'))
    async with running_relay(tls) as server:
        assert 'if it is self-signed, set SSL_CERT_FILE' in await check_line(server.url)


@run_async
async def test_check_says_that_tls_is_used_at_one_end_only(pem):
    hint = '; check the address, ws:// or wss://, and that the relay is running'
    tls = relay.tls_context(str(pem / 'cert.pem'), str(pem / 'cert.key'))
    async with running_relay(tls) as with_tls, running_relay() as without:
        for server in (with_tls, without):
            scheme = 'ws' if server is with_tls else 'wss'
            line = await check_line(re.sub('^wss?', scheme, server.url))
            assert line.endswith(hint)


@run_async
async def test_check_says_that_two_relays_need_nats():
    async with running_relay() as one, running_relay() as other:
        line = await check_line(one.url, other.url)
    assert line.startswith(f'{one.url} and {other.url}: Cannot forward ')
    assert line.endswith(
        'is unknown; see the log of the relay or, if there are several, check their --nats'
    )


def test_check_is_one_line_and_a_status():
    assert fails('--check', 'ws://127.0.0.1:1').startswith('relay.py: ws://127.0.0.1:1: [Errno ')
    with running_program('--host', '127.0.0.1') as process:
        command = [sys.executable, HERE / 'relay.py', '--check', process.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr, done.stdout.count('\n')) == (0, '', 1)


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


def test_a_check_that_is_interrupted_is_one_line():
    with socket.create_server(('127.0.0.1', 0)) as silent:
        url = 'ws://127.0.0.1:%d' % silent.getsockname()[1]
        command = [sys.executable, HERE / 'relay.py', '--check', url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            with ended_in_time(process), silent.accept()[0]:
                process.send_signal(signal.SIGINT)
                assert process.stderr.read() == 'relay.py: interrupted\n'
    assert process.returncode == 1


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


def said(message):
    """Return the bytes of a client's message."""
    return frame_of(TEXT, message.encode() if isinstance(message, str) else message)


def code_of(code, reason=b''):
    return code.to_bytes(2, 'big') + reason


class Wire:
    """A client that writes bytes, over TLS if it has a context, and reads frames."""

    def __init__(self, reader, writer, tls=None):
        self.reader, self.writer = reader, writer
        self.sent, self.received = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = tls and tls.wrap_bio(self.received, self.sent, server_hostname='localhost')
        self.peer = Peer(None, uuid4(), 'wire')

    def send(self, *data):
        data = b''.join(data)
        if self.tls and data:  # some versions of Python cannot write nothing
            self.tls.write(data)
            data = self.sent.read()
        self.writer.write(data)

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
            if self.tls:
                more = await self.step(self.tls.read, size - len(data))
            else:
                more = await self.reader.read(size - len(data))
            if not more:
                break
            data += more
        return bytes(data)

    async def open(self):
        self.send(HANDSHAKE)
        answer = b''
        while not answer.endswith(b'\r\n\r\n'):
            byte = await self.read(1)
            assert byte, answer
            answer += byte
        assert answer.startswith(b'HTTP/1.1 101 ')
        return self

    async def register(self):
        self.send(said(json.dumps(self.peer.registration())))
        assert await self.hear() == self.peer.response()
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
        opcode, data = await self.frame()
        assert opcode == TEXT
        return json.loads(data)

    async def end(self):
        """Read to the end: return what came before the close, and its code, None without."""
        frames, frame = [], await self.frame()
        while frame and frame[0] != CLOSE:
            frames.append(frame)
            frame = await self.frame()
        if frame is None:
            return frames, None
        # Nothing comes after a close, and the relay ends what it has to say.
        assert await self.read(1) == b''
        return frames, int.from_bytes(frame[1][:2], 'big')

    def finish(self):
        """End what is written, and go on reading."""
        self.writer.write_eof()

    def reset(self):
        sock = self.writer.get_extra_info('socket')
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
        self.writer.transport.abort()

    def stall(self):
        self.writer.transport.pause_reading()


@contextlib.asynccontextmanager
async def wired(server, tls=None, opened=True, narrow=False):
    """Connect to a relay with bytes; a narrow client has little room for what it does not read."""
    sock = socket.socket()
    if narrow:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect(('127.0.0.1', port_of(server)))
    reader, writer = await asyncio.open_connection(sock=sock)
    wire = Wire(reader, writer, tls)
    if tls:
        await wire.step(wire.tls.do_handshake)
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


async def piecemeal(server, wire, data, cut):
    """Have the relay read a beginning before the rest comes."""
    connection = await relay_side(server, wire)
    heard = connection.last_heard
    wire.send(data[:cut])
    while connection.last_heard == heard:
        await asyncio.sleep(0)
    wire.send(data[cut:])


async def relay_side(server, wire):
    """Return the relay's connection to a client, once it is made."""
    mine = wire.writer.get_extra_info('sockname')
    while True:
        for connection in server.listener.connections:
            if connection.remote_address == mine:
                return connection
        await asyncio.sleep(0)


def cuts(data):
    """Where to cut a frame: at every byte, but for what lies deep in a long one."""
    return [cut for cut in range(1, len(data)) if cut < 40 or cut > len(data) - 4]


# By name: bytes, and the frames they are answered with.
NOT_JSON = 'not JSON: Expecting value: line 1 column 1 (char 0)'
WELL_FORMED = {
    'a text': (said('x'), [NOT_JSON]),
    'an empty text': (said(''), [NOT_JSON]),
    'a longer text': (said('x' * 126), [NOT_JSON]),
    'a long text': (said('x' * 2**16), [NOT_JSON]),
    'a length longer than it need be': (b'\x81\xff' + bytes(7) + b'\1\0\0\0\0x', [NOT_JSON]),
    'a text of letters of two bytes': (said('\u00e9\u00e9'), [NOT_JSON]),
    'a letter in two fragments': (
        frame_of(TEXT, b'\xc3', 0) + frame_of(CONT, b'\xa9'),
        [NOT_JSON],
    ),
    'a text in fragments': (
        frame_of(TEXT, b'x', 0) + frame_of(CONT, b'', 0) + frame_of(CONT, b'y'),
        [NOT_JSON],
    ),
    'pings and pongs between fragments': (
        frame_of(TEXT, b'x', 0)
        + frame_of(PING, b'1')
        + frame_of(PONG, b'2')
        + frame_of(CONT, b'y', 0)
        + frame_of(PING, b'3')
        + frame_of(CONT),
        [b'1', b'3', NOT_JSON],
    ),
    'a binary message': (
        frame_of(BINARY, b'\xff'),
        ['a message must be a text frame, not a binary frame'],
    ),
    'a binary message in fragments': (
        frame_of(BINARY, b'\xff', 0) + frame_of(CONT, b'\xff'),
        ['a message must be a text frame, not a binary frame'],
    ),
    'a ping': (frame_of(PING, b'pong'), [b'pong']),
    'an empty ping': (frame_of(PING), [b'']),
    'a long ping': (frame_of(PING, b'x' * 125), [b'x' * 125]),
    'a pong that nobody asked for': (frame_of(PONG, b'?'), []),
}


async def answered(wire, answers):
    """See that answers come: reasons in texts, and pongs."""
    for answer in answers:
        if isinstance(answer, bytes):
            assert await wire.frame() == (PONG, answer)
        else:
            assert await wire.hear() == wire.peer.response(answer)


@run_async
async def test_a_request_may_come_in_pieces():
    async with running_relay() as server:
        for cut in range(1, len(HANDSHAKE)):
            async with wired(server, opened=False) as wire:
                await piecemeal(server, wire, HANDSHAKE, cut)
                assert (await wire.read(13)) == b'HTTP/1.1 101 '
        await until(lambda: not server.listener.connections)


@pytest.mark.parametrize('data, answers', WELL_FORMED.values(), ids=WELL_FORMED)
@run_async
async def test_a_frame_may_come_in_pieces(data, answers):
    async with running_relay() as server, wired(server) as wire:
        for cut in cuts(data):
            await piecemeal(server, wire, data, cut)
            await answered(wire, answers)
        wire.send(frame_of(PING, b'still here'))
        assert await wire.frame() == (PONG, b'still here')


@run_async
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


# What a close may hold.
CLOSES = {
    'without a code': b'',
    **{f'with {code}': code_of(code, b'why') for code in (1000, 1001, 1011, 3000, 4999)},
    'with a long reason': code_of(1000, b'x' * 123),
}


@pytest.mark.parametrize('data', CLOSES.values(), ids=CLOSES)
@run_async
async def test_a_close_is_echoed_wherever_it_is_cut(data):
    async with running_relay() as server, registered(server, A) as peer:
        for cut in cuts(frame_of(CLOSE, data)):
            async with wired(server) as wire:
                await piecemeal(server, wire, frame_of(CLOSE, data), cut)
                assert await wire.frame() == (CLOSE, data)
                assert await wire.read(1) == b''
                wire.writer.close()
        await alone(server, peer)


# By name: bytes that a connection is closed for, and with what code.
BROKEN = {
    'an unmasked text': (b'\x81\x02{}', 1002),
    'an unmasked ping': (b'\x89\0', 1002),
    'an unmasked close': (b'\x88\0', 1002),
    **{f'reserved bit {n}': (frame_of(TEXT, b'{}', LAST | n), 1002) for n in (64, 32, 16)},
    **{
        f'reserved opcode {opcode}': (frame_of(opcode, b'{}'), 1002)
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    },
    **{
        f'{fault} {name}': (frame_of(opcode, b'\3\xe8' + b'x' * size, head), 1002)
        for name, opcode in (('close', CLOSE), ('ping', PING), ('pong', PONG))
        for fault, size, head in (('too long a', 124, LAST), ('a fragment of a', 0, 0))
    },
    'a continuation of nothing': (frame_of(CONT, b'{}'), 1002),
    'a continuation of what has ended': (
        frame_of(TEXT, b'{', 0) + frame_of(CONT, b'}') + frame_of(CONT, b'{}'),
        1002,
    ),
    'a text inside a text': (frame_of(TEXT, b'{', 0) + frame_of(TEXT, b'}'), 1002),
    'a binary message inside a text': (frame_of(TEXT, b'{', 0) + frame_of(BINARY, b'}'), 1002),
    'a close inside a text': (frame_of(TEXT, b'{', 0) + frame_of(CLOSE, code_of(1000)), 1002),
    'bytes that are no UTF-8': (said(b'{\xff}'), 1007),
    'a letter that ends too early': (said(b'"\xe2\x82'), 1007),
    'a letter longer than it need be': (said(b'"\xc0\xaf"'), 1007),
    'half of a surrogate pair': (said(b'"\xed\xa0\x80"'), 1007),
    'no UTF-8 in fragments': (frame_of(TEXT, b'\xe2\x82', 0) + frame_of(CONT, b'}'), 1007),
    'half a letter in fragments': (frame_of(TEXT, b'\xe2', 0) + frame_of(CONT, b'\x82'), 1007),
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
    'a close with half a code': (frame_of(CLOSE, b'\3'), 1002),
    'a close with a reason that is no UTF-8': (frame_of(CLOSE, code_of(1000, b'\xff')), 1007),
}


@pytest.mark.parametrize('data, code', BROKEN.values(), ids=BROKEN)
@run_async
async def test_a_protocol_error_closes_with_its_code_and_the_rest_is_ignored(data, code):
    async with running_relay() as server, registered(server, A) as peer:
        async with wired(server) as wire:
            await wire.register()
            more = said(json.dumps(wire.peer.offer(A)))
            # The message before it counts, those after it do not.
            wire.send(more, data, more)
            frames, ended_with = await wire.end()
            assert ended_with == code
            # Only the whole text before 'a continuation of what has ended' is answered.
            answered = data == BROKEN['a continuation of what has ended'][0]
            assert [b'message_type must be' in text for _, text in frames] == [True] * answered
            wire.send(more)
            wire.writer.close()
            assert await peer.hear() == wire.peer.offer(A)
        # It would hear of an offer before that of its own.
        await alone(server, peer)


@run_async
async def test_after_its_close_nothing_that_a_client_says_does_anything():
    async with running_relay() as server, registered(server, A) as peer:
        async with wired(server) as wire:
            await wire.register()
            more = said(json.dumps(wire.peer.offer(A))) + frame_of(PING) + b'\xff\xff'
            wire.send(frame_of(CLOSE, code_of(1000)), more)
            wire.send(more)
            assert await wire.end() == ([], 1000)
            wire.writer.close()
        await alone(server, peer)


@run_async
async def test_after_the_close_of_the_relay_nothing_that_a_client_says_does_anything():
    async with running_relay() as server, registered(server, A) as peer:
        async with wired(server) as wire:
            await wire.register()
            await server.unregister(holder(server, wire.peer.uuid).websocket, expected=True)
            wire.send(said(json.dumps(wire.peer.registration())))
            wire.send(said(json.dumps(wire.peer.offer(A))), said(b'\xff'), frame_of(PING, b'?'))
            assert await wire.frame() == (CLOSE, code_of(1000))
            assert await wire.frame() == (PONG, b'?')
            wire.send(frame_of(CLOSE, code_of(1000)))
            assert await wire.frame() is None
            wire.writer.close()
        await alone(server, peer)


@pytest.mark.parametrize('rate', [0, 200])
@pytest.mark.parametrize('end', [frame_of(CLOSE, code_of(1000)), b''], ids=['close', 'EOF'])
@run_async
async def test_messages_before_an_immediate_close_or_end_are_forwarded(rate, end):
    async with running_relay(rate=rate) as server, registered(server, A) as peer:
        async with wired(server) as wire:
            await wire.register()
            offers = [wire.peer.offer(A, description=str(n)) for n in range(40)]
            wire.send(*[said(json.dumps(offer)) for offer in offers], end)
            wire.finish()
            assert [await peer.hear() for _ in offers] == offers
        await alone(server, peer)


@pytest.mark.parametrize('rate', [0, 2000])
@pytest.mark.parametrize('close', [frame_of(CLOSE, code_of(1000)), b''], ids=['close', ''])
@pytest.mark.parametrize('notify', [True, False], ids=['notify', ''])
@run_async
async def test_messages_before_a_tls_client_disconnects_are_forwarded(
    rate, close, notify, tls, pem
):
    trust = trusting(pem)
    async with running_relay(tls, rate=rate) as server, registered(server, A, ssl=trust) as peer:
        async with wired(server, trust) as wire:
            await wire.register()
            offers = [wire.peer.offer(A, description=f'{n:0500}') for n in range(200)]
            wire.send(*[said(json.dumps(offer)) for offer in offers], close)
            if notify:
                await tells_the_end_of_tls(wire)
            wire.finish()
            assert [await peer.hear() for _ in offers] == offers
        await alone(server, peer)


@pytest.mark.parametrize('cut', [0, 1, 2**19])
@run_async
async def test_a_message_may_have_as_many_bytes_as_the_limit(cut):
    async with running_relay() as server, wired(server) as wire:
        await wire.register()
        text = json.dumps(wire.peer.offer(wire.peer.uuid)).encode().ljust(2**20)
        wire.send(frame_of(TEXT, text[:cut], 0), frame_of(CONT, text[cut:]))
        assert await wire.frame() == (TEXT, text)


# What a client may send with its request, before it is answered.
EARLY = {
    'a ping': frame_of(PING),
    'a close': frame_of(CLOSE),
    'garbage': b'\xff\xff',
    'the same again': HANDSHAKE,
}


@pytest.mark.parametrize('early', EARLY.values(), ids=EARLY)
@run_async
async def test_frames_sent_with_the_request_are_handled_after_it(early, caplog):
    with logged(caplog):
        async with running_relay() as server, registered(server, A) as peer:
            async with wired(server, opened=False) as wire:
                wire.send(HANDSHAKE, early)
                assert await wire.read(13) == b'HTTP/1.1 101 '
                while not (await wire.reader.readline()).isspace():
                    pass
                opcode, _ = await wire.frame()
                assert opcode == (PONG if early == frame_of(PING) else CLOSE)
            answer = await http(server, b'GET /healthz HTTP/1.1\r\n\r\n' + early)
            assert answer.startswith(b'HTTP/1.1 200 ') and answer.endswith(b'\r\n\r\nok\n')
            await alone(server, peer)


@pytest.mark.parametrize('cut', range(-5, 0))
@run_async
async def test_a_blank_line_in_a_frame_does_not_end_a_request(cut, caplog):
    blank = frame_of(PING, bytes(a ^ b for a, b in zip(b'\r\n\r\n', KEY)))
    plain = HANDSHAKE.replace(b'Upgrade: websocket\r\n', b'')
    with logged(caplog):
        async with running_relay() as server:
            async with wired(server, opened=False) as wire:
                data = HANDSHAKE + frame_of(PING) + frame_of(CLOSE, code_of(1000)) + blank
                await piecemeal(server, wire, data, len(HANDSHAKE) + cut)
                assert await wire.read(13) == b'HTTP/1.1 101 '
                while not (await wire.reader.readline()).isspace():
                    pass
                assert await wire.end() == ([(PONG, b'')], 1000)
            # What a client says who is refused is not a message.
            async with wired(server, opened=False) as wire:
                await piecemeal(server, wire, plain + said('x') + blank, len(plain) + cut)
                assert (await wire.reader.read()).startswith(b'HTTP/1.1 426 ')
            assert not any(server.refusal_counts.values())


@pytest.mark.parametrize('size', [2**13, 2**17, 2**23])
@run_async
async def test_a_request_too_long_is_refused_and_ended(size, caplog):
    with logged(caplog, 'INFO'):
        async with running_relay(close_timeout=0.1) as server, registered(server, A) as peer:
            async with wired(server, opened=False) as wire:
                await relay_side(server, wire)
                wire.send(HANDSHAKE[:-2], b'X: ' + b'x' * size + b'\r\n\r\n')
                # It does not read, and does not close.
                await alone(server, peer)
                with contextlib.suppress(ConnectionError):
                    assert b'HTTP/1.1 101' not in await wire.reader.read()


# What a client may do once it has registered, in place of a proper end.
ENDINGS = []


def an_ending(ending):
    ENDINGS.append(ending)
    return ending


@an_ending
async def ends_without_a_close(server, wire):
    wire.finish()


@an_ending
async def ends_without_a_close_and_does_not_read(server, wire):
    await leave_unread(server, wire)
    wire.finish()


@an_ending
async def closes_without_an_end(server, wire):
    wire.send(frame_of(CLOSE, code_of(1000)))
    assert await wire.end() == ([], 1000)


@an_ending
async def closes_and_does_not_read(server, wire):
    await leave_unread(server, wire)
    wire.send(frame_of(CLOSE, code_of(1000)))


@an_ending
async def breaks_the_rules_without_an_end(server, wire):
    wire.send(b'\xff\xff')
    assert await wire.end() == ([], 1002)


@an_ending
async def breaks_the_rules_and_does_not_read(server, wire):
    await leave_unread(server, wire)
    wire.send(b'\xff\xff')


@an_ending
async def does_not_answer_a_close(server, wire):
    await server.unregister(holder(server, wire.peer.uuid).websocket, expected=True)
    assert await wire.frame() == (CLOSE, code_of(1000))


@an_ending
async def does_not_read_a_close(server, wire):
    await leave_unread(server, wire)
    await server.unregister(holder(server, wire.peer.uuid).websocket, expected=True)


@an_ending
async def goes_on_after_a_close(server, wire):
    await does_not_answer_a_close(server, wire)
    wire.send(said('x') * 2**14)


@an_ending
async def answers_no_ping(server, wire):
    wire.stall()


@an_ending
async def answers_no_ping_and_does_not_read(server, wire):
    await leave_unread(server, wire)


@an_ending
async def ends_in_the_middle_of_a_frame(server, wire):
    wire.send(said('x' * 300)[:99])
    wire.finish()


@an_ending
async def ends_in_the_middle_of_a_message(server, wire):
    wire.send(frame_of(TEXT, b'x', 0))
    wire.finish()


@an_ending
async def resets(server, wire):
    wire.reset()


@an_ending
async def resets_in_the_middle_of_a_frame(server, wire):
    wire.send(said('x' * 300)[:99])
    wire.reset()


@an_ending
async def resets_after_its_close(server, wire):
    wire.send(frame_of(CLOSE, code_of(1000)))
    wire.reset()


@an_ending
async def resets_after_the_echo_of_its_close(server, wire):
    await closes_without_an_end(server, wire)
    wire.reset()


@an_ending
async def resets_after_a_close(server, wire):
    await does_not_answer_a_close(server, wire)
    wire.reset()


@an_ending
async def resets_and_does_not_read(server, wire):
    await leave_unread(server, wire)
    wire.reset()


async def leave_unread(server, wire):
    """Have more wait for a client than the kernel holds, and less than it is held for."""
    wire.stall()
    connection = await relay_side(server, wire)
    while not connection.output:
        before = server.refusal_counts['unknown_peer']
        # It comes back.
        wire.send(said(json.dumps(wire.peer.offer(C, description='x' * 2**16))))
        while server.refusal_counts['unknown_peer'] == before:
            await asyncio.sleep(0.001)


SOON = {'open_timeout': 0.2, 'close_timeout': 0.05, 'ping_interval': 0.1, 'ping_timeout': 0.3}


@pytest.mark.parametrize('ending', ENDINGS)
@run_async
async def test_every_kind_of_ending_closes_the_connection_in_time(ending, caplog):
    with logged(caplog, 'INFO'):
        async with running_relay(**SOON) as server, registered(server, A) as peer:
            async with wired(server, narrow=True) as wire:
                await wire.register()
                await ending(server, wire)
                await asyncio.wait_for(alone(server, peer), 2)


@run_async
async def test_a_client_has_close_timeout_to_close():
    for ending in (
        closes_without_an_end,
        breaks_the_rules_without_an_end,
        does_not_answer_a_close,
    ):
        async with running_relay(close_timeout=0.1) as server, registered(server, A) as peer:
            async with wired(server) as wire:
                await wire.register()
                began = time.monotonic()
                await ending(server, wire)
                await alone(server, peer)
                assert time.monotonic() - began > 0.09


@pytest.mark.parametrize('size', [0, 1, 60, len(HANDSHAKE)])
@pytest.mark.parametrize('leave', [Wire.reset, Wire.finish, Wire.stall])
@run_async
async def test_a_handshake_that_is_given_up_leaves_nothing(size, leave, caplog):
    with logged(caplog, 'INFO'):
        async with running_relay(**SOON) as server, registered(server, A) as peer:
            async with wired(server, opened=False) as wire:
                await relay_side(server, wire)
                wire.send(HANDSHAKE[:size])
                leave(wire)
                await asyncio.wait_for(alone(server, peer), 2)


@pytest.fixture
def no_collection():
    """Nothing is collected during a test unless it asks for it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize('secure', [False, True])
@run_async
async def test_closed_connections_leave_nothing_for_the_garbage_collector(
    secure, tls, pem, monkeypatch, no_collection
):
    # What pytest keeps of the log would hold them.
    monkeypatch.setattr(relay.logger, 'disabled', True)
    context, trust = (tls, trusting(pem)) if secure else (None, None)
    left, before = remembered(), len(os.listdir('/proc/self/fd'))
    async with running_relay(context, **SOON) as server:
        async with contextlib.AsyncExitStack() as stack:
            for ending in ENDINGS:
                wire = await stack.enter_async_context(wired(server, trust, narrow=True))
                await ending(server, await wire.register())
            for size in (0, 1, 60):
                wire = await stack.enter_async_context(wired(server, trust, opened=False))
                wire.send(HANDSHAKE[:size])
            for data, _ in BROKEN.values():
                (await stack.enter_async_context(wired(server, trust))).send(data)
            await until(lambda: not server.listener.connections)
        assert not server._websocket_to_client and not server.refusal_log.keys() - {None}
        await until(lambda: len(os.listdir('/proc/self/fd')) <= before + 1)
        assert remembered(collect=False) == left
    await until(lambda: len(os.listdir('/proc/self/fd')) <= before)


@run_async
async def test_clients_that_are_lost_leave_no_timer(monkeypatch):
    monkeypatch.setattr(relay.logger, 'disabled', True)
    async with running_relay() as server:
        left, before = remembered(), len(timers())
        for ending in (resets, resets_after_its_close, resets_after_a_close):
            async with wired(server) as wire:
                await ending(server, await wire.register())
        for data in (b'GET / HTTP/1.1', HANDSHAKE, b'?\r\n\r\n'):
            async with wired(server, opened=False) as wire:
                await relay_side(server, wire)
                wire.send(data)
                await exchange_with_nobody(server)
                wire.reset()
        monkeypatch.setattr(server, 'pace', lambda client, size: 60)
        async with wired(server) as wire:
            wire.send(said('x'))
            assert (await wire.hear())['error']
            wire.reset()
        await until(lambda: not server.listener.connections)
        assert remembered() == left
        assert len(timers()) == before


async def exchange_with_nobody(server):
    """Wait until the relay has dealt with what has come."""
    async with connected(server) as other:
        await other.ask('x')


def remembered(collect=True):
    """Return the connections, clients and protocols that are in memory."""
    if collect:
        gc.collect()
    kinds = relay.Connection, relay.Client, relay.TlsSession, relay.ServerProtocol
    return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]


def timers():
    """Return what is to be called at a time."""
    gc.collect()
    handles = [thing for thing in gc.get_objects() if isinstance(thing, asyncio.TimerHandle)]
    return [handle for handle in handles if not handle.cancelled()]


@run_async
async def test_a_peer_that_reads_a_byte_at_a_time_does_not_hurt_others():
    async with running_relay() as server:
        async with registered(server, A) as one, registered(server, B) as other:
            async with wired(server, narrow=True) as slow:
                await slow.register()
                slow.stall()
                message = one.offer(slow.peer.uuid, description='x' * 2**16)
                sock = slow.writer.get_extra_info('socket')
                for _ in range(100):
                    await one.say(message)
                    with contextlib.suppress(BlockingIOError):
                        os.read(sock.fileno(), 1)
                    await exchange_with_oneself(one)
                    await exchange_with_oneself(other)
                size = (await relay_side(server, slow)).unsent_bytes
                assert size <= relay.MAX_BACKLOG


@pytest.mark.parametrize('text, secure', [('x', False), (None, False), (None, True)])
@run_async
async def test_a_client_that_does_not_read_answers_is_not_read(text, secure, tls, pem):
    context, trust = (tls, trusting(pem)) if secure else (None, None)
    async with running_relay(context) as server, registered(server, A, ssl=trust) as peer:
        async with wired(server, trust, narrow=True) as wire:
            await wire.register()
            wire.stall()
            data = said(text or json.dumps(wire.peer.offer(C, description='x' * 2**14)))
            count = 2**15 if text else 2**9
            wire.send(data * count)
            connection = await relay_side(server, wire)
            await until(lambda: relay.UNREAD in connection.paused_for)
            for _ in range(20):
                await exchange(peer, peer)
                assert connection.unsent_bytes < 1.5 * relay.MAX_BACKLOG
                assert len(connection.input) <= 4 * relay.RECEIVE_BUFFER
            # When it reads in the end, nothing is lost.
            wire.writer.transport.resume_reading()
            opcode, first = await wire.frame()
            assert opcode == TEXT and json.loads(first)['error']
            rest = await wire.read((len(first) + 4) * (count - 1))
            assert rest.count(first) == count - 1


@run_async
async def test_a_client_that_makes_tls_answer_again_and_again_is_disconnected(tls, pem):
    trust = trusting(pem)
    async with running_relay(tls) as server, registered(server, A, ssl=trust) as peer:
        async with wired(server, trust) as wire:
            session = (await relay_side(server, wire)).tls
            # OpenSSL answers each KeyUpdate, which is not input. Python cannot send any.
            session.outgoing = SimpleNamespace(read=lambda: bytes(2**12))
            for _ in range(5):
                session.answer()
            wire.send(frame_of(PING))
            await alone(server, peer)


@run_async
async def test_a_client_that_is_held_for_its_rate_is_not_given_up():
    async with running_relay(rate=20, ping_interval=0.02, ping_timeout=0.02) as server:
        async with wired(server) as wire:
            wire.send(said('x') * 7)
            for _ in range(7):
                while (await wire.frame())[0] == PING:
                    wire.send(frame_of(PONG))
            wire.send(frame_of(CLOSE, code_of(1000)))
            assert (await wire.end())[1] == 1000


@run_async
async def test_a_client_that_does_not_answer_a_ping_is_closed_with_1011():
    async with running_relay(**SOON) as server, wired(server) as wire:
        assert await wire.end() == ([(PING, b'')], 1011)


@run_async
async def test_a_paused_client_can_answer_a_close(monkeypatch):
    async with running_relay() as server, registered(server, A) as peer:
        async with wired(server) as wire:
            await wire.register()
            monkeypatch.setattr(server, 'pace', lambda client, size: 60)
            wire.send(said('x') * 9)
            assert (await wire.hear())['error']
            monkeypatch.undo()
            await does_not_answer_a_close(server, wire)
            wire.send(frame_of(CLOSE, code_of(1000)))
            assert await wire.frame() is None
            wire.finish()
            await alone(server, peer)


@run_async
async def test_messages_of_a_client_lost_while_paused_are_dropped(monkeypatch):
    async with running_relay() as server, registered(server, A) as peer:
        async with wired(server) as wire:
            await wire.register()
            connection = await relay_side(server, wire)
            monkeypatch.setattr(server, 'pace', lambda client, size: 0.01)
            # The answer to the first but one cannot be written.
            wire.send(said('x' * 6000) * 9)
            wire.reset()
            await until(lambda: connection not in server.listener.connections)
            connection.resume(relay.RATE_LIMIT)
        await alone(server, peer)


@run_async
async def test_a_client_lost_during_its_ping_timeout_affects_no_other():
    async with running_relay() as server, registered(server, A) as peer:
        async with wired(server) as wire:
            connection = await relay_side(server, wire)
            connection.keep_alive(1e9)
            wire.writer.get_extra_info('socket').shutdown(socket.SHUT_RDWR)
            connection.keep_alive(2e9)
        await alone(server, peer)


@run_async
async def test_a_client_that_is_reset_while_it_is_not_read_does_not_wait_for_its_rate(monkeypatch):
    monkeypatch.setattr(relay, 'SWEEP_INTERVAL', 0.02)
    async with running_relay() as server, registered(server, A) as peer:
        async with wired(server) as wire:
            await wire.register()
            connection = await relay_side(server, wire)
            with monkeypatch.context() as patch:
                patch.setattr(server, 'pace', lambda client, size: 60)
                wire.send(said('x' * 1000) * 1000)
                await until(lambda: connection in server.listener.not_reading)
            wire.reset()
            await alone(server, peer)


@run_async
async def test_messages_before_an_end_are_forwarded_even_if_no_answer_can_be_sent(
    monkeypatch,
):
    async with running_relay() as server, registered(server, A) as peer:
        async with wired(server) as wire:
            await wire.register()
            monkeypatch.setattr(server, 'pace', lambda client, size: 0.01)
            offers = [wire.peer.offer(A, description=str(n)) for n in range(10)]
            messages = [json.dumps(offer) for offer in offers]
            # The relay answers the third message, and the network resets the connection for it.
            wire.send(*map(said, messages[:2]), said('x') * 3, *map(said, messages[2:]))
            wire.finish()
            wire.writer.transport.abort()
            assert [await peer.hear() for _ in offers] == offers
        monkeypatch.undo()
        await alone(server, peer)


@run_async
async def test_other_clients_have_their_turn_while_long_messages_are_decoded(monkeypatch):
    decoded, decode_ = [], relay.decode

    def note(text):
        decoded.append(text)
        return decode_(text)

    async with (
        running_relay() as server,
        registered(server, A) as one,
        registered(server, B) as other,
    ):
        async with contextlib.AsyncExitStack() as stack:
            wires, text = [], zeros(2**18)
            for _ in range(20):
                wires.append(await (await stack.enter_async_context(wired(server))).register())
                wires[-1].send(said(text)[:-1])
                connection = await relay_side(server, wires[-1])
                await until(lambda c=connection: len(c.input) == len(said(text)) - 1)
            monkeypatch.setattr(relay, 'decode', note)
            for wire in wires:
                wire.send(said(text)[-1:])
            await one.say(one.offer(B))
            assert await other.hear() == one.offer(B)
            # Of the long messages, most are still to come.
            assert decoded.count(text) < len(wires)
            for wire in wires:
                assert 'message_type' in (await wire.hear())['message']


@run_async
async def test_pings_and_pongs_count_against_the_rate(monkeypatch):
    async with running_relay(rate=10) as server, wired(server) as wire:
        waits = paced(server, monkeypatch, [1000.0])
        wire.send(frame_of(PONG) * 20, frame_of(PING) * 20, said('x'))
        while (await wire.frame())[0] == PONG:
            pass
        assert len(waits) == 41


async def tells_the_end_of_tls(wire):
    """Send close_notify, and do not close the connection."""
    with contextlib.suppress(ssl.SSLWantReadError):
        wire.tls.unwrap()
    wire.writer.write(wire.sent.read())


async def truncates(wire):
    wire.finish()


async def truncates_a_record(wire):
    wire.tls.write(said('x' * 300))
    wire.writer.write(wire.sent.read()[:99])
    wire.finish()


async def sends_no_record(wire):
    wire.writer.write(b'GET / HTTP/1.1\r\n\r\n')


async def sends_no_record_after_a_message(wire):
    wire.tls.write(said('x'))
    wire.writer.write(wire.sent.read() + b'GET / HTTP/1.1\r\n\r\n')


async def closes(wire):
    wire.send(frame_of(CLOSE, code_of(1000)))
    assert await wire.end() == ([], 1000)


async def closes_and_tells_the_end_of_tls(wire):
    wire.send(frame_of(CLOSE, code_of(1000)))
    await tells_the_end_of_tls(wire)


async def breaks_the_rules(wire):
    wire.send(b'\xff\xff')
    assert await wire.end() == ([], 1002)


async def resets_tls(wire):
    wire.reset()


TLS_ENDINGS = [tells_the_end_of_tls, truncates, truncates_a_record, sends_no_record, resets_tls]
TLS_ENDINGS += [sends_no_record_after_a_message]
TLS_ENDINGS += [closes, closes_and_tells_the_end_of_tls, breaks_the_rules]


@pytest.mark.parametrize('ending', TLS_ENDINGS)
@run_async
async def test_every_kind_of_tls_ending_closes_the_connection_in_time(ending, tls, pem, caplog):
    trust = trusting(pem)
    with logged(caplog, 'INFO'):
        async with running_relay(tls, **SOON) as server, registered(server, A, ssl=trust) as peer:
            async with wired(server, trust) as wire:
                await wire.register()
                await ending(wire)
                await asyncio.wait_for(alone(server, peer), 2)


@run_async
async def test_unprocessed_input_of_a_closed_tls_client_is_no_error(tls, pem, caplog, monkeypatch):
    with logged(caplog, 'INFO'):
        async with running_relay(tls, **SOON) as server:
            async with wired(server, trusting(pem), narrow=True) as wire:
                await wire.register()
                await leave_unread(server, wire)
                monkeypatch.setattr(server, 'pace', lambda client, size: 0.02)
                wire.tls.write(said('x' * 6000) * 3)
                await tells_the_end_of_tls(wire)
                await until(lambda: not server.listener.connections)


@pytest.mark.parametrize('start', [b'', b'\x16\x03\x01', b'GET / HTTP/1.1\r\n\r\n', bytes(9)])
@run_async
async def test_an_incomplete_tls_handshake_is_dropped_in_time(start, tls, caplog):
    with logged(caplog, 'INFO'):
        async with running_relay(tls, **SOON) as server:
            async with wired(server, opened=False) as wire:
                wire.send(start)
                with contextlib.suppress(ConnectionError):
                    await asyncio.wait_for(wire.reader.read(), 1)
            assert not server.listener.connections


def hello_of(context):
    """Return the bytes that a TLS client begins with."""
    sent = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname='localhost').do_handshake()
    return sent.read()


@pytest.mark.parametrize('size', [3, 99, None])
@pytest.mark.parametrize('leave', [Wire.reset, Wire.finish, Wire.stall])
@run_async
async def test_a_tls_handshake_that_is_given_up_leaves_nothing(size, leave, tls, pem, caplog):
    with logged(caplog, 'INFO'):
        async with running_relay(tls, **SOON) as server:
            async with wired(server, opened=False) as wire:
                await relay_side(server, wire)
                wire.send(hello_of(trusting(pem))[:size])
                leave(wire)
                await until(lambda: not server.listener.connections)


@run_async
async def test_a_tls_handshake_of_single_bytes_has_no_more_time_than_another(tls, pem, caplog):
    with logged(caplog, 'INFO'):
        async with running_relay(tls, open_timeout=0.05) as server:
            async with wired(server, opened=False) as wire:
                connection = await relay_side(server, wire)
                hello = iter(hello_of(trusting(pem))[:-1])
                # Each byte takes at least a millisecond, and there are hundreds.
                while connection in server.listener.connections:
                    heard = connection.last_heard
                    wire.send(bytes([next(hello)]))
                    await until(lambda h=heard: connection.last_heard > h or connection.finished)


@run_async
async def test_tls_clients_that_are_reset_while_paused_are_no_error(tls, pem, caplog):
    with logged(caplog, 'INFO'):
        async with running_relay(tls, rate=20) as server:
            async with contextlib.AsyncExitStack() as stack:
                wires = []
                for _ in range(20):
                    wire = await stack.enter_async_context(wired(server, trusting(pem)))
                    wires.append(await wire.register())
                for wire in wires:
                    wire.send(said('x' * 500) * 100)
                    connection = await relay_side(server, wire)
                    await until(lambda c=connection: relay.RATE_LIMIT in c.paused_for)
                for wire in wires:
                    wire.reset()
                await until(lambda: not server.listener.connections)


@run_async
async def test_tls_is_not_negotiated_again(tls, pem):
    async with running_relay(tls) as server, registered(server, A, ssl=trusting(pem)) as peer:
        client = await asyncio.create_subprocess_exec(
            *('openssl', 's_client', '-tls1_2', '-connect', f'127.0.0.1:{port_of(server)}'),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await client.communicate(b'R\n')
        assert b'RENEGOTIATING' in output and b'no renegotiation' in output
        await exchange(peer, peer)


@pytest.mark.parametrize('order', [[A, B], [B, A]], ids=['first', 'last'])
@run_async
async def test_an_internal_error_with_one_peer_does_not_affect_another(order, caplog):
    def fail():
        holder(server, A).link.unflushed_bytes = 0
        raise RuntimeError('a defect')

    async with running_relay() as server, registered(server, C) as sender:
        async with registered(server, A) as one, registered(server, B) as other:
            holder(server, A).link.flush = fail
            # In one piece, so that both are written to in one go.
            offers = [sender.offer(uuid) for uuid in order]
            sender.websocket.transport.write(b''.join(said(json.dumps(o)) for o in offers))
            assert await other.hear() == sender.offer(B)
            del holder(server, A).link.flush
            await exchange(other, sender)
            assert await one.ask(one.offer(A)) == sender.offer(A)
    assert [r.exc_info[1].args for r in caplog.records if r.exc_info] == [('a defect',)]


@run_async
async def test_an_internal_error_does_not_end_the_sweep(caplog):
    def fail(now):
        del holder(server, A).link.keep_alive
        raise RuntimeError('a defect')

    async with running_relay(ping_interval=0.02) as server, registered(server, A):
        holder(server, A).link.keep_alive = fail
        pinged = holder(server, A).link.last_pinged
        await until(lambda: holder(server, A).link.last_pinged > pinged)
    assert [r.exc_info[1].args for r in caplog.records if r.exc_info] == [('a defect',)]


UNFINISHED = {
    'one byte too many': (frame_of(TEXT, length=2**16 + 1), 1009),
    'one byte too many in fragments': (
        frame_of(TEXT, b'x' * 2**15, 0) + frame_of(CONT, length=2**15 + 1),
        1009,
    ),
    'as many bytes as it may send': (frame_of(TEXT, b'x' * 2**16), None),
}


@pytest.mark.parametrize('data, code', UNFINISHED.values(), ids=UNFINISHED)
@run_async
async def test_a_client_that_has_not_registered_may_send_64_kib(data, code):
    async with running_relay() as server, wired(server) as wire:
        wire.send(data, b'' if code else frame_of(CLOSE, code_of(1000)))
        frames, ended_with = await wire.end()
        assert (len(frames), ended_with) == ((0, 1009) if code else (1, 1000))


@run_async
async def test_out_of_memory_the_client_that_holds_the_most_is_closed(monkeypatch):
    monkeypatch.setattr(relay, 'MAX_BUFFERED', 2**18)
    async with running_relay() as server, registered(server, A) as peer:
        async with wired(server) as innocent, wired(server) as most, wired(server) as last:
            for wire in (innocent, most, last):
                await wire.register()
            offer = said(json.dumps(innocent.peer.offer(A, description='x' * 10_000)))
            for wire, data in (
                (innocent, offer[:-1]),
                (most, frame_of(TEXT, b'x' * 150_000, length=2**20)),
                (last, frame_of(TEXT, b'x' * 120_000, length=2**20)),
            ):
                wire.send(data)
                connection = await relay_side(server, wire)
                size = len(data)
                await until(lambda c=connection, n=size, w=wire: c.counted_bytes == n or w is last)
            assert await most.end() == ([], CloseCode.TRY_AGAIN_LATER)
            innocent.send(offer[-1:])
            assert (await peer.hear())['source_uuid'] == str(innocent.peer.uuid)
            assert holder(server, last.peer.uuid)
            assert server.refusal_counts['out_of_memory'] == 1
        await until(lambda: server.listener.buffered_bytes == 0)


@run_async
async def test_out_of_memory_a_client_that_does_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr(relay, 'MAX_BUFFERED', 2**18)
    async with running_relay() as server, registered(server, A) as sender:
        async with wired(server, narrow=True) as wire:
            await wire.register()
            wire.stall()
            while holder(server, wire.peer.uuid):
                await sender.say(sender.offer(wire.peer.uuid, description='x' * 2**14))
                await exchange_with_oneself(sender)
            await alone(server, sender)
        assert server.refusal_counts['out_of_memory'] == 1
        assert server.listener.buffered_bytes == 0


@run_async
async def test_a_client_may_be_dropped_for_the_answer_to_its_own_message(monkeypatch, caplog):
    with logged(caplog, 'INFO'):
        async with running_relay() as server, registered(server, A) as peer:
            async with wired(server, narrow=True) as wire:
                await wire.register()
                await leave_unread(server, wire)
                # There is no memory left for the close frame.
                monkeypatch.setattr(relay, 'MAX_BUFFERED', server.listener.buffered_bytes)
                wire.send(said(b'\xff'))
                await alone(server, peer)


@pytest.mark.parametrize(
    'data',
    [said('x' * 99)[:50], frame_of(TEXT, b'{', 0), frame_of(TEXT, b'', 0)],
    ids=['half a frame', 'a fragment', 'an empty fragment'],
)
@run_async
async def test_a_message_that_is_not_completed_in_time_is_closed_with_1008(data, monkeypatch):
    monkeypatch.setattr(relay, 'MESSAGE_TIMEOUT', 0.1)
    monkeypatch.setattr(relay, 'SWEEP_INTERVAL', 0.02)
    async with running_relay() as server, registered(server, A) as peer:
        async with wired(server) as wire:
            await wire.register()
            wire.send(data)
            assert await wire.end() == ([], CloseCode.POLICY_VIOLATION)
        await alone(server, peer)
        assert server.refusal_counts['incomplete'] == 1


@pytest.mark.parametrize('reason', [relay.RATE_LIMIT, relay.TURN])
@run_async
async def test_a_message_that_waits_for_the_relay_does_not_time_out(reason, monkeypatch):
    async with running_relay() as server, wired(server) as wire, wired(server) as late:
        await wire.register()
        text, fragments = zeros(2**17), frame_of(TEXT, b'{', 0)
        data = fragments + frame_of(CONT, b'{', 0) if reason is relay.RATE_LIMIT else said(text)
        wire.send(data[:-1])
        connection = await relay_side(server, wire)
        await until(lambda: connection in server.listener.incomplete)
        monkeypatch.setattr(server, 'pace', lambda client, size: 60)
        monkeypatch.setattr(server.listener, 'request_turn', lambda connection: None)
        wire.send(data[-1:])
        await until(lambda: connection.paused_for == {reason})
        late.send(fragments[:-1])
        monkeypatch.setattr(relay, 'MESSAGE_TIMEOUT', 0)
        assert await late.end() == ([], CloseCode.POLICY_VIOLATION)
        assert connection.is_open and connection.paused_for == {reason}


@run_async
async def test_the_oldest_of_too_many_handshakes_is_dropped(monkeypatch):
    monkeypatch.setattr(relay, 'MAX_HANDSHAKES', 2)
    async with running_relay() as server, registered(server, A) as peer:
        wires = []
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                wires.append(await stack.enter_async_context(wired(server, opened=False)))
                await exchange(peer, peer)
            assert await wires[0].reader.read() == b''
            for wire in wires[1:]:
                await wire.open()
        await alone(server, peer)


@run_async
async def test_the_last_connection_that_there_is_room_for_is_served():
    server = RelayServer()
    answer = server.process_request
    listener = relay.Listener(server, answer, max_connections=2)
    async with until_closed(await listener.listen('127.0.0.1', 0)):
        server.url = 'ws://%s:%d' % listener.sockets[0].getsockname()
        async with registered(server, A) as one, registered(server, B) as other:
            await exchange(one, other)


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


@pytest.mark.parametrize('data', REQUESTS.values(), ids=REQUESTS)
@run_async
async def test_a_request_that_is_not_a_handshake_is_answered(data):
    async with running_relay() as server:
        head, _, body = (await http(server, data)).partition(b'\r\n\r\n')
        assert head.split()[:2] in ([b'HTTP/1.1', b'426'], [b'HTTP/1.1', b'400'])
        assert body.endswith(b'\n')


PROBES = {
    'nothing': b'EOF',
    'a few bytes': b'\0\1\2\3EOF',
    'TLS hello': bytes.fromhex('16030100c8010000c40303') + bytes(200),
    'HTTP/2 preface': b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n' + bytes(9),
    'SSH banner': b'SSH-2.0-OpenSSH_9.9\r\n',
    'POST': b'POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc',
    '100 KB of header': b'GET / HTTP/1.1\r\nX: ' + b'x' * 100_000 + b'\r\n\r\n',
    'many headers': b'GET / HTTP/1.1\r\n' + b'X: y\r\n' * 1000 + b'\r\n',
    '100 KB of path': b'GET /' + b'x' * 100_000 + b' HTTP/1.1\r\n\r\n',
    'half a handshake': b'GET / HTTP/1.1\r\nUpgrade: websocket\r\nEOF',
    'a handshake without a key': b'GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n',
    'escapes in the path': b'GET /\x1b[2J\r\nERROR HTTP/1.1\r\nUpgrade: websocket\r\n\r\n',
}


@pytest.mark.parametrize('probe', PROBES.values(), ids=PROBES)
@run_async
async def test_a_scanner_is_refused_and_leaves_no_more_than_a_debug_line(
    probe, caplog, monkeypatch
):
    monkeypatch.setattr(logging, 'raiseExceptions', True)
    monkeypatch.setattr(logging, 'basicConfig', lambda **_: None)
    relay.configure_logging(None, 'DEBUG')
    levels = {name: logging.getLogger(name).level for name in ('websockets', 'asyncio')}
    try:
        with logged(caplog) as lines:
            async with running_relay(open_timeout=0.5) as server, registered(server, A) as peer:
                await http(server, probe)
                await exchange(peer, peer)
                await until(lambda: len([x for x in lines() if x.startswith('No handshake')]) == 1)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    assert len(caplog.text) < 2000


@run_async
async def test_plain_text_on_a_tls_port_and_tls_on_a_plain_port_are_refused_quickly(pem, caplog):
    with logged(caplog, 'INFO'):
        async with running_relay(relay.tls_context(str(pem / 'both.pem'), None)) as server:
            assert await http(server, b'GET / HTTP/1.1\r\n\r\n') == b''
            with pytest.raises((OSError, WebSocketException, EOFError)):
                await open_websocket(server.url.replace('wss', 'ws'))
        async with running_relay() as server:
            with pytest.raises((OSError, WebSocketException, EOFError)):
                await open_websocket(server.url.replace('ws', 'wss'), ssl=trusting(pem))


@pytest.mark.parametrize(
    'version, welcome', [('TLSv1_1', False), ('TLSv1_2', True), ('TLSv1_3', True)]
)
@run_async
async def test_tls_is_spoken_from_1_2_on(pem, version, welcome):
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.load_verify_locations(pem / 'cert.pem')
    # Of a client that would speak anything, whatever the machine's defaults are.
    trust.set_ciphers('ALL:@SECLEVEL=0')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        trust.minimum_version = trust.maximum_version = ssl.TLSVersion[version]
    context = relay.tls_context(str(pem / 'both.pem'), None)
    context.set_ciphers('ALL:@SECLEVEL=0')
    async with running_relay(context) as server:
        if welcome:
            async with registered(server, A, ssl=trust) as peer:
                await exchange(peer, peer)
        else:
            with pytest.raises(OSError):
                await open_websocket(server.url, ssl=trust)


LONG_PING = b'\x89\xfd\0\0\0\0' + bytes(125)


@run_async
async def test_a_flood_of_pings_is_not_read_while_its_pongs_are_unread():
    async with (
        running_relay() as server,
        registered(server, A) as one,
        registered(server, B) as flood,
    ):
        stall(flood)
        connection = holder(server, B).link
        while relay.UNREAD not in connection.paused_for:
            flood.websocket.transport.write(LONG_PING * 4000)
            await exchange(one, one)
        assert connection.unsent_bytes < relay.MAX_BACKLOG + 2**17
        flood.websocket.transport.write(LONG_PING * 40_000)
        await exchange(one, one)
        assert connection.unsent_bytes < relay.MAX_BACKLOG + 2**17
        assert len(connection.input) <= 2 * relay.RECEIVE_BUFFER
        flood.websocket.transport.abort()


@run_async
async def test_a_client_may_send_many_pings_if_it_reads_the_pongs():
    async with running_relay() as server, registered(server, A) as peer:
        for _ in range(20):
            peer.websocket.transport.write(LONG_PING * 1000)
            await exchange(peer, peer)


@run_async
async def test_a_reset_ends_a_registration_before_its_paced_messages():
    async with running_relay(rate=10, max_clients=2) as server, registered(server, A) as peer:
        async with registered(server, B) as gone:
            for _ in range(300):
                gone.websocket.transport.write(b'\x81\x82\0\0\0\0{}')
            await leave_with_a_reset(gone)
            # At its rate, its messages would take half a minute, longer than this test may.
            await until(lambda: len(server._websocket_to_client) == 1)
        async with registered(server, C) as late:
            await exchange(peer, late)


@pytest.mark.parametrize('tls', [False, True])
@run_async
async def test_a_peer_lost_while_it_is_written_to_affects_no_other(tls, pem, caplog):
    context = relay.tls_context(str(pem / 'both.pem'), None) if tls else None
    options = {'ssl': trusting(pem)} if tls else {}
    with logged(caplog, 'INFO'):
        async with running_relay(context) as server, registered(server, A, **options) as sender:
            for _ in range(20):
                async with registered(server, B, **options) as peer:
                    for _ in range(200):
                        peer.websocket.transport.write(b'\x81\x82\0\0\0\0{}')
                    await sender.say(sender.offer(B, description='x' * 2**16))
                    await leave_with_a_reset(peer)
                    while holder(server, B):
                        await sender.say(sender.offer(B))
                        await exchange_with_oneself(sender)


async def exchange_with_oneself(peer):
    """See that a message arrives, whatever comes back of others."""
    mark = peer.offer(peer.uuid, description=str(uuid4()))
    await peer.say(mark)
    while await peer.hear() != mark:
        pass


@run_async
async def test_refused_unregistered_clients_share_a_log_line(caplog):
    with logged(caplog) as lines:
        async with running_relay() as server:
            for _ in range(30):
                async with connected(server) as peer:
                    assert (await peer.ask('{}'))['success'] is False
    assert len([line for line in lines() if 'Refused' in line]) == 1


@run_async
async def test_mutated_messages_cost_others_nothing(caplog):
    chance = random.Random(2)

    async def attack(server, number):
        async with registered(server, UUID(int=100 + number)) as peer:
            answers = asyncio.ensure_future(drain(peer))
            for _ in range(500):
                text = list(json.dumps(peer.offer(chance.choice([A, C, peer.uuid]))))
                for _ in range(chance.randint(1, 5)):
                    place = chance.randrange(len(text))
                    text[place : place + chance.randint(0, 2)] = chance.choice(
                        '{}[]",:\\ue09-.\0\x85'
                    )
                await peer.say(''.join(text))
            await peer.websocket.close()
            await answers

    with logged(caplog, 'INFO') as lines:
        async with (
            running_relay() as server,
            registered(server, C) as one,
            registered(server, B) as other,
        ):
            attacks = asyncio.gather(*(attack(server, number) for number in range(4)))
            marks = 0
            while not attacks.done() or marks < 20:
                mark = one.offer(B, description=f'mark {marks}')
                await one.say(mark)
                assert await other.hear() == mark
                marks += 1
            await attacks
            assert len(server._uuid_to_client) == 2
    assert len(lines()) < 40


async def drain(peer):
    """Read whatever comes, to the end of the connection."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await peer.websocket.recv()


def clients_named(name):
    """Return the clients of a name that are in memory."""
    gc.collect()
    clients = [thing for thing in gc.get_objects() if isinstance(thing, relay.Client)]
    return [client for client in clients if client.name == name]


@run_async
async def test_disconnected_clients_leave_nothing_behind():
    # What other tests left to collect may warn, and pytest keeps the frames that a warning is in.
    gc.collect()
    async with running_relay() as server:
        before = len(os.listdir('/proc/self/fd'))
        for number in range(60):
            async with registered(server, UUID(int=number + 1), 'who leaves') as peer:
                await [leave_with_a_close, leave_with_a_reset, leave_in_the_middle_of_a_frame][
                    number % 3
                ](peer)
        await until(lambda: not server._websocket_to_client)
        assert not server._uuid_to_client and not server.refusal_log
        await until(lambda: len(os.listdir('/proc/self/fd')) <= before)
        # websockets may be at the last of them still.
        await until(lambda: not clients_named('who leaves'))


def test_silent_connections_give_way_when_there_are_no_file_descriptors_left():
    program = f'{sys.executable} {HERE}/relay.py --host 127.0.0.1 --port 0 --max-clients 99'
    command = f'ulimit -n 40; exec {program}'
    shell = subprocess.Popen(['bash', '-c', command], stdout=subprocess.PIPE, text=True)
    with shell as process, ended_in_time(process):
        process.url = 'ws://' + process.stdout.readline().split()[-1]
        process.stdout.readline()
        run_async(exhaust_files)(process)


async def exhaust_files(process):
    async with registered(process, A) as one, registered(process, B) as other:
        silent = [await asyncio.open_connection('127.0.0.1', port_of(process)) for _ in range(40)]
        await exchange(one, other)
        async with registered(process, C) as late:
            await exchange(one, late)
        # There is room for a few of them.
        for reader, _ in silent[:-8]:
            assert await reader.read() == b''
        for _, writer in silent:
            writer.close()


@run_async
async def test_a_reload_works_while_silent_connections_use_up_the_file_descriptors(tokens):
    program = f'{sys.executable} {HERE}/relay.py --host 127.0.0.1 --port 0 --token-file {tokens}'
    command = ['bash', '-c', f'ulimit -n 128; exec {program}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        with ended_in_time(process), contextlib.ExitStack() as stack:
            process.url = 'ws://' + process.stdout.readline().split()[-1]
            async with registered(process, A, **bearer('b1')) as peer:
                for _ in range(200):
                    sock = stack.enter_context(socket.socket())
                    sock.setblocking(False)
                    sock.connect_ex(('127.0.0.1', port_of(process)))
                files = f'/proc/{process.pid}/fd'
                await until(lambda: len(os.listdir(files)) > 128 - relay.RESERVED_FDS)
                Path(tokens).write_text('alice:a1\n')
                assert 'Reloaded' in await reloaded(process)
                assert await peer.closed_with() == CloseCode.POLICY_VIOLATION
            async with registered(process, B, **bearer('a1')) as other:
                await exchange(other, other)


def memory_of(process):
    """Return the resident memory of a process, in KiB."""
    return int(re.search(r'VmRSS:\s+(\d+)', Path(f'/proc/{process.pid}/status').read_text())[1])


@run_async
async def test_a_client_over_tls_takes_little_memory(pem):
    with running_program('--host', '127.0.0.1', '--certfile', pem / 'both.pem') as process:
        trust, before = trusting(pem), 0
        async with contextlib.AsyncExitStack() as stack:
            for number in range(60):
                wire = await stack.enter_async_context(wired(process, trust))
                await wire.register()
                if number == 9:
                    before = memory_of(process)
            # About 21 each; asyncio's own TLS takes 287.
            assert (memory_of(process) - before) / 50 < 64


# ------------------------------------------------------------------------------- Scale-out

NATS_SERVER = shutil.which('nats-server', path=f'{os.environ["PATH"]}:/usr/sbin')
NO_NATS = 'nats-server is not here' if not NATS_SERVER else ''
try:
    import nats.errors
except ImportError:
    NO_NATS = NO_NATS or 'nats-py is not here'
DISCONNECTED = 'because the relays are disconnected.'
HOUR = 3600 * 10**9


over_nats = pytest.mark.skipif(bool(NO_NATS), reason=NO_NATS)


@contextlib.contextmanager
def port_to_come():
    """Hold a port where nobody listens yet: who names it may, and nobody else is given it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(('127.0.0.1', 0))
        yield sock.getsockname()[1]


@contextlib.contextmanager
def running_nats(*lines, port=-1):
    """Run a NATS server with lines in its configuration.

    Yields its process once it listens, with its URL and the ports that it has chosen, by purpose.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'nats.conf')
        lines = [f'listen: "127.0.0.1:{port}"', f'ports_file_dir: "{folder}"', *lines]
        path.write_text('\n'.join(lines))
        silent = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        with subprocess.Popen([NATS_SERVER, '-c', path], **silent) as process:
            try:
                ports = Path(folder, f'nats-server_{process.pid}.ports')
                while not ports.exists() or not ports.read_text().endswith('}'):
                    assert process.poll() is None, 'the NATS server has ended'
                    time.sleep(0.001)
                told = json.loads(ports.read_text())
                process.ports = {name: urlsplit(urls[0]).port for name, urls in told.items()}
                process.url = told['nats'][0]
                yield process
            finally:
                process.kill()


def strike(process, how):
    """Kill a process, or freeze it: its threads do not stop at once, but pass on what comes."""
    process.send_signal(signal.SIGKILL if how == 'killed' else signal.SIGSTOP)
    if how == 'frozen':
        os.waitpid(process.pid, os.WUNTRACED)


async def connz(server):
    """Return what a NATS server that has `http` tells of its connections."""
    _, text = await fetch(server.ports['monitoring'], '/connz', 'Connection: close\r\n')
    return json.loads(text)


def running_member(*others):
    """Run a NATS server of a cluster, which is told the ports where it finds others."""
    routes = ', '.join(f'"nats://127.0.0.1:{port}"' for port in others)
    cluster = 'name: c, listen: "127.0.0.1:-1", no_advertise: true'
    return running_nats(f'cluster: {{{cluster}, routes: [{routes}]}}')


@pytest.fixture(scope='module')
def bus():
    """Return the URL of a NATS server that nobody disturbs."""
    with running_nats() as process:
        yield process.url


@contextlib.asynccontextmanager
async def joined_relay(*urls, wait=True, **options):
    """Serve a relay that shares its clients with others over NATS."""
    async with running_relay(**options) as server:
        server.backplane = relay.Backplane(server, list(urls), None)
        try:
            while wait and not server.backplane.connected:
                await asyncio.sleep(0.001)
            yield server
        finally:
            await server.backplane.close()


@contextlib.asynccontextmanager
async def two_relays(url, **options):
    async with joined_relay(url, **options) as one, joined_relay(url, **options) as other:
        yield one, other


async def hears_only(peer, *messages):
    """See that these come to a client, and nothing else before what it says to itself."""
    for message in messages:
        assert await peer.hear() == message
    echo = peer.offer(peer.uuid, description=str(uuid4()))
    assert await peer.ask(echo) == echo


async def dealt_with(peer):
    """Wait until a relay without a rate has what a client has sent."""
    await (await peer.websocket.ping())


async def joined(one, other):
    """Return whether a message goes to a client."""
    offer = one.offer(other.uuid, description=str(uuid4()))
    await one.say(offer)

    async def heard(peer):
        # What was sent before may come now.
        while (await peer.hear()).get('description') != offer['description']:
            pass

    hearing = [asyncio.ensure_future(heard(peer)) for peer in (one, other)]
    done, waiting = await asyncio.wait(hearing, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
        await asyncio.wait({task})
    return hearing[1] in done


async def meet(one, other):
    """Wait until messages go both ways: until the relays have found each other."""
    while not (await joined(one, other) and await joined(other, one)):
        pass


def sent_back(message, reason):
    error = f'Cannot forward peer connection message to peer {message["peer_uuid"]} because '
    return {**message, 'error': f'{error}{reason}.'}


async def settled(*servers):
    """Wait until nothing is on its way, and nobody is about to be subscribed."""
    for backplane in (server.backplane for server in servers):
        await until(functools.partial(is_settled, backplane))
    for backplane in 2 * [server.backplane for server in servers]:
        if backplane.connected:  # so that what was published before has been heard
            await backplane.nats.flush()


def is_settled(backplane):
    subscribed = backplane.subscriptions.keys() == backplane.claims.keys()
    return subscribed and not backplane.tasks


@over_nats
@run_async
async def test_the_text_of_a_message_between_relays_is_the_text_received(bus):
    async with two_relays(bus) as (one, other):
        async with registered(one, A) as a, registered(other, B, generation='relay') as b:
            for sender, receiver in ((a, b), (b, a)):
                offer = sender.offer(receiver.uuid, description='\u2013 "\\\U0001f600\r\n', x=[1])
                text = f' {json.dumps(offer, ensure_ascii=False, indent=1)}\n'
                await sender.say(text)
                assert await receiver.websocket.recv() == text
            await hears_only(a)
            await hears_only(b)


@over_nats
@run_async
async def test_a_peer_that_no_relay_knows_is_unknown_once(bus):
    async with two_relays(bus) as (one, other), registered(one, A) as a:
        async with registered(other, B) as b:
            await exchange(a, b)
        await until(lambda: not holder(other, B))
        for uuid in (B, C):
            offer = a.offer(uuid)
            assert await a.ask(offer) == {**offer, 'error': unknown(uuid)}
        await hears_only(a)


@over_nats
@run_async
async def test_a_full_backlog_on_another_relay_is_reported_to_the_sender(bus):
    async with two_relays(bus) as (one, other):
        async with registered(one, A) as a, registered(other, B) as b:
            stall(b)
            offer = a.offer(B, description='x' * 2**19)
            for _ in range(100):
                await a.say(offer)
                await dealt_with(a)
                await until(lambda: not one.backplane.queues)
                if one.refusal_counts['backlog']:
                    break
            assert await a.hear() == sent_back(offer, relay.FORWARD_ERRORS['backlog'])
            await hears_only(a)
            b.websocket.transport.abort()


@over_nats
@run_async
async def test_a_forged_source_is_not_sent_to_another_relay(bus):
    async with two_relays(bus) as (one, other):
        async with registered(one, A) as a, registered(other, B) as b:
            forged = {**a.offer(B), 'source_uuid': str(C)}
            assert await a.ask(forged) == sent_back(forged, relay.FORWARD_ERRORS['forged_source'])
            await hears_only(a)
            await hears_only(b)


USERS = [
    'a',
    'a.b',
    'a b',
    '*',
    '>',
    'a.*',
    '-',
    '',
    '61',
    'J\u00fcrgen',
    '\u65e5\u672c',
    'x' * 60,
]


@over_nats
@run_async
async def test_users_are_kept_apart_across_relays(bus):
    async with two_relays(bus) as (one, other), contextlib.AsyncExitStack() as stack:
        # A token of each, whatever its name; a file of tokens takes fewer.
        one.tokens = other.tokens = {relay._hash(str(n)): user for n, user in enumerate(USERS)}
        pairs = []
        for n in range(len(USERS)):
            places = ((one, A), (other, B))
            options = {'additional_headers': {'Authorization': f'Bearer {n}'}}
            peers = [registered(server, uuid, f'{n}', **options) for server, uuid in places]
            pairs.append([await stack.enter_async_context(peer) for peer in peers])
        for a, b in pairs:
            await a.say(a.offer(B))
            await b.say(b.offer(A))
        for a, b in pairs:
            await hears_only(a, b.offer(A))
            await hears_only(b, a.offer(B))


@over_nats
@pytest.mark.parametrize('ahead', [0, HOUR, -HOUR], ids=['', 'clock ahead', 'clock behind'])
@pytest.mark.parametrize('generation, code', [('server', 1001), ('relay', 4004)])
@run_async
async def test_a_registration_displaces_the_one_on_another_relay(
    bus, monkeypatch, generation, code, ahead
):
    async with two_relays(bus) as (one, other), registered(one, B) as peer:
        with monkeypatch.context() as patch:
            real = time.time_ns
            patch.setattr(relay.time, 'time_ns', lambda: real() + ahead)
            old = await open_websocket(other.url)
            old = Peer(old, A, 'old', generation)
            assert await old.ask(old.registration()) == old.response()
        await settled(other)
        # A claim that is older by less than its time on the way counts as younger.
        claims = other.backplane.claims
        claims.update((c, n._replace(since=n.since - 1)) for c, n in claims.items())
        async with registered(one, A) as new:
            close = await old.close_frame()
            assert (close.code, close.reason) == (code, relay.DISPLACED)
            await settled(one, other)
            assert holder(one, A) and not holder(other, A)
            async with registered(other, C) as third:
                await exchange(third, new)
            await exchange(peer, new)
            assert one.counts['displaced_registrations'] == 0


async def race(one, other, uuids):
    """Register UUIDs with two relays at the same time; see that each ends with one of them."""
    async with contextlib.AsyncExitStack() as stack:

        async def join(server, uuid):
            peer = Peer(await stack.enter_async_context(open_websocket(server.url)), uuid)
            return peer

        racers = await asyncio.gather(*(join(s, u) for u in uuids for s in (one, other)))
        for racer in racers:
            await racer.say(racer.registration())
        for racer in racers:
            assert await racer.hear() == racer.response()
        await until(lambda: len(one.backplane.claims) + len(other.backplane.claims) == len(uuids))
        await settled(one, other)
        assert all(bool(holder(one, uuid)) != bool(holder(other, uuid)) for uuid in uuids)
        async with registered(one, A) as a:
            for uuid in uuids:
                await a.say(a.offer(uuid))
                winner = racers[2 * uuids.index(uuid) + bool(holder(other, uuid))]
                assert await winner.hear() == a.offer(uuid)
            await hears_only(a)


@over_nats
@run_async
async def test_of_two_simultaneous_registrations_of_a_uuid_one_stays(bus):
    async with two_relays(bus) as (one, other):
        await race(one, other, [UUID(int=n) for n in range(1000, 1200)])


@over_nats
@run_async
async def test_messages_between_relays_keep_their_order_and_hold_up_no_others(bus):
    async with two_relays(bus) as (one, other), registered(one, C) as near:
        async with registered(one, A) as a, registered(other, B) as b:
            for number in range(200):
                await a.say(a.offer(B, description=str(number)))
                await a.say(a.offer(C, description=str(number)))
            for peer in (near, b):
                got = [(await peer.hear())['description'] for _ in range(200)]
                assert got == [str(number) for number in range(200)]
            await hears_only(a)


@over_nats
@run_async
async def test_messages_to_a_peer_that_has_just_registered_arrive(bus):
    async with two_relays(bus) as (one, other), registered(one, A) as a:
        for number in range(1, 20):
            uuid = UUID(int=number << 32)
            async with registered(other, uuid) as b:
                offers = [a.offer(uuid, description=str(n)) for n in range(10)]
                for offer in offers:
                    await a.say(offer)
                await hears_only(b, *offers)
        await hears_only(a)


@over_nats
@run_async
async def test_three_relays_share_their_clients(bus):
    async with two_relays(bus) as (one, two), joined_relay(bus) as three:
        async with registered(one, A) as a, registered(two, B) as b, registered(three, C) as c:
            for pair in ((a, b), (b, c), (c, a)):
                await exchange(*pair)
            for server in (two, three):
                async with registered(server, A) as new:
                    await exchange(new, b)
                    # Until then, the one before may be who hears it.
                    await settled(server)
                    await exchange(c, new)


@over_nats
@pytest.mark.parametrize('how', ['killed', 'frozen'])
@run_async
async def test_without_nats_local_peers_still_exchange_messages(how, caplog, monkeypatch):
    monkeypatch.setattr(relay, 'NATS_REQUEST_TIMEOUT', 0.2)
    monkeypatch.setattr(relay, 'NATS_HEARTBEAT', 0.02)
    with contextlib.ExitStack() as stack, logged(caplog) as lines:
        port = stack.enter_context(port_to_come())
        first = stack.enter_context(running_nats(port=port))
        async with two_relays(first.url) as (one, other), registered(one, C) as near:
            async with registered(one, A) as a, registered(other, B) as b:
                await exchange(a, b)
                # A verdict that is lost would have its message come back although it has arrived.
                await settled(one, other)
                strike(first, how)
                offer = a.offer(B)
                # Nobody knows yet that it is lost; the next one is refused at once.
                for _ in range(2):
                    await exchange(a, near)
                    answer = await a.ask(offer)
                    assert answer == sent_back(offer, relay.FORWARD_ERRORS['disconnected'])
                    await until(lambda: not one.backplane.connected)
                began = time.monotonic()
                assert await a.ask(offer) == answer
                assert time.monotonic() - began < 0.1
                lost = '; clients of other relays cannot be reached'
                await until(lambda: any(line.endswith(lost) for line in lines()))
                async with registered(one, UUID(int=9)) as passing:
                    await exchange(a, passing)
                async with registered(other, UUID(int=8)) as newcomer:
                    if how == 'killed':
                        first.wait()
                        stack.enter_context(running_nats(port=port))
                    else:
                        first.send_signal(signal.SIGCONT)
                    await until(lambda: one.backplane.connected and other.backplane.connected)
                    await settled(one, other)
                    # What was late may have come after all, but its sender has an answer.
                    late = await offers_of(a, b)
                    assert late <= (2 if how == 'frozen' else 0)
                    await exchange(a, b)
                    await exchange(a, newcomer)
                assert await a.ask(a.offer(UUID(int=9))) == sent_back(
                    a.offer(UUID(int=9)), relay.FORWARD_ERRORS['unknown_peer']
                )
                for peer in (a, b, near):
                    await hears_only(peer)
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len([x for x in warnings if x.startswith('NATS')]) <= 8
        assert not [
            x for x in lines() if 'Unregistered' in x and 'by the client with 1000' not in x
        ]


async def offers_of(sender, receiver):
    """Return how many messages come to a client before the next of a sender."""
    mark = sender.offer(receiver.uuid, description=str(uuid4()))
    await sender.say(mark)
    for number in range(99):
        if await receiver.hear() == mark:
            return number


@over_nats
@run_async
async def test_a_relay_serves_before_nats_is_there(caplog, monkeypatch):
    monkeypatch.setattr(relay, 'NATS_HEARTBEAT', 0.02)
    with logged(caplog, 'WARNING') as lines, port_to_come() as port:
        url = f'nats://127.0.0.1:{port}'
        async with joined_relay(url, wait=False) as one, joined_relay(url, wait=False) as other:
            async with registered(one, A) as a, registered(one, C) as near:
                async with registered(other, B) as b, registered(other, A) as later:
                    await exchange(a, near)
                    await exchange(later, b)
                    answer = await a.ask(a.offer(B))
                    assert answer == sent_back(a.offer(B), relay.FORWARD_ERRORS['disconnected'])
                    await until(lambda: len([x for x in lines() if x.startswith('NATS')]) == 2)
                    with running_nats(port=port):
                        # The one that registered later has the UUID.
                        assert await a.closed_with() == 1001
                        await settled(one, other)
                        await exchange(later, near)
                        await exchange(near, b)
            assert len([x for x in lines() if 'Connect call failed' in x]) == 2
            await until(lambda: not other._uuid_to_client)


@contextlib.asynccontextmanager
async def switch(port, edited=bytes):
    """Pass connections on to a port, edit what comes from it.

    Yields the port of its own, and a set of the writers, for a test to close.
    """
    writers = set()

    async def copy(reader, writer, edited=bytes):
        writers.add(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(edited(data))
        writer.close()

    async def accept(reader, writer):
        with contextlib.suppress(asyncio.CancelledError):
            far_reader, far_writer = await asyncio.open_connection('127.0.0.1', port)
            await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer, edited))

    async with await asyncio.start_server(accept, '127.0.0.1', 0) as server:
        yield server.sockets[0].getsockname()[1], writers
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@over_nats
@run_async
async def test_news_of_the_cluster_during_the_first_ping_disconnects_nobody(caplog, monkeypatch):
    def edited(data):
        said.append(data)
        # The first line that NATS said, again, before its answer to the first ping.
        return said[0] + data if said.count(b'PONG\r\n') == 1 == len(said) - 1 else data

    said = []
    monkeypatch.setattr(relay, 'NATS_HEARTBEAT', 0.02)
    with running_nats() as server, logged(caplog) as lines:
        async with switch(server.ports['nats'], edited) as (port, _):
            async with joined_relay(f'nats://127.0.0.1:{port}') as one:
                async with joined_relay(server.url) as other:
                    async with registered(one, A) as a, registered(other, B) as b:
                        await exchange(a, b)
    assert any('interrupted while connecting' in line for line in lines())


@over_nats
@run_async
async def test_after_a_split_the_later_registration_holds_the_uuid(monkeypatch):
    monkeypatch.setattr(relay, 'NATS_HEARTBEAT', 0.02)
    monkeypatch.setattr(relay, 'CLAIM_BEATS', 2)
    monkeypatch.setattr(
        relay, 'NATS_REQUEST_TIMEOUT', 0.2
    )  # before the servers find each other again
    with running_member() as first:
        async with switch(first.ports['cluster']) as (between, writers):
            with running_member(between) as second:
                async with joined_relay(first.url) as one, joined_relay(second.url) as other:
                    async with registered(one, B) as b, registered(other, C) as c:
                        await meet(b, c)
                        for writer in list(writers):
                            writer.close()
                        while await joined(b, c):
                            pass
                        async with registered(other, A) as earlier, registered(one, A) as later:
                            assert holder(one, A) and holder(other, A)
                            assert await earlier.closed_with() == 1001
                            await meet(b, later)
                            await meet(c, later)


@over_nats
@run_async
async def test_the_peers_of_a_relay_that_is_killed_are_unknown():
    with (
        running_nats('http: "127.0.0.1:-1"') as server,
        running_program('--host', '127.0.0.1', '--nats', server.url) as program,
    ):
        async with joined_relay(server.url) as one, registered(one, A) as a:
            async with registered(program, B) as b:
                await meet(a, b)
                program.kill()
                # NATS itself has to hear of it before.
                while len((await connz(server))['connections']) > 1:
                    pass
                assert await a.ask(a.offer(B)) == {**a.offer(B), 'error': unknown(B)}
                await hears_only(a)


@over_nats
@run_async
async def test_a_frozen_relay_delays_its_messages_only_once(bus, monkeypatch):
    monkeypatch.setattr(relay, 'NATS_REQUEST_TIMEOUT', 0.3)
    with running_program('--host', '127.0.0.1', '--nats', bus) as program:
        async with joined_relay(bus) as one, registered(one, A) as a, registered(one, C) as near:
            async with registered(program, B) as b:
                await meet(a, b)
                strike(program, 'frozen')
                began = time.monotonic()
                offers = [a.offer(B, description=str(n)) for n in range(20)]
                for offer in offers:
                    await a.say(offer)
                await exchange(near, near)
                assert time.monotonic() - began < 0.2
                for offer in offers:
                    answer = await a.hear()
                    assert answer == sent_back(offer, relay.FORWARD_ERRORS['disconnected'])
                assert time.monotonic() - began < 0.6
                program.send_signal(signal.SIGCONT)
                await offers_of(a, b)
                await exchange(a, b)
                await hears_only(a)
        assert not one.backplane.queues and not one.backplane.in_flight


@over_nats
@run_async
async def test_a_message_is_not_delivered_after_an_earlier_one_failed(bus, monkeypatch):
    monkeypatch.setattr(relay, 'NATS_REQUEST_TIMEOUT', 0.5)
    monkeypatch.setattr(relay, 'SUBSCRIPTION_PROPAGATION', 0.3)
    with running_program('--host', '127.0.0.1', '--nats', bus) as program:
        async with joined_relay(bus) as one, registered(one, A) as a:
            async with registered(program, B) as b:
                await meet(a, b)
                strike(program, 'frozen')
                offers = [a.offer(B, description=str(n)) for n in range(10)]
                for offer in offers:
                    await a.say(offer)
                    await asyncio.sleep(0.01)
                for offer in offers:
                    answer = await a.hear()
                    assert answer == sent_back(offer, relay.FORWARD_ERRORS['disconnected'])
                program.send_signal(signal.SIGCONT)
                # Of the first, which was on its way, this cannot be told.
                assert await offers_of(a, b) <= 1


@over_nats
@run_async
async def test_a_message_too_long_for_nats_is_returned():
    with running_nats('max_payload: 1000') as server:
        async with two_relays(server.url) as (one, other):
            async with registered(one, A) as a, registered(other, B) as b:
                offer = a.offer(B, description='x' * 1000)
                with moves(one, refused('too_long')):
                    assert await a.ask(offer) == sent_back(offer, relay.FORWARD_ERRORS['too_long'])
                await exchange(a, b)
                await hears_only(a)


@over_nats
@pytest.mark.parametrize('how', ['there', 'killed', 'frozen'])
@run_async
async def test_a_relay_that_stops_delivers_what_is_in_flight(how):
    with (
        running_nats() as server,
        running_program('--host', '127.0.0.1', '--rate', '0', '--nats', server.url) as program,
    ):
        async with joined_relay(server.url) as one, registered(one, A) as a:
            async with registered(program, B) as b:
                await meet(a, b)
                if how != 'there':
                    strike(server, how)
                # Who does not read its errors is not read either.
                closing = asyncio.ensure_future(b.close_frame())
                offers = [b.offer(A, description=str(n)) for n in range(100)]
                for offer in offers:
                    await b.say(offer)
                await dealt_with(b)
                program.terminate()
                began = time.monotonic()
                assert (await closing).code == 1001
                if how == 'there':
                    assert [await a.hear() for _ in range(100)] == offers
                    assert b.last_words == []
        assert await asyncio.to_thread(program.wait) == 0
        assert time.monotonic() - began < 4
        assert not re.search('ERROR|Traceback', program.stdout.read() + program.stderr.read())


@over_nats
@run_async
async def test_each_message_to_a_relay_that_stops_arrives_or_comes_back(bus):
    with running_program('--host', '127.0.0.1', '--rate', '0', '--nats', bus) as program:
        async with joined_relay(bus) as one, registered(one, A) as a:
            async with registered(program, B) as b:
                await meet(a, b)
                offers = [a.offer(B, description=str(n)) for n in range(200)]
                for offer in offers:
                    await a.say(offer)
                    if offer is offers[50]:
                        program.terminate()
                await b.close_frame()
                came = [json.loads(text) for text in b.last_words]
                assert came == offers[: len(came)]
                back = [{**offer, 'error': unknown(B)} for offer in offers[len(came) :]]
                await hears_only(a, *back)
        assert await asyncio.to_thread(program.wait) == 0


@over_nats
@run_async
async def test_of_three_nats_servers_one_may_be_killed(monkeypatch):
    monkeypatch.setattr(relay, 'NATS_HEARTBEAT', 0.02)
    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(3):
            others = [server.ports['cluster'] for server in servers]
            servers.append(stack.enter_context(running_member(*others)))
        urls = [server.url for server in servers]
        async with joined_relay(urls[0]) as one, joined_relay(urls[1]) as other:
            # Servers that do not know each other yet are no subject here.
            async with registered(one, B) as b, registered(other, C) as c:
                await meet(b, c)
            await race(one, other, [UUID(int=n) for n in range(1000, 1020)])
        async with joined_relay(*urls) as one, joined_relay(*urls) as other:
            async with registered(one, B) as b, registered(other, C) as c:
                await meet(b, c)
                url = one.backplane.nats.connected_url.geturl()
                (lost,) = [server for server in servers if server.url == url]
                lost.kill()
                lost.wait()
                await until(lambda: not one.backplane.connected)
                await until(lambda: one.backplane.connected and other.backplane.connected)
                await meet(b, c)
                await hears_only(b)
                await hears_only(c)


@over_nats
@run_async
async def test_clients_that_leave_leave_nothing_with_nats():
    with running_nats('http: "127.0.0.1:-1"') as server:
        async with two_relays(server.url) as (one, other):
            async with registered(one, C) as near, registered(other, C) as newer:
                assert await near.closed_with() == 1001
                await settled(one, other)
                reading = asyncio.ensure_future(drain(newer))
                for number in range(30):
                    async with registered(one, A) as a, registered(other, B) as b:
                        await a.say(a.offer(B))
                        await b.say(b.offer(A))
                        await a.say(a.offer(UUID(int=number + 1)))
                        leave = [leave_with_a_close, leave_with_a_reset][number % 2]
                        await leave(a)
                        if number % 3:
                            await newer.say(newer.offer(A))
                for relays in (one, other):
                    await until(lambda backplane=relays.backplane: not backplane.queues)
                    await until(lambda server=relays: not holder(server, A))
                    await until(lambda server=relays: not holder(server, B))
                await settled(one, other)
                reading.cancel()
                assert not one.backplane.claims and not one.backplane.subscriptions
                assert not one.backplane.in_flight and not other.backplane.in_flight
                assert len(other.backplane.claims) == len(other.backplane.subscriptions) == 1
                # One for the client that is left; for each relay, its claims and its answers.
                await until(lambda: running('_wait_for_msgs') == 5 and running('Backplane') == 2)
                await until_subscribed(server, one, other)


async def until_subscribed(server, *relays):
    """Wait until a NATS server has the subscriptions that relays believe they have."""
    url = f'http://127.0.0.1:{server.ports["monitoring"]}/subsz?subs=1&limit=100000'
    while True:
        with await asyncio.to_thread(urllib.request.urlopen, url) as answer:
            found = json.load(answer)
        listed = [item['subject'] for item in found.get('subscriptions_list', [])]
        listed = sorted(x for x in listed if x.startswith('relay.client.'))
        held = [c for r in relays for c in r.backplane.subscriptions]
        if listed == sorted(relay._subject(client.user, client.uuid) for client in held):
            return


def running(name):
    tasks = [task for task in asyncio.all_tasks() if name in task.get_coro().__qualname__]
    return len(tasks)


@over_nats
@run_async
async def test_credentials_for_nats_are_in_its_address(caplog, monkeypatch):
    monkeypatch.setattr(relay, 'NATS_HEARTBEAT', 0.02)
    with running_nats('authorization: {user: relay, password: secret}') as server:
        right, wrong = (
            server.url.replace('//', f'//relay:{word}@') for word in ('secret', 'wr0ng')
        )
        with logged(caplog) as lines:
            async with two_relays(right) as (one, other):
                async with registered(one, A) as a, registered(other, B) as b:
                    await exchange(a, b)
            async with joined_relay(wrong, wait=False) as server, registered(server, A) as a:
                refusal = (
                    'NATS: Authorization Violation; clients of other relays cannot be reached'
                )
                await until(lambda: refusal in lines())
                answer = await a.ask(a.offer(B))
                assert answer == sent_back(a.offer(B), relay.FORWARD_ERRORS['disconnected'])
        assert lines().count(refusal) == 1
        assert not re.search('secret|wr0ng', ''.join(r.getMessage() for r in caplog.records))


@over_nats
@run_async
async def test_relays_verify_the_certificate_of_nats(pem, monkeypatch):
    monkeypatch.setattr(relay, 'NATS_HEARTBEAT', 0.02)
    monkeypatch.setenv('SSL_CERT_FILE', str(pem / 'cert.pem'))
    files = '{{cert_file: "{0}/{1}.pem", key_file: "{0}/{1}.key"}}'
    servers = [running_nats(f'tls: {files.format(pem, name)}') for name in ('cert', 'other')]
    with servers[0] as known, servers[1] as other:
        known, other = (server.url.replace('nats://', 'tls://') for server in (known, other))
        async with two_relays(known) as (one, two), joined_relay(other, wait=False) as lost:
            async with registered(one, A) as a, registered(two, B) as b, registered(lost, C) as c:
                await exchange(a, b)
                await until(lambda: lost.backplane.logged)
                assert any('certificate verify failed' in fault for fault in lost.backplane.logged)
                answer = await c.ask(c.offer(B))
                assert answer == sent_back(c.offer(B), relay.FORWARD_ERRORS['disconnected'])


@over_nats
def test_credentials_that_cannot_be_used_are_one_line(tmp_path, monkeypatch):
    (tmp_path / 'nkeys.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    line = fails(
        '--port', '0', '--nats', 'nats://127.0.0.1', '--nats-creds', '/nowhere/relay.creds'
    )
    assert line == 'relay.py: cannot read /nowhere/relay.creds: No such file or directory\n'
    line = fails(
        '--port', '0', '--nats', 'nats://127.0.0.1', '--nats-creds', tmp_path / 'nkeys.py'
    )
    assert line == f'relay.py: {tmp_path}/nkeys.py holds no credentials for NATS\n'
    assert 'needs --nats' in fails('--nats-creds', 'x', status=2)


def without_package(name, tmp_path, monkeypatch):
    """Have programs not find a package, be they forked or new."""
    (tmp_path / f'{name}.py').write_text(f'raise ImportError("No module named {name!r}")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    for module in [module for module in sys.modules if module.partition('.')[0] == name]:
        monkeypatch.delitem(sys.modules, module)


def test_without_nats_py_the_option_is_one_line(tmp_path, monkeypatch):
    without_package('nats', tmp_path, monkeypatch)
    line = fails('--port', '0', '--nats', 'nats://127.0.0.1')
    assert line == "relay.py: --nats: No module named 'nats'; try: pip install nats-py\n"


@over_nats
def test_without_nkeys_credentials_are_one_line(tmp_path, monkeypatch):
    without_package('nkeys', tmp_path, monkeypatch)
    line = fails('--port', '0', '--nats', 'nats://127.0.0.1', '--nats-creds', os.devnull)
    assert line.endswith("No module named 'nkeys'; try: pip install 'nats-py[nkeys]'\n")


def test_without_the_option_nothing_of_nats_is_imported(tmp_path, monkeypatch):
    without_package('nats', tmp_path, monkeypatch)
    with running_program('--host', '127.0.0.1') as process:
        process.terminate()
        assert (process.wait(), process.stderr.read()) == (0, '')


@pytest.mark.parametrize(
    'url',
    [
        '127.0.0.1',
        'http://127.0.0.1',
        'nats://',
        'nats://:4222',
        'nats://u:secret@h:0',
        'nats://h:x',
    ],
)
def test_a_wrong_address_of_nats_is_one_line(url):
    line = fails('--nats', url, status=2)
    assert 'not in the form nats://HOST:PORT or tls://HOST:PORT' in line and 'secret' not in line


@over_nats
@run_async
async def test_a_check_connects_two_clients_across_relays(bus, tokens):
    async with two_relays(bus, tokens=tokens) as (one, other):
        urls = [server.url.replace('//', '//alice:a1@') for server in (one, other)]
        line = await relay.check(*urls)
        places = f'{one.url} and {other.url}'
        assert re.fullmatch(rf'ok: two clients connected through {places} in \d+\.\d ms', line)
        assert one.counts['registrations'] == other.counts['registrations'] == 1


def test_a_check_takes_two_addresses_and_no_more():
    assert 'one URL or two' in fails('--check', 'ws://a', 'ws://b', 'ws://c', status=2)


@over_nats
@run_async
async def test_relays_of_one_machine_share_a_port(bus):
    options = '--host', '127.0.0.1', '--nats', bus
    with contextlib.ExitStack() as programs:
        one = programs.enter_context(running_program(*options))
        port = str(one.ports[0])
        other = programs.enter_context(running_program(*options, '--port', port))
        assert one.url == other.url
        async with contextlib.AsyncExitStack() as stack:
            uuids = [UUID(int=n + 1) for n in range(20)]
            peers = [await stack.enter_async_context(registered(one, u)) for u in uuids]
            for a, b in zip(peers, peers[1:]):
                await meet(a, b)
            for process in (one, other):
                process.terminate()
            for peer in peers:
                await peer.closed_with()
        logs = [process.stdout.read() for process in (one, other)]
    assert all('Registered' in log for log in logs)
    assert sum(log.count(' Registered') for log in logs) == 20
    assert '"' not in ''.join(logs) and 'Address already in use' in fails_on_a_port()


def fails_on_a_port():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        return fails('--host', '127.0.0.1', '--port', taken.getsockname()[1])


@over_nats
@run_async
async def test_messages_over_nats_are_counted(bus, monkeypatch):
    async with two_relays(bus) as (one, other):
        async with registered(one, A) as a, registered(other, B) as b:
            await until(lambda: samples(one)['relay_nats_round_trip_seconds'] > 0)
            assert samples(one)['relay_nats_connected'] == 1
            with moves(one, 'relay_remote_messages_total', 2):
                with moves(other, 'relay_forwarded_messages_total', 2):
                    for _ in range(2):
                        await a.say(a.offer(B))
                        await b.hear()
                    await settled(one)
            assert samples(one)['relay_forwarded_messages_total'] == 0
            with moves(one, refused('unknown_peer')):
                await a.ask(a.offer(C))
            assert samples(one)['relay_remote_unknown_total'] == 1
        await one.backplane.close()
        assert samples(one)['relay_nats_connected'] == 0
        async with registered(one, A) as a:
            with moves(one, refused('disconnected')):
                await a.ask(a.offer(B))
        if shutil.which('promtool'):
            text = relay.metrics(one).encode()
            promtool = ['promtool', 'check', 'metrics']
            done = await asyncio.to_thread(
                subprocess.run, promtool, input=text, capture_output=True
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, b'', b'')


@over_nats
@pytest.mark.parametrize('error, count', [('ConnectionClosedError', 0), ('KeyError', 1)])
@run_async
async def test_a_bug_in_a_task_is_logged_as_an_error_and_a_fault_is_not(bus, caplog, error, count):
    async def fail():
        raise {**vars(nats.errors), 'KeyError': KeyError}[error]

    async with joined_relay(bus) as server:
        server.backplane._start(fail())
        await asyncio.wait(server.backplane.tasks)
        gc.collect()
    lines = [r.getMessage() for r in caplog.records if r.levelname == 'ERROR']
    assert lines == ['Internal error while using NATS'] * count


@over_nats
@run_async
async def test_a_bug_while_sending_leaves_each_message_one_outcome(bus, caplog, monkeypatch):
    async with two_relays(bus) as (one, other):
        async with registered(one, A) as a, registered(other, B) as b:
            await exchange(a, b)
            with monkeypatch.context() as patch:
                patch.setitem(one.counts, 'remote_messages', None)
                await a.say(a.offer(B))
                assert (await a.hear())['error'].endswith(DISCONNECTED)
            assert await b.hear() == a.offer(B)  # this could not be known
            await exchange(a, b)
            assert not one.backplane.queues and not one.backplane.in_flight
    assert 'Internal error while using NATS' in [r.getMessage() for r in caplog.records]


@over_nats
@run_async
async def test_a_connection_lost_while_the_relay_subscribes_is_a_fault(bus, caplog, monkeypatch):
    async def interrupted(client, *args, **options):
        found = await subscribe(client, *args, **options)
        if not calls:
            calls.append(args)
            await client.close()
        return found

    calls, subscribe = [], nats.NATS.subscribe
    monkeypatch.setattr('nats.NATS.subscribe', interrupted)
    async with joined_relay(bus) as server:
        await until(lambda: server.backplane.round_trip)
        lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    lost = '; clients of other relays cannot be reached'
    assert lines == [f'NATS: interrupted while connecting{lost}']


@over_nats
@run_async
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
        for _ in range(3):  # as nats-py does, which does not know yet
            transport.writelines([b'x'])
        with pytest.raises(OSError):
            await writer.drain()
            await writer.wait_closed()
    assert not asyncio.get_running_loop().remove_writer(descriptor)


@over_nats
@run_async
async def test_an_answer_in_flight_when_nats_is_lost_leaves_no_task(caplog, monkeypatch):
    answering = asyncio.Event()

    async def respond(message, data):
        answering.set()
        # As the library does where it waits for what it writes.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    monkeypatch.setattr(relay, 'NATS_HEARTBEAT', 0.02)
    monkeypatch.setattr('nats.aio.msg.Msg.respond', respond)
    with running_nats() as process:
        async with two_relays(process.url) as (one, other):
            async with registered(one, A) as a, registered(other, B):
                await a.say(a.offer(B))
                await asyncio.wait_for(answering.wait(), 5)
                process.kill()
                await until(lambda: not other.backplane.connected)
    gc.collect()
    assert not [task for task in asyncio.all_tasks() if '_wait_for_msgs' in repr(task)]
    assert [record.name for record in caplog.records if record.levelname == 'ERROR'] == []


@over_nats
@run_async
async def test_all_clients_are_reached_after_nats_is_killed_in_the_middle_of_claiming(monkeypatch):
    monkeypatch.setattr(relay, 'NATS_REQUEST_TIMEOUT', 0.5)
    calls, servers = [], []
    subscribe, later = nats.NATS.subscribe, contextlib.ExitStack()

    async def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 30:
            server.kill()
            server.wait()
            # The relay is busy until NATS has long been there again.
            again = running_nats('http: "127.0.0.1:-1"', port=port)
            servers.append(later.enter_context(again))
            time.sleep(0.6)
        return await subscribe(*args, **options)

    with later, port_to_come() as port, running_nats(port=port) as server:
        async with two_relays(server.url) as (one, other), contextlib.AsyncExitStack() as stack:
            uuids = [UUID(int=n) for n in range(1000, 1060)]
            peers = [await stack.enter_async_context(registered(other, u)) for u in uuids]
            await settled(other)
            with monkeypatch.context() as patch:
                patch.setattr('nats.NATS.subscribe', interrupted)
                other.backplane.nats._transport.close()
                await until(lambda: len(calls) > 30 + 60)
            await until(lambda: one.backplane.connected and other.backplane.connected)
            await settled(one, other)
            async with registered(one, A) as a:
                for peer in peers:
                    await a.say(a.offer(peer.uuid))
                    assert await peer.hear() == a.offer(peer.uuid)
                await until_subscribed(*servers, one, other)


@over_nats
@pytest.mark.parametrize('how', ['reset', 'killed'])
@run_async
async def test_a_lost_connection_to_nats_leaves_no_task(how, caplog, monkeypatch):
    async def drain(transport):
        if lost:
            transport._io_writer.transport.abort()
            raise ConnectionResetError

    async def flush_pending(client, *args, **options):
        await flush(client, *args, **options)
        if client.is_closed:  # something is still to be written when it closes
            client._pending_data_size = 1

    lost, flush = [], nats.NATS._flush_pending
    monkeypatch.setattr('nats.aio.transport.TcpTransport.drain', drain)
    monkeypatch.setattr('nats.NATS._flush_pending', flush_pending)
    monkeypatch.setattr(relay, 'NATS_HEARTBEAT', 0.02)
    with running_nats() as server:
        async with Link(server.ports['nats']) as link, contextlib.AsyncExitStack() as stack:
            one = await stack.enter_async_context(joined_relay(link.url))
            for n in range(50):
                await stack.enter_async_context(registered(one, UUID(int=n + 1)))
            await settled(one)
            tasks = [t for t in asyncio.all_tasks() if '_wait_for_msgs' in repr(t)]
            assert len(tasks) >= 51
            lost.append(how)
            if how == 'killed':
                server.kill()
            link.reset()
            await asyncio.wait(tasks)
            lost.clear()
            if how == 'reset':
                await until(lambda: one.backplane.connected)
    del tasks
    gc.collect()
    assert not [t for t in asyncio.all_tasks() if '_wait_for_msgs' in repr(t)]
    assert [r.getMessage() for r in caplog.records if r.levelname == 'ERROR'] == []


@over_nats
@run_async
async def test_each_message_goes_to_only_one_of_two_holders(bus, monkeypatch):
    async def ignore(backplane, message):
        pass

    monkeypatch.setattr('relay.Backplane._on_claims', ignore)
    async with two_relays(bus) as (one, two), joined_relay(bus) as three:
        async with registered(one, B) as b, registered(two, B) as b2, registered(three, A) as a:
            await settled(one, two)
            offers = [a.offer(B, description=str(n)) for n in range(100)]
            for offer in offers:
                await a.say(offer)
                await dealt_with(a)
                await until(lambda: not three.backplane.queues)
            await hears_only(a)
            found = []
            for peer in (b, b2):
                mark = peer.offer(B, description='end')
                await peer.say(mark)
                while (message := await peer.hear()) != mark:
                    found.append(message)
            assert sorted(found, key=lambda m: int(m['description'])) == offers


@over_nats
@run_async
async def test_a_burst_over_a_slow_link_arrives_in_order(bus):
    async with Link(urlsplit(bus).port, delay=0.08) as slow:
        async with joined_relay(slow.url) as one, joined_relay(bus) as other:
            async with registered(one, A) as a, registered(other, B) as b:
                await meet(a, b)
                for sender, receiver in ((a, b), (b, a)):
                    offers = [sender.offer(receiver.uuid, description=str(n)) for n in range(100)]
                    for offer in offers:
                        await sender.say(offer)
                    await hears_only(receiver, *offers)
                await hears_only(a)
                await hears_only(b)


@over_nats
@pytest.mark.parametrize('reply', ['sold_out', 'backlog,backlog', '{"verdict": null}', '\x00'])
@run_async
async def test_a_verdict_of_a_newer_relay_sends_the_message_back(bus, caplog, reply):
    client = await nats.connect(bus)

    async def answer(message):
        await message.respond(reply.encode())

    await client.subscribe(relay._subject('', B), queue='relays', cb=answer)
    async with joined_relay(bus) as one, registered(one, A) as a:
        await client.flush()
        for _ in range(2):
            back = await a.ask(a.offer(B))
            assert back == sent_back(a.offer(B), relay.FORWARD_ERRORS['disconnected'])
    await client.close()
    warnings = [r.getMessage() for r in caplog.records if 'verdict' in r.getMessage()]
    assert warnings == ['NATS: another relay gave a verdict not known here']


@over_nats
@run_async
async def test_claims_of_another_version_are_ignored_with_one_warning(bus, caplog):
    client = await nats.connect(bus)
    async with joined_relay(bus) as one, registered(one, A) as a:
        await settled(one)
        claim = [relay._subject('', A), time.time_ns() + HOUR, 'f', 0, 'x', 'an additional item']
        for _ in range(2):
            batch = {'version': 2, 'claims': [claim]}
            await client.publish('relay.claims', json.dumps(batch).encode())
        await client.flush()
        await settled(one)
        await exchange(a, a)
        warnings = [r.getMessage() for r in caplog.records if 'version' in r.getMessage()]
        assert warnings == ['NATS: another relay makes claims of a version not known here']
        batch = {'version': 1, 'claims': [claim], 'an additional key': None}
        await client.publish('relay.claims', json.dumps(batch).encode())
        assert await a.closed_with() == 1001
    await client.close()


@over_nats
@run_async
async def test_a_uuid_that_clients_of_two_relays_fight_over_is_named_once(bus, caplog):
    async with two_relays(bus) as servers, contextlib.AsyncExitStack() as stack:
        for number in range(10):
            peer = await stack.enter_async_context(registered(servers[number % 2], A))
            await settled(*servers)
            address = '127.0.0.1:%d' % peer.websocket.local_address[1]
        lines = [r.getMessage() for r in caplog.records if 'again and again' in r.getMessage()]
    # Each relay counts by itself.
    assert len(lines) == 2 and address
    place = r'127\.0\.0\.1:\d+'
    for line in lines:
        assert re.match(f'UUID {A} .* by {place} and {place} \\(on another relay\\); ', line)
        assert line.endswith('give one of them a new UUID')


@over_nats
@run_async
async def test_messages_in_flight_are_limited_in_total(bus, monkeypatch):
    monkeypatch.setattr(relay, 'MAX_IN_FLIGHT', 100_000)
    monkeypatch.setattr(relay, 'NATS_REQUEST_TIMEOUT', 0.3)
    totals, forward = [], relay.Backplane.forward

    def counted(backplane, *message):
        kind = forward(backplane, *message)
        totals.append(backplane.in_flight)
        return kind

    monkeypatch.setattr('relay.Backplane.forward', counted)
    with running_program('--host', '127.0.0.1', '--nats', bus) as program:
        async with joined_relay(bus) as one, registered(one, A) as a, registered(one, C) as c:
            async with registered(program, B) as b:
                await meet(a, b)
                strike(program, 'frozen')
                for sender in (a, c):
                    for _ in range(100):
                        await sender.say(sender.offer(B, description='x' * 1000))
                for sender in (a, c):
                    for _ in range(100):
                        assert (await sender.hear())['error'].endswith(DISCONNECTED)
                assert 90_000 < max(totals) <= 100_000
                assert one.backplane.in_flight == 0 and not one.backplane.queues
                program.send_signal(signal.SIGCONT)
                b.websocket.transport.abort()  # it has more unread messages than it would read


@over_nats
@run_async
async def test_messages_wait_for_a_relay_that_is_upgraded_or_come_back_as_disconnected(bus):
    async with two_relays(bus) as (one, other):
        async with registered(one, A) as a, registered(other, B) as b:
            await exchange(a, b)
            offers, backplane = [], other.backplane

            async def talk():
                for number in range(10**6):
                    offers.append(a.offer(B, description=str(number)))
                    await a.say(offers[-1])
                    await asyncio.sleep(0.002)

            talking = asyncio.ensure_future(talk())
            await backplane.close(upgrading=True)
            claims = {client: relay.Claim(*claim) for client, claim in backplane.claims.items()}
            other.backplane = None
            sent = len(offers)
            await until(lambda: len(offers) > sent + 100)
            other.backplane = relay.Backplane(other, [bus], None)
            for client, claim in claims.items():
                other.backplane.announce(client, claim)
            await settled(other)
            assert dict(other.backplane.claims) == claims
            talking.cancel()
            await until(lambda: not one.backplane.queues)
            found = [json.loads(await b.websocket.recv()) for _ in range(one_count(one))]
            back = [await a.hear() for _ in range(len(offers) - len(found))]
            assert {x['error'].partition('because ')[2] for x in back} <= {DISCONNECTED[8:]}
            numbers = [int(message['description']) for message in found]
            assert numbers == sorted(numbers)
            assert sorted(numbers + [int(x['description']) for x in back]) == [*range(len(offers))]
            await exchange(a, b)


def one_count(server):
    return server.counts['remote_messages'] - 1


@over_nats
@run_async
async def test_an_upgrade_that_takes_too_long_sends_messages_back(bus, monkeypatch):
    monkeypatch.setattr(relay, 'NATS_REQUEST_TIMEOUT', 0.2)
    async with two_relays(bus) as (one, other):
        async with registered(one, A) as a, registered(other, B) as b:
            await exchange(a, b)
            await other.backplane.close(upgrading=True)
            back = await a.ask(a.offer(B))
            assert back == sent_back(a.offer(B), relay.FORWARD_ERRORS['disconnected'])
            monkeypatch.setattr(one.backplane, 'upgrade_ends', 0)
            assert await a.ask(a.offer(B)) == {**a.offer(B), 'error': unknown(B)}
            await hears_only(b)


# ------------------------------------------------------------------------------- Checker


class Link:
    """A TCP proxy that can be cut, stalled, or slow."""

    def __init__(self, port, delay=0):
        self.port, self.delay = port, delay  # s, each way
        self.flowing, self.cut, self.transports = asyncio.Event(), False, set()
        self.flowing.set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.accept, '127.0.0.1', 0)
        self.url = 'nats://127.0.0.1:%d' % self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        self.reset()

    def reset(self):
        """Reset all connections."""
        for transport in self.transports:
            transport.abort()

    async def accept(self, reader, writer):
        self.transports.add(writer.transport)
        try:
            far_reader, far_writer = await asyncio.open_connection('127.0.0.1', self.port)
            self.transports.add(far_writer.transport)
            if self.cut:
                self.reset()
            copies = self.copy(reader, far_writer), self.copy(far_reader, writer)
            await asyncio.gather(*copies)
            self.transports.discard(far_writer.transport)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
        self.transports.discard(writer.transport)

    async def copy(self, reader, writer):
        pieces, loop = asyncio.Queue(), asyncio.get_running_loop()

        async def write():
            while (piece := await pieces.get()) is not None:
                await asyncio.sleep(piece[0] - loop.time())
                await self.flowing.wait()
                writer.write(piece[1])
            writer.transport.abort()

        writing = asyncio.ensure_future(write())
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                pieces.put_nowait((loop.time() + self.delay, data))
        pieces.put_nowait(None)
        await writing


class Attempt:
    """A client's registration in the checker: a connection, and what became of it."""

    def __init__(self, uuid, place, began):
        self.uuid, self.place, self.began = uuid, place, began
        self.websocket = self.registered = self.ended = None
        self.last_heard = {}  # number of the last message, by sender

    @property
    def alive(self):
        return self.registered is not None and self.ended is None


class Process:
    """A program of the checker that can be killed, frozen and started again."""

    def __init__(self, folder, name, command):
        self.log, self.command = Path(folder, name), [str(word) for word in command]
        self.deaths = []
        self.start()

    def start(self):
        with self.log.open('ab') as log:
            self.child = subprocess.Popen(self.command, stdout=log, stderr=log)

    def kill(self):
        self.deaths.append(time.monotonic())
        self.child.kill()
        self.child.wait()


class Checker:
    """Relays, NATS servers and clients that exchange numbered messages while faults happen.

    It sees only what clients see, and the logs: one outcome for each message, in order; one
    holder of each UUID, the one that registered last; nobody dropped without a reason; no ERROR.
    """

    def __init__(self, seed, relays, servers, faults):
        self.random, self.size, self.faults = random.Random(seed), (relays, servers), faults
        self.attempts, self.problems, self.quick, self.ongoing = [], [], False, set()
        self.holders = {UUID(int=n): None for n in range(1, 13)}  # the last attempt, by UUID
        self.messages, self.outcomes = [], {}
        self.counts = dict.fromkeys(['messages', 'takeovers', 'faults'], 0)
        self.overtaken = []  # messages that arrived after a later one of their pair

    async def start(self, stack, folder):
        """Start servers, links and relays."""
        relays, servers = self.size
        ports = [stack.enter_context(port_to_come()) for _ in range(relays + 2 * servers)]
        self.servers, self.routes = [], []
        for n in range(servers):
            lines = ['listen: "127.0.0.1:%d"' % ports.pop()]
            if servers > 1:
                text = 'name: c, no_advertise: true, listen: "127.0.0.1:%d", routes: [%s]'
                urls = ', '.join('"%s"' % link.url for link in self.routes)
                lines.append('cluster: {%s}' % text % (ports[-1], urls))
                self.routes.append(await stack.enter_async_context(Link(ports.pop())))
            path = Path(folder, f'{n}.conf')
            path.write_text('\n'.join(lines))
            self.servers.append(Process(folder, f'nats-{n}', [NATS_SERVER, '-c', path]))
            self.servers[-1].port = int(re.search(r':(\d+)', lines[0])[1])
        self.links, self.relays = [], []
        for n in range(relays):
            links = [await stack.enter_async_context(Link(s.port)) for s in self.servers]
            options = [word for link in links for word in ('--nats', link.url)]
            command = [sys.executable, HERE / 'relay.py', '--host', '127.0.0.1', '--rate', 0]
            command += ['--port', ports.pop(), *options]
            self.relays.append(Process(folder, f'relay-{n}', command))
            self.relays[-1].url = f'ws://127.0.0.1:{command[7]}'
            self.links += links
        for process in self.relays + self.servers:
            stack.callback(process.kill)
        stack.callback(lambda: [link.server.close() for link in self.links])
        await self.wait_for(lambda: all(b'connected' in r.log.read_bytes() for r in self.relays))

    async def wait_for(self, condition, patience=30):
        """Wait until a condition holds; return whether it does."""
        end = time.monotonic() + patience
        while not condition() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return condition()

    async def register(self, uuid, place):
        """Register a UUID with a relay, if that works, and listen until the connection ends."""
        attempt, before = Attempt(uuid, place, time.monotonic()), self.holders.get(uuid)
        try:
            attempt.websocket = await open_websocket(self.relays[place].url, open_timeout=5)
            peer = Peer(attempt.websocket, uuid)
            await peer.say(peer.registration())
            answer = await asyncio.wait_for(peer.hear(), 10)
            assert answer == peer.response(), answer
        except (OSError, EOFError, asyncio.TimeoutError, WebSocketException):
            if attempt.websocket is not None:
                attempt.websocket.transport.abort()
                # It may have been registered without knowing it, and holds the UUID for a moment.
                attempt.ended = time.monotonic()
                self.attempts.append(attempt)
            return None
        attempt.registered = time.monotonic()
        self.attempts.append(attempt)
        self.holders[uuid] = attempt
        self.counts['takeovers'] += before is not None and before.alive
        attempt.listening = asyncio.ensure_future(self.listen(attempt))
        return attempt

    async def register_at_last(self, uuid, place=0):
        """Register a UUID with a relay that may have been started only now."""
        while not (attempt := await self.register(uuid, place)):
            await asyncio.sleep(0.05)
        return attempt

    async def listen(self, attempt):
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = json.loads(await attempt.websocket.recv())
                number = int(message['description'])
                back = message['error'] and message['error'].partition('because ')[2]
                self.outcomes.setdefault(number, []).append(back)
                sender = self.messages[number][0]
                if not back:
                    if attempt.last_heard.get(sender, -1) >= number:
                        self.overtaken.append(number)
                    attempt.last_heard[sender] = number
        attempt.ended = time.monotonic()

    async def send(self, attempt, uuid):
        number = len(self.messages)
        self.messages.append((attempt, uuid, time.monotonic()))
        self.counts['messages'] += 1
        with contextlib.suppress(ConnectionClosed):
            peer = Peer(attempt.websocket, attempt.uuid)
            await peer.say(peer.offer(uuid, description=str(number)))
        return number

    async def talk(self):
        """Send bursts between random clients."""
        while True:
            living = [a for a in self.holders.values() if a and a.alive]
            if living:
                sender, uuid = self.random.choice(living), self.random.choice([*self.holders])
                for _ in range(self.random.choice((1, 1, 1, 5, 20))):
                    await self.send(sender, uuid)
            await asyncio.sleep(self.random.uniform(0, 0.01))

    async def take_over(self):
        """Register random UUIDs with random relays, one registration of each at a time."""
        busy = {}
        while True:
            uuid, place = self.random.choice([*self.holders]), self.random.randrange(self.size[0])
            if uuid not in busy or busy[uuid].done():
                busy[uuid] = asyncio.ensure_future(self.register(uuid, place))
                self.ongoing.add(busy[uuid])
            await asyncio.sleep(self.random.uniform(0, 0.03))

    async def harm(self):
        """Let faults happen, some at a time, but one of each thing."""
        harmed = {}
        while True:
            seconds = self.random.choice((0.1, 0.5, 1, 3)[: 2 if self.quick else 4])
            kind, things = self.random.choice(
                [('process', self.relays), ('process', self.servers), ('link', self.links)]
            )
            thing = self.random.choice(things)
            if thing not in harmed or harmed[thing].done():
                harm = self.harm_process if kind == 'process' else self.harm_link
                harmed[thing] = asyncio.ensure_future(harm(thing, seconds))
                self.ongoing.add(harmed[thing])
                self.counts['faults'] += 1
                await asyncio.wait({harmed[thing]}, timeout=0.7)

    async def harm_process(self, process, seconds):
        if self.random.random() < 0.5:
            process.kill()
            await asyncio.sleep(seconds)
            if process.child.poll() is not None:
                process.start()
        else:
            strike(process.child, 'frozen')
            await asyncio.sleep(seconds)
            process.child.send_signal(signal.SIGCONT)

    async def harm_link(self, link, seconds):
        if self.random.random() < 0.5:
            link.cut = True
            link.reset()
            await asyncio.sleep(seconds)
            link.cut = False
        else:
            link.flowing.clear()
            await asyncio.sleep(seconds)
            link.flowing.set()

    async def run(self, seconds):
        """Let everything happen for so long, then see that all is well; return the figures."""
        self.quick = seconds < 5
        work = [self.talk(), self.take_over()] + ([self.harm()] if self.faults else [])
        for uuid in self.holders:
            await self.register(uuid, self.random.randrange(self.size[0]))
        tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        done, _ = await asyncio.wait(tasks)
        for task in done:
            if not task.cancelled():
                task.result()
        # Faults end, and registrations that have begun.
        await asyncio.gather(*self.ongoing)
        await self.look_at_holders()
        await self.look_at_messages()
        self.look_at_ends()
        for process in self.relays:
            text = process.log.read_text()
            found = re.search('ERROR|Traceback|destroyed', text)
            if found:
                self.problems.append(f'{process.log.name}: {text[found.start() - 200 :][:2500]}')
        return self.counts

    async def look_at_holders(self):
        """See that each UUID is reached from each relay, where it registered last."""
        for uuid in [uuid for uuid, a in self.holders.items() if not (a and a.alive)]:
            await asyncio.wait_for(self.register_at_last(uuid), 30)
        places = range(self.size[0])
        joining = [self.register_at_last(uuid4(), place) for place in places]
        probes = await asyncio.wait_for(asyncio.gather(*joining), 30)
        # Relays claim once a minute, in case NATS servers lost each other for a time.
        patience = 20 if self.size[1] == 1 else 80
        end = time.monotonic() + patience
        missing = {(probe, uuid) for probe in probes for uuid in self.holders}
        while missing and time.monotonic() < end:
            sent = {await self.send(*pair): pair for pair in missing}
            await self.wait_for(lambda sent=sent: all(n in self.outcomes for n in sent), 4)
            missing -= {p for n, p in sent.items() if self.outcomes.get(n) == [None]}
        self.problems += [f'{uuid} is not reached from relay {p.place}' for p, uuid in missing]

        def extra():
            return [a for a in self.attempts if a.alive and self.holders[a.uuid] is not a]

        await self.wait_for(lambda: not extra(), patience)
        self.problems += [f'{attempt.uuid} is still held at an older place' for attempt in extra()]

    async def look_at_messages(self):
        """See that each message has one outcome, or a reason to have none, or another."""
        await self.wait_for(lambda: not self.without_outcome(), 6)
        self.problems += [f'message {number}: no outcome' for number in self.without_outcome()]
        # One that came back as disconnected may still arrive, at any time.
        late = [number for number in self.overtaken if len(self.outcomes[number]) == 1]
        self.problems += [f'message {number} out of order' for number in late]
        for number, found in self.outcomes.items():
            name = ['arrived' if x is None else x for x in found]
            for kind in name:
                self.counts[kind] = self.counts.get(kind, 0) + 1
            late = self.faults and sorted(map(str, found)) == ['None', DISCONNECTED[8:]]
            if late:
                self.counts['arrived and came back'] = (
                    self.counts.get('arrived and came back', 0) + 1
                )
            elif len(found) != 1:
                self.problems.append(f'message {number}: {name}')

    def without_outcome(self):
        missing = set(range(len(self.messages))) - self.outcomes.keys()
        return [number for number in missing if not self.excused(*self.messages[number])]

    def excused(self, sender, uuid, sent):
        """Return whether nobody may be left who could have heard the outcome of a message."""
        return sender.ended is not None or (
            self.faults
            and any(a.uuid == uuid and a.ended and a.ended > sent for a in self.attempts)
        )

    def look_at_ends(self):
        """See that each connection that ended was displaced, or its relay killed."""
        for attempt in self.attempts:
            later = any(
                a.uuid == attempt.uuid and a.began >= attempt.began and a is not attempt
                for a in self.attempts
            )
            killed = any(death > attempt.began for death in self.relays[attempt.place].deaths)
            if attempt.registered and attempt.ended and not later and not killed:
                self.problems.append(f'{attempt.uuid} was dropped: {attempt.websocket.close_code}')


async def check_relays(seed, seconds, relays=2, servers=1, faults=True):
    """Check relays under random faults; return figures. Raises AssertionError with problems."""
    checker = Checker(seed, relays, servers, faults)
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            await checker.start(stack, folder)
            try:
                figures = await checker.run(seconds)
            finally:
                for attempt in checker.attempts:
                    attempt.websocket.transport.abort()
            for process in checker.relays + checker.servers:
                process.kill()
    assert not checker.problems, f'seed {seed}: {checker.problems[:20]} of {len(checker.problems)}'
    return figures


@over_nats
@pytest.mark.parametrize('relays', [2, 3])
def test_relays_recover_from_random_faults(relays):
    figures = asyncio.run(check_relays(1, 1.5, relays))
    assert figures['messages'] > 100 and figures['faults']


@over_nats
def test_each_message_has_one_outcome_during_takeovers():
    figures = asyncio.run(check_relays(1, 2, relays=3, servers=3, faults=False))
    assert figures['messages'] > 100 and figures['takeovers']


@on_linux
@over_nats
@run_upgrades
async def test_a_shared_port_stays_shared(tmp_path, bus):
    folders = tmp_path / '1', tmp_path / '2'
    for folder in folders:
        folder.mkdir()
    async with upgradable(folders[0], '--nats', bus) as one:
        # The last --port holds.
        options = '--nats', bus, '--port', str(one.ports[0])
        async with upgradable(folders[1], *options) as other:
            assert one.ports == other.ports
            sockets = one.listening(), other.listening()
            await one.upgrade()
            await other.upgrade()
            assert (one.listening(), other.listening()) == sockets
            for _ in range(20):
                async with registered(one, uuid4()) as peer:
                    await exchange(peer, peer)


@over_nats
@run_upgrades
async def test_a_message_over_nats_has_one_outcome_during_an_upgrade(tmp_path, bus):
    async with upgradable(tmp_path, '--nats', bus, '--rate', '0') as program:
        await program.logs('NATS is connected')
        async with joined_relay(bus) as server:
            async with registered(server, A) as far, registered(program, B) as near:
                outcomes = Outcomes(far, near)
                async with outcomes.counted():
                    for version in ('9.0.0', '9.1.0'):
                        await program.upgrade(version)
                assert sorted(outcomes.arrived + outcomes.returned) == sorted(outcomes.sent)
                assert outcomes.errors <= {DISCONNECTED.partition('because ')[2]}
                await exchange(far, near)


class Outcomes:
    """What becomes of the messages that two clients send each other."""

    def __init__(self, *pair):
        self.pair = pair
        self.sent, self.arrived, self.returned, self.errors = [], [], [], set()
        self.windows = {peer: asyncio.Semaphore(8) for peer in pair}
        self.stop = asyncio.Event()

    async def send(self, peer, other):
        while True:
            await self.windows[peer].acquire()
            if self.stop.is_set():
                return
            self.sent.append(f'{peer.uuid} {len(self.sent)}')
            await peer.say(peer.offer(other.uuid, description=self.sent[-1]))

    async def hear(self, peer, other):
        while True:
            message = await peer.hear()
            if message['error'] is None:
                self.arrived.append(message['description'])
                self.windows[other].release()
            else:
                self.returned.append(message['description'])
                self.errors.add(message['error'].partition('because ')[2])
                self.windows[peer].release()

    @contextlib.asynccontextmanager
    async def counted(self):
        """Have the two send messages meanwhile, and wait for what becomes of each."""
        ways = self.pair, self.pair[::-1]
        hearing = [asyncio.ensure_future(self.hear(*way)) for way in ways]
        sending = [asyncio.ensure_future(self.send(*way)) for way in ways]
        try:
            yield
            self.stop.set()
            await until(lambda: len(self.arrived) + len(self.returned) >= len(self.sent))
            # Something that comes late would come before the answer to a ping.
            for peer in self.pair:
                await (await peer.websocket.ping())
        finally:
            for task in hearing + sending:
                task.cancel()
            await asyncio.wait(hearing + sending)


@over_nats
@run_upgrades
async def test_a_client_that_registers_elsewhere_during_the_upgrade_keeps_its_uuid(tmp_path, bus):
    async with upgradable(tmp_path, '--nats', bus) as program:
        await program.logs('NATS is connected')
        async with joined_relay(bus) as server, registered(server, B) as peer:
            async with registered(program, A) as old:
                async with program.gap():
                    new = await open_websocket(server.url)
                    new = Peer(new, A)
                    assert await new.ask(new.registration()) == new.response()
                assert await old.closed_with() == 1001
                await exchange(peer, new)
                await new.websocket.close()


@over_nats
@run_upgrades
async def test_a_client_keeps_its_uuid_over_upgrades_of_both_relays(tmp_path, bus):
    folders = tmp_path / '1', tmp_path / '2'
    for folder in folders:
        folder.mkdir()
    async with upgradable(folders[0], '--nats', bus) as one:
        async with upgradable(folders[1], '--nats', bus) as other:
            await one.logs('NATS is connected')
            await other.logs('NATS is connected')
            async with registered(one, A) as first, registered(other, B) as second:
                for program in (one, other, one):
                    await program.upgrade()
                    await meet(first, second)


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
    assert source.count('\n') <= 2780
    assert statistics.median(sizes.values()) <= 10
    assert max(size for name, size in sizes.items() if name != '._parser') <= 30


def test_the_inline_metadata_asks_for_what_requirements_txt_asks_for():
    block = re.search(
        r'(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$', (HERE / 'relay.py').read_text()
    )[1]
    (wanted,) = json.loads(re.search(r'dependencies = (.*)', block)[1])
    assert [wanted, 'pytest'] == (HERE / 'requirements.txt').read_text().split()
    assert 'requires-python = ">=3.9"' in block


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
        """Prepare what the peer will be sent."""
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


async def join(talk):
    """Connect and register one more client."""
    limits = {'ping_interval': None, 'close_timeout': relay.CHECK_TIMEOUT / 10}
    websocket = await open_websocket(talk.options.url, **limits)
    talk.clients.append(Talker(websocket, talk))
    request = ServerRegistration('', talk.clients[-1].uuid, f'{talk.generation}_registration')
    answer = ServerResponse(message_type=f'{talk.generation}_response')
    await relay.deliver(request, websocket, websocket, answer)


async def begin(talk):
    """See which generation the relay speaks, and connect all clients to it."""
    await relay.check(talk.options.url)
    try:
        await relay.exchange(talk.options.url, talk.options.url, talk.generation)
    except ConnectionClosed:
        talk.generation = 'relay'
    mark(talk)
    while len(talk.clients) < 2 * talk.options.pairs:
        progress(f'{len(talk.clients)} clients are connected')
        await asyncio.wait_for(join(talk), relay.CHECK_TIMEOUT)
    for client in talk.clients:
        if client.websocket.state is not State.OPEN:
            await client.websocket.wait_closed()
            raise client.websocket.protocol.close_exc
    for one, other in zip(talk.clients[::2], talk.clients[1::2]):
        one.meet(other)
        other.meet(one)
    mark(talk)


async def go_on(talk, doing, seconds):
    """Let the clients talk for so long."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        progress(f'{doing}, {left:.0f} s left, {len(talk.latencies):,} messages')
        await asyncio.sleep(min(left, 0.5))
        if talk.failure:
            raise talk.failure
    mark(talk)


async def finish(talk):
    """Let arrive what is on its way, and count what does not."""
    talk.goes_on = False
    with contextlib.suppress(asyncio.TimeoutError):
        arrived = until(lambda: not any(client.sent for client in talk.clients))
        await asyncio.wait_for(arrived, relay.CHECK_TIMEOUT)
    talk.errors += sum(client.sent is not None for client in talk.clients)


async def measure(options):
    """Return the figures of a relay, by name."""
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
    """Put a line in the place of the last one, on a terminal."""
    if sys.stderr.isatty():
        print(f'\r{text}\x1b[K', end='', file=sys.stderr, flush=True)


def mark(talk):
    """Note the time and, of the process that is watched, the seconds of CPU and the KiB."""
    talk.marks.append((time.perf_counter(), 0, 0))
    if talk.options.pid:
        try:
            stat = Path(f'/proc/{talk.options.pid}/stat').read_text().rpartition(')')[2].split()
        except OSError as error:
            raise relay.StartError(f'--pid {talk.options.pid}: {error.strerror}') from error
        ticks, pages = int(stat[11]) + int(stat[12]), int(stat[21])
        cpu, memory = ticks / os.sysconf('SC_CLK_TCK'), pages * os.sysconf('SC_PAGE_SIZE') / 1024
        talk.marks[-1] = time.perf_counter(), cpu, memory


def figures(talk, latencies):
    """Return what the marks and the sorted latencies amount to."""
    alone, full, start, end = talk.marks
    count, p99 = len(latencies), len(latencies) * 99 // 100
    if not count:
        raise relay.StartError('no message arrived as it was sent')
    slow = latencies[count // 2], latencies[p99], latencies[-1]
    found = {name: getattr(talk.options, name) for name in ('pairs', 'seconds', 'size')}
    found['messages_per_second'] = round(count / (end[0] - start[0]))
    found.update((f'{k}_ms', round(1000 * s, 2)) for k, s in zip(('p50', 'p99', 'max'), slow))
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
    """Measure a relay; return the exit status."""
    options = options_of(argv)
    logging.disable()  # what goes wrong is told in one line
    if options.check_relays:
        size = options.relays, options.servers
        print(
            asyncio.run(check_relays(options.seed, options.seconds, *size, not options.no_faults))
        )
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
    """Begin to run the benchmark; returns what `forked` does."""
    return forked(main, url, '--pairs', 3, '--seconds', 0.2, *options)


def test_the_benchmark_measures_a_relay():
    with running_program('--host', '127.0.0.1') as process:
        command = [sys.executable, HERE / 'test_relay.py', process.url, '--pairs', '3']
        command += ['--seconds', '0.2', '--json', '--pid', str(process.pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    status, text, errors = done.returncode, done.stdout, done.stderr
    found = json.loads(text)
    assert (status, errors, found['errors'], found['generation']) == (0, '', 0, 'server')
    assert found['messages_per_second'] > 0
    assert 0 < found['p50_ms'] <= found['p99_ms'] <= found['max_ms']
    assert found.keys() >= {'cpu_us_per_message', 'kib_per_client'}


def test_the_benchmark_prints_a_table_and_shows_a_token_through_tls(pem, tokens, monkeypatch):
    monkeypatch.setenv('SSL_CERT_FILE', str(pem / 'cert.pem'))
    options = '--certfile', str(pem / 'both.pem'), '--token-file', tokens
    with running_program('--host', '127.0.0.1', *options) as process:
        # A message of this size comes in many pieces.
        url = process.url.replace('ws://', 'wss://alice:a1@')
        status, text, errors = measured(url, '--size', '500000')()
    assert (status, errors) == (0, '')
    assert re.search(r'^messages per second +[1-9]\d*$', text, re.M) and 'cpu' not in text


@run_async
async def test_the_benchmark_knows_the_relay_of_the_later_generation():
    async with newer_relay() as url:
        status, text, errors = await asyncio.to_thread(measured(url, '--json'))
    assert (status, errors, json.loads(text)['generation']) == (0, '', 'relay')


@run_async
async def test_the_benchmark_counts_messages_that_change_on_the_way():
    def changed(text):
        texts.append(text)
        return text.replace('xxx', 'xyx') if len(texts) % 5 == 0 else text

    texts = []
    async with newer_relay(changed) as url:
        status, text, errors = await asyncio.to_thread(measured(url, '--json'))
    count = json.loads(text)['errors']
    assert count > 0
    assert (status, errors) == (1, f'test_relay.py: {count} messages not heard as sent\n')


@pytest.mark.parametrize(
    'end, line',
    [
        (lambda process, benchmark: os.kill(benchmark, signal.SIGINT), 'interrupted'),
        (lambda process, benchmark: process.terminate(), 'closed: '),
        (lambda process, benchmark: process.kill(), 'closed: '),
    ],
    ids=['Ctrl-C', 'the relay stops', 'the relay is killed'],
)
def test_a_benchmark_that_ends_early_is_one_line(end, line):
    with running_program('--host', '127.0.0.1') as process:
        benchmark = forked(main, process.url, '--pairs', '3')
        # Its six clients, after those of the check and of the look for the generation.
        lines = (x for x in process.stdout if ':: Registered' in x)
        for _ in range(2 + 2 + 6):
            next(lines)
        end(process, benchmark.child)
        status, text, errors = benchmark()
    assert (status, text, errors.count('\n')) == (1, '', 1)
    assert errors.startswith(f'test_relay.py: {line}')


@run_async
async def test_a_benchmark_whose_clients_are_expelled_is_one_line():
    def admit(client, request):
        RelayServer._admit(server, client, request)
        if request.name != 'check':
            server._close(client, 1008, 'not today')

    async with running_relay() as server:
        server._admit = admit
        status, text, errors = await asyncio.to_thread(measured(server.url))
    assert (status, text, errors.count('\n')) == (1, '', 1)
    assert 'closed: received 1008 (policy violation) not today; ' in errors


def test_a_benchmark_that_cannot_begin_is_one_line():
    fails_with = functools.partial(fails, program=sys.modules[__name__])
    assert ' ws://127.0.0.1:1: [Errno ' in fails_with('ws://alice:secret@127.0.0.1:1')
    with running_program('--host', '127.0.0.1', '--max-clients', '5') as process:
        assert ': closed: received 1013 ' in fails_with(process.url)
        assert '--pid 999999999: No such file' in fails_with(process.url, '--pid', '999999999')


if __name__ == '__main__':
    raise SystemExit(main())
