//! The node agent as a process: started in its node's namespace and cgroup, and again when it dies.
//!
//! Its death stops no workload: what it attached to the kernel stays, and its descriptors are kept
//! (`enroll`). So it is simply started again: at once if it had taken over, after a growing wait if it
//! died before that.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use api::node_config::NodeConfig;
use linux::{cgroup::Cgroup, netns::Netns, pidfd::PidFd, place::Placement};
use nix::sys::signal::Signal;
use tokio::{
    process::Child,
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::{
    backoff::Backoff,
    error::{During, Error},
    logs::Log,
};

/// How long the agent may take to end by itself.
const GRACE: Duration = Duration::from_secs(5);
/// How long an agent may go on with what it carries when its successor works already.
const LONGEST_LEAVE: Duration = Duration::from_secs(60);
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
const STABLE_RUN: Duration = Duration::from_secs(10);

/// How an agent stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentState {
    /// Its process id, if it runs.
    pub pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
    /// How it ended last.
    pub message: Option<String>,
}

/// What an agent is started from.
#[derive(Debug)]
pub(crate) struct AgentSpec {
    pub(crate) executable: PathBuf,
    pub(crate) config: NodeConfig,
    pub(crate) config_path: PathBuf,
    pub(crate) netns: Netns,
    pub(crate) cgroup: Cgroup,
    pub(crate) log: Log,
    /// Process id of the agent that has everything in force ([`crate::enroll::EnrollServer::taken_over`]).
    pub(crate) taken_over: watch::Receiver<Option<i32>>,
    /// Process id of the agent that makes way for its successor ([`crate::enroll::EnrollServer::leaving`]).
    pub(crate) leaving: watch::Receiver<Option<i32>>,
}

/// Keeps one agent running.
#[derive(Debug)]
pub(crate) struct Agent {
    node: String,
    stop: watch::Sender<bool>,
    state: watch::Receiver<AgentState>,
    task: JoinHandle<()>,
    log: Log,
}

impl Agent {
    /// Writes the agent's settings and starts it. Needs a tokio runtime.
    pub(crate) fn start(spec: AgentSpec) -> Result<Self, Error> {
        let text =
            serde_json::to_vec_pretty(&spec.config).during(|| "the agent's settings".into())?;
        fs::write(&spec.config_path, text)
            .during(|| format!("write {}", spec.config_path.display()))?;
        let (stop, stopping) = watch::channel(false);
        let (state, watched) = watch::channel(AgentState::default());
        Ok(Self {
            node: spec.config.node.clone(),
            stop,
            state: watched,
            log: spec.log.clone(),
            task: tokio::spawn(keep(Arc::new(spec), stopping, state)),
        })
    }

    pub(crate) fn state(&self) -> watch::Receiver<AgentState> {
        self.state.clone()
    }

    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// Ends it for good.
    pub(crate) async fn stop(self) {
        self.stop.send_replace(true);
        if let Err(error) = self.task.await {
            tracing::warn!(node = self.node, %error, "the agent's keeper failed");
        }
    }
}

async fn keep(
    spec: Arc<AgentSpec>,
    mut stopping: watch::Receiver<bool>,
    state: watch::Sender<AgentState>,
) {
    let node = &spec.config.node;
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT, STABLE_RUN);
    loop {
        let started = Instant::now();
        let mut pid = None;
        let message = match spawn(&spec).await {
            Ok(mut child) => {
                pid = child.id();
                state.send_modify(|state| state.pid = pid);
                let mut leaving = spec.leaving.clone();
                tokio::select! {
                    status = child.wait() => match status {
                        Ok(status) => format!("ended with {status}"),
                        Err(error) => error.to_string(),
                    },
                    () = leaves(&mut leaving, pid) => {
                        tokio::spawn(see_off(Arc::clone(&spec), child));
                        "makes way for its successor".to_owned()
                    }
                    () = told(&mut stopping) => return end(&spec, &mut child).await,
                }
            }
            Err(error) => error.to_string(),
        };
        let took_over = pid.is_some_and(|pid| {
            i32::try_from(pid).is_ok_and(|pid| *spec.taken_over.borrow() == Some(pid))
        });
        // An agent that worked is missed; one that never did would only fail again.
        let wait = if took_over {
            backoff.reset();
            Duration::ZERO
        } else {
            backoff.after(started.elapsed())
        };
        tracing::warn!(node, message, ?wait, log = %spec.log.path().display(), "node agent is started again");
        state.send_modify(|state| {
            state.pid = None;
            state.restarts += 1;
            state.message = Some(message);
        });
        tokio::select! {
            () = sleep(wait) => {}
            () = told(&mut stopping) => return,
        }
    }
}

/// Returns when the agent is to end; a keeper that is gone means the same.
async fn told(stopping: &mut watch::Receiver<bool>) {
    drop(stopping.wait_for(|stop| *stop).await);
}

/// Returns when the agent with this process id has said that it leaves.
async fn leaves(leaving: &mut watch::Receiver<Option<i32>>, pid: Option<u32>) {
    let pid = pid.and_then(|pid| i32::try_from(pid).ok());
    let said = leaving.wait_for(|left| left.is_some() && *left == pid);
    if said.await.map(drop).is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits for the end of an agent that makes way; it may finish what it carries, but not for ever.
async fn see_off(spec: Arc<AgentSpec>, mut child: Child) {
    if timeout(LONGEST_LEAVE, child.wait()).await.is_err() {
        tracing::warn!(
            node = spec.config.node,
            "an agent that makes way does not end within {LONGEST_LEAVE:?} and is killed"
        );
        if let Err(error) = child.kill().await {
            tracing::warn!(node = spec.config.node, %error, "it cannot be killed");
        }
    }
}

/// Forking is blocking work.
async fn spawn(spec: &Arc<AgentSpec>) -> Result<Child, Error> {
    let spec = Arc::clone(spec);
    let output = spec.log.pipe()?;
    let spawned = tokio::task::spawn_blocking(move || {
        let failed = || format!("start the agent of node {}", spec.config.node);
        let mut command = Command::new(&spec.executable);
        command
            .arg("node")
            .arg("--config")
            .arg(&spec.config_path)
            .stdin(Stdio::null())
            .stdout(Stdio::from(output.try_clone().during(failed)?))
            .stderr(Stdio::from(output))
            .current_dir("/");
        Placement::new()
            .cgroup(spec.cgroup.path())
            .during(failed)?
            .netns(&spec.netns)
            .apply(&mut command);
        tokio::process::Command::from(command)
            .spawn()
            .during(failed)
    });
    spawned
        .await
        .map_err(|error| Error::Container(error.to_string()))?
}

async fn end(spec: &AgentSpec, child: &mut Child) {
    if let Some(pidfd) = child.id().and_then(|pid| PidFd::open(pid).ok()) {
        // One that has just ended needs no signal.
        let _ = pidfd.signal(Signal::SIGTERM);
    }
    if timeout(GRACE, child.wait()).await.is_err() {
        tracing::warn!(
            node = spec.config.node,
            "node agent does not end within {GRACE:?} and is killed"
        );
    }
    // Also what it started.
    if let Err(error) = spec.cgroup.kill() {
        tracing::warn!(node = spec.config.node, %error, "node agent cannot be killed");
    }
}
