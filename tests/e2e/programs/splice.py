"""Both ends of the splice's tests: python3 splice.py serve PORT, and python3 splice.py run SCENARIO HOST PORT FAMILY.

Every connection begins with one line of JSON that names the scenario; each scenario is a pair of functions, one per
end. All bytes are a pseudo-random stream of a seed, and compared. The client prints what it saw, and what the
server said of its own end, as one line of JSON. Nothing waits longer than PATIENCE.
"""

import errno
import json
import random
import select
import signal
import socket
import struct
import sys
import threading
import time

PATIENCE = 8.0
# A writer that has not been let go on for so long is blocked.
BLOCKED = 0.5
WINDOW = 128 * 1024
SOURCE_PORT = 34567
# One that fills the queue of a listener, one that waits before it, and the one that matters.
NARROW_CLIENTS = 3


def stream(seed, size):
    return random.Random(seed).randbytes(size)


def read(sock, size):
    """Exactly `size` bytes, or what there was before the end."""
    parts, have = [], 0
    while have < size:
        part = sock.recv(min(size - have, 65536))
        if not part:
            break
        parts.append(part)
        have += len(part)
    return b"".join(parts)


def read_to_end(sock):
    return read(sock, 1 << 40)


def read_line(sock):
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            break
        line += byte
    return line


def errno_of(action):
    """The name of the error that `action` ends with, or null."""
    try:
        action()
    except TimeoutError:
        return "hangs"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return None


def reset_on_close(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def send_until_blocked(sock, data):
    """Sends from `data` until the socket takes no more. Returns how much it took."""
    sock.setblocking(False)
    sent = 0
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    while sent < len(data) and poll.poll(BLOCKED * 1000):
        try:
            sent += sock.send(data[sent : sent + 8192])
        except BlockingIOError:
            pass
    sock.settimeout(PATIENCE)
    return sent


# --- The serving end -------------------------------------------------------------------------------

EVENTS, RESULTS, LOCK = {}, {}, threading.Lock()


def event(key):
    with LOCK:
        return EVENTS.setdefault(key, threading.Event())


def wait_for(key):
    if not event(key).wait(PATIENCE):
        raise TimeoutError(f"nobody says {key}")


def result(key, value):
    with LOCK:
        RESULTS[key] = value
    event("result " + key).set()


def serve(port):
    listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("::", int(port)))
    listener.listen(512)
    threading.Thread(target=serve_narrow, args=(int(port) + 1,), daemon=True).start()
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=attend, args=(sock,), daemon=True).start()


def serve_narrow(port):
    """A listener whose queue is full until somebody says `accept`: handshakes wait. Then it is as before."""
    while True:
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::", port))
        listener.listen(0)
        event("accept").wait()
        event("accept").clear()
        listener.settimeout(PATIENCE)
        for _ in range(NARROW_CLIENTS):
            sock, _ = listener.accept()
            threading.Thread(target=attend, args=(sock,), daemon=True).start()
        listener.close()


def attend(sock):
    sock.settimeout(PATIENCE)
    line = read_line(sock)
    if not line.endswith(b"\n"):
        sock.close()
        return
    head = json.loads(line)
    try:
        SERVERS[head["scenario"]](sock, head)
    except OSError as error:
        result(head["key"], {"error": repr(error)})
        sock.close()


def on_say(sock, head):
    event(head["what"]).set()
    sock.sendall(b"ok")
    sock.close()


def on_ask(sock, head):
    wait_for("result " + head["of"])
    sock.sendall(json.dumps(RESULTS[head["of"]]).encode() + b"\n")
    sock.close()


def on_echo(sock, head):
    for size in head["sizes"]:
        data = read(sock, size)
        if len(data) != size:
            return
        sock.sendall(data)
    result(head["key"], {"end": len(read_to_end(sock))})
    sock.close()


