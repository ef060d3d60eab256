//! What the control plane has said, indexed for the questions the agent asks. Nothing of this node's own
//! workloads or of the kernel is here.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use api::pod::Protocol;
use ipnet::IpNet;
use prost::Message;
use sha2::{Digest as _, Sha256};
use xds::{
    client::{Update, Upsert},
    proto::{
        ADDRESS_TYPE, AUTHORIZATION_TYPE, address_from_bytes, heddle, security, workload,
        workload::address::Type,
    },
};

use crate::policy::Identity;

/// All workloads, services and policies known.
#[derive(Debug, Default)]
pub(crate) struct MeshState {
    pub(crate) workloads: HashMap<String, Arc<Workload>>,
    pub(crate) services: HashMap<String, Arc<Service>>,
    pub(crate) policies: BTreeMap<String, Arc<security::Authorization>>,
    /// `NAMESPACE/POD` to resource name.
    by_pod: HashMap<String, String>,
    by_address: HashMap<IpAddr, String>,
    by_vip: HashMap<IpAddr, String>,
    members: HashMap<String, BTreeSet<String>>,
    /// Policies that need no naming by a workload: by namespace, the whole mesh's under the empty one.
    scoped: HashMap<String, BTreeSet<String>>,
    /// Hash of each policy's content.
    digests: HashMap<String, Digest>,
    /// Client networks that policies name, and in how many places.
    networks: BTreeMap<IpNet, usize>,
}

/// SHA-256.
pub(crate) type Digest = [u8; 32];

/// A workload, with what needs decoding decoded once.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) ready: bool,
    pub(crate) message: workload::Workload,
    pub(crate) options: heddle::WorkloadOptions,
}

impl Workload {
    /// `NAMESPACE/POD`.
    pub(crate) fn pod(&self) -> String {
        format!("{}/{}", self.message.namespace, self.message.name)
    }

    /// Name of the `Workload` object that it is a replica of.
    pub(crate) fn object(&self) -> &str {
        match self.options.replica_of.as_str() {
            "" => &self.message.workload_name,
            object => object,
        }
    }

    pub(crate) fn service_account(&self) -> &str {
        match self.message.service_account.as_str() {
            "" => "default",
            account => account,
        }
    }

    pub(crate) fn trust_domain(&self) -> &str {
        match self.message.trust_domain.as_str() {
            "" => "cluster.local",
            domain => domain,
        }
    }

    /// As policies see it.
    pub(crate) fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain().to_owned(),
            namespace: self.message.namespace.clone(),
            service_account: self.service_account().to_owned(),
        }
    }

    pub(crate) fn weight(&self) -> u32 {
        self.message.capacity.unwrap_or(1)
    }
}

/// A service, with what needs decoding decoded once.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) vips: Vec<IpAddr>,
    pub(crate) message: workload::Service,
    pub(crate) options: heddle::ServiceOptions,
}

/// What an update touched, to be compiled anew.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Services that came, went or changed themselves.
    pub(crate) services: HashSet<String>,
    /// By service, the replicas (resource names) that joined it, left it or changed.
    pub(crate) members: HashMap<String, HashSet<String>>,
    /// Resource names.
    pub(crate) workloads: HashSet<String>,
    pub(crate) policies: bool,
}

impl Changes {
    /// Takes other changes in.
    pub(crate) fn add(&mut self, other: Self) {
        self.services.extend(other.services);
        for (service, members) in other.members {
            self.members.entry(service).or_default().extend(members);
        }
        self.workloads.extend(other.workloads);
        self.policies |= other.policies;
    }

    fn member(&mut self, service: &str, workload: &str) {
        // Looked up before it is copied: most changes are of one service.
        match self.members.get_mut(service) {
            Some(members) => drop(members.insert(workload.to_owned())),
            None => {
                let members = HashSet::from([workload.to_owned()]);
                self.members.insert(service.to_owned(), members);
            }
        }
    }
}

impl MeshState {
    /// Takes an update in. Resources that cannot be understood are named in the error and keep their last good
    /// version; the others are in effect all the same.
    pub(crate) fn apply(&mut self, update: &Update, changes: &mut Changes) -> Result<(), String> {
        self.take(&update.type_url, &update.upserts, &update.removed, changes)
    }

