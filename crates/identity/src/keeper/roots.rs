//! The trust bundle: a stream from the authority, opened again whenever it ends.

use std::sync::Arc;

use super::{Shared, client::Failure, schedule};
use crate::{TrustBundle, ca_api::heddle::Bundle, certificate};

/// Follows the bundle until the keeper stops.
pub(super) async fn follow(shared: Arc<Shared>) {
    let mut channel = shared.channel.subscribe();
    let mut failures = 0;
    loop {
        let ended = tokio::select! {
            ended = listen(&shared, &mut channel, &mut failures) => ended,
            () = shared.stop.cancelled() => return,
        };
        let Some(failure) = ended else {
            continue;
        };
        failures += 1;
        if matches!(failure, Failure::Unauthenticated(_)) {
            shared.rejected.notify_one();
        }
        tracing::debug!(reason = %failure, failures, "the stream of trust bundles ended");
        tokio::select! {
            () = tokio::time::sleep(schedule::until_retry(failures, None, fastrand::f64())) => {}
            // A new connection is a new try.
            _ = channel.changed() => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

/// Opens the stream and takes in what comes, until it ends, or (`None`) a newer connection is there.
async fn listen(
    shared: &Shared,
    channel: &mut tokio::sync::watch::Receiver<Option<super::client::Client>>,
    failures: &mut u32,
) -> Option<Failure> {
    let closed = || Failure::Unavailable("the keeper stops".into());
    let client = match channel.wait_for(Option::is_some).await {
        Ok(client) => client.clone(),
        Err(_) => return Some(closed()),
    };
    channel.mark_unchanged();
    let Some(client) = client else {
        return Some(closed());
    };
    let mut stream = match client.watch_bundle().await {
        Ok(stream) => stream,
        Err(failure) => return Some(failure),
    };
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            _ = channel.changed() => {
                channel.mark_changed();
                return None;
            }
        };
        match message {
            Ok(Some(bundle)) => match read(shared, &bundle) {
                Ok(bundle) => {
                    if *failures > 0 {
                        shared.reached.send_modify(|times| *times += 1);
                    }
                    *failures = 0;
                    take(shared, bundle);
                }
                Err(failure) => return Some(failure),
            },
            Ok(None) => return Some(Failure::Unavailable("it ended the stream".into())),
            Err(status) => return Some(status.into()),
        }
    }
}

fn read(shared: &Shared, bundle: &Bundle) -> Result<TrustBundle, Failure> {
    let bad =
        |reason: String| Failure::Unavailable(format!("it sent a bundle of no use: {reason}"));
    if bundle.trust_domain != shared.config.trust_domain {
        return Err(bad(format!("it is of `{}`", bundle.trust_domain)));
    }
    let roots = certificate::from_pem(&bundle.roots).map_err(|error| bad(error.to_string()))?;
    if roots.is_empty() {
        return Err(bad("it has no roots".into()));
    }
    Ok(TrustBundle {
        trust_domain: bundle.trust_domain.clone(),
        roots,
        jwt_keys: bundle.jwt_keys.clone(),
    })
}

fn take(shared: &Shared, bundle: TrustBundle) {
    let changed = shared.bundle.send_if_modified(|current| {
        let changed = **current != bundle;
        if changed {
            *current = Arc::new(bundle);
        }
        changed
    });
    if changed {
        let bundle = shared.bundle.borrow().clone();
        tracing::info!(roots = bundle.roots.len(), "the trust bundle has changed");
        shared.state.save_bundle(&bundle);
    }
}