def on_swallow(sock, head):
    """Reads to the end, compares, answers."""
    data = read_to_end(sock)
    sock.sendall(json.dumps(data == stream(head["seed"], head["size"])).encode())
    sock.sendall(stream(head["seed"] + 1, head["size"]))
    sock.close()


def on_ends_first(sock, head):
    """Ends its own direction at once, and goes on reading."""
    sock.sendall(stream(head["seed"] + 1, 1000))
    sock.shutdown(socket.SHUT_WR)
    data = read_to_end(sock)
    result(head["key"], {"same": data == stream(head["seed"], head["size"])})
    sock.close()


def on_hold(sock, head):
    """Reads only when told to."""
    wait_for("go " + head["key"])
    data = read(sock, head["size"]) if "size" in head else read_to_end(sock)
    result(head["key"], {"size": len(data), "same": data == stream(head["seed"], len(data))})
    while head.get("echo"):
        data = sock.recv(65536)
        if not data:
            break
        sock.sendall(data)
    sock.close()


def on_talk(sock, head):
    """Talks and never reads, until told to."""
    while not event("go " + head["key"]).wait(0.001):
        sock.sendall(b"x")
    data = read_to_end(sock)
    result(head["key"], {"size": len(data), "same": data == stream(head["seed"], len(data))})
    sock.close()


HELD = []


def on_keep(sock, head):
    """Ends its own direction and keeps the socket, unread."""
    sock.shutdown(socket.SHUT_WR)
    HELD.append((sock, head))


def on_keepers(sock, head):
    """Reads what was kept."""
    bad = []
    for kept, of in HELD:
        if read_to_end(kept) != stream(of["seed"], of["size"]):
            bad.append(of["seed"])
        kept.close()
    sock.sendall(json.dumps({"kept": len(HELD), "bad": bad}).encode() + b"\n")
    HELD.clear()
    sock.close()


def on_leave(sock, head):
    """Closes with bytes unread, by a reset if asked to."""
    wait_for("go " + head["key"])
    if head["reset"]:
        reset_on_close(sock)
    sock.close()


def on_watch(sock, head):
    """Reads until an error or the end, tries to send after it, and tells both."""
    size, error = 0, None
    try:
        while data := sock.recv(65536):
            size += len(data)
            result(head["key"] + " first", size)
    except OSError as failure:
        error = errno.errorcode.get(failure.errno, "hangs")
    result(head["key"], {"size": size, "error": error})
    wait_for("go " + head["key"])
    late = [errno_of(lambda: sock.send(b"late")), errno_of(lambda: sock.send(b"late"))]
    data = b""
    try:
        sock.setblocking(False)
        data = sock.recv(65536)
    except OSError:
        pass
    result(head["key"] + " late", {"sends": late, "received": len(data)})
    sock.close()


def on_answer(sock, head):
    """Sends in pieces, each when told to."""
    for index, size in enumerate(head["pieces"]):
        wait_for(f"piece {index} {head['key']}")
        sock.sendall(b"y" * size)
    wait_for("end " + head["key"])
    sock.close()


# --- The calling end -------------------------------------------------------------------------------


class Client:
    def __init__(self, host, port, family):
        self.port = int(port)
        wanted = {"4": socket.AF_INET, "6": socket.AF_INET6, "mapped": socket.AF_INET}[family]
        address = socket.getaddrinfo(host, None, wanted, socket.SOCK_STREAM)[0][4][0]
        self.family = socket.AF_INET if family == "4" else socket.AF_INET6
        self.address = "::ffff:" + address if family == "mapped" else address
        self.count = 0

    def socket(self):
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE)
        return sock

    def open(self, scenario, source_port=None, **head):
        deadline = time.monotonic() + PATIENCE
        while True:
            sock = self.socket()
            try:
                if source_port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind(("", source_port))
                sock.connect((self.address, self.port))
            except OSError as error:
                sock.close()
                # The last connection from this port may still wait for the acknowledgement of its end.
                if error.errno != errno.EADDRNOTAVAIL or time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
                continue
            sock.sendall(self.head(scenario, **head))
            return sock

    def head(self, scenario, **head):
        return json.dumps({"scenario": scenario, **head}).encode() + b"\n"

    def say(self, what):
        with self.open("say", key="", what=what) as sock:
            assert read(sock, 2) == b"ok"

    def ask(self, key):
        with self.open("ask", key="", of=key) as sock:
            return json.loads(read_line(sock))

    def key(self):
        self.count += 1
        return f"{random.SystemRandom().getrandbits(64):016x}"


