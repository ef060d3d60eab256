"""What the tests run as a client inside a workload: python3 probe.py COMMAND ARGUMENT...

Every command prints JSON, one document per line. A try to connect is told as it looked from the
program: the name of the errno or null, milliseconds, what getpeername() says, the server's greeting.
"""

import ctypes
import errno
import json
import os
import socket
import struct
import sys
import threading
import time

PATIENCE = 3.0
# How long a connection may be without a sign of life before it counts as forgotten.
LASTING = 60.0
# How long an answer is waited for that must not come.
SILENCE = 0.7
RECORDS = {"A": 1, "PTR": 12, "AAAA": 28, "SRV": 33}
FREEBIND = {socket.AF_INET: (socket.IPPROTO_IP, 15), socket.AF_INET6: (socket.IPPROTO_IPV6, 78)}


def say(document):
    print(json.dumps(document), flush=True)


def name_of(error):
    if isinstance(error, socket.gaierror):
        return "gaierror"
    if isinstance(error, TimeoutError):
        return "ETIMEDOUT"
    return errno.errorcode.get(error.errno, str(error))


# --- Connecting ------------------------------------------------------------------------------------


def target(family, host, port):
    """(family, address) for `any`, `4`, `6`, or `mapped`: IPv4 through an IPv6 socket."""
    if family == "mapped":
        _, address = target("4", host, port)
        return socket.AF_INET6, ("::ffff:" + address[0], port)
    wanted = {"any": 0, "4": socket.AF_INET, "6": socket.AF_INET6}[family]
    found = socket.getaddrinfo(host, port, wanted, socket.SOCK_STREAM)[0]
    return found[0], found[4]


def exchange(sock, address):
    """Connects, takes the greeting, and sees one line come back."""
    sock.connect(address)
    stream = sock.makefile("rwb")
    greeting = json.loads(stream.readline() or b"null")
    stream.write(b"ping\n")
    stream.flush()
    if greeting is None or stream.readline() != b"ping\n":
        raise ConnectionResetError(errno.ECONNRESET, "the server sent nothing back")
    return greeting


def attempt(family, host, port, source=None):
    result = {"error": None, "milliseconds": 0.0, "peer": None, "greeting": None}
    started = time.monotonic()
    try:
        family, address = target(family, host, port)
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(SILENCE if source else PATIENCE)
            if source:
                sock.setsockopt(*FREEBIND[family], 1)
                sock.bind((source, 0))
            started = time.monotonic()
            result["greeting"] = exchange(sock, address)
            result["peer"] = sock.getpeername()[0]
    except OSError as error:
        result["error"] = name_of(error)
    result["milliseconds"] = (time.monotonic() - started) * 1000
    return result


def connect(family, host, port, count="1"):
    for _ in range(int(count)):
        say(attempt(family, host, int(port)))


def spoof(family, source, host, port):
    """Connects from an address that is another's."""
    say(attempt(family, host, int(port), source))


def loop(host, port):
    """Connects again and again until standard input ends, and at least once after that.

    A name whose question went down with a name server is asked for again, as often as it takes.
    """
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:10"
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    total, errors = 0, {}
    say("started")
    last = False
    while not last:
        last = ended.is_set()
        error = attempt("any", host, int(port))["error"]
        total += 1
        if error:
            errors[error] = errors.get(error, 0) + 1
    say({"total": total, "errors": errors})


def hold(host, port):
    """Keeps one connection: sends every line of standard input over it and prints what comes back."""
    family, address = target("any", host, int(port))
    sock = socket.create_connection(address[:2], PATIENCE)
    stream = sock.makefile("rwb")
    say(json.loads(stream.readline()))
    for line in sys.stdin:
        stream.write(line.encode())
        stream.flush()
        say(stream.readline().decode())


def first(denied, allowed, port):
    """As the very first thing, calls one who may not be called and one who may, until that one answers; then stays."""
    errors, tries, until = [], 0, time.monotonic() + 20
    while time.monotonic() < until:
        tries += 1
        errors.append(attempt("any", denied, int(port))["error"])
        last = attempt("any", allowed, int(port))["error"]
        if last is None:
            break
    errors = sorted({str(error) for error in errors})
    say({"round": os.environ["ROUND"], "denied": errors, "allowed": last, "tries": tries})
    threading.Event().wait()


