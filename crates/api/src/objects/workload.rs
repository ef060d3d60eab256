//! `heddle.dev/v1alpha1` Workload: a program that Heddle runs itself, without a cluster.
//!
//! Its fields are named after a Kubernetes pod's where there is such a field. What they become is in
//! [`crate::pod`]; ports are read in `workload_ports`, probes in `probe`, resources in `quantity`.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Metadata, probe, quantity, workload_ports};
use crate::{
    decode::{Cursor, Fields, Name, shorten},
    pod::{PodFile, PodPort, Probe, Resources, RestartPolicy},
};

/// The annotation that asks for spliced connections: `"true"` or `"false"`.
pub const SPLICE_ANNOTATION: &str = "heddle.dev/splice";
/// Most replicas of one workload.
const MAX_REPLICAS: u32 = 500;
/// Longest name: a replica's name adds `-` and up to three digits and must stay a DNS label.
const MAX_NAME_LENGTH: usize = 59;
/// Default time from SIGTERM to SIGKILL.
const DEFAULT_TERMINATION_GRACE: Duration = Duration::from_secs(5);
/// Default permission bits of a file.
const DEFAULT_FILE_MODE: u32 = 0o644;

/// A program, how it is run, and in how many replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Name, namespace, and the object's own labels.
    pub metadata: Metadata,
    /// The rest.
    pub spec: WorkloadSpec,
    /// Connections with other workloads that have this may skip the TCP stack ([`SPLICE_ANNOTATION`]).
    pub splice: bool,
}

/// See [`Workload`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadSpec {
    /// Labels of the replicas: `metadata.labels`, with `spec.labels` over them.
    pub labels: BTreeMap<String, String>,
    /// Program and arguments (`command` and then `args`); never empty.
    pub command: Vec<String>,
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// User name or uid, `None` for root.
    pub user: Option<String>,
    /// Working directory, absolute.
    pub working_dir: Option<String>,
    /// Files to place: absolute path to content.
    pub files: BTreeMap<String, PodFile>,
    /// Service account, default `default`.
    pub service_account: String,
    /// How many replicas, default 1; 0 is allowed.
    pub replicas: u32,
    /// Ports, those of the shorthand `publish` among them.
    pub ports: Vec<PodPort>,
    /// Decides whether a replica gets traffic.
    pub readiness: Option<Probe>,
    /// Decides whether the program is restarted.
    pub liveness: Option<Probe>,
    /// Limits.
    pub resources: Resources,
    /// What happens when the program ends.
    pub restart_policy: RestartPolicy,
    /// The node that all replicas run on; `None`: control spreads them.
    pub node: Option<String>,
    /// Time from SIGTERM to SIGKILL.
    pub termination_grace: Duration,
    /// Share of traffic against other endpoints of a service, default 1; 0: only if there is no other.
    pub weight: u32,
}

impl Workload {
    pub(super) fn decode(metadata: Metadata, fields: &mut Fields<'_>) -> Self {
        let at = fields.at();
        let mut spec = WorkloadSpec::new(metadata.labels.clone());
        if metadata.name.len() > MAX_NAME_LENGTH {
            let found = shorten(&metadata.name);
            at.error(
                format!("the name {found} is too long: replicas append their number"),
                format!("a name of at most {MAX_NAME_LENGTH} characters"),
            );
        }
        if let Some(cursor) = fields.require("spec", "a mapping with `command`") {
            spec.decode(&cursor);
        }
        let splice = metadata
            .annotations
            .get(SPLICE_ANNOTATION)
            .is_some_and(|value| value == "true");
        Self {
            metadata,
            spec,
            splice,
        }
    }
}

/// Looks at the annotations of any object: the one that [`Workload`] knows must be one of its two values, and be
/// where it has a meaning.
pub(super) fn check_annotations(annotations: &Cursor<'_>, kind: &str) {
    if !matches!(annotations.node().value, crate::yaml::Value::Mapping(_)) {
        return;
    }
    for (key, place, value) in annotations.entries() {
        let Some(text) = value.node().as_str().filter(|_| key == SPLICE_ANNOTATION) else {
            continue;
        };
        if kind != "Workload" {
            place.warn(format!("has no effect on a {kind}, only on a Workload"));
        } else if !matches!(text, "true" | "false") {
            let found = shorten(text);
            value.error(format!("{found} is neither"), "`\"true\"` or `\"false\"`");
        }
    }
}

impl WorkloadSpec {
    fn new(labels: BTreeMap<String, String>) -> Self {
        Self {
            labels,
            command: Vec::new(),
            env: BTreeMap::new(),
            user: None,
            working_dir: None,
            files: BTreeMap::new(),
            service_account: "default".to_owned(),
            replicas: 1,
            ports: Vec::new(),
            readiness: None,
            liveness: None,
            resources: Resources::default(),
            restart_policy: RestartPolicy::default(),
            node: None,
            termination_grace: DEFAULT_TERMINATION_GRACE,
            weight: 1,
        }
    }

