//! From text and reports to what is served, without tasks and files.

use std::{
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use api::pod::{PodPhase, Resources, RestartPolicy};
use prost::Message;
use xds::proto::{
    address_from_bytes,
    workload::{self, Address, address::Type},
};

use super::*;

/// A replica with nothing special about it.
pub(crate) fn pod_spec() -> PodSpec {
    PodSpec {
        uid: "default/web-0".into(),
        name: "web-0".into(),
        namespace: "default".into(),
        workload: "web".into(),
        service_account: "default".into(),
        node: "n1".into(),
        labels: BTreeMap::new(),
        command: vec!["true".into()],
        env: BTreeMap::new(),
        user: None,
        working_dir: None,
        files: BTreeMap::new(),
        ports: Vec::new(),
        readiness: None,
        liveness: None,
        resources: Resources::default(),
        restart_policy: RestartPolicy::Always,
        termination_grace: Duration::from_secs(5),
        template_hash: String::new(),
    }
}

struct Mesh {
    engine: Engine,
    cache: Cache,
    outputs: Outputs,
}

impl Mesh {
    fn new(text: &str) -> Self {
        let (cache, outputs) = (Cache::new(), Outputs::default());
        let nodes = vec!["n1".to_owned(), "n2".to_owned()];
        let engine = Engine::new(
            MeshConfig::default(),
            nodes,
            vec![],
            cache.clone(),
            outputs.clone(),
        );
        let mut mesh = Self {
            engine,
            cache,
            outputs,
        };
        mesh.edit(text);
        mesh
    }

    fn edit(&mut self, text: &str) {
        let files = [(PathBuf::from("mesh.yaml"), Ok(text.to_owned()))].into();
        self.engine.apply_scan(&Scan {
            files,
            incomplete: Vec::new(),
        });
    }

    fn report(&mut self, uid: &str, address: &str, ready: bool, phase: PodPhase) {
        let node = self
            .pods()
            .iter()
            .find(|pod| pod.uid == uid)
            .map_or("n1".into(), |pod| pod.node.clone());
        let status = PodStatus {
            uid: uid.into(),
            node,
            addresses: vec![address.parse().unwrap()],
            phase,
            ready,
            restarts: 0,
            message: None,
        };
        self.engine.apply_reports([(uid.to_owned(), Some(status))]);
    }

    fn run(&mut self, uid: &str, address: &str) {
        self.report(uid, address, true, PodPhase::Running);
    }

    fn pods(&self) -> Arc<Vec<PodSpec>> {
        Arc::clone(&self.outputs.pods.borrow())
    }

    fn problems(&self) -> Vec<String> {
        let problems = self.outputs.problems.borrow();
        problems
            .iter()
            .filter(|problem| problem.severity == Severity::Error)
            .map(ToString::to_string)
            .collect()
    }

    fn workload(&self, uid: &str) -> Option<workload::Workload> {
        match self.address(&format!("Kubernetes//Pod/{uid}"))? {
            Type::Workload(workload) => Some(workload),
            Type::Service(_) => panic!("{uid} is a service"),
        }
    }

    fn service(&self, name: &str) -> Option<workload::Service> {
        match self.address(name)? {
            Type::Service(service) => Some(service),
            Type::Workload(_) => panic!("{name} is a workload"),
        }
    }

    fn vips(&self, name: &str) -> Vec<IpAddr> {
        let service = self.service(name).unwrap();
        service
            .addresses
            .iter()
            .map(|one| address_from_bytes(&one.address).unwrap())
            .collect()
    }

    fn address(&self, name: &str) -> Option<Type> {
        let resource = self.cache.get(ADDRESS_TYPE, name)?;
        Address::decode(resource.body).unwrap().r#type
    }

    fn state(&self, kind: &str, name: &str) -> ObjectState {
        let view = self.outputs.view.borrow();
        view.objects
            .iter()
            .find(|object| object.object == ObjectRef::new(kind, "default", name))
            .unwrap()
            .state
    }
}

fn workload(name: &str, more: &str) -> String {
    format!(
        "---\napiVersion: heddle.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec: {{command: [sleep], {more}}}\n"
    )
}

fn service(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{selector: {{app: {name}}}, {spec}}}\n"
    )
}

