//! Delta ADS client: subscribes to types, hands on what changes, and reconnects for ever.
//!
//! One update is on its way at a time: the next message is read when the consumer has answered the
//! last, so nothing piles up and types arrive in the server's order. What was accepted is remembered
//! over reconnects and told to the server, which then sends differences only. While the server is
//! away nothing happens: the consumer keeps working on what it has.

mod session;

use std::{collections::BTreeMap, path::PathBuf};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use self::session::Session;

/// Whom to ask, for what, and who asks.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// The server's Unix socket.
    pub socket: PathBuf,
    /// Name of this node; sent as metadata `NODE_NAME`.
    pub node: String,
    /// xDS node id; ztunnel's form is `ztunnel~IP~POD.NAMESPACE~NAMESPACE.svc.DOMAIN`.
    pub node_id: String,
    /// Type URLs; all resources of each are subscribed to.
    pub types: Vec<String>,
}

/// A running client; it stops when this is dropped.
#[derive(Debug)]
pub struct Client {
    state: watch::Receiver<ConnectionState>,
    task: JoinHandle<()>,
}

/// How the connection to the server stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnectionState {
    /// A stream is open and has been answered on.
    pub connected: bool,
    /// Every type has been received and answered at least once, empty ones too.
    pub synced: bool,
    /// Streams opened so far.
    pub connections: u64,
    /// Why the last connection failed or ended; cleared when the next one is answered on.
    pub last_error: Option<String>,
}

/// Changes of one type that belong together. Answer it with [`Update::answer`].
#[derive(Debug)]
pub struct Update {
    /// The type.
    pub type_url: String,
    /// New and changed resources.
    pub upserts: Vec<Upsert>,
    /// Names of resources that are gone.
    pub removed: Vec<String>,
    /// The server's name for the state that this update leads to.
    pub version: String,
    /// Where the answer goes.
    pub answer: Answer,
}

/// A new or changed resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upsert {
    /// Its name.
    pub name: String,
    /// The encoded message.
    pub body: Bytes,
}

/// Takes the consumer's answer to an update. Dropping it is a rejection.
#[derive(Debug)]
pub struct Answer(oneshot::Sender<Result<(), String>>);

impl Answer {
    /// The update is in effect.
    pub fn accept(self) {
        // The client task may be gone, and then no one needs the answer.
        let _ = self.0.send(Ok(()));
    }

    /// The update, or part of it, could not be taken; the server shows `message` to the operator. The
    /// resources do not count as held: they come again with their next change or on the next connection.
    pub fn reject(self, message: impl Into<String>) {
        let _ = self.0.send(Err(message.into()));
    }
}

impl Client {
    /// Starts to connect. Updates arrive at the receiver; when it is dropped, the client stops.
    #[must_use]
    pub fn start(config: ClientConfig) -> (Self, mpsc::Receiver<Update>) {
        // One: the consumer's answer is awaited before the next update is read anyway.
        let (updates, receiver) = mpsc::channel(1);
        let (state_sender, state) = watch::channel(ConnectionState::default());
        let session = Session {
            held: config
                .types
                .iter()
                .map(|type_url| (type_url.clone(), BTreeMap::new()))
                .collect(),
            config,
            updates,
            state: state_sender,
            answered: std::collections::BTreeSet::new(),
        };
        let task = tokio::spawn(session.run());
        (Self { state, task }, receiver)
    }

    /// Watches how the connection stands.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<ConnectionState> {
        self.state.clone()
    }

    /// Returns when every type has been received and answered at least once, or the client has stopped.
    pub async fn synced(&self) {
        // An error means that the client has stopped: documented above.
        let _ = self.state.clone().wait_for(|state| state.synced).await;
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}
