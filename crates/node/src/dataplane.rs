//! Puts the mesh's state and this node's workloads into the kernel's tables.
//!
//! Leaves before roots: what a number refers to is written before the number is shown, and removed after it was
//! taken away; so every connection sees the old rules or the new ones, never a mixture. What finds no room is
//! left out, which the kernel answers with a refusal, and is named in [`DataPlane::problems`].
//!
//! - [`services`]: service address → weighted table of endpoints
//! - [`rules`]: identities × policy sets → verdicts
//! - [`addresses`]: address → workload
//! - [`unapplied`]: what found no room, to be tried again

mod addresses;
mod rules;
mod services;
mod unapplied;

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    os::unix::fs::MetadataExt,
    sync::Arc,
};

use api::{enroll::EnrolledWorkload, mesh::MeshConfig, pod::Protocol};
use kernel::{
    CaptureKey, CaptureKind, CgroupEntry, DeviceEntry, Kernel, SocketClass, Tables, WorkloadEntry,
};

pub(crate) use self::services::{SharedEndpoint, endpoints};
use self::unapplied::{Part, Unapplied};
use crate::{
    NodeError,
    connections::Scope,
    dns::DNS_PORT,
    ids::Ids,
    names::{NameBook, WorkloadNames},
    state::{Changes, MeshState},
};

/// Problems kept for `heddle status`.
const MAX_PROBLEMS: usize = 64;

/// The kernel's tables and what is in them.
pub(crate) struct DataPlane {
    pub(crate) kernel: Kernel,
    pub(crate) problems: VecDeque<String>,
    /// How many problems there ever were.
    pub(crate) problem_count: u64,
    /// What is not in effect, and will be tried again.
    pub(crate) unapplied: Unapplied,
    pub(crate) names: Arc<NameBook>,
    rules: rules::Rules,
    services: services::Services,
    mesh: MeshConfig,
    node: String,
    ids: Ids,
    locals: HashMap<String, Local>,
    addresses: addresses::Addresses,
    /// What changes may have forbidden that nobody was told of yet.
    may_forbid: Scope,
}

/// A workload of this node, with its kernel-side names.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) id: u32,
    pub(crate) netns: u64,
    pub(crate) enrolled: EnrolledWorkload,
    app_cgroup: u64,
    proxy_cgroup: u64,
}

impl Local {
    /// The workload's address of a family (0: IPv4, 1: IPv6).
    fn address(&self, family: usize) -> Option<IpAddr> {
        self.enrolled
            .addresses
            .iter()
            .copied()
            .find(|address| usize::from(address.is_ipv6()) == family)
    }
}

impl DataPlane {
    pub(crate) fn new(
        kernel: Kernel,
        ids: Ids,
        mesh: MeshConfig,
        node: String,
        names: Arc<NameBook>,
    ) -> Self {
        let services = services::Services::recover(&kernel.tables);
        let addresses = addresses::Addresses::recover(&kernel.tables);
        Self {
            kernel,
            problems: VecDeque::new(),
            problem_count: 0,
            unapplied: Unapplied::default(),
            names,
            rules: rules::Rules::default(),
            services,
            mesh,
            node,
            ids,
            locals: HashMap::new(),
            addresses,
            may_forbid: Scope::default(),
        }
    }

    /// Marks the agent's own cgroup: its sockets are not captured.
    pub(crate) fn admit_agent(&mut self, cgroup: u64) -> Result<(), NodeError> {
        let entry = CgroupEntry {
            workload: 0,
            socket_class: SocketClass::Agent as u32,
        };
        self.kernel.tables.cgroups.set(cgroup, entry)?;
        Ok(())
    }

    /// Registers a workload of this node. Its rules follow with [`DataPlane::apply`].
    pub(crate) fn enroll(
        &mut self,
        enrolled: EnrolledWorkload,
        netns: u64,
    ) -> Result<(), NodeError> {
        let id = self
            .ids
            .named(&format!("workload:{}/{}", enrolled.uid, enrolled.instance))?;
        self.ids.save()?;
        let local = Local {
            id,
            netns,
            app_cgroup: cgroup_id(&enrolled, "app")?,
            proxy_cgroup: cgroup_id(&enrolled, "proxy")?,
            enrolled,
        };
        self.names.set_workload(id, self.names_of(&local));
        if let Err(error) = self.write_local(&local) {
            self.take_back(&local);
            return Err(error);
        }
        if let Some(old) = self.locals.insert(local.enrolled.uid.clone(), local)
            && old.id != id
        {
            self.clear_local(&old)?;
        }
        Ok(())
    }

    /// Forgets a workload of this node: its sockets, if any are left, are nobody's.
    pub(crate) fn retire(&mut self, uid: &str) -> Result<(), NodeError> {
        if let Some(local) = self.locals.remove(uid) {
            self.clear_local(&local)?;
            self.may_forbid = Scope::ALL;
        }
        Ok(())
    }

    /// What a workload that could not be enrolled as a whole leaves in the tables is room for others. One that was
    /// enrolled before keeps what it has.
    fn take_back(&mut self, local: &Local) {
        if self.locals.values().any(|other| other.id == local.id) {
            return;
        }
        if let Err(error) = self.clear_local(local) {
            tracing::error!(uid = local.enrolled.uid, %error, "cannot be taken back");
        }
    }

