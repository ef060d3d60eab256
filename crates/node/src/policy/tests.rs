use xds::proto::security::{Action, Address, Clause, Rule};

use super::*;

fn exact(value: &str) -> StringMatch {
    StringMatch {
        match_type: Some(MatchType::Exact(value.into())),
    }
}

fn presence() -> StringMatch {
    StringMatch {
        match_type: Some(MatchType::Presence(())),
    }
}

fn net(text: &str) -> Address {
    let net: IpNet = text.parse().unwrap();
    Address {
        address: xds::proto::address_to_bytes(net.addr()).to_vec().into(),
        length: net.prefix_len().into(),
    }
}

fn policy(name: &str, action: Action, rules: Vec<Vec<Match>>) -> (String, Arc<Authorization>) {
    let rules = rules
        .into_iter()
        .map(|clauses| Rule {
            clauses: clauses
                .into_iter()
                .map(|one| Clause { matches: vec![one] })
                .collect(),
        })
        .collect();
    let policy = Authorization {
        name: name.into(),
        namespace: "shop".into(),
        action: action.into(),
        rules,
        ..Default::default()
    };
    (format!("shop/{name}"), Arc::new(policy))
}

fn client(account: &str) -> Client {
    Client {
        identity: Some(Identity {
            trust_domain: "cluster.local".into(),
            namespace: "shop".into(),
            service_account: account.into(),
        }),
        address: Some("10.244.0.9".parse().unwrap()),
    }
}

const ANONYMOUS: Client = Client {
    identity: None,
    address: None,
};

fn port(port: u16) -> Server {
    Server {
        address: None,
        port: Some(port),
    }
}

const ANY_PORT: Server = Server {
    address: None,
    port: None,
};

fn principal(account: &str) -> Match {
    Match {
        principals: vec![exact(&format!("cluster.local/ns/shop/sa/{account}"))],
        ..Default::default()
    }
}

fn ports(list: &[u32]) -> Match {
    Match {
        destination_ports: list.to_vec(),
        ..Default::default()
    }
}

fn strict() -> (String, Arc<Authorization>) {
    let unknown = Match {
        not_principals: vec![presence()],
        ..Default::default()
    };
    policy(
        "istio_converted_static_strict",
        Action::Deny,
        vec![vec![unknown]],
    )
}

#[test]
fn no_policy_allows_and_an_empty_allow_policy_denies() {
    assert_eq!(
        judge(&[], &client("web"), ANY_PORT).reason,
        Reason::NoPolicy
    );
    let nothing = [policy("nothing", Action::Allow, vec![])];
    let answer = judge(&nothing, &client("web"), ANY_PORT);
    assert_eq!(
        (answer.allowed, answer.reason),
        (false, Reason::NoAllowMatched)
    );
    assert_eq!(answer.policy.as_deref(), Some("shop/nothing"));
}

#[test]
fn principal_and_port_must_both_match() {
    let policies = [policy(
        "web",
        Action::Allow,
        vec![vec![principal("web"), ports(&[80])]],
    )];
    assert!(judge(&policies, &client("web"), port(80)).allowed);
    assert!(!judge(&policies, &client("web"), port(81)).allowed);
    assert!(!judge(&policies, &client("web"), ANY_PORT).allowed);
    assert!(!judge(&policies, &client("other"), port(80)).allowed);
    assert_eq!(named_ports(&policies), [80]);
}

#[test]
fn deny_wins_over_allow() {
    let policies = [
        policy("all", Action::Allow, vec![vec![]]),
        policy("not-web", Action::Deny, vec![vec![principal("web")]]),
    ];
    let answer = judge(&policies, &client("web"), port(80));
    assert_eq!(answer.reason, Reason::PolicyDeny);
    assert_eq!(answer.policy.as_deref(), Some("shop/not-web"));
    assert!(judge(&policies, &client("other"), port(80)).allowed);
}

#[test]
fn negated_ports_hold_for_the_ports_nobody_names() {
    let not_80 = Match {
        not_destination_ports: vec![80],
        ..Default::default()
    };
    let policies = [policy("not-80", Action::Deny, vec![vec![not_80]])];
    assert!(!judge(&policies, &client("web"), ANY_PORT).allowed);
    assert!(judge(&policies, &client("web"), port(80)).allowed);
}

#[test]
fn strict_refuses_only_those_without_identity() {
    let policies = [strict()];
    assert!(judge(&policies, &client("web"), port(80)).allowed);
    let answer = judge(&policies, &ANONYMOUS, port(80));
    assert_eq!(answer.reason, Reason::PeerNotAttested);
}

#[test]
fn addresses_are_judged_where_they_are_known() {
    let from = |text| Match {
        source_ips: vec![net(text)],
        ..Default::default()
    };
    let policies = [policy(
        "near",
        Action::Allow,
        vec![vec![from("10.244.0.0/24")]],
    )];
    assert!(judge(&policies, &client("web"), port(80)).allowed);
    let policies = [policy(
        "far",
        Action::Allow,
        vec![vec![from("192.0.2.0/24")]],
    )];
    assert!(!judge(&policies, &client("web"), port(80)).allowed);
}

#[test]
fn what_depends_on_an_unknown_address_is_refused_both_ways() {
    let from = Match {
        source_ips: vec![net("192.0.2.0/24")],
        ..Default::default()
    };
    for action in [Action::Allow, Action::Deny] {
        let policies = [policy("from", action, vec![vec![from.clone()]])];
        let answer = judge(&policies, &ANONYMOUS, port(80));
        assert_eq!(
            (answer.allowed, answer.reason),
            (false, Reason::NeedsAgent),
            "{action:?}"
        );
    }
}

#[test]
fn prefix_suffix_and_presence() {
    let one = |match_type| Match {
        principals: vec![StringMatch {
            match_type: Some(match_type),
        }],
        ..Default::default()
    };
    for (wanted, expected) in [
        (MatchType::Prefix("cluster.local/ns/shop/".into()), true),
        (MatchType::Prefix("cluster.local/ns/other/".into()), false),
        (MatchType::Suffix("/sa/web".into()), true),
        (MatchType::Suffix("/sa/api".into()), false),
        (MatchType::Presence(()), true),
    ] {
        let policies = [policy("p", Action::Allow, vec![vec![one(wanted.clone())]])];
        assert_eq!(
            judge(&policies, &client("web"), port(80)).allowed,
            expected,
            "{wanted:?}"
        );
        assert!(
            !judge(&policies, &ANONYMOUS, port(80)).allowed,
            "{wanted:?}"
        );
    }
}

#[test]
fn half_understood_policies_are_refused() {
    let mut bad = Match::default();
    bad.source_ips.push(Address {
        address: vec![1, 2, 3].into(),
        length: 8,
    });
    assert!(validate(&policy("p", Action::Deny, vec![vec![bad]]).1).is_err());
    let empty = Match {
        principals: vec![StringMatch { match_type: None }],
        ..Default::default()
    };
    assert!(validate(&policy("p", Action::Deny, vec![vec![empty]]).1).is_err());
    assert!(validate(&policy("p", Action::Deny, vec![vec![ports(&[80])]]).1).is_ok());
}
