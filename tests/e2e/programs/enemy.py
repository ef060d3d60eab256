"""Enemies of the tunnel: python3 -c PROGRAM COMMAND ARGUMENT...

Everything that a peer can do to a workload's HBONE port and no honest one does. HTTP/2 is spoken by hand, frame by frame
(RFC 9113), so that every rule can be broken. Every command prints JSON, one document per line. CERTIFICATE is the file
with certificate and key, or `-` for none.
"""

import json
import re
import select
import socket
import ssl
import struct
import sys
import time

HBONE = 15008
PATIENCE = 20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
CANCEL = 8
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE = 1, 4
MOST_WINDOW = 2**31 - 1
# Frames of this size every peer takes.
PIECE = 16384
# Alerts by their names (RFC 8446, section 6).
ALERTS = {
    "bad certificate": 42,
    "certificate expired": 45,
    "certificate unknown": 46,
    "unknown ca": 48,
    "decrypt error": 51,
    "protocol version": 70,
    "certificate required": 116,
    "no application protocol": 120,
}
# Static table of HPACK (RFC 7541, appendix A): the statuses in it. The name `:status` is number 8.
STATUSES = {8: 200, 9: 204, 10: 206, 11: 304, 12: 400, 13: 404, 14: 500}


def say(document):
    print(json.dumps(document), flush=True)


# --- TLS -------------------------------------------------------------------------------------------


def tls(host, certificate, alpn="h2", version=ssl.TLSVersion.TLSv1_3, receive_buffer=None):
    """A TLS connection, and the address that it comes from."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols([alpn])
    if certificate != "-":
        context.load_cert_chain(certificate)
    tcp = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if receive_buffer:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    tcp.settimeout(PATIENCE)
    tcp.connect((host, HBONE))
    own = tcp.getsockname()[:2]
    try:
        return context.wrap_socket(tcp), own
    except OSError as error:
        error.own = own
        raise


def plain(own):
    host, port = own
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def handshake(host, certificate, alpn, version):
    """How a handshake ends: with the number of an alert, or not at all (null)."""
    version = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[version]
    alert, own = None, None
    try:
        sock, own = tls(host, certificate, alpn, version)
        # In TLS 1.3 the client has finished before the server has looked at its certificate.
        sock.sendall(PREFACE + frame(SETTINGS, 0, 0))
        sock.recv(1)
    except ssl.SSLError as error:
        own = own or error.own
        alert = alert_of(error)
    say({"alert": alert, "own": plain(own)})


def alert_of(error):
    """The number of the alert that ended TLS: OpenSSL says `tlsv1 alert NAME`, Python adds where that was."""
    text = str(error)
    found = re.search(r" alert ([a-z ]+) \(", text)
    return ALERTS[found.group(1)] if found else text


def stall(host, count):
    """Connections that say nothing; prints `stalled`, then how long it took until the other side had closed all."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socks = []
    for _ in range(int(count)):
        sock = socket.socket(family)
        sock.settimeout(PATIENCE)
        sock.connect((host, HBONE))
        socks.append(sock)
    started = time.monotonic()
    say("stalled")
    closed = 0
    for sock in socks:
        try:
            closed += sock.recv(1) == b""
        except ConnectionResetError:
            closed += 1
        except TimeoutError:
            pass
    say({"closed": closed, "seconds": time.monotonic() - started})


# --- HTTP/2 ----------------------------------------------------------------------------------------


def frame(kind, flags, stream, payload=b""):
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def number(value, bits):
    """An integer with a prefix (RFC 7541, section 5.1), the bits before the prefix being zero."""
    most = (1 << bits) - 1
    if value < most:
        return bytes([value])
    encoded, value = [most], value - most
    while value >= 128:
        encoded.append(value % 128 + 128)
        value //= 128
    return bytes([*encoded, value])


def headers(*pairs):
    """Literal, without indexing and without Huffman's code (RFC 7541, section 6.2.2)."""

    def text(value):
        return number(len(value), 7) + value.encode()

    return b"".join(b"\0" + text(name) + text(value) for name, value in pairs)


def status_of(block):
    """The status of a response, which is always the first field."""
    while block[0] & 0xE0 == 0x20:
        block = block[1:]  # a change of the table's size, which we have set to 0
    if block[0] & 0x80:
        return STATUSES[block[0] & 0x7F]
    assert block[0] & 0x0F == 8, f"the name is not :status: {block!r}"
    length, text = block[1] & 0x7F, block[2:]
    if not block[1] & 0x80:
        return int(text[:length])
    # Huffman's code of digits: 0 to 2 have five bits, the others six.
    bits, digits = "".join(f"{byte:08b}" for byte in text[:length]), ""
    while len(digits) < 3:
        size = 5 if int(bits[:5], 2) < 3 else 6
        value, bits = int(bits[:size], 2), bits[size:]
        digits += str(value if size == 5 else value - 0b011001 + 3)
    return int(digits)


