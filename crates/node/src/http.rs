//! The agent's API for operators: HTTP over a Unix socket.
//!
//! - `GET /v1/status` → `NodeStatus`
//! - `GET /v1/flows?since=SEQUENCE&follow=true&open=only` → one `FlowRecord` per line: the history, then either the
//!   connections that are open (`open=too`, or `only` them) or what happens from now on
//! - `GET /v1/explain?source=NAMESPACE/POD&host=HOST&port=PORT&protocol=TCP` → `Explanation`
//! - `GET /metrics` → Prometheus text

use std::{convert::Infallible, fs, io, path::PathBuf, sync::Arc};

use api::{pod::Protocol, report::FlowRecord};
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use futures::{Stream, StreamExt, stream};
use serde::Deserialize;
use telemetry::Registry;
use tokio::{
    net::UnixListener,
    sync::{broadcast, mpsc, oneshot},
};

use crate::{
    NodeError, agent::Command, connections::Connections, explain::Question, flows::FlowLog,
};

/// Open connections on their way to a reader.
const OPEN_QUEUE: usize = 256;

#[derive(Clone)]
struct Context {
    commands: mpsc::Sender<Command>,
    log: Arc<FlowLog>,
    connections: Arc<Connections>,
    registry: Registry,
}

/// Serves until the agent ends.
pub(crate) async fn serve(
    path: PathBuf,
    commands: mpsc::Sender<Command>,
    log: Arc<FlowLog>,
    connections: Arc<Connections>,
    registry: Registry,
) -> Result<(), NodeError> {
    let failed = || NodeError::io(format!("listen on {}", path.display()));
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed()(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(failed())?;
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/flows", get(flows))
        .route("/v1/explain", get(explain))
        .route("/metrics", get(metrics))
        .with_state(Context {
            commands,
            log,
            connections,
            registry,
        });
    axum::serve(listener, router).await.map_err(failed())
}

async fn status(State(context): State<Context>) -> Response {
    let (reply, answer) = oneshot::channel();
    match ask(&context, Command::Status(reply), answer).await {
        Ok(status) => Json(status).into_response(),
        Err(response) => response,
    }
}

#[derive(Deserialize)]
struct ExplainQuery {
    source: String,
    host: String,
    port: u16,
    #[serde(default)]
    protocol: Protocol,
}

async fn explain(State(context): State<Context>, Query(query): Query<ExplainQuery>) -> Response {
    let (reply, answer) = oneshot::channel();
    let question = Question {
        source: query.source,
        host: query.host,
        port: query.port,
        protocol: query.protocol,
    };
    match ask(&context, Command::Explain(question, reply), answer).await {
        Ok(Ok(explanation)) => Json(explanation).into_response(),
        Ok(Err(message)) => (StatusCode::NOT_FOUND, message).into_response(),
        Err(response) => response,
    }
}

async fn ask<T>(
    context: &Context,
    command: Command,
    answer: oneshot::Receiver<T>,
) -> Result<T, Response> {
    let stopping = || (StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping").into_response();
    context
        .commands
        .send(command)
        .await
        .map_err(|_| stopping())?;
    answer.await.map_err(|_| stopping())
}

#[derive(Deserialize)]
struct FlowQuery {
    #[serde(default)]
    since: u64,
    #[serde(default)]
    follow: bool,
    #[serde(default)]
    open: OpenConnections,
}

/// Whether open connections are told. Never to a follower, who hears of their end.
#[derive(Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OpenConnections {
    #[default]
    No,
    Too,
    Only,
}

async fn flows(State(context): State<Context>, Query(query): Query<FlowQuery>) -> Response {
    let (history, news) = match query.open {
        OpenConnections::Only => (Vec::new(), None),
        _ => {
            let (history, news) = context.log.since(query.since);
            (history, query.follow.then_some(news))
        }
    };
    let history = stream::iter(history);
    let body = match news {
        Some(news) => Body::from_stream(history.chain(follow(news)).map(line)),
        None if query.open == OpenConnections::No => Body::from_stream(history.map(line)),
        None => Body::from_stream(history.chain(open(context.connections)).map(line)),
    };
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// Lists them when the reader has come so far.
fn open(connections: Arc<Connections>) -> impl Stream<Item = Arc<FlowRecord>> {
    stream::once(async move {
        let (sender, records) = mpsc::channel(OPEN_QUEUE);
        tokio::task::spawn_blocking(move || connections.open(&sender));
        stream::unfold(records, |mut records| async move {
            let record = records.recv().await?;
            Some((Arc::new(record), records))
        })
    })
    .flatten()
}

/// A follower that is too slow misses records, which shows as a gap in their sequence.
fn follow(live: broadcast::Receiver<Arc<FlowRecord>>) -> impl Stream<Item = Arc<FlowRecord>> {
    stream::unfold(live, |mut live| async move {
        loop {
            match live.recv().await {
                Ok(record) => return Some((record, live)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    })
}

fn line(record: Arc<FlowRecord>) -> Result<Bytes, Infallible> {
    let mut line = serde_json::to_vec(&*record).unwrap_or_default();
    line.push(b'\n');
    Ok(line.into())
}

async fn metrics(State(context): State<Context>) -> Response {
    (
        [(header::CONTENT_TYPE, telemetry::CONTENT_TYPE)],
        context.registry.encode(),
    )
        .into_response()
}
