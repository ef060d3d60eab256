//! Envoy's secret discovery service (SDS v3), for proxies that a workload brings along: its own certificate and the roots, and no other's.
//!
//! The names are those of Istio (`default`, `ROOTCA`) and of SPIRE (the SPIFFE id, the trust domain's id, `ALL`).
//! Roots come without a match on names: whom a proxy accepts is its own configuration's to say.
//! What one stream has and wants is in `sds/session.rs`.

mod session;

use std::{collections::BTreeMap, sync::Arc};

use envoy_types::pb::{
    envoy::{
        config::core::v3::{DataSource, data_source::Specifier},
        extensions::transport_sockets::tls::v3::{
            CertificateValidationContext, Secret, TlsCertificate, secret,
        },
        service::{
            discovery::v3::{
                DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            },
            secret::v3::secret_discovery_service_server::SecretDiscoveryService,
        },
    },
    google::protobuf::Any,
};
use pem::{EncodeConfig, LineEnding, Pem, encode_config, encode_many_config};
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use self::session::{Incremental, Session, StateOfTheWorld};
use crate::{
    IdentitySource,
    attest::Caller,
    socket::{Hooks, caller},
    watch::{Answers, Seen, View},
};

/// Type URL of a secret.
pub const SECRET_TYPE: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// Istio's name of the caller's certificate, and SPIRE's default name of it.
const OWN_CERTIFICATE: &str = "default";
/// Istio's and SPIRE's names of the roots, besides the trust domain's id.
const ROOTS: [&str; 2] = ["ROOTCA", "ALL"];
const PEM_FORMAT: EncodeConfig = EncodeConfig::new().set_line_ending(LineEnding::LF);

/// A secret that a caller may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Certificate,
    Roots,
}

/// The names that one caller may ask for, and has asked for: at most five.
#[derive(Debug)]
struct Subscription {
    caller: Caller,
    hooks: Hooks,
    names: BTreeMap<String, Wanted>,
}

/// A secret, encoded.
#[derive(Debug, Clone, PartialEq)]
struct Encoded {
    name: String,
    /// A hash of its content.
    version: String,
    body: Any,
}

impl Subscription {
    fn new(caller: Caller, hooks: Hooks) -> Self {
        Self {
            caller,
            hooks,
            names: BTreeMap::new(),
        }
    }

    fn add(&mut self, name: &str) -> Result<(), Status> {
        let id = &self.caller.id;
        let domain = name.strip_prefix("spiffe://");
        let wanted = if name == OWN_CERTIFICATE || name == id.as_str() {
            Wanted::Certificate
        } else if ROOTS.contains(&name) || domain == Some(id.trust_domain()) {
            Wanted::Roots
        } else {
            return Err(self.hooks.not_the_callers(&self.caller, name));
        };
        self.names.insert(name.to_owned(), wanted);
        Ok(())
    }

    /// Everything: what one who names nothing, or `*`, asks for.
    fn add_all(&mut self) {
        let id = &self.caller.id;
        self.names.insert(id.to_string(), Wanted::Certificate);
        self.names
            .insert(format!("spiffe://{}", id.trust_domain()), Wanted::Roots);
    }

    /// Those of the secrets asked for that are there.
    fn secrets(&self, seen: &Seen) -> Vec<Encoded> {
        self.names
            .iter()
            .filter_map(|(name, wanted)| {
                let content = match wanted {
                    Wanted::Certificate => certificate(seen)?,
                    Wanted::Roots => roots(seen)?,
                };
                Some(Encoded::new(name, content))
            })
            .collect()
    }
}

impl Encoded {
    fn new(name: &str, content: secret::Type) -> Self {
        let secret = Secret {
            name: name.to_owned(),
            r#type: Some(content),
        };
        let value = secret.encode_to_vec();
        Self {
            name: name.to_owned(),
            version: version(&value),
            body: Any {
                type_url: SECRET_TYPE.into(),
                value,
            },
        }
    }
}

