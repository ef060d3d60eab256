//! Verdicts: only what changed is written, and one that finds no room never leaves a permission that is too wide.

use std::collections::BTreeSet;

use api::enroll::EnrolledWorkload;
use kernel::{Action, SocketClass, VerdictKey};
use xds::proto::{
    AUTHORIZATION_TYPE,
    security::{self, Authorization, Clause, Match, Rule, Scope},
};

use super::*;

/// Workloads of this node under accounts of their own.
fn enroll(plane: &mut DataPlane, state: &mut MeshState, numbers: std::ops::Range<u32>) {
    for number in numbers.clone() {
        let uid = format!("ns/pod-{number}");
        let local = Local {
            id: 1_000_000 + number,
            netns: u64::from(number),
            app_cgroup: 0,
            proxy_cgroup: 0,
            enrolled: EnrolledWorkload {
                uid: uid.clone(),
                namespace: "ns".into(),
                name: format!("pod-{number}"),
                workload: format!("pod-{number}"),
                service_account: format!("pod-{number}"),
                addresses: vec![replica_address(number)],
                cgroup: "/".into(),
                host_ifindex: number,
                mac: [0; 6],
                instance: "1".into(),
            },
        };
        plane.locals.insert(uid, local);
    }
    let workloads: Vec<Upsert> = numbers
        .map(|number| {
            let mut address = Address::decode(replica(number, 1, NODE).body).unwrap();
            if let Some(Type::Workload(workload)) = &mut address.r#type {
                workload.service_account = format!("pod-{number}");
                workload.authorization_policies = vec![format!("ns/only-{number}")];
            }
            upsert(replica_name(number), address.r#type.unwrap())
        })
        .collect();
    add(plane, state, &workloads);
}

/// Refuses ports to everybody.
fn refusing(name: &str, scope: Scope, ports: &[u32]) -> Upsert {
    let one = Match {
        destination_ports: ports.to_vec(),
        ..Match::default()
    };
    let policy = Authorization {
        name: name.into(),
        namespace: "ns".into(),
        scope: scope.into(),
        action: security::Action::Deny.into(),
        rules: vec![Rule {
            clauses: vec![Clause { matches: vec![one] }],
        }],
        dry_run: false,
    };
    Upsert {
        name: format!("ns/{name}"),
        body: policy.encode_to_vec().into(),
    }
}

fn own(number: u32, ports: &[u32]) -> Upsert {
    refusing(&format!("only-{number}"), Scope::WorkloadSelector, ports)
}

fn key(source: u32, policy_set: u32, port: u16) -> VerdictKey {
    VerdictKey {
        source,
        policy_set,
        port,
        socket_class: SocketClass::App as u8,
        padding: 0,
    }
}

/// Every pair of a workload's source and a workload's set, as the kernel has them.
fn pairs(plane: &DataPlane) -> BTreeSet<(u32, u32)> {
    let entries: Vec<_> = plane.kernel.tables.workloads.iter().collect();
    let sources: Vec<u32> = entries.iter().map(|(_, entry)| entry.source[0]).collect();
    let sets = entries.iter().map(|(_, entry)| entry.policy_set[0]);
    sets.flat_map(|set| sources.iter().map(move |source| (*source, set)))
        .collect()
}

#[test]
fn a_changed_policy_changes_what_it_applies_to_and_nothing_else() {
    let (ground, state_dir) = (Ground::new(), tempfile::tempdir().unwrap());
    let mut plane = ground.open(state_dir.path(), MapSizes::default());
    let mut state = MeshState::default();
    let policies: Vec<Upsert> = (0..6).map(|number| own(number, &[80])).collect();
    apply(&mut plane, &mut state, AUTHORIZATION_TYPE, &policies);
    enroll(&mut plane, &mut state, 0..6);
    let before: Vec<_> = plane
        .kernel
        .tables
        .workloads
        .iter()
        .map(|(id, e)| (*id, *e))
        .collect();
    assert_eq!(before.len(), 6);

    apply(
        &mut plane,
        &mut state,
        AUTHORIZATION_TYPE,
        &[own(3, &[80, 81])],
    );
    for (id, entry) in before {
        let now = plane.kernel.tables.workloads.read(&id).unwrap();
        assert_eq!(now.policy_set == entry.policy_set, id != 1_000_003);
        assert_eq!(now.source, entry.source);
    }
    let tables = &plane.kernel.tables;
    for (source, set) in pairs(&plane) {
        let all = tables.verdicts.read(&key(source, set, 0)).unwrap();
        assert_eq!(all.action, Action::Direct as u8);
        let port = tables.verdicts.read(&key(source, set, 80)).unwrap();
        assert_eq!(port.action, Action::Deny as u8);
    }
    // Six workloads and the anonymous source; the sets of IPv6, where the workloads have no address, are the same.
    assert_eq!(tables.verdicts.len(), 7 * (6 * 2 + 1));

    // One for all: every set is new, and none of the old verdicts is left.
    let everywhere = refusing("everywhere", Scope::Namespace, &[9]);
    apply(&mut plane, &mut state, AUTHORIZATION_TYPE, &[everywhere]);
    assert_eq!(plane.kernel.tables.verdicts.len(), 7 * (6 * 3 + 1));
    remove(
        &mut plane,
        &mut state,
        AUTHORIZATION_TYPE,
        "ns/everywhere".into(),
    );
    assert_eq!(plane.kernel.tables.verdicts.len(), 7 * (6 * 2 + 1));
    assert_eq!(plane.problem_count, 0, "{:?}", plane.problems);
}

#[test]
fn without_room_no_pair_has_the_permission_without_its_exceptions() {
    for verdicts in 1..14 {
        let (ground, state_dir) = (Ground::new(), tempfile::tempdir().unwrap());
        let sizes = MapSizes {
            verdicts,
            ..MapSizes::default()
        };
        let mut plane = ground.open(state_dir.path(), sizes);
        let mut state = MeshState::default();
        let policies = [own(0, &[80, 81]), own(1, &[80, 81])];
        apply(&mut plane, &mut state, AUTHORIZATION_TYPE, &policies);
        enroll(&mut plane, &mut state, 0..2);
        assert!(plane.problem_count > 0);
        for (source, set) in pairs(&plane) {
            let tables = &plane.kernel.tables;
            if tables.verdicts.read(&key(source, set, 0)).is_some() {
                for port in [80, 81] {
                    let verdict = tables.verdicts.read(&key(source, set, port)).unwrap();
                    assert_eq!(verdict.action, Action::Deny as u8);
                }
            }
        }
    }
}

#[test]
fn what_found_no_room_is_written_when_there_is_room() {
    let (ground, state_dir) = (Ground::new(), tempfile::tempdir().unwrap());
    let sizes = MapSizes {
        verdicts: 14,
        ..MapSizes::default()
    };
    let mut plane = ground.open(state_dir.path(), sizes);
    let mut state = MeshState::default();
    let policies = [own(0, &[80, 81, 82, 83]), own(1, &[80])];
    apply(&mut plane, &mut state, AUTHORIZATION_TYPE, &policies);
    enroll(&mut plane, &mut state, 0..2);
    assert!(plane.problem_count > 0);
    apply(&mut plane, &mut state, AUTHORIZATION_TYPE, &[own(0, &[80])]);
    let more = refusing("elsewhere", Scope::WorkloadSelector, &[1]);
    apply(&mut plane, &mut state, AUTHORIZATION_TYPE, &[more]);
    for (source, set) in pairs(&plane) {
        assert!(
            plane
                .kernel
                .tables
                .verdicts
                .read(&key(source, set, 0))
                .is_some()
        );
    }
}
