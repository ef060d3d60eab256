//! Every mistake is shown at its place, with its field, in words that help: one case for each kind of mistake.

use std::path::Path;

use api::{Parsed, parse, problem::Severity};

fn parsed(text: &str) -> Parsed {
    parse(Path::new("shop.yaml"), text)
}

/// Checks that `text` has exactly one problem, and that it is shown as `expected` (after the file's name).
#[track_caller]
fn case(text: &str, expected: &str) {
    let problems: Vec<String> = parsed(text)
        .problems
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(problems, [format!("shop.yaml:{expected}")], "{text}");
}

fn service(spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec:\n{spec}"
    )
}

fn workload(spec: &str) -> String {
    format!(
        "apiVersion: heddle.dev/v1alpha1\nkind: Workload\nmetadata: {{name: web}}\nspec:\n  command: [web]\n{spec}"
    )
}

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec:\n{spec}"
    )
}

#[test]
fn splice_annotation() {
    let annotated = |kind: &str, value: &str| {
        format!(
            "{kind}metadata:\n  name: web\n  annotations:\n    example.org/note: anything\n    heddle.dev/splice: {value}\n"
        )
    };
    let workload = |value: &str| {
        let head = "apiVersion: heddle.dev/v1alpha1\nkind: Workload\nspec: {command: [web]}\n";
        annotated(head, value)
    };
    for (text, asks) in [("\"true\"", true), ("\"false\"", false)] {
        let parsed = parsed(&workload(text));
        assert!(parsed.problems.is_empty(), "{:?}", parsed.problems);
        let api::objects::Object::Workload(found) = &parsed.objects[0].object else {
            panic!("{:?}", parsed.objects[0]);
        };
        assert_eq!(found.splice, asks);
    }
    case(
        &workload("yes please"),
        "8:24: error: Workload default/web: metadata.annotations[\"heddle.dev/splice\"]: \"yes please\" is neither (expected `\"true\"` or `\"false\"`)",
    );
    case(
        &workload("true"),
        "8:24: error: Workload default/web: metadata.annotations[\"heddle.dev/splice\"]: found the boolean true (expected a string: quote it, \"true\")",
    );
    case(
        &annotated("apiVersion: v1\nkind: ServiceAccount\n", "\"true\""),
        "7:5: warning: ServiceAccount default/web: metadata.annotations[\"heddle.dev/splice\"]: has no effect on a ServiceAccount, only on a Workload",
    );
}

#[test]
fn object_head() {
    case(
        "apiVersion: v1\nkind: Servce\nmetadata:\n  name: web\n",
        "2:7: error: Servce default/web: kind: unknown value \"Servce\", did you mean `Service`? (expected one of Namespace, ServiceAccount, Service, Workload, AuthorizationPolicy, PeerAuthentication)",
    );
    case(
        "apiVersion: apps/v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n",
        "1:13: error: Service default/web: apiVersion: \"apps/v1\" is not an apiVersion of Service (expected `v1`)",
    );
    case(
        "apiVersion: v1\n",
        "1:1: error: kind: the required field `kind` is missing (expected one of Namespace, ServiceAccount, Service, Workload, AuthorizationPolicy, PeerAuthentication)",
    );
    case(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: Shop\n",
        "4:9: error: Namespace Shop: metadata.name: \"Shop\" is not a valid name (expected at most 63 of a-z, 0-9 and `-`, beginning and ending with a letter or digit)",
    );
    case(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  namespace: shop\n",
        "5:14: error: Namespace shop: metadata.namespace: a Namespace is in no namespace (expected no such field)",
    );
    case(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  labels: {app: x}\n",
        "4:3: error: metadata.name: the required field `name` is missing (expected the object's name)",
    );
    case(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: web\n  labels: {a/b/c: x}\n",
        "5:12: error: ServiceAccount default/web: metadata.labels[\"a/b/c\"]: \"a/b/c\" is not a valid key (expected a name such as `app`, or with a domain before it, such as `example.org/app`)",
    );
    case(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: web\n  labels: {version: 1.10}\n",
        "5:21: error: ServiceAccount default/web: metadata.labels.version: found the number 1.10 (expected a string: quote it, \"1.10\")",
    );
}

#[test]
fn text_that_is_not_yaml() {
    case(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  name: api\n",
        "5:3: error: Service default/web: metadata.name: the key `name` is given twice (first at 4:3)",
    );
    let broken = parsed("kind: Service\nmetadata:\n  name: web\n  namespace: shop\nspec: [\n");
    let problem = &broken.problems[0];
    assert_eq!(
        problem.object.as_ref().unwrap().to_string(),
        "Service shop/web"
    );
    assert!(problem.message.starts_with("not valid YAML: "), "{problem}");
}

