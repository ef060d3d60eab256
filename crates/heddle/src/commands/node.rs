//! `heddle node`: the node agent as a process.

use std::{fs, process::ExitCode};

use anyhow::Context as _;
use api::node_config::NodeConfig;

use super::many_threads;
use crate::cli::NodeArgs;

pub(super) fn run(args: &NodeArgs) -> anyhow::Result<ExitCode> {
    let path = args.config.display();
    let text = fs::read_to_string(&args.config).with_context(|| format!("cannot read {path}"))?;
    let config: NodeConfig = serde_json::from_str(&text)
        .with_context(|| format!("{path} is no configuration of a node"))?;
    many_threads()?.block_on(node::run(config))?;
    Ok(ExitCode::SUCCESS)
}
