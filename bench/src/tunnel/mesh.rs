//! The mesh's side: two nodes, a server on one and clients on the other, under a policy that names the clients.

use std::{path::Path, process::Command};

use super::{
    Side,
    agents::{Agents, Resident},
    load, objects,
};
use crate::{direct, scenario::Ends};

/// Name of the benchmark's mesh: other meshes on the machine go on undisturbed.
const MESH: &str = "bench-tunnel";

/// A running mesh. Dropping it takes it down.
pub(super) struct Mesh {
    mesh: direct::mesh::Mesh,
    agents: Agents,
}

impl Mesh {
    /// Starts it with this many clients that have not connected yet, beside the one that is measured with.
    pub(super) fn start(heddle: &Path, ends: &Ends, cold_clients: usize) -> anyhow::Result<Self> {
        let objects = objects::all(ends, cold_clients);
        Ok(Self {
            mesh: direct::mesh::Mesh::up(heddle, MESH, 2, &objects)?,
            agents: Agents::of(MESH, objects::NODES)?,
        })
    }

    pub(super) fn memory(&self) -> anyhow::Result<Resident> {
        self.agents.memory()
    }

    /// Time in milliseconds of the first connection of a client that has made none.
    pub(super) fn cold(&self, ends: &Ends, client: usize, is_v6: bool) -> anyhow::Result<f64> {
        let host = if is_v6 {
            objects::SERVER_V6
        } else {
            objects::SERVER
        };
        let command = |arguments: &[String]| {
            Ok(self.exec(
                &objects::cold_client(client),
                &ends.program.display().to_string(),
                arguments,
            ))
        };
        load::cold_at(command, host)
    }

    fn exec(&self, workload: &str, program: &str, arguments: &[String]) -> Command {
        let mut command = self.mesh.command("exec");
        command.args([workload, "--", program]).args(arguments);
        command
    }
}

impl Side for Mesh {
    fn client(&self, program: &str, arguments: &[String]) -> anyhow::Result<Command> {
        Ok(self.exec(objects::CLIENT, program, arguments))
    }

    fn hosts(&self) -> [String; 2] {
        [objects::SERVER, objects::WEB].map(str::to_owned)
    }

    fn agents_cpu(&self) -> anyhow::Result<Option<u64>> {
        self.agents.cpu().map(Some)
    }
}
