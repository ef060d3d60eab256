//! How long changes take: from the control plane's push until the kernel's tables show them, and until the agent
//! has acknowledged.

use anyhow::{Context, ensure};
use kernel::{PinnedMaps, ServiceKey, WorkloadEntry};

use super::{
    Bed, CLIENT, PORTS, Plan, SERVER,
    node::Pod,
    objects::{self, Range},
    report::{Memory, Report, Timing},
};

const TCP: u8 = 6;
/// What 10,000 endpoints should take, in milliseconds.
const AIM_OF_MANY: f64 = 1000.0;
/// What one change should take, in milliseconds.
const AIM_OF_ONE: f64 = 5.0;
/// Endpoints of the small service.
const FEW: u32 = 10;
/// How often what takes long is timed.
const LARGE_CHANGES: u32 = 5;

/// Times all kinds of changes, with `loaded` services there already.
pub(super) fn measure(
    bed: &Bed,
    plan: &Plan,
    loaded: u32,
    report: &mut Report,
) -> anyhow::Result<()> {
    let maps = bed.node.maps()?;
    eprintln!("changes, with {loaded} services");
    services(bed, loaded, report)?;
    let large = Service::make(bed, &maps, "large", 1, plan.endpoints)?;
    large.all(plan, report)?;
    large.one(plan, report)?;
    Service::make(bed, &maps, "small", 2, FEW)?.one(plan, report)?;
    large.one_weight(plan, report)?;
    one_policy(bed, &maps, plan, report)?;
    report.memory(memory(bed, &maps, "with all services and endpoints")?);
    eprintln!("{} workloads", plan.workloads);
    many_workloads(bed, &maps, plan, report)
}

/// All services at once, as when an agent starts.
fn services(bed: &Bed, loaded: u32, report: &mut Report) -> anyhow::Result<()> {
    let mut timing = Timing::new(
        format!("{loaded} services with a policy each, acknowledged"),
        None,
    );
    for _ in 0..LARGE_CHANGES.min(3) {
        let mut left = loaded;
        bed.load(&mut left, 0)?;
        timing.add(bed.load(&mut left, loaded)?);
    }
    report.timing(timing);
    Ok(())
}

/// A service whose endpoints come and go.
struct Service<'a> {
    bed: &'a Bed,
    maps: &'a PinnedMaps,
    name: &'static str,
    keys: [ServiceKey; 2],
    endpoints: u32,
}

impl<'a> Service<'a> {
    /// Makes it with its endpoints, and returns when the kernel has them.
    fn make(
        bed: &'a Bed,
        maps: &'a PinnedMaps,
        name: &'static str,
        place: u32,
        endpoints: u32,
    ) -> anyhow::Result<Self> {
        let vips = objects::addresses(Range::Named, place);
        let service = Self {
            bed,
            maps,
            name,
            keys: vips.map(|vip| ServiceKey {
                address: vip.into(),
                port: objects::HTTP,
                protocol: TCP,
                padding: 0,
            }),
            endpoints,
        };
        let it = objects::service_of(name, vips, &[objects::HTTP]);
        let all = (0..endpoints).map(|number| service.endpoint(number, Some(1)));
        let pushed = bed.node.push(std::iter::once(it).chain(all));
        bed.node.acknowledged(pushed)?;
        ensure!(
            service.has(endpoints),
            "the kernel lacks endpoints of {name}"
        );
        Ok(service)
    }

    /// All endpoints at once.
    fn all(&self, plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
        let count = self.endpoints;
        let aim = Some(AIM_OF_MANY);
        let mut kernel = Timing::new(format!("{count} endpoints at once, in the kernel"), aim);
        let mut agent = Timing::new(format!("{count} endpoints at once, acknowledged"), aim);
        for _ in 0..LARGE_CHANGES.min(plan.changes) {
            let gone = self
                .bed
                .node
                .push((0..count).map(|number| self.endpoint(number, None)));
            self.bed.node.acknowledged(gone)?;
            ensure!(self.has(0), "the kernel keeps endpoints of {}", self.name);
            let pushed = self
                .bed
                .node
                .push((0..count).map(|number| self.endpoint(number, Some(1))));
            kernel.add(self.bed.node.in_the_kernel(pushed, || self.has(count))?);
            agent.add(self.bed.node.acknowledged(pushed)?);
        }
        report.timing(kernel);
        report.timing(agent);
        Ok(())
    }

