use std::{
    io::Read,
    os::unix::net::{UnixListener, UnixStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::*;
use crate::{cgroup::Cgroup, place::Placement};

const PATIENCE: Duration = Duration::from_secs(20);
/// Connects, tells so with a byte, and waits for the other side to close.
const CONNECT: &str = "import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendall(b'x')
s.recv(1)";
/// Connects, and leaves the socket to a child. The number of the one who connected is free once it is reaped.
const LEAVE: &str = "import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
if os.fork() == 0:
    s.recv(1)";

struct World {
    top: Cgroup,
    folder: TempDir,
    listener: UnixListener,
}

impl World {
    fn new(name: &str) -> Self {
        let mount = crate::cgroup::find_mount().unwrap().unwrap();
        let top = Cgroup::create(mount.join(format!("heddle.peer-{name}-{}", std::process::id())))
            .unwrap();
        let folder = TempDir::new().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        Self {
            top,
            folder,
            listener,
        }
    }

    fn connects(&self, cgroup: &Cgroup, program: &str) -> (Child, UnixStream) {
        let mut command = Command::new("python3");
        command
            .args(["-c", program])
            .arg(self.folder.path().join("s"))
            .stdin(Stdio::null());
        Placement::new()
            .cgroup(cgroup.path())
            .unwrap()
            .user(65534, 65534, Vec::new())
            .apply(&mut command);
        fs::set_permissions(self.folder.path(), mode(0o755)).unwrap();
        fs::set_permissions(self.folder.path().join("s"), mode(0o666)).unwrap();
        let child = command.spawn().unwrap();
        (child, self.listener.accept().unwrap().0)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.top.kill();
        let _ = self.top.wait_empty(PATIENCE);
        let _ = self.top.remove_tree();
    }
}

fn mode(mode: u32) -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}

#[test]
fn a_peer_is_found_in_its_cgroup_and_follows_it() {
    let world = World::new("found");
    let [first, second] = ["first", "second"].map(|name| world.top.child(name).unwrap());
    let mount = CgroupMount::find().unwrap();
    let (mut child, mut stream) = world.connects(&first, CONNECT);
    stream.read_exact(&mut [0]).unwrap();
    let peer = Peer::of(&stream, Moment::BOOT).unwrap();
    assert_eq!((peer.pid(), peer.uid()), (child.id(), 65534));
    assert_eq!(peer.cgroup(&mount).unwrap(), first.path());
    // What counts is where it is when it is asked for.
    second.add_pid(child.id()).unwrap();
    assert_eq!(peer.cgroup(&mount).unwrap(), second.path());
    drop(stream);
    child.wait().unwrap();
    assert!(matches!(peer.cgroup(&mount), Err(PeerError::Gone)));
}

#[test]
fn one_that_has_ended_is_nobody_even_while_its_socket_lives() {
    let world = World::new("ended");
    let mount = CgroupMount::find().unwrap();
    let cgroup = world.top.child("a").unwrap();
    let (mut child, stream) = world.connects(&cgroup, LEAVE);
    child.wait().unwrap();
    assert!(cgroup.is_populated(), "the heir holds the socket");
    assert!(matches!(
        Peer::of(&stream, Moment::BOOT),
        Err(PeerError::Gone)
    ));

    // Ended, but its parent has not asked yet: it is no more entitled to anything.
    let (mut child, mut stream) = world.connects(&cgroup, CONNECT);
    stream.read_exact(&mut [0]).unwrap();
    let peer = Peer::of(&stream, Moment::BOOT).unwrap();
    drop(stream);
    let start = Instant::now();
    while peer.process.is_alive() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    assert!(std::path::Path::new(&format!("/proc/{}", child.id())).exists());
    assert!(matches!(peer.cgroup(&mount), Err(PeerError::Gone)));
    child.wait().unwrap();
}

#[test]
fn a_number_alone_is_believed_if_its_owner_is_older_than_the_connection() {
    let before = Moment::now().unwrap();
    let mut child = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = child.id().cast_signed();
    for unconnected in [Moment::BOOT, before] {
        let refused = Peer::by_number(pid, 0, unconnected);
        assert!(matches!(refused, Err(PeerError::TooYoung { .. })));
    }
    let later = Moment(Moment::now().unwrap().0 + 2 * TICK_NANOS);
    let peer = Peer::by_number(pid, 7, later).unwrap();
    assert_eq!((peer.pid(), peer.uid()), (child.id(), 7));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(
        Peer::by_number(pid, 0, later),
        Err(PeerError::Gone)
    ));
    assert!(matches!(Peer::by_number(0, 0, later), Err(PeerError::Gone)));
}