#[test]
fn unknown_fields() {
    case(
        &service("  ports:\n  - port: 80\n    targtPort: 8080\n"),
        "7:5: error: Service shop/web: spec.ports[0].targtPort: unknown field `targtPort`, did you mean `targetPort`? (expected one of name, port, targetPort, protocol, appProtocol, nodePort)",
    );
    case(
        &policy("  rules:\n  - form: []\n"),
        "6:5: error: AuthorizationPolicy default/p: spec.rules[0].form: unknown field `form`, did you mean `from`? (expected one of from, to, when)",
    );
    case(
        &workload("  resources: {limits: {gpu: 1}}\n"),
        "6:24: error: Workload default/web: spec.resources.limits.gpu: unknown field `gpu`, did you mean `cpu`? (expected one of cpu, memory)",
    );
}

#[test]
fn services() {
    let web = "error: Service shop/web";
    case(
        &service("  ports: []\n"),
        &format!("5:10: {web}: spec.ports: is empty (expected a list of at least one port)"),
    );
    case(
        &service("  selector: {a: b}\n"),
        &format!(
            "5:3: {web}: spec.ports: the required field `ports` is missing (expected a list of at least one port)"
        ),
    );
    case(
        &service("  ports: [{port: 70000}]\n"),
        &format!(
            "5:18: {web}: spec.ports[0].port: 70000 is not possible here (expected a whole number from 1 to 65535)"
        ),
    );
    case(
        &service("  ports: [{port: '80'}]\n"),
        &format!(
            "5:18: {web}: spec.ports[0].port: found the string \"80\" (expected a whole number from 1 to 65535)"
        ),
    );
    case(
        &service("  ports: [{port: 80, protocol: SCTP}]\n"),
        &format!(
            "5:32: {web}: spec.ports[0].protocol: unknown value \"SCTP\" (expected one of TCP, UDP)"
        ),
    );
    case(
        &service("  ports: [{port: 80, name: a}, {port: 80, name: b}]\n"),
        &format!(
            "5:32: {web}: spec.ports[1]: port 80 is given twice (expected every port once per protocol)"
        ),
    );
    case(
        &service("  ports: [{port: 80, name: a}, {port: 81, name: a}]\n"),
        &format!(
            "5:32: {web}: spec.ports[1]: the name `a` is given to two ports (expected a name of its own)"
        ),
    );
    case(
        &service("  ports: [{port: 80, name: a}, {port: 81}]\n"),
        &format!(
            "5:32: {web}: spec.ports[1]: has no name (expected a `name`, as there are several ports)"
        ),
    );
    case(
        &service("  ports: [{port: 80, targetPort: Http}]\n"),
        &format!(
            "5:34: {web}: spec.ports[0].targetPort: \"Http\" is not a valid name (expected at most 15 of a-z, 0-9 and `-`, with a letter, beginning and ending with a letter or digit)"
        ),
    );
    case(
        &service("  ports: [{port: 80}]\n  clusterIP: 10.96.0.300\n"),
        &format!(
            "6:14: {web}: spec.clusterIP: \"10.96.0.300\" is not an IP address (expected an IPv4 or IPv6 address)"
        ),
    );
    case(
        &service("  ports: [{port: 80}]\n  clusterIP: None\n  clusterIPs: [10.96.0.3]\n"),
        &format!(
            "6:14: {web}: spec.clusterIP: `None` and addresses contradict each other (expected either `None` or addresses)"
        ),
    );
    case(
        &service("  ports: [{port: 80}]\n  clusterIPs: [10.96.0.3, 10.96.0.4]\n"),
        &format!(
            "6:15: {web}: spec.clusterIPs: has two addresses of one family (expected at most one IPv4 and one IPv6 address)"
        ),
    );
    case(
        &service("  ports: [{port: 80}]\n  type: LoadBalancer\n"),
        &format!(
            "6:9: {web}: spec.type: services of type LoadBalancer are not supported (expected ClusterIP (to reach a workload from outside the mesh, use its `publish`))"
        ),
    );
    case(
        &service(
            "  ports: [{port: 80}]\n  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 90000}}\n",
        ),
        &format!(
            "7:54: {web}: spec.sessionAffinityConfig.clientIP.timeoutSeconds: 90000 is not possible here (expected a whole number from 1 to 86400)"
        ),
    );
    case(
        &service("  ports: [{port: 80}]\n  publishNotReadyAddresses: yes\n"),
        &format!(
            "6:29: {web}: spec.publishNotReadyAddresses: found the string \"yes\" (expected true or false)"
        ),
    );
    case(
        &service("  ports: [{port: 80}]\n  externalTrafficPolicy: Local\n"),
        "6:26: warning: Service shop/web: spec.externalTrafficPolicy: has no effect in Heddle",
    );
}