    pub(crate) fn take(
        &mut self,
        type_url: &str,
        upserts: &[Upsert],
        removed: &[String],
        changes: &mut Changes,
    ) -> Result<(), String> {
        let mut bad = Vec::new();
        for upsert in upserts {
            let outcome = match type_url {
                ADDRESS_TYPE => self.upsert_address(upsert, changes),
                AUTHORIZATION_TYPE => self.upsert_policy(upsert, changes),
                other => Err(format!("type {other} was not asked for")),
            };
            if let Err(message) = outcome {
                bad.push(format!("{}: {message}", upsert.name));
            }
        }
        for name in removed {
            match type_url {
                ADDRESS_TYPE => {
                    self.remove_workload(name, changes);
                    self.remove_service(name, changes);
                }
                _ => changes.policies |= self.remove_policy(name),
            }
        }
        if bad.is_empty() {
            Ok(())
        } else {
            Err(bad.join("; "))
        }
    }

    /// The workload of `NAMESPACE/POD`.
    pub(crate) fn pod(&self, pod: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(self.by_pod.get(pod)?)
    }

    /// Resource name of `NAMESPACE/POD`.
    pub(crate) fn resource_of(&self, pod: &str) -> Option<&str> {
        self.by_pod.get(pod).map(String::as_str)
    }

    /// The workload that has this address.
    pub(crate) fn owner(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads.get(self.by_address.get(&address)?)
    }

    /// The service that has this virtual address.
    pub(crate) fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.services.get(self.by_vip.get(&address)?)
    }

    /// The service's replicas, in a stable order.
    pub(crate) fn members(&self, service: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.members
            .get(service)
            .into_iter()
            .flatten()
            .filter_map(|name| self.workloads.get(name))
    }

    /// Resource names of the service's replicas.
    pub(crate) fn member_names(&self, service: &str) -> impl Iterator<Item = &String> {
        self.members.get(service).into_iter().flatten()
    }

    /// The replica of this resource name, if it is one of the service's.
    pub(crate) fn member(&self, service: &str, workload: &str) -> Option<&Arc<Workload>> {
        let members = self.members.get(service)?;
        self.workloads
            .get(workload)
            .filter(|_| members.contains(workload))
    }

    /// The policies that apply to a workload: by scope, or because it lists them. Sorted by name.
    pub(crate) fn policies_of(
        &self,
        workload: &Workload,
    ) -> Vec<(String, Arc<security::Authorization>)> {
        let message = &workload.message;
        let scoped = ["", message.namespace.as_str()]
            .into_iter()
            .filter_map(|namespace| self.scoped.get(namespace))
            .flatten();
        let listed = message.authorization_policies.iter().filter(|name| {
            self.policies
                .get(*name)
                .is_some_and(|policy| policy.scope() == security::Scope::WorkloadSelector)
        });
        let names: BTreeSet<&String> = scoped.chain(listed).collect();
        names
            .into_iter()
            .filter_map(|name| self.policies.get_key_value(name))
            .filter(|(_, policy)| !policy.dry_run)
            .map(|(name, policy)| (name.clone(), Arc::clone(policy)))
            .collect()
    }

    /// The hash of a policy's content; of none, if there is no policy of this name.
    pub(crate) fn policy_digest(&self, name: &str) -> Digest {
        self.digests.get(name).copied().unwrap_or_default()
    }

    /// Networks that any policy tells clients apart by, in order.
    pub(crate) fn networks(&self) -> Vec<IpNet> {
        self.networks.keys().copied().collect()
    }

    /// Whether every policy that the workload lists is here.
    pub(crate) fn has_policies_of(&self, workload: &Workload) -> bool {
        workload
            .message
            .authorization_policies
            .iter()
            .all(|name| self.policies.contains_key(name))
    }

    fn upsert_address(&mut self, upsert: &Upsert, changes: &mut Changes) -> Result<(), String> {
        let address = workload::Address::decode(upsert.body.clone()).map_err(|e| e.to_string())?;
        match address.r#type {
            Some(Type::Workload(message)) => {
                let decoded = Workload::decode(message)?;
                self.remove_workload(&upsert.name, changes);
                self.insert_workload(upsert.name.clone(), decoded, changes);
            }
            Some(Type::Service(message)) => {
                let decoded = Service::decode(message)?;
                self.remove_service(&upsert.name, changes);
                for vip in &decoded.vips {
                    self.by_vip.insert(*vip, upsert.name.clone());
                }
                changes.services.insert(upsert.name.clone());
                self.services.insert(upsert.name.clone(), Arc::new(decoded));
            }
            None => return Err("is neither a workload nor a service".into()),
        }
        Ok(())
    }

    fn upsert_policy(&mut self, upsert: &Upsert, changes: &mut Changes) -> Result<(), String> {
        let policy =
            security::Authorization::decode(upsert.body.clone()).map_err(|e| e.to_string())?;
        crate::policy::validate(&policy)?;
        self.remove_policy(&upsert.name);
        for network in crate::policy::named_sources(std::iter::once(&policy)) {
            *self.networks.entry(network).or_default() += 1;
        }
        if let Some(scope) = scope_of(&policy) {
            let scoped = self.scoped.entry(scope.to_owned()).or_default();
            scoped.insert(upsert.name.clone());
        }
        self.digests
            .insert(upsert.name.clone(), Sha256::digest(&upsert.body).into());
        self.policies.insert(upsert.name.clone(), Arc::new(policy));
        changes.policies = true;
        Ok(())
    }

    /// Returns whether it was there.
    fn remove_policy(&mut self, name: &str) -> bool {
        let Some(policy) = self.policies.remove(name) else {
            return false;
        };
        self.digests.remove(name);
        if let Some(scope) = scope_of(&policy)
            && let Some(scoped) = self.scoped.get_mut(scope)
        {
            scoped.remove(name);
            if scoped.is_empty() {
                self.scoped.remove(scope);
            }
        }
        for network in crate::policy::named_sources(std::iter::once(policy.as_ref())) {
            if let Entry::Occupied(mut uses) = self.networks.entry(network) {
                *uses.get_mut() -= 1;
                if *uses.get() == 0 {
                    uses.remove();
                }
            }
        }
        true
    }

    fn insert_workload(&mut self, name: String, workload: Workload, changes: &mut Changes) {
        self.by_pod.insert(workload.pod(), name.clone());
        for address in &workload.addresses {
            self.by_address.insert(*address, name.clone());
        }
        for service in workload.message.services.keys() {
            self.members
                .entry(service.clone())
                .or_default()
                .insert(name.clone());
            changes.member(service, &name);
        }
        changes.workloads.insert(name.clone());
        self.workloads.insert(name, Arc::new(workload));
    }

    fn remove_workload(&mut self, name: &str, changes: &mut Changes) {
        let Some(workload) = self.workloads.remove(name) else {
            return;
        };
        if self
            .by_pod
            .get(&workload.pod())
            .is_some_and(|other| other == name)
        {
            self.by_pod.remove(&workload.pod());
        }
        for address in &workload.addresses {
            if self
                .by_address
                .get(address)
                .is_some_and(|other| other == name)
            {
                self.by_address.remove(address);
            }
        }
        for service in workload.message.services.keys() {
            if let Some(members) = self.members.get_mut(service) {
                members.remove(name);
                if members.is_empty() {
                    self.members.remove(service);
                }
            }
            changes.member(service, name);
        }
        changes.workloads.insert(name.to_owned());
    }

    fn remove_service(&mut self, name: &str, changes: &mut Changes) {
        if let Some(service) = self.services.remove(name) {
            for vip in &service.vips {
                if self.by_vip.get(vip).is_some_and(|other| other == name) {
                    self.by_vip.remove(vip);
                }
            }
            changes.services.insert(name.to_owned());
        }
    }
}

