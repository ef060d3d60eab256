//! `heddle explain SRC DST:PORT[/udp]`.

use std::process::ExitCode;

use anyhow::Context as _;
use api::report::{Explanation, Verdict};

use crate::{
    cli::{ExplainArgs, Output},
    client::{self, escape},
    mesh_api, output,
};

/// The answer is "no".
const DENIED: u8 = 3;

pub(super) async fn run(args: ExplainArgs) -> anyhow::Result<ExitCode> {
    let socket = mesh_api::socket(&args.common.mesh)?;
    let (host, port, protocol) = split(&args.destination)?;
    let path = format!(
        "/v1/explain?source={}&host={}&port={port}&protocol={protocol}",
        escape(&args.source),
        escape(host)
    );
    let answer: Explanation = client::get(&socket, &path).await?;
    match args.common.output {
        Output::Json => output::json(&answer)?,
        Output::Table => print(&answer),
    }
    Ok(match answer.verdict {
        Verdict::Allowed => ExitCode::SUCCESS,
        Verdict::Denied => ExitCode::from(DENIED),
    })
}

fn split(destination: &str) -> anyhow::Result<(&str, u16, &'static str)> {
    let expected = || {
        format!("`{destination}` is not HOST:PORT, such as api:80, [fd10::1]:80 or logs:514/udp")
    };
    let (host, port) = destination.rsplit_once(':').with_context(expected)?;
    let (port, protocol) = match port.split_once('/') {
        None | Some((_, "tcp")) => (port.trim_end_matches("/tcp"), "TCP"),
        Some((port, "udp")) => (port, "UDP"),
        Some(_) => anyhow::bail!(expected()),
    };
    let port = port.parse().with_context(expected)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host, port, protocol))
}

fn print(answer: &Explanation) {
    let source = &answer.source;
    println!(
        "from      {}/{} as {}",
        source.namespace, source.pod, source.identity
    );
    match &answer.service {
        Some(service) => println!("to        {} (service {service})", answer.asked),
        None => println!("to        {}", answer.asked),
    }
    let spliced = answer.endpoints.iter().filter(|end| end.spliced).count();
    match spliced {
        0 => println!("path      {}", answer.path),
        all if all == answer.endpoints.len() => println!("path      {} (spliced)", answer.path),
        some => println!("path      {} (spliced to {some} endpoints)", answer.path),
    }
    println!(
        "outcome   {} ({}: {})",
        answer.outcome, answer.reason, answer.text
    );
    if answer.endpoints.is_empty() {
        return;
    }
    println!("endpoints");
    let mut table = output::table(&[
        "ENDPOINT",
        "ADDRESS",
        "IDENTITY",
        "NODE",
        "SHARE",
        "VERDICT",
        "REASON",
        "DECIDED BY",
        "POLICIES",
    ]);
    for endpoint in &answer.endpoints {
        let end = &endpoint.destination;
        let address = end
            .address
            .map(|address| std::net::SocketAddr::new(address, end.port));
        table.add_row(vec![
            format!("{}/{}", end.namespace, end.pod),
            address
                .map(|address| address.to_string())
                .unwrap_or_default(),
            end.identity.trim_start_matches("spiffe://").to_owned(),
            endpoint.node.clone(),
            format!("{:.1} %", f64::from(endpoint.share) / 10.0),
            match endpoint.verdict {
                Verdict::Allowed => "allowed".into(),
                Verdict::Denied => "DENIED".into(),
            },
            endpoint.reason.clone(),
            endpoint.policy.clone().unwrap_or_else(|| "-".into()),
            endpoint.policies.join(", "),
        ]);
    }
    output::print(&table);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        assert_eq!(split("api:80").unwrap(), ("api", 80, "TCP"));
        assert_eq!(split("api:80/tcp").unwrap(), ("api", 80, "TCP"));
        assert_eq!(split("logs:514/udp").unwrap(), ("logs", 514, "UDP"));
        assert_eq!(split("[fd10::1]:80").unwrap(), ("fd10::1", 80, "TCP"));
        assert!(split("api:80/sctp").is_err());
        assert!(split("api").unwrap_err().to_string().contains("HOST:PORT"));
        assert!(split("api:http").is_err());
    }
}
