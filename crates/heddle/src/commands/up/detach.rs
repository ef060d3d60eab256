//! `heddle up --detach`: starts the same command in the background, and returns when everything is ready.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use api::report::MeshStatus;
use indicatif::{ProgressBar, ProgressStyle};
use linux::place::Placement;
use runtime::layout::Layout;

use crate::{
    cli::{Output, UpArgs},
    client,
    commands::{one_thread, status},
    mesh_api, output,
};

const LOOK: Duration = Duration::from_millis(50);

pub(super) fn run(args: &UpArgs) -> anyhow::Result<ExitCode> {
    let log = mesh_api::log(&Layout::new(&args.common.mesh)?);
    let mut child = spawn(args, &log)?;
    one_thread()?.block_on(wait(args, &mut child, &log))
}

fn spawn(args: &UpArgs, log: &Path) -> anyhow::Result<Child> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    let mut command =
        Command::new(std::env::current_exe().context("cannot find this program's own file")?);
    command
        .arg("up")
        .arg(&args.dir)
        .args([
            "--mesh",
            &args.common.mesh,
            "--nodes",
            &args.nodes.to_string(),
        ])
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    for server in &args.dns_upstream {
        command.args(["--dns-upstream", server]);
    }
    for size in &args.map_size {
        command.args(["--map-size", &size.to_string()]);
    }
    let ca = &args.ca;
    command.args([
        "--cert-lifetime",
        &format!("{}s", ca.cert_lifetime.as_secs()),
    ]);
    for (flag, path) in [
        ("--ca-cert", &ca.ca_cert),
        ("--ca-key", &ca.ca_key),
        ("--ca-dir", &ca.ca_dir),
    ] {
        if let Some(path) = path {
            command.arg(flag).arg(path);
        }
    }
    // A terminal's Ctrl-C and hang-up are for who runs in it, and descriptors (a lock, the end of a pipe) for who
    // opened them: the mesh must not hold them for as long as it runs.
    Placement::new().apply(&mut command);
    command
        .spawn()
        .context("cannot start the mesh in the background")
}

async fn wait(args: &UpArgs, child: &mut Child, log: &Path) -> anyhow::Result<ExitCode> {
    let socket = Layout::new(&args.common.mesh)?.api_socket();
    let progress = progress_bar();
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    loop {
        if let Some(status) = child.try_wait()? {
            progress.finish_and_clear();
            let said = fs::read_to_string(log).unwrap_or_default();
            bail!("the mesh did not start ({status}):\n{}", said.trim_end());
        }
        let status: Option<MeshStatus> = client::get(&socket, "/v1/status").await.ok();
        // The socket of a mesh that ran before may still answer: the process tells them apart.
        if let Some(status) = status.filter(|status| status.pid == child.id()) {
            let ready = status
                .workloads
                .iter()
                .filter(|replica| replica.status.ready)
                .count();
            progress.set_message(format!(
                "{ready} of {} replicas ready",
                status.workloads.len()
            ));
            let is_ready = status.is_ready();
            if is_ready || Instant::now() > deadline {
                progress.finish_and_clear();
                return finish(args, &status, is_ready, log);
            }
        } else if Instant::now() > deadline {
            progress.finish_and_clear();
            bail!(
                "the mesh has not come up within {} s; see {}",
                args.timeout,
                log.display()
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn finish(
    args: &UpArgs,
    mesh: &MeshStatus,
    is_ready: bool,
    log: &Path,
) -> anyhow::Result<ExitCode> {
    match args.common.output {
        Output::Json => output::json(mesh)?,
        Output::Table if is_ready => {
            println!(
                "mesh `{}` is up: {} replicas ready",
                mesh.mesh,
                mesh.workloads.len()
            );
            for problem in mesh.all_problems() {
                println!("  {problem}");
            }
        }
        Output::Table => {
            status::print(mesh);
            println!();
        }
    }
    if is_ready {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "heddle: not everything is ready after {} s; the mesh goes on running (its log: {})",
        args.timeout,
        log.display()
    );
    Ok(ExitCode::FAILURE)
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    bar.set_message("starting");
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