    /// One endpoint more, one endpoint fewer.
    fn one(&self, plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
        let count = self.endpoints;
        let aim = Some(AIM_OF_ONE);
        let mut added = Timing::new(format!("one endpoint added to {count}, in the kernel"), aim);
        let mut gone = Timing::new(
            format!("one endpoint taken from {count}, in the kernel"),
            aim,
        );
        for change in 0..plan.changes {
            let more = self.bed.node.push([self.endpoint(count, Some(1))]);
            added.add(self.bed.node.in_the_kernel(more, || self.has(count + 1))?);
            self.bed.node.acknowledged(more)?;
            // Not always the same one, and in the end all are back.
            let which = change * 7 % count;
            let fewer = self.bed.node.push([self.endpoint(which, None)]);
            gone.add(self.bed.node.in_the_kernel(fewer, || self.has(count))?);
            self.bed.node.acknowledged(fewer)?;
            let back = [self.endpoint(which, Some(1)), self.endpoint(count, None)];
            let restored = self.bed.node.push(back);
            self.bed.node.acknowledged(restored)?;
        }
        report.timing(added);
        report.timing(gone);
        Ok(())
    }

    /// One weight changed, which changes the whole table.
    fn one_weight(&self, plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
        let count = self.endpoints;
        let mut timing = Timing::new(
            format!("one weight changed among {count}, in the kernel"),
            None,
        );
        for change in 0..plan.changes.min(LARGE_CHANGES * 2) {
            let before = self.generations();
            let pushed = self.bed.node.push([self.endpoint(0, Some(2 + change % 2))]);
            let switched = || {
                let now = self.generations();
                now[0] != before[0] && now[1] != before[1]
            };
            timing.add(self.bed.node.in_the_kernel(pushed, switched)?);
            self.bed.node.acknowledged(pushed)?;
        }
        let pushed = self.bed.node.push([self.endpoint(0, Some(1))]);
        self.bed.node.acknowledged(pushed)?;
        report.timing(timing);
        Ok(())
    }

    fn endpoint(&self, number: u32, weight: Option<u32>) -> xds::cache::Change {
        // Two services' endpoints must not share addresses.
        let place = number + if self.name == "small" { 40_000 } else { 0 };
        objects::endpoint(self.name, place, weight)
    }

    /// Whether connections to both of the service's addresses are spread over `count` endpoints.
    fn has(&self, count: u32) -> bool {
        self.keys.iter().all(|key| {
            let entry = self.maps.service(key);
            entry.is_some_and(|entry| entry.slots == count)
        })
    }

    fn generations(&self) -> [Option<u32>; 2] {
        self.keys
            .map(|key| self.maps.service(&key).map(|entry| entry.generation))
    }
}

fn one_policy(
    bed: &Bed,
    maps: &PinnedMaps,
    plan: &Plan,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut timing = Timing::new(
        "one policy of a workload changed, in the kernel".into(),
        Some(AIM_OF_ONE),
    );
    let rules = |pod: &Pod| rules_of(maps, pod);
    for change in 0..plan.changes {
        let before = rules(&bed.server)?;
        let other = if change % 2 == 0 { "also" } else { SERVER };
        let pushed = bed.node.push([objects::change_policy(&with(other))]);
        let shown = || rules(&bed.server).is_ok_and(|now| now.policy_set != before.policy_set);
        timing.add(bed.node.in_the_kernel(pushed, shown)?);
        bed.node.acknowledged(pushed)?;
    }
    let restored = objects::selected(SERVER, CLIENT, &PORTS);
    let pushed = bed.node.push([objects::change_policy(&restored)]);
    bed.node.acknowledged(pushed)?;
    report.timing(timing);
    Ok(())
}

