//! The node of a test: two workloads with a cgroup each, the socket, and its server on a runtime of its own.

use std::{
    io::{BufRead, BufReader},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use identity::{
    SpiffeId,
    attest::{AttestError, Attestor, Caller, KernelAttestor, Workloads},
    socket::{Hooks, Limits, Refusal, serve},
};
use linux::{
    cgroup::{Cgroup, location::CgroupMount},
    peer::Moment,
    place::Placement,
};
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::source::Source;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
static NEXT: AtomicU32 = AtomicU32::new(0);

pub(crate) struct World {
    pub(crate) source: Arc<Source>,
    pub(crate) workloads: Workloads,
    /// While it is `false`, nobody is attested: callers wait.
    pub(crate) attesting: watch::Sender<bool>,
    pub(crate) runtime: Runtime,
    stop: CancellationToken,
    server: Option<JoinHandle<std::io::Result<()>>>,
    refusals: Arc<Mutex<Vec<Refusal>>>,
    listener: UnixListener,
    limits: Limits,
    folder: TempDir,
    top: Cgroup,
}

/// The kernel's answer, at a moment that the test chooses.
struct Held {
    kernel: KernelAttestor,
    attesting: watch::Receiver<bool>,
}

impl Attestor for Held {
    fn attest(&self, stream: &UnixStream, unconnected: Moment) -> Result<Caller, AttestError> {
        let start = Instant::now();
        while !*self.attesting.borrow() {
            assert!(start.elapsed() < PATIENCE);
            std::thread::yield_now();
        }
        self.kernel.attest(stream, unconnected)
    }
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(Limits::default())
    }

    pub(crate) fn with(limits: Limits) -> Self {
        let mount = linux::cgroup::find_mount().unwrap().unwrap();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("heddle.identity-{}-{number}", std::process::id());
        let top = Cgroup::create(mount.join(name)).unwrap();
        let folder = TempDir::new().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = folder.path().join("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let workloads = Workloads::default();
        let mut world = Self {
            source: Arc::new(Source::new()),
            workloads,
            attesting: watch::Sender::new(true),
            runtime: Runtime::new().unwrap(),
            stop: CancellationToken::new(),
            server: None,
            refusals: Arc::default(),
            listener,
            limits,
            folder,
            top,
        };
        world.workloads.replace(["a", "b"].map(|name| {
            world.cgroup(name).child("app").unwrap();
            let caller = Caller {
                uid: format!("shop/{name}-0").into(),
                id: id(name),
            };
            (world.cgroup(name).path().to_owned(), caller)
        }));
        world.start();
        world
    }

    /// Starts a server on the socket that is there.
    pub(crate) fn start(&mut self) {
        self.stop = CancellationToken::new();
        let refusals = Arc::clone(&self.refusals);
        let attestor = Held {
            kernel: KernelAttestor::new(self.workloads.clone()).unwrap(),
            attesting: self.attesting.subscribe(),
        };
        self.server = Some(self.runtime.spawn(serve(
            self.listener.try_clone().unwrap(),
            Arc::new(attestor),
            Arc::clone(&self.source),
            self.limits,
            Hooks::new(move |refusal| refusals.lock().unwrap().push(refusal)),
            self.stop.clone(),
        )));
    }

    /// Ends the server; the socket stays.
    pub(crate) fn stop(&mut self) {
        self.stop.cancel();
        let server = self.server.take().unwrap();
        self.runtime.block_on(server).unwrap().unwrap();
    }

    pub(crate) fn cgroup(&self, name: &str) -> Cgroup {
        self.top.child(name).unwrap()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    pub(crate) fn refusals(&self, refusal: Refusal) -> usize {
        let refusals = self.refusals.lock().unwrap();
        refusals.iter().filter(|one| **one == refusal).count()
    }

    /// A program in a workload's cgroup (`a`, `b`) or elsewhere in the mesh's.
    pub(crate) fn spawn(&self, cgroup: &str, mut command: Command) -> Process {
        let cgroup = self.cgroup(cgroup).child("app").unwrap();
        let socket = format!("unix://{}", self.socket().display());
        command
            .env("SPIFFE_ENDPOINT_SOCKET", socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        Placement::new()
            .cgroup(cgroup.path())
            .unwrap()
            .apply(&mut command);
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        // Ends with the program's output.
        std::thread::spawn(move || {
            for line in output.lines() {
                let Ok(line) = line else { return };
                let _ = sender.send(line);
            }
        });
        Process { child, lines }
    }

    /// The Python client of `client.py`.
    pub(crate) fn python(&self, cgroup: &str, arguments: &[&str]) -> Process {
        let venv = std::env::var_os("HEDDLE_VENV").map_or_else(
            || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/heddle/venv"),
            PathBuf::from,
        );
        let python = venv.join("bin/python");
        assert!(
            python.exists(),
            "{} is missing: run scripts/install.sh",
            python.display()
        );
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/socket/client.py");
        let mut command = Command::new(python);
        command.arg(script).args(arguments);
        self.spawn(cgroup, command)
    }

    /// This program as SDS client.
    pub(crate) fn sds(&self, cgroup: &str, names: &[&str]) -> Process {
        let mut process = self.this_program("sds", cgroup, names);
        assert_eq!(process.line(), "connected");
        process
    }

    /// As [`World::sds`], but the process that connects ends at once, and a child of its goes on with the socket.
    pub(crate) fn heir(&self, cgroup: &str, names: &[&str]) -> Process {
        self.this_program("leave", cgroup, names)
    }

    fn this_program(&self, role: &str, cgroup: &str, names: &[&str]) -> Process {
        let mut command = Command::new("/proc/self/exe");
        command.arg(role).arg(self.socket()).args(names);
        self.spawn(cgroup, command)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
        let _ = self.top.kill();
        let _ = self.top.wait_empty(PATIENCE);
        let _ = self.top.remove_tree();
    }
}

/// This process is a workload of the world for a while.
pub(crate) struct Inside {
    home: Cgroup,
}

impl Inside {
    pub(crate) fn of(world: &World, name: &str) -> Self {
        let text = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let home = text
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .unwrap();
        let home = CgroupMount::find().unwrap().folder(home).unwrap();
        world.cgroup(name).add_pid(std::process::id()).unwrap();
        Self {
            home: Cgroup::open(home).unwrap(),
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.home.add_pid(std::process::id()).unwrap();
    }
}

/// The identity of workload `name`.
pub(crate) fn id(name: &str) -> SpiffeId {
    SpiffeId::of_account(crate::source::DOMAIN, "shop", name).unwrap()
}

/// A client that prints a line per event.
pub(crate) struct Process {
    pub(crate) child: Child,
    lines: mpsc::Receiver<String>,
}

impl Process {
    /// The next line.
    pub(crate) fn line(&mut self) -> String {
        self.lines.recv_timeout(PATIENCE).unwrap()
    }

    /// The next line, as JSON.
    pub(crate) fn json(&mut self) -> serde_json::Value {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    pub(crate) fn end(self) -> Output {
        self.child.wait_with_output().unwrap()
    }
}
