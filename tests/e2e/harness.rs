//! What all tests share: a mesh of their own, and ways to look at it.
//!
//! The mesh and its commands are here; what a client inside a workload sees is in [`probe`], the objects that
//! tests write are in [`objects`], what a node counts is in [`metrics`], what must be gone at the end is in [`leftovers`].

pub(crate) mod leftovers;
pub(crate) mod metrics;
pub(crate) mod objects;
pub(crate) mod probe;

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{self, Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use api::report::{Explanation, FlowRecord, MeshStatus, NodeStatus, Replica};
use linux::netns::Netns;
use tempfile::TempDir;

/// How long anything that happens by itself may take before the test says that it does not happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);
/// How long an edit of a file may take to be in force.
pub(crate) const EDIT_PATIENCE: Duration = Duration::from_secs(5);
/// A refusal that takes longer is not immediate. (It is microseconds; this leaves room for a busy machine.)
pub(crate) const AT_ONCE: f64 = 200.0;
/// `heddle explain`'s exit code for "no".
pub(crate) const EXPLAINED_NO: i32 = 3;

/// A mesh. Dropping it stops it and checks that nothing of it is left on the machine.
pub(crate) struct Mesh {
    name: String,
    folder: TempDir,
}

impl Mesh {
    /// Runs `files` (name and text) as a mesh; returns when everything in it is ready.
    pub(crate) fn start(topic: &str, files: &[(&str, &str)]) -> Self {
        Self::start_with(topic, files, &[])
    }

    /// As [`Mesh::start`], with more arguments for `heddle up`.
    pub(crate) fn start_with(topic: &str, files: &[(&str, &str)], arguments: &[&str]) -> Self {
        let mesh = Self::prepare(topic, files);
        mesh.up(arguments);
        mesh
    }

    /// Only the folder; nothing runs yet.
    pub(crate) fn prepare(topic: &str, files: &[(&str, &str)]) -> Self {
        let mesh = Self {
            name: format!("e2e-{topic}-{}", process::id()),
            folder: tempfile::tempdir().unwrap(),
        };
        for (name, text) in files {
            mesh.write(name, text);
        }
        mesh
    }

    /// `heddle up --detach`, until everything is ready.
    pub(crate) fn up(&self, arguments: &[&str]) {
        let folder = self.folder().to_str().unwrap();
        let mut all = vec![folder, "--detach", "--timeout", "60"];
        all.extend(arguments);
        self.run("up", &all).success();
    }

    /// The mesh's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The folder with the objects.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file of objects, as an editor does: the new text replaces the old one at once.
    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.folder().join(name);
        let draft = path.with_extension("draft");
        fs::write(&draft, text).unwrap();
        fs::rename(&draft, &path).unwrap();
    }

    /// `heddle SUBCOMMAND --mesh NAME`, to be given more arguments.
    pub(crate) fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(heddle());
        command
            .args([subcommand, "--mesh", &self.name])
            .stdin(Stdio::null());
        command
    }

    /// Runs a subcommand to its end.
    pub(crate) fn run(&self, subcommand: &str, arguments: &[&str]) -> Outcome {
        Outcome::of(self.command(subcommand).args(arguments))
    }

    /// Runs a command in a workload.
    pub(crate) fn exec(&self, workload: &str, command: &[&str]) -> Outcome {
        let mut arguments = vec![workload, "--"];
        arguments.extend(command);
        self.run("exec", &arguments)
    }

    /// Runs a line of shell in a workload.
    pub(crate) fn shell(&self, workload: &str, line: &str) -> Outcome {
        self.exec(workload, &["sh", "-c", line])
    }

    /// Starts a command in a workload with both ends of it in the test's hands.
    pub(crate) fn spawn_exec(&self, workload: &str, command: &[&str]) -> Child {
        self.command("exec")
            .args([workload, "--"])
            .args(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// `heddle status`, if the mesh answers.
    pub(crate) fn try_status(&self) -> Option<MeshStatus> {
        let outcome = self.run("status", &["-o", "json"]);
        // Its exit code says whether all is well.
        serde_json::from_str(&outcome.stdout).ok()
    }

    /// `heddle status`.
    pub(crate) fn status(&self) -> MeshStatus {
        self.try_status()
            .unwrap_or_else(|| panic!("mesh {} does not answer", self.name))
    }

    /// Waits until the status is as wanted, and returns it.
    pub(crate) fn until_status(
        &self,
        what: &str,
        wanted: impl Fn(&MeshStatus) -> bool,
    ) -> MeshStatus {
        until(what, PATIENCE, || match self.try_status() {
            Some(status) if wanted(&status) => Ok(status),
            status => Err(format!("{status:#?}")),
        })
    }

    /// One replica, by `NAMESPACE/NAME`.
    pub(crate) fn replica(&self, uid: &str) -> Replica {
        find_replica(&self.status(), uid)
            .cloned()
            .unwrap_or_else(|| panic!("there is no {uid}"))
    }

    /// Waits until a replica is as wanted.
    pub(crate) fn until_replica(
        &self,
        uid: &str,
        what: &str,
        wanted: impl Fn(&Replica) -> bool,
    ) -> Replica {
        let what = format!("{uid} {what}");
        let status = self.until_status(&what, |status| {
            find_replica(status, uid).is_some_and(&wanted)
        });
        find_replica(&status, uid).unwrap().clone()
    }

    /// A replica's IPv4 and IPv6 address.
    pub(crate) fn addresses(&self, uid: &str) -> [IpAddr; 2] {
        self.replica(uid).status.addresses.try_into().unwrap()
    }

    /// What one node's agent says.
    pub(crate) fn node(&self, name: &str) -> NodeStatus {
        let status = self.status();
        let entry = status.nodes.into_iter().find(|entry| entry.node == name);
        let entry = entry.unwrap_or_else(|| panic!("there is no {name}"));
        entry
            .status
            .unwrap_or_else(|| panic!("{name} does not answer: {:?}", entry.error))
    }

    /// How often a reason came up on a node.
    pub(crate) fn count(&self, node: &str, reason: &str) -> u64 {
        let reasons = self.node(node).reasons;
        let found = reasons.iter().find(|counted| counted.reason == reason);
        found.map_or(0, |counted| counted.count)
    }

    /// A node's network namespace: Heddle's own, so that a test may stand in it as a stranger to the mesh.
    pub(crate) fn namespace_of_node(&self, name: &str) -> Netns {
        Netns::open(format!("/proc/{}/ns/net", self.node(name).pid)).unwrap()
    }

    /// `heddle flows`.
    pub(crate) fn flows(&self, arguments: &[&str]) -> Vec<FlowRecord> {
        let mut all = vec!["-o", "json"];
        all.extend(arguments);
        let outcome = self.run("flows", &all).success();
        let lines = outcome.stdout.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Waits for a flow record: they are read from the kernel a few times a second.
    pub(crate) fn until_flow(
        &self,
        what: &str,
        arguments: &[&str],
        wanted: impl Fn(&FlowRecord) -> bool,
    ) -> FlowRecord {
        until(what, PATIENCE, || {
            let flows = self.flows(arguments);
            let found = flows.iter().rfind(|flow| wanted(flow)).cloned();
            found.ok_or_else(|| format!("{flows:#?}"))
        })
    }

    /// `heddle explain`, whose exit code must fit its answer.
    pub(crate) fn explain(&self, source: &str, destination: &str) -> Explanation {
        let outcome = self.run("explain", &["-o", "json", source, destination]);
        let answer: Explanation = serde_json::from_str(&outcome.stdout)
            .unwrap_or_else(|error| panic!("{error}: {outcome:#?}"));
        let allowed = answer.verdict == api::report::Verdict::Allowed;
        assert_eq!(
            outcome.code,
            if allowed { 0 } else { EXPLAINED_NO },
            "{outcome:#?}"
        );
        answer
    }

    /// Waits until `heddle explain` gives this reason: an edit is in force.
    pub(crate) fn until_explained(
        &self,
        source: &str,
        destination: &str,
        reason: &str,
    ) -> Explanation {
        let what = format!("{source} -> {destination} is {reason}");
        until(&what, EDIT_PATIENCE, || {
            let answer = self.explain(source, destination);
            if answer.reason == reason {
                Ok(answer)
            } else {
                Err(format!("{answer:#?}"))
            }
        })
    }

    /// What must be gone when the mesh is.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        leftovers::of(&self.name)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if thread::panicking() {
            self.tell_what_happened();
        }
        let outcome = self.run("down", &[]);
        let left = self.leftovers();
        if !thread::panicking() {
            assert_eq!(outcome.code, 0, "{outcome:#?}");
            assert!(left.is_empty(), "left behind: {left:#?}");
        }
    }
}

