//! How a mesh ends: well, badly, and twice. Nothing of it stays on the machine.

use std::{
    collections::BTreeSet,
    fs::File,
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use linux::pidfd::PidFd;
use nix::sys::signal::Signal;

use crate::harness::{
    Mesh, Outcome, PATIENCE,
    leftovers::{cgroup_of, processes_below, processes_of, run_dir},
    objects::{client, namespace, server, service},
    until,
};

/// A guardian is done by then.
const CRASH_PATIENCE: Duration = Duration::from_secs(10);

fn objects() -> String {
    [
        namespace("shop"),
        // It does not end when it is asked to, nor do those that it leaves behind.
        client("shop/client", ""),
        server("shop/web", &[8000], "  replicas: 2\n"),
        service("shop/web", &[(80, 8000)]),
    ]
    .concat()
}

#[test]
fn an_interrupted_mesh_leaves_nothing() {
    let mesh = Mesh::prepare("interrupted", &[("objects.yaml", &objects())]);
    let mut up = Foreground::start(&mesh);
    // A second one of the same name is told so, and hurts nobody.
    let second = mesh.run("up", &[mesh.folder().to_str().unwrap()]);
    assert_eq!(second.code, 1, "{second:#?}");
    assert!(second.stderr.contains("already up"), "{second:#?}");
    let said = format!("process {}", up.pid());
    assert!(second.stderr.contains(&said), "{second:#?}");
    mesh.connect("client", "web", 80).greeting();

    up.signal(Signal::SIGINT);
    assert_eq!(up.wait().code(), Some(0), "{}", up.log());
    assert_eq!(mesh.leftovers(), Vec::<String>::new());

    // Down, and down again; up again after that.
    let down = mesh.run("down", &[]).success();
    assert!(down.stdout.contains("is not running"), "{down:#?}");
    up_in_the_background_holds_nothing_of_its_caller(&mesh);
    let processes = processes_below(&cgroup_of(mesh.name()));
    assert!(processes.len() > 3, "{processes:?}");
    let down = mesh.run("down", &[]).success();
    assert!(down.stdout.contains("is down"), "{down:#?}");
    assert_eq!(mesh.leftovers(), Vec::<String>::new());
    until_gone(&processes);
    let down = mesh.run("down", &[]).success();
    assert!(down.stdout.contains("is not running"), "{down:#?}");
    let status = mesh.run("status", &[]);
    assert_eq!(status.code, 1);
    assert!(status.stderr.contains("heddle up"), "{status:#?}");
}

/// A lock that the caller holds, through a descriptor that its children inherit, ends with the caller.
fn up_in_the_background_holds_nothing_of_its_caller(mesh: &Mesh) {
    let lock = mesh.folder().join("lock");
    let up = mesh.command("up");
    let mut under_lock = Command::new("flock");
    under_lock
        .arg(&lock)
        .arg(up.get_program())
        .args(up.get_args())
        .arg(mesh.folder())
        .args(["--detach", "--timeout", "60"]);
    Outcome::of(&mut under_lock).success();
    Outcome::of(
        Command::new("flock")
            .arg("--nonblock")
            .arg(&lock)
            .arg("true"),
    )
    .success();
}

#[test]
fn a_killed_mesh_leaves_nothing() {
    let mesh = Mesh::prepare("killed", &[("objects.yaml", &objects())]);
    let mut up = Foreground::start(&mesh);
    // Orphans and sessions of their own are met, too.
    let line = "trap '' TERM; setsid sleep infinity > /dev/null 2>&1 &";
    mesh.shell("client", line).success();
    let processes = processes_below(&cgroup_of(mesh.name()));
    up.signal(Signal::SIGKILL);
    up.wait();
    until("the guardian has cleaned up", CRASH_PATIENCE, || {
        nothing_of(&mesh)
    });
    until_gone(&processes);

    // The guardian dies as well: whoever comes next cleans up, first `down`, then `up`.
    let processes = kill_all_that_could_clean(&mesh);
    let down = mesh.run("down", &[]).success();
    assert!(down.stdout.contains("is down"), "{down:#?}");
    assert_eq!(mesh.leftovers(), Vec::<String>::new());
    until_gone(&processes);
    kill_all_that_could_clean(&mesh);
    mesh.up(&[]);
    mesh.connect("client", "web", 80).greeting();
    assert_eq!(mesh.replica("shop/web-0").status.restarts, 0);
}

/// Starts a mesh, kills its guardian and its supervisor, and returns its processes.
fn kill_all_that_could_clean(mesh: &Mesh) -> BTreeSet<u32> {
    let mut up = Foreground::start(mesh);
    let processes = processes_below(&cgroup_of(mesh.name()));
    let guardian = processes_of(mesh.name())
        .into_iter()
        .find(|(_, command)| command.contains(" guardian "))
        .expect("there is a guardian");
    PidFd::open(guardian.0)
        .unwrap()
        .signal(Signal::SIGKILL)
        .unwrap();
    up.signal(Signal::SIGKILL);
    up.wait();
    assert!(cgroup_of(mesh.name()).exists() && run_dir(mesh.name()).exists());
    processes
}

fn nothing_of(mesh: &Mesh) -> Result<(), String> {
    let left = mesh.leftovers();
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("{left:#?}"))
    }
}

fn until_gone(processes: &BTreeSet<u32>) {
    until("all processes have ended", PATIENCE, || {
        let is_there = |pid: &&u32| PidFd::open(**pid).is_ok_and(|process| process.is_alive());
        match processes.iter().find(is_there) {
            Some(pid) => Err(format!("process {pid} runs")),
            None => Ok(()),
        }
    });
}

/// `heddle up` as one runs it in a terminal.
struct Foreground {
    child: Child,
    log: std::path::PathBuf,
}

impl Foreground {
    /// Returns when everything is ready.
    fn start(mesh: &Mesh) -> Self {
        let log = mesh.folder().join("up.log");
        let file = File::create(&log).unwrap();
        let child = mesh
            .command("up")
            .arg(mesh.folder())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        let up = Self { child, log };
        mesh.until_status("everything is ready", |status| {
            status.pid == up.pid() && status.workloads.len() == 3 && status.is_ready()
        });
        up
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: Signal) {
        PidFd::open(self.pid()).unwrap().signal(signal).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}
