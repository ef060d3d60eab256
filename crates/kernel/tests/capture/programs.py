"""A process of the capture tests: it evaluates the calls that it is sent, one a line, and answers with one line each."""

import errno
import json
import select
import socket
import struct
import sys
import threading
import time

TIMEOUT = 10
SO_MARK, IP_TRANSPARENT = 36, 19
held = {}
calls = {"made": 0, "errors": [], "stop": False}
takes = {}


def family_of(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def shown(address):
    """An address and port as one text, whatever the family of the socket."""
    return f"{address[0].removeprefix('::ffff:')} {address[1]}"


def listen(name, address, port, shared=False, backlog=64):
    listener = socket.socket(family_of(address))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((address, port))
    listener.listen(backlog)
    held[name] = listener


def connect(name, address, port, family=None):
    """Under which address it connected, and whom it sees."""
    client = socket.socket(family or family_of(address))
    client.settimeout(TIMEOUT)
    client.connect((address, port))
    held[name] = client
    return f"{shown(client.getsockname())} {shown(client.getpeername())}"


def begin(name, address, port, own=None):
    client = socket.socket(family_of(address))
    client.setblocking(False)
    if own:
        client.bind(own)
    held[name] = client
    return errno.errorcode[client.connect_ex((address, port))]


def finish(name):
    _, writable, _ = select.select([], [held[name]], [], TIMEOUT)
    error = held[name].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return (errno.errorcode[error] if error else "ok") if writable else "nothing"


def deliver(name, client, address, port, mark, wait=True):
    """As the agent does: connects under the address of another."""
    delivery = socket.socket(family_of(address))
    delivery.settimeout(TIMEOUT)
    delivery.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    if mark:
        delivery.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("I", mark))
    delivery.bind((client, 0))
    held[name] = delivery
    if not wait:
        delivery.setblocking(False)
        return errno.errorcode[delivery.connect_ex((address, port))]
    delivery.connect((address, port))
    return shown(delivery.getsockname())


def accept(name, listener, timeout=TIMEOUT):
    """Whom it sees, and as whom it is seen; `nothing` if nobody comes."""
    held[listener].settimeout(timeout)
    try:
        held[name], peer = held[listener].accept()
    except (TimeoutError, BlockingIOError):
        return "nothing"
    held[name].settimeout(TIMEOUT)
    return f"{shown(peer)} {shown(held[name].getsockname())}"


def waiting(*listeners):
    """How many connections wait at each."""
    counts = []
    for name in listeners:
        held[name].setblocking(False)
        counts.append(0)
        try:
            while True:
                held[name].accept()[0].close()
                counts[-1] += 1
        except BlockingIOError:
            pass
    return json.dumps(counts)


def send(name, text):
    held[name].sendall(text.encode())


def receive(name):
    return held[name].recv(1000).decode() or "closed"


def close(name):
    held.pop(name).close()


def call_always(address, port):
    """Connects again and again until it is told to stop; each connection is let go by its peer."""
    threading.Thread(target=call_on, args=((address, port),), daemon=True).start()


def call_on(target):
    while not calls["stop"]:
        try:
            with socket.create_connection(target, timeout=TIMEOUT) as client:
                client.recv(1)
            calls["made"] += 1
        except OSError as error:
            calls["errors"].append(repr(error))
    calls["ended"] = True


def stop_calling():
    calls["stop"] = True
    while "ended" not in calls:
        time.sleep(0.01)
    return f"{calls['errors'][0]}" if calls["errors"] else f"ok {calls['made']}"


def take_always(name):
    """Accepts whatever comes, and lets it go."""
    takes[name] = 0
    threading.Thread(target=take_on, args=(name,), daemon=True).start()


def take_on(name):
    while True:
        held[name].accept()[0].close()
        takes[name] += 1


def taken(name):
    return takes[name]


def bind(address, port, kind=socket.SOCK_STREAM, shared=False):
    with socket.socket(family_of(address), kind) as one:
        if shared:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind((address, port))


def hand(name):
    """Gives the test a descriptor of its own."""
    with socket.socket(fileno=3) as test:
        socket.send_fds(test, [json.dumps(name).encode()], [held[name].fileno()])
        test.detach()


print("ready", flush=True)
for line in sys.stdin:
    try:
        result = eval(line)
        print("ok" if result is None else result, flush=True)
    except OSError as error:
        name = errno.errorcode.get(error.errno, "") if error.errno else type(error).__name__
        print(name, flush=True)