def run_echo(client, blocking="yes"):
    """Round trips of all sizes; `no`: a reader that polls and never blocks."""
    sizes, key = [1, 64, 64, 4096, 3, 65536, 100_000, 7] * 20, client.key()
    sock = client.open("echo", key=key, sizes=sizes)
    sock.settimeout(None if blocking == "yes" else PATIENCE)
    for index, size in enumerate(sizes):
        data = stream(index, size)
        sock.sendall(data)
        if read(sock, size) != data:
            return {"bad": index}
    sock.shutdown(socket.SHUT_WR)
    answer, port = client.ask(key), sock.getsockname()[1]
    sock.close()
    sent = sum(sizes) + len(client.head("echo", key=key, sizes=sizes))
    return {"bad": None, "port": port, "sent": sent, "back": sum(sizes), **answer}


def run_half_close(client):
    """The client ends its direction, the server answers after it; and the other way round."""
    seen = {}
    for size in (1, 1000, 90_000, 900_000):
        seed = size
        sock = client.open("swallow", key=client.key(), seed=seed, size=size)
        sock.sendall(stream(seed, size))
        sock.shutdown(socket.SHUT_WR)
        answer = read_to_end(sock)
        seen[f"client first, {size}"] = answer == b"true" + stream(seed + 1, size)
        sock.close()
        key = client.key()
        sock = client.open("ends_first", key=key, seed=seed, size=size)
        first = read_to_end(sock)
        sock.sendall(stream(seed, size))
        sock.close()
        seen[f"server first, {size}"] = first == stream(seed + 1, 1000) and client.ask(key)["same"]
    return seen


def run_never_reads(client):
    key, data = client.key(), stream(1, 64 << 20)
    sock = client.open("hold", key=key, seed=1)
    sent = send_until_blocked(sock, data)
    sock.shutdown(socket.SHUT_WR)
    client.say("go " + key)
    return {"blocked_after": sent, **client.ask(key)}


def run_talks_and_never_reads(client):
    key, data = client.key(), stream(2, 64 << 20)
    sock = client.open("talk", key=key, seed=2)
    sent = send_until_blocked(sock, data)
    sock.shutdown(socket.SHUT_WR)
    client.say("go " + key)
    return {"blocked_after": sent, **client.ask(key)}


def run_switch(client):
    """More than waits in the splice, unread, and then round trips: the change to TCP in the middle of a stream."""
    seen = []
    for piece in (1, 1000, 50_000):
        key, size = client.key(), WINDOW + 20_000
        data = stream(piece, size)
        sock = client.open("hold", key=key, seed=piece, size=size, echo=True)
        for at in range(0, size, piece) if piece > 1 else [*range(0, 2000), *range(2000, size, 500)]:
            sock.sendall(data[at : at + (piece if piece > 1 or at < 2000 else 500)][: size - at])
        client.say("go " + key)
        seen.append(client.ask(key))
        for index in range(500):
            message = stream(index, 1 + index * 7 % 3000)
            sock.sendall(message)
            if read(sock, len(message)) != message:
                return {"bad": [piece, index]}
        sock.close()
    return {"bad": None, "same": all(one["same"] for one in seen)}


