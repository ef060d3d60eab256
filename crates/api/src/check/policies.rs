//! Checks of policies against workloads and against the mesh's trust domain.

use std::collections::BTreeMap;

use super::Index;
use crate::{
    Located,
    mesh::MeshConfig,
    objects::{AuthorizationPolicy, Condition, StringMatch, Values},
    problem::{Problem, Severity},
};

/// Whether a policy that selects workloads finds any.
pub(super) fn selector(
    located: &Located,
    selector: &BTreeMap<String, String>,
    index: &Index<'_>,
    config: &MeshConfig,
) -> Option<Problem> {
    if selector.is_empty() {
        return None;
    }
    let namespace = located.object.metadata().namespace.as_str();
    let mesh_wide = namespace == config.root_namespace;
    let selected = index.selected(selector, (!mesh_wide).then_some(namespace));
    if !selected.is_empty() {
        return None;
    }
    let message = match mesh_wide {
        true => "selects no workload".to_owned(),
        false => format!("selects no workload in namespace `{namespace}`"),
    };
    Some(located.problem(Severity::Warning, "spec.selector", message))
}

/// Whether principals can be those of workloads in this mesh.
pub(super) fn principals(
    located: &Located,
    policy: &AuthorizationPolicy,
    config: &MeshConfig,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut check = |path: &str, values: &Values<StringMatch>, names: [&str; 2]| {
        for (name, list) in names.into_iter().zip([&values.any_of, &values.none_of]) {
            for (number, principal) in list.iter().enumerate() {
                if let Some(message) = never_matches(principal, &config.trust_domain) {
                    let path = format!("{path}.{name}[{number}]");
                    problems.push(located.problem(Severity::Warning, &path, message));
                }
            }
        }
    };
    for (rule_number, rule) in policy.rules.iter().enumerate() {
        let rule_path = format!("spec.rules[{rule_number}]");
        for (number, source) in rule.from.iter().enumerate() {
            let path = format!("{rule_path}.from[{number}].source");
            check(&path, &source.principals, ["principals", "notPrincipals"]);
        }
        for (number, condition) in rule.when.iter().enumerate() {
            if let Condition::SourcePrincipal(values) = condition {
                check(
                    &format!("{rule_path}.when[{number}]"),
                    values,
                    ["values", "notValues"],
                );
            }
        }
    }
    problems
}

/// Why `principal` matches nobody in a mesh of `trust_domain`.
fn never_matches(principal: &StringMatch, trust_domain: &str) -> Option<String> {
    let (text, whole) = match principal {
        StringMatch::Exact(text) => (text.as_str(), true),
        StringMatch::Prefix(text) => (text.as_str(), false),
        StringMatch::Suffix(_) | StringMatch::Present => return None,
    };
    if text.starts_with("spiffe://") {
        // Reported where it is read.
        return None;
    }
    let (domain, rest) = match text.split_once('/') {
        Some((domain, rest)) => (domain, Some(rest)),
        None => (text, None),
    };
    let in_domain = match rest {
        Some(_) => domain == trust_domain,
        None => !whole && trust_domain.starts_with(domain),
    };
    if !in_domain {
        return Some(format!(
            "never matches: identities in this mesh begin with `{trust_domain}/ns/`"
        ));
    }
    let parts: Vec<&str> = rest.unwrap_or_default().split('/').collect();
    let shaped = matches!(parts.as_slice(), ["ns", _, "sa", _]);
    (whole && !shaped).then(|| {
        format!("never matches: identities look like `{trust_domain}/ns/NAMESPACE/sa/ACCOUNT`")
    })
}
