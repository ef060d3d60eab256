//! The node's own identity: obtained with a join token, renewed with itself; and the connection made with it.

use std::{ops::ControlFlow, sync::Arc, time::SystemTime};

use super::{
    Shared,
    client::{Client, Failure},
    lock,
    renewal::{self, Wait},
};
use crate::Svid;

/// Keeps the node's certificate valid, until the keeper stops.
pub(super) async fn keep(shared: Arc<Shared>) {
    let mut failures = 0;
    loop {
        let current = shared.node.borrow().clone();
        let wait = match current.as_deref().filter(|_| failures == 0) {
            Some(svid) => Wait::renewal(svid),
            None => Wait::retry(failures, current.as_deref()),
        };
        // A certificate that is not taken is renewed before its time; after failures the waits are kept.
        let slept = tokio::select! {
            slept = renewal::sleep(&shared, &shared.stop, wait, &shared.node) => slept,
            () = renewal::untrusted(&shared, &shared.node), if failures == 0 => ControlFlow::Continue(()),
            () = shared.rejected.notified(), if failures == 0 => ControlFlow::Continue(()),
        };
        if slept.is_break() {
            return;
        }
        let fetched = tokio::select! {
            fetched = fetch(&shared) => fetched,
            () = shared.stop.cancelled() => return,
        };
        lock(&shared.node_health).note(&fetched);
        match fetched {
            Ok(svid) => {
                tracing::info!(serial = svid.serial, "this node has a new certificate");
                failures = 0;
                shared.state.save_svid(&svid);
                shared.node.send_replace(Some(Arc::new(svid)));
                shared.reached.send_modify(|times| *times += 1);
            }
            Err(failure) => {
                failures += 1;
                renewal::complain(&shared.id, &failure, failures);
            }
        }
    }
}

/// With the certificate that there is, as long as it is good; else with a token.
async fn fetch(shared: &Shared) -> Result<Svid, Failure> {
    let lifetime = shared.config.lifetime;
    let roots = shared.bundle.borrow().roots.clone();
    let current = shared.node.borrow().clone();
    if let Some(current) = current.filter(|svid| svid.not_after > SystemTime::now()) {
        let client = Client::new(&shared.config, &roots, Some(&current))?;
        match client.create_certificate(&shared.id, lifetime, None).await {
            // It trusts another root by now, or does not know this one: join anew.
            Err(Failure::Unauthenticated(reason)) => {
                tracing::warn!(
                    reason,
                    "the authority does not take this node's certificate"
                );
            }
            // What a server that rejects the certificate in the handshake looks like from here; a token is asked for only
            // when the certificate has run out.
            answer => return answer,
        }
    }
    let token = (shared.config.join_token)()
        .await
        .map_err(|reason| Failure::Unavailable(format!("there is no join token: {reason}")))?;
    Client::new(&shared.config, &roots, None)?
        .create_certificate(&shared.id, lifetime, Some(&token))
        .await
}

/// Makes the connection anew whenever node certificate or bundle change; who uses the old one ends with it.
pub(super) async fn connect(shared: Arc<Shared>) {
    let (mut node, mut bundle) = (shared.node.subscribe(), shared.bundle.subscribe());
    loop {
        let svid = node.borrow_and_update().clone();
        let roots = bundle.borrow_and_update().roots.clone();
        let client = svid.and_then(|svid| {
            Client::new(&shared.config, &roots, Some(&svid))
                .inspect_err(
                    |error| tracing::error!(%error, "this node's certificate cannot be used"),
                )
                .ok()
        });
        shared.channel.send_replace(client);
        tokio::select! {
            changed = node.changed() => if changed.is_err() { return },
            changed = bundle.changed() => if changed.is_err() { return },
            () = shared.stop.cancelled() => return,
        }
    }
}