def run_port_reuse(client, count="150"):
    """Again and again from one port, while the server still holds the earlier connections' bytes unread."""
    for index in range(int(count)):
        size = 1 + index * 997 % 20_000
        sock = client.open("keep", source_port=SOURCE_PORT, key="", seed=index, size=size)
        assert read_to_end(sock) == b""
        sock.sendall(stream(index, size))
        sock.close()
    with client.open("keepers", key="") as sock:
        return json.loads(read_line(sock))


def run_fast_open(client):
    """Data before the connection stands, and more at once after it."""
    same = True
    for index in range(20):
        key, data = client.key(), stream(index, 30_000)
        sock = client.socket()
        sock.setblocking(True)
        first = client.head("hold", key=key, seed=index) + data[:10_000]
        sent = sock.sendto(first, socket.MSG_FASTOPEN, (client.address, client.port))
        sock.sendall(first[sent:])
        sock.sendall(data[10_000:20_000])
        sock.sendall(data[20_000:])
        sock.shutdown(socket.SHUT_WR)
        client.say("go " + key)
        same = same and client.ask(key)["same"]
        sock.close()
    return {"same": same}


def run_early_send(client):
    """A send() that has begun before the connection stands goes its own way: what is sent next must not overtake it."""
    narrow = (client.address, client.port + 1)
    fillers = []
    for _ in range(NARROW_CLIENTS - 1):
        filler = client.socket()
        filler.setblocking(False)
        filler.connect_ex(narrow)
        fillers.append(filler)
    key, data = client.key(), stream(3, 40_000)
    sock = client.socket()
    sock.setblocking(False)
    assert sock.connect_ex(narrow) == errno.EINPROGRESS
    early = select.select([], [sock], [], 0)[1] == []
    sock.setblocking(True)
    first = client.head("hold", key=key, seed=3) + data[:20_000]
    sender = threading.Thread(target=lambda: (sock.sendall(first), sock.sendall(data[20_000:])))
    sender.start()
    client.say("accept")
    sender.join(PATIENCE)
    sock.shutdown(socket.SHUT_WR)
    client.say("go " + key)
    answer = client.ask(key)
    for filler in [sock, *fillers]:
        filler.close()
    return {"early": early, **answer}


def run_leaves(client, how):
    """The server closes with bytes unread (`close`, `reset`): the client hears of it, and does not hang."""
    key = client.key()
    sock = client.open("leave", key=key, reset=how == "reset")
    sock.sendall(stream(4, 20_000))
    client.say("go " + key)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    assert poll.poll(PATIENCE * 1000), "nothing is heard"
    heard = errno_of(lambda: sock.recv(1))
    return {"heard": heard, "send": send_until_error(sock)}


def send_until_error(sock):
    """A writer whose reader has gone gets an error; how soon is TCP's business."""
    for _ in range(100_000):
        error = errno_of(lambda: sock.send(b"z" * 1000))
        if error:
            return error
    return None


def run_leaves_a_writer(client):
    key = client.key()
    sock = client.open("leave", key=key, reset=False)
    timer = threading.Timer(0.1, lambda: client.say("go " + key))
    timer.start()
    error = send_until_error(sock)
    timer.join()
    return {"send": error}


def run_after_shutdown(client):
    """Nothing can be sent after one's own shutdown."""
    key = client.key()
    sock = client.open("watch", key=key)
    sock.sendall(b"before")
    sock.shutdown(socket.SHUT_WR)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    error = errno_of(lambda: sock.send(b"after"))
    seen = client.ask(key)
    client.say("go " + key)
    return {"send": error, "server": seen}


def run_destroyed(client):
    """Waits until both ends have been destroyed from outside: nothing gets through afterwards, whoever tries."""
    key = client.key()
    sock = client.open("watch", key=key)
    sock.sendall(stream(5, 5000))
    client.ask(key + " first")
    print(json.dumps(sock.getsockname()[1]), flush=True)
    sys.stdin.readline()
    error = errno_of(lambda: sock.recv(1))
    sends = [errno_of(lambda: sock.send(b"late")) for _ in range(3)]
    server = client.ask(key)
    client.say("go " + key)
    late = client.ask(key + " late")
    more = errno_of(lambda: assert_nothing(sock))
    return {"recv": error, "sends": sends, "server": server, "late": late, "more": more}