#[test]
fn workloads() {
    let web = "error: Workload default/web";
    case(
        "apiVersion: heddle.dev/v1alpha1\nkind: Workload\nmetadata: {name: web}\nspec:\n  replicas: 2\n",
        &format!(
            "5:3: {web}: spec.command: the required field `command` is missing (expected a list of texts, the program first)"
        ),
    );
    case(
        "apiVersion: heddle.dev/v1alpha1\nkind: Workload\nmetadata: {name: web}\nspec:\n  command: web -v\n",
        &format!("5:12: {web}: spec.command: found the string \"web -v\" (expected a list)"),
    );
    case(
        "apiVersion: heddle.dev/v1alpha1\nkind: Workload\nmetadata: {name: web}\nspec:\n  command: [sleep, 10]\n",
        &format!(
            "5:20: {web}: spec.command[1]: found the number 10 (expected a string: quote it, \"10\")"
        ),
    );
    case(
        &workload("  replicas: 501\n"),
        &format!(
            "6:13: {web}: spec.replicas: 501 is not possible here (expected a whole number from 0 to 500)"
        ),
    );
    case(
        &workload("  publish: [80]\n"),
        &format!(
            "6:13: {web}: spec.publish[0]: found the number 80 (expected a string: quote it, \"80\")"
        ),
    );
    case(
        &workload("  publish: ['8080']\n"),
        &format!(
            "6:13: {web}: spec.publish[0]: \"8080\" is not a published port (expected HOST:PORT with ports from 1 to 65535, such as 8080:80 or 5353:53/udp)"
        ),
    );
    case(
        &workload("  publish: ['8080:80', '8080:81']\n"),
        &format!(
            "6:24: {web}: spec.publish[1]: host port 8080 already leads to port 80 (expected every host port once)"
        ),
    );
    case(
        &workload("  ports: [{containerPort: 80, port: 80}]\n"),
        &format!(
            "6:27: {web}: spec.ports[0].containerPort: the port that the program listens on is named `port` here (expected `port`)"
        ),
    );
    case(
        &workload("  files: [{path: etc/x, content: ''}]\n"),
        &format!(
            "6:18: {web}: spec.files[0].path: \"etc/x\" is not an absolute path (expected a path that starts with `/` and has no `..`)"
        ),
    );
    case(
        &workload("  files: [{path: /x, content: '', mode: 644}]\n"),
        &format!(
            "6:41: {web}: spec.files[0].mode: \"644\" is not a file mode (expected octal permission bits with a leading 0, such as 0644)"
        ),
    );
    case(
        &workload("  env: [{name: A, value: x}, {name: A}]\n"),
        &format!(
            "6:37: {web}: spec.env[1].name: the variable A is given twice (expected every name once)"
        ),
    );
    case(
        &workload("  readinessProbe: {tcpSocket: {port: http}}\n"),
        &format!(
            "6:38: {web}: spec.readinessProbe.tcpSocket.port: the workload has no port named `http` (expected a port number or the name of one of `ports`)"
        ),
    );
    case(
        &workload("  readinessProbe: {periodSeconds: 1}\n"),
        &format!(
            "6:19: {web}: spec.readinessProbe: 0 ways to probe are given (expected exactly one of tcpSocket, httpGet, exec)"
        ),
    );
    case(
        &workload("  resources: {limits: {memory: 64MB}}\n"),
        &format!(
            "6:32: {web}: spec.resources.limits.memory: \"64MB\" is not a quantity above 0 (expected bytes such as 64Mi or 1G)"
        ),
    );
    case(
        &workload("  restartPolicy: always\n"),
        &format!(
            "6:18: {web}: spec.restartPolicy: unknown value \"always\", did you mean `Always`? (expected one of Always, OnFailure, Never)"
        ),
    );
    case(
        &workload("  user: 'no one'\n"),
        &format!("6:9: {web}: spec.user: \"no one\" is not a user (expected a user name or a uid)"),
    );
}

