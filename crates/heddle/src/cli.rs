//! The command line.

use std::path::PathBuf;

use api::map_sizes::MapSize;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Heddle: a service mesh whose connections take the shortest path that policy allows.
#[derive(Debug, Parser)]
#[command(name = "heddle", version, propagate_version = true)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command has.
#[derive(Debug, Clone, Args)]
pub(crate) struct Common {
    /// Name of the mesh.
    #[arg(
        long,
        env = "HEDDLE_MESH",
        default_value = "default",
        value_name = "NAME"
    )]
    pub(crate) mesh: String,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs: one document, or one per line where the output is a stream.
    Json,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a mesh on this machine from the objects in a folder.
    Up(UpArgs),
    /// Stop a mesh and remove all that it made.
    Down(Common),
    /// Run a command inside a workload: its namespaces, cgroup and identity.
    Exec(ExecArgs),
    /// Print what a workload wrote to its standard output and error.
    Logs(LogsArgs),
    /// Show workloads, nodes, objects and what is not as it should be.
    Status(Common),
    /// Show the certificates of all identities: serial, expiry, who has them. Rotate the mesh's root.
    Certs(CertsArgs),
    /// Show connections, past and open: both identities, verdict, bytes, round-trip time.
    Flows(FlowsArgs),
    /// Say which path a connection would take, and which object decides it.
    Explain(ExplainArgs),
    /// Validate the objects in a folder without running anything.
    Check(CheckArgs),
    /// Run a node agent (`heddle up` starts one per node).
    Node(NodeArgs),
    /// Carry published ports into the mesh (started by `heddle up`).
    #[command(hide = true, name = runtime::publish::SUBCOMMAND)]
    PublishRelay,
    /// Clean up after a mesh whose supervisor was killed (started by `heddle up`).
    #[command(hide = true)]
    Guardian(GuardianArgs),
}

impl Command {
    /// Runs until it is stopped, and logs.
    pub(crate) fn is_daemon(&self) -> bool {
        matches!(
            self,
            Self::Up(_) | Self::Node(_) | Self::PublishRelay | Self::Guardian(_)
        )
    }
}

/// Arguments of `heddle up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Folder with the objects (`*.yaml`, `*.yml`, `*.json`, also in subfolders). Edits apply live.
    pub(crate) dir: PathBuf,
    /// Number of nodes, each a network namespace with an agent of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) nodes: u8,
    /// Return when all workloads are ready, and leave the mesh running in the background.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// With --detach: seconds to wait for all workloads to be ready.
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    pub(crate) timeout: u64,
    /// Name server for names outside the mesh, instead of the machine's own; may be given several times.
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    pub(crate) dns_upstream: Vec<String>,
    /// Room in a kernel map, such as `verdicts=500000`; may be given several times. `heddle status` shows what is used.
    #[arg(long, value_name = "NAME=N")]
    pub(crate) map_size: Vec<MapSize>,
    #[command(flatten)]
    pub(crate) ca: CaArgs,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// The certificate authority of `heddle up`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CaArgs {
    /// Your own CA instead of a new one: its certificate, then the chain up to the root (PEM).
    #[arg(long, value_name = "FILE", requires = "ca_key")]
    pub(crate) ca_cert: Option<PathBuf>,
    /// The key of --ca-cert (PEM).
    #[arg(long, value_name = "FILE", requires = "ca_cert")]
    pub(crate) ca_key: Option<PathBuf>,
    /// Folder to keep the CA in, so that another run goes on with it; without it, it ends with the mesh.
    #[arg(long, value_name = "DIR")]
    pub(crate) ca_dir: Option<PathBuf>,
    /// Lifetime of certificates, such as `90m`; they are renewed at half of it.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = parse_span)]
    pub(crate) cert_lifetime: std::time::Duration,
}

/// Arguments of `heddle certs`.
#[derive(Debug, Args)]
pub(crate) struct CertsArgs {
    /// What to do; without it, certificates are shown.
    #[command(subcommand)]
    pub(crate) command: Option<CertsCommand>,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Subcommands of `heddle certs`.
#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum CertsCommand {
    /// Begin to replace the root: both are trusted until the last certificate of the old one has expired.
    RotateRoot,
}

