//! The calls: who asks, whether it may have what it asks for, and the answer.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use futures::{Stream, stream};
use identity::{
    SpiffeId, TrustBundle,
    authority::{Authority, Request as CertificateRequest, SignError},
    ca_api::{
        IMPERSONATED_IDENTITY, RETRY_AFTER,
        heddle::{
            Bundle, MintJwtRequest, MintJwtResponse, WatchBundleRequest, trust_server::Trust,
        },
        istio::{
            IstioCertificateRequest, IstioCertificateResponse,
            istio_certificate_service_server::IstioCertificateService,
        },
    },
    certificate::to_pem,
};
use prost_types::value::Kind;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

use super::{
    counters::{Counters, add},
    limits::RateLimits,
    peer::{Peer, PeerIdentity},
    placements::Placements,
    tokens::JoinTokens,
};

/// Streams of bundles at a time.
const MAX_STREAMS: usize = 4096;
/// Accounts of a node that are told in a refusal.
const MAX_TOLD: usize = 8;
/// Longest part of a caller's text that is repeated to it.
const MAX_ECHO: usize = 120;

/// Serves both gRPC services.
#[derive(Clone)]
pub(super) struct Service(Arc<Inner>);

struct Inner {
    authority: Arc<Authority>,
    trust_domain: String,
    placements: Arc<dyn Placements>,
    tokens: Arc<JoinTokens>,
    limits: RateLimits,
    counters: Arc<Counters>,
    /// By stream: the bundle that it took last.
    streams: Mutex<HashMap<u64, Option<Arc<TrustBundle>>>>,
    stop: CancellationToken,
}

/// Who asks.
struct Caller {
    node: String,
    /// It has no certificate yet.
    token: Option<String>,
    until: Option<SystemTime>,
}

impl Service {
    pub(super) fn new(
        authority: Arc<Authority>,
        trust_domain: String,
        placements: Arc<dyn Placements>,
        tokens: Arc<JoinTokens>,
        limits: RateLimits,
        counters: Arc<Counters>,
        stop: CancellationToken,
    ) -> Self {
        Self(Arc::new(Inner {
            authority,
            trust_domain,
            placements,
            tokens,
            limits,
            counters,
            streams: Mutex::default(),
            stop,
        }))
    }

    /// Whether everybody who listens has the newest bundle.
    pub(super) fn all_informed(&self) -> bool {
        let newest = self.0.authority.bundle().borrow().clone();
        let streams = self.0.streams();
        streams
            .values()
            .all(|has| has.as_ref().is_some_and(|has| Arc::ptr_eq(has, &newest)))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let answer = self.0.create_certificate(&request);
        answer.map_err(|status| self.0.refuse(&request, status))
    }
}

#[tonic::async_trait]
impl Trust for Service {
    type WatchBundleStream = Pin<Box<dyn Stream<Item = Result<Bundle, Status>> + Send>>;

    async fn watch_bundle(
        &self,
        request: Request<WatchBundleRequest>,
    ) -> Result<Response<Self::WatchBundleStream>, Status> {
        let answer = self
            .0
            .caller_with_certificate(&request)
            .and_then(|caller| Ok(Response::new(Follower::start(&self.0, &caller)?.stream())));
        answer.map_err(|status| self.0.refuse(&request, status))
    }

    async fn mint_jwt(
        &self,
        request: Request<MintJwtRequest>,
    ) -> Result<Response<MintJwtResponse>, Status> {
        let answer = self.0.mint_jwt(&request);
        answer.map_err(|status| self.0.refuse(&request, status))
    }
}

