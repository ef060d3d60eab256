//! The micro proxy: carries what crosses nodes, as HBONE between two workloads under their own identities.
//!
//! For every workload of the node it listens inside the workload's namespace (`inpod`):
//!
//! - [`outbound`]: the workload's connections to other nodes, led here by the kernel
//! - [`inbound`]: tunnels from other nodes; policy decides before the program hears of it
//! - [`plain`]: connections from outside the mesh that the kernel cannot judge
//!
//! Everything is carried by [`workers`]; the agent's loop only says which workloads there are ([`MicroProxy::serve`],
//! [`MicroProxy::drain`], [`MicroProxy::stop`]) and which policies protect them.

mod complaints;
mod credentials;
mod delivery;
mod inbound;
mod local;
mod metrics;
mod open;
mod outbound;
mod plain;
mod records;
mod workers;

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use api::enroll::{EnrolledWorkload, FromAgent};
use arc_swap::ArcSwap;
use identity::IdentitySource;
use kernel::KernelView;
use linux::{netns::Netns, seqpacket::Stream};
use socket2::SockRef;
use telemetry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tunnel::{ClientLimits, Pool, Server, ServerLimits};
use xds::proto::security::Authorization;

pub(crate) use self::local::Who;
use self::{
    complaints::Complaints, inbound::Inbound, local::LocalWorkload, metrics::TunnelMetrics,
    workers::Workers,
};
use crate::{
    NodeError,
    flows::Scribe,
    inpod::{
        routes,
        sockets::{InPodSockets, Port},
    },
    names::{NameBook, WorkloadNames},
};

/// How long what is carried for a workload that is gone may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);
/// How long accepting pauses when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The node's micro proxies.
pub(crate) struct MicroProxy {
    context: Arc<Context>,
    /// By worker.
    servers: Vec<Server<Inbound>>,
    serving: HashMap<String, Serving>,
    /// What an earlier agent stored, by the suffix that names the workload's instance.
    stored: HashMap<String, HashMap<String, OwnedFd>>,
    /// Cancelled when nothing is accepted any more.
    accepting: CancellationToken,
}

struct Serving {
    instance: String,
    stored_names: Vec<String>,
    workload: Arc<LocalWorkload>,
    sockets: InPodSockets,
    /// Nothing is accepted before the workload's policies are known.
    open: bool,
}

/// What the workers share.
pub(crate) struct Context {
    workers: Workers,
    /// By worker.
    pools: Vec<Pool>,
    locals: ArcSwap<HashMap<IpAddr, Arc<LocalWorkload>>>,
    view: Arc<KernelView>,
    names: Arc<NameBook>,
    scribe: Arc<Scribe>,
    metrics: TunnelMetrics,
    complaints: Complaints,
}

impl MicroProxy {
    /// Starts the workers.
    pub(crate) fn start(
        view: Arc<KernelView>,
        names: Arc<NameBook>,
        scribe: Arc<Scribe>,
        registry: &Registry,
    ) -> Result<Self, NodeError> {
        let workers = Workers::start().map_err(NodeError::io("start the workers"))?;
        let pools = (0..workers.count()).map(|_| Pool::new(ClientLimits::default()));
        let context = Arc::new(Context {
            pools: pools.collect(),
            locals: ArcSwap::default(),
            view,
            names,
            scribe,
            metrics: TunnelMetrics::register(registry)?,
            complaints: Complaints::new(),
            workers,
        });
        let servers = (0..context.workers.count()).map(|worker| {
            let handler = Inbound {
                context: Arc::clone(&context),
                worker,
            };
            Server::new(handler, ServerLimits::default())
        });
        Ok(Self {
            servers: servers.collect(),
            context,
            serving: HashMap::new(),
            stored: HashMap::new(),
            accepting: CancellationToken::new(),
        })
    }

    /// Takes back a descriptor that an earlier agent stored; gives it back if it is not of this kind.
    pub(crate) fn restore(&mut self, name: &str, fd: OwnedFd) -> Option<OwnedFd> {
        let (kind, workload) = name.split_once('/').unwrap_or((name, ""));
        if !InPodSockets::is_name(kind) {
            return Some(fd);
        }
        let of_workload = self.stored.entry(workload.to_owned()).or_default();
        of_workload.insert(kind.to_owned(), fd);
        None
    }

