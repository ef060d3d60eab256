"""Listens on a network device until its input ends: python3 capture.py DEVICE TEXT...

Prints `"listening"`, and at the end one line of JSON: how many frames of TCP payload there were by the server's port, in
how many of them any of the texts appeared, and how many begin with something else than a TLS record of a known kind
in either direction of a connection's first bytes.
"""

import collections
import json
import select
import socket
import struct
import sys

ALL_PROTOCOLS = 3
TCP = 6
# RFC 8446, section 5.1: change_cipher_spec, alert, handshake, application_data.
TLS_RECORDS = range(20, 24)


def payload(frame):
    """Source port, destination port, sequence number and bytes of a TCP segment; None of anything else."""
    kind = struct.unpack("!H", frame[12:14])[0]
    if kind == 0x0800:
        header = (frame[14] & 15) * 4
        protocol, end = frame[23], 14 + struct.unpack("!H", frame[16:18])[0]
    elif kind == 0x86DD:
        header = 40
        protocol, end = frame[20], 54 + struct.unpack("!H", frame[18:20])[0]
    else:
        return None
    if protocol != TCP:
        return None
    at = 14 + header
    source, destination = struct.unpack("!HH", frame[at : at + 4])
    begin = at + (frame[at + 12] >> 4) * 4
    flags = frame[at + 13]
    addresses = frame[26:34] if kind == 0x0800 else frame[22:54]
    return source, destination, addresses, flags, frame[begin:end]


def main():
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(ALL_PROTOCOLS))
    sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
    sock.bind((sys.argv[1], 0))
    texts = [text.encode() for text in sys.argv[2:]]
    ports, leaks, first, lost = collections.Counter(), 0, {}, 0
    print(json.dumps("listening"), flush=True)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN)
    ended = False
    while True:
        ready = dict(poll.poll(200 if ended else None))
        if sys.stdin.fileno() in ready:
            poll.unregister(sys.stdin)
            ended = True
        if sock.fileno() not in ready:
            if ended:
                break
            continue
        segment = payload(sock.recv(65600))
        if segment is None:
            continue
        source, destination, addresses, flags, data = segment
        if not data:
            continue
        ports[min(source, destination)] += 1
        leaks += any(text in data for text in texts)
        first.setdefault((addresses, source, destination), data[0])
    strange = [end for end, byte in first.items() if byte not in TLS_RECORDS]
    print(json.dumps({"ports": ports, "leaks": leaks, "connections": len(first), "strange": len(strange)}))


main()
