//! The server and the client over real Unix sockets; the protocol's finer points with a raw client.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod raw;

use std::{path::Path, time::Duration};

use bytes::Bytes;
use raw::RawClient;
use tokio::{sync::mpsc, time::timeout};
use xds::{
    cache::{Cache, Change},
    client::{Client, ClientConfig, Update},
    proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE},
    server::{ClientState, ClientTypeState, Server, ServerError},
};

const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn an_empty_server_still_completes_the_first_sync() {
    let (cache, folder) = (Cache::new(), tempfile::tempdir().unwrap());
    let socket = folder.path().join("xds.sock");
    let _server = serve(&cache, &socket).await;
    let (client, mut updates) = connect(&socket, "n1");
    for _ in 0..2 {
        assert!(!client.state().borrow().synced);
        let update = next(&mut updates).await;
        assert!(update.upserts.is_empty() && update.removed.is_empty());
        update.answer.accept();
    }
    timeout(DEADLINE, client.synced()).await.unwrap();
}

#[tokio::test]
async fn only_what_changed_is_sent() {
    let (cache, folder) = (Cache::new(), tempfile::tempdir().unwrap());
    let socket = folder.path().join("xds.sock");
    cache.apply([put("a", "1"), put("b", "1")]);
    let server = serve(&cache, &socket).await;
    let (_client, mut updates) = connect(&socket, "n1");
    assert_eq!(next_addresses(&mut updates).await, names(&["a", "b"], &[]));
    cache.apply([put("a", "2"), put("b", "1"), put("c", "1")]);
    assert_eq!(next_addresses(&mut updates).await, names(&["a", "c"], &[]));
    let generation = cache.apply([delete("b")]);
    assert_eq!(next_addresses(&mut updates).await, names(&[], &["b"]));
    wait_for(&server, |clients| {
        clients[0].node == "n1"
            && clients[0].has(ADDRESS_TYPE, generation)
            && clients[0].has(AUTHORIZATION_TYPE, generation)
            && addresses(&clients[0]).held == 2
    })
    .await;
}

#[tokio::test]
async fn a_restarted_server_sends_differences_only() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("xds.sock");
    let cache = Cache::new();
    cache.apply([put("same", "1"), put("changes", "1"), put("vanishes", "1")]);
    let server = serve(&cache, &socket).await;
    let (client, mut updates) = connect(&socket, "n1");
    next_addresses(&mut updates).await;
    wait_for(&server, |clients| addresses(&clients[0]).held == 3).await;
    server.shutdown().await;
    assert!(!socket.exists());
    let mut state = client.state();
    timeout(DEADLINE, state.wait_for(|state| !state.connected))
        .await
        .unwrap()
        .unwrap();
    assert!(client.state().borrow().synced, "it keeps what it has");

    let cache = Cache::new();
    cache.apply([put("same", "1"), put("changes", "2"), put("new", "1")]);
    let _server = serve(&cache, &socket).await;
    assert_eq!(
        next_addresses(&mut updates).await,
        names(&["changes", "new"], &["vanishes"])
    );
    timeout(
        DEADLINE,
        state.wait_for(|state| state.connected && state.connections == 2),
    )
    .await
    .unwrap()
    .unwrap();
}

#[tokio::test]
async fn a_client_that_starts_first_finds_the_server_later() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("xds.sock");
    let (client, mut updates) = connect(&socket, "n1");
    let mut state = client.state();
    let failed = timeout(DEADLINE, state.wait_for(|state| state.last_error.is_some()))
        .await
        .unwrap()
        .unwrap()
        .clone();
    let message = failed.last_error.unwrap();
    assert!(
        message.contains("xds.sock") && message.contains("No such file"),
        "{message}"
    );
    let cache = Cache::new();
    cache.apply([put("a", "1")]);
    let _server = serve(&cache, &socket).await;
    assert_eq!(next_addresses(&mut updates).await, names(&["a"], &[]));
}

