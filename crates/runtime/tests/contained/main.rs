//! Containers on a real kernel. This program is also the container's init: it runs itself again.
#![allow(clippy::unwrap_used)] // A failed test is what a panic is for.

mod support;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    time::Duration,
};

use libtest_mimic::{Arguments, Trial};
use runtime::{
    container::spec::ProgramSpec,
    exec::{self, ExecSpec, ExecTarget},
};
use support::{Pod, exits_with, prints};

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some(runtime::init::SUBCOMMAND) => runtime::init::main(),
        Some("run-one-and-wait") => support::run_one_and_wait(),
        _ => {}
    }
    let test = |name: &str, body: fn()| {
        Trial::test(name, move || {
            body();
            Ok(())
        })
    };
    libtest_mimic::run(
        &Arguments::from_args(),
        vec![
            test("exit_codes_are_the_programs", exit_codes_are_the_programs),
            test(
                "the_machine_cannot_be_written",
                the_machine_cannot_be_written,
            ),
            test("folders_are_its_own", folders_are_its_own),
            test(
                "the_identity_socket_is_seen_and_nothing_beside_it",
                the_identity_socket_is_seen_and_nothing_beside_it,
            ),
            test("rights_are_gone", rights_are_gone),
            test("names_come_from_the_mesh", names_come_from_the_mesh),
            test("users_and_files", users_and_files),
            test("all_ends_with_the_starter", all_ends_with_the_starter),
            test(
                "exec_enters_with_the_same_rights",
                exec_enters_with_the_same_rights,
            ),
            test(
                "orphans_are_reaped_and_term_arrives",
                orphans_are_reaped_and_term_arrives,
            ),
        ],
    )
    .exit();
}

