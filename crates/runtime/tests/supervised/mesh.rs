//! A mesh for one test, and short ways to ask for pods and to wait for what becomes of them.

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use api::{
    mesh::MeshConfig,
    node_config::AuthorityConfig,
    pod::{PodSpec, PodStatus, Probe, ProbeAction, Resources, RestartPolicy},
};
use runtime::{
    claim::Claim,
    layout::Layout,
    supervisor::{Authority, Runtime, RuntimeConfig},
};

const PATIENCE: Duration = Duration::from_secs(20);
static NEXT: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Mesh {
    tokio: tokio::runtime::Runtime,
    runtime: Runtime,
    claim: Claim,
    layout: Layout,
}

impl Mesh {
    pub(crate) fn start(nodes: usize) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("test-{}-{number}", std::process::id());
        let layout = Layout::new(&name).unwrap();
        let claim = Claim::take(&layout, "test", "/proc/self/exe".as_ref()).unwrap();
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let config = RuntimeConfig {
            mesh: MeshConfig {
                name,
                ..MeshConfig::default()
            },
            layout: layout.clone(),
            nodes: (1..=nodes).map(|number| format!("node-{number}")).collect(),
            executable: "/proc/self/exe".into(),
            dns_upstream: Vec::new(),
            maps: api::map_sizes::MapSizes::default(),
            authority: Authority {
                config: AuthorityConfig {
                    address: ([127, 0, 0, 1], 9).into(),
                    roots: String::new(),
                },
                tokens: Arc::new(|node| format!("token of {node}")),
            },
            drain: Duration::from_millis(50),
        };
        let runtime = tokio.block_on(Runtime::start(config)).unwrap();
        Self {
            tokio,
            runtime,
            claim,
            layout,
        }
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Ends the mesh; nothing of it is left.
    pub(crate) fn end(self) {
        self.tokio.block_on(self.runtime.shutdown());
        assert_eq!(self.statuses(), BTreeMap::new());
        drop(self.runtime);
        drop(self.tokio);
        self.claim.release().unwrap();
        let paths = [
            self.layout.run_dir().to_path_buf(),
            self.layout.cgroup(),
            self.layout.lock(),
        ];
        assert!(!paths.iter().any(|path| path.exists()), "{paths:?}");
    }

    pub(crate) fn sync(&self, pods: Vec<PodSpec>) {
        self.runtime.sync(pods);
    }

    pub(crate) fn statuses(&self) -> BTreeMap<String, PodStatus> {
        self.runtime.statuses().borrow().clone()
    }

    pub(crate) fn until_all(&self, mut holds: impl FnMut(&BTreeMap<String, PodStatus>) -> bool) {
        let mut statuses = self.runtime.statuses();
        let waited = self.tokio.block_on(async {
            tokio::time::timeout(PATIENCE, statuses.wait_for(|all| holds(all)))
                .await
                .map(drop)
        });
        waited.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {:#?}", self.statuses()));
    }

    pub(crate) fn until(&self, uid: &str, holds: impl Fn(&PodStatus) -> bool) -> PodStatus {
        let mut found = None;
        self.until_all(|all| {
            found = all.get(uid).filter(|status| holds(status)).cloned();
            found.is_some()
        });
        found.unwrap()
    }

    pub(crate) fn until_gone(&self, uid: &str) {
        self.until_all(|all| !all.contains_key(uid));
    }

    pub(crate) fn log(&self, uid: &str) -> String {
        let mut receiver = self.runtime.logs(uid, false).unwrap();
        let mut text = Vec::new();
        while let Some(chunk) = receiver.blocking_recv() {
            text.extend(chunk);
        }
        String::from_utf8(text).unwrap()
    }

    pub(crate) fn try_pid(&self, uid: &str) -> Option<u32> {
        Some(self.runtime.exec_spec(uid).ok()?.target.pid)
    }

    pub(crate) fn pid(&self, uid: &str) -> u32 {
        self.try_pid(uid).unwrap()
    }

    /// Output and exit code of a shell command inside of a pod.
    pub(crate) fn exec(&self, uid: &str, script: &str) -> (String, i32) {
        let mut spec = self.runtime.exec_spec(uid).unwrap();
        spec.program.command = ["sh", "-c", script].map(String::from).into();
        let mut command: Command =
            runtime::exec::command("/proc/self/exe".as_ref(), &spec).unwrap();
        let output = command.stdout(Stdio::piped()).output().unwrap();
        (
            String::from_utf8(output.stdout).unwrap(),
            output.status.code().unwrap(),
        )
    }
}

pub(crate) fn shell(namespace: &str, name: &str, node: &str, script: &str) -> PodSpec {
    pod(namespace, name, node, &["sh", "-c", script])
}

pub(crate) fn pod(namespace: &str, name: &str, node: &str, command: &[&str]) -> PodSpec {
    PodSpec {
        uid: format!("{namespace}/{name}"),
        name: name.into(),
        namespace: namespace.into(),
        workload: name.into(),
        service_account: "default".into(),
        node: node.into(),
        labels: BTreeMap::new(),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        env: BTreeMap::new(),
        user: None,
        working_dir: None,
        files: BTreeMap::new(),
        ports: Vec::new(),
        readiness: None,
        liveness: None,
        resources: Resources::default(),
        restart_policy: RestartPolicy::Always,
        termination_grace: Duration::from_secs(2),
        template_hash: "one".into(),
    }
}

/// A probe that decides fast.
pub(crate) fn probe(action: ProbeAction) -> Probe {
    Probe {
        action,
        initial_delay: Duration::ZERO,
        period: Duration::from_millis(50),
        timeout: Duration::from_secs(2),
        failure_threshold: 2,
        success_threshold: 1,
    }
}
