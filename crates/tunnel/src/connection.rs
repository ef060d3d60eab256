//! An HTTP/2 connection's own life, the same on both sides: PINGs while there are streams, and a regular look at
//! whether it is idle or has expired.

use std::{
    future::{Future as _, poll_fn},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep_until};

/// Sends PINGs and awaits their answers.
pub(crate) struct KeepAlive {
    ping_pong: PingPong,
    interval: Duration,
    timeout: Duration,
    /// When the PING that is not answered yet was sent.
    sent: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

/// What happened.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A PING was answered.
    Pong,
    /// A PING was not answered in time: the peer is gone.
    TimedOut,
    /// An interval has passed: time to look after the connection.
    Tick,
}

impl KeepAlive {
    pub(crate) fn new(ping_pong: PingPong, interval: Duration, timeout: Duration) -> Self {
        Self {
            ping_pong,
            interval,
            timeout,
            sent: None,
            timer: Box::pin(sleep_until(Instant::now() + interval)),
        }
    }

    /// Sends a PING now, unless one is under way. The connection must be polled for it to go out.
    pub(crate) fn ping(&mut self) {
        if self.sent.is_none() && self.ping_pong.send_ping(Ping::opaque()).is_ok() {
            self.sent = Some(Instant::now());
        }
    }

    /// The next event; `busy` is whether there are streams, which is what PINGs are for.
    pub(crate) async fn next(&mut self, busy: bool) -> Event {
        poll_fn(|cx| self.poll(cx, busy)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>, busy: bool) -> Poll<Event> {
        if self.sent.is_some()
            && let Poll::Ready(answer) = self.ping_pong.poll_pong(cx)
        {
            self.sent = None;
            // An error is the connection's, which says so itself.
            if answer.is_ok() {
                return Poll::Ready(Event::Pong);
            }
        }
        if self.timer.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let now = Instant::now();
        if let Some(sent) = self.sent {
            if now >= sent + self.timeout {
                return Poll::Ready(Event::TimedOut);
            }
        } else if busy {
            self.ping();
        }
        let next = match self.sent {
            Some(sent) => (now + self.interval).min(sent + self.timeout),
            None => now + self.interval,
        };
        self.timer.as_mut().reset(next);
        Poll::Ready(Event::Tick)
    }
}
