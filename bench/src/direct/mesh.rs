//! The other side: a mesh of its own with a server and a client workload on one node, under a policy that
//! names the client. Everything goes through the `heddle` command, as a user would.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::Side;
use crate::{
    protocol::ACCEPT_PORT_OFFSET,
    scenario::{Ends, PORT},
};

/// What the replicas of the start-up measurement run.
pub(crate) const IDLE_PROGRAM: [&str; 2] = ["/bin/sleep", "1000000"];

/// Name of the benchmark's mesh: other meshes on the machine go on undisturbed.
const MESH: &str = "bench";

/// A running mesh. Dropping it takes it down.
pub(crate) struct Mesh {
    name: &'static str,
    heddle: PathBuf,
    ends: Option<Ends>,
    directory: PathBuf,
}

impl Mesh {
    /// Starts a mesh with a server and a client, and returns when both run. With `splice` both ask for spliced
    /// connections.
    pub(super) fn start(heddle: &Path, ends: &Ends, splice: bool) -> anyhow::Result<Self> {
        let mut mesh = Self::up(heddle, MESH, 1, &server_and_client(ends, splice))?;
        mesh.ends = Some(ends.clone());
        Ok(mesh)
    }

    /// Brings up a mesh of these objects, and returns when all workloads are ready.
    pub(crate) fn up(
        heddle: &Path,
        name: &'static str,
        nodes: u8,
        objects: &str,
    ) -> anyhow::Result<Self> {
        let directory = std::env::temp_dir().join(format!("heddle-bench-{}", std::process::id()));
        fs::create_dir_all(&directory)
            .and_then(|()| fs::write(directory.join("bench.yaml"), objects))
            .with_context(|| format!("cannot write {}", directory.display()))?;
        let mesh = Self {
            name,
            heddle: heddle.to_owned(),
            ends: None,
            directory,
        };
        mesh.down();
        let output = mesh
            .command("up")
            .arg(&mesh.directory)
            .args(["--detach", "--nodes", &nodes.to_string()])
            .output()
            .context("cannot start heddle")?;
        ensure!(
            output.status.success(),
            "heddle up failed ({}): {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(mesh)
    }

    fn down(&self) {
        // Nothing of an earlier run is there to take down in the usual case.
        let _ = self
            .command("down")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }

    /// A subcommand of heddle's for this mesh.
    pub(crate) fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.heddle);
        command
            .args([subcommand, "--mesh", self.name])
            .stdin(Stdio::null());
        command
    }
}

impl Side for Mesh {
    fn client(&self, arguments: &[String]) -> anyhow::Result<Output> {
        let ends = self.ends.as_ref().context("this mesh has no client")?;
        self.command("exec")
            .args(["client", "--"])
            .arg(&ends.program)
            .args(arguments)
            .output()
            .context("cannot run heddle exec")
    }

    fn target(&self) -> String {
        format!("server:{PORT}")
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.down();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Time of `heddle up` until all replicas of an idle program are ready.
pub(super) fn time_of_start(heddle: &Path, replicas: u32) -> anyhow::Result<Duration> {
    let started = Instant::now();
    let mesh = Mesh::up(heddle, MESH, 1, &idle_replicas(replicas))?;
    let elapsed = started.elapsed();
    drop(mesh);
    Ok(elapsed)
}

fn server_and_client(ends: &Ends, splice: bool) -> String {
    let program = ends.program.display();
    let server_arguments = serde_json::json!(ends.server_arguments());
    let accept_port = PORT + ACCEPT_PORT_OFFSET;
    format!(
        r#"apiVersion: v1
kind: Namespace
metadata: {{name: bench}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: server, namespace: bench}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: client, namespace: bench}}
---
apiVersion: v1
kind: Service
metadata: {{name: server, namespace: bench}}
spec:
  # As the baseline: one address family on both sides.
  ipFamilyPolicy: SingleStack
  ipFamilies: [IPv4]
  selector: {{app: server}}
  ports:
    - {{name: data, port: {PORT}}}
    - {{name: accept, port: {accept_port}}}
---
apiVersion: heddle.dev/v1alpha1
kind: Workload
metadata:
  name: server
  namespace: bench
  labels: {{app: server}}
  annotations: {{heddle.dev/splice: "{splice}"}}
spec:
  serviceAccountName: server
  command: ["{program}"]
  args: {server_arguments}
  ports:
    - {{name: data, port: {PORT}}}
    - {{name: accept, port: {accept_port}}}
  readinessProbe:
    tcpSocket: {{port: accept}}
    periodSeconds: 1
---
apiVersion: heddle.dev/v1alpha1
kind: Workload
metadata:
  name: client
  namespace: bench
  labels: {{app: client}}
  annotations: {{heddle.dev/splice: "{splice}"}}
spec:
  serviceAccountName: client
  command: ["{idle}", "{forever}"]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: allow-nothing, namespace: bench}}
spec: {{}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: server, namespace: bench}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  rules:
    - from:
        - source: {{principals: ["cluster.local/ns/bench/sa/client"]}}
      to:
        - operation: {{ports: ["{PORT}", "{accept_port}"]}}
"#,
        idle = IDLE_PROGRAM[0],
        forever = IDLE_PROGRAM[1],
    )
}

fn idle_replicas(replicas: u32) -> String {
    format!(
        r#"apiVersion: heddle.dev/v1alpha1
kind: Workload
metadata: {{name: idle, labels: {{app: idle}}}}
spec:
  command: ["{}", "{}"]
  replicas: {replicas}
---
apiVersion: v1
kind: Service
metadata: {{name: idle}}
spec:
  selector: {{app: idle}}
  ports:
    - {{name: http, port: 80}}
"#,
        IDLE_PROGRAM[0], IDLE_PROGRAM[1],
    )
}
