//! The guardian, `heddle guardian`: a process that outlives a supervisor which was killed, and cleans up after it.
//!
//! It waits for the end of a pipe whose other end only the supervisor holds. If that came without a word, it does
//! what is in [`cleanup`]. It also holds the supervisor's lock, as a duplicate of the same open file: the
//! lock stays taken until all is cleaned, so that a new supervisor of the mesh can never be cleaned away.

mod signals;

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
};

use linux::place::{FIRST_INHERITED, Placement};
use nix::sys::signal::Signal;
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

/// The binary's hidden subcommand that [`main`] is the body of.
pub const SUBCOMMAND: &str = "guardian";
/// What a supervisor says that has cleaned up itself.
const ALL_DONE: &[u8] = b".";

/// The supervisor's hold on its guardian. Dropping it lets the guardian clean, as a crash does.
#[derive(Debug)]
pub struct Guardian {
    child: Child,
    alive: io::PipeWriter,
}

impl Guardian {
    /// Starts `program guardian --run-dir DIR --cgroup DIR --lock FILE` in a session of its own. `held` is a duplicate
    /// of the descriptor by which the caller holds `lock` (flock(2): duplicates share the lock).
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn start(
        program: &Path,
        remains: &Remains,
        lock: &Path,
        held: OwnedFd,
    ) -> Result<Self, Error> {
        let mut command = Command::new(program);
        command.args(arguments(remains, lock));
        Self::spawn(command, held).map_err(|source| Error::Start {
            program: program.into(),
            source,
        })
    }

    /// Ends the guardian without its cleaning, since the caller has cleaned. The caller must still hold the lock;
    /// it may give it up after this.
    ///
    /// # Errors
    /// [`Error::Watch`] if the guardian had ended before.
    pub fn finish(mut self) -> Result<(), Error> {
        let told = self.alive.write_all(ALL_DONE);
        drop(self.alive);
        told.and_then(|()| self.child.wait())
            .map(drop)
            .map_err(|source| watch("be told of the end", source))
    }

    fn spawn(mut command: Command, held: OwnedFd) -> io::Result<Self> {
        let (reader, alive) = io::pipe()?;
        command
            .stdin(Stdio::from(reader))
            .stdout(Stdio::null())
            // It must keep no file system busy.
            .current_dir("/");
        Placement::new().inherit(vec![held])?.apply(&mut command);
        let child = command.spawn()?;
        Ok(Self { child, alive })
    }
}

/// The body of `heddle guardian`: blocks until `pipe`, the standard input, ends; cleans, and removes the file `lock`.
/// After [`Guardian::finish`] it does nothing.
///
/// The process ignores SIGINT, SIGTERM and SIGHUP from then on, since they come to all of a terminal's or a
/// service's processes just when the guardian is needed.
///
/// # Errors
/// [`Error::Watch`]; nothing was cleaned then. What could not be cleaned is in the report.
pub fn run(mut pipe: impl Read, remains: &Remains, lock: &Path) -> Result<Report, Error> {
    signals::ignore(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])
        .map_err(|source| watch("ignore signals", source))?;
    let said = io::copy(&mut pipe, &mut io::sink())
        .map_err(|source| watch("wait for the supervisor's end", source))?;
    if said > 0 {
        return Ok(Report::default());
    }
    let report = cleanup::clean_mesh(remains);
    remove_lock(lock).map_err(|source| watch("remove the lock", source))?;
    Ok(report)
}