    /// Brings the tables up to date with what changed. What fails is kept in [`DataPlane::unapplied`]; the rest is
    /// applied.
    pub(crate) fn apply(&mut self, state: &MeshState, changes: &Changes) {
        self.apply_once(state, changes);
        // What one part has freed may be what another one needs.
        if !self.unapplied.is_empty() {
            let again = self.unapplied.changes();
            self.apply_once(state, &again);
        }
    }

    fn apply_once(&mut self, state: &MeshState, changes: &Changes) {
        let mut outcomes = Vec::new();
        let tables = &mut self.kernel.tables;
        let before: Vec<(u32, WorkloadEntry)> = tables
            .workloads
            .iter()
            .map(|(id, entry)| (*id, *entry))
            .collect();
        let mut failures = Vec::new();
        let local_changed = changes.workloads.iter().any(|name| {
            let now = state.workloads.get(name);
            now.is_some_and(|workload| self.locals.contains_key(&workload.pod()))
                || self.addresses.is_local(name)
        });
        let mut remote_changed = false;
        for name in &changes.workloads {
            remote_changed |= self.rules.take_remote(state, &self.locals, name);
        }
        let mut resettled = Vec::new();
        if changes.policies || local_changed || remote_changed {
            resettled = self.rules.apply(
                tables,
                &mut self.ids,
                state,
                &self.locals,
                &self.names,
                &mut failures,
            );
            let failures: Vec<String> = failures.iter().map(ToString::to_string).collect();
            let failure = (!failures.is_empty()).then(|| failures.join("; "));
            outcomes.push((Part::Policies, failure));
        }
        resettled.retain(|name| !changes.workloads.contains(name));
        for name in changes.workloads.iter().chain(&resettled) {
            let outcome = self.addresses.apply(
                tables,
                &mut self.ids,
                state,
                &self.locals,
                &self.node,
                name,
                &self.names,
                &self.mesh,
                self.rules.remote_sets(name),
            );
            let failure = outcome.err().map(|error| error.to_string());
            outcomes.push((Part::Workload(name.clone()), failure));
        }
        for name in &changes.services {
            let outcome =
                self.services
                    .apply(tables, &mut self.ids, state, &self.node, name, &self.names);
            let failure = outcome.err().map(|error| error.to_string());
            outcomes.push((Part::Service(name.clone()), failure));
        }
        for (name, members) in &changes.members {
            if changes.services.contains(name) {
                continue;
            }
            let outcome = self.services.apply_members(
                tables,
                &mut self.ids,
                state,
                &self.node,
                name,
                members,
                &self.names,
            );
            let failure = outcome.err().map(|error| error.to_string());
            outcomes.push((Part::Service(name.clone()), failure));
        }
        // Other rules, or none where there was no room for them: what went by the old ones is looked at again.
        let has_other_rules =
            |(id, entry): &(u32, WorkloadEntry)| tables.workloads.get(id) != Some(entry);
        let mut services = changes.services.iter().chain(changes.members.keys());
        if !failures.is_empty() || before.iter().any(has_other_rules) {
            self.may_forbid = self.may_forbid | Scope::ALL;
        } else if services.any(|name| may_take_datagrams(state, name)) {
            self.may_forbid = self.may_forbid | Scope::DATAGRAMS;
        }
        for (part, failure) in outcomes {
            if self.unapplied.note(part, failure) {
                self.problem_count += 1;
            }
        }
    }

    /// What the changes since the last call may have forbidden.
    pub(crate) fn take_forbidden(&mut self) -> Scope {
        std::mem::take(&mut self.may_forbid)
    }

    /// After a restart, once everything is known again: removes what belongs to nothing any more.
    pub(crate) fn reconcile(&mut self) -> Result<(), NodeError> {
        let tables = &mut self.kernel.tables;
        let locals: HashMap<u32, &Local> = self
            .locals
            .values()
            .map(|local| (local.id, local))
            .collect();
        let cgroups: Vec<u64> = self
            .locals
            .values()
            .flat_map(|local| [local.app_cgroup, local.proxy_cgroup])
            .collect();
        let agent = SocketClass::Agent as u32;
        let agents: Vec<u64> = tables
            .cgroups
            .iter()
            .filter(|(_, entry)| entry.socket_class == agent)
            .map(|(id, _)| *id)
            .collect();
        tables
            .cgroups
            .retain(|id| cgroups.contains(id) || agents.contains(id))?;
        tables.workloads.retain(|id| locals.contains_key(id))?;
        tables
            .capture
            .retain(|key| locals.contains_key(&key.workload))?;
        let devices: Vec<u32> = self
            .locals
            .values()
            .map(|local| local.enrolled.host_ifindex)
            .collect();
        tables.devices.retain(|index| devices.contains(index))?;
        let steered = self.kernel.steered()?;
        for gone in steered.iter().filter(|id| !locals.contains_key(id)) {
            self.kernel.unsteer(*gone)?;
        }
        let tables = &mut self.kernel.tables;
        self.addresses.reconcile(tables)?;
        self.services.reconcile(tables)?;
        self.rules.reconcile(tables)?;
        self.ids
            .forget_unused("workload", &locals.keys().copied().collect());
        self.ids.save()?;
        Ok(())
    }