#[tokio::test]
async fn a_rejection_is_on_record_and_not_held() {
    let (cache, folder) = (Cache::new(), tempfile::tempdir().unwrap());
    let socket = folder.path().join("xds.sock");
    cache.apply([put("bad", "1")]);
    let server = serve(&cache, &socket).await;
    let (client, mut updates) = connect(&socket, "n1");
    let update = loop {
        let update = next(&mut updates).await;
        if update.type_url == ADDRESS_TYPE {
            break update;
        }
        update.answer.accept();
    };
    update.answer.reject("bad: no address");
    wait_for(&server, |clients| {
        let state = addresses(&clients[0]);
        state.last_error.as_deref() == Some("bad: no address")
            && state.rejected == ["bad"]
            && state.held == 0
            && state.accepted_version.is_empty()
    })
    .await;
    timeout(DEADLINE, client.synced()).await.unwrap();

    // The next change is tried again, and clears the record.
    cache.apply([put("bad", "2")]);
    assert_eq!(next_addresses(&mut updates).await, names(&["bad"], &[]));
    wait_for(&server, |clients| {
        let state = addresses(&clients[0]);
        state.last_error.is_none() && state.rejected.is_empty() && state.held == 1
    })
    .await;
}

#[tokio::test]
async fn two_clients_are_served_and_told_apart() {
    let (cache, folder) = (Cache::new(), tempfile::tempdir().unwrap());
    let socket = folder.path().join("xds.sock");
    let generation = cache.apply([put("a", "1")]);
    let server = serve(&cache, &socket).await;
    let (_first, mut first_updates) = connect(&socket, "n1");
    let (second, mut second_updates) = connect(&socket, "n2");
    next_addresses(&mut first_updates).await;
    next_addresses(&mut second_updates).await;
    let both = |clients: &[ClientState]| {
        clients
            .iter()
            .filter(|client| client.has(ADDRESS_TYPE, generation))
            .count()
            == 2
    };
    wait_for(&server, both).await;
    drop(second);
    wait_for(&server, |clients| {
        clients.len() == 1 && clients[0].node == "n1"
    })
    .await;
}

#[tokio::test]
async fn a_slow_client_gets_the_sum_and_delays_no_one() {
    let (cache, folder) = (Cache::new(), tempfile::tempdir().unwrap());
    let socket = folder.path().join("xds.sock");
    cache.apply([put("a", "0")]);
    let _server = serve(&cache, &socket).await;
    let mut slow = RawClient::connect(&socket).await;
    slow.subscribe(&["*"]).await;
    let first = slow.receive().await;
    let (_client, mut updates) = connect(&socket, "fast");
    next_addresses(&mut updates).await;
    for index in 1..=500 {
        cache.apply([put("a", &index.to_string()), put("b", &index.to_string())]);
    }
    cache.apply([delete("b"), put("end", "1")]);
    loop {
        let (upserts, _) = next_addresses(&mut updates).await;
        if upserts.contains(&"end".to_owned()) {
            break;
        }
    }
    slow.acknowledge(&first).await;
    let second = slow.receive().await;
    let mut sent: Vec<_> = second
        .resources
        .iter()
        .map(|r| {
            (
                r.name.as_str(),
                r.resource.as_ref().unwrap().value.as_slice(),
            )
        })
        .collect();
    sent.sort_unstable();
    assert_eq!(sent, [("a", &b"500"[..]), ("end", &b"1"[..])]);
    assert!(second.removed_resources.is_empty(), "it never had b");
    slow.acknowledge(&second).await;
    slow.nothing_more(&cache, "quiet").await;
}

#[tokio::test]
async fn named_subscriptions_answer_for_missing_names_too() {
    let (cache, folder) = (Cache::new(), tempfile::tempdir().unwrap());
    let socket = folder.path().join("xds.sock");
    cache.apply([put("a", "1"), put("b", "1")]);
    let _server = serve(&cache, &socket).await;
    let mut client = RawClient::connect(&socket).await;
    client.subscribe(&["a", "missing"]).await;
    let response = client.receive().await;
    assert_eq!(raw::names(&response), ["a"]);
    assert_eq!(response.removed_resources, ["missing"]);
    client.acknowledge(&response).await;
    cache.apply([put("b", "2"), put("missing", "1")]);
    let response = client.receive().await;
    assert_eq!(raw::names(&response), ["missing"]);
    client.acknowledge(&response).await;
    // The answer about "barrier" shows that the server has taken in that "a" is no longer wanted.
    client.change_subscription(&["barrier"], &["a"]).await;
    let response = client.receive().await;
    assert_eq!(response.removed_resources, ["barrier"]);
    client.acknowledge(&response).await;
    cache.apply([put("a", "2"), delete("missing")]);
    let response = client.receive().await;
    assert_eq!(raw::names(&response), Vec::<&str>::new());
    assert_eq!(response.removed_resources, ["missing"]);
}

