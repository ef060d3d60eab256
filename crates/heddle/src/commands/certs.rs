//! `heddle certs`: every identity's certificate on every node, and the rotation of the root.

use std::{
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use api::report::{Certificate, MeshStatus};
use hyper::Method;
use serde::Serialize;

use crate::{
    cli::{CertsArgs, CertsCommand, Output},
    client, mesh_api, output,
};

/// One line of the answer.
#[derive(Debug, Serialize)]
struct Line<'a> {
    node: &'a str,
    #[serde(flatten)]
    certificate: &'a Certificate,
}

pub(super) async fn run(args: CertsArgs) -> anyhow::Result<ExitCode> {
    let socket = mesh_api::socket(&args.common.mesh)?;
    if let Some(CertsCommand::RotateRoot) = args.command {
        drop(client::request(&socket, Method::POST, "/v1/certs/rotate-root").await?);
        println!(
            "a new root is announced; it signs when the nodes know it, and the old one goes when its last certificate has expired"
        );
        return Ok(ExitCode::SUCCESS);
    }
    let status: MeshStatus = client::get(&socket, "/v1/status").await?;
    let lines: Vec<Line<'_>> = status
        .nodes
        .iter()
        .flat_map(|entry| {
            let certificates = entry.status.iter().flat_map(|status| &status.certificates);
            certificates.map(|certificate| Line {
                node: &entry.node,
                certificate,
            })
        })
        .collect();
    match args.common.output {
        Output::Json => output::json(&lines)?,
        Output::Table => print(&lines),
    }
    Ok(ExitCode::SUCCESS)
}

fn print(lines: &[Line<'_>]) {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let mut table = output::table(&[
        "NODE",
        "IDENTITY",
        "STATE",
        "EXPIRES IN",
        "SERIAL",
        "WORKLOADS",
        "MESSAGE",
    ]);
    for Line { node, certificate } in lines {
        let expires = certificate
            .not_after
            .map_or_else(|| "-".into(), |end| span(end.saturating_sub(now)));
        table.add_row([
            *node,
            certificate.identity.trim_start_matches("spiffe://"),
            certificate.state.name(),
            &expires,
            &certificate.serial,
            &certificate.users.join(" "),
            certificate.last_error.as_deref().unwrap_or_default(),
        ]);
    }
    output::print(&table);
}

/// Seconds in the two units that tell most.
fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_told_in_two_units() {
        assert_eq!(span(0), "0 s");
        assert_eq!(span(61), "1 min 1 s");
        assert_eq!(span(86_399), "23 h 59 min");
        assert_eq!(span(90_000), "1 d 1 h");
    }
}
