//! The `heddle` command: argument parsing, and one small module per subcommand.
//!
//! Exit codes: 0 all is well, 1 it failed (with a message that says what to do), 2 the command line is wrong,
//! 3 the answer is "no" (`explain` of a refused connection). `exec` passes the program's code through.

mod cli;
mod client;
mod commands;
mod mesh_api;
mod output;
mod select;
mod server;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // The first process of a workload sets namespaces up and must be single-threaded: before all else.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|first| first == runtime::init::SUBCOMMAND)
    {
        runtime::init::main();
    }
    let cli = cli::Cli::parse();
    init_logging(&cli);
    match commands::run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("heddle: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Long-running processes log to standard error; `RUST_LOG` sets the level.
fn init_logging(cli: &cli::Cli) {
    let default = if cli.command.is_daemon() {
        "info"
    } else {
        "warn"
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .init();
}