impl Inner {
    fn create_certificate(
        &self,
        request: &Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let caller = self.caller(request)?;
        self.take(&caller.node)?;
        let asked = request.get_ref();
        let id = self.wanted(asked, &caller.node)?;
        if id.node() != Some(&caller.node) {
            if caller.token.is_some() {
                return Err(Status::permission_denied(format!(
                    "a join token is good for the identity of node `{}` alone, not for `{id}`",
                    caller.node
                )));
            }
            self.authorise(&caller.node, &id)?;
        }
        let csr = CertificateRequest::from_pem(&asked.csr).map_err(status)?;
        csr.check_name(&id).map_err(status)?;
        let lifetime = match asked.validity_duration {
            0 => None,
            seconds => Some(Duration::from_secs(u64::try_from(seconds).map_err(
                |_| Status::invalid_argument("validity_duration is negative"),
            )?)),
        };
        if let Some(token) = &caller.token {
            // Used up only by a request that is otherwise in order, and by one alone.
            self.tokens
                .redeem(token)
                .map_err(|error| Status::unauthenticated(error.to_string()))?;
        }
        let issued = self.authority.sign(&csr, &id, lifetime).map_err(status)?;
        add(&self.counters.signed);
        if caller.token.is_some() {
            add(&self.counters.joined);
            tracing::info!(node = caller.node, "a node has joined");
        }
        tracing::debug!(node = caller.node, identity = %id, "signed a certificate");
        let mut cert_chain: Vec<String> = issued.chain.iter().map(|it| to_pem([it])).collect();
        cert_chain.push(to_pem(&issued.roots));
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }

