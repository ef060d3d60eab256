//! The client's side of a tunnel: a connection that the kernel led here goes to another node, under the identity of
//! the workload that made it.

use std::{net::SocketAddr, os::fd::AsFd as _, sync::Arc};

use api::report::FlowReporter;
use kernel::Grant;
use tokio::net::TcpStream;
use tunnel::{ConnectError, ConnectHeaders, PoolKey, TunnelStream, relay};

use super::{
    Context,
    credentials::CredentialsError,
    delivery,
    local::LocalWorkload,
    metrics::kind_of_connect,
    records::{Figures, Record, Subject, end},
};
use crate::names::WorkloadNames;

/// Takes a captured connection of a workload's to where it goes.
pub(crate) async fn carry(
    context: Arc<Context>,
    workload: Arc<LocalWorkload>,
    worker: usize,
    tcp: TcpStream,
    client: SocketAddr,
) {
    let grant = match context.view.accepted_grant(tcp.as_fd()) {
        Ok(Some(grant)) if grant.source_workload == workload.id => grant,
        Ok(_) => return super::reset(&tcp),
        Err(error) => {
            tracing::error!(workload = workload.uid, %error, "the kernel does not tell where a connection goes");
            return super::reset(&tcp);
        }
    };
    let target = SocketAddr::new(grant.target.into(), grant.target_port);
    let server = context
        .names
        .workload(grant.destination_workload)
        .unwrap_or_default();
    let service = context.names.service(grant.service);
    let mut record = Record::new(
        &context.scribe,
        Subject {
            reporter: FlowReporter::Source,
            source: end(workload.names.clone(), client),
            destination: end(server.clone(), target),
            service: service.clone(),
            path: "tunnel",
        },
    );
    let asked = Asked {
        client,
        target,
        server: &server,
        service: service.as_deref(),
    };
    match open(&context, &workload, worker, &asked).await {
        Ok(stream) => {
            record.opened(reason_of(&grant), None);
            let outcome = relay(tcp, stream, workload.stop.clone()).await;
            let figures = Figures {
                sent: outcome.bytes_to_tunnel,
                received: outcome.bytes_from_tunnel,
            };
            record.closed(figures, None);
        }
        Err(failure) => {
            super::reset(&tcp);
            context.metrics.failed_outbound(failure.kind());
            if failure.is_policy() {
                record.refused(REFUSED_BY_PEER, None);
            } else {
                tracing::info!(
                    workload = workload.uid, destination = %target, identity = server.identity, error = %failure,
                    "a connection to another node did not come about"
                );
                record.failed(failure.kind());
            }
        }
    }
}

/// The server's node says no; which policy it is, only its own record tells.
const REFUSED_BY_PEER: &str = "refused-by-peer";

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the workload has no certificate yet")]
    NoCertificate,
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

impl Failure {
    fn kind(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no-certificate",
            Self::Credentials(_) => "credentials",
            Self::Connect(error) => kind_of_connect(error),
        }
    }

    fn is_policy(&self) -> bool {
        matches!(self, Self::Connect(error) if error.is_policy())
    }
}

/// Who wants to go where.
struct Asked<'a> {
    client: SocketAddr,
    target: SocketAddr,
    server: &'a WorkloadNames,
    /// `NAMESPACE/NAME`.
    service: Option<&'a str>,
}

async fn open(
    context: &Arc<Context>,
    workload: &Arc<LocalWorkload>,
    worker: usize,
    asked: &Asked<'_>,
) -> Result<TunnelStream, Failure> {
    let credentials = workload.credentials().await;
    let credentials = credentials.ok_or(Failure::NoCertificate)?;
    let peer = credentials.towards(&asked.server.identity)?;
    let address = SocketAddr::new(asked.target.ip(), kernel::ports::HBONE);
    let key = PoolKey {
        source: credentials.source(workload.id),
        address,
        expected: Arc::clone(&peer.expected),
    };
    let headers = ConnectHeaders {
        forwarded_for: Some(asked.client),
        forwarded_host: asked.service.map(host_of),
        baggage: Some(workload.baggage.clone()),
        traceparent: None,
    };
    let dial = || delivery::dial(workload, context.workers.home(), address);
    let pool = &context.pools[worker];
    let authority = asked.target.into();
    let stream = pool.connect(&key, dial, &peer.tls, &authority, &headers);
    Ok(stream.await?)
}

/// `NAMESPACE/NAME` as a host name.
fn host_of(service: &str) -> String {
    let (namespace, name) = service.split_once('/').unwrap_or(("", service));
    format!("{name}.{namespace}")
}

fn reason_of(grant: &Grant) -> &'static str {
    kernel::Reason::from_number(grant.reason)
        .unwrap_or(kernel::Reason::None)
        .name()
}
