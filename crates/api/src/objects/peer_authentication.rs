//! `security.istio.io/v1` PeerAuthentication. <https://istio.io/latest/docs/reference/config/security/peer_authentication/>

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Metadata, match_labels};
use crate::decode::{Cursor, Fields, port, shorten};

/// What a workload demands of who connects to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAuthentication {
    /// Name, namespace, labels.
    pub metadata: Metadata,
    /// Labels of the workloads it is for; empty: the namespace (the mesh, from the root namespace).
    pub selector: BTreeMap<String, String>,
    /// The demand on all ports that have none of their own.
    pub mode: MtlsMode,
    /// Demands by port; only with a selector.
    pub port_modes: BTreeMap<u16, MtlsMode>,
}

/// Whether a peer must prove its identity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MtlsMode {
    /// As the next wider policy says.
    #[default]
    Unset,
    /// No proof is asked for.
    Disable,
    /// Peers with and without proof.
    Permissive,
    /// Only peers with proof.
    Strict,
}

impl PeerAuthentication {
    pub(super) fn decode(metadata: Metadata, fields: &mut Fields<'_>) -> Self {
        let mut policy = Self {
            metadata,
            selector: BTreeMap::new(),
            mode: MtlsMode::Unset,
            port_modes: BTreeMap::new(),
        };
        let Some(spec) = fields.get("spec") else {
            return policy;
        };
        let mut spec = spec.fields();
        if let Some(selector) = spec.get("selector") {
            policy.selector = match_labels(&selector);
        }
        if let Some(mtls) = spec.get("mtls") {
            policy.mode = mode(&mtls);
        }
        if let Some(ports) = spec.get("portLevelMtls") {
            policy.port_modes = port_modes(&ports);
            if policy.selector.is_empty() {
                ports.error(
                    "is only possible for selected workloads",
                    "a `selector` with labels",
                );
            }
        }
        spec.finish();
        policy
    }
}

fn port_modes(cursor: &Cursor<'_>) -> BTreeMap<u16, MtlsMode> {
    let mut modes = BTreeMap::new();
    for (key, place, value) in cursor.entries() {
        let mode = mode(&value);
        match port(key) {
            Some(port) => {
                modes.insert(port, mode);
            }
            None => {
                let found = shorten(key);
                place.error(format!("{found} is not a port"), "a port from 1 to 65535");
            }
        }
    }
    modes
}

fn mode(cursor: &Cursor<'_>) -> MtlsMode {
    let mut fields = cursor.fields();
    let mode = fields.get("mode").and_then(|mode| {
        mode.choice(&[
            ("UNSET", MtlsMode::Unset),
            ("DISABLE", MtlsMode::Disable),
            ("PERMISSIVE", MtlsMode::Permissive),
            ("STRICT", MtlsMode::Strict),
        ])
    });
    fields.finish();
    mode.unwrap_or_default()
}
