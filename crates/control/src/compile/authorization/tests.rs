//! What policies become, in a short notation.

use std::path::Path;

use api::objects::Object;

use super::*;

fn compiled(spec: &str) -> Authorization {
    compiled_in("shop", spec)
}

fn compiled_in(namespace: &str, spec: &str) -> Authorization {
    let text = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {spec}\n"
    );
    let parsed = api::parse(Path::new("p.yaml"), &text);
    let [located] = parsed.objects.as_slice() else {
        panic!("{:?}", parsed.problems);
    };
    let Object::AuthorizationPolicy(policy) = &located.object else {
        panic!("not a policy");
    };
    compile(&MeshConfig::default(), policy)
}

/// `[rule: (clause: {match} | {match}) & (clause)]`.
fn show(policy: &Authorization) -> String {
    let rules: Vec<String> = policy
        .rules
        .iter()
        .map(|rule| {
            let clauses: Vec<String> = rule
                .clauses
                .iter()
                .map(|clause| {
                    let matches: Vec<String> = clause.matches.iter().map(show_match).collect();
                    format!("({})", matches.join(" | "))
                })
                .collect();
            format!("[{}]", clauses.join(" & "))
        })
        .collect();
    format!(
        "{:?} {:?} {}",
        policy.action(),
        policy.scope(),
        rules.join(" ")
    )
}

fn show_match(one: &Match) -> String {
    let strings = |list: &[security::StringMatch]| -> Vec<String> {
        let show = |string: &security::StringMatch| match &string.match_type {
            Some(MatchType::Exact(text)) => format!("={text}"),
            Some(MatchType::Prefix(text)) => format!("{text}*"),
            Some(MatchType::Suffix(text)) => format!("*{text}"),
            Some(MatchType::Presence(())) => "*".to_owned(),
            None => panic!("empty match"),
        };
        list.iter().map(show).collect()
    };
    let accounts = |list: &[security::ServiceAccountMatch]| -> Vec<String> {
        list.iter()
            .map(|one| format!("{}/{}", one.namespace, one.service_account))
            .collect()
    };
    let networks = |list: &[security::Address]| -> Vec<String> {
        let show = |one: &security::Address| {
            let address = xds::proto::address_from_bytes(&one.address).unwrap();
            format!("{address}/{}", one.length)
        };
        list.iter().map(show).collect()
    };
    let ports = |list: &[u32]| -> Vec<String> { list.iter().map(ToString::to_string).collect() };
    let kinds = [
        ("ns", strings(&one.namespaces)),
        ("!ns", strings(&one.not_namespaces)),
        ("id", strings(&one.principals)),
        ("!id", strings(&one.not_principals)),
        ("sa", accounts(&one.service_accounts)),
        ("!sa", accounts(&one.not_service_accounts)),
        ("from", networks(&one.source_ips)),
        ("!from", networks(&one.not_source_ips)),
        ("to", networks(&one.destination_ips)),
        ("!to", networks(&one.not_destination_ips)),
        ("port", ports(&one.destination_ports)),
        ("!port", ports(&one.not_destination_ports)),
    ];
    let said: Vec<String> = kinds
        .iter()
        .filter(|(_, values)| !values.is_empty())
        .map(|(kind, values)| format!("{kind} {}", values.join(",")))
        .collect();
    format!("{{{}}}", said.join("; "))
}

#[test]
fn sources_are_one_clause_operations_another_and_each_condition_its_own() {
    let policy = compiled(
        r#"{selector: {matchLabels: {app: api}}, rules: [{
            from: [{source: {principals: [cluster.local/ns/shop/sa/frontend, "cluster.local/ns/ops/*"]}},
                   {source: {namespaces: ["*-ops"], notIpBlocks: [10.0.0.0/8]}}],
            to: [{operation: {ports: ["80", "443"]}}, {operation: {notPorts: ["22"]}}],
            when: [{key: source.namespace, values: [a], notValues: [b]}, {key: destination.ip, values: ["fd10::1"]}]}]}"#,
    );
    assert_eq!(
        show(&policy),
        "Allow WorkloadSelector [({port 80,443} | {!port 22}) & \
         ({id =cluster.local/ns/shop/sa/frontend,cluster.local/ns/ops/*} | {ns *-ops; !from 10.0.0.0/8}) & \
         ({ns =a; !ns =b}) & ({to fd10::1/128})]"
    );
    assert_eq!(
        (policy.namespace.as_str(), policy.name.as_str()),
        ("shop", "p")
    );
}

#[test]
fn accounts_are_of_the_policys_namespace_unless_they_say() {
    let policy = compiled("{rules: [{from: [{source: {serviceAccounts: [web, ops/root]}}]}]}");
    assert_eq!(show(&policy), "Allow Namespace [({sa shop/web,ops/root})]");
}

#[test]
fn an_address_without_length_is_one_host() {
    let policy = compiled("{rules: [{from: [{source: {ipBlocks: [10.1.2.3, 10.1.2.3/8]}}]}]}");
    assert_eq!(
        show(&policy),
        "Allow Namespace [({from 10.1.2.3/32,10.0.0.0/8})]"
    );
}

#[test]
fn scopes() {
    assert_eq!(show(&compiled_in("istio-system", "{}")), "Allow Global ");
    assert_eq!(show(&compiled_in("shop", "{}")), "Allow Namespace ");
    let selected = compiled_in("istio-system", "{selector: {matchLabels: {a: b}}}");
    assert_eq!(selected.scope(), Scope::WorkloadSelector);
}

#[test]
fn nothing_and_anything() {
    assert_eq!(
        show(&compiled("{}")),
        "Allow Namespace ",
        "no rule: allows nothing"
    );
    assert_eq!(
        show(&compiled("{rules: [{}]}")),
        "Allow Namespace []",
        "no clause: anything"
    );
    let attested = compiled("{rules: [{from: [{source: {principals: ['*']}}]}]}");
    assert_eq!(show(&attested), "Allow Namespace [({id *})]");
}

#[test]
fn what_needs_l7_is_dropped_from_allow_and_ignored_in_deny() {
    let rules = "rules: [{to: [{operation: {methods: [GET], ports: ['80']}}]}, \
                 {to: [{operation: {ports: ['81']}}]}, \
                 {from: [{source: {namespaces: [a]}}], when: [{key: 'request.headers[x]', values: [y]}]}]";
    assert_eq!(
        show(&compiled(&format!("{{{rules}}}"))),
        "Allow Namespace [({port 81})]"
    );
    assert_eq!(
        show(&compiled(&format!("{{action: DENY, {rules}}}"))),
        "Deny Namespace [({port 80})] [({port 81})] [({ns =a}) & ({})]"
    );
    // All rules dropped: the policy is still there, and denies.
    let none = compiled("{rules: [{to: [{operation: {paths: [/x]}}]}]}");
    assert_eq!(show(&none), "Allow Namespace ");
}
