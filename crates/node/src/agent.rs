//! The agent's one loop: everything that changes (workloads, the mesh's state, an operator's question) comes
//! through here in order, so nothing needs a lock.
//!
//! Nothing reaches the kernel before the control plane's whole state is here: a half-known set of policies would
//! allow what it should not. Until then an earlier agent's programs and tables stay in force.

mod status;

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::fd::{AsFd as _, OwnedFd},
    os::unix::fs::MetadataExt,
    sync::Arc,
    time::{Duration, Instant},
};

use api::{
    enroll::{EnrolledWorkload, FromAgent, ToAgent},
    node_config::NodeConfig,
    report::{Explanation, NodeStatus},
};
use kernel::{Kernel, KernelConfig};
use linux::{netns::Netns, seqpacket::Stream};
use telemetry::{Registry, tcp::TcpMetrics};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};
use xds::{
    client::{Client, ClientConfig, ConnectionState, Update},
    proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE},
};

use crate::{
    NodeError,
    connections::{Connections, Scope},
    dataplane::DataPlane,
    explain::{self, Question},
    flows::{self, FlowLog, Scribe},
    health::Health,
    http,
    identities::Identities,
    ids::Ids,
    local_dns::LocalDns,
    micro_proxy::{MicroProxy, Who},
    names::NameBook,
    state::{Changes, MeshState},
};

/// Series per metric: more workload pairs than one node's traffic has.
const MAX_SERIES: usize = 10_000;
/// Messages from the starter that may wait for the loop.
const ENROLL_QUEUE: usize = 64;
/// Operators' questions that may wait for the loop.
const COMMAND_QUEUE: usize = 32;
/// How soon what could not be put into effect is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// How long connections may take to end that an agent carries which makes way for its successor.
const LEAVE_PATIENCE: Duration = Duration::from_secs(50);
/// How long the starter's greeting may take.
const GREETING: Duration = Duration::from_secs(10);

/// A question from an operator.
#[derive(Debug)]
pub(crate) enum Command {
    Status(oneshot::Sender<NodeStatus>),
    Explain(Question, oneshot::Sender<Result<Explanation, String>>),
}

