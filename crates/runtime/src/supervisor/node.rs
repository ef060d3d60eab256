//! What a node consists of besides its network: cgroups, folders, the enrolment server and the agent.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex},
};

use api::node_config::NodeConfig;
use linux::{cgroup::Cgroup, netns::Netns};
use tokio::sync::watch;

use super::{RuntimeConfig, lock};
use crate::{
    agent::{Agent, AgentSpec, AgentState},
    enroll::EnrollServer,
    error::{During, Error},
    fabric::NodeNetwork,
    logs::Log,
};

#[derive(Debug)]
pub(super) struct NodeRuntime {
    pub(super) network: Arc<NodeNetwork>,
    pub(super) enroll: Arc<EnrollServer>,
    agent_state: watch::Receiver<AgentState>,
    agent_log: Log,
    agent: Mutex<Option<Agent>>,
}

impl NodeRuntime {
    /// Starts the node's agent. `host` is the namespace from which the machine's resolver is reachable.
    pub(super) fn start(
        config: &RuntimeConfig,
        network: &Arc<NodeNetwork>,
        host: &Netns,
    ) -> Result<Self, Error> {
        let layout = &config.layout;
        let node = network.name();
        let cgroup = Cgroup::create(layout.node_cgroup(node))?;
        for name in ["l7", "w"] {
            cgroup.child(name)?;
        }
        for folder in [layout.state_dir(node), layout.pin_dir(node)] {
            fs::create_dir_all(&folder).during(|| format!("create {}", folder.display()))?;
        }
        let enroll = EnrollServer::start(
            &layout.enroll_socket(node),
            node,
            host.clone(),
            Arc::clone(&config.authority.tokens),
        )?;
        // Whoever looks in from a workload is of any user.
        let identity = layout.identity_dir(node);
        fs::create_dir_all(&identity)
            .and_then(|()| fs::set_permissions(&identity, fs::Permissions::from_mode(0o755)))
            .during(|| format!("create {}", identity.display()))?;
        let agent = Agent::start(AgentSpec {
            executable: config.executable.clone(),
            config: NodeConfig {
                mesh: config.mesh.clone(),
                node: node.into(),
                xds_socket: layout.control_socket(),
                enroll_socket: layout.enroll_socket(node),
                api_socket: layout.agent_socket(node),
                identity_socket: layout.identity_socket(node),
                pin_dir: layout.pin_dir(node),
                state_dir: layout.state_dir(node),
                cgroup: cgroup.path().into(),
                dns_upstream: config.dns_upstream.clone(),
                maps: config.maps.clone(),
                authority: config.authority.config.clone(),
            },
            config_path: layout.agent_config(node),
            netns: network.netns().clone(),
            cgroup: cgroup.child("agent")?,
            log: Log::open(layout.agent_log(node))?,
            taken_over: enroll.taken_over(),
            leaving: enroll.leaving(),
        })?;
        Ok(Self {
            network: Arc::clone(network),
            enroll,
            agent_state: agent.state(),
            agent_log: agent.log().clone(),
            agent: Mutex::new(Some(agent)),
        })
    }

    pub(super) fn agent_state(&self) -> watch::Receiver<AgentState> {
        self.agent_state.clone()
    }

    pub(super) fn agent_log(&self) -> Log {
        self.agent_log.clone()
    }

    pub(super) async fn stop(&self) {
        let agent = lock(&self.agent).take();
        if let Some(agent) = agent {
            agent.stop().await;
        }
    }
}
