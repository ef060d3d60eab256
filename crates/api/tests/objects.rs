//! What a right document becomes.

use std::{path::Path, time::Duration};

use api::{
    objects::{
        Action, ClusterIp, Condition, MtlsMode, Object, StringMatch, TargetPort,
        TrafficDistribution,
    },
    parse,
    pod::{ProbeAction, Protocol, RestartPolicy},
};

const SHOP: &str = include_str!("shop.yaml");

fn objects() -> Vec<Object> {
    let parsed = parse(Path::new("shop.yaml"), SHOP);
    let problems: Vec<String> = parsed.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "shop.yaml:102:28: warning: AuthorizationPolicy shop/frontend: spec.rules[2].to[0].operation.methods: needs L7, which this mesh does not have yet: at L4 the DENY rule with it matches without regard to it"
        ]
    );
    parsed
        .objects
        .into_iter()
        .map(|located| located.object)
        .collect()
}

#[test]
fn every_kind_is_read() {
    let names: Vec<String> = objects()
        .iter()
        .map(|object| object.reference().to_string())
        .collect();
    assert_eq!(
        names,
        [
            "Namespace shop",
            "ServiceAccount shop/frontend",
            "Service shop/frontend",
            "Service shop/store",
            "Workload shop/frontend",
            "AuthorizationPolicy shop/frontend",
            "PeerAuthentication shop/frontend",
        ]
    );
}

#[test]
fn services_mean_what_kubernetes_says() {
    let objects = objects();
    let (Object::Service(web), Object::Service(store)) = (&objects[2], &objects[3]) else {
        panic!("not services");
    };
    let addresses = ["10.96.0.20", "fd10:96::20"].map(|text| text.parse().unwrap());
    assert_eq!(web.cluster_ip, ClusterIp::Fixed(addresses.to_vec()));
    assert_eq!(web.session_affinity, Some(Duration::from_secs(60)));
    assert_eq!(
        web.traffic_distribution,
        Some(TrafficDistribution::PreferSameNode)
    );
    assert!(web.local_only && web.publish_not_ready_addresses);
    assert_eq!(web.ports[0].target_port, TargetPort::Name("http".into()));
    assert_eq!(web.ports[1].protocol, Protocol::Udp);
    assert_eq!(store.cluster_ip, ClusterIp::Headless);
    assert_eq!(store.session_affinity, None);
}

#[test]
fn workloads_are_read_whole() {
    let objects = objects();
    let Object::Workload(workload) = &objects[4] else {
        panic!("not a workload");
    };
    let spec = &workload.spec;
    assert_eq!(spec.labels["app"], "frontend");
    assert_eq!(spec.labels["tier"], "web");
    assert_eq!(spec.command, ["python3", "-m", "http.server", "8000"]);
    assert_eq!(spec.env["GREETING"], "hello");
    assert_eq!(spec.env["EMPTY"], "");
    assert_eq!(spec.files["/etc/app.conf"].mode, 0o600);
    assert_eq!(
        spec.files["/etc/app.conf"].content,
        "listen 8000\n--- not a marker\n"
    );
    assert_eq!(spec.files["/run.sh"].mode, 0o755);
    let ports: Vec<_> = spec
        .ports
        .iter()
        .map(|port| (port.name.as_deref(), port.port, port.protocol, port.publish))
        .collect();
    assert_eq!(
        ports,
        [
            (Some("http"), 8000, Protocol::Tcp, Some(8080)),
            (Some("dns"), 5353, Protocol::Udp, Some(5353)),
            (None, 9090, Protocol::Tcp, Some(9090)),
        ]
    );
    let readiness = spec.readiness.as_ref().unwrap();
    assert_eq!(
        readiness.action,
        ProbeAction::Http {
            port: 8000,
            path: "/ready".into(),
            headers: vec![("X-Probe".into(), "1".into())],
        }
    );
    assert_eq!(readiness.period, Duration::from_millis(500));
    assert_eq!(readiness.timeout, Duration::from_secs(1));
    let liveness = spec.liveness.as_ref().unwrap();
    assert_eq!(
        liveness.action,
        ProbeAction::Exec {
            command: vec!["true".into()]
        }
    );
    assert_eq!(
        (liveness.failure_threshold, liveness.success_threshold),
        (5, 1)
    );
    assert_eq!(spec.resources.cpu_millis, Some(500));
    assert_eq!(spec.resources.memory_bytes, Some(64 << 20));
    assert_eq!(spec.restart_policy, RestartPolicy::OnFailure);
    assert_eq!(spec.termination_grace, Duration::from_millis(2_500));
    assert_eq!((spec.replicas, spec.weight), (3, 10));
}