/// The namespace that a policy applies to by itself (the whole mesh: the empty one), or `None`.
fn scope_of(policy: &security::Authorization) -> Option<&str> {
    match policy.scope() {
        security::Scope::Global => Some(""),
        security::Scope::Namespace => Some(&policy.namespace),
        security::Scope::WorkloadSelector => None,
    }
}

impl Workload {
    fn decode(message: workload::Workload) -> Result<Self, String> {
        let addresses = message
            .addresses
            .iter()
            .map(|bytes| {
                address_from_bytes(bytes).ok_or("an address is neither 4 nor 16 bytes long")
            })
            .collect::<Result<_, _>>()?;
        let options = message.options().map_err(|error| error.to_string())?;
        Ok(Self {
            addresses,
            ready: message.status() == workload::WorkloadStatus::Healthy && !options.draining,
            message,
            options,
        })
    }
}

impl Service {
    /// Ports with their transport: the API's own list says nothing of it, so Heddle's runs beside it.
    pub(crate) fn ports(&self) -> impl Iterator<Item = (u16, Protocol)> {
        let numbers = self.message.ports.iter().map(|port| port.service_port);
        numbers.enumerate().filter_map(|(index, number)| {
            let beside = self.options.port_protocols.get(index);
            let beside = beside.filter(|beside| beside.service_port == number);
            let protocol = match beside.map(heddle::PortProtocol::protocol) {
                Some(heddle::Protocol::Udp) => Protocol::Udp,
                _ => Protocol::Tcp,
            };
            Some((u16::try_from(number).ok()?, protocol))
        })
    }

    fn decode(message: workload::Service) -> Result<Self, String> {
        let vips = message
            .addresses
            .iter()
            .map(|address| {
                address_from_bytes(&address.address)
                    .ok_or("a virtual address is neither 4 nor 16 bytes long")
            })
            .collect::<Result<_, _>>()?;
        let options = message.options().map_err(|error| error.to_string())?;
        Ok(Self {
            vips,
            message,
            options,
        })
    }
}
