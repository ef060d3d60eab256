//! Services: virtual addresses in every family, what both ends see, how load is spread, and over whom.

use std::collections::BTreeMap;

use crate::harness::{
    EDIT_PATIENCE, Mesh,
    objects::{client, namespace, server, service, service_for, workload},
    until,
};

/// The server makes the file when it serves; where a test takes it away, the replica is soon not ready.
const HEALTH: &str = "  readinessProbe: {exec: {command: [test, -e, /tmp/healthy]}, periodSeconds: 0.2, failureThreshold: 1}\n";

fn web(replicas: u32) -> String {
    server(
        "shop/web",
        &[8000],
        &format!("  replicas: {replicas}\n{HEALTH}"),
    )
}

#[test]
fn services_lead_to_ready_replicas() {
    let objects = [
        namespace("shop"),
        client("shop/client", ""),
        service("shop/web", &[(80, 8000)]),
        service_for(
            "shop/sticky",
            "web",
            &[(80, 8000)],
            "  sessionAffinity: ClientIP\n",
        ),
        workload(
            "shop/files",
            "[python3, -m, http.server, --bind, \"::\", \"8080\"]",
            "  workingDir: /etc\n  ports: [{name: http, port: 8080}]\n  readinessProbe: {httpGet: {path: /hostname, port: http}, periodSeconds: 0.2}\n",
        ),
        service("shop/files", &[(80, 8080)]),
    ]
    .concat();
    let mesh = Mesh::start(
        "services",
        &[("objects.yaml", &objects), ("web.yaml", &web(3))],
    );
    both_ends_see_what_they_expect(&mesh);
    unmodified_programs_work_in_both_families(&mesh);
    load_is_spread(&mesh);
    affinity_sticks(&mesh);
    who_is_not_ready_gets_nothing(&mesh);
    what_nobody_serves_is_refused(&mesh);
    replicas_come_and_go_unnoticed(&mesh);
}

/// The client sees the address that it dialled, the server the client's own.
fn both_ends_see_what_they_expect(mesh: &Mesh) {
    let dialled = mesh.resolve("client", "web").addresses;
    let own = mesh.addresses("shop/client-0").map(|own| own.to_string());
    for (family, own, is_v6) in [
        ("4", &own[0], false),
        ("6", &own[1], true),
        ("mapped", &own[0], false),
    ] {
        let attempt = mesh.attempts("client", family, "web", 80, 1).remove(0);
        let virtual_address = dialled
            .iter()
            .find(|found| found.contains(':') == is_v6)
            .unwrap();
        let shown = match family {
            "mapped" => format!("::ffff:{virtual_address}"),
            _ => virtual_address.clone(),
        };
        assert_eq!(attempt.peer.as_ref(), Some(&shown), "{family}");
        let greeting = attempt.greeting();
        assert_eq!(&greeting.peer, own, "{family}");
        let server = mesh.addresses(&format!("shop/{}", greeting.pod));
        assert_eq!(
            greeting.address,
            server[usize::from(is_v6)].to_string(),
            "{family}"
        );
    }
}

fn unmodified_programs_work_in_both_families(mesh: &Mesh) {
    for family in ["-4", "-6"] {
        let curl = [
            "curl",
            family,
            "--silent",
            "--show-error",
            "--fail",
            "http://files/hostname",
        ];
        assert_eq!(
            mesh.exec("client", &curl).success().stdout,
            "files-0\n",
            "{family}"
        );
    }
}

fn load_is_spread(mesh: &Mesh) {
    // Thirty each are expected; fewer than eight has a chance of one in ten million.
    let served = served_by(mesh, "web", 90);
    assert_eq!(served.len(), 3, "{served:?}");
    assert!(served.values().all(|count| *count >= 8), "{served:?}");
}

fn affinity_sticks(mesh: &Mesh) {
    let served = served_by(mesh, "sticky", 30);
    assert_eq!(served.len(), 1, "{served:?}");
    // A connection of another program of the client's, too: the affinity is the client's.
    let chosen = served.into_keys().next().unwrap();
    let again = served_by(mesh, "sticky", 5);
    assert!(again.len() == 1 && again.contains_key(&chosen), "{again:?}");

    // Until the replica cannot serve any more: then all go to one other.
    set_sick(mesh, &chosen, true);
    until_endpoints(mesh, "sticky", 2);
    let served = served_by(mesh, "sticky", 10);
    assert!(
        served.len() == 1 && !served.contains_key(&chosen),
        "{served:?}"
    );
    set_sick(mesh, &chosen, false);
    until_endpoints(mesh, "sticky", 3);
}

fn who_is_not_ready_gets_nothing(mesh: &Mesh) {
    set_sick(mesh, "web-1", true);
    until_endpoints(mesh, "web", 2);
    let served = served_by(mesh, "web", 40);
    assert!(
        served.len() == 2 && !served.contains_key("web-1"),
        "{served:?}"
    );
    for pod in ["web-0", "web-2"] {
        set_sick(mesh, pod, true);
    }
    until_endpoints(mesh, "web", 0);
    mesh.connect("client", "web", 80).failed("ECONNREFUSED");
    assert_eq!(mesh.explain("client", "web:80").reason, "no-endpoint");
    for pod in ["web-0", "web-1", "web-2"] {
        set_sick(mesh, pod, false);
    }
    until_endpoints(mesh, "web", 3);
}

fn what_nobody_serves_is_refused(mesh: &Mesh) {
    mesh.connect("client", "web", 81).failed("ECONNREFUSED");
    let answer = mesh.explain("client", "web:81");
    assert_eq!(
        (answer.reason.as_str(), answer.outcome.as_str()),
        ("no-such-port", "ECONNREFUSED")
    );
}

/// A client that connects all the while never meets a replica that is not there yet, or no longer.
fn replicas_come_and_go_unnoticed(mesh: &Mesh) {
    let address = mesh.virtual_address("client", "web");
    let requests = mesh.request_loop("client", &address, 80);
    for replicas in [5, 2, 4, 1] {
        mesh.write("web.yaml", &web(replicas));
        until_endpoints(mesh, "web", replicas as usize);
        mesh.until_status("the replicas are as many as wanted", |status| {
            status.is_ready()
                && status
                    .workloads
                    .iter()
                    .filter(|replica| replica.workload == "web")
                    .count()
                    == replicas as usize
        });
        let served = served_by(mesh, "web", 40 * replicas);
        assert_eq!(served.len(), replicas as usize, "{served:?}");
    }
    requests.finish().all_succeeded();
}

/// How many of `count` connections each replica got.
fn served_by(mesh: &Mesh, service: &str, count: u32) -> BTreeMap<String, u32> {
    let mut served = BTreeMap::new();
    for attempt in mesh.attempts("client", "any", service, 80, count) {
        *served.entry(attempt.greeting().pod.clone()).or_default() += 1;
    }
    served
}

fn set_sick(mesh: &Mesh, pod: &str, sick: bool) {
    let command = if sick { "rm" } else { "touch" };
    mesh.exec(pod, &[command, "/tmp/healthy"]).success();
}

fn until_endpoints(mesh: &Mesh, service: &str, count: usize) {
    let what = format!("{service} has {count} endpoints");
    until(&what, EDIT_PATIENCE, || {
        let answer = mesh.explain("client", &format!("{service}:80"));
        if answer.endpoints.len() == count {
            Ok(())
        } else {
            Err(format!("{answer:#?}"))
        }
    });
}
