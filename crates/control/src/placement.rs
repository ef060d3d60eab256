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
    /// Replicas per node.
    load: HashMap<usize, usize>,
    /// Replicas per workload and node.
    load_of: HashMap<(String, usize), usize>,
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
            load: HashMap::new(),
            load_of: HashMap::new(),
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
        let placed = Placed {
            node,
            workload: workload.to_owned(),
        };
        if self.placed.get(uid) != Some(&placed) {
            self.remove(uid);
            *self.load.entry(node).or_default() += 1;
            *self
                .load_of
                .entry((placed.workload.clone(), node))
                .or_default() += 1;
            self.placed.insert(uid.to_owned(), placed);
        }
        self.nodes.get(node).map(String::as_str).ok_or(UnknownNode)
    }

    /// Forgets replicas that are not among `wanted`.
    pub(crate) fn retain(&mut self, wanted: &HashSet<&str>) {
        let unwanted: Vec<String> = self
            .placed
            .keys()
            .filter(|uid| !wanted.contains(uid.as_str()))
            .cloned()
            .collect();
        for uid in unwanted {
            self.remove(&uid);
        }
    }

    /// Nodes by name.
    pub(crate) fn nodes(&self) -> &[String] {
        &self.nodes
    }

    fn least_loaded(&self, workload: &str) -> Option<usize> {
        (0..self.nodes.len()).min_by_key(|node| {
            let same = self.load_of.get(&(workload.to_owned(), *node));
            (
                same.copied().unwrap_or(0),
                self.load.get(node).copied().unwrap_or(0),
            )
        })
    }

    fn remove(&mut self, uid: &str) {
        let Some(placed) = self.placed.remove(uid) else {
            return;
        };
        if let Some(load) = self.load.get_mut(&placed.node) {
            *load -= 1;
        }
        let key = (placed.workload, placed.node);
        if let Some(load) = self.load_of.get_mut(&key) {
            *load -= 1;
            if *load == 0 {
                self.load_of.remove(&key);
            }
        }
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