#[test]
fn policies() {
    let p = "error: AuthorizationPolicy default/p";
    case(
        &policy("  action: AUDIT\n"),
        &format!(
            "5:11: {p}: spec.action: the action AUDIT is not supported yet (expected one of ALLOW, DENY)"
        ),
    );
    case(
        &policy("  targetRefs: [{kind: Gateway}]\n"),
        &format!(
            "5:15: {p}: spec.targetRefs: a policy for a Gateway or Service needs a waypoint, which is not supported yet (expected `selector`)"
        ),
    );
    case(
        &policy("  rules:\n  - to:\n    - operation:\n        ports: [8080]\n"),
        &format!(
            "8:17: {p}: spec.rules[0].to[0].operation.ports[0]: found the number 8080 (expected a string: quote it, \"8080\")"
        ),
    );
    case(
        &policy("  rules:\n  - to:\n    - operation:\n        ports: ['0']\n"),
        &format!(
            "8:17: {p}: spec.rules[0].to[0].operation.ports[0]: \"0\" is not a port (expected a port from \"1\" to \"65535\")"
        ),
    );
    case(
        &policy("  rules:\n  - from: []\n"),
        &format!(
            "6:11: {p}: spec.rules[0].from: is empty (expected at least one `source`, or no such field)"
        ),
    );
    case(
        &policy("  rules:\n  - from: [{source: {ipBlocks: [10.0.0.0/33]}}]\n"),
        &format!(
            "6:33: {p}: spec.rules[0].from[0].source.ipBlocks[0]: \"10.0.0.0/33\" is neither an address range nor an address (expected such as 10.0.0.0/8, 10.1.2.3 or fd00::/8)"
        ),
    );
    case(
        &policy("  rules:\n  - from: [{source: {serviceAccounts: [a/b/c]}}]\n"),
        &format!(
            "6:40: {p}: spec.rules[0].from[0].source.serviceAccounts[0]: \"a/b/c\" is not a service account (expected ACCOUNT or NAMESPACE/ACCOUNT, without wildcards)"
        ),
    );
    case(
        &policy("  rules:\n  - when: [{key: source.name, values: [x]}]\n"),
        &format!(
            "6:18: {p}: spec.rules[0].when[0].key: unknown key \"source.name\" (expected one of source.ip, source.namespace, source.principal, source.serviceAccount, destination.ip, destination.port, remote.ip, connection.sni, request.auth.principal, request.auth.audiences, request.auth.presenter, request.auth.claims[, request.headers[)"
        ),
    );
    case(
        &policy("  rules:\n  - when: [{key: source.ip}]\n"),
        &format!(
            "6:12: {p}: spec.rules[0].when[0]: compares with nothing (expected at least one of `values`, `notValues`)"
        ),
    );
    case(
        &policy("  action: DENY\n  rules:\n  - to: [{operation: {paths: [/admin]}}]\n"),
        "7:30: warning: AuthorizationPolicy default/p: spec.rules[0].to[0].operation.paths: needs L7, which this mesh does not have yet: at L4 the DENY rule with it matches without regard to it",
    );
    case(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec: {portLevelMtls: {8080: {mode: STRICT}}}\n",
        "4:23: error: PeerAuthentication default/p: spec.portLevelMtls: is only possible for selected workloads (expected a `selector` with labels)",
    );
    case(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec: {mtls: {mode: STRIKT}}\n",
        "4:21: error: PeerAuthentication default/p: spec.mtls.mode: unknown value \"STRIKT\", did you mean `STRICT`? (expected one of UNSET, DISABLE, PERMISSIVE, STRICT)",
    );
}

#[test]
fn all_mistakes_are_shown_at_once_and_touch_no_other_object() {
    let text = format!(
        "{}---\n{}---\n{}",
        service("  ports: [{port: 0, nam: x}, {prt: 1}]\n  typ: x\n"),
        "kind: [\n",
        service("  ports: [{port: 80}]\n  clusterIP: None\n").replace("name: web", "name: api"),
    );
    let parsed = parsed(&text);
    let places: Vec<(usize, &str)> = parsed
        .problems
        .iter()
        .map(|problem| (problem.line, problem.field.as_str()))
        .collect();
    assert_eq!(
        places,
        [
            (5, "spec.ports[0]"),
            (5, "spec.ports[0].port"),
            (5, "spec.ports[0].nam"),
            (5, "spec.ports[1].port"),
            (5, "spec.ports[1]"),
            (5, "spec.ports[1].prt"),
            (6, "spec.typ"),
            (9, ""),
        ]
    );
    assert_eq!(parsed.objects.len(), 1);
    assert_eq!(
        parsed.objects[0].object.reference().to_string(),
        "Service shop/api"
    );
    assert_eq!(parsed.objects[0].source.line, 10);
}

#[test]
fn a_flood_of_mistakes_is_bounded_and_never_hides_an_error() {
    let inert = "{port: 80, nodePort: 1},".repeat(200);
    let text = service(&format!("  ports: [{inert}]\n"));
    let parsed = parsed(&text);
    assert!(parsed.objects.is_empty());
    assert!(parsed.problems.len() <= 101, "{}", parsed.problems.len());
    assert!(
        parsed
            .problems
            .iter()
            .any(|problem| problem.severity == Severity::Error)
    );
    let last = parsed.problems.last().unwrap();
    assert!(
        last.message.contains("more problems in this object"),
        "{last}"
    );
}

#[test]
fn problems_are_json_too() {
    let problem = &parsed(&service("  ports: []\n")).problems[0];
    let json = serde_json::to_value(problem).unwrap();
    assert_eq!(json["severity"], "error");
    assert_eq!(json["object"]["name"], "web");
    assert_eq!(json["line"], 5);
}
