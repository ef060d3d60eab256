//! One replica's container, seen from outside: its init process is started, told to stop, waited for.
//!
//! What happens inside is in `init`. The two talk over the init's standard input, a seqpacket socket
//! ([`spec`]): when this process dies, however it dies, that socket closes, init exits, and with the
//! first process of a PID namespace all others go.

pub mod spec;

use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use linux::{cgroup::Cgroup, netns::Netns, place::Placement, seqpacket};
use nix::{
    sched::{CloneFlags, unshare},
    sys::memfd::{MFdFlags, memfd_create},
};
use serde::Serialize;
use tokio::{process::Child, time::timeout};

use self::spec::{FromInit, InitSpec, ToInit};
use crate::{
    error::{During, Error},
    init,
};

/// How long the inside may take to be built. It is milliseconds unless the machine is stuck.
const BUILD_PATIENCE: Duration = Duration::from_secs(30);

/// What a container is started from.
#[derive(Debug)]
pub struct ContainerSpec<'a> {
    /// The program that has the `init` subcommand: usually `/proc/self/exe`.
    pub executable: PathBuf,
    /// What the inside is to be like.
    pub init: InitSpec,
    /// The replica's `app` cgroup.
    pub cgroup: &'a Cgroup,
    /// Folders of cgroup v1 hierarchies to join as well (limits).
    pub cgroup_v1: Vec<PathBuf>,
    /// The replica's network namespace.
    pub netns: &'a Netns,
    /// Takes standard output and standard error.
    pub output: OwnedFd,
    /// Descriptors that the program gets from number 3 on.
    pub inherit: Vec<OwnedFd>,
}

/// A running container. Dropping it ends all its processes.
#[derive(Debug)]
pub struct Container {
    init: Child,
    pid: u32,
    control: seqpacket::Stream,
    cgroup: Cgroup,
}

impl Container {
    /// Starts the container and waits until its program runs. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Container`] with what went wrong inside (such as "command not found"); missing rights.
    pub async fn start(spec: ContainerSpec<'_>) -> Result<Self, Error> {
        let cgroup = spec.cgroup.clone();
        let document = memfd("heddle-init-spec", &spec.init)?;
        let (ours, theirs) = seqpacket::pair()?;
        let control = seqpacket::Stream::from_fd(ours)?;
        let mut descriptors = vec![document.as_fd()];
        descriptors.extend(spec.inherit.iter().map(AsFd::as_fd));
        control.send(&ToInit::Start, &descriptors).await?;

        let init = spawn_init(&spec, theirs)?;
        let pid = init.id().unwrap_or_default();
        let mut container = Self {
            init,
            pid,
            control,
            cgroup,
        };
        match timeout(BUILD_PATIENCE, container.control.recv::<FromInit>()).await {
            Ok(Ok(Some((FromInit::Started, _)))) => Ok(container),
            Ok(Ok(Some((FromInit::Failed { error }, _)))) => {
                container.wait().await?;
                Err(Error::Container(error))
            }
            Ok(Ok(None) | Err(_)) => {
                let status = container.wait().await?;
                Err(Error::Container(format!(
                    "its init ended before the program ran: {status}"
                )))
            }
            Err(_) => {
                container.kill()?;
                Err(Error::Container(format!(
                    "it was not built within {BUILD_PATIENCE:?}"
                )))
            }
        }
    }

    /// Process id of the init, as this process sees it. Enter its namespaces only after a check that it still runs.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks the program to end (SIGTERM).
    pub async fn terminate(&self) {
        if let Err(error) = self.control.send(&ToInit::Terminate, &[]).await {
            tracing::debug!(pid = self.pid, %error, "container had ended already");
        }
    }

    /// Ends all processes at once.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn kill(&mut self) -> Result<(), Error> {
        Ok(self.cgroup.kill()?)
    }

    /// Waits for the end. Cancel safe; may be called again.
    ///
    /// # Errors
    /// Someone else has waited for the process.
    pub async fn wait(&mut self) -> Result<Exit, Error> {
        let status = self
            .init
            .wait()
            .await
            .during(|| format!("wait for process {}", self.pid))?;
        Ok(Exit::from(status))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // `wait` may never have been called: nothing of the container may outlive its owner.
        if let Err(error) = self.cgroup.kill() {
            tracing::error!(pid = self.pid, %error, "container could not be killed");
        }
    }
}

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The program ended with this code; 128 + N after signal N, 127 if it was not found.
    Code(i32),
    /// The whole container was killed by this signal.
    Killed(i32),
}

impl Exit {
    /// Whether it is the end that a program means by success.
    #[must_use]
    pub fn is_success(self) -> bool {
        self == Self::Code(0)
    }
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match status.code() {
            Some(code) => Self::Code(code),
            None => Self::Killed(status.signal().unwrap_or_default()),
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) if *code > 128 && *code < 128 + 65 => {
                write!(f, "exit code {code} (signal {})", code - 128)
            }
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Killed(9) => f.write_str("killed (SIGKILL), maybe by the memory limit"),
            Self::Killed(signal) => write!(f, "killed by signal {signal}"),
        }
    }
}

/// A document for a child: in memory, of any size, and the same whoever reads it how often.
pub(crate) fn memfd(name: &str, content: &impl Serialize) -> Result<OwnedFd, Error> {
    let text = serde_json::to_vec(content).during(|| format!("{name} to be written"))?;
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC)
        .during(|| format!("create the memory file {name}"))?;
    let mut file = File::from(fd);
    file.write_all(&text)
        .during(|| format!("write the memory file {name}"))?;
    Ok(file.into())
}

/// Children of a thread that has unshared CLONE_NEWPID start in a new PID namespace, the first as its init.
/// The thread serves one container only.
fn spawn_init(spec: &ContainerSpec<'_>, control: OwnedFd) -> Result<Child, Error> {
    let failed = || "start a container's init".to_owned();
    let mut placement = Placement::new()
        .cgroup(spec.cgroup.path())
        .during(|| format!("open cgroup {}", spec.cgroup.path().display()))?
        .netns(spec.netns);
    for folder in &spec.cgroup_v1 {
        placement = placement
            .cgroup(folder)
            .during(|| format!("open cgroup {}", folder.display()))?;
    }
    let output = spec.output.try_clone().during(failed)?;
    let errors = spec.output.try_clone().during(failed)?;
    let mut command = Command::new(&spec.executable);
    command
        .arg(init::SUBCOMMAND)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(control))
        .stdout(Stdio::from(output))
        .stderr(Stdio::from(errors));
    placement.apply(&mut command);

    let runtime = tokio::runtime::Handle::current();
    thread::scope(|scope| {
        let spawned = thread::Builder::new()
            .name("container".into())
            .spawn_scoped(scope, move || {
                let _entered = runtime.enter();
                unshare(CloneFlags::CLONE_NEWPID)?;
                tokio::process::Command::from(command).spawn()
            })?;
        spawned
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread panicked")))
    })
    .during(failed)
}
