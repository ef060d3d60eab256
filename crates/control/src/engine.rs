//! The control plane as one state: objects and reports go in, pods, published ports, xDS resources and problems come out.
//!
//! No tasks and no files here; `plane` feeds it. When objects change, everything that follows from objects is compiled anew,
//! which takes milliseconds per thousand objects, and the cache finds what differs. A report of a replica recompiles that replica alone.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use api::{
    Located,
    mesh::MeshConfig,
    objects::ObjectRef,
    pod::{PodSpec, PodStatus},
    problem::{Problem, Severity},
};
use tokio::sync::watch;
use xds::{
    cache::{Cache, Change},
    proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE},
};

use crate::{
    ca::Placed,
    check,
    compile::{
        self, Addresses, Compiled,
        service::{self, as_service},
        workload::{ReplicaState, resource_name},
    },
    expand::{self, Replica},
    placement::Placement,
    publish::{self, PublishService, PublishedPort},
    source::Scan,
    status::{ObjectState, ObjectView, View},
    store::Store,
    vip::{VirtualAddresses, Wish},
};

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Engine {
    mesh: MeshConfig,
    cache: Cache,
    store: Store,
    placement: Placement,
    vips: VirtualAddresses,
    /// Replicas that should run, and those that may still be running.
    replicas: BTreeMap<String, Replica>,
    wanted: HashSet<String>,
    /// Replicas that somebody else asks the runtime for, and that have an identity like all others.
    system: Vec<PodSpec>,
    statuses: HashMap<String, PodStatus>,
    compiled: Compiled,
    /// The version of each object that was last compiled, and the cache's generation that first had it.
    in_effect: BTreeMap<ObjectRef, (Arc<Located>, u64)>,
    outputs: Outputs,
}

/// What others follow.
#[derive(Debug, Clone)]
pub(crate) struct Outputs {
    pub(crate) pods: watch::Sender<Arc<Vec<PodSpec>>>,
    pub(crate) published: watch::Sender<Arc<Vec<PublishedPort>>>,
    pub(crate) problems: watch::Sender<Arc<Vec<Problem>>>,
    pub(crate) view: watch::Sender<Arc<View>>,
    /// Which accounts are where, for the certificate authority.
    pub(crate) placed: Arc<Placed>,
}

impl Default for Outputs {
    fn default() -> Self {
        Self {
            pods: watch::Sender::new(Arc::default()),
            published: watch::Sender::new(Arc::default()),
            problems: watch::Sender::new(Arc::default()),
            view: watch::Sender::new(Arc::default()),
            placed: Arc::default(),
        }
    }
}

impl Engine {
    pub(crate) fn new(
        mesh: MeshConfig,
        nodes: Vec<String>,
        system: Vec<PodSpec>,
        cache: Cache,
        outputs: Outputs,
    ) -> Self {
        Self {
            vips: VirtualAddresses::new(&mesh),
            mesh,
            cache,
            store: Store::default(),
            placement: Placement::new(nodes),
            replicas: BTreeMap::new(),
            wanted: HashSet::new(),
            system,
            statuses: HashMap::new(),
            compiled: Compiled::default(),
            in_effect: BTreeMap::new(),
            outputs,
        }
    }

    /// Takes in what the folder holds now.
    pub(crate) fn apply_scan(&mut self, scan: &Scan) {
        if self.store.apply(scan) {
            self.rebuild();
        }
    }

    /// Takes in what the runtime says of replicas; `None` when one is gone. Reports on replicas that were never asked
    /// for are ignored.
    pub(crate) fn apply_reports(
        &mut self,
        reports: impl IntoIterator<Item = (String, Option<PodStatus>)>,
    ) {
        let mut changes = Vec::new();
        for (uid, status) in reports {
            let Some(replica) = self.replicas.get(&uid) else {
                continue;
            };
            let name = resource_name(&replica.spec.namespace, &replica.spec.name);
            match status {
                Some(status) => {
                    self.statuses.insert(uid.clone(), status);
                }
                None => {
                    self.statuses.remove(&uid);
                }
            }
            changes.push(Change {
                type_url: ADDRESS_TYPE.to_owned(),
                name,
                body: self.replica_resource(&uid).map(|(_, body)| body),
            });
            if !self.statuses.contains_key(&uid) && !self.wanted.contains(&uid) {
                self.replicas.remove(&uid);
            }
            self.note_place(&uid);
        }
        self.cache.apply(changes);
    }

