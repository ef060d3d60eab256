//! Who gets how many connections: weights, affinity, draining, the own node first. Counted over many connections, with
//! bounds that chance alone breaks less than once in a hundred million runs.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use api::pod::PodPhase;

use crate::harness::{
    EDIT_PATIENCE, Mesh, PATIENCE,
    objects::{client, namespace, server, service, service_for},
    until,
};

/// Pearson's statistic is above it with a probability of 1e-8, by degrees of freedom (from 1).
const LIMITS: [f64; 3] = [32.9, 36.9, 40.2];
/// How long an affinity lasts without a connection.
const AFFINITY: Duration = Duration::from_secs(2);
const CONNECTIONS: u32 = 1000;
/// The server makes the file when it serves; where a test takes it away, the replica is soon not ready.
const HEALTH: &str = "  readinessProbe: {exec: {command: [test, -e, /tmp/healthy]}, periodSeconds: 0.2, failureThreshold: 1}\n";

#[test]
fn connections_go_where_they_should() {
    let on_one = "  node: node-1\n";
    let weighted = |name: &str, weight: u32| {
        let spec = format!("{on_one}  weight: {weight}\n");
        let object = server(&format!("shop/{name}"), &[8000], &spec);
        object.replace(
            &format!("labels: {{app: {name}}}"),
            &format!("labels: {{app: {name}, pool: blend}}"),
        )
    };
    let blend = service("shop/blend", &[(80, 8000)])
        .replace("selector: {app: blend}", "selector: {pool: blend}");
    let affinity = format!(
        "  sessionAffinity: ClientIP\n  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {}}}}}\n",
        AFFINITY.as_secs()
    );
    let objects = [
        namespace("shop"),
        client("shop/here", on_one),
        client("shop/there", "  node: node-2\n"),
        weighted("heavy", 6),
        weighted("middle", 3),
        weighted("light", 1),
        weighted("none", 0),
        blend,
        server("shop/even", &[8000], &format!("{on_one}  replicas: 4\n")),
        service("shop/even", &[(80, 8000)]),
        service_for("shop/sticky", "even", &[(80, 8000)], &affinity),
        server("shop/spread", &[8000], &format!("  replicas: 4\n{HEALTH}")),
        service_for(
            "shop/near",
            "spread",
            &[(80, 8000)],
            "  trafficDistribution: PreferSameNode\n",
        ),
        service_for(
            "shop/close",
            "spread",
            &[(80, 8000)],
            "  trafficDistribution: PreferClose\n",
        ),
        service_for(
            "shop/local",
            "spread",
            &[(80, 8000)],
            "  internalTrafficPolicy: Local\n",
        ),
    ]
    .concat();
    let mesh = Mesh::start_with(
        "distribution",
        &[("objects.yaml", &objects)],
        &["--nodes", "2"],
    );
    weights_are_kept(&mesh);
    equals_get_equal_shares(&mesh);
    affinity_lasts_while_it_is_used(&mesh);
    affinity_expires(&mesh);
    the_own_node_comes_first(&mesh);
}

fn weights_are_kept(mesh: &Mesh) {
    let weights = [("heavy-0", 6.0), ("middle-0", 3.0), ("light-0", 1.0)];
    for family in ["4", "6"] {
        let served = served_by(mesh, "here", family, "blend", CONNECTIONS);
        assert_shares(&served, &weights);
    }
}

fn equals_get_equal_shares(mesh: &Mesh) {
    let weights = ["even-0", "even-1", "even-2", "even-3"].map(|pod| (pod, 1.0));
    let served = served_by(mesh, "here", "any", "even", CONNECTIONS);
    assert_shares(&served, &weights);
}

/// Longer than it lasts when it is not.
fn affinity_lasts_while_it_is_used(mesh: &Mesh) {
    let begun = Instant::now();
    let mut served = BTreeMap::new();
    while begun.elapsed() < AFFINITY * 2 {
        served.extend(served_by(mesh, "here", "any", "sticky", 20));
        assert_eq!(served.len(), 1, "{served:?}");
    }
}

