//! Which node each replica runs on.
//!
//! A replica stays where it was put: what others do never moves it. A new one goes where the fewest replicas
//! of its workload are, and among those where the fewest replicas are at all.

use std::collections::{BTreeMap, HashMap, HashSet};

/// Replicas (by uid) and their nodes.
#[derive(Debug)]
pub(crate) struct Placement {
    nodes: Vec<String>,
    placed: BTreeMap<String, Placed>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Placed {
    node: usize,
    /// `NAMESPACE/NAME` of the workload.
    workload: String,
}

/// A workload's `node` names none.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UnknownNode;

impl Placement {
    pub(crate) fn new(nodes: Vec<String>) -> Self {
        Self {
            nodes,
            placed: BTreeMap::new(),
        }
    }

    /// The node of a replica; `wanted` is the one that its workload asks for.
    pub(crate) fn place(
        &mut self,
        uid: &str,
        workload: &str,
        wanted: Option<&str>,
    ) -> Result<&str, UnknownNode> {
        let wanted = match wanted {
            Some(name) => Some(
                self.nodes
                    .iter()
                    .position(|node| node == name)
                    .ok_or(UnknownNode)?,
            ),
            None => None,
        };
        let node = match (wanted, self.placed.get(uid)) {
            (Some(wanted), _) => wanted,
            (None, Some(placed)) => placed.node,
            (None, None) => self.least_loaded(workload).ok_or(UnknownNode)?,
        };
        self.placed.insert(
            uid.to_owned(),
            Placed {
                node,
                workload: workload.to_owned(),
            },
        );
        self.nodes.get(node).map(String::as_str).ok_or(UnknownNode)
    }

    /// Forgets replicas that are not among `wanted`.
    pub(crate) fn retain(&mut self, wanted: &HashSet<&str>) {
        self.placed.retain(|uid, _| wanted.contains(uid.as_str()));
    }

    /// Nodes by name.
    pub(crate) fn nodes(&self) -> &[String] {
        &self.nodes
    }

    fn least_loaded(&self, workload: &str) -> Option<usize> {
        let mut load: HashMap<usize, (usize, usize)> = HashMap::new();
        for placed in self.placed.values() {
            let (same, all) = load.entry(placed.node).or_default();
            *same += usize::from(placed.workload == workload);
            *all += 1;
        }
        (0..self.nodes.len()).min_by_key(|node| load.get(node).copied().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement() -> Placement {
        Placement::new(vec!["n1".into(), "n2".into()])
    }

    #[test]
    fn replicas_spread_and_stay() {
        let mut placement = placement();
        assert_eq!(placement.place("d/a-0", "d/a", None), Ok("n1"));
        assert_eq!(placement.place("d/a-1", "d/a", None), Ok("n2"));
        assert_eq!(placement.place("d/a-2", "d/a", None), Ok("n1"));
        assert_eq!(
            placement.place("d/b-0", "d/b", None),
            Ok("n2"),
            "n1 has more in all"
        );
        assert_eq!(placement.place("d/a-2", "d/a", None), Ok("n1"));
        placement.retain(&HashSet::from(["d/a-2", "d/b-0"]));
        assert_eq!(placement.place("d/b-0", "d/b", None), Ok("n2"));
        assert_eq!(
            placement.place("d/a-0", "d/a", None),
            Ok("n2"),
            "n1 has a replica of it"
        );
    }

    #[test]
    fn the_named_node_wins() {
        let mut placement = placement();
        assert_eq!(placement.place("d/a-0", "d/a", Some("n2")), Ok("n2"));
        assert_eq!(placement.place("d/a-0", "d/a", Some("n1")), Ok("n1"));
        assert_eq!(
            placement.place("d/a-0", "d/a", Some("n3")),
            Err(UnknownNode)
        );
        assert_eq!(placement.nodes().len(), 2);
    }
}
