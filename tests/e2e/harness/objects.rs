//! The objects that most tests need, as YAML. A name is `NAMESPACE/NAME`.

const SERVER: &str = include_str!("../programs/server.py");
const PROBE: &str = include_str!("../programs/probe.py");
/// Where the programs of the tests lie in a workload.
pub(crate) const PROBE_PATH: &str = "/opt/e2e/probe.py";
const SERVER_PATH: &str = "/opt/e2e/server.py";

/// A Namespace.
pub(crate) fn namespace(name: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n")
}

/// A workload that greets and echoes on all its ports, ready as soon as the first one answers. `spec` is YAML
/// with two spaces before every line, such as `"  replicas: 2\n"`.
pub(crate) fn server(name: &str, ports: &[u16], spec: &str) -> String {
    let list: String = ports
        .iter()
        .map(|port| format!("  - {{name: port-{port}, port: {port}}}\n"))
        .collect();
    let arguments: String = ports.iter().map(|port| format!(", \"{port}\"")).collect();
    let probe = if spec.contains("readinessProbe:") {
        String::new()
    } else {
        format!(
            "  readinessProbe: {{tcpSocket: {{port: {}}}, periodSeconds: 0.2}}\n",
            ports[0]
        )
    };
    workload(
        name,
        &format!("[python3, {SERVER_PATH}{arguments}]"),
        &format!("  ports:\n{list}{probe}{spec}"),
    )
}

/// A workload that waits for `heddle exec`.
pub(crate) fn client(name: &str, spec: &str) -> String {
    workload(name, "[sleep, infinity]", spec)
}

/// A workload with a service account of its own name, the label `app` of its own name, and the tests' programs on board.
pub(crate) fn workload(name: &str, command: &str, spec: &str) -> String {
    let (namespace, name) = split(name);
    // JSON texts are YAML texts.
    let [server, probe] = [SERVER, PROBE].map(|text| serde_json::to_string(text).unwrap());
    format!(
        "---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {namespace}}}
---
apiVersion: heddle.dev/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec:
  serviceAccountName: {name}
  command: {command}
  terminationGracePeriodSeconds: 1
  files:
  - {{path: {SERVER_PATH}, content: {server}}}
  - {{path: {PROBE_PATH}, content: {probe}}}
{spec}"
    )
}

/// A service for the workload of the same name. `ports` are the service's and the workload's.
pub(crate) fn service(name: &str, ports: &[(u16, u16)]) -> String {
    service_for(name, split(name).1, ports, "")
}

/// A service for the workload `app`, with more of `spec` as in [`server`].
pub(crate) fn service_for(name: &str, app: &str, ports: &[(u16, u16)], spec: &str) -> String {
    let (namespace, name) = split(name);
    let list: String = ports
        .iter()
        .map(|(port, target)| {
            format!("  - {{name: port-{port}, port: {port}, targetPort: {target}}}\n")
        })
        .collect();
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  selector: {{app: {app}}}
  ports:
{list}{spec}"
    )
}

/// An AuthorizationPolicy for the workload `app`; `rest` is YAML of its `spec`.
pub(crate) fn policy(name: &str, app: &str, rest: &str) -> String {
    let (namespace, name) = split(name);
    format!(
        "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  selector: {{matchLabels: {{app: {app}}}}}
{rest}"
    )
}

/// `rest` of a [`policy`] that allows these service accounts, named `NAMESPACE/ACCOUNT`, and nobody else.
pub(crate) fn allow(accounts: &[&str]) -> String {
    let principals: Vec<String> = accounts.iter().map(|account| principal(account)).collect();
    format!(
        "  rules:\n  - from:\n    - source: {{principals: [{}]}}\n",
        principals.join(", ")
    )
}

/// A service account as policies write it.
pub(crate) fn principal(account: &str) -> String {
    let (namespace, name) = split(account);
    format!("cluster.local/ns/{namespace}/sa/{name}")
}

/// A service account's SPIFFE id.
pub(crate) fn spiffe_id(account: &str) -> String {
    format!("spiffe://{}", principal(account))
}

fn split(name: &str) -> (&str, &str) {
    name.split_once('/').expect("a name is NAMESPACE/NAME")
}