fn affinity_expires(mesh: &Mesh) {
    let first = served_by(mesh, "here", "any", "sticky", 1);
    // One of four is chosen anew each time: sixteen times the same has a chance of one in four thousand million.
    for _ in 0..16 {
        thread::sleep(AFFINITY + AFFINITY / 10);
        let next = served_by(mesh, "here", "any", "sticky", 1);
        if next != first {
            return;
        }
    }
    panic!("always {first:?}");
}

fn the_own_node_comes_first(mesh: &Mesh) {
    let replicas = |node: &str| -> Vec<String> {
        let names = (0..4).map(|index| format!("spread-{index}"));
        names
            .filter(|name| mesh.replica(&format!("shop/{name}")).status.node == node)
            .collect()
    };
    for (client, node) in [("here", "node-1"), ("there", "node-2")] {
        let own = replicas(node);
        let weights: Vec<(&str, f64)> = own.iter().map(|pod| (pod.as_str(), 1.0)).collect();
        assert_eq!(weights.len(), 2, "{own:?}");
        for service in ["near", "close", "local"] {
            let served = served_by(mesh, client, "any", service, 300);
            assert_shares(&served, &weights);
        }
    }

    // Without one on the own node, the other node's are chosen where that may be: it takes the tunnel between them.
    for pod in replicas("node-1") {
        mesh.exec(&pod, &["rm", "/tmp/healthy"]).success();
    }
    mesh.until_explained("here", "local:80", "no-endpoint");
    for attempt in mesh.attempts("here", "any", "local", 80, 20) {
        attempt.failed("ECONNREFUSED");
    }
    until_path(mesh, "tunnel");
    let others = replicas("node-2");
    let weights: Vec<(&str, f64)> = others.iter().map(|pod| (pod.as_str(), 1.0)).collect();
    for client in ["here", "there"] {
        assert_shares(&served_by(mesh, client, "any", "near", 300), &weights);
    }

    // And back.
    for pod in replicas("node-1") {
        mesh.exec(&pod, &["touch", "/tmp/healthy"]).success();
    }
    until_path(mesh, "direct");
    for attempt in mesh.attempts("here", "any", "near", 80, 20) {
        attempt.greeting();
    }
}

/// Waits until the path from the first node to the service that prefers its own is this one.
fn until_path(mesh: &Mesh, path: &str) {
    until(&format!("the path is {path}"), PATIENCE, || {
        let answer = mesh.explain("here", "near:80");
        if answer.path == path {
            Ok(())
        } else {
            Err(format!("{answer:#?}"))
        }
    });
}

/// `version` of a server that ends only when its connections have, in `replicas`.
fn lingering(version: &str, replicas: u32) -> String {
    let spec = format!("  replicas: {replicas}\n  env: [{{name: LINGER, value: \"1\"}}]\n{HEALTH}");
    server(&format!("shop/{version}"), &[8000], &spec)
        .replace(
            "terminationGracePeriodSeconds: 1\n",
            "terminationGracePeriodSeconds: 60\n",
        )
        .replace(
            &format!("labels: {{app: {version}}}"),
            &format!("labels: {{app: {version}, pool: web}}"),
        )
}

#[test]
fn who_stops_finishes_what_it_has() {
    let objects = [
        namespace("shop"),
        client("shop/client", ""),
        service("shop/web", &[(80, 8000)]).replace("selector: {app: web}", "selector: {pool: web}"),
    ]
    .concat();
    let mesh = Mesh::start(
        "drain",
        &[
            ("objects.yaml", &objects),
            ("one.yaml", &lingering("one", 3)),
        ],
    );
    until_endpoints(&mesh, 3);
    a_stopping_replica_gets_nothing_new(&mesh);
    versions_are_replaced_without_an_error(&mesh);
}

