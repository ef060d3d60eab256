//! A workload of this node as the workers see it: who it is, which policies protect it, and what it proves itself with.
//! The agent's loop swaps the latter two; whoever handles a connection takes what is there at that moment.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use api::enroll::EnrolledWorkload;
use arc_swap::ArcSwapOption;
use identity::SpiffeId;
use linux::netns::Netns;
use tokio::{sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use xds::proto::security::Authorization;

use super::{
    credentials::Credentials,
    delivery::Spare,
    open::{Listed, OpenConnections},
};
use crate::{
    names::WorkloadNames,
    policy::{Client, Judgement},
};

/// How long a connection waits for the workload's first certificate.
const CERTIFICATE_PATIENCE: Duration = Duration::from_secs(5);

/// A workload of this node.
#[derive(Debug)]
pub(crate) struct LocalWorkload {
    /// The kernel's number for it.
    pub(crate) id: u32,
    /// `NAMESPACE/POD`.
    pub(crate) uid: String,
    pub(crate) names: WorkloadNames,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) netns: Netns,
    /// `None` until the control plane has said which.
    policies: ArcSwapOption<Vec<(String, Arc<Authorization>)>>,
    credentials: watch::Receiver<Option<Arc<Credentials>>>,
    pub(crate) open: Arc<OpenConnections>,
    /// What the tunnel's other end is told of it (W3C Baggage; the keys are Istio's).
    pub(crate) baggage: String,
    /// Everything that is carried for it.
    pub(crate) tasks: TaskTracker,
    /// Sockets made ahead, by worker.
    pub(crate) spare: Vec<Mutex<Spare>>,
    /// Cancelled when it is to stop soon: its tunnels say that they take no more.
    pub(crate) drain: CancellationToken,
    /// Cancelled when it is gone.
    pub(crate) stop: CancellationToken,
}

/// What names a workload.
pub(crate) struct Who {
    pub(crate) id: u32,
    pub(crate) names: WorkloadNames,
    pub(crate) identity: SpiffeId,
}

impl LocalWorkload {
    pub(crate) fn new(
        who: Who,
        enrolled: &EnrolledWorkload,
        netns: Netns,
        credentials: watch::Receiver<Option<Arc<Credentials>>>,
        workers: usize,
        stop: CancellationToken,
    ) -> Self {
        let Who { id, names, .. } = who;
        Self {
            id,
            uid: enrolled.uid.clone(),
            baggage: format!(
                "k8s.cluster.name=Kubernetes,k8s.namespace.name={},k8s.deployment.name={},service.name={}",
                names.namespace, names.workload, names.workload
            ),
            names,
            addresses: enrolled.addresses.clone(),
            netns,
            policies: ArcSwapOption::empty(),
            credentials,
            open: Arc::default(),
            spare: (0..workers).map(|_| Mutex::default()).collect(),
            tasks: TaskTracker::new(),
            drain: CancellationToken::new(),
            stop,
        }
    }

    /// What the workload proves itself with. Waits a moment for the first: a workload may be quicker than its certificate.
    pub(crate) async fn credentials(&self) -> Option<Arc<Credentials>> {
        let mut credentials = self.credentials.clone();
        let known = credentials.wait_for(Option::is_some);
        timeout(CERTIFICATE_PATIENCE, known)
            .await
            .ok()?
            .ok()?
            .clone()
    }

    /// As [`LocalWorkload::credentials`], if there are any now.
    pub(crate) fn credentials_now(&self) -> Option<Arc<Credentials>> {
        self.credentials.borrow().clone()
    }

    /// Puts other policies in force, and ends what they forbid.
    pub(crate) fn set_policies(&self, policies: Vec<(String, Arc<Authorization>)>) {
        let policies = Arc::new(policies);
        self.policies.store(Some(Arc::clone(&policies)));
        self.open.judge(&policies);
    }

    /// Whether a client may connect to a port; if so, the connection is on the list of open ones.
    pub(crate) fn admit(
        &self,
        client: Client,
        address: IpAddr,
        port: u16,
    ) -> (Listed, Option<Judgement>) {
        let listed = self.open.add(client, address, port);
        // On the list first: policies that are swapped meanwhile look at it there.
        let policies = self.policies.load();
        let judgement = policies
            .as_ref()
            .map(|policies| listed.connection.judge(policies));
        (listed, judgement)
    }

    /// Runs something with a worker's spare sockets.
    pub(crate) fn with_spare<T>(&self, worker: usize, work: impl FnOnce(&mut Spare) -> T) -> T {
        let spare = &self.spare[worker % self.spare.len()];
        // Only that worker's thread comes here: it never waits.
        work(&mut spare.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
