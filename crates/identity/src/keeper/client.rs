//! Calls to the certificate authority, over TLS with or without a client certificate.

use std::{
    fmt, io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hyper_util::rt::TokioIo;
use linux::netns::Netns;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::{
    ClientConfig, RootCertStore,
    client::Resumption,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName},
    version::TLS13,
};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Code, Request, Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};

use super::KeeperConfig;
use crate::{
    SpiffeId, Svid,
    ca_api::{
        IMPERSONATED_IDENTITY, MAX_MESSAGE_BYTES, RETRY_AFTER, SERVER_NAME,
        heddle::{Bundle, MintJwtRequest, WatchBundleRequest, trust_client::TrustClient},
        istio::{
            IstioCertificateRequest,
            istio_certificate_service_client::IstioCertificateServiceClient,
        },
    },
    certificate,
};

const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// An authority that answers no PING for so long is gone.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Longest wait that the authority may ask for.
const LONGEST_HINT: Duration = Duration::from_secs(60);

/// A connection to the authority; it is made when it is needed, and again after it broke.
#[derive(Clone)]
pub(super) struct Client {
    channel: Channel,
}

/// Why there is no certificate or token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// The authority says no.
    Refused(String),
    /// It does not want this client: the certificate or token is of no use.
    Unauthenticated(String),
    /// It asks to wait.
    Busy(String, Duration),
    /// It does not answer, or with something else than it should.
    Unavailable(String),
}

impl Client {
    /// `node`: the certificate to show, if there is one.
    pub(super) fn new(
        config: &KeeperConfig,
        roots: &[CertificateDer<'static>],
        node: Option<&Svid>,
    ) -> Result<Self, Failure> {
        let unavailable = |error: &dyn fmt::Display| Failure::Unavailable(error.to_string());
        let tls = tls_config(roots, node).map_err(|error| unavailable(&error))?;
        let connector = TlsConnector::from(Arc::new(tls));
        let (address, netns) = (config.control, config.netns.clone());
        let endpoint = Endpoint::from_shared(format!("http://{SERVER_NAME}"))
            .map_err(|error| unavailable(&error))?
            .connect_timeout(CONNECT_PATIENCE)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let (connector, netns) = (connector.clone(), netns.clone());
            async move { dial(address, netns, connector).await.map(TokioIo::new) }
        }));
        Ok(Self { channel })
    }

    /// A new key, and a certificate for it. `token`: for the node's own identity, without a client certificate.
    pub(super) async fn create_certificate(
        &self,
        id: &SpiffeId,
        lifetime: Option<Duration>,
        token: Option<&str>,
    ) -> Result<Svid, Failure> {
        let (key, csr) = certificate_request(id)?;
        let identity = prost_types::Value {
            kind: Some(prost_types::value::Kind::StringValue(id.to_string())),
        };
        let mut request = Request::new(IstioCertificateRequest {
            csr,
            validity_duration: lifetime.map_or(0, |lifetime| {
                i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX)
            }),
            metadata: Some(prost_types::Struct {
                fields: [(IMPERSONATED_IDENTITY.to_owned(), identity)].into(),
            }),
        });
        request.set_timeout(ANSWER_PATIENCE);
        if let Some(token) = token {
            let value = format!("Bearer {token}")
                .parse()
                .map_err(|_| Failure::Refused("the join token is no text for a header".into()))?;
            request.metadata_mut().insert("authorization", value);
        }
        let mut client = IstioCertificateServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let answer = client
            .create_certificate(request)
            .await
            .map_err(Failure::from)?
            .into_inner();
        read_answer(&answer.cert_chain, id, key)
    }

    pub(super) async fn watch_bundle(&self) -> Result<Streaming<Bundle>, Failure> {
        let mut client =
            TrustClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let answer = client.watch_bundle(WatchBundleRequest {}).await;
        Ok(answer.map_err(Failure::from)?.into_inner())
    }

    pub(super) async fn mint_jwt(
        &self,
        id: &SpiffeId,
        audience: &[String],
    ) -> Result<String, Failure> {
        let mut client =
            TrustClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let request = MintJwtRequest {
            spiffe_id: id.to_string(),
            audience: audience.to_vec(),
            lifetime_seconds: 0,
        };
        let answer = client.mint_jwt(request).await.map_err(Failure::from)?;
        Ok(answer.into_inner().token)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let message = status.message().to_owned();
        match status.code() {
            Code::PermissionDenied | Code::InvalidArgument | Code::FailedPrecondition => {
                Self::Refused(message)
            }
            Code::Unauthenticated => Self::Unauthenticated(message),
            Code::ResourceExhausted => {
                let hint = status
                    .metadata()
                    .get(RETRY_AFTER)
                    .and_then(|value| value.to_str().ok()?.parse().ok())
                    .map_or(Duration::ZERO, Duration::from_millis);
                Self::Busy(message, hint.min(LONGEST_HINT))
            }
            _ => Self::Unavailable(with_causes(&status)),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(reason) | Self::Unauthenticated(reason) | Self::Busy(reason, _) => {
                f.write_str(reason)
            }
            Self::Unavailable(reason) => write!(f, "the authority is not reachable: {reason}"),
        }
    }
}

/// tonic says "transport error" and hides what happened in the sources.
fn with_causes(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// A key of its own for every certificate.
fn certificate_request(id: &SpiffeId) -> Result<(KeyPair, String), Failure> {
    let failed = |error: rcgen::Error| Failure::Unavailable(format!("no key can be made: {error}"));
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let name = id.as_str().try_into().map_err(failed)?;
    params.subject_alt_names = vec![SanType::URI(name)];
    let csr = params.serialize_request(&key).map_err(failed)?;
    Ok((key, csr.pem().map_err(failed)?))
}

/// The certificate must be what was asked for, and good by the roots that came with it over an authenticated connection.
fn read_answer(chain: &[String], id: &SpiffeId, key: KeyPair) -> Result<Svid, Failure> {
    let bad = |reason: &dyn fmt::Display| {
        Failure::Unavailable(format!("it sent a certificate that is of no use: {reason}"))
    };
    let Some((roots, chain)) = chain.split_last() else {
        return Err(bad(&"there is none"));
    };
    let roots = certificate::from_pem(roots).map_err(|error| bad(&error))?;
    let chain = certificate::from_pem(&chain.concat()).map_err(|error| bad(&error))?;
    certificate::verify(&chain, &roots, SystemTime::now()).map_err(|error| bad(&error))?;
    let leaf = certificate::parse(&chain[0]).map_err(|error| bad(&error))?;
    if leaf.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
        return Err(bad(&"it is for another key"));
    }
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    let svid = Svid::new(chain, key).map_err(|error| bad(&error))?;
    if svid.id != *id {
        return Err(bad(&format_args!("it is `{}`'s", svid.id)));
    }
    Ok(svid)
}

fn tls_config(
    roots: &[CertificateDer<'static>],
    node: Option<&Svid>,
) -> Result<ClientConfig, rustls::Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(store);
    let mut config = match node {
        Some(svid) => {
            builder.with_client_auth_cert(svid.chain.clone(), svid.key.clone_key().into())?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

async fn dial(
    address: SocketAddr,
    netns: Option<Netns>,
    connector: TlsConnector,
) -> io::Result<TlsStream<TcpStream>> {
    let made = move || match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = match netns {
        // Entering a namespace starts a thread and waits for it.
        Some(netns) => tokio::task::spawn_blocking(move || netns.run(made))
            .await
            .map_err(io::Error::other)???,
        None => made()?,
    };
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
    connector.connect(name, stream).await
}