/// Runs a node agent until it is told to stop or its starter is gone. What it put into the kernel stays.
///
/// # Errors
/// Whatever keeps the agent from working at all; what concerns one workload is reported for that workload.
pub async fn run(config: NodeConfig) -> Result<(), NodeError> {
    let registry = Registry::new();
    let metrics = TcpMetrics::register(&registry, MAX_SERIES)?;
    let names = Arc::new(NameBook::default());
    let log = FlowLog::new();

    fs::create_dir_all(&config.state_dir).map_err(NodeError::io(format!(
        "make {}",
        config.state_dir.display()
    )))?;
    let mut ids = Ids::open(&config.state_dir.join("ids.json"))?;
    let (kernel, reader) = Kernel::open(KernelConfig {
        pin_dir: config.pin_dir.clone(),
        cgroup: config.cgroup.clone(),
        sizes: config.maps.clone(),
    })?;
    if ids.is_new() && kernel.has_predecessor() {
        // Numbers given out anew would come to mean two things at once.
        return Err(NodeError::NumbersLost {
            path: config.state_dir.display().to_string(),
        });
    }
    // An agent that cannot keep numbers must not begin to take the earlier one's rules away.
    ids.save()?;
    let (mesh, node) = (config.mesh.clone(), config.node.clone());
    let mut dataplane = DataPlane::new(kernel, ids, mesh, node.clone(), Arc::clone(&names));
    let own_cgroup = config.cgroup.join("agent");
    let own = fs::metadata(&own_cgroup).map_err(NodeError::io(format!(
        "look at cgroup {}",
        own_cgroup.display()
    )))?;
    dataplane.admit_agent(own.ino())?;
    if !dataplane.kernel.has_predecessor() {
        dataplane.kernel.attach()?;
    }

    let (starter, outside) = greet(&config).await?;
    let dns = LocalDns::start(&config.mesh, &config.dns_upstream, outside, &registry)?;
    let (client, updates) = Client::start(ClientConfig {
        socket: config.xds_socket.clone(),
        node: node.clone(),
        node_id: format!(
            "heddle~{node}~{node}.heddle-system~heddle-system.svc.{}",
            config.mesh.cluster_domain
        ),
        types: vec![ADDRESS_TYPE.into(), AUTHORIZATION_TYPE.into()],
    });
    let (command_sender, commands) = mpsc::channel(COMMAND_QUEUE);
    let scribe = Scribe::new(
        Arc::clone(&log),
        Arc::clone(&names),
        metrics.clone(),
        node.clone(),
    );
    let starter = Arc::new(starter);
    let identities = Identities::start(&config, &starter, &registry)?;
    let micro_proxy = MicroProxy::start(
        dataplane.kernel.view(),
        names,
        Arc::clone(&scribe),
        &registry,
    )?;
    let connections = Connections::new(dataplane.kernel.view(), Arc::clone(&scribe));
    tokio::spawn(Arc::clone(&connections).run_sweeps());
    let mut server = tokio::spawn(http::serve(
        config.api_socket.clone(),
        command_sender,
        log,
        Arc::clone(&connections),
        registry.clone(),
    ));
    let (settled, names_known) = watch::channel(false);
    let mut flow_reader = tokio::spawn(flows::read(reader, scribe, names_known));

    let mut agent = Agent {
        connection: client.state(),
        config,
        dataplane,
        connections,
        dns,
        micro_proxy,
        identities,
        starter,
        metrics,
        state: MeshState::default(),
        pending: Changes::default(),
        seen: HashSet::new(),
        snapshot_done: false,
        settled,
        announced: HashSet::new(),
        refused: HashMap::new(),
        health: Health::default(),
        _client: client,
    };
    let mut terminate =
        signal(SignalKind::terminate()).map_err(NodeError::io("listen for SIGTERM"))?;
    let outcome = tokio::select! {
        outcome = agent.work(updates, commands) => outcome,
        outcome = &mut server => outcome.unwrap_or_else(|error| Err(NodeError::Protocol(error.to_string()))),
        outcome = &mut flow_reader => outcome.unwrap_or_else(|error| Err(NodeError::Protocol(error.to_string()))),
        _ = terminate.recv() => Ok(()),
    };
    // From here on the kernel's tables and records are the successor's.
    server.abort();
    flow_reader.abort();
    if outcome.is_ok() {
        agent.leave().await;
    }
    outcome
}

/// Connects to who starts workloads. Returns the namespace from which the machine's resolver is reachable.
async fn greet(config: &NodeConfig) -> Result<(Stream, Netns), NodeError> {
    let stream = Stream::connect(&config.enroll_socket).await?;
    let hello = FromAgent::Hello {
        node: config.node.clone(),
    };
    stream.send(&hello, &[]).await?;
    let answer = tokio::time::timeout(GREETING, stream.recv::<ToAgent>())
        .await
        .map_err(|_| NodeError::Protocol("no greeting came within 10 s".into()))??;
    match answer {
        Some((ToAgent::Hello { node }, mut fds)) if node == config.node && fds.len() == 1 => {
            Ok((stream, Netns::from_fd(fds.remove(0))))
        }
        Some((other, fds)) => Err(NodeError::Protocol(format!(
            "expected a greeting for {} with one descriptor, got {other:?} with {}",
            config.node,
            fds.len()
        ))),
        None => Err(NodeError::Protocol(
            "the starter closed the connection".into(),
        )),
    }
}

/// A workload that could not be enrolled.
#[derive(Debug, Clone)]
struct Refused {
    workload: EnrolledWorkload,
    netns: Netns,
    error: String,
}