    /// Opens (or takes back) a workload's sockets. Nothing is accepted before [`MicroProxy::set_policies`].
    pub(crate) async fn serve(
        &mut self,
        workload: &EnrolledWorkload,
        who: Who,
        netns: &Netns,
        identities: &impl IdentitySource,
        starter: &Stream,
    ) -> Result<(), NodeError> {
        let id = who.id;
        let known = self.serving.get(&workload.uid);
        if known.is_some_and(|known| known.instance == workload.instance && known.workload.id == id)
        {
            return Ok(());
        }
        if let Some(goodbye) = self.stop(&workload.uid, starter).await? {
            tokio::spawn(goodbye.said());
        }
        let suffix = format!("{}@{}", workload.uid, workload.instance);
        let doing = |what: &str| NodeError::io(format!("{what} of {}", workload.uid));
        let sockets = self.sockets(workload, netns, &suffix)?;
        routes::prepare(netns, &workload.addresses)
            .await
            .map_err(doing("set up routes in the namespace"))?;
        let mut stored_names = Vec::new();
        for (kind, fd) in sockets.descriptors() {
            let name = format!("{kind}/{suffix}");
            let message = FromAgent::StoreFd { name: name.clone() };
            starter.send(&message, &[fd]).await?;
            stored_names.push(name);
        }
        let stop = CancellationToken::new();
        let context = Arc::clone(&self.context);
        let credentials =
            credentials::follow(identities, &who.identity, stop.clone(), move |old| {
                for pool in &context.pools {
                    pool.forget(old.source(id));
                }
            });
        let local = LocalWorkload::new(
            who,
            workload,
            netns.clone(),
            credentials,
            self.context.workers.count(),
            stop,
        );
        let serving = Serving {
            instance: workload.instance.clone(),
            stored_names,
            workload: Arc::new(local),
            sockets,
            open: false,
        };
        self.serving.insert(workload.uid.clone(), serving);
        self.publish();
        Ok(())
    }

    /// The policies that protect a workload, from now on. With the first ones it begins to accept.
    pub(crate) fn set_policies(
        &mut self,
        uid: &str,
        policies: Vec<(String, Arc<Authorization>)>,
    ) -> Result<(), NodeError> {
        let Some(serving) = self.serving.get_mut(uid) else {
            return Ok(());
        };
        serving.workload.set_policies(policies);
        if serving.open {
            return Ok(());
        }
        serving.open = true;
        for port in Port::ALL {
            let listeners = serving.sockets.listeners(port);
            let listeners = listeners.map_err(NodeError::io(format!("share sockets of {uid}")))?;
            for (index, listener) in listeners.into_iter().enumerate() {
                let server = &self.servers[index % self.servers.len()];
                accept_on(server, port, listener, &serving.workload, &self.accepting);
            }
        }
        Ok(())
    }

    /// One of the sockets that take what the kernel steers to the agent.
    pub(crate) fn steered_to(&self, uid: &str) -> Option<BorrowedFd<'_>> {
        self.serving.get(uid)?.sockets.any(Port::Inbound)
    }

    /// The workload is to stop soon: other nodes should not begin anything new with it.
    pub(crate) fn drain(&self, uid: &str) {
        if let Some(serving) = self.serving.get(uid) {
            serving.workload.drain.cancel();
        }
    }

    /// The workload is gone. Returns what to wait for until nothing of the agent's is left in its namespace.
    pub(crate) async fn stop(
        &mut self,
        uid: &str,
        starter: &Stream,
    ) -> Result<Option<Goodbye>, NodeError> {
        let Some(serving) = self.serving.remove(uid) else {
            return Ok(None);
        };
        self.publish();
        for name in serving.stored_names {
            starter.send(&FromAgent::DropFd { name }, &[]).await?;
        }
        let workload = serving.workload;
        workload.drain.cancel();
        if let Some(credentials) = workload.credentials_now() {
            for pool in &self.context.pools {
                pool.forget(credentials.source(workload.id));
            }
        }
        Ok(Some(Goodbye(workload)))
    }

    /// Stored sockets that nobody asked for belong to workloads that are gone.
    pub(crate) async fn forget_unclaimed(&mut self, starter: &Stream) -> Result<(), NodeError> {
        for (workload, sockets) in std::mem::take(&mut self.stored) {
            for (kind, fd) in sockets {
                drop(fd);
                let name = format!("{kind}/{workload}");
                starter.send(&FromAgent::DropFd { name }, &[]).await?;
            }
        }
        Ok(())
    }

    /// Accepts no more, and ends with the last connection that it carries: another agent has the sockets.
    pub(crate) async fn leave(self) {
        self.accepting.cancel();
        let all = TaskTracker::new();
        for serving in self.serving.into_values() {
            serving.workload.drain.cancel();
            let workload = serving.workload;
            all.spawn(async move {
                workload.tasks.close();
                workload.tasks.wait().await;
            });
        }
        all.close();
        all.wait().await;
        // Not before: what was just accepted still needs a stream.
        for pool in &self.context.pools {
            pool.drain();
        }
        for pool in &self.context.pools {
            // One that does not answer any more is not worth waiting for.
            let _ = tokio::time::timeout(GOODBYE, pool.drained()).await;
        }
    }

    fn sockets(
        &mut self,
        workload: &EnrolledWorkload,
        netns: &Netns,
        suffix: &str,
    ) -> Result<InPodSockets, NodeError> {
        let doing = |what: &str| NodeError::io(format!("{what} of {}", workload.uid));
        if let Some(stored) = self.stored.remove(suffix) {
            let restored = InPodSockets::restore(stored).map_err(doing("take back the sockets"))?;
            if let Some(restored) = restored {
                return Ok(restored);
            }
        }
        let shards = self.context.workers.count();
        let with_v6 = workload.addresses.iter().any(IpAddr::is_ipv6);
        netns
            .run(|| InPodSockets::open(shards, with_v6))
            .and_then(|opened| opened)
            .map_err(doing("listen in the namespace"))
    }

    /// Shows the workers which workloads there are.
    fn publish(&self) {
        let all = self.serving.values().flat_map(|serving| {
            let addresses = serving.workload.addresses.iter();
            addresses.map(|address| (*address, Arc::clone(&serving.workload)))
        });
        self.context.locals.store(Arc::new(all.collect()));
    }
}