fn a_stopping_replica_gets_nothing_new(mesh: &Mesh) {
    let mut held: Vec<_> = (0..40).map(|_| mesh.hold("client", "web", 80)).collect();
    // None of forty on one of three has a chance of one in ten million.
    let on_last = |held: &crate::harness::probe::Held| held.greeting.pod == "one-2";
    let count = held.iter().filter(|held| on_last(held)).count();
    assert!((1..40).contains(&count), "{count}");

    mesh.write("one.yaml", &lingering("one", 2));
    mesh.until_replica("shop/one-2", "is stopping", |replica| {
        replica.status.phase == PodPhase::Terminating
    });
    until_endpoints(mesh, 2);
    let served = served_by(mesh, "client", "any", "web", 400);
    assert!(
        served.len() == 2 && !served.contains_key("one-2"),
        "{served:?}"
    );
    for (index, held) in held.iter_mut().enumerate() {
        held.exchange(&format!("still here {index}"));
    }
    // It has been told to stop by now, and stays for who is still connected.
    mesh.replica("shop/one-2");
    let begun = Instant::now();
    held.retain(|held| !on_last(held));
    mesh.until_status("the replica is gone", |status| {
        let mut replicas = status.workloads.iter();
        replicas.all(|replica| replica.status.uid != "shop/one-2")
    });
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    for held in &mut held {
        held.exchange("nobody else noticed");
    }
}

fn versions_are_replaced_without_an_error(mesh: &Mesh) {
    let requests: Vec<_> = (0..3)
        .map(|_| mesh.request_loop("client", "web", 80))
        .collect();
    for (one, two) in [(2, 1), (1, 1), (1, 2), (0, 3)] {
        mesh.write("one.yaml", &lingering("one", one));
        mesh.write("two.yaml", &lingering("two", two));
        mesh.until_status("the replicas are as many as wanted", |status| {
            let count = |workload: &str| {
                let replicas = status.workloads.iter();
                replicas
                    .filter(|replica| replica.workload == workload)
                    .count()
            };
            status.is_ready() && [count("one"), count("two")] == [one as usize, two as usize]
        });
        until_endpoints(mesh, (one + two) as usize);
    }
    let served = served_by(mesh, "client", "any", "web", 300);
    let weights = ["two-0", "two-1", "two-2"].map(|pod| (pod, 1.0));
    assert_shares(&served, &weights);
    for requests in requests {
        requests.finish().all_succeeded();
    }
}

/// How many of `count` connections each replica got.
fn served_by(
    mesh: &Mesh,
    client: &str,
    family: &str,
    service: &str,
    count: u32,
) -> BTreeMap<String, u32> {
    let mut served = BTreeMap::new();
    for attempt in mesh.attempts(client, family, service, 80, count) {
        *served.entry(attempt.greeting().pod.clone()).or_default() += 1;
    }
    served
}

/// The counts fit the weights, and nobody else got any.
#[track_caller]
fn assert_shares(served: &BTreeMap<String, u32>, weights: &[(&str, f64)]) {
    let count: u32 = served.values().sum();
    let whole: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let statistic: f64 = weights
        .iter()
        .map(|(pod, weight)| {
            let expected = f64::from(count) * weight / whole;
            let got = f64::from(served.get(*pod).copied().unwrap_or(0));
            (got - expected).powi(2) / expected
        })
        .sum();
    let strangers = served
        .keys()
        .any(|pod| weights.iter().all(|(known, _)| known != pod));
    let limit = LIMITS[weights.len() - 2];
    assert!(
        statistic < limit && !strangers,
        "{served:?} for {weights:?}: {statistic:.1}, limit {limit}"
    );
}

fn until_endpoints(mesh: &Mesh, count: usize) {
    until(&format!("{count} endpoints"), EDIT_PATIENCE, || {
        let answer = mesh.explain("client", "web:80");
        if answer.endpoints.len() == count {
            Ok(())
        } else {
            Err(format!("{answer:#?}"))
        }
    });
}
