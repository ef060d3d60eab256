//! Probes of a running pod: TCP, HTTP and commands, tried from inside of its network namespace.
//!
//! A try never leaves the pod: its socket is made in the pod's namespace and goes to the pod's own
//! address. Thresholds work as on Kubernetes: an answer changes after so many tries in a row.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use api::pod::{Probe, ProbeAction};
use http_body_util::Empty;
use hyper::{Request, body::Bytes, header::HOST};
use hyper_util::rt::TokioIo;
use linux::netns::Netns;
use tokio::{
    net::{TcpSocket, TcpStream},
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::exec::{self, ExecSpec};

/// The shortest period that is kept, whatever is asked for.
const SHORTEST_PERIOD: Duration = Duration::from_millis(10);

/// Where the tries go.
#[derive(Debug, Clone)]
pub(crate) struct ProbeTarget {
    pub(crate) netns: Netns,
    pub(crate) address: IpAddr,
    /// Enters the pod; its command is replaced by the probe's.
    pub(crate) exec: ExecSpec,
    pub(crate) executable: PathBuf,
}

/// Probes until the answer, which is `from` so far, has changed; says why. A "no" from the beginning is said once, too:
/// whoever waits for a program that never gets ready wants to know what it lacks.
pub(crate) struct Prober {
    probe: Probe,
    target: ProbeTarget,
    answer: bool,
    /// A reason for the answer so far has been given.
    explained: bool,
    ticks: tokio::time::Interval,
}

impl Prober {
    /// Waits the initial delay. The answer is `from` until tries say otherwise.
    pub(crate) async fn begin(probe: Probe, target: ProbeTarget, from: bool) -> Self {
        sleep(probe.initial_delay).await;
        let mut ticks = interval(probe.period.max(SHORTEST_PERIOD));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            probe,
            target,
            answer: from,
            explained: from,
            ticks,
        }
    }

    /// The next change of the answer: the new one, with the reason if it is "no".
    pub(crate) async fn change(&mut self) -> Result<(), String> {
        let mut in_a_row = 0;
        let mut last = self.answer;
        loop {
            self.ticks.tick().await;
            let result = attempt(&self.probe, &self.target).await;
            in_a_row = if result.is_ok() == last {
                in_a_row + 1
            } else {
                1
            };
            last = result.is_ok();
            let threshold = if last {
                self.probe.success_threshold
            } else {
                self.probe.failure_threshold
            };
            let is_news = last != self.answer || !self.explained;
            if is_news && in_a_row >= threshold.max(1) {
                self.answer = last;
                self.explained = true;
                return result;
            }
        }
    }
}

async fn attempt(probe: &Probe, target: &ProbeTarget) -> Result<(), String> {
    match timeout(probe.timeout, act(&probe.action, target)).await {
        Ok(result) => result,
        Err(_) => Err(format!(
            "{}: no answer within {:?}",
            describe(&probe.action),
            probe.timeout
        )),
    }
}

async fn act(action: &ProbeAction, target: &ProbeTarget) -> Result<(), String> {
    let failed = |error: String| format!("{}: {error}", describe(action));
    match action {
        ProbeAction::Tcp { port } => connect(target, *port)
            .await
            .map(drop)
            .map_err(|error| failed(error.to_string())),
        ProbeAction::Http {
            port,
            path,
            headers,
        } => get(target, *port, path, headers).await.map_err(failed),
        ProbeAction::Exec { command } => run(target, command).await.map_err(failed),
    }
}

fn describe(action: &ProbeAction) -> String {
    match action {
        ProbeAction::Tcp { port } => format!("TCP connection to port {port}"),
        ProbeAction::Http { port, path, .. } => format!("GET {path} on port {port}"),
        ProbeAction::Exec { command } => format!("command `{}`", command.join(" ")),
    }
}

async fn connect(target: &ProbeTarget, port: u16) -> io::Result<TcpStream> {
    let address = SocketAddr::new(target.address, port);
    let runtime = tokio::runtime::Handle::current();
    let socket = target.netns.run(|| {
        let _entered = runtime.enter();
        match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }
    })??;
    socket.connect(address).await
}

async fn get(
    target: &ProbeTarget,
    port: u16,
    path: &str,
    headers: &[(String, String)],
) -> Result<(), String> {
    let stream = connect(target, port)
        .await
        .map_err(|error| error.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let driver = tokio::spawn(connection);
    let mut request = Request::get(path).header("user-agent", "heddle-probe");
    if !headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("host"))
    {
        request = request.header(HOST, SocketAddr::new(target.address, port).to_string());
    }
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await;
    driver.abort();
    let status = response.map_err(|error| error.to_string())?.status();
    if (200..400).contains(&status.as_u16()) {
        Ok(())
    } else {
        Err(format!("status {status}"))
    }
}

async fn run(target: &ProbeTarget, command: &[String]) -> Result<(), String> {
    let mut spec = target.exec.clone();
    spec.program.command = command.to_vec();
    let command = exec::command(&target.executable, &spec).map_err(|error| error.to_string())?;
    let status = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .status()
        .await
        .map_err(|error| error.to_string())?;
    if status.success() {
        Ok(())
    } else {
        Err(status.to_string())
    }
}