const WEB: &str = "default/web.default.svc.cluster.local";

fn ports(workload: &workload::Workload, service: &str) -> Vec<(u32, u32)> {
    let ports = &workload.services[service].ports;
    ports
        .iter()
        .map(|port| (port.service_port, port.target_port))
        .collect()
}

#[test]
fn replicas_become_addresses_once_they_have_some() {
    let text = workload("web", "replicas: 2, serviceAccountName: web, weight: 3")
        + &service("web", "ports: [{port: 80, targetPort: 8080}]");
    let mut mesh = Mesh::new(&text);
    assert_eq!(mesh.problems(), Vec::<String>::new());
    let nodes: Vec<_> = mesh
        .pods()
        .iter()
        .map(|pod| (pod.uid.clone(), pod.node.clone()))
        .collect();
    assert_eq!(
        nodes,
        [
            ("default/web-0".into(), "n1".into()),
            ("default/web-1".into(), "n2".into())
        ]
    );
    assert_eq!(mesh.workload("default/web-0"), None);

    mesh.report("default/web-0", "10.244.0.2", false, PodPhase::Pending);
    let web = mesh.workload("default/web-0").unwrap();
    assert_eq!(
        web.status(),
        workload::WorkloadStatus::Unhealthy,
        "known before it runs, for enrolment"
    );
    mesh.run("default/web-0", "10.244.0.2");
    let web = mesh.workload("default/web-0").unwrap();
    assert_eq!(web.status(), workload::WorkloadStatus::Healthy);
    assert_eq!(
        (web.node.as_str(), web.service_account.as_str()),
        ("n1", "web")
    );
    assert_eq!(
        (web.workload_name.as_str(), web.canonical_name.as_str()),
        ("web", "web")
    );
    assert_eq!((web.hostname.as_str(), web.capacity), ("web-0", Some(3)));
    assert_eq!(web.uid, "Kubernetes//Pod/default/web-0");
    assert_eq!(web.tunnel_protocol(), workload::TunnelProtocol::Hbone);
    assert_eq!(
        web.authorization_policies,
        ["istio-system/istio_converted_static_strict"]
    );
    assert_eq!(web.addresses, [vec![10, 244, 0, 2]]);
    assert_eq!(ports(&web, WEB), [(80, 8080)]);
    assert_eq!(web.options().unwrap().replica_of, "web");
}

#[test]
fn named_ports_are_found_on_each_workload() {
    let both = |name: &str, number: u16, more: &str| {
        workload(
            name,
            &format!("labels: {{app: web}}, ports: [{{name: http, port: {number}}}{more}]"),
        )
    };
    let text = both("new", 8080, ", {name: dns, port: 5353, protocol: UDP}")
        + &both("old", 80, "")
        + &service(
            "web",
            "ports: [{name: web, port: 80, targetPort: http}, {name: dns, port: 53, targetPort: dns, protocol: UDP}]",
        );
    let mut mesh = Mesh::new(&text);
    mesh.run("default/new-0", "10.244.0.2");
    mesh.run("default/old-0", "10.244.0.3");
    assert_eq!(
        ports(&mesh.workload("default/new-0").unwrap(), WEB),
        [(80, 8080), (53, 5353)]
    );
    assert_eq!(
        ports(&mesh.workload("default/old-0").unwrap(), WEB),
        [(80, 80)],
        "it has no such port"
    );
    let service = mesh.service(WEB).unwrap();
    assert_eq!(service.ports[0].target_port, 0, "each workload says");
    let options = service.options().unwrap();
    let protocols: Vec<_> = options
        .port_protocols
        .iter()
        .map(|one| (one.service_port, one.protocol))
        .collect();
    assert_eq!(protocols, [(80, 0), (53, 1)]);
    let names: Vec<_> = options
        .port_names
        .iter()
        .map(|one| (one.service_port, one.name.as_str()))
        .collect();
    assert_eq!(names, [(80, "web"), (53, "dns")]);
}

