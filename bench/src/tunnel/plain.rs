//! Plain TCP: the same programs in two namespaces that are joined by veth and bridge, without any of Heddle's code.

use std::{
    fs,
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use linux::place::Placement;

use super::{Side, objects};
use crate::{
    direct::plain::{Network, SERVER_ADDRESS, start_server},
    scenario::Ends,
};

/// How long nginx may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// The running baseline. Dropping it ends the servers.
pub(super) struct Plain {
    network: Network,
    servers: Vec<Child>,
    scratch: PathBuf,
}

impl Plain {
    /// Makes the namespaces and starts both servers.
    pub(super) fn start(ends: &Ends) -> anyhow::Result<Self> {
        let network = Network::create()?;
        let scratch =
            std::env::temp_dir().join(format!("heddle-bench-nginx-{}", std::process::id()));
        let mut plain = Self {
            network,
            servers: Vec::new(),
            scratch,
        };
        let server = plain.network.server.run(|| start_server(ends))??;
        plain.servers.push(server);
        plain.start_nginx()?;
        Ok(plain)
    }

    fn start_nginx(&mut self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.scratch)?;
        let scratch = self.scratch.display().to_string();
        let configuration = self.scratch.join("nginx.conf");
        fs::write(&configuration, objects::nginx_configuration(&scratch))?;
        let mut command = Command::new(objects::NGINX);
        command
            .args(objects::nginx_arguments(
                &configuration.display().to_string(),
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Placement::new()
            .netns(&self.network.server)
            .dies_with_parent()
            .apply(&mut command);
        self.servers
            .push(command.spawn().context("cannot start nginx")?);
        let deadline = Instant::now() + PATIENCE;
        let address = (SERVER_ADDRESS, objects::HTTP_PORT);
        let listens = || {
            Ok::<_, anyhow::Error>(
                self.network
                    .client
                    .run(|| TcpStream::connect(address))?
                    .is_ok(),
            )
        };
        while !listens()? {
            ensure!(Instant::now() < deadline, "nginx did not start to listen");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Side for Plain {
    fn client(&self, program: &str, arguments: &[String]) -> anyhow::Result<Command> {
        let mut command = Command::new(program);
        command.args(arguments);
        Placement::new()
            .netns(&self.network.client)
            .apply(&mut command);
        Ok(command)
    }

    fn hosts(&self) -> [String; 2] {
        [SERVER_ADDRESS, SERVER_ADDRESS].map(|address| address.to_string())
    }

    fn agents_cpu(&self) -> anyhow::Result<Option<u64>> {
        Ok(None)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        for server in &mut self.servers {
            // A server can only have ended already, which is as good. nginx ends its worker when it is asked to end.
            let pid = nix::unistd::Pid::from_raw(server.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = server.wait();
        }
        let _ = fs::remove_dir_all(&self.scratch);
    }
}
