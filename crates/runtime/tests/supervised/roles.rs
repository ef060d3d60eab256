//! What this program is besides the tests: everything that a mesh runs it as.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio, exit},
    time::{Duration, Instant},
};

use api::{
    enroll::{FromAgent, ToAgent},
    node_config::NodeConfig,
};
use linux::{cgroup::Cgroup, seqpacket::Stream};
use runtime::{guardian, init, publish};

use crate::mesh::{Mesh, shell};

/// Workloads of this account are refused by the stand-in agent.
pub(crate) const REFUSED: &str = "refused";
const SUPERVISOR: &str = "supervise-and-wait";

/// Does what the first argument says, if it says anything.
pub(crate) fn play() {
    let mut arguments = std::env::args_os().skip(1);
    let Some(first) = arguments.next() else {
        return;
    };
    let tokio = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    match first.to_str().unwrap() {
        init::SUBCOMMAND => init::main(),
        guardian::SUBCOMMAND => {
            let code = guardian::main(arguments);
            exit(i32::from(code != std::process::ExitCode::SUCCESS));
        }
        publish::SUBCOMMAND => {
            tokio().block_on(publish::relay::main()).unwrap();
            exit(0);
        }
        "node" => {
            let path: PathBuf = arguments.nth(1).unwrap().into();
            tokio().block_on(agent(&path));
            exit(0);
        }
        SUPERVISOR => supervise(),
        _ => {}
    }
}

/// Lets every workload start.
async fn agent(config: &Path) {
    let config: NodeConfig = serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap();
    assert!(
        config.pin_dir.is_dir() && config.state_dir.is_dir() && config.cgroup.join("l7").is_dir()
    );
    let stream = Stream::connect(&config.enroll_socket).await.unwrap();
    let hello = FromAgent::Hello { node: config.node };
    stream.send(&hello, &[]).await.unwrap();
    while let Ok(Some((message, descriptors))) = stream.recv::<ToAgent>().await {
        let workload = match message {
            ToAgent::WorkloadAdded(workload) => workload,
            ToAgent::SnapshotDone => {
                stream.send(&FromAgent::TakenOver, &[]).await.unwrap();
                continue;
            }
            ToAgent::WorkloadRemoved { uid } => {
                let gone = FromAgent::WorkloadGone { uid };
                stream.send(&gone, &[]).await.unwrap();
                continue;
            }
            _ => continue,
        };
        assert_eq!(descriptors.len(), 1);
        assert!(workload.cgroup.starts_with(&config.cgroup));
        let uid = workload.uid;
        let answer = if workload.service_account == REFUSED {
            let error = "no such account".into();
            FromAgent::WorkloadRefused { uid, error }
        } else {
            FromAgent::WorkloadReady { uid }
        };
        stream.send(&answer, &[]).await.unwrap();
    }
}

fn supervise() -> ! {
    let mesh = Mesh::start(1);
    let stubborn = "trap '' TERM HUP INT; (setsid sleep 1000 &); sleep 1000";
    mesh.sync(vec![shell("shop", "web-0", "node-1", stubborn)]);
    mesh.until("shop/web-0", |status| status.ready);
    let layout = mesh.layout();
    println!(
        "{}\n{}\n{}",
        layout.run_dir().display(),
        layout.cgroup().display(),
        layout.lock().display()
    );
    loop {
        std::thread::park();
    }
}

/// A supervisor with a mesh is killed; everything of it is gone soon after.
pub(crate) fn kill_a_supervisor() {
    let mut supervisor = Command::new("/proc/self/exe")
        .arg(SUPERVISOR)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(supervisor.stdout.take().unwrap()).lines();
    let paths: Vec<PathBuf> = lines.take(3).map(|line| line.unwrap().into()).collect();
    assert!(paths.iter().all(|path| path.exists()), "{paths:?}");
    assert!(Cgroup::open(&paths[1]).unwrap().is_populated());
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    let start = Instant::now();
    while paths.iter().any(|path| path.exists()) {
        assert!(start.elapsed() < Duration::from_secs(10), "{paths:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mounts = linux::mounts::list().unwrap();
    assert!(
        !mounts
            .iter()
            .any(|mount| mount.target.starts_with(&paths[0]))
    );
}