fn exit_codes_are_the_programs() {
    exits_with("exit 7", 7);
    exits_with("kill -KILL $$", 128 + 9);
    let failed = |command: &[&str], message: &str| {
        let mut pod = Pod::new();
        let error = pod.start(command).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    failed(
        &["no-such-program"],
        "command not found: no-such-program (PATH is /usr/local/sbin",
    );
    failed(&["/no/such"], "command not found: /no/such");
    failed(
        &["/etc/passwd"],
        "cannot run /etc/passwd: Permission denied",
    );
    let mut pod = Pod::new();
    pod.spec.program.working_dir = Some("/no/where".into());
    let error = pod.start(&["true"]).unwrap_err().to_string();
    assert!(error.contains("working directory /no/where"), "{error}");
}

fn the_machine_cannot_be_written() {
    let marker = format!("/usr/heddle-test-{}", std::process::id());
    prints(
        &format!(
            "echo x > {marker} && cat {marker}; rm -f /etc/passwd; test -e /etc/passwd || echo gone"
        ),
        "x\ngone\n",
    );
    assert!(!std::path::Path::new(&marker).exists());
    assert!(std::path::Path::new("/etc/passwd").exists());
    for command in [
        "echo 1 > /proc/sys/kernel/panic",
        "echo h > /proc/sysrq-trigger",
        "mkdir /sys/x",
        "echo 1 > /sys/kernel/mm/ksm/run",
        "mount -t tmpfs x /mnt",
        "mount -o remount,rw /sys",
        "umount /proc/sys",
        "mknod /dev/x b 254 0",
        "mknod /tmp/x c 1 1",
    ] {
        prints(
            &format!("if {command}; then echo possible; else echo refused; fi 2> /dev/null"),
            "refused\n",
        );
    }
}

fn folders_are_its_own() {
    prints(
        "ls /run /tmp /var/tmp",
        "/run:\nlock\n\n/tmp:\n\n/var/tmp:\n",
    );
    prints(
        "ls /dev",
        "fd\nfull\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n",
    );
    prints(
        "find /sys/fs/cgroup /sys/fs/bpf -mindepth 1; grep -E 'cgroup|bpf' /proc/mounts; echo end",
        "end\n",
    );
    prints(
        "echo /proc/[0-9]*; hostname; cat /proc/self/cgroup | grep ^0:",
        "/proc/1 /proc/2\nweb-0\n0::/\n",
    );
    prints(
        "echo x > /dev/null && head -c 3 /dev/zero | wc -c; cat /proc/timer_list 2> /dev/null | wc -c",
        "3\n0\n",
    );
}

/// The folder is there before the socket is, and shows the socket of the next agent too.
fn the_identity_socket_is_seen_and_nothing_beside_it() {
    let node = tempfile::tempdir().unwrap();
    let identity = node.path().join("identity");
    std::fs::create_dir(&identity).unwrap();
    std::fs::set_permissions(&identity, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(node.path().join("secret"), "").unwrap();
    let socket = identity.join("agent.sock");
    let listen = || {
        let listener = UnixListener::bind(&socket).unwrap();
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
        listener
    };

    let mut pod = Pod::new();
    pod.spec.identity = Some(identity.clone());
    pod.spec.program.user = Some("nobody".into());
    let script = "cd /run/spiffe/workload; find /run /run/spiffe/workload/.. | sort -u
        until test -S agent.sock; do sleep 0.01; done
        for i in 1 2; do python3 -c 'import socket
s = socket.socket(socket.AF_UNIX)
s.connect(\"/run/spiffe/workload/agent.sock\")
print(s.recv(9).decode())'; done";
    let (container, reader) = pod.start(&["sh", "-c", script]).unwrap();
    let mut reader = BufReader::new(reader);
    for line in [
        "/run",
        "/run/lock",
        "/run/spiffe",
        "/run/spiffe/workload",
        "/run/spiffe/workload/..",
        "/run/spiffe/workload/../workload",
    ] {
        assert_eq!(read_line(&mut reader), line);
    }
    let first = listen();
    let (mut stream, _) = first.accept().unwrap();
    std::fs::remove_file(&socket).unwrap();
    let second = listen();
    stream.write_all(b"first").unwrap();
    drop(stream);
    let (mut stream, _) = second.accept().unwrap();
    stream.write_all(b"second").unwrap();
    drop(stream);
    assert_eq!(read_line(&mut reader), "first");
    assert_eq!(read_line(&mut reader), "second");
    assert_eq!(pod.wait(container), 0);

    // Nor for root is there anything to change.
    let mut pod = Pod::new();
    pod.spec.identity = Some(identity);
    let script = "cd /run/spiffe/workload
        for change in 'touch x' 'rm agent.sock' 'mv agent.sock x' 'chmod 600 agent.sock' 'chown 1 agent.sock' 'chmod 777 .' 'mount -o remount,rw .' 'umount .'; do
            $change 2> /dev/null && echo \"possible: $change\"; done; ls -A";
    assert_eq!(pod.run(&["sh", "-c", script]), ("agent.sock\n".into(), 0));
}

fn read_line(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

fn rights_are_gone() {
    // CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE SYS_CHROOT AUDIT_WRITE SETFCAP
    prints(
        "grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status | tr -s '\\t' ' '",
        "CapInh: 0000000000000000\nCapPrm: 00000000a00405fb\nCapEff: 00000000a00405fb\nCapBnd: 00000000a00405fb\nCapAmb: 0000000000000000\nNoNewPrivs: 1\nSeccomp: 2\n",
    );
    for command in [
        "unshare -n true",
        "unshare -U true",
        "unshare -r -n true",
        "nsenter -t 1 -n true",
        "cat /proc/1/environ",
        "readlink /proc/1/exe",
        "python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)'",
        "python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)'",
        "python3 -c 'import socket; socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)'",
        "python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)'",
        "ip link set lo up",
        "nft list ruleset",
    ] {
        prints(
            &format!("if {command}; then echo possible; else echo refused; fi 2> /dev/null"),
            "refused\n",
        );
    }
    // What must still work.
    prints(
        "python3 -c 'import socket; [socket.socket(f, t) for f in (1, 2, 10) for t in (1, 2)]; print(1)'",
        "1\n",
    );
    prints(
        "python3 -c 'import threading; t = threading.Thread(target=print, args=(1,)); t.start(); t.join()'",
        "1\n",
    );
}

fn names_come_from_the_mesh() {
    prints(
        "cat /etc/resolv.conf; test -L /etc/resolv.conf || echo file",
        "nameserver 10.96.0.10\nsearch shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\nfile\n",
    );
    prints(
        "grep web-0 /etc/hosts; grep ^hosts: /etc/nsswitch.conf",
        "10.244.0.2 web-0\nhosts: files dns\n",
    );
}

fn users_and_files() {
    let mut pod = Pod::new();
    let file = |content: &str, mode| api::pod::PodFile {
        content: content.into(),
        mode,
    };
    pod.spec
        .files
        .insert("/opt/web/conf/a.txt".into(), file("hello", 0o600));
    pod.spec.files.insert(
        "/etc/passwd".into(),
        file("joe:x:77:78::/home/joe:/bin/sh\n", 0o644),
    );
    pod.spec.files.insert(
        "/etc/group".into(),
        file("joe:x:78:\nextra:x:99:joe\n", 0o644),
    );
    pod.spec.program.user = Some("joe".into());
    pod.spec
        .program
        .env
        .insert("GREETING".into(), "good day".into());
    let script = "id -u; id -G; cat /opt/web/conf/a.txt; echo; echo $GREETING $HOME; grep CapEff /proc/self/status | tr -d '\\t'";
    let (output, code) = pod.run(&["sh", "-c", script]);
    assert_eq!(
        output,
        "77\n78 99\nhello\ngood day /home/joe\nCapEff:0000000000000000\n"
    );
    assert_eq!(code, 0);
}

fn all_ends_with_the_starter() {
    support::kill_the_starter_of(&[
        "sh",
        "-c",
        "trap '' TERM; (setsid sleep 1000 &); sleep 1000",
    ]);
}

fn exec_enters_with_the_same_rights() {
    let mut pod = Pod::new();
    pod.block_on_started(&["sleep", "1000"], |pod, pid| {
        let run = |script: &str| {
            let spec = ExecSpec {
                target: ExecTarget {
                    uid: "shop/web-0".into(),
                    hostname: "web-0".into(),
                    pid,
                    cgroup: pod.app.path().into(),
                    cgroup_v1: Vec::new(),
                },
                program: ProgramSpec {
                    command: vec!["sh".into(), "-c".into(), script.into()],
                    env: BTreeMap::new(),
                    user: None,
                    working_dir: Some("/tmp".into()),
                },
            };
            let mut command = exec::command("/proc/self/exe".as_ref(), &spec).unwrap();
            let output = command.stderr(std::process::Stdio::inherit()).stdout(std::process::Stdio::piped()).output().unwrap();
            (String::from_utf8(output.stdout).unwrap(), output.status.code())
        };
        let (output, code) = run("pwd; hostname; cat /proc/self/cgroup | grep ^0:; grep CapBnd /proc/self/status | tr -d '\\t'; pgrep -x sleep | wc -l; exit 5");
        assert_eq!(output, "/tmp\nweb-0\n0::/\nCapBnd:00000000a00405fb\n1\n");
        assert_eq!(code, Some(5));
        assert_eq!(run("unshare -U true").1, Some(1));
    });
}

fn orphans_are_reaped_and_term_arrives() {
    let mut pod = Pod::new();
    let script = "trap 'echo bye; exit 3' TERM; (sh -c 'sleep 0.01 &' &); echo up; while true; do sleep 0.02; ps -e -o stat= | grep -c Z; done";
    let (output, code) =
        pod.terminate_after(&["sh", "-c", script], "up\n", Duration::from_millis(300));
    assert!(output.ends_with("bye\n"), "{output}");
    assert!(output.contains("0\n"), "{output}");
    assert_eq!(code, 3);
}
