//! The supervisor: makes what runs what should run.
//!
//! [`Runtime`] is the handle that `heddle up` holds. It owns the fabric, one [`node`] per node and one task
//! per pod ([`pod`]), which takes the pod through its life on its own; they share [`Shared`].
//! [`Runtime::sync`] only tells the tasks what is wanted.

mod node;
mod place;
mod pod;
mod status;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use api::{
    mesh::MeshConfig,
    node_config::AuthorityConfig,
    pod::{PodSpec, PodStatus},
};
use linux::{
    cgroup::{Cgroup, limits::Hierarchies},
    netns::Netns,
};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::timeout,
};

use self::{node::NodeRuntime, pod::PodHandle, status::Statuses};
use crate::{
    agent::AgentState,
    enroll::JoinTokens,
    error::{During, Error},
    exec::ExecSpec,
    fabric::Fabric,
    layout::{Layout, check_label},
    logs::Log,
    publish::{
        self, PublishedPort,
        listeners::{PortError, PublishListeners},
    },
};

/// Pods that are being made at a time; more would only make each other wait.
const STARTS_AT_A_TIME: usize = 16;
/// At shutdown, the longest that programs may take to end by themselves.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
/// At shutdown, the longest that all of it may take; what is left then is for `cleanup`.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(20);

/// What a runtime is started from.
#[derive(Debug, Clone)]
pub struct RuntimeConfig {
    /// The mesh.
    pub mesh: MeshConfig,
    /// Its paths. The run folder must be there ([`crate::claim::Claim`]).
    pub layout: Layout,
    /// Names of the nodes, DNS labels.
    pub nodes: Vec<String>,
    /// The `heddle` program, for its `init`, `node` and `publish-relay` subcommands: usually `/proc/self/exe`.
    pub executable: PathBuf,
    /// Name servers for names outside the mesh (`ADDRESS` or `ADDRESS:PORT`); empty for the machine's own.
    pub dns_upstream: Vec<String>,
    /// Room in the kernel's maps, on every node.
    pub maps: api::map_sizes::MapSizes,
    /// Where agents get certificates.
    pub authority: Authority,
    /// How long a pod that is to stop goes on serving, while the mesh learns to send it no more connections.
    pub drain: Duration,
}

/// The mesh's certificate authority, for agents.
#[derive(Clone)]
pub struct Authority {
    /// How agents find it.
    pub config: AuthorityConfig,
    /// How they prove themselves to it.
    pub tokens: JoinTokens,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.config.fmt(f)
    }
}

/// The running standalone runtime. Call [`Runtime::shutdown`] before dropping it.
#[derive(Debug)]
pub struct Runtime {
    shared: Arc<Shared>,
    wanted: Mutex<Wanted>,
    /// Tasks are started on it, whatever thread asks for them.
    tokio: tokio::runtime::Handle,
}

#[derive(Debug, Default)]
struct Wanted {
    pods: Vec<Arc<PodSpec>>,
    relay: bool,
    stopping: bool,
}

/// What the pods' tasks share.
#[derive(Debug)]
struct Shared {
    config: RuntimeConfig,
    hierarchies: Hierarchies,
    top: Cgroup,
    fabric: Fabric,
    nodes: BTreeMap<String, NodeRuntime>,
    pods: Mutex<BTreeMap<String, PodHandle>>,
    /// How many pods there are, for who waits for the last to go.
    count: watch::Sender<usize>,
    statuses: Statuses,
    starts: Semaphore,
    listeners: Mutex<PublishListeners>,
    /// Set at shutdown: draining is pointless then, and grace is cut short.
    hurry: watch::Sender<bool>,
}

impl Runtime {
    /// Makes the fabric and starts the nodes' agents. Needs a multi-threaded tokio runtime.
    ///
    /// # Errors
    /// Missing rights, bad names, ranges that are too small.
    pub async fn start(config: RuntimeConfig) -> Result<Self, Error> {
        for node in &config.nodes {
            check_label("node", node)?;
        }
        let host = Netns::current().during(|| "open this process's network namespace".into())?;
        let fabric = Fabric::create(&config.mesh, &config.nodes).await?;
        let top = Cgroup::create(config.layout.cgroup())?;
        let mut nodes = BTreeMap::new();
        for name in &config.nodes {
            let network = fabric.node(name).ok_or_else(|| unknown("node", name))?;
            nodes.insert(name.clone(), NodeRuntime::start(&config, network, &host)?);
        }
        let shared = Shared {
            hierarchies: Hierarchies::find(config.layout.cgroup_mount().into())?,
            config,
            top,
            fabric,
            nodes,
            pods: Mutex::default(),
            count: watch::Sender::new(0),
            statuses: Statuses::default(),
            starts: Semaphore::new(STARTS_AT_A_TIME),
            listeners: Mutex::new(PublishListeners::new(host)),
            hurry: watch::Sender::new(false),
        };
        Ok(Self {
            shared: Arc::new(shared),
            wanted: Mutex::default(),
            tokio: tokio::runtime::Handle::current(),
        })
    }

    /// These pods should run, and no others. Returns at once; [`Runtime::statuses`] tells what comes of it.
    pub fn sync(&self, pods: Vec<PodSpec>) {
        let mut wanted = lock(&self.wanted);
        wanted.pods = pods.into_iter().map(Arc::new).collect();
        self.apply(&wanted);
    }

    /// What all pods do, as it changes. The publish relay's pod is among them while ports are published.
    #[must_use]
    pub fn statuses(&self) -> watch::Receiver<BTreeMap<String, PodStatus>> {
        self.shared.statuses.watch()
    }

