//! The guardian, `heddle guardian`: a process that outlives a supervisor which was killed, and cleans up after it.
//!
//! It waits for the end of a pipe whose other end only the supervisor holds, and then does what is in
//! [`cleanup`]. It also holds the supervisor's lock, as a duplicate of the same open file: the
//! lock stays taken until all is cleaned, so that a new supervisor of the mesh can never be cleaned away.

use std::{
    ffi::OsString,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use linux::place::Placement;
use nix::sys::signal::{SigSet, Signal};
use thiserror::Error;

use crate::cleanup::{self, Remains, Report};

/// What can go wrong with the guardian.
#[derive(Debug, Error)]
pub enum Error {
    /// It cannot be started.
    #[error(
        "cannot start the guardian {program}, which cleans up if this process is killed: {source}", program = program.display()
    )]
    Start {
        /// The program.
        program: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It cannot do its work.
    #[error("the guardian cannot {what}: {source}; clean up with `heddle down`")]
    Watch {
        /// What it tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The supervisor's hold on its guardian. Dropping it lets the guardian clean.
#[derive(Debug)]
pub struct Guardian {
    child: Child,
    alive: io::PipeWriter,
}

impl Guardian {
    /// Starts `program guardian --run-dir DIR --cgroup DIR` in a session of its own. `lock` is a duplicate of the
    /// descriptor by which the caller holds the mesh's lock (flock(2): duplicates share the lock).
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn start(program: &Path, remains: &Remains, lock: OwnedFd) -> Result<Self, Error> {
        let mut command = Command::new(program);
        command.args(arguments(remains));
        Self::spawn(command, lock).map_err(|source| Error::Start {
            program: program.into(),
            source,
        })
    }

    /// Ends the guardian after a clean end: what is left, if anything, is cleaned, and when this returns the lock
    /// is free. The caller should have cleaned, and have dropped its own descriptor of the lock.
    ///
    /// # Errors
    /// [`Error::Watch`] if it was lost; it has left nothing undone that the caller did not.
    pub fn finish(mut self) -> Result<(), Error> {
        drop(self.alive);
        self.child
            .wait()
            .map(drop)
            .map_err(|source| watch("be waited for", source))
    }

    fn spawn(mut command: Command, lock: OwnedFd) -> io::Result<Self> {
        let (reader, alive) = io::pipe()?;
        command
            .stdin(Stdio::from(reader))
            .stdout(Stdio::null())
            // It must keep no file system busy.
            .current_dir("/");
        Placement::new().inherit(vec![lock])?.apply(&mut command);
        let child = command.spawn()?;
        Ok(Self { child, alive })
    }
}

/// The body of `heddle guardian`: blocks until `pipe`, the standard input, ends, and cleans. To be called before any other
/// thread is started: SIGINT, SIGTERM and SIGHUP are blocked for good, since they come to the supervisor's
/// whole group just when the guardian is needed.
///
/// # Errors
/// [`Error::Watch`]; nothing was cleaned then. What could not be cleaned is in the report.
pub fn run(mut pipe: impl Read, remains: &Remains) -> Result<Report, Error> {
    let ignored = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    ignored
        .thread_block()
        .map_err(|errno| watch("block signals", errno.into()))?;
    io::copy(&mut pipe, &mut io::sink())
        .map_err(|source| watch("wait for the supervisor's end", source))?;
    Ok(cleanup::clean_mesh(remains))
}

fn arguments(remains: &Remains) -> [OsString; 5] {
    [
        "guardian".into(),
        "--run-dir".into(),
        remains.run_dir.clone().into(),
        "--cgroup".into(),
        remains.cgroup.clone().into(),
    ]
}

fn watch(what: &'static str, source: io::Error) -> Error {
    Error::Watch { what, source }
}

#[cfg(test)]
mod tests {
    use std::{
        env, fs,
        io::{BufRead, BufReader},
        thread,
        time::{Duration, Instant},
    };

    use linux::{cgroup::Cgroup, pidfd::PidFd};
    use nix::fcntl::{Flock, FlockArg};

    use super::*;
    use crate::cleanup::tests::remains;

    /// Set for the processes that the tests start from their own binary: `ROLE RUN_DIR CGROUP`.
    const ROLE: &str = "HEDDLE_TEST_GUARDIAN";

    /// The test that plays the roles, in a process of its own, on its main thread.
    fn play(role: &str, remains: &Remains) -> Command {
        let mut command = Command::new(env::current_exe().unwrap());
        let test = "guardian::tests::a_killed_supervisor_leaves_nothing";
        command
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(
                ROLE,
                format!(
                    "{role} {} {}",
                    remains.run_dir.display(),
                    remains.cgroup.display()
                ),
            );
        command
    }

    fn playing(text: &str) {
        let mut words = text.split(' ');
        let role = words.next().unwrap();
        let remains = Remains {
            run_dir: words.next().unwrap().into(),
            cgroup: words.next().unwrap().into(),
            keep: None,
        };
        if role == "guardian" {
            let report = run(io::stdin(), &remains).unwrap();
            assert!(report.errors.is_empty(), "{report:?}");
            return;
        }
        let lock = fs::File::create(remains.run_dir.join("lock")).unwrap();
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
        let shared = lock.try_clone().unwrap().into();
        let guardian = Guardian::spawn(play("guardian", &remains), shared).unwrap();
        println!("\nguardian {}", guardian.child.id());
        if role == "ending" {
            drop(lock);
            guardian.finish().unwrap();
            assert!(!remains.run_dir.exists());
            return;
        }
        // Until it is killed; the bound is for the case that it is not.
        thread::sleep(Duration::from_secs(60));
    }

    fn within_ten_seconds(what: &str, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_killed_supervisor_leaves_nothing() {
        if let Ok(text) = env::var(ROLE) {
            return playing(&text);
        }
        let remains = remains("guardian");
        fs::create_dir_all(&remains.run_dir).unwrap();
        let cgroup = Cgroup::create(remains.cgroup.join("a")).unwrap();
        let mut workload = Command::new("sleep").arg("60").spawn().unwrap();
        cgroup.add_pid(workload.id()).unwrap();

        let mut supervisor = play("supervisor", &remains)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let guardian = BufReader::new(supervisor.stdout.take().unwrap())
            .lines()
            .find_map(|line| line.unwrap().strip_prefix("guardian ")?.parse().ok())
            .unwrap();
        // Signals that would end it come only when it is ready for them: it says so by blocking them.
        let status = format!("/proc/{guardian}/status");
        within_ten_seconds("the guardian blocks signals", || {
            fs::read_to_string(&status)
                .unwrap()
                .lines()
                .filter_map(|line| line.strip_prefix("SigBlk:"))
                .any(|mask| u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask != 0))
        });
        let guardian = PidFd::open(guardian).unwrap();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            guardian.signal(signal).unwrap();
        }
        assert!(guardian.is_alive() && remains.run_dir.exists());

        let lock = fs::File::open(remains.run_dir.join("lock")).unwrap();
        supervisor.kill().unwrap();
        supervisor.wait().unwrap();
        assert!(!workload.wait().unwrap().success());
        let mut lock = Some(lock);
        within_ten_seconds("the lock is free", || {
            let file = lock.take().unwrap();
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(_) => true,
                Err((file, _)) => {
                    lock = Some(file);
                    false
                }
            }
        });
        assert!(!remains.run_dir.exists() && !remains.cgroup.exists());
    }

    #[test]
    fn a_supervisor_that_ends_well_waits_for_its_guardian() {
        let remains = remains("ending");
        fs::create_dir_all(&remains.run_dir).unwrap();
        let ended = play("ending", &remains).output().unwrap();
        assert!(ended.status.success(), "{ended:?}");
        assert!(!remains.run_dir.exists());
    }

    #[test]
    fn a_guardian_that_cannot_be_started_is_an_error() {
        let lock = fs::File::open("/dev/null").unwrap().into();
        let error = Guardian::start(Path::new("/nonexistent"), &remains("none"), lock);
        assert!(matches!(error, Err(Error::Start { .. })));
    }
}
