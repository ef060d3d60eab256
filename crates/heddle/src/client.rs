//! HTTP over Unix sockets: how the commands talk to `heddle up`, and `heddle up` to its agents.

use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Method, Request,
    body::{Bytes, Incoming},
};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// Longest line of a stream that is accepted, in bytes.
const MAX_LINE: usize = 1 << 20;

/// One request; the answer's body is not read yet. An error status is an error with the server's text.
pub(crate) async fn request(socket: &Path, method: Method, path: &str) -> anyhow::Result<Incoming> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the response's body; its error shows there.
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "heddle")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body();
    if status.is_success() {
        return Ok(body);
    }
    let text = body.collect().await?.to_bytes();
    let text = String::from_utf8_lossy(&text);
    if text.is_empty() {
        bail!("{status}")
    } else {
        bail!("{text}")
    }
}

/// A request whose answer is one JSON document.
pub(crate) async fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    let body = request(socket, Method::GET, path)
        .await?
        .collect()
        .await?
        .to_bytes();
    serde_json::from_slice(&body).context("the answer is not of the expected form: versions differ")
}

/// An answer that is one JSON document per line, for as long as it lasts.
pub(crate) struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    /// Sends the request.
    pub(crate) async fn get(socket: &Path, path: &str) -> anyhow::Result<Self> {
        let body = request(socket, Method::GET, path).await?;
        Ok(Self {
            body,
            buffer: Vec::new(),
        })
    }

    /// The next document; `None` at the end.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> anyhow::Result<Option<T>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            if self.buffer.len() > MAX_LINE {
                return Err(anyhow!(
                    "a line of the answer is longer than {MAX_LINE} bytes"
                ));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

/// Escapes a value for a query string (RFC 3986, section 2.1).
pub(crate) fn escape(value: &str) -> String {
    let mut escaped = String::new();
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_query_cannot_carry_is_escaped() {
        assert_eq!(escape("shop/api:80"), "shop/api:80");
        assert_eq!(escape("a&b=c d"), "a%26b%3Dc%20d");
    }
}
