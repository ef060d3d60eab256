//! What the benchmark's mesh consists of, and nginx's configuration, which both sides share.

use crate::{
    direct::mesh::IDLE_PROGRAM,
    protocol::ACCEPT_PORT_OFFSET,
    scenario::{Ends, PORT},
};

/// The client's node and the server's.
pub(super) const NODES: [&str; 2] = ["node-1", "node-2"];
/// The client that is measured with.
pub(super) const CLIENT: &str = "client";
/// The server's name that has an IPv4 address.
pub(super) const SERVER: &str = "server";
/// The server's name that has an IPv6 address.
pub(super) const SERVER_V6: &str = "server-v6";
/// The web server's name.
pub(super) const WEB: &str = "web";
/// Where nginx listens.
pub(super) const HTTP_PORT: u16 = 7080;
/// The web server.
pub(super) const NGINX: &str = "/usr/sbin/nginx";
/// Where a workload finds its configuration.
const NGINX_CONFIGURATION: &str = "/etc/bench/nginx.conf";
/// What nginx answers with.
const BODY_BYTES: usize = 128;

/// A client that has not connected yet.
pub(super) fn cold_client(number: usize) -> String {
    format!("cold-{number}")
}

/// Arguments of nginx with this configuration.
pub(super) fn nginx_arguments(configuration: &str) -> [String; 4] {
    ["-e", "stderr", "-c", configuration].map(str::to_owned)
}

/// One worker that answers from memory; what it needs of folders is below `scratch`.
pub(super) fn nginx_configuration(scratch: &str) -> String {
    let body = "h".repeat(BODY_BYTES);
    format!(
        "daemon off;
worker_processes 1;
pid {scratch}/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  client_body_temp_path {scratch}/body;
  proxy_temp_path {scratch}/proxy;
  fastcgi_temp_path {scratch}/fastcgi;
  uwsgi_temp_path {scratch}/uwsgi;
  scgi_temp_path {scratch}/scgi;
  server {{
    listen {HTTP_PORT} backlog=1024;
    location / {{ return 200 \"{body}\"; }}
  }}
}}
"
    )
}

/// All objects.
pub(super) fn all(ends: &Ends, cold_clients: usize) -> String {
    let accept_port = PORT + ACCEPT_PORT_OFFSET;
    let mut text = String::from(
        "apiVersion: v1
kind: Namespace
metadata: {name: bench}
",
    );
    for account in [SERVER, CLIENT] {
        text += &format!(
            "---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {account}, namespace: bench}}
"
        );
    }
    for (service, family) in [(SERVER, "IPv4"), (SERVER_V6, "IPv6")] {
        text += &format!(
            "---
apiVersion: v1
kind: Service
metadata: {{name: {service}, namespace: bench}}
spec:
  ipFamilyPolicy: SingleStack
  ipFamilies: [{family}]
  selector: {{app: server}}
  ports:
    - {{name: data, port: {PORT}}}
    - {{name: accept, port: {accept_port}}}
"
        );
    }
    let nginx = nginx_arguments(NGINX_CONFIGURATION).to_vec();
    let configuration = indented(&nginx_configuration("/tmp"));
    text += &workload(
        SERVER,
        SERVER,
        1,
        &ends.program.display().to_string(),
        &ends.server_arguments(),
    );
    text += &format!(
        "  ports: [{{name: data, port: {PORT}}}, {{name: accept, port: {accept_port}}}]\n"
    );
    text += "  readinessProbe: {tcpSocket: {port: accept}, periodSeconds: 1}\n";
    text += &workload(WEB, SERVER, 1, NGINX, &nginx);
    text += &format!("  ports: [{{name: http, port: {HTTP_PORT}}}]\n");
    text += "  readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1}\n";
    text +=
        &format!("  files:\n    - path: {NGINX_CONFIGURATION}\n      content: |\n{configuration}");
    let names = (0..cold_clients).map(cold_client);
    for client in std::iter::once(CLIENT.to_owned()).chain(names) {
        text += &workload(
            &client,
            CLIENT,
            0,
            IDLE_PROGRAM[0],
            &[IDLE_PROGRAM[1].to_owned()],
        );
    }
    text + &policies(&[PORT, accept_port, HTTP_PORT])
}

fn workload(name: &str, account: &str, node: usize, program: &str, arguments: &[String]) -> String {
    let (node, arguments) = (NODES[node], serde_json::json!(arguments));
    format!(
        "---
apiVersion: heddle.dev/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: bench, labels: {{app: {name}}}}}
spec:
  serviceAccountName: {account}
  node: {node}
  command: [\"{program}\"]
  args: {arguments}
"
    )
}

/// Nothing is allowed but the clients, on these ports.
fn policies(ports: &[u16]) -> String {
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    let ports = serde_json::json!(ports);
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {WEB}, namespace: bench}}
spec:
  ipFamilyPolicy: SingleStack
  ipFamilies: [IPv4]
  selector: {{app: {WEB}}}
  ports: [{{name: http, port: {HTTP_PORT}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: clients, namespace: bench}}
spec:
  rules:
    - from:
        - source: {{principals: [\"cluster.local/ns/bench/sa/{CLIENT}\"]}}
      to:
        - operation: {{ports: {ports}}}
"
    )
}

fn indented(text: &str) -> String {
    text.lines()
        .map(|line| format!("        {line}\n"))
        .collect()
}
