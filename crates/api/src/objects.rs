//! The objects that users write, as types. What is here has passed validation; `decode` is how it gets here.
//!
//! The types hold what an object means, not how it was written: defaults are filled in, names of ports
//! resolved where that needs only the object itself. Their serde form is for Heddle's own use (hashing,
//! `-o json`); YAML is read by [`crate::parse`] alone.

mod authorization;
mod matching;
mod peer_authentication;
mod probe;
mod quantity;
mod service;
mod workload;
mod workload_ports;

use std::{collections::BTreeMap, fmt};

pub use authorization::{
    Action, AuthorizationPolicy, Condition, Operation, Rule, Source as RuleSource,
};
pub use matching::{ServiceAccountMatch, StringMatch, Values};
pub use peer_authentication::{MtlsMode, PeerAuthentication};
use serde::{Deserialize, Serialize};
pub use service::{
    ClusterIp, IpFamily, IpFamilyPolicy, Service, ServicePort, TargetPort, TrafficDistribution,
};
pub use workload::{SPLICE_ANNOTATION, Workload, WorkloadSpec};

use crate::decode::{Cursor, Fields, Name, one_of, shorten};

/// The namespace of objects that name none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// Any object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Object {
    /// `v1` Namespace.
    Namespace(Namespace),
    /// `v1` ServiceAccount.
    ServiceAccount(ServiceAccount),
    /// `v1` Service.
    Service(Service),
    /// `heddle.dev/v1alpha1` Workload.
    Workload(Box<Workload>),
    /// `security.istio.io/v1` AuthorizationPolicy.
    AuthorizationPolicy(AuthorizationPolicy),
    /// `security.istio.io/v1` PeerAuthentication.
    PeerAuthentication(PeerAuthentication),
}

/// Kind, namespace and name: what identifies an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectRef {
    /// Kind.
    pub kind: String,
    /// Namespace, empty for a Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// What every object says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Name.
    pub name: String,
    /// Namespace, empty for a Namespace.
    pub namespace: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// A namespace. <https://kubernetes.io/docs/concepts/overview/working-with-objects/namespaces/>
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Name and labels.
    pub metadata: Metadata,
}

/// An identity that workloads run under. <https://kubernetes.io/docs/concepts/security/service-accounts/>
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceAccount {
    /// Name, namespace and labels.
    pub metadata: Metadata,
}

impl Object {
    /// Its metadata.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        match self {
            Self::Namespace(object) => &object.metadata,
            Self::ServiceAccount(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::Workload(object) => &object.metadata,
            Self::AuthorizationPolicy(object) => &object.metadata,
            Self::PeerAuthentication(object) => &object.metadata,
        }
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Namespace(_) => "Namespace",
            Self::ServiceAccount(_) => "ServiceAccount",
            Self::Service(_) => "Service",
            Self::Workload(_) => "Workload",
            Self::AuthorizationPolicy(_) => "AuthorizationPolicy",
            Self::PeerAuthentication(_) => "PeerAuthentication",
        }
    }

    /// What identifies it.
    #[must_use]
    pub fn reference(&self) -> ObjectRef {
        ObjectRef::new(
            self.kind(),
            &self.metadata().namespace,
            &self.metadata().name,
        )
    }
}

