//! Tests of the checks between objects.

use std::path::Path;

use crate::{check::cross_check, mesh::MeshConfig, parse};

const WEB: &str = "
apiVersion: heddle.dev/v1alpha1
kind: Workload
metadata: {name: web, labels: {app: web}}
spec:
  command: [web]
  ports: [{name: http, port: 80}]
";

/// Checks `WEB` and, as a second file, `text`: both right by themselves, and wrong together as `expected` says.
#[track_caller]
fn case(text: &str, expected: &[&str]) {
    let mut objects = Vec::new();
    for (file, text) in [("web.yaml", WEB), ("more.yaml", text)] {
        let parsed = parse(Path::new(file), text);
        assert_eq!(parsed.problems, []);
        objects.extend(parsed.objects);
    }
    let problems: Vec<String> = cross_check(&objects, &MeshConfig::default())
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(problems, expected, "{text}");
}

fn service(name: &str, spec: &str) -> String {
    format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
}

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec: {{{spec}}}\n"
    )
}

#[test]
fn what_fits_together_is_left_alone() {
    case("", &[]);
    let selector = "selector: {app: web}";
    case(
        &service(
            "web",
            &format!("{selector}, ports: [{{port: 80, targetPort: http}}]"),
        ),
        &[],
    );
    let rules = "rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/x, 'cluster*', '*/sa/x']}}]}]";
    case(
        &policy(&format!("selector: {{matchLabels: {{app: web}}}}, {rules}")),
        &[],
    );
}

#[test]
fn objects_given_twice() {
    case(
        WEB,
        &[
            "more.yaml:4:18: error: Workload default/web: metadata.name: this object is given twice (first at web.yaml:2)",
        ],
    );
}

#[test]
fn missing_namespaces_and_accounts() {
    case(
        "apiVersion: heddle.dev/v1alpha1\nkind: Workload\nmetadata: {name: a, namespace: shop}\nspec: {command: [a], serviceAccountName: b}\n",
        &[
            "more.yaml:3:32: warning: Workload shop/a: metadata.namespace: there is no Namespace `shop` among the objects",
            "more.yaml:4:42: warning: Workload shop/a: spec.serviceAccountName: there is no ServiceAccount shop/b among the objects",
        ],
    );
    case(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a, namespace: istio-system}\n",
        &[],
    );
}

#[test]
fn services_without_targets() {
    case(
        &service("a", "selector: {app: api}, ports: [{port: 80}]"),
        &[
            "more.yaml:5:18: warning: Service default/a: spec.selector: selects no workload in namespace `default`",
        ],
    );
    case(
        &service("a", "ports: [{port: 80}]"),
        &[
            "more.yaml:5:7: warning: Service default/a: spec: has no selector, so it has no endpoints",
        ],
    );
    for port in ["targetPort: admin", "targetPort: http, protocol: UDP"] {
        let name = if port.contains("admin") {
            "admin"
        } else {
            "http"
        };
        case(
            &service(
                "a",
                &format!("selector: {{app: web}}, ports: [{{port: 80, {port}}}]"),
            ),
            &[&format!(
                "more.yaml:5:61: error: Service default/a: spec.ports[0].targetPort: none of the selected workloads has a port named `{name}`"
            )],
        );
    }
}

#[test]
fn virtual_addresses() {
    let range = "(expected an address in 10.96.0.0/16, other than its first and last and the mesh's DNS at 10.96.0.10)";
    for address in ["10.97.0.1", "10.96.0.10", "10.96.255.255"] {
        case(
            &service(
                "a",
                &format!("selector: {{app: web}}, clusterIP: {address}, ports: [{{port: 80}}]"),
            ),
            &[&format!(
                "more.yaml:5:41: error: Service default/a: spec.clusterIP: {address} cannot be the address of a service {range}"
            )],
        );
    }
    let one = |name| {
        service(
            name,
            "selector: {app: web}, clusterIP: 10.96.0.7, ports: [{port: 80}]",
        )
    };
    case(
        &format!("{}{}", one("a"), one("b")),
        &[
            "more.yaml:10:41: error: Service default/b: spec.clusterIP: 10.96.0.7 is already the address of Service default/a",
        ],
    );
}

#[test]
fn host_ports_published_twice() {
    let workload = |name: &str, spec: &str| {
        format!(
            "---\napiVersion: heddle.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}}}\nspec: {{command: [a], {spec}}}\n"
        )
    };
    let long = "ports: [{port: 80, publish: 8080}]";
    let short = "publish: ['8080:80']";
    let udp = "publish: ['8080:80/udp']";
    case(
        &[
            workload("a", long),
            workload("b", short),
            workload("c", long),
            workload("d", udp),
        ]
        .concat(),
        &[
            "more.yaml:10:31: error: Workload default/b: spec.publish: host port 8080 is already published by Workload default/a",
            "more.yaml:15:50: error: Workload default/c: spec.ports[0].publish: host port 8080 is already published by Workload default/a",
        ],
    );
}

#[test]
fn policies_that_match_nothing() {
    case(
        &policy("selector: {matchLabels: {app: api}}"),
        &[
            "more.yaml:4:18: warning: AuthorizationPolicy default/p: spec.selector: selects no workload in namespace `default`",
        ],
    );
    case(
        &policy(
            "rules: [{from: [{source: {principals: [other.org/ns/a/sa/b, cluster.local/a]}}], when: [{key: source.principal, notValues: ['other*']}]}]",
        ),
        &[
            "more.yaml:4:47: warning: AuthorizationPolicy default/p: spec.rules[0].from[0].source.principals[0]: never matches: identities in this mesh begin with `cluster.local/ns/`",
            "more.yaml:4:68: warning: AuthorizationPolicy default/p: spec.rules[0].from[0].source.principals[1]: never matches: identities look like `cluster.local/ns/NAMESPACE/sa/ACCOUNT`",
            "more.yaml:4:132: warning: AuthorizationPolicy default/p: spec.rules[0].when[0].notValues[0]: never matches: identities in this mesh begin with `cluster.local/ns/`",
        ],
    );
}
