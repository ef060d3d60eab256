//! A pod's place: its network, cgroups and folder on a node, and its enrolment with the node's agent.
//! It outlives the containers that are started in it one after the other.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use api::{enroll::EnrolledWorkload, pod::PodSpec};
use linux::cgroup::{
    Cgroup,
    limits::{Applied, AppliedLimits, Limits},
};
use tokio::{sync::watch, task::spawn_blocking, time::timeout};

use super::{Shared, lock, unknown};
use crate::{
    container::{
        Container, ContainerSpec,
        spec::{InitSpec, ProgramSpec},
    },
    enroll::Enrolment,
    error::{During, Error},
    exec::{ExecSpec, ExecTarget},
    fabric::PodNetwork,
    layout::{IDENTITY_FOLDER, IDENTITY_SOCKET},
    logs::Log,
    publish,
};

/// How long the agent may take to close what it has in a pod's network.
const AGENT_PATIENCE: Duration = Duration::from_secs(2);
/// How long killed processes may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Place {
    shared: Arc<Shared>,
    pub(super) node: String,
    pub(super) network: PodNetwork,
    pub(super) enrolment: watch::Receiver<Enrolment>,
    uid: String,
    pod: Cgroup,
    app: Cgroup,
    scratch: PathBuf,
}

impl Place {
    /// Makes the place and announces it to the node's agent.
    pub(super) async fn make(shared: &Arc<Shared>, spec: &PodSpec) -> Result<Self, Error> {
        let node = shared
            .nodes
            .get(&spec.node)
            .ok_or_else(|| unknown("node", &spec.node))?;
        let layout = &shared.config.layout;
        let pod = Cgroup::create(layout.pod_cgroup(&spec.node, &spec.namespace, &spec.name))?;
        let app = pod.child("app")?;
        pod.child("proxy")?;
        let network = node.network.attach().await?;
        // Unlike the uid it never comes again.
        let instance = match network.netns.cookie() {
            Ok(cookie) => cookie.to_string(),
            Err(source) => {
                node.network.release(network).await;
                let what = format!("read the number of the namespace of {}", spec.uid);
                return Err(Error::Io { what, source });
            }
        };
        let workload = EnrolledWorkload {
            uid: spec.uid.clone(),
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            workload: spec.workload.clone(),
            service_account: spec.service_account.clone(),
            addresses: network.addresses.to_vec(),
            cgroup: pod.path().into(),
            host_ifindex: network.host_ifindex,
            mac: network.mac,
            instance,
        };
        Ok(Self {
            enrolment: node.enroll.add(workload, network.netns.clone()),
            shared: Arc::clone(shared),
            node: spec.node.clone(),
            network,
            uid: spec.uid.clone(),
            pod,
            app,
            scratch: layout.pod_scratch(&spec.namespace, &spec.name),
        })
    }

    /// Starts the pod's program in a fresh container. Says which limits could not be applied.
    pub(super) async fn start(
        &self,
        spec: &PodSpec,
        log: &Log,
    ) -> Result<(Container, AppliedLimits), Error> {
        let limits = Limits {
            cpu_millis: spec.resources.cpu_millis,
            memory_bytes: spec.resources.memory_bytes,
        };
        let applied = self
            .shared
            .hierarchies
            .limit(&self.shared.top, &self.app, &limits)?;
        let scratch = self.scratch.clone();
        spawn_blocking(move || emptied(&scratch))
            .await
            .map_err(|error| Error::Container(error.to_string()))??;
        let layout = &self.shared.config.layout;
        let mesh = &self.shared.config.mesh;
        let domain = &mesh.cluster_domain;
        let container = Container::start(ContainerSpec {
            executable: self.shared.config.executable.clone(),
            init: InitSpec {
                hostname: spec.name.clone(),
                addresses: self.network.addresses.to_vec(),
                scratch: self.scratch.clone(),
                identity: Some(layout.identity_dir(&self.node)),
                nameserver: mesh.dns_v4(),
                search: vec![
                    format!("{}.svc.{domain}", spec.namespace),
                    format!("svc.{domain}"),
                    domain.clone(),
                ],
                files: spec.files.clone(),
                program: program(spec),
            },
            cgroup: &self.app,
            cgroup_v1: applied.v1_folders().map(Path::to_path_buf).collect(),
            netns: &self.network.netns,
            output: log.pipe()?,
            inherit: self.inherited()?,
        })
        .await?;
        Ok((container, applied))
    }

