//! The flow records of all nodes as one stream. With `follow`, an agent that is restarted is found again.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use api::report::FlowRecord;
use axum::body::Bytes;
use futures::{Stream, stream};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::Mesh;
use crate::client::Lines;

/// Records on their way to a reader; agents wait when it is full, and drop and count what they cannot keep.
const QUEUE: usize = 1024;
/// How soon an agent that is away is looked for again.
const RETRY: Duration = Duration::from_millis(200);

/// Whether open connections are told, in the words of the agents' API.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OpenConnections {
    /// Not at all.
    #[default]
    No,
    /// After the history.
    Too,
    /// Without the history.
    Only,
}

impl OpenConnections {
    fn word(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Too => "too",
            Self::Only => "only",
        }
    }
}

/// One line per record.
pub(super) fn merged(
    mesh: &Mesh,
    follow: bool,
    open: OpenConnections,
) -> impl Stream<Item = anyhow::Result<Bytes>> + use<> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let path = format!("/v1/flows?follow={follow}&open={}", open.word());
    for node in &mesh.nodes {
        let socket = mesh.layout.agent_socket(node);
        tokio::spawn(forward(
            socket,
            node.clone(),
            path.clone(),
            follow,
            sender.clone(),
        ));
    }
    stream::unfold(receiver, |mut receiver| async move {
        let line = receiver.recv().await?;
        Some((line, receiver))
    })
}

async fn forward(
    socket: PathBuf,
    node: String,
    path: String,
    follow: bool,
    sender: mpsc::Sender<anyhow::Result<Bytes>>,
) {
    loop {
        let outcome = copy(&socket, &path, &sender).await;
        if sender.is_closed() {
            return;
        }
        if !follow {
            if let Err(error) = outcome {
                let error =
                    error.context(format!("the flow records of node {node} are incomplete"));
                // The reader may have gone away.
                let _ = sender.send(Err(error)).await;
            }
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn copy(
    socket: &Path,
    path: &str,
    sender: &mpsc::Sender<anyhow::Result<Bytes>>,
) -> anyhow::Result<()> {
    let mut lines = Lines::get(socket, path)
        .await
        .context("its agent is away")?;
    loop {
        let record = tokio::select! {
            record = lines.next::<FlowRecord>() => record?,
            () = sender.closed() => return Ok(()),
        };
        let Some(record) = record else {
            return Ok(());
        };
        let mut line = serde_json::to_vec(&record)?;
        line.push(b'\n');
        if sender.send(Ok(line.into())).await.is_err() {
            return Ok(());
        }
    }
}
