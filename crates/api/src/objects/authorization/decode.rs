//! Reads an AuthorizationPolicy, with the checks of Istio's own admission (`ValidateAuthorizationPolicy`).

use super::{Action, AuthorizationPolicy, Condition, Operation, Rule, Source};
use crate::{
    decode::{Cursor, Fields, one_of, shorten},
    objects::{Metadata, ServiceAccountMatch, StringMatch, Values, match_labels},
    yaml::Value,
};

/// The keys of `when` that can be compared at L4.
const L4_KEYS: [&str; 6] = [
    "source.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "destination.ip",
    "destination.port",
];
/// The others that Istio knows; those in brackets are prefixes.
const L7_KEYS: [&str; 7] = [
    "remote.ip",
    "connection.sni",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[",
    "request.headers[",
];
/// Envoy's own filter state, passed on by Istio as it is.
const EXPERIMENTAL_PREFIX: &str = "experimental.envoy.filters.";

impl AuthorizationPolicy {
    pub(in crate::objects) fn decode(metadata: Metadata, fields: &mut Fields<'_>) -> Self {
        let mut policy = Self {
            metadata,
            selector: std::collections::BTreeMap::new(),
            action: Action::Allow,
            rules: Vec::new(),
        };
        let Some(spec) = fields.get("spec") else {
            return policy;
        };
        let mut spec = spec.fields();
        if let Some(selector) = spec.get("selector") {
            policy.selector = match_labels(&selector);
        }
        for key in ["targetRef", "targetRefs"] {
            spec.unsupported(
                key,
                "a policy for a Gateway or Service needs a waypoint, which is not supported yet",
                "`selector`",
            );
        }
        if let Some(cursor) = spec.get("action") {
            policy.action = action(&cursor);
        }
        spec.unsupported(
            "provider",
            "only for the action CUSTOM, which is not supported yet",
            "no such field",
        );
        let reader = Reader {
            namespace: &policy.metadata.namespace,
            action: policy.action,
        };
        if let Some(list) = spec.get("rules") {
            policy.rules = list.list(|rule| reader.rule(rule));
        }
        spec.finish();
        policy
    }
}

fn action(cursor: &Cursor<'_>) -> Action {
    match cursor.node().as_str() {
        Some(text @ ("AUDIT" | "CUSTOM")) => {
            let message = format!("the action {text} is not supported yet");
            cursor.error(message, one_of(&["ALLOW", "DENY"]));
            Action::Allow
        }
        _ => cursor
            .choice(&[("ALLOW", Action::Allow), ("DENY", Action::Deny)])
            .unwrap_or_default(),
    }
}

/// What reading a rule needs to know of its policy.
struct Reader<'p> {
    namespace: &'p str,
    action: Action,
}

