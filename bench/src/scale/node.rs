//! One node as `heddle up` makes it, and this program in the places of its control plane and its starter: the
//! agent is the real one, what it is told is ours to choose and to time.
//!
//! All of it lies in a run folder and a cgroup of its own; the guardian removes them even if this program is killed.

use std::{
    fs::{self, File},
    net::IpAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use api::{
    enroll::EnrolledWorkload,
    mesh::MeshConfig,
    node_config::{AuthorityConfig, NodeConfig},
};
use identity::{
    authority::{Authority, AuthorityConfig as CaConfig},
    ca_api::CA_PORT,
};
use kernel::PinnedMaps;
use linux::{cgroup::Cgroup, netns::Netns, place::Placement};
use runtime::{
    claim::Claim,
    enroll::{EnrollServer, Enrolment},
    fabric::{Fabric, NodeNetwork, PodNetwork},
    layout::Layout,
};
use tokio::sync::watch;
use xds::{
    cache::{Cache, Change},
    proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE},
    server::Server,
};

use super::objects::{NAMESPACE, NODE};

/// Longest wait for anything that the agent should do.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at what is waited for: the error of a measured time.
const LOOK: Duration = Duration::from_micros(20);
/// How much of the agent's log is shown when it fails.
const LOG_TAIL: usize = 2000;

/// The running node. Dropping it removes it.
pub(super) struct Node {
    // Dropped in this order: who is served before what serves.
    agent: Child,
    server: Server,
    enroll: Arc<EnrollServer>,
    network: Arc<NodeNetwork>,
    _fabric: Fabric,
    runtime: tokio::runtime::Runtime,
    cache: Cache,
    layout: Layout,
    claim: Option<Claim>,
}

/// A change on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pushed {
    started: Instant,
    generation: u64,
}

/// A place for processes that is a workload to the agent.
pub(super) struct Pod {
    pub(super) name: String,
    network: PodNetwork,
    cgroup: Cgroup,
    enrolment: watch::Receiver<Enrolment>,
}

impl Pod {
    /// IPv4 first, then IPv6.
    pub(super) fn addresses(&self) -> [IpAddr; 2] {
        self.network.addresses
    }

    /// Makes `command` a process of the workload. It is killed with this program's thread.
    pub(super) fn contain(&self, command: &mut Command) -> anyhow::Result<()> {
        Placement::new()
            .cgroup(self.cgroup.path())?
            .netns(&self.network.netns)
            .dies_with_parent()
            .apply(command);
        Ok(())
    }
}

