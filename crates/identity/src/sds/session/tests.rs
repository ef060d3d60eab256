use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use envoy_types::pb::{
    envoy::extensions::transport_sockets::tls::v3::{Secret, secret},
    google::protobuf::Any,
};
use prost::Message;
use rustls::pki_types::CertificateDer;

use super::*;
use crate::{
    Svid, TrustBundle,
    attest::Caller,
    socket::{Hooks, Refusal},
};

const WEB: &str = "spiffe://mesh/ns/shop/sa/web";

fn subscription() -> (Subscription, Arc<AtomicUsize>) {
    let refused = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&refused);
    let hooks = Hooks::new(move |refusal| {
        assert_eq!(refusal, Refusal::NotTheCallers);
        count.fetch_add(1, Ordering::Relaxed);
    });
    let caller = Caller {
        uid: "shop/web-0".into(),
        id: WEB.parse().unwrap(),
    };
    (Subscription::new(caller, hooks), refused)
}

/// Certificates are opaque here: a number is as good.
fn seen(svid: Option<u8>, root: Option<u8>) -> Seen {
    Seen {
        svid: svid.map(|number| {
            Arc::new(Svid {
                id: WEB.parse().unwrap(),
                chain: vec![CertificateDer::from(vec![number])],
                key: vec![number].into(),
                not_before: SystemTime::UNIX_EPOCH,
                not_after: SystemTime::UNIX_EPOCH,
                serial: number.to_string(),
            })
        }),
        bundle: Arc::new(TrustBundle {
            trust_domain: "mesh".into(),
            roots: root
                .iter()
                .map(|number| CertificateDer::from(vec![*number]))
                .collect(),
            jwt_keys: String::new(),
        }),
    }
}

fn names(resources: &[Any]) -> Vec<String> {
    resources
        .iter()
        .map(|any| {
            let secret = Secret::decode(any.value.as_slice()).unwrap();
            let kind = match secret.r#type.unwrap() {
                secret::Type::TlsCertificate(_) => "certificate",
                secret::Type::ValidationContext(_) => "roots",
                _ => "other",
            };
            format!("{} {kind}", secret.name)
        })
        .collect()
}

fn ask(names: &[&str], nonce: &str) -> DiscoveryRequest {
    DiscoveryRequest {
        resource_names: names.iter().map(ToString::to_string).collect(),
        response_nonce: nonce.into(),
        type_url: SECRET_TYPE.into(),
        ..DiscoveryRequest::default()
    }
}

fn rejected(request: DiscoveryRequest) -> DiscoveryRequest {
    DiscoveryRequest {
        error_detail: Some(rpc::Status::default()),
        ..request
    }
}

fn subscribe(names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn delta_names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response
        .resources
        .iter()
        .map(|resource| resource.name.as_str())
        .collect()
}

#[test]
fn both_vocabularies_name_the_callers_secrets() {
    for (name, kind) in [
        ("default", "certificate"),
        (WEB, "certificate"),
        ("ROOTCA", "roots"),
        ("ALL", "roots"),
        ("spiffe://mesh", "roots"),
    ] {
        let mut session = StateOfTheWorld::new(subscription().0);
        session.on_request(ask(&[name], "")).unwrap();
        let response = session.due(&seen(Some(1), Some(2))).unwrap();
        assert_eq!(names(&response.resources), [format!("{name} {kind}")]);
    }
    let mut session = StateOfTheWorld::new(subscription().0);
    session.on_request(ask(&[], "")).unwrap();
    let response = session.due(&seen(Some(1), Some(2))).unwrap();
    let all = ["spiffe://mesh roots".into(), format!("{WEB} certificate")];
    assert_eq!(names(&response.resources), all);
}

#[test]
fn what_is_anothers_is_refused_and_counted() {
    for name in [
        "spiffe://mesh/ns/shop/sa/db",
        "spiffe://other",
        "spiffe://mesh/",
        "Default",
        "",
        "*",
    ] {
        let (subscription, refused) = subscription();
        let mut session = StateOfTheWorld::new(subscription);
        let error = session.on_request(ask(&["default", name], "")).unwrap_err();
        assert_eq!(error.code(), tonic::Code::PermissionDenied, "{name}");
        assert_eq!(refused.load(Ordering::Relaxed), 1);
    }
    let mut session = Incremental::new(subscription().0);
    let error = session.on_request(subscribe(&["spiffe://mesh/ns/shop/sa/db"]));
    assert_eq!(error.unwrap_err().code(), tonic::Code::PermissionDenied);
    let mut request = ask(&["default"], "");
    request.type_url = "type.googleapis.com/envoy.config.cluster.v3.Cluster".into();
    let error = StateOfTheWorld::new(subscription().0).on_request(request);
    assert_eq!(error.unwrap_err().code(), tonic::Code::InvalidArgument);
}

