//! The running control plane: the tasks around the engine, and the handle that others hold.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use api::{
    mesh::MeshConfig,
    pod::{PodSpec, PodStatus},
    problem::Problem,
};
use linux::netns::Netns;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
};
use xds::{
    cache::Cache,
    server::{Server, ServerError},
};

use crate::{
    ca::{CaConfig, CaError, CaStatus, CertificateAuthority, JoinTokenError},
    engine::{Engine, Outputs},
    publish::PublishedPort,
    source::{self, Scan, watch::Watch},
    status::{self, ControlStatus},
};

/// What a control plane is started with.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// The folder with the objects.
    pub source_dir: PathBuf,
    /// Settings of the mesh.
    pub mesh: MeshConfig,
    /// Names of the nodes; replicas are placed on these.
    pub nodes: Vec<String>,
    /// Where xDS is served.
    pub xds_socket: PathBuf,
    /// Heddle's own replicas: not in the folder and not asked for here, but part of the mesh once they are reported.
    pub system_pods: Vec<PodSpec>,
    /// The certificate authority.
    pub ca: CaConfig,
}

/// Why a control plane does not start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The folder is not there or cannot be listed.
    #[error("the objects in {} cannot be read: it {reason}; name a folder with YAML files", path.display())]
    Source {
        /// The folder, or one below it.
        path: PathBuf,
        /// The system's answer.
        reason: String,
    },
    /// The xDS server does not start.
    #[error("the control plane cannot serve its nodes: {0}")]
    Server(#[from] ServerError),
    /// The certificate authority does not start or listen.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A task of the control plane broke.
    #[error("the folder's reader ended abnormally; this is a defect of Heddle")]
    Reader,
}

/// A running control plane. It stops when this is dropped; the nodes keep working on what they have.
#[derive(Debug)]
pub struct ControlPlane {
    nodes: Vec<String>,
    cache: Cache,
    server: Server,
    outputs: Outputs,
    reports: Arc<Reports>,
    ca: CertificateAuthority,
    tasks: Tasks,
}

/// Tasks that end when this is dropped.
#[derive(Debug)]
struct Tasks(Vec<JoinHandle<()>>);

/// Reports on their way to the engine: the newest per replica, so that a burst costs no more than there are replicas.
#[derive(Debug, Default)]
struct Reports {
    newest: Mutex<HashMap<String, Option<PodStatus>>>,
    arrived: Notify,
}

impl ControlPlane {
    /// Reads the folder, compiles what it holds, and then serves it: a node's first answer is complete.
    ///
    /// Objects that are wrong are no reason not to start; they are among [`Self::problems`].
    ///
    /// # Errors
    /// The folder cannot be listed, or the xDS socket cannot be bound.
    pub async fn start(config: ControlConfig) -> Result<Self, ControlError> {
        let folder = config.source_dir.clone();
        let watch = Watch::start(&folder);
        let scan = tokio::task::spawn_blocking(move || source::scan(&folder))
            .await
            .map_err(|_| ControlError::Reader)?;
        if let (true, Some((path, reason))) = (scan.files.is_empty(), scan.incomplete.first()) {
            return Err(ControlError::Source {
                path: path.clone(),
                reason: reason.clone(),
            });
        }
        let (cache, outputs) = (Cache::new(), Outputs::default());
        let placed = Arc::clone(&outputs.placed);
        let ca = CertificateAuthority::open(&config.ca, &config.mesh.trust_domain, placed)?;
        let mut engine = Engine::new(
            config.mesh,
            config.nodes.clone(),
            config.system_pods,
            cache.clone(),
            outputs.clone(),
        );
        engine.apply_scan(&scan);
        let mut server = Server::new(cache.clone());
        server.listen_unix(&config.xds_socket).await?;
        let reports = Arc::new(Reports::default());
        // One: a newer state of the folder makes an older one worthless, so the reader may wait.
        let (scan_sender, scans) = mpsc::channel(1);
        let tasks = Tasks(vec![
            tokio::spawn(watch.follow(scan, scan_sender)),
            tokio::spawn(drive(engine, scans, Arc::clone(&reports))),
        ]);
        Ok(Self {
            nodes: config.nodes,
            cache,
            server,
            outputs,
            reports,
            ca,
            tasks,
        })
    }