impl Reader<'_> {
    fn rule(&self, cursor: &Cursor<'_>) -> Rule {
        if cursor.node().value == Value::Null {
            cursor.error("is empty", "a rule; `{}` is the rule that matches anything");
        }
        let mut fields = cursor.fields();
        let from = fields.get("from");
        let to = fields.get("to");
        let when = fields.get("when");
        fields.finish();
        Rule {
            from: from
                .map(|list| self.wrapped(&list, "source", Self::source))
                .unwrap_or_default(),
            to: to
                .map(|list| self.wrapped(&list, "operation", Self::operation))
                .unwrap_or_default(),
            when: when
                .map(|list| list.list(|item| self.condition(item)))
                .unwrap_or_default(),
        }
    }

    /// A list of mappings with the one member `key`. Empty ones are refused: they look like "nobody" and would mean "anybody".
    fn wrapped<T>(
        &self,
        list: &Cursor<'_>,
        key: &'static str,
        read: fn(&Self, &Cursor<'_>) -> T,
    ) -> Vec<T> {
        if list.node().value == Value::Sequence(Vec::new()) {
            list.error(
                "is empty",
                format!("at least one `{key}`, or no such field"),
            );
        }
        let items = list.items();
        let one = |item: &Cursor<'_>| {
            let mut fields = item.fields();
            let inner = fields.require(key, "a mapping with at least one condition");
            fields.finish();
            inner.map(|inner| read(self, &inner))
        };
        items.iter().filter_map(one).collect()
    }

    fn source(&self, cursor: &Cursor<'_>) -> Source {
        let mut fields = cursor.fields();
        let account = |item: &Cursor<'_>| ServiceAccountMatch::decode(item, self.namespace);
        let l7 = |item: &Cursor<'_>| self.warn_l7(item);
        let source = Source {
            principals: values(&mut fields, "principals", "notPrincipals", principal),
            namespaces: values(
                &mut fields,
                "namespaces",
                "notNamespaces",
                StringMatch::decode,
            ),
            service_accounts: values(
                &mut fields,
                "serviceAccounts",
                "notServiceAccounts",
                account,
            ),
            ip_blocks: values(&mut fields, "ipBlocks", "notIpBlocks", Cursor::ip_block),
            remote_ip_blocks: l7_values(
                &mut fields,
                ("remoteIpBlocks", "notRemoteIpBlocks"),
                Cursor::ip_block,
                l7,
            ),
            request_principals: l7_values(
                &mut fields,
                ("requestPrincipals", "notRequestPrincipals"),
                StringMatch::decode,
                l7,
            ),
        };
        fields.finish();
        if source.is_empty() {
            cursor.error("has no condition", "at least one, such as `principals`");
        }
        let others = !source.principals.is_empty() || !source.namespaces.is_empty();
        if others && !source.service_accounts.is_empty() {
            cursor.error(
                "`serviceAccounts` cannot stand with `principals` or `namespaces`",
                "one of them",
            );
        }
        source
    }

    fn operation(&self, cursor: &Cursor<'_>) -> Operation {
        let mut fields = cursor.fields();
        let l7 = |item: &Cursor<'_>| self.warn_l7(item);
        let mut texts = |keys| l7_values(&mut fields, keys, StringMatch::decode, l7);
        let hosts = texts(("hosts", "notHosts"));
        let methods = texts(("methods", "notMethods"));
        let paths = texts(("paths", "notPaths"));
        let ports = values(&mut fields, "ports", "notPorts", Cursor::port_text);
        fields.finish();
        let operation = Operation {
            ports,
            hosts,
            methods,
            paths,
        };
        if operation.is_empty() {
            cursor.error("has no condition", "at least one, such as `ports`");
        }
        operation
    }

    fn condition(&self, cursor: &Cursor<'_>) -> Condition {
        let mut fields = cursor.fields();
        let key = fields.require("key", "such as `source.namespace`");
        let name = key.as_ref().and_then(Cursor::text).unwrap_or_default();
        let account = |item: &Cursor<'_>| ServiceAccountMatch::decode(item, self.namespace);
        let keys = ("values", "notValues");
        let condition = match name {
            "source.ip" => {
                Condition::SourceIp(values(&mut fields, keys.0, keys.1, Cursor::ip_block))
            }
            "source.namespace" => {
                Condition::SourceNamespace(values(&mut fields, keys.0, keys.1, StringMatch::decode))
            }
            "source.principal" => {
                Condition::SourcePrincipal(values(&mut fields, keys.0, keys.1, principal))
            }
            "source.serviceAccount" => {
                Condition::SourceServiceAccount(values(&mut fields, keys.0, keys.1, account))
            }
            "destination.ip" => {
                Condition::DestinationIp(values(&mut fields, keys.0, keys.1, Cursor::ip_block))
            }
            "destination.port" => {
                Condition::DestinationPort(values(&mut fields, keys.0, keys.1, Cursor::port_text))
            }
            _ => Condition::L7 {
                key: name.to_owned(),
                values: values(&mut fields, keys.0, keys.1, Cursor::string),
            },
        };
        fields.finish();
        if let (true, Some(key)) = (condition.needs_l7(), &key) {
            if is_l7_key(name) {
                self.warn_l7(key);
            } else if key.node().as_str().is_some() {
                let known: Vec<&str> = L4_KEYS.into_iter().chain(L7_KEYS).collect();
                key.error(format!("unknown key {}", shorten(name)), one_of(&known));
            }
        }
        let given = |name: &str| matches!(cursor.node().get(name).map(|node| &node.value), Some(Value::Sequence(items)) if !items.is_empty());
        if !given("values") && !given("notValues") {
            cursor.error(
                "compares with nothing",
                "at least one of `values`, `notValues`",
            );
        }
        condition
    }

    fn warn_l7(&self, cursor: &Cursor<'_>) {
        let effect = match self.action {
            Action::Allow => "the ALLOW rule with it never matches",
            Action::Deny => "the DENY rule with it matches without regard to it",
        };
        cursor.warn(format!(
            "needs L7, which this mesh does not have yet: at L4 {effect}"
        ));
    }
}

fn is_l7_key(key: &str) -> bool {
    key.starts_with(EXPERIMENTAL_PREFIX)
        || L7_KEYS.iter().any(|known| match known.strip_suffix('[') {
            Some(_) => key.starts_with(known) && key.ends_with(']') && key.len() > known.len() + 1,
            None => key == *known,
        })
}

fn values<'a, T>(
    fields: &mut Fields<'a>,
    any_of: &'static str,
    none_of: &'static str,
    read: impl Fn(&Cursor<'a>) -> T,
) -> Values<T> {
    let mut list = |key| {
        fields
            .get(key)
            .map(|list| list.list(&read))
            .unwrap_or_default()
    };
    Values {
        any_of: list(any_of),
        none_of: list(none_of),
    }
}

/// As [`values`], with `warn` called on each of the two fields that is given.
fn l7_values<'a, T>(
    fields: &mut Fields<'a>,
    (any_of, none_of): (&'static str, &'static str),
    read: impl Fn(&Cursor<'a>) -> T,
    warn: impl Fn(&Cursor<'a>),
) -> Values<T> {
    for key in [any_of, none_of] {
        if let Some(list) = fields.get(key) {
            warn(&list);
        }
    }
    values(fields, any_of, none_of, read)
}

fn principal(cursor: &Cursor<'_>) -> StringMatch {
    let principal = StringMatch::decode(cursor);
    if principal.to_string().starts_with("spiffe://") {
        cursor.warn("never matches: principals are written without `spiffe://`");
    }
    principal
}
