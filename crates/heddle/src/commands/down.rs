//! `heddle down`.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use hyper::Method;
use runtime::{
    claim,
    layout::{Layout, Lock},
};

use crate::{
    cli::{Common, Output},
    client, mesh_api, output,
};

/// How long a mesh may take to stop.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) async fn run(common: Common) -> anyhow::Result<ExitCode> {
    let layout = Layout::new(&common.mesh)?;
    let was_running = client::request(&layout.api_socket(), Method::POST, "/v1/down")
        .await
        .is_ok();
    if was_running {
        wait_until_gone(&layout).await?;
    }
    // Where no supervisor answers: what a killed one left, if anything.
    let cleaning = layout.clone();
    let report = tokio::task::spawn_blocking(move || claim::clean(&cleaning))
        .await
        .context("the clean-up ended abnormally")??;
    match std::fs::remove_file(mesh_api::log(&layout)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("cannot remove the mesh's log");
        }
        _ => {}
    }
    let found = was_running || !report.is_empty();
    match common.output {
        Output::Json => {
            output::json(&serde_json::json!({ "mesh": common.mesh, "stopped": found }))?;
        }
        Output::Table if found => println!("mesh `{}` is down", common.mesh),
        Output::Table => println!("mesh `{}` is not running", common.mesh),
    }
    Ok(ExitCode::SUCCESS)
}

async fn wait_until_gone(layout: &Layout) -> anyhow::Result<()> {
    let gone = async {
        // The lock is given up last.
        while layout.lock().exists() && Lock::try_take(&layout.lock())?.is_none() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(PATIENCE, gone).await {
        Ok(outcome) => outcome,
        Err(_) => bail!(
            "mesh `{}` was told to stop and has not within {} s; end the process named in {} and run this again",
            layout.mesh(),
            PATIENCE.as_secs(),
            layout.lock().display()
        ),
    }
}
