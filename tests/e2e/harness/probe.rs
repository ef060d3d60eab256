//! What `programs/probe.py` says, run inside a workload: how the mesh looks to an ordinary program.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout},
};

use serde::{Deserialize, de::DeserializeOwned};

use super::{AT_ONCE, Mesh, Outcome, objects::PROBE_PATH};

/// One try to connect.
#[derive(Debug, Deserialize)]
pub(crate) struct Attempt {
    /// Name of the errno; `None` if it succeeded.
    pub(crate) error: Option<String>,
    /// From connect() to its error, or to the end of the exchange.
    pub(crate) milliseconds: f64,
    /// What getpeername() said.
    pub(crate) peer: Option<String>,
    greeting: Option<Greeting>,
}

/// What the server said of itself and of its caller.
#[derive(Debug, Deserialize)]
pub(crate) struct Greeting {
    pub(crate) pod: String,
    pub(crate) peer: String,
    pub(crate) address: String,
}

impl Attempt {
    /// It must have succeeded.
    #[track_caller]
    pub(crate) fn greeting(&self) -> &Greeting {
        let greeting = self.greeting.as_ref();
        greeting.unwrap_or_else(|| panic!("not connected: {self:?}"))
    }

    /// It must have failed with this errno, and at once.
    #[track_caller]
    pub(crate) fn failed(&self, error: &str) {
        assert_eq!(self.error.as_deref(), Some(error), "{self:?}");
        assert!(self.milliseconds < AT_ONCE, "{self:?}");
    }
}

/// An answer to a question about a name.
#[derive(Debug, Deserialize)]
pub(crate) struct DnsAnswer {
    /// As in RFC 1035: 0 is no error, 2 SERVFAIL, 3 NXDOMAIN.
    pub(crate) rcode: u8,
    pub(crate) records: Vec<String>,
    pub(crate) milliseconds: f64,
}

/// What getaddrinfo() found.
#[derive(Debug, Deserialize)]
pub(crate) struct Resolved {
    pub(crate) addresses: Vec<String>,
    pub(crate) error: Option<String>,
    pub(crate) milliseconds: f64,
}

impl Mesh {
    /// Connects once, by the first address that getaddrinfo() gives.
    #[track_caller]
    pub(crate) fn connect(&self, workload: &str, host: &str, port: u16) -> Attempt {
        self.attempts(workload, "any", host, port, 1).remove(0)
    }

    /// Connects `count` times; `family` is `any`, `4`, `6` or `mapped`.
    #[track_caller]
    pub(crate) fn attempts(
        &self,
        workload: &str,
        family: &str,
        host: &str,
        port: u16,
        count: u32,
    ) -> Vec<Attempt> {
        let arguments = [family, host, &port.to_string(), &count.to_string()];
        let attempts: Vec<Attempt> = lines(&self.probe(workload, "connect", &arguments));
        assert_eq!(attempts.len(), count as usize);
        attempts
    }

    /// Connects from a source address that need not be the workload's own.
    pub(crate) fn spoof(&self, workload: &str, source: &str, host: &str, port: u16) -> Attempt {
        let family = if source.contains(':') { "6" } else { "4" };
        let arguments = [family, source, host, &port.to_string()];
        one(&self.probe(workload, "spoof", &arguments))
    }

    /// Asks the workload's name server; `transport` is `udp` or `tcp`.
    pub(crate) fn dns(&self, workload: &str, transport: &str, name: &str, kind: &str) -> DnsAnswer {
        one(&self.probe(workload, "dns", &[transport, name, kind]))
    }

    /// Asks a name server that is not the workload's.
    pub(crate) fn dns_at(&self, workload: &str, server: &str, name: &str, kind: &str) -> DnsAnswer {
        one(&self.probe(workload, "dns", &["udp", name, kind, server]))
    }

    /// What getaddrinfo() finds.
    pub(crate) fn resolve(&self, workload: &str, host: &str) -> Resolved {
        one(&self.probe(workload, "resolve", &[host]))
    }

    /// The errno of a try that prints one, `None` if it succeeded.
    pub(crate) fn error_of(
        &self,
        workload: &str,
        command: &str,
        arguments: &[&str],
    ) -> Option<String> {
        one(&self.probe(workload, command, arguments))
    }

    /// A service's IPv4 address, as the workload resolves it.
    pub(crate) fn virtual_address(&self, workload: &str, service: &str) -> String {
        let found = self.resolve(workload, service).addresses;
        let v4 = found.iter().find(|address| !address.contains(':'));
        v4.unwrap_or_else(|| panic!("{service}: {found:?}")).clone()
    }

    /// Starts connecting again and again.
    pub(crate) fn request_loop(&self, workload: &str, host: &str, port: u16) -> RequestLoop {
        let mut talk = self.talk(workload, "loop", &[host, &port.to_string()]);
        let started: String = talk.hear();
        assert_eq!(started, "started");
        RequestLoop { talk }
    }

