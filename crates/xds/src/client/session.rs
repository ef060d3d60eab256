//! The client's task: connect, subscribe, hand on, acknowledge; on any failure wait and start over.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    time::Duration,
};

use bytes::Bytes;
use envoy_types::pb::{
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
    google::{
        protobuf::{Struct, Value, value::Kind},
        rpc::Status as ErrorDetail,
    },
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code,
    transport::{Channel, Endpoint, Uri},
};

use super::{Answer, ClientConfig, ConnectionState, Update, Upsert};
use crate::MAX_MESSAGE_BYTES;

/// First wait after a failure; doubled up to [`MAX_BACK_OFF`], each with jitter.
const MIN_BACK_OFF: Duration = Duration::from_millis(50);
/// Longest wait between two tries: also how long a data plane may lag behind a server that is back.
const MAX_BACK_OFF: Duration = Duration::from_secs(5);
/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// An open stream without a sign of life for so long is probed; as long again, and it is given up.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// State of the client's task; what is held outlives connections.
pub(super) struct Session {
    pub(super) config: ClientConfig,
    /// Per type: accepted resources and their versions.
    pub(super) held: BTreeMap<String, BTreeMap<String, String>>,
    /// Types that have been received and answered at least once.
    pub(super) answered: BTreeSet<String>,
    pub(super) updates: mpsc::Sender<Update>,
    pub(super) state: watch::Sender<ConnectionState>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("cannot connect to the control plane at {socket}: {reason}")]
    Connect { socket: String, reason: String },
    #[error("no connection to the control plane at {socket} within {CONNECT_TIMEOUT:?}")]
    ConnectTimeout { socket: String },
    #[error("the control plane ended the stream: {0}")]
    Stream(#[from] tonic::Status),
    #[error("the control plane closed the stream")]
    Closed,
    #[error("the consumer of updates is gone")]
    ConsumerGone,
}

impl Session {
    pub(super) async fn run(mut self) {
        let mut back_off = MIN_BACK_OFF;
        loop {
            let Err(error) = self.connect_and_follow().await;
            if matches!(error, SessionError::ConsumerGone) {
                return;
            }
            let was_connected = self.state.borrow().connected;
            if was_connected {
                back_off = MIN_BACK_OFF;
                tracing::warn!(%error, "lost the control plane: working on the last known state");
            } else {
                tracing::debug!(%error, "control plane not reached");
            }
            self.state.send_modify(|state| {
                state.connected = false;
                state.last_error = Some(error.to_string());
            });
            // Half fixed, half random, so that nodes do not come back in step.
            tokio::select! {
                () = sleep(back_off / 2 + (back_off / 2).mul_f64(fastrand::f64())) => {}
                () = self.updates.closed() => return,
            }
            back_off = (back_off * 2).min(MAX_BACK_OFF);
        }
    }

    async fn connect_and_follow(&mut self) -> Result<std::convert::Infallible, SessionError> {
        let mut client = AggregatedDiscoveryServiceClient::new(self.connect().await?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        // One subscription per type, and one answer at a time after that.
        let (requests, stream) = mpsc::channel(self.config.types.len() + 1);
        for type_url in self.config.types.clone() {
            // There is room: the channel was made for this.
            let _ = requests.try_send(self.subscribe(&type_url));
        }
        let mut responses = client
            .delta_aggregated_resources(ReceiverStream::new(stream))
            .await?
            .into_inner();
        self.state.send_modify(|state| state.connections += 1);
        loop {
            let response = tokio::select! {
                response = responses.message() => response?.ok_or(SessionError::Closed)?,
                () = self.updates.closed() => return Err(SessionError::ConsumerGone),
            };
            let type_url = response.type_url.clone();
            let nonce = response.nonce.clone();
            let error_detail = self.hand_on(response).await?;
            let acknowledgement = DeltaDiscoveryRequest {
                type_url: type_url.clone(),
                response_nonce: nonce,
                error_detail,
                ..Default::default()
            };
            if requests.send(acknowledgement).await.is_err() {
                return Err(SessionError::Closed);
            }
            self.answered.insert(type_url);
            let synced = self.held.keys().all(|held| self.answered.contains(held));
            self.state.send_if_modified(|state| {
                let before = state.clone();
                state.connected = true;
                state.last_error = None;
                state.synced = synced;
                *state != before
            });
        }
    }

    async fn connect(&self) -> Result<Channel, SessionError> {
        let socket = self.config.socket.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        // The URI only names the authority; the connector decides where the bytes go.
        let endpoint = Endpoint::from_static("http://control.heddle")
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE);
        let socket = || self.config.socket.display().to_string();
        match timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(connector)).await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(SessionError::Connect {
                socket: socket(),
                reason: innermost(&error),
            }),
            Err(_) => Err(SessionError::ConnectTimeout { socket: socket() }),
        }
    }

    fn subscribe(&self, type_url: &str) -> DeltaDiscoveryRequest {
        let metadata = Struct {
            fields: HashMap::from([(
                "NODE_NAME".to_owned(),
                Value {
                    kind: Some(Kind::StringValue(self.config.node.clone())),
                },
            )]),
        };
        DeltaDiscoveryRequest {
            node: Some(Node {
                id: self.config.node_id.clone(),
                metadata: Some(metadata),
                ..Default::default()
            }),
            type_url: type_url.to_owned(),
            resource_names_subscribe: vec!["*".to_owned()],
            initial_resource_versions: self
                .held
                .get(type_url)
                .into_iter()
                .flatten()
                .map(|(name, version)| (name.clone(), version.clone()))
                .collect(),
            ..Default::default()
        }
    }

    /// Gives a response to the consumer and waits for its answer; returns what to tell the server.
    async fn hand_on(
        &mut self,
        response: DeltaDiscoveryResponse,
    ) -> Result<Option<ErrorDetail>, SessionError> {
        let Some(held) = self.held.get_mut(&response.type_url) else {
            let message = format!("{} was not subscribed to", response.type_url);
            return Ok(Some(rejection(message)));
        };
        let mut upserts = Vec::with_capacity(response.resources.len());
        let mut versions = Vec::with_capacity(response.resources.len());
        for resource in response.resources {
            let Some(body) = resource.resource else {
                return Ok(Some(rejection(format!("{} has no content", resource.name))));
            };
            versions.push((resource.name.clone(), resource.version));
            upserts.push(Upsert {
                name: resource.name,
                body: Bytes::from(body.value),
            });
        }
        let (answer, answered) = oneshot::channel();
        let update = Update {
            type_url: response.type_url,
            upserts,
            removed: response.removed_resources.clone(),
            version: response.system_version_info,
            answer: Answer(answer),
        };
        if self.updates.send(update).await.is_err() {
            return Err(SessionError::ConsumerGone);
        }
        match answered.await {
            Ok(Ok(())) => {
                for name in &response.removed_resources {
                    held.remove(name);
                }
                held.extend(versions);
                Ok(None)
            }
            Ok(Err(message)) => Ok(Some(rejection(message))),
            Err(_) => Ok(Some(rejection(
                "the update was dropped without an answer".to_owned(),
            ))),
        }
    }
}

fn rejection(message: String) -> ErrorDetail {
    ErrorDetail {
        code: Code::InvalidArgument.into(),
        message,
        ..Default::default()
    }
}

/// The cause at the bottom: tonic's own message says no more than "transport error".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
