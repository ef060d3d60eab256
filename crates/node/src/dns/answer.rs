//! The records that answer a question about the mesh.
//!
//! What a name means is decided in [`super::names`]; parsing and size limits are in [`super::message`].

use std::{net::IpAddr, sync::Arc};

use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{HINFO, PTR, SOA, SRV},
    },
};

use super::{
    names::{Meaning, meaning, pod_name, service_name},
    zone::{DnsEndpoint, DnsPort, DnsService, Zone},
};

/// Seconds that answers, also negative ones, may be cached: endpoints come and go (CoreDNS's default).
const TTL: u32 = 5;

/// Fills `response` with the answer to `query`, as a workload of `namespace` sees the mesh.
/// Returns false, with `response` as it was, if the name is not the mesh's.
pub(super) fn answer(zone: &Zone, namespace: &str, query: &Query, response: &mut Message) -> bool {
    let meaning = meaning(zone, namespace, &query.name);
    if matches!(meaning, Meaning::Elsewhere) {
        return false;
    }
    response.metadata.authoritative = true;
    if matches!(query.query_type, RecordType::AXFR | RecordType::IXFR) {
        response.metadata.authoritative = false;
        response.metadata.response_code = ResponseCode::Refused;
        return true;
    }
    if matches!(meaning, Meaning::Unknown) {
        response.metadata.response_code = ResponseCode::NXDomain;
    } else if query.query_type == RecordType::ANY {
        // One small record instead of all (RFC 8482, section 4.2).
        let minimal = RData::HINFO(HINFO::new("RFC8482".into(), String::new()));
        response.add_answer(record(&query.name, minimal));
    } else {
        let answer = Answer {
            zone,
            query,
            response,
        };
        answer.fill(&meaning);
    }
    if response.answers.is_empty() {
        response.add_authority(start_of_authority(zone, &query.name));
    }
    true
}

struct Answer<'a> {
    zone: &'a Zone,
    query: &'a Query,
    response: &'a mut Message,
}

impl Answer<'_> {
    fn fill(mut self, meaning: &Meaning) {
        match (meaning, self.query.query_type) {
            (Meaning::Apex, RecordType::SOA) => {
                let authority = start_of_authority(self.zone, &self.query.name);
                self.response.add_answer(authority);
            }
            (Meaning::Service(service), RecordType::SRV) => {
                self.services(service, &service.ports);
            }
            (Meaning::Ports(service, ports), RecordType::SRV) => self.services(service, ports),
            (Meaning::Service(service), _) => {
                let addresses = service_addresses(self.zone, service);
                self.addresses(addresses);
            }
            (Meaning::Pod(endpoints), _) => self.addresses(addresses(endpoints.iter())),
            (Meaning::Address(address), _) => self.addresses(vec![*address]),
            (Meaning::Pointer(names), RecordType::PTR) => {
                for name in names {
                    let pointer = RData::PTR(PTR(name.clone()));
                    self.response.add_answer(record(&self.query.name, pointer));
                }
            }
            // The name exists, this type does not: no answer, but no NXDOMAIN either (RFC 2308, section 2.2).
            _ => {}
        }
    }

    /// A or AAAA records, in random order: clients use the first.
    fn addresses(&mut self, mut addresses: Vec<IpAddr>) {
        fastrand::shuffle(&mut addresses);
        for data in addresses.into_iter().map(RData::from) {
            if data.record_type() == self.query.query_type {
                self.response.add_answer(record(&self.query.name, data));
            }
        }
    }

    fn services(&mut self, service: &DnsService, ports: &[DnsPort]) {
        if service.headless {
            let mut endpoints: Vec<_> = self.zone.published(service).cloned().collect();
            fastrand::shuffle(&mut endpoints);
            for endpoint in endpoints {
                self.endpoint_services(service, &endpoint, ports);
            }
        } else if let Some(target) = service_name(self.zone, service) {
            self.service_records(&target, ports.iter().map(|port| port.port));
            self.additional_addresses(&target, &service.vips);
        }
    }

    fn endpoint_services(
        &mut self,
        service: &DnsService,
        endpoint: &DnsEndpoint,
        ports: &[DnsPort],
    ) {
        let (Some(target), Some(membership)) = (
            pod_name(self.zone, &endpoint.hostname, service),
            endpoint.membership(service),
        ) else {
            return;
        };
        let targets = ports.iter().map(|port| {
            let pair = membership
                .target_ports
                .iter()
                .find(|(of_service, _)| *of_service == port.port);
            pair.map_or(port.port, |(_, of_endpoint)| *of_endpoint)
        });
        self.service_records(&target, targets);
        self.additional_addresses(&target, &endpoint.addresses);
    }

    fn service_records(&mut self, target: &Name, ports: impl Iterator<Item = u16>) {
        for port in ports {
            let data = RData::SRV(SRV::new(0, 100, port, target.clone()));
            self.response.add_answer(record(&self.query.name, data));
        }
    }

    fn additional_addresses(&mut self, target: &Name, addresses: &[IpAddr]) {
        for address in addresses {
            let data = RData::from(*address);
            self.response.add_additional(record(target, data));
        }
    }
}

fn service_addresses(zone: &Zone, service: &DnsService) -> Vec<IpAddr> {
    if service.headless {
        addresses(zone.published(service))
    } else {
        service.vips.clone()
    }
}

fn addresses<'a>(endpoints: impl Iterator<Item = &'a Arc<DnsEndpoint>>) -> Vec<IpAddr> {
    endpoints
        .flat_map(|endpoint| endpoint.addresses.iter().copied())
        .collect()
}

/// The SOA record that lets a client cache a negative answer (RFC 2308, section 3).
fn start_of_authority(zone: &Zone, name: &Name) -> Record {
    let domain = zone.domain();
    let below = |label| {
        domain
            .prepend_label(label)
            .unwrap_or_else(|_| domain.clone())
    };
    let data = SOA::new(
        below("ns"),
        below("hostmaster"),
        zone.serial(),
        7200,
        1800,
        86400,
        TTL,
    );
    // A record of another zone would be ignored: shortened and reverse names are zones of their own.
    let owner = if domain.zone_of(name) { domain } else { name };
    record(owner, RData::SOA(data))
}

fn record(owner: &Name, data: RData) -> Record {
    Record::from_rdata(owner.clone(), TTL, data)
}
