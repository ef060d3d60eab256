//! The server's side of a tunnel: whom the workload's policies let in, and the connection to its program.

use std::{net::SocketAddr, sync::Arc};

use api::report::FlowReporter;
use http::StatusCode;
use identity::SpiffeId;
use tokio::net::TcpStream;
use tunnel::{
    Accepted, Authority, ConnectRequest, Handler, Outcome, Peer, Refusal, Server, Session,
};

use super::{
    Context, delivery,
    local::LocalWorkload,
    metrics::kind_of_serve,
    open::Listed,
    records::{Figures, Record, Subject, end},
};
use crate::{
    inpod::sockets,
    names::WorkloadNames,
    policy::{Client, Identity},
};

/// Decides for all workloads of the node, on one worker.
pub(crate) struct Inbound {
    pub(crate) context: Arc<Context>,
    pub(crate) worker: usize,
}

/// A connection that was let in.
pub(crate) struct InboundSession {
    record: Record,
    listed: Listed,
}

impl Handler for Inbound {
    type Session = InboundSession;

    async fn connect(&self, request: &ConnectRequest) -> Result<Accepted<InboundSession>, Refusal> {
        let peer = &request.peer;
        let Some(workload) = self.context.local_at(peer.local_address) else {
            return Err(refusal(
                StatusCode::SERVICE_UNAVAILABLE,
                "the workload is gone",
            ));
        };
        let target = match request.authority {
            Authority::Address(target) if is_own(&workload, target) => target,
            Authority::Address(_) => {
                return Err(refusal(
                    StatusCode::BAD_REQUEST,
                    "the address is not this workload's, or the port is the mesh's own",
                ));
            }
            Authority::Host { .. } => {
                return Err(refusal(
                    StatusCode::BAD_REQUEST,
                    "a host name is for a proxy of layer 7, which this is not",
                ));
            }
        };
        let client = client_address(request);
        let mut record = Record::new(
            &self.context.scribe,
            Subject {
                reporter: FlowReporter::Destination,
                source: end(self.names_of(peer), client),
                destination: end(workload.names.clone(), target),
                service: None,
                path: "tunnel",
            },
        );
        let Some(identity) = identity(&peer.id) else {
            record.refused(kernel::Reason::NoIdentity.name(), None);
            return Err(refusal(
                StatusCode::UNAUTHORIZED,
                "the certificate is no workload's",
            ));
        };
        let asking = Client {
            identity: Some(identity),
            address: Some(client.ip()),
        };
        let (listed, judgement) = workload.admit(asking, target.ip(), target.port());
        let Some(judgement) = judgement else {
            record.failed(kernel::Reason::NoVerdict.name());
            return Err(refusal(
                StatusCode::SERVICE_UNAVAILABLE,
                "the workload's policies are not known yet",
            ));
        };
        if !judgement.allowed {
            let reason = judgement.reason.name();
            let text = format!(
                "policy: {reason} ({})",
                judgement.policy.as_deref().unwrap_or("-")
            );
            record.refused(reason, judgement.policy);
            return Err(refusal(StatusCode::UNAUTHORIZED, text));
        }
        let connected = delivery::connect(
            &workload,
            self.context.workers.home(),
            self.worker,
            client,
            target,
        );
        match connected.await {
            Ok(upstream) => {
                record.opened(judgement.reason.name(), judgement.policy);
                let ended = listed.connection.ended.clone();
                Ok(Accepted {
                    upstream,
                    session: InboundSession { record, listed },
                    ended,
                })
            }
            Err(error) => {
                record.failed(judgement.reason.name());
                Err(refusal(StatusCode::SERVICE_UNAVAILABLE, error))
            }
        }
    }

    fn refused(&self, peer: &Peer, authority: &str, refusal: &Refusal) {
        self.context.metrics.refused(refusal.status.as_u16());
        self.context.complaints.say(|unsaid| {
            tracing::info!(
                peer = %peer.id, address = %peer.address, authority, status = refusal.status.as_u16(),
                reason = refusal.reason, unsaid, "a stream of a tunnel is refused"
            );
        });
    }
}

impl Inbound {
    /// Who has the peer's address, under the identity that it has shown.
    fn names_of(&self, peer: &Peer) -> WorkloadNames {
        WorkloadNames {
            identity: peer.id.to_string(),
            ..self.context.names_at(peer.address.ip())
        }
    }
}

impl Session for InboundSession {
    fn finished(self, outcome: &Outcome) {
        let figures = Figures {
            sent: outcome.bytes_from_tunnel,
            received: outcome.bytes_to_tunnel,
        };
        self.record.closed(figures, self.listed.connection.cause());
    }
}

/// Serves a tunnel to a workload until it ends.
pub(crate) async fn carry(
    server: Server<Inbound>,
    workload: Arc<LocalWorkload>,
    tcp: TcpStream,
    peer: SocketAddr,
) {
    let context = &server.handler().context;
    let Some(credentials) = workload.credentials().await else {
        // Without a certificate there is nothing to say; the peer tries again.
        context.metrics.failed_inbound("no-certificate");
        return super::reset(&tcp);
    };
    let served = server.serve(tcp, credentials.server.clone(), workload.drain.clone());
    if let Err(error) = served.await {
        context.metrics.failed_inbound(kind_of_serve(&error));
        context.complaints.say(|unsaid| {
            tracing::info!(workload = workload.uid, %peer, %error, unsaid, "a tunnel ended badly");
        });
    }
}

fn is_own(workload: &LocalWorkload, target: SocketAddr) -> bool {
    let ip = target.ip().to_canonical();
    workload.addresses.contains(&ip) && !sockets::is_reserved(target.port())
}

/// The client's own address. A port that the peer tells is believed; another address than its own is not.
fn client_address(request: &ConnectRequest) -> SocketAddr {
    let address = request.peer.address.ip();
    let told = request
        .headers
        .forwarded_for
        .filter(|told| told.ip().to_canonical() == address);
    SocketAddr::new(address, told.map_or(0, |told| told.port()))
}

fn identity(id: &SpiffeId) -> Option<Identity> {
    let (namespace, service_account) = id.account()?;
    Some(Identity {
        trust_domain: id.trust_domain().to_owned(),
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
    })
}

fn refusal(status: StatusCode, reason: impl ToString) -> Refusal {
    Refusal {
        status,
        reason: reason.to_string(),
    }
}
