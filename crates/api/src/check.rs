//! What is wrong between objects that are right by themselves: references that lead nowhere, things given twice.
//!
//! An error here says that part of what was written cannot work (the second holder of a host port, a service's
//! port without target); a warning, that it may not do what is meant. What is taken nevertheless is
//! control's decision. `services` and `policies` hold the checks of those.

mod policies;
mod services;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
};

use crate::{
    Located,
    mesh::MeshConfig,
    objects::{DEFAULT_NAMESPACE, Object, ObjectRef, Workload},
    problem::{Problem, Severity},
};

/// Finds what is wrong between `objects` in the mesh of `config`, in the order of the files.
#[must_use]
pub fn cross_check(objects: &[Located], config: &MeshConfig) -> Vec<Problem> {
    let index = Index::new(objects);
    let mut problems = duplicates(objects);
    problems.extend(host_ports(objects));
    problems.extend(services::virtual_addresses(objects, config));
    for located in objects {
        problems.extend(namespace(located, &index, config));
        match &located.object {
            Object::Workload(workload) => problems.extend(account(located, workload, &index)),
            Object::Service(service) => problems.extend(services::check(located, service, &index)),
            Object::AuthorizationPolicy(policy) => {
                problems.extend(policies::selector(
                    located,
                    &policy.selector,
                    &index,
                    config,
                ));
                problems.extend(policies::principals(located, policy, config));
            }
            Object::PeerAuthentication(policy) => {
                problems.extend(policies::selector(
                    located,
                    &policy.selector,
                    &index,
                    config,
                ));
            }
            Object::Namespace(_) | Object::ServiceAccount(_) => {}
        }
    }
    problems.sort_by(|one, other| place(one).cmp(&place(other)));
    problems
}

fn place(problem: &Problem) -> (&Path, usize, usize) {
    (&problem.file, problem.line, problem.column)
}

/// The objects by what others refer to them with.
struct Index<'o> {
    namespaces: HashSet<&'o str>,
    /// Namespace and name.
    accounts: HashSet<(&'o str, &'o str)>,
    workloads: Vec<&'o Workload>,
    /// Indices into `workloads`, by key and value of their labels.
    by_label: HashMap<&'o str, HashMap<&'o str, Vec<usize>>>,
}

impl<'o> Index<'o> {
    fn new(objects: &'o [Located]) -> Self {
        let mut index = Self {
            namespaces: HashSet::new(),
            accounts: HashSet::new(),
            workloads: Vec::new(),
            by_label: HashMap::new(),
        };
        for located in objects {
            let metadata = located.object.metadata();
            match &located.object {
                Object::Namespace(_) => {
                    index.namespaces.insert(&metadata.name);
                }
                Object::ServiceAccount(_) => {
                    index.accounts.insert((&metadata.namespace, &metadata.name));
                }
                Object::Workload(workload) => {
                    for (key, value) in &workload.spec.labels {
                        let holders = index
                            .by_label
                            .entry(key)
                            .or_default()
                            .entry(value)
                            .or_default();
                        holders.push(index.workloads.len());
                    }
                    index.workloads.push(workload);
                }
                _ => {}
            }
        }
        index
    }

    /// The workloads with all labels of a selector that is not empty, in `namespace` or (`None`) anywhere.
    fn selected(
        &self,
        selector: &BTreeMap<String, String>,
        namespace: Option<&str>,
    ) -> Vec<&'o Workload> {
        let holders = |(key, value): (&String, &String)| -> &[usize] {
            let values = self.by_label.get(key.as_str());
            let holders = values.and_then(|values| values.get(value.as_str()));
            holders.map_or(&[], Vec::as_slice)
        };
        // Only the holders of the rarest label can have them all.
        let candidates = selector
            .iter()
            .map(holders)
            .min_by_key(|holders| holders.len());
        candidates
            .unwrap_or_default()
            .iter()
            .map(|holder| self.workloads[*holder])
            .filter(|workload| {
                let labels = &workload.spec.labels;
                namespace.is_none_or(|namespace| workload.metadata.namespace == namespace)
                    && selector
                        .iter()
                        .all(|(key, value)| labels.get(key) == Some(value))
            })
            .collect()
    }
}

fn duplicates(objects: &[Located]) -> Vec<Problem> {
    let mut first: HashMap<ObjectRef, &Located> = HashMap::new();
    let mut problems = Vec::new();
    for located in objects {
        let reference = located.object.reference();
        if let Some(earlier) = first.get(&reference) {
            let (file, line) = (earlier.source.file.display(), earlier.source.line);
            let message = format!("this object is given twice (first at {file}:{line})");
            problems.push(located.problem(Severity::Error, "metadata.name", message));
        } else {
            first.insert(reference, located);
        }
    }
    problems
}

fn namespace(located: &Located, index: &Index<'_>, config: &MeshConfig) -> Option<Problem> {
    let namespace = located.object.metadata().namespace.as_str();
    let built_in = ["", DEFAULT_NAMESPACE, &config.root_namespace];
    if built_in.contains(&namespace) || index.namespaces.contains(namespace) {
        return None;
    }
    let message = format!("there is no Namespace `{namespace}` among the objects");
    Some(located.problem(Severity::Warning, "metadata.namespace", message))
}

fn account(located: &Located, workload: &Workload, index: &Index<'_>) -> Option<Problem> {
    let namespace = workload.metadata.namespace.as_str();
    let account = workload.spec.service_account.as_str();
    // Every namespace has an account `default`, as in Kubernetes.
    if account == "default" || index.accounts.contains(&(namespace, account)) {
        return None;
    }
    let message = format!("there is no ServiceAccount {namespace}/{account} among the objects");
    Some(located.problem(Severity::Warning, "spec.serviceAccountName", message))
}

fn host_ports(objects: &[Located]) -> Vec<Problem> {
    let mut holders = HashMap::new();
    let mut problems = Vec::new();
    for located in objects {
        let Object::Workload(workload) = &located.object else {
            continue;
        };
        for (index, port) in workload.spec.ports.iter().enumerate() {
            let Some(host_port) = port.publish else {
                continue;
            };
            let reference = located.object.reference();
            let holder = holders
                .entry((host_port, port.protocol))
                .or_insert_with(|| reference.clone());
            if *holder == reference {
                continue;
            }
            let message = format!("host port {host_port} is already published by {holder}");
            let listed = format!("spec.ports[{index}].publish");
            let path = match located.position(&listed) {
                Some(_) => listed.as_str(),
                None => "spec.publish",
            };
            problems.push(located.problem(Severity::Error, path, message));
        }
    }
    problems
}

#[cfg(test)]
mod tests;