struct Agent {
    config: NodeConfig,
    dataplane: DataPlane,
    connections: Arc<Connections>,
    dns: LocalDns,
    micro_proxy: MicroProxy,
    identities: Identities,
    starter: Arc<Stream>,
    metrics: TcpMetrics,
    state: MeshState,
    /// Changes that are not in the kernel yet.
    pending: Changes,
    /// Types received at least once.
    seen: HashSet<String>,
    snapshot_done: bool,
    /// Everything was known once, and what an earlier agent left was cleaned up.
    settled: watch::Sender<bool>,
    /// Workloads whose starter was told that they may start.
    announced: HashSet<String>,
    /// Workloads that could not be enrolled, to be tried again.
    refused: HashMap<String, Refused>,
    health: Health,
    connection: watch::Receiver<ConnectionState>,
    _client: Client,
}

impl Agent {
    async fn work(
        &mut self,
        mut updates: mpsc::Receiver<Update>,
        mut commands: mpsc::Receiver<Command>,
    ) -> Result<(), NodeError> {
        let mut enrolments = receive(Arc::clone(&self.starter));
        let mut connection = self.connection.clone();
        let mut retry = tokio::time::interval(RETRY);
        loop {
            tokio::select! {
                message = enrolments.recv() => match message {
                    Some(Ok((message, fds))) => self.enrolment(message, fds).await?,
                    Some(Err(error)) => return Err(error),
                    None => return Ok(()),
                },
                Some(update) = updates.recv() => self.update(update).await?,
                Some(command) = commands.recv() => self.answer(command),
                _ = retry.tick() => self.look_again().await?,
                // An empty type is known by this alone.
                Ok(()) = connection.changed() => self.settle().await?,
            }
        }
    }

    /// Makes way: tells the starter, who starts a successor, and ends with the last connection that this agent carries.
    async fn leave(self) {
        self.identities.leave();
        // Without a starter there is no successor either.
        if self.starter.send(&FromAgent::Leaving, &[]).await.is_err() {
            return;
        }
        let left = tokio::time::timeout(LEAVE_PATIENCE, self.micro_proxy.leave());
        if left.await.is_err() {
            tracing::warn!(
                "connections to other nodes are cut: they did not end within {LEAVE_PATIENCE:?}"
            );
        }
    }

    async fn enrolment(
        &mut self,
        message: ToAgent,
        mut fds: Vec<OwnedFd>,
    ) -> Result<(), NodeError> {
        match (message, fds.pop()) {
            (ToAgent::StoredFd { name }, Some(fd)) => {
                let fd = self.identities.restore(&name, fd);
                let fd = fd.and_then(|fd| self.micro_proxy.restore(&name, fd));
                if let Some(fd) = fd {
                    self.dns.restore(name, fd);
                }
            }
            (ToAgent::JoinToken { token }, _) => self.identities.token(token),
            (ToAgent::WorkloadDraining { uid }, _) => self.micro_proxy.drain(&uid),
            (ToAgent::WorkloadAdded(workload), Some(fd)) => {
                self.try_to_enroll(workload, Netns::from_fd(fd)).await?;
            }
            (ToAgent::WorkloadRemoved { uid }, _) => {
                self.announced.remove(&uid);
                self.refused.remove(&uid);
                let enrolled = self
                    .dataplane
                    .local(&uid)
                    .map(|local| local.enrolled.clone());
                self.dataplane.retire(&uid)?;
                self.connections.forget(&uid);
                self.dns.stop(&uid, &self.starter).await?;
                self.let_go(&uid).await?;
                if let Some(gone) = enrolled {
                    let is_last = !self.dataplane.locals().any(|local| {
                        local.enrolled.workload == gone.workload
                            && local.enrolled.namespace == gone.namespace
                    });
                    if is_last {
                        self.metrics.evict_workload(&gone.namespace, &gone.workload);
                    }
                    self.touch(&uid);
                    self.settle().await?;
                }
            }
            (ToAgent::SnapshotDone, _) => {
                self.snapshot_done = true;
                self.identities.serve(&self.starter).await?;
                self.settle().await?;
            }
            (other, _) => {
                return Err(NodeError::Protocol(format!(
                    "unexpected or incomplete message {other:?}"
                )));
            }
        }
        Ok(())
    }

