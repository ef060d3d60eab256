//! What the control plane has said, indexed for the questions the agent asks. Nothing of this node's own
//! workloads or of the kernel is here.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use api::pod::Protocol;
use prost::Message;
use xds::{
    client::{Update, Upsert},
    proto::{
        ADDRESS_TYPE, AUTHORIZATION_TYPE, address_from_bytes, heddle, security, workload,
        workload::address::Type,
    },
};

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
}

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
    pub(crate) services: HashSet<String>,
    /// Resource names.
    pub(crate) workloads: HashSet<String>,
    pub(crate) policies: bool,
}

impl MeshState {
    /// Takes an update in. Resources that cannot be understood are named in the error and keep their last good
    /// version; the others are in effect all the same.
    pub(crate) fn apply(&mut self, update: &Update, changes: &mut Changes) -> Result<(), String> {
        let mut bad = Vec::new();
        for upsert in &update.upserts {
            let outcome = match update.type_url.as_str() {
                ADDRESS_TYPE => self.upsert_address(upsert, changes),
                AUTHORIZATION_TYPE => self.upsert_policy(upsert, changes),
                other => Err(format!("type {other} was not asked for")),
            };
            if let Err(message) = outcome {
                bad.push(format!("{}: {message}", upsert.name));
            }
        }
        for name in &update.removed {
            match update.type_url.as_str() {
                ADDRESS_TYPE => {
                    self.remove_workload(name, changes);
                    self.remove_service(name, changes);
                }
                _ => changes.policies |= self.policies.remove(name).is_some(),
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

    /// The policies that apply to a workload: by scope, or because it lists them. Sorted by name.
    pub(crate) fn policies_of(
        &self,
        workload: &Workload,
    ) -> Vec<(&String, &Arc<security::Authorization>)> {
        self.policies
            .iter()
            .filter(|(name, policy)| match policy.scope() {
                security::Scope::Global => true,
                security::Scope::Namespace => policy.namespace == workload.message.namespace,
                security::Scope::WorkloadSelector => {
                    workload.message.authorization_policies.contains(name)
                }
            })
            .filter(|(_, policy)| !policy.dry_run)
            .collect()
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
        self.policies.insert(upsert.name.clone(), Arc::new(policy));
        changes.policies = true;
        Ok(())
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
            changes.services.insert(service.clone());
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
            changes.services.insert(service.clone());
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