#[test]
fn services_say_how_they_are_balanced() {
    let text = service("plain", "ports: [{port: 80}]")
        + &service(
            "near",
            "trafficDistribution: PreferSameNode, ports: [{port: 80}]",
        )
        + &service("local", "internalTrafficPolicy: Local, ports: [{port: 80}]")
        + &service(
            "headless",
            "clusterIP: None, publishNotReadyAddresses: true",
        )
        + &service(
            "four",
            "ipFamilies: [IPv4], sessionAffinity: ClientIP, ports: [{port: 80}]",
        );
    let mesh = Mesh::new(&text);
    let get = |name: &str| {
        mesh.service(&format!("default/{name}.default.svc.cluster.local"))
            .unwrap()
    };
    let balancing = |name: &str| {
        get(name)
            .load_balancing
            .map(|one| (one.routing_preference, one.mode))
    };
    assert_eq!(balancing("plain"), None);
    assert_eq!(balancing("near"), Some((vec![4], 2)));
    assert_eq!(balancing("local"), Some((vec![4], 1)));
    let headless = get("headless");
    assert!(headless.addresses.is_empty());
    let options = headless.options().unwrap();
    assert!(options.headless && options.publish_not_ready_addresses);
    assert_eq!(get("plain").ip_families(), workload::IpFamilies::Dual);
    assert_eq!(get("four").ip_families(), workload::IpFamilies::Ipv4Only);
    assert_eq!(
        get("four").options().unwrap().session_affinity_seconds,
        10_800
    );
}

#[test]
fn stopping_replicas_drain_until_they_are_forgotten() {
    let text = |replicas: u32| {
        workload("web", &format!("replicas: {replicas}")) + &service("web", "ports: [{port: 80}]")
    };
    let mut mesh = Mesh::new(&text(2));
    mesh.run("default/web-0", "10.244.0.2");
    mesh.run("default/web-1", "10.244.1.2");
    mesh.edit(&text(1));
    assert_eq!(mesh.pods().len(), 1);
    let draining = |mesh: &Mesh, uid: &str| {
        let workload = mesh.workload(uid).unwrap();
        (
            workload.options().unwrap().draining,
            workload.status() == workload::WorkloadStatus::Healthy,
        )
    };
    assert_eq!(
        draining(&mesh, "default/web-1"),
        (true, false),
        "even before the runtime says so"
    );
    assert_eq!(draining(&mesh, "default/web-0"), (false, true));
    assert_eq!(
        ports(&mesh.workload("default/web-1").unwrap(), WEB),
        [(80, 80)]
    );
    mesh.report("default/web-1", "10.244.1.2", true, PodPhase::Terminating);
    assert_eq!(draining(&mesh, "default/web-1"), (true, false));
    mesh.engine
        .apply_reports([("default/web-1".to_owned(), None)]);
    assert_eq!(mesh.workload("default/web-1"), None);
    // A report that comes too late changes nothing.
    mesh.run("default/web-1", "10.244.1.2");
    assert_eq!(mesh.workload("default/web-1"), None);
    // A restart in place drains too.
    mesh.report("default/web-0", "10.244.0.2", true, PodPhase::Terminating);
    assert_eq!(draining(&mesh, "default/web-0"), (true, false));
}

#[test]
fn labels_and_ports_change_without_a_restart() {
    let hash = |more: &str| {
        Mesh::new(&workload("web", more)).pods()[0]
            .template_hash
            .clone()
    };
    let plain = hash("");
    assert_eq!(
        hash("labels: {a: b}, ports: [{port: 80}], publish: ['8080:80']"),
        plain
    );
    for restart in [
        "args: [x]",
        "env: [{name: A, value: b}]",
        "user: nobody",
        "node: n2",
        "serviceAccountName: web",
    ] {
        assert_ne!(hash(restart), plain, "{restart}");
    }
}

