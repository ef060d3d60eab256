//! Running a command inside of a pod that runs already: its namespaces, its cgroup and so its identity,
//! and no more rights than its own program has. The body of `heddle exec`, and of exec probes.

use std::{
    fs,
    os::{fd::AsFd, unix::process::ExitStatusExt},
    path::PathBuf,
    process::{Child, Command, Stdio, exit},
};

use linux::{cgroup::Cgroup, pidfd::PidFd, place::Placement};
use nix::{
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        signal::{SigSet, Signal, kill},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::{
    container::{memfd, spec::ProgramSpec},
    error::{During, Error},
    init::{self, confine, program},
};

/// Second argument of the hidden subcommand `init` for what [`main`] does.
pub(crate) const ARGUMENT: &str = "exec";
const FAILED: i32 = 125;

/// Which pod to enter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecTarget {
    /// `NAMESPACE/POD`.
    pub uid: String,
    /// Its host name.
    pub hostname: String,
    /// Process id of its init.
    pub pid: u32,
    /// Its `app` cgroup.
    pub cgroup: PathBuf,
    /// Folders of cgroup v1 hierarchies that its processes are in.
    pub cgroup_v1: Vec<PathBuf>,
}

/// What to run where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecSpec {
    /// The pod.
    pub target: ExecTarget,
    /// The command.
    pub program: ProgramSpec,
}

/// Runs the command with this process's standard input and outputs, and returns its exit code (128 + N
/// after signal N, 127 if it is not found). The calling process must have one thread; it has entered the
/// pod for good afterwards, so the only sensible thing to do then is to exit.
///
/// # Errors
/// The pod has ended meanwhile, or its namespaces cannot be entered.
pub fn run(spec: &ExecSpec) -> Result<i32, Error> {
    prctl::set_dumpable(false).during(|| "hide this process from the pod".into())?;
    enter(&spec.target)?;
    confine::apply()?;

    let signals = SigSet::from_iter([
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
    ]);
    signals.thread_block().during(|| "block signals".into())?;
    let placement = Placement::new().dies_with_parent().keeps_session();
    let prepared = program::prepare(&spec.program, &spec.target.hostname, placement, Vec::new());
    let (code, message) = match prepared {
        Ok(mut command) => match command.spawn() {
            Ok(child) => return wait(child, &signals),
            Err(error) => program::explain(&spec.program, &error),
        },
        Err(failed) => failed,
    };
    eprintln!("heddle: {message}");
    Ok(code)
}

/// Body of the hidden subcommand `init exec`: an [`ExecSpec`] comes as JSON in descriptor 3.
/// Call it before any thread is started.
pub(crate) fn main() -> ! {
    let path = "/proc/self/fd/3";
    let code = fs::read(path)
        .during(|| format!("read {path}"))
        .and_then(|text| serde_json::from_slice(&text).during(|| "the command to run".into()))
        .and_then(|spec| run(&spec));
    exit(code.unwrap_or_else(|error| {
        eprintln!("heddle: {error}");
        FAILED
    }))
}

/// A command that runs `executable`'s hidden subcommand with this specification, its standard streams null.
///
/// # Errors
/// Out of memory or descriptors.
pub fn command(executable: &std::path::Path, spec: &ExecSpec) -> Result<Command, Error> {
    let document = memfd("heddle-exec-spec", spec)?;
    let mut command = Command::new(executable);
    command
        .args([init::SUBCOMMAND, ARGUMENT])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Placement::new()
        .inherit(vec![document])
        .during(|| "pass the command on".into())?
        .apply(&mut command);
    Ok(command)
}

/// The cgroup first: from the first namespace on, the hierarchy is out of sight.
fn enter(target: &ExecTarget) -> Result<(), Error> {
    let gone = || Error::Unknown {
        what: "running pod",
        name: target.uid.clone(),
    };
    let init = PidFd::open(target.pid).map_err(|_| gone())?;
    // The number may belong to another process by now; one in the pod's cgroup is the pod's.
    let cgroup = Cgroup::open(&target.cgroup).map_err(|_| gone())?;
    if !cgroup.procs()?.contains(&target.pid) || !init.is_alive() {
        return Err(gone());
    }
    for folder in std::iter::once(&target.cgroup).chain(&target.cgroup_v1) {
        let procs = folder.join("cgroup.procs");
        fs::write(&procs, "0").during(|| format!("join {}", folder.display()))?;
    }
    let namespaces = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWNS;
    setns(init.as_fd(), namespaces).during(|| format!("enter the namespaces of pod {}", target.uid))
}

/// Without a thread, which no process can start whose children belong to another PID namespace. Ctrl-C
/// reaches the command through the terminal; what is sent to this process alone is passed on.
fn wait(mut child: Child, signals: &SigSet) -> Result<i32, Error> {
    let pid = Pid::from_raw(child.id().cast_signed());
    loop {
        if let Some(status) = child.try_wait().during(|| "wait for the command".into())? {
            return Ok(status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()));
        }
        if let Ok(signal @ (Signal::SIGTERM | Signal::SIGHUP)) = signals.wait() {
            // One that has just ended needs no signal.
            let _ = kill(pid, signal);
        }
    }
}