impl ObjectRef {
    /// Puts one together; `namespace` is empty for a Namespace.
    #[must_use]
    pub fn new(kind: &str, namespace: &str, name: &str) -> Self {
        Self {
            kind: kind.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

/// `KIND NAMESPACE/NAME`, or `KIND NAME` for a Namespace.
impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// How one kind is read.
struct Kind {
    name: &'static str,
    api_versions: &'static [&'static str],
    name_rule: Name,
    namespaced: bool,
    decode: fn(Metadata, &mut Fields<'_>) -> Object,
}

const KINDS: [Kind; 6] = [
    Kind {
        name: "Namespace",
        api_versions: &["v1"],
        name_rule: Name::Label,
        namespaced: false,
        decode: |metadata, fields| {
            if let Some(spec) = fields.get("spec") {
                let mut spec = spec.fields();
                spec.ignore(&["finalizers"]);
                spec.finish();
            }
            Object::Namespace(Namespace { metadata })
        },
    },
    Kind {
        name: "ServiceAccount",
        api_versions: &["v1"],
        name_rule: Name::Subdomain,
        namespaced: true,
        decode: |metadata, fields| {
            fields.inert(&[
                "secrets",
                "imagePullSecrets",
                "automountServiceAccountToken",
            ]);
            Object::ServiceAccount(ServiceAccount { metadata })
        },
    },
    Kind {
        name: "Service",
        api_versions: &["v1"],
        name_rule: Name::ServiceLabel,
        namespaced: true,
        decode: |metadata, fields| Object::Service(Service::decode(metadata, fields)),
    },
    Kind {
        name: "Workload",
        api_versions: &["heddle.dev/v1alpha1"],
        name_rule: Name::Label,
        namespaced: true,
        decode: |metadata, fields| Object::Workload(Box::new(Workload::decode(metadata, fields))),
    },
    Kind {
        name: "AuthorizationPolicy",
        api_versions: &["security.istio.io/v1", "security.istio.io/v1beta1"],
        name_rule: Name::Subdomain,
        namespaced: true,
        decode: |metadata, fields| {
            Object::AuthorizationPolicy(AuthorizationPolicy::decode(metadata, fields))
        },
    },
    Kind {
        name: "PeerAuthentication",
        api_versions: &["security.istio.io/v1", "security.istio.io/v1beta1"],
        name_rule: Name::Subdomain,
        namespaced: true,
        decode: |metadata, fields| {
            Object::PeerAuthentication(PeerAuthentication::decode(metadata, fields))
        },
    },
];

/// Whether objects of `kind` live in a namespace; unknown kinds do.
pub(crate) fn is_namespaced(kind: &str) -> bool {
    KINDS
        .iter()
        .find(|known| known.name == kind)
        .is_none_or(|known| known.namespaced)
}

/// Reads the object at `cursor`. `None` if its kind is unknown; what else is wrong is in the cursor's sink.
pub(crate) fn decode(cursor: &Cursor<'_>) -> Option<Object> {
    let mut fields = cursor.fields();
    let kinds = KINDS.map(|kind| kind.name);
    let api_version = fields.require("apiVersion", "such as `v1`");
    let kind = fields.require("kind", &one_of(&kinds))?;
    let choices = KINDS.each_ref().map(|kind| (kind.name, kind));
    let found = kind.choice(&choices)?;
    if let Some(cursor) = api_version
        && let Some(text) = cursor.text()
        && !found.api_versions.contains(&text)
    {
        let text = shorten(text);
        let message = format!("{text} is not an apiVersion of {}", found.name);
        cursor.error(message, one_of(found.api_versions));
    }
    let metadata = fields
        .require("metadata", "a mapping with `name`")
        .map(|metadata| Metadata::decode(&metadata, found))
        .unwrap_or_default();
    fields.ignore(&["status"]);
    let object = (found.decode)(metadata, &mut fields);
    fields.finish();
    Some(object)
}

impl Metadata {
    fn decode(cursor: &Cursor<'_>, kind: &Kind) -> Self {
        let mut fields = cursor.fields();
        fields.ignore(&[
            "uid",
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "generation",
            "resourceVersion",
            "managedFields",
            "ownerReferences",
            "finalizers",
            "selfLink",
        ]);
        let name = fields
            .require("name", "the object's name")
            .map(|name| name.name(kind.name_rule))
            .unwrap_or_default();
        fields.unsupported(
            "generateName",
            "generated names are not supported: nobody could refer to the object",
            "`name`",
        );
        let namespace = fields.get("namespace");
        let namespace = match (kind.namespaced, namespace) {
            (true, Some(namespace)) => namespace.name(Name::Label),
            (true, None) => DEFAULT_NAMESPACE.to_owned(),
            (false, Some(namespace)) => {
                namespace.error(
                    format!("a {} is in no namespace", kind.name),
                    "no such field",
                );
                String::new()
            }
            (false, None) => String::new(),
        };
        let labels = fields.get("labels");
        let annotations = fields.get("annotations");
        if let Some(annotations) = &annotations {
            workload::check_annotations(annotations, kind.name);
        }
        fields.finish();
        Self {
            name,
            namespace,
            labels: labels.map(|labels| labels.labels()).unwrap_or_default(),
            annotations: annotations
                .map(|annotations| annotations.annotations())
                .unwrap_or_default(),
        }
    }
}

/// The labels of a `selector` with `matchLabels`, as Istio's policies have it. Istio knows no other kind of selector.
fn match_labels(selector: &Cursor<'_>) -> BTreeMap<String, String> {
    let mut fields = selector.fields();
    let labels = fields.get("matchLabels").map(|labels| labels.labels());
    fields.unsupported(
        "matchExpressions",
        "not possible in Istio's policies",
        "`matchLabels`",
    );
    fields.finish();
    labels.unwrap_or_default()
}
