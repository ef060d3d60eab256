//! `heddle status`.

use std::process::ExitCode;

use api::{pod::PodPhase, report::MeshStatus};

use crate::{
    cli::{Common, Output},
    client, mesh_api, output,
};

pub(super) async fn run(common: Common) -> anyhow::Result<ExitCode> {
    let socket = mesh_api::socket(&common.mesh)?;
    let status: MeshStatus = client::get(&socket, "/v1/status").await?;
    match common.output {
        Output::Json => output::json(&status)?,
        Output::Table => print(&status),
    }
    Ok(ExitCode::SUCCESS)
}

/// The whole picture for people.
pub(super) fn print(status: &MeshStatus) {
    println!(
        "mesh {} (process {}, objects from {})",
        status.mesh, status.pid, status.source
    );
    println!();
    print_workloads(status);
    println!();
    print_nodes(status);
    print_maps(status);
    for published in &status.published {
        println!(
            "published: localhost:{} -> {}",
            published.host_port, published.workload
        );
    }
    let problems = status.all_problems();
    if !problems.is_empty() {
        println!("\nproblems");
        for problem in problems {
            println!("  {problem}");
        }
    }
}

fn print_workloads(status: &MeshStatus) {
    let mut table = output::table(&[
        "WORKLOAD", "NODE", "ADDRESS", "IDENTITY", "STATE", "READY", "RESTARTS", "MESSAGE",
    ]);
    for replica in &status.workloads {
        let state = match replica.status.phase {
            PodPhase::Pending => "pending",
            PodPhase::Running => "running",
            PodPhase::BackOff => "back-off",
            PodPhase::Succeeded => "succeeded",
            PodPhase::Failed => "failed",
            PodPhase::Terminating => "terminating",
        };
        table.add_row(vec![
            replica.status.uid.clone(),
            replica.status.node.clone(),
            replica
                .status
                .addresses
                .first()
                .map(ToString::to_string)
                .unwrap_or_default(),
            format!("ns/{}/sa/{}", replica.namespace, replica.service_account),
            state.into(),
            if replica.status.ready { "yes" } else { "no" }.into(),
            replica.status.restarts.to_string(),
            replica.status.message.clone().unwrap_or_default(),
        ]);
    }
    output::print(&table);
}

/// One line per node: NAME used/room. What cannot be counted has no number before the stroke.
fn print_maps(status: &MeshStatus) {
    for node in &status.nodes {
        let Some(agent) = &node.status else { continue };
        let maps: Vec<String> = agent
            .maps
            .iter()
            .filter_map(|map| {
                let capacity = map.capacity?;
                let entries = map
                    .entries
                    .map_or("-".into(), |entries| entries.to_string());
                Some(format!("{} {entries}/{capacity}", map.map))
            })
            .collect();
        println!("maps of {}: {}", node.node, maps.join(", "));
    }
}

fn print_nodes(status: &MeshStatus) {
    let mut table = output::table(&[
        "NODE",
        "AGENT",
        "POLICY",
        "WORKLOADS",
        "PROGRAMS",
        "FLOWS LOST",
    ]);
    for node in &status.nodes {
        match &node.status {
            Some(agent) => table.add_row(vec![
                node.node.clone(),
                format!("process {}", agent.pid),
                if agent.synced {
                    "in the kernel"
                } else {
                    "waiting for the control plane"
                }
                .into(),
                agent.enrolled.len().to_string(),
                agent.programs.len().to_string(),
                agent.flows_lost.to_string(),
            ]),
            None => table.add_row(vec![
                node.node.clone(),
                format!("away: {}", node.error.as_deref().unwrap_or("unknown")),
            ]),
        };
    }
    output::print(&table);
}
