//! Starting the program inside of a container: user, environment, working directory, and what to say if it cannot be.

use std::{
    env, fs,
    io::ErrorKind,
    os::fd::OwnedFd,
    process::{Command, Stdio},
};

use linux::place::Placement;
use nix::unistd::Pid;

use crate::container::spec::ProgramSpec;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Exit codes as POSIX shells and container engines have them.
const BUILD_FAILED: i32 = 125;
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;

/// Starts the program without input. An error comes with the exit code that says it.
pub(crate) fn spawn(
    program: &ProgramSpec,
    hostname: &str,
    inherit: Vec<OwnedFd>,
) -> Result<Pid, (i32, String)> {
    let placement = Placement::new();
    let mut command = prepare(program, hostname, placement, inherit)?;
    command.stdin(Stdio::null());
    let child = command.spawn().map_err(|error| explain(program, &error))?;
    Ok(Pid::from_raw(child.id().cast_signed()))
}

/// The command with user, environment and working directory. Changes the working directory of this process.
pub(crate) fn prepare(
    program: &ProgramSpec,
    hostname: &str,
    placement: Placement,
    inherit: Vec<OwnedFd>,
) -> Result<Command, (i32, String)> {
    let build_failed = |message: String| (BUILD_FAILED, message);
    let Some((name, arguments)) = program.command.split_first() else {
        return Err(build_failed("the command is empty".into()));
    };
    let user = User::find(program.user.as_deref()).map_err(build_failed)?;
    let folder = program.working_dir.as_deref().unwrap_or("/");
    // Here and not by `Command`, whose error would not tell which of the two was not found.
    env::set_current_dir(folder).map_err(|error| {
        build_failed(format!(
            "cannot enter the working directory {folder}: {error}"
        ))
    })?;

    let mut command = Command::new(name);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", &user.home)
        .env("HOSTNAME", hostname)
        .envs(&program.env);
    placement
        .user(user.uid, user.gid, user.groups)
        .inherit(inherit)
        .map_err(|error| build_failed(error.to_string()))?
        .apply(&mut command);
    Ok(command)
}

/// Why the program did not start, for its user's eyes.
pub(crate) fn explain(program: &ProgramSpec, error: &std::io::Error) -> (i32, String) {
    let name = program.command.first().map_or("", String::as_str);
    let path = program.env.get("PATH").map_or(PATH, String::as_str);
    match error.kind() {
        ErrorKind::NotFound if name.contains('/') => {
            (NOT_FOUND, format!("command not found: {name}"))
        }
        ErrorKind::NotFound => (
            NOT_FOUND,
            format!("command not found: {name} (PATH is {path})"),
        ),
        _ => (NOT_EXECUTABLE, format!("cannot run {name}: {error}")),
    }
}

/// A user of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

impl User {
    /// Looks `user` (a name or a number) up in `/etc/passwd` and `/etc/group`.
    pub(crate) fn find(user: Option<&str>) -> Result<Self, String> {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self::find_in(
            user.unwrap_or("0"),
            &read("/etc/passwd"),
            &read("/etc/group"),
        )
    }

    /// The files are read by hand: the C library would ask services of the machine (nscd, systemd).
    fn find_in(user: &str, passwd: &str, group: &str) -> Result<Self, String> {
        let entry = passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [name, _, uid, gid, _, home, ..] = fields[..] else {
                return None;
            };
            (name == user || uid == user).then(|| (name, uid.parse().ok(), gid.parse().ok(), home))
        });
        match entry {
            Some((name, Some(uid), Some(gid), home)) => Ok(Self {
                uid,
                gid,
                groups: groups_of(name, group),
                home: home.into(),
            }),
            // A number needs no entry; its group is the one of the same number, not root's.
            _ => match user.parse() {
                Ok(uid) => Ok(Self {
                    uid,
                    gid: uid,
                    groups: Vec::new(),
                    home: "/".into(),
                }),
                Err(_) => Err(format!("there is no user `{user}` in /etc/passwd")),
            },
        }
    }
}

fn groups_of(name: &str, group: &str) -> Vec<u32> {
    group
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':').skip(2);
            let gid = fields.next()?.parse().ok()?;
            let mut members = fields.next()?.split(',');
            members.any(|member| member == name).then_some(gid)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nwww:x:33:34:www:/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nadm:x:4:syslog,www\nssl:x:100:www\nbad\n";

    #[test]
    fn users_by_name_and_number() {
        let www = User::find_in("www", PASSWD, GROUP).unwrap();
        assert_eq!((www.uid, www.gid, www.home.as_str()), (33, 34, "/var/www"));
        assert_eq!(www.groups, [4, 100]);
        assert_eq!(User::find_in("33", PASSWD, GROUP).unwrap(), www);
        let unknown = User::find_in("4000", PASSWD, GROUP).unwrap();
        assert_eq!(
            (unknown.uid, unknown.gid, unknown.groups.len()),
            (4000, 4000, 0)
        );
        let error = User::find_in("nobody", PASSWD, GROUP).unwrap_err();
        assert_eq!(error, "there is no user `nobody` in /etc/passwd");
    }
}