#[tokio::test]
async fn the_wildcard_can_be_left_and_joined() {
    let (cache, folder) = (Cache::new(), tempfile::tempdir().unwrap());
    let socket = folder.path().join("xds.sock");
    cache.apply([put("a", "1"), put("b", "1")]);
    let _server = serve(&cache, &socket).await;
    let mut client = RawClient::connect(&socket).await;
    // On demand, as ztunnel asks for it: nothing but an answer.
    client.change_subscription(&["*"], &["*"]).await;
    let response = client.receive().await;
    assert!(response.resources.is_empty() && response.removed_resources.is_empty());
    client.acknowledge(&response).await;
    client.subscribe(&["a"]).await;
    let response = client.receive().await;
    assert_eq!(raw::names(&response), ["a"]);
    client.acknowledge(&response).await;
    client.subscribe(&["*"]).await;
    let response = client.receive().await;
    assert_eq!(raw::names(&response), ["b"], "a is held already");
}

#[tokio::test]
async fn a_first_request_without_names_asks_for_everything() {
    let (cache, folder) = (Cache::new(), tempfile::tempdir().unwrap());
    let socket = folder.path().join("xds.sock");
    cache.apply([put("a", "1")]);
    let _server = serve(&cache, &socket).await;
    let mut client = RawClient::connect(&socket).await;
    client.subscribe(&[]).await;
    assert_eq!(raw::names(&client.receive().await), ["a"]);
}

#[tokio::test]
async fn sockets_of_others_are_respected_and_dead_ones_replaced() {
    let (cache, folder) = (Cache::new(), tempfile::tempdir().unwrap());
    let socket = folder.path().join("xds.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let _server = serve(&cache, &socket).await;
    let mut other = Server::new(cache.clone());
    assert!(matches!(
        other.listen_unix(&socket).await,
        Err(ServerError::InUse { .. })
    ));
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(matches!(
        other.listen_unix(&file).await,
        Err(ServerError::NotASocket { .. })
    ));
    drop(other);
    assert!(socket.exists() && file.exists(), "only its own are removed");
}

fn put(name: &str, body: &str) -> Change {
    Change {
        type_url: ADDRESS_TYPE.into(),
        name: name.into(),
        body: Some(Bytes::copy_from_slice(body.as_bytes())),
    }
}

fn delete(name: &str) -> Change {
    Change {
        body: None,
        ..put(name, "")
    }
}

async fn serve(cache: &Cache, socket: &Path) -> Server {
    let mut server = Server::new(cache.clone());
    server.listen_unix(socket).await.unwrap();
    server
}

fn connect(socket: &Path, node: &str) -> (Client, mpsc::Receiver<Update>) {
    Client::start(ClientConfig {
        socket: socket.to_owned(),
        node: node.into(),
        node_id: format!("ztunnel~127.0.0.1~{node}.heddle~heddle.svc.cluster.local"),
        types: vec![AUTHORIZATION_TYPE.into(), ADDRESS_TYPE.into()],
    })
}

async fn next(updates: &mut mpsc::Receiver<Update>) -> Update {
    timeout(DEADLINE, updates.recv()).await.unwrap().unwrap()
}

/// Accepts updates until one of addresses that says something; returns what it upserts and removes.
async fn next_addresses(updates: &mut mpsc::Receiver<Update>) -> (Vec<String>, Vec<String>) {
    loop {
        let update = next(updates).await;
        let mut upserts: Vec<_> = update.upserts.into_iter().map(|u| u.name).collect();
        upserts.sort();
        update.answer.accept();
        if update.type_url == ADDRESS_TYPE && !(upserts.is_empty() && update.removed.is_empty()) {
            return (upserts, update.removed);
        }
    }
}

fn names(upserts: &[&str], removed: &[&str]) -> (Vec<String>, Vec<String>) {
    let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    (owned(upserts), owned(removed))
}

fn addresses(client: &ClientState) -> &ClientTypeState {
    client
        .types
        .iter()
        .find(|state| state.type_url == ADDRESS_TYPE)
        .unwrap()
}

async fn wait_for(server: &Server, what: impl Fn(&[ClientState]) -> bool) {
    let mut changes = server.watch_clients();
    timeout(DEADLINE, async {
        // The record has no types in the moment between registration and the first answer.
        while server.clients().iter().any(|client| client.types.len() < 2)
            || server.clients().is_empty()
            || !what(&server.clients())
        {
            changes.changed().await.unwrap();
        }
    })
    .await
    .unwrap_or_else(|_| panic!("clients stayed {:?}", server.clients()));
}
