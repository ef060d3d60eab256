//! `heddle up DIR`: control plane, runtime and API in one process, until SIGINT, SIGTERM or `heddle down`.

mod detach;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use api::{
    map_sizes::MapSizes,
    mesh::MeshConfig,
    node_config::AuthorityConfig,
    pod::{PodStatus, Protocol},
};
use control::{CaConfig, ControlConfig, ControlPlane, OperatorCa};
use identity::ca_api::CA_PORT;
use runtime::{
    claim::Claim,
    layout::Layout,
    preflight,
    publish::{self, PublishedPort, listeners::PortError},
    supervisor::{Authority, Runtime, RuntimeConfig},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::many_threads;
use crate::{
    cli::{CaArgs, UpArgs},
    server::{self, Mesh},
};

/// How long a stopping replica goes on serving while the mesh learns to send it no more connections.
const DRAIN: Duration = Duration::from_millis(500);

pub(super) fn run(args: UpArgs) -> anyhow::Result<ExitCode> {
    if !args.dir.is_dir() {
        bail!(
            "{} is no folder: name one that holds the objects",
            args.dir.display()
        );
    }
    require_machine()?;
    if args.detach {
        return detach::run(&args);
    }
    let dir = fs::canonicalize(&args.dir)
        .with_context(|| format!("cannot open {}", args.dir.display()))?;
    let layout = Layout::new(&args.common.mesh)?;
    let executable = std::env::current_exe().context("cannot find this program's own file")?;
    let claim = Claim::take(
        &layout,
        &format!("heddle up {}", dir.display()),
        &executable,
    )?;
    let outcome = many_threads()?.block_on(serve(&args, dir, layout, executable));
    claim.release()?;
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Says everything that is missing at once, not one thing per try.
fn require_machine() -> anyhow::Result<()> {
    let mut missing: Vec<String> = preflight::check().iter().map(ToString::to_string).collect();
    if missing.is_empty() {
        missing = kernel::missing_features();
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "this machine cannot run a mesh:\n  - {}",
        missing.join("\n  - ")
    )
}

async fn serve(
    args: &UpArgs,
    dir: PathBuf,
    layout: Layout,
    executable: PathBuf,
) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mesh_config = MeshConfig {
        name: args.common.mesh.clone(),
        ..MeshConfig::default()
    };
    let mut maps = MapSizes::default();
    maps.set(&args.map_size);
    let nodes: Vec<String> = (1..=args.nodes)
        .map(|index| format!("node-{index}"))
        .collect();
    let control = ControlPlane::start(ControlConfig {
        source_dir: dir.clone(),
        mesh: mesh_config.clone(),
        nodes: nodes.clone(),
        xds_socket: layout.control_socket(),
        system_pods: vec![publish::relay_pod(&nodes[0])],
        ca: ca_config(&args.ca, &layout),
    })
    .await?;
    let ca_addresses = mesh_config
        .control_addresses()
        .map(|address| SocketAddr::new(address, CA_PORT));
    let control = Arc::new(control);
    let tokens = Arc::clone(&control);
    let runtime = Runtime::start(RuntimeConfig {
        authority: Authority {
            config: AuthorityConfig {
                address: ca_addresses[0],
                roots: control.roots_pem(),
            },
            tokens: Arc::new(move |node| {
                tokens
                    .join_token(node)
                    .map_err(|error| tracing::warn!(node, %error, "no join token"))
                    .unwrap_or_default()
            }),
        },
        mesh: mesh_config,
        layout: layout.clone(),
        nodes: nodes.clone(),
        executable,
        dns_upstream: args.dns_upstream.clone(),
        maps,
        drain: DRAIN,
    })
    .await?;
    control.listen_on(runtime.fabric().netns(), &ca_addresses)?;
    let runtime = Arc::new(runtime);
    let (unpublished_sender, unpublished) = watch::channel(Vec::new());
    let stop = Arc::new(watch::Sender::new(false));
    let mut stopped = stop.subscribe();
    server::start(Mesh {
        layout,
        source: dir.clone(),
        nodes,
        control: Arc::clone(&control),
        runtime: Arc::clone(&runtime),
        unpublished,
        stop,
    })?;
    tokio::spawn(want(
        Arc::clone(&control),
        Arc::clone(&runtime),
        unpublished_sender,
    ));
    tokio::spawn(report(Arc::clone(&control), Arc::clone(&runtime)));
    tokio::spawn(announce_problems(Arc::clone(&control)));
    announce(&args.common.mesh, &dir);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
        _ = stopped.wait_for(|stop| *stop) => {}
    }
    tracing::info!("stopping");
    runtime.shutdown().await;
    Ok(())
}

fn ca_config(args: &CaArgs, layout: &Layout) -> CaConfig {
    let state_dir = args.ca_dir.clone();
    let operator = args.ca_cert.clone().zip(args.ca_key.clone());
    CaConfig {
        operator: operator.map(|(certificate, key)| OperatorCa { certificate, key }),
        lifetime: args.cert_lifetime,
        ..CaConfig::new(state_dir.unwrap_or_else(|| layout.run_dir().join("ca")))
    }
}

fn announce(mesh: &str, dir: &Path) {
    let flag = if mesh == "default" {
        String::new()
    } else {
        format!(" --mesh {mesh}")
    };
    tracing::info!(
        "mesh `{mesh}` runs {}; see `heddle status{flag}`",
        dir.display()
    );
}

/// What the objects ask for goes to the runtime.
async fn want(
    control: Arc<ControlPlane>,
    runtime: Arc<Runtime>,
    unpublished: watch::Sender<Vec<Arc<PortError>>>,
) {
    let (mut pods, mut published) = (control.pods(), control.published());
    loop {
        runtime.sync(pods.borrow_and_update().to_vec());
        let ports = relay_ports(&published.borrow_and_update());
        let errors = runtime.publish(&ports);
        for error in &errors {
            tracing::error!("{error}");
        }
        unpublished.send_replace(errors.into_iter().map(Arc::new).collect());
        let gone = tokio::select! {
            changed = pods.changed() => changed.is_err(),
            changed = published.changed() => changed.is_err(),
        };
        if gone {
            return;
        }
    }
}

fn relay_ports(published: &[control::PublishedPort]) -> Vec<PublishedPort> {
    published
        .iter()
        .filter(|port| port.protocol == Protocol::Tcp)
        .map(|port| PublishedPort {
            host_port: port.host_port,
            target: SocketAddr::new(port.service_vip, port.port),
        })
        .collect()
}

/// What the runtime says of the replicas goes to control.
async fn report(control: Arc<ControlPlane>, runtime: Arc<Runtime>) {
    let mut statuses = runtime.statuses();
    let mut known = BTreeMap::<String, PodStatus>::new();
    loop {
        let current = statuses.borrow_and_update().clone();
        for uid in known.keys().filter(|uid| !current.contains_key(*uid)) {
            control.forget(uid);
        }
        for (uid, status) in &current {
            if known.get(uid) != Some(status) {
                control.report(status.clone());
            }
        }
        known = current;
        if statuses.changed().await.is_err() {
            return;
        }
    }
}

/// Mistakes in edited files are said where `up` runs, once each.
async fn announce_problems(control: Arc<ControlPlane>) {
    let mut problems = control.problems();
    let mut said = BTreeSet::new();
    loop {
        let current: BTreeSet<String> = problems
            .borrow_and_update()
            .iter()
            .map(ToString::to_string)
            .collect();
        for problem in current.difference(&said) {
            tracing::warn!("{problem}");
        }
        said = current;
        if problems.changed().await.is_err() {
            return;
        }
    }
}
