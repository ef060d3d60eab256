//! Probes, in Kubernetes' form.
//!
//! <https://kubernetes.io/docs/tasks/configure-pod-container/configure-liveness-readiness-startup-probes/>.
//! Times may have fractions here; the defaults are Kubernetes'.

use std::time::Duration;

use super::workload::decode_command;
use crate::{
    decode::{Cursor, Fields, Name},
    pod::{PodPort, Probe, ProbeAction},
};

/// Reads a probe; `ports` are the workload's own, for names. `None` if it says nothing that could be tried.
pub(super) fn decode(cursor: &Cursor<'_>, ports: &[PodPort], most_successes: u32) -> Option<Probe> {
    let mut fields = cursor.fields();
    let actions = [
        fields
            .get("tcpSocket")
            .and_then(|socket| tcp(&socket, ports)),
        fields.get("httpGet").and_then(|get| http(&get, ports)),
        fields.get("exec").map(|exec| command(&exec)),
    ];
    let given = ["tcpSocket", "httpGet", "exec"]
        .iter()
        .filter(|key| cursor.node().get(key).is_some())
        .count();
    fields.unsupported(
        "grpc",
        "gRPC probes are not supported yet",
        "tcpSocket, httpGet or exec",
    );
    if given != 1 && cursor.node().get("grpc").is_none() {
        let message = format!("{given} ways to probe are given");
        cursor.error(message, "exactly one of tcpSocket, httpGet, exec");
    }
    let probe = Probe {
        action: ProbeAction::Exec {
            command: Vec::new(),
        },
        initial_delay: seconds(&mut fields, "initialDelaySeconds", 0.0, 0.0),
        period: seconds(&mut fields, "periodSeconds", 0.1, 10.0),
        timeout: seconds(&mut fields, "timeoutSeconds", 0.01, 1.0),
        failure_threshold: threshold(&mut fields, "failureThreshold", u32::MAX, 3),
        success_threshold: threshold(&mut fields, "successThreshold", most_successes, 1),
    };
    fields.inert(&["terminationGracePeriodSeconds"]);
    fields.finish();
    let action = actions.into_iter().flatten().next()?;
    Some(Probe { action, ..probe })
}

fn seconds(fields: &mut Fields<'_>, key: &'static str, least: f64, default: f64) -> Duration {
    const ONE_DAY: f64 = 86_400.0;
    fields.get(key).map_or_else(
        || Duration::from_secs_f64(default),
        |value| value.seconds(least..=ONE_DAY),
    )
}

fn threshold(fields: &mut Fields<'_>, key: &'static str, most: u32, default: u32) -> u32 {
    fields
        .get(key)
        .map_or(default, |value| value.integer(1..=most))
}

fn tcp(cursor: &Cursor<'_>, ports: &[PodPort]) -> Option<ProbeAction> {
    let mut fields = cursor.fields();
    let port = required_port(&mut fields, ports);
    fields.inert(&["host"]);
    fields.finish();
    Some(ProbeAction::Tcp { port: port? })
}

fn http(cursor: &Cursor<'_>, ports: &[PodPort]) -> Option<ProbeAction> {
    let mut fields = cursor.fields();
    let port = required_port(&mut fields, ports);
    let path = fields.get("path").map_or_else(
        || "/".to_owned(),
        |path| {
            let text = path.string();
            let fits = |byte: u8| byte.is_ascii_graphic();
            if !text.starts_with('/') || !text.bytes().all(fits) {
                path.error(
                    "is not the path of a URL",
                    "a path that starts with `/`, without spaces",
                );
            }
            text
        },
    );
    let headers = fields.get("httpHeaders").map(|list| list.list(header));
    if let Some(scheme) = fields.get("scheme") {
        scheme.choice(&[("HTTP", ())]);
    }
    fields.inert(&["host"]);
    fields.finish();
    Some(ProbeAction::Http {
        port: port?,
        path,
        headers: headers.unwrap_or_default(),
    })
}

fn header(cursor: &Cursor<'_>) -> (String, String) {
    let mut fields = cursor.fields();
    let name = fields.require("name", "the header's name");
    let value = fields.require("value", "the header's value");
    fields.finish();
    // RFC 9110, 5.1 and 5.5: a token; visible characters, spaces and tabs.
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let visible = |byte: u8| !byte.is_ascii_control() || byte == b'\t';
    let read = |cursor: Option<Cursor<'_>>, fits: &dyn Fn(u8) -> bool, may_be_empty: bool| {
        let cursor = cursor?;
        let text = cursor.string();
        if !text.bytes().all(fits) || (text.is_empty() && !may_be_empty) {
            cursor.error(
                "cannot stand in a header",
                "no control characters, and no spaces in a name",
            );
        }
        Some(text)
    };
    (
        read(name, &token, false).unwrap_or_default(),
        read(value, &visible, true).unwrap_or_default(),
    )
}

fn command(cursor: &Cursor<'_>) -> ProbeAction {
    let mut fields = cursor.fields();
    let command = fields.require("command", "a list of texts, the program first");
    fields.finish();
    ProbeAction::Exec {
        command: command
            .map(|command| decode_command(&command))
            .unwrap_or_default(),
    }
}

/// `port`: a number, or the name of one of the workload's ports.
fn required_port(fields: &mut Fields<'_>, ports: &[PodPort]) -> Option<u16> {
    let port = fields.require("port", "a port number or the name of one of `ports`")?;
    if port.node().as_str().is_none() {
        return Some(port.port());
    }
    let name = port.name(Name::Port);
    let found = ports
        .iter()
        .find(|known| known.name.as_deref() == Some(&name));
    if found.is_none() {
        let message = format!("the workload has no port named `{name}`");
        port.error(message, "a port number or the name of one of `ports`");
    }
    found.map(|known| known.port)
}
