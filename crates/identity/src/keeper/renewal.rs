//! The life of one workload identity's certificate: fetched at once, renewed at half of its lifetime, dropped when it
//! has expired. Failures are tried again, ever more slowly, and at once when the authority is reached again.

use std::{
    ops::ControlFlow,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Shared, client::Failure, lock, schedule};
use crate::{SpiffeId, Svid, certificate};

/// How the last tries went.
#[derive(Debug, Default)]
pub(super) struct Health {
    pub(super) issued: u64,
    pub(super) refused: bool,
    pub(super) last_error: Option<String>,
}

/// What the next try waits for.
#[derive(Debug)]
pub(super) struct Wait {
    duration: Duration,
    /// A try that failed need not wait once the authority is there again.
    ends_when_reached: bool,
    /// When the certificate that there is ends.
    expiry: Option<SystemTime>,
}

impl Health {
    pub(super) fn note(&mut self, outcome: &Result<Svid, Failure>) {
        match outcome {
            Ok(_) => {
                self.issued += 1;
                self.refused = false;
                self.last_error = None;
            }
            Err(failure) => {
                self.refused = matches!(failure, Failure::Refused(_));
                self.last_error = Some(failure.to_string());
            }
        }
    }
}

impl Wait {
    pub(super) fn renewal(svid: &Svid) -> Self {
        let (from, to) = (svid.not_before, svid.not_after);
        Self {
            duration: schedule::until_renewal(from, to, SystemTime::now(), fastrand::f64()),
            ends_when_reached: false,
            expiry: Some(to),
        }
    }

    /// The first try is at once.
    pub(super) fn retry(failures: u32, svid: Option<&Svid>) -> Self {
        let expiry = svid.map(|svid| svid.not_after);
        let now = SystemTime::now();
        let left = expiry.map(|expiry| expiry.duration_since(now).unwrap_or_default());
        Self {
            duration: match failures {
                0 => Duration::ZERO,
                failures => schedule::until_retry(failures, left, fastrand::f64()),
            },
            ends_when_reached: failures > 0,
            expiry,
        }
    }

    fn at_least(mut self, hint: Duration) -> Self {
        if hint > self.duration {
            self.duration = hint;
            self.ends_when_reached = false;
        }
        self
    }
}

/// Keeps an identity's certificate valid, until `stop`.
pub(super) async fn keep(
    shared: Arc<Shared>,
    id: SpiffeId,
    svid: watch::Sender<Option<Arc<Svid>>>,
    health: Arc<Mutex<Health>>,
    stop: CancellationToken,
) {
    let (mut failures, mut hint) = (0, Duration::ZERO);
    loop {
        let current = svid.borrow().clone();
        let wait = match current.as_deref().filter(|_| failures == 0) {
            Some(svid) => Wait::renewal(svid),
            None => Wait::retry(failures, current.as_deref()).at_least(hint),
        };
        let slept = tokio::select! {
            slept = sleep(&shared, &stop, wait, &svid) => slept,
            () = untrusted(&shared, &svid), if failures == 0 => ControlFlow::Continue(()),
        };
        if slept.is_break() {
            return;
        }
        let fetched = tokio::select! {
            fetched = fetch(&shared, &id) => fetched,
            () = stop.cancelled() => return,
        };
        lock(&health).note(&fetched);
        hint = match &fetched {
            Err(Failure::Busy(_, hint)) => *hint,
            _ => Duration::ZERO,
        };
        match fetched {
            Ok(new) => {
                tracing::debug!(identity = %id, serial = new.serial, "a new certificate");
                failures = 0;
                // Under the lock of `release`: what was released must not come back.
                let entries = shared.entries();
                if stop.is_cancelled() {
                    return;
                }
                shared.state.save_svid(&new);
                svid.send_replace(Some(Arc::new(new)));
                drop(entries);
            }
            Err(failure) => {
                failures += 1;
                if matches!(failure, Failure::Unauthenticated(_)) {
                    shared.rejected.notify_one();
                }
                complain(&id, &failure, failures);
            }
        }
    }
}

/// Waits for the connection, then for a turn, then for the answer.
async fn fetch(shared: &Shared, id: &SpiffeId) -> Result<Svid, Failure> {
    let mut channel = shared.channel.subscribe();
    // As long as the node has no certificate of its own, nothing can be asked for.
    let closed = || Failure::Unavailable("the keeper stops".into());
    let _turn = {
        channel
            .wait_for(Option::is_some)
            .await
            .map_err(|_| closed())?;
        shared.fetches.acquire().await.map_err(|_| closed())?
    };
    // The newest one, not the one that was there before the turn came.
    let client = channel.borrow().clone().ok_or_else(closed)?;
    client
        .create_certificate(id, shared.config.lifetime, None)
        .await
}

/// Sleeps, and drops the certificate when it expires meanwhile.
pub(super) async fn sleep(
    shared: &Shared,
    stop: &CancellationToken,
    wait: Wait,
    svid: &watch::Sender<Option<Arc<Svid>>>,
) -> ControlFlow<()> {
    let until = Instant::now() + wait.duration;
    let mut reached = shared.reached.subscribe();
    let left = |expiry: SystemTime| expiry.duration_since(SystemTime::now()).unwrap_or_default();
    let expiry = async {
        match wait.expiry {
            Some(expiry) => tokio::time::sleep(left(expiry)).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(expiry);
    let mut expired = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return ControlFlow::Break(()),
            () = tokio::time::sleep_until(until) => return ControlFlow::Continue(()),
            _ = reached.changed(), if wait.ends_when_reached => {
                // Not everybody in the same moment.
                tokio::time::sleep(Duration::from_millis(fastrand::u64(0..100))).await;
                return ControlFlow::Continue(());
            }
            () = &mut expiry, if !expired => {
                expired = true;
                // An identity that cannot be proved any more is none.
                if svid.send_replace(None).is_some() {
                    tracing::error!("a certificate has expired before it could be renewed");
                }
            }
        }
    }
}

/// Until the bundle changes to one by which the certificate is not good any more: the authority has lost its old root.
pub(super) async fn untrusted(shared: &Shared, svid: &watch::Sender<Option<Arc<Svid>>>) {
    let mut bundle = shared.bundle.subscribe();
    while bundle.changed().await.is_ok() {
        let roots = bundle.borrow_and_update().roots.clone();
        let current = svid.borrow().clone();
        if let Some(current) = current
            && let Err(error) = certificate::verify(&current.chain, &roots, SystemTime::now())
        {
            tracing::warn!(identity = %current.id, %error, "the certificate is renewed before its time");
            return;
        }
    }
    std::future::pending::<()>().await;
}

/// The first failure is worth a warning, and then every doubling of their number.
pub(super) fn complain(id: &SpiffeId, failure: &Failure, failures: u32) {
    if failures.is_power_of_two() {
        tracing::warn!(identity = %id, failures, reason = %failure, "no certificate");
    } else {
        tracing::debug!(identity = %id, failures, reason = %failure, "no certificate");
    }
}