/// The server's policy, with one more account that may.
fn with(other: &str) -> xds::proto::security::Authorization {
    let mut policy = objects::selected(SERVER, CLIENT, &PORTS);
    policy
        .rules
        .extend(objects::selected(SERVER, other, &PORTS).rules);
    policy
}

fn rules_of(maps: &PinnedMaps, pod: &Pod) -> anyhow::Result<WorkloadEntry> {
    maps.address(pod.addresses()[0].into())
        .and_then(|address| maps.workload(address.workload))
        .with_context(|| format!("the kernel has no rules for {}", pod.name))
}

/// Many workloads on the node, each with a service account and a policy of its own: the most sets of rules.
fn many_workloads(
    bed: &Bed,
    maps: &PinnedMaps,
    plan: &Plan,
    report: &mut Report,
) -> anyhow::Result<()> {
    let more = plan.workloads - 2;
    let name = |number: u32| format!("local-{number}");
    let mut enrolled = Timing::new(
        format!("{more} workloads known to both sides, all may start"),
        None,
    );
    let mut pods = Vec::new();
    let started = std::time::Instant::now();
    for number in 0..more {
        pods.push(bed.node.add_pod(&name(number))?);
    }
    let made = started.elapsed();
    let changes = pods.iter().flat_map(|pod| {
        let own = objects::selected(&pod.name, CLIENT, &PORTS);
        let workload = objects::local(&pod.name, &pod.addresses(), &[], &[&pod.name]);
        [objects::change_policy(&own), workload]
    });
    let pushed = bed.node.push(changes);
    bed.node.ready(&pods)?;
    enrolled.add(started.elapsed());
    report.timing(enrolled);
    let mut namespaces = Timing::new(
        format!("of which: {more} namespaces, veths and cgroups made"),
        None,
    );
    namespaces.add(made);
    report.timing(namespaces);
    bed.node.acknowledged(pushed)?;

    let count = plan.workloads;
    let mut timing = Timing::new(
        format!("a policy of {count} workloads changed, in the kernel"),
        None,
    );
    for change in 0..plan.changes.min(LARGE_CHANGES * 2) {
        let rules = || -> anyhow::Result<Vec<[u32; 2]>> {
            let pods = pods.iter().chain([&bed.server, &bed.client]);
            pods.map(|pod| Ok(rules_of(maps, pod)?.policy_set))
                .collect()
        };
        let before = rules()?;
        let caller = if change % 2 == 0 {
            "somebody"
        } else {
            "nobody"
        };
        let pushed = bed
            .node
            .push([objects::change_policy(&objects::namespace_wide(caller))]);
        let shown =
            || rules().is_ok_and(|now| now.iter().zip(&before).all(|(now, before)| now != before));
        timing.add(bed.node.in_the_kernel(pushed, shown)?);
        bed.node.acknowledged(pushed)?;
    }
    report.timing(timing);
    let mut timing = Timing::new(
        format!("one policy of one of {count} workloads changed, in the kernel"),
        None,
    );
    for change in 0..plan.changes {
        let before = rules_of(maps, &bed.server)?;
        let other = if change % 2 == 0 { "also" } else { SERVER };
        let pushed = bed.node.push([objects::change_policy(&with(other))]);
        let shown =
            || rules_of(maps, &bed.server).is_ok_and(|now| now.policy_set != before.policy_set);
        timing.add(bed.node.in_the_kernel(pushed, shown)?);
        bed.node.acknowledged(pushed)?;
    }
    report.timing(timing);
    report.memory(memory(
        bed,
        maps,
        &format!("with {count} workloads besides"),
    )?);
    let gone = pods.iter().flat_map(|pod| {
        [
            objects::without_local(&pod.name),
            objects::without_policy(&pod.name),
        ]
    });
    let pushed = bed.node.push(gone);
    bed.node.acknowledged(pushed)?;
    Ok(())
}

fn memory(bed: &Bed, maps: &PinnedMaps, when: &str) -> anyhow::Result<Memory> {
    Ok(Memory::new(when, bed.node.agent_memory()?, maps.memory()?))
}