    /// Makes everything that follows from the objects anew.
    fn rebuild(&mut self) {
        let mut problems = check::all_problems(&self.store, &self.mesh);
        problems.extend(self.expand());
        let publish = publish::services(&self.store);
        let (addresses, unaddressed) = self.assign_addresses(&publish);
        for (object, problem) in unaddressed {
            // The checks between objects may have said it already, with more context.
            let is_same = |other: &Problem| {
                other.severity == Severity::Error
                    && other.object.as_ref() == Some(&object)
                    && other.field.starts_with("spec.clusterIP")
            };
            if !problems.iter().any(is_same) {
                problems.push(problem);
            }
        }
        check::sort(&mut problems);
        self.compiled = compile::compile(
            &self.mesh,
            &self.store,
            &addresses,
            &publish,
            &self.replicas,
        );
        let mut address_resources = self.compiled.services.clone();
        address_resources.extend(
            self.replicas
                .keys()
                .filter_map(|uid| self.replica_resource(uid)),
        );
        let generation = self.cache.replace([
            (AUTHORIZATION_TYPE, self.compiled.authorizations.clone()),
            (ADDRESS_TYPE, address_resources),
        ]);
        self.note_versions(generation);
        self.announce(problems, &addresses, &publish);
    }

    /// Updates `replicas` and `wanted`.
    fn expand(&mut self) -> Vec<Problem> {
        let running: HashSet<&str> = self.statuses.keys().map(String::as_str).collect();
        let (mut replicas, problems) = expand::expand(&self.store, &mut self.placement, &running);
        for spec in &self.system {
            let replica = Replica {
                spec: spec.clone(),
                weight: 1,
                splice: false,
            };
            replicas.insert(spec.uid.clone(), replica);
        }
        self.wanted = replicas.keys().cloned().collect();
        // Those that are to go stay known until the runtime has forgotten them, so that they can drain.
        for (uid, replica) in std::mem::take(&mut self.replicas) {
            if running.contains(uid.as_str()) {
                replicas.entry(uid).or_insert(replica);
            }
        }
        self.replicas = replicas;
        self.outputs
            .placed
            .retain(|uid| self.replicas.contains_key(uid));
        for uid in self.replicas.keys() {
            self.note_place(uid);
        }
        problems
    }

    /// A replica counts on the node that it is meant for, and as long as it runs there, on the one that it leaves.
    fn note_place(&self, uid: &str) {
        match self.replicas.get(uid) {
            Some(replica) => {
                let old = self.statuses.get(uid).map(|status| status.node.as_str());
                self.outputs.placed.set(&replica.spec, old);
            }
            None => self.outputs.placed.remove(uid),
        }
    }

    /// Virtual addresses by `NAMESPACE/NAME`, empty for headless services; services that can have none are left out.
    fn assign_addresses(
        &mut self,
        publish: &[PublishService],
    ) -> (Addresses, Vec<(ObjectRef, Problem)>) {
        let written: BTreeMap<String, &Arc<Located>> = self
            .store
            .iter(as_service)
            .map(|(located, service)| (service::service_key(service), located))
            .collect();
        let mut addresses = BTreeMap::new();
        let mut wishes = BTreeMap::new();
        for (_, object) in self.store.iter(as_service) {
            let key = service::service_key(object);
            match service::address_wish(object) {
                Some(wish) => {
                    wishes.insert(key, wish);
                }
                None => {
                    addresses.insert(key, Vec::new());
                }
            }
        }
        // The relay on the host is the only client, and it needs one address.
        wishes.extend(
            publish
                .iter()
                .map(|service| (service.key(), Wish::Any { ipv6: vec![false] })),
        );
        let mut problems = Vec::new();
        for (key, outcome) in self.vips.assign(&wishes) {
            if let Err(error) = outcome {
                match written.get(&key) {
                    Some(located) => {
                        let problem =
                            located.problem(Severity::Error, "spec.clusterIP", error.to_string());
                        problems.push((located.object.reference(), problem));
                    }
                    None => {
                        tracing::error!(service = key, %error, "published ports of a workload do not work");
                    }
                }
            }
            if let Some(held) = self.vips.held(&key) {
                addresses.insert(key, held.clone());
            }
        }
        (addresses, problems)
    }