    /// Publishes these ports on the host's loopback, and no others. The answer names those that cannot be.
    pub fn publish(&self, ports: &[PublishedPort]) -> Vec<PortError> {
        let errors = lock(&self.shared.listeners).set(ports);
        let mut wanted = lock(&self.wanted);
        wanted.relay = ports.len() > errors.len();
        self.apply(&wanted);
        errors
    }

    /// A pod's program to run a command beside: everything but the command is filled in.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::NotRunning`].
    pub fn exec_spec(&self, uid: &str) -> Result<ExecSpec, Error> {
        let pods = lock(&self.shared.pods);
        let pod = pods.get(uid).ok_or_else(|| unknown("pod", uid))?;
        pod.exec_spec().ok_or_else(|| Error::NotRunning {
            uid: uid.into(),
            phase: self.shared.statuses.phase(uid),
        })
    }

    /// What a pod has written, from the beginning of what is kept; with `follow`, also what it will write.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn logs(&self, uid: &str, follow: bool) -> Result<mpsc::Receiver<Vec<u8>>, Error> {
        let _entered = self.tokio.enter();
        let pods = lock(&self.shared.pods);
        let pod = pods.get(uid).ok_or_else(|| unknown("pod", uid))?;
        Ok(pod.log().read(follow))
    }

    /// How a node's agent stands.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn agent(&self, node: &str) -> Result<watch::Receiver<AgentState>, Error> {
        let node = self
            .shared
            .nodes
            .get(node)
            .ok_or_else(|| unknown("node", node))?;
        Ok(node.agent_state())
    }

    /// What a node's agent has written.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn agent_log(&self, node: &str) -> Result<Log, Error> {
        let node = self
            .shared
            .nodes
            .get(node)
            .ok_or_else(|| unknown("node", node))?;
        Ok(node.agent_log())
    }

    /// The fabric and the nodes' networks.
    #[must_use]
    pub fn fabric(&self) -> &Fabric {
        &self.shared.fabric
    }

    /// Stops all pods, then the agents. What does not end in time is killed. Files and cgroups are left to `cleanup`.
    pub async fn shutdown(&self) {
        self.shared.hurry.send_replace(true);
        drop(lock(&self.shared.listeners).set(&[]));
        {
            let mut wanted = lock(&self.wanted);
            *wanted = Wanted {
                stopping: true,
                ..Wanted::default()
            };
            self.apply(&wanted);
        }
        let mut count = self.shared.count.subscribe();
        let gone = timeout(SHUTDOWN_PATIENCE, count.wait_for(|count| *count == 0)).await;
        if gone.is_err() {
            tracing::warn!("pods are left after {SHUTDOWN_PATIENCE:?} and are killed");
        }
        for node in self.shared.nodes.values() {
            node.stop().await;
        }
    }

    fn apply(&self, wanted: &Wanted) {
        let _entered = self.tokio.enter();
        let relay = wanted.relay.then(|| self.relay()).flatten();
        let pods = if wanted.stopping {
            &[][..]
        } else {
            &wanted.pods
        };
        let specs: BTreeMap<&str, &Arc<PodSpec>> = pods
            .iter()
            .chain(&relay)
            .filter(|spec| self.is_sound(spec))
            .map(|spec| (spec.uid.as_str(), spec))
            .collect();
        let known: BTreeSet<String> = lock(&self.shared.pods).keys().cloned().collect();
        for uid in known.iter().filter(|uid| !specs.contains_key(uid.as_str())) {
            self.shared.want(uid, None);
        }
        for (uid, spec) in specs {
            self.shared.want(uid, Some(spec));
        }
    }

    fn relay(&self) -> Option<Arc<PodSpec>> {
        let node = self.shared.config.nodes.first()?;
        Some(Arc::new(publish::relay_pod(node)))
    }

    /// Control gives well-formed names; one that is not must not become a path.
    fn is_sound(&self, spec: &PodSpec) -> bool {
        let checked = check_label("namespace", &spec.namespace)
            .and_then(|()| check_label("pod", &spec.name))
            .and_then(|()| {
                let same = spec.uid == format!("{}/{}", spec.namespace, spec.name);
                same.then_some(()).ok_or_else(|| Error::BadName {
                    what: "uid",
                    name: spec.uid.clone(),
                })
            })
            .and_then(|()| {
                let node = self.shared.nodes.get(&spec.node);
                node.map(drop).ok_or_else(|| unknown("node", &spec.node))
            });
        if let Err(error) = &checked {
            tracing::error!(uid = spec.uid, %error, "pod is not run");
        }
        checked.is_ok()
    }
}

impl Shared {
    /// Tells a pod's task what is wanted of it; starts the task if there is none.
    fn want(self: &Arc<Self>, uid: &str, spec: Option<&Arc<PodSpec>>) {
        let mut pods = lock(&self.pods);
        match (pods.get(uid), spec) {
            (Some(pod), spec) => pod.want(spec.cloned()),
            (None, Some(spec)) => {
                let log = Log::open(self.config.layout.pod_log(&spec.namespace, &spec.name));
                match log {
                    Ok(log) => {
                        pods.insert(uid.into(), PodHandle::start(self, spec, log));
                    }
                    Err(error) => tracing::error!(uid, %error, "pod is not run"),
                }
            }
            (None, None) => {}
        }
        self.count.send_replace(pods.len());
    }

    /// Ends a pod's task, unless the pod is wanted again meanwhile.
    fn forget(&self, uid: &str) -> bool {
        let mut pods = lock(&self.pods);
        if pods.get(uid).is_some_and(PodHandle::is_wanted) {
            return false;
        }
        if let Some(pod) = pods.remove(uid) {
            pod.log().remove();
        }
        self.statuses.remove(uid);
        self.count.send_replace(pods.len());
        true
    }
}

fn unknown(what: &'static str, name: &str) -> Error {
    Error::Unknown {
        what,
        name: name.into(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
