//! What is sent over a connection that is gone is answered with a reset, as without a mesh: silence would keep the
//! sender waiting for many minutes.

use crate::harness::{
    Mesh,
    objects::{allow, client, namespace, policy, server},
};

/// The sender is told within this many milliseconds. Its kernel sends again after 200, and then ever more rarely.
const TOLD: f64 = 5_000.0;

#[test]
fn a_connection_that_is_gone_is_not_met_with_silence() {
    let objects = [
        namespace("shop"),
        client("shop/client", ""),
        server("shop/web", &[8000], ""),
        policy("shop/web", "web", &allow(&["shop/client"])),
    ]
    .concat();
    let mesh = Mesh::start("late", &[("objects.yaml", &objects)]);
    let address = mesh.addresses("shop/web-0")[0].to_string();
    let mut server = mesh.talk("web", "vanish", &["8001"]);
    assert_eq!(server.hear::<String>(), "listening");
    let mut client = mesh.talk("client", "late", &[&address, "8001"]);
    assert_eq!(client.hear::<String>(), "", "the server closes at once");
    assert_eq!(server.hear::<String>(), "gone");

    // The port listens still, but knows nothing of the connection.
    client.say("send");
    let error: Option<String> = client.hear();
    assert!(
        matches!(error.as_deref(), Some("ECONNRESET" | "EPIPE")),
        "{error:?}"
    );
    let milliseconds: f64 = client.hear();
    assert!(milliseconds < TOLD, "{milliseconds}");
    // It was no attempt to get in.
    assert_eq!(mesh.count("node-1", "peer-not-attested"), 0);
}