    /// Makes the certificate authority reachable on addresses inside a network namespace (port
    /// [`identity::ca_api::CA_PORT`] by custom); the answer is what was bound.
    ///
    /// # Errors
    /// A socket is refused.
    pub fn listen_on(
        &self,
        netns: &Netns,
        addresses: &[SocketAddr],
    ) -> Result<Vec<SocketAddr>, ControlError> {
        Ok(self.ca.listen_on(netns, addresses)?)
    }

    /// A token with which a node's agent joins: good once, for five minutes.
    ///
    /// # Errors
    /// The mesh has no such node; too many tokens are out.
    pub fn join_token(&self, node: &str) -> Result<String, JoinTokenError> {
        if !self.nodes.iter().any(|known| known == node) {
            return Err(JoinTokenError::UnknownNode);
        }
        self.ca.tokens().issue(node)
    }

    /// The roots (PEM) that an agent trusts when it first joins.
    #[must_use]
    pub fn roots_pem(&self) -> String {
        self.ca.authority().roots_pem()
    }

    /// What the certificate authority has signed and refused.
    #[must_use]
    pub fn ca_status(&self) -> CaStatus {
        self.ca.status()
    }

    /// The certificate authority, to rotate its root for example.
    #[must_use]
    pub fn ca(&self) -> &CertificateAuthority {
        &self.ca
    }

    /// The replicas that should run, each on its node.
    #[must_use]
    pub fn pods(&self) -> watch::Receiver<Arc<Vec<PodSpec>>> {
        self.outputs.pods.subscribe()
    }

    /// The ports that should be open on the host's loopback, and where each leads.
    #[must_use]
    pub fn published(&self) -> watch::Receiver<Arc<Vec<PublishedPort>>> {
        self.outputs.published.subscribe()
    }

    /// What is wrong or doubtful with the objects now, by file and line.
    #[must_use]
    pub fn problems(&self) -> watch::Receiver<Arc<Vec<Problem>>> {
        self.outputs.problems.subscribe()
    }

    /// The runtime's word on a replica. One that is told to go should be reported as terminating until it is gone, so that its
    /// connections can drain. Reports on replicas that are not known are ignored.
    pub fn report(&self, status: PodStatus) {
        self.reports.add(status.uid.clone(), Some(status));
    }

    /// The replica is gone: its namespace, and so its addresses, are no more.
    pub fn forget(&self, uid: &str) {
        self.reports.add(uid.to_owned(), None);
    }

    /// Every object and how far it has come.
    #[must_use]
    pub fn status(&self) -> ControlStatus {
        let view = Arc::clone(&self.outputs.view.borrow());
        status::status(
            &view,
            &self.nodes,
            &self.server.clients(),
            self.cache.generation(),
        )
    }

    /// Stops serving and watching.
    pub async fn shutdown(self) {
        let Self {
            server, ca, tasks, ..
        } = self;
        drop(tasks);
        ca.shutdown().await;
        server.shutdown().await;
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Feeds the engine until the reader of the folder is gone.
async fn drive(mut engine: Engine, mut scans: mpsc::Receiver<Scan>, reports: Arc<Reports>) {
    loop {
        tokio::select! {
            scan = scans.recv() => match scan {
                Some(scan) => engine.apply_scan(&scan),
                None => return,
            },
            () = reports.arrived.notified() => engine.apply_reports(reports.take()),
        }
    }
}

impl Reports {
    fn add(&self, uid: String, report: Option<PodStatus>) {
        self.lock().insert(uid, report);
        self.arrived.notify_one();
    }

    fn take(&self) -> HashMap<String, Option<PodStatus>> {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Option<PodStatus>>> {
        // A map of whole reports is never half changed.
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