    fn replica_resource(&self, uid: &str) -> Option<compile::Resource> {
        let replica = self.replicas.get(uid)?;
        let status = self.statuses.get(uid)?;
        // What still runs on the node that it is moving away from is on its way out.
        let stays = self.wanted.contains(uid) && status.node == replica.spec.node;
        let state = ReplicaState::new(status, stays);
        self.compiled.replica(&self.mesh, replica, &state)
    }

    fn note_versions(&mut self, generation: u64) {
        let mut before = std::mem::take(&mut self.in_effect);
        for (reference, effective) in self.store.effective() {
            let located = &effective.located;
            let since = match before.remove(reference) {
                Some((known, since)) if known.object == located.object => since,
                _ => generation,
            };
            self.in_effect
                .insert(reference.clone(), (Arc::clone(located), since));
        }
    }

    fn announce(&self, problems: Vec<Problem>, addresses: &Addresses, publish: &[PublishService]) {
        let pods: Vec<PodSpec> = self
            .replicas
            .values()
            .map(|replica| &replica.spec)
            .filter(|spec| self.wanted.contains(&spec.uid))
            .filter(|spec| !self.system.iter().any(|system| system.uid == spec.uid))
            .cloned()
            .collect();
        let published: Vec<PublishedPort> = publish
            .iter()
            .filter_map(|service| Some((service, *addresses.get(&service.key())?.first()?)))
            .flat_map(|(service, address)| service.published(address))
            .collect();
        send_if_changed(&self.outputs.pods, pods);
        send_if_changed(&self.outputs.published, published);
        let view = self.view(&problems);
        send_if_changed(&self.outputs.problems, problems);
        let problems = Arc::clone(&self.outputs.problems.borrow());
        self.outputs.view.send_replace(Arc::new(View {
            objects: view,
            problems,
        }));
    }

    fn view(&self, problems: &[Problem]) -> Vec<ObjectView> {
        let mut by_object: BTreeMap<&ObjectRef, Vec<&Problem>> = BTreeMap::new();
        for problem in problems {
            if let Some(object) = &problem.object {
                by_object.entry(object).or_default().push(problem);
            }
        }
        let in_effect = self.store.effective().iter().map(|(reference, effective)| {
            let problems = by_object.get(reference).cloned().unwrap_or_default();
            ObjectView {
                object: reference.clone(),
                file: effective.located.source.file.clone(),
                line: effective.located.source.line,
                state: if effective.is_stale {
                    ObjectState::LastGood
                } else {
                    ObjectState::Accepted
                },
                problems: problems.into_iter().cloned().collect(),
                generation: self
                    .in_effect
                    .get(reference)
                    .map(|(_, generation)| *generation),
            }
        });
        let rejected = by_object
            .iter()
            .filter(|(reference, _)| !self.store.effective().contains_key(**reference))
            .filter_map(|(reference, problems)| {
                let first = problems.first()?;
                Some(ObjectView {
                    object: (*reference).clone(),
                    file: first.file.clone(),
                    line: first.line,
                    state: ObjectState::Rejected,
                    problems: problems.iter().copied().cloned().collect(),
                    generation: None,
                })
            });
        let mut objects: Vec<ObjectView> = in_effect.chain(rejected).collect();
        objects.sort_by(|one, other| one.object.cmp(&other.object));
        objects
    }
}

fn send_if_changed<T: PartialEq>(sender: &watch::Sender<Arc<Vec<T>>>, value: Vec<T>) {
    sender.send_if_modified(|current| {
        let changed = **current != value;
        if changed {
            *current = Arc::new(value);
        }
        changed
    });
}

#[cfg(test)]
pub(crate) mod tests;