impl Mesh {
    /// For whoever has to find out why a test failed.
    fn tell_what_happened(&self) {
        let log = leftovers::run_dir(&self.name).with_extension("log");
        let text = fs::read_to_string(log).unwrap_or_default();
        eprintln!("--- log of mesh {}\n{text}", self.name);
        let Some(status) = self.try_status() else {
            return;
        };
        eprintln!("{}", self.run("status", &[]).stdout);
        for node in &status.nodes {
            let log = self.run("logs", &[&format!("node/{}", node.node)]);
            eprintln!("--- log of {}\n{}", node.node, log.stdout);
        }
        eprintln!("--- flows\n{}", self.run("flows", &["--summary"]).stdout);
    }
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// Runs the command to its end.
    pub(crate) fn of(command: &mut Command) -> Self {
        let output = command
            .output()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        output.into()
    }

    /// It must have ended with 0.
    #[track_caller]
    pub(crate) fn success(self) -> Self {
        assert_eq!(self.code, 0, "{self:#?}");
        self
    }
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        Self {
            // A signal is no exit code that any test expects.
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The command under test: built beside this program, in the same profile.
pub(crate) fn heddle() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    // PROFILE/deps/e2e-HASH
    let path = own.ancestors().nth(2).unwrap().join("heddle");
    assert!(
        path.is_file(),
        "{} is not built: run `cargo build --release --bin heddle` first, or `make test`",
        path.display()
    );
    path
}

/// Looks again and again until there is something to return; panics with what was seen last.
#[track_caller]
pub(crate) fn until<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) if start.elapsed() > patience => {
                panic!("not so after {patience:?}: {what}; seen last: {seen}")
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn find_replica<'a>(status: &'a MeshStatus, uid: &str) -> Option<&'a Replica> {
    status
        .workloads
        .iter()
        .find(|replica| replica.status.uid == uid)
}
