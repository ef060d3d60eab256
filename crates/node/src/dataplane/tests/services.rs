//! Service tables: after any changes they spread connections as they should, in the kernel's own maps; and
//! whenever the agent is killed, what it leaves is whole, and the next one makes it right.

use std::{
    collections::HashMap,
    env,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use kernel::{ServiceEntry, ServiceKey, SlotKey, Tables};
use proptest::prelude::*;

use super::*;

const TCP: u8 = 6;

fn key() -> ServiceKey {
    ServiceKey {
        address: vip().into(),
        port: 80,
        protocol: TCP,
        padding: 0,
    }
}

/// Share of connections by address, as the kernel would spread them. Every slot must lead somewhere.
fn shares(tables: &Tables) -> HashMap<kernel::Address, f64> {
    let entry = tables.services.read(&key()).unwrap();
    let mut shares = HashMap::new();
    for slot in 0..entry.slots {
        let found = tables.slots.read(&SlotKey {
            service: entry.service,
            generation: entry.generation,
            slot,
        });
        let column = found.unwrap_or_else(|| panic!("slot {slot} of {} is missing", entry.slots));
        let first = (f64::from(column.threshold) + 1.0) / 2f64.powi(32);
        for (id, share) in [(column.endpoint, first), (column.alias, 1.0 - first)] {
            let endpoint = tables.endpoints.read(&id);
            let endpoint = endpoint.unwrap_or_else(|| panic!("slot {slot} leads to nothing"));
            assert_eq!((endpoint.service, endpoint.port), (entry.service, 8080));
            *shares.entry(endpoint.address).or_default() += share / f64::from(entry.slots);
        }
    }
    shares
}

/// Replicas that should share the connections, with weights.
type Wanted = HashMap<u32, u32>;

fn check(plane: &DataPlane, wanted: &Wanted) {
    let tables = &plane.kernel.tables;
    let shares = shares(tables);
    let total: u32 = wanted.values().sum();
    for (number, weight) in wanted {
        let share = shares.get(&replica_address(*number).into()).copied();
        let expected = f64::from(*weight) / f64::from(total);
        let difference = (share.unwrap_or(0.0) - expected).abs();
        assert!(difference < 1e-8, "{number}: {share:?}, not {expected}");
    }
    // Nothing is left of what is gone.
    assert_eq!(shares.len(), wanted.len());
    assert_eq!(
        (tables.slots.len(), tables.endpoints.len()),
        (wanted.len(), wanted.len())
    );
    assert_eq!(plane.problem_count, 0, "{:?}", plane.problems);
}

fn entry(plane: &DataPlane) -> ServiceEntry {
    plane.kernel.tables.services.read(&key()).unwrap()
}

#[derive(Debug, Clone)]
enum Step {
    /// Replicas come (or change), all with this weight, in one update.
    Set(Vec<u32>, u32),
    /// Replicas go, in one update.
    Gone(Vec<u32>),
    /// The service itself changes.
    Affinity(u32),
    /// The agent is replaced by another.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let some = || prop::collection::vec(0..24u32, 1..6);
    // Mostly one weight: most services are uniform.
    let weight = prop_oneof![8 => Just(1u32), 1 => 1..5u32];
    prop_oneof![
        6 => (some(), weight).prop_map(|(numbers, weight)| Step::Set(numbers, weight)),
        5 => some().prop_map(Step::Gone),
        1 => (0..3u32).prop_map(Step::Affinity),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn any_changes_leave_what_a_fresh_table_would_be(
        steps in prop::collection::vec(step(), 1..40)
    ) {
        let (ground, state_dir) = (Ground::new(), tempfile::tempdir().unwrap());
        let open = || ground.open(state_dir.path(), MapSizes::default());
        let (mut plane, mut state) = (open(), MeshState::default());
        let mut wanted = Wanted::new();
        add(&mut plane, &mut state, &[service(0)]);
        for step in steps {
            match step {
                Step::Set(numbers, weight) => {
                    let replicas: Vec<Upsert> = numbers
                        .iter()
                        .map(|number| replica(*number, weight, "other"))
                        .collect();
                    add(&mut plane, &mut state, &replicas);
                    wanted.extend(numbers.into_iter().map(|number| (number, weight)));
                }
                Step::Gone(numbers) => {
                    let mut changes = Changes::default();
                    let names: Vec<String> = numbers.iter().copied().map(replica_name).collect();
                    state.take(ADDRESS_TYPE, &[], &names, &mut changes).unwrap();
                    plane.apply(&state, &changes);
                    wanted.retain(|number, _| !numbers.contains(number));
                }
                Step::Affinity(seconds) => {
                    add(&mut plane, &mut state, &[service(seconds)]);
                    prop_assert_eq!(entry(&plane).affinity_seconds, seconds);
                }
                Step::Restart => {
                    drop(plane);
                    plane = open();
                    let everything = Changes {
                        services: state.services.keys().cloned().collect(),
                        workloads: state.workloads.keys().cloned().collect(),
                        ..Changes::default()
                    };
                    plane.apply(&state, &everything);
                    plane.reconcile().unwrap();
                }
            }
            check(&plane, &wanted);
        }
    }
}

#[test]
fn one_change_is_made_in_place() {
    let (ground, state_dir) = (Ground::new(), tempfile::tempdir().unwrap());
    let mut plane = ground.open(state_dir.path(), MapSizes::default());
    let mut state = MeshState::default();
    add(&mut plane, &mut state, &[service(0)]);
    let all: Vec<Upsert> = (0..50).map(|number| replica(number, 1, "other")).collect();
    add(&mut plane, &mut state, &all);
    let before = entry(&plane);
    add(&mut plane, &mut state, &[replica(50, 1, "other")]);
    remove(&mut plane, &mut state, ADDRESS_TYPE, replica_name(7));
    let after = entry(&plane);
    assert_eq!((after.generation, after.slots), (before.generation, 50));
    // Another weight moves every share.
    add(&mut plane, &mut state, &[replica(8, 3, "other")]);
    assert_ne!(entry(&plane).generation, before.generation);
}

#[test]
fn two_replicas_of_one_address_count_twice_and_go_one_by_one() {
    let (ground, state_dir) = (Ground::new(), tempfile::tempdir().unwrap());
    let mut plane = ground.open(state_dir.path(), MapSizes::default());
    let mut state = MeshState::default();
    let twin = Upsert {
        name: replica_name(99),
        ..replica(0, 1, "other")
    };
    add(
        &mut plane,
        &mut state,
        &[service(0), replica(0, 1, "other"), replica(1, 1, "other")],
    );
    add(&mut plane, &mut state, &[twin]);
    let share = |plane: &DataPlane| shares(&plane.kernel.tables)[&replica_address(0).into()];
    assert!((share(&plane) - 2.0 / 3.0).abs() < 1e-8);
    remove(&mut plane, &mut state, ADDRESS_TYPE, replica_name(99));
    assert!((share(&plane) - 0.5).abs() < 1e-8);
}

#[test]
fn a_replica_of_this_node_moves_all_connections_to_it_where_that_is_preferred() {
    let (ground, state_dir) = (Ground::new(), tempfile::tempdir().unwrap());
    let mut plane = ground.open(state_dir.path(), MapSizes::default());
    let mut state = MeshState::default();
    let mut preferring = Address::decode(service(0).body).unwrap();
    if let Some(Type::Service(service)) = &mut preferring.r#type {
        let mut balancing = xds::proto::workload::LoadBalancing::default();
        balancing.push_routing_preference(xds::proto::workload::load_balancing::Scope::Node);
        service.load_balancing = Some(balancing);
    }
    let preferring = upsert(SERVICE.into(), preferring.r#type.unwrap());
    add(
        &mut plane,
        &mut state,
        &[preferring, replica(0, 1, "other"), replica(1, 1, "other")],
    );
    check(&plane, &Wanted::from([(0, 1), (1, 1)]));
    add(&mut plane, &mut state, &[replica(2, 1, NODE)]);
    check(&plane, &Wanted::from([(2, 1)]));
    add(
        &mut plane,
        &mut state,
        &[replica(3, 1, "other"), replica(4, 1, NODE)],
    );
    check(&plane, &Wanted::from([(2, 1), (4, 1)]));
    remove(&mut plane, &mut state, ADDRESS_TYPE, replica_name(2));
    check(&plane, &Wanted::from([(4, 1)]));
    remove(&mut plane, &mut state, ADDRESS_TYPE, replica_name(4));
    check(&plane, &Wanted::from([(0, 1), (1, 1), (3, 1)]));
}

#[test]
fn endpoints_without_room_are_left_out_and_come_when_there_is_room() {
    let (ground, state_dir) = (Ground::new(), tempfile::tempdir().unwrap());
    let sizes = MapSizes {
        endpoints: 4,
        ..MapSizes::default()
    };
    let mut plane = ground.open(state_dir.path(), sizes);
    let mut state = MeshState::default();
    add(&mut plane, &mut state, &[service(0)]);
    let some = |numbers: std::ops::Range<u32>| -> Vec<Upsert> {
        numbers.map(|number| replica(number, 1, "other")).collect()
    };
    add(&mut plane, &mut state, &some(0..8));
    assert_eq!((entry(&plane).slots, plane.problem_count), (8, 0));
    add(&mut plane, &mut state, &some(8..10));
    assert_eq!(plane.problem_count, 1);
    assert_eq!(
        shares(&plane.kernel.tables).len(),
        8,
        "those that were there serve on"
    );
    remove(&mut plane, &mut state, ADDRESS_TYPE, replica_name(0));
    remove(&mut plane, &mut state, ADDRESS_TYPE, replica_name(1));
    let shares = shares(&plane.kernel.tables);
    assert_eq!(shares.len(), 8);
    assert!(shares.contains_key(&replica_address(9).into()));
}

/// Set for the process that is to be killed: its bpffs and its state folder.
const VICTIM: &str = "HEDDLE_TEST_VICTIM";
const REPLICAS: u32 = 64;

#[test]
fn an_agent_killed_at_any_moment_leaves_whole_tables_and_the_next_mends_them() {
    if let Some(folders) = env::var_os(VICTIM) {
        let folders = folders.into_string().unwrap();
        let (bpffs, state_dir) = folders.split_once(' ').unwrap();
        return change_for_ever(Path::new(bpffs), Path::new(state_dir));
    }
    let (ground, state_dir) = (Ground::new(), tempfile::tempdir().unwrap());
    let folders = format!(
        "{} {}",
        ground.0.path().display(),
        state_dir.path().display()
    );
    let name = "dataplane::tests::services::\
        an_agent_killed_at_any_moment_leaves_whole_tables_and_the_next_mends_them";
    for round in 0..6 {
        let mut victim = Command::new(env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(VICTIM, &folders)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("changing")));
        // Any moment will do: what must hold holds in each.
        thread::sleep(Duration::from_micros(fastrand::u64(0..20_000)));
        victim.kill().unwrap();
        victim.wait().unwrap();

        let mut plane = ground.open(state_dir.path(), MapSizes::default());
        let found = shares(&plane.kernel.tables).len() as u32;
        assert!(
            (REPLICAS / 2..=REPLICAS * 2).contains(&found),
            "round {round}: {found}"
        );
        let mut state = MeshState::default();
        let wanted: Wanted = (0..REPLICAS).map(|number| (number, 1)).collect();
        let replicas = wanted.keys().map(|number| replica(*number, 1, "other"));
        let all: Vec<Upsert> = std::iter::once(service(0)).chain(replicas).collect();
        add(&mut plane, &mut state, &all);
        plane.reconcile().unwrap();
        check(&plane, &wanted);
    }
}

/// Grows, shrinks and exchanges, until it is killed.
fn change_for_ever(bpffs: &Path, state_dir: &Path) {
    let mut plane = open(bpffs, state_dir, MapSizes::default());
    let mut state = MeshState::default();
    let first = (0..REPLICAS).map(|number| replica(number, 1, "other"));
    let first: Vec<Upsert> = std::iter::once(service(0)).chain(first).collect();
    add(&mut plane, &mut state, &first);
    plane.reconcile().unwrap();
    println!("changing");
    loop {
        let extra = REPLICAS + fastrand::u32(0..REPLICAS);
        add(&mut plane, &mut state, &[replica(extra, 1, "other")]);
        let mut changes = Changes::default();
        let other = REPLICAS + fastrand::u32(0..REPLICAS);
        let gone = [
            replica_name(extra),
            replica_name(fastrand::u32(0..REPLICAS / 2)),
        ];
        let come = [replica(other, 1, "other")];
        state
            .take(ADDRESS_TYPE, &come, &gone, &mut changes)
            .unwrap();
        plane.apply(&state, &changes);
        add(&mut plane, &mut state, &first[1..=REPLICAS as usize / 2]);
    }
}
