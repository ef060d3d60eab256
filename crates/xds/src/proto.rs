//! The messages of the workload API, generated from `proto/` by `build.rs`, and their type URLs.
//!
//! Only names and small conversions live here; meaning is given by who compiles and who reads them.

#![allow(missing_docs)] // Generated code; the comments are in the .proto files.
#![allow(clippy::large_enum_variant)] // An address is decoded and taken apart at once, never kept by the thousand.

use std::net::IpAddr;

use bytes::Bytes;

/// Workloads and services.
pub mod workload {
    include!(concat!(env!("OUT_DIR"), "/istio.workload.rs"));
}

/// Authorization policies.
pub mod security {
    include!(concat!(env!("OUT_DIR"), "/istio.security.rs"));
}

/// What Heddle adds, carried in the extensions of workloads and services.
pub mod heddle {
    include!(concat!(env!("OUT_DIR"), "/heddle.v1alpha1.rs"));
}

/// Type URL of [`workload::Address`].
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of [`security::Authorization`].
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
/// [`workload::Extension::name`] of [`heddle::ServiceOptions`].
pub const SERVICE_OPTIONS: &str = "heddle.v1alpha1.ServiceOptions";
/// [`workload::Extension::name`] of [`heddle::WorkloadOptions`].
pub const WORKLOAD_OPTIONS: &str = "heddle.v1alpha1.WorkloadOptions";

/// An address as the protocol carries it: 4 or 16 bytes, most significant first.
#[must_use]
pub fn address_to_bytes(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}

/// The address that `bytes` carry, or `None` if they are neither 4 nor 16.
#[must_use]
pub fn address_from_bytes(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

impl workload::Extension {
    /// An extension that carries `message` under `name`.
    pub fn pack<M: prost::Message + prost::Name>(name: &str, message: &M) -> Self {
        Self {
            name: name.to_owned(),
            config: Some(prost_types::Any {
                type_url: M::type_url(),
                value: message.encode_to_vec(),
            }),
        }
    }
}

impl workload::Service {
    /// Heddle's options of this service; the defaults if it carries none.
    ///
    /// # Errors
    /// The extension is there but is not a `ServiceOptions`.
    pub fn options(&self) -> Result<heddle::ServiceOptions, prost::DecodeError> {
        unpack(&self.extensions, SERVICE_OPTIONS)
    }
}

impl workload::Workload {
    /// Heddle's options of this workload; the defaults if it carries none.
    ///
    /// # Errors
    /// The extension is there but is not a `WorkloadOptions`.
    pub fn options(&self) -> Result<heddle::WorkloadOptions, prost::DecodeError> {
        unpack(&self.extensions, WORKLOAD_OPTIONS)
    }
}

fn unpack<M: prost::Message + Default>(
    extensions: &[workload::Extension],
    name: &str,
) -> Result<M, prost::DecodeError> {
    extensions
        .iter()
        .find(|extension| extension.name == name)
        .and_then(|extension| extension.config.as_ref())
        .map_or_else(
            || Ok(M::default()),
            |config| M::decode(config.value.as_slice()),
        )
}

#[cfg(test)]
mod tests {
    use prost::{Message, Name};

    use super::*;

    #[test]
    fn type_urls_are_the_protocols() {
        assert_eq!(workload::Address::type_url(), ADDRESS_TYPE);
        assert_eq!(security::Authorization::type_url(), AUTHORIZATION_TYPE);
    }

    #[test]
    fn numbers_on_the_wire_are_the_protocols() {
        let uid = workload::Workload {
            uid: "u".into(),
            ..Default::default()
        };
        // Field 20, length-delimited: (20 << 3) | 2 = 162, as a varint.
        assert_eq!(uid.encode_to_vec(), [0xa2, 0x01, 1, b'u']);
        let clause = security::Clause {
            matches: vec![security::Match {
                not_principals: vec![security::StringMatch {
                    match_type: Some(security::string_match::MatchType::Presence(())),
                }],
                ..Default::default()
            }],
        };
        // matches = 2, not_principals = 4, presence = 4.
        assert_eq!(clause.encode_to_vec(), [0x12, 4, 0x22, 2, 0x22, 0]);
    }

    #[test]
    fn options_travel_in_extensions() {
        let options = heddle::ServiceOptions {
            session_affinity_seconds: 60,
            ..Default::default()
        };
        let service = workload::Service {
            extensions: vec![workload::Extension::pack(SERVICE_OPTIONS, &options)],
            ..Default::default()
        };
        assert_eq!(service.options().unwrap(), options);
        assert_eq!(
            workload::Workload::default().options().unwrap(),
            heddle::WorkloadOptions::default()
        );
    }

    #[test]
    fn addresses_round_trip() {
        for address in ["10.0.0.1", "fd10::1"] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(
                address_from_bytes(&address_to_bytes(address)),
                Some(address)
            );
        }
        assert_eq!(address_from_bytes(&[1, 2, 3]), None);
    }
}