def vanish(port):
    """Takes a connection, closes it, and says so when nothing of it is left in the kernel."""
    address = ("::", int(port))
    with socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True) as server:
        server.settimeout(PATIENCE)
        say("listening")
        sock, peer = server.accept()
        # After a second, the kernel forgets it without a word.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1)
        sock.close()
        until = time.monotonic() + 20
        while is_there(int(port), peer[1]) and time.monotonic() < until:
            time.sleep(0.02)
        say("still there" if is_there(int(port), peer[1]) else "gone")
        sys.stdin.read()


def is_there(local, remote):
    """Whether the kernel knows a connection between these ports."""
    with open("/proc/net/tcp6") as table:
        pairs = [[int(end.split(":")[1], 16) for end in line.split()[1:3]] for line in list(table)[1:]]
    return [local, remote] in pairs


def late(host, port):
    """Connects, waits for the end, and sends when a line comes in; prints how that ended."""
    family, address = target("4", host, int(port))
    with socket.create_connection(address[:2], PATIENCE) as sock:
        say(sock.recv(1).decode())
        sys.stdin.readline()
        started = time.monotonic()
        say(errno_of(lambda: send_until_refused(sock)))
        say((time.monotonic() - started) * 1000)


def send_until_refused(sock):
    until = time.monotonic() + 20
    while time.monotonic() < until:
        sock.sendall(b"late")
        time.sleep(0.01)


def watch(family, host, port):
    """As hold, and says in the end how the connection ended: {"ended": name of the errno, or null for EOF}."""
    family, address = target(family, host, int(port))
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    sock.connect(address)
    sock.settimeout(LASTING)
    stream = sock.makefile("rb")
    say(json.loads(stream.readline()))
    threading.Thread(target=report_lines, args=(stream,), daemon=True).start()
    for line in sys.stdin:
        sock.sendall(line.encode())


def report_lines(stream):
    error = None
    try:
        for line in stream:
            say(line.decode())
    except OSError as failure:
        error = name_of(failure)
    say({"ended": error})
    os._exit(0)


def watch_datagrams(family, host, port):
    """A connected datagram socket that says how it ended, if it does before standard input."""
    family = {"4": socket.AF_INET, "6": socket.AF_INET6}[family]
    address = socket.getaddrinfo(host, int(port), family, socket.SOCK_DGRAM)[0][4]
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.connect(address)
    sock.settimeout(LASTING)
    say(sock.getpeername()[0])
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    try:
        sock.recv(1)
        say({"ended": None})
    except OSError as error:
        say({"ended": name_of(error)})


# --- Datagrams -------------------------------------------------------------------------------------


def datagram_exchange(sock, address, connected, text):
    """Sends one datagram and waits for the answer: how that looked from the program."""
    result = {"error": None, "milliseconds": 0.0, "sender": None, "peer": None, "pod": None}
    started = time.monotonic()
    try:
        if connected:
            sock.connect(address)
            result["peer"] = sock.getpeername()[0]
            sock.send(text.encode())
        else:
            sock.sendto(text.encode(), address)
        data, sender = sock.recvfrom(65535)
        answer = json.loads(data)
        assert answer["text"] == text, f"{text!r} came back as {answer}"
        result["pod"] = answer["pod"]
        result["sender"] = list(sender[:2])
    except OSError as error:
        result["error"] = name_of(error)
    result["milliseconds"] = (time.monotonic() - started) * 1000
    return result


def ask_datagrams(how, family, count, *targets):
    """Datagrams from one socket to HOST PORT HOST PORT ... in turn, `count` times each; `how` is `connected`,
    `unconnected`, or `fresh`: unconnected, with a socket of its own for each."""
    targets = [target(family, host, int(port)) for host, port in zip(targets[::2], targets[1::2])]
    sock = datagram_socket(targets[0][0])
    for number in range(int(count)):
        for family, address in targets:
            if how == "fresh":
                sock = datagram_socket(family)
            say(datagram_exchange(sock, address, how == "connected", f"question {number}"))


