//! The API that `heddle up` serves to the other commands: HTTP over a Unix socket.
//!
//! - `GET /v1/status` → `MeshStatus`
//! - `GET /v1/flows?follow=true&open=too` → one `FlowRecord` per line, of all nodes
//! - `GET /v1/explain?source=WORKLOAD&host=HOST&port=PORT&protocol=TCP` → `Explanation`
//! - `GET /v1/exec?workload=WORKLOAD` → `ExecSpec` without its command
//! - `GET /v1/logs?workload=WORKLOAD&follow=true` → bytes
//! - `GET /v1/metrics?node=NODE` → Prometheus text of one node
//! - `POST /v1/certs/rotate-root` → begins to replace the root
//! - `POST /v1/down` → stops the mesh

mod flows;
mod status;

use std::{io, path::PathBuf, sync::Arc};

use anyhow::Context as _;
use api::report::{Explanation, Replica};
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use control::ControlPlane;
use futures::stream;
use http_body_util::BodyExt as _;
use hyper::Method;
use runtime::{layout::Layout, publish::listeners::PortError, supervisor::Runtime};
use serde::Deserialize;
use tokio::{net::UnixListener, sync::watch};

use crate::{
    client::{self, escape},
    select,
};

/// What the API speaks of.
#[derive(Clone)]
pub(crate) struct Mesh {
    pub(crate) layout: Layout,
    pub(crate) source: PathBuf,
    pub(crate) nodes: Vec<String>,
    pub(crate) control: Arc<ControlPlane>,
    pub(crate) runtime: Arc<Runtime>,
    /// Ports that could not be published.
    pub(crate) unpublished: watch::Receiver<Vec<Arc<PortError>>>,
    /// Set to stop the mesh.
    pub(crate) stop: Arc<watch::Sender<bool>>,
}

/// Binds the socket and serves in the background.
pub(crate) fn start(mesh: Mesh) -> anyhow::Result<()> {
    let path = mesh.layout.api_socket();
    let listener = UnixListener::bind(&path)
        .with_context(|| format!("cannot listen on {}", path.display()))?;
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/flows", get(flows))
        .route("/v1/explain", get(explain))
        .route("/v1/exec", get(exec))
        .route("/v1/logs", get(logs))
        .route("/v1/metrics", get(metrics))
        .route("/v1/certs/rotate-root", post(rotate_root))
        .route("/v1/down", post(down))
        .with_state(mesh);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the API ended");
        }
    });
    Ok(())
}

/// What went wrong, as the client prints it.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Self(StatusCode::NOT_FOUND, format!("{error:#}"))
    }
}

impl From<runtime::Error> for Refusal {
    fn from(error: runtime::Error) -> Self {
        Self(StatusCode::CONFLICT, error.to_string())
    }
}

async fn status(State(mesh): State<Mesh>) -> Response {
    Json(status::of(&mesh).await).into_response()
}

#[derive(Deserialize)]
struct FlowQuery {
    #[serde(default)]
    follow: bool,
    #[serde(default)]
    open: flows::OpenConnections,
}

async fn flows(State(mesh): State<Mesh>, Query(query): Query<FlowQuery>) -> Response {
    let body = Body::from_stream(flows::merged(&mesh, query.follow, query.open));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

#[derive(Deserialize)]
struct ExplainQuery {
    source: String,
    host: String,
    port: u16,
    /// `TCP` or `UDP`, checked by the agent.
    protocol: String,
}

async fn explain(
    State(mesh): State<Mesh>,
    Query(query): Query<ExplainQuery>,
) -> Result<Json<Explanation>, Refusal> {
    let replica = find(&mesh, &query.source)?;
    let path = format!(
        "/v1/explain?source={}&host={}&port={}&protocol={}",
        escape(&replica.status.uid),
        escape(&query.host),
        query.port,
        escape(&query.protocol)
    );
    let socket = mesh.layout.agent_socket(&replica.status.node);
    Ok(Json(client::get(&socket, &path).await?))
}

#[derive(Deserialize)]
struct WorkloadQuery {
    workload: String,
    #[serde(default)]
    follow: bool,
}

async fn exec(
    State(mesh): State<Mesh>,
    Query(query): Query<WorkloadQuery>,
) -> Result<Response, Refusal> {
    let replica = find(&mesh, &query.workload)?;
    Ok(Json(mesh.runtime.exec_spec(&replica.status.uid)?).into_response())
}

async fn logs(
    State(mesh): State<Mesh>,
    Query(query): Query<WorkloadQuery>,
) -> Result<Response, Refusal> {
    let chunks = match query.workload.strip_prefix("node/") {
        Some(node) => mesh.runtime.agent_log(node)?.read(query.follow),
        None => {
            let replica = find(&mesh, &query.workload)?;
            mesh.runtime.logs(&replica.status.uid, query.follow)?
        }
    };
    let chunks = stream::unfold(chunks, |mut chunks| async move {
        let chunk = chunks.recv().await?;
        Some((Ok::<_, io::Error>(Bytes::from(chunk)), chunks))
    });
    Ok(Body::from_stream(chunks).into_response())
}

#[derive(Deserialize)]
struct NodeQuery {
    node: String,
}

async fn metrics(
    State(mesh): State<Mesh>,
    Query(query): Query<NodeQuery>,
) -> Result<Response, Refusal> {
    if !mesh.nodes.contains(&query.node) {
        let message = format!(
            "there is no node `{}`; there are {}",
            query.node,
            mesh.nodes.join(", ")
        );
        return Err(Refusal(StatusCode::NOT_FOUND, message));
    }
    let socket = mesh.layout.agent_socket(&query.node);
    let body = client::request(&socket, Method::GET, "/metrics").await?;
    let text = body
        .collect()
        .await
        .context("the agent's answer broke off")?
        .to_bytes();
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

async fn rotate_root(State(mesh): State<Mesh>) -> Result<&'static str, Refusal> {
    let rotated = mesh.control.ca().authority().rotate_root();
    rotated.map_err(|error| Refusal(StatusCode::CONFLICT, error.to_string()))?;
    Ok("announced")
}

async fn down(State(mesh): State<Mesh>) -> &'static str {
    mesh.stop.send_replace(true);
    "stopping"
}

fn find(mesh: &Mesh, wanted: &str) -> anyhow::Result<Replica> {
    select::replica(wanted, &status::replicas(mesh)).cloned()
}