    fn mint_jwt(
        &self,
        request: &Request<MintJwtRequest>,
    ) -> Result<Response<MintJwtResponse>, Status> {
        let caller = self.caller_with_certificate(request)?;
        self.take(&caller.node)?;
        let asked = request.get_ref();
        let id = self.parse(&asked.spiffe_id)?;
        self.authorise(&caller.node, &id)?;
        let lifetime = match asked.lifetime_seconds {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.into())),
        };
        let token = self
            .authority
            .mint_jwt(&id, &asked.audience, lifetime)
            .map_err(status)?;
        add(&self.counters.tokens);
        let expires_at = token.expires_at.duration_since(SystemTime::UNIX_EPOCH);
        Ok(Response::new(MintJwtResponse {
            token: token.text,
            expires_at: expires_at.unwrap_or_default().as_secs(),
        }))
    }

    /// By a join token if there is one, else by client certificate.
    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        let Some(header) = request.metadata().get("authorization") else {
            return self.caller_with_certificate(request);
        };
        let token = header
            .to_str()
            .ok()
            .and_then(|text| text.strip_prefix("Bearer "))
            .ok_or_else(|| Status::unauthenticated("authorization must be `Bearer JOIN-TOKEN`"))?;
        let node = self
            .tokens
            .check(token)
            .map_err(|error| Status::unauthenticated(error.to_string()))?;
        Ok(Caller {
            node,
            token: Some(token.to_owned()),
            until: None,
        })
    }

    fn caller_with_certificate<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        let identity = request
            .extensions()
            .get::<Peer>()
            .map(|peer| &peer.identity);
        match identity {
            None | Some(PeerIdentity::Stranger) => Err(Status::unauthenticated(
                "show a node's client certificate, or a join token for the first one",
            )),
            Some(PeerIdentity::Untrusted(reason)) => Err(Status::unauthenticated(format!(
                "your client certificate is of no use: {reason}"
            ))),
            Some(PeerIdentity::Known { until, .. }) if *until <= SystemTime::now() => Err(
                Status::unauthenticated("your client certificate has expired: connect anew"),
            ),
            Some(PeerIdentity::Known { id, until }) => match id.node() {
                Some(node) if id.trust_domain() == self.trust_domain => Ok(Caller {
                    node: node.to_owned(),
                    token: None,
                    until: Some(*until),
                }),
                _ => Err(Status::permission_denied(format!(
                    "`{id}` is no node of this mesh"
                ))),
            },
        }
    }

    /// Whose certificate is asked for; without a word, the node's own.
    fn wanted(&self, asked: &IstioCertificateRequest, node: &str) -> Result<SpiffeId, Status> {
        let named = asked
            .metadata
            .as_ref()
            .and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY));
        match named.map(|value| &value.kind) {
            None => SpiffeId::of_node(&self.trust_domain, node)
                .map_err(|error| Status::invalid_argument(error.to_string())),
            Some(Some(Kind::StringValue(text))) => self.parse(text),
            Some(_) => Err(Status::invalid_argument(format!(
                "{IMPERSONATED_IDENTITY} must be a text"
            ))),
        }
    }

    fn parse(&self, text: &str) -> Result<SpiffeId, Status> {
        let id: SpiffeId = text
            .parse()
            .map_err(|error| Status::invalid_argument(format!("{error}")))?;
        if id.trust_domain() == self.trust_domain {
            return Ok(id);
        }
        Err(Status::invalid_argument(format!(
            "`{}` is not of trust domain `{}`",
            text.chars().take(MAX_ECHO).collect::<String>(),
            self.trust_domain
        )))
    }

    /// A node may have the identities of what is placed on it.
    fn authorise(&self, node: &str, id: &SpiffeId) -> Result<(), Status> {
        if let Some((namespace, account)) = id.account()
            && self.placements.runs(node, namespace, account)
        {
            return Ok(());
        }
        let mut accounts = self.placements.accounts(node, MAX_TOLD + 1);
        let there = if accounts.is_empty() {
            "nothing runs there".to_owned()
        } else {
            let more = accounts.len() > MAX_TOLD;
            accounts.truncate(MAX_TOLD);
            let and_more = if more { ", and more" } else { "" };
            format!("there run {}{and_more}", accounts.join(", "))
        };
        Err(Status::permission_denied(format!(
            "node `{node}` may not have `{id}`: no workload of that account is placed on it; {there}"
        )))
    }

    fn take(&self, node: &str) -> Result<(), Status> {
        self.limits.take(node).map_err(|wait| {
            let wait = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1);
            let mut status = Status::resource_exhausted(format!(
                "too many certificates are asked for; try again in {wait} ms"
            ));
            status.metadata_mut().insert(RETRY_AFTER, wait.into());
            status
        })
    }

    /// Counts a refusal, and logs it unless there are very many.
    fn refuse<T>(&self, request: &Request<T>, status: Status) -> Status {
        self.counters.refused(status.code());
        if self.limits.may_complain() {
            let peer = request.extensions().get::<Peer>();
            let address = peer
                .map(|peer| peer.address.to_string())
                .unwrap_or_default();
            let reason = status.message();
            tracing::warn!(peer = address, code = ?status.code(), reason, "the certificate authority refuses");
        }
        status
    }

    fn streams(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Option<Arc<TrustBundle>>>> {
        // Whole entries, whatever happened.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream of bundles.
struct Follower {
    service: Arc<Inner>,
    number: u64,
    bundle: watch::Receiver<Arc<TrustBundle>>,
    /// What was given to the transport and may still be on its way.
    given: Option<Arc<TrustBundle>>,
    /// The caller's certificate ends then, and with it the stream.
    until: Instant,
}

impl Follower {
    fn start(service: &Arc<Inner>, caller: &Caller) -> Result<Self, Status> {
        let mut streams = service.streams();
        if streams.len() >= MAX_STREAMS {
            return Err(Status::new(
                Code::ResourceExhausted,
                "too many streams of bundles",
            ));
        }
        let number = streams.keys().max().map_or(0, |newest| newest + 1);
        streams.insert(number, None);
        drop(streams);
        let mut bundle = service.authority.bundle();
        bundle.mark_changed();
        let left = caller.until.map_or(Duration::ZERO, |until| {
            until.duration_since(SystemTime::now()).unwrap_or_default()
        });
        Ok(Self {
            service: Arc::clone(service),
            number,
            bundle,
            given: None,
            until: Instant::now() + left,
        })
    }

    fn stream(self) -> <Service as Trust>::WatchBundleStream {
        Box::pin(stream::unfold(self, |mut follower| async move {
            let next = follower.next().await?;
            Some((Ok(next), follower))
        }))
    }

    async fn next(&mut self) -> Option<Bundle> {
        if let Some(taken) = self.given.take() {
            self.service.streams().insert(self.number, Some(taken));
        }
        let stop = self.service.stop.clone();
        tokio::select! {
            changed = self.bundle.changed() => changed.ok()?,
            () = sleep_until(self.until) => return None,
            () = stop.cancelled() => return None,
        }
        let bundle = self.bundle.borrow_and_update().clone();
        self.given = Some(Arc::clone(&bundle));
        Some(Bundle {
            trust_domain: bundle.trust_domain.clone(),
            roots: to_pem(&bundle.roots),
            jwt_keys: bundle.jwt_keys.clone(),
        })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.service.streams().remove(&self.number);
    }
}

fn status(error: SignError) -> Status {
    if error.is_callers_fault() {
        return Status::invalid_argument(error.to_string());
    }
    tracing::error!(%error, "the certificate authority cannot sign");
    Status::unavailable(error.to_string())
}