#[test]
fn selectors_put_policies_on_workloads() {
    let policy = |namespace: &str, name: &str, selector: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{selector}}}\n"
        )
    };
    let text = workload("web", "labels: {tier: front}")
        + &policy(
            "default",
            "one",
            "selector: {matchLabels: {app: web, tier: front}}",
        )
        + &policy("default", "other", "selector: {matchLabels: {app: db}}")
        + &policy("default", "wide", "")
        + &policy(
            "istio-system",
            "root",
            "selector: {matchLabels: {tier: front}}",
        )
        + &policy("elsewhere", "far", "selector: {matchLabels: {app: web}}");
    let mut mesh = Mesh::new(&text);
    mesh.run("default/web-0", "10.244.0.2");
    assert_eq!(
        mesh.workload("default/web-0")
            .unwrap()
            .authorization_policies,
        [
            "default/one",
            "istio-system/istio_converted_static_strict",
            "istio-system/root"
        ]
    );
    let mut names: Vec<_> = mesh.cache.names(AUTHORIZATION_TYPE);
    names.sort();
    let expected = [
        "default/one",
        "default/other",
        "default/wide",
        "elsewhere/far",
        "istio-system/istio_converted_static_strict",
        "istio-system/root",
    ];
    assert_eq!(
        names.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
        expected
    );
}

#[test]
fn published_ports_lead_to_a_service_of_their_own() {
    let text = workload("web", "replicas: 2, publish: ['8080:80']")
        + &workload("zz", "publish: ['8080:81', '9090:90']");
    let mut mesh = Mesh::new(&text);
    let published = Arc::clone(&mesh.outputs.published.borrow());
    let key = "heddle-system/publish-default-web.heddle-system.svc.cluster.local";
    assert_eq!(
        published[0],
        PublishedPort {
            host_port: 8080,
            service_vip: mesh.vips(key)[0],
            port: 80,
            protocol: api::pod::Protocol::Tcp,
            workload: "default/web".into(),
        }
    );
    let others: Vec<_> = published[1..]
        .iter()
        .map(|port| (port.host_port, port.workload.as_str()))
        .collect();
    assert_eq!(others, [(9090, "default/zz")], "8080 is taken");
    mesh.run("default/web-1", "10.244.1.2");
    assert_eq!(
        ports(&mesh.workload("default/web-1").unwrap(), key),
        [(80, 80)]
    );
}

#[test]
fn an_address_that_cannot_be_had_leaves_the_service_its_old_one() {
    let text = |b: &str| {
        service("a", "clusterIP: 10.96.0.77, ports: [{port: 80}]")
            + &service("b", &format!("{b}ports: [{{port: 80}}]"))
    };
    let mut mesh = Mesh::new(&text(""));
    let b = "default/b.default.svc.cluster.local";
    let before = mesh.vips(b);
    mesh.edit(&text("clusterIP: 10.96.0.77, "));
    assert_eq!(mesh.vips(b), before);
    let problems = mesh.problems();
    assert_eq!(problems.len(), 1, "said once: {problems:?}");
    assert!(problems[0].contains("10.96.0.77"), "{problems:?}");
}

#[test]
fn a_workload_on_an_unknown_node_is_an_error_with_its_place() {
    let mesh = Mesh::new(&workload("web", "node: n9"));
    let problems = mesh.problems();
    assert!(
        problems[0].starts_with("mesh.yaml:5:")
            && problems[0]
                .contains("spec.node: the mesh has no node `n9` (expected one of n1, n2)"),
        "{problems:?}"
    );
    assert_eq!(mesh.pods().len(), 0);
}