    /// How to enter a container of the pod.
    pub(super) fn inside(
        &self,
        spec: &PodSpec,
        container: &Container,
        limits: &AppliedLimits,
    ) -> ExecSpec {
        ExecSpec {
            target: ExecTarget {
                uid: spec.uid.clone(),
                hostname: spec.name.clone(),
                pid: container.pid(),
                cgroup: self.app.path().into(),
                cgroup_v1: limits.v1_folders().map(Path::to_path_buf).collect(),
            },
            program: program(spec),
        }
    }

    /// Says that the pod is to stop soon.
    pub(super) fn drain(&self) {
        if let Some(node) = self.shared.nodes.get(&self.node) {
            node.enroll.drain(&self.uid);
        }
    }

    /// Kills what is left in the pod's cgroups and gives everything back.
    pub(super) async fn clear(self) {
        let Some(node) = self.shared.nodes.get(&self.node) else {
            return;
        };
        let (pod, scratch, hierarchies) = (self.pod, self.scratch, self.shared.hierarchies.clone());
        let removed = spawn_blocking(move || {
            pod.kill()?;
            pod.wait_empty(KILL_PATIENCE)?;
            pod.remove_tree()?;
            hierarchies.remove_v1(pod.path())?;
            remove(&scratch)
        });
        let removed = removed
            .await
            .unwrap_or_else(|error| Err(Error::Container(error.to_string())));
        if let Err(error) = removed {
            tracing::warn!(uid = self.uid, %error, "something of the pod is left");
        }
        // Last: the agent keeps policy in force until no process is left. What it carried to the workload must say goodbye
        // while there is a network to say it over.
        let gone = node.enroll.remove(&self.uid);
        if !*self.shared.hurry.borrow() && timeout(AGENT_PATIENCE, gone).await.is_err() {
            tracing::warn!(
                uid = self.uid,
                "the agent does not let go of the pod's network"
            );
        }
        // At shutdown all namespaces go with this process, at once; one by one takes the kernel some 40 ms each.
        if !*self.shared.hurry.borrow() {
            node.network.release(self.network).await;
        }
    }

    fn inherited(&self) -> Result<Vec<OwnedFd>, Error> {
        if self.uid == publish::RELAY_UID {
            Ok(vec![lock(&self.shared.listeners).new_relay()?])
        } else {
            Ok(Vec::new())
        }
    }
}

/// What a user should know of limits that are not in force.
pub(super) fn complaint(limits: &AppliedLimits) -> Option<String> {
    [("CPU", &limits.cpu), ("memory", &limits.memory)]
        .into_iter()
        .filter(|(_, applied)| matches!(applied, Applied::Unavailable(_)))
        .map(|(name, applied)| format!("{name} limit {applied}"))
        .reduce(|all, one| format!("{all}; {one}"))
}

fn program(spec: &PodSpec) -> ProgramSpec {
    // Where SPIFFE clients look (SPIFFE_Workload_Endpoint, section 4).
    let mut env = spec.env.clone();
    env.entry("SPIFFE_ENDPOINT_SOCKET".into())
        .or_insert_with(|| format!("unix://{IDENTITY_FOLDER}/{IDENTITY_SOCKET}"));
    ProgramSpec {
        command: spec.command.clone(),
        env,
        user: spec.user.clone(),
        working_dir: spec.working_dir.clone(),
    }
}

/// A container starts with nothing of what the one before it wrote.
fn emptied(scratch: &Path) -> Result<(), Error> {
    remove(scratch)?;
    fs::create_dir_all(scratch).during(|| format!("create {}", scratch.display()))
}

fn remove(scratch: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(scratch) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).during(|| format!("remove {}", scratch.display()))
        }
        _ => Ok(()),
    }
}
