//! The relay, `heddle publish-relay`: accepts from the host's sockets that `heddle up` passes in, and
//! connects to their targets from its own namespace, so that policy sees the relay's identity.
//!
//! Connections are bounded by [`MAX_CONNECTIONS`]; one more is accepted, reset, counted and logged, because a
//! client that is left to wait in the accept queue learns nothing.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use linux::seqpacket::{self, Stream};
use thiserror::Error;
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::Message;

/// Most connections at a time, over all ports.
pub const MAX_CONNECTIONS: usize = 1024;
/// Buffer per direction and connection, in bytes: 64 MiB in all when [`MAX_CONNECTIONS`] are open.
const BUFFER_BYTES: usize = 32 * 1024;
/// A target that has not answered by then is not reachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after an error of accepting that the next try may meet again, such as being out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the relay ended.
#[derive(Debug, Error)]
#[error("the publish relay lost its connection to `heddle up`, which starts a new one: {0}")]
pub struct Error(#[from] seqpacket::Error);

/// Relays until the other end of `control` is closed. `control` is what
/// [`PublishListeners::new_relay`](super::listeners::PublishListeners::new_relay) made. Needs a tokio runtime.
///
/// # Errors
/// `control` is no such socket, or brings what this version does not understand.
pub async fn run(control: OwnedFd) -> Result<(), Error> {
    serve(control, MAX_CONNECTIONS).await
}

/// Body of the subcommand [`SUBCOMMAND`](super::SUBCOMMAND): [`run`] with the socket that the process inherited.
///
/// # Errors
/// As [`run`]; the process has inherited none.
pub async fn main() -> Result<(), Error> {
    let control = linux::place::inherited(0).map_err(|source| seqpacket::Error::Io {
        what: "take over descriptor 3 from `heddle up`".into(),
        source,
    })?;
    run(control).await
}

async fn serve(control: OwnedFd, max_connections: usize) -> Result<(), Error> {
    let control = Stream::from_fd(control)?;
    let connections = Connections::new(max_connections);
    // Dropping a port's set ends its accepting, not its connections.
    let mut ports: BTreeMap<u16, JoinSet<()>> = BTreeMap::new();
    while let Some((message, descriptors)) = control.recv().await? {
        match message {
            Message::Add { host_port, target } => {
                ports.insert(
                    host_port,
                    accept_all(host_port, target, descriptors, &connections),
                );
                tracing::info!(host_port, %target, "publishing");
            }
            Message::Remove { host_port } => {
                ports.remove(&host_port);
                tracing::info!(host_port, "no longer publishing");
            }
        }
    }
    Ok(())
}

fn accept_all(
    host_port: u16,
    target: SocketAddr,
    descriptors: Vec<OwnedFd>,
    connections: &Arc<Connections>,
) -> JoinSet<()> {
    let mut accepting = JoinSet::new();
    for descriptor in descriptors {
        // `up` made it non-blocking.
        match TcpListener::from_std(descriptor.into()) {
            Ok(listener) => {
                accepting.spawn(accept(listener, host_port, target, Arc::clone(connections)));
            }
            Err(error) => {
                tracing::error!(host_port, %error, "cannot accept from a published port");
            }
        }
    }
    accepting
}

async fn accept(
    listener: TcpListener,
    host_port: u16,
    target: SocketAddr,
    connections: Arc<Connections>,
) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => match connections.admit() {
                Some(permit) => {
                    tokio::spawn(relay(client, host_port, target, permit));
                }
                None => reset(&client),
            },
            // `up` has closed the port; its message is on the way.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            Err(error) => {
                tracing::warn!(host_port, %error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn relay(
    mut client: TcpStream,
    host_port: u16,
    target: SocketAddr,
    _permit: OwnedSemaphorePermit,
) {
    let mut upstream = match connect(target).await {
        Ok(upstream) => upstream,
        Err(error) => {
            tracing::warn!(host_port, %target, %error, "{}", likely_cause(&error));
            reset(&client);
            return;
        }
    };
    // Delays by Nagle's algorithm are the ends' choice, not the relay's. A socket that refuses is closing.
    let _ = client.set_nodelay(true);
    let _ = upstream.set_nodelay(true);
    let copied =
        copy_bidirectional_with_sizes(&mut client, &mut upstream, BUFFER_BYTES, BUFFER_BYTES).await;
    if let Err(error) = copied {
        // What ended one side by an error must not look like an orderly end to the other.
        tracing::debug!(host_port, %target, %error, "a published connection broke");
        reset(&client);
        reset(&upstream);
    }
}

async fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    timeout(CONNECT_TIMEOUT, TcpStream::connect(target))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn likely_cause(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            "a published connection was refused: policy does not allow it (see `heddle flows`), or no replica is ready"
        }
        io::ErrorKind::TimedOut => {
            "a published connection was not answered: the target's node or agent may be down"
        }
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
            "a published connection has no way to its target: the address may be of a service that is gone"
        }
        _ => "a published connection failed",
    }
}

/// Makes the drop that follows a reset (RST) instead of an orderly end (FIN).
fn reset(stream: &TcpStream) {
    // A socket that refuses is closed already.
    let _ = stream.set_zero_linger();
}

/// How many there may be, and how many too many there were.
#[derive(Debug)]
struct Connections {
    free: Arc<Semaphore>,
    max: usize,
    refused: AtomicU64,
}