/// Runs as the guardian. `arguments` are those after the subcommand, as [`Guardian::start`] gives them.
#[must_use]
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut values = BTreeMap::new();
    let mut arguments = arguments.into_iter();
    while let (Some(name), Some(value)) = (arguments.next(), arguments.next()) {
        values.insert(name, PathBuf::from(value));
    }
    let mut value = |name: &str| values.remove(OsStr::new(name));
    let (Some(run_dir), Some(cgroup), Some(lock)) =
        (value("--run-dir"), value("--cgroup"), value("--lock"))
    else {
        eprintln!("heddle: the guardian is started by `heddle up` only");
        return ExitCode::from(2);
    };
    let report = run(io::stdin(), &Remains { run_dir, cgroup }, &lock);
    let errors = match report {
        Ok(report) => report.errors.iter().map(ToString::to_string).collect(),
        Err(error) => vec![error.to_string()],
    };
    for error in &errors {
        eprintln!("heddle: guardian: {error}");
    }
    ExitCode::from(u8::from(!errors.is_empty()))
}

/// Removes the file unless it is another than the one that this process holds locked.
fn remove_lock(lock: &Path) -> io::Result<()> {
    let held = fs::metadata(format!("/proc/self/fd/{FIRST_INHERITED}"))?;
    match fs::metadata(lock) {
        Ok(found) if (found.dev(), found.ino()) == (held.dev(), held.ino()) => {
            fs::remove_file(lock)
        }
        _ => Ok(()),
    }
}

fn arguments(remains: &Remains, lock: &Path) -> [OsString; 7] {
    [
        SUBCOMMAND.into(),
        "--run-dir".into(),
        remains.run_dir.clone().into(),
        "--cgroup".into(),
        remains.cgroup.clone().into(),
        "--lock".into(),
        lock.into(),
    ]
}

fn watch(what: &'static str, source: io::Error) -> Error {
    Error::Watch { what, source }
}

#[cfg(test)]
mod tests {
    use std::{
        env,
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

    fn lock_path(remains: &Remains) -> PathBuf {
        remains.run_dir.with_extension("lock")
    }

    /// The test that plays the roles, in a process of its own.
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
        };
        let path = lock_path(&remains);
        if role == "guardian" {
            let report = run(io::stdin(), &remains, &path).unwrap();
            assert!(report.errors.is_empty(), "{report:?}");
            return;
        }
        let lock = fs::File::create(&path).unwrap();
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
        let shared = lock.try_clone().unwrap().into();
        let guardian = Guardian::spawn(play("guardian", &remains), shared).unwrap();
        println!("\nguardian {}", guardian.child.id());
        if role == "ending" {
            guardian.finish().unwrap();
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
        // Signals that would end it come only when it is ready for them. SIGHUP is 1, SIGINT 2, SIGTERM 15.
        let ignored = 1 | 1 << 1 | 1 << 14;
        let status = format!("/proc/{guardian}/status");
        within_ten_seconds("the guardian ignores signals", || {
            fs::read_to_string(&status)
                .unwrap()
                .lines()
                .filter_map(|line| line.strip_prefix("SigIgn:"))
                .any(|mask| {
                    u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & ignored == ignored)
                })
        });
        let guardian = PidFd::open(guardian).unwrap();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            guardian.signal(signal).unwrap();
        }
        assert!(guardian.is_alive() && remains.run_dir.exists());

        let lock = fs::File::open(lock_path(&remains)).unwrap();
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
        assert!(!lock_path(&remains).exists());
    }

    #[test]
    fn a_supervisor_that_ends_well_ends_its_guardian() {
        let remains = remains("ending");
        fs::create_dir_all(&remains.run_dir).unwrap();
        let ended = play("ending", &remains).output().unwrap();
        assert!(ended.status.success(), "{ended:?}");
        // It said that it had cleaned, so what it left is none of the guardian's business.
        fs::remove_dir(&remains.run_dir).unwrap();
        fs::remove_file(lock_path(&remains)).unwrap();
    }

    #[test]
    fn a_guardian_that_cannot_be_started_is_an_error() {
        let lock = fs::File::open("/dev/null").unwrap().into();
        let program = Path::new("/nonexistent");
        let error = Guardian::start(program, &remains("none"), Path::new("/dev/null"), lock);
        assert!(matches!(error, Err(Error::Start { .. })));
    }
}