class Http2:
    """One connection as a client."""

    def __init__(self, host, certificate, receive_buffer=None):
        self.sock, own = tls(host, certificate, receive_buffer=receive_buffer)
        self.own = plain(own)
        self.buffer = b""
        settings = struct.pack("!HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, MOST_WINDOW)
        self.send(PREFACE + frame(SETTINGS, 0, 0, settings))
        self.send(frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", MOST_WINDOW - 65535)))

    def send(self, data):
        self.sock.sendall(data)

    def take(self, count):
        while len(self.buffer) < count:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError
            self.buffer += data
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def next(self):
        """The next frame that matters: (kind, flags, stream, payload)."""
        while True:
            head = self.take(9)
            payload = self.take(int.from_bytes(head[:3], "big"))
            kind, flags, stream = struct.unpack("!BBI", head[3:])
            if kind == SETTINGS and not flags & ACK:
                self.send(frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                self.send(frame(PING, ACK, 0, payload))
            elif kind in (DATA, HEADERS, RST_STREAM, GOAWAY):
                return kind, flags, stream, payload

    def answer(self, stream):
        """{"status": S}, {"reset": CODE} or {"goaway": CODE}, and the flags of the frame."""
        while True:
            kind, flags, on, payload = self.next()
            if kind == GOAWAY:
                return {"goaway": struct.unpack("!I", payload[4:8])[0]}, 0
            if on != stream:
                continue
            if kind == HEADERS:
                return {"status": status_of(payload)}, flags
            if kind == RST_STREAM:
                return {"reset": struct.unpack("!I", payload)[0]}, 0


def request(method, authority, *more):
    pairs = [(":method", method), (":authority", authority)]
    if method != "CONNECT":
        pairs += [(":scheme", "https"), (":path", "/")]
    return headers(*pairs, *more)


def ask(host, certificate, method, authority, name="", value=""):
    """One request, perhaps with one more header; says how it is answered, and the first line if it is let in."""
    connection = Http2(host, certificate)
    more = [(name, value)] if name else []
    connection.send(frame(HEADERS, END_HEADERS, 1, request(method, authority, *more)))
    answer, flags = connection.answer(1)
    line = b""
    if answer.get("status") == 200:
        while not line.endswith(b"\n") and not flags & END_STREAM:
            kind, flags, on, payload = connection.next()
            if kind == DATA and on == 1:
                line += payload
    say({**answer, "own": connection.own, "line": line.decode()})


def swollen(host, certificate, authority, size, pieces):
    """A request whose headers are `size` bytes long, in so many frames."""
    connection = Http2(host, certificate)
    block, pieces = request("CONNECT", authority, ("swollen", "x" * int(size))), int(pieces)
    length = -(-len(block) // pieces)
    parts = [block[at : at + length] for at in range(0, len(block), length)]
    try:
        for index, part in enumerate(parts):
            kind, flags = (CONTINUATION if index else HEADERS), (END_HEADERS if index == len(parts) - 1 else 0)
            connection.send(frame(kind, flags, 1, part))
        answer, _ = connection.answer(1)
    except (EOFError, OSError):
        answer = {}
    say({**answer, "own": connection.own, "line": ""})


def many_streams(host, certificate, authority, count):
    """So many streams at once, whatever the other side allows; says how often each answer came."""
    connection = Http2(host, certificate)
    block = request("CONNECT", authority)
    streams = range(1, 2 * int(count), 2)
    connection.send(b"".join(frame(HEADERS, END_HEADERS, stream, block) for stream in streams))
    answers, waiting = {}, set(streams)
    while waiting:
        kind, _, stream, payload = connection.next()
        if kind == HEADERS and stream in waiting:
            answer = f"status {status_of(payload)}"
        elif kind == RST_STREAM and stream in waiting:
            answer = f"reset {struct.unpack('!I', payload)[0]}"
        elif kind == GOAWAY:
            answer, waiting = f"goaway {struct.unpack('!I', payload[4:8])[0]}", {stream}
        else:
            continue
        waiting.discard(stream)
        answers[answer] = answers.get(answer, 0) + 1
    say({"own": connection.own, "answers": answers})


def many_resets(host, certificate, authority):
    """Streams that are reset as soon as they are opened, until the other side has enough."""
    connection = Http2(host, certificate)
    block, stream, answer = request("CONNECT", authority), 1, None
    until = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < until:
            batch = b""
            for _ in range(200):
                batch += frame(HEADERS, END_HEADERS, stream, block)
                batch += frame(RST_STREAM, 0, stream, struct.pack("!I", CANCEL))
                stream += 2
            connection.send(batch)
            while answer is None and select.select([connection.sock], [], [], 0)[0]:
                kind, _, _, payload = connection.next()
                if kind == GOAWAY:
                    answer = struct.unpack("!I", payload[4:8])[0]
    except (EOFError, OSError):
        pass  # the end that is wanted
    if answer is None:
        answer = last_goaway(connection)
    say({"own": connection.own, "goaway": answer, "ended": time.monotonic() < until})


def last_goaway(connection):
    """What was said before the end."""
    try:
        while True:
            kind, _, _, payload = connection.next()
            if kind == GOAWAY:
                return struct.unpack("!I", payload[4:8])[0]
    except (EOFError, OSError):
        return None


def deaf(host, certificate, authority, streams, upload):
    """Streams over which the program sends without end, and over which `upload` bytes are sent; nothing is ever read. Prints
    `deaf` when all is sent, and stays until standard input ends."""
    connection = Http2(host, certificate, receive_buffer=4096)
    block, piece = request("CONNECT", authority), b"\0" * PIECE
    for stream in range(1, 2 * int(streams), 2):
        connection.send(frame(HEADERS, END_HEADERS, stream, block))
    for _ in range(int(upload) // PIECE):
        connection.send(frame(DATA, 0, 1, piece))
    say({"own": connection.own})
    sys.stdin.read()


COMMANDS = [
    handshake, stall, ask, swollen, many_streams, many_resets, deaf,
]  # fmt: skip
{command.__name__: command for command in COMMANDS}[sys.argv[1]](*sys.argv[2:])