def datagram_socket(family):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    return sock


def hold_datagrams(how, host, port):
    """Keeps one datagram socket: sends every line of standard input to the server and says how each exchange looked."""
    family, address = target("4", host, int(port))
    sock = datagram_socket(family)
    sock.settimeout(SILENCE)
    connected = how == "connected"
    if connected:
        sock.connect(address)
    say("ready")
    for line in sys.stdin:
        result = {"error": None, "sender": None}
        try:
            if connected:
                sock.send(line.encode())
            else:
                sock.sendto(line.encode(), address)
            result["sender"] = list(sock.recvfrom(65535)[1][:2])
        except OSError as error:
            result["error"] = name_of(error)
        say(result)


def ask_many_ports(host, first, last):
    """One datagram to each of many ports from one unconnected socket: how many were refused with which error."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    errors = {}
    for port in range(int(first), int(last)):
        error = errno_of(lambda: sock.sendto(b"hello", (host, port)))
        if error:
            errors[error] = errors.get(error, 0) + 1
    say(errors)


def serve_connected(port):
    """Answers the first datagram from a socket connected back to its sender, and all that follow on that one, until
    standard input ends."""
    threading.Thread(target=answer_connected, args=(int(port),), daemon=True).start()
    sys.stdin.read()


def answer_connected(port):
    first = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    first.bind(("0.0.0.0", port))
    say("listening")
    data, sender = first.recvfrom(65535)
    first.connect(sender)
    while True:
        answer = {"pod": os.environ["HOSTNAME"], "text": data.decode()}
        first.send(json.dumps(answer).encode())
        data = first.recv(65535)


def datagram_from(own_port, host, port):
    """Sends one datagram from a port of one's own."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", int(own_port)))
    say(errno_of(lambda: sock.sendto(b"hello", (host, int(port)))))


# --- Names -----------------------------------------------------------------------------------------


def resolve(host):
    """What getaddrinfo() finds, as most programs ask."""
    started = time.monotonic()
    try:
        found = sorted({item[4][0] for item in socket.getaddrinfo(host, None)})
        answer = {"addresses": found, "error": None}
    except OSError as error:
        answer = {"addresses": [], "error": name_of(error)}
    say({**answer, "milliseconds": (time.monotonic() - started) * 1000})


def dns(transport, name, kind, server=None):
    """One question to the name server, and the records of the answer as text."""
    server = server or nameserver()
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.rstrip(".").split("."))
    query = struct.pack("!6H", 4711, 0x0100, 1, 0, 0, 0) + labels + b"\0"
    query += struct.pack("!2H", RECORDS[kind], 1)
    started = time.monotonic()
    reply = ask(transport, server, query)
    rcode, records = read_reply(reply)
    milliseconds = (time.monotonic() - started) * 1000
    say({"rcode": rcode, "records": sorted(records), "milliseconds": milliseconds})


def nameserver():
    with open("/etc/resolv.conf") as conf:
        return next(line.split()[1] for line in conf if line.startswith("nameserver"))


def ask(transport, server, query):
    if transport == "udp":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(20)
            sock.sendto(query, (server, 53))
            reply, sender = sock.recvfrom(65535)
            assert sender[0] == server, f"the answer came from {sender}, not from {server}"
            return reply
    with socket.create_connection((server, 53), 20) as sock:
        stream = sock.makefile("rwb")
        stream.write(struct.pack("!H", len(query)) + query)
        stream.flush()
        return stream.read(struct.unpack("!H", stream.read(2))[0])


def read_reply(reply):
    _, flags, questions, answers, _, _ = struct.unpack("!6H", reply[:12])
    at = 12
    for _ in range(questions):
        _, at = read_name(reply, at)
        at += 4
    records = []
    for _ in range(answers):
        _, at = read_name(reply, at)
        kind, _, _, length = struct.unpack("!2HIH", reply[at : at + 10])
        at += 10
        records.append(read_record(reply, kind, at, length))
        at += length
    return flags & 15, records