    /// Closes what the agent has in the namespace of a workload that is gone, and tells the starter when it is done.
    async fn let_go(&mut self, uid: &str) -> Result<(), NodeError> {
        let goodbye = self.micro_proxy.stop(uid, &self.starter).await?;
        let (starter, uid) = (Arc::clone(&self.starter), uid.to_owned());
        self.identities.release(&uid);
        tokio::spawn(async move {
            if let Some(goodbye) = goodbye {
                goodbye.said().await;
            }
            // A starter that is gone waits for nothing.
            drop(starter.send(&FromAgent::WorkloadGone { uid }, &[]).await);
        });
        Ok(())
    }

    /// Tries again what failed, and looks at what nobody tells us.
    async fn look_again(&mut self) -> Result<(), NodeError> {
        for refused in self.refused.clone().into_values() {
            self.try_to_enroll(refused.workload, refused.netns).await?;
        }
        if !self.dataplane.unapplied.is_empty() {
            self.pending.add(self.dataplane.unapplied.changes());
            self.settle().await?;
        }
        self.health.look(&self.dataplane.kernel, Instant::now());
        Ok(())
    }

    /// A failure is the workload's alone: it is told to the starter, and tried again.
    async fn try_to_enroll(
        &mut self,
        workload: EnrolledWorkload,
        netns: Netns,
    ) -> Result<(), NodeError> {
        let uid = workload.uid.clone();
        match self.enroll(workload.clone(), netns.clone()).await {
            Ok(()) => drop(self.refused.remove(&uid)),
            Err(error) => {
                let error = error.to_string();
                let refused = Refused {
                    workload,
                    netns,
                    error: error.clone(),
                };
                let before = self.refused.insert(uid.clone(), refused);
                if before.is_none_or(|before| before.error != error) {
                    tracing::error!(uid, error, "cannot be enrolled, and is tried again");
                }
                self.starter
                    .send(&FromAgent::WorkloadRefused { uid, error }, &[])
                    .await?;
            }
        }
        self.settle().await
    }

    async fn enroll(&mut self, workload: EnrolledWorkload, netns: Netns) -> Result<(), NodeError> {
        let cookie = netns.cookie().map_err(NodeError::io(format!(
            "enter the namespace of {}",
            workload.uid
        )))?;
        self.announced.remove(&workload.uid);
        self.touch(&workload.uid);
        self.dns.serve(&workload, &netns, &self.starter).await?;
        // Without this, policy could not end its connections: then it does not begin any.
        self.connections
            .watch(&workload.uid, &netns)
            .map_err(NodeError::io(format!(
                "list the sockets of {}",
                workload.uid
            )))?;
        self.dataplane.enroll(workload.clone(), cookie)?;
        let Some(local) = self.dataplane.local(&workload.uid) else {
            return Ok(());
        };
        let (id, names) = (local.id, self.dataplane.names_of(local));
        let identity = names
            .identity
            .parse()
            .map_err(|error| NodeError::Protocol(format!("{}: {error}", workload.uid)))?;
        self.identities.want(&workload, &identity)?;
        let who = Who {
            id,
            names,
            identity,
        };
        self.micro_proxy
            .serve(
                &workload,
                who,
                &netns,
                &self.identities.keeper,
                &self.starter,
            )
            .await?;
        if let Some(listener) = self.micro_proxy.steered_to(&workload.uid) {
            self.dataplane.kernel.steer(id, netns.as_fd(), listener)?;
        }
        Ok(())
    }

    /// Marks a workload for compilation because it came to this node or left it.
    fn touch(&mut self, uid: &str) {
        self.pending.policies = true;
        if let Some(name) = self.state.resource_of(uid) {
            self.pending.workloads.insert(name.to_owned());
        }
    }

