//! A control plane over a real folder, with real subscribers on its socket.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use api::{
    mesh::MeshConfig,
    pod::{PodPhase, PodSpec, PodStatus},
};
use control::{
    CaConfig, ControlConfig, ControlError, ControlPlane, ControlStatus, ObjectState, check,
};
use prost::Message;
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use xds::{
    client::{Client, ClientConfig, Update},
    proto::{
        ADDRESS_TYPE, AUTHORIZATION_TYPE,
        workload::{Address, Workload, WorkloadStatus, address::Type},
    },
};

const DEADLINE: Duration = Duration::from_secs(10);
/// Shorter than the time between readings without an event (5 s): within this, only an event helps.
const AT_ONCE: Duration = Duration::from_secs(3);
const WEB: &str = "Kubernetes//Pod/default/web-0";

#[tokio::test]
async fn reports_reach_the_nodes_and_edits_the_runtime() {
    let mesh = Mesh::start(&[("web.yaml", &(workload("web", "replicas: 1") + SERVICE))]).await;
    let mut node = Node::start(&mesh, "n1");
    node.synced().await;
    assert!(
        node.addresses
            .contains_key("default/web.default.svc.cluster.local")
    );
    assert!(!node.addresses.contains_key(WEB));

    mesh.control.report(running("default/web-0", "n1"));
    node.until(|node| {
        node.workload(WEB)
            .is_some_and(|web| web.status() == WorkloadStatus::Healthy)
    })
    .await;
    mesh.control.report(PodStatus {
        phase: PodPhase::Terminating,
        ..running("default/web-0", "n1")
    });
    node.until(|node| {
        node.workload(WEB)
            .is_some_and(|web| web.options().unwrap().draining)
    })
    .await;
    mesh.control.forget("default/web-0");
    node.until(|node| node.workload(WEB).is_none()).await;

    mesh.write("web.yaml", &(workload("web", "replicas: 3") + SERVICE));
    mesh.pods(|pods| pods.len() == 3).await;
    mesh.write("db.yml", &workload("db", ""));
    mesh.pods(|pods| pods.iter().any(|pod| pod.name == "db-0"))
        .await;
    // As editors do it: write beside, rename over.
    fs::write(mesh.path(".web.yaml.swp"), workload("web", "replicas: 2")).unwrap();
    fs::rename(mesh.path(".web.yaml.swp"), mesh.path("web.yaml")).unwrap();
    mesh.pods(|pods| pods.len() == 3).await;
    node.until(|node| {
        !node
            .addresses
            .contains_key("default/web.default.svc.cluster.local")
    })
    .await;
    fs::remove_file(mesh.path("db.yml")).unwrap();
    mesh.pods(|pods| pods.len() == 2).await;
}

#[tokio::test]
async fn a_new_folder_is_watched_too() {
    let mesh = Mesh::start(&[]).await;
    fs::create_dir(mesh.path("team")).unwrap();
    mesh.write("team/web.yaml", &workload("web", ""));
    mesh.pods(|pods| pods.len() == 1).await;
    fs::remove_dir_all(mesh.path("team")).unwrap();
    mesh.pods(Vec::is_empty).await;
}

#[tokio::test]
async fn a_mistake_keeps_the_last_good_version_and_is_reported_with_its_place() {
    let mesh = Mesh::start(&[
        ("web.yaml", &workload("web", "")),
        ("db.yaml", &workload("db", "")),
    ])
    .await;
    let mut problems = mesh.control.problems();
    mesh.write("web.yaml", &workload("web", "replicas: many"));
    let seen = timeout(DEADLINE, problems.wait_for(has_error))
        .await
        .unwrap()
        .unwrap()
        .clone();
    let error = seen
        .iter()
        .find(|problem| problem.field == "spec.replicas")
        .unwrap();
    assert_eq!(
        (error.line, error.file.as_path()),
        (6, mesh.path("web.yaml").as_path())
    );
    assert_eq!(mesh.control.pods().borrow().len(), 2);
    assert_eq!(state(&mesh.control.status(), "web"), ObjectState::LastGood);
    // The other file still applies.
    mesh.write("db.yaml", &workload("db", "replicas: 2"));
    mesh.pods(|pods| pods.len() == 3).await;
    mesh.write("web.yaml", &workload("web", "replicas: 2"));
    mesh.pods(|pods| pods.len() == 4).await;
    assert_eq!(state(&mesh.control.status(), "web"), ObjectState::Accepted);
    assert!(!has_error(&mesh.control.problems().borrow()));
}