#[test]
fn workload_defaults() {
    let text = "apiVersion: heddle.dev/v1alpha1\nkind: Workload\nmetadata: {name: w}\nspec: {command: [x]}\n";
    let parsed = parse(Path::new("w.yaml"), text);
    let Object::Workload(workload) = &parsed.objects[0].object else {
        panic!("{:?}", parsed.problems);
    };
    let spec = &workload.spec;
    assert_eq!(workload.metadata.namespace, "default");
    assert_eq!(spec.service_account, "default");
    assert_eq!((spec.replicas, spec.weight), (1, 1));
    assert_eq!(spec.termination_grace, Duration::from_secs(5));
    assert_eq!(spec.restart_policy, RestartPolicy::Always);
    assert_eq!(spec.readiness, None);
}

#[test]
fn policies_are_read_whole() {
    let objects = objects();
    let (Object::AuthorizationPolicy(policy), Object::PeerAuthentication(peers)) =
        (&objects[5], &objects[6])
    else {
        panic!("not policies");
    };
    assert_eq!(policy.action, Action::Deny);
    let [anything, rule, l7] = policy.rules.as_slice() else {
        panic!("{:?}", policy.rules);
    };
    assert!(anything.from.is_empty() && anything.to.is_empty() && anything.when.is_empty());
    let source = &rule.from[0];
    let any_account = StringMatch::Prefix("cluster.local/ns/shop/sa/".into());
    assert_eq!(source.principals.any_of, [any_account]);
    assert_eq!(
        source.namespaces.none_of,
        [StringMatch::Exact("other".into())]
    );
    let blocks: Vec<String> = source
        .ip_blocks
        .any_of
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(blocks, ["10.0.0.0/8", "fd00::1/128"]);
    let accounts: Vec<(&str, &str)> = rule.from[1]
        .service_accounts
        .any_of
        .iter()
        .map(|account| (account.namespace.as_str(), account.name.as_str()))
        .collect();
    assert_eq!(accounts, [("shop", "api"), ("other", "api")]);
    assert_eq!(rule.to[0].ports.any_of, [80]);
    assert_eq!(rule.to[0].ports.none_of, [81]);
    assert!(matches!(&rule.when[0], Condition::SourceIp(values) if values.any_of.len() == 1));
    assert!(matches!(&rule.when[1], Condition::DestinationPort(values) if values.none_of == [443]));
    assert!(!rule.needs_l7() && l7.needs_l7());

    assert_eq!(peers.mode, MtlsMode::Strict);
    assert_eq!(peers.port_modes[&8000], MtlsMode::Permissive);
    assert_eq!(peers.port_modes[&5353], MtlsMode::Disable);
}

#[test]
fn lists_stand_for_their_items() {
    let text = r#"{"apiVersion": "v1", "kind": "List", "items": [
  {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}},
  {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "B"}},
  {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "c"}}
]}"#;
    let parsed = parse(Path::new("l.json"), text);
    let names: Vec<&str> = parsed
        .objects
        .iter()
        .map(|located| located.object.metadata().name.as_str())
        .collect();
    assert_eq!(names, ["a", "c"]);
    assert_eq!(parsed.problems.len(), 1);
    assert_eq!(
        (parsed.problems[0].line, parsed.problems[0].column),
        (3, 66)
    );
    assert_eq!(parsed.objects[1].position("metadata.name").unwrap().line, 4);
}

#[test]
fn objects_survive_their_json() {
    for object in objects() {
        let json = serde_json::to_string(&object).unwrap();
        let again: Object = serde_json::from_str(&json).unwrap();
        assert_eq!(again, object, "{json}");
    }
}