fn version(content: &[u8]) -> String {
    let hash = Sha256::digest(content);
    hash.iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn certificate(seen: &Seen) -> Option<secret::Type> {
    let svid = seen.svid.as_ref()?;
    let key = Pem::new("PRIVATE KEY", svid.key.secret_pkcs8_der());
    Some(secret::Type::TlsCertificate(TlsCertificate {
        certificate_chain: Some(certificates(&svid.chain)),
        private_key: Some(inline(encode_config(&key, PEM_FORMAT))),
        ..TlsCertificate::default()
    }))
}

fn roots(seen: &Seen) -> Option<secret::Type> {
    let roots = &seen.bundle.roots;
    (!roots.is_empty()).then(|| {
        secret::Type::ValidationContext(CertificateValidationContext {
            trusted_ca: Some(certificates(roots)),
            ..CertificateValidationContext::default()
        })
    })
}

fn certificates(certificates: &[rustls::pki_types::CertificateDer<'_>]) -> DataSource {
    let blocks: Vec<Pem> = certificates
        .iter()
        .map(|certificate| Pem::new("CERTIFICATE", certificate.as_ref()))
        .collect();
    inline(encode_many_config(&blocks, PEM_FORMAT))
}

fn inline(text: String) -> DataSource {
    DataSource {
        specifier: Some(Specifier::InlineBytes(text.into_bytes())),
        ..DataSource::default()
    }
}

pub(crate) struct SecretService<S> {
    pub(crate) source: Arc<S>,
    pub(crate) hooks: Hooks,
    pub(crate) stop: CancellationToken,
}

#[tonic::async_trait]
impl<S: IdentitySource> SecretDiscoveryService for SecretService<S> {
    type StreamSecretsStream = Answers<DiscoveryResponse>;
    type DeltaSecretsStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        self.start::<StateOfTheWorld>(request)
    }

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        self.start::<Incremental>(request)
    }

    async fn fetch_secrets(
        &self,
        request: Request<DiscoveryRequest>,
    ) -> Result<Response<DiscoveryResponse>, Status> {
        let (mut view, subscription) = self.open(&request)?;
        let mut session = StateOfTheWorld::new(subscription);
        session.on_request(request.into_inner())?;
        let response = view.first(|seen| session.whole(seen)).await?;
        Ok(Response::new(response))
    }
}

impl<S: IdentitySource> SecretService<S> {
    fn open<T>(&self, request: &Request<T>) -> Result<(View, Subscription), Status> {
        let caller = caller(request)?;
        let view = View::new(self.source.as_ref(), &caller.id, self.stop.clone());
        Ok((view, Subscription::new(caller, self.hooks.clone())))
    }

    fn start<P: Session>(
        &self,
        request: Request<Streaming<P::Request>>,
    ) -> Result<Response<Answers<P::Response>>, Status> {
        let (view, subscription) = self.open(&request)?;
        // One answer that is not acknowledged, and the reason for the end.
        let (responses, answers) = mpsc::channel(2);
        let session = P::new(subscription);
        tokio::spawn(run(session, view, request.into_inner(), responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// The task behind one stream. A secret that is not there yet is waited for as long as the stream lasts.
async fn run<P: Session>(
    mut session: P,
    mut view: View,
    mut requests: Streaming<P::Request>,
    responses: mpsc::Sender<Result<P::Response, Status>>,
) {
    loop {
        let going_on = tokio::select! {
            request = requests.message() => match request {
                Ok(Some(request)) => session.on_request(request),
                Ok(None) | Err(_) => return,
            },
            changed = view.changed() => changed,
            () = responses.closed() => return,
        };
        let message = match going_on {
            Ok(()) => session.due(&view.see()).map(Ok),
            Err(status) => Some(Err(status)),
        };
        let last = matches!(message, Some(Err(_)));
        // There is room: a session has one response unanswered at most, so this fails only if the client has gone.
        if message.is_some_and(|message| responses.try_send(message).is_err()) || last {
            return;
        }
    }
}
