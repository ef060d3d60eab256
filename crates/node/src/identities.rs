//! The identities of this node's workloads: certificates from the control plane, kept by [`identity::Keeper`], and the
//! socket on which workloads get their own (SPIFFE Workload API and SDS).
//!
//! The listening socket outlives the agent in the starter's store: who connects while no agent runs, waits.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::PermissionsExt as _, net::UnixListener},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use api::{
    enroll::{EnrolledWorkload, FromAgent},
    node_config::NodeConfig,
    report::{Certificate, CertificateState},
};
use futures::FutureExt as _;
use identity::{
    Keeper, KeeperConfig, SpiffeId,
    attest::{Caller, KernelAttestor, Workloads},
    socket::{self, Hooks, Limits, Refusal},
};
use linux::seqpacket::Stream;
use telemetry::Registry;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

use crate::NodeError;

/// The name that the listening socket is stored under.
const STORED: &str = "identity-socket";
/// Join tokens that were asked for and wait to be used: there is one certificate to get with them.
const TOKEN_QUEUE: usize = 1;

/// The node's identities.
pub(crate) struct Identities {
    pub(crate) keeper: Keeper,
    /// Where join tokens go that the starter sends.
    tokens: mpsc::Sender<String>,
    workloads: Workloads,
    /// By uid: cgroup and identity.
    callers: BTreeMap<String, (PathBuf, Caller)>,
    attestor: Arc<KernelAttestor>,
    hooks: Hooks,
    path: PathBuf,
    stored: Option<OwnedFd>,
    stop: CancellationToken,
    serving: bool,
}

impl Identities {
    /// Begins with what an earlier agent kept. What proves this agent to the control plane the first time comes from
    /// the starter.
    pub(crate) fn start(
        config: &NodeConfig,
        starter: &Arc<Stream>,
        registry: &Registry,
    ) -> Result<Self, NodeError> {
        let (sender, tokens) = mpsc::channel(TOKEN_QUEUE);
        let tokens = Arc::new(Mutex::new(tokens));
        let starter = Arc::clone(starter);
        let keeper = Keeper::start(KeeperConfig {
            trust_domain: config.mesh.trust_domain.clone(),
            node: config.node.clone(),
            control: config.authority.address,
            netns: None,
            roots: config.authority.roots.clone(),
            state_dir: config.state_dir.join("identity"),
            join_token: Arc::new(move || {
                let (starter, tokens) = (Arc::clone(&starter), Arc::clone(&tokens));
                async move {
                    let mut tokens = tokens.lock().await;
                    // One that came too late for an earlier wish.
                    while tokens.try_recv().is_ok() {}
                    let wish = starter.send(&FromAgent::JoinTokenWanted, &[]).await;
                    wish.map_err(|error| error.to_string())?;
                    let token = tokens.recv().await;
                    token.ok_or_else(|| "the starter is gone".to_owned())
                }
                .boxed()
            }),
            lifetime: None,
        })?;
        let workloads = Workloads::default();
        let attestor = KernelAttestor::new(workloads.clone()).map_err(|error| NodeError::Io {
            action: "find the cgroups of callers".into(),
            source: io::Error::other(error),
        })?;
        let refusals = registry.counter_family(
            "heddle_identity_refused_total",
            "Refusals of the identity socket, by reason",
            Refusal::ALL.len(),
        )?;
        let hooks = Hooks::new(move |refusal| {
            let labels = [("reason", refusal.as_str().to_owned())];
            refusals.get(&labels).inc();
        });
        Ok(Self {
            keeper,
            tokens: sender,
            workloads,
            callers: BTreeMap::new(),
            attestor: Arc::new(attestor),
            hooks,
            path: config.identity_socket.clone(),
            stored: None,
            stop: CancellationToken::new(),
            serving: false,
        })
    }

    /// Takes back a descriptor that an earlier agent stored; gives it back if it is not of this kind.
    pub(crate) fn restore(&mut self, name: &str, fd: OwnedFd) -> Option<OwnedFd> {
        if name != STORED {
            return Some(fd);
        }
        self.stored = Some(fd);
        None
    }

    /// The starter's answer to the wish for a token.
    pub(crate) fn token(&self, token: String) {
        // One that nobody waits for expires.
        let _ = self.tokens.try_send(token);
    }

    /// A workload has come: its certificate is fetched now, and its processes get it on the socket.
    pub(crate) fn want(
        &mut self,
        workload: &EnrolledWorkload,
        id: &SpiffeId,
    ) -> Result<(), NodeError> {
        let before = self.callers.get(&workload.uid);
        if let Some((_, caller)) = before.filter(|(_, caller)| caller.id != *id) {
            self.keeper.release(&caller.id, &workload.uid);
        }
        self.keeper.want(id, &workload.uid)?;
        let caller = Caller {
            uid: workload.uid.as_str().into(),
            id: id.clone(),
        };
        let of_workload = (workload.cgroup.clone(), caller);
        self.callers.insert(workload.uid.clone(), of_workload);
        self.workloads.replace(self.callers.values().cloned());
        Ok(())
    }

    /// A workload is gone.
    pub(crate) fn release(&mut self, uid: &str) {
        if let Some((_, caller)) = self.callers.remove(uid) {
            self.workloads.replace(self.callers.values().cloned());
            self.keeper.release(&caller.id, uid);
        }
    }

    /// Serves the socket, once it is known whether an earlier agent left one.
    pub(crate) async fn serve(&mut self, starter: &Stream) -> Result<(), NodeError> {
        if self.serving {
            return Ok(());
        }
        self.serving = true;
        let listener = match self.stored.take() {
            Some(fd) if self.path.exists() => UnixListener::from(fd),
            _ => {
                let failed = NodeError::io(format!("listen on {}", self.path.display()));
                let listener = bind(&self.path).map_err(failed)?;
                let name = STORED.to_owned();
                let message = FromAgent::StoreFd { name };
                starter.send(&message, &[listener.as_fd()]).await?;
                listener
            }
        };
        let served = socket::serve(
            listener,
            Arc::clone(&self.attestor) as _,
            Arc::new(self.keeper.clone()),
            Limits::default(),
            self.hooks.clone(),
            self.stop.clone(),
        );
        tokio::spawn(async move {
            if let Err(error) = served.await {
                tracing::error!(%error, "workloads get no identities any more");
            }
        });
        Ok(())
    }

    /// Lets a successor serve the socket.
    pub(crate) fn leave(&self) {
        self.stop.cancel();
    }

    /// For `heddle certs`.
    pub(crate) fn certificates(&self) -> Vec<Certificate> {
        self.keeper.status()
    }

    /// What is wrong with certificates, for `heddle status`. That there is none yet is not.
    pub(crate) fn problems(&self) -> impl Iterator<Item = String> {
        let bad = self.keeper.status().into_iter().filter(|status| {
            matches!(
                status.state,
                CertificateState::Stale | CertificateState::Refused
            )
        });
        bad.map(|status| {
            format!(
                "the certificate of {} cannot be renewed: {}",
                status.identity,
                status.last_error.unwrap_or_default()
            )
        })
    }
}

/// Any process of a workload may connect: who it is, the kernel says.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}
