//! A tunnel on loopback to test with: a server whose handler is the test's, and a pool towards it.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http::StatusCode;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tunnel::{
    Accepted, Authority, ClientLimits, ClientTls, ConnectError, ConnectHeaders, ConnectRequest,
    Handler, Outcome, Peer, Pool, PoolKey, Refusal, ServeError, Server, ServerLimits, ServerTls,
    Session, TunnelStream, relay, tls,
};

use crate::certificates::{self, TRUST_DOMAIN, id};

/// Longer than anything takes that is not stuck.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Decides as the test says, and writes down what it is told.
pub struct TestHandler {
    /// Where an allowed stream is connected to, whatever it asks for.
    pub upstream: SocketAddr,
    /// What to answer instead.
    pub refuse: Mutex<Option<StatusCode>>,
    /// Never answers.
    pub hang: bool,
    pub ended: CancellationToken,
    pub requests: Mutex<Vec<ConnectRequest>>,
    pub refusals: Mutex<Vec<(String, Refusal)>>,
    pub finished: mpsc::UnboundedSender<Outcome>,
    pub asked: AtomicUsize,
}

pub struct TestSession(mpsc::UnboundedSender<Outcome>);

impl Session for TestSession {
    fn finished(self, outcome: &Outcome) {
        let _ = self.0.send(outcome.clone());
    }
}

impl Handler for TestHandler {
    type Session = TestSession;

    async fn connect(&self, request: &ConnectRequest) -> Result<Accepted<TestSession>, Refusal> {
        self.asked.fetch_add(1, SeqCst);
        self.requests.lock().unwrap().push(request.clone());
        if self.hang {
            std::future::pending::<()>().await;
        }
        let refuse = *self.refuse.lock().unwrap();
        if let Some(status) = refuse {
            let reason = "the test says so".to_owned();
            return Err(Refusal { status, reason });
        }
        let upstream = TcpStream::connect(self.upstream)
            .await
            .map_err(|error| Refusal {
                status: StatusCode::SERVICE_UNAVAILABLE,
                reason: error.to_string(),
            })?;
        Ok(Accepted {
            upstream,
            session: TestSession(self.finished.clone()),
            ended: self.ended.clone(),
        })
    }

    fn refused(&self, _: &Peer, authority: &str, refusal: &Refusal) {
        let mut refusals = self.refusals.lock().unwrap();
        refusals.push((authority.to_owned(), refusal.clone()));
    }
}

/// What a test changes before it starts.
pub struct Setup {
    pub authority: certificates::Authority,
    pub server_limits: ServerLimits,
    pub client_limits: ClientLimits,
    pub hang: bool,
    pub upstream: Option<SocketAddr>,
}

/// A running tunnel, and the application behind it.
pub struct Bench {
    pub authority: certificates::Authority,
    pub server: Server<TestHandler>,
    pub address: SocketAddr,
    pub key: PoolKey,
    pub pool: Pool,
    pub client_tls: ClientTls,
    pub server_tls: ServerTls,
    /// Drains the connections that are accepted from now on; a test puts another in its place.
    pub drain: Arc<Mutex<CancellationToken>>,
    pub ended: CancellationToken,
    pub finished: mpsc::UnboundedReceiver<Outcome>,
    /// How each connection ended that the server had.
    pub served: mpsc::UnboundedReceiver<Result<(), ServeError>>,
    /// The application's listener.
    pub application: TcpListener,
    pub accepted: Arc<AtomicUsize>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            authority: certificates::Authority::new(),
            server_limits: ServerLimits::default(),
            client_limits: ClientLimits::default(),
            hang: false,
            upstream: None,
        }
    }
}

impl Setup {
    pub async fn start(self) -> Bench {
        let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let ended = CancellationToken::new();
        let drain = Arc::new(Mutex::new(CancellationToken::new()));
        let (finish, finished) = mpsc::unbounded_channel();
        let (tell, served) = mpsc::unbounded_channel();
        let roots = &self.authority.roots;
        let server_svid = self.authority.svid("server");
        let server_tls = tls::server_config(&server_svid, roots, TRUST_DOMAIN).unwrap();
        let expected: Arc<[_]> = Arc::new([id("server")]);
        let client_tls =
            tls::client_config(&self.authority.svid("client"), roots, expected.clone()).unwrap();
        let handler = TestHandler {
            upstream: self
                .upstream
                .unwrap_or_else(|| application.local_addr().unwrap()),
            refuse: Mutex::default(),
            hang: self.hang,
            ended: ended.clone(),
            requests: Mutex::default(),
            refusals: Mutex::default(),
            finished: finish,
            asked: AtomicUsize::new(0),
        };
        let server = Server::new(handler, self.server_limits);
        let accepted = Arc::new(AtomicUsize::new(0));
        tokio::spawn({
            let (server, tls, drain, accepted) = (
                server.clone(),
                server_tls.clone(),
                drain.clone(),
                accepted.clone(),
            );
            async move {
                while let Ok((tcp, _)) = listener.accept().await {
                    accepted.fetch_add(1, SeqCst);
                    let drain = drain.lock().unwrap().clone();
                    let (server, tls, tell) = (server.clone(), tls.clone(), tell.clone());
                    tokio::spawn(async move {
                        let _ = tell.send(server.serve(tcp, tls, drain).await);
                    });
                }
            }
        });
        Bench {
            authority: self.authority,
            server,
            address,
            key: PoolKey {
                source: 1,
                address,
                expected,
            },
            pool: Pool::new(self.client_limits),
            client_tls,
            server_tls,
            drain,
            ended,
            finished,
            served,
            application,
            accepted,
        }
    }
}

impl Bench {
    pub async fn start() -> Self {
        Setup::default().start().await
    }

    pub async fn connect(&self) -> Result<TunnelStream, ConnectError> {
        connect(&self.pool, &self.key, &self.client_tls).await
    }

    /// A carried connection: the client application's end and the server application's.
    pub async fn carried(&self) -> (TcpStream, TcpStream, JoinHandle<Outcome>) {
        let stream = self.connect().await.unwrap();
        let (server, _) = within(self.application.accept()).await.unwrap();
        let (client, proxied) = pair().await;
        let task = tokio::spawn(relay(proxied, stream, CancellationToken::new()));
        (client, server, task)
    }
}

pub async fn connect(
    pool: &Pool,
    key: &PoolKey,
    tls: &ClientTls,
) -> Result<TunnelStream, ConnectError> {
    let authority: Authority = "10.0.0.1:80".parse().unwrap();
    let headers = ConnectHeaders::default();
    let address = key.address;
    let dial = || TcpStream::connect(address);
    within(pool.connect(key, dial, tls, &authority, &headers)).await
}

/// Two ends of a TCP connection.
pub async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
    (one.unwrap(), other.unwrap().0)
}

pub async fn within<F: Future>(future: F) -> F::Output {
    timeout(PATIENCE, future).await.expect("it is stuck")
}

/// Waits until something holds.
pub async fn until(what: &str, holds: impl Fn() -> bool) {
    let poll = async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(PATIENCE, poll).await.is_ok(), "not in time: {what}");
}

pub fn is_reset<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::ConnectionReset)
}
