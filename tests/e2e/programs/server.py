"""A server that says who it is: python3 server.py PORT...

To every connection it sends one line of JSON (its host name, the caller's address, its own address),
and then sends back every line that it gets. It listens on IPv4 and IPv6. While it serves there is the
file /tmp/healthy, for a probe to find and for a test to take away.
"""

import json
import os
import socket
import socketserver
import sys
import threading


def plain(address):
    return address.removeprefix("::ffff:")


class Greeter(socketserver.StreamRequestHandler):
    def handle(self):
        greeting = {
            "pod": os.environ["HOSTNAME"],
            "peer": plain(self.client_address[0]),
            "address": plain(self.request.getsockname()[0]),
        }
        try:
            self.wfile.write(json.dumps(greeting).encode() + b"\n")
            for line in self.rfile:
                self.wfile.write(line)
        except ConnectionError:
            pass  # the caller left in the middle: its own business


class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


for port in sys.argv[1:]:
    server = Server(("::", int(port)), Greeter)
    threading.Thread(target=server.serve_forever).start()
open("/tmp/healthy", "w").close()
print("serving", flush=True)
