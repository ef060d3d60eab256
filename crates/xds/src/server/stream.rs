//! The task behind one client's stream: requests in, changes of the cache in, responses out.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use envoy_types::pb::{
    envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        Resource, aggregated_discovery_service_server::AggregatedDiscoveryService,
    },
    google::protobuf::{Any, value::Kind},
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{
    clients::{ClientState, Clients, Registration},
    subscription::{self, Subscription},
};
use crate::{
    cache::Cache,
    proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE},
};

/// Types that one client may subscribe to, and so responses that can wait to be read.
const MAX_TYPES: usize = 32;
/// Streams served at a time; more are refused.
const MAX_STREAMS: usize = 10_000;

/// The gRPC service; one task per stream.
#[derive(Debug)]
pub(crate) struct Service {
    cache: Cache,
    clients: Clients,
    stop: CancellationToken,
    next_stream: AtomicU64,
    streams: Arc<AtomicUsize>,
}

impl Service {
    pub(crate) fn new(cache: Cache, clients: Clients, stop: CancellationToken) -> Self {
        Self {
            cache,
            clients,
            stop,
            next_stream: AtomicU64::new(1),
            streams: Arc::default(),
        }
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented(
            "this server speaks the incremental variant only: use DeltaAggregatedResources",
        ))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let slot = StreamSlot::take(&self.streams)?;
        let (responses, answers) = mpsc::channel(MAX_TYPES);
        let stream = ClientStream {
            id: self.next_stream.fetch_add(1, Ordering::Relaxed),
            cache: self.cache.clone(),
            clients: self.clients.clone(),
            registration: None,
            subscriptions: BTreeMap::new(),
            responses,
            next_nonce: 1,
        };
        let stop = self.stop.clone();
        tokio::spawn(async move {
            stream.run(request.into_inner(), stop).await;
            drop(slot);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// One of [`MAX_STREAMS`].
struct StreamSlot(Arc<AtomicUsize>);

impl StreamSlot {
    fn take(streams: &Arc<AtomicUsize>) -> Result<Self, Status> {
        let slot = Self(Arc::clone(streams));
        if streams.fetch_add(1, Ordering::Relaxed) >= MAX_STREAMS {
            return Err(Status::resource_exhausted(format!(
                "{MAX_STREAMS} streams are being served already"
            )));
        }
        Ok(slot)
    }
}

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct ClientStream {
    id: u64,
    cache: Cache,
    clients: Clients,
    registration: Option<Registration>,
    /// By type URL, which happens to put policies before the workloads that name them.
    subscriptions: BTreeMap<String, Subscription>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    next_nonce: u64,
}

impl ClientStream {
    async fn run(
        mut self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        stop: CancellationToken,
    ) {
        let mut generation = self.cache.watch();
        loop {
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        if let Err(status) = self.on_request(request) {
                            // The channel has room for one answer per type, so only a client that
                            // reads nothing misses the reason.
                            let _ = self.responses.try_send(Err(status));
                            return;
                        }
                    }
                    Ok(None) => return,
                    Err(status) => {
                        tracing::debug!(%status, "an xDS client's stream broke");
                        return;
                    }
                },
                changed = generation.changed() => if changed.is_err() { return },
                () = self.responses.closed() => return,
                () = stop.cancelled() => return,
            }
            self.send_what_is_due();
            self.record();
        }
    }

    fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if self.registration.is_none() {
            let state = client_state(&request);
            tracing::debug!(node = %state.node, "xDS client connected");
            self.registration = Some(self.clients.register(self.id, state));
        }
        if request.type_url.is_empty() {
            return Err(Status::invalid_argument("type_url is missing"));
        }
        if !self.subscriptions.contains_key(&request.type_url)
            && self.subscriptions.len() >= MAX_TYPES
        {
            return Err(Status::resource_exhausted(format!(
                "more than {MAX_TYPES} types on one stream"
            )));
        }
        if let Some(error) = &request.error_detail {
            let node = self.node();
            tracing::warn!(node, type_url = %request.type_url, error = %error.message, "a client rejected a response");
        }
        let subscription = self
            .subscriptions
            .entry(request.type_url.clone())
            .or_insert_with(|| Subscription::new(&request));
        subscription.on_request(&request);
        if subscription.is_too_large() {
            return Err(Status::resource_exhausted(format!(
                "more than {} names of one type: subscribe to \"*\" instead",
                subscription::MAX_NAMES
            )));
        }
        Ok(())
    }

    fn send_what_is_due(&mut self) {
        // A workload names its policies, so it waits while they are on their way: no client sees
        // a workload whose policies it has not been sent.
        let mut policies_in_flight = false;
        for (type_url, subscription) in &mut self.subscriptions {
            if type_url == ADDRESS_TYPE && policies_in_flight {
                continue;
            }
            let next_nonce = &mut self.next_nonce;
            let response = subscription.next(&self.cache, || {
                let nonce = *next_nonce;
                *next_nonce += 1;
                nonce.to_string()
            });
            if type_url == AUTHORIZATION_TYPE {
                policies_in_flight = subscription.in_flight();
            }
            if let Some(response) = response {
                // At most one per type is unanswered and the channel has room for all types, so
                // this fails only when the client is gone, which ends the task.
                let _ = self.responses.try_send(Ok(encode(type_url, response)));
            }
        }
    }

    fn record(&self) {
        if let Some(registration) = &self.registration {
            registration.update(
                self.subscriptions
                    .values()
                    .map(Subscription::state)
                    .collect(),
            );
        }
    }

    fn node(&self) -> String {
        self.registration
            .as_ref()
            .map(Registration::node)
            .unwrap_or_default()
    }
}

fn encode(type_url: &str, response: subscription::Response) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: response.generation.to_string(),
        resources: response
            .changed
            .into_iter()
            .map(|resource| Resource {
                name: resource.name.to_string(),
                version: resource.version.to_string(),
                resource: Some(Any {
                    type_url: type_url.to_owned(),
                    value: resource.body.to_vec(),
                }),
                ..Default::default()
            })
            .collect(),
        type_url: type_url.to_owned(),
        removed_resources: response.removed.iter().map(ToString::to_string).collect(),
        nonce: response.nonce,
        ..Default::default()
    }
}

fn client_state(request: &DeltaDiscoveryRequest) -> ClientState {
    let node = request.node.as_ref();
    let node_id = node.map(|node| node.id.clone()).unwrap_or_default();
    let name = node
        .and_then(|node| node.metadata.as_ref())
        .and_then(|metadata| metadata.fields.get("NODE_NAME"))
        .and_then(|value| match &value.kind {
            Some(Kind::StringValue(name)) => Some(name.clone()),
            _ => None,
        });
    ClientState {
        node: name.unwrap_or_else(|| node_id.clone()),
        node_id,
        types: Vec::new(),
    }
}