def assert_nothing(sock):
    assert sock.recv(100) == b""


def run_reconnect(client):
    """A socket that is dissolved and connects anew must not give bytes of its earlier connection."""
    import ctypes

    key = client.key()
    sock = client.open("answer", key=key, pieces=[3000])
    client.say(f"piece 0 {key}")
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    assert poll.poll(PATIENCE * 1000)
    unspecified = struct.pack("=H26x", socket.AF_UNSPEC)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(sock.fileno(), unspecified, len(unspecified)) == 0
    sock.connect((client.address, client.port))
    sock.sendall(client.head("echo", key=client.key(), sizes=[1000]) + stream(6, 1000))
    same = read(sock, 1000) == stream(6, 1000)
    client.say("end " + key)
    sock.close()
    return {"same": same}


def run_differences(client):
    """What a program can see of the splice, each true if it is as in TCP."""
    key, seen = client.key(), {}
    sock = client.open("answer", key=key, pieces=[10, 10, 10, 10])
    sock.settimeout(None)

    # TCP's own counters.
    head = len(client.head("answer", key=key, pieces=[10, 10, 10, 10]))
    acked = struct.unpack_from("Q", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 120)[0]
    seen["tcp_info counts"] = acked >= head

    # A signal in a blocking recv: Python begins again after EINTR.
    signal.signal(signal.SIGALRM, lambda *_: client.say(f"piece 0 {key}"))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    seen["signal in a blocking recv"] = errno_of(lambda: sock.recv(10, socket.MSG_WAITALL)) is None
    sock.settimeout(PATIENCE)
    if not seen["signal in a blocking recv"]:
        read(sock, 10)
    sock.settimeout(None)

    # MSG_WAITALL waits for all.
    client.say(f"piece 1 {key}")
    timer = threading.Timer(0.3, lambda: client.say(f"piece 2 {key}"))
    timer.start()
    got = len(sock.recv(20, socket.MSG_WAITALL))
    seen["MSG_WAITALL"] = got == 20
    timer.join()
    sock.settimeout(PATIENCE)
    read(sock, 20 - got)
    sock.settimeout(None)

    # One's own shutdown while another thread blocks in recv.
    shutdown = threading.Timer(0.3, lambda: sock.shutdown(socket.SHUT_WR))
    shutdown.start()
    late = threading.Timer(0.8, lambda: client.say(f"piece 3 {key}"))
    late.start()
    seen["own shutdown in a blocking recv"] = errno_of(lambda: sock.recv(10)) is None
    shutdown.join()
    late.join()
    client.say("end " + key)
    sock.close()

    # Closing with bytes unread resets.
    seen["close with unread bytes"] = run_leaves(client, "close")["heard"] == "ECONNRESET"
    return seen


def run_hold(client):
    """One connection that lives on: answers every line of standard input with whether its echo was right."""
    key = client.key()
    sock = client.open("echo", key=key, sizes=[2000] * 10_000)
    print(json.dumps("connected"), flush=True)
    for index, _ in enumerate(sys.stdin):
        data = stream(index, 2000)
        try:
            sock.sendall(data)
            answer = read(sock, 2000) == data
        except OSError as error:
            answer = errno.errorcode[error.errno]
        print(json.dumps(answer), flush=True)
    sock.close()
    return {"ended": True}


SERVERS = {name[3:]: function for name, function in list(globals().items()) if name.startswith("on_")}

if sys.argv[1] == "serve":
    serve(sys.argv[2])
else:
    _, _, scenario, host, port, family, *rest = sys.argv
    print(json.dumps(globals()["run_" + scenario](Client(host, port, family), *rest)), flush=True)