#[test]
fn a_rotation_is_sent_once_and_only_after_the_answer_to_the_last() {
    let mut session = StateOfTheWorld::new(subscription().0);
    assert!(session.due(&seen(Some(1), None)).is_none(), "not asked yet");
    session.on_request(ask(&["default"], "")).unwrap();
    assert!(session.due(&seen(None, Some(9))).is_none(), "not there yet");
    let first = session.due(&seen(Some(1), Some(9))).unwrap();
    assert!(session.due(&seen(Some(2), None)).is_none(), "unanswered");
    session.on_request(ask(&["default"], "stale")).unwrap();
    assert!(session.due(&seen(Some(2), None)).is_none(), "still");
    session.on_request(ask(&["default"], &first.nonce)).unwrap();
    assert!(
        session.due(&seen(Some(1), Some(8))).is_none(),
        "it has that"
    );
    let second = session.due(&seen(Some(3), None)).unwrap();
    assert_ne!(first.nonce, second.nonce);
    assert_ne!(first.version_info, second.version_info);
    // One that is rejected is not sent again; a newer one is.
    session
        .on_request(rejected(ask(&["default"], &second.nonce)))
        .unwrap();
    assert!(session.due(&seen(Some(3), None)).is_none());
    let third = session.due(&seen(Some(4), None)).unwrap();
    // Another name gets its answer although nothing has changed; giving all up gets none.
    session
        .on_request(ask(&["default", "ROOTCA"], &third.nonce))
        .unwrap();
    let fourth = session.due(&seen(Some(4), Some(7))).unwrap();
    assert_eq!(fourth.resources.len(), 2);
    session.on_request(ask(&[], &fourth.nonce)).unwrap();
    assert!(session.due(&seen(Some(5), Some(8))).is_none());
}

#[test]
fn the_incremental_variant_sends_what_has_changed() {
    let mut session = Incremental::new(subscription().0);
    session
        .on_request(subscribe(&["default", "ROOTCA"]))
        .unwrap();
    let first = session.due(&seen(Some(1), Some(1))).unwrap();
    assert_eq!(delta_names(&first), ["ROOTCA", "default"]);
    let answer = |nonce: &str| DeltaDiscoveryRequest {
        response_nonce: nonce.into(),
        ..DeltaDiscoveryRequest::default()
    };
    assert!(session.due(&seen(Some(2), Some(1))).is_none(), "unanswered");
    session.on_request(answer(&first.nonce)).unwrap();
    let second = session.due(&seen(Some(2), Some(1))).unwrap();
    assert_eq!(delta_names(&second), ["default"]);
    let mut rejection = answer(&second.nonce);
    rejection.error_detail = Some(rpc::Status::default());
    session.on_request(rejection).unwrap();
    assert!(session.due(&seen(Some(2), Some(1))).is_none());
    // Asked for again: it has it no more.
    session.on_request(subscribe(&["default"])).unwrap();
    let third = session.due(&seen(Some(2), Some(1))).unwrap();
    assert_eq!(delta_names(&third), ["default"]);
    let mut leave = answer(&third.nonce);
    leave.resource_names_unsubscribe = vec!["default".into()];
    session.on_request(leave).unwrap();
    assert!(session.due(&seen(Some(3), Some(1))).is_none());

    // A client that comes back says what it has.
    let mut again = Incremental::new(subscription().0);
    let mut request = subscribe(&["default", "ROOTCA"]);
    request.initial_resource_versions = third
        .resources
        .iter()
        .map(|resource| (resource.name.clone(), resource.version.clone()))
        .collect();
    again.on_request(request).unwrap();
    let missing = again.due(&seen(Some(2), Some(1))).unwrap();
    assert_eq!(delta_names(&missing), ["ROOTCA"]);
}
