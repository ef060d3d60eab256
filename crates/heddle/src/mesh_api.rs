//! Where `heddle up` listens for the other commands, and where one in the background writes.

use std::path::PathBuf;

use anyhow::bail;
use runtime::layout::Layout;

/// The API socket of a running mesh.
pub(crate) fn socket(mesh: &str) -> anyhow::Result<PathBuf> {
    let socket = Layout::new(mesh)?.api_socket();
    if !socket.exists() {
        bail!("mesh `{mesh}` is not running: start it with `heddle up DIR --mesh {mesh}`");
    }
    Ok(socket)
}

/// What a mesh in the background has said: beside its own folder, so that it can be read when the mesh did not start.
pub(crate) fn log(layout: &Layout) -> PathBuf {
    layout.lock().with_extension("log")
}
