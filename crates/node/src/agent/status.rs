//! What the agent says of itself: for `heddle status` and `heddle certs`.

use api::report::{NodeStatus, ProgramStatus, ReasonCount};
use kernel::Reason;

use super::Agent;

impl Agent {
    /// How everything stands at this moment.
    pub(super) fn status(&self) -> NodeStatus {
        let connection = self.connection.borrow().clone();
        let counts = self.dataplane.kernel.reason_counts().unwrap_or_default();
        let lost = counts
            .iter()
            .find(|(reason, _)| *reason == Reason::EventLost);
        let mut problems: Vec<String> = self.dataplane.problems.iter().cloned().collect();
        problems.extend(self.dataplane.unapplied.problems().cloned());
        let refused = self.refused.iter();
        problems.extend(refused.map(|(uid, refused)| format!("{uid}: {}", refused.error)));
        problems.extend(self.health.problems(&self.dataplane.kernel));
        problems.extend(
            connection
                .last_error
                .map(|error| format!("control plane: {error}")),
        );
        problems.extend(self.connections.problem());
        problems.extend(self.identities.problems());
        let mut enrolled: Vec<String> = self
            .dataplane
            .locals()
            .map(|local| local.enrolled.uid.clone())
            .collect();
        enrolled.sort();
        NodeStatus {
            node: self.config.node.clone(),
            pid: std::process::id(),
            synced: *self.settled.borrow(),
            connected: connection.connected,
            version: env!("CARGO_PKG_VERSION").into(),
            enrolled,
            programs: self
                .dataplane
                .kernel
                .attached()
                .iter()
                .map(|attached| ProgramStatus {
                    program: attached.program.clone(),
                    target: attached.target.clone(),
                })
                .collect(),
            maps: self.health.maps(&self.dataplane.kernel),
            flows_lost: lost.map_or(0, |(_, count)| *count),
            reasons: counts
                .into_iter()
                .filter(|(_, count)| *count > 0)
                .map(|(reason, count)| ReasonCount {
                    reason: reason.name().into(),
                    text: reason.text().into(),
                    count,
                })
                .collect(),
            ended: self.connections.ended_counts(),
            certificates: self.identities.certificates(),
            problems,
        }
    }
}