    fn decode(&mut self, cursor: &Cursor<'_>) {
        let mut spec = cursor.fields();
        if let Some(labels) = spec.get("labels") {
            self.labels.extend(labels.labels());
        }
        if let Some(command) = spec.require("command", "a list of texts, the program first") {
            self.command = decode_command(&command);
        }
        if let Some(arguments) = spec.get("args") {
            self.command.extend(arguments.list(Cursor::argument));
        }
        if let Some(env) = spec.get("env") {
            self.env = decode_env(&env);
        }
        self.user = spec.get("user").map(|user| decode_user(&user));
        self.working_dir = spec.get("workingDir").map(|path| path.absolute_path());
        if let Some(files) = spec.get("files") {
            self.files = decode_files(&files);
        }
        if let Some(account) = spec.get("serviceAccountName") {
            self.service_account = account.name(Name::Subdomain);
        }
        if let Some(replicas) = spec.get("replicas") {
            self.replicas = replicas.integer(0..=MAX_REPLICAS);
        }
        self.ports = workload_ports::decode(spec.get("ports"), spec.get("publish"));
        self.readiness = spec
            .get("readinessProbe")
            .and_then(|probe| probe::decode(&probe, &self.ports, u32::MAX));
        // More than one success would mean nothing: the program restarts at the first "no".
        self.liveness = spec
            .get("livenessProbe")
            .and_then(|probe| probe::decode(&probe, &self.ports, 1));
        if let Some(resources) = spec.get("resources") {
            self.resources = quantity::resources(&resources);
        }
        if let Some(policy) = spec.get("restartPolicy") {
            let choices = [
                ("Always", RestartPolicy::Always),
                ("OnFailure", RestartPolicy::OnFailure),
                ("Never", RestartPolicy::Never),
            ];
            self.restart_policy = policy.choice(&choices).unwrap_or_default();
        }
        self.node = spec.get("node").map(|node| node.name(Name::Label));
        if let Some(grace) = spec.get("terminationGracePeriodSeconds") {
            self.termination_grace = grace.seconds(0.0..=3600.0);
        }
        if let Some(weight) = spec.get("weight") {
            self.weight = weight.integer(0..=1000);
        }
        spec.finish();
    }
}

/// A program and its arguments.
pub(super) fn decode_command(cursor: &Cursor<'_>) -> Vec<String> {
    let command = cursor.list(Cursor::argument);
    let is_list = matches!(cursor.node().value, crate::yaml::Value::Sequence(_));
    if is_list && command.first().is_none_or(String::is_empty) {
        cursor.error("names no program", "a list of texts, the program first");
    }
    command
}

fn decode_env(cursor: &Cursor<'_>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for item in cursor.items() {
        let mut fields = item.fields();
        let name = fields.require("name", "the variable's name");
        let value = fields.get("value").map(|value| value.argument());
        fields.unsupported(
            "valueFrom",
            "values from elsewhere are not supported yet",
            "`value`",
        );
        fields.finish();
        let Some(name) = name else {
            continue;
        };
        let text = name.argument();
        if text.is_empty() || text.contains('=') {
            let found = shorten(&text);
            name.error(
                format!("{found} cannot name a variable"),
                "a text without `=`",
            );
        }
        if env
            .insert(text.clone(), value.unwrap_or_default())
            .is_some()
        {
            name.error(
                format!("the variable {text} is given twice"),
                "every name once",
            );
        }
    }
    env
}

fn decode_user(cursor: &Cursor<'_>) -> String {
    if cursor.number_text().is_some() {
        return cursor.integer(0..=u32::MAX - 1).to_string();
    }
    let Some(text) = cursor.text() else {
        return String::new();
    };
    let uid_fits = text.parse::<u32>().is_ok_and(|uid| uid < u32::MAX);
    let name_like = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    let name_fits = (1..=32).contains(&text.len())
        && text.bytes().all(name_like)
        && !text.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    if !(uid_fits || name_fits) {
        let found = shorten(text);
        cursor.error(format!("{found} is not a user"), "a user name or a uid");
    }
    text.to_owned()
}

fn decode_files(cursor: &Cursor<'_>) -> BTreeMap<String, PodFile> {
    let mut files = BTreeMap::new();
    for item in cursor.items() {
        let mut fields = item.fields();
        let path = fields.require("path", "an absolute path");
        let content = fields.require("content", "the file's text");
        let mode = fields.get("mode").map(|mode| decode_mode(&mode));
        fields.finish();
        let Some(path) = path else {
            continue;
        };
        let text = path.absolute_path();
        if text.ends_with('/') {
            path.error("names a folder", "the path of a file");
        }
        let file = PodFile {
            content: content.map(|content| content.string()).unwrap_or_default(),
            mode: mode.unwrap_or(DEFAULT_FILE_MODE),
        };
        if files.insert(text.clone(), file).is_some() {
            path.error(format!("the file {text} is given twice"), "every path once");
        }
    }
    files
}

/// Permission bits. `0644`, `"0644"` and `0o644` are octal; other numbers are decimal, as in Kubernetes.
fn decode_mode(cursor: &Cursor<'_>) -> u32 {
    let text = cursor
        .number_text()
        .or_else(|| cursor.text())
        .unwrap_or("0644");
    let mode = match text.strip_prefix("0o").or_else(|| text.strip_prefix('0')) {
        Some(octal) => u32::from_str_radix(octal, 8),
        None => text.parse(),
    };
    match mode {
        Ok(mode) if mode <= 0o777 => mode,
        _ => {
            let found = shorten(text);
            let expected = "octal permission bits with a leading 0, such as 0644";
            cursor.error(format!("{found} is not a file mode"), expected);
            DEFAULT_FILE_MODE
        }
    }
}
