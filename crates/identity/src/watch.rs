//! What a caller may see, as it changes: its newest SVID and the trust bundle, and streams of messages made from them.
//!
//! Both services on the socket, the Workload API and SDS, send from here.

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{IdentitySource, SpiffeId, Svid, TrustBundle};

/// How long a caller waits for what is not there yet: longer than a signing that is tried again, shorter than callers' patience.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A stream of answers.
pub(crate) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// One caller's view.
pub(crate) struct View {
    svid: watch::Receiver<Option<Arc<Svid>>>,
    bundle: watch::Receiver<Arc<TrustBundle>>,
    stop: CancellationToken,
}

/// What the view shows at one moment.
pub(crate) struct Seen {
    pub(crate) svid: Option<Arc<Svid>>,
    pub(crate) bundle: Arc<TrustBundle>,
}

impl View {
    pub(crate) fn new(
        source: &impl IdentitySource,
        id: &SpiffeId,
        stop: CancellationToken,
    ) -> Self {
        Self {
            svid: source.svid(id),
            bundle: source.bundle(),
            stop,
        }
    }

    /// What is there now; [`View::changed`] waits for what comes after it.
    pub(crate) fn see(&mut self) -> Seen {
        Seen {
            svid: self.svid.borrow_and_update().clone(),
            bundle: self.bundle.borrow_and_update().clone(),
        }
    }

    /// Waits until there is something that [`View::see`] has not shown.
    pub(crate) async fn changed(&mut self) -> Result<(), Status> {
        let changed = tokio::select! {
            changed = self.svid.changed() => changed,
            changed = self.bundle.changed() => changed,
            () = self.stop.cancelled() => return Err(stopping()),
        };
        changed.map_err(|_| Status::unavailable("this identity is no longer kept here"))
    }

    /// The first message that `make` makes of what is there.
    pub(crate) async fn first<T>(
        &mut self,
        mut make: impl FnMut(&Seen) -> Option<T>,
    ) -> Result<T, Status> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(made) = make(&self.see()) {
                return Ok(made);
            }
            tokio::time::timeout_at(deadline, self.changed())
                .await
                .map_err(|_| {
                    Status::unavailable(
                        "there is no certificate yet: the certificate authority has not signed one",
                    )
                })??;
        }
    }

    /// A message now, and another whenever it would be a different one. Ends with the reason.
    pub(crate) fn stream<T, M>(self, make: M) -> Answers<T>
    where
        T: PartialEq + Clone + Send + 'static,
        M: FnMut(&Seen) -> Option<T> + Send + 'static,
    {
        let state = Some(Messages {
            view: self,
            make,
            last: None,
        });
        Box::pin(futures::stream::unfold(state, |state| async move {
            let mut messages = state?;
            match messages.next().await {
                Ok(message) => Some((Ok(message), Some(messages))),
                Err(status) => Some((Err(status), None)),
            }
        }))
    }
}

struct Messages<T, M> {
    view: View,
    make: M,
    last: Option<T>,
}

impl<T, M> Messages<T, M>
where
    T: PartialEq + Clone,
    M: FnMut(&Seen) -> Option<T>,
{
    async fn next(&mut self) -> Result<T, Status> {
        let message = if self.last.is_none() {
            self.view.first(&mut self.make).await?
        } else {
            loop {
                self.view.changed().await?;
                let made = (self.make)(&self.view.see());
                if let Some(message) = made
                    && self.last.as_ref() != Some(&message)
                {
                    break message;
                }
            }
        };
        self.last = Some(message.clone());
        Ok(message)
    }
}

/// What callers hear when the server ends: they connect again.
pub(crate) fn stopping() -> Status {
    Status::unavailable("the agent is being replaced: connect again")
}
