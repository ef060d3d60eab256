"""A workload that uses the `spiffe` package as its users do. Prints JSON, one line per event."""

import json
import sys
import threading

from spiffe import SpiffeId, WorkloadApiClient
from spiffe.svid.jwt_svid import JwtSvid
from spiffe.spiffe_id.spiffe_id import TrustDomain

TIMEOUT = 20


def say(**event):
    print(json.dumps(event), flush=True)


def everything(client):
    """The workload's certificate, roots and token, and whether they fit together."""
    context = client.fetch_x509_context(timeout=TIMEOUT)
    svid = context.default_svid
    domain = svid.spiffe_id.trust_domain
    roots = context.x509_bundle_set.get_bundle_for_trust_domain(domain).x509_authorities
    svid.leaf.verify_directly_issued_by(next(iter(roots)))
    assert svid.private_key.public_key() == svid.leaf.public_key()
    bundles = client.fetch_x509_bundles(timeout=TIMEOUT)
    token = client.fetch_jwt_svid(audience={"db"}, timeout=TIMEOUT)
    keys = client.fetch_jwt_bundles(timeout=TIMEOUT).get_bundle_for_trust_domain(domain)
    locally = JwtSvid.parse_and_validate(token.token, keys, {"db"})
    remotely = client.validate_jwt_svid(token.token, "db", timeout=TIMEOUT)
    say(
        id=str(svid.spiffe_id),
        svids=len(context.x509_svids),
        serial=str(svid.leaf.serial_number),
        roots=len(bundles.get_bundle_for_trust_domain(TrustDomain(domain.name)).x509_authorities),
        token=str(token.spiffe_id),
        locally=str(locally.spiffe_id),
        remotely=str(remotely.spiffe_id),
    )
    attempt(lambda: client.validate_jwt_svid(token.token, "other", timeout=TIMEOUT))
    attempt(lambda: client.validate_jwt_svid(token.token[:-8] + "AAAAAAAA", "db", timeout=TIMEOUT))


def attempt(call):
    try:
        say(result=str(call()))
    except Exception as error:
        say(error=str(error))


def stream(client):
    """Every certificate that is pushed, until the process is killed."""

    def on_success(context):
        roots = [len(bundle.x509_authorities) for bundle in context.x509_bundle_set.bundles]
        say(serial=str(context.default_svid.leaf.serial_number), roots=sum(roots))

    client.stream_x509_contexts(on_success, lambda error: say(error=str(error)))
    threading.Event().wait()


def main():
    with WorkloadApiClient() as client:
        match sys.argv[1:]:
            case ["everything"]:
                everything(client)
            case ["stream"]:
                stream(client)
            case ["certificate"]:
                attempt(lambda: client.fetch_x509_svid(timeout=TIMEOUT).spiffe_id)
            case ["token", subject]:
                attempt(
                    lambda: client.fetch_jwt_svid(
                        audience={"db"}, subject=SpiffeId(subject), timeout=TIMEOUT
                    ).spiffe_id
                )


main()
