//! The fair baseline: plain TCP between processes that are contained exactly as a mesh's workloads are (cgroups as deep,
//! namespaces, root, seccomp, entered by `exec`), with none of Heddle's eBPF attached. What lies between it
//! and [`super::plain`] is the price of containment; what lies between it and the mesh is Heddle's own.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use api::mesh::MeshConfig;
use linux::{cgroup::Cgroup, netns::Netns};
use runtime::{
    claim::Claim,
    container::{
        Container, ContainerSpec,
        spec::{InitSpec, ProgramSpec},
    },
    exec::{self, ExecSpec, ExecTarget},
    layout::Layout,
};

use super::{
    Side, mesh,
    plain::{Network, SERVER_ADDRESS},
};
use crate::scenario::{Ends, PORT};

/// Claimed like a mesh, so that it is cleaned up like one; it has no agent and no control plane.
const MESH: &str = "bench-plain";
const NODE: &str = "node";
const NAMESPACE: &str = "bench";
/// How long the server may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// The running baseline. Dropping it removes it.
pub(super) struct Contained {
    // Before the claim is released, or they would be killed by surprise.
    containers: Vec<Container>,
    client: ExecTarget,
    heddle: PathBuf,
    ends: Ends,
    claim: Option<Claim>,
    _network: Network,
    runtime: tokio::runtime::Runtime,
}

impl Contained {
    /// Starts a server, and an idle program in the client's place. Returns when the server listens.
    pub(super) fn start(heddle: &Path, ends: &Ends) -> anyhow::Result<Self> {
        let layout = Layout::new(MESH)?;
        let claim = Claim::take(&layout, "heddle-bench direct", heddle)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let network = Network::create()?;
        let mut contained = Self {
            containers: Vec::new(),
            client: target("client", 0, PathBuf::new()),
            heddle: heddle.to_owned(),
            ends: ends.clone(),
            claim: Some(claim),
            _network: network.clone(),
            runtime,
        };
        let server = std::iter::once(ends.program.display().to_string())
            .chain(ends.server_arguments())
            .collect();
        let idle = mesh::IDLE_PROGRAM.map(str::to_owned).to_vec();
        let log = layout.pod_log(NAMESPACE, "server");
        contained.add(&layout, "server", server, &network.server, &log)?;
        let deadline = Instant::now() + PATIENCE;
        while !fs::read_to_string(&log)?.contains("listening") {
            ensure!(
                Instant::now() < deadline,
                "the contained server did not start"
            );
            thread::sleep(Duration::from_millis(5));
        }
        let log = layout.pod_log(NAMESPACE, "client");
        contained.client = contained.add(&layout, "client", idle, &network.client, &log)?;
        Ok(contained)
    }

    fn add(
        &mut self,
        layout: &Layout,
        name: &str,
        command: Vec<String>,
        netns: &Netns,
        log: &Path,
    ) -> anyhow::Result<ExecTarget> {
        let scratch = layout.pod_scratch(NAMESPACE, name);
        let logs = log.parent().context("the log has no folder")?;
        for folder in [scratch.as_path(), logs] {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let cgroup = Cgroup::create(layout.pod_cgroup(NODE, NAMESPACE, name))?.child("app")?;
        let container = self.runtime.block_on(Container::start(ContainerSpec {
            executable: self.heddle.clone(),
            init: InitSpec {
                hostname: name.into(),
                addresses: Vec::new(),
                scratch,
                identity: None,
                nameserver: MeshConfig::default().dns_v4(),
                search: Vec::new(),
                files: BTreeMap::new(),
                program: program(command),
            },
            cgroup: &cgroup,
            cgroup_v1: Vec::new(),
            netns,
            output: File::create(log)?.into(),
            inherit: Vec::new(),
        }))?;
        let target = target(name, container.pid(), cgroup.path().to_owned());
        self.containers.push(container);
        Ok(target)
    }
}

impl Side for Contained {
    fn client(&self, arguments: &[String]) -> anyhow::Result<Output> {
        let command = std::iter::once(self.ends.program.display().to_string())
            .chain(arguments.iter().cloned())
            .collect();
        let spec = ExecSpec {
            target: self.client.clone(),
            program: program(command),
        };
        exec::command(&self.heddle, &spec)?
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()
            .context("cannot run the contained client")
    }

    fn target(&self) -> String {
        format!("{SERVER_ADDRESS}:{PORT}")
    }
}

impl Drop for Contained {
    fn drop(&mut self) {
        self.containers.clear();
        if let Some(claim) = self.claim.take()
            && let Err(error) = claim.release()
        {
            eprintln!("{error}");
        }
    }
}

fn target(name: &str, pid: u32, cgroup: PathBuf) -> ExecTarget {
    ExecTarget {
        uid: format!("{NAMESPACE}/{name}"),
        hostname: name.into(),
        pid,
        cgroup,
        cgroup_v1: Vec::new(),
    }
}

fn program(command: Vec<String>) -> ProgramSpec {
    ProgramSpec {
        command,
        env: BTreeMap::new(),
        user: None,
        working_dir: None,
    }
}