    /// Notes a problem for `heddle status`.
    pub(crate) fn problem(&mut self, text: String) {
        tracing::error!(problem = %text, "not in effect");
        self.problem_count += 1;
        if self.problems.back() != Some(&text) {
            self.problems.push_back(text);
        }
        if self.problems.len() > MAX_PROBLEMS {
            self.problems.pop_front();
        }
    }

    pub(crate) fn local(&self, uid: &str) -> Option<&Local> {
        self.locals.get(uid)
    }

    pub(crate) fn locals(&self) -> impl Iterator<Item = &Local> {
        self.locals.values()
    }

    /// Whether rules for the workload are in the kernel.
    pub(crate) fn has_rules(&self, uid: &str) -> bool {
        self.locals
            .get(uid)
            .is_some_and(|local| self.kernel.tables.workloads.get(&local.id).is_some())
    }

    pub(crate) fn names_of(&self, local: &Local) -> WorkloadNames {
        let enrolled = &local.enrolled;
        WorkloadNames {
            namespace: enrolled.namespace.clone(),
            workload: enrolled.workload.clone(),
            pod: enrolled.name.clone(),
            identity: self
                .mesh
                .spiffe_id(&enrolled.namespace, &enrolled.service_account),
        }
    }

    fn write_local(&mut self, local: &Local) -> Result<(), NodeError> {
        let enrolled = &local.enrolled;
        let tables = &mut self.kernel.tables;
        let device = DeviceEntry {
            v4: local.address(0).map(Into::into).unwrap_or_default(),
            v6: local.address(1).map(Into::into).unwrap_or_default(),
            mac: enrolled.mac,
            padding: 0,
        };
        tables.devices.set(enrolled.host_ifindex, device)?;
        for (kind, port) in CAPTURES {
            let key = capture(local.id, kind);
            tables.capture.set(key, u32::from(port))?;
        }
        self.kernel.attach_device(enrolled.host_ifindex)?;
        for (cgroup, class) in [
            (local.app_cgroup, SocketClass::App),
            (local.proxy_cgroup, SocketClass::L7),
        ] {
            let entry = CgroupEntry {
                workload: local.id,
                socket_class: class as u32,
            };
            self.kernel.tables.cgroups.set(cgroup, entry)?;
        }
        Ok(())
    }

    fn clear_local(&mut self, local: &Local) -> Result<(), NodeError> {
        self.kernel.unsteer(local.id)?;
        let Tables {
            cgroups,
            workloads,
            capture,
            devices,
            ..
        } = &mut self.kernel.tables;
        let is_current = |cgroup: u64| {
            self.locals
                .values()
                .any(|other| other.app_cgroup == cgroup || other.proxy_cgroup == cgroup)
        };
        for cgroup in [local.app_cgroup, local.proxy_cgroup] {
            if !is_current(cgroup) {
                cgroups.remove(&cgroup)?;
            }
        }
        workloads.remove(&local.id)?;
        for (kind, _) in CAPTURES {
            capture.remove(&self::capture(local.id, kind))?;
        }
        let device = local.enrolled.host_ifindex;
        if !self
            .locals
            .values()
            .any(|other| other.enrolled.host_ifindex == device)
        {
            devices.remove(&device)?;
            self.kernel.detach_device(device)?;
        }
        self.names.retire_workload(local.id);
        Ok(())
    }
}

/// Connected datagram sockets hold on to an endpoint that their service may have lost.
fn may_take_datagrams(state: &MeshState, service: &str) -> bool {
    state.services.get(service).is_none_or(|service| {
        service
            .ports()
            .any(|(_, protocol)| protocol == Protocol::Udp)
    })
}

/// What goes to the agent, and at which of its ports in the workload's namespace.
const CAPTURES: [(CaptureKind, u16); 2] = [
    (CaptureKind::Dns, DNS_PORT),
    (CaptureKind::Agent, kernel::ports::OUTBOUND),
];

fn capture(workload: u32, kind: CaptureKind) -> CaptureKey {
    CaptureKey {
        workload,
        kind: kind as u32,
    }
}

fn cgroup_id(enrolled: &EnrolledWorkload, child: &str) -> Result<u64, NodeError> {
    let path = enrolled.cgroup.join(child);
    match std::fs::metadata(&path) {
        Ok(metadata) => Ok(metadata.ino()),
        Err(source) => Err(NodeError::Io {
            action: format!("look at cgroup {}", path.display()),
            source,
        }),
    }
}

/// A failure to put one thing into the tables.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
struct ApplyError {
    what: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl ApplyError {
    fn at<E: std::error::Error + Send + Sync + 'static>(what: &str) -> impl FnOnce(E) -> Self + '_ {
        move |source| Self {
            what: what.to_owned(),
            source: Box::new(source),
        }
    }
}

#[cfg(test)]
mod tests;
