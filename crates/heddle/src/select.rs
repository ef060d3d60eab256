//! Which replica a user means by `[NAMESPACE/]WORKLOAD` or `[NAMESPACE/]REPLICA`.

use anyhow::bail;

use api::report::Replica;

/// Whether `wanted` names this workload or replica.
pub(crate) fn matches(wanted: &str, namespace: &str, workload: &str, pod: &str) -> bool {
    let name = match wanted.split_once('/') {
        Some((of, name)) if of == namespace => name,
        Some(_) => return false,
        None => wanted,
    };
    name == workload || name == pod
}

/// The replica that `wanted` names: a ready one if there are several of one workload.
pub(crate) fn replica<'a>(wanted: &str, replicas: &'a [Replica]) -> anyhow::Result<&'a Replica> {
    let mut found: Vec<&Replica> = replicas
        .iter()
        .filter(|replica| matches(wanted, &replica.namespace, &replica.workload, &replica.name))
        .collect();
    found.sort_by_key(|replica| (!replica.status.ready, &replica.status.uid));
    let Some(first) = found.first() else {
        let mut known: Vec<String> = replicas
            .iter()
            .map(|replica| format!("{}/{}", replica.namespace, replica.workload))
            .collect();
        known.sort();
        known.dedup();
        if known.is_empty() {
            bail!("there is no workload `{wanted}`: the mesh has none");
        }
        bail!(
            "there is no workload `{wanted}`; there are {}",
            known.join(", ")
        );
    };
    let mut namespaces: Vec<&str> = found
        .iter()
        .map(|replica| replica.namespace.as_str())
        .collect();
    namespaces.sort_unstable();
    namespaces.dedup();
    if namespaces.len() > 1 {
        bail!(
            "`{wanted}` is in several namespaces ({}): write NAMESPACE/{wanted}",
            namespaces.join(", ")
        );
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use api::pod::{PodPhase, PodStatus};

    use super::*;

    fn replica_of(namespace: &str, workload: &str, index: u32, ready: bool) -> Replica {
        let name = format!("{workload}-{index}");
        Replica {
            namespace: namespace.into(),
            workload: workload.into(),
            service_account: workload.into(),
            status: PodStatus {
                uid: format!("{namespace}/{name}"),
                node: "node-1".into(),
                addresses: vec![],
                phase: PodPhase::Running,
                ready,
                restarts: 0,
                message: None,
            },
            name,
        }
    }

    #[test]
    fn a_ready_replica_is_preferred() {
        let replicas = [
            replica_of("shop", "api", 0, false),
            replica_of("shop", "api", 1, true),
        ];
        assert_eq!(replica("api", &replicas).unwrap().name, "api-1");
        assert_eq!(replica("shop/api-0", &replicas).unwrap().name, "api-0");
    }

    #[test]
    fn what_is_unknown_or_ambiguous_is_said() {
        let replicas = [
            replica_of("shop", "api", 0, true),
            replica_of("test", "api", 0, true),
        ];
        assert!(
            replica("api", &replicas)
                .unwrap_err()
                .to_string()
                .contains("NAMESPACE/api")
        );
        assert!(
            replica("web", &replicas)
                .unwrap_err()
                .to_string()
                .contains("shop/api, test/api")
        );
        assert!(replica("web", &[]).is_err());
    }
}
