//! One module per subcommand. Each gets its arguments and returns the process's exit code.

mod certs;
mod check;
mod down;
mod exec;
mod explain;
mod flows;
mod logs;
mod node;
mod status;
mod up;

use std::process::ExitCode;

use anyhow::Context as _;
use runtime::cleanup::Remains;

use crate::cli::{Cli, Command, GuardianArgs};

/// Runs the command that was asked for.
pub(crate) fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Up(args) => up::run(args),
        Command::Node(args) => node::run(&args),
        Command::Check(args) => check::run(&args),
        // Enters the workload's namespaces, for which the process must have one thread.
        Command::Exec(args) => exec::run(args),
        Command::PublishRelay => {
            one_thread()?.block_on(runtime::publish::relay::main())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Guardian(args) => guardian(args),
        Command::Down(common) => one_thread()?.block_on(down::run(common)),
        Command::Logs(args) => one_thread()?.block_on(logs::run(args)),
        Command::Status(common) => one_thread()?.block_on(status::run(common)),
        Command::Certs(args) => one_thread()?.block_on(certs::run(args)),
        Command::Flows(args) => one_thread()?.block_on(flows::run(args)),
        Command::Explain(args) => one_thread()?.block_on(explain::run(args)),
    }
}

fn guardian(args: GuardianArgs) -> anyhow::Result<ExitCode> {
    let remains = Remains {
        run_dir: args.run_dir,
        cgroup: args.cgroup,
    };
    let report = runtime::guardian::run(std::io::stdin().lock(), &remains, &args.lock)?;
    for error in &report.errors {
        tracing::error!(%error, "left behind");
    }
    Ok(if report.errors.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn one_thread() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

fn many_threads() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
}
