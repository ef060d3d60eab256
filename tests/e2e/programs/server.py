"""A server that says who it is: python3 server.py PORT...

To every connection it sends one line of JSON (its host name, the caller's address, its own address),
and then sends back every line that it gets. Datagrams to the same ports it answers with such a line each, and what it
got in it. It listens on IPv4 and IPv6. While it serves there is the file /tmp/healthy, for a probe to find and for a
test to take away. With LINGER=1 in its environment it ends only when its last connection has.
"""

import json
import os
import signal
import socket
import socketserver
import sys
import threading


def plain(address):
    return address.removeprefix("::ffff:")


open_connections = set()
ending = threading.Event()


def end_if_idle():
    if ending.is_set() and not open_connections:
        os._exit(0)


def end(_signal, _frame):
    ending.set()
    end_if_idle()


if os.environ.get("LINGER") == "1":
    signal.signal(signal.SIGTERM, end)


class Greeter(socketserver.StreamRequestHandler):
    def handle(self):
        greeting = {
            "pod": os.environ["HOSTNAME"],
            "peer": plain(self.client_address[0]),
            "address": plain(self.request.getsockname()[0]),
        }
        open_connections.add(self)
        try:
            self.wfile.write(json.dumps(greeting).encode() + b"\n")
            for line in self.rfile:
                self.wfile.write(line)
        except ConnectionError:
            pass  # the caller left in the middle: its own business
        finally:
            open_connections.discard(self)
            end_if_idle()


class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


def answer_datagrams(sock):
    while True:
        data, sender = sock.recvfrom(65535)
        greeting = {
            "pod": os.environ["HOSTNAME"],
            "peer": plain(sender[0]),
            "text": data.decode(),
        }
        try:
            sock.sendto(json.dumps(greeting).encode(), sender)
        except OSError:
            pass  # the caller is gone


for port in sys.argv[1:]:
    server = Server(("::", int(port)), Greeter)
    threading.Thread(target=server.serve_forever).start()
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.bind(("::", int(port)))
    threading.Thread(target=answer_datagrams, args=(datagrams,), daemon=True).start()
open("/tmp/healthy", "w").close()
print("serving", flush=True)
while True:
    signal.pause()
