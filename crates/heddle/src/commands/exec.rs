//! `heddle exec WORKLOAD -- CMD…`.

use std::process::ExitCode;

use runtime::exec::{ExecSpec, run as enter_and_run};

use super::one_thread;
use crate::{
    cli::ExecArgs,
    client::{self, escape},
    mesh_api,
};

/// Set where the terminal has a type: the program inside may want to draw.
const PASSED_ON: &[&str] = &["TERM", "COLUMNS", "LINES"];

pub(super) fn run(args: ExecArgs) -> anyhow::Result<ExitCode> {
    let socket = mesh_api::socket(&args.common.mesh)?;
    let path = format!("/v1/exec?workload={}", escape(&args.workload));
    // The runtime ends with this statement: from here on the process has one thread.
    let mut spec: ExecSpec = one_thread()?.block_on(client::get(&socket, &path))?;
    spec.program.command = args.command;
    for name in PASSED_ON {
        if let Ok(value) = std::env::var(name) {
            spec.program.env.entry((*name).to_owned()).or_insert(value);
        }
    }
    let code = enter_and_run(&spec)?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}
