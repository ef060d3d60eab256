"""The server and the client of the upgrade tests: spoken to in lines, answering in lines."""

import select
import socket
import sys
import threading


def serve(address, port, stalls):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(0 if stalls else 512)
    print("ready", flush=True)
    if stalls:
        # The kernel takes one connection and drops every other SYN.
        sys.stdin.readline()
        listener.listen(512)

    def echo(connection):
        with connection:
            while data := connection.recv(4096):
                connection.sendall(data)

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=echo, args=(connection,), daemon=True).start()


def exchange(connection):
    connection.sendall(b"hello")
    received = b""
    while len(received) < 5:
        data = connection.recv(5)
        if not data:
            raise ConnectionError("closed")
        received += data


class Loop:
    """Connects, exchanges and closes, again and again."""

    def __init__(self, target):
        self.total, self.errors, self.stopping = 0, [], False
        self.thread = threading.Thread(target=self.run, args=(target,))
        self.thread.start()

    def run(self, target):
        while not self.stopping:
            self.total += 1
            try:
                with socket.create_connection(target, timeout=20) as connection:
                    exchange(connection)
            except OSError as error:
                self.errors.append(repr(error))

    def stop(self):
        self.stopping = True
        self.thread.join()
        return self.total, self.errors


def command(line, target, held, loops):
    word, *rest = line.split()
    if word == "open":
        fresh = [socket.create_connection(target, timeout=20) for _ in range(int(rest[0]))]
        held.extend(fresh)
    elif word == "exchange":
        for connection in held:
            exchange(connection)
            if connection.getpeername() != target:
                return f"peer {connection.getpeername()}"
    elif word == "begin":
        for _ in range(int(rest[0])):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(target)
            held.append(connection)
    elif word == "connected":
        _, writable, _ = select.select([], held, [], 0)
        errors = [c.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for c in writable]
        return f"{errors.count(0)} of {len(held)}, {len(errors) - errors.count(0)} failed"
    elif word == "loop":
        loops.extend(Loop(target) for _ in range(int(rest[0])))
    elif word == "stop":
        results = [loop.stop() for loop in loops]
        loops.clear()
        errors = [error for _, errors in results for error in errors]
        if errors:
            return f"{len(errors)} errors, first {errors[0]}"
        return f"ok {sum(total for total, _ in results)}"
    return "ok"


def connect(target):
    held, loops = [], []
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = command(line, target, held, loops)
        except OSError as error:
            answer = repr(error)
        print(answer, flush=True)


role, address, port = sys.argv[1:]
if role in ("serve", "stall"):
    serve(address, int(port), role == "stall")
else:
    connect((address, int(port)))