/// What is left of a workload that is gone.
#[must_use = "it goes on until it has said goodbye"]
pub(crate) struct Goodbye(Arc<LocalWorkload>);

impl Goodbye {
    /// Lets tunnels say that they end, then ends them.
    pub(crate) async fn said(self) {
        let workload = self.0;
        workload.tasks.close();
        let ended = tokio::time::timeout(GOODBYE, workload.tasks.wait()).await;
        workload.stop.cancel();
        if ended.is_err() {
            workload.tasks.wait().await;
        }
    }
}

impl Context {
    /// The workload that has this address.
    fn local_at(&self, address: SocketAddr) -> Option<Arc<LocalWorkload>> {
        self.locals.load().get(&address.ip()).cloned()
    }

    /// Whose address it is; no names outside the mesh.
    fn names_at(&self, address: IpAddr) -> WorkloadNames {
        let known = self.view.address(address.into()).ok().flatten();
        known
            .and_then(|entry| self.names.workload(entry.workload))
            .unwrap_or_default()
    }
}

/// Takes what comes to one of a workload's sockets on the server's worker, until nothing is accepted any more.
fn accept_on(
    server: &Server<Inbound>,
    port: Port,
    listener: std::net::TcpListener,
    workload: &Arc<LocalWorkload>,
    accepting: &CancellationToken,
) {
    let (server, workload) = (server.clone(), Arc::clone(workload));
    let accepting = accepting.clone();
    let Inbound { context, worker } = server.handler();
    let (context, worker) = (Arc::clone(context), *worker);
    let workers = Arc::clone(&context);
    workers.workers.spawn(worker, async move {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(workload = workload.uid, %error, "a socket cannot be waited for");
                return;
            }
        };
        let stop = workload.stop.clone();
        let serve = async {
            match port {
                Port::Hbone => {
                    each(&workload, &listener, &accepting, |tcp, peer| {
                        inbound::carry(server.clone(), Arc::clone(&workload), tcp, peer)
                    })
                    .await;
                }
                Port::Outbound => {
                    each(&workload, &listener, &accepting, |tcp, peer| {
                        outbound::carry(
                            Arc::clone(&context),
                            Arc::clone(&workload),
                            worker,
                            tcp,
                            peer,
                        )
                    })
                    .await;
                }
                Port::Inbound => {
                    each(&workload, &listener, &accepting, |tcp, peer| {
                        plain::carry(
                            Arc::clone(&context),
                            Arc::clone(&workload),
                            worker,
                            tcp,
                            peer,
                        )
                    })
                    .await;
                }
            }
        };
        tokio::select! {
            () = serve => {}
            () = stop.cancelled() => {}
        }
    });
}

/// Carries every connection that comes to a workload's socket, until nothing is accepted any more; what is carried ends
/// when the workload is gone.
async fn each<F>(
    workload: &LocalWorkload,
    listener: &TcpListener,
    accepting: &CancellationToken,
    carry: impl Fn(TcpStream, SocketAddr) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    while let Some((tcp, peer)) = accept(listener, accepting).await {
        let (carried, stop) = (carry(tcp, peer), workload.stop.clone());
        workload.tasks.spawn(async move {
            tokio::select! {
                () = carried => {}
                () = stop.cancelled() => {}
            }
        });
    }
}

/// The next connection, or `None` when no more is accepted.
async fn accept(
    listener: &TcpListener,
    accepting: &CancellationToken,
) -> Option<(TcpStream, SocketAddr)> {
    loop {
        let accepted = tokio::select! {
            biased;
            () = accepting.cancelled() => return None,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => return Some((tcp, canonical(peer))),
            // The client did not wait.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "connections cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Of IPv4 as such: the listeners take both.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Lets the socket's close send a reset.
fn reset(tcp: &TcpStream) {
    // It fails only on a socket that is none any more.
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}
