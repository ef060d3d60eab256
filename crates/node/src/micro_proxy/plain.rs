//! Connections from outside the mesh whose leave depends on more than the kernel knows (a policy that looks at client
//! addresses): the kernel steers them here instead of to the program, and here they are judged.

use std::{net::SocketAddr, sync::Arc};

use api::report::FlowReporter;
use tokio::net::TcpStream;

use super::{
    Context, delivery,
    local::LocalWorkload,
    records::{Figures, Record, Subject, end},
};
use crate::{inpod::sockets, policy::Client};

/// Judges such a connection to a workload, and carries it if it may pass.
pub(crate) async fn carry(
    context: Arc<Context>,
    workload: Arc<LocalWorkload>,
    worker: usize,
    mut tcp: TcpStream,
    client: SocketAddr,
) {
    let Ok(target) = tcp.local_addr().map(super::canonical) else {
        return;
    };
    // Whoever comes to this port by its number has not been steered.
    if sockets::is_reserved(target.port()) || workload.addresses.contains(&client.ip()) {
        super::reset(&tcp);
        return;
    }
    let mut record = Record::new(
        &context.scribe,
        Subject {
            reporter: FlowReporter::Destination,
            source: end(context.names_at(client.ip()), client),
            destination: end(workload.names.clone(), target),
            service: None,
            path: "agent",
        },
    );
    let asking = Client {
        identity: None,
        address: Some(client.ip()),
    };
    let (listed, judgement) = workload.admit(asking, target.ip(), target.port());
    let Some(judgement) = judgement else {
        super::reset(&tcp);
        return record.failed(kernel::Reason::NoVerdict.name());
    };
    if !judgement.allowed {
        super::reset(&tcp);
        return record.refused(judgement.reason.name(), judgement.policy);
    }
    let home = context.workers.home();
    // Not from the client's own port: between these two ends there is a connection already, the client's to us.
    let from = SocketAddr::new(client.ip(), 0);
    let mut program = match delivery::connect(&workload, home, worker, from, target).await {
        Ok(program) => program,
        Err(_) => {
            super::reset(&tcp);
            return record.failed(judgement.reason.name());
        }
    };
    record.opened(judgement.reason.name(), judgement.policy);
    let connection = Arc::clone(&listed.connection);
    let mut figures = Figures {
        sent: 0,
        received: 0,
    };
    let copied = tokio::select! {
        copied = tokio::io::copy_bidirectional(&mut tcp, &mut program) => Some(copied),
        () = connection.ended.cancelled() => None,
    };
    match copied {
        Some(Ok((sent, received))) => figures = Figures { sent, received },
        Some(Err(_)) | None => {
            super::reset(&tcp);
            super::reset(&program);
        }
    }
    record.closed(figures, connection.cause());
}