#[test]
fn objects_show_their_state() {
    let mut mesh = Mesh::new(&(workload("web", "") + &workload("bad", "replicas: many")));
    assert_eq!(mesh.state("Workload", "web"), ObjectState::Accepted);
    assert_eq!(mesh.state("Workload", "bad"), ObjectState::Rejected);
    mesh.edit(&(workload("web", "replicas: many") + &workload("bad", "")));
    assert_eq!(mesh.state("Workload", "web"), ObjectState::LastGood);
    assert_eq!(mesh.state("Workload", "bad"), ObjectState::Accepted);
    assert_eq!(mesh.pods().len(), 2);
}

#[test]
fn a_change_touches_only_what_it_affects() {
    let text =
        |env: &str| workload("a", "") + &workload("b", env) + &service("a", "ports: [{port: 80}]");
    let mut mesh = Mesh::new(&text(""));
    mesh.run("default/a-0", "10.244.0.2");
    let before = mesh.cache.generation();
    // Nothing that nodes must know changes with the environment.
    mesh.edit(&text("env: [{name: X, value: y}]"));
    assert_eq!(mesh.cache.generation(), before);
    mesh.run("default/a-0", "10.244.0.2");
    assert_eq!(mesh.cache.generation(), before, "the same report again");
}

#[test]
fn a_large_mesh_compiles_in_well_under_a_second() {
    let mut text = String::new();
    for index in 0..2_000 {
        let name = format!("s{index}");
        text += &workload(&name, "replicas: 5, labels: {mesh: large}");
        text += &service(&name, "ports: [{port: 80, targetPort: 8080}]");
    }
    let mut mesh = Mesh::new(&text);
    let pods = mesh.pods();
    assert_eq!(pods.len(), 10_000);
    for (index, pod) in pods.iter().enumerate() {
        let address = IpAddr::from(0x0af4_0000_u32.wrapping_add(index as u32).to_be_bytes());
        mesh.run_all(pod, address);
    }
    assert_eq!(mesh.cache.names(ADDRESS_TYPE).len(), 12_000);
    let started = Instant::now();
    mesh.engine.rebuild();
    let elapsed = started.elapsed();
    assert!(elapsed < Duration::from_secs(1), "{elapsed:?}");
}

impl Mesh {
    fn run_all(&mut self, pod: &PodSpec, address: IpAddr) {
        let status = PodStatus {
            uid: pod.uid.clone(),
            node: pod.node.clone(),
            addresses: vec![address],
            phase: PodPhase::Running,
            ready: true,
            restarts: 0,
            message: None,
        };
        self.engine.apply_reports([(pod.uid.clone(), Some(status))]);
    }
}

#[test]
fn an_account_counts_where_its_replicas_are_and_where_they_still_run() {
    use crate::ca::Placements as _;

    let text = |node: &str| workload("web", &format!("serviceAccountName: web, node: {node}"));
    let mut mesh = Mesh::new(&(text("n1") + &workload("other", "node: n1")));
    let placed = Arc::clone(&mesh.outputs.placed);
    let runs = |node| placed.runs(node, "default", "web");
    assert!(runs("n1"), "before it runs: it needs its identity to begin");
    assert!(!runs("n2") && !placed.runs("n1", "else", "web"));
    assert_eq!(placed.accounts("n1", 9), ["default/default", "default/web"]);
    assert_eq!(placed.accounts("n1", 1), ["default/default"]);
    mesh.run("default/web-0", "10.244.0.2");
    mesh.edit(&text("n2"));
    assert!(runs("n2") && runs("n1"), "it drains where it was");
    mesh.run("default/web-0", "10.244.1.2");
    assert!(runs("n2") && !runs("n1"));
    assert_eq!(placed.accounts("n1", 9), Vec::<String>::new());
    mesh.edit("");
    assert!(runs("n2"), "until it is gone");
    mesh.engine
        .apply_reports([("default/web-0".to_owned(), None)]);
    assert!(!runs("n2"));
}