#[tokio::test]
async fn status_says_on_how_many_nodes_an_object_is_live() {
    let mesh = Mesh::start(&[("web.yaml", &(workload("web", "") + SERVICE))]).await;
    assert_eq!(live_on(&mesh.control.status()), (0, 2));
    let mut one = Node::start(&mesh, "n1");
    one.synced().await;
    mesh.status(|status| live_on(status) == (1, 2)).await;
    let mut two = Node::start(&mesh, "n2");
    two.synced().await;
    mesh.status(|status| live_on(status) == (2, 2)).await;

    // A change is live where it was accepted, and not where it was rejected.
    mesh.write(
        "web.yaml",
        &(workload("web", "") + &SERVICE.replace("port: 80", "port: 81")),
    );
    let update = two.next().await;
    assert_eq!(update.type_url, ADDRESS_TYPE);
    update.answer.reject("no room");
    one.until(|node| node.updates_seen > 2).await;
    let status = mesh
        .status(|status| live_on(status) == (1, 2) && status.nodes[1].last_error.is_some())
        .await;
    assert_eq!(status.nodes[1].last_error.as_deref(), Some("no room"));
    assert_eq!(
        status.nodes[1].rejected,
        ["default/web.default.svc.cluster.local"]
    );
    drop(one);
    mesh.status(|status| live_on(status) == (0, 2) && !status.nodes[0].connected)
        .await;
    let json = serde_json::to_string(&mesh.control.status()).unwrap();
    let again: ControlStatus = serde_json::from_str(&json).unwrap();
    assert_eq!(again, mesh.control.status());
}

#[tokio::test]
async fn nodes_catch_up_with_a_control_plane_that_was_away() {
    let mut mesh = Mesh::start(&[("web.yaml", &(workload("web", "") + SERVICE))]).await;
    let mut node = Node::start(&mesh, "n1");
    node.synced().await;
    let before = node.addresses.clone();
    let vip = before["default/web.default.svc.cluster.local"].clone();
    mesh.write("api.yaml", &SERVICE.replace("web", "api"));
    mesh.restart().await;
    node.until(|node| node.addresses.len() == 2).await;
    assert_eq!(
        node.addresses["default/web.default.svc.cluster.local"], vip,
        "the same address as before"
    );
}

#[tokio::test]
async fn a_missing_folder_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder.path().join("nowhere"), folder.path());
    let error = ControlPlane::start(config).await.unwrap_err();
    assert!(matches!(&error, ControlError::Source { .. }));
    assert!(
        error.to_string().contains("nowhere cannot be read"),
        "{error}"
    );
}

#[test]
fn check_reads_without_running() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.yaml"), workload("web", "") + SERVICE).unwrap();
    fs::write(folder.path().join("b.yaml"), workload("db", "replica: 2")).unwrap();
    let report = check(folder.path(), &MeshConfig::default());
    assert_eq!(
        (report.files, report.objects.len(), report.errors()),
        (2, 2, 1)
    );
    let error = report
        .problems
        .iter()
        .find(|problem| problem.field == "spec.replica")
        .unwrap();
    assert!(error.to_string().contains("b.yaml:6:"), "{error}");
}

const SERVICE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
";

fn workload(name: &str, more: &str) -> String {
    format!(
        "apiVersion: heddle.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec:\n  command: [sleep]\n  {more}\n"
    )
}

fn running(uid: &str, node: &str) -> PodStatus {
    PodStatus {
        uid: uid.into(),
        node: node.into(),
        addresses: vec![
            "10.244.0.2".parse().unwrap(),
            "fd10:244::2".parse().unwrap(),
        ],
        phase: PodPhase::Running,
        ready: true,
        restarts: 0,
        message: None,
    }
}

fn has_error(problems: &Arc<Vec<api::problem::Problem>>) -> bool {
    problems
        .iter()
        .any(|problem| problem.severity == api::problem::Severity::Error)
}

