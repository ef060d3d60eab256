//! Names and files inside of a container: resolver, hosts, and the files that its description asks for.

use std::{
    fmt::Write,
    fs::{self, create_dir_all},
    io,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
};

use super::program::User;
use crate::{
    container::spec::InitSpec,
    error::{During, Error},
};

/// Places all files. The root must be the container's already.
pub(super) fn place(spec: &InitSpec) -> Result<(), Error> {
    replace("/etc/resolv.conf", &resolv_conf(spec), 0o644)?;
    replace("/etc/hosts", &hosts(spec), 0o644)?;
    replace("/etc/hostname", &format!("{}\n", spec.hostname), 0o644)?;
    let switch = fs::read_to_string("/etc/nsswitch.conf").unwrap_or_default();
    replace("/etc/nsswitch.conf", &nsswitch(&switch), 0o644)?;

    for (path, file) in &spec.files {
        if !path.starts_with('/') {
            return Err(Error::Container(format!(
                "the path of file `{path}` is not absolute"
            )));
        }
        replace(path, &file.content, file.mode)?;
    }
    // Only now: the files may bring the user along.
    let user = User::find(spec.program.user.as_deref()).map_err(Error::Container)?;
    for path in spec.files.keys() {
        chown(path, Some(user.uid), Some(user.gid))
            .during(|| format!("give {path} to its user"))?;
    }
    Ok(())
}

/// A file of that content, whatever was there: the machine's may be a link into a folder that is not the container's.
fn replace(path: &str, content: &str, mode: u32) -> Result<(), Error> {
    let failed = || format!("write {path} in the container");
    if let Some(folder) = Path::new(path).parent() {
        create_dir_all(folder).during(failed)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).during(failed),
        _ => {}
    }
    fs::write(path, content)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777)))
        .during(failed)
}

/// Names with fewer than five dots are tried with the search list first, as on Kubernetes.
fn resolv_conf(spec: &InitSpec) -> String {
    format!(
        "nameserver {}\nsearch {}\noptions ndots:5\n",
        spec.nameserver,
        spec.search.join(" ")
    )
}

fn hosts(spec: &InitSpec) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    for address in &spec.addresses {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{address} {}", spec.hostname);
    }
    text
}

/// Names are found in `/etc/hosts` and by DNS only: other sources would bypass the mesh's DNS.
fn nsswitch(machine: &str) -> String {
    let mut text = String::from("hosts: files dns\n");
    for line in machine
        .lines()
        .filter(|line| !line.trim_start().starts_with("hosts:"))
    {
        text.push_str(line);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hosts_line_changes() {
        let machine = "passwd: files systemd\n  hosts: files mdns4_minimal [NOTFOUND=return] dns\nnetworks: files\n";
        assert_eq!(
            nsswitch(machine),
            "hosts: files dns\npasswd: files systemd\nnetworks: files\n"
        );
        assert_eq!(nsswitch(""), "hosts: files dns\n");
    }
}
