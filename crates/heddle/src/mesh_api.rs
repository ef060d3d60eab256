//! Where `heddle up` listens for the other commands.

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