    /// Opens one connection and keeps it.
    pub(crate) fn hold(&self, workload: &str, host: &str, port: u16) -> Held {
        let mut talk = self.talk(workload, "hold", &[host, &port.to_string()]);
        let greeting = talk.hear();
        Held { talk, greeting }
    }

    /// Opens one connection, keeps it, and learns how it ends; `family` as in [`Mesh::attempts`].
    pub(crate) fn watch(&self, workload: &str, family: &str, host: &str, port: u16) -> Watched {
        let mut talk = self.talk(workload, "watch", &[family, host, &port.to_string()]);
        let _: Greeting = talk.hear();
        Watched { talk }
    }

    /// Keeps a connected datagram socket, and learns how it ends.
    pub(crate) fn watch_datagrams(
        &self,
        workload: &str,
        family: &str,
        host: &str,
        port: u16,
    ) -> Watched {
        let arguments = [family, host, &port.to_string()];
        let mut talk = self.talk(workload, "watch_datagrams", &arguments);
        let _: String = talk.hear();
        Watched { talk }
    }

    /// Starts a command of the probe's and talks with it.
    pub(crate) fn talk(&self, workload: &str, command: &str, arguments: &[&str]) -> Talk {
        let mut all = vec!["python3", PROBE_PATH, command];
        all.extend(arguments);
        Talk::with(self.spawn_exec(workload, &all))
    }

    fn probe(&self, workload: &str, command: &str, arguments: &[&str]) -> Outcome {
        let mut all = vec!["python3", PROBE_PATH, command];
        all.extend(arguments);
        self.exec(workload, &all).success()
    }
}

/// A client that connects again and again until it is told to stop.
pub(crate) struct RequestLoop {
    talk: Talk,
}

/// What a [`RequestLoop`] met.
#[derive(Debug, Deserialize)]
pub(crate) struct LoopReport {
    pub(crate) total: u64,
    /// How often each error came up.
    pub(crate) errors: BTreeMap<String, u64>,
}

impl RequestLoop {
    /// Stops it after one more request.
    pub(crate) fn finish(self) -> LoopReport {
        self.talk.finish()
    }
}

impl LoopReport {
    /// Not one request failed.
    #[track_caller]
    pub(crate) fn all_succeeded(&self) {
        assert!(self.total > 0 && self.errors.is_empty(), "{self:?}");
    }

    /// Every request was refused with this error.
    #[track_caller]
    pub(crate) fn all_failed(&self, error: &str) {
        assert!(self.total > 0, "{self:?}");
        assert_eq!(
            self.errors,
            [(error.to_owned(), self.total)].into(),
            "{self:?}"
        );
    }
}

/// One open connection.
pub(crate) struct Held {
    talk: Talk,
    /// What the server said of itself.
    pub(crate) greeting: Greeting,
}

impl Held {
    /// Sends a line and sees it come back.
    #[track_caller]
    pub(crate) fn exchange(&mut self, line: &str) {
        self.talk.say(line);
        assert_eq!(self.talk.hear::<String>(), format!("{line}\n"));
    }
}

/// One open connection whose end is told.
pub(crate) struct Watched {
    talk: Talk,
}

#[derive(Debug, Deserialize)]
struct End {
    ended: Option<String>,
}

impl Watched {
    /// Sends a line and sees it come back.
    #[track_caller]
    pub(crate) fn exchange(&mut self, line: &str) {
        self.talk.say(line);
        assert_eq!(self.talk.hear::<String>(), format!("{line}\n"));
    }

    /// Waits until it has ended; the name of the errno, `None` if the other side closed it.
    #[track_caller]
    pub(crate) fn ended(mut self) -> Option<String> {
        self.talk.hear::<End>().ended
    }
}

/// A program in a workload that is spoken to in lines, and answers in lines of JSON. Dropping it ends its input and
/// waits for its end.
pub(crate) struct Talk {
    child: Child,
    /// `None` once it has been ended.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Talk {
    /// With a program whose input and output are pipes.
    pub(crate) fn with(mut child: Child) -> Self {
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            input,
            output,
        }
    }

    /// Sends a line.
    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.input.as_ref().unwrap(), "{line}").unwrap();
    }

    /// Waits for a line.
    #[track_caller]
    pub(crate) fn hear<T: DeserializeOwned>(&mut self) -> T {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// Ends its input and waits for its last word.
    #[track_caller]
    pub(crate) fn finish<T: DeserializeOwned>(mut self) -> T {
        self.input = None;
        self.hear()
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.input = None;
        // How it ended is in what it said.
        let _ = self.child.wait();
    }
}

fn one<T: DeserializeOwned>(outcome: &Outcome) -> T {
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome:#?}"))
}

fn lines<T: DeserializeOwned>(outcome: &Outcome) -> Vec<T> {
    let lines = outcome.stdout.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}