fn state(status: &ControlStatus, workload: &str) -> ObjectState {
    let object = status
        .objects
        .iter()
        .find(|one| one.object.kind == "Workload" && one.object.name == workload);
    object.unwrap().state
}

fn live_on(status: &ControlStatus) -> (usize, usize) {
    let service = status
        .objects
        .iter()
        .find(|object| object.object.kind == "Service")
        .unwrap();
    (service.live_on, service.nodes)
}

fn config(source: &Path, run: &Path) -> ControlConfig {
    ControlConfig {
        source_dir: source.to_owned(),
        mesh: MeshConfig::default(),
        nodes: vec!["n1".into(), "n2".into()],
        xds_socket: run.join("xds.sock"),
        system_pods: vec![],
        ca: CaConfig::new(run.join("ca")),
    }
}

struct Mesh {
    source: TempDir,
    run: TempDir,
    control: ControlPlane,
}

impl Mesh {
    async fn start(files: &[(&str, &str)]) -> Self {
        let (source, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, text) in files {
            fs::write(source.path().join(name), text).unwrap();
        }
        let control = ControlPlane::start(config(source.path(), run.path()))
            .await
            .unwrap();
        Self {
            source,
            run,
            control,
        }
    }

    async fn restart(&mut self) {
        let config = config(self.source.path(), self.run.path());
        // The old one must be gone before the new one can have the socket.
        let placeholder = ControlPlane::start(ControlConfig {
            xds_socket: self.run.path().join("other.sock"),
            system_pods: vec![],
            ca: CaConfig::new(self.run.path().join("other-ca")),
            ..config.clone()
        });
        let old = std::mem::replace(&mut self.control, placeholder.await.unwrap());
        old.shutdown().await;
        self.control = ControlPlane::start(config).await.unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.source.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    async fn pods(&self, what: impl Fn(&Vec<PodSpec>) -> bool) {
        let mut pods: watch::Receiver<Arc<Vec<PodSpec>>> = self.control.pods();
        let found = timeout(AT_ONCE, pods.wait_for(|pods| what(pods))).await;
        assert!(
            found.is_ok(),
            "pods stayed {:?}",
            self.control.pods().borrow()
        );
    }

    /// Status is made on demand, so it is asked for until it is as expected.
    async fn status(&self, what: impl Fn(&ControlStatus) -> bool) -> ControlStatus {
        let poll = async {
            loop {
                let status = self.control.status();
                if what(&status) {
                    return status;
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        let found = timeout(DEADLINE, poll).await;
        found.unwrap_or_else(|_| panic!("status stayed {:#?}", self.control.status()))
    }
}

/// A subscriber that keeps what it is sent.
struct Node {
    client: Client,
    updates: mpsc::Receiver<Update>,
    addresses: BTreeMap<String, Type>,
    updates_seen: usize,
}

impl Node {
    fn start(mesh: &Mesh, name: &str) -> Self {
        let (client, updates) = Client::start(ClientConfig {
            socket: mesh.run.path().join("xds.sock"),
            node: name.into(),
            node_id: name.into(),
            types: vec![AUTHORIZATION_TYPE.into(), ADDRESS_TYPE.into()],
        });
        Self {
            client,
            updates,
            addresses: BTreeMap::new(),
            updates_seen: 0,
        }
    }

    async fn synced(&mut self) {
        self.until(|node| node.updates_seen >= 2).await;
        timeout(DEADLINE, self.client.synced()).await.unwrap();
    }

    async fn until(&mut self, what: impl Fn(&Self) -> bool) {
        while !what(self) {
            let update = self.next().await;
            if update.type_url == ADDRESS_TYPE {
                for name in &update.removed {
                    self.addresses.remove(name);
                }
                for upsert in update.upserts {
                    let address = Address::decode(upsert.body).unwrap().r#type.unwrap();
                    self.addresses.insert(upsert.name, address);
                }
            }
            update.answer.accept();
            self.updates_seen += 1;
        }
    }

    async fn next(&mut self) -> Update {
        timeout(DEADLINE, self.updates.recv())
            .await
            .unwrap()
            .unwrap()
    }

    fn workload(&self, name: &str) -> Option<&Workload> {
        match self.addresses.get(name)? {
            Type::Workload(workload) => Some(workload),
            Type::Service(_) => panic!("{name} is a service"),
        }
    }
}
