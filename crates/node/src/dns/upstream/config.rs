//! Which servers the machine asks, from its resolv.conf or from a list.

use std::{
    io,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    str::FromStr,
    time::Duration,
};

use nix::net::if_::if_nametoindex;
use thiserror::Error;

/// From a query's arrival to the client's SERVFAIL. Below the 5 seconds after which clients commonly
/// give up or ask again, so that they learn that nobody answered.
const DEADLINE: Duration = Duration::from_millis(4500);
/// As resolv.conf(5) has it: servers beyond the third are ignored.
const MAX_SERVERS: usize = 3;
/// As resolv.conf(5) has it.
const DEFAULT_TIMEOUT: u64 = 5;
/// As resolv.conf(5) has it.
const MAX_TIMEOUT: u64 = 30;
/// As resolv.conf(5) has it.
const DEFAULT_ATTEMPTS: u32 = 2;
/// As resolv.conf(5) has it.
const MAX_ATTEMPTS: u32 = 5;
/// However many servers there are, each is given this long before the next is asked too.
const LEAST_PATIENCE: Duration = Duration::from_millis(500);

/// Whom to ask and how long to wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// Servers in the order in which they are asked. With none, every query fails.
    pub servers: Vec<Nameserver>,
    /// Time that a server is given before the next is asked.
    pub timeout: Duration,
    /// Rounds over all servers.
    pub attempts: u32,
    /// Time after which a query has failed, over all servers and rounds.
    pub deadline: Duration,
}

impl UpstreamConfig {
    /// These servers, of which the first three are used, with the timing that resolv.conf(5) has by default.
    #[must_use]
    pub fn new(servers: Vec<Nameserver>) -> Self {
        let mut servers = servers;
        servers.truncate(MAX_SERVERS);
        Self {
            servers,
            timeout: Duration::from_secs(DEFAULT_TIMEOUT),
            attempts: DEFAULT_ATTEMPTS,
            deadline: DEADLINE,
        }
    }

    /// What the text of a resolv.conf says. As in the C library, lines that make no sense are passed over.
    #[must_use]
    pub fn from_resolv_conf(text: &str) -> Self {
        let mut config = Self::new(Vec::new());
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => config.add_server(words.next()),
                Some("options") => words.for_each(|option| config.set_option(option)),
                _ => {}
            }
        }
        config
    }

    /// Time after which the next server is asked too: less than asked for, if else not all would be asked in time.
    pub(super) fn patience(&self) -> Duration {
        let servers = u32::try_from(self.servers.len()).unwrap_or(u32::MAX);
        let tries = servers.saturating_mul(self.attempts).max(1);
        self.timeout
            .min((self.deadline / tries).max(LEAST_PATIENCE))
    }

    fn add_server(&mut self, server: Option<&str>) {
        if self.servers.len() < MAX_SERVERS
            && let Some(Ok(server)) = server.map(Nameserver::from_str)
        {
            self.servers.push(server);
        }
    }

    fn set_option(&mut self, option: &str) {
        match option.split_once(':') {
            Some(("timeout", seconds)) => {
                if let Ok(seconds) = seconds.parse::<u64>() {
                    self.timeout = Duration::from_secs(seconds.clamp(1, MAX_TIMEOUT));
                }
            }
            Some(("attempts", attempts)) => {
                if let Ok(attempts) = attempts.parse::<u32>() {
                    self.attempts = attempts.clamp(1, MAX_ATTEMPTS);
                }
            }
            _ => {}
        }
    }
}

/// A server to ask: `IP`, `IP:PORT`, `[IPV6]:PORT`; a link-local IPv6 address has `%INTERFACE` behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nameserver {
    address: IpAddr,
    port: u16,
    /// Name or number of the interface, resolved on use: it counts in the namespace of who asks.
    scope: Option<String>,
}

/// A text is not a [`Nameserver`].
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is no name server; expected IP, IP:PORT or [IPV6%INTERFACE]:PORT")]
pub struct NameserverError {
    /// The text.
    pub text: String,
}

