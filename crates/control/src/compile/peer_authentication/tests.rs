//! Istio's precedence, and what it becomes.

use api::objects::Metadata;

use super::*;

const STRICT: &str = "istio-system/istio_converted_static_strict";

use MtlsMode::{Disable, Permissive, Strict, Unset};

fn policy(namespace: &str, name: &str, app: Option<&str>, mode: MtlsMode) -> PeerAuthentication {
    PeerAuthentication {
        metadata: Metadata {
            name: name.into(),
            namespace: namespace.into(),
            ..Metadata::default()
        },
        selector: app
            .map(|app| ("app".to_owned(), app.to_owned()))
            .into_iter()
            .collect(),
        mode,
        port_modes: BTreeMap::new(),
    }
}

fn with_ports(mut policy: PeerAuthentication, ports: &[(u16, MtlsMode)]) -> PeerAuthentication {
    policy.port_modes = ports.iter().copied().collect();
    policy
}

/// Ports that a match names, and those that it excludes.
type Ports = (Vec<u32>, Vec<u32>);

/// What the workload `app: web` in namespace `shop` lists, and the clauses of a policy made for ports.
fn effective(policies: &[PeerAuthentication]) -> (Option<String>, Option<Ports>) {
    let mesh = MeshConfig::default();
    let all = PeerAuthentications::new(&mesh, policies.iter());
    let spec = PodSpec {
        namespace: "shop".into(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        ..crate::engine::tests::pod_spec()
    };
    let listed = all.policies_of(&all.index(), &spec);
    let made = all
        .resources()
        .into_iter()
        .map(|(key, body)| (key, Authorization::decode(body).unwrap()))
        .find(|(key, _)| Some(key) == listed.as_ref());
    if listed.is_some() {
        let (_, made) = made.as_ref().unwrap();
        assert_eq!(
            (made.action(), made.scope()),
            (Action::Deny, Scope::WorkloadSelector)
        );
        assert_eq!(made.rules.len(), 1);
        assert_eq!(made.rules[0].clauses[0], without_principal());
    }
    let ports = made.and_then(|(_, made)| {
        let ports = &made.rules[0].clauses.get(1)?.matches[0];
        Some((
            ports.destination_ports.clone(),
            ports.not_destination_ports.clone(),
        ))
    });
    (listed, ports)
}

fn strict(policies: &[PeerAuthentication]) -> bool {
    match effective(policies) {
        (None, None) => false,
        (Some(listed), None) if listed == STRICT => true,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_narrowest_policy_that_says_something_wins() {
    assert!(strict(&[]), "the mesh's default");
    let mesh = |mode| policy("istio-system", "m", None, mode);
    let namespace = |mode| policy("shop", "n", None, mode);
    let workload = |mode| policy("shop", "w", Some("web"), mode);
    for (policies, expected) in [
        (vec![mesh(Permissive)], false),
        (vec![mesh(Disable)], false),
        (vec![mesh(Unset)], true),
        (vec![mesh(Permissive), namespace(Strict)], true),
        (vec![mesh(Strict), namespace(Permissive)], false),
        (vec![mesh(Permissive), namespace(Unset)], false),
        (vec![namespace(Permissive), workload(Strict)], true),
        (vec![namespace(Permissive), workload(Unset)], false),
        (
            vec![mesh(Permissive), namespace(Unset), workload(Unset)],
            false,
        ),
        (vec![workload(Disable)], false),
        (vec![policy("shop", "w", Some("other"), Permissive)], true),
        (vec![policy("other", "n", None, Permissive)], true),
        // A selector in the root namespace selects nothing.
        (
            vec![policy("istio-system", "w", Some("web"), Permissive)],
            true,
        ),
        // The first by name among equals.
        (
            vec![
                policy("shop", "b", None, Strict),
                policy("shop", "a", None, Permissive),
            ],
            false,
        ),
        (
            vec![
                policy("shop", "b", Some("web"), Strict),
                policy("shop", "a", Some("web"), Disable),
            ],
            false,
        ),
    ] {
        assert_eq!(strict(&policies), expected, "{policies:#?}");
    }
}

#[test]
fn ports_that_differ_get_a_policy_of_their_own() {
    let workload = |mode, ports: &[_]| with_ports(policy("shop", "w", Some("web"), mode), ports);
    let made = Some("shop/converted_peer_authentication_w".to_owned());
    let permissive = policy("shop", "n", None, Permissive);
    // Only on these ports.
    for policies in [
        vec![workload(
            Permissive,
            &[(80, Strict), (81, Strict), (82, Disable)],
        )],
        vec![
            permissive.clone(),
            workload(Unset, &[(80, Strict), (81, Strict), (82, Unset)]),
        ],
    ] {
        assert_eq!(
            effective(&policies),
            (made.clone(), Some((vec![80, 81], vec![])))
        );
    }
    // On all ports but these.
    for policies in [
        vec![workload(
            Strict,
            &[(80, Permissive), (81, Disable), (82, Strict)],
        )],
        vec![workload(
            Unset,
            &[(80, Permissive), (81, Disable), (82, Unset)],
        )],
    ] {
        assert_eq!(
            effective(&policies),
            (made.clone(), Some((vec![], vec![80, 81])))
        );
    }
    // No real difference.
    assert!(strict(&[workload(Strict, &[(80, Strict), (81, Unset)])]));
    assert!(!strict(&[permissive, workload(Unset, &[(80, Permissive)])]));
}
