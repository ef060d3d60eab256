//! The inside of a container: the first process of its PID namespace.
//!
//! The binary calls [`main`] for its hidden subcommand `init`, before it starts any thread. The order is
//! the point: namespaces, then the root filesystem (`root`), names and files (`files`), then rights are
//! given up for good (`confine`), and only then the program starts (`program`). Init itself runs with the
//! program's rights from there on; it reaps, passes SIGTERM on, and ends with the program.

pub(crate) mod confine;
mod files;
pub(crate) mod program;
mod root;

use std::{
    env, fs, io,
    os::fd::{AsFd, OwnedFd},
    process::exit,
    thread,
};

use linux::seqpacket::{recv_blocking, send_blocking};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::{SigSet, Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, sethostname},
};

use crate::{
    container::spec::{FromInit, InitSpec, ToInit},
    error::{During, Error},
    exec,
};

/// The binary's hidden subcommand that [`main`] is the body of.
pub const SUBCOMMAND: &str = "init";
/// Exit code when the container could not be built, as container engines have it.
const BUILD_FAILED: i32 = 125;
/// Exit code when whoever started the container has gone.
const ABANDONED: i32 = 128 + 9;

/// Runs as a container's init. Never returns: the exit code is the program's. With [`exec::ARGUMENT`] as
/// second argument it runs a command in a container that exists.
pub fn main() -> ! {
    if env::args_os()
        .nth(2)
        .is_some_and(|argument| argument == exec::ARGUMENT)
    {
        exec::main();
    }
    let started = start();
    let socket = io::stdin();
    match started {
        Ok(pid) => {
            let told = send_blocking(socket.as_fd(), &FromInit::Started, &[]);
            let watcher = thread::Builder::new()
                .name("control".into())
                .spawn(move || obey(pid));
            if told.is_err() || watcher.is_err() {
                exit(ABANDONED);
            }
            exit(reap_until_end_of(pid))
        }
        Err((code, error)) => {
            eprintln!("heddle: {error}");
            // Who started us may be gone: then no one needs to know.
            let _ = send_blocking(socket.as_fd(), &FromInit::Failed { error }, &[]);
            exit(code)
        }
    }
}

fn start() -> Result<Pid, (i32, String)> {
    let built = |error: Error| {
        (
            BUILD_FAILED,
            format!("the container could not be built: {error}"),
        )
    };
    let (spec, inherit) = receive_spec().map_err(built)?;
    build(&spec).map_err(built)?;

    // From here on signals are taken by `reap_until_end_of`. The program starts with none blocked.
    let signals = SigSet::from_iter([Signal::SIGCHLD]);
    signals
        .thread_block()
        .during(|| "block signals".into())
        .map_err(built)?;
    program::spawn(&spec.program, &spec.hostname, inherit)
}

fn receive_spec() -> Result<(InitSpec, Vec<OwnedFd>), Error> {
    let received = recv_blocking::<ToInit>(io::stdin().as_fd())?;
    let Some((ToInit::Start, mut descriptors)) = received else {
        return Err(Error::Container("init was started by hand".into()));
    };
    if descriptors.is_empty() {
        return Err(Error::Container("the start message has no document".into()));
    }
    let inherit = descriptors.split_off(1);
    let document = fs::File::from(descriptors.remove(0));
    // Through /proc, so that it is read from its beginning.
    let path = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&document)
    );
    let text = fs::read(&path).during(|| format!("read {path}"))?;
    let spec = serde_json::from_slice(&text).during(|| "the container's description".into())?;
    Ok((spec, inherit))
}

fn build(spec: &InitSpec) -> Result<(), Error> {
    // Processes of the container must not reach into this one, which still has open what they may not see.
    prctl::set_dumpable(false).during(|| "hide init from its children".into())?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(namespaces).during(|| "create the container's namespaces".into())?;
    root::build(&spec.scratch, spec.identity.as_deref())?;
    sethostname(&spec.hostname).during(|| format!("set the host name {}", spec.hostname))?;
    files::place(spec)?;
    confine::apply()
}

/// Does what the runtime asks, and ends the container when the runtime has gone.
fn obey(program: Pid) {
    loop {
        match recv_blocking::<ToInit>(io::stdin().as_fd()) {
            Ok(Some((ToInit::Terminate, _))) => {
                // One that has just ended needs no signal.
                let _ = kill(program, Signal::SIGTERM);
            }
            Ok(Some((ToInit::Start, _))) => {}
            Ok(None) | Err(_) => exit(ABANDONED),
        }
    }
}

/// Reaps every orphan of the namespace; returns the program's exit code at its end.
fn reap_until_end_of(program: Pid) -> i32 {
    let signals = SigSet::from_iter([Signal::SIGCHLD]);
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == program => return code,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == program => {
                return 128 + signal as i32;
            }
            Ok(WaitStatus::StillAlive) => {
                // Blocked and pending is as good as arriving now: no end is missed between the two calls.
                let _ = signals.wait();
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return BUILD_FAILED,
        }
    }
}
