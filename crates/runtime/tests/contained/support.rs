//! A pod without a mesh around it, for tests of what is inside.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, PipeReader, Read},
    os::fd::OwnedFd,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use linux::{cgroup::Cgroup, netns::Netns};
use runtime::{
    Error,
    container::{
        Container, ContainerSpec, Exit,
        spec::{InitSpec, ProgramSpec},
    },
};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A shell command in a new container prints this and succeeds.
pub(crate) fn prints(script: &str, expected: &str) {
    let (output, code) = Pod::new().run(&["sh", "-c", script]);
    assert_eq!(output, expected, "{script}");
    assert_eq!(code, 0, "{script}");
}

/// A shell command in a new container ends with this code.
pub(crate) fn exits_with(script: &str, expected: i32) {
    assert_eq!(
        Pod::new().run(&["sh", "-c", script]).1,
        expected,
        "{script}"
    );
}

/// All processes end when the process that started them is killed.
pub(crate) fn kill_the_starter_of(command: &[&str]) {
    let mut starter = Command::new("/proc/self/exe")
        .arg("run-one-and-wait")
        .args(command)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(starter.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let top = Cgroup::open(line.trim()).unwrap();
    assert!(top.is_populated());
    starter.kill().unwrap();
    starter.wait().unwrap();
    top.wait_empty(Duration::from_secs(5)).unwrap();
    top.remove_tree().unwrap();
}

/// Body of the process that [`kill_the_starter_of`] kills.
pub(crate) fn run_one_and_wait() -> ! {
    let command: Vec<String> = std::env::args().skip(2).collect();
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let mut pod = Pod::new();
    pod.block_on_started(&command, |pod, _| {
        println!("{}", pod.top.path().display());
        loop {
            thread::park();
        }
    });
    unreachable!("parked above");
}

pub(crate) struct Pod {
    pub(crate) spec: InitSpec,
    pub(crate) app: Cgroup,
    top: Cgroup,
    netns: Netns,
    scratch: TempDir,
    tokio: tokio::runtime::Runtime,
}

impl Pod {
    pub(crate) fn new() -> Self {
        let mount = linux::cgroup::find_mount().unwrap().unwrap();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let top =
            Cgroup::create(mount.join(format!("heddle.contained-{}-{number}", std::process::id())))
                .unwrap();
        let scratch = TempDir::new_in("/dev/shm").unwrap();
        Self {
            app: top.child("app").unwrap(),
            top,
            netns: Netns::create().unwrap(),
            spec: InitSpec {
                hostname: "web-0".into(),
                addresses: vec!["10.244.0.2".parse().unwrap()],
                scratch: scratch.path().into(),
                identity: None,
                nameserver: "10.96.0.10".parse().unwrap(),
                search: [
                    "shop.svc.cluster.local",
                    "svc.cluster.local",
                    "cluster.local",
                ]
                .map(String::from)
                .into(),
                files: BTreeMap::new(),
                program: ProgramSpec {
                    command: Vec::new(),
                    env: BTreeMap::new(),
                    user: None,
                    working_dir: None,
                },
            },
            scratch,
            tokio: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
        }
    }

    pub(crate) fn start(&mut self, command: &[&str]) -> Result<(Container, PipeReader), Error> {
        self.spec.program.command = command.iter().map(|word| (*word).to_owned()).collect();
        let (reader, writer) = std::io::pipe().unwrap();
        let spec = ContainerSpec {
            executable: "/proc/self/exe".into(),
            init: self.spec.clone(),
            cgroup: &self.app,
            cgroup_v1: Vec::new(),
            netns: &self.netns,
            output: OwnedFd::from(writer),
            inherit: Vec::new(),
        };
        let container = self.tokio.block_on(Container::start(spec))?;
        Ok((container, reader))
    }

    /// Output and exit code of a command that ends by itself.
    pub(crate) fn run(&mut self, command: &[&str]) -> (String, i32) {
        let (container, reader) = self.start(command).unwrap();
        let output = read_all(reader);
        (output, self.wait(container))
    }

    /// As [`Pod::run`], told to terminate `after` the program has printed `sign`.
    pub(crate) fn terminate_after(
        &mut self,
        command: &[&str],
        sign: &str,
        after: Duration,
    ) -> (String, i32) {
        let (container, mut reader) = self.start(command).unwrap();
        let mut seen = vec![0; sign.len()];
        reader.read_exact(&mut seen).unwrap();
        thread::sleep(after);
        self.tokio.block_on(container.terminate());
        let output = String::from_utf8(seen).unwrap() + &read_all(reader);
        (output, self.wait(container))
    }

    /// Calls `body` with the process id of init while the program runs.
    pub(crate) fn block_on_started(&mut self, command: &[&str], body: impl FnOnce(&Self, u32)) {
        let (container, _reader) = self.start(command).unwrap();
        body(self, container.pid());
    }

    pub(crate) fn wait(&mut self, mut container: Container) -> i32 {
        let exit = self
            .tokio
            .block_on(async { tokio::time::timeout(PATIENCE, container.wait()).await });
        match exit.unwrap().unwrap() {
            Exit::Code(code) => code,
            killed @ Exit::Killed(_) => panic!("{killed}"),
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.top.kill().unwrap();
        self.top.wait_empty(PATIENCE).unwrap();
        self.top.remove_tree().unwrap();
        assert!(self.scratch.path().exists());
    }
}

fn read_all(mut reader: PipeReader) -> String {
    let mut output = String::new();
    reader.read_to_string(&mut output).unwrap();
    output
}