def read_record(reply, kind, at, length):
    data = reply[at : at + length]
    if kind == RECORDS["A"]:
        return socket.inet_ntop(socket.AF_INET, data)
    if kind == RECORDS["AAAA"]:
        return socket.inet_ntop(socket.AF_INET6, data)
    if kind == RECORDS["SRV"]:
        port = struct.unpack("!H", data[4:6])[0]
        return f"{port} {read_name(reply, at + 6)[0]}"
    if kind == RECORDS["PTR"]:
        return read_name(reply, at)[0]
    return f"type {kind}"


def read_name(reply, at):
    """A name and where it ends, its pointers followed (RFC 1035, 4.1.4)."""
    parts = []
    while reply[at]:
        if reply[at] >= 0xC0:
            pointer = struct.unpack("!H", reply[at : at + 2])[0] & 0x3FFF
            return ".".join(parts + [read_name(reply, pointer)[0]]).rstrip("."), at + 2
        parts.append(reply[at + 1 : at + 1 + reply[at]].decode())
        at += 1 + reply[at]
    return ".".join(parts), at + 1


# --- Ways around -----------------------------------------------------------------------------------


def errno_of(action):
    try:
        action()
        return None
    except OSError as error:
        return name_of(error)


def make_socket(family, kind, protocol):
    """Whether a socket can be made at all; the arguments are numbers."""
    say(errno_of(lambda: socket.socket(int(family), int(kind), int(protocol)).close()))


def bind(address, port):
    """Whether a program may listen there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        say(errno_of(lambda: sock.bind((address, int(port)))))


def datagram(host, port):
    """sendto() without connect()."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        say(errno_of(lambda: sock.sendto(b"hello", (host, int(port)))))


def fast_open(host, port):
    """Data in the first packet, without connect()."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        say(errno_of(lambda: sock.sendto(b"hello", socket.MSG_FASTOPEN, (host, int(port)))))


def link_local(host, port):
    """A neighbour on the same link, past all routes."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
        sock.settimeout(SILENCE)
        interface = socket.if_nametoindex("eth0")
        say(errno_of(lambda: sock.connect((host, int(port), 0, interface))))


def datagrams(port):
    """Counts the datagrams that come in until standard input ends."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind(("::", int(port)))
    received = []
    threading.Thread(target=take_all, args=(sock, received), daemon=True).start()
    say("listening")
    sys.stdin.read()
    say(len(received))


def take_all(sock, received):
    while True:
        received.append(sock.recv(65535))


def call(name, *arguments):
    """A function of the C library with numbers as arguments."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = getattr(libc, name)(*(ctypes.c_long(int(argument)) for argument in arguments))
    say(errno.errorcode[ctypes.get_errno()] if result == -1 else None)


def relisten(host, port, own_port):
    """Connects, dissolves the connection with connect(AF_UNSPEC), and listens with the same socket.

    Prints `listening`; when standard input ends, the addresses of all who got in.
    """
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("::", int(own_port)))
    sock.settimeout(PATIENCE)
    exchange(sock, target("mapped", host, int(port))[1])
    libc = ctypes.CDLL(None, use_errno=True)
    unspecified = struct.pack("=H26x", socket.AF_UNSPEC)
    if libc.connect(sock.fileno(), unspecified, len(unspecified)) != 0:
        raise OSError(ctypes.get_errno(), "connect(AF_UNSPEC)")
    sock.listen()
    accepted = []
    threading.Thread(target=greet_all, args=(sock, accepted), daemon=True).start()
    say("listening")
    sys.stdin.read()
    say(accepted)


def greet_all(sock, accepted):
    sock.settimeout(None)
    while True:
        peer, address = sock.accept()
        accepted.append(address[0].removeprefix("::ffff:"))
        greeting = {"pod": os.environ["HOSTNAME"], "peer": accepted[-1], "address": ""}
        peer.sendall(json.dumps(greeting).encode() + b"\n" + b"ping\n")


COMMANDS = [
    connect, spoof, loop, hold, watch, watch_datagrams, first, vanish, late, resolve, dns,
    ask_datagrams, hold_datagrams, ask_many_ports, serve_connected, datagram_from,
    make_socket, bind, datagram, fast_open, link_local, datagrams, call, relisten,
]  # fmt: skip
{command.__name__: command for command in COMMANDS}[sys.argv[1]](*sys.argv[2:])