    async fn update(&mut self, update: Update) -> Result<(), NodeError> {
        let outcome = self.state.apply(&update, &mut self.pending);
        self.seen.insert(update.type_url);
        let problems = self.dataplane.problem_count;
        self.settle().await?;
        match outcome {
            Err(message) => {
                self.dataplane.problem(message.clone());
                update.answer.reject(message);
            }
            Ok(()) if self.dataplane.problem_count > problems => {
                let newest = self.dataplane.unapplied.newest().cloned();
                update.answer.reject(newest.unwrap_or_default());
            }
            Ok(()) => update.answer.accept(),
        }
        Ok(())
    }

    /// Puts pending changes into effect, if all is known, and lets workloads start whose rules are in place.
    async fn settle(&mut self) -> Result<(), NodeError> {
        let known = self.seen.len() == 2 || self.connection.borrow().synced;
        if !known || !self.snapshot_done {
            return Ok(());
        }
        let changes = std::mem::take(&mut self.pending);
        self.dataplane.apply(&self.state, &changes);
        self.dns.update(&self.state, &changes);
        self.protect(&changes)?;
        let takes_over = !*self.settled.borrow();
        if takes_over {
            self.dataplane.reconcile()?;
            self.micro_proxy.forget_unclaimed(&self.starter).await?;
            self.dns.forget_unclaimed(&self.starter).await?;
            self.dns.open()?;
            self.dataplane.kernel.attach()?;
            self.settled.send_replace(true);
            // Rules may have changed while no agent was there to act on it.
            self.connections.sweep(Scope::ALL);
            tracing::info!(
                workloads = self.state.workloads.len(),
                services = self.state.services.len(),
                policies = self.state.policies.len(),
                "policy is in the kernel"
            );
        }
        self.connections.sweep(self.dataplane.take_forbidden());
        let ready: Vec<String> = self
            .dataplane
            .locals()
            .map(|local| &local.enrolled.uid)
            .filter(|uid| !self.announced.contains(*uid))
            .filter(|uid| self.state.pod(uid).is_some() && self.dataplane.has_rules(uid))
            .cloned()
            .collect();
        for uid in ready {
            self.announced.insert(uid.clone());
            self.starter
                .send(&FromAgent::WorkloadReady { uid }, &[])
                .await?;
        }
        if takes_over {
            self.starter.send(&FromAgent::TakenOver, &[]).await?;
        }
        Ok(())
    }

    /// Tells the micro proxy which policies protect this node's workloads.
    fn protect(&mut self, changes: &Changes) -> Result<(), NodeError> {
        if !changes.policies && changes.workloads.is_empty() {
            return Ok(());
        }
        let locals: Vec<String> = self
            .dataplane
            .locals()
            .map(|local| local.enrolled.uid.clone())
            .collect();
        for uid in locals {
            let Some(workload) = self.state.pod(&uid) else {
                continue;
            };
            let touched = changes.policies
                || self
                    .state
                    .resource_of(&uid)
                    .is_some_and(|name| changes.workloads.contains(name));
            // Half of the policies would let in what the other half forbids: those that are in force stay so.
            if !touched || !self.state.has_policies_of(workload) {
                continue;
            }
            let policies = self.state.policies_of(workload);
            self.micro_proxy.set_policies(&uid, policies)?;
        }
        Ok(())
    }

    fn answer(&self, command: Command) {
        // Who asked may have gone away.
        match command {
            Command::Status(reply) => drop(reply.send(self.status())),
            Command::Explain(question, reply) => {
                drop(reply.send(explain::explain(
                    &self.state,
                    &self.dataplane,
                    &self.config,
                    &question,
                )));
            }
        }
    }
}

type Enrolment = Result<(ToAgent, Vec<OwnedFd>), NodeError>;

/// Messages from the starter, until it is gone.
fn receive(starter: Arc<Stream>) -> mpsc::Receiver<Enrolment> {
    let (sender, receiver) = mpsc::channel(ENROLL_QUEUE);
    tokio::spawn(async move {
        while let Some(message) = starter.recv().await.transpose() {
            let broken = message.is_err();
            if sender.send(message.map_err(NodeError::from)).await.is_err() || broken {
                break;
            }
        }
    });
    receiver
}