impl Nameserver {
    /// Where to send queries.
    pub(super) fn socket_address(&self) -> io::Result<SocketAddr> {
        match (self.address, &self.scope) {
            (IpAddr::V6(address), Some(scope)) => {
                let index = match scope.parse() {
                    Ok(index) => index,
                    Err(_) => if_nametoindex(scope.as_str())?,
                };
                Ok(SocketAddrV6::new(address, self.port, 0, index).into())
            }
            (address, _) => Ok(SocketAddr::new(address, self.port)),
        }
    }
}

impl From<SocketAddr> for Nameserver {
    fn from(address: SocketAddr) -> Self {
        let scope = match address {
            SocketAddr::V6(v6) if v6.scope_id() != 0 => Some(v6.scope_id().to_string()),
            _ => None,
        };
        Self {
            address: address.ip(),
            port: address.port(),
            scope,
        }
    }
}

impl FromStr for Nameserver {
    type Err = NameserverError;

    fn from_str(text: &str) -> Result<Self, NameserverError> {
        let wrong = || NameserverError { text: text.into() };
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(wrong)?;
                (
                    host,
                    port.strip_prefix(':').or(port.is_empty().then_some("53")),
                )
            }
            // One colon is a port's, more are an IPv6 address's.
            None => match text.split_once(':') {
                Some((host, port)) if !port.contains(':') => (host, Some(port)),
                _ => (text, Some("53")),
            },
        };
        let port = port.and_then(|port| port.parse().ok()).ok_or_else(wrong)?;
        let (address, scope) = match host.split_once('%') {
            Some((address, scope)) => (address, Some(scope)),
            None => (host, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        if port == 0 || scope.is_some_and(|scope| address.is_ipv4() || scope.is_empty()) {
            return Err(wrong());
        }
        Ok(Self {
            address,
            port,
            scope: scope.map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Option<SocketAddr> {
        Nameserver::from_str(text).ok()?.socket_address().ok()
    }

    #[test]
    fn reads_every_form_of_server() {
        for (text, expected) in [
            ("10.0.0.1", "10.0.0.1:53"),
            ("10.0.0.1:5353", "10.0.0.1:5353"),
            ("fd00::1", "[fd00::1]:53"),
            ("[fd00::1]", "[fd00::1]:53"),
            ("[fd00::1]:5353", "[fd00::1]:5353"),
            ("fe80::1%7", "[fe80::1%7]:53"),
            ("fe80::1%lo", "[fe80::1%1]:53"),
            ("[fe80::1%lo]:54", "[fe80::1%1]:54"),
        ] {
            assert_eq!(address(text), expected.parse().ok(), "{text}");
        }
        for text in [
            "",
            "dns.example",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1%lo",
            "[fd00::1",
            "fe80::1%",
            "[::1]x",
        ] {
            assert!(Nameserver::from_str(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_interface_that_is_not_there_fails_on_use() {
        let server: Nameserver = "fe80::1%no-such-if".parse().unwrap();
        assert!(server.socket_address().is_err());
    }

    #[test]
    fn reads_resolv_conf() {
        let config = UpstreamConfig::from_resolv_conf(
            "# nameserver 9.9.9.9\n; comment\nsearch example.org\nnameserver 10.0.0.1\r\n\
             nameserver\nnameserver bad\n\tnameserver fe80::1%eth0 trailing\nnameserver 10.0.0.3\n\
             nameserver 10.0.0.4\noptions ndots:5 timeout:3 attempts:99 rotate timeout:x\n",
        );
        let servers = ["10.0.0.1", "fe80::1%eth0", "10.0.0.3"];
        let servers = servers.map(|server| server.parse().unwrap());
        assert_eq!(config.servers, servers);
        assert_eq!(config.timeout, Duration::from_secs(3));
        assert_eq!(config.attempts, MAX_ATTEMPTS);
        assert!(UpstreamConfig::from_resolv_conf("").servers.is_empty());
    }

    #[test]
    fn patience_leaves_time_for_every_server() {
        let server: Nameserver = "10.0.0.1".parse().unwrap();
        let mut config = UpstreamConfig::new(vec![server.clone(), server]);
        assert_eq!(config.patience(), DEADLINE / 4);
        config.timeout = Duration::from_secs(1);
        assert_eq!(config.patience(), Duration::from_secs(1));
        config.attempts = 1000;
        assert_eq!(config.patience(), LEAST_PATIENCE);
        config.servers.clear();
        assert_eq!(config.patience(), Duration::from_secs(1));
    }
}