impl Node {
    /// Starts the agent; `first` is what the mesh consists of at that time.
    pub(super) fn start(heddle: &Path, mesh: &str, first: Vec<Change>) -> anyhow::Result<Self> {
        let layout = Layout::new(mesh)?;
        let claim = Claim::take(&layout, "heddle-bench direct-scale", heddle)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let config = MeshConfig {
            name: mesh.into(),
            ..MeshConfig::default()
        };
        let cache = Cache::new();
        cache.apply(first);
        let fabric = runtime.block_on(Fabric::create(&config, &[NODE.to_owned()]))?;
        let network = Arc::clone(fabric.node(NODE).context("the fabric lacks its node")?);
        let cgroup = Cgroup::create(layout.node_cgroup(NODE))?;
        for name in ["l7", "w"] {
            cgroup.child(name)?;
        }
        let log = layout.agent_log(NODE);
        let logs = log.parent().context("the log has no folder")?.to_owned();
        for folder in [
            layout.state_dir(NODE),
            layout.pin_dir(NODE),
            layout.identity_dir(NODE),
            logs,
        ] {
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let mut server = Server::new(cache.clone());
        runtime.block_on(server.listen_unix(&layout.control_socket()))?;
        let host = Netns::current()?;
        let entered = runtime.enter();
        // Nobody signs certificates here: nothing is measured that needs one.
        let enroll = EnrollServer::start(
            &layout.enroll_socket(NODE),
            NODE,
            host,
            Arc::new(|_| String::new()),
        )?;
        drop(entered);
        let authority = AuthorityConfig {
            address: (config.control_addresses()[0], CA_PORT).into(),
            roots: Authority::generate(CaConfig::new(&config.trust_domain))?.roots_pem(),
        };
        let config = NodeConfig {
            authority,
            mesh: config,
            node: NODE.into(),
            xds_socket: layout.control_socket(),
            enroll_socket: layout.enroll_socket(NODE),
            api_socket: layout.agent_socket(NODE),
            identity_socket: layout.identity_socket(NODE),
            pin_dir: layout.pin_dir(NODE),
            state_dir: layout.state_dir(NODE),
            cgroup: cgroup.path().into(),
            dns_upstream: Vec::new(),
            maps: api::map_sizes::MapSizes::default(),
        };
        let config_path = layout.agent_config(NODE);
        fs::write(&config_path, serde_json::to_vec_pretty(&config)?)?;
        let output = File::create(&log)?;
        let mut command = Command::new(heddle);
        command
            .args(["node", "--config"])
            .arg(&config_path)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        Placement::new()
            .cgroup(cgroup.child("agent")?.path())?
            .netns(network.netns())
            .apply(&mut command);
        let node = Self {
            agent: command.spawn().context("cannot start heddle node")?,
            server,
            enroll,
            network,
            _fabric: fabric,
            runtime,
            cache,
            layout,
            claim: Some(claim),
        };
        let everything = Pushed {
            started: Instant::now(),
            generation: node.cache.generation(),
        };
        node.acknowledged(everything)?;
        Ok(node)
    }

    /// Makes a workload's place and announces it to the agent.
    pub(super) fn add_pod(&self, name: &str) -> anyhow::Result<Pod> {
        let pod = Cgroup::create(self.layout.pod_cgroup(NODE, NAMESPACE, name))?;
        let cgroup = pod.child("app")?;
        pod.child("proxy")?;
        let network = self.runtime.block_on(self.network.attach())?;
        let workload = EnrolledWorkload {
            uid: format!("{NAMESPACE}/{name}"),
            namespace: NAMESPACE.into(),
            name: name.into(),
            workload: name.into(),
            service_account: name.into(),
            addresses: network.addresses.to_vec(),
            cgroup: pod.path().into(),
            host_ifindex: network.host_ifindex,
            mac: network.mac,
            instance: network.netns.cookie()?.to_string(),
        };
        Ok(Pod {
            name: name.into(),
            enrolment: self.enroll.add(workload, network.netns.clone()),
            network,
            cgroup,
        })
    }

    /// Returns when the agent has let all of `pods` start.
    pub(super) fn ready(&self, pods: &[Pod]) -> anyhow::Result<()> {
        let is_ready = |pod: &Pod| *pod.enrolment.borrow() == Enrolment::Ready;
        self.wait("let the workloads start", || pods.iter().all(is_ready))
    }

    /// Sends changes to the agent.
    pub(super) fn push(&self, changes: impl IntoIterator<Item = Change>) -> Pushed {
        let changes: Vec<Change> = changes.into_iter().collect();
        let started = Instant::now();
        let generation = self.cache.apply(changes);
        Pushed {
            started,
            generation,
        }
    }

    /// Waits for the agent's acknowledgement. Returns the time from the push.
    pub(super) fn acknowledged(&self, pushed: Pushed) -> anyhow::Result<Duration> {
        let types = [ADDRESS_TYPE, AUTHORIZATION_TYPE];
        self.wait("acknowledge", || {
            self.server
                .clients()
                .iter()
                .any(|client| types.iter().all(|of| client.has(of, pushed.generation)))
        })?;
        let elapsed = pushed.started.elapsed();
        for state in self
            .server
            .clients()
            .iter()
            .flat_map(|client| &client.types)
        {
            if let Some(error) = &state.last_error {
                bail!("the agent rejected {}: {error}", state.type_url);
            }
        }
        Ok(elapsed)
    }

    /// Waits until the kernel's tables show the change. Returns the time from the push.
    pub(super) fn in_the_kernel(
        &self,
        pushed: Pushed,
        shown: impl FnMut() -> bool,
    ) -> anyhow::Result<Duration> {
        self.wait("put a change into the kernel", shown)?;
        Ok(pushed.started.elapsed())
    }

    /// The kernel's tables.
    pub(super) fn maps(&self) -> anyhow::Result<PinnedMaps> {
        Ok(PinnedMaps::open(&self.layout.pin_dir(NODE))?)
    }

    /// The agent's resident memory in bytes.
    pub(super) fn agent_memory(&self) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.agent.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        let kilobytes: u64 = kilobytes.context("the agent's status does not say VmRSS")?;
        Ok(kilobytes * 1024)
    }

    fn wait(&self, what: &str, mut done: impl FnMut() -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            if Instant::now() > deadline {
                let log = fs::read(self.layout.agent_log(NODE)).unwrap_or_default();
                let tail = &log[log.len().saturating_sub(LOG_TAIL)..];
                bail!(
                    "the agent did not {what} within {PATIENCE:?}; its log ends with:\n{}",
                    String::from_utf8_lossy(tail)
                );
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Whatever cannot be ended here is killed with its cgroup below.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        if let Some(claim) = self.claim.take()
            && let Err(error) = claim.release()
        {
            eprintln!("{error}");
        }
    }
}
