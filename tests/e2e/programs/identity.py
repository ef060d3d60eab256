"""A workload that gets its identity as programs do, with the `spiffe` package: python3 -c PROGRAM COMMAND.

Every command prints JSON, one document per line.
"""

import json
import sys

from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import SpiffeId, WorkloadApiClient

TIMEOUT = 20


def say(**event):
    print(json.dumps(event), flush=True)


def described(context):
    """A certificate, and the roots that are trusted."""
    svid = context.default_svid
    roots = [root for bundle in context.x509_bundle_set.bundles for root in bundle.x509_authorities]
    return {
        "id": str(svid.spiffe_id),
        "serial": f"{svid.leaf.serial_number:032x}",
        "chain": [pem(certificate) for certificate in svid.cert_chain],
        "roots": sorted(map(pem, roots)),
    }


def pem(certificate):
    return certificate.public_bytes(Encoding.PEM).decode()


def own(client):
    """The workload's certificate now."""
    say(**described(client.fetch_x509_context(timeout=TIMEOUT)))


def follow(client):
    """The workload's certificates until standard input ends."""
    client.stream_x509_contexts(
        lambda context: say(**described(context)), lambda error: say(error=str(error))
    )
    sys.stdin.read()


def token(client, *subject):
    """A token: one's own, or another's."""
    subject = SpiffeId(subject[0]) if subject else None
    try:
        told = client.fetch_jwt_svid(audience={"db"}, subject=subject, timeout=TIMEOUT)
        say(id=str(told.spiffe_id), error=None)
    except Exception as error:
        say(id=None, error=str(error))


COMMANDS = {command.__name__: command for command in [own, follow, token]}
with WorkloadApiClient() as client:
    COMMANDS[sys.argv[1]](client, *sys.argv[2:])