/// Arguments of `heddle exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// [NAMESPACE/]WORKLOAD or [NAMESPACE/]REPLICA.
    pub(crate) workload: String,
    /// Program and arguments.
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<String>,
}

/// Arguments of `heddle logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// [NAMESPACE/]WORKLOAD, [NAMESPACE/]REPLICA, or `node/NAME` for a node agent.
    pub(crate) workload: String,
    /// Go on with what is written from now on.
    #[arg(short, long)]
    pub(crate) follow: bool,
}

/// Arguments of `heddle flows`.
#[derive(Debug, Args)]
pub(crate) struct FlowsArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Go on with the connections to come.
    #[arg(short, long, conflicts_with = "summary")]
    pub(crate) follow: bool,
    /// Only the connections that are open now, with their figures as they stand.
    #[arg(long, conflicts_with = "follow")]
    pub(crate) open: bool,
    /// One line per client, server and verdict instead of one per connection.
    #[arg(long)]
    pub(crate) summary: bool,
    /// Only from this [NAMESPACE/]WORKLOAD.
    #[arg(long, value_name = "WORKLOAD")]
    pub(crate) from: Option<String>,
    /// Only to this [NAMESPACE/]WORKLOAD or service.
    #[arg(long, value_name = "WORKLOAD")]
    pub(crate) to: Option<String>,
    /// Only allowed or only denied ones.
    #[arg(long, value_enum)]
    pub(crate) verdict: Option<VerdictFilter>,
    /// Only with this reason, such as `no-allow-matched`.
    #[arg(long)]
    pub(crate) reason: Option<String>,
    /// Only of the last so many seconds, minutes or hours: `30s`, `5m`, `1h`.
    #[arg(long, value_parser = parse_span)]
    pub(crate) since: Option<std::time::Duration>,
}

/// Which verdicts to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerdictFilter {
    /// Allowed ones.
    Allowed,
    /// Denied ones.
    Denied,
}

/// Arguments of `heddle explain`.
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// The client: [NAMESPACE/]WORKLOAD or [NAMESPACE/]REPLICA.
    pub(crate) source: String,
    /// Where it connects: a name as the client would use it, or an address; and a port, with /udp for datagrams.
    #[arg(value_name = "HOST:PORT[/udp]")]
    pub(crate) destination: String,
}

/// Arguments of `heddle check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Folder with the objects.
    pub(crate) dir: PathBuf,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// Arguments of `heddle node`.
#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// Configuration, as `heddle up` writes it.
    #[arg(long)]
    pub(crate) config: PathBuf,
}

/// Arguments of `heddle guardian`, as `heddle up` passes them.
#[derive(Debug, Args)]
pub(crate) struct GuardianArgs {
    /// The mesh's folder.
    #[arg(long)]
    pub(crate) run_dir: PathBuf,
    /// The mesh's cgroup.
    #[arg(long)]
    pub(crate) cgroup: PathBuf,
    /// The mesh's lock.
    #[arg(long)]
    pub(crate) lock: PathBuf,
}

fn parse_span(text: &str) -> Result<std::time::Duration, String> {
    let (digits, unit) = text.split_at(
        text.find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len()),
    );
    let number: u64 = digits.parse().map_err(|_| expected_span(text))?;
    let seconds = match unit {
        "s" | "" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(expected_span(text)),
    };
    Ok(std::time::Duration::from_secs(
        number.saturating_mul(seconds),
    ))
}

fn expected_span(text: &str) -> String {
    format!("`{text}` is no time span: write a number with s, m or h, such as 30s or 5m")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn spans() {
        assert_eq!(parse_span("5m").unwrap().as_secs(), 300);
        assert_eq!(parse_span("30").unwrap().as_secs(), 30);
        assert!(parse_span("5d").unwrap_err().contains("30s"));
        assert!(parse_span("m").is_err());
    }
}
