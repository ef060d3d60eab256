//! A client that says exactly what a test tells it to, and acknowledges only when told.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};
use xds::{
    cache::{Cache, Change},
    proto::ADDRESS_TYPE,
};

const DEADLINE: Duration = Duration::from_secs(10);

pub(crate) struct RawClient {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl RawClient {
    pub(crate) async fn connect(socket: &Path) -> Self {
        let socket = socket.to_owned();
        let channel = Endpoint::from_static("http://control.heddle")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .unwrap();
        let (requests, stream) = mpsc::channel(8);
        let responses = AggregatedDiscoveryServiceClient::new(channel)
            .delta_aggregated_resources(ReceiverStream::new(stream))
            .await
            .unwrap()
            .into_inner();
        Self {
            requests,
            responses,
        }
    }

    pub(crate) async fn subscribe(&mut self, names: &[&str]) {
        self.change_subscription(names, &[]).await;
    }

    pub(crate) async fn change_subscription(&mut self, join: &[&str], leave: &[&str]) {
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        self.send(DeltaDiscoveryRequest {
            type_url: ADDRESS_TYPE.into(),
            resource_names_subscribe: owned(join),
            resource_names_unsubscribe: owned(leave),
            ..Default::default()
        })
        .await;
    }

    pub(crate) async fn acknowledge(&mut self, response: &DeltaDiscoveryResponse) {
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..Default::default()
        })
        .await;
    }

    pub(crate) async fn receive(&mut self) -> DeltaDiscoveryResponse {
        timeout(DEADLINE, self.responses.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
    }

    /// Proves that nothing was on its way: the next response is about `marker`, put into the cache now, alone.
    pub(crate) async fn nothing_more(&mut self, cache: &Cache, marker: &str) {
        cache.apply([Change {
            type_url: ADDRESS_TYPE.into(),
            name: marker.into(),
            body: Some(Bytes::from_static(b"1")),
        }]);
        let response = self.receive().await;
        assert_eq!(names(&response), [marker]);
    }

    async fn send(&mut self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }
}

pub(crate) fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response
        .resources
        .iter()
        .map(|resource| resource.name.as_str())
        .collect()
}