impl Connections {
    fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Arc::new(Semaphore::new(max)),
            max,
            refused: AtomicU64::new(0),
        })
    }

    fn admit(&self) -> Option<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.free).try_acquire_owned().ok();
        if permit.is_none() {
            let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
            // A flood must not flood the log as well.
            if refused.is_power_of_two() {
                tracing::warn!(
                    refused,
                    max = self.max,
                    "too many published connections at a time: new ones are reset"
                );
            }
        }
        permit
    }
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;

    use linux::netns::Netns;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::publish::{PublishedPort, listeners::PublishListeners, tests::in_own_namespace};

    /// Answers what it has read only after its client's end of stream, preceded by `name`.
    async fn echo_at_end(name: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut text = Vec::from(name);
                    stream.read_to_end(&mut text).await.unwrap();
                    stream.write_all(&text).await.unwrap();
                });
            }
        });
        address
    }

    async fn ask(address: (&str, u16), text: &str) -> io::Result<String> {
        let exchange = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(text.as_bytes()).await?;
            stream.shutdown().await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            Ok(answer)
        };
        timeout(Duration::from_secs(10), exchange).await.unwrap()
    }

    fn published(host_port: u16, target: SocketAddr) -> PublishedPort {
        PublishedPort { host_port, target }
    }

    #[test]
    fn bytes_half_closes_retargets_and_new_relays() {
        in_own_namespace(|| async {
            let (first, second) = (echo_at_end("first ").await, echo_at_end("second ").await);
            let host_port = 8080;
            let mut listeners = PublishListeners::new(Netns::current().unwrap());
            assert!(listeners.set(&[published(host_port, first)]).is_empty());

            // This client is there before any relay is.
            let early = tokio::spawn(ask(("127.0.0.1", host_port), "early"));
            let relay = tokio::spawn(run(listeners.new_relay().unwrap()));
            assert_eq!(early.await.unwrap().unwrap(), "first early");
            let large = "x".repeat(1_000_000);
            assert_eq!(
                ask(("::1", host_port), &large).await.unwrap(),
                format!("first {large}")
            );

            // An open connection outlives the change of its port's target.
            let mut open = TcpStream::connect(("127.0.0.1", host_port)).await.unwrap();
            open.write_all(b"old").await.unwrap();
            assert_eq!(ask(("127.0.0.1", host_port), "").await.unwrap(), "first ");
            assert!(listeners.set(&[published(host_port, second)]).is_empty());
            let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
            while ask(("127.0.0.1", host_port), "x").await.unwrap() != "second x" {
                assert!(tokio::time::Instant::now() < deadline);
            }
            open.shutdown().await.unwrap();
            let mut answer = String::new();
            open.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "first old");

            // A relay that dies is replaced; who comes in between waits.
            relay.abort();
            assert!(relay.await.unwrap_err().is_cancelled());
            let between = tokio::spawn(ask(("127.0.0.1", host_port), "between"));
            let relay = tokio::spawn(run(listeners.new_relay().unwrap()));
            assert_eq!(between.await.unwrap().unwrap(), "second between");

            // Closed by its owner, the port refuses; with its owner gone, the relay ends.
            assert!(listeners.set(&[]).is_empty());
            let error = ask(("127.0.0.1", host_port), "").await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
            drop(listeners);
            timeout(Duration::from_secs(5), relay)
                .await
                .unwrap()
                .unwrap()
                .unwrap();
        });
    }

    #[test]
    fn a_target_that_refuses_or_resets_resets_the_client() {
        in_own_namespace(|| async {
            let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
            let resetting = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (first, second) = (8080, 8081);
            let mut listeners = PublishListeners::new(Netns::current().unwrap());
            let errors = listeners.set(&[
                published(first, nobody),
                published(second, resetting.local_addr().unwrap()),
            ]);
            assert!(errors.is_empty());
            tokio::spawn(run(listeners.new_relay().unwrap()));

            let mut client = TcpStream::connect(("127.0.0.1", first)).await.unwrap();
            let error = client.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

            let mut client = TcpStream::connect(("127.0.0.1", second)).await.unwrap();
            client.write_all(b"x").await.unwrap();
            let (mut server, _) = resetting.accept().await.unwrap();
            server.read_u8().await.unwrap();
            reset(&server);
            drop(server);
            let error = client.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        });
    }

    #[test]
    fn connections_past_the_bound_are_reset_and_room_is_given_back() {
        in_own_namespace(|| async {
            let target = echo_at_end("").await;
            let host_port = 8080;
            let mut listeners = PublishListeners::new(Netns::current().unwrap());
            assert!(listeners.set(&[published(host_port, target)]).is_empty());
            tokio::spawn(serve(listeners.new_relay().unwrap(), 2));

            let first = TcpStream::connect(("127.0.0.1", host_port)).await.unwrap();
            let second = TcpStream::connect(("127.0.0.1", host_port)).await.unwrap();
            let mut third = TcpStream::connect(("127.0.0.1", host_port)).await.unwrap();
            let error = third.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

            drop((first, second));
            let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
            while ask(("127.0.0.1", host_port), "room").await.is_err() {
                assert!(tokio::time::Instant::now() < deadline);
            }
        });
    }

    #[test]
    fn a_socket_that_was_shut_down_ends_its_accepting() {
        in_own_namespace(|| async {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let copy = listener.try_clone().unwrap();
            let target = listener.local_addr().unwrap();
            let accepting = accept_all(1, target, vec![listener.into()], &Connections::new(1));
            socket2::SockRef::from(&copy)
                .shutdown(Shutdown::Both)
                .unwrap();
            let ended = timeout(Duration::from_secs(5), accepting.join_all()).await;
            assert_eq!(ended.unwrap().len(), 1);
        });
    }
}
